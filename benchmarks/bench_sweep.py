"""All cross-attention heads of BLIP-base (144) or of a full-size ALBEF (72), patched one by one:
the sweep over a forward pass, and a plain loop of one hooked forward per head over the sweep.

384 pixels, 14 text tokens, the text corrupted. The loop is measured on `--loop` heads and scaled
to all of them.
"""

from __future__ import annotations

import argparse

import torch
from common import albef_base, blip_base, in_turn
from transformers import BlipImageProcessorPil, BlipProcessor

from hooked_vlm import HookedBLIP, data
from hooked_vlm import patching as P

TEXTS = [
    f"a {color} circle left of a blue square above a green cross" for color in ("red", "black")
]
HEADS = "text.blocks.*.cross_attn.heads.*.hook_z"
AT_MOST = {"blip": 4.5, "albef": 3.0}  # forward passes


def main() -> None:
    """Prints both ratios and the largest difference between sweep and loop."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loop", type=int, default=4, help="heads of the loop that are run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=AT_MOST, default="blip")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = blip_base()[1] if options.model == "blip" else albef_base()
    tokenizer = HookedBLIP.from_pretrained("toy-blip-itm").tokenizer
    model.processor = BlipProcessor(BlipImageProcessorPil(), tokenizer)
    pair = data.Pair(data.shapes.scenes(1, seed=0)[0].image(384), TEXTS[0], corrupt_text=TEXTS[1])
    given = model.prepare(pair.images, pair.texts)
    corrupt = {name: t[-1:] for name, t in given.items()}
    sites = model.sites(HEADS)
    some = sites[:: len(sites) // options.loop][: options.loop]
    _, clean = model.run_with_cache(**given, names_filter=[site.name for site in some])
    margin = P.itm_margin()

    def loop() -> torch.Tensor:
        rows = []
        for site in some:
            value = clean[site.name][:1]
            patch = [(site.name, lambda z, hook, value=value: value)]
            rows.append(margin(model.run_with_hooks(**corrupt, fwd_hooks=patch)))
        return torch.cat(rows)

    def sweep() -> torch.Tensor:
        result = P.activation_patching(model, pair, HEADS, margin, progress=False)
        return torch.from_numpy(result.data.values.flatten())

    swept = sweep()[[sites.index(site) for site in some]]
    error = (swept - loop()).abs().max()
    seconds = in_turn(options.runs, forward=lambda: model(**corrupt), sweep=sweep, loop=loop)
    whole = seconds["loop"] * len(sites) / len(some)
    forwards, times = seconds["sweep"] / seconds["forward"], whole / seconds["sweep"]
    print(
        f"{len(sites)} heads in {forwards:.2f} forward passes (at most "
        f"{AT_MOST[options.model]}); a loop takes "
        f"{times:.0f} times as long (at least 30); largest difference {error:.1e}"
    )


if __name__ == "__main__":
    main()
