"""Means over pairs with their intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
DRAWN = 50_000_000  # numbers of the largest product of draws by columns, to bound memory


def bootstrap(
    values: Numbers, *, level: float = 0.95, n: int = 1000, seed: int = 0
) -> tuple[Numbers, Numbers, Numbers]:
    """The mean of each column, and an interval of it.

    Rows are drawn with replacement, whole; the interval lies between quantiles of the means
    (Efron, Ann. Statist. 7, 1979).

    Args:
        values: [pair, ...]; NaN where a pair has no number, which is left out.
        level: the share of means inside the interval.
        n: how many draws.
        seed: of the draws.

    Returns:
        The mean and both ends, [...]; NaN where no pair has a number, and the ends also where one
        pair alone has.
    """
    flat = values.reshape(len(values), -1)
    there = np.isfinite(flat)
    filled = np.where(there, flat, 0.0)
    count = there.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = filled.sum(0) / count
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(len(flat), np.full(len(flat), 1 / len(flat)), size=n).astype(float)
        low, high = np.empty_like(mean), np.empty_like(mean)
        step = max(1, DRAWN // n)
        for begin in range(0, len(mean), step):
            some = slice(begin, begin + step)
            means = draws @ filled[:, some] / (draws @ there[:, some].astype(float))
            ends = np.full((2, means.shape[1]), np.nan)
            enough = count[some] > 1
            quantiles = [(1 - level) / 2, (1 + level) / 2]
            ends[:, enough] = np.nanquantile(means[:, enough], quantiles, axis=0)
            low[some], high[some] = ends
    shape = values.shape[1:]
    return mean.reshape(shape), low.reshape(shape), high.reshape(shape)
