"""Transformer blocks, each a few parts: attention, cross-attention, MLP.

A forward pass can be continued at the door of any part, so a block takes the part to start at and
hands the stream at each door to whoever keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_vlm.components.attention import (
    CrossAttention,
    RotaryAttention,
    SelfAttention,
    Source,
)
from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.mlp import MLP, GatedMLP
from hooked_vlm.components.norm import LayerNorm, RMSNorm
from hooked_vlm.components.past import Past
from hooked_vlm.config import LlamaConfig, StackConfig, TextConfig

Part = Literal["attn", "cross_attn", "mlp"]
Door = tuple[int, Part]  # a block's number and the part behind the door
Stream = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class Sum:
    """A part of a block, and how the stream runs past it.

    A block's `SUMS` list its parts in the order in which they run: what happens to the stream on
    its way from one place to another, which is the path that edges between parts go.

    Attributes:
        part: the part, by the name of its module.
        reads: the point at which it reads the stream.
        before: the norm between that point and the part; None for none.
        total: the point of the sum of the stream and what the part adds.
        behind: the norm that the sum passes; None for none.
        stream: the point of the stream behind it.
    """

    part: Part
    reads: str
    before: str | None
    total: str
    behind: str | None
    stream: str

    @property
    def out(self) -> str:
        """The point of what the part adds."""
        return f"hook_{self.part}_out"


@dataclass(frozen=True)
class Context:
    """What the blocks of a stack read besides the stream.

    Attributes:
        mask: True where a query may see a key of the stack itself.
        sources: what blocks with cross-attention read in turn; empty skips it.
        past: keys and values of the stack's own earlier positions.
        queries: the positions that are wanted of this block's output.
        doors: filled with the stream at each part's door, by layer and part.
    """

    mask: Bool[Tensor, "_ 1 _ _"] | None = None
    sources: tuple[Source, ...] = ()
    past: Past | None = None
    queries: slice = field(default_factory=lambda: slice(None))
    doors: dict[Door, Tensor] | None = None

    def wanting(self, queries: slice) -> Context:
        """The same, for a block of which only some positions are wanted."""
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask[:, :, queries]
        return replace(self, queries=queries, mask=mask)

    def source(self, turn: int) -> Source | None:
        """What a block reads whose turn it is."""
        return self.sources[turn % len(self.sources)] if self.sources else None

    def keep(self, layer: int, part: Part, x: Tensor) -> None:
        """Keeps the stream at a door, if anybody asked for it."""
        if self.doors is not None:
            self.doors[layer, part] = x


class PreNormBlock(nn.Module):
    """`x + attn(ln1(x))`, then `x + mlp(ln2(x))`.

    Source: ViT (arXiv 2010.11929) eq. 2 and 3.
    """

    # The part that each component belongs to; unnamed ones belong to the first.
    PARTS: ClassVar[dict[str, Part]] = {
        "hook_mlp_in": "mlp",
        "ln2": "mlp",
        "mlp": "mlp",
        "hook_mlp_out": "mlp",
        "hook_resid_post": "mlp",
    }
    SUMS: ClassVar[tuple[Sum, ...]] = (
        Sum("attn", "hook_resid_pre", "ln1", "hook_resid_mid", None, "hook_resid_mid"),
        Sum("mlp", "hook_mlp_in", "ln2", "hook_resid_post", None, "hook_resid_post"),
    )

    def __init__(self, cfg: StackConfig, layer: int):
        super().__init__()
        self.layer = layer
        # In the order in which they run. Points are [batch, pos, d_model].
        self.hook_resid_pre = HookPoint()
        self.ln1 = self._norm(cfg)
        self.attn = self._attention(cfg)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.ln2 = self._norm(cfg)
        self.mlp = self._perceptron(cfg)
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def _norm(self, cfg: StackConfig) -> LayerNorm | RMSNorm:
        return LayerNorm(cfg.d_model, cfg.eps)

    def _attention(self, cfg: Any) -> SelfAttention:
        return SelfAttention(cfg)

    def _perceptron(self, cfg: StackConfig) -> MLP | GatedMLP:
        return MLP(cfg.d_model, cfg.d_mlp, cfg.activation)

    def forward(
        self, x: Stream, context: Context, start: Part = "attn"
    ) -> Float[Tensor, "batch wanted d_model"]:
        """Runs the block, or what of it comes from the part `start` on."""
        if start == "attn":
            context.keep(self.layer, "attn", x)
            x = self.hook_resid_pre(x)
            attn_out = self.attn(
                self.ln1(x), context.mask, context.queries, context.past, self.layer
            )
            x = self.hook_resid_mid(x[:, context.queries] + self.hook_attn_out(attn_out))
        context.keep(self.layer, "mlp", x)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(self.hook_mlp_in(x))))
        return self.hook_resid_post(x + mlp_out)


class LlamaBlock(PreNormBlock):
    """A pre-norm block of RMS norms, rotary attention and a gated MLP.

    Source: Llama (arXiv 2302.13971) sec. 2.2.
    """

    def _norm(self, cfg: StackConfig) -> RMSNorm:
        return RMSNorm(cfg.d_model, cfg.eps)

    def _attention(self, cfg: LlamaConfig) -> RotaryAttention:
        return RotaryAttention(cfg)

    def _perceptron(self, cfg: StackConfig) -> GatedMLP:
        return GatedMLP(cfg.d_model, cfg.d_mlp, cfg.activation)


class PostNormBlock(nn.Module):
    """BERT's block: each sum is normalized before the next part reads it and adds to it.

    Source: BERT (arXiv 1810.04805), with the cross-attention of BLIP (arXiv 2201.12086) sec. 3.1
    between self-attention and MLP; blocks before the fusion layer have none (ALBEF, arXiv
    2107.07651, sec. 3.1).
    """

    PARTS: ClassVar[dict[str, Part]] = {
        "cross_attn": "cross_attn",
        "hook_cross_attn_out": "cross_attn",
        "hook_resid_mid_cross": "cross_attn",
        "ln_cross": "cross_attn",
        "hook_normalized_resid_mid_cross": "cross_attn",
        "hook_mlp_in": "mlp",
        "mlp": "mlp",
        "hook_mlp_out": "mlp",
        "hook_resid_post": "mlp",
        "ln2": "mlp",
        "hook_normalized_resid_post": "mlp",
    }
    SUMS: ClassVar[tuple[Sum, ...]] = (
        Sum("attn", "hook_resid_pre", None, "hook_resid_mid", "ln1", "hook_normalized_resid_mid"),
        Sum(
            "cross_attn",
            "hook_normalized_resid_mid",
            None,
            "hook_resid_mid_cross",
            "ln_cross",
            "hook_normalized_resid_mid_cross",
        ),
        Sum("mlp", "hook_mlp_in", None, "hook_resid_post", "ln2", "hook_normalized_resid_post"),
    )

    def __init__(self, cfg: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        # In the order in which they run. Points are [batch, pos, d_model].
        self.hook_resid_pre = HookPoint()
        self.attn = SelfAttention(cfg)
        self.hook_attn_out = HookPoint()
        self.hook_resid_mid = HookPoint()
        self.ln1 = LayerNorm(cfg.d_model, cfg.eps)
        self.hook_normalized_resid_mid = HookPoint()
        self.turn = layer - cfg.fusion_layer
        if self.turn >= 0:
            self.cross_attn = CrossAttention(cfg, cfg.d_source)
            self.hook_cross_attn_out = HookPoint()
            self.hook_resid_mid_cross = HookPoint()
            self.ln_cross = LayerNorm(cfg.d_model, cfg.eps)
            self.hook_normalized_resid_mid_cross = HookPoint()
        self.hook_mlp_in = HookPoint()
        self.mlp = MLP(cfg.d_model, cfg.d_mlp, cfg.activation)
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()
        self.ln2 = LayerNorm(cfg.d_model, cfg.eps)
        self.hook_normalized_resid_post = HookPoint()

    def forward(
        self, x: Stream, context: Context, start: Part = "attn"
    ) -> Float[Tensor, "batch wanted d_model"]:
        """Runs the block, or what of it comes from the part `start` on."""
        if start == "attn":
            context.keep(self.layer, "attn", x)
            x = self.hook_resid_pre(x)
            attn_out = self.attn(x, context.mask, context.queries, context.past, self.layer)
            x = self.hook_resid_mid(x[:, context.queries] + self.hook_attn_out(attn_out))
            x = self.hook_normalized_resid_mid(self.ln1(x))
        source = context.source(self.turn) if self.turn >= 0 else None
        if start != "mlp" and source is not None:
            context.keep(self.layer, "cross_attn", x)
            cross_out = self.hook_cross_attn_out(self.cross_attn(x, source, self.layer))
            x = self.hook_resid_mid_cross(x + cross_out)
            x = self.hook_normalized_resid_mid_cross(self.ln_cross(x))
        context.keep(self.layer, "mlp", x)
        mlp_out = self.hook_mlp_out(self.mlp(self.hook_mlp_in(x)))
        return self.hook_normalized_resid_post(self.ln2(self.hook_resid_post(x + mlp_out)))
