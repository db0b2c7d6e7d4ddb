"""The card of a planted model: its circuit, what is no part of it, and the measured proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from hooked_vlm.planted.world import CORRUPTIONS, Corruption

FILE, WEIGHTS = "card.json", "model.safetensors"


@dataclass(frozen=True)
class Node:
    """A head or an MLP.

    Attributes:
        name: its hook name.
        role: one word, such as `reader`.
        does: what it does, in words.
        carries: whether it depends on the image, the text, or both. Patching between two runs that
            differ in what it does not depend on cannot find it.
    """

    name: str
    role: str
    does: str
    carries: tuple[str, ...] = CORRUPTIONS


@dataclass(frozen=True)
class Edge:
    """What one node tells another.

    Attributes:
        sender: a node's name, or `image` or `text` for what is embedded.
        receiver: a node's name, or `hook_logits`.
        through: what of the receiver reads it: `q`, `k`, `v`, joined by commas, or empty.
        says: what it is, in words.
    """

    sender: str
    receiver: str
    through: str
    says: str


@dataclass(frozen=True)
class Trial:
    """One line of the proof.

    Attributes:
        what: in words.
        sites: what is ablated, together; empty for nothing.
        by: `resample` or `zero`.
        value: what was measured when the model was built.
        least: the least that it may be.
        most: the most that it may be.
        metric: `accuracy`, the share of right answers; or `logit_diff`, the mean difference between
            answer and foil, over that where nothing is replaced.
    """

    what: str
    sites: tuple[str, ...]
    by: str
    value: float
    least: float
    most: float
    metric: Literal["accuracy", "logit_diff"] = "accuracy"

    @property
    def holds(self) -> bool:
        """Whether the value is within its limits."""
        return self.least <= self.value <= self.most


@dataclass(frozen=True)
class Card:
    """What is known of a planted model.

    Attributes:
        name: of the model.
        circuit: in a few words.
        task: what it is asked, in words.
        sites: hook names or globs of all that may be named: every head and MLP.
        nodes: the circuit.
        edges: between nodes, from what is embedded, and to the logits.
        distractors: heads that see what matters, or look as if they did, and do not matter.
        proof: the measured trials; the first are of all that is no node, and of nothing.
        n: how many questions each was measured on.
        seed: what the weights were drawn with.
        evaluation_seed: what the questions of the proof were drawn with.
        weights: SHA-256 of the file of the weights.
    """

    name: str
    circuit: str
    task: str
    sites: tuple[str, ...]
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    distractors: tuple[Node, ...]
    seed: int
    proof: tuple[Trial, ...] = ()
    n: int = 0
    evaluation_seed: int = 0
    weights: str = field(default="", compare=False)

    def truth(self, corrupt: Corruption) -> frozenset[str]:
        """The names of the nodes that depend on what a corruption changes."""
        return frozenset(node.name for node in self.nodes if corrupt in node.carries)

    def write(self, folder: Path) -> None:
        """Writes `card.json` beside the weights."""
        digest = sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        told = json.dumps(asdict(replace(self, weights=digest)), indent=2, ensure_ascii=False)
        (folder / FILE).write_text(told + "\n", encoding="utf-8")


def read(folder: Path) -> Card:
    """Reads the card of a planted model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no card, or of other weights.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {FILE}: it is no planted model")
    try:
        card = _card(json.loads(file.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is no card of a planted model: {error}") from error
    digest = sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    if digest != card.weights:
        raise ValueError(
            f"{str(file)!r} is the card of other weights than {WEIGHTS} beside it: SHA-256 "
            f"{card.weights[:12]}…, not {digest[:12]}…; build the model again"
        )
    return card


def _card(told: dict[str, Any]) -> Card:
    def several(key: str, kind: type) -> tuple[Any, ...]:
        return tuple(kind(**{k: _tuple(v) for k, v in one.items()}) for one in told[key])

    parts = {"nodes": Node, "edges": Edge, "distractors": Node, "proof": Trial}
    rest: dict[str, Any] = {key: _tuple(value) for key, value in told.items() if key not in parts}
    for key, kind in parts.items():
        rest[key] = several(key, kind)
    return Card(**rest)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_names(card: Card, sites: Sequence[str]) -> None:
    """Refuses a card that names what its model does not have.

    Args:
        card: the card.
        sites: the names of its `sites` in the model.

    Raises:
        ValueError: a node, a distractor or an end of an edge that is none of its sites; a node that
            carries something else than the image or the text.
    """
    for node in card.nodes:
        if not node.carries or set(node.carries) - set(CORRUPTIONS):
            raise ValueError(
                f"the card of {card.name!r} says that {node.name!r} carries {list(node.carries)}; "
                f"known are {', '.join(CORRUPTIONS)}"
            )
    ends = {end for edge in card.edges for end in (edge.sender, edge.receiver)}
    named = {node.name for node in (*card.nodes, *card.distractors)}
    unknown = sorted((named | ends - {"image", "text", "hook_logits"}) - set(sites))
    if unknown:
        raise ValueError(
            f"the card of {card.name!r} names {unknown[0]!r}, none of its sites in the model"
        )
