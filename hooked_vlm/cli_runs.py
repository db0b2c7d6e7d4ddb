"""The commands that go over data sets: `hooked-vlm notice`, `hooked-vlm trace`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

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
    in_one_line,
    open_model,
    places,
    refuse,
)

if TYPE_CHECKING:
    from hooked_vlm.data import Report


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


class Order(StrEnum):
    """Which option the questions of SVO-Probes name first."""

    positive_first = "positive first"
    drawn = "drawn"


class Split(StrEnum):
    """A part of the facial expressions."""

    train = "train"
    validation = "validation"


READ_BY = {
    "svo-probes": ("files", "prompts", "order"),
    "mit-states": ("adjectives",),
    "facial-expressions": ("split",),
}
"""The options of each reader."""

Out = Annotated[Path, typer.Option(help="A folder; the same command goes on with it.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.", min=0)]
Drop = Annotated[bool, typer.Option("--drop", help="Leave out and count rows that cannot be used.")]
Positions = Annotated[
    list[str] | None, typer.Option(help="Roles or numbers of tokens; by default each.")
]


def notice(
    model: Model = "toy-blip-vqa",
    data: Annotated[
        Path | None, typer.Option(help="A data set; by default the shapes world.")
    ] = None,
    data_kind: Annotated[
        DataKind | None,
        typer.Option(help="What --data is: a CSV or JSONL of pairs, by default, or a data set."),
    ] = None,
    files: Annotated[
        Path | None, typer.Option(help="Of svo-probes: names of files by URL, a JSON or CSV.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Of svo-probes: a CSV, prompt_before and prompt_after."),
    ] = None,
    order: Annotated[
        Order | None, typer.Option(help="Of svo-probes: of the options; positive first by default.")
    ] = None,
    adjectives: Annotated[
        Path | None,
        typer.Option(help="Of mit-states: JSON, {group: [adjectives]}; ours by default."),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Of facial-expressions: train by default.")
    ] = None,
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
    positions: Positions = None,
    direction: Way = Direction.denoise,
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="Also pairs answered wrongly, or without effect.")
    ] = False,
    short_answer: Annotated[
        bool,
        typer.Option("--short-answer", help="Ask a LLaVA as it was trained, for one word."),
    ] = False,
    drop: Drop = False,
    k: Annotated[float, typer.Option(help="Deviations above the mean of universal heads.")] = 2.0,
    out: Out = Path("notice"),
    seed: Seed = 0,
    first_token: First = FirstToken.cls,
    task: Task = None,
    processor: Processor = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Find the heads that decide between two answers, over a data set (NOTICE)."""
    with in_one_line():
        from hooked_vlm.methods.notice import Settings
        from hooked_vlm.runs import asking
        from hooked_vlm.runs import notice as over

        kind = _kind(data, data_kind)
        reader: dict[str, Any] = _of_reader(
            kind, files=files, prompts=prompts, order=order, adjectives=adjectives, split=split
        )
        if kind == "pairs":
            why = "makes pairs, and --data is a file of whole ones: leave it out"
            refuse(why, n=n, corrupt=corrupt, short_answer=short_answer)
        elif adjectives is not None:
            reader["adjectives"] = asking.adjectives_of(adjectives)
        corrupted = list(dict.fromkeys(one.value for one in corrupt or Corrupt))
        on_bad: Any = "drop" if drop else "raise"
        chosen: Any = tuple(one.value for one in kinds) if kinds else None
        settings = Settings(
            kinds=chosen,
            positions=places(positions) or None,
            direction=direction.value,
            clean_correct=not keep_all,
            corruption_effective=None if keep_all else 0.0,
            first_token=first_token.value,
        )
        opened = open_model(model, task, processor, revision, device, dtype)
        pairs, masks, reports = asking.pairs_of(
            opened,
            data,
            kind,
            corrupted,
            n=n,
            seed=seed,
            on_bad=on_bad,
            short_answer=short_answer,
            options=reader,
        )
        for name, report in reports.items():
            typer.echo(f"{name}: {report}")
        if not pairs:
            _nothing_left("pair", "no corrupt input could be made")
        told: dict[str, Any] = {"kind": kind}
        if data is not None:
            told["path"] = str(data)
        if kind != "pairs":
            told |= {"n": n, "corrupt": corrupted, "seed": seed, "short_answer": short_answer}
        over.run(
            opened,
            {kind: pairs},
            out,
            settings=settings,
            masks=masks,
            about=_about(model, told | reader, reports),
            on_bad=on_bad,
            k=k,
            seed=seed,
        )
        way_out = "--keep-all, into another --out, keeps those answered wrongly or without effect"
        _end(out, "patched", "pair", "none could be patched" if keep_all else way_out)


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
    text: Annotated[
        str | None, typer.Option(help="The question, caption, or how a caption begins.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="COCO-QA's questions, a CSV; by default the shapes world's."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of --data's images.")] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Of --data's columns; 'count' by default.")
    ] = None,
    words: Annotated[
        int | None,
        typer.Option(
            help="Only questions of so many words, 0 for all; 7 by default, as published.", min=0
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="How many are drawn: of --data by default all, of the shapes world 20.", min=1
        ),
    ] = None,
    kind: Annotated[Restored, typer.Option(help="What is restored.")] = Restored.resid,
    positions: Positions = None,
    window: Annotated[int, typer.Option(help="Layers restored together: 1, 3, 5, …")] = 1,
    stacks: Annotated[
        list[str] | None, typer.Option(help="By default all that follow the image's.")
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="Whose probability counts; by default the clean run's.")
    ] = None,
    noise: Annotated[NoiseKind, typer.Option(help="Kind of noise.")] = NoiseKind.multiplicative,
    std: Annotated[float | None, typer.Option(help="Of the noise; as published.")] = None,
    on: Annotated[On, typer.Option(help="What it stands on.")] = On.embeddings,
    draws: Annotated[
        int | None, typer.Option(help="Of the noise, for each question; 5 by default.", min=1)
    ] = None,
    least: Annotated[
        float, typer.Option(help="Leave out answers whose probability it changes by less.")
    ] = 0.01,
    drop: Drop = False,
    out: Out = Path("trace"),
    seed: Seed = 0,
    first_token: First = FirstToken.cls,
    task: Task = None,
    processor: Processor = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Restore clean activations under noise on the image: where its part in the answer passes."""
    with in_one_line():
        from hooked_vlm.data import Question
        from hooked_vlm.methods.causal_tracing import Noise
        from hooked_vlm.runs import asking, tracing

        if data is not None:
            refuse("is no part of --data, which holds whole questions", image=image, text=text)
        else:
            why = "is about a file of questions: give --data"
            refuse(why, images=images, suffix=suffix, words=words, drop=drop)
        if image is not None:
            refuse("draws questions, and --image is one: leave it out", n=n)
        else:
            refuse("is about an image: give --image", text=text)
        if noise is NoiseKind.scale:
            refuse("is of noise that is drawn, and scale has no chance in it", draws=draws)
        drawn = Noise(noise.value, std=std)
        opened = open_model(model, task, processor, revision, device, dtype)
        asked: list[Any]
        reports: dict[str, Report] = {}
        told: dict[str, Any] = {"kind": "shapes", "n": n or 20, "seed": seed}
        on_bad: Any = "drop" if drop else "raise"
        if data is not None:
            if images is None:
                raise ValueError("--images is missing: the folder of --data's images")
            read: dict[str, Any] = {
                "n": n,
                "seed": seed,
                "n_words": (7 if words is None else words) or None,
                "suffix": suffix or "count",
            }
            asked, reports["coco-qa"] = asking.coco_questions(data, images, on_bad=on_bad, **read)
            told = {"kind": "coco-qa", "path": str(data), "images": str(images), **read}
            typer.echo(f"coco-qa: {reports['coco-qa']}")
        elif image is not None:
            if text is None and opened.task != "captioning":
                raise ValueError("--text is missing: what is asked, or said, of --image")
            asked = [Question(image, text, answer or "", image.name)]
            told = {"kind": "image", "path": str(image), "text": text}
        else:
            asked = asking.drawn_pairs(opened.task, n or 20, seed)
        tracing.run(
            opened,
            asked,
            out,
            noise=drawn,
            least=least,
            about=_about(model, told, reports),
            on_bad=on_bad,
            seed=seed,
            kind=kind.value,
            positions=places(positions) or "each",
            window=window,
            stacks=stacks or None,
            answer=answer,
            on=on.value,
            draws=draws or 5,
            first_token=first_token.value,
        )
        _end(out, "traced", "question", "a lower --least, into another --out, keeps more")


def _kind(data: Path | None, given: DataKind | None) -> str:
    """What is asked about."""
    if data is None:
        refuse("tells what --data is: give --data", data_kind=given)
        return "shapes"
    return (given or DataKind.pairs).value


def _of_reader(kind: str, **given: Any) -> dict[str, str]:
    """What was given of a reader's options.

    Raises:
        ValueError: an option of another reader.
    """
    taken = {name: str(value) for name, value in given.items() if value is not None}
    for name in taken:
        (whose,) = (one for one, names in READ_BY.items() if name in names)
        if whose != kind:
            raise ValueError(f"--{name} is read with --data-kind {whose} alone, not with {kind}")
    return taken


def _about(model: str, data: Mapping[str, Any], reports: Mapping[str, Report]) -> dict[str, Any]:
    """What a run's configuration tells besides the method."""
    told = {name: report.to_dict() for name, report in reports.items()}
    return {"model": model, "data": dict(data), "reports": told}


def _end(out: Path, done: str, what: str, way_out: str) -> None:
    """Tells what was done and left out, and where it is; ends with 1 where nothing is left."""
    from hooked_vlm import runs

    found = runs.load(out)
    (name, _) = found.excluded.columns
    n = found.table[name].nunique() if len(found.table) else 0
    reasons = found.excluded["reason"].value_counts()
    left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    typer.echo(f"{n} {done}" + (f"; excluded: {left}" if left else ""))
    if not n:
        _nothing_left(what, way_out)
    files = (out / name for name in ("results.parquet", "report.html"))
    typer.echo(f"wrote {' '.join(str(file) for file in files if file.exists())}")


def _nothing_left(what: str, why: str) -> NoReturn:
    typer.secho(f"error: no {what} is left; {why}", fg="red", err=True)
    raise typer.Exit(1)
