"""A causal trace at full size against the published scheme, on the same numbers.

A BLIP-base that answers questions, 384 pixels, 9 tokens, one draw of noise, float32, random
weights: every token and layer of the question, and every layer of the answer. The published scheme
(arXiv 2308.14179, released code) runs each cell by itself: two passes of the image encoder, one for
each row, then the text and the answer in a batch of two, whose first row is the clean run. `--loop`
of its 120 cells, drawn over all layers of both stacks, are timed and multiplied; the passes that it
makes before its cells, 12 of the image encoder and 4 of the text, are not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_forward import KEEP
from common import in_turn
from transformers import BlipConfig, BlipForQuestionAnswering

from hooked_vlm import HookedBLIP
from hooked_vlm.methods import causal_tracing as CT
from hooked_vlm.models.sketch import measured

TOKENS, WANTED = 9, 60
Cell = tuple[str, int, int]  # stack, layer, position


def main() -> None:
    """Prints what both take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loop", type=int, default=10, help="cells of the loop that are run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    theirs, ours = blip_vqa()
    inputs = {
        "pixel_values": torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0)),
        "input_ids": torch.randint(1000, 30000, (1, TOKENS)),
    }

    def trace() -> CT.TraceResult:
        return CT.trace(ours, inputs, draws=1, max_rows=64, progress=False)

    result = trace()
    layers, maps = ours.cfg.text.n_layers, result.maps
    cells = [("text", layer, position) for layer in range(layers) for position in range(TOKENS)]
    cells += [("decoder", layer, 0) for layer in range(layers)]
    drawn = [cells[round(at)] for at in torch.linspace(0, len(cells) - 1, options.loop).tolist()]
    run = published(theirs, inputs, int(result.provenance["answers"][0]))
    error = max(abs(float(maps[cell[0]][0, 0, cell[1], cell[2]]) - run(cell)) for cell in drawn)
    with measured() as work:
        trace()
    with measured() as single:
        ours(**inputs)
    seconds = in_turn(
        options.runs,
        forward=lambda: ours(**inputs),
        trace=trace,
        loop=lambda: [run(cell) for cell in drawn],
    )
    ratio = seconds["loop"] * len(cells) / len(drawn) / seconds["trace"]
    print(
        f"{len(cells)} cells in {seconds['trace'] / seconds['forward']:.2f} forward passes (work "
        f"alone: {work.macs / single.macs:.2f}); the published scheme takes {ratio:.0f} times as "
        f"long (at least {WANTED}; {len(drawn)} cells timed and multiplied); probabilities around "
        f"{float(result.clean[0]):.1e}, largest difference {error:.1e}",
        flush=True,
    )


def blip_vqa() -> tuple[BlipForQuestionAnswering, HookedBLIP]:
    """transformers' BLIP-base for questions at 384 pixels, and ours with the same weights."""
    torch.manual_seed(0)
    config = BlipConfig(
        text_config={"num_attention_heads": 12}, vision_config={"initializer_range": 0.02}
    )
    theirs = BlipForQuestionAnswering(config).eval().requires_grad_(False)
    return theirs, HookedBLIP.from_hf(theirs)


def published(
    theirs: BlipForQuestionAnswering, inputs: dict[str, torch.Tensor], answer: int
) -> Callable[[Cell], float]:
    """A function that runs one cell as the released code does, and gives the answer's probability.

    The noise is the trace's own: the released code draws it anew for every cell.
    """
    stacks = {
        "text": theirs.text_encoder.encoder.layer,
        "decoder": theirs.text_decoder.bert.encoder.layer,
    }
    pixels, ids = inputs["pixel_values"], inputs["input_ids"].repeat(2, 1)
    start = torch.full((2, 1), theirs.config.text_config.bos_token_id)

    def run(cell: Cell) -> float:
        stack, layer, position = cell
        embeds = torch.cat([theirs.vision_model(pixels)[0] for _ in range(2)])
        noise = CT.drawn(embeds[:1].shape, 0, 0, "0")
        embeds[1:] *= CT.PUBLISHED.mean + CT.PUBLISHED.std * noise

        def restore(module: object, args: object, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            x[1, position] = x[0, position]
            return output

        handle = stacks[stack][layer].register_forward_hook(restore)
        question = theirs.text_encoder(input_ids=ids, encoder_hidden_states=embeds)[0]
        logits = theirs.text_decoder(input_ids=start, encoder_hidden_states=question).logits
        handle.remove()
        return float(logits[1, -1].softmax(-1)[answer])

    return run


if __name__ == "__main__":
    main()
