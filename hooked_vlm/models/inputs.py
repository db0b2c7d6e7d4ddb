"""From images and texts to a model's inputs, and from positions back to pixels and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from transformers import AutoTokenizer, BlipImageProcessorPil, BlipProcessor

ImageLike = Image.Image | str | Path
DEFAULT_TOKENIZER = "bert-base-uncased"


@dataclass(frozen=True)
class Geometry:
    """How an image of the user's became pixels of the model.

    Attributes:
        size: width and height of the original, in pixels.
        crop: the box of the original that the model sees, (left, top, right, bottom).
    """

    size: tuple[int, int]
    crop: tuple[float, float, float, float]


def load_processor(name: str, **download: Any) -> BlipProcessor:
    """A BLIP checkpoint's own processor, on PIL, so that torchvision is not needed."""
    return BlipProcessor(
        BlipImageProcessorPil.from_pretrained(name, **download),
        AutoTokenizer.from_pretrained(name, **download),
    )


def processor_for_file(name: str | None, image_size: int, **download: Any) -> BlipProcessor:
    """A processor for a bare `.pth`, which holds no vocabulary.

    Args:
        name: a folder or a Hub name with a tokenizer; None for `bert-base-uncased`.
        image_size: side of the images that the weights read.
        **download: as in transformers.

    Raises:
        FileNotFoundError: no tokenizer there.
    """
    source = name or DEFAULT_TOKENIZER
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **download)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"a bare checkpoint file holds no vocabulary, and the tokenizer of {source!r} could not "
            "be had; pass processor= with a folder or a Hub name that has one"
        ) from error
    if tokenizer.bos_token is None:  # BERT's own: add BLIP's two, in the order of its training
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    size = {"height": image_size, "width": image_size}
    return BlipProcessor(BlipImageProcessorPil(size=size), tokenizer)


def open_images(images: ImageLike | Sequence[ImageLike]) -> list[Image.Image]:
    """Images as PIL's, in RGB.

    Raises:
        ValueError: something that is no image, by its name.
        FileNotFoundError: a file that is not there.
    """
    if isinstance(images, Image.Image | str | Path):
        images = [images]
    opened = []
    for image in images:
        if isinstance(image, str | Path):
            try:
                with Image.open(image) as file:
                    opened.append(file.convert("RGB"))
            except (UnidentifiedImageError, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise ValueError(f"{str(image)!r} is no image that can be read: {error}") from error
        elif isinstance(image, Image.Image):
            opened.append(image.convert("RGB"))
        else:
            raise ValueError(
                f"an image is a PIL image or a path, not {type(image).__name__}: {image!r}"
            )
    if not opened:
        raise ValueError("no image was given")
    return opened


def check_texts(text: str | Sequence[str]) -> list[str]:
    """Texts as a list.

    Raises:
        ValueError: no text, or an empty one.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("no text was given")
    for index, one in enumerate(texts):
        if not isinstance(one, str) or not one.strip():
            raise ValueError(f"text {index} is empty or no string: {one!r}")
    return texts
