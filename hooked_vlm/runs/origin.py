"""What the numbers of a run are made with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_vlm import __version__

if TYPE_CHECKING:
    from hooked_vlm.models.base import HookedVLM


def provenance(model: HookedVLM | None = None, seed: int | None = None) -> dict[str, Any]:
    """What the numbers of a run are made with, for `open_run`.

    Args:
        model: the model, whose name, revision, weight hash, dtype and device are told.
        seed: of what is drawn.

    Returns:
        All that as plain values; the versions of Python and of what computes; and under `git` the
        commit of the working directory and whether tracked files differ from it, None outside of
        a repository.

    Example:
        >>> sorted(provenance(seed=3))
        ['git', 'seed', 'versions']
    """
    told: dict[str, Any] = {}
    versions = {name: version(name) for name in ("numpy", "pandas", "pyarrow")}
    if model is not None:
        from hooked_vlm.patching.result import provenance as of_model

        told = of_model(model, {}) | {"device": str(model.device)}
        versions |= told["versions"]
    if seed is not None:
        told["seed"] = seed
    told["versions"] = {
        "python": platform.python_version(),
        "hooked_vlm": __version__,
        **versions,
    }
    return told | {"git": _git(Path.cwd())}


def _git(folder: Path) -> dict[str, Any] | None:
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
    lines = said.stdout.splitlines()
    (commit,) = (line.split()[-1] for line in lines if line.startswith("# branch.oid "))
    changed = any(not line.startswith("#") for line in lines)
    return {"commit": commit, "changed": changed}
