"""Folders of every architecture: written and read bit for bit, and refused where they are wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_zoo import ZOO
from zoo import error

from hooked_vlm import HookedBLIP, HookedVLM
from weights_conversion import ConversionError

each = pytest.mark.parametrize("member", ZOO, ids=str)


@pytest.fixture
def folder(member, tmp_path):
    member.model(torch.float32).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@each
def test_what_is_written_is_read(member, folder):
    """By its own class and by `HookedVLM`, which finds it; in its dtype and in another."""
    model, inputs = member.model(torch.float32), member.inputs(dtype=torch.float32)
    for opened in (type(model).from_pretrained(folder), HookedVLM.from_pretrained(folder)):
        assert type(opened) is type(model) and opened.cfg == model.cfg
        ours, theirs = dict(model.named_parameters()), dict(opened.named_parameters())
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        # Not bit for bit: where a mapped weight lies decides which kernel a convolution takes.
        assert error(opened(**inputs), model(**inputs)) < 1e-6
        assert not any(parameter.requires_grad for parameter in theirs.values())
    double = HookedVLM.from_pretrained(folder, dtype=torch.float64)
    assert error(double(**member.inputs()), model(**inputs).double()) < 1e-5


@each
def test_files_that_are_wrong(member, folder):
    file = folder / "model.safetensors"
    whole, state = file.read_bytes(), load_file(file)
    name = max(state, key=lambda name: state[name].numel())

    def refused(says, **changes):
        changed = {**state, **changes}
        save_file({k: v for k, v in changed.items() if v is not None}, file)
        with pytest.raises(ConversionError) as caught:
            HookedVLM.from_pretrained(folder)
        assert says in str(caught.value) and len(str(caught.value)) < 1500

    refused("missing: nothing fills", **{name: None})
    refused("left over: 'more.weight'", **{"more.weight": torch.zeros(2)})
    refused(repr(name), **{name: state[name][:, :-1].contiguous()})
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match=r"model\.safetensors cannot be read"):
        HookedVLM.from_pretrained(folder)
    file.write_bytes(whole)
    with pytest.raises(ConversionError, match=r"task='colours', but the tensors are those of"):
        HookedVLM.from_pretrained(folder, task="colours")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ConversionError, match="none of the zoo's classes"):
        HookedVLM.from_pretrained(folder)
    with pytest.raises(ConversionError, match="model_type 'bert'; Hooked"):
        type(member.model()).from_pretrained(folder)


@each
def test_another_class_refuses_it_by_name(member, folder):
    own = type(member.model())
    other = next(type(one.model()) for one in ZOO if type(one.model()) is not own)
    with pytest.raises(ConversionError, match=f"{own.__name__}, which opens it; {other.__name__}"):
        other.from_pretrained(folder)


def test_nothing_of_the_zoo(tmp_path):
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "vgg.pth")
    with pytest.raises(ConversionError, match="none of the zoo's classes, HookedBLIP, HookedALBEF"):
        HookedVLM.from_pretrained(tmp_path / "vgg.pth")
    with pytest.raises(ConversionError, match="no BLIP"):
        HookedBLIP.from_pretrained(tmp_path / "vgg.pth")
