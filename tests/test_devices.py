"""Large checkpoints in shards, several devices, the CPU and the disk."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_llava import processor
from torch import nn
from torch.overrides import TorchFunctionMode
from zoo import error
from zoo_llava import LLAMA, MISTRAL

from hooked_vlm import HookedBLIP, HookedLlava, HookedVLM
from hooked_vlm.data.shapes import scenes
from hooked_vlm.models import devices, loading
from weights_conversion import ConversionError, InMemory, plan
from weights_conversion.rules import rename

each = pytest.mark.parametrize("member", [LLAMA, MISTRAL], ids=str)
DISK = {"": "cpu", "text.blocks": "disk", "vision.blocks.1": "disk", "unembed": "disk"}
SITES = ["vision.blocks.0.hook_resid_post", "text.blocks.0.attn.heads.1.hook_z"]


def shards(folder, member=LLAMA, dtype=torch.float32):
    theirs = member.reference().to(dtype)
    theirs.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return theirs


def zero(value, hook):
    return value * 0


def numbers(model, inputs):
    """What a model gives in every way of running it."""
    logits, cache = model.run_with_cache(**inputs)
    found = dict(cache) | {"logits": logits}
    _, few = model.run_with_cache(**inputs, names_filter="text.blocks.1.attn.hook_result")
    found |= few
    for site in SITES:
        patch = [(site, zero)]
        found[f"patched {site}"] = model.run_with_hooks(**inputs, fwd_hooks=patch)
        base = model.base_run(**inputs)
        found[f"resumed {site}"] = model.resume(base, site, rows=[0, 0, 1], fwd_hooks=patch)
    for site in model.sites("text.blocks.*.hook_resid_pre", positions=[-2]):
        patch = [(site.name, zero)]
        found[f"from {site}"] = model.resume(base, site, rows=[2, 0, 1, 1], fwd_hooks=patch)
    first = {name: value[:1] for name, value in inputs.items()}  # the longest: not padded
    found["generated"] = model.generate(**first, max_new_tokens=3, do_sample=False)
    _, stopped = model.run_with_cache(**inputs, stop_at="text.blocks.0.hook_resid_mid")
    found |= {f"stopped {name}": value for name, value in stopped.items()}
    _, grads = model.run_with_cache(
        **inputs,
        names_filter="*.hook_resid_post",
        incl_bwd=True,
        metric=lambda logits: logits[:, -1].square().sum(),
    )
    found |= grads
    for name in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"):
        found[name] = getattr(model.text, name)
    return found | {"W_E": model.W_E, "W_U": model.W_U}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert error(value, expected[name]) <= (1e-14 if value.dtype == torch.float64 else 1e-6), (
            name
        )


# --- shards


@each
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_shards_are_read_in_any_dtype(member, saved, dtype, tmp_path):
    expected = HookedLlava.from_hf(shards(tmp_path, member, saved)).state_dict()
    found = HookedLlava.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(dtype or saved)), name
        assert tensor.dtype == (dtype or saved)


def test_what_is_of_the_wanted_dtype_stays_in_its_shard(tmp_path):
    shards(tmp_path, dtype=torch.bfloat16)
    model = HookedLlava.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    maps = Path("/proc/self/maps")  # Linux only
    if maps.exists():
        mapped = maps.read_text()
        assert all(str(file) in mapped for file in tmp_path.glob("model-*.safetensors"))
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_of_a_conversion_stay_near_the_size_of_what_is_made(source, target):
    layers = 40
    state = {f"{i}": torch.empty(1000, dtype=source) for i in range(layers)}
    state["big"] = torch.empty(4000, dtype=source)
    files = InMemory(state)
    steps = plan(files.shapes, [rename(name, name) for name in state], files.shapes)
    whole, made, seen = target.itemsize * 1000 * (layers + 4), 0, []
    for part in loading._parts(steps, files, target, set()):
        made += sum(target.itemsize * len(state[step.source]) for step in part)
        mapped = sum(state[step.source].nbytes for step in part)
        seen += [step.source for step in part]
        if len(part) > 1:  # the next tensor must be read, however little room there is
            assert made + mapped <= 1.05 * whole
    assert sorted(seen) == sorted(state) and made == whole


def test_a_shard_that_is_missing_or_cut_short_is_named(tmp_path):
    shards(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConversionError, match=f"{shard.name} cannot be read.*cut short"):
        HookedLlava.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names {shard.name}, which is not there"):
        HookedLlava.from_pretrained(tmp_path)


def test_a_tensor_that_no_shard_holds_is_named(tmp_path):
    shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    read = json.loads(index.read_text())
    lost = read["weight_map"].pop(next(n for n in read["weight_map"] if "mm_" not in n))
    read["weight_map"] = {n: file for n, file in read["weight_map"].items() if file != lost}
    index.write_text(json.dumps(read))
    with pytest.raises(ConversionError, match="missing: nothing fills"):
        HookedLlava.from_pretrained(tmp_path)


# --- what is refused before anything is read: none of these folders is there


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"dtype": torch.int8}, "dtype=torch.int8 is none that a model can run in on 'cpu'"),
        ({"dtype": torch.float8_e4m3fn}, "dtype=torch.float8_e4m3fn .* use torch.float32"),
        ({"dtype": torch.complex64}, "it has no fractions"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"device_map": {"": "cuda:99"}}, "device 'cuda:99' cannot be used here"),
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"max_memory": {"cpu": "1GB"}}, "go with device_map="),
        ({"offload_folder": "there"}, "go with device_map="),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(how, says):
    with pytest.raises(ValueError, match=says):
        HookedLlava.from_pretrained("/nowhere", **how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_refused():
    for how in ({"device": "cuda"}, {"device_map": "cuda"}):
        with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
            HookedLlava.from_pretrained("/nowhere", **how)


# --- maps


@each
@pytest.mark.parametrize("device_map", ["auto", "sequential", "cpu", DISK], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_mapped_model_gives_the_numbers_of_the_plain_one(member, device_map, dtype, tmp_path):
    shards(tmp_path / "model", member)
    plain = HookedLlava.from_pretrained(tmp_path / "model", dtype=dtype)
    inputs = member.inputs(dtype=plain.dtype)
    model = HookedLlava.from_pretrained(
        tmp_path / "model", dtype=dtype, device_map=device_map, offload_folder=tmp_path / "off"
    )
    assert_equal(numbers(model, inputs), numbers(plain, inputs))


def test_what_is_on_the_disk_is_mapped(tmp_path):
    shards(tmp_path / "model")
    off = tmp_path / "off"
    device_map = {"": "cpu", "text.blocks.1": "disk"}
    same = HookedLlava.from_pretrained(tmp_path / "model", device_map=device_map)
    model = HookedLlava.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, device_map=device_map, offload_folder=off
    )
    names = {f"text.blocks.1.{n}" for n, _ in model.text.blocks[1].named_parameters()}
    assert {file.name for file in off.iterdir()} == {f"{name}.safetensors" for name in names}
    assert same.device_map["text.blocks.1"] == model.device_map["text.blocks.1"] == "disk"
    assert model.device_map["text.blocks.0"] == torch.device("cpu")
    maps = Path("/proc/self/maps")  # Linux only
    if maps.exists():
        mapped = maps.read_text()
        assert all(str(off / f"{name}.safetensors") in mapped for name in names)
    # Another model over the same folder leaves the first one's files as they are.
    before = model.text.W_Q.clone()
    other = shards(tmp_path / "other")
    with torch.no_grad():
        other.model.language_model.layers[1].self_attn.q_proj.weight.zero_()
    other.save_pretrained(tmp_path / "other", max_shard_size="10KB")
    HookedLlava.from_pretrained(
        tmp_path / "other", dtype=torch.bfloat16, device_map=device_map, offload_folder=off
    )
    assert torch.equal(model.text.W_Q, before)


def test_inputs_are_put_where_the_first_stack_is(tmp_path):
    shards(tmp_path)
    model = HookedLlava.from_pretrained(tmp_path, device_map="meta", processor=processor())
    inputs = model.prepare(Image.new("RGB", (9, 9)), "what is it ?")
    assert {tensor.device.type for tensor in inputs.values()} == {"meta"} == {model.device.type}


def test_other_families_take_maps_too():
    plain = HookedBLIP.from_pretrained("toy-blip-itm")
    model = HookedBLIP.from_pretrained("toy-blip-itm", device_map={"": "cpu", "text": "disk"})
    pixels = torch.zeros(1, 3, *[plain.cfg.vision.image_size] * 2)
    ids = torch.tensor([[2, 5, 6, 3]])
    assert torch.equal(model(pixels, ids), plain(pixels, ids))


def test_a_map_that_does_not_fit_in_memory_says_how_much(tmp_path):
    shards(tmp_path)
    size = sum(p.nbytes for p in HookedLlava.from_pretrained(tmp_path).parameters())
    needed, mine = f"{size / 1e6:.2f} MB", {"cpu": 30_000}
    for device_map in ("cpu", {"": "cpu"}):
        with pytest.raises(ValueError, match="does not fit in memory") as caught:
            HookedLlava.from_pretrained(tmp_path, device_map=device_map, max_memory=mine)
        assert f"need {needed}" in str(caught.value)
        assert "room for 0.03 MB on cpu" in str(caught.value)
    model = HookedLlava.from_pretrained(tmp_path, device_map="auto", max_memory=mine)
    assert "disk" in model.device_map.values()  # where it is already
    with pytest.raises(ValueError, match=r"name a folder .* by offload_folder=") as caught:
        HookedLlava.from_pretrained(
            tmp_path, dtype=torch.bfloat16, device_map="auto", max_memory=mine
        )
    assert f"need {size / 2e6:.2f} MB" in str(caught.value)
    assert "room for 0.03 MB on cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ({"": "cpu", "text.block.1": "disk"}, "names 'text.block.1'.*nearest: 'text.blocks"),
        ({"vision": "cpu", "projector": "cpu"}, "has no device for 'text.embed'"),
        ({"": "cpu", "text.blocks.0.attn": "disk"}, "a part of 'text.blocks.0', which runs on one"),
    ],
)
def test_a_map_that_does_not_fit_the_model(device_map, says, tmp_path):
    shards(tmp_path)
    with pytest.raises(ValueError, match=says):
        HookedLlava.from_pretrained(tmp_path, device_map=device_map)


# --- accelerators that this machine need not have


class Devices(TorchFunctionMode):
    """Lets tensors say that they are on devices that are not there, and holds torch to it.

    All is computed on the CPU. A tensor is where it was made or moved to; an operation on tensors
    of several devices raises, as CUDA's would, but for an index on the CPU.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return self.of(args[0])
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        there = {self.of(t) for t in self.tensors((args, kwargs)) if t.dim()}
        if "getitem" in name or "index" in name:
            there = {self.of(args[0])} | (there - {torch.device("cpu")})
        assert len(there) < 2, f"{name} of tensors on {there}"
        device = kwargs.pop("device", None)
        if device is None and there:
            device = there.pop()
        elif device is None:
            device = next(map(self.of, self.tensors((args, kwargs))), "cpu")
        result = func(*args, **kwargs)
        for tensor in self.tensors(result):
            tensor.place = torch.device(device)
        return result

    def to(self, tensor, *args, **kwargs):
        what = [*args, *kwargs.values()]
        what = [one for one in what if one is not None]
        others = [one for one in what if isinstance(one, torch.Tensor)]
        dtypes = [one for one in what if isinstance(one, torch.dtype)] + [t.dtype for t in others]
        places = [one for one in what if isinstance(one, str | torch.device)]
        place = torch.device([*places, *map(self.of, others), self.of(tensor)][0])
        new = tensor.to(*dtypes[:1]) if dtypes else tensor
        if place != self.of(tensor) or new is not tensor:
            new = new.clone() if new is tensor else new
            new.place = place
        return new

    def of(self, tensor):
        return getattr(tensor, "place", torch.device("cpu"))

    def tensors(self, value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for one in value.values():
                yield from self.tensors(one)
        elif isinstance(value, list | tuple):
            for one in value:
                yield from self.tensors(one)


MAPS = [
    {"": "cuda:0", "text.blocks.1": "cuda:1", "text.ln_final": "cuda:1", "unembed": "cuda:1"},
    {"": "cuda:1", "vision": "cuda:0", "projector": "cpu"},
    {"": "cuda:0", "text.blocks": "cpu", "vision.blocks.0": "disk", "unembed": "disk"},
    {"": "cpu", "vision": "cuda:0"},
]


@each
@pytest.mark.parametrize("device_map", MAPS, ids=str)
def test_everything_follows_to_the_devices_of_the_blocks(member, device_map, tmp_path):
    plain = member.model(torch.float32)
    inputs = member.inputs(dtype=torch.float32)
    expected = numbers(plain, inputs)
    model = member.model(torch.float32)
    placement = devices.place(model, device_map, None)
    for name, parameter in model.named_parameters():
        home = placement.homes[name]
        parameter.place = torch.device("cpu" if home == "disk" else home)
    placement.connect(model)
    with Devices():
        assert model.device == placement.main != torch.device("cpu")
        given = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        seen = {}

        def look(value, hook):
            seen[hook.name] = value.device

        model.run_with_hooks(**given, fwd_hooks=[("text.blocks.*.hook_resid_post", look)])
        runs = [placement.runs[f"text.blocks.{layer}"] for layer in range(len(seen))]
        assert list(seen.values()) == runs
        assert model(**given).device == model.device
        found = numbers(model, given)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "name", ["toy-blip-itm", "toy-blip-vqa", "toy-albef", "toy-clip", "toy-clip-resnet"]
)
def test_every_family_follows(name):
    plain, model = HookedVLM.from_pretrained(name), HookedVLM.from_pretrained(name)
    turns = {unit: f"cuda:{i % 2}" for i, (unit, _) in enumerate(devices.units(model))}
    placement = devices.place(model, turns, None)
    for path, parameter in model.named_parameters():
        parameter.place = placement.homes[path]
    placement.connect(model)
    pictures = [scene.image() for scene in scenes(2 if "clip" in name else 1, seed=1)]
    inputs = dict(plain.prepare(pictures, ["a red circle", "a blue square"]))
    sites = [f"{stack}.blocks.1.hook_resid_pre" for stack in plain.stacks]

    def numbers(model, inputs):
        found = {"logits": model(**inputs)}
        base = model.base_run(**inputs)
        for site in sites:
            patch = [(site, zero)]
            found[f"patched {site}"] = model.run_with_hooks(**inputs, fwd_hooks=patch)
            found[f"resumed {site}"] = model.resume(base, site, rows=[1, 0], fwd_hooks=patch)
        return found

    expected = numbers(plain, inputs)
    with Devices():
        found = numbers(model, {name: tensor.to(model.device) for name, tensor in inputs.items()})
    for what, value in found.items():
        assert error(value, expected[what]) < 1e-5, what


def test_weights_go_home_when_a_unit_raised():
    unit = nn.Linear(2, 2)
    visit = devices.Visit(torch.device("meta"))
    unit.register_forward_pre_hook(visit.arrive, with_kwargs=True)
    unit.register_forward_hook(visit.leave, always_call=True)
    weight = unit.weight
    assert unit(torch.ones(1, 2)).device.type == "meta"
    assert unit.weight is weight and weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match=r"reduction dim|shape"):
        unit(torch.ones(1, 3))
    assert unit.weight is weight
