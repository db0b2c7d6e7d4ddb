"""What tells one set of pairs or questions from another."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from PIL import Image

from hooked_vlm.data import Pair, Question


def digest(asked: Sequence[Pair | Question]) -> str:
    """A hash of pairs or questions: their words, and the pixels, or paths, of their images."""
    told = sha256()
    for one in asked:
        told.update(repr((one.name, one.text, one.answer)).encode())
        images = [one.image]
        if isinstance(one, Pair):
            images = one.images
            told.update(repr((one.corrupt_text, one.foil, sorted(one.roles.items()))).encode())
        for image in images:
            told.update(image.tobytes() if isinstance(image, Image.Image) else str(image).encode())
    return told.hexdigest()
