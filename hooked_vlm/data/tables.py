"""Rows of CSV and JSONL files, each with the number of its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from hooked_vlm.data.report import BadRow

Row = Mapping[Any, Any]
TOO_MANY = "more cells than columns; quote a text that has commas"


def read_table(file: str | Path, columns: Collection[str] = ()) -> Iterator[tuple[int, Row]]:
    """The rows of a file that has these columns and no bad line.

    Args:
        file: a CSV or JSONL file.
        columns: those that every row must have.

    Raises:
        ValueError: as `table_rows`, or a bad row, by its line.
    """
    for number, row in table_rows(Path(file), columns):
        if isinstance(row, BadRow):
            raise ValueError(f"{file}, line {number}: {row}")
        yield number, row


def table_rows(
    file: Path, columns: Collection[str] = ()
) -> Iterator[tuple[int, Mapping[Any, Any] | BadRow]]:
    """The rows, each with the number of its line, the last one where it spans several.

    Args:
        file: a CSV or JSONL file in UTF-8. Cells that a line of a CSV lacks are empty.
        columns: those that the file must have; others may be there.

    Yields:
        The number of a line, and its cells by column, or what is wrong with the line.

    Raises:
        ValueError: a file of another kind, no text, no CSV, or one that lacks a column.
    """
    if file.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{file} is neither .csv nor .jsonl")
    with file.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets write a mark
        try:
            yield from (
                _csv(file, lines, columns) if file.suffix == ".csv" else _jsonl(lines, columns)
            )
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def cell(row: Row, column: str) -> str:
    """What stands in a column, without space around it; nothing where a JSON has null."""
    value = row[column]
    return "" if value is None else str(value).strip()


def _csv(file: Path, lines: TextIO, columns: Collection[str]) -> Iterator[tuple[int, Row | BadRow]]:
    reader = csv.DictReader(lines, strict=True, restval="")
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        if missing := [name for name in columns if name not in header]:
            held = f"it has {', '.join(map(repr, header))}" if header else "it is empty"
            raise ValueError(f"{file} has no column {', '.join(map(repr, missing))}; {held}")
        if twice := {name for name in header if header.count(name) > 1}:
            raise ValueError(f"{file} has the column {sorted(twice)[0]!r} twice")
        reader.fieldnames = header
        for row in reader:
            if None in row:
                yield reader.line_num, BadRow("more cells than columns", TOO_MANY)
            else:
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: no CSV: {error}") from error


def _jsonl(lines: TextIO, columns: Collection[str]) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, BadRow("no JSON", f"no JSON: {error}")
            continue
        if not isinstance(row, dict):
            yield number, BadRow("no JSON object")
        elif missing := [name for name in columns if name not in row]:
            yield number, BadRow(f"no key {missing[0]!r}")
        else:
            yield number, row
