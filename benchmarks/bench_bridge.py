"""A LLaVA in transformers (sdpa), in TransformerLens' bridge and here, with the same weights: a
forward pass, one that caches every z, and one that caches everything, over transformers' forward.

By default LLaVA-7B's widths with 4 language and 2 image layers (4.3 GB), one image and 40 words.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys

import torch
from bench_forward import KEEP
from common import in_turn, llava, prompt
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module  # installs nothing
from transformers import LlavaForConditionalGeneration


def bridged(theirs: LlavaForConditionalGeneration) -> TransformerBridge:
    """TransformerLens' bridge around a copy of the model that shares its weights."""
    wrapped = copy.deepcopy(theirs, {id(p): p for p in theirs.parameters()})
    wrapped.set_attn_implementation("eager")  # as TransformerLens' own boot does
    return build_bridge_from_module(wrapped, type(theirs).__name__, hf_config=wrapped.config)


def main() -> None:
    """Prints a line for each of the three passes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--vision-layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096, help="of the language model")
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():  # see bench_forward.py
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    theirs, ours = llava(options.layers, options.vision_layers, options.width)
    bridge, given = bridged(theirs), prompt(0)
    ids, pixels = given["input_ids"], {"pixel_values": given["pixel_values"]}

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
