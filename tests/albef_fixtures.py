"""The golden fixtures of ALBEF: how they are opened, and our names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizer

from hooked_vlm import HookedALBEF

HERE = Path(__file__).parent / "fixtures" / "albef"
WHOLE = Path(__file__).parents[2] / "shared" / "fixtures" / "albef"
HI_RES = 96
HEADS = {"vision": {"n_heads": 4}, "text": {"n_heads": 4}}
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(195))]

# Which file each set of references was computed from, for which task, at which resolution.
SETS: dict[str, tuple[str, str | None, int | None]] = {
    "pretrain": ("pretrain.pth", "itm", None),
    "pretrain_at_hi_res": ("pretrain.pth", "itm", HI_RES),
    "retrieval": ("retrieval_released_flat.pth", None, None),
    "vqa": ("vqa_flat_no_momentum.pth", None, None),
    "ve": ("ve_trained.pth", None, None),
    "nlvr": ("nlvr_trained.pth", None, None),
    "amc": ("amc_trained.pth", "itm", HI_RES),
}

# What the references call a tensor of a block, and what we call it; (of) what becomes of ours.
VISION = {
    "ln1": "attn.hook_q_in",
    "attn.pattern": "attn.hook_pattern",
    "attn.z": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_pre": "mlp.hook_pre",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
TEXT = {
    "self.q": "attn.hook_q",
    "self.k": "attn.hook_k",
    "self.v": "attn.hook_v",
    "self.pattern": "attn.hook_pattern",
    "self.z": "attn.hook_z",
    "self.attn_out": "hook_attn_out",
    "self.ln_out": "hook_normalized_resid_mid",
    "cross.q": "cross_attn.hook_q",
    "cross.k": "cross_attn.hook_k",
    "cross.v": "cross_attn.hook_v",
    "cross.pattern": "cross_attn.hook_pattern",
    "cross.z": "cross_attn.hook_z",
    "cross.attn_out": "hook_cross_attn_out",
    "cross.ln_out": "hook_normalized_resid_mid_cross",
    "mlp_pre": "mlp.hook_pre",
    "mlp_post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "out": "hook_normalized_resid_post",
}
# The passes of the references, and the stack that each runs through.
PASSES = {
    "text.": "text",
    "fusion.": "text",
    "retr.mm.": "text",
    "": "text",
    "decoder.q0.": "decoder",
}


def hook_name(reference: str) -> str | None:
    """Our name of a reference's activation; None for what is computed from several."""
    if match := re.fullmatch(r"vision\.blocks\.(\d+)\.(.+)", reference):
        component = VISION.get(match[2])
        return component and f"vision.blocks.{match[1]}.{component}"
    if reference in ("vision.norm", "image_embeds", "retr.image_embeds"):
        return "hook_image_embeds"
    if reference == "vision.embed":
        return "vision.blocks.0.hook_resid_pre"
    for prefix, stack in PASSES.items():
        if reference == f"{prefix}embed":
            return f"{stack}.blocks.0.hook_resid_pre"
        if match := re.fullmatch(rf"{re.escape(prefix)}layer\.(\d+)\.(.+)", reference):
            return f"{stack}.blocks.{match[1]}.{TEXT[match[2]]}"
    return None


def open_model(
    folder: Path,
    file: str,
    tokenizer: Path,
    task: str | None = None,
    size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> HookedALBEF:
    """A fixture's checkpoint."""
    config: dict[str, dict[str, Any]] = {name: dict(fields) for name, fields in HEADS.items()}
    if size is not None:
        config["vision"]["image_size"] = size
    return HookedALBEF.from_pretrained(
        folder / file, task=task, config=config, processor=tokenizer, dtype=dtype
    )


def tokenizer(folder: Path) -> Path:
    """A vocabulary with the fixtures' special tokens."""
    BertTokenizer(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


def inputs(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The fixtures' inputs, images in the dtype of the weights."""
    found = load_file(folder / "inputs.safetensors")
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def flat(name: str, value: Tensor) -> Tensor:
    """Ours as the references have it: heads side by side."""
    return value.flatten(-2) if re.search(r"hook_[qkvz]$", name) else value


def cached(run: Callable[[], Any], references: list[str]) -> dict[str, Tensor]:
    """The references that one pass's activations are."""
    _, cache = run()
    names = {reference: hook_name(reference) for reference in references}
    return {
        reference: flat(name, cache[name])
        for reference, name in names.items()
        if name is not None and name in cache
    }


def compute(group: str, models: dict[str, HookedALBEF], x: dict[str, Tensor], wanted: list[str]):
    """Every reference of a set, as we compute it."""
    return {
        "pretrain": _pretrain,
        "pretrain_at_hi_res": _retrieval,
        "retrieval": _retrieval,
        "amc": _amc,
        "vqa": _vqa,
        "ve": _classes,
        "nlvr": _classes,
    }[group](models, x, wanted)


def _text(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}


def _pretrain(models, x, wanted):
    model, masked = models["itm"], models["pretrain"]
    pixels, text = x["pixel_values"], _text(x)
    early = [name for name in wanted if name.startswith("text.")]
    late = [name for name in wanted if not name.startswith("text.")]
    alone = model(**text, mode="text")
    fused = {"encoder_embeds": alone, "attention_mask": text["attention_mask"], "mode": "fusion"}
    found = cached(lambda: model.run_with_cache(**text, mode="text"), early)
    found |= cached(lambda: model.run_with_cache(pixels, **fused), late)
    _, whole = model.run_with_cache(pixels, **text)
    last = f"text.blocks.{model.text.cfg.n_layers - 1}.hook_normalized_resid_post"
    _, after = model.run_with_cache(pixels, **fused, names_filter=last)
    found["vision.patch_embed"] = whole["vision.hook_embed"][:, 1:]
    for name in (name for name in wanted if name.endswith("attn.qkv")):
        layer = name.removesuffix(".qkv")
        parts = [whole[f"{layer}.hook_{part}"].flatten(-2) for part in "qkv"]
        found[name] = torch.cat(parts, -1)
    for name in (name for name in wanted if name.endswith(".ln2")):  # ours is before its gain
        norm = model.get_submodule(name)
        found[name] = whole[f"{name}.hook_normalized"] * norm.weight + norm.bias
    found |= {
        "text_embeds": alone,
        "fusion_last_hidden_state": after[last],
        "multimodal_last_hidden_state": whole[last],
        "mlm_logits": masked(pixels, x["mlm_input_ids"], text["attention_mask"]),
    }
    return found | _matching(model, pixels, text)


def _matching(model, pixels, text):
    """ITM and ITC: of the images with their texts, and of all with all."""
    similarity = model.similarity(pixels, **text) / model.temp
    return {
        "image_feat": model.get_image_features(pixels),
        "text_feat": model.get_text_features(**text),
        "sim_i2t": similarity,
        "sim_t2i": similarity.mT,
        "itm_logits": model(pixels, **text),
        "itm_logits_all_pairs": torch.stack([model(one[None], **text) for one in pixels]),
    }


def _retrieval(models, x, wanted):
    model, pixels, text = models["itm"], x["pixel_values_hi"], _text(x)
    found = cached(lambda: model.run_with_cache(pixels, **text), wanted)
    last = f"text.blocks.{model.text.cfg.n_layers - 1}.hook_normalized_resid_post"
    _, whole = model.run_with_cache(pixels, **text, names_filter=last)
    named = {
        "pos_embed": model.vision.pos_embed,
        "text_embeds": model(**text, mode="text"),
        "multimodal_last_hidden_state": whole[last],
        **_matching(model, pixels, text),
    }
    for block in _blocks(wanted):
        if block >= model.text.cfg.fusion_layer:
            maps = gradcam(model, pixels, text, block)
            named[f"cross_pattern.block{block}"] = maps["A"]
            named[f"cross_pattern_grad.block{block}"] = maps["G"]
            named[f"gradcam_itm.block{block}"] = maps["cam"].mean(1)
            named[f"gradcam_itm_per_token.block{block}"] = maps["cam"]
        if block < model.vision.cfg.n_layers:
            maps = _contrastive_gradcam(model, pixels, text, block)
            named[f"vis_pattern_itc.block{block}"] = maps["A"]
            named[f"vis_pattern_grad_itc.block{block}"] = maps["G"]
            named[f"gradcam_itc.block{block}"] = maps["cam"]
    return found | {f"retr.{name}": value for name, value in named.items()}


def _blocks(wanted):
    return sorted({int(found[1]) for name in wanted if (found := re.search(r"block(\d+)$", name))})


def _contrastive_gradcam(model, pixels, text, block):
    name = f"vision.blocks.{block}.attn.hook_pattern"
    seen: dict[str, Tensor] = {}
    keep = lambda what: lambda t, hook: seen.update({what: t.clone()})  # noqa: E731
    with torch.enable_grad(), model.hooks([(name, keep("A"))], [(name, keep("G"))]):
        (model.similarity(pixels, **text) / model.temp).diag().sum().backward()
    cam = seen["A"][:, :, 0, 1:] * seen["G"][:, :, 0, 1:].clamp(min=0)
    return {**seen, "cam": cam.mean(1).unflatten(-1, (6, 6))}


def gradcam(model, pixels, text, block):
    """Specification 1.3 of the grounding methods, by hand."""
    name = f"text.blocks.{block}.cross_attn.hook_pattern"
    _, cache = model.run_with_cache(
        pixels, **text, names_filter=name, incl_bwd=True, metric=lambda logits: logits[:, 1].sum()
    )
    mask = text["attention_mask"][:, None, :, None]
    pattern, gradient = cache[name], cache[f"{name}_grad"]
    cam = (pattern[..., 1:] * mask) * (gradient[..., 1:].clamp(min=0) * mask)
    return {"A": pattern, "G": gradient, "cam": cam.mean(1).unflatten(-1, (6, 6))}


def _amc(models, x, wanted):
    model, pixels, text = models["itm"], x["pixel_values_hi"], _text(x)
    found = {"amc.itm_logits": model(pixels, **text)}
    for block in _blocks(wanted):
        raw = gradcam(model, pixels, text, block)["cam"].mean(1)
        low = raw.relu() - raw.relu().amin((1, 2), keepdim=True)
        normed = low / (low.amax((1, 2), keepdim=True) + 1e-7)
        large = F.interpolate(normed[:, None], (256, 256), mode="bilinear", align_corners=False)
        found[f"amc.gradcam_raw.block{block}"] = raw
        found[f"amc.gradcam_norm.block{block}"] = normed
        found[f"amc.gradcam_norm_256.block{block}"] = large[:, 0, ::8, ::8]
    return found


def _vqa(models, x, wanted):
    model, pixels = models["vqa"], x["pixel_values_hi"]
    question = {"input_ids": x["question_ids"], "attention_mask": x["question_mask"]}
    answer = {"decoder_input_ids": x["answer_ids"], "decoder_attention_mask": x["answer_mask"]}
    first = {name: value[:1] for name, value in question.items()}
    found = cached(lambda: model.run_with_cache(pixels[:1], **first, **answer), wanted)
    logits = torch.stack(
        [
            model(one[None], ids[None], mask[None], **answer)
            for one, ids, mask in zip(pixels, *question.values(), strict=True)
        ]
    )
    targets = x["answer_ids"].masked_fill(x["answer_mask"] == 0, -100)[:, 1:]
    nll = [F.cross_entropy(one[:, :-1].mT, targets, reduction="none").sum(1) for one in logits]
    start = model(pixels, **question)[:, 0]
    name = f"text.blocks.{model.text.cfg.n_layers - 1}.hook_normalized_resid_post"
    _, cache = model.run_with_cache(pixels, **question, names_filter=[name, "hook_image_embeds"])
    ranking = {"answer_ids": x["answer_ids"], "answer_mask": x["answer_mask"]}
    best = model.rank_answers(pixels, **question, **ranking, k=4)
    every = model.rank_answers(pixels, **question, **ranking)
    return found | {
        "image_embeds": cache["hook_image_embeds"],
        "question_states": cache[name],
        "answer_logits": logits,
        "answer_nll_sum": torch.stack(nll),
        "first_token_logits": start,
        "first_token_probs_of_answers": start.softmax(-1)[:, x["answer_ids"][:, 1]],
        "topk_ids": best.ids,
        "topk_probs": best.probs,
        "rank_all_ids": every.ids,
        "rank_all_probs": every.probs,
    }


def _classes(models, x, wanted):
    (model,) = models.values()
    pixels = x["pixel_values"]
    if model.task == "nlvr":
        pixels = torch.stack([pixels, pixels.flip(0)], 1)
    found = cached(lambda: model.run_with_cache(pixels, **_text(x)), wanted)
    return found | {"prediction": model(pixels, **_text(x))}
