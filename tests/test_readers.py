"""MIT-States, facial expressions and COCO-QA in their formats, and gone wrong."""

import shutil

import numpy as np
import pytest
from data_files import LEFT_OUT, draw, write
from PIL import Image

from hooked_vlm.data import read_coco_qa, read_facial_expressions, read_mit_states
from hooked_vlm.data.facial_expressions import EMOTIONS, WORDS, feelings
from hooked_vlm.data.mit_states import ADJECTIVES, SIMILAR

# --- MIT-States


def test_the_lists_of_adjectives():
    words = [word for group in ADJECTIVES.values() for word in group]
    assert {group: len(known) for group, known in ADJECTIVES.items()} == {
        "shape": 23,
        "color": 21,
        "texture": 14,
    }
    assert len(set(words)) == 58
    assert {*SIMILAR}.union(*SIMILAR.values()) <= set(words)
    assert "unripe" not in SIMILAR["ripe"]
    assert {"dirty", "rusty"} <= set(SIMILAR["muddy"])


@pytest.fixture
def mit(tmp_path):
    folders = {"dark apple": 3, "ripe apple": 3, "unripe apple": 3, "dark room": 2, "old room": 2}
    for place, (name, n) in enumerate(folders.items()):
        for index in range(n):
            draw(tmp_path / "images" / name / f"{index}.jpg", 10 * place + index)
    return tmp_path


def test_mit_states(mit):
    choices = read_mit_states(mit, seed=0)
    # Only 'unripe' is unlike another of the apple's states: its three photographs are foils of
    # three of the other six. Of the room there is one state; 'old' is not asked about.
    assert choices.report.dropped == {
        "another adjective": 2,
        "no photograph left of the noun in a state unlike it": 3 + 2,
    }
    assert (len(choices), choices.groups()) == (6, {"color": 6})
    assert all("unripe" in (one.answer, one.foil) for one in choices)
    others = [one.other_image for one in choices]
    assert len(set(others)) == len(others)
    for one in choices:
        first, second = (one.answer, one.foil) if one.answer_first else (one.foil, one.answer)
        assert one.text == f"Is this apple {first} or {second}?"
        assert one.image.parent.name == f"{one.answer} apple"
        assert one.other_image.parent.name == f"{one.foil} apple"
        assert one.roles == {"object": "apple"}
        assert one.name == f"{one.answer} apple/{one.image.name}"
    assert read_mit_states(mit, seed=0).items == choices.items
    assert read_mit_states(mit, seed=1).items != choices.items
    assert {one.answer_first for seed in range(3) for one in read_mit_states(mit, seed=seed)} == {
        True,
        False,
    }


def test_mit_states_never_asks_between_similar_adjectives(mit):
    lists = {"adjectives": {"a": ["dark", "ripe"], "b": ["unripe"]}, "seed": 0}
    pairs = [
        {frozenset((one.answer, one.foil)) for one in read_mit_states(mit, **lists, **given)}
        for given in ({}, {"similar": {"ripe": ["dark"]}}, {"similar": {"dark": ["ripe"]}})
    ]
    ripe, dark, both = map(frozenset, (("ripe", "unripe"), ("dark", "unripe"), ("ripe", "dark")))
    assert both in pairs[0]
    assert pairs[1] | pairs[2] <= {ripe, dark}
    with pytest.raises(ValueError, match="'old' is similar to a word"):
        read_mit_states(mit, **lists, similar={"ripe": ["old"]})
    with pytest.raises(ValueError, match="'dark' is twice"):
        read_mit_states(mit, seed=0, adjectives={"a": ["dark"], "b": ["dark"]})


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("unreadable image", "dark apple/broken.jpg: .* is no image that can be read"),
        ("image of a single colour", "dark apple/flat.png: .* shows a single colour"),
        ("duplicate image", "ripe apple/copy.jpg: shows the same as dark apple/0.jpg"),
        ("not called an image", r"dark apple/notes.txt: it ends in none of \.jpg"),
        ("folder of another name", "apple/: a folder is called by an adjective and a noun"),
    ],
)
def test_bad_files_of_mit_states(mit, reason, says):
    images = mit / "images"
    (images / "dark apple" / ".DS_Store").write_bytes(b"hidden")
    if reason == "unreadable image":
        (images / "dark apple" / "broken.jpg").write_bytes(b"")
    elif reason == "image of a single colour":
        Image.new("L", (8, 8), 200).save(images / "dark apple" / "flat.png")
    elif reason == "duplicate image":
        shutil.copy(images / "dark apple" / "0.jpg", images / "ripe apple" / "copy.jpg")
    elif reason == "not called an image":
        (images / "dark apple" / "notes.txt").write_text("by hand")
    else:
        draw(images / "apple" / "0.jpg", 99)
    with pytest.raises(ValueError, match=f"{mit}, {says}.*; {LEFT_OUT}"):
        read_mit_states(mit, seed=0)
    choices = read_mit_states(mit, seed=0, on_bad="drop")
    assert choices.report.dropped[reason] == 1
    assert choices.items == read_mit_states(mit, seed=0, on_bad="drop").items
    assert len(choices) == 6


def test_folders_that_are_no_mit_states(mit):
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*images'; give the folder"):
        read_mit_states(mit / "images", seed=0)
    with pytest.raises(ValueError, match=r"holds no choices that can be used: kept 0 of 13 rows"):
        read_mit_states(mit, seed=0, adjectives={"a": ["dark"]})


# --- facial expressions


def faces(folder, n=2):
    """The same faces in folders and as a table, and their emotions by name."""
    names = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    rows, rng = [], np.random.default_rng(0)
    for split, usage in (("train", "Training"), ("validation", "PrivateTest")):
        for number, name in enumerate(names):
            for index in range(n):
                grey = rng.integers(0, 256, (48, 48), dtype=np.uint8)
                file = folder / "images" / split / name / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(grey).save(file)
                pixels = " ".join(map(str, grey.ravel().tolist()))
                rows.append({"emotion": str(number), "pixels": pixels, "Usage": usage})
    return rows


def test_facial_expressions_as_folders_and_as_a_table(tmp_path):
    # As some copies have it, with spaces in the header.
    rows = [{"emotion": r["emotion"], " Usage": r["Usage"], " pixels": r["pixels"]}
            for r in faces(tmp_path)]  # fmt: skip
    table = write(tmp_path / "fer2013.csv", rows)
    for split in ("train", "validation"):
        choices = read_facial_expressions(tmp_path, seed=0, split=split)
        assert choices.groups() == {emotion: 2 for emotion in sorted(EMOTIONS)}
        for one in choices:
            first, second = (one.answer, one.foil) if one.answer_first else (one.foil, one.answer)
            assert one.text == f"Is this person feeling {first} or {second}?"
            folders = one.image.parent, one.other_image.parent
            assert [folder.parent.name for folder in folders] == [split, split]
            assert [folder.name[:4] for folder in folders] == [one.answer[:4], one.foil[:4]]
            assert one.answer != one.foil
        read = read_facial_expressions(table, seed=0, split=split)
        assert read.report.dropped == {"another split": 14}
        at = {file: np.asarray(Image.open(file)).tolist() for file in tmp_path.rglob("*.png")}
        shown = {str(at[one.image]): one.answer for one in choices}
        assert {str(np.asarray(one.image).tolist()): one.answer for one in read} == shown
        for one in read:
            assert shown[str(np.asarray(one.other_image).tolist())] == one.foil
    assert read.items[0].name == "line 16"


BAD_FACES = [
    ({"emotion": "7"}, "unknown emotion", "emotion '7' is none of 0 to 6"),
    ({"emotion": "happy"}, "unknown emotion", "emotion 'happy' is none"),
    ({"Usage": "Test"}, "unknown usage", "Usage 'Test' is none of"),
    ({"pixels": "0 1 2"}, "unreadable image", "48 times 48 numbers from 0 to 255, not 3 from 0"),
    ({"pixels": ""}, "unreadable image", "48 times 48 numbers from 0 to 255, not 0"),
    ({"pixels": " ".join(["256"] * 48**2)}, "unreadable image", "not 2304 from 256 to 256"),
    ({"pixels": "a" + " 1" * 2303}, "unreadable image", "pixels are no whole numbers: .*'a'"),
    ({"pixels": " ".join(["0"] * 48**2)}, "image of a single colour", "all pixels are 0"),
]


@pytest.mark.parametrize(("wrong", "reason", "says"), BAD_FACES)
def test_bad_lines_of_facial_expressions(tmp_path, wrong, reason, says):
    rows = faces(tmp_path)
    table = write(tmp_path / "faces.csv", [*rows[:4], {**rows[4], **wrong}, *rows[5:14]])
    with pytest.raises(ValueError, match=rf"faces\.csv, line 6: .*{says}.*; {LEFT_OUT}"):
        read_facial_expressions(table, seed=0)
    choices = read_facial_expressions(table, seed=0, on_bad="drop")
    assert (choices.report.kept, choices.report.dropped) == (13, {reason: 1})


def test_faces_that_are_there_twice_or_of_no_emotion(tmp_path):
    rows = faces(tmp_path)
    images = tmp_path / "images" / "train"
    table = write(tmp_path / "faces.csv", [*rows, rows[0]])
    shutil.copy(images / "happy" / "0.png", images / "sad" / "0b.png")
    draw(images / "bored" / "0.png", 5)
    found = read_facial_expressions(table, seed=0, on_bad="drop").report.names
    assert found["duplicate image"] == ("line 30",)
    found = read_facial_expressions(tmp_path, seed=0, on_bad="drop").report.names
    assert found == {
        "unknown emotion": ("train/bored/0.png",),
        "duplicate image": ("train/sad/0b.png",),
    }
    with pytest.raises(ValueError, match=r"train/bored/0.png: 'bored' is none of \('angry'"):
        read_facial_expressions(tmp_path, seed=0)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*train'"):
        read_facial_expressions(images, seed=0)
    lone = write(tmp_path / "lone.csv", rows[:2])
    with pytest.raises(ValueError, match="no face with another emotion"):
        read_facial_expressions(lone, seed=0)


def test_words_for_feelings():
    words = feelings()
    assert len(words.words) == 43
    assert set(EMOTIONS) <= set(words.words)
    sentiment = {
        word: name for name, lines in WORDS.items() for one in lines for word in one.split()
    }
    for option in words.words:
        found = {sentiment[word] for word in words.instead_of(option, beside=())}
        expected = {"negative", "neutral"} if sentiment[option] == "positive" else {"positive"}
        assert found == expected, option


# --- COCO-QA


def coco(count, text="what is the color of the cat", answer="black", number="", **more):
    columns = {"train_image_id": count, "question": text, "answer": answer}
    return {"": number, **{f"{name}_count": cell for name, cell in columns.items()}, **more}


def test_coco_qa(tmp_path):
    for number in (9, 30, 123456):
        draw(tmp_path / "images" / f"{number:012d}.jpg", number)
    lines = [
        coco("30"),
        coco("000000000009", "what is the color of the dog ?", "brown"),
        coco("123456.0", "what is the color of the long-haired cat", "white"),
        coco("9", "what color is it", "brown"),
    ]
    table = write(tmp_path / "color_coco_qa.csv", lines)
    questions, report = read_coco_qa(table, tmp_path / "images")
    assert [(one.image.name, one.text, one.answer, one.name) for one in questions] == [
        ("000000000030.jpg", "what is the color of the cat", "black", "line 2"),
        ("000000000009.jpg", "what is the color of the dog ?", "brown", "line 3"),
    ]
    assert report.dropped == {"not 7 words": 2}
    assert len(read_coco_qa(table, tmp_path / "images", n_words=None)[0]) == 4
    placed = [{key.replace("_count", "_where"): one[key] for key in one} for one in lines]
    other = write(tmp_path / "location_coco_qa.csv", placed)
    again, _ = read_coco_qa(other, tmp_path / "images", suffix="where")
    assert again == questions
    with pytest.raises(ValueError, match="has no column 'train_image_id_count', 'question_count'"):
        read_coco_qa(other, tmp_path / "images")


@pytest.mark.parametrize(
    ("wrong", "reason", "says"),
    [
        (coco("31"), "image not there", "000000000031.jpg' is not there"),
        (coco("40"), "unreadable image", "is no image that can be read"),
        (coco("x"), "no image number", "'x' is no number of up to twelve digits"),
        (coco("1.5"), "no image number", "'1.5' is no number"),
        (coco(""), "empty cell", "train_image_id_count is empty"),
        (coco("30", text=" "), "empty cell", "question_count is empty"),
        (coco("30", answer=""), "empty cell", "answer_count is empty"),
        (coco("30", "What is the color of the cat"), "duplicate", "asks the same as line 2"),
    ],
)
def test_bad_lines_of_coco_qa(tmp_path, wrong, reason, says):
    draw(tmp_path / "000000000030.jpg")
    (tmp_path / "000000000040.jpg").write_bytes(b"nothing")
    table = write(tmp_path / "q.csv", [coco("30"), wrong])
    with pytest.raises(ValueError, match=rf"q\.csv, line 3: .*{says}.*; {LEFT_OUT}"):
        read_coco_qa(table, tmp_path)
    questions, report = read_coco_qa(table, tmp_path, on_bad="drop")
    assert (len(questions), report.dropped) == (1, {reason: 1})
    unchecked = 2 if reason == "unreadable image" else 1
    assert len(read_coco_qa(table, tmp_path, on_bad="drop", check_images=False)[0]) == unchecked
