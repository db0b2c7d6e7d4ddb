"""The toy ALBEF is as good as its card says, is laid out as ALBEF's files, and uses its image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hooked_vlm import HookedALBEF, toys
from hooked_vlm import patching as P
from hooked_vlm.data import shapes, shapes_pairs
from hooked_vlm.toys import card, train, train_albef
from hooked_vlm.toys.evaluate import evaluate

TOY = "toy-albef"
OVERALL = 0.97
EACH_NEGATIVE = 0.95


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> HookedALBEF:
    return HookedALBEF.from_pretrained(TOY)


def test_it_is_small_complete_and_in_our_layout() -> None:
    folder = toys.path(TOY)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 4_000_000
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "README.md",
        "card.json",
    }
    assert json.loads((folder / "config.json").read_text())["model_type"] == "hooked_albef"


def test_its_tensors_have_the_original_names() -> None:
    tensors = load_file(toys.path(TOY) / "model.safetensors")
    assert {"temp", "itm_head.weight", "visual_encoder.blocks.1.attn.qkv.weight"} <= tensors.keys()
    assert "text_encoder.embeddings.token_type_embeddings.weight" in tensors
    key = "text_encoder.encoder.layer.{}.crossattention.self.key.weight"
    assert [layer for layer in range(4) if key.format(layer) in tensors] == [2, 3]
    assert tensors["temp"].item() == pytest.approx(0.07)


def test_it_loads_with_its_processor(model: HookedALBEF) -> None:
    assert (model.task, model.text.cfg.fusion_layer) == ("itm", 2)
    assert model.provenance["model"] == TOY
    scene = shapes.scenes(1, seed=0)[0]
    assert model(**model.prepare(scene.image(192), scene.caption())).shape == (1, 2)


def test_captions_are_read_as_they_are_without_a_final_sep(model: HookedALBEF) -> None:
    for scene in shapes.scenes(20, seed=0):
        for text in scene.captions():
            ids = model.prepare(scene.image(), text)["input_ids"][0]
            assert model.to_str_tokens(ids) == ["[CLS]", *text.split()]


def test_the_card_holds_what_was_asked_for() -> None:
    known = card.read(toys.path(TOY))
    assert (known.name, known.architecture) == (TOY, "HookedALBEF")
    assert known.accuracy >= OVERALL
    assert min(known.kinds[kind] for kind in shapes.ATTRIBUTES) >= EACH_NEGATIVE
    assert known.seconds <= 20 * 60
    assert known.n_scenes >= 2000
    text = (toys.path(TOY) / "README.md").read_text()
    for rate in (known.accuracy, *known.kinds.values()):
        assert f"{rate:.2%}" in text
    assert "An ALBEF of" in text


def test_it_is_right_on_fresh_held_out_scenes() -> None:
    report = evaluate(toys.path(TOY), n=250, seed=4321)
    assert report.accuracy >= OVERALL, report
    assert min(report.kinds[kind] for kind in shapes.ATTRIBUTES) >= EACH_NEGATIVE, report


def test_the_similarity_finds_the_caption_of_an_image(model: HookedALBEF) -> None:
    """Of the captions of 20 scenes; the contrast was trained with a small weight."""
    scenes = shapes.scenes(20, seed=5, split="held_out")
    inputs = model.prepare([scene.image() for scene in scenes], [s.caption() for s in scenes])
    found = model.similarity(**inputs).argmax(-1)
    assert (found == torch.arange(20)).float().mean() > 0.5


@pytest.mark.parametrize("attribute", shapes.ATTRIBUTES)
def test_patching_a_cross_attention_head_restores_the_verdict(
    model: HookedALBEF, attribute: str
) -> None:
    pair = shapes_pairs(1, seed=0, task="itm", attribute=attribute)[0]
    sites = "text.blocks.*.cross_attn.heads.*.hook_z"
    result = P.activation_patching(model, pair, sites=sites, progress=False)
    assert result.data.sizes == {"pair": 1, "layer": 2, "head": 4}
    assert result.data["layer"].values.tolist() == [2, 3]
    assert result.clean.item() > 0 > result.corrupt.item()
    assert result.restored.max().item() > 0.3


def test_training_writes_a_folder_that_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the real script, twice: the same seed gives the same weights."""
    monkeypatch.setattr(train_albef, "N_SCENES", 80)
    for out in ("one", "two"):
        command = [TOY, "--steps=2", "--scenes=20", f"--out={tmp_path / out}", "--threads=1"]
        result = CliRunner().invoke(train.app, command)
        assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    packaged = {file.name for file in toys.path(TOY).iterdir()}
    assert {file.name for file in (tmp_path / "one").iterdir()} == packaged
    assert card.read(tmp_path / "one").steps == 2
