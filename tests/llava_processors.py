"""Processors of LLaVAs of the zoo: a vocabulary of words, and transformers' image processors."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from zoo_llava import LLAMA, LlavaMember

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "USER", ":", "ASSISTANT", "what", "is", "it", "?", "red"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}Q: {% for c in m['content'] %}{% if c['type'] == "
    "'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %} A:{% endfor %}"
)


def tokenizer(image_token: int = 36, side: str = "left") -> Any:
    """Words and fillers, and `<image>` as the last of them."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, "Q", "A", "[", "INST", "]", "[/"])}
    fillers = {f"w{i}": i for i in range(len(vocabulary), image_token)}
    vocabulary |= fillers | {"<image>": image_token}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side=side,
    )


def processor(
    chat_template: str | None = None,
    additional: int = 1,
    strategy: str = "default",
    side: str = "left",
    member: LlavaMember = LLAMA,
    pad: bool = False,
) -> Any:
    """A LLaVA-1.5's, which crops or, with `pad`, pads to a square; a LLaVA-NeXT's for one."""
    sizes = {
        "size": {"shortest_edge": member.image},
        "crop_size": {"height": member.image, "width": member.image},
    }
    kind: Any = transformers.LlavaProcessor
    images: Any = LlavaImageProcessorPil(do_pad=True, **sizes)
    if member.resolutions is not None:
        kind = transformers.LlavaNextProcessor
        resolutions = [list(size) for size in member.resolutions]
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=resolutions, **sizes)
    elif not pad:
        images = transformers.CLIPImageProcessorPil(**sizes)
    return kind(
        images,
        tokenizer(member.image_token, side),
        patch_size=member.patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=additional,
        chat_template=chat_template,
    )
