"""The layout of `transformers`' BLIP classes, versions 4 and 5.

Source: specifications of the released files; `modeling_blip.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hooked_vlm.config import BLIPConfig, Task, TextConfig, VisionConfig
from weights_conversion.rules import ConversionError, Rule, copy_of, ignore, rename, split


def bert(ours: str, theirs: str) -> list[Rule]:
    """A BERT stack with cross-attention."""
    layer, block = f"{theirs}.encoder.layer.{{l}}", f"{ours}.blocks.{{l}}"
    rules = [
        rename(f"{theirs}.embeddings.word_embeddings.weight", f"{ours}.embed.weight"),
        rename(f"{theirs}.embeddings.position_embeddings.weight", f"{ours}.pos_embed"),
        rename(f"{theirs}.embeddings.LayerNorm.{{p}}", f"{ours}.ln_embed.{{p}}"),
        rename(f"{layer}.intermediate.dense.{{p}}", f"{block}.mlp.fc_in.{{p}}"),
        rename(f"{layer}.output.dense.{{p}}", f"{block}.mlp.fc_out.{{p}}"),
        rename(f"{layer}.output.LayerNorm.{{p}}", f"{block}.ln2.{{p}}"),
    ]
    for part, attention, norm in (
        ("attention", "attn", "ln1"),
        ("crossattention", "cross_attn", "ln_cross"),
    ):
        rules += [
            rename(f"{layer}.{part}.self.{name}.{{p}}", f"{block}.{attention}.{name[0]}.{{p}}")
            for name in ("query", "key", "value")
        ]
        rules += [
            rename(f"{layer}.{part}.output.dense.{{p}}", f"{block}.{attention}.o.{{p}}"),
            rename(f"{layer}.{part}.output.LayerNorm.{{p}}", f"{block}.{norm}.{{p}}"),
        ]
    return rules


_LAYER, _BLOCK = "vision_model.encoder.layers.{l}", "vision.blocks.{l}"

VISION = [
    rename("vision_model.embeddings.class_embedding", "vision.embed.class_token"),
    rename("vision_model.embeddings.position_embedding", "vision.pos_embed"),
    rename("vision_model.embeddings.patch_embedding.{p}", "vision.embed.patch.{p}"),
    split(
        f"{_LAYER}.self_attn.qkv.{{p}}",
        [f"{_BLOCK}.attn.q.{{p}}", f"{_BLOCK}.attn.k.{{p}}", f"{_BLOCK}.attn.v.{{p}}"],
    ),
    rename(f"{_LAYER}.self_attn.projection.{{p}}", f"{_BLOCK}.attn.o.{{p}}"),
    rename(f"{_LAYER}.layer_norm1.{{p}}", f"{_BLOCK}.ln1.{{p}}"),
    rename(f"{_LAYER}.layer_norm2.{{p}}", f"{_BLOCK}.ln2.{{p}}"),
    rename(f"{_LAYER}.mlp.fc1.{{p}}", f"{_BLOCK}.mlp.fc_in.{{p}}"),
    rename(f"{_LAYER}.mlp.fc2.{{p}}", f"{_BLOCK}.mlp.fc_out.{{p}}"),
    rename("vision_model.post_layernorm.{p}", "vision.ln_final.{p}"),
    ignore("*.position_ids", because="a buffer of indices, made anew"),
]


def unembed(theirs: str, bert: str) -> list[Rule]:
    """The prediction head of `theirs`, whose matrix is that of the embeddings of `bert`."""
    head = f"{theirs}.cls.predictions"
    return [
        rename(f"{head}.transform.dense.{{p}}", "unembed.dense.{p}"),
        rename(f"{head}.transform.LayerNorm.{{p}}", "unembed.ln.{p}"),
        rename(f"{head}.bias", "unembed.out.bias"),
        copy_of(f"{head}.decoder.weight", f"{bert}.embeddings.word_embeddings.weight"),
        copy_of(f"{head}.decoder.bias", f"{head}.bias"),
    ]


ITM_HEADS = [
    rename(f"{head}.{{p}}", f"{head}.{{p}}") for head in ("itm_head", "vision_proj", "text_proj")
]

_DECODER = [
    *bert("decoder", "text_decoder.bert"),
    *unembed("text_decoder", "text_decoder.bert"),
]

# What stands beside the image encoder.
PARTS: dict[Task, list[Rule]] = {
    "itm": [*bert("text", "text_encoder"), *ITM_HEADS],
    "captioning": _DECODER,
    "vqa": [*bert("text", "text_encoder"), *_DECODER],
}
RULES: dict[Task, list[Rule]] = {task: [*VISION, *parts] for task, parts in PARTS.items()}

ARCHITECTURES: dict[Task, str] = {
    "itm": "BlipForImageTextRetrieval",
    "captioning": "BlipForConditionalGeneration",
    "vqa": "BlipForQuestionAnswering",
}


def tasks(names: Iterable[str]) -> list[Task]:
    """The tasks that the tensors allow.

    Raises:
        ConversionError: a BLIP of another kind.
    """
    tops = {name.partition(".")[0] for name in names}
    if "cls_head" in tops and "text_encoder" in tops:
        raise ConversionError(
            "this is BLIP-NLVR (two images, twin cross-attention), which HookedBLIP does not model"
        )
    if "text_model" in tops:
        raise ConversionError(
            "this is transformers' deprecated BlipModel, which matches no released checkpoint"
        )
    encoder, decoder = "text_encoder" in tops, "text_decoder" in tops
    found: list[Task] = []
    if encoder and "itm_head" in tops:
        found.append("itm")
    if decoder and (not encoder or "itm_head" in tops):
        found.append("captioning")
    if encoder and decoder and "itm_head" not in tops:
        found.append("vqa")
    if not found:
        raise ConversionError(
            f"no BLIP: expected text_encoder, text_decoder or itm_head, found {sorted(tops)[:12]}"
        )
    return found


def config(hf: Mapping[str, Any], task: Task) -> BLIPConfig:
    """Our configuration of a `transformers.BlipConfig`, as a dictionary with all its defaults."""
    vision, text = hf["vision_config"], hf["text_config"]
    stack = TextConfig(
        d_model=text["hidden_size"],
        n_layers=text["num_hidden_layers"],
        n_heads=text["num_attention_heads"],
        d_mlp=text["intermediate_size"],
        activation=text["hidden_act"],
        eps=text["layer_norm_eps"],
        d_vocab=text["vocab_size"],
        n_ctx=text["max_position_embeddings"],
        d_source=vision["hidden_size"],
    )
    return assemble(
        task,
        VisionConfig(
            d_model=vision["hidden_size"],
            n_layers=vision["num_hidden_layers"],
            n_heads=vision["num_attention_heads"],
            d_mlp=vision["intermediate_size"],
            activation=vision["hidden_act"],
            eps=vision["layer_norm_eps"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
        ),
        stack,
        d_proj=hf["image_text_hidden_size"],
        bos_token_id=text["bos_token_id"],
        sep_token_id=text["sep_token_id"],
        pad_token_id=text["pad_token_id"],
    )


def assemble(task: Task, vision: VisionConfig, text: TextConfig, **more: Any) -> BLIPConfig:
    """The stacks that a task needs; a VQA decoder reads the question, not the image."""
    source = text.d_model if task == "vqa" else text.d_source
    return BLIPConfig(
        task=task,
        vision=vision,
        text=None if task == "captioning" else text,
        decoder=None if task == "itm" else replace(text, causal=True, d_source=source),
        **more,
    )
