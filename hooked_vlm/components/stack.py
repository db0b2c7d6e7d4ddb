"""Stacks of blocks: the image encoder and the text stacks, with their embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformers.activations import ACT2FN

from hooked_vlm.components.attention import Attention, bias_of
from hooked_vlm.components.blocks import Context, Door, LlamaBlock, PostNormBlock, PreNormBlock
from hooked_vlm.components.embed import PatchEmbed, TokenEmbed
from hooked_vlm.components.hook_point import HookPoint, listening, remove_points
from hooked_vlm.components.norm import LayerNorm, RMSNorm
from hooked_vlm.config import (
    LlamaConfig,
    ResNetConfig,
    StackConfig,
    TextConfig,
    TokenConfig,
    VisionConfig,
)

Block = TypeVar("Block", PreNormBlock, PostNormBlock)
_HEAD_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "OV", "QK")


class HeadWeights:
    """Weights of one kind of attention over all blocks, with TransformerLens' names and shapes."""

    def __init__(self, attentions: list[Attention]):
        self._attentions = attentions

    def _stacked(self, name: str) -> Tensor:
        return stacked(getattr(attention, name) for attention in self._attentions)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights."""
        return self._stacked("W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_source d_head"]:
        """Key weights."""
        return self._stacked("W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_source d_head"]:
        """Value weights."""
        return self._stacked("W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights."""
        return self._stacked("W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases."""
        return self._stacked("b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Key biases."""
        return self._stacked("b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Value biases."""
        return self._stacked("b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """Output biases."""
        return self._stacked("b_O")

    @property
    def OV(self) -> FactoredMatrix:
        """What a head moves from a key's position into the stream, `W_V W_O`."""
        return FactoredMatrix(self._for_queries(self.W_V), self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        """The bilinear form of a head's scores before the scale, `W_Q W_K^T`."""
        return FactoredMatrix(self.W_Q, self._for_queries(self.W_K).mT)

    def _for_queries(self, weights: Tensor) -> Float[Tensor, "layer head d_source d_head"]:
        """Weights of keys or values, once for each query head that they serve."""
        group = self._attentions[0].group
        return weights if group == 1 else weights.repeat_interleave(group, 1)


class Stack(nn.Module, Generic[Block]):
    """Embeddings, blocks and what follows the last block."""

    cfg: StackConfig | ResNetConfig
    blocks: nn.ModuleList
    pre_norm: bool
    AFTER_BLOCKS: ClassVar[tuple[str, ...]] = ("ln_final",)  # the modules behind the last block

    def run(
        self,
        x: Float[Tensor, "batch ..."],
        context: Context,
        start: Door = (0, "attn"),
        readout: slice = slice(None),
        stop: int | None = None,
    ) -> Float[Tensor, "batch ..."]:
        """Runs the blocks from the door `start` on.

        Args:
            x: the stream at that door.
            context: what the blocks read besides it.
            start: layer and part; the layer after the last means the door behind all blocks.
            readout: the positions that are read of the output. A last block computes only those,
                unless somebody listens in it or behind it.
            stop: the block to stop before, whose door's stream is the output; None for the end.
        """
        first, part = start
        end = self.cfg.n_layers if stop is None else stop
        last = self.cfg.n_layers - 1
        behind: list[nn.Module] = [
            module for name, module in self.named_children() if name in self.AFTER_BLOCKS
        ]
        for layer in range(first, end):
            block = self.blocks[layer]
            trim = layer == last != first and readout != slice(None)
            trim = trim and not any(map(listening, (block, *behind)))
            x = block(
                x,
                context.wanting(readout) if trim else context,
                part if layer == first else "attn",
            )
        context.keep(end, "attn", x)
        return self.finish(x) if stop is None else x

    @property
    def block_list(self) -> list[Block]:
        """The blocks by their type, which `nn.ModuleList` does not know."""
        return cast(list[Block], list(self.blocks))

    def embeddings(self, inputs: Tensor, *, grad: bool = False) -> Tensor:
        """What block 0 reads; with `grad`, its summands require grad."""
        raise NotImplementedError

    def finish(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What follows the last block."""
        return x

    def head_weights(self, layer_type: str = "attn") -> HeadWeights:
        """The weights of `attn` or `cross_attn`, over the blocks that have it: `W_Q`, ..., `QK`."""
        found = [getattr(block, layer_type, None) for block in self.blocks]
        attentions = [attention for attention in found if isinstance(attention, Attention)]
        if not attentions:
            raise ValueError(f"this stack has no {layer_type!r}; attention is 'attn'")
        return HeadWeights(attentions)

    def __getattr__(self, name: str) -> Any:
        # W_Q ... b_O, OV and QK of self-attention, as on a TransformerLens model.
        if name in _HEAD_WEIGHTS:
            return getattr(self.head_weights(), name)
        return super().__getattr__(name)

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Input weights of the MLPs."""
        return stacked(block.mlp.W_in for block in self.block_list)

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """Output weights of the MLPs."""
        return stacked(block.mlp.W_out for block in self.block_list)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """What the output biases add to the stream before a layer; see TransformerLens."""
        biases = [torch.zeros_like(self.block_list[0].attn.b_O)]
        for index, block in enumerate(self.block_list[: layer + mlp_input]):
            biases.append(block.attn.b_O)
            if include_mlp_biases and index < layer:
                biases.append(bias_of(block.mlp.fc_out))
        return stacked(biases).sum(0)


class VisionStack(Stack[PreNormBlock]):
    """A vision transformer: patches, learned positions, pre-norm blocks, a final norm.

    Source: ViT (arXiv 2010.11929), as in BLIP (arXiv 2201.12086) sec. 3.1; with a norm before the
    first block, as in CLIP (arXiv 2103.00020) sec. 2.4; read before its last blocks, as in LLaVA
    (arXiv 2304.08485) sec. 4.1, which keeps them in `unread`, where they have no points.
    """

    pre_norm = True

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg: VisionConfig = cfg
        self.embed = PatchEmbed(cfg)
        self.pos_embed = nn.Parameter(torch.zeros(1, cfg.n_ctx, cfg.d_model))
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]
        if cfg.ln_pre:
            self.ln_pre = LayerNorm(cfg.d_model, cfg.eps)
        self.blocks = nn.ModuleList([PreNormBlock(cfg, layer) for layer in range(cfg.n_layers)])
        ln_final = LayerNorm(cfg.d_model, cfg.eps)
        if cfg.n_unread is None:
            self.ln_final = ln_final
        else:
            unread = [PreNormBlock(cfg, layer) for layer in range(cfg.n_unread)]
            self.unread = nn.ModuleDict({"blocks": nn.ModuleList(unread), "ln_final": ln_final})
            remove_points(self.unread)

    def embeddings(
        self, pixel_values: Float[Tensor, "batch 3 height width"], *, grad: bool = False
    ) -> Float[Tensor, "batch pos d_model"]:
        """Patches and class token, and their positions; normalized where `ln_pre` is."""
        embed = self.embed(pixel_values)
        pos = self.pos_embed.expand(len(embed), -1, -1)
        x: Tensor = self.hook_embed(needing(embed, grad)) + self.hook_pos_embed(needing(pos, grad))
        return self.ln_pre(x) if self.cfg.ln_pre else x

    def finish(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The final norm, of every position, where the stack is read at its end."""
        return self.ln_final(x) if self.cfg.n_unread is None else x


class TokenStack(Stack[Block]):
    """Tokens, and the blocks that read them."""

    cfg: TokenConfig

    def __init__(self, cfg: TokenConfig, block: type[Block]):
        super().__init__()
        self.cfg = cfg
        self.embed = TokenEmbed(cfg)
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        self._add_embed_parts()
        made: list[Any] = [block(cfg, layer) for layer in range(cfg.n_layers)]  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(made)

    def _add_embed_parts(self) -> None:
        """What stands between the token embeddings and block 0."""

    def visible(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None, offset: int = 0
    ) -> Bool[Tensor, "_ 1 _ key"] | None:
        """Which keys a query may see: those that are no padding and, if causal, not later.

        Args:
            input_ids: the new tokens.
            attention_mask: [batch, offset + pos], 1 for a token and 0 for padding.
            offset: how many positions came before.
        """
        mask = None if attention_mask is None else attention_mask.bool()[:, None, None]
        if not self.cfg.causal:
            return mask
        end = offset + input_ids.shape[1]
        at = torch.arange(end, device=input_ids.device)
        causal = (at <= at[offset:, None])[None, None]
        return causal if mask is None else mask & causal

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings."""
        return self.embed.weight


class PositionedStack(TokenStack[Block]):
    """Tokens and learned positions, and the blocks that read them."""

    def _add_embed_parts(self) -> None:
        self.pos_embed = nn.Parameter(torch.zeros(self.cfg.n_ctx, self.cfg.d_model))
        self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]

    def embeddings(
        self, input_ids: Int[Tensor, "batch pos"], *, offset: int = 0, grad: bool = False
    ) -> Float[Tensor, "batch pos d_model"]:
        """Tokens and their positions, the first of which is `offset`."""
        end = offset + input_ids.shape[1]
        if end > self.cfg.n_ctx:
            raise ValueError(
                f"the text has {end} tokens, the position table {self.cfg.n_ctx} rows; shorten it"
            )
        embed = self.embed(input_ids)
        pos = self.pos_embed[offset:end].expand(len(embed), -1, -1)
        x: Tensor = self.hook_embed(needing(embed, grad)) + self.hook_pos_embed(needing(pos, grad))
        return x

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """Position embeddings."""
        return self.pos_embed


class TextStack(PositionedStack[PostNormBlock]):
    """A BERT stack with cross-attention from its fusion layer on.

    Source: BLIP (arXiv 2201.12086) sec. 3.1, the 'mixture of encoder-decoder', where that is the
    first block; ALBEF (arXiv 2107.07651) sec. 3.1, where it is the middle one, and sec. 4 for the
    blocks that read two images in turn and share the weights of their keys and values.
    """

    cfg: TextConfig
    pre_norm = False

    def __init__(self, cfg: TextConfig):
        super().__init__(cfg, PostNormBlock)
        for first in range(cfg.fusion_layer, cfg.n_layers, cfg.n_images):
            shared = self.block_list[first].cross_attn
            for block in self.block_list[first + 1 : first + cfg.n_images]:
                for name in ("k", "v"):
                    for kind in ("weight", "bias"):
                        tied = getattr(getattr(shared, name), kind)
                        setattr(getattr(block.cross_attn, name), kind, tied)

    def _add_embed_parts(self) -> None:
        super()._add_embed_parts()
        if self.cfg.n_token_types:
            self.token_type_embed = nn.Parameter(
                torch.zeros(self.cfg.n_token_types, self.cfg.d_model)
            )
            self.hook_token_type_embed = HookPoint()  # [batch, pos, d_model]
        self.ln_embed = LayerNorm(self.cfg.d_model, self.cfg.eps)

    def embeddings(
        self, input_ids: Int[Tensor, "batch pos"], *, offset: int = 0, grad: bool = False
    ) -> Float[Tensor, "batch pos d_model"]:
        """Tokens, their positions and, in ALBEF, the first token type, normalized."""
        x = super().embeddings(input_ids, offset=offset, grad=grad)
        if self.cfg.n_token_types:
            kind = self.token_type_embed[0].expand(x.shape)
            x = x + self.hook_token_type_embed(needing(kind, grad))
        normalized: Tensor = self.ln_embed(x)
        return normalized


class PreNormTextStack(PositionedStack[PreNormBlock]):
    """Tokens, learned positions, pre-norm blocks, a final norm.

    Source: CLIP (arXiv 2103.00020) sec. 2.4, its text encoder.
    """

    pre_norm = True

    def __init__(self, cfg: TokenConfig):
        super().__init__(cfg, PreNormBlock)
        self.ln_final = LayerNorm(cfg.d_model, cfg.eps)

    def finish(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The final norm, of every position."""
        normalized: Tensor = self.ln_final(x)
        return normalized


class LlamaStack(TokenStack[PreNormBlock]):
    """A causal stack with rotary positions; features of images stand in place of some tokens.

    Source: Llama (arXiv 2302.13971) sec. 2.2; the window, Mistral (arXiv 2310.06825) sec. 2;
    features among the tokens, LLaVA (arXiv 2304.08485) sec. 4.1.
    """

    cfg: LlamaConfig
    pre_norm = True

    def __init__(self, cfg: LlamaConfig):
        super().__init__(cfg, LlamaBlock)
        self.ln_final = RMSNorm(cfg.d_model, cfg.eps)

    def embeddings(
        self,
        input_ids: Int[Tensor, "batch pos"],
        *,
        grad: bool = False,
        features: Float[Tensor, "places d_model"] | None = None,
        places: Bool[Tensor, "batch pos"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Tokens, and in order the features in their `places`."""
        embed = self.embed(input_ids)
        if features is not None and places is not None:
            embed = embed.masked_scatter(places[..., None].to(embed.device), features.to(embed))
        x: Tensor = self.hook_embed(needing(embed, grad))
        return x

    def visible(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Tensor | None, offset: int = 0
    ) -> Bool[Tensor, "_ 1 _ key"] | None:
        """Which keys a query may see: those of its window that are no padding and not later.

        None where that is all that are not later, which attention knows without a mask.
        """
        window, end = self.cfg.sliding_window or math.inf, offset + input_ids.shape[1]
        if end <= window and (attention_mask is None or bool(attention_mask.all())):
            return None
        mask = super().visible(input_ids, attention_mask, offset)
        at = torch.arange(end, device=input_ids.device)
        return mask if mask is None or end <= window else mask & (at > at[offset:, None] - window)

    def finish(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The final norm, of every position."""
        normalized: Tensor = self.ln_final(x)
        return normalized


class Unembed(nn.Module):
    """BERT's prediction head: dense, GELU, norm, and the tied token embeddings with a bias.

    Source: BERT (arXiv 1810.04805) appendix A; BLIP's text decoder.
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.dense = nn.Linear(cfg.d_model, cfg.d_model)
        self.act = ACT2FN[cfg.activation]
        self.hook_pre = HookPoint()  # [batch, pos, d_model]
        self.hook_post = HookPoint()  # [batch, pos, d_model]
        self.ln = LayerNorm(cfg.d_model, cfg.eps)
        self.out = nn.Linear(cfg.d_model, cfg.d_vocab)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        post = self.hook_post(self.act(self.hook_pre(self.dense(x))))
        logits: Tensor = self.out(self.ln(post))
        return logits


def stacked(tensors: Iterable[Tensor]) -> Float[Tensor, "layer ..."]:
    """One upon another, on the device of the first."""
    first, *others = tensors
    return torch.stack([first, *(tensor.to(first.device) for tensor in others)])


def needing(x: Tensor, grad: bool) -> Tensor:
    """The tensor itself; where `grad`, one that requires grad."""
    if grad and not x.requires_grad:
        x = x.detach()
        x.requires_grad_()
    return x
