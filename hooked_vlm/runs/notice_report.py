"""The page of a NOTICE run: what was kept, where patches restore, which heads stand out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import product
from typing import Any, get_args

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hooked_vlm.data import Pair
from hooked_vlm.methods.functions import head_functions
from hooked_vlm.methods.looking import look
from hooked_vlm.methods.notice import Kind
from hooked_vlm.methods.statistics import bootstrap
from hooked_vlm.methods.universal import Universal, universal
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.inputs import open_images
from hooked_vlm.plots import attention_map, heatmap, intervals
from hooked_vlm.runs.page import Part, page, picture, reasons
from hooked_vlm.runs.page import table as table_

FEW = 0.2  # labels that fewer pairs than this share have are left out of a map
STRONGEST = 12  # heads whose effects are drawn with their intervals
LOOKED_AT, IMAGES = 3, 2  # of how many heads, on how many images, attention is drawn
FUNCTIONS_OF = 100  # pairs on which the functions of heads are measured, at most


def report(
    model: HookedVLM,
    table: pd.DataFrame,
    excluded: pd.DataFrame,
    asked: Sequence[Any],
    *,
    masks: Mapping[str, NDArray[np.bool_]] | None,
    k: float,
    seed: int,
    progress: bool,
) -> str:
    """The page, with its pictures inside.

    Args:
        model: the model.
        table: of the run.
        excluded: pairs without lines, and why.
        asked: all pairs, each with a `key`, a `task` and the `pair`.
        masks: as in `runs.notice.run`.
        k: as there.
        seed: as there.
        progress: as there.
    """
    kept = {key: one.pair for one in asked if (key := one.key) in set(table["item"])}
    role = "answer" if (table["role"] == "answer").any() else "last"
    parts: list[Part] = [("Pairs", _kept(table, excluded, len(asked)))]
    parts += [(title, picture(figure)) for title, figure in _maps(table, role)]
    found, why = None, ""
    try:
        found = universal(table, role=role, k=k, seed=seed)
    except ValueError as error:  # too few pairs to hold some out, or none of some head
        why = str(error)
    parts.append(("Universal heads", _universal(found, why, k)))
    parts.append(("Strongest heads", picture(_strongest(table, role, seed))))
    parts += _functions(model, list(kept.values()), masks, found, role, seed, progress)
    return page(f"NOTICE: {model.provenance.get('model', 'a model')}", parts)


def _kept(table: pd.DataFrame, excluded: pd.DataFrame, n: int) -> str:
    lines = [f"<p>{table['item'].nunique()} of {n} pairs were patched.</p>"]
    wrong = int((excluded["reason"] == "not answered correctly").sum())
    lines += [f"<p>Answered correctly: {1 - wrong / n:.1%}.</p>", reasons(excluded)]
    ends = table.drop_duplicates("item").groupby(["task", "modality"])
    columns = ["clean_prob", "corrupt_prob", "clean_logit_diff", "corrupt_logit_diff"]
    means = ends[columns].mean()
    means.insert(0, "pairs", ends.size())
    return "".join(lines) + table_(means.reset_index())


def _maps(table: pd.DataFrame, role: str) -> Iterator[tuple[str, Figure]]:
    """Token by layer for modules, layer by head for heads."""
    kinds = [kind for kind in get_args(Kind) if kind in set(table["kind"])]
    for modality, kind in product(sorted(set(table["modality"])), kinds):
        some = table[(table["modality"] == modality) & (table["kind"] == kind)]
        said = f"{kind}: logit difference that patches restore, {some['item'].nunique()} pairs"
        title = f"{modality.capitalize()} corrupted: {kind}"
        if (some["head"] < 0).all():
            yield title, heatmap(token_map(some), title=said)
        elif (some["role"] == role).any():
            means = some[some["role"] == role].groupby(["layer", "head"])["logit_diff"].mean()
            yield f"{title} at {role}", heatmap(means.to_xarray(), title=said)


def token_map(some: pd.DataFrame, metric: str = "logit_diff") -> xr.DataArray:
    """The mean of a metric by token and layer; tokens are told by their role, if they have one.

    Args:
        some: lines of one kind of module.
        metric: a column.
    """
    label = some["role"].where(some["role"] != "", some["token"])
    label = label.where(some["role"] == "", "<" + label + ">")
    some = some.assign(label=label)
    by = some.groupby("label")
    often = by["item"].nunique() >= FEW * some["item"].nunique()
    order = by["position"].mean()[often].sort_values().index
    means = some.groupby(["label", "layer"])[metric].mean().unstack().loc[order]
    return xr.DataArray(
        means.to_numpy(),
        dims=("token", "layer"),
        coords={"token": list(order), "layer": list(means.columns)},
    )


def _universal(found: Universal | None, why: str, k: float) -> str:
    if found is None:
        return f"<p>None could be looked for: {escape(why)}.</p>"
    n = "; ".join(
        f"{escape(task) or 'pairs'}, {modality}: {one} to select on, {other} held out"
        for (task, modality), (one, other) in found.n_pairs.items()
    )
    chance = ", ".join(f"{name} {count:.2g}" for name, count in found.null.items())
    told = (
        f"<p>Above the mean over heads by {k:g} standard deviations in every task. {n}. In a "
        f"permutation of heads so many pass on average: {chance}.</p>"
    )
    if not len(found.heads):
        return told + "<p>There are none.</p>"
    return told + table_(found.heads)


def _strongest(table: pd.DataFrame, role: str, seed: int) -> Figure:
    """The effects of the strongest heads, with intervals over pairs."""
    some = table[(table["head"] >= 0) & (table["role"] == role)]
    wide = some.pivot_table(
        index="item", columns=["modality", "kind", "layer", "head"], values="logit_diff"
    )
    mean, low, high = bootstrap(wide.to_numpy(float), seed=seed)
    order = np.argsort(-abs(mean))[:STRONGEST]
    names = [
        f"{layer}.{head} {kind.removesuffix('_heads')} ({modality})"
        for modality, kind, layer, head in wide.columns[order]
    ]
    title = f"Logit difference that a head restores at {role}, 95 % intervals over pairs"
    return intervals(names, mean[order], low[order], high[order], title=title)


def _functions(
    model: HookedVLM,
    pairs: Sequence[Pair],
    masks: Mapping[str, NDArray[np.bool_]] | None,
    found: Universal | None,
    role: str,
    seed: int,
    progress: bool,
) -> list[Part]:
    """What heads look at, in numbers, and in pictures of the first that matter."""
    some = list({pair.name: pair for pair in pairs}.values())[:FUNCTIONS_OF]
    if len(some) < 2:
        return []
    told = head_functions(model, some, masks, query=role, seed=seed, progress=progress)
    order = told["ablation"].abs().sort_values(ascending=False).index
    told = told.loc[order]
    columns = [
        *("layer", "head", "function", "matters", "ablation", "on_image", "mass", "lift"),
        *("correlation", "relative", "outlier", "same_patch"),
    ]
    shown = table_(told[columns].head(STRONGEST))
    about = f"<p>On {len(some)} clean images, seen from {role}.</p>"
    parts = [("What heads look at", about + shown)]
    for _, line in told.head(LOOKED_AT).iterrows():
        for pair in some[:IMAGES]:
            figure = _attention(model, pair, line, role)
            if figure is not None:
                title = f"Layer {line['layer']}, head {line['head']}: {pair.text}"
                parts.append((title, picture(figure)))
    return parts


def _attention(model: HookedVLM, pair: Pair, line: Any, role: str) -> Figure | None:
    part = "attn" if model.task == "llava" else "cross_attn"
    name = f"{line['stack']}.blocks.{line['layer']}.{part}.hook_pattern"
    inputs = model.prepare_prompt(pair.images[:1], (pair.texts or [])[:1])
    words = {"answer": pair.answer, "foil": pair.foil}
    roles = {key: word for key, word in words.items() if word} | dict(pair.roles)
    seen = look(model, inputs, [name], role, roles)
    boxes, weights = seen.boxes[name], seen.patterns[name][line["head"]].mean(0)
    if "tile" in boxes and boxes["tile"].nunique() > 1:
        return None  # views of LLaVA-NeXT are no one grid
    rows, columns = (int(boxes[side].max()) + 1 for side in ("patch_row", "patch_column"))
    grid = np.zeros((rows, columns))
    grid[boxes["patch_row"].astype(int), boxes["patch_column"].astype(int)] = weights.cpu()
    (image,) = open_images(pair.images[:1])
    seen_of_it = image.crop(
        (
            int(boxes["left"].min()),
            int(boxes["top"].min()),
            round(boxes["right"].max()),
            round(boxes["bottom"].max()),
        )
    )
    return attention_map(
        seen_of_it,
        grid,
        title=f"from {role}",
        weight_off_grid=float(1 - weights.sum()),
        off_grid="what is no patch",
    )
