"""CLIPs for the general tests: a vision transformer beside transformers', a ResNet beside ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import openai_clip
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.clip import modeling_clip
from zoo import Reference, randomize, same

from hooked_vlm import HookedCLIP
from hooked_vlm.models.loading import assign
from weights_conversion import InMemory
from weights_conversion.clip_original import config, rules


def _eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    """transformers' eager attention, whose softmax computes in float32 whatever it is given.

    In float32 the two are the same.
    """
    scores = q @ k.mT * scaling
    pattern = (scores if mask is None else scores + mask).softmax(-1)
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


modeling_clip.eager_attention_forward = _eager


@dataclass(frozen=True)
class ClipMember:
    """One CLIP of the zoo.

    Attributes:
        vision: width, layers and heads of a vision transformer; a ResNet's width, heads, stages.
        text: width, layers and heads.
        eos: the end-of-text token of the configuration; 2 means the highest id of a text.
    """

    vision: tuple[int, int, int] | tuple[int, int, tuple[int, ...]]
    text: tuple[int, int, int]
    image: int = 24
    patch: int = 8
    vocab: int = 37
    mlp: int = 3
    activation: str = "quick_gelu"
    eos: int = 36
    d_proj: int = 10
    n_ctx: int = 12
    std: float | None = None

    task = "clip"

    def __str__(self) -> str:
        vision = "x".join(map(str, self.vision)).replace(", ", "-")
        return f"clip-{vision}-{'x'.join(map(str, self.text))}-{self.activation}-{self.eos}"

    @property
    def stages(self) -> tuple[int, ...] | None:
        """Those of a ResNet, else None."""
        return self.vision[2] if isinstance(self.vision[2], tuple) else None

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[Any, HookedCLIP]:
        """The reference and ours, of the same weights."""
        if self.stages is None:
            theirs: Any = self._transformers()
            randomize(theirs, self.std)
            theirs = theirs.to(dtype)
            return theirs, HookedCLIP.from_hf(theirs)
        theirs = self.openai().to(dtype)
        return theirs, of_openai(theirs, self.vision[1], self.text[2], eos_token_id=self.eos)

    def model(self, dtype: torch.dtype = torch.float64) -> HookedCLIP:
        """Ours alone."""
        return self.pair(dtype)[1]

    def inputs(
        self,
        rows: int = 3,
        images: int | None = None,
        padded: bool = True,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """`rows` texts, of unequal lengths where `padded`, and as many images or another number."""
        generator = torch.Generator().manual_seed(seed)
        shape = (rows if images is None else images, 3, self.image, self.image)
        pixels = torch.randn(shape, generator=generator).to(dtype)
        lengths = torch.tensor([5 - i % 3 if padded else 4 for i in range(rows)])[:, None]
        at = torch.arange(int(lengths.max()))
        ids = torch.randint(3, self.vocab - 1, (rows, len(at)), generator=generator)
        ids = ids.masked_fill(at >= lengths - 1, self.vocab - 1)  # as CLIP's tokenizer pads
        mask = (at < lengths).long()
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}

    @staticmethod
    def chosen(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        """The inputs of some rows of the logits: images, each of which reads all texts."""
        return inputs | {"pixel_values": inputs["pixel_values"][rows]}

    def logits(self, theirs: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The reference's."""
        if self.stages is None:
            return theirs(**inputs).logits_per_image
        return theirs(inputs["pixel_values"], inputs["input_ids"])

    def _transformers(self) -> Any:
        (dv, lv, hv), (dt, lt, ht) = self.vision, self.text
        shared = {"hidden_act": self.activation, "projection_dim": self.d_proj}
        config = transformers.CLIPConfig(
            vision_config={
                "hidden_size": dv,
                "num_hidden_layers": lv,
                "num_attention_heads": hv,
                "intermediate_size": self.mlp * dv,
                "image_size": self.image,
                "patch_size": self.patch,
                **shared,
            },
            text_config={
                "hidden_size": dt,
                "num_hidden_layers": lt,
                "num_attention_heads": ht,
                "intermediate_size": self.mlp * dt,
                "vocab_size": self.vocab,
                "max_position_embeddings": self.n_ctx,
                "eos_token_id": self.eos,
                "bos_token_id": 1,
                "pad_token_id": self.vocab - 1,
                **shared,
            },
            projection_dim=self.d_proj,
            attn_implementation="eager",
        )
        return transformers.CLIPModel(config).eval()

    def openai(self) -> openai_clip.CLIP:
        """The model in plain PyTorch, with random weights."""
        if self.stages is None:
            dv, lv, hv = self.vision
            vision: nn.Module = openai_clip.VisionTransformer(
                self.image, self.patch, dv, lv, hv, self.d_proj
            )
        else:
            width, heads, stages = self.vision
            vision = openai_clip.ModifiedResNet(stages, width, self.image, heads, self.d_proj)
        theirs = openai_clip.CLIP(vision, self.d_proj, *self.text, self.vocab, self.n_ctx).eval()
        randomize(theirs, self.std)
        generator = torch.Generator().manual_seed(1)
        for name, statistic in theirs.named_buffers():
            if name.endswith("running_var"):
                statistic.uniform_(0.5, 2, generator=generator)
            elif name.endswith("running_mean"):
                statistic.normal_(0, 0.5, generator=generator)
        return theirs

    def table(self) -> dict[str, Reference]:
        """For each of our hook names the tensor of the reference that it must equal."""
        if self.stages is None:
            names = {
                "vision.ln_pre.hook_normalized": ("vision_model.pre_layrnorm", "in", standard),
                "hook_image_embeds": ("visual_projection", "out", _unit),
                "hook_text_embeds": ("text_projection", "out", _unit),
                "vision.hook_embed": ("vision_model.embeddings.patch_embedding", "out", patches),
                "text.hook_embed": ("text_model.embeddings.token_embedding", "out", same),
                "text.hook_pos_embed": ("text_model.embeddings.position_embedding", "out", same),
                "text.ln_final.hook_normalized": ("text_model.final_layer_norm", "in", standard),
            }
            for stack, sizes in (("vision", self.vision), ("text", self.text)):
                names |= blocks(stack, f"{stack}_model", sizes[1])
            return names
        return _resnet(self.stages)


def of_openai(theirs: nn.Module, vision_heads: int, text_heads: int, **ids: int) -> HookedCLIP:
    """Ours, of the weights of a model in plain PyTorch."""
    state = InMemory(theirs.state_dict())
    heads = {"vision": {"n_heads": vision_heads}, "text": {"n_heads": text_heads}}
    cfg = config(state.shapes, heads)
    with torch.device("meta"):
        model = HookedCLIP(cfg)
    assign(model, state, rules(cfg))
    return model.eval()


def patches(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def standard(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _first(x: Tensor) -> Tensor:
    return x.flatten(1)


def blocks(stack: str, module: str, layers: int) -> dict[str, Reference]:
    rows: dict[str, Reference] = {}
    for layer in range(layers):
        ours, theirs = f"{stack}.blocks.{layer}", f"{module}.encoder.layers.{layer}"
        attn = f"{theirs}.self_attn"
        rows |= {
            f"{ours}.hook_resid_pre": (theirs, "in", same),
            f"{ours}.ln1.hook_normalized": (f"{theirs}.layer_norm1", "in", standard),
            f"{ours}.attn.hook_q_in": (f"{theirs}.layer_norm1", "out", same),
            f"{ours}.attn.hook_kv_in": (f"{theirs}.layer_norm1", "out", same),
            f"{ours}.attn.hook_q": (f"{attn}.q_proj", "out", same),
            f"{ours}.attn.hook_k": (f"{attn}.k_proj", "out", same),
            f"{ours}.attn.hook_v": (f"{attn}.v_proj", "out", same),
            f"{ours}.attn.hook_pattern": (attn, "probs", same),
            f"{ours}.attn.hook_z": (f"{attn}.out_proj", "in", same),
            f"{ours}.hook_attn_out": (f"{attn}.out_proj", "out", same),
            f"{ours}.hook_resid_mid": (f"{theirs}.layer_norm2", "in", same),
            f"{ours}.hook_mlp_in": (f"{theirs}.layer_norm2", "in", same),
            f"{ours}.ln2.hook_normalized": (f"{theirs}.layer_norm2", "in", standard),
            f"{ours}.mlp.hook_pre": (f"{theirs}.mlp.fc1", "out", same),
            f"{ours}.mlp.hook_post": (f"{theirs}.mlp.fc2", "in", same),
            f"{ours}.hook_mlp_out": (f"{theirs}.mlp.fc2", "out", same),
            f"{ours}.hook_resid_post": (theirs, "out", same),
        }
    return rows


def _conv(ours: str, theirs: str, number: int, relu: bool = True) -> dict[str, Reference]:
    rows: dict[str, Reference] = {f"{ours}.hook_conv": (f"{theirs}conv{number}", "out", same)}
    if relu:
        rows[f"{ours}.hook_pre"] = (f"{theirs}bn{number}", "out", same)
        rows[f"{ours}.hook_post"] = (f"{theirs}relu{number}", "out", same)
    return rows


def _resnet(stages: tuple[int, ...]) -> dict[str, Reference]:
    rows: dict[str, Reference] = {
        "hook_image_embeds": ("visual.attnpool", "out", _unit),
        "vision.hook_embed": ("visual.avgpool", "out", same),
        "vision.attnpool.hook_pattern": ("visual.attnpool", "probs", same),
    }
    for number in (1, 2, 3):
        rows |= _conv(f"vision.stem.conv{number}", "visual.", number)
    layer = 0
    for stage, blocks in enumerate(stages):
        for index in range(blocks):
            ours, theirs = f"vision.blocks.{layer}", f"visual.layer{stage + 1}.{index}"
            for number in (1, 2, 3):
                rows |= _conv(f"{ours}.conv{number}", f"{theirs}.", number, number < 3)
            rows |= {
                f"{ours}.hook_resid_pre": (theirs, "in", same),
                f"{ours}.hook_conv_out": (f"{theirs}.bn3", "out", same),
                f"{ours}.hook_skip": (theirs, "in", same),
                f"{ours}.hook_resid_mid": (f"{theirs}.relu3", "in", same),
                f"{ours}.hook_resid_post": (theirs, "out", same),
            }
            if not index:
                rows[f"{ours}.downsample.hook_conv"] = (f"{theirs}.downsample.0", "out", same)
                rows[f"{ours}.hook_skip"] = (f"{theirs}.downsample", "out", same)
            layer += 1
        rows[f"vision.blocks.{layer - 1}.hook_stage_out"] = (
            f"visual.layer{stage + 1}",
            "out",
            same,
        )
    return rows


CLIP_VIT = ClipMember((15, 2, 3), (16, 2, 2), image=16)
CLIP_RESNET = ClipMember((4, 2, (2, 1)), (16, 2, 2), image=16, mlp=4, eos=2)
# What the tests of hooks and of resuming run on.
CLIP = CLIP = [CLIP_VIT, CLIP_RESNET]
# Further shapes, for parity with the references.
CLIP_PARITY = [
    ClipMember((24, 2, 3), (20, 2, 4)),
    ClipMember((24, 3, 2), (30, 1, 5), image=20, patch=10, activation="gelu", eos=2),
    ClipMember((12, 1, 6), (12, 3, 2), patch=4, activation="gelu"),
]
RESNET_PARITY = [
    ClipMember((4, 4, (1, 1, 1, 1)), (16, 2, 2), image=64, eos=2),
    ClipMember((8, 2, (3, 4, 6, 3)), (20, 1, 5), image=64, eos=2),  # RN50's stages
    ClipMember((2, 1, (2, 3)), (12, 2, 3), image=40, eos=2),
]
BASE = ClipMember((768, 12, 12), (512, 12, 8), 224, 32, 49408, 4, eos=49407, d_proj=512, n_ctx=77)
LARGE = ClipMember((1024, 24, 16), (768, 12, 12), 224, 14, 49408, 4, eos=2, d_proj=768, n_ctx=77)
