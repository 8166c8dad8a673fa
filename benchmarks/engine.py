"""Parts of the engine that no single command shows, each in a process of its own.

python benchmarks/engine.py initialise TEACHER      seconds of one thread for all initial values
python benchmarks/engine.py scale STUDENT OUT       every tensor times 0.5, through the writer
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def initialise(teacher: str) -> None:
    """Make every initial value of the default student, and print how long it took."""
    from hxaconv.load import load_teacher
    from hxaconv.model.config import student_of
    from hxaconv.model.layer_maps import uniform
    from hxaconv.model.plan import Buffers
    from hxaconv.surgery.initial import initial_parameters

    model = load_teacher(teacher)
    config = student_of(model.config, uniform(model.config.num_hidden_layers))
    buffers, nbytes = Buffers(), 0
    start, busy = time.monotonic(), time.process_time()
    for layer in config.rwkv_layers:
        for recipe in initial_parameters(config, layer, 0, "BF16").values():
            nbytes += sum(len(piece) for piece in recipe.chunks(buffers))
    print(
        json.dumps(
            {
                "layers": len(config.rwkv_layers),
                "bytes": nbytes,
                "seconds": round(time.monotonic() - start, 3),
                "cpu_seconds": round(time.process_time() - busy, 3),
            }
        )
    )


def scale(source: str, target: str) -> None:
    """Write `source` with every tensor halved."""
    from hxaconv.calls import Call
    from hxaconv.load import open_checkpoint
    from hxaconv.options import Write
    from hxaconv.save.output import Output, Record, layouts
    from hxaconv.save.writer import write
    from hxaconv.surgery.arithmetic import scaled

    checkpoint = open_checkpoint(source)
    plan = {name: scaled(recipe, 0.5, recipe.dtype, recipe.origin) for name, recipe in checkpoint.plan.items()}
    files = layouts(Path(target), "hf", plan, 5_000_000_000)
    record = Record(call=Call("scale"))
    write(Output(target=Path(target), format="hf", tensors=plan, files=files, documents={}, record=record), Write())


if __name__ == "__main__":
    {"initialise": initialise, "scale": scale}[sys.argv[1]](*sys.argv[2:])
