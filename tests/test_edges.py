"""Edge attribution equals products of finite differences along paths that pass no part."""

import functools

import numpy as np
import pytest
import torch
from whole_zoo import ZOO
from zoo import QUIET, built, total
from zoo_clip import CLIP
from zoo_llava import LLAVA

from hooked_vlm import HookedBLIP, HookedLlava
from hooked_vlm import patching as P
from hooked_vlm.data import Pair, shapes
from hooked_vlm.patching import graph
from hooked_vlm.patching.cells import module_of
from hooked_vlm.patching.edges import edge_attribution

RESNET = next(member for member in CLIP if member.stages)
MEMBERS = [member for member in ZOO if member != RESNET]
BY_NAME = {str(member): member for member in MEMBERS}
# One of each way in which stacks read one another; the others are slow.
KINDS = ("blip-itm", "blip-vqa", "albef-nlvr", "llava", "next")
FIRST = [next(m for m in MEMBERS if str(m).startswith(kind)) for kind in KINDS]
EACH = [m if m in FIRST else pytest.param(m, marks=pytest.mark.slow) for m in MEMBERS]


def difference(ours, theirs):
    """The largest one, relative to the largest value."""
    return np.abs(np.array(ours) - theirs).max() / np.abs(theirs).max()


def alone(model, clean, corrupt):
    """Each side as one row; a CLIP's rows read all texts."""
    if model.task != "clip":
        return clean, corrupt
    texts = {name: torch.cat([clean[name], corrupt[name]]) for name in clean}
    return [{**texts, "pixel_values": side["pixel_values"]} for side in (clean, corrupt)]


def parts(model):
    """The points of what parts add."""
    return [name for name in model.hook_dict if name.endswith(("attn_out", "mlp_out"))]


def ends(model):
    return [f"{stack}.blocks.0.hook_resid_pre" for stack in model.stacks]


def change(model, name, own, other):
    """What the sender `name` adds in the other run, minus that in the own: where, and what."""
    if not name.endswith("hook_result"):
        return name, other[name] - own[name]
    stem, head = name.removesuffix(".hook_result").split(".heads.")
    stack, _, layer, part = stem.split(".")
    attention = getattr(model.stacks[stack].blocks[int(layer)], part)
    difference = (other[f"{stem}.hook_z"] - own[f"{stem}.hook_z"])[:, :, int(head)]
    rows = slice(int(head) * attention.d_head, (1 + int(head)) * attention.d_head)
    stem = stem.removesuffix(part)
    return f"{stem}hook_{part}_out", difference @ attention.o.weight[:, rows].T


def written(value):
    return lambda x, hook: value.clone()


def reached(model, inputs, own, point, added, receivers):
    """Receivers' inputs when something is added, with all parts held to what they are."""
    hooks = [(name, written(own[name])) for name in parts(model) if name in own and name != point]
    hooks.append((point, written(own[point] + added)))
    modules = {module_of(name) for name in receivers}
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(**inputs, names_filter=modules)
    return cache


def text_only(model, inputs, sender, added):
    """Of a text's embedding what is no image's, which belongs to the parts of its stack."""
    if model.task == "llava" and sender.startswith("text.") and sender.endswith("resid_pre"):
        return added.masked_fill((inputs["input_ids"] == model.cfg.image_token_id)[..., None], 0)
    return added


def runs(member, direction):
    model = built(member)
    sides = [member.inputs(1, padded=False, seed=seed) for seed in (0, 1)]
    given = alone(model, *sides)
    own, other = given[::-1] if direction == "denoise" else given
    return model, sides, own, other


def cached(model, inputs):
    return model.run_with_cache(**inputs)[1]


@pytest.mark.parametrize("direction", ["denoise", pytest.param("noise", marks=pytest.mark.slow)])
@pytest.mark.parametrize("member", EACH, ids=str)
def test_scores_are_products_of_finite_differences(member, direction, monkeypatch):
    """The receiver's input moves by the sender's change, and the metric by the receiver's."""
    if direction == "noise":
        monkeypatch.setattr(graph, "ROOM", 1)  # one receiver at a time
    model, sides, inputs, other_inputs = runs(member, direction)
    result = edge_attribution(model, tuple(sides), total, direction, **QUIET)
    scores = result.data[0].values
    own, other = cached(model, inputs), cached(model, other_inputs)
    senders, receivers = (result.data[side].values.tolist() for side in ("sender", "receiver"))
    there = np.argwhere(np.isfinite(scores))
    picked = np.random.default_rng(0).permutation(len(there))[:12]
    found, expected = [], []
    for row, column in there[picked]:
        sender, receiver = senders[row], receivers[column]
        point, added = change(model, sender, own, other)
        added = text_only(model, inputs, sender, added)
        step = 1e-4 / max(1.0, added.abs().max().item())
        ahead, behind = (
            reached(model, inputs, own, point, sign * step * added, [receiver])[receiver]
            for sign in (1, -1)
        )
        moved = (ahead - behind) / (2 * step)
        step = 1e-4 / max(1.0, moved.abs().max().item())
        plus, minus = (
            total(
                model.run_with_hooks(
                    **inputs, fwd_hooks=[(receiver, written(own[receiver] + sign * step * moved))]
                )
            ).item()
            for sign in (1, -1)
        )
        expected.append((plus - minus) / (2 * step))
        found.append(scores[row, column])
    assert difference(found, expected) < 1e-5
    assert np.count_nonzero(np.abs(expected) > 1e-7) > 4


@pytest.mark.parametrize("member", EACH, ids=str)
def test_there_is_an_edge_where_a_change_arrives(member):
    model, sides, inputs, _ = runs(member, "denoise")
    result = edge_attribution(model, tuple(sides), total, **QUIET)
    own = cached(model, inputs)
    senders, receivers = (result.data[side].values.tolist() for side in ("sender", "receiver"))
    generator = torch.Generator().manual_seed(0)
    for sender, scores in zip(senders, result.data[0].values, strict=True):
        point, _ = change(model, sender, own, own)
        noise = torch.randn(own[point].shape, generator=generator, dtype=torch.float64)
        noise = text_only(model, inputs, sender, noise)
        cache = reached(model, inputs, own, point, noise, receivers)
        arrives = [not torch.equal(cache[name], own[name]) for name in receivers]
        assert arrives == np.isfinite(scores).tolist(), sender


@pytest.mark.parametrize("member", EACH, ids=str)
def test_edges_add_up_to_the_receiver_where_all_is_linear(member):
    """Between images that hardly differ: gradient times the change of what the receiver reads."""
    model, (clean, _), _, _ = runs(member, "denoise")
    pixels = clean["pixel_values"]
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))
    corrupt = clean | {"pixel_values": pixels + 1e-6 * noise.to(pixels)}
    result = edge_attribution(model, (clean, corrupt), total, **QUIET)
    sums = result.data[0].sum("sender").values
    own, other = alone(model, corrupt, clean)
    names = result.data["receiver"].values.tolist()
    _, there = model.run_with_cache(**other, names_filter=names)
    _, here = model.run_with_cache(
        **own, names_filter=names, incl_bwd=True, metric=lambda x: total(x).sum()
    )
    expected = [((there[n] - here[n]) * here[f"{n}_grad"]).sum().item() for n in names]
    assert difference(sums, expected) < 1e-4
    assert sum(abs(one) > 1e-9 for one in expected) > len(names) / 3


@pytest.mark.parametrize("member", EACH, ids=str)
def test_edges_add_up_exactly_where_the_path_is_the_stream(member):
    """In pre-norm stacks, into MLPs and the readout, however much the runs differ."""
    model, sides, own_inputs, other_inputs = runs(member, "denoise")
    if model.task == "llava":  # no image differs: the projector is not linear
        sides[1] = sides[1] | {"pixel_values": sides[0]["pixel_values"]}
        other_inputs, own_inputs = sides
    result = edge_attribution(model, tuple(sides), total, **QUIET)
    streams = [name for name, stack in model.stacks.items() if stack.pre_norm]
    names = [
        name
        for name in result.data["receiver"].values.tolist()
        if name.split(".")[0] in streams and ".heads." not in name
    ]
    _, there = model.run_with_cache(**other_inputs, names_filter=names)
    _, here = model.run_with_cache(
        **own_inputs, names_filter=names, incl_bwd=True, metric=lambda x: total(x).sum()
    )
    expected = [((there[n] - here[n]) * here[f"{n}_grad"]).sum().item() for n in names]
    sums = result.data[0].sel(receiver=names).sum("sender").values
    assert difference(sums, expected) < 1e-10
    assert max(map(abs, expected)) > 1e-6


@pytest.mark.parametrize("member", [MEMBERS[2], MEMBERS[-3]], ids=str)
def test_scores_are_path_patching_where_runs_hardly_differ(member):
    model, (clean, _), _, _ = runs(member, "denoise")
    noise = torch.randn(clean["pixel_values"].shape, generator=torch.Generator().manual_seed(3))
    corrupt = clean | {"pixel_values": clean["pixel_values"] + 1e-5 * noise.to(torch.float64)}
    last = list(model.stacks)[-1]
    receivers = [f"{last}.blocks.1.attn.heads.1.hook_k", f"{last}.blocks.1.hook_mlp_in"]
    if model.task == "vqa":
        receivers.append(f"{last}.blocks.0.cross_attn.heads.1.hook_v")
    scores = edge_attribution(model, (clean, corrupt), total, **QUIET).data[0]
    found, expected = [], []
    for receiver in receivers:
        there = scores.sel(receiver=receiver).dropna("sender")["sender"].values.tolist()
        senders = [name for name in there if not name.endswith("resid_pre")]
        patched = [name.replace("hook_result", "hook_z") for name in senders]
        exact = P.path_patching(model, (clean, corrupt), patched, receiver, total, **QUIET)
        assert [site.name for site in exact.sites] == patched
        expected += exact.difference.values.flatten().tolist()
        found += scores.sel(receiver=receiver, sender=senders).values.tolist()
    assert difference(found, expected) < 1e-3
    assert len(expected) > 8


@functools.cache
def toy(task):
    return HookedBLIP.from_pretrained(f"toy-blip-{task}")


@functools.cache
def scene():
    return shapes.minimal_pairs(1, seed=5, attribute="color")[0]


def question(name="", **fields):
    texts = "is the circle red or blue?", "is the square red or blue?"
    return Pair(scene().clean.image(), texts[0], corrupt_text=texts[1], name=name, **fields)


def test_pairs_and_their_metrics():
    """Each pair has its own answer; a metric of several tokens is measured behind each."""
    model = toy("vqa")
    pairs = [question("a", answer="red", foil="blue"), question("b", answer="yes", foil="blue")]
    both = edge_attribution(model, pairs, **QUIET)
    assert both.data["pair"].values.tolist() == ["a", "b"]
    log_probs = {
        word: edge_attribution(model, pairs[0], P.log_prob(word), **QUIET)
        for word in ("red", "blue", "yes")
    }
    for row, word in enumerate(("red", "yes")):  # a difference of log probabilities is of logits
        expected = (log_probs[word].data - log_probs["blue"].data)[0]
        assert np.nanmax(np.abs(both.data[row].values - expected.values)) < 1e-5
        assert np.nanmax(np.abs(expected.values)) > 1e-2
    words = P.logit_diff("red", "blue", tokens="all")
    several = edge_attribution(model, pairs[0], words, **QUIET)
    assert np.nanmax(np.abs((several.data - both.data[0]).values)) < 1e-5
    inputs = model.prepare_prompt(*[[pairs[0].image] * 2, pairs[0].texts])
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue")]
    logits = model(**inputs)[:, -1, ids]
    assert both.clean.values[0] == pytest.approx(float(logits[0, 0] - logits[0, 1]), abs=1e-5)
    assert both.corrupt.values[0] == pytest.approx(float(logits[1, 0] - logits[1, 1]), abs=1e-5)


def test_several_tokens_are_read_to_their_end():
    member = next(member for member in MEMBERS if member.task == "captioning")
    model, sides, *_ = runs(member, "denoise")
    found = edge_attribution(model, tuple(sides), P.log_prob((4, 9), tokens="all"), **QUIET)
    longer = [
        side
        | {
            "input_ids": torch.cat([side["input_ids"], torch.tensor([[4]])], 1),
            "attention_mask": torch.ones(1, side["input_ids"].shape[1] + 1, dtype=torch.long),
        }
        for side in sides
    ]

    def two_tokens(logits):
        chosen = logits.log_softmax(-1)
        return chosen[:, -2, 4] + chosen[:, -1, 9]

    expected = edge_attribution(model, tuple(longer), two_tokens, **QUIET)
    torch.testing.assert_close(
        found.data.values, expected.data.values, rtol=0, atol=1e-12, equal_nan=True
    )
    assert np.nanmax(np.abs(found.data)) > 1e-3


def test_divergence_from_the_clean_run_has_no_slope_there():
    """It is least at the clean run itself, and grows towards it from the corrupt one."""
    pair = question(answer="red", foil="blue")
    at_clean = edge_attribution(toy("vqa"), pair, P.kl(), "noise", **QUIET)
    at_corrupt = edge_attribution(toy("vqa"), pair, P.kl(), **QUIET)
    assert np.nanmax(np.abs(at_clean.data)) < 1e-4
    assert np.nanmax(np.abs(at_corrupt.data)) > 1e-1
    assert at_clean.clean.item() == pytest.approx(0, abs=1e-6)


def test_some_senders_and_receivers():
    model, pair = toy("vqa"), question(answer="red", foil="blue")
    whole = edge_attribution(model, pair, **QUIET)
    sites = model.sites("decoder.blocks.*.cross_attn.heads.*.hook_k")
    some = edge_attribution(
        model, pair, senders="text.*heads.*.hook_result", receivers=sites, **QUIET
    )
    assert {name.split(".")[0] for name in some.data["sender"].values} == {"text"}
    assert some.data["receiver"].values.tolist() == [site.name for site in sites]
    assert some.data.notnull().all()
    assert (
        whole.data.sel(sender=some.data["sender"], receiver=some.data["receiver"]).notnull().all()
    )
    (best,) = some.top(1)
    assert abs(best.score) == np.abs(some.data).max()
    assert some.data.sel(sender=best.sender, receiver=best.receiver).item() == best.score
    table = some.to_dataframe()
    assert len(table) == some.data.size
    assert set(table) == {"pair", "sender", "receiver", "score", "clean", "corrupt"}
    assert len(whole.to_dataframe()) == whole.data.notnull().sum() < whole.data.size
    assert len(whole.top(10**6)) == whole.data.notnull().sum()
    told = whole.provenance
    assert (told["method"], told["metric"], told["direction"]) == (
        "edge_attribution", "logit_diff", "denoise",
    )  # fmt: skip
    assert told["complete"] and told["first_token"] == "cls"


def test_an_interrupted_run_gives_the_pairs_that_are_done(monkeypatch):
    pairs = [question(name, answer="red", foil="blue") for name in "ab"]
    expected = edge_attribution(toy("vqa"), pairs[0], **QUIET)
    walks, walk = [], graph.Graph.scores

    def interrupted(*args):
        walks.append(args)
        if len(walks) > 1:
            raise KeyboardInterrupt
        return walk(*args)

    monkeypatch.setattr(graph.Graph, "scores", interrupted)
    result = edge_attribution(toy("vqa"), pairs, **QUIET)
    assert not result.provenance["complete"]
    assert result.data[1].isnull().all() and np.isnan(result.clean.values[1])
    assert np.array_equal(result.data[0], expected.data[0], equal_nan=True)
    with pytest.raises(KeyboardInterrupt):
        edge_attribution(toy("vqa"), pairs, **QUIET)
    assert not any(point.listening for point in toy("vqa").hook_points())


def test_texts_without_an_image_have_no_edges_of_it():
    model = HookedLlava.from_pretrained("toy-llava")
    ids = [model.tokenizer(text, return_tensors="pt") for text in ("red circle", "blue circle")]
    sides = tuple({"input_ids": one["input_ids"]} for one in ids)
    result = edge_attribution(model, sides, P.logit_diff(5, 6), **QUIET)
    stacks = [name.partition(".")[0] for name in result.data["sender"].values]
    finite = result.data[0].notnull().any("receiver").values
    assert [stack for stack, there in zip(stacks, finite, strict=True) if there] == [
        stack for stack in stacks if stack == "text"
    ]
    readouts = [name for name in result.data["receiver"].values if name.endswith("resid_post")]
    assert readouts == [f"text.blocks.{model.text.cfg.n_layers - 1}.hook_resid_post"]


def test_refusals():
    model, pair = toy("vqa"), question(answer="red", foil="blue")
    with pytest.raises(ValueError, match="accuracy has no gradient"):
        edge_attribution(model, pair, P.accuracy(), **QUIET)
    with pytest.raises(
        KeyError, match=r"no sender among .*hook_z.*senders are hook_resid_pre, hoo"
    ):
        edge_attribution(model, pair, senders="text.*heads.*.hook_z", **QUIET)
    with pytest.raises(KeyError, match=r"no receiver among .*receivers are hook_q, hook_k, hook_v"):
        edge_attribution(model, pair, receivers=["text.blocks.0.hook_mlp_out"], **QUIET)
    with pytest.raises(KeyError, match=r"no hook 'text.blocks.9"):
        edge_attribution(model, pair, receivers="text.blocks.9.hook_mlp_in", **QUIET)
    end = f"vision.blocks.{model.vision.cfg.n_layers - 1}.hook_resid_post"
    with pytest.raises(KeyError, match=r"is no receiver: no logits are read there; \['decoder'\]"):
        edge_attribution(model, pair, receivers=end, **QUIET)
    resnet = RESNET.model()
    sides = tuple(RESNET.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match="'vision' of this model has none: its blocks are Bottle"):
        edge_attribution(resnet, sides, **QUIET)
    clip = next(member for member in CLIP if not member.stages)
    sides = tuple(clip.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    same = sides[0] | {"input_ids": sides[1]["input_ids"]}
    with pytest.raises(ValueError, match="it needs a corrupt image"):
        edge_attribution(built(clip), (sides[0], same), **QUIET)
    assert not any(point.listening for point in model.hook_points())


def test_gradients_are_averaged_over_runs_between():
    """From MLP to MLP of a pre-norm stack, whose stream is a sum, by passes of mixed images."""
    member = LLAVA[0]
    model = built(member)
    clean, corrupt = (
        member.inputs(1, padded=False, seed=seed, dtype=torch.float64) for seed in (0, 1)
    )
    corrupt = corrupt | {"input_ids": clean["input_ids"]}  # another image alone
    sender, receiver = "text.blocks.0.hook_mlp_out", "text.blocks.1.hook_mlp_in"
    embed = "vision.hook_embed"

    ends = [model.run_with_cache(**x, names_filter=[embed, sender])[1] for x in (corrupt, clean)]
    gradients = []
    for share in (1 / 6, 1 / 2, 5 / 6):
        mixed = torch.lerp(ends[0][embed], ends[1][embed], share)
        with model.hooks([(embed, lambda x, hook, mixed=mixed: mixed)]):
            _, cache = model.run_with_cache(
                **corrupt,
                names_filter=receiver,
                incl_bwd=True,
                metric=lambda logits: total(logits).sum(),
            )
        gradients.append(cache[f"{receiver}_grad"])
    change = ends[1][sender] - ends[0][sender]
    expected = (change * torch.stack(gradients).mean(0)).sum().item()
    found = P.edge_attribution(
        model,
        (clean, corrupt),
        total,
        senders=sender,
        receivers=receiver,
        steps=3,
        progress=False,
    )
    plain = P.edge_attribution(
        model, (clean, corrupt), total, senders=sender, receivers=receiver, progress=False
    )
    assert found.data.item() != pytest.approx(plain.data.item(), rel=1e-3)
    assert found.data.item() == pytest.approx(expected, rel=1e-9)
