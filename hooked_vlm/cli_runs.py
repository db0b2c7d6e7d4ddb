"""The commands that go over data sets: `hooked-vlm notice`, `hooked-vlm trace`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hooked_vlm.cli_options import (
    Corrupt,
    Device,
    Direction,
    DType,
    FirstToken,
    Model,
    Processor,
    Revision,
    Task,
    fail,
    open_model,
)


class DataKind(StrEnum):
    """What `--data` is."""

    pairs = "pairs"
    svo_probes = "svo-probes"
    mit_states = "mit-states"
    facial_expressions = "facial-expressions"


class Module(StrEnum):
    """What is patched."""

    mlp = "mlp"
    attn = "attn"
    cross_attn = "cross_attn"
    resid = "resid"
    attn_heads = "attn_heads"
    cross_attn_heads = "cross_attn_heads"


Out = Annotated[Path, typer.Option(help="A folder; the same command goes on with it.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.", min=0)]
Drop = Annotated[bool, typer.Option("--drop", help="Leave out and count rows that cannot be used.")]


def notice(
    model: Model = "toy-blip-vqa",
    data: Annotated[
        Path | None, typer.Option(help="A data set; by default the shapes world.")
    ] = None,
    data_kind: Annotated[
        DataKind, typer.Option(help="What --data is: a CSV or JSONL of pairs, or a data set.")
    ] = DataKind.pairs,
    corrupt: Annotated[
        list[Corrupt] | None, typer.Option(help="What is corrupt; by default both in turn.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(help="Questions of each group; of the shapes world, in all.", min=2),
    ] = None,
    kinds: Annotated[
        list[Module] | None, typer.Option(help="What is patched; by default all.")
    ] = None,
    positions: Annotated[
        list[str] | None, typer.Option(help="Roles or numbers of tokens; by default each.")
    ] = None,
    direction: Annotated[Direction, typer.Option(help="Which run is patched.")] = Direction.denoise,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Also pairs answered wrongly, or without effect.")
    ] = False,
    short_answer: Annotated[
        bool,
        typer.Option("--short-answer", help="Ask a LLaVA as it was trained, for one word."),
    ] = False,
    adjectives: Annotated[
        Path | None,
        typer.Option(help="Of mit-states: JSON, {group: [adjectives]}; ours by default."),
    ] = None,
    drop: Drop = False,
    k: Annotated[float, typer.Option(help="Deviations above the mean of universal heads.")] = 2.0,
    out: Out = Path("notice"),
    seed: Seed = 0,
    first_token: Annotated[
        FirstToken, typer.Option(help="[CLS] as in transformers, [ENC] as in BLIP's training.")
    ] = FirstToken.cls,
    task: Task = None,
    processor: Processor = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Find the heads that decide between two answers, over a data set (NOTICE)."""
    from rich.console import Console

    from hooked_vlm.methods.notice import Settings
    from hooked_vlm.runs import notice as over

    try:
        opened = open_model(model, task, processor, revision, device, dtype)
        chosen: Any = tuple(one.value for one in kinds) if kinds else None
        where = [int(one) if one.lstrip("-").isdigit() else one for one in positions or []]
        settings = Settings(
            kinds=chosen,
            positions=where or None,
            direction=direction.value,
            clean_correct=not keep_all,
            corruption_effective=None if keep_all else 0.0,
            first_token=first_token.value,
        )
        on_bad: Any = "drop" if drop else "raise"
        corrupted = [one.value for one in corrupt or list(Corrupt)]
        name = "shapes" if data is None else data_kind.value
        pairs, masks, said = over.pairs_of(
            opened,
            data,
            name,
            corrupted,
            n=n,
            seed=seed,
            on_bad=on_bad,
            short_answer=short_answer,
            options=None if adjectives is None else {"adjectives": _json(adjectives)},
        )
        console = Console()
        console.print(said, highlight=False, soft_wrap=True)
        over.run(
            opened,
            {name: pairs},
            out,
            settings=settings,
            masks=masks,
            about={"data": str(data), "model": model, "seed": seed},
            on_bad=on_bad,
            k=k,
            seed=seed,
        )
        _wrote(console, out)
    except KeyboardInterrupt:
        _stopped()
    except (ValueError, KeyError, OSError) as error:
        fail(error)


class NoiseKind(StrEnum):
    """How an image is corrupted."""

    multiplicative = "multiplicative"
    additive = "additive"
    scale = "scale"


class On(StrEnum):
    """What the noise stands on."""

    embeddings = "embeddings"
    pixels = "pixels"


class Restored(StrEnum):
    """What is restored of a block."""

    resid = "resid"
    attn = "attn"
    cross_attn = "cross_attn"
    mlp = "mlp"
    attn_sublayer = "attn_sublayer"
    cross_attn_sublayer = "cross_attn_sublayer"


def trace(
    model: Model = "toy-blip-vqa",
    image: Annotated[Path | None, typer.Option(help="The image.")] = None,
    text: Annotated[str | None, typer.Option(help="The question.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="COCO-QA's questions, a CSV; by default the shapes world's."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of --data's images.")] = None,
    suffix: Annotated[str, typer.Option(help="Of --data's columns.")] = "count",
    words: Annotated[
        int | None, typer.Option(help="Only questions of so many words, 0 for all; 7 as published.")
    ] = 7,
    n: Annotated[int, typer.Option(help="Questions of the shapes world.", min=1)] = 20,
    kind: Annotated[Restored, typer.Option(help="What is restored.")] = Restored.resid,
    window: Annotated[int, typer.Option(help="Layers restored together: 1, 3, 5, …")] = 1,
    stacks: Annotated[
        list[str] | None, typer.Option(help="By default all that follow the image's.")
    ] = None,
    noise: Annotated[NoiseKind, typer.Option(help="Kind of noise.")] = NoiseKind.multiplicative,
    std: Annotated[float | None, typer.Option(help="Of the noise; as published.")] = None,
    on: Annotated[On, typer.Option(help="What it stands on.")] = On.embeddings,
    draws: Annotated[int, typer.Option(help="Of the noise, for each question.", min=1)] = 5,
    least: Annotated[
        float, typer.Option(help="Leave out answers whose probability it changes by less.")
    ] = 0.01,
    drop: Drop = False,
    out: Out = Path("trace"),
    seed: Seed = 0,
    first_token: Annotated[
        FirstToken, typer.Option(help="[CLS] as in transformers, [ENC] as in BLIP's training.")
    ] = FirstToken.cls,
    task: Task = None,
    processor: Processor = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Restore clean activations under noise on the image: where its part in the answer passes."""
    from rich.console import Console

    from hooked_vlm.data import Question, prompt_form, read_coco_qa, shapes_choices
    from hooked_vlm.methods.causal_tracing import Noise
    from hooked_vlm.runs import tracing

    try:
        if data is not None and (image is not None or text is not None):
            raise ValueError("--data holds whole questions: leave out --image and --text")
        if (image is None) != (text is None):
            raise ValueError("--image and --text are given together")
        if (data is None) != (images is None):
            raise ValueError("--data and --images are given together")
        console = Console()
        opened = open_model(model, task, processor, revision, device, dtype)
        asked: list[Question]
        if data is not None and images is not None:
            asked, report = read_coco_qa(
                data,
                images,
                n_words=words or None,
                suffix=suffix,
                on_bad="drop" if drop else "raise",
            )
            console.print(f"{data}: {report}", highlight=False, soft_wrap=True)
        elif image is not None and text is not None:
            asked = [Question(image, text, "", image.name)]
        else:
            form = prompt_form(opened.task)
            asked = [
                Question(one.image, form.of_question(one.text), one.answer, one.name)
                for one in shapes_choices(n, seed, "color")
            ]
        tracing.run(
            opened,
            asked,
            out,
            noise=Noise(noise.value, std=std),
            least=least,
            about={"data": str(data), "model": model},
            seed=seed,
            kind=kind.value,
            window=window,
            stacks=stacks or None,
            on=on.value,
            draws=draws,
            first_token=first_token.value,
        )
        _wrote(console, out)
    except KeyboardInterrupt:
        _stopped()
    except (ValueError, KeyError, OSError) as error:
        fail(error)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}") from error


def _wrote(console: Any, out: Path) -> None:
    files = [
        str(out / name) for name in ("results.parquet", "report.html") if (out / name).exists()
    ]
    console.print("wrote", *files, soft_wrap=True)


def _stopped() -> NoReturn:
    typer.secho("stopped; the same command goes on from here", fg="yellow", err=True)
    raise typer.Exit(130) from None
