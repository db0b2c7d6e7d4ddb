"""Runs over data sets: their tables, items and folders; `test_runs_stopped` stops them."""

import json
import shutil
import subprocess
import sys
import threading

import pandas as pd
import pytest
from run_folders import CONFIG, DONE, QUIET, Failing, go, key, lists, names, rows, truth
from zoo import BLIP, built

from hooked_vlm import runs

# --- the table


@pytest.mark.parametrize("options", [{"part_items": 1}, {"part_items": 4}, {"part_seconds": 0.0}])
def test_the_table_is_that_of_the_items_in_order(tmp_path, options):
    table = go(tmp_path / "run", **options)
    assert lists(table) == truth(6)
    assert table["count"].dtype == float and table["layer"].dtype == int
    assert names(tmp_path / "run") == DONE
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "run" / "results.parquet"), table)
    found = runs.load(tmp_path / "run")
    pd.testing.assert_frame_equal(found.table, table)
    assert found.complete and found.config == CONFIG | {"seeds": [1, 2]}
    assert found.provenance == {} and len(found.excluded) == 0


def test_items_may_have_any_number_of_rows_of_anything(tmp_path):
    frames = [
        pd.DataFrame({"found": [()], "kind": pd.Categorical(["a"]), "sure": [True], "n": [None]}),
        pd.DataFrame({"found": [], "kind": [], "sure": [], "n": []}, dtype=object),
        pd.DataFrame(
            {"n": [2, 3], "found": [["x", "y"], ["z"]], "kind": ["b", None], "sure": None}
        ),
    ]
    frames[2].index = [7, 5]  # as after sorting: says nothing
    table = go(tmp_path, 3, lambda i, _: frames[i])
    assert table["item"].tolist() == ["item 0", "item 2", "item 2"]
    assert [list(one) for one in table["found"]] == [[], ["x", "y"], ["z"]]
    assert lists(table[["kind"]])["kind"] == ["a", "b", None]
    assert lists(table[["sure"]])["sure"] == [True, None, None]
    assert table["n"].isna().tolist() == [True, False, False] and table["n"].sum() == 5
    assert table.columns.tolist() == ["item", "found", "kind", "sure", "n"]


def test_rows_may_hold_the_key_themselves(tmp_path):
    table = go(tmp_path, 2, lambda i, _: pd.DataFrame({"n": [i, i], "pair": key(i)}), name="pair")
    assert table.to_dict("list") == {"pair": ["item 0"] * 2 + ["item 1"] * 2, "n": [0, 0, 1, 1]}
    found = runs.load(tmp_path).excluded
    assert found.columns.tolist() == ["pair", "reason"]


def test_the_import_brings_no_torch():
    code = "import sys; from hooked_vlm import runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_goes_on_with_more_items_and_in_another_order(tmp_path):
    work = Failing(None, None)
    go(tmp_path, 3, work=work)
    assert lists(go(tmp_path, 6, work=work)) == truth(6)
    assert work.called == [0, 1, 2, 3, 4, 5]
    with runs.open_run(tmp_path, config=CONFIG) as run:
        table = run.go([5, 0, 4, 1, 3, 2, 6], work, key=key, **QUIET)
    assert work.called == [0, 1, 2, 3, 4, 5, 6]
    assert table["layer"].tolist() == [0, 1] * 7
    assert table["effect"][::2].tolist() == [x / 3 for x in (5, 0, 4, 1, 3, 2, 6)]
    pd.testing.assert_frame_equal(runs.load(tmp_path).table, table)


def test_other_items_are_refused(tmp_path):
    go(tmp_path, 6)
    before = (tmp_path / "results.parquet").read_bytes()
    told = r"covers 4 items that are not among the 2 given: 'item 2', 'item 3', 'item 4', …; give"
    with pytest.raises(ValueError, match=told):
        go(tmp_path, 2)
    with pytest.raises(ValueError, match=r"keys in a column 'item', not 'pair'; give name='item'"):
        go(tmp_path, name="pair")
    assert (tmp_path / "results.parquet").read_bytes() == before


# --- folders


def test_another_configuration_is_refused_key_by_key(tmp_path):
    go(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    other = {"data": {"name": "svo", "n": 6}, "seeds": [1, 2, 3], "sites": None}
    with pytest.raises(ValueError) as raised:
        runs.open_run(tmp_path, config=other)
    assert str(raised.value) == (
        f"{str(tmp_path)!r} holds a run of another configuration: "
        'data.name was "shapes", is "svo"; seeds was [1, 2], is [1, 2, 3]; '
        'sites was absent, is null; method was "patch", is absent. '
        "To go on with it give what it was begun with; else name another folder"
    )
    with pytest.raises(ValueError, match=r"data\.n was 6, is 6\.0"):
        runs.open_run(tmp_path, config=CONFIG | {"data": {"name": "shapes", "n": 6.0}})
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before
    runs.open_run(tmp_path, config=CONFIG).close()


def test_other_weights_are_refused_and_other_versions_noted(tmp_path):
    def opened(**changed):
        told = {"weights": "a1", "seed": 0, "versions": {"torch": "2.6"}, "git": None} | changed
        return runs.open_run(tmp_path, config={}, provenance=told)

    with opened() as run, pytest.raises(RuntimeError):
        run.go(range(6), Failing(2, RuntimeError()), key=key, **QUIET)
    with pytest.raises(ValueError, match='another provenance: weights was "a1", is "b2"; seed was'):
        opened(weights="b2", seed=1)
    with (
        opened(versions={"torch": "2.7"}) as run,
        pytest.warns(UserWarning, match="goes on with other versions than before"),
        pytest.raises(RuntimeError),
    ):
        run.go(range(6), Failing(4, RuntimeError()), key=key, **QUIET)
    with (
        opened(versions={"torch": "2.7"}, git={"commit": "c0"}) as run,
        pytest.warns(UserWarning, match="goes on with other git than before"),
    ):
        run.go(range(6), rows, key=key, **QUIET)
    with opened(git={"commit": "d1"}) as run:  # nothing is left to do, so nothing is noted
        run.go(range(6), rows, key=key, **QUIET)
    told = runs.load(tmp_path).provenance
    assert told["versions"] == {"torch": "2.6"} and told["git"] is None
    assert told["resumed"] == [{"versions": {"torch": "2.7"}}, {"git": {"commit": "c0"}}]
    with pytest.raises(ValueError, match="has an entry 'resumed', which the run writes"):
        opened(resumed=[])


def test_what_is_no_folder_of_a_run_is_refused(tmp_path):
    letter = tmp_path / "letters" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("dear")
    with pytest.raises(NotADirectoryError, match=r"letter.txt' is a file; name a folder"):
        runs.open_run(letter, config={})
    told = r"holds other files, such as 'letter.txt', and no run; name a new or an empty folder"
    with pytest.raises(ValueError, match=told):
        runs.open_run(letter.parent, config={})
    model = tmp_path / "model"
    model.mkdir()
    for text in ("{", "[]", '{"model_type": "blip"}'):
        (model / "config.json").write_text(text)
        for read in (lambda: runs.open_run(model, config={}), lambda: runs.load(model)):
            with pytest.raises(ValueError, match=r"config.json' is not that of a run; name"):
                read()
    (model / "config.json").write_text('{"format": 2, "config": {}}')
    with pytest.raises(ValueError, match="is of format 2, this version of hooked_vlm reads 1"):
        runs.load(model)
    with pytest.raises(FileNotFoundError, match=r"has no config.json: it is no folder of a run"):
        runs.load(letter.parent)
    new = tmp_path / "new"
    with pytest.raises(ValueError, match=r"config 'path' is a PosixPath that JSON cannot hold"):
        runs.open_run(new, config={"path": tmp_path})
    assert names(tmp_path) == ["letters", "letters/letter.txt", "model", "model/config.json"]


def test_files_of_ones_own_are_written_whole_into_the_folder(tmp_path):
    with runs.open_run(tmp_path, config={}) as run:
        run.write("report.html", "<p>größer</p>")
        run.write("pictures/map.png", b"\x89PNG")
        for name in ("config.json", "parts/00000.parquet", "../away", "/away", "", ".a.unfinished"):
            with pytest.raises(ValueError, match="is no name for a file of yours in"):
                run.write(name, b"")
    assert (tmp_path / "report.html").read_bytes() == "<p>größer</p>".encode()
    assert (tmp_path / "pictures" / "map.png").read_bytes() == b"\x89PNG"
    with pytest.raises(ValueError, match="was closed; open it again"):
        run.write("report.html", "")
    with pytest.raises(ValueError, match="was closed; open it again"):
        run.go([1], rows, key=key)
    (tmp_path / "pictures" / ".map.png.unfinished").write_bytes(b"half")
    (tmp_path / "notes.unfinished").write_bytes(b"mine")
    runs.open_run(tmp_path, config={}).close()
    assert names(tmp_path / "pictures") == ["map.png"] and (tmp_path / "notes.unfinished").exists()


# --- items


def test_excluded_items_are_counted_with_their_reasons(tmp_path, capsys):
    def work(i, prepared):
        if i == 2:
            raise runs.Excluded("the answer has two tokens")
        if i == 5:
            raise RuntimeError
        return rows(i)

    def prepare(i):
        if i in (0, 3):
            raise runs.Excluded(f"image {i}.jpg is missing") from FileNotFoundError()

    with runs.open_run(tmp_path, config={}) as run:
        with pytest.raises(RuntimeError):
            run.go(range(6), work, key=key, prepare=prepare, part_items=1)
        assert "excluded=3" in capsys.readouterr().err
        assert runs.load(tmp_path).excluded["reason"].tolist() == [
            "image 0.jpg is missing", "the answer has two tokens", "image 3.jpg is missing"
        ]  # fmt: skip
        table = run.go(range(6), rows, key=key, **QUIET)
    assert table["item"].tolist() == [key(i) for i in (1, 1, 4, 4, 5, 5)]
    excluded = {"item 0": "image 0.jpg is missing", "item 2": "the answer has two tokens"}
    excluded["item 3"] = "image 3.jpg is missing"
    assert json.loads((tmp_path / "excluded.json").read_text()) == excluded
    found = runs.load(tmp_path).excluded
    assert dict(zip(found["item"], found["reason"], strict=True)) == excluded
    with pytest.raises(ValueError, match="is excluded for a reason"):
        runs.Excluded("")


def test_all_items_may_be_excluded(tmp_path):
    def work(i, prepared):
        raise runs.Excluded("no")

    table = go(tmp_path, 3, work)
    assert table.columns.tolist() == ["item"] and table.empty
    assert runs.load(tmp_path).excluded["reason"].tolist() == ["no"] * 3
    assert lists(go(tmp_path, 6))["item"] == truth(6)["item"][6:]


def test_bad_keys_are_refused_before_anything_is_done(tmp_path):
    with runs.open_run(tmp_path, config={}) as run:
        with pytest.raises(ValueError, match="items 1 and 3 have the same key 'b'; give each its"):
            run.go(["a", "b", "c", "b"], rows, key=lambda item: item)
        with pytest.raises(ValueError, match="there are no items"):
            run.go([], rows, key=key)
        with pytest.raises(TypeError, match="the key of item 0 is a int, 7; give a str"):
            run.go([7], rows, key=untyped(lambda item: item))
    assert "parts" not in names(tmp_path)


def untyped(function):
    return function


BAD = [
    (None, TypeError, "work gave a NoneType for item 'item 3'; return a pandas.DataFrame"),
    (pd.DataFrame({"a": [1]}), ValueError, "item 'item 3' has other columns .* 'b' is in one"),
    (pd.DataFrame({"a": [1], "b": [0.5]}), ValueError, "column 'b' of item 'item 3' is of type d"),
    (pd.DataFrame({"a": [1], "b": ["x"], 0: 1}), ValueError, "'item 3' have a column 0; name it"),
    (
        pd.DataFrame({"item": [1]}),
        ValueError,
        "something else in the column 'item', .* another name=",
    ),
    (pd.DataFrame({"a": [1], "b": [object()]}), ValueError, "'item 3' do not make a table: "),
    (pd.DataFrame({"a": [1], "b": ["x"]}, index=["c"]), ValueError, r"frame.reset_index\(\)"),
    (pd.DataFrame([[1, "x"]] * 2, columns=["a", "a"]), ValueError, "'item 3' do not make a table"),
    (pd.DataFrame(), ValueError, "'item 3' have no columns; where there is nothing to tell"),
]


@pytest.mark.parametrize(("frame", "kind", "told"), BAD, ids=range(len(BAD)))
def test_rows_that_do_not_fit_are_refused_by_their_item(tmp_path, frame, kind, told):
    good = pd.DataFrame({"a": [1], "b": ["x"]})
    with pytest.raises(kind, match=told):
        go(tmp_path, 4, untyped(lambda i, _: frame if i == 3 else good))
    assert runs.load(tmp_path).table["item"].tolist() == ["item 0", "item 1", "item 2"]
    assert go(tmp_path, 4, lambda i, _: good)["a"].tolist() == [1] * 4


@pytest.mark.parametrize("part_items", [1, 64])
def test_whole_numbers_that_no_float_holds_are_not_rounded(tmp_path, part_items):
    values = [2**53 + 1, 0.5]
    told = "item 'item 1' makes a column of floats of one of whole numbers, and not all of these"
    with pytest.raises(ValueError, match=told):
        go(tmp_path, 2, lambda i, _: pd.DataFrame({"a": [values[i]]}), part_items=part_items)
    assert runs.load(tmp_path).table["a"].tolist() == [2**53 + 1]


# --- preparing ahead


def preparing():
    return [one for one in threading.enumerate() if one.name.startswith("prepare")]


def test_items_are_prepared_while_others_are_worked_on(tmp_path):
    begun = [threading.Event() for _ in range(9)]
    most = []

    def prepare(i):
        begun[i].set()
        return i * i

    def work(i, prepared):
        assert prepared == i * i
        for later in begun[i : i + 5]:  # two threads, four items ahead
            assert later.wait(30)
        most.append(sum(one.is_set() for one in begun) - i - 1)
        return rows(i)

    assert lists(go(tmp_path, 9, work, prepare=prepare, threads=2)) == truth(9)
    assert most == [4, 4, 4, 4, 4, 3, 2, 1, 0] and not preparing()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("error", [StopIteration("end"), OSError("image 3"), KeyboardInterrupt()])
def test_what_prepare_raises_is_raised_at_its_turn(tmp_path, threads, error):
    def prepare(i):
        if i == 3:
            raise error

    work = Failing(None, None)
    with pytest.raises(type(error)) as raised:
        go(tmp_path, 9, work, prepare=prepare, threads=threads)
    assert raised.value is error and work.called == [0, 1, 2]
    assert lists(runs.load(tmp_path).table) == truth(3) and not preparing()


def test_the_bar_begins_where_the_run_resumes(tmp_path, capsys):
    with runs.open_run(tmp_path, config={}) as run:
        with pytest.raises(RuntimeError):
            run.go(range(6), Failing(4, RuntimeError()), key=key, **QUIET)
        assert capsys.readouterr().err == ""
        run.go(range(6), rows, key=key, desc="patching")
    bars = [one for one in capsys.readouterr().err.split("\r") if one]
    assert bars[0].startswith("patching:  67%") and " 4/6 " in bars[0] and " 6/6 " in bars[-1]


# --- where the numbers are from


def test_provenance_tells_model_versions_seed_and_commit(tmp_path, monkeypatch):
    model = built(BLIP[0])
    monkeypatch.chdir(tmp_path)
    told = runs.provenance(model, seed=3)
    assert told["weights"] == model.weights_hash() and told["seed"] == 3
    assert told["device"] == "cpu" and told["dtype"] == "float64" and told["git"] is None
    assert {"python", "torch", "transformers", "hooked_vlm", "pandas"} <= told["versions"].keys()
    runs.open_run(tmp_path / "run", config={}, provenance=told).close()
    assert runs.load(tmp_path / "run").provenance == told


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_provenance_tells_whether_files_differ_from_the_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*words):
        names = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *names, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "untracked.txt").write_text("1")
    assert runs.provenance()["git"] == {"commit": commit, "changed": False}
    (tmp_path / "a.txt").write_text("2")
    assert runs.provenance()["git"] == {"commit": commit, "changed": True}
