"""Conversion tables: each reads forwards and backwards, and says what does not fit."""

import re
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    TASKS,
    assert_same,
    bert_folder,
    original,
    pth,
    reference,
    state_of,
    trained,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from hooked_vlm import HookedBLIP
from weights_conversion import ConversionError, blip, blip_hf, blip_original, convert, plan, revert
from weights_conversion.__main__ import app
from weights_conversion.rules import copy_of, ignore, rename, split

# --- the engine

WORD = st.from_regex(r"[a-z]{1,4}(\.[a-z_]{1,4}){0,2}", fullmatch=True)


@st.composite
def tables(draw):
    """A table without contradictions, and a checkpoint that it fits."""
    names = draw(st.lists(WORD, min_size=1, max_size=6, unique=True))
    ours = draw(st.permutations(names))
    rules, sources = [], {}
    for number, (theirs, our) in enumerate(zip(names, ours, strict=True)):
        layers = draw(st.lists(st.integers(0, 30), unique=True, max_size=3))
        parts = draw(st.integers(1, 3))
        middle, ends = (".{l}", [f".{layer}" for layer in layers]) if layers else ("", [""])
        targets = [f"o{number}.{our}{middle}.{part}.{{p}}" for part in range(parts)]
        source = f"t{number}.{theirs}{middle}.{{p}}"
        rules.append(rename(source, targets[0]) if parts == 1 else split(source, targets))
        for end in ends:
            for kind in draw(st.sets(st.sampled_from(["weight", "bias"]), min_size=1)):
                rows = parts * draw(st.integers(1, 3))
                name = f"t{number}.{theirs}{end}.{kind}"
                sources[name] = torch.rand(rows, 2) if kind == "weight" else torch.rand(rows)
    return rules, sources


@given(tables())
def test_a_table_reads_backwards(table):
    rules, sources = table
    shapes = {name: tuple(tensor.shape) for name, tensor in sources.items()}
    targets = {}
    for source, shape in shapes.items():
        for rule in rules:
            pattern = rule.source.replace(".", r"\.")
            pattern = pattern.replace("{l}", r"(\d+)").replace("{p}", "(weight|bias)")
            if found := re.fullmatch(pattern, source):
                for target in rule.targets:
                    for wild, value in zip(
                        re.findall(r"\{.\}", target), found.groups(), strict=True
                    ):
                        target = target.replace(wild, value)
                    targets[target] = (shape[0] // len(rule.targets), *shape[1:])
    ours = convert(sources, rules, targets)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == targets
    assert_same(revert(ours, rules), sources)
    assert_same(convert(revert(ours, rules), rules, targets), ours)


RULES = [
    rename("a.{l}.{p}", "x.{l}.{p}"),
    split("qkv.weight", ["q.weight", "k.weight"]),
    copy_of("tied.weight", "a.0.weight"),
    rename("again.weight", "x.0.weight"),
    ignore("*_queue", because="training"),
]
SOURCES = {"a.0.weight": (2, 3), "qkv.weight": (4, 3), "image_queue": (9,)}
TARGETS = {"x.0.weight": (2, 3), "q.weight": (2, 3), "k.weight": (2, 3)}


def test_a_plan_covers_every_tensor_once():
    steps = plan(SOURCES, RULES, TARGETS)
    assert [(s.source, s.targets) for s in steps] == [
        ("a.0.weight", ("x.0.weight",)),
        ("qkv.weight", ("q.weight", "k.weight")),
    ]


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        (SOURCES | {"b": (1,)}, r"left over: 'b' \[1\]"),
        (SOURCES | {"a.1.weight": (2, 3)}, "left over: 'a.1.weight' would fill 'x.1.weight'"),
        ({"a.0.weight": (2, 3)}, "missing: nothing fills 'q.weight'"),
        (
            SOURCES | {"again.weight": (2, 3)},
            "'x.0.weight' is filled by 'a.0.weight' and by 'again",
        ),
        (
            SOURCES | {"a.0.weight": (3, 2)},
            r"wrong shape: 'a.0.weight' is \[3, 2\].*needs \[2, 3\]",
        ),
        (SOURCES | {"qkv.weight": (5, 3)}, r"\[5, 3\].*from each of its 2 parts"),
        (SOURCES | {"qkv.weight": ()}, r"wrong shape: 'qkv.weight' is \[\]"),
        (SOURCES | {"tied.weight": (9, 3)}, "'tied.weight' is tied to 'a.0.weight'"),
    ],
)
def test_what_does_not_fit_is_named(sources, says):
    with pytest.raises(ConversionError, match=says):
        plan(sources, RULES, TARGETS)


def test_a_copy_must_be_equal_or_stand_alone():
    tensors = {"a.0.weight": torch.rand(2, 3), "qkv.weight": torch.rand(4, 3)}
    tied = tensors | {"tied.weight": tensors["a.0.weight"].clone()}
    assert_same(convert(tied, RULES, TARGETS), convert(tensors, RULES, TARGETS))
    alone = {name: tensor for name, tensor in tied.items() if name != "a.0.weight"}
    assert_same(convert(alone, RULES, TARGETS), convert(tensors, RULES, TARGETS))
    tied["tied.weight"] += 1
    with pytest.raises(ConversionError, match="holds other numbers"):
        convert(tied, RULES, TARGETS)


def test_what_cannot_be_written_is_named():
    with pytest.raises(ConversionError, match="no rule writes 'nobody'"):
        revert({"nobody": torch.zeros(1)}, RULES)
    with pytest.raises(ConversionError, match=r"missing: 'k.weight'"):
        revert({"q.weight": torch.zeros(2, 3)}, RULES)


# --- BLIP's tables


@pytest.mark.parametrize("task", TASKS)
def test_both_layouts_give_the_same_and_go_back(task):
    theirs = reference(task).state_dict()
    model = HookedBLIP.from_hf(reference(task))
    ours, shapes = state_of(model), blip.shapes(model.cfg)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes
    assert_same(convert(theirs, blip_hf.RULES[task], shapes), ours)
    back = revert(ours, blip_hf.RULES[task])
    assert set(theirs) - set(back) <= {  # tied, and never written
        "text_decoder.cls.predictions.decoder.weight",
        "text_decoder.cls.predictions.decoder.bias",
    }
    assert_same(back, {name: theirs[name] for name in back})

    released = original(theirs)
    assert_same(convert(trained(released), blip_original.RULES[task], shapes), ours)
    back = revert(ours, blip_original.RULES[task])
    assert_same(back, {name: released[name] for name in back})
    assert all(
        "position_ids" in n or "predictions.decoder." in n for n in set(released) - set(back)
    )


def test_every_line_of_the_tables_is_used():
    for rules, layout in ((blip_hf.RULES, dict), (blip_original.RULES, original)):
        for task in TASKS:
            names = layout(reference(task).state_dict())
            for rule in rules[task]:
                if rule.targets:
                    pattern = re.escape(rule.source).replace(r"\{l\}", r"\d+")
                    pattern = pattern.replace(r"\{p\}", "(weight|bias)")
                    assert any(re.fullmatch(pattern, name) for name in names), rule


# --- the command


def test_help_is_quick():
    script = "import sys, weights_conversion.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.fixture
def vocabulary(tmp_path):
    return str(bert_folder(tmp_path / "bert"))


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("task", TASKS)
def test_the_command_writes_what_transformers_reads(task, tmp_path, vocabulary):
    theirs = reference(task, eps=1e-6)
    file = pth(tmp_path / "model.pth", trained(original(theirs.state_dict())))
    out = tmp_path / "deep" / "out"
    result = command(file, out, "--processor", vocabulary, "--heads", "vision=2")
    assert result.exit_code == 0, result.output
    assert "layout of transformers" in result.output
    read = type(theirs).from_pretrained(out)
    assert_same(read.state_dict(), theirs.state_dict())
    for part in ("text_config", "vision_config"):
        expected, got = getattr(theirs.config, part), getattr(read.config, part)
        for field in ("num_attention_heads", "layer_norm_eps", "bos_token_id", "sep_token_id"):
            assert getattr(got, field, None) == getattr(expected, field, None), field
    ours = HookedBLIP.from_pretrained(out)
    assert ours.task == task
    assert ours.to_single_token("[ENC]") == read.config.text_config.vocab_size - 1


def test_the_command_writes_our_layout_where_transformers_has_none(tmp_path, vocabulary):
    # As in the large VQA: the image is of another width than the question and the answer.
    state, image = (original(reference(task).state_dict()) for task in ("vqa", "itm"))
    wide = {
        name: torch.randn(128, 64)
        if re.search(r"text_enc.*cross.*(key|value)\.w", name)
        else tensor
        for name, tensor in state.items()
        if not name.startswith("visual_encoder")
    }
    wide |= {name: tensor for name, tensor in image.items() if name.startswith("visual_encoder")}
    file = pth(tmp_path / "model_vqa.pth", wide)
    result = command(file, tmp_path / "out", "--processor", vocabulary)
    assert result.exit_code == 0, result.output
    assert "hooked_vlm alone" in result.output
    ours = HookedBLIP.from_pretrained(tmp_path / "out")
    assert (ours.cfg.text.d_source, ours.cfg.decoder.d_source) == (64, 128)
    assert_same(state_of(ours), load_file(tmp_path / "out" / "model.safetensors"))
    direct = HookedBLIP.from_pretrained(file, processor=vocabulary)
    assert direct.cfg == ours.cfg
    assert_same(state_of(ours), state_of(direct))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processor", "nowhere/to-be-found"], "'nowhere/to-be-found' could not be had"),
        (["--task", "vqa"], "task='vqa', but the tensors are those of itm"),
        (["--heads", "decoder=2"], "names ['decoder']"),
        (["--heads", "text"], "'text' is not STACK=NUMBER"),
        (["--heads", "text=3"], "d_model=128 is not a multiple of n_heads=3"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(arguments, says, tmp_path):
    file = pth(tmp_path / "model.pth", original(reference("itm").state_dict()))
    result = command(file, tmp_path / "out", *arguments)
    assert result.exit_code != 0
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())
    assert not (tmp_path / "out").exists()
    assert command(tmp_path / "absent.pth", tmp_path / "out").exit_code == 2
