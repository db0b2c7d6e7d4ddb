"""The layout of OpenAI's CLIP repository, with a vision transformer or a ResNet.

The released files are TorchScript archives of these tensors, most of them in float16.
Source: `model.py` of that repository, `build_model` for what the shapes tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hooked_vlm.config import CLIPConfig, ResNetConfig, TokenConfig, VisionConfig
from weights_conversion.original import check_stacks, telling, with_heads
from weights_conversion.rules import (
    ConversionError,
    Rule,
    Shape,
    ignore,
    positions,
    rename,
    split,
    transpose,
    unsqueeze,
)

# Until a tokenizer tells: a text ends at its highest id, as OpenAI's code reads it.
UNTOLD: dict[str, Any] = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 0}


def _blocks(theirs: str, ours: str) -> list[Rule]:
    layer, block = f"{theirs}.resblocks.{{l}}", f"{ours}.blocks.{{l}}"
    return [
        split(f"{layer}.attn.in_proj_{{p}}", [f"{block}.attn.{name}.{{p}}" for name in "qkv"]),
        rename(f"{layer}.attn.out_proj.{{p}}", f"{block}.attn.o.{{p}}"),
        rename(f"{layer}.ln_1.{{p}}", f"{block}.ln1.{{p}}"),
        rename(f"{layer}.ln_2.{{p}}", f"{block}.ln2.{{p}}"),
        rename(f"{layer}.mlp.c_fc.{{p}}", f"{block}.mlp.fc_in.{{p}}"),
        rename(f"{layer}.mlp.c_proj.{{p}}", f"{block}.mlp.fc_out.{{p}}"),
    ]


TEXT = [
    rename("token_embedding.weight", "text.embed.weight"),
    rename("positional_embedding", "text.pos_embed"),
    *_blocks("transformer", "text"),
    rename("ln_final.{p}", "text.ln_final.{p}"),
    transpose("text_projection", "text_proj.weight"),
    rename("logit_scale", "logit_scale"),
    ignore("*attn_mask", because="the causal mask, made anew"),
    *(
        ignore(name, because="a size, which the shapes of the tensors tell too")
        for name in ("input_resolution", "context_length", "vocab_size")
    ),
]

VIT = [
    unsqueeze("visual.class_embedding", "vision.embed.class_token", axes=2),
    rename("visual.conv1.weight", "vision.embed.patch.weight"),
    positions("visual.positional_embedding", "vision.pos_embed", axes=1),
    rename("visual.ln_pre.{p}", "vision.ln_pre.{p}"),
    *_blocks("visual.transformer", "vision"),
    rename("visual.ln_post.{p}", "vision.ln_final.{p}"),
    transpose("visual.proj", "vision_proj.weight"),
]


def _conv(conv: str, norm: str, ours: str) -> list[Rule]:
    return [
        rename(f"{conv}.weight", f"{ours}.conv.weight"),
        rename(f"{norm}.{{p}}", f"{ours}.norm.{{p}}"),
        rename(f"{norm}.running_mean", f"{ours}.norm.mean"),
        rename(f"{norm}.running_var", f"{ours}.norm.var"),
        ignore(f"{norm}.num_batches_tracked", because="used in training only"),
    ]


def resnet(stages: tuple[int, ...]) -> list[Rule]:
    """The image encoder, whose blocks are counted anew in each stage."""
    rules = []
    for number in (1, 2, 3):
        rules += _conv(f"visual.conv{number}", f"visual.bn{number}", f"vision.stem.conv{number}")
    layer = 0
    for stage, size in enumerate(stages, start=1):
        for index in range(size):
            theirs, block = f"visual.layer{stage}.{index}", f"vision.blocks.{layer}"
            for number in (1, 2, 3):
                rules += _conv(
                    f"{theirs}.conv{number}", f"{theirs}.bn{number}", f"{block}.conv{number}"
                )
            if not index:
                sides = f"{theirs}.downsample"
                rules += _conv(f"{sides}.0", f"{sides}.1", f"{block}.downsample")
            layer += 1
    pool = "visual.attnpool"
    return [
        *rules,
        positions(f"{pool}.positional_embedding", "vision.attnpool.pos_embed"),
        *(
            rename(f"{pool}.{name}_proj.{{p}}", f"vision.attnpool.{ours}.{{p}}")
            for name, ours in zip("qkvc", "qkvo", strict=True)
        ),
    ]


def rules(cfg: CLIPConfig) -> list[Rule]:
    """The table for a model of these sizes."""
    vision = resnet(cfg.vision.stages) if isinstance(cfg.vision, ResNetConfig) else VIT
    return [*vision, *TEXT]


def config(shapes: Mapping[str, Shape], overrides: Mapping[str, Mapping[str, Any]]) -> CLIPConfig:
    """The configuration that the shapes tell; the special tokens are the tokenizer's to tell.

    Args:
        shapes: of the checkpoint's tensors.
        overrides: fields by stack that shapes cannot tell, such as `{"text": {"n_heads": 4}}`;
            heads are 64 wide by default, as in every released file, those of a ResNet's pool too.

    Raises:
        ConversionError: a tensor that a CLIP has is missing, a width that is no multiple of 64 and
            no number of heads, or an override of no such stack or field.
    """
    check_stacks(overrides, "clip", ("text",))
    with telling("CLIP"):
        d_vocab, d_model = shapes["token_embedding.weight"]
        text = {
            **_transformer(shapes, "transformer.resblocks"),
            "d_model": d_model,
            "d_vocab": d_vocab,
            "n_ctx": shapes["positional_embedding"][0],
            "causal": True,
            **overrides.get("text", {}),
        }
        return CLIPConfig(
            vision=_vision(shapes, overrides.get("vision", {})),
            text=TokenConfig(**with_heads("text", text)),
            d_proj=shapes["text_projection"][1],
            **UNTOLD,
        )


def _vision(
    shapes: Mapping[str, Shape], overrides: Mapping[str, Any]
) -> VisionConfig | ResNetConfig:
    width, _, _, patch = shapes["visual.conv1.weight"]
    if "visual.attnpool.positional_embedding" in shapes:
        stages: list[int] = []
        while blocks := _count(shapes, f"visual.layer{len(stages) + 1}."):
            stages.append(blocks)
        n_positions, d_model = shapes["visual.attnpool.positional_embedding"]
        if "d_model" in overrides:
            raise ConversionError(
                "config= names the d_model of a ResNet, which follows from its width"
            )
        pool = with_heads("vision", {"d_model": d_model, **overrides})
        del pool["d_model"]
        side = round((n_positions - 1) ** 0.5) * 2 ** (len(stages) + 1)
        sizes = {"stages": tuple(stages), "width": 2 * width, "image_size": side}
        return ResNetConfig(**{**sizes, **pool})
    n_positions = shapes["visual.positional_embedding"][0]
    return VisionConfig(
        **with_heads(
            "vision",
            {
                **_transformer(shapes, "visual.transformer.resblocks"),
                "d_model": width,
                "image_size": round((n_positions - 1) ** 0.5) * patch,
                "patch_size": patch,
                "patch_bias": False,
                "ln_pre": True,
                **overrides,
            },
        )
    )


def _transformer(shapes: Mapping[str, Shape], blocks: str) -> dict[str, Any]:
    return {
        "n_layers": _count(shapes, f"{blocks}."),
        "d_mlp": shapes[f"{blocks}.0.mlp.c_fc.weight"][0],
        "activation": "quick_gelu",
        "eps": 1e-5,
    }


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    numbers = {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    return len(numbers)
