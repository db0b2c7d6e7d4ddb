"""What the recipes share: heads that serve training only, and the loop that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hooked_vlm.components.embed import TokenEmbed
from hooked_vlm.data import shapes

WIDTH = 64
"""Of every toy's transformer blocks."""


class TrainingHeads(nn.Module):
    """Heads on the two stacks that serve training only."""

    def __init__(self, embedding: nn.Embedding | TokenEmbed):
        super().__init__()
        self.embedding = [embedding]  # in a list: it belongs to the model
        self.to_word = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.to_look = nn.Linear(WIDTH, len(shapes.COLORS) + len(shapes.KINDS) + 2)
        self.to_center = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))

    def word_loss(self, hidden: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
        """Cross-entropy of the hidden tokens."""
        logits = self.to_word(hidden[masked]) @ self.embedding[0].weight.T
        return F.cross_entropy(logits, ids[masked])

    def patch_loss(self, patches: Tensor, owners: Tensor, looks: Tensor, centers: Tensor) -> Tensor:
        """What each patch shows: colour, kind and centre of its shape.

        Args:
            patches: ``[batch, patch, d]``.
            owners: ``[batch, patch]``, 0 or 1 for a shape, 2 for none.
            looks: ``[batch, 2, 2]``, colour and kind of the shapes.
            centers: ``[batch, 2, 2]``.
        """
        batch, patch = (owners < 2).nonzero(as_tuple=True)
        shape = owners[batch, patch]
        color, kind, center = self.to_look(patches[batch, patch]).split(
            [len(shapes.COLORS), len(shapes.KINDS), 2], dim=-1
        )
        look = looks[batch, shape]
        return (
            F.cross_entropy(color, look[:, 0])
            + F.cross_entropy(kind, look[:, 1])
            + 10 * F.mse_loss(center, centers[batch, shape])
        )

    def center_loss(self, hidden: Tensor, kinds: Tensor, centers: Tensor) -> Tensor:
        """Squared error of the centres of the two named shapes, read at their kinds' tokens.

        Args:
            hidden: ``[batch, pos, d]``.
            kinds: Boolean ``[batch, pos]``, two positions in each row.
            centers: ``[batch, 2, 2]``, in the order of the text.
        """
        predicted = self.to_center(hidden[kinds]).view(-1, 2, 2)
        return F.mse_loss(predicted, centers)


def fit(
    parameters: Iterable[nn.Parameter],
    losses: Callable[[], dict[str, Tensor]],
    steps: int,
    lr: float = 3e-3,
) -> None:
    """Minimises the sum of the losses, printing their running means."""
    unique = list(dict.fromkeys(parameters))
    optimizer = torch.optim.AdamW(unique, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.06)
    means: dict[str, float] = {}
    start = time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        parts = losses()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(unique, 1.0)
        optimizer.step()
        schedule.step()
        for name, part in parts.items():
            means[name] = 0.98 * means.get(name, part.item()) + 0.02 * part.item()
        if step % 100 == 0 or step == steps:
            rates = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"step {step} {time.perf_counter() - start:.0f} s {rates}", flush=True)
