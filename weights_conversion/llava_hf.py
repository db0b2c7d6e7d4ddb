"""The layouts of `transformers`' LLaVA and LLaVA-NeXT, versions 4 and 5.

They differ in where the three parts are. Source: `modeling_llava.py`, `modeling_llava_next.py`,
`modeling_llama.py` and `conversion_mapping.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hooked_vlm.config import LlamaConfig, LlavaConfig, VisionConfig
from weights_conversion import clip_hf
from weights_conversion.rules import Rule, copy_of, ignore, rename

LANGUAGES = ("llama", "mistral")


def rules(cfg: LlavaConfig, names: Iterable[str] = ()) -> list[Rule]:
    """The table of a checkpoint with tensors of these names; of what transformers 5 writes."""
    names = list(names)
    in_memory = any(name.startswith("model.") for name in names)
    model = "model." if in_memory else ""
    inner = ".vision_model" if any(".vision_model." in name for name in names) else ""
    vision = f"{model}vision_tower{inner}"
    text = "model.language_model" if in_memory else "language_model.model"
    head = "lm_head.weight" if in_memory else "language_model.lm_head.weight"
    embed = f"{text}.embed_tokens.weight"
    return [
        *tower(cfg, vision),
        rename(f"{model}multi_modal_projector.linear_1.{{p}}", "projector.fc_in.{p}"),
        rename(f"{model}multi_modal_projector.linear_2.{{p}}", "projector.fc_out.{p}"),
        *[rename(f"{model}image_newline", "image_newline")] * (cfg.resolutions is not None),
        rename(embed, "text.embed.weight"),
        *block(f"{text}.layers.{{l}}", "text.blocks.{l}"),
        rename(f"{text}.norm.weight", "text.ln_final.weight"),
        copy_of(head, embed) if cfg.tied else rename(head, "unembed.weight"),
        ignore("*.position_ids", because="a buffer of indices, made anew"),
        ignore("*.rotary_emb.inv_freq", because="a buffer of frequencies, made anew"),
    ]


def tower(cfg: LlavaConfig, theirs: str) -> list[Rule]:
    """The table of the image encoder by its name there, with what is not read of it."""
    runs, unread = cfg.vision.n_layers, range(cfg.vision.n_unread or 0)
    return [
        *(
            rule
            for layer in unread
            for rule in clip_hf.block(
                f"{theirs}.encoder.layers.{runs + layer}", f"vision.unread.blocks.{layer}"
            )
        ),
        *clip_hf.vision(theirs),
        rename(f"{theirs}.post_layernorm.{{p}}", "vision.unread.ln_final.{p}"),
    ]


def block(theirs: str, ours: str) -> list[Rule]:
    """The table of a block of the language model, by its name there and here."""
    names = {
        "input_layernorm": "ln1",
        **{f"self_attn.{name}_proj": f"attn.{name}" for name in "qkvo"},
        "post_attention_layernorm": "ln2",
        "mlp.gate_proj": "mlp.fc_gate",
        "mlp.up_proj": "mlp.fc_in",
        "mlp.down_proj": "mlp.fc_out",
    }
    return [rename(f"{theirs}.{a}.weight", f"{ours}.{b}.weight") for a, b in names.items()]


def config(hf: Mapping[str, Any]) -> LlavaConfig:
    """Our configuration of a `LlavaConfig` or `LlavaNextConfig` of transformers.

    Args:
        hf: it, as a dictionary with all its defaults.

    Raises:
        ValueError: parts or options that HookedLlava does not know.
    """
    vision, text, layer = hf["vision_config"], hf["text_config"], hf["vision_feature_layer"]
    if vision["model_type"] != "clip_vision_model":
        raise ValueError(f"the image encoder is a {vision['model_type']!r}, HookedLlava reads CLIP")
    if text["model_type"] not in LANGUAGES:
        raise ValueError(
            f"the language model is a {text['model_type']!r}, HookedLlava reads "
            f"{' and '.join(LANGUAGES)}"
        )
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer is {layer!r}, HookedLlava reads one layer")
    depth = vision["num_hidden_layers"]
    reads = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= reads <= depth:
        raise ValueError(f"vision_feature_layer={layer} is behind none of the {depth} blocks")
    rope = text["rope_parameters"]
    if rope["rope_type"] != "default":
        raise ValueError(f"rotary positions of type {rope['rope_type']!r} are not supported")
    odd = [name for name in ("attention_bias", "mlp_bias") if text.get(name)]
    if odd or not hf["multimodal_projector_bias"]:
        raise ValueError(
            f"{odd[0] if odd else 'a projector without biases'} is of no released model, and not "
            "supported"
        )
    tiled = hf["model_type"] == "llava_next"
    return LlavaConfig(
        vision=VisionConfig(
            **clip_hf.sizes(vision) | {"n_layers": reads},
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            patch_bias=False,
            ln_pre=True,
            n_unread=depth - reads,
        ),
        text=LlamaConfig(
            d_model=text["hidden_size"],
            n_layers=text["num_hidden_layers"],
            n_heads=text["num_attention_heads"],
            n_key_value_heads=text["num_key_value_heads"],
            d_head=text["head_dim"],
            d_mlp=text["intermediate_size"],
            activation=text["hidden_act"],
            eps=text["rms_norm_eps"],
            d_vocab=text["vocab_size"],
            n_ctx=text["max_position_embeddings"],
            rope_theta=rope["rope_theta"],
            sliding_window=text.get("sliding_window"),
        ),
        language=text["model_type"],
        image_token_id=hf["image_token_index"],
        feature_strategy=hf["vision_feature_select_strategy"],
        projector_activation=hf["projector_hidden_act"],
        tied=hf["tie_word_embeddings"],
        resolutions=tuple((h, w) for h, w in hf["image_grid_pinpoints"]) if tiled else None,
        bos_token_id=text["bos_token_id"],
        eos_token_id=text["eos_token_id"],
        # Released files have it beside the language model's.
        pad_token_id=hf.get("pad_token_id")
        if text["pad_token_id"] is None
        else text["pad_token_id"],
    )


def fields(cfg: LlavaConfig) -> dict[str, Any]:
    """What `config` reads, of ours."""
    text, vision = cfg.text, cfg.vision
    unread = vision.n_unread or 0
    language = {
        "model_type": cfg.language,
        "hidden_size": text.d_model,
        "num_hidden_layers": text.n_layers,
        "num_attention_heads": text.n_heads,
        "num_key_value_heads": text.n_key_value_heads,
        "head_dim": text.d_head,
        "intermediate_size": text.d_mlp,
        "hidden_act": text.activation,
        "rms_norm_eps": text.eps,
        "vocab_size": text.d_vocab,
        "max_position_embeddings": text.n_ctx,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_id,
        "pad_token_id": cfg.pad_token_id,
    }
    if cfg.language == "mistral":
        language["sliding_window"] = text.sliding_window
    resolutions = {} if cfg.resolutions is None else {"image_grid_pinpoints": cfg.resolutions}
    return {
        **{name: list(map(list, sizes)) for name, sizes in resolutions.items()},
        "vision_config": {
            **clip_hf.fields(vision),
            "model_type": "clip_vision_model",
            "num_hidden_layers": vision.n_layers + unread,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        "text_config": language,
        "image_token_index": cfg.image_token_id,
        "image_seq_length": cfg.n_image_tokens,
        "projector_hidden_act": cfg.projector_activation,
        "vision_feature_select_strategy": cfg.feature_strategy,
        "vision_feature_layer": -1 - unread,
        "tie_word_embeddings": cfg.tied,
    }
