"""Models whose circuit is known by construction, and methods scored against it."""

from hooked_vlm.planted.card import Card, Edge, Node, Trial
from hooked_vlm.planted.catalogue import load, names, path
from hooked_vlm.planted.methods import METHODS, Method, Problem, register
from hooked_vlm.planted.scoring import Score, score, validate
from hooked_vlm.planted.world import pairs, scenes

__all__ = [
    "METHODS",
    "Card",
    "Edge",
    "Method",
    "Node",
    "Problem",
    "Score",
    "Trial",
    "load",
    "names",
    "pairs",
    "path",
    "register",
    "scenes",
    "score",
    "validate",
]
