"""What an answer comes from: sums that are exact, and what is lost without a source."""

import functools

import numpy as np
import pytest
import torch
from whole_zoo import FUSED
from zoo import BLIP
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP, HookedCLIP, HookedLlava
from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs

QUIET = {"progress": False}
METRIC = P.logit_diff(3, 5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_parts_add_up_to_the_logits_of_the_reference(member):
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False, dtype=torch.float64)
    sources = {k: v for k, v in places(member, inputs).items() if v}
    found = P.source_attribution(ours, inputs, METRIC, sources=sources, **QUIET)
    logits = theirs(**inputs).logits[0, -1].double()
    whole = (logits[3] - logits[5]).item()
    assert found.metric.item() == pytest.approx(whole, abs=1e-6)  # it computes norms in float32
    ours_whole = ours(**inputs)[0, -1]
    whole = (ours_whole[3] - ours_whole[5]).item()
    assert found.direct.sum().item() == pytest.approx(whole, abs=1e-10)
    assert found.heads.sum().item() + found.mlps.sum().item() == pytest.approx(
        found.direct.drop_sel(source=["embed", "bias"]).sum().item(), abs=1e-10
    )
    assert (abs(found.direct).values > 1e-6).sum() >= 4


def test_one_head_by_hand():
    """From the reference's weights, at its own activations."""
    member = LLAVA[1]  # grouped queries
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False, dtype=torch.float64)
    sources = {k: v for k, v in places(member, inputs).items() if v}
    found = P.source_attribution(ours, inputs, METRIC, sources=sources, **QUIET)
    layer, head = 1, 3
    attn = theirs.model.language_model.layers[layer].self_attn
    text = theirs.config.text_config
    d, group = text.head_dim, text.num_attention_heads // text.num_key_value_heads
    kept = {}
    attn.v_proj.register_forward_hook(lambda m, a, out: kept.update(v=out[0]))
    last = theirs.model.language_model.norm
    last.register_forward_hook(lambda m, args, out: kept.update(x=args[0][0, -1], out=out[0, -1]))
    theirs.set_attn_implementation("eager")
    patterns = theirs(**inputs, output_attentions=True).attentions
    row = patterns[layer][0, head, -1]
    v = kept["v"].unflatten(-1, (-1, d))[:, head // group]
    scale = (kept["x"].square().mean() + text.rms_norm_eps).sqrt()
    toward = last.weight * (theirs.lm_head.weight[3] - theirs.lm_head.weight[5]) / scale
    by_hand = row * (v @ attn.o_proj.weight[:, head * d : (head + 1) * d].mT @ toward)
    for name, at in sources.items():
        ours_says = found.heads.sel(layer=layer, head=head, source=name).item()
        assert ours_says == pytest.approx(by_hand[list(at)].sum().item(), abs=1e-6), name


@pytest.mark.parametrize("member", LLAVA, ids=str)
def test_knockout_hides_a_source_from_the_last_position(member):
    """The reference with a mask of its own for the last query."""
    theirs, ours = pair(member)
    inputs = member.inputs(1, padded=False, dtype=torch.float64)
    length = inputs["input_ids"].shape[1]
    sources = {"image": places(member, inputs)["image"]}
    found = P.source_attribution(ours, inputs, METRIC, sources=sources, **QUIET)
    window = ours.text.cfg.sliding_window or length
    at = torch.arange(length)
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    seen[-1, list(sources["image"])] = False
    lowest = torch.finfo(torch.float64).min
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~seen, lowest)
    kinds = ("full_attention", "sliding_attention")
    theirs.set_attn_implementation("eager")
    try:
        given = dict(inputs) | {"attention_mask": mask}
        logits = theirs(**given).logits[0, -1].double()
    except (TypeError, ValueError, RuntimeError):
        given["attention_mask"] = dict.fromkeys(kinds, mask)
        logits = theirs(**given).logits[0, -1].double()
    lost = found.metric.item() - (logits[3] - logits[5]).item()
    hidden = found.knockout.sel(source="image", queries="last").item()
    assert hidden == pytest.approx(lost, abs=1e-6)
    assert abs(lost) > 1e-4


def test_parts_of_a_prompt():
    model = toy()
    picture = shapes_pairs(1, 0, "llava")[0].image
    inputs = model.prepare(picture, "What color is the circle?", answer_prefix=" red")
    tokens = model.to_str_tokens(inputs["input_ids"][0])
    found = model.prompt_parts(inputs)
    said = {name: [tokens[at] for at in places] for name, places in found.items()}
    assert set(said["image"]) == {"<image>"}
    assert said["question"] == ["▁What", "▁color", "▁is", "▁the", "▁circle", "?"] or (
        said["question"] == ["What", "▁color", "▁is", "▁the", "▁circle", "?"]
    )
    assert said["answer"] == ["▁red"]
    assert said["system"] == ["<s>", "▁USER", ":", "▁", "<0x0A>", "▁ASSISTANT", ":"]
    assert sorted(at for places in found.values() for at in places) == list(range(len(tokens)))
    plain = model.prompt_parts(model.prepare(None, "What color is it?"))
    assert plain["image"] == () and len(plain["question"]) == 5
    other = model.prompt_parts(model.prepare(picture, "<image> red"))
    assert set(other) == {"image", "text"}


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

        def difference(picture, inputs=inputs, ids=ids, text=pair.text):
            logits = model(**model.prepare(picture, text))[0, -1]
            return (logits[ids[0]] - logits[ids[1]]).item()

        rest = np.mean([difference(picture) for picture in others])
        expected = difference(pair.image) - rest
        assert found.resampled.values[number] == pytest.approx(expected, abs=1e-3)
    frame = found.to_dataframe()
    assert set(frame["source"]) >= {"image", "question", "system", "mlp", "bias", "embed"}
    assert frame["resampled"].notna().sum() == 4
    found.plot()


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


def test_metrics_that_are_no_difference_of_logits():
    model = toy()
    pair = shapes_pairs(1, 0, "llava")[0]
    found = P.source_attribution(model, pair, P.log_prob(), **QUIET)
    assert found.direct is None
    assert found.provenance["direct"] == "log_prob is no difference of two logits; logit_diff is"
    assert found.knockout.sel(source="image", queries="others").item() > 0


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
