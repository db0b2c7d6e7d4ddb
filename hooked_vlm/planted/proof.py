"""The proof of a planted circuit: what happens to its answers when parts are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hooked_vlm import patching as P
from hooked_vlm.planted.card import Card, Trial
from hooked_vlm.planted.world import pairs

RIGHT = 0.97  # at least so many answers are right
SUFFICES = 0.01  # by how much resampling all that is no node may lower that
# At most so many are right by chance: one in six, of a node that says which of four kinds is named
# three in ten, for it may be the same one again; and the error of a sample.
GUESSED = 0.5


def trials(card: Card) -> tuple[Trial, ...]:
    """What a card claims, not measured yet."""

    def one(what: str, sites: Sequence[str], right: bool, by: str = "resample") -> Trial:
        least, most = (RIGHT, 1.0) if right else (0.0, GUESSED)
        return Trial(what, tuple(sites), by, float("nan"), least, most)

    found = [one("nothing is replaced", (), True), one("all outside", ("outside",), True)]
    for node in card.nodes:
        spared = node.role in ("suppressor", "backup")
        found.append(one(node.role, [node.name], spared))
    for node in card.distractors:
        found += [one(node.role, [node.name], True, by) for by in ("resample", "zero")]
    by_role = {node.role: node.name for node in card.nodes}
    if {"primary", "backup"} <= set(by_role):
        first, second = by_role["primary"], by_role["backup"]
        found.append(one("primary", [first], True, "zero"))
        found.append(one("primary and backup", [first, second], False, "zero"))
    return tuple(found)


def measure(model: Any, card: Card, n: int, seed: int, *, progress: bool = False) -> Card:
    """The card with a measured proof.

    Args:
        model: of the card.
        card: what it claims.
        n: of how many questions.
        seed: of these, and of those that are resampled from.
        progress: whether to show bars.
    """
    asked, others = (pairs(n, one, task=model.task) for one in (seed, seed + 1))
    nodes = {node.name for node in card.nodes}
    claims = trials(card)
    outside = [one.name for one in model.sites(list(card.sites)) if one.name not in nodes]
    values: dict[int, float] = {}
    for by, intervention in (("resample", P.resample(others, seed)), ("zero", P.zero())):
        some = [number for number, one in enumerate(claims) if one.by == by and one.sites]
        if not some:
            continue
        cells = [
            P.together(outside if one.sites == ("outside",) else list(one.sites), name=str(number))
            for number, one in enumerate(claims)
            if number in some
        ]
        result = P.ablate(
            model, asked, cells, intervention, P.accuracy(), max_rows=64, progress=progress
        )
        means = result.data.mean("pair").values.reshape(-1).tolist()
        values |= {int(one.name): mean for one, mean in zip(result.sites, means, strict=True)}
        values[0] = float(result.clean.mean())
    proof = tuple(
        replace(one, accuracy=round(values[number], 4)) for number, one in enumerate(claims)
    )
    whole = replace(proof[1], least=round(max(RIGHT, proof[0].accuracy) - SUFFICES, 4))
    proof = (proof[0], whole, *proof[2:])
    return replace(card, proof=proof, n=n, evaluation_seed=seed)


def check(card: Card) -> None:
    """Refuses a card whose proof does not hold.

    Raises:
        ValueError: the first trial outside of its limits.
    """
    for one in card.proof:
        if not one.holds:
            raise ValueError(
                f"the proof of {card.name!r} fails: {one.what} ({one.by}): {one.accuracy:.1%} of "
                f"{card.n} answers are right, which should be {one.least:.0%} to {one.most:.0%}"
            )
