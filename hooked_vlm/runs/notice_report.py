"""The page of a NOTICE run: what was kept, where patches restore, which heads stand out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import product
from typing import Any, get_args

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hooked_vlm.data import Pair
from hooked_vlm.methods.effects import effects
from hooked_vlm.methods.functions import head_functions
from hooked_vlm.methods.grounding import Box
from hooked_vlm.methods.looking import look, readers
from hooked_vlm.methods.notice import Kind, Settings
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


@dataclass(frozen=True)
class Told:
    """What a report is made of.

    Attributes:
        model: the model.
        table: of the run.
        excluded: pairs without lines, and why, as `runs.load` has them.
        pairs: all pairs of the run, by their keys.
        tasks: by key the task.
        masks: as in `runs.notice.run`.
        settings: as there.
        k: as there.
        seed: as there.
        progress: as there.
    """

    model: HookedVLM
    table: pd.DataFrame
    excluded: pd.DataFrame
    pairs: Mapping[str, Pair]
    tasks: Mapping[str, str]
    masks: Mapping[str, NDArray[np.bool_] | Box]
    settings: Settings
    k: float | None
    seed: int
    progress: bool


def report(told: Told) -> str:
    """The page, with its pictures inside."""
    table, role = _with_role(told.table)
    told = replace(told, table=table)
    parts: list[Part] = [("Pairs", _kept(told))]
    parts += [(title, picture(figure)) for title, figure in _maps(table, role)]
    at_role = table[(table["head"] >= 0) & (table["role"] == role)]
    if len(at_role):
        found, why = None, ""
        try:
            found = universal(table, role=role, k=told.k, seed=told.seed)
        except ValueError as error:  # too few pairs to hold some out, or none of some head
            why = str(error)
        parts.append(("Universal heads", _universal(found, why, told.k)))
        strongest = effects(at_role, by=("modality", "kind", "layer", "head"), seed=told.seed)
        strongest = strongest.loc[strongest["mean"].abs().sort_values(ascending=False).index]
        parts.append((f"Strongest heads at {role}", picture(_strongest(strongest))))
        heads = _named(told.model, found, strongest)
        if heads:
            parts += _functions(told, heads, role)
    return page(f"NOTICE: {told.model.provenance.get('model', 'a model')}", parts)


def _with_role(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table, and the role at which heads are compared: the answer, where that was patched."""
    roles = table["role"].value_counts().drop("", errors="ignore")
    for role in ("answer", "last", *roles.index):
        if role in roles:
            return table, role
    last = table["position"] == table.groupby("item")["position"].transform("max")
    return table.assign(role=np.where(last, "last", "")), "last"


def _kept(told: Told) -> str:
    n, patched = len(told.pairs), told.table.drop_duplicates("item")
    lines = [f"<p>{len(patched)} of {n} pairs were patched.</p>", reasons(told.excluded)]
    by = patched.groupby(["task", "modality"])
    columns = ["clean_prob", "corrupt_prob", "clean_logit_diff", "corrupt_logit_diff"]
    means = by[columns].mean()
    means.insert(0, "pairs", by.size())
    right = pd.Series(patched["clean_correct"].to_numpy(), index=patched["task"])
    if told.settings.clean_correct:  # then those that were left out are known to be right or wrong
        known = {"not answered correctly": False, "corruption without effect": True}
        left = told.excluded[told.excluded["reason"].isin(known)]
        tasks = [told.tasks[item] for item in left["item"]]
        right = pd.concat([right, pd.Series(left["reason"].map(known).to_numpy(bool), tasks)])
    for task, some in right.groupby(level=0):
        of = f" of {escape(task)}" if task else ""
        lines.append(f"<p>Answered correctly{of}: {some.mean():.1%} of {len(some)} that ran.</p>")
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


def token_map(some: pd.DataFrame) -> xr.DataArray:
    """The mean restored logit difference by token and layer; a token is told by its role, if any.

    Args:
        some: lines of one kind of module.
    """
    label = some["role"].where(some["role"] != "", some["token"])
    label = label.where(some["role"] == "", "<" + label + ">")
    some = some.assign(label=label)
    by = some.groupby("label")
    often = by["item"].nunique() >= FEW * some["item"].nunique()
    order = by["position"].mean()[often].sort_values().index
    means = some.groupby(["label", "layer"])["logit_diff"].mean().unstack().loc[order]
    return xr.DataArray(
        means.to_numpy(),
        dims=("token", "layer"),
        coords={"token": list(order), "layer": list(means.columns)},
    )


def _universal(found: Universal | None, why: str, k: float | None) -> str:
    if found is None:
        return f"<p>None could be looked for: {escape(why)}.</p>"
    n = "; ".join(
        f"{escape(task) or 'pairs'}, {modality}: {one} to select on, {other} held out"
        for (task, modality), (one, other) in found.n_pairs.items()
    )
    chance = ", ".join(f"{name} {count:.2g}" for name, count in found.null.items())
    least = "what 95 % of permutations do not reach" if k is None else f"{k:g} standard deviations"
    told = (
        f"<p>Above the mean over heads by {least}, in every task. {n}. In a permutation of heads "
        f"so many pass on average: {chance}.</p>"
    )
    return told + (table_(found.heads) if len(found.heads) else "<p>There are none.</p>")


def _strongest(told: pd.DataFrame) -> Figure:
    """The effects of the strongest heads, with intervals over pairs."""
    told = told.head(STRONGEST)
    names = [
        f"{one.layer}.{one.head} {one.kind.removesuffix('_heads')} ({one.modality})"
        for one in told.itertuples()
    ]
    title = "Logit difference that a head restores, 95 % intervals over pairs"
    return intervals(names, told["mean"], told["low"], told["high"], title=title)


def _named(model: HookedVLM, found: Universal | None, strongest: pd.DataFrame) -> list[str]:
    """The heads that are looked at: universal ones, then the strongest, that see the image."""
    kind = "attn_heads" if model.task == "llava" else "cross_attn_heads"
    stem = readers(model)[0].partition(".blocks.")[0]
    part = kind.removesuffix("_heads")
    lines = [strongest] if found is None else [found.heads, strongest]
    every = pd.concat([one[one["kind"] == kind][["layer", "head"]] for one in lines])
    chosen = every.drop_duplicates().head(STRONGEST)
    names = [
        f"{stem}.blocks.{one.layer}.{part}.heads.{one.head}.hook_z" for one in chosen.itertuples()
    ]
    known = set(readers(model))
    return [one for one in names if re.sub(r"heads\.\d+\.hook_z", "hook_pattern", one) in known]


def _functions(told: Told, heads: Sequence[str], role: str) -> list[Part]:
    """What heads look at, in numbers, and in pictures of the first."""
    pairs, masks = _sample(told, role)
    if len(pairs) < 2:
        return []
    model = told.model
    numbers = head_functions(
        model, pairs, masks, heads, query=role, seed=told.seed, progress=told.progress
    )
    order = [tuple(int(number) for number in re.findall(r"\d+", name)) for name in heads]
    numbers = numbers.set_index(["layer", "head"], drop=False).loc[
        order
    ]  # they come in the model's
    columns = [
        *("layer", "head", "function", "matters", "ablation", "on_image", "mass", "lift"),
        *("correlation", "relative", "outlier", "same_patch"),
    ]
    about = (
        f"<p>Universal heads, then the strongest, on {len(pairs)} clean images, seen from "
        f"{escape(role)}. A head that does not matter looks as its function says, and does "
        "nothing.</p>"
    )
    parts = [("What heads look at", about + table_(numbers[columns]))]
    for _, line in numbers.head(LOOKED_AT).iterrows():
        for pair in pairs[:IMAGES]:
            figure = _attention(model, pair, line, role)
            if figure is not None:
                title = f"Layer {line['layer']}, head {line['head']}: {pair.text}"
                parts.append((title, picture(figure)))
    return parts


def _sample(told: Told, role: str) -> tuple[list[Pair], dict[str, NDArray[np.bool_] | Box]]:
    """Pairs that have the role, one of each image and question, from all tasks, and their masks."""
    has = told.table.loc[told.table["role"] == role, "item"].unique()
    several = len(set(told.tasks.values())) > 1
    pairs: dict[str, Pair] = {}
    masks: dict[str, NDArray[np.bool_] | Box] = {}
    for key in has:
        pair, task = told.pairs[key], told.tasks[key]
        name = f"{task}/{pair.name}"
        pairs.setdefault(name, replace(pair, name=name))
        mask = told.masks.get(name if several else pair.name)
        if mask is not None:
            masks[name] = mask
    names = list(pairs)
    rng = np.random.default_rng(told.seed)
    chosen = sorted(rng.permutation(len(names))[:FUNCTIONS_OF].tolist())
    sample = [pairs[names[at]] for at in chosen]
    return sample, {one.name: masks[one.name] for one in sample if one.name in masks}


def _attention(model: HookedVLM, pair: Pair, line: Any, role: str) -> Figure | None:
    """A head's attention, laid over an image; None of several views."""
    part = "attn" if model.task == "llava" else "cross_attn"
    name = f"{line['stack']}.blocks.{line['layer']}.{part}.hook_pattern"
    texts = None if pair.texts is None else pair.texts[:1]
    inputs = model.prepare_prompt(pair.images[:1], texts)
    seen = look(model, inputs, [name], role, pair.words)
    boxes = seen.boxes[name]
    weights = seen.patterns[name][line["head"]].mean(0).float().numpy(force=True)
    if "tile" in boxes and boxes["tile"].nunique() > 1:
        return None  # views of LLaVA-NeXT are no one grid
    rows, columns = (int(boxes[side].max()) + 1 for side in ("patch_row", "patch_column"))
    grid = np.zeros((rows, columns))
    grid[boxes["patch_row"].astype(int), boxes["patch_column"].astype(int)] = weights
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
