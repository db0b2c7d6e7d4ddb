"""CLIP's checkpoints: transformers' folders, OpenAI's files, TorchScript archives, and bad ones."""

import json
import os
import pickle
import re
import zipfile
from dataclasses import replace

import openai_clip
import pytest
import torch
import transformers
from checkpoints import assert_same, pth, state_of
from checkpoints import reference as blip_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer
from typer.testing import CliRunner
from zoo import error
from zoo_clip import ClipMember

from hooked_vlm import HookedBLIP, HookedCLIP, HookedVLM
from hooked_vlm.config import ResNetConfig
from weights_conversion import (
    Checkpoint,
    ConversionError,
    clip,
    clip_hf,
    clip_original,
    convert,
    revert,
)
from weights_conversion.__main__ import app

# TorchScript is on its way out of PyTorch; the released files stay what they are.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
START, END = len(VOCAB), len(VOCAB) + 1
# 128 wide, so that heads are 64 wide as in every released file.
VIT = ClipMember((128, 2, 2), (64, 2, 1), image=32, patch=8, vocab=END + 1, mlp=4, eos=END)
RESNET = replace(VIT, vision=(4, 2, (2, 1, 1, 2)))  # the pool is 128 wide
MEMBERS = [VIT, RESNET]
each = pytest.mark.parametrize("member", MEMBERS, ids=["vit", "resnet"])


def processor(image=32):
    """The processor of these checkpoints; the vocabulary spells, and knows the word 'red'."""
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate([*VOCAB, "<|startoftext|>", "<|endoftext|>"])},
        merges=[("r", "e"), ("re", "d</w>")],
    )
    sizes = {"size": {"shortest_edge": image}, "crop_size": {"height": image, "width": image}}
    return CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip-vocabulary")
    processor().tokenizer.save_pretrained(folder)
    return folder


def reference(member=VIT, dtype=torch.float32):
    return member.pair(dtype)[0]


def hf_folder(folder, model, **how):
    model.save_pretrained(folder, **how)
    processor().save_pretrained(folder)
    return folder


def plain(member):
    """The model in plain PyTorch, under OpenAI's names."""
    return member.openai().float()


def released(member, model=None):
    """What a state dict of OpenAI's holds."""
    return openai_clip.released(model or plain(member), member.image, member.n_ctx, member.vocab)


# --- tables


def test_transformers_layout_goes_both_ways():
    theirs = reference().state_dict()
    model = HookedCLIP.from_hf(reference())
    ours, shapes = state_of(model), clip.shapes(model.cfg)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes
    assert_same(convert(theirs, clip_hf.RULES, shapes), ours)
    assert_same(revert(ours, clip_hf.RULES), theirs)
    buffers = {
        f"{tower}_model.embeddings.position_ids": torch.arange(5)[None]
        for tower in ("vision", "text")
    }
    assert_same(convert(theirs | buffers, clip_hf.RULES, shapes), ours)
    heads = (model.vision.cfg.n_heads, model.text.cfg.n_heads)
    assert heads == (2, 1) and model.cfg.eos_token_id == END


@each
def test_openais_layout_goes_both_ways(member):
    theirs = released(member)
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    cfg = clip_original.config(shapes, {})
    rules = clip_original.rules(cfg)
    ours = convert(theirs, rules, clip.shapes(cfg))
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == clip.shapes(cfg)
    back = revert(ours, rules)
    assert_same(back, {name: theirs[name] for name in back})
    left = set(theirs) - set(back)
    assert all(re.fullmatch(r"input_resolution|.*_(size|length|tracked)", name) for name in left)
    assert cfg.vision.n_heads * 64 == cfg.vision.d_model == 128 and cfg.text.n_heads == 1
    assert (cfg.vision.image_size, cfg.text.n_ctx, cfg.text.d_vocab) == (32, 12, END + 1)
    with torch.device("meta"):
        model = HookedCLIP(cfg)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == clip.shapes(cfg)


def test_every_line_of_the_tables_is_used():
    tables = [(clip_hf.RULES, reference().state_dict())]
    for member in MEMBERS:
        state = released(member)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        tables.append((clip_original.rules(clip_original.config(shapes, {})), state))
    for rules, names in tables:
        for rule in rules:
            if rule.targets:
                pattern = re.escape(rule.source).replace(r"\{l\}", r"\d+")
                pattern = pattern.replace(r"\{p\}", "(weight|bias)")
                assert any(re.fullmatch(pattern, name) for name in names), rule


def test_the_sizes_of_released_resnets_are_read():
    for stages, width, size, heads in (
        ((3, 4, 6, 3), 64, 224, 32),
        ((6, 8, 18, 8), 96, 384, 48),  # RN50x16
    ):
        with torch.device("meta"):
            vision = openai_clip.ModifiedResNet(stages, width, size, heads, 512)
            theirs = openai_clip.CLIP(vision, 512, 512, 12, 8, 49408, 77)
        shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
        cfg = clip_original.config(shapes, {})
        assert cfg.vision == ResNetConfig(
            stages=stages, width=width, n_heads=heads, image_size=size
        )
        assert (cfg.d_proj, cfg.text.n_heads, cfg.text.n_layers) == (512, 8, 12)
        assert cfg.vision.d_model == 32 * width and cfg.vision.grid == size // 32


# --- where checkpoints come from


@pytest.mark.parametrize("how", [{}, {"max_shard_size": "200KB"}])
def test_a_folder_of_transformers(how, tmp_path):
    theirs = reference()
    hf_folder(tmp_path, theirs, **how)
    ours = HookedCLIP.from_pretrained(tmp_path)
    assert_same(state_of(ours), state_of(HookedCLIP.from_hf(theirs)))
    assert isinstance(HookedVLM.from_pretrained(tmp_path), HookedCLIP)
    assert ours.task == "clip" and not ours.training
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    given = processor()(images=[image], text=["red", "a bed"], padding=True, return_tensors="pt")
    inputs = ours.prepare(image, ["red", "a bed"])
    assert {name: value.tolist() for name, value in inputs.items()} == {
        name: value.tolist() for name, value in given.items()
    }
    assert inputs["input_ids"][0].tolist()[:3] == [START, VOCAB.index("red</w>"), END]
    with torch.no_grad():
        assert error(ours(**inputs), theirs(**given).logits_per_image) < 1e-5


@each
def test_openais_files(member, tmp_path, vocabulary):
    model = plain(member)
    inputs = member.inputs(2, dtype=torch.float32)
    with torch.no_grad():
        expected = model(inputs["pixel_values"], inputs["input_ids"])
    traced = torch.jit.trace(
        model, (inputs["pixel_values"], inputs["input_ids"]), check_trace=False
    )
    state = tmp_path / "state.pt"
    torch.save(released(member, model), state)
    traced.save(archive := tmp_path / "archive.pt")
    files = [state, archive, pth(tmp_path / "wrapped.pth", released(member, model))]
    opened = [HookedCLIP.from_pretrained(file, processor=vocabulary) for file in files]
    for ours in opened:
        assert error(ours(**inputs), expected) < 1e-5
        assert_same(state_of(ours), state_of(opened[0]))
        assert ours.cfg.eos_token_id == END  # the tokenizer's
        assert ours.processor.image_processor.crop_size == {"height": 32, "width": 32}
        shape = ours.prepare(Image.new("RGB", (90, 70)), "red")["pixel_values"].shape
        assert shape == (1, 3, 32, 32)


@each
def test_an_archive_in_half_precision(member, tmp_path, vocabulary):
    """As released: matrices in float16, norms and tables in float32; opened in the wider."""
    model = plain(member)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.half()
    torch.jit.save(scripted_holder(model), file := tmp_path / "RN50x16.pt")
    ours = HookedCLIP.from_pretrained(file, processor=vocabulary)
    inputs = member.inputs(2, dtype=torch.float32)
    with torch.no_grad():
        expected = model.float()(inputs["pixel_values"], inputs["input_ids"])
    assert ours.dtype == torch.float32 and error(ours(**inputs), expected) < 1e-5
    half = HookedCLIP.from_pretrained(file, processor=vocabulary, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    inputs["pixel_values"] = inputs["pixel_values"].half()
    assert error(half(**inputs).float(), expected) < 2e-2


def scripted_holder(model):
    """A module that holds the tensors of another under the same names, and can be scripted."""
    holder = torch.nn.Module()
    for name, tensor in model.state_dict().items():
        *path, leaf = name.split(".")
        at = holder
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_buffer(leaf, tensor)
    return torch.jit.script(holder)


def test_heads_and_image_sizes_can_be_given(tmp_path, vocabulary):
    files = [pth(tmp_path / f"{i}.pt", released(member)) for i, member in enumerate(MEMBERS)]
    config = {"vision": {"n_heads": 4}, "text": {"n_heads": 2}}
    for file in files:
        ours = HookedCLIP.from_pretrained(file, processor=vocabulary, config=config)
        assert (ours.vision.cfg.n_heads, ours.text.cfg.n_heads) == (4, 2)
        wide = {"vision": {"image_size": 64}}
        ours = HookedCLIP.from_pretrained(file, processor=vocabulary, config=wide)
        inputs = ours.prepare(Image.new("RGB", (90, 70)), "red")
        assert inputs["pixel_values"].shape[-1] == 64 and ours(**inputs).shape == (1, 1)


# --- writing


def test_a_vision_transformer_is_written_for_transformers(tmp_path, vocabulary):
    theirs = reference()
    ours = HookedCLIP.from_hf(theirs, processor=processor())
    ours.save_pretrained(tmp_path / "out")
    read = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    assert_same(read.state_dict(), theirs.state_dict())
    for part in ("text_config", "vision_config"):
        got, expected = (getattr(m.config, part).to_dict() for m in (read, theirs))
        sizes = [name for name in got if name.endswith(("_size", "_act", "_eps", "_id", "_heads"))]
        assert {name: got[name] for name in sizes} == {name: expected[name] for name in sizes}
    inputs = VIT.inputs(2, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(
            read(**inputs).logits_per_image, _sdpa(theirs)(**inputs).logits_per_image
        )
    again = HookedCLIP.from_pretrained(tmp_path / "out")
    assert again.cfg == ours.cfg
    assert_same(state_of(again), state_of(ours))
    # Not bit for bit: where a mapped weight lies decides which kernel a convolution takes.
    torch.testing.assert_close(again(**inputs), ours(**inputs))
    # From OpenAI's file as well: what was transposed there is written contiguous here.
    file = pth(tmp_path / "ViT.pt", released(VIT))
    direct = HookedCLIP.from_pretrained(file, processor=vocabulary)
    direct.save_pretrained(tmp_path / "direct")
    read = transformers.CLIPModel.from_pretrained(tmp_path / "direct").eval()
    with torch.no_grad():
        assert error(direct(**inputs), read(**inputs).logits_per_image) < 1e-5


def _sdpa(model):
    model.set_attn_implementation("sdpa")
    return model


def test_a_resnet_is_written_for_us(tmp_path, vocabulary):
    file = pth(tmp_path / "RN.pt", released(RESNET))
    ours = HookedCLIP.from_pretrained(file, processor=vocabulary)
    ours.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "hooked_clip" and config["vision"]["stages"] == [2, 1, 1, 2]
    again = HookedCLIP.from_pretrained(tmp_path / "out")
    assert again.cfg == ours.cfg
    assert_same(state_of(again), state_of(ours))
    assert isinstance(HookedVLM.from_pretrained(tmp_path / "out"), HookedCLIP)
    image = Image.effect_noise((50, 40), 80)
    inputs = ours.prepare(image, ["red", "a bed"])
    assert error(again(**again.prepare(image, ["red", "a bed"])), ours(**inputs)) < 1e-6


@each
def test_the_command_writes_a_folder(member, tmp_path, vocabulary):
    """Of an archive in two types, and of another resolution."""
    model = plain(member)
    model.token_embedding.half()
    torch.jit.save(scripted_holder(model), file := tmp_path / "RN50x16.pt")
    out = tmp_path / "out"
    command = [str(file), str(out), "--processor", str(vocabulary), "--image-size", "64"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "HookedCLIP, task clip, in the layout of" in result.output
    wide = {"vision": {"image_size": 64}}
    direct = HookedCLIP.from_pretrained(file, processor=vocabulary, config=wide)
    ours = HookedCLIP.from_pretrained(out)
    assert ours.cfg == direct.cfg and ours.dtype == torch.float32
    assert_same(state_of(ours), state_of(direct))
    image = Image.effect_noise((90, 70), 80)
    inputs = ours.prepare(image, ["red", "a bed"])
    assert inputs["pixel_values"].shape[-1] == 64
    assert error(ours(**inputs), direct(**direct.prepare(image, ["red", "a bed"]))) < 1e-6
    if member is VIT:
        read = transformers.CLIPModel.from_pretrained(out).eval()
        with torch.no_grad():
            assert error(ours(**inputs), read(**inputs).logits_per_image) < 1e-5


# --- what is wrong


def refused(where, says, kind=ConversionError, **how):
    with pytest.raises(kind, match=says) as caught:
        HookedCLIP.from_pretrained(where, **how)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


def test_other_families_are_refused_by_name(tmp_path):
    blip = blip_reference("itm")
    blip.save_pretrained(tmp_path / "blip")
    refused(tmp_path / "blip", "family of HookedBLIP, which opens it; HookedCLIP does not")
    with pytest.raises(ConversionError, match="family of HookedBLIP"):
        HookedCLIP.from_hf(blip)
    hf_folder(tmp_path / "clip", reference())
    for where in (tmp_path / "clip", pth(tmp_path / "clip.pt", released(RESNET))):
        with pytest.raises(ConversionError, match="family of HookedCLIP, which opens it"):
            HookedBLIP.from_pretrained(where)
    with pytest.raises(ConversionError, match="family of HookedCLIP"):
        HookedBLIP.from_hf(reference())
    vision = transformers.CLIPVisionConfig(num_hidden_layers=1).to_dict()
    (tmp_path / "clip" / "config.json").write_text(json.dumps(vision))
    refused(tmp_path / "clip", "'clip_vision_model'; HookedCLIP reads 'clip', 'hooked_clip'")
    refused(tmp_path / "clip" / "model.safetensors", "without the config.json.* name the folder")
    refused(pth(tmp_path / "x.pt", {"fc.weight": torch.zeros(2)}), "missing: .* in every CLIP")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"vision_config": {"image_size": [32, 32]}}, "image_size is .32, 32., .*needs one number"),
        ({"text_config": {"eos_token_id": [3, 4]}}, "eos_token_id is .3, 4."),
        ({"text_config": {"num_attention_heads": 7}}, "not a multiple of"),
        ({"vision_config": {"hidden_size": "wide"}}, "no CLIP configuration"),
        ({"vision_config": {"patch_size": 7}}, "not a multiple of patch_size=7"),
        ({"model_type": "hooked_clip"}, "none of ours: 'vision'"),
    ],
)
def test_a_config_that_is_wrong(config, says, tmp_path):
    hf_folder(tmp_path, reference())
    found = json.loads((tmp_path / "config.json").read_text())
    for name, value in config.items():
        found[name] = found[name] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(found))
    refused(tmp_path, says)


@each
def test_tensors_that_do_not_fit(member, tmp_path, vocabulary):
    whole = released(member)
    block = "visual.transformer.resblocks.0.ln_1.bias"
    if member is RESNET:
        block = "visual.layer2.0.bn2.running_var"
    without = {name: tensor for name, tensor in whole.items() if name != block}
    ours = "vision.blocks.0.ln1.bias" if member is VIT else "vision.blocks.2.conv2.norm.var"
    for state, says in (
        (without, f"missing: nothing fills '{ours}'"),
        (whole | {"visual.head.weight": torch.zeros(3)}, "left over: 'visual.head.weight' [3]"),
        (whole | {block: torch.zeros(7)}, f"wrong shape: '{block}' is [7]"),
        (whole | {"logit_scale": torch.zeros(2)}, "wrong shape: 'logit_scale' is [2]"),
    ):
        refused(pth(tmp_path / "m.pt", state), re.escape(says), processor=vocabulary)
    for name in ("text_projection", "visual.conv1.weight", "token_embedding.weight"):
        state = {key: tensor for key, tensor in whole.items() if key != name}
        refused(pth(tmp_path / "m.pt", state), f"missing: '{name}' is in every CLIP")


def test_overrides_that_do_not_fit(tmp_path, vocabulary):
    file = pth(tmp_path / "m.pt", released(RESNET))
    for config, says in (
        ({"decoder": {"n_heads": 4}}, "names .'decoder'.*vision and text"),
        ({"text": {"heads": 4}}, "unexpected keyword argument 'heads'"),
        ({"vision": {"n_heads": 5}}, "no multiple of n_heads=5"),
        ({"vision": {"image_size": 40}}, "image_size=40 is not a multiple of 32"),
    ):
        refused(file, says, config=config, processor=vocabulary)
    refused(file, "task='itm', but the tensors are those of clip", task="itm")
    narrow = pth(tmp_path / "n.pt", released(replace(VIT, text=(40, 1, 2))))
    refused(narrow, "text is 40 wide.*pass config=", processor=vocabulary)
    hf_folder(tmp_path / "hf", reference())
    refused(tmp_path / "hf", "config= is for bare files", config={"text": {"n_heads": 4}})


def test_processors_that_are_missing_or_another_models(tmp_path):
    file = pth(tmp_path / "m.pt", released(VIT))
    refused(file, "'openai/clip-vit-base-patch32' could not be had.*processor=", FileNotFoundError)
    refused(tmp_path / "absent.pt", "neither a file nor a folder", FileNotFoundError)
    big = processor()
    big.tokenizer.add_tokens(["more"])
    big.save_pretrained(tmp_path / "big")
    says = rf"has {END + 2} tokens, the weights know {END + 1}; pass processor="
    refused(file, says, ValueError, processor=tmp_path / "big")
    big.tokenizer.eos_token = None
    refused(file, "the tokenizer has no eos_token_id", ValueError, processor=big)


# --- archives


class Small(torch.nn.Module):
    """What archives hold besides tensors."""

    table: dict[str, int]

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.more = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False)])
        self.register_buffer("tied", self.linear.weight.detach()[:, 1:])
        self.number, self.name, self.sizes, self.kept = 5, "x", [1, 2], [torch.ones(2)]
        self.table, self.shares = {"a": 1}, [0.5]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.number


def test_an_archive_holds_its_state_dict(tmp_path):
    model = Small()
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        torch.jit.script(model.to(dtype)).save(file := tmp_path / "small.pt")
        checkpoint = Checkpoint([file])
        state = checkpoint.read(checkpoint.shapes)
        assert_same(state, dict(model.state_dict()))
        assert_same(checkpoint.read(checkpoint.shapes), state)  # again, from the file


def rewritten(source, target, data):
    """An archive with another pickle in it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            content = data if info.filename.endswith("/data.pkl") else old.read(info)
            new.writestr(info.filename, content)
    return target


class Call:
    def __init__(self, what, *arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


def test_an_archive_that_would_run_something_is_refused_by_name(tmp_path):
    torch.jit.script(Small()).save(good := tmp_path / "good.pt")
    target = tmp_path / "ran"
    for payload, named in (
        (Call(os.mkdir, str(target)), "mkdir"),
        (Call(eval, f"open({str(target)!r}, 'w')"), "eval"),
        (Call(getattr, "text", "upper"), "getattr"),
        (Call(torch.jit.load, str(good)), "torch.jit._serialization.load"),
    ):
        file = rewritten(good, tmp_path / "bad.pt", pickle.dumps(payload, protocol=2))
        says = refused(file, "could run code, so it is refused")
        assert named in says and str(file) in says and not target.exists()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (pickle.dumps({"a": 1}, protocol=2), "holds no module but dict"),
        (b"", "cut short"),
        (b"\x80\x02c__torch__\nM\n.", "holds no module but type"),
        # A module as its own part, and a tensor that reaches beyond its storage.
        (b"\x80\x02c__torch__\nM\nq\x00)\x81q\x01}X\x01\x00\x00\x00xh\x01sb.", "recursion"),
        (
            b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n"
            b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            b"J\x00\x00\x00\x7ftQK\x00(J\x00\x00\x00\x7ft(K\x01t\x89NtRsb.",
            "out of bounds",
        ),
    ],
)
def test_an_archive_of_something_else(data, says, tmp_path):
    torch.jit.script(Small()).save(good := tmp_path / "good.pt")
    file = rewritten(good, tmp_path / "bad.pt", data)
    assert says in refused(file, "cannot be read as a PyTorch checkpoint|refused")


@settings(max_examples=40)
@given(data=st.data())
def test_an_archive_that_is_cut_short_or_damaged(data, tmp_path_factory):
    at = tmp_path_factory.mktemp("archive")
    torch.jit.script(Small()).save(file := at / "m.pt")
    whole = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(ConversionError, match=re.escape(str(file))):
            Checkpoint([file])
        return
    start = data.draw(st.integers(0, len(whole) - 8))
    whole[start : start + 8] = data.draw(st.binary(min_size=8, max_size=8))
    file.write_bytes(whole)
    try:
        Checkpoint([file])
    except ConversionError as error:
        assert str(file) in str(error)


# --- shapes of the world


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_half_precision_stays(kind, tmp_path):
    theirs = reference().half()
    hf_folder(tmp_path, theirs)
    if kind == "bin":
        state = load_file(tmp_path / "model.safetensors")
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours = HookedCLIP.from_pretrained(tmp_path)
    assert ours.dtype == torch.float16
    assert_same(state_of(ours), state_of(HookedCLIP.from_hf(theirs)))
    ours.save_pretrained(tmp_path / "out")
    read = transformers.CLIPModel.from_pretrained(tmp_path / "out", dtype="auto")
    assert_same(read.state_dict(), theirs.state_dict())


def test_a_file_of_two_types_is_widened(tmp_path):
    hf_folder(tmp_path, reference())
    state = load_file(tmp_path / "model.safetensors")
    mixed = {n: t.half() if "fc1" in n else t for n, t in state.items()}
    save_file(mixed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = HookedCLIP.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
