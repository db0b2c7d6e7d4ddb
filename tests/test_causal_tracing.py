"""Causal tracing equals a loop with plain hooks, and marks what it finds by construction."""

from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
import xarray as xr
from whole_zoo import FUSED, LLAVA
from zoo import ITM, Member, Size, built, error, toy
from zoo_albef import VQA as ALBEF_VQA
from zoo_clip import CLIP
from zoo_llava import LLAMA, MISTRAL

from hooked_vlm import HookedBLIP, planted
from hooked_vlm import patching as P
from hooked_vlm.data import Pair, shapes_pairs
from hooked_vlm.methods import causal_tracing as CT
from hooked_vlm.methods.trace_result import TraceResult
from hooked_vlm.models.names import Site

pytestmark = pytest.mark.usefixtures("no_grad", "one_thread")

VQA = Member("vqa", Size((12, 1, 2), (12, 3, 2), image=16))
PUBLISHED = CT.Noise("multiplicative", mean=1.0, std=5.0)
ADDED = CT.Noise("additive", std=3.0)
SCALED = CT.Noise("scale", factor=0.4)
QUIET = {"progress": False, "max_rows": 64}
FEW = [VQA, ALBEF_VQA, LLAMA]
OTHERS = [one for one in (*FUSED, *LLAVA) if one not in (*FEW, MISTRAL)]


def one_row(member, seed=0):
    """Inputs of one example, without an answer that is begun."""
    inputs = member.inputs(1, padded=False, seed=seed)
    return {name: value for name, value in inputs.items() if not name.startswith("decoder")}


def two(model):
    """A metric of two logits, which no softmax flattens."""
    return P.logit_diff(0, 1) if model.task in ("itm", "nlvr") else P.logit_diff(3, 4)


# --- against transformers and plain hooks


def corrupted(embeds, noise, seed, draw, name="0"):
    """The noise, written out."""
    e = CT.drawn(embeds.shape, seed, draw, name).to(embeds)
    if noise is PUBLISHED:
        return embeds * (1 + 5 * e)
    if noise is ADDED:
        return embeds + 3 * embeds.std(correction=0) * e
    return embeds * 0.4


class Loop:
    """Full passes of transformers' BLIP with PyTorch's forward hooks on its modules."""

    def __init__(self, theirs, inputs):
        self.theirs = theirs
        start = torch.full((1, 1), theirs.config.text_config.bos_token_id)
        self.inputs = inputs | {"decoder_input_ids": start}
        self.clean = {}
        self.logits = self.run(keep=self.clean)

    def run(self, noised=None, restore=(), position=None, keep=None):
        """Logits of the first answer token.

        `noised` changes what the image encoder gives; the modules named in `restore` give at the
        position what they gave in the clean run.
        """
        found, handles = {}, []
        modules = dict(self.theirs.named_modules())

        def on(name, hook):
            handles.append(modules[name].register_forward_hook(hook))

        def noisy(module, args, output):
            return noised(output) if output.dim() == 3 else output  # it pools with the same norm

        def restored(name):
            def hook(module, args, output):
                output = output.clone()
                output[:, position] = self.clean[name][:, position]
                return output

            return hook

        if noised is not None:
            on("vision_model.post_layernorm", noisy)
        for name in restore:
            on(name, restored(name))
        if keep is not None:
            for name in modules:
                if name.endswith(("output.LayerNorm", "output.dense")):
                    on(name, lambda m, a, output, name=name: keep.update({name: output.clone()}))
        on("text_decoder.cls.predictions", lambda m, a, out: found.update(logits=out))
        try:
            self.theirs(**self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return found["logits"][0, -1]


MODULES = {
    "resid": "output.LayerNorm",
    "mlp": "output.dense",
    "attn": "attention.output.dense",
    "attn_sublayer": "attention.output.LayerNorm",
    "cross_attn": "crossattention.output.dense",
    "cross_attn_sublayer": "crossattention.output.LayerNorm",
}


@pytest.mark.parametrize(
    ("kind", "window", "noise"),
    [
        ("resid", 1, PUBLISHED),
        ("resid", 3, ADDED),
        ("attn_sublayer", 3, PUBLISHED),
        ("cross_attn_sublayer", 3, PUBLISHED),
        ("attn", 1, ADDED),
        ("cross_attn", 1, SCALED),
        ("mlp", 1, PUBLISHED),
    ],
)
def test_every_cell_is_that_of_a_loop_over_transformers(kind, window, noise):
    theirs, ours = VQA.pair()
    inputs = one_row(VQA)
    length, layers = inputs["input_ids"].shape[1], VQA.size.text[1]
    result = CT.trace(ours, inputs, window=window, kind=kind, noise=noise, draws=2, seed=7, **QUIET)
    loop = Loop(theirs, inputs)
    top = int(loop.logits.argmax())

    def prob(logits):
        return float(logits.softmax(-1)[top])

    assert result.provenance["answers"] == [str(top)]
    assert result.clean.item() == pytest.approx(prob(loop.logits), abs=1e-10)
    n_draws = 1 if noise is SCALED else 2
    assert result.corrupt.shape == (1, n_draws)
    for draw in range(n_draws):

        def noised(x, draw=draw):
            return corrupted(x, noise, 7, draw)

        assert result.corrupt[0, draw] == pytest.approx(prob(loop.run(noised)), abs=1e-10)
        for stack, model, positions in (
            ("text", "text_encoder", length),
            ("decoder", "text_decoder.bert", 1),
        ):
            found = result.maps[stack][0, draw]
            assert found.shape == (layers, positions)
            for layer in range(layers):
                around = range(max(0, layer - window // 2), min(layers, layer + window // 2 + 1))
                names = [f"{model}.encoder.layer.{at}.{MODULES[kind]}" for at in around]
                for position in range(positions):
                    expected = prob(loop.run(noised, names, position))
                    assert found[layer, position] == pytest.approx(expected, abs=1e-10)
    moved = abs(result.data - result.corrupt)
    assert float(moved.max()) > 1e-3  # something passes


@pytest.mark.parametrize("on", ["embeddings", "pixels"])
@pytest.mark.parametrize("member", [ALBEF_VQA, LLAMA], ids=str)
def test_every_cell_is_that_of_full_passes_with_hooks(member, on):
    model, inputs = built(member), one_row(member, seed=3)
    result = CT.trace(model, inputs, on=on, noise=ADDED, draws=2, seed=1, **QUIET)
    points = [site.name for site in result.sites]
    clean, cache = model.run_with_cache(**inputs, names_filter=points)
    top = int(clean[0, -1].argmax())
    for draw in range(2):
        pixels = inputs["pixel_values"]
        given, standing = inputs, []
        if on == "pixels":
            e = CT.drawn(pixels.shape, 1, draw, "0").to(pixels)
            given = inputs | {"pixel_values": pixels + 3 * pixels.std(correction=0) * e}
        else:
            standing = [("hook_image_embeds", lambda x, hook, d=draw: corrupted(x, ADDED, 1, d))]
        corrupt = model.run_with_hooks(**given, fwd_hooks=standing)
        expected = corrupt[0, -1].softmax(-1)[top]
        assert result.corrupt[0, draw] == pytest.approx(float(expected), abs=1e-10)
        for number, name in enumerate(points):
            for position in range(cache[name].shape[1]):

                def restore(x, hook, name=name, position=position):
                    x[:, position] = cache[name][:, position]
                    return x

                logits = model.run_with_hooks(**given, fwd_hooks=[*standing, (name, restore)])
                found = result.data[0, draw, number, position]
                expected = float(logits[0, -1].softmax(-1)[top])
                assert found == pytest.approx(expected, abs=1e-10)
    assert float(abs(result.difference).max()) > 1e-3


def test_stacks_and_sites_that_are_traced_by_default():
    assert list(CT.trace(built(VQA), one_row(VQA), **QUIET).maps) == ["text", "decoder"]
    member = LLAMA
    result = CT.trace(built(member), one_row(member), **QUIET)
    names = [f"text.blocks.{layer}.hook_resid_post" for layer in range(member.text[1])]
    assert [site.name for site in result.sites] == names
    albef = CT.trace(built(ALBEF_VQA), one_row(ALBEF_VQA), kind="cross_attn", **QUIET)
    assert albef.maps["text"]["layer"].values.tolist() == [1, 2]  # the fusion layers
    assert albef.maps["decoder"]["layer"].values.tolist() == [0]


# --- noise


def test_noise_is_what_its_equation_says():
    clean = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]])
    e = torch.tensor([[[1.0, -1.0], [0.5, 0.0]], [[1.0, 1.0], [0.0, -1.0]]])
    times = CT.Noise("multiplicative", mean=2.0, std=0.5).of(clean, e)
    assert times.tolist() == [[[2.5, 3.0], [6.75, 12.0]], [[0.0, 0.0], [0.0, 6.0]]]
    # Deviations of the images: mean 3, squares 4 1 0 9; mean 1, squares 1 1 1 9.
    sigma = torch.tensor([3.5, 3.0]).sqrt()[:, None, None]
    added = CT.Noise("additive", std=2.0).of(clean, e)
    torch.testing.assert_close(added, clean + 2 * sigma * e)
    assert CT.Noise("scale", factor=0.5).of(clean, e).equal(clean / 2)
    defaults = {kind: CT.Noise(kind) for kind in ("multiplicative", "additive", "scale")}
    assert (defaults["multiplicative"].mean, defaults["multiplicative"].std) == (1.0, 5.0)
    assert defaults["additive"].std == 3.0 and defaults["scale"].factor == 0.7691


def test_draws_are_standard_normal_and_decided_by_seed_draw_and_example():
    one = CT.drawn((400, 250), 0, 0, "a")
    assert one.dtype == torch.float32
    assert abs(one.mean()) < 0.015 and abs(one.std() - 1) < 0.015  # 4 deviations of 10^5 numbers
    assert CT.drawn((400, 250), 0, 0, "a").equal(one)
    for other in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")):
        assert abs((CT.drawn((400, 250), *other) * one).mean()) < 0.015  # uncorrelated


def test_the_seed_and_the_name_decide_the_numbers():
    model = toy("toy-blip-vqa")
    first, second = shapes_pairs(2, 0, "vqa", attribute="color")
    settings = {"positions": None, "stacks": "text", "metric": P.log_prob("red"), **QUIET}
    both = CT.trace(model, [first, second], draws=2, **settings)
    turned = CT.trace(model, [second, first], draws=3, **settings)
    for pair in (first, second):
        one, other = (result.data.sel(example=pair.name) for result in (both, turned))
        np.testing.assert_allclose(one, other.isel(draw=slice(2)), atol=1e-4)
        assert abs(other.isel(draw=2) - other.isel(draw=1)).max() > 1e-3
    again = CT.trace(model, [first, second], draws=2, **settings)
    assert again.data.equals(both.data)
    reseeded = CT.trace(model, [first, second], draws=2, seed=1, **settings)
    assert abs(reseeded.corrupt - both.corrupt).min() > 1e-3


@pytest.mark.parametrize(
    ("noise", "on"),
    [
        (CT.Noise("multiplicative", mean=1.0, std=0.0), "embeddings"),
        (CT.Noise("additive", std=0.0), "pixels"),
        (CT.Noise("scale", factor=1.0), "embeddings"),
    ],
    ids=str,
)
def test_no_noise_restores_nothing(noise, on):
    for member in (VQA, LLAMA)[: 1 + (noise.kind == "scale")]:
        rows = [one_row(member, seed) for seed in (0, 1)]
        result = CT.trace(built(member), rows, noise=noise, on=on, draws=2, **QUIET)
        assert abs(result.corrupt - result.clean).max() < 1e-13
        assert abs(result.difference).max() < 1e-13
        assert result.undefined == 2 and result.normalised.isnull().all()
        assert result.mean()["n"].max() == 0
        with pytest.raises(ValueError, match="in no example do clean and corrupt runs differ"):
            result.keep(0.01)


# --- what follows by construction


LEAVES = ["hook_resid_post", "hook_normalized_resid_post", "hook_mlp_out", "hook_*attn_out"]
LEAVES += ["hook_resid_mid*", "hook_normalized_resid_mid*", "hook_resid_pre"]


@pytest.mark.parametrize(
    ("member", "on"),
    [
        (ALBEF_VQA, "embeddings"),
        (MISTRAL, "embeddings"),
        (LLAMA, "pixels"),
        *(
            pytest.param(member, on, marks=pytest.mark.slow)
            for member in (VQA, LLAMA, *OTHERS)
            for on in ("embeddings", "pixels")
            if (member, on) != (LLAMA, "pixels")
        ),
    ],
    ids=str,
)
def test_cells_are_marked_exactly_where_they_are_the_clean_run(member, on):
    model, inputs, marked = built(member), one_row(member), 0
    names = [
        name
        for stack in list(model.stacks)[on == "embeddings" :]
        for name in model.hook_names()
        if any(fnmatchcase(name, f"{stack}.blocks.*.{leaf}") for leaf in LEAVES)
    ]
    for window, positions in ((1, "each"), (3, "each"), (1, None)):
        settings = {"metric": two(model), "noise": ADDED, "on": on, "draws": 1}
        result = CT.trace(model, inputs, names, positions, window, **settings, **QUIET)
        assert abs(result.clean - result.corrupt).item() > 1e-6
        off = abs(result.data - result.clean).isel(draw=0, drop=True)
        sure = result.by_construction
        assert (off.where(sure, 0) < 1e-10).all()
        assert (off.where(~sure & off.notnull(), 1) > 1e-12).all()
        marked += int(sure.sum())
    assert marked > 0


@pytest.mark.parametrize("member", FEW, ids=str)
def test_all_positions_of_the_last_layer_of_the_text(member):
    """The whole stream that is read: the clean run, in BLIP's question and elsewhere."""
    model = built(member)
    result = CT.trace(model, one_row(member), positions=None, stacks="text", draws=2, **QUIET)
    last = result.maps["text"].isel(layer=-1)
    assert abs(last - result.clean).max() < 1e-12
    assert result.by_construction.values[0, -1]


def test_the_only_position_of_the_decoder():
    result = CT.trace(built(VQA), one_row(VQA), draws=3, **QUIET)
    decoder = result.sites.index(next(s for s in result.sites if s.name.startswith("decoder.")))
    sure = result.by_construction.values[0]
    assert sure.sum() == 1 and sure[-1, 0]  # of 3 layers of each stack, the decoder's last
    assert decoder == 3 and len(sure) == 6
    np.testing.assert_allclose(result.normalised[0, :, -1, 0], 1.0, atol=1e-9)
    assert all(site.name != result.sites[-1].name for site in result.top(100))
    assert np.isclose(result.mean()["mean"].values[-1, 0], 1.0)


@pytest.mark.parametrize("member", FUSED, ids=str)
def test_before_the_image_is_read_nothing_can_be_restored(member):
    """Self-attention of the first block, of a late fusion all blocks before it: shared noise."""
    model = built(member)
    stack = list(model.stacks)[1]
    before = [f"{stack}.blocks.0.{name}" for name in ("attn.hook_z", "hook_attn_out")]
    before += [f"{stack}.blocks.{at}.hook_mlp_out" for at in range(member.fusion)]
    result = CT.trace(model, one_row(member), before, metric=two(model), **QUIET)
    assert result.data.sizes["position"] > 1
    assert abs(result.difference).max() < 1e-12
    assert abs(result.clean - result.corrupt).min() > 1e-4


def test_the_image_encoder_is_restored_behind_noise_on_pixels():
    model, inputs = built(VQA), one_row(VQA)
    patches = model.cfg.vision.n_ctx
    each = CT.trace(model, inputs, on="pixels", stacks="vision", **QUIET)
    assert each.data.shape == (1, 5, 1, patches) and not each.by_construction.any()
    corner = P.Region(0, 0, 1, 1)
    some = CT.trace(
        model, inputs, on="pixels", stacks="vision", positions=[corner, "image", None], **QUIET
    )
    np.testing.assert_allclose(some.data[..., 0], each.data[..., 1], atol=1e-12)
    assert some.by_construction.values.tolist() == [[[False, False, True]]]
    np.testing.assert_allclose(some.data[0, :, 0, 2], some.clean.item(), atol=1e-12)


def test_parts_of_the_embeddings_are_restored():
    """Where in the image the answer comes from: noise everywhere but at some patches."""
    model, inputs = built(VQA), one_row(VQA)
    site = "hook_image_embeds"
    result = CT.trace(model, inputs, site, positions=[(1, 2), None], noise=PUBLISHED, **QUIET)
    clean, cache = model.run_with_cache(**inputs, names_filter=site)
    top = int(clean[0, -1].argmax())
    for draw in range(5):

        def write(x, hook, draw=draw):
            x = corrupted(x, PUBLISHED, 0, draw)
            x[:, 1:3] = cache[site][:, 1:3]
            return x

        logits = model.run_with_hooks(**inputs, fwd_hooks=[(site, write)])
        expected = float(logits[0, -1].softmax(-1)[top])
        assert result.data[0, draw, 0, 0] == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(result.data[0, :, 0, 1], result.clean.item(), atol=1e-12)
    assert result.by_construction.values.tolist() == [[[False, True]]]


def test_windows_write_the_layers_around_them():
    model, inputs = built(VQA), one_row(VQA)
    once = {"draws": 1, **QUIET}
    found = CT.trace(model, inputs, kind="attn", stacks="text", window=3, **once)
    sites = model.sites("text.blocks.*.hook_attn_out")
    by_hand = [P.together(sites[max(0, at - 1) : at + 2]) for at in range(3)]
    result = CT.trace(model, inputs, by_hand, **once)
    np.testing.assert_allclose(found.data, result.data, atol=1e-13)
    assert found.maps["text"]["layer"].values.tolist() == [0, 1, 2]
    single = CT.trace(model, inputs, [P.together(site) for site in sites], **once)
    plain = CT.trace(model, inputs, sites, window=1, **once)
    np.testing.assert_allclose(single.data, plain.data, atol=1e-13)


# --- examples, answers and metrics


def test_answers():
    model = toy("toy-blip-vqa")
    pair = next(p for p in shapes_pairs(9, 0, "vqa", attribute="color") if p.answer != p.foil)
    kept = {"positions": None, "stacks": "text", "draws": 2, **QUIET}
    inputs = model.prepare(pair.image, pair.text)
    logits = model(**inputs)[0, -1]
    top, probs = int(logits.argmax()), logits.softmax(-1)
    for given, word, kind in (
        (None, model.tokenizer.convert_ids_to_tokens(top), {}),
        (CT.OWN, pair.answer, {}),
        ("green", "green", {}),
        (model.to_single_token("green"), "green", {}),
        (None, "red", {"metric": P.prob("red")}),
    ):
        result = CT.trace(model, pair, answer=given, **kept, **kind)
        assert result.provenance["answers"] == [word]
        expected = float(probs[model.to_single_token(word)])
        assert result.clean.item() == pytest.approx(expected, abs=1e-5)
    differing = CT.trace(model, pair, answer=CT.OWN, metric=P.logit_diff(), **kept)
    ids = [model.to_single_token(word) for word in (pair.answer, pair.foil)]
    assert differing.clean.item() == pytest.approx(float(logits[ids[0]] - logits[ids[1]]), abs=1e-4)
    tuples = [(pair.image, pair.text, "green"), (pair.image, pair.text)]
    result = CT.trace(model, tuples, **kept)
    assert result.data["example"].values.tolist() == ["0", "1"]
    assert result.clean.values == pytest.approx([float(probs[top])] * 2, abs=1e-5)
    assert CT.trace(model, tuples[0], answer=CT.OWN, **kept).provenance["answers"] == ["green"]


def test_an_itm_model_measures_its_own_decision_or_the_margin():
    model, inputs = built(ITM), ITM.inputs(3)
    probs = model(**inputs).softmax(-1)
    settings = {"positions": None, "draws": 1, **QUIET}
    result = CT.trace(model, inputs, **settings)
    names = ["no match", "match"]
    assert result.provenance["answers"] == [names[int(at)] for at in probs.argmax(-1)]
    assert result.clean.values == pytest.approx(probs.max(-1).values.numpy(), abs=1e-10)
    match = CT.trace(model, inputs, answer=1, **settings)
    assert match.clean.values == pytest.approx(probs[:, 1].numpy(), abs=1e-10)
    margin = CT.trace(model, inputs, metric=P.itm_margin(), **settings)
    log_odds = (probs[:, 1] / probs[:, 0]).log().numpy()
    assert margin.clean.values == pytest.approx(log_odds, abs=1e-9)
    assert margin.provenance["answers"] == [None] * 3


def test_padded_rows_are_traced_like_each_alone():
    """Where padding stands nothing is restored; the noise is that of the row's number."""
    model, rows = built(VQA), VQA.inputs(3)
    rows = {name: value for name, value in rows.items() if not name.startswith("decoder")}
    result = CT.trace(model, rows, draws=2, **QUIET)
    lengths = rows["attention_mask"].sum(1).tolist()
    assert lengths == [5, 4, 3]
    text = result.maps["text"]
    assert text.notnull().any(("draw", "layer")).sum("position").values.tolist() == lengths
    inner = {name: value[:1] for name, value in rows.items()}
    alone = CT.trace(model, inner, draws=2, **QUIET)
    np.testing.assert_allclose(alone.maps["text"][0], text[0], atol=1e-12)
    with pytest.raises(ValueError, match=r"examples '0' and '1' have 5 and 4 positions"):
        result.mean()
    with pytest.raises(ValueError, match="trace by role"):
        result.plot()
    by_role = CT.trace(model, rows, positions=["first", "last"], stacks="text", draws=2, **QUIET)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            by_role.data[row, ..., 1], result.data[row, :, :3, length - 1], atol=1e-12
        )
    assert by_role.mean()["n"].values.tolist() == [[3, 3]] * 3


def test_roles():
    model = toy("toy-blip-vqa")
    questions = [
        Pair(pair.image, text, pair.corrupt_image, roles={"noun": noun})
        for pair, (text, noun) in zip(
            shapes_pairs(2, 0, "vqa"),
            [("what color is the circle?", "circle"), ("where is the square?", "square")],
            strict=True,
        )
    ]
    result = CT.trace(model, questions, positions=["first", "noun"], draws=1, **QUIET)
    each = CT.trace(model, questions, draws=1, stacks="text", **QUIET)
    for row, (question, noun) in enumerate(zip(questions, ("circle", "square"), strict=True)):
        at = model.to_str_tokens(question.text).index(noun)
        found = result.maps["text"].sel(position="noun")[row]
        np.testing.assert_allclose(found, each.maps["text"][row, ..., at], atol=1e-5)
    assert result.maps["decoder"]["position"].values.tolist() == ["first"]
    (reason,) = result.provenance["excluded"]
    assert reason.startswith("'decoder' has no positions of role 'noun'")


# --- results


def made(data, clean, corrupt, sure=None, tokens=None, places=None):
    """A result of [example, draw, layer, position] numbers of a text stack."""
    data = np.asarray(data, dtype=float)
    examples, draws, layers, positions = data.shape
    sites = [f"text.blocks.{layer}.hook_resid_post" for layer in range(layers)]
    names = [f"q{number}" for number in range(examples)]
    coords = {
        "example": names,
        "site": sites,
        "position": list(range(positions)),
        "stack": ("site", ["text"] * layers),
        "layer": ("site", list(range(layers))),
        "component": ("site", ["hook_resid_post"] * layers),
        "head": ("site", [None] * layers),
    }
    dims = ("example", "draw", "site", "position")
    flags = np.zeros(data.shape[:1] + data.shape[2:], dtype=bool) if sure is None else sure
    return TraceResult(
        xr.DataArray(data, dims=dims, coords=coords | {"draw": range(draws)}),
        xr.DataArray(clean, dims="example", coords={"example": names}),
        xr.DataArray(corrupt, dims=("example", "draw"), coords={"example": names}),
        xr.DataArray(flags, dims=("example", "site", "position"), coords=coords),
        tuple(Site.parse(name) for name in sites),
        tuple(tokens or [{}] * examples),
        {
            "noise": "none",
            "on": "embeddings",
            "metric": "prob",
            "answers": ["x"] * examples,
            "each": True,
            "places": list(range(positions)),
        },
    )


def test_means_over_draws_and_examples_by_hand():
    # Two examples, two draws, one layer, two positions; the second example hangs on nothing.
    data = [[[[0.5, 0.2]], [[0.9, 0.3]]], [[[0.7, 0.7]], [[0.7, 0.7]]]]
    result = made(data, [0.9, 0.7], [[0.1, 0.5], [0.7, 0.7]])
    np.testing.assert_allclose(result.difference[0, :, 0], [[0.4, 0.1], [0.4, -0.2]])
    np.testing.assert_allclose(result.normalised[0, :, 0], [[0.5, 0.125], [1.0, -0.5]])
    assert result.normalised[1].isnull().all() and result.undefined == 1
    mean = result.mean()
    # Mean gain over mean gap, 0.6: 0.4 / 0.6 and -0.05 / 0.6.
    np.testing.assert_allclose(mean["mean"][0], [2 / 3, -1 / 12])
    assert mean["n"].values.tolist() == [[1, 1]]
    np.testing.assert_allclose(mean["deviation"][0], [0, 0.3 / 0.6 / 2**0.5], atol=1e-12)
    gains = result.mean("difference")
    np.testing.assert_allclose(gains["mean"][0], [0.2, -0.025])  # the second adds nothing
    np.testing.assert_allclose(result.mean("data")["mean"][0], [0.7, 0.475])
    kept = result.keep(0.5)
    assert kept.data["example"].values.tolist() == ["q0"]
    assert kept.provenance["dropped"] == 1 and len(kept.tokens) == 1
    interval = result.mean("data", ci="bootstrap")
    assert (interval["low"] <= interval["mean"]).all() and (interval["high"] >= 0.7 - 1e-9).any()


def test_a_single_draw_has_no_deviation():
    result = made([[[[0.5]]]], [0.9], [[0.1]])
    assert result.mean()["mean"].item() == pytest.approx(0.5)
    assert np.isnan(result.mean()["deviation"].item())


def test_a_picture_names_its_rows_and_hatches_what_is_by_construction():
    data = np.linspace(0, 1, 12).reshape(1, 1, 3, 4)
    sure = np.zeros((1, 3, 4), dtype=bool)
    sure[0, 2] = True
    tokens = [{"text": ["[start]", "what", "color", "[end]"]}]
    result = made(data, [1.0], [[0.0]], sure, tokens)
    figure = result.plot()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == tokens[0]["text"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    corners = {(patch.get_x() + 0.5, patch.get_y() + 0.5) for patch in hatched}
    assert corners == {(2, row) for row in range(4)}
    assert "by construction" in axes.get_title().replace("\n", " ")
    given = result.plot(labels=list("abcd")).axes[0]
    assert [label.get_text() for label in given.get_yticklabels()] == list("abcd")
    with pytest.raises(ValueError, match="there are 2 labels for 4 rows of 'text'"):
        result.plot(labels=["a", "b"])
    with pytest.raises(KeyError, match="there is no map of 'decoder', only of"):
        result.plot("decoder")
    (best,) = result.top(1)
    assert (best.name, best.position) == ("text.blocks.1.hook_resid_post", 3)
    frame = result.to_dataframe()
    assert len(frame) == 12 and frame["by_construction"].sum() == 4
    row = frame[(frame["layer"] == 1) & (frame["position"] == 2)].iloc[0]
    assert row["token"] == "color" and row["restored"] == pytest.approx(6 / 11)


def test_rows_where_examples_have_other_words():
    tokens = [{"text": ["[start]", "red", "[end]"]}, {"text": ["[start]", "blue", "[end]"]}]
    result = made(np.zeros((2, 1, 2, 3)), [1.0, 1.0], [[0.0], [0.0]], tokens=tokens)
    labels = result.plot().axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["[start]", "word 1", "[end]"]


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_of_any_size_give_the_same_numbers(rows):
    """Cells of several doors and draws run together, or one by one."""
    for member in (VQA, LLAMA):
        model, inputs = built(member), one_row(member)
        settings = {"draws": 2, "progress": False}
        if member is LLAMA:
            settings["positions"] = ["last", 1]
        one = CT.trace(model, inputs, max_rows=64, **settings)
        other = CT.trace(model, inputs, max_rows=rows, **settings)
        np.testing.assert_allclose(one.data, other.data, atol=1e-12)


def test_rows_of_a_real_picture():
    model = toy("toy-blip-vqa")
    pair = shapes_pairs(1, 0, "vqa", attribute="color")[0]
    result = CT.trace(model, pair, draws=1, **QUIET)
    words = model.to_str_tokens(pair.text)
    for stack, expected in (
        ("text", ["[start]", *words[1:-1], "[end]"]),
        ("decoder", ["[decode]"]),
    ):
        labels = result.plot(stack).axes[0].get_yticklabels()
        assert [label.get_text() for label in labels] == expected
    again = CT.trace(model, pair, result.top(2), draws=1, **QUIET)
    best = result.mean()["mean"].where(~result.by_construction[0]).max()
    assert again.mean()["mean"].max() == pytest.approx(float(best), abs=1e-4)
    assert again.data.dims == ("example", "draw", "site")


# --- planted truth


@pytest.mark.parametrize(
    "name",
    ["planted-blip-reader", pytest.param("planted-blip-distractors", marks=pytest.mark.slow)],
)
def test_scores_find_the_planted_head(name):
    model, card = planted.load(name)
    sites = model.sites(["*.heads.*.hook_z", "*.hook_mlp_out"])
    pairs = planted.pairs(4, 0, task=model.task)
    found = CT.scores(model, pairs, sites, draws=3)
    assert set(found) == {site.name for site in sites}
    nodes = [node.name for node in card.nodes if not node.name.startswith("vision.")]
    ranked = sorted(found, key=lambda site: -found[site])
    assert set(ranked[: len(nodes)]) == set(nodes)
    assert found[ranked[len(nodes)]] < 0.1 * found[nodes[0]]
    in_front = [score for site, score in found.items() if site.startswith("vision.")]
    assert in_front and set(in_front) == {0.0}
    eye = next(node.name for node in card.nodes if node.name.startswith("vision."))
    seen = CT.scores(model, pairs, [eye], on="pixels", draws=3)
    assert seen[eye] > 0.5 * found[nodes[0]]


# --- what is refused


def test_what_is_refused():
    model, inputs = built(VQA), one_row(VQA)
    clip = CLIP[0]
    for settings, said in (
        ({"window": 2}, "a window has a layer in its middle: it is 1, 3, 5, …, not 2"),
        ({"window": 0}, "not 0"),
        ({"draws": 0}, "draws is at least 1, not 0"),
        ({"max_rows": 0}, "max_rows is at least 1, not 0"),
        ({"stacks": "eye"}, "there is no stack 'eye'; this model has"),
        ({"stacks": "vision"}, "'vision.blocks.0.hook_resid_post' is computed before the noise"),
        (
            {"stacks": "vision", "kind": "cross_attn", "on": "pixels"},
            "'vision' has no 'cross_attn'",
        ),
        ({"positions": 9}, r"'text.blocks.0.*' has no position 9, it has 4 positions"),
        ({"positions": []}, "an empty list of positions"),
        ({"positions": P.Each(width=9)}, r"Each\(width=9, stride=1\) has no place in example '0'"),
        ({"sites": "text.blocks.0.hook_mlp_out", "kind": "mlp"}, "leave out kind= and stacks="),
        ({"answer": CT.OWN}, "example '0' has no answer of its own"),
        ({"answer": 3, "metric": P.prob(4)}, "prob has an answer, 4: leave out answer="),
        ({"answer": 3, "metric": P.kl()}, "kl reads no answer"),
        ({"metric": P.logit_diff()}, "logit_diff needs the foil"),
        ({"sites": "hook_image_embeds", "window": 3}, "'hook_image_embeds' is not in one"),
    ):
        with pytest.raises(ValueError, match=said):
            CT.trace(model, inputs, **QUIET | settings)
        assert not model.list_hooks()
    with pytest.raises(KeyError, match=r"no hook 'text\.hook_nothing'"):
        CT.trace(model, inputs, "text.hook_nothing", **QUIET)
    with pytest.raises(ValueError, match="a CLIP has none"):
        CT.trace(built(clip), clip.inputs(1), **QUIET)
    with pytest.raises(ValueError, match=r"none of \['text'\] has 'cross_attn'"):
        CT.trace(built(LLAMA), one_row(LLAMA), kind="cross_attn", **QUIET)
    with pytest.raises(ValueError, match="example '0' has no pixel_values"):
        words = {"input_ids": torch.tensor([[3, 4]])}
        CT.trace(built(LLAMA), words, **QUIET)
    image = shapes_pairs(1, 0, "vqa")[0].image
    with pytest.raises(ValueError, match="this model has no processor"):
        CT.trace(model, (image, "what color is it?"), **QUIET)
    with pytest.raises(ValueError, match="example 1 is a str"):
        CT.trace(model, [inputs, "what color is it?"], **QUIET)
    with pytest.raises(ValueError, match="no examples were given"):
        CT.trace(model, [], **QUIET)
    with pytest.raises(ValueError, match="'circle square' is not one token"):
        CT.trace(toy("toy-blip-vqa"), (image, "what is it?"), answer="circle square", **QUIET)


def test_noise_that_is_refused():
    for given, said in (
        (("multiplicative", None, -1.0, None), "std not below 0: -1.0"),
        (("additive", 1.0, None, None), "'additive' noise takes std, no mean"),
        (("scale", None, 3.0, None), "'scale' noise takes factor, no std"),
        (("scale", None, None, float("nan")), "factor of noise is a finite number"),
    ):
        with pytest.raises(ValueError, match=said):
            CT.Noise(*given)


def test_nothing_stays_behind_when_a_pass_fails():
    model, inputs = built(VQA), one_row(VQA)

    def broken(logits):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        CT.trace(model, inputs, metric=broken, **QUIET)
    assert not model.list_hooks()
    before = model(**inputs)
    CT.trace(model, inputs, draws=1, **QUIET)
    assert torch.equal(model(**inputs), before) and not model.list_hooks()


def test_floats_of_single_precision():
    member = Member("captioning", Size((12, 1, 2), (12, 2, 2), image=16))
    theirs, ours = member.pair(torch.float32)
    inputs = member.inputs(1, padded=False, dtype=torch.float32)
    result = CT.trace(ours, inputs, draws=1, **QUIET)
    double = HookedBLIP.from_hf(theirs.double())
    exact = CT.trace(double, member.inputs(1, padded=False), draws=1, **QUIET)
    assert error(torch.tensor(result.data.values), torch.tensor(exact.data.values)) < 1e-5
