"""Checkpoint files: names and shapes at once, tensors when they are wanted, never code."""

from __future__ import annotations

import json
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights_conversion import torchscript
from weights_conversion.rules import ConversionError, Shape

# What torch.load raises for files that are cut short or are no checkpoints, by where they break.
_BROKEN = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
)
# What its restricted unpickler says of anything that could run.
_CODE = re.compile(r".*(?:GLOBAL|reduce for|create new object|Can only (?:build|create)).*")


class Checkpoint:
    """Tensors of one or several files, memory-mapped and read when they are asked for.

    Args:
        files: `.safetensors`, `.bin`, `.pth` or `.pt` files, TorchScript's archives among them,
            that together hold each tensor once.

    Raises:
        ConversionError: a file that is cut short, that holds code, or that holds no tensors.
    """

    def __init__(self, files: Iterable[str | Path]):
        self.files: list[Path] = []
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, tuple[Path, str]] = {}  # with the name that it has there
        # Of pickles: until the first read if they are mapped, else for good.
        self._kept: dict[Path, dict[str, Tensor]] = {}
        self.add(files)

    def add(self, files: Iterable[str | Path], prefix: str = "") -> None:
        """Takes further files in.

        Args:
            files: as above.
            prefix: what is put in front of the names of their tensors.

        Raises:
            ConversionError: as above.
        """
        for file in map(Path, files):
            self.files.append(file)
            for own, (shape, dtype) in self._read_heads(file).items():
                name = prefix + own
                if name in self._where:
                    raise ConversionError(f"{name!r} is in {self._where[name][0]} and in {file}")
                self.shapes[name], self.dtypes[name] = shape, dtype
                self._where[name] = file, own

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, from files opened anew: what was read before can be let go."""
        by_file: dict[Path, dict[str, str]] = {}
        for name in names:
            file, own = self._where[name]
            by_file.setdefault(file, {})[name] = own
        found = {}
        for file, wanted in by_file.items():
            if file.suffix == ".safetensors":
                with _open(file) as opened:
                    found.update({name: opened.get_tensor(own) for name, own in wanted.items()})
            else:
                tensors = self._unpickled(file)
                found.update({name: tensors[own] for name, own in wanted.items()})
        return found

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return _same(*self.read([a, b]).values())

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds the numbers of all weights; buffers do not count."""
        weights = (name for name in self.dtypes if name.endswith((".weight", ".bias")))
        return reduce(torch.promote_types, (self.dtypes[name] for name in weights))

    def _read_heads(self, file: Path) -> dict[str, tuple[Shape, torch.dtype]]:
        if file.suffix == ".safetensors":
            with _open(file) as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
        else:
            tensors = self._kept[file] = self._unpickled(file)
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        mapped = _is_zip(file) and not _is_compressed(file)
        tensors = self._kept.pop(file, None) or _unpickle(file, mapped)
        if not mapped:
            self._kept[file] = tensors
        return tensors


class InMemory:
    """A state dict, to be read like a checkpoint."""

    files: tuple[Path, ...] = ()

    def __init__(self, state: Mapping[str, Tensor]):
        self._state = state
        self.shapes: dict[str, Shape] = {name: tuple(t.shape) for name, t in state.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in state.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, as they are."""
        return {name: self._state[name].detach() for name in names}

    def same(self, a: str, b: str) -> bool:
        """Whether two tensors hold the same numbers."""
        return _same(self._state[a], self._state[b])


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All in the widest of their types; those of OpenAI's files are of two."""
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {name: tensor.to(widest) for name, tensor in tensors.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object, such as `config.json`.

    Raises:
        ConversionError: it does not.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{file} is no JSON, fetch it again: {error}") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{file} holds no JSON object but {type(found).__name__}")
    return found


def shard_names(index: Path) -> list[str]:
    """The files that a `*.index.json` names; they lie beside it.

    Raises:
        ConversionError: an index that is no such thing.
    """
    where = read_json(index).get("weight_map")
    names = set(where.values()) if isinstance(where, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ConversionError(f"{index} is no index of shards: its weight_map names no files")
    return sorted(names)


def save(
    folder: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *beside: Any
) -> None:
    """Writes a checkpoint's folder; nothing of it appears before all of it is on the disk.

    Args:
        folder: where to; files of the same names are replaced.
        tensors: the weights, under the layout's names.
        config: the `config.json`.
        *beside: a processor and whatever else writes files by `save_pretrained`; None writes none.

    Raises:
        NotADirectoryError: the folder is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that moving is renaming; files that are mapped stay what they were.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch, "made")
        made.mkdir()
        weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        (made / "model.safetensors").chmod(made.stat().st_mode & 0o666)  # it makes them 0600
        for part in beside:
            if part is not None:
                part.save_pretrained(made)
        (made / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if not folder.exists():
            made.rename(folder)
            return
        for file in sorted(made.iterdir()):
            file.replace(folder / file.name)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{file} cannot be read as safetensors, it may be cut short; fetch it again ({error})"
        ) from error


def _unpickle(file: Path, mapped: bool) -> dict[str, Tensor]:
    loaded: Any = None
    try:
        if not (_is_zip(file) and torchscript.is_archive(file)):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        elif mapped:
            loaded = torchscript.read(file)
    except (pickle.UnpicklingError, *_BROKEN) as error:
        if code := _CODE.search(str(error)):
            raise ConversionError(
                f"{file} holds more than tensors, and reading it could run code, so it is refused: "
                f"{code.group().strip().split('. ')[0]}. Get it as safetensors, or as a state dict "
                "alone; if it was cut short, fetch it again"
            ) from error
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else "empty"
        raise ConversionError(
            f"{file} cannot be read as a PyTorch checkpoint, it may be cut short; fetch it again "
            f"({reason})"
        ) from error
    if loaded is None:
        raise ConversionError(
            f"{file} is a compressed archive of TorchScript, which torch never writes; write it "
            "again without compression, or fetch the original"
        )
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConversionError(f"{file} holds no tensors by name but {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{file} holds {name!r}, a {type(value).__name__}, among its tensors; "
                "expected a state dict, alone or under the key 'model'"
            )
    return dict(loaded)


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def _is_compressed(file: Path) -> bool:
    """Whether a zip file was packed again, so that its tensors are not there to be mapped."""
    try:
        with zipfile.ZipFile(file) as opened:
            tensors = [entry for entry in opened.infolist() if "/data/" in entry.filename]
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in tensors)
    except (zipfile.BadZipFile, *_BROKEN):
        return False  # cut short: whoever opens it says so
