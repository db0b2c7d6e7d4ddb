"""Choices and what is counted of them: options, vocabularies, samples, and the shapes world's."""

import numpy as np
import pytest
import torch

from hooked_vlm import HookedVLM
from hooked_vlm.data import (
    Choice,
    Choices,
    Report,
    Vocabulary,
    prompt_form,
    semantic_image_pairs,
    shapes,
    shapes_choices,
)
from hooked_vlm.data.report import BadRow, LeftOut, Rows


def test_reports_add_up():
    one = Report(5, {"blank": 4, "gone": 1}, {"blank": ("a", "b", "c"), "gone": ("d",)})
    other = Report(1, {"gone": 2}, {"gone": ("e", "f")})
    both = one + other
    assert (both.read, both.kept, dict(both.dropped)) == (13, 6, {"blank": 4, "gone": 3})
    assert both.names == {"blank": ("a", "b", "c"), "gone": ("d", "e", "f")}
    assert str(both).splitlines() == [
        "kept 6 of 13 rows",
        "  4 dropped, blank: a, b, c, ...",
        "  3 dropped, gone: d, e, f",
    ]
    assert one.to_dict() == {
        "read": 10,
        "kept": 5,
        "dropped": {
            "blank": {"count": 4, "first": ["a", "b", "c"]},
            "gone": {"count": 1, "first": ["d"]},
        },
    }
    later = one.then(Report(2, {"too long": 3}))
    assert (later.read, later.kept) == (10, 2)
    assert str(later).endswith("  3 dropped, too long")
    with pytest.raises(ValueError, match="5 rows were kept and the next stage got 3"):
        one.then(other)


def test_bad_rows_raise_or_are_counted():
    def read(on_bad):
        rows = Rows(on_bad)
        for name in "abcdefg":
            with rows.row(name):
                if name == "a":
                    raise LeftOut("not asked for")
                if name in "cdefg":
                    raise BadRow("broken", f"{name} is broken")
        return rows.report()

    assert read("drop") == Report(
        1, {"not asked for": 1, "broken": 5}, {"not asked for": ("a",), "broken": ("c", "d", "e")}
    )
    with pytest.raises(ValueError, match=r"^c: c is broken; on_bad='drop' leaves such rows out$"):
        read("raise")
    rows = Rows("drop")
    with pytest.raises(KeyError), rows.row("a"):  # a mistake of ours is no bad row
        raise KeyError("a")
    with rows.row("b", keeps=False):
        pass
    assert rows.report() == Report()


def test_options_stand_once_in_their_question():
    choice = Choice("a", "Is this folded paper Old or new?", "new", "old")
    assert not choice.answer_first  # 'old' in 'folded' is no word
    assert [choice.text[slice(*span)] for span in choice.spans] == ["new", "Old"]
    assert Choice("a", "is it light blue or red?", "light blue", "red").answer_first
    for text, answer, foil, says in [
        ("is it red?", "red", "blue", "'p': the option 'blue' stands 0 times"),
        ("is red paint red or blue?", "blue", "red", "'p': the option 'red' stands 2 times"),
        ("is it blue or light blue?", "light blue", "blue", "'blue' stands 2 times"),
        ("is it red or Red?", "red", "Red", "'p': both options are 'red'"),
    ]:
        with pytest.raises(ValueError, match=says):
            Choice("a", text, answer, foil, name="p")
    for mask in (np.ones((2, 2, 1), dtype=bool), np.ones(4, dtype=bool)):
        with pytest.raises(ValueError, match=r"'p': a mask is bool \[height, width\]"):
            Choice("a", "red or blue", "red", "blue", name="p", mask=mask)


def test_what_may_replace_a_word():
    words = Vocabulary(("a", "b", "c", "d"), similar={"a": ("b",), "d": ("c",)})
    assert words.instead_of("b", beside=()) == ["c", "d"]  # similar in both directions
    assert words.instead_of("a", beside=("c",)) == []
    assert words.instead_of("x", beside=("d",)) == ["a", "b"]
    for wrong, says in [
        ({"words": ()}, "needs words"),
        ({"words": ("a", "b", "a")}, "'a' is twice"),
        ({"words": ("a",), "similar": {"a": ("b",)}}, "'b' is similar to a word"),
        ({"words": ("a",), "classes": {"c": "+"}}, "'c' is similar to a word, or has a class"),
    ]:
        with pytest.raises(ValueError, match=says):
            Vocabulary(**wrong)


def made(name, group, first):
    text = "red or blue?" if first else "blue or red?"
    return Choice("image", text, "red", "blue", name=name, group=group)


def test_samples_are_balanced_and_without_replacement():
    items = [made(f"a{index}", "a", index < 10) for index in range(13)]
    items += [made(f"b{index}", "b", index % 2 == 0) for index in range(40)]
    items += [made("c", "c", True)]
    choices = Choices(items, Report(54, {"gone": 6}), kind="mine")
    assert choices.groups() == {"a": 13, "b": 40, "c": 1}
    drawn = choices.sample(8, seed=3)
    assert drawn.groups() == {"a": 6, "b": 8}  # of 'a' three have the foil first, of 'c' none
    assert {group: 0 for group in "ab"} == {
        group: sum(1 if one.answer_first else -1 for one in drawn if one.group == group)
        for group in "ab"
    }
    names = [choice.name for choice in drawn]
    assert len(set(names)) == len(names)
    assert names == [choice.name for choice in choices if choice.name in names]
    assert [choice.name for choice in choices.sample(8, seed=3)] == names
    assert [choice.name for choice in choices.sample(8, seed=4)] != names
    assert drawn.report == Report(14, {"gone": 6, "not drawn": 40})
    assert (drawn.kind, drawn[0].name, len(drawn)) == ("mine", names[0], 14)
    for n in (0, 7):
        with pytest.raises(ValueError, match=f"even and at least 2, half for each order, not {n}"):
            choices.sample(n, seed=0)


def test_sets_that_cannot_be():
    with pytest.raises(ValueError, match="2 choices have the name 'a'"):
        Choices([made("a", "g", True), made("b", "g", True), made("a", "g", False)], Report(3))
    choice = Choice("image", "red or blue?", "red", "blue", name="a", vocabulary="color")
    with pytest.raises(ValueError, match=r"'a': no vocabulary 'color'; there are \['shape'\]"):
        Choices([choice], Report(1), {"shape": Vocabulary(shapes.KINDS)})


def test_masks_and_images_of_the_shapes_world_show_what_is_asked():
    """Inside the mask the clean image has the answer's colour, and the other image the foil's."""
    choices = shapes_choices(20, seed=2, attribute="color", size=96)
    for choice in choices:
        clean, other = (np.asarray(one) for one in (choice.image, choice.other_image))
        assert choice.mask.shape == clean.shape[:2] == (96, 96)
        inside = clean[choice.mask], other[choice.mask]
        for pixels, color in zip(inside, (choice.answer, choice.foil), strict=True):
            assert np.median(pixels, axis=0).tolist() == list(shapes.COLORS[color])
        unmasked = (clean != other).any(-1) & ~choice.mask
        assert unmasked.sum() < choice.mask.sum() / 4  # the smoothed edge
    again = shapes_choices(20, seed=2, attribute="color", size=96)
    assert [one.text for one in again] == [one.text for one in choices]
    assert {one.answer_first for one in choices} == {True, False}


@pytest.mark.parametrize("toy", ["toy-blip-vqa", "toy-llava"])
def test_the_toys_answer_the_choices_of_the_shapes_world(toy):
    """The clean image with the answer, the other one with the foil."""
    model = HookedVLM.from_pretrained(toy)
    choices = shapes_choices(30, seed=4)
    assert choices.groups() == {"color": 10, "relation": 10, "shape": 10}
    pairs, report = semantic_image_pairs(choices, form=prompt_form(model.task))
    assert report == Report(30)
    right = {group: [] for group in choices.groups()}
    for choice, pair in zip(choices, pairs, strict=True):
        with torch.no_grad():
            logits = model(**model.prepare_prompt(pair.images, pair.texts))[:, -1]
        words = [model.to_single_token(word) for word in (choice.answer, choice.foil)]
        right[choice.group] += (logits.argmax(-1) == torch.tensor(words)).tolist()
    assert min(sum(one) / len(one) for one in right.values()) >= 0.95
