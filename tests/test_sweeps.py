"""Places, metrics, limits and faults of sweeps."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from whole_zoo import FUSED, ZOO
from zoo import BLIP
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP, HookedLlava
from hooked_vlm import patching as P
from hooked_vlm.data import Pair, read_pairs, shapes_pairs
from hooked_vlm.models.names import Site
from hooked_vlm.models.sketch import measured
from hooked_vlm.patching.result import PatchingResult

QUIET = {"progress": False}
HEADS = "text.blocks.*.cross_attn.heads.*.hook_z"
ITM = next(member for member in BLIP if member.task == "itm")


@functools.cache
def toy(name):
    return (HookedLlava if "llava" in name else HookedBLIP).from_pretrained(name)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@functools.cache
def built(member):
    return member.model()


def margin(logits):
    return logits[:, 1] - logits[:, 0]


def seen_positions(model, inputs, site, place, **roles):
    """The positions that an intervention is told."""
    told = []

    def look(value, at):
        told.append(at.positions)
        return value

    P.ablate(model, inputs, site, look, lambda x: x.flatten(1)[:, 0], place, **QUIET)
    return told


# --- places


def test_regions_are_the_patches_that_they_touch():
    model = toy("toy-blip-itm")  # 48 pixels, patches of 8
    pair = shapes_pairs(1, 0, "itm", size=96)[0]  # two pixels of the original in one of the model
    inputs = model.prepare(pair.image, pair.text)
    grid = model.cfg.vision.grid
    side = 96 / grid
    one = P.Region(side * 1.2, side * 2.2, side * 1.4, side * 2.4)
    site = "vision.blocks.0.hook_resid_post"
    assert seen_positions(model, inputs, site, one) == [(1 + 2 * grid + 1,)]
    four = P.Region(side * 0.9, side * 1.9, side * 1.1, side * 2.1)
    corner = [1 + grid * row + column for row in (1, 2) for column in (0, 1)]
    assert seen_positions(model, inputs, site, four) == [tuple(corner)]
    whole = tuple(range(1, 1 + grid * grid))
    assert seen_positions(model, inputs, site, "image") == [whole]
    assert seen_positions(model, inputs, "hook_image_embeds", "image") == [whole]
    keys = "text.blocks.0.cross_attn.hook_k"
    assert seen_positions(model, inputs, keys, four) == [tuple(corner)]
    with pytest.raises(ValueError, match=r"Region\(left=200.*touches no patch of 'vision'"):
        seen_positions(model, inputs, site, P.Region(200, 200, 210, 210))
    with pytest.raises(ValueError, match="'text' has no positions of an image"):
        seen_positions(model, inputs, "text.hook_embed", "image")


def test_regions_of_pictures_in_a_text():
    model = toy("toy-llava")
    pair = shapes_pairs(1, 0, "llava", size=48)[0]
    inputs = model.prepare(pair.image, pair.text)
    ids = inputs["input_ids"][0]
    image = (ids == model.cfg.image_token_id).nonzero().flatten().tolist()
    site = "text.blocks.0.hook_resid_post"
    assert seen_positions(model, inputs, site, "image") == [tuple(image)]
    text = tuple(at for at in range(len(ids)) if at not in image)
    assert seen_positions(model, inputs, site, "text") == [text]
    grid = model.cfg.vision.grid
    left = P.Region(0, 0, 0.5, 48)
    assert seen_positions(model, inputs, site, left) == [tuple(image[::grid])]
    assert seen_positions(model, inputs, site, ["first", "last"]) == [(0,), (len(ids) - 1,)]
    embeds = tuple(range(grid * grid))  # the class token is not among them
    assert seen_positions(model, inputs, "hook_image_embeds", "image") == [embeds]


def test_roles_are_words_or_positions():
    model = toy("toy-blip-itm")
    image = shapes_pairs(1, 0, "itm")[0].image
    text = "a red circle left of a blue square"
    roles = {"subject": "red circle", "verb": 4, "both": (1, -1), "absent": "cross"}
    pair = Pair(image, text, None, text.replace("red", "green"), "blue", name="p", roles=roles)
    site, at = "text.blocks.0.hook_mlp_out", []

    def look(value, where):
        at.append(where.positions)
        return value

    wanted = ["subject", "verb", "both", "answer", "last"]
    P.ablate(model, pair, site, look, margin, wanted, **QUIET)
    n = len(model.to_str_tokens(text))
    assert model.to_str_tokens(text)[2:4] == ["red", "circle"]
    assert sorted(at) == sorted([(2, 3), (4,), (1, n - 1), (7,), (n - 1,)])
    with pytest.raises(ValueError, match=r"the text has no 'cross', the words of role 'absent'"):
        P.ablate(model, pair, site, look, margin, "absent", **QUIET)
    with pytest.raises(ValueError, match=r"no positions of role 'object'; roles are .*'subject'"):
        P.ablate(model, pair, site, look, margin, "object", **QUIET)
    bare = Pair(image, text, None, text.replace("red", "green"), name="q")
    result = P.ablate(model, [pair, bare], site, P.zero(), margin, "subject", **QUIET)
    assert np.isnan(result.data.values).tolist() == [[[False]], [[True]]]
    ((reason, count),) = result.provenance["excluded"].items()
    assert "no positions of role 'subject'" in reason and count == 1


def test_roles_in_files(tmp_path):
    shapes_pairs(1, 0, "itm")[0].image.save(tmp_path / "i.png")
    (tmp_path / "p.csv").write_text(
        "image,text,corrupt_text,role_subject\ni.png,a red circle,a blue circle,red\n"
    )
    assert read_pairs(tmp_path / "p.csv")[0].roles == {"subject": "red"}


def test_windows_of_positions_leave_padding_out():
    model = built(ITM)
    rows = ITM.inputs(2, padded=True)  # five tokens, and four
    site = "text.blocks.0.hook_mlp_out"
    result = P.ablate(model, rows, site, P.zero(), margin, P.Each(2), **QUIET)
    assert result.data["position"].values.tolist() == ["0-1", "1-2", "2-3", "3-4"]
    assert np.isnan(result.data.values[:, 0]).tolist() == [[False] * 4, [False] * 3 + [True]]
    assert result.provenance["excluded"] == {"padding stands there": 1}

    def empty(x, hook):
        x[:, 1:3] = 0
        return x

    expected = margin(model.run_with_hooks(**rows, fwd_hooks=[(site, empty)]))
    np.testing.assert_allclose(result.data.values[:, 0, 1], expected, rtol=0, atol=1e-10)


def test_windows_of_layers():
    model = built(ITM)
    pair = tuple(ITM.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    sites = model.sites("vision.blocks.*.hook_mlp_out")
    made = P.windows(sites, 2)
    assert [one.name for one in made] == ["vision.blocks.0-1.hook_mlp_out"]
    result = P.activation_patching(model, pair, made, margin, **QUIET)
    _, clean = model.run_with_cache(**pair[0], names_filter="vision.blocks.*.hook_mlp_out")
    hooks = [(site.name, lambda x, hook: clean[hook.name]) for site in sites]
    expected = margin(model.run_with_hooks(**pair[1], fwd_hooks=hooks))
    np.testing.assert_allclose(result.data.values, expected[None], rtol=0, atol=1e-10)
    assert result.top(1) == made
    with pytest.raises(ValueError, match="a window of 3 layers, moved by 1, over 2 layers"):
        P.windows(sites, 3)
    with pytest.raises(ValueError, match="layers of one stack"):
        P.windows(model.sites("hook_logits"), 1)


def test_all_heads_together_are_their_module():
    model = built(ITM)
    pair = tuple(ITM.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    heads = P.together("text.blocks.1.cross_attn.heads.*.hook_z")
    for what in (P.patch(), P.zero(), P.noise(0.1), P.noise(0.1, multiply=True)):
        both = P.ablate(
            model, [pair], [heads, "text.blocks.1.cross_attn.hook_z"], what, margin, **QUIET
        )
        assert abs(both.data.values[0, 0] - both.data.values[0, 1]) < 1e-12
        assert abs(both.difference.values).min() > 1e-6


# --- knockout


@pytest.mark.parametrize("member", [ITM, *LLAVA], ids=str)
def test_knockout_of_a_key_is_its_mask(member):
    """The reference, whose mask hides a token from all queries."""
    theirs, ours = member.pair()
    inputs = member.inputs(1, padded=False, dtype=torch.float64)
    length = inputs["input_ids"].shape[1]
    key = length - 2
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, key] = 0
    hidden = inputs | {"attention_mask": mask}
    if member is ITM:
        expected = margin(theirs(**hidden).itm_score)
        metric = margin
    else:
        at = torch.arange(length)[None]
        expected = theirs(**hidden, position_ids=at).logits[:, -1, 3]

        def metric(logits):
            return logits[:, -1, 3]

    result = P.ablate(ours, inputs, None, P.knockout(keys=key), metric, **QUIET)
    np.testing.assert_allclose(result.data.values.flatten(), expected, rtol=0, atol=1e-6)
    assert abs(result.difference).min() > 1e-5


def test_knockout_of_a_part_of_the_image():
    """What is left of the first layer's pattern is as before, and sums to one."""
    model = built(ITM)
    inputs = ITM.inputs(1, padded=False)
    name = "text.blocks.0.cross_attn.hook_pattern"
    _, before = model.run_with_cache(**inputs, names_filter=name)
    found = []

    def keep(logits):
        return logits[:, 0]

    model.add_hook(name, lambda x, hook: found.append(x.clone()))
    knocked = P.knockout("last", (1, 2), [0], part="cross_attn")
    P.ablate(model, inputs, None, knocked, keep, **QUIET)
    model.reset_hooks()
    old, new = before[name], found[-1]
    torch.testing.assert_close(new[:, :, :-1], old[:, :, :-1])
    left = old[:, :, -1].clone()
    left[..., [1, 2]] = 0
    torch.testing.assert_close(new[:, :, -1], left / left.sum(-1, keepdim=True))
    with pytest.raises(
        ValueError, match=r"knockout writes hook_attn_scores, not 'text.hook_embed'"
    ):
        P.ablate(model, inputs, "text.hook_embed", P.knockout(keys=1), keep, **QUIET)
    all_keys = P.ablate(
        model, inputs, "text.blocks.1.attn.hook_attn_scores", P.knockout(), keep, **QUIET
    )
    z = P.ablate(model, inputs, "text.blocks.1.attn.hook_z", P.zero(), keep, **QUIET)
    np.testing.assert_allclose(all_keys.data.values, z.data.values, rtol=0, atol=1e-12)


# --- metrics


@pytest.mark.parametrize("task", ["vqa", "captioning", "llava"])
def test_answers_of_several_tokens(task):
    model = toy("toy-llava" if task == "llava" else f"toy-blip-{task}")
    pair = shapes_pairs(1, 0, task)[0]
    long, short = "red square left", "blue circle"
    site = next(n for n in model.hook_dict if n.endswith("blocks.1.hook_mlp_out") and n[0] != "v")
    metric = P.logit_diff(long, short, tokens="all")
    result = P.activation_patching(model, pair, site, metric, **QUIET)

    def log_prob(words, corrupt, hooks):
        inputs = model.prepare_prompt(pair.images, pair.texts)
        ids = model.tokenizer(words, add_special_tokens=False)["input_ids"]
        more = torch.tensor(ids)[None].expand(2, -1)
        key = "decoder_input_ids" if task == "vqa" else "input_ids"
        begin = torch.full((2, 1), model.cfg.bos_token_id) if task == "vqa" else inputs[key]
        given = dict(inputs) | {key: torch.cat([begin, more[:, :-1]], 1)}
        if task == "llava":
            given["attention_mask"] = torch.ones_like(given[key])
        logits = model.run_with_hooks(**given, fwd_hooks=hooks)[:, -len(ids) :].log_softmax(-1)
        return sum(logits[int(corrupt), at, one].item() for at, one in enumerate(ids))

    def across(x, hook):
        x[1] = x[0]
        return x

    plain, patched = ([], True), ([(site, across)], True)
    for (hooks, corrupt), found in (
        (([], False), result.clean),
        (plain, result.corrupt),
        (patched, result.data),
    ):
        expected = log_prob(long, corrupt, hooks) - log_prob(short, corrupt, hooks)
        assert found.item() == pytest.approx(expected, abs=2e-5)
    with pytest.raises(ValueError, match="begin with the same token"):
        P.activation_patching(
            model, pair, site, P.logit_diff("red square", "red circle", tokens="first"), **QUIET
        )
    with pytest.raises(ValueError, match="are the same token"):
        P.activation_patching(model, pair, site, P.logit_diff("red", "red"), **QUIET)


def test_divergence_and_accuracy_by_hand():
    q = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64).log()
    reference = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    kl = P.kl(reference)(q)
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(kl, [0, by_hand], rtol=0, atol=1e-12)
    assert P.accuracy(0)(q).tolist() == [1, 0]
    with pytest.raises(ValueError, match="kl needs logits to compare with"):
        P.kl()(q)


def test_divergence_is_from_the_clean_run():
    model = toy("toy-blip-vqa")
    pair = shapes_pairs(1, 0, "vqa")[0]
    result = P.activation_patching(model, pair, "hook_image_embeds", P.kl(), **QUIET)
    assert abs(result.clean.item()) < 1e-6 < result.corrupt.item()
    assert result.data.item() == pytest.approx(0, abs=1e-5)  # the whole image is restored
    logits = model(**model.prepare_prompt(pair.images, pair.texts))[:, -1].double()
    expected = F.kl_div(logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True,
                        reduction="sum")  # fmt: skip
    assert result.corrupt.item() == pytest.approx(expected.item(), abs=1e-5)


# --- plans, limits, faults


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


def test_answers_are_not_read_at_padding():
    member = LLAVA[0]
    model, rows = built(member), member.inputs(2, padded=False, dtype=torch.float64)
    rows = rows | {"attention_mask": torch.ones_like(rows["input_ids"])}
    rows["attention_mask"][1, -1] = 0
    with pytest.raises(ValueError, match="input '1' is padded on the right, and logit_diff reads"):
        P.ablate(model, rows, "text.blocks.0.hook_mlp_out", P.zero(), P.logit_diff(3, 5), **QUIET)


def test_sites_that_the_pass_does_not_visit():
    """Of the image encoder, by texts without an image."""
    model = toy("toy-llava")
    pair = model.prepare(None, "What color is it?"), model.prepare(None, "What shape is it?")
    metric = P.logit_diff("red", "blue")
    with pytest.raises(ValueError, match=r"does not visit 'vision.blocks.0.hook_mlp_out'; leave"):
        P.activation_patching(model, pair, "vision.blocks.0.hook_mlp_out", metric, **QUIET)
    assert model.list_hooks() == {}


def test_a_clean_run_that_is_the_corrupt_one_shows_nothing():
    model = built(ITM)
    one = ITM.inputs(1, padded=False)
    result = P.activation_patching(model, (one, one), HEADS, margin, **QUIET)
    np.testing.assert_allclose(result.difference, 0, rtol=0, atol=1e-12)
    assert np.isnan(result.restored).all() and result.undefined == 1


def test_what_stands_before_the_image_is_read_restores_nothing():
    model = built(ITM)
    clean = ITM.inputs(1, padded=False)
    corrupt = clean | {"pixel_values": ITM.inputs(1, padded=False, seed=1)["pixel_values"]}
    before = ["text.hook_embed", "text.blocks.0.hook_resid_mid", "text.blocks.0.attn.hook_z"]
    result = P.activation_patching(model, (clean, corrupt), before, margin, **QUIET)
    np.testing.assert_allclose(result.restored, 0, rtol=0, atol=1e-10)
    all_of_it = P.activation_patching(
        model, (clean, corrupt), "vision.blocks.1.hook_resid_post", margin, **QUIET
    )
    np.testing.assert_allclose(all_of_it.restored, 1, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"on": "corrupt"}, "on='corrupt' needs pairs"),
        ({"sites": None}, "'zero' names no sites of its own"),
        ({"intervention": P.knockout(1, 2), "positions": 3}, "says where it writes: leave out pos"),
        ({"sites": []}, "an empty list of sites"),
        ({"intervention": P.patch()}, "'patch' reads the other run of a pair; give pairs"),
        ({"intervention": lambda value, at: value[:0]}, r"gives \[0, .* where \[1, "),
    ],
)
def test_ablations_that_cannot_be(change, says):
    model = built(ITM)
    given = {"sites": "text.blocks.0.hook_mlp_out", "metric": margin} | change
    with pytest.raises(ValueError, match=says):
        P.ablate(model, ITM.inputs(1, padded=False), **given, **QUIET)
    assert model.list_hooks() == {}


# --- results


def result_of(values, clean, corrupt, direction="denoise"):
    model = built(ITM)
    sites = model.sites("text.blocks.*.hook_mlp_out")
    pairs = [str(n) for n in range(len(values))]
    ends = [pd.Series(end, pairs).rename_axis("pair").to_xarray() for end in (clean, corrupt)]
    from hooked_vlm.patching.result import label

    data = label(np.array(values, float)[..., None], pairs, sites, None)
    return PatchingResult(data, *ends, tuple(sites), {"metric": "m", "direction": direction})


def test_intervals_are_of_means_over_pairs():
    values = [[0, 1], [1, 1], [2, 1], [3, 1]]
    result = result_of(values, [4] * 4, [0] * 4)
    found = result.mean(n=4000, of="data")
    assert found["mean"].values.tolist() == [1.5, 1]
    assert found["n"].values.tolist() == [4, 4]
    assert (found["low"][1], found["high"][1]) == (1, 1)
    # All 256 draws of four numbers with replacement, their means in order.
    draws = np.sort(np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).mean(0))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["low"][0].item() == pytest.approx(low, abs=0.13)
    assert found["high"][0].item() == pytest.approx(high, abs=0.13)
    assert result.mean(n=10, seed=1).equals(result.mean(n=10, seed=1))
    with pytest.raises(ValueError, match="one pair has no interval"):
        result_of([[1, 2]], [1], [0]).mean()
    assert "low" not in result_of([[1, 2]], [1], [0]).mean(ci=None)


def test_results_are_saved_and_loaded(tmp_path):
    model = toy("toy-blip-itm")
    pairs = shapes_pairs(2, 0, "itm", corrupt="text")
    sites = [*model.sites("text.blocks.1.hook_mlp_out"), P.together("text.blocks.0.*_out")]
    result = P.activation_patching(model, pairs, sites, positions=[2, (3, 4), "last"], **QUIET)
    result.save(tmp_path / "r.npz")
    again = PatchingResult.load(tmp_path / "r.npz")
    assert again.data.identical(result.data)
    assert again.clean.identical(result.clean) and again.corrupt.identical(result.corrupt)
    assert again.sites == result.sites and again.provenance == result.provenance
    assert again.top(3) == result.top(3)
    assert list(tmp_path.iterdir()) == [tmp_path / "r.npz"]
    (tmp_path / "r.npz").write_bytes(b"no result")
    with pytest.raises(ValueError, match=r"r.npz' is no saved result"):
        PatchingResult.load(tmp_path / "r.npz")
    alone = P.ablate(model, model.prepare(pairs[0].image, pairs[0].text), HEADS, **QUIET)
    alone.save(tmp_path / "a.npz")
    assert PatchingResult.load(tmp_path / "a.npz").corrupt is None


def test_controls_are_other_sites_of_the_same_kind():
    model = built(ITM)
    like = [
        Site.parse("text.blocks.0.cross_attn.heads.1.hook_z", 2),
        *model.sites("*0.hook_mlp_out"),
    ]
    drawn = P.random_sites(model, like, seed=3)
    kinds = [(s.stack, s.component, s.position) for s in drawn]
    assert sorted(kinds) == sorted((s.stack, s.component, s.position) for s in like)
    assert not {s.name for s in drawn} & {s.name for s in like}
    assert drawn == P.random_sites(model, like, seed=3)
    many = {P.random_sites(model, like[:1], seed=seed)[0].name for seed in range(20)}
    assert len(many) == 3  # all others: two layers of two heads, one of which is given
    with pytest.raises(ValueError, match="there are only 0 others"):
        P.random_sites(model, model.sites("text.blocks.*.hook_mlp_out"))


# --- means and other inputs


def unpadded(model, inputs, name):
    """What each row of inputs has at a point, without padding, by a pass of its own."""
    for row in range(len(inputs["input_ids"])):
        n = int(inputs["attention_mask"][row].sum())
        alone = {"pixel_values": inputs["pixel_values"][row : row + 1]}
        alone |= {key: inputs[key][row : row + 1, :n] for key in ("input_ids", "attention_mask")}
        yield model.run_with_cache(**alone, names_filter=name)[1][name][0]


@pytest.mark.parametrize("name", ["text.blocks.0.hook_mlp_out", "text.blocks.1.cross_attn.hook_k"])
def test_means_are_of_tokens_that_are_no_padding(name):
    model = built(ITM)
    data = ITM.inputs(3, padded=True, seed=4)
    one = ITM.inputs(1, padded=False)
    rows = list(unpadded(model, data, name))
    n = 4 if "mlp" in name else rows[0].shape[0]
    over = torch.cat(rows).mean(0)
    at_each = torch.stack(
        [torch.stack([row[at] for row in rows if at < len(row)]).mean(0) for at in range(n)]
    )
    for per_position, value in ((False, over.expand(n, *over.shape)), (True, at_each)):
        result = P.ablate(
            model, one, name, P.mean(data, per_position=per_position), margin, **QUIET
        )
        hook = (name, lambda x, hook, value=value: value.expand_as(x).clone())
        expected = margin(model.run_with_hooks(**one, fwd_hooks=[hook]))
        np.testing.assert_allclose(result.data.values[:, 0], expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"'text.blocks.0.attn.hook_pattern' has no mean"):
        P.ablate(model, one, "text.blocks.0.attn.hook_pattern", P.mean(data), margin, **QUIET)
    short = ITM.inputs(1, padded=False, seed=5)
    short = short | {key: short[key][:, :3] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="is of 3 positions, the run has 4"):
        P.ablate(model, one, "text.hook_embed", P.mean(short, per_position=True), margin, **QUIET)


def test_resampling_draws_an_input_for_each_pair():
    model, name = built(ITM), "vision.blocks.0.hook_resid_post"
    data = ITM.inputs(4, padded=False, seed=4)
    several = ITM.inputs(6, padded=False)
    result = P.ablate(model, several, name, P.resample(data, seed=2), margin, **QUIET)
    _, theirs = model.run_with_cache(**data, names_filter=name)
    drawn = np.random.default_rng(2).integers(4, size=6)
    hook = (name, lambda x, hook: theirs[name][drawn])
    expected = margin(model.run_with_hooks(**several, fwd_hooks=[hook]))
    np.testing.assert_allclose(result.data.values[:, 0], expected, rtol=0, atol=1e-10)
    long = ITM.inputs(1, padded=True)
    with pytest.raises(ValueError, match=r"has \[1, 5, .* the run \[1, 4, .* of one length"):
        P.ablate(
            model, ITM.inputs(1, padded=False), "text.hook_embed", P.resample(long), margin, **QUIET
        )


def test_knockout_in_the_image_encoder():
    """Of some patches, in one of two heads, by writing the scores by hand."""
    model = built(ITM)
    inputs = ITM.inputs(1, padded=False)
    name = "vision.blocks.1.attn.heads.2.hook_attn_scores"

    def hide(scores, hook):  # [batch, query, key]
        scores[:, 1:, 3] = torch.finfo(scores.dtype).min
        return scores

    expected = margin(model.run_with_hooks(**inputs, fwd_hooks=[(name, hide)]))
    knocked = P.knockout("image", 3)
    result = P.ablate(model, inputs, name, knocked, margin, **QUIET)
    np.testing.assert_allclose(result.data.values.flatten(), expected, rtol=0, atol=1e-10)
    assert abs(result.difference).min() > 1e-8
