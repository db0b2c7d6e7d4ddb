"""Checkpoints that are wrong: one error that names the thing and the way out, nothing loaded."""

import json
import os
import pickle
import re
import zipfile

import pytest
import torch
import transformers
from checkpoints import bert_folder, hf_folder, original, processor, pth, reference, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_loading import as_bin, hub_cache, sharded

from hooked_vlm import HookedBLIP
from weights_conversion import Checkpoint, ConversionError


@pytest.fixture
def folder(tmp_path):
    return hf_folder(tmp_path / "blip", reference("itm"))


@pytest.fixture
def vocabulary(tmp_path):
    return bert_folder(tmp_path / "bert")


def rewrite(folder, **changes):
    """Tensors set, or dropped where None."""
    state = load_file(folder / "model.safetensors") | changes
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "model.safetensors")


def refused(where, says, kind=ConversionError, **how):
    with pytest.raises(kind, match=says) as caught:
        HookedBLIP.from_pretrained(where, **how)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


# --- nothing there


def test_a_wrong_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = FileNotFoundError
    refused(tmp_path / "nowhere", "neither a file nor a folder", wrong)
    refused("models/model_base.pth", "'models/model_base.pth' is neither", wrong)
    says = refused("toy-blip-imt", "'toy-blip-imt' is no packaged toy", wrong)
    assert "toy-blip-itm" in says
    refused("Salesforce/absent", "'Salesforce/absent'.*the Hub gave nothing", wrong)
    refused("a name: with signs", "'a name: with signs'.*the Hub gave nothing", wrong)


def test_a_folder_without_weights_or_config(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, "no model.safetensors and no pytorch_model.bin", FileNotFoundError)
    (folder / "config.json").unlink()
    refused(folder, "no config.json", FileNotFoundError)


def test_a_shard_or_its_index_is_missing(tmp_path):
    sharded(tmp_path / "m", reference("itm"))
    index = tmp_path / "m" / "model.safetensors.index.json"
    lost = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    lost.unlink()
    refused(tmp_path / "m", f"names {lost.name}, which is not there", FileNotFoundError)
    hub_cache(tmp_path / "cache", "a/b", tmp_path / "m", "3" * 40)
    refused("a/b", f"names {lost.name}", FileNotFoundError, cache_dir=tmp_path / "cache")
    for text in ('{"weight_map": {"a": "../../secret"}}', "[]", '{"weight_map": 3}', "{", "{}"):
        index.write_text(text)
        refused(tmp_path / "m", re.escape(str(index)))


def test_a_hub_name_of_which_only_the_config_is_there(tmp_path, folder):
    (folder / "model.safetensors").unlink()
    hub_cache(tmp_path / "cache", "a/b", folder, "3" * 40)
    says = "'a/b', on the Hub or, if offline, in its cache, has no model.safetensors"
    refused("a/b", says, FileNotFoundError, cache_dir=tmp_path / "cache")


# --- files that are cut short, or are something else


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_that_is_cut_short(kind, data, tmp_path_factory):
    at = tmp_path_factory.mktemp("cut")
    state = {f"layer.{i}.weight": torch.rand(3, i + 1) for i in range(5)}
    if kind == "safetensors":
        save_file(state, file := at / "model.safetensors")
    else:
        torch.save(state, file := at / "m.pth", _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ConversionError, match=re.escape(str(file))) as caught:
        Checkpoint([file])
    assert "cut short" in str(caught.value) and "fetch it again" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"{}"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_something_else(name, content, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    refused(folder, f"{name} cannot be read as .* fetch it again")


class Payload:
    """What an attacker's pickle holds: a call."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_file_that_holds_code_is_refused_and_does_not_run(how, tmp_path, vocabulary):
    target, file = tmp_path / "ran", tmp_path / "model_base.pth"
    state = {"model": original(reference("itm").state_dict()), "config": Payload(target)}
    if how == "plain pickle":
        file.write_bytes(pickle.dumps({"model": Payload(target)}, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "zip")
    says = refused(file, "could run code, so it is refused", processor=vocabulary)
    assert str(file) in says and "mkdir" in says and not target.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds no tensors by name but list"),
        ({}, "no tensors by name"),
        ({"model": {"a": 1}}, "'a', a int"),
    ],
)
def test_a_file_that_holds_no_state_dict(content, says, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    refused(tmp_path / "m.pth", says)


# --- tensors that do not fit


def test_tensors_that_are_missing_left_over_or_of_another_shape(folder):
    rewrite(folder, **{"itm_head.bias": None})
    refused(folder, "missing: nothing fills 'itm_head.bias'")
    rewrite(folder, **{"itm_head.bias": torch.zeros(3)})
    refused(folder, r"wrong shape: 'itm_head.bias' is \[3\], 'itm_head.bias' needs \[2\]")
    rewrite(folder, **{"itm_head.bias": torch.zeros(2), "extra.weight": torch.zeros(4, 5)})
    refused(folder, r"left over: 'extra.weight' \[4, 5\] has no place")


def test_many_faults_are_counted(folder):
    state = load_file(folder / "model.safetensors")
    rewrite(folder, **{name: None for name in state if ".layers.1." in name})
    assert "missing: " in (says := refused(folder, r"and \d+ more$"))
    assert says.count("\n") == 9


def test_a_tied_copy_that_differs(tmp_path):
    as_bin(tmp_path / "m", reference("captioning"))
    file = tmp_path / "m" / "pytorch_model.bin"
    state = torch.load(file)
    name = "text_decoder.cls.predictions.decoder.weight"
    torch.save(state | {name: state[name] + 1}, file)
    refused(tmp_path / "m", f"'{name}' is tied to .*word_embeddings.weight' but holds other")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "config.json is no JSON"),
        ("[1]", "holds no JSON object but list"),
        ('{"model_type": "bert"}', "model_type 'bert'; HookedBLIP reads 'blip'"),
        ("{}", "model_type None"),
        ('{"model_type": "hooked_blip", "task": "itm"}', "config.json is none of ours: 'vision'"),
        ('{"model_type": "blip", "vision_config": {"hidden_size": "wide"}}', "no BLIP config"),
        ('{"model_type": "blip"}', "wrong shape: "),
    ],
)
def test_a_config_that_is_wrong(config, says, folder):
    (folder / "config.json").write_text(config)
    refused(folder, says)


def test_heads_that_do_not_divide_the_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "d_model=128 is not a multiple of n_heads=7")


# --- another model, another task


def test_the_task_must_fit(folder, tmp_path, vocabulary):
    refused(folder, "task='vqa', but the tensors are those of itm", task="vqa")
    state = original(reference("captioning").state_dict() | reference("itm").state_dict())
    file = pth(tmp_path / "model_base.pth", trained(state))
    refused(file, "serve several tasks; pass task= one of itm, captioning")
    refused(file, "task='vqa', but .* itm, captioning", task="vqa", processor=vocabulary)


def test_models_of_another_kind(tmp_path, folder):
    state = original(reference("itm").state_dict())
    nlvr = {name: tensor for name, tensor in state.items() if "itm" not in name}
    file = pth(tmp_path / "model_base_nlvr.pth", nlvr | {"cls_head.0.weight": torch.zeros(2, 2)})
    refused(file, "BLIP-NLVR")
    refused(pth(tmp_path / "vit.pth", {"fc.weight": torch.zeros(2)}), "no BLIP: expected text_enc")
    refused(folder / "model.safetensors", "without the config.json.* name the folder")
    bert = transformers.BertModel(transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    ))  # fmt: skip
    with pytest.raises(ConversionError, match="model_type 'bert'"):
        HookedBLIP.from_hf(bert)


def test_overrides_that_do_not_fit(tmp_path, folder, vocabulary):
    refused(folder, "config= is for bare files", config={"text": {"n_heads": 4}})
    state = original(reference("itm").state_dict())
    file = pth(tmp_path / "m.pth", state)
    for config, says in (
        ({"decoder": {"n_heads": 4}}, "names .'decoder'.; the stacks of task 'itm' are vision and"),
        ({"text": {"heads": 4}}, "unexpected keyword argument 'heads'"),
        ({"text": {"n_heads": 3}}, "not a multiple of n_heads=3"),
        ({"text": {"d_mlp": 7}}, "wrong shape: "),
    ):
        refused(file, says, config=config, processor=vocabulary)
    del state["visual_encoder.pos_embed"]
    refused(pth(file, state), "missing: 'visual_encoder.pos_embed'", processor=vocabulary)
    state["visual_encoder.pos_embed"] = torch.zeros(1, 5, 60)
    narrow = state | {"visual_encoder.patch_embed.proj.weight": torch.zeros(60, 3, 8, 8)}
    refused(pth(file, narrow), "vision is 60 wide.*pass config=", processor=vocabulary)


# --- no processor, or another's


def test_a_bare_file_needs_a_vocabulary(tmp_path):
    file = pth(tmp_path / "m.pth", original(reference("itm").state_dict()))
    refused(file, "'bert-base-uncased' could not be had.*pass processor=", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(file, "empty' could not be had", FileNotFoundError, processor=tmp_path / "empty")


def test_half_a_processor(folder, tmp_path):
    image = folder / "processor_config.json"
    image.rename(tmp_path / "p")
    refused(folder, "tokenizer but no image processor.*; pass processor=", FileNotFoundError)
    (tmp_path / "p").rename(image)
    for file in folder.glob("*tok*"):
        file.unlink()
    refused(folder, "image processor but no tokenizer; pass processor=", FileNotFoundError)
    refused(folder, "has no processor", FileNotFoundError, processor=tmp_path)


def test_the_vocabulary_of_another_model(folder, tmp_path):
    toy = "Salesforce/other"
    refused(folder, f"'{toy}' has no processor", FileNotFoundError, processor=toy)
    big = processor()
    big.tokenizer.add_tokens(["more"])
    big.save_pretrained(tmp_path / "big")
    says = refused(folder, "pass processor=", ValueError, processor=tmp_path / "big")
    assert re.search(r"has \d+ tokens, the weights know \d+", says)
    file = pth(tmp_path / "m.pth", original(reference("itm").state_dict()))
    big.tokenizer.bos_token = None
    refused(file, "no bos_token_id", ValueError, processor=big)


def test_files_that_were_packed_again_are_read_right(tmp_path, vocabulary):
    """Compressed, their tensors cannot be mapped."""
    file = pth(tmp_path / "model.pth", original(reference("itm").state_dict()))
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    one, two = (HookedBLIP.from_pretrained(f, processor=vocabulary) for f in (file, packed))
    for name, parameter in one.named_parameters():
        assert torch.equal(two.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("text", "says"),
    [({"n_heads": 0}, "n_heads=0"), ({"activation": "geluu"}, "activation='geluu'")],
)
def test_sizes_that_are_none(tmp_path, vocabulary, text, says):
    file = pth(tmp_path / "model.pth", original(reference("itm").state_dict()))
    refused(file, says, processor=vocabulary, config={"text": text})
