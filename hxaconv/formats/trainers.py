"""What the checkpoints of trainers hold beside tensors: classes that are passed over, and nothing made of them."""

from __future__ import annotations

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool")

TRAINER_OBJECTS = (
    "deepspeed.*",  # stages, loss scalers, addresses of fragments
    *("lightning.*", "pytorch_lightning.*", "lightning_fabric.*", "accelerate.*", "omegaconf.*"),
    *("argparse.Namespace", "pathlib.PosixPath", "pathlib.Path", "datetime.timedelta"),
    *("collections.defaultdict", "collections.Counter", "builtins.set", "__builtin__.set", "_codecs.encode"),
    *("numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"),
    *("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"),
    *("torch.Tensor", "torch.device", *(f"torch.{name}" for name in _DTYPES)),
)
"""For `parse`: their objects become records of what they were written with."""
