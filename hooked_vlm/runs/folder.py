"""The folder of a run: files that are whole or not there, written by one process at a time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

FORMAT = 1
CONFIG, PROVENANCE, EXCLUDED = "config.json", "provenance.json", "excluded.json"
RESULTS, PARTS = "results.parquet", "parts"
LOCK, HOLDER, UNFINISHED = ".lock", ".holder.json", ".unfinished"
OURS = (CONFIG, PROVENANCE, EXCLUDED, RESULTS, PARTS, LOCK, HOLDER)

RESUMED = "resumed"  # in the provenance: what had changed each time the run was gone on with
MAY_CHANGE = ("device", "git", "versions")  # of the provenance, in the middle of a run


# --- files


def write_file(file: Path, content: bytes) -> None:
    """Writes a file so that, whenever the power fails, the old or the new one is there, whole.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    beside = file.with_name(f".{file.name}{UNFINISHED}")
    try:
        with beside.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(beside, file)
        sync(file.parent)
    except OSError as error:
        failed = OSError(
            f"{str(file)!r} could not be written ({error.strerror or error}); what was written "
            "before is kept: make room and run the same command again, which goes on from there"
        )
        failed.errno = error.errno
        raise failed from error
    finally:
        beside.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Makes what was named, renamed or removed in a folder last; Windows needs no such step."""
    if os.name == "nt":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def as_json(value: Any) -> bytes:
    """JSON as people read it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def plain(told: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The same as JSON gives it back: tuples are lists then.

    Args:
        told: anything by name.
        what: what errors call it.

    Raises:
        ValueError: a value that JSON cannot hold, by its name.
    """
    for key, value in told.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{what} {key!r} is a {type(value).__name__} that JSON cannot hold ({error}); "
                "give texts, numbers, None, lists and dicts of these"
            ) from error
    found: dict[str, Any] = json.loads(json.dumps(dict(told)))
    return found


# --- the folder


def check(folder: Path) -> None:
    """Refuses what is neither the folder of a run nor one to begin in.

    Raises:
        NotADirectoryError: a file.
        ValueError: a folder of something else, or of another format.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file; name a folder to write to")
    if (folder / CONFIG).exists():
        read_config(folder)
    elif folder.exists():
        begun = (LOCK, HOLDER)  # all that is there when a run is killed as it begins
        names = (one.name for one in folder.iterdir() if one.name not in begun)
        others = [name for name in names if not name.endswith(UNFINISHED)]
        if others:
            raise ValueError(
                f"{str(folder)!r} holds other files, such as {min(others)!r}, and no run; name a "
                "new or an empty folder"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a folder of something else, or of another format.
    """
    file = folder / CONFIG
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(folder)!r} has no {CONFIG}: it is no folder of a run"
        ) from None
    except ValueError:
        told = None
    if not isinstance(told, dict) or told.keys() != {"format", "config"}:
        raise ValueError(f"{str(file)!r} is not that of a run; name another folder")
    if told["format"] != FORMAT:
        raise ValueError(
            f"{str(file)!r} is of format {told['format']}, this version of hooked_vlm reads "
            f"{FORMAT}; run anew, in another folder"
        )
    config: dict[str, Any] = told["config"]
    return config


def read_provenance(folder: Path) -> dict[str, Any]:
    """What the numbers of a run are made with; empty where it was killed as it began."""
    file = folder / PROVENANCE
    if not file.exists():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def claim(folder: Path) -> FileLock:
    """Makes the folder if need be, and takes its lock; that of a dead process is free.

    Raises:
        BlockingIOError: another run is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"{str(folder)!r} is being written by {_holder(folder)}; wait for its end, stop it, or "
            "name another folder"
        ) from None
    try:
        for left in folder.rglob(f".*{UNFINISHED}"):
            left.unlink()
        write_file(folder / HOLDER, as_json({"pid": os.getpid(), "host": socket.gethostname()}))
    except BaseException:
        lock.release()
        raise
    return lock


def free(folder: Path, lock: FileLock) -> None:
    """Gives the lock back."""
    try:
        (folder / HOLDER).unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(folder: Path) -> str:
    try:
        told = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError):  # it has just begun, or just ended
        return "another process"


# --- what it is a run of


def begin(folder: Path, config: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    """Writes what the run is of, or holds it against what the folder says.

    Args:
        folder: the folder, whose lock is held.
        config: the configuration.
        provenance: what the numbers are made with.

    Returns:
        What has changed in the provenance of what may.

    Raises:
        ValueError: the folder is of another configuration or provenance.
    """
    if not (folder / CONFIG).exists():
        write_file(folder / CONFIG, as_json({"format": FORMAT, "config": config}))
    _compare(folder, "configuration", read_config(folder), config)
    if not (folder / PROVENANCE).exists():
        write_file(folder / PROVENANCE, as_json(provenance))
    was = read_provenance(folder)
    for changed in was.pop(RESUMED, []):
        was |= changed
    fixed = ({k: v for k, v in one.items() if k not in MAY_CHANGE} for one in (was, provenance))
    _compare(folder, "provenance", *fixed)
    return {key: provenance.get(key) for key in MAY_CHANGE if was.get(key) != provenance.get(key)}


def forget_empty(folder: Path) -> None:
    """Takes back what a run is of, where it failed before it had anything to keep.

    The folder is then free for another configuration, such as one without the mistake.
    """
    parts = folder / PARTS
    if (folder / RESULTS).exists() or (parts.is_dir() and any(parts.iterdir())):
        return
    for name in (PROVENANCE, CONFIG):
        (folder / name).unlink(missing_ok=True)


def note_changes(folder: Path, changed: dict[str, Any]) -> None:
    """Adds to the provenance what has changed since the run was last gone on with."""
    told = read_provenance(folder)
    told[RESUMED] = [*told.get(RESUMED, []), changed]
    write_file(folder / PROVENANCE, as_json(told))


def _compare(folder: Path, what: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = dict(_flat(was)), dict(_flat(now))
    differ = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    if differ:
        told = "; ".join(
            f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}" for key in differ
        )
        raise ValueError(
            f"{str(folder)!r} holds a run of another {what}: {told}. To go on with it give what it "
            "was begun with; else name another folder"
        )


def _flat(told: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The entries of nested dicts, under dotted names, as JSON, in which 1, 1.0 and true differ."""
    for key, value in told.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            text = json.dumps(value, ensure_ascii=False)
            yield f"{before}{key}", text
