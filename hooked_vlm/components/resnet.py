"""CLIP's ResNet: a stem of three convolutions, bottleneck blocks, and a pool that attends.

Source: CLIP (arXiv 2103.00020) sec. 2.4, and `ModifiedResNet` of OpenAI's repository: the stem and
the average pools in front of strides are ResNet-D's (arXiv 1812.01187), the blurring before them
that of arXiv 1904.11486. Maps are [batch, channel, row, column]; their points have no positions.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components.attention import SelfAttention
from hooked_vlm.components.blocks import Context, Part
from hooked_vlm.components.embed import check_pixels
from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.stack import Stack, needing
from hooked_vlm.config import ResNetConfig

Map = Float[Tensor, "batch channel row column"]


class BatchNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias` for each channel, by kept statistics.

    Source: arXiv 1502.03167, in evaluation. The statistics are parameters like any other, for
    loading and saving, but are never trained.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.mean = nn.Parameter(torch.zeros(channels))
        self.var = nn.Parameter(torch.ones(channels))

    def forward(self, x: Map) -> Map:
        mean, var = self.mean.detach(), self.var.detach()
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)


class ConvNorm(nn.Module):
    """A convolution without a bias, and its batch norm."""

    def __init__(self, d_in: int, d_out: int, eps: float, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(d_in, d_out, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = BatchNorm(d_out, eps)
        self.hook_conv = HookPoint(positions=False)  # [batch, d_out, row, column], not normalized

    def forward(
        self, x: Float[Tensor, "batch d_in rows columns"]
    ) -> Float[Tensor, "batch d_out row column"]:
        normalized: Tensor = self.norm(self.hook_conv(self.conv(x)))
        return normalized


class ConvNormReLU(ConvNorm):
    """A convolution without a bias, its batch norm, and a ReLU."""

    def __init__(self, d_in: int, d_out: int, eps: float, kernel: int = 1, stride: int = 1):
        super().__init__(d_in, d_out, eps, kernel, stride)
        self.hook_pre = HookPoint(positions=False)  # [batch, d_out, row, column], normalized
        self.hook_post = HookPoint(positions=False)  # [batch, d_out, row, column], after the ReLU

    def forward(
        self, x: Float[Tensor, "batch d_in rows columns"]
    ) -> Float[Tensor, "batch d_out row column"]:
        return self.hook_post(F.relu(self.hook_pre(super().forward(x))))


class Stem(nn.Module):
    """Three convolutions, the first with a stride of 2, and an average pool of 2."""

    def __init__(self, cfg: ResNetConfig):
        super().__init__()
        self.image_size = cfg.image_size
        self.conv1 = ConvNormReLU(3, cfg.width // 2, cfg.eps, kernel=3, stride=2)
        self.conv2 = ConvNormReLU(cfg.width // 2, cfg.width // 2, cfg.eps, kernel=3)
        self.conv3 = ConvNormReLU(cfg.width // 2, cfg.width, cfg.eps, kernel=3)

    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channel row column"]:
        check_pixels(pixel_values, self.image_size)
        return F.avg_pool2d(self.conv3(self.conv2(self.conv1(pixel_values))), 2)


class Bottleneck(nn.Module):
    """`relu(skip + conv3(pool(conv2(conv1(x)))))`; where it strides, both sides are pooled first.

    Args:
        d_in: channels of what it reads.
        d_inner: channels of its two inner maps; it gives four times as many.
        stride: by how much the map shrinks, 1 or 2.
        eps: constant under the root of its batch norms.
        layer: its number in the stack.
        ends_stage: whether it is the last of its stage.
    """

    PARTS: ClassVar[dict[str, Part]] = {}  # one part, behind the door "attn"

    def __init__(
        self, d_in: int, d_inner: int, stride: int, eps: float, layer: int, ends_stage: bool
    ):
        super().__init__()
        self.layer, self.stride, self.ends_stage = layer, stride, ends_stage
        self.projects = stride > 1 or d_in != 4 * d_inner
        # In the order in which they run. Points are [batch, channel, row, column].
        self.hook_resid_pre = HookPoint(positions=False)
        self.conv1 = ConvNormReLU(d_in, d_inner, eps)
        self.conv2 = ConvNormReLU(d_inner, d_inner, eps, kernel=3)
        self.conv3 = ConvNorm(d_inner, 4 * d_inner, eps)
        self.hook_conv_out = HookPoint(positions=False)  # what the block adds
        if self.projects:
            self.downsample = ConvNorm(d_in, 4 * d_inner, eps)
        self.hook_skip = HookPoint(positions=False)  # what it adds that to
        self.hook_resid_mid = HookPoint(positions=False)  # the sum
        self.hook_resid_post = HookPoint(positions=False)  # after the ReLU
        if ends_stage:
            self.hook_stage_out = HookPoint(positions=False)  # the same, as the stage's output

    def forward(
        self, x: Float[Tensor, "batch d_in rows columns"], context: Context, start: Part = "attn"
    ) -> Float[Tensor, "batch d_out row column"]:
        """Runs the block."""
        context.keep(self.layer, start, x)
        x = self.hook_resid_pre(x)
        conv_out = self.hook_conv_out(self.conv3(self._pool(self.conv2(self.conv1(x)))))
        skip = self.hook_skip(self.downsample(self._pool(x)) if self.projects else x)
        x = self.hook_resid_post(F.relu(self.hook_resid_mid(skip + conv_out)))
        return self.hook_stage_out(x) if self.ends_stage else x

    def _pool(self, x: Map) -> Float[Tensor, "batch channel _ _"]:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


class AttentionPool(SelfAttention):
    """One multi-head attention from the mean of the map to its cells and that mean.

    Args:
        cfg: sizes of the stack.
        d_out: width of what it gives.
    """

    def __init__(self, cfg: ResNetConfig, d_out: int):
        super().__init__(cfg, d_out=d_out)
        self.pos_embed = nn.Parameter(torch.zeros(cfg.n_ctx, cfg.d_model))
        self.hook_embed = HookPoint()  # [batch, pos, d_model], the mean in front
        self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]

    def forward(  # type: ignore[override]  # a map in, one vector out
        self, x: Float[Tensor, "batch d_model row column"]
    ) -> Float[Tensor, "batch d_out"]:
        cells = x.flatten(2).mT
        embed = self.hook_embed(torch.cat([cells.mean(1, keepdim=True), cells], dim=1))
        pos = needing(self.pos_embed.expand(len(embed), -1, -1), embed.requires_grad)
        pooled = super().forward(embed + self.hook_pos_embed(pos), queries=slice(0, 1))
        return pooled[:, 0]


class ResNetStack(Stack[Any]):
    """CLIP's ResNet as a stack: its stem embeds, its stages' blocks count on, its pool follows.

    Args:
        cfg: sizes.
        d_out: width of what the pool gives.
    """

    pre_norm = False
    AFTER_BLOCKS = ("attnpool",)

    def __init__(self, cfg: ResNetConfig, d_out: int):
        super().__init__()
        self.cfg: ResNetConfig = cfg
        self.stem = Stem(cfg)
        self.hook_embed = HookPoint(positions=False)  # [batch, channel, row, column]
        blocks: list[Bottleneck] = []
        d_in = cfg.width
        for stage, size in enumerate(cfg.stages):
            for index in range(size):
                stride = 2 if stage and not index else 1
                layer, last = len(blocks), index == size - 1
                blocks.append(Bottleneck(d_in, cfg.width * 2**stage, stride, cfg.eps, layer, last))
                d_in = 4 * cfg.width * 2**stage
        self.blocks = nn.ModuleList(blocks)
        self.attnpool = AttentionPool(cfg, d_out)

    def embeddings(
        self, pixel_values: Float[Tensor, "batch 3 height width"], *, grad: bool = False
    ) -> Float[Tensor, "batch channel row column"]:
        """What the stem makes of an image."""
        pixels = needing(pixel_values.to(self.attnpool.pos_embed.dtype), grad)
        return self.hook_embed(self.stem(pixels))

    def finish(self, x: Map) -> Float[Tensor, "batch d_out"]:
        """What the pool makes of the last map."""
        pooled: Tensor = self.attnpool(x)
        return pooled

    @property
    def block_list(self) -> list[Bottleneck]:
        """The blocks of all stages."""
        return cast(list[Bottleneck], list(self.blocks))

    def head_weights(self, layer_type: str = "attn") -> NoReturn:
        """Refuses: only the pool has heads."""
        raise ValueError(
            f"a ResNet's blocks have no {layer_type!r}; its heads are those of attnpool"
        )
