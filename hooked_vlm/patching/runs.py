"""What a sweep runs on: pairs or prepared inputs, one row for each run of a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers import BatchEncoding

from hooked_vlm.data import Pair
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.metrics import Metric

PER_IMAGE = ("pixel_values", "image_sizes")  # inputs with a row for each image
Inputs = Mapping[str, Any]  # what `prepare` makes
FirstToken = Literal["cls", "enc"]


@dataclass(frozen=True)
class Run:
    """One pair, or one input.

    Attributes:
        name: what results call it.
        inputs: makes its inputs: the clean row and, where there is one, the corrupt row.
        metric: bound to its answer and foil.
        n_rows: how many rows its inputs have.
        roles: by name the positions, or the words, of roles in its text.
    """

    name: str
    inputs: Callable[[], Inputs]
    metric: Metric
    n_rows: int = 2
    roles: Mapping[str, Any] = field(default_factory=dict)


Sides = tuple[Inputs, Inputs]  # clean and corrupt, of as many rows
Pairs = Pair | Sequence[Pair] | Sides | Sequence[Sides]


def paired(
    model: HookedVLM, pairs: Pairs, metric: Metric, first_token: FirstToken
) -> tuple[list[Run], str]:
    """The runs of pairs, checked but for their images, and their first token."""
    if isinstance(pairs, Mapping):
        raise ValueError("one input is no pair: give (clean, corrupt)")
    several: list[Any] = [pairs] if isinstance(pairs, Pair) else list(pairs)
    if not several:
        raise ValueError("no pairs were given")
    if all(isinstance(one, Pair) for one in several):
        return [
            _run(model, pair, index, metric, first_token) for index, pair in enumerate(several)
        ], first_token
    if any(isinstance(one, Mapping) for one in several):
        several = [several]
    sides = [pair for one in several for pair in _sides(model, one)]
    for clean, corrupt in sides:
        _joined(clean, corrupt)  # a ValueError before anything runs
    bound = metric.bind(model, None)
    return [
        Run(str(row), partial(_joined, clean, corrupt), bound)
        for row, (clean, corrupt) in enumerate(sides)
    ], getattr(several[0][0], "first_token", "unknown")


def single(
    model: HookedVLM, inputs: Pairs | Inputs | Sequence[Inputs], metric: Metric, first: FirstToken
) -> tuple[list[Run], str]:
    """The runs of inputs without a corrupt row, and of pairs with one."""
    given: list[Any] = [inputs] if isinstance(inputs, Mapping | Pair) else list(inputs)
    if not any(isinstance(one, Mapping) for one in given):
        return paired(model, given, metric, first)
    if not all(isinstance(one, Mapping) for one in given):
        raise ValueError("prepared inputs are not mixed with pairs")
    bound = metric.bind(model, None)
    rows = [row for one in given for row in rows_of(model, one)]
    told = getattr(given[0], "first_token", "unknown")
    return [Run(str(index), partial(_same, row), bound, 1) for index, row in enumerate(rows)], told


def _same(inputs: Inputs) -> Inputs:
    return inputs


def _run(model: HookedVLM, pair: Pair, index: int, metric: Metric, first_token: FirstToken) -> Run:
    pair.n_tokens(model.to_str_tokens)  # a ValueError where positions do not align
    return Run(
        pair.name or str(index),
        partial(_prepared, model, pair, first_token),
        metric.bind(model, pair),
        roles=pair.words,
    )


def _prepared(model: HookedVLM, pair: Pair, first_token: FirstToken) -> Inputs:
    """A pair's inputs, clean first.

    Raises:
        ValueError: images that LLaVA-NeXT cuts into other numbers of tiles, or of tokens.
    """
    inputs = model.prepare_prompt(pair.images, pair.texts, first_token=first_token)
    tokens = inputs["attention_mask"].sum(1).tolist() if "attention_mask" in inputs else []
    tiles = [len(geometry.tiles) for geometry in getattr(inputs, "geometry", ())]
    if len(set(tokens)) > 1 or len(set(tiles)) > 1:
        raise ValueError(
            f"pair {pair.name!r}: positions do not align, the clean and the corrupt input have "
            f"{tokens} tokens and {tiles} tiles; give both an image of one shape"
        )
    return inputs


def _sides(model: HookedVLM, given: Any) -> list[Sides]:
    """Clean and corrupt inputs, row by row.

    Raises:
        ValueError: not two inputs, of as many rows.
    """
    if (
        isinstance(given, Pair | Mapping)
        or len(given) != 2
        or not all(isinstance(one, Mapping) for one in given)
    ):
        raise ValueError("prepared inputs are given as (clean, corrupt), not mixed with pairs")
    clean, corrupt = given
    if clean.keys() != corrupt.keys():
        raise ValueError(f"clean inputs have {sorted(clean)}, corrupt ones {sorted(corrupt)}")
    rows = rows_of(model, clean), rows_of(model, corrupt)
    if len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"there are {len(rows[0])} clean and {len(rows[1])} corrupt inputs; give as many"
        )
    return list(zip(*rows, strict=True))


def rows_of(model: HookedVLM, inputs: Inputs) -> list[Inputs]:
    """Prepared inputs, one for each row of logits.

    Raises:
        ValueError: images that cannot be told to belong to one text or the other.
    """
    n = len(inputs[model.ROWS])
    if n == 1:
        return [inputs]
    shared = set()
    for key, value in inputs.items():
        if model.ROWS in PER_IMAGE and key not in PER_IMAGE:
            shared.add(key)  # every image is compared with every text
        elif len(value) == 1 and key in PER_IMAGE:
            shared.add(key)
        elif len(value) != n:
            raise ValueError(
                f"{key} has {len(value)} rows beside the {n} of {model.ROWS}, so that rows cannot "
                "be told apart; prepare one row each"
            )
    seen = getattr(inputs, "geometry", None)
    return [
        _told(
            {k: v if k in shared else v[row : row + 1] for k, v in inputs.items()},
            seen if seen is None or "pixel_values" in shared else seen[row : row + 1],
        )
        for row in range(n)
    ]


def _told(tensors: dict[str, Any], geometry: list[Any] | None) -> Inputs:
    """Inputs that know their images' geometry, where it is known."""
    inputs = BatchEncoding(tensors)
    if geometry is not None:
        vars(inputs)["geometry"] = geometry
    return inputs


def _joined(clean: Inputs, corrupt: Inputs) -> Inputs:
    """Clean and corrupt inputs as the two rows of one; an image that they share stands once.

    Raises:
        ValueError: inputs of different lengths.
    """
    images = [key for key in PER_IMAGE if key in clean and "input_ids" in clean]
    shared = all(
        clean[key].shape == corrupt[key].shape and torch.equal(clean[key], corrupt[key])
        for key in images
    )
    joined = {}
    for key, value in clean.items():
        other = corrupt[key]
        rows = (1, 1) if key in images else (len(value), len(other))  # a text may have several
        if value.shape != other.shape or rows != (1, 1):
            raise ValueError(
                f"positions do not align: {key} is {list(value.shape)} in the clean inputs and "
                f"{list(other.shape)} in the corrupt ones; prepare inputs of one length"
            )
        joined[key] = value if shared and key in images else torch.cat([value, other])
    geometry, other = (getattr(side, "geometry", None) for side in (clean, corrupt))
    if geometry is not None and other is not None and not (shared and images):
        geometry = geometry + other
    return _told(joined, geometry)
