"""A model over several devices: where its weights are, and where they are used.

What runs as a whole, a block, an embedding, a head, is a unit. A unit runs on its own device, or,
where its weights are kept on the CPU or the disk, on the first accelerator, to which they come for
as long as it runs. What is on the disk is memory-mapped: without an accelerator, it is read as it
is used, and the kernel may drop it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory, get_max_memory
from torch import Tensor, nn

from hooked_vlm.components.stack import Stack

DISK = "disk"
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def units(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules with weights that run as wholes, in order."""
    for name, module in model.named_children():
        if isinstance(module, Stack | nn.ModuleList | nn.ModuleDict):
            yield from units(module, f"{prefix}{name}.")
        elif next(module.parameters(), None) is not None:
            yield prefix + name, module


@dataclass(frozen=True)
class Placement:
    """Where weights are and where they are used.

    Attributes:
        parts: a device, or `disk`, for each unit.
        homes: the same for each parameter.
        runs: for each unit the device that it runs on.
        main: where inputs are, and what stands behind the stacks.
        needed: bytes by home.
        room: bytes that there are, by the names of accelerate.
    """

    parts: dict[str, Any]
    homes: dict[str, Any]
    runs: dict[str, torch.device]
    main: torch.device
    needed: dict[Any, int]
    room: dict[Any, int]

    def told(self) -> str:
        """How much is needed and how much there is."""
        total = sum(self.needed.values())
        wanted = ", ".join(f"{gigabytes(n)} on {home}" for home, n in self.needed.items())
        room = ", ".join(f"{gigabytes(n)} on {_name(key)}" for key, n in self.room.items())
        return f"the weights need {gigabytes(total)} ({wanted}), and there is room for {room}."

    def connect(self, model: nn.Module) -> None:
        """Makes the units run where they shall; nothing to do where all is on one device."""
        if {torch.device("cpu" if home == DISK else home) for home in self.homes.values()} == {
            self.main
        }:
            return
        ends = {
            f"{name}.{end}"
            for name, stack in model.named_children()
            if isinstance(stack, Stack)
            for end in stack.AFTER_BLOCKS
        }
        for name, unit in units(model):
            back = self.main if name in ends or "." not in name else None
            visit = Visit(self.runs[name], back)
            unit.register_forward_pre_hook(visit.arrive, with_kwargs=True)
            unit.register_forward_hook(visit.leave, always_call=True)


class Visit:
    """Brings to a device what a unit is given, and for as long as it runs its weights.

    Args:
        device: where the unit runs.
        back: where its output goes; None leaves it there.
    """

    def __init__(self, device: torch.device, back: torch.device | None = None):
        self.device, self.back = device, back
        self.away: list[tuple[nn.Module, str, nn.Parameter]] = []

    def arrive(self, unit: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before the unit runs."""
        for module in unit.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.device != self.device:
                    self.away.append((module, name, parameter))
                    module._parameters[name] = parameter.to(self.device)  # type: ignore[assignment]  # no leaf, so gradients pass
        kwargs = {name: moved(value, self.device) for name, value in kwargs.items()}
        return moved(args, self.device), kwargs

    def leave(self, unit: nn.Module, args: Any, output: Any) -> Any:
        """After it, also where it raised."""
        while self.away:
            module, name, parameter = self.away.pop()
            module._parameters[name] = parameter
        return output if self.back is None else moved(output, self.back)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors on the device, also those in tuples and in what blocks read besides the stream.

    Dictionaries stay as they are: blocks keep in them what is on their own devices.
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is tuple:
        return tuple(moved(one, device) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)}
        )
    return value


def place(
    model: nn.Module,
    device_map: str | int | torch.device | Mapping[str, Any],
    max_memory: Mapping[Any, int | str] | None,
) -> Placement:
    """Finds a place for every weight.

    Args:
        model: of the dtype to come, on the meta device.
        device_map: as in transformers: `auto`, `balanced`, `balanced_low_0`, `sequential`, one
            device, or a dictionary from modules to devices, the CPU or the `disk`.
        max_memory: as in transformers: bytes, or texts such as `10GB`, by device.

    Raises:
        ValueError: a map that names what is not there, leaves something out, cuts a unit in two,
            or puts more on a device than it has room for.
    """
    parts = dict(units(model))
    limits: Any = None if max_memory is None else dict(max_memory)
    room: dict[Any, int] = get_max_memory(limits)
    chosen: Mapping[str, Any]
    if device_map in AUTOMATIC:
        whole = sorted({type(unit).__name__ for unit in parts.values()})
        if device_map != "sequential":
            room = get_balanced_memory(model, room, whole, low_zero=device_map == "balanced_low_0")
        chosen = infer_auto_device_map(model, room, whole)
    elif isinstance(device_map, str | int | torch.device):
        chosen = {"": device_map}
    else:
        chosen = device_map
        _check_names(model, parts, chosen)
    given = {name: _found(name, chosen) for name in parts}
    main = next((d for d in given.values() if str(d) not in ("cpu", DISK)), torch.device("cpu"))
    runs = {name: main if str(d) in ("cpu", DISK) else d for name, d in given.items()}
    homes: dict[str, Any] = {}
    needed: dict[Any, int] = {}
    for path, parameter in model.named_parameters():
        unit = next((name for name in parts if path.startswith(f"{name}.")), None)
        if unit is not None:
            homes[path] = given[unit]
        else:  # read beside the first unit of its stack, or beside the stacks
            stack = path.rpartition(".")[0]
            beside = next((name for name in parts if name.startswith(f"{stack}.")), None)
            homes[path] = main if beside is None else runs[beside]
        needed[homes[path]] = needed.get(homes[path], 0) + parameter.nbytes
    placement = Placement(given, homes, runs, main, needed, room)
    for home, bytes_ in needed.items():
        if home != DISK and bytes_ > room.get(_key(home), bytes_):
            raise ValueError(
                f"device_map does not fit in memory: {placement.told()} Put some of it on 'disk', "
                "give more by max_memory=, or use a smaller dtype="
            )
    return placement


def _check_names(
    model: nn.Module, parts: Mapping[str, nn.Module], device_map: Mapping[str, Any]
) -> None:
    known = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    for name in device_map:
        if name not in known:
            near = ", ".join(map(repr, get_close_matches(name, known, 3)))
            raise ValueError(f"device_map names {name!r}, which is not there; nearest: {near}")
        for unit in parts:
            if name.startswith(f"{unit}."):
                raise ValueError(
                    f"device_map names {name!r}, a part of {unit!r}, which runs on one device as "
                    f"a whole; name {unit!r}"
                )


def _found(unit: str, device_map: Mapping[str, Any]) -> Any:
    """A unit's device: that of the longest name in the map that holds it."""
    names = [n for n in device_map if n == "" or n == unit or unit.startswith(f"{n}.")]
    if not names:
        raise ValueError(f"device_map has no device for {unit!r}; {{'': 'cpu'}} names one for all")
    device = device_map[max(names, key=len)]
    return device if device == DISK else torch.device(device)


def _key(device: torch.device) -> int | str:
    """The device's name in accelerate's tables of memory."""
    return device.type if device.type in ("cpu", "mps") else device.index or 0


def _name(key: Any) -> str:
    return f"device {key}" if isinstance(key, int) else str(key)


def gigabytes(number: int) -> str:
    """Bytes as people read them."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"
