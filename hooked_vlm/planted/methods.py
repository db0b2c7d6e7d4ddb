"""The methods that are scored on planted models, and how a further one joins them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hooked_vlm import patching as P
from hooked_vlm.data import Pair
from hooked_vlm.methods import causal_tracing, notice
from hooked_vlm.methods.looking import Look, look
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.names import Site

KINDS = ("ranker", "map")
NAMES = 0.1  # a site is named whose score is at least this share of the largest
STEPS = 8  # of integrated gradients


@dataclass(frozen=True)
class Problem:
    """What a method is given.

    Attributes:
        model: the planted model.
        pairs: clean and corrupt inputs with answer and foil.
        others: further pairs, to take means or resample from.
        sites: every head and MLP, in the model's order.
    """

    model: HookedVLM
    pairs: list[Pair]
    others: list[Pair]
    sites: list[Site]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: of it.
        kind: `ranker` or `map`.
        run: of a ranker, from the problem to a score of each site, by hook name, where larger,
            whatever the sign, is more important: a mapping, a `PatchingResult`; or a `Circuit`,
            whose members are named. Of a map, to an array [pair, row, column] of what the answer
            looks at in each clean image, without negative numbers.
        about: a sentence.
    """

    name: str
    kind: str
    run: Callable[[Problem], Any]
    about: str


METHODS: dict[str, Method] = {}
"""The registered methods, by name."""


def register(
    name: str, kind: str = "ranker", about: str = ""
) -> Callable[[Callable[[Problem], Any]], Callable[[Problem], Any]]:
    """Registers a function as a method, for `validate`.

    Args:
        name: what the table calls it.
        kind: see `Method`.
        about: a sentence; by default the function's docstring.

    Raises:
        ValueError: another kind, or a name that is taken.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is 'ranker' or 'map', not {kind!r}")
    if name in METHODS:
        raise ValueError(f"there is a method {name!r}; choose another name")

    def add(run: Callable[[Problem], Any]) -> Callable[[Problem], Any]:
        METHODS[name] = Method(name, kind, run, about or (run.__doc__ or "").split("\n")[0])
        return run

    return add


# --- patching


@register("patching, denoise")
def _denoise(problem: Problem) -> P.PatchingResult:
    """Clean activations in the corrupt run, site by site."""
    return P.activation_patching(problem.model, problem.pairs, problem.sites, progress=False)


@register("patching, noise")
def _noise(problem: Problem) -> P.PatchingResult:
    """Corrupt activations in the clean run, site by site."""
    return P.activation_patching(
        problem.model, problem.pairs, problem.sites, direction="noise", progress=False
    )


@register("attribution patching")
def _attribution(problem: Problem) -> P.PatchingResult:
    """The denoising patch to first order, of all sites by one backward pass."""
    return P.attribution_patching(problem.model, problem.pairs, problem.sites, progress=False)


@register("integrated gradients")
def _integrated(problem: Problem) -> P.PatchingResult:
    """The same with the gradient's mean over runs between the two."""
    return P.attribution_patching(
        problem.model, problem.pairs, problem.sites, steps=STEPS, progress=False
    )


@register("path patching")
def _paths(problem: Problem) -> dict[str, float]:
    """Paths straight to the logits, then to what stands at their ends, until nothing new does."""
    model, order = problem.model, problem.model.order_of
    found = {site.name: 0.0 for site in problem.sites}
    receivers, seen = ["hook_logits"], set[str]()
    while receivers:
        last = max(map(order, receivers))
        senders = [site for site in problem.sites if order(site.name) < last]
        if not senders:
            break
        result = P.path_patching(model, problem.pairs, senders, receivers, progress=False)
        scores = scores_of(result)
        for name, score in scores.items():
            found[name] = max(found[name], score)
        enough = NAMES * max(found.values())  # of all rounds: the last ones find but rounding
        new = [name for name in named(scores) if name not in seen and scores[name] >= enough]
        seen.update(new)
        receivers = [point for name in new for point in _inputs(model, name)]
    return found


def _inputs(model: HookedVLM, name: str) -> list[str]:
    """Where a head or an MLP reads."""
    if name.endswith("hook_mlp_out"):
        return [name.replace("hook_mlp_out", "hook_mlp_in")]
    return [name.replace("hook_z", leaf) for leaf in ("hook_q", "hook_k", "hook_v")]


@register("greedy circuit")
def _circuit(problem: Problem) -> P.Circuit:
    """The few sites that carry four fifths of the difference between the runs."""
    return P.find_circuit(problem.model, problem.pairs, problem.sites, progress=False)


# --- ablation


@register("zero ablation")
def _zero(problem: Problem) -> P.PatchingResult:
    """Zeros in the clean run, site by site."""
    return _ablated(problem, P.zero())


@register("mean ablation")
def _mean(problem: Problem) -> P.PatchingResult:
    """The mean over other inputs, at each position."""
    return _ablated(problem, P.mean(problem.others, per_position=True))


@register("resample ablation")
def _resample(problem: Problem) -> P.PatchingResult:
    """What another input has there."""
    return _ablated(problem, P.resample(problem.others))


def _ablated(problem: Problem, intervention: P.Intervention) -> P.PatchingResult:
    return P.ablate(problem.model, problem.pairs, problem.sites, intervention, progress=False)


# --- attention


@register("raw attention")
def _attention(problem: Problem) -> dict[str, float]:
    """A head's largest attention to a patch, above an even share; what everybody looks at first."""
    found = {site.name: 0.0 for site in problem.sites}
    for seen in _looks(problem):
        for name, pattern in seen.patterns.items():
            for head, weights in enumerate(pattern - 1 / seen.keys[name]):
                stem = name.removesuffix("hook_pattern")
                site = f"{stem}heads.{head}.hook_z"
                found[site] += max(0.0, float(weights.max())) / len(problem.pairs)
    return found


@register("mean attention", kind="map")
def _mean_attention(problem: Problem) -> np.ndarray:
    """The mean over all heads and positions that see the image."""
    maps = []
    for seen in _looks(problem):
        each = [pattern.mean((0, 1)) for pattern in seen.patterns.values()]
        mean = torch.stack(each).mean(0)
        side = int(len(mean) ** 0.5)
        maps.append(mean.view(side, side).numpy())
    return np.stack(maps)


def _looks(problem: Problem) -> list[Look]:
    """For each clean input the attention of its text to its image."""
    model = problem.model
    return [
        look(model, model.prepare(pair.images[:1], (pair.texts or [])[:1]))
        for pair in problem.pairs
    ]


# --- published methods


@register("NOTICE")
def _notice(problem: Problem) -> dict[str, float]:
    """Heads and MLPs that read the text, at each token; the largest mean that one restores."""
    found = {site.name: 0.0 for site in problem.sites}
    read = [site for site in notice.sites(problem.model) if site.name in found]
    settings = notice.Settings(
        kinds=tuple(dict.fromkeys(notice.kind_of(site) for site in read)),
        positions="each",
        clean_correct=False,
        corruption_effective=None,
    )
    table, _ = notice.patch(problem.model, problem.pairs, settings, progress=False)
    means = table.groupby(["kind", "layer", "head", "position"])["logit_diff"].mean()
    best = abs(means).groupby(level=["kind", "layer", "head"]).max()
    for site in read:
        head = -1 if site.head is None else site.head
        found[site.name] = float(best[notice.kind_of(site), site.layer, head])
    return found


@register("causal tracing")
def _tracing(problem: Problem) -> dict[str, float]:
    """What each site restores when noise stands on what is seen of the image."""
    return causal_tracing.scores(problem.model, problem.pairs, problem.sites)


# --- what a ranker gives


def scores_of(result: P.PatchingResult) -> dict[str, float]:
    """The size of each site's mean effect over pairs."""
    means = abs(result.difference.mean("pair", skipna=False).values.reshape(-1))
    return {site.name: float(mean) for site, mean in zip(result.sites, means, strict=True)}


def named(scores: Mapping[str, float]) -> list[str]:
    """The sites that scores name, the largest first."""
    most = max(scores.values(), default=0.0)
    if most <= 0:
        return []
    ranked: Sequence[str] = sorted(scores, key=lambda name: -scores[name])
    return [name for name in ranked if scores[name] >= NAMES * most]
