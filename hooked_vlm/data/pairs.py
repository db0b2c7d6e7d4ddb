"""Pairs of a clean and a corrupt input, and the answers that tell them apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from hooked_vlm.data import shapes
from hooked_vlm.data.pictures import Pictures
from hooked_vlm.data.report import BadRow, OnBad, Report, Rows
from hooked_vlm.data.tables import Row, table_rows

ImageLike = Image.Image | str | Path


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupt input that differ in the image, the text, or both.

    Attributes:
        image: the clean image, or a path.
        text: the clean text; None for a caption from nothing.
        corrupt_image: the corrupt image; None for the clean one.
        corrupt_text: the corrupt text; None for the clean one.
        answer: the clean input's answer, one token; None where the metric needs none.
        foil: the corrupt input's answer, one token.
        name: what results call the pair.
        roles: token positions of the text by name of a role: words of the clean text, whose first
            occurrence is meant, a position, or several. `answer` and `foil` are roles by
            themselves where these words occur.

    Raises:
        ValueError: a corrupt input that is not there or is the clean one, or a corrupt text
            without a clean one.
    """

    image: ImageLike
    text: str | None
    corrupt_image: ImageLike | None = None
    corrupt_text: str | None = None
    answer: str | None = None
    foil: str | None = None
    name: str = ""
    roles: Mapping[str, str | int | Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for image in (self.image, self.corrupt_image):
            if isinstance(image, list | tuple):
                raise ValueError(
                    f"pair {self.name!r}: an image is one picture, not {len(image)}; what reads "
                    "several is patched between prepared inputs, (clean, corrupt)"
                )
        if self.text is None and self.corrupt_text is not None:
            raise ValueError(f"pair {self.name!r}: a corrupt_text needs a text to corrupt")
        if len(self.images) == 1 and self.corrupt_text in (None, self.text):
            raise ValueError(
                f"pair {self.name!r}: the corrupt input is the clean one; give a corrupt_image or "
                "a corrupt_text that differs"
            )

    @property
    def images(self) -> list[ImageLike]:
        """The images, clean first; one where both inputs share it."""
        if self.corrupt_image is None or _same(self.image, self.corrupt_image):
            return [self.image]
        return [self.image, self.corrupt_image]

    @property
    def texts(self) -> list[str] | None:
        """The texts, clean first; None where there are none."""
        if self.text is None:
            return None
        return [self.text, self.text if self.corrupt_text is None else self.corrupt_text]

    @property
    def words(self) -> dict[str, str | int | Sequence[int]]:
        """All roles by name, answer and foil included."""
        own = {"answer": self.answer, "foil": self.foil}
        return {name: word for name, word in own.items() if word} | dict(self.roles)

    def n_tokens(self, to_str_tokens: Callable[[str], list[str]]) -> int:
        """The number of tokens of the texts, special ones included; 1 without texts.

        Args:
            to_str_tokens: the tokens of a text, such as `model.to_str_tokens`.

        Raises:
            ValueError: clean and corrupt text have different numbers, so positions do not align.
        """
        if self.texts is None:
            return 1
        clean, corrupt = map(to_str_tokens, self.texts)
        if len(clean) != len(corrupt):
            raise ValueError(
                f"pair {self.name!r}: positions do not align, the clean text has {len(clean)} "
                f"tokens and the corrupt one {len(corrupt)}: {' '.join(clean)!r}, "
                f"{' '.join(corrupt)!r}"
            )
        return len(clean)


def _same(one: ImageLike, other: ImageLike) -> bool:
    if isinstance(one, Image.Image) or isinstance(other, Image.Image):
        return one is other
    return Path(one) == Path(other)


COLUMNS = tuple(one.name for one in fields(Pair) if one.name != "roles")
ROLE = "role_"  # a column of the words of a role


def read_pairs(file: str | Path, model: Any = None) -> list[Pair]:
    """Pairs from a CSV or JSONL file, one per line; `read_pairs_report` can leave bad ones out.

    Args:
        file: columns, or keys, are the fields of `Pair`, and `role_subject` and the like for
            the words of roles; `image` and `text` are required. Paths of images are relative to
            the file.
        model: the model they are for; with it, texts that do not align are refused here, and not
            when they are patched.

    Raises:
        ValueError: a file of another kind, an unknown or missing column, a line that is no pair,
            an image that is not there, or texts of different numbers of tokens; the message names
            the line.
    """
    file = Path(file)
    rows = Rows("raise", file, way_out="")
    pairs = _pairs(file, model, rows, Pictures(decode=False), repeats=True)
    rows.report("pairs")
    return pairs


def read_pairs_report(
    file: str | Path, model: Any = None, *, on_bad: OnBad = "raise", check_images: bool = True
) -> tuple[list[Pair], Report]:
    """As `read_pairs`, and what was left out; a line that repeats an earlier one is bad, too.

    Args:
        file: as in `read_pairs`.
        model: as in `read_pairs`.
        on_bad: `raise` refuses the first bad line, `drop` leaves bad lines out and counts them.
        check_images: whether images are decoded, so that unreadable ones are found here.

    Raises:
        ValueError: what is no CSV at all or holds no good pair; a bad line, if not dropped.
    """
    file = Path(file)
    rows = Rows(on_bad, file)
    pairs = _pairs(file, model, rows, Pictures(check_images, blank=True), repeats=False)
    return pairs, rows.report("pairs")


def _pairs(file: Path, model: Any, rows: Rows, pictures: Pictures, repeats: bool) -> list[Pair]:
    pairs: list[Pair] = []
    seen: dict[str, int] = {}
    for number, row in table_rows(file):
        with rows.row(f"line {number}"):
            pair = _pair(file, number, row, pictures)
            if model is not None:
                try:
                    pair.n_tokens(model.to_str_tokens)
                except ValueError as error:
                    raise BadRow("other number of tokens", str(error)) from error
            said = repr(replace(pair, name=""))
            if not repeats and seen.setdefault(said, number) != number:
                raise BadRow("duplicate", f"the same pair as in line {seen[said]}")
            pairs.append(pair)
    return pairs


def _pair(file: Path, number: int, row: Row | BadRow, pictures: Pictures) -> Pair:
    """The pair of a line.

    Raises:
        BadRow: it is none.
    """
    if isinstance(row, BadRow):
        raise row
    if unknown := {key for key in row if not key.startswith(ROLE)} - set(COLUMNS):
        raise BadRow("unknown field", f"no field {sorted(unknown)}; known are {COLUMNS}")
    values: dict[str, Any] = {key: value for key, value in row.items() if value not in ("", None)}
    for key, value in values.items():
        if not isinstance(value, str):
            raise BadRow("no string", f"{key} is no string: {value!r}")
    if missing := {"image", "text"} - set(values):
        raise BadRow("image or text missing", f"{' and '.join(sorted(missing))} missing")
    for key in ("image", "corrupt_image"):
        if key in values:
            values[key] = file.parent / values[key]
            try:
                pictures.check(values[key])
            except BadRow as bad:
                raise BadRow(bad.reason, f"{key} {bad}") from bad
    roles = {
        key.removeprefix(ROLE): values.pop(key)
        for key in row
        if key.startswith(ROLE) and key in values
    }
    try:
        return Pair(**{"name": str(number), **values}, roles=roles)
    except ValueError as error:
        raise BadRow("corrupt input is the clean one", str(error)) from error


def shapes_pairs(
    n: int,
    seed: int,
    task: str,
    attribute: str | None = None,
    corrupt: Literal["image", "text"] = "image",
    size: int = 48,
) -> list[Pair]:
    """Pairs of held-out scenes of the shapes world, in the form of a task.

    Args:
        n: how many.
        seed: the same seed gives the same pairs.
        task: `itm`: the scene's caption; `vqa`: a question that the scene and its variant answer
            differently; `llava`: the same with a capital letter, and of relations such as 'Is the
            red circle left of the square?', to be answered by yes or no; `captioning`: the caption
            up to the word that differs; `clip`: the captions of both, since every image is
            compared with every text.
        attribute: `color`, `shape` or `relation`, what the variant changes; None goes round all
            three.
        corrupt: what is corrupt: the `image`, which shows the variant, or (`itm`, `llava`) the
            `text`: the variant's caption; or a question of as many tokens about the same image,
            which asks about the other shape, or for the opposite relation.
        size: side of the images, in pixels.

    Raises:
        ValueError: an unknown task, a corruption it does not have, or what
            `shapes.minimal_pairs` raises.
    """
    if corrupt not in ("image", "text") or (corrupt == "text" and task not in ("itm", "llava")):
        raise ValueError(
            f"corrupt is 'image', or 'text' for task 'itm' or 'llava', not {corrupt!r}"
        )
    if task not in ("itm", "vqa", "captioning", "clip", "llava"):
        raise ValueError(f"task is 'itm', 'vqa', 'captioning', 'clip' or 'llava', not {task!r}")
    made = []
    for index, scenes in enumerate(shapes.minimal_pairs(n, seed, attribute)):
        clean, other = scenes.clean, scenes.corrupt
        answer, foil = scenes.words
        text, corrupt_text = clean.caption(), None
        corrupt_image: Image.Image | None = other.image(size)
        if task == "vqa":
            text, answer, foil = _question(scenes)
        elif task == "llava":
            answer = "no" if index % 2 else "yes"
            text, corrupt_text, answer, foil = _asked(scenes, answer, corrupt)
            if corrupt == "text":
                corrupt_image = None
        elif task == "captioning":
            text = text.split(f" {answer}")[0]
            if text == "a":  # either shape could come now: the one that differs is named last
                text = clean.reversed().caption().split(f" {answer}")[0]
        elif task == "clip":
            corrupt_text = other.caption()
        elif corrupt == "text":
            corrupt_text, corrupt_image = other.caption(), None
        name = f"{index}: {scenes.attribute}"
        made.append(Pair(clean.image(size), text, corrupt_image, corrupt_text, answer, foil, name))
    return made


def _question(scenes: shapes.MinimalPair) -> tuple[str, str, str]:
    """The first question about the attribute that the two scenes answer differently.

    Of two-option questions, one whose foil is the other scene's answer.
    """
    theirs = {question.text: question.answer for question in scenes.corrupt.questions()}
    for question in scenes.clean.questions():
        other = theirs.get(question.text, question.answer)
        differs = question.attribute == scenes.attribute and other != question.answer
        if differs and question.foil in (None, other):
            return question.text, question.answer, other
    raise ValueError(f"no question tells the scenes of a {scenes.attribute!r} pair apart")


def _asked(
    scenes: shapes.MinimalPair, answer: str, corrupt: Literal["image", "text"]
) -> tuple[str, str | None, str, str]:
    """A question about the attribute, the corrupt one, and the answers to clean and corrupt.

    Of relations, one that is answered by this `answer`.
    """
    clean, other = scenes.clean, scenes.corrupt
    if scenes.attribute == "relation":
        relation = clean.relation if answer == "yes" else shapes.OPPOSITES[clean.relation]
        form = f"is the {clean.first.words} {{}} the {clean.second.kind}?"
        text, changed = form.format(relation), form.format(shapes.OPPOSITES[relation])
    else:
        text, _, _ = _question(scenes)
        openly = {
            q.text for q in clean.questions() if (q.attribute, q.foil) == (scenes.attribute, None)
        }
        (changed,) = openly - {text}  # about the other shape
    here, there = (
        {q.text: q.answer for q in (*scene.questions(), *scene.yes_no_questions())}
        for scene in (clean, other)
    )
    if corrupt == "text":
        return text.capitalize(), changed.capitalize(), here[text], here[changed]
    return text.capitalize(), None, here[text], there[text]
