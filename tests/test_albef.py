"""What is ALBEF's own: late fusion, partial passes, two images, texts, answers, files."""

import functools

import pytest
import torch
import torch.nn.functional as F
from albef_fixtures import HEADS, HERE, inputs, open_model, tokenizer
from checkpoints import WORDS, bert_folder
from PIL import Image
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner
from zoo import BLIP, error
from zoo_albef import ITM, NLVR, PRETRAIN, VE, VQA

from hooked_vlm import HookedALBEF, HookedBLIP
from hooked_vlm.data import Pair
from weights_conversion import ConversionError
from weights_conversion.__main__ import app

PIXELS = Image.new("RGB", (20, 30), "red")


@functools.cache
def built(member):
    return member.model()


@pytest.fixture(scope="module")
def golden_words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return bert_folder(tmp_path_factory.mktemp("words"))


def add_one(x, hook):
    return x + 1


# --- partial passes


@pytest.mark.parametrize("member", [ITM, PRETRAIN, VQA, VE, NLVR], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_text_then_fusion_is_multi_modal(member, dtype):
    model, given = member.model(dtype), member.inputs(dtype=dtype)
    ids, mask = given["input_ids"], given["attention_mask"]
    text = model(input_ids=ids, attention_mask=mask, mode="text")
    rest = {k: v for k, v in given.items() if k != "input_ids"}
    assert torch.equal(model(**rest, encoder_embeds=text, mode="fusion"), model(**given))
    early, cache = model.run_with_cache(input_ids=ids, attention_mask=mask, mode="text")
    assert torch.equal(early, cache["text.blocks.0.hook_normalized_resid_post"])
    assert not any(name.startswith(("vision", "text.blocks.1", "hook")) for name in cache)


@pytest.mark.parametrize("mode", ["text", "fusion"])
def test_partial_passes_resume(mode):
    model, given = built(ITM), ITM.inputs()
    text = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    site = "text.blocks.0.attn.heads.1.hook_z"
    if mode == "fusion":
        states = model(**text, mode="text")
        text = {"encoder_embeds": states, "attention_mask": given["attention_mask"]}
        text["pixel_values"] = given["pixel_values"]
        site = "text.blocks.2.cross_attn.heads.1.hook_z"
    base = model.base_run(**text, mode=mode)
    resumed = model.resume(base, site, rows=[2, 0], fwd_hooks=[(site, add_one)])
    naive = model.run_with_hooks(**text, mode=mode, fwd_hooks=[(site, add_one)])
    assert error(resumed, naive[[2, 0]]) < 1e-12 and error(resumed, base.logits[[2, 0]]) > 1e-6
    unseen = "vision.hook_embed" if mode == "text" else "text.blocks.0.hook_mlp_out"
    with pytest.raises(ValueError, match=f"did not compute '{unseen}'"):
        model.resume(base, unseen)


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("text", ["vision.hook_embed", "text.blocks.1.attn.hook_z", "hook_logits"]),
        ("fusion", ["text.hook_embed", "text.blocks.0.attn.heads.1.hook_z"]),
    ],
)
def test_a_partial_pass_ignores_no_hook(mode, names):
    model, given = built(ITM), ITM.inputs()
    text = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    if mode == "fusion":
        text["encoder_embeds"] = model(**text, mode="text")
        text["input_ids"] = None
        text["pixel_values"] = given["pixel_values"]
    for name in names:
        with pytest.raises(ValueError, match=f"{name}' would not fire: mode='{mode}'"):
            model.run_with_hooks(**text, mode=mode, fwd_hooks=[(name, add_one)])
    assert model.list_hooks() == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mode": "fusion"}, "mode='fusion' does not read input_ids|needs encoder_embeds"),
        ({"pixel_values": None}, "needs pixel_values: the layers from fusion_layer on"),
        ({"input_ids": None}, "mode='multi_modal' needs input_ids"),
        ({"mode": "text"}, "mode='text' does not read pixel_values"),
        ({"encoder_embeds": torch.zeros(3, 5, 16)}, "does not read encoder_embeds"),
        ({"decoder_input_ids": torch.ones(3, 2).long()}, "belongs to the answers of task 'vqa'"),
        ({"return_type": "loss"}, "a itm checkpoint predicts no next token"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16).double()}, "'text' has 3 rows and 'vision' 2"),
    ],
)
def test_inputs_that_do_not_fit(given, says):
    with pytest.raises(ValueError, match=says):
        built(ITM)(**{**ITM.inputs(), **given})
    with pytest.raises(ValueError, match="'text', 'fusion' or 'multi_modal', not 'image'"):
        built(ITM).base_run(**ITM.inputs(), mode="image")


# --- fusion


def test_early_states_never_depend_on_the_image():
    """Patching the image resumes at the first cross-attention and leaves what is before it."""
    model, given = built(ITM), ITM.inputs()
    other = given | {"pixel_values": given["pixel_values"].flip(0)}
    _, one = model.run_with_cache(**given)
    _, two = model.run_with_cache(**other)
    cross = model.cfg.text.fusion_layer
    early = [n for n in one if n.startswith("text.") and f".blocks.{cross}." not in n]
    early = [n for n in early if f".blocks.{cross + 1}." not in n]
    early += [n for n in one if n.startswith(f"text.blocks.{cross}.attn")]
    assert len(early) > 20 and all(torch.equal(one[n], two[n]) for n in early)
    late = f"text.blocks.{cross}.hook_cross_attn_out"
    assert not torch.equal(one[late], two[late])
    base = model.base_run(**given)
    fired = []
    every = (["text.*", "hook_image_embeds"], lambda x, hook: fired.append(hook.name))
    site = "hook_image_embeds"
    naive = model.run_with_hooks(**given, fwd_hooks=[(site, add_one)])
    assert error(model.resume(base, site, fwd_hooks=[(site, add_one)]), naive) < 1e-12
    embedded, calls = model.text.blocks[0].register_forward_hook, []
    handle = embedded(lambda *_: calls.append(1))
    model.resume(base, site, fwd_hooks=[(site, add_one)])
    assert calls == []  # nothing before the fusion layer ran
    model.resume(base, site, fwd_hooks=[every])
    handle.remove()
    assert calls == [1] and "text.blocks.0.mlp.hook_pre" in fired  # unless somebody listens


def test_nlvr_reads_its_images_in_turn():
    """Block by block: the first round's blocks read image 0 and 1 with one set of keys' weights."""
    model, given = built(NLVR), NLVR.inputs(padded=False)
    first, second = (model.text.blocks[layer].cross_attn for layer in (1, 2))
    assert first.k.weight is second.k.weight and first.v.bias is second.v.bias
    assert first.q.weight is not second.q.weight
    swapped = given | {"pixel_values": given["pixel_values"].flip(1)}
    assert error(model(**given), model(**swapped)) > 1e-3
    _, cache = model.run_with_cache(**given)
    images = cache["hook_image_embeds"]
    for layer, states in ((1, images[0::2]), (2, images[1::2])):
        expected = states @ first.k.weight.T + first.k.bias
        ours = cache[f"text.blocks.{layer}.cross_attn.hook_k"].flatten(-2)
        assert error(ours, expected) < 1e-12
    for wrong in (given["pixel_values"][:, 0], given["pixel_values"][:, :1]):
        with pytest.raises(ValueError, match="reads two images with each text"):
            model(**given | {"pixel_values": wrong})


def test_states_that_do_not_fit():
    model, given = built(ITM), ITM.inputs()
    mask = given["attention_mask"]
    states = model(input_ids=given["input_ids"], attention_mask=mask, mode="text")
    run = functools.partial(model.base_run, pixel_values=given["pixel_values"], mode="fusion")
    for embeds, seen, says in (
        (states, mask[:, :1], "the attention mask of encoder_embeds"),
        (states, mask[:1], "the attention mask of encoder_embeds"),
        (states[..., :10], mask, "expected what mode='text' gives"),
        (states[:, :0], None, "of 1 to 12 positions"),
        (states.repeat(1, 3, 1), None, "of 1 to 12 positions"),
        (states.float(), mask, "float32, the model of torch.float64"),
    ):
        with pytest.raises(ValueError, match=says):
            run(encoder_embeds=embeds, attention_mask=seen)


def test_listening_leaves_the_callers_gradient_alone():
    model, given = built(ITM), ITM.inputs()
    mask = given["attention_mask"]
    states = model(input_ids=given["input_ids"], attention_mask=mask, mode="text")
    found = []
    for hooks in ([], [("text.blocks.1.cross_attn.hook_pattern", lambda grad, hook: None)]):
        leaf = states.detach().requires_grad_()
        with model.hooks(bwd_hooks=hooks):
            logits = model(
                given["pixel_values"], encoder_embeds=leaf, attention_mask=mask, mode="fusion"
            )
            logits[:, 1].sum().backward()
        found.append(leaf.grad)
    assert found[0].abs().max() > 1e-3 and error(found[1], found[0]) < 1e-12


def test_a_pass_that_does_not_reach_where_to_stop():
    given = ITM.inputs()
    text = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
    with pytest.raises(KeyError, match="without reaching stop_at"):
        built(ITM).run_with_cache(**text, mode="text", stop_at="text.blocks.2.hook_attn_out")
    assert built(ITM).list_hooks() == {}


def test_similarity_needs_its_projections():
    model, given = built(VE), VE.inputs()
    with pytest.raises(ValueError, match="vision_proj and text_proj, which this ve checkpoint"):
        model.similarity(given["pixel_values"], given["input_ids"])
    with pytest.raises(ValueError, match="open a checkpoint for vqa"):
        model.generate(**given)


# --- texts


def opened(file, words, **how):
    return HookedALBEF.from_pretrained(HERE / file, processor=words, config=HEADS, **how)


def test_texts_are_cleaned_as_in_the_original(words):
    model = opened("retrieval_released_flat.pth", words)
    cases = {
        "A red, blue circle!": "a red blue circle",
        "red-blue/square": "red blue square",
        "The  <person>  ('x')": "the person x",
        '"no"; yes: what? #is *it* ~a': "no yes what is it a",
    }
    for text, plain in cases.items():
        ids = model.prepare(PIXELS, text)["input_ids"][0]
        expected = [WORDS.index(w) if w in WORDS else 1 for w in plain.split()]
        assert ids.tolist() == [WORDS.index("[CLS]"), *expected], text
    with pytest.warns(UserWarning, match="31 words is cut off after 30"):
        inputs = model.prepare(PIXELS, " ".join(["x"] * 31))
    assert inputs["input_ids"].shape[1] == 31
    with pytest.raises(ValueError, match="without its punctuation"):
        model.prepare(PIXELS, "?!")
    with pytest.raises(ValueError, match="first_token of an ALBEF is 'cls'"):
        model.prepare(PIXELS, "a circle", first_token="enc")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert model.tokenizer("a circle", "a square")["input_ids"] == [2, 5, 9, 3, 5, 10]


def test_every_way_to_tokens_cleans(words):
    """Positions of a text are the same wherever they are asked for; pairs align by them."""
    model = opened("retrieval_released_flat.pth", words)
    text = "The red-blue circle, no?"
    ids = model.prepare(PIXELS, text)["input_ids"]
    assert torch.equal(model.to_tokens(text), ids)
    assert model.to_str_tokens(text) == ["[CLS]", "the", "red", "blue", "circle", "no"]
    pair = Pair(PIXELS, "a red circle.", None, "a blue circle")
    assert pair.n_tokens(model.to_str_tokens) == 4
    with pytest.raises(ValueError, match="positions do not align"):
        Pair(PIXELS, "red? a circle", None, "red blue a circle").n_tokens(model.to_str_tokens)
    model.max_words = 2
    with pytest.warns(UserWarning, match="cut off after 2"):
        assert model.to_tokens("a red circle").shape == (1, 3)


def test_a_processor_of_the_users_is_saved_as_it_is(words, tmp_path):
    model = opened("retrieval_released_flat.pth", words)
    own = model.processor.tokenizer.backend_tokenizer
    own.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    assert model.to_tokens("circle").tolist()[0][-1] == 3
    model.save_pretrained(tmp_path / "saved")
    again = HookedALBEF.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.to_tokens("circle"), model.to_tokens("circle"))


def test_answers_are_closed(words):
    model = opened("vqa_flat_no_momentum.pth", words)
    ids, mask = model.prepare_answers(["yes", "a circle"])
    cls, sep = WORDS.index("[CLS]"), WORDS.index("[SEP]")
    assert ids.tolist() == [
        [cls, WORDS.index("yes"), sep, 0],
        [cls, WORDS.index("a"), WORDS.index("circle"), sep],
    ]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert (model.cfg.bos_token_id, model.cfg.sep_token_id) == (cls, sep)
    question = model.prepare(PIXELS, "what color is the square")
    ranked = model.rank_answers(**question, answers=["yes", "a circle", "no"], k=2)
    assert ranked.ids.shape == ranked.probs.shape == (1, 2)
    assert error(ranked.probs.sum(), torch.tensor(1.0)) < 1e-6
    said = model.generate(**question, max_new_tokens=3, do_sample=False)
    assert said[0, 0] == cls and isinstance(model.decode(said)[0], str)


def test_two_images_go_with_each_text(words):
    model = opened("nlvr_trained.pth", words)
    green = Image.new("RGB", (9, 9), "green")
    inputs = model.prepare([(PIXELS, green), (green, PIXELS)], ["a circle", "no square"])
    assert inputs["pixel_values"].shape == (2, 2, 3, 64, 64) and len(inputs.geometry) == 4
    assert torch.equal(inputs["pixel_values"][0, 1], inputs["pixel_values"][1, 0])
    assert model(**inputs).shape == (2, 2)
    assert set(model.token_map(inputs).query("stack == 'vision'")["row"]) == {0, 1, 2, 3}
    for images in (PIXELS, [PIXELS], [PIXELS, green], [(PIXELS,)], []):
        with pytest.raises(ValueError, match="two images with each text"):
            model.prepare(images, "a circle")
    with pytest.raises(ValueError, match="2 pairs of images do not match 3 texts"):
        model.prepare([(PIXELS, green)] * 2, ["a", "a", "a"])


# --- answers


def test_ranking_by_hand():
    """Scores from one plain pass per question and answer, with and without the doubled word."""
    model, given = built(VQA), VQA.inputs(padded=True)
    question = {k: v for k, v in given.items() if "decoder" not in k}
    answers = torch.tensor([[35, 4, 2, 0], [35, 9, 7, 2], [35, 5, 2, 0], [35, 4, 6, 2]])
    scores = torch.zeros(3, 4, dtype=torch.float64)
    for row in range(3):
        one = {k: v[row : row + 1] for k, v in question.items()}
        for index, answer in enumerate(answers):
            ids = answer[answer != 0][None]
            logits = model(**one, decoder_input_ids=ids).log_softmax(-1)
            scores[row, index] = logits[0, :-1].gather(1, ids[0, 1:, None]).sum()
    first = model(**question)[:, 0].log_softmax(-1)[:, answers[:, 1]]
    for double, expected in ((False, scores), (True, scores + first)):
        ranked = model.rank_answers(**question, answer_ids=answers, double_first=double)
        probs = expected.softmax(-1)
        assert error(ranked.probs, probs.gather(1, ranked.ids)) < 1e-10
        assert (ranked.probs.diff() <= 0).all() and (ranked.ids.sort(1).values.diff() == 1).all()
    site = "decoder.blocks.0.cross_attn.heads.1.hook_z"
    with model.hooks([(site, lambda x, hook: 0 * x)]):
        ablated = model.rank_answers(**question, answer_ids=answers)
    assert error(ablated.probs, ranked.probs) > 1e-4
    hidden = torch.ones_like(answers)
    hidden[:, 2:] = 0
    short = model.rank_answers(**question, answer_ids=answers, answer_mask=hidden)
    twice = 2 * first  # the first word's, which counts twice, is all that is left
    assert error(short.probs, twice.softmax(-1).gather(1, short.ids)) < 1e-10
    for wrong, says in (
        ({}, "either as answers= or as answer_ids="),
        ({"answer_ids": answers[:, :1]}, "answer_ids is [[]4, 1[]]"),
        ({"answer_ids": answers[:0]}, "at least one answer"),
        ({"answers": ["yes"], "answer_mask": answers}, "either as answers= or as answer_ids="),
        ({"answer_ids": answers, "k": 0}, "k is at least 1"),
        ({"answer_ids": answers + 40}, "outside of the vocabulary"),
    ):
        with pytest.raises(ValueError, match=says):
            model.rank_answers(**question, **wrong)
    with pytest.raises(ValueError, match="rank_answers needs a vqa checkpoint"):
        built(ITM).rank_answers(**ITM.inputs(), answer_ids=answers)


def test_unlikely_answers_are_ranked_too():
    """Probabilities below the smallest float16 are no zeros: scores are of logarithms."""
    model, given = VQA.model(torch.float32), VQA.inputs(dtype=torch.float32)
    model.unembed.ln.weight.mul_(60)
    question = {k: v for k, v in given.items() if "decoder" not in k}
    answers = torch.tensor([[35, number, 2] for number in (4, 9, 5, 20)])
    wide = model.rank_answers(**question, answer_ids=answers)
    first = model(**question)[:, 0].softmax(-1)[:, answers[:, 1]]
    assert first.min() < 1e-20
    half = model.half().rank_answers(
        **question | {"pixel_values": question["pixel_values"].half()}, answer_ids=answers
    )
    assert not wide.probs.isnan().any() and not half.probs.isnan().any()


def test_generation_is_the_greedy_choice_of_plain_passes():
    model, given = built(VQA), VQA.inputs(padded=True)
    question = {k: v for k, v in given.items() if "decoder" not in k}
    said = model.generate(**question, max_new_tokens=4, do_sample=False)
    ids = torch.full((3, 1), model.cfg.bos_token_id)
    for _ in range(said.shape[1] - 1):
        new = model(**question, decoder_input_ids=ids)[:, -1].argmax(-1, keepdim=True)
        ended = (ids[:, 1:] == model.cfg.sep_token_id).any(1, keepdim=True)
        ids = torch.cat([ids, new.masked_fill(ended, model.cfg.pad_token_id)], 1)
    assert torch.equal(said, ids)


# --- files


def altered(tmp_path, file, change, wrap=True):
    raw = torch.load(HERE / file, weights_only=True)
    state = dict(raw.get("model", raw))
    change(state)
    torch.save({"model": state} if wrap else state, tmp_path / "altered.pth")
    return tmp_path / "altered.pth"


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (
            "retrieval_released_flat.pth",
            lambda s: s.pop("text_encoder.embeddings.token_type_embeddings.weight"),
            "trained by LAVIS",
        ),
        (
            "ve_trained.pth",
            lambda s: s.update({"cls_head.2.weight": torch.zeros(5, 48)}),
            "5 classes apart; visual entailment has 3 and NLVR 2",
        ),
        (
            "retrieval_released_flat.pth",
            lambda s: s.update({"ta_head.weight": torch.zeros(3, 48)}),
            "text-assignment pre-training",
        ),
        (
            "nlvr_trained.pth",
            lambda s: s["text_encoder.encoder.layer.7.crossattention.self.key.weight"].add_(1),
            "layer.7.crossattention.self.key.weight' is tied to",
        ),
        (
            "retrieval_released_flat.pth",
            lambda s: s.pop("itm_head.weight") is s.pop("itm_head.bias"),
            "no task of ALBEF",
        ),
        (
            "ve_trained.pth",
            lambda s: s.pop("visual_encoder.pos_embed"),
            "missing: 'visual_encoder.pos_embed' is in every ALBEF",
        ),
        ("ve_trained.pth", lambda s: s.update(extra=torch.zeros(1)), "left over: 'extra'"),
        (
            "ve_trained.pth",
            lambda s: s.update(
                {
                    "text_encoder.encoder.layer.0.crossattention.self0.key.bias": 0
                    * s["cls_head.0.bias"]
                }
            ),
            "family of HookedBLIP",
        ),
    ],
)
def test_files_that_are_refused(tmp_path, golden_words, file, change, says):
    with pytest.raises(ConversionError, match=says):
        open_model(tmp_path, altered(tmp_path, file, change).name, golden_words)


def test_tasks_are_asked_for(golden_words):
    with pytest.raises(ConversionError, match="pass task= one of itm, pretrain"):
        open_model(HERE, "pretrain.pth", golden_words)
    with pytest.raises(ConversionError, match="task='vqa', but the tensors are those of ve"):
        open_model(HERE, "ve_trained.pth", golden_words, "vqa")
    with pytest.raises(ConversionError, match="HookedALBEF, which opens it; HookedBLIP does not"):
        HookedBLIP.from_pretrained(HERE / "ve_trained.pth", processor=golden_words)
    with pytest.raises(ConversionError, match="HookedBLIP, which opens it; HookedALBEF does not"):
        HookedALBEF.from_hf(BLIP[0].pair()[0])
    with pytest.raises(ConversionError, match=r"n_heads"):
        HookedALBEF.from_pretrained(HERE / "ve_trained.pth", processor=golden_words)
    with pytest.raises(ConversionError, match=r"\['decoder'\]; the stacks of task 've' are"):
        HookedALBEF.from_pretrained(HERE / "ve_trained.pth", config={"decoder": {"n_heads": 4}})


def test_a_file_without_projections_has_no_similarity(tmp_path, golden_words):
    def change(state):
        for name in (
            "vision_proj.weight",
            "vision_proj.bias",
            "text_proj.weight",
            "text_proj.bias",
        ):
            del state[name]
        del state["temp"]

    file = altered(tmp_path, "retrieval_released_flat.pth", change, wrap=False)
    model = open_model(tmp_path, file.name, golden_words)
    whole = open_model(HERE, "retrieval_released_flat.pth", golden_words)
    x = inputs(HERE, torch.float64)
    given = {"pixel_values": x["pixel_values_hi"], "input_ids": x["input_ids"]}
    assert torch.equal(model(**given), whole(**given))
    with pytest.raises(ValueError, match="does not hold; open one that was trained with them"):
        model.similarity(**given)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_file_becomes_a_folder(tmp_path, golden_words, momentum):
    """Converted on the command line at another resolution; the second load needs no pickle."""

    def change(state):
        for name in list(state) if momentum else ():
            top, _, rest = name.partition(".")
            if top in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
                state[f"{top}_m.{rest}"] = state[name] + 1
        state["queue_ptr_img"] = state["queue_ptr_txt"] = torch.zeros(1).long()  # AMC's

    file, out = altered(tmp_path, "pretrain.pth", change), tmp_path / "out"
    command = [str(file), str(out), "--task", "itm", "--processor", str(golden_words)]
    command += ["--image-size", "96", "--heads", "vision=4", "--heads", "text=4"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "HookedALBEF, task itm, in the layout of hooked_vlm alone" in done.output
    direct = open_model(HERE, "pretrain.pth", golden_words, "itm", 96, torch.float32)
    model = HookedALBEF.from_pretrained(out)
    assert model.cfg == direct.cfg
    for name, parameter in direct.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    names = set(load_file(out / "model.safetensors"))
    original = set(torch.load(HERE / "pretrain.pth", weights_only=True)["model"])
    assert {name.replace("text_encoder.", "text_encoder.bert.") for name in names} - {
        "temp"
    } <= original | {"temp"}
    assert model.prepare(PIXELS, "w1 w2")["input_ids"].tolist() == [[1, 6, 7]]


def test_the_position_table_is_interpolated_as_in_the_original(golden_words):
    """`interpolate_pos_embed`, written out: the class token's row stays, the grid is resized."""
    raw = torch.load(HERE / "pretrain.pth", weights_only=True)["model"]["visual_encoder.pos_embed"]
    grid = raw[:, 1:].reshape(-1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat((raw[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
    model = open_model(HERE, "pretrain.pth", golden_words, "itm", 96, torch.float32)
    assert torch.equal(model.vision.pos_embed, expected)
