"""Which table and which configuration a LLaVA checkpoint needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from hooked_vlm.config import LlavaConfig
from weights_conversion import families, llava_hf, llava_original, llava_processor
from weights_conversion.files import Checkpoint, InMemory
from weights_conversion.rules import ConversionError, Rule

find_processor = llava_processor.find


def is_original(names: Iterable[str], hf_config: Mapping[str, Any] | None) -> bool:
    """Whether a checkpoint is of LLaVA's own repository.

    Its older files share the model_type `llava` with transformers', but not its `text_config`.
    """
    return any(".mm_projector." in name for name in names) or (
        hf_config is not None and "mm_vision_tower" in hf_config and "text_config" not in hf_config
    )


def tower(names: Iterable[str], hf_config: Mapping[str, Any] | None) -> llava_original.Tower | None:
    """The image encoder that a checkpoint leaves to one of its own; None where it is whole.

    Raises:
        ConversionError: as `llava_original.tower`, or another model.
    """
    names = list(names)
    if hf_config is None or not is_original(names, hf_config):
        return None
    families.expect("llava", names, hf_config, {})
    return llava_original.tower(names, hf_config)


def read(
    checkpoint: Checkpoint | InMemory,
    hf_config: Mapping[str, Any] | None,
    task: str | None,
    overrides: Mapping[str, Any],
) -> tuple[LlavaConfig, list[Rule]]:
    """The configuration and the table for a checkpoint.

    Args:
        checkpoint: its files.
        hf_config: its `config.json`; a bare file is refused, as it does not tell enough. Of
            LLaVA's own files with that of the image encoder as `vision_config`.
        task: `llava` or None.
        overrides: none, as they are for bare files.

    Raises:
        ConversionError: no LLaVA that can be opened.
    """
    families.expect("llava", checkpoint.shapes, hf_config, overrides)
    families.ask(task, ["llava"])
    if hf_config is None:
        where = ", ".join(map(str, checkpoint.files))
        if all(".mm_projector." in name for name in checkpoint.shapes):
            raise ConversionError(
                f"{where} holds a projector alone; name the folder of a whole LLaVA"
            )
        raise ConversionError(
            f"{where} holds tensors without the config.json that tells their sizes; name the "
            "folder that holds both"
        )
    original = is_original(checkpoint.shapes, hf_config)
    if original and "vision_config" not in hf_config:
        raise ConversionError(
            "a model in memory of LLaVA's own code does not say the sizes of its image encoder; "
            "save it, and open the folder with from_pretrained"
        )
    try:
        if original:
            full = llava_original.translated(hf_config)
        else:
            next_ = hf_config["model_type"] == "llava_next"
            kind = transformers.LlavaNextConfig if next_ else transformers.LlavaConfig
            full = kind.from_dict(dict(hf_config)).to_dict()
        cfg = llava_hf.config(full)
    except ConversionError:
        raise
    except (KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(
            f"config.json is no LLaVA configuration that can be opened: {error}"
        ) from error
    if original:
        return cfg, llava_original.rules(cfg, hf_config["vocab_size"])
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
