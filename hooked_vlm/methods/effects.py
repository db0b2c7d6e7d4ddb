"""Effects of patches, averaged over pairs, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from hooked_vlm.methods.statistics import bootstrap

PAIR = ("task", "modality", "pair")
_KEY = "the pair"
ENDS = ("mean", "low", "high", "absolute", "absolute_low", "absolute_high", "n")
BY = ("task", "modality", "stack", "kind", "layer", "head", "role")


def effects(
    table: pd.DataFrame,
    metric: str = "logit_diff",
    by: Sequence[str] = BY,
    *,
    level: float = 0.95,
    n: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The mean of a metric over pairs, signed and absolute, with intervals by bootstrap over pairs.

    Args:
        table: of `notice.patch`.
        metric: a column of it.
        by: for each combination of which columns. Of a pair's lines that share one, such as the
            tokens of a role, the mean counts.
        level: the share of means inside an interval.
        n: how many draws of pairs.
        seed: of the draws.

    Returns:
        A line for each combination: `mean`, `low`, `high`; `absolute`, the mean size, which harm
        raises as help does, with `absolute_low` and `absolute_high`; and `n`, how many pairs have a
        number. Intervals of a single pair are NaN.

    Raises:
        KeyError: no such column.
    """
    unknown = [name for name in (metric, *by) if name not in table]
    if unknown:
        raise KeyError(f"the table has no column {unknown[0]!r}, only {list(table.columns)}")
    key = table[list(PAIR)].astype(str).agg("/".join, axis=1)
    lines = table.assign(**{_KEY: key})
    wide = lines.pivot_table(index=_KEY, columns=list(by), values=metric, aggfunc="mean")
    numbers = wide.to_numpy(float)
    there = np.isfinite(numbers)
    found = np.full((len(ENDS), len(wide.columns)), np.nan)
    found[-1] = there.sum(0)
    for some in pd.Series(range(len(found[0]))).groupby([column.tobytes() for column in there.T]):
        columns = some[1].to_numpy()
        mine = numbers[there[:, columns[0]]][:, columns]  # the pairs that have these numbers
        found[:3, columns] = bootstrap(mine, level=level, n=n, seed=seed)
        found[3:6, columns] = bootstrap(abs(mine), level=level, n=n, seed=seed)
    told = pd.DataFrame(found.T, columns=list(ENDS), index=wide.columns).reset_index()
    return told.astype({"n": int})
