"""Start ahead: RWKV layers fitted to the teacher's attention, a layer at a time, from a few hundred tokens.

`task` checks what is asked for, `streaming` walks the layers, `time_mix` fits one of them, `heads` holds the recipe
for heads that share a key (what is free, how it starts, the loss, the steps), `descent` that for the whole mixer after
it, `attention` fits the layers that stay attention, `polish` trains all of them together, `check` compares the written
student with what was intended, `store` keeps what is finished.
"""

from hxaconv.calibration.report import CalibrationReport, LayerReport

__all__ = ["CalibrationReport", "LayerReport"]
