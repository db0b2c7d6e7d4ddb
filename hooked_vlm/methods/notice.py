"""NOTICE: which modules and heads carry what decides between two answers about an image.

Source: Golovanevsky, Rudman et al., NOTICE (arXiv 2406.16320; NAACL 2025). Pairs whose image was
exchanged (`data.semantic_image_pairs`) or whose question names other options
(`data.symmetric_token_replacement`) are patched, clean into corrupt, at every token of every layer:
whole modules, and single heads. `universal` finds the heads that matter in every task, `functions`
what these look at.

The paper's released code differs: its 'MLP' of BLIP is the whole residual stream (here `resid`;
`mlp` is what the MLP adds), its modules of LLaVA get the residual stream written into them, and it
reads the numbers of a token in front of the answer. Here positions are found by their role.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hooked_vlm.data import Pair
from hooked_vlm.data.report import BadRow, LeftOut, OnBad, Report, Rows
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.names import Site
from hooked_vlm.patching.engine import Begun, Sweep
from hooked_vlm.patching.interventions import patch as patched
from hooked_vlm.patching.metrics import accuracy, as_array, logit_diff, prob, several
from hooked_vlm.patching.places import Each, NoSuchPlace, Place, spoken
from hooked_vlm.patching.result import VANISHING
from hooked_vlm.patching.runs import FirstToken, Run, paired
from hooked_vlm.patching.sweep import Direction, where

Kind = Literal["mlp", "attn", "cross_attn", "resid", "attn_heads", "cross_attn_heads"]
Modality = Literal["image", "text"]
METRICS = ("prob", "prob_diff", "logit_diff", "patching_effect")
"""The columns of a table that hold the paper's metrics (`patch`)."""

_POINTS: tuple[
    tuple[Kind, str, bool], ...
] = (  # kind, component, whether of single heads; the first that a stack has
    ("mlp", "hook_mlp_out", False),
    ("attn", "attn.hook_z", False),
    ("cross_attn", "cross_attn.hook_z", False),
    ("resid", "hook_normalized_resid_post", False),
    ("resid", "hook_resid_post", False),
    ("attn_heads", "attn.hook_z", True),
    ("cross_attn_heads", "cross_attn.hook_z", True),
)


@dataclass(frozen=True)
class Settings:
    """What is patched, and which pairs are kept.

    Attributes:
        kinds: `mlp` and `resid`, what the MLP adds and the stream behind the block; `attn` and
            `cross_attn`, what all heads make before the output matrix (z); `attn_heads` and
            `cross_attn_heads`, each head of these. None for all that the stack has.
        positions: where, as `activation_patching` takes it; None for every token, of a LLaVA for
            the answer's words and the last token, at which it begins to answer.
        stack: which stack; None for the first that reads text.
        direction: `denoise`, clean into corrupt, as published; or `noise`.
        clean_correct: whether pairs are left out whose clean run says another first token than the
            answer's.
        corruption_effective: pairs are left out whose logit difference the corruption lowers by no
            more than this; None keeps them.
        first_token: as in `HookedVLM.prepare`.
        max_rows: of the largest batch. It is part of the settings since sums of another batch are
            rounded otherwise.
    """

    kinds: tuple[Kind, ...] | None = None
    positions: Any = None
    stack: str | None = None
    direction: Direction = "denoise"
    clean_correct: bool = True
    corruption_effective: float | None = 0.0
    first_token: FirstToken = "cls"
    max_rows: int = 64


@dataclass(frozen=True)
class Ready:
    """A pair that is ready to be run: its images are read, its words found.

    Attributes:
        pair: the pair.
        run: of it.
        tokens: of its clean text.
        roles: by name, positions in the text.
    """

    pair: Pair
    run: Run
    tokens: list[str] = field(repr=False)
    roles: Mapping[str, Sequence[int]]


def modality(pair: Pair) -> Modality:
    """Which of a pair's inputs is corrupt.

    Raises:
        BadRow: both are.
    """
    image, text = len(pair.images) > 1, pair.texts is not None and len(set(pair.texts)) > 1
    if image and text:
        raise BadRow("both corrupt", "image and text are both corrupt; NOTICE corrupts one of them")
    return "image" if image else "text"


def patch(
    model: HookedVLM,
    pairs: Sequence[Pair] | Mapping[str, Sequence[Pair]],
    settings: Settings | None = None,
    *,
    on_bad: OnBad = "raise",
    progress: bool = True,
) -> tuple[pd.DataFrame, Report]:
    """Patches every pair, and measures the paper's four metrics of each patch.

    Args:
        model: a BLIP, ALBEF or LLaVA that answers questions.
        pairs: pairs, or several tasks of them by name; each has an answer and a foil.
        settings: what is patched, and which pairs are kept.
        on_bad: `raise` refuses a pair that cannot be patched, such as one whose texts differ in
            their number of tokens; `drop` leaves it out. Those that `settings` leaves out are no
            bad ones, and counted.
        progress: whether to show a bar.

    Returns:
        A table with a line for each pair, site and position, and a report of the pairs. Columns:
        `task`, `pair`, `modality` (what is corrupt), `clean_correct` (whether the clean run says
        the answer's first token before all others), `answer_first`; `stack`, `kind`, `layer`,
        `head` (-1 of a module), `position`, its `token` and `role` (`answer`, `foil`, those of the
        pair, else empty); with r the answer's first token and r' the foil's, LD = logit(r) -
        logit(r'), `prob` P(r) of the patched run, `prob_diff` P(r) less that of the run that is
        patched into, `logit_diff` LD less that of this run, `patching_effect` that over what the
        other run has more, NaN where the two do not differ; and `clean_prob`, `corrupt_prob`,
        `clean_logit_diff`, `corrupt_logit_diff`.

    Raises:
        KeyError: a stack or a kind that the model does not have.
        ValueError: a bad pair; no pair is left.
    """
    method = Notice(model, settings or Settings())
    tasks = pairs if isinstance(pairs, Mapping) else {"": pairs}
    rows, tables = Rows(on_bad), []
    every = numbered(tasks)
    for task, pair in tqdm(every, desc="NOTICE", unit="pair", disable=not progress):
        with rows.row(f"pair {pair.name!r}"):
            tables.append(method.measure(method.prepare(pair), task))
    report = rows.report()
    if not tables:
        raise ValueError(f"no pair is left to be patched: {report}")
    return pd.concat(tables, ignore_index=True), report


def numbered(tasks: Mapping[str, Sequence[Pair]]) -> list[tuple[str, Pair]]:
    """All pairs with their tasks; those without a name get their number.

    Raises:
        ValueError: two pairs of one task, name and corruption, which a table could not tell apart.
    """
    found = [
        (task, pair if pair.name else replace(pair, name=str(number)))
        for task, some in tasks.items()
        for number, pair in enumerate(some)
    ]
    keys = Counter((task, pair.name, len(pair.images)) for task, pair in found)
    if twice := [key for key, count in keys.items() if count > 1]:
        task, name, _ = twice[0]
        where_ = f" of task {task!r}" if task else ""
        raise ValueError(
            f"{keys[twice[0]]} pairs{where_} have the name {name!r}; give each its own"
        )
    return found


class Notice:
    """The method on one model, pair by pair; `patch` is the loop over it.

    Args:
        model: the model.
        settings: what is patched, and which pairs are kept.

    Raises:
        KeyError: a stack or a kind that the model does not have.
        ValueError: a model that answers no questions.
    """

    def __init__(self, model: HookedVLM, settings: Settings):
        if model.task not in ("vqa", "captioning", "llava"):
            raise ValueError(
                f"NOTICE asks for one of two answers, and task {model.task!r} gives none; patch "
                "it with patching.activation_patching"
            )
        if settings.direction not in get_args(Direction):
            raise ValueError(f"direction is 'denoise' or 'noise', not {settings.direction!r}")
        if settings.max_rows < 1:
            raise ValueError(f"max_rows is at least 1, not {settings.max_rows}")
        self.model, self.settings = model, settings
        self.sites = sites(model, settings.kinds, settings.stack)
        self.metric = several(
            [prob(tokens="first"), logit_diff(tokens="first"), accuracy(tokens="first")]
        )
        places = settings.positions
        if places is None:
            places = ("answer", "last") if model.task == "llava" else Each()
        self.places = where(model, list(self.sites), places)[1]

    def prepare(self, pair: Pair) -> Ready:
        """Reads a pair's images and finds its words; needs no weights.

        Raises:
            BadRow: a pair that cannot be patched.
        """
        modality(pair)
        if pair.answer is None or pair.foil is None:
            raise BadRow("no answer or foil", f"pair {pair.name!r} needs an answer and a foil")
        with _bad("texts of unequal length"):
            pair.n_tokens(self.model.to_str_tokens)
        with _bad("answer or foil cannot be told"):
            (run,), _ = paired(self.model, pair, self.metric, self.settings.first_token)
        with _bad("input cannot be prepared"):
            inputs = run.inputs()
        tokens = self.model.to_str_tokens(inputs["input_ids"][0])
        roles = _roles(self.model, inputs["input_ids"][0].tolist(), run.roles)
        run = replace(run, inputs=lambda: inputs, roles=roles)
        return Ready(pair, run, tokens, roles)

    @torch.no_grad()
    def measure(self, ready: Ready, task: str = "") -> pd.DataFrame:
        """A pair's lines of the table.

        Raises:
            BadRow: a pair that the settings leave out.
        """
        start = 1 if self.settings.direction == "denoise" else 0
        sweep = _Sweep(
            self.model,
            [ready.run],
            list(self.sites),
            self.places,
            patched(),
            start,
            self.settings.max_rows,
            settings=self.settings,
        )
        try:
            values, ends = sweep.values(None)
        except NoSuchPlace as error:
            raise BadRow("no such place in its text", str(error)) from error
        if sweep.interrupted:
            raise KeyboardInterrupt
        return self._table(ready, task, values[0], ends[:, 0], sweep.positions)

    def _table(
        self,
        ready: Ready,
        task: str,
        values: np.ndarray,
        ends: np.ndarray,
        positions: Sequence[int],
    ) -> pd.DataFrame:
        """Of values [site, place, metric] and ends [run, metric]."""
        n_sites, n_places, _ = values.shape
        begin, other = ends[::-1] if self.settings.direction == "denoise" else ends
        probs, diffs, _ = np.moveaxis(values, -1, 0).reshape(3, -1)
        gap = other[1] - begin[1]
        vanishes = abs(gap) <= VANISHING * max(abs(ends[:, 1]))
        names, tokens = {}, [""] * (1 + max(positions))
        if self.sites[0].stack == list(self.model.stacks)[1]:  # the one that reads the text
            names = {at: role for role, some in reversed(list(ready.roles.items())) for at in some}
            tokens = ready.tokens
        first = {role: min(some) for role, some in ready.roles.items() if some}
        told = {
            "task": task,
            "pair": ready.pair.name,
            "modality": modality(ready.pair),
            "clean_correct": bool(ends[0, 2]),
            "answer_first": first.get("answer", np.inf) < first.get("foil", -np.inf),
            "stack": np.repeat([site.stack for site in self.sites], n_places),
            "kind": np.repeat([kind_of(site) for site in self.sites], n_places),
            "layer": np.repeat([site.layer for site in self.sites], n_places),
            "head": np.repeat(
                [-1 if site.head is None else site.head for site in self.sites], n_places
            ),
            "position": np.tile(positions, n_sites),
            "token": np.tile([tokens[at] for at in positions], n_sites),
            "role": np.tile(self._role_names(positions, names), n_sites),
            "prob": probs,
            "prob_diff": probs - begin[0],
            "logit_diff": diffs - begin[1],
            "patching_effect": np.full_like(diffs, np.nan)
            if vanishes
            else (diffs - begin[1]) / gap,
        }
        for number, metric in enumerate(("prob", "logit_diff")):
            for run, name in enumerate(("clean", "corrupt")):
                told[f"{name}_{metric}"] = float(ends[run, number])
        return pd.DataFrame(told)

    def _role_names(self, positions: Sequence[int], names: Mapping[int, str]) -> list[str]:
        if isinstance(self.places, Each):
            return [names.get(at, "") for at in positions]
        places = zip(self.places or (), positions, strict=True)
        return [one if isinstance(one, str) else names.get(at, "") for one, at in places]


@dataclass
class _Sweep(Sweep):
    """A sweep over one pair that stops where the settings leave it out."""

    settings: Settings = field(default_factory=Settings)
    positions: list[int] = field(default_factory=list)

    def begin(self, pair: int) -> Iterator[Begun]:
        """Runs a pair, unless it is left out."""
        for begun in super().begin(pair):
            self._keep(as_array(begun.metric(begun.base.logits)))
            self.positions = [self._first(begun, one) for one in self._places(begun)]
            yield begun

    def _keep(self, ends: np.ndarray) -> None:
        """Leaves a pair out by its clean and corrupt run.

        Raises:
            BadRow: it is left out.
        """
        (_, clean, right), (_, corrupt, _) = ends
        if self.settings.clean_correct and not right:
            raise LeftOut("not answered correctly")
        least = self.settings.corruption_effective
        if least is not None and clean - corrupt <= least:
            raise LeftOut("corruption without effect")

    def _first(self, begun: Begun, place: Place) -> int:
        name = self.modules[0]
        locator = begun.locator
        found = locator.find(place, locator.stack(name), locator.count(name), name)
        return min(found)


def sites(
    model: HookedVLM, kinds: Sequence[Kind] | None = None, stack: str | None = None
) -> list[Site]:
    """The sites of some kinds, in the model's order.

    Args:
        model: the model.
        kinds: as in `Settings`; None for all that the stack has.
        stack: as there.

    Raises:
        KeyError: a stack or a kind that the model does not have.
    """
    stacks = list(model.stacks)
    chosen = stacks[1] if stack is None else stack
    if chosen not in stacks:
        raise KeyError(f"the model has no stack {chosen!r}; its stacks are {', '.join(stacks)}")
    names = {one.removeprefix(f"{chosen}.blocks.") for one in model.hook_names()}
    components = {one.partition(".")[2] for one in names}
    found: dict[str, str] = {}
    for kind, component, heads in _POINTS:
        if component in components:
            point = component.replace("hook_z", "heads.*.hook_z") if heads else component
            found.setdefault(kind, f"{chosen}.blocks.*.{point}")
    if unknown := [kind for kind in kinds or () if kind not in found]:
        raise KeyError(f"{chosen!r} has no kind {unknown[0]!r}; it has {', '.join(found)}")
    return list(model.sites([found[kind] for kind in kinds or found]))


def kind_of(site: Site) -> Kind:
    """The kind of a site (`Settings`)."""
    wanted = site.component, site.head is not None
    return next(kind for kind, *what in _POINTS if tuple(what) == wanted)


@contextmanager
def _bad(reason: str) -> Iterator[None]:
    """What is wrong with a pair, under a name to count it by."""
    try:
        yield
    except OSError as error:
        raise BadRow("image cannot be read", str(error)) from error
    except ValueError as error:
        raise BadRow(reason, str(error)) from error


def _roles(model: HookedVLM, ids: list[int], roles: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The positions of roles whose words stand in a text."""
    found: dict[str, Sequence[int]] = {}
    for role, place in roles.items():
        if isinstance(place, str):
            at: Sequence[int] = spoken(model.tokenizer, ids, place)
        else:
            numbers = [place] if isinstance(place, int) else list(place)
            if outside := [one for one in numbers if not -len(ids) <= one < len(ids)]:
                raise BadRow(
                    "no such place in its text",
                    f"role {role!r} names position {outside[0]}, the text has {len(ids)} tokens",
                )
            at = [one % len(ids) for one in numbers]
        if at:
            found[role] = at
    return found
