"""Where an answer comes from: the image, the question, the rest of the prompt, or the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from tqdm.auto import tqdm

from hooked_vlm.components.hook_point import HookPoint, reads_only
from hooked_vlm.components.norm import LayerNorm
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.inputs import ImageLike
from hooked_vlm.patching.interventions import knockout
from hooked_vlm.patching.metrics import Metric, as_metric, as_numbers
from hooked_vlm.patching.places import Locator, Place, as_place
from hooked_vlm.patching.runs import PER_IMAGE, FirstToken, Inputs, Pairs, Run, rows_of, single
from hooked_vlm.patching.sweep import MetricLike, ablate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

OTHERS = ("mlp", "embed", "bias")  # what no other position gives
Places = Mapping[str, Place | Sequence[Place]]


@dataclass(frozen=True)
class SourceResult:
    """What each source gives to a metric.

    Attributes:
        metric: by `pair`.
        direct: by `pair` and `source`, what adds up to the metric: by attention of the last
            position to a source, by MLPs, the last token's own embedding, and biases; None where
            `provenance["direct"]` says why.
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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair and source, with what it gives directly and is worth by knockout.

        `resampled` stands in the rows of `image`.
        """
        columns = {"metric": self.metric}
        for queries in self.knockout["queries"].values:
            columns[f"knockout_{queries}"] = self.knockout.sel(queries=queries, drop=True)
        if self.direct is not None:
            columns |= {"direct": self.direct, "share": self.direct / self.metric}
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
    resample: Sequence[ImageLike] | None = None,
    first_token: FirstToken = "cls",
    progress: bool = True,
) -> SourceResult:
    """Tells what image, question, the prompt's other text, and earlier answer give to a metric.

    Directly, where the last stack is pre-norm and a linear map makes the logits of it: the
    difference of two logits is a sum over what was added to the stream of the last position, with
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
        metric: as in `activation_patching`; `direct` takes `logit_diff` alone.
        sources: places of a LLaVA's prompt by the name of a source. By default `image`, `question`,
            `answer`, what stands behind the turn that the prompt opens, and `system`, all else:
            the system text and what marks turns; of a prompt of another form `image` and `text`.
        resample: other images for the control.
        first_token: as in `activation_patching`.
        progress: whether to show a bar.

    Raises:
        ValueError: as in `activation_patching`; sources that overlap.
    """
    if model.task == "clip":
        raise ValueError("a CLIP compares vectors: it has no position that an answer is read at")
    chosen = as_metric(metric, model)
    runs, first = single(model, inputs, chosen, first_token)
    why = _indirect(model, chosen)
    others = None if resample is None else [_pixels(model, image) for image in resample]
    found: list[dict[str, Any]] = []
    for run in tqdm(runs, desc="sources", unit="input", disable=not progress):
        found.append(_attributed(model, run, sources, others, why is None))
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
    direct = heads = mlps = None
    if why is None:
        n_layers, n_heads = np.array(found[0]["heads"]).shape[:2]
        layers = {"layer": range(n_layers)}
        direct = stacked("direct", "source", source=[*names, *OTHERS])
        mlps = stacked("mlps", "layer", **layers)
        heads = stacked(
            "heads", "layer", "head", "source", **layers, head=range(n_heads), source=names
        )
    provenance = {
        **model.provenance,
        "method": "source_attribution",
        "metric": chosen.name,
        "first_token": first,
        "direct": why or "exact",
        "weights": model.weights_hash(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    return SourceResult(
        stacked("metric"),
        direct,
        heads,
        mlps,
        stacked("knockout", "source", "queries", source=names, queries=queries),
        None if others is None else stacked("resampled"),
        provenance,
    )


def _indirect(model: HookedVLM, metric: Metric) -> str | None:
    """Why the metric is no sum over a stream, None if it is."""
    last = list(model.stacks)[-1]
    if not (model.stacks[last].pre_norm and isinstance(model._modules.get("unembed"), nn.Linear)):
        return f"{last!r} is a post-norm stack: its stream is no sum of what its parts add"
    if metric.needs != ("answer", "foil") or metric.tokens == "all":
        return f"{metric.name} is no difference of two logits; logit_diff is"
    return None


def _pixels(model: HookedVLM, image: ImageLike) -> dict[str, Any]:
    """What a model gets of an image."""
    prepared = model.prepare([image], ["a"])
    return {key: prepared[key] for key in PER_IMAGE if key in prepared}


def _attributed(
    model: HookedVLM,
    run: Run,
    sources: Places | None,
    others: list[dict[str, Any]] | None,
    direct: bool,
) -> dict[str, Any]:
    """The numbers of one input; of a pair, of its clean one."""
    inputs = rows_of(model, run.inputs())[0]
    found: dict[str, Any] = {"metric": 0.0, "resampled": 0.0, "knockout": {}}
    for metric, weight in run.metric.parts():
        given = inputs
        if len(metric.continuation) > 1:
            given = model.continued(inputs, metric.continuation[:-1])
        seen: dict[str, Tensor] = {}
        last = list(model.stacks)[-1]
        hooks = [(name, _keeper(seen)) for name in _kept(model, last)] if direct else []
        keep = 0 if metric.whole else max(1, len(metric.continuation))
        with model.hooks(hooks):
            base = model.base_run(**given, logits_to_keep=keep)
        clean = base.logits[0] if base.logits.dim() < 3 else base.logits[0, -1]
        if "reference" in metric.needs and metric.reference is None:
            metric = replace(metric, reference=clean)
        value = as_numbers(metric(base.logits))[0]
        found["metric"] += weight * value
        locator = Locator(model, base, given, 0, run.roles)
        for name, by in _knockouts(model, locator, sources, given).items():
            row = found["knockout"].setdefault(name, dict.fromkeys(by, 0.0))
            for queries, kind in by.items():
                if kind is not None:  # else there is nothing to attend to
                    result = ablate(model, given, None, kind, metric, progress=False)
                    row[queries] += weight * (value - result.data.item())
        if direct:
            found |= _direct(model, last, metric, seen, _sources(model, locator, sources, given))
        if others is not None:
            swapped = [model(**one) for one in _swapped(given, others)]
            values = [as_numbers(metric(logits))[0] for logits in swapped]
            found["resampled"] += weight * (value - sum(values) / len(values))
    return found


def _swapped(given: Inputs, others: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An input with other images in the place of its own.

    Raises:
        ValueError: an image that takes another number of tokens.
    """
    for number, one in enumerate(others):
        shapes = [tuple(side["pixel_values"].shape) for side in (given, one)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"resample={number}: its pixels are {shapes[1]}, those of the input {shapes[0]}; "
                "give images of one shape, one for an input"
            )
        yield {**given, **one}


def _keeper(seen: dict[str, Tensor]) -> Any:
    """A hook that keeps what the last position is made of."""

    @reads_only
    def keep(value: Tensor, hook: HookPoint) -> None:
        whole = str(hook.name).endswith("hook_v")
        axis = hook.pos_dim or 1
        found = value if whole else value.narrow(axis, value.shape[axis] - 1, 1).select(axis, 0)
        seen[str(hook.name)] = found[0].double()

    return keep


def _kept(model: HookedVLM, stack: str) -> list[str]:
    layers = range(model.stacks[stack].cfg.n_layers)
    leaves = ("attn.hook_pattern", "attn.hook_v", "hook_mlp_out")
    names = [f"{stack}.blocks.{layer}.{leaf}" for layer in layers for leaf in leaves]
    return [*names, f"{stack}.blocks.0.hook_resid_pre", f"{stack}.ln_final.hook_scale"]


@torch.no_grad()
def _direct(
    model: HookedVLM,
    stack: str,
    metric: Metric,
    seen: dict[str, Tensor],
    sources: Mapping[str, tuple[int, ...]],
) -> dict[str, Any]:
    """What adds up to the difference of two logits."""
    module: Any = model.stacks[stack]
    norm, weights = module.ln_final, model.W_U.double()
    answer: Any = metric.answer
    foil: Any = metric.foil
    toward = weights[:, answer] - weights[:, foil]
    along = norm.weight.double() * toward
    if isinstance(norm, LayerNorm):
        along = along - along.mean()  # the norm takes the mean out
    along = along / seen[f"{stack}.ln_final.hook_scale"]
    bias = (model.b_U[answer] - model.b_U[foil]).double()
    if isinstance(norm, LayerNorm):
        bias = bias + norm.bias.double() @ toward
    heads, mlps = [], []
    for layer, block in enumerate(module.block_list):
        name = f"{stack}.blocks.{layer}"
        out = block.attn.W_O.double() @ along.to(block.attn.W_O.device)  # [head, d_head]
        values = seen[f"{name}.attn.hook_v"].repeat_interleave(block.attn.group, 1)
        given = torch.einsum("shd,hd->hs", values, out) * seen[f"{name}.attn.hook_pattern"]
        heads.append([[float(row[list(at)].sum()) for at in sources.values()] for row in given])
        mlps.append(float(seen[f"{name}.hook_mlp_out"] @ along))
        bias = bias + block.attn.b_O.double() @ along
    embed = float(seen[f"{stack}.blocks.0.hook_resid_pre"] @ along)
    by_source = np.array(heads).sum((0, 1)).tolist()
    return {
        "heads": heads,
        "mlps": mlps,
        "direct": [*by_source, sum(mlps), embed, float(bias)],
    }


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
    real = locator._real(stack)
    given: Places = model.prompt_parts(inputs) if sources is None else sources
    found: dict[str, tuple[int, ...]] = {}
    for name, places in given.items():
        several = list(places) if isinstance(places, list) else [places] if places != () else []
        at = {
            position
            for place in several
            for position in locator.find(as_place(place), stack, len(locator._door(stack)), name)
        }
        found[name] = tuple(sorted(at & set(real)))
    counted = [position for at in found.values() for position in at]
    if len(counted) > len(set(counted)):
        twice = next(one for one in counted if counted.count(one) > 1)
        raise ValueError(f"position {twice} is in two sources; each position has one")
    rest = tuple(sorted(set(real) - set(counted)))
    return found | ({"rest": rest} if rest else {})
