"""Scores by hand, expected failures of methods, and the page that tells them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from hooked_vlm import cli, planted
from hooked_vlm import patching as P
from hooked_vlm.planted import methods, page, scoring
from hooked_vlm.planted.failures import FAILURES

READER = "planted-blip-reader"
DOCS = Path(__file__).parents[1] / "docs"


def roles(name):
    _, card = planted.load(name)
    return {node.role: node.name for node in (*card.nodes, *card.distractors)}


# --- scores


def test_scores_by_hand():
    by = roles("planted-blip-distractors")

    def method(problem):
        found = {site.name: 0.0 for site in problem.sites}
        found |= {by["reader"]: -10.0, by["loud"]: 4.0, by["answerer"]: 3.0, by["eye"]: 0.9}
        return found

    one = planted.score(method, "planted-blip-distractors", n=2)
    # 10, 4 and 3 are at least a tenth of 10; 0.9 is not, and is fourth of all.
    assert (one.precision, one.recall, one.rank, one.n_nodes) == (2 / 3, 2 / 3, 4, 3)
    assert (one.accused, one.missed, one.wrong, one.cost) == (1, ("eye",), ("loud",), 0)
    assert one.fails and np.isnan(one.mass) and one.method == "method"
    text = planted.score(method, "planted-blip-distractors", "text", n=2)
    assert (text.recall, text.rank, text.n_nodes) == (1, 3, 2)  # the eye reads no question

    def eager(problem):
        return method(problem) | {by["eye"]: 99.0}

    text = planted.score(eager, "planted-blip-distractors", "text", n=2)
    assert (text.precision, text.recall, text.rank) == (1, 0.5, 3)  # 10 is a tenth of 99, 4 is not


def test_ties_and_silence():
    def flat(problem):
        return {site.name: 1.0 for site in problem.sites}

    one = planted.score(flat, READER, n=2)
    n = len(planted.load(READER)[0].sites(["*.heads.*.hook_z", "*.hook_mlp_out"]))
    assert (one.rank, one.recall) == (n, 1) and one.precision == 3 / n

    def silent(problem):
        return {site.name: 0.0 for site in problem.sites}

    one = planted.score(silent, READER, n=2)
    assert np.isnan(one.precision) and (one.recall, one.rank) == (0, n)


def test_maps_by_hand():
    n, size = 4, 6
    scenes = planted.scenes(n, 0)

    def map_(problem):
        """A quarter of the mass in the cell; in the last pair all of it in another."""
        made = np.zeros((n, size, size))
        for row, scene in enumerate(scenes):
            x, y = (int(middle // 16) for middle in scene.first.center)
            other = (x + 1) % 3
            if row < n - 1:
                made[row, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 1 / 4
                made[row, 2 * y, 2 * other] = 0.9
                made[row, 2 * y, 2 * ((x + 2) % 3)] = 2.1
            else:
                made[row, 2 * y, 2 * other] = 5
        return made

    one = planted.score(map_, READER, kind="map", n=n)
    assert one.mass == pytest.approx(3 / 4 * 1 / 4) and one.pointing == 0

    def right(problem):
        made = np.full((n, 3, 3), 0.1)
        for row, scene in enumerate(scenes):
            x, y = (int(middle // 16) for middle in scene.first.center)
            made[row, y, x] = 0.2
        return made

    one = planted.score(right, READER, kind="map", n=n)
    assert one.mass == pytest.approx(0.2) and one.pointing == 1 and not one.fails
    assert np.isnan(one.precision) and np.isnan(one.rank)


def test_the_cost_is_what_the_plan_says():
    """The multiplications that a sweep plans, over those of a pass as torch counts them."""
    model, card = planted.load(READER)
    pairs = planted.pairs(1, 0)
    plan = P.plan(model, pairs, list(card.sites))
    one = planted.score("patching, denoise", READER, n=2)
    inputs = model.prepare(pairs[0].images[:1], pairs[0].texts[:1])
    listening = [("*hook_pattern", lambda x, hook: None)]  # attention that torch sees whole
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.run_with_hooks(**inputs, fwd_hooks=listening)
    assert one.cost == pytest.approx(2 * plan.macs / flops.get_total_flops(), abs=0.02)


@pytest.mark.parametrize(
    ("gives", "kind", "says"),
    [
        (lambda p: {}, "ranker", r"lacks \d+ of the sites"),
        (lambda p: {s.name: 1.0 for s in p.sites} | {"x": 1}, "ranker", "knows 1 of the sites, 'x"),
        (lambda p: {s.name: float("nan") for s in p.sites}, "ranker", "gives no number at"),
        (lambda p: {s.name: np.ones(4) for s in p.sites}, "ranker", "no single numbers"),
        (lambda p: [1, 2], "ranker", "gives a list; a ranker gives scores"),
        (
            lambda p: P.activation_patching(
                p.model, p.pairs, p.sites[6], positions="each", progress=False
            ),
            "ranker",
            "a score for each position",
        ),
        (lambda p: [[1], [1, 2]], "map", "gives no array of numbers"),
        (lambda p: np.ones((1, 3, 3)), "map", r"gives \[1, 3, 3\]; a map is \[pair, row, column\]"),
        (lambda p: np.ones((2, 4, 3)), "map", r"gives \[2, 4, 3\].*multiples of 3"),
        (lambda p: np.zeros((2, 3, 3)), "map", "NaN, a negative number, or nothing but zeros"),
        (lambda p: -np.ones((2, 3, 3)), "map", "NaN, a negative number, or nothing but zeros"),
    ],
)
def test_what_gives_something_else_is_refused_by_name(gives, kind, says):
    gives.__name__ = "mine"
    with pytest.raises(ValueError, match=f"'mine' on 'planted-blip-reader'.*{says}"):
        planted.score(gives, READER, kind=kind, n=2)


def test_a_result_with_a_missing_pair_is_refused():
    def partly(problem):
        found = P.activation_patching(problem.model, problem.pairs, problem.sites, progress=False)
        found.data[0, 0] = float("nan")
        return found

    with pytest.raises(
        ValueError, match="'partly' on 'planted-blip-reader' gives no number at 1 s"
    ):
        planted.score(partly, READER, n=2)


def test_a_method_joins_by_one_registration(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(planted.METHODS))
    monkeypatch.setattr(scoring, "METHODS", methods.METHODS)

    @planted.register("mine")
    def mine(problem):
        """What I do."""
        return P.activation_patching(problem.model, problem.pairs, problem.sites, progress=False)

    frame = planted.validate(["mine"], [READER], ["text"], n=2, progress=False)
    assert frame[["method", "model", "corrupt"]].values.tolist() == [["mine", READER, "text"]]
    assert methods.METHODS["mine"].about == "What I do."
    with pytest.raises(ValueError, match="there is a method 'mine'; choose another name"):
        planted.register("mine")
    with pytest.raises(ValueError, match="kind is 'ranker' or 'map', not 'edges'"):
        planted.register("other", "edges")
    with pytest.raises(KeyError, match="no method 'theirs'; known are patching, denoise"):
        planted.validate(["theirs"], [READER], progress=False)
    with pytest.raises(ValueError, match=r"give names in a list: \['mine'\]"):
        planted.validate("mine", [READER], progress=False)
    with pytest.raises(ValueError, match="kind is 'ranker' or 'map', not 'edges'"):
        planted.score(mine, READER, kind="edges")
    with pytest.raises(ValueError, match="n is at least 1 pair, not 0"):
        planted.score("mine", READER, n=0)
    with pytest.raises(KeyError, match="no planted model 'x'"):
        planted.validate(["mine"], ["x"], progress=False)


# --- what methods find, and what they do not


@pytest.mark.parametrize(
    "name",
    [n for n in planted.names() if n.endswith(("reader", "two-steps", "distractors", "relay"))],
)
@pytest.mark.parametrize("corrupt", ["image", "text"])
def test_denoising_finds_the_circuit_and_nothing_else(name, corrupt):
    one = planted.score("patching, denoise", name, corrupt)
    assert (one.recall, one.precision, one.accused) == (1, 1, 0)
    assert one.rank == one.n_nodes


@pytest.mark.parametrize(
    ("method", "name", "missed", "wrong"),
    [
        ("zero ablation", "planted-blip-backup", {"primary", "backup"}, set()),
        ("patching, denoise", "planted-blip-backup", {"backup"}, set()),
        ("resample ablation", "planted-blip-backup", {"backup"}, set()),
        ("greedy circuit", "planted-blip-cancelling", {"suppressor"}, set()),
        ("attribution patching", "planted-blip-two-steps", {"eye", "finder"}, set()),
        ("zero ablation", "planted-blip-cancelling", {"suppressor"}, set()),
        ("mean ablation", "planted-blip-backup", {"backup"}, set()),
        ("attribution patching", "planted-llava-relay", {"eye"}, set()),
    ],
)
def test_failures_are_the_expected_ones(method, name, missed, wrong):
    one = planted.score(method, name)
    assert set(one.missed) == missed and set(one.wrong) == wrong and one.fails


def test_attention_is_fooled_by_the_outlier():
    """It is as sharp as the reader, and the mean of all heads does not look at the shape."""
    by = roles("planted-blip-outlier")
    model, card = planted.load("planted-blip-outlier")
    problem = planted.Problem(
        model, planted.pairs(8, 0), planted.pairs(8, 1), list(model.sites(list(card.sites)))
    )
    scores = planted.METHODS["raw attention"].run(problem)
    assert scores[by["outlier"]] > 0.89 and by["outlier"] in methods.named(scores)
    fooled = planted.score("mean attention", "planted-blip-outlier")
    assert fooled.pointing < 1 and fooled.fails


# --- the page


def test_the_page_tells_every_failure_and_nothing_else():
    """Each failing row of the stored table has a paragraph, each paragraph a failing row."""
    frame = page.load(DOCS / "validation.parquet")
    for failure in FAILURES:
        assert failure.covers(frame).any(), failure.why
    for row in frame.to_dict("records"):
        why = [one for one in FAILURES if row["method"] in one.methods]
        found = {one if "." not in one else "" for one in (*row["missed"], *row["wrong"])}
        if row["kind"] == "map" and row["pointing"] < 1:
            found = {""}
        assert found <= {one for failure in why for one in failure.what}, row
        assert bool(found) == scoring.Score(**row).fails
    assert set(frame["method"]) == set(planted.METHODS)
    assert set(frame["model"]) == set(planted.names())


def test_the_command_writes_the_table(tmp_path):
    out, at = tmp_path / "new" / "t.parquet", tmp_path / "page.md"
    at.write_text(f"# Mine\n{page.BEGIN}\nold\n{page.END}\nbehind\n")
    arguments = ["--method", "zero ablation", "--method", "mean attention", "--model", READER]
    arguments += ["--pairs", "2", "--out", str(out), "--page", str(at)]
    result = CliRunner().invoke(cli.app, ["validate", *arguments])
    assert result.exit_code == 0, result.output
    frame = pd.read_parquet(out)
    assert len(frame) == 4 and list(frame["corrupt"].unique()) == ["image", "text"]
    text = at.read_text()
    assert text.startswith("# Mine\n") and text.endswith("behind\n") and "old" not in text
    assert "## `planted-blip-reader`, image corrupted" in text and "## Maps" in text
    assert [file.name for file in out.parent.iterdir()] == ["t.parquet"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "magic"], "no method 'magic'; known are"),
        (["--model", "toy-blip-vqa"], "no planted model 'toy-blip-vqa'; known are"),
        (["--page", "nowhere.md"], "nowhere.md"),
        (["--page", "plain.md"], "'plain.md' lacks the marks"),
        (["--out", "."], "--out '.' is a folder; name a file"),
    ],
)
def test_wrong_arguments(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.md").write_text("nothing")
    result = CliRunner().invoke(cli.app, ["validate", "--pairs", "2", *arguments])
    assert result.exit_code == 2 and says in " ".join(result.output.split())
    assert [file.name for file in tmp_path.iterdir()] == ["plain.md"]


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_methods_give_today(tmp_path):
    """By the command, in a process of its own, where types are not checked at run time."""
    out = tmp_path / "today.parquet"
    command = [sys.executable, "-m", "hooked_vlm.cli", "validate", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    stored = page.markdown(page.load(DOCS / "validation.parquet"))
    assert page.markdown(page.load(out)) == stored
    assert stored in (DOCS / "validation.md").read_text(encoding="utf-8")
