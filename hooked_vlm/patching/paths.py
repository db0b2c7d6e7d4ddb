"""Path patching: what a change does along one path, everything beside it held as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.components.attention import Attention
from hooked_vlm.components.blocks import Sum
from hooked_vlm.components.hook_point import HookPoint, reads_only
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import Sites, as_sites, described, module_of, parts
from hooked_vlm.patching.engine import Begun, Cell, Sweep, Write
from hooked_vlm.patching.interventions import first_seen, index_of
from hooked_vlm.patching.places import as_place
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.patching.runs import FirstToken, Pairs
from hooked_vlm.patching.sweep import Direction, MetricLike, Positions, patching, run

LOGITS = "hook_logits"


def path_patching(
    model: HookedVLM,
    pairs: Pairs,
    senders: Sites,
    receivers: Sites = LOGITS,
    metric: MetricLike = None,
    positions: Positions = None,
    direction: Direction = "denoise",
    *,
    via: Sequence[Sites] = (),
    first_token: FirstToken = "cls",
    max_rows: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Patches each sender and lets only the paths from it straight to the receivers see it.

    First the sender is patched while the output of every other part (attention, cross-attention,
    MLP) of every stack is held at what it is in the unpatched run, and what the receivers get is
    recorded; then this is written there, and everything behind the receivers follows. Norms are
    computed anew on the way. With `via`, each stop is reached from the one before, and the
    receivers from the last. Stacks that read one another are one path: a patch of the image
    reaches a head of cross-attention through its keys and values.

    Source: Wang et al. (arXiv 2211.00593) sec. 3.1 and appendix B; Goldowsky-Dill et al. (arXiv
    2304.05969).

    Args:
        model: any model of the zoo whose stacks are of transformer blocks.
        pairs: as in `activation_patching`.
        senders: what is patched, one after the other.
        receivers: what gets it, together: queries, keys, values, inputs of MLPs, or whole heads;
            `hook_logits` for the path straight to the output.
        metric: as in `activation_patching`.
        positions: where senders are patched, as in `activation_patching`.
        direction: as in `activation_patching`.
        via: the stops in between, each a name, a glob, or sites, which get it together.
        first_token: as in `activation_patching`.
        max_rows: as in `activation_patching`.
        memory: as in `activation_patching`.
        progress: as in `activation_patching`.

    Returns:
        As `activation_patching`, over the senders.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: as in `activation_patching`; receivers that no sender comes before.
    """
    plain, told = patching(
        model, pairs, senders, metric, positions, direction, first_token, max_rows, memory
    )

    def place(site: Site) -> tuple[int, int, int]:
        return model.order_of(site.name)

    hops = [_hop(model, one) for one in (*via, receivers)]
    before = [site for one in plain.sites for site in parts(one)]
    for hop in hops:
        if max(map(place, hop)) < min(map(place, before)):
            raise ValueError(
                f"nothing reaches {described(hop[0])!r}: it comes before {described(before[0])!r}"
            )
        before = hop
    sweep = PathSweep(**vars(plain), hops=hops)
    names = [[described(site) for site in hop] for hop in hops]
    told |= {"method": "path_patching", "receivers": names[-1], "via": names[:-1]}
    return run(sweep, told, progress)


def _hop(model: HookedVLM, sites: Sites) -> list[Site]:
    found = [site for one in as_sites(model, sites) for site in parts(one)]
    if len(found) > 1 and any(site.name == LOGITS for site in found):
        raise ValueError(f"{LOGITS!r} is the end of a path: it goes with no other receiver")
    return found


class _Reached(Exception):
    """Raised when all points of a hop were caught."""


Part = tuple[str, int, Sum]  # stack, layer, and the part in its block
Hook = tuple[str, Callable[..., Any]]


@dataclass
class PathSweep(Sweep):
    """A sweep whose patches travel along hops.

    Attributes:
        hops: the points that are reached one after the other.
    """

    hops: list[list[Site]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._outs: dict[str, Part] = {}  # where each part is added to the stream
        for stack, of in self.model.stacks.items():
            for layer, block in enumerate(of.block_list):
                if not hasattr(block, "SUMS"):
                    raise ValueError(
                        f"{stack!r} is not made of parts that are added to a stream: it has no "
                        "paths"
                    )
                for one in block.SUMS:
                    if hasattr(block, one.part):
                        self._outs[f"{stack}.blocks.{layer}.{one.out}"] = stack, layer, one

    def record(self) -> list[str]:
        """Also what may have to be held: outputs of parts, and what parts on the way read."""
        stops = [site for hop in self.hops[:-1] for site in hop]
        several = [site for one in self.sites for site in parts(one) if len(parts(one)) > 1]
        reads = [name for site in (*stops, *several) for name in self._reads(self._carrier(site))]
        return list(dict.fromkeys([*super().record(), *self._outs, *reads]))

    def logits(self, begun: Begun, batch: Sequence[Cell]) -> Tensor:
        """Logits of the batch's runs, row by row, each along its path."""
        rows = [self.start] * len(batch)
        hooks, sites = self.written(begun, batch)
        writes: list[Sequence[Write]] = [cell.writes for cell in batch]
        for hop in self.hops:
            start = min(self.model.order_of(site.name) for site in sites)
            reached = [site for site in hop if self.model.order_of(site.name) >= start]
            if not reached:
                return begun.base.logits[rows]
            held = self._held(begun, writes, start, reached)
            first = [site.position for site in sites]
            at = None if None in first else min(one for one in first if isinstance(one, int))
            sites |= {Site.parse(name, at) for name, _ in held}
            if reached[0].name == LOGITS:
                return self.model.resume(
                    begun.base, list(sites), rows=rows, fwd_hooks=[*held, *hooks]
                )
            names = list(dict.fromkeys(module_of(site.name) for site in reached))
            caught = self._caught(begun, list(sites), rows, [*held, *hooks], names)
            arrived = [self._arrived(begun, site, caught) for site in reached]
            arrived = [write for write in arrived if write[1] is None or len(write[1])]
            hooks = [
                (
                    name,
                    _handing([w for w in arrived if module_of(w[0].name) == name], *caught[name]),
                )
                for name in names
            ]
            sites = {_earliest(write) for write in arrived}
            writes = [arrived] * len(batch)
        return self.model.resume(begun.base, list(sites), rows=rows, fwd_hooks=hooks)

    def _held(
        self,
        begun: Begun,
        writes: Sequence[Sequence[Write]],
        start: tuple[int, int, int],
        reached: list[Site],
    ) -> list[Hook]:
        """Hooks that hold everything but the parts that are written in, row by row."""
        end = max(self.model.order_of(site.name) for site in reached)
        carriers = [{self._carrier(site) for site, _ in row} for row in writes]
        held = [
            (name, self._holder(begun, name, [part not in row for row in carriers]))
            for name, part in self._outs.items()
            if start <= self.model.order_of(name) <= end
        ]
        for part in {part for row in carriers for part in row if part is not None}:
            rows = [
                part in carriers[number]
                and any(
                    self.model.order_of(site.name) < self.model.order_of(self._reads(part)[0])
                    for site, _ in row
                )
                for number, row in enumerate(writes)
            ]
            if any(rows):
                others = {site.stack for row in writes for site, _ in row} - {part[0]}
                crossed = part[2].part == "cross_attn" and bool(others)  # its keys change, too
                if crossed or any(self._carrier(site) == part for site in reached):
                    name = f"{part[0]}.blocks.{part[1]}.{part[2].part}"
                    raise ValueError(
                        f"{name} both sends and receives with parts before it; patch these one by "
                        "one"
                    )
                held += [(name, self._holder(begun, name, rows)) for name in self._reads(part)]
        return held

    def _carrier(self, site: Site) -> Part | None:
        """The part through which a site reaches the stream; None if it is in the stream."""
        if site.layer is None:
            return None
        inside = site.component.split(".")[0]
        for one in self.model.stacks[site.stack].block_list[site.layer].SUMS:
            if inside in (one.part, one.before, f"hook_{one.part}_in", one.out):
                return site.stack, site.layer, one
        return None

    def _reads(self, part: Part | None) -> list[str]:
        """The points at which a part alone reads its stack's stream."""
        if part is None:
            return []
        stack, layer, one = part
        if isinstance(getattr(self.model.stacks[stack].block_list[layer], one.part), Attention):
            names = [f"{stack}.blocks.{layer}.{one.part}.hook_{leaf}_in" for leaf in ("q", "kv")]
            return [name for name in names if not self.model.hook_dict[name].of_source]
        return [f"{stack}.blocks.{layer}.{one.reads}"]

    def _holder(self, begun: Begun, name: str, rows: list[bool]) -> Callable[..., Tensor]:
        """A hook that writes the unpatched run's activation into some rows of the batch."""
        own = begun.base.cache[name][self.rows_of(begun, name)[self.start]]
        chosen = torch.tensor(rows, device=own.device)

        def hold(activation: Tensor, hook: HookPoint) -> Tensor:
            value = own[:, first_seen(hook) :]
            activation.unflatten(0, (len(rows), -1))[chosen] = value
            return activation

        return hold

    def _caught(
        self, begun: Begun, sites: list[Site], rows: list[int], hooks: list[Hook], names: list[str]
    ) -> dict[str, tuple[Tensor, int]]:
        """What points are in a pass, which ends there, and the first position they hold."""
        caught: dict[str, tuple[Tensor, int]] = {}

        @reads_only
        def catch(activation: Tensor, hook: HookPoint) -> None:
            caught[str(hook.name)] = activation, first_seen(hook)
            if len(caught) == len(names):
                raise _Reached

        with suppress(_Reached):
            self.model.resume(
                begun.base, sites, rows=rows, fwd_hooks=[*hooks, *((n, catch) for n in names)]
            )
        return caught

    def _arrived(self, begun: Begun, site: Site, caught: dict[str, tuple[Tensor, int]]) -> Write:
        """A point of a hop, and its positions that a pass computed."""
        name = module_of(site.name)
        value, begin = caught[name]
        place = as_place(site.position)
        if place is None and not begin:
            return site, None
        axis = self.model.hook_dict[name].pos_dim or 1
        locator = begun.locator
        found = locator.find(place, locator.stack(name), begin + value.shape[axis], name)
        return site, tuple(at for at in found if at >= begin)


def _handing(writes: list[Write], value: Tensor, begin: int) -> Callable[..., Tensor]:
    """A hook that writes what was caught."""

    def write(activation: Tensor, hook: HookPoint) -> Tensor:
        for site, positions in writes:
            there, here = (
                index_of(site, hook, positions, activation.dim(), first)
                for first in (first_seen(hook), begin)
            )
            activation[there] = value[here]
        return activation

    return write


def _earliest(write: Write) -> Site:
    site, positions = write
    return Site.parse(module_of(site.name), None if positions is None else min(positions))
