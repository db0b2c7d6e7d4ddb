"""CLIP against transformers and, for ResNets, against plain PyTorch: activations and gradients."""

import pytest
import torch
from torch.nn import functional as F
from zoo import Recorder, error
from zoo_clip import (
    BASE,
    CLIP_PARITY,
    CLIP_RESNET,
    CLIP_VIT,
    LARGE,
    RESNET_PARITY,
    ClipMember,
    of_openai,
)

from hooked_vlm.components.attention import SelfAttention
from hooked_vlm.components.blocks import Context
from hooked_vlm.components.resnet import AttentionPool, Bottleneck
from hooked_vlm.config import ResNetConfig

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Gradients that the reference cannot tell: one of its tensors is several of our points, or what
# it gives is not yet what ours is.
NO_GRADIENT = ("hook_q_in", "hook_kv_in", "hook_mlp_in", "_embed", "_embeds", "hook_normalized")
ELSEWHERE = ("hook_scale", "hook_attn_scores", "hook_result")  # points of no reference's module


def worst(found, expected, floor=1.0):
    errors = {name: error(found[name], value, floor) for name, value in expected.items()}
    name = max(errors, key=lambda name: errors[name])
    return errors[name], name


def check_activations(member, dtype, rows, images=None):
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(rows, images, dtype=dtype)
    table = member.table()
    with torch.no_grad(), Recorder(theirs, {row[0] for row in table.values()}) as record:
        expected_logits = member.logits(theirs, inputs)
    logits, cache = ours.run_with_cache(**inputs, names_filter=list(table))
    found = {name: cache[name] for name in table}
    if "vision.ln_pre.hook_normalized" in found:
        found["vision.hook_embed"] = found["vision.hook_embed"][:, 1:]  # the rest: class token
    expected = {name: record.value(row) for name, row in table.items()}
    assert worst(found, expected)[0] < TOLERANCE[dtype], worst(found, expected)
    assert error(logits, expected_logits) < TOLERANCE[dtype]
    # Nobody listens: fused attention and norms.
    assert error(ours(**inputs), expected_logits) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("images", [3, 1, 4])
@pytest.mark.parametrize("member", [*CLIP_PARITY, *RESNET_PARITY], ids=str)
def test_every_activation(member, images, dtype):
    check_activations(member, dtype, 3, images)


@pytest.mark.slow
@pytest.mark.parametrize("member", [BASE, LARGE], ids=str)
def test_every_activation_at_full_size(member):
    check_activations(member, torch.float32, 2)


@pytest.mark.parametrize("member", CLIP_PARITY, ids=str)
def test_the_reference_of_single_precision_is_transformers_itself(member, monkeypatch):
    """Its own eager attention, whose softmax is single whatever the dtype, and its fused one."""
    inputs = member.inputs(3, dtype=torch.float32)
    theirs, ours = member.pair(torch.float32)
    with torch.no_grad():
        ours_of_eager = theirs(**inputs).logits_per_image
        theirs.set_attn_implementation("sdpa")
        fused = theirs(**inputs).logits_per_image
    assert theirs.config._attn_implementation == "sdpa"
    assert error(ours_of_eager, fused) < 1e-5 and error(ours(**inputs), fused) < 1e-5


@pytest.mark.parametrize("member", CLIP_PARITY, ids=str)
def test_the_table_names_every_point_but_those_checked_elsewhere(member):
    model = member.model()
    unnamed = {n for n in model.hook_names() if not n.endswith(ELSEWHERE)} - set(member.table())
    assert unnamed == {
        "vision.hook_pos_embed",
        "vision.ln_final.hook_normalized",  # of all positions; transformers' of the class token
        "hook_logits",
    }


@pytest.mark.parametrize("member", RESNET_PARITY, ids=str)
def test_the_table_names_every_point_of_a_resnet(member):
    points = {n for n in member.model().hook_names() if n.startswith("vision.")}
    unnamed = points - set(member.table())
    assert all(name.startswith("vision.attnpool.") for name in unnamed)


@pytest.mark.parametrize("member", CLIP_PARITY, ids=str)
def test_embeddings_norms_and_scores(member):
    theirs, ours = member.pair()
    inputs = member.inputs(3)
    norms = {
        "vision.ln_pre": "vision_model.pre_layrnorm",
        "vision.blocks.0.ln1": "vision_model.encoder.layers.0.layer_norm1",
        "vision.ln_final": "vision_model.post_layernorm",
        "text.blocks.0.ln2": "text_model.encoder.layers.0.layer_norm2",
        "text.ln_final": "text_model.final_layer_norm",
    }
    with torch.no_grad(), Recorder(theirs, set(norms.values())) as record:
        out = theirs(**inputs, output_hidden_states=True)
    _, cache = ours.run_with_cache(**inputs)
    for name, reference in norms.items():
        given = record.values[reference, "in"]
        module = theirs.get_submodule(reference)
        scale = (given.var(-1, unbiased=False, keepdim=True) + module.eps).sqrt()
        normalized = (record.values[reference, "out"] - module.bias) / module.weight
        kept = {kind: cache[f"{name}.hook_{kind}"] for kind in ("scale", "normalized")}
        if name == "vision.ln_final":
            kept = {kind: value[:, 0] for kind, value in kept.items()}
        assert error(kept["scale"], scale) < 1e-10, name
        assert error(kept["normalized"], normalized) < 1e-10, name
    vision, text = out.vision_model_output.hidden_states, out.text_model_output.hidden_states
    for stack, states in (("vision", vision), ("text", text)):
        assert len(states) == getattr(ours, stack).cfg.n_layers + 1
        for layer, state in enumerate(states[:-1]):
            assert error(cache[f"{stack}.blocks.{layer}.hook_resid_pre"], state) < 1e-10
        assert error(cache[f"{stack}.blocks.{layer}.hook_resid_post"], states[-1]) < 1e-10
    assert error(cache["hook_image_embeds"], out.image_embeds) < 1e-10
    assert error(cache["hook_text_embeds"], out.text_embeds) < 1e-10
    embeddings = theirs.vision_model.embeddings
    assert torch.equal(cache["vision.hook_embed"][:, 0], embeddings.class_embedding.expand(3, -1))
    table = embeddings.position_embedding.weight
    assert torch.equal(cache["vision.hook_pos_embed"], table.expand(3, -1, -1))
    for stack in ("vision", "text"):
        where = f"{stack}.blocks.0.attn"
        q, k = cache[f"{where}.hook_q"], cache[f"{where}.hook_k"]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        seen = cache[f"{where}.hook_pattern"] > 0
        assert seen.all() == (stack == "vision")
        assert error(cache[f"{where}.hook_attn_scores"][seen], scores[seen]) < 1e-10
        hidden = cache[f"{where}.hook_attn_scores"][~seen]
        assert (hidden == torch.finfo(hidden.dtype).min).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("member", [*CLIP_PARITY, *RESNET_PARITY], ids=str)
def test_every_gradient(member, dtype):
    """With respect to pixels, embeddings and every point, of a weighted sum of the logits."""
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(3, 2, dtype=dtype)
    table = member.table()
    weights = torch.randn(2, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    apart = NO_GRADIENT if member.stages is None else (*NO_GRADIENT, "hook_skip", "_pattern")

    pixels = inputs["pixel_values"].clone().requires_grad_()
    theirs.requires_grad_()
    with Recorder(theirs, {row[0] for row in table.values()}, grad=True) as record:
        (member.logits(theirs, inputs | {"pixel_values": pixels}) * weights).sum().backward()
    compared = [name for name in table if not name.endswith(apart)]
    expected = {name: record.gradient(table[name]) for name in compared}
    gradients = {n: p.grad for n, p in theirs.named_parameters()}  # before ours, which shares them
    pixel_grad = pixels.grad
    theirs.requires_grad_(False)

    _, cache = ours.run_with_cache(
        **inputs, incl_bwd=True, metric=lambda logits: (logits * weights).sum()
    )
    found = {name: cache[f"{name}_grad"] for name in compared}
    assert worst(found, expected)[0] < TOLERANCE[dtype], worst(found, expected)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4  # of each tensor's own largest value
    assert worst(found, expected, 0.0)[0] < tolerance, worst(found, expected, 0.0)

    mine = inputs["pixel_values"].clone().requires_grad_()
    (ours(**inputs | {"pixel_values": mine}) * weights).sum().backward()
    assert error(mine.grad, pixel_grad, 0.0) < tolerance
    assert error(mine.grad, pixel_grad) < TOLERANCE[dtype]

    # A row of an embedding table collects the gradients of the places where it is used.
    token, pos = "token_embedding.weight", "positional_embedding"
    if member.stages is None:
        token = f"text_model.embeddings.{token}"
        pos = "text_model.embeddings.position_embedding.weight"
        seen = cache["vision.hook_pos_embed_grad"].sum(0)
        name = "vision_model.embeddings.position_embedding.weight"
    else:
        seen = cache["vision.attnpool.hook_pos_embed_grad"].sum(0)
        name = "visual.attnpool.positional_embedding"
    assert error(seen, gradients[name], 0.0) < tolerance
    ids, embed = inputs["input_ids"], cache["text.hook_embed_grad"]
    rows = torch.zeros_like(ours.text.W_E).index_add(0, ids.flatten(), embed.flatten(0, 1))
    assert error(rows, gradients[token], 0.0) < tolerance
    seen = cache["text.hook_pos_embed_grad"].sum(0)
    assert error(seen, gradients[pos][: ids.shape[1]], 0.0) < tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("member", CLIP_PARITY[:2], ids=str)
def test_features_similarity_and_loss(member, dtype):
    theirs, ours = member.pair(dtype)
    inputs = member.inputs(3, dtype=dtype)
    with torch.no_grad():
        out = theirs(**inputs, return_loss=True)
    tolerance = TOLERANCE[dtype]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert error(ours.get_image_features(inputs["pixel_values"]), out.image_embeds) < tolerance
    assert error(ours.get_text_features(**text), out.text_embeds) < tolerance
    cosines = out.logits_per_image / theirs.logit_scale.exp()
    assert error(ours.similarity(**inputs), cosines) < tolerance
    assert error(ours(**inputs, return_type="loss"), out.loss) < tolerance
    assert ours(**inputs, return_type=None) is None


# --- where a text is read


@pytest.mark.parametrize("eos", [2, 30])
def test_texts_are_read_where_transformers_reads_them(eos):
    """The first end-of-text token; in configurations that name token 2, the highest id."""
    member = ClipMember((12, 1, 2), (16, 2, 2), eos=eos)
    theirs, ours = member.pair()
    ids = torch.tensor([[1, 5, 30, 9, 30, 7], [30, 5, 36, 36, 4, 6], [1, 2, 3, 4, 5, 30]])
    inputs = member.inputs(3) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = theirs(**inputs)
    assert error(ours(**inputs), expected.logits_per_image) < 1e-10
    at = [2, 0, 5] if eos == 30 else [2, 2, 5]
    _, cache = ours.run_with_cache(**inputs, names_filter="*")
    states = ours.text.finish(cache["text.blocks.1.hook_resid_post"])[torch.arange(3), at]
    assert error(cache["hook_text_embeds"], F.normalize(states @ ours.text_proj.weight.mT)) < 1e-12


def test_a_text_without_an_end_is_refused():
    ours, inputs = CLIP_VIT.model(), CLIP_VIT.inputs(3)
    inputs["input_ids"][1] = 5
    with pytest.raises(ValueError, match=r"text 1 of input_ids has no end-of-text token \(36\)"):
        ours(**inputs)


def test_padding_changes_nothing():
    _, ours = CLIP_PARITY[0].pair()
    inputs = CLIP_PARITY[0].inputs(3)
    logits = ours(**inputs)
    assert error(ours(**inputs | {"attention_mask": None}), logits) < 1e-12
    for row, length in enumerate([5, 4, 3]):
        alone = {k: v[row : row + 1, :length] for k, v in inputs.items() if k != "pixel_values"}
        column = ours(pixel_values=inputs["pixel_values"], **alone)
        assert error(column[:, 0], logits[:, row]) < 1e-12


# --- the ResNet


def resnet_config(**changes):
    sizes = {"stages": (1, 1), "width": 4, "n_heads": 2, "image_size": 16}
    return ResNetConfig(**sizes | changes)


def pool(cfg, d_out=5):
    made = AttentionPool(cfg, d_out).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.normal_(generator=generator)
    return made


def test_a_pool_that_asks_nothing_takes_the_mean_of_the_values():
    cfg = resnet_config()
    made = pool(cfg)
    made.q.weight.zero_()
    made.q.bias.zero_()
    x = torch.randn(3, cfg.d_model, 2, 2, dtype=torch.float64)
    cells = x.flatten(2).mT
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + made.pos_embed
    assert error(made(x), made.o(made.v(tokens).mean(1))) < 1e-12


def test_the_pool_is_one_attention_among_the_others():
    """The first row of self-attention over the mean and the cells; its heads sum to its output."""
    cfg = resnet_config(stages=(1, 2), image_size=24)
    made = pool(cfg)
    for name, module in made.named_modules():
        module.name = name
    x = torch.randn(2, cfg.d_model, 3, 3, dtype=torch.float64)
    cells = x.flatten(2).mT
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1) + made.pos_embed
    whole = SelfAttention.forward(made, tokens)
    seen = {}
    for name in ("pattern", "result", "z", "q", "k", "v"):
        point = getattr(made, f"hook_{name}")
        point.add_hook(lambda x, hook: seen.update({hook.name: x}))
    out = made(x)
    assert error(out, whole[:, 0]) < 1e-12
    pattern = seen["hook_pattern"]
    assert pattern.shape == (2, 2, 1, 10) and error(pattern.sum(-1), torch.ones(2, 2, 1)) < 1e-12
    assert error(seen["hook_result"].sum(2)[:, 0] + made.b_O, out) < 1e-12
    q, k, v = (seen[f"hook_{name}"] for name in "qkv")
    assert q.shape == (2, 1, 2, cfg.d_head) and k.shape == v.shape == (2, 10, 2, cfg.d_head)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / cfg.d_head**0.5
    assert error(pattern, scores.softmax(-1)) < 1e-12
    assert error(seen["hook_z"], torch.einsum("bhqk,bkhd->bqhd", pattern, v)) < 1e-12


def identity_block(stride):
    """A bottleneck that passes a positive map on, and adds it to itself."""
    block = Bottleneck(4, 1, stride, 0.0, 0, False).requires_grad_(False)
    for parameter in block.parameters():
        parameter.fill_(0.0)
    for conv in (
        block.conv1,
        block.conv2,
        block.conv3,
        *([block.downsample] if stride > 1 else []),
    ):
        conv.norm.weight.fill_(1.0)
        conv.norm.var.fill_(1.0)
    block.conv1.conv.weight[0, 0] = 1.0
    block.conv2.conv.weight[0, 0, 1, 1] = 1.0
    block.conv3.conv.weight[0, 0] = 1.0
    if stride > 1:
        block.downsample.conv.weight[torch.arange(4), torch.arange(4)] = 1.0
    return block


def test_a_block_by_hand():
    """Strides are average pools of both sides: every pixel counts, none is skipped."""
    x = torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 4, 1, 1)
    out = identity_block(1)(x, Context())
    assert torch.equal(out[:, 0], 2 * x[:, 0]) and torch.equal(out[:, 1:], x[:, 1:])
    out = identity_block(2)(x, Context())
    means = torch.tensor([[2.5, 4.5], [10.5, 12.5]])
    assert torch.equal(out[0, 0], 2 * means) and torch.equal(out[0, 1], means)
    shifted = identity_block(1)
    shifted.conv3.norm.bias[1] = -7.0
    shifted.conv3.norm.mean[2] = 3.0
    shifted.conv3.norm.var[0] = 4.0
    out = shifted(x, Context())
    assert torch.equal(out[0, 0], 1.5 * x[0, 0])
    assert torch.equal(out[0, 1], (x[0, 0] - 7).relu()) and torch.equal(
        out[0, 2], (x[0, 0] - 3).relu()
    )


def test_the_stages_and_their_ends():
    member = RESNET_PARITY[1]
    ours = member.model()
    cfg = ours.vision.cfg
    assert (cfg.n_layers, cfg.stage_ends, cfg.stride) == (16, (2, 6, 12, 15), 32)
    assert (cfg.width, cfg.d_model, cfg.d_head, cfg.grid, cfg.n_ctx) == (8, 256, 128, 2, 5)
    names = [f"vision.blocks.{layer}.hook_stage_out" for layer in cfg.stage_ends]
    assert ours.hook_dict.match("vision.blocks.*.hook_stage_out") == names
    _, cache = ours.run_with_cache(**member.inputs(2), names_filter="vision.blocks.*")
    shapes = [tuple(cache[name].shape[1:]) for name in names]
    assert shapes == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]
    for name in names:
        assert torch.equal(cache[name], cache[name.replace("stage_out", "resid_post")])


def test_sizes_that_cannot_be():
    for changes, says in (
        ({"stages": ()}, "one block at least"),
        ({"stages": (2, 0)}, "one block at least"),
        ({"width": 5}, "width=5 is odd"),
        ({"n_heads": 3}, "pool is 32 wide, no multiple of n_heads=3"),
        ({"image_size": 20}, "image_size=20 is not a multiple of 8"),
    ):
        with pytest.raises(ValueError, match=says):
            resnet_config(**changes)


def test_batch_norms_keep_their_statistics_in_training_mode():
    ours, inputs = CLIP_RESNET.model(), CLIP_RESNET.inputs(3)
    logits = ours(**inputs)
    assert torch.equal(ours.train()(**inputs), logits)


def test_a_vision_transformer_in_plain_pytorch_agrees_too():
    """The reference of the ResNets, held against the one of the transformers."""
    member = ClipMember((16, 2, 4), (16, 2, 2), mlp=4, eos=2)
    plain = member.openai().double()
    ours = of_openai(plain, 4, 2)
    inputs = member.inputs(3)
    with torch.no_grad():
        expected = plain(inputs["pixel_values"], inputs["input_ids"])
    assert error(ours(**inputs), expected) < 1e-10


def test_another_image_size_is_refused():
    for member in (CLIP_VIT, CLIP_RESNET):
        inputs = member.inputs(1)
        inputs["pixel_values"] = inputs["pixel_values"][..., :8]
        with pytest.raises(ValueError, match="reads images of 16 x 16 pixels"):
            member.model()(**inputs)
