"""CLIP once more, in plain PyTorch, with the module names of OpenAI's repository.

Written from the published architecture (arXiv 2103.00020, `model.py`) and independent of the
package: what its models give is the reference of ResNets, and the names of its tensors are those
of the released files.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU())]
        self.mlp = nn.Sequential(OrderedDict([*layers, ("c_proj", nn.Linear(4 * width, width))]))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, d_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, d_out))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu3 = nn.ReLU()
        self.downsample = None
        if stride > 1 or inplanes != planes * 4:
            pooled = [("-1", nn.AvgPool2d(stride))]
            conv = [("0", nn.Conv2d(inplanes, planes * 4, 1, bias=False))]
            norm = [("1", nn.BatchNorm2d(planes * 4))]
            self.downsample = nn.Sequential(OrderedDict([*pooled, *conv, *norm]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        return self.relu3(out + (x if self.downsample is None else self.downsample(x)))


class AttentionPool2d(nn.Module):
    def __init__(self, side: int, embed_dim: int, heads: int, d_out: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, embed_dim))
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.c_proj = nn.Linear(embed_dim, d_out)
        self.heads = heads

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x]) + self.positional_embedding[:, None]
        pooled, pattern = F.multi_head_attention_forward(
            query=x[:1],
            key=x,
            value=x,
            embed_dim_to_check=x.shape[-1],
            num_heads=self.heads,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            in_proj_weight=None,
            in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias,
            use_separate_proj_weight=True,
            training=False,
            average_attn_weights=False,
        )
        return pooled[0], pattern


class ModifiedResNet(nn.Module):
    def __init__(self, stages: tuple[int, ...], width: int, size: int, heads: int, d_out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu3 = nn.ReLU()
        self.avgpool = nn.AvgPool2d(2)
        self.stages = len(stages)
        inplanes = width
        for stage, blocks in enumerate(stages):
            planes, made = width * 2**stage, []
            for index in range(blocks):
                made.append(Bottleneck(inplanes, planes, 2 if stage and not index else 1))
                inplanes = planes * 4
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
        side = size // 2 ** (len(stages) + 1)
        self.attnpool = AttentionPool2d(side, inplanes, heads, d_out)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            conv, bn, relu = (getattr(self, f"{part}{i}") for part in ("conv", "bn", "relu"))
            x = relu(bn(conv(x)))
        x = self.avgpool(x)
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.attnpool(x)[0]


class CLIP(nn.Module):
    def __init__(
        self, visual: nn.Module, d_out: int, width: int, layers: int, heads: int, vocab: int, n: int
    ):
        super().__init__()
        self.visual = visual
        self.transformer = Transformer(width, layers, heads)
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.randn(n, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, d_out))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_text(self, text: Tensor) -> Tensor:
        n = text.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=self.text_projection.dtype).triu(1)
        x = self.token_embedding(text) + self.positional_embedding[:n]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), text.argmax(dim=-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self.visual(image), self.encode_text(text)
        image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
        return self.logit_scale.exp() * image @ text.t()


def released(model: nn.Module, size: int, context: int, vocab: int) -> dict[str, Tensor]:
    """The tensors of a released file: the model's, and three sizes."""
    state = dict(model.state_dict())
    sizes = {"input_resolution": size, "context_length": context, "vocab_size": vocab}
    return state | {name: torch.tensor(value) for name, value in sizes.items()}
