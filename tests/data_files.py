"""Images and tables that tests of readers write."""

import csv

import numpy as np
from PIL import Image

LEFT_OUT = "on_bad='drop' leaves such rows out"


def draw(file, number=0, **how):
    """A picture like no other."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **how)
    return file


def write(file, lines, columns=None):
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns or list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return file
