"""Captions and answers, token for token as transformers writes them; hooks see every step."""

import functools
import warnings

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from zoo import BLIP, PARITY, Member, texts

from hooked_vlm import HookedBLIP
from hooked_vlm.data import shapes

CAPTIONING, VQA = BLIP[1], BLIP[2]
MEMBERS = [CAPTIONING, VQA, *(m for m in PARITY if m.task != "itm")]


@functools.cache
def pair(member):
    return member.pair(torch.float64)


def inputs_of(member, rows=3, prompt=4):
    given = member.inputs(rows, padded=False)
    inputs = {name: given[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    ids, mask = texts(member.size.vocab, [prompt] * rows, torch.Generator().manual_seed(3))
    return inputs | {"input_ids": ids, "attention_mask": mask}


class AtFive(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 5)


GENERATIONS = {
    "greedy": {"max_new_tokens": 6},
    "by length": {"max_length": 9},
    "beams": {"max_new_tokens": 6, "num_beams": 3},
    "beams returned": {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"max_new_tokens": 6, "do_sample": True, "top_k": 0, "temperature": 2.0},
    "samples": {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 2},
    "no cache": {"max_new_tokens": 6, "use_cache": False},
    "minimum": {"min_new_tokens": 4, "max_new_tokens": 6},
    "penalty": {"max_new_tokens": 6, "repetition_penalty": 1.5},
    "stopping": {"max_new_tokens": 8, "stopping_criteria": StoppingCriteriaList([AtFive()])},
}


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_token_for_token(member, how):
    theirs, ours = pair(member)
    inputs = inputs_of(member)
    torch.manual_seed(0)
    expected = theirs.generate(**inputs, **GENERATIONS[how])
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = ours.generate(**inputs, **GENERATIONS[how])
    assert ids.tolist() == expected.tolist()
    assert ids.unique().numel() > 2


@pytest.mark.parametrize("member", [CAPTIONING, VQA], ids=str)
def test_it_ends_where_it_is_told(member):
    """The third new token of a greedy text, named as the end, ends it."""
    ours, inputs = pair(member)[1], inputs_of(member, rows=1)
    whole = ours.generate(**inputs, max_new_tokens=6)[0].tolist()
    first = len(whole) - 6
    assert first > 0
    end = whole[first + 2]
    expected = whole[: whole.index(end, first) + 1]
    assert ours.generate(**inputs, max_new_tokens=6, eos_token_id=end)[0].tolist() == expected


def test_no_prompt():
    theirs, ours = pair(CAPTIONING)
    pixels = inputs_of(CAPTIONING)["pixel_values"]
    start = torch.full((3, 1), CAPTIONING.size.vocab - 2)
    # transformers drops the last token of a prompt, which is [SEP] when a tokenizer made it
    expected = theirs.generate(pixels, torch.cat([start, start], 1), max_new_tokens=5)
    assert ours.generate(pixels, max_new_tokens=5).tolist() == expected.tolist()


@pytest.mark.parametrize("member", [CAPTIONING, VQA], ids=str)
def test_dictionaries(member):
    theirs, ours = pair(member)
    inputs = inputs_of(member)
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True}
    expected, result = theirs.generate(**inputs, **asked), ours.generate(**inputs, **asked)
    assert result.sequences.tolist() == expected.sequences.tolist()
    assert len(result.scores) == len(expected.scores) > 1
    for mine, other in zip(result.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, other.to(mine), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("member", [CAPTIONING, VQA], ids=str)
def test_hooks_see_new_positions_and_are_told_which(member):
    _, ours = pair(member)
    inputs, seen = inputs_of(member), []

    def look(x, hook):
        seen.append((x.shape[1], hook.ctx["positions"].tolist()))

    name = "decoder.blocks.1.cross_attn.heads.0.hook_z"
    plain = ours.generate(**inputs, min_new_tokens=4, max_new_tokens=4)
    with ours.hooks([(name, look)]):
        ids = ours.generate(**inputs, min_new_tokens=4, max_new_tokens=4)
    assert ids.tolist() == plain.tolist()
    first = ids.shape[1] - 4
    assert seen == [(first, list(range(first)))] + [(1, [first + i]) for i in range(3)]
    seen.clear()
    with ours.hooks([(name, look)]):
        ours.generate(**inputs, min_new_tokens=4, max_new_tokens=4, use_cache=False)
    assert seen == [(first + i, list(range(first + i))) for i in range(4)]
    assert ours.list_hooks() == {}
    assert "positions" not in ours.hook_dict[name].ctx


@pytest.mark.parametrize("member", [CAPTIONING, VQA], ids=str)
def test_a_patch_in_every_step_is_the_naive_rerun(member):
    _, ours = pair(member)
    inputs = inputs_of(member)
    name = "decoder.blocks.0.hook_mlp_out"
    direction = 3 * torch.randn(
        ours.decoder.cfg.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def patch(x, hook):
        return x + direction

    asked = {"min_new_tokens": 5, "max_new_tokens": 5}
    plain = ours.generate(**inputs, **asked)
    with ours.hooks([(name, patch)]):
        patched = ours.generate(**inputs, **asked)
    assert patched.tolist() != plain.tolist()
    ids = patched[:, :-5]
    sep = ours.cfg.sep_token_id
    for _ in range(5):
        if member.task == "vqa":
            given = inputs | {"decoder_input_ids": ids}
        else:
            given = {"pixel_values": inputs["pixel_values"], "input_ids": ids}
        logits = ours.run_with_hooks(**given, fwd_hooks=[(name, patch)])[:, -1]
        logits[:, sep] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert patched.tolist() == ids.tolist()


def test_hooks_go_after_an_exception():
    _, ours = pair(CAPTIONING)
    calls = []

    def fail(x, hook):
        calls.append(x)
        if len(calls) == 3:
            raise RuntimeError("in the third step")

    with (
        pytest.raises(RuntimeError, match="in the third step"),
        ours.hooks([("decoder.blocks.0.hook_mlp_out", fail)]),
    ):
        ours.generate(**inputs_of(CAPTIONING), min_new_tokens=5, max_new_tokens=5)
    assert ours.list_hooks() == {}
    assert "positions" not in ours.hook_dict["decoder.blocks.0.hook_mlp_out"].ctx


def test_what_cannot_be_generated():
    itm: Member = BLIP[0]
    with pytest.raises(ValueError, match="has no decoder and writes no text"):
        itm.model().generate(**itm.inputs(1))
    with pytest.raises(ValueError, match="the question, is missing"):
        pair(VQA)[1].generate(inputs_of(VQA)["pixel_values"])


def test_the_captioning_toy_end_to_end():
    model = HookedBLIP.from_pretrained("toy-blip-captioning")
    scenes = shapes.scenes(20, seed=8, split="held_out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = model.prepare([scene.image() for scene in scenes])
        captions = model.decode(model.generate(**inputs))
    right = [caption in scene.captions() for caption, scene in zip(captions, scenes, strict=True)]
    assert sum(right) >= 18
    begun = model.prepare(scenes[0].image(), f"a {scenes[0].second.words}")
    caption = model.decode(model.generate(**begun, max_new_tokens=20))[0]
    assert caption.startswith(f"a {scenes[0].second.words}")


def test_the_vqa_toy_end_to_end():
    model = HookedBLIP.from_pretrained("toy-blip-vqa")
    scenes = shapes.scenes(20, seed=8, split="held_out")
    questions = [scene.questions()[0] for scene in scenes]
    inputs = model.prepare([scene.image() for scene in scenes], [q.text for q in questions])
    answers = model.decode(model.generate(**inputs))
    right = [answer == q.answer for answer, q in zip(answers, questions, strict=True)]
    assert sum(right) >= 18
