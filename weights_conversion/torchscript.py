"""TorchScript archives, as OpenAI released CLIP in: their tensors, read without running anything.

An archive is a zip of a pickle of modules, their storages, and the code of their methods. Only the
first two are read. In the pickle, modules become plain holders of what they hold, tensors become
tensors, and whatever else is named is refused.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Of `torch.jit._pickle`: typed lists, and values that are typed beside.
_TYPED = (
    "build_intlist",
    "build_doublelist",
    "build_boollist",
    "build_tensorlist",
    "restore_type_tag",
)


class _Module:
    """What a module of the archive holds, by name."""

    def __init__(self) -> None:
        self.parts: dict[str, Any] = {}

    def __setstate__(self, parts: dict[str, Any]) -> None:
        self.parts = dict(parts)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers by their dotted names."""
        for name, part in self.parts.items():
            if isinstance(part, Tensor):
                yield f"{prefix}{name}", part
            elif isinstance(part, _Module):
                yield from part.tensors(f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    """Knows the names that a module's pickle is made of, and no others; maps the storages."""

    def __init__(self, file: Path):
        self._reader: Any = torch.PyTorchFileReader(str(file))
        self._mapped = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
        super().__init__(io.BytesIO(self._reader.get_record("data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda flat, offset, size, stride, *_: flat.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return lambda: OrderedDict()
        if module == "torch.jit._pickle" and name in _TYPED:
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is no part of a module's weights")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, size = pid
        start = self._reader.get_record_offset(f"data/{key}")
        numbers: Any = self._mapped[start : start + size * dtype.itemsize]
        return torch.empty(0, dtype=dtype).set_(numbers)


def is_archive(file: Path) -> bool:
    """Whether a zip file is an archive of TorchScript rather than a pickled state dict."""
    return "constants.pkl" in torch.PyTorchFileReader(str(file)).get_all_records()


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of an archive by name, as `torch.jit.load(file).state_dict()` would give them.

    Raises:
        pickle.UnpicklingError: its pickle names anything but modules, tensors and plain values.
    """
    root = _Unpickler(file).load()
    if not isinstance(root, _Module):
        raise pickle.UnpicklingError(f"the archive holds no module but {type(root).__name__}")
    return dict(root.tensors())
