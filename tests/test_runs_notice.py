"""NOTICE and causal tracing over data sets: folders, reports, commands, and stops."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_cli import run as command

from hooked_vlm import HookedVLM, data, runs
from hooked_vlm.data import Question, shapes
from hooked_vlm.data.miniatures import write_miniature
from hooked_vlm.methods.notice import Settings
from hooked_vlm.runs import notice, tracing

HEADS = Settings(kinds=("mlp", "cross_attn_heads"), positions=("answer",))


@pytest.fixture(scope="module")
def toy():
    return HookedVLM.from_pretrained("toy-blip-vqa")


@pytest.fixture(scope="module")
def asked(toy):
    choices = data.shapes_choices(4, 0, "color")
    pairs, _ = data.semantic_image_pairs(choices)
    more, _ = data.other_questions(choices, toy.to_str_tokens)
    return pairs + more, {one.name: one.mask for one in choices}


def test_a_run_is_its_table_and_a_report(toy, asked, tmp_path):
    pairs, masks = asked
    out = tmp_path / "run"
    table = notice.run(
        toy, {"shapes": pairs}, out, settings=HEADS, masks=masks, seed=3, progress=False
    )
    assert set(table["item"]) == {f"shapes/{notice.modality(p)}/{p.name}" for p in pairs}
    assert len(table) == len(pairs) * 3 * (1 + 4)  # layers by an MLP and four heads
    assert (table["role"] == "answer").all() and (table["task"] == "shapes").all()
    stored = runs.load(out)
    pd.testing.assert_frame_equal(stored.table, table)
    assert stored.complete and stored.provenance["seed"] == 3
    assert stored.provenance["weights"] == toy.weights_hash()
    assert stored.config["settings"]["kinds"] == ["mlp", "cross_attn_heads"]
    page = (out / "report.html").read_text()
    for said in (
        "8 of 8 pairs",
        "Answered correctly: 100.0%",
        "Universal heads",
        "What heads look",
    ):
        assert said in page
    assert page.count("<img") >= 6
    with pytest.raises(ValueError, match=r"another configuration: .*pairs\.shapes was"):
        notice.run(toy, {"shapes": pairs[:3]}, out, settings=HEADS, progress=False)
    with pytest.raises(ValueError, match=r"settings\.direction was \"denoise\", is \"noise\""):
        other = replace(HEADS, direction="noise")
        notice.run(toy, {"shapes": pairs}, out, settings=other, progress=False)


def test_bad_pairs_stop_a_run_or_are_excluded(toy, asked, tmp_path):
    pairs, _ = asked
    bad = replace(pairs[0], name="bad", image="nowhere.png")
    wrong = replace(pairs[1], name="wrong", answer=pairs[1].foil, foil=pairs[1].answer)
    given = [pairs[0], bad, wrong]
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        notice.run(toy, given, tmp_path / "a", settings=HEADS, progress=False)
    assert not runs.load(tmp_path / "a").complete
    notice.run(toy, given, tmp_path / "b", settings=HEADS, on_bad="drop", progress=False)
    told = runs.load(tmp_path / "b").excluded.set_index("item")["reason"]
    assert told.to_dict() == {
        "/image/bad": "image cannot be read",
        "/image/wrong": "not answered correctly",
    }
    page = (tmp_path / "b" / "report.html").read_text()
    assert "1 of 3 pairs" in page and "Answered correctly: 66.7%" in page


@pytest.mark.parametrize("kind", ["svo-probes", "mit-states", "facial-expressions"])
def test_pairs_of_the_data_sets(kind, toy, tmp_path):
    options = {"adjectives": {"color": sorted(shapes.COLORS)}} if kind == "mit-states" else None
    pairs, masks, said = notice.pairs_of(
        toy,
        write_miniature(kind, tmp_path / "set", n=12),
        kind,
        ["image", "text"],
        n=None,
        seed=0,
        on_bad="drop",
        options=options,
    )
    assert {notice.modality(pair) for pair in pairs} >= {"image"} and not masks
    assert said.startswith(f"{kind}: kept") and "text corrupted: kept" in said
    assert all(pair.answer and pair.foil for pair in pairs)


def test_tracing_runs_and_leaves_out_what_does_not_depend_on_the_image(toy, tmp_path):
    choices = data.shapes_choices(3, 0, "color")
    questions = [Question(one.image, one.text, one.answer, one.name) for one in choices]
    table = tracing.run(toy, questions, tmp_path / "run", draws=2, seed=1, progress=False)
    assert set(table["example"]) == {one.name for one in choices}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "3 of 3 questions" in page and page.count("<img") == 2
    shown = table[table["stack"] == "decoder"]
    assert np.allclose(tracing.restored(shown).sel(layer=2), 1)  # the last layer is the clean run
    tracing.run(toy, questions, tmp_path / "none", least=2.0, progress=False)
    reasons = runs.load(tmp_path / "none").excluded["reason"]
    assert list(reasons) == ["its answer does not depend on the image"] * 3
    assert not (tmp_path / "none" / "report.html").exists()


def test_the_commands(tmp_path):
    out = tmp_path / "n"
    options = (
        "--kinds",
        "cross_attn_heads",
        "--positions",
        "answer",
        "--n",
        "6",
        "--out",
        str(out),
    )
    done = command("notice", *options)
    assert done.exit_code == 0, done.stderr
    assert "kept 6 of 6 rows" in done.stdout and "report.html" in done.stdout
    assert set(runs.load(out).table["modality"]) == {"image", "text"}
    for arguments, says in {
        ("notice", "--model", "toy-llava", "--kinds", "cross_attn"): "no kind 'cross_attn'; it has",
        ("notice", "--model", "toy-blip-itm", "--out", str(tmp_path / "x")): "'itm'",
        ("notice", *options[:-1], str(out), "--seed", "1"): "another configuration",
        ("trace", "--image", "a.png"): "--image and --text are given together",
        ("trace", "--data", "a.csv"): "--data and --images are given together",
        ("trace", "--model", "toy-clip", "--out", str(tmp_path / "x")): "'clip'",
        ("trace", "--window", "2", "--n", "1", "--out", str(tmp_path / "y")): "window",
    }.items():
        refused = command(*arguments)
        assert refused.exit_code == 2 and says in " ".join(refused.stderr.split()), refused.stderr
        assert "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("[xy]/config.json"))  # nothing was done: free for another try
    traced = command("trace", "--n", "2", "--draws", "1", "--out", str(tmp_path / "t"))
    assert traced.exit_code == 0, traced.stderr
    assert runs.load(tmp_path / "t").complete


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [sys.executable, "-m", "hooked_vlm.cli", "notice", "--n", "30"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out):
        return subprocess.Popen(
            [*arguments, "--out", str(out)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    began = time.monotonic()
    assert start(whole).wait() == 0
    took = time.monotonic() - began
    rng = random.Random(0)
    for _ in range(6):
        process = start(killed)
        time.sleep(rng.uniform(0.3, 1.0) * took)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(killed).wait() == 0
    ours, theirs = (runs.load(one).table for one in (killed, whole))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert json.loads((killed / "excluded.json").read_text()) == json.loads(
        (whole / "excluded.json").read_text()
    )
