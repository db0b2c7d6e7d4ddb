"""What a causal trace found: the metric of every restored run, the clean and the corrupt ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import Swept, Together, parts
from hooked_vlm.patching.places import shown
from hooked_vlm.patching.result import VANISHING, PatchingResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Of = Literal["normalised", "difference", "data"]
SAID = {"normalised": "restored", "difference": "gained", "data": "after restoring"}


@dataclass(frozen=True)
class TraceResult:
    """The metric when clean activations stand in a corrupt run.

    Attributes:
        data: the metric; dimensions `example`, `draw`, `site` and, where they were asked for,
            `position`, NaN where an example has no such place. A site's coordinates `stack`,
            `layer`, `component` and `head` are those of the middle of its window.
        clean: the metric in the clean run, by example.
        corrupt: the metric in the corrupt runs, by example and draw.
        by_construction: True for cells that give the clean run whatever the model is, by example,
            site and position: the last layer of a stack at all positions that are read of it, such
            as an answer decoder's only one. They tell nothing.
        sites: what was restored, in order.
        tokens: for each example by stack what stands at its positions, if a processor knows it.
        provenance: what the numbers were made with; `answers`, what each example's metric reads.
    """

    data: xr.DataArray
    clean: xr.DataArray
    corrupt: xr.DataArray
    by_construction: xr.DataArray
    sites: tuple[Swept, ...]
    tokens: tuple[dict[str, list[str]], ...]
    provenance: dict[str, Any]

    @property
    def difference(self) -> xr.DataArray:
        """What each restoration adds to the metric of its corrupt run."""
        return (self.data - self.corrupt).rename("difference")

    @property
    def normalised(self) -> xr.DataArray:
        """`(restored - corrupt) / (clean - corrupt)` of each draw: 0 as corrupt, 1 as clean.

        NaN in a draw whose noise leaves the metric as it is: the answer does not depend on the
        image then. Where it barely does, the numbers are large and mean little.
        """
        gap = _guarded(self.clean, self.corrupt)
        return (self.difference / gap).rename("normalised")

    @property
    def undefined(self) -> int:
        """How many examples have no draw in which the noise changes the metric."""
        vanish = _guarded(self.clean, self.corrupt).isnull().all("draw")
        return int((vanish & self.clean.notnull()).sum())

    def keep(self, least: float) -> TraceResult:
        """The examples whose answer depends on the image.

        Args:
            least: by how much the metric of the clean run and the mean of the corrupt ones differ.

        Raises:
            ValueError: there is none.
        """
        depends = abs(self.clean - self.corrupt.mean("draw")) >= least
        if not depends.any():
            raise ValueError(f"in no example do clean and corrupt runs differ by {least}")
        kept = np.flatnonzero(depends)
        told = {
            **self.provenance,
            "answers": [self.provenance["answers"][at] for at in kept],
            "dropped": self.provenance.get("dropped", 0) + len(depends) - len(kept),
        }
        return replace(
            self,
            **{
                name: getattr(self, name).isel(example=kept)
                for name in ("data", "clean", "corrupt", "by_construction")
            },
            tokens=tuple(self.tokens[at] for at in kept),
            provenance=told,
        )

    @property
    def maps(self) -> dict[str, xr.DataArray]:
        """`data` by stack: `example`, `draw`, `layer`, then `head` and `position` if there are any.

        Where several components of a stack were restored there is one map of each, under
        `stack.component`; sites outside of blocks are in none.
        """
        return self._maps(self.data)

    def mean(
        self,
        of: Of = "normalised",
        *,
        ci: Literal["bootstrap"] | None = None,
        level: float = 0.95,
        n: int = 1000,
        seed: int = 0,
    ) -> xr.Dataset:
        """The mean over draws, then over examples.

        Args:
            of: of which numbers. Of `normalised`, an example's mean gain over its mean gap, so that
                draws in which the noise changes little weigh little, and 1 is the clean run still;
                examples without a gap are left out (`undefined`).
            ci: `bootstrap` for an interval over examples, as in `PatchingResult.mean`.
            level: see there.
            n: see there.
            seed: see there.

        Returns:
            `mean`; `deviation` of the draws, each averaged over examples, NaN of a single draw;
            `n`, the number of examples behind each; with `ci` also `low` and `high`.

        Raises:
            ValueError: examples of different lengths that were traced at `each` position; an
                interval of a single example.
        """
        self._check_aligned()
        values = getattr(self, of)
        if of == "normalised":
            values = self.difference / _guarded(self.clean, self.corrupt.mean("draw"))
        each = values.mean("draw").rename(example="pair")
        ends = self.clean.rename(example="pair"), self.corrupt.mean("draw").rename(example="pair")
        found = PatchingResult(each, *ends, self.sites, {"direction": "denoise"}).mean(
            "data", ci=ci, level=level, n=n, seed=seed
        )
        by_draw, n_draws = values.mean("example"), values.sizes["draw"]
        deviation = by_draw.std("draw", ddof=1) if n_draws > 1 else by_draw.isel(draw=0) * np.nan
        return found.assign(deviation=deviation.drop_vars("draw", errors="ignore"))

    def top(self, k: int = 5) -> list[Swept]:
        """The sites, with their positions, that restore most on average; `sites=` takes them again.

        Cells that are the clean run by construction are left out.

        Args:
            k: how many; fewer if there are not as many.

        Raises:
            ValueError: as in `mean`.
        """
        mean = self.mean()["mean"].where(~self.by_construction.any("example"))
        mean = mean.transpose("site", ...)
        values = mean.values.reshape(len(self.sites), -1)
        order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=None, kind="stable")
        cells = [divmod(int(at), values.shape[1]) for at in order[:k]]
        cells = [(site, at) for site, at in cells if not np.isnan(values[site, at])]
        if "position" not in self.data.dims:
            return [self.sites[site] for site, _ in cells]
        places = self.provenance["places"]
        return [_placed(self.sites[site], places[at]) for site, at in cells]

    def plot(
        self,
        stack: str | None = None,
        *,
        of: Of = "normalised",
        labels: Sequence[str] | None = None,
    ) -> Figure:
        """A heat map of the mean, positions by layers; by construction the clean run: hatched.

        Args:
            stack: which of `maps`; by default the first.
            of: of which numbers.
            labels: of the rows; by default the token, where all examples have the same one there.

        Raises:
            KeyError: there is no such map.
            ValueError: as in `mean`; another number of labels than of rows.
        """
        from matplotlib.patches import Rectangle

        from hooked_vlm.plots import heatmap

        maps = self._maps(self.mean(of)["mean"])
        stack = next(iter(maps), None) if stack is None else stack
        if stack not in maps:
            raise KeyError(f"there is no map of {stack!r}, only of {list(maps)}")
        values = maps[stack]
        sure = self._maps(self.by_construction.any("example"))[stack]
        if "position" in values.dims:
            values, sure = (one.transpose("position", "layer", ...) for one in (values, sure))
            values = values.assign_coords(position=self._labels(stack, values["position"], labels))
        noise, metric = self.provenance["noise"], self.provenance["metric"]
        title = f"{metric} {SAID[of]}, {stack}; {noise} noise on {self.provenance['on']}"
        if sure.any():
            title += "; hatched: the clean run by construction"
        figure = heatmap(values, title=title)
        for row, column in np.argwhere(np.atleast_2d(sure.values.T).T):
            corner = column - 0.5, row - 0.5
            figure.axes[0].add_patch(
                Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor="0.6", linewidth=0)
            )
        return figure

    def to_dataframe(self) -> pd.DataFrame:
        """One line per example, draw, site and position that was run.

        With the metric restored, clean and corrupt, the effects, whether it is the clean run by
        construction, and the token that stands there.
        """
        columns = {"restored": self.data, "clean": self.clean, "corrupt": self.corrupt}
        columns |= {"difference": self.difference, "normalised": self.normalised}
        columns["by_construction"] = self.by_construction
        frame = xr.Dataset(columns).to_dataframe().reset_index()
        frame = frame[frame["restored"].notna()].reset_index(drop=True)
        if "position" in frame:
            known = dict(zip(self.data["example"].values.tolist(), self.tokens, strict=True))
            frame["token"] = [
                _token(known[example].get(stack, []), position)
                for example, stack, position in zip(
                    frame["example"], frame["stack"], frame["position"], strict=True
                )
            ]
        return frame

    def _maps(self, values: xr.DataArray) -> dict[str, xr.DataArray]:
        """Values with a dimension `site` as one array per stack."""
        fields = (self.data[name].values.tolist() for name in ("stack", "component", "layer"))
        kinds: dict[tuple[str, str], list[int]] = {}
        for number, (stack, component, layer) in enumerate(zip(*fields, strict=True)):
            if layer is not None:
                kinds.setdefault((stack, component), []).append(number)
        stacks = [stack for stack, _ in kinds]
        found = {}
        for (stack, component), at in kinds.items():
            key = stack if stacks.count(stack) == 1 else f"{stack}.{component}"
            part = values.isel(site=at).drop_vars(["site", "stack", "component"])
            if "position" in values.dims:
                others = [dim for dim in self.data.dims if dim != "position"]
                there = self.data.isel(site=at).notnull().any(others)
                part = part.isel(position=np.flatnonzero(there))
            if all(head is None for head in part["head"].values):
                found[key] = part.swap_dims(site="layer").drop_vars("head")
            else:
                found[key] = part.set_index(site=["layer", "head"]).unstack("site")
            order = ("example", "draw", "layer", "head", "position")
            found[key] = found[key].transpose(*order, missing_dims="ignore")
        return found

    def _check_aligned(self) -> None:
        """Refuses positions that do not correspond."""
        if not self.provenance["each"]:
            return
        there = self.data.notnull().any("draw").transpose("example", ...)
        run = [number for number in range(there.sizes["example"]) if there[number].any()]
        for other in run[1:]:
            if (there[other] != there[run[0]]).any():
                names = self.data["example"].values[[run[0], other]]
                n, m = (int(there[one].any("site").sum()) for one in (run[0], other))
                raise ValueError(
                    f"examples {str(names[0])!r} and {str(names[1])!r} have {n} and {m} "
                    "positions, which do not correspond, so that a mean over them says nothing; "
                    "trace by role, such as positions=['first', 'last'], or read the examples of "
                    ".normalised one by one"
                )

    def _labels(
        self, stack: str, positions: xr.DataArray, given: Sequence[str] | None
    ) -> list[str]:
        at = positions.values.tolist()
        if given is not None:
            if len(given) != len(at):
                raise ValueError(f"there are {len(given)} labels for {len(at)} rows of {stack!r}")
            return list(given)
        stack = stack.partition(".")[0]
        rows = []
        for place in at:
            words = {_token(one.get(stack, []), place) for one in self.tokens}
            several = f"word {place}" if isinstance(place, int) else str(place)
            rows.append(several if len(words) > 1 else words.pop() or str(place))
        return rows


def _guarded(clean: xr.DataArray, corrupt: xr.DataArray) -> xr.DataArray:
    """`clean - corrupt`, NaN where it vanishes."""
    gap = clean - corrupt
    return gap.where(abs(gap) > VANISHING * np.maximum(abs(clean), abs(corrupt)))


def _placed(site: Swept, place: Any) -> Swept:
    if isinstance(site, Site):
        return replace(site, position=place)
    return Together(
        tuple(replace(one, position=place) for one in parts(site)), f"{site.name}@{shown(place)}"
    )


def _token(tokens: list[str], position: Any) -> str:
    """What stands at a position; nothing of a role."""
    known = isinstance(position, int) and -len(tokens) <= position < len(tokens)
    return tokens[position] if known else ""
