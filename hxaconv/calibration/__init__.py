"""Start ahead: RWKV layers fitted to the teacher's attention, a layer at a time, from a few hundred tokens.

`report` says what can be set and what is told, `streaming` walks the layers, `time_mix` fits one of them,
`heads` is the arithmetic of the heads that share keys and values, `output_matrix` the gate and the output matrix,
`folding` the layers that stay attention, `check` holds the written student against what was promised.
"""

from hxaconv.calibration.report import CalibrationReport, LayerReport, Settings

__all__ = ["CalibrationReport", "LayerReport", "Settings"]
