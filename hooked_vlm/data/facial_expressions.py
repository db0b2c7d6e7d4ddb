"""Facial expressions in seven classes, from folders of images or the table of FER2013.

Source of the data: Goodfellow et al. (arXiv 1307.0414). Source of the questions: NOTICE (arXiv
2406.16320). The words that may replace an emotion are ours.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from hooked_vlm.data.choices import Choice, Choices, Vocabulary
from hooked_vlm.data.pairs import ImageLike
from hooked_vlm.data.pictures import Pictures, check_suffix, folders, image_files
from hooked_vlm.data.report import BadRow, LeftOut, OnBad, Rows
from hooked_vlm.data.tables import cell, table_rows

EMOTIONS = ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral")
"""The classes, in the order of FER2013's numbers."""
SIDE = 48  # of FER2013's images, in pixels
FOLDERS = {"disgust": "disgusted", "fear": "fearful", "surprise": "surprised"}  # to adjectives
Split = Literal["train", "validation"]
USAGES = {"Training": "train", "PublicTest": "validation", "PrivateTest": "validation"}

# Each line: words that mean nearly the same.
WORDS: dict[str, tuple[str, ...]] = {
    "positive": (
        "happy cheerful joyful glad delighted pleased",
        "calm relaxed peaceful content",
        "proud confident",
        "hopeful optimistic",
        "grateful thankful",
        "excited thrilled",
        "amused",
    ),
    "negative": (
        "sad gloomy miserable unhappy",
        "angry furious annoyed",
        "fearful afraid scared worried",
        "disgusted",
        "lonely",
        "guilty ashamed",
        "jealous",
        "bored",
    ),
    "neutral": ("neutral indifferent", "surprised astonished", "curious", "thoughtful serious"),
}
"""Words for feelings, by sentiment."""
REPLACED_BY = {
    "positive": ("negative", "neutral"),
    "negative": ("positive",),
    "neutral": ("positive",),
}
"""The sentiments of the words that may stand in the place of one."""


def feelings() -> Vocabulary:
    """The words for feelings: each may be replaced by words of another sentiment.

    Example:
        >>> "sad" in feelings().instead_of("happy", beside=["angry"])
        True
        >>> feelings().instead_of("neutral", beside=["happy"])[:3]
        ['calm', 'relaxed', 'peaceful']
    """
    lines = [(sentiment, line.split()) for sentiment in WORDS for line in WORDS[sentiment]]
    return Vocabulary(
        tuple(word for _, line in lines for word in line),
        similar={word: line for _, line in lines for word in line},
        classes={word: sentiment for sentiment, line in lines for word in line},
        replaced_by=REPLACED_BY,
    )


def read_facial_expressions(
    path: str | Path,
    *,
    seed: int,
    on_bad: OnBad = "raise",
    split: Split = "train",
    check_images: bool = True,
) -> Choices:
    """One choice for each face: 'Is this person feeling {emotion} or {emotion}?'.

    The foil is drawn from the other emotions, the other image from the faces that show it, which
    are of other people and may be drawn again; the order of the options is drawn, too.

    Args:
        path: a folder with `images/{train,validation}/{emotion}/*.jpg`, or a CSV as FER2013's with
            columns `emotion` (0 to 6), `pixels` (48 times 48 grey levels, row by row) and `Usage`.
        seed: the same seed gives the same choices.
        on_bad: `raise` refuses the first bad face, `drop` leaves bad faces out and counts them.
        split: `train` or `validation`, which of the table is `PublicTest` and `PrivateTest`.
        check_images: whether files are decoded, so that unreadable ones and copies are found here.

    Raises:
        ValueError: a path of another kind, or one that gives no choice; a bad face, if not dropped:
            an unknown emotion or usage, an image that cannot be read, shows a single grey level,
            or repeats an earlier one.
        FileNotFoundError: there is no such file, or no folder `images/{split}`.
    """
    path = Path(path)
    if split not in get_args(Split):
        raise ValueError(f"split is 'train' or 'validation', not {split!r}")
    rows, pictures = Rows(on_bad, path), Pictures(check_images)
    if path.suffix == ".csv":
        faces = _from_table(path, split, rows, pictures)
    else:
        faces = _from_folder(path / "images" / split, rows, pictures)
    showing: defaultdict[str, list[ImageLike]] = defaultdict(list)
    for _, emotion, image in faces:
        showing[emotion].append(image)
    rng = np.random.default_rng(seed)
    items: list[Choice] = []
    for name, emotion, image in faces:
        with rows.row(name):
            foils = [one for one in EMOTIONS if one != emotion and one in showing]
            if not foils:
                raise LeftOut("no face with another emotion")
            foil = foils[int(rng.integers(len(foils)))]
            other = showing[foil][int(rng.integers(len(showing[foil])))]
            first, second = (emotion, foil) if rng.integers(2) else (foil, emotion)
            text = f"Is this person feeling {first} or {second}?"
            items.append(
                Choice(
                    image,
                    text,
                    emotion,
                    foil,
                    other,
                    group=emotion,
                    name=name,
                    roles={"object": "person"},
                    vocabulary="feeling",
                )
            )
    report = rows.report("choices")
    return Choices(items, report, {"feeling": feelings()}, kind="facial-expressions")


Face = tuple[str, str, ImageLike]  # its name, the emotion, the image


def _from_folder(folder: Path, rows: Rows, pictures: Pictures) -> list[Face]:
    faces: list[Face] = []
    for inside in folders(folder):
        emotion = FOLDERS.get(inside.name.lower(), inside.name.lower())
        for file in image_files(inside):
            name = f"{folder.name}/{inside.name}/{file.name}"
            with rows.row(name, keeps=False):
                if emotion not in EMOTIONS:
                    raise BadRow("unknown emotion", f"{inside.name!r} is none of {EMOTIONS}")
                check_suffix(file)
                pictures.check_new(file, name)
                faces.append((name, emotion, file))
    return faces


def _from_table(file: Path, split: Split, rows: Rows, pictures: Pictures) -> list[Face]:
    faces: list[Face] = []
    for number, row in table_rows(file, ("emotion", "pixels", "Usage")):
        with rows.row(f"line {number}", keeps=False):
            if isinstance(row, BadRow):
                raise row
            usage, emotion = cell(row, "Usage"), cell(row, "emotion")
            if usage not in USAGES:
                raise BadRow("unknown usage", f"Usage {usage!r} is none of {tuple(USAGES)}")
            if USAGES[usage] != split:
                raise LeftOut("another split")
            if emotion not in map(str, range(len(EMOTIONS))):
                raise BadRow("unknown emotion", f"emotion {emotion!r} is none of 0 to 6")
            grey = _pixels(cell(row, "pixels"))
            pictures.once(grey.tobytes(), f"line {number}")
            faces.append((f"line {number}", EMOTIONS[int(emotion)], Image.fromarray(grey)))
    return faces


def _pixels(levels_of: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey levels [48, 48]."""
    try:
        levels = np.array([int(one) for one in levels_of.split()])
    except ValueError as error:
        raise BadRow("unreadable image", f"pixels are no whole numbers: {error}") from error
    if levels.size != SIDE * SIDE or levels.min() < 0 or levels.max() > 255:
        raise BadRow(
            "unreadable image",
            f"pixels are {SIDE} times {SIDE} numbers from 0 to 255, not {levels.size} from "
            f"{min(levels, default=0)} to {max(levels, default=0)}",
        )
    if levels.min() == levels.max():
        raise BadRow("image of a single colour", f"all pixels are {levels[0]}")
    return levels.astype(np.uint8).reshape(SIDE, SIDE)
