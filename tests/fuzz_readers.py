"""Mutate checkpoints and feed them to the readers: nothing but HxaconvError may come out.

    python tests/fuzz_readers.py --executions 1000000 --record benchmarks/FUZZ.md

With atheris installed mutation is guided by coverage; without it, it is random. An input is one byte
that chooses a target, and what that target reads. What is accepted must keep its promises: every
tensor inside the file, as many bytes as its shape says.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
GUIDED = any(argument.startswith("--guided") for argument in sys.argv)
if GUIDED:
    import atheris

    with atheris.instrument_imports(include=["hxaconv"]):
        import hxaconv.load.checkpoint
        import hxaconv.load.inspection  # noqa: F401

from hostile import corpus, forge  # noqa: E402

from hxaconv.calls import Call  # noqa: E402
from hxaconv.errors import HxaconvError  # noqa: E402
from hxaconv.formats import Contents, read_contents  # noqa: E402
from hxaconv.formats.dtypes import num_bytes  # noqa: E402
from hxaconv.formats.files import Extent, SourceFile  # noqa: E402
from hxaconv.formats.json_files import as_bytes, read_json  # noqa: E402
from hxaconv.formats.pickles import parse  # noqa: E402
from hxaconv.load import load_teacher  # noqa: E402
from hxaconv.load.checkpoint import assemble  # noqa: E402
from hxaconv.load.files import Folder  # noqa: E402
from hxaconv.load.inspection import inspect  # noqa: E402
from hxaconv.load.student import is_student, student_model  # noqa: E402
from hxaconv.model.config import student_of  # noqa: E402
from hxaconv.model.plan import Buffers, Plan, Ranges, Recipe  # noqa: E402
from hxaconv.save.documents import model_card, student_json  # noqa: E402
from hxaconv.save.output import Record  # noqa: E402

MAX_INPUT_BYTES = 16_384
MEMORY_LIMIT = 1_500_000_000
SECONDS_LIMIT = 10
READ_BACK_BYTES = 100_000
"""Tensors up to this size are read, to see that a recipe makes what it promises."""


class MemoryFile(SourceFile):
    """A source file whose bytes are at hand."""

    def __init__(self, data: bytes, name: str = "x") -> None:
        super().__init__(name, name, len(data))
        self.data = data

    def read(self, offset: int, count: int) -> bytes:
        """As SourceFile reads: all of it or an error."""
        assert offset >= 0, "a reader asked for a negative offset"
        assert 0 <= count <= 2 * self.size + 100, "a reader asked for more than there is"
        if offset + count > self.size:
            raise HxaconvError(f"{self.label} ends at byte {self.size}, expected {offset + count}")
        return self.data[offset : offset + count]

    def chunks(self, offset: int, count: int, buffer: memoryview) -> Any:
        """In one piece."""
        yield memoryview(self.read(offset, count))


def check_promises(contents: Contents) -> None:
    """Every recipe that may be read makes exactly the bytes of its shape."""
    buffers = Buffers(4096)
    for recipe in contents.tensors.values():
        if recipe.nbytes <= READ_BACK_BYTES:
            assert sum(len(piece) for piece in recipe.chunks(buffers)) == recipe.nbytes


def fuzz_container(data: bytes) -> None:
    """A whole weight file."""
    check_promises(read_contents(MemoryFile(data)))


def fuzz_pickle(data: bytes) -> None:
    """A pickle in an archive that is whole."""
    out = io.BytesIO()
    records = [("a/data.pkl", data), ("a/data/0", bytes(16)), ("a/data/1", bytes(16))]
    forge.write_zip(out, records)
    check_promises(read_contents(MemoryFile(out.getvalue())))


def fuzz_bare_pickle(data: bytes) -> None:
    """A pickle alone."""
    parse(io.BytesIO(data), "x")


def fuzz_header(data: bytes) -> None:
    """A safetensors header of the right length before 32 bytes of data."""
    check_promises(read_contents(MemoryFile(len(data).to_bytes(8, "little") + data + bytes(32))))


_SHARD = {"dtype": "BF16", "shape": [4, 2], "data_offsets": [0, 16]}


def fuzz_folder(data: bytes) -> None:
    """An index before two shards; file names and tensor names are the index's own."""
    files = {"model.safetensors.index.json": data}
    for file, name in (("a.safetensors", "model.embed_tokens.weight"), ("b.safetensors", "lm_head.weight")):
        header = json.dumps({name: _SHARD}).encode()
        files[file] = len(header).to_bytes(8, "little") + header + bytes(16)
    listing = Folder(
        label="x",
        sizes={name: len(content) for name, content in files.items()},
        open=lambda name: MemoryFile(files[name], name),
    )
    opened = assemble(listing)
    if opened.problem is not None:
        raise opened.problem
    assert opened.stored_names.keys() <= {"model.embed_tokens.weight", "lm_head.weight"}


def fuzz_config(data: bytes) -> None:
    """config.json, names and shapes: {"config": ..., "tensors": {name: shape}}, opened in every way, written again."""
    raw = read_json(MemoryFile(data))
    config, shapes = raw.get("config"), raw.get("tensors")
    if not isinstance(config, dict) or not isinstance(shapes, dict) or len(shapes) > 300:
        return
    plan: Plan = {
        name: Recipe("BF16", tuple(shape), Ranges((Extent(None, 0, num_bytes("BF16", tuple(shape))),)), name)
        for name, shape in shapes.items()
        if isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape) and len(shape) < 5
    }
    opened = assemble(
        Folder(
            label="x",
            sizes={"config.json": 1, "x.pth": 1},
            open=lambda name: MemoryFile(json.dumps(config).encode(), name),
            read=lambda file: Contents(container="pth", tensors=plan),
        )
    )
    json.dumps(inspect(opened))
    if opened.problem is not None:
        raise opened.problem
    if is_student(opened):
        student = student_model(opened)
        config, carried = student.student, student.raw
    else:
        teacher = load_teacher(opened)
        config, carried = student_of(teacher.config, ()), teacher.raw
    as_bytes(student_json(config, carried, "BF16"))
    model_card(config, carried, Record(call=Call("to-hf")))


TARGETS: tuple[Callable[[bytes], None], ...] = (
    *(fuzz_container, fuzz_pickle, fuzz_bare_pickle, fuzz_header, fuzz_folder, fuzz_config),
)
JSON_TARGETS = (fuzz_header, fuzz_folder, fuzz_config)


@dataclass
class Tally:
    """What a run has seen."""

    executions: dict[str, int] = field(default_factory=lambda: dict.fromkeys((t.__name__ for t in TARGETS), 0))
    accepted: dict[str, int] = field(default_factory=lambda: dict.fromkeys((t.__name__ for t in TARGETS), 0))
    slowest_ms: float = 0.0

    def execute(self, data: bytes) -> None:
        """One input; anything but acceptance or HxaconvError is a finding and goes up."""
        target = TARGETS[data[0] % len(TARGETS)]
        self.executions[target.__name__] += 1
        start = time.process_time()
        try:
            target(data[1:])
            self.accepted[target.__name__] += 1
        except HxaconvError:
            pass
        took = 1000 * (time.process_time() - start)
        self.slowest_ms = max(self.slowest_ms, took)
        assert took < 1000 * SECONDS_LIMIT, f"took {took:.0f} ms"

    def report(self) -> dict[str, Any]:
        """As plain data."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "executions": self.executions,
            "accepted": self.accepted,
            "slowest_ms": round(self.slowest_ms, 1),
            "peak_mib": round(peak),
        }


# --- inputs to begin with ---------------------------------------------------------------------------


FIRST_SHARD = "model-00001-of-00002.safetensors"
FUSED = {"self_attn.qkv_proj": 48 + 24 + 24, "mlp.gate_up_proj": 160}
Seed = tuple[Callable[[bytes], None], bytes]


def seeds() -> list[bytes]:
    """What is right, for every target, and after that the corpus of hostile files."""
    right: list[Seed] = [(fuzz_config, data) for data in model_seeds()]
    for value in (corpus.GOOD_VALUE, corpus.LEGACY_VALUE):
        right += [(target, forge.pickled(value)) for target in (fuzz_pickle, fuzz_bare_pickle)]
    right += _built(list(corpus.GOOD.values()))
    wrong = _built([case.build for case in corpus.CASES])
    return [bytes([TARGETS.index(target)]) + data for target, data in right + wrong if len(data) < MAX_INPUT_BYTES]


def _built(builders: list[Callable[[Path], Path]]) -> list[Seed]:
    made: list[Seed] = []
    with tempfile.TemporaryDirectory() as name:
        for number, build in enumerate(builders):
            folder = Path(name) / str(number)
            folder.mkdir()
            path = build(folder)
            index = path / "model.safetensors.index.json"
            if path.is_file() and path.stat().st_size < MAX_INPUT_BYTES:
                data = path.read_bytes()
                made += [(fuzz_container, data)] + [(fuzz_header, data[8:-32])] * (data[8:9] == b"{")
            elif index.is_file():
                made.append((fuzz_folder, index.read_bytes()))
    return made


def model_seeds() -> list[bytes]:
    """Config and shapes of the golden cases, cut to two layers."""
    made = []
    for case in sorted((TESTS / "golden").iterdir()):
        config = json.loads((case / "teacher" / "config.json").read_text())
        student = {"rwkv_architecture": "hxa079", "transformer_layers": [1], "lora_rank_decay": 256}
        for path, extra in ((case / "student.pth", student), (case / "student_hf" / "model.safetensors", {})):
            tensors = read_contents(SourceFile.local(path)).tensors
            shapes = {n: list(r.shape) for n, r in tensors.items() if not any(f".{i}." in n for i in range(2, 99))}
            made.append(json.dumps({"config": config | extra, "tensors": shapes}).encode())
    tensors = read_contents(SourceFile.local(TESTS / "golden" / "reka_tiny" / "teacher" / FIRST_SHARD)).tensors
    shapes = {name: list(recipe.shape) for name, recipe in tensors.items()}
    shapes |= {f"model.layers.0.{name}.weight": [rows, 48] for name, rows in FUSED.items()}
    carried = {"model_type": "phi3", "eos_token_id": [1, float("nan")], "attention_dropout": 0.5}
    made.append(json.dumps({"config": config | carried, "tensors": shapes}).encode())
    return made


# --- mutation -----------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308)
WORDS = ("", "x", "\x1b[2J", "../x", "/x", "a.safetensors", "silu", "qwen3", "default", "full_attention")
ODD = (None, True, False, *NUMBERS, *WORDS, [], {}, [0, 0], [[]], [None])
PIECES = (
    *(b"\x80\x02", b"}(", b"](", b"tR", b"tQ", b"h\x00", b"q\x00", b"\x01\x00\x18\x00", b"PK\x01\x02", b"PK\x05\x06"),
    *(b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"X\x07\x00\x00\x00storage"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"\xff" * 4, b"\xff" * 8),
)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    """Exchange, remove, copy or rename one to three values of a JSON text."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, chance)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        root = _mutate_node(root, chance)
    try:
        return json.dumps(root).encode("utf-8", errors="replace")
    except (ValueError, RecursionError):
        return data


def _mutate_node(root: Any, chance: random.Random) -> Any:
    spots: list[tuple[Any, Any]] = []
    level = [root]
    while level:
        node = level.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        spots += [(node, key) for key in keys]
        level += [node[key] for key in keys]
    if not spots:
        return _copy(chance.choice(ODD))
    node, key = chance.choice(spots)
    kind = chance.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(chance.choice(spots)[1]) + chance.choice(("", "x", "\n"))] = node.pop(key)
    elif kind == 2:
        other, place = chance.choice(spots)
        node[key] = _copy(other[place])
    elif kind == 3 and type(node[key]) is int:
        node[key] += chance.choice((-1, 1, 8, 2**20))
    else:
        node[key] = _copy(chance.choice(ODD))
    return root


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, removed, repeated or put in between."""
    made = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(made) + 1)
        kind = chance.randrange(6)
        if kind == 0 and at < len(made):
            made[at] = chance.randrange(256)
        elif kind == 1 and at < len(made):
            made[at] = (made[at] + chance.choice((1, -1, 128))) % 256
        elif kind == 2:
            del made[at : at + chance.choice((1, 2, 8, 64))]
        elif kind == 3:
            made[at:at] = chance.choice(PIECES)
        elif kind == 4:
            made[at : at + 8] = chance.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(8, "little")
        else:
            start = chance.randrange(len(made) + 1)
            made[at:at] = made[start : start + chance.choice((1, 4, 32))]
    return bytes(made)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One input from another, for the same target but for a hundredth of them."""
    target, content = TARGETS[data[0] % len(TARGETS)], data[1:]
    if target in JSON_TARGETS and chance.random() < 0.8:
        content = mutate_json(content, chance)
    else:
        content = mutate_bytes(content, chance)
    head = chance.randrange(256) if chance.random() < 0.01 else data[0]
    return bytes([head]) + content[: MAX_INPUT_BYTES - 1]


# --- runs -----------------------------------------------------------------------------------------------


def run_random(executions: int, seed: int, tally: Tally) -> None:
    """Without coverage: mutate the seeds, and now and then what was mutated before."""
    chance = random.Random(seed)
    signal.signal(signal.SIGVTALRM, _too_slow)
    first = seeds()
    pools: list[list[bytes]] = [[data for data in first if data[0] == number] for number in range(len(TARGETS))]
    for data in first:
        _execute_in_time(tally, data)
    for _ in range(executions - len(first)):
        pool = chance.choice(pools)
        parent = chance.choice(pool[:4] if chance.random() < 0.5 else pool)
        data = mutate(parent, chance)
        if len(pool) < 1000 and chance.random() < 0.02:
            pool.append(data)
        _execute_in_time(tally, data)


def _execute_in_time(tally: Tally, data: bytes) -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS_LIMIT)
    try:
        tally.execute(data)
    except BaseException:
        print(f"input: {data!r}", file=sys.stderr)
        raise
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _too_slow(*_: object) -> None:
    raise AssertionError(f"took more than {SECONDS_LIMIT} s")


def run_guided(executions: int, seed: int, tally: Tally, report: Path) -> None:
    """With atheris, which keeps the inputs that reach new code. Ends the process."""
    folder = Path(tempfile.mkdtemp())
    for number, data in enumerate(seeds()):
        (folder / str(number)).write_bytes(data)
    state = {"left": executions}

    def one_input(data: bytes) -> None:
        if not data:
            return
        tally.execute(data)
        state["left"] -= 1
        if state["left"] % 10_000 == 0:
            report.write_text(json.dumps(tally.report()))
        if state["left"] <= 0:
            sys.stderr.flush()
            os._exit(0)

    def mutator(data: bytes, max_size: int, number: int) -> bytes:
        chance = random.Random(number)
        if data and chance.random() < 0.6:
            return mutate(data, chance)[:max_size]
        made: bytes = atheris.Mutate(data, max_size)
        return made

    options = [f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", f"-timeout={SECONDS_LIMIT}"]
    options += ["-rss_limit_mb=1500", f"-artifact_prefix={folder.parent}/finding-", "-use_value_profile=0"]
    atheris.Setup([sys.argv[0], *options, str(folder)], one_input, custom_mutator=mutator)
    atheris.Fuzz()


def limit_memory() -> None:
    """Let the run fail rather than the machine."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))


def record(path: Path, report: dict[str, Any], engine: str, seed: int, seconds: float) -> None:
    """The result as a page."""
    total = sum(report["executions"].values())
    lines = [
        "# Fuzzing the readers",
        "",
        f"{total:,} executions, no finding: every input was accepted and kept its promises, or was refused with the",
        "package's own error. Any other exception, an assertion, more than 10 s for one input or more than",
        f"{MEMORY_LIMIT // 10**6} MB would have ended the run.",
        "",
        f"* engine: {engine}, seed {seed}; inputs to begin with: the hostile corpus of `tests/hostile` and the",
        "  golden cases",
        f"* Python {platform.python_version()}, {platform.system()}",
        f"* {seconds:.0f} s; slowest input {report['slowest_ms']} ms; peak memory {report['peak_mib']} MiB",
        "",
        "| target | executions | accepted |",
        "|---|---|---|",
    ]
    for target in TARGETS:
        name = target.__name__
        what = (target.__doc__ or "").rstrip(".")
        lines.append(f"| {what} | {report['executions'][name]:,} | {report['accepted'][name]:,} |")
    lines += ["", "Repeat with `python tests/fuzz_readers.py --executions 1000000 --record benchmarks/FUZZ.md`."]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run, guided where atheris is installed, and record the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--executions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("auto", "guided", "random"), default="auto")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--guided", type=Path, metavar="REPORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tally = Tally()
    if options.guided:
        run_guided(options.executions, options.seed, tally, options.guided)
    start = time.perf_counter()
    guided = options.engine == "guided" or (options.engine == "auto" and importlib.util.find_spec("atheris"))
    if guided:
        report_path = Path(tempfile.mkdtemp()) / "report.json"
        counts = [f"--executions={options.executions}", f"--seed={options.seed}", f"--guided={report_path}"]
        subprocess.run([sys.executable, __file__, *counts], check=True)
        report = json.loads(report_path.read_text())
    else:
        limit_memory()
        run_random(options.executions, options.seed, tally)
        report = tally.report()
    print(json.dumps(report, indent=1))
    if options.record:
        engine = "atheris (guided by coverage)" if guided else "random mutation"
        record(options.record, report, engine, options.seed, time.perf_counter() - start)


if __name__ == "__main__":
    main()
