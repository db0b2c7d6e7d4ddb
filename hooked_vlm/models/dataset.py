"""Activations of a data set on the disk: written batch by batch, read without the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.models.names import Names
from hooked_vlm.models.resumable import stored

if TYPE_CHECKING:
    from hooked_vlm.models.base import HookedVLM

INDEX, FORMAT, MASK = "index.json", 1, "mask:"


class ActivationDataset:
    """A folder that `cache_dataset` wrote.

    Args:
        folder: the folder.

    Attributes:
        folder: the same.
        names: the hook names.
        provenance: the model, a hash of its weights, and the dtype.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{str(self.folder)!r} has no {INDEX}: it is no folder of cache_dataset"
            )
        self._index: dict[str, Any] = json.loads((self.folder / INDEX).read_text())
        self.names: list[str] = self._index["names"]
        self.provenance: dict[str, Any] = self._index["provenance"]

    def __len__(self) -> int:
        """How many rows, texts or images, it is of."""
        return sum(shard["rows"] for shard in self._index["shards"])

    def shards(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The batches: activations by name, and by name which positions are no padding.

        Both are mapped from the disk; a name without padding has no mask.

        Raises:
            OSError: a file that is missing or cut short, by its name.
        """
        for shard in self._index["shards"]:
            file = self.folder / shard["file"]
            try:
                with safe_open(file, framework="pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            except (SafetensorError, OSError) as error:
                raise OSError(
                    f"{str(file)!r} cannot be read: it is missing, or cut short; cache it anew "
                    f"({error})"
                ) from error
            masks = {n.removeprefix(MASK): t for n, t in tensors.items() if n.startswith(MASK)}
            yield {name: tensors[name] for name in self.names}, masks

    def __getitem__(self, name: str) -> Tensor:
        """All activations of a point, [row, ...].

        Raises:
            KeyError: a point that was not cached.
            ValueError: batches of unequal lengths.
        """
        if name not in self.names:
            raise KeyError(f"{name!r} was not cached, only {', '.join(map(repr, self.names[:5]))}")
        found = [activations[name] for activations, _ in self.shards()]
        if len({one.shape[1:] for one in found}) > 1:
            raise ValueError(
                f"batches of {name!r} are of several lengths; read them one by one: .shards()"
            )
        return torch.cat(found)


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
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "format": FORMAT,
        "names": found,
        "provenance": {
            **model.provenance,
            "weights": model.weights_hash(),
            "dtype": str(dtype or model.dtype).removeprefix("torch."),
        },
    }
    index = _opened(folder, head)
    shards: list[dict[str, Any]] = index["shards"]
    number = -1
    for number, batch in enumerate(tqdm(inputs, desc="caching", disable=not progress)):
        digest = _digest(batch)
        if number < len(shards):
            if shards[number]["inputs"] != digest:
                raise ValueError(
                    f"batch {number} is not the one that {str(folder)!r} holds: its inputs differ; "
                    "choose another folder"
                )
            continue
        file = f"{number:05}.safetensors"
        tensors = {name: t.to(dtype or t.dtype) for name, t in _run(model, batch, found).items()}
        part = folder / f"{file}.part"
        try:
            save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, part)
            part.replace(folder / file)
        finally:
            part.unlink(missing_ok=True)
        shards.append({"file": file, "rows": len(batch[model.ROWS]), "inputs": digest})
        _write(folder, index)
    if number + 1 < len(shards):
        raise ValueError(
            f"{str(folder)!r} holds {len(shards)} batches, {number + 1} were given: they are of "
            "another data set; choose another folder"
        )
    return ActivationDataset(folder)


def _opened(folder: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The folder's index, a new one if it is empty.

    Raises:
        ValueError: a folder of something else.
    """
    file = folder / INDEX
    if not file.exists():
        if any(folder.iterdir()):
            raise ValueError(
                f"{str(folder)!r} holds other files, and no {INDEX}; choose an empty folder"
            )
        made = {**head, "shards": []}
        _write(folder, made)
        return made
    index: dict[str, Any] = json.loads(file.read_text())
    for key, value in head.items():
        if index.get(key) != value:
            was = index.get(key)
            if isinstance(value, dict) and isinstance(was, dict):
                key = next(one for one in value if was.get(one) != value[one])
                was, value = was.get(key), value[key]
            raise ValueError(
                f"{str(folder)!r} was made with another {key}, {_short(was)}, not {_short(value)}; "
                "choose another folder"
            )
    return index


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]}…"


def _write(folder: Path, index: dict[str, Any]) -> None:
    part = folder / f"{INDEX}.part"
    part.write_text(json.dumps(index, indent=1) + "\n")
    part.replace(folder / INDEX)


def _digest(batch: Mapping[str, Any]) -> str:
    """A hash of a batch's tensors."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        if isinstance(batch[key], Tensor):
            digest.update(f"{key} {tuple(batch[key].shape)} {batch[key].dtype}".encode())
            digest.update(stored(batch[key]))
    return digest.hexdigest()


def _run(model: HookedVLM, batch: Mapping[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The activations of a batch, and masks where it is padded.

    Raises:
        KeyError: a point that the pass does not reach.
    """
    base = model.base_run(**batch, names_filter=names)
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in base.cache:
            raise KeyError(f"the pass does not reach {name!r}; leave it out")
        value = base.cache[name]
        tensors[name] = value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        stack, axis = model.stack_of(name), model.hook_dict[name].pos_dim
        if model.hook_dict[name].of_source:
            stack = next(one for one, kept in base.stacks.items() if kept.reader == stack)
        mask = model.mask_of(batch, stack)
        if mask is None or mask.all() or axis is None or value.dim() <= 2:
            continue
        if value.shape[axis] == mask.shape[1]:
            tensors[f"{MASK}{name}"] = mask.bool().clone()
    return tensors
