"""The layout of Salesforce's ALBEF repository and of AMC: `.pth` files, wrapped in `model` or flat.

Training leaves momentum copies and queues behind; the pre-training file names its text encoder
`text_encoder.bert`, files that were trained further `text_encoder`.

Source: the released code (ALBEF b9727e4, AMC e56d659) and its users' reports of the files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hooked_vlm.config import ALBEFConfig, ALBEFTask, TextConfig, VisionConfig
from weights_conversion.blip_hf import bert, unembed
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
from weights_conversion.rules import ConversionError, Rule, Shape, copy_of, ignore, rename

_CROSS = "encoder.layer.{}.crossattention.self.{}.{}"
_MLM = "text_encoder.cls.predictions"
_OF_CLASSES: dict[int, ALBEFTask] = {3: "ve", 2: "nlvr"}


def tasks(shapes: Mapping[str, Shape]) -> list[ALBEFTask]:
    """The tasks that the tensors allow.

    Raises:
        ConversionError: an ALBEF of another kind.
    """
    tops = {name.partition(".")[0] for name in shapes}
    if "ta_head" in tops:
        raise ConversionError(
            "this is ALBEF's text-assignment pre-training for NLVR (ta_head), which HookedALBEF "
            "does not model; open the fine-tuned NLVR file"
        )
    if "text_decoder" in tops:
        return ["vqa"]
    if "cls_head" in tops:
        classes = shapes.get("cls_head.2.weight", (0,))[0]
        if classes not in _OF_CLASSES:
            raise ConversionError(
                f"cls_head tells {classes} classes apart; visual entailment has 3 and NLVR 2"
            )
        return [_OF_CLASSES[classes]]
    found: list[ALBEFTask] = ["itm"] if "itm_head" in tops else []
    if any(name.startswith(_MLM) for name in shapes):
        found.append("pretrain")
    if not found:
        raise ConversionError(
            "no task of ALBEF: expected itm_head, cls_head, text_decoder or "
            f"{_MLM}, found {sorted(tops)[:12]}"
        )
    return found


def rules(names: Collection[str], cfg: ALBEFConfig) -> list[Rule]:
    """The table for a checkpoint.

    Args:
        names: of its tensors; none of them to write one.
        cfg: its configuration.
    """
    pretrained = cfg.task == "pretrain" if not names else _prefix(names).endswith(".bert")
    text = "text_encoder.bert" if pretrained else "text_encoder"
    table = [
        *LEFT_FROM_TRAINING,
        *_shared(text, cfg.text),
        *VISION,
        *bert("text", text),
        *_types("text", text),
    ]
    if cfg.decoder is not None:
        decoder = "text_decoder.bert"
        table += [
            *bert("decoder", decoder),
            *_types("decoder", decoder),
            *unembed("text_decoder", decoder),
        ]
    if cfg.task == "pretrain":
        table += unembed("text_encoder", text)
    else:
        table.append(ignore(f"{_MLM}.*", because="the masked-token head of the pre-training task"))
    if cfg.task in ("itm", "pretrain"):
        table.append(rename("itm_head.{p}", "itm_head.{p}"))
    if cfg.d_class is not None:
        table.append(rename("cls_head.0.{p}", "cls_head.fc_in.{p}"))
        table.append(rename("cls_head.2.{p}", "cls_head.fc_out.{p}"))
    if cfg.d_proj is not None:
        table += [rename(f"{head}.{{p}}", f"{head}.{{p}}") for head in ("vision_proj", "text_proj")]
    heads = ("itm_head", "cls_head", "vision_proj", "text_proj")
    table += [ignore(f"{head}.*", because="a head of another task") for head in heads]
    if cfg.temperature:
        table.append(rename("temp", "temp"))
    else:
        table.append(NO_TEMPERATURE)
    return table


def _shared(text: str, cfg: TextConfig) -> list[Rule]:
    """Keys and values of blocks that read further images: both copies are in the file."""
    return [
        copy_of(
            f"{text}.{_CROSS.format(layer, part, kind)}",
            f"{text}.{_CROSS.format(layer - turn, part, kind)}",
        )
        for layer in range(cfg.fusion_layer, cfg.n_layers)
        if (turn := (layer - cfg.fusion_layer) % cfg.n_images)
        for part in ("key", "value")
        for kind in ("weight", "bias")
    ]


def _types(ours: str, theirs: str) -> list[Rule]:
    return [rename(f"{theirs}.embeddings.token_type_embeddings.weight", f"{ours}.token_type_embed")]


def _prefix(names: Collection[str]) -> str:
    bert = "text_encoder.bert"
    return bert if any(name.startswith(f"{bert}.") for name in names) else "text_encoder"


def config(
    shapes: Mapping[str, Shape], task: ALBEFTask, overrides: Mapping[str, Mapping[str, Any]]
) -> ALBEFConfig:
    """The configuration that the shapes tell; the special tokens are the tokenizer's to tell.

    Args:
        shapes: of the checkpoint's tensors.
        task: which of the tasks that they allow.
        overrides: fields by stack that shapes cannot tell, such as `{"text": {"n_heads": 4}}`, and
            `{"vision": {"image_size": 384}}` for another resolution than the file's. Heads are 64
            wide by default, as in every released file. Those of `text` hold for the answer decoder
            too, unless it has its own.

    Raises:
        ConversionError: a tensor that an ALBEF has is missing, a width that is no multiple of 64
            and no number of heads, an override of no such stack or field, or a file of LAVIS.
    """
    stacks = ("text", "decoder") if task == "vqa" else ("text",)
    check_stacks(overrides, task, stacks)
    text = _prefix(shapes)
    if f"{text}.embeddings.token_type_embeddings.weight" not in shapes:
        raise ConversionError(
            "this ALBEF has no token_type_embeddings, so it was trained by LAVIS, whose texts end "
            "with [SEP] and whose embeddings lack that term: HookedALBEF would give other numbers, "
            "and refuses it; open a file of the original ALBEF"
        )
    with telling(f"ALBEF of task {task!r}"):
        vision = vision_fields(shapes) | dict(overrides.get("vision", {}))
        bert = bert_fields(shapes, text) | {"n_images": 2 if task == "nlvr" else 1}
        heads = {name: n for name, n in overrides.get("text", {}).items() if name == "n_heads"}
        decoder = None
        if task == "vqa":
            own = bert_fields(shapes, "text_decoder.bert") | heads
            own |= dict(overrides.get("decoder", {}))
            decoder = TextConfig(**with_heads("decoder", own), causal=True)
        itm = task in ("itm", "pretrain")
        similarity = itm and {"vision_proj.weight", "text_proj.weight"} <= shapes.keys()
        return ALBEFConfig(
            task=task,
            vision=VisionConfig(**with_heads("vision", vision)),
            text=TextConfig(**with_heads("text", bert | dict(overrides.get("text", {})))),
            decoder=decoder,
            d_proj=shapes["vision_proj.weight"][0] if similarity else None,
            temperature=itm and "temp" in shapes,
            d_class=None if itm or decoder else shapes["cls_head.2.weight"][0],
        )
