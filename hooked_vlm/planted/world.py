"""The scenes of planted models: those of the shapes world whose shapes stand in cells of a grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

import numpy as np

from hooked_vlm.data import Pair
from hooked_vlm.data.shapes import CANVAS, COLORS, KINDS, Scene, Shape

GRID: Final = 3
"""Cells along one side; a cell is one patch of a planted model's image."""

CELL: Final = CANVAS // GRID

Corruption = Literal["image", "text"]
CORRUPTIONS: Final = ("image", "text")


def scenes(n: int, seed: int) -> list[Scene]:
    """Draws scenes whose shapes stand in two cells of one row or one column.

    Args:
        n: how many.
        seed: the same seed gives the same scenes; a longer list starts with the shorter one.
    """
    rng = np.random.default_rng([seed, GRID])
    return [_scene(rng) for _ in range(n)]


def cell_of(shape: Shape) -> int:
    """The number of the cell in which a shape stands, row by row."""
    x, y = (int(middle // CELL) for middle in shape.center)
    return y * GRID + x


def question(shape: Shape) -> str:
    """What planted models are asked: the colour of a shape that is named by its kind."""
    return f"what color is the {shape.kind}?"


def pairs(n: int, seed: int, corrupt: Corruption = "image", *, task: str = "vqa") -> list[Pair]:
    """Pairs of questions about a scene's first shape that have different answers.

    Args:
        n: how many.
        seed: of the scenes.
        corrupt: `image`: in the corrupt image the two shapes have exchanged their kinds, so that
            the colour that is asked for stands in the other cell; `text`: the corrupt question is
            about the other shape. Either way answer and foil are the colours of the two.
        task: of the model; questions to a `llava` begin with a capital letter.

    Raises:
        ValueError: another corruption.
    """
    if corrupt not in CORRUPTIONS:
        raise ValueError(f"corrupt is 'image' or 'text', not {corrupt!r}")
    made = []
    for number, scene in enumerate(scenes(n, seed)):
        one, other = scene.shapes
        asked, about_other = question(one), question(other)
        if task == "llava":
            asked, about_other = asked.capitalize(), about_other.capitalize()
        swapped = replace(
            scene, first=replace(one, kind=other.kind), second=replace(other, kind=one.kind)
        )
        image, text = (swapped.image(), None) if corrupt == "image" else (None, about_other)
        name = f"{number}: {corrupt}"
        made.append(Pair(scene.image(), asked, image, text, one.color, other.color, name))
    return made


def _scene(rng: np.random.Generator) -> Scene:
    kinds = rng.permutation(KINDS)[:2].tolist()
    colors = rng.permutation(tuple(COLORS))[:2].tolist()
    line = int(rng.integers(GRID))
    first, second = rng.permutation(GRID)[:2].tolist()
    upright = bool(rng.integers(2))
    cells = ((line, first), (line, second)) if upright else ((first, line), (second, line))
    shapes = []
    for kind, color, (x, y) in zip(kinds, colors, cells, strict=True):
        side = int(rng.integers(12, 15))
        left, top = (int(rng.integers(1, CELL - side)) for _ in range(2))
        box = (CELL * x + left, CELL * y + top, CELL * x + left + side, CELL * y + top + side)
        shapes.append(Shape(kind, color, box))
    before, behind = ("above", "below") if upright else ("left of", "right of")
    relation = before if first < second else behind
    return Scene(shapes[0], shapes[1], relation, int(rng.integers(215, 256)))
