"""Results of a sweep: labelled numbers, with the runs they are to be held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hooked_vlm.models.names import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

VANISHING = 1e-6  # a clean-corrupt difference below this share of the metric's size says nothing


@dataclass(frozen=True)
class PatchingResult:
    """The metric of every patched run, by pair and site.

    Attributes:
        data: the metric in the patched run; dimensions `pair`, then `layer` and `head` where the
            sites form such a grid, else `site`, and `position` where it was asked for.
        clean: the metric in the clean run, by pair.
        corrupt: the metric in the corrupt run, by pair.
        sites: the sites, in the order in which they were swept.
        provenance: what the numbers were made with.
    """

    data: xr.DataArray
    clean: xr.DataArray
    corrupt: xr.DataArray
    sites: tuple[Site, ...]
    provenance: dict[str, Any]

    @property
    def restored(self) -> xr.DataArray:
        """The share of the gap between the two runs that each patch closes.

        0: as without the patch; 1: as the run that was patched from. Denoising, that is
        `(patched - corrupt) / (clean - corrupt)`; noising, `(patched - clean) / (corrupt - clean)`.
        NaN for a pair whose two runs do not differ.
        """
        start, end = self.corrupt, self.clean
        if self.provenance["direction"] == "noise":
            start, end = end, start
        gap = end - start
        size = np.maximum(abs(self.clean), abs(self.corrupt))
        guarded = gap.where(abs(gap) > VANISHING * size)
        return ((self.data - start) / guarded).rename("restored")

    def flat(self) -> xr.DataArray:
        """`restored`, averaged over pairs, with one entry per site (and position)."""
        mean = self.restored.mean("pair")
        if "head" in mean.dims and "layer" in mean.dims:
            mean = mean.stack(site=("layer", "head"))
        return mean.transpose("site", ...)

    def top(self, k: int = 5) -> list[Site]:
        """The sites whose patches restore the most on average, strongest first.

        Args:
            k: how many; fewer if there are not as many.

        Returns:
            Sites, which `sites=` takes again; with their positions where these were swept.
        """
        mean = self.flat().values.reshape(len(self.sites), -1)
        order = np.argsort(-np.where(np.isnan(mean), -np.inf, mean), axis=None, kind="stable")[:k]
        cells = [divmod(int(cell), mean.shape[1]) for cell in order]
        if "position" not in self.data.dims:
            return [self.sites[site] for site, _ in cells]
        at = self.data["position"].values.tolist()
        return [replace(self.sites[site], position=at[place]) for site, place in cells]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair, site and position, with the metric, both runs, and the share.

        The sites of a grid are told by stack, layer, component and head, others by name too.
        """
        columns = {"patched": self.data, "restored": self.restored}
        columns |= {"clean": self.clean, "corrupt": self.corrupt}
        return xr.Dataset(columns).to_dataframe().reset_index()

    def plot(self) -> Figure:
        """A heat map of `restored`, averaged over pairs.

        Layers by heads where they are a grid, else sites; sites by positions where there are any.
        """
        from hooked_vlm.plots import heatmap

        mean = self.restored.mean("pair")
        if mean.ndim > 2:
            mean = self.flat().drop_vars(("site", "layer", "head"))
            mean = mean.assign_coords(site=[site.name for site in self.sites])
        titles = {"denoise": "restored by each patch", "noise": "destroyed by each patch"}
        title = f"{self.provenance['metric']} {titles[self.provenance['direction']]}"
        return heatmap(mean, title=title)


def label(
    values: np.ndarray,
    pairs: Sequence[str],
    sites: Sequence[Site],
    positions: Sequence[int] | None,
) -> xr.DataArray:
    """Names the axes of [pair, site, position] values; a full grid gets `layer` and `head`.

    A grid is one component of one stack, at every head of every layer that occurs.

    Args:
        values: the metric.
        pairs: names of the pairs.
        sites: the sites.
        positions: the positions, None where each site spans all of them.
    """
    array = xr.DataArray(
        values,
        dims=("pair", "site", "position"),
        coords={"pair": list(pairs), "site": [site.name for site in sites]},
        name="patched",
    )
    if positions is None:
        array = array.squeeze("position", drop=True)
    else:
        array = array.assign_coords(position=list(positions))
    layers = sorted({site.layer for site in sites if site.layer is not None})
    heads = sorted({site.head for site in sites if site.head is not None})
    grid = [(layer, head) for layer in layers for head in heads]
    kinds = {(site.stack, site.component) for site in sites}
    placed = any(site.position is not None for site in sites)
    if len(kinds) == 1 and not placed and [(site.layer, site.head) for site in sites] == grid:
        ((stack, component),) = kinds
        shape = (len(pairs), len(layers), len(heads), *array.shape[2:])
        dims = ("pair", "layer", "head", *array.dims[2:])
        coords: dict[str, Any] = {"pair": array["pair"].values, "layer": layers, "head": heads}
        coords |= {"stack": stack, "component": component}
        if positions is not None:
            coords["position"] = list(positions)
        return xr.DataArray(array.values.reshape(shape), dims=dims, coords=coords, name="patched")
    described = {
        field: ("site", [getattr(site, field) for site in sites])
        for field in ("stack", "layer", "component", "head")
    }
    if placed:
        described["position"] = ("site", [site.position for site in sites])
    return array.assign_coords(described)
