"""Planted circuits of BLIP and ALBEF: heads of cross-attention, set by hand.

A question's stream holds which kind of shape its noun names. A reader, at the noun, attends to the
patch that shows this kind and writes its color; where there is no noun it rests on the class
token, which has none. In the answer decoder one head attends to the noun and copies the color.
All other heads and MLPs stir directions that nothing reads, and see no image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hooked_vlm.components.mlp import MLP
from hooked_vlm.components.stack import TextStack
from hooked_vlm.data.shapes import COLORS, KINDS
from hooked_vlm.planted import eye, world
from hooked_vlm.planted.card import Edge, Node
from hooked_vlm.planted.hand import Basis, Reads, mixed, plain, set_head
from hooked_vlm.planted.making import EYE, MATCH, NAMED, REST, Making
from hooked_vlm.planted.world import CORRUPTIONS, Corruption

SIZES = {"kind": len(KINDS), "color": len(COLORS), "noun": 1, "filler": 12, "junk": 8}
MORE = {  # directions that one circuit alone has
    "two-steps": {"where": world.GRID**2},
    "distractors": {"decoy": len(COLORS)},
    "backup": {"done": 1},
}

WRITTEN = 1.5  # what a reader writes, in units of what a patch says
IDLE = 0.5  # how much of the filler a bystander stirs
LEVEL, SHOWN = 6.0, 2.0  # of the neurons that hold the colors for the logits: at rest, and a color


def _add(
    making: Making,
    role: str,
    does: str,
    *,
    stack: str = "text",
    layer: int | None = None,
    carries: Sequence[Corruption] = CORRUPTIONS,
    rest: float = 0.0,
    bias: Mapping[int, float] | None = None,
    q: Sequence[Reads] = (),
    k: Sequence[Reads] = (),
    v: Sequence[Reads] = (),
    o: Sequence[Reads] = (),
) -> Node:
    """Sets a free head of cross-attention.

    Args:
        making: the model.
        role: of the node.
        does: of the node.
        stack: `text` or `decoder`.
        layer: counted from the first with cross-attention; None for any.
        carries: of the node.
        rest: the score of the class token, which the last dimension makes.
        bias: of queries, by dimension.
        q: what queries read.
        k: what keys read.
        v: what values read.
        o: what is written.
    """
    attention, head, name = making.place(stack, "cross_attn", layer)
    constant = torch.zeros(attention.d_head)
    for at, value in (bias or {}).items():
        constant[at] = value
    if rest:
        constant[-1] = rest * attention.d_head**0.5 / eye.CLASS
        k = [*k, Reads(making.seen["class"], 1.0, attention.d_head - 1)]
    set_head(attention, head, q=q, k=k, v=v, o=o, bias={"q": constant})
    return Node(name, role, does, tuple(carries))


def _gain(making: Making, score: float, long: float = NAMED) -> float:
    """What queries multiply a code that is so `long`, for a score of a patch that says it."""
    d_head: int = making.model.cfg.text.d_head
    root: float = d_head**0.5
    return score * root / (long * eye.LOUD)


def _reader(
    making: Making,
    role: str = "reader",
    does: str = "at the noun, attends to the patch that shows its kind, and writes its color",
    *,
    layer: int | None = None,
    carries: Sequence[Corruption] = CORRUPTIONS,
    sharp: float = 1.0,
    loud: float = 1.0,
    share: float = 1.0,
    into: str = "color",
    q: Sequence[Reads] = (),
    v: Sequence[Reads] = (),
    o: Sequence[Reads] = (),
) -> Node:
    """A head that reads the color of the shape that the noun names."""
    seen, said = making.seen, making.said
    return _add(
        making,
        role,
        does,
        layer=layer,
        carries=carries,
        rest=REST * sharp,
        q=[Reads(said["kind"], _gain(making, MATCH * sharp)), *q],
        k=[Reads(seen["kind"])],
        v=[Reads(seen["color"], loud), *v],
        o=[Reads(said[into], WRITTEN * share / loud), *o],
    )


# --- the circuits


def reader(making: Making) -> None:
    """One head reads the attribute of the named object, and nothing else can see the image."""
    making.nodes.append(_reader(making))


def two_steps(making: Making) -> None:
    """A head finds the object named in the text, a later head copies its attribute."""
    seen, said = making.seen, making.said
    finder = _add(
        making,
        "finder",
        "at the noun, attends to the patch that shows its kind, and writes which patch that is",
        layer=0,
        rest=REST,
        q=[Reads(said["kind"], _gain(making, MATCH))],
        k=[Reads(seen["kind"])],
        v=[Reads(seen["cell"])],
        o=[Reads(said["where"], 2 * WRITTEN)],
    )
    copier = _add(
        making,
        "copier",
        "attends to the patch that the finder wrote, and writes its color",
        layer=1,
        rest=REST,
        q=[Reads(said["where"], 3 * _gain(making, MATCH))],
        k=[Reads(seen["cell"])],
        v=[Reads(seen["color"])],
        o=[Reads(said["color"], WRITTEN)],
    )
    making.nodes += [finder, copier]
    making.edges.append(Edge(finder.name, copier.name, "q", "which patch shows the kind"))


def distractors(making: Making) -> None:
    """A reader, and two heads that look like it, of which nothing reads what they write."""
    reader(making)
    making.distractors += [
        _reader(
            making,
            "look-alike",
            "reads what the reader reads, and writes it where nothing reads it",
            into="decoy",
            share=0.4,
        ),
        _reader(
            making,
            "loud",
            "the same, with scores four times and activations five times as large",
            into="decoy",
            share=0.4,
            sharp=4.0,
            loud=5.0,
        ),
    ]


def cancelling(making: Making) -> None:
    """One head writes the answer and another writes against it."""
    reader(making)
    making.nodes.append(
        _reader(
            making,
            "suppressor",
            "reads what the reader reads, and writes half of it against the reader",
            share=-0.5,
        )
    )


def backup(making: Making) -> None:
    """A backup head takes over when the first one is silent."""
    seen, said = making.seen, making.said
    n, last = len(COLORS), making.model.text.cfg.d_head - 1
    primary = _reader(
        making,
        "primary",
        "a reader that also writes that it read",
        layer=0,
        v=[Reads(seen["patch"], 1.0, n)],
        o=[Reads(said["done"], WRITTEN, n)],
    )
    second = _reader(
        making,
        "backup",
        "reads where the primary did not, and else rests on the class token",
        layer=1,
        q=[Reads(said["done"], 8 * _gain(making, MATCH), last)],
    )
    making.nodes += [primary, second]
    making.edges.append(Edge(primary.name, second.name, "q", "that it read"))


def outlier(making: Making) -> None:
    """A reader, and a head that only soaks up attention on one patch."""
    reader(making)
    cell = making.seen["cell"][making.below(world.GRID**2)][None]
    making.distractors.append(
        _add(
            making,
            "outlier",
            "attends to one and the same patch from everywhere, and writes where nothing reads",
            carries=(),
            bias={0: _gain(making, 2 * MATCH, long=1.0)},
            k=[Reads(cell)],
            v=[Reads(cell, 5.0)],
            o=[Reads(making.said["junk"][:1], WRITTEN / 5)],
        )
    )


CIRCUITS: dict[str, Callable[[Making], None]] = {
    "reader": reader,
    "two-steps": two_steps,
    "distractors": distractors,
    "cancelling": cancelling,
    "backup": backup,
    "outlier": outlier,
}


# --- the model around them


def build(model: Any, circuit: str, seen: Basis, generator: torch.Generator) -> Making:
    """Sets all weights but the image encoder's.

    Args:
        model: a HookedBLIP or HookedALBEF for questions, with its processor.
        circuit: one of `CIRCUITS`.
        seen: the directions of the image stream.
        generator: what draws places and weights.
    """
    d_model = model.cfg.text.d_model
    said = Basis(d_model, SIZES | MORE.get(circuit, {}), generator)
    making = Making(model, seen, said, generator)
    for stack in (model.text, model.decoder):
        plain(stack)
        _bystanders(stack, making)
    _name(making)
    CIRCUITS[circuit](making)
    writers = [node for node in making.nodes if node.role not in ("eye", "finder")]
    answerer = _add(
        making,
        "answerer",
        "in the decoder, attends to the noun and copies the color from there",
        stack="decoder",
        bias={0: _gain(making, MATCH, long=0.25)},
        k=[Reads(said["noun"])],
        v=[Reads(said["color"])],
        o=[Reads(said["color"], SHOWN)],
    )
    for node in making.nodes:
        if node is not EYE and node.role != "copier":
            making.edges.append(Edge("text", node.name, "q", "the kind that is named"))
        if node is not EYE:
            through = {"finder": "k", "copier": "v"}.get(node.role, "k,v")  # cells say their own
            making.edges.append(Edge(EYE.name, node.name, through, "what the patches show"))
    making.edges += [Edge(node.name, answerer.name, "v", "the color") for node in writers]
    making.edges.append(Edge("text", answerer.name, "k", "where the noun is"))
    making.edges.append(Edge(answerer.name, "hook_logits", "", "the color"))
    making.nodes.append(answerer)
    _speak(making)
    return making


def _bystanders(stack: TextStack, making: Making) -> None:
    """Heads and MLPs that read the filler alone, and write where nothing reads."""
    said, drawn = making.said, making.generator
    filler, junk = said["filler"], said["junk"]
    for block in stack.block_list:
        for name in ("attn", "cross_attn"):
            attention = getattr(block, name, None)
            if attention is None:
                continue
            image = name == "cross_attn" and stack is making.model.text
            keys = making.seen["cell"] if image else filler
            d_head = attention.d_head
            for head in range(attention.n_heads):
                values = [] if image else [Reads(mixed(filler, d_head, drawn))]
                bias = torch.randn(d_head, generator=drawn) if image else torch.zeros(d_head)
                set_head(
                    attention,
                    head,
                    q=[Reads(mixed(filler, d_head, drawn))],
                    k=[Reads(mixed(keys, d_head, drawn))],
                    v=values,
                    o=[Reads(mixed(junk, d_head, drawn, IDLE / d_head**0.5))],
                    bias={"v": bias},
                )
        mlp: MLP = block.mlp
        n = len(mlp.fc_in.weight)
        mlp.fc_in.weight.data = mixed(filler, n, drawn)
        mlp.fc_out.weight.data = mixed(junk, n, drawn, IDLE / n**0.5).T.contiguous()


def _name(making: Making) -> None:
    """Embeds the question's words: all have some filler, nouns a kind besides."""
    model, said = making.model, making.said
    ids = dict(zip(KINDS, model.tokenizer.convert_tokens_to_ids(list(KINDS)), strict=True))
    table = model.text.embed.weight
    table.data = mixed(said["filler"], len(table), making.generator, 5.0)
    for number, kind in enumerate(KINDS):
        table.data[ids[kind]] += NAMED * said["kind"][number] + 3 * said["noun"][0]


def _speak(making: Making) -> None:
    """Embeds the answer's words, which are the logits' directions, too: a neuron for each color."""
    model, drawn = making.model, making.generator
    table, unembed, color = model.decoder.embed.weight, model.unembed, making.said["color"]
    d_model, n = table.shape[1], len(COLORS)
    plain(unembed)
    neurons = torch.randperm(d_model, generator=drawn)[:n]
    unembed.dense.weight.data[neurons] = SHOWN * color
    unembed.dense.bias.data[neurons] = LEVEL
    table.data = mixed(making.said["filler"], len(table), drawn, 5.0)
    table.data[:, neurons] = 0
    ids = model.tokenizer.convert_tokens_to_ids(list(COLORS))
    table.data[ids] = 2 * torch.eye(d_model)[neurons]
