"""Which patches of an image heads attend to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import BatchEncoding

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.places import Locator, NoSuchPlace, as_place


@dataclass(frozen=True)
class Look:
    """The attention of one input's text to its image.

    Attributes:
        patterns: by the name of an attention's `hook_pattern`: [head, query, patch]; a head's sum
            over patches is what it gives the image, the rest goes elsewhere.
        keys: by name how many keys its queries see, patches or not.
        boxes: by name a line for each patch: `patch_row`, `patch_column` and the box in pixels of
            the image, `left`, `top`, `right`, `bottom`.
    """

    patterns: dict[str, Tensor]
    keys: dict[str, int]
    boxes: dict[str, pd.DataFrame]


def readers(model: HookedVLM) -> list[str]:
    """The names of all patterns by which text can attend to an image."""
    stack = list(model.stacks)[1]  # an answer decoder behind it reads the text
    part = "attn" if model.task == "llava" else "cross_attn"
    return [
        name
        for name in model.hook_names()
        if name.endswith(f".{part}.hook_pattern") and model.stack_of(name) == stack
    ]


@torch.no_grad()
def look(
    model: HookedVLM,
    inputs: BatchEncoding,
    names: Sequence[str] | None = None,
    queries: Any = None,
    roles: Mapping[str, Any] | None = None,
) -> Look:
    """Runs the model once, and keeps what its heads attend to of the image.

    Args:
        model: a model that answers about an image.
        inputs: from `prepare`, of one row.
        names: of patterns; by default all that can see the image. Those that read a text, as
            those of an answer decoder do, are left out.
        queries: a place in the text, such as a role; None for all positions, of a LLaVA for those
            behind the image.
        roles: as in `data.Pair`.

    Raises:
        ValueError: `NoSuchPlace`, if the text does not have that place.
    """
    chosen = readers(model) if names is None else list(names)
    base = model.base_run(**inputs, names_filter=chosen)
    locator = Locator(model, base, inputs, roles=roles or {})
    placed = model.token_map(inputs)
    placed = placed[placed["patch_row"].notna() & (placed["row"] == 0)]
    vision = next(iter(model.stacks))
    patterns, keys, boxes = {}, {}, {}
    for name in chosen:
        value, stack = base.cache[name][0], locator.stack(name, keys=True)
        if stack != vision and model.task != "llava":
            continue  # it reads a text
        patches = placed[placed["stack"] == stack]
        if not len(patches):
            raise NoSuchPlace(f"{name!r} sees no image in this input")
        at = patches["position"].to_numpy(int).tolist()
        if queries is None:
            asked: Any = slice(max(at) + 1 if model.task == "llava" else 0, None)
        else:
            place, own = as_place(queries), model.stack_of(name)
            asked = list(locator.find(place, own, value.shape[1], name))
        patterns[name], keys[name] = value[:, asked][..., at], value.shape[-1]
        boxes[name] = patches.reset_index(drop=True)
    return Look(patterns, keys, boxes)
