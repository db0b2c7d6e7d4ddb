"""Where a checkpoint comes from: a packaged toy, a local folder or file, the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from hooked_vlm import toys
from weights_conversion.files import shards

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Located:
    """A checkpoint on disk.

    Attributes:
        name: what the user asked for.
        files: the files that hold the tensors.
        config: its `config.json`, None for a bare file.
        processor: what the processor's loaders take: a folder or a Hub name; None for a bare file.
    """

    name: str
    files: list[Path]
    config: Path | None
    processor: str | None


def locate(name_or_path: str | Path, **download: Any) -> Located:
    """Finds a checkpoint, and downloads it if it is a Hub name.

    Args:
        name_or_path: a toy's name, a folder, a file, or a name on the Hub.
        **download: `revision`, `cache_dir`, `token`, `local_files_only`, as in transformers.

    Raises:
        FileNotFoundError: neither a toy nor a path nor reachable on the Hub; or a folder without
            weights or configuration.
    """
    name = str(name_or_path)
    path = Path(toys.path(name)) if name in toys.names() else Path(name)
    if path.is_file():
        return Located(name, [path], None, None)
    if path.is_dir():
        return _folder(name, path)
    if path.is_absolute() or name.count("/") > 1 or path.suffix in {".pth", ".bin", ".safetensors"}:
        raise FileNotFoundError(f"{name!r} is neither a file nor a folder")
    return _hub(name, download)


def _folder(name: str, path: Path) -> Located:
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} has no config.json; it is no checkpoint of transformers")
    for weights in WEIGHTS:
        if (path / weights).is_file():
            return Located(name, [path / weights], config, str(path))
        if (path / f"{weights}.index.json").is_file():
            return Located(name, shards(path / f"{weights}.index.json"), config, str(path))
    raise FileNotFoundError(f"{path} has no {' and no '.join(WEIGHTS)}, whole or in shards")


def _hub(name: str, download: Mapping[str, Any]) -> Located:
    def fetch(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **download)

    try:
        config = cached_file(name, "config.json", **download)
        for weights in WEIGHTS:
            if (file := fetch(weights)) is not None:
                return Located(name, [Path(file)], Path(config), name)
            if (index := fetch(f"{weights}.index.json")) is not None:
                files, _ = get_checkpoint_shard_files(name, index, **download)
                return Located(name, [Path(file) for file in files], Path(config), name)
    except OSError as error:
        raise FileNotFoundError(
            f"{name!r} is no packaged toy ({', '.join(toys.names())}), no folder or file here, and "
            f"the Hub gave nothing: {error}"
        ) from error
    raise FileNotFoundError(f"{name!r} on the Hub has no {' and no '.join(WEIGHTS)}")
