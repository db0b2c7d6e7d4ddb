"""NOTICE at full size against its released scheme, per pair, on the same numbers.

BLIP-base for questions at 384 pixels, T = 9, both ways of corruption: the three kinds of module and
the two kinds of heads at every token; LLaVA of 7B's widths: all heads at the answer's token. Random
weights, float32. The released scheme runs a batch of clean, corrupt and patched for each cell
(BLIP: 54 (12 T + 1) calls), or these three one after the other (LLaVA: 3 (layers + 1) for a head);
of it `--loop` calls are run, drawn over all cells, and multiplied. Without its reading of images,
which it repeats in each call.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from bench_forward import KEEP
from common import in_turn, llava, prompt
from transformers import BlipConfig, BlipForQuestionAnswering

from hooked_vlm import HookedBLIP
from hooked_vlm.data import Pair
from hooked_vlm.methods.notice import Notice, Ready, Settings
from hooked_vlm.patching.metrics import accuracy, logit_diff, prob, several
from hooked_vlm.patching.runs import Run

ANSWER, FOIL, TOKENS, AT = 100, 200, 9, 5
Inputs = dict[str, torch.Tensor]


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--loop", type=int, default=10, help="calls of the scheme that are run")
    parser.add_argument("--layers", type=int, default=4, help="of the LLaVA; 7B has 32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["blip", "llava"], action="append")
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name in options.only or ["blip", "llava"]:
        if name == "blip":
            blip(options.runs, options.loop)
        else:
            of_llava(options.layers, options.runs, options.loop)


def ready(model: Any, inputs: Inputs, modality: str) -> Ready:
    """A pair of random inputs, clean and corrupt, as `Notice.prepare` would make it."""
    other = {"image": {"corrupt_image": "b"}, "text": {"corrupt_text": "other"}}[modality]
    metric = several([prob(ANSWER), logit_diff(ANSWER, FOIL), accuracy(ANSWER)]).bind(model, None)
    n = inputs["input_ids"].shape[1]
    roles = {"answer": [AT if n == TOKENS else n - 10]}
    run = Run("0", lambda: inputs, metric, roles=roles)
    return Ready(Pair("a", "asked", name="0", **other), run, ["?"] * n, roles)


def blip(runs: int, loop: int) -> None:
    """Everything that is patched of a BLIP."""
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={"num_attention_heads": 12, "encoder_hidden_size": 768},
        vision_config={"initializer_range": 0.02},
    )
    theirs = BlipForQuestionAnswering(config).eval().requires_grad_(False)
    ours = HookedBLIP.from_hf(theirs)
    kinds: Any = ("mlp", "attn", "cross_attn", "attn_heads", "cross_attn_heads")
    method = Notice(ours, Settings(kinds=kinds, clean_correct=False, corruption_effective=None))
    images = torch.randn(2, 3, 384, 384)
    texts = torch.randint(1000, 30000, (2, TOKENS))
    both = {
        "image": {"pixel_values": images, "input_ids": texts[[0, 0]]},
        "text": {"pixel_values": images[:1], "input_ids": texts},
    }
    pairs = [ready(ours, inputs, modality) for modality, inputs in both.items()]
    tables = [method.measure(pair) for pair in pairs]
    cells = [
        (kind, layer, head, at)
        for kind in kinds
        for layer in range(12)
        for head in (range(12) if "heads" in kind else [-1])
        for at in range(TOKENS)
    ]
    drawn = [cells[round(at)] for at in torch.linspace(0, len(cells) - 1, loop).tolist()]

    def scheme(cell: Any, inputs: Inputs) -> torch.Tensor:
        return in_batches(theirs, inputs, *cell)

    def by_scheme() -> list[torch.Tensor]:
        return [scheme(cell, both["image"]) for cell in drawn]

    index = ["kind", "layer", "head", "position"]
    found = tables[0].set_index(index)["logit_diff"]
    begin = float(tables[0]["corrupt_logit_diff"].iloc[0])
    errors = [
        abs(float(found[cell]) + begin - float(row[ANSWER] - row[FOIL]))
        for cell, row in zip(drawn, by_scheme(), strict=True)
    ]
    seconds = in_turn(runs, ours=lambda: [method.measure(pair) for pair in pairs], loop=by_scheme)
    calls = 54 * (12 * TOKENS + 1)
    times = seconds["loop"] / len(drawn) * calls / seconds["ours"]
    print(
        f"BLIP, everything at {TOKENS} tokens, both corruptions: {seconds['ours']:.1f} s a pair; "
        f"the released scheme's {calls} calls take {times:.0f} times as long (at least 100; "
        f"{len(drawn)} run and multiplied); largest difference {max(errors):.1e}",
        flush=True,
    )


def in_batches(theirs: Any, inputs: Inputs, kind: str, layer: int, head: int, at: int) -> Any:
    """The patched row's logits of the first answer step, as the released code runs a cell."""
    block = theirs.text_encoder.encoder.layer[layer]
    # Of a post-norm block, what the MLP adds is the output of this linear layer.
    module = {"mlp": block.output.dense, "attn": block.attention.self}.get(
        kind.removesuffix("_heads"), block.crossattention.self
    )

    def write(_: Any, args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        part = slice(None) if head < 0 else slice(64 * head, 64 * (head + 1))
        value[2, at, part] = value[0, at, part]
        return output

    rows = torch.tensor([0, 1, 1])
    images = inputs["pixel_values"]
    images = images[rows] if len(images) > 1 else images.expand(3, -1, -1, -1)
    handle = module.register_forward_hook(write)
    try:
        seen = theirs.vision_model(images)[0]
        asked = theirs.text_encoder(inputs["input_ids"][rows], encoder_hidden_states=seen)[0]
    finally:
        handle.remove()
    begin = torch.full((3, 1), theirs.decoder_start_token_id)
    return theirs.text_decoder(begin, encoder_hidden_states=asked).logits[2, -1]


def of_llava(layers: int, runs: int, loop: int) -> None:
    """All heads of a LLaVA at the answer's token."""
    theirs, ours = llava(layers)
    settings = Settings(
        kinds=("attn_heads",), positions=("answer",), clean_correct=False, corruption_effective=None
    )
    method = Notice(ours, settings)
    clean, corrupt = prompt(0), prompt(1)
    pair = ready(ours, {key: torch.cat([clean[key], corrupt[key]]) for key in clean}, "image")
    heads = ours.text.cfg.n_heads
    calls = heads * 3 * (layers + 1)

    def passes() -> list[Any]:
        return [theirs(**corrupt) for _ in range(loop)]

    seconds = in_turn(runs, ours=lambda: method.measure(pair), loop=passes)
    times = seconds["loop"] / loop * calls / seconds["ours"]
    print(
        f"LLaVA of {layers} layers, all {layers * heads} heads at the answer: "
        f"{seconds['ours']:.1f} s a pair; the released scheme's {calls} passes take {times:.0f} "
        f"times as long (at least 50; {loop} plain passes run and multiplied)",
        flush=True,
    )


if __name__ == "__main__":
    main()
