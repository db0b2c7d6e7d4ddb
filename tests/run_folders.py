"""A run whose table is known, for the tests of run folders."""

import pandas as pd

from hooked_vlm import runs

CONFIG = {"method": "patch", "data": {"name": "shapes", "n": 6}, "seeds": (1, 2)}
QUIET = {"progress": False}
DONE = [".lock", "config.json", "excluded.json", "provenance.json", "results.parquet"]


def rows(i, prepared=None):
    """Two rows; `count` is of whole numbers in every other item, `note` has no value in some."""
    return pd.DataFrame(
        {
            "layer": [0, 1],
            "effect": [i / 3, -i / 7],
            "count": [i, 2 * i] if i % 2 else [i + 0.5, i],
            "note": [None, None] if i % 3 == 0 else [f"note {i}", None],
        }
    )


def truth(n):
    """What the table of items 0 to n - 1 is, written out without pandas."""
    return {
        "item": [f"item {i}" for i in range(n) for _ in range(2)],
        "layer": [0, 1] * n,
        "effect": [x for i in range(n) for x in (i / 3, -i / 7)],
        "count": [float(x) for i in range(n) for x in ((i, 2 * i) if i % 2 else (i + 0.5, i))],
        "note": [x for i in range(n) for x in (f"note {i}" if i % 3 else None, None)],
    }


def lists(table):
    return {name: [None if x != x else x for x in table[name]] for name in table}


def key(i):
    return f"item {i}"


def go(folder, n=6, work=rows, config=CONFIG, **options):
    with runs.open_run(folder, config=config) as run:
        return run.go(range(n), work, key=key, **QUIET, **options)


def names(folder):
    return sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*"))


class Failing:
    """`rows`, which raises once, at one item; and the items that it was called with."""

    def __init__(self, at, error):
        self.at, self.error, self.called = at, error, []

    def __call__(self, i, prepared):
        self.called.append(i)
        if i == self.at and self.called.count(i) == 1:
            raise self.error
        return rows(i)
