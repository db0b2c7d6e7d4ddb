"""Causal tracing over a data set, into a run's folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from hooked_vlm.data import Pair, Question
from hooked_vlm.data.report import OnBad
from hooked_vlm.methods import causal_tracing
from hooked_vlm.methods.causal_tracing import PUBLISHED, Noise
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.inputs import open_images
from hooked_vlm.plots import heatmap
from hooked_vlm.runs import page as pages
from hooked_vlm.runs.digest import digest
from hooked_vlm.runs.origin import provenance
from hooked_vlm.runs.run import Excluded, load, open_run

Asked = Question | Pair


def run(
    model: HookedVLM,
    questions: Sequence[Asked],
    out: str | Path,
    *,
    noise: Noise = PUBLISHED,
    least: float = 0.01,
    about: Mapping[str, Any] | None = None,
    on_bad: OnBad = "raise",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Traces every question, resumably, and writes `report.html` with the mean maps.

    Args:
        model: a BLIP, an ALBEF or a LLaVA.
        questions: questions, or pairs, of which the clean side counts; each with a name.
        out: the folder of the run: a new one, or one to go on with.
        noise: as in `methods.causal_tracing.trace`.
        least: questions are left out, and counted, whose answer's probability in the clean run and
            the mean of that in the corrupt ones differ by less: it does not depend on the image.
        about: what else tells one run from another, such as where the questions come from.
        on_bad: `raise` stops at an image that cannot be read, `drop` excludes the question.
        seed: of the noise.
        progress: whether to show bars.
        **options: those of `trace` that JSON can hold: `kind`, `stacks`, `window`, `positions`,
            `on`, `draws`, `answer`, `first_token`, `max_rows`.

    Returns:
        The table of `TraceResult.to_dataframe`, of all questions.

    Raises:
        ValueError: what `trace` and `open_run` raise.
        BlockingIOError: another process runs there.
        OSError: an image that cannot be read; nothing can be written.
    """
    config = {
        "method": "causal_tracing",
        "noise": str(noise),
        "least": least,
        "on_bad": on_bad,
        "questions": digest(questions),
        "options": {"max_rows": 64} | options,
        **(about or {}),
    }

    def prepare(one: Asked) -> Asked:
        try:
            (image,) = open_images([one.image])
            image.load()
        except OSError as error:
            if on_bad == "drop":
                raise Excluded("image cannot be read") from error
            raise
        return replace(one, image=image)

    def work(one: Asked, ready: Asked) -> pd.DataFrame:
        result = causal_tracing.trace(
            model, ready, noise=noise, seed=seed, progress=False, **config["options"]
        )
        if not result.provenance["complete"]:
            raise KeyboardInterrupt
        gap = abs(float(result.clean[0]) - float(result.corrupt[0].mean()))
        if not math.isfinite(gap):
            raise Excluded("its metric is no number under this noise")
        if gap < least:
            raise Excluded("its answer does not depend on the image")
        return result.to_dataframe().assign(answer=str(result.provenance["answers"][0]))

    with open_run(out, config=config, provenance=provenance(model, seed)) as folder:
        table = folder.go(
            questions,
            work,
            key=lambda one: one.name,
            prepare=prepare,
            name="example",
            desc="tracing",
            progress=progress,
        )
        if len(table):
            excluded = load(folder.folder).excluded
            folder.write("report.html", _report(model, table, excluded, str(noise)))
    return table


def _report(model: HookedVLM, table: pd.DataFrame, excluded: pd.DataFrame, noise: str) -> str:
    n, left = table["example"].nunique(), len(excluded)
    ends = table.groupby("example")[["clean", "corrupt"]].mean().mean()
    told = (
        f"<p>{n} of {n + left} questions were traced. In them the metric is {ends['clean']:.4f} in "
        f"the clean run and {ends['corrupt']:.4f} under {noise} noise.</p>"
    )
    parts = [("Questions", told + pages.reasons(excluded))]
    parts += [(title, pages.picture(figure)) for title, figure in _maps(table)]
    return pages.page(f"Causal tracing: {model.provenance.get('model', 'a model')}", parts)


def _maps(table: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """What is restored, by token and layer, on the mean over questions of one length."""
    for (stack, component), some in table.groupby(["stack", "component"], sort=False):
        if "position" in some:
            n_places = some.groupby("example")["position"].nunique()
            some = some[some["example"].isin(n_places.index[n_places == n_places.mode()[0]])]
        else:
            some = some.assign(position="all positions", token="")
        title = f"restored, mean of {some['example'].nunique()} questions"
        sure = some.loc[some["by_construction"], ["layer", "position"]].drop_duplicates()
        if len(sure):
            layers = ", ".join(map(str, sorted(set(sure["layer"]))))
            title += f"; layer {layers}: the clean run by construction, which tells nothing"
        yield f"{stack}: {component}", heatmap(restored(some), title=title)


def restored(some: pd.DataFrame) -> xr.DataArray:
    """The mean gain over the mean gap between clean and corrupt runs, by position and layer.

    Both means are over all questions and draws, so that questions in which the noise changes little
    weigh little.

    Args:
        some: lines of one component of one stack, of examples of one length.
    """
    gap = (some["clean"] - some["corrupt"]).mean()
    share = some.groupby(["position", "layer"])["difference"].mean() / gap
    tokens = some.groupby("position")["token"].unique()
    labels = {at: said[0] if len(said) == 1 and said[0] else at for at, said in tokens.items()}
    wide = share.unstack()
    if pd.api.types.is_numeric_dtype(some["position"]):
        wide = wide.sort_index()
    return xr.DataArray(
        wide.to_numpy(),
        dims=("token", "layer"),
        coords={"token": [labels[at] for at in wide.index], "layer": list(wide.columns)},
    )
