"""Activations of a data set on the disk: written batch by batch, read without the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.components.hook_point import HookPoint, reads_only
from hooked_vlm.models.flow import Flow
from hooked_vlm.models.names import Names, head_of
from hooked_vlm.models.resumable import stored

if TYPE_CHECKING:
    from hooked_vlm.models.base import HookedVLM

INDEX, FORMAT, MASK, SHARD = "index.json", 1, "mask:", ".safetensors"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
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
        index = _index(self.folder)
        self.names: list[str] = index["names"]
        self.provenance: dict[str, Any] = index["provenance"]
        self._maps: list[str] = index["maps"]

    def __repr__(self) -> str:
        state = "" if self.complete else ", not complete"
        return f"ActivationDataset({str(self.folder)!r}, {len(self)} rows{state})"

    @property
    def complete(self) -> bool:
        """Whether the data set was written to its end; False after Ctrl-C."""
        return _index(self.folder)["batches"] is not None

    def __len__(self) -> int:
        """How many rows of logits, most often texts, it is of."""
        return sum(int(_told(file)["rows"]) for file in self._files())

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
        numbers = _numbers(self.folder)
        n = max(_index(self.folder)["batches"] or 0, *(number + 1 for number in numbers), 0)
        for number in range(n):
            if number not in numbers:
                raise OSError(
                    f"{str(_file(self.folder, number))!r} is missing; call cache_dataset with the "
                    "same arguments, which makes it again"
                )
        return [_file(self.folder, number) for number in range(n)]


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
    there, n = _numbers(folder), 0
    for number, batch in enumerate(tqdm(inputs, desc="caching", disable=not progress)):
        n = number + 1
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"batch {number} is a {type(batch).__name__}; give what prepare makes, one after "
                "the other, and a single one as [inputs]"
            )
        digest, file = _digest(batch), _file(folder, number)
        if number in there:
            if _told(file)["inputs"] != digest:
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
    index = _index(folder)
    was, now = (one["provenance"] | {"names": one["names"]} for one in (index, head))
    for key in [*now, *was]:
        if was.get(key) != now.get(key):
            raise ValueError(
                f"{str(folder)!r} was made with other {key}: {_short(was.get(key))}, not "
                f"{_short(now.get(key))}; choose another folder"
            )
    return index


def _index(folder: Path) -> dict[str, Any]:
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]}…"


def _write(folder: Path, index: dict[str, Any]) -> None:
    part = folder / f"{INDEX}.part"
    part.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    part.replace(folder / INDEX)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}{SHARD}"


def _numbers(folder: Path) -> set[int]:
    """The batches whose files are there."""
    return {int(file.stem) for file in folder.glob(f"*{SHARD}") if file.stem.isdecimal()}


def _save(file: Path, tensors: dict[str, Tensor], told: dict[str, str]) -> None:
    """Writes a file, whole or not at all; what it is of stands in it, not in the index."""
    part = file.with_name(f"{file.name}.part")
    try:
        save_file(tensors, part, metadata=told)
        part.chmod(file.parent.stat().st_mode & 0o666)  # it makes them 0600
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"{str(file)!r} cannot be read, it may be cut short; delete it and call cache_dataset "
            f"with the same arguments, which makes it again ({error})"
        ) from error


def _told(file: Path) -> dict[str, str]:
    with _open(file) as opened:
        told: dict[str, str] = opened.metadata()
    return told


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
