"""Estimates by gradients against differences of full passes."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch
from whole_zoo import FUSED
from zoo import BLIP
from zoo_clip import CLIP
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP
from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import module_of

QUIET = {"progress": False}
ITM, CAPTIONING, _ = BLIP


@functools.cache
def built(member):
    return member.model()


def total(logits):
    flat = logits.flatten(1)
    return flat @ torch.arange(1, 1 + flat.shape[1]).to(flat) / flat.shape[1]


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


def slope(model, other, target, site, eps=1e-5):
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

        return total(model.run_with_hooks(**target, fwd_hooks=[(module, write)])).item()

    return (moved(eps) - moved(-eps)) / (2 * eps)


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
    found = P.attribution_patching(
        model, (clean, corrupt), sites, total, direction=direction, **QUIET
    )
    sides = joined(model, clean, corrupt)
    other, target = sides if direction == "denoise" else sides[::-1]
    expected = np.array([slope(model, other, target, site) for site in found.sites])
    np.testing.assert_allclose(
        found.difference.values.flatten(), expected, rtol=1e-6, atol=1e-7 * abs(expected).max()
    )
    assert (abs(expected) > 1e-6).sum() >= (2 if shared else 3)
    assert model.list_hooks() == {}


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


@pytest.mark.parametrize("leaf", ["q", "k"])
@pytest.mark.parametrize("member", [ITM, LLAVA[1]], ids=str)
def test_patterns_are_made_anew(member, leaf):
    """By a pass with the patched queries or keys, whose pattern is caught."""
    model, (clean, corrupt) = built(member), pair_of(member)
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


def test_agreement_with_the_sweep():
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
    with pytest.raises(ValueError, match="over other sites, positions or pairs"):
        P.attribution_patching(model, pairs[:1], names, check=exact, **QUIET)


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
    assert model.list_hooks() == {} == llava.list_hooks()
