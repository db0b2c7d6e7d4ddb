"""Where in a sequence: positions by number, by role, by token, or by what they show of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index as as_index
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchEncoding

from hooked_vlm.models.inputs import Geometry

if TYPE_CHECKING:
    import pandas as pd

    from hooked_vlm.models.base import HookedVLM
    from hooked_vlm.models.flow import Base

KNOWN = ("first", "last", "image", "text")  # roles that every input has, where they make sense


@dataclass(frozen=True)
class Region:
    """The patches that a rectangle of the original image touches, in pixels from its top left.

    Of LLaVA-NeXT those of all views; of several images in one text, those of `image`.
    """

    left: int | float
    top: int | float
    right: int | float
    bottom: int | float
    image: int = 0


@dataclass(frozen=True)
class Each:
    """Every position, or every window of `width` consecutive ones, one after the other."""

    width: int = 1
    stride: int = 1

    def windows(self, length: int) -> list[tuple[int, ...]]:
        """The windows of a sequence."""
        return [
            tuple(range(begin, begin + self.width))
            for begin in range(0, length - self.width + 1, self.stride)
        ]


# A number, negative from the end; several, together; a role's name; a part of the image.
Place = int | tuple[int, ...] | str | Region | None


class NoSuchPlace(ValueError):
    """An input does not have the place; the message says which place, and what there is."""


def as_place(given: Any) -> Place:
    """One place of what a user gave for it.

    Raises:
        TypeError: something that is no place.
    """
    if given is None or isinstance(given, str | Region):
        return given
    many = isinstance(given, Sequence) or (hasattr(given, "ndim") and given.ndim > 0)
    if many:
        several = tuple(as_index(one) for one in given)
        if not several:
            raise ValueError("an empty list of positions patches nothing; None patches all of them")
        return several
    return as_index(given)


def shown(place: Place) -> Any:
    """A place as the coordinate of a result."""
    if isinstance(place, tuple):
        first, last = place[0], place[-1]
        run = place == tuple(range(first, last + 1))
        return f"{first}-{last}" if run and len(place) > 1 else ",".join(map(str, place))
    if isinstance(place, Region):
        return f"{place.left:g},{place.top:g}-{place.right:g},{place.bottom:g}"
    return place


def spoken(tokenizer: Any, ids: Sequence[int], words: str) -> range:
    """The positions where words stand first in a text, as whole words; empty where they do not."""
    for form in (words, f" {words}"):
        wanted = tokenizer(form, add_special_tokens=False)["input_ids"]
        for begin in range(len(ids) - len(wanted) + 1):
            end = begin + len(wanted)
            if list(ids[begin:end]) == wanted and not _goes_on(tokenizer, ids[begin:], len(wanted)):
                return range(begin, end)
    return range(0)


def _goes_on(tokenizer: Any, ids: Sequence[int], n: int) -> bool:
    """Whether the token behind the first n continues their word, as `##er` does in 'older'."""
    said, more = tokenizer.decode(ids[:n]), tokenizer.decode(ids[: n + 1])
    return bool(more[len(said) : len(said) + 1].isalnum())


@dataclass
class Locator:
    """Finds places in one input of a base.

    Attributes:
        model: the model.
        base: a run of it.
        inputs: what it was run on, with their geometry where `prepare` made them.
        row: which row of its logits.
        roles: by name the positions of a role in the text, or the words that stand there.
    """

    model: HookedVLM
    base: Base
    inputs: Mapping[str, Any]
    row: int = 0
    roles: Mapping[str, Any] = field(default_factory=dict)
    _known: dict[str, Sequence[int]] = field(default_factory=dict, init=False, repr=False)

    def stack(self, name: str, keys: bool = False) -> str:
        """The stack whose positions an axis of a point counts; with `keys`, of the last axis."""
        point, stack = self.model.hook_dict[name], self.model.stack_of(name)
        if point.of_source or (keys and ".cross_attn." in name):
            return next(n for n, kept in self.base.stacks.items() if kept.reader == stack)
        return stack

    def count(self, name: str) -> int:
        """How many positions an activation has; 0 if it has no axis for them."""
        if name not in self.base.cache:  # a pattern, whose queries are those of its stack
            return len(self._door(self.model.stack_of(name)))
        value, axis = self.base.cache[name], self.model.hook_dict[name].pos_dim
        if axis is None or value.dim() <= 2:  # a map of a ResNet; [batch, 2] of an itm head
            return 0
        return int(value.shape[axis])

    def find(self, place: Place, stack: str, length: int, what: str) -> tuple[int, ...]:
        """The positions of a place.

        Args:
            place: the place.
            stack: whose positions they are.
            length: how many there are.
            what: the name of the point, for the message.

        Raises:
            NoSuchPlace: it is not there.
        """
        if place is None:
            return tuple(range(length))
        if isinstance(place, int | tuple):
            numbers = (place,) if isinstance(place, int) else place
            for one in numbers:
                if not -length <= one < length:
                    raise NoSuchPlace(f"{what!r} has no position {one}, it has {length} positions")
            return tuple(one % length for one in numbers)
        found = (
            self._region(place, stack) if isinstance(place, Region) else self._role(place, stack)
        )
        behind = len(self._door(stack)) - length if stack == self._vision else 0
        return tuple(at - behind for at in found if at >= behind)  # LLaVA drops the class token

    def padded(self, stack: str, positions: Sequence[int]) -> bool:
        """Whether padding stands at one of some positions."""
        real = self._real(stack)
        return len(real) < len(self._door(stack)) and not set(positions) <= set(real)

    def _role(self, role: str, stack: str) -> Sequence[int]:
        if stack == self._text and role in self.roles:
            return self._spoken(role, self.roles[role])
        if role in ("first", "last"):
            return [self._real(stack)[0 if role == "first" else -1]]
        if role == "image":
            return [int(at) for at in self._patches(stack)["position"]]
        if role == "text" and stack == self._text:
            shows = set(self._patches(stack, empty=True)["position"])
            return [at for at in self._real(stack) if at not in shows]
        known = [*KNOWN, *self.roles]
        raise NoSuchPlace(f"{stack!r} has no positions of role {role!r}; roles are {known}")

    @property
    def _text(self) -> str:
        """The stack that reads `input_ids`."""
        names = [n for n in self.model.stacks if n != self._vision]
        return names[0]

    @property
    def _vision(self) -> str:
        return next(iter(self.model.stacks))

    def _door(self, stack: str) -> range:
        """All positions of a stack."""
        return range(next(iter(self.base.stacks[stack].doors.values())).shape[1])

    def _rows(self, stack: str) -> list[int]:
        rows: list[int] = self.base.rows(stack, torch.tensor([self.row])).tolist()
        return rows

    def real(self, name: str) -> Sequence[int]:
        """The positions of an activation that are no padding."""
        stack, n = self.stack(name), self.count(name)
        return self._real(stack) if n == len(self._door(stack)) else range(n)

    def _real(self, stack: str) -> Sequence[int]:
        """The positions of a stack that are no padding."""
        if stack not in self._known:
            mask = self.model.mask_of(self.inputs, stack)
            row = None if mask is None else mask[self._rows(stack)[0]]
            some = self._door(stack) if row is None else row.nonzero().flatten().tolist()
            self._known[stack] = some
        return self._known[stack]

    def _spoken(self, role: str, where: Any) -> Sequence[int]:
        """The positions of a role, which are given, or those of the words that stand there.

        Words are those of the clean text; of the run's own where that has none of them.
        """
        rows = [int(self.base.rows(self._text, torch.tensor([0]))[0]), self._rows(self._text)[0]]
        texts = [self.inputs["input_ids"][row].tolist() for row in rows]
        if not isinstance(where, str):
            place = as_place(where)
            return self.find(place, self._text, len(texts[0]), f"role {role}")
        if not where:
            raise NoSuchPlace(f"role {role!r} is empty")
        tokenizer = self.model.tokenizer
        for ids in texts:
            if found := spoken(tokenizer, ids, where):
                return found
        tokens = " ".join(tokenizer.convert_ids_to_tokens(texts[0])[:40])
        raise NoSuchPlace(f"the text has no {where!r}, the words of role {role!r}: {tokens!r}")

    @cached_property
    def _map(self) -> pd.DataFrame:
        """What stands where; a box is in pixels of what the model is given if nothing is known."""
        inputs = self.inputs
        geometry = getattr(inputs, "geometry", None)
        if geometry is None and inputs["pixel_values"].dim() == 4:
            height, width = inputs["pixel_values"].shape[-2:]
            whole = Geometry((width, height), (0.0, 0.0, float(width), float(height)))
            geometry = [whole] * len(inputs["pixel_values"])
        described = BatchEncoding(dict(inputs))
        if geometry is not None:
            vars(described)["geometry"] = geometry
        return self.model._token_map(described, lambda ids: [""] * len(ids))

    def _patches(self, stack: str, empty: bool = False) -> pd.DataFrame:
        """The positions that show something of an image, newlines between its rows included."""
        rows = self._rows(stack)
        here = self._map[(self._map["stack"] == stack) & self._map["row"].isin(rows)]
        shows = here["patch_row"].notna()
        if stack != self._vision and "image" in here:
            shows |= here["image"].notna()
        if not (shows.any() or empty):
            raise NoSuchPlace(
                f"{stack!r} has no positions of an image; what it reads of one are keys of its "
                f"cross-attention, and positions of {self._vision!r}"
            )
        return here[shows]

    def _region(self, region: Region, stack: str) -> list[int]:
        patches = self._patches(stack)
        if patches["row"].nunique() > 1:
            raise NoSuchPlace(
                f"{region} is a part of one image, and {stack!r} reads {patches['row'].nunique()} "
                "of them, or tiles, for this input; give positions"
            )
        touched = patches[
            (patches["left"] < region.right)
            & (patches["right"] > region.left)
            & (patches["top"] < region.bottom)
            & (patches["bottom"] > region.top)
        ]
        if "image" in touched and touched["image"].notna().any():
            touched = touched[touched["image"] == region.image]
        if not len(touched):
            left, top = patches["left"].min(), patches["top"].min()
            right, bottom = patches["right"].max(), patches["bottom"].max()
            raise NoSuchPlace(
                f"{region} touches no patch of {stack!r}, which sees ({left:g}, {top:g}) to "
                f"({right:g}, {bottom:g})"
            )
        return [int(at) for at in touched["position"]]
