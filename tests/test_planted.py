"""Planted models: their proofs, their edges, and that they are checkpoints like any other."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BlipForQuestionAnswering, LlavaForConditionalGeneration

from hooked_vlm import HookedVLM, planted
from hooked_vlm import patching as P
from hooked_vlm.data import shapes
from hooked_vlm.planted import build, proof, world

pytestmark = pytest.mark.usefixtures("no_grad")

NAMES = planted.names()
CIRCUITS = ("reader", "two-steps", "distractors", "cancelling", "backup", "outlier")


def pairs_of(model, n, seed, corrupt="image"):
    return planted.pairs(n, seed, corrupt, task=model.task)


def test_the_catalogue_is_whole():
    wanted = {f"planted-blip-{circuit}" for circuit in CIRCUITS}
    wanted |= {f"planted-{one}-reader" for one in ("albef", "llava")}
    wanted |= {"planted-albef-two-steps", "planted-llava-relay"}
    assert set(NAMES) == set(build.MODELS) == wanted
    for name in NAMES:
        assert (planted.path(name) / "model.safetensors").stat().st_size < 10**6


@pytest.mark.parametrize("name", NAMES)
def test_the_proof_holds_on_other_questions(name):
    model, card = planted.load(name)
    again = proof.measure(model, card, 60, seed=77)
    proof.check(again)
    assert {one.what for one in again.proof} >= {"nothing is replaced", "all outside"}
    assert {node.role for node in card.nodes} <= {one.what for one in again.proof}
    for ours, stored in zip(again.proof, card.proof, strict=True):
        assert stored.holds and abs(ours.value - stored.value) < 0.2  # 4 deviations of 60
    assert card.n == 500 and card.proof[0].value == 1


@pytest.mark.parametrize("name", NAMES)
def test_edges_are_the_paths_between_nodes(name):
    """A node's change reaches the inputs of those that the card says, and of no other node."""
    model, card = planted.load(name)
    check_edges(model, card, {node.name for node in card.nodes if node.role == "backup"})


def test_edges_of_the_backup_are_paths_where_the_primary_is_silent():
    model, card = planted.load("planted-blip-backup")
    primary = next(node.name for node in card.nodes if node.role == "primary")
    layer, head = int(primary.split(".")[2]), int(primary.split(".")[5])
    attention = model.text.blocks[layer].cross_attn
    attention.o.weight.view(len(attention.o.weight), attention.n_heads, -1)[:, head] = 0
    check_edges(model, card, {primary})


def check_edges(model, card, silent):
    """Compares the paths with the card's edges that do not touch the `silent` nodes."""
    told = {(e.sender, e.receiver, leaf) for e in card.edges for leaf in e.through.split(",")}
    found = set()
    recolored = []  # what reads no kind sees no difference in the images of pairs
    for pair, scene in zip(pairs_of(model, 3, 5), planted.scenes(3, 5), strict=True):
        first, second = scene.shapes
        first, second = replace(first, color=second.color), replace(second, color=first.color)
        other = replace(scene, first=first, second=second).image()
        recolored.append(replace(pair, corrupt_image=other))
    for pairs in (pairs_of(model, 3, 5), pairs_of(model, 3, 5, "text"), recolored):
        ends = [("hook_logits", "", "hook_logits")]
        for node in card.nodes:
            if node.name.endswith("hook_z"):
                ends += [(node.name, leaf, node.name.replace("_z", f"_{leaf}")) for leaf in "qkv"]
            else:
                ends.append((node.name, "", node.name.replace("hook_mlp_out", "hook_mlp_in")))
        for receiver, leaf, at in ends:
            last = model.order_of(at)
            senders = [n.name for n in card.nodes if model.order_of(n.name) < last]
            if senders:
                result = P.path_patching(model, pairs, senders, at, progress=False)
                means = abs(result.difference).mean("pair").values.reshape(-1)
                for site, mean in zip(result.sites, means, strict=True):
                    if mean > 0.3:
                        found.add((site.name, receiver, leaf))
    nodes = {node.name for node in card.nodes}
    between = {edge for edge in told if edge[0] in nodes}
    assert found == {e for e in between if not silent & set(e)}
    assert {end for edge in told for end in edge[:2]} >= nodes


@pytest.mark.parametrize("name", [n for n in NAMES if "albef" not in n])
def test_transformers_reads_them(name):
    model, _ = planted.load(name)
    pair = pairs_of(model, 1, 3)[0]
    inputs = model.prepare([pair.image], [pair.text])
    if model.task == "llava":
        theirs = LlavaForConditionalGeneration.from_pretrained(planted.path(name))
        expected = theirs(**inputs).logits[0, -1]
    else:
        theirs = BlipForQuestionAnswering.from_pretrained(planted.path(name))
        asked = theirs.text_encoder(
            inputs["input_ids"],
            encoder_hidden_states=theirs.vision_model(inputs["pixel_values"])[0],
        )[0]
        begin = torch.tensor([[model.cfg.bos_token_id]])
        expected = theirs.text_decoder(begin, encoder_hidden_states=asked).logits[0, -1]
    assert model.to_single_token(pair.answer) == expected.argmax()
    found = model(**inputs)[0, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["planted-blip-reader", "planted-albef-reader"])
def test_the_reader_attends_to_what_the_noun_names(name):
    model, card = planted.load(name)
    head = next(node.name for node in card.nodes if node.role == "reader")
    pattern = head.replace("hook_z", "hook_pattern")
    for pair, scene in zip(pairs_of(model, 8, 9), planted.scenes(8, 9), strict=True):
        inputs = model.prepare([pair.image], [pair.text])
        _, cache = model.run_with_cache(**inputs, names_filter=pattern)
        tokens = model.to_str_tokens(inputs["input_ids"][0])
        noun = tokens.index(scene.first.kind)
        weights = cache[pattern][0]
        assert weights[noun, 1 + world.cell_of(scene.first)] > 0.99
        others = [at for at in range(len(tokens)) if at != noun]
        assert weights[others, 0].min() > 0.9  # the class token


def test_nothing_but_the_circuit_sees_the_image():
    """Every other head and MLP of the question, up to the reader, says the same of all images."""
    for name in ("planted-blip-reader", "planted-albef-reader"):
        model, card = planted.load(name)
        stacks = [site.name for site in model.sites(list(card.sites)) if site.stack != "vision"]
        behind = {node.name for node in card.nodes}
        seen = []
        for scene in planted.scenes(2, 4):
            inputs = model.prepare([scene.image()], ["what color is the circle?"])
            seen.append(model.run_with_cache(**inputs, names_filter=stacks)[1])
        reader = next(node.name for node in card.nodes if node.role == "reader")
        early = [n for n in stacks if model.order_of(n) <= model.order_of(reader)]
        for one in early:
            same = torch.allclose(seen[0][one], seen[1][one], rtol=0, atol=1e-5)
            assert same != (one in behind), one


def test_an_ablated_suppressor_makes_the_answer_surer():
    model, card = planted.load("planted-blip-cancelling")
    name = next(node.name for node in card.nodes if node.role == "suppressor")
    result = P.ablate(model, pairs_of(model, 30, 6), name, P.zero(), progress=False)
    assert float(result.difference.min()) > 0.3
    surer = [one for one in card.proof if one.metric == "logit_diff"]
    assert [one.sites for one in surer] == [(name,)] and surer[0].value > 1.05


def test_the_backup_reads_when_the_primary_is_silent():
    model, card = planted.load("planted-blip-backup")
    roles = {node.role: node.name for node in card.nodes}
    pattern = roles["backup"].replace("hook_z", "hook_pattern")
    scene, pair = planted.scenes(1, 8)[0], pairs_of(model, 1, 8)[0]
    inputs = model.prepare([pair.image], [pair.text])
    noun = model.to_str_tokens(inputs["input_ids"][0]).index(scene.first.kind)
    cell = 1 + world.cell_of(scene.first)

    def silent(z, hook):
        return torch.zeros_like(z)

    _, plain = model.run_with_cache(**inputs, names_filter=pattern)
    with model.hooks([(roles["primary"], silent)]):
        _, other = model.run_with_cache(**inputs, names_filter=pattern)
    assert plain[pattern][0, noun, cell] < 0.01
    assert other[pattern][0, noun, cell] > 0.99


def test_pairs_ask_for_what_their_images_show():
    for corrupt in world.CORRUPTIONS:
        made = planted.pairs(40, 2, corrupt)
        for pair, scene in zip(made, planted.scenes(40, 2), strict=True):
            kinds = {shape.kind: shape.color for shape in scene.shapes}
            assert pair.text == f"what color is the {scene.first.kind}?"
            assert pair.answer == kinds[scene.first.kind]
            assert pair.foil == scene.second.color != pair.answer
            color = shapes.COLORS[pair.foil]
            if corrupt == "text":
                assert pair.corrupt_text == f"what color is the {scene.second.kind}?"
            else:  # the kind that is asked for stands in the other cell, in that one's color
                x, y = map(round, scene.second.center)
                assert pair.corrupt_image.getpixel((x, y)) == color
                inside = replace(scene.second, kind=scene.first.kind).mask()
                drawn = (np.asarray(pair.corrupt_image) == color).all(-1)
                assert drawn[inside].mean() > 0.6 and not drawn[~inside].any()
    assert len({world.cell_of(scene.first) for scene in planted.scenes(200, 0)}) == 9


def test_bad_cards_are_refused_by_name(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(planted.path("planted-blip-reader"), folder)
    card = json.loads((folder / "card.json").read_text())

    def refused(match, kind=ValueError, **load):
        with pytest.raises(kind, match=match):
            planted.load(folder, **load)

    def write(**changed):
        (folder / "card.json").write_text(json.dumps(card | changed))

    assert planted.load(folder)[1].name == "planted-blip-reader"
    write(weights="0" * 64)
    refused(r"mine/card.json' is the card of other weights than model.safetensors.*0000.*build")
    node = card["nodes"][1]
    write(nodes=[node | {"name": "text.blocks.7.cross_attn.heads.0.hook_z"}])
    refused("the card of 'planted-blip-reader' names 'text.blocks.7.cross_attn.heads.0.hook_z', no")
    write(nodes=[node | {"name": "text.blocks.0.attn.hook_z"}])
    refused("names 'text.blocks.0.attn.hook_z', none of its sites")
    write(nodes=[node | {"carries": ["imgae"]}])
    refused(r"carries \['imgae'\]; known are image, text")
    write(nodes=["x"])
    refused(r"mine/card.json' is no card of a planted model")
    write(nodes=[{"name": "x"}])
    refused(r"mine/card.json' is no card of a planted model: .*role")
    (folder / "card.json").write_text("{")
    refused(r"mine/card.json' is no card")
    spare = next(
        one.name
        for one in HookedVLM.from_pretrained(folder).sites("text.*.cross_attn.heads.*.hook_z")
        if one.name != node["name"]
    )
    write(nodes=[card["nodes"][0], node | {"name": spare}, card["nodes"][2]])
    planted.load(folder)
    refused("the proof of 'planted-blip-reader' fails: all outside .resample.: ", verify=True)
    (folder / "card.json").unlink()
    refused("has no card.json: it is no planted model", FileNotFoundError)
    with pytest.raises(KeyError, match="no planted model 'planted-blip-raeder'; known are"):
        planted.load("planted-blip-raeder")


def test_a_second_reader_that_the_card_does_not_name_breaks_the_proof():
    model, card = planted.load("planted-blip-reader")
    name = next(node.name for node in card.nodes if node.role == "reader")
    layer, head = int(name.split(".")[2]), int(name.split(".")[5])
    attention = model.text.blocks[layer].cross_attn
    size = attention.d_head
    own, other = (slice(at * size, (at + 1) * size) for at in (head, (head + 1) % 4))
    for linear in (attention.q, attention.k, attention.v):
        linear.weight[other], linear.bias[other] = linear.weight[own], linear.bias[own]
    attention.o.weight[:, other] = attention.o.weight[:, own]
    with pytest.raises(ValueError, match=r"the proof of 'planted-blip-reader' fails: all outside"):
        proof.check(proof.measure(model, card, 40, seed=5))


def test_planted_models_open_by_name_and_verify():
    assert HookedVLM.from_pretrained("planted-llava-relay").task == "llava"
    _, card = planted.load("planted-llava-relay", verify=True)
    assert card.circuit.startswith("The attribute moves to the noun")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(build.MODELS))
def test_another_seed_gives_other_weights_and_the_same_verdicts(name):
    _, stored = planted.load(name)
    with torch.enable_grad():
        model, card = build.make(name, seed=1)
    card = proof.measure(model, card, 60, seed=31)
    proof.check(card)
    assert {node.role for node in card.nodes} == {node.role for node in stored.nodes}
    assert {node.name for node in card.nodes} != {node.name for node in stored.nodes}
    first = planted.load(name)[0]
    for ours, other in zip(first.parameters(), model.parameters(), strict=True):
        assert ours.shape == other.shape
    assert not torch.equal(first.vision.embed.patch.weight, model.vision.embed.patch.weight)
    sites = model.sites(list(card.sites))
    result = P.activation_patching(model, pairs_of(model, 16, 0), sites, progress=False)
    named = planted.methods.named(planted.methods.scores_of(result))
    silent = {node.name for node in card.nodes if node.role == "backup"}
    assert set(named) == card.truth("image") - silent


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model():
    name = "planted-blip-two-steps"
    stored, card = planted.load(name)
    with torch.enable_grad():
        model, again = build.make(name)
    assert again.nodes == card.nodes and again.edges == card.edges
    for (key, ours), other in zip(stored.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0.02, msg=key)
