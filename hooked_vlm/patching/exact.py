"""Logits as sums of what was added to a stream: exact, where a linear map makes them of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vlm.components.hook_point import HookPoint, reads_only
from hooked_vlm.components.norm import LayerNorm
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base
from hooked_vlm.models.names import Site
from hooked_vlm.patching.metrics import Metric


def indirect(model: HookedVLM) -> str | None:
    """Why no logit of a model is a sum over a stream, None if they are."""
    last = list(model.stacks)[-1]
    if not model.stacks[last].pre_norm:
        return f"{last!r} is a post-norm stack: its stream is no sum of what its parts add"
    if not isinstance(model._modules.get("unembed"), nn.Linear):
        return f"no linear map makes the logits of the stream of {last!r}"
    return None


def disturbed(found: list[dict[str, Any]], names: Sequence[str], metric: Metric) -> str | None:
    """Why, with hooks that write, parts do not add up to the metric; None if they do."""
    for one, name in zip(found, names, strict=True):
        if not gap(one) <= one["rounding"]:  # NaN adds up to nothing
            return (
                f"the parts of input {name!r} add up to {sum(one['direct']):.6g}, its "
                f"{metric.name} is {one['metric']:.6g}: standing hooks write what heads give, the "
                "stream or the logits, which are none of the parts; model.reset_hooks() ends them"
            )
    return None


def gap(one: Mapping[str, Any]) -> float:
    """The distance of an input's metric from the sum of its parts."""
    return abs(float(sum(one["direct"]) - one["metric"]))


def _rounding(model: HookedVLM, along: Float[Tensor, "token d_model"]) -> float:
    """How far rounding in the model's dtype may take a sum of logits from that of its parts.

    The step of a stream as long as the final norm makes it, along what makes each logit of it: far
    more than steps of all layers, in directions drawn at random, come to.
    """
    length: float = along.norm(dim=1).sum().item() * along.shape[1] ** 0.5
    return 4 * float(torch.finfo(model.dtype).eps) * length


def slope_of(metric: Metric, logits: Tensor) -> Tensor | None:
    """What a metric multiplies the last position's logits by, [d_out]; None if it is no such sum.

    A sum has one gradient everywhere, and is its product with the logits.
    """
    drawn = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    slopes = []
    for given in (logits, drawn, -drawn):
        with torch.inference_mode(False), torch.enable_grad():
            at = given.detach().clone().requires_grad_()
            value = metric(at).sum()
            if not value.requires_grad:
                return None
            (slope,) = torch.autograd.grad(value, at, allow_unused=True, materialize_grads=True)
        terms = (slope * at.detach()).double()
        near = 100 * torch.finfo(logits.dtype).eps
        if abs(value.item() - terms.sum()) > near * terms.abs().sum():
            return None
        slopes.append(slope)
    same = all(torch.allclose(slope, slopes[0], rtol=near, atol=0) for slope in slopes)
    return slopes[0][0, -1] if same and not slopes[0][:, :-1].any() else None


@torch.no_grad()
def direct(
    model: HookedVLM, base: Base, slope: Tensor, sources: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """What adds up to a weighted sum of the last position's logits."""
    stack = list(model.stacks)[-1]
    module: Any = model.stacks[stack]
    seen = _last(model, base, stack)
    tokens = slope.nonzero().flatten()
    weights, norm = slope[tokens].double(), module.ln_final
    each = weights[:, None] * model.tokens_to_residual_directions(tokens).double()
    rounding, toward = _rounding(model, each * norm.weight), each.sum(0)
    along = norm.weight.double() * toward
    if isinstance(norm, LayerNorm):
        along = along - along.mean()  # the norm takes the mean out
    along = along / seen[f"{stack}.ln_final.hook_scale"]
    bias = float(model.b_U[tokens].double() @ weights)
    if isinstance(norm, LayerNorm):
        bias += float(norm.bias.double() @ toward)
    heads, mlps = [], []
    for layer, block in enumerate(module.block_list):
        name, attn = f"{stack}.blocks.{layer}", block.attn
        here = along.to(attn.b_O.device)
        out = attn.W_O.double() @ here  # [head, d_head]
        values = base.stacks[stack].own[layer][1][0].double().repeat_interleave(attn.group, 1)
        given = torch.einsum("shd,hd->hs", values, out) * seen[f"{name}.attn.hook_pattern"]
        heads.append(np.stack([given[:, list(at)].sum(1).cpu() for at in sources.values()], 1))
        mlps.append(float(seen[f"{name}.hook_mlp_out"] @ here))
        bias += float(attn.b_O.double() @ here)
    stream = seen[f"{stack}.blocks.0.hook_resid_pre"]
    embed = float(stream @ along.to(stream.device))
    by_source = np.sum(heads, (0, 1)).tolist()
    direct = [*by_source, sum(mlps), embed, bias]
    return {"heads": heads, "mlps": mlps, "direct": direct, "rounding": rounding}


def _last(model: HookedVLM, base: Base, stack: str) -> dict[str, Tensor]:
    """What the last position's stream is made of, by a pass of that position alone."""
    layers = range(model.stacks[stack].cfg.n_layers)
    leaves = ("attn.hook_pattern", "hook_mlp_out")
    names = [f"{stack}.blocks.{layer}.{leaf}" for layer in layers for leaf in leaves]
    names += [f"{stack}.blocks.0.hook_resid_pre", f"{stack}.ln_final.hook_scale"]
    seen: dict[str, Tensor] = {}

    @reads_only
    def keep(value: Tensor, hook: HookPoint) -> None:
        axis = hook.pos_dim or 1
        seen[str(hook.name)] = value[0].select(axis - 1, value.shape[axis] - 1).double()

    sites = [Site.parse(name, -1) for name in names]
    model.resume(base, sites, fwd_hooks=[(name, keep) for name in names])
    return seen
