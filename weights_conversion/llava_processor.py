"""The processors of LLaVA checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from tokenizers import normalizers, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from hooked_vlm.config import LlavaConfig

IMAGE = "<image>"
SPACE = "▁"  # sentencepiece's
# `conv_vicuna_v1` and `conv_mistral_instruct` of LLaVA's `conversation.py`, with an image and a
# line break in front of what is asked, as in its `eval/run_llava.py`.
_CONTENT = (
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
TEMPLATES = {
    "llama": (
        "{{ 'A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user\\'s questions. ' }}"
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        + _CONTENT
        + "{{ ' ' if "
        "message['role'] == 'user' else eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "mistral": (
        "{% for message in messages %}{% set user = message['role'] == 'user' %}"
        "{{ '[INST] ' if user else ' ' }}"
        + _CONTENT
        + "{{ ' [/INST]' if user else ' ' + eos_token }}"
        "{% endfor %}"
    ),
}


@dataclass(frozen=True)
class Source:
    """Where the parts of an original LLaVA's processor are.

    Attributes:
        tokenizer: the checkpoint's folder or Hub name.
        images: that of its image encoder.
        revision: of `images` on the Hub.
        hf_config: the checkpoint's `config.json`.
    """

    tokenizer: str
    images: str
    revision: str | None
    hf_config: Mapping[str, Any]


def processor_class(cfg: LlavaConfig) -> Any:
    """The processor of transformers that a model needs."""
    tiled = cfg.resolutions is not None
    return transformers.LlavaNextProcessor if tiled else transformers.LlavaProcessor


def find(
    given: Any,
    own: str | Source | None,
    cfg: LlavaConfig,
    *,
    revision: str | None = None,
    **download: Any,
) -> tuple[Any, LlavaConfig]:
    """The processor to use, None where the checkpoint has none; and the configuration as it is.

    Args:
        given: what the user named: a processor, a folder, a Hub name, or nothing.
        own: the checkpoint's folder or Hub name; of an original LLaVA the parts.
        cfg: what the weights read; an original LLaVA learns its image token from the processor.
        revision: of the checkpoint on the Hub.
        **download: as in transformers.

    Raises:
        FileNotFoundError: no processor where the user named one, or half of one.
        ImportError: a tokenizer that needs packages that are not here.
        ValueError: a vocabulary that is larger than that of the weights.
    """
    source = str(given or (own.tokenizer if isinstance(own, Source) else own))
    if given is not None and not isinstance(given, str | Path):
        processor = given
    elif given is None and isinstance(own, Source):
        processor = _made(own, cfg, revision, **download)
    else:
        if given is None:
            download["revision"] = revision
        processor = _loaded(source, given is not None, cfg, **download)
    if processor is None:
        return None, cfg
    if processor is not given and len(processor.tokenizer) > cfg.text.d_vocab:
        raise ValueError(
            f"the tokenizer of {source!r} has {len(processor.tokenizer)} tokens, the weights "
            f"know {cfg.text.d_vocab}; pass processor= with the folder or the Hub name of the one "
            "they were trained with"
        )
    if isinstance(own, Source):
        cfg = replace(cfg, image_token_id=processor.image_token_id)
    return processor, cfg


def _loaded(source: str, named: bool, cfg: LlavaConfig, **download: Any) -> Any:
    """The processor that is saved somewhere; None where nobody named the place and it has none."""
    try:
        # On PIL: torchvision is not needed, and the pixels are the same whether it is there.
        return processor_class(cfg).from_pretrained(source, backend="pil", **download)
    except (OSError, ValueError) as error:
        if not named:
            return None
        raise FileNotFoundError(
            f"processor={source!r} has no LLaVA processor, here or on the Hub: {error}"
        ) from error


def _made(source: Source, cfg: LlavaConfig, revision: str | None, **download: Any) -> Any:
    """The processor of an original LLaVA, whose code has none but does what it says here."""
    tokenizer = _tokenizer(source.tokenizer, revision=revision, **download)
    if tokenizer is None:
        return None
    # LLaVA's pads to a square before it scales; without that it is CLIP's.
    pads = source.hf_config.get("image_aspect_ratio") == "pad"
    kind: Any = transformers.LlavaImageProcessorPil if pads else transformers.CLIPImageProcessorPil
    download |= {"revision": source.revision, **({"do_pad": True} if pads else {})}
    try:
        images = kind.from_pretrained(source.images, **download)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source.images!r}, the image encoder's, has no image processor that can be read "
            "(preprocessor_config.json); pass vision_tower= with a folder or a Hub name that has "
            "one, or a whole processor="
        ) from error
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=cfg.vision.patch_size,
        vision_feature_select_strategy=cfg.feature_strategy,
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[cfg.language],
    )


def _tokenizer(source: str, **download: Any) -> PreTrainedTokenizerFast | None:
    """The tokenizer of an original LLaVA with a token for images, which its code does without."""
    try:
        # Its own config.json is of no class that transformers knows.
        config = transformers.LlamaConfig()
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **download)
    except (OSError, ValueError) as error:
        if not _has_sentencepiece_file(source, **download):
            return None
        lacks = [name for name in ("sentencepiece", "google.protobuf") if not _is_there(name)]
        if not lacks:
            raise ValueError(
                f"the tokenizer.model of {source!r} cannot be read: {error}"
            ) from error
        raise ImportError(
            f"{source!r} has its vocabulary as tokenizer.model, which {' and '.join(lacks)} must "
            "be installed for: pip install sentencepiece protobuf; or pass processor= with a "
            "folder or a Hub name that has a tokenizer.json"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        return None  # what transformers makes of a folder without a vocabulary
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        # The original encodes what stands before and behind an image one by one, and sentencepiece
        # puts a space in front of each; so do these two, and transformers' Metaspace does not.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
        backend.pre_tokenizer = None
    # The plain class: transformers' LlamaTokenizer makes its own of both whenever it is loaded.
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",  # so that the last position is that of the answer
        **tokenizer.special_tokens_map,
    )
    made.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    if made.pad_token is None:
        made.pad_token = made.unk_token
    return made


def _has_sentencepiece_file(source: str, **download: Any) -> bool:
    try:
        return cached_file(source, "tokenizer.model", **download) is not None
    except OSError:
        return False


def _is_there(package: str) -> bool:
    try:
        import_module(package)
    except ImportError:
        return False
    return True
