"""The processors of checkpoints, on PIL: torchvision is not needed. BLIP's and ALBEF's kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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

from hooked_vlm.config import ALBEFConfig, BLIPConfig, CLIPConfig

Config = TypeVar("Config", BLIPConfig, ALBEFConfig, CLIPConfig)

ADDED = ("[DEC]", "[ENC]")  # what its training added behind that vocabulary, in this order


@dataclass(frozen=True)
class Kind:
    """What the processors of an architecture are made of.

    Attributes:
        vocabulary: the Hub name of the tokenizer that bare files were trained with.
        images: transformers' image processor.
        both: its processor, of images and texts.
        config: its configuration.
        sized: the arguments of `images` for square images of a side.
        complete: makes of a tokenizer the one that a configuration's weights were trained with.
        special: the special tokens' ids that a configuration takes from a tokenizer.
    """

    vocabulary: str
    images: Any
    both: Any
    config: Any
    sized: Callable[[int], dict[str, Any]]
    complete: Callable[[Any, Any], Any]
    special: Callable[[Any, Any], dict[str, Any]]


def find(
    given: Any,
    own: str | None,
    cfg: Config,
    *,
    kind: Kind | None = None,
    revision: str | None = None,
    **download: Any,
) -> tuple[Any, Config]:
    """The processor to use, and the configuration with what a bare file learns from it.

    Args:
        given: what the user named: a processor, a folder, a Hub name, or nothing.
        own: the checkpoint's folder or Hub name; None for a bare file.
        cfg: what the weights read.
        kind: of the architecture; by default BLIP's and ALBEF's.
        revision: of `own` on the Hub.
        **download: as in transformers.

    Raises:
        FileNotFoundError: no processor there.
        ValueError: a vocabulary that is not that of the weights.
    """
    kind = kind or BERT
    if given is not None and not isinstance(given, str | Path):
        processor = given
    elif own is None:
        processor = _for_file(kind, given, cfg, **download)
    elif given is None:
        # An ALBEF's folder is of our own writing: its tokenizer is the one that was saved.
        as_saved = isinstance(cfg, ALBEFConfig)
        processor = _load(kind, own, cfg, as_saved, revision=revision, **download)
    elif (processor := _load(kind, given, cfg, **download)) is None:
        raise FileNotFoundError(f"processor={str(given)!r} has no processor, here or on the Hub")
    return processor, cfg if own is not None else with_special_tokens(
        cfg, processor.tokenizer, kind
    )


def with_special_tokens(cfg: Config, tokenizer: Any, kind: Kind | None = None) -> Config:
    """The configuration with a tokenizer's ids.

    Raises:
        ValueError: a tokenizer without one of them.
    """
    return replace(cfg, **(kind or BERT).special(cfg, tokenizer))


def _load(
    kind: Kind, source: str | Path, cfg: Config, as_saved: bool = False, **download: Any
) -> Any:
    """A checkpoint's own processor; None where its folder holds neither of its parts."""
    tokenizer = _tokenizer(kind, source, **download)
    try:
        images = kind.images.from_pretrained(source, **download)
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
    return kind.both(images, _complete(kind, tokenizer, cfg, str(source), as_saved))


def _for_file(kind: Kind, given: str | Path | None, cfg: Config, **download: Any) -> Any:
    """A processor for a bare file, which holds no vocabulary."""
    source = str(given or kind.vocabulary)
    tokenizer = _tokenizer(kind, source, **download)
    if tokenizer is None:
        raise FileNotFoundError(
            f"a bare checkpoint file holds no vocabulary, and the tokenizer of {source!r} could "
            "not be had, here or on the Hub; pass processor= with a folder or a Hub name that has "
            "one"
        )
    images = kind.images(**kind.sized(cfg.vision.image_size))
    return kind.both(images, _complete(kind, tokenizer, cfg, source))


def _tokenizer(kind: Kind, source: str | Path, **download: Any) -> Any:
    try:
        # With its own config.json, a folder of our layout would be met with a warning.
        tokenizer = AutoTokenizer.from_pretrained(source, config=kind.config(), **download)
    except (OSError, ValueError):
        return None
    # Of a folder without a vocabulary transformers makes a tokenizer of the special tokens alone.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


def _complete(kind: Kind, tokenizer: Any, cfg: Config, source: str, as_saved: bool = False) -> Any:
    d_vocab = _d_vocab(cfg)
    if not as_saved:
        tokenizer = kind.complete(tokenizer, cfg)
    if len(tokenizer) > d_vocab:
        raise ValueError(
            f"the tokenizer of {source!r} has {len(tokenizer)} tokens, the weights know {d_vocab}; "
            "pass processor= with the folder or the Hub name of the one they were trained with"
        )
    return tokenizer


def _d_vocab(cfg: Config) -> int:
    stack = cfg.text or (None if isinstance(cfg, CLIPConfig) else cfg.decoder)
    assert stack is not None
    return stack.d_vocab


def special_tokens(tokenizer: Any, hint: str, **attributes: str) -> dict[str, int]:
    """Ids of a configuration's fields from a tokenizer's attributes, `bos="cls"`.

    Raises:
        ValueError: a tokenizer without one of them.
    """
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{attribute}_token_id")
        for name, attribute in attributes.items()
    }
    if missing := [name for name, number in ids.items() if number is None]:
        raise ValueError(f"the tokenizer has no {' and no '.join(missing)}; {hint}")
    return ids


def _bert_special(cfg: BLIPConfig | ALBEFConfig, tokenizer: Any) -> dict[str, int]:
    first = "cls" if isinstance(cfg, ALBEFConfig) else "bos"  # what a decoded text begins with
    hint = "a BLIP's has [DEC] as its bos_token, an ALBEF's [CLS] in its place"
    return special_tokens(tokenizer, hint, bos=first, sep="sep", pad="pad")


def _bert_complete(tokenizer: Any, cfg: BLIPConfig | ALBEFConfig) -> Any:
    if isinstance(cfg, ALBEFConfig):
        return without_final_sep(tokenizer)
    # Released folders hold BERT's vocabulary as it is, of two tokens less than the weights.
    if tokenizer.bos_token is None and len(tokenizer) + len(ADDED) <= _d_vocab(cfg):
        tokenizer.add_special_tokens({"bos_token": ADDED[0]})
        tokenizer.add_tokens(list(ADDED[1:]), special_tokens=True)
    return tokenizer


def without_final_sep(tokenizer: Any) -> PreTrainedTokenizerFast:
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


BERT = Kind(
    vocabulary="bert-base-uncased",
    images=BlipImageProcessorPil,
    both=BlipProcessor,
    config=BlipConfig,
    sized=lambda side: {"size": {"height": side, "width": side}},
    complete=_bert_complete,
    special=_bert_special,
)
"""The processors that BLIP and ALBEF were trained with."""
