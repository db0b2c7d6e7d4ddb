"""Questions about images: between two options, as NOTICE asks them, and open ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hooked_vlm.data.pairs import ImageLike
from hooked_vlm.data.report import Report

Span = tuple[int, int]


def word_spans(word: str, text: str) -> list[Span]:
    """Where a word, or several, stand in a text as whole words, in any case.

    Example:
        >>> word_spans("old", "is this folded paper old or new?")
        [(21, 24)]
    """
    found = re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
    return [one.span() for one in found]


@dataclass(frozen=True)
class Choice:
    """A question about an image that names its two possible answers.

    Attributes:
        image: the image, or a path.
        text: the question.
        answer: the right option, as it stands in the question.
        foil: the other option.
        other_image: an image of which the foil is right; None where there is none.
        group: what is asked about, such as `color`, or the answer's class.
        name: what reports and results call it; no two in a set are the same.
        roles: words of the question by role, as in `Pair`; the options are roles by themselves.
        mask: bool [height, width], the pixels of the image that show what is asked about.
        vocabulary: the name of the set's words that may stand in the place of the options.
        other_text: a question about the same image, with the same options, whose answer is another;
            None where there is none.

    Raises:
        ValueError: options that are the same or do not stand exactly once in the question, or a
            mask of another kind.

    Example:
        >>> choice = Choice("cat.jpg", "is the cat black or white?", "white", "black")
        >>> choice.answer_first
        False
    """

    image: ImageLike
    text: str
    answer: str
    foil: str
    other_image: ImageLike | None = None
    group: str = ""
    name: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)
    mask: NDArray[np.bool_] | None = field(default=None, repr=False, compare=False)
    vocabulary: str | None = None
    other_text: str | None = None

    def __post_init__(self) -> None:
        if self.answer.casefold() == self.foil.casefold():
            raise ValueError(f"choice {self.name!r}: both options are {self.answer!r}")
        for option in (self.answer, self.foil):
            if (n := len(word_spans(option, self.text))) != 1:
                raise ValueError(
                    f"choice {self.name!r}: the option {option!r} stands {n} times in "
                    f"{self.text!r}; name each option once"
                )
        if self.mask is not None and (self.mask.ndim != 2 or self.mask.dtype != np.bool_):
            raise ValueError(
                f"choice {self.name!r}: a mask is bool [height, width], not {self.mask.dtype} "
                f"{list(self.mask.shape)}"
            )

    @property
    def spans(self) -> tuple[Span, Span]:
        """Where in the question the answer and the foil stand, as (begin, end) of its letters."""
        return word_spans(self.answer, self.text)[0], word_spans(self.foil, self.text)[0]

    @property
    def answer_first(self) -> bool:
        """Whether the question names the answer before the foil."""
        answer, foil = self.spans
        return answer < foil


@dataclass(frozen=True)
class Question:
    """An open question about an image.

    Attributes:
        image: the image, or a path.
        text: the question; None for a caption from nothing.
        answer: the right answer.
        name: what results call it.
    """

    image: ImageLike
    text: str | None
    answer: str
    name: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """Words that may stand in each other's place, and which of them may not.

    Attributes:
        words: the words.
        similar: for a word those that mean nearly the same; it holds in both directions.
        classes: for a word its class, such as a sentiment.
        replaced_by: for a class the classes of the words that may stand in the place of one of
            its words; a class that is not named may be replaced by any.

    Raises:
        ValueError: no word, one that is there twice, or a relation of words that are not there.

    Example:
        >>> feelings = Vocabulary(
        ...     ("glad", "happy", "sad", "calm"),
        ...     similar={"happy": ("glad",)},
        ...     classes={"glad": "+", "happy": "+", "calm": "+", "sad": "-"},
        ...     replaced_by={"-": ("+",)},
        ... )
        >>> feelings.instead_of("sad", beside=("happy",))
        ['calm']
    """

    words: tuple[str, ...]
    similar: Mapping[str, Collection[str]] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    replaced_by: Mapping[str, Collection[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.words:
            raise ValueError("a vocabulary needs words")
        if twice := [word for word, n in Counter(self.words).items() if n > 1]:
            raise ValueError(f"the word {twice[0]!r} is twice in a vocabulary")
        related = {*self.similar, *self.classes}.union(*self.similar.values())
        if unknown := related - set(self.words):
            raise ValueError(
                f"{sorted(unknown)[0]!r} is similar to a word, or has a class, and is not in the "
                "vocabulary"
            )

    def near(self, one: str, other: str) -> bool:
        """Whether two words are the same or similar."""
        similar = other in self.similar.get(one, ()) or one in self.similar.get(other, ())
        return one == other or similar

    def instead_of(self, word: str, beside: Collection[str]) -> list[str]:
        """The words that may stand in the place of one.

        Args:
            word: what is replaced.
            beside: the other words, to which a replacement must not be similar either.
        """
        classes = self.replaced_by.get(self.classes.get(word, ""))
        return [
            one
            for one in self.words
            if not any(self.near(one, other) for other in (word, *beside))
            and (classes is None or self.classes.get(one) in classes)
        ]


@dataclass
class Choices:
    """A set of choices.

    Attributes:
        items: the choices.
        report: what was done to get them.
        vocabularies: words that may replace the options, by name.
        kind: of the data set.

    Raises:
        ValueError: two choices of one name, or a vocabulary that the set does not have.
    """

    items: list[Choice]
    report: Report
    vocabularies: dict[str, Vocabulary] = field(default_factory=dict)
    kind: str = ""

    def __post_init__(self) -> None:
        names = Counter(choice.name for choice in self.items)
        if twice := [name for name, n in names.items() if n > 1]:
            raise ValueError(f"{names[twice[0]]} choices have the name {twice[0]!r}")
        for choice in self.items:
            if choice.vocabulary is not None and choice.vocabulary not in self.vocabularies:
                raise ValueError(
                    f"choice {choice.name!r}: no vocabulary {choice.vocabulary!r}; there are "
                    f"{sorted(self.vocabularies)}"
                )

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.items)

    def __getitem__(self, index: int) -> Choice:
        return self.items[index]

    def groups(self) -> dict[str, int]:
        """How many choices each group has."""
        return dict(sorted(Counter(choice.group for choice in self.items).items()))

    def sample(self, n_per_group: int, seed: int) -> Choices:
        """As many choices of each group, half of them with the answer named first.

        They are drawn without replacement. Of a group that has too few, in one of the orders, as
        many are drawn in both orders as there are.

        Args:
            n_per_group: how many of each group, at most; an even number.
            seed: the same seed draws the same choices.

        Returns:
            The choices in the order that they had, with a report that also counts those that were
            not drawn.

        Raises:
            ValueError: an odd number, or one below 2.
        """
        if n_per_group < 2 or n_per_group % 2:
            raise ValueError(
                f"n_per_group is even and at least 2, half for each order, not {n_per_group}"
            )
        rng = np.random.default_rng(seed)
        drawn: list[int] = []
        for group in self.groups():
            orders = [
                [
                    index
                    for index, choice in enumerate(self.items)
                    if choice.group == group and choice.answer_first == first
                ]
                for first in (True, False)
            ]
            n = min(n_per_group // 2, *map(len, orders))
            for order in orders:
                drawn += rng.choice(order, n, replace=False).tolist() if n else []
        left = len(self) - len(drawn)
        stage = Report(len(drawn), {"not drawn": left} if left else {})
        items = [self.items[index] for index in sorted(drawn)]
        return replace(self, items=items, report=self.report.then(stage))
