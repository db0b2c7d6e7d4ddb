"""LLaVA against TransformerLens' bridge of the same transformers model, names mapped.

Where the bridge is not to be followed, ours is held against transformers itself: the bridge
discards what is written to patterns of the image encoder, its decompositions begin before the image
is merged in, and its patching has no image.
"""

import subprocess

import pytest
import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from zoo import error
from zoo_llava import LLAMA, LLAVA_PARITY, MISTRAL, PATCHES

from hooked_vlm import patching as P

GROUPED = LLAVA_PARITY[3]
each = pytest.mark.parametrize("member", [LLAMA, MISTRAL, *LLAVA_PARITY[2:]], ids=str)
few = pytest.mark.parametrize("member", [LLAMA, MISTRAL, GROUPED], ids=str)
each_count = pytest.mark.parametrize("counts", [(1, 1), (1, 2)], ids=str)
# Of these the bridge has a sum, and of the projector only what it gives.
OURS_ALONE = {
    *("vision.hook_embed", "vision.hook_pos_embed"),
    *("projector.hook_pre", "projector.hook_post"),
}


@pytest.fixture(autouse=True)
def as_released(monkeypatch):
    """Nothing is installed, and transformers computes as it does on its own."""

    def install(*args, **kwargs):
        pytest.fail(f"a test wants to run {args}")

    monkeypatch.setattr(subprocess, "check_call", install)
    monkeypatch.setattr(
        "transformer_lens.model_bridge.sources.transformers.helpers._ensure_torchvision", install
    )
    for owner, name, theirs in PATCHES:
        monkeypatch.setattr(owner, name, theirs)


def bridged(member):
    """The bridge and ours of the same weights; the bridge keeps the reference for itself."""
    theirs, ours = member.pair(torch.float32)
    architecture = type(theirs).__name__
    return build_bridge_from_module(theirs, architecture, hf_config=theirs.config), ours


def run(bridge, inputs):
    """Its pass, with positions counted as transformers and ours do, padding included."""
    ids, rest = inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}
    return bridge.run_with_cache(ids, **rest, position_ids=torch.arange(ids.shape[1])[None])


def table(model):
    """For each of our points the bridge's."""
    vision, text = "vision_encoder", "blocks"
    rows = {
        "vision.ln_pre.hook_scale": f"{vision}.pre_layernorm.hook_scale",
        "vision.ln_pre.hook_normalized": f"{vision}.pre_layernorm.hook_normalized",
        "hook_image_embeds": "vision_projector.hook_vision_proj_out",
        "text.hook_embed": "blocks.0.hook_resid_pre",  # hook_embed is before the merge
        "text.ln_final.hook_scale": "ln_final.hook_scale",
        "text.ln_final.hook_normalized": "ln_final.hook_normalized",
        "hook_logits": "unembed.hook_out",
    }
    same = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    same += [f"attn.hook_{name}" for name in ("q", "k", "v", "z", "attn_scores", "pattern")]
    same += [f"{ln}.hook_{name}" for ln in ("ln1", "ln2") for name in ("scale", "normalized")]
    same += ["mlp.hook_pre", "mlp.hook_post"]
    rotary = ["attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_pre_linear"]
    for stack, where, more in (
        ("vision", f"{vision}.encoder_layers", []),
        ("text", text, rotary),
    ):
        for layer in range(model.stacks[stack].cfg.n_layers):
            ours, theirs = f"{stack}.blocks.{layer}", f"{where}.{layer}"
            rows |= {f"{ours}.{name}": f"{theirs}.{name}" for name in same + more}
            rows |= {
                f"{ours}.attn.hook_q_in": f"{theirs}.ln1.hook_out",
                f"{ours}.attn.hook_kv_in": f"{theirs}.ln1.hook_out",
                f"{ours}.hook_resid_mid": f"{theirs}.ln2.hook_in",
                f"{ours}.hook_mlp_in": f"{theirs}.ln2.hook_in",  # its own may be after it
            }
    return rows


def seen(name, value, mask):
    """What stands at queries that are no padding; the rest is arbitrary."""
    if not name.startswith(("text", "hook_logits")):
        return value
    return (value.transpose(1, 2) if "pattern" in name or "scores" in name else value)[mask]


# --- what both have


@each_count
@each
def test_every_activation(member, counts):
    bridge, ours = bridged(member)
    inputs = member.inputs(counts=counts, dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    expected_logits, expected = run(bridge, inputs)
    logits, cache = ours.run_with_cache(**inputs)
    assert error(logits[mask], expected_logits[mask]) < 1e-5
    rows = table(ours)
    assert set(ours.hook_names()) - set(rows) - OURS_ALONE == {
        name for name in ours.hook_names() if name.endswith("hook_result")
    }
    for name, theirs in rows.items():
        found, value = cache[name], expected[theirs]
        assert found.shape == value.shape, name
        if name.startswith("vision") and name.endswith("attn_scores"):
            found = found.softmax(-1)  # what the bridge has under that name is the pattern
        elif name.endswith("attn_scores"):  # hidden ones hold each library's own lowest number
            shown = cache[name.replace("attn_scores", "pattern")] > 0
            found, value = found.where(shown, 0), value.where(shown, 0)
        assert error(seen(name, found, mask), seen(name, value, mask)) < 1e-5, name
    embedded = cache["vision.hook_embed"] + cache["vision.hook_pos_embed"]
    assert error(embedded, expected["vision_encoder.hook_vision_embed"]) < 1e-5
    words = mask & (inputs["input_ids"] != member.image_token)
    assert error(cache["text.hook_embed"][words], expected["hook_embed"][words]) < 1e-5


@few
def test_what_heads_add(member):
    bridge, ours = bridged(member)
    bridge.set_use_attn_result(True)
    inputs = member.inputs(counts=(1, 2), dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    _, expected = run(bridge, inputs)
    _, cache = ours.run_with_cache(**inputs, names_filter="*hook_result")
    for layer in range(member.text[1]):
        name = f"blocks.{layer}.attn.hook_result"
        assert error(cache[f"text.{name}"][mask], expected[name][mask]) < 1e-5


@few
def test_without_an_image(member):
    bridge, ours = bridged(member)
    inputs = member.inputs(counts=(0, 0), dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    _, expected = run(bridge, inputs)
    _, cache = ours.run_with_cache(**inputs)
    for name in ("hook_z", "hook_pattern", "hook_rot_k"):
        for layer in range(member.text[1]):
            point = f"blocks.{layer}.attn.{name}"
            found, value = cache[f"text.{point}"], expected[point]
            assert error(seen(f"text.{name}", found, mask), seen(f"text.{name}", value, mask)) < (
                1e-5
            )


@few
def test_the_lens_and_the_stacks(member):
    bridge, ours = bridged(member)
    inputs = member.inputs(counts=(1, 2), dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    _, theirs = run(bridge, inputs)
    _, cache = ours.run_with_cache(**inputs)
    text = cache.stack("text")
    for given in ({"incl_mid": True}, {"targets": [5, 3]}, {"return_type": "probs"}):
        found = text.logit_lens(positions=None, **given)
        expected = theirs.logit_lens(positions=None, **given)
        assert found.labels == expected.labels
        assert error(found.values[:, mask], expected.values[:, mask]) < 1e-5
        assert error(found.readout.entropy[:, mask], expected.readout.entropy[:, mask]) < 1e-5
        if "targets" in given:
            ranks = [lens.rank_trajectory(5)[:, mask] for lens in (found, expected)]
            assert torch.equal(*ranks)
    layers = member.text[1]
    for method, given in (
        ("accumulated_resid", {"incl_mid": True, "apply_ln": True}),
        ("stack_head_results", {}),
        ("stack_neuron_results", {"layer": layers}),
        ("stack_activation", {"activation_name": "rot_q"}),
    ):
        found, expected = (getattr(of, method)(**given) for of in (text, theirs))
        assert error(found[:, mask], expected[:, mask]) < 1e-5, method


# --- where the bridge is not to be followed


def zero(x, hook):
    return torch.zeros_like(x)


def first_key(scores, hook):
    """All attention on the class token."""
    scores[..., 1:] = torch.finfo(scores.dtype).min
    return scores


@pytest.mark.parametrize("head", [None, 1])
@few
def test_writes_to_patterns_of_the_image_encoder_reach_the_logits(member, head):
    """As transformers computes when what the head (all of them, for None) gives is exchanged."""
    theirs, ours = member.pair(torch.float32)
    inputs = member.inputs(counts=(1, 2), dtype=torch.float32)
    mask, clean = inputs["attention_mask"].bool(), ours(**inputs)
    width = member.vision[0] // member.vision[2]
    which = slice(None) if head is None else slice(head * width, (head + 1) * width)
    heads = "" if head is None else f"heads.{head}."
    for layer in range(member.reads):
        attn = theirs.model.vision_tower.encoder.layers[layer].self_attn
        values = []
        keep = attn.v_proj.register_forward_hook(lambda m, i, out: values.append(out))  # noqa: B023
        for point, write in (("hook_pattern", zero), ("hook_attn_scores", first_key)):

            def exchange(module, args, write=write):
                z = args[0].clone()
                z[..., which] = 0 if write is zero else values[-1][:, :1, which]  # noqa: B023
                return (z,)

            handle = attn.out_proj.register_forward_pre_hook(exchange)
            with torch.no_grad():
                expected = theirs(**inputs).logits
            handle.remove()
            name = f"vision.blocks.{layer}.attn.{heads}{point}"
            found = ours.run_with_hooks(**inputs, fwd_hooks=[(name, write)])
            assert error(found[mask], expected[mask]) < 1e-5, name
            assert (found - clean)[mask].abs().max() > 1e-3, name
        keep.remove()


@each_count
@few
def test_parts_of_the_stream_sum_to_that_of_transformers(member, counts):
    theirs, ours = member.pair(torch.float32)
    inputs = member.inputs(counts=counts, dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    doors, tower = [], theirs.model.language_model
    for block in tower.layers:
        block.register_forward_pre_hook(lambda module, args: doors.append(args[0].clone()))
    tower.norm.register_forward_pre_hook(lambda module, args: doors.append(args[0].clone()))
    with torch.no_grad():
        logits = theirs(**inputs).logits
    _, cache = ours.run_with_cache(**inputs)
    text = cache.stack("text")
    assert len(doors) == member.text[1] + 1
    images = mask & (inputs["input_ids"] == member.image_token)
    assert images.sum() == sum(counts) * member.size
    for layer, expected in enumerate(doors):
        for parts in (
            text.decompose_resid(layer),
            text.get_full_resid_decomposition(layer),
            text.get_full_resid_decomposition(layer, expand_neurons=False),
        ):
            for where in (images, mask):
                assert error(parts.sum(0)[where], expected[where]) < 1e-5
    parts = text.decompose_resid()
    found = torch.stack([text.logit_attrs(parts, token).sum(0) for token in range(member.vocab)], 2)
    assert error(found[mask], logits[mask]) < 1e-5


def last_logits(logits):
    return logits[:, -1, 5] - logits[:, -1, 3]


@few
def test_patching_keeps_the_image(member):
    """Every head in turn, from another image, as when transformers' o_proj reads it instead."""
    theirs, ours = member.pair(torch.float32)
    clean = member.inputs(counts=(1,), padded=False, dtype=torch.float32)
    other = member.inputs(counts=(1,), padded=False, dtype=torch.float32, seed=1)
    corrupt = clean | {"pixel_values": other["pixel_values"]}
    sites = "text.blocks.*.attn.heads.*.hook_z"
    swept = P.activation_patching(ours, (clean, corrupt), sites, last_logits, progress=False)
    _, layers, heads, _, width = member.text
    expected = torch.empty(layers, heads)
    for layer, block in enumerate(theirs.model.language_model.layers):
        out, kept = block.self_attn.o_proj, []
        handle = out.register_forward_pre_hook(lambda m, args: kept.append(args[0].clone()))  # noqa: B023
        with torch.no_grad():
            theirs(**clean)
        handle.remove()
        for head in range(heads):

            def patch(module, args, which=slice(head * width, (head + 1) * width)):
                z = args[0].clone()
                z[..., which] = kept[0][..., which]  # noqa: B023
                return (z,)

            handle = out.register_forward_pre_hook(patch)
            with torch.no_grad():
                expected[layer, head] = last_logits(theirs(**corrupt).logits)[0]
            handle.remove()
    found = torch.from_numpy(swept.data.values.reshape(layers, heads)).float()
    assert error(found, expected) < 1e-5
    with torch.no_grad():
        ends = [last_logits(theirs(**inputs).logits).item() for inputs in (clean, corrupt)]
    assert abs(swept.clean.item() - ends[0]) < 1e-5 and abs(swept.corrupt.item() - ends[1]) < 1e-5
    assert abs(ends[0] - ends[1]) > 1e-2 and (expected - ends[1]).abs().max() > 1e-3
    same = P.activation_patching(ours, (clean, clean), sites, last_logits, progress=False)
    assert abs(same.data.values - ends[0]).max() < 1e-5
