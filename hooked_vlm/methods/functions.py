"""What a head does with an image, in numbers: where it looks, and what is lost without it.

NOTICE (arXiv 2406.16320) judges by eye, from a head's attention less the mean of all heads, and
names implicit image segmentation (later: object detection), object inhibition (suppression) and
outlier inhibition (suppression). Here each name has a criterion, and an interval over images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from hooked_vlm import patching as P
from hooked_vlm.data import Pair
from hooked_vlm.methods.grounding import Box, boxed, correlation, coverage, mass
from hooked_vlm.methods.looking import look, readers
from hooked_vlm.methods.statistics import bootstrap
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import as_sites
from hooked_vlm.patching.places import NoSuchPlace

HALF = 0.5  # of a head's attention on one patch, in half of the images, makes it an outlier head
MORE = 1.5  # times as much attention inside of the mask as an even spread has: it looks there
MATTERS = 0.03  # of what the strongest head's ablation changes is least for one that matters

Mask = NDArray[np.bool_]


def head_functions(
    model: HookedVLM,
    pairs: Sequence[Pair],
    masks: Mapping[str, Mask | Box] | None = None,
    heads: Sequence[Site] | Sequence[str] | str | None = None,
    *,
    query: Any = "answer",
    intervention: P.Intervention | None = None,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measures heads that see the image, on the clean inputs of pairs.

    Args:
        model: a model that answers about an image.
        pairs: the pairs; of several with one image and question, such as those of two ways of
            corruption, the first counts.
        masks: by a pair's name, bool [height, width] of what the question is about, in the clean
            image, or its box, (left, top, right, bottom) in pixels; without one, what depends on it
            is NaN.
        heads: names or sites of `hook_z` of heads; by default all that can see the image.
        query: the place in the text from where heads look, such as a role.
        intervention: what is written in a head's place for `ablation`; by default
            `patching.mean(pairs, per_position=False)`.
        level: of intervals, by bootstrap over pairs.
        seed: of the bootstrap.
        progress: whether to show a bar.

    Returns:
        A line for each head: `stack`, `layer`, `head`; `n`, the number of pairs; means over pairs,
        each with its interval in `..._low` and `..._high`, of

        - `on_image`: the attention that falls on patches; what follows is of its shares by patch
        - `mass`: the share inside of the mask, and `lift`, that over the mask's share of the area
        - `correlation`: with the mask; `relative`, the same of its shares less the mean over all
          heads, as in the paper's pictures
        - `outlier`: the share of the largest patch; `entropy`, in nats
        - `ablation`: what the metric gains without the head: below 0 of one that helps

        and `same_patch`, in how many images the largest patch is the commonest one; `matters`,
        whether the interval of `ablation` leaves out 0, of each head by itself, and it is at least
        3 % of the strongest head's; and `function`:

        - `object detection`: the interval of `lift` lies above 1.5 and that of `correlation` above
          0: it looks at the object; but `object suppression` where it matters and the metric gains
          without it: it writes against what it sees
        - `outlier suppression`: else, at least half of its attention is on one patch, in at least
          half of the images the same: it soaks attention up. Where all images have their object in
          one place and no mask is given, a head that looks at it seems to be one
        - `object suppression`: else, the interval of `lift` lies below 1 / 1.5: it looks elsewhere
        - else empty. A head that does not `matter` looks as its function says, and does nothing.

    Raises:
        KeyError: heads that are not there.
        ValueError: heads that see no image, a place that a text does not have.
    """
    given = _first_of_each(pairs)
    if not given:
        raise ValueError("no pairs were given")
    if masks and not set(masks) & {pair.name for pair in given}:
        raise ValueError(f"no mask is of a pair: masks are of {sorted(masks)[:3]}")
    sites: list[Any] = as_sites(model, _default(model) if heads is None else heads)
    names = {
        site.name: site.name.replace(f"heads.{site.head}.hook_z", "hook_pattern") for site in sites
    }
    known = readers(model)
    for name, module in names.items():
        if module not in known:
            raise ValueError(f"{name!r} is no head's hook_z that sees the image")
    looks = []
    for pair in tqdm(given, desc="looking", unit="pair", disable=not progress):
        texts = None if pair.texts is None else pair.texts[:1]
        inputs = model.prepare_prompt(pair.images[:1], texts)
        try:
            seen = look(model, inputs, known, query, pair.words)
        except NoSuchPlace as error:
            raise NoSuchPlace(f"pair {pair.name!r}: {error}") from error
        mask = (masks or {}).get(pair.name)
        size = inputs.geometry[0].size[::-1]
        if isinstance(mask, tuple):
            mask = boxed(mask, size)
        if mask is not None and mask.shape != size:
            raise ValueError(
                f"pair {pair.name!r}: its mask is {list(mask.shape)} and its image {list(size)}; a "
                "mask is of the pixels of the image"
            )
        looks.append(_measured(seen, names, sites, mask))
    values = {key: np.array([one[key] for one in looks]) for key in looks[0]}  # [pair, head]
    without = intervention or P.mean(given, per_position=False)
    metric = P.logit_diff(tokens="first")
    ablated = P.ablate(model, given, sites, without, metric, progress=progress)
    if not ablated.provenance["complete"]:
        raise KeyboardInterrupt
    values["ablation"] = ablated.difference.values.reshape(len(given), -1)
    return _told(sites, values, level, seed)


def _default(model: HookedVLM) -> list[str]:
    return [name.replace("hook_pattern", "heads.*.hook_z") for name in readers(model)]


def _first_of_each(pairs: Sequence[Pair]) -> list[Pair]:
    found: dict[str, Pair] = {}
    for number, pair in enumerate(pairs):
        found.setdefault(pair.name or f"unnamed {number}", pair)
    return list(found.values())


def _measured(
    seen: Any, names: Mapping[str, str], sites: Sequence[Site], mask: Mask | None
) -> dict[str, list[float]]:
    """Of one image, by what is measured: a number of each head."""
    every = torch.cat([one.mean(1) for one in seen.patterns.values()])  # [head of any layer, patch]
    usual = _shares(every.double().numpy(force=True)).mean(0)
    found: dict[str, list[float]] = {key: [] for key in _MEASURED}
    for site in sites:
        module = names[site.name]
        weights = seen.patterns[module][site.head].mean(0).double().numpy(force=True)
        share = _shares(weights[None])[0]
        inside = None if mask is None else coverage(mask, seen.boxes[module])
        grid, at = share[None], None if inside is None else inside[None]
        with np.errstate(divide="ignore", invalid="ignore"):
            found["on_image"].append(float(weights.sum()))
            found["mass"].append(np.nan if at is None else float(mass(grid, at)))
            area = np.nan if inside is None else float(inside.mean())
            found["lift"].append(found["mass"][-1] / area)
            found["correlation"].append(np.nan if at is None else float(correlation(grid, at)))
            less = (share - usual)[None]
            found["relative"].append(np.nan if at is None else float(correlation(less, at)))
            found["outlier"].append(float(share.max()))
            found["entropy"].append(float(-np.where(share > 0, share * np.log(share), 0).sum()))
            found["largest"].append(float(share.argmax()))
    return found


_MEASURED = ("on_image", "mass", "lift", "correlation", "relative", "outlier", "entropy", "largest")


def _shares(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Attention by patch as shares of all that falls on patches; even where none does."""
    total = weights.sum(-1, keepdims=True)
    even = np.full_like(weights, 1 / weights.shape[-1])
    return np.where(total > 0, weights / np.where(total > 0, total, 1), even)


def _told(
    sites: Sequence[Site], values: dict[str, NDArray[np.float64]], level: float, seed: int
) -> pd.DataFrame:
    largest = values.pop("largest").astype(int)
    told: dict[str, Any] = {
        "stack": [site.stack for site in sites],
        "layer": [site.layer for site in sites],
        "head": [site.head for site in sites],
        "n": len(largest),
    }
    for key, numbers in values.items():
        mean, low, high = bootstrap(numbers, level=level, seed=seed)
        told |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    counts = [np.bincount(column).max() for column in largest.T]
    told["same_patch"] = np.array(counts) / len(largest)
    frame = pd.DataFrame(told)
    frame["matters"] = (frame["ablation_low"] > 0) | (frame["ablation_high"] < 0)
    frame["matters"] &= abs(frame["ablation"]) >= MATTERS * abs(frame["ablation"]).max()
    soaks = (frame["outlier"] >= HALF) & (frame["same_patch"] >= HALF)
    looks = (frame["lift_low"] > MORE) & (frame["correlation_low"] > 0)
    against = looks & frame["matters"] & (frame["ablation"] > 0)
    frame["function"] = np.select(
        [against, looks, soaks, frame["lift_high"] < 1 / MORE],
        ["object suppression", "object detection", "outlier suppression", "object suppression"],
        "",
    )
    return frame
