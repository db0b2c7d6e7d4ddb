"""NOTICE over a data set, into a run's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from hooked_vlm.data import Pair
from hooked_vlm.data.report import BadRow, LeftOut, OnBad
from hooked_vlm.methods.grounding import Box
from hooked_vlm.methods.notice import Notice, Ready, Settings, numbered
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.runs.digest import digest
from hooked_vlm.runs.notice_report import Told, report
from hooked_vlm.runs.origin import provenance
from hooked_vlm.runs.run import Excluded, load, open_run


@dataclass(frozen=True)
class Item:
    """A pair of a task."""

    task: str
    pair: Pair

    @property
    def key(self) -> str:
        """What tells it from all others of a run."""
        image, text = len(self.pair.images) > 1, self.pair.corrupt_text is not None
        what = "both" if image and text else "image" if image else "text"
        return f"{self.task}/{what}/{self.pair.name}"


def run(
    model: HookedVLM,
    pairs: Sequence[Pair] | Mapping[str, Sequence[Pair]],
    out: str | Path,
    *,
    settings: Settings | None = None,
    masks: Mapping[str, NDArray[np.bool_] | Box] | None = None,
    about: Mapping[str, Any] | None = None,
    on_bad: OnBad = "raise",
    k: float | None = 2.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Patches all pairs, resumably, and writes `report.html` with what they say of heads.

    Args:
        model: a BLIP, ALBEF or LLaVA that answers questions.
        pairs: pairs, or several tasks of them by name.
        out: the folder of the run: a new one, or one to go on with.
        settings: as for `methods.notice.patch`.
        masks: by a pair's name, of several tasks by `task/name`: what the question is about in the
            clean image, bool [height, width] or a box, for the measured functions of heads.
        about: what else tells one run from another, such as where the pairs come from.
        on_bad: `raise` stops at a pair that cannot be patched, `drop` excludes it; those that the
            settings leave out are excluded either way.
        k: standard deviations above the mean that make a head stand out, or None
            (`methods.universal`).
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
    items = [Item(task, pair) for task, pair in numbered(tasks)]
    method = Notice(model, settings)
    config = {
        "method": "notice",
        "settings": asdict(settings),
        "on_bad": on_bad,
        "pairs": {task: digest(some) for task, some in tasks.items()},
        **(about or {}),
    }

    def prepare(one: Item) -> Ready:
        with _excluding(on_bad):
            return method.prepare(one.pair)

    def work(one: Item, ready: Ready) -> pd.DataFrame:
        with _excluding(on_bad):
            return method.measure(ready, one.task)

    with open_run(out, config=config, provenance=provenance(model, seed)) as folder:
        with _a_core_spared():
            table = folder.go(
                items,
                work,
                key=lambda one: one.key,
                prepare=prepare,
                desc="NOTICE",
                threads=1,  # a tokenizer must not be used by two at once
                name="item",
                progress=progress,
            )
        if len(table):
            excluded = load(folder.folder).excluded
            told = Told(
                model,
                table,
                excluded,
                {one.key: one.pair for one in items},
                {one.key: one.task for one in items},
                masks or {},
                settings,
                k,
                seed,
                progress,
            )
            page = report(told)
            folder.write("report.html", page)
    return table


@contextmanager
def _a_core_spared() -> Iterator[None]:
    """Leaves a core to what prepares: threads that wait for one another stop both."""
    n = torch.get_num_threads()
    torch.set_num_threads(max(1, n - 1))
    try:
        yield
    finally:
        torch.set_num_threads(n)


@contextmanager
def _excluding(on_bad: OnBad) -> Iterator[None]:
    """Turns a bad pair into one that a run excludes."""
    try:
        yield
    except BadRow as bad:
        if on_bad == "drop" or isinstance(bad, LeftOut):
            raise Excluded(bad.reason) from bad
        raise
