"""Loading a full-size model: peak memory over the size of the weights, and time over transformers'.

Each load runs in a process of its own, ours and theirs in turn. Memory is how far the peak of the
resident set rises above what it was before the load, after every page of the weights was touched;
time includes that touch, so that a mapped file gains nothing by being left unread. `--cold` has
the kernel forget the files before each load, so that time includes the disk. Linux only.

`--model llava` writes a checkpoint of the shape of LLaVA-1.5 7B, 14 GB of random bfloat16 in three
shards, one after another, and deletes it afterwards, whatever happens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hooked_vlm.toys import path

TIME_LIMIT = 1.0
# By model: the memory that is wanted, layers at full size, kinds of files, dtypes.
MODELS: dict[str, tuple[float, int, list[str], list[str]]] = {
    "blip": (1.1, 12, ["safetensors", "bin"], ["", "bfloat16"]),
    "llava": (1.05, 32, ["shards"], [""]),
}
SHARDS = 3


def child(model: str, who: str, folder: str, small: str, dtype: str) -> None:
    """One load in this process; prints its cost."""
    from hooked_vlm import HookedBLIP, HookedLlava

    torch.set_num_threads(1)
    ours, theirs = {
        "blip": (HookedBLIP, BlipForImageTextRetrieval),
        "llava": (HookedLlava, LlavaForConditionalGeneration),
    }[model]
    load: Callable[..., Any] = (ours if who == "ours" else theirs).from_pretrained
    wanted: dict[str, Any] = {"dtype": getattr(torch, dtype)} if dtype else {}
    if who == "ours" and model == "blip":
        wanted["processor"] = HookedBLIP.from_pretrained("toy-blip-itm").processor  # weights alone
    load(small, **wanted)  # imports and first calls
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start, cpu = _kilobytes("VmRSS"), os.times().elapsed, _cpu()
    loaded = load(folder, **wanted)
    for parameter in loaded.parameters():
        parameter.flatten()[:: 4096 // parameter.element_size()].sum()
    cost = {
        "seconds": os.times().elapsed - start,
        "cpu": _cpu() - cpu,
        "memory": 1024
        * (_kilobytes("VmHWM") - before)
        / sum(p.nbytes for p in loaded.parameters()),
    }
    print(json.dumps(cost))


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def _cpu() -> float:
    return os.times().user + os.times().system


def make_blip(folder: Path, layers: int) -> Path:
    """A BLIP-base with random weights, in both file formats; returns a small one's folder."""
    text = {"num_attention_heads": 12, "num_hidden_layers": layers, "vocab_size": 30524}
    vision = {"image_size": 384, "num_hidden_layers": layers}
    config = BlipConfig(text_config=text, vision_config=vision)
    model = BlipForImageTextRetrieval(config)
    model.save_pretrained(folder / "safetensors")
    model.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    (folder / "bin" / "model.safetensors").unlink()
    return Path(path("toy-blip-itm"))


def make_llava(folder: Path, layers: int) -> Path:
    """A LLaVA-1.5 7B of random bfloat16 numbers in shards; returns a small one's folder."""
    vision = {"model_type": "clip_vision_model", "intermediate_size": 4096, "hidden_size": 1024}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336}
    text = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 32064}
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    _write_llava(folder / "shards", {**vision, "patch_size": 14, "projection_dim": 768}, text)
    _write_llava(
        folder / "small", {**vision, "patch_size": 14, **small}, {**text, **small, **heads}
    )
    return folder / "small"


def _write_llava(folder: Path, vision: dict[str, Any], text: dict[str, Any]) -> None:
    folder.mkdir()
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=32000,
        dtype="bfloat16",
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = LlavaForConditionalGeneration(config).to(torch.bfloat16).state_dict()
    released = {  # the names of the files on the Hub
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    generator = torch.Generator().manual_seed(0)
    size = sum(tensor.nbytes for tensor in shapes.values()) / SHARDS
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    written = 0
    for number, (name, tensor) in enumerate(shapes.items(), 1):
        head = next(head for head in released if name.startswith(head))
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        shard[released[head] + name.removeprefix(head)] = made.uniform_(
            -0.04, 0.04, generator=generator
        )
        last = number == len(shapes)
        if last or sum(one.nbytes for one in shard.values()) >= size:
            written += 1
            file = f"model-{written:05}-of-{SHARDS:05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _forget(folder: Path) -> None:
    """Has the kernel drop what it keeps of a folder's files."""
    os.sync()
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="blip")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, help="of each stack, of LLaVA's text; default: all")
    parser.add_argument("--dtype", nargs="*", help="what to convert to; '' for as it is")
    parser.add_argument("--dir", type=Path, help="where the checkpoint is written for a while")
    parser.add_argument("--cold", action="store_true", help="from the disk, not from its cache")
    options = parser.parse_args()
    limit, layers, kinds, dtypes = MODELS[options.model]
    make = make_blip if options.model == "blip" else make_llava
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        small = make(Path(scratch), options.layers or layers)
        for kind in kinds:
            size = sum(file.stat().st_size for file in Path(scratch, kind).iterdir())
            print(f"{options.model}, {kind}: {size / 1e9:.2f} GB", flush=True)
            for dtype in dtypes if options.dtype is None else options.dtype:
                costs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
                for _ in range(options.runs):
                    for who, found in costs.items():
                        if options.cold:
                            _forget(Path(scratch, kind))
                        asked = [options.model, who, f"{scratch}/{kind}", str(small), dtype]
                        command = [sys.executable, __file__, "--child", *asked]
                        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
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
                    f"{limit}; transformers {theirs:.2f}), CPU time / transformers' {ratio:.2f} "
                    f"(at most {TIME_LIMIT}; {middle['ours', 'seconds']:.2f} s against "
                    f"{middle['theirs', 'seconds']:.2f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
