"""Checkpoints from wherever they are, loaded as they are, and written so that others read them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from checkpoints import (
    CLASSES,
    DEC,
    ENC,
    IMAGE,
    SEP,
    TASKS,
    assert_same,
    bert_folder,
    hf_folder,
    inputs,
    original,
    processor,
    pth,
    reference,
    state_of,
    trained,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from hooked_vlm import HookedBLIP
from weights_conversion import files

# --- where a checkpoint is, and what its files look like


def sharded(folder, model):
    hf_folder(folder, model, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "notes.txt").write_text("files that are no part of a checkpoint do not matter")


def as_bin(folder, model):
    """As transformers 4 wrote them: tied copies and buffers of indices included."""
    hf_folder(folder, model)
    (folder / "model.safetensors").unlink()
    torch.save(_state_of_4(model), folder / "pytorch_model.bin")


def as_bin_shards(folder, model):
    hf_folder(folder, model, max_shard_size="300KB")
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    index.unlink()
    for shard in folder.glob("*.safetensors"):
        name = shard.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save(load_file(shard), folder / name)
        shard.unlink()


def as_4(folder, model):
    hf_folder(folder, model)
    state = {name: tensor.clone() for name, tensor in _state_of_4(model).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _state_of_4(model):
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("embeddings.position_embeddings.weight")]:
        state[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(20)[None]
    return state


@pytest.mark.parametrize("layout", [hf_folder, sharded, as_bin, as_bin_shards, as_4])
@pytest.mark.parametrize("task", ["itm", "vqa"])
def test_every_kind_of_folder_holds_the_same_model(layout, task, tmp_path):
    theirs = reference(task)
    layout(tmp_path, theirs)
    ours = HookedBLIP.from_pretrained(tmp_path)
    assert_same(state_of(ours), state_of(HookedBLIP.from_hf(theirs)))
    assert ours.task == task
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def hub_cache(cache, name, folder, commit="c0ffee", branch="main"):
    """A folder, laid out as huggingface_hub's cache."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir(exist_ok=True)
    for file in folder.iterdir():
        blob = repo / "blobs" / f"{commit}-{file.name}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)


@pytest.mark.parametrize("layout", [hf_folder, sharded, as_bin])
def test_a_hub_name_is_read_from_the_cache(layout, tmp_path):
    commits = {"main": "1" * 40, "pr-5": "2" * 40}
    references = {branch: reference("itm", seed=i) for i, branch in enumerate(commits)}
    for branch, commit in commits.items():
        (tmp_path / branch).mkdir()
        layout(tmp_path / branch, references[branch])
        hub_cache(tmp_path / "cache", "Salesforce/blip-x", tmp_path / branch, commit, branch)
    for revision, branch in ((None, "main"), ("pr-5", "pr-5"), (commits["pr-5"], "pr-5")):
        ours = HookedBLIP.from_pretrained(
            "Salesforce/blip-x",
            revision=revision,
            cache_dir=tmp_path / "cache",
            token=False,
            local_files_only=True,
        )
        assert_same(state_of(ours), state_of(HookedBLIP.from_hf(references[branch])))
        assert ours.provenance["revision"] == commits[branch]
        assert ours.to_single_token("[ENC]") == ENC


def test_a_toy_is_found_by_name():
    ours = HookedBLIP.from_pretrained("toy-blip-itm")
    assert ours.task == "itm" and ours.to_single_token("circle") > 0


# --- original files


@pytest.fixture
def vocabulary(tmp_path):
    return bert_folder(tmp_path / "bert")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_an_original_file_is_read(task, zipped, tmp_path, vocabulary):
    theirs = reference(task, eps=1e-6)
    state = trained(original(theirs.state_dict()))
    file = pth(tmp_path / "m.pth", state, _use_new_zipfile_serialization=zipped)
    ours = HookedBLIP.from_pretrained(file, processor=vocabulary, config={"vision": {"n_heads": 2}})
    of_hf = HookedBLIP.from_hf(theirs)
    assert ours.cfg == replace(of_hf.cfg, d_proj=ours.cfg.d_proj)  # 1e-6, 64 wide, the ids
    assert_same(state_of(ours), state_of(of_hf))
    assert torch.equal(ours(**inputs()), of_hf(**inputs()))
    ids = ours.prepare(Image.new("RGB", (9, 9)), "a red circle", first_token="enc")["input_ids"]
    assert ids.tolist() == [[ENC, 5, 7, 9, SEP]]


def test_a_pretraining_file_serves_the_task_that_is_asked_for(tmp_path, vocabulary):
    itm, captioning = reference("itm"), reference("captioning", seed=1)
    state = original(captioning.state_dict()) | original(itm.state_dict())
    file = pth(tmp_path / "model_base.pth", trained(state))
    config = {"vision": {"n_heads": 2}}
    for task, theirs in (("itm", itm), ("captioning", captioning)):
        ours = HookedBLIP.from_pretrained(file, processor=vocabulary, task=task, config=config)
        language = {name: t for name, t in state_of(ours).items() if "vision." not in name}
        expected = state_of(HookedBLIP.from_hf(theirs))
        assert_same(language, {name: expected[name] for name in language})


def test_heads_come_from_the_config_or_are_64_wide(tmp_path, vocabulary):
    theirs = reference("itm", heads=4)
    hf_folder(tmp_path / "hf", theirs)
    assert HookedBLIP.from_pretrained(tmp_path / "hf").cfg.text.n_heads == 4
    file = pth(tmp_path / "m.pth", original(theirs.state_dict()))
    ours = HookedBLIP.from_pretrained(file, processor=vocabulary)
    assert (ours.vision.cfg.n_heads, ours.text.cfg.n_heads) == (1, 2)
    config = {"text": {"n_heads": 4}, "vision": {"n_heads": 4, "eps": 1e-5}}
    ours = HookedBLIP.from_pretrained(file, processor=vocabulary, config=config)
    torch.testing.assert_close(ours(**inputs()), theirs(**inputs()).itm_score)


def test_special_tokens_come_from_the_config_or_the_tokenizer(tmp_path, vocabulary):
    hf_folder(tmp_path / "hf", reference("captioning"))
    bert_folder(tmp_path / "hf")  # as released folders: BERT's vocabulary as it is
    file = pth(tmp_path / "m.pth", original(reference("captioning").state_dict()))
    for ours in (
        HookedBLIP.from_pretrained(tmp_path / "hf"),
        HookedBLIP.from_pretrained(file, processor=vocabulary),
        HookedBLIP.from_pretrained(file, processor=processor()),
    ):
        cfg = ours.cfg
        assert (cfg.bos_token_id, cfg.sep_token_id, cfg.pad_token_id) == (DEC, SEP, 0)
        assert ours.to_str_tokens(torch.tensor([DEC, ENC])) == ["[DEC]", "[ENC]"]


# --- no copies, the right numbers


def test_weights_stay_in_the_file_and_tied_ones_stay_tied(tmp_path):
    hf_folder(tmp_path, reference("vqa"))
    ours = HookedBLIP.from_pretrained(tmp_path)
    for stack in ours.stacks.values():
        for block in stack.blocks:
            q, k, v = (getattr(block.attn, name).weight for name in "qkv")
            if stack is ours.vision:
                assert k.data_ptr() - q.data_ptr() == q.nbytes == v.data_ptr() - k.data_ptr()
    maps = Path("/proc/self/maps")  # Linux only
    assert not maps.exists() or str(tmp_path) in maps.read_text()
    assert ours.unembed.out.weight is ours.decoder.embed.weight


def test_from_hf_shares_the_weights():
    theirs = reference("vqa")
    ours = HookedBLIP.from_hf(theirs)
    qkv = theirs.vision_model.encoder.layers[0].self_attn.qkv.weight
    assert ours.vision.blocks[0].attn.q.weight.data_ptr() == qkv.data_ptr()
    embed = theirs.text_decoder.get_input_embeddings().weight
    assert ours.decoder.embed.weight.data_ptr() == embed.data_ptr()
    assert qkv.requires_grad and not ours.vision.blocks[0].attn.q.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", [hf_folder, as_bin])
def test_a_conversion_of_dtype_rounds_each_number_once(layout, dtype, tmp_path):
    theirs = reference("captioning")
    layout(tmp_path, theirs)
    ours = HookedBLIP.from_pretrained(tmp_path, dtype=dtype, device="cpu")
    expected = state_of(HookedBLIP.from_hf(theirs))
    assert_same(state_of(ours), {name: tensor.to(dtype) for name, tensor in expected.items()})
    assert ours.unembed.out.weight is ours.decoder.embed.weight
    assert ours.prepare(Image.new("RGB", (9, 9)), "a circle")["pixel_values"].dtype == dtype


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_merged_adapter_is_read():
    theirs = reference("itm", eps=1e-6)
    config = peft.LoraConfig(r=2, target_modules=["query", "qkv", "dense"], init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        expected = adapted(**inputs()).itm_score
        merged = adapted.merge_and_unload()
    plain = reference("itm", eps=1e-6)(**inputs()).itm_score
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(HookedBLIP.from_hf(merged)(**inputs()), expected)


# --- saving


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_read_by_transformers_and_by_us(task, dtype, tmp_path):
    theirs = reference(task, dtype=dtype)
    ours = HookedBLIP.from_hf(theirs, processor())
    ours.save_pretrained(tmp_path / "new")
    again = HookedBLIP.from_pretrained(tmp_path / "new")
    assert again.cfg == ours.cfg
    assert_same(state_of(again), state_of(ours))
    read, info = CLASSES[task].from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(read.state_dict(), theirs.state_dict())
    feed = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs().items()}
    if task == "vqa":
        feed["decoder_input_ids"] = feed["input_ids"]
    with torch.no_grad():
        for name, value in theirs.eval()(**feed).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, read.eval()(**feed)[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer("[ENC] a circle")["input_ids"] == [2, ENC, 5, 9, SEP]


def test_a_model_is_saved_over_the_files_it_is_mapped_from(tmp_path):
    folder = tmp_path / "m"
    hf_folder(folder, reference("itm"))
    (folder / "mine.txt").write_text("stays")
    ours = HookedBLIP.from_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in state_of(ours).items()}
    with torch.no_grad():
        ours.itm_head.bias += 1
    ours.save_pretrained(folder)
    after = before | {"itm_head.bias": before["itm_head.bias"] + 1}
    assert_same(state_of(ours), after)
    assert_same(state_of(HookedBLIP.from_pretrained(folder)), after)
    assert (folder / "mine.txt").exists() and list(tmp_path.iterdir()) == [folder]


def test_a_model_without_a_processor_is_saved_without(tmp_path):
    ours = HookedBLIP.from_hf(reference("itm"))
    ours.save_pretrained(tmp_path / "new")
    again = HookedBLIP.from_pretrained(tmp_path / "new")
    assert_same(state_of(again), state_of(ours))
    assert again.processor is None


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("what", ["weights", "processor"])
def test_a_failing_save_leaves_nothing_behind(what, there, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    ours = HookedBLIP.from_hf(reference("itm"), processor())
    if there:
        hf_folder(tmp_path / "new", reference("itm", seed=3))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    target = (
        (files, "save_file") if what == "weights" else (type(ours.processor), "save_pretrained")
    )
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match="No space left"):
        ours.save_pretrained(tmp_path / "new")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert list(tmp_path.iterdir()) == ([tmp_path / "new"] if there else [])


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="name a folder"):
        HookedBLIP.from_hf(reference("itm")).save_pretrained(tmp_path / "file")


def test_the_happy_path_is_silent(tmp_path):
    hf_folder(tmp_path / "hf", reference("vqa"))
    ours = HookedBLIP.from_pretrained(tmp_path / "hf")
    cfg = replace(ours.cfg, decoder=replace(ours.cfg.decoder, n_heads=4))
    with torch.device("meta"):
        other = HookedBLIP(cfg)
    other.load_state_dict(ours.state_dict(), assign=True)
    other.unembed.out.weight = other.decoder.embed.weight
    other.processor = ours.processor
    other.save_pretrained(tmp_path / "own")  # transformers has one number of heads for both
    script = f"""
from PIL import Image
from hooked_vlm import HookedBLIP
for folder in {[str(tmp_path / name) for name in ("hf", "own")]}:
    model = HookedBLIP.from_pretrained(folder)
    inputs = model.prepare([Image.new("RGB", ({IMAGE}, 5))] * 2, ["a circle", "what is the color"])
    model(**inputs)
    model.save_pretrained(folder + "-2")
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    # transformers imports torchao where it is installed, and that has notes of its own.
    theirs = ("torchao", "torch/utils/_pytree.py")
    said = [s for s in ran.stderr.splitlines() if not any(name in s for name in theirs)]
    assert (ran.returncode, ran.stdout, said) == (0, "", [])
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("own", "own-2")]
    assert_same(*weights)
