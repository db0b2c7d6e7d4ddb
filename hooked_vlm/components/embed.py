"""Embeddings: patches of an image, tokens of a text, and their positions."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vlm.config import TokenConfig, VisionConfig


class PatchEmbed(nn.Module):
    """Patches of an image, row by row, with the class token in front.

    Source: ViT (arXiv 2010.11929) eq. 1.
    """

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch = nn.Conv2d(3, cfg.d_model, cfg.patch_size, cfg.patch_size, bias=cfg.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(1, 1, cfg.d_model))

    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch pos d_model"]:
        check_pixels(pixel_values, self.cfg.image_size)
        patches = self.patch(pixel_values.to(self.patch.weight.dtype)).flatten(2).mT
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)


def check_pixels(pixel_values: Tensor, size: int) -> None:
    """Refuses anything but square RGB images of that side."""
    if pixel_values.shape[1:] != (3, size, size):
        raise ValueError(
            f"pixel_values is {list(pixel_values.shape)}, the model reads images of "
            f"{size} x {size} pixels; model.prepare(images, text) makes them"
        )


class TokenEmbed(nn.Module):
    """Token embeddings, looked up after the ids are checked."""

    def __init__(self, cfg: TokenConfig):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.zeros(cfg.d_vocab, cfg.d_model))

    def forward(self, input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return nn.functional.embedding(input_ids, self.weight)
