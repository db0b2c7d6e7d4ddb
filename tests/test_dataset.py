"""Activations of a data set: written once, gone on with, read without the model."""

import functools
import json

import numpy as np
import pytest
import torch
from whole_zoo import ZOO
from zoo import BLIP, Recorder, error

from hooked_vlm import ActivationDataset, HookedBLIP
from hooked_vlm import patching as P

QUIET = {"progress": False}
ITM, _, VQA = BLIP
NAMES = ["text.blocks.*.hook_mlp_out", "text.blocks.0.cross_attn.heads.1.hook_z"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def built(member):
    return member.model()


def batches(member, n=3, padded=True):
    return [member.inputs(2, padded=padded, seed=seed, dtype=torch.float64) for seed in range(n)]


@pytest.mark.parametrize("member", ZOO, ids=str)
def test_what_is_written_is_what_passes_give(member, tmp_path):
    model, data = built(member), batches(member)
    names = [n for n in model.hook_dict if n.endswith(("blocks.0.hook_resid_post", "hook_z"))]
    names += [n for n in model.hook_dict if n.endswith("cross_attn.hook_k")][:1]
    found = model.cache_dataset(iter(data), names, tmp_path / "a", **QUIET)
    assert found.names == model.hook_dict.match(names)
    assert len(found) == sum(len(one[model.ROWS]) for one in data)
    for (activations, masks), batch in zip(found.shards(), data, strict=True):
        _, cache = model.run_with_cache(**batch, names_filter=names)
        for name in found.names:
            assert torch.equal(activations[name], cache[name]), name
        for name, mask in masks.items():
            key = "attention_mask" if mask.shape == batch["attention_mask"].shape else "decoder_"
            assert torch.equal(mask, batch.get(key, batch.get("decoder_attention_mask")).bool())
            assert not name.startswith("vision") or member.task == "clip"


def test_a_tensor_of_the_reference(tmp_path):
    theirs, ours = ITM.pair()
    (batch,) = batches(ITM, 1)
    name = "text.blocks.1.hook_mlp_out"
    reference = ITM.table()[name]
    with Recorder(theirs, {reference[0]}) as recorder:
        theirs(**batch)
    found = ours.cache_dataset([batch], name, tmp_path, **QUIET)
    assert error(found[name], recorder.value(reference)) < 1e-10


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, data, calls = built(ITM), batches(ITM), []
    run = type(model).base_run

    def counted(self, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, **kwargs)

    monkeypatch.setattr(type(model), "base_run", counted)
    with pytest.raises(KeyboardInterrupt):
        model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    assert len(ActivationDataset(tmp_path)) == 2
    assert sorted(f.name for f in tmp_path.iterdir()) == ["00000.safetensors", "index.json"]
    found = model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    assert len(calls) == 4 and len(found) == 6  # the second batch twice
    model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    assert len(calls) == 4
    _, cache = model.run_with_cache(**data[1], names_filter=NAMES[1])
    assert torch.equal(list(found.shards())[1][0][NAMES[1]], cache[NAMES[1]])


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    model = built(ITM)

    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("hooked_vlm.models.dataset.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        model.cache_dataset(batches(ITM, 1), NAMES, tmp_path, **QUIET)
    assert [f.name for f in tmp_path.iterdir()] == ["index.json"]


def test_folders_of_something_else_are_refused(tmp_path):
    model, data = built(ITM), batches(ITM)
    folder = tmp_path / "data"
    model.cache_dataset(data, NAMES, folder, **QUIET)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = ITM.pair()[1]
    other.text.blocks[0].mlp.fc_in.weight.mul_(2)
    with pytest.raises(ValueError, match="was made with another weights, "):
        other.cache_dataset(data, NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match=r"another names, .*; choose another folder"):
        model.cache_dataset(data, NAMES[0], folder, **QUIET)
    with pytest.raises(ValueError, match="another dtype, 'float64', not 'float32'"):
        model.cache_dataset(data, NAMES, folder, dtype=torch.float32, **QUIET)
    with pytest.raises(ValueError, match="batch 1 is not the one"):
        model.cache_dataset([data[0], data[2]], NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match="holds 3 batches, 1 were given"):
        model.cache_dataset(data[:1], NAMES, folder, **QUIET)
    with pytest.raises(KeyError, match=r"no hook 'text.blocks.7"):
        model.cache_dataset(data, "text.blocks.7.hook_mlp_out", folder, **QUIET)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds other files, and no index.json"):
        model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    with pytest.raises(FileNotFoundError, match=r"has no index.json: it is no folder of cache_d"):
        ActivationDataset(tmp_path)


def test_files_that_are_cut_short_are_named(tmp_path):
    model = built(ITM)
    found = model.cache_dataset(batches(ITM), NAMES, tmp_path, **QUIET)
    file = tmp_path / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(OSError, match=r"00001.safetensors' cannot be read"):
        list(found.shards())
    with pytest.raises(KeyError, match="'hook_logits' was not cached"):
        found["hook_logits"]


def test_batches_of_several_lengths_are_read_one_by_one(tmp_path):
    model = built(ITM)
    data = [ITM.inputs(2, padded=padded) for padded in (True, False)]
    found = model.cache_dataset(data, NAMES, tmp_path, dtype=torch.bfloat16, **QUIET)
    with pytest.raises(ValueError, match="are of several lengths"):
        found[NAMES[1]]
    shapes = [tuple(activations[NAMES[1]].shape) for activations, _ in found.shards()]
    assert [shape[1] for shape in shapes] == [5, 4]
    assert found.provenance["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "index.json").read_text())["format"] == 1


@pytest.mark.parametrize("member", [ITM, VQA], ids=str)
def test_means_of_a_folder_are_those_of_its_inputs(member, tmp_path):
    """They are held against the means of rows without their padding."""
    model, data = built(member), batches(member)
    stack = list(model.stacks)[-1]
    names = [f"{stack}.blocks.0.hook_mlp_out", f"{stack}.blocks.1.cross_attn.hook_v"]
    model.cache_dataset(data, names, tmp_path, **QUIET)
    one = member.inputs(1, padded=False)
    rows = {name: [] for name in names}
    for batch in data:
        _, cache = model.run_with_cache(**batch, names_filter=names)
        own = batch["decoder_attention_mask" if stack == "decoder" else "attention_mask"]
        for row in range(2):
            rows[names[0]].append(cache[names[0]][row, own[row].bool()])
            value = cache[names[1]][row]
            if stack == "decoder":  # whose keys are the question's
                value = value[batch["attention_mask"][row].bool()]
            rows[names[1]].append(value)
    for name in names:
        value = torch.cat(rows[name]).mean(0)
        hook = (name, lambda x, hook, value=value: value.expand_as(x).clone())
        expected = model.run_with_hooks(**one, fwd_hooks=[hook]).flatten(1)[:, 1]
        result = P.ablate(model, one, name, P.mean(tmp_path), lambda x: x.flatten(1)[:, 1], **QUIET)
        np.testing.assert_allclose(result.data.values[:, 0], expected, rtol=0, atol=1e-10)
    with pytest.raises(KeyError, match=r"holds no 'text.hook_embed'"):
        P.ablate(model, one, "text.hook_embed", P.mean(tmp_path), lambda x: x[:, 0], **QUIET)


def test_weights_have_a_hash():
    toy = HookedBLIP.from_pretrained("toy-blip-itm")
    before = toy.weights_hash()
    assert before == HookedBLIP.from_pretrained("toy-blip-itm").weights_hash()
    toy.itm_head.bias.add_(1)
    assert toy.weights_hash() != before
