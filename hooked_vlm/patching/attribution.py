"""Attribution patching: all patches at once, to first order, by gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.models.names import Site
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

    One forward pass of both runs and one backward pass give all sites at once. The estimate is the
    exact effect in the limit of small differences.

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
            interpolated between those of the two runs, at the middles of equal steps; None for the
            gradient of the run that is patched into.
        fix_softmax: at queries and keys, `hook_q` and `hook_k` (of rotary attention `hook_rot_q`
            and `hook_rot_k`), recomputes the pattern with the patched ones and multiplies its
            change with its gradient, since a saturated softmax hides effects from the gradient.
        check: runs the exact sweep, too, or takes its result, and puts the correlation with it into
            `provenance["exact"]`.
        first_token: as in `activation_patching`.
        progress: whether to show a bar.

    Returns:
        As `activation_patching`: `data` is the metric of the run that is patched into, and the
        estimated effect.

    Raises:
        KeyError: sites that nothing matches.
        ValueError: as in `activation_patching`; a metric without a gradient; rotary attention's
            `hook_q` and `hook_k` with `fix_softmax`.
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


def _agreement(estimated: PatchingResult, exact: PatchingResult) -> dict[str, float]:
    """How well the effects of all cells and pairs agree.

    Raises:
        ValueError: results over other sites, places or pairs.
    """
    if estimated.sites != exact.sites or estimated.data.shape != exact.data.shape:
        raise ValueError("check= is a result over other sites, positions or pairs")
    frame = pd.DataFrame(
        {name: one.difference.values.reshape(-1) for name, one in (("a", estimated), ("b", exact))}
    ).dropna()
    ranks = frame.rank()
    return {
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
    points = [f"{stack}.hook_embed" for stack in model.stacks]
    points = [name for name in points if name in model.hook_dict]
    ends, links = model.traced_run(points, **inputs)
    numbers = torch.tensor([start, 1 - start], device=model.device)
    for step in range(steps):

        def mix(x: Tensor, hook: HookPoint, share: float = (step + 0.5) / steps) -> Tensor:
            name, stack = str(hook.name), str(hook.name).partition(".")[0]
            whole = ends.cache[name].detach()
            row, other = (ends.rows(stack, one[None]).to(x.device) for one in numbers)
            there, merge = torch.lerp(whole[row], whole[other], share), links[stack].merge
            if merge is not None:  # what stands for an image comes of the image's own stack
                shown = merge.places.to(x.device)[row][..., None]
                there = torch.where(shown, x[row], there)
            return x.index_copy(0, row, there)

        with model.hooks([(name, mix) for name in points if name in ends.cache]):
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

    def record(self) -> list[str]:
        """Also what patterns are made of, where they are made anew."""
        names = self.modules
        for name in self._fixed:
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

    @property
    def _fixed(self) -> list[str]:
        """The points whose patterns are made anew."""
        leaves = QUERIES + KEYS
        return [n for n in self.modules if self.fix_softmax and n.rpartition(".")[2] in leaves]

    def unpatched(self, names: list[str], keep: int, inputs: Inputs) -> Base:
        """The run of a pair, with gradients."""
        return self.model.traced_run(names, logits_to_keep=keep, **inputs)[0]

    def begin(self, pair: int) -> Iterator[Begun]:
        """Runs a pair, and finds the gradients of each part of its metric."""
        for begun in super().begin(pair):
            if self.steps is None:
                self._gradients = self._found(begun, begun.base)
            else:
                self._gradients = self._averaged(begun, self.steps)
            logits = begun.base.logits.detach()
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
        unpatched = as_numbers(begun.metric(begun.base.logits))[self.start]
        return [
            unpatched + sum(self._effect(begun, write) for write in cell.writes) for cell in batch
        ]

    @torch.no_grad()
    def _effect(self, begun: Begun, write: Write) -> float:
        """The estimated effect of one patch."""
        site, positions = write
        name = module_of(site.name)
        if name in self._fixed:
            return self._softmax(begun, name, site, positions)
        if name not in self._gradients:
            return 0.0  # nothing that the metric reads is computed from it
        own, other, grad = self._parts(begun, name)
        index = index_of(site, self.model.hook_dict[name], positions, own.dim(), 0)
        return float((grad[index] * (other[index] - own[index])).sum())

    def _parts(self, begun: Begun, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A module's activation in both runs, and the gradient in the one patched into."""
        rows = self.rows_of(begun, name)
        value = begun.base.cache[name]
        own, other = value[rows[self.start]], value[rows[1 - self.start]]
        grad = self._gradients.get(name)
        return own, other, torch.zeros_like(own) if grad is None else grad[rows[self.start]]

    def _softmax(
        self, begun: Begun, name: str, site: Site, positions: tuple[int, ...] | None
    ) -> float:
        """The change of the pattern with other queries or keys, times its gradient."""
        stem, _, leaf = name.rpartition(".")
        rotary = "_rot" if "_rot_" in leaf else ""
        q, k = (self._parts(begun, f"{stem}.hook{rotary}_{one}")[:2] for one in "qk")
        scores = self._parts(begun, f"{stem}.hook_attn_scores")[0]
        pattern, _, grad = self._parts(begun, f"{stem}.hook_pattern")
        patched = [q[0].clone(), k[0].clone()]
        which = 0 if leaf in QUERIES else 1
        index = index_of(site, self.model.hook_dict[name], positions, 4, 0)
        patched[which][index] = (q, k)[which][1][index]
        group = pattern.shape[1] // patched[1].shape[2]
        keys = patched[1].repeat_interleave(group, 2)
        new = torch.einsum("bqhd,bkhd->bhqk", patched[0], keys) / keys.shape[-1] ** 0.5
        hidden = scores <= torch.finfo(scores.dtype).min
        new = new.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        new = new.masked_fill(hidden.all(-1, keepdim=True), 0)
        return float((grad * (new - pattern)).sum())
