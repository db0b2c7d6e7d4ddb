"""What a sweep goes over: sites, alone or together, and the places where they are written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vlm.models.names import Names, Site, head_of
from hooked_vlm.patching.places import as_place, shown

if TYPE_CHECKING:
    from hooked_vlm.models.base import HookedVLM


@dataclass(frozen=True)
class Together:
    """Sites that are written in one and the same run.

    Attributes:
        sites: sites, names or globs.
        name: what results call them.
    """

    sites: tuple[Site | str, ...]
    name: str

    def common(self, field: str) -> Any:
        """What all of them have of a site's fields, None where they differ."""
        found = {getattr(site, field) for site in self.sites}
        return found.pop() if len(found) == 1 else None


Swept = Site | Together
Sites = Names | Swept | Sequence[Swept | str]


def together(*sites: Site | str | Sequence[Site | str], name: str | None = None) -> Together:
    """Sites to be written in one run.

    Args:
        *sites: sites, hook names or globs, or lists of these.
        name: what results call them; by default their names.
    """
    flat: list[Site | str] = []
    for one in sites:
        flat += [one] if isinstance(one, str | Site) else one
    if not flat:
        raise ValueError("together() without sites writes nothing")
    return Together(tuple(flat), name or " + ".join(map(described, flat)))


def windows(sites: Iterable[Site], width: int, stride: int = 1) -> list[Together]:
    """Windows of consecutive layers, each written in one run.

    Args:
        sites: sites in blocks, such as `model.sites("text.blocks.*.hook_mlp_out")`.
        width: how many of the layers that occur each window spans.
        stride: how many it moves on.

    Raises:
        ValueError: sites outside of blocks or of several stacks, or fewer layers than `width`.
    """
    given = list(sites)
    stacks = {site.stack for site in given}
    if len(stacks) != 1 or any(site.layer is None for site in given):
        raise ValueError("windows slide over the layers of one stack; these sites are not in one")
    layers = sorted({site.layer for site in given if site.layer is not None})
    if not 1 <= width <= len(layers) or stride < 1:
        raise ValueError(
            f"a window of {width} layers, moved by {stride}, over {len(layers)} layers"
        )
    made = []
    for first in range(0, len(layers) - width + 1, stride):
        chosen = layers[first : first + width]
        inside = tuple(site for site in given if site.layer in chosen)
        what = inside[0].component if len({s.component for s in inside}) == 1 else "*"
        span = f"{chosen[0]}-{chosen[-1]}" if width > 1 else str(chosen[0])
        made.append(Together(inside, f"{inside[0].stack}.blocks.{span}.{what}"))
    return made


def random_sites(model: HookedVLM, like: Sequence[Site], seed: int = 0) -> list[Site]:
    """As many other sites of the same kinds, drawn without replacement: a matched control.

    Each is of the stack and component of one of `like`, at another layer or head that is not in
    `like`, and at the same position.

    Raises:
        ValueError: too few other sites are there.
    """
    generator = np.random.default_rng(seed)
    taken = {site.name for site in like}
    drawn: list[Site] = []

    def kind(site: Site) -> tuple[Any, ...]:
        return site.stack, site.component, site.head is not None

    for key, group in groupby(sorted(like, key=kind), key=kind):
        wanted = list(group)
        every = model.sites(model.hook_names(heads=True))
        others = [s for s in every if kind(s) == key and s.name not in taken]
        if len(others) < len(wanted):
            raise ValueError(
                f"{len(wanted)} of the {len(others) + len(wanted)} sites of {key[0]!r} that are "
                f"{key[1]!r} are given: there are only {len(others)} others to draw from"
            )
        picked = generator.choice(len(others), len(wanted), replace=False)
        drawn += [
            replace(others[at], position=site.position)
            for at, site in zip(picked, wanted, strict=True)
        ]
    return drawn


def described(site: Site | str) -> str:
    """A site's name, with its position where it has one."""
    if isinstance(site, str) or site.position is None:
        return site if isinstance(site, str) else site.name
    return f"{site.name}@{shown(as_place(site.position))}"


def module_of(name: str) -> str:
    """The module's point that a name speaks of: its own, or that of the head."""
    of = head_of(name)
    return name if of is None else of[0]


def as_sites(model: HookedVLM, sites: Sites) -> list[Swept]:
    """What a sweep goes over, in the order of the model; each once.

    Raises:
        KeyError: sites that nothing matches.
    """
    if isinstance(sites, Site | Together):
        sites = [sites]
    if isinstance(sites, str) or not isinstance(sites, Sequence):
        return list(model.sites(sites))
    found: list[Swept] = []
    for one in sites:
        if isinstance(one, Site):
            found.append(one)
        elif isinstance(one, Together):
            inside = tuple(
                site
                for name in one.sites
                for site in ([name] if isinstance(name, Site) else model.sites(name))
            )
            found.append(replace(one, sites=inside))
        else:
            found += model.sites(one)
    if not found:
        raise ValueError("an empty list of sites sweeps over nothing")
    model.hook_dict.match([site.name for one in found for site in parts(one)])  # may be a KeyError
    order = {name: place for place, name in enumerate(model.hook_names(heads=True))}

    def place(one: Swept) -> tuple[Any, ...]:
        first = parts(one)[0]
        at = first.position if isinstance(first.position, int) else 0
        return (order[first.name], at) if isinstance(one, Site) else (len(order), 0)

    return sorted(dict.fromkeys(found), key=place)


def parts(one: Swept) -> tuple[Site, ...]:
    """The sites that are written in one run."""
    return (one,) if isinstance(one, Site) else one.sites  # type: ignore[return-value]
