"""Multi-head attention: self, causal and cross, with every head in sight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.memory import check_room
from hooked_vlm.components.past import KeyValue, Past, consecutive, triangle
from hooked_vlm.config import LlamaConfig, ResNetConfig, StackConfig

# Behind kept keys, more queries than this are fused over a copy of them; fewer share one copy in
# two products, whose scores grow with the queries times the keys.
FEW = 16


@dataclass
class Source:
    """What cross-attention reads: the states of another stack, shared by rows of the batch.

    Attributes:
        states: the other stack's output.
        mask: which of its positions may be seen; None for all.
        rows: for each row of the batch, the row of `states` it reads; None where the rows pair up
            one to one, or where one row of `states` serves the whole batch.
        kept: keys and values by layer, filled as they are made; None keeps nothing.
    """

    states: Float[Tensor, "rows source d_source"]
    mask: Bool[Tensor, "rows source"] | None = None
    rows: Int[Tensor, " batch"] | None = None
    kept: dict[int, KeyValue] | None = None

    def shared(self) -> slice | Int[Tensor, " groups"]:
        """The rows of `states` to read, each by an equal run of consecutive batch rows."""
        return slice(None) if self.rows is None else consecutive(self.rows)


class Attention(nn.Module):
    """`softmax(q k^T / sqrt(d_head)) v`, heads joined by an output projection.

    A head of keys and values serves a group of consecutive query heads, most often of one.

    Source: arXiv 1706.03762 sec. 3.2; groups, arXiv 2305.13245 sec. 2.2. Fused unless somebody
    listens to scores or pattern; both ways a query that may see no key has a pattern and z of 0.

    Args:
        cfg: sizes of the stack.
        d_source: width of what keys and values read; None for self-attention.
        d_out: width of what the output projection gives; by default that of the stack.
        bias: whether the four projections have biases.
    """

    def __init__(
        self,
        cfg: StackConfig | ResNetConfig,
        d_source: int | None = None,
        d_out: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        self.n_heads, self.d_head = cfg.n_heads, cfg.d_head
        heads, kv_heads = cfg.n_heads, cfg.n_key_value_heads
        self.group = heads // kv_heads  # query heads that a head of keys and values serves
        self.causal: bool = getattr(cfg, "causal", False)  # of attention to the stack itself
        self.q = nn.Linear(cfg.d_model, heads * cfg.d_head, bias)
        self.k = nn.Linear(d_source or cfg.d_model, kv_heads * cfg.d_head, bias)
        self.v = nn.Linear(d_source or cfg.d_model, kv_heads * cfg.d_head, bias)
        self.o = nn.Linear(heads * cfg.d_head, d_out or cfg.d_model, bias)
        self.hook_q_in = HookPoint()  # [batch, query, d_model]
        self.hook_kv_in = HookPoint()  # [batch, key, d_source]
        self.hook_q = HookPoint(2, heads)  # [batch, query, head, d_head]
        self.hook_k = HookPoint(2, kv_heads)  # [batch, key, kv_head, d_head]
        self.hook_v = HookPoint(2, kv_heads)  # [batch, key, kv_head, d_head]
        self.hook_attn_scores = HookPoint(1, heads)  # [batch, head, query, key]
        self.hook_pattern = HookPoint(1, heads)  # [batch, head, query, key]
        self.hook_z = HookPoint(2, heads)  # [batch, query, head, d_head]
        self.hook_result = HookPoint(2, heads)  # [batch, query, head, d_model]

    def _heads(self, x: Tensor) -> Float[Tensor, "*batch head d_head"]:
        heads: Tensor = x.unflatten(-1, (-1, self.d_head))
        return heads

    def _join(
        self,
        q: Float[Tensor, "batch query head d_head"],
        k: Float[Tensor, "groups key kv_head d_head"],
        v: Float[Tensor, "groups key kv_head d_head"],
        mask: Bool[Tensor, "_ 1 _ _"] | None,
        causal: bool = False,
        before: KeyValue | None = None,
    ) -> Float[Tensor, "batch query d_model"]:
        """Attends and projects out; each row of k and v serves a run of consecutive batch rows.

        Args:
            q: queries.
            k: keys.
            v: values.
            mask: True where a query may see a key.
            causal: whether a query sees no key behind it; queries and keys are the same positions.
            before: keys and values in front of these, whose rows serve runs of their own.
        """
        heard = self.hook_attn_scores.listening or self.hook_pattern.listening
        if before is not None and not heard and q.shape[1] > FEW:
            k, v = (
                torch.cat([_repeat(kept, len(own)), own], 1)
                for kept, own in zip(before, (k, v), strict=True)
            )
            before = None
        batch, groups = len(q), len(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if before is None and not heard:
            grouped = self.group > 1
            fused = F.scaled_dot_product_attention(
                _fold(q, groups), k, v, mask, is_causal=causal, enable_gqa=grouped
            )
            z = _unfold(fused, batch).transpose(1, 2)
        else:
            parts = [(k, v)]
            if before is not None:
                parts.insert(0, (before[0].transpose(1, 2), before[1].transpose(1, 2)))
            self._check_room(q, sum(keys.shape[2] for keys, _ in parts))
            q = q * self.d_head**-0.5
            scores = torch.cat([_product(q, keys.mT) for keys, _ in parts], -1)
            blind = mask is not None or self.hook_attn_scores.written
            if causal:
                mask = triangle(scores.shape[2], scores.shape[3], scores.device)
            lowest = torch.finfo(scores.dtype).min
            if mask is not None:
                mask = mask if len(mask) == 1 else _repeat(mask, batch)
                scores = scores.masked_fill(~mask, lowest)
            scores = self.hook_attn_scores(scores)
            pattern = scores.softmax(-1)
            if blind:  # there may be queries that see no key
                pattern = pattern.masked_fill((scores <= lowest).all(-1, keepdim=True), 0)
            shares = self.hook_pattern(pattern).split([keys.shape[2] for keys, _ in parts], -1)
            products = [_product(a, b) for a, (_, b) in zip(shares, parts, strict=True)]
            z = sum(products[1:], products[0]).transpose(1, 2)
        z = self.hook_z(z)
        if self.hook_result.listening:
            result = torch.einsum("bqhd,hdm->bqhm", z, self.W_O)
            return self.hook_result(result).sum(2) + self.b_O
        out: Tensor = self.o(z.flatten(-2))
        return out

    def _check_room(self, q: Float[Tensor, "batch head query d_head"], n_keys: int) -> None:
        """Refuses scores and pattern that do not fit into memory."""
        shape = [*q.shape[:3], n_keys]
        check_room(
            2 * math.prod(shape) * q.element_size(),
            q.device,
            f"{self.hook_pattern.name!r} is {shape}, and so are its scores; run fewer rows at a "
            "time, or read scores and patterns of fewer layers",
        )

    # TransformerLens' per-head weights: views of the released ones, copies of quantised ones.
    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights, head by head."""
        return self._heads(weight_of(self.q).mT).transpose(0, 1)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_source d_head"]:
        """Key weights, head by head."""
        return self._heads(weight_of(self.k).mT).transpose(0, 1)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_source d_head"]:
        """Value weights, head by head."""
        return self._heads(weight_of(self.v).mT).transpose(0, 1)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights, head by head."""
        return self._heads(weight_of(self.o)).permute(1, 2, 0)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases."""
        return self._heads(bias_of(self.q))

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        """Key biases."""
        return self._heads(bias_of(self.k))

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        """Value biases."""
        return self._heads(bias_of(self.v))

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias."""
        return bias_of(self.o)


class SelfAttention(Attention):
    """Attention of a stack to itself."""

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        mask: Bool[Tensor, "#batch 1 _ _"] | None = None,
        queries: slice = slice(None),
        past: Past | None = None,
        layer: int = 0,
    ) -> Float[Tensor, "batch query d_out"]:
        """Attends from `queries` to every position, and to those in `past`.

        Args:
            x: what queries, keys and values read.
            mask: True where a query may see a key; by default, in a causal stack where the key is
                not later, else everywhere.
            queries: the positions whose output is wanted.
            past: keys and values of earlier positions; it gets the new ones.
            layer: this block's number in `past`.
        """
        q = self.hook_q(self._heads(self.q(self.hook_q_in(x)[:, queries])))
        kv_in = self.hook_kv_in(x)
        k = self.hook_k(self._heads(self.k(kv_in)))
        v = self.hook_v(self._heads(self.v(kv_in)))
        offset = 0 if past is None else past.length(layer)
        q, k = self._placed(q, k, queries, offset)
        before = None
        if past is not None:
            k, v, before = past.extend(layer, k, v)
        end = offset + x.shape[1]
        causal = mask is None and self.causal and q.shape[1] == end
        last = q.shape[1] == 1 and queries.stop is None  # it sees all keys
        if mask is None and self.causal and not (causal or last):
            mask = triangle(x.shape[1], end, x.device)[:, :, queries]
        return self._join(q, k, v, mask, causal, before)

    def _placed(self, q: Tensor, k: Tensor, queries: slice, offset: int) -> tuple[Tensor, Tensor]:
        """Queries and keys that know where they stand; here the stream itself tells."""
        return q, k


class RotaryAttention(SelfAttention):
    """Attention whose queries and keys are turned by angles that grow with the position.

    Source: RoFormer (arXiv 2104.09864) sec. 3.2.2, with halves in place of pairs, as in Llama
    (arXiv 2302.13971) sec. 2.2.
    """

    def __init__(self, cfg: LlamaConfig):
        super().__init__(cfg, bias=False)
        self.theta = cfg.rope_theta
        self.hook_rot_q = HookPoint(2, cfg.n_heads)  # [batch, query, head, d_head]
        self.hook_rot_k = HookPoint(2, cfg.n_key_value_heads)  # [batch, key, kv_head, d_head]

    def _placed(self, q: Tensor, k: Tensor, queries: slice, offset: int) -> tuple[Tensor, Tensor]:
        at = torch.arange(offset, offset + k.shape[1], device=k.device)
        return self.hook_rot_q(self._turned(q, at[queries])), self.hook_rot_k(self._turned(k, at))

    def _turned(
        self, x: Float[Tensor, "batch pos head d_head"], at: Int[Tensor, " pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        steps = torch.arange(0, self.d_head, 2, device=x.device, dtype=wide) / self.d_head
        frequencies = 1 / self.theta**steps  # rounded as in transformers: far on, angles are large
        angles = (at[:, None] * frequencies).repeat(1, 2)[:, None]
        left, right = x.chunk(2, -1)
        turned = torch.cat([-right, left], -1)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class CrossAttention(Attention):
    """Attention of one stack to the output of another."""

    def __init__(self, cfg: StackConfig, d_source: int):
        super().__init__(cfg, d_source)
        for point in (self.hook_kv_in, self.hook_k, self.hook_v):
            point.of_source = True

    def forward(
        self, x: Float[Tensor, "batch query d_model"], source: Source, layer: int
    ) -> Float[Tensor, "batch query d_model"]:
        """Attends from x to the source; keys and values that the source keeps are not made again.

        Args:
            x: what the queries read.
            source: what keys and values read.
            layer: this block's number in `source.kept`.
        """
        q = self.hook_q(self._heads(self.q(self.hook_q_in(x))))
        k, v, mask = self._keys_and_values(source, len(x), layer)
        if self.hook_k.listening or self.hook_v.listening:
            k, v = self.hook_k(_repeat(k, len(x))), self.hook_v(_repeat(v, len(x)))
            mask = None if mask is None else _repeat(mask, len(x))
        return self._join(q, k, v, mask)

    def _keys_and_values(
        self, source: Source, batch: int, layer: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        groups = source.shared()
        mask = None if source.mask is None else source.mask[groups][:, None, None]
        kept = None if source.kept is None else source.kept.get(layer)
        if kept is not None and not self.hook_kv_in.listening:
            return kept[0][groups], kept[1][groups], mask
        states = source.states
        if self.hook_kv_in.listening:
            states = self.hook_kv_in(_repeat(states[groups], batch))
            mask = None if mask is None else _repeat(mask, batch)
            groups = slice(None)
        k, v = self._heads(self.k(states)), self._heads(self.v(states))
        if source.kept is not None and not self.hook_kv_in.listening:  # by rows of the source
            source.kept[layer] = k, v
        return k[groups], v[groups], mask


def weight_of(linear: nn.Linear) -> Float[Tensor, "d_out d_in"]:
    """Its weight; of a quantised one, a copy in the dtype that it computes in."""
    if not is_traceable_wrapper_subclass(linear.weight):
        return linear.weight
    copy: Tensor = getattr(linear.weight, "dequantize")()  # noqa: B009 (torchao's, of no type here)
    return copy


def bias_of(linear: nn.Linear) -> Float[Tensor, " d_out"]:
    """Its bias, zeros where it has none."""
    if linear.bias is None:
        like: Tensor = weight_of(linear)
        return like.new_zeros(linear.out_features)
    return linear.bias


def _repeat(t: Tensor, batch: int) -> Tensor:
    return t if len(t) == batch else t.repeat_interleave(batch // len(t), 0)


def _fold(t: Tensor, groups: int, kv_heads: int | None = None) -> Float[Tensor, "groups _ pos d"]:
    """Lays rows, and heads, that one matrix serves side by side along the position axis."""
    rows = t.unflatten(0, (groups, -1)).unflatten(2, (kv_heads or t.shape[1], -1))
    folded: Tensor = rows.permute(0, 2, 1, 3, 4, 5).flatten(2, 4)
    return folded


def _unfold(t: Tensor, batch: int, heads: int | None = None) -> Float[Tensor, "batch head pos d"]:
    """The reverse of `_fold`."""
    groups, kv_heads = t.shape[:2]
    rows = t.unflatten(2, (batch // groups, (heads or kv_heads) // kv_heads, -1))
    unfolded: Tensor = rows.permute(0, 2, 1, 3, 4, 5).flatten(0, 1).flatten(1, 2)
    return unfolded


def _product(
    a: Float[Tensor, "batch head query x"], b: Float[Tensor, "groups kv_head x y"]
) -> Float[Tensor, "batch head query y"]:
    """`a @ b`, where a matrix of b serves a run of rows, and of heads, of a."""
    groups, kv_heads = b.shape[:2]
    return _unfold(_fold(a, groups, kv_heads) @ b, len(a), a.shape[1])
