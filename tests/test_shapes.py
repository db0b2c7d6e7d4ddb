"""The shapes world: what it says about a scene is what the picture shows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_vlm.data import shapes
from hooked_vlm.data.shapes import Scene, Shape

SCENE = Scene(
    Shape("circle", "red", (4, 10, 20, 26)),
    Shape("square", "blue", (26, 12, 40, 26)),
    "left of",
    background=240,
)

any_scene = st.sampled_from(
    [*shapes.scenes(200, seed=0), *shapes.scenes(200, seed=0, split="held_out")]
)


def test_boxes_scale_with_the_image() -> None:
    assert SCENE.boxes() == ((4, 10, 20, 26), (26, 12, 40, 26))
    assert SCENE.boxes(96) == ((8, 20, 40, 52), (52, 24, 80, 52))
    assert SCENE.boxes(24) == ((2, 5, 10, 13), (13, 6, 20, 13))


def test_the_mask_of_a_square_is_its_box() -> None:
    expected = np.zeros((48, 48), dtype=bool)
    expected[12:26, 26:40] = True
    assert (SCENE.masks()[1] == expected).all()


def test_the_mask_of_a_circle_follows_pythagoras() -> None:
    mask = SCENE.masks()[0]
    for y in range(48):
        for x in range(48):
            assert mask[y, x] == ((x + 0.5 - 12) ** 2 + (y + 0.5 - 18) ** 2 <= 64)


def test_small_masks_by_hand() -> None:
    """A canvas of 6 pixels, one pixel for 8 units."""
    triangle = Shape("triangle", "red", (8, 8, 40, 40)).mask(6)
    cross = Shape("cross", "red", (0, 0, 48, 48)).mask(6)
    assert _drawn(triangle) == [
        "......",
        "......",
        "..##..",
        "..##..",
        ".####.",
        "......",
    ]
    assert _drawn(cross) == [
        "..##..",
        "..##..",
        "######",
        "######",
        "..##..",
        "..##..",
    ]


def test_the_image_shows_the_colors_where_the_masks_are() -> None:
    pixels = np.asarray(SCENE.image())
    circle, square = SCENE.masks()
    assert (pixels[square] == shapes.COLORS["blue"]).all()
    assert (pixels[18, 12] == shapes.COLORS["red"]).all()
    assert (pixels[0, 0] == 240).all()
    # The edge of the circle is smooth: some pixels are neither red nor background.
    edge = pixels[10:26, 4:20].reshape(-1, 3)
    assert any(tuple(pixel) not in {shapes.COLORS["red"], (240,) * 3} for pixel in edge)
    outside = ~(circle | square)
    outside[10:26, 4:20] = False
    assert (pixels[outside] == 240).all()


def test_captions_and_questions_by_hand() -> None:
    assert SCENE.captions() == (
        "a red circle left of a blue square",
        "a blue square right of a red circle",
    )
    answers = {question.text: question.answer for question in SCENE.questions()}
    assert len(answers) == len(SCENE.questions())
    assert answers["what color is the circle?"] == "red"
    assert answers["what shape is the blue object?"] == "square"
    assert answers["is the circle red or blue?"] == "red"
    assert answers["is this square green or blue?"] == "blue"
    assert answers["is this red object a triangle or a circle?"] == "circle"
    assert answers["where is the square relative to the circle?"] == "right"
    assert answers["is the circle right or left of the square?"] == "left"


@given(any_scene)
def test_questions_have_their_answer_among_the_options(scene: Scene) -> None:
    for question in scene.questions():
        words = question.text.rstrip("?").split()
        if question.foil is None:
            assert question.answer not in words
        else:
            assert {question.answer, question.foil} <= set(words)
            assert question.answer != question.foil


def test_questions_for_yes_or_no_by_hand() -> None:
    answers = {question.text: question.answer for question in SCENE.yes_no_questions()}
    # Of two shapes: 6 colours, 4 kinds, and 4 relations between 3 names of either.
    assert len(answers) == len(SCENE.yes_no_questions()) == 2 * (6 + 4 + 4 * 9)
    assert answers["is the circle red?"] == "yes"
    assert answers["is the circle blue?"] == "no"
    assert answers["is the blue object a square?"] == "yes"
    assert answers["is the blue object a cross?"] == "no"
    assert answers["is the red circle left of the square?"] == "yes"
    assert answers["is the square left of the red object?"] == "no"
    assert answers["is the blue square right of the red circle?"] == "yes"
    assert answers["is the blue object above the circle?"] == "no"


@given(any_scene)
def test_questions_for_yes_or_no_say_what_captions_say(scene: Scene) -> None:
    """Of each way to name the two shapes, one relation in four holds, that of a caption."""
    said = {caption.replace("a ", "the ") for caption in scene.captions()}
    asked = {q.text.removeprefix("is ").rstrip("?"): q for q in scene.yes_no_questions()}
    assert {text for text in said if asked[text].answer == "yes"} == said
    for attribute, share in (("color", 1 / 6), ("shape", 1 / 4), ("relation", 1 / 4)):
        answers = [q.answer for q in asked.values() if q.attribute == attribute]
        assert answers.count("yes") == share * len(answers)
        assert answers.count("yes") + answers.count("no") == len(answers)
    assert all({q.answer, q.foil} == {"yes", "no"} for q in asked.values())
    for variant in scene.variants("relation"):
        theirs = {q.text: q.answer for q in variant.yes_no_questions()}
        for q in asked.values():
            mirrored = theirs[q.text] != q.answer
            along = any(f" {r} " in q.text for r in (scene.relation, variant.relation))
            assert mirrored == (q.attribute == "relation" and along)


@given(any_scene)
def test_shapes_fill_their_boxes_and_never_touch(scene: Scene) -> None:
    first, second = scene.masks(480)
    assert not (first & second).any()
    for mask, (x0, y0, x1, y1) in zip((first, second), scene.boxes(480), strict=True):
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        # A pixel belongs to a mask by its centre: a curved or pointed edge may miss the last ones.
        assert x0 <= columns[0] < x0 + 3 and x1 - 3 <= columns[-1] + 1 <= x1
        assert y0 <= rows[0] < y0 + 3 and y1 - 3 <= rows[-1] + 1 <= y1


@given(any_scene)
def test_the_relation_is_seen(scene: Scene) -> None:
    (rows_1, columns_1), (rows_2, columns_2) = (np.nonzero(mask) for mask in scene.masks())
    holds = {
        "left of": columns_1.max() < columns_2.min(),
        "right of": columns_1.min() > columns_2.max(),
        "above": rows_1.max() < rows_2.min(),
        "below": rows_1.min() > rows_2.max(),
    }
    assert holds[scene.relation]
    assert not holds[shapes.OPPOSITES[scene.relation]]


@given(any_scene, st.sampled_from(shapes.ATTRIBUTES))
def test_variants_differ_in_one_attribute_and_one_word(scene: Scene, attribute: str) -> None:
    def facts(of: Scene) -> dict[str, object]:
        return {
            "color": [shape.color for shape in of.shapes],
            "shape": [shape.kind for shape in of.shapes],
            "relation": of.relation,
            "size": [(s.box[2] - s.box[0], s.box[3] - s.box[1]) for s in of.shapes],
            "background": of.background,
        }

    variants = scene.variants(attribute)
    assert len(set(variants)) == {"color": 8, "shape": 4, "relation": 1}[attribute]
    for variant, caption in zip(variants, scene.negatives(attribute), strict=True):
        theirs, ours = facts(variant), facts(scene)
        assert [fact for fact in ours if ours[fact] != theirs[fact]] == [attribute]
        assert caption == variant.caption()
        assert caption not in scene.captions()
        words = zip(caption.split(), scene.caption().split(), strict=True)
        assert sum(a != b for a, b in words) == 1
        if attribute != "relation":
            assert variant.boxes() == scene.boxes()
    assert scene.minimal_pair(attribute, seed=3) == scene.minimal_pair(attribute, seed=3)
    assert scene.minimal_pair(attribute, seed=3).corrupt in variants


def test_minimal_pairs_stay_on_their_side() -> None:
    pairs = shapes.minimal_pairs(60, seed=2)
    assert {pair.attribute for pair in pairs} == set(shapes.ATTRIBUTES)
    for pair in pairs:
        assert pair.clean.split == pair.corrupt.split == "held_out"
        assert pair.corrupt in pair.clean.variants(pair.attribute)
        assert len(pair.words) == 2
    assert {p.attribute for p in shapes.minimal_pairs(5, 0, "shape", "train")} == {"shape"}
    assert pairs == shapes.minimal_pairs(60, seed=2)
    assert pairs != shapes.minimal_pairs(60, seed=3)


def test_scenes_are_drawn_the_same_from_the_same_seed() -> None:
    assert shapes.scenes(20, seed=5) == shapes.scenes(30, seed=5)[:20]
    assert shapes.scenes(20, seed=5) != shapes.scenes(20, seed=6)
    again = shapes.scenes(1, seed=5)[0].image(64)
    assert again.tobytes() == shapes.scenes(1, seed=5)[0].image(64).tobytes()
    assert again.mode == "RGB"


def test_held_out_pairs_of_shapes_never_occur_in_training() -> None:
    def seen(split: str) -> set[frozenset[str]]:
        return {
            frozenset(shape.words for shape in scene.shapes)
            for scene in shapes.scenes(900, 0, split)
        }

    train, held_out = seen("train"), seen("held_out")
    assert not train & held_out
    assert len(train | held_out) == 180  # 6 pairs of kinds, 30 ordered pairs of colours
    singles = {f"{color} {kind}" for color in shapes.COLORS for kind in shapes.KINDS}
    assert set().union(*train) == set().union(*held_out) == singles


@given(any_scene)
def test_describing_from_the_other_side_changes_no_picture(scene: Scene) -> None:
    assert scene.reversed().image().tobytes() == scene.image().tobytes()
    assert scene.reversed().split == scene.split


@settings(max_examples=20)
@given(any_scene, st.integers(1, 200))
def test_any_size_can_be_drawn(scene: Scene, size: int) -> None:
    assert scene.image(size).size == (size, size)
    assert scene.masks(size).shape == (2, size, size)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Shape("star", "red", (0, 0, 9, 9)), "kind must be one of .* got 'star'"),
        (lambda: Shape("circle", "mauve", (0, 0, 9, 9)), "color must be one of .* got 'mauve'"),
        (lambda: Shape("circle", "red", (0, 0, 0, 9)), "box"),
        (lambda: Shape("circle", "red", (0, 0, 9, 49)), "box"),
        (lambda: dataclasses.replace(SCENE, relation="near"), "relation must be one of"),
        (lambda: dataclasses.replace(SCENE, relation="above"), "does not clearly hold"),
        (lambda: dataclasses.replace(SCENE, relation="right of"), "does not clearly hold"),
        (lambda: dataclasses.replace(SCENE, background=256), "background"),
        (
            lambda: dataclasses.replace(SCENE, second=Shape("circle", "blue", (26, 12, 40, 26))),
            "kind 'circle'",
        ),
        (
            lambda: dataclasses.replace(SCENE, second=Shape("square", "red", (26, 12, 40, 26))),
            "color 'red'",
        ),
        (lambda: SCENE.image(0), "size must be positive"),
        (lambda: SCENE.boxes(0), "size must be positive"),
        (lambda: SCENE.masks(-1), "size must be positive"),
        (lambda: SCENE.variants("size"), "attribute must be one of"),
        (lambda: shapes.scenes(-1, 0), "n must not be negative"),
        (lambda: shapes.scenes(1, -1), "seed must not be negative"),
        (lambda: shapes.scenes(1, 0, "test"), "split must be one of"),
        (lambda: shapes.minimal_pairs(1, 0, "size"), "attribute"),
    ],
)
def test_wrong_arguments_are_named(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()


def _drawn(mask: np.ndarray) -> list[str]:
    return ["".join("#" if inside else "." for inside in row) for row in mask]
