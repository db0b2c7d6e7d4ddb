"""Which table and which configuration a CLIP checkpoint needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from hooked_vlm.config import CLIPConfig, ResNetConfig, TokenConfig, VisionConfig
from weights_conversion import clip_hf, clip_original, clip_processor, families, shapes_of
from weights_conversion.files import Checkpoint, InMemory
from weights_conversion.rules import ConversionError, Rule, Shape, rename

OURS = "hooked_clip"  # the model_type of folders that transformers has no class for: ResNets
find_processor = clip_processor.find


def read(
    checkpoint: Checkpoint | InMemory,
    hf_config: Mapping[str, Any] | None,
    task: str | None,
    overrides: Mapping[str, Any],
) -> tuple[CLIPConfig, list[Rule]]:
    """The configuration and the table for a checkpoint.

    Args:
        checkpoint: its files.
        hf_config: its `config.json`, None for a bare file.
        task: `clip` or None.
        overrides: fields of the stacks' configurations that a bare file cannot tell.

    Raises:
        ConversionError: no CLIP.
    """
    shapes = checkpoint.shapes
    families.expect("clip", shapes, hf_config, overrides)
    families.ask(task, ["clip"])
    if hf_config is None:
        if any(name.startswith("text_model.") for name in shapes):
            where = ", ".join(map(str, checkpoint.files))
            raise ConversionError(
                f"{where} holds tensors of transformers' layout without the config.json that tells "
                "their sizes; name the folder that holds both"
            )
        cfg = clip_original.config(shapes, overrides)
        return cfg, clip_original.rules(cfg)
    if hf_config["model_type"] == OURS:
        return from_dict(hf_config), [rename(name, name) for name in shapes]
    try:
        full = transformers.CLIPConfig.from_dict(dict(hf_config)).to_dict()
        return clip_hf.config(full), clip_hf.RULES
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"config.json is no CLIP configuration: {error}") from error


def write(cfg: CLIPConfig) -> tuple[dict[str, Any], list[Rule] | None]:
    """The `config.json` to write and its table; no table for a ResNet, in our own layout."""
    if isinstance(cfg.vision, ResNetConfig):
        return {"model_type": OURS, **asdict(cfg)}, None
    config = transformers.CLIPConfig(
        text_config={
            **clip_hf.fields(cfg.text),
            "vocab_size": cfg.text.d_vocab,
            "max_position_embeddings": cfg.text.n_ctx,
            "projection_dim": cfg.d_proj,
            "eos_token_id": cfg.eos_token_id,
            "bos_token_id": cfg.bos_token_id,
            "pad_token_id": cfg.pad_token_id,
        },
        vision_config={
            **clip_hf.fields(cfg.vision),
            "image_size": cfg.vision.image_size,
            "patch_size": cfg.vision.patch_size,
            "projection_dim": cfg.d_proj,
        },
        projection_dim=cfg.d_proj,
        architectures=["CLIPModel"],
    )
    return config.to_dict(), clip_hf.RULES


def from_dict(config: Mapping[str, Any]) -> CLIPConfig:
    """Our configuration from a `config.json` of our own layout.

    Raises:
        ConversionError: fields that are missing or that it does not have.
    """
    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        vision = dict(fields["vision"])
        if "stages" in vision:
            fields["vision"] = ResNetConfig(**vision | {"stages": tuple(vision["stages"])})
        else:
            fields["vision"] = VisionConfig(**vision)
        fields["text"] = TokenConfig(**fields["text"])
        return CLIPConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"config.json is none of ours: {error}") from error


def shapes(cfg: CLIPConfig) -> dict[str, Shape]:
    """The shapes of a model's tensors, by our names."""
    found = shapes_of.tokens("text", cfg.text)
    found |= shapes_of.norm("text.ln_final", cfg.text.d_model)
    found["text_proj.weight"] = (cfg.d_proj, cfg.text.d_model)
    found["logit_scale"] = ()
    if isinstance(cfg.vision, ResNetConfig):
        return found | _resnet(cfg.vision, cfg.d_proj)
    found["vision_proj.weight"] = (cfg.d_proj, cfg.vision.d_model)
    return found | shapes_of.vision(cfg.vision)


def _resnet(cfg: ResNetConfig, d_out: int) -> dict[str, Shape]:
    half, d_in, layer = cfg.width // 2, cfg.width, 0
    found = _conv("vision.stem.conv1", 3, half, 3)
    found |= _conv("vision.stem.conv2", half, half, 3)
    found |= _conv("vision.stem.conv3", half, cfg.width, 3)
    for stage, size in enumerate(cfg.stages):
        inner = cfg.width * 2**stage
        for index in range(size):
            block = f"vision.blocks.{layer}"
            found |= _conv(f"{block}.conv1", d_in, inner, 1)
            found |= _conv(f"{block}.conv2", inner, inner, 3)
            found |= _conv(f"{block}.conv3", inner, 4 * inner, 1)
            if not index:
                found |= _conv(f"{block}.downsample", d_in, 4 * inner, 1)
            d_in, layer = 4 * inner, layer + 1
    found["vision.attnpool.pos_embed"] = (cfg.n_ctx, d_in)
    return found | shapes_of.attention("vision.attnpool", d_in, d_in, d_out)


def _conv(name: str, d_in: int, d_out: int, kernel: int) -> dict[str, Shape]:
    norm = {f"{name}.norm.{part}": (d_out,) for part in ("weight", "bias", "mean", "var")}
    return {f"{name}.conv.weight": (d_out, d_in, kernel, kernel), **norm}
