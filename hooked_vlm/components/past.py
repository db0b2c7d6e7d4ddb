"""Keys and values of earlier positions of a causal stack: kept by one pass, read by another."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]  # [rows, pos, kv_head, d_head] each


class Past:
    """What stands before the positions of a pass: here, nothing does."""

    def length(self, layer: int) -> int:
        """How many positions that is, when block `layer` asks."""
        return 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Takes the new keys and values; gives those that each row has, and that rows share.

        Args:
            layer: the block's number.
            k: keys of the new positions, [batch, pos, kv_head, d_head], rotated.
            v: values of the new positions.

        Returns:
            Keys and values of each row's own, and those before them that runs of consecutive rows
            share, [groups, pos, kv_head, d_head].
        """
        return k, v, None


class Growing(Past):
    """A `transformers.Cache`, which each step of `generate` lengthens."""

    def __init__(self, cache: Any):
        self.cache = cache

    def length(self, layer: int) -> int:
        """How many positions the cache holds of this block."""
        return int(self.cache.get_seq_length(layer))

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Appends; each row has its own."""
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2), None

    def spread(self, batch: int) -> None:
        """Repeats each row until there are as many as `batch`: beams of it stand side by side."""
        self.cache.batch_repeat_interleave(batch // len(self.cache.layers[0].keys))


class Keeping(Past):
    """Nothing before; what the pass makes is kept for others.

    Attributes:
        kept: keys and values by block, [batch, pos, kv_head, d_head], filled as they are made.
    """

    def __init__(self, kept: dict[int, KeyValue]):
        self.kept = kept

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Keeps them."""
        self.kept[layer] = k, v
        return k, v, None


class Shared(Past):
    """The first positions of a pass that was kept; many rows may continue one of its rows.

    Args:
        kept: keys and values by block.
        n: how many positions of it stand before.
        rows: for each row of the batch the kept row that it continues.
    """

    def __init__(self, kept: dict[int, KeyValue], n: int, rows: Int[Tensor, " batch"]):
        self.kept, self.n = kept, n
        self.rows = consecutive(rows)

    def length(self, layer: int) -> int:
        """The positions before."""
        return self.n

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Each row's own, and what it shares; nothing is copied where one row serves them all."""
        keys, values = self.kept[layer]
        rows = self.rows if isinstance(self.rows, slice) else self.rows.to(keys.device)
        return k, v, (keys[rows, : self.n], values[rows, : self.n])


def consecutive(rows: Int[Tensor, " batch"]) -> slice | Int[Tensor, " groups"]:
    """The rows to read, each by an equal run of consecutive rows of the batch.

    A slice, and thus a view, where they follow one another. Rows that do not fall into equal runs
    are named one by one, and then copied.
    """
    groups, counts = rows.unique_consecutive(return_counts=True)
    if not (counts == counts[0]).all():
        groups = rows
    first = int(groups[0])
    following = torch.arange(first, first + len(groups), device=rows.device)
    return slice(first, first + len(groups)) if torch.equal(groups, following) else groups


def triangle(n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "1 1 query key"]:
    """True where a key is not later than a query; the queries are the last of the positions."""
    full = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    return full.tril(n_keys - n_queries)[None, None]
