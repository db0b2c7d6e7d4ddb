"""ALBEF against the golden numbers of the original code."""

import json
import re

import albef_fixtures as golden
import pytest
import torch
from safetensors.torch import load_file
from zoo import error

MOMENTUM = re.compile(r"_m$|_with_queue$")
FOLDERS = {"kept": golden.HERE, "whole": golden.WHOLE}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return golden.tokenizer(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(params=FOLDERS)
def folder(request):
    folder = FOLDERS[request.param]
    if not folder.is_dir():
        pytest.skip(f"the whole set of golden fixtures is not at {folder}: the kept part stands")
    return folder


def models(folder, group, words, dtype):
    file, task, size = golden.SETS[group]
    if not (folder / file).is_file():
        pytest.skip(f"{file} is not among the fixtures that are kept here")
    opened = golden.open_model(folder, file, words, task, size, dtype)
    found = {opened.task: opened}
    if group == "pretrain":
        found["pretrain"] = golden.open_model(folder, file, words, "pretrain", size, dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("group", golden.SETS)
def test_every_reference_is_matched(folder, group, words, dtype):
    made = models(folder, group, words, dtype)
    expected = load_file(folder / f"{group}.reference.f64.safetensors")
    wanted = [name for name in expected if not MOMENTUM.search(name)]
    ours = golden.compute(group, made, golden.inputs(folder, dtype), wanted)
    assert set(wanted) - set(ours) == set(), "references without a counterpart"
    for name in wanted:
        if name.endswith("_ids"):
            assert torch.equal(ours[name], expected[name]), name
            continue
        assert ours[name].dtype == dtype
        steep = "grad" in name
        limit = 1e-10 if dtype == torch.float64 else 2e-4 if steep else 5e-5
        assert error(ours[name].double(), expected[name], 0.0 if steep else 1.0) < limit, name


@pytest.mark.skipif(not golden.WHOLE.is_dir(), reason=f"no golden fixtures at {golden.WHOLE}")
def test_all_checkpoints_load_and_their_numbers_agree(words):
    """The nine files; those that hold the same weights in other layouts give the same logits."""
    manifest = json.loads((golden.WHOLE / "manifest.json").read_text())
    files = list(manifest["checkpoints"])
    assert len(files) == 9
    x = golden.inputs(golden.WHOLE, torch.float64)
    text = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
    logits = {}
    for file in files:
        task = "itm" if file in ("pretrain.pth", "amc_trained.pth") else None
        model = golden.open_model(golden.WHOLE, file, words, task)
        size = model.cfg.vision.image_size
        pixels = x["pixel_values" if size == 64 else "pixel_values_hi"]
        pixels = torch.stack([pixels, pixels.flip(0)], 1) if model.task == "nlvr" else pixels
        logits[file] = model(pixels, **text)
    same = ("retrieval_trained.pth", "retrieval_released_flat.pth", "grounding_released_flat.pth")
    for file in same:
        assert torch.equal(logits[file], logits[same[0]])
    assert torch.equal(logits["vqa_trained.pth"], logits["vqa_flat_no_momentum.pth"])
