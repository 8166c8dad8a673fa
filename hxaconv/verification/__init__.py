"""Proof by a second, slow implementation: run models layer by layer, and compare them."""

from __future__ import annotations

from hxaconv.forward.probe import probe_tokens
from hxaconv.verification.compare import compare_models
from hxaconv.verification.contracts import check_converted, check_initialised, completed
from hxaconv.verification.expectations import Thresholds
from hxaconv.verification.repicked import check_repicked
from hxaconv.verification.report import EXPECTATIONS, Check, LayerResult, LogitResult, Report, TensorResult
from hxaconv.verification.single import verify_model

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
