"""The layout of LLaVA's own repository, whose files leave the image encoder to that of CLIP.

Source: `model/builder.py`, `model/llava_arch.py` and `model/multimodal_encoder/clip_encoder.py` of
LLaVA (arXiv 2310.03744).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers

from hooked_vlm.config import LlavaConfig
from weights_conversion import llava_hf
from weights_conversion.rules import ConversionError, Rule, copy_of, extend, ignore, rename

TOWER = "model.vision_tower.vision_tower."  # where a file holds the image encoder, if it does
MULTIPLE = (
    64  # of which the rows of the vocabulary's matrices are, as transformers' converter has it
)
PROJECTOR = "mlp2x_gelu"
FEATURES = {"patch": "default", "cls_patch": "full"}
LANGUAGE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps rope_theta "
    "rope_scaling rope_parameters sliding_window attention_bias mlp_bias tie_word_embeddings "
    "bos_token_id eos_token_id pad_token_id"
).split()


@dataclass(frozen=True)
class Tower:
    """The image encoder, which has a checkpoint of its own.

    Attributes:
        name: what `config.json` calls it: a Hub name or a folder.
        inside: whether the file holds its weights, so that only its configuration is missing.
    """

    name: str
    inside: bool


def tower(names: Iterable[str], hf: Mapping[str, Any]) -> Tower:
    """Which image encoder a checkpoint needs beside it.

    Args:
        names: of the tensors.
        hf: the `config.json`.

    Raises:
        ConversionError: no LLaVA-1.5, as `check`; an image encoder that was trained, but is not
            there.
    """
    check(hf)
    inside = any(name.startswith(TOWER) for name in names)
    if hf.get("unfreeze_mm_vision_tower") and not inside:
        raise ConversionError(
            "config.json says that the image encoder was trained (unfreeze_mm_vision_tower), but "
            f"no tensor is named {TOWER}…; save the model again with it"
        )
    return Tower(hf["mm_vision_tower"], inside)


def check(hf: Mapping[str, Any]) -> None:
    """Refuses what is no LLaVA-1.5, by the fields of its `config.json`.

    Raises:
        ConversionError: another projector, other features, or another prompt; it names the field.
    """
    merge, aspect = hf.get("mm_patch_merge_type"), hf.get("image_aspect_ratio")
    if str(aspect).startswith("anyres") or str(merge).startswith("spatial"):
        raise ConversionError(
            f"image_aspect_ratio is {aspect!r} and mm_patch_merge_type {merge!r}: the files of "
            "LLaVA-NeXT's own repository cannot be opened; take the same weights in transformers' "
            "layout, such as llava-hf/llava-v1.6-mistral-7b-hf"
        )
    kind = hf.get("mm_projector_type", "linear")
    layer, features = hf.get("mm_vision_select_layer"), hf.get("mm_vision_select_feature", "patch")
    odd = [
        (not isinstance(hf.get("mm_vision_tower"), str), "mm_vision_tower names no image encoder"),
        (kind != PROJECTOR, f"mm_projector_type is {kind!r}, HookedLlava reads {PROJECTOR!r}"),
        (not isinstance(layer, int), f"mm_vision_select_layer is {layer!r}, and not one layer"),
        (
            features not in FEATURES,
            f"mm_vision_select_feature is {features!r}, none of {', '.join(FEATURES)}",
        ),
        (aspect not in (None, "pad", "square"), f"image_aspect_ratio is {aspect!r}"),
        (
            hf.get("mm_use_im_start_end"),
            "mm_use_im_start_end is true: its prompts put tokens around an image, as LLaVA's "
            "before 1.5 did",
        ),
        (hf.get("s2"), "s2 is true: its image encoder reads several resolutions"),
        (hf.get("mm_resampler_type"), f"mm_resampler_type is {hf.get('mm_resampler_type')!r}"),
    ]
    for wrong, said in odd:
        if wrong:
            raise ConversionError(f"no LLaVA-1.5 that can be opened: {said}")


def translated(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` as transformers' LlavaConfig would say it, with all its defaults.

    The vocabulary has no image token. As in transformers' converter it is added behind the others,
    and the matrices get rows up to a multiple of 64; here they are zeros.

    Args:
        hf: the `config.json`, with that of the image encoder as its `vision_config`, be that of
            all of CLIP or of this half.

    Raises:
        ConversionError: an image encoder that is no CLIP.
    """
    vision = hf["vision_config"]
    kind = vision.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ConversionError(
            f"the image encoder {hf['mm_vision_tower']!r} is a {kind!r}, HookedLlava reads CLIP"
        )
    if kind == "clip":
        vision = transformers.CLIPConfig.from_dict(dict(vision)).to_dict()["vision_config"]
    language = "mistral" if hf["model_type"] == "llava_mistral" else "llama"
    text = {name: hf[name] for name in LANGUAGE if name in hf}
    d_vocab = text["vocab_size"]
    rows = -(-(d_vocab + 2) // MULTIPLE) * MULTIPLE  # two: transformers' adds `<pad>`, too
    config = transformers.LlavaConfig.from_dict(
        {
            "vision_config": {**vision, "model_type": "clip_vision_model"},
            "text_config": {**text, "model_type": language, "vocab_size": rows},
            "image_token_index": d_vocab,
            "vision_feature_layer": hf["mm_vision_select_layer"],
            "vision_feature_select_strategy": FEATURES[hf.get("mm_vision_select_feature", "patch")],
            "tie_word_embeddings": hf.get("tie_word_embeddings", False),
        }
    )
    return config.to_dict()


def rules(cfg: LlavaConfig, d_vocab: int) -> list[Rule]:
    """The table of a checkpoint whose vocabulary has `d_vocab` tokens, the image encoder included.

    Where that has a checkpoint of its own, its names stand behind `TOWER`.
    """
    more = cfg.text.d_vocab - d_vocab
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    no_text = "of the half of CLIP that reads texts, which no LLaVA does"
    return [
        *llava_hf.tower(cfg, f"{TOWER}vision_model"),
        rename("model.mm_projector.0.{p}", "projector.fc_in.{p}"),
        rename("model.mm_projector.2.{p}", "projector.fc_out.{p}"),
        extend(embed, "text.embed.weight", more),
        *llava_hf.block("model.layers.{l}", "text.blocks.{l}"),
        rename("model.norm.weight", "text.ln_final.weight"),
        copy_of(head, embed) if cfg.tied else extend(head, "unembed.weight", more),
        ignore("*.position_ids", because="a buffer of indices, made anew"),
        ignore("*.rotary_emb.inv_freq", because="a buffer of frequencies, made anew"),
        ignore(f"{TOWER}text_model.*", because=no_text),
        ignore(f"{TOWER}text_projection.weight", because=no_text),
        ignore(f"{TOWER}visual_projection.weight", because="of CLIP's own output"),
        ignore(f"{TOWER}logit_scale", because="of CLIP's own output"),
    ]
