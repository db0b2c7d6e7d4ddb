"""The sweep: many runs of a model, each with something else written into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import Swept, module_of, parts
from hooked_vlm.patching.interventions import At, Intervention, first_seen
from hooked_vlm.patching.metrics import Metric, as_array
from hooked_vlm.patching.places import Each, Locator, NoSuchPlace, Place, as_place
from hooked_vlm.patching.plan import MOST, Sketched
from hooked_vlm.patching.runs import Inputs, Run

Write = tuple[Site, tuple[int, ...] | None]  # a site, and which of its positions; None for all


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        at: where its value goes, the numbers of the site and of the place.
        writes: what is written.
        start: where it resumes, as `model.order_of` has it.
    """

    at: tuple[int, int]
    writes: tuple[Write, ...]
    start: tuple[int, int, int]

    @property
    def first(self) -> int:
        """The first position that is written."""
        return min(0 if positions is None else min(positions) for _, positions in self.writes)


@dataclass
class Begun:
    """The unpatched run of a pair, to be continued.

    Attributes:
        base: the run.
        locator: finds places in it.
        metric: what is measured.
        weight: what its numbers count.
        pair: the number of the pair.
    """

    base: Base
    locator: Locator
    metric: Metric
    weight: float
    pair: int


@dataclass
class Sweep:
    """What to write where, in which runs.

    Attributes:
        model: the model.
        runs: the pairs or inputs.
        sites: what is swept over.
        places: where each site is written, one after the other; None for the sites' own positions.
        intervention: what is written.
        start: the row that is written to, 0 the clean one.
        max_rows: rows of the largest batch; None for as many as there is room for.
        memory: bytes that batches may take; None for half of what is free.
        excluded: how many cells could not be run, by reason.
        interrupted: whether the user ended it.
        cap: more rows than this did not fit.
    """

    model: HookedVLM
    runs: list[Run]
    sites: list[Swept]
    places: Each | list[Place] | None
    intervention: Intervention
    start: int
    max_rows: int | None = None
    memory: int | None = None
    excluded: Counter[str] = field(default_factory=Counter)
    interrupted: bool = False
    cap: int = MOST

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured, by name."""
        return self.runs[0].metric.names

    @property
    def modules(self) -> list[str]:
        """The points that are written, in order."""
        return list(dict.fromkeys(module_of(s.name) for one in self.sites for s in parts(one)))

    def begin(self, pair: int) -> Iterator[Begun]:
        """Runs a pair, once for each part of its metric.

        Raises:
            ValueError: rows that are no pair.
        """
        run, model, names = self.runs[pair], self.model, self.record()
        inside = all(name.partition(".")[0] in model.stacks for name in self.modules)
        for metric, weight in run.metric.parts():
            inputs = run.inputs()
            if len(metric.continuation) > 1:
                inputs = model.continued(inputs, metric.continuation[:-1])
            keep = max(1, len(metric.continuation)) if inside and not metric.whole else 0
            base = self.unpatched(names, keep, inputs)
            if len(base.logits) != run.n_rows:
                raise ValueError(
                    f"the input gives {len(base.logits)} rows of logits, not {run.n_rows}, one for "
                    "the clean and one for the corrupt run; of a model whose rows are images, it "
                    "needs a corrupt image"
                )
            for name in self.modules:
                if name in names and name not in base.cache:
                    raise ValueError(
                        f"the pass of these inputs does not visit {name!r}; leave it out, or give "
                        "inputs that need it"
                    )
            mask = model.mask_of(inputs, list(model.stacks)[-1])
            padded = mask is not None and not mask[:, -1].all()
            if padded and base.logits.dim() == 3 and not metric.whole:
                raise ValueError(
                    f"input {run.name!r} is padded on the right, and {metric.name} reads the last "
                    "position; prepare it by itself, or pad on the left"
                )
            clean = base.logits[0] if base.logits.dim() < 3 else base.logits[0, -1]
            metric = metric.against(clean.detach())
            locator = Locator(model, base, inputs, self.start, run.roles)
            yield Begun(base, locator, metric, weight, pair)

    def unpatched(self, names: list[str], keep: int, inputs: Inputs) -> Base:
        """The run of a pair, to be continued."""
        names_filter = names or False
        return self.model.base_run(**inputs, names_filter=names_filter, logits_to_keep=keep)

    def record(self) -> list[str]:
        """The points whose activations are kept of unpatched runs."""
        # Patterns are not made for the sake of an intervention that reads none.
        return [n for n in self.modules if self.intervention.reads or not _pattern(n)]

    def cells(self, begun: Begun) -> list[Cell]:
        """The runs to be made of a pair, in the order in which most is reused."""
        places = self._places(begun)
        made = []
        for index, one in enumerate(self.sites):
            start = min(self.model.order_of(site.name) for site in parts(one))
            for number, place in enumerate(places):
                try:
                    writes = tuple(self._write(begun.locator, s, place) for s in parts(one))
                except NoSuchPlace as error:
                    if len(self.runs) == 1 and not isinstance(self.places, Each):
                        raise
                    self.excluded[str(error)] += 1
                    continue
                made.append(Cell((index, number), writes, start))
        return sorted(made, key=lambda cell: (cell.start, cell.first))

    def _places(self, begun: Begun) -> list[Place]:
        if self.places is None:
            return [None]
        if not isinstance(self.places, Each):
            return self.places
        counts = {name: begun.locator.count(name) for name in self.modules}
        fewest = min(counts, key=lambda name: counts[name])
        if not counts[fewest]:
            raise ValueError(f"{fewest!r} has no positions; pass positions=None for its sites")
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"positions='each' needs sites with the same positions; these have "
                f"{', '.join(f'{name!r} {count}' for name, count in counts.items())}"
            )
        return list(self.places.windows(counts[fewest]))

    def _write(self, locator: Locator, site: Site, place: Place) -> Write:
        """A site and its positions.

        Raises:
            NoSuchPlace: the run does not have the place, or has padding there.
        """
        own = as_place(site.position)
        place = place if own is None else own
        if place is None:
            return site, None
        name = module_of(site.name)
        stack, length = locator.stack(name), locator.count(name)
        found = locator.find(place, stack, length, name)
        if isinstance(self.places, Each) and locator.padded(stack, found):
            raise NoSuchPlace("padding stands there")
        return site, found

    def values(self, desc: str | None) -> tuple[np.ndarray, np.ndarray]:
        """Runs all of it.

        Args:
            desc: what the bar says; None for no bar.

        Returns:
            The metrics by [pair, site, place, metric], NaN where a run was not made; and those of
            the unpatched runs, [run, pair, metric].
        """
        found: list[np.ndarray] = []
        n_parts, n_metrics = (len(of) for of in (self.runs[0].metric.parts(), self.metrics))
        room = Sketched(self)
        ends = np.full((self.runs[0].n_rows, len(self.runs), n_metrics), np.nan)
        bar = None
        try:
            for pair in range(len(self.runs)):
                end, terms = np.zeros((len(ends), n_metrics)), np.zeros(())
                for number, begun in enumerate(self.begin(pair)):
                    end += begun.weight * as_array(begun.metric(begun.base.logits))
                    cells = self.cells(begun)
                    if bar is None:
                        total = len(cells) * len(self.runs) * n_parts
                        bar = tqdm(total=total, desc=desc, unit="run", disable=desc is None)
                    if number == 0:  # a value counts when all parts of the metric are there
                        n_places = len(self._places(begun))
                        shape = n_parts, len(self.sites), n_places, n_metrics
                        terms = np.full(shape, np.nan)
                        found.append(terms)
                    if number == n_parts - 1:
                        ends[:, pair] = end
                    room.begun = begun
                    for batch in self.batches(cells, room.most):
                        numbers = self._numbers(begun, batch)
                        for cell, value in zip(batch, numbers, strict=True):
                            terms[(number, *cell.at)] = value * begun.weight
                        bar.update(len(batch))
        except KeyboardInterrupt:
            if not any(np.isfinite(one.sum(0)).any() for one in found):
                raise
            self.interrupted = True
        finally:
            if bar is not None:
                bar.close()
        return _stacked([one.sum(0) for one in found], len(self.runs)), ends

    def batches(self, cells: list[Cell], most: Callable[[Cell], int]) -> Iterator[list[Cell]]:
        """Cells that resume at the same door together, as many at a time as there is room for."""
        for _, group in groupby(cells, key=lambda cell: cell.start):
            left = list(group)
            while left:
                n = min(most(left[0]), self.cap)
                yield left[:n]
                left = left[n:]

    def _numbers(self, begun: Begun, batch: list[Cell]) -> list[Any]:
        """The metrics of each of the batch's runs, in smaller batches where it is too large.

        Raises:
            MemoryError: there is no room for one.
        """
        found: list[Any] = []
        while len(found) < len(batch):
            some = batch[len(found) : len(found) + self.cap]
            try:
                found += list(as_array(begun.metric(self.logits(begun, some))))
                continue
            except (MemoryError, RuntimeError) as error:
                if not _no_room(error):
                    raise
                if len(some) == 1:
                    sites = ", ".join(site.name for site, _ in some[0].writes[:3])
                    raise MemoryError(f"there is no room to run {sites} once: {error}") from error
            self.cap = (len(some) + 1) // 2
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
        return found

    def logits(self, begun: Begun, batch: Sequence[Cell]) -> Tensor:
        """Logits of the batch's runs, row by row."""
        hooks, sites = self.written(begun, batch)
        return self.model.resume(
            begun.base, list(sites), rows=[self.start] * len(batch), fwd_hooks=hooks
        )

    def written(
        self, begun: Begun, batch: Sequence[Cell]
    ) -> tuple[list[tuple[str, Callable[..., Tensor]]], set[Site]]:
        """The hooks that write what a batch's cells say, and the sites where they do."""
        by_module: dict[str, list[tuple[int, Write]]] = {}
        for row, cell in enumerate(batch):
            for write in cell.writes:
                by_module.setdefault(module_of(write[0].name), []).append((row, write))
        hooks = [(name, self._writer(begun, name, writes)) for name, writes in by_module.items()]
        return hooks, {
            Site.parse(module_of(site.name), None if positions is None else min(positions))
            for cell in batch
            for site, positions in cell.writes
        }

    def rows_of(self, begun: Begun, name: str) -> list[Tensor]:
        """For each row of a run's logits the rows of a point's activation that belong to it."""
        stack = self.model.stack_of(name)
        numbers = torch.arange(len(begun.base.logits), device=self.model.device)
        return [begun.base.rows(stack, one[None]) for one in numbers]

    def _writer(
        self, begun: Begun, name: str, writes: list[tuple[int, Write]]
    ) -> Callable[..., Tensor]:
        """A hook that writes into each row of a batch what its cell says."""
        base, begin_row, rows = begun.base, self.start, self.rows_of(begun, name)
        size = len(rows[begin_row])

        def runs(other: bool) -> Tensor:
            row = 1 - begin_row if other else begin_row
            if row >= len(rows):
                raise ValueError(
                    f"{self.intervention.name!r} reads the other run of a pair; give pairs"
                )
            if name not in base.cache:
                raise ValueError(
                    f"{self.intervention.name!r} reads the unpatched runs: make it with reads=True"
                )
            return base.cache[name][rows[row]]

        def write(activation: Tensor, hook: HookPoint) -> Tensor:
            begin = first_seen(hook)
            shape = [size, *activation.shape[1:]]
            if hook.pos_dim is not None and hook.pos_dim < len(shape):
                shape[hook.pos_dim] += begin
            for row, (site, positions) in writes:
                at = At(site, hook, positions, tuple(shape), begun.pair, begun.locator, runs)
                there = activation[row * size : (row + 1) * size]
                index = at.index(begin)
                value = there[index]
                new = self.intervention.of(value, at)
                if not isinstance(new, Tensor) or new.shape != value.shape:
                    given = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
                    raise ValueError(
                        f"{self.intervention.name!r} gives {given} at {site.name!r}, where "
                        f"{list(value.shape)} stands"
                    )
                there[index] = new
            return activation

        return write


def _pattern(name: str) -> bool:
    return ".blocks." in name and name.endswith(("hook_pattern", "hook_attn_scores"))


def _no_room(error: Exception) -> bool:
    """Whether an error says that memory is short."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in said


def _stacked(found: list[np.ndarray], n_runs: int) -> np.ndarray:
    """Values of all pairs, NaN where a pair has fewer places than another, or was not reached."""
    widest = max(one.shape[1] for one in found)
    values = np.full((n_runs, len(found[0]), widest, found[0].shape[2]), np.nan)
    for pair, one in enumerate(found):
        values[pair, :, : one.shape[1]] = one
    return values
