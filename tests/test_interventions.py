"""Every intervention, at every kind of site and place, equals a full pass with it written in."""

import functools

import numpy as np
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from whole_zoo import ZOO
from zoo import QUIET, built, total

from hooked_vlm import patching as P
from hooked_vlm.models.names import Site
from hooked_vlm.patching.cells import module_of

EXACT = 1e-10


@functools.cache
def sides(member, padded):
    """Two inputs of one row, and their unpatched activations."""
    rows = [member.inputs(2, padded=padded, seed=seed, dtype=torch.float64) for seed in (0, 1)]
    if member.task == "clip":
        one = [{**x, "pixel_values": x["pixel_values"][:1]} for x in rows]
    else:
        one = [member.chosen(x, [1]) for x in rows]  # the shorter text: padded
        mask = one[0].get("attention_mask")
        for other in one[1:] if mask is not None else ():
            other["attention_mask"] = mask
    return one


def draw_value(name, own, other, what):
    """What an intervention writes in the place of a module's whole activation."""
    if what == "patch":
        return other
    if what == "zero":
        return torch.zeros_like(own)
    if what == "steer":
        return own + 0.5 * torch.linspace(-1, 1, own.shape[-1]).to(own)
    drawn = torch.randn(own.shape[1:], generator=torch.Generator().manual_seed(7))
    drawn = drawn.to(own)
    return own * (1 + 0.3 * drawn) if what == "multiply" else own + 0.3 * drawn


def intervention(what, own):
    return {
        "patch": P.patch(),
        "zero": P.zero(),
        "steer": P.steer(torch.linspace(-1, 1, own.shape[-1]), 0.5),
        "noise": P.noise(0.3, seed=7),
        "multiply": P.noise(0.3, seed=7, multiply=True),
    }[what]


def naive(model, target, other, cells, what):
    """A full pass of `target` with everything that a cell names written in, one for each cell.

    `cells` are lists of (name, positions); positions are numbers, or None for all.
    """
    found = []
    for writes in cells:
        hooks = []
        for name, positions in writes:
            module = module_of(name)
            _, theirs = model.run_with_cache(**other, names_filter=module)
            head, axis = Site.parse(name).head, model.hook_dict[module].head_axis
            place = model.hook_dict[module].pos_dim

            def write(x, hook, value=theirs[module], head=head, axis=axis, at=positions, p=place):
                new = draw_value(hook.name, x.clone(), value, what)
                keep = torch.ones_like(x, dtype=torch.bool)
                if head is not None:
                    keep.select(axis, head).fill_(False)
                else:
                    keep.fill_(False)
                if at is not None:
                    inside = torch.zeros_like(keep)
                    inside.index_fill_(p, torch.tensor(at) % x.shape[p], True)
                    keep |= ~inside
                return torch.where(keep, x, new)

            hooks.append((module, write))
        found.append(total(model.run_with_hooks(**target, fwd_hooks=hooks)))
    return torch.cat(found).numpy()


def close(ours, theirs):
    return np.abs(ours - theirs).max() <= EXACT * max(1, np.abs(theirs).max())


def writable(model):
    names = [n for n in model.hook_names(heads=True) if not n.endswith("hook_scale")]
    return [n for n in names if "hook_result" not in n]


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_site_with_any_intervention(data):
    """Sites of all stacks, heads too, at all positions or some, alone or together."""
    member = data.draw(st.sampled_from([m for m in ZOO if m.task != "clip"]))
    model, padded = built(member), data.draw(st.booleans())
    clean, corrupt = sides(member, padded)
    names = data.draw(st.lists(st.sampled_from(writable(model)), min_size=1, max_size=3))
    what = data.draw(st.sampled_from(["patch", "zero", "noise", "multiply", "steer"]))
    if what == "steer":
        names = names[:1]
    _, cache = model.run_with_cache(**clean, names_filter=[module_of(n) for n in names])
    sites = []
    for name in names:
        axis, value = model.hook_dict[module_of(name)].pos_dim, cache[module_of(name)]
        length = value.shape[axis] if axis is not None and value.dim() > 2 else 0
        some = st.integers(-length, length - 1) if length else st.none()
        several = st.lists(some, min_size=2, max_size=3) if length else st.none()
        at = data.draw(st.one_of(st.none(), some, several))
        sites.append(Site.parse(name, tuple(at) if isinstance(at, list) else at))
    on = data.draw(st.sampled_from(["clean", "corrupt"]))
    together = data.draw(st.booleans())
    swept = [P.together(sites)] if together else list(dict.fromkeys(sites))
    result = P.ablate(
        model,
        [clean, corrupt] if what != "patch" else [(clean, corrupt)],
        swept,
        intervention(what, cache[module_of(names[0])]),
        total,
        on="clean" if what != "patch" else on,
        max_rows=data.draw(st.integers(1, 4)),
        **QUIET,
    )
    each = [
        [(s.name, (s.position,) if isinstance(s.position, int) else s.position) for s in cell]
        for cell in ([sites] if together else [[s] for s in result.sites])
    ]
    inputs = [clean, corrupt] if what != "patch" else [clean if on == "clean" else corrupt]
    expected = [naive(model, one, corrupt if one is clean else clean, each, what) for one in inputs]
    assert close(result.data.values.reshape(len(inputs), -1), np.stack(expected))
