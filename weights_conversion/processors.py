"""The processors of BLIP and ALBEF checkpoints, on PIL: torchvision is not needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipImageProcessorPil,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

from hooked_vlm.config import ALBEFConfig, BLIPConfig

Config = TypeVar("Config", BLIPConfig, ALBEFConfig)

BERT = "bert-base-uncased"  # the vocabulary that BLIP and ALBEF were trained with
ADDED = ("[DEC]", "[ENC]")  # what its training added behind that vocabulary, in this order


def find(
    given: Any, own: str | None, cfg: Config, *, revision: str | None = None, **download: Any
) -> tuple[Any, Config]:
    """The processor to use, and the configuration with what a bare file learns from it.

    Args:
        given: what the user named: a processor, a folder, a Hub name, or nothing.
        own: the checkpoint's folder or Hub name; None for a bare file.
        cfg: what the weights read.
        revision: of `own` on the Hub.
        **download: as in transformers.

    Raises:
        FileNotFoundError: no processor there.
        ValueError: a vocabulary that is not that of the weights.
    """
    if given is not None and not isinstance(given, str | Path):
        processor = given
    elif own is None:
        processor = for_file(given, cfg, **download)
    elif given is None:
        processor = load(own, cfg, revision=revision, **download)
    elif (processor := load(given, cfg, **download)) is None:
        raise FileNotFoundError(f"processor={str(given)!r} has no processor, here or on the Hub")
    return processor, cfg if own is not None else with_special_tokens(cfg, processor.tokenizer)


def load(
    source: str | Path, cfg: BLIPConfig | ALBEFConfig, **download: Any
) -> BlipProcessor | None:
    """A checkpoint's own processor; None where its folder holds neither of its parts.

    Args:
        source: a folder or a Hub name.
        cfg: what the checkpoint's weights read.
        **download: as in transformers.

    Raises:
        FileNotFoundError: one of its two parts is not there.
        ValueError: a vocabulary that is not that of the weights.
    """
    tokenizer = _tokenizer(source, **download)
    try:
        images = BlipImageProcessorPil.from_pretrained(source, **download)
    except (OSError, ValueError) as error:
        if tokenizer is None:
            return None
        raise FileNotFoundError(
            f"{source} has a tokenizer but no image processor that can be read "
            "(preprocessor_config.json); pass processor= with a folder or a Hub name that has both"
        ) from error
    if tokenizer is None:
        raise FileNotFoundError(
            f"{source} has an image processor but no tokenizer; pass processor= with a folder or a "
            "Hub name that has both"
        )
    return BlipProcessor(images, _complete(tokenizer, cfg, str(source)))


def for_file(
    source: str | Path | None, cfg: BLIPConfig | ALBEFConfig, **download: Any
) -> BlipProcessor:
    """A processor for a bare `.pth`, which holds no vocabulary.

    Args:
        source: a folder or a Hub name with a tokenizer; None for `bert-base-uncased`.
        cfg: what the weights read.
        **download: as in transformers.

    Raises:
        FileNotFoundError: no tokenizer there.
        ValueError: a vocabulary that is not that of the weights.
    """
    tokenizer = _tokenizer(source or BERT, **download)
    if tokenizer is None:
        raise FileNotFoundError(
            f"a bare checkpoint file holds no vocabulary, and the tokenizer of "
            f"{str(source or BERT)!r} could not be had, here or on the Hub; pass processor= with "
            "a folder or a Hub name that has one"
        )
    size = {"height": cfg.vision.image_size, "width": cfg.vision.image_size}
    tokenizer = _complete(tokenizer, cfg, str(source or BERT))
    return BlipProcessor(BlipImageProcessorPil(size=size), tokenizer)


def with_special_tokens(cfg: Config, tokenizer: Any) -> Config:
    """The configuration with a tokenizer's ids.

    Raises:
        ValueError: a tokenizer without one of them.
    """
    first = "cls" if isinstance(cfg, ALBEFConfig) else "bos"  # what a decoded text begins with
    ids = {
        "bos_token_id": getattr(tokenizer, f"{first}_token_id"),
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if missing := [name for name, number in ids.items() if number is None]:
        raise ValueError(
            f"the tokenizer has no {' and no '.join(missing)}; a BLIP's has [DEC] as its "
            "bos_token, an ALBEF's [CLS] in its place"
        )
    return replace(cfg, **ids)


def _tokenizer(source: str | Path, **download: Any) -> Any:
    try:
        # With its own config.json, a folder of our layout would be met with a warning.
        tokenizer = AutoTokenizer.from_pretrained(source, config=BlipConfig(), **download)
    except (OSError, ValueError):
        return None
    # Of a folder without a vocabulary transformers makes a tokenizer of the special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _complete(tokenizer: Any, cfg: BLIPConfig | ALBEFConfig, source: str) -> Any:
    d_vocab = next(stack.d_vocab for stack in (cfg.text, cfg.decoder) if stack is not None)
    if isinstance(cfg, ALBEFConfig):
        tokenizer = _without_final_sep(tokenizer)
    # Released folders hold BERT's vocabulary as it is, of two tokens less than the weights.
    elif tokenizer.bos_token is None and len(tokenizer) + len(ADDED) <= d_vocab:
        tokenizer.add_special_tokens({"bos_token": ADDED[0]})
        tokenizer.add_tokens(list(ADDED[1:]), special_tokens=True)
    if len(tokenizer) > d_vocab:
        raise ValueError(
            f"the tokenizer of {source!r} has {len(tokenizer)} tokens, the weights know {d_vocab}; "
            "pass processor= with the folder or the Hub name of the one they were trained with"
        )
    return tokenizer


def _without_final_sep(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of ALBEF's own repository: `[CLS] X`, where BERT's puts `[SEP]` behind.

    transformers' BertTokenizer makes its own template whenever it is loaded, so the plain class
    holds the changed one.
    """
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        model_max_length=tokenizer.model_max_length,
        **tokenizer.special_tokens_map,
    )
    cls, sep = made.cls_token, made.sep_token
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A",
        pair=f"{cls} $A {sep} $B:1",
        special_tokens=[(cls, made.cls_token_id), (sep, made.sep_token_id)],
    )
    return made
