"""Parity on the user's own weights: logits and activations held against transformers."""

from __future__ import annotations

import math
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hooked_vlm.data import shapes
from hooked_vlm.hub import locate
from hooked_vlm.models.base import HookedVLM

# Largest error that rounding explains, over the tensor's largest value (at least 1).
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}

# What transformers' modules give, and what we call it: module, which of its outputs, hook name.
Exposed = list[tuple[str, int | None, str]]

VISION: Exposed = [
    (r"vision_model\.encoder\.layers\.(\d+)", None, "vision.blocks.{}.hook_resid_post"),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn", 1, "vision.blocks.{}.attn.hook_pattern"),
]
BLIP: Exposed = [
    *VISION,
    (r"vision_model\.post_layernorm", None, "hook_image_embeds"),
] + [
    (rf"{theirs}\.encoder\.layer\.(\d+){module}", output, f"{ours}.blocks.{{}}.{name}")
    for theirs, ours in (("text_encoder", "text"), (r"text_decoder\.bert", "decoder"))
    for module, output, name in (
        ("", None, "hook_normalized_resid_post"),
        (r"\.attention\.self", 1, "attn.hook_pattern"),
        (r"\.crossattention\.self", 1, "cross_attn.hook_pattern"),
        (r"\.attention\.output\.dense", None, "hook_attn_out"),
        (r"\.crossattention\.output\.dense", None, "hook_cross_attn_out"),
        (r"\.output\.dense", None, "hook_mlp_out"),
    )
]
CLIP: Exposed = [
    *VISION,
    (r"text_model\.encoder\.layers\.(\d+)", None, "text.blocks.{}.hook_resid_post"),
    (r"text_model\.encoder\.layers\.(\d+)\.self_attn", 1, "text.blocks.{}.attn.hook_pattern"),
]

LLAVA: Exposed = [
    (rf"model\.{module}\.layers\.(\d+){part}", output, f"{stack}.blocks.{{}}.{name}")
    for module, stack in ((r"vision_tower\.encoder", "vision"), ("language_model", "text"))
    for part, output, name in (
        ("", None, "hook_resid_post"),
        (r"\.self_attn", 1, "attn.hook_pattern"),
        (r"\.mlp", None, "hook_mlp_out"),
    )
] + [(r"model\.multi_modal_projector", None, "hook_image_embeds")]


def reference(model: HookedVLM, name: str, revision: str | None) -> Any:
    """The same weights in transformers; of a file that it cannot read, as we save them."""
    config, _ = model.LAYOUT.write(model.cfg)
    if "architectures" not in config:
        raise ValueError(
            f"transformers has no class for {name!r} ({config['model_type']}): there is nothing to "
            "compare with"
        )
    kind = getattr(transformers, config["architectures"][0])
    located = locate(name, revision=revision)
    source = None if "vision_tower" in model.provenance else located.processor
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            model.save_pretrained(folder)
            source = folder
        with _quietly():
            hf = kind.from_pretrained(
                source, revision=revision, dtype=model.dtype, attn_implementation="eager"
            )
    return hf.to(model.device).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' own progress bar."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def activations(
    hf: nn.Module, exposed: Exposed, run: Callable[[], Any]
) -> tuple[dict[str, Tensor], Any]:
    """What transformers' modules give in one run, under our names, and the run's own result."""
    found: dict[str, Tensor] = {}

    def record(name: str, output: int | None) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, result: Any) -> None:
            # The vision tower's last norm runs a second time, on what nobody reads.
            found.setdefault(name, result if output is None else result[output])

        return hook

    handles = []
    for path, module in hf.named_modules():
        for pattern, output, name in exposed:
            if match := re.fullmatch(pattern, path):
                handles.append(
                    module.register_forward_hook(record(name.format(*match.groups()), output))
                )
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return found, result


def _example(model: HookedVLM) -> tuple[Image.Image, str]:
    """An image and a text that the model can be asked about it."""
    scene = shapes.scenes(1, seed=0)[0]
    asks = model.task in ("vqa", "llava")
    return scene.image(384), scene.questions()[0].text if asks else scene.caption()


@torch.no_grad()
def check(model: HookedVLM, name: str, *, revision: str | None = None) -> bool:
    """Prints the worst error per stack, and says whether rounding explains it.

    Args:
        model: the model.
        name: what it was opened by.
        revision: of a Hub name.
    """
    hf = reference(model, name, revision)
    inputs = dict(model.prepare(*_example(model)))
    theirs = dict(inputs)
    heads: list[Tensor] = []
    if model.task == "vqa":
        start = torch.full((1, 1), model.cfg.bos_token_id, device=model.device)
        inputs["decoder_input_ids"] = theirs["decoder_input_ids"] = start
        hf.text_decoder.cls.register_forward_hook(lambda *given: heads.append(given[2]))
    exposed = {"clip": CLIP, "llava": LLAVA}.get(model.task, BLIP)
    expected, result = activations(hf, exposed, lambda: hf(**theirs))
    if model.task == "clip":
        expected["hook_image_embeds"] = result.image_embeds
        expected["hook_text_embeds"] = result.text_embeds
        expected["hook_logits"] = result.logits_per_image
    else:
        expected["hook_logits"] = (
            result.itm_score if model.task == "itm" else heads[0] if heads else result.logits
        )
    # transformers also runs the blocks of the image encoder that LLaVA does not read.
    expected = {point: value for point, value in expected.items() if point in model.hook_dict}
    _, cache = model.run_with_cache(**inputs, names_filter=list(expected))
    worst: dict[str, tuple[float, str]] = {}
    counts: dict[str, int] = {}
    for point, value in expected.items():
        stack = model.stack_of(point) if point != "hook_logits" else "logits"
        size = max(1.0, float(value.abs().max()))
        error = float((cache[point].double() - value.double()).abs().max()) / size
        if math.isnan(error):
            error = math.inf
        worst[stack] = max(worst.get(stack, (0.0, point)), (error, point))
        counts[stack] = counts.get(stack, 0) + 1
    tolerance = TOLERANCE[model.dtype]
    table = Table(title=f"{name}: against transformers {transformers.__version__}, {model.dtype}")
    for column in ("stack", "tensors", "worst error", "at", ""):
        table.add_column(column, overflow="fold")
    for stack, (error, point) in worst.items():
        verdict = "[green]equal[/]" if error <= tolerance else "[red]differs[/]"
        table.add_row(stack, str(counts[stack]), f"{error:.1e}", point, verdict)
    Console().print(table)
    fine = all(error <= tolerance for error, _ in worst.values())
    Console().print(
        f"relative to each tensor's largest value (at least 1); up to {tolerance:.0e} is rounding"
    )
    return fine


@torch.no_grad()
def deviation(model: HookedVLM, quantized: HookedVLM, name: str) -> None:
    """Prints per stack how far quantised weights move logits and activations; no verdict.

    Args:
        model: the model as it is.
        quantized: the same, of fewer bits.
        name: what both were opened by.
    """
    inputs = model.prepare_prompt(*_example(model))
    _, expected = model.run_with_cache(**inputs)
    _, found = quantized.run_with_cache(**inputs)
    rows: dict[str, list[tuple[float, str, float]]] = {}
    for point, value in dict(expected).items():
        if "hook_attn_scores" in point:  # masked ones are the dtype's lowest number
            continue
        wanted, difference = value.double(), found[point].double() - value.double()
        worst = float(difference.abs().max()) / max(1.0, float(wanted.abs().max()))
        share = float(difference.norm() / wanted.norm().clamp_min(1e-30))
        stack = model.stack_of(point) if point != "hook_logits" else "logits"
        rows.setdefault(stack, []).append((worst, point, share))
    method = quantized.provenance["quantization"].partition("(")[0]
    table = Table(title=f"{name}: {method} against {model.dtype}")
    for column in ("stack", "tensors", "worst error", "at", "median share"):
        table.add_column(column, overflow="fold")
    for stack, measured in rows.items():
        worst, point, _ = max(measured)
        share = statistics.median(share for _, _, share in measured)
        table.add_row(stack, str(len(measured)), f"{worst:.1e}", point, f"{share:.1e}")
    Console().print(table)
    Console().print(
        "worst error: relative to each tensor's largest value (at least 1); share: length of the "
        "difference over that of the tensor"
    )
