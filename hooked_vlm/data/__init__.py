"""Data: pairs of clean and corrupt inputs, and the shapes world."""

from hooked_vlm.data import shapes
from hooked_vlm.data.pairs import Pair, read_pairs, shapes_pairs

__all__ = ["Pair", "read_pairs", "shapes", "shapes_pairs"]
