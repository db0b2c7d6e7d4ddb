"""NOTICE over a data set, into a run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from hooked_vlm import data
from hooked_vlm.data import Pair, Question
from hooked_vlm.data.report import BadRow, LeftOut, OnBad
from hooked_vlm.methods.notice import Notice, Ready, Settings, modality
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.runs.notice_report import report
from hooked_vlm.runs.origin import provenance
from hooked_vlm.runs.run import Excluded, load, open_run


@dataclass(frozen=True)
class Asked:
    """A pair of a task."""

    task: str
    pair: Pair

    @property
    def key(self) -> str:
        """What tells it from all others of a run."""
        return f"{self.task}/{modality(self.pair)}/{self.pair.name}"


def run(
    model: HookedVLM,
    pairs: Sequence[Pair] | Mapping[str, Sequence[Pair]],
    out: str | Path,
    *,
    settings: Settings | None = None,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    about: Mapping[str, Any] | None = None,
    on_bad: OnBad = "raise",
    k: float = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Patches all pairs, resumably, and writes `report.html` with what they say of heads.

    Args:
        model: a BLIP, ALBEF or LLaVA that answers questions.
        pairs: pairs, or several tasks of them by name.
        out: the folder of the run: a new one, or one to go on with.
        settings: as for `methods.notice.patch`.
        masks: by a pair's name, what the question is about in the clean image, bool
            [height, width], for the measured functions of heads.
        about: what else tells one run from another, such as where the pairs come from.
        on_bad: `raise` stops at a pair that cannot be patched, `drop` excludes it; those that the
            settings leave out are excluded either way.
        k: standard deviations above the mean that make a head stand out (`methods.universal`).
        seed: of splits, permutations and intervals in the report.
        progress: whether to show bars.

    Returns:
        The table of `methods.notice.patch`, with the pair's key in front as `item`.

    Raises:
        ValueError: a pair that cannot be patched; a folder of another run, or of something else.
        BlockingIOError: another process runs there.
        OSError: nothing can be written, for instance because the disk is full.
    """
    settings = settings or Settings()
    tasks = pairs if isinstance(pairs, Mapping) else {"": pairs}
    asked = [Asked(task, pair) for task, some in tasks.items() for pair in some]
    method = Notice(model, settings)
    config = {
        "method": "notice",
        "settings": asdict(settings),
        "on_bad": on_bad,
        "pairs": {task: digest(some) for task, some in tasks.items()},
        **(about or {}),
    }

    def prepare(one: Asked) -> Ready:
        with _excluding(on_bad):
            return method.prepare(one.pair)

    def work(one: Asked, ready: Ready) -> pd.DataFrame:
        with _excluding(on_bad):
            return method.measure(ready, one.task)

    with open_run(out, config=config, provenance=provenance(model, seed)) as folder:
        # One thread: a tokenizer must not be used by two at once.
        table = folder.go(
            asked,
            work,
            key=lambda one: one.key,
            prepare=prepare,
            desc="NOTICE",
            threads=1,
            name="item",
            progress=progress,
        )
        if len(table):
            excluded = load(folder.folder).excluded
            page = report(
                model, table, excluded, asked, masks=masks, k=k, seed=seed, progress=progress
            )
            folder.write("report.html", page)
    return table


@contextmanager
def _excluding(on_bad: OnBad) -> Iterator[None]:
    """Turns a bad pair into one that a run excludes."""
    try:
        yield
    except BadRow as bad:
        if on_bad == "drop" or isinstance(bad, LeftOut):
            raise Excluded(bad.reason) from bad
        raise


def digest(asked: Sequence[Pair | Question]) -> str:
    """A hash of pairs or questions: their words, and the pixels, or paths, of their images."""
    told = sha256()
    for one in asked:
        told.update(repr((one.name, one.text, one.answer)).encode())
        images = [one.image]
        if isinstance(one, Pair):
            images = one.images
            told.update(repr((one.corrupt_text, one.foil, sorted(one.roles.items()))).encode())
        for image in images:
            told.update(image.tobytes() if isinstance(image, Image.Image) else str(image).encode())
    return told.hexdigest()


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
) -> tuple[list[Pair], dict[str, Any], str]:
    """The pairs of a data set, for the command line.

    Args:
        model: whom they are for.
        path: where the data set is; None for the shapes world.
        kind: `pairs`, a CSV or JSONL of them; or one of `data.read_choices`.
        corrupt: of choices, `image` and `text`: what is corrupt.
        n: how many choices of each group; of the shapes world, in all.
        seed: of what is drawn.
        on_bad: as in the readers.
        short_answer: as in `data.prompt_form`, with capital letters in front of the answers.
        options: further ones of the reader.

    Returns:
        The pairs; masks by their names, where they are known; and what the readers report.
    """
    if kind == "pairs":
        assert path is not None
        pairs, report = data.read_pairs_report(path, model, on_bad=on_bad)
        return pairs, {}, f"{path}: {report}"
    if path is None:
        choices = data.shapes_choices(60 if n is None else n, seed)
    else:
        choices = data.read_choices(kind, path, seed=seed, on_bad=on_bad, **(options or {}))
        choices = choices if n is None else choices.sample(n, seed)
    form = data.prompt_form(model.task, short_answer=short_answer, capital_answers=short_answer)
    said, pairs = [f"{kind}: {choices.report}"], []
    for what in corrupt:
        if what == "image":
            made, report = data.semantic_image_pairs(choices, form=form, on_bad=on_bad)
        elif path is None:  # the toys do not read the options
            made, report = data.other_questions(
                choices, model.to_str_tokens, form=form, on_bad="drop"
            )
        else:
            made, report = data.symmetric_token_replacement(
                choices, model.to_str_tokens, seed=seed, form=form, on_bad="drop"
            )
        pairs += made
        said.append(f"{what} corrupted: {report}")
    masks = {one.name: one.mask for one in choices if one.mask is not None}
    return pairs, masks, "\n".join(said)
