"""What the commands share: options, opening a model, telling what went wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


Way = Annotated[Direction, typer.Option(help="Which run is patched.")]
First = Annotated[
    FirstToken, typer.Option(help="[CLS] as in transformers, [ENC] as in BLIP's training.")
]
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


def refuse(why: str, /, **given: Any) -> None:
    """Refuses options that nothing would read.

    Args:
        why: what the error says behind the option's name.
        given: by option what was given; None, False or nothing where none was.

    Raises:
        ValueError: one was given.
    """
    for name, value in given.items():
        if value is not None and value is not False and value != []:
            raise ValueError(f"--{name.replace('_', '-')} {why}")


def places(given: Sequence[str] | None) -> list[int | str]:
    """Positions as they are given: numbers, and roles."""
    return [int(one) if re.fullmatch(r"-?[0-9]+", one) else one for one in given or ()]


@contextmanager
def in_one_line() -> Iterator[None]:
    """Ends a command that goes wrong by a line: with 2, or with 130 at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.secho("stopped; the same command goes on from here", fg="yellow", err=True)
        raise typer.Exit(130) from None
    except (ValueError, KeyError, OSError) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Tells what went wrong in one line, and ends the command with 2."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    line = " ".join(str(said).split()).replace("on_bad='drop'", "--drop")
    typer.secho(f"error: {line}", fg="red", err=True)
    raise typer.Exit(2)
