"""The processors of LLaVA checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from hooked_vlm.config import LlavaConfig


def processor_class(cfg: LlavaConfig) -> Any:
    """The processor of transformers that a model needs."""
    tiled = cfg.resolutions is not None
    return transformers.LlavaNextProcessor if tiled else transformers.LlavaProcessor


def find(
    given: Any,
    own: str | None,
    cfg: LlavaConfig,
    *,
    revision: str | None = None,
    **download: Any,
) -> tuple[Any, LlavaConfig]:
    """The processor to use, None where the checkpoint has none; and the configuration as it is.

    Args:
        given: what the user named: a processor, a folder, a Hub name, or nothing.
        own: the checkpoint's folder or Hub name.
        cfg: what the weights read.
        revision: of `own` on the Hub.
        **download: as in transformers.

    Raises:
        FileNotFoundError: no processor where the user named one.
        ValueError: a vocabulary that is larger than that of the weights.
    """
    if given is not None and not isinstance(given, str | Path):
        return given, cfg
    source = str(given or own)
    if given is None:
        download["revision"] = revision
    try:
        # On PIL: torchvision is not needed, and the pixels are the same whether it is there.
        processor = processor_class(cfg).from_pretrained(source, backend="pil", **download)
    except (OSError, ValueError) as error:
        if given is None:
            return None, cfg
        raise FileNotFoundError(
            f"processor={str(given)!r} has no LLaVA processor, here or on the Hub: {error}"
        ) from error
    if len(processor.tokenizer) > cfg.text.d_vocab:
        raise ValueError(
            f"the tokenizer of {source!r} has {len(processor.tokenizer)} tokens, the weights "
            f"know {cfg.text.d_vocab}; pass processor= with the folder or the Hub name of the one "
            "they were trained with"
        )
    return processor, cfg
