"""The LLaVA toy's processor: a Llama tokenizer in which each word of the world is one token."""

from __future__ import annotations

import string

from transformers import CLIPImageProcessorPil, LlamaTokenizer, LlavaProcessor

from hooked_vlm.toys.clip_tokenizer import learn
from hooked_vlm.toys.tokenizer import IMAGE_SIZE, PATCH, WORDS

MAX_POSITIONS = 256
IMAGE, PAD = "<image>", "<pad>"
SPACE = "▁"  # what SentencePiece puts for a space, and in front of a text

_OPENERS = ("What", "Where", "Is")  # words that a question begins with, right behind the line break
_SPEAKERS = ("USER", "ASSISTANT")

# As in llava-hf/llava-1.5-7b-hf. The first token of a text, <s>, is put by the tokenizer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_llava_processor() -> LlavaProcessor:
    """The processor that the toy LLaVA is trained with.

    As in Llama, the vocabulary holds three special tokens, every byte, the merges, then single
    characters; as in the released LLaVA, `<image>` and `<pad>` are added behind them. What is
    neither a word of the world nor a character of ASCII is written in bytes.
    """
    openers = [*_OPENERS, *map(str.lower, _OPENERS)]
    words = [*openers, *(SPACE + word for word in {*WORDS, *openers, *_SPEAKERS})]
    merges = learn([list(word) for word in sorted(words)])
    characters = [SPACE, *string.ascii_letters, *string.digits, *string.punctuation]
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *map("".join, merges),
        *characters,
    ]
    tokenizer = LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        pad_token=PAD,
        add_bos_token=True,
        model_max_length=MAX_POSITIONS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
