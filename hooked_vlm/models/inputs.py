"""From images and texts to a model's inputs, and from positions back to pixels and tokens."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchEncoding

ImageLike = Image.Image | str | Path
_PUNCTUATION = re.compile(r"""[,.'!?"()*#:;~]""")
_KINDS = "neither a PIL image nor a path"
# What PIL raises for files that are no images, are cut short, or would fill the memory.
_NO_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    struct.error,
    Image.DecompressionBombError,
)


Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the original


@dataclass(frozen=True)
class Geometry:
    """How an image of the user's became pixels of the model.

    Attributes:
        size: width and height of the original, in pixels.
        crop: the box of the original that the model sees, (left, top, right, bottom). It ends
            outside of the original where the processor pads.
        tiles: the boxes that LLaVA-NeXT's tiles show besides, row by row.
    """

    size: tuple[int, int]
    crop: Box
    tiles: tuple[Box, ...] = ()


def visible(size: tuple[int, int], processor: Any) -> Box:
    """The box of an image that a model sees: CLIP's processors cut its middle out.

    LLaVA's own may first pad it to a square, with the image in the middle.

    Args:
        size: width and height of the original, in pixels.
        processor: an image processor of transformers, which may pad, resize and then crop.

    Returns:
        (left, top, right, bottom) in pixels of the original.
    """
    width, height = size
    padded = hasattr(processor, "pad_to_square") and processor.do_pad
    if padded and width != height:
        side = max(size)
        left, top, right, bottom = _uncropped((side, side), processor)
        across, down = (side - width) // 2, (side - height) // 2
        return left - across, top - down, right - across, bottom - down
    return _uncropped(size, processor)


def _uncropped(size: tuple[int, int], processor: Any) -> Box:
    """What is left of an image that is resized and then cropped."""
    width, height = size
    if not getattr(processor, "do_center_crop", False):
        return 0.0, 0.0, float(width), float(height)
    across, down = width, height  # after resizing
    if processor.do_resize and (short := processor.size.get("shortest_edge")):
        across, down = (int(short * side / min(size)) for side in size)
    elif processor.do_resize:
        across, down = processor.size["width"], processor.size["height"]
    crop = processor.crop_size
    left, top = (across - crop["width"]) // 2, (down - crop["height"]) // 2
    x, y = width / across, height / down  # pixels of the original in one of the resized
    return left * x, top * y, (left + crop["width"]) * x, (top + crop["height"]) * y


def made_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of what a processor makes of every image; None if they depend on it.

    Args:
        processor: an image processor of transformers.
    """
    if getattr(processor, "do_center_crop", False):
        return processor.crop_size["height"], processor.crop_size["width"]
    if not processor.do_resize:
        return None
    short, size = processor.size.get("shortest_edge"), processor.size
    if not short:
        return size["height"], size["width"]
    return (short, short) if hasattr(processor, "pad_to_square") and processor.do_pad else None


def open_images(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """Images as PIL's, in RGB.

    Raises:
        ValueError: something that is no image, by its name.
        FileNotFoundError: a file that is not there.
    """
    if isinstance(images, Image.Image | str | Path):
        images = [images]
    elif not isinstance(images, Iterable):
        raise ValueError(f"images is {_KINDS} but a {type(images).__name__}")
    opened = [_open(image, index) for index, image in enumerate(images)]
    if not opened:
        raise ValueError("no image was given")
    return opened


def _open(image: ImageLike, index: int) -> Image.Image:
    if not isinstance(image, Image.Image | str | Path):
        raise ValueError(f"image {index} is {_KINDS} but a {type(image).__name__}")
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        with Image.open(image) as file:
            return file.convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no image file {str(image)!r}") from error
    except _NO_IMAGE as error:
        name = repr(str(image)) if isinstance(image, str | Path) else f"image {index}"
        raise ValueError(f"{name} is no image that can be read: {error}") from error


def check_texts(text: str | Sequence[str]) -> list[str]:
    """Texts as a list.

    Raises:
        ValueError: no text, or an empty one.
    """
    if not isinstance(text, Iterable):
        raise ValueError(f"text is no string and no list of them: {text!r}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("no text was given")
    for index, one in enumerate(texts):
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"text {index} is empty or no string: {one!r}")
    return texts


def followed(inputs: Mapping[str, Any], ids: Sequence[int], key: str, mask: str) -> dict[str, Any]:
    """Inputs whose texts go on, in every row alike.

    Args:
        inputs: the inputs.
        ids: the tokens that follow.
        key: which of the inputs are the texts.
        mask: which of them is their mask.

    Raises:
        ValueError: texts that are padded on the right.
    """
    texts, seen = inputs[key], inputs.get(mask)
    if seen is not None and not seen[:, -1].all():
        raise ValueError(f"{key} is padded on the right: nothing can follow; give one row each")
    more = torch.tensor(list(ids), device=texts.device).expand(len(texts), -1)
    made = {**inputs, key: torch.cat([texts, more], 1)}
    if seen is not None:
        made[mask] = torch.cat([seen, torch.ones_like(more)], 1)
    return made


def pre_caption(text: str, max_words: int) -> str:
    """A text as ALBEF's released code cleans it.

    Source: `pre_caption` in `dataset/utils.py` of ALBEF.

    Raises:
        ValueError: nothing is left of the text.
    """
    plain = _PUNCTUATION.sub("", text.lower()).replace("-", " ").replace("/", " ")
    plain = re.sub(r"\s{2,}", " ", plain.replace("<person>", "person")).rstrip("\n").strip(" ")
    words = plain.split(" ")
    if not plain.strip():
        raise ValueError(f"nothing is left of {text!r} without its punctuation")
    if len(words) > max_words:
        warnings.warn(
            f"a text of {len(words)} words is cut off after {max_words}, as in the released code: "
            f"{text[:60]!r}",
            stacklevel=5,
        )
    return " ".join(words[:max_words])


def token_map(
    inputs: BatchEncoding,
    grid: int,
    to_str: Callable[[Tensor], list[str]],
    stacks: Iterable[str],
    standing: Mapping[tuple[int, int], tuple[int, int | None]] | None = None,
) -> pd.DataFrame:
    """See `HookedVLM.token_map`.

    Args:
        inputs: from `prepare`.
        grid: patches along one side of the image.
        to_str: from a row of ids to its tokens.
        stacks: the model's stacks, the one that reads the image first.
        standing: by row and position of the text, where images stand in it: the row of the image's
            stack and the position there; None for what stands between rows of a picture.
    """
    if not hasattr(inputs, "geometry"):
        raise ValueError("these inputs do not say what image they are of; model.prepare makes them")
    vision, *readers = stacks
    seen: dict[tuple[int, int], dict[str, Any]] = {}
    views = [
        (image, tile, box)
        for image, geometry in enumerate(inputs.geometry)
        for tile, box in enumerate((geometry.crop, *geometry.tiles))
    ]
    for row, (image, tile, (left, top, right, bottom)) in enumerate(views):
        width, height = (right - left) / grid, (bottom - top) / grid
        shared = {"stack": vision, "row": row, "image": image, "tile": tile}
        seen[row, 0] = {**shared, "position": 0}
        for patch in range(grid * grid):
            down, across = divmod(patch, grid)
            x, y = left + across * width, top + down * height
            seen[row, patch + 1] = {
                **shared,
                **{"position": patch + 1, "patch_row": down, "patch_column": across},
                **{"left": x, "top": y, "right": x + width, "bottom": y + height},
            }
    lines = list(seen.values())
    if "input_ids" in inputs:
        for row, ids in enumerate(inputs["input_ids"]):
            for position, token in enumerate(to_str(ids)):
                text = {"stack": readers[0], "row": row, "position": position, "token": token}
                if standing and (row, position) in standing:
                    view, there = standing[row, position]
                    shown = {"image": views[view][0]} if there is None else seen[view, there]
                    text = shown | text
                lines.append(text)
    columns = ["stack", "row", "position", "token", *["image", "tile"] * (standing is not None)]
    columns += ["patch_row", "patch_column", "left", "top", "right", "bottom"]
    frame = pd.DataFrame(lines, columns=columns)
    whole = {"image", "tile", "patch_row", "patch_column"} & set(columns)
    return frame.astype(dict.fromkeys(whole, "Int64"))
