"""Sweeps at full size against plain loops, on the same numbers, and the work they do against the
least that would do.

A BLIP-base and an ALBEF for retrieval, 384 pixels, float32, random weights. A loop runs one whole
pass per cell with PyTorch's hooks on transformers' BLIP (of ALBEF, which transformers has not, on
our own module); 'NOTICE' runs each cell as that code does, a batch of clean, corrupt and patched.
Loops are run on `--loop` cells, drawn over all layers, and multiplied.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_forward import KEEP
from common import albef_base, blip_base, in_turn

from hooked_vlm import patching as P
from hooked_vlm.models.names import Site
from hooked_vlm.models.sketch import measured

HEADS = "text.blocks.*.cross_attn.heads.*.hook_z"
Inputs = dict[str, torch.Tensor]
# Name: model, tokens, what is corrupt, positions, the loop, and how many times as long it takes at
# least (None: the plan's own number over 1.3).
CASES: dict[str, tuple[str, int, str, str | None, str, float | None]] = {
    "text-14": ("blip", 14, "text", None, "plain", 42),
    "image-9": ("blip", 9, "image", None, "plain", 36),
    "text-20": ("blip", 20, "text", None, "plain", None),
    "text-35": ("blip", 35, "text", None, "plain", None),
    "notice-9": ("blip", 9, "image", None, "NOTICE", 100),
    "each-9": ("blip", 9, "text", "each", "plain", 75),
    "albef-20": ("albef", 20, "image", None, "plain", 21),
}
MORE = ("attribution", "memory")


def main() -> None:
    """Prints a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--loop", type=int, default=12, help="cells of the loop that are run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=[*CASES, *MORE], action="append")
    options = parser.parse_args()
    if KEEP.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name in options.only or [*CASES, *MORE]:
        if name == "memory":
            within(800)
        elif name == "attribution":
            attributed(options.runs)
        else:
            case(name, options.runs, options.loop)


def case(name: str, runs: int, loop: int) -> None:
    """Times a sweep and its loop in turn."""
    kind, tokens, corrupted, positions, how, least = CASES[name]
    theirs, ours = blip_base() if kind == "blip" else (None, albef_base())
    clean = given(tokens, 0, 0)
    corrupt = given(tokens, int(corrupted == "image"), int(corrupted == "text"))
    margin = P.itm_margin()

    def sweep(max_rows: int | None = None) -> P.PatchingResult:
        return P.activation_patching(
            ours, (clean, corrupt), HEADS, margin, positions, max_rows=max_rows, progress=False
        )

    result = sweep()
    flat = torch.from_numpy(result.data.values.reshape(-1))
    places: list[Any] = [None] if positions is None else list(range(tokens))
    cells = [(site, place) for site in result.sites for place in places]
    drawn = [round(at) for at in torch.linspace(0, len(cells) - 1, loop).tolist()]
    batch = how == "NOTICE"
    run = looped(theirs, ours, clean, corrupt, batch)

    def by_loop() -> torch.Tensor:
        return torch.stack([run(*cells[at]) for at in drawn])

    error = (flat[drawn] - by_loop()).abs().max()
    with measured() as work:
        sweep(max_rows=64)
    plan = P.plan(ours, (clean, corrupt), HEADS, margin, positions, max_rows=64)
    seconds = in_turn(runs, forward=lambda: ours(**corrupt), sweep=sweep, loop=by_loop)
    times = seconds["loop"] * len(cells) / len(drawn) / seconds["sweep"]
    wanted = least or plan.speedup / 1.3
    print(
        f"{name}: {len(cells)} cells in {seconds['sweep'] / seconds['forward']:.2f} forward passes "
        f"(planned {plan.forward_equivalents:.2f}); the {how} loop takes {times:.0f} times as long "
        f"(at least {wanted:.0f}; {len(drawn)} cells timed and multiplied; work alone: "
        f"{plan.speedup * (3 if batch else 1):.0f}); {work.macs / 1e9:.0f} GMAC done, "
        f"{plan.macs / 1e9:.0f} planned; largest difference {error:.1e}",
        flush=True,
    )


def attributed(runs: int) -> None:
    """All heads by their gradients: those that read the image, at once and by position, and all."""
    _, ours = blip_base()
    every = "*.blocks.*attn.heads.*.hook_z"
    for name, corrupted, heads, positions in (
        ("all heads", "text", HEADS, None),
        ("all heads", "image", HEADS, None),
        ("heads at every position", "text", HEADS, "each"),
        ("all heads of both stacks", "image", every, None),
    ):
        clean = given(14, 0, 0)
        corrupt = given(14, int(corrupted == "image"), int(corrupted == "text"))

        def estimate(
            pair: tuple[Inputs, Inputs] = (clean, corrupt),
            heads: str = heads,
            positions: Any = positions,
        ) -> object:
            margin = P.itm_margin()
            return P.attribution_patching(ours, pair, heads, margin, positions, progress=False)

        seconds = in_turn(runs, forward=lambda: ours(**given(14, 0, 0)), estimate=estimate)
        print(
            f"attribution of {name}, {corrupted} corrupt: "
            f"{seconds['estimate'] / seconds['forward']:.2f} forward passes (at most 5)",
            flush=True,
        )


def within(limit: int) -> None:
    """All heads of the image encoder at each position, in so many MiB."""
    _, ours = blip_base()
    clean, corrupt = given(9, 0, 0), given(9, 1, 0)
    sites = ours.sites("vision.blocks.8.attn.heads.*.hook_z", positions=range(0, 577, 96))

    def sweep(memory: int) -> None:
        room = {"memory": memory * 2**20, "progress": False}
        P.activation_patching(ours, (clean, corrupt), sites, P.itm_margin(), **room)

    sweep(limit // 2)  # what a process needs once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    sweep(limit)
    plan = P.plan(ours, (clean, corrupt), sites, P.itm_margin(), memory=limit * 2**20)
    took = resident("VmHWM") - before
    print(
        f"memory: a sweep of {plan.runs} cells, {plan.max_rows} at a time, took {took:.0f} MiB "
        f"more than before (planned {plan.memory / 2**20:.0f}, limit {limit})",
        flush=True,
    )


def resident(what: str) -> float:
    """MiB of memory of this process, now or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def given(tokens: int, image: int, text: int) -> Inputs:
    """Inputs of one row; texts differ in two words."""
    pixels = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(image))
    ids = torch.randint(1000, 30000, (1, tokens), generator=torch.Generator().manual_seed(9))
    ids[:, 2:4] += text
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def looped(
    theirs: Any, ours: Any, clean: Inputs, corrupt: Inputs, batch: bool
) -> Callable[[Site, int | None], torch.Tensor]:
    """A function that runs one whole pass with one head's z patched.

    Args:
        theirs: transformers' BLIP; None to run our own module.
        ours: our model.
        clean: what is patched from.
        corrupt: what is patched into.
        batch: whether the clean run is made again for every cell, in one batch with the corrupt and
            the patched one.
    """
    if theirs is None:
        _, cache = ours.run_with_cache(**clean, names_filter="text.blocks.*.cross_attn.hook_z")

        def by_ours(site: Site, position: int | None) -> torch.Tensor:
            at = slice(None) if position is None else position
            name = f"text.blocks.{site.layer}.cross_attn.hook_z"

            def write(z: torch.Tensor, hook: object) -> torch.Tensor:
                z[:, at, site.head] = cache[name][:, at, site.head]
                return z

            logits = ours.run_with_hooks(**corrupt, fwd_hooks=[(name, write)])
            return logits[0, 1] - logits[0, 0]

        return by_ours
    attentions = [layer.crossattention.self for layer in theirs.text_encoder.encoder.layer]
    d_head = ours.text.cfg.d_head
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, args, output: kept.update({layer: output[0].clone()})

    handles = [m.register_forward_hook(keep(layer)) for layer, m in enumerate(attentions)]
    theirs(**clean)
    for handle in handles:
        handle.remove()
    both = {key: torch.cat([clean[key], corrupt[key], corrupt[key]]) for key in clean}

    def by_theirs(site: Site, position: int | None) -> torch.Tensor:
        own = slice(site.head * d_head, (site.head + 1) * d_head)
        at = slice(None) if position is None else position

        def write(module: object, args: object, output: Any) -> Any:
            z = output[0].clone()
            z[-1, at, own] = z[0, at, own] if batch else kept[site.layer][0, at, own]
            return (z, *output[1:])

        handle = attentions[site.layer].register_forward_hook(write)
        logits = theirs(**(both if batch else corrupt)).itm_score[-1]
        handle.remove()
        return logits[1] - logits[0]

    return by_theirs


if __name__ == "__main__":
    main()
