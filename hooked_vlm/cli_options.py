"""What the commands share: options, opening a model, telling what went wrong."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, NoReturn

import typer


class Direction(StrEnum):
    """Which run is patched into which."""

    denoise = "denoise"
    noise = "noise"


class FirstToken(StrEnum):
    """What stands in front of a text."""

    cls = "cls"
    enc = "enc"


class Corrupt(StrEnum):
    """What is corrupt in a pair."""

    image = "image"
    text = "text"


Model = Annotated[str, typer.Option(help="A packaged toy, a folder, a .pth, or a Hub name.")]
Revision = Annotated[str | None, typer.Option(help="Of a Hub name.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
DType = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; as released by default.")]
Processor = Annotated[str | None, typer.Option(help="Where a bare .pth gets its tokenizer.")]
Task = Annotated[str | None, typer.Option(help="Such as itm, if a file serves several.")]


def open_model(
    name: str,
    task: str | None,
    processor: str | None,
    revision: str | None,
    device: str | None,
    dtype: str | None,
    quantization_config: Any = None,
) -> Any:
    """The model that a command is about.

    Raises:
        ValueError: no such dtype, or what `from_pretrained` raises.
    """
    import torch

    from hooked_vlm import HookedVLM

    kind = None
    if dtype is not None:
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"--dtype {dtype!r} is none of torch's, such as float32 or bfloat16")
    return HookedVLM.from_pretrained(
        name,
        revision=revision,
        dtype=kind,
        device=device,
        quantization_config=quantization_config,
        task=task,
        processor=processor,
    )


def fail(error: Exception) -> NoReturn:
    """Tells what went wrong in one line, and ends the command with 2."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    typer.secho(f"error: {' '.join(str(said).split())}", fg="red", err=True)
    raise typer.Exit(2)
