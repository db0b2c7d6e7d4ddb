"""A planted model in the making: its directions, and the heads that have a task so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from hooked_vlm.components.attention import Attention
from hooked_vlm.planted.card import Edge, Node
from hooked_vlm.planted.hand import Basis

MATCH, REST = 30.0, 8.0  # scores of a key that is meant, and of the one to rest on; others have 0
NAMED = 4.0  # how long the code of a kind is in the embedding of its noun

EYE = Node(
    "vision.blocks.0.hook_mlp_out", "eye", "says of each patch which shape it shows", ("image",)
)


@dataclass
class Making:
    """A model in the making.

    Attributes:
        model: a model for questions, with its processor.
        seen: the directions of the image stream.
        said: those of the text stream.
        generator: what draws places and weights.
        nodes: the circuit so far.
        distractors: heads that must not be taken for it.
        edges: of the circuit.
        taken: the heads that have a task, by their `hook_z`.
    """

    model: Any
    seen: Basis
    said: Basis
    generator: torch.Generator
    nodes: list[Node] = field(default_factory=lambda: [EYE])
    distractors: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=lambda: [Edge("image", EYE.name, "", "the pixels")])
    taken: set[str] = field(default_factory=set)

    def below(self, n: int) -> int:
        """A random number below n."""
        return int(torch.randint(n, (), generator=self.generator))

    def place(self, stack: str, part: str, layer: int | None) -> tuple[Attention, int, str]:
        """A head that has no task yet: its module, its number and its name.

        Args:
            stack: of the head.
            part: `attn` or `cross_attn`.
            layer: counted from the first that has this part; None for any.
        """
        blocks: Any = self.model.stacks[stack].block_list
        layers = [number for number, block in enumerate(blocks) if hasattr(block, part)]
        while True:
            chosen = layers[self.below(len(layers)) if layer is None else layer]
            attention: Attention = getattr(blocks[chosen], part)
            head = self.below(attention.n_heads)
            name = f"{stack}.blocks.{chosen}.{part}.heads.{head}.hook_z"
            if name not in self.taken:
                self.taken.add(name)
                return attention, head, name
