"""The processors of CLIP checkpoints."""

from __future__ import annotations

from functools import partial

import transformers

from weights_conversion import processors

CLIP = processors.Kind(
    vocabulary="openai/clip-vit-base-patch32",  # one vocabulary serves all released sizes
    images=transformers.CLIPImageProcessorPil,
    both=transformers.CLIPProcessor,
    config=transformers.CLIPConfig,
    sized=lambda side: {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
    },
    complete=lambda tokenizer, cfg: tokenizer,
    special=lambda cfg, tokenizer: processors.special_tokens(
        tokenizer, "a CLIP's has all three", eos="eos", bos="bos", pad="pad"
    ),
)

find = partial(processors.find, kind=CLIP)
