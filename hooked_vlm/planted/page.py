"""The table of `validate`, for people: on the screen, as Parquet, and as a page of the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from hooked_vlm.planted.failures import FAILURES, Failure
from hooked_vlm.planted.methods import METHODS

BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
COLUMNS = {
    "method": "method",
    "precision": "precision",
    "recall": "recall",
    "rank": "last node's rank (best)",
    "accused": "distractors named",
    "missed": "missed",
    "wrong": "named wrongly",
    "cost": "forward passes",
}
MAPS = {
    "model": "model",
    "method": "method",
    "corrupt": "corrupt",
    "mass": "mass in the shape's cell",
    "pointing": "most of all cells",
    "cost": "forward passes",
}


def table(frame: pd.DataFrame) -> Table:
    """All rows, for a terminal: a section for each model and corruption."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for head in ("", "prec.", "recall", "rank", "accused", "missed", "mass", "passes"):
        made.add_column(head, no_wrap=head != "missed")
    for (model, corrupt), rows in frame.groupby(["model", "corrupt"], sort=False):
        made.add_row(f"[bold]{model}[/]")
        made.add_row(f"[dim]{corrupt} corrupted[/]")
        for row in _rows(rows):
            names = ("method", "precision", "recall", "rank", "accused", "missed", "mass", "cost")
            made.add_row(*(_cell(row, name) for name in names))
        made.add_section()
    return made


def markdown(frame: pd.DataFrame) -> str:
    """The page's part that is made: a summary, and a table for each model and corruption."""
    rankers, maps = (frame[frame["kind"] == kind] for kind in ("ranker", "map"))
    lines = ["## All models together", "", *_summary(rankers)]
    for (model, corrupt), rows in rankers.groupby(["model", "corrupt"], sort=True):
        lines += ["", f"## `{model}`, {corrupt} corrupted", ""]
        lines += _grid(COLUMNS.values(), ([_cell(r, c) for c in COLUMNS] for r in _rows(rows)))
    if len(maps):
        lines += ["", "## Maps", ""]
        lines += _grid(MAPS.values(), ([_cell(r, c) for c in MAPS] for r in _rows(maps)))
    lines += ["", "## Why methods fail", ""]
    for failure in FAILURES:
        rows = frame[failure.covers(frame)]
        if len(rows):
            lines += [_where(failure, rows), "", failure.why, ""]
    return "\n".join(lines).rstrip() + "\n"


def _summary(rankers: pd.DataFrame) -> list[str]:
    heads = ("method", "what it is", "precision", "recall", "distractors named", "forward passes")
    rows = []
    for name, some in rankers.groupby("method", sort=False):
        about = METHODS[str(name)].about.rstrip(".") if name in METHODS else ""
        means = [f"{some[column].mean():.2f}" for column in ("precision", "recall")]
        rows.append([name, about, *means, str(some["accused"].sum()), f"{some['cost'].mean():.1f}"])
    return _grid(heads, rows)


def _where(failure: Failure, rows: pd.DataFrame) -> str:
    models = ", ".join(f"`{name}`" for name in dict.fromkeys(rows["model"]))
    return f"**{', '.join(dict.fromkeys(rows['method']))}**, on {models}:"


def _rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    found: list[dict[str, object]] = frame.to_dict("records")
    return found


def _grid(heads: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    heads = list(heads)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _cell(row: dict[str, object], column: str) -> str:
    value = row[column]
    if isinstance(value, tuple | list):
        shown = [str(one) for one in value]
        few = shown if len(shown) <= 4 else [*shown[:3], f"{len(shown) - 3} more"]
        return ", ".join(f"`{one}`" if "." in one else one for one in few)
    if isinstance(value, float) and value != value:
        return ""
    if column == "rank":
        return f"{value:.0f} ({row['n_nodes']})"
    if column == "cost":
        return f"{value:.1f}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def save(frame: pd.DataFrame, file: str | Path) -> None:
    """Writes the table as Parquet, whole or not at all."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    _replace(file, lambda part: frame.to_parquet(part, index=False))


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file, whole or not at all."""
    part = file.with_name(f"{file.name}.part")
    try:
        write(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def load(file: str | Path) -> pd.DataFrame:
    """A table that was saved."""
    frame = pd.read_parquet(file)
    for column in ("missed", "wrong"):
        frame[column] = frame[column].map(tuple)
    return frame


def check(page: str | Path) -> None:
    """Refuses a page that the table has no place in.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it lacks the marks.
    """
    text = Path(page).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"{str(page)!r} lacks the marks {BEGIN!r} and {END!r}")


def write(frame: pd.DataFrame, page: str | Path) -> None:
    """Puts the table into a page, between its two marks.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it lacks the marks.
    """
    check(page)
    page = Path(page)
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    made = f"{before}{BEGIN}\n\n{markdown(frame)}\n{END}{rest.split(END)[1]}"
    _replace(page, lambda part: part.write_text(made, encoding="utf-8"))
