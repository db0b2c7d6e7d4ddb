"""A LLaVA at 7B's widths with a few language layers: one forward pass, what caching costs, and all
heads of the language model patched at the last position, or at each of 20 behind the image.

576 tokens of an image and 40 of text, float32, random weights. The peer is transformers: with fused
attention for the pass and the streams, with eager attention, which gives its patterns, for these.
Loops patch a head in one full pass each, on `--loop` cells drawn over all layers, and are
multiplied: by a hook of PyTorch's on transformers' model, in nnsight (where it is installed), and
in TransformerLens' bridge.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from bench_bridge import bridged
from bench_forward import KEEP
from common import in_turn, llava, prompt

from hooked_vlm import patching as P

Inputs = dict[str, torch.Tensor]
Cell = Callable[[int, int, int], torch.Tensor]  # of layer, head and position, to logits
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
    parser.add_argument("--only", choices=("forward", "sweep", "positions"))
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    theirs, ours = llava(options.layers, options.vision_layers, options.width)
    clean, corrupt = prompt(0), prompt(1)
    if options.only in (None, "forward"):
        forward(theirs, ours, clean, options.runs)
    if options.only in (None, "sweep"):
        sweep(theirs, ours, clean, corrupt, [-1], options.runs, options.loop)
    if options.only in (None, "positions"):
        sweep(theirs, ours, clean, corrupt, range(-20, 0), options.runs, options.loop)


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
    clean: Inputs,
    corrupt: Inputs,
    positions: Sequence[int],
    runs: int,
    loop: int,
) -> None:
    """All heads at some positions, and loops over some of them."""
    metric = P.logit_diff(100, 200)
    sites = ours.sites(HEADS, positions=positions)
    drawn = [round(at) for at in torch.linspace(0, len(sites) - 1, loop).tolist()]
    some = [sites[at] for at in drawn]
    _, cache = ours.run_with_cache(**clean, names_filter="text.blocks.*.attn.hook_z")
    z = [cache[f"text.blocks.{layer}.attn.hook_z"] for layer in range(ours.text.cfg.n_layers)]
    peers = {"transformers": plain(theirs, corrupt, z)}
    if len(positions) == 1:
        peers["TransformerLens' bridge"] = in_bridge(theirs, corrupt, z)
        if find_spec("nnsight"):
            peers["nnsight"] = in_nnsight(theirs, corrupt, z)

    def over(peer: Cell) -> Callable[[], torch.Tensor]:
        return lambda: torch.cat([metric(peer(s.layer, s.head, s.position)) for s in some])

    def by_sweep() -> torch.Tensor:
        result = P.activation_patching(ours, (clean, corrupt), sites, metric, progress=False)
        return torch.from_numpy(result.data.values.flatten())

    swept = by_sweep()[drawn]
    size = metric(theirs(**corrupt).logits).abs().item()
    errors = {name: (swept - over(peer)()).abs().max() / size for name, peer in peers.items()}
    plan = P.plan(ours, (clean, corrupt), sites, metric)
    loops = {name: over(peer) for name, peer in peers.items()}
    seconds = in_turn(runs, forward=lambda: ours(**corrupt), sweep=by_sweep, **loops)
    n = ours.text.cfg.n_layers
    alone = len(positions) == 1
    least = len(sites) / (2 + 0.025 * n) * 2 / 3 if alone else 50
    print(
        f"{len(sites)} cells, heads at {len(positions)} positions, in "
        f"{seconds['sweep'] / seconds['forward']:.2f} forward passes (planned "
        f"{plan.forward_equivalents:.2f}; two of them make the activations)"
    )
    for name in peers:
        times = seconds[name] * len(sites) / len(some) / seconds["sweep"]
        print(
            f"  a loop in {name} takes {times:.0f} times as long (at least {least:.0f}; "
            f"{len(some)} of its cells timed, over all layers, and multiplied; work alone: "
            f"{plan.speedup:.0f}); relative difference {errors[name]:.1e}",
            flush=True,
        )


def own(z: torch.Tensor, head: int) -> slice:
    """A head's part of all heads' outputs, one behind the other."""
    return slice(head * z.shape[-1], (head + 1) * z.shape[-1])


def plain(theirs: Any, corrupt: Inputs, z: list[torch.Tensor]) -> Cell:
    """One pass of transformers' model with a hook of PyTorch's."""
    projections = [layer.self_attn.o_proj for layer in theirs.model.language_model.layers]

    def cell(layer: int, head: int, position: int) -> torch.Tensor:
        def write(_: object, args: tuple[torch.Tensor]) -> torch.Tensor:
            args[0][:, position, own(z[layer], head)] = z[layer][:, position, head]
            return args[0]

        handle = projections[layer].register_forward_pre_hook(write)
        logits: torch.Tensor = theirs(**corrupt).logits
        handle.remove()
        return logits

    return cell


def in_nnsight(theirs: Any, corrupt: Inputs, z: list[torch.Tensor]) -> Cell:
    """One trace."""
    from nnsight import NNsight

    traced = NNsight(theirs)

    def cell(layer: int, head: int, position: int) -> torch.Tensor:
        at, value = own(z[layer], head), z[layer][:, position, head]
        with traced.trace(**corrupt):
            module = traced.model.language_model.layers[layer].self_attn.o_proj
            module.input[:, position, at] = value
            logits = traced.lm_head.output.save()
        return logits

    return cell


def in_bridge(theirs: Any, corrupt: Inputs, z: list[torch.Tensor]) -> Cell:
    """One hooked pass of TransformerLens' bridge."""
    bridge = bridged(theirs)
    ids, pixels = corrupt["input_ids"], {"pixel_values": corrupt["pixel_values"]}

    def cell(layer: int, head: int, position: int) -> torch.Tensor:
        def write(found: torch.Tensor, hook: object) -> torch.Tensor:
            found[:, position, head] = z[layer][:, position, head]
            return found

        hooks = [(f"blocks.{layer}.attn.hook_z", write)]
        logits: torch.Tensor = bridge.run_with_hooks(ids, fwd_hooks=hooks, **pixels)
        return logits

    return cell


if __name__ == "__main__":
    main()
