"""Pairs: what they hold, how they are read, and that the toys answer those of the shapes world."""

import json

import pytest
import torch
from PIL import Image

from hooked_vlm import HookedBLIP
from hooked_vlm.data import Pair, read_pairs, shapes_pairs

TASKS = ("itm", "captioning", "vqa")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name, color in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write(folder, name, text, encoding="utf-8"):
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def test_csv(folder):
    file = write(
        folder,
        "pairs.csv",
        "image,text,corrupt_image,corrupt_text,answer,foil,name\r\n"
        "images/red.png,a red thing,images/blue.png,,red,blue,first\r\n"
        '\r\nimages/red.png,"a thing, red",,"a thing,\nblue",,,\r\n'
        f"{folder / 'images' / 'blue.png'},a blue thing,,a red thing,,,\r\n",
    )
    red, blue = folder / "images" / "red.png", folder / "images" / "blue.png"
    assert read_pairs(file) == [
        Pair(red, "a red thing", blue, None, "red", "blue", "first"),
        Pair(red, "a thing, red", None, "a thing,\nblue", None, None, "5"),
        Pair(blue, "a blue thing", None, "a red thing", None, None, "6"),
    ]
    marked = write(folder, "marked.csv", file.read_text(), "utf-8-sig")
    assert read_pairs(str(marked)) == read_pairs(file)


def test_jsonl(folder):
    rows = [
        {"image": "images/red.png", "text": "rouge é", "corrupt_text": "bleu", "foil": None},
        {"image": "images/red.png", "text": "a", "corrupt_image": "images/blue.png", "name": "b"},
    ]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    red, blue = folder / "images" / "red.png", folder / "images" / "blue.png"
    assert read_pairs(write(folder, "pairs.jsonl", text)) == [
        Pair(red, "rouge é", None, "bleu", name="1"),
        Pair(red, "a", blue, name="b"),
    ]


GOOD = "images/red.png,a,b\n"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.csv", f"image,text,corrupt_text\n{GOOD}images/red.png,,b", "line 3: text missing"),
        ("p.csv", "text,corrupt_text\na,b", "line 2: image missing"),
        ("p.csv", f"image,text,corrupt\n{GOOD}", r"line 2: no field \['corrupt'\]; known are"),
        ("p.csv", f"image,text,corrupt_text\n{GOOD}images/red.png,a,b,c\n", "line 3: more cells"),
        ("p.csv", f"image,text,corrupt_text\n{GOOD}\nimages/no.png,a,b", "line 4: image .*no.png"),
        ("p.csv", "image,text,corrupt_image\nimages/red.png,a,x.png", "line 2: corrupt_image"),
        ("p.csv", f"image,text,corrupt_text\n{GOOD}images/red.png,a,a", "line 3: pair '3': the c"),
        ("p.csv", 'image,text,corrupt_text\nimages/red.png,"a"b,c\n', "line 1: no CSV: "),
        ("p.csv", "image,text,corrupt_text\n", "holds no pairs"),
        ("p.csv", "", "holds no pairs"),
        ("p.jsonl", "\n\n", "holds no pairs"),
        ("p.jsonl", '{"image": "images/red.png"}', "line 1: text missing"),
        ("p.jsonl", '\n{"image": "images/red.png", "text": "a"', "line 2: no JSON: "),
        ("p.jsonl", "[1, 2]", "line 1: no JSON object"),
        ("p.jsonl", '{"image": "images/red.png", "text": 5}', "line 1: text is no string: 5"),
        ("p.jsonl", '{"image": "images/red.png", "text": "a", "x": 1}', r"line 1: no field \['x'"),
        ("p.txt", "image,text", "is neither .csv nor .jsonl"),
    ],
)
def test_bad_lines_are_named(folder, name, text, says):
    with pytest.raises(ValueError, match=rf"{name}.*{says}"):
        read_pairs(write(folder, name, text))


def test_files_that_are_no_text_or_not_there(folder):
    file = write(folder, "p.csv", "image,text\nimages/red.png,é", "latin-1")
    with pytest.raises(ValueError, match=r"p\.csv is no text in UTF-8"):
        read_pairs(file)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        read_pairs(folder / "absent.csv")


def test_pairs_are_pairs():
    one, two = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    for same in (Pair(one, "a", None, "b"), Pair(one, "a", one, "b"), Pair("x", "a", "./x", "b")):
        assert len(same.images) == 1
        assert same.texts == ["a", "b"]
    assert Pair(one, "a", two).images == [one, two]
    assert Pair(one, "a", two).texts == ["a", "a"]
    assert Pair(one, None, two).texts is None
    for wrong in (
        {},
        {"corrupt_image": one},
        {"corrupt_text": "a"},
        {"corrupt_image": one, "corrupt_text": "a"},
    ):
        with pytest.raises(ValueError, match="pair 'p': the corrupt input is the clean one"):
            Pair(one, "a", name="p", **wrong)
    with pytest.raises(ValueError, match="a corrupt_text needs a text"):
        Pair(one, None, two, "b")


@pytest.mark.parametrize("attribute", [None, "color", "shape", "relation"])
@pytest.mark.parametrize("task", TASKS)
def test_the_toys_answer_the_pairs_of_the_shapes_world(task, attribute):
    """Clean inputs with the answer, corrupt ones with the foil; both are single tokens."""
    model = HookedBLIP.from_pretrained(f"toy-blip-{task}")
    pairs = shapes_pairs(30, 11, task, attribute)
    right = []
    for pair in pairs:
        answer, foil = model.to_single_token(pair.answer), model.to_single_token(pair.foil)
        assert answer != foil
        inputs = model.prepare_prompt(pair.images, pair.texts)
        with torch.no_grad():
            logits = model(**inputs)
        if task == "itm":
            right += [logits[0].argmax() == 1, logits[1].argmax() == 0]
        else:
            right += [logits[0, -1].argmax() == answer, logits[1, -1].argmax() == foil]
    assert sum(map(bool, right)) / len(right) >= 0.9
    assert {pair.name.split(": ")[1] for pair in pairs} == (
        {attribute} if attribute else {"color", "shape", "relation"}
    )
    again = shapes_pairs(30, 11, task, attribute)
    assert [pair.texts for pair in again] == [pair.texts for pair in pairs]


def test_corrupt_captions():
    pairs = shapes_pairs(6, 2, "itm", corrupt="text", size=96)
    model = HookedBLIP.from_pretrained("toy-blip-itm")
    for pair in pairs:
        assert len(pair.images) == 1
        assert pair.image.size == (96, 96)
        different = [
            words for words in zip(*map(str.split, pair.texts), strict=True) if len({*words}) > 1
        ]
        assert different == [(pair.answer, pair.foil)]
        assert model(**model.prepare_prompt(pair.images, pair.texts)).argmax(-1).tolist() == [1, 0]


def test_pairs_that_cannot_be_made():
    with pytest.raises(ValueError, match="corrupt is 'image', or 'text' for task 'itm' or 'llava'"):
        shapes_pairs(1, 0, "vqa", corrupt="text")
    with pytest.raises(ValueError, match=r"task is 'itm', .* or 'llava', not 've'"):
        shapes_pairs(1, 0, "ve")


def test_a_model_refuses_texts_that_do_not_align(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = tmp_path / "pairs.csv"
    table.write_text(
        "image,text,corrupt_text\na.png,a red circle,a blue circle\na.png,a circle,a red circle\n"
    )
    assert len(read_pairs(table)) == 2
    model = HookedBLIP.from_pretrained("toy-blip-itm")
    with pytest.raises(ValueError, match=r"line 3: .*has 4 tokens and the corrupt one 5"):
        read_pairs(table, model)
