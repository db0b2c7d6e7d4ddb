"""What is LLaVA's own: images among the tokens, its files, its prompts."""

import json

import pytest
import torch
import transformers
from llava_processors import TEMPLATE, processor
from PIL import Image
from safetensors.torch import load_file, save_file
from zoo import error
from zoo_llava import LLAMA, LLAVA_PARITY, MISTRAL, NEXT_PARITY, LlavaMember

from hooked_vlm import HookedCLIP, HookedLlava, HookedVLM, checking
from hooked_vlm.config import LlamaConfig
from weights_conversion import ConversionError, InMemory, llava, plan

each = pytest.mark.parametrize("member", [LLAMA, MISTRAL], ids=str)


@pytest.fixture
def model():
    model = LLAMA.model(torch.float32)
    model.processor = processor()
    return model


def picture(colour="red", size=(40, 20)):
    return Image.new("RGB", size, colour)


# --- the pass


def test_rows_without_an_image_and_with_two_are_as_if_alone():
    for member in LLAVA_PARITY:
        model, inputs = member.model(), member.inputs(counts=(1, 0, 2))
        logits, mask = model(**inputs), inputs["attention_mask"].bool()
        for row in range(3):
            alone = member.chosen(inputs, [row])
            assert error(model(**alone)[alone["attention_mask"].bool()], logits[row][mask[row]]) < (
                1e-12
            )


@each
def test_one_image_serves_many_texts(member):
    model, inputs = member.model(), member.inputs(3, images=1)
    each_its_own = inputs | {"pixel_values": inputs["pixel_values"].expand(3, -1, -1, -1)}
    assert error(model(**inputs), model(**each_its_own)) < 1e-12


def test_numbers_that_do_not_match_are_told():
    model, inputs = LLAMA.model(), LLAMA.inputs(3)
    for images in (0, 2, 4):
        pixels = torch.randn(images, 3, 16, 16).double()
        given = inputs | {"pixel_values": pixels if images else None}
        said = rf"\[4, 4, 4\] image tokens \(36\), but there are {images} images of 4 features"
        with pytest.raises(ValueError, match=said):
            model(**given)
    inputs["input_ids"][0, -1] = 36  # a part of an image
    with pytest.raises(ValueError, match=r"\[5, 4, 4\] image tokens"):
        model(**inputs)
    with pytest.raises(ValueError, match="input_ids is missing"):
        model(inputs["pixel_values"])
    with pytest.raises(ValueError, match="0 to 36"):
        model(input_ids=torch.tensor([[37]]))


@each
def test_what_stands_behind_a_token_does_not_matter(member):
    """Causal: a changed last token changes the last logits alone; padding changes none."""
    model, inputs = member.model(), member.inputs(2, padded=False)
    logits = model(**inputs)
    inputs["input_ids"][:, -1] = 5
    assert torch.equal(model(**inputs)[:, :-1], logits[:, :-1])
    other = member.inputs(3)
    mask = other["attention_mask"].bool()
    before = model(**other)[mask]
    other["input_ids"][~mask] = 7
    assert error(model(**other)[mask], before) < 1e-12


def test_a_window_hides_what_is_before_it():
    model, inputs = MISTRAL.model(), MISTRAL.inputs(2, padded=False)
    _, cache = model.run_with_cache(**inputs)
    pattern = cache["text.blocks.0.attn.hook_pattern"]
    at = torch.arange(pattern.shape[-1])
    seen = (at <= at[:, None]) & (at > at[:, None] - MISTRAL.window)
    assert torch.equal(pattern[0, 0] > 0, seen) and not seen.tril().equal(torch.ones_like(seen))


@each
def test_the_loss_is_of_words_alone(member):
    model, inputs = member.model(), member.inputs(3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    log_probs = model(**inputs).log_softmax(-1)
    told = [
        -log_probs[row, p - 1, ids[row, p]]
        for row in range(3)
        for p in range(1, ids.shape[1])
        if mask[row, p] and mask[row, p - 1] and ids[row, p] != member.image_token
    ]
    assert error(model(**inputs, return_type="loss"), torch.stack(told).mean()) < 1e-12
    assert model(**inputs, return_type=None) is None


@each
def test_resuming_where_texts_have_different_numbers_of_images(member):
    model, inputs = member.model(), member.inputs(counts=(1, 0, 2, 1))
    base = model.base_run(**inputs)

    def write(x, hook):
        return x + x.flatten(1).mean(1).cos().view(-1, *[1] * (x.dim() - 1))

    for site in ("vision.hook_embed", "vision.blocks.0.hook_mlp_out", "projector.hook_pre"):
        for rows in ([2, 0, 2], [1], [3, 1]):
            hooks = [(site, write)] if rows != [1] else []
            naive = model.run_with_hooks(**member.chosen(inputs, rows), fwd_hooks=hooks)
            assert error(model.resume(base, site, rows=rows, fwd_hooks=hooks), naive) < 1e-10
    site = "text.hook_embed"
    naive = model.run_with_hooks(**member.chosen(inputs, [2, 1]), fwd_hooks=[(site, write)])
    assert error(model.resume(base, site, rows=[2, 1], fwd_hooks=[(site, write)]), naive) < 1e-10
    words = member.inputs(counts=(0, 0))
    alone = model.base_run(**words)
    assert error(model.resume(alone, "text.blocks.1.hook_resid_pre"), alone.logits) < 1e-10
    with pytest.raises(ValueError, match="did not compute 'hook_image_embeds'"):
        model.resume(alone, "hook_image_embeds")


@each
def test_gradients_of_a_resumed_pass(member):
    model, inputs = member.model(), member.inputs(counts=(1, 0, 2))
    base, names = model.base_run(**inputs), ["vision.blocks.0.hook_mlp_out", "text.hook_embed"]
    _, cache = model.run_with_cache(
        **inputs, names_filter=names, incl_bwd=True, metric=lambda x: x.square().sum()
    )
    for start in (0, 1):
        seen = {}
        keep = [(names[start:], lambda grad, hook: seen.update({hook.name: grad.clone()}))]  # noqa: B023
        logits = model.resume(base, names[start], bwd_hooks=keep, reset_hooks_end=False)
        logits.square().sum().backward()
        model.reset_hooks()
        for name in names[start:]:
            assert error(seen[name], cache[f"{name}_grad"], 0.0) < 1e-9, name


@each
def test_decompositions_sum_at_image_positions_too(member):
    model, inputs = member.model(), member.inputs(counts=(1, 0, 2))
    _, cache = model.run_with_cache(**inputs)
    text, last = cache.stack("text"), member.text[1] - 1
    places = inputs["input_ids"] == member.image_token
    for parts in (text.decompose_resid(), text.get_full_resid_decomposition()):
        assert error(parts.sum(0), cache[f"text.blocks.{last}.hook_resid_post"]) < 1e-12
    images = cache["hook_image_embeds"].flatten(0, 1)
    assert torch.equal(text.decompose_resid()[0][places], images)
    # A norm without centring or bias: what it makes of the parts sums to what it gives.
    read = text.decompose_resid(apply_ln=True).sum(0)
    assert error(read @ model.W_U + model.b_U, cache["hook_logits"]) < 1e-12
    middle = text.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0)
    assert error(middle, model.text.blocks[1].ln2(cache["text.blocks.1.hook_mlp_in"])) < 1e-12
    lens = text.accumulated_resid(apply_ln=True) @ model.W_U
    assert error(lens[-1], cache["hook_logits"]) < 1e-12
    vision = cache.stack("vision")
    assert (
        error(
            vision.decompose_resid().sum(0),
            cache[f"vision.blocks.{member.reads - 1}.hook_resid_post"],
        )
        < 1e-12
    )
    with pytest.raises(NotImplementedError, match="no norm follows"):
        vision.decompose_resid(apply_ln=True)


def test_key_value_heads_are_counted_apart():
    model = MISTRAL.model()
    assert "text.blocks.0.attn.heads.3.hook_rot_q" in model.hook_dict
    with pytest.raises(KeyError, match="hook_rot_k' has 2 heads, no head 2"):
        model.hook_dict["text.blocks.0.attn.heads.2.hook_rot_k"]
    assert model.text.W_K.shape == (2, 2, 12, 6) and model.text.QK.AB.shape == (2, 4, 12, 12)
    assert model.b_U.abs().max() == 0 and model.W_U.shape == (12, 37)
    sizes = {"d_model": 12, "n_layers": 1, "d_mlp": 8, "activation": "silu", "eps": 1e-5}
    sizes |= {"d_vocab": 9, "n_ctx": 9, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="n_heads=3 is not a multiple of n_key_value_heads=2"):
        LlamaConfig(n_heads=3, n_key_value_heads=2, **sizes)
    with pytest.raises(ValueError, match="pass the number of heads"):
        LlamaConfig(n_heads=5, **sizes)
    assert LlamaConfig(n_heads=5, d_head=6, **sizes).n_key_value_heads == 5


# --- files


def layouts(state):
    """The names of each layout, from those of transformers 5 in memory."""

    def on_disk(name):
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        return f"language_model.{name}" if name == "lm_head.weight" else name

    def with_inner(name):
        return name.replace("vision_tower.", "vision_tower.vision_model.")

    plain = {name: name for name in state}
    return {
        "B": {name: with_inner(on_disk(name)) for name in plain},
        "C": {name: with_inner(name) for name in plain},
        "D": plain,
        "E": {name: on_disk(name) for name in plain},
    }


@pytest.mark.parametrize("layout", "BCDE")
@pytest.mark.parametrize("member", [*LLAVA_PARITY, *NEXT_PARITY], ids=str)
def test_every_layout_is_read(member, layout, tmp_path):
    theirs, ours = member.pair(torch.float32)
    names = layouts(theirs.state_dict())[layout]
    state = {names[k]: v.contiguous() for k, v in theirs.state_dict().items()}
    if layout == "B":
        state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    if member.tied:
        del state["lm_head.weight" if layout in "CD" else "language_model.lm_head.weight"]
    middle = sorted(state)[len(state) // 2]
    shards = [{k: v for k, v in state.items() if (k < middle) == first} for first in (True, False)]
    for index, shard in enumerate(shards):
        save_file(shard, tmp_path / f"model-{index}.safetensors")
    where = {
        name: f"model-{index}.safetensors" for index, shard in enumerate(shards) for name in shard
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    theirs.config.save_pretrained(tmp_path)
    opened = HookedVLM.from_pretrained(tmp_path)
    assert isinstance(opened, HookedLlava) and opened.cfg == ours.cfg
    for (name, a), (_, b) in zip(opened.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "text", "tensors", "billions"),
    [
        ("Llava", {}, 686, 7.063),
        # As in llava-v1.6-mistral-7b-hf: keys and values have 8 heads; image_newline.
        (
            "LlavaNext",
            {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336},
            687,
            7.567,
        ),
    ],
)
def test_the_released_size_has_a_place_for_every_tensor(name, text, tensors, billions):
    text = {"model_type": "llama", "intermediate_size": 11008} | text
    text |= {"hidden_size": 4096, "vocab_size": 32064}
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(text_config=text)
        theirs = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        state = InMemory(theirs.state_dict())
        cfg, rules = llava.read(state, theirs.config.to_dict(), None, {})
        ours = HookedLlava(cfg)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert len(plan(state.shapes, rules, shapes)) == len(state.shapes) == tensors
    assert round(sum(p.numel() for p in ours.parameters()) / 1e9, 3) == billions
    assert (cfg.vision.n_layers, cfg.vision.n_unread, cfg.n_image_tokens) == (23, 1, 576)


@pytest.mark.parametrize("member", [*LLAVA_PARITY, *NEXT_PARITY], ids=str)
def test_transformers_reads_what_is_written(member, tmp_path):
    theirs, ours = member.pair(torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    saved, expected = (
        load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")
    )
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    read, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [
        type(theirs).__name__
    ]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in theirs.state_dict().items())
    for part in ("text_config", "vision_config"):
        kept, given = (getattr(m.config, part).to_dict() for m in (read, theirs))
        assert type(getattr(read.config, part)) is type(getattr(theirs.config, part))
        assert {k: v for k, v in kept.items() if k != "dtype"} == {
            k: v for k, v in given.items() if k != "dtype"
        }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llava_next"}, "nothing fills 'image_newline'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({"vision_feature_layer": -4}, "vision_feature_layer=-4 is behind none of the 3 blocks"),
        ({"multimodal_projector_bias": False}, "a projector without biases"),
        ({"text_config": {"model_type": "gpt2"}}, "is a 'gpt2', HookedLlava reads llama and"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "HookedLlava reads CLIP"),
        ({"text_config": {"attention_bias": True}}, "attention_bias is of no released model"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
            "type 'linear'",
        ),
    ],
)
def test_relatives_are_refused_by_name(change, said, tmp_path):
    LLAMA.model(torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    for kind in (HookedLlava, HookedVLM):
        with pytest.raises(ConversionError, match=said):
            kind.from_pretrained(tmp_path)


def test_bare_files_are_refused_by_name(tmp_path):
    state = LLAMA.reference().state_dict()
    torch.save(state, tmp_path / "bare.bin")
    with pytest.raises(ConversionError, match=r"without the config\.json"):
        HookedVLM.from_pretrained(tmp_path / "bare.bin")
    with pytest.raises(ConversionError, match="HookedLlava, which opens it; HookedCLIP does not"):
        HookedCLIP.from_pretrained(tmp_path / "bare.bin")
    torch.save({"model.mm_projector.0.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
    with pytest.raises(ConversionError, match="holds a projector alone"):
        HookedVLM.from_pretrained(tmp_path / "mm_projector.bin")


# --- inputs


def test_a_processor_is_written_and_read(model, tmp_path):
    model.save_pretrained(tmp_path / "with")
    opened = HookedLlava.from_pretrained(tmp_path / "with")
    assert isinstance(opened.processor.image_processor, transformers.CLIPImageProcessorPil)
    ours, theirs = (m.prepare(picture(), "what is it ?") for m in (opened, model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(opened(**ours), model(**theirs))
    model.processor = None
    model.save_pretrained(tmp_path / "without")
    assert HookedLlava.from_pretrained(tmp_path / "without").processor is None
    there = HookedLlava.from_pretrained(tmp_path / "without", processor=tmp_path / "with")
    assert there.processor.num_additional_image_tokens == 1
    with pytest.raises(FileNotFoundError, match="has no LLaVA processor"):
        HookedLlava.from_pretrained(tmp_path / "with", processor=tmp_path / "without")
    with pytest.raises(ValueError, match="no processor"):
        model.prepare(picture(), "what is it ?")


def test_check_agrees_and_sees_what_differs(model, tmp_path, capfd):
    model.save_pretrained(tmp_path)
    assert checking.check(HookedLlava.from_pretrained(tmp_path), str(tmp_path))
    said = capfd.readouterr().out
    # Of each block the stream, the pattern and the MLP; of vision the projector, too.
    assert [line.split("│")[2].strip() for line in said.splitlines() if "equal" in line] == (
        ["7", "6", "1"]
    )
    model.text.blocks[1].mlp.fc_in.weight.mul_(1.01)
    assert not checking.check(model, str(tmp_path))


def test_prompts(model):
    inputs = model.prepare(picture(), "what is it ?")
    words = "<s> USER : <image> <image> <image> <image> what is it ? ASSISTANT :".split()
    assert model.to_str_tokens(inputs["input_ids"]) == words
    expected = model.processor(
        images=picture(), text="USER: <image>\nwhat is it ? ASSISTANT:", return_tensors="pt"
    )
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    begun = model.prepare(picture(), "what is it ?", answer_prefix=" red")
    assert model.to_str_tokens(begun["input_ids"]) == [*words, "red"]
    own = model.prepare(picture(), "red <image> ?")
    assert model.to_str_tokens(own["input_ids"])[:3] == ["<s>", "red", "<image>"]
    model.processor = processor(TEMPLATE)
    asked = model.prepare(picture(), "what is it ?")
    image = ["<image>"] * 4
    words = ["<s>", "Q", ":", *image, "what", "is", "it", "?", "A", ":"]
    assert model.to_str_tokens(asked["input_ids"]) == words


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(model, side):
    model.processor = processor(side=side)
    shared = model.prepare(picture(), ["red ?", "what is it ?"])
    assert len(shared["pixel_values"]) == 1 and shared["attention_mask"].sum(1).tolist() == [11, 13]
    assert shared["attention_mask"][0, 0].item() == (side == "right")
    logits = model(**shared)
    for row, text in enumerate(["red ?", "what is it ?"]):
        alone = model(**model.prepare(picture(), text))[0]
        assert error(logits[row][shared["attention_mask"][row].bool()], alone) < 1e-5
    two = model.prepare([picture(), picture("blue")], "what is it ?")
    assert two["pixel_values"].shape[0] == two["input_ids"].shape[0] == 2
    both = model.prepare([picture(), picture("blue")], "<image> <image> ?")
    assert (both["input_ids"] == 36).sum() == 8 and model(**both).shape[0] == 1
    with pytest.raises(ValueError, match="3 images do not match 2 <image> in 2 texts"):
        model.prepare([picture()] * 3, ["red ?", "what is it ?"])


def test_processors_that_do_not_fit_are_refused(model):
    model.processor = processor(additional=0)  # as in old processor_config.json
    with pytest.raises(ValueError, match=r"num_additional_image_tokens=0.* it needs 8, 'default'"):
        model.prepare(picture(), "what is it ?")
    model.processor.num_additional_image_tokens = 1  # the way out that the error names
    model.prepare(picture(), "what is it ?")
    model.processor = processor(strategy="full")
    with pytest.raises(ValueError, match="vision_feature_select_strategy='full'"):
        model.prepare(picture(), "what is it ?")
    model.processor = processor()
    with pytest.raises(ValueError, match=r"has 75 tokens.* reads 64"):
        model.prepare(picture(), "red " * 70 + "<image>")
    with pytest.raises(ValueError, match="needs a text"):
        model.prepare(picture())
    with pytest.raises(ValueError, match="BLIP's"):
        model.prepare(picture(), "red ?", first_token="enc")


@pytest.mark.parametrize("member", [LLAMA, LlavaMember(strategy="full", left=False)], ids=str)
def test_image_positions_are_patches_of_the_picture(member):
    model = member.model(torch.float32)
    model.processor = processor(strategy=member.strategy)
    images = [picture(size=(40, 20)), picture("blue", (16, 32))]
    inputs = model.prepare(images, ["red <image> ?", "what is <image>"])
    frame = model.token_map(inputs).set_index(["stack", "row", "position"])
    ids = inputs["input_ids"]
    for row in (0, 1):
        at = (ids[row] == 36).nonzero().flatten().tolist()
        text = frame.loc["text"].loc[row]
        assert text["token"].tolist() == model.to_str_tokens(ids[row])
        others = text.drop(index=at)
        assert others["patch_row"].isna().all() and others["image"].isna().all()
        seen = text.loc[at].drop(columns=["token", "image"])
        patches = frame.loc["vision"].loc[row].drop(columns=["token", "image"])[-len(at) :]
        assert (text.loc[at, "image"] == row).all()
        assert seen.reset_index(drop=True).equals(patches.reset_index(drop=True))
    last = frame.loc["text"].loc[0].loc[(ids[0] == 36).nonzero().flatten()[-1].item()]
    assert (last["patch_row"], last["patch_column"]) == (1, 1)
    assert [last[side] for side in ("left", "top", "right", "bottom")] == [20, 10, 30, 20]
