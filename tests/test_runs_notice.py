"""NOTICE and causal tracing over data sets: folders and reports."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hooked_vlm import HookedVLM, data, runs
from hooked_vlm.data import Question
from hooked_vlm.methods.notice import Settings, modality
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
    assert set(table["item"]) == {f"shapes/{modality(p)}/{p.name}" for p in pairs}
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
        "Answered correctly of shapes: 100.0% of 8",
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
    assert "1 of 3 pairs" in page and "Answered correctly: 50.0% of 2 that ran" in page


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
