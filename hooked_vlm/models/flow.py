"""One forward pass through the stacks of a model: plain, recorded, or resumed from a record.

A model writes its forward pass once, as calls of `flow.stack(...)`. A plain flow runs them; a
recording flow also keeps what later work may reuse; a resuming flow computes only what a change
at a site can reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_vlm.components.attention import KeyValue, Source
from hooked_vlm.components.blocks import Context, Door
from hooked_vlm.components.hook_point import listening
from hooked_vlm.components.stack import Stack

if TYPE_CHECKING:
    from hooked_vlm.models.cache import ActivationCache


@dataclass
class Kept:
    """What a base keeps of one stack.

    Attributes:
        output: the stack's output, the glue behind it included.
        doors: the stream at each part's door.
        cross: keys and values of the stack's cross-attention, by layer.
        reader: the stack that reads this one, None for the last.
        rows: for each row of the reader the row of this stack; None for one to one.
    """

    output: Tensor
    doors: dict[Door, Tensor] = field(default_factory=dict)
    cross: dict[int, KeyValue] = field(default_factory=dict)
    reader: str | None = None
    rows: Tensor | None = None


@dataclass
class Base:
    """A forward pass that later ones continue; made by `HookedVLM.base_run`.

    Attributes:
        inputs: what the model was run on.
        logits: its output.
        stacks: what is kept of each stack, by name.
        cache: the activations that were asked for.
        fingerprint: of weights, inputs and standing hooks; it refuses to go on when they changed.
    """

    inputs: dict[str, Any]
    logits: Tensor
    stacks: dict[str, Kept]
    cache: ActivationCache
    fingerprint: tuple[Any, ...]

    def rows(self, stack: str, rows: Tensor) -> Tensor:
        """The rows of a stack that belong to rows of the batch."""
        kept = self.stacks[stack]
        if kept.reader is not None:
            rows = self.rows(kept.reader, rows)
        return rows if kept.rows is None else kept.rows[rows]

    def row(self, stack: str, row: int) -> int:
        """The row of a stack that belongs to a row of the batch."""
        return int(self.rows(stack, torch.tensor([row], device=self.logits.device)))


class Flow:
    """A plain forward pass; the ancestor of the other two.

    Args:
        stacks: the model's stacks by name, in the order in which they run.
        grad: whether backward hooks listen, so that every point needs a gradient.
    """

    def __init__(self, stacks: dict[str, Stack[Any]], grad: bool = False):
        self.stacks = stacks
        self.grad = grad
        self.outputs: dict[str, Tensor] = {}

    def stack(
        self,
        name: str,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        source: str | None = None,
        source_mask: Tensor | None = None,
        after: Callable[[Tensor], Tensor] = lambda x: x,
        readout: slice = slice(None),
    ) -> Tensor:
        """Runs a stack and the glue behind it.

        Args:
            name: the stack.
            inputs: what it embeds, pixels or token ids.
            mask: [batch, 1, query, key], True where the stack's queries may see its keys.
            source: the stack that its cross-attention reads.
            source_mask: [rows, pos], True for the positions of the source that may be seen.
            after: the glue behind the stack.
            readout: the positions that anything downstream reads.
        """
        x = self.stacks[name].embeddings(inputs, grad=self.grad)
        read = None if source is None else self._source(name, source, source_mask, len(x))
        x = self.stacks[name].run(x, Context(mask, read, doors=self._doors(name)))
        self.outputs[name] = after(x)
        return self.outputs[name]

    def _doors(self, name: str) -> dict[Door, Tensor] | None:
        return None

    def _source(self, name: str, source: str, mask: Tensor | None, batch: int) -> Source:
        states = self.outputs[source]
        if len(states) not in (1, batch):
            raise ValueError(
                f"{name!r} has {batch} rows and {source!r} {len(states)}: batches must match, "
                f"or one row of {source!r} serve them all"
            )
        if len(states) == batch:
            return Source(states, mask)
        return Source(states, mask, torch.zeros(batch, dtype=torch.long, device=states.device))


class Recording(Flow):
    """A forward pass that keeps the streams at all doors and the keys and values of sources."""

    def __init__(self, stacks: dict[str, Stack[Any]]):
        super().__init__(stacks)
        self.kept = {name: Kept(torch.empty(0)) for name in stacks}

    def stack(self, name: str, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Runs a stack as ever, and keeps it."""
        self.kept[name].output = super().stack(name, inputs, **kwargs)
        return self.kept[name].output

    def _doors(self, name: str) -> dict[Door, Tensor]:
        return self.kept[name].doors

    def _source(self, name: str, source: str, mask: Tensor | None, batch: int) -> Source:
        read = super()._source(name, source, mask, batch)
        read.kept = self.kept[name].cross
        self.kept[source].reader, self.kept[source].rows = name, read.rows
        return read


class Resuming(Flow):
    """A forward pass that continues a base from a door on, for rows chosen from it.

    Args:
        stacks: the model's stacks by name, in order.
        base: what is continued.
        start: the stack to continue in.
        door: where in it; None to begin with its embeddings.
        rows: the base's row that each row of the new batch continues.
        grad: whether backward hooks listen.
    """

    def __init__(
        self,
        stacks: dict[str, Stack[Any]],
        base: Base,
        start: str,
        door: Door | None,
        rows: Tensor,
        grad: bool = False,
    ):
        super().__init__(stacks, grad)
        self.base, self.start, self.door, self.rows = base, start, door, rows
        self.changed: set[str] = set()

    def stack(
        self,
        name: str,
        inputs: Tensor,
        *,
        mask: Tensor | None = None,
        source: str | None = None,
        source_mask: Tensor | None = None,
        after: Callable[[Tensor], Tensor] = lambda x: x,
        readout: slice = slice(None),
    ) -> Tensor:
        """Runs what a change can reach of a stack, or takes its output from the base."""
        kept, rows = self.base.stacks[name], self.base.rows(name, self.rows)
        self.outputs[name] = kept.output
        if name != self.start and source not in self.changed:
            return kept.output
        door: Door | None = self.door
        if name != self.start:
            door = self._reader_door(name)
        read = None if source is None else self._source(name, source, source_mask, len(rows))
        if mask is not None and len(mask) > 1:
            mask = mask[rows]
        if door is None:
            x = self.stacks[name].embeddings(inputs[rows], grad=self.grad)
        else:
            x = kept.doors[door][rows]
            if self.grad:
                x.requires_grad_()  # a copy of the base's rows: the first tensor of the new pass
        x = self.stacks[name].run(x, Context(mask, read), door or (0, "attn"), readout)
        self.changed.add(name)
        self.outputs[name] = after(x)
        return self.outputs[name]

    def _reader_door(self, name: str) -> Door | None:
        """Where a stack begins whose source has changed: at its first cross-attention.

        Earlier where somebody listens earlier, so that no hook is ignored.
        """
        stack = self.stacks[name]
        first = min(door for door in self.base.stacks[name].doors if door[1] == "cross_attn")
        if any(listening(m) for n, m in stack.named_children() if n not in ("blocks", "ln_final")):
            return None
        for layer in range(first[0] + 1):
            block: Any = stack.blocks[layer]
            before = (m for n, m in block.named_children() if block.PARTS.get(n, "attn") == "attn")
            if any(map(listening, before)):
                return layer, "attn"
        return first

    def _source(self, name: str, source: str, mask: Tensor | None, batch: int) -> Source:
        rows = self.base.rows(source, self.rows)
        if source in self.changed:
            return Source(self.outputs[source], None if mask is None else mask[rows])
        if self.grad:  # keys and values are made again, so that gradients reach their points
            return Source(self.outputs[source].detach().requires_grad_(), mask, rows)
        return Source(self.outputs[source], mask, rows, self.base.stacks[name].cross)
