"""What run_with_cache keeps, and the identities that hold between its entries."""

import pytest
import torch
from test_hooks import CAPTIONING, ITM, VQA, built, each_task, inputs, model
from transformer_lens import ActivationCache, FactoredMatrix
from zoo import error

__all__ = ["inputs", "model"]  # fixtures


# --- identities


@each_task
def test_heads_sum_to_the_module(model, inputs):
    _, cache = model.run_with_cache(**inputs, names_filter=["*", "*hook_result"])
    for name in (n for n in cache if n.endswith("hook_result")):
        block, part = name.rsplit(".", 2)[0], name.split(".")[-2]
        made = cache[name].sum(2) + model.get_submodule(f"{block}.{part}").b_O
        if part == "attnpool":  # the last of a ResNet: what it gives is normalized
            made = torch.nn.functional.normalize(made[:, 0], dim=-1)
        out = "hook_image_embeds" if part == "attnpool" else f"{block}.hook_{part}_out"
        assert error(made, cache[out]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("member", [ITM, CAPTIONING, VQA], ids=str)
def test_fused_and_open_attention_agree_where_nothing_is_visible(member, dtype):
    """A row without visible keys has a pattern and z of 0, and finite gradients, both ways."""
    model, inputs = built(member, dtype), member.inputs(3, padded=False, dtype=dtype)
    mask = inputs["attention_mask"]
    mask[1] = 0
    if member is CAPTIONING:
        mask[1, 2:] = 1  # padding on the left: its first two positions see nothing
    where = "decoder.blocks.0.cross_attn" if member is VQA else None
    where = where or ("text" if member is ITM else "decoder") + ".blocks.0.attn"
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    caches = []
    for extra in ([], ["*.hook_pattern"]):
        names = [f"{where}.hook_z", f"{where}.hook_q", "hook_logits", *extra]
        _, cache = model.run_with_cache(
            **inputs, names_filter=names, incl_bwd=True, metric=lambda x: x.square().sum()
        )
        caches.append(cache)
        assert all(value.isfinite().all() for value in cache.values())
    fused, opened = caches
    for name in fused:
        assert error(fused[name], opened[name]) < tolerance, name
    unseen = slice(0, 2) if member is CAPTIONING else slice(None)
    assert opened[f"{where}.hook_pattern"][1, :, unseen].abs().max() == 0
    assert fused[f"{where}.hook_z"][1, unseen].abs().max() == 0
    seen = opened[f"{where}.hook_pattern"][0].sum(-1)
    assert error(seen, torch.ones_like(seen)) < tolerance


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_knocking_out_every_key_of_a_query_leaves_it_nothing(model, inputs):
    name = "text.blocks.1.cross_attn"

    def knock_out(scores, hook):
        scores[:, 0, 2] = torch.finfo(scores.dtype).min

    with model.hooks([(f"{name}.hook_attn_scores", knock_out)]):
        _, cache = model.run_with_cache(**inputs, names_filter=f"{name}.*")
    assert cache[f"{name}.hook_pattern"][:, 0, 2].abs().max() == 0
    assert cache[f"{name}.hook_z"][:, 2, 0].abs().max() == 0
    assert cache[f"{name}.hook_z"][:, 2, 1].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_task
def test_half_precision_runs_fused_and_open(member, dtype):
    model, inputs = built(member, dtype), member.inputs(3, dtype=dtype)
    logits = model(**inputs)
    opened, cache = model.run_with_cache(**inputs, names_filter=["*", "*hook_result"])
    scale = torch.float32  # what a norm divides by stays as the fused kernel computes it
    for name, value in cache.items():
        assert value.dtype == (scale if name.endswith("hook_scale") else dtype), name
    exact = built(member)(**member.inputs(3))
    for value in (logits, opened):
        assert error(value.double(), exact) < (0.1 if dtype == torch.bfloat16 else 0.02)


# --- what is kept


@each_task
def test_stop_at_computes_nothing_after(model, inputs):
    fired = []
    every = [(lambda name: True, lambda x, hook: fired.append(hook.name))]
    model.run_with_hooks(**inputs, fwd_hooks=every)
    order, last = list(fired), "text" if "text" in model.stacks else "decoder"
    for name in ("vision.hook_embed", "hook_image_embeds", f"{last}.blocks.1.attn.hook_v"):
        fired.clear()
        with model.hooks(every):
            output, cache = model.run_with_cache(**inputs, names_filter="*embed*", stop_at=name)
        assert output is None and fired == order[: order.index(name) + 1]
        assert name in cache and set(cache) <= set(fired)


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_stop_at_a_head(model, inputs):
    name = "text.blocks.0.cross_attn.heads.1.hook_z"
    output, cache = model.run_with_cache(**inputs, names_filter="text.*.hook_z", stop_at=name)
    whole = "text.blocks.0.cross_attn.hook_z"
    assert output is None and list(cache) == ["text.blocks.0.attn.hook_z", whole, name]
    assert torch.equal(cache[name], cache[whole][:, :, 1])


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_rules_of_run_with_cache(model, inputs):
    def total(logits):
        return logits.sum()

    with pytest.raises(ValueError, match="metric="):
        model.run_with_cache(**inputs, incl_bwd=True)
    with pytest.raises(ValueError, match="metric"):
        model.run_with_cache(**inputs, metric=total)
    with pytest.raises(ValueError, match="stop_at"):
        model.run_with_cache(**inputs, incl_bwd=True, metric=total, stop_at="hook_logits")
    with pytest.raises(RuntimeError, match="no gradient"):
        model.run_with_cache(
            **inputs, incl_bwd=True, metric=lambda x: x.detach().requires_grad_().sum()
        )
    _, cache = model.run_with_cache(**inputs, names_filter="hook_logits")
    with pytest.raises(KeyError, match="was not cached"):
        cache["text.hook_embed"]
    with pytest.raises(KeyError, match="Nearest"):
        cache["text.hook_embeds"]
    with pytest.raises(KeyError, match=r"cache.stack\('text'\)"):
        cache["z", 0]
    with pytest.raises(ValueError, match="batch of one"):
        model.run_with_cache(**inputs, remove_batch_dim=True)


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_positions_batch_and_device(model, member):
    inputs = member.inputs(1)
    names = ["*", "*hook_result", "text.blocks.0.attn.heads.1.hook_pattern"]
    _, whole = model.run_with_cache(**inputs, names_filter=names)
    _, one = model.run_with_cache(**inputs, names_filter=names, remove_batch_dim=True)
    _, cut = model.run_with_cache(**inputs, names_filter=names, pos_slice=(1, 3))
    for name, value in whole.items():
        axis = 1
        if name.endswith(("hook_pattern", "hook_attn_scores")) and ".heads." not in name:
            axis = 2
        assert torch.equal(one[name], value[0]), name
        expected = value if name == "hook_logits" else value.narrow(axis, 1, 2)
        assert torch.equal(cut[name], expected), name
    head = "vision.blocks.1.attn.heads.2.hook_pattern"
    assert torch.equal(one[head], whole["vision.blocks.1.attn.hook_pattern"][0, 2])
    _, meta = model.run_with_cache(**inputs, names_filter="hook_logits", device="meta")
    assert meta["hook_logits"].is_meta and isinstance(meta, ActivationCache)


# --- TransformerLens' names, on one stack


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_short_names(model, inputs):
    _, cache = model.run_with_cache(**inputs)
    text, vision = cache.stack("text"), cache.stack("vision")
    prefix = "text.blocks.1"
    for key, name in {
        ("z", 1, "cross_attn"): "cross_attn.hook_z",
        ("z", 1): "attn.hook_z",
        ("pattern", -1, "cross_attn"): "cross_attn.hook_pattern",
        ("attn", 1): "attn.hook_pattern",
        ("resid_pre", -1): "hook_resid_pre",
        ("cross_attn_out", 1): "hook_cross_attn_out",
        ("normalized", 1, "ln_cross"): "ln_cross.hook_normalized",
        ("post", 1): "mlp.hook_post",
        "post1": "mlp.hook_post",
    }.items():
        assert torch.equal(text[key], cache[f"{prefix}.{name}"]), key
    assert torch.equal(
        text["blocks.1.attn.heads.0.hook_z"], cache[f"{prefix}.attn.hook_z"][:, :, 0]
    )
    assert torch.equal(vision["embed"], cache["vision.hook_embed"])
    assert torch.equal(
        text.stack_activation("z", sublayer_type="cross_attn")[0], text["z", 0, "cross_attn"]
    )
    with pytest.raises(KeyError, match="vision, text"):
        cache.stack("decoder")


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_decompositions_of_the_pre_norm_stack_sum(model, inputs):
    _, cache = model.run_with_cache(**inputs)
    vision = cache.stack("vision")
    parts, labels = vision.decompose_resid(return_labels=True)
    assert labels[:3] == ["embed", "pos_embed", "0_attn_out"] and len(labels) == 2 + 2 * 2
    assert error(parts.sum(0), cache["vision.blocks.1.hook_resid_post"]) < 1e-12
    scaled = vision.decompose_resid(apply_ln=True).sum(0) + model.vision.ln_final.bias
    assert error(scaled, cache["hook_image_embeds"]) < 1e-12
    middle = vision.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0)
    block = model.vision.blocks[1]
    read = block.ln2(cache["vision.blocks.1.hook_mlp_in"])
    assert error(middle + block.ln2.bias, read) < 1e-12
    accumulated = vision.accumulated_resid(apply_ln=True)
    assert error(accumulated[-1], cache["hook_image_embeds"]) < 1e-12
    results = (
        vision.stack_head_results().unflatten(0, (2, 3)).sum(1) + model.vision.b_O[:, None, None]
    )
    assert error(results[1], cache["vision.blocks.1.hook_attn_out"]) < 1e-12
    one = cache.stack("vision").apply_slice_to_batch_dim(0)
    assert torch.equal(one["resid_pre", 1], vision["resid_pre", 1][0])
    projection = torch.eye(15, 4).double()
    for neurons in (True, False):
        full = cache.stack("vision").get_full_resid_decomposition(expand_neurons=neurons)
        assert error(full.sum(0), cache["vision.blocks.1.hook_resid_post"]) < 1e-12
        read = cache.stack("vision").get_full_resid_decomposition(
            expand_neurons=neurons, apply_ln=True, project_output_onto=projection
        )
        expected = (cache["hook_image_embeds"] - model.vision.ln_final.bias) @ projection
        assert error(read.sum(0), expected) < 1e-12


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_slices_of_a_cache_keep_its_ways(model, inputs, member):
    _, cache = model.run_with_cache(**inputs)
    for rows in (
        cache.apply_slice_to_batch_dim(1).stack("text"),
        cache.stack("text").apply_slice_to_batch_dim(1),
    ):
        assert torch.equal(rows["z", 0, "cross_attn"], cache["text.blocks.0.cross_attn.hook_z"][1])
        head = cache["text.blocks.0.cross_attn.hook_z"][1][:, 1]
        assert torch.equal(rows["blocks.0.cross_attn.heads.1.hook_z"], head)
    _, single = model.run_with_cache(**member.inputs(1))
    text = single.stack("text").remove_batch_dim()
    assert torch.equal(text["z", 1], single["text.blocks.1.attn.hook_z"][0])
    assert torch.equal(
        text["blocks.1.attn.heads.0.hook_z"], single["text.blocks.1.attn.heads.0.hook_z"][0]
    )


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_post_norm_stacks_refuse_sums(model, inputs):
    _, cache = model.run_with_cache(**inputs)
    text = cache.stack("text")
    for refused in (
        text.decompose_resid,
        text.get_full_resid_decomposition,
        text.logit_lens,
        lambda: text.logit_attrs(text["resid_pre", 0]),
        lambda: text.accumulated_resid(apply_ln=True),
        lambda: text.stack_head_results(apply_ln=True),
    ):
        with pytest.raises(NotImplementedError, match="post-norm"):
            refused()
    streams = text.accumulated_resid()
    assert torch.equal(streams[1], cache["text.blocks.0.hook_normalized_resid_post"])
    results = text.stack_head_results().unflatten(0, (2, 2)).sum(1) + model.text.b_O[:, None, None]
    assert error(results[1], cache["text.blocks.1.hook_attn_out"]) < 1e-12


@each_task
def test_weights_of_heads(model, inputs):
    _, cache = model.run_with_cache(**inputs, names_filter=["*", "*hook_result"])
    for name, stack in model.stacks.items():
        for part in ("attn", "cross_attn"):
            layers = [i for i, block in enumerate(stack.blocks) if hasattr(block, part)]
            if not layers:
                with pytest.raises(ValueError, match=f"no '{part}'|no heads"):
                    stack.head_weights(part)
                continue
            all_of, where = stack.head_weights(part), f"{name}.blocks.{layers[-1]}.{part}"
            n_layers = len(layers)
            heads, d_head, width = stack.cfg.n_heads, stack.cfg.d_head, stack.cfg.d_model
            source = cache[f"{where}.hook_kv_in"].shape[-1]
            assert all_of.W_Q.shape == (n_layers, heads, width, d_head)
            kv_heads = stack.cfg.n_key_value_heads
            assert all_of.W_K.shape == all_of.W_V.shape == (n_layers, kv_heads, source, d_head)
            assert all_of.W_O.shape == (n_layers, heads, d_head, width)
            attn = stack.blocks[layers[-1]].get_submodule(part)
            assert attn.W_O.data_ptr() == attn.o.weight.data_ptr()
            for leaf, read in (("q", "q_in"), ("k", "kv_in"), ("v", "kv_in")):
                made = (
                    torch.einsum(
                        "bpm,hmd->bphd",
                        cache[f"{where}.hook_{read}"],
                        getattr(all_of, f"W_{leaf.upper()}")[-1],
                    )
                    + getattr(all_of, f"b_{leaf.upper()}")[-1]
                )
                assert error(cache[f"{where}.hook_{leaf}"], made) < 1e-12, (where, leaf)
            result = torch.einsum("bphd,hdm->bphm", cache[f"{where}.hook_z"], all_of.W_O[-1])
            assert error(cache[f"{where}.hook_result"], result) < 1e-12
            assert isinstance(all_of.OV, FactoredMatrix)
            for head, kv_head in ((0, 0), (heads - 1, kv_heads - 1)):
                ov = all_of.W_V[-1, kv_head] @ all_of.W_O[-1, head]
                qk = all_of.W_Q[-1, head] @ all_of.W_K[-1, kv_head].mT
                assert error(all_of.OV.AB[-1, head], ov) < 1e-12
                assert error(all_of.QK.AB[-1, head], qk) < 1e-12
            if part == "attn":
                assert torch.equal(stack.W_Q, all_of.W_Q)
