"""Weights into models: memory-mapped where they can stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.models import quantized
from hooked_vlm.models.devices import AUTOMATIC, DISK, Placement, gigabytes, place
from weights_conversion import Checkpoint, InMemory, plan
from weights_conversion.rules import Rule, Step

if TYPE_CHECKING:
    from hooked_vlm.models.resumable import ResumableModel

SLACK = 0.04  # how far a conversion may exceed the size of what it makes


@dataclass(frozen=True)
class Loading:
    """How weights are wanted.

    Attributes:
        dtype: what to convert to; None keeps the released numbers, memory-mapped, and widens them
            where they are of several types.
        device: where to put them; None leaves them where they are, the CPU for files.
        device_map: where to put each part, see `devices.place`.
        max_memory: how much each device may hold of them.
        offload_folder: where weights of the map's `disk` are written that need a conversion.
        quantization_config: a `transformers.TorchAoConfig`, see `quantized`.

    Raises:
        ValueError: on construction: a device that is not there, or that cannot compute in the
            dtype; arguments that exclude one another.
    """

    dtype: torch.dtype | None = None
    device: torch.device | str | int | None = None
    device_map: str | int | torch.device | Mapping[str, Any] | None = None
    max_memory: Mapping[Any, int | str] | None = None
    offload_folder: str | Path | None = None
    quantization_config: Any = None

    def __post_init__(self) -> None:
        if self.device is not None and self.device_map is not None:
            raise ValueError("device= is for one device, device_map= for several; give one of them")
        if self.device_map is None and (self.max_memory, self.offload_folder) != (None, None):
            raise ValueError("max_memory= and offload_folder= go with device_map=")
        if self.quantization_config is not None:
            quantized.method(self.quantization_config)
            if self.device_map is not None:
                raise ValueError(
                    "quantised weights are on one device: give device=, no device_map="
                )
        devices: set[Any] = {"cpu" if self.device is None else self.device}
        if isinstance(self.device_map, Mapping):
            devices = set(self.device_map.values()) - {DISK}
        elif self.device_map is not None and self.device_map not in AUTOMATIC:
            devices = {self.device_map}
        for device in devices:
            check(self.dtype, device)


def check(dtype: torch.dtype | None, device: torch.device | str | int) -> None:
    """Refuses a device that is not there, and a dtype that it cannot compute in.

    Raises:
        ValueError: says why.
    """
    try:
        one = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {said}") from error
    if dtype is None:
        return
    why = "it has no fractions"
    if dtype.is_floating_point:
        try:
            one = torch.ones(2, 2, dtype=dtype, device=device)
            F.layer_norm(one @ one, (2,))
            return
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
    raise ValueError(
        f"dtype={dtype} is none that a model can run in on {one.device.type!r} ({why}); use "
        "torch.float32, torch.bfloat16 or torch.float16"
    )


def assign(
    model: ResumableModel,
    checkpoint: Checkpoint | InMemory,
    rules: list[Rule],
    how: Loading = Loading(),
) -> None:
    """Fills a model made on the meta device; nothing is changed unless everything fits.

    Args:
        model: the model, whose tied parameters stay tied.
        checkpoint: where the tensors are.
        rules: the table of its layout.
        how: what they become and where they go.

    Raises:
        weights_conversion.ConversionError: the checkpoint does not fit the model.
        ValueError: the weights do not fit in memory.
    """
    parameters = dict(model.named_parameters())  # each tied parameter once
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    steps = plan(checkpoint.shapes, rules, shapes, checkpoint.same)
    widest = reduce(torch.promote_types, (checkpoint.dtypes[step.source] for step in steps))
    dtype = how.dtype or widest
    placement = None
    homes = dict.fromkeys(parameters, how.device)
    if how.device_map is not None:
        placement = place(model.to(dtype), how.device_map, how.max_memory)
        homes = placement.homes
    small = set() if how.quantization_config is None else quantized.names(model)
    stay, made, written = _sorted(steps, checkpoint, dtype, homes, small)
    if written and how.offload_folder is None:
        raise ValueError(_too_large(placement, written, checkpoint, dtype))
    filled: dict[str, Tensor] = {}
    for step, tensor in _read(checkpoint, stay):
        filled |= step.apply(tensor)
    for part in _parts(made, checkpoint, dtype, small):
        for step, tensor in _read(checkpoint, part):
            for name, value in step.apply(tensor).items():
                filled[name] = value.to(device=homes[name], dtype=dtype)
                if name in small:
                    kind = quantized.method(how.quantization_config)
                    filled[name] = quantized.quantized(filled[name], kind)
    for one in written:
        for step, tensor in _read(checkpoint, [one]):
            for name, value in step.apply(tensor).items():
                filled[name] = _on_disk(name, value.to(dtype), Path(str(how.offload_folder)))
    fresh = {
        id(parameters[name]): nn.Parameter(filled[name], requires_grad=False) for name in filled
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fresh[id(parameter)]
    if placement is not None:
        placement.connect(model)
        model.device_map = placement.parts


def _read(
    checkpoint: Checkpoint | InMemory, steps: Iterable[Step]
) -> Iterator[tuple[Step, Tensor]]:
    steps = list(steps)
    tensors = checkpoint.read(step.source for step in steps)
    for step in steps:
        yield step, tensors.pop(step.source)


def _sorted(
    steps: list[Step],
    checkpoint: Checkpoint | InMemory,
    dtype: torch.dtype,
    homes: Mapping[str, Any],
    small: set[str],
) -> tuple[list[Step], list[Step], list[Step]]:
    """What stays in its file, what is converted or moved, and what is converted to the disk."""
    stay, made, written = [], [], []
    for step in steps:
        same = checkpoint.dtypes[step.source] == dtype and small.isdisjoint(step.targets)
        here = {homes[name] for name in step.targets}
        if same and all(home is None or str(home) in ("cpu", DISK) for home in here):
            stay.append(step)
        elif DISK in here:
            written.append(step)
        else:
            made.append(step)
    return stay, made, written


def _parts(
    steps: list[Step], checkpoint: Checkpoint | InMemory, dtype: torch.dtype, small: set[str]
) -> Iterator[list[Step]]:
    """Runs of steps such that what is made and what is mapped to make it stay near the whole.

    The largest come first, and long runs with them, while little else is in memory.
    """
    numbers = {step.source: math.prod(checkpoint.shapes[step.source]) for step in steps}
    # Of quantised ones, torchao keeps a byte or less for each number.
    sizes = {
        step.source: numbers[step.source]
        * (dtype.itemsize if small.isdisjoint(step.targets) else 1)
        for step in steps
    }
    limit = (1 + SLACK) * sum(sizes.values())
    part: list[Step] = []
    made = mapped = 0
    for step in sorted(steps, key=lambda step: -numbers[step.source]):
        new = sizes[step.source]
        old = checkpoint.dtypes[step.source].itemsize * numbers[step.source]
        if part and made + new + mapped + old > limit:
            yield part
            part, mapped = [], 0
        part.append(step)
        made += new
        mapped += old
    if part:
        yield part


def _on_disk(name: str, value: Tensor, folder: Path) -> Tensor:
    """A tensor in a file of its own, mapped; a file that is there may be mapped, so it stays."""
    folder.mkdir(parents=True, exist_ok=True)
    file, fresh = folder / f"{name}.safetensors", folder / f"{name}.part"
    save_file({name: value.contiguous()}, fresh)
    fresh.replace(file)
    return Checkpoint([file]).read([name])[name]


def _too_large(
    placement: Placement | None,
    written: list[Step],
    checkpoint: Checkpoint | InMemory,
    dtype: torch.dtype,
) -> str:
    assert placement is not None
    numbers = (math.prod(checkpoint.shapes[step.source]) for step in written)
    return (
        f"{placement.told()} {gigabytes(dtype.itemsize * sum(numbers))} of the disk's are not in "
        f"{dtype} in the files and must be written anew: name a folder for them by offload_folder="
    )
