"""What is LLaVA-NeXT's own: views of an image, what is read of them, and resuming with both."""

import dataclasses

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_processors import processor
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next import modeling_llava_next as modeling
from zoo import error
from zoo_llava import LLAMA, NEXT, NEXT_PARITY

from hooked_vlm import HookedLlava
from hooked_vlm import patching as P
from hooked_vlm.data import Pair
from hooked_vlm.models.tiling import NEWLINE, Tiling
from weights_conversion import ConversionError, InMemory, llava

RELEASED = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
each = pytest.mark.parametrize("member", NEXT_PARITY, ids=str)
SIDES = st.integers(1, 40) | st.integers(1, 5000)


# --- tiles


@settings(max_examples=300, deadline=None)
@given(size=st.tuples(SIDES, SIDES))
def test_the_tiles_are_those_of_transformers(size):
    """Its resolution, its scale, its number of views, its number of tokens, at released sizes."""
    tiling = Tiling.of(size, RELEASED, 336)
    resolutions = [list(one) for one in RELEASED]
    assert tiling.resolution == select_best_resolution(size, resolutions)
    picture = torch.empty(3, *size, device="meta")
    image = transformers.image_utils.ChannelDimension.FIRST
    expected = get_patch_output_size(_Shape(picture.shape), tiling.resolution, image)
    assert tiling.scaled == expected
    assert tiling.n_views == modeling.image_size_to_num_patches(size, resolutions, 336)
    counts = RELEASED_PROCESSOR._get_num_multimodal_tokens(image_sizes=[size])
    assert len(tiling.read(24)) == counts["num_image_tokens"][0]


class _Shape:
    """An image of which only the shape is asked."""

    def __init__(self, shape):
        self.shape = tuple(shape)


RELEASED_PROCESSOR = processor(
    member=dataclasses.replace(NEXT, image=336, patch=14, resolutions=RELEASED)
)


@settings(max_examples=30, deadline=None)
@given(size=st.tuples(st.integers(1, 90), st.integers(1, 90)), index=st.sampled_from([0, 1, 2]))
def test_the_processor_puts_as_many_tokens_as_the_model_reads(size, index):
    member = NEXT_PARITY[index]
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    encoded = processor(member=member)(images=[picture], text=["<image>"], return_tensors="pt")
    tiling = Tiling.of(size, member.resolutions, member.image)
    tokens = (encoded["input_ids"] == member.image_token).sum().item()
    assert encoded["image_sizes"].tolist() == [list(size)]
    assert len(tiling.read(member.image // member.patch)) == tokens
    assert encoded["pixel_values"].shape[1] == tiling.n_views


def test_features_of_one_image_in_order():
    """40 x 20 pixels in two tiles of 2 x 2 patches: 4 x 2, of which none is around the image."""
    assert Tiling.of((40, 20), ((32, 16), (16, 32)), 16).read(2).tolist() == [
        *range(4),
        *(4, 5, NEWLINE, 6, 7, NEWLINE, 8, 9, NEWLINE, 10, 11, NEWLINE),
    ]
    # 10 x 40 pixels are 4 x 16 within 16 x 32, so that rows 1 and 2 of 4 show it.
    wide = Tiling.of((10, 40), ((16, 16), (32, 32)), 16)
    assert (wide.resolution, wide.scaled, wide.grid) == ((32, 32), (8, 32), (2, 2))
    assert wide.read(2).tolist() == [
        *range(4),
        *(6, 7, 10, 11, NEWLINE, 12, 13, 16, 17, NEWLINE),
    ]
    assert wide.boxes == [(0, 0, 40, 10)] + [
        (left, top, left + 20, top + 20) for top in (-15, 5) for left in (0, 20)
    ]


# --- the pass


@each
def test_only_real_views_are_run(member):
    model, inputs = member.model(), member.inputs(4)
    views = [member.views(size) for size in inputs["image_sizes"].tolist()]
    for image, n_views in enumerate(views):
        inputs["pixel_values"][image, n_views:] = float("nan")
    logits, cache = model.run_with_cache(**inputs, names_filter="hook_image_embeds")
    assert cache["hook_image_embeds"].shape[:2] == (sum(views), member.size)
    assert logits.isfinite().all()


@each
def test_rows_are_as_if_alone(member):
    model, inputs = member.model(), member.inputs(counts=(2, 0, 1))
    logits, mask = model(**inputs), inputs["attention_mask"].bool()
    for row in range(3):
        alone = member.chosen(inputs, [row])
        found = model(**alone)[alone["attention_mask"].bool()]
        assert error(found, logits[row][mask[row]]) < 1e-12
    shared = member.inputs(3, images=1)
    own = shared | {name: shared[name].repeat_interleave(3, 0) for name in IMAGES}
    assert error(model(**shared), model(**own)) < 1e-12


@pytest.mark.parametrize("member", [LLAMA, NEXT], ids=str)
def test_no_images_are_none(member):
    model, words = member.model(), member.inputs(counts=(0, 0))
    images = member.inputs(1)
    empty = {name: images[name][:0] for name in IMAGES if name in images}
    assert torch.equal(model(**words, **empty), model(**words))


IMAGES = ("pixel_values", "image_sizes")
SITES = [
    "vision.hook_embed",
    "vision.blocks.0.attn.heads.1.hook_z",
    "vision.blocks.0.hook_mlp_out",
    "projector.hook_pre",
    "hook_image_embeds",
    "text.hook_embed",
    "text.blocks.0.attn.hook_pattern",
    "text.blocks.1.hook_resid_mid",
]


def write(x, hook):
    return x + x.flatten(1).mean(1).cos().view(-1, *[1] * (x.dim() - 1))


@each
@pytest.mark.parametrize("site", SITES)
def test_resuming_with_different_numbers_of_images_and_views(member, site):
    """In rows that are chosen, repeated and reordered; and where all texts share an image."""
    model, inputs = member.model(), member.inputs(counts=(1, 0, 2, 1))
    hooks = [(site, write)]
    for given_, chosen in ((inputs, ([2, 0, 2], [3, 1], [1])), (member.inputs(3, 1), ([2, 0],))):
        base = model.base_run(**given_)
        for rows in chosen:
            some = hooks if rows != [1] or site.startswith("text") else []
            naive = model.run_with_hooks(**member.chosen(given_, rows), fwd_hooks=some)
            assert error(model.resume(base, site, rows=rows, fwd_hooks=some), naive) < 1e-10


@each
def test_gradients_of_a_resumed_pass(member):
    model, inputs = member.model(), member.inputs(counts=(1, 0, 2))
    base, names = model.base_run(**inputs), ["vision.blocks.0.hook_mlp_out", "text.hook_embed"]
    _, cache = model.run_with_cache(
        **inputs, names_filter=names, incl_bwd=True, metric=lambda x: x.square().sum()
    )
    seen = {}
    keep = [(names, lambda grad, hook: seen.update({hook.name: grad.clone()}))]
    logits = model.resume(base, names[0], bwd_hooks=keep, reset_hooks_end=False)
    logits.square().sum().backward()
    model.reset_hooks()
    for name in names:
        assert error(seen[name], cache[f"{name}_grad"], 0.0) < 1e-9, name


@each
def test_decompositions_sum_where_features_and_newlines_stand(member):
    model, inputs = member.model(), member.inputs(2)
    _, cache = model.run_with_cache(**inputs)
    text, last = cache.stack("text"), member.text[1] - 1
    parts = text.decompose_resid()
    assert error(parts.sum(0), cache[f"text.blocks.{last}.hook_resid_post"]) < 1e-12
    standing = parts[0][inputs["input_ids"] == member.image_token]
    features = model.get_image_features(*(inputs[name] for name in IMAGES))
    assert error(torch.cat(features), standing) < 1e-12
    newlines = (standing == model.image_newline).all(-1).sum().item()
    rows = [modeling.unpad_image(*_whole(member, size)).shape[1] for size in _sizes(inputs)]
    assert newlines == sum(rows) > 0


def _sizes(inputs):
    return [tuple(size) for size in inputs["image_sizes"].tolist()]


def _whole(member, size):
    resolutions, grid = [list(one) for one in member.resolutions], member.image // member.patch
    rows, columns = modeling.get_anyres_image_grid_shape(size, resolutions, member.image)
    return torch.empty(1, rows * grid, columns * grid), size


# --- what is refused


def test_numbers_that_do_not_match_are_told():
    model, inputs = NEXT.model(), NEXT.inputs(2)
    tokens = [NEXT.tokens(size) for size in NEXT.pictures]
    said = rf"hold \[{tokens[0]}, {tokens[1]}\] image tokens \(36\), but there are 1 images of "
    with pytest.raises(ValueError, match=rf"{said}{tokens[0]} features"):
        model(**inputs | {name: inputs[name][:1] for name in IMAGES})
    swapped = inputs | {name: inputs[name].flip(0) for name in IMAGES}
    with pytest.raises(ValueError, match=rf"2 images of {tokens[1]}, {tokens[0]} features"):
        model(**swapped)
    with pytest.raises(ValueError, match="are 2 images and 0 image_sizes"):
        model(**inputs | {"image_sizes": None})
    with pytest.raises(ValueError, match="are 0 images and 2 image_sizes"):
        model(**inputs | {"pixel_values": None})
    views = max(map(NEXT.views, NEXT.pictures))
    for pixels in (inputs["pixel_values"][:, 0], inputs["pixel_values"][:, :-1]):
        with pytest.raises(ValueError, match=rf"\(33, 17\)\] have up to {views} views"):
            model(**inputs | {"pixel_values": pixels})
    with pytest.raises(ValueError, match="image_sizes is for LLaVA-NeXT"):
        LLAMA.model()(**LLAMA.inputs(1), image_sizes=torch.tensor([[40, 20]]))
    with pytest.raises(ValueError, match="start at 1"):
        model(**inputs | {"image_sizes": torch.tensor([[40, 0], [33, 17]])})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_grid_pinpoints": [[16, 24]]}, r"each of whole tiles of 16 x 16 pixels"),
        ({"image_grid_pinpoints": []}, "takes one at least"),
        ({"image_grid_pinpoints": [[16, 16, 16]]}, "too many values to unpack"),
        ({"vision_feature_select_strategy": "full"}, "a class token among the rows of a tile"),
    ],
)
def test_configurations_that_cannot_be_opened(change, said):
    theirs = NEXT.reference()
    with pytest.raises(ConversionError, match=said):
        llava.read(InMemory(theirs.state_dict()), theirs.config.to_dict() | change, None, {})


def test_class_tokens_among_tiles_are_not_read_by_transformers_either():
    """Which is why `vision_feature_select_strategy='full'` is refused."""
    theirs = NEXT.reference()
    theirs.config.vision_feature_select_strategy = "full"
    inputs = NEXT.inputs(1, dtype=torch.float32)
    with pytest.raises(RuntimeError):
        theirs.get_image_features(**{name: inputs[name] for name in IMAGES})


def test_tensors_without_the_newline_are_refused():
    theirs = NEXT.reference()
    theirs.model.image_newline = None
    with pytest.raises(ConversionError, match="nothing fills 'image_newline'"):
        HookedLlava.from_hf(theirs)


# --- sweeps


def test_a_sweep_where_both_texts_read_one_image():
    """The image stands once; equal to a loop of full passes."""
    model, clean = NEXT.model(), NEXT.inputs(1)
    corrupt = clean | {"input_ids": clean["input_ids"].clone()}
    corrupt["input_ids"][0, -1] = 5
    sites = ["vision.blocks.0.hook_resid_post", "text.blocks.0.attn.heads.1.hook_z"]

    def last(logits):
        return logits[:, -1].square().mean(-1)

    result = P.activation_patching(model, (clean, corrupt), sites, last, progress=False)
    ends = [last(model(**given_)).item() for given_ in (clean, corrupt)]
    assert [result.clean.item(), result.corrupt.item()] == pytest.approx(ends, abs=1e-10)
    _, cache = model.run_with_cache(**clean)
    at = cache["text.blocks.0.attn.hook_z"][:, :, 1]

    def head(z, hook):
        z[:, :, 1] = at
        return z

    patched = model.run_with_hooks(**corrupt, fwd_hooks=[("text.blocks.0.attn.hook_z", head)])
    expected = [ends[1], last(patched).item()]  # the image is the same
    assert result.data.values.flatten().tolist() == pytest.approx(expected, abs=1e-10)
    assert abs(expected[1] - ends[1]) > 1e-6


def test_pairs_of_images_of_other_shapes_do_not_align():
    model = NEXT.model(torch.float32)
    model.processor = processor(member=NEXT)
    wide, tall, other = (Image.new("RGB", size, "red") for size in ((90, 21), (16, 47), (40, 40)))
    for image in (tall, other):
        pair = Pair(wide, "what is it ?", corrupt_image=image, answer="red", foil="w20", name="x")
        with pytest.raises(
            ValueError, match=r"pair 'x': positions do not align, .* \[3, \d\] tiles"
        ):
            P.activation_patching(model, pair, "text.blocks.0.hook_resid_pre", progress=False)
    pair = Pair(wide, "what is it ?", wide.rotate(180), answer="red", foil="w20")
    P.activation_patching(model, pair, "text.blocks.0.hook_resid_pre", progress=False)
