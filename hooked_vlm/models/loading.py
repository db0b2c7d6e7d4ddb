"""Weights into models: memory-mapped where they can stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from weights_conversion import Checkpoint, InMemory, plan
from weights_conversion.files import widened
from weights_conversion.rules import Rule, Shape, Step

SLACK = 0.05  # how far a conversion may exceed the size of what it makes


def assign(
    model: nn.Module,
    checkpoint: Checkpoint | InMemory,
    rules: list[Rule],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> None:
    """Fills a model made on the meta device; nothing is changed unless everything fits.

    Args:
        model: the model, whose tied parameters stay tied.
        checkpoint: where the tensors are.
        rules: the table of its layout.
        dtype: what to convert to; None keeps the released numbers, memory-mapped, and widens them
            where they are of several types.
        device: where to put them; None leaves them where they are, the CPU for files.

    Raises:
        weights_conversion.ConversionError: the checkpoint does not fit the model.
    """
    parameters = dict(model.named_parameters())  # each tied parameter once
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    steps = plan(checkpoint.shapes, rules, shapes, checkpoint.same)
    filled: dict[str, Tensor] = {}
    for part in _parts(steps, checkpoint.shapes, dtype) if dtype or device else [steps]:
        filled |= _read(checkpoint, part, dtype, device)
    filled = widened(filled)
    fresh = {
        id(parameters[name]): nn.Parameter(filled[name], requires_grad=False) for name in filled
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fresh[id(parameter)]


def _read(
    checkpoint: Checkpoint | InMemory,
    steps: list[Step],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    tensors = checkpoint.read(step.source for step in steps)
    return {
        target: value.to(device=device, dtype=dtype)
        for step in steps
        for target, value in step.apply(tensors[step.source]).items()
    }


def _parts(
    steps: list[Step], shapes: Mapping[str, Shape], dtype: torch.dtype | None
) -> Iterator[list[Step]]:
    """Runs of steps such that what is made and what is mapped to make it stay near the whole.

    The largest come first, and long runs with them, while little else is in memory.
    """
    numbers = {step.source: math.prod(shapes[step.source]) for step in steps}
    each = torch.float32.itemsize if dtype is None else dtype.itemsize
    limit = (1 + SLACK) * each * sum(numbers.values())
    part: list[Step] = []
    made = mapped = 0
    for step in sorted(steps, key=lambda step: -numbers[step.source]):
        count = numbers[step.source]
        if part and made + each * count + mapped + 4 * count > limit:
            yield part
            part, mapped = [], 0
        part.append(step)
        made += each * count
        mapped += 4 * count  # as in every released file
    yield part
