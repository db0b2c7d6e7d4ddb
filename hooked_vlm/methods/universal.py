"""Universal heads: those whose effect stands out in every task, with what chance would give.

Source: NOTICE (arXiv 2406.16320): a head is universal if its mean effect lies more than two
standard deviations above the mean over all heads, in every task, for one way of corruption (then
it is a head of vision or of text) or for both (multimodal). The paper selects and reports on the
same pairs, and has no null; of 144 heads of pure noise 3 pass in each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from hooked_vlm.methods.statistics import Numbers, bootstrap

Condition = tuple[str, str]  # a task, and what is corrupt
Rule = Literal["signed", "absolute", "released"]
RULES: dict[str, tuple[str, bool]] = {  # which metric, and whether its size alone counts
    "signed": ("logit_diff", False),
    "absolute": ("logit_diff", True),
    "released": ("prob", True),
}
CLASSES = {"image": "vision", "text": "text"}
ROUNDING = 1e-9  # of scores, which are around 1
CHANCE = 0.05  # of permutations in which some head may reach the threshold, with k=None
HEAD = ("stack", "kind", "layer", "head")


@dataclass(frozen=True)
class Universal:
    """What a table of patches says of heads.

    Attributes:
        heads: the universal ones, a line each: `stack`, `kind`, `layer`, `head`; `universal`, which
            is `vision`, `text` or `multimodal`; `z`, the smallest of its standard scores among
            heads in the conditions that this needs; `p`, the share of permutations in which any
            head has as large a one; and `confirmed`, whether the pairs that were held out put it
            above the threshold again, with an interval above the mean over heads, in each of these
            conditions (of one pair, which has no interval, the score alone counts); missing where
            none were held out.
        effects: a line for each head and condition: `task`, `modality`, `mean`, `z`, `selected`
            (above the threshold), and of the pairs that were held out `held_out`, the mean, with
            its interval `low`, `high`, and `held_out_z`.
        null: for each class, how many heads it has in a permutation, on average.
        n_pairs: by condition, how many pairs heads were selected on, and how many were held out.
    """

    heads: pd.DataFrame
    effects: pd.DataFrame
    null: dict[str, float]
    n_pairs: dict[Condition, tuple[int, int]]


def universal(
    table: pd.DataFrame,
    *,
    kind: str | None = None,
    role: str = "answer",
    rule: Rule = "signed",
    k: float | None = 2.0,
    held_out: float = 0.5,
    n_null: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Universal:
    """Finds universal heads on one part of the pairs, and holds them against the rest and chance.

    The null: the numbers of all heads of a pair come from one distribution. In each pair they are
    exchanged at random, anew in each condition, and the largest score of any head is kept, so that
    `p` counts all heads that were looked at. A head whose numbers merely vary more than those of
    others is against this null, too, and passes more often than by chance: `confirmed` is what it
    does not reach.

    Args:
        table: of `notice.patch`, with one task or several.
        kind: of heads; None for `cross_attn_heads` where there are some, else `attn_heads`.
        role: the tokens at which heads were patched; several count by their mean.
        rule: `signed`, the mean of the logit difference that a patch adds; `absolute`, the mean of
            its size, which also counts heads that harm; `released`, the mean of the probability, as
            the released code computes it.
        k: how many standard deviations above the mean over heads are the threshold, as published.
            Of few heads no two equal ones can pass: m of n have scores of at most sqrt(n / m - 1).
            None for the score that no head reaches in 95 % of the permutations, shared by the
            classes.
        held_out: the share of each task's pairs on which nothing is selected; 0 for none, as
            published.
        n_null: permutations; 0 for none.
        level: of intervals.
        seed: of the split, the permutations, and the intervals.

    Raises:
        ValueError: a table without such heads or role, another rule, a share outside of 0 to 1, or
            a condition in which one of the parts has no pair, pairs that share a name.
    """
    if rule not in RULES:
        raise ValueError(f"rule is one of {', '.join(RULES)}, not {rule!r}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of pairs, 0 to below 1, not {held_out}")
    heads, values = _values(table, kind, role, *RULES[rule])
    if k is None and not n_null:
        raise ValueError("k=None takes its threshold from permutations: give n_null of them")
    parts = {
        condition: _split(frame, _held_out(values, condition[0], held_out, seed), held_out)
        for condition, frame in values.items()
    }
    chosen = {condition: first for condition, (first, _) in parts.items()}
    scores = {condition: _scores(first.mean(0)) for condition, first in chosen.items()}
    null = _permuted(chosen, n_null, np.random.default_rng(seed))
    lines, again, above = [], {}, {}
    for condition, (first, rest) in parts.items():
        nothing = (np.full(len(heads), np.nan),) * 3
        mean, low, high = bootstrap(rest, level=level, seed=seed) if len(rest) else nothing
        again[condition], above[condition] = _scores(mean), ~(low <= mean.mean())
        lines.append(
            heads.assign(
                task=condition[0],
                modality=condition[1],
                mean=first.mean(0),
                z=scores[condition],
                selected=scores[condition] >= _threshold(null[condition], k, 1),
                held_out=mean,
                low=low,
                high=high,
                held_out_z=again[condition],
            )
        )
    found, chance = [], {}
    before, before_null = np.zeros(len(heads), dtype=bool), np.zeros((n_null, len(heads)), bool)
    classes = _classes(list(values))
    for name, some in classes.items():
        least, held, by_chance = (_least(of, some) for of in (scores, again, null))
        threshold = _threshold(by_chance, k, len(classes))
        told = heads.assign(universal=name, z=least)
        if n_null:
            beaten = (by_chance.max(1)[:, None] >= least - ROUNDING).sum(0)
            told["p"] = (1 + beaten) / (1 + n_null)
        agree = (held >= threshold) & np.all([above[one] for one in some], axis=0)
        told["confirmed"] = pd.array(agree if held_out else [pd.NA] * len(heads), dtype="boolean")
        found.append(told[(least >= threshold) & ~before])
        passes = (by_chance >= threshold) & ~before_null
        before, before_null = before | (least >= threshold), before_null | passes
        if n_null:
            chance[name] = float(passes.sum(1).mean())
    n_pairs = {condition: (len(first), len(rest)) for condition, (first, rest) in parts.items()}
    universal_ones = pd.concat(found).sort_values("z", ascending=False, ignore_index=True)
    return Universal(universal_ones, pd.concat(lines, ignore_index=True), chance, n_pairs)


def _values(
    table: pd.DataFrame, kind: str | None, role: str, metric: str, size: bool
) -> tuple[pd.DataFrame, dict[Condition, pd.DataFrame]]:
    """The heads, and by condition a frame of their numbers, a line for each pair."""
    if kind is None:
        kinds = set(table["kind"])
        kind = "cross_attn_heads" if "cross_attn_heads" in kinds else "attn_heads"
    some = table[(table["kind"] == kind) & (table["role"] == role)]
    if not len(some):
        raise ValueError(
            f"the table has no {kind!r} patched at the role {role!r}; kinds are "
            f"{sorted(set(table['kind']))}, roles {sorted(set(table['role']) - {''})}"
        )
    if not np.isfinite(some[metric]).all():
        raise ValueError("not every pair has a number of every head; patch the same sites in all")
    once = [one for one in ("task", "modality", "pair", *HEAD, "position") if one in some]
    if "position" in some and some.duplicated(once).any():
        twice = some.loc[some.duplicated(once), "pair"].iloc[0]
        raise ValueError(
            f"two pairs of one task have the name {twice!r}; give each its own, or tables of "
            "several runs a task each"
        )
    some = some.assign(value=abs(some[metric]) if size else some[metric])
    wide = some.pivot_table(
        index=["task", "modality", "pair"], columns=list(HEAD), values="value", aggfunc="mean"
    )
    if wide.isna().any(axis=None):
        raise ValueError("not every pair has a number of every head; patch the same sites in all")
    values = {
        condition: frame.droplevel([0, 1]).sort_index()
        for condition, frame in wide.groupby(level=[0, 1])
    }
    return wide.columns.to_frame(index=False), values


def _held_out(
    values: Mapping[Condition, pd.DataFrame], task: str, share: float, seed: int
) -> set[str]:
    """The names of the pairs of a task that are held out, whatever is corrupt in them."""
    names = sorted(
        {name for (of, _), frame in values.items() if of == task for name in frame.index}
    )
    rng = np.random.default_rng(seed)
    return set(rng.permutation(np.array(names, dtype=object))[: round(len(names) * share)])


def _split(frame: pd.DataFrame, held_out: set[str], share: float) -> tuple[Numbers, Numbers]:
    """The numbers of the pairs to select on, and of those that are held out."""
    rest = frame.index.isin(list(held_out))
    if rest.all() or (share > 0 and not rest.any()):
        raise ValueError(
            f"{len(frame)} pairs are too few to hold some out; give more, or held_out=0"
        )
    numbers = frame.to_numpy(float)
    return numbers[~rest], numbers[rest]


def _scores(means: Numbers) -> Numbers:
    """Standard scores among heads; 0 where all are equal."""
    spread = means.std(-1, keepdims=True)
    alike = spread <= ROUNDING * abs(means).max(-1, keepdims=True)
    off = means - means.mean(-1, keepdims=True)
    scores: Numbers = np.where(alike, 0, off / np.where(alike, 1, spread))
    return scores


def _classes(conditions: Sequence[Condition]) -> dict[str, list[Condition]]:
    """The conditions that each class of universal heads needs; the strictest class first."""
    found = {
        name: [one for one in conditions if one[1] == modality]
        for modality, name in CLASSES.items()
    }
    found = {name: some for name, some in found.items() if some}
    return {"multimodal": list(conditions), **found} if len(found) > 1 else found


def _least(scores: Mapping[Condition, Numbers], some: Sequence[Condition]) -> Numbers:
    """Each head's smallest score in some conditions."""
    smallest: Numbers = np.min([scores[one] for one in some], axis=0)
    return smallest


def _threshold(null: Numbers, k: float | None, n_classes: int) -> float:
    """The score that a head must reach.

    Args:
        null: [permutation, head], scores by chance.
        k: as in `universal`.
        n_classes: how many classes share the chance.
    """
    return float(np.quantile(null.max(1), 1 - CHANCE / n_classes)) if k is None else k


def _permuted(
    values: Mapping[Condition, Numbers], n: int, rng: np.random.Generator
) -> dict[Condition, Numbers]:
    """The scores when, in each pair, the numbers of all heads are exchanged: [n, head]."""
    return {
        condition: _scores(
            np.array([rng.permuted(some, axis=1).mean(0) for _ in range(n)]).reshape(n, -1)
        )
        if n
        else np.zeros((0, some.shape[1]))
        for condition, some in values.items()
    }
