"""The model card beside a toy's weights: measured numbers for people and for tests."""

from __future__ import annotations

import json
import platform
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from hooked_vlm.toys.evaluate import Report

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class Card:
    """What is known about a toy.

    Attributes:
        name: Of the toy.
        architecture: transformers' class, or ours where it has none.
        parameters: How many numbers the weights hold.
        accuracy: ``Report.accuracy`` on held-out scenes.
        kinds: ``Report.kinds``.
        accuracy_drawn_at_192: The same, of scenes drawn at 192 pixels and made small by the toy's
            own processor.
        n_scenes: How many held-out scenes were looked at.
        evaluation_seed: What these were drawn with.
        seed: Of the training.
        steps: Of the training; a step is a batch of 64, of the LLaVA of 20 scenes with six
            questions each.
        seconds: Wall time of the training, drawing included.
        threads: How many threads it ran on.
        versions: Of Python and the packages that took part.
    """

    name: str
    architecture: str
    parameters: int
    accuracy: float
    kinds: dict[str, float]
    accuracy_drawn_at_192: float
    n_scenes: int
    evaluation_seed: int
    seed: int
    steps: int
    seconds: int
    threads: int
    versions: dict[str, str]


def make(
    name: str,
    model: torch.nn.Module,
    report: Report,
    large: Report,
    *,
    evaluation_seed: int,
    seed: int,
    steps: int,
    seconds: float,
) -> Card:
    """Gathers a card from a training and its two reports (drawn at 48 and at 192 pixels)."""
    return Card(
        name=name,
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        accuracy=round(report.accuracy, 4),
        kinds={kind: round(rate, 4) for kind, rate in report.kinds.items()},
        accuracy_drawn_at_192=round(large.accuracy, 4),
        n_scenes=report.n_scenes,
        evaluation_seed=evaluation_seed,
        seed=seed,
        steps=steps,
        seconds=round(seconds),
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    )


def write(card: Card, folder: Path) -> None:
    """Writes ``card.json`` and ``README.md`` into a checkpoint folder."""
    (folder / "card.json").write_text(json.dumps(asdict(card), indent=2) + "\n")
    (folder / "README.md").write_text(_readme(card))


def read(folder: Path) -> Card:
    """Reads ``card.json`` of a checkpoint folder."""
    return Card(**json.loads((folder / "card.json").read_text()))


@dataclass(frozen=True)
class _Family:
    """What the cards of one family share.

    Attributes:
        called: The family, with an article.
        layout: Of the folder.
        blocks: How many each stack has.
        library: That reads the folder, and its model cards' name for it.
        read_by: What the toy was measured with.
        images: What they are, as the stacks read them.
        step: What a step of the training looks at.
    """

    called: str
    layout: str
    blocks: str
    library: str
    read_by: str
    images: str = "48-pixel images in patches of 8"
    step: str = "64 scenes"


_BLIP = _Family(
    called="A BLIP",
    layout="in the released layout",
    blocks="two vision blocks, three blocks in each text stack",
    library="transformers",
    read_by="transformers' own classes",
)
_ALBEF = _Family(
    called="An ALBEF",
    layout="with the tensor names of the original files",
    blocks="two vision blocks, four text blocks, of which the last two read the image",
    library="hooked-vlm",
    read_by="`hooked_vlm.HookedALBEF`",
)
_CLIP = _Family(
    called="A CLIP",
    layout="in the released layout",
    blocks="three vision blocks, two text blocks",
    library="transformers",
    read_by="`hooked_vlm.HookedCLIP`",
)
_CLIP_RESNET = _Family(
    called="A CLIP",
    layout="in a layout of our own, as transformers has no class for it",
    blocks=(
        "a ResNet of two stages with two bottleneck blocks each and an attention pool over 6 by 6"
        " cells, two text blocks"
    ),
    images="48-pixel images",
    library="hooked-vlm",
    read_by="`hooked_vlm.HookedCLIP`",
)
_LLAVA = _Family(
    called="A LLaVA",
    layout="in the layout of llava-hf",
    blocks=(
        "the image encoder of `toy-clip`, as it is packaged, read behind the second of its three"
        " blocks; four Llama blocks, whose four query heads share two heads of keys and values"
    ),
    library="transformers",
    read_by="transformers' own class",
    step="20 scenes with six questions each",
)
_KINDS = ("color", "shape", "relation", "swapped colors", "other axis", "other scene")
_RETRIEVAL = (
    "finds the caption of a picture among others",
    "`accuracy` is the share of pictures whose true caption comes first of 16: itself, 3 with"
    " another color, 3 with another shape, the opposite relation, the colors swapped, 2 relations"
    " of the other axis, 5 captions of other pictures; all distinct, none of the 15 true. Which"
    " shape is named first is drawn. The other lines are of the same 16: the share of pictures"
    " whose true caption comes before every false one of that kind.",
    {kind: f"before every one of kind '{kind}'" for kind in _KINDS},
)
_VERDICTS = (
    "judges whether a caption is true of a picture",
    "`accuracy` is the mean of accepting the true caption and of rejecting the three hard"
    " negatives (color, shape, relation: one changed word each). The token in front is"
    " `[CLS]`, in training and here. The contrastive heads were trained along, with a small"
    " weight, and are not measured.",
    {"true": "true caption accepted"}
    | {kind: f"{kind} changed: rejected" for kind in _KINDS[:3]}
    | {kind: f"{kind}: rejected" for kind in _KINDS[3:]},
)
_ABOUT = {
    "BlipForImageTextRetrieval": (_BLIP, *_VERDICTS),
    "HookedALBEF": (_ALBEF, *_VERDICTS),
    "HookedCLIP": (_CLIP, *_RETRIEVAL),
    "toy-clip-resnet": (_CLIP_RESNET, *_RETRIEVAL),
    "BlipForQuestionAnswering": (
        _BLIP,
        "answers questions about color, shape and relation",
        "An answer counts when it is exactly right (greedy); `accuracy` is the mean over the"
        " kinds of question, asked in batches of one length. 'Two options' are questions like 'is"
        " the circle red or blue?' and, in NOTICE's form, 'is this circle red or blue?'. The"
        " padded number comes from batches of mixed lengths, in which transformers lets the answer"
        " decoder read the padding.",
        {"padded": "all kinds, in padded batches"},
    ),
    "LlavaForConditionalGeneration": (
        _LLAVA,
        "answers questions about color, shape and relation, and describes a picture",
        "An answer counts when it is exactly right (greedy); `accuracy` is the mean over the kinds"
        " of question, which stand together in batches padded on the left. 'Two options' are"
        " questions like 'Is the circle red or blue?'; 'yes' and 'no' are those whose answer it is,"
        " like 'Is the red square left of the circle?'. A description, the answer to 'What is in"
        " the picture?', counts when it is, word for word, one of the two true captions.",
        {},
    ),
    "BlipForConditionalGeneration": (
        _BLIP,
        "describes a picture",
        "A caption counts when it is, word for word, one of the two true ones (either shape may"
        " come first), greedy; `accuracy` is the share without a prompt. 'Prompted' starts with 'a"
        " picture of'; 'continued' starts with the first shape of the caption ('a red circle') and"
        " counts only the one true rest, listed by its relation.",
        {},
    ),
}


def _readme(card: Card) -> str:
    family, does, how, labels = _ABOUT.get(card.name) or _ABOUT[card.architecture]
    rows = [f"| {labels.get(kind, kind)} | {rate:.2%} |" for kind, rate in card.kinds.items()]
    versions = ", ".join(f"{name} {number}" for name, number in card.versions.items())
    about = (
        f"{family.called} of {card.parameters:,} parameters (`{card.architecture}`,"
        f" {family.layout}) that {does} in the shapes world of `hooked_vlm.data.shapes`:"
        f" {family.blocks}, width 64, four heads each, {family.images}. It is made"
        " for developing and testing interpretability methods, and knows nothing outside of that"
        " world."
    )
    measured = (
        f"On {card.n_scenes:,} held-out scenes (pairs of coloured shapes that no training scene"
        f" shows; seed {card.evaluation_seed}), with {family.read_by}:"
    )
    command = (
        f"python -m hooked_vlm.toys.train {card.name} --seed {card.seed} --steps {card.steps}"
        f" --threads {card.threads}"
    )
    made = (
        f"{card.steps:,} steps of {family.step}, {card.seconds:,} seconds on a shared machine with"
        f" {card.threads} CPU thread{'s' if card.threads > 1 else ''}; {versions}. `card.json`"
        " holds the same numbers."
    )
    return f"""---
license: mit
library_name: {family.library}
tags: [{family.called.split()[-1].lower()}, toy, interpretability]
---

# {card.name}

{textwrap.fill(about, 100)}

## Measured

{textwrap.fill(measured, 100)}

| | |
|---|---|
| **accuracy** | **{card.accuracy:.2%}** |
{chr(10).join(rows)}
| accuracy, scenes drawn at 192 pixels | {card.accuracy_drawn_at_192:.2%} |

{textwrap.fill(how, 100)}

## Made with

`{command}`

{textwrap.fill(made, 100)}
"""
