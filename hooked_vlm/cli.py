"""The command line: `hooked-vlm patch`, `check`, `validate`, `notice`, `trace`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from hooked_vlm import cli_runs
from hooked_vlm.cli_options import (
    Corrupt,
    Device,
    Direction,
    DType,
    First,
    FirstToken,
    Model,
    Processor,
    Revision,
    Task,
    Way,
    fail,
    open_model,
)

app = typer.Typer(
    name="hooked-vlm",
    help="Hooked vision-language models: cache, patch and ablate every head.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _commands() -> None:
    # transformers imports torchao where it is installed, and that says what it could not load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@app.command()
def patch(
    model: Model = "toy-blip-itm",
    image: Annotated[Path | None, typer.Option(help="The clean image.")] = None,
    text: Annotated[str | None, typer.Option(help="The clean text.")] = None,
    corrupt_image: Annotated[Path | None, typer.Option(help="The corrupt image.")] = None,
    corrupt_text: Annotated[str | None, typer.Option(help="The corrupt text.")] = None,
    answer: Annotated[str | None, typer.Option(help="The clean input's answer.")] = None,
    foil: Annotated[str | None, typer.Option(help="The corrupt input's answer.")] = None,
    data: Annotated[Path | None, typer.Option(help="A CSV or JSONL of many pairs.")] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(help="Hook names or globs; by default all heads that read the image."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="itm_margin, logit_diff, prob or log_prob.")
    ] = None,
    direction: Way = Direction.denoise,
    first_token: First = FirstToken.cls,
    out: Annotated[Path, typer.Option(help="A folder for pictures and tables.")] = Path("patch"),
    top: Annotated[int, typer.Option(help="Rows of the table.", min=1)] = 10,
    seed: Annotated[
        int, typer.Option(help="Which pair of the shapes world, if none is given.", min=0)
    ] = 0,
    task: Task = None,
    processor: Processor = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Patch every site from the clean into the corrupt run, and draw what each restores."""
    from hooked_vlm import report
    from hooked_vlm.data import Pair, read_pairs, shapes_pairs

    try:
        single = (image, text, corrupt_image, corrupt_text, answer, foil)
        if data is not None and any(given is not None for given in single):
            raise ValueError(
                "--data holds whole pairs: leave out --image, --text, --corrupt-image, "
                "--corrupt-text, --answer and --foil"
            )
        if image is None and any(given is not None for given in single):
            raise ValueError("--image is missing: the clean image")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {str(out)!r} is a file; name a folder")
        opened = open_model(model, task, processor, revision, device, dtype)
        if data is not None:
            pairs = read_pairs(data, opened)
        elif image is not None:
            pairs = [Pair(image, text, corrupt_image, corrupt_text, answer, foil, image.name)]
        else:
            pairs = shapes_pairs(1, seed, opened.task, "relation", size=192)
        report.patch(
            opened,
            pairs,
            sites or report.default_sites(opened),
            metric=metric,
            direction=direction.value,
            first_token=first_token.value,
            out=out,
            top=top,
        )
    except (ValueError, KeyError, OSError) as error:
        fail(error)


@app.command()
def check(
    model: Model = "toy-blip-itm",
    task: Task = None,
    processor: Processor = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
    quantization: Annotated[
        str | None, typer.Option(help="int8 or int4: how far such weights move the model instead.")
    ] = None,
) -> None:
    """Compare logits and activations with transformers, on this machine, on these weights."""
    from hooked_vlm import checking
    from hooked_vlm.models.quantized import named

    fine = True
    try:
        config = None if quantization is None else named(quantization)
        opened = open_model(model, task, processor, revision, device, dtype)
        if config is None:
            fine = checking.check(opened, model, revision=revision)
        else:
            few = open_model(model, task, processor, revision, device, dtype, config)
            checking.deviation(opened, few, model)
    except (ValueError, KeyError, OSError, ImportError) as error:
        fail(error)
    if not fine:
        raise typer.Exit(1)


@app.command()
def validate(
    method: Annotated[
        list[str] | None, typer.Option(help="A registered method; by default all.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A planted model; by default all.")
    ] = None,
    corrupt: Annotated[
        list[Corrupt] | None, typer.Option(help="What is corrupt; by default both in turn.")
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of each.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the pairs.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="The table, as Parquet.")] = Path("validation.parquet"),
    page: Annotated[
        Path | None, typer.Option(help="A page to put the table into, between its marks.")
    ] = None,
) -> None:
    """Run methods on models whose circuit is known, and tell what each finds."""
    from rich.console import Console

    from hooked_vlm import planted
    from hooked_vlm.planted import page as pages

    try:
        if page is not None:
            pages.check(page)
        if out.is_dir():
            raise ValueError(f"--out {str(out)!r} is a folder; name a file")
        chosen: Any = [one.value for one in corrupt or list(Corrupt)]
        frame = planted.validate(method, model, chosen, n=pairs, seed=seed)
        pages.save(frame, out)
        if page is not None:
            pages.write(frame, page)
        Console().print(pages.table(frame))
        typer.echo(f"wrote {out}" + ("" if page is None else f" {page}"))  # rich reads [brackets]
    except (ValueError, KeyError, OSError) as error:
        fail(error)


app.command()(cli_runs.notice)
app.command()(cli_runs.trace)


def main() -> None:
    """What `hooked-vlm` runs."""
    app()


if __name__ == "__main__":
    main()
