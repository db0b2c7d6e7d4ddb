"""Heat maps of results, and attention laid over the image it looks at."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

WRITTEN = 200  # cells of a heat map beyond which numbers are not written into them
WIDEST = 24.0  # inches of all cells; more of them are drawn smaller
LABEL = 0.2  # inches that a label needs
LONGEST = 12  # letters of a name that fits under its bars


def heatmap(values: xr.DataArray, *, title: str = "") -> Figure:
    """A two-dimensional result as coloured cells, zero in white.

    Args:
        values: `layer` by `head`, or sites by positions, or one line of sites.
        title: what the numbers are.

    Raises:
        ValueError: more than two dimensions; average over the others first.
    """
    if values.ndim == 1:
        values = values.expand_dims({"": [""]}, axis=1)
    if values.ndim != 2:
        raise ValueError(f"a heat map has two dimensions, not {values.dims}; average over others")
    rows, columns = values.dims
    grid = values.values.astype(float)
    height, width = grid.shape
    row_labels = [_short(value) for value in values[rows].values]
    column_labels = [_short(value) for value in values[columns].values]
    across, down = min(0.55, WIDEST / width), min(0.42 if height <= 24 else 0.26, WIDEST / height)
    longest = max(map(len, row_labels))
    size = (2.4 + 0.1 * longest + max(across * width, 2.0), 1.6 + down * height)
    figure = Figure(figsize=(max(size[0], 5.5), max(size[1], 2.8)), layout="constrained")
    axes = figure.add_subplot()
    limit = max(np.nanmax(np.abs(grid)), 1e-9) if np.isfinite(grid).any() else 1.0
    image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(width)[:: _step(across)], column_labels[:: _step(across)])
    axes.set_yticks(range(height)[:: _step(down)], row_labels[:: _step(down)])
    axes.set_xlabel(str(columns))
    axes.set_ylabel(str(rows))
    axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=11)
    axes.tick_params(length=0)
    if width > 24 or max(map(len, column_labels)) > 5:
        axes.tick_params(axis="x", labelrotation=90)
    if grid.size <= WRITTEN and across > 0.4:
        for (row, column), value in np.ndenumerate(grid):
            text = "\N{EN DASH}" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
            color = "white" if abs(value) > 0.65 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    return figure


def _step(inches: float) -> int:
    """Every how many cells have a label, so that labels stay apart."""
    return max(1, round(LABEL / inches))


def _short(value: object) -> str:
    return str(value).replace(".blocks.", ".").replace("hook_", "")


def growth(
    values: xr.DataArray, *, wanted: float, chosen: tuple[int, float], title: str = ""
) -> Figure:
    """A share that grows with a number, the share that is wanted, and a point that was chosen.

    Args:
        values: one dimension, the number.
        wanted: a line across.
        chosen: number and share of the point.
        title: what it is.
    """
    (number,) = values.dims
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    at, few = values[number].values, values.size <= 30
    axes.plot(at, values.values, marker="o" if few else None, markersize=4, label="strongest first")
    axes.axhline(wanted, color="grey", linestyle="--", linewidth=1, label=f"wanted: {wanted:g}")
    label = f"chosen: {chosen[0]:g}, {chosen[1]:.2f}"
    axes.plot(*chosen, marker="*", markersize=13, linestyle="none", color="C3", label=label)
    axes.set_xlabel(str(number))
    axes.set_ylabel(str(values.name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def bars(values: Mapping[str, xr.DataArray], *, title: str = "") -> Figure:
    """Bars side by side for each place of one dimension.

    Args:
        values: by what the legend calls them; NaN has no bar.
        title: what they are.
    """
    (first, *_) = values.values()
    (dim,) = first.dims
    names = [str(name) for name in first[dim].values]
    figure = Figure(figsize=(max(5.0, 1.1 * len(names)), 3.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(values)
    for number, (label, heights) in enumerate(values.items()):
        at = np.arange(len(names)) + (number - (len(values) - 1) / 2) * width
        axes.bar(at, heights.values, width, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    if max(map(len, names)) > LONGEST:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=11)
    figure.legend(loc="outside lower center", ncols=len(values), fontsize=9, frameon=False)
    return figure


def intervals(
    names: Sequence[str],
    middle: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    title: str = "",
) -> Figure:
    """Numbers with their intervals, one line each, the first on top.

    Args:
        names: of the lines.
        middle: the numbers.
        low: the lower ends of their intervals; NaN for none.
        high: the upper ends.
        title: what they are.
    """
    figure = Figure(figsize=(6.5, 1.4 + 0.3 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    x, ends = np.asarray(middle, dtype=float), np.asarray([low, high], dtype=float)
    at = np.arange(len(names))
    axes.hlines(at, ends[0], ends[1], color="C0")
    axes.plot(x, at, "o", color="C0", markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(at, list(names))
    axes.invert_yaxis()
    axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=11)
    return figure


def attention_map(
    image: Image.Image,
    weights: ArrayLike,
    *,
    title: str = "",
    weight_off_grid: float | None = None,
    off_grid: str = "the class token",
) -> Figure:
    """Attention over the patches of an image, laid over the image, beside the image itself.

    Args:
        image: the original image.
        weights: [rows, columns] of patches that cover the image.
        title: what attends.
        weight_off_grid: the attention that falls on no patch, to be told.
        off_grid: what it falls on.

    Raises:
        ValueError: weights that are no grid.
    """
    grid: NDArray[np.float64] = np.asarray(weights, dtype=float)
    if grid.ndim != 2:
        raise ValueError(f"weights are [rows, columns] of patches, not {list(grid.shape)}")
    width, height = image.size
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    plain, laid = figure.subplots(1, 2)
    whole = (0, width, height, 0)
    largest = max(float(np.nanmax(grid)), 1e-9)
    plain.imshow(image.convert("RGB"), extent=whole)
    plain.set_title("image", fontsize=10)
    # Shades of grey, so that colour is attention alone, the denser the more of it.
    laid.imshow(image.convert("L"), extent=whole, cmap="gray", vmin=-90, vmax=255)
    colored = laid.imshow(
        grid,
        extent=whole,
        cmap="viridis_r",
        alpha=np.clip(0.9 * grid / largest, 0, 0.9),
        vmin=0,
        vmax=largest,
        interpolation="nearest",
    )
    for axes in (plain, laid):
        axes.set_xticks([])
        axes.set_yticks([])
    off = "" if weight_off_grid is None else f" ({weight_off_grid:.2f} on {off_grid})"
    laid.set_title(f"attention per patch{off}", fontsize=10)
    figure.colorbar(colored, ax=laid, fraction=0.045, pad=0.03)
    figure.suptitle("\n".join(textwrap.wrap(title, 80)), fontsize=11)
    return figure
