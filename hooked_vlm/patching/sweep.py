"""Activation patching: every site in turn, at the price of what it can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchEncoding

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.data import Pair
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.models.names import Names, Site, head_of
from hooked_vlm.patching.metrics import Metric, as_numbers, default_metric
from hooked_vlm.patching.result import PatchingResult, label

Direction = Literal["denoise", "noise"]
Cell = tuple[int, Site]  # where its value goes, and what it patches


def activation_patching(
    model: HookedVLM,
    pairs: Pair | Sequence[Pair],
    sites: Names | Site | Sequence[Site],
    metric: Metric | None = None,
    positions: Literal["each"] | int | Sequence[int] | None = None,
    direction: Direction = "denoise",
    *,
    first_token: Literal["cls", "enc"] = "cls",
    max_rows: int = 64,
    progress: bool = True,
) -> PatchingResult:
    """Patches every site from one run into the other and measures what that changes.

    Each pair is run once; each patch is a row of a batch that resumes at its site, so that images
    are encoded, and their keys and values made, once per pair (`HookedVLM.resume`). Equal to one
    full pass per patch (DESIGN 'resuming'; method: Meng et al., arXiv 2202.05262, sec. 2).

    Args:
        model: any model of the zoo.
        pairs: what to patch between; both texts of a pair must have the same number of tokens.
        sites: hook names, globs or sites.
        metric: from logits to a number per row; by default `itm_margin` or `logit_diff`.
        positions: None patches all positions of a site together; `each` one after the other; else
            the positions to patch one after the other.
        direction: `denoise` patches clean activations into the corrupt run, `noise` the reverse.
        first_token: as in `HookedVLM.prepare`.
        max_rows: rows of the largest batch.
        progress: whether to show a bar.

    Returns:
        The metric by pair, site (or layer and head) and position.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: texts of a pair that do not align, a position that is not there, or a metric
            that misses its answer or foil.
    """
    pairs = [pairs] if isinstance(pairs, Pair) else list(pairs)
    if not pairs:
        raise ValueError("no pairs were given")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}")
    swept = _sites(model, sites)
    chosen = metric or default_metric(model)
    bound = [chosen.bind(model, pair) for pair in pairs]
    prepared = [_prepare(model, pair, first_token) for pair in pairs]
    at = _positions(positions, prepared)
    cells = list(enumerate(replace(site, position=p) for site in swept for p in at or [None]))
    values = np.full((len(pairs), len(cells)), np.nan)
    runs = np.empty((2, len(pairs)))
    source, start = (0, 1) if direction == "denoise" else (1, 0)
    modules = list({_module(site.name) for site in swept})
    with tqdm(total=values.size, desc="patching", unit="patch", disable=not progress) as bar:
        for index, (inputs, one) in enumerate(zip(prepared, bound, strict=True)):
            base = model.base_run(**inputs, names_filter=modules)
            runs[:, index] = as_numbers(one(base.logits))
            for batch in _batches(model, cells, max_rows):
                logits = _patched(model, base, batch, source, start)
                values[index, [cell for cell, _ in batch]] = as_numbers(one(logits))
                bar.update(len(batch))
    names = [pair.name or str(index) for index, pair in enumerate(pairs)]
    clean, corrupt = (xr.DataArray(run, dims="pair", coords={"pair": names}) for run in runs)
    provenance = {
        **model.provenance,
        "method": "activation_patching",
        "metric": chosen.name,
        "direction": direction,
        "first_token": first_token,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    shaped = values.reshape(len(pairs), len(swept), -1)
    data = label(shaped, names, swept, at)
    return PatchingResult(data, clean, corrupt, tuple(swept), provenance)


def _sites(model: HookedVLM, sites: Names | Site | Sequence[Site]) -> list[Site]:
    if isinstance(sites, Site):
        sites = [sites]
    if isinstance(sites, Sequence) and not isinstance(sites, str):
        sites = [site.name if isinstance(site, Site) else site for site in sites]
    return model.sites(sites)


def _prepare(model: HookedVLM, pair: Pair, first_token: Literal["cls", "enc"]) -> BatchEncoding:
    """Row 0 is the clean input, row 1 the corrupt one; an image that they share stands once.

    Raises:
        ValueError: texts of different numbers of tokens.
    """
    inputs = model.prepare_prompt(pair.images, pair.texts, first_token=first_token)
    mask = inputs.get("attention_mask")
    lengths = [0, 0] if mask is None else mask.sum(1).tolist()
    if lengths[0] != lengths[1]:
        said = [" ".join(model.to_str_tokens(text)) for text in pair.texts or []]
        raise ValueError(
            f"pair {pair.name!r}: positions do not align, the clean text has {lengths[0]} tokens "
            f"and the corrupt one {lengths[1]}: {said[0]!r}, {said[1]!r}"
        )
    return inputs


def _positions(
    positions: Literal["each"] | int | Sequence[int] | None, prepared: list[BatchEncoding]
) -> list[int] | None:
    if positions is None:
        return None
    lengths = {inputs["input_ids"].shape[1] for inputs in prepared}
    if positions == "each":
        if len(lengths) > 1:
            raise ValueError(
                f"positions='each' needs pairs of one length, these have {sorted(lengths)} tokens"
            )
        return list(range(lengths.pop()))
    if isinstance(positions, str):
        raise ValueError(f"positions is None, 'each', an index or a list, not {positions!r}")
    return [positions] if isinstance(positions, int) else list(positions)


def _module(name: str) -> str:
    of = head_of(name)
    return name if of is None else of[0]


def _batches(model: HookedVLM, cells: list[Cell], max_rows: int) -> Iterator[list[Cell]]:
    """Cells that resume at the same door together, no more than `max_rows` at a time."""

    def place(cell: Cell) -> tuple[int, int, int]:
        return model.order_of(cell[1].name)

    for _, group in groupby(sorted(cells, key=place), key=place):
        together = list(group)
        for first in range(0, len(together), max_rows):
            yield together[first : first + max_rows]


def _patched(model: HookedVLM, base: Base, batch: list[Cell], source: int, start: int) -> Tensor:
    """Logits of the batch, row by row the base's row `start` with one site patched."""
    by_module: dict[str, list[tuple[int, Site]]] = {}
    for row, (_, site) in enumerate(batch):
        by_module.setdefault(_module(site.name), []).append((row, site))
    hooks = [
        (name, _writer(base.cache[name][base.row(model.stack_of(name), source)], writes))
        for name, writes in by_module.items()
    ]
    return model.resume(base, list(by_module), rows=[start] * len(batch), fwd_hooks=hooks)


def _writer(value: Tensor, writes: list[tuple[int, Site]]) -> Callable[..., Tensor]:
    """A hook that writes one row's value into rows of a batch, where their sites say."""

    def write(activation: Tensor, hook: HookPoint) -> Tensor:
        for row, site in writes:
            where: list[Any] = [slice(None)] * value.dim()
            if site.head is not None and hook.head_axis is not None:
                where[hook.head_axis - 1] = site.head
            if site.position is not None:
                axis = hook.pos_dim - 1
                if value.dim() < 2 or not -value.shape[axis] <= site.position < value.shape[axis]:
                    raise ValueError(f"{site.name!r} has no position {site.position}")
                where[axis] = site.position
            activation[(row, *where)] = value[tuple(where)]
        return activation

    return write
