"""Norms with their divisor and their normalized input in sight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components.hook_point import HookPoint


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last axis.

    Source: arXiv 1607.06450. Fused unless somebody listens.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.hook_scale = HookPoint()  # [batch, pos, 1], float32 in half-precision models
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        if not (self.hook_scale.listening or self.hook_normalized.listening):
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x if x.dtype == torch.float64 else x.float()  # as the fused kernel computes
        if self.hook_scale.reads_only:
            normalized, _, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, self.eps)
            self.hook_scale(rstd.reciprocal())
        else:
            centred = wide - wide.mean(-1, keepdim=True)
            scale = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
            normalized = centred / self.hook_scale(scale)
        normalized = normalized.to(x.dtype)
        return torch.addcmul(self.bias, self.hook_normalized(normalized), self.weight)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis.

    Source: arXiv 1910.07467, as in Llama (arXiv 2302.13971) sec. 2.2.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.hook_scale = HookPoint()  # [batch, pos, 1], float32 in half-precision models
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = self.hook_scale((wide.square().mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale).to(x.dtype)) * self.weight
