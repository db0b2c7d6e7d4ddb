"""The rows of a run: checked item by item, written in parts, put together at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

TOLD = b"hooked_vlm"  # in a file's metadata: what it covers, with a checksum

Outcome = int | str  # how many rows an item has, or why it was excluded


@dataclass(frozen=True)
class Part:
    """The rows of some items.

    Attributes:
        table: the rows, those of an item together; the first column holds the item's key.
        covers: by key how many rows each item has, or why it was excluded; in the rows' order.
    """

    table: pa.Table
    covers: dict[str, Outcome]


# --- on the disk


def as_parquet(part: Part) -> bytes:
    """A Parquet file of it, in which checksums cover the values, the columns, and what it covers.

    Without dictionaries, whose pages pyarrow does not check on reading.
    """
    file = io.BytesIO()
    told = json.dumps({"columns": _columns(part.table), "covers": part.covers})
    told = f"{crc32(told.encode()):08x} {told}"
    table = part.table.replace_schema_metadata({TOLD: told})
    pq.write_table(table, file, write_page_checksum=True, use_dictionary=False, compression="zstd")
    return file.getvalue()


def read_part(file: Path) -> Part:
    """Reads what `as_parquet` made.

    Raises:
        FileNotFoundError: it is not there.
        OSError: it is cut short, changed, or of something else.
    """
    try:
        table = pq.read_table(io.BytesIO(file.read_bytes()), page_checksum_verification=True)
        crc, told = table.schema.metadata[TOLD].decode().split(" ", 1)
        if int(crc, 16) != crc32(told.encode()):
            raise ValueError("what it says of itself was changed")
        about = json.loads(told)
        if about["columns"] != _columns(table):
            raise ValueError(f"its columns are not {about['columns']}")
        n = sum(told for told in about["covers"].values() if isinstance(told, int))
        if n != len(table):
            raise ValueError(f"it has {len(table)} rows, not {n}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise OSError(
            f"{str(file)!r} cannot be read, it may be cut short ({error}); delete it and run the "
            "same command again, which makes its rows anew"
        ) from error
    return Part(table.replace_schema_metadata(None), about["covers"])


def _columns(table: pa.Table) -> dict[str, str]:
    return {column.name: str(column.type) for column in table.schema}


# --- the rows of an item


def as_table(frame: object, key: str, name: str) -> pa.Table:
    """An item's rows, with its key in front.

    Texts, categories and lists are of one Arrow type each, whichever one pandas had them in.

    Args:
        frame: what `work` gave.
        key: the item's.
        name: of the column that holds the key; it may be there already.

    Raises:
        TypeError: no DataFrame.
        ValueError: one that would lose something in a table of plain columns.
    """
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(
            f"work gave a {type(frame).__name__} for item {key!r}; return a pandas.DataFrame, or "
            "raise runs.Excluded(reason)"
        )
    strange = [column for column in frame.columns if not isinstance(column, str)]
    if strange:
        raise ValueError(f"the rows of item {key!r} have a column {strange[0]!r}; name it by a str")
    if not len(frame.columns):
        raise ValueError(
            f"the rows of item {key!r} have no columns; where there is nothing to tell, return no "
            "rows in the columns of the others, or raise runs.Excluded(reason)"
        )
    if name in frame.columns and not (frame[name] == key).all():
        raise ValueError(
            f"the rows of item {key!r} have something else in the column {name!r}, which is to "
            "hold the item's key; rename it, or give go another name="
        )
    if frame.index.names != [None] or not (
        len(frame) == 0 or pd.api.types.is_integer_dtype(frame.index)
    ):
        raise ValueError(
            f"the rows of item {key!r} have an index that says something and would be lost; make "
            "it a column: frame.reset_index()"
        )
    try:
        frame = frame.drop(columns=name, errors="ignore")
        table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
        table = table.cast(pa.schema([(one.name, _plain(one.type)) for one in table.schema]))
    except (ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"the rows of item {key!r} do not make a table: {error}") from error
    return table.add_column(0, name, pa.array([key] * len(table), pa.large_string()))


def _plain(kind: pa.DataType) -> pa.DataType:
    is_ = pa.types
    if is_.is_dictionary(kind):
        return _plain(kind.value_type)
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return pa.large_string()
    if is_.is_list(kind) or is_.is_large_list(kind) or is_.is_fixed_size_list(kind):
        return pa.large_list(_plain(kind.value_type))
    return kind


def _common(was: pa.DataType, now: pa.DataType) -> pa.DataType | None:
    """The type for both, whichever comes first; None where there is none.

    Columns without any value fit all, and whole numbers fit among floats: pandas makes the one of
    None and the other of 1 where another item has 0.5.
    """
    if was == now or pa.types.is_null(now):
        return was
    if pa.types.is_null(was):
        return now
    if {was, now} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_large_list(was) and pa.types.is_large_list(now):
        inner = _common(was.value_type, now.value_type)
        return None if inner is None else pa.large_list(inner)
    return None


# --- of all of them


class Rows:
    """The parts so far and the items for the next, in columns whose types fit all of them.

    Args:
        name: of the column that holds the items' keys.

    Attributes:
        parts: the parts, in the order in which they were made.
        covers: what they cover.
        waiting: the items for the next, by key their rows, or why they are excluded.
    """

    def __init__(self, name: str):
        self.parts: list[Part] = []
        self.covers: dict[str, Outcome] = {}
        self.waiting: dict[str, pa.Table | str] = {}
        self._schema = pa.schema([(name, pa.large_string())])

    @property
    def name(self) -> str:
        """The column that holds the items' keys."""
        return str(self._schema.names[0])

    def take(self, key: str, outcome: pa.Table | str) -> None:
        """Has an item wait.

        Args:
            key: the item's.
            outcome: its rows, as `as_table` makes them, or why it is excluded.

        Raises:
            ValueError: rows of other columns or types than those before.
        """
        if not isinstance(outcome, str):
            outcome = self.fit(outcome, f"item {key!r}")
        self.waiting[key] = outcome

    def fit(self, table: pa.Table, of: str) -> pa.Table:
        """A table with the columns of all others, of types that fit it and all others.

        Args:
            table: as `as_table` makes it.
            of: what errors call it.

        Raises:
            ValueError: other columns, or a column of another type.
        """
        if len(table.schema) == 1:  # of items that were all excluded
            return table
        if len(self._schema) == 1:  # the first that has rows
            self._schema = table.schema
        was, now = self._schema.names, table.schema.names
        if sorted(was) != sorted(now):
            differ = {*was} ^ {*now}
            told = ", ".join(map(repr, sorted(differ)))
            raise ValueError(
                f"{of} has other columns than those before: {told} "
                f"{'is' if len(differ) == 1 else 'are'} in one and not in the other; give every "
                "item's rows the same columns"
            )
        table = table.select(was)
        schema = pa.schema([self._fit(column, table.schema, of) for column in was])
        if schema != self._schema:  # before anything is changed: may what is there take it on?
            for one in (*(part.table for part in self.parts), *self._tables()):
                if len(one):
                    _cast(one, schema, of)
        fitted = _cast(table, schema, of)
        self._schema = schema
        return fitted

    def _fit(self, column: str, schema: pa.Schema, of: str) -> pa.Field:
        was, now = (one.field(column).type for one in (self._schema, schema))
        common = _common(was, now)
        if common is None:
            raise ValueError(
                f"column {column!r} of {of} is of type {now}, and {was} before; give it the same "
                "type for every item"
            )
        return pa.field(column, common)

    def add(self, part: Part) -> None:
        """Takes a part, whose table has been fitted.

        Raises:
            ValueError: it covers an item that another part covers.
        """
        twice = self.covers.keys() & part.covers.keys()
        if twice:
            raise ValueError(f"item {min(twice)!r} is in two parts")
        self.parts.append(part)
        self.covers |= part.covers

    def next(self) -> Part:
        """A part of the items that wait; they go on waiting."""
        items = self.waiting.items()
        covers = {key: one if isinstance(one, str) else len(one) for key, one in items}
        return Part(self._joined(self._tables()), covers)

    def _tables(self) -> list[pa.Table]:
        return [one for one in self.waiting.values() if not isinstance(one, str)]

    def whole(self, keys: Sequence[str] | None = None) -> Part:
        """All parts as one.

        Args:
            keys: the items' keys, in the order in which they are wanted; None for that in which
                they were made.
        """
        table, covers = self._joined([part.table for part in self.parts]), self.covers
        if keys is not None and list(keys) != list(covers):
            places, at = {}, 0
            for key, outcome in covers.items():
                n = 0 if isinstance(outcome, str) else outcome
                places[key] = np.arange(at, at + n)
                at += n
            table = table.take(np.concatenate([places[key] for key in keys]))
            covers = {key: covers[key] for key in keys}
        return Part(table.combine_chunks(), covers)

    def _joined(self, tables: Iterable[pa.Table]) -> pa.Table:
        full = (one.cast(self._schema) for one in tables if len(one))
        return pa.concat_tables([self._schema.empty_table(), *full])


def _cast(table: pa.Table, schema: pa.Schema, of: str) -> pa.Table:
    try:
        return table.cast(schema)
    except pa.ArrowException as error:
        raise ValueError(
            f"{of} makes a column of floats of one of whole numbers, and not all of these are "
            f"floats; make it floats from the first item on ({error})"
        ) from error
