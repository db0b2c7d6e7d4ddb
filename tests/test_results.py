"""Results: labels, shares, intervals, tables, files."""

import numpy as np
import pytest
import xarray as xr
from zoo import HEADS, ITM, QUIET, built, toy

from hooked_vlm import patching as P
from hooked_vlm.data import shapes_pairs
from hooked_vlm.models.names import Site
from hooked_vlm.patching.result import PatchingResult, label

pytestmark = pytest.mark.usefixtures("no_grad")


def result_of(values, clean, corrupt, names, positions=None, direction="denoise", pairs=None):

    sites = [Site.parse(name) for name in names]
    pairs = pairs or [str(index) for index in range(len(clean))]
    data = label(np.array(values, dtype=float), pairs, sites, positions)
    ends = [
        xr.DataArray(np.array(end, dtype=float), dims="pair", coords={"pair": pairs})
        for end in (clean, corrupt)
    ]
    return PatchingResult(data, *ends, tuple(sites), {"direction": direction, "metric": "made up"})


def z(layer, head):
    return f"text.blocks.{layer}.cross_attn.heads.{head}.hook_z"


def test_restored_by_hand():
    values = [[[2.0], [4.0], [0.0], [5.0]]]
    names = [z(0, 0), z(0, 1), z(1, 0), z(1, 1)]
    result = result_of(values, [4], [2], names)
    assert result.restored.values.tolist() == [[[0, 1], [-1, 1.5]]]
    noise = result_of(values, [4], [2], names, direction="noise")
    assert noise.restored.values.tolist() == [[[1, 0], [2, -0.5]]]
    assert [site.name for site in result.top(2)] == [z(1, 1), z(0, 1)]
    assert [site.name for site in noise.top(1)] == [z(1, 0)]
    assert len(result.top(99)) == 4


def test_runs_that_do_not_differ_are_not_a_number():
    names = [z(0, 0), z(0, 1)]
    values = [[[3.0], [4.0]], [[1.0], [2.0]], [[1e9], [1e9 + 1]], [[0.0], [1.0]]]
    result = result_of(values, [3, 2, 1e9 + 1e-4, 0], [3, 1, 1e9, 0], names)
    restored = result.restored.values[:, 0]
    assert np.isnan(restored[[0, 2, 3]]).all()
    assert restored[1].tolist() == [0, 1]
    assert result.flat().values.tolist() == [0, 1]  # the mean of those that are numbers
    assert result.top(1)[0].name == z(0, 1)


@pytest.mark.filterwarnings("error")
def test_no_pair_that_differs():
    result = result_of([[[3.0], [4.0]]], [3], [3], [z(0, 0), z(0, 1)])
    assert np.isnan(result.restored.values).all()
    assert len(result.top(2)) == 2
    result.plot()


def test_grids_and_lists_of_sites():
    grid = [z(0, 0), z(0, 1), z(2, 0), z(2, 1)]
    values = np.arange(8.0).reshape(2, 4, 1)
    whole = result_of(values, [9, 9], [0, 0], grid).data
    assert whole.dims == ("pair", "layer", "head")
    assert whole.sel(layer=2, head=1).values.tolist() == [3, 7]
    assert (whole["stack"].item(), whole["component"].item()) == ("text", "cross_attn.hook_z")
    for names in (
        grid[:3],  # a hole
        [z(0, 0), z(1, 0).replace("text", "decoder")],  # two stacks
        [z(0, 0), z(1, 0).replace("hook_z", "hook_q")],  # two components
        [z(0, 0), z(1, 0).replace("cross_attn", "attn")],  # two attentions
        ["text.blocks.0.hook_mlp_out", "text.blocks.1.hook_mlp_out"],  # no heads
        ["hook_image_embeds", z(0, 0)],
    ):
        data = result_of(values[:, : len(names)], [9, 9], [0, 0], names).data
        assert data.dims == ("pair", "site")
        assert data["site"].values.tolist() == names
        assert data["layer"].dims == ("site",)
    assert data["layer"].values.tolist() == [None, 0]
    assert data["head"].values.tolist() == [None, 0]
    assert data["component"].values.tolist() == ["hook_image_embeds", "cross_attn.hook_z"]


def test_positions_are_a_dimension():
    grid = [z(0, 0), z(0, 1), z(1, 0), z(1, 1)]
    values = np.arange(12.0).reshape(1, 4, 3)
    result = result_of(values, [10], [0], grid, positions=[5, -1, 2])
    assert result.data.dims == ("pair", "layer", "head", "position")
    assert result.data.sel(layer=1, head=0, position=-1).item() == 7
    assert result.flat().sizes == {"site": 4, "position": 3}
    assert result.flat().values[2].tolist() == [0.6, 0.7, 0.8]
    best = [(site.name, site.position) for site in result.top(4)]
    assert best == [(z(1, 1), 2), (z(1, 1), -1), (z(1, 1), 5), (z(1, 0), 2)]
    lines = result_of(values, [10], [0], [*grid[:3], "hook_logits"], positions=[0, 1, 2])
    assert lines.data.dims == ("pair", "site", "position")
    assert lines.top(1)[0].name == "hook_logits"


def test_tables():
    result = result_of(
        np.arange(8.0).reshape(2, 4, 1),
        [8, 16],
        [0, 8],
        [z(0, 0), z(0, 1), z(1, 0), z(1, 1)],
        pairs=["same", "same"],
    )
    frame = result.to_dataframe()
    assert len(frame) == 8
    assert frame["clean"].tolist() == [8] * 4 + [16] * 4
    assert frame["corrupt"].tolist() == [0] * 4 + [8] * 4
    assert frame["patched"].tolist() == list(range(8))
    assert frame["restored"].tolist() == [0, 0.125, 0.25, 0.375, -0.5, -0.375, -0.25, -0.125]
    assert frame["layer"].tolist() == [0, 0, 1, 1] * 2
    assert set(frame["component"]) == {"cross_attn.hook_z"}
    lines = result_of([[[1.0], [2.0]]], [2], [1], ["hook_logits", "text.hook_embed"]).to_dataframe()
    assert lines["site"].tolist() == ["hook_logits", "text.hook_embed"]


def mlps(values, clean, corrupt):
    """A result over the two MLPs of a text stack, [pair, site]."""
    names = [f"text.blocks.{layer}.hook_mlp_out" for layer in (0, 1)]
    return result_of(np.array(values, float)[..., None], clean, corrupt, names)


def test_intervals_are_of_means_over_pairs():
    values = [[0, 1], [1, 1], [2, 1], [3, 1]]
    result = mlps(values, [4] * 4, [0] * 4)
    found = result.mean(n=4000, of="data")
    assert found["mean"].values.tolist() == [1.5, 1]
    assert found["n"].values.tolist() == [4, 4]
    assert (found["low"][1], found["high"][1]) == (1, 1)
    # All 256 draws of four numbers with replacement, their means in order.
    draws = np.sort(np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).mean(0))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["low"][0].item() == pytest.approx(low, abs=0.13)
    assert found["high"][0].item() == pytest.approx(high, abs=0.13)
    assert result.mean(n=10, seed=1).equals(result.mean(n=10, seed=1))
    with pytest.raises(ValueError, match="one pair has no interval"):
        mlps([[1, 2]], [1], [0]).mean()
    assert "low" not in mlps([[1, 2]], [1], [0]).mean(ci=None)


def test_results_are_saved_and_loaded(tmp_path):
    model = toy("toy-blip-itm")
    pairs = shapes_pairs(2, 0, "itm", corrupt="text")
    sites = [*model.sites("text.blocks.1.hook_mlp_out"), P.together("text.blocks.0.*_out")]
    result = P.activation_patching(model, pairs, sites, positions=[2, (3, 4), "last"], **QUIET)
    result.save(tmp_path / "r.npz")
    again = PatchingResult.load(tmp_path / "r.npz")
    assert again.data.identical(result.data)
    assert again.clean.identical(result.clean) and again.corrupt.identical(result.corrupt)
    assert again.sites == result.sites and again.provenance == result.provenance
    assert again.top(3) == result.top(3)
    assert list(tmp_path.iterdir()) == [tmp_path / "r.npz"]
    (tmp_path / "r.npz").write_bytes(b"no result")
    with pytest.raises(ValueError, match=r"r.npz' is no saved result"):
        PatchingResult.load(tmp_path / "r.npz")
    alone = P.ablate(model, model.prepare(pairs[0].image, pairs[0].text), HEADS, **QUIET)
    alone.save(tmp_path / "a.npz")
    assert PatchingResult.load(tmp_path / "a.npz").corrupt is None


def test_controls_are_other_sites_of_the_same_kind():
    model = built(ITM)
    like = [
        Site.parse("text.blocks.0.cross_attn.heads.1.hook_z", 2),
        *model.sites("*0.hook_mlp_out"),
    ]
    drawn = P.random_sites(model, like, seed=3)
    kinds = [(s.stack, s.component, s.position) for s in drawn]
    assert sorted(kinds) == sorted((s.stack, s.component, s.position) for s in like)
    assert not {s.name for s in drawn} & {s.name for s in like}
    assert drawn == P.random_sites(model, like, seed=3)
    many = {P.random_sites(model, like[:1], seed=seed)[0].name for seed in range(20)}
    assert len(many) == 3  # all others: two layers of two heads, one of which is given
    with pytest.raises(ValueError, match="there are only 0 others"):
        P.random_sites(model, model.sites("text.blocks.*.hook_mlp_out"))
