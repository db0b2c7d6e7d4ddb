"""The graph of a run: what its parts add to streams, and what reads it, linear at the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vlm.components.blocks import Sum
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base, Link

ROOM = 2**28  # bytes that directions of receivers may take at a time
Directions = Float[Tensor, "receiver rows pos d_model"]


@dataclass(frozen=True)
class Node:
    """A sender or a receiver.

    Attributes:
        name: its hook name.
        point: the module's point.
        stack: the stack of which it is a part.
        layer: its block; -1 for the embedding, the number of blocks for the readout.
        part: its part of the block; empty for these two.
        head: its head, None for one without.
    """

    name: str
    point: str
    stack: str
    layer: int
    part: str = ""
    head: int | None = None


def end_of(name: str, stack: Any) -> str:
    """The point of the stream behind a stack's last block."""
    return f"{name}.blocks.{len(stack.blocks) - 1}.{stack.blocks[-1].SUMS[-1].stream}"


class _Met:
    """The receivers that were met on the way back to a place of a stream.

    Attributes:
        numbers: which they are.
        directions: for each the gradient with respect to the stream at that place, by it alone.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.directions: Directions = torch.empty(0)

    def add(self, numbers: Iterable[int], directions: Directions) -> None:
        """Meets further ones."""
        others = [self.directions.to(directions.device)] if self.numbers else []
        self.directions = torch.cat([*others, directions])
        self.numbers += numbers

    def pull(self, through: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Goes on to the place in front of a function, linear at x."""
        if self.numbers:
            self.directions = _pulled(through, x, self.directions)

    def times(self, added: Float[Tensor, "sender rows pos d_model"]) -> np.ndarray:
        """Scores, [sender, receiver], of what is added at that place."""
        wide = torch.float64 if added.dtype == torch.float64 else torch.float32
        directions = self.directions.to(added.device, wide)
        product: np.ndarray = (added.to(wide).flatten(1) @ directions.flatten(1).T).cpu().numpy()
        return product


def _pulled(through: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor) -> Tensor:
    """Gradients with respect to x of those with respect to what a function makes of it."""
    back = torch.func.vjp(through, x)[1]
    (found,) = torch.vmap(back)(directions.to(x.device))
    pulled: Tensor = found
    return pulled


class Graph:
    """The edges of a pair, linear at one of its rows.

    Args:
        model: the model.
        base: both rows, from `traced_run`.
        links: from there, too.
        own: the row that is written to.

    Attributes:
        last: the stacks that no other reads, behind which logits are made.
    """

    def __init__(self, model: HookedVLM, base: Base, links: dict[str, Link], own: int):
        self.model, self.base, self.links = model, base, links
        read = {link.source for link in links.values()}
        read |= {link.merge.source for link in links.values() if link.merge is not None}
        self.last = set(links) - read
        self.row = torch.tensor([own], device=base.logits.device)
        self.rows = {name: base.rows(name, self.row) for name in links}
        self.others = {name: base.rows(name, 1 - self.row) for name in links}
        self.gradients: dict[str, Tensor | None] = {}

    def _own(self, point: str) -> Tensor:
        """An activation in the run that is written to, [rows, ...]."""
        x = self.base.cache[point]
        return x.detach()[self.rows[point.partition(".")[0]].to(x.device)]

    def _change(self, point: str) -> Tensor:
        """The activation in the other run minus that."""
        x = self.base.cache[point]
        other = x.detach()[self.others[point.partition(".")[0]].to(x.device)]
        return other - self._own(point)

    def _gradient(self, point: str) -> Tensor:
        """The metric's gradient with respect to it, zero where it does not matter."""
        gradient, x = self.gradients[point], self._own(point)
        if gradient is None:
            return torch.zeros_like(x)
        return gradient[self.rows[point.partition(".")[0]].to(x.device)]

    def scores(
        self,
        values: Iterable[tuple[Tensor, Base]],
        senders: list[Node],
        receivers: list[Node],
    ) -> np.ndarray:
        """Scores, [sender, receiver]; NaN where there is no edge.

        Args:
            values: a metric's values, and the runs they are of, whose gradients are averaged.
            senders: the senders.
            receivers: the receivers.
        """
        found = np.full((len(senders), len(receivers)), np.nan)
        received = [
            number
            for number, node in enumerate(receivers)
            if node.point in self.base.cache and (node.part or node.stack in self.last)
        ]
        if not received:
            return found
        points = list(dict.fromkeys(receivers[number].point for number in received))
        gradients: list[Tensor | None] = [None] * len(points)
        for number, (value, base) in enumerate(values, start=1):
            tensors = [base.cache[point] for point in points]
            these = torch.autograd.grad(value, tensors, allow_unused=True)
            gradients = [  # the mean so far
                one if mean is None or one is None else mean + (one - mean) / number
                for mean, one in zip(gradients, these, strict=True)
            ]
        self.gradients = dict(zip(points, gradients, strict=True))
        streams = [self._own(end_of(name, self.model.stacks[name])) for name in self.links]
        size = max(stream.numel() * stream.element_size() for stream in streams)
        step = max(1, ROOM // size)
        for first in range(0, len(received), step):
            self._walk(senders, receivers, received[first : first + step], found)
        return found

    @torch.no_grad()
    def _walk(
        self, senders: list[Node], receivers: list[Node], some: list[int], found: np.ndarray
    ) -> None:
        """Goes back from some receivers through the streams that they read."""
        sent = _by_place(senders, range(len(senders)))
        received = _by_place(receivers, some)
        ahead: dict[str, _Met] = defaultdict(_Met)  # those met behind a stack, at its output
        for name in reversed(list(self.links)):
            stack: Any = self.model.stacks[name]
            met, end = ahead[name], end_of(name, stack)
            met.pull(self.links[name].glue, self._own(end))
            for number in received[name, len(stack.blocks), ""]:
                met.add([number], self._gradient(end)[None])
            for layer, block in reversed(list(enumerate(stack.blocks))):
                for one in reversed(block.SUMS):
                    total = f"{name}.blocks.{layer}.{one.total}"
                    if total not in self.base.cache:
                        continue
                    if one.behind is not None:
                        met.pull(getattr(block, one.behind), self._own(total))
                    place = name, layer, one.part
                    heard = sent[place]
                    if heard and met.numbers:
                        added = self._added(block, [senders[number] for number in heard])
                        found[np.ix_(heard, met.numbers)] = met.times(added)
                    if received[place]:
                        self._meet(block, one, receivers, received[place], met, ahead)
            if met.numbers:
                self._embedding(name, sent[name, -1, ""], met, ahead, found)

    def _added(self, block: Any, nodes: list[Node]) -> Float[Tensor, "sender rows pos d_model"]:
        """The change of what senders of one part add."""
        change = self._change(nodes[0].point)
        if nodes[0].head is None:
            return change[None]
        heads = [node.head for node in nodes]
        weights = getattr(block, nodes[0].part).W_O[heads]
        return torch.einsum("rphd,hdm->hrpm", change[:, :, heads], weights)

    def _meet(
        self,
        block: Any,
        one: Sum,
        receivers: list[Node],
        numbers: list[int],
        met: _Met,
        ahead: dict[str, _Met],
    ) -> None:
        """Meets the receivers of a part: in its stream, or behind the stack that it reads."""
        stack, here = receivers[numbers[0]].stack, _Met()
        for point, group in _by_point(receivers, numbers).items():
            heads, gradient = [receivers[number].head for number in group], self._gradient(point)
            if heads[0] is None:
                met.add(group, gradient[None])  # of the stream itself, in front of the norm
                continue
            weights = getattr(getattr(block, one.part), f"W_{point[-1].upper()}")[heads]
            directions = torch.einsum("rphd,hmd->hrpm", gradient[:, :, heads], weights)
            if not self.model.hook_dict[point].of_source:
                here.add(group, directions)
                continue
            source, turns = self.links[stack].source, self.links[stack].turns
            assert source is not None
            whole = directions.new_zeros(len(group), len(self.rows[source]), *directions.shape[2:])
            whole[:, block.turn % turns :: turns] = directions
            ahead[source].add(group, whole)
        if here.numbers:
            if one.before is not None:
                reads = f"{stack}.blocks.{block.layer}.{one.reads}"
                here.pull(getattr(block, one.before), self._own(reads))
            met.add(here.numbers, here.directions)

    def _embedding(
        self,
        name: str,
        heard: list[int],
        met: _Met,
        ahead: dict[str, _Met],
        found: np.ndarray,
    ) -> None:
        """Scores what block 0 reads; what of it is another stack's output is met there."""
        added, merge = self._change(f"{name}.blocks.0.hook_resid_pre"), self.links[name].merge
        if merge is not None:
            merge = merge.of(self.row)
            features = self.base.stacks[merge.source].output.detach()
            there = met.directions[:, merge.places]
            mine = features[self.rows[merge.source].to(features.device)]
            ahead[merge.source].add(met.numbers, _pulled(merge.standing, mine, there))
            added = added.masked_fill(merge.places[..., None].to(added.device), 0)
        if heard:
            found[np.ix_(heard, met.numbers)] = met.times(added[None])


def _by_place(nodes: list[Node], some: Iterable[int]) -> dict[tuple[str, int, str], list[int]]:
    """Numbers of nodes by stack, layer and part."""
    found: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for number in some:
        found[nodes[number].stack, nodes[number].layer, nodes[number].part].append(number)
    return found


def _by_point(nodes: list[Node], some: Iterable[int]) -> dict[str, list[int]]:
    """Numbers of nodes by their module's point."""
    found: dict[str, list[int]] = defaultdict(list)
    for number in some:
        found[nodes[number].point].append(number)
    return found
