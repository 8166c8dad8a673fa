"""Proof by a second, slow implementation: run models layer by layer, and compare them."""

from __future__ import annotations

from hxaconv.verify.compare import compare_models
from hxaconv.verify.contracts import check_converted, check_initialised, completed
from hxaconv.verify.expectations import Thresholds
from hxaconv.verify.probe import probe_tokens
from hxaconv.verify.repicked import check_repicked
from hxaconv.verify.report import EXPECTATIONS, Check, LayerResult, LogitResult, Report, TensorResult
from hxaconv.verify.single import verify_model

__all__ = [
    "EXPECTATIONS",
    "Check",
    "LayerResult",
    "LogitResult",
    "Report",
    "TensorResult",
    "Thresholds",
    "check_converted",
    "check_initialised",
    "check_repicked",
    "compare_models",
    "completed",
    "probe_tokens",
    "verify_model",
]
