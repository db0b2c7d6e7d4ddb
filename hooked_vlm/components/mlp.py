"""The two-layer perceptron of a transformer block."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.config import StackConfig


class MLP(nn.Module):
    """`fc_out(act(fc_in(x)))`.

    Source: BLIP (arXiv 2201.12086) sec. 3.1; the same in ViT and BERT.
    """

    def __init__(self, cfg: StackConfig):
        super().__init__()
        self.fc_in = nn.Linear(cfg.d_model, cfg.d_mlp)
        self.fc_out = nn.Linear(cfg.d_mlp, cfg.d_model)
        self.act = ACT2FN[cfg.activation]
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        out: Tensor = self.fc_out(self.hook_post(self.act(self.hook_pre(self.fc_in(x)))))
        return out

    # TransformerLens' names: views of the released weights.
    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights."""
        return self.fc_in.weight.mT

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights."""
        return self.fc_out.weight.mT
