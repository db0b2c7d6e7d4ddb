"""The sweep of a causal trace: restorations of many sites, in the runs of several draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from hooked_vlm.methods.noise import Corruption
from hooked_vlm.methods.spread import Spread
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.patching.cells import Swept, module_of, parts
from hooked_vlm.patching.engine import Begun, Cell, Sweep
from hooked_vlm.patching.places import Each, NoSuchPlace, Place
from hooked_vlm.patching.runs import Inputs

FEW = 256  # tokens of a pass that take no longer than one


@dataclass
class Seen:
    """What is learned of an example while it is traced.

    Attributes:
        top: the token, or class, that the clean run finds most likely.
        words: whether it is a token.
        tokens: by stack the tokens that stand at its positions, where there are any and a
            processor knows them.
        certain: by the numbers of a cell's site and place whether it is the clean run by
            construction.
    """

    top: int
    words: bool
    tokens: dict[str, list[str]]
    certain: dict[tuple[int, int], bool] = field(default_factory=dict)


@dataclass
class TraceSweep(Sweep):
    """A sweep whose pairs have one corrupt row for each draw of noise.

    The places of a cell are counted through all draws: place 0 in each draw, then place 1.

    Attributes:
        corruption: makes the rows.
        seen: by the number of the example.
        lengths: of the stacks of the example that is run, in their order.
    """

    corruption: Corruption = field(kw_only=True)
    seen: dict[int, Seen] = field(default_factory=dict, kw_only=True)
    lengths: list[int] = field(default_factory=list, kw_only=True)

    def begin(self, pair: int) -> Any:
        """Runs an example; see `Sweep.begin`."""
        self.corruption.begin(self.runs[pair].name)
        for begun in super().begin(pair):
            if pair not in self.seen and begun.base.logits.device.type != "meta":  # of a plan
                self.seen[pair] = _seen(self.model, begun)
            yield begun

    def unpatched(self, names: list[str], keep: int, inputs: Inputs) -> Base:
        """The clean row and the corrupt ones."""
        self.corruption.rows = list(range(self.corruption.n_rows))
        return super().unpatched(names, keep, inputs)

    def logits(self, begun: Begun, batch: Sequence[Cell]) -> Tensor:
        """Logits of the batch's runs, each in its draw."""
        rows = [1 + cell.at[1] % self.corruption.draws for cell in batch]
        self.corruption.rows = rows
        hooks, sites = self.written(begun, batch)
        return self.model.resume(begun.base, list(sites), rows=rows, fwd_hooks=hooks)

    def cells(self, begun: Begun) -> list[Cell]:
        """The runs to be made of an example, in the order in which most is reused.

        Sites of several stacks have their own positions each.

        Raises:
            NoSuchPlace: the only example has a place nowhere.
        """
        draws, made = self.corruption.draws, []
        missing: dict[int, list[NoSuchPlace]] = {}
        found: set[int] = set()
        spread = Spread(self.model, begun, self.corruption.on)
        known = self.seen[begun.pair].certain if begun.pair in self.seen else {}
        stacks = begun.base.stacks.values()
        self.lengths = [next(iter(kept.doors.values())).shape[1] for kept in stacks]
        for index, one in enumerate(self.sites):
            start = min(self.model.order_of(site.name) for site in parts(one))
            for number, place in enumerate(self._own(begun, one)):
                try:
                    writes = tuple(self._write(begun.locator, s, place) for s in parts(one))
                except NoSuchPlace as error:
                    missing.setdefault(number, []).append(error)
                    continue
                found.add(number)
                cell = index, number  # of each part of a metric
                known[cell] = known.get(cell, True) and not spread.reaches(writes)
                made += [Cell((index, number * draws + at), writes, start) for at in range(draws)]
        for number, errors in missing.items():
            if number not in found and len(self.runs) == 1 and not isinstance(self.places, Each):
                raise errors[0]
            self.excluded += Counter(map(str, errors))
        return sorted(made, key=lambda cell: (cell.start, cell.first))

    def batches(self, cells: list[Cell], most: Callable[[Cell], int]) -> Iterator[list[Cell]]:
        """Cells that run together, as many at a time as there is room for.

        Rows of a draw stand together, so that they share its keys and values.
        """
        draws = self.corruption.draws
        for group in self._doors(cells):
            left = group
            while left:
                n = min(most(left[0]), self.cap)
                n = n // draws * draws or n
                yield sorted(left[:n], key=lambda cell: cell.at[1] % draws)
                left = left[n:]

    def _doors(self, cells: list[Cell]) -> list[list[Cell]]:
        """Cells by the door at which they resume; those of several doors where they are few.

        A cell that begins at an earlier door computes more, but a pass of few tokens takes as long
        as its weights take to be read.
        """
        groups: list[list[Cell]] = []
        for _, of in groupby(cells, key=lambda cell: cell.start):
            group = list(of)
            alike = groups and groups[-1][0].start[0] == group[0].start[0]
            if alike and self._tokens(groups[-1]) + self._tokens(group) <= FEW:
                groups[-1] += group
            else:
                groups.append(group)
        return groups

    def _tokens(self, cells: list[Cell]) -> int:
        """How many positions the rows of cells compute, of a causal stack from the first on."""
        number = cells[0].start[0]
        causal = getattr(list(self.model.stacks.values())[number].cfg, "causal", False)
        first = min(cell.first for cell in cells) if causal else 0
        return len(cells) * (self.lengths[number] - first)

    def _own(self, begun: Begun, one: Swept) -> list[Place]:
        """The places of a site."""
        if self.places is None:
            return [None]
        if not isinstance(self.places, Each):
            return self.places
        counts = {s.name: begun.locator.count(module_of(s.name)) for s in parts(one)}
        name = min(counts, key=lambda name: counts[name])
        if not counts[name]:
            raise ValueError(f"{name!r} has no positions; pass positions=None for its sites")
        return list(self.places.windows(counts[name]))

    def _places(self, begun: Begun) -> list[Place]:
        most = max((self._own(begun, one) for one in self.sites), key=len)
        if not most:
            raise ValueError(
                f"{self.places} has no place in example {self.runs[begun.pair].name!r}"
            )
        return [place for place in most for _ in range(self.corruption.draws)]


def _seen(model: HookedVLM, begun: Begun) -> Seen:
    """The clean run's answer, and the tokens of its texts."""
    logits, inputs = begun.base.logits[0], begun.locator.inputs
    tokens: dict[str, list[str]] = {}
    first, *others = [name for name in model.stacks if name != next(iter(model.stacks))]
    if model.processor is not None:
        special = set(model.tokenizer.all_special_tokens)
        tokens[first] = _named(model.to_str_tokens(inputs["input_ids"][0]), special, first)
        for name in others:
            ids = inputs.get("decoder_input_ids")
            words = [""] if ids is None else model.to_str_tokens(ids[0])
            tokens[name] = _named(words, special, name)
    last = logits if logits.dim() == 1 else logits[-1]
    return Seen(int(last.argmax()), logits.dim() > 1, tokens)


def _named(tokens: list[str], special: set[str], stack: str) -> list[str]:
    """Tokens as rows of a map: `[start]`, words, `[end]`; an answer begins with `[decode]`."""
    words = [token.replace("\u2581", " ").replace("\u0120", " ").strip() for token in tokens]
    if stack == "decoder":
        words[0] = "[decode]"
    elif tokens[0] in special:
        words[0] = "[start]"
    if len(tokens) > 1 and tokens[-1] in special:
        words[-1] = "[end]"
    return words
