"""What a run has so far: the parts in its folder, and the items that wait to be in the next."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hooked_vlm.runs.folder import EXCLUDED, PARTS, RESULTS, as_json, sync, write_file
from hooked_vlm.runs.parts import Part, Rows, as_parquet, read_part

SUFFIX, KEY = ".parquet", "item"


class Record:
    """Reads what a run's folder holds, and writes more of it.

    `parts` holds the parts of a run that is going on. At its end they are put together in
    `results.parquet`, which is a part that covers everything, and removed: as long as both are
    there, the parts are the remains. So every number is there once, and `results.parquet` says
    that the run is complete.

    Args:
        folder: the run's folder; its lock is held where anything is written.
        name: the column that holds the items' keys; None for whichever it is.

    Attributes:
        rows: what is in the parts, and what waits to be in the next.
        complete: whether the run came to its end.

    Raises:
        ValueError: keys in another column.
        OSError: a part that cannot be read.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder, self.complete = folder, (folder / RESULTS).is_file()
        files = [folder / RESULTS] if self.complete else self._parts()
        found = [(file, read_part(file)) for file in files]
        column = found[0][1].table.schema.names[0] if found else name or KEY
        if name not in (None, column):
            raise ValueError(
                f"{str(folder)!r} has the items' keys in a column {column!r}, not {name!r}; give "
                f"name={column!r}, or name another folder"
            )
        self.rows = Rows(column)
        for file, part in found:
            fitted = self.rows.fit(part.table, repr(str(file)))
            self.rows.add(Part(fitted, part.covers))
        self._number = max((int(file.stem) + 1 for file in self._parts()), default=0)

    @property
    def excluded(self) -> dict[str, str]:
        """By key why items are excluded."""
        return {key: told for key, told in self.rows.covers.items() if isinstance(told, str)}

    def check(self, keys: Sequence[str]) -> None:
        """Refuses items that are others than those of before.

        Args:
            keys: of all items.

        Raises:
            ValueError: an item that is covered is missing.
        """
        given = set(keys)
        missing = [key for key in self.rows.covers if key not in given]
        if missing:
            some = ", ".join(map(repr, missing[:3])) + (", …" if len(missing) > 3 else "")
            raise ValueError(
                f"{str(self.folder)!r} covers {len(missing)} items that are not among the "
                f"{len(keys)} given: {some}; give the same items and new ones, or name another "
                "folder"
            )

    def begin(self) -> None:
        """Makes ready for more parts: what was complete is the first part then."""
        self.tidy()
        parts = self.folder / PARTS
        parts.mkdir(exist_ok=True)
        if self.complete:
            os.replace(self.folder / RESULTS, self._file())
            self.complete, self._number = False, self._number + 1
            sync(parts)
            (self.folder / EXCLUDED).unlink(missing_ok=True)
        sync(self.folder)

    def write(self) -> None:
        """Writes a part of what waits.

        Raises:
            OSError: it cannot be written; what waits is lost then.
        """
        if not self.rows.waiting:
            return
        part = self.rows.next()
        try:
            write_file(self._file(), as_parquet(part))
        except OSError:
            self.rows.waiting = {}
            raise
        # In this order, so that Ctrl-C between the lines has the part written twice at worst.
        self.rows.waiting = {}
        self.rows.add(part)
        self._number += 1

    def finish(self, keys: Sequence[str]) -> None:
        """Puts the parts together, and removes them.

        Args:
            keys: of all items, in the order that the rows are to have.

        Raises:
            OSError: the table cannot be written; the parts are kept then.
        """
        excluded = self.excluded
        reasons = {key: excluded[key] for key in keys if key in excluded}
        write_file(self.folder / EXCLUDED, as_json(reasons))
        write_file(self.folder / RESULTS, as_parquet(self.rows.whole(keys)))
        self.complete = True
        self.tidy()

    def tidy(self) -> None:
        """Removes the parts of what is complete."""
        if self.complete and (self.folder / PARTS).exists():
            for file in self._parts():
                file.unlink()
            with suppress(OSError):  # somebody else's file is in it
                (self.folder / PARTS).rmdir()
            self._number = 0

    def _file(self) -> Path:
        return self.folder / PARTS / f"{self._number:05}{SUFFIX}"

    def _parts(self) -> list[Path]:
        found = (self.folder / PARTS).glob(f"*{SUFFIX}")
        return sorted((one for one in found if one.stem.isdecimal()), key=lambda one: int(one.stem))
