"""Pairs of choices: what is corrupted, what stays, and which words may stand for the options."""

import csv
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hooked_vlm import HookedVLM
from hooked_vlm import patching as P
from hooked_vlm.data import (
    Choice,
    Choices,
    Form,
    Report,
    Vocabulary,
    other_questions,
    prompt_form,
    read_svo_probes,
    semantic_image_pairs,
    shapes_choices,
    symmetric_token_replacement,
)
from hooked_vlm.data.facial_expressions import EMOTIONS, WORDS, feelings
from hooked_vlm.data.mit_states import ADJECTIVES, SIMILAR


def pieces(text):
    """Tokens of two letters: 'aa' is one of them, 'aaa' are two."""
    return [word[i : i + 2] for word in text.split() for i in range(0, len(word), 2)]


def asked(answer, foil, name="p", **more):
    text = more.pop("text", f"is it {answer} or {foil} ?")
    return Choice("clean.png", text, answer, foil, name=name, vocabulary="words", **more)


def replaced(choice, words, tokens="aligned", seed=0, to_str_tokens=pieces, **more):
    choices = Choices([choice], Report(1), {"words": Vocabulary(tuple(words), **more)})
    pairs, report = symmetric_token_replacement(
        choices, to_str_tokens, seed=seed, tokens=tokens, on_bad="drop"
    )
    assert report.kept == len(pairs)
    return pairs[0].corrupt_text if pairs else next(iter(report.dropped))


def test_forms():
    form = Form("Look: {question} Say one word.", capital=True, capital_answers=True)
    assert form.of_question("is a VW red?") == "Look: Is a VW red? Say one word."
    assert form.of_answer("light blue") == "Light blue"
    assert Form().of_question("is it?") == "is it?"
    assert prompt_form("vqa") == Form()
    assert prompt_form("llava") == Form(capital=True)
    short = prompt_form("llava", short_answer=True, capital_answers=True)
    assert (
        short.of_question("is it?") == "Is it?\nAnswer the question using a single word or phrase."
    )
    for template in ("no question", "{question} {question}"):
        with pytest.raises(ValueError, match=r"needs \{question\}, and once"):
            Form(template)
    for template in ("{question} {answer}", "{question} {}", "{question"):
        with pytest.raises(ValueError, match=r"has another field than \{question\}"):
            Form(template)
    for task in ("itm", "clip", "captioning", "ve"):
        with pytest.raises(ValueError, match=f"task '{task}' answers no questions"):
            prompt_form(task)
    with pytest.raises(ValueError, match="short_answer is a request to task 'llava'"):
        prompt_form("vqa", short_answer=True)


def test_semantic_image_pairs():
    clean, other = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    choice = Choice(
        clean, "is it red or blue?", "red", "blue", other, name="p", roles={"object": "it"}
    )
    (pair,), report = semantic_image_pairs([choice])
    assert (pair.images, pair.texts) == ([clean, other], ["is it red or blue?"] * 2)
    assert (pair.answer, pair.foil, pair.name, pair.roles) == ("red", "blue", "p", {"object": "it"})
    assert report == Report(1)
    (pair,), _ = semantic_image_pairs([choice], form=Form(capital=True, capital_answers=True))
    assert (pair.text, pair.answer, pair.foil) == ("Is it red or blue?", "Red", "Blue")
    # In the text stand 'red' and 'blue'.
    assert pair.roles == {"object": "it", "answer": "red", "foil": "blue"}
    alone = Choice(clean, "is it red or blue?", "red", "blue", name="alone")
    with pytest.raises(ValueError, match="choice 'alone': it has no image that shows 'blue'"):
        semantic_image_pairs([choice, alone])
    pairs, report = semantic_image_pairs([choice, alone], on_bad="drop")
    assert (len(pairs), report.names) == (1, {"no other image": ("choice 'alone'",)})


def test_replacements_have_as_many_tokens_as_what_they_replace():
    words = ["aa", "bb", "cccc", "dddd", "eeeeee"]
    assert replaced(asked("aa", "cccc"), words) == "is it bb or dddd ?"
    assert replaced(asked("cccc", "aa"), words) == "is it dddd or bb ?"
    assert replaced(asked("aa", "bb"), words) == "no words for the options"
    # Both orders of bb and dddd leave as many tokens in sum, every word with eeeeee has more.
    found = {replaced(asked("aa", "cccc"), words, "equal", seed) for seed in range(60)}
    assert found == {"is it bb or dddd ?", "is it dddd or bb ?", "number of tokens changed"}
    assert replaced(asked("aa", "bb"), words, "equal") == "number of tokens changed"
    # Of the first words only one leaves a second: it is found, however they are drawn.
    tried = {
        replaced(asked("aa", "cccc"), ["bb", "ff", "dddd"], seed=seed, similar={"bb": ["dddd"]})
        for seed in range(20)
    }
    assert tried == {"is it ff or dddd ?"}


def test_replacements_are_none_of_the_options_nor_words_like_them():
    words = ["red", "pink", "blue", "navy", "green", "lime", "black"]
    similar = {"red": ["pink"], "navy": ["blue"], "green": ["lime"]}
    found = {
        replaced(asked("red", "blue"), words, seed=seed, to_str_tokens=str.split, similar=similar)
        for seed in range(80)
    }
    expected = {
        f"is it {one} or {other} ?"
        for one, other in itertools.permutations(["green", "lime", "black"], 2)
        if {one, other} != {"green", "lime"}
    }
    assert found == expected
    # Words that the question has besides, or that a role names, are none either.
    inside = asked("red", "blue", text="is it red or blue, a Lime ?", roles={"object": "black"})
    drawn = {
        replaced(inside, [*words, "grey"], seed=seed, to_str_tokens=str.split, similar=similar)
        for seed in range(40)
    }
    assert drawn == {
        f"is it {a} or {b}, a Lime ?" for a, b in (("green", "grey"), ("grey", "green"))
    }


def test_replacements_of_feelings_are_of_another_sentiment():
    sentiment = {word: name for name, of in WORDS.items() for one in of for word in one.split()}
    items = [
        Choice("face.jpg", f"Is this person feeling {one} or {other}?", one, other,
               name=f"{one}, {other}", vocabulary="feeling")
        for one, other in itertools.permutations(EMOTIONS, 2)
    ]  # fmt: skip
    choices = Choices(items, Report(42), {"feeling": feelings()})
    pairs, report = symmetric_token_replacement(choices, str.split, seed=0)
    assert report == Report(42)
    for pair in pairs:
        words = pair.corrupt_text.removeprefix("Is this person feeling ").rstrip("?").split(" or ")
        assert len({*words, pair.answer, pair.foil}) == 4
        for option, word in zip((pair.answer, pair.foil), words, strict=True):
            positive = sentiment[option] == "positive"
            assert (sentiment[word] == "positive") != positive


def test_replacements_of_states_are_not_like_them():
    words = [word for group in ADJECTIVES.values() for word in group]
    items = [
        Choice("apple.jpg", f"Is this apple {one} or {other}?", one, other,
               name=f"{one}, {other}", vocabulary="adjective")
        for one, other in zip(words, words[1:] + words[:1], strict=True)
    ]  # fmt: skip
    choices = Choices(items, Report(58), {"adjective": Vocabulary(tuple(words), SIMILAR)})
    pairs, _ = symmetric_token_replacement(choices, str.split, seed=0)
    for pair in pairs:
        found = pair.corrupt_text.removeprefix("Is this apple ").rstrip("?").split(" or ")
        together = [pair.answer, pair.foil, *found]
        assert len(set(together)) == 4
        for one, other in itertools.permutations(together, 2):
            if {one, other} != {pair.answer, pair.foil}:
                assert other not in SIMILAR[one]


SUBJECTS = "man woman girl boy dog".split()
VERBS = "run sit eat ride hold".split()
OBJECTS = "sea lawn cake horse ball".split()


def svo(folder, shuffled=0):
    """A table in which every subject, verb and object differs from the next one, as choices."""
    rows = []
    parts = {"subj_neg": SUBJECTS, "verb_neg": VERBS, "obj_neg": OBJECTS}
    for place, (flag, words) in enumerate(parts.items()):
        for index, (one, other) in enumerate(itertools.pairwise(words)):
            pos = [SUBJECTS[index], VERBS[index], OBJECTS[index]]
            neg = [*pos[:place], other, *pos[place + 1 :]]
            assert pos[place] == one
            urls = [f"https://example.org/{flag}-{index}-{side}.png" for side in ("pos", "neg")]
            told = dict(zip(("pos_url", "neg_url"), urls, strict=True))
            told |= {"pos_triplet": ",".join(pos), "neg_triplet": ",".join(neg)}
            rows.append(told | {key: str(key == flag) for key in parts})
            for url in urls:
                file = folder / "images" / url.rsplit("/", 1)[-1]
                if not file.exists():
                    file.parent.mkdir(exist_ok=True)
                    pixels = np.random.default_rng(len(list(file.parent.iterdir())))
                    Image.fromarray(pixels.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file)
    if shuffled:
        random.Random(shuffled).shuffle(rows)
    with (folder / "svo_probes.csv").open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return read_svo_probes(folder / "svo_probes.csv", folder / "images", seed=0)


@pytest.mark.parametrize("shuffled", [0, 1, 2])
def test_every_corrupt_prompt_belongs_to_its_row(tmp_path, shuffled):
    """And no word of a triplet, nor the option of the other one, stands for an option."""
    choices = svo(tmp_path, shuffled)
    assert choices.groups() == {"obj_neg": 8, "subj_neg": 8, "verb_neg": 8}
    # Both directions of every line are there, with the photographs exchanged.
    images = {(one.text, one.image.name): one.other_image.name for one in choices}
    assert len(images) == 24
    assert all(images[text, other] == image for (text, image), other in images.items())
    known = {"subj_neg": SUBJECTS, "verb_neg": VERBS, "obj_neg": OBJECTS}
    for seed in range(6):
        pairs, report = symmetric_token_replacement(choices, str.split, seed=seed)
        assert report == Report(24)
        for choice, pair in zip(choices, pairs, strict=True):
            assert (pair.name, pair.text, pair.image) == (choice.name, choice.text, choice.image)
            assert pair.corrupt_image is None
            assert (pair.answer, pair.foil) == (choice.answer, choice.foil)
            clean, corrupt = (text.rstrip("?").split() for text in pair.texts)
            changed = [(a, b) for a, b in zip(clean, corrupt, strict=True) if a != b]
            assert {a for a, _ in changed} == {choice.answer, choice.foil}
            words = {b for _, b in changed}
            assert len(words) == 2
            assert words <= set(known[choice.group]) - set(clean)


def test_an_object_is_not_replaced_by_itself(tmp_path):
    """With three objects there is no second word, unless one of the line's own is taken."""
    choices = svo(tmp_path)
    words = {**choices.vocabularies, "object": Vocabulary(("cake", "horse", "sea"))}
    line = [one for one in choices if {one.answer, one.foil} == {"cake", "horse"}]
    assert [one.group for one in line] == ["obj_neg", "obj_neg"]
    few = Choices(line, Report(2), words)
    with pytest.raises(ValueError, match=r"vocabulary 'object' has no two words .* 'cake' and 'ho"):
        symmetric_token_replacement(few, str.split, seed=0)


def test_what_is_drawn_for_a_choice_does_not_depend_on_the_others(tmp_path):
    choices = svo(tmp_path)
    first, _ = symmetric_token_replacement(choices, str.split, seed=3)
    half = Choices(choices.items[::-2], Report(12), choices.vocabularies)
    again, _ = symmetric_token_replacement(half, str.split, seed=3)
    assert [pair.texts for pair in again] == [pair.texts for pair in first[::-2]]
    other, _ = symmetric_token_replacement(choices, str.split, seed=4)
    assert [pair.texts for pair in other] != [pair.texts for pair in first]


def test_choices_without_a_vocabulary():
    choices = shapes_choices(3, seed=0)
    with pytest.raises(ValueError, match="choice '2: relation': it has no vocabulary"):
        symmetric_token_replacement(choices, str.split, seed=0)
    pairs, report = symmetric_token_replacement(choices, str.split, seed=0, on_bad="drop")
    assert [pair.name for pair in pairs] == ["0: color", "1: shape"]
    assert report.dropped == {"no vocabulary": 1}


@pytest.mark.parametrize("toy", ["toy-blip-vqa", "toy-llava"])
def test_aligned_questions_differ_at_the_options_alone(toy):
    """So the corrupt word embeddings, at both options together, give the corrupt run."""
    model = HookedVLM.from_pretrained(toy)
    choices = shapes_choices(4, seed=1, attribute="color")
    pairs, _ = symmetric_token_replacement(
        choices, model.to_str_tokens, seed=0, form=prompt_form(model.task)
    )
    for pair in pairs:
        clean, corrupt = map(model.to_str_tokens, pair.texts)
        differ = [i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        assert {clean[index].lstrip("▁") for index in differ} == {pair.answer, pair.foil}
        behind = 2 if toy == "toy-llava" else 0  # 'ASSISTANT' and ':' follow the question
        options = [index - len(clean) - behind for index in differ]
        found = P.activation_patching(
            model,
            pair,
            "text.hook_embed",
            positions=[tuple(options), "answer", "foil", "object"],
            direction="noise",
            progress=False,
        )
        both, answer, foil, thing = found.data.values.ravel()
        start, end = float(found.clean[0]), float(found.corrupt[0])
        assert start != end
        np.testing.assert_allclose([both, thing], [end, start], rtol=1e-4)
        assert start not in (answer, foil)


def test_other_questions_are_about_the_other_shape():
    choices = shapes_choices(3, 0)
    pairs, report = other_questions(choices, str.split)
    assert [pair.corrupt_text for pair in pairs] == [
        "is this cross black or blue?",
        "is this yellow object a triangle or a square?",
        "is this square right or left of the cross?",
    ]
    assert [(pair.answer, pair.foil) for pair in pairs] == [
        ("blue", "black"),
        ("square", "triangle"),
        ("left", "right"),
    ]
    assert all(len(pair.images) == 1 for pair in pairs) and report.kept == 3
    alone = replace(choices[0], other_text=None)
    longer = replace(choices[1], other_text="is this very yellow object a triangle or a square?")
    with pytest.raises(ValueError, match="choice '0: color': no question about its image has"):
        other_questions([alone], str.split)
    pairs, report = other_questions([alone, longer], str.split, on_bad="drop")
    assert not pairs
    assert report.dropped == {"no other question": 1, "number of tokens changed": 1}
