"""Choices in the shapes world: what is asked, the other image and the mask are known exactly."""

from __future__ import annotations

import re

import numpy as np

from hooked_vlm.data import shapes
from hooked_vlm.data.choices import Choice, Choices, Vocabulary
from hooked_vlm.data.report import Report

WORDS = re.compile(r"\w+|\W+")
VOCABULARIES = {"color": tuple(shapes.COLORS), "shape": shapes.KINDS}


def shapes_choices(n: int, seed: int, attribute: str | None = None, size: int = 48) -> Choices:
    """Questions between two options about held-out scenes, such as 'is this circle red or blue?'.

    The other image is the same scene but for the attribute that is asked about, of which it shows
    the foil; the other question is about the other shape. The group is the attribute; `color` and
    `shape` have a vocabulary, of all words of the world. The report counts all of them as kept.

    Args:
        n: how many.
        seed: the same seed gives the same choices.
        attribute: `color`, `shape` or `relation`; None goes round all three.
        size: side of the images and masks, in pixels.

    Raises:
        ValueError: what `shapes.minimal_pairs` raises.

    Example:
        >>> choices = shapes_choices(3, seed=0)
        >>> for choice in choices:
        ...     print(choice.text, choice.answer)
        is this circle black or blue? blue
        is this purple object a triangle or a square? square
        is this cross right or left of the square? left
    """
    rng = np.random.default_rng([seed, 1])  # scenes are drawn with [seed, split]
    items = [
        _choice(scenes, f"{index}: {scenes.attribute}", size, rng)
        for index, scenes in enumerate(shapes.minimal_pairs(n, seed, attribute))
    ]
    words = {name: Vocabulary(known) for name, known in VOCABULARIES.items()}
    return Choices(items, Report(kept=n), words, kind="shapes")


def _choice(scenes: shapes.MinimalPair, name: str, size: int, rng: np.random.Generator) -> Choice:
    theirs = {question.text: question.answer for question in scenes.corrupt.questions()}
    asked = [
        question
        for question in scenes.clean.questions()
        if question.foil is not None
        and question.foil == theirs.get(question.text)
        and question.attribute == scenes.attribute
        and question.text.startswith("is this")  # as NOTICE asks
    ]
    question = asked[int(rng.integers(len(asked)))]  # the order of the options, or of the shapes
    subject = question.text.split()[2]  # 'is this circle ...', 'is this red object ...'
    about = [subject in (shape.kind, shape.color) for shape in scenes.clean.shapes].index(True)
    one, other = scenes.clean.shapes[about], scenes.clean.shapes[1 - about]
    exchanged = {one.kind: other.kind, other.kind: one.kind, one.color: other.color}
    asks = {"color": (one.kind,), "shape": (one.color,), "relation": (one.kind, other.kind)}
    words = asks[scenes.attribute]
    changed = [exchanged[word] if word in words else word for word in WORDS.findall(question.text)]
    return Choice(
        scenes.clean.image(size),
        question.text,
        question.answer,
        str(question.foil),
        scenes.corrupt.image(size),
        group=scenes.attribute,
        name=name,
        roles={"object": "object" if scenes.attribute == "shape" else subject},
        mask=scenes.clean.masks(size)[about],
        vocabulary=scenes.attribute if scenes.attribute in VOCABULARIES else None,
        other_text=None if "".join(changed) == question.text else "".join(changed),
    )
