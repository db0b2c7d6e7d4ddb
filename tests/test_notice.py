"""NOTICE's four numbers are those of a loop with plain hooks, each at the token that it names."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from llava_processors import TEMPLATE, processor
from PIL import Image
from zoo import QUIET, SMALL_EQUAL, blip_reference, toy
from zoo_albef import NLVR, PRETRAIN, VE
from zoo_llava import LLAMA

from hooked_vlm import HookedBLIP, planted
from hooked_vlm import patching as P
from hooked_vlm.data import (
    Pair,
    semantic_image_pairs,
    shapes_choices,
    symmetric_token_replacement,
)
from hooked_vlm.methods import notice
from hooked_vlm.methods.notice import METRICS, Notice, Settings, patch
from hooked_vlm.models.sketch import measured
from hooked_vlm.patching.metrics import several
from hooked_vlm.patching.sweep import ablating, patching, results
from hooked_vlm.toys.tokenizer import build_processor

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

EVERY = Settings(clean_correct=False, corruption_effective=None)  # random weights know nothing
EXACT = 1e-10
ENCODER = "text_encoder.encoder.layer"
MODULES = {
    "mlp": "output.dense",
    "resid": "output",  # with residual and norm: what the released code calls MLP
    "attn": "attention.self",
    "cross_attn": "crossattention.self",
    "attn_heads": "attention.self",
    "cross_attn_heads": "crossattention.self",
}


@functools.cache
def blip():
    """Transformers' BLIP with random weights in float64, and ours, that read the toys' words."""
    reads = build_processor()
    reads.image_processor.size = {"height": SMALL_EQUAL.image, "width": SMALL_EQUAL.image}
    size = replace(SMALL_EQUAL, vocab=len(reads.tokenizer))
    theirs = blip_reference("vqa", size, torch.float64)
    theirs.config.text_config.bos_token_id = reads.tokenizer.bos_token_id
    return theirs, HookedBLIP.from_hf(theirs, reads)


@functools.cache
def llava():
    """The same of LLaVA."""
    theirs, ours = LLAMA.pair()
    ours.processor = processor(TEMPLATE)
    return theirs, ours


@functools.cache
def choices():
    return shapes_choices(6, seed=0, attribute="color")


@functools.cache
def pairs(corrupt, model=None):
    """Pairs of the shapes world, in both orders of the options."""
    if corrupt == "image":
        return semantic_image_pairs(choices())[0]
    return symmetric_token_replacement(choices(), blip()[1].to_str_tokens, seed=0)[0]


def asked(model, corrupt, n, **changed):
    """Pairs of a planted model, whose nouns have the role `object`."""
    made = planted.pairs(n, 0, corrupt, task=model.task)
    scenes = planted.scenes(n, 0)
    return [
        replace(pair, roles={"object": scene.first.kind}, **changed)
        for pair, scene in zip(made, scenes, strict=True)
    ]


class Loop:
    """Transformers on the rows [clean, corrupt]; at a token of a module one row takes the other's.

    Its numbers are of the row that is patched into, as the paper defines them.
    """

    def __init__(self, theirs, pair, prompt="{}", direction="denoise"):
        self.theirs = theirs
        reads = blip()[1].processor if theirs is blip()[0] else llava()[1].processor
        images = [pair.image, pair.image if pair.corrupt_image is None else pair.corrupt_image]
        texts = [prompt.format(text) for text in (pair.text, pair.corrupt_text or pair.text)]
        inputs = reads(images=images, text=texts, return_tensors="pt")
        self.inputs = inputs | {"pixel_values": inputs["pixel_values"].double()}
        self.ids = reads.tokenizer.convert_tokens_to_ids([pair.answer, pair.foil])
        self.source, self.into = (0, 1) if direction == "denoise" else (1, 0)
        rows = self.rows()
        self.clean, self.corrupt = rows
        self.begin, self.end = rows[self.into], rows[self.source]

    def rows(self):
        """Probability and logit difference of both rows."""
        if self.theirs is blip()[0]:
            begin = torch.full((2, 1), self.theirs.config.text_config.bos_token_id)
            logits = self.theirs.text_decoder(
                begin,
                encoder_hidden_states=self.theirs.text_encoder(
                    self.inputs["input_ids"],
                    attention_mask=self.inputs["attention_mask"],
                    encoder_hidden_states=self.theirs.vision_model(self.inputs["pixel_values"])[0],
                )[0],
            ).logits[:, -1]
        else:
            logits = self.theirs(**self.inputs).logits[:, -1]
        answer, foil = (logits[:, at] for at in self.ids)
        probs = logits.softmax(-1)[:, self.ids[0]]
        return torch.stack([probs, answer - foil], -1).tolist()

    def patched(self, module, position, head=None, n_heads=None, pre=False, value=None):
        """The four metrics with one token of a module's output, or input, exchanged."""

        def exchange(x):
            x = x.clone()
            new = (x if value is None else value)[self.source, position].clone()
            if head is None:
                x[self.into, position] = new
            else:
                parts = x.view(*x.shape[:2], n_heads, -1)
                parts[self.into, position, head] = new.view(n_heads, -1)[head]
            return x

        def before(module, args):
            return (exchange(args[0]), *args[1:])

        def behind(module, args, output):
            if isinstance(output, tuple):
                return (exchange(output[0]), *output[1:])
            return exchange(output)

        found = self.theirs.get_submodule(module)
        handle = (
            found.register_forward_pre_hook(before) if pre else found.register_forward_hook(behind)
        )
        try:
            prob, diff = self.rows()[self.into]
        finally:
            handle.remove()
        (prob_before, before_), (_, other) = self.begin, self.end
        gain = diff - before_
        return prob, prob - prob_before, gain, gain / (other - before_)


def numbers(table, **where):
    """The four metrics of lines, [line, metric]."""
    for column, value in where.items():
        table = table[table[column] == value]
    return table[list(METRICS)].to_numpy()


def in_text_encoder(loop, kind, layer, head, position):
    """The loop's numbers of a cell of BLIP."""
    module = f"{ENCODER}.{layer}.{MODULES[kind]}"
    return loop.patched(module, position, None if head < 0 else head, SMALL_EQUAL.text[2])


# --- against transformers and plain hooks


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("corrupt", ["image", "text"])
def test_every_number_of_every_cell_is_that_of_a_loop_over_transformers(corrupt, direction):
    theirs, ours = blip()
    pair = pairs(corrupt)[0]
    table, _ = patch(ours, [pair], replace(EVERY, direction=direction), **QUIET)
    loop = Loop(theirs, pair, direction=direction)
    n_tokens, (_, layers, heads) = loop.inputs["input_ids"].shape[1], SMALL_EQUAL.text
    sites = {kind: layers * (heads if "heads" in kind else 1) for kind in MODULES}
    assert table.groupby("kind").size().to_dict() == {k: n * n_tokens for k, n in sites.items()}
    for line in table.itertuples():
        expected = in_text_encoder(loop, line.kind, line.layer, line.head, line.position)
        found = [getattr(line, metric) for metric in METRICS]
        assert found == pytest.approx(expected, abs=EXACT), line
    ends = [loop.clean[0], loop.corrupt[0], loop.clean[1], loop.corrupt[1]]
    columns = ["clean_prob", "corrupt_prob", "clean_logit_diff", "corrupt_logit_diff"]
    assert np.abs(table[columns].to_numpy() - ends).max() < EXACT
    assert (table["modality"] == corrupt).all()
    for kind in MODULES:  # each kind does something somewhere
        assert np.abs(numbers(table, kind=kind)[:, 2]).max() > 1e-6, kind


def test_mlp_is_what_the_mlp_adds_and_not_the_stream():
    """The released code patches the layer's output where it says MLP."""
    theirs, ours = blip()
    pair = pairs("image")[0]
    table, _ = patch(ours, [pair], replace(EVERY, kinds=("mlp", "resid")), **QUIET)
    loop = Loop(theirs, pair)
    at = next(iter(table["position"][table["role"] == "answer"]))
    for layer in range(SMALL_EQUAL.text[1]):
        released = loop.patched(f"{ENCODER}.{layer}.output", at)
        (mlp,) = numbers(table, kind="mlp", layer=layer, position=at)
        (resid,) = numbers(table, kind="resid", layer=layer, position=at)
        assert resid == pytest.approx(released, abs=EXACT)
        assert abs(mlp[2] - released[2]) > 1e-4


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("corrupt", ["image", "text"])
def test_the_row_called_answer_is_that_of_the_answer_s_token(corrupt, first):
    """The released code reads the row of the token in front of it."""
    theirs, ours = blip()
    number = [one.answer_first for one in choices()].index(first)
    pair = pairs(corrupt)[number]
    table, _ = patch(ours, [pair], EVERY, **QUIET)
    words = pair.text.removesuffix("?").split()
    at = 1 + words.index(pair.answer)  # behind [CLS]
    line = table[table["role"] == "answer"]
    assert set(line["token"]) == {pair.answer} and set(line["position"]) == {at}
    foil = table[table["role"] == "foil"]
    assert set(foil["position"]) == {1 + words.index(pair.foil)}
    assert table["answer_first"].tolist() == [first] * len(table)
    loop = Loop(theirs, pair)
    (found,) = numbers(line, kind="resid", layer=0)
    assert found == pytest.approx(in_text_encoder(loop, "resid", 0, -1, at), abs=EXACT)
    assert abs(found[2] - in_text_encoder(loop, "resid", 0, -1, at - 1)[2]) > 1e-6


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        # [CLS] is this f##o##l##d##e##d o##l##d ...: no part of a word
        ("is this folded old or new?", 9),
        # [CLS] is this o##l##d##e##r o##l##d ...: nor its beginning
        ("is this older old or new?", 8),
        ("is this old or new?", 3),
    ],
)
def test_an_answer_is_a_whole_word(text, begin):
    image, other = pairs("image")[0].images
    pair = Pair(image, text, other, answer="old", foil="new")
    ready = Notice(toy("toy-blip-vqa"), EVERY).prepare(pair)
    assert list(ready.roles["answer"]) == [begin, begin + 1, begin + 2]
    assert [ready.tokens[at] for at in ready.roles["answer"]] == ["o", "##l", "##d"]
    assert [ready.tokens[at] for at in ready.roles["foil"]] == ["n", "##e", "##w"]


@pytest.mark.parametrize("word", ["folded", "older"])
def test_an_answer_is_a_whole_word_of_a_llava(word):
    image, other = pairs("image")[0].images
    pair = Pair(image, f"Is this {word} old or new?", other, answer="old", foil="new")
    ready = Notice(toy("toy-llava"), EVERY).prepare(pair)
    found = [ready.tokens[at] for at in ready.roles["answer"]]
    assert found == ["▁o", "l", "d"]
    assert ready.tokens[ready.roles["answer"][-1] + 1] == "▁or"


def test_every_line_belongs_to_its_own_pair():
    """Pairs of other lengths and words: the released code read the prompts of other rows."""
    model = blip()[1]
    mixed = semantic_image_pairs(shapes_choices(3, seed=0))[0]  # a color, a shape, a relation
    table, report = patch(model, mixed, replace(EVERY, kinds=("resid",)), **QUIET)
    assert report.kept == 3 and table["pair"].unique().tolist() == [one.name for one in mixed]
    assert len({one.text for one in mixed}) == 3
    for pair in mixed:
        own = table[table["pair"] == pair.name]
        tokens = model.to_str_tokens(pair.text)
        for layer, line in own.groupby("layer"):
            assert line["token"].tolist() == tokens, layer
            assert line["position"].tolist() == list(range(len(tokens)))
            said = {"answer": pair.answer, "foil": pair.foil, **pair.roles}
            named = line[line["role"] != ""]
            assert dict(zip(named["role"], named["token"], strict=True)) == said
        logits = model(**model.prepare([pair.image], [pair.text]))[0, -1]
        answer, foil = map(model.to_single_token, (pair.answer, pair.foil))
        assert own["clean_logit_diff"].iloc[0] == pytest.approx(
            float(logits[answer] - logits[foil])
        )


# --- LLaVA

PROMPT = "Q: <image> {} A:"
# <s> Q : <image>x4 is it red w20 ? A :
ANSWER_AT, FOIL_AT, LAST_AT = 9, 10, 13


def llava_pair(corrupt="image"):
    generator = np.random.default_rng(0)
    image, other = (
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2)
    )
    text = None if corrupt == "image" else "is it w21 w22 ?"
    given = (other if corrupt == "image" else None, text)
    return Pair(image, "is it red w20 ?", *given, answer="red", foil="w20", name="one")


def test_positions_of_llava_are_those_of_the_merged_sequence():
    """The released code lands eight tokens behind them."""
    theirs, ours = llava()
    table, _ = patch(ours, [llava_pair()], EVERY, **QUIET)
    at = {role: set(lines["position"]) for role, lines in table.groupby("role")}
    assert at == {"answer": {ANSWER_AT}, "last": {LAST_AT}}
    tokens = {role: set(lines["token"]) for role, lines in table.groupby("role")}
    assert tokens == {"answer": {"red"}, "last": {":"}}
    loop = Loop(theirs, llava_pair(), PROMPT)
    ids = loop.inputs["input_ids"][0].tolist()
    assert len(ids) == LAST_AT + 1 and ids.count(LLAMA.image_token) == 4
    assert [ids[ANSWER_AT], ids[FOIL_AT]] == loop.ids
    every, _ = patch(ours, [llava_pair()], replace(EVERY, positions="each"), **QUIET)
    assert every["position"].nunique() == len(ids)
    assert set(every["position"][every["role"] == "foil"]) == {FOIL_AT}


@pytest.mark.parametrize("corrupt", ["image", "text"])
def test_modules_of_llava_get_what_they_give(corrupt):
    """The released code writes the residual stream into the slots of MLP and attention."""
    theirs, ours = llava()
    pair = llava_pair(corrupt)
    table, _ = patch(ours, [pair], EVERY, **QUIET)
    loop = Loop(theirs, pair, PROMPT)
    n_heads = LLAMA.text[2]
    stream = theirs.model(**loop.inputs, output_hidden_states=True).hidden_states
    for line in table.itertuples():
        layer, at = f"model.language_model.layers.{line.layer}", line.position
        ways = {
            "mlp": (f"{layer}.mlp", at),
            "resid": (layer, at),
            "attn": (f"{layer}.self_attn.o_proj", at, None, None, True),
            "attn_heads": (f"{layer}.self_attn.o_proj", at, line.head, n_heads, True),
        }
        found = [getattr(line, metric) for metric in METRICS]
        assert found == pytest.approx(loop.patched(*ways[line.kind]), abs=EXACT), line
        if line.kind in ("mlp", "attn") and line.role == "last":
            module, _, *rest = (*ways[line.kind], None, None, False)[:5]
            released = loop.patched(module, at, *rest, value=stream[line.layer + 1])
            assert abs(released[2] - line.logit_diff) > 1e-3
    assert set(table["kind"]) == {"mlp", "resid", "attn", "attn_heads"}
    assert np.abs(numbers(table, role="last")[:, 2]).max() > 1e-3


# --- what follows by construction


def test_in_front_of_the_image_nothing_is_restored():
    """Self-attention of the first block reads the same text: the patched run is the corrupt one."""
    settings = replace(EVERY, kinds=("attn", "attn_heads"))
    table, _ = patch(blip()[1], pairs("image")[:2], settings, **QUIET)
    first = numbers(table, layer=0)
    assert len(first) > 20 and np.abs(first[:, 1:]).max() < 1e-13  # rounding of another batch
    assert np.abs(numbers(table, layer=1)[:, 1:]).max() > 1e-6
    before = table[table["layer"] == 0]
    assert (before["prob"] - before["corrupt_prob"]).abs().max() < 1e-13


def test_in_front_of_other_words_nothing_is_restored():
    """A LLaVA's tokens see what stands before them: up to the options both runs are the same."""
    settings = replace(EVERY, positions="each")
    table, _ = patch(llava()[1], [llava_pair("text")], settings, **QUIET)
    before = table["position"] < ANSWER_AT
    assert np.abs(numbers(table[before])[:, 1:]).max() < 1e-12
    assert np.abs(numbers(table[table["position"] == ANSWER_AT])[:, 2]).max() > 1e-4


@pytest.mark.parametrize("corrupt", ["image", "text"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_whole_stream_of_the_last_layer_is_the_other_run(corrupt, direction):
    model, pair = blip()[1], pairs(corrupt)[1]
    every = tuple(range(len(model.to_str_tokens(pair.text))))
    settings = replace(EVERY, kinds=("resid",), positions=[every], direction=direction)
    table, _ = patch(model, [pair], settings, **QUIET)
    last = table[table["layer"] == SMALL_EQUAL.text[1] - 1]
    assert last["patching_effect"].tolist() == pytest.approx([1], abs=EXACT)
    other = "clean" if direction == "denoise" else "corrupt"
    assert last["prob"].iloc[0] == pytest.approx(last[f"{other}_prob"].iloc[0], abs=EXACT)


@pytest.mark.parametrize("kind", ["attn", "cross_attn"])
def test_all_heads_together_are_the_module(kind):
    model, pair = blip()[1], pairs("text")[0]
    table, _ = patch(model, [pair], replace(EVERY, kinds=(kind,)), **QUIET)
    for layer in range(SMALL_EQUAL.text[1]):
        heads = P.together(f"text.blocks.{layer}.{kind}.heads.*.hook_z")
        result = P.activation_patching(model, pair, heads, positions="each", **QUIET)
        expected = result.restored.values.ravel()
        assert numbers(table, layer=layer)[:, 3] == pytest.approx(expected, abs=EXACT)


def test_a_pair_whose_corrupt_input_is_the_clean_one_is_refused():
    pair = pairs("image")[0]
    with pytest.raises(ValueError, match="the corrupt input is the clean one"):
        replace(pair, corrupt_image=pair.image)


# --- planted truth


@pytest.mark.parametrize("corrupt", ["image", "text"])
@pytest.mark.parametrize("name", ["planted-blip-reader", "planted-albef-reader"])
def test_both_corruptions_find_the_planted_reader_at_the_noun(name, corrupt):
    model, card = planted.load(name)
    settings = Settings(kinds=("attn_heads", "cross_attn_heads"))
    table, report = patch(model, asked(model, corrupt, 3), settings, **QUIET)
    assert report.kept == 3 and set(table["modality"]) == {corrupt}
    reader = next(node.name for node in card.nodes if node.role == "reader")
    where = ["kind", "layer", "head", "role"]
    means = table[table["role"] != ""].groupby(where)["patching_effect"].mean()
    kind, layer, head, role = means.idxmax()
    assert kind == "cross_attn_heads" and role == "object"
    assert reader == f"text.blocks.{layer}.cross_attn.heads.{head}.hook_z"
    assert means.max() == pytest.approx(1, abs=0.1)
    assert means.drop(index=means.idxmax()).abs().max() < 0.1


@pytest.mark.parametrize("corrupt", ["image", "text"])
def test_both_corruptions_find_reader_and_answerer_of_a_relay(corrupt):
    model, card = planted.load("planted-llava-relay")
    settings = Settings(kinds=("attn_heads",), positions=["object", "last"])
    table, _ = patch(model, asked(model, corrupt, 3), settings, **QUIET)
    means = table.groupby(["role", "layer", "head"])["patching_effect"].mean()
    for role, node in (("object", "reader"), ("last", "answerer")):
        layer, head = means[role].idxmax()
        name = f"text.blocks.{layer}.attn.heads.{head}.hook_z"
        assert name == next(one.name for one in card.nodes if one.role == node)
        assert means[role].max() == pytest.approx(1, abs=0.1)
        assert means[role].nlargest(2).iloc[1] < 0.1


def test_layers_of_albef_that_do_not_see_the_image_have_no_cross_attention():
    model, _ = planted.load("planted-albef-reader")
    fused = {site.layer for site in model.sites("text.blocks.*.cross_attn.hook_z")}
    table, _ = patch(model, asked(model, "image", 1), **QUIET)
    layers = table.groupby("kind")["layer"].agg(set).to_dict()
    every = set(range(model.text.cfg.n_layers))
    assert layers["cross_attn"] == layers["cross_attn_heads"] == fused < every
    assert layers["mlp"] == layers["resid"] == layers["attn"] == layers["attn_heads"] == every


# --- which pairs are kept


def test_pairs_that_say_nothing_are_counted_and_never_raise():
    model, _ = planted.load("planted-blip-reader")
    good, other = asked(model, "image", 2)
    wrong = replace(good, answer=good.foil, foil=good.answer, name="wrong")
    dull = replace(good, corrupt_image=good.image.copy(), name="dull")
    settings = Settings(kinds=("mlp",))
    table, report = patch(model, [good, wrong, dull, other], settings, on_bad="raise", **QUIET)
    assert table["pair"].unique().tolist() == [good.name, other.name]
    assert report.kept == 2
    assert report.dropped == {"not answered correctly": 1, "corruption without effect": 1}
    assert report.names["corruption without effect"] == ("pair 'dull'",)
    with pytest.raises(ValueError, match="no pair is left to be patched: kept 0 of 1 rows"):
        patch(model, [dull], settings, **QUIET)
    # A wrong answer's logit difference is below 0, and that of the corrupt run above it.
    kept = replace(settings, clean_correct=False)
    _, report = patch(model, [good, wrong], kept, **QUIET)
    assert report.dropped == {"corruption without effect": 1}
    _, report = patch(model, [good, wrong], replace(kept, corruption_effective=None), **QUIET)
    assert report.kept == 2


def test_the_least_effect_of_a_corruption():
    model, _ = planted.load("planted-blip-reader")
    (pair,) = asked(model, "text", 1)
    settings = Settings(kinds=("mlp",))
    table, _ = patch(model, [pair], settings, **QUIET)
    gap = float((table["clean_logit_diff"] - table["corrupt_logit_diff"]).iloc[0])
    assert gap > 1
    again, _ = patch(model, [pair], replace(settings, corruption_effective=gap - 0.1), **QUIET)
    assert len(again) == len(table)
    with pytest.raises(ValueError, match="corruption without effect"):
        patch(model, [pair], replace(settings, corruption_effective=gap + 0.1), **QUIET)


def test_no_effect_is_divided_by_nothing():
    model, pair = blip()[1], pairs("image")[0]
    dull = replace(pair, corrupt_image=pair.image.copy())
    table, _ = patch(model, [dull], EVERY, **QUIET)
    assert table["patching_effect"].isna().all()
    assert np.abs(table[["prob_diff", "logit_diff"]].to_numpy()).max() < 1e-12
    assert (table["clean_prob"] - table["corrupt_prob"]).abs().max() < 1e-12


BAD = {
    "unequal": (
        {"corrupt_image": None, "corrupt_text": "is this circle big or zoo?"},
        "texts of unequal length",
        "pair 'bad': .*positions do not align, the clean text has 9 tokens and the corrupt one 13",
    ),
    "no answer": ({"answer": None}, "no answer or foil", "pair 'bad': .*an answer and a foil"),
    "no foil": ({"foil": None}, "no answer or foil", "pair 'bad': .*an answer and a foil"),
    "one beginning": (
        {"answer": "zoo", "foil": "zip"},
        "answer or foil cannot be told",
        "answer and foil of pair 'bad' begin with the same token",
    ),
    "no file": ({"image": "nowhere.png"}, "image cannot be read", "pair 'bad': .*nowhere.png"),
    "both": (
        {"corrupt_text": "is this circle red or green?"},
        "both corrupt",
        "pair 'bad': image and text are both corrupt",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_by_name_or_counted(case):
    changed, reason, says = BAD[case]
    model, good = blip()[1], pairs("image")[0]
    bad = replace(good, name="bad", **changed)
    settings = replace(EVERY, kinds=("mlp",))
    with pytest.raises(ValueError, match=says):
        patch(model, [good, bad], settings, **QUIET)
    assert not model.list_hooks()
    table, report = patch(model, [bad, good], settings, on_bad="drop", **QUIET)
    assert set(table["pair"]) == {good.name}
    assert (report.kept, dict(report.dropped)) == (1, {reason: 1})
    assert report.names[reason] == ("pair 'bad'",)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    bad = replace(pairs("image")[0], corrupt_image=broken, name="bad")
    with pytest.raises(ValueError, match=r"pair 'bad': .*broken\.png"):
        patch(blip()[1], [bad], EVERY, **QUIET)


def test_a_text_that_is_too_long_is_not_counted_as_an_image():
    pair = pairs("image")[0]
    long = replace(
        pair, name="long", text="is this " + "large " * 9 + f"circle {pair.answer} or {pair.foil}?"
    )
    _, report = patch(blip()[1], [pair, long], EVERY, on_bad="drop", **QUIET)
    assert report.kept == 1
    assert not any("image" in reason for reason in report.dropped)


def test_places_that_a_text_does_not_have():
    model, pair = blip()[1], pairs("image")[0]
    for place, changed, says in (
        ("verb", {}, "no positions of role 'verb'"),
        (12, {}, "no position 12, it has 9 positions"),
        ("noun", {"roles": {"noun": "square"}}, "pair 'bad': .*'noun'"),
    ):
        bad = replace(pair, name="bad", **changed)
        settings = replace(EVERY, positions=[place])
        with pytest.raises(ValueError, match=says):
            patch(model, [bad], settings, **QUIET)
        with pytest.raises(ValueError, match="no pair is left to be patched"):
            patch(model, [bad], settings, on_bad="drop", **QUIET)
    with pytest.raises(ValueError, match="an empty list of positions"):
        patch(model, [pair], replace(EVERY, positions=[]), **QUIET)


def test_a_role_s_number_that_a_text_does_not_have():
    bad = replace(pairs("image")[0], name="bad", roles={"noun": 30})
    with pytest.raises(ValueError, match=r"pair 'bad': .*30"):
        patch(blip()[1], [bad], replace(EVERY, positions=["noun"]), **QUIET)


# --- the table


def test_columns_and_their_kinds():
    model = blip()[1]
    tasks = {"colors": pairs("image")[:1], "again": pairs("text")[:2]}
    table, report = patch(model, tasks, EVERY, **QUIET)
    assert report.kept == 3
    assert table.groupby("task")["pair"].nunique().to_dict() == {"colors": 1, "again": 2}
    words = ["task", "pair", "modality", "stack", "kind", "token", "role"]
    numbers_of = ["prob", "prob_diff", "logit_diff", "patching_effect"]
    ends = ["clean_prob", "corrupt_prob", "clean_logit_diff", "corrupt_logit_diff"]
    flags = ["clean_correct", "answer_first"]
    assert set(table) == {*words, *numbers_of, *ends, *flags, "layer", "head", "position"}
    assert tuple(numbers_of) == METRICS
    for column in words:
        assert pd.api.types.is_string_dtype(table[column]), column
    for column in ("layer", "head", "position"):
        assert table[column].dtype == np.int64, column
    for column in (*numbers_of, *ends):
        assert table[column].dtype == np.float64, column
    for column in flags:
        assert table[column].dtype == np.bool_, column
    whole = ~table["kind"].str.endswith("heads")
    assert (table["head"][whole] == -1).all() and (table["head"][~whole] >= 0).all()
    assert table.notna().all(axis=None)
    assert table.index.equals(pd.RangeIndex(len(table)))
    cell = ["task", "pair", "kind", "layer", "head", "position"]
    assert not table.duplicated(cell).any()


def test_positions_by_their_roles():
    model, pair = blip()[1], pairs("image")[0]
    words = ["[CLS]", *pair.text.removesuffix("?").split(), "?", "[SEP]"]
    settings = replace(EVERY, positions=["answer", "object", "last", 2], kinds=("mlp",))
    table, _ = patch(model, [pair], settings, **QUIET)
    noun = pair.roles["object"]
    at = [words.index(pair.answer), words.index(noun), len(words) - 1, 2]
    expected = pd.DataFrame(
        {
            "position": at * 2,
            "token": [words[one] for one in at] * 2,
            "role": ["answer", "object", "last", ""] * 2,
        }
    )
    pd.testing.assert_frame_equal(table[list(expected)], expected, check_dtype=False)
    every, _ = patch(model, [pair], replace(EVERY, kinds=("mlp",)), **QUIET)
    for line in table.itertuples():
        (found,) = numbers(every, layer=line.layer, position=line.position)
        assert [getattr(line, metric) for metric in METRICS] == pytest.approx(found, abs=EXACT)


def test_unnamed_pairs_stay_two():
    one, two = (replace(pair, name="") for pair in pairs("image")[:2])
    table, _ = patch(blip()[1], [one, two], replace(EVERY, kinds=("mlp",)), **QUIET)
    assert table["pair"].nunique() == 2


@pytest.mark.parametrize("stack", ["vision", "decoder"])
def test_positions_of_other_stacks_are_no_words_of_the_text(stack):
    """The image encoder of the toy has more positions than the question has tokens."""
    model = toy("toy-blip-vqa") if stack == "vision" else blip()[1]
    settings = replace(EVERY, stack=stack, kinds=("mlp",))
    table, _ = patch(model, pairs("image")[:1], settings, **QUIET)
    n = model.cfg.vision.n_ctx if stack == "vision" else 1
    assert table["position"].nunique() == n
    assert set(table["role"]) == {""} and not set(table["token"]) & {"[CLS]", "circle", "blue"}


def test_what_a_model_does_not_have():
    with pytest.raises(KeyError, match="'text' has no kind 'cross_attn'; it has mlp, attn, resid"):
        Notice(llava()[1], Settings(kinds=("mlp", "cross_attn")))
    with pytest.raises(KeyError, match="no stack 'decoder'; its stacks are vision, text"):
        Notice(llava()[1], Settings(stack="decoder"))
    with pytest.raises(KeyError, match="'vision' has no kind 'cross_attn_heads'"):
        notice.sites(blip()[1], ("cross_attn_heads",), "vision")


def test_batches_without_rows_are_refused_before_they_run():
    with pytest.raises(ValueError, match="max_rows is at least 1, not 0"):
        Notice(blip()[1], Settings(max_rows=0))


def test_models_that_answer_no_questions_are_refused():
    with pytest.raises(ValueError, match="NOTICE asks for one of two answers, and task 'itm'"):
        Notice(toy("toy-blip-itm"), Settings())
    with pytest.raises(ValueError, match="task 'clip' gives none"):
        Notice(toy("toy-clip"), Settings())


@pytest.mark.parametrize("member", [VE, NLVR, PRETRAIN], ids=str)
def test_albefs_that_answer_no_questions_are_refused(member):
    with pytest.raises(ValueError, match=f"NOTICE asks .*task '{member.task}'"):
        Notice(member.model(), Settings())


# --- several metrics of one sweep


def test_several_metrics_are_those_of_separate_sweeps():
    model, some = blip()[1], [pairs("image")[0], pairs("text")[1]]
    sites = "text.blocks.1.cross_attn.heads.*.hook_z"
    metrics = [P.logit_diff(), P.prob(), P.kl(), P.accuracy(), P.log_prob("red")]
    sweep, told = patching(model, some, sites, several(metrics), "each", "noise", "cls")
    found = results(sweep, told, progress=False)
    assert [one.provenance["metric"] for one in found] == [one.name for one in metrics]
    for one, metric in zip(found, metrics, strict=True):
        alone = P.activation_patching(model, some, sites, metric, "each", "noise", **QUIET)
        for part in ("data", "clean", "corrupt"):
            ours, theirs = getattr(one, part), getattr(alone, part)
            assert ours.dims == theirs.dims
            np.testing.assert_allclose(ours.values, theirs.values, rtol=0, atol=1e-12)
        assert alone.provenance == one.provenance
    both = several(metrics[:2])
    sweep, told = ablating(model, some, sites, P.zero(), both, None, "clean", "cls", None, None)
    for one, metric in zip(results(sweep, told, progress=False), metrics[:2], strict=True):
        alone = P.ablate(model, some, sites, P.zero(), metric, **QUIET)
        np.testing.assert_allclose(one.data.values, alone.data.values, rtol=0, atol=1e-12)


def test_of_several_metrics_each_pair_has_its_own_reference():
    model, some = blip()[1], pairs("image")[:2]
    metric = several([P.prob(), P.kl()])
    sweep, told = patching(model, some, "hook_image_embeds", metric, None, "noise", "cls")
    _, found = results(sweep, told, progress=False)
    for number, pair in enumerate(some):
        clean, corrupt = (
            model(**model.prepare([image], [pair.text]))[0, -1].softmax(-1) for image in pair.images
        )
        expected = float((clean * (clean / corrupt).log()).sum())
        assert expected > 1e-6
        assert found.corrupt.values[number] == pytest.approx(expected, abs=EXACT)
        assert found.data.values[number].item() == pytest.approx(expected, abs=EXACT)
        assert found.clean.values[number] == pytest.approx(0, abs=EXACT)


def test_several_metrics_read_one_token():
    model, pair = blip()[1], pairs("image")[0]
    metric = several([P.prob(), P.logit_diff(tokens="all")])
    with pytest.raises(ValueError, match="logit_diff of several metrics reads one token"):
        patching(model, pair, "text.hook_embed", metric, None, "denoise", "cls")


# --- work


def test_all_kinds_are_one_sweep():
    """As much is computed as by `activation_patching`, which `test_plan` holds to its law."""
    model, pair = blip()[1], pairs("image")[0]
    method = notice.Notice(model, EVERY)
    ready = method.prepare(pair)
    with measured() as ours:
        method.measure(ready)
    with measured() as work:
        P.activation_patching(model, pair, method.sites, positions="each", **QUIET)
    assert 0 < ours.macs <= 1.02 * work.macs
