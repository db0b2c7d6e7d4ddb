"""Path patching equals full passes in which everything off the path is held by hand."""

import functools

import numpy as np
import pytest
import torch
from whole_zoo import FUSED
from zoo import BLIP, QUIET, built, total
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP
from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import module_of

ITM, _, VQA = BLIP


def pair_of(member):
    return tuple(member.inputs(1, padded=False, seed=seed, dtype=torch.float64) for seed in (0, 1))


def part_of(name, pre_norm):
    """The output point of the part that a site is inside of."""
    site = Site.parse(name)
    top = site.component.split(".")[0]
    norms = {"ln1": "attn", "ln2": "mlp"} if pre_norm else {}
    top = {"hook_mlp_in": "mlp", "hook_mlp_out": "mlp", "hook_attn_out": "attn"}.get(top, top)
    top = norms.get(top, top)
    if site.layer is None or top not in ("attn", "cross_attn", "mlp"):
        return None
    return f"{site.stack}.blocks.{site.layer}.hook_{top}_out"


def put(x, value, site, point):
    """Writes a site's part of a module's activation."""
    where = [slice(None)] * x.dim()
    if site.head is not None:
        where[point.head_axis] = site.head
    if site.position is not None:
        where[point.pos_dim] = site.position
    x[tuple(where)] = value[tuple(where)]
    return x


@functools.cache
def runs(member):
    """The unpatched runs of both inputs, whole."""
    return [built(member).run_with_cache(**one)[1] for one in pair_of(member)]


def along(model, other, target, hops, values, own):
    """The metric when the first hop is patched and each next one gets only what comes straight."""
    outs = [n for n in model.hook_dict if n.endswith(("attn_out", "mlp_out"))]
    reads = [n for n in model.hook_dict if n.endswith(("attn.hook_q_in", "hook_mlp_in"))]
    reads += [n for n in model.hook_dict if n.endswith(".attn.hook_kv_in")]
    for number, (now, later) in enumerate(zip(hops, [*hops[1:], None], strict=True)):
        hooks = []
        if later is not None:
            carriers = {part_of(s.name, model.stacks[s.stack].pre_norm) for s in now if s.stack}
            held = [name for name in outs if name not in carriers]
            if number:
                held += [r for r in reads if part_of_read(r) in carriers]
            hooks += [(name, lambda x, hook: own[hook.name]) for name in held]
        for site in now:
            hooks.append(
                (
                    module_of(site.name),
                    lambda x, hook, site=site, values=values: put(x, values[hook.name], site, hook),
                )
            )
        if later is None or later == ["logits"]:
            return total(model.run_with_hooks(**target, fwd_hooks=hooks)).item()
        with model.hooks(hooks):
            _, values = model.run_with_cache(
                **target, names_filter=[module_of(site.name) for site in later]
            )


def part_of_read(name):
    return part_of(name.replace("hook_mlp_in", "hook_mlp_out"), pre_norm=False)


def compare(member, senders, receivers, via=(), positions=None, direction="denoise"):
    model, (clean, corrupt) = built(member), pair_of(member)
    result = P.path_patching(
        model, (clean, corrupt), senders, receivers, total, positions, direction, via=via, **QUIET
    )
    other, target = (clean, corrupt) if direction == "denoise" else (corrupt, clean)
    values, own = runs(member) if direction == "denoise" else runs(member)[::-1]
    middle = [model.sites(one) if not isinstance(one, list) else one for one in via]
    end = ["logits"] if receivers == "hook_logits" else (
        receivers if isinstance(receivers, list) else model.sites(receivers)
    )  # fmt: skip
    expected = [
        along(model, other, target, [[Site.parse(s.name, s.position)], *middle, end], values, own)
        for s in result.sites
    ]
    found = result.data.values.flatten()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * max(1, np.abs(expected).max()))
    unpatched = result.start.values
    assert (np.abs(np.array(expected) - unpatched) > 1e-9).any()
    return result


@pytest.mark.parametrize(
    ("member", "direction"),
    [(ITM, "noise"), *((member, "denoise") for member in FUSED)],
    ids=str,
)
def test_across_stacks(member, direction):
    """From heads, MLPs and streams of the image encoder to keys, values and queries of a reader."""
    stack, layer = member.reader, member.fusion
    senders = [
        "vision.blocks.0.attn.heads.*.hook_z",
        "vision.blocks.0.hook_mlp_out",
        "vision.blocks.1.hook_resid_pre",
        f"{stack}.hook_embed",
        f"{stack}.blocks.0.attn.heads.1.hook_v",
    ]
    cross = f"{stack}.blocks.{layer}.cross_attn"
    for receivers in (f"{cross}.heads.*.hook_v", f"{cross}.heads.1.hook_q", f"{cross}.hook_k"):
        compare(member, senders, receivers, direction=direction)
    model = built(member)
    some = model.sites(["vision.blocks.0.hook_resid_post"], positions=[1, 2])
    compare(member, some, f"{cross}.heads.0.hook_z", direction=direction)


@pytest.mark.parametrize("member", [ITM, *LLAVA], ids=str)
def test_within_a_stack(member):
    senders = [
        "text.blocks.0.attn.heads.*.hook_z",
        "text.blocks.0.attn.heads.0.hook_q",
        "text.blocks.0.hook_mlp_out",
        "text.blocks.0.mlp.hook_post",
        "text.blocks.0.hook_resid_mid",
    ]
    for receivers in ("text.blocks.1.attn.heads.1.hook_q", "text.blocks.1.hook_mlp_in"):
        compare(member, senders, receivers)
        compare(member, senders, "hook_logits", via=[receivers])
    compare(member, senders, "hook_logits")
    model = built(member)
    both = model.sites(["text.blocks.1.attn.hook_k", "text.blocks.1.mlp.hook_pre"])
    compare(member, senders, both)


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_positions_of_a_causal_stack(member):
    model = built(member)
    senders = model.sites("text.blocks.0.attn.heads.*.hook_z", positions=[-1, 3])
    length = pair_of(member)[0]["input_ids"].shape[1]
    end = [Site.parse("text.blocks.1.attn.heads.0.hook_q", length - 1)]
    compare(member, senders, end)
    compare(member, senders, "text.blocks.1.attn.heads.0.hook_v")
    compare(member, senders, "hook_logits", via=["text.blocks.1.attn.heads.0.hook_v"])


def test_image_to_question_to_answer():
    """From the image by a head of the question to one of the answer, in one call."""
    senders = ["vision.blocks.1.hook_resid_post", "vision.blocks.0.attn.heads.1.hook_z"]
    cross = [Site.parse("text.blocks.0.cross_attn.heads.1.hook_z", 2)]
    compare(VQA, senders, "decoder.blocks.1.cross_attn.heads.0.hook_v", via=[cross])
    compare(
        VQA,
        senders,
        "hook_logits",
        via=[cross, "decoder.blocks.0.cross_attn.heads.1.hook_v", "decoder.blocks.1.hook_mlp_in"],
    )
    toy = HookedBLIP.from_pretrained("toy-blip-vqa")
    found = P.path_patching(
        toy,
        shapes_pairs(2, 0, "vqa"),
        "text.blocks.*.cross_attn.heads.*.hook_z",
        "decoder.blocks.*.cross_attn.heads.*.hook_v",
        **QUIET,
    )
    assert found.data.dims == ("pair", "layer", "head")
    assert found.restored.max() > 0.05
    assert found.provenance["method"] == "path_patching"


@pytest.mark.parametrize("member", [ITM, *LLAVA], ids=str)
def test_of_senders_together_the_later_does_not_see_the_earlier(member):
    """Other heads of the later one's attention are as they were, which read the earlier one."""
    model, (_, target) = built(member), pair_of(member)
    values, own = runs(member)
    both = model.sites([f"text.blocks.{layer}.attn.heads.1.hook_z" for layer in (0, 1)])
    found = P.path_patching(model, pair_of(member), P.together(both), "hook_logits", total, **QUIET)
    senders = {module_of(site.name): site for site in both}
    carriers = {part_of(name, pre_norm=False) for name in senders}
    outs = [n for n in model.hook_dict if n.endswith(("attn_out", "mlp_out"))]
    hooks = [(n, lambda x, hook: own[hook.name]) for n in outs if n not in carriers]
    for name in senders:

        def write(x, hook):
            return put(own[hook.name].clone(), values[hook.name], senders[hook.name], hook)

        hooks.append((name, write))
    expected = total(model.run_with_hooks(**target, fwd_hooks=hooks)).item()
    assert found.data.item() == pytest.approx(expected, abs=1e-10)
    assert abs(expected - found.start.item()) > 1e-9


def test_all_paths_together_are_the_patch():
    """A stream of a single block's input reaches the output by its parts alone."""
    model, pair = built(ITM), pair_of(ITM)
    last = "text.blocks.1.hook_mlp_out"
    direct = P.path_patching(model, pair, last, "hook_logits", total, **QUIET)
    whole = P.activation_patching(model, pair, last, total, **QUIET)
    np.testing.assert_allclose(direct.data, whole.data, rtol=0, atol=1e-10)


def test_paths_that_cannot_be():
    model, pair = built(ITM), pair_of(ITM)
    with pytest.raises(ValueError, match=r"nothing reaches 'vision.blocks.0.hook_mlp_in': it co"):
        P.path_patching(
            model, pair, "text.blocks.0.hook_mlp_out", "vision.blocks.0.hook_mlp_in", **QUIET
        )
    with pytest.raises(ValueError, match="it goes with no other receiver"):
        P.path_patching(
            model, pair, "text.hook_embed", ["hook_logits", "text.blocks.1.hook_mlp_in"], **QUIET
        )
    late = P.path_patching(
        model, pair, "text.blocks.*.hook_mlp_out", "text.blocks.1.attn.hook_q", total, **QUIET
    )
    assert abs(late.difference.values[0, 1]) < 1e-12 < abs(late.difference.values[0, 0])
    assert model.list_hooks() == {}
