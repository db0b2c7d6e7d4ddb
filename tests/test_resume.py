"""A resumed pass equals the full one, and computes nothing that its site cannot reach."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from whole_zoo import FUSED, ZOO
from zoo import BLIP, error

from hooked_vlm import HookedVLM
from hooked_vlm.components import attention
from hooked_vlm.models.names import Site

ITM, CAPTIONING, VQA = BLIP
EXACT = 1e-10
each_task = pytest.mark.parametrize("member", ZOO, ids=str)
each_fused = pytest.mark.parametrize("member", FUSED, ids=str)


@pytest.fixture(autouse=True)
def no_hook_stays():
    yield
    for member in ZOO:
        built(member).reset_hooks()


@functools.cache
def built(member) -> HookedVLM:
    return member.model()


def perturb(x, hook):
    """Depends on the row, the position and the point, but not on the size of the batch."""
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(len(hook.name)))
    return x + noise.to(x).abs() * (
        1 + x.flatten(1).clamp(-9, 9).mean(1).cos().view(-1, *[1] * (x.dim() - 1))
    )


def check(member, inputs, base, names, rows):
    model, hooks = built(member), [(name, perturb) for name in names]
    resumed = model.resume(base, names, rows=rows, fwd_hooks=hooks)
    naive = model.run_with_hooks(**member.chosen(inputs, rows), fwd_hooks=hooks)
    assert error(resumed, naive) < EXACT, (names, rows)
    return naive


@each_task
def test_every_site_resumes_exactly(member):
    model, inputs = built(member), member.inputs(3)
    base = model.base_run(**inputs)
    assert error(base.logits, model(**inputs)) < 1e-14
    for name in model.hook_names(heads=True):
        if ".heads.0." in name:
            continue  # the other heads stand for it
        naive = check(member, inputs, base, [name], [2, 0, 2])
        assert error(naive, base.logits[[2, 0, 2]]) > 1e-7, name
    assert model.list_hooks() == {}


@each_task
def test_single_precision_resumes_as_well(member):
    model, inputs = member.model(torch.float32), member.inputs(2, dtype=torch.float32)
    base = model.base_run(**inputs)
    for name in model.hook_dict.match("*.hook_[zvr]*"):
        hooks = [(name, perturb)]
        naive = model.run_with_hooks(**inputs, fwd_hooks=hooks)
        assert error(model.resume(base, name, fwd_hooks=hooks), naive) < 1e-5, name


@each_fused
def test_one_image_serves_many_texts(member):
    model, inputs = built(member), member.inputs(4, images=1)
    base = model.base_run(**inputs, names_filter=None)  # readers of keys' input, too
    for glob in (
        "hook_image_embeds",
        "vision.blocks.1.hook_resid_mid",
        f"*.blocks.{member.fusion}.cross_attn.*",
    ):
        for name in model.hook_dict.match(glob):
            check(member, inputs, base, [name], [3, 1])


class Calls:
    """Counts the calls of modules, and the rows that they are given."""

    def __init__(self, model, *names):
        self.rows = {}
        self.handles = [
            module.register_forward_hook(functools.partial(self.count, name))
            for name, module in model.named_modules()
            if name.endswith(names)
        ]

    def count(self, name, module, args, output):
        self.rows.setdefault(name, []).append(len(args[0]))

    def __enter__(self):
        return self.rows

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@each_fused
def test_nothing_is_projected_twice(member):
    """Keys and values of an unchanged stack are read from the base; the image's made once."""
    model, inputs = built(member), member.inputs(4, images=1)
    reader, first = member.reader, member.fusion
    with Calls(model, "cross_attn.k", "cross_attn.v") as rows:
        base = model.base_run(**inputs)
    assert rows[f"{reader}.blocks.{first}.cross_attn.k"] == [1]
    site = f"{reader}.blocks.{first}.cross_attn.heads.1.hook_z"
    with Calls(model, "attn.q", "cross_attn.k", "cross_attn.v", "patch") as rows:
        model.resume(base, site, rows=[0, 1, 1, 3, 3, 3], fwd_hooks=[(site, perturb)])
    assert rows.pop(f"{reader}.blocks.{first}.cross_attn.q") == [6]
    assert rows.pop(f"{reader}.blocks.{first + 1}.attn.q") == [6]
    early = tuple(f"{reader}.blocks.{layer}." for layer in range(first + 1))
    assert not any(name.startswith(("vision", *early)) for name in rows)
    if member.task == "vqa":  # the decoder reads the question, which changed
        assert rows.pop("decoder.blocks.0.cross_attn.k") == [6]
        assert not any(name.startswith("decoder.blocks.0.attn") for name in rows)
    else:
        assert not any(name.endswith(("cross_attn.k", "cross_attn.v")) for name in rows)


@pytest.mark.parametrize("member", [VQA], ids=str)
def test_answers_that_share_a_question_share_its_keys(member):
    model, inputs = built(member), member.inputs(3)
    base = model.base_run(**inputs)
    site = "decoder.blocks.1.hook_resid_pre"
    with Calls(model, "cross_attn.k", "attn.q") as rows:
        check_rows = [0, 0, 0, 2, 2, 2]
        model.resume(base, site, rows=check_rows, fwd_hooks=[(site, perturb)])
    assert rows == {"decoder.blocks.1.attn.q": [6], "decoder.blocks.1.cross_attn.q": [6]}
    for rows in (check_rows, [2, 0, 0], [1]):
        check(member, inputs, base, [site], rows)


@each_fused
def test_points_before_the_site_do_not_fire(member):
    model, inputs = built(member), member.inputs(2)
    reader, first = member.reader, member.fusion
    fired = []
    every = lambda x, hook: fired.append(hook.name)  # noqa: E731
    model.run_with_hooks(**inputs, fwd_hooks=[("*", every)])
    order = list(fired)
    base = model.base_run(**inputs)
    site = f"{reader}.blocks.{first + 1}.cross_attn.hook_q"
    after = order[order.index(f"{reader}.blocks.{first + 1}.cross_attn.hook_q_in") :]
    after = [n for n in after if ".cross_attn.hook_kv_in" not in n]
    fired.clear()
    model.resume(base, site, fwd_hooks=[(after, every)])
    assert [name for name in fired if name.startswith((reader, "hook"))] == [
        name for name in after if name.startswith((reader, "hook"))
    ]
    assert not any(name.startswith("vision") for name in fired)


@pytest.mark.parametrize("member", [VQA], ids=str)
def test_several_sites_and_later_hooks(member):
    model, inputs = built(member), member.inputs(3)
    base = model.base_run(**inputs)
    for names in (
        ["text.blocks.1.mlp.hook_post", "text.blocks.0.cross_attn.hook_v"],
        ["decoder.blocks.0.hook_resid_pre", "text.blocks.1.hook_mlp_out"],
        ["vision.blocks.1.attn.hook_pattern", "decoder.hook_embed", "unembed.hook_post"],
        ["decoder.blocks.1.cross_attn.hook_kv_in", "decoder.blocks.1.cross_attn.hook_k"],
    ):
        check(member, inputs, base, names, [1, 2, 1])


@each_fused
def test_standing_hooks_are_heeded(member):
    model, inputs = built(member), member.inputs(3)
    standing = [
        ("vision.blocks.0.hook_mlp_out", perturb),
        ("*.blocks.1.attn.hook_pattern", perturb),
    ]
    plain = model(**inputs)
    with model.hooks(standing):
        base = model.base_run(**inputs)
        site = "hook_image_embeds"
        naive = check(member, inputs, base, [site], [1, 0])
        reader, first = member.reader, member.fusion
        check(member, inputs, base, [f"{reader}.blocks.{first + 1}.hook_resid_pre"], [1, 0])
    assert error(base.logits, plain) > 1e-7 and error(naive, plain[[1, 0]]) > 1e-7
    with pytest.raises(ValueError, match="standing hooks have changed"):
        model.resume(base, site)


@pytest.mark.parametrize("member", [ITM], ids=str)
def test_refusals(member):
    model, inputs = member.model(), member.inputs(3)
    base = model.base_run(**inputs)
    site = "text.blocks.1.hook_resid_pre"
    for rows in ([3], [-1], []):
        with pytest.raises(ValueError, match="rows of the base, 0 to 2"):
            model.resume(base, site, rows=rows)
    for early in (
        "text.blocks.0.hook_resid_post",
        "vision.blocks.1.hook_resid_post",
        "*.hook_embed",
    ):
        with pytest.raises(ValueError, match="would not fire"):
            model.resume(base, site, fwd_hooks=[(early, perturb)])
    with pytest.raises(KeyError, match="Nearest"):
        model.resume(base, "text.blocks.1.hook_resid")
    assert error(model.resume(base, site), base.logits) < EXACT
    inputs["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match="inputs"):
        model.resume(base, site)
    base = model.base_run(**inputs)
    model.text.blocks[0].attn.q.weight.mul_(2)
    with pytest.raises(ValueError, match="weights"):
        model.resume(base, site)
    base = model.base_run(**inputs)
    model.add_hook("vision.hook_embed", perturb)
    with pytest.raises(ValueError, match="standing hooks"):
        model.resume(base, site)
    assert list(model.list_hooks()) == ["vision.hook_embed"]


@each_fused
def test_gradients_of_a_resumed_pass(member):
    """A backward hook sees the gradient that the full pass gives, at the site and behind it."""
    model, inputs = built(member), member.inputs(3)
    base = model.base_run(**inputs)
    reader, first = member.reader, member.fusion
    names = [
        f"{reader}.blocks.{first}.cross_attn.hook_q",
        f"{reader}.blocks.{first + 1}.attn.hook_z",
    ]
    _, cache = model.run_with_cache(
        **inputs, names_filter=names, incl_bwd=True, metric=lambda x: x.square().sum()
    )
    seen = {}
    keep = lambda grad, hook: seen.update({hook.name: grad.clone()})  # noqa: E731
    logits = model.resume(base, names[0], bwd_hooks=[(names, keep)], reset_hooks_end=False)
    logits.square().sum().backward()
    model.reset_hooks()
    for name in names:
        assert error(seen[name], cache[f"{name}_grad"], 0.0) < 1e-9, name


@each_fused
def test_in_place_hooks_leave_the_base_alone(member):
    model, inputs = built(member), member.inputs(2)
    base = model.base_run(**inputs, names_filter=None)
    before = {name: value.clone() for name, value in base.cache.items()}
    for glob in ("*.blocks.0.*hook_resid_pre", "*.cross_attn.hook_*", "hook_image_embeds"):
        for name in model.hook_dict.match(glob):
            model.resume(base, name, fwd_hooks=[(name, lambda x, hook: x.zero_())])
    reader, first = member.reader, member.fusion
    for site in (f"{reader}.blocks.{first}.hook_resid_pre", "vision.blocks.0.hook_resid_pre"):
        assert error(model.resume(base, site), base.logits) < EXACT
    assert all(torch.equal(base.cache[name], value) for name, value in before.items())


@settings(max_examples=25)
@given(data=st.data())
def test_any_sites_and_rows(data):
    member = data.draw(st.sampled_from(ZOO))
    images = data.draw(st.sampled_from([1, 3]))
    model, inputs = built(member), member.inputs(3, images=images)
    names = data.draw(
        st.lists(st.sampled_from(model.hook_names(heads=True)), min_size=1, max_size=3, unique=True)
    )
    base = model.base_run(**inputs)
    rows = data.draw(st.lists(st.integers(0, len(base.logits) - 1), min_size=1, max_size=5))
    check(member, inputs, base, names, rows)


# --- by position, in a causal stack

CAUSAL = [
    BLIP[1],
    VQA,
    *(m for m in ZOO if m.task == "llava" or (m not in BLIP and m.task == "vqa")),
]
each_causal = pytest.mark.parametrize("member", CAUSAL, ids=str)


def causal_stack(member):
    return list(built(member).stacks)[-1]


def at_position(position, reach=None):
    """Writes at one position, whichever positions the pass shows."""

    def write(x, hook):
        told = hook.ctx.get("positions")
        begin = 0 if told is None else int(told[0])
        if reach is not None:
            reach.append((hook.name, begin, x.shape[hook.pos_dim]))
        there = x.select(hook.pos_dim, position - begin)
        noise = torch.randn(there.shape[1:], generator=torch.Generator().manual_seed(1))
        there += noise.to(x).abs() * (1 + there.flatten(1).clamp(-9, 9).mean(1).cos()).view(
            -1, *[1] * (there.dim() - 1)
        )
        return x

    return write


@each_causal
def test_every_point_of_a_causal_stack_resumes_at_its_position(member):
    model, inputs, stack = built(member), member.inputs(3), causal_stack(member)
    base = model.base_run(**inputs)
    length = next(iter(base.stacks[stack].own.values()))[0].shape[1]
    for name in model.hook_dict.match([f"{stack}.*", f"{stack}.blocks.*.heads.*", "hook_logits"]):
        if ".heads.0." in name or name.startswith(f"{stack}.hook_pos_embed"):
            continue
        for position in (1, length - 1, -2):
            of_source = "cross_attn" in name and name.endswith(("_k", "_v", "kv_in"))
            if of_source and position < 0:
                continue
            hooks = [(name, at_position(position % length))]
            site = Site(name, position=position)
            resumed = model.resume(base, site, rows=[2, 0, 2], fwd_hooks=hooks)
            naive = model.run_with_hooks(**member.chosen(inputs, [2, 0, 2]), fwd_hooks=hooks)
            assert error(resumed, naive) < EXACT, (name, position)
    assert model.list_hooks() == {}


@each_causal
def test_nothing_before_the_position_is_computed(member):
    model, stack = built(member), causal_stack(member)
    inputs = member.inputs(3)
    base = model.base_run(**inputs, logits_to_keep=1)
    length = next(iter(base.stacks[stack].own.values()))[0].shape[1]
    assert base.logits.shape[1] == 1
    site = Site(f"{stack}.blocks.0.attn.heads.1.hook_z", position=2)
    seen, computed = [], []
    other = f"{stack}.blocks.{len(model.stacks[stack].blocks) - 1}.hook_resid_post"
    hooks = [(site.name, at_position(2, seen)), (other, at_position(length - 1, seen))]
    handles = [
        module.register_forward_hook(lambda _, args, __: computed.append(tuple(args[0].shape[:2])))
        for name, module in model.named_modules()
        if name.endswith(("mlp.fc_in", "attn.k", "patch"))
    ]
    rows = [1, 1, 0, 2, 2]
    resumed = model.resume(base, [site, Site(other, position=-1)], rows=rows, fwd_hooks=hooks)
    for handle in handles:
        handle.remove()
    assert set(computed) == {(5, length - 2)}
    assert seen == [(site.name, 2, length - 2), (other, 2, length - 2)]
    assert "positions" not in model.hook_dict[other].ctx
    naive = model.run_with_hooks(**member.chosen(inputs, rows), fwd_hooks=hooks)[:, -1:]
    assert resumed.shape == naive.shape and error(resumed, naive) < EXACT
    # Nobody listens behind the site: the last block computes what is read.
    computed.clear()
    last = model.stacks[stack].blocks[-1].mlp.fc_in
    several = len(model.stacks[stack].blocks) > 1
    handle = last.register_forward_hook(lambda _, args, __: computed.append(args[0].shape[1]))
    assert error(model.resume(base, site), base.logits) < EXACT
    handle.remove()
    assert computed == [1 if several else length - 2]  # the site's own block runs whole
    for wrong in (length, -length - 1):
        with pytest.raises(ValueError, match=f"no position {wrong}: '{stack}' has {length}"):
            model.resume(base, Site(site.name, position=wrong))


@each_task
def test_what_a_base_keeps_is_not_edited(member):
    model, inputs = built(member), member.inputs(2)
    name = next(n for n in model.hook_names() if n.endswith("hook_resid_pre"))
    base = model.base_run(**inputs, names_filter=name)
    model.resume(base, name)
    base.cache[name].mul_(2)
    with pytest.raises(ValueError, match=r"kept, which base\.cache shares, were edited"):
        model.resume(base, name)


@each_causal
def test_many_queries_behind_kept_keys_are_fused(member, monkeypatch):
    monkeypatch.setattr(attention, "FEW", 0)
    model, inputs, stack = built(member), member.inputs(3), causal_stack(member)
    base, rows = model.base_run(**inputs), [2, 0, 0, 1]
    for name in model.hook_dict.match([f"{stack}.blocks.*.attn.hook_[qkvz]", f"{stack}.*resid*"]):
        hooks = [(name, at_position(2))]
        resumed = model.resume(base, Site(name, position=2), rows=rows, fwd_hooks=hooks)
        naive = model.run_with_hooks(**member.chosen(inputs, rows), fwd_hooks=hooks)
        assert error(resumed, naive) < EXACT, name


@each_causal
def test_writers_that_no_site_names_see_all_positions(member):
    """Those of the pass and standing ones: as in a full pass with the same hooks."""
    model, inputs, stack = built(member), member.inputs(3), causal_stack(member)

    def index(x, hook):
        x[:, 1] = 0.5
        return x

    other = f"{stack}.blocks.0.hook_mlp_out"
    site = Site(f"{stack}.blocks.0.attn.hook_z", position=2)
    write = (site.name, at_position(2))
    base = model.base_run(**inputs)
    for extra in (other, "hook_logits"):
        hooks = [write, (extra, index)]
        naive = model.run_with_hooks(**inputs, fwd_hooks=hooks)
        assert error(model.resume(base, site, fwd_hooks=hooks), naive) < EXACT, extra
    model.add_hook(other, index)
    base = model.base_run(**inputs)
    naive = model.run_with_hooks(**inputs, fwd_hooks=[write])
    assert error(model.resume(base, site, fwd_hooks=[write]), naive) < EXACT
    model.reset_hooks()


@each_causal
def test_gradients_of_a_pass_resumed_at_a_position(member):
    model, inputs, stack = built(member), member.inputs(3), causal_stack(member)
    names = [f"{stack}.blocks.0.attn.hook_z", f"{stack}.blocks.0.hook_mlp_out"]
    _, cache = model.run_with_cache(
        **inputs, names_filter=names, incl_bwd=True, metric=lambda x: x[:, -1].square().sum()
    )
    base, seen = model.base_run(**inputs, logits_to_keep=1), {}
    sites = [Site(name, position=1) for name in names]
    keep = [(names, lambda grad, hook: seen.update({hook.name: grad.clone()}))]
    logits = model.resume(base, sites, bwd_hooks=keep, reset_hooks_end=False)
    logits.square().sum().backward()
    model.reset_hooks()
    for name in names:
        assert error(seen[name], cache[f"{name}_grad"][:, 1:], 0.0) < 1e-9, name


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_positions_and_sites_together(data):
    member = data.draw(st.sampled_from(CAUSAL))
    model, stack = built(member), causal_stack(member)
    inputs = member.inputs(3, seed=data.draw(st.integers(0, 3)))
    base = model.base_run(**inputs)
    length = next(iter(base.stacks[stack].own.values()))[0].shape[1]
    names = model.hook_dict.match([f"{stack}.blocks.*", f"{stack}.blocks.*.heads.*"])
    points = [name for name in names if "cross_attn" not in name]
    chosen = data.draw(st.lists(st.sampled_from(points), min_size=1, max_size=3, unique=True))
    at = [data.draw(st.integers(0, length - 1)) for _ in chosen]
    rows = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    hooks = [(name, at_position(p)) for name, p in zip(chosen, at, strict=True)]
    sites = [Site(name, position=p) for name, p in zip(chosen, at, strict=True)]
    resumed = model.resume(base, sites, rows=rows, fwd_hooks=hooks)
    naive = model.run_with_hooks(**member.chosen(inputs, rows), fwd_hooks=hooks)
    assert error(resumed, naive) < EXACT
