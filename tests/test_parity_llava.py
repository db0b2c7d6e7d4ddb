"""LLaVA against transformers, on random weights: activations, hidden states, gradients."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from zoo import Recorder, error
from zoo_llava import LLAVA_PARITY, LONG, NEXT_PARITY, PATCHES, LlavaMember, rms

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Points that no module of the reference gives, or whose gradient is of another tensor there.
ELSEWHERE = ("hook_scale", "hook_attn_scores", "hook_result", "hook_rot_q", "hook_rot_k")
NO_GRADIENT = ("hook_q_in", "hook_kv_in", "hook_mlp_in", "hook_normalized", "vision.hook_embed")
each = pytest.mark.parametrize("member", [*LLAVA_PARITY, *NEXT_PARITY], ids=str)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def seen(name, value, mask):
    """What stands at positions that are no padding: transformers' others are arbitrary."""
    if not name.startswith(("text", "hook_logits")):
        return value
    return (value.transpose(1, 2) if "pattern" in name else value)[mask]


def worst(found, expected, mask, floor=1.0):
    errors = {
        name: error(seen(name, found[name], mask), seen(name, value, mask), floor)
        for name, value in expected.items()
    }
    name = max(errors, key=lambda name: errors[name])
    return errors[name], name


def alike(value, ours):
    return value.reshape(ours.shape) if value.numel() == ours.numel() else value


@each_dtype
@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 0, 2), (0, 0)], ids=str)
@each
def test_every_activation(member, counts, dtype):
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(counts=counts, dtype=dtype)
    mask = inputs["attention_mask"].bool()
    table = member.table()
    if not sum(counts):
        table = {name: row for name, row in table.items() if name.startswith("text")}
    with torch.no_grad(), Recorder(theirs, {row[0] for row in table.values()}) as record:
        out = theirs(**inputs, output_hidden_states=True)
    logits, cache = ours.run_with_cache(**inputs)
    found = {name: cache[name] for name in table}
    if "vision.hook_embed" in found:
        found["vision.hook_embed"] = found["vision.hook_embed"][:, 1:]  # the rest: class token
    expected = {name: alike(record.value(row), found[name]) for name, row in table.items()}
    assert worst(found, expected, mask)[0] < TOLERANCE[dtype], worst(found, expected, mask)
    assert error(logits[mask], out.logits[mask]) < TOLERANCE[dtype]
    # Nobody listens: fused attention.
    assert error(ours(**inputs)[mask], out.logits[mask]) < TOLERANCE[dtype]
    states = [cache[f"text.blocks.{i}.hook_resid_pre"] for i in range(ours.text.cfg.n_layers)]
    states.append(ours.text.ln_final(cache[f"text.blocks.{len(states) - 1}.hook_resid_post"]))
    assert len(states) == len(out.hidden_states)
    for state, hidden in zip(states, out.hidden_states, strict=True):
        assert error(state[mask], hidden[mask]) < TOLERANCE[dtype]


@each
def test_the_table_names_every_point_but_those_checked_elsewhere(member):
    model = member.model()
    unnamed = {n for n in model.hook_names() if not n.endswith(ELSEWHERE)} - set(member.table())
    assert unnamed == {"vision.hook_pos_embed"}
    # What is behind the feature layer is kept and has no points.
    assert len(model.vision.blocks) == member.reads == model.cfg.vision.n_layers
    assert not any("unread" in name for name in model.hook_names())


@each
def test_rotary_scores_and_norms(member):
    theirs, ours = member.pair()
    inputs = member.inputs(2)
    _, cache = ours.run_with_cache(**inputs)
    at = torch.arange(inputs["input_ids"].shape[1])[None]
    where = "text.blocks.0.attn"
    q, k = (cache[f"{where}.hook_{name}"] for name in "qk")
    cos, sin = theirs.model.language_model.rotary_emb(q, at)
    rot_q, rot_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert error(cache[f"{where}.hook_rot_q"], rot_q) < 1e-12
    assert error(cache[f"{where}.hook_rot_k"], rot_k) < 1e-12
    rot_k = rot_k.repeat_interleave(member.text[2] // member.text[3], 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", rot_q, rot_k) / q.shape[-1] ** 0.5
    shown, given = cache[f"{where}.hook_attn_scores"], cache[f"{where}.hook_pattern"] > 0
    assert error(shown[given], scores[given]) < 1e-12
    assert (shown[~given] == torch.finfo(shown.dtype).min).all()
    stream = cache["text.blocks.0.hook_resid_mid"]
    scale = (stream.square().mean(-1, keepdim=True) + ours.text.cfg.eps).sqrt()
    assert error(cache["text.blocks.0.ln2.hook_scale"], scale) < 1e-12
    assert error(cache["text.blocks.0.ln2.hook_normalized"], rms(stream)) < 1e-12


@each
def test_the_reference_of_single_precision_is_transformers_itself(member, monkeypatch):
    """Its own norms, rotary angles and attention, eager and fused, not those of the zoo."""
    for owner, name, theirs in PATCHES:
        monkeypatch.setattr(owner, name, theirs)
    inputs = member.inputs(dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    theirs, ours = member.pair(torch.float32)
    logits = ours(**inputs)[mask]
    with torch.no_grad():
        assert error(logits, theirs(**inputs).logits[mask]) < 1e-5
        theirs.set_attn_implementation("sdpa")
        assert error(logits, theirs(**inputs).logits[mask]) < 1e-5


@pytest.mark.parametrize("member", LONG, ids=str)
def test_prompts_of_the_released_length(member, monkeypatch):
    """576 tokens an image, in single precision, against transformers itself."""
    for owner, name, theirs in PATCHES:
        monkeypatch.setattr(owner, name, theirs)
    theirs, ours = member.pair(torch.float32)
    inputs = member.inputs(2, dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert error(ours(**inputs)[mask], theirs(**inputs).logits[mask]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_the_widths_of_7b(kv_heads, monkeypatch):
    """One language and two image layers of the released widths, against transformers itself."""
    for owner, name, theirs in PATCHES:
        monkeypatch.setattr(owner, name, theirs)
    language = "llama" if kv_heads == 32 else "mistral"
    sizes = {"image": 336, "patch": 14, "vocab": 32064, "language": language}
    member = LlavaMember((1024, 2, 16), (4096, 1, 32, kv_heads, 128), **sizes)
    theirs, ours = member.pair(torch.float32)
    inputs = member.inputs(2, dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True)
    logits, cache = ours.run_with_cache(**inputs, names_filter="text.blocks.0.hook_resid_*")
    assert error(logits[mask], expected.logits[mask]) < 1e-5
    assert (
        error(cache["text.blocks.0.hook_resid_pre"][mask], expected.hidden_states[0][mask]) < 1e-5
    )
    last = ours.text.ln_final(cache["text.blocks.0.hook_resid_post"])
    assert error(last[mask], expected.hidden_states[1][mask]) < 1e-5


def test_far_positions_are_turned_as_far(monkeypatch):
    """In single precision, at the positions of a real prompt, against transformers' own angles."""
    for owner, name, theirs in PATCHES:
        monkeypatch.setattr(owner, name, theirs)
    theirs, ours = LLAVA_PARITY[0].pair(torch.float32)
    q = torch.randn(1, 3000, 2, 8, generator=torch.Generator().manual_seed(0))
    at = torch.arange(3000)
    cos, sin = theirs.model.language_model.rotary_emb(q, at[None])
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    assert error(ours.text.blocks[0].attn._turned(q, at), expected) < 1e-6


@each_dtype
@each
def test_every_gradient(member, dtype):
    """With respect to pixels, embeddings and every point, of a weighted sum of the logits."""
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(counts=(1, 0, 2), dtype=dtype)
    mask = inputs["attention_mask"].bool()
    table = member.table()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(*mask.shape, member.vocab, generator=generator).to(dtype)
    weights = weights * mask[..., None]

    pixels = inputs["pixel_values"].clone().requires_grad_()
    theirs.requires_grad_()
    with Recorder(theirs, {row[0] for row in table.values()}, grad=True) as record:
        (theirs(**inputs | {"pixel_values": pixels}).logits * weights).sum().backward()
    compared = [name for name in table if not name.endswith(NO_GRADIENT)]
    expected = {name: record.gradient(table[name]) for name in compared}
    pixel_grad = pixels.grad
    theirs.requires_grad_(False)

    _, cache = ours.run_with_cache(
        **inputs, incl_bwd=True, metric=lambda logits: (logits * weights).sum()
    )
    found = {name: cache[f"{name}_grad"] for name in compared}
    expected = {name: alike(value, found[name]) for name, value in expected.items()}
    for name in compared:
        if name.startswith("text") and name.endswith("hook_pattern"):
            # Of a key that is masked it is the product with a value, arbitrary where padding is.
            given = cache[name] > 0
            found[name], expected[name] = found[name] * given, expected[name] * given
    assert worst(found, expected, mask)[0] < TOLERANCE[dtype], worst(found, expected, mask)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4  # of each tensor's own largest value
    largest = worst(found, expected, mask, 0.0)
    assert largest[0] < tolerance, largest

    mine = inputs["pixel_values"].clone().requires_grad_()
    (ours(**inputs | {"pixel_values": mine}) * weights).sum().backward()
    assert error(mine.grad, pixel_grad, 0.0) < tolerance


@each_dtype
@each
def test_projected_features(member, dtype):
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(4, dtype=dtype)
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        expected = theirs.get_image_features(**images).pooler_output
    found = ours.get_image_features(**images)
    assert len(found) == len(expected) == 4 and ours.cfg.n_image_tokens == member.size
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and error(one, other) < TOLERANCE[dtype]
