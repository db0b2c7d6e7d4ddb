"""Checkpoint files: names and shapes at once, tensors when they are wanted, never code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights_conversion.rules import ConversionError, Shape


class Checkpoint:
    """Tensors of one or several files, memory-mapped and read when they are asked for.

    Args:
        files: `.safetensors`, `.bin` or `.pth` files that together hold each tensor once.

    Raises:
        ConversionError: a file that is cut short, that holds code, or that holds no tensors.
    """

    def __init__(self, files: Iterable[str | Path]):
        self.files = [Path(file) for file in files]
        self.shapes: dict[str, Shape] = {}
        self._where: dict[str, Path] = {}
        for file in self.files:
            for name, shape in _shapes(file).items():
                if name in self._where:
                    raise ConversionError(f"{name!r} is in {self._where[name]} and in {file}")
                self.shapes[name], self._where[name] = shape, file

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, from files opened anew: what was read before can be let go."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._where[name], []).append(name)
        found = {}
        for file, wanted in by_file.items():
            if file.suffix == ".safetensors":
                with _open(file) as opened:
                    found.update({name: opened.get_tensor(name) for name in wanted})
            else:
                tensors = _unpickled(file)
                found.update({name: tensors[name] for name in wanted})
        return found

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same numbers."""
        tensors = self.read([a, b])
        return torch.equal(tensors[a], tensors[b])


class InMemory:
    """A state dict, to be read like a checkpoint."""

    files: tuple[Path, ...] = ()

    def __init__(self, state: Mapping[str, Tensor]):
        self._state = state
        self.shapes: dict[str, Shape] = {name: tuple(t.shape) for name, t in state.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as they are."""
        return {name: self._state[name].detach() for name in names}

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return torch.equal(self._state[a], self._state[b])


def shards(index: str | Path) -> list[Path]:
    """The files that a `*.index.json` names, beside it.

    Raises:
        ConversionError: an index that is no such thing, or a shard that is not there.
    """
    index = Path(index)
    try:
        files = sorted(
            {index.parent / name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index} is no index of shards: {error!r}") from error
    for file in files:
        if not file.is_file():
            raise ConversionError(f"{index} names {file.name}, which is not there")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file} cannot be read as safetensors, it may be cut short; fetch it again ({error})"
        ) from error


def _shapes(file: Path) -> dict[str, Shape]:
    if file.suffix == ".safetensors":
        with _open(file) as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    return {name: tuple(tensor.shape) for name, tensor in _unpickled(file).items()}


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{file} holds more than tensors, and reading it could run code, so it is refused. "
            f"Save its state_dict alone, or as safetensors. PyTorch says: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConversionError(
            f"{file} cannot be read as a PyTorch checkpoint, it may be cut short; fetch it again "
            f"({error})"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    tensors = {
        str(name): value
        for name, value in (loaded.items() if isinstance(loaded, Mapping) else ())
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise ConversionError(f"{file} holds no tensors by name")
    return tensors


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"
