"""What the toy LLaVA is asked about a scene, in training and when it is measured."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hooked_vlm.data import shapes

DESCRIBE = "What is in the picture?"


def by_kind(scene: shapes.Scene) -> dict[str, list[tuple[str, str]]]:
    """Prompts about a scene with their answers, by kind.

    Each attribute is asked openly, with two options, and for yes and for no, which are kinds of
    their own, so that saying one of them always is right half of the time. A description names
    either shape first.

    Example:
        >>> scene = shapes.scenes(1, seed=0)[0]
        >>> asked = by_kind(scene)
        >>> asked["color, open"][0]
        ('What color is the triangle?', 'black')
        >>> len(asked)
        13
    """
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for question in scene.questions():
        form = "open" if question.foil is None else "two options"
        kinds[f"{question.attribute}, {form}"].append(_said(question))
    for question in scene.yes_no_questions():
        kinds[f"{question.attribute}, {question.answer}"].append(_said(question))
    kinds["description"] = [(DESCRIBE, caption) for caption in scene.captions()]
    return kinds


def _said(question: shapes.Question) -> tuple[str, str]:
    return question.text.capitalize(), question.answer


def prompt(processor: Any, text: str) -> str:
    """What the processor's chat template makes of a question about one image."""
    said = [{"type": "image"}, {"type": "text", "text": text}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": said}], add_generation_prompt=True
    )
    return str(made)
