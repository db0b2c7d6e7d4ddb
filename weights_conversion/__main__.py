"""`python -m weights_conversion model.pth out/`: a released file to safetensors and config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="A released file, such as ALBEF.pth.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it appears whole or not.")],
    task: Annotated[
        str | None,
        typer.Option(help="Such as itm, for a pre-training file, which serves several."),
    ] = None,
    processor: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name with the tokenizer.", show_default="as trained, from the Hub"
        ),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STACK=NUMBER",
            help="Heads of vision, text or decoder, if not 64 wide, such as text=4. Repeatable.",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side in pixels that the position table is interpolated to, such as 384.",
            show_default="the file's",
        ),
    ] = None,
) -> None:
    """Converts a released checkpoint to safetensors and config.json.

    The folder has the layout of transformers where that has a class for it, else our own;
    from_pretrained reads both.
    """
    overrides: dict[str, dict[str, int]] = {}
    for one in heads or []:
        stack, _, number = one.partition("=")
        if not number.isdecimal():
            raise typer.BadParameter(f"{one!r} is not STACK=NUMBER", param_hint="--heads")
        overrides[stack] = {"n_heads": int(number)}
    if image_size is not None:
        overrides.setdefault("vision", {})["image_size"] = image_size
    if source.is_dir():
        raise typer.BadParameter(
            f"{str(source)!r} is a folder, which from_pretrained opens as it is; the model's "
            "save_pretrained writes the layout of transformers",
            param_hint="SOURCE",
        )
    if not source.is_file():
        raise typer.BadParameter(f"there is no file {str(source)!r}", param_hint="SOURCE")
    # Imported here, so that --help answers at once.
    from weights_conversion.families import CLASSES
    from weights_conversion.folders import convert_file

    try:
        family, cfg, config = convert_file(source, out, task, processor, overrides)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    kind = "hooked_vlm alone" if config["model_type"].startswith("hooked_") else "transformers"
    typer.echo(f"{out}: for {CLASSES[family]}, task {cfg.task}, in the layout of {kind}")


if __name__ == "__main__":
    app(prog_name="python -m weights_conversion")
