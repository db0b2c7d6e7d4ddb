"""The packaged toys: small checkpoints, trained on the shapes world, in the released layouts."""

from __future__ import annotations

from pathlib import Path

from hooked_vlm.hub import packaged


def names() -> tuple[str, ...]:
    """Names of the packaged toys, sorted.

    Example:
        >>> "toy-blip-itm" in names()
        True
    """
    return tuple(packaged("toys"))


def path(name: str) -> Path:
    """The folder of a packaged toy.

    Args:
        name: One of ``names()``.

    Raises:
        KeyError: For any other name; the message lists the known ones.

    Example:
        >>> (path("toy-blip-itm") / "model.safetensors").is_file()
        True
    """
    if name not in names():
        raise KeyError(f"no toy {name!r}; the packaged toys are {', '.join(names())}")
    return packaged("toys")[name]
