"""TransformerLens' analysis of LLaVA's language stack: identities at every position, images too."""

import pytest
import torch
from test_llava import processor
from zoo import BLIP, error
from zoo_clip import CLIP
from zoo_llava import LLAMA, LLAVA_PARITY, MISTRAL, LlavaMember, rms

from hooked_vlm.models.cache import StackCache

# One block, two and three; each query head its own keys and values, or in groups.
MEMBERS = [LLAMA, MISTRAL, LLAVA_PARITY[3], LLAVA_PARITY[5]]
each = pytest.mark.parametrize("member", MEMBERS, ids=str)
SLICES = [None, 2, -1, (1, 4), [0, 5]]  # of positions


def cached(member, counts=(1, 0, 2), dtype=torch.float64):
    model = member.model(dtype)
    logits, cache = model.run_with_cache(**member.inputs(counts=counts, dtype=dtype))
    return model, logits, cache.stack("text")


def cut(x, positions):
    """The same positions by plain indexing; x is [batch, pos, ...]."""
    return x[:, slice(*positions) if isinstance(positions, tuple) else slice(None)][
        :, positions if isinstance(positions, (int, list)) else slice(None)
    ]


def doors(text):
    """Every place that a part reads: what TransformerLens calls it, the stream and the norm."""
    stack, layers = text.model, text.model.cfg.n_layers
    for layer, block in enumerate(stack.blocks):
        yield layer, False, text["resid_pre", layer], block.ln1
        yield layer, True, text["resid_mid", layer], block.ln2
    yield layers, False, text["resid_post", layers - 1], stack.ln_final
    yield None, False, text["resid_post", layers - 1], stack.ln_final


# --- decompositions


@each
def test_every_decomposition_sums_to_the_stream_and_to_what_its_reader_gets(member):
    model, _, text = cached(member)
    onto = model.W_U[:, :3]
    for layer, middle, stream, norm in doors(text):
        where = {"layer": layer, "mlp_input": middle}
        read = rms(stream) * norm.weight
        for positions in SLICES:
            at = where | {"pos_slice": positions}
            for apply_ln, expected in ((False, stream), (True, read)):
                expected = cut(expected, positions)
                found = [text.decompose_resid(**at, apply_ln=apply_ln)]
                for neurons in (True, False):
                    full = {"expand_neurons": neurons, "apply_ln": apply_ln}
                    found.append(text.get_full_resid_decomposition(**at, **full))
                    some = text.get_full_resid_decomposition(**at, **full, project_output_onto=onto)
                    assert error(some.sum(0), expected @ onto) < 1e-12, at
                assert all(error(parts.sum(0), expected) < 1e-12 for parts in found), at


@each
def test_labels_name_the_components(member):
    _, _, text = cached(member)
    layers, heads, width = text.model.cfg.n_layers, member.text[2], 3 * member.text[0]
    last = layers - 1
    for neurons in (True, False):
        parts, labels = text.get_full_resid_decomposition(
            expand_neurons=neurons, return_labels=True
        )
        assert len(parts) == len(labels) == 2 + layers * (heads + (width if neurons else 1))
        named = dict(zip(labels, parts, strict=True))
        assert torch.equal(named["embed"], text["hook_embed"])
        assert named["bias"].abs().max() == 0  # a Llama has none
        result = text["z", last][:, :, 1:2] @ text.model.blocks[last].attn.W_O[1]
        assert error(named[f"L{last}H{min(1, heads - 1)}"], result[:, :, 0]) < 1e-12
        if neurons:
            assert torch.equal(named["L0N5"], text.get_neuron_results(0)[..., 5, :])
        else:
            assert torch.equal(named["0_mlp_out"], text["mlp_out", 0])


@each
def test_heads_read_values_of_their_group_and_sum_to_attn_out(member):
    theirs, ours = member.pair()
    inputs = member.inputs(counts=(1, 0, 2))
    _, cache = ours.run_with_cache(**inputs)
    text, (_, layers, heads, kv_heads, d_head) = cache.stack("text"), member.text
    results, labels = text.stack_head_results(return_labels=True)
    assert labels == [f"L{layer}H{head}" for layer in range(layers) for head in range(heads)]
    for layer in range(layers):
        out = theirs.model.language_model.layers[layer].self_attn.o_proj.weight
        for head in range(heads):
            value = text["v", layer][:, :, head // (heads // kv_heads)]
            z = text["pattern", layer][:, head] @ value
            made = z @ out[:, head * d_head : (head + 1) * d_head].T
            assert error(results[layer * heads + head], made) < 1e-12
        summed = results[layer * heads : (layer + 1) * heads].sum(0)
        assert error(summed, text["attn_out", layer]) < 1e-12
    for positions in SLICES:
        some = text.stack_head_results(pos_slice=positions, incl_remainder=True)
        assert error(some[0], cut(results[0], positions)) < 1e-12
        assert error(some.sum(0), cut(text["resid_post", -1], positions)) < 1e-12
    one = text.stack_head_results(1, apply_ln=True)
    gain = ours.text.blocks[1].ln1.weight if layers > 1 else ours.text.ln_final.weight
    where = "blocks.1.ln1" if layers > 1 else "ln_final"
    assert error(one, results[:heads] / text[f"{where}.hook_scale"] * gain) < 1e-12


@each
def test_neurons_are_of_the_gated_mlp_and_sum_to_mlp_out(member):
    theirs, ours = member.pair()
    _, cache = ours.run_with_cache(**member.inputs(counts=(1, 0, 2)))
    text, layers = cache.stack("text"), member.text[1]
    for layer in range(layers):
        mlp = theirs.model.language_model.layers[layer].mlp
        gate, linear = text["pre", layer], text["pre_linear", layer]
        post = torch.nn.functional.silu(gate) * linear
        made = torch.einsum("bpn,mn->bpnm", post, mlp.down_proj.weight)
        assert error(text.get_neuron_results(layer), made) < 1e-12
        assert error(made.sum(2), text["mlp_out", layer]) < 1e-12
        some = text.get_neuron_results(layer, neuron_slice=(2, 6), pos_slice=-1)
        assert error(some, made[:, -1, 2:6]) < 1e-12
        onto = ours.W_U[:, 3]
        assert error(text.get_neuron_results(layer, project_output_onto=onto), made @ onto) < 1e-12
    stack, labels = text.stack_neuron_results(
        layers, neuron_slice=[1, 4], incl_remainder=True, return_labels=True
    )
    assert labels[:3] == ["L0N1", "L0N4", "L1N1" if layers > 1 else "remainder"]
    assert error(stack.sum(0), text["resid_post", -1]) < 1e-12
    logits = text.stack_neuron_results(
        layers, incl_remainder=True, apply_ln=True, project_output_onto=ours.W_U[:, 3]
    )
    assert error(logits.sum(0), cache["hook_logits"][..., 3]) < 1e-12


@each
def test_streams_and_stacked_activations(member):
    model, logits, text = cached(member)
    layers = member.text[1]
    streams, labels = text.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == [f"{i}_{at}" for i in range(layers) for at in ("pre", "mid")] + ["final_post"]
    for layer in range(layers):
        assert torch.equal(streams[2 * layer], text["resid_pre", layer])
        assert torch.equal(streams[2 * layer + 1], text["resid_mid", layer])
    for positions in SLICES:
        lens = text.accumulated_resid(apply_ln=True, pos_slice=positions)
        made = rms(cut(text["resid_pre", 0], positions)) * model.text.ln_final.weight
        assert error(lens[0], made) < 1e-12
        assert error(lens[-1] @ model.W_U, cut(logits, positions)) < 1e-12
    for name, kind in (("z", None), ("rot_k", "attn"), ("post", None), ("scale", "ln1")):
        stack = text.stack_activation(name, sublayer_type=kind)
        assert len(stack) == layers and torch.equal(stack[-1], text[name, layers - 1, kind])


# --- the lens


@each
def test_the_lens_reads_every_stream(member):
    theirs, ours = member.pair()
    ours.processor = processor()
    logits, cache = ours.run_with_cache(**member.inputs(counts=(1, 0, 2)))
    text = cache.stack("text")
    gain, unembed = theirs.model.language_model.norm.weight, theirs.lm_head.weight
    streams = text.accumulated_resid(incl_mid=True)
    made = rms(streams) * gain @ unembed.T
    assert error(made[-1], logits) < 1e-12
    lens = text.logit_lens(incl_mid=True, positions=None)
    assert lens.labels == text.accumulated_resid(incl_mid=True, return_labels=True)[1]
    assert error(lens.values, made) < 1e-12
    plain = text.logit_lens(positions=None, layers=[0, -1])
    assert plain.labels == ["0_pre", "final_post"] and error(plain.values, made[[0, -1]]) < 1e-12
    last = text.logit_lens(incl_mid=True, batch_slice=2)  # the last position
    assert error(last.values, made[:, 2, -1]) < 1e-12 and not last.has_batch_dim

    asked = text.logit_lens(incl_mid=True, positions=(1, 4), targets=["red", 5])
    assert error(asked.values, made[:, :, 1:4, [11, 5]]) < 1e-12  # "red" is the word of id 11
    ranks = (made[:, :, 1:4] > made[:, :, 1:4, 11:12]).sum(-1)
    assert torch.equal(asked.rank_trajectory("red"), ranks)
    ids = torch.arange(made[0, ..., 0].numel()).view(3, -1) % 37
    own = text.logit_lens(incl_mid=True, positions=None, targets=ids, return_type="log_probs")
    expected = made.log_softmax(-1).gather(-1, ids.expand(len(made), -1, -1)[..., None])
    assert error(own.values, expected) < 1e-5  # TransformerLens takes logarithms in float32
    best = text.logit_lens(incl_mid=True, top_k=2)
    assert torch.equal(best.readout.top_ids, made[:, :, -1].topk(2).indices)
    with pytest.raises(ValueError, match="not one token"):
        text.logit_lens(targets="two words")


@each
def test_attributions_of_a_decomposition_sum_to_the_logits(member):
    theirs, ours = member.pair()
    ours.processor = processor()
    logits, cache = ours.run_with_cache(**member.inputs(counts=(1, 0, 2)))
    text, (rows, length, _) = cache.stack("text"), logits.shape
    parts = text.get_full_resid_decomposition(expand_neurons=False)
    gain, unembed = theirs.model.language_model.norm.weight, theirs.lm_head.weight
    # By hand: each part over the divisor of the whole stream, through gain and unembedding.
    final = text["resid_post", -1]
    scale = (final.square().mean(-1, keepdim=True) + ours.text.cfg.eps).sqrt()
    made = parts / scale * gain @ unembed.T
    assert error(made.sum(0), logits) < 1e-12

    for token in (11, "red", torch.tensor(11)):
        assert error(text.logit_attrs(parts, token), made[..., 11]) < 1e-12
    against = text.logit_attrs(parts, "red", "is")
    assert error(against, made[..., 11] - made[..., 8]) < 1e-12
    assert error(against.sum(0), logits[..., 11] - logits[..., 8]) < 1e-12

    batch = torch.tensor([3, 11, 7])
    found = text.logit_attrs(parts, batch, batch + 1)
    for row, token in enumerate(batch.tolist()):
        assert error(found[:, row], made[:, row, :, token] - made[:, row, :, token + 1]) < 1e-12
    ids = torch.arange(rows * length).view(rows, length) % 37
    expected = made.gather(-1, ids.expand(len(parts), -1, -1)[..., None])[..., 0]
    assert error(text.logit_attrs(parts, ids), expected) < 1e-12
    shared = made.gather(-1, ids[:1].expand(len(parts), rows, -1)[..., None])[..., 0]
    assert error(text.logit_attrs(parts, ids[:1]), shared) < 1e-12

    for positions in SLICES:
        some = text.get_full_resid_decomposition(expand_neurons=False, pos_slice=positions)
        found = text.logit_attrs(some, 5, pos_slice=positions)
        assert error(found.sum(0), cut(logits[..., 5], positions)) < 1e-12
    some = text.decompose_resid(pos_slice=-1)
    picked = text.logit_attrs(some, torch.tensor([3, 7]), pos_slice=-1, batch_slice=[0, 2])
    assert error(picked.sum(0), logits[[0, 2], -1, [3, 7]]) < 1e-12
    whole = text.decompose_resid()
    row = text.logit_attrs(whole[:, 2], 5, batch_slice=2, has_batch_dim=False)
    assert error(row.sum(0), logits[2, :, 5]) < 1e-12
    with pytest.raises(ValueError, match="same shape"):
        text.logit_attrs(parts, batch, 5)


@each
def test_caches_without_a_batch_axis(member):
    """Of a text with two images, which are two rows of the image encoder."""
    model = member.model()
    logits, cache = model.run_with_cache(**member.inputs(counts=(2,)))
    several, few = model.run_with_cache(**member.inputs(counts=(1, 0, 2)))
    for text, expected in (
        (cache.stack("text").remove_batch_dim(), logits[0]),
        (cache.stack("text").apply_slice_to_batch_dim(0), logits[0]),
        (few.stack("text").apply_slice_to_batch_dim(2), several[2]),
    ):
        assert isinstance(text, StackCache) and not text.has_batch_dim
        assert error(text.logit_lens(positions=None).values[-1], expected) < 1e-12
        assert error(text.logit_lens().values[-1], expected[-1]) < 1e-12
        parts = text.decompose_resid()
        assert error(text.logit_attrs(parts, 5, has_batch_dim=False).sum(0), expected[:, 5]) < 1e-12
        ids = torch.arange(len(expected))
        own = text.logit_attrs(parts, ids, has_batch_dim=False)
        assert error(own.sum(0), expected.gather(1, ids[:, None])[:, 0]) < 1e-12
        part = text.logit_attrs(parts[:, -1], 5, pos_slice=-1, has_batch_dim=False)
        assert error(part.sum(0), expected[-1, 5]) < 1e-12
        for neurons in (True, False):
            read = text.get_full_resid_decomposition(expand_neurons=neurons, apply_ln=True)
            assert error(read.sum(0) @ model.W_U, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each
def test_half_precision(member, dtype):
    """A norm's output is of the model's dtype, so that its weights can be multiplied with it."""
    model, logits, text = cached(member, dtype=dtype)
    exact, _, _ = cached(member)
    assert text.logit_lens(positions=None).values.dtype == dtype
    assert torch.equal(text.logit_lens(positions=None).values[-1], logits)
    tolerance = 0.06 if dtype == torch.bfloat16 else 0.008
    read = text.decompose_resid(apply_ln=True)
    assert read.dtype == dtype
    assert error((read @ model.W_U).double().sum(0), logits.double()) < tolerance
    for neurons in (True, False):
        parts = text.get_full_resid_decomposition(
            expand_neurons=neurons, apply_ln=True, project_output_onto=model.W_U[:, :3]
        )
        assert error(parts.double().sum(0), logits[..., :3].double()) < tolerance
    # Attributions of one stream are as exact as that: they are summed in float32.
    stream = text["resid_post", -1]
    expected = rms(stream.double(), exact.text.cfg.eps) * model.text.ln_final.weight.double()
    found = text.logit_attrs(stream[None], 5)
    assert found.dtype == torch.float32
    assert error(found[0].double(), expected @ model.W_U[:, 5].double()) < 1e-5


# --- what is refused


@each
def test_the_image_encoder_has_no_lens_and_no_norm_behind_its_last_block(member):
    model = member.model()
    _, cache = model.run_with_cache(**member.inputs(2))
    vision, layers = cache.stack("vision"), member.reads
    for refused in (
        vision.logit_lens,
        lambda: vision.logit_attrs(vision["resid_pre", 0][None], 5),
    ):
        with pytest.raises(NotImplementedError, match="'vision' has no unembedding"):
            refused()
    for refused in (
        lambda: vision.decompose_resid(apply_ln=True),
        lambda: vision.accumulated_resid(apply_ln=True),
        lambda: vision.stack_neuron_results(
            layers, apply_ln=True, project_output_onto=torch.eye(member.vision[0]).double()
        ),
    ):
        with pytest.raises(NotImplementedError, match="no norm follows the last block"):
            refused()


@pytest.mark.parametrize("member", [*BLIP, *CLIP], ids=str)
def test_other_stacks_refuse_in_words(member):
    model = member.model()
    _, cache = model.run_with_cache(**member.inputs(2))
    for name, stack in model.stacks.items():
        said = "no unembedding" if stack.pre_norm else "post-norm|ReLU"
        for refused in (
            cache.stack(name).logit_lens,
            lambda name=name: cache.stack(name).logit_attrs(torch.zeros(1, 1, 1, 1), 5),
        ):
            with pytest.raises(NotImplementedError, match=said):
                refused()


# --- rows


def test_rows_of_a_cache_with_more_images_than_texts():
    """Whatever there is more of in the cache, rows of the text are texts."""
    deep = LlavaMember((12, 6, 3), (16, 1, 2, 2, 8), layer=-1)
    for member in (deep, LLAMA, MISTRAL):
        model = member.model()
        _, cache = model.run_with_cache(**member.inputs(counts=(1, 2)))
        assert torch.equal(
            cache.stack("text").apply_slice_to_batch_dim(1)["resid_pre", 0],
            cache["text.blocks.0.hook_resid_pre"][1],
        )
        assert torch.equal(
            cache.stack("vision").apply_slice_to_batch_dim(2)["resid_pre", 0],
            cache["vision.blocks.0.hook_resid_pre"][2],
        )
        with pytest.raises(ValueError, match=r"2 or 3 rows.*cache\.stack"):
            cache.apply_slice_to_batch_dim(1)
        # One image that all texts read stays as it is.
        _, cache = model.run_with_cache(**member.inputs(3, images=1))
        rows = cache.apply_slice_to_batch_dim([0, 2])
        assert torch.equal(
            rows["text.blocks.0.attn.hook_z"], cache["text.blocks.0.attn.hook_z"][[0, 2]]
        )
        assert torch.equal(rows["vision.hook_embed"], cache["vision.hook_embed"])
