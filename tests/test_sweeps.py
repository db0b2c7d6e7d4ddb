"""Interventions and metrics of sweeps, and what is refused."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from zoo import HEADS, ITM, QUIET, built, margin, toy
from zoo_llava import LLAVA

from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs

pytestmark = pytest.mark.usefixtures("no_grad")


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


# --- identities and faults


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
