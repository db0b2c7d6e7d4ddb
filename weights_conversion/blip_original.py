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
from weights_conversion.rules import ConversionError, Rule, Shape, ignore, positions

_VISION_NAMES = [
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm", ".norm"),
]

LEFT_FROM_TRAINING = [
    ignore("*_encoder_m.*", because="a momentum copy, used in training only"),
    ignore("text_decoder_m.*", because="a momentum copy, used in training only"),
    ignore("vision_proj_m.*", because="a momentum copy, used in training only"),
    ignore("text_proj_m.*", because="a momentum copy, used in training only"),
    ignore("*_queue", because="a queue of training examples"),
    ignore("queue_ptr", because="where the queue of training examples stands"),
    ignore("temp", because="the temperature of the contrastive loss"),
]

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


def _renamed(rule: Rule) -> Rule:
    if rule.targets == ("vision.pos_embed",):
        return positions("visual_encoder.pos_embed", *rule.targets)
    source = rule.source
    for theirs, original in _VISION_NAMES:
        source = source.replace(theirs, original)
    return replace(rule, source=source)


RULES: dict[Task, list[Rule]] = {
    task: [*LEFT_FROM_TRAINING, *map(_renamed, rules), *OTHER_TASKS[task]]
    for task, rules in blip_hf.RULES.items()
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
    if unknown := set(overrides) - {"vision", *stacks}:
        raise ConversionError(
            f"config= names {sorted(unknown)}; the stacks of task {task!r} are vision and "
            f"{' and '.join(stacks)}"
        )
    text = "text_decoder.bert" if task == "captioning" else "text_encoder"
    layer = f"{text}.encoder.layer."
    try:
        width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
        _, positions, _ = shapes["visual_encoder.pos_embed"]
        d_vocab, d_model = shapes[f"{text}.embeddings.word_embeddings.weight"]
        vision = {
            "d_model": width,
            "n_layers": _count(shapes, "visual_encoder.blocks."),
            "d_mlp": shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
            "activation": "gelu",
            "eps": 1e-6,
            "image_size": round((positions - 1) ** 0.5) * patch,
            "patch_size": patch,
        }
        bert = {
            "d_model": d_model,
            "n_layers": _count(shapes, layer),
            "d_mlp": shapes[f"{layer}0.intermediate.dense.weight"][0],
            "activation": "gelu",
            "eps": 1e-12,
            "d_vocab": d_vocab,
            "n_ctx": shapes[f"{text}.embeddings.position_embeddings.weight"][0],
            "d_source": width,
        }
    except KeyError as error:
        raise ConversionError(f"missing: {error} is in every BLIP of task {task!r}") from error
    except ValueError as error:
        raise ConversionError(f"wrong shape of the patch or word embeddings: {error}") from error
    try:
        made = blip_hf.assemble(
            task,
            VisionConfig(**_heads("vision", {**vision, **overrides.get("vision", {})})),
            TextConfig(**_heads(stacks[0], {**bert, **overrides.get(stacks[0], {})})),
            d_proj=shapes.get("vision_proj.weight", (256,))[0],
        )
        if task == "vqa" and made.decoder is not None:
            made = replace(made, decoder=replace(made.decoder, **overrides.get("decoder", {})))
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"no configuration comes of the shapes and config=: {error}"
        ) from error
    return made


def _heads(stack: str, fields: dict[str, Any]) -> dict[str, Any]:
    if "n_heads" not in fields and fields["d_model"] % 64:
        raise ConversionError(
            f"{stack} is {fields['d_model']} wide, so its heads cannot be 64 wide as in released "
            f'files; pass config={{"{stack}": {{"n_heads": …}}}}'
        )
    return {"n_heads": fields["d_model"] // 64, **fields}


def _count(shapes: Mapping[str, Shape], prefix: str) -> int:
    numbers = {
        int(name[len(prefix) :].partition(".")[0]) for name in shapes if name.startswith(prefix)
    }
    return len(numbers)
