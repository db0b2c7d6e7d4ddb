"""Ablations by what other inputs have at a site: their mean, or one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vlm.data import Pair
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.dataset import ActivationDataset, RunningMean
from hooked_vlm.patching.interventions import At, Intervention
from hooked_vlm.patching.metrics import Metric
from hooked_vlm.patching.places import Locator
from hooked_vlm.patching.runs import Inputs, Pairs, Run, single

Reference = Pairs | Inputs | Sequence[Inputs] | ActivationDataset | str | Path


def mean(reference: Reference, *, per_position: bool = False) -> Intervention:
    """The mean activation of other inputs.

    Args:
        reference: prepared inputs, or pairs, whose two runs both count; or a folder of
            `HookedVLM.cache_dataset`, which is read and not run. What is computed once counts
            once: an image that texts of a batch share, a text that several images read.
        per_position: the mean at each position, counted from the first that is no padding, in
            place of that over all positions. Padding is left out of both.

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
                real = at.locator.real(at.name)
                first, n = real[0], real[-1] + 1 - real[0]
                if found.shape[axis] < n:
                    raise ValueError(
                        f"the mean of {at.name!r} is of {found.shape[axis]} positions, the run has "
                        f"{n}: give inputs as long, or per_position=False"
                    )
                along = torch.arange(at.shape[axis], device=found.device) - first
                found = found.index_select(axis, along.clamp(0, n - 1))
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
        ValueError: when it is used: an input that is drawn is of another length; a folder.
    """

    def ready(model: HookedVLM, modules: list[str], n_runs: int) -> Intervention:
        runs = _runs(model, reference)
        drawn = np.random.default_rng(seed).integers(len(runs), size=n_runs).tolist()
        kept = {number: _first(model, runs[number], modules) for number in sorted(set(drawn))}

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


def _runs(model: HookedVLM, reference: Any) -> list[Run]:
    if isinstance(reference, ActivationDataset | str | Path):
        raise ValueError(
            "P.resample draws from inputs or pairs, not from a folder of cache_dataset, which does "
            "not tell whose each row is; P.mean reads one"
        )
    runs, _ = single(model, reference, Metric("none", lambda logits, _: logits), "cls")
    return runs


def _first(model: HookedVLM, run: Run, modules: list[str]) -> dict[str, Tensor]:
    """What modules have in the first row of a run, [rows, ...]."""
    base = model.base_run(**run.inputs(), names_filter=modules)
    row = torch.tensor([0], device=model.device)
    return {name: base.cache[name][base.rows(model.stack_of(name), row)] for name in modules}


def _means(
    model: HookedVLM, reference: Reference, modules: list[str], per_position: bool
) -> Mapping[str, Tensor]:
    """Means of modules, [1, ...], with an axis of positions that is 1 if it is over them."""
    found: dict[str, RunningMean] = {}
    for name, value, mask in _values(model, reference, modules):
        if name not in found:
            positions = model.hook_dict[name].pos_dim is not None and value.dim() > 2
            found[name] = RunningMean(name, not per_position, positions)
        found[name].add(value, mask)
    return {
        name: mean.value[None, None] if mean.positions and not per_position else mean.value[None]
        for name, mean in found.items()
    }


def _values(
    model: HookedVLM, reference: Reference, modules: list[str]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """What modules have in a reference, [rows, ...], and which positions are no padding.

    Raises:
        KeyError: a module that was not cached.
        ValueError: a folder of other weights, or one that is not finished.
    """
    if isinstance(reference, str | Path):
        reference = ActivationDataset(reference)
    if isinstance(reference, ActivationDataset):
        if reference.provenance["weights"] != model.weights_hash():
            raise ValueError(
                f"{str(reference.folder)!r} was cached with other weights than this model's; cache "
                "the data set with this model"
            )
        if not reference.complete:
            raise ValueError(
                f"{str(reference.folder)!r} is not finished; call cache_dataset with the same "
                "inputs again, and it goes on"
            )
        for activations, masks in reference.shards():
            for name in modules:
                if name not in activations:
                    raise KeyError(f"{str(reference.folder)!r} holds no {name!r}: cache it, too")
                yield name, activations[name].to(model.device), masks.get(name)
        return
    for inputs in _batches(model, reference):
        base = model.base_run(**inputs, names_filter=modules)
        locator = Locator(model, base, inputs)
        for name in modules:
            mask = model.mask_of(inputs, locator.stack(name))
            if mask is not None and locator.count(name) == mask.shape[1]:
                yield name, base.cache[name], mask.bool()
            else:
                yield name, base.cache[name], None


def _batches(model: HookedVLM, reference: Any) -> Iterator[Inputs]:
    """Prepared inputs as they are; of pairs the two rows of each."""
    given: list[Any] = [reference] if isinstance(reference, Mapping | Pair) else list(reference)
    if given and all(isinstance(one, Mapping) for one in given):
        yield from given
    else:
        for run in _runs(model, given):
            yield run.inputs()
