"""`hooked-vlm notice` and `hooked-vlm trace`: what they read, refuse, store and say."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from data_files import write
from test_cli import run as command

from hooked_vlm import HookedVLM, cli_runs, data, planted, runs
from hooked_vlm.data import shapes
from hooked_vlm.data.miniatures import write_miniature
from hooked_vlm.methods import causal_tracing
from hooked_vlm.methods.notice import Notice, modality
from hooked_vlm.runs import asking, notice

FEW = ("--kinds", "cross_attn_heads", "--positions", "answer")
COLORS = {"color": sorted(shapes.COLORS)}


@pytest.fixture(scope="module")
def toy():
    return HookedVLM.from_pretrained("toy-blip-vqa")


OPENED = functools.cache(cli_runs.open_model)


@pytest.fixture(autouse=True)
def opened_once(monkeypatch):
    """Each model is read once for all tests."""
    monkeypatch.setattr(cli_runs, "open_model", OPENED)


@pytest.fixture
def no_report(monkeypatch):
    """Its pictures take most of a small run."""
    monkeypatch.setattr(notice, "report", lambda told: "<html>")


def refused(says, *arguments):
    result = command(*arguments)
    assert result.exit_code == 2 and says in " ".join(result.stderr.split()), result.output
    assert len([line for line in result.stderr.splitlines() if "error: " in line]) == 1
    assert "Traceback" not in result.output


def pairs_file(folder, swapped, name="pairs.csv"):
    """A CSV of four pairs, of which the first so many have answer and foil swapped."""
    rows = []
    for number, pair in enumerate(data.shapes_pairs(4, 0, "vqa", "color")):
        pair.image.save(folder / f"{number}.png")
        pair.corrupt_image.save(folder / f"{number}-other.png")
        answer, foil = (pair.answer, pair.foil)[:: -1 if number < swapped else 1]
        images = {"image": f"{number}.png", "corrupt_image": f"{number}-other.png"}
        rows.append({**images, "text": pair.text, "answer": answer, "foil": foil})
    return write(folder / name, rows)


# --- what is read


@pytest.mark.parametrize(
    ("kind", "n_image", "least_text"),
    [("svo-probes", 24, 24), ("mit-states", 9, 9), ("facial-expressions", 12, 6)],
)
def test_pairs_of_the_data_sets(kind, n_image, least_text, toy, tmp_path):
    pairs, masks, reports = asking.pairs_of(
        toy,
        write_miniature(kind, tmp_path / "set", n=12),
        kind,
        ["image", "text"],
        n=None,
        seed=0,
        on_bad="drop",
        options={"adjectives": COLORS} if kind == "mit-states" else None,
    )
    counts = pd.Series([modality(pair) for pair in pairs]).value_counts()
    assert counts["image"] == n_image and least_text <= counts["text"] <= n_image
    assert {name: one.kept for name, one in reports.items()} == {
        kind: n_image,
        "image corrupt": n_image,
        "text corrupt": counts["text"],
    }
    assert not masks
    for pair in pairs:
        assert pair.answer in pair.text and pair.foil in pair.text
        if modality(pair) == "text":  # both options are replaced, and nothing else moves
            clean, corrupt = map(toy.to_str_tokens, pair.texts)
            changed = [one for one, other in zip(clean, corrupt, strict=True) if one != other]
            assert not {pair.answer, pair.foil} & set(pair.corrupt_text.rstrip("?").split())
            assert 2 <= len(changed) < len(clean)


def test_a_sample_of_coco_qa(tmp_path):
    folder = write_miniature("coco-qa", tmp_path / "set", n=6)  # two questions each, of five words
    given = {"images": folder / "images", "n_words": 5, "suffix": "count", "on_bad": "raise"}
    csv = folder / "color_coco_qa.csv"
    drawn = {}
    for seed in (0, 0, 1):
        asked, report = asking.coco_questions(csv, n=4, seed=seed, **given)
        assert (report.read, report.kept, report.dropped) == (12, 4, {"not drawn": 8})
        lines = [int(one.name.removeprefix("line ")) for one in asked]
        assert len(set(lines)) == 4 and lines == sorted(lines)
        assert drawn.setdefault(seed, lines) == lines
    assert drawn[0] != drawn[1]
    everything, _ = asking.coco_questions(csv, n=None, seed=0, **given)
    assert asking.coco_questions(csv, n=12, seed=5, **given)[0] == everything
    options = ("--data", csv, "--images", folder / "images", "--out", tmp_path / "out")
    refused(
        "13 questions are to be drawn, and there are 12",
        *("trace", *options, "--words", 5, "--n", 13),
    )
    refused("12 dropped, not 7 words", "trace", *options)
    done = command("trace", *options, "--words", 5, "--n", 2, "--draws", 1, "--least", 0)
    assert done.exit_code == 0, done.output
    assert "kept 2 of 12 rows" in done.stdout
    stored = runs.load(tmp_path / "out")
    assert stored.table["example"].nunique() == 2
    assert stored.config["reports"]["coco-qa"]["dropped"]["not drawn"]["count"] == 10
    assert stored.config["data"] == {
        "kind": "coco-qa",
        "path": str(csv),
        "images": str(folder / "images"),
        "n": 2,
        "seed": 0,
        "n_words": 5,
        "suffix": "count",
    }


def test_the_readers_options(tmp_path, no_report):
    folder = write_miniature("svo-probes", tmp_path / "svo", n=4)
    images = folder / "images"
    (images / "0-pos.jpg").rename(images / "elsewhere.jpg")
    urls = (folder / "image_urls.txt").read_text().split()
    files = {url: url.rpartition("/")[2] for url in urls} | {urls[0]: "elsewhere.jpg"}
    (tmp_path / "files.json").write_text(json.dumps(files))
    svo = ("notice", "--data", folder, "--data-kind", "svo-probes", "--corrupt", "image", *FEW)
    refused("0-pos.jpg", *svo, "--out", tmp_path / "o")
    prompts = write(tmp_path / "prompts.csv", [{"prompt_before": "a", "prompt_after": "b"}])
    svo = (*svo, "--files", tmp_path / "files.json")
    refused("the prompts have no 'is ", *svo, "--prompts", prompts, "--out", tmp_path / "o")
    done = command(*svo, "--order", "drawn", "--keep-all", "--out", tmp_path / "svo-out")
    assert done.exit_code == 0, done.output
    stored = runs.load(tmp_path / "svo-out")
    positive = stored.table[stored.table["pair"].str.endswith("positive")]
    assert set(positive["answer_first"]) == {True, False}  # as published they were all True
    assert stored.config["data"]["order"] == "drawn"
    assert stored.config["data"]["files"] == str(tmp_path / "files.json")
    faces = write_miniature("facial-expressions", tmp_path / "faces", n=3)
    given = ("--data", faces, "--data-kind", "facial-expressions", "--split", "validation")
    done = command(
        *(
            "notice",
            *given,
            *FEW,
            "--corrupt",
            "image",
            "--keep-all",
            "--out",
            tmp_path / "faces-out",
        )
    )
    assert done.exit_code == 0, done.output
    assert runs.load(tmp_path / "faces-out").table["pair"].str.startswith("validation/").all()


def test_what_a_run_was_of_is_stored(tmp_path, no_report):
    folder = write_miniature("mit-states", tmp_path / "mit", n=12)
    lists = tmp_path / "adjectives.json"
    lists.write_text(json.dumps(COLORS))
    given = ("notice", "--data", folder, "--data-kind", "mit-states", "--adjectives", lists, *FEW)
    out = tmp_path / "out"
    done = command(*given, "--n", 4, "--seed", 3, "--corrupt", "text", "--keep-all", "--out", out)
    assert done.exit_code == 0, done.output
    stored = runs.load(out)
    assert stored.config["model"] == "toy-blip-vqa"
    assert stored.config["data"] == {
        "kind": "mit-states",
        "path": str(folder),
        "n": 4,
        "corrupt": ["text"],
        "seed": 3,
        "short_answer": False,
        "adjectives": COLORS,
    }
    reports = stored.config["reports"]
    assert reports["mit-states"]["read"] == 12 and reports["mit-states"]["kept"] == 4
    assert reports["text corrupt"] == {"read": 4, "kept": 4, "dropped": {}}
    assert stored.table["pair"].nunique() == 4


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["notice", "--data", "a.csv", "--n", "4"], "--n makes pairs, and --data is a file"),
        (["notice", "--data", "a.csv", "--corrupt", "image"], "--corrupt makes pairs"),
        (["notice", "--data", "a.csv", "--short-answer"], "--short-answer makes pairs"),
        (
            ["notice", "--data", "a.csv", "--adjectives", "a.json"],
            "--adjectives is read with --data-kind mit-states alone, not with pairs",
        ),
        (["notice", "--adjectives", "a.json"], "mit-states alone, not with shapes"),
        (["notice", "--split", "train"], "--split is read with --data-kind facial-expressions"),
        (["notice", "--data-kind", "mit-states"], "--data-kind tells what --data is: give --data"),
        (
            ["notice", "--data", "a", "--data-kind", "mit-states", "--order", "drawn"],
            "--order is read with --data-kind svo-probes alone, not with mit-states",
        ),
        (["trace", "--suffix", "count"], "--suffix is about a file of questions: give --data"),
        (["trace", "--words", "0"], "--words is about a file of questions: give --data"),
        (["trace", "--images", "a"], "--images is about a file of questions: give --data"),
        (["trace", "--drop"], "--drop is about a file of questions: give --data"),
        (["trace", "--data", "a.csv"], "--images is missing"),
        (["trace", "--data", "a.csv", "--images", "a", "--text", "b"], "--text is no part of"),
        (["trace", "--image", "a.png"], "--text is missing: what is asked"),
        (["trace", "--text", "a"], "--text is about an image: give --image"),
        (["trace", "--image", "a.png", "--text", "a", "--n", "2"], "--n draws questions"),
        (["trace", "--noise", "scale", "--draws", "2"], "--draws is of noise that is drawn"),
        (["trace", "--noise", "scale", "--std", "2"], "'scale' noise takes factor, no std"),
        (["trace", "--window", "2", "--n", "1"], "it is 1, 3, 5"),
        (["trace", "--model", "toy-clip"], "a CLIP has none"),
        (["trace", "--model", "toy-blip-itm", "--n", "1", "--answer", "red"], "logits that hold 2"),
        (["trace", "--n", "1", "--positions", "verb"], "verb"),
        (
            ["notice", "--model", "toy-llava", "--kinds", "cross_attn"],
            "no kind 'cross_attn'; it has",
        ),
        (["notice", "--model", "toy-blip-itm"], "'itm'"),
        (["notice", "--short-answer"], "short_answer is a request to task 'llava'"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(says, *arguments)
    assert not list(tmp_path.rglob("*.json"))  # nothing was done: the folder is free


@pytest.mark.parametrize(
    "said", ["[1]", '{"color": "red"}', '{"color": ["red", 1]}', '{"color": []}', "{}", "{"]
)
def test_adjectives_are_lists_of_words(said, tmp_path):
    file = tmp_path / "[b]lists.json"
    file.write_text(said)
    says = f"{str(file)!r} is no JSON" + (":" if said == "{" else " object of lists of adjectives")
    given = ("--data", tmp_path, "--data-kind", "mit-states", "--adjectives", file)
    refused(says, "notice", *given, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_bad_rows_stop_the_command_unless_they_are_dropped(tmp_path):
    folder = write_miniature("svo-probes", tmp_path / "set", n=1)  # too few words to replace any
    given = ("notice", "--data", folder, "--data-kind", "svo-probes", "--corrupt", "text")
    out = tmp_path / "out"
    refused("no two words that fit", *given, "--out", out)
    refused("--drop leaves such rows out", *given, "--out", out)
    done = command(*given, "--drop", "--out", out)
    assert done.exit_code == 1, done.output
    assert "2 dropped, no words for the options" in done.stdout
    assert done.stderr == "error: no pair is left; no corrupt input could be made\n"
    assert not out.exists()


# --- what is done, and said


def test_the_commands(tmp_path, monkeypatch):
    out = tmp_path / "n"
    given = ("notice", *FEW, "--n", 4, "--corrupt", "text", "--corrupt", "image", "--out", out)
    done = command(*given, "--corrupt", "image")
    assert done.exit_code == 0, done.output
    assert "shapes: kept 4 of 4 rows" in done.stdout and "report.html" in done.stdout
    assert set(runs.load(out).table["modality"]) == {"image", "text"}
    assert "Universal heads" in (out / "report.html").read_text()
    monkeypatch.setattr(notice, "report", lambda told: "<html>")
    refused("another configuration", *given, "--seed", 1)
    again = command(*given)
    assert again.exit_code == 0 and again.stdout == done.stdout


@pytest.mark.parametrize("name", ["toy-blip-itm", "toy-albef", "toy-blip-captioning", "toy-llava"])
def test_every_toy_that_reads_an_image_is_traced(name, tmp_path):
    out = tmp_path / "out"
    given = ("trace", "--model", name, "--n", 2, "--seed", 4, "--draws", 1, "--out", out)
    done = command(*given, "--positions", "first", "--positions", -1, "--least", 0)
    assert done.exit_code == 0, done.output
    assert "2 traced\n" in done.stdout
    table, model = runs.load(out).table, HookedVLM.from_pretrained(name)
    assert set(table["position"]) == {"first", "-1"}
    pairs = data.shapes_pairs(2, 4, model.task, "color")
    for pair in pairs:
        logits = model(**model.prepare_prompt([pair.image], pair.text))
        likely = logits.reshape(-1, logits.shape[-1])[-1].softmax(-1).max().item()
        np.testing.assert_allclose(
            table.loc[table["example"] == pair.name, "clean"], likely, atol=1e-5
        )


def test_the_probability_of_a_word_is_traced(toy, tmp_path):
    (pair,) = data.shapes_pairs(1, 0, "vqa", "color")
    pair.image.save(tmp_path / "a.png")
    given = ("trace", "--image", tmp_path / "a.png", "--text", pair.text, "--draws", 1)
    done = command(*given, "--answer", pair.foil, "--least", 0, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    logits = toy(**toy.prepare_prompt([pair.image], pair.text))[0, -1]
    expected = logits.softmax(-1)[toy.to_single_token(pair.foil)].item()
    stored = runs.load(tmp_path / "out")
    np.testing.assert_allclose(stored.table["clean"], expected, atol=1e-6)
    assert set(stored.table["answer"]) == {pair.foil} and expected < 0.5
    assert stored.config["data"] == {
        "kind": "image",
        "path": str(tmp_path / "a.png"),
        "text": pair.text,
    }


def test_a_caption_from_nothing_is_traced(tmp_path):
    (pair,) = data.shapes_pairs(1, 0, "captioning", "color")
    pair.image.save(tmp_path / "a.png")
    given = ("trace", "--model", "toy-blip-captioning", "--image", tmp_path / "a.png")
    done = command(*given, "--draws", 1, "--least", 0, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert set(runs.load(tmp_path / "out").table["answer"]) == {"a"}  # how all captions begin


def test_what_was_left_out_is_told(tmp_path, no_report):
    csv = pairs_file(tmp_path, swapped=3)
    done = command("notice", "--data", csv, *FEW[:2], "--out", tmp_path / "some")
    assert done.exit_code == 0, done.output
    assert "\n1 patched; excluded: 3 not answered correctly\n" in done.stdout
    csv = pairs_file(tmp_path, swapped=4, name="none.csv")
    none = command("notice", "--data", csv, *FEW[:2], "--out", tmp_path / "none")
    assert none.exit_code == 1
    assert none.stdout.endswith("\n0 patched; excluded: 4 not answered correctly\n")
    assert none.stderr.splitlines()[-1].startswith("error: no pair is left; --keep-all")
    given = ("trace", "--n", 2, "--draws", 1, "--least", 2, "--out", tmp_path / "trace")
    none = command(*given)
    assert none.exit_code == 1
    assert none.stdout == "0 traced; excluded: 2 its answer does not depend on the image\n"
    assert none.stderr.splitlines()[-1].startswith("error: no question is left; a lower --least")
    assert command(*given).exit_code == 1  # nor when it is asked again


def test_brackets_in_a_path_are_no_markup(tmp_path, monkeypatch):
    folder = tmp_path / "x[" / "y]"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for out in ("x[/y]/o[red]", "o[red]:smile:"):
        done = command("trace", "--n", 1, "--draws", 1, "--least", 0, "--out", out)
        assert done.exit_code == 0, done.output
        assert done.stdout.endswith(f"wrote {out}/results.parquet {out}/report.html\n")
    table = pd.DataFrame({"a": [1]})
    monkeypatch.setattr(planted, "validate", lambda *args, **kwargs: table)
    monkeypatch.setattr("hooked_vlm.planted.page.table", lambda frame: "")
    done = command("validate", "--out", "x[/y]/o[red].parquet")
    assert done.exit_code == 0, done.output
    assert "wrote x[/y]/o[red].parquet\n" in done.stdout
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "o[red].parquet"), table)


@pytest.mark.parametrize("name", ["notice", "trace"])
@pytest.mark.parametrize("when", ["opening", "running"])
def test_ctrl_c_is_one_line(name, when, tmp_path, monkeypatch):
    calls = []

    def pressed(function):
        def stops(*args, **kwargs):
            calls.append(name)
            if len(calls) > (when == "running"):
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return stops

    if when == "opening":
        monkeypatch.setattr(cli_runs, "open_model", pressed(cli_runs.open_model))
    else:
        monkeypatch.setattr(Notice, "measure", pressed(Notice.measure))
        monkeypatch.setattr(causal_tracing, "trace", pressed(causal_tracing.trace))
    out = tmp_path / "out"
    given = (name, "--n", 3, "--out", out)
    done = command(*given)
    assert done.exit_code == 130
    lines = done.stderr.replace("\r", "\n").splitlines()
    told = [line for line in lines if line and "item/s" not in line]
    assert told == ["stopped; the same command goes on from here"]
    if when == "running":
        assert len(runs.load(out).table) > 0 and not runs.load(out).complete


# --- killed


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [sys.executable, "-m", "hooked_vlm.cli", "notice", "--n", "120"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out):
        with (tmp_path / "log").open("a") as log:
            return subprocess.Popen(
                [*arguments, "--out", str(out)], env=env, stdout=log, stderr=log
            )

    def holds(process):  # whether it is past what comes before the run
        try:
            return json.loads((killed / ".holder.json").read_text())["pid"] == process.pid
        except (OSError, ValueError):
            return False

    def parts():
        return len(list(killed.glob("parts/*.parquet")))

    assert start(whole).wait() == 0
    rng = random.Random(0)
    in_run, with_parts = 0, 0
    for number in range(6):
        process, before = start(killed), parts()
        while process.poll() is None and not (
            holds(process) and (number % 2 == 0 or parts() > before)  # at its begin, or further on
        ):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        stopped = process.wait() == -signal.SIGKILL and not runs.load(killed).complete
        in_run += stopped
        with_parts += stopped and parts() > before
    assert in_run >= 3 and with_parts >= 1
    assert start(killed).wait() == 0
    ours, theirs = (runs.load(one).table for one in (killed, whole))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert json.loads((killed / "excluded.json").read_text()) == json.loads(
        (whole / "excluded.json").read_text()
    )
