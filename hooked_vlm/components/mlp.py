"""The perceptrons of transformer blocks, plain and gated."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hooked_vlm.components.attention import weight_of
from hooked_vlm.components.hook_point import HookPoint


class MLP(nn.Module):
    """`fc_out(act(fc_in(x)))`.

    Source: BLIP (arXiv 2201.12086) sec. 3.1; the same in ViT, BERT and CLIP.

    Args:
        d_model: width of what it reads.
        d_mlp: width of the hidden layer.
        activation: its name in `transformers.activations.ACT2FN`.
        d_out: width of what it gives; by default `d_model`.
    """

    def __init__(self, d_model: int, d_mlp: int, activation: str, d_out: int | None = None):
        super().__init__()
        self.fc_in = nn.Linear(d_model, d_mlp)
        self.fc_out = nn.Linear(d_mlp, d_out or d_model)
        self.act = ACT2FN[activation]
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        out: Tensor = self.fc_out(self.hook_post(self.act(self.hook_pre(self.fc_in(x)))))
        return out

    # TransformerLens' names: views of the released weights, copies of quantised ones.
    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights."""
        return weight_of(self.fc_in).mT

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_out"]:
        """Output weights."""
        return weight_of(self.fc_out).mT


class GatedMLP(nn.Module):
    """`fc_out(act(fc_gate(x)) * fc_in(x))`, without biases.

    Source: arXiv 2002.05202 sec. 2, as in Llama (arXiv 2302.13971) sec. 2.2.
    """

    def __init__(self, d_model: int, d_mlp: int, activation: str):
        super().__init__()
        self.fc_gate = nn.Linear(d_model, d_mlp, bias=False)
        self.fc_in = nn.Linear(d_model, d_mlp, bias=False)
        self.fc_out = nn.Linear(d_mlp, d_model, bias=False)
        self.act = ACT2FN[activation]
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], of the gate
        self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp]

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        gate = self.act(self.hook_pre(self.fc_gate(x)))
        out: Tensor = self.fc_out(self.hook_post(gate * self.hook_pre_linear(self.fc_in(x))))
        return out

    # TransformerLens' names: views of the released weights, copies of quantised ones.
    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the gate."""
        return weight_of(self.fc_gate).mT

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Input weights, of what the gate multiplies."""
        return weight_of(self.fc_in).mT

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights."""
        return weight_of(self.fc_out).mT
