"""Time and memory of `verify` at Reka Flash 3's layer shapes, on synthetic bf16 weights.

    python benchmarks/verify_memory.py [--layers 3] [--tokens 64] [--folder DIR]

Writes about 0.8 GB per layer and 2.5 GB of embedding and head into DIR (default: a temporary folder), verifies the
model alone and against a copy of itself in a fresh process each, and removes it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = 1 << 23
"""Elements of the random block that is repeated: enough to keep any cache cold."""


def reka_config(num_layers: int) -> Any:
    """Reka Flash 3 with fewer layers, the last one GQA."""
    from hxaconv.model.config import StudentConfig
    from hxaconv.model.variants import hxa079

    return StudentConfig(
        num_hidden_layers=num_layers,
        hidden_size=6144,
        intermediate_size=19648,
        vocab_size=100352,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=96,
        rms_norm_eps=1e-5,
        rope_theta=8e6,
        tie_word_embeddings=False,
        gqa_layers=(num_layers - 1,),
        ranks=hxa079.ranks(6144),
    )


def write_model(path: Path, num_layers: int) -> None:
    """Random normal weights of standard deviation 0.02, tensor by tensor."""
    import numpy as np

    from hxaconv.formats.dtypes import num_bytes
    from hxaconv.model.architecture import expected_tensors

    header, position = {}, 0
    for name, shape in expected_tensors(reka_config(num_layers)).items():
        end = position + num_bytes("BF16", shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    values = (np.random.default_rng(0).standard_normal(BLOCK, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    block = memoryview(values.astype("<u2").tobytes())
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while position:
            position -= file.write(block[: min(position, len(block))])


class PeakMemory:
    """The largest anonymous memory of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.partition("RssAnon:")[2].split()[0]) * 1024)


class Stopwatch:
    """Seconds inside functions, by name: of the clock, and of all cores."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()

    def wrap(self, owner: Any, attribute: str, label: str) -> None:
        """Count the time inside owner.attribute under `label`."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        def timed(*arguments: Any, **options: Any) -> Any:
            began, cpu = time.perf_counter(), time.process_time()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds[label] += time.perf_counter() - began
                self.cpu[label] += time.process_time() - cpu

        setattr(owner, attribute, timed)


def measure(paths: list[str], num_layers: int, tokens: int, threads: int, queue: Any) -> None:
    """In a fresh process: verify one model, or two against each other."""
    import torch

    import hxaconv.forward.walk as walk_module
    import hxaconv.verification.measure as measure_module
    from hxaconv.forward import hxa079
    from hxaconv.forward.pool import Matrix
    from hxaconv.forward.tokens import probe_tokens
    from hxaconv.load.checkpoint import open_checkpoint
    from hxaconv.model.model import Model
    from hxaconv.verification.compare import compare_models, verify_model

    torch.set_num_threads(threads)
    watch = Stopwatch()
    watch.wrap(walk_module.Walk, "hold", "reading, comparing, NaN")
    watch.wrap(Matrix, "product", "casts and matrix products")
    watch.wrap(hxa079, "loop", "recurrence")
    watch.wrap(measure_module, "_compare", "differences")
    config = reka_config(num_layers)
    models = [Model(config, dict(open_checkpoint(path).plan), Path(path).name) for path in paths]
    ids = probe_tokens(config.vocab_size, tokens=tokens)
    with PeakMemory() as memory:
        began, cpu = time.perf_counter(), time.process_time()
        report = compare_models(*models, ids=ids) if len(models) == 2 else verify_model(models[0], ids=ids)
        watch.seconds["everything"] = time.perf_counter() - began
        watch.cpu["everything"] = time.process_time() - cpu
    assert report.passed, report.reason
    queue.put((memory.peak, dict(watch.seconds), dict(watch.cpu)))


def run(*arguments: Any) -> tuple[int, dict[str, float], dict[str, float]]:
    """(peak memory, seconds by part, CPU seconds by part) of one verification, from its own process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(*arguments, queue))
    process.start()
    result: tuple[int, dict[str, float], dict[str, float]] = queue.get()
    process.join()
    return result


def show(title: str, peak: int, seconds: dict[str, float], cpu: dict[str, float]) -> None:
    """One measurement as lines, projected to the whole model."""
    print(f"\n{title}: peak anonymous memory {peak / 2**20:,.0f} MiB")
    for part in sorted(seconds, key=lambda name: -cpu[name]):
        print(f"  {part:<32} {seconds[part]:7.2f} s   {cpu[part]:7.2f} s of all cores")


def main() -> None:
    """Write the model, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        first, second = folder / "a.safetensors", folder / "b.safetensors"
        write_model(first, options.layers)
        os.link(first, second)
        gigabytes = first.stat().st_size / 1e9
        print(f"{options.layers} layers, {gigabytes:.1f} GB bf16, {options.tokens} tokens, {options.threads} threads")
        for title, paths in (("alone", [first]), ("against its copy", [first, second])):
            names = [str(path) for path in paths]
            show(title, *run(names, options.layers, options.tokens, options.threads))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
