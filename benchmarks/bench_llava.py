"""A LLaVA at 7B's widths with a few language layers: one forward pass, what caching costs, and all
heads of the language model patched at the last position.

576 tokens of an image and 40 of text, float32, random weights. The peer is transformers: with fused
attention for the pass and the streams, with eager attention, which gives its patterns, for these.
The plain loop patches a head by a hook of PyTorch's on transformers' model, one full pass each; it
is measured on `--loop` heads, drawn over all layers, and multiplied.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bench_forward import KEEP
from common import in_turn, llava, prompt

from hooked_vlm import patching as P

HEADS = "text.blocks.*.attn.heads.*.hook_z"


@contextmanager
def attention(model: Any, kind: str) -> Iterator[None]:
    """transformers' model with another attention."""
    model.set_attn_implementation(kind)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def main() -> None:
    """Prints a line for each ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    parser.add_argument("--vision-layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=4096, help="of the language model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loop", type=int, default=8, help="heads of the loop that are run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("forward", "sweep"))
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    theirs, ours = llava(options.layers, options.vision_layers, options.width)
    clean, corrupt = prompt(0), prompt(1)
    if options.only != "sweep":
        forward(theirs, ours, clean, options.runs)
    if options.only != "forward":
        sweep(theirs, ours, clean, corrupt, options.runs, options.loop)


def forward(theirs: Any, ours: Any, given: dict[str, torch.Tensor], runs: int) -> None:
    """The pass, and what caching costs."""
    error = (ours(**given) - theirs(**given).logits).abs().max() / theirs(
        **given
    ).logits.abs().max()

    def eager() -> object:
        with attention(theirs, "eager"):
            return theirs(**given, output_attentions=True)

    streams = "text.blocks.*.hook_resid_*"
    patterns = "text.blocks.*.attn.hook_pattern"
    seconds = in_turn(
        runs,
        theirs=lambda: theirs(**given),
        ours=lambda: ours(**given),
        streams=lambda: ours.run_with_cache(**given, names_filter=streams),
        eager=eager,
        patterns=lambda: ours.run_with_cache(**given, names_filter=patterns),
    )
    print(
        f"forward / transformers' {seconds['ours'] / seconds['theirs']:.3f} (at most 1.03), all "
        f"streams cached / forward {seconds['streams'] / seconds['ours']:.3f} (at most 1.1), all "
        f"patterns cached / transformers' eager {seconds['patterns'] / seconds['eager']:.3f} (at "
        f"most 1.0); forward {seconds['ours']:.1f} s of CPU, relative error {error:.1e}",
        flush=True,
    )


def sweep(
    theirs: Any,
    ours: Any,
    clean: dict[str, torch.Tensor],
    corrupt: dict[str, torch.Tensor],
    runs: int,
    loop: int,
) -> None:
    """All heads at the last position, and a loop over some of them."""
    metric, d_head = P.logit_diff(100, 200), ours.text.cfg.d_head
    sites = ours.sites(HEADS, positions=[-1])
    some = sites[:: len(sites) // loop][:loop]
    projections = [layer.self_attn.o_proj for layer in theirs.model.language_model.layers]
    z: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: z.update({layer: args[0]}))
        for layer, module in enumerate(projections)
    ]
    theirs(**clean)
    for handle in handles:
        handle.remove()

    def cell(layer: int, head: int) -> torch.Tensor:
        def write(_: object, args: tuple[torch.Tensor]) -> torch.Tensor:
            own = slice(head * d_head, (head + 1) * d_head)
            args[0][:, -1, own] = z[layer][:, -1, own]
            return args[0]

        handle = projections[layer].register_forward_pre_hook(write)
        logits = theirs(**corrupt).logits
        handle.remove()
        return metric(logits)

    def by_loop() -> torch.Tensor:
        return torch.cat([cell(site.layer, site.head) for site in some])

    def by_sweep() -> torch.Tensor:
        result = P.activation_patching(ours, (clean, corrupt), sites, metric, progress=False)
        return torch.from_numpy(result.data.values.flatten())

    swept = by_sweep()[[sites.index(site) for site in some]]
    size = metric(theirs(**corrupt).logits).abs().item()
    error = (swept - by_loop()).abs().max() / size
    seconds = in_turn(runs, forward=lambda: ours(**corrupt), sweep=by_sweep, loop=by_loop)
    n = ours.text.cfg.n_layers
    whole = seconds["loop"] * len(sites) / len(some)
    print(
        f"{len(sites)} heads at the last position in {seconds['sweep'] / seconds['forward']:.2f} "
        f"forward passes (at most 3.2; two of them make the activations); a loop over transformers "
        f"takes {whole / seconds['sweep']:.0f} times as long ({len(some)} of its cells timed, over "
        f"all layers, and multiplied; law: {len(sites) / (2 + 0.025 * n):.0f}); "
        f"relative difference {error:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
