"""Estimates by gradients against differences of full passes."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from whole_zoo import FUSED
from zoo import BLIP, QUIET, built, total
from zoo_albef import NLVR
from zoo_clip import CLIP, CLIP_RESNET
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP
from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import module_of

ITM, CAPTIONING, _ = BLIP


def pair_of(member, shared=False):
    clean, corrupt = (
        member.inputs(1, padded=False, seed=seed, dtype=torch.float64) for seed in (0, 1)
    )
    if shared:
        corrupt = corrupt | {"pixel_values": clean["pixel_values"]}
    return clean, corrupt


def joined(model, clean, corrupt):
    """Of a CLIP, whose texts are compared with both images."""
    if model.task != "clip":
        return clean, corrupt
    both = {key: torch.cat([clean[key], corrupt[key]]) for key in clean}
    return tuple(both | {"pixel_values": one["pixel_values"]} for one in (clean, corrupt))


def slope(model, other, target, site, metric=total, eps=1e-5):
    """The change of the metric per share of the difference that is written in, both ways."""
    module = module_of(site.name)
    _, values = model.run_with_cache(**other, names_filter=module)

    def moved(by):
        def write(x, hook):
            where = [slice(None)] * x.dim()
            if site.head is not None:
                where[hook.head_axis] = site.head
            if site.position is not None:
                where[hook.pos_dim] = site.position
            at = tuple(where)
            x[at] = x[at] + by * (values[module][at] - x[at])
            return x

        return metric(model.run_with_hooks(**target, fwd_hooks=[(module, write)])).item()

    return (moved(eps) - moved(-eps)) / (2 * eps)


def against_slopes(model, pair, sites, metric=total, direction="denoise", measure=None):
    """The estimates are the slopes of full passes; gives these."""
    found = P.attribution_patching(model, pair, sites, metric, direction=direction, **QUIET)
    other, target = joined(model, *pair)[:: 1 if direction == "denoise" else -1]
    measure = functools.partial(slope, metric=metric) if measure is None else measure
    expected = np.array([measure(model, other, target, site) for site in found.sites])
    estimated = found.difference.values.flatten()
    np.testing.assert_allclose(estimated, expected, rtol=1e-6, atol=1e-7 * abs(expected).max())
    return expected


def names_of(model):
    stack = next(n for n in model.stacks if n != "vision")
    names = ["vision.hook_embed", "vision.blocks.1.hook_resid_post", f"{stack}.hook_embed"]
    names += ["vision.blocks.0.attn.heads.1.hook_z", f"{stack}.blocks.1.attn.heads.0.hook_v"]
    names += [f"{stack}.blocks.0.attn.heads.1.hook_pattern", f"{stack}.blocks.1.hook_mlp_out"]
    names += [n for n in model.hook_dict if n.endswith("blocks.1.cross_attn.hook_k")]
    return [name for name in names if name in model.hook_dict]


@pytest.mark.parametrize(
    ("member", "shared", "direction"),
    [(member, False, "denoise") for member in (*FUSED, *LLAVA, CLIP[0])]
    # Rows of a CLIP are images, and NLVR has two for each text: they share none.
    + [(member, True, "denoise") for member in (*FUSED, *LLAVA) if member.task != "nlvr"]
    + [(member, False, "noise") for member in (ITM, LLAVA[0])],
    ids=str,
)
def test_estimates_are_slopes(member, shared, direction):
    model = built(member)
    clean, corrupt = pair_of(member, shared)
    names = [n for n in names_of(model) if not (model.task == "clip" and n.startswith("text"))]
    sites = model.sites(names)
    if model.task != "clip":
        sites += model.sites(names[-1], positions=[1, -1])
    expected = against_slopes(model, (clean, corrupt), sites, direction=direction)
    assert (abs(expected) > 1e-6).sum() >= (2 if shared else 3)
    assert model.list_hooks() == {}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("member", [ITM, NLVR, *LLAVA], ids=str)
def test_estimates_of_padded_texts_are_slopes(member, direction):
    model = built(member)
    pair = tuple(member.chosen(member.inputs(3, seed=seed), [1]) for seed in (0, 1))
    assert all(one["attention_mask"].min() == 0 for one in pair)
    length = pair[0]["input_ids"].shape[1]
    sites = model.sites("vision.blocks.0.attn.heads.1.hook_z")
    sites += model.sites("text.blocks.0.attn.heads.1.hook_z", positions=range(length))
    expected = against_slopes(model, pair, sites, direction=direction)
    assert (abs(expected) > 1e-6).sum() >= 4


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_estimates_of_texts_with_two_images_are_slopes(member):
    """Two images of each text, other ones, or the same beside other words."""
    model = built(member)
    clean, other = (member.inputs(counts=(2,), padded=False, seed=seed) for seed in (0, 1))
    names = ["vision.blocks.0.attn.heads.1.hook_z", "hook_image_embeds", "text.hook_embed"]
    for corrupt, moved in ((other, 3), (clean | {"input_ids": other["input_ids"]}, 1)):
        expected = against_slopes(model, (clean, corrupt), model.sites(names))
        assert (abs(expected) > 1e-6).sum() == moved


def test_estimates_in_a_resnet_are_slopes_and_complete():
    """From the first convolution on, which is linear in the pixels."""
    model, pair = built(CLIP_RESNET), pair_of(CLIP_RESNET)
    first, behind = "vision.stem.conv1.hook_conv", "vision.stem.conv2.hook_post"
    names = [first, behind, "vision.hook_embed", "vision.blocks.1.hook_conv_out"]
    names += ["vision.attnpool.heads.1.hook_z", "vision.attnpool.hook_k"]
    expected = against_slopes(model, pair, model.sites(names))
    assert (abs(expected) > 1e-6).all()
    found = P.attribution_patching(model, pair, [first, behind], total, steps=64, **QUIET)
    whole = (found.clean - found.corrupt).item()
    assert found.difference.sel(site=first).item() == pytest.approx(whole, rel=0.03)
    assert abs(found.difference.sel(site=behind).item()) > 1e-3


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_estimates_of_answers_of_several_tokens_are_slopes(direction):
    """Their log probabilities, each token read behind those before it."""
    model, pair = built(LLAVA[0]), pair_of(LLAVA[0])
    answers = ((3, 4, 5), 1), ((6, 7), -1)

    def measure(model, other, target, site):
        found = 0
        for ids, sign in answers:

            def said(logits, ids=ids):
                each = logits[0, -len(ids) :].log_softmax(-1)
                return sum(each[at, token] for at, token in enumerate(ids))

            sides = (model.continued(one, ids[:-1]) for one in (other, target))
            found += sign * slope(model, *sides, site, said)
        return found

    sites = model.sites(["vision.hook_embed", "text.blocks.0.attn.heads.1.hook_z"])
    metric = P.logit_diff(*(ids for ids, _ in answers), tokens="all")
    expected = against_slopes(model, pair, sites, metric, direction, measure)
    assert (abs(expected) > 0.1).all()


def test_estimates_of_a_divergence_are_slopes():
    """From a reference that is held where it is."""
    model, pair = built(LLAVA[0]), pair_of(LLAVA[0])
    p = model(**pair[0])[0, -1].log_softmax(-1)

    def measure(model, other, target, site):
        return slope(model, other, target, site, lambda x: p.exp() @ (p - x[0, -1].log_softmax(-1)))

    sites = model.sites(["vision.hook_embed", "text.blocks.0.attn.heads.1.hook_z"])
    seen = []

    def watched(logits, metric):
        seen.append(metric.reference.requires_grad)
        return P.kl().of(logits, metric)

    metric = replace(P.kl(), of=watched)
    expected = against_slopes(model, pair, sites, metric, measure=measure)
    assert (abs(expected) > 1e-3).all()
    assert seen and not any(seen)


def test_sites_together_and_places_are_labelled_as_in_the_sweep():
    model = HookedBLIP.from_pretrained("toy-blip-itm")
    pairs = shapes_pairs(2, 0, "itm")
    heads = "text.blocks.*.cross_attn.heads.*.hook_z"
    window = P.windows(model.sites("text.blocks.*.hook_mlp_out"), 2)
    for sites, places in (
        (heads, "each"),
        (heads, P.Each(2)),
        (heads, ["last", 1]),
        (window, None),
    ):
        found, exact = (
            how(model, pairs, sites, positions=places, **QUIET)
            for how in (P.attribution_patching, P.activation_patching)
        )
        assert found.data.coords.identical(exact.data.coords)
        assert (found.sites, found.places) == (exact.sites, exact.places)
        np.testing.assert_array_equal(found.data.isnull(), exact.data.isnull())
        np.testing.assert_allclose(found.start, exact.start, rtol=0, atol=1e-5)
    alone = P.attribution_patching(model, pairs, list(window[0].sites), **QUIET)
    both = found.difference.sel(site=window[0].name)
    np.testing.assert_allclose(both, alone.difference.sum("site"), rtol=0, atol=1e-5)


def test_one_pass_however_many_sites():
    """Both runs go through the model once, and one of them back."""
    model, pair = built(ITM), pair_of(ITM)
    rows = []
    handle = model.text.blocks[0].mlp.fc_in.register_forward_hook(
        lambda module, args, output: rows.append(len(args[0]))
    )
    names = "*.blocks.*attn.heads.*.hook_*"
    found = P.attribution_patching(model, pair, names, total, positions=[0, 1], **QUIET)
    handle.remove()
    assert found.data.size > 100
    assert rows == [2]


def test_small_differences_are_estimated_exactly():
    """The relative error shrinks with the difference."""
    model, (clean, corrupt) = built(ITM), pair_of(ITM)
    errors = []
    for size in (1e-2, 1e-4):
        near = clean["pixel_values"] + size * corrupt["pixel_values"]
        pair = clean, clean | {"pixel_values": near}
        names = "text.blocks.*.cross_attn.heads.*.hook_z"
        found = P.attribution_patching(model, pair, names, total, check=True, **QUIET)
        exact = P.activation_patching(model, pair, names, total, **QUIET)
        largest = abs(exact.difference).max().item()
        errors.append(found.provenance["exact"]["largest_error"] / largest)
    assert errors[1] < errors[0] / 30
    assert errors[1] < 1e-3


def test_a_linear_end_is_estimated_exactly():
    model, pair = built(ITM), pair_of(ITM)
    last = "text.blocks.1.hook_normalized_resid_post"
    found, exact = (
        how(model, pair, last, total, positions=[0, 1], **QUIET)
        for how in (P.attribution_patching, P.activation_patching)
    )
    np.testing.assert_allclose(found.data, exact.data, rtol=0, atol=1e-10)
    assert abs(exact.difference[..., 0]).item() > 1e-3 > abs(exact.difference[..., 1]).item()


@pytest.mark.parametrize("member", [ITM, CAPTIONING, *LLAVA], ids=str)
def test_integrated_gradients_are_complete(member):
    """At the embeddings they add up to the whole difference of the metric."""
    model, (clean, corrupt) = built(member), pair_of(member)
    if member in LLAVA:  # there what stands for an image comes of the image's own embeddings
        corrupt = corrupt | {"input_ids": clean["input_ids"]}
    stacks = ["vision"] if member in LLAVA else model.stacks
    names = [f"{stack}.hook_embed" for stack in stacks]
    gaps = []
    for steps in (4, 64):
        found = P.attribution_patching(model, (clean, corrupt), names, total, steps=steps, **QUIET)
        whole = (found.clean - found.corrupt).item()
        gaps.append(abs(found.difference.sum().item() - whole) / abs(whole))
    assert gaps[1] < 0.02
    assert gaps[1] < gaps[0] or gaps[0] < 1e-3


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("leaf", ["q", "k"])
@pytest.mark.parametrize("member", [ITM, LLAVA[0], LLAVA[1]], ids=str)
def test_patterns_are_made_anew(member, leaf, padded):
    """By a pass with the patched queries or keys, whose pattern is caught."""
    model, (clean, corrupt) = built(member), pair_of(member)
    if padded:
        clean, corrupt = (member.chosen(member.inputs(3, seed=seed), [1]) for seed in (0, 1))
        assert corrupt["attention_mask"].min() == 0
    rotary = "_rot" if member in LLAVA else ""
    part = "text.blocks.1.attn" if member in LLAVA else "text.blocks.1.cross_attn"
    heads, pattern = f"{part}.heads.*.hook{rotary}_{leaf}", f"{part}.hook_pattern"
    found = P.attribution_patching(
        model, (clean, corrupt), heads, total, [None, -1, (0, 2)], fix_softmax=True, **QUIET
    )
    name = f"{part}.hook{rotary}_{leaf}"
    _, values = model.run_with_cache(**clean, names_filter=name)
    _, own = model.run_with_cache(
        **corrupt, names_filter=pattern, incl_bwd=True, metric=lambda x: total(x).sum()
    )
    for number, site in enumerate(found.sites):
        for at, place in enumerate((slice(None), -1, [0, 2])):

            def write(x, hook, head=site.head, place=place):
                x[:, place, head] = values[name][:, place, head]
                return x

            with model.hooks([(name, write)]):
                _, new = model.run_with_cache(**corrupt, names_filter=pattern)
            expected = (own[f"{pattern}_grad"] * (new[pattern] - own[pattern])).sum().item()
            ours = found.difference.values.reshape(-1, 3)[number, at]
            assert ours == pytest.approx(expected, abs=1e-10)
    assert abs(found.difference).max() > 1e-6


@pytest.mark.parametrize("leaf", ["q", "k"])
def test_all_queries_or_keys_of_a_module(leaf):
    """What heads, each by itself, and positions of queries add up to."""
    model, pair = built(ITM), pair_of(ITM)
    part = "text.blocks.1.attn"

    def difference(name, positions=None):
        given = (model, pair, f"{part}.{name}", total, positions)
        return P.attribution_patching(*given, fix_softmax=True, **QUIET).difference

    whole = difference(f"hook_{leaf}").item()
    assert difference(f"heads.*.hook_{leaf}").sum().item() == pytest.approx(whole, abs=1e-12)
    each = difference(f"hook_{leaf}", "each").sum().item()
    assert abs(whole) > 1e-6
    assert (each == pytest.approx(whole, abs=1e-12)) == (leaf == "q")


def test_agreement_with_the_sweep(tmp_path):
    model = HookedBLIP.from_pretrained("toy-blip-itm")
    pairs = shapes_pairs(2, 0, "itm")
    names = "text.blocks.*.cross_attn.heads.*.hook_z"
    exact = P.activation_patching(model, pairs, names, **QUIET)
    found = P.attribution_patching(model, pairs, names, check=exact, **QUIET)
    assert found.data.dims == exact.data.dims == ("pair", "layer", "head")
    a, b = (one.difference.values.flatten() for one in (found, exact))
    told = found.provenance["exact"]
    assert told["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    ranks = [pd.Series(one).rank() for one in (a, b)]
    assert told["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert told["largest_error"] == pytest.approx(abs(a - b).max())
    assert told["pearson"] > 0.7
    with torch.no_grad():  # as notebooks begin
        again = P.attribution_patching(model, pairs, names, check=exact, **QUIET)
    assert again.data.identical(found.data)
    assert told["cells"] == found.data.size
    exact.save(tmp_path / "exact.npz")
    saved = P.PatchingResult.load(tmp_path / "exact.npz")
    once_more = P.attribution_patching(model, pairs, names, check=saved, **QUIET)
    assert once_more.provenance["exact"] == told
    for what, given in {
        "pairs": (pairs[::-1], names),
        "number of cells": (pairs[:1], names),
        "sites": (pairs, "text.blocks.0.cross_attn.heads.*.hook_z"),
        "positions": (pairs, names, None, 0),
        "direction": (pairs, names, None, None, "noise"),
        "metric": (pairs, names, P.kl()),
    }.items():
        with pytest.raises(ValueError, match=f"of another {what}; check=True makes"):
            P.attribution_patching(model, *given, check=exact, **QUIET)
    with pytest.raises(ValueError, match="of another method"):
        P.attribution_patching(model, pairs, names, check=found, **QUIET)


def test_estimates_that_cannot_be():
    model = HookedBLIP.from_pretrained("toy-blip-vqa")
    pair = shapes_pairs(1, 0, "vqa")[0]
    with pytest.raises(ValueError, match="accuracy has no gradient"):
        P.attribution_patching(model, pair, "hook_image_embeds", P.accuracy(), **QUIET)
    with pytest.raises(ValueError, match="steps is at least 1, not 0"):
        P.attribution_patching(model, pair, "hook_image_embeds", steps=0, **QUIET)
    llava = built(LLAVA[0])
    with pytest.raises(ValueError, match=r"name 'text.blocks.0.attn.hook_rot_q'"):
        P.attribution_patching(
            llava,
            pair_of(LLAVA[0]),
            Site.parse("text.blocks.0.attn.hook_q"),
            total,
            fix_softmax=True,
            **QUIET,
        )
    with torch.inference_mode(), pytest.raises(ValueError, match=r"leave it, or use torch.no_grad"):
        P.attribution_patching(model, pair, "hook_image_embeds", **QUIET)
    assert model.list_hooks() == {} == llava.list_hooks()


@pytest.mark.parametrize("steps", [None, 2])
def test_no_hook_stays_behind(steps):
    """Where something raises in the middle of a pass, or behind it."""
    model, pair = built(ITM), pair_of(ITM)
    calls = []

    def full(module, args):
        calls.append(module)
        if len(calls) == (1 if steps is None else 3):  # of the pair, of its ends, of a step
            raise MemoryError("no room")

    handle = model.text.blocks[1].mlp.register_forward_pre_hook(full)
    with pytest.raises(MemoryError, match="no room"):
        P.attribution_patching(model, pair, "text.*hook_z", total, steps=steps, **QUIET)
    handle.remove()
    assert model.list_hooks() == {}

    def broken(logits):
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        P.attribution_patching(model, pair, "text.*hook_z", broken, steps=steps, **QUIET)
    assert model.list_hooks() == {}


def test_scores_that_are_masked_in_one_run_only():
    """They have no difference to multiply by; the pattern has."""
    model, (clean, corrupt) = built(ITM), pair_of(ITM)
    shorter = corrupt["attention_mask"].clone()
    shorter[0, -1] = 0
    pair = clean, corrupt | {"attention_mask": shorter}
    part = "text.blocks.1.attn"
    for direction in ("denoise", "noise"):
        with pytest.raises(ValueError, match=f"mask other keys at '{part}.hook_attn_scores'"):
            P.attribution_patching(
                model, pair, f"{part}.hook_attn_scores", total, direction=direction, **QUIET
            )
        sites = model.sites(f"{part}.heads.*.hook_pattern")
        assert (abs(against_slopes(model, pair, sites, direction=direction)) > 1e-6).all()
    equal = corrupt | {"attention_mask": clean["attention_mask"]}
    against_slopes(model, (clean, equal), model.sites(f"{part}.heads.*.hook_attn_scores"))
