"""Circuits: the few parts that carry a behaviour, found greedily and held against the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.cells import Sites, Swept, Together, as_sites, parts
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.patching.runs import FirstToken, Pairs
from hooked_vlm.patching.sweep import Direction, MetricLike, activation_patching

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUNDING = 1e-4  # shares of the largest effect below this are none


@runtime_checkable
class Ranking(Protocol):
    """Something that knows the effects of sites, such as a `PatchingResult`."""

    @property
    def sites(self) -> tuple[Swept, ...]:
        """The sites."""

    @property
    def effect(self) -> xr.DataArray:
        """Their effects, by `pair` and site, or layer and head."""


@dataclass(frozen=True)
class Circuit:
    """Sites that carry a behaviour.

    Attributes:
        sites: the members, strongest first; `sites=` takes them again.
        faithfulness: the share of the difference between the two runs that is left when all other
            sites are corrupt.
        completeness: the share that is gone when the members are corrupt and all other sites clean.
        curve: the faithfulness of the strongest sites, by `size`, their number: 0 are none of them.
        undefined: how many pairs were left out, since their two runs do not differ.
        provenance: what the numbers were made with; `prefix` is how many of the strongest sites
            there were before members that can be spared were dropped.
    """

    sites: tuple[Swept, ...]
    faithfulness: float
    completeness: float
    curve: xr.DataArray
    undefined: int
    provenance: dict[str, Any]

    @property
    def reached(self) -> bool:
        """Whether it is as faithful as was asked for."""
        return bool(self.faithfulness >= self.provenance["threshold"])

    def plot(self) -> Figure:
        """The curve, with the circuit beside it."""
        from hooked_vlm.plots import growth

        told = f"{len(self.sites)} of {self.curve.sizes['size'] - 1} sites"
        return growth(
            self.curve,
            wanted=self.provenance["threshold"],
            chosen=(len(self.sites), self.faithfulness),
            title=f"{self.provenance['metric']}: a circuit of {told}",
        )


def find_circuit(
    model: HookedVLM,
    pairs: Pairs,
    sites: Sites,
    metric: MetricLike = None,
    *,
    direction: Direction = "noise",
    threshold: float = 0.8,
    ranking: Ranking | None = None,
    first_token: FirstToken = "cls",
    max_rows: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> Circuit:
    """Finds few of some sites that carry most of the difference between two runs.

    The faithfulness of a set is `(m - corrupt) / (clean - corrupt)`, averaged over pairs: m is the
    metric when the sites of the set have their clean, and all others of `sites` their corrupt
    activations. Completeness is 1 minus the faithfulness of all sites outside of the set: of a
    complete circuit nothing is left without it.

    Sites are ranked by the mean of their absolute effects. The smallest number of the strongest
    that is faithful enough is taken; then members are dropped one by one, the weakest first, where
    what stays is faithful enough. Every number is measured, none is estimated.

    Source: faithfulness, and completeness of a circuit as a whole, Wang et al. (arXiv 2211.00593,
    sec. 4); as shares, of a set and of all outside of it, Marks et al. (arXiv 2403.19647). Both
    write means where here the other run's activations are written.

    Args:
        model: any model of the zoo.
        pairs: as in `activation_patching`.
        sites: what may be a member: heads (`….heads.*.hook_z`), MLPs (`….hook_mlp_out`), or sites
            `together`.
        metric: as in `activation_patching`.
        direction: `noise` corrupts what is outside in the clean run; `denoise` restores what is
            inside in the corrupt run, where also all that is none of `sites` is corrupt.
        threshold: the faithfulness to reach.
        ranking: a result over these sites that ranks them, such as one of attribution; by default
            they are patched one by one, in this direction.
        first_token: as in `HookedVLM.prepare`; of inputs that are prepared already, theirs.
        max_rows: as in `activation_patching`.
        memory: as in `activation_patching`.
        progress: whether to show bars.

    Returns:
        The circuit; where no number of sites is faithful enough, the most faithful one, and
        `circuit.reached` is False.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: a ranking that lacks a site, pairs whose runs do not differ; and as in
            `activation_patching`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a share above 0 and up to 1, not {threshold}")
    nodes = as_sites(model, sites)
    last: list[PatchingResult] = []

    def patched(swept: Sequence[Swept]) -> PatchingResult:
        result = activation_patching(
            model,
            pairs,
            swept,
            metric,
            direction=direction,
            first_token=first_token,
            max_rows=max_rows,
            memory=memory,
            progress=progress,
        )
        if not result.provenance["complete"]:
            raise KeyboardInterrupt
        if result.undefined == result.data.sizes["pair"]:
            raise ValueError("the two runs of no pair differ in the metric: there is no behaviour")
        last[:] = [result]
        return result

    def faithful(sets: Sequence[Sequence[Swept]]) -> np.ndarray:
        """The faithfulness of each set."""
        noise = direction == "noise"
        found = np.full(len(sets), float(noise))  # where nothing is to be written
        cells, at = [], []
        for number, inside in enumerate(sets):
            members = set(inside)
            written = [s for one in nodes if (one in members) != noise for s in parts(one)]
            if written:
                cells.append(Together(tuple(written), str(number)))
                at.append(number)
        if cells:
            share = patched(cells).restored.mean("pair").values.reshape(-1)
            found[at] = 1 - share if noise else share
        return found

    strengths = _strengths(patched(nodes) if ranking is None else ranking, nodes)
    ranked = [nodes[at] for at in np.argsort(-strengths, kind="stable")]
    values = faithful([ranked[:size] for size in range(len(ranked) + 1)])
    enough = np.flatnonzero(values >= threshold)
    prefix = int(enough[0] if len(enough) else values.argmax())
    members, share = ranked[:prefix], float(values[prefix])
    if share >= threshold:
        members, share = _spared(members, share, threshold, faithful)
    outside = [one for one in ranked if one not in set(members)]
    completeness = 1 - float(faithful([outside])[0])
    dropped = ("places", "excluded", "complete")
    told = {key: value for key, value in last[0].provenance.items() if key not in dropped}
    told |= {
        "method": "find_circuit",
        "threshold": threshold,
        "ranking": "sweep" if ranking is None else _method(ranking),
        "prefix": prefix,
    }
    curve = xr.DataArray(
        values, dims="size", coords={"size": range(len(values))}, name="faithfulness"
    )
    return Circuit(tuple(members), share, completeness, curve, last[0].undefined, told)


def _strengths(ranking: Ranking, nodes: Sequence[Swept]) -> np.ndarray:
    """The mean absolute effect of each node; what has none, or rounding alone, is weakest.

    Raises:
        ValueError: effects by position, or none of a node.
    """
    effect = ranking.effect
    if "position" in effect.dims:
        raise ValueError("the ranking has several effects of a site, by position; give one of each")
    values = abs(effect).mean("pair").values.reshape(-1)
    by_site = dict(zip(ranking.sites, values, strict=True))
    missing = [one.name for one in nodes if one not in by_site]
    if missing:
        raise ValueError(
            f"the ranking lacks {len(missing)} of {len(nodes)} sites, {missing[0]!r} first; rank "
            "the same sites"
        )
    found = np.array([by_site[one] for one in nodes], dtype=float)
    found[found < ROUNDING * np.nanmax(found, initial=0.0)] = 0.0  # in the order of the sites
    return np.where(np.isnan(found), -np.inf, found)


def _method(ranking: Ranking) -> str:
    """What a ranking says of itself."""
    told: dict[str, Any] = getattr(ranking, "provenance", {})
    return str(told.get("method", type(ranking).__name__))


def _spared(
    members: list[Swept],
    share: float,
    threshold: float,
    faithful: Callable[[Sequence[Sequence[Swept]]], np.ndarray],
) -> tuple[list[Swept], float]:
    """Drops members one by one, the weakest first, where the others are faithful enough.

    All that are left to try are tried in one sweep, of which the first that can go goes: what was
    tried before it must stay, and what comes behind it is tried again without it.
    """
    untried = len(members)
    while untried:
        without = [[*members[:at], *members[at + 1 :]] for at in reversed(range(untried))]
        values = faithful(without)
        found = np.flatnonzero(values >= threshold)
        if not len(found):
            break
        first = int(found[0])
        members, share = without[first], float(values[first])
        untried -= first + 1
    return members, share
