"""What the toy LLaVA answers, in transformers' own class, greedily."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from hooked_vlm.data import shapes
from hooked_vlm.toys import conversations

BATCH = 250
MAX_NEW_TOKENS = 12


def answers(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> dict[str, float]:
    """How often a question of each kind is answered exactly.

    All kinds stand in one batch, so that most prompts are padded, on the left.

    Args:
        folder: A checkpoint folder.
        world: The scenes; each is asked one question of each kind.
        rng: Draws the questions.
        size: Side in pixels at which the scenes are drawn, before the toy's own resizing.

    Returns:
        By kind the share of answers that are, word for word, the right one; of descriptions, one
        of the two true captions.
    """
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder, backend="pil")
    asked = [(kind, scene, *drawn) for scene in world for kind, drawn in draw(scene, rng).items()]
    drawn = {scene: scene.image(size) for scene in world}
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        said = answered(
            model,
            processor,
            [drawn[scene] for _, scene, _, _ in batch],
            [text for _, _, text, _ in batch],
        )
        for (kind, scene, _, answer), text in zip(batch, said, strict=True):
            true = scene.captions() if kind == "description" else (answer,)
            right[kind].append(text in true)
    return {kind: float(np.mean(verdicts)) for kind, verdicts in right.items()}


def draw(scene: shapes.Scene, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """Of each kind one question about a scene, with its answer."""
    return {
        kind: questions[int(rng.integers(len(questions)))]
        for kind, questions in conversations.by_kind(scene).items()
    }


def answered(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    images: list[Image.Image],
    questions: list[str],
) -> list[str]:
    """What the model says to questions, one about each image, without special tokens."""
    prompts = [conversations.prompt(processor, text) for text in questions]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
    ids = model.generate(**inputs, **options)  # type: ignore[misc]  # a mixin's self
    new = ids[:, inputs["input_ids"].shape[1] :]
    said = processor.batch_decode(new, skip_special_tokens=True)
    return [str(text).strip() for text in said]
