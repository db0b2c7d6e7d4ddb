"""How often a toy CLIP finds the caption of a picture among false ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hooked_vlm.data import shapes
from hooked_vlm.models.clip import HookedCLIP
from hooked_vlm.toys.false_captions import other_axis, swapped_colors

CAPTIONS = 16
"""How many captions a picture's own is found among, itself included."""

BATCH = 250


def retrieval(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> dict[str, float]:
    """How often the caption of a scene comes first of its ``candidates``.

    Args:
        folder: A checkpoint folder, in Hugging Face's layout or in ours.
        world: The scenes.
        rng: Draws the false captions.
        size: Side in pixels at which the scenes are drawn, before the toy's own resizing.

    Returns:
        `accuracy`, the share of scenes whose true caption comes first of all 16; and for each kind
        of false caption the share of scenes whose true caption comes before every one of that kind.
    """
    model = HookedCLIP.from_pretrained(folder)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(world), BATCH):
        scenes = world[start : start + BATCH]
        asked = [candidates(scene, world, rng) for scene in scenes]
        distinct = sorted({text for texts in asked for text, _ in texts})
        column = {text: i for i, text in enumerate(distinct)}
        logits = model(**model.prepare([scene.image(size) for scene in scenes], distinct))
        assert logits is not None
        for row, texts in zip(logits.tolist(), asked, strict=True):
            true, *false = ((row[column[text]], kind) for text, kind in texts)
            right["accuracy"].append(true[0] > max(false)[0])
            for kind in {kind for _, kind in false}:
                right[kind].append(true[0] > max(score for score, of in false if of == kind))
    return {kind: float(np.mean(right[kind])) for kind in sorted(right)}


def candidates(
    scene: shapes.Scene, world: Sequence[shapes.Scene], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """The 16 captions that a scene is asked about, each with its kind, the true one first.

    Which shape is named first is drawn. Of the 15 false ones 3 have another color, 3 another kind
    of shape, 1 the opposite relation, 1 the colors swapped, 2 a relation of the other axis, and 5
    are captions of other scenes. No two are the same, and the scene's other true caption is not
    among them.

    Example:
        >>> scene = shapes.scenes(1, seed=0)[0]
        >>> asked = candidates(scene, shapes.scenes(9, seed=1), np.random.default_rng(0))
        >>> len({text for text, _ in asked}), [kind for _, kind in asked].count("other scene")
        (16, 5)
        >>> [text in scene.captions() for text, _ in asked].count(True)
        1
    """
    scene = scene if rng.integers(2) else scene.reversed()
    found = {scene.caption(): "true", scene.reversed().caption(): "other order"}
    for attribute, how_many in (("color", 3), ("shape", 3), ("relation", 1)):
        for text in rng.permutation(scene.negatives(attribute))[:how_many].tolist():
            found[text] = attribute
    found[swapped_colors(scene)] = "swapped colors"
    found.update(dict.fromkeys(other_axis(scene), "other axis"))
    others = rng.permutation(len(world)).tolist()
    while len(found) <= CAPTIONS:
        found.setdefault(world[others.pop()].caption(), "other scene")
    return [(text, kind) for text, kind in found.items() if kind != "other order"]
