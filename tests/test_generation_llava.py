"""LLaVA's answers, token for token as transformers writes them; prefixes that are kept."""

import functools
from dataclasses import replace

import pytest
import torch
import transformers
from test_generation import GENERATIONS
from zoo import error
from zoo_llava import LLAMA, MISTRAL, NEXT, LlavaMember

MEMBERS = [LLAMA, replace(MISTRAL, left=True), LlavaMember((12, 2, 3), (16, 3, 4, 2, 6)), NEXT]
HOW = GENERATIONS | {"by length": {"max_length": 56}}
# An image token that is written is read again, where nothing is kept, and has no image.
HOW["no cache"] = HOW["no cache"] | {"suppress_tokens": [LLAMA.image_token]}
del HOW["stopping"]
each = pytest.mark.parametrize("member", MEMBERS, ids=str)


@functools.cache
def pair(member):
    return member.pair(torch.float64)


@pytest.fixture(autouse=True)
def no_hook_stays():
    yield
    for member in MEMBERS:
        assert pair(member)[1].list_hooks() == {}


def parts(inputs, cut):
    """The first positions of inputs, with their images, and the rest."""
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    first = {name: value[:, :cut] for name, value in texts.items()}
    rest = {name: value[:, cut:] for name, value in texts.items()}
    return first | images_of(inputs), rest


def images_of(inputs, which=slice(None)):
    """Some of the images, with their sizes where the model reads those."""
    names = ("pixel_values", "image_sizes")
    return {name: inputs[name][which] for name in names if name in inputs}


@pytest.mark.parametrize("how", HOW)
@each
def test_token_for_token(member, how):
    theirs, ours = pair(member)
    inputs = member.inputs(counts=(1, 0, 2))
    torch.manual_seed(0)
    expected = theirs.generate(**inputs, **HOW[how])
    torch.manual_seed(0)
    ids = ours.generate(**inputs, **HOW[how])
    assert ids.tolist() == expected.tolist()
    assert ids[:, inputs["input_ids"].shape[1] :].unique().numel() > 2


@each
def test_words_alone_and_one_image_for_all(member):
    theirs, ours = pair(member)
    words = member.inputs(counts=(0, 0))
    asked = {"max_new_tokens": 5}
    assert ours.generate(**words, **asked).tolist() == theirs.generate(**words, **asked).tolist()
    shared = member.inputs(3, images=1)
    expected = theirs.generate(**shared | images_of(shared, [0, 0, 0]), **asked)
    assert ours.generate(**shared, **asked).tolist() == expected.tolist()


@each
def test_kept_keys_change_nothing_under_hooks(member):
    """Hooks that act on all positions alike, or by absolute position, in every stack."""
    ours, inputs = pair(member)[1], member.inputs(counts=(1, 0, 2))

    def halve(x, hook):
        return x * 0.5

    def move(x, hook):
        at = hook.ctx["positions"] == 3
        return x + 3 * at.to(x).view(1, -1, *[1] * (x.dim() - 2))

    hooks = [
        ("vision.blocks.0.hook_mlp_out", halve),
        ("text.blocks.0.attn.heads.1.hook_z", halve),
        ("text.blocks.1.attn.hook_v", move),
        ("text.blocks.0.hook_resid_mid", move),
        ("text.hook_embed", move),
    ]
    length, ids = inputs["input_ids"].shape[1], inputs["input_ids"]
    plain = ours.generate(**inputs, max_new_tokens=5)
    cached = ours.generate(**inputs, fwd_hooks=hooks, max_new_tokens=5)
    afresh = ours.generate(**inputs, fwd_hooks=hooks, max_new_tokens=5, use_cache=False)
    assert cached.tolist() == afresh.tolist() != plain.tolist()

    # From scratch, without `generate`.
    def told(write):
        def hook_of(x, hook):
            hook.ctx["positions"] = torch.arange(x.shape[1])
            return write(x, hook)

        return hook_of

    by_hand = [(name, told(hook)) for name, hook in hooks]
    mask, ended = inputs["attention_mask"], torch.zeros(3, 1, dtype=torch.bool)
    for _ in range(5):
        given = inputs | {"input_ids": ids, "attention_mask": mask}
        new = ours.run_with_hooks(**given, fwd_hooks=by_hand)[:, -1:].argmax(-1)
        new, ended = new.masked_fill(ended, 0), ended | (new == 2)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert cached[:, length:].tolist() == ids[:, length:].tolist()
    for name, _ in hooks:
        ours.hook_dict[name].ctx.clear()


def test_hooks_of_a_step():
    ours, inputs = pair(LLAMA)[1], LLAMA.inputs(2)
    plain, asked = ours.generate(**inputs, max_new_tokens=4), []
    length = inputs["input_ids"].shape[1]

    def steer(logits, hook):
        logits[..., 7] = 1e3
        return logits

    def hooks(step):
        asked.append(step)
        return [("hook_logits", steer)] if step == 1 else []

    assert ours.generation_config.eos_token_id == 2
    ids = ours.generate(**inputs, fwd_hooks=hooks, max_new_tokens=4)
    assert asked == [0, 1, 2, 3]
    assert torch.equal(ids[:, length], plain[:, length])
    assert ids[:, length + 1].tolist() == [7, 7] != plain[:, length + 1].tolist()
    with pytest.raises(KeyError, match="hook_logit"):
        ours.generate(**inputs, fwd_hooks=[("hook_logit", steer)])


@pytest.mark.parametrize(
    "option",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
    ],
)
def test_options_that_a_step_cannot_serve_are_named(option):
    ours, inputs = pair(LLAMA)[1], LLAMA.inputs(1)
    with pytest.raises(ValueError, match=f"generate has no {next(iter(option))}= here: "):
        ours.generate(**inputs, **option, max_new_tokens=2)


def test_hooks_are_told_the_new_positions():
    ours, inputs, seen = pair(LLAMA)[1], LLAMA.inputs(2), []

    def look(x, hook):
        axis = hook.pos_dim
        seen.append((hook.name.rsplit(".")[-1], x.shape[axis], hook.ctx["positions"].tolist()))

    names = ["text.blocks.0.attn.hook_rot_k", "text.blocks.1.attn.heads.1.hook_pattern"]
    ours.generate(**inputs, fwd_hooks=[([*names, "hook_logits"], look)], max_new_tokens=2)
    length = inputs["input_ids"].shape[1]
    first, last = list(range(length)), [length]
    assert seen == [
        ("hook_rot_k", length, first),
        ("hook_pattern", length, first),
        ("hook_logits", 1, first[-1:]),
        ("hook_rot_k", 1, last),
        ("hook_pattern", 1, last),
        ("hook_logits", 1, last),
    ]


# --- what is kept


@each
def test_a_prefix_is_read_once_and_continued(member):
    ours, inputs = pair(member)[1], member.inputs(counts=(1, 1, 1))
    cut = inputs["input_ids"].shape[1] - 2
    first, rest = parts(inputs, cut)
    prefix, whole = ours.prefill(**first), ours(**inputs)
    assert prefix.length == cut and error(prefix.logits[:, 0], whole[:, cut - 1]) < 1e-12
    before = {layer: (k.clone(), v.clone()) for layer, (k, v) in prefix.kept.items()}
    for _ in range(2):
        assert error(ours(**rest, prefix=prefix), whole[:, cut:]) < 1e-12
        name = "text.blocks.1.attn.hook_pattern"
        _, cache = ours.run_with_cache(**rest, prefix=prefix, names_filter=name)
        _, expected = ours.run_with_cache(**inputs, names_filter=name)
        assert error(cache[name], expected[name][:, :, cut:]) < 1e-12
        ids = ours.generate(**rest, prefix=prefix, max_new_tokens=4)
        assert ids.tolist() == ours.generate(**inputs, max_new_tokens=4).tolist()
        beams = {"max_new_tokens": 4, "num_beams": 3}
        expected = ours.generate(**inputs, **beams).tolist()
        assert ours.generate(**rest, prefix=prefix, **beams).tolist() == expected
    for layer, kept in prefix.kept.items():
        assert all(map(torch.equal, kept, before[layer]))
    last = ours(**rest, prefix=prefix, logits_to_keep=1)
    assert error(last, whole[:, -1:]) < 1e-12 and last.shape[1] == 1


@each
def test_one_prefix_serves_many_texts(member):
    ours = pair(member)[1]
    inputs = member.inputs(3, images=1, padded=False)
    inputs["input_ids"][:, :-3] = inputs["input_ids"][:1, :-3]
    first, rest = parts({k: v for k, v in inputs.items()}, inputs["input_ids"].shape[1] - 3)
    prefix = ours.prefill(**{k: v[:1] for k, v in first.items()})
    whole, seen = ours(**inputs), []
    handle = ours.text.blocks[0].mlp.fc_in.register_forward_hook(
        lambda _, args, __: seen.append(tuple(args[0].shape[:2]))
    )
    logits = ours(**rest, prefix=prefix)
    handle.remove()
    assert seen == [(3, 3)] and error(logits, whole[:, -3:]) < 1e-12
    ids = ours.generate(**rest, prefix=prefix, max_new_tokens=3)
    assert ids.tolist() == ours.generate(**inputs, max_new_tokens=3).tolist()


@each
def test_a_prefix_that_nothing_follows(member):
    ours, inputs = pair(member)[1], member.inputs(counts=(1, 1))
    prefix, asked = ours.prefill(**inputs), {"max_new_tokens": 4}
    expected = ours.generate(**inputs, **asked).tolist()
    assert ours.generate(prefix=prefix, **asked).tolist() == expected
    assert ours.generate(prefix=prefix, num_beams=2, **asked).tolist() == (
        ours.generate(**inputs, num_beams=2, **asked).tolist()
    )
    word = torch.tensor([[4]])
    beams = ours.generate(prefix=ours.prefill(input_ids=word), num_beams=2, **asked)
    assert beams.tolist() == ours.generate(input_ids=word, num_beams=2, **asked).tolist()


@each
def test_images_may_follow_a_prefix(member):
    ours, inputs = pair(member)[1], member.inputs(counts=(2, 2), padded=False)
    cut = 1 + member.tokens(member.pictures[0])
    first, rest = parts(inputs, cut)
    prefix = ours.prefill(**first | images_of(inputs, slice(0, None, 2)))
    logits = ours(**rest, **images_of(inputs, slice(1, None, 2)), prefix=prefix)
    assert error(logits, ours(**inputs)[:, cut:]) < 1e-12
    with pytest.raises(ValueError, match="the prefix ends in an image; give input_ids"):
        ours.generate(prefix=prefix)


def test_padding_inside_of_a_text_is_refused():
    """It would count as distance, where transformers counts tokens."""
    ours, inputs = pair(LLAMA)[1], LLAMA.inputs(1)
    prefix = ours.prefill(**inputs)
    texts = torch.tensor([[5, 6, 7], [0, 9, 8], [9, 8, 0]])
    alone = [ours(input_ids=ids[None], prefix=prefix) for ids in (texts[0], texts[1, 1:])]
    given = {"input_ids": texts[[0, 2]], "attention_mask": (texts[[0, 2]] != 0).long()}
    behind = ours(**given, prefix=prefix)
    assert (
        error(behind[0], alone[0][0]) < 1e-12 and error(behind[1, :2], alone[1][0].flip(0)) > 1e-3
    )
    right = ours(input_ids=texts[2:, :2], prefix=prefix)
    assert error(behind[1, :2], right[0]) < 1e-12
    left = {"input_ids": texts[:2], "attention_mask": (texts[:2] != 0).long()}
    for run in (ours, ours.generate):
        with pytest.raises(ValueError, match=r"rows \[1\] have padding between their tokens"):
            run(**left, prefix=prefix)
    with pytest.raises(ValueError, match=r"rows \[1\] have padding between"):
        ours.generate(**given)
    padded = ours.prefill(**given)
    with pytest.raises(ValueError, match=r"rows \[1\] have padding between"):
        ours(input_ids=texts[:2], prefix=padded)
    with pytest.raises(ValueError, match="is of whole texts; leave prefix out"):
        ours(input_ids=texts[:2], prefix=prefix, return_type="loss")
    config = transformers.GenerationConfig(use_cache=False)
    with pytest.raises(ValueError, match="use_cache=False keeps nothing"):
        ours.generate(input_ids=texts[:1], prefix=prefix, generation_config=config)


def test_what_does_not_fit_a_prefix():
    ours, inputs = pair(LLAMA)[1], LLAMA.inputs(2, padded=False)
    first, rest = parts(inputs, inputs["input_ids"].shape[1] - 2)
    prefix = ours.prefill(**first)
    for run in (ours, ours.generate):
        with pytest.raises(ValueError, match="the prefix has 2 rows, what continues it has 3"):
            run(input_ids=torch.ones(3, 2, dtype=torch.long), prefix=prefix)
    with pytest.raises(ValueError, match="give base_run no prefix"):
        ours.base_run(**rest, prefix=prefix)
    with pytest.raises(ValueError, match="input_ids is missing"):
        ours.generate(inputs["pixel_values"])
    with pytest.raises(ValueError, match="image tokens"):
        ours.generate(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="use_cache=False keeps nothing"):
        ours.generate(**rest, prefix=prefix, use_cache=False)
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        ours(**inputs, return_type="loss", logits_to_keep=1)


def test_the_checkpoints_own_generation_config(tmp_path):
    """As in transformers, it holds where the call says nothing; it is saved and read."""
    theirs, ours = LLAMA.pair(torch.float64)
    inputs = LLAMA.inputs(2)
    length = inputs["input_ids"].shape[1]
    plain = theirs.generate(**inputs, max_new_tokens=6)
    end = int(plain[0, length + 2])
    config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=0, max_new_tokens=6)
    theirs.generation_config = ours.generation_config = config
    expected = theirs.generate(**inputs)
    assert ours.generate(**inputs).tolist() == expected.tolist()
    assert (expected[0] == end).any() and expected[0].tolist() != plain[0].tolist()
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert again.generate(**inputs).tolist() == expected.tolist()
    read = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert read.generation_config.eos_token_id == end


@pytest.mark.parametrize("keep", [1, 3])
@each
def test_logits_to_keep(member, keep):
    theirs, ours = pair(member)
    inputs = member.inputs(3)
    expected = theirs(**inputs, logits_to_keep=keep).logits
    mask = inputs["attention_mask"][:, -keep:].bool()
    kept = ours(**inputs, logits_to_keep=keep)
    assert kept.shape == expected.shape and error(kept[mask], expected[mask]) < 1e-10
    _, cache = ours.run_with_cache(**inputs, logits_to_keep=keep)  # nothing is left out of it
    last = cache[f"text.blocks.{member.text[1] - 1}.hook_resid_post"]
    assert last.shape[1] == inputs["input_ids"].shape[1]
    assert error(cache["hook_logits"][mask], expected[mask]) < 1e-10
