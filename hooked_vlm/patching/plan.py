"""What a sweep will cost, before it runs: its own code, on shapes alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hooked_vlm.components.memory import free
from hooked_vlm.models.sketch import Work, measured, peak, sketch

if TYPE_CHECKING:
    from hooked_vlm.models.flow import Base
    from hooked_vlm.patching.engine import Begun, Cell, Sweep

MOST = 64  # rows of a batch; more of them gain nothing
MANY = 2**10  # times what is kept of a run, no single run of a transformer takes


@dataclass(frozen=True)
class Plan:
    """The cost of a sweep.

    Attributes:
        runs: how many runs it makes besides those of the pairs themselves.
        forward_macs: multiplications with an addition of one forward pass of one row, without
            what rows share, such as the texts of a CLIP.
        macs: those of the sweep.
        loop_macs: those of one full pass for each run, and those of the pairs.
        memory: bytes of activations, of a pair's kept run and of the largest batch.
        max_rows: rows of the largest batch.
    """

    runs: int
    forward_macs: int
    macs: int
    loop_macs: int
    memory: int
    max_rows: int

    @property
    def forward_equivalents(self) -> float:
        """How many forward passes of one row the sweep is worth."""
        return self.macs / self.forward_macs

    @property
    def speedup(self) -> float:
        """How many times less a sweep computes than a loop of full passes."""
        return self.loop_macs / self.macs

    def __str__(self) -> str:
        return (
            f"{self.runs} runs in {self.forward_equivalents:.2f} forward passes "
            f"({self.speedup:.0f} times less than a loop), {self.memory / 2**20:.0f} MiB, "
            f"batches of {self.max_rows}"
        )


class Sketched:
    """A sweep on shapes: what its passes take.

    Args:
        sweep: the sweep. Its intervention is left out: it would compute with numbers.

    Attributes:
        begun: the pair that is run, by the sweep itself or its sketch.
    """

    def __init__(self, sweep: Sweep):
        self.limit = free(sweep.model.device) // 2 if sweep.memory is None else sweep.memory
        self.given = sweep.max_rows
        self._of = sweep
        self._room: dict[Any, int] = {}
        self.begun: Begun | None = None

    @cached_property
    def sweep(self) -> Sweep:
        """The sweep, of the model's sketch."""
        return replace(
            self._of,
            model=sketch(self._of.model),
            intervention=replace(self._of.intervention, of=lambda value, at: value),
            excluded=Counter(),
        )

    def most(self, cell: Cell) -> int:
        """How many runs like one there is room for at a time.

        Raises:
            MemoryError: there is no room for one.
        """
        if self.given is not None:
            return self.given
        assert self.begun is not None
        if self._of.memory is None and held(self.begun.base) * MANY * MOST < self.limit:
            return MOST
        kind = self._shapes, tuple(dict.fromkeys(site.component for site, _ in cell.writes))
        if kind not in self._room:  # the first of a kind begins the earliest and takes the most
            self._room[kind] = self._fitting(cell)
        return self._room[kind]

    @property
    def _shapes(self) -> tuple[Any, ...]:
        assert self.begun is not None
        inputs = self.begun.locator.inputs
        return tuple((key, tuple(value.shape)) for key, value in inputs.items())

    def _fitting(self, cell: Cell) -> int:
        kept, one, all_of_them = self._needs(cell)
        if kept + one > self.limit:
            raise MemoryError(
                f"{(kept + one) / 2**20:.1f} MiB are needed to run {cell.writes[0][0].name!r} once "
                f"({kept / 2**20:.1f} for the kept run), and {self.limit / 2**20:.1f} may be used: "
                "give more memory="
            )
        # The peak is the largest of several straight lines, so a chord lies above it.
        each = max(1.0, (all_of_them - one) / (MOST - 1))
        return min(MOST, 1 + int((self.limit - kept - one) / each))

    def _needs(self, cell: Cell) -> tuple[int, int, int]:
        """Bytes of the kept run, and of a batch of one and of `MOST` such cells; found once."""
        assert self.begun is not None
        sweep = self.sweep
        key = self._shapes, cell.writes, tuple(sweep.record())
        known: dict[Any, tuple[int, int, int]] = vars(sweep.model).setdefault("_needs", {})
        if key not in known:
            begun, work = next(sweep.begin(self.begun.pair)), Work()
            peaks = []
            for n in (1, MOST):
                with peak(work):
                    sweep.logits(begun, [cell] * n)
                peaks.append(work.peak)
            known[key] = held(begun.base), peaks[0], peaks[1]
        return known[key]

    def plan(self) -> Plan:
        """The cost of the whole; every pair counts as the first."""
        sweep, n = self.sweep, len(self.sweep.runs)
        macs = loop = memory = rows = runs = forward = 0
        passes = sweep.begin(0)
        while True:
            with measured() as work:
                begun = next(passes, None)
            if begun is None:
                break
            macs += work.macs
            self.begun = begun
            cells = sweep.cells(begun)
            forward = self._forward(begun)
            for batch in sweep.batches(cells, self.most):
                with measured() as made:
                    sweep.logits(begun, batch)
                macs += made.macs
                rows = max(rows, len(batch))
                memory = max(memory, held(begun.base) + made.peak)
            runs += len(cells)
            loop += forward * (len(cells) + sweep.runs[0].n_rows)
        return Plan(runs * n, forward, macs * n, loop * n, memory, rows)

    def _forward(self, begun: Begun) -> int:
        """The work of a pass of one row; of what rows share, nothing."""
        model = self.sweep.model
        first = next(name for name in model.hook_dict if name.partition(".")[0] in model.stacks)
        base = replace(begun.base, logits_to_keep=0)  # a plain pass makes them all
        with measured() as work:
            model.resume(base, first, rows=[self.sweep.start])
        return work.macs


def held(base: Base) -> int:
    """Bytes that a base keeps, each tensor's memory counted once."""
    tensors = [base.logits, *base.cache.cache_dict.values()]
    for kept in base.stacks.values():
        tensors += [kept.output, *kept.doors.values()]
        tensors += [one for pair in (*kept.cross.values(), *kept.own.values()) for one in pair]
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())
