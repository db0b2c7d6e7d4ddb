"""Sweeps over every architecture equal a loop of full passes, one patch each."""

import pytest
import torch
from whole_zoo import FUSED, ZOO
from zoo import built, error, total
from zoo_clip import CLIP
from zoo_llava import LLAVA

from hooked_vlm import patching as P


def loop(member, clean, corrupt, site, metric=total):
    """The metric of a full pass on the corrupt inputs with the clean activation written in."""
    model = built(member)
    _, cache = model.run_with_cache(**clean, names_filter=site.name)

    def write(x, hook):
        if site.position is None:
            return cache[site.name]
        at = (slice(None), site.position)
        x[at] = cache[site.name][at]
        return x

    return metric(model.run_with_hooks(**corrupt, fwd_hooks=[(site.name, write)]))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("member", FUSED, ids=str)
def test_heads_and_streams(member, direction):
    model = built(member)
    clean, corrupt = (member.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    cross = f"{member.reader}.blocks.{member.fusion}"
    names = [
        f"{cross}.cross_attn.heads.*.hook_z",
        f"{cross}.attn.heads.1.hook_v",
        f"{cross}.hook_resid_mid_cross",
        "vision.blocks.1.attn.heads.2.hook_pattern",
        "vision.blocks.0.hook_mlp_out",
        "*.hook_embed",
    ]
    result = P.activation_patching(
        model, (clean, corrupt), names, total, direction=direction, progress=False
    )
    given = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    expected = torch.cat([loop(member, *given, site) for site in result.sites])
    assert error(torch.from_numpy(result.data.values.flatten()), expected) < 1e-10
    ends = torch.tensor([result.clean.item(), result.corrupt.item()], dtype=torch.float64)
    assert error(ends, torch.cat([total(model(**x)) for x in (clean, corrupt)])) < 1e-12
    assert (expected - ends[1 if direction == "denoise" else 0]).abs().min() > 1e-9


@pytest.mark.parametrize("member", CLIP, ids=str)
def test_images_of_a_clip(member):
    """Its rows are images, each compared with both texts."""
    model = built(member)
    clean, corrupt = (member.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    both = {name: torch.cat([clean[name], corrupt[name]]) for name in clean}
    names = ["vision.*heads.*.hook_z", "vision.blocks.0.hook_resid_post", "vision.hook_embed"]
    result = P.activation_patching(model, (clean, corrupt), names, total, progress=False)
    images = [{**both, "pixel_values": x["pixel_values"]} for x in (clean, corrupt)]
    expected = torch.cat([loop(member, *images, site) for site in result.sites])
    assert len(result.sites) == len({site.name for site in result.sites}) > 3
    assert error(torch.from_numpy(result.data.values.flatten()), expected) < 1e-10
    assert (expected - result.corrupt.item()).abs().min() > 1e-9
    heads = [site for site in result.sites if ".heads." in site.name]
    assert {site.head for site in heads} == set(range(member.vision[1 if member.stages else 2]))
    other = {**corrupt, "pixel_values": clean["pixel_values"]}
    with pytest.raises(ValueError, match="it needs a corrupt image"):
        P.activation_patching(model, (clean, other), names, total, progress=False)


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_a_language_model_that_reads_images(member):
    model = built(member)
    clean, corrupt = (member.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    names = [
        "text.blocks.*.attn.heads.1.hook_z",
        "text.blocks.0.attn.heads.0.hook_k",
        "vision.blocks.0.attn.heads.1.hook_z",
        "hook_image_embeds",
        "text.hook_embed",
    ]
    result = P.activation_patching(model, (clean, corrupt), names, total, progress=False)
    expected = torch.cat([loop(member, clean, corrupt, site) for site in result.sites])
    assert error(torch.from_numpy(result.data.values.flatten()), expected) < 1e-10
    assert (expected - result.corrupt.item()).abs().min() > 1e-9


@pytest.mark.parametrize("metric", [P.logit_diff(3, 4), total], ids=["last", "all"])
@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_positions_of_a_language_model(member, metric):
    """Each resumes at its own position; a metric of the last logits alone asks for no others."""
    model = built(member)
    clean, corrupt = (member.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    length = clean["input_ids"].shape[1]
    names = [
        "text.blocks.*.attn.heads.*.hook_z",
        "text.blocks.1.attn.hook_v",
        "text.blocks.0.hook_resid_post",
        "text.hook_embed",
        "text.ln_final.hook_normalized",
        "vision.blocks.0.hook_mlp_out",
    ]
    sites = model.sites(names, positions=[1, 3, -1])
    sites += model.sites("text.blocks.0.mlp.hook_post", positions=range(length))
    result = P.activation_patching(model, (clean, corrupt), sites, metric, progress=False)
    expected = torch.cat([loop(member, clean, corrupt, site, metric) for site in result.sites])
    assert error(torch.from_numpy(result.data.values.flatten()), expected) < 1e-10
    moved = (expected - result.corrupt.item()).abs() > 1e-9
    assert moved.sum() > len(sites) / 2
    same = P.activation_patching(model, (clean, clean), sites, metric, progress=False)
    assert abs(same.data - same.clean).max() < 1e-12


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_texts_with_two_images(member):
    """Between prepared inputs; another image, or another word behind them."""
    model = built(member)
    clean, other = (
        member.inputs(counts=(2,), padded=False, seed=seed, dtype=torch.float64) for seed in (0, 1)
    )
    word = clean | {"input_ids": other["input_ids"]}
    for corrupt in (other, word):
        sites = model.sites(["text.blocks.0.attn.heads.1.hook_z", "text.hook_embed"])
        result = P.activation_patching(model, (clean, corrupt), sites, total, progress=False)
        expected = torch.cat([loop(member, clean, corrupt, site) for site in result.sites])
        assert error(torch.from_numpy(result.data.values.flatten()), expected) < 1e-10
        assert (expected - result.corrupt.item()).abs().min() > 1e-9
    one = member.inputs(1, padded=False)
    with pytest.raises(ValueError, match="positions do not align"):
        P.activation_patching(model, (clean, one), sites, total, progress=False)


def test_the_zoo_is_whole():
    assert len({str(member) for member in ZOO}) == len(ZOO)
    assert {*FUSED, *CLIP, *LLAVA} == set(ZOO)
