"""The toys' processor: a BERT WordPiece tokenizer over a small vocabulary, and 48-pixel images."""

from __future__ import annotations

import string

from transformers import BertTokenizer, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from hooked_vlm.data import shapes

IMAGE_SIZE = shapes.CANVAS
PATCH = 8
MAX_POSITIONS = 64

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = (
    "a above and below color different in is it kind left large no object objects of on or photo"
    " picture relative right same shape shapes small the there this to two what where which with"
    " yes"
).split()
WORDS = (*_WORDS, *shapes.COLORS, *shapes.KINDS)
"""The words that are one token each."""


def vocabulary() -> list[str]:
    """The word pieces in the order of their ids.

    Every word of the shapes world is one piece; single characters, alone and inside a word, let
    any other text of letters, digits and punctuation be tokenized too.
    """
    characters = [*string.ascii_lowercase, *string.digits]
    words = sorted(set(WORDS) - set(characters))
    inner = [f"##{character}" for character in characters]
    return [*_SPECIAL, *string.punctuation, *characters, *inner, *words]


def build_processor() -> BlipProcessor:
    """The processor that every toy BLIP is trained with.

    As in BLIP, ``[DEC]`` (begins an answer or a caption) and ``[ENC]`` follow the vocabulary as
    added tokens.
    """
    tokenizer = BertTokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary())},
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
        model_max_length=MAX_POSITIONS,
    )
    images = BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return BlipProcessor(images, tokenizer)
