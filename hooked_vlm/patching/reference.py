"""Ablations by what other inputs have at a site: their mean, or one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.interventions import At, Intervention
from hooked_vlm.patching.metrics import Metric
from hooked_vlm.patching.places import Locator
from hooked_vlm.patching.runs import Inputs, Pairs, Run, single

Reference = Pairs | Inputs | Sequence[Inputs]


def mean(reference: Reference, *, per_position: bool = False) -> Intervention:
    """The mean activation of other inputs.

    Args:
        reference: prepared inputs, every row of which counts, or pairs, whose two runs both do.
        per_position: the mean at each position, counted from the left, in place of that over all
            positions. Padding is left out of both.

    Raises:
        ValueError: when it is used: patterns, whose keys differ from input to input; a run with
            more positions than any of these inputs.
    """

    def ready(model: HookedVLM, modules: list[str], n_runs: int) -> Intervention:
        patterns = [name for name in modules if model.hook_dict[name].head_axis == 1]
        if patterns:
            raise ValueError(
                f"{patterns[0]!r} has no mean: inputs differ in their keys; ablate hook_z"
            )
        means = _means(model, reference, modules, per_position)

        def of(value: Tensor, at: At) -> Tensor:
            found, axis = means[at.name], at.point.pos_dim
            if per_position and axis is not None and len(at.shape) > 2:
                if found.shape[axis] < at.shape[axis]:
                    raise ValueError(
                        f"the mean of {at.name!r} is of {found.shape[axis]} positions, the run has "
                        f"{at.shape[axis]}: give inputs as long, or per_position=False"
                    )
                found = found.narrow(axis, 0, at.shape[axis])
            return at.pick(found.expand(at.shape)).to(value)

        return Intervention(name, of)

    name = "mean(per_position=True)" if per_position else "mean"
    return Intervention(name, _unready, ready=ready)


def resample(reference: Reference, seed: int = 0) -> Intervention:
    """The activation of another input, drawn for each pair, and the same one in all of its cells.

    Args:
        reference: prepared inputs, of which rows are drawn, or pairs, of whose clean runs.
        seed: of the draws, with replacement.

    Raises:
        ValueError: when it is used: an input that is drawn is of another length.
    """

    def ready(model: HookedVLM, modules: list[str], n_runs: int) -> Intervention:
        runs = _runs(model, reference)
        drawn = np.random.default_rng(seed).integers(len(runs), size=n_runs).tolist()
        kept = {
            number: {name: value for name, value, _ in _rows(model, runs[number], modules, 1)}
            for number in sorted(set(drawn))
        }

        def of(value: Tensor, at: At) -> Tensor:
            found = kept[drawn[at.pair]][at.name]
            if found.shape != at.shape:
                raise ValueError(
                    f"input {runs[drawn[at.pair]].name!r} has {list(found.shape)} at {at.name!r}, "
                    f"the run {list(at.shape)}: resample among inputs of one length"
                )
            return at.pick(found).to(value)

        return Intervention(f"resample(seed={seed})", of)

    return Intervention(f"resample(seed={seed})", _unready, ready=ready)


def _unready(value: Tensor, at: At) -> Tensor:
    raise ValueError("this intervention must know the model first: use it in P.ablate")


def _runs(model: HookedVLM, reference: Reference) -> list[Run]:
    runs, _ = single(model, reference, Metric("none", lambda logits, _: logits), "cls")
    return runs


def _rows(
    model: HookedVLM, run: Run, modules: list[str], n_rows: int
) -> Iterator[tuple[str, Tensor, list[int]]]:
    """What modules have in the first rows of a run, [rows, ...], and which positions are real."""
    inputs = run.inputs()
    base = model.base_run(**inputs, names_filter=modules)
    for row in range(n_rows):
        locator = Locator(model, base, inputs, row)
        for name in modules:
            at = base.rows(model.stack_of(name), torch.tensor([row], device=model.device))
            value = base.cache[name][at]
            n = locator.count(name)
            yield name, value, list(locator.real(name)) if n else []


def _means(
    model: HookedVLM, reference: Reference, modules: list[str], per_position: bool
) -> Mapping[str, Tensor]:
    """Means of modules, [1, ...], with an axis of positions that is 1 if it is over them."""
    sums: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for run in _runs(model, reference):
        for name, value, real in _rows(model, run, modules, run.n_rows):
            wide = value.double()
            axis = model.hook_dict[name].pos_dim
            if axis is None or wide.dim() <= 2:
                total, count = wide.sum(0, keepdim=True), torch.tensor(float(len(wide)))
            else:
                mask = torch.zeros(wide.shape[axis], dtype=torch.float64, device=wide.device)
                mask[real] = 1
                along = [-1 if at == axis else 1 for at in range(wide.dim())]
                total = (wide * mask.view(along)).sum(0, keepdim=True)
                count = mask.view(along) * len(wide)
                if not per_position:
                    total, count = total.sum(axis, keepdim=True), count.sum(axis, keepdim=True)
            sums[name] = _added(sums.get(name), total, axis)
            counts[name] = _added(counts.get(name), count, axis)
    return {name: sums[name] / counts[name].clamp(min=1) for name in modules}


def _added(before: Tensor | None, more: Tensor, axis: int | None) -> Tensor:
    """A sum, as long as the longer of the two."""
    if before is None or axis is None or before.dim() <= axis:
        return more if before is None else before + more
    short, long = sorted((before, more), key=lambda one: one.shape[axis])
    total = long.clone()
    total.narrow(axis, 0, short.shape[axis]).add_(short)
    return total
