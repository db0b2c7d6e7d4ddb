"""Activation patching: every site in turn, at the price of what it can reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from operator import index as as_index
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.data import Pair
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.models.names import Names, Site, head_of
from hooked_vlm.patching.metrics import Metric, as_metric, as_numbers
from hooked_vlm.patching.result import PatchingResult, label

Direction = Literal["denoise", "noise"]
Positions = Literal["each"] | int | Sequence[int] | None
PER_IMAGE = ("pixel_values", "image_sizes")  # inputs with a row for each image
Inputs = Mapping[str, Any]  # what `prepare` makes
Cell = tuple[int, Site]  # where its value goes, and what it patches


def activation_patching(
    model: HookedVLM,
    pairs: Pair | Sequence[Pair] | tuple[Inputs, Inputs],
    sites: Names | Site | Sequence[Site],
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    positions: Positions = None,
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
        pairs: what to patch between, or a clean and a corrupt input from `prepare`; both texts of
            a pair must have the same number of tokens.
        sites: hook names, globs or sites, each spanning all positions.
        metric: a metric, or a function from logits to a number per row; by default `itm_margin`
            or `logit_diff`.
        positions: None patches all positions of a site together; `each` one after the other; else
            the positions to patch one after the other.
        direction: `denoise` patches clean activations into the corrupt run, `noise` the reverse.
        first_token: as in `HookedVLM.prepare`; of inputs that are prepared already, theirs.
        max_rows: rows of the largest batch.
        progress: whether to show a bar.

    Returns:
        The metric by pair, site (or layer and head) and position.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: texts of a pair that do not align, a position that is not there, or a metric
            that misses its answer or foil.
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}")
    if max_rows < 1:
        raise ValueError(f"max_rows is at least 1, not {max_rows}")
    swept = _sites(model, sites)
    if positions is not None and any(site.position is not None for site in swept):
        raise ValueError("sites with positions of their own leave no choice to positions=")
    chosen = as_metric(metric, model)
    runs, first = _runs(model, pairs, chosen, first_token)
    modules = list({_module(site.name): None for site in swept})
    # One position of the logits will do, unless they are read, or patched, elsewhere.
    inside = all(name.partition(".")[0] in model.stacks for name in modules)
    record = partial(
        model.base_run, names_filter=modules, logits_to_keep=int(inside and not chosen.whole)
    )
    base = record(**runs[0].inputs())
    if len(base.logits) != 2:
        raise ValueError(
            f"the pair gives {len(base.logits)} rows of logits, not one for the clean and one for "
            "the corrupt input; of a model whose rows are images, it needs a corrupt image"
        )
    at = _positions(model, positions, modules, base, runs)
    placed = swept if at is None else [replace(site, position=p) for site in swept for p in at]
    cells = list(enumerate(placed))
    values = np.full((len(runs), len(cells)), np.nan)
    ends = np.empty((2, len(runs)))
    ends[:, 0] = as_numbers(runs[0].metric(base.logits))
    source, start = (0, 1) if direction == "denoise" else (1, 0)
    with tqdm(total=values.size, desc="patching", unit="patch", disable=not progress) as bar:
        for pair, run in enumerate(runs):
            if pair:
                base = record(**run.inputs())
                ends[:, pair] = as_numbers(run.metric(base.logits))
            for batch in _batches(model, cells, max_rows):
                logits = _patched(model, base, batch, source, start)
                values[pair, [cell for cell, _ in batch]] = as_numbers(run.metric(logits))
                bar.update(len(batch))
    names = [run.name for run in runs]
    clean, corrupt = (xr.DataArray(end, dims="pair", coords={"pair": names}) for end in ends)
    provenance = {
        **model.provenance,
        "method": "activation_patching",
        "metric": chosen.name,
        "direction": direction,
        "first_token": first,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    shaped = values.reshape(len(runs), len(swept), -1)
    data = label(shaped, names, swept, at)
    return PatchingResult(data, clean, corrupt, tuple(swept), provenance)


def _sites(model: HookedVLM, sites: Names | Site | Sequence[Site]) -> list[Site]:
    if isinstance(sites, Site):
        sites = [sites]
    if isinstance(sites, Sequence) and not isinstance(sites, str):
        order = {name: place for place, name in enumerate(model.hook_names(heads=True))}
        found = [
            one
            for site in sites
            for one in ([site] if isinstance(site, Site) else model.sites(site))
        ]
        model.hook_dict.match([site.name for site in found])  # a KeyError for what is not there
        return sorted(dict.fromkeys(found), key=lambda site: (order[site.name], site.position or 0))
    return model.sites(sites)


@dataclass(frozen=True)
class _Run:
    """One pair: its name, what makes its inputs, its number of tokens, its metric."""

    name: str
    inputs: Callable[[], Inputs]
    length: int
    metric: Metric


def _runs(
    model: HookedVLM,
    pairs: Pair | Sequence[Pair] | tuple[Inputs, Inputs],
    metric: Metric,
    first_token: Literal["cls", "enc"],
) -> tuple[list[_Run], str]:
    """The pairs, checked but for their images, and their first token."""
    if isinstance(pairs, Mapping):
        raise ValueError("one input is no pair: give (clean, corrupt)")
    several: list[Any] = [pairs] if isinstance(pairs, Pair) else list(pairs)
    if not several:
        raise ValueError("no pairs were given")
    if any(isinstance(one, Mapping) for one in several):
        inputs = _joined(several)
        length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
        first = getattr(several[0], "first_token", "unknown")
        return [_Run("0", lambda: inputs, length, metric.bind(model, None))], first
    return [
        _Run(
            pair.name or str(index),
            partial(_prepared, model, pair, first_token),
            pair.n_tokens(model.to_str_tokens),
            metric.bind(model, pair),
        )
        for index, pair in enumerate(several)
    ], first_token


def _prepared(model: HookedVLM, pair: Pair, first_token: Literal["cls", "enc"]) -> Inputs:
    """A pair's inputs, clean first.

    Raises:
        ValueError: images that LLaVA-NeXT cuts into other numbers of tiles, or of tokens.
    """
    inputs = model.prepare_prompt(pair.images, pair.texts, first_token=first_token)
    tokens = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else []
    tiles = [len(geometry.tiles) for geometry in getattr(inputs, "geometry", ())]
    if len(set(tokens)) > 1 or len(set(tiles)) > 1:
        raise ValueError(
            f"pair {pair.name!r}: positions do not align, the clean and the corrupt input have "
            f"{tokens} tokens and {tiles} tiles; give both an image of one shape"
        )
    return inputs


def _joined(given: Sequence[Any]) -> Inputs:
    """Clean and corrupt inputs as the two rows of one; an image that they share stands once.

    Raises:
        ValueError: not two inputs of one row each, of the same kind and length.
    """
    if len(given) != 2 or not all(isinstance(one, Mapping) for one in given):
        raise ValueError("prepared inputs are given as (clean, corrupt), not mixed with pairs")
    clean, corrupt = given
    if clean.keys() != corrupt.keys():
        raise ValueError(f"clean inputs have {sorted(clean)}, corrupt ones {sorted(corrupt)}")
    images = [key for key in PER_IMAGE if key in clean and "input_ids" in clean]
    shared = all(
        clean[key].shape == corrupt[key].shape and torch.equal(clean[key], corrupt[key])
        for key in images
    )
    joined = {}
    for key, value in clean.items():
        other = corrupt[key]
        rows = (1, 1) if key in images else (len(value), len(other))  # a text may have several
        if rows[0] == rows[1] != 1:
            raise ValueError(
                f"{key} has {len(value)} rows in the clean and in the corrupt inputs; prepare one "
                "row each"
            )
        if value.shape != other.shape or rows != (1, 1):
            raise ValueError(
                f"positions do not align: {key} is {list(value.shape)} in the clean inputs and "
                f"{list(other.shape)} in the corrupt ones; prepare one row each, of one length"
            )
        joined[key] = value if shared and key in images else torch.cat([value, other])
    return joined


def _positions(
    model: HookedVLM,
    positions: Positions,
    modules: list[str],
    base: Base,
    runs: list[_Run],
) -> list[int] | None:
    """The positions to patch; those of `each` are counted at the sites.

    Raises:
        ValueError: a position that some site or pair does not have.
    """
    if positions is None:
        return None
    counts = {name: _n_positions(model, name, base) for name in modules}
    fewest = min(counts, key=lambda name: counts[name])
    if positions == "each" and not counts[fewest]:
        raise ValueError(f"{fewest!r} has no positions; pass positions=None for its sites")
    if positions == "each":
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"positions='each' needs sites with the same positions; these have "
                f"{', '.join(f'{name!r} {count}' for name, count in counts.items())}"
            )
        lengths = {run.length for run in runs}
        sees_text = any(model.stack_of(name) != next(iter(model.stacks)) for name in modules)
        if len(lengths) > 1 and sees_text:
            raise ValueError(
                f"positions='each' needs pairs of one length, these have {sorted(lengths)} tokens"
            )
        at = list(range(counts[fewest]))
    elif isinstance(positions, str):
        raise ValueError(f"positions is None, 'each', an index or a list, not {positions!r}")
    else:
        at = [positions] if isinstance(positions, int | np.integer) else list(positions)
        at = [as_index(position) for position in at]
    if not at:
        raise ValueError("an empty list of positions patches nothing; None patches all of them")
    for position in at:
        if not -counts[fewest] <= position < counts[fewest]:
            raise ValueError(
                f"{fewest!r} has no position {position}, it has {counts[fewest]} positions"
            )
    return at


def _n_positions(model: HookedVLM, name: str, base: Base) -> int:
    value, axis = base.cache[name], model.hook_dict[name].pos_dim
    if axis is None or value.dim() <= 2:  # a map of a ResNet; [batch, 2] of an itm head
        return 0
    return value.shape[axis]


def _module(name: str) -> str:
    of = head_of(name)
    return name if of is None else of[0]


def _batches(model: HookedVLM, cells: list[Cell], max_rows: int) -> Iterator[list[Cell]]:
    """Cells that resume at the same door together, no more than `max_rows` at a time."""

    def place(cell: Cell) -> tuple[int, int, int]:
        return model.order_of(cell[1].name)

    def order(cell: Cell) -> tuple[Any, ...]:
        position = cell[1].position or 0  # near ones together: a batch starts at the first
        return place(cell), position < 0, position

    for _, group in groupby(sorted(cells, key=order), key=place):
        together = list(group)
        for first in range(0, len(together), max_rows):
            yield together[first : first + max_rows]


def _patched(model: HookedVLM, base: Base, batch: list[Cell], source: int, start: int) -> Tensor:
    """Logits of the batch, row by row the base's row `start` with one site patched."""
    by_module: dict[str, list[tuple[int, Site]]] = {}
    for row, (_, site) in enumerate(batch):
        by_module.setdefault(_module(site.name), []).append((row, site))
    from_row = torch.tensor([source], device=base.logits.device)
    hooks = [
        (name, _writer(base.cache[name][base.rows(model.stack_of(name), from_row)], writes))
        for name, writes in by_module.items()
    ]
    sites = [replace(site, name=_module(site.name)) for _, site in batch]
    return model.resume(base, sites, rows=[start] * len(batch), fwd_hooks=hooks)


def _writer(value: Tensor, writes: list[tuple[int, Site]]) -> Callable[..., Tensor]:
    """A hook that writes the value of one patch's rows into a batch, where its sites say."""
    size = len(value)

    def write(activation: Tensor, hook: HookPoint) -> Tensor:
        told = hook.ctx.get("positions")  # of a pass that begins later
        begin = 0 if told is None else int(told[0])
        for row, site in writes:
            where: list[Any] = [slice(None)] * value.dim()
            there = list(where)
            if site.head is not None and hook.head_axis is not None:
                where[hook.head_axis] = there[hook.head_axis] = site.head
            if site.position is not None:
                axis = hook.pos_dim
                if axis is None or not -value.shape[axis] <= site.position < value.shape[axis]:
                    raise ValueError(f"{site.name!r} has no position {site.position}")
                where[axis] = site.position % value.shape[axis]
                there[axis] = where[axis] - begin
            rows = activation[row * size : (row + 1) * size]
            rows[tuple(there)] = value[tuple(where)]
        return activation

    return write
