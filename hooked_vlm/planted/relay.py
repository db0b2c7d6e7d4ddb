"""Planted circuits of LLaVA: heads of one stack that reads text and image, set by hand.

A token of an image says what its patch shows, a noun which kind it names, and every token that it
is one, by which heads attend to a token whatever their own says. A head rests on the first token
where nothing matches. All other heads and MLPs stir directions that nothing reads, and see no
image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hooked_vlm.data.shapes import COLORS, KINDS
from hooked_vlm.planted.card import Edge, Node
from hooked_vlm.planted.hand import Basis, Reads, mixed, plain, set_head
from hooked_vlm.planted.making import EYE, MATCH, NAMED, REST, Making
from hooked_vlm.planted.world import CORRUPTIONS, Corruption

SIZES = {
    "shown kind": len(KINDS),
    "shown color": len(COLORS),
    "kind": len(KINDS),
    "color": len(COLORS),
    "noun": 1,
    "start": 1,
    "one": 1,
    "filler": 10,
    "junk": 8,
}
MORE = {"reader": {"asked": len(KINDS)}}  # directions that one circuit alone has

ROPE_THETA = 1e9  # so large that the slower half of a head's dimensions does not turn
FLAG = 3.0  # how long what a token says of itself is
WRITTEN = 1.5  # what a head writes, in units of what it reads
IDLE = 0.5  # how much of the filler a bystander stirs
CLEAR = 3.0  # what the projector multiplies codes by, so that its GELU leaves them as they are


def _add(
    making: Making,
    role: str,
    does: str,
    layer: int,
    carries: Sequence[Corruption] = CORRUPTIONS,
    *,
    q: str,
    k: str,
    v: str,
    o: str,
) -> Node:
    """Sets a free head: what queries, keys and values read, and what is written."""
    said = making.said
    attention, head, name = making.place("text", "attn", layer)
    half, n = attention.d_head // 2, len(said[k])
    slow = [*range(half // 2, half), *range(half + half // 2, 2 * half)]
    root = attention.d_head**0.5
    long = FLAG if q == "one" else NAMED
    matched = root * MATCH / (long * (FLAG if q == "one" else NAMED))
    set_head(
        attention,
        head,
        q=[Reads(said[q], matched), Reads(said["one"], root * REST / (FLAG * 2 * FLAG), n)],
        k=[Reads(said[k]), Reads(said["start"], 1.0, n)],
        v=[Reads(said[v])],
        o=[Reads(said[o], WRITTEN)],
        dims=slow,
    )
    return Node(name, role, does, tuple(carries))


# --- the circuits


def reader(making: Making) -> None:
    """The named kind moves to the last position, where one head reads the attribute."""
    mover = _add(
        making,
        "mover",
        "attends to the noun, and copies which kind it names",
        0,
        ("text",),
        q="one",
        k="noun",
        v="kind",
        o="asked",
    )
    one = _add(
        making,
        "reader",
        "at the last position, attends to the patch that shows this kind, and writes its color",
        1,
        q="asked",
        k="shown kind",
        v="shown color",
        o="color",
    )
    making.nodes += [mover, one]
    making.edges += [
        Edge("text", mover.name, "k,v", "where the noun is, and the kind it names"),
        Edge(mover.name, one.name, "q", "the kind that is named"),
        Edge(EYE.name, one.name, "k,v", "what the patches show"),
        Edge(one.name, "hook_logits", "", "the color"),
    ]


def relay(making: Making) -> None:
    """The attribute moves to the noun in an early layer, and from there to the end in a later."""
    one = _add(
        making,
        "reader",
        "at the noun, attends to the patch that shows its kind, and writes its color",
        0,
        q="kind",
        k="shown kind",
        v="shown color",
        o="color",
    )
    answerer = _add(
        making,
        "answerer",
        "at the last position, attends to the noun, and copies the color from there",
        1,
        q="one",
        k="noun",
        v="color",
        o="color",
    )
    making.nodes += [one, answerer]
    making.edges += [
        Edge("text", one.name, "q", "the kind that is named"),
        Edge(EYE.name, one.name, "k,v", "what the patches show"),
        Edge("text", answerer.name, "k", "where the noun is"),
        Edge(one.name, answerer.name, "v", "the color"),
        Edge(answerer.name, "hook_logits", "", "the color"),
    ]


CIRCUITS: dict[str, Callable[[Making], None]] = {"reader": reader, "relay": relay}


# --- the model around them


def build(model: Any, circuit: str, seen: Basis, generator: Any) -> Making:
    """Sets all weights but the image encoder's.

    Args:
        model: a HookedLlava, with its processor.
        circuit: one of `CIRCUITS`.
        seen: the directions of the image stream.
        generator: what draws places and weights.
    """
    said = Basis(model.cfg.text.d_model, SIZES | MORE.get(circuit, {}), generator)
    making = Making(model, seen, said, generator)
    plain(model.text)
    _bystanders(making)
    _project(making)
    _name(making)
    CIRCUITS[circuit](making)
    return making


def _bystanders(making: Making) -> None:
    """Heads and MLPs that read the filler alone, and write where nothing reads."""
    filler, junk, drawn = making.said["filler"], making.said["junk"], making.generator
    for block in making.model.text.block_list:
        d_head, mlp = block.attn.d_head, block.mlp
        for head in range(block.attn.n_heads):
            q, k, v = ([Reads(mixed(filler, d_head, drawn))] for _ in range(3))
            o = [Reads(mixed(junk, d_head, drawn, IDLE / d_head**0.5))]
            set_head(block.attn, head, q=q, k=k, v=v, o=o)
        n = len(mlp.fc_in.weight)
        mlp.fc_gate.weight.data = mixed(filler, n, drawn)
        mlp.fc_in.weight.data = mixed(filler, n, drawn)
        mlp.fc_out.weight.data = mixed(junk, n, drawn, IDLE / n**0.5).T.contiguous()


def _project(making: Making) -> None:
    """The projector hands on what a patch shows, and adds that the token is one."""
    seen, said, projector = making.seen, making.said, making.model.projector
    plain(projector)
    at = 0
    for name in ("kind", "color"):
        n = len(seen[name])
        projector.fc_in.weight.data[at : at + n] = CLEAR * seen[name]
        projector.fc_out.weight.data[:, at : at + n] = said[f"shown {name}"].T / CLEAR
        at += n
    projector.fc_out.bias.data = FLAG * said["one"][0]


def _name(making: Making) -> None:
    """Embeds words, and makes logits of the colors."""
    model, said, drawn = making.model, making.said, making.generator
    table, unembed = model.text.embed.weight, model.unembed.weight
    table.data = mixed(said["filler"], len(table), drawn, 4.0) + FLAG * said["one"]
    for number, kind in enumerate(KINDS):
        noun = NAMED * said["kind"][number] + FLAG * said["noun"][0]
        table.data[model.to_single_token(kind)] += noun
    table.data[model.cfg.bos_token_id] = 2 * FLAG * said["start"][0] + FLAG * said["one"][0]
    unembed.data = mixed(said["filler"], len(unembed), drawn, 0.2)
    for number, color in enumerate(COLORS):
        unembed.data[model.to_single_token(color)] = 2 * said["color"][number]
