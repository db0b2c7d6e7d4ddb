"""Activation patching equals one full pass per patch, and says what it measured."""

import functools
import re

import numpy as np
import pytest
import torch
from zoo import BLIP, blip_reference

from hooked_vlm import HookedBLIP
from hooked_vlm import patching as P
from hooked_vlm.components.stack import VisionStack
from hooked_vlm.data import Pair, shapes, shapes_pairs
from hooked_vlm.toys.tokenizer import build_processor

EXACT = 1e-10
TASKS = ("itm", "captioning", "vqa")
TOYS = {task: f"toy-blip-{task}" for task in TASKS}
HEADS = "{}.blocks.*.cross_attn.heads.*.hook_z"
QUIET = {"progress": False}


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def random_model(task):
    """Random weights in float64 that read the toys' words and pictures."""
    size = next(member.size for member in BLIP if member.task == task)
    processor = build_processor()
    processor.image_processor.size = {"height": size.image, "width": size.image}
    theirs = blip_reference(task, replaced(size, len(processor.tokenizer)), torch.float64)
    theirs.config.text_config.bos_token_id = processor.tokenizer.bos_token_id
    return HookedBLIP.from_hf(theirs, processor)


def replaced(size, vocab):
    fields = {name: getattr(size, name) for name in size.__dataclass_fields__}
    return type(size)(**(fields | {"vocab": vocab}))


@functools.cache
def toy(task):
    return HookedBLIP.from_pretrained(TOYS[task])


@functools.cache
def scenes():
    return shapes.minimal_pairs(1, seed=5, attribute="color")[0]


def reader(model):
    return next(name for name in model.stacks if name != "vision")


def pair_of(task, corrupt):
    """A pair whose image, text, or both are corrupt."""
    scene = scenes()
    images = {"corrupt_image": scene.corrupt.image()} if corrupt != "text" else {}
    words = ("red", "blue")
    if task == "vqa":
        texts = "is the circle red or blue?", "is the square red or blue?"
    else:
        texts = "a red circle left", "a blue circle left"
    given = {"corrupt_text": texts[1]} if corrupt != "image" else {}
    return Pair(scene.clean.image(), texts[0], **images, **given, answer=words[0], foil=words[1])


def sides(model, pair):
    """Clean and corrupt inputs, each prepared by itself."""
    corrupt = pair.image if pair.corrupt_image is None else pair.corrupt_image
    texts = pair.texts or [None, None]
    return [
        model.prepare_prompt(image, text)
        for image, text in zip((pair.image, corrupt), texts, strict=True)
    ]


def measure(model, pair, logits):
    """The default metric, written out."""
    logits = logits[0] if logits.dim() == 2 else logits[0, -1]
    if model.task == "itm":
        return float(logits[1] - logits[0])
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in (pair.answer, pair.foil)]
    return float(logits[ids[0]] - logits[ids[1]])


def naive(model, pair, names, positions, direction):
    """One full pass per patch, [site, position]; and both unpatched runs."""
    inputs = sides(model, pair)
    ends = [measure(model, pair, model(**one)) for one in inputs]
    source, target = inputs if direction == "denoise" else inputs[::-1]
    rows = []
    for name in names:
        _, cache = model.run_with_cache(**source, names_filter=name)
        value = cache[name]
        axis = 2 if re.search(r"(?<!heads\.\d\.)hook_(pattern|attn_scores)$", name) else 1

        def write(x, hook, value=value, position=None, axis=axis):
            if position is None:
                return value.clone()
            x.select(axis, position).copy_(value.select(axis, position))
            return x

        hooks = [functools.partial(write, position=at) for at in positions or [None]]
        logits = [model.run_with_hooks(**target, fwd_hooks=[(name, hook)]) for hook in hooks]
        rows.append([measure(model, pair, one) for one in logits])
    return np.array(rows), ends


def check(model, pair, sites, positions=None, direction="denoise", at=None, exact=EXACT):
    """The sweep against the naive loop; returns the sweep's result."""
    names = [site.name for site in model.sites(sites)]
    expected, (clean, corrupt) = naive(model, pair, names, at, direction)
    result = P.activation_patching(model, pair, sites, None, positions, direction, **QUIET)
    values = result.data.values.reshape(expected.shape)
    assert np.abs(values - expected).max() < exact * max(1, np.abs(expected).max())
    assert abs(result.clean.item() - clean) < exact * max(1, abs(clean))
    assert abs(result.corrupt.item() - corrupt) < exact * max(1, abs(corrupt))
    assert [site.name for site in result.sites] == names
    return result


# --- the sweep equals the naive loop


@pytest.mark.parametrize("corrupt", ["image", "text", "both"])
@pytest.mark.parametrize("task", TASKS)
def test_every_cross_attention_head_in_both_directions(task, corrupt):
    model, pair = random_model(task), pair_of(task, corrupt)
    for direction in ("denoise", "noise"):
        for stack in list(model.stacks)[1:]:
            result = check(model, pair, HEADS.format(stack), direction=direction)
            cfg = model.stacks[stack].cfg
            assert result.data.sizes == {"pair": 1, "layer": cfg.n_layers, "head": cfg.n_heads}
            start = result.corrupt if direction == "denoise" else result.clean
            assert (abs(result.data - start) > 1e-9).any()  # patches do something


@pytest.mark.parametrize("corrupt", ["image", "text"])
@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_site(task, corrupt):
    """All ordinary points that a sweep can name, at once: resumed at many doors."""
    model, pair = random_model(task), pair_of(task, corrupt)
    check(model, pair, "*hook_*", direction="denoise")


@pytest.mark.parametrize("task", TASKS)
def test_heads_of_every_kind(task):
    model, pair = random_model(task), pair_of(task, "both")
    stack = reader(model)
    for glob in (
        "vision.blocks.*.attn.heads.*.hook_z",
        f"{stack}.blocks.*.attn.heads.*.hook_z",
        f"{stack}.blocks.1.cross_attn.heads.*.hook_pattern",
        f"{stack}.blocks.*.cross_attn.heads.1.hook_k",
        f"{stack}.blocks.0.attn.heads.*.hook_attn_scores",
        f"{stack}.blocks.1.cross_attn.heads.*.hook_result",
    ):
        check(model, pair, glob, direction="noise")


@pytest.mark.parametrize("task", TASKS)
def test_positions(task):
    model, pair = random_model(task), pair_of(task, "both")
    stack, length = reader(model), sides(model, pair)[0]["input_ids"].shape[1]
    for glob in (
        f"{stack}.blocks.*.hook_resid_pre",
        f"{stack}.blocks.*.hook_mlp_out",
        f"{stack}.blocks.*.cross_attn.heads.*.hook_z",
        f"{stack}.blocks.1.attn.hook_pattern",
        f"{stack}.blocks.1.cross_attn.heads.0.hook_pattern",
    ):
        result = check(model, pair, glob, "each", at=range(length))
        assert result.data["position"].values.tolist() == list(range(length))
        for positions in (1, -1, [2, 0, -2]):
            at = list(positions) if isinstance(positions, list) else [int(positions)]
            result = check(model, pair, glob, positions, at=at)
            assert result.data["position"].values.tolist() == at


def test_each_counts_the_positions_of_the_sites():
    model, pair = random_model("vqa"), pair_of("vqa", "image")
    n_image = model.cfg.vision.n_ctx
    for site, count in {
        "vision.blocks.1.hook_resid_pre": n_image,
        "hook_image_embeds": n_image,
        "text.blocks.0.cross_attn.hook_k": n_image,
        "decoder.blocks.0.hook_resid_pre": 1,
    }.items():
        result = check(model, pair, site, "each", at=range(count))
        assert result.data.sizes["position"] == count
    with pytest.raises(ValueError, match="needs sites with the same positions"):
        P.activation_patching(
            model, pair, ["hook_image_embeds", "text.hook_embed"], positions="each", **QUIET
        )


@pytest.mark.parametrize("max_rows", [1, 3, 64])
def test_the_size_of_the_batch_changes_nothing(max_rows):
    model, pair = random_model("itm"), pair_of("itm", "image")
    sites = ["text.blocks.*.cross_attn.heads.*.hook_z", "text.blocks.*.hook_*_out"]
    expected, _ = naive(model, pair, [s.name for s in model.sites(sites)], None, "denoise")
    result = P.activation_patching(model, pair, sites, max_rows=max_rows, **QUIET)
    assert np.abs(result.data.values.ravel() - expected.ravel()).max() < EXACT * 10


@pytest.mark.parametrize("task", TASKS)
def test_on_the_toys(task):
    model = toy(task)
    for pair in shapes_pairs(2, 3, task):
        for stack in list(model.stacks)[1:]:
            check(model, pair, HEADS.format(stack), exact=1e-5)


def test_prepared_inputs_are_the_short_form():
    for task in TASKS:
        model = random_model(task)
        pair = pair_of(task, "both")
        inputs = tuple(sides(model, pair))
        metric = P.itm_margin() if task == "itm" else P.logit_diff("red", "blue")
        sites = HEADS.format(reader(model))
        short = P.activation_patching(model, inputs, sites, metric, **QUIET)
        long = P.activation_patching(model, pair, sites, **QUIET)
        np.testing.assert_allclose(short.data.values, long.data.values, rtol=0, atol=1e-12)
        np.testing.assert_allclose(short.clean.values, long.clean.values, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="logit_diff needs the answer: give one"):
        P.activation_patching(model, inputs, sites, **QUIET)
    longer = model.prepare(pair.image, "is the big circle red or blue?")
    with pytest.raises(ValueError, match=r"positions do not align: input_ids is \[1, 9\]"):
        P.activation_patching(model, (inputs[0], longer), sites, metric, **QUIET)


def test_short_forms_first_token_is_recorded():
    model, pair = random_model("itm"), pair_of("itm", "image")
    inputs = [
        model.prepare(image, pair.text, first_token="enc")
        for image in (pair.image, pair.corrupt_image)
    ]
    result = P.activation_patching(model, tuple(inputs), "text.hook_embed", **QUIET)
    assert result.provenance["first_token"] == "enc"
    again = P.activation_patching(model, pair, "text.hook_embed", first_token="enc", **QUIET)
    assert result.clean.item() == pytest.approx(again.clean.item(), abs=1e-12)
    assert again.provenance["first_token"] == "enc"


# --- identities


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("task", TASKS)
def test_patching_everything_gives_the_other_run_and_nothing_changes_nothing(task, direction):
    model = random_model(task)
    everything = {"image": "hook_image_embeds", "text": f"{reader(model)}.hook_embed"}
    for corrupt, site in everything.items():
        other = everything["text" if corrupt == "image" else "image"]
        pair = pair_of(task, corrupt)
        for name, restored in ((site, 1), (other, 0)):
            result = P.activation_patching(model, pair, name, None, None, direction, **QUIET)
            assert result.restored.item() == pytest.approx(restored, abs=1e-9)
    result = P.activation_patching(model, pair, "hook_logits", None, None, direction, **QUIET)
    assert result.restored.item() == pytest.approx(1, abs=1e-9)


# --- what it costs


class Calls:
    """Counts calls of modules."""

    def __init__(self, modules):
        self.counts = dict.fromkeys(modules, 0)
        self.rows = dict.fromkeys(modules, 0)
        self.handles = [
            module.register_forward_hook(functools.partial(self.count, name))
            for name, module in modules.items()
        ]

    def count(self, name, module, args, output):
        self.counts[name] += 1
        self.rows[name] += len(args[0])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(("corrupt", "n_images"), [("text", 1), ("image", 2)])
@pytest.mark.parametrize("task", TASKS)
def test_images_are_encoded_and_projected_once(task, corrupt, n_images):
    model, pair = random_model(task), pair_of(task, corrupt)
    stack = model.stacks[reader(model)]
    assert isinstance(model.vision, VisionStack)
    modules = {"patches": next(m for m in model.vision.modules() if "Conv" in type(m).__name__)}
    modules["vision mlp"] = model.vision.blocks[0].mlp.fc_in
    for layer, block in enumerate(stack.blocks):
        modules |= {f"k{layer}": block.cross_attn.k, f"v{layer}": block.cross_attn.v}
        modules |= {f"q{layer}": block.cross_attn.q}
    with Calls(modules) as calls:
        P.activation_patching(model, pair, HEADS.format(reader(model)), **QUIET)
    for name in modules:
        if not name.startswith("q"):
            assert (calls.counts[name], calls.rows[name]) == (1, n_images), name
    assert calls.rows["q1"] > 2  # the counting counts


# --- pairs


def test_pairs_have_their_own_answers():
    model = random_model("captioning")
    one, two = pair_of("captioning", "image"), pair_of("captioning", "image")
    two = Pair(two.image, two.text, two.corrupt_image, answer="circle", foil="square", name="two")
    sites = HEADS.format("decoder")
    result = P.activation_patching(model, [one, two], sites, **QUIET)
    assert result.data["pair"].values.tolist() == ["0", "two"]
    for index, pair in enumerate((one, two)):
        expected, (clean, corrupt) = naive(
            model, pair, [s.name for s in model.sites(sites)], None, "denoise"
        )
        np.testing.assert_allclose(result.data.values[index].ravel(), expected.ravel(), atol=1e-9)
        assert result.clean.values[index] == pytest.approx(clean, abs=1e-9)
        assert result.corrupt.values[index] == pytest.approx(corrupt, abs=1e-9)
    fixed = P.activation_patching(model, [one, two], sites, P.logit_diff("red", "blue"), **QUIET)
    np.testing.assert_allclose(fixed.data.values[1], fixed.data.values[0], atol=1e-9)
    assert abs(fixed.data.values[1] - result.data.values[1]).max() > 1e-3


def test_texts_of_unequal_lengths_name_the_pair_and_both_tokenizations():
    scene = scenes().clean
    for task in ("itm", "captioning"):
        pair = Pair(scene.image(), "a red circle", None, "a red zoo", "a", "red", name="odd")
        says = (
            r"pair 'odd': positions do not align, the clean text has 5 tokens and the corrupt one "
            r"7: '\[CLS\] a red circle \[SEP\]', '\[CLS\] a red z ##o ##o \[SEP\]'"
        )
        with pytest.raises(ValueError, match=says):
            P.activation_patching(random_model(task), pair, "hook_logits", **QUIET)


def test_pairs_of_unequal_lengths_have_each_their_own_positions():
    model, scene = random_model("itm"), scenes().clean
    short = Pair(scene.image(), "a red circle", None, "a red square", name="short")
    long = Pair(scene.image(), "a large red circle", None, "a large red square", name="long")
    name = "text.blocks.0.hook_mlp_out"
    both = P.activation_patching(model, [short, long], name, positions="each", **QUIET)
    assert both.data.shape == (2, 1, 6)
    for pair, length in ((short, 5), (long, 6)):
        alone = P.activation_patching(model, pair, name, positions="each", **QUIET)
        there = both.data.sel(pair=pair.name).values[0]
        np.testing.assert_allclose(there[:length], alone.data.values[0, 0], rtol=0, atol=EXACT)
    assert np.isnan(both.data.sel(pair="short").values[0, 5:]).all()


def test_a_caption_from_nothing():
    model, scene = random_model("captioning"), scenes()
    pair = Pair(scene.clean.image(), None, scene.corrupt.image(), answer="a", foil="red")
    result = check(model, pair, HEADS.format("decoder"), "each", at=[0])
    assert result.data.sizes["position"] == 1


# --- metrics by hand


def test_metrics_by_hand():
    made_up = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, np.log(2)]], dtype=torch.float64)
    last = torch.stack([-made_up, made_up], dim=1)  # [batch, pos, d_vocab]
    for logits in (made_up, last):
        assert P.logit_diff(1, 0)(logits).tolist() == [2, 0]
        assert P.prob(2)(logits)[1].item() == pytest.approx(0.5)
        e = np.exp
        expected = e(3) / (e(1) + e(3) + e(2))
        assert P.prob(1)(logits)[0].item() == pytest.approx(expected)
        assert P.log_prob(1)(logits)[0].item() == pytest.approx(np.log(expected))
        assert P.log_prob(0)(logits)[1].item() == pytest.approx(np.log(0.25))
    assert P.itm_margin()(torch.tensor([[2.0, 5.0], [1.0, 0.5]])).tolist() == [3, -0.5]


def test_metrics_that_cannot_be_read():
    logits = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"logit_diff needs the token id of its answer: give mod"):
        P.logit_diff("red", "blue")(logits)
    with pytest.raises(ValueError, match="prob needs the token id of its answer: give its id"):
        P.prob()(logits)
    with pytest.raises(ValueError, match=r"itm_margin reads two logits, not 3"):
        P.itm_margin()(logits)
    with pytest.raises(ValueError, match="id 7, of logits that hold 3; the metric of an itm"):
        P.log_prob(7)(logits)


def test_metrics_are_bound_to_words():
    model = random_model("itm")
    ids = model.tokenizer.convert_tokens_to_ids
    pair = pair_of("itm", "image")
    own = P.logit_diff().bind(model, pair)
    assert (own.answer, own.foil) == (ids("red"), ids("blue"))
    fixed = P.logit_diff("green", 3).bind(model, pair)
    assert (fixed.answer, fixed.foil) == (ids("green"), 3)
    bare = Pair(pair.image, pair.text, pair.corrupt_image, answer="red", name="bare")
    with pytest.raises(ValueError, match="logit_diff needs the foil of pair 'bare'"):
        P.logit_diff().bind(model, bare)
    with pytest.raises(ValueError, match="'a zoo' is not one token"):
        P.prob("a zoo").bind(model, bare)


# --- results


def test_top_is_accepted_again():
    model, pair = random_model("itm"), pair_of("itm", "image")
    first = P.activation_patching(model, pair, HEADS.format("text"), **QUIET)
    again = P.activation_patching(model, pair, first.top(3), **QUIET)
    assert {site.name for site in again.sites} == {site.name for site in first.top(3)}
    assert again.top(3) == first.top(3)
    one = P.activation_patching(model, pair, first.top(1)[0], **QUIET)
    assert one.restored.item() == pytest.approx(again.restored.max().item(), abs=1e-9)


def test_top_of_positions_keeps_the_positions():
    model, pair = random_model("itm"), pair_of("itm", "image")
    each = P.activation_patching(model, pair, HEADS.format("text"), positions="each", **QUIET)
    best = each.top(3)
    again = P.activation_patching(model, pair, best, **QUIET)
    told = {(site.name, site.position) for site in best}
    assert {(site.name, site.position) for site in again.sites} == told
    assert again.restored.max().item() == pytest.approx(each.restored.max().item(), abs=1e-9)
    np.testing.assert_array_equal(again.data["position"], [s.position for s in again.sites])
    with pytest.raises(ValueError, match="positions of their own leave no choice"):
        P.activation_patching(model, pair, best, positions=1, **QUIET)


def test_a_plain_function_is_a_metric():
    model, pair = random_model("captioning"), pair_of("captioning", "image")
    site = "decoder.blocks.0.hook_mlp_out"

    def first_position(logits):
        return logits[:, 0, 7]

    result = P.activation_patching(model, pair, site, first_position, **QUIET)
    base = model(**model.prepare_prompt(pair.images, pair.texts))
    assert result.clean.item() == pytest.approx(base[0, 0, 7].item(), abs=1e-9)
    assert result.provenance["metric"] == "first_position"


def test_provenance():
    result = P.activation_patching(
        toy("itm"), shapes_pairs(1, 0, "itm"), "hook_logits", direction="noise", **QUIET
    )
    told = result.provenance
    assert (told["model"], told["task"], told["metric"]) == ("toy-blip-itm", "itm", "itm_margin")
    assert (told["direction"], told["first_token"], told["dtype"]) == ("noise", "cls", "float32")
    assert told["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


# --- faults


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"positions": 40}, "has no position 40, it has 6 positions"),
        ({"positions": [0, -7]}, "has no position -7"),
        ({"positions": []}, "an empty list of positions"),
        ({"sites": "hook_logits", "positions": 0}, "'hook_logits' has no position 0"),
        ({"max_rows": 0}, "max_rows is at least 1"),
        ({"pairs": []}, "no pairs were given"),
        ({"metric": P.logit_diff()}, "id .*, of logits that hold 2; the metric of an itm model"),
    ],
)
def test_wrong_arguments(change, says, capsys):
    model = random_model("itm")
    given = {"pairs": pair_of("itm", "image"), "sites": "text.blocks.*.hook_mlp_out"} | change
    with pytest.raises(ValueError, match=says):
        P.activation_patching(model, **given)
    assert capsys.readouterr().err == ""  # nothing ran, no bar began
    assert model.list_hooks() == {}


def test_sites_that_nothing_matches():
    with pytest.raises(KeyError, match=r"no hook 'text\.blocks\.9"):
        P.activation_patching(
            random_model("itm"), pair_of("itm", "image"), "text.blocks.9.hook_mlp_out", **QUIET
        )


@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_no_hook_stays_after_an_exception(fails_at):
    model, calls = random_model("itm"), []

    def fail(logits, metric):
        calls.append(len(logits))
        if len(calls) == fails_at:
            raise RuntimeError("out of patience")
        return logits[:, 0]

    with pytest.raises(RuntimeError, match="out of patience"):
        P.activation_patching(
            model,
            pair_of("itm", "image"),
            [HEADS.format("text"), "hook_image_embeds"],
            P.Metric("failing", fail),
            **QUIET,
        )
    assert len(calls) == fails_at
    assert model.list_hooks() == {}


def test_an_exception_in_a_standing_hook():
    model = random_model("itm")
    seen = []

    def fail(x, hook):
        seen.append(len(x))
        if len(seen) == 2:  # the base has run
            raise RuntimeError("in the sweep")

    model.add_hook("text.blocks.1.hook_mlp_out", fail)
    try:
        with pytest.raises(RuntimeError, match="in the sweep"):
            P.activation_patching(model, pair_of("itm", "image"), HEADS.format("text"), **QUIET)
        assert set(model.list_hooks()) <= {"text.blocks.1.hook_mlp_out"}
    finally:
        model.reset_hooks()


def test_the_bar_can_be_silenced(capfd):
    model, pair = random_model("itm"), pair_of("itm", "image")
    P.activation_patching(model, pair, HEADS.format("text"), **QUIET)
    quiet = capfd.readouterr()
    assert (quiet.out, quiet.err) == ("", "")
    P.activation_patching(model, pair, HEADS.format("text"))
    assert "4/4" in capfd.readouterr().err


# --- the sweep finds the heads that matter


def accuracy(model, scenes, hooks=()):
    """Share of right verdicts over a true and, for each attribute, a false caption."""
    texts = [
        text
        for scene in scenes
        for text in (scene.caption(), *(scene.negatives(a)[0] for a in shapes.ATTRIBUTES))
    ]
    images = [scene.image() for scene in scenes for _ in range(4)]
    with model.hooks(list(hooks)), torch.no_grad():
        verdict = model(**model.prepare(images, texts)).argmax(-1).view(-1, 4)
    right = verdict == torch.tensor([1, 0, 0, 0])
    return 50 * (right[:, 0].float().mean() + right[:, 1:].float().mean()).item()


def test_ablating_strong_heads_costs_accuracy_and_weak_ones_do_not():
    """Mean ablation, over other scenes' true captions and all positions.

    A sweep sees only what its pairs vary: a head that carries what both runs share is weak in it
    and may yet be needed. So a head is as strong as in the sweep, of either direction and either
    corruption, that shows it best.
    """
    model = toy("itm")
    sweeps = [
        P.activation_patching(
            model,
            shapes_pairs(30, 31, "itm", corrupt=corrupt),
            HEADS.format("text"),
            direction=direction,
            **QUIET,
        )
        for corrupt in ("image", "text")
        for direction in ("denoise", "noise")
    ]
    shares = [abs(sweep.restored).mean("pair").values.flatten() for sweep in sweeps]
    strength = np.max(shares, axis=0)
    names = [sweeps[0].sites[index].name for index in strength.argsort()]
    others = shapes.scenes(100, seed=8, split="held_out")
    inputs = model.prepare([s.image() for s in others], [s.caption() for s in others])
    _, cache = model.run_with_cache(**inputs, names_filter=names)
    held_out = shapes.scenes(150, seed=123, split="held_out")

    def ablated(heads):
        def write(x, hook):
            return cache[hook.name].mean((0, 1)).expand_as(x)

        return accuracy(model, held_out, [(head, write) for head in heads])

    whole = accuracy(model, held_out)
    assert whole > 97
    assert whole - ablated(names[-1:]) > 30  # the strongest
    assert abs(whole - ablated(names[: len(names) // 3])) < 1  # the weakest third, all at once
