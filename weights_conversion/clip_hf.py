"""The layout of `transformers`' CLIPModel, versions 4 and 5.

Source: `modeling_clip.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hooked_vlm.config import CLIPConfig, TokenConfig, VisionConfig
from weights_conversion.rules import Rule, ignore, rename, unsqueeze


def block(theirs: str, ours: str) -> list[Rule]:
    """The table of a block, by its name there and here."""
    return [
        *(
            rename(f"{theirs}.self_attn.{name}_proj.{{p}}", f"{ours}.attn.{name}.{{p}}")
            for name in "qkv"
        ),
        rename(f"{theirs}.self_attn.out_proj.{{p}}", f"{ours}.attn.o.{{p}}"),
        rename(f"{theirs}.layer_norm1.{{p}}", f"{ours}.ln1.{{p}}"),
        rename(f"{theirs}.layer_norm2.{{p}}", f"{ours}.ln2.{{p}}"),
        rename(f"{theirs}.mlp.fc1.{{p}}", f"{ours}.mlp.fc_in.{{p}}"),
        rename(f"{theirs}.mlp.fc2.{{p}}", f"{ours}.mlp.fc_out.{{p}}"),
    ]


def vision(theirs: str) -> list[Rule]:
    """The table of the image encoder up to its last block, by the name that it has there."""
    embeddings = f"{theirs}.embeddings"
    return [
        unsqueeze(f"{embeddings}.class_embedding", "vision.embed.class_token", axes=2),
        rename(f"{embeddings}.patch_embedding.weight", "vision.embed.patch.weight"),
        unsqueeze(f"{embeddings}.position_embedding.weight", "vision.pos_embed", axes=1),
        rename(f"{theirs}.pre_layrnorm.{{p}}", "vision.ln_pre.{p}"),  # as transformers spells it
        *block(f"{theirs}.encoder.layers.{{l}}", "vision.blocks.{l}"),
    ]


RULES = [
    *vision("vision_model"),
    rename("vision_model.post_layernorm.{p}", "vision.ln_final.{p}"),
    rename("visual_projection.weight", "vision_proj.weight"),
    rename("text_model.embeddings.token_embedding.weight", "text.embed.weight"),
    rename("text_model.embeddings.position_embedding.weight", "text.pos_embed"),
    *block("text_model.encoder.layers.{l}", "text.blocks.{l}"),
    rename("text_model.final_layer_norm.{p}", "text.ln_final.{p}"),
    rename("text_projection.weight", "text_proj.weight"),
    rename("logit_scale", "logit_scale"),
    ignore("*.position_ids", because="a buffer of indices, made anew"),
]


def config(hf: Mapping[str, Any]) -> CLIPConfig:
    """Our configuration of a `transformers.CLIPConfig`, as a dictionary with all its defaults.

    Raises:
        ValueError: sizes that are no single numbers, or several end-of-text tokens.
    """
    vision, text = hf["vision_config"], hf["text_config"]
    for part, name in ((vision, "image_size"), (vision, "patch_size"), (text, "eos_token_id")):
        if not isinstance(part[name], int):
            raise ValueError(f"{name} is {part[name]!r}, HookedCLIP needs one number")
    return CLIPConfig(
        vision=VisionConfig(
            **sizes(vision),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            patch_bias=False,
            ln_pre=True,
        ),
        text=TokenConfig(
            **sizes(text),
            d_vocab=text["vocab_size"],
            n_ctx=text["max_position_embeddings"],
            causal=True,
        ),
        d_proj=hf["projection_dim"],
        eos_token_id=text["eos_token_id"],
        bos_token_id=text["bos_token_id"],
        pad_token_id=text["pad_token_id"],
    )


def sizes(part: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of one of our stacks, of a part of the configuration."""
    return {
        "d_model": part["hidden_size"],
        "n_layers": part["num_hidden_layers"],
        "n_heads": part["num_attention_heads"],
        "d_mlp": part["intermediate_size"],
        "activation": part["hidden_act"],
        "eps": part["layer_norm_eps"],
    }


def fields(cfg: VisionConfig | TokenConfig) -> dict[str, Any]:
    """What `sizes` reads, of one of our stacks."""
    return {
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "intermediate_size": cfg.d_mlp,
        "hidden_act": cfg.activation,
        "layer_norm_eps": cfg.eps,
    }
