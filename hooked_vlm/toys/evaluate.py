"""How right a toy is on held-out scenes, with its own processor.

Where transformers has a class for it, with that class; else with ours.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)

from hooked_vlm.data import shapes
from hooked_vlm.toys import evaluate_albef, evaluate_clip, evaluate_llava
from hooked_vlm.toys.false_captions import other_axis, other_scene, swapped_colors

T = TypeVar("T")

BATCH = 250
PROMPT = "a picture of"
MAX_NEW_TOKENS = 12


@dataclass(frozen=True)
class Report:
    """Accuracies on held-out scenes.

    Attributes:
        accuracy: The number that sums the toy up, 0 to 1.
        kinds: Accuracy for each kind of caption or question.
        n_scenes: How many scenes were looked at.
    """

    accuracy: float
    kinds: dict[str, float]
    n_scenes: int


@dataclass(frozen=True)
class _Asked:
    kind: str
    scene: shapes.Scene
    question: shapes.Question


def evaluate(folder: Path, n: int = 1000, seed: int = 1, size: int = shapes.CANVAS) -> Report:
    """Measures a toy on held-out scenes.

    Args:
        folder: A checkpoint folder, in Hugging Face's layout or in ours.
        n: How many scenes.
        seed: Of the scenes, and of the captions and questions about them.
        size: Side in pixels at which the scenes are drawn, before the toy's own resizing.

    Returns:
        Retrieval: `accuracy` is the mean of accepting the true caption and of rejecting the three
        hard negatives, one changed word each. Questions and captions: `accuracy` is the share of
        exact answers (mean over the kinds of question) and of captions that are one of the two
        true ones. CLIP: see ``evaluate_clip.retrieval``. LLaVA: the mean over the kinds of
        ``evaluate_llava.answers``.

    Raises:
        ValueError: If the folder holds another architecture.
    """
    measures = {
        "BlipForImageTextRetrieval": _retrieval,
        "BlipForQuestionAnswering": _questions,
        "BlipForConditionalGeneration": _captions,
        "hooked_albef": _albef,
        "CLIPModel": _clip,
        "hooked_clip": _clip,
        "LlavaForConditionalGeneration": _llava,
    }
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config.get("architectures", [config["model_type"]])
    if architecture not in measures:
        raise ValueError(f"{folder} holds {architecture}; known are {', '.join(measures)}")
    world = shapes.scenes(n, seed, "held_out")
    rng = np.random.default_rng(seed)
    with torch.inference_mode():
        return measures[architecture](folder, world, rng, size)


def load_processor(folder: Path) -> BlipProcessor:
    """The processor of a checkpoint folder, with PIL images whether or not torchvision is there."""
    return BlipProcessor.from_pretrained(folder, backend="pil")


def _retrieval(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> Report:
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    processor = load_processor(folder)
    return _judged(
        lambda images, texts: model(**_inputs(processor, images, texts)).itm_score.argmax(-1),
        world,
        rng,
        size,
    )


def _albef(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> Report:
    return _judged(evaluate_albef.judge_of(folder), world, rng, size)


def _clip(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> Report:
    rates = evaluate_clip.retrieval(folder, world, rng, size)
    return Report(rates.pop("accuracy"), rates, len(world))


def _llava(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> Report:
    rates = evaluate_llava.answers(folder, world, rng, size)
    return Report(float(np.mean(list(rates.values()))), rates, len(world))


def _judged(
    judge: Callable[[list[Image.Image], list[str]], Tensor],
    world: Sequence[shapes.Scene],
    rng: np.random.Generator,
    size: int,
) -> Report:
    right: dict[str, list[bool]] = defaultdict(list)
    for scenes in _batches(world):
        images = [scene.image(size) for scene in scenes]
        for kind, texts in captions_by_kind(scenes, world, rng).items():
            verdict = judge(images, texts) == (1 if kind == "true" else 0)
            right[kind] += verdict.tolist()
    rates = {kind: float(np.mean(verdicts)) for kind, verdicts in right.items()}
    hard = float(np.mean([rates[attribute] for attribute in shapes.ATTRIBUTES]))
    return Report((rates["true"] + hard) / 2, rates, len(world))


def _questions(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> Report:
    model = BlipForQuestionAnswering.from_pretrained(folder).eval()
    processor = load_processor(folder)
    asked = [
        _Asked(kind, scene, _any(rng, questions))
        for scene in world
        for kind, questions in questions_by_kind(scene).items()
    ]

    drawn = {scene: scene.image(size) for scene in world}

    def right(batch: Sequence[_Asked]) -> list[bool]:
        images = [drawn[item.scene] for item in batch]
        inputs = _inputs(processor, images, [item.question.text for item in batch])
        said = processor.batch_decode(
            model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS), skip_special_tokens=True
        )
        return [answer == item.question.answer for item, answer in zip(batch, said, strict=True)]

    verdicts: dict[str, list[bool]] = defaultdict(list)
    by_length: dict[int, list[_Asked]] = defaultdict(list)
    for item in asked:
        by_length[len(processor.tokenizer(item.question.text).input_ids)].append(item)
    for alike in by_length.values():
        for batch in _batches(alike):
            for item, verdict in zip(batch, right(batch), strict=True):
                verdicts[item.kind].append(verdict)
    rates = {kind: float(np.mean(verdicts[kind])) for kind in sorted(verdicts)}
    accuracy = float(np.mean(list(rates.values())))
    # transformers lets the answer decoder read the padding of the shorter questions.
    rates["padded"] = float(np.mean([v for batch in _batches(asked) for v in right(batch)]))
    return Report(accuracy, rates, len(world))


def _captions(
    folder: Path, world: Sequence[shapes.Scene], rng: np.random.Generator, size: int
) -> Report:
    del rng
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = load_processor(folder)
    right: dict[str, list[bool]] = defaultdict(list)
    for scenes in _batches(world):
        images = [scene.image(size) for scene in scenes]
        prompts = {
            "no prompt": None,
            "prompted": [PROMPT] * len(images),
        }
        for kind, prompt in prompts.items():
            inputs = _inputs(processor, images, prompt)
            said = processor.batch_decode(
                model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS), skip_special_tokens=True
            )
            for scene, caption in zip(scenes, said, strict=True):
                right[kind].append(caption.removeprefix(f"{PROMPT} ") in scene.captions())
        # The half of a caption that names one shape decides the rest: colour, kind, relation.
        for relation in shapes.RELATIONS:
            chosen = [scene for scene in scenes if scene.relation == relation]
            if not chosen:
                continue
            inputs = _inputs(
                processor,
                [scene.image(size) for scene in chosen],
                [f"a {scene.first.words}" for scene in chosen],
            )
            said = processor.batch_decode(
                model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS), skip_special_tokens=True
            )
            right[f"continued: {relation}"] += [
                caption == scene.caption() for scene, caption in zip(chosen, said, strict=True)
            ]
    rates = {kind: float(np.mean(right[kind])) for kind in sorted(right)}
    return Report(rates["no prompt"], rates, len(world))


def captions_by_kind(
    scenes: Sequence[shapes.Scene], world: Sequence[shapes.Scene], rng: np.random.Generator
) -> dict[str, list[str]]:
    """Each scene's true caption, and a false one of each kind."""
    texts = {"true": [scene.caption() for scene in scenes]}
    for attribute in shapes.ATTRIBUTES:
        texts[attribute] = [_any(rng, scene.negatives(attribute)) for scene in scenes]
    texts["swapped colors"] = [swapped_colors(scene) for scene in scenes]
    texts["other axis"] = [_any(rng, other_axis(scene)) for scene in scenes]
    texts["other scene"] = [other_scene(scene, _any(rng, world)) for scene in scenes]
    return texts


def questions_by_kind(scene: shapes.Scene) -> dict[str, list[shapes.Question]]:
    """A scene's questions: each attribute, open and with two options."""
    kinds: dict[str, list[shapes.Question]] = defaultdict(list)
    for question in scene.questions():
        form = "open" if question.foil is None else "two options"
        kinds[f"{question.attribute}, {form}"].append(question)
    return kinds


def _any(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _batches(items: Sequence[T]) -> Iterable[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _inputs(
    processor: BlipProcessor, images: list[Image.Image], texts: list[str] | None
) -> dict[str, Any]:
    return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))
