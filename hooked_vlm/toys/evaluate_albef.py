"""What the toy ALBEF says of images and captions; transformers has no ALBEF to ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image
from torch import Tensor

from hooked_vlm.models.albef import HookedALBEF


def judge_of(folder: Path) -> Callable[[list[Image.Image], list[str]], Tensor]:
    """The judgement of a checkpoint folder: 1 where a caption is true of its image, else 0."""
    model = HookedALBEF.from_pretrained(folder)
    return lambda images, texts: model(**model.prepare(images, texts)).argmax(-1)
