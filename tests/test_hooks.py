"""Reading and writing by name: every point, every head, and nothing left behind."""

import functools

import pytest
import torch
from whole_zoo import ZOO
from zoo import BLIP, error

from hooked_vlm import HookedVLM
from hooked_vlm.components import memory

ITM, CAPTIONING, VQA = BLIP
WRITE_ONLY_IN_VAIN: dict[str, str] = {}  # points that cannot be written, with the reason: none
HEADED = ("hook_q", "hook_attn_scores", "hook_pattern", "hook_z", "hook_result", "hook_rot_q")
HEADED_KV = ("hook_k", "hook_v", "hook_rot_k")  # may be fewer
each_task = pytest.mark.parametrize("member", ZOO, ids=str)


@functools.cache
def built(member, dtype: torch.dtype = torch.float64) -> HookedVLM:
    return member.model(dtype)


@pytest.fixture
def model(member):
    model = built(member)
    yield model
    assert model.list_hooks() == {} and model.context_level == 0, "a hook stayed behind"


@pytest.fixture
def inputs(member):
    return member.inputs(3)


def add_noise(x, hook):
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x).abs()


# --- writing


@each_task
def test_every_point_and_every_head_is_writable(model, inputs, member):
    logits = model(**inputs)
    for name in model.hook_names(heads=True):
        written = model.run_with_hooks(**inputs, fwd_hooks=[(name, add_noise)])
        assert (error(written, logits) > 1e-7) == (name not in WRITE_ONLY_IN_VAIN), name


@each_task
def test_writing_the_same_changes_nothing(model, inputs):
    """Every point listens at once, so every computation runs in the open."""
    logits = model(**inputs)
    every = [(model.hook_names(heads=True), lambda x, hook: x.clone())]
    assert error(model.run_with_hooks(**inputs, fwd_hooks=every), logits) < 1e-10


@pytest.mark.parametrize("name", ["text.blocks.1.attn.hook_z", "text.blocks.1.attn.heads.1.hook_z"])
@pytest.mark.parametrize("dir", ["fwd", "bwd"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda x, hook: x[:1], "shape"),
        (lambda x, hook: x.float(), "dtype"),
        (lambda x, hook: x.to("meta"), "device"),
        (lambda x, hook: x.tolist(), "list"),
        (lambda x, hook: 0.0, "float"),
    ],
)
@pytest.mark.parametrize("member", [ITM], ids=str)
def test_a_result_that_does_not_fit_raises(model, inputs, name, dir, wrong, said):
    with (
        pytest.raises(ValueError, match=said) as raised,
        model.hooks(**{f"{dir}_hooks": [(name, wrong)]}),
    ):
        pixels = inputs["pixel_values"].requires_grad_()
        model(**inputs | {"pixel_values": pixels}).sum().backward()
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_an_exception_leaves_nothing_behind(model, inputs):
    def fail(x, hook):
        raise ArithmeticError("mine")

    name = "text.blocks.*.cross_attn.heads.*.hook_z"
    for run in (
        lambda: model.run_with_hooks(**inputs, fwd_hooks=[(name, fail)]),
        lambda: model.run_with_cache(
            **inputs, names_filter=["hook_logits"], incl_bwd=True, metric=lambda x: 1 / 0
        ),
    ):
        with pytest.raises(ArithmeticError):
            run()
        assert model.list_hooks() == {} and model.context_level == 0 and not model.is_caching
    with pytest.raises(KeyError):
        model.run_with_hooks(**inputs, fwd_hooks=[("hook_logits", fail), ("no.such", fail)])


@each_task
def test_edits_in_place_stay_where_they_are(model, inputs):
    """They change what is computed from the point, and no weight, fork or cached entry."""
    weights = {n: p.clone() for n, p in model.named_parameters()}
    before = {k: v.clone() for k, v in inputs.items()}
    logits = model(**inputs)

    def zero(x, hook):
        x.zero_()

    for name in model.hook_names(heads=True):
        if ".blocks.1." in name or ".heads.0." in name:
            continue  # one block and one head of it stand for the others
        with model.hooks(fwd_hooks=[(name, zero)]):
            edited = model(**inputs)
        replaced = model.run_with_hooks(
            **inputs, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))]
        )
        assert torch.equal(edited.nan_to_num(), replaced.nan_to_num()), name
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(v, before[k]) for k, v in inputs.items())
    assert torch.equal(model(**inputs), logits)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    "name",
    ["text.blocks.1.hook_resid_pre", "text.blocks.1.attn.heads.0.hook_q", "vision.hook_pos_embed"],
)
@pytest.mark.parametrize("member", [ITM], ids=str)
def test_a_writer_never_reaches_cached_entries(model, inputs, name, inside):
    """Points upstream keep their values, and so does what was cached before the writer ran."""
    _, clean = model.run_with_cache(**inputs, names_filter=["*", name])
    entries, cached, _ = model.get_caching_hooks(["*", name])
    writer = (name, lambda x, hook: x.mul_(0))
    if inside:
        with model.hooks([writer]):
            _, cache = model.run_with_cache(**inputs, names_filter=["*", name])
        assert cache[name].abs().max() == 0  # the writer ran first
    else:
        model.run_with_hooks(**inputs, fwd_hooks=[*cached, writer])
        cache = entries
        assert torch.equal(cache[name], clean[name])
    upstream = list(clean)[: list(clean).index(name)]
    assert all(torch.equal(cache[n], clean[n]) for n in upstream)


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_the_modules_point_runs_before_its_heads(model, inputs):
    order, seen = [], {}

    def note(x, hook):
        order.append(hook.name)
        seen[hook.name] = x.clone()
        return x + 1

    whole = "text.blocks.0.attn.hook_z"
    heads = [f"text.blocks.0.attn.heads.{i}.hook_z" for i in (1, 0)]
    fwd = [(heads[0], note), (whole, note), (heads[1], note)]
    model.run_with_hooks(**inputs, fwd_hooks=[*fwd, ("text.blocks.0.hook_attn_out", note)])
    assert order == [whole, heads[1], heads[0], "text.blocks.0.hook_attn_out"]
    assert torch.equal(seen[heads[0]], seen[whole][:, :, 1] + 1)
    attn = model.text.blocks[0].attn
    written = seen[whole] + 1
    written += 1
    assert error(seen["text.blocks.0.hook_attn_out"], attn.o(written.flatten(-2))) < 1e-12


# --- names


@each_task
def test_heads_are_made_on_first_use(member, inputs):
    model = member.model()
    model(**inputs)
    model.run_with_cache(**inputs)
    model.hook_names(heads=True)
    assert not any(point.heads for point in model.hook_dict.values())
    names = model.hook_names(heads=True)
    cfg_of = {name: stack.cfg for name, stack in model.stacks.items()}
    expected = 0
    for name in model.hook_names():
        cfg = cfg_of.get(name.partition(".")[0])
        expected += cfg.n_heads if name.endswith(HEADED) else 0
        expected += cfg.n_key_value_heads if name.endswith(HEADED_KV) else 0
    assert len(names) - len(model.hook_names()) == expected
    head = next(name for name in names if name.endswith(".heads.1.hook_pattern"))
    assert head in model.hook_dict and model.hook_dict.get("vision.nothing") is None
    assert model.hook_dict[head] is model.hook_dict[head]
    assert model.hook_dict[head].name == head and head not in list(model.hook_dict)
    inside = next(name for name in names if ".blocks.1.attn.heads.1." in name)
    assert model.hook_dict[inside].layer() == 1


@pytest.mark.parametrize("member", [VQA], ids=str)
def test_globs_filters_and_sites(model, inputs):
    def names(names_filter):
        return list(model.run_with_cache(**inputs, names_filter=names_filter)[1])

    assert names("*.blocks.1.cross_attn.hook_pattern") == [
        "text.blocks.1.cross_attn.hook_pattern",
        "decoder.blocks.1.cross_attn.hook_pattern",
    ]
    assert len(names("text.blocks.*.cross_attn.heads.*.hook_z")) == 2 * 2
    assert "vision.blocks.0.attn.hook_result" in names("*hook_result")
    assert names(lambda name: name.endswith("hook_z")) == names("*.hook_z")
    assert names(["hook_logits", "vision.hook_embed"]) == ["vision.hook_embed", "hook_logits"]
    everything = names(None)
    assert not any("heads" in n or "hook_result" in n for n in everything)
    assert set(everything) == {n for n in model.hook_names() if not n.endswith("hook_result")}
    assert set(names("*")) == set(everything)
    sites = model.sites("*.blocks.*.cross_attn.heads.1.hook_z", positions=[0, 2])
    assert len(sites) == 2 * 2 * 2
    last = sites[-1]
    assert (last.stack, last.layer, last.component) == ("decoder", 1, "cross_attn.hook_z")
    assert (last.head, last.position) == (1, 2)
    (glue,) = model.sites("unembed.hook_pre")
    assert (glue.stack, glue.layer, glue.head, glue.component) == (
        "unembed",
        None,
        None,
        "hook_pre",
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text.blocks.2.hook_resid_pre", "text has 2 blocks (0 to 1)"),
        ("text.blocks.2.hook_resid_pre", "Nearest: 'text.blocks."),
        ("text.blocks.0.attn.heads.2.hook_z", "has 2 heads (0 to 1)"),
        ("text.blocks.0.attn.heads.-1.hook_z", "Nearest"),
        ("text.blocks.0.heads.0.hook_resid_pre", "Nearest"),
        ("text.blocks.0.attn.hook_zz", "'text.blocks.0.attn.hook_z'"),
        ("texts.*", "Nearest"),
        ([], "empty"),
        (["hook_logits", "hook_logit"], "'hook_logits'"),
        (lambda name: False, "function"),
    ],
)
@pytest.mark.parametrize("member", [ITM], ids=str)
def test_names_that_nothing_has(model, inputs, name, said):
    for use in (
        lambda: model.run_with_cache(**inputs, names_filter=name),
        lambda: model.run_with_hooks(**inputs, fwd_hooks=[(name, add_noise)]),
        lambda: model.add_hook(name, add_noise),
        lambda: model.sites(name),
    ):
        with pytest.raises(KeyError) as raised:
            use()
        assert said in str(raised.value).replace('\\"', '"').replace("\\'", "'")
    if isinstance(name, str):
        with pytest.raises(KeyError):
            model.hook_dict[name]
        with pytest.raises(KeyError):
            model.run_with_cache(**inputs, stop_at=name)


# --- hooks that stay, and their end


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_permanent_and_standing_hooks(model, inputs):
    logits = model(**inputs)
    head = "text.blocks.0.cross_attn.heads.1.hook_v"
    model.add_hook("text.blocks.*.attn.hook_z", add_noise)
    model.add_hook(head, add_noise, is_permanent=True)
    assert list(model.list_hooks("text.blocks.*.hook_z")) == [
        "text.blocks.0.attn.hook_z",
        "text.blocks.1.attn.hook_z",
    ]
    model.reset_hooks()
    assert list(model.list_hooks()) == [head]
    assert model.list_hooks(including_permanent=False) == {} == model.list_hooks(dir="bwd")
    permanent = model(**inputs)
    assert error(permanent, logits) > 1e-6
    with model.hooks([("text.hook_embed", add_noise)]):
        outer = model(**inputs)
        with model.hooks([("vision.hook_embed", add_noise)]):
            assert error(model(**inputs), outer) > 1e-6
        assert torch.equal(model(**inputs), outer)
    assert torch.equal(model(**inputs), permanent)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(model(**inputs), logits)


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_caching_hooks_that_stay(model, inputs):
    entries = model.add_caching_hooks("text.blocks.*.attn.heads.0.hook_z")
    model(**inputs)
    _, cache = model.run_with_cache(**inputs, names_filter="text.blocks.*.attn.hook_z")
    assert sorted(entries) == [f"text.blocks.{i}.attn.heads.0.hook_z" for i in (0, 1)]
    assert all(torch.equal(value, cache[name]) for name, value in entries.items())
    model.reset_hooks()


# --- gradients


@each_task
def test_gradients_of_heads_are_slices_of_the_modules(model, inputs):
    run = functools.partial(model.run_with_cache, incl_bwd=True, metric=lambda x: x.square().sum())
    _, whole = run(**inputs, names_filter=["*", "*hook_result"])
    heads = [n for n in model.hook_names(heads=True) if ".heads." in n]
    _, alone = run(**inputs, names_filter=heads)
    assert len(alone) == 2 * len(heads)
    for name in heads:
        for key in (name, f"{name}_grad"):
            view = whole[key]
            assert error(alone[key], view, 0.0) < 1e-9 or view.abs().max() < 1e-14, key
    some = next(name for name in heads if name.endswith(".heads.1.hook_z"))
    module = whole[some.replace("heads.1.", "")]
    assert whole[some].data_ptr() == module[:, :, 1].data_ptr()


@pytest.mark.parametrize("name", ["text.blocks.0.attn.heads.1.hook_z", "text.blocks.0.attn.hook_z"])
@pytest.mark.parametrize("member", [ITM], ids=str)
def test_backward_hooks_replace_gradients(model, inputs, name):
    """Doubling the gradient at a point doubles what is upstream through it alone."""
    read = "text.blocks.0.attn.hook_v"
    _, plain = model.run_with_cache(
        **inputs, names_filter=read, incl_bwd=True, metric=lambda x: x[:, 1].sum()
    )
    seen = {}

    def keep(grad, hook):
        seen[hook.name] = grad.clone()

    bwd = [(name, lambda grad, hook: 2 * grad), (read, keep)]
    logits = model.run_with_hooks(**inputs, bwd_hooks=bwd, reset_hooks_end=False)
    logits[:, 1].sum().backward()
    model.reset_hooks()
    factor = torch.ones(2, 1).double()
    factor[1 if "heads" in name else slice(None)] = 2
    assert error(seen[read], plain[f"{read}_grad"] * factor, 0.0) < 1e-10


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_edits_of_gradients_in_place_stay_where_they_are(model, inputs):
    """A residual sum hands one gradient to both of its summands; a hook on one edits a copy."""
    out, resid, upstream = (
        "text.blocks.1.hook_cross_attn_out",
        "text.blocks.1.hook_normalized_resid_mid",
        "text.blocks.1.cross_attn.hook_z",
    )
    run = functools.partial(
        model.run_with_cache, incl_bwd=True, metric=lambda x: x[:, 1].sum(), names_filter="*"
    )
    _, clean = run(**inputs)

    def edit(grad, hook):
        grad.zero_()

    with model.hooks(bwd_hooks=[(out, lambda grad, hook: grad.zero_())]):
        _, returned = run(**inputs)
    with model.hooks(bwd_hooks=[(out, edit)]):
        _, edited = run(**inputs)
    for cache in (returned, edited):
        assert cache[f"{upstream}_grad"].abs().max() == 0
        through = clean["text.blocks.1.hook_resid_mid_cross_grad"]
        assert error(cache[f"{resid}_grad"], through, 0.0) < 1e-10


@pytest.mark.parametrize(
    "name", ["text.blocks.0.attn.heads.1.hook_z", "vision.blocks.0.attn.hook_pattern"]
)
@pytest.mark.parametrize("member", [ITM], ids=str)
def test_forward_and_backward_hooks_share_a_point(model, inputs, name):
    """The gradient is that of what the forward hook wrote, as autograd tells it of a leaf."""
    seen, leaf = [], []
    model.run_with_hooks(
        **inputs,
        fwd_hooks=[(name, lambda x, hook: x.mul_(0.5))],
        bwd_hooks=[(name, lambda grad, hook: seen.append(grad.clone()))],
        reset_hooks_end=False,
    )[:, 1].sum().backward()
    model.reset_hooks()

    def write_leaf(x, hook):
        leaf.append((0.5 * x).requires_grad_())
        return leaf[0]

    logits = model.run_with_hooks(**inputs, fwd_hooks=[(name, write_leaf)])
    (expected,) = torch.autograd.grad(logits[:, 1].sum(), leaf)
    assert len(seen) == len(leaf) == 1 and expected.abs().max() > 1e-6
    assert error(seen[0], expected, 0.0) < 1e-10


def test_maps_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    """The numbers are those of a pattern and its scores: 2 * 3 * 2 * 8 * 8 of eight bytes."""
    member = next(member for member in ZOO if member.task == "llava")
    model, inputs = built(member), member.inputs(3, padded=False)
    length = inputs["input_ids"].shape[1]
    needed = 2 * 3 * 2 * length**2 * 8
    monkeypatch.setattr(memory, "LARGE", 0)
    for there, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(memory, "free", lambda device, there=there: there)
        if fits:
            model.run_with_cache(**inputs, names_filter="text.blocks.1.attn.hook_pattern")
            continue
        said = (
            rf"{needed / 2**30:.1f} GiB are needed and {there / 2**30:.1f} GiB are free on cpu: "
            rf"'text.blocks.1.attn.hook_pattern' is \[3, 2, {length}, {length}\]"
        )
        with pytest.raises(MemoryError, match=said):
            model.run_with_cache(**inputs, names_filter="text.blocks.1.attn.hook_pattern")
    model(**inputs)  # fused attention makes no map
    assert model.list_hooks() == {}
