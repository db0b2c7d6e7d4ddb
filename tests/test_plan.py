"""Plans, limits of memory, and sweeps that are ended."""

import functools

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from whole_zoo import FUSED, ZOO
from zoo import HEADS, ITM, QUIET, built, margin, toy

from hooked_vlm import HookedBLIP, HookedLlava
from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs
from hooked_vlm.models.sketch import measured

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("member", ZOO, ids=str)
def test_plans_count_what_sweeps_do(member):
    """The work of a pass of the model itself, counted as it runs, is what the plan says."""
    model = built(member)
    pair = tuple(member.inputs(1, padded=False, seed=s, dtype=torch.float64) for s in (0, 1))
    stack = list(model.stacks)[-1 if member.task != "clip" else 0]
    sites = model.sites(f"{stack}.*hook_z", positions=[-1, 1] if member.task != "clip" else None)
    plan = P.plan(model, pair, sites, lambda x: x.flatten(1)[:, 0], max_rows=3)
    with measured() as work:
        result = P.activation_patching(
            model, pair, sites, lambda x: x.flatten(1)[:, 0], max_rows=3, **QUIET
        )
    assert plan.macs == work.macs
    assert plan.runs == result.data.size
    assert plan.max_rows <= 3 and plan.memory > 0
    assert plan.loop_macs == (plan.runs + 2) * plan.forward_macs


def test_work_is_counted_as_torch_counts_it():
    """Attention in the open, which torch's own counter sees whole."""
    model = built(ITM)
    inputs = ITM.inputs(2, padded=False)
    listen = [("*hook_pattern", lambda x, hook: None)]
    with FlopCounterMode(display=False) as flops, model.hooks(listen):
        model.base_run(**inputs)
    with measured() as work:
        model.base_run(**inputs)
    assert work.macs == flops.get_total_flops() // 2
    linear = sum(m.weight.numel() for m in model.vision.modules() if isinstance(m, torch.nn.Linear))
    assert work.macs > 2 * 5 * linear


def test_the_peak_is_of_what_is_alive_at_one_time():
    with measured() as work:
        large = torch.empty(1000, device="meta")  # 4,000 bytes
        small = large[:10].clone()  # 40; the view itself takes none
        del large
        both = small + small  # 40
    assert work.peak == 4040 and len(both) == 10


@pytest.mark.parametrize("member", FUSED, ids=str)
def test_batches_fit_the_memory(member):
    model = built(member)
    pair = tuple(member.inputs(1, padded=False, seed=s) for s in (0, 1))
    names = f"{member.reader}.blocks.{member.fusion}.cross_attn.heads.*.hook_z"

    def first(x):
        return x.flatten(1)[:, 0]

    wide = P.plan(model, pair, names, first, positions="each")
    least = P.plan(model, pair, names, first, positions="each", max_rows=1)
    limit = (wide.memory + least.memory) // 2
    narrow = P.plan(model, pair, names, first, positions="each", memory=limit)
    assert 1 < narrow.max_rows < wide.max_rows
    assert least.memory <= narrow.memory <= limit
    whole, small = (
        P.activation_patching(model, pair, names, first, "each", memory=room, **QUIET)
        for room in (None, limit)
    )
    np.testing.assert_allclose(whole.data, small.data, rtol=0, atol=1e-12)
    with pytest.raises(MemoryError, match=r"MiB are needed to run .* once .* give more memory="):
        P.activation_patching(model, pair, names, first, memory=1000, **QUIET)


def test_batches_that_do_not_fit_are_halved(monkeypatch):
    model = built(ITM)
    pair = tuple(ITM.inputs(1, padded=False, seed=s) for s in (0, 1))
    expected = P.activation_patching(model, pair, HEADS, margin, "each", **QUIET)
    resume, sizes = type(model).resume, []

    def short(self, base, site, *, rows=None, **kwargs):
        sizes.append(len(rows))
        if self is model and len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return resume(self, base, site, rows=rows, **kwargs)

    monkeypatch.setattr(type(model), "resume", short)
    found = P.activation_patching(model, pair, HEADS, margin, "each", max_rows=8, **QUIET)
    np.testing.assert_array_equal(found.data.isnull(), False)
    np.testing.assert_allclose(found.data, expected.data, rtol=0, atol=1e-12)
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) <= 2
    assert model.list_hooks() == {}

    def never(self, base, site, **kwargs):
        raise MemoryError("no room at all")

    monkeypatch.setattr(type(model), "resume", never)
    with pytest.raises(MemoryError, match=r"no room to run text.blocks.0.*heads.0.hook_z once"):
        P.activation_patching(model, pair, HEADS, margin, max_rows=8, **QUIET)


def test_an_interrupted_sweep_keeps_what_is_done():
    model = built(ITM)
    pair = tuple(ITM.inputs(1, padded=False, seed=s) for s in (0, 1))
    calls = []

    def interrupted(logits):
        calls.append(len(logits))
        if len(calls) == 3:  # the pair, a batch
            raise KeyboardInterrupt
        return margin(logits)

    part = P.activation_patching(model, pair, HEADS, interrupted, max_rows=2, **QUIET)
    whole = P.activation_patching(model, pair, HEADS, margin, max_rows=2, **QUIET)
    assert part.provenance["complete"] is False and whole.provenance["complete"] is True
    done = part.data.notnull()
    assert 0 < done.sum() < part.data.size
    np.testing.assert_array_equal(part.data.where(done), whole.data.where(done))
    assert model.list_hooks() == {}
    calls[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):  # nothing is done yet
        P.activation_patching(model, pair, HEADS, interrupted, **QUIET)


def test_an_interrupted_answer_of_several_tokens_is_not_counted():
    """The answer is read, but its foil is not."""
    model = toy("toy-blip-vqa")
    pairs = shapes_pairs(2, 0, "vqa")
    metric = P.logit_diff("red square", "blue circle", tokens="all")
    site = "text.blocks.0.hook_mlp_out"
    whole = P.activation_patching(model, pairs, site, metric, **QUIET)
    calls, run = [], type(model).base_run

    def interrupted(self, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the foil of the second pair
            raise KeyboardInterrupt
        return run(self, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model), "base_run", interrupted)
        part = P.activation_patching(model, pairs, site, metric, max_rows=4, **QUIET)
    assert part.data[0].item() == whole.data[0].item()
    assert np.isnan([part.data[1].item(), part.clean[1].item(), part.corrupt[1].item()]).all()


@functools.cache
def shapes_of_blip_base():
    """A BLIP-base of shapes alone."""
    config = transformers.BlipConfig(text_config={"num_attention_heads": 12})
    with torch.device("meta"):
        theirs = transformers.BlipForImageTextRetrieval(config).requires_grad_(False)
    return HookedBLIP.from_hf(theirs)


@pytest.mark.parametrize(
    ("tokens", "corrupted", "positions", "law"),
    [(14, "text", None, 52), (9, "image", None, 46), (9, "text", "each", 104)],
)
def test_heads_of_a_blip_base_take_the_work_of_a_few_passes(tokens, corrupted, positions, law):
    """So many times less than one pass for each, counted by hand from the sizes."""
    clean = {"pixel_values": torch.zeros(1, 3, 384, 384), "input_ids": torch.ones(1, tokens).long()}
    changed = "input_ids" if corrupted == "text" else "pixel_values"
    corrupt = clean | {changed: clean[changed] + 1}
    plan = P.plan(shapes_of_blip_base(), (clean, corrupt), HEADS, margin, positions)
    assert plan.runs == 144 * (tokens if positions else 1)
    assert plan.speedup > law


def test_heads_at_llava_7b_widths_take_little_more_than_two_passes():
    """Of shapes alone; the law is `32 n / (2 + 0.025 n)` for n layers."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"model_type": "clip_vision_model", "num_attention_heads": 16}
    text = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008}
    text |= {"num_hidden_layers": 8, "num_attention_heads": 32, "vocab_size": 32064}
    config = transformers.LlavaConfig(
        vision_config=vision | {"image_size": 336, "patch_size": 14},
        text_config=text,
        image_token_index=32000,
    )
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(config).requires_grad_(False)
    model = HookedLlava.from_hf(theirs)
    ids = torch.cat([torch.ones(1, 5), torch.full((1, 576), 32000), torch.ones(1, 35)], 1).long()
    pair = [{"pixel_values": torch.full((1, 3, 336, 336), n), "input_ids": ids} for n in (0.0, 1.0)]
    sites = model.sites("text.blocks.*.attn.heads.*.hook_z", positions=[-1])
    plan = P.plan(model, tuple(pair), sites, P.logit_diff(3, 5))
    assert plan.runs == 256 and plan.forward_equivalents < 2.4
    assert plan.speedup == pytest.approx(32 * 8 / (2 + 0.025 * 8), rel=0.1)
