"""The layout of Salesforce's BLIP repository (`model_*.pth`, under the key `model`).

The text towers are named as in transformers; only the image encoder differs, and training leaves
momentum copies and queues behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hooked_vlm.config import BLIPConfig, Task, TextConfig, VisionConfig
from weights_conversion import blip_hf
from weights_conversion.original import (
    LEFT_FROM_TRAINING,
    NO_TEMPERATURE,
    VISION,
    bert_fields,
    check_stacks,
    telling,
    vision_fields,
    with_heads,
)
from weights_conversion.rules import Rule, Shape, ignore

# What a pre-training file holds for the tasks that were not asked for.
OTHER_TASKS: dict[Task, list[Rule]] = {
    "itm": [ignore("text_decoder.*", because="the decoder of the other pre-training task")],
    "captioning": [
        ignore("text_encoder.*", because="the encoder of the other pre-training tasks"),
        *(
            ignore(f"{head}.*", because="a head of the other pre-training tasks")
            for head in ("itm_head", "vision_proj", "text_proj")
        ),
    ],
    "vqa": [],
}


RULES: dict[Task, list[Rule]] = {
    task: [*LEFT_FROM_TRAINING, NO_TEMPERATURE, *VISION, *parts, *OTHER_TASKS[task]]
    for task, parts in blip_hf.PARTS.items()
}


def config(
    shapes: Mapping[str, Shape], task: Task, overrides: Mapping[str, Mapping[str, Any]]
) -> BLIPConfig:
    """The configuration that the shapes tell; the special tokens are the tokenizer's to tell.

    Args:
        shapes: of the checkpoint's tensors.
        task: which of the tasks that they allow.
        overrides: fields by stack that shapes cannot tell, such as `{"text": {"n_heads": 4}}`;
            heads are 64 wide by default, as in every released file. Those of `text` hold for the
            answer decoder too, unless it has its own.

    Raises:
        ConversionError: a tensor that a BLIP has is missing, a width that is no multiple of 64 and
            no number of heads, or an override of no such stack or field.
    """
    stacks = {"itm": ("text",), "captioning": ("decoder",), "vqa": ("text", "decoder")}[task]
    check_stacks(overrides, task, stacks)
    text = "text_decoder.bert" if task == "captioning" else "text_encoder"
    with telling(f"BLIP of task {task!r}"):
        vision = vision_fields(shapes) | dict(overrides.get("vision", {}))
        bert = bert_fields(shapes, text) | dict(overrides.get(stacks[0], {}))
        made = blip_hf.assemble(
            task,
            VisionConfig(**with_heads("vision", vision)),
            TextConfig(**with_heads(stacks[0], bert)),
            d_proj=shapes.get("vision_proj.weight", (256,))[0],
        )
        if task == "vqa" and made.decoder is not None:
            made = replace(made, decoder=replace(made.decoder, **overrides.get("decoder", {})))
    return made
