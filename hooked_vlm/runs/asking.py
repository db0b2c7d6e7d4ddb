"""What the commands ask about: pairs and questions of a data set, or of the shapes world."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hooked_vlm import data
from hooked_vlm.data import Pair, Question, Report
from hooked_vlm.data.report import OnBad
from hooked_vlm.models.base import HookedVLM

SHAPES = 60  # choices of the shapes world, where no number is given
DRAWN = ("itm", "vqa", "captioning", "clip", "llava")  # tasks that `data.shapes_pairs` knows


def pairs_of(
    model: HookedVLM,
    path: Path | None,
    kind: str,
    corrupt: Sequence[str],
    *,
    n: int | None,
    seed: int,
    on_bad: OnBad,
    short_answer: bool = False,
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Pair], dict[str, NDArray[np.bool_]], dict[str, Report]]:
    """The pairs of a data set.

    Args:
        model: whom they are for.
        path: where the data set is; None for the shapes world.
        kind: `pairs`, a CSV or JSONL of them; one of `data.read_choices`; or what the report of the
            shapes world is called.
        corrupt: of choices, `image` and `text`: what is corrupt.
        n: how many choices of each group, by default all; of the shapes world, how many in all.
        seed: of what is drawn.
        on_bad: as in the readers and builders.
        short_answer: as in `data.prompt_form`, with capital letters in front of the answers.
        options: further ones of the reader.

    Returns:
        The pairs; masks by their names, where they are known; and by name what was read and built.

    Raises:
        ValueError: what the readers and builders raise.
    """
    if kind == "pairs":
        if path is None:
            raise ValueError("pairs are read from a file: give its path")
        pairs, report = data.read_pairs_report(path, model, on_bad=on_bad)
        return pairs, {}, {kind: report}
    form = data.prompt_form(model.task, short_answer=short_answer, capital_answers=short_answer)
    if path is None:
        choices = data.shapes_choices(SHAPES if n is None else n, seed)
    else:
        choices = data.read_choices(kind, path, seed=seed, on_bad=on_bad, **(options or {}))
        choices = choices if n is None else choices.sample(n, seed)
    reports, pairs = {kind: choices.report}, []
    for what in corrupt:
        if what == "image":
            made, report = data.semantic_image_pairs(choices, form=form, on_bad=on_bad)
        elif path is None:  # the toys do not read the options
            made, report = data.other_questions(
                choices, model.to_str_tokens, form=form, on_bad=on_bad
            )
        else:
            made, report = data.symmetric_token_replacement(
                choices, model.to_str_tokens, seed=seed, form=form, on_bad=on_bad
            )
        pairs += made
        reports[f"{what} corrupt"] = report
    masks = {one.name: one.mask for one in choices if one.mask is not None}
    return pairs, masks, reports


def coco_questions(
    csv: Path,
    images: Path,
    *,
    n: int | None,
    seed: int,
    n_words: int | None,
    suffix: str,
    on_bad: OnBad,
) -> tuple[list[Question], Report]:
    """Questions of COCO-QA, all or some that are drawn.

    Args:
        csv: as in `data.read_coco_qa`.
        images: as there.
        n: how many are drawn; None for all.
        seed: draws them.
        n_words: as there.
        suffix: as there.
        on_bad: as there.

    Raises:
        ValueError: fewer than n, or what the reader raises.
    """
    asked, report = data.read_coco_qa(csv, images, n_words=n_words, suffix=suffix, on_bad=on_bad)
    if n is None:
        return asked, report
    if n > len(asked):
        raise ValueError(f"{csv}: {n} questions are to be drawn, and there are {len(asked)} to ask")
    drawn = np.random.default_rng(seed).choice(len(asked), n, replace=False)
    left = len(asked) - n
    stage = Report(n, {"not drawn": left} if left else {})
    return [asked[index] for index in sorted(drawn.tolist())], report.then(stage)


def drawn_pairs(task: str, n: int, seed: int) -> list[Pair]:
    """What a model of a task is asked, or told, of colours in the shapes world.

    Args:
        task: the model's.
        n: how many.
        seed: draws them.

    Raises:
        ValueError: a task that the shapes world has nothing for.
    """
    if task not in DRAWN:
        raise ValueError(
            f"the shapes world has nothing for task {task!r}, only for "
            f"{', '.join(map(repr, DRAWN))}; give an image and a text"
        )
    return data.shapes_pairs(n, seed, task, "color")


def adjectives_of(file: Path) -> dict[str, list[str]]:
    """Adjectives by group, from a JSON file.

    Raises:
        ValueError: it holds something else.
        OSError: it cannot be read.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(told, dict) or not told or not all(map(_are_words, told.values())):
        raise ValueError(
            f"{str(file)!r} is no JSON object of lists of adjectives by group, such as "
            '{"color": ["red", "blue"]}'
        )
    return told


def _are_words(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(w, str) and w for w in given)
