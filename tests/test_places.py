"""Where a sweep writes: regions, roles, windows."""

import numpy as np
import pytest
from zoo import ITM, QUIET, built, margin, toy

from hooked_vlm import patching as P
from hooked_vlm.data import Pair, read_pairs, shapes_pairs

pytestmark = pytest.mark.usefixtures("no_grad")


def seen_positions(model, inputs, site, place, **roles):
    """The positions that an intervention is told."""
    told = []

    def look(value, at):
        told.append(at.positions)
        return value

    P.ablate(model, inputs, site, look, lambda x: x.flatten(1)[:, 0], place, **QUIET)
    return told


def test_regions_are_the_patches_that_they_touch():
    model = toy("toy-blip-itm")  # 48 pixels, patches of 8
    pair = shapes_pairs(1, 0, "itm", size=96)[0]  # two pixels of the original in one of the model
    inputs = model.prepare(pair.image, pair.text)
    grid = model.cfg.vision.grid
    side = 96 / grid
    one = P.Region(side * 1.2, side * 2.2, side * 1.4, side * 2.4)
    site = "vision.blocks.0.hook_resid_post"
    assert seen_positions(model, inputs, site, one) == [(1 + 2 * grid + 1,)]
    four = P.Region(side * 0.9, side * 1.9, side * 1.1, side * 2.1)
    corner = [1 + grid * row + column for row in (1, 2) for column in (0, 1)]
    assert seen_positions(model, inputs, site, four) == [tuple(corner)]
    whole = tuple(range(1, 1 + grid * grid))
    assert seen_positions(model, inputs, site, "image") == [whole]
    assert seen_positions(model, inputs, "hook_image_embeds", "image") == [whole]
    keys = "text.blocks.0.cross_attn.hook_k"
    assert seen_positions(model, inputs, keys, four) == [tuple(corner)]
    with pytest.raises(ValueError, match=r"Region\(left=200.*touches no patch of 'vision'"):
        seen_positions(model, inputs, site, P.Region(200, 200, 210, 210))
    with pytest.raises(ValueError, match="'text' has no positions of an image"):
        seen_positions(model, inputs, "text.hook_embed", "image")


def test_regions_of_pictures_in_a_text():
    model = toy("toy-llava")
    pair = shapes_pairs(1, 0, "llava", size=48)[0]
    inputs = model.prepare(pair.image, pair.text)
    ids = inputs["input_ids"][0]
    image = (ids == model.cfg.image_token_id).nonzero().flatten().tolist()
    site = "text.blocks.0.hook_resid_post"
    assert seen_positions(model, inputs, site, "image") == [tuple(image)]
    text = tuple(at for at in range(len(ids)) if at not in image)
    assert seen_positions(model, inputs, site, "text") == [text]
    grid = model.cfg.vision.grid
    left = P.Region(0, 0, 0.5, 48)
    assert seen_positions(model, inputs, site, left) == [tuple(image[::grid])]
    assert seen_positions(model, inputs, site, ["first", "last"]) == [(0,), (len(ids) - 1,)]
    embeds = tuple(range(grid * grid))  # the class token is not among them
    assert seen_positions(model, inputs, "hook_image_embeds", "image") == [embeds]


def test_roles_are_words_or_positions():
    model = toy("toy-blip-itm")
    image = shapes_pairs(1, 0, "itm")[0].image
    text = "a red circle left of a blue square"
    roles = {"subject": "red circle", "verb": 4, "both": (1, -1), "absent": "cross"}
    pair = Pair(image, text, None, text.replace("red", "green"), "blue", name="p", roles=roles)
    site, at = "text.blocks.0.hook_mlp_out", []

    def look(value, where):
        at.append(where.positions)
        return value

    wanted = ["subject", "verb", "both", "answer", "last"]
    P.ablate(model, pair, site, look, margin, wanted, **QUIET)
    n = len(model.to_str_tokens(text))
    assert model.to_str_tokens(text)[2:4] == ["red", "circle"]
    assert sorted(at) == sorted([(2, 3), (4,), (1, n - 1), (7,), (n - 1,)])
    with pytest.raises(ValueError, match=r"the text has no 'cross', the words of role 'absent'"):
        P.ablate(model, pair, site, look, margin, "absent", **QUIET)
    with pytest.raises(ValueError, match=r"no positions of role 'object'; roles are .*'subject'"):
        P.ablate(model, pair, site, look, margin, "object", **QUIET)
    bare = Pair(image, text, None, text.replace("red", "green"), name="q")
    result = P.ablate(model, [pair, bare], site, P.zero(), margin, "subject", **QUIET)
    assert np.isnan(result.data.values).tolist() == [[[False]], [[True]]]
    ((reason, count),) = result.provenance["excluded"].items()
    assert "no positions of role 'subject'" in reason and count == 1


def test_roles_in_files(tmp_path):
    shapes_pairs(1, 0, "itm")[0].image.save(tmp_path / "i.png")
    (tmp_path / "p.csv").write_text(
        "image,text,corrupt_text,role_subject\ni.png,a red circle,a blue circle,red\n"
    )
    assert read_pairs(tmp_path / "p.csv")[0].roles == {"subject": "red"}


def test_windows_of_positions_leave_padding_out():
    model = built(ITM)
    rows = ITM.inputs(2, padded=True)  # five tokens, and four
    site = "text.blocks.0.hook_mlp_out"
    result = P.ablate(model, rows, site, P.zero(), margin, P.Each(2), **QUIET)
    assert result.data["position"].values.tolist() == ["0-1", "1-2", "2-3", "3-4"]
    assert np.isnan(result.data.values[:, 0]).tolist() == [[False] * 4, [False] * 3 + [True]]
    assert result.provenance["excluded"] == {"padding stands there": 1}

    def empty(x, hook):
        x[:, 1:3] = 0
        return x

    expected = margin(model.run_with_hooks(**rows, fwd_hooks=[(site, empty)]))
    np.testing.assert_allclose(result.data.values[:, 0, 1], expected, rtol=0, atol=1e-10)


def test_windows_of_layers():
    model = built(ITM)
    pair = tuple(ITM.inputs(1, padded=False, seed=seed) for seed in (0, 1))
    sites = model.sites("vision.blocks.*.hook_mlp_out")
    made = P.windows(sites, 2)
    assert [one.name for one in made] == ["vision.blocks.0-1.hook_mlp_out"]
    result = P.activation_patching(model, pair, made, margin, **QUIET)
    _, clean = model.run_with_cache(**pair[0], names_filter="vision.blocks.*.hook_mlp_out")
    hooks = [(site.name, lambda x, hook: clean[hook.name]) for site in sites]
    expected = margin(model.run_with_hooks(**pair[1], fwd_hooks=hooks))
    np.testing.assert_allclose(result.data.values, expected[None], rtol=0, atol=1e-10)
    assert result.top(1) == made
    with pytest.raises(ValueError, match="a window of 3 layers, moved by 1, over 2 layers"):
        P.windows(sites, 3)
    with pytest.raises(ValueError, match="layers of one stack"):
        P.windows(model.sites("hook_logits"), 1)
