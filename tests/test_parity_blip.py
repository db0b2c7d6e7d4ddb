"""BLIP against transformers: every activation, every gradient, on random weights."""

import pytest
import torch
from torch import Tensor
from zoo import FULL, PARITY, Member, Recorder, Size, error

from hooked_vlm import HookedBLIP

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
TINY_ITM = next(m for m in PARITY if m.task == "itm")
TINY_VQA = next(m for m in PARITY if m.task == "vqa")
# Gradients that the reference cannot tell: one of its tensors is several of our points.
NO_GRADIENT = ("hook_q_in", "hook_kv_in", "hook_mlp_in", "hook_embed", "hook_pos_embed")


def padded(member: Member) -> bool:
    return member.task != "vqa"  # transformers drops the mask of questions: specs fact 1


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1.0) -> str:
    """What a failure says: the worst of all names."""
    errors = {name: error(found[name], value, floor) for name, value in expected.items()}
    name = max(errors, key=lambda name: errors[name])
    return f"{errors[name]:.1e} {name}"


def check_activations(member: Member, dtype: torch.dtype, rows: int) -> None:
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(rows, padded=padded(member), dtype=dtype)
    table = member.table()
    with torch.no_grad(), Recorder(theirs, {row[0] for row in table.values()}) as record:
        theirs(**inputs)
    logits, cache = ours.run_with_cache(**inputs, names_filter=list(table))
    expected = {name: record.value(row) for name, row in table.items()}
    found = {name: cache[name] for name in table}
    found["vision.hook_embed"] = found["vision.hook_embed"][:, 1:]  # the rest is the class token
    assert torch.equal(logits, cache["hook_logits"])
    assert float(worst(found, expected).split()[0]) < TOLERANCE[dtype], worst(found, expected)
    # Nobody listens: fused attention and norms.
    plain = error(ours(**inputs), expected["hook_logits"])
    assert plain < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("member", PARITY, ids=str)
def test_every_activation(member, dtype):
    check_activations(member, dtype, rows=3)


@pytest.mark.slow
@pytest.mark.parametrize("member", FULL, ids=str)
def test_every_activation_at_full_size(member):
    check_activations(member, torch.float32, rows=2)


@pytest.mark.parametrize("member", PARITY, ids=str)
def test_the_table_names_every_point_but_those_checked_elsewhere(member):
    elsewhere = ("hook_scale", "hook_normalized", "hook_attn_scores", "hook_result")
    unnamed = {n for n in member.model().hook_names() if not n.endswith(elsewhere)}
    assert unnamed - set(member.table()) == {"vision.hook_pos_embed"}


@pytest.mark.parametrize("member", PARITY[:3], ids=str)
def test_class_token_and_positions_of_images(member):
    theirs, ours = member.pair()
    inputs = member.inputs(2, padded=padded(member))
    _, cache = ours.run_with_cache(**inputs, names_filter="vision.hook_*")
    table = theirs.vision_model.embeddings
    assert torch.equal(cache["vision.hook_embed"][:, :1], table.class_embedding.expand(2, 1, -1))
    assert torch.equal(cache["vision.hook_pos_embed"], table.position_embedding.expand(2, -1, -1))


@pytest.mark.parametrize("member", PARITY[:3], ids=str)
def test_norms_and_scores(member):
    """hook_scale is the root of variance plus eps, scores are q k^T / sqrt(d_head) or masked."""
    theirs, ours = member.pair()
    inputs = member.inputs(3, padded=padded(member))
    norms = {
        "vision.ln_final": "vision_model.post_layernorm",
        "vision.blocks.1.ln1": "vision_model.encoder.layers.1.layer_norm1",
        "vision.blocks.0.ln2": "vision_model.encoder.layers.0.layer_norm2",
    }
    stack, model = ("text", "text_encoder") if ours.cfg.text else ("decoder", "text_decoder.bert")
    layer = f"{model}.encoder.layer.1"
    norms[f"{stack}.ln_embed"] = f"{model}.embeddings.LayerNorm"
    norms[f"{stack}.blocks.1.ln1"] = f"{layer}.attention.output.LayerNorm"
    norms[f"{stack}.blocks.1.ln_cross"] = f"{layer}.crossattention.output.LayerNorm"
    norms[f"{stack}.blocks.1.ln2"] = f"{layer}.output.LayerNorm"
    if ours.cfg.decoder:
        norms["unembed.ln"] = "text_decoder.cls.predictions.transform.LayerNorm"
    with torch.no_grad(), Recorder(theirs, set(norms.values())) as record:
        theirs(**inputs)
    _, cache = ours.run_with_cache(**inputs)
    for name, reference in norms.items():
        given = record.values[reference, "in"]
        module = theirs.get_submodule(reference)
        scale = (given.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        assert error(cache[f"{name}.hook_scale"], scale) < 1e-10, name
        normalized = (record.values[reference, "out"] - module.bias) / module.weight
        assert error(cache[f"{name}.hook_normalized"], normalized) < 1e-10, name
    for part in ("attn", "cross_attn"):
        where = f"{stack}.blocks.1.{part}"
        q, k = cache[f"{where}.hook_q"], cache[f"{where}.hook_k"]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        seen = cache[f"{where}.hook_pattern"] > 0
        assert seen.any() and error(cache[f"{where}.hook_attn_scores"][seen], scores[seen]) < 1e-10
        hidden = cache[f"{where}.hook_attn_scores"][~seen]
        assert (hidden == torch.finfo(hidden.dtype).min).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("member", PARITY, ids=str)
def test_every_gradient(member, dtype):
    """With respect to pixels, embeddings and every point, of a weighted sum of the logits."""
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(3, padded=padded(member), dtype=dtype)
    table = member.table()
    logits = ours(**inputs)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    pixels = inputs["pixel_values"].clone().requires_grad_()
    theirs.requires_grad_()
    with Recorder(theirs, {row[0] for row in table.values()}, grad=True) as record:
        theirs(**inputs | {"pixel_values": pixels})
    (record.found[table["hook_logits"][:2]] * weights).sum().backward()
    compared = [name for name in table if not name.endswith(NO_GRADIENT)]
    expected = {name: record.gradient(table[name]) for name in compared}
    gradients = {n: p.grad for n, p in theirs.named_parameters()}  # before ours, which shares them
    pixel_grad = pixels.grad
    theirs.requires_grad_(False)

    _, cache = ours.run_with_cache(
        **inputs, incl_bwd=True, metric=lambda logits: (logits * weights).sum()
    )
    found = {name: cache[f"{name}_grad"] for name in compared}
    assert float(worst(found, expected, 1.0).split()[0]) < TOLERANCE[dtype]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4  # of each tensor's own largest value
    assert float(worst(found, expected, 0.0).split()[0]) < tolerance, worst(found, expected, 0.0)

    mine = inputs["pixel_values"].clone().requires_grad_()
    (ours(**inputs | {"pixel_values": mine}) * weights).sum().backward()
    assert error(mine.grad, pixel_grad, 0.0) < tolerance
    assert error(mine.grad, pixel_grad) < TOLERANCE[dtype]

    # A row of an embedding table collects the gradients of the places where it is used.
    pos = cache["vision.hook_pos_embed_grad"].sum(0, keepdim=True)
    name = "vision_model.embeddings.position_embedding"
    assert error(pos, gradients[name], 0.0) < tolerance
    if ours.cfg.text is not None:
        embed, ids = cache["text.hook_embed_grad"], inputs["input_ids"]
        table_grad = torch.zeros_like(ours.text.W_E).index_add(
            0, ids.flatten(), embed.flatten(0, 1)
        )
        name = "text_encoder.embeddings.word_embeddings.weight"
        assert error(table_grad[1:], gradients[name][1:], 0.0) < tolerance  # 0 is torch's padding
    stack, ids = ("text", "input_ids") if member.task == "itm" else ("decoder", "input_ids")
    ids = "decoder_input_ids" if member.task == "vqa" else ids
    name = {"text": "text_encoder", "decoder": "text_decoder.bert"}[stack]
    name = f"{name}.embeddings.position_embeddings.weight"
    pos = cache[f"{stack}.hook_pos_embed_grad"].sum(0)
    assert error(pos, gradients[name][: inputs[ids].shape[1]], 0.0) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_similarity_and_the_text_only_pass(dtype):
    theirs, ours = TINY_ITM.pair(dtype)
    inputs = TINY_ITM.inputs(3, dtype=dtype)
    with torch.no_grad():
        out = theirs(**inputs, use_itm_head=False)
    assert error(ours.similarity(**inputs), out.itm_score) < TOLERANCE[dtype]
    with ours.hooks():
        entries, hooks, _ = ours.get_caching_hooks("text.blocks.1.hook_normalized_resid_post")
        with ours.hooks(hooks):
            features = ours.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    (states,) = entries.values()
    assert error(states, out.question_embeds) < TOLERANCE[dtype]
    projected = theirs.text_proj(out.question_embeds[:, 0])
    assert error(features, projected / projected.norm(dim=-1, keepdim=True)) < TOLERANCE[dtype]


def test_a_padded_question_answers_like_the_question_alone():
    """The mask that transformers drops (specs fact 1): padding changes nothing, row by row."""
    theirs, ours = TINY_VQA.pair()
    inputs = TINY_VQA.inputs(3)
    assert inputs["attention_mask"].sum(-1).tolist() == [5, 4, 3]
    logits = ours(**inputs)
    for row, length in enumerate([5, 4, 3]):
        alone = {k: v[row : row + 1] for k, v in inputs.items()}
        alone["input_ids"] = alone["input_ids"][:, :length]
        alone["attention_mask"] = alone["attention_mask"][:, :length]
        with torch.no_grad(), Recorder(theirs, {"text_decoder.cls.predictions"}) as record:
            theirs(**alone)
        expected = record.values["text_decoder.cls.predictions", "out"]
        assert error(logits[row : row + 1], expected) < 1e-10


def test_an_answer_not_begun_is_the_first_token_alone():
    _, ours = TINY_VQA.pair()
    inputs = TINY_VQA.inputs(2, padded=False)
    del inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
    logits = ours(**inputs)
    begun = ours(**inputs, decoder_input_ids=torch.full((2, 1), ours.cfg.bos_token_id))
    assert logits.shape == (2, 1, 37) and torch.equal(logits, begun)
    assert ours.cfg.bos_token_id == 35


@pytest.mark.parametrize("member", PARITY[1:3], ids=str)
def test_the_loss_is_transformers(member):
    """The mean cross-entropy of the next token, without transformers' label smoothing."""
    theirs, ours = member.pair()
    theirs.text_decoder.label_smoothing = 0.0
    inputs = member.inputs(3, padded=False)
    ids = inputs["decoder_input_ids" if member.task == "vqa" else "input_ids"]
    mask = inputs.get("decoder_attention_mask", torch.ones_like(ids))
    with torch.no_grad():
        loss = theirs(**inputs, labels=ids.masked_fill(mask == 0, -100)).loss
    assert error(ours(**inputs, return_type="loss"), loss) < 1e-10


def test_one_image_serves_a_batch_of_texts():
    theirs, ours = TINY_ITM.pair()
    inputs = TINY_ITM.inputs(3, images=1)
    with torch.no_grad():
        wide = inputs | {"pixel_values": inputs["pixel_values"].expand(3, -1, -1, -1)}
        expected = theirs(**wide).itm_score
    assert error(ours(**inputs), expected) < 1e-10
    _, cache = ours.run_with_cache(**inputs, names_filter="text.blocks.0.cross_attn.*")
    assert cache["text.blocks.0.cross_attn.hook_k"].shape[0] == 3
    with pytest.raises(ValueError, match="batches must match"):
        ours(**inputs | {"pixel_values": wide["pixel_values"][:2]})


def test_heads_of_the_text_are_read_from_the_configuration():
    """BlipTextConfig's default of 8 heads is no constant of ours."""
    one, two = Size((24, 1, 2), (24, 1, 2)), Size((24, 1, 2), (24, 1, 6))
    models = [Member("itm", size).model() for size in (one, two)]
    assert [m.text.cfg.n_heads for m in models] == [2, 6]
    inputs = Member("itm", one).inputs(2)
    assert isinstance(models[0], HookedBLIP)
    assert error(models[0](**inputs), models[1](**inputs)) > 1e-3
