"""What a reader or a builder did: how many rows it kept, and why it left out the others."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

OnBad = Literal["raise", "drop"]
SHOWN = 3  # names of rows that a report gives for each reason


class BadRow(ValueError):
    """A row that cannot be used.

    Args:
        reason: what reports count it under.
        message: what its error says; the reason, where that says all.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or reason)
        self.reason = reason


class LeftOut(BadRow):
    """A row with nothing wrong that is not asked for: it is counted, and never an error."""


@dataclass(frozen=True)
class Report:
    """How many rows were kept, and how many dropped for which reason.

    A row is what could have become one result: a choice, a question, a pair.

    Attributes:
        kept: how many were kept.
        dropped: how many were dropped, by reason.
        names: the names of the first of them, by reason.

    Example:
        >>> one = Report(8, {"image not there": 2}, {"image not there": ("line 3", "line 7")})
        >>> print(one)
        kept 8 of 10 rows
          2 dropped, image not there: line 3, line 7
        >>> (one + one).read, (one + one).dropped
        (20, {'image not there': 4})
    """

    kept: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def read(self) -> int:
        """How many rows there were."""
        return self.kept + sum(self.dropped.values())

    def __add__(self, other: Report) -> Report:
        """The report of both, which were of different rows."""
        dropped, names = Counter(self.dropped), dict(self.names)
        dropped.update(other.dropped)
        for reason, more in other.names.items():
            names[reason] = (*names.get(reason, ()), *more)[:SHOWN]
        return Report(self.kept + other.kept, dict(dropped), names)

    def then(self, stage: Report) -> Report:
        """The report of this and of a later stage that got the rows that were kept here.

        Raises:
            ValueError: the stage got another number of rows.
        """
        if stage.read != self.kept:
            raise ValueError(
                f"{self.kept} rows were kept and the next stage got {stage.read}; reports of "
                "different rows are added with +"
            )
        return self + replace(stage, kept=stage.kept - self.kept)

    def __str__(self) -> str:
        lines = [f"kept {self.kept} of {self.read} rows"]
        for reason, count in self.dropped.items():
            named = list(self.names.get(reason, ()))
            more = [] if count <= len(named) or not named else ["..."]
            shown = f": {', '.join(named + more)}" if named else ""
            lines.append(f"  {count} dropped, {reason}{shown}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": {
                reason: {"count": count, "first": list(self.names.get(reason, ()))}
                for reason, count in self.dropped.items()
            },
        }


class Rows:
    """Counts rows while they are read.

    Args:
        on_bad: `raise` refuses the first bad row, `drop` leaves bad rows out.
        source: the file or folder that they are of, for errors.
        way_out: what the error of a bad row says besides.

    Raises:
        ValueError: another `on_bad`.

    Example:
        >>> rows, kept = Rows("drop"), []
        >>> for name, cell in {"line 2": "4", "line 3": "four"}.items():
        ...     with rows.row(name):
        ...         if not cell.isdigit():
        ...             raise BadRow("no number", f"{cell!r} is no number")
        ...         kept.append(int(cell))
        >>> print(rows.report())
        kept 1 of 2 rows
          1 dropped, no number: line 3
    """

    def __init__(
        self,
        on_bad: OnBad,
        source: Path | None = None,
        way_out: str = "; on_bad='drop' leaves such rows out",
    ):
        if on_bad not in ("raise", "drop"):
            raise ValueError(f"on_bad is 'raise' or 'drop', not {on_bad!r}")
        self.on_bad = on_bad
        self.source = source
        self.way_out = way_out
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.names: defaultdict[str, list[str]] = defaultdict(list)

    @contextmanager
    def row(self, name: str, keeps: bool = True) -> Iterator[None]:
        """One row, which is kept unless a `BadRow` is raised inside.

        Args:
            name: of the row, for the error and the report.
            keeps: False where a later step decides whether a good row is kept.

        Raises:
            ValueError: a bad row, if these are not dropped; the message begins with the source
                and the name.
        """
        try:
            yield
        except BadRow as bad:
            if self.on_bad == "raise" and not isinstance(bad, LeftOut):
                where = name if self.source is None else f"{self.source}, {name}"
                raise ValueError(f"{where}: {bad}{self.way_out}") from bad
            self.dropped[bad.reason] += 1
            if len(self.names[bad.reason]) < SHOWN:
                self.names[bad.reason].append(name)
        else:
            self.kept += keeps

    def report(self, of: str = "rows") -> Report:
        """What was counted.

        Args:
            of: what the source should have held.

        Raises:
            ValueError: a source of which nothing was kept.
        """
        names = {reason: tuple(first) for reason, first in self.names.items()}
        report = Report(self.kept, dict(self.dropped), names)
        if self.source is not None and not self.kept:
            why = f" that can be used: {report}" if report.read else ""
            raise ValueError(f"{self.source} holds no {of}{why}")
        return report
