"""Methods scored against planted circuits: what they name, what they miss, what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm import patching as P
from hooked_vlm.methods import grounding
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.sketch import measured
from hooked_vlm.planted import catalogue, world
from hooked_vlm.planted.card import Card
from hooked_vlm.planted.methods import KINDS, METHODS, Method, Problem, named, scores_of
from hooked_vlm.planted.world import CORRUPTIONS, Corruption

N_PAIRS, SEED = 8, 0
ROUNDING = 1e-3  # shares of the largest score below this are none


@dataclass(frozen=True)
class Score:
    """How a method does on a planted model.

    Attributes:
        model: the planted model's name.
        corrupt: what is corrupt in its pairs.
        method: the method's name.
        kind: `ranker` or `map`.
        precision: the share of the sites it names that are nodes of the circuit; NaN of a map, and
            where it names none.
        recall: the share of the nodes, of those that depend on what is corrupt, that it names; NaN
            of a map.
        rank: the rank of the last of these nodes among them and all sites that are no node, by
            score; the best that it can be is `n_nodes`. NaN where the method has no scores.
        n_nodes: how many such nodes there are.
        accused: how many distractors it names.
        missed: the roles of the nodes that it does not name.
        wrong: what it names that is no node, distractors by their role.
        mass: of a map, the share that lies in the cell of the shape that is asked for, averaged
            over pairs; NaN of a ranker.
        pointing: of a map, the share of pairs in which no other cell has as much.
        cost: forward passes that a pair takes: the multiplications of all that is run for the first
            pair alone, backward passes included, over those of a pass of one input.
        seconds: what it took; the only number that depends on the machine.
    """

    model: str
    corrupt: str
    method: str
    kind: str
    precision: float
    recall: float
    rank: float
    n_nodes: int
    accused: int
    missed: tuple[str, ...]
    wrong: tuple[str, ...]
    mass: float
    pointing: float
    cost: float
    seconds: float

    @property
    def fails(self) -> bool:
        """Whether it names something else than the circuit; a map, whether it points elsewhere."""
        if self.kind == "map":
            return self.pointing < 1
        return not (self.precision == 1 and self.recall == 1)


def validate(
    methods: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    corrupt: Sequence[Corruption] = CORRUPTIONS,
    *,
    n: int = N_PAIRS,
    seed: int = SEED,
    progress: bool = True,
) -> pd.DataFrame:
    """Runs methods on planted models.

    Args:
        methods: names of registered ones, by default all.
        models: names of planted models, by default all.
        corrupt: what is corrupt in the pairs: `image`, `text`, or both in turn.
        n: pairs of each.
        seed: of the pairs.
        progress: whether to show a bar.

    Returns:
        A row for each model, corruption and method, with the fields of `Score`.

    Raises:
        KeyError: a method or a model that there is not.
        ValueError: a method that gives something else than it should.
    """
    for given in (methods, models):
        if isinstance(given, str):
            raise ValueError(f"give names in a list: [{given!r}]")
    chosen = [_known(METHODS, name, "method") for name in methods or METHODS]
    rows = []
    tasks = [(name, what) for name in models or catalogue.names() for what in corrupt]
    for name, _ in tasks:
        catalogue.path(name)
    for name, what in tqdm(tasks, desc="validating", unit="model", disable=not progress):
        model, card = catalogue.load(name)
        rows += [asdict(one) for one in _scores(chosen, model, card, what, n, seed)]
    return pd.DataFrame(rows)


def score(
    run: Callable[[Problem], Any] | str,
    model: str,
    corrupt: Corruption = "image",
    *,
    kind: str = "ranker",
    n: int = N_PAIRS,
    seed: int = SEED,
) -> Score:
    """Scores one method on one planted model.

    Args:
        run: the method, as for `register`, or a registered one's name.
        model: a planted model's name.
        corrupt: what is corrupt in the pairs.
        kind: of a function, `ranker` or `map`; a registered method has its own.
        n: pairs.
        seed: of the pairs.

    Raises:
        KeyError: a method or a model that there is not.
        ValueError: a method that gives something else than it should.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is 'ranker' or 'map', not {kind!r}")
    if isinstance(run, str):
        method = _known(METHODS, run, "method")
    else:
        name = getattr(run, "__name__", type(run).__name__)
        method = Method(name, kind, run, "")
    opened, card = catalogue.load(model)
    return _scores([method], opened, card, corrupt, n, seed)[0]


def _known(known: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in known:
        raise KeyError(f"no {what} {name!r}; known are {', '.join(known)}")
    return known[name]


def _scores(
    methods: Sequence[Method],
    model: HookedVLM,
    card: Card,
    corrupt: Corruption,
    n: int,
    seed: int,
) -> list[Score]:
    if n < 1:
        raise ValueError(f"n is at least 1 pair, not {n}")
    pairs, others = (
        world.pairs(n, one, corrupt, task=model.task) for one in (2 * seed, 2 * seed + 1)
    )
    problem = Problem(model, pairs, others, list(model.sites(list(card.sites))))
    cells = [world.cell_of(scene.first) for scene in world.scenes(n, 2 * seed)]
    with measured() as work, torch.no_grad():
        model(**model.prepare(pairs[0].images[:1], (pairs[0].texts or [])[:1]))
    forward, first = work.macs, replace(problem, pairs=pairs[:1], others=others[:1])
    found = []
    for method in methods:
        start = time.perf_counter()
        given = method.run(problem)
        seconds = time.perf_counter() - start
        with measured() as work:  # counting takes several times as long as computing
            method.run(first)
        where = f"{method.name!r} on {card.name!r}"
        told: dict[str, Any] = {
            "model": card.name,
            "corrupt": corrupt,
            "method": method.name,
            "kind": method.kind,
            "cost": round(work.macs / forward, 2),
            "seconds": round(seconds, 2),
        }
        if method.kind == "map":
            told |= _mapped(_map(given, n, where), cells)
        else:
            told |= _ranked(*_ranking(given, problem, where), card, corrupt)
        found.append(Score(**told))
    return found


def _ranking(given: Any, problem: Problem, where: str) -> tuple[list[str], dict[str, float] | None]:
    """What a ranker names, and its scores by site, if it has any.

    Raises:
        ValueError: neither scores of all sites nor a circuit; NaN.
    """
    if isinstance(given, P.Circuit):
        return [site.name for site in given.sites], None
    if isinstance(given, P.PatchingResult):
        if "position" in given.data.dims:
            raise ValueError(f"{where} gives a score for each position; give one for each site")
        given = scores_of(given)
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where} gives a {type(given).__name__}; a ranker gives scores by hook name, a "
            "PatchingResult or a Circuit"
        )
    names = {site.name for site in problem.sites}
    for what, some in (("lacks", names - set(given)), ("knows", set(given) - names)):
        if some:
            raise ValueError(
                f"{where} {what} {len(some)} of the sites, {min(some)!r} first; give a score for "
                "each of problem.sites"
            )
    try:
        scores = {name: abs(float(given[name])) for name in given}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} gives scores that are no single numbers: {error}") from error
    if bad := [name for name, value in scores.items() if not np.isfinite(value)]:
        raise ValueError(f"{where} gives no number at {len(bad)} sites, {bad[0]!r} first")
    return named(scores), scores


def _ranked(
    chosen: list[str], scores: dict[str, float] | None, card: Card, corrupt: Corruption
) -> dict[str, Any]:
    truth, roles = card.truth(corrupt), {node.name: node.role for node in card.nodes}
    others = {node.name: node.role for node in card.distractors}
    right = [name for name in chosen if name in roles]
    rank = float("nan")
    if scores is not None:  # sites of one score share the worse rank
        least = ROUNDING * max(scores.values())
        scores = {name: value if value > least else 0.0 for name, value in scores.items()}
        values = np.array([scores[name] for name in scores if name in truth or name not in roles])
        rank = float(max((values >= scores[name]).sum() for name in truth))
    return {
        "precision": len(right) / len(chosen) if chosen else float("nan"),
        "recall": len(truth.intersection(chosen)) / len(truth),
        "rank": rank,
        "n_nodes": len(truth),
        "accused": len(set(chosen) & set(others)),
        "missed": tuple(role for name, role in roles.items() if name in truth - set(chosen)),
        "wrong": tuple(others.get(name, name) for name in chosen if name not in roles),
        "mass": float("nan"),
        "pointing": float("nan"),
    }


def _map(given: Any, n: int, where: str) -> np.ndarray:
    """A map as it should be.

    Raises:
        ValueError: other dimensions, a side that the grid does not divide, negative numbers, NaN,
            or nothing at all.
    """
    try:
        array = np.asarray(given, dtype=float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where} gives no array of numbers: {error}") from error
    if array.ndim != 3 or len(array) != n or any(side % world.GRID for side in array.shape[1:]):
        raise ValueError(
            f"{where} gives {list(array.shape)}; a map is [pair, row, column], here of {n} pairs, "
            f"with rows and columns that are multiples of {world.GRID}"
        )
    if not np.isfinite(array).all() or (array < 0).any() or (array.sum((1, 2)) == 0).any():
        raise ValueError(f"{where} gives a map with NaN, a negative number, or nothing but zeros")
    return array


def _mapped(array: np.ndarray, cells: list[int]) -> dict[str, Any]:
    n, side = len(array), world.GRID
    by_cell = array.reshape(n, side, array.shape[1] // side, side, array.shape[2] // side)
    grid = by_cell.sum((2, 4))
    mask = np.zeros((n, side * side), dtype=bool)
    mask[np.arange(n), cells] = True
    mask = mask.reshape(grid.shape)
    nan = float("nan")
    return {
        "precision": nan,
        "recall": nan,
        "rank": nan,
        "n_nodes": 0,
        "accused": 0,
        "missed": (),
        "wrong": (),
        "mass": float(grounding.mass(grid, mask).mean()),
        "pointing": float(grounding.pointing(grid, mask, ROUNDING).mean()),
    }
