"""The data sets of choices by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hooked_vlm.data.choices import Choices
from hooked_vlm.data.facial_expressions import read_facial_expressions
from hooked_vlm.data.mit_states import read_mit_states
from hooked_vlm.data.svo_probes import read_svo_probes


def _svo_probes(path: str | Path, **options: Any) -> Choices:
    folder = Path(path)
    return read_svo_probes(folder / "svo_probes.csv", folder / "images", **options)


KINDS: dict[str, Callable[..., Choices]] = {
    "svo-probes": _svo_probes,
    "mit-states": read_mit_states,
    "facial-expressions": read_facial_expressions,
}


def read_choices(kind: str, path: str | Path, **options: Any) -> Choices:
    """The choices of a data set.

    Args:
        kind: `svo-probes`, of a folder with `svo_probes.csv` and `images`; `mit-states`, of a
            folder; `facial-expressions`, of a folder or a CSV.
        path: where it is.
        options: those of `read_svo_probes`, `read_mit_states` and `read_facial_expressions`.

    Raises:
        ValueError: another kind, or what the reader raises.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of data set {kind!r}; there are {', '.join(KINDS)}")
    return KINDS[kind](path, **options)
