"""Writing the activations of a data set to a folder, batch by batch; see `dataset` for reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.components.hook_point import HookPoint, reads_only
from hooked_vlm.models.dataset import (
    FORMAT,
    INDEX,
    MASK,
    ActivationDataset,
    file_of,
    numbers_in,
    read_index,
    told_by,
)
from hooked_vlm.models.flow import Flow
from hooked_vlm.models.names import Names, head_of
from hooked_vlm.models.resumable import stored

if TYPE_CHECKING:
    from hooked_vlm.models.base import HookedVLM

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cache_dataset(
    model: HookedVLM,
    inputs: Iterable[Mapping[str, Any]],
    names: Names,
    out: str | Path,
    dtype: torch.dtype | None,
    progress: bool,
) -> ActivationDataset:
    """See `HookedVLM.cache_dataset`."""
    found, folder = model.hook_dict.match(names), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(map(str, DTYPES))}, not {dtype}")
    index = _opened(folder, _head(model, found, dtype))
    there, n = numbers_in(folder), 0
    for number, batch in enumerate(tqdm(inputs, desc="caching", disable=not progress)):
        n = number + 1
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {number} is a {type(batch).__name__}; give what prepare makes, one after "
                "the other, and a single one as [inputs]"
            )
        digest, file = _digest(batch), file_of(folder, number)
        if number in there:
            if told_by(file)["inputs"] != digest:
                raise ValueError(
                    f"batch {number} is not the one that {str(folder)!r} holds: its inputs differ; "
                    "choose another folder"
                )
            continue
        if index["batches"] is not None:  # it goes on behind what was its end
            index["batches"] = None
            _write(folder, index)
        if model.ROWS not in batch:
            raise ValueError(f"batch {number} has no {model.ROWS}, only {', '.join(batch)}")
        tensors = _owned(_run(model, batch, found, dtype))
        _save(file, tensors, {"rows": str(len(batch[model.ROWS])), "inputs": digest})
    if not n or n <= max(there, default=-1):
        raise ValueError(
            f"{n} batches were given, {str(folder)!r} holds {len(there)}: an iterator that was "
            "read before is empty; for other batches choose another folder"
        )
    index["batches"] = n
    _write(folder, index)
    return ActivationDataset(folder)


def _head(model: HookedVLM, names: list[str], dtype: torch.dtype | None) -> dict[str, Any]:
    """What a folder is of, which must be the same when it is gone on with."""
    return {
        "format": FORMAT,
        "names": names,
        "maps": [name for name in names if model.hook_dict[name].pos_dim is None],
        "provenance": {
            **model.provenance,
            "weights": model.weights_hash(),
            "standing hooks": sorted(str(p.name) for p in model.hook_points() if p.has_writers),
            "dtype": str(dtype or model.dtype).removeprefix("torch."),
        },
    }


# --- the folder


def _opened(folder: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The folder's index, a new one if it is empty.

    Raises:
        NotADirectoryError: the folder is a file.
        ValueError: a folder of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file; name a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX).exists():
        if any(file.name != f"{INDEX}.part" for file in folder.iterdir()):
            raise ValueError(
                f"{str(folder)!r} holds other files, and no {INDEX}; choose an empty folder"
            )
        _write(folder, head | {"batches": None})
    index = read_index(folder)
    was, now = (one["provenance"] | {"names": one["names"]} for one in (index, head))
    for key in [*now, *was]:
        if was.get(key) != now.get(key):
            raise ValueError(
                f"{str(folder)!r} was made with other {key}: {_short(was.get(key))}, not "
                f"{_short(now.get(key))}; choose another folder"
            )
    return index


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]}…"


def _write(folder: Path, index: dict[str, Any]) -> None:
    part = folder / f"{INDEX}.part"
    part.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / INDEX)


def _save(file: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    """Writes a file, whole or not at all; what it is of stands in it, not in the index."""
    part = file.with_name(f"{file.name}.part")
    try:
        save_file(tensors, part, metadata=told)
        part.chmod(file.parent.stat().st_mode & 0o666)  # it makes them 0600
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


# --- a batch


def _digest(batch: Mapping[str, Any]) -> str:
    """A hash of a batch's inputs.

    Raises:
        ValueError: an input that is neither tensor nor plain value.
    """
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(stored(value))
        elif isinstance(value, str | int | float):
            digest.update(f"{key} {value!r}".encode())
        elif value is not None:
            raise ValueError(
                f"{key} is a {type(value).__name__}; cache_dataset takes tensors, texts and numbers"
            )
    return digest.hexdigest()


class _Reading(Flow):
    """A plain pass that tells which stack each one reads."""

    def __init__(self, model: HookedVLM):
        super().__init__(model.stacks)
        self.sources: dict[str, Any] = {}

    def stack(self, name: str, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Runs a stack as ever."""
        self.sources[name] = kwargs.get("source")
        return super().stack(name, inputs, **kwargs)


class _Enough(Exception):
    """Raised at the last point that is wanted: the rest of the pass is not run."""


@torch.no_grad()
def _run(
    model: HookedVLM, batch: Mapping[str, Any], names: list[str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The activations of a batch, and masks where it is padded.

    Raises:
        KeyError: a point that the pass does not reach.
        ValueError: values that the dtype cannot hold.
    """
    flow = _Reading(model)
    entries, hooks, _ = model.get_caching_hooks(names, device="cpu")

    @reads_only
    def stop(value: Tensor, hook: HookPoint) -> None:
        if len(entries) == len(names):
            raise _Enough

    with model.hooks([*hooks, (names, stop)]), suppress(_Enough):
        model._flow(flow, **batch)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in entries:
            raise KeyError(f"the pass does not reach {name!r}; leave it out")
        value, point = entries[name], model.hook_dict[name]
        tensors[name] = _converted(name, value, dtype)
        stack, whole = model.stack_of(name), model.hook_dict[(head_of(name) or (name,))[0]]
        mask = model.mask_of(batch, flow.sources[stack] if whole.of_source else stack)
        if mask is not None and not mask.all() and point.pos_dim is not None and value.dim() > 2:
            assert value.shape[point.pos_dim] == mask.shape[1], name
            tensors[MASK + name] = mask.bool().cpu().expand(len(value), -1)
    return tensors


def _converted(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The same in a dtype, of whose finite minimum masked scores are, as they were before."""
    if dtype is None or value.dtype == dtype:
        return value
    masked = value == torch.finfo(value.dtype).min
    made = value.to(dtype).masked_fill(masked, torch.finfo(dtype).min)
    if (made.isinf() & value.isfinite()).any():
        raise ValueError(
            f"{name!r} has a value of {value.abs().max():.3g}, more than {dtype} holds; "
            "torch.bfloat16 has the range of torch.float32"
        )
    return made


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors demands: one activation may be two points'."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() > value.nbytes or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        owned[name] = value
    return owned
