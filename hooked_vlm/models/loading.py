"""Weights into models and back: memory-mapped where they can stay as they are."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weights_conversion import Checkpoint, plan
from weights_conversion.rules import Rule, Step

PART_BYTES = 2**27  # how much of a file is open at a time while it is converted


def assign(
    model: nn.Module,
    checkpoint: Checkpoint,
    rules: list[Rule],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Fills a model made on the meta device; nothing is changed unless everything fits.

    Args:
        model: the model, whose tied parameters stay tied.
        checkpoint: where the tensors are.
        rules: the table of its layout.
        dtype: what to convert to; None keeps the released numbers, memory-mapped.
        device: where to put them; None for the CPU.

    Raises:
        weights_conversion.ConversionError: the checkpoint does not fit the model.
    """
    parameters = dict(model.named_parameters())  # each tied parameter once
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    steps = plan(checkpoint.shapes, rules, shapes, checkpoint.same)
    filled: dict[str, Tensor] = {}
    for part in _parts(steps, checkpoint) if dtype or device else [steps]:
        tensors = checkpoint.read(step.source for step in part)
        for step in part:
            for target, value in step.apply(tensors[step.source]).items():
                filled[target] = value.to(device=device, dtype=dtype)
        del tensors
    fresh = {
        id(parameters[name]): nn.Parameter(filled[name], requires_grad=False) for name in filled
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fresh[id(parameter)]


def _parts(steps: list[Step], checkpoint: Checkpoint) -> Iterator[list[Step]]:
    part: list[Step] = []
    size = 0
    for step in steps:
        part.append(step)
        size += 4 * torch.Size(checkpoint.shapes[step.source]).numel()
        if size > PART_BYTES:
            yield part
            part, size = [], 0
    yield part


def save(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], processor: Any
) -> None:
    """Writes a folder that transformers reads; it appears whole or not at all.

    Args:
        folder: where to; files of the same names are replaced.
        tensors: the weights, under the layout's names.
        config: the `config.json`.
        processor: its files are written too; None writes none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(weights, Path(made, "model.safetensors"), metadata={"format": "pt"})
        if processor is not None:
            processor.save_pretrained(made)
        Path(made, "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in Path(made).iterdir():
            shutil.move(file, folder / file.name)
