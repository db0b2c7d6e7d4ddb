"""Where an answer comes from: the image, the question, the rest of the prompt, or the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from tqdm.auto import tqdm

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.inputs import ImageLike
from hooked_vlm.patching import exact
from hooked_vlm.patching.cells import as_sites
from hooked_vlm.patching.engine import Begun, Sweep
from hooked_vlm.patching.interventions import Intervention, knockout, zero
from hooked_vlm.patching.metrics import as_metric, as_numbers
from hooked_vlm.patching.places import Locator, Place, as_place
from hooked_vlm.patching.result import VANISHING, provenance
from hooked_vlm.patching.runs import PER_IMAGE, FirstToken, Inputs, Pairs, Run, rows_of, single
from hooked_vlm.patching.sweep import MetricLike

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OTHERS = ("mlp", "embed", "bias")  # what no other position gives
Places = Mapping[str, Place | Sequence[Place]]
Resample = Sequence[ImageLike | Inputs] | Literal["others"] | None


@dataclass(frozen=True)
class SourceResult:
    """What each source gives to a metric.

    Attributes:
        metric: by `pair`.
        direct: by `pair` and `source`, what adds up to the metric: by attention of the last
            position to a source, by MLPs, the last token's own embedding, and biases; None where
            `provenance["direct"]` says why. `provenance["gap"]` is the largest distance of such a
            sum from the metric: rounding of the model's dtype.
        heads: the first of these by `pair`, `layer`, `head` and `source`; None as `direct`.
        mlps: what each MLP gives, by `pair` and `layer`; None as `direct`.
        knockout: by `pair`, `source` and `queries`, what the metric loses when these do not attend
            to it: the `last` position, or all `others` that are not of the source; in models with
            cross-attention `all` of them.
        resampled: by `pair`, the metric less its mean over other images; None without any.
        provenance: what the numbers were made with.
    """

    metric: xr.DataArray
    direct: xr.DataArray | None
    heads: xr.DataArray | None
    mlps: xr.DataArray | None
    knockout: xr.DataArray
    resampled: xr.DataArray | None
    provenance: dict[str, Any]

    @property
    def share(self) -> xr.DataArray | None:
        """The share of the metric that each source gives directly; None as `direct`.

        NaN for a pair whose parts cancel, so that nothing is left to have a share of.
        """
        if self.direct is None:
            return None
        size = abs(self.direct).sum("source")
        return self.direct / self.metric.where(abs(self.metric) > VANISHING * size)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair and source, with what it gives directly and is worth by knockout.

        `resampled` stands in the rows of `image`.
        """
        columns = {"metric": self.metric}
        for queries in self.knockout["queries"].values:
            columns[f"knockout_{queries}"] = self.knockout.sel(queries=queries, drop=True)
        share = self.share
        if self.direct is not None and share is not None:
            columns |= {"direct": self.direct, "share": share}
        if self.resampled is not None:
            columns["resampled"] = self.resampled.expand_dims(source=["image"])
        frame = xr.merge([xr.Dataset({key: value}) for key, value in columns.items()], join="outer")
        return frame.to_dataframe().reset_index()

    def plot(self) -> Figure:
        """Bars: what each source gives and is worth, averaged over pairs."""
        from hooked_vlm.plots import bars

        kinds = {"direct": self.direct}
        for queries in self.knockout["queries"].values:
            lost = self.knockout.sel(queries=queries, drop=True)
            kinds[f"hidden from {queries}"] = lost
        if self.resampled is not None:
            kinds["other images"] = self.resampled.expand_dims(source=["image"])
        found = {name: value.mean("pair") for name, value in kinds.items() if value is not None}
        order = [*(self.knockout if self.direct is None else self.direct)["source"].values]
        return bars(
            {name: value.reindex(source=order) for name, value in found.items()},
            title=f"{self.provenance['metric']}: what comes from where",
        )


def source_attribution(
    model: HookedVLM,
    inputs: Pairs | Inputs | Sequence[Inputs],
    metric: MetricLike = None,
    *,
    sources: Places | None = None,
    resample: Resample = None,
    first_token: FirstToken = "cls",
    progress: bool = True,
) -> SourceResult:
    """Tells what image, question, the prompt's other text, and earlier answer give to a metric.

    Directly, where the last stack is pre-norm and a linear map makes the logits of it: a
    difference of logits is a sum over what was added to the stream of the last position, with
    the divisor of the final norm as it is. What attention adds is a sum over the positions it
    reads. The parts add up to the metric.

    Causally, for every model: by what the metric loses when nothing attends to a source, and by
    what it has less with other images. An image is not simply left out: that would move all later
    positions, and no model was trained on it.

    Source: direct logit attribution by source position, Elhage et al. (A Mathematical Framework
    for Transformer Circuits, 2021); knockout, Geva et al. (arXiv 2304.14767) sec. 3.

    Args:
        model: any model of the zoo but CLIP.
        inputs: inputs from `prepare`, one result per row, or pairs, of which the clean run counts.
        metric: as in `activation_patching`; `direct` takes weighted sums of the last position's
            logits, such as `logit_diff` and `lambda logits: logits[:, -1, 3]`.
        sources: places of a LLaVA's prompt by the name of a source. By default `image`, `system`,
            the text in front of the first turn, `question` and `answer`, what is said in the turns
            so far, and `template`, what marks these; of a prompt of another form `image` and
            `text`. Positions in none of yours are `rest`.
        resample: other images for the control, or prepared inputs that have them; `others` takes
            those of the other inputs.
        first_token: as in `activation_patching`.
        progress: whether to show a bar.

    Raises:
        ValueError: as in `activation_patching`; sources that overlap, inputs that are padded on
            the right, other images that take another number of tokens.
    """
    if model.task == "clip":
        raise ValueError("a CLIP compares vectors: it has no position that an answer is read at")
    chosen = as_metric(metric, model)
    runs, first = single(model, inputs, chosen, first_token)
    others = _others(model, runs, resample)
    why = exact.indirect(model)
    found: list[dict[str, Any]] = []
    for number, run in enumerate(tqdm(runs, desc="sources", unit="input", disable=not progress)):
        other = None if others is None else others[number]
        found.append(_attributed(model, run, sources, other, why is None))
    if why is None and any("direct" not in one for one in found):
        why = f"{chosen.name} is no weighted sum of the last position's logits; logit_diff is"
    pairs = {"pair": [run.name for run in runs]}

    def stacked(key: str, *dims: str, **coords: Any) -> xr.DataArray:
        rows = [one[key] for one in found]
        return xr.DataArray(np.array(rows), dims=("pair", *dims), coords=pairs | coords, name=key)

    names = list(found[0]["knockout"])
    if any(list(one["knockout"]) != names for one in found):
        raise ValueError(
            "these inputs have other sources than one another; give them by themselves"
        )
    queries = [*next(iter(found[0]["knockout"].values()))]
    for one in found:
        one["knockout"] = [list(row.values()) for row in one["knockout"].values()]
    if why is None and any(point.has_writers for point in model.hook_points()):
        why = exact.disturbed(found, pairs["pair"], chosen)
    direct = heads = mlps = None
    if why is None:
        n_layers, n_heads = np.array(found[0]["heads"]).shape[:2]
        layers = {"layer": range(n_layers)}
        direct = stacked("direct", "source", source=[*names, *OTHERS])
        mlps = stacked("mlps", "layer", **layers)
        heads = stacked(
            "heads", "layer", "head", "source", **layers, head=range(n_heads), source=names
        )
    told = {
        "method": "source_attribution",
        "metric": chosen.name,
        "first_token": first,
        "direct": why or "exact",
        "gap": None if direct is None else max(map(exact.gap, found)),
        "resample": "others" if isinstance(resample, str) else len(resample or ()),
    }
    return SourceResult(
        stacked("metric"),
        direct,
        heads,
        mlps,
        stacked("knockout", "source", "queries", source=names, queries=queries),
        None if others is None else stacked("resampled"),
        provenance(model, told),
    )


def _others(model: HookedVLM, runs: list[Run], resample: Resample) -> list[list[Inputs]] | None:
    """For each input those whose images stand in for its own; None for no control.

    Raises:
        ValueError: there is no other image.
    """
    if resample is None:
        return None
    if isinstance(resample, str):
        if resample != "others":
            raise ValueError(f"resample is 'others', or images, not {resample!r}")
        every = [rows_of(model, run.inputs())[0] for run in runs]
        found = [[one for one in every if not _same_image(one, own)] for own in every]
    else:
        given = [
            row
            for one in resample
            for row in (
                rows_of(model, one) if isinstance(one, Mapping) else [model.prepare([one], ["a"])]
            )
        ]
        found = [given] * len(runs)
    if not all(found):
        raise ValueError("resample has no image but the input's own; give others")
    return found


def _same_image(one: Inputs, other: Inputs) -> bool:
    return all(torch.equal(one[key], other[key]) for key in PER_IMAGE if key in one)


def _attributed(
    model: HookedVLM,
    run: Run,
    sources: Places | None,
    others: list[Inputs] | None,
    direct: bool,
) -> dict[str, Any]:
    """The numbers of one input; of a pair, of its clean one. Without `direct` if there is none.

    Raises:
        ValueError: padding at the position that is read.
    """
    clean = rows_of(model, run.inputs())[0]
    alone = replace(run, inputs=lambda: clean, n_rows=1)
    whole = direct and len(run.metric.parts()) == 1
    found: dict[str, Any] = {"metric": 0.0, "resampled": 0.0, "knockout": {}}
    for begun in Sweep(model, [alone], [], None, zero(), 0).begin(0):
        base, locator, metric, weight = begun.base, begun.locator, begun.metric, begun.weight
        given = locator.inputs
        value = as_numbers(metric(base.logits))[0]
        found["metric"] += weight * value
        for name, by in _knockouts(model, locator, sources, given).items():
            row = found["knockout"].setdefault(name, dict.fromkeys(by, 0.0))
            for queries, kind in by.items():
                if kind is not None:  # else there is nothing to attend to
                    row[queries] += weight * (value - _without(model, run, begun, kind))
        slope = exact.slope_of(metric, base.logits) if whole else None
        if slope is not None:
            found |= exact.direct(model, base, slope, _sources(model, locator, sources, given))
        if others is not None:
            swapped = [model(**_swapped(model, given, *one)) for one in enumerate(others)]
            values = [as_numbers(metric(logits))[0] for logits in swapped]
            found["resampled"] += weight * (value - sum(values) / len(values))
    return found


def _without(model: HookedVLM, run: Run, begun: Begun, kind: Intervention) -> float:
    """The metric with a knockout, continued from the run without."""
    assert kind.sites is not None
    places: list[Place] | None = None if kind.at is None else [kind.at]
    sweep = Sweep(model, [run], as_sites(model, kind.sites(model)), places, kind, 0)
    return as_numbers(begun.metric(sweep.logits(begun, sweep.cells(begun))))[0]


def _swapped(model: HookedVLM, given: Inputs, number: int, other: Inputs) -> dict[str, Any]:
    """An input with another's images in the place of its own.

    Raises:
        ValueError: no images, or such that take another number of tokens.
    """
    told = []
    for one in (other, given):
        n = len(one["pixel_values"]) if "pixel_values" in one else 0
        told.append((n, len(model.prompt_parts(one).get("image", ()))))
    if told[0] != told[1] or not told[1][0]:
        raise ValueError(
            f"resample={number} has {told[0][0]} images of {told[0][1]} tokens, the input "
            f"{told[1][0]} of {told[1][1]}; give as many images of one shape"
        )
    return {**given, **{key: other[key] for key in PER_IMAGE if key in other}}


def _knockouts(
    model: HookedVLM, locator: Locator, sources: Places | None, inputs: Inputs
) -> dict[str, dict[str, Any]]:
    """The knockouts of each source, by who does not see it; None where nothing is to be seen."""
    last = list(model.stacks)[-1]
    reads = {  # by the stack that reads another through cross-attention
        kept.reader: source
        for source, kept in locator.base.stacks.items()
        if kept.reader is not None and locator.base.stacks[kept.reader].cross
    }
    if not reads:
        found = _sources(model, locator, sources, inputs)
        every = {position for at in found.values() for position in at}
        kinds: dict[str, dict[str, Any]] = {}
        for name, at in found.items():
            by: dict[str, Place] = {"last": "last", "others": tuple(sorted(every - {*at}))}
            kinds[name] = {
                who: knockout(queries, at, stack=last) if at and queries else None
                for who, queries in by.items()
            }
        return kinds
    if sources is not None:
        raise ValueError("sources= are of a model that reads its image among the tokens")
    first = next(iter(model.stacks))
    crossed = {
        "image" if source == first else "question": knockout(stack=name, part="cross_attn")
        for name, source in reads.items()
    }
    crossed["text"] = knockout(stack=last)
    return {name: {"all": kind} for name, kind in crossed.items()}


def _sources(
    model: HookedVLM, locator: Locator, sources: Places | None, inputs: Inputs
) -> dict[str, tuple[int, ...]]:
    """The positions of each source; they do not overlap, and every other one is `rest`.

    Raises:
        ValueError: sources that overlap.
    """
    stack = list(model.stacks)[-1]
    stream = f"{stack}.blocks.0.hook_resid_pre"
    real, length = locator.real(stream), locator.count(stream)
    given: Places = model.prompt_parts(inputs) if sources is None else sources
    found: dict[str, tuple[int, ...]] = {}
    for name, places in given.items():
        several = list(places) if isinstance(places, list | tuple) else [places]
        at = {
            position
            for place in several
            for position in locator.find(as_place(place), stack, length, f"source {name}")
        }
        found[name] = tuple(sorted(at))
    counted = [position for at in found.values() for position in at]
    if len(counted) > len(set(counted)):
        twice = next(one for one in counted if counted.count(one) > 1)
        raise ValueError(f"position {twice} is in two sources; each position has one")
    rest = tuple(sorted(set(real) - set(counted)))
    return found | ({"rest": rest} if rest else {})
