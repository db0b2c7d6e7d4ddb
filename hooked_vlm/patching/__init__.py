"""Patching: which part of a model carries an answer, by writing activations of another run."""

from hooked_vlm.patching.metrics import METRICS, Metric, itm_margin, log_prob, logit_diff, prob
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.patching.sweep import activation_patching

__all__ = [
    "METRICS",
    "Metric",
    "PatchingResult",
    "activation_patching",
    "itm_margin",
    "log_prob",
    "logit_diff",
    "prob",
]
