"""Sweeps: activation patching and ablation, exact, at the price of what a site can reach."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr
from torch import Tensor

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.cells import Sites, as_sites, module_of, parts
from hooked_vlm.patching.engine import Sweep
from hooked_vlm.patching.interventions import Given, as_intervention, patch, zero
from hooked_vlm.patching.metrics import Metric, as_metric
from hooked_vlm.patching.places import Each, Place, as_place, shown
from hooked_vlm.patching.plan import Plan, Sketched
from hooked_vlm.patching.result import PatchingResult, label, provenance
from hooked_vlm.patching.runs import FirstToken, Inputs, Pairs, paired, single

Direction = Literal["denoise", "noise"]
Positions = Literal["each"] | Each | Place | Sequence[Place] | None
MetricLike = Metric | Callable[[Tensor], Tensor] | None


def activation_patching(
    model: HookedVLM,
    pairs: Pairs,
    sites: Sites,
    metric: MetricLike = None,
    positions: Positions = None,
    direction: Direction = "denoise",
    *,
    first_token: FirstToken = "cls",
    max_rows: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Patches every site from one run into the other and measures what that changes.

    Each pair is run once; each patch is a row of a batch that resumes at its site, so that images
    are encoded, and their keys and values made, once per pair (`HookedVLM.resume`). Equal to one
    full pass per patch (DESIGN 'resuming'; method: Meng et al., arXiv 2202.05262, sec. 2).

    Args:
        model: any model of the zoo.
        pairs: what to patch between, or a clean and a corrupt input from `prepare`, row by row;
            both texts of a pair must have the same number of tokens.
        sites: hook names, globs or sites, each spanning all positions; or sites `together`.
        metric: a metric, or a function from logits to a number per row; by default `itm_margin`
            or `logit_diff`.
        positions: None patches all positions of a site together; `each`, or `Each(width)` for
            windows, one after the other; else a place, or a list of places one after the other:
            a number, a tuple of numbers together, a role, or a `Region` of the image.
        direction: `denoise` patches clean activations into the corrupt run, `noise` the reverse.
        first_token: as in `HookedVLM.prepare`; of inputs that are prepared already, theirs.
        max_rows: rows of the largest batch; by default as many as `memory` has room for, 64 at
            most.
        memory: bytes that batches may take; by default half of what is free.
        progress: whether to show a bar.

    Returns:
        The metric by pair, site (or layer and head) and position. Ctrl-C returns what is done:
        `result.provenance["complete"]` is False then, and what is missing NaN.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: texts of a pair that do not align, a position that is not there, or a metric
            that misses its answer or foil.
        MemoryError: there is no room to run a single patch.
    """
    sweep, told = patching(
        model, pairs, sites, metric, positions, direction, first_token, max_rows, memory
    )
    return run(sweep, told, progress)


def ablate(
    model: HookedVLM,
    inputs: Pairs | Inputs | Sequence[Inputs],
    sites: Sites | None = None,
    intervention: Given | None = None,
    metric: MetricLike = None,
    positions: Positions = None,
    *,
    on: Literal["clean", "corrupt"] = "clean",
    first_token: FirstToken = "cls",
    max_rows: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Writes something else in the place of every site and measures what that changes.

    Args:
        model: any model of the zoo.
        inputs: inputs from `prepare`, one result per row; or pairs, whose other run interventions
            can read, and by whose metric effects are normalised.
        sites: as in `activation_patching`; None for those that the intervention names itself.
        intervention: `P.zero()` by default, `P.mean(...)`, `P.resample(...)`, `P.noise(...)`,
            `P.steer(...)`, `P.knockout(...)`, or any function of `(value, at)`.
        metric: as in `activation_patching`.
        positions: as in `activation_patching`.
        on: which run of a pair is written to.
        first_token: as in `activation_patching`.
        max_rows: as in `activation_patching`.
        memory: as in `activation_patching`.
        progress: whether to show a bar.

    Returns:
        As `activation_patching`.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: as in `activation_patching`; an intervention that gives another shape.
        MemoryError: there is no room to run a single cell.
    """
    sweep, told = ablating(
        model, inputs, sites, intervention, metric, positions, on, first_token, max_rows, memory
    )
    return run(sweep, told, progress)


def plan(
    model: HookedVLM,
    pairs: Pairs | Inputs | Sequence[Inputs],
    sites: Sites | None = None,
    metric: MetricLike = None,
    positions: Positions = None,
    *,
    intervention: Given | None = None,
    first_token: FirstToken = "cls",
    max_rows: int | None = None,
    memory: int | None = None,
) -> Plan:
    """What a sweep will cost: nothing is computed but shapes.

    Args:
        model: as in `activation_patching`.
        pairs: as in `activation_patching`; with an `intervention`, as in `ablate`.
        sites: as there.
        metric: as there.
        positions: as there.
        intervention: as in `ablate`; None plans `activation_patching`.
        first_token: as there.
        max_rows: as there.
        memory: as there.

    Raises:
        MemoryError: there is no room to run a single patch.
        ValueError: as there.
    """
    if intervention is None:
        if sites is None:
            raise ValueError("patching names no sites of its own: give sites")
        given: Any = pairs
        swept, _ = patching(
            model, given, sites, metric, positions, "denoise", first_token, max_rows, memory
        )
    else:
        swept, _ = ablating(
            model,
            pairs,
            sites,
            intervention,
            metric,
            positions,
            "clean",
            first_token,
            max_rows,
            memory,
        )
    return Sketched(swept).plan()


def patching(
    model: HookedVLM,
    pairs: Pairs,
    sites: Sites,
    metric: MetricLike,
    positions: Positions,
    direction: Direction,
    first_token: FirstToken,
    max_rows: int | None = None,
    memory: int | None = None,
) -> tuple[Sweep, dict[str, Any]]:
    """The sweep of `activation_patching`, and what its result tells of it."""
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}")
    chosen = as_metric(metric, model)
    swept, places = where(model, sites, positions)
    runs, first = paired(model, pairs, chosen, first_token)
    start = 1 if direction == "denoise" else 0
    sweep = Sweep(model, runs, swept, places, patch(), start, _at_most(max_rows), memory)
    return sweep, {
        "method": "activation_patching",
        "direction": direction,
        "first_token": first,
        "metric": chosen.name,
    }


def ablating(
    model: HookedVLM,
    inputs: Pairs | Inputs | Sequence[Inputs],
    sites: Sites | None,
    intervention: Given | None,
    metric: MetricLike,
    positions: Positions,
    on: Literal["clean", "corrupt"],
    first_token: FirstToken,
    max_rows: int | None,
    memory: int | None,
) -> tuple[Sweep, dict[str, Any]]:
    """The sweep of `ablate`, and what its result tells of it."""
    if on not in ("clean", "corrupt"):
        raise ValueError(f"on is 'clean' or 'corrupt', not {on!r}")
    chosen = as_metric(metric, model)
    written = as_intervention(zero() if intervention is None else intervention)
    if sites is None:
        if written.sites is None:
            raise ValueError(f"{written.name!r} names no sites of its own: give sites")
        sites = written.sites(model)
    if written.at is not None:
        if positions is not None:
            raise ValueError(f"{written.name!r} says where it writes: leave out positions=")
        positions = [written.at]
    swept, places = where(model, sites, positions)
    runs, first = single(model, inputs, chosen, first_token)
    if on == "corrupt" and runs[0].n_rows == 1:
        raise ValueError("on='corrupt' needs pairs; these inputs have no corrupt run")
    if written.ready is not None:
        modules = list({module_of(s.name): None for one in swept for s in parts(one)})
        written = written.ready(model, modules, len(runs))
    start = 0 if on == "clean" else 1
    sweep = Sweep(model, runs, swept, places, written, start, _at_most(max_rows), memory)
    return sweep, {
        "method": "ablate",
        "direction": "ablate",
        "first_token": first,
        "metric": chosen.name,
        "intervention": written.name,
        "on": on,
    }


def run(sweep: Sweep, told: dict[str, Any], progress: bool) -> PatchingResult:
    """Runs a sweep of one metric and labels what it gave."""
    (result,) = results(sweep, told, progress)
    return result


def results(sweep: Sweep, told: dict[str, Any], progress: bool) -> list[PatchingResult]:
    """Runs a sweep and labels what it gave, of each of its metrics (`metrics.several`)."""
    desc = "patching" if told["direction"] != "ablate" else "ablating"
    values, ends = sweep.values(desc if progress else None)
    names = [one.name for one in sweep.runs]
    told = told | {"complete": not sweep.interrupted, "excluded": dict(sweep.excluded)}
    at = None
    if sweep.places is not None:
        each = sweep.places
        if isinstance(each, Each):
            end = (values.shape[2] - 1) * each.stride + each.width
            places: list[Any] = [w if each.width > 1 else w[0] for w in each.windows(end)]
        else:
            places = each
        at = [shown(place) for place in places]
        told["places"] = places
    found = []
    for number, metric in enumerate(sweep.metrics):
        clean, *others = (
            xr.DataArray(end[:, number], dims="pair", coords={"pair": names}) for end in ends
        )
        data = label(values[..., number], names, sweep.sites, at)
        about = provenance(sweep.model, told | {"metric": metric})
        corrupt = others[0] if others else None
        found.append(PatchingResult(data, clean, corrupt, tuple(sweep.sites), about))
    return found


def _at_most(max_rows: int | None) -> int | None:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is at least 1, not {max_rows}")
    return max_rows


def where(model: HookedVLM, sites: Sites, positions: Positions) -> tuple[list[Any], Any]:
    """What is swept over, and the places of each; None where they have their own."""
    swept = as_sites(model, sites)
    if positions is None:
        return swept, None
    if any(site.position is not None for one in swept for site in parts(one)):
        raise ValueError("sites with positions of their own leave no choice to positions=")
    if positions == "each":
        return swept, Each()
    if isinstance(positions, Each):
        return swept, positions
    if isinstance(positions, Sequence | np.ndarray) and not isinstance(positions, str):
        places = [as_place(one) for one in positions]
        if not places:
            raise ValueError("an empty list of positions patches nothing; None patches all of them")
        return swept, places
    return swept, [as_place(positions)]
