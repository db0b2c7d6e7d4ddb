"""Which table and which configuration an ALBEF checkpoint needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hooked_vlm.config import ALBEFConfig
from weights_conversion import albef_original, families, processors, shapes_of
from weights_conversion.files import Checkpoint, InMemory
from weights_conversion.rules import Rule, Shape

OURS = "hooked_albef"  # the model_type of our folders; transformers has no ALBEF
find_processor = processors.find


def read(
    checkpoint: Checkpoint | InMemory,
    hf_config: Mapping[str, Any] | None,
    task: str | None,
    overrides: Mapping[str, Any],
) -> tuple[ALBEFConfig, list[Rule]]:
    """The configuration and the table for a checkpoint.

    Args:
        checkpoint: its files.
        hf_config: its `config.json`, None for a bare file.
        task: the task asked for, None to read it from the tensors.
        overrides: fields of the stacks' configurations that a bare file cannot tell, and the
            `image_size` that its position table shall be interpolated to.

    Raises:
        ConversionError: no ALBEF, or one whose task cannot be told or is another.
    """
    shapes = checkpoint.shapes
    families.expect("albef", shapes, hf_config, overrides)
    if hf_config is not None:
        cfg = families.from_dict(hf_config, ALBEFConfig)
        families.ask(task, [cfg.task])
        return cfg, albef_original.rules(shapes, cfg)
    known = families.ask(task, albef_original.tasks(shapes))
    cfg = albef_original.config(shapes, known, overrides)
    return cfg, albef_original.rules(shapes, cfg)


def write(cfg: ALBEFConfig) -> tuple[dict[str, Any], list[Rule]]:
    """The `config.json` to write, of our own, and the table, of the original names."""
    return {"model_type": OURS, **asdict(cfg)}, albef_original.rules((), cfg)


def shapes(cfg: ALBEFConfig) -> dict[str, Shape]:
    """The shapes of a model's tensors, by our names."""
    d_model = cfg.text.d_model
    found = shapes_of.vision(cfg.vision) | shapes_of.text("text", cfg.text)
    if cfg.decoder is not None:
        found |= shapes_of.text("decoder", cfg.decoder) | shapes_of.unembed(cfg.decoder)
    if cfg.task == "pretrain":
        found |= shapes_of.unembed(cfg.text)
    if cfg.task in ("itm", "pretrain"):
        found |= shapes_of.linear("itm_head", d_model, 2)
    if cfg.d_class is not None:
        found |= shapes_of.linear("cls_head.fc_in", d_model, d_model)
        found |= shapes_of.linear("cls_head.fc_out", d_model, cfg.d_class)
    if cfg.d_proj is not None:
        found |= shapes_of.linear("vision_proj", cfg.vision.d_model, cfg.d_proj)
        found |= shapes_of.linear("text_proj", d_model, cfg.d_proj)
    if cfg.temperature:
        found["temp"] = ()
    return found
