"""Circuits: measured as a loop of full passes would, and found where they were planted."""

import functools

import numpy as np
import pytest
import torch
from zoo import BLIP, QUIET

from hooked_vlm import HookedBLIP
from hooked_vlm import patching as P
from hooked_vlm.data import Pair, shapes
from hooked_vlm.models.names import Site
from hooked_vlm.patching import circuit

HEADS = "text.blocks.*.heads.*.hook_z"
NODES = [HEADS, "text.blocks.*.hook_mlp_out"]


@functools.cache
def member():
    return next(one for one in BLIP if one.task == "itm")


@functools.cache
def built():
    return member().model()


def sides(*seeds):
    """Other images, the same texts, row by row."""
    rows = [member().inputs(1, padded=False, seed=seed) for seed in seeds]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def clean_and_corrupt(n=2):
    clean = sides(*range(n))
    pixels = sides(*range(n, 2 * n))["pixel_values"]
    return clean, clean | {"pixel_values": pixels}


def margin(logits):
    return logits[:, 1] - logits[:, 0]


def share(model, clean, corrupt, inside, nodes, direction="noise"):
    """The faithfulness of a set, by one full pass."""
    names = [site.name for site in nodes]
    into, source = (clean, corrupt) if direction == "noise" else (corrupt, clean)
    chosen = {site.name for site in inside}
    written = [name for name in names if (name in chosen) == (direction == "denoise")]
    _, cache = model.run_with_cache(**source, names_filter=names)
    hooks = [(name, lambda x, hook: cache[hook.name].clone()) for name in written]
    ends = [margin(model(**side)) for side in (clean, corrupt)]
    found = margin(model.run_with_hooks(**into, fwd_hooks=hooks))
    return ((found - ends[1]) / (ends[0] - ends[1])).mean().item()


def greedy(model, clean, corrupt, nodes, threshold, direction):
    """The same search, one pass at a time."""
    one = functools.partial(share, model, clean, corrupt, nodes=nodes, direction=direction)
    effects = []
    for pair in range(len(clean["input_ids"])):
        rows = [{k: v[pair : pair + 1] for k, v in side.items()} for side in (clean, corrupt)]
        alone = functools.partial(share, model, *rows, nodes=nodes, direction=direction)
        if direction == "noise":
            effects.append([abs(1 - alone([n for n in nodes if n != site])) for site in nodes])
        else:
            effects.append([abs(alone([site])) for site in nodes])
    order = np.argsort(-np.mean(effects, axis=0), kind="stable")
    ranked = [nodes[at] for at in order]
    curve = [one(ranked[:size]) for size in range(len(ranked) + 1)]
    size = next(at for at, value in enumerate(curve) if value >= threshold)
    members = ranked[:size]
    for site in reversed(ranked[:size]):
        rest = [other for other in members if other != site]
        if one(rest) >= threshold:
            members = rest
    return members, curve, one(members), 1 - one([n for n in nodes if n not in members])


@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_circuit_is_what_a_loop_of_full_passes_finds(direction, threshold):
    model, (clean, corrupt) = built(), clean_and_corrupt()
    nodes = model.sites(NODES)
    found = P.find_circuit(
        model, (clean, corrupt), NODES, direction=direction, threshold=threshold, **QUIET
    )
    members, curve, faithfulness, completeness = greedy(
        model, clean, corrupt, nodes, threshold, direction
    )
    assert list(found.sites) == members
    assert 0 < len(members) < len(nodes)
    assert found.curve.dims == ("size",)
    np.testing.assert_allclose(found.curve.values, curve, rtol=0, atol=1e-9)
    assert found.faithfulness == pytest.approx(faithfulness, abs=1e-9)
    assert found.completeness == pytest.approx(completeness, abs=1e-9)
    assert found.reached and found.faithfulness >= threshold
    told = found.provenance
    assert (told["method"], told["ranking"], told["direction"], told["metric"]) == (
        "find_circuit", "sweep", direction, "itm_margin",
    )  # fmt: skip


def test_members_that_can_be_spared_go():
    """A set in which two weak members stand for each other keeps one of them."""
    worth = {"a": 0.5, "b": 0.4, "c": 0.2, "d": 0.2}
    tried = []

    def faithful(sets):
        tried.append(["".join(one.name for one in inside) for inside in sets])
        return np.array([sum(worth[one.name] for one in inside) for inside in sets])

    members, found = circuit._spared([Site(name) for name in worth], 1.3, 1.05, faithful)
    assert "".join(one.name for one in members) == "abc"
    assert found == pytest.approx(1.1)
    assert tried == [["abc", "abd", "acd", "bcd"], ["ab", "ac", "bc"]]


PLANTED = ["text.blocks.0.cross_attn.heads.1.hook_z", "text.blocks.1.cross_attn.heads.0.hook_z"]


@functools.cache
def planted():
    """A model in which two heads alone add something that they read of the image."""
    model = member().model()
    for layer, block in enumerate(model.text.blocks):
        for part in ("attn", "cross_attn"):
            attention = getattr(block, part)
            for head in range(attention.n_heads):
                if f"text.blocks.{layer}.{part}.heads.{head}.hook_z" not in PLANTED:
                    columns = slice(head * attention.d_head, (head + 1) * attention.d_head)
                    attention.o.weight[:, columns] = 0
    return model


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_planted_heads_are_the_circuit(direction):
    model, pair = planted(), clean_and_corrupt()
    found = P.find_circuit(model, pair, HEADS, threshold=0.999, direction=direction, **QUIET)
    assert {site.name for site in found.sites} == set(PLANTED)
    assert found.faithfulness == pytest.approx(1, abs=1e-9)
    assert found.completeness == pytest.approx(1, abs=1e-9)
    assert found.curve.values[0] == pytest.approx(0, abs=1e-9)
    assert found.curve.values[1] < 0.999
    assert found.curve.values[2:] == pytest.approx(1, abs=1e-9)


def test_sites_that_carry_nothing_are_no_circuit():
    """Restoring them restores nothing: said, and not passed off."""
    idle = [site for site in planted().sites(HEADS) if site.name not in PLANTED]
    found = P.find_circuit(planted(), clean_and_corrupt(), idle, direction="denoise", **QUIET)
    assert not found.reached
    assert found.faithfulness == pytest.approx(0, abs=1e-9)


def test_a_ranking_orders_the_sites():
    """However bad: with the idle heads in front, the curve rises late, and they are spared."""
    model, pair = planted(), clean_and_corrupt()
    sweep = P.activation_patching(model, pair, HEADS, direction="noise", **QUIET)

    class Worst:
        sites = sweep.sites
        effect = 2 - abs(sweep.effect)

    found = P.find_circuit(model, pair, HEADS, threshold=0.999, ranking=Worst(), **QUIET)
    assert {site.name for site in found.sites} == set(PLANTED)
    assert found.provenance["prefix"] == found.curve.sizes["size"] - 1
    assert found.provenance["ranking"] == "Worst"
    assert found.curve.values[:-2] == pytest.approx(0, abs=1e-9)
    same = P.find_circuit(model, pair, HEADS, threshold=0.999, ranking=sweep, **QUIET)
    assert same.provenance["ranking"] == "activation_patching"
    assert same.sites == P.find_circuit(model, pair, HEADS, threshold=0.999, **QUIET).sites


def test_members_may_be_several_sites():
    """Whole layers as nodes."""
    model, (clean, corrupt) = built(), clean_and_corrupt()
    layers = [
        P.together(model.sites(f"text.blocks.{layer}.*heads.*.hook_z"), name=str(layer))
        for layer in range(2)
    ]
    found = P.find_circuit(model, (clean, corrupt), layers, threshold=0.05, **QUIET)
    every = [site for layer in layers for site in layer.sites]
    expected = share(model, clean, corrupt, found.sites[0].sites, every)
    assert found.curve.sizes["size"] == 3
    assert found.curve.values[1] == pytest.approx(expected, abs=1e-9)


def test_pairs_that_do_not_differ_are_left_out_and_counted():
    model, (clean, corrupt) = built(), clean_and_corrupt(3)
    corrupt["pixel_values"][1] = clean["pixel_values"][1]
    found = P.find_circuit(model, (clean, corrupt), HEADS, **QUIET)
    assert found.undefined == 1
    rest = [{k: v[[0, 2]] for k, v in side.items()} for side in (clean, corrupt)]
    expected = P.find_circuit(model, tuple(rest), HEADS, **QUIET)
    assert found.sites == expected.sites
    assert found.faithfulness == pytest.approx(expected.faithfulness, abs=1e-9)
    assert expected.undefined == 0


def test_refusals():
    model, pair = built(), clean_and_corrupt()
    with pytest.raises(ValueError, match=r"threshold is a share above 0 and up to 1, not 0\.0"):
        P.find_circuit(model, pair, HEADS, threshold=0.0, **QUIET)
    with pytest.raises(ValueError, match="the two runs of no pair differ"):
        P.find_circuit(model, (pair[0], pair[0]), HEADS, **QUIET)
    few = P.activation_patching(model, pair, "text.blocks.0.*heads.*.hook_z", **QUIET)
    with pytest.raises(
        ValueError, match=r"the ranking lacks 4 of 8 sites, 'text.blocks.1.attn.hea"
    ):
        P.find_circuit(model, pair, HEADS, ranking=few, **QUIET)
    each = P.activation_patching(model, pair, HEADS, positions="each", **QUIET)
    with pytest.raises(ValueError, match="several effects of a site, by position"):
        P.find_circuit(model, pair, HEADS, ranking=each, **QUIET)


def test_an_interrupted_search_is_interrupted(monkeypatch):
    """Half of a curve is no circuit."""
    model, pair = built(), clean_and_corrupt()
    real = P.activation_patching(model, pair, HEADS, direction="noise", **QUIET)
    real.provenance["complete"] = False
    monkeypatch.setattr(circuit, "activation_patching", lambda *args, **kwargs: real)
    with pytest.raises(KeyboardInterrupt):
        P.find_circuit(model, pair, HEADS, **QUIET)


def test_the_picture_shows_the_curve_and_the_circuit():
    scene = shapes.minimal_pairs(1, seed=5, attribute="color")[0]
    pair = Pair(scene.clean.image(), scene.clean.caption(), corrupt_text=scene.corrupt.caption())
    model = HookedBLIP.from_pretrained("toy-blip-itm")
    found = P.find_circuit(model, pair, HEADS, **QUIET)
    (axes,) = found.plot().axes
    curve, wanted, chosen = axes.lines
    np.testing.assert_array_equal(curve.get_xydata()[:, 1], found.curve.values)
    assert set(wanted.get_ydata()) == {0.8}
    assert chosen.get_xydata().tolist() == [[len(found.sites), found.faithfulness]]
    assert axes.get_title() == f"itm_margin: a circuit of {len(found.sites)} of 24 sites"
