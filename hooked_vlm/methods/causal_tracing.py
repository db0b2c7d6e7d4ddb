"""Causal tracing: through which layers and tokens an image's part in the answer passes.

A clean run sees the image; corrupt runs see the same text and image, but noise stands on what the
language side reads of it. Restoring writes the clean activation of a window of layers at a token
back into a corrupt run; what that gives back of the answer's probability tells how much of the
image's part passes there.

Source: Palit et al. (arXiv 2308.14179) for BLIP, after Meng et al. (arXiv 2202.05262) sec. 2.1.
What differs from the released code: noise is drawn once for each draw and example, and is the same
in every cell; every cell that restores the clean run whatever the model is is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, Literal

import numpy as np
import xarray as xr

from hooked_vlm.methods.noise import Corruption, Noise, On, drawn
from hooked_vlm.methods.trace_inputs import OWN, Answer, Example, Examples, examples, metric_of
from hooked_vlm.methods.trace_result import TraceResult
from hooked_vlm.methods.trace_sweep import TraceSweep
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import Sites, Swept, Together, as_sites, parts
from hooked_vlm.patching.interventions import patch
from hooked_vlm.patching.metrics import as_metric
from hooked_vlm.patching.places import Each, as_place, shown
from hooked_vlm.patching.result import provenance
from hooked_vlm.patching.runs import FirstToken, Run
from hooked_vlm.patching.sweep import MetricLike, Positions, where

__all__ = [
    "KINDS",
    "OWN",
    "PUBLISHED",
    "Example",
    "Noise",
    "TraceResult",
    "drawn",
    "scores",
    "trace",
]

Kind = Literal["resid", "attn", "cross_attn", "mlp", "attn_sublayer", "cross_attn_sublayer"]

KINDS: Final[dict[str, tuple[str, str]]] = {
    "resid": ("mlp", "stream"),
    "attn": ("attn", "out"),
    "cross_attn": ("cross_attn", "out"),
    "mlp": ("mlp", "out"),
    "attn_sublayer": ("attn", "stream"),
    "cross_attn_sublayer": ("cross_attn", "stream"),
}
"""What is restored: a part of the block, and whether what it adds, or the stream behind it."""

PUBLISHED: Final = Noise("multiplicative", mean=1.0, std=5.0)
"""The noise of the released code of arXiv 2308.14179."""


def trace(
    model: HookedVLM,
    inputs: Examples,
    sites: Sites | None = None,
    positions: Positions = "each",
    window: int = 1,
    *,
    kind: Kind | None = None,
    stacks: str | Sequence[str] | None = None,
    noise: Noise = PUBLISHED,
    on: On = "embeddings",
    draws: int = 5,
    seed: int = 0,
    answer: Answer = None,
    metric: MetricLike = None,
    first_token: FirstToken = "cls",
    max_rows: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> TraceResult:
    """Restores clean activations in runs whose image is corrupt, and measures what that gives back.

    Each example is run once, a clean row and a corrupt one for each draw; each restoration is a row
    of a batch that resumes at its site. Equal to one full pass for each.

    Args:
        model: a BLIP, an ALBEF or a LLaVA.
        inputs: inputs from `prepare`, one example per row; pairs and questions, of which image,
            text and answer are read; tuples of image, text and answer; or a list of these.
        sites: what is restored, as in `activation_patching`; None for the `kind` in each block.
        positions: as in `activation_patching`; `each` counts the positions of each stack.
        window: of how many layers around each site are restored together, cut off at the ends, as
            published: 3 for the site's own and its neighbours.
        kind: without `sites`: `resid`, the stream behind each block (the default; of a post-norm
            block behind its norm, the published 'layer output'); `attn_sublayer` and
            `cross_attn_sublayer`, the stream behind the attention (the published 'attention' and
            'cross-attention': with residual and norm); `attn`, `cross_attn` and `mlp`, what these
            add.
        stacks: without `sites`: the stacks; by default all but that of the image.
        noise: the noise.
        on: `embeddings`: noise on what the language side reads of the image,
            `hook_image_embeds`; `pixels`: on `pixel_values`, so that the image's stack can be
            traced, too.
        draws: how many times noise is drawn; of `scale` noise, which has no chance in it, once.
        seed: of the noise. It decides it with the number of the draw and the example's name, or
            number where it has none.
        answer: None for the token, or class, that the clean run finds most likely, as published;
            a word, an id; or `OWN`.
        metric: what is measured, by default `prob` of the answer (of an itm model that of its own
            decision); a metric that has an answer already keeps it.
        first_token: as in `HookedVLM.prepare`.
        max_rows: as in `activation_patching`.
        memory: as in `activation_patching`.
        progress: whether to show a bar.

    Returns:
        The metric by example, draw, site and position. Ctrl-C returns what is done, and
        `result.provenance["complete"]` is False then.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: a CLIP, an even window, no draws, an unknown kind, nothing to trace, a model
            without a processor for what is not prepared, an answer that is not one token, a
            position that is not there.
    """
    if model.task == "clip":
        raise ValueError(
            "causal tracing needs a stack that reads the image, and a CLIP has none: it compares "
            "an image with texts at the end; see activation_patching between two images"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"a window has a layer in its middle: it is 1, 3, 5, …, not {window}")
    if draws < 1:
        raise ValueError(f"draws is at least 1, not {draws}")
    if on not in ("embeddings", "pixels"):
        raise ValueError(f"noise is on 'embeddings' or 'pixels', not {on!r}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is at least 1, not {max_rows}")
    middles = _middles(model, sites, kind, stacks)
    _check_behind(model, middles, on)
    swept = [_window(one, middles, window) for one in middles]
    own = any(site.position is not None for one in middles for site in parts(one))
    _, places = where(model, middles, None if own and positions == "each" else positions)
    asked = examples(model, inputs, first_token)
    corruption = Corruption(noise, on, 1 if noise.kind == "scale" else draws, seed)
    runs = [
        Run(
            one.name,
            partial(corruption.rows_of, one.inputs),
            metric_of(model, metric, answer, one),
            corruption.n_rows,
            one.roles,
        )
        for one in asked
    ]
    sweep = TraceSweep(
        model, runs, swept, places, patch(), 1, max_rows, memory, corruption=corruption
    )
    with model.hooks(corruption.hooks):
        values, ends = sweep.values("tracing" if progress else None)
    told = {
        "method": "causal_tracing",
        "noise": str(noise),
        "on": on,
        "seed": seed,
        "window": window,
        "first_token": asked[0].first_token,
        "metric": runs[0].metric.name,
        "answers": _answers(model, sweep, metric),
        "complete": not sweep.interrupted,
        "excluded": dict(sweep.excluded),
    }
    return _result(sweep, middles, values[..., 0], ends[..., 0], provenance(model, told))


def scores(
    model: HookedVLM,
    inputs: Examples,
    sites: Sites,
    *,
    noise: Noise = PUBLISHED,
    on: On = "embeddings",
    draws: int = 5,
    seed: int = 0,
    metric: MetricLike = None,
    progress: bool = False,
) -> dict[str, float]:
    """What each site restores by itself: the mean gain of the metric over examples and draws.

    Args:
        model: as in `trace`.
        inputs: as in `trace`.
        sites: such as heads' `hook_z` and `hook_mlp_out`, at all positions together. Those in front
            of the noise get 0: they are never corrupt.
        noise: as in `trace`.
        on: as in `trace`.
        draws: as in `trace`.
        seed: as in `trace`.
        metric: as in `trace`.
        progress: whether to show a bar.

    Returns:
        By the name of each site; what a site takes away is negative.
    """
    chosen = as_sites(model, sites)
    behind = [one for one in chosen if not _in_front(model, one, on)]
    found = {one.name: 0.0 for one in chosen}
    if behind:
        result = trace(
            model,
            inputs,
            behind,
            None,
            noise=noise,
            on=on,
            draws=draws,
            seed=seed,
            metric=metric,
            progress=progress,
        )
        if not result.provenance["complete"]:
            raise KeyboardInterrupt
        gains = result.difference.mean(("example", "draw")).values.tolist()
        found |= dict(zip((one.name for one in result.sites), gains, strict=True))
    return found


# --- what is restored


def _middles(
    model: HookedVLM, sites: Sites | None, kind: Kind | None, stacks: str | Sequence[str] | None
) -> list[Swept]:
    """The sites, or the middles of their windows."""
    if sites is not None:
        if kind is not None or stacks is not None:
            raise ValueError("sites= says what is restored: leave out kind= and stacks=")
        return as_sites(model, sites)
    part, what = KINDS.get(kind or "resid", ("", ""))
    if not part:
        raise ValueError(f"kind is {', '.join(map(repr, KINDS))}, not {kind!r}")
    known = list(model.stacks)
    asked = known[1:] if stacks is None else [stacks] if isinstance(stacks, str) else list(stacks)
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"there is no stack {unknown[0]!r}; this model has {known}")
    found: list[Swept] = []
    for name in asked:
        here = [
            Site.parse(f"{name}.blocks.{layer}.{getattr(one, what)}")
            for layer, block in enumerate(model.stacks[name].block_list)
            for one in block.SUMS
            if one.part == part and hasattr(block, part)
        ]
        if not here and stacks is not None:
            raise ValueError(f"{name!r} has no {part!r}: kind={kind!r} is not there")
        found += here
    if not found:
        raise ValueError(f"none of {asked} has {part!r}: kind={kind!r} is not there")
    return found


def _window(one: Swept, middles: list[Swept], width: int) -> Swept:
    """A site and those of the same component in the layers around it."""
    if width == 1:
        return one
    if not isinstance(one, Site) or one.layer is None:
        name = one.name
        raise ValueError(f"a window is of layers, and {name!r} is not in one: leave out window=")
    alike = [
        site
        for site in middles
        if isinstance(site, Site)
        and replace(site, name="", layer=None) == replace(one, name="", layer=None)
        and site.layer is not None
        and abs(site.layer - one.layer) <= width // 2
    ]
    first, last = alike[0].layer, alike[-1].layer
    head = "" if one.head is None else f" head {one.head}"
    return Together(
        tuple(alike), f"{one.stack}.blocks.{first}-{last}.{one.component}{head} around {one.layer}"
    )


def _in_front(model: HookedVLM, one: Swept, on: On) -> bool:
    """Whether a site is computed before the noise."""
    if on == "pixels":
        return False
    vision = next(iter(model.stacks))
    return any(
        model.stack_of(site.name) == vision and site.name != "hook_image_embeds"
        for site in parts(one)
    )


def _check_behind(model: HookedVLM, sites: list[Swept], on: On) -> None:
    for one in sites:
        if _in_front(model, one, on):
            raise ValueError(
                f"{one.name!r} is computed before the noise, which is on the image's embeddings: "
                "there is nothing to restore; trace it with on='pixels'"
            )


# --- what is told


def _answers(model: HookedVLM, sweep: TraceSweep, metric: MetricLike) -> list[str | None]:
    """What each example's metric reads, in words where they are known; None for no answer."""
    told: list[str | None] = []
    reads = metric is None or "answer" in as_metric(metric, model).needs
    for number, run in enumerate(sweep.runs):
        seen, found = sweep.seen.get(number), run.metric.answer
        if not reads or seen is None:
            told.append(None)
            continue
        ids: list[Any] = [seen.top] if found is None else list(np.atleast_1d(found))
        if seen.words and model.processor is not None:
            told.append(" ".join(model.tokenizer.convert_ids_to_tokens(ids)))
        else:
            classes = ("no match", "match") if model.task == "itm" else ()
            told.append(" ".join(classes[one] if one < len(classes) else str(one) for one in ids))
    return told


def _result(
    sweep: TraceSweep,
    middles: list[Swept],
    values: np.ndarray,
    ends: np.ndarray,
    told: dict[str, Any],
) -> TraceResult:
    """Names the axes of a sweep's numbers."""
    draws, n_sites = sweep.corruption.draws, len(sweep.sites)
    names = [run.name for run in sweep.runs]
    cells = values.reshape(len(names), n_sites, -1, draws)
    sure = np.zeros(cells.shape[:3], dtype=bool)
    for pair, seen in sweep.seen.items():
        for cell, certain in seen.certain.items():
            sure[(pair, *cell)] = certain
    fields = {
        name: ("site", [_field(one, name) for one in middles])
        for name in ("stack", "layer", "component", "head")
    }
    if any(site.position is not None for one in middles for site in parts(one)):
        fields["position"] = ("site", [shown(as_place(_field(one, "position"))) for one in middles])
    coords: dict[str, Any] = {"example": names, "site": [one.name for one in sweep.sites], **fields}
    told["each"] = isinstance(sweep.places, Each)
    if sweep.places is not None:
        each = sweep.places
        if isinstance(each, Each):
            end = (cells.shape[2] - 1) * each.stride + each.width
            windows = each.windows(end)
            places: list[Any] = [w if each.width > 1 else w[0] for w in windows]
        else:
            places = each
        told["places"] = places
        coords["position"] = [shown(place) for place in places]
        dims: tuple[str, ...] = ("example", "site", "position")
    else:
        cells, sure, dims = cells[:, :, 0], sure[:, :, 0], ("example", "site")
    data = xr.DataArray(
        np.moveaxis(cells, -1, 1),
        dims=("example", "draw", *dims[1:]),
        coords={**coords, "draw": range(draws)},
        name="restored",
    )
    clean = xr.DataArray(ends[0], dims="example", coords={"example": names})
    corrupt = xr.DataArray(
        ends[1:].T, dims=("example", "draw"), coords={"example": names, "draw": range(draws)}
    )
    tokens = tuple(sweep.seen[at].tokens if at in sweep.seen else {} for at in range(len(names)))
    flags = xr.DataArray(sure, dims=dims, coords=coords, name="by_construction")
    return TraceResult(data, clean, corrupt, flags, tuple(sweep.sites), tokens, told)


def _field(site: Swept, name: str) -> Any:
    return getattr(site, name) if isinstance(site, Site) else site.common(name)
