"""Patching: which part of a model carries an answer, by writing into its activations."""

from hooked_vlm.patching.attribution import attribution_patching
from hooked_vlm.patching.cells import Together, random_sites, together, windows
from hooked_vlm.patching.circuit import Circuit, find_circuit
from hooked_vlm.patching.edges import Edge, EdgeResult, edge_attribution
from hooked_vlm.patching.interventions import (
    At,
    Intervention,
    knockout,
    noise,
    patch,
    steer,
    zero,
)
from hooked_vlm.patching.metrics import (
    METRICS,
    Metric,
    accuracy,
    itm_margin,
    kl,
    log_prob,
    logit_diff,
    prob,
)
from hooked_vlm.patching.paths import path_patching
from hooked_vlm.patching.places import Each, Region
from hooked_vlm.patching.plan import Plan
from hooked_vlm.patching.reference import mean, resample
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.patching.source import SourceResult, source_attribution
from hooked_vlm.patching.sweep import ablate, activation_patching, plan

__all__ = [
    "METRICS",
    "At",
    "Circuit",
    "Each",
    "Edge",
    "EdgeResult",
    "Intervention",
    "Metric",
    "PatchingResult",
    "Plan",
    "Region",
    "SourceResult",
    "Together",
    "ablate",
    "accuracy",
    "activation_patching",
    "attribution_patching",
    "edge_attribution",
    "find_circuit",
    "itm_margin",
    "kl",
    "knockout",
    "log_prob",
    "logit_diff",
    "mean",
    "noise",
    "patch",
    "path_patching",
    "plan",
    "prob",
    "random_sites",
    "resample",
    "source_attribution",
    "steer",
    "together",
    "windows",
    "zero",
]
