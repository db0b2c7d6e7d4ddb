"""Activations of a data set on the disk, read without the model; `caching` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX, FORMAT, MASK, SHARD = "index.json", 1, "mask:", ".safetensors"
PATTERNS = ("hook_attn_scores", "hook_pattern")  # whose last axis counts keys

Batch = tuple[dict[str, Tensor], dict[str, Tensor]]  # activations, and masks, by name


class ActivationDataset:
    """A folder that `HookedVLM.cache_dataset` wrote, or is writing.

    Args:
        folder: the folder.

    Attributes:
        folder: the same.
        names: the hook names.
        provenance: the model, a hash of its weights, the points with standing hooks, the dtype.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a folder of something else.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(
                f"{str(self.folder)!r} has no {INDEX}: it is no folder of cache_dataset"
            )
        index = read_index(self.folder)
        self.names: list[str] = index["names"]
        self.provenance: dict[str, Any] = index["provenance"]
        self._maps: list[str] = index["maps"]

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return f"ActivationDataset({str(self.folder)!r}, {len(self)} rows{state})"

    @property
    def complete(self) -> bool:
        """Whether the data set was written to its end; False after Ctrl-C."""
        return read_index(self.folder)["batches"] is not None

    def __len__(self) -> int:
        """How many rows of logits, most often texts, it is of."""
        return sum(int(told_by(file)["rows"]) for file in self._files())

    def shards(self) -> Iterator[Batch]:
        """The batches: activations by name, and by name which positions are no padding.

        Both are mapped from the disk; a name without padding has no mask.

        Raises:
            OSError: a file that is missing or cut short, by its name.
        """
        return self._read(self.names)

    def __getitem__(self, name: str) -> Tensor:
        """All activations of a point, [row, ...].

        Raises:
            KeyError: a point that was not cached.
            ValueError: batches of unequal lengths, or none.
            OSError: as `shards`.
        """
        found = [activations[name] for activations, _ in self._read([name])]
        if len({one.shape[1:] for one in found}) > 1:
            raise ValueError(
                f"batches of {name!r} are of several lengths; read them one by one: .shards()"
            )
        if not found:
            raise ValueError(f"{str(self.folder)!r} holds no batch yet")
        return torch.cat(found)

    def mean(self, name: str, over_positions: bool = True) -> Tensor:
        """The mean activation of a point, summed in float64, one batch at a time.

        Padding is left out. Activations without positions, such as the maps of a ResNet and the
        logits of an `itm` head, are averaged over rows.

        Args:
            name: the point.
            over_positions: over rows and positions, [...]; else over rows, [pos, ...], at each
                position counted from the first that is no padding, over the rows that have it.

        Raises:
            KeyError: a point that was not cached.
            ValueError: scores and patterns, whose keys differ from row to row; activations without
                positions whose batches differ in shape; no batch.
            OSError: as `shards`.
        """
        return self._averaged(name, over_positions).value

    def counts(self, name: str) -> Tensor:
        """How many rows have each position of a point, [pos]: those behind `mean(name, False)`.

        Raises:
            KeyError: as `mean`; likewise ValueError and OSError.
        """
        return self._averaged(name, False).count

    def _averaged(self, name: str, over_positions: bool) -> RunningMean:
        mean = RunningMean(name, over_positions, name not in self._maps)
        for activations, masks in self._read([name]):
            mean.add(activations[name], masks.get(name))
        return mean

    def _read(self, names: list[str]) -> Iterator[Batch]:
        for name in names:
            if name not in self.names:
                some = ", ".join(map(repr, self.names[:5]))
                raise KeyError(f"{name!r} was not cached, only {some}")
        for file in self._files():
            with _open(file) as opened:
                kept = set(opened.keys())
                activations = {name: opened.get_tensor(name) for name in names}
                masks = {
                    name: opened.get_tensor(MASK + name) for name in names if MASK + name in kept
                }
            yield activations, masks

    def _files(self) -> list[Path]:
        """The files, in order.

        Raises:
            OSError: one of them is missing.
        """
        numbers = numbers_in(self.folder)
        n = max(read_index(self.folder)["batches"] or 0, *(number + 1 for number in numbers), 0)
        for number in range(n):
            if number not in numbers:
                file = file_of(self.folder, number)
                raise OSError(
                    f"{str(file)!r} is missing; call cache_dataset with the same arguments, which "
                    "makes it again"
                )
        return [file_of(self.folder, number) for number in range(n)]


class RunningMean:
    """A mean of activations, and over how many it is taken, as batches come in.

    Args:
        name: of which point, for messages.
        over_positions: over rows and positions, or over rows alone, at each position.
        positions: whether the second axis counts positions.
    """

    def __init__(self, name: str, over_positions: bool, positions: bool = True):
        if name.endswith(PATTERNS):
            raise ValueError(
                f"{name!r} has no mean: its keys differ from row to row; hook_z, or hook_result, "
                "is what a head makes of them"
            )
        self.name, self.over_positions, self.positions = name, over_positions, positions
        self._sum: Tensor | None = None
        self._count = torch.zeros(())

    def add(self, value: Tensor, mask: Tensor | None) -> None:
        """Takes a batch in.

        Args:
            value: [row, ...]; at more than two axes, the second is that of positions.
            mask: [row, pos], True for what is no padding; None where nothing is.
        """
        wide = value.double()
        count = wide.new_tensor(len(wide))
        if self.positions and wide.dim() > 2:
            wide, counted = _from_the_left(wide, mask)
            count = counted
            if self.over_positions:
                wide, count = wide.sum(1), count.sum()
        self._take(wide.sum(0), count)

    def _take(self, total: Tensor, count: Tensor) -> None:
        if self._sum is None:
            self._sum, self._count = total, count
            return
        if count.dim():  # by position: as long as the longer of the two
            n = max(len(total), len(self._sum))
            pair = total, self._sum, count, self._count
            total, self._sum, count, self._count = (_longer(one, n) for one in pair)
        if total.shape != self._sum.shape:
            raise ValueError(
                f"{self.name!r} is {list(self._sum.shape)} in some batches and "
                f"{list(total.shape)} in others, and has no positions to tell what matches"
            )
        self._sum, self._count = self._sum + total, self._count + count

    @property
    def value(self) -> Tensor:
        """The mean, float64: [pos, ...] at each position, else [...].

        Raises:
            ValueError: nothing came in.
        """
        if self._sum is None:
            raise ValueError(f"there is no mean of {self.name!r}: there are no batches")
        by_position = self._count.dim() == 1
        shape = (-1, *[1] * (self._sum.dim() - 1)) if by_position else ()
        return self._sum / self._count.reshape(shape)

    @property
    def count(self) -> Tensor:
        """Over how many it is taken, by position where the mean is."""
        return self._count.long()


def _from_the_left(value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows without their padding, zeros behind them, and how many rows have each position."""
    if mask is None:
        return value, value.new_full(value.shape[1:2], len(value))
    mask = mask.to(value.device)
    spread = (..., *[None] * (value.dim() - 2))
    order = mask.byte().argsort(dim=1, descending=True, stable=True)
    real = value.masked_fill(~mask[spread], 0).take_along_dim(order[spread], 1)
    lengths = mask.sum(1)
    n = int(lengths.max())
    at = torch.arange(n, device=value.device)
    return real[:, :n], (lengths[:, None] > at).sum(0).to(value)


def _longer(x: Tensor, n: int) -> Tensor:
    return torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])


def read_index(folder: Path) -> dict[str, Any]:
    """What the folder's index says.

    Raises:
        ValueError: it is of something else, or of another version.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        index = None
    if not isinstance(index, dict) or not {"format", "names", "provenance"} <= index.keys():
        raise ValueError(f"{str(file)!r} is none of cache_dataset's; choose another folder")
    if index["format"] != FORMAT:
        raise ValueError(
            f"{str(file)!r} is of format {index['format']}, this version of hooked_vlm reads "
            f"{FORMAT}; cache the data set anew, in another folder"
        )
    return index


def file_of(folder: Path, number: int) -> Path:
    """The file of a batch."""
    return folder / f"{number:05}{SHARD}"


def numbers_in(folder: Path) -> set[int]:
    """The batches whose files are there."""
    return {int(file.stem) for file in folder.glob(f"*{SHARD}") if file.stem.isdecimal()}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{str(file)!r} cannot be read, it may be cut short; delete it and call cache_dataset "
            f"with the same arguments, which makes it again ({error})"
        ) from error


def told_by(file: Path) -> dict[str, str]:
    """What a batch's file says of it: its rows, and a hash of its inputs."""
    with _open(file) as opened:
        told: dict[str, str] = opened.metadata()
    return told
