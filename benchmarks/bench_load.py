"""Loading a full-size BLIP: peak memory over the size of the weights, and time over transformers'.

Each load runs in a process of its own, ours and theirs in turn. Memory is how far the peak of the
resident set rises above what it was before the load, after every page of the weights was touched;
time includes that touch, so that a mapped file gains nothing by being left unread. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from hooked_vlm.toys import path

MEMORY_LIMIT, TIME_LIMIT = 1.1, 1.0
CASES = [("safetensors", ""), ("safetensors", "bfloat16"), ("bin", ""), ("bin", "bfloat16")]


def child(who: str, folder: str, dtype: str) -> None:
    """One load in this process; prints its cost."""
    from hooked_vlm import HookedBLIP

    torch.set_num_threads(1)
    load = (HookedBLIP if who == "ours" else BlipForImageTextRetrieval).from_pretrained
    wanted: dict[str, Any] = {"dtype": getattr(torch, dtype)} if dtype else {}
    if who == "ours":
        wanted["processor"] = HookedBLIP.from_pretrained("toy-blip-itm").processor  # weights alone
    load(path("toy-blip-itm"), **wanted)  # imports and first calls
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start, cpu = _kilobytes("VmRSS"), os.times().elapsed, _cpu()
    model = load(folder, **wanted)
    for parameter in model.parameters():
        parameter.flatten()[:: 4096 // parameter.element_size()].sum()
    cost = {
        "seconds": os.times().elapsed - start,
        "cpu": _cpu() - cpu,
        "memory": 1024 * (_kilobytes("VmHWM") - before) / sum(p.nbytes for p in model.parameters()),
    }
    print(json.dumps(cost))


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _cpu() -> float:
    return os.times().user + os.times().system


def make(folder: Path, layers: int) -> None:
    """A BLIP-base with random weights, in both file formats."""
    text = {"num_attention_heads": 12, "num_hidden_layers": layers, "vocab_size": 30524}
    vision = {"image_size": 384, "num_hidden_layers": layers}
    config = BlipConfig(text_config=text, vision_config=vision)
    model = BlipForImageTextRetrieval(config)
    model.save_pretrained(folder / "safetensors")
    model.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12, help="of each stack; 12 is full size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), options.layers)
        for kind, dtype in CASES:
            costs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
            for _ in range(options.runs):
                for who, found in costs.items():
                    command = [sys.executable, __file__, "--child", who, f"{scratch}/{kind}", dtype]
                    ran = subprocess.run(command, check=True, capture_output=True, text=True)
                    found.append(json.loads(ran.stdout.splitlines()[-1]))
            middle = {
                (who, what): statistics.median(cost[what] for cost in found)
                for who, found in costs.items()
                for what in ("memory", "seconds", "cpu")
            }
            ours, theirs = middle["ours", "memory"], middle["theirs", "memory"]
            ratio = middle["ours", "cpu"] / middle["theirs", "cpu"]
            print(
                f"{kind:12} {dtype or 'as it is':9} peak / weights {ours:.2f} (at most "
                f"{MEMORY_LIMIT}; transformers {theirs:.2f}), CPU time / transformers' {ratio:.2f} "
                f"(at most {TIME_LIMIT}; {middle['ours', 'seconds']:.2f} s against "
                f"{middle['theirs', 'seconds']:.2f} s)",
                flush=True,
            )


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
