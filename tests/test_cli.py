"""The command line: what it writes and prints, and what wrong arguments get."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from hooked_vlm import HookedVLM, cli
from hooked_vlm.data import shapes_pairs
from hooked_vlm.patching import activation_patching

WRITTEN = {"heatmap.png", "attention.png", "result.csv", "provenance.json"}


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def is_drawn(file):
    pixels = np.asarray(Image.open(file).convert("RGB"))
    return len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


@pytest.fixture
def images(tmp_path):
    pair = shapes_pairs(1, 3, "itm", "color", size=96)[0]
    pair.image.save(tmp_path / "clean.png")
    pair.corrupt_image.save(tmp_path / "corrupt.png")
    return tmp_path, pair


HEADS = {
    "toy-blip-itm": "text.blocks.*.cross_attn.heads.*.hook_z",
    "toy-blip-captioning": "decoder.blocks.*.cross_attn.heads.*.hook_z",
    "toy-blip-vqa": "text.blocks.*.cross_attn.heads.*.hook_z",
    "toy-llava": "text.blocks.*.attn.heads.*.hook_z",
}


@pytest.mark.parametrize("toy", HEADS)
def test_patch_alone(toy, tmp_path):
    out = tmp_path / "new" / "folder"
    result = run("patch", "--model", toy, "--out", out, "--top", 3)
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == WRITTEN
    assert all(is_drawn(out / name) for name in ("heatmap.png", "attention.png"))
    model = HookedVLM.from_pretrained(toy)
    expected = activation_patching(
        model,
        shapes_pairs(1, 0, model.task, "relation", size=192),
        HEADS[toy],
        progress=False,
    )
    table = pd.read_csv(out / "result.csv")
    np.testing.assert_allclose(table["patched"], expected.data.values.ravel(), atol=1e-4)
    assert result.stdout.count(".hook_z ") == 3
    strongest = expected.top(1)[0].name
    assert strongest in result.stdout
    told = json.loads((out / "provenance.json").read_text())
    assert (told["model"], told["direction"]) == (toy, "denoise")


def test_patch_of_ones_own_files(images):
    folder, pair = images
    caption = pair.text
    false = caption.replace(pair.answer, pair.foil)
    given = ["patch", "--image", folder / "clean.png", "--text", caption, "--out", folder / "o"]
    for corrupt, sites in (
        (["--corrupt-text", false], ["--sites", "text.blocks.*.hook_mlp_out"]),
        (["--corrupt-image", folder / "corrupt.png"], ["--sites", "text.blocks.*.hook_resid_pre"]),
    ):
        result = run(*given, *corrupt, *sites, "--direction", "noise", "--first-token", "enc")
        assert result.exit_code == 0, result.output
        table = pd.read_csv(folder / "o" / "result.csv")
        assert len(table) == 3
        assert set(table["pair"]) == {"clean.png"}
        told = json.loads((folder / "o" / "provenance.json").read_text())
        assert (told["direction"], told["first_token"]) == ("noise", "enc")
    assert {file.name for file in (folder / "o").iterdir()} == WRITTEN - {"attention.png"}


def test_patch_with_answer_foil_and_metric(images):
    folder, _ = images
    question = "what color is the circle?"
    for metric in ("logit_diff", "prob", "log_prob"):
        result = run(
            *("patch", "--model", "toy-blip-vqa", "--out", folder / "o", "--metric", metric),
            *("--image", folder / "clean.png", "--corrupt-image", folder / "corrupt.png"),
            *("--text", question, "--answer", "red", "--foil", "green"),
            *("--sites", "hook_image_embeds", "--sites", "decoder.blocks.*.hook_mlp_out"),
        )
        assert result.exit_code == 0, result.output
        assert pd.read_csv(folder / "o" / "result.csv")["restored"][0] == pytest.approx(1, abs=1e-3)
        assert json.loads((folder / "o" / "provenance.json").read_text())["metric"] == metric


def test_patch_of_a_file_of_pairs(images):
    folder, pair = images
    false = pair.text.replace(pair.answer, pair.foil)
    rows = "".join(f"clean.png,{pair.text},{false},{name}\n" for name in ("one", "two"))
    (folder / "pairs.csv").write_text(f"image,text,corrupt_text,name\n{rows}")
    result = run("patch", "--data", folder / "pairs.csv", "--out", folder / "o")
    assert result.exit_code == 0, result.output
    assert "(2 pairs)" in result.stdout
    table = pd.read_csv(folder / "o" / "result.csv")
    assert table.groupby("pair").size().to_dict() == {"one": 12, "two": 12}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "a"], "--image is missing"),
        (["--answer", "red"], "--image is missing"),
        (["--image", "no.png", "--text", "a", "--corrupt-text", "b"], "no image file 'no.png'"),
        (["--image", "clean.png", "--text", "a"], "the corrupt input is the clean one"),
        (["--image", "clean.png", "--corrupt-image", "corrupt.png"], "needs a text"),
        (["--image", "text.png", "--text", "a", "--corrupt-text", "b"], "is no image that can be"),
        (["--image", "clean.png", "--text", "a", "--corrupt-text", "a a"], "do not align"),
        (["--data", "pairs.csv", "--text", "a"], "--data holds whole pairs"),
        (["--data", "absent.csv"], "absent.csv"),
        (["--data", "text.png"], "is neither .csv nor .jsonl"),
        (["--model", "no/such-model"], "'no/such-model' is no packaged toy"),
        (["--model", "/nowhere/model.pth"], "is neither a file nor a folder"),
        (["--metric", "accurate"], "--metric 'accurate' is none of itm_margin"),
        (["--metric", "logit_diff"], "the metric of an itm model is itm_margin"),
        (["--sites", "text.blocks.9.hook_mlp_out"], "text has 3 blocks (0 to 2)"),
        (["--dtype", "float7"], "--dtype 'float7'"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--out", "clean.png"], "is a file; name a folder"),
        (
            ["--image", "clean.png", "--text", "a", "--corrupt-image", "same.png"],
            "there is nothing to restore",
        ),
        (["--direction", "up"], "up"),
    ],
)
def test_what_is_wrong_is_one_line(images, arguments, says, monkeypatch):
    folder, pair = images
    pair.image.save(folder / "same.png")
    (folder / "text.png").write_text("hello")
    monkeypatch.chdir(folder)
    result = run("patch", *(["--out", "o"] if "--out" not in arguments else []), *arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    if "--direction" not in arguments:  # typer's own usage lines
        lines = [line for line in result.stderr.splitlines() if not line.startswith("\rpatching")]
        assert len([line for line in lines if "error: " in line]) == 1
        assert not (folder / "o").exists()


# --- check


@pytest.mark.parametrize("toy", HEADS)
def test_check_agrees(toy, capfd):
    result = run("check", "--model", toy)
    assert result.exit_code == 0, result.output
    assert "differs" not in result.stdout
    stacks = {"captioning": ["decoder"], "vqa": ["text", "decoder"]}
    for stack in ["vision", *stacks.get(toy.rpartition("-")[2], ["text"]), "logits"]:
        assert any(f" {stack} " in line and "equal" in line for line in result.stdout.splitlines())
    assert result.stderr + capfd.readouterr().err == ""


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_check_differs(wrong, monkeypatch):
    opened = cli.open_model

    def perturbed(*arguments):
        model = opened(*arguments)
        weight = model.text.blocks[1].mlp.fc_out.weight
        weight.data = weight.data * (1 + wrong)  # not in place: the file is mapped
        return model

    monkeypatch.setattr(cli, "open_model", perturbed)
    result = run("check")
    assert result.exit_code == 1
    verdicts = {
        line.split()[1]: "differs" if "differs" in line else "equal"
        for line in result.stdout.splitlines()
        if "equal" in line or "differs" in line
    }
    assert verdicts == {"vision": "equal", "text": "differs", "logits": "differs"}


def test_check_of_what_is_not_there():
    result = run("check", "--model", "no/such-model")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


# --- in a process of its own


def python(code, *arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        check=False,
    )


def test_help_and_import_load_nothing_heavy():
    commands = ("patch", "check", "validate", "notice", "trace")
    code = (
        f"COMMANDS = {commands}"
        + """
import sys
from typer.testing import CliRunner
import hooked_vlm
from hooked_vlm.cli import app
for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "--help" in result.stdout
heavy = {"torch", "transformers", "xarray", "matplotlib", "transformer_lens", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""
    )
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_happy_paths_print_no_warnings_and_no_foreign_bars(tmp_path):
    code = "from hooked_vlm.cli import main; main()"
    result = python(code, "patch", "--out", str(tmp_path / "o"))
    assert result.returncode == 0, result.stderr
    bars = [line for line in result.stderr.replace("\r", "\n").splitlines() if line]
    assert bars
    assert all(line.startswith("patching: ") for line in bars)
    assert "text.blocks." in result.stdout
    result = python(code, "check")
    assert (result.returncode, result.stderr) == (0, "")


def test_an_error_is_one_line_without_a_traceback(tmp_path):
    result = python(
        "from hooked_vlm.cli import main; main()", "patch", "--data", "no.csv", cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stderr == "error: [Errno 2] No such file or directory: 'no.csv'\n"
    assert list(tmp_path.iterdir()) == []
