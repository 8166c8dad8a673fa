"""Faults planted in the program itself: each is an edit of one line, and a command that must notice what it writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "hxaconv"
TESTS = Path(__file__).parents[1]
TEACHER = TESTS / "golden" / "reka_tiny" / "teacher"
STUDENT = TESTS / "golden" / "reka_tiny" / "student.pth"
SETTINGS = ("--rope-theta", "8e6", "--rms-norm-eps", "1e-5", "--no-tie-word-embeddings", "--variant", "hxa079")
COMMANDS = {
    "init-from-teacher": ("init-from-teacher", "{teacher}", "{out}", "--gqa-layers", "2,4"),
    "init, several files": (
        "init-from-teacher",
        "{teacher}",
        "{out}",
        "--gqa-layers",
        "2,4",
        "--max-shard-size",
        "60KB",
    ),
    "init to .pth": ("init-from-teacher", "{teacher}", "{out}.pth", "--gqa-layers", "2,4"),
    "to-pth": ("to-pth", "{folder}", "{out}.pth"),
    "to-hf": ("to-hf", "{folder}", "{out}"),
    "to-hf, cast": ("to-hf", "{folder}", "{out}", "--dtype", "float16"),
    "to-hf, padded": ("to-hf", "{folder}", "{out}", "--pad-ffn", "256"),
}
"""{folder} is a right student as a folder, made before."""


@dataclass(frozen=True)
class Fault:
    """A fault: `old` in `file` becomes `new`; `by` is the command whose check notices it, or the tests that do."""

    name: str
    file: str
    old: str
    new: str
    by: str
    also: tuple[tuple[str, str], ...] = ()
    """More edits of the same file."""

    @property
    def found_by_check(self) -> bool:
        """Whether the check after the command has to find it; else the named tests."""
        return self.by in COMMANDS

    def applies(self) -> bool:
        """Whether the text stands once in the program."""
        return (PACKAGE / self.file).read_text().count(self.old) == 1

    def planted(self, folder: Path) -> Path:
        """A copy of the program with the fault in it, to be put on PYTHONPATH."""
        copy = folder / "program"
        shutil.copytree(PACKAGE, copy / "hxaconv", ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "hxaconv" / self.file
        text = path.read_text()
        for old, new in ((self.old, self.new), *self.also):
            text = text.replace(old, new)
        path.write_text(text)
        return copy


FAULTS = (
    Fault("decay ramp from -3", "model/variants/base.py", "(-6 + 6 * ramp", "(-3 + 6 * ramp", "init-from-teacher"),
    Fault("iclr ramp too steep", "model/variants/base.py", "0.4 * line", "0.5 * line", "init-from-teacher"),
    Fault(
        "zigzag without its sign", "model/variants/base.py", "return z * z.abs()", "return z * z", "init-from-teacher"
    ),
    Fault("bonus positive", "model/variants/hxa079.py", '("H", "N"), -0.04)', '("H", "N"), 0.04)', "init-from-teacher"),
    Fault(
        "a rank rounded to 16",
        "model/variants/base.py",
        "32 * round(value / 32)",
        "16 * round(value / 16)",
        "tests/test_config.py",
    ),
    Fault(
        "gain of random matrices",
        "surgery/initial.py",
        "return (q if rows <= columns else q.T).mul_(gain)",
        "return (q if rows <= columns else q.T).mul_(2 * gain)",
        "init-from-teacher",
    ),
    Fault(
        "factors applied twice",
        "surgery/init.py",
        "scaled(recipe, factor, settings.dtype, text)",
        "scaled(recipe, factor * factor, settings.dtype, text)",
        "init-from-teacher",
    ),
    Fault(
        "attention of layer 0 everywhere",
        "surgery/init.py",
        'parts = (f"{prefix}{part}.{kind}"',
        'parts = (f"{mixer_prefix(0)}{part}.{kind}"',
        "init-from-teacher",
    ),
    Fault(
        "k and v exchanged",
        "surgery/init.py",
        '"key": "k_proj", "value": "v_proj"',
        '"key": "v_proj", "value": "k_proj"',
        "init-from-teacher",
    ),
    Fault(
        "scaled attention kept",
        "surgery/init.py",
        "return {name: cast(recipe, settings.dtype) for name, recipe in source.items()}",
        "return {name: scaled(recipe, 0.5, settings.dtype, '') for name, recipe in source.items()}",
        "init-from-teacher",
    ),
    Fault(
        "theta doubled in the student",
        "model/config.py",
        '| {"nope_layers": ()}',
        '| {"nope_layers": (), "rope_theta": teacher.rope_theta * 2}',
        "init-from-teacher",
    ),
    Fault(
        "theta doubled in config.json",
        "save/documents.py",
        '"rope_theta": config.rope_theta,\n        "rope_parameters"',
        '"rope_theta": config.rope_theta * 2,\n        "rope_parameters"',
        "init-from-teacher",
    ),
    Fault(
        "eps 1e-6 in config.json",
        "save/documents.py",
        '"rms_norm_eps": config.rms_norm_eps,\n        "rope_theta"',
        '"rms_norm_eps": 1e-6,\n        "rope_theta"',
        "init-from-teacher",
    ),
    Fault(
        "kept layers + 1",
        "save/documents.py",
        '"transformer_layers": list(config.gqa_layers)',
        '"transformer_layers": [i + 1 for i in config.gqa_layers]',
        "init-from-teacher",
    ),
    Fault(
        "tied in config.json",
        "save/documents.py",
        '"tie_word_embeddings": config.tie_word_embeddings',
        '"tie_word_embeddings": True',
        "init-from-teacher",
    ),
    Fault(
        "theta doubled in the sidecar",
        "save/documents.py",
        '"rope_theta": config.rope_theta,\n        "rope_parameters"',
        '"rope_theta": config.rope_theta * 2,\n        "rope_parameters"',
        "to-pth",
    ),
    Fault(
        "gate and up exchanged in the .pth",
        "model/names.py",
        "blocks.{{i}}.ffn.{name}.{kind}",
        "blocks.{{i}}.ffn.{dict(gate='up', up='gate').get(name, name)}.{kind}",
        "to-pth",
    ),
    Fault(
        "ln1 and ln2 exchanged in the .pth",
        "model/names.py",
        '"blocks.{i}.ln1.weight"',
        '"blocks.{i}.ln2.weight"',
        "to-pth",
        (
            (
                'post_attention_layernorm.weight", "blocks.{i}.ln2.weight"',
                'post_attention_layernorm.weight", "blocks.{i}.ln1.weight"',
            ),
        ),
    ),
    Fault(
        "the embedding as head of a .pth",
        "save/output.py",
        'if format == "pth" and HEAD not in plan:',
        'if format == "pth":',
        "to-pth",
    ),
    Fault(
        "wrong CRC in the zip",
        "formats/torchzip.py",
        "crcs[record.crc] if",
        "crcs[record.crc] ^ 1 if",
        "to-pth",
    ),
    Fault(
        "CRC of the first bytes alone",
        "save/fill.py",
        "self._crc = zlib.crc32(chunk, self._crc)",
        "self._crc = zlib.crc32(chunk[:64], self._crc)",
        "to-pth",
    ),
    Fault(
        "zip entry of another size",
        "formats/torchzip.py",
        "size, offset = min(record.size, _LIMIT_32)",
        "size, offset = min(record.size + 1, _LIMIT_32)",
        "to-pth",
    ),
    Fault(
        "offsets by one tensor",
        "formats/safetensors.py",
        "        end = offsets[1]\n",
        "        end = offsets[0]\n",
        "to-hf",
    ),
    Fault(
        "tensors in another order than the header's",
        "formats/safetensors.py",
        "    for name in names:\n        fills",
        "    for name in names[::-1]:\n        fills",
        "to-hf",
    ),
    Fault(
        "total_size of the index",
        "formats/safetensors.py",
        '"total_size": total_bytes(plan)}',
        '"total_size": total_bytes(plan) + 2}',
        "init, several files",
    ),
    Fault(
        "the index names the last file for all",
        "formats/safetensors.py",
        "where = {fill.name: layout.name for layout in layouts for fill in layout.fills}",
        "where = {fill.name: layouts[-1].name for layout in layouts for fill in layout.fills}",
        "init, several files",
    ),
    Fault(
        "a cast that truncates",
        "surgery/arithmetic.py",
        "                out.copy_(values)\n",
        "                out.copy_(values * 0.999)\n",
        "to-hf, cast",
    ),
    Fault(
        "a cast of the matrices alone",
        "surgery/arithmetic.py",
        "recipe.dtype == dtype or recipe.dtype not in FLOATS:",
        "recipe.dtype == dtype or len(recipe.shape) < 2:",
        "to-hf, cast",
    ),
    Fault(
        "padding that is not zero",
        "model/plan.py",
        "zeros = memoryview(bytearray(min(count, CHUNK_BYTES)))",
        "zeros = memoryview(bytearray(b'\\x01' * min(count, CHUNK_BYTES)))",
        "to-hf, padded",
    ),
    Fault(
        "the last bytes of a tensor are not written",
        "save/fill.py",
        "write_from(fd, chunk, position)",
        "write_from(fd, chunk[:-2] if len(chunk) > 64 else chunk, position)",
        "to-hf",
    ),
    Fault("the seed is not used", "surgery/initial.py", 'f"{seed}:{name}"', 'f"0:{name}"', "tests/test_initial.py"),
    Fault(
        "NaN is not counted",
        "save/fill.py",
        "self._nonfinite += count_nonfinite(chunk, self._dtype)",
        "self._nonfinite += 0",
        "tests/test_writer.py",
    ),
    Fault("a factor of the preset", "surgery/init.py", '"value": 0.3,', '"value": 0.5,', "tests/test_surgery.py"),
    Fault(
        "journal before sync",
        "save/fill.py",
        "                file.sync()\n                self._done(file.unsynced)\n",
        "                self._done(file.unsynced)\n                file.sync()\n",
        "tests/test_writer.py",
    ),
    Fault(
        "a resumed run that trusts what is recorded",
        "save/fill.py",
        "checks.found()[:2] == earlier[:2]",
        "True",
        "tests/test_writer.py",
    ),
    Fault(
        "published without syncing",
        "save/staging.py",
        "                write_from(fd, memoryview(data), offset)\n            diskio.sync_file(fd)\n",
        "                write_from(fd, memoryview(data), offset)\n",
        "tests/test_publishing.py",
    ),
    Fault(
        "the folder's entries are not synced",
        "save/staging.py",
        "        os.rename(staged, final)\n    diskio.sync_folder(staging.target.parent)\n",
        "        os.rename(staged, final)\n",
        "tests/test_staging.py",
    ),
    Fault(
        "the target before its sidecar",
        "save/staging.py",
        "return [*beside, (self.checkpoint, self.target)]",
        "return [(self.checkpoint, self.target), *beside]",
        "tests/test_staging.py",
    ),
    Fault(
        "a source that changes while it is read",
        "formats/files.py",
        "        if changed:\n",
        "        if False:\n",
        "tests/test_writer.py",
    ),
    Fault(
        "k scaled by the decay",
        "model/variants/hxa079.py",
        "scale = (-w.exp()).exp() if by_decay else w",
        "scale = (-w.exp()).exp()",
        "tests/test_reference.py",
    ),
    Fault(
        "RoPE in kept layers",
        "forward/hxa079.py",
        "    if index in carry.caches:\n",
        "    q = rotate(q, torch.arange(q.shape[1]), config.rope)\n    if index in carry.caches:\n",
        "tests/test_reference.py",
    ),
)


def environment(program: Path) -> dict[str, str]:
    """Of a process that runs the copy."""
    return {**os.environ, "PYTHONPATH": f"{program}:{TESTS}", "OMP_NUM_THREADS": "1"}


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line of a copy of the program."""
    command = [sys.executable, "-P", "-m", "hxaconv", *words, "--quiet"]
    return subprocess.run(command, env=environment(program), capture_output=True, text=True, check=False)


def right_folder(folder: Path) -> Path:
    """The golden student as a folder, written by the program as it is."""
    done = run(PACKAGE.parent, "to-hf", str(STUDENT), str(folder / "right"), *SETTINGS)
    assert done.returncode == 0, done.stderr
    return folder / "right"


def notices(fault: Fault, folder: Path, right: Path) -> tuple[bool, str]:
    """(whether it is found, what was said): by the check of a command, or by tests."""
    program = fault.planted(folder)
    if fault.found_by_check:
        filled = [word.format(teacher=TEACHER, out=folder / "out", folder=right) for word in COMMANDS[fault.by]]
        done = run(program, *filled)
        return done.returncode in (1, 2) and not (folder / "out").exists(), done.stderr.strip()
    return tests_fail(program, [fault.by])


def tests_fail(program: Path, files: Sequence[str]) -> tuple[bool, str]:
    """Whether tests of this repository fail with a copy of the program."""
    root = TESTS.parent
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=root, env=environment(program), capture_output=True, text=True, check=False)
    return done.returncode == 1, done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
