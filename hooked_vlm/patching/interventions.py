"""Interventions: what is written in the place of an activation.

An intervention is a function of what stands at a site and of where that is:

    def halve(value, at):
        return value / 2

`value` is the part of the activation that the site names, [rows, ...]; what is returned has its
shape. `at` knows the site, the positions, the pair, and both runs (`At`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.models.names import Site
from hooked_vlm.patching.places import Place, as_place, shown

if TYPE_CHECKING:
    from hooked_vlm.models.base import HookedVLM
    from hooked_vlm.patching.places import Locator


@dataclass(frozen=True)
class At:
    """Where an intervention writes.

    Attributes:
        site: the site.
        point: the module's hook point.
        positions: the positions that are written, None for all of them.
        shape: of the module's activation in this run, [rows, ...], all positions and heads.
        pair: the number of the pair.
        locator: finds places in the run's input.
        runs: gives the module's activation, [rows, ...], in the run that is written to (False) and
            in the other one of the pair (True).
    """

    site: Site
    point: HookPoint
    positions: tuple[int, ...] | None
    shape: tuple[int, ...]
    pair: int
    locator: Locator
    runs: Callable[[bool], Tensor]

    @property
    def name(self) -> str:
        """The module's hook name."""
        return str(self.point.name)

    @property
    def own(self) -> Tensor:
        """The site's activation in the run that is written to, before anything is."""
        return self.pick(self.runs(False))

    @property
    def other(self) -> Tensor:
        """The site's activation in the other run of the pair."""
        return self.pick(self.runs(True))

    def pick(self, whole: Tensor) -> Tensor:
        """The site's part of a tensor like the module's activation, of all positions and heads."""
        return whole[self.index(0)]

    def index(self, begin: int) -> tuple[Any, ...]:
        """Where the site is in an activation whose first position is `begin`."""
        return index_of(self.site, self.point, self.positions, len(self.shape), begin)


def index_of(
    site: Site, point: HookPoint, positions: tuple[int, ...] | None, n_axes: int, begin: int
) -> tuple[Any, ...]:
    """Where a site is in a module's activation.

    Args:
        site: the site.
        point: the module's hook point.
        positions: which of its positions, None for all.
        n_axes: of the activation.
        begin: the first position that the activation holds.
    """
    index: list[Any] = [slice(None)] * n_axes
    if site.head is not None and point.head_axis is not None:
        index[point.head_axis] = site.head
    if positions is not None and point.pos_dim is not None:
        numbers = [at - begin for at in positions]
        first, n = numbers[0], len(numbers)
        run = numbers == list(range(first, first + n))
        index[point.pos_dim] = slice(first, first + n) if run else numbers
    return tuple(index)


def first_seen(hook: HookPoint) -> int:
    """The first position that a hook sees, in a pass that begins later than others."""
    told = hook.ctx.get("positions")
    return 0 if told is None else int(told[0])


@dataclass(frozen=True)
class Intervention:
    """Something to write.

    Attributes:
        name: what results call it.
        of: from what stands at the site and where that is to what shall stand there.
        reads: whether it reads the activations of the unpatched runs.
        ready: from the model, the names of the modules that are swept, and the number of pairs to
            the intervention itself, for one that needs to know them.
        at: where it writes if nothing else is said.
        sites: what it writes if nothing else is said, from the model.
    """

    name: str
    of: Callable[[Tensor, At], Tensor]
    reads: bool = False
    ready: Callable[[HookedVLM, list[str], int], Intervention] | None = None
    at: Place = None
    sites: Callable[[HookedVLM], Any] | None = None


Given = Intervention | Callable[[Tensor, At], Tensor]


def as_intervention(given: Given) -> Intervention:
    """An intervention of what was given for one."""
    if isinstance(given, Intervention):
        return given
    if not callable(given):
        raise TypeError(f"an intervention is a function (value, at), or P.zero() …, not {given!r}")
    return Intervention(getattr(given, "__name__", type(given).__name__), given, reads=True)


def patch() -> Intervention:
    """What the other run of the pair has there."""
    return Intervention("patch", lambda value, at: at.other, reads=True)


def zero() -> Intervention:
    """Zeros."""
    return Intervention("zero", lambda value, at: torch.zeros_like(value))


def steer(vector: Tensor | Mapping[str, Tensor], scale: float = 1.0) -> Intervention:
    """`value + scale * vector`.

    Args:
        vector: of the last axis of the activation, or of all of the site's; or one by hook name.
        scale: how much of it.
    """

    def add(value: Tensor, at: At) -> Tensor:
        one = vector
        if isinstance(vector, Mapping):
            if at.site.name not in vector:
                raise KeyError(f"no steering vector for {at.site.name!r}, only {list(vector)}")
            one = vector[at.site.name]
        return value + scale * torch.as_tensor(one).to(value)

    return Intervention("steer", add)


def noise(std: float, seed: int = 0, multiply: bool = False) -> Intervention:
    """Gaussian noise: `value + std * e`, or `value * (1 + std * e)`.

    `e` is drawn for the whole activation of a module and is the same in every cell and pair of a
    sweep, so that all heads together get what the module gets.

    Args:
        std: the standard deviation; of added noise in units of the activation.
        seed: of `e`.
        multiply: whether to multiply.
    """

    def add(value: Tensor, at: At) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(at.shape[1:], generator=generator, dtype=torch.float32)
        drawn = at.pick(drawn.expand(at.shape)).to(value)
        return value * (1 + std * drawn) if multiply else value + std * drawn

    return Intervention(f"noise(std={std}, seed={seed})", add)


def knockout(
    queries: Any = None,
    keys: Any = None,
    layers: Any = None,
    stack: str | None = None,
    part: str = "attn",
) -> Intervention:
    """No attention from some queries to some keys, as if these were masked.

    A query that may see no other key has a pattern and `z` of 0.

    Source: Geva et al. (arXiv 2304.14767) sec. 3.

    Args:
        queries: a place in the stack; None for all positions.
        keys: a place in what the attention reads; None for all positions.
        layers: the layers of the default sites, together; None for all.
        stack: the stack of the default sites; by default the one that reads the image.
        part: `attn`, or `cross_attn`.
    """
    seen = as_place(keys)

    def of(value: Tensor, at: At) -> Tensor:
        if not at.name.endswith("hook_attn_scores"):
            raise ValueError(f"knockout writes hook_attn_scores, not {at.site.name!r}")
        stack = at.locator.stack(at.name, keys=True)
        found = at.locator.find(seen, stack, value.shape[-1], at.name)
        value = value.clone()
        value[..., list(found)] = torch.finfo(value.dtype).min
        return value

    def sites(model: HookedVLM) -> Any:
        from hooked_vlm.patching.cells import Together

        name = stack or next(n for n in model.stacks if n != next(iter(model.stacks)))
        blocks = model.stacks[name].block_list
        chosen = range(len(blocks)) if layers is None else layers
        names = [f"{name}.blocks.{layer}.{part}.hook_attn_scores" for layer in chosen]
        names = [one for one in names if layers is not None or one in model.hook_dict]
        if not names:
            raise ValueError(f"{name!r} has no {part!r}")
        return Together(tuple(names), f"{name}.{part}")

    name = f"knockout({shown(as_place(queries))}, {shown(seen)})"
    return Intervention(name, of, at=as_place(queries), sites=sites)
