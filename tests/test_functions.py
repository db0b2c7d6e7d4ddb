"""What heads do, on models that were built to do it; and numbers for maps, by hand."""

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from zoo import QUIET, toy

from hooked_vlm import patching as P
from hooked_vlm import planted
from hooked_vlm.data import semantic_image_pairs, shapes_choices
from hooked_vlm.methods.functions import head_functions
from hooked_vlm.methods.grounding import boxed, correlation, coverage, mass, pointing
from hooked_vlm.methods.looking import look, readers
from hooked_vlm.patching.places import NoSuchPlace
from hooked_vlm.planted.world import CELL, GRID, cell_of

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

N = 8
NAMES = [f"planted-{name}" for name in ("blip-distractors", "blip-outlier", "blip-cancelling")]
MEASURED = ("on_image", "mass", "lift", "correlation", "relative", "outlier", "entropy", "ablation")


@functools.cache
def scenes():
    return planted.scenes(N, 0)


@functools.cache
def asked(task):
    """Pairs about scenes, whose nouns have the role `object`, and the masks of these."""
    made = [
        replace(pair, roles={"object": scene.first.kind})
        for pair, scene in zip(planted.pairs(N, 0, task=task), scenes(), strict=True)
    ]
    masks = {pair.name: scene.first.mask() for pair, scene in zip(made, scenes(), strict=True)}
    return made, masks


@functools.cache
def told(name):
    """A planted model, its nodes by role as (layer, head), and the functions of its heads."""
    model, card = planted.load(name)
    pairs, masks = asked(model.task)
    frame = head_functions(model, pairs, masks, query="object", **QUIET)
    by = {}
    for node in (*card.nodes, *card.distractors):
        if node.name.startswith("text.") and ".heads." in node.name:
            parts = node.name.split(".")
            by[node.role] = int(parts[2]), int(parts[5])
    return model, by, frame.set_index(["layer", "head"])


# --- planted truth


def test_the_reader_detects_objects_and_its_look_alikes_do_not_matter():
    _, by, frame = told("planted-blip-distractors")
    assert {"reader", "look-alike", "loud"} <= set(by)
    for role in ("reader", "look-alike", "loud"):
        assert frame.loc[by[role], "function"] == "object detection"
    assert frame.index[frame["matters"]].tolist() == [by["reader"]]
    assert frame.loc[by["reader"], "ablation_high"] < 0
    others = frame.drop(index=[by[role] for role in ("reader", "look-alike", "loud")])
    assert (others["function"] == "").all()


def test_the_outlier_head_soaks_attention_up():
    _, by, frame = told("planted-blip-outlier")
    outlier = frame.loc[by["outlier"]]
    assert outlier["function"] == "outlier suppression" and not outlier["matters"]
    assert outlier["same_patch"] == 1 and outlier["outlier"] > 0.99
    assert frame.loc[by["reader"], "function"] == "object detection"
    assert frame.loc[by["reader"], "matters"]
    others = frame.drop(index=[by["outlier"], by["reader"]])
    assert (others["function"] == "").all() and not others["matters"].any()


def test_the_suppressor_looks_at_the_object_and_writes_against_it():
    _, by, frame = told("planted-blip-cancelling")
    suppressor, reader = frame.loc[by["suppressor"]], frame.loc[by["reader"]]
    assert (suppressor["function"], reader["function"]) == (
        "object suppression",
        "object detection",
    )
    assert suppressor["matters"] and suppressor["ablation_low"] > 0
    assert reader["matters"] and reader["ablation_high"] < 0
    assert suppressor["lift"] == pytest.approx(reader["lift"], rel=1e-4)  # they read the same
    assert frame["matters"].sum() == 2


def test_the_relay_of_a_llava():
    model, by, frame = told("planted-llava-relay")
    reader, answerer = frame.loc[by["reader"]], frame.loc[by["answerer"]]
    assert reader["function"] == "object detection" and reader["ablation_high"] < 0
    assert frame.index[frame["matters"]].tolist() == sorted([by["reader"], by["answerer"]])
    assert answerer["ablation_high"] < 0 and answerer["function"] == ""
    pairs, masks = asked("llava")
    last = head_functions(model, pairs, masks, query="last", **QUIET)
    last = last.set_index(["layer", "head"]).loc[by["answerer"]]
    assert last["on_image"] < 0.01  # it reads the noun


@pytest.mark.parametrize("name", [*NAMES, "planted-llava-relay"])
def test_numbers_of_a_reader_are_those_of_one_patch(name):
    """All of its attention lies on one patch of nine, whichever the noun names."""
    _, by, frame = told(name)
    reader = frame.loc[by["reader"]]
    near = {"on_image": 1, "outlier": 1, "entropy": 0, "correlation": 1, "lift": GRID**2}
    for key, value in near.items():
        assert reader[key] == pytest.approx(value, abs=0.01), key
    covered = [scene.first.mask().sum() / CELL**2 for scene in scenes()]
    assert reader["mass"] == pytest.approx(np.mean(covered), abs=1e-3)
    ends = reader["mass_low"], reader["mass_high"]
    assert min(covered) <= ends[0] < reader["mass"] < ends[1] <= max(covered)
    cells = Counter(cell_of(scene.first) for scene in scenes())
    assert reader["same_patch"] == cells.most_common(1)[0][1] / N
    assert frame["n"].tolist() == [N] * len(frame)
    for key in MEASURED:
        low, mean, high = (frame[f"{key}{end}"] for end in ("_low", "", "_high"))
        assert ((low <= mean + 1e-9) & (mean <= high + 1e-9)).all(), key


def test_every_number_is_that_of_patterns_read_by_plain_hooks():
    """A head's shares less the mean over all heads; with numpy's correlation and entropy."""
    model, _, frame = told("planted-blip-outlier")
    pairs, masks = asked("vqa")
    found = {key: [] for key in ("on_image", "relative", "entropy", "outlier", "correlation")}
    for pair in pairs:
        inputs = model.prepare([pair.image], [pair.text])
        _, cache = model.run_with_cache(
            **inputs, names_filter="text.blocks.*.cross_attn.hook_pattern"
        )
        tokens = model.to_str_tokens(inputs["input_ids"][0])
        noun = tokens.index(pair.roles["object"])
        rows = torch.cat(
            [
                cache[f"text.blocks.{layer}.cross_attn.hook_pattern"][0, :, noun]
                for layer in range(2)
            ]
        ).double()[:, 1:]  # [head, patch], without the class token
        cells = masks[pair.name].reshape(GRID, CELL, GRID, CELL).mean((1, 3)).ravel()
        shares = (rows / rows.sum(1, keepdim=True)).numpy()
        found["on_image"].append(rows.sum(1).numpy())
        found["entropy"].append(-(shares * np.log(np.maximum(shares, 1e-300))).sum(1))
        found["outlier"].append(shares.max(1))
        found["correlation"].append([np.corrcoef(row, cells)[0, 1] for row in shares])
        less = shares - shares.mean(0)
        found["relative"].append([np.corrcoef(row, cells)[0, 1] for row in less])
    for key, values in found.items():
        np.testing.assert_allclose(frame[key], np.mean(values, 0), rtol=0, atol=1e-5, err_msg=key)


def test_what_is_written_in_a_head_s_place():
    model, by, _ = told("planted-blip-cancelling")
    pairs, _ = asked("vqa")
    names = [
        f"text.blocks.{layer}.cross_attn.heads.{head}.hook_z"
        for layer, head in (by["suppressor"], by["reader"])
    ]
    frame = head_functions(
        model, pairs[:3], None, names, query="object", intervention=P.zero(), **QUIET
    )
    for name, ablation in zip(names, frame["ablation"], strict=True):
        gains = []
        for pair in pairs[:3]:
            inputs = model.prepare([pair.image], [pair.text])
            answer, foil = map(model.to_single_token, (pair.answer, pair.foil))
            plain = model(**inputs)[0, -1]
            cut = model.run_with_hooks(
                **inputs, fwd_hooks=[(name, lambda z, hook: torch.zeros_like(z))]
            )[0, -1]
            gains.append(float((cut[answer] - cut[foil]) - (plain[answer] - plain[foil])))
        assert ablation == pytest.approx(np.mean(gains), abs=1e-3)
    # Without masks nobody knows what lies in them.
    for key in ("mass", "lift", "correlation", "relative"):
        assert frame[[key, f"{key}_low", f"{key}_high"]].isna().all(axis=None)
    assert frame["on_image"].tolist() == pytest.approx([1, 1], abs=0.01)
    assert frame["function"].tolist() == ["", ""]
    assert not model.list_hooks()


def test_pairs_of_two_corruptions_count_once():
    model, _, frame = told("planted-blip-outlier")
    pairs, masks = asked("vqa")
    texts = [
        replace(pair, corrupt_image=None, corrupt_text=other.corrupt_text)
        for pair, other in zip(pairs, planted.pairs(N, 0, "text"), strict=True)
    ]
    both = head_functions(model, [*pairs, *texts], masks, query="object", **QUIET)
    assert both["n"].tolist() == [N] * len(both)
    expected = frame["on_image"].to_numpy()
    np.testing.assert_allclose(both["on_image"], expected, rtol=0, atol=1e-6)


def test_unnamed_pairs_count_each():
    model, _, _ = told("planted-blip-outlier")
    unnamed = [replace(pair, name="") for pair in asked("vqa")[0][:3]]
    frame = head_functions(model, unnamed, query="object", **QUIET)
    assert frame["n"].tolist() == [3] * len(frame)


def test_choices_bring_their_masks():
    """The shapes world's own masks and roles fit, of a model that was trained."""
    model, choices = toy("toy-blip-vqa"), shapes_choices(2, seed=0, attribute="color")
    pairs, _ = semantic_image_pairs(choices)
    frame = head_functions(model, pairs, {one.name: one.mask for one in choices}, **QUIET)
    text = model.stacks["text"].cfg
    assert len(frame) == text.n_layers * text.n_heads and set(frame["stack"]) == {"text"}
    assert frame[["mass", "lift", "ablation"]].notna().all(axis=None)
    assert frame["mass"].between(0, 1).all() and frame["outlier"].between(1 / 36, 1).all()


# --- what is refused


def test_heads_and_places_that_are_not_there():
    model, _, _ = told("planted-blip-outlier")
    pairs, masks = asked("vqa")
    with pytest.raises(KeyError, match=r"no hook 'text\.blocks\.9"):
        heads = "text.blocks.9.cross_attn.heads.0.hook_z"
        head_functions(model, pairs, masks, heads, query="object", **QUIET)
    for heads in (
        "text.blocks.*.attn.heads.0.hook_z",
        "decoder.blocks.0.cross_attn.heads.0.hook_z",
    ):
        with pytest.raises(ValueError, match="is no head's hook_z that sees the image"):
            head_functions(model, pairs, masks, heads, query="object", **QUIET)
    with pytest.raises(ValueError, match="no positions of role 'verb'"):
        head_functions(model, pairs, masks, query="verb", **QUIET)
    assert not model.list_hooks()


def test_no_pairs_are_refused():
    with pytest.raises(ValueError, match="no pairs"):
        head_functions(told("planted-blip-outlier")[0], [], query="object", **QUIET)


def test_masks_that_do_not_fit_are_refused():
    model, pairs, masks = told("planted-blip-outlier")[0], *asked("vqa")
    name = pairs[0].name
    with pytest.raises(ValueError, match=rf"{name}.*mask.*24"):
        masks = {name: masks[name][:24, :24]}
        head_functions(model, pairs[:2], masks, query="object", **QUIET)


def test_masks_of_which_none_is_a_pair_s_are_refused():
    model, pairs, masks = told("planted-blip-outlier")[0], *asked("vqa")
    with pytest.raises(ValueError, match="mask"):
        other = {"another": masks[pairs[0].name]}
        head_functions(model, pairs[:2], other, query="object", **QUIET)


# --- looking


def test_looks_are_the_patterns_at_patches():
    model, _ = planted.load("planted-blip-reader")
    pair, scene = asked("vqa")[0][0], scenes()[0]
    inputs = model.prepare([pair.image], [pair.text])
    name = "text.blocks.1.cross_attn.hook_pattern"
    seen = look(model, inputs, [name], "object", pair.roles)
    _, cache = model.run_with_cache(**inputs, names_filter=name)
    noun = model.to_str_tokens(inputs["input_ids"][0]).index(scene.first.kind)
    torch.testing.assert_close(seen.patterns[name], cache[name][0, :, [noun], 1:])
    assert seen.keys[name] == 1 + GRID**2
    boxes = seen.boxes[name]
    at = boxes.iloc[int(seen.patterns[name].sum((0, 1)).argmax())]
    x, y = scene.first.center
    assert at["left"] < x < at["right"] and at["top"] < y < at["bottom"]
    assert boxes["left"].tolist() == [CELL * column for column in range(GRID)] * GRID
    assert ((boxes["right"] - boxes["left"]) == CELL).all()


def test_queries_of_a_llava_stand_behind_the_image():
    model, _ = planted.load("planted-llava-relay")
    pair = asked("llava")[0][0]
    inputs = model.prepare([pair.image], [pair.text])
    seen = look(model, inputs)
    ids = inputs["input_ids"][0].tolist()
    image = [at for at, one in enumerate(ids) if one == model.cfg.image_token_id]
    assert list(seen.patterns) == readers(model)
    for pattern in seen.patterns.values():
        assert pattern.shape == (4, len(ids) - 1 - image[-1], len(image))
        assert (pattern.sum(-1) <= 1 + 1e-6).all() and (pattern >= 0).all()
    assert set(seen.keys.values()) == {len(ids)}


def test_an_answer_decoder_sees_no_image():
    model, _ = planted.load("planted-blip-reader")
    assert {name.split(".")[0] for name in readers(model)} == {"text"}
    pair = asked("vqa")[0][0]
    inputs = model.prepare([pair.image], [pair.text])
    assert not look(model, inputs, ["decoder.blocks.0.cross_attn.hook_pattern"]).patterns
    with pytest.raises(NoSuchPlace, match="no positions of role 'object'"):
        look(model, inputs, queries="object")


# --- maps and masks, by hand


def test_mass_by_hand():
    values = [[1.0, 2.0], [3.0, 4.0]]
    assert mass(values, [[1, 0], [0, 0.5]]) == pytest.approx((1 + 2) / 10)
    several = np.array([values, [[0, 0], [0, 8]], [[0, 0], [0, 0]]])
    shares = mass(several, np.array([[True, False], [False, False]]))
    np.testing.assert_allclose(shares, [0.1, 0, np.nan])
    each = np.array([np.eye(2), np.ones((2, 2)), np.ones((2, 2))])
    np.testing.assert_allclose(mass(several, each), [0.5, 1, np.nan])
    with pytest.raises(ValueError, match="has no negative numbers"):
        mass([[1.0, -1e-9]], [[1, 1]])


def test_pointing_by_hand():
    values = [[5.0, 2.0], [5.0, 1.0]]
    assert pointing(values, [[1, 0], [1, 0]])
    assert not pointing(values, [[1, 1], [0, 0]])  # as large outside: a tie is a miss
    assert not pointing(values, [[0, 1], [0, 1]])
    assert pointing(values, [[0.5, 0], [0.5, 0]]) and not pointing(values, [[0.5, 0], [0.4, 0]])
    assert pointing(values, [[1, 1], [1, 1]]) and not pointing(values, [[0, 0], [0, 0]])
    near = [[10.0, 9.5], [0.0, 0.0]]
    assert pointing(near, [[1, 0], [0, 0]]) and pointing(near, [[1, 0], [0, 0]], 0.04)
    assert not pointing(near, [[1, 0], [0, 0]], 0.05)  # 9.5 counts as equal
    below = [[-10.0, -10.4], [-20.0, -20.0]]
    assert pointing(below, [[1, 0], [0, 0]]) and not pointing(below, [[1, 0], [0, 0]], 0.04)
    assert pointing(np.array([values, near]), [[1, 0], [1, 0]]).tolist() == [True, True]
    assert not pointing(np.ones((3, 3)), np.eye(3))


def test_correlation_by_hand():
    values = [[0.0, 1.0], [2.0, 3.0]]
    # Deviations -1.5 -.5 .5 1.5 and -.5 -.5 .5 .5: 2 over the root of 5 times 1.
    assert correlation(values, [[0, 0], [1, 1]]) == pytest.approx(2 / 5**0.5)
    assert correlation(values, [[1, 1], [0, 0]]) == pytest.approx(-2 / 5**0.5)
    assert correlation(values, [[0, 1], [1, 0]]) == pytest.approx(0, abs=1e-12)
    ones = np.ones((2, 2))
    assert np.isnan(correlation(values, ones)) and np.isnan(correlation(ones, values))
    both = correlation(np.array([values, ones]), [[0, 0], [1, 1]])
    np.testing.assert_allclose(both, [2 / 5**0.5, np.nan])
    scaled = 7 * np.array(values) - 30
    assert correlation(scaled, [[0, 0], [1, 1]]) == pytest.approx(2 / 5**0.5)


@pytest.mark.parametrize("of", [mass, pointing, correlation])
def test_two_grids_are_refused(of):
    for shapes in (((2, 2), (2, 3)), ((4,), (4,)), ((3, 2, 2), (4,)), ((4, 4), (2, 2))):
        with pytest.raises(ValueError, match=r"are not of one grid, \[\.\.\., row, column\]"):
            of(np.ones(shapes[0]), np.ones(shapes[1]))


def boxes_of(*corners):
    """Boxes of (left, top, right, bottom)."""
    return pd.DataFrame(corners, columns=["left", "top", "right", "bottom"], dtype=float)


def test_coverage_by_hand():
    mask = np.array(
        [
            [0, 1, 1, 0],
            [0, 1, 1, 0],
            [0, 0, 0, 0],
        ],
        dtype=bool,
    )
    boxes = boxes_of(
        (0, 0, 4, 3),  # the whole image: 4 pixels of 12
        (1, 0, 3, 2),  # all of it
        (0, 0, 2, 2),  # its left half
        (0.5, 0, 2.5, 2),  # 1.5 of 2 columns
        (1.5, 1.5, 3.5, 2.5),  # 1.5 columns times half a row, of 2 times 1
        (1.25, 0.25, 1.75, 0.75),  # inside of a pixel
        (0, 2, 4, 3),  # none
        (-1, -2, 2, 2),  # 1 column times 2 rows, of 3 times 4
        (2, 1, 6, 5),  # one pixel of 16
        (9, 9, 10, 10),  # beyond
    )
    expected = [4 / 12, 1, 1 / 2, 3 / 4, 3 / 8, 1, 0, 2 / 12, 1 / 16, 0]
    np.testing.assert_allclose(coverage(mask, boxes), expected, rtol=0, atol=1e-12)


def test_coverage_counts_quarters_of_pixels():
    """Boxes at halves of pixels cover whole pixels of an image twice as large."""
    rng = np.random.default_rng(0)
    mask = rng.random((7, 5)) < 0.5
    fine = mask.repeat(2, 0).repeat(2, 1)
    rows = [sorted(rng.choice(15, 2, replace=False)) for _ in range(40)]
    columns = [sorted(rng.choice(11, 2, replace=False)) for _ in range(40)]
    expected = [fine[a:b, c:d].mean() for (a, b), (c, d) in zip(rows, columns, strict=True)]
    corners = [(c / 2, a / 2, d / 2, b / 2) for (a, b), (c, d) in zip(rows, columns, strict=True)]
    found = coverage(mask, boxes_of(*corners))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert coverage(np.ones((7, 5), dtype=bool), boxes_of((0, 0, 5, 7))).item() == 1


def test_masks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"a mask is bool \[height, width\], not bool \[2, 2, 1\]"):
        coverage(np.ones((2, 2, 1), dtype=bool), boxes_of((0, 0, 1, 1)))


def test_a_box_is_the_mask_of_its_pixels():
    mask = boxed((1.0, 0.4, 3.0, 2.5), (4, 4))  # rows 0 and 1: the middle of row 2 is its edge
    assert mask.tolist() == [[False, True, True, False]] * 2 + [[False] * 4] * 2
    with pytest.raises(ValueError, match=r"the box .* holds no pixel of an image of 4 x 4"):
        boxed((5.0, 0.0, 9.0, 2.0), (4, 4))


def test_heads_are_measured_by_boxes_too():
    model, _ = planted.load("planted-blip-distractors")
    pairs, masks = asked(model.task)
    boxes = {name: bounds(mask) for name, mask in masks.items()}
    filled = {name: boxed(boxes[name], mask.shape) for name, mask in masks.items()}
    by_box, by_mask = (
        head_functions(model, pairs, one, query="object", **QUIET) for one in (boxes, filled)
    )
    pd.testing.assert_frame_equal(by_box, by_mask)


def bounds(mask):
    """The box around a mask."""
    rows, columns = np.nonzero(mask)
    ends = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return tuple(map(float, ends))
