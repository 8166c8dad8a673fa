"""What stands on disk against what was meant to, read back: settings, names, dtypes, shapes, checksums, digests."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import CheckFailed, HxaconvError, bullet_list, shortened
from hxaconv.formats.dtypes import BY_TORCH_NAME, FLOATS
from hxaconv.load import open_checkpoint
from hxaconv.model.config import StudentConfig
from hxaconv.model.model import Checkpoint, Model
from hxaconv.model.names import EMBEDDING, HEAD
from hxaconv.model.plan import Buffers, Recipe, main_dtype, same_bytes, total_bytes
from hxaconv.progress import Progress, Result, bar
from hxaconv.save.documents import settings_digest
from hxaconv.save.fill import digest_of_file, type_text
from hxaconv.verification import specification
from hxaconv.verification.report import Report

if TYPE_CHECKING:
    from hxaconv.save.output import Output

Verify = Callable[[Model, "Progress | None"], Report]
"""Checks the tensors of the student that was written, and shows how far it is."""
NUMERIC = ("finite weights", "finite logits", "logits", "layers", "GQA layers")
"""Checks that NaN and Inf alone make fail."""
ALGORITHMS = ("crc32", "sha256")


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """What `save` has an output put to before it gets its name; `verify` looks at the values of its tensors."""

    verify: Verify

    def settings(self, output: Output, raw: Mapping[str, Any], where: str) -> list[str]:
        """The settings on disk against the requested ones, by the literal specification."""
        assert output.student is not None
        return specification.wrong_values(intended(output.student.student, output.dtype), raw, where)

    def report(self, output: Output, staged: Path, *, allow_nonfinite: bool) -> Report:
        """What was written, read back; allowed values that are not finite are remarks, those of bits still count."""
        assert output.student is not None
        progress, checkpoint = output.record.call.progress, open_checkpoint(str(staged))
        report = check_output(
            checkpoint,
            output.student,
            output.tensors,
            output.dtype,
            str(output.target),
            lambda written: self.verify(written, progress),
        )
        if allow_nonfinite and any(not c.passed and c.name.startswith("finite") for c in report.checks):
            report.checks = [
                replace(check, passed=True, detail=f"allowed by --allow-nonfinite: {check.detail}")
                if not check.passed and check.name in NUMERIC
                else check
                for check in report.checks
            ]
        return report


def check_output(
    checkpoint: Checkpoint,
    asked: Model,
    names: Mapping[str, Recipe],
    dtype: str,
    label: str,
    verify: Callable[[Model], Report],
) -> Report:
    """What was written, read back: its files first, then, where these are right, `verify` on its tensors.

    Args:
        asked: the student that had to be written.
        names: what had to be stored, by the names as they are in the files.
        dtype: its main one.
        label: what messages call it.
    """
    files = Report(source=label)
    stored = set(checkpoint.stored_names.values()) | checkpoint.shell.keys()
    wrong = [f"{name} is missing" for name in names if name not in stored]
    wrong += [f"{name} is there" for name in stored if name not in names]
    files.problems("tensors as asked", wrong, f"{len(stored)}, no other")
    if shell := checkpoint.shell:
        wrong = [name for name, found in shell.items() if name in names and not same_bytes(found, names[name])]
        wrong = [f"{name} differs from the source's" for name in wrong]
        files.problems("what wraps the text model", wrong, f"{len(shell)} tensors, the source's")
    wanted = dict(asked.plan)
    if HEAD not in wanted and EMBEDDING in wanted:
        wanted[HEAD] = wanted[EMBEDDING]
    wrong = [
        f"{name} is {found.dtype} {found.shape}, expected {wanted[name].dtype} {wanted[name].shape}"
        for name, found in checkpoint.plan.items()
        if name in wanted and (found.dtype, found.shape) != (wanted[name].dtype, wanted[name].shape)
    ]
    files.problems("dtypes as asked", wrong, f"{len(checkpoint.plan)} tensors")
    _check_names(files, checkpoint)
    raw, where = _settings_of(checkpoint)
    if raw:
        expected = intended(asked.student, dtype) | specification.shape_values(checkpoint.plan)
        wrong = specification.wrong_values(expected, raw, where)
        files.problems("settings as asked", wrong, f"{where} has them all")
    _check_files(files, checkpoint)
    if not files.passed:
        return files
    report = verify(Model(asked.config, dict(checkpoint.plan), label, asked.raw))
    report.checks += files.checks
    return report


def check_own(report: Report, checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> None:
    """Add what the files of a student show by themselves: config against tensors, names, figures of the container.

    `provenance` is its record, with the digests of tensors and small files.
    """
    raw, where = _settings_of(checkpoint)
    if raw:
        implied = specification.shape_values(checkpoint.plan) | specification.dtype_values(checkpoint.plan)
        wrong = specification.wrong_values(implied, raw, where, complete=False)
        report.problems("config and tensors", wrong, f"{where} agrees with the tensors")
    if checkpoint.key_format == "rwkv":
        _check_names(report, checkpoint)
    check_dtypes(report, checkpoint, provenance)
    if recorded := _recorded(provenance):
        stored = {*checkpoint.stored_names.values(), *checkpoint.shell}
        lost = [f"{name} is recorded and not there" for name in recorded if name not in stored]
        report.problems("recorded tensors", lost, f"all {len(recorded)} are there")
    _check_files(report, checkpoint)
    if provenance.get("files"):
        wrong = wrong_files(checkpoint, provenance)
        report.problems("recorded files", wrong, "config, sidecar and code are as they were written")


def check_dtypes(report: Report, checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> None:
    """Add whether tensors of another dtype than the model's are intended.

    Trainers leave some in float32, which is noted. A tensor of the other 16-bit type contradicts the config, and one
    whose recorded digest is not that of its bytes was cast since: both are wrong.
    """
    raw, where = _settings_of(checkpoint)
    named = BY_TORCH_NAME.get(str(raw.get("torch_dtype") or raw.get("dtype")))
    usual, recorded = main_dtype(checkpoint.plan), _recorded(provenance)
    wrong, odd = [], []
    for name, recipe in checkpoint.plan.items():
        if recipe.dtype == usual or recipe.dtype not in FLOATS:
            continue
        odd.append(f"{name} ({recipe.dtype})")
        then = recorded.get(checkpoint.stored_names[name], ("", None))[0]
        if named is not None and named.name == usual and {usual, recipe.dtype} == {"F16", "BF16"}:
            wrong.append(f"{name} is {recipe.dtype}, {where} has {named.torch_name}")
        elif then.partition(":")[0] in ALGORITHMS and then != digest(recipe, then):
            wrong.append(f"{name} is {recipe.dtype}, and not as it was written")
    if odd and not wrong:
        report.notes.append(f"{len(odd)} tensors are not {usual}, as the others are: {shortened(odd)}")
    good = f"{len(checkpoint.plan) - len(odd)} of {len(checkpoint.plan)} tensors are {usual}"
    report.problems("dtypes and config", wrong, good)


def _settings_of(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """The content of config.json, or of a sidecar, and its name; nothing where there is none."""
    if checkpoint.config is not None:
        return checkpoint.config, "config.json"
    return checkpoint.sidecar or {}, "the sidecar"


def _check_names(report: Report, checkpoint: Checkpoint) -> None:
    wrong = specification.wrong_names(checkpoint.stored_names, checkpoint.key_format)
    report.problems("names", wrong, f"those of the {checkpoint.key_format} key format")


def _check_files(report: Report, checkpoint: Checkpoint) -> None:
    """Add whether the container's own figures are right: the index of a folder, the checksums of a `.pth`."""
    if checkpoint.root is None:
        return
    if checkpoint.container == "safetensors" and checkpoint.extra.get("index"):
        report.problems("index", specification.wrong_index(checkpoint.root), "names what the files hold")
    elif checkpoint.container == "pth":
        paths = [file.path for file in checkpoint.files if file.path is not None]
        wrong = [problem for path in paths for problem in specification.wrong_checksums(Path(path))]
        report.problems("checksums", wrong, "every CRC-32 in the file is that of its bytes")


SAME_WORDS = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "rwkv_architecture"),
    *("attention_bias", "mlp_bias"),
)
OF_EXPERTS = (
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "mlp_only_layers"),
    "decoder_sparse_step",
)
"""Settings that StudentConfig, and its experts, call what config.json calls them."""


def intended(config: StudentConfig, dtype: str) -> dict[str, Any]:
    """What a loader has to read in the config of such a student."""
    spelled = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype]
    ranks = {"w1": config.ranks.decay, "a1": config.ranks.iclr, "v1": config.ranks.value, "k1": config.ranks.key}
    ranks["g1"] = config.ranks.gate
    values = {
        **{name: getattr(config, name) for name in SAME_WORDS},
        specification.NESTED_THETA: config.rope_theta,
        "transformer_layers": sorted(config.gqa_layers),
        "enable_qk_norm": config.qk_norm,
        "attention_out_bias": config.output_bias,
        **{specification.RANKS[name]: rank for name, rank in ranks.items() if rank},
        "torch_dtype": spelled,
        "dtype": spelled,
        "hidden_act": "silu",
        "rope_scaling": config.rope_scaling.to_dict() if config.rope_scaling else None,
    }
    if config.experts is not None:
        values |= {name: getattr(config.experts, name) for name in OF_EXPERTS}
        values["mlp_only_layers"] = list(config.experts.mlp_only_layers)
    return values


# --- Recorded digests ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class DigestReport(Result):
    """How many tensors were read, and every one that is not what was recorded."""

    source: str
    checked: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every recorded digest is that of the bytes on disk."""
        return not self.problems

    @property
    def headline(self) -> str:
        """How many were read, and whether they agree."""
        agree = "digests agree" if self.passed else f"{len(self.problems)} are not what was written"
        return f"{self.checked} tensors, {self.nbytes:,} bytes: {agree}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        problems = list(self.problems)
        return {"passed": self.passed, "checked": self.checked, "bytes": self.nbytes, "problems": problems}

    def raise_if_failed(self) -> None:
        """Turn differences into the error that ends a command with exit code 1.

        Raises:
            CheckFailed: listing every tensor that differs.
        """
        if self.problems:
            raise CheckFailed(
                f"{self.source}: {len(self.problems)} tensors or files are not as they were written:\n"
                f"{bullet_list(self.problems)}",
                hint="The files were changed or damaged after the conversion; convert or copy them again.",
            )


def check_digests(
    checkpoint: Checkpoint, provenance: Mapping[str, Any], progress: Progress | None = None
) -> DigestReport:
    """Read every tensor and compare it with the digest recorded for its stored name.

    `provenance` is hxaconv.json, or the `hxaconv` part of a sidecar:
    {"tensors": {name: {"type": "BF16 [48, 256]", "digest": "crc32:..."}}}; older records have no type.

    Raises:
        HxaconvError: when no digests were recorded.
    """
    recorded = _recorded(provenance)
    if not any(expected for expected, _ in recorded.values()):
        raise HxaconvError(
            f"{checkpoint.label} has no recorded digests",
            hint="They are written by default; this checkpoint is from elsewhere, or was made with --digest none.",
        )
    plan = {checkpoint.stored_names[name]: recipe for name, recipe in checkpoint.plan.items()}
    problems = wrong_files(checkpoint, provenance)
    problems += [f"{name} is recorded and not there" for name in recorded if name not in plan]
    problems += [f"{name} is there and not recorded" for name in plan if name not in recorded]
    both = {name: recipe for name, recipe in plan.items() if name in recorded}
    problems += [
        f"{name} is {found}, recorded is {then}"
        for name, recipe in both.items()
        if (then := recorded[name][1]) and (found := type_text(recipe)) != then
    ]
    read = {name: recipe for name, recipe in both.items() if recorded[name][0]}
    total = total_bytes(read)
    with bar(progress, "digests", total) as advance:
        for name, recipe in read.items():
            expected = recorded[name][0]
            found = digest(recipe, expected, advance, name)
            if found != expected:
                problems.append(f"{name} has {found}, recorded is {expected}")
    return DigestReport(checkpoint.label, len(read), total, tuple(problems))


def wrong_files(checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> list[str]:
    """Small files whose recorded digest is not theirs any more; the model card may be edited.

    Only those on this machine are looked at.
    """
    recorded, root = provenance.get("files"), checkpoint.root
    if not isinstance(recorded, dict) or root is None:
        return []
    problems = []
    for name, expected in recorded.items():
        if name == "README.md" or not isinstance(expected, str):
            continue
        kind = expected.partition(":")[0]
        if not root.is_dir():
            found = settings_digest(checkpoint.sidecar or {}, kind)
        elif (root / name).is_file():
            found = digest_of_file(root / name, kind)
        else:
            problems.append(f"{name} is recorded and not there")
            continue
        if found != expected:
            problems.append(f"{name} has {found}, recorded is {expected}")
    return problems


def _recorded(provenance: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Tensor name -> its recorded digest, or "", and type; nothing of a record that is not as hxaconv writes it."""
    entries, found = provenance.get("tensors"), dict[str, tuple[str, str | None]]()
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("digest"), str | None):
            return {}
        found[name] = entry.get("digest") or "", entry.get("type")
    return found


def digest(
    recipe: Recipe, like: str, advance: Callable[[int, str], None] = lambda n, what: None, name: str = ""
) -> str:
    """`crc32:89abcdef` or `sha256:...` of a tensor's bytes, by the algorithm that `like` begins with.

    Raises:
        HxaconvError: for another algorithm.
    """
    algorithm, crc, sha = like.partition(":")[0], 0, hashlib.sha256()
    if algorithm not in ALGORITHMS:
        raise HxaconvError(f"unknown digest {algorithm!r}", hint=f"Known: {', '.join(ALGORITHMS)}.")
    for chunk in recipe.chunks(Buffers()):
        if algorithm == "crc32":
            crc = zlib.crc32(chunk, crc)
        else:
            sha.update(chunk)
        advance(len(chunk), name)
    return f"crc32:{crc:08x}" if algorithm == "crc32" else f"sha256:{sha.hexdigest()}"
