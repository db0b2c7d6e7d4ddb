"""One forward pass through the stacks of a model: plain, recorded, or resumed from a record.

A model writes its forward pass once, as calls of `flow.stack(...)`. A plain flow runs them; a
recording flow also keeps what later work may reuse; a resuming flow computes only what a change
at a site can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_vlm.components.attention import Source
from hooked_vlm.components.blocks import Context, Door
from hooked_vlm.components.hook_point import listening, telling
from hooked_vlm.components.past import Keeping, KeyValue, Past, Shared
from hooked_vlm.components.stack import Stack, needing

Span = tuple[int, int | None]  # the first block to run, and the one to stop before

if TYPE_CHECKING:
    from hooked_vlm.models.cache import ActivationCache


@dataclass(frozen=True)
class Merge:
    """The output of a stack in place of tokens of another.

    Attributes:
        source: the stack whose output it is, [rows, pos, d_model].
        places: [batch, pos], True for the tokens.
        rows: for each row of the batch the rows of the output that stand in it, in order.
        read: for each row of the batch which positions of those rows, counted through, stand at
            its places; -1 is the newline. None where all of them do, in order.
        newline: [d_model], what stands between rows of a picture.
    """

    source: str
    places: Tensor
    rows: Sequence[Tensor]
    read: Sequence[Tensor] | None = None
    newline: Tensor | None = None

    def of(self, rows: Tensor) -> Merge:
        """The same, for rows chosen from the batch."""
        read = None if self.read is None else [self.read[row] for row in rows]
        merged = [self.rows[row] for row in rows]
        return replace(self, places=self.places[rows], rows=merged, read=read)

    def standing(self, features: Tensor) -> Tensor:
        """What stands at the places, [place, d_model], of the rows' features, row after row."""
        flat = features.flatten(0, 1)
        if self.read is None or self.newline is None:
            return flat
        read = joined(self.read, (len(rows) * features.shape[1] for rows in self.rows))
        return torch.cat([flat, self.newline[None].to(flat)])[read]  # -1 is the last


def joined(read: Sequence[Tensor], sizes: Iterable[int]) -> Tensor:
    """Indices into several tensors as those into the tensors one behind the other; -1 stays.

    Args:
        read: for each tensor some indices, one tensor of them at least.
        sizes: how long each tensor is.
    """
    starts = accumulate(sizes, initial=0)
    return torch.cat(
        [torch.where(one < 0, one, one + start) for one, start in zip(read, starts, strict=False)]
    )


@dataclass
class Kept:
    """What a base keeps of one stack.

    Attributes:
        output: the stack's output, the glue behind it included.
        doors: the stream at each part's door.
        cross: keys and values of the stack's cross-attention, by layer.
        own: keys and values of its own positions, by layer, where it is causal.
        reader: the stack that reads this one, None for the last.
        group: how many consecutive rows each row of the reader reads together.
        rows: for each row of the reader the group that it reads; None for one to one.
        merged: for each row of the reader the rows that stand in it, where it is read so.
    """

    output: Tensor
    doors: dict[Door, Tensor] = field(default_factory=dict)
    cross: dict[int, KeyValue] = field(default_factory=dict)
    own: dict[int, KeyValue] = field(default_factory=dict)
    reader: str | None = None
    group: int = 1
    rows: Tensor | None = None
    merged: Sequence[Tensor] | None = None


@dataclass
class Base:
    """A forward pass that later ones continue; made by `HookedVLM.base_run`.

    Attributes:
        inputs: what the model was run on.
        logits: its output, of the positions that were asked for.
        logits_to_keep: how many of the last positions these are; 0 for all.
        stacks: what is kept of each stack, by name.
        cache: the activations that were asked for.
        fingerprint: of weights, inputs and standing hooks; it refuses to go on when they changed.
    """

    inputs: dict[str, Any]
    logits: Tensor
    logits_to_keep: int
    stacks: dict[str, Kept]
    cache: ActivationCache
    fingerprint: tuple[Any, ...]

    def __post_init__(self) -> None:
        kept = self.stacks.values()
        tensors = [tensor for one in kept for tensor in (one.output, *one.doors.values())]
        for one in kept:
            for pair in (*one.cross.values(), *one.own.values()):
                tensors += pair
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]

    @property
    def edited(self) -> bool:
        """Whether something that is kept was edited in place."""
        return any(tensor._version != version for tensor, version in self._versions)

    def groups(self, stack: str, rows: Tensor) -> Tensor:
        """The groups of rows of a stack that belong to rows of the batch."""
        kept = self.stacks[stack]
        if kept.reader is not None:
            rows = self.rows(kept.reader, rows)
        return rows if kept.rows is None else kept.rows.to(rows.device)[rows]

    def rows(self, stack: str, rows: Tensor) -> Tensor:
        """The rows of a stack that belong to rows of the batch, group by group."""
        merged = self.stacks[stack].merged
        if merged is not None:
            return torch.cat([merged[row] for row in rows])
        size = self.stacks[stack].group
        groups = self.groups(stack, rows)
        within = torch.arange(size, device=groups.device)
        return groups if size == 1 else (groups[:, None] * size + within).flatten()


class Flow:
    """A plain forward pass; the ancestor of the other two.

    Args:
        stacks: the model's stacks by name, in the order in which they run.
        grad: whether backward hooks listen, so that every point needs a gradient.
        logits_to_keep: of how many of the last positions logits are wanted; 0 for all.

    Attributes:
        readout: those positions.
    """

    def __init__(self, stacks: dict[str, Stack[Any]], grad: bool = False, logits_to_keep: int = 0):
        self.stacks = stacks
        self.grad = grad
        self.readout = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
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
        at: Tensor | None = None,
        span: Span = (0, None),
        merge: Merge | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Runs a stack and the glue behind it.

        Args:
            name: the stack.
            inputs: what it embeds, pixels or token ids.
            mask: [batch, 1, query, key], True where the stack's queries may see its keys.
            source: the stack that its cross-attention reads.
            source_mask: [rows, pos], True for the positions of the source that may be seen.
            after: the glue behind the stack.
            readout: the positions that anything downstream reads; the output may hold others, too.
            at: for each row the one position that is read, which `after` gets without its axis.
            span: the first block to run and the one to stop before; where the first is not 0,
                `inputs` is the stream at its door.
            merge: what stands in place of some of the tokens.
            past: keys and values of positions before these.
        """
        first, stop = span
        x = needing(inputs, self.grad) if first else self._embed(name, inputs, merge)
        read = () if source is None else self._sources(name, source, source_mask, len(x))
        context = Context(mask, read, past, doors=self._doors(name))
        x = self.stacks[name].run(x, context, (first, "attn"), readout, stop)
        self.outputs[name] = after(x if at is None else _at(x, at))
        return self.outputs[name]

    def read(self, name: str, batch: int, group: int = 1) -> Tensor:
        """What rows of the logits read of a stack's output.

        Args:
            name: the stack.
            batch: how many rows the logits have.
            group: how many consecutive rows of the stack each of them reads.

        Returns:
            [batch, group, ...], or [1, group, ...] where one group serves them all.
        """
        groups: Tensor = self.outputs[name].unflatten(0, (-1, group))
        return groups

    def _embed(self, name: str, inputs: Tensor, merge: Merge | None) -> Tensor:
        if merge is None:
            return self.stacks[name].embeddings(inputs, grad=self.grad)
        stack: Any = self.stacks[name]
        features = merge.standing(self._features(name, merge))
        x: Tensor = stack.embeddings(inputs, grad=self.grad, features=features, places=merge.places)
        return x

    def _features(self, name: str, merge: Merge) -> Tensor:
        """What stands in the stack, row after row."""
        return self.outputs[merge.source][torch.cat(list(merge.rows))]

    def _doors(self, name: str) -> dict[Door, Tensor] | None:
        return None

    def _sources(
        self, name: str, source: str, mask: Tensor | None, batch: int
    ) -> tuple[Source, ...]:
        states, size = self.outputs[source], self._group(name)
        groups = len(states) // size
        if len(states) % size or groups not in (1, batch):
            each = f", {size} for each row" * (size > 1)
            raise ValueError(
                f"{name!r} has {batch} rows and {source!r} {len(states)}: batches must match"
                f"{each}, or one row of {source!r} serve them all"
            )
        rows = None
        if groups != batch:
            rows = self._shared(batch, states)
        return tuple(Source(states[turn::size], mask, rows) for turn in range(size))

    def _shared(self, batch: int, states: Tensor) -> Tensor:
        """The rows that each row of a batch reads where one serves them all."""
        return torch.zeros(batch, dtype=torch.long, device=states.device)

    def _group(self, name: str) -> int:
        """How many rows of its source a row of a stack reads."""
        return getattr(self.stacks[name].cfg, "n_images", 1)


class Recording(Flow):
    """A forward pass that keeps the streams at all doors, and keys and values.

    Args:
        stacks: as in `Flow`.
        logits_to_keep: as in `Flow`.
        doors: whether to keep the streams.
    """

    def __init__(self, stacks: dict[str, Stack[Any]], logits_to_keep: int = 0, doors: bool = True):
        super().__init__(stacks, logits_to_keep=logits_to_keep)
        self.doors = doors
        self.kept = {name: Kept(torch.empty(0)) for name in stacks}

    def stack(self, name: str, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Runs a stack as ever, all of its positions, and keeps it."""
        kept = self.kept[name]
        kwargs["readout"] = slice(None)
        if getattr(self.stacks[name].cfg, "causal", False):
            kwargs["past"] = Keeping(kept.own)
        kept.output = super().stack(name, inputs, **kwargs)
        return kept.output

    def _doors(self, name: str) -> dict[Door, Tensor] | None:
        return self.kept[name].doors if self.doors else None

    def _features(self, name: str, merge: Merge) -> Tensor:
        self.kept[merge.source].merged = merge.rows
        return super()._features(name, merge)

    def read(self, name: str, batch: int, group: int = 1) -> Tensor:
        """As ever, and keeps which rows were read."""
        found = super().read(name, batch, group)
        self.kept[name].group = group
        if len(found) != batch:
            self.kept[name].rows = self._shared(batch, found)
        return found

    def _sources(
        self, name: str, source: str, mask: Tensor | None, batch: int
    ) -> tuple[Source, ...]:
        read = super()._sources(name, source, mask, batch)
        for one in read:
            one.kept = self.kept[name].cross
        kept = self.kept[source]
        kept.reader, kept.group, kept.rows = name, len(read), read[0].rows
        return read


@dataclass(frozen=True)
class Link:
    """How a stack reads others, and what is made of it.

    Attributes:
        source: the stack that its cross-attention reads; None for none.
        turns: how many consecutive rows of the source its blocks read in turn.
        merge: what of another stack stands in place of some of its tokens.
        glue: from the stream behind its last block to its output.
    """

    source: str | None
    turns: int
    merge: Merge | None
    glue: Callable[[Tensor], Tensor]


class Tracing(Recording):
    """A forward pass with gradients that keeps how stacks read one another.

    Attributes:
        links: by the name of each stack that runs.
    """

    def __init__(self, stacks: dict[str, Stack[Any]], logits_to_keep: int = 0):
        super().__init__(stacks, logits_to_keep)
        self.grad = True
        self.links: dict[str, Link] = {}

    def stack(self, name: str, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Runs a stack as ever, and keeps its link."""
        after, at = kwargs.get("after", lambda x: x), kwargs.get("at")

        def glue(x: Tensor) -> Tensor:
            x = self.stacks[name].finish(x)
            made: Tensor = after(x if at is None else _at(x, at))
            return made

        self.links[name] = Link(kwargs.get("source"), self._group(name), kwargs.get("merge"), glue)
        return super().stack(name, inputs, **kwargs)


class Resuming(Flow):
    """A forward pass that continues a base from a door on, for rows chosen from it.

    Args:
        stacks: the model's stacks by name, in order.
        base: what is continued.
        start: the stack to continue in.
        door: where in it; None to begin with its embeddings.
        rows: the base's row that each row of the new batch continues.
        listeners: the stacks that hooks of this pass name.
        position: the first position that a change can reach, in a causal stack.
        grad: whether backward hooks listen.
    """

    def __init__(
        self,
        stacks: dict[str, Stack[Any]],
        base: Base,
        start: str,
        door: Door | None,
        rows: Tensor,
        listeners: set[str],
        position: int = 0,
        grad: bool = False,
    ):
        super().__init__(stacks, grad, base.logits_to_keep)
        self.base, self.start, self.door, self.rows = base, start, door, rows
        self.listeners, self.position = listeners, position
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
        at: Tensor | None = None,
        span: Span = (0, None),
        merge: Merge | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Runs what a change can reach of a stack, or takes its output from the base."""
        kept, rows = self.base.stacks[name], self.base.rows(name, self.rows)
        self.outputs[name] = kept.output
        first, stop = span
        door: Door | None = self.door
        if not len(rows):  # no row of the new batch reads it
            self.outputs[name] = kept.output[:0]
            self.changed.add(name)
            return self.outputs[name]
        if name != self.start:
            if merge is not None and merge.source in self.changed:
                door = None
            elif source in self.changed:
                door = self._reader_door(name, first)
            elif name in self.listeners:
                door = None
            else:
                return kept.output
        read = () if source is None else self._sources(name, source, source_mask, len(rows))
        if mask is not None and len(mask) > 1:
            mask = mask[rows]
        begin = self.position if name == self.start else 0
        if door is None and not first:
            everywhere = torch.arange(inputs.shape[1], device=rows.device)
            with telling(self.stacks[name], everywhere) if begin else nullcontext():
                x = self._embed(name, inputs[rows], None if merge is None else merge.of(rows))
            x = x[:, begin:]
        else:
            x = kept.doors[door or (first, "attn")][:, begin:]
            x = x[rows.to(x.device)]
            if self.grad:
                x.requires_grad_()  # a copy of the base's rows: the first tensor of the new pass
        if begin:
            past = Shared(kept.own, begin, rows)
            mask = None if mask is None else mask[:, :, begin:]
        context = Context(mask, read, past)
        x = self.stacks[name].run(x, context, door or (first, "attn"), readout, stop)
        self.changed.add(name)
        self.outputs[name] = after(x if at is None else _at(x, at[rows]))
        return self.outputs[name]

    def _features(self, name: str, merge: Merge) -> Tensor:
        if merge.source in self.changed:  # whose rows are those of the new batch
            return self.outputs[merge.source]
        return super()._features(name, merge)

    def read(self, name: str, batch: int, group: int = 1) -> Tensor:
        """As ever; of a stack that nothing changed, what the new rows read of the base."""
        found = super().read(name, batch, group)
        return found if name in self.changed else found[self.base.groups(name, self.rows)]

    def _reader_door(self, name: str, start: int) -> Door | None:
        """Where a stack begins whose source has changed: at its first cross-attention.

        Earlier where somebody listens earlier, so that no hook is ignored.
        """
        stack = self.stacks[name]
        first = min(door for door in self.base.stacks[name].doors if door[1] == "cross_attn")
        behind = ("blocks", *stack.AFTER_BLOCKS)
        if any(listening(m) for n, m in stack.named_children() if n not in behind):
            return None
        for layer in range(start, first[0] + 1):
            block: Any = stack.blocks[layer]
            before = (
                part
                for component, part in block.named_children()
                if layer < first[0] or block.PARTS.get(component, "attn") == "attn"
            )
            if any(map(listening, before)):
                return layer, "attn"
        return first

    def _sources(
        self, name: str, source: str, mask: Tensor | None, batch: int
    ) -> tuple[Source, ...]:
        states, size = self.outputs[source], self._group(name)
        groups: Tensor | None = self.base.groups(source, self.rows)
        cross: dict[int, KeyValue] | None = self.base.stacks[name].cross
        if source in self.changed:
            mask = None if mask is None else mask[groups]
            groups = cross = None
        elif self.grad:  # keys and values are made again, so that gradients reach their points
            states, cross = states.detach().requires_grad_(), None
        return tuple(Source(states[turn::size], mask, groups, cross) for turn in range(size))


def _at(x: Tensor, at: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device), at.to(x.device)]
