"""Attribution patching: all patches at once, to first order, by gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.patching.cells import Sites, module_of
from hooked_vlm.patching.engine import Begun, Cell, Sweep, Write
from hooked_vlm.patching.interventions import index_of
from hooked_vlm.patching.metrics import as_numbers
from hooked_vlm.patching.result import PatchingResult
from hooked_vlm.patching.runs import FirstToken, Inputs, Pairs
from hooked_vlm.patching.sweep import (
    Direction,
    MetricLike,
    Positions,
    activation_patching,
    patching,
    run,
)

Made = tuple[str, tuple[int, ...] | None]  # a module, and the positions of its keys
QUERIES, KEYS = ("hook_q", "hook_rot_q"), ("hook_k", "hook_rot_k")


def attribution_patching(
    model: HookedVLM,
    pairs: Pairs,
    sites: Sites,
    metric: MetricLike = None,
    positions: Positions = None,
    direction: Direction = "denoise",
    *,
    steps: int | None = None,
    fix_softmax: bool = False,
    check: bool | PatchingResult = False,
    first_token: FirstToken = "cls",
    progress: bool = True,
) -> PatchingResult:
    """Estimates every patch by the metric's gradient times the difference of the two runs.

    One forward pass of both runs and one backward pass give all sites at all positions at once. The
    estimate is the exact effect in the limit of small differences. Sites that are written together
    count the sum of their estimates.

    Source: attribution patching, Syed et al. (arXiv 2310.10348) sec. 3; `steps`, integrated
    gradients (Sundararajan et al., arXiv 1703.01365) over inputs, as in EAP-IG (Hanna et al., arXiv
    2403.17806); `fix_softmax`, AtP* (Kramár et al., arXiv 2403.00745) sec. 3.1.1.

    Args:
        model: any model of the zoo.
        pairs: as in `activation_patching`.
        sites: as in `activation_patching`.
        metric: as in `activation_patching`; it needs a gradient.
        positions: as in `activation_patching`.
        direction: as in `activation_patching`.
        steps: averages the gradient over so many runs, whose embeddings of patches and tokens are
            interpolated between those of the two runs, at the middles of equal steps (of a ResNet,
            which embeds nothing, its first convolution, and thus the pixels); None for the gradient
            of the run that is patched into.
        fix_softmax: at queries and keys, `hook_q` and `hook_k` (of rotary attention `hook_rot_q`
            and `hook_rot_k`), recomputes the pattern with the patched ones and multiplies its
            change with its gradient, since a saturated softmax hides effects from the gradient.
            Keys take one softmax of their layer for each place.
        check: runs the exact sweep, too, or takes its result, and puts into `provenance["exact"]`
            how well the effects of all `cells` agree: `pearson` and `spearman`, NaN where either
            side is the same everywhere, and `largest_error`.
        first_token: as in `activation_patching`.
        progress: whether to show a bar.

    Returns:
        As `activation_patching`: `data` is the metric of the run that is patched into, and the
        estimated effect.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: as in `activation_patching`; a metric without a gradient; rotary attention's
            `hook_q` and `hook_k` with `fix_softmax`; scores of runs that mask other keys; a
            `check` of something else.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is at least 1, not {steps}")
    plain, told = patching(model, pairs, sites, metric, positions, direction, first_token, 2**30)
    sweep = AttributionSweep(**vars(plain), steps=steps, fix_softmax=fix_softmax)
    told |= {"method": "attribution_patching", "steps": steps, "fix_softmax": fix_softmax}
    result = run(sweep, told, progress)
    if check is False:
        return result
    if check is True:
        check = activation_patching(
            model, pairs, sites, metric, positions, direction, first_token=first_token,
            progress=progress,
        )  # fmt: skip
    result.provenance["exact"] = _agreement(result, check)
    return result


def _agreement(estimated: PatchingResult, exact: PatchingResult) -> dict[str, int | float]:
    """How well the effects of all cells and pairs agree.

    Raises:
        ValueError: results of something else.
    """
    told = [
        (
            *(one.provenance.get(key) for key in ("method", "direction", "metric")),
            one.sites,
            one.places,
            one.data.shape,
            one.data["pair"].values.tolist(),
        )
        for one in (estimated, exact)
    ]
    what = ("method", "direction", "metric", "sites", "positions", "number of cells", "pairs")
    given = ("activation_patching", *told[0][1:])
    if other := [name for name, a, b in zip(what, given, told[1], strict=True) if a != b]:
        raise ValueError(
            f"check= is an exact result of another {other[0]}; check=True makes the right one"
        )
    frame = pd.DataFrame(
        {name: one.difference.values.reshape(-1) for name, one in (("a", estimated), ("b", exact))}
    ).dropna()
    ranks = frame.rank()
    return {
        "cells": len(frame),
        "pearson": float(frame["a"].corr(frame["b"])),
        "spearman": float(ranks["a"].corr(ranks["b"])),
        "largest_error": float((frame["a"] - frame["b"]).abs().max()),
    }


def between(
    model: HookedVLM, inputs: Inputs, start: int, steps: int, names: list[str], keep: int
) -> Iterator[Base]:
    """Runs with gradients whose embeddings are interpolated between the two rows of a pair.

    Args:
        model: the model.
        inputs: both rows.
        start: the row whose place the interpolated one takes.
        steps: how many runs; their shares are the middles of as many equal steps.
        names: the points to differentiate by.
        keep: of how many last positions logits are made, 0 for all.
    """
    points = [next(n for n in model.hook_dict if n.startswith(f"{s}.")) for s in model.stacks]
    ends, links = model.traced_run(points, **inputs)
    numbers = torch.tensor([start, 1 - start], device=model.device)
    ways: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # the row, and what to go from and to
    for name, value in ends.cache.cache_dict.items():
        stack, there = name.partition(".")[0], value.detach()
        row, other = (ends.rows(stack, one[None]).to(there.device) for one in numbers)
        ways[name] = row, there[row], there[other]
    del ends  # and its graph
    for step in range(steps):

        def mix(x: Tensor, hook: HookPoint, share: float = (step + 0.5) / steps) -> Tensor:
            row, own, other = ways[str(hook.name)]
            there, merge = torch.lerp(own, other, share), links[str(hook.name).split(".")[0]].merge
            if merge is not None:  # what stands for an image comes of the image's own stack
                shown = merge.places.to(x.device)[row][..., None]
                there = torch.where(shown, x[row], there)
            return x.index_copy(0, row, there)

        with model.hooks([(name, mix) for name in ways]):
            base, _ = model.traced_run(names, logits_to_keep=keep, **inputs)
        yield base


@dataclass
class AttributionSweep(Sweep):
    """A sweep whose runs are estimated.

    Attributes:
        steps: as in `attribution_patching`.
        fix_softmax: as in `attribution_patching`.
    """

    steps: int | None = None
    fix_softmax: bool = False
    _gradients: dict[str, Tensor] = field(default_factory=dict)
    _tables: dict[Made, np.ndarray] = field(default_factory=dict)
    _own: float = 0.0

    def record(self) -> list[str]:
        """Also what patterns are made of, where they are made anew."""
        names = self.modules
        for name in filter(self._fixed.__contains__, self.modules):
            stem = name.rpartition(".")[0]
            rotary = f"{stem}.hook_rot_q" in self.model.hook_dict
            if rotary and "_rot_" not in name:
                raise ValueError(
                    f"fix_softmax reads {name!r} after it was rotated: name "
                    f"{name.replace('hook_', 'hook_rot_')!r}"
                )
            parts = ("hook_rot_q", "hook_rot_k") if rotary else ("hook_q", "hook_k")
            names += [f"{stem}.{one}" for one in (*parts, "hook_attn_scores", "hook_pattern")]
        return list(dict.fromkeys(names))

    @cached_property
    def _fixed(self) -> set[str]:
        """The points whose patterns are made anew."""
        leaves = QUERIES + KEYS
        return {n for n in self.modules if self.fix_softmax and n.rpartition(".")[2] in leaves}

    def unpatched(self, names: list[str], keep: int, inputs: Inputs) -> Base:
        """The run of a pair, with gradients where these are of it."""
        if self.steps is not None:
            return super().unpatched(names, keep, inputs)
        return self.model.traced_run(names, logits_to_keep=keep, **inputs)[0]

    def begin(self, pair: int) -> Iterator[Begun]:
        """Runs a pair, and finds the gradients of each part of its metric."""
        for begun in super().begin(pair):
            if self.steps is None:
                self._gradients = self._found(begun, begun.base)
            else:
                self._gradients = self._averaged(begun, self.steps)
            logits = begun.base.logits.detach()
            self._own = as_numbers(begun.metric(logits))[self.start]
            self._tables = {}
            yield replace(begun, base=replace(begun.base, logits=logits))

    @torch.enable_grad()
    def _found(self, begun: Begun, base: Base) -> dict[str, Tensor]:
        """The gradients of the metric of the run that is patched into.

        Raises:
            ValueError: the metric has none.
        """
        values = begun.metric(base.logits)
        if not values.requires_grad:
            raise ValueError(
                f"{self.runs[0].metric.name} has no gradient to attribute by; sweep with it in "
                "activation_patching"
            )
        names, tensors = zip(*base.cache.cache_dict.items(), strict=True)
        grads = torch.autograd.grad(values[self.start], tensors, allow_unused=True)
        return {n: g for n, g in zip(names, grads, strict=True) if g is not None}

    def _averaged(self, begun: Begun, steps: int) -> dict[str, Tensor]:
        """The mean gradient over runs between the two."""
        sums: dict[str, Tensor] = {}
        inputs, keep = begun.locator.inputs, begun.base.logits_to_keep
        for one in between(self.model, inputs, self.start, steps, self.record(), keep):
            for name, grad in self._found(begun, one).items():
                sums[name] = sums.get(name, 0) + grad / steps
        return sums

    def _numbers(self, begun: Begun, batch: list[Cell]) -> list[float]:
        return [
            self._own + sum(self._effect(begun, write) for write in cell.writes) for cell in batch
        ]

    def _effect(self, begun: Begun, write: Write) -> float:
        """The estimated effect of one patch."""
        site, positions = write
        name = module_of(site.name)
        # Keys at several positions change the same rows of a pattern: their effects do not add up.
        keys = name in self._fixed and name.rpartition(".")[2] in KEYS
        made = name, positions if keys else None
        if made not in self._tables:
            self._tables[made] = self._table(begun, *made)
        table = self._tables[made]
        point, among = self.model.hook_dict[name], None if keys else positions
        return float(table[index_of(site, point, among, table.ndim, 0)].sum())

    @torch.no_grad()
    def _table(self, begun: Begun, name: str, keys: tuple[int, ...] | None) -> np.ndarray:
        """The effects at a module by position and head; its other axes are summed over.

        Args:
            begun: the run.
            name: the module's point.
            keys: of keys whose pattern is made anew, the positions that are patched, None for all;
                they are summed over, too.

        Raises:
            ValueError: scores of runs that mask other keys, whose difference has no size.
        """
        point = self.model.hook_dict[name]
        if name in self._fixed:
            effects = self._softmax(begun, name, keys)
        else:
            own, other, grad = map(_wide, self._parts(begun, name))
            lowest = torch.finfo(begun.base.cache[name].dtype).min
            if name.endswith("hook_attn_scores") and ((own <= lowest) != (other <= lowest)).any():
                raise ValueError(
                    f"the two runs mask other keys at {name!r}, where scores are as low as can be: "
                    "their difference has no size; name hook_pattern"
                )
            effects = grad * (other - own)
        told = (point.head_axis, point.pos_dim)
        axes = [axis for axis in range(effects.dim()) if axis not in told]
        table: np.ndarray = effects.sum(axes, keepdim=True).cpu().double().numpy()
        return table

    def _parts(self, begun: Begun, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A module's activation in both runs, and the gradient in the one patched into."""
        rows = self.rows_of(begun, name)
        value = begun.base.cache[name]
        own, other = value[rows[self.start]], value[rows[1 - self.start]]
        grad = self._gradients.get(name)
        return own, other, torch.zeros_like(own) if grad is None else grad[rows[self.start]]

    def _softmax(self, begun: Begun, name: str, keys: tuple[int, ...] | None) -> Tensor:
        """The change of the pattern with other queries or keys, times its gradient.

        Returns:
            [rows, query, head, 1], or [rows, 1, kv_head, 1] of keys.
        """
        stem, _, leaf = name.rpartition(".")
        rotary = "_rot" if "_rot_" in leaf else ""
        (q, other_q), (k, other_k) = (
            map(_wide, self._parts(begun, f"{stem}.hook{rotary}_{one}")[:2]) for one in "qk"
        )
        scores = self._parts(begun, f"{stem}.hook_attn_scores")[0]
        pattern, _, grad = map(_wide, self._parts(begun, f"{stem}.hook_pattern"))
        if leaf in QUERIES:
            q = other_q
        else:
            patched = slice(None) if keys is None else list(keys)
            k = k.clone()
            k[:, patched] = other_k[:, patched]
        group = q.shape[2] // k.shape[2]
        made = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(group, 2))
        made = made / k.shape[-1] ** 0.5
        lowest = torch.finfo(scores.dtype).min
        hidden = scores <= lowest
        made = made.masked_fill(hidden, lowest).softmax(-1)
        made = made.masked_fill(hidden.all(-1, keepdim=True), 0)
        effects = (grad * (made - pattern)).sum(-1).transpose(1, 2)
        if leaf in KEYS:
            effects = effects.sum(1, keepdim=True).unflatten(2, (-1, group)).sum(-1)
        columns: Tensor = effects[..., None]
        return columns


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, so that sums of many products keep their digits."""
    return x if x.dtype == torch.float64 else x.float()
