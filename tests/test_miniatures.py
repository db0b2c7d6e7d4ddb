"""Small data sets in the formats of the real ones, and pairs of the user's own, with reports."""

import numpy as np
import pytest
from data_files import LEFT_OUT, draw, write
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from hooked_vlm.data import (
    Pair,
    miniatures,
    read_choices,
    read_coco_qa,
    read_pairs,
    read_pairs_report,
    shapes,
    symmetric_token_replacement,
)

# --- pairs of the user's own


class Words:
    """A model whose tokens are words."""

    to_str_tokens = staticmethod(str.split)


def test_pairs_with_a_report(tmp_path):
    for number, name in enumerate("ab"):
        draw(tmp_path / f"{name}.png", number)
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")  # a user may compare with nothing
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = [
        ("a.png", "a red thing", "b.png", "", "one"),
        ("c.png", "a red thing", "b.png", "", "two"),
        ("broken.png", "a red thing", "b.png", "", "three"),
        ("a.png", "a red thing", "b.png", "", "again"),
        ("a.png", "a red thing", "", "a light blue thing", "long"),
        ("a.png", "a red thing", "", "a red thing", "same"),
        ("a.png", "a red thing", "flat.png", "", "last"),
    ]
    columns = ("image", "text", "corrupt_image", "corrupt_text", "name")
    rows = [dict(zip(columns, one, strict=True)) for one in lines]
    table = write(tmp_path / "pairs.csv", rows)
    pairs, report = read_pairs_report(table, Words, on_bad="drop")
    image = tmp_path / "a.png"
    assert pairs == [
        Pair(image, "a red thing", tmp_path / f"{other}.png", name=name)
        for other, name in (("b", "one"), ("flat", "last"))
    ]
    assert (report.kept, report.dropped) == (
        2,
        {
            "image not there": 1,
            "unreadable image": 1,
            "duplicate": 1,
            "other number of tokens": 1,
            "corrupt input is the clean one": 1,
        },
    )
    assert report.names["duplicate"] == ("line 5",)
    for number, says in [
        (1, "line 2: image '.*c.png' is not there"),
        (2, "line 2: image '.*broken.png' is no image that can be read"),
        (4, "line 2: pair 'long': positions do not align"),
        (5, "line 2: pair 'same': the corrupt input is the clean one"),
    ]:
        bad = write(tmp_path / "bad.csv", [rows[number], rows[0]])
        with pytest.raises(ValueError, match=rf"bad\.csv, {says}.*; {LEFT_OUT}"):
            read_pairs_report(bad, Words)
    twice = write(tmp_path / "twice.csv", [rows[0], rows[3]])
    with pytest.raises(ValueError, match="line 3: the same pair as in line 2"):
        read_pairs_report(twice)
    assert len(read_pairs(twice)) == 2  # as before: it may be meant
    assert len(read_pairs(write(tmp_path / "b.csv", [rows[2]]))) == 1  # opened when it is needed


def test_pairs_of_broken_jsonl(tmp_path):
    draw(tmp_path / "a.png")
    good = '{"image": "a.png", "text": "a", "corrupt_text": "b"}'
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{good}\n{{"image": "a.png", "te\n[1]\n{{"image": "a.png", "color": "red"}}\n')
    pairs, report = read_pairs_report(file, on_bad="drop")
    assert len(pairs) == 1
    assert report.dropped == {"no JSON": 1, "no JSON object": 1, "unknown field": 1}
    file.write_text("[1]\n")
    with pytest.raises(ValueError, match="holds no pairs that can be used: kept 0 of 1 rows"):
        read_pairs_report(file, on_bad="drop")


# --- miniatures of them all


COLORS = {"color": tuple(shapes.COLORS)}


def test_miniatures_are_read_whole(tmp_path):
    for kind, options, kept in [
        ("svo-probes", {}, 24),
        ("mit-states", {"adjectives": COLORS}, None),
        ("facial-expressions", {"split": "validation"}, 12),
    ]:
        folder = miniatures.write_miniature(kind, tmp_path / kind, n=12, seed=1)
        choices = read_choices(kind, folder, seed=0, **options)
        assert choices.report.kept == (kept or len(choices))
        reasons = set(choices.report.dropped)
        assert reasons <= {"no photograph left of the noun in a state unlike it"}
        pairs, report = symmetric_token_replacement(
            choices, Words.to_str_tokens, seed=0, on_bad="drop"
        )
        assert len(pairs) == report.kept >= (len(choices) if kind != "facial-expressions" else 9)
        for one in choices:
            scene, other = (np.asarray(Image.open(i)) for i in (one.image, one.other_image))
            assert scene.shape == other.shape
            assert (scene != other).any()
    faces = read_choices(
        "facial-expressions", tmp_path / "facial-expressions" / "fer2013.csv", seed=0
    )
    assert faces.report.kept == 12
    folder = miniatures.write_miniature("coco-qa", tmp_path / "coco-qa", n=12)
    questions, _ = read_coco_qa(folder / "color_coco_qa.csv", folder / "images", n_words=5)
    assert len(questions) == 24
    for one in questions:  # some pixels of the image have the answer's colour
        pixels = np.asarray(Image.open(one.image)).astype(int)
        off = abs(pixels - np.array(shapes.COLORS[one.answer])).max(-1)
        assert (off < 16).sum() > 50
    again = miniatures.write_miniature("coco-qa", tmp_path / "again", n=12)
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.*"))
    assert len(files) == 13
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)
    with pytest.raises(ValueError, match="no kind of data set 'coco-qa'; there are svo-probes, "):
        read_choices("coco-qa", folder)


def test_miniatures_leave_nothing_half_written(tmp_path, monkeypatch):
    def fails(out, n, seed):
        (out / "images" / "0.jpg").write_bytes(b"some")
        raise OSError("the disk is full")

    monkeypatch.setitem(miniatures.KINDS, "mit-states", fails)
    with pytest.raises(OSError, match="the disk is full"):
        miniatures.write_miniature("mit-states", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    app = Typer()
    app.command()(miniatures.main)
    said = CliRunner().invoke(app, ["coco-qa", str(tmp_path / "out")])
    assert said.exit_code == 2
    assert "not empty" in " ".join(said.output.replace("│", "").split())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    said = CliRunner().invoke(app, ["coco-qa", str(tmp_path / "new" / "out"), "--n", "2"])
    assert said.exit_code == 0
    assert len(list((tmp_path / "new" / "out" / "images").iterdir())) == 2
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out"]
    for kind, n, says in [("coco", 1, "no kind of miniature 'coco'"), ("coco-qa", 0, "n must be")]:
        with pytest.raises(ValueError, match=says):
            miniatures.write_miniature(kind, tmp_path / "none", n=n)
