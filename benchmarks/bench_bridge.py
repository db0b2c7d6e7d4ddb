"""A LLaVA in transformers (sdpa), in TransformerLens' bridge and here, with the same weights: a
forward pass, one that caches every z, and one that caches everything, over transformers' forward.

By default LLaVA-7B's widths with 4 language and 2 image layers (4.3 GB), one image and 40 tokens.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
from bench_forward import KEEP
from common import in_turn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module  # installs nothing
from transformers import LlavaConfig, LlavaForConditionalGeneration

from hooked_vlm import HookedLlava

# Width, heads, width of the MLP and layers of each stack; side of the image.
SIZES = {
    "7b": ((4096, 32, 11008, 4), (1024, 16, 4096, 2), 336),
    "small": ((512, 8, 1376, 8), (384, 6, 1536, 6), 112),
}
PATCH, VOCAB = 14, 32064


def models(width: str) -> tuple[LlavaForConditionalGeneration, TransformerBridge, HookedLlava]:
    """The three, sharing their weights; transformers' image encoder is read behind its end."""
    *stacks, image = SIZES[width]
    text, vision = (
        {
            "hidden_size": d_model,
            "num_attention_heads": heads,
            "intermediate_size": d_mlp,
            "num_hidden_layers": layers,
        }
        for d_model, heads, d_mlp, layers in stacks
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": VOCAB, **text},
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": image,
            "patch_size": PATCH,
            **vision,
        },
        image_token_index=VOCAB - 1,
        image_seq_length=(image // PATCH) ** 2,
        vision_feature_layer=-1,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    wrapped = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
    wrapped.set_attn_implementation("eager")  # as TransformerLens' own boot does
    bridge = build_bridge_from_module(wrapped, type(theirs).__name__, hf_config=wrapped.config)
    return theirs, bridge, HookedLlava.from_hf(theirs)


def main() -> None:
    """Prints a line for each of the three passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", choices=SIZES, default="7b")
    parser.add_argument("--words", type=int, default=40, help="tokens besides those of the image")
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():  # see bench_forward.py
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    theirs, bridge, ours = models(options.width)
    words = torch.randint(5, VOCAB - 1, (1, options.words))
    block = torch.full((1, ours.cfg.n_image_tokens), VOCAB - 1)
    image = ours.cfg.vision.image_size
    pixels = {"pixel_values": torch.randn(1, 3, image, image)}
    ids = torch.cat([words[:, :5], block, words[:, 5:]], 1)

    def every_z(name: str) -> bool:
        return name.endswith("hook_z")

    expected = theirs(input_ids=ids, **pixels).logits
    error = max(
        (found - expected).abs().max()
        for found in (bridge(ids, **pixels), ours(**pixels, input_ids=ids))
    )
    print(f"{ids.shape[1]} tokens; logits differ by {error:.1e} at most", flush=True)
    seconds = in_turn(
        options.runs,
        theirs=lambda: theirs(input_ids=ids, **pixels),
        ours_forward=lambda: ours(**pixels, input_ids=ids),
        bridge_forward=lambda: bridge(ids, **pixels),
        ours_z=lambda: ours.run_with_cache(**pixels, input_ids=ids, names_filter=every_z),
        bridge_z=lambda: bridge.run_with_cache(ids, **pixels, names_filter=every_z),
        ours_all=lambda: ours.run_with_cache(**pixels, input_ids=ids),
        bridge_all=lambda: bridge.run_with_cache(ids, **pixels),
    )
    for what, name in (("forward", "forward"), ("every z", "z"), ("everything", "all")):
        here, there = (seconds[f"{who}_{name}"] / seconds["theirs"] for who in ("ours", "bridge"))
        print(f"{what:10} / transformers' forward: {here:.2f} here, {there:.2f} in the bridge")
    print(f"transformers' forward: {seconds['theirs']:.2f} s of CPU")


if __name__ == "__main__":
    main()
