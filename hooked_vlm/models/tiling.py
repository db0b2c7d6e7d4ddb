"""How LLaVA-NeXT cuts an image into tiles, and what it reads of them.

Source: LLaVA-1.5 (arXiv 2310.03744) sec. 3.4, on higher resolutions; `modeling_llava_next.py` and
`image_processing_pil_llava_next.py` of transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

NEWLINE = -1  # in place of the number of a feature


@dataclass(frozen=True)
class Tiling:
    """One image: the whole of it, squashed to a square, and tiles of it in its own proportions.

    The image is scaled into a resolution, centred there, and cut. All sizes are (height, width).

    Attributes:
        size: of the image, in pixels.
        resolution: what it is scaled into, in pixels.
        side: of a tile, in pixels.
    """

    size: tuple[int, int]
    resolution: tuple[int, int]
    side: int

    @classmethod
    def of(cls, size: tuple[int, int], resolutions: Sequence[tuple[int, int]], side: int) -> Tiling:
        """The tiling that keeps most of an image's pixels and, among those, adds least to them."""

        def worth(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(to / of for of, to in zip(size, resolution, strict=True))
            kept = min(int(size[0] * scale) * int(size[1] * scale), math.prod(size))
            return kept, kept - math.prod(resolution)

        return cls(size, max(resolutions, key=worth), side)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.resolution[0] // self.side, self.resolution[1] // self.side

    @property
    def n_views(self) -> int:
        """The tiles, and the whole image in front of them."""
        return 1 + math.prod(self.grid)

    @property
    def scaled(self) -> tuple[int, int]:
        """Size of the image within the resolution."""
        (height, width), (down, across) = self.size, self.resolution
        if across / width < down / height:
            return min(math.ceil(height * (across / width)), down), across
        return down, min(math.ceil(width * (down / height)), across)

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """What each view shows: (left, top, right, bottom) in pixels of the image.

        Around the image a tile shows nothing: its box then ends outside.
        """
        height, width = self.size
        y, x = (of / to for of, to in zip(self.size, self.scaled, strict=True))
        top, left = (
            (whole - part) // 2 for whole, part in zip(self.resolution, self.scaled, strict=True)
        )
        rows, columns = self.grid
        return [(0.0, 0.0, float(width), float(height))] + [
            (
                (column * self.side - left) * x,
                (row * self.side - top) * y,
                ((column + 1) * self.side - left) * x,
                ((row + 1) * self.side - top) * y,
            )
            for row in range(rows)
            for column in range(columns)
        ]

    def read(self, patches: int, device: torch.device | None = None) -> Int[Tensor, " place"]:
        """Which features of the views, counted through, stand among the tokens, in order.

        Those of the whole image; then, row by row across all tiles, those that are not around the
        image, and behind each row the newline.

        Args:
            patches: along one side of a view.
            device: of the result.
        """
        rows, columns = self.grid
        size = patches * patches
        features = torch.arange(self.n_views * size, device=device)
        tiles = features[size:].view(rows, columns, patches, patches).transpose(1, 2)
        tiles = tiles.reshape(rows * patches, columns * patches)
        (height, width), (down, across) = self.size, tiles.shape
        if width / height > across / down:
            around = (down - int(round(height * (across / width), 7))) // 2
            tiles = tiles[around : down - around]
        else:
            around = (across - int(round(width * (down / height), 7))) // 2
            tiles = tiles[:, around : across - around]
        lines = torch.nn.functional.pad(tiles, (0, 1), value=NEWLINE)
        return torch.cat([features[:size], lines.flatten()])
