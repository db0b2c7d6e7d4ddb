"""Heat maps of results, and attention laid over the image it looks at."""

from __future__ import annotations

import textwrap

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image

WRITTEN = 200  # cells of a heat map beyond which numbers are not written into them


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
    longest = max(map(len, row_labels))
    size = (2.4 + 0.09 * longest + 0.55 * width, 1.6 + 0.42 * height)
    figure = Figure(figsize=(max(size[0], 5.5), max(size[1], 2.8)), layout="constrained")
    axes = figure.add_subplot()
    limit = max(np.nanmax(np.abs(grid)), 1e-9) if np.isfinite(grid).any() else 1.0
    image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(width), [_short(value) for value in values[columns].values])
    axes.set_yticks(range(height), row_labels)
    axes.set_xlabel(str(columns))
    axes.set_ylabel(str(rows))
    axes.set_title("\n".join(textwrap.wrap(title, 60)), fontsize=11)
    axes.tick_params(length=0)
    if width > 24:
        axes.tick_params(axis="x", labelrotation=90)
    if grid.size <= WRITTEN:
        for (row, column), value in np.ndenumerate(grid):
            text = "–" if np.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
            color = "white" if abs(value) > 0.65 * limit else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    return figure


def _short(value: object) -> str:
    return str(value).replace(".blocks.", ".").replace("hook_", "")


def attention_map(
    image: Image.Image, weights: ArrayLike, *, title: str = "", weight_off_grid: float | None = None
) -> Figure:
    """Attention over the patches of an image, laid over the image, beside the image itself.

    Args:
        image: the original image.
        weights: [rows, columns] of patches that cover the image.
        title: what attends.
        weight_off_grid: the attention that falls on no patch (the class token), to be told.

    Raises:
        ValueError: weights that are no grid.
    """
    grid: NDArray[np.float64] = np.asarray(weights, dtype=float)
    if grid.ndim != 2:
        raise ValueError(f"weights are [rows, columns] of patches, not {list(grid.shape)}")
    width, height = image.size
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    plain, laid = figure.subplots(1, 2)
    for axes in (plain, laid):
        axes.imshow(image, extent=(0, width, height, 0), interpolation="nearest")
        axes.set_axis_off()
    plain.set_title("image", fontsize=10)
    colored = laid.imshow(
        grid,
        extent=(0, width, height, 0),
        cmap="inferno",
        alpha=0.65,
        vmin=0,
        interpolation="nearest",
    )
    off = "" if weight_off_grid is None else f" ({weight_off_grid:.2f} on the class token)"
    laid.set_title(f"attention per patch{off}", fontsize=10)
    figure.colorbar(colored, ax=laid, fraction=0.045, pad=0.03)
    figure.suptitle("\n".join(textwrap.wrap(title, 80)), fontsize=11)
    return figure
