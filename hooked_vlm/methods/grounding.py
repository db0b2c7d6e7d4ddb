"""Numbers for a map that points into an image: how well it fits a mask.

Maps and masks are arrays [..., row, column] of one grid, which may be of pixels or of patches; a
mask is True, or 1, inside, and may be the share of a patch that lies inside (`coverage`).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from hooked_vlm.methods.statistics import Numbers

Box = tuple[float, float, float, float]


def mass(values: ArrayLike, mask: ArrayLike) -> Numbers:
    """The share of a map that lies inside of a mask, [...].

    Args:
        values: maps without negative numbers; NaN where a map is zero all over.
        mask: of each, or of all.

    Raises:
        ValueError: of two grids, or negative numbers.
    """
    over, inside = _same_grid(values, mask)
    if (over < 0).any():
        raise ValueError("a map of which shares are taken has no negative numbers")
    total = over.sum((-2, -1))
    share = (over * inside).sum((-2, -1)) / np.where(total > 0, total, np.nan)
    return np.asarray(share)


def pointing(values: ArrayLike, mask: ArrayLike, tolerance: float = 0.0) -> NDArray[np.bool_]:
    """Whether a map is largest inside of a mask, and nowhere outside as large, [...].

    The pointing game of Zhang et al. (arXiv 1608.00507), in which a tie is a miss.

    Args:
        values: maps.
        mask: of each, or of all; what is half inside counts as inside.
        tolerance: values that are this share of the largest below it count as equal to it.

    Raises:
        ValueError: of two grids.
    """
    over, inside = _same_grid(values, mask)
    there = inside >= 0.5
    best = np.where(there, over, -np.inf).max((-2, -1))
    other = np.where(there, -np.inf, over).max((-2, -1))
    with np.errstate(invalid="ignore"):
        return np.asarray(best - tolerance * abs(best) > other)


def correlation(values: ArrayLike, mask: ArrayLike) -> Numbers:
    """Pearson's correlation of a map with a mask over the grid, [...]; NaN where one is constant.

    Raises:
        ValueError: of two grids.
    """
    over, inside = _same_grid(values, mask)
    x, y = (one - one.mean((-2, -1), keepdims=True) for one in (over, inside))
    size = np.sqrt((x**2).sum((-2, -1)) * (y**2).sum((-2, -1)))
    return np.asarray((x * y).sum((-2, -1)) / np.where(size > 0, size, np.nan))


def coverage(mask: NDArray[np.bool_], boxes: pd.DataFrame) -> Numbers:
    """How much of each patch a mask covers, [patch], 0 to 1.

    Args:
        mask: [height, width] of the image.
        boxes: the patches' `left`, `top`, `right`, `bottom` in pixels of it, as `token_map` has
            them; what lies beyond the image is not covered.

    Raises:
        ValueError: a mask of another kind.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"a mask is bool [height, width], not {mask.dtype} {list(mask.shape)}")
    height, width = mask.shape
    corners = np.zeros((height + 1, width + 1))  # sums above and left of each corner
    corners[1:, 1:] = mask.cumsum(0, dtype=float).cumsum(1)
    left, right = (boxes[side].to_numpy(float).clip(0, width) for side in ("left", "right"))
    top, bottom = (boxes[side].to_numpy(float).clip(0, height) for side in ("top", "bottom"))

    def above(y: Numbers, x: Numbers) -> Numbers:
        row, column = np.floor(y).astype(int), np.floor(x).astype(int)
        below, behind = np.minimum(row + 1, height), np.minimum(column + 1, width)
        down, across = y - row, x - column
        upper = corners[row, column] * (1 - across) + corners[row, behind] * across
        lower = corners[below, column] * (1 - across) + corners[below, behind] * across
        return np.asarray(upper * (1 - down) + lower * down)

    inside = above(bottom, right) - above(top, right) - above(bottom, left) + above(top, left)
    area = (boxes["right"] - boxes["left"]) * (boxes["bottom"] - boxes["top"])
    return np.asarray(inside / area.to_numpy(float))


def boxed(box: Box, size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask of a box, [height, width].

    Args:
        box: left, top, right, bottom, in pixels; a pixel whose middle lies inside belongs to it.
        size: height and width of the image.

    Raises:
        ValueError: a box without a pixel of the image.
    """
    left, top, right, bottom = box
    y, x = (np.arange(n) + 0.5 for n in size)
    mask: NDArray[np.bool_] = ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
    if not mask.any():
        raise ValueError(
            f"the box {tuple(box)} holds no pixel of an image of {size[1]} x {size[0]}"
        )
    return mask


def _same_grid(values: ArrayLike, mask: ArrayLike) -> tuple[Numbers, Numbers]:
    over, inside = np.asarray(values, dtype=float), np.asarray(mask, dtype=float)
    if over.ndim < 2 or inside.ndim < 2 or over.shape[-2:] != inside.shape[-2:]:
        raise ValueError(
            f"a map of {list(over.shape)} and a mask of {list(inside.shape)} are not of one grid, "
            "[..., row, column]"
        )
    return over, inside
