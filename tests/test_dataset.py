"""Activations of a data set: written once, gone on with, read without the model."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import BatchEncoding
from whole_zoo import ZOO
from zoo import BLIP, QUIET, Recorder, built, error
from zoo_clip import CLIP_RESNET, CLIP_VIT
from zoo_llava import LLAMA, MISTRAL

from hooked_vlm import ActivationDataset, HookedBLIP
from hooked_vlm import patching as P
from hooked_vlm.models.dataset import RunningMean
from hooked_vlm.models.resumable import COLUMNS, _checksum

pytestmark = pytest.mark.usefixtures("no_grad")

ITM, CAPTIONING, VQA = BLIP
NAMES = ["text.blocks.*.hook_mlp_out", "text.blocks.0.cross_attn.heads.1.hook_z"]


def batches(member, n=3, padded=True):
    return [member.inputs(2, padded=padded, seed=seed, dtype=torch.float64) for seed in range(n)]


@pytest.mark.parametrize("member", ZOO, ids=str)
def test_what_is_written_is_what_passes_give(member, tmp_path):
    model, data = built(member), batches(member)
    names = [n for n in model.hook_dict if n.endswith(("blocks.0.hook_resid_post", "hook_z"))]
    names += [n for n in model.hook_dict if n.endswith("cross_attn.hook_k")][:1]
    found = model.cache_dataset(iter(data), names, tmp_path / "a", **QUIET)
    assert found.names == model.hook_dict.match(names)
    assert len(found) == sum(len(one[model.ROWS]) for one in data)
    for (activations, masks), batch in zip(found.shards(), data, strict=True):
        _, cache = model.run_with_cache(**batch, names_filter=names)
        for name in found.names:
            assert torch.equal(activations[name], cache[name]), name
        for name, mask in masks.items():
            key = "attention_mask" if mask.shape == batch["attention_mask"].shape else "decoder_"
            assert torch.equal(mask, batch.get(key, batch.get("decoder_attention_mask")).bool())
            assert not name.startswith("vision") or member.task == "clip"


@pytest.mark.parametrize("member", [ITM, CAPTIONING, VQA, LLAMA, MISTRAL, CLIP_VIT], ids=str)
def test_tensors_and_means_of_the_reference(member, tmp_path):
    """Of all points that transformers has, at rows of one length, which it does not mask."""
    theirs, ours = member.pair()
    data, table = batches(member, 2, padded=False), member.table()
    del table["vision.hook_embed"]  # transformers' is without the class token
    if member is VQA:  # whose answers are padded all the same
        data = [x | {"decoder_attention_mask": torch.ones(2, 3, dtype=torch.long)} for x in data]
    found = ours.cache_dataset(data, list(table), tmp_path, **QUIET)
    values = {name: [] for name in table}
    for batch in data:
        with Recorder(theirs, {row[0] for row in table.values()}) as recorder:
            theirs(**batch)
        for name in table:
            values[name].append(recorder.value(table[name]))
    for name in table:
        both = [
            one.expand(2, *one.shape[1:]).reshape(found[name][:2].shape) for one in values[name]
        ]
        assert error(found[name], torch.cat(both)) < 1e-10, name
        if not name.endswith("hook_pattern") and both[0].dim() > 2:
            assert error(found.mean(name), torch.cat(both).mean((0, 1))) < 1e-10, name
            assert error(found.mean(name, False), torch.cat(both).mean(0)) < 1e-10, name


@pytest.mark.parametrize("member", [ITM, LLAMA, CLIP_RESNET], ids=str)
def test_every_point_at_once(member, tmp_path):
    """Several points may be one tensor in memory."""
    model, (batch,) = built(member), batches(member, 1)
    names = ["*", "*heads.*", "*hook_result", "*heads.*hook_result"]
    found = model.cache_dataset([batch], names, tmp_path, **QUIET)
    _, cache = model.run_with_cache(**batch, names_filter=names)
    ((activations, _),) = found.shards()
    assert set(activations) == set(cache) == {*model.hook_names(heads=True)}
    assert all(torch.equal(activations[name], cache[name]) for name in cache)


class Counted:
    """How many times a point is reached; Ctrl-C at one of them."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def __call__(self, x, hook):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt

    reads_only = True  # so that it is none of the standing hooks that are recorded


def test_it_goes_on_where_it_stopped(tmp_path):
    model, data, counted = built(ITM), batches(ITM), Counted(stop=2)
    with model.hooks([("vision.hook_embed", counted)]):
        with pytest.raises(KeyboardInterrupt):
            model.cache_dataset(iter(data), NAMES, tmp_path, **QUIET)
        begun = ActivationDataset(tmp_path)
        assert len(begun) == 2 and not begun.complete and repr(begun).endswith("not complete)")
        assert sorted(f.name for f in tmp_path.iterdir()) == ["00000.safetensors", "index.json"]
        first = (tmp_path / "00000.safetensors").stat()
        found = model.cache_dataset(iter(data), NAMES, tmp_path, **QUIET)
        assert counted.calls == 4 and len(found) == 6 and found.complete  # the second batch twice
        assert (tmp_path / "00000.safetensors").stat() == first
        model.cache_dataset(data, NAMES, tmp_path, **QUIET)
        assert counted.calls == 4
        longer = model.cache_dataset(batches(ITM, 4), NAMES, tmp_path, **QUIET)
        assert counted.calls == 5 and len(longer) == 8 and longer.complete
        counted.stop = 7
        with pytest.raises(KeyboardInterrupt):
            model.cache_dataset(batches(ITM, 6), NAMES, tmp_path, **QUIET)
        assert len(longer) == 10 and not longer.complete
        longer = model.cache_dataset(batches(ITM, 6), NAMES, tmp_path, **QUIET)
    for (activations, _), batch in zip(longer.shards(), batches(ITM, 6), strict=True):
        _, cache = model.run_with_cache(**batch, names_filter=NAMES[1])
        assert torch.equal(activations[NAMES[1]], cache[NAMES[1]])


def test_inputs_that_stop_leave_what_is_done(tmp_path):
    model, data = built(ITM), batches(ITM)

    def stopping():
        yield data[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.cache_dataset(stopping(), NAMES, tmp_path, **QUIET)
    assert len(ActivationDataset(tmp_path)) == 2
    assert len(model.cache_dataset(data, NAMES, tmp_path, **QUIET)) == 6


def test_nothing_is_run_behind_the_last_point(tmp_path):
    model, data, later = built(ITM), batches(ITM, 2), Counted()
    behind = ["vision.blocks.1.hook_resid_post", "text.hook_embed", "hook_logits"]
    with model.hooks([(behind, later)]):
        model.cache_dataset(data, ["vision.blocks.0.*"], tmp_path, **QUIET)
    assert later.calls == 0 and not model.list_hooks()


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    model = built(ITM)

    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("hooked_vlm.models.caching.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        model.cache_dataset(batches(ITM, 1), NAMES, tmp_path, **QUIET)
    assert [f.name for f in tmp_path.iterdir()] == ["index.json"]


def test_folders_of_something_else_are_refused(tmp_path):
    model, data = built(ITM), batches(ITM)
    folder = tmp_path / "data"
    model.cache_dataset(data, NAMES, folder, **QUIET)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    other = ITM.pair()[1]
    other.text.blocks[0].mlp.fc_in.weight[3, 4].mul_(2)
    with pytest.raises(ValueError, match="was made with other weights: "):
        other.cache_dataset(data, NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match=r"was made with other model: 'Blip.*', not 'another'"):
        other.provenance["model"] = "another"
        other.cache_dataset(data, NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match=r"other names: .*; choose another folder"):
        model.cache_dataset(data, NAMES[0], folder, **QUIET)
    with pytest.raises(ValueError, match="other dtype: 'float64', not 'float32'"):
        model.cache_dataset(data, NAMES, folder, dtype=torch.float32, **QUIET)
    edit = ("text.hook_embed", lambda x, hook: 2 * x)
    with (
        model.hooks([edit]),
        pytest.raises(ValueError, match=r"standing hooks: \[\], not \['text.hook_embed'\]"),
    ):
        model.cache_dataset(data, NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match="batch 1 is not the one"):
        model.cache_dataset([data[0], data[2]], NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match=r"1 batches were given, .* holds 3"):
        model.cache_dataset(data[:1], NAMES, folder, **QUIET)
    with pytest.raises(ValueError, match=r"0 batches were given, .* read before is empty"):
        model.cache_dataset(iter(()), NAMES, folder, **QUIET)
    with pytest.raises(KeyError, match=r"no hook 'text.blocks.7"):
        model.cache_dataset(data, "text.blocks.7.hook_mlp_out", folder, **QUIET)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds other files, and no index.json"):
        model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    with pytest.raises(FileNotFoundError, match=r"has no index.json: it is no folder of cache_d"):
        ActivationDataset(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"letter.txt' is a file; name a folder"):
        model.cache_dataset(data, NAMES, tmp_path / "letter.txt", **QUIET)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}'])
def test_an_index_of_something_else_is_refused(tmp_path, text):
    index = tmp_path / "index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match=r"index.json' is none of cache_dataset's"):
        ActivationDataset(tmp_path)
    with pytest.raises(ValueError, match=r"index.json' is none of cache_dataset's"):
        built(ITM).cache_dataset(batches(ITM), NAMES, tmp_path, **QUIET)
    assert index.read_text() == text


def test_another_format_is_refused(tmp_path):
    built(ITM).cache_dataset(batches(ITM, 1), NAMES, tmp_path, **QUIET)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["format"] == 1
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(ValueError, match="is of format 2, this version of hooked_vlm reads 1"):
        ActivationDataset(tmp_path)


def test_inputs_that_cannot_be_told_apart_are_refused(tmp_path):
    model, (batch,) = built(ITM), batches(ITM, 1)
    with pytest.raises(ValueError, match=r"batch 0 is a str; .* a single one as \[inputs\]"):
        model.cache_dataset(iter(BatchEncoding(batch)), NAMES, tmp_path, **QUIET)
    with pytest.raises(ValueError, match="prefix is a object; cache_dataset takes tensors"):
        model.cache_dataset([batch | {"prefix": object()}], NAMES, tmp_path, **QUIET)
    with pytest.raises(ValueError, match="batch 0 has no input_ids, only pixel_values"):
        model.cache_dataset([{"pixel_values": batch["pixel_values"]}], NAMES, tmp_path, **QUIET)


def test_a_mode_is_one_of_the_inputs(tmp_path):
    """ALBEF's text-only pass reads the same tensors as the whole one, of which it gives others."""
    member = next(one for one in ZOO if str(one) == "albef-itm")
    model, (batch,) = built(member), batches(member, 1)
    del batch["pixel_values"]
    name = "text.blocks.0.hook_mlp_out"
    with pytest.raises(KeyError, match=r"the pass does not reach 'text.blocks.2.hook_mlp_out'"):
        model.cache_dataset(
            [batch | {"mode": "text"}], [name, name.replace("0", "2")], tmp_path / "a", **QUIET
        )
    model.cache_dataset([batch | {"mode": "text"}], name, tmp_path / "b", **QUIET)
    with pytest.raises(ValueError, match="batch 0 is not the one"):
        model.cache_dataset([batch | {"mode": "fusion"}], name, tmp_path / "b", **QUIET)


def test_files_that_are_missing_or_cut_short_are_named_and_made_again(tmp_path):
    model, data = built(ITM), batches(ITM)
    found = model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    whole = [found[name].clone() for name in found.names]
    file = tmp_path / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(OSError, match=r"00001.safetensors' cannot be read, it may be cut short"):
        list(found.shards())
    with pytest.raises(OSError, match=r"00001.safetensors' cannot be read, .* delete it"):
        model.cache_dataset(data, NAMES, tmp_path, **QUIET)
    for number in (1, 2):
        (tmp_path / f"0000{number}.safetensors").unlink()
        with pytest.raises(OSError, match=f"0000{number}.safetensors' is missing"):
            len(found)
        found = model.cache_dataset(data, NAMES, tmp_path, **QUIET)
        again = [found[name] for name in found.names]
        assert all(map(torch.equal, whole, again))
    with pytest.raises(KeyError, match="'hook_logits' was not cached"):
        found["hook_logits"]


def test_batches_of_several_lengths_are_read_one_by_one(tmp_path):
    model = built(ITM)
    data = [ITM.inputs(2, padded=padded) for padded in (True, False)]
    found = model.cache_dataset(data, NAMES, tmp_path, dtype=torch.bfloat16, **QUIET)
    with pytest.raises(ValueError, match="are of several lengths"):
        found[NAMES[1]]
    shapes = [tuple(activations[NAMES[1]].shape) for activations, _ in found.shards()]
    assert [shape[1] for shape in shapes] == [5, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_may_be_of_another_dtype(tmp_path, dtype):
    model, (batch,) = built(ITM), batches(ITM, 1)
    names = ["text.blocks.0.hook_mlp_out", "text.blocks.0.attn.hook_attn_scores"]
    found = model.cache_dataset([batch], names, tmp_path / "a", dtype=dtype, **QUIET)
    assert found.provenance["dtype"] == str(dtype).removeprefix("torch.")
    _, cache = model.run_with_cache(**batch, names_filter=names)
    ((activations, masks),) = found.shards()
    assert torch.equal(activations[names[0]], cache[names[0]].to(dtype))
    assert torch.equal(masks[names[0]], batch["attention_mask"].bool())
    # Masked scores are the dtype's finite minimum, as they are in a model of that dtype.
    unseen = ~batch["attention_mask"].bool()[:, None, None].expand_as(cache[names[1]])
    assert unseen.any() and (activations[names[1]][unseen] == torch.finfo(dtype).min).all()
    assert torch.equal(activations[names[1]][~unseen], cache[names[1]][~unseen].to(dtype))


def test_dtypes_that_cannot_hold_it_are_refused(tmp_path):
    model, data = built(ITM), batches(ITM, 1)
    with pytest.raises(ValueError, match=r"dtype is one of torch.float64, .*, not torch.int8"):
        model.cache_dataset(data, NAMES, tmp_path, dtype=torch.int8, **QUIET)
    large = ("text.blocks.0.hook_mlp_out", lambda x, hook: torch.full_like(x, 7e4))
    with (
        model.hooks([large]),
        pytest.raises(ValueError, match=r"'text.blocks.0.hook_mlp_out' has a value of 7e\+04"),
    ):
        model.cache_dataset(data, NAMES[0], tmp_path, dtype=torch.float16, **QUIET)


# --- means


def real_rows(model, data, name, key):
    """What each row has at the positions that are no padding, one after the other."""
    for batch in data:
        _, cache = model.run_with_cache(**batch, names_filter=name)
        for row, value in enumerate(cache[name]):
            yield value if key is None else value[batch[key][row].bool()]


MEANS = [
    (ITM, "text.blocks.0.hook_mlp_out", "attention_mask"),
    (ITM, "text.blocks.1.attn.heads.1.hook_z", "attention_mask"),
    (ITM, "text.blocks.1.cross_attn.hook_v", None),  # the image's positions
    (ITM, "vision.blocks.1.attn.hook_k", None),
    (VQA, "decoder.blocks.0.attn.hook_k", "decoder_attention_mask"),
    (VQA, "decoder.blocks.0.cross_attn.hook_kv_in", "attention_mask"),  # the question's
    (VQA, "decoder.blocks.1.cross_attn.heads.0.hook_k", "attention_mask"),
    (VQA, "hook_logits", "decoder_attention_mask"),
    (LLAMA, "text.blocks.1.hook_resid_post", "attention_mask"),  # padded on the left
    (MISTRAL, "text.blocks.1.attn.hook_result", "attention_mask"),
    (CLIP_VIT, "text.hook_embed", "attention_mask"),
]


@pytest.mark.parametrize(("member", "name", "key"), MEANS, ids=str)
def test_means_are_those_of_rows_without_padding(member, name, key, tmp_path):
    model = built(member)
    data = [member.inputs(3, seed=seed) for seed in range(2)] + batches(member, 1, padded=False)
    found = model.cache_dataset(data, name, tmp_path, **QUIET)
    rows = list(real_rows(model, data, name, key))
    if key is not None:
        assert len({len(row) for row in rows}) > 1, "nothing is padded"
    assert error(found.mean(name), torch.cat(rows).mean(0)) < 1e-12
    longest = max(map(len, rows))
    by_position, counts = found.mean(name, over_positions=False), found.counts(name)
    assert len(by_position) == longest
    for at in range(longest):
        there = [row[at] for row in rows if len(row) > at]
        assert error(by_position[at], torch.stack(there).mean(0)) < 1e-12
        assert counts[at] == len(there)


def test_means_of_what_has_no_positions(tmp_path):
    model, data = built(CLIP_RESNET), batches(CLIP_RESNET, 2)
    names = ["vision.blocks.1.hook_resid_post", "hook_text_embeds"]
    found = model.cache_dataset(data, names, tmp_path, **QUIET)
    for name in names:
        for over in (True, False):
            assert error(found.mean(name, over), found[name].mean(0)) < 1e-12
        assert found.counts(name) == 4


def test_means_that_are_none(tmp_path):
    model = built(CLIP_VIT)
    data = [CLIP_VIT.inputs(rows) for rows in (2, 3)]
    names = ["vision.blocks.0.attn.hook_pattern", "hook_logits"]
    found = model.cache_dataset(data, names, tmp_path, **QUIET)
    with pytest.raises(ValueError, match=r"hook_pattern' has no mean: its keys differ"):
        found.mean(names[0])
    with pytest.raises(ValueError, match=r"'hook_logits' is \[2\] in some .* \[3\] in others"):
        found.mean(names[1])
    with pytest.raises(KeyError, match=r"'text.hook_embed' was not cached"):
        found.mean("text.hook_embed")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    (tmp_path / "index.json").write_text(
        (tmp_path / "index.json").read_text().replace('"batches": 2', '"batches": null')
    )
    with pytest.raises(ValueError, match="no mean of 'hook_logits': there are no batches"):
        found.mean("hook_logits")
    with pytest.raises(ValueError, match="holds no batch yet"):
        found["hook_logits"]


def test_what_stands_in_padding_does_not_count():
    mean = RunningMean("name", over_positions=False)
    value = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])[..., None]
    mean.add(value, torch.tensor([[True, False], [False, True]]))
    assert mean.value.tolist() == [[1.5]] and mean.count.tolist() == [2]


def test_answers_that_share_a_question(tmp_path):
    model, batch = built(VQA), VQA.inputs(3)
    shared = {key: x if key.startswith("decoder") else x[1:2] for key, x in batch.items()}
    n = int(shared["attention_mask"].sum())
    assert n < shared["input_ids"].shape[1]
    name = "decoder.blocks.0.cross_attn.hook_v"
    found = model.cache_dataset([shared], name, tmp_path, **QUIET)
    cut = {k: x if k.startswith("decoder") or x.dim() > 2 else x[:, :n] for k, x in shared.items()}
    _, cache = model.run_with_cache(**cut, names_filter=name)
    assert found[name].shape[:2] == (3, 5) and cache[name].shape[:2] == (3, n)
    assert error(found.mean(name), cache[name].mean((0, 1))) < 1e-12


@pytest.mark.parametrize("cached", [True, False])
def test_means_by_position_where_padding_stands_on_the_left(tmp_path, cached):
    """Position 0 is the first token of a text, wherever padding put it."""
    model, name = built(LLAMA), "text.blocks.0.hook_mlp_out"
    data, target = batches(LLAMA), LLAMA.inputs(3, seed=9)
    reference = data
    if cached:
        model.cache_dataset(data, name, tmp_path, **QUIET)
        reference = tmp_path
    rows = list(real_rows(model, data, name, "attention_mask"))
    means = torch.stack(
        [torch.stack([r[at] for r in rows if len(r) > at]).mean(0) for at in range(9)]
    )

    def last(logits):
        return logits[:, -1, 3]

    written = P.mean(reference, per_position=True)
    result = P.ablate(model, target, name, written, last, **QUIET)
    for row, mask in enumerate(target["attention_mask"]):
        pixels = target["pixel_values"][row : row + 1]
        alone = {"pixel_values": pixels, "input_ids": target["input_ids"][row, mask.bool()][None]}
        n = int(mask.sum())
        hook = (name, lambda x, hook, n=n: means[:n].expand_as(x).clone())
        expected = last(model.run_with_hooks(**alone, fwd_hooks=[hook]))
        assert error(torch.tensor(result.data.values[row]), expected) < 1e-10


@pytest.mark.parametrize("member", [ITM, VQA], ids=str)
def test_means_of_a_folder_are_those_of_its_inputs(member, tmp_path):
    """They are held against the means of rows without their padding."""
    model, data = built(member), batches(member)
    stack = list(model.stacks)[-1]
    names = [f"{stack}.blocks.0.hook_mlp_out", f"{stack}.blocks.1.cross_attn.hook_v"]
    model.cache_dataset(data, names, tmp_path, **QUIET)
    one = member.inputs(1, padded=False)
    rows = {name: [] for name in names}
    for batch in data:
        _, cache = model.run_with_cache(**batch, names_filter=names)
        own = batch["decoder_attention_mask" if stack == "decoder" else "attention_mask"]
        for row in range(2):
            rows[names[0]].append(cache[names[0]][row, own[row].bool()])
            value = cache[names[1]][row]
            if stack == "decoder":  # whose keys are the question's
                value = value[batch["attention_mask"][row].bool()]
            rows[names[1]].append(value)
    for name in names:
        value = torch.cat(rows[name]).mean(0)
        hook = (name, lambda x, hook, value=value: value.expand_as(x).clone())
        expected = model.run_with_hooks(**one, fwd_hooks=[hook]).flatten(1)[:, 1]
        result = P.ablate(model, one, name, P.mean(tmp_path), lambda x: x.flatten(1)[:, 1], **QUIET)
        np.testing.assert_allclose(result.data.values[:, 0], expected, rtol=0, atol=1e-10)
    with pytest.raises(KeyError, match=r"holds no 'text.hook_embed'"):
        P.ablate(model, one, "text.hook_embed", P.mean(tmp_path), lambda x: x[:, 0], **QUIET)


def test_weights_have_a_hash():
    toy = HookedBLIP.from_pretrained("toy-blip-itm")
    before = toy.weights_hash()
    assert before == HookedBLIP.from_pretrained("toy-blip-itm").weights_hash()
    toy.itm_head.bias.add_(1)
    assert toy.weights_hash() != before


def test_the_hash_of_weights_knows_how_they_are_used():
    """The same numbers as 3 heads or as 5 give other activations."""
    model = built(CLIP_VIT)
    other = CLIP_VIT.pair()[1]
    assert other.weights_hash() == model.weights_hash()
    heads = dataclasses.replace(other.cfg.vision, n_heads=5)
    other.cfg = dataclasses.replace(other.cfg, vision=heads)
    assert other.weights_hash() != model.weights_hash()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_any_edit_of_a_large_weight_shows_in_its_hash(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-100, 100, (300, 513), generator=generator).to(dtype)
    before = _checksum(weight)
    padded = torch.cat([weight.flatten()[:1], weight.flatten()])
    assert _checksum(padded[1:].view(300, 513)) == before, "where it lies in memory"
    assert _checksum(weight.mT.contiguous().mT) == before, "its strides"
    for row, column in [(0, 0), (299, 512), (5, 77), (148, 500)]:
        edited = weight.clone()
        edited[row, column] += 1
        assert _checksum(edited) != before
    step = 8 // weight.element_size()  # to the next integer of a row; and to that below it
    for distance in (step, COLUMNS * step):
        swapped = weight.flatten().clone()
        pair = torch.tensor([1, 1 + distance])
        assert swapped[pair[0]] != swapped[pair[1]]
        swapped[pair] = swapped[pair.flip(0)]
        assert _checksum(swapped.view(weight.shape)) != before


def own_rows(member, batch, value, name):
    """Each row of an activation that texts or answers count, without its padding."""
    key = {"text": "attention_mask", "decoder": "decoder_attention_mask"}.get(name.split(".")[0])
    if member.task == "captioning" and key is not None:
        key = "attention_mask"
    if key is None:
        return list(value)
    return [row[mask.bool()] for row, mask in zip(value, batch[key], strict=True)]


@pytest.mark.parametrize("images", [None, 1], ids=["own images", "shared image"])
@pytest.mark.parametrize("member", ZOO, ids=str)
def test_means_of_inputs_count_what_is_computed_once(member, images, tmp_path):
    """Of batches of unequal size, from inputs and from a folder; CLIP's images share all texts."""
    model = built(member)
    data = [member.inputs(3, images=images), member.inputs(1, seed=1)]
    stack = list(model.stacks)[-1]
    names = [f"{stack}.blocks.0.hook_mlp_out"]
    if "vision.blocks.0.hook_mlp_out" in model.hook_dict:
        names.append("vision.blocks.0.hook_mlp_out")
    model.cache_dataset(data, names, tmp_path, **QUIET)
    one = member.inputs(1, padded=False, seed=2)

    def metric(logits):
        return logits.flatten(1).square().sum(1)

    for name in names:
        rows = []
        for batch in data:
            value = model.run_with_cache(**batch, names_filter=name)[1][name]
            rows += own_rows(member, batch, value, name)
        value = torch.cat(rows).mean(0)
        hook = (name, lambda x, hook, value=value: value.expand_as(x).clone())
        expected = metric(model.run_with_hooks(**one, fwd_hooks=[hook]))
        for reference in (data, tmp_path):
            result = P.ablate(model, one, name, P.mean(reference), metric, **QUIET)
            np.testing.assert_allclose(result.data.values[:, 0], expected, rtol=1e-10, atol=1e-10)


def test_means_of_each_text_leave_out_its_own_padding(tmp_path):
    """Texts of CLIP: of three lengths in one batch, which all images read."""
    model, batch, name = built(CLIP_VIT), CLIP_VIT.inputs(3), "text.blocks.1.hook_mlp_out"
    model.cache_dataset([batch], name, tmp_path, **QUIET)
    value = model.run_with_cache(**batch, names_filter=name)[1][name]
    lengths = [5, 4, 3]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    means = [  # of the texts that have the position
        sum(value[row, at] for row in range(3) if at < lengths[row]) / sum(at < n for n in lengths)
        for at in range(5)
    ]
    one = CLIP_VIT.inputs(2, seed=3)
    n = one["input_ids"].shape[1]
    hook = (name, lambda x, hook: torch.stack(means)[:n].expand_as(x).clone())
    expected = model.run_with_hooks(**one, fwd_hooks=[hook]).sum(1)
    for reference in (batch, tmp_path):
        replaced = P.mean(reference, per_position=True)
        result = P.ablate(model, one, name, replaced, lambda logits: logits.sum(1), **QUIET)
        np.testing.assert_allclose(result.data.values[:, 0], expected, rtol=1e-10, atol=1e-10)


def test_resampling_takes_no_folder(tmp_path):
    model = built(ITM)
    found = model.cache_dataset(batches(ITM, 1), "text.hook_embed", tmp_path, **QUIET)
    for folder in (found, tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match=r"not from a folder of cache_dataset.*P.mean reads"):
            P.ablate(
                model,
                ITM.inputs(1, padded=False),
                "text.hook_embed",
                P.resample(folder),
                lambda logits: logits[:, 1],
                **QUIET,
            )


def test_means_of_folders_of_other_weights_are_refused(tmp_path):
    model, name = built(ITM), "text.blocks.0.hook_mlp_out"
    data, one = batches(ITM), ITM.inputs(1, padded=False)
    model.cache_dataset(data, name, tmp_path / "whole", **QUIET)
    other = ITM.pair()[1]
    other.itm_head.bias.data.add_(1)
    with pytest.raises(ValueError, match="was cached with other weights than this model's"):
        P.ablate(other, one, name, P.mean(tmp_path / "whole"), lambda x: x[:, 0], **QUIET)

    def broken():
        yield data[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        model.cache_dataset(broken(), name, tmp_path / "half", **QUIET)
    with pytest.raises(ValueError, match="is not finished; call cache_dataset"):
        P.ablate(model, one, name, P.mean(tmp_path / "half"), lambda x: x[:, 0], **QUIET)
