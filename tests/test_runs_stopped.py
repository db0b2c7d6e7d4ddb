"""Runs that are stopped anywhere, or have no room: gone on with, they are as if they were not."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
from run_folders import DONE, Failing, go, lists, names, rows, truth

from hooked_vlm import runs

# --- stopping and going on


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_what_is_done_is_kept_when_work_raises(tmp_path, error):
    go(tmp_path / "whole")
    work, folder = Failing(4, error), tmp_path / "run"
    with pytest.raises(type(error)) as raised:
        go(folder, work=work, part_items=3)
    assert raised.value is error
    assert names(folder) == [
        ".lock", "config.json", "parts", "parts/00000.parquet", "parts/00001.parquet",
        "provenance.json",
    ]  # fmt: skip
    begun = runs.load(folder)
    assert not begun.complete and lists(begun.table) == truth(4)
    if isinstance(error, Exception):
        assert "item 'item 4' of the run in" in error.__notes__[0]
    go(folder, work=work)
    assert work.called == [0, 1, 2, 3, 4, 4, 5]
    whole = (tmp_path / "whole" / "results.parquet").read_bytes()
    assert (folder / "results.parquet").read_bytes() == whole
    assert names(folder) == DONE
    assert lists(go(folder, work=work)) == truth(6) and len(work.called) == 7


@pytest.fixture
def interruptible():
    """Where the tests were started in the background, the shell has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_counts_even_where_work_answers_it(tmp_path):
    """As sweeps do, which return what they have; that is not an item's rows."""

    def work(i, prepared):
        try:
            if i == 3 and not stopped:
                stopped.append(i)
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            return rows(99)
        return rows(i)

    stopped, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, work=work)
    assert lists(runs.load(tmp_path).table) == truth(3)
    assert signal.getsignal(signal.SIGINT) is before
    assert lists(go(tmp_path, work=work)) == truth(6)


class Killed(BaseException):
    """Nothing is done after it, as after SIGKILL."""


class Steps:
    """Lets a number of changes to the disk happen, and none after."""

    CHANGES = ("fsync", "mkdir", "replace", "rmdir", "unlink")

    def __init__(self, patch, n):
        self.left, self.seen = n, []
        for name in self.CHANGES:
            patch.setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, change):
        def changed(*args, **kwargs):
            if self.left <= 0:
                raise Killed
            self.left -= 1
            self.seen.append(name)
            return change(*args, **kwargs)

        return changed


@pytest.mark.parametrize("before", [0, 3])
def test_a_kill_between_any_two_changes_to_the_disk(tmp_path, monkeypatch, before):
    """In a new run, and in one that goes on behind what was complete."""
    monkeypatch.setattr(os, "fsync", lambda opened: None)  # a step, but one that takes no time
    go(tmp_path / "whole")
    whole = (tmp_path / "whole" / "results.parquet").read_bytes()
    for n in itertools.count():
        folder = tmp_path / str(n)
        if before:
            go(folder, before)
        killed = False
        with monkeypatch.context() as patch:
            steps = Steps(patch, n)
            try:
                go(folder, part_items=2)
            except Killed:
                killed = True
        if (folder / "config.json").exists():
            begun = runs.load(folder)
            done = len(begun.table) // 2
            expected = truth(done) if done else {"item": []}
            assert done >= before and lists(begun.table) == expected
            assert done == 6 or not begun.complete or (done, steps.left) == (before, 0)
        assert lists(go(folder, part_items=2)) == truth(6)
        assert (folder / "results.parquet").read_bytes() == whole
        assert names(folder) == DONE
        if not killed:
            break
    assert len(steps.seen) > 30 and set(steps.seen) == set(Steps.CHANGES)


def test_what_is_named_is_on_the_disk_before(tmp_path, monkeypatch):
    """So that a power cut leaves the old file or the new one, whole."""
    events, sync, replace = [], os.fsync, os.replace

    def synced(opened):
        sync(opened)
        events.append(("sync", os.fstat(opened).st_ino))

    def replaced(source, target):
        events.append(("replace", os.stat(source).st_ino, target.parent.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    go(tmp_path, part_items=2)
    found = [at for at, event in enumerate(events) if event[0] == "replace"]
    assert len(found) == 8  # holder, config, provenance, three parts, excluded, results
    for at in found:
        _, file, folder = events[at]
        assert events[at - 1] == ("sync", file) and events[at + 1] == ("sync", folder)


# --- processes that are killed, in earnest

SCRIPT = """
import json, resource, signal, sys, time
import numpy as np, pandas as pd
from hooked_vlm import runs

told = json.loads(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this test ignores it

def work(i, prepared):
    print(i, flush=True)
    time.sleep(told["wait"])
    n = told.get("rows", 3) if i > 3 else 3
    drawn = np.random.default_rng(i).standard_normal(n)
    return pd.DataFrame({"row": range(len(drawn)), "value": drawn, "twice": 2 * prepared})

with runs.open_run(told["folder"], config={"seed": 0}) as run:
    if "limit" in told:
        resource.setrlimit(resource.RLIMIT_FSIZE, (told["limit"],) * 2)
    run.go(range(told["n"]), work, key=str, prepare=lambda i: i, progress=False, part_items=4)
"""


def started(folder, n, wait=0.005, **told):
    told |= {"folder": str(folder), "n": n, "wait": wait}
    command = [sys.executable, "-c", SCRIPT, json.dumps(told)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(process, after, how=signal.SIGKILL, wait=0.0):
    """The items that it began with until it was stopped, so many items and a moment later."""
    begun = [process.stdout.readline() for _ in range(after)]
    threading.Event().wait(wait)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -how, err
    return [int(line) for line in [*begun, *out.splitlines()]]


def survives(tmp_path, n, kills, seed):
    """A run that is killed so often is that which is not, and loses no more than four each time."""
    draw = random.Random(seed)
    begun = []
    for _ in range(kills):
        process = started(tmp_path / "killed", n)
        begun += stopped(process, draw.randrange(1, 10), wait=draw.uniform(0, 0.02))
    for folder in ("killed", "whole"):
        process = started(tmp_path / folder, n, wait=0)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        begun += map(int, out.split())
    assert set(begun) == set(range(n)) and len(begun) <= 2 * n + 4 * kills
    files = [tmp_path / folder / "results.parquet" for folder in ("killed", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    table = runs.load(tmp_path / "killed").table
    assert table["item"].tolist() == [str(i) for i in range(n) for _ in range(3)]
    assert table["twice"].tolist() == [2 * i for i in range(n) for _ in range(3)]
    drawn = [np.random.default_rng(i).standard_normal(3) for i in range(n)]
    assert np.array_equal(table["value"].to_numpy(), np.concatenate(drawn))
    assert names(tmp_path / "killed") == DONE


def test_a_run_survives_kills(tmp_path):
    survives(tmp_path, 40, 3, seed=0)


@pytest.mark.slow
def test_a_run_survives_twenty_kills(tmp_path):
    survives(tmp_path, 300, 20, seed=1)


def test_one_run_at_a_time_and_the_dead_hold_nothing(tmp_path):
    process = started(tmp_path, 6, wait=30)
    assert process.stdout.readline() == "0\n"
    with pytest.raises(BlockingIOError) as raised:
        runs.open_run(tmp_path, config={"seed": 0})
    said = str(raised.value)
    assert str(tmp_path) in said and f"by process {process.pid} on " in said and "stop it" in said
    assert runs.load(tmp_path).table.empty
    stopped(process, 0)
    mine = f"by process {os.getpid()} on "
    with (
        runs.open_run(tmp_path, config={"seed": 0}),
        pytest.raises(BlockingIOError, match=mine),
    ):
        runs.open_run(tmp_path, config={"seed": 0})
    runs.open_run(tmp_path, config={"seed": 0}).close()


def test_ctrl_c_keeps_all_that_is_done(tmp_path):
    begun = stopped(started(tmp_path, 40, wait=0.05), 7, signal.SIGINT)
    assert len(runs.load(tmp_path).table) >= 3 * (len(begun) - 1) == 18
    assert not list(tmp_path.rglob("*.unfinished"))


# --- disks that are full, files that are broken


def test_a_limit_on_files_is_reported_and_nothing_is_broken(tmp_path):
    process = started(tmp_path, 9, wait=0, rows=300, limit=8000)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"'{tmp_path}/parts/00001.parquet' could not be written (File too large)" in err
    assert names(tmp_path) == [
        ".lock", "config.json", "parts", "parts/00000.parquet", "provenance.json"
    ]  # fmt: skip
    assert runs.load(tmp_path).table["row"].tolist() == [0, 1, 2] * 4
    assert started(tmp_path, 9, wait=0, rows=300).wait(60) == 0
    assert len(runs.load(tmp_path).table) == 4 * 3 + 5 * 300


@pytest.mark.parametrize("full", ["00001.parquet", "results.parquet", "excluded.json"])
def test_a_full_disk_is_reported_and_the_run_goes_on_when_there_is_room(
    tmp_path, monkeypatch, full
):
    sync, folder = os.fsync, tmp_path / "run"

    def synced(opened):
        if os.path.exists(beside) and os.path.samestat(os.fstat(opened), os.stat(beside)):
            os.truncate(beside, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(opened)

    within = folder / "parts" if full[0] == "0" else folder
    beside = within / f".{full}.unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        told = rf"{full}' could not be written \(No space left on device\); what .* is kept"
        with pytest.raises(OSError, match=told) as raised:
            go(folder, part_items=2)
    assert raised.value.errno == errno.ENOSPC
    assert not list(folder.rglob("*.unfinished")) and not (folder / "results.parquet").exists()
    assert lists(runs.load(folder).table) == truth(2 if full[0] == "0" else 6)
    work = Failing(None, None)
    assert lists(go(folder, work=work)) == truth(6)
    assert work.called == ([2, 3, 4, 5] if full[0] == "0" else [])


def test_broken_parts_are_named_and_made_again(tmp_path):
    with pytest.raises(RuntimeError):
        go(tmp_path, work=Failing(5, RuntimeError()), part_items=2)
    file = tmp_path / "parts" / "00001.parquet"
    whole = file.read_bytes()
    foreign = tmp_path.parent / "foreign.parquet"
    pd.DataFrame({"item": ["item 2"]}).to_parquet(foreign)
    broken = [whole[:n] for n in (0, 3, 50, len(whole) // 2, len(whole) - 1)]
    for content in [*broken, foreign.read_bytes()]:
        file.write_bytes(content)
        for read in (lambda: runs.load(tmp_path), lambda: go(tmp_path)):
            with pytest.raises(OSError, match=r"00001.parquet' cannot be read, .*; delete it and"):
                read()
        assert file.read_bytes() == content
    shutil.copy(tmp_path / "parts" / "00000.parquet", file)
    with pytest.raises(ValueError, match="item 'item 0' is in two parts"):
        go(tmp_path)
    file.unlink()
    work = Failing(None, None)
    assert lists(go(tmp_path, work=work)) == truth(6) and work.called == [2, 3, 5]


@pytest.mark.parametrize("of", ["parts/00000.parquet", "results.parquet"])
def test_no_changed_bit_goes_unseen(tmp_path, of):
    """Each file with one bit changed is refused, or holds what it held."""
    with pytest.raises(RuntimeError):
        go(tmp_path, 4, work=Failing(3, RuntimeError()))
    if of == "results.parquet":
        go(tmp_path, 4)
    file = tmp_path / of
    whole, before = file.read_bytes(), runs.load(tmp_path)
    refused = 0
    for at in range(0, len(whole), 11):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = runs.load(tmp_path)
        except OSError:
            refused += 1
            continue
        pd.testing.assert_frame_equal(found.table, before.table)
        pd.testing.assert_frame_equal(found.excluded, before.excluded)
    assert refused > 60
