"""Which table and which configuration a BLIP checkpoint needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import BlipConfig

from hooked_vlm.config import BLIPConfig, TextConfig
from weights_conversion import blip_hf, blip_original, families, processors, shapes_of
from weights_conversion.files import Checkpoint, InMemory
from weights_conversion.rules import ConversionError, Rule, Shape, rename

OURS = "hooked_blip"  # the model_type of folders that transformers has no class for
find_processor = processors.find


def read(
    checkpoint: Checkpoint | InMemory,
    hf_config: Mapping[str, Any] | None,
    task: str | None,
    overrides: Mapping[str, Any],
) -> tuple[BLIPConfig, list[Rule]]:
    """The configuration and the table for a checkpoint.

    Args:
        checkpoint: its files.
        hf_config: its `config.json`, None for a bare file.
        task: the task asked for, None to read it from the tensors.
        overrides: fields of the stacks' configurations that a bare file cannot tell.

    Raises:
        ConversionError: no BLIP, or one whose task cannot be told or is another.
    """
    shapes = checkpoint.shapes
    families.expect("blip", shapes, hf_config, overrides)
    if hf_config is not None and hf_config["model_type"] == OURS:
        cfg = families.from_dict(hf_config, BLIPConfig)
        families.ask(task, [cfg.task])
        return cfg, [rename(name, name) for name in shapes]
    known = families.ask(task, blip_hf.tasks(shapes))
    if hf_config is not None:
        try:
            full = BlipConfig.from_dict(dict(hf_config)).to_dict()
            return blip_hf.config(full, known), blip_hf.RULES[known]
        except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
            raise ConversionError(f"config.json is no BLIP configuration: {error}") from error
    if not any(name.startswith("visual_encoder.") for name in shapes):
        where = ", ".join(map(str, checkpoint.files))
        raise ConversionError(
            f"{where} holds tensors of transformers' layout without the config.json that tells "
            "their sizes; name the folder that holds both"
        )
    return blip_original.config(shapes, known, overrides), blip_original.RULES[known]


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


def shapes(cfg: BLIPConfig) -> dict[str, Shape]:
    """The shapes of a model's tensors, by our names."""
    found = shapes_of.vision(cfg.vision)
    for name, stack in (("text", cfg.text), ("decoder", cfg.decoder)):
        if stack is not None:
            found |= shapes_of.text(name, stack)
    if cfg.decoder is not None:
        found |= shapes_of.unembed(cfg.decoder)
    if cfg.task == "itm" and cfg.text is not None:
        found |= shapes_of.linear("itm_head", cfg.text.d_model, 2)
        found |= shapes_of.linear("vision_proj", cfg.vision.d_model, cfg.d_proj)
        found |= shapes_of.linear("text_proj", cfg.text.d_model, cfg.d_proj)
    return found
