"""Which table and which configuration a LLaVA checkpoint needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from hooked_vlm.config import LlavaConfig
from weights_conversion import families, llava_hf, llava_processor
from weights_conversion.files import Checkpoint, InMemory
from weights_conversion.rules import ConversionError, Rule

find_processor = llava_processor.find


def read(
    checkpoint: Checkpoint | InMemory,
    hf_config: Mapping[str, Any] | None,
    task: str | None,
    overrides: Mapping[str, Any],
) -> tuple[LlavaConfig, list[Rule]]:
    """The configuration and the table for a checkpoint.

    Args:
        checkpoint: its files.
        hf_config: its `config.json`; a bare file is refused, as it does not tell enough.
        task: `llava` or None.
        overrides: none, as they are for bare files.

    Raises:
        ConversionError: no LLaVA that can be opened.
    """
    families.expect("llava", checkpoint.shapes, hf_config, overrides)
    families.ask(task, ["llava"])
    if hf_config is None:
        where = ", ".join(map(str, checkpoint.files))
        raise ConversionError(
            f"{where} holds tensors without the config.json that tells their sizes; name the "
            "folder that holds both"
        )
    try:
        next_ = hf_config["model_type"] == "llava_next"
        kind = transformers.LlavaNextConfig if next_ else transformers.LlavaConfig
        full = kind.from_dict(dict(hf_config)).to_dict()
        cfg = llava_hf.config(full)
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(
            f"config.json is no LLaVA configuration that can be opened: {error}"
        ) from error
    return cfg, llava_hf.rules(cfg, checkpoint.shapes)


def write(cfg: LlavaConfig) -> tuple[dict[str, Any], list[Rule]]:
    """The `config.json` to write and its table."""
    fields = llava_hf.fields(cfg)
    config: transformers.PreTrainedConfig
    if cfg.resolutions is None:
        architectures = ["LlavaForConditionalGeneration"]
        config = transformers.LlavaConfig(**fields, architectures=architectures)
    else:
        architectures = ["LlavaNextForConditionalGeneration"]
        config = transformers.LlavaNextConfig(**fields, architectures=architectures)
    return config.to_dict(), llava_hf.rules(cfg)
