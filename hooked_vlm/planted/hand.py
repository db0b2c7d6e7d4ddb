"""Weights set by hand: directions with names, and heads that read and write along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.components.attention import Attention
from hooked_vlm.components.norm import LayerNorm, RMSNorm

Directions = Float[Tensor, "_ d_model"]  # some of them, each of length 1


class Basis:
    """Directions of a stream with names: orthonormal, without a mean, and turned at random.

    A layer norm or RMS norm without gain and bias takes a stream along them to the same one times
    a positive number.

    Args:
        d_model: width of the stream.
        sizes: how many directions each name has.
        generator: what turns them.

    Raises:
        ValueError: more directions than there are.
    """

    def __init__(self, d_model: int, sizes: Mapping[str, int], generator: torch.Generator):
        n = sum(sizes.values())
        if n >= d_model:
            raise ValueError(f"{n} directions without a mean do not fit into {d_model} dimensions")
        drawn = torch.randn(d_model, n + 1, generator=generator, dtype=torch.float64)
        drawn[:, 0] = 1  # the mean comes first, and what is orthogonal to it has none
        turned = torch.linalg.qr(drawn)[0][:, 1:].T.float()
        self._parts = dict(zip(sizes, turned.split(list(sizes.values())), strict=True))

    def __getitem__(self, name: str) -> Directions:
        """The directions of a name, [n, d_model]."""
        found: Directions = self._parts[name]
        return found


@dataclass(frozen=True)
class Reads:
    """What a head's queries, keys or values read.

    Attributes:
        directions: of the stream.
        gain: what they are multiplied by.
        at: the first dimension of the head that gets them.
    """

    directions: Directions
    gain: float = 1.0
    at: int = 0


def set_head(
    attention: Attention,
    head: int,
    *,
    q: Sequence[Reads] = (),
    k: Sequence[Reads] = (),
    v: Sequence[Reads] = (),
    o: Sequence[Reads] = (),
    dims: Sequence[int] | None = None,
    bias: Mapping[str, Float[Tensor, " d_head"]] | None = None,
) -> None:
    """Sets a head's weights, all others of it to 0.

    Args:
        attention: its module.
        head: its number.
        q: what queries read.
        k: what keys read.
        v: what values read.
        o: what it writes: the directions that the dimensions from `at` on are written along.
        dims: which dimensions of the head those of queries and keys are; by default the first.
        bias: of `q`, `k` and `v`.
    """
    d_head = attention.d_head
    rows = slice(head * d_head, (head + 1) * d_head)
    for name, given in (("q", q), ("k", k), ("v", v)):
        linear: nn.Linear = getattr(attention, name)
        weight = torch.zeros(d_head, linear.in_features)
        for one in given:
            n = len(one.directions)
            weight[one.at : one.at + n] += one.gain * one.directions
        if dims is not None and name != "v":
            weight = torch.zeros_like(weight).index_copy(0, torch.tensor(dims), weight[: len(dims)])
        linear.weight.data[rows] = weight
        if linear.bias is not None:
            linear.bias.data[rows] = (bias or {}).get(name, torch.zeros(d_head))
    written = torch.zeros(attention.o.out_features, d_head)
    for one in o:
        written[:, one.at : one.at + len(one.directions)] += one.gain * one.directions.T
    attention.o.weight.data[:, rows] = written


def mixed(
    directions: Directions, n: int, generator: torch.Generator, gain: float = 1.0
) -> Directions:
    """Random sums of directions, each of length `gain`."""
    drawn = torch.randn(n, len(directions), generator=generator)
    return gain * nn.functional.normalize(drawn, dim=1) @ directions


def plain(module: nn.Module) -> None:
    """Norms without gains and biases, all other parameters 0."""
    for parameter in module.parameters():
        parameter.data.zero_()
    for part in module.modules():
        if isinstance(part, LayerNorm | RMSNorm):
            part.weight.data.fill_(1)
