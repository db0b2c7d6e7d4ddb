"""Which table and which configuration a BLIP checkpoint needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from transformers import BlipConfig

from hooked_vlm.config import BLIPConfig, Task, TextConfig, VisionConfig
from weights_conversion import blip_hf, blip_original
from weights_conversion.files import Checkpoint
from weights_conversion.rules import ConversionError, Rule, rename

OURS = "hooked_blip"  # the model_type of folders that transformers has no class for


def read(
    checkpoint: Checkpoint,
    hf_config: Mapping[str, Any] | None,
    task: str | None,
    overrides: Mapping[str, Any],
    **special: int,
) -> tuple[BLIPConfig, list[Rule]]:
    """The configuration and the table for a checkpoint.

    Args:
        checkpoint: its files.
        hf_config: its `config.json`, None for a bare file.
        task: the task asked for, None to read it from the tensors.
        overrides: fields of the stacks' configurations that a bare file cannot tell.
        **special: ids of special tokens, for a bare file.

    Raises:
        ConversionError: no BLIP, or one whose task cannot be told or is another.
    """
    shapes = checkpoint.shapes
    if hf_config is not None and hf_config.get("model_type") == OURS:
        cfg = from_dict(hf_config)
        return cfg, [rename(name, name) for name in shapes]
    found = blip_hf.tasks(shapes)
    if task is not None and task not in found:
        raise ConversionError(f"task={task!r}, but the tensors are those of {', '.join(found)}")
    if task is None and len(found) > 1:
        raise ConversionError(
            f"the tensors serve several tasks; pass task= one of {', '.join(found)}"
        )
    known: Task = next(name for name in found if task in (None, name))
    if hf_config is None:
        original = any(name.startswith("visual_encoder.") for name in shapes)
        if not original:
            raise ConversionError(
                f"{checkpoint.files[0]} holds tensors of transformers' layout without the "
                "config.json that tells their sizes; name the folder that holds both"
            )
        cfg = blip_original.config(shapes, known, overrides, **special)
        return cfg, blip_original.RULES[known]
    if hf_config.get("model_type") != "blip":
        raise ConversionError(
            f"config.json is of model_type {hf_config.get('model_type')!r}, this class reads 'blip'"
        )
    if overrides:
        raise ConversionError("config= is for bare files; this checkpoint has a config.json")
    full = BlipConfig.from_dict(dict(hf_config)).to_dict()
    return blip_hf.config(full, known), blip_hf.RULES[known]


def write(cfg: BLIPConfig) -> tuple[dict[str, Any], list[Rule] | None]:
    """The `config.json` to write and its table; no table for a folder of our own layout."""
    text = cfg.text or cfg.decoder
    assert text is not None
    plain = cfg.decoder is None or cfg.decoder.d_source == cfg.vision.d_model
    same = cfg.text is None or cfg.decoder is None or _sizes(cfg.text) == _sizes(cfg.decoder)
    if not (plain and same):
        return {"model_type": OURS, **asdict(cfg)}, None
    config = BlipConfig(
        text_config={
            "vocab_size": text.d_vocab,
            "hidden_size": text.d_model,
            "encoder_hidden_size": cfg.vision.d_model,
            "intermediate_size": text.d_mlp,
            "num_hidden_layers": text.n_layers,
            "num_attention_heads": text.n_heads,
            "max_position_embeddings": text.n_ctx,
            "hidden_act": text.activation,
            "layer_norm_eps": text.eps,
            "bos_token_id": cfg.bos_token_id,
            "sep_token_id": cfg.sep_token_id,
            "pad_token_id": cfg.pad_token_id,
        },
        vision_config={
            "hidden_size": cfg.vision.d_model,
            "intermediate_size": cfg.vision.d_mlp,
            "num_hidden_layers": cfg.vision.n_layers,
            "num_attention_heads": cfg.vision.n_heads,
            "image_size": cfg.vision.image_size,
            "patch_size": cfg.vision.patch_size,
            "hidden_act": cfg.vision.activation,
            "layer_norm_eps": cfg.vision.eps,
        },
        image_text_hidden_size=cfg.d_proj,
        architectures=[blip_hf.ARCHITECTURES[cfg.task]],
    )
    return config.to_dict(), blip_hf.RULES[cfg.task]


def _sizes(cfg: TextConfig) -> dict[str, Any]:
    return {
        name: value for name, value in asdict(cfg).items() if name not in ("causal", "d_source")
    }


def from_dict(config: Mapping[str, Any]) -> BLIPConfig:
    """Our configuration from a `config.json` of our own layout."""
    fields = {name: value for name, value in config.items() if name != "model_type"}
    for name, kind in (("vision", VisionConfig), ("text", TextConfig), ("decoder", TextConfig)):
        if fields[name] is not None:
            fields[name] = kind(**fields[name])
    return BLIPConfig(**fields)
