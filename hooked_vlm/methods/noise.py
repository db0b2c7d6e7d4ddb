"""Noise on an image, or on what a language side reads of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchEncoding

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.patching.runs import Inputs

NoiseKind = Literal["multiplicative", "additive", "scale"]
On = Literal["embeddings", "pixels"]

# What each kind takes, and what was published for it.
TAKES: dict[str, dict[str, float]] = {
    "multiplicative": {"mean": 1.0, "std": 5.0},
    "additive": {"std": 3.0},
    "scale": {"factor": 0.7691},
}


@dataclass(frozen=True)
class Noise:
    """How an image is corrupted, element by element; `e` is drawn from a standard normal.

    - `multiplicative`: `x * (mean + std * e)`; the released code of Palit et al. (arXiv 2308.14179)
    - `additive`: `x + std * sigma * e`; Meng et al. (arXiv 2202.05262) sec. 2.1
    - `scale`: `x * factor`, without chance; the second released notebook of Palit et al.

    `sigma` is the standard deviation of all numbers of the one clean image: of all positions and
    dimensions of its embedding, or of all its pixels. A view of LLaVA-NeXT counts as an image.

    Attributes:
        kind: one of the three.
        mean: of the factor (`multiplicative`); by default 1.
        std: of the factor (`multiplicative`, by default 5), or in units of sigma (`additive`, by
            default 3).
        factor: by default 0.7691 (`scale`).

    Raises:
        ValueError: another kind, a number that the kind does not take or that is not finite, or a
            negative std.
    """

    kind: NoiseKind
    mean: float | None = None
    std: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in TAKES:
            raise ValueError(f"noise is {', '.join(map(repr, TAKES))}, not {self.kind!r}")
        takes = TAKES[self.kind]
        for name in ("mean", "std", "factor"):
            given = getattr(self, name)
            if given is None:
                object.__setattr__(self, name, takes.get(name))
            elif name not in takes:
                raise ValueError(f"{self.kind!r} noise takes {' and '.join(takes)}, no {name}")
            elif not math.isfinite(given) or (name == "std" and given < 0):
                raise ValueError(f"{name} of noise is a finite number, std not below 0: {given}")

    def __str__(self) -> str:
        told = ", ".join(f"{name}={getattr(self, name):g}" for name in TAKES[self.kind])
        return f"{self.kind}({told})"

    def of(self, clean: Tensor, drawn: Tensor, axes: int = 2) -> Tensor:
        """The corrupt values.

        Args:
            clean: [..., axes of one image].
            drawn: of the same shape, standard normal; `scale` does not read it.
            axes: how many of the last axes are one image's own, over which sigma is taken.
        """
        if self.factor is not None:
            return clean * self.factor
        assert self.std is not None
        if self.mean is not None:
            return clean * (self.mean + self.std * drawn.to(clean))
        own = tuple(range(-axes, 0))
        sigma = clean.std(own, correction=0, keepdim=True)
        return clean + self.std * sigma * drawn.to(clean)


def drawn(shape: Sequence[int], seed: int, draw: int, example: str) -> Tensor:
    """Standard normal numbers that these arguments alone decide, in float32 on the CPU.

    Args:
        shape: of what they are for.
        seed: of the trace.
        draw: the number of the draw, from 0.
        example: the example's name.
    """
    digest = sha256(f"{seed}/{draw}/{example}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randn(*shape, generator=generator, dtype=torch.float32)


@dataclass
class Corruption:
    """The runs of an example: a clean row, and a corrupt one for each draw.

    Noise on embeddings is written by a standing hook, which has to know what the rows of a pass
    are; noise on pixels is in the inputs.

    Attributes:
        noise: the noise.
        on: what it is on.
        draws: how many draws.
        seed: of them.
        example: the name of the example that is run.
        rows: what the rows of the pass are that comes next: 0 for clean, else the draw's number
            from 1.
    """

    noise: Noise
    on: On
    draws: int
    seed: int
    example: str = ""
    rows: list[int] = field(default_factory=list)
    _drawn: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """How many rows the unpatched run of an example has."""
        return 1 + self.draws

    @property
    def hooks(self) -> list[tuple[str, Any]]:
        """What has to stand on the model while it is traced."""
        return [("hook_image_embeds", self.write)] if self.on == "embeddings" else []

    def begin(self, example: str) -> None:
        """Turns to another example."""
        self.example = example
        self._drawn.clear()

    def write(self, embeds: Tensor, hook: HookPoint) -> Tensor:
        """Puts noise on the corrupt rows' embeddings, [rows * images, pos, d]."""
        size = len(embeds) // len(self.rows)
        for number, row in enumerate(self.rows):
            if row:
                there = slice(number * size, (number + 1) * size)
                embeds[there] = self.noise.of(embeds[there], self._of(embeds[there], row - 1))
        return embeds

    def _of(self, clean: Tensor, draw: int) -> Tensor:
        """The draw's numbers, which are the same in every pass of the example."""
        key = draw, tuple(clean.shape)
        if key not in self._drawn:
            self._drawn[key] = drawn(clean.shape, self.seed, draw, self.example)
        return self._drawn[key]

    def rows_of(self, prepare: Callable[[], Inputs]) -> Inputs:
        """The rows of an example: its inputs once for the clean run and once for each draw.

        Args:
            prepare: makes its inputs.

        Raises:
            ValueError: inputs without an image.
        """
        clean = prepare()
        if clean.get("pixel_values") is None:
            raise ValueError(
                f"example {self.example!r} has no pixel_values: there is no image to put noise on"
            )
        rows = {
            key: torch.cat([value] * self.n_rows) if isinstance(value, Tensor) else value
            for key, value in clean.items()
        }
        if self.on == "pixels":
            pixels = clean["pixel_values"]
            corrupt = [
                self.noise.of(pixels, self._of(pixels, draw), axes=3) for draw in range(self.draws)
            ]
            rows["pixel_values"] = torch.cat([pixels, *corrupt])
        made = BatchEncoding(rows)
        geometry = getattr(clean, "geometry", None)
        if geometry is not None:
            vars(made)["geometry"] = list(geometry) * self.n_rows
        return made
