"""Full-size models with random weights, and fair timing of several things in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from hooked_vlm import HookedALBEF, HookedBLIP
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
