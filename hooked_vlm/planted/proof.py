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
SURER = (1.05, 3.0)  # the logit difference without a suppressor, over that with it


def trials(card: Card) -> tuple[Trial, ...]:
    """What a card claims, not measured yet."""

    def one(what: str, sites: Sequence[str], right: bool, by: str = "resample") -> Trial:
        least, most = (RIGHT, 1.0) if right else (0.0, GUESSED)
        return Trial(what, tuple(sites), by, float("nan"), least, most)

    found = [one("nothing is replaced", (), True), one("all outside", ("outside",), True)]
    for node in card.nodes:
        spared = node.role in ("suppressor", "backup")
        found.append(one(node.role, [node.name], spared))
        if node.role == "suppressor":
            least, most = SURER
            found.append(replace(found[-1], least=least, most=most, metric="logit_diff"))
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
    interventions = {"resample": P.resample(others, seed), "zero": P.zero()}
    metrics = {"accuracy": P.accuracy(), "logit_diff": P.logit_diff()}
    for by, metric in sorted({(one.by, one.metric) for one in claims}):
        cells = [
            P.together(outside if one.sites == ("outside",) else list(one.sites), name=str(number))
            for number, one in enumerate(claims)
            if one.sites and (one.by, one.metric) == (by, metric)
        ]
        result = P.ablate(
            model, asked, cells, interventions[by], metrics[metric], max_rows=64, progress=progress
        )
        clean = float(result.clean.mean())
        over = 1.0 if metric == "accuracy" else clean
        means = (result.data.mean("pair").values.reshape(-1) / over).tolist()
        values |= {int(one.name): mean for one, mean in zip(result.sites, means, strict=True)}
        if metric == "accuracy":
            values[0] = clean
    proof = tuple(replace(one, value=round(values[number], 4)) for number, one in enumerate(claims))
    whole = replace(proof[1], least=round(max(RIGHT, proof[0].value) - SUFFICES, 4))
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
                f"the proof of {card.name!r} fails: {one.what} ({one.by}): {one.metric} of "
                f"{card.n} answers is {one.value:.3g}, which should be "
                f"{one.least:.3g} to {one.most:.3g}"
            )
