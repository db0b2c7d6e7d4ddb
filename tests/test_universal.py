"""Universal heads by hand, against chance, and on pairs that nothing was selected on."""

import numpy as np
import pandas as pd
import pytest

from hooked_vlm.methods import statistics
from hooked_vlm.methods.effects import effects
from hooked_vlm.methods.statistics import bootstrap
from hooked_vlm.methods.universal import universal

IMAGE, TEXT = "image", "text"
AS_PUBLISHED = {"held_out": 0.0, "n_null": 0}


def table(values, metric="logit_diff", **columns):
    """A table of patches at the answer, of values by (task, modality) as [pair, head]."""
    lines = []
    for (task, modality), numbers in values.items():
        for pair, row in enumerate(np.asarray(numbers, dtype=float)):
            for head, value in enumerate(row):
                line = {"task": task, "modality": modality, "pair": f"p{pair}", "stack": TEXT}
                line |= {"kind": "cross_attn_heads", "layer": head // 2, "head": head % 2}
                line |= {"role": "answer", "logit_diff": 0.0, "prob": 0.5, metric: value}
                lines.append(line | columns)
    return pd.DataFrame(lines)


def named(found, column="universal"):
    """What the table of heads says, by (layer, head)."""
    index = zip(found.heads["layer"], found.heads["head"], strict=True)
    return dict(zip(index, found.heads[column], strict=True))


# --- by hand

# Four heads A B C D, of which each pair has one number; two pairs lie around the mean.
BY_HAND = {
    # mean 4 4 0 0: mean over heads 2, deviation 2, scores 1 1 -1 -1
    ("colors", IMAGE): [[3, 5, 1, -1], [5, 3, -1, 1]],
    # mean 3 3 0 2: mean 2, variance (1 + 1 + 4 + 0) / 4, scores .816 .816 -1.633 0
    ("shapes", IMAGE): [[2, 3, 0, 1], [4, 3, 0, 3]],
    # mean 4 0 4 0: scores 1 -1 1 -1
    ("colors", TEXT): [[4, -2, 6, 0], [4, 2, 2, 0]],
    # mean 1 -1 1 -1: the same
    ("shapes", TEXT): [[0, -1, 1, -2], [2, -1, 1, 0]],
}
A, B, C, D = (0, 0), (0, 1), (1, 0), (1, 1)
LOW = 1.5**-0.5  # 1 over the deviation of the shapes' images


def test_classes_and_scores_by_hand():
    found = universal(table(BY_HAND), k=0.8, **AS_PUBLISHED)
    assert named(found) == {A: "multimodal", B: "vision", C: "text"}
    assert named(found, "z") == pytest.approx({A: LOW, B: LOW, C: 1.0})
    assert found.heads["z"].is_monotonic_decreasing
    assert list(found.heads) == ["stack", "kind", "layer", "head", "universal", "z", "confirmed"]
    assert not found.heads["confirmed"].any() and found.null == {}
    assert found.n_pairs == {condition: (2, 0) for condition in BY_HAND}
    effects = found.effects.set_index(["task", "modality", "layer", "head"])
    assert len(effects) == 16
    assert effects["mean"]["colors", IMAGE].tolist() == [4, 4, 0, 0]
    assert effects["mean"]["shapes", TEXT].tolist() == [1, -1, 1, -1]
    assert effects["z"]["shapes", IMAGE].tolist() == pytest.approx([LOW, LOW, -2 * LOW, 0])
    assert effects["selected"]["shapes", IMAGE].tolist() == [True, True, False, False]
    assert effects[["held_out", "low", "high", "held_out_z"]].isna().all(axis=None)


@pytest.mark.parametrize(("k", "classes"), [(0.82, {C: "text"}), (1.01, {})])
def test_the_threshold_holds_in_every_condition(k, classes):
    """Above .816 neither A nor B stands out in the images of shapes; A's text alone is C's."""
    found = universal(table(BY_HAND), k=k, **AS_PUBLISHED)
    assert named(found) == classes | ({A: "text"} if classes else {})


def test_a_head_of_one_task_is_not_universal():
    only = {("colors", IMAGE): [[0, 9, 0, 0]], ("shapes", IMAGE): [[0, 0, 9, 0]]}
    found = universal(table(only), k=1.0, **AS_PUBLISHED)
    assert named(found) == {} and found.effects["selected"].sum() == 2
    alone = {condition: rows for condition, rows in only.items() if condition[0] == "colors"}
    # 9 0 0 0: mean 9 / 4, deviation 9 sqrt(3) / 4.
    assert named(universal(table(alone), k=1.0, **AS_PUBLISHED), "z") == {B: pytest.approx(3**0.5)}
    assert named(universal(table(alone), k=1.0, **AS_PUBLISHED)) == {B: "vision"}


def test_rules_by_hand():
    values = {("colors", IMAGE): [[6, 0, -8, 5], [6, 0, -8, -5]]}
    # Signed: mean 6 0 -8 0, over heads -.5, variance (42.25 + .25 + 56.25 + .25) / 4 = 24.75.
    signed = universal(table(values), rule="signed", k=1.0, **AS_PUBLISHED)
    assert named(signed, "z") == {A: pytest.approx(6.5 / 24.75**0.5)}
    # Absolute: 6 0 8 5, over heads 4.75, variance (1.5625 + 22.5625 + 10.5625 + .0625) / 4.
    absolute = universal(table(values), rule="absolute", k=1.0, **AS_PUBLISHED)
    assert named(absolute, "z") == {C: pytest.approx(3.25 / 8.6875**0.5)}
    both = universal(table(values), rule="absolute", k=0.0, **AS_PUBLISHED)
    assert set(named(both)) == {A, C, D}  # also one that helps as often as it harms
    # Released: the probability, in which what harms lies below the mean.
    probs = {("colors", IMAGE): [[0.5, 0.5, 0.1, 0.5], [0.5, 0.9, 0.1, 0.5]]}
    numbers = table(probs, "prob")
    numbers["logit_diff"] = table(values)["logit_diff"]
    # mean .5 .7 .1 .5, over heads .45, variance (.0025 + .0625 + .1225 + .0025) / 4 = .0475.
    released = universal(numbers, rule="released", k=1.0, **AS_PUBLISHED)
    assert named(released, "z") == {B: pytest.approx(0.25 / 0.0475**0.5)}


def test_tokens_of_an_answer_count_by_their_mean_and_other_lines_do_not_count():
    one = table({("colors", IMAGE): [[0, 4, 0, 0]]})
    two = table({("colors", IMAGE): [[2, 0, 0, 0]]})
    foil = table({("colors", IMAGE): [[0, 0, 99, 0]]}, role="foil")
    module = table({("colors", IMAGE): [[0, 0, 99, 0]]}, kind="cross_attn")
    found = universal(pd.concat([one, two, foil, module]), k=0.5, **AS_PUBLISHED)
    assert found.effects["mean"].tolist() == [1, 2, 0, 0]
    # Mean 3 / 4, variance (1 / 16 + 25 / 16 + 9 / 16 + 9 / 16) / 4.
    assert named(found, "z") == {B: pytest.approx(1.25 / (44 / 64) ** 0.5)}


def test_heads_of_self_attention_where_there_are_no_others():
    some = table(BY_HAND, kind="attn_heads")
    assert set(universal(some, k=0.8, **AS_PUBLISHED).heads["kind"]) == {"attn_heads"}
    both = pd.concat([some, table({("colors", IMAGE): [[0, 0, 0, 9]]})])
    assert set(named(universal(both, k=0.8, **AS_PUBLISHED))) == {D}
    chosen = universal(both, kind="attn_heads", k=0.8, **AS_PUBLISHED)
    assert set(named(chosen)) == {A, B, C}


def test_heads_that_are_all_alike_have_no_score():
    for value in (0.0, 0.1, 0.8132702392002724):  # the last is not its own mean, by rounding
        values = {("colors", IMAGE): np.full((7, 12), value)}
        found = universal(table(values), k=0.5, **AS_PUBLISHED)
        assert len(found.heads) == 0
        assert found.effects["z"].tolist() == [0] * 12


# --- what is held out


def powers(pairs, n_heads=3):
    """A head's number of pair i is 2^i, so that a sum tells the pairs in it."""
    return np.outer(2.0 ** np.arange(pairs), np.arange(n_heads) == 0)


def members(found, column, n_column):
    """By condition, the pairs whose mean a column has."""
    told = {}
    heads = found.effects[(found.effects["layer"] == 0) & (found.effects["head"] == 0)]
    for line in heads.itertuples():
        condition = (line.task, line.modality)
        total = round(getattr(line, column) * found.n_pairs[condition][n_column])
        told[condition] = {at for at in range(total.bit_length()) if total >> at & 1}
    return told


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_is_on_one_side_whatever_is_corrupt(seed):
    sizes = {"colors": 9, "shapes": 6}
    values = {(task, corrupt): powers(n) for task, n in sizes.items() for corrupt in (IMAGE, TEXT)}
    numbers = table(values)
    left_out = (numbers["modality"] == TEXT) & numbers["pair"].isin(["p2", "p4"])  # as filters do
    found = universal(numbers[~left_out], held_out=1 / 3, n_null=0, seed=seed)
    chosen, rest = members(found, "mean", 0), members(found, "held_out", 1)
    for task, n in sizes.items():
        for modality, there in ((IMAGE, set(range(n))), (TEXT, set(range(n)) - {2, 4})):
            condition = task, modality
            assert not chosen[condition] & rest[condition]
            assert chosen[condition] | rest[condition] == there
            assert found.n_pairs[condition] == (len(chosen[condition]), len(rest[condition]))
        assert len(rest[task, IMAGE]) == n / 3
        assert chosen[task, TEXT] <= chosen[task, IMAGE] and rest[task, TEXT] <= rest[task, IMAGE]


def test_every_pair_is_held_out_by_some_seed():
    numbers = table({("colors", IMAGE): powers(4)})
    seen = [members(universal(numbers, n_null=0, seed=seed), "held_out", 1) for seed in range(12)]
    assert set().union(*(one["colors", IMAGE] for one in seen)) == set(range(4))
    again = members(universal(numbers, n_null=0, seed=3), "held_out", 1)
    assert again == seen[3]


def test_confirmed_by_hand():
    """Two pairs, one on each side: they agree on head A of the first table, not of the second."""
    for second, agrees in (([5, 1, 1, 1], True), ([1, 5, 1, 1], False)):
        values = {("colors", IMAGE): [[9, 1, 1, 1], second]}
        found = universal(table(values), k=1.5, n_null=0)
        chosen = round(found.effects["mean"].max())
        assert chosen in (5, 9)  # of the pair on which heads were selected
        expected = A if agrees or chosen == 9 else B
        assert named(found, "confirmed") == {expected: agrees}
        effects = found.effects.set_index(["layer", "head"])
        # One head stands out of four: (4 - 1) / sqrt(3), the others lie at -1 / sqrt(3).
        held = effects["held_out_z"][expected]
        assert held == pytest.approx(3**0.5 if agrees else -(3**-0.5))
        assert effects["held_out"].max() == 14 - chosen
        assert effects[["low", "high"]].isna().all(axis=None)  # of one pair
        assert found.n_pairs == {("colors", IMAGE): (1, 1)}


def test_confirmed_needs_every_condition_of_its_class():
    """Both pairs of the images agree on A; of the texts only one has it."""
    both, one = [[9, 1, 1, 1]] * 2, [[9, 1, 1, 1], [1, 1, 9, 1]]
    for seed in range(4):
        values = {("colors", IMAGE): both, ("colors", TEXT): one}
        found = universal(table(values), k=1.5, n_null=0, seed=seed)
        if named(found)[A] == "multimodal":
            assert named(found, "confirmed") == {A: False}
        else:  # the text's second pair was selected on, and held out is the first
            assert named(found) == {A: "vision", C: "text"}
            assert named(found, "confirmed") == {A: True, C: False}


# --- chance


def noise(rng, n_pairs=10, n_heads=12):
    """Effects of heads that differ by chance alone; pairs differ in size, and tails are heavy."""
    sizes = rng.exponential(size=(n_pairs, 1))
    return sizes * rng.standard_t(3, size=(n_pairs, n_heads))


def test_the_level_of_the_null():
    """Of noise, the smallest p lies at 5 % or below in 5 % of the cases."""
    rng, n, small = np.random.default_rng(0), 200, 0
    numbers = table({("colors", IMAGE): np.zeros((10, 12))})
    for seed in range(n):
        numbers["logit_diff"] = noise(rng).ravel()
        found = universal(numbers, k=-9.0, held_out=0.0, n_null=39, seed=seed)
        assert len(found.heads) == 12  # all of them, whatever they score
        assert found.heads["p"].is_monotonic_increasing
        small += bool(found.heads["p"].min() <= 0.05)  # 2 of 40 ranks: exactly 5 %
    deviation = (n * 0.05 * 0.95) ** 0.5
    assert abs(small - n * 0.05) < 3 * deviation


def test_a_head_that_stands_out_is_no_chance():
    rng = np.random.default_rng(1)
    conditions = [(task, modality) for task in ("colors", "shapes") for modality in (IMAGE, TEXT)]
    values = {condition: rng.normal(size=(16, 24)) for condition in conditions}
    for numbers in values.values():
        numbers[:, 3] += 3
    values["colors", IMAGE][:, 7] += 3  # in one task only
    found = universal(table(values), n_null=199)
    best = found.heads.iloc[0]
    assert (best["layer"], best["head"], best["universal"]) == (1, 1, "multimodal")
    assert best["confirmed"] and best["p"] == pytest.approx(1 / 200)  # the smallest there is
    assert named(found) == {(1, 1): "multimodal"}
    assert found.null["multimodal"] < 0.02
    line = found.effects.set_index(["task", "modality", "layer", "head"]).loc["colors", TEXT, 1, 1]
    assert line["low"] < 3 < line["high"] and 0.5 < line["high"] - line["low"] < 2.5


def test_a_head_that_stands_out_in_one_condition_is_no_chance():
    """Pairs are shuffled each for itself, so that no head keeps what it has in all of them."""
    values = np.random.default_rng(3).normal(size=(16, 24))
    values[:, 3] += 3
    found = universal(table({("colors", IMAGE): values}), held_out=0.0, n_null=199)
    assert named(found, "p")[1, 1] == pytest.approx(1 / 200)


def test_a_threshold_from_chance():
    """A head passes where 5 % of 199 permutations reach its score or fewer."""
    values = np.random.default_rng(4).normal(size=(16, 24))
    values[:, 2:6] += [0.4, 0.8, 1.2, 1.6]
    numbers = table({("colors", IMAGE): values})
    settings = {"held_out": 0.0, "n_null": 199, "seed": 5}
    ps = named(universal(numbers, k=-9.0, **settings), "p")
    found = universal(numbers, k=None, **settings)
    assert set(named(found)) == {head for head, p in ps.items() if p <= 0.05}
    assert 0 < len(found.heads) < 4 and not any(0.05 < p < 0.06 for p in ps.values())
    assert found.null["vision"] < 0.1
    chosen = found.effects[found.effects["selected"]]
    assert set(zip(chosen["layer"], chosen["head"], strict=True)) == set(named(found))
    with pytest.raises(ValueError, match="k=None takes its threshold from permutations"):
        universal(numbers, k=None, **AS_PUBLISHED)


def test_one_pair_is_no_evidence():
    """Whichever head has the largest number, some head has it in every permutation."""
    for seed in range(5):
        values = np.random.default_rng(seed).normal(size=(1, 24))
        found = universal(table({("colors", IMAGE): values}), k=1.0, held_out=0.0, n_null=50)
        assert found.heads["p"].iloc[0] == 1


def test_chance_by_hand():
    """One head of four stands out in each of two conditions: by chance in one of four draws."""
    values = {("colors", IMAGE): [[9, 1, 1, 1]], ("colors", TEXT): [[9, 1, 1, 1]]}
    n = 400
    found = universal(table(values), k=1.5, held_out=0.0, n_null=n)
    share = found.null["multimodal"]
    assert abs(share - 1 / 4) < 4 * (3 / 16 / n) ** 0.5
    # Where the two do not meet, each is universal for its own modality.
    assert found.null["vision"] == found.null["text"] == pytest.approx(1 - share)
    assert named(found, "p") == {A: pytest.approx((1 + share * n) / (1 + n))}


def test_the_seed_decides():
    numbers = table({("colors", IMAGE): noise(np.random.default_rng(2))})
    one, two, other = (universal(numbers, k=0.0, seed=seed, n_null=50) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one.heads, two.heads)
    pd.testing.assert_frame_equal(one.effects, two.effects)
    assert not one.effects.equals(other.effects)


# --- intervals


def test_intervals_by_hand():
    """Of two rows 0 and 1 the means of draws are 0, 1/2 and 1, in one, two and one of four."""
    values = np.array([[0.0, 5.0], [1.0, 5.0]])
    mean, low, high = bootstrap(values)
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([0.5, 5], [0, 5], [1, 5])
    _, low, high = bootstrap(values, level=0.3)
    assert (low.tolist(), high.tolist()) == ([0.5, 5], [0.5, 5])


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of normal numbers the interval is z sqrt((n - 1) / n) of Student's t: 94.2 % of 50 pairs."""
    rng, n = np.random.default_rng(0), 3000
    _, low, high = bootstrap(rng.normal(2, 3, size=(50, n)), n=2000, seed=1)
    share = float(((low <= 2) & (high >= 2)).mean())
    assert abs(share - 0.942) < 4 * (0.942 * 0.058 / n) ** 0.5
    _, low, high = bootstrap(rng.normal(2, 3, size=(50, n)), level=0.5, n=2000)
    assert abs(float(((low <= 2) & (high >= 2)).mean()) - 0.5) < 0.05


def test_missing_numbers():
    nan = np.nan
    values = np.array([[1, nan, nan, 1], [nan, 7, nan, 2], [3, nan, nan, 6]])
    mean, low, high = bootstrap(values)
    np.testing.assert_array_equal(mean, [2, 7, nan, 3])
    assert (low[0], high[0]) == (1, 3)  # of two numbers
    assert np.isnan([*low[1:3], *high[1:3]]).all()  # of one, and of none
    assert 1 <= low[3] < 3 < high[3] <= 6
    mean, low, high = bootstrap(np.array([[4.0, nan]]))
    np.testing.assert_array_equal(mean, [4, nan])
    assert np.isnan([low, high]).all()


def test_rows_are_drawn_whole_and_axes_kept(monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(9, 2, 3))
    values[:, 1] = -values[:, 0]
    mean, low, high = bootstrap(values)
    assert mean.shape == low.shape == high.shape == (2, 3)
    np.testing.assert_allclose(mean, values.mean(0), atol=1e-12)
    np.testing.assert_allclose(low[0], -high[1], atol=1e-12)  # the same draws
    monkeypatch.setattr(statistics, "DRAWN", 2000)  # two columns at a time
    np.testing.assert_allclose(bootstrap(values)[1], low, rtol=0, atol=1e-12)


# --- what is refused


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"role": "verb"}, r"no 'cross_attn_heads' patched at the role 'verb'.*\['answer'\]"),
        ({"kind": "attn_heads"}, r"no 'attn_heads' patched.*kinds are \['cross_attn_heads'\]"),
        ({"held_out": 1.0}, "held_out is a share of pairs, 0 to below 1, not 1.0"),
        ({"held_out": -0.1}, "held_out is a share of pairs, 0 to below 1, not -0.1"),
    ],
)
def test_what_is_refused(changed, says):
    with pytest.raises(ValueError, match=says):
        universal(table(BY_HAND), n_null=0, **changed)


@pytest.mark.parametrize(("n_pairs", "share"), [(1, 0.5), (3, 0.1), (2, 0.9)])
def test_too_few_pairs_to_hold_some_out(n_pairs, share):
    numbers = table({("colors", IMAGE): np.eye(4)[:n_pairs]})
    with pytest.raises(ValueError, match="too few to hold some out; give more, or held_out=0"):
        universal(numbers, held_out=share, n_null=0)
    assert universal(numbers, **AS_PUBLISHED).n_pairs == {("colors", IMAGE): (n_pairs, 0)}


@pytest.mark.parametrize("where", ["one number", "a head", "a pair", "infinite", "no line"])
def test_numbers_that_are_missing_are_refused(where):
    numbers = table(BY_HAND)
    chosen = {
        "one number": numbers.index == 5,
        "infinite": numbers.index == 5,
        "a head": (numbers["layer"] == 0) & (numbers["head"] == 1),
        "a pair": (numbers["pair"] == "p1") & (numbers["task"] == "colors"),
        "no line": numbers.index == 5,
    }[where]
    if where == "no line":
        numbers = numbers[~chosen]
    else:
        numbers.loc[chosen, "logit_diff"] = np.inf if where == "infinite" else np.nan
    with pytest.raises(ValueError, match="not every pair has a number of every head"):
        universal(numbers, **AS_PUBLISHED)


def test_by_chance_a_head_is_rarely_universal_and_confirmed():
    """Of noise, one head of which varies five times as much; with the classes' shared chance."""
    rng, found = np.random.default_rng(0), [0, 0]
    for _ in range(40):
        numbers = {("t", one): rng.normal(size=(16, 12)) for one in (IMAGE, TEXT)}
        found[0] += len(universal(table(numbers), k=None, n_null=100).heads) > 0
        for values in numbers.values():
            values[:, 5] *= 5
        loud = universal(table(numbers), k=None, n_null=100).heads
        found[1] += int(loud["confirmed"].sum()) > 0
    assert found[0] <= 6 and found[1] <= 6  # 5 % expected; above 6 with a chance of 1 in 100


def test_pairs_of_one_name_are_refused():
    numbers = table({("t", IMAGE): np.ones((3, 4))}, position=3)
    with pytest.raises(ValueError, match="two pairs of one task have the name 'p0'"):
        universal(pd.concat([numbers, numbers]))


def test_nothing_is_confirmed_where_nothing_is_held_out():
    found = universal(table({("t", IMAGE): [[9, 1, 1, 1]] * 2}), k=1.5, n_null=0, held_out=0.0)
    assert len(found.heads) == 1 and found.heads["confirmed"].isna().all()


# --- effects


def test_effects_by_hand():
    """Two tokens of one role count by their mean; signed and absolute means differ."""
    lines = [  # pair, modality, head, value
        ("a", "image", 0, 1.0),
        ("a", "image", 0, 3.0),
        ("b", "image", 0, -4.0),
        ("a", "image", 1, 5.0),
        ("a", "text", 0, 7.0),
    ]
    table = pd.DataFrame(lines, columns=["pair", "modality", "head", "logit_diff"])
    table = table.assign(task="t", stack="text", kind="attn_heads", layer=0, role="answer")
    told = effects(table, by=("modality", "head")).set_index(["modality", "head"])
    assert told["mean"].to_dict() == {("image", 0): -1, ("image", 1): 5, ("text", 0): 7}
    assert told["absolute"].to_dict() == {("image", 0): 3, ("image", 1): 5, ("text", 0): 7}
    assert told["n"].tolist() == [2, 1, 1]
    assert told.loc[("image", 0), ["low", "high"]].tolist() == [-4, 2]  # one pair twice
    assert told.loc[("text", 0), ["low", "absolute_high"]].isna().all()
    with pytest.raises(KeyError, match=r"no column 'x', only \['pair'"):
        effects(table, "x")
