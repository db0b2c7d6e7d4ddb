"""Where a checkpoint comes from: a packaged toy, a local folder or file, the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from weights_conversion import ConversionError
from weights_conversion.files import shard_names
from weights_conversion.llava_original import Tower

KINDS = ("toys", "planted")  # the packages that hold checkpoints
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What stands in their place where a checkpoint is a part of a model.
PARTS = {
    "adapter_config.json": "a PEFT adapter alone; merge it into its base first (of a LLaVA with "
    "its own scripts/merge_lora_weights.py), and name the folder of the whole",
    "mm_projector.bin": "a LLaVA's projector alone; name the folder of a whole LLaVA",
}


@dataclass(frozen=True)
class Located:
    """A checkpoint on disk.

    Attributes:
        name: what the user asked for.
        files: the files that hold the tensors.
        config: its `config.json`, None for a bare file.
        processor: what the processor's loaders take: a folder or a Hub name; None for a bare file.
        revision: the commit of a Hub checkpoint, else None.
    """

    name: str
    files: list[Path]
    config: Path | None
    processor: str | None
    revision: str | None = None


def locate(name_or_path: str | Path, *, weights: bool = True, **download: Any) -> Located:
    """Finds a checkpoint, and downloads it if it is a Hub name.

    Args:
        name_or_path: the name of a toy or a planted model, a folder, a file, or a name on the Hub.
        weights: whether its weights are wanted, too, and not the `config.json` alone.
        **download: `revision`, `cache_dir`, `token`, `local_files_only`, as in huggingface_hub.

    Raises:
        FileNotFoundError: neither a toy nor a path nor reachable on the Hub; or a folder without
            weights or configuration.
        weights_conversion.ConversionError: an index of shards that is none, or a part of a model.
    """
    name = str(name_or_path)
    path = packaged(*KINDS).get(name, Path(name).expanduser())
    if path.is_file():
        return Located(name, [path], None, None)
    if path.is_dir():
        return _folder(name, path, weights)
    if (
        path.is_absolute()
        or name.count("/") > 1
        or path.suffix in {".pth", ".pt", ".bin", ".safetensors"}
    ):
        raise FileNotFoundError(f"{name!r} is neither a file nor a folder")
    return _hub(name, weights, download)


def packaged(*kinds: str) -> dict[str, Path]:
    """The folders of the checkpoints that come with the library, of `KINDS`, by name."""
    here = Path(__file__).parent
    found = [config.parent for kind in kinds for config in here.glob(f"{kind}/*/config.json")]
    return {folder.name: folder for folder in sorted(found)}


def locate_tower(tower: Tower, whole: str, given: str | Path | None, **download: Any) -> Located:
    """Finds the image encoder that a checkpoint leaves to another one.

    Args:
        tower: what the checkpoint says of it.
        whole: the checkpoint's name.
        given: where the user says that it is: a folder or a name on the Hub.
        **download: as for `locate`.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        located = locate(given or tower.name, weights=not tower.inside, **download)
        if located.config is None:
            raise FileNotFoundError(f"{located.name!r} is a file without its config.json")
    except FileNotFoundError as error:
        lacks = "its config.json and preprocessor_config.json"
        if not tower.inside:
            lacks = f"its weights, {lacks}"
        raise FileNotFoundError(
            f"{whole!r} is of LLaVA's own repository, which leaves the image encoder to "
            f"{tower.name!r} (mm_vision_tower of its config.json); {lacks} could not be had. Pass "
            f"vision_tower= with a folder or a Hub name that has them. {error}"
        ) from error
    return located


def _folder(name: str, path: Path, weights: bool) -> Located:
    def find(file: str) -> Path | None:
        return path / file if (path / file).is_file() else None

    config = find("config.json")
    if config is None:
        raise FileNotFoundError(
            f"{path} has no config.json, so it is no checkpoint's folder; name the folder that "
            "holds it, or a released .pth file"
        )
    return Located(name, _weights(str(path), find) if weights else [], config, str(path))


def _hub(name: str, weights: bool, download: dict[str, Any]) -> Located:
    def fetch(file: str) -> Path | None:
        try:
            return Path(hf_hub_download(name, file, **download))
        except (EntryNotFoundError, HFValidationError, OSError) as error:
            if isinstance(error, EntryNotFoundError) and file != "config.json":
                return None
            raise FileNotFoundError(
                f"{name!r} is no packaged toy or planted model ({', '.join(packaged(*KINDS))}), no "
                f"folder or file here, and the Hub gave nothing: {error}"
            ) from error

    config = fetch("config.json")
    assert config is not None
    download["revision"] = commit = config.parent.name  # one commit, whatever is pushed meanwhile
    where = f"{name!r}, on the Hub or, if offline, in its cache,"
    return Located(name, _weights(where, fetch) if weights else [], config, name, commit)


def _weights(where: str, find: Callable[[str], Path | None]) -> list[Path]:
    for weights in WEIGHTS:
        if (whole := find(weights)) is not None:
            return [whole]
        if (index := find(f"{weights}.index.json")) is not None:
            return list(_shards(index, find))
    for part, said in PARTS.items():
        if find(part) is not None:
            raise ConversionError(f"{where} holds {said}")
    raise FileNotFoundError(f"{where} has no {' and no '.join(WEIGHTS)}, whole or in shards")


def _shards(index: Path, find: Callable[[str], Path | None]) -> Iterator[Path]:
    for name in shard_names(index):
        if (shard := find(name)) is None:
            raise FileNotFoundError(f"{index} names {name}, which is not there; fetch it again")
        yield shard
