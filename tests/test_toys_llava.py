"""The packaged LLaVA is as good as its card says, in transformers' class and in ours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from typer.testing import CliRunner

from hooked_vlm import HookedLlava, HookedVLM, toys
from hooked_vlm import patching as P
from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.data import shapes, shapes_pairs
from hooked_vlm.toys import card, conversations, train, train_llava
from hooked_vlm.toys.evaluate import evaluate
from hooked_vlm.toys.evaluate_llava import answered, draw
from hooked_vlm.toys.llava_tokenizer import build_llava_processor

NAME = "toy-llava"
FOLDER = toys.path(NAME)
FORMS = {
    "color": ("open", "two options", "yes", "no"),
    "shape": ("open", "two options", "yes", "no"),
    "relation": ("open", "two options", "yes", "no"),
}
KINDS = {f"{what}, {form}" for what, forms in FORMS.items() for form in forms} | {"description"}
QUESTION = "What color is the circle?"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ours() -> HookedLlava:
    model = HookedVLM.from_pretrained(NAME)
    assert isinstance(model, HookedLlava)
    return model


@pytest.fixture(scope="module")
def theirs() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(FOLDER, backend="pil")


# --- the folder


def test_the_toy_is_small_and_complete() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6_000_000
    files = {file.name for file in FOLDER.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert {"processor_config.json", "preprocessor_config.json", "README.md", "card.json"} <= files


def test_the_card_holds_what_was_asked_for() -> None:
    known = card.read(FOLDER)
    assert known.name == NAME
    assert known.accuracy >= 0.95 and set(known.kinds) == KINDS
    assert min(known.kinds.values()) >= 0.95
    assert known.accuracy == pytest.approx(np.mean(list(known.kinds.values())), abs=1e-4)
    assert known.seconds <= 20 * 60
    assert known.n_scenes >= 2000
    text = (FOLDER / "README.md").read_text()
    for rate in (known.accuracy, *known.kinds.values()):
        assert f"{rate:.2%}" in text


def test_the_toy_is_right_on_fresh_held_out_scenes() -> None:
    """200 scenes of a rate of 99 % scatter by 0.7 %; the card's 2,000 decide."""
    known = card.read(FOLDER)
    report = evaluate(FOLDER, n=200, seed=4321)
    assert report.accuracy >= known.accuracy - 0.01, report
    for kind, rate in report.kinds.items():
        assert rate >= known.kinds[kind] - 0.03, kind


def test_the_last_logits_say_the_answer(ours: HookedLlava) -> None:
    """One pass of `HookedLlava` for each kind of question, in padded batches."""
    rng, right = np.random.default_rng(0), defaultdict(list)
    for scene in shapes.scenes(60, seed=99, split="held_out"):
        asked = draw(scene, rng)
        del asked["description"]  # of several words, either shape first
        inputs = ours.prepare(scene.image(), [text for text, _ in asked.values()])
        assert len(inputs["pixel_values"]) == 1 and not inputs["attention_mask"].all()
        said = ours(**inputs)[:, -1].argmax(-1)
        for kind, (_, answer), token in zip(asked, asked.values(), said, strict=True):
            right[kind].append(int(token) == ours.to_single_token(answer))
    assert set(right) == KINDS - {"description"}
    assert np.mean(list(right.values())) >= 0.97
    assert min(np.mean(verdicts) for verdicts in right.values()) >= 0.9


def test_logits_are_those_of_transformers(
    ours: HookedLlava, theirs: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    """Of a padded batch, inputs made by either; and of each prompt alone."""
    scenes = shapes.scenes(3, seed=3)
    images = [scene.image(96) for scene in scenes]
    questions = [QUESTION, "Is the red square left of the circle?", "What is it?"]
    prompts = [conversations.prompt(processor, text) for text in questions]
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    prepared = ours.prepare(images, questions)
    assert inputs.keys() == prepared.keys()
    assert all(torch.equal(inputs[key], prepared[key]) for key in inputs)
    visible = inputs["attention_mask"].bool()
    assert not visible[:, 0].all() and visible[:, -1].all()  # padded on the left
    with torch.inference_mode():
        expected = theirs(**inputs).logits
    found = ours(**prepared)
    torch.testing.assert_close(found[visible], expected[visible], rtol=1e-4, atol=1e-4)
    for row, (image, question) in enumerate(zip(images, questions, strict=True)):
        alone = ours(**ours.prepare(image, question))[0]
        torch.testing.assert_close(found[row, -len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_the_image_encoder_is_the_toy_clip(theirs: LlavaForConditionalGeneration) -> None:
    """All of it, bit for bit, the block included that is not read."""
    tower = theirs.model.vision_tower.state_dict()
    clip = load_file(toys.path("toy-clip") / "model.safetensors")
    prefix = "vision_model."
    assert {key.removeprefix(prefix) for key in clip if key.startswith(prefix)} == set(tower)
    assert all(torch.equal(clip[prefix + key], value) for key, value in tower.items())


def test_the_sizes_are_those_of_the_configuration(ours: HookedLlava) -> None:
    cfg = ours.cfg
    assert (cfg.n_image_tokens, cfg.feature_strategy, cfg.vision.n_unread) == (36, "default", 1)
    assert (cfg.text.n_heads, cfg.text.n_key_value_heads) == (4, 2)
    inputs = ours.prepare(shapes.scenes(1, seed=0)[0].image(), QUESTION)
    _, cache = ours.run_with_cache(**inputs, names_filter="text.blocks.*.attn.hook_*")
    length = inputs["input_ids"].shape[1]
    assert cache["text.blocks.3.attn.hook_k"].shape == (1, length, 2, 16)
    assert cache["text.blocks.3.attn.hook_pattern"].shape == (1, 4, length, length)


def test_an_answer_ends_and_a_batch_says_what_its_prompts_say(
    theirs: LlavaForConditionalGeneration, processor: LlavaProcessor
) -> None:
    assert theirs.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    scene = shapes.scenes(1, seed=7, split="held_out")[0]
    kind, other = scene.first.kind, scene.second.kind
    questions = [
        f"What color is the {kind}?",
        f"Where is the {kind} relative to the {other}?",
        conversations.DESCRIBE,
    ]
    with torch.inference_mode():
        said = answered(theirs, processor, [scene.image()] * 3, questions)
        alone = [answered(theirs, processor, [scene.image()], [text])[0] for text in questions]
        inputs = processor(
            images=scene.image(),
            text=conversations.prompt(processor, questions[0]),
            return_tensors="pt",
        )
        ids = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert said == alone
    assert said[:2] == [scene.first.color, scene.relation.removesuffix(" of")]
    assert said[2] in scene.captions()
    color = processor.tokenizer.convert_tokens_to_ids(f"▁{scene.first.color}")
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert new == [color, processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_it_writes_what_transformers_writes(
    ours: HookedLlava, theirs: LlavaForConditionalGeneration, how: dict[str, int]
) -> None:
    """In a batch that is padded on the left; and from a prefix that keeps the image."""
    scene = shapes.scenes(1, seed=5, split="held_out")[0]
    questions = [conversations.DESCRIBE, *(question.text for question in scene.questions())]
    inputs = ours.prepare(scene.image(), questions)
    images = inputs["pixel_values"].expand(len(questions), -1, -1, -1)
    expected = theirs.generate(
        **{**inputs, "pixel_values": images}, max_new_tokens=12, do_sample=False, **how
    )
    ids = ours.generate(**inputs, max_new_tokens=12, **how)
    assert ids.tolist() == expected.tolist()
    asked = ours.prepare(scene.image(), questions[1])
    behind = int((asked["input_ids"][0] == ours.cfg.image_token_id).nonzero()[-1]) + 1
    first = {name: asked[name][:, :behind] for name in ("input_ids", "attention_mask")}
    prefix = ours.prefill(asked["pixel_values"], **first)
    said = ours.generate(
        input_ids=asked["input_ids"][:, behind:], prefix=prefix, max_new_tokens=12, **how
    )
    new = said[:, asked["input_ids"].shape[1] :]
    assert ours.decode(new) == ours.decode(ids[1:2, inputs["input_ids"].shape[1] :])


# --- its words


def test_special_tokens_are_where_llava_has_them(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert tokenizer.convert_ids_to_tokens(range(3, 259)) == [f"<0x{i:02X}>" for i in range(256)]
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids("<pad>") == len(tokenizer) - 2
    config = LlavaForConditionalGeneration.config_class.from_pretrained(FOLDER)
    generation = GenerationConfig.from_pretrained(FOLDER)
    assert config.image_token_index == tokenizer.image_token_id == processor.image_token_id
    for held in (config.text_config, generation):
        assert (held.bos_token_id, held.eos_token_id) == (1, 2)
        assert held.pad_token_id == tokenizer.pad_token_id
    assert config.text_config.vocab_size >= len(tokenizer)
    assert config.text_config.vocab_size % 64 == 0


def test_a_prompt_is_llavas(ours: HookedLlava, processor: LlavaProcessor) -> None:
    prompt = conversations.prompt(processor, QUESTION)
    assert prompt == f"USER: <image>\n{QUESTION} ASSISTANT:"
    inputs = ours.prepare(shapes.scenes(1, seed=0)[0].image(), QUESTION)
    pieces = ours.to_str_tokens(inputs["input_ids"][0])
    words = "What ▁color ▁is ▁the ▁circle ? ▁ASSISTANT :".split()
    assert pieces == ["<s>", "▁USER", ":", "▁", *["<image>"] * 36, "<0x0A>", *words]


def test_every_word_of_the_world_is_one_token(ours: HookedLlava) -> None:
    tokenizer = ours.tokenizer
    for scene in shapes.scenes(20, seed=0):
        asked = (*scene.questions(), *scene.yes_no_questions())
        for text in (*scene.captions(), *(question.text for question in asked)):
            words = text.replace("?", " ?").split()
            expected = ["▁" + word if word != "?" else word for word in words]
            assert tokenizer.tokenize(text) == expected
            if text.endswith("?"):
                assert tokenizer.tokenize(text.capitalize())[1:] == expected[1:]
    for question in asked:
        # The same token whether it stands alone or behind a prompt.
        answer = ours.to_single_token(question.answer)
        assert tokenizer(f"ASSISTANT: {question.answer}").input_ids[-1] == answer
        assert ours.to_single_token(f" {question.answer}") == answer


@pytest.mark.parametrize(
    "text",
    [
        "Zebras: 42 (at most)!",
        "".join(map(chr, range(32, 127))).strip(),
        "a\ttab,\nlines\r\nand  two spaces",
        "\N{SNOWMAN} \N{LATIN SMALL LETTER U WITH DIAERESIS} \N{GRINNING FACE}",
        QUESTION,
    ],
)
def test_any_text_comes_back(text: str, processor: LlavaProcessor) -> None:
    for tokenizer in (processor.tokenizer, build_llava_processor().tokenizer):
        ids = tokenizer(text).input_ids
        assert ids[0] == 1 and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_processor_loads_by_itself(processor: LlavaProcessor) -> None:
    image = shapes.scenes(1, seed=0)[0].image(96)
    prompt = conversations.prompt(processor, QUESTION)
    theirs = AutoProcessor.from_pretrained(FOLDER)(images=image, text=prompt, return_tensors="pt")
    ours = processor(images=image, text=prompt, return_tensors="pt")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_a_conversation_has_turns(processor: LlavaProcessor) -> None:
    def said(role: str, *parts: dict[str, str]) -> dict[str, object]:
        return {"role": role, "content": list(parts)}

    text = [{"type": "text", "text": one} for one in ("One?", "red", "Two?")]
    turns = [
        said("user", text[0], {"type": "image"}),
        said("assistant", text[1]),
        said("user", text[2]),
    ]
    made = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert made == "USER: <image>\nOne? ASSISTANT: red USER: Two? ASSISTANT:"


# --- what it is asked


def test_kinds_are_told_apart_and_balanced() -> None:
    for scene in shapes.scenes(30, seed=1):
        asked = conversations.by_kind(scene)
        assert set(asked) == KINDS
        assert all(questions for questions in asked.values())
        for attribute in shapes.ATTRIBUTES:
            for answer in ("yes", "no"):
                assert {said for _, said in asked[f"{attribute}, {answer}"]} == {answer}


@pytest.mark.parametrize("corrupt", ["image", "text"])
@pytest.mark.parametrize("attribute", [None, "color", "shape", "relation"])
def test_the_toy_answers_the_pairs_of_the_shapes_world(
    ours: HookedLlava, attribute: str | None, corrupt: str
) -> None:
    """Clean inputs with the answer, corrupt ones with the foil; both are single tokens."""
    pairs = shapes_pairs(30, 11, "llava", attribute, corrupt)
    right = []
    for pair in pairs:
        expected = [ours.to_single_token(pair.answer), ours.to_single_token(pair.foil)]
        assert expected[0] != expected[1]
        logits = ours(**ours.prepare_prompt(pair.images, pair.texts))
        right += (logits[:, -1].argmax(-1) == torch.tensor(expected)).tolist()
        assert len(pair.images) == (1 if corrupt == "text" else 2)
    assert np.mean(right) >= 0.9


# --- its heads

HEADS = "text.blocks.*.attn.heads.*.hook_z"


def test_ablating_strong_heads_costs_answers_and_weak_ones_do_not(ours: HookedLlava) -> None:
    """Mean ablation, over other scenes' questions of all kinds and all positions.

    A sweep sees only what its pairs vary: a head that carries what both runs share is weak in it
    and may yet be needed. So a head is as strong as in the sweep, of either direction and either
    corruption, that shows it best.
    """
    sweeps = [
        P.activation_patching(
            ours,
            shapes_pairs(30, 31, "llava", corrupt=corrupt),
            HEADS,
            metric=P.logit_diff(),
            direction=direction,
            progress=False,
        )
        for corrupt in ("image", "text")
        for direction in ("denoise", "noise")
    ]
    shares = [abs(sweep.restored).mean("pair").values.flatten() for sweep in sweeps]
    strength = np.max(shares, axis=0)
    names = [sweeps[0].sites[index].name for index in strength.argsort()]
    assert len(names) == 16

    def prepared(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        rng = np.random.default_rng(seed)
        scenes = shapes.scenes(n, seed, split="held_out")
        asked = [(scene, *one) for scene in scenes for one in list(draw(scene, rng).values())[:-1]]
        inputs = ours.prepare([scene.image() for scene, _, _ in asked], [q for _, q, _ in asked])
        return inputs, torch.tensor([ours.to_single_token(answer) for _, _, answer in asked])

    others, _ = prepared(30, 8)
    _, cache = ours.run_with_cache(**others, names_filter=names)
    visible = others["attention_mask"].bool()
    inputs, answers = prepared(30, 123)

    def right(ablated: Sequence[str] = ()) -> float:
        def write(x: Tensor, hook: HookPoint) -> Tensor:
            return cache[hook.name][visible].mean(0).expand_as(x)

        logits = ours.run_with_hooks(**inputs, fwd_hooks=[(name, write) for name in ablated])
        return 100 * (logits[:, -1].argmax(-1) == answers).float().mean().item()

    whole = right()
    assert whole > 97
    # All at once; measured on two draws of pairs and scenes: 93 points, and 3 to 4.
    assert whole - right(names[-3:]) > 70  # the three strongest of 16
    assert abs(whole - right(names[:3])) < 8  # the three weakest


# --- training


def test_training_writes_a_folder_that_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of the real script, twice: the same seed gives the same weights."""
    monkeypatch.setattr(train_llava, "N_SCENES", 80)
    for out in ("one", "two"):
        command = [NAME, "--steps=2", "--scenes=5", f"--out={tmp_path / out}", "--threads=1"]
        result = CliRunner().invoke(train.app, command)
        assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        file.name for file in FOLDER.iterdir()
    }
    assert card.read(tmp_path / "one").steps == 2


@pytest.fixture(scope="module")
def examples() -> train_llava.Examples:
    return train_llava.Examples(12, 0, build_llava_processor())


def test_tokens_point_at_the_shapes_that_they_name(examples: train_llava.Examples) -> None:
    processor = examples.processor
    asked = train_llava.Asked.about(examples, processor)
    assert asked.ids.shape[:2] == (12, sum(train_llava.KINDS.values()))
    owners = asked.owners(asked.ids.flatten(1), examples.looks).view_as(asked.ids)
    for scene, rows, which in zip(examples.scenes, asked.ids, owners, strict=True):
        tokens = processor.tokenizer.convert_ids_to_tokens(rows.flatten().tolist())
        for token, owner in zip(tokens, which.flatten().tolist(), strict=True):
            word = token.removeprefix("▁")
            named = [i for i, one in enumerate(scene.shapes) if word in (one.color, one.kind)]
            assert [owner] == (named or [2])


def test_what_is_told_is_the_answer_and_the_end(examples: train_llava.Examples) -> None:
    asked = train_llava.Asked.about(examples, examples.processor)
    known = {
        (text.lower(), answer)
        for scene in examples.scenes
        for questions in conversations.by_kind(scene).values()
        for text, answer in questions
    }
    for ids, told in zip(asked.ids.flatten(0, 1), asked.told.flatten(0, 1), strict=True):
        text = examples.processor.decode(ids[~told]).replace("<pad>", "")
        answer = examples.processor.decode(ids[told])
        assert text.startswith("\n") and text.endswith(" ASSISTANT:")
        question = text.strip().removesuffix(" ASSISTANT:").lower()
        assert answer.endswith("</s>")
        assert (question, answer.removesuffix("</s>")) in known


def test_questions_that_share_an_image_do_not_see_one_another(
    examples: train_llava.Examples, theirs: LlavaForConditionalGeneration
) -> None:
    """The packed pass of training is that of each prompt alone."""
    asked = train_llava.Asked.about(examples, examples.processor)
    scenes = torch.tensor([3, 0, 3])
    batch = asked.draw(scenes)
    n_before = len(asked.before)
    length = (batch.ids.shape[1] - n_before) // train_llava.QUESTIONS
    embed, language = theirs.get_input_embeddings(), theirs.model.language_model
    with torch.inference_mode():
        packed = language(
            inputs_embeds=embed(batch.ids),
            attention_mask=batch.visible,
            position_ids=batch.positions,
        ).last_hidden_state
        for question in range(train_llava.QUESTIONS):
            start = n_before + question * length
            own = torch.arange(start, start + length)
            ids = torch.cat([batch.ids[:, :n_before], batch.ids[:, own]], 1)
            alone = language(inputs_embeds=embed(ids)).last_hidden_state
            torch.testing.assert_close(packed[:, own], alone[:, n_before:], rtol=1e-4, atol=1e-4)
