"""Full-size models with random weights, and fair timing of several things in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hooked_vlm import HookedALBEF, HookedBLIP, HookedLlava
from hooked_vlm.config import ALBEFConfig


def blip_base() -> tuple[BlipForImageTextRetrieval, HookedBLIP]:
    """transformers' BLIP-base for retrieval at 384 pixels, and ours with the same weights."""
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"initializer_range": 0.02}
    )
    theirs = BlipForImageTextRetrieval(config).eval().requires_grad_(False)
    return theirs, HookedBLIP.from_hf(theirs)


def albef_base() -> HookedALBEF:
    """An ALBEF for retrieval at 384 pixels, with BLIP-base's image encoder and a late fusion."""
    _, blip = blip_base()
    cfg = blip.cfg
    assert cfg.text is not None
    text = replace(cfg.text, fusion_layer=6, n_token_types=2)
    model = HookedALBEF(ALBEFConfig(task="itm", vision=cfg.vision, text=text, d_proj=256)).eval()
    for name, parameter in model.named_parameters():
        known = dict(blip.named_parameters()).get(name)
        parameter.copy_(torch.randn_like(parameter) * 0.02 if known is None else known)
    return model


def llava(
    layers: int, vision_layers: int = 24, width: int = 4096
) -> tuple[LlavaForConditionalGeneration, HookedLlava]:
    """transformers' LLaVA-1.5 with a language model of some layers, and ours of the same weights.

    Args:
        layers: of the language model; 32 is that of 7B.
        vision_layers: of the image encoder; 24 is that of all.
        width: of the language model; 4096 is that of 7B. Heads are 128 wide.
    """
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": 11008 * width // 4096,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        image_token_index=32000,
        attn_implementation="sdpa",
    )
    theirs = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    return theirs, HookedLlava.from_hf(theirs)


def prompt(seed: int, words: int = 40) -> dict[str, torch.Tensor]:
    """One image of 336 pixels and a text around it, of 576 + `words` tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 32000, (1, words), generator=torch.Generator().manual_seed(0))
    image = torch.full((1, 576), 32000)
    return {
        "pixel_values": torch.randn(1, 3, 336, 336, generator=generator),
        "input_ids": torch.cat([text[:, :5], image, text[:, 5:]], 1),
    }


def inputs(images: int, texts: int, tokens: int = 14) -> dict[str, torch.Tensor]:
    """Random pixels and token ids."""
    return {
        "pixel_values": torch.randn(images, 3, 384, 384),
        "input_ids": torch.randint(1000, 30000, (texts, tokens)),
    }


def in_turn(runs: int, **work: Callable[[], object]) -> dict[str, float]:
    """Medians of CPU seconds of the process, each run in turn after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for run in range(runs + 1):
        for name, do in work.items():
            start = time.process_time()
            do()
            if run:
                taken[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}
