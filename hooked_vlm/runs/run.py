"""Runs: a method over the items of a data set, into a folder, which may be stopped at any time."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import FrameType, TracebackType
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
from filelock import FileLock
from tqdm.auto import tqdm

from hooked_vlm.runs import folder as files
from hooked_vlm.runs.ahead import ahead
from hooked_vlm.runs.parts import as_table
from hooked_vlm.runs.record import Record

Item = TypeVar("Item")


class Excluded(Exception):
    """Raised by `work` or `prepare`: the item has no rows, and the run tells why and goes on.

    Args:
        reason: why, in words.

    Raises:
        ValueError: no reason.
    """

    def __init__(self, reason: str):
        if not reason:
            raise ValueError("an item is excluded for a reason: Excluded('its image is missing')")
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Loaded:
    """What a run's folder holds.

    Attributes:
        config: the configuration.
        provenance: what the numbers are made with; under `resumed`, for each time that the run was
            gone on with, what had changed.
        table: the rows; those of an unfinished run are in the order in which they were made.
        excluded: the excluded items, with the reasons.
        complete: whether the run came to its end.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    table: pd.DataFrame
    excluded: pd.DataFrame
    complete: bool


class Run:
    """A run's folder while it is held; `open_run` makes it. A context that closes it.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path, lock: FileLock, changed: dict[str, Any]):
        self.folder = folder
        self._lock, self._changed = lock, changed

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}{'' if self.complete else ', not complete'})"

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._lock.is_locked:
            files.forget_empty(self.folder)
        self.close()

    @property
    def complete(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / files.RESULTS).is_file()

    def close(self) -> None:
        """Gives the folder's lock back; closing twice does nothing."""
        if self._lock.is_locked:
            files.free(self.folder, self._lock)

    def write(self, name: str, content: str | bytes) -> None:
        """Writes a file into the folder, whole or not at all, such as a report.

        Args:
            name: its name, `/` between folders.
            content: text, which is written as UTF-8, or bytes.

        Raises:
            ValueError: a name outside of the folder or of the run's own files; a closed run.
            OSError: it cannot be written.
        """
        self._open()
        parts = PurePosixPath(name).parts
        file = self.folder.joinpath(*parts)
        inside = bool(parts) and ".." not in parts and file.is_relative_to(self.folder)
        if not inside or parts[0] in files.OURS or name.endswith(files.UNFINISHED):
            raise ValueError(
                f"{name!r} is no name for a file of yours in {str(self.folder)!r}: choose one "
                f"inside of it, and not {', '.join(files.OURS)}"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_file(file, content.encode() if isinstance(content, str) else content)

    def go(
        self,
        items: Sequence[Item],
        work: Callable[[Item, Any], pd.DataFrame],
        *,
        key: Callable[[Item], str],
        prepare: Callable[[Item], Any] | None = None,
        name: str = "item",
        desc: str = "items",
        progress: bool = True,
        threads: int = 2,
        part_seconds: float = 5.0,
        part_items: int = 64,
    ) -> pd.DataFrame:
        """Works on every item that the folder does not cover yet, in order, and keeps the rows.

        However it is stopped, what is lost are the items since the last part was written. After
        Ctrl-C or an exception these are written too, before it is raised again; Ctrl-C is raised
        even if `work` answers it by returning what it has, as sweeps do, and the half-done item is
        not kept. The table of a run that was stopped is that of one that was not.

        With more items than before, the run goes on with those that are new.

        Args:
            items: what is worked on.
            work: gives an item's rows, in the same columns for every item. It takes the item, and
                what `prepare` made of it, None without `prepare`. It raises `Excluded` for an item
                that is to have no rows.
            key: an item's name, which no other item has.
            prepare: what can be done ahead, in threads, while other items are worked on: reading
                and preprocessing. What it raises is raised when it is the item's turn. It draws
                nothing at random, except from a generator of its own.
            name: the column that the table has in front, of the items' keys; rows may have it.
            desc: what the bar says.
            progress: whether there is a bar.
            threads: how many items are prepared at once, twice as many being ahead; 0 to prepare
                each when it is its turn.
            part_seconds: after how many seconds a part is written.
            part_items: after how many items at the latest.

        Returns:
            The rows of all items, in the order of the items.

        Raises:
            ValueError: keys that are not unique; items missing that the folder covers; rows of
                other columns or types than those before; a closed run.
            TypeError: a key that is no str; rows that are no DataFrame.
            OSError: a part that cannot be read, or that cannot be written, for instance because the
                disk is full; what was written before is kept.
        """
        self._open()
        keyed = _keyed(items, key)
        record = Record(self.folder, name)
        record.check(list(keyed))
        left = [one for one in keyed.items() if one[0] not in record.rows.covers]
        if record.complete and list(keyed) == list(record.rows.covers):
            record.tidy()
            return _frame(record)
        record.begin()
        if left and self._changed:
            warnings.warn(
                f"{str(self.folder)!r} goes on with other {', '.join(self._changed)} than before, "
                f"which {files.PROVENANCE} tells; numbers may differ from those of one stretch",
                stacklevel=2,
            )
            files.note_changes(self.folder, self._changed)
            self._changed = {}
        calls = ahead(left, _of_item(prepare), threads if prepare else 0)
        begun = len(keyed) - len(left)
        bar = tqdm(total=len(keyed), initial=begun, desc=desc, unit="item", disable=not progress)
        excluded, written = len(record.excluded), time.monotonic()
        with _CtrlC() as ctrl_c, closing(calls), bar:
            try:
                for (of, item), prepared in calls:
                    outcome = self._outcome(of, item, name, work, prepared)
                    ctrl_c.check()
                    record.rows.take(of, outcome)
                    if isinstance(outcome, str):
                        excluded += 1
                        bar.set_postfix(excluded=excluded, refresh=False)
                    bar.update()
                    late = time.monotonic() - written >= part_seconds
                    if late or len(record.rows.waiting) >= part_items:
                        record.write()
                        written = time.monotonic()
            finally:
                record.write()
        record.finish(list(keyed))
        return _frame(record, list(keyed))

    def _open(self) -> None:
        if not self._lock.is_locked:
            raise ValueError(f"the run in {str(self.folder)!r} was closed; open it again: open_run")

    def _outcome(
        self,
        of: str,
        item: Item,
        name: str,
        work: Callable[[Item, Any], pd.DataFrame],
        prepared: Callable[[], Any],
    ) -> pa.Table | str:
        """An item's rows, or why it is excluded."""
        try:
            return as_table(work(item, prepared()), of, name)
        except Excluded as told:
            return told.reason
        except Exception as error:
            error.add_note(
                f"This was item {of!r} of the run in {str(self.folder)!r}. What was done before is "
                "kept: run the same command again to go on from there."
            )
            raise


def open_run(
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> Run:
    """Begins a run in a folder, or goes on with the one that is there.

    Args:
        folder: a new or empty one, or that of a run with the same configuration and provenance.
        config: what the run is of, in values that JSON can hold.
        provenance: what its numbers are made with; `provenance` makes one. What stands under
            `device`, `git` and `versions` may change in the middle of a run, with a warning.

    Returns:
        The run, which holds the folder until it is closed: use it in a `with` statement.

    Raises:
        ValueError: a folder of something else, of another configuration or provenance, key by key;
            values that JSON cannot hold.
        NotADirectoryError: a file.
        BlockingIOError: another run holds the folder.
        OSError: nothing can be written there.

    Example:
        >>> import tempfile
        >>> def square(number, prepared):
        ...     return pd.DataFrame({"square": [number**2]})
        >>> with (
        ...     tempfile.TemporaryDirectory() as folder,
        ...     open_run(folder, config={"power": 2}) as run,
        ... ):
        ...     run.go([3, 4], square, key=str, progress=False)
          item  square
        0    3       9
        1    4      16
    """
    told = files.plain(config, "config")
    made_with = files.plain(provenance or {}, "provenance")
    if files.RESUMED in made_with:
        raise ValueError(f"provenance has an entry {files.RESUMED!r}, which the run writes")
    folder = Path(folder)
    files.check(folder)
    lock = files.claim(folder)
    try:
        changed = files.begin(folder, told, made_with)
    except BaseException:
        files.free(folder, lock)
        raise
    return Run(folder, lock, changed)


def load(folder: str | Path) -> Loaded:
    """Reads what a run has written, also while it is going on.

    Args:
        folder: the run's folder.

    Raises:
        FileNotFoundError: it is no folder of a run.
        ValueError: a run of another version.
        OSError: a part that cannot be read, by its name.
    """
    folder = Path(folder)
    config = files.read_config(folder)
    record = _read(folder)
    name = record.rows.name
    reasons = {name: list(record.excluded), "reason": list(record.excluded.values())}
    return Loaded(
        config,
        files.read_provenance(folder),
        _frame(record),
        pd.DataFrame(reasons, dtype="str"),
        record.complete,
    )


def _read(folder: Path, tries: int = 3) -> Record:
    """The record of a run that may come to its end, and remove its parts, while it is read."""
    for _ in range(tries - 1):
        with suppress(FileNotFoundError):
            record = Record(folder)
            if record.complete == (folder / files.RESULTS).is_file():
                return record
    return Record(folder)


def _frame(record: Record, keys: Sequence[str] | None = None) -> pd.DataFrame:
    table: pd.DataFrame = record.rows.whole(keys).table.to_pandas()
    return table


def _of_item(prepare: Callable[[Item], Any] | None) -> Callable[[tuple[str, Item]], Any]:
    return lambda keyed: None if prepare is None else prepare(keyed[1])


def _keyed(items: Sequence[Item], key: Callable[[Item], str]) -> dict[str, Item]:
    """The items by their keys.

    Raises:
        TypeError: a key that is no str.
        ValueError: a key that two items have, or no items.
    """
    found: dict[str, Item] = {}
    for number, item in enumerate(items):
        of = key(item)
        if not isinstance(of, str):
            raise TypeError(
                f"the key of item {number} is a {type(of).__name__}, {of!r}; give a str"
            )
        if of in found:
            first = list(found).index(of)
            raise ValueError(
                f"items {first} and {number} have the same key {of!r}; give each its own"
            )
        found[of] = item
    if not found:
        raise ValueError("there are no items; was an iterator given that has been read before?")
    return found


class _CtrlC:
    """Notes Ctrl-C also where `work` does not let KeyboardInterrupt through: sweeps do not."""

    def __init__(self) -> None:
        self._pressed = False
        self._before: Any = None

    def __enter__(self) -> _CtrlC:
        before = signal.getsignal(signal.SIGINT)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and callable(before):  # not where it is ignored
            self._before = before
            signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        self._before(number, frame)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises KeyboardInterrupt if it was pressed."""
        if self._pressed:
            raise KeyboardInterrupt
