"""The shapes world: drawn scenes of two coloured shapes in a spatial relation.

Everything about a scene is known exactly: where its shapes are (boxes, masks), what is true of it
(captions, questions with their answers) and what is false in exactly one attribute (minimal pairs,
negatives). Lengths are in units of a 48 x 48 canvas, so that a scene can be drawn at any size;
``x`` runs to the right and ``y`` downwards. The module knows no model.

The two shapes of a scene differ in kind and in colour, so that 'the circle' and 'the red shape'
always name one of them, and the relation holds clearly: along its axis the boxes are disjoint, and
the centres are more than twice as far apart along it as across it.

Held-out scenes are split off by what they show: one unordered pair of coloured shapes in six (by a
hash of its words) occurs in no training scene, in no relation and at no place. A scene's
variants may lie on the other side of the split; ``minimal_pairs`` keeps both members on one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CANVAS: Final = 48
"""Side of the canvas, in units of length; an image drawn at this size has one unit per pixel."""

COLORS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (220, 38, 38),
    "green": (34, 160, 70),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 20),
    "purple": (150, 50, 190),
    "black": (25, 25, 25),
}
"""RGB values of the colour words."""

Unit = NDArray[np.floating]

# Each outline is a test of points (u, v) of the unit square that the shape's box becomes.
_OUTLINES: Final[dict[str, Callable[[Unit, Unit], NDArray[np.bool_]]]] = {
    "circle": lambda u, v: (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25,
    "square": lambda u, v: np.maximum(abs(u - 0.5), abs(v - 0.5)) <= 0.5,
    "triangle": lambda u, v: (abs(u - 0.5) <= v / 2) & (v <= 1),
    "cross": lambda u, v: (
        (np.maximum(abs(u - 0.5), abs(v - 0.5)) <= 0.5)
        & (np.minimum(abs(u - 0.5), abs(v - 0.5)) <= 1 / 6)
    ),
}

KINDS: Final[tuple[str, ...]] = tuple(_OUTLINES)
"""The words for shapes."""

OPPOSITES: Final[dict[str, str]] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
"""The relations, each with the one that holds when the two shapes are mirrored."""

RELATIONS: Final[tuple[str, ...]] = tuple(OPPOSITES)

ATTRIBUTES: Final[tuple[str, ...]] = ("color", "shape", "relation")
"""What the members of a minimal pair can differ in."""

SPLITS: Final[tuple[str, ...]] = ("train", "held_out")

Length = float | int
Box = tuple[Length, Length, Length, Length]

_HELD_OUT_ONE_IN: Final = 6
# With this salt every coloured shape is in at least one held-out pair, and none in more than four.
_SALT: Final = (1180).to_bytes(2, "big")
_SAMPLES_PER_PIXEL_SIDE: Final = 4


@dataclass(frozen=True)
class Shape:
    """One coloured shape.

    Attributes:
        kind: One of ``KINDS``.
        color: One of ``COLORS``.
        box: ``(x0, y0, x1, y1)``, the tight box of the outline in canvas units.

    Raises:
        ValueError: For an unknown kind or colour, or a box that is empty or leaves the canvas.

    Example:
        >>> Shape("circle", "red", (4, 10, 20, 26)).words
        'red circle'
    """

    kind: str
    color: str
    box: Box

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, KINDS)
        _one_of("color", self.color, tuple(COLORS))
        if len(self.box) != 4:
            raise ValueError(f"box must be (x0, y0, x1, y1), got {self.box!r}")
        x0, y0, x1, y1 = self.box
        if not (0 <= x0 < x1 <= CANVAS and 0 <= y0 < y1 <= CANVAS):
            raise ValueError(
                f"box {self.box!r} must satisfy 0 <= x0 < x1 <= {CANVAS} and the same for y"
            )

    @property
    def words(self) -> str:
        """Colour and kind, ``'red circle'``."""
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[Length, Length]:
        """Centre of the box, ``(x, y)`` in canvas units."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    def mask(self, size: int = CANVAS) -> NDArray[np.bool_]:
        """The pixels whose centre lies inside the outline.

        Args:
            size: Side of the image in pixels.

        Returns:
            Boolean array ``[size, size]``, row (y) first.

        Example:
            >>> Shape("square", "red", (4, 10, 20, 26)).mask().sum().item()
            256
        """
        _positive("size", size)
        return self._inside(size)

    def _coverage(self, size: int) -> NDArray[np.float64]:
        """The share of each pixel that the outline covers, ``[size, size]`` in 0..1."""
        n = _SAMPLES_PER_PIXEL_SIDE
        inside = self._inside(size * n).reshape(size, n, size, n)
        share: NDArray[np.float64] = inside.mean(axis=(1, 3))
        return share

    def _inside(self, size: int) -> NDArray[np.bool_]:
        x0, y0, x1, y1 = self.box
        centers = (np.arange(size) + 0.5) * (CANVAS / size)
        columns, rows = (np.searchsorted(centers, (a, b)) for a, b in ((x0, x1), (y0, y1)))
        u = (centers[slice(*columns)] - x0) / (x1 - x0)
        v = (centers[slice(*rows)] - y0) / (y1 - y0)
        inside = np.zeros((size, size), dtype=np.bool_)
        inside[slice(*rows), slice(*columns)] = _OUTLINES[self.kind](u[None, :], v[:, None])
        return inside


@dataclass(frozen=True)
class Question:
    """A question about a scene that has exactly one right answer.

    Attributes:
        text: The question.
        answer: The right answer, one word.
        attribute: What it asks about.
        foil: The wrong one of two options, in two-option questions (``'is the circle red or
            blue?'``, or in NOTICE's form ``'is this circle red or blue?'``); of yes and no the
            wrong one; None in open questions.
    """

    text: str
    answer: str
    attribute: str
    foil: str | None = None


@dataclass(frozen=True)
class Scene:
    """Two coloured shapes in a relation, on a plain background.

    Attributes:
        first: The shape that the caption names first.
        second: The other shape.
        relation: How the first stands to the second, one of ``RELATIONS``.
        background: Grey level of the background, 0 to 255.

    Raises:
        ValueError: For an unknown relation, shapes that share their kind or colour, a relation that
            does not clearly hold between the boxes, or a background outside 0 to 255.

    Example:
        >>> scene = Scene(Shape("circle", "red", (4, 10, 20, 26)),
        ...               Shape("square", "blue", (26, 12, 40, 26)), "left of")
        >>> scene.caption()
        'a red circle left of a blue square'
        >>> scene.image(96).size
        (96, 96)
    """

    first: Shape
    second: Shape
    relation: str
    background: int = 255

    def __post_init__(self) -> None:
        _one_of("relation", self.relation, RELATIONS)
        if self.first.kind == self.second.kind:
            raise ValueError(f"both shapes have the kind {self.first.kind!r}; they must differ")
        if self.first.color == self.second.color:
            raise ValueError(f"both shapes have the color {self.first.color!r}; they must differ")
        if not 0 <= self.background <= 255:
            raise ValueError(f"background must be between 0 and 255, got {self.background}")
        if not _holds(self.first.box, self.relation, self.second.box):
            raise ValueError(
                f"relation {self.relation!r} does not clearly hold between the boxes"
                f" {self.first.box} and {self.second.box}"
            )

    @property
    def shapes(self) -> tuple[Shape, Shape]:
        """First and second."""
        return self.first, self.second

    @property
    def split(self) -> str:
        """``'train'`` or ``'held_out'``, decided by the unordered pair of coloured shapes."""
        return split_of(self.first.words, self.second.words)

    def image(self, size: int = CANVAS) -> Image.Image:
        """Draws the scene, with smoothed edges.

        Args:
            size: Side of the image in pixels.

        Returns:
            An RGB image, ``size`` by ``size`` pixels; the same one on every call.

        Raises:
            ValueError: If ``size`` is not positive.
        """
        _positive("size", size)
        pixels = np.full((size, size, 3), self.background, dtype=np.float64)
        for shape in self.shapes:
            cover = shape._coverage(size)[..., None]
            pixels = pixels * (1 - cover) + np.array(COLORS[shape.color]) * cover
        return Image.fromarray(pixels.round().astype(np.uint8))

    def boxes(self, size: int = CANVAS) -> tuple[Box, Box]:
        """Boxes of the first and the second shape in an image of this size.

        Args:
            size: Side of the image in pixels.

        Returns:
            Two boxes ``(x0, y0, x1, y1)`` in pixels: the edges of the outlines, so that a shape
            fills the pixels ``x0`` to ``x1 - 1`` where the edges are whole numbers.

        Raises:
            ValueError: If ``size`` is not positive.
        """
        _positive("size", size)
        first, second = (
            cast(Box, tuple(edge * size / CANVAS for edge in shape.box)) for shape in self.shapes
        )
        return first, second

    def masks(self, size: int = CANVAS) -> NDArray[np.bool_]:
        """Pixels of the first and the second shape: those whose centre lies inside the outline.

        Args:
            size: Side of the image in pixels.

        Returns:
            Boolean array ``[2, size, size]``; the two masks never overlap.

        Raises:
            ValueError: If ``size`` is not positive.
        """
        return np.stack([shape.mask(size) for shape in self.shapes])

    def caption(self) -> str:
        """What the scene shows, the first shape named first."""
        return f"a {self.first.words} {self.relation} a {self.second.words}"

    def captions(self) -> tuple[str, str]:
        """Both true captions: one for each shape named first."""
        return self.caption(), self.reversed().caption()

    def reversed(self) -> Scene:
        """The same picture, described from the other shape.

        Example:
            >>> scenes(1, seed=0)[0].reversed().reversed() == scenes(1, seed=0)[0]
            True
        """
        opposite = OPPOSITES[self.relation]
        return replace(self, first=self.second, second=self.first, relation=opposite)

    def variants(self, attribute: str) -> tuple[Scene, ...]:
        """All scenes that differ from this one in exactly one attribute.

        Colour and shape: one of the two shapes gets a colour or kind that the scene does not
        have, in the same box. Relation: the two boxes are mirrored, so that the opposite relation
        holds. The captions of the scene and of a variant differ in one word.

        Args:
            attribute: ``'color'``, ``'shape'`` or ``'relation'``.

        Returns:
            8 scenes for colour, 4 for shape, 1 for relation.

        Raises:
            ValueError: For an unknown attribute.

        Example:
            >>> scene = Scene(Shape("circle", "red", (4, 10, 20, 26)),
            ...               Shape("square", "blue", (26, 12, 40, 26)), "left of")
            >>> [variant.caption() for variant in scene.variants("relation")]
            ['a red circle right of a blue square']
        """
        _one_of("attribute", attribute, ATTRIBUTES)
        if attribute == "relation":
            first, second = (
                replace(shape, box=_mirrored(shape.box, self.relation)) for shape in self.shapes
            )
            relation = OPPOSITES[self.relation]
            return (replace(self, first=first, second=second, relation=relation),)
        field, values = ("color", tuple(COLORS)) if attribute == "color" else ("kind", KINDS)
        taken = {getattr(shape, field) for shape in self.shapes}
        return tuple(
            replace(self, **{role: replace(getattr(self, role), **{field: value})})
            for role in ("first", "second")
            for value in values
            if value not in taken
        )

    def negatives(self, attribute: str) -> tuple[str, ...]:
        """False captions that differ from ``caption()`` in one word: those of the variants.

        Args:
            attribute: ``'color'``, ``'shape'`` or ``'relation'`` (the opposite one).

        Raises:
            ValueError: For an unknown attribute.

        Example:
            >>> scene = Scene(Shape("circle", "red", (4, 10, 20, 26)),
            ...               Shape("square", "blue", (26, 12, 40, 26)), "left of")
            >>> scene.negatives("shape")[:2]
            ('a red triangle left of a blue square', 'a red cross left of a blue square')
        """
        return tuple(variant.caption() for variant in self.variants(attribute))

    def minimal_pair(self, attribute: str, seed: int = 0) -> MinimalPair:
        """This scene with one of its variants.

        Args:
            attribute: What the two differ in.
            seed: Chooses among the variants.

        Raises:
            ValueError: For an unknown attribute.
        """
        variants = self.variants(attribute)
        chosen = int(np.random.default_rng(seed).integers(len(variants)))
        return MinimalPair(self, variants[chosen], attribute)

    def questions(self) -> tuple[Question, ...]:
        """All questions that the world asks about the scene, each with one right answer.

        Open ones (``'what color is the circle?'``, ``'what shape is the red object?'``, ``'where is
        the circle relative to the square?'``) and two-option ones with every foil in both orders.

        Example:
            >>> scene = Scene(Shape("circle", "red", (4, 10, 20, 26)),
            ...               Shape("square", "blue", (26, 12, 40, 26)), "left of")
            >>> for question in scene.questions()[:3]:
            ...     print(question.text, question.answer)
            what color is the circle? red
            is the circle red or green? red
            is the circle green or red? red
        """
        found: list[Question] = []
        for scene in (self, self.reversed()):
            shape, other = scene.shapes
            place, opposite = (
                relation.removesuffix(" of")
                for relation in (scene.relation, OPPOSITES[scene.relation])
            )
            of = " of" if scene.relation.endswith(" of") else ""

            found.append(Question(f"what color is the {shape.kind}?", shape.color, "color"))
            for form in ("is the", "is this"):
                for foil in COLORS:
                    for a, b in _orders(shape.color, foil):
                        text = f"{form} {shape.kind} {a} or {b}?"
                        found.append(Question(text, shape.color, "color", foil))

            found.append(Question(f"what shape is the {shape.color} object?", shape.kind, "shape"))
            for form in ("is the", "is this"):
                for foil in KINDS:
                    for a, b in _orders(shape.kind, foil):
                        text = f"{form} {shape.color} object a {a} or a {b}?"
                        found.append(Question(text, shape.kind, "shape", foil))

            text = f"where is the {shape.kind} relative to the {other.kind}?"
            found.append(Question(text, place, "relation"))
            for form in ("is the", "is this"):
                for a, b in _orders(place, opposite):
                    text = f"{form} {shape.kind} {a} or {b}{of} the {other.kind}?"
                    found.append(Question(text, place, "relation", opposite))
        return tuple(found)

    def yes_no_questions(self) -> tuple[Question, ...]:
        """All questions of the scene that are answered by yes or no.

        Of a shape's colour and kind, and of all four relations, in which a shape is named by its
        kind, by its colour, or by both. What a question takes for granted is true: where it says
        'the red square', there is one.

        Example:
            >>> scene = Scene(Shape("circle", "red", (4, 10, 20, 26)),
            ...               Shape("square", "blue", (26, 12, 40, 26)), "left of")
            >>> for question in scene.yes_no_questions()[:2]:
            ...     print(question.text, question.answer)
            is the circle red? yes
            is the circle green? no
            >>> "is the blue square above the circle?" in {
            ...     question.text for question in scene.yes_no_questions()}
            True
        """
        found: list[Question] = []

        def ask(text: str, true: bool, attribute: str) -> None:
            answer, foil = ("yes", "no") if true else ("no", "yes")
            found.append(Question(text, answer, attribute, foil))

        for scene in (self, self.reversed()):
            shape, other = scene.shapes
            for color in COLORS:
                ask(f"is the {shape.kind} {color}?", color == shape.color, "color")
            for kind in KINDS:
                ask(f"is the {shape.color} object a {kind}?", kind == shape.kind, "shape")
            for one in _names(shape):
                for another in _names(other):
                    for relation in RELATIONS:
                        text = f"is the {one} {relation} the {another}?"
                        ask(text, relation == scene.relation, "relation")
        return tuple(found)


@dataclass(frozen=True)
class MinimalPair:
    """Two scenes that differ in exactly one attribute.

    Attributes:
        clean: The one scene.
        corrupt: The other.
        attribute: What they differ in.
    """

    clean: Scene
    corrupt: Scene
    attribute: str

    @property
    def words(self) -> tuple[str, str]:
        """The word of the clean caption that differs, and the corrupt one in its place.

        Example:
            >>> minimal_pairs(1, seed=0, attribute="relation")[0].words
            ('right', 'left')
        """
        captions = (scene.caption().split() for scene in (self.clean, self.corrupt))
        ((clean, corrupt),) = [(a, b) for a, b in zip(*captions, strict=True) if a != b]
        return clean, corrupt


def split_of(first: str, second: str) -> str:
    """The split that every scene of two coloured shapes belongs to.

    Args:
        first: Colour and kind of one, as in ``Shape.words``.
        second: Of the other; their order does not matter.

    Example:
        >>> split_of("red circle", "green cross"), split_of("red circle", "blue square")
        ('held_out', 'train')
    """
    words = "|".join(sorted((first, second)))
    digest = hashlib.blake2b(words.encode(), digest_size=8, salt=_SALT).digest()
    return "held_out" if int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0 else "train"


def scenes(n: int, seed: int, split: str = "train") -> list[Scene]:
    """Draws scenes at random.

    Args:
        n: How many.
        seed: The same seed gives the same scenes; a longer list starts with the shorter one.
        split: ``'train'``, or ``'held_out'`` for pairs of coloured shapes that no training scene
            shows.

    Raises:
        ValueError: For a negative ``n`` or seed or an unknown split.

    Example:
        >>> [scene.caption() for scene in scenes(2, seed=0)] == [
        ...     scene.caption() for scene in scenes(3, seed=0)[:2]]
        True
    """
    rng = _generator(n, seed, split)
    return [_scene(rng, split) for _ in range(n)]


def minimal_pairs(
    n: int, seed: int, attribute: str | None = None, split: str = "held_out"
) -> list[MinimalPair]:
    """Draws pairs of scenes that differ in exactly one attribute.

    Args:
        n: How many.
        seed: The same seed gives the same pairs.
        attribute: What the members differ in; None goes round all three.
        split: Where both members come from.

    Raises:
        ValueError: For a negative ``n`` or seed, or an unknown attribute or split.

    Example:
        >>> [pair.attribute for pair in minimal_pairs(3, seed=0)]
        ['color', 'shape', 'relation']
    """
    rng = _generator(n, seed, split)
    if attribute is not None:
        _one_of("attribute", attribute, ATTRIBUTES)
    pairs: list[MinimalPair] = []
    while len(pairs) < n:
        wanted = attribute or ATTRIBUTES[len(pairs) % len(ATTRIBUTES)]
        clean = _scene(rng, split)
        fitting = [variant for variant in clean.variants(wanted) if variant.split == split]
        if fitting:
            pairs.append(MinimalPair(clean, fitting[int(rng.integers(len(fitting)))], wanted))
    return pairs


def _scene(rng: np.random.Generator, split: str) -> Scene:
    while True:
        kinds = rng.permutation(KINDS)[:2].tolist()
        colors = rng.permutation(tuple(COLORS))[:2].tolist()
        relation = RELATIONS[int(rng.integers(len(RELATIONS)))]
        first, second = _place(rng, relation)
        background = int(rng.integers(215, 256))
        scene = Scene(
            Shape(kinds[0], colors[0], first),
            Shape(kinds[1], colors[1], second),
            relation,
            background,
        )
        if scene.split == split:
            return scene


def _place(rng: np.random.Generator, relation: str) -> tuple[Box, Box]:
    """Two boxes in the relation: sides 12 to 18, at least 3 apart, at most 6 off the axis."""
    margin, gap, offset = 1, 3, 6
    near, far = (int(side) for side in rng.integers(12, 19, size=2))
    start = int(rng.integers(margin, CANVAS - margin - near - gap - far + 1))
    next_start = int(rng.integers(start + near + gap, CANVAS - margin - far + 1))
    while True:
        across = int(rng.integers(margin, CANVAS - margin - near + 1))
        next_across = int(rng.integers(margin, CANVAS - margin - far + 1))
        if abs(across + near / 2 - next_across - far / 2) <= offset:
            break
    a: Box = (start, across, start + near, across + near)
    b: Box = (next_start, next_across, next_start + far, next_across + far)
    if relation in ("above", "below"):
        a, b = (a[1], a[0], a[3], a[2]), (b[1], b[0], b[3], b[2])
    return (a, b) if relation in ("left of", "above") else (b, a)


def _holds(first: Box, relation: str, second: Box) -> bool:
    if relation in ("right of", "below"):
        first, second = second, first
    axis = 0 if relation in ("left of", "right of") else 1
    along, across = (
        abs(first[i] + first[i + 2] - second[i] - second[i + 2]) for i in (axis, 1 - axis)
    )
    return first[axis + 2] <= second[axis] and 2 * across < along


def _mirrored(box: Box, relation: str) -> Box:
    x0, y0, x1, y1 = box
    if relation in ("left of", "right of"):
        return CANVAS - x1, y0, CANVAS - x0, y1
    return x0, CANVAS - y1, x1, CANVAS - y0


def _names(shape: Shape) -> tuple[str, str, str]:
    return shape.kind, shape.words, f"{shape.color} object"


def _orders(answer: str, foil: str) -> tuple[tuple[str, str], ...]:
    return () if answer == foil else ((answer, foil), (foil, answer))


def _generator(n: int, seed: int, split: str) -> np.random.Generator:
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    _one_of("split", split, SPLITS)
    return np.random.default_rng([seed, SPLITS.index(split)])


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _positive(what: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{what} must be positive, got {value}")
