"""Results of a sweep: labelled numbers, with the runs they are to be held against."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import xarray as xr

from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import Swept, Together
from hooked_vlm.patching.places import Region, shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from hooked_vlm.models.base import HookedVLM

VANISHING = 1e-6  # a clean-corrupt difference below this share of the metric's size says nothing


@dataclass(frozen=True)
class PatchingResult:
    """The metric of every run that something was written into, by pair and site.

    Attributes:
        data: the metric in these runs; dimensions `pair`, then `layer` and `head` where the sites
            form such a grid, else `site`, and `position` where it was asked for.
        clean: the metric in the clean run, by pair.
        corrupt: the metric in the corrupt run, by pair; None where inputs have none.
        sites: the sites, in the order in which they were swept.
        provenance: what the numbers were made with.
    """

    data: xr.DataArray
    clean: xr.DataArray
    corrupt: xr.DataArray | None
    sites: tuple[Swept, ...]
    provenance: dict[str, Any]

    @property
    def start(self) -> xr.DataArray:
        """The metric in the run that was written into, before anything was."""
        into = {"denoise": "corrupt", "noise": "clean"}
        direction = self.provenance["direction"]
        found = getattr(self, into.get(direction, self.provenance.get("on", "clean")))
        assert found is not None
        return cast(xr.DataArray, found)

    @property
    def difference(self) -> xr.DataArray:
        """What each write adds to the metric."""
        return (self.data - self.start).rename("difference")

    @property
    def restored(self) -> xr.DataArray:
        """The share of the gap between the two runs of a pair that each write closes.

        0: as without the write; 1: as the other run. Denoising, that is
        `(patched - corrupt) / (clean - corrupt)`; noising, `(patched - clean) / (corrupt - clean)`.
        NaN for a pair whose two runs do not differ (`undefined` counts them).

        Raises:
            ValueError: inputs without a corrupt run.
        """
        if self.corrupt is None:
            raise ValueError("these inputs have no corrupt run to measure by; read .difference")
        end = self.clean if self.start is self.corrupt else self.corrupt
        return ((self.data - self.start) / self._guarded(end - self.start)).rename("restored")

    def _guarded(self, gap: xr.DataArray) -> xr.DataArray:
        assert self.corrupt is not None
        size = np.maximum(abs(self.clean), abs(self.corrupt))
        return gap.where(abs(gap) > VANISHING * size)

    @property
    def undefined(self) -> int:
        """How many pairs have two runs that do not differ, so that `restored` is NaN."""
        if self.corrupt is None:
            return 0
        return int(self._guarded(self.clean - self.corrupt).isnull().sum())

    @property
    def effect(self) -> xr.DataArray:
        """`restored` of patches between pairs, `difference` of ablations."""
        return self.difference if self._ablates else self.restored

    @property
    def _ablates(self) -> bool:
        return bool(self.provenance["direction"] == "ablate")

    def mean(
        self,
        of: Literal["effect", "restored", "difference", "data"] = "effect",
        *,
        ci: Literal["bootstrap"] | None = "bootstrap",
        level: float = 0.95,
        n: int = 1000,
        seed: int = 0,
    ) -> xr.Dataset:
        """The mean over pairs and, with `ci`, an interval of it.

        Pairs without a number (`undefined`) are left out.

        Args:
            of: of which numbers.
            ci: `bootstrap` draws pairs with replacement and takes quantiles of the means (Efron,
                Ann. Statist. 7, 1979); None for the mean alone.
            level: the share of means inside the interval.
            n: how many draws.
            seed: of the draws.

        Returns:
            `mean`, `low`, `high`, and `n`, the number of pairs behind each.

        Raises:
            ValueError: an interval of a single pair.
        """
        values = getattr(self, of)
        found = {"mean": values.mean("pair"), "n": values.notnull().sum("pair")}
        if ci is None:
            return xr.Dataset(found)
        if ci != "bootstrap":
            raise ValueError(f"ci is 'bootstrap' or None, not {ci!r}")
        pairs = values.sizes["pair"]
        if pairs < 2:
            raise ValueError("one pair has no interval; give more pairs, or ci=None")
        generator = np.random.default_rng(seed)
        drawn = [
            values.isel(pair=generator.integers(pairs, size=pairs)).mean("pair") for _ in range(n)
        ]
        ends = np.nanquantile(np.stack(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
        low, high = (found["mean"].copy(data=end) for end in ends)
        return xr.Dataset(found | {"low": low, "high": high})

    def flat(self) -> xr.DataArray:
        """`effect`, averaged over pairs, with one entry per site (and position)."""
        mean = self.effect.mean("pair")
        if "head" in mean.dims and "layer" in mean.dims:
            mean = mean.stack(site=("layer", "head"))
        return mean.transpose("site", ...)

    def top(self, k: int = 5) -> list[Swept]:
        """The sites with the strongest mean effects, strongest first.

        Of patches those that restore the most; of ablations those that change the most.

        Args:
            k: how many; fewer if there are not as many.

        Returns:
            Sites, which `sites=` takes again; with their positions where these were swept.
        """
        mean = self.flat().values.reshape(len(self.sites), -1)
        mean = abs(mean) if self._ablates else mean
        order = np.argsort(-np.where(np.isnan(mean), -np.inf, mean), axis=None, kind="stable")[:k]
        cells = [divmod(int(cell), mean.shape[1]) for cell in order]
        if "position" not in self.data.dims:
            return [self.sites[site] for site, _ in cells]
        at = self.places or self.data["position"].values.tolist()
        return [_placed(self.sites[site], at[place]) for site, place in cells]

    @property
    def places(self) -> list[Any] | None:
        """The places of the `position` dimension, as `positions=` takes them."""
        places: list[Any] | None = self.provenance.get("places")
        return places

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair, site and position, with the metric, both runs, and the effects.

        The sites of a grid are told by stack, layer, component and head, others by name too.
        """
        columns = {"patched": self.data, "difference": self.difference, "clean": self.clean}
        if self.corrupt is not None:
            columns |= {"restored": self.restored, "corrupt": self.corrupt}
        return xr.Dataset(columns).to_dataframe().reset_index()

    def plot(self) -> Figure:
        """A heat map of `effect`, averaged over pairs.

        Layers by heads where they are a grid, else sites; sites by positions where there are any.
        """
        from hooked_vlm.plots import heatmap

        mean = self.effect.mean("pair")
        if mean.ndim > 2:
            mean = self.flat().drop_vars(("site", "layer", "head"))
            mean = mean.assign_coords(site=[site.name for site in self.sites])
        titles = {"denoise": "restored by each patch", "noise": "destroyed by each patch"}
        ablated = f"added by {self.provenance.get('intervention')}"
        title = titles.get(self.provenance["direction"], ablated)
        return heatmap(mean, title=f"{self.provenance['metric']} {title}")

    def save(self, file: str | Path) -> None:
        """Writes the result to one file, whole or not at all.

        Args:
            file: an `.npz`: the numbers, and a text in JSON for the rest; `load` reads it.
        """
        arrays = {"data": self.data.values, "clean": self.clean.values}
        if self.corrupt is not None:
            arrays["corrupt"] = self.corrupt.values
        told = {
            "pairs": self.data["pair"].values.tolist(),
            "positions": _listed(self.data, "position"),
            "sites": [_written(site) for site in self.sites],
            "provenance": {**self.provenance, "places": _written(self.places)},
        }
        buffer = io.BytesIO()
        arrays["told"] = np.array(json.dumps(told))
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # of names it cannot know
        beside = Path(file).with_name(f"{Path(file).name}.part")
        beside.write_bytes(buffer.getvalue())
        beside.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> PatchingResult:
        """Reads what `save` wrote; no code is run.

        Raises:
            ValueError: a file of another kind.
        """
        try:
            with np.load(file, allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            told = json.loads(str(arrays.pop("told")))
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{str(file)!r} is no saved result: {error}") from error
        sites = tuple(_read(site) for site in told["sites"])
        shape = len(told["pairs"]), len(sites), -1
        data = label(arrays["data"].reshape(shape), told["pairs"], sites, told["positions"])
        ends = {
            name: xr.DataArray(arrays[name], dims="pair", coords={"pair": told["pairs"]})
            for name in ("clean", "corrupt")
            if name in arrays
        }
        places = _read(told["provenance"].pop("places"))
        provenance = told["provenance"] | ({} if places is None else {"places": places})
        return cls(data, ends["clean"], ends.get("corrupt"), sites, provenance)


def provenance(model: HookedVLM, told: Mapping[str, Any]) -> dict[str, Any]:
    """What numbers were made with: the model, its weights, versions, and what a method tells."""
    return {
        **model.provenance,
        **told,
        "weights": model.weights_hash(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _placed(site: Swept, place: Any) -> Swept:
    if isinstance(site, Site):
        return replace(site, position=place)
    inside = tuple(replace(one, position=place) for one in site.sites if isinstance(one, Site))
    return Together(inside, f"{site.name}@{shown(place)}")


def _listed(data: xr.DataArray, name: str) -> list[Any] | None:
    return data[name].values.tolist() if name in data.dims else None


# Sites and places in JSON: what a dataclass holds, under its name; a tuple as such.
_KINDS = {kind.__name__: kind for kind in (Site, Together, Region)}


def _written(value: Any) -> Any:
    if type(value).__name__ in _KINDS:
        fields = {key: _written(one) for key, one in vars(value).items()}
        return {"is": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return {"is": "tuple", "of": [_written(one) for one in value]}
    return [_written(one) for one in value] if isinstance(value, list) else value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(one) for one in value]
    if not isinstance(value, dict):
        return value
    kind = value.pop("is")
    if kind == "tuple":
        return tuple(_read(one) for one in value["of"])
    return _KINDS[kind](**{key: _read(one) for key, one in value.items()})


def label(
    values: np.ndarray,
    pairs: Sequence[str],
    sites: Sequence[Swept],
    positions: Sequence[Any] | None,
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
    alone = [site for site in sites if isinstance(site, Site)]
    layers = sorted({site.layer for site in alone if site.layer is not None})
    heads = sorted({site.head for site in alone if site.head is not None})
    grid = [(layer, head) for layer in layers for head in heads]
    kinds = {(site.stack, site.component) for site in alone}
    placed = any(site.position is not None for site in alone)
    whole = len(alone) == len(sites) and [(site.layer, site.head) for site in alone] == grid
    if len(kinds) == 1 and not placed and whole:
        ((stack, component),) = kinds
        shape = (len(pairs), len(layers), len(heads), *array.shape[2:])
        dims = ("pair", "layer", "head", *array.dims[2:])
        coords: dict[str, Any] = {"pair": array["pair"].values, "layer": layers, "head": heads}
        coords |= {"stack": stack, "component": component}
        if positions is not None:
            coords["position"] = list(positions)
        return xr.DataArray(array.values.reshape(shape), dims=dims, coords=coords, name="patched")
    fields = {
        field: ("site", [_field(site, field) for site in sites])
        for field in ("stack", "layer", "component", "head")
    }
    if placed:
        positions_of = [shown(_field(site, "position")) for site in sites]
        fields["position"] = ("site", positions_of)
    return array.assign_coords(fields)


def _field(site: Swept, name: str) -> Any:
    return getattr(site, name) if isinstance(site, Site) else site.common(name)
