"""What an answer comes from: sums that are exact, and what is lost without a source."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from whole_zoo import FUSED
from zoo import BLIP, QUIET
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP, HookedCLIP, HookedLlava
from hooked_vlm import patching as P
from hooked_vlm.components.norm import LayerNorm
from hooked_vlm.data import shapes_pairs
from hooked_vlm.patching import exact

pytestmark = pytest.mark.usefixtures("no_grad")

METRIC = P.logit_diff(3, 5)


@functools.cache
def pair(member):
    return member.pair()


@functools.cache
def toy(kind=HookedLlava, name="toy-llava"):
    return kind.from_pretrained(name)


def places(member, inputs):
    """Sources by hand: the image, what stands before and behind it."""
    ids = inputs["input_ids"][0]
    image = (ids == pair(member)[1].cfg.image_token_id).nonzero().flatten().tolist()
    return {
        "image": tuple(image),
        "before": tuple(range(image[0])),
        "behind": tuple(range(image[-1] + 1, len(ids))),
    }


def difference(logits):
    return (logits[0, -1, 3] - logits[0, -1, 5]).item()


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_parts_add_up_to_the_logits_of_the_reference(member):
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False)
    sources = places(member, inputs)
    found = P.source_attribution(ours, inputs, METRIC, sources=sources, **QUIET)
    whole = difference(theirs(**inputs).logits)
    assert found.metric.item() == pytest.approx(whole, abs=1e-10)
    assert found.direct["source"].values.tolist() == [*sources, "mlp", "embed", "bias"]
    assert found.direct.sum().item() == pytest.approx(whole, abs=1e-10)
    assert found.share.sum().item() == pytest.approx(1, abs=1e-8)
    of_heads = found.heads.sum(("layer", "head")).squeeze().values
    np.testing.assert_allclose(of_heads, found.direct.sel(source=[*sources])[0], atol=1e-12)
    assert found.mlps.sum().item() == pytest.approx(found.direct.sel(source="mlp").item())
    assert (abs(found.direct).values > 1e-6).sum() >= 4


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_every_part_by_hand(member):
    """From the reference's weights, at its own activations: each head, MLP, and the embedding."""
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False)
    sources = places(member, inputs)
    found = P.source_attribution(ours, inputs, METRIC, sources=sources, **QUIET)
    text, cfg = theirs.model.language_model, theirs.config.text_config
    d, group = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads
    kept, handles = {}, []

    def keep(module, name, of):
        handles.append(
            module.register_forward_hook(
                lambda _, args, out: kept.update({name: (args[0] if of == "in" else out)[0]})
            )
        )

    for layer, block in enumerate(text.layers):
        keep(block.self_attn.v_proj, f"v{layer}", "out")
        keep(block.mlp, f"mlp{layer}", "out")
    keep(text.layers[0].input_layernorm, "embed", "in")
    keep(text.norm, "stream", "in")
    patterns = theirs(**inputs, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    scale = (kept["stream"][-1].square().mean() + cfg.rms_norm_eps).sqrt()
    toward = text.norm.weight * (theirs.lm_head.weight[3] - theirs.lm_head.weight[5]) / scale
    for layer, block in enumerate(text.layers):
        for head in range(cfg.num_attention_heads):
            v = kept[f"v{layer}"].unflatten(-1, (-1, d))[:, head // group]
            weights = block.self_attn.o_proj.weight[:, head * d : (head + 1) * d]
            by_position = patterns[layer][0, head, -1] * (v @ weights.mT @ toward)
            expected = [by_position[list(at)].sum().item() for at in sources.values()]
            ours_says = found.heads.sel(layer=layer, head=head)[0].values
            np.testing.assert_allclose(ours_says, expected, rtol=0, atol=1e-10)
        mlp = found.mlps.sel(layer=layer).item()
        assert mlp == pytest.approx((kept[f"mlp{layer}"][-1] @ toward).item(), abs=1e-10)
    embed = found.direct.sel(source="embed").item()
    assert embed == pytest.approx((kept["embed"][-1] @ toward).item(), abs=1e-10)


def test_norms_and_maps_with_biases():
    """No model of the zoo has them behind a pre-norm stack; a changed LLaVA does."""
    ours = LLAVA[1].model()
    width = ours.text.cfg.d_model
    ours.text.ln_final = LayerNorm(width, 1e-5)
    ours.unembed = torch.nn.Linear(width, ours.text.cfg.d_vocab)
    for block in ours.text.block_list:
        block.attn.o.bias = torch.nn.Parameter(torch.zeros(width))
    ours.double().requires_grad_(False).setup()
    generator = torch.Generator().manual_seed(0)
    drawn = [ours.text.ln_final.weight, ours.text.ln_final.bias, *ours.unembed.parameters()]
    for weight in [*drawn, *(block.attn.o.bias for block in ours.text.block_list)]:
        weight.copy_(torch.randn(weight.shape, generator=generator))
    inputs = LLAVA[1].inputs(1, padded=False)
    found = P.source_attribution(ours, inputs, METRIC, **QUIET)
    assert found.direct.sum().item() == pytest.approx(difference(ours(**inputs)), abs=1e-10)
    stream = ours.run_with_cache(**inputs, names_filter="text.blocks.1.hook_resid_post")[1]
    centred = stream["text.blocks.1.hook_resid_post"][0, -1]
    centred = centred - centred.mean()
    scale = (centred.square().mean() + 1e-5).sqrt()
    toward = ours.unembed.weight[3] - ours.unembed.weight[5]
    constant = ours.unembed.bias[3] - ours.unembed.bias[5] + ours.text.ln_final.bias @ toward
    of_heads = sum(block.attn.o.bias for block in ours.text.block_list)
    constant += ((of_heads - of_heads.mean()) / scale * ours.text.ln_final.weight) @ toward
    bias = found.direct.sel(source="bias").item()
    assert bias == pytest.approx(constant.item(), abs=1e-10)


@pytest.mark.parametrize("queries", ["last", "others"])
@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_knockout_is_masking(member, queries):
    """The reference with a mask of its own, which hides a source from some queries."""
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False)
    length = inputs["input_ids"].shape[1]
    sources = places(member, inputs)
    found = P.source_attribution(ours, inputs, METRIC, sources=sources, **QUIET)
    window = ours.text.cfg.sliding_window or length
    at = torch.arange(length)
    for name in ("image", "behind"):
        seen = (at <= at[:, None]) & (at > at[:, None] - window)
        hidden = torch.zeros(length, dtype=torch.bool)
        hidden[list(sources[name])] = True
        asking = at == length - 1 if queries == "last" else ~hidden
        seen &= ~(asking[:, None] & hidden)
        lowest = torch.finfo(torch.float64).min
        mask = torch.zeros(1, 1, length, length).double().masked_fill(~seen, lowest)
        lost = found.metric.item() - difference(theirs(**inputs | {"attention_mask": mask}).logits)
        ours_says = found.knockout.sel(source=name, queries=queries).item()
        assert ours_says == pytest.approx(lost, abs=1e-10)
        if (name, queries) != ("behind", "others"):  # of which nothing later reads
            assert abs(lost) > 1e-4


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_other_images_by_hand(member):
    """Prepared inputs bring them, so that no processor is needed."""
    theirs, ours = pair(member)
    given = [member.inputs(1, padded=False, seed=seed) for seed in range(3)]
    images = [{k: one[k] for k in ("pixel_values", "image_sizes") if k in one} for one in given]
    values = [[difference(theirs(**text | image).logits) for image in images] for text in given]
    expected = [values[0][0] - (values[0][1] + values[0][2]) / 2]
    found = P.source_attribution(ours, given[0], METRIC, resample=given[1:], **QUIET)
    np.testing.assert_allclose(found.resampled, expected, rtol=0, atol=1e-10)
    every = P.source_attribution(ours, given, METRIC, resample="others", **QUIET)
    own = np.diag(values)
    expected = own - (np.sum(values, 1) - own) / 2
    np.testing.assert_allclose(every.resampled, expected, rtol=0, atol=1e-10)
    assert every.provenance["resample"] == "others"
    assert abs(expected).min() > 1e-4


def test_a_batch_gives_what_its_rows_give_alone():
    """Padding on the left belongs to no source."""
    member = LLAVA[0]
    ours = pair(member)[1]
    together = P.source_attribution(ours, member.inputs(3), METRIC, **QUIET)
    inputs = member.inputs(3)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        found = P.source_attribution(ours, alone, METRIC, **QUIET)
        for of in ("direct", "heads", "knockout"):
            np.testing.assert_allclose(
                getattr(together, of)[row], getattr(found, of)[0], rtol=0, atol=1e-10
            )


def said(model, inputs):
    """The tokens of each part of a prompt, in which each position has one part."""
    tokens = model.to_str_tokens(inputs["input_ids"][0])
    found = model.prompt_parts(inputs)
    real = inputs["attention_mask"][0].nonzero().flatten().tolist()
    assert sorted(at for places in found.values() for at in places) == real
    return {name: "".join(tokens[at] for at in places) for name, places in found.items()}


def test_parts_of_a_prompt():
    model = toy()
    picture = shapes_pairs(1, 0, "llava")[0].image
    found = said(model, model.prepare(picture, "What color is the circle?", answer_prefix=" red"))
    image = "<image>" * model.cfg.n_image_tokens
    assert found == {
        "image": image,
        "system": "",
        "question": "What▁color▁is▁the▁circle?",
        "answer": "▁red",
        "template": "<s>▁USER:▁<0x0A>▁ASSISTANT:",
    }
    both = model.prepare(None, ["What color is it?", "What color is the red circle below it?"])
    assert both["attention_mask"][0, 0] == 0  # padding, on the left
    found = said(model, {name: value[:1] for name, value in both.items()})
    assert (found["image"], found["question"]) == ("", "▁What▁color▁is▁it?")
    assert said(model, model.prepare(picture, "<image> red")) == {"image": image, "text": "<s>▁red"}


def test_turns_of_a_prompt():
    """Earlier answers are no questions, and text in front of an image may be one."""
    model = toy()
    picture = shapes_pairs(1, 0, "llava")[0].image
    turns = "USER: What color? ASSISTANT: red</s>USER: is <image> a circle? ASSISTANT: a"
    found = said(model, model.prepare(picture, f"the red circle. {turns}"))
    assert found["system"] == "▁the▁red▁circle."
    assert found["question"].replace("▁", "") == "Whatcolor?isacircle?"
    assert found["answer"] == "▁red▁a"
    assert found["template"].replace("▁", "") == "<s>USER:ASSISTANT:</s>USER:ASSISTANT:"


SHOWN = (
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
)
TEMPLATES = {  # in the form of released ones, by what marks questions and answers
    "mistral": (
        "<s>{% for message in messages %}{% if message['role'] == 'user' %}[INST] " + SHOWN + "{{ "
        "content['text'] }}{% endfor %} [/INST]{% else %}" + SHOWN + " {{ content['text'] }}"
        "{% endfor %}</s>{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        "",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>{% for message in messages %}<|im_start|>"
        "{{ message['role'] }}\n" + SHOWN + "{{ content['text'] }}{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|><|im_start|>user", "<|im_end|><|im_start|>assistant"),
        "<|im_start|>system<0x0A>Be▁brief.",
    ),
    "vicuna": (
        "A chat. {% for message in messages %}{{ message['role'].upper() }}: " + SHOWN + "{{ "
        "content['text'] }}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:"
        "{% endif %}",
        ("USER:", "ASSISTANT:"),
        "A▁chat.",
    ),
    "none": (None, ("USER:", "ASSISTANT:"), ""),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_other_models(name, monkeypatch):
    model = toy()
    template, markers, system = TEMPLATES[name]
    monkeypatch.setattr(model.processor, "chat_template", template)
    assert model._markers() == markers
    picture = shapes_pairs(1, 0, "llava")[0].image
    found = said(model, model.prepare(picture, "What color is it?", answer_prefix=" red"))
    assert found["question"].strip("▁") == "What▁color▁is▁it?"
    assert found["answer"].strip("▁") == "red"
    assert found["system"] == system


def test_a_template_that_marks_no_turns(monkeypatch):
    model = toy()
    quiet = (
        "{% for message in messages %}" + SHOWN + "{{ content['text'] }}{% endfor %}{% endfor %}"
    )
    monkeypatch.setattr(model.processor, "chat_template", quiet)
    inputs = model.prepare(shapes_pairs(1, 0, "llava")[0].image, "What color is it?")
    assert set(said(model, inputs)) == {"image", "text"}


def test_the_image_answers_questions_of_colour():
    model = toy()
    pairs = shapes_pairs(4, 0, "llava", attribute="color")
    others = [pair.corrupt_image for pair in pairs]
    found = P.source_attribution(model, pairs, resample=others, **QUIET)
    np.testing.assert_allclose(found.direct.sum("source"), found.metric, rtol=0, atol=1e-3)
    # The last position reads the question, which has read the image.
    assert found.knockout.sel(source="image", queries="others").mean() > 5
    assert (abs(found.knockout.sel(source="image", queries="last")) < 1).all()
    assert (found.knockout.sel(source="question", queries="last") > 5).all()
    for number, pair in enumerate(pairs):
        inputs = model.prepare(pair.image, pair.text)
        ids = [model.to_single_token(word) for word in (pair.answer, pair.foil)]

        def difference_of(picture, inputs=inputs, ids=ids, text=pair.text):
            logits = model(**model.prepare(picture, text))[0, -1]
            return (logits[ids[0]] - logits[ids[1]]).item()

        rest = np.mean([difference_of(picture) for picture in others])
        expected = difference_of(pair.image) - rest
        assert found.resampled.values[number] == pytest.approx(expected, abs=1e-3)
    frame = found.to_dataframe()
    assert set(frame["source"]) >= {"image", "question", "system", "mlp", "bias", "embed"}
    assert frame["resampled"].notna().sum() == 4
    found.plot()


def test_a_knockout_is_held_against_a_blind_guess():
    """Without the image the toy always says green: then a green answer loses nothing."""
    model = toy()
    pairs = shapes_pairs(12, 0, "llava", attribute="color")
    found = P.source_attribution(model, pairs, resample="others", **QUIET)
    lost = (found.knockout / found.metric).sel(source="image", queries="others").values
    green = np.array([pair.answer == "green" for pair in pairs])
    assert green.any() and (abs(lost[green]) < 0.3).all() and (lost[~green] > 0.5).all()
    assert (found.resampled > 0).all()  # which the other images tell apart
    blind = []
    for pair in pairs:
        inputs = model.prepare(pair.image, pair.text)
        seen = inputs["input_ids"][0] != model.cfg.image_token_id

        def hide(scores, hook, seen=seen):
            hidden = seen[:, None] & ~seen
            return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)

        name = "text.blocks.*.attn.hook_attn_scores"
        logits = model.run_with_hooks(**inputs, fwd_hooks=[(name, hide)])[0, -1]
        blind += model.to_str_tokens(logits.argmax()[None])
        ids = [model.to_single_token(word) for word in (pair.answer, pair.foil)]
        expected = found.metric.values[len(blind) - 1] - (logits[ids[0]] - logits[ids[1]]).item()
        row = found.knockout.sel(source="image", queries="others").values[len(blind) - 1]
        assert row == pytest.approx(expected, abs=1e-3)
    assert set(blind) == {"▁green"}


@pytest.mark.parametrize("member", FUSED[:3], ids=str)
def test_post_norm_stacks_have_causal_answers_alone(member):
    ours = member.model()
    inputs = member.inputs(1, padded=False, dtype=torch.float64)

    def total(logits):
        flat = logits.flatten(1)
        return flat @ torch.arange(1, 1 + flat.shape[1]).to(flat)

    found = P.source_attribution(ours, inputs, total, **QUIET)
    assert found.direct is None and found.heads is None and found.mlps is None
    assert "post-norm" in found.provenance["direct"]

    def blind(scores, hook):
        return torch.full_like(scores, torch.finfo(scores.dtype).min)

    name = f"{member.reader}.blocks.*.cross_attn.hook_attn_scores"
    expected = total(ours(**inputs)) - total(
        ours.run_with_hooks(**inputs, fwd_hooks=[(name, blind)])
    )
    lost = found.knockout.sel(source="image").item()
    assert lost == pytest.approx(expected.item(), abs=1e-9)
    sources = ["image", "question", "text"] if member is BLIP[2] else ["image", "text"]
    assert found.knockout["source"].values.tolist() == sources
    found.plot()


def test_metrics_that_are_sums_of_logits():
    """Whoever wrote them: a sum is told by its slope."""
    member = LLAVA[0]
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False)
    logits = theirs(**inputs).logits[0, -1]
    for metric, expected in (
        (lambda logits: logits[:, -1, 3], logits[3]),
        (
            lambda logits: logits[:, -1] @ torch.arange(37).double(),
            logits @ torch.arange(37.0).double(),
        ),
        (
            P.Metric("mine", lambda logits, _: 2 * logits[:, 3] - logits[:, 4:6].sum(1)),
            2 * logits[3] - logits[4] - logits[5],
        ),
    ):
        found = P.source_attribution(ours, inputs, metric, **QUIET)
        assert found.direct.sum().item() == pytest.approx(expected.item(), abs=1e-10)


def prob_diff(logits, metric):
    chance = logits.softmax(-1)
    return chance[:, metric.answer] - chance[:, metric.foil]


@pytest.mark.parametrize(
    "metric",
    [
        P.log_prob(3),
        P.prob(3),
        P.accuracy(3),
        P.kl(),
        P.logit_diff((3, 4), (5, 6), tokens="all"),
        P.Metric("prob_diff", prob_diff, 3, 5, ("answer", "foil")),
        P.Metric("size", lambda logits, _: (logits[:, 3] - logits[:, 5]).abs()),
        P.Metric("above", lambda logits, _: logits[:, 3] - 1),
        P.Metric("earlier", lambda logits, _: logits[:, 0, 3] + logits[:, -1, 3], whole=True),
    ],
    ids=lambda metric: f"{metric.name}-{metric.tokens}",
)
def test_metrics_that_are_no_sums_of_logits(metric):
    member = LLAVA[0]
    ours = pair(member)[1]
    found = P.source_attribution(ours, member.inputs(1, padded=False), metric, **QUIET)
    assert found.direct is None and found.share is None
    assert found.provenance["direct"] == (
        f"{metric.name} is no weighted sum of the last position's logits; logit_diff is"
    )
    assert np.isfinite(found.knockout).all()
    assert "direct" not in found.to_dataframe()


def test_parts_that_cancel_have_no_shares():
    one = xr.DataArray([[2.0, -2.0], [3.0, 1.0]], dims=("pair", "source"))
    metric = xr.DataArray([1e-9, 4.0], dims="pair")
    found = P.SourceResult(metric, one, None, None, one, None, {}).share
    assert np.isnan(found[0]).all() and found[1].values.tolist() == [0.75, 0.25]


def halved(model, name, inputs):
    """The metric, and the result, while half of an activation is written in its place."""
    hook = (name, lambda value, hook: value / 2)
    with model.hooks(fwd_hooks=[hook]):
        found = P.source_attribution(model, inputs, METRIC, sources={"i": "image"}, **QUIET)
    logits = model.run_with_hooks(**inputs, fwd_hooks=[hook])[0, -1]
    return (logits[3] - logits[5]).item(), found


@pytest.mark.parametrize(
    "name",
    [
        "text.blocks.0.attn.hook_z",
        "text.blocks.0.attn.heads.1.hook_z",
        "text.blocks.1.attn.hook_result",
        "text.blocks.0.hook_attn_out",
        "text.blocks.0.hook_resid_mid",
        "text.blocks.1.hook_resid_post",
        "text.ln_final.hook_normalized",
        "hook_logits",
    ],
)
def test_hooks_that_break_the_sum(name):
    """What they write is none of the parts, so that no sum of these is the metric."""
    model, inputs = pair(LLAVA[0])[1], LLAVA[0].inputs(1, padded=False)
    metric, found = halved(model, name, inputs)
    assert found.metric.item() == pytest.approx(metric, abs=1e-10)
    assert found.direct is None and found.heads is None and found.mlps is None
    told = found.provenance
    assert f"its logit_diff is {metric:.6g}" in told["direct"] and told["gap"] is None
    assert "model.reset_hooks() ends them" in told["direct"]


@pytest.mark.parametrize(
    "name",
    [
        "vision.blocks.0.hook_resid_post",
        "hook_image_embeds",
        "text.hook_embed",
        "text.blocks.1.attn.hook_pattern",
        "text.blocks.0.attn.hook_v",
        "text.blocks.1.attn.heads.0.hook_q",
        "text.blocks.0.hook_mlp_out",
        "text.blocks.1.hook_mlp_in",
    ],
)
def test_hooks_that_leave_a_sum(name):
    """What they write is a part, or comes before the parts."""
    model, inputs = pair(LLAVA[0])[1], LLAVA[0].inputs(1, padded=False)
    metric, found = halved(model, name, inputs)
    plain = P.source_attribution(model, inputs, METRIC, sources={"i": "image"}, **QUIET)
    assert found.direct.sum().item() == pytest.approx(metric, abs=1e-10)
    assert found.provenance["direct"] == "exact" and found.provenance["gap"] < 1e-10
    assert abs(metric - plain.metric.item()) > 1e-6


def test_rounding_alone_refuses_nothing(monkeypatch):
    """Parts that cancel round by more than can be told beforehand; without hooks they stay."""
    monkeypatch.setattr(exact, "_rounding", lambda *_: 0.0)
    model = toy()  # in float32, so that sums are not exact
    given = shapes_pairs(4, 0, "llava", attribute="color")
    found = P.source_attribution(model, given, **QUIET)
    assert found.provenance["gap"] > 0 and found.provenance["direct"] == "exact"
    with model.hooks(fwd_hooks=[("text.blocks.0.hook_mlp_out", lambda x, hook: x / 2)]):
        assert P.source_attribution(model, given, **QUIET).direct is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gap_is_the_rounding(dtype):
    model = HookedLlava.from_pretrained("toy-llava", dtype=dtype)
    pairs = shapes_pairs(4, 0, "llava", attribute="color")
    found = P.source_attribution(model, pairs, **QUIET)
    gaps = abs(found.direct.sum("source") - found.metric).values
    assert found.provenance["gap"] == pytest.approx(gaps.max(), abs=1e-9)
    assert 0 < gaps.max() < 8 * torch.finfo(dtype).eps * abs(found.metric).max()


def test_sources_that_cannot_be():
    model = toy()
    pair = shapes_pairs(1, 0, "llava")[0]
    with pytest.raises(ValueError, match=r"position \d+ is in two sources"):
        P.source_attribution(model, pair, sources={"a": "image", "b": "image"}, **QUIET)
    blip = toy(HookedBLIP, "toy-blip-itm")
    with pytest.raises(ValueError, match="sources= are of a model that reads its image among"):
        P.source_attribution(blip, shapes_pairs(1, 0, "itm"), sources={"a": 1}, **QUIET)
    with pytest.raises(ValueError, match="a CLIP compares vectors"):
        clip = toy(HookedCLIP, "toy-clip")
        P.source_attribution(clip, shapes_pairs(1, 0, "clip"), **QUIET)


def test_images_that_cannot_stand_in():
    model = toy()
    one, *_ = shapes_pairs(1, 0, "llava")
    with pytest.raises(ValueError, match="resample has no image but the input's own; give others"):
        P.source_attribution(model, [one, one], resample="others", **QUIET)
    with pytest.raises(ValueError, match="resample has no image but the input's own; give others"):
        P.source_attribution(model, one, resample=[], **QUIET)
    with pytest.raises(ValueError, match="resample is 'others', or images, not 'all'"):
        P.source_attribution(model, one, resample="all", **QUIET)
    blind = model.prepare(None, one.text)
    with pytest.raises(ValueError, match="resample=0 has 1 images of 36 tokens, the input 0 of 0"):
        P.source_attribution(model, blind, METRIC, resample=[one.image], **QUIET)
    tall, wide = (
        LLAVA[2].inputs(1, padded=False) | {"image_sizes": torch.tensor([size])}
        for size in LLAVA[2].pictures
    )
    text = torch.full((1, LLAVA[2].tokens(LLAVA[2].pictures[1])), LLAVA[2].image_token)
    wide = wide | {"input_ids": text, "attention_mask": torch.ones_like(text)}
    with pytest.raises(ValueError, match=r"resample=0 has 1 images of \d+ tokens, the input 1 of"):
        P.source_attribution(pair(LLAVA[2])[1], tall, METRIC, resample=[wide], **QUIET)


def test_padding_on_the_right():
    """The last logits would be those of padding."""
    ours = pair(LLAVA[1])[1]
    inputs = LLAVA[1].inputs(3)
    with pytest.raises(ValueError, match="input '1' is padded on the right"):
        P.source_attribution(ours, inputs, METRIC, **QUIET)


def test_sources_of_ones_own():
    """Numbers, arrays, regions, roles, and lists of these; what is in none is the rest."""
    model = toy()
    one = replace(shapes_pairs(1, 0, "llava")[0], roles={"shape": "circle"})
    found = P.source_attribution(
        model,
        one,
        sources={
            "left": P.Region(0, 0, 24, 48),
            "two": np.array([0, 1]),
            "ends": [-1, "shape"],
            "none": (),
        },
        **QUIET,
    )
    assert found.direct["source"].values[:5].tolist() == ["left", "two", "ends", "none", "rest"]
    assert found.direct.sum().item() == pytest.approx(found.metric.item(), abs=1e-3)
    assert found.direct.sel(source="none") == 0 and found.direct.sel(source="left") != 0
