"""MIT-States: photographs of things in a state, one folder for each adjective and noun.

Source of the data: Isola, Lim and Adelson (CVPR 2015). Source of the questions: NOTICE (arXiv
2406.16320). The lists of words are ours: of the data set's 115 adjectives they take as many about
shape, colour and texture as NOTICE does (23, 21 and 14), whose own lists may hold other ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hooked_vlm.data.choices import Choice, Choices, Vocabulary
from hooked_vlm.data.pictures import Pictures, check_suffix, folders, image_files
from hooked_vlm.data.report import BadRow, LeftOut, OnBad, Rows

ADJECTIVES: dict[str, tuple[str, ...]] = {
    "shape": tuple(
        "bent blunt coiled crumpled crushed curved deflated dented folded huge inflated large "
        "narrow sharp short sliced small straight tall thick thin wide winding".split()
    ),
    "color": tuple(
        "bright browned burnt caramelized clean clear cloudy dark dirty dull grimy moldy molten "
        "mossy muddy murky painted ripe rusty unripe verdant".split()
    ),
    "texture": tuple(
        "brushed cracked creased crinkled engraved eroded frayed rough ruffled scratched smooth "
        "splintered worn wrinkled".split()
    ),
}
"""The adjectives that are asked about, by what they say something of."""

_ALIKE = (  # of two adjectives of one line a photograph may show both
    "bent coiled curved folded winding",
    "crumpled crushed deflated dented creased crinkled wrinkled ruffled folded",
    "huge inflated large tall thick wide",
    "blunt narrow short small thin sliced",
    "narrow sharp splintered thin",
    "straight smooth tall",
    "bright clean clear painted ripe",
    "browned burnt caramelized dark molten ripe rusty",
    "cloudy dark dull murky",
    "dirty grimy moldy mossy muddy murky rusty dull worn",
    "mossy moldy verdant unripe",
    "brushed engraved scratched rough",
    "cracked eroded frayed splintered worn rough rusty scratched",
)
SIMILAR: dict[str, tuple[str, ...]] = {
    word: tuple(
        sorted({one for line in _ALIKE if word in line.split() for one in line.split()} - {word})
    )
    for words in ADJECTIVES.values()
    for word in words
}
"""For each adjective those that are no opposite of it."""


def read_mit_states(
    folder: str | Path,
    *,
    seed: int,
    on_bad: OnBad = "raise",
    adjectives: Mapping[str, Sequence[str]] | None = None,
    similar: Mapping[str, Sequence[str]] | None = None,
    check_images: bool = True,
) -> Choices:
    """One choice for each photograph: 'Is this {noun} {adjective} or {adjective}?'.

    The foil is drawn from the adjectives with which there are photographs of the same noun, and
    the other image from these; each photograph is the other image of at most one choice. The order
    of the options is drawn, too.

    Args:
        folder: the data set as it is unpacked, with `images/{adjective} {noun}/*.jpg`.
        seed: the same seed gives the same choices.
        on_bad: `raise` refuses the first bad file, `drop` leaves bad files out and counts them.
        adjectives: those that are asked about, by group; None for `ADJECTIVES`.
        similar: for an adjective those that are no foil of it and do not replace it, in both
            directions; None for `SIMILAR` where `adjectives` is None, too, else for none.
        check_images: whether photographs are decoded, so that unreadable ones and copies are found
            here.

    Raises:
        ValueError: an adjective in two groups, similar adjectives that are in none, or a folder
            that gives no choice; a bad file, if not dropped: a folder of another name, a file that
            is called no image, cannot be read, shows a single colour, or repeats an earlier one.
        FileNotFoundError: there is no folder `images`.
    """
    folder = Path(folder)
    if similar is None:
        similar = SIMILAR if adjectives is None else {}
    kept = ADJECTIVES if adjectives is None else adjectives
    groups = {word: group for group, words in kept.items() for word in words}
    vocabulary = Vocabulary(
        tuple(word for words in kept.values() for word in words),
        similar,
    )
    rows = Rows(on_bad, folder)
    shown = _photographs(folder, groups, rows, Pictures(check_images))
    unused = {
        noun: {adjective: list(files) for adjective, files in states.items()}
        for noun, states in shown.items()
    }
    order = [
        (noun, adjective, file)
        for noun, states in shown.items()
        for adjective, files in states.items()
        for file in files
    ]
    rng = np.random.default_rng(seed)
    items: list[Choice] = []
    for index in rng.permutation(len(order)).tolist():
        noun, adjective, file = order[index]
        with rows.row(_name(file)):
            foils = [
                foil
                for foil, files in unused[noun].items()
                if files and not vocabulary.near(adjective, foil)
            ]
            if not foils:
                raise LeftOut("no photograph left of the noun in a state unlike it")
            foil = foils[int(rng.integers(len(foils)))]
            files = unused[noun][foil]
            other = files.pop(int(rng.integers(len(files))))
            first, second = (adjective, foil) if rng.integers(2) else (foil, adjective)
            items.append(
                Choice(
                    file,
                    f"Is this {noun} {first} or {second}?",
                    adjective,
                    foil,
                    other,
                    group=groups[adjective],
                    name=_name(file),
                    roles={"object": noun},
                    vocabulary="adjective",
                )
            )
    items.sort(key=lambda choice: choice.name)
    return Choices(items, rows.report("choices"), {"adjective": vocabulary}, kind="mit-states")


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _photographs(
    folder: Path, groups: Mapping[str, str], rows: Rows, pictures: Pictures
) -> dict[str, dict[str, list[Path]]]:
    """The good photographs by noun and adjective; the others are counted."""
    found: defaultdict[str, defaultdict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for inside in folders(folder / "images"):
        adjective, _, noun = inside.name.partition(" ")
        if not noun:
            with rows.row(f"{inside.name}/"):
                raise BadRow(
                    "folder of another name", "a folder is called by an adjective and a noun"
                )
            continue
        for file in image_files(inside):
            with rows.row(_name(file), keeps=False):
                if adjective not in groups:
                    raise LeftOut("another adjective")
                check_suffix(file)
                pictures.check_new(file, _name(file))
                found[noun][adjective].append(file)
    return {noun: dict(states) for noun, states in found.items()}
