"""What is CLIP's own: inputs of any number, what of an image it sees, maps without positions."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_conversion_clip import END, RESNET, START, VIT, processor
from transformers import CLIPImageProcessorPil
from zoo import error
from zoo_clip import CLIP, CLIP_RESNET, CLIP_VIT

from hooked_vlm import patching as P

each = pytest.mark.parametrize("member", [VIT, RESNET], ids=["vit", "resnet"])
MAPS = "vision.blocks.*.hook_stage_out"


@functools.cache
def built(member):
    model = member.model(torch.float32)
    model.processor = processor()
    return model


@pytest.fixture
def model(member):
    return built(member)


@pytest.fixture
def picture():
    return Image.effect_noise((60, 40), 80).convert("RGB")


def perturb(x, hook):
    """Depends on the row, the position and the point, but not on the size of the batch."""
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(len(hook.name)))
    size = x.flatten(1).clamp(-9, 9).mean(1).cos().view(-1, *[1] * (x.dim() - 1))
    return x + noise.to(x).abs() * (1 + size)


# --- hooks and resuming, for other numbers of images than of texts


@functools.cache
def double(member):
    return member.model()


@settings(max_examples=60)
@given(data=st.data())
def test_any_sites_of_any_rows_resume_exactly(data):
    member = data.draw(st.sampled_from(CLIP))
    images, texts = data.draw(st.sampled_from([(1, 3), (3, 1), (2, 3), (3, 2), (1, 1)]))
    model, inputs = double(member), member.inputs(texts, images)
    base = model.base_run(**inputs)
    assert error(base.logits, model(**inputs)) < 1e-14
    site = st.sampled_from(model.hook_names(heads=True))
    names = data.draw(st.lists(site, min_size=1, max_size=3, unique=True))
    rows = data.draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=5))
    hooks = [(name, perturb) for name in names]
    resumed = model.resume(base, names, rows=rows, fwd_hooks=hooks)
    naive = model.run_with_hooks(**member.chosen(inputs, rows), fwd_hooks=hooks)
    assert error(resumed, naive) < 1e-10


@pytest.mark.parametrize("member", CLIP, ids=str)
def test_heads_sum_to_what_their_module_adds(member):
    model, inputs = double(member), member.inputs(2, 3)
    names = ["*.hook_result", "*.heads.*.hook_result", "*.hook_attn_out"]
    _, cache = model.run_with_cache(**inputs, names_filter=names)
    logits, plain = model.run_with_cache(**inputs, names_filter="*.hook_attn_out")
    assert error(logits, model(**inputs)) < 1e-12
    results = [name for name in cache if name.endswith("attn.hook_result") and "heads" not in name]
    assert len(results) >= 2
    for name in results:
        attn = model.get_submodule(name.removesuffix(".hook_result"))
        heads = [
            cache[name.replace("hook_result", f"heads.{h}.hook_result")]
            for h in range(attn.n_heads)
        ]
        summed = sum(heads) + attn.b_O
        out = name.replace("attn.hook_result", "hook_attn_out")
        assert error(summed, plain[out]) < 1e-12, name


# --- inputs


@each
def test_any_number_of_images_meets_any_number_of_texts(model, picture):
    texts = ["red", "a bed", "cab"]
    images = [picture, picture.rotate(90, expand=True)]
    whole = model(**model.prepare(images, texts))
    assert whole.shape == (2, 3)
    for row, image in enumerate(images):
        for column, text in enumerate(texts):
            one = model(**model.prepare(image, text))
            assert error(one, whole[row : row + 1, column : column + 1]) < 1e-5
    assert model(**model.prepare(images, "red")).shape == (2, 1)
    assert model(**model.prepare(images[0], texts)).shape == (1, 3)


@each
def test_inputs_that_are_wrong(model, picture):
    with pytest.raises(ValueError, match="has 42 tokens, the model reads 12; shorten 'a a"):
        model.prepare(picture, "a " * 40)
    with pytest.raises(ValueError, match="'clip' needs a text"):
        model.prepare(picture)
    with pytest.raises(ValueError, match="first_token='enc' is BLIP's"):
        model.prepare(picture, "red", first_token="enc")
    inputs = dict(model.prepare([picture] * 2, ["red", "a bed", "cab"]))
    with pytest.raises(ValueError, match="the loss needs pairs; here are 2 images and 3 texts"):
        model(**inputs, return_type="loss")
    with pytest.raises(ValueError, match="ids outside of the vocabulary"):
        model(**inputs | {"input_ids": inputs["input_ids"] + 1})
    with pytest.raises(ValueError, match=r"input_ids is missing: model.prepare\(images, text\)"):
        model(pixel_values=inputs["pixel_values"])
    for wanted in ("W_U", "b_U"):
        with pytest.raises(ValueError, match="task 'clip' predicts no tokens"):
            getattr(model, wanted)
    assert model.W_E is model.text.embed.weight


# --- what of an image the model sees


@pytest.mark.parametrize("size", [(32, 32), (90, 64), (61, 187), (20, 33), (333, 100)])
def test_the_visible_box_is_where_pixels_come_from(size):
    """A picture whose pixels say where they are: each cell of the model sees its own box."""
    model = built(VIT)
    width, height = size
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    ramp = (np.stack([x, y, 0 * x], -1) * 255).round().astype(np.uint8)
    inputs = model.prepare(Image.fromarray(ramp), "red")
    ((left, top, right, bottom),) = [geometry.crop for geometry in inputs.geometry]
    assert left >= 0 and top >= 0 and right <= width and bottom <= height
    assert right - left == pytest.approx(bottom - top, rel=0.05)  # a square, but for rounding
    images = model.processor.image_processor
    mean, std = (torch.tensor(v)[:, None, None] for v in (images.image_mean, images.image_std))
    shown = inputs["pixel_values"][0] * std + mean
    cells = (
        torch.nn.functional.avg_pool2d(shown, 8)[:2] * torch.tensor([width, height])[:, None, None]
    )
    frame = model.token_map(inputs)
    frame = frame[(frame["stack"] == "vision") & frame["patch_row"].notna()]
    assert len(frame) == 16
    for line in frame.itertuples():
        seen = cells[:, line.patch_row, line.patch_column]
        middle = ((line.left + line.right) / 2, (line.top + line.bottom) / 2)
        assert seen.tolist() == pytest.approx(middle, abs=0.02 * max(size)), line


def test_a_processor_that_squashes_shows_the_whole_image():
    model = VIT.model(torch.float32)
    model.processor = processor()
    model.processor.image_processor = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False
    )
    (geometry,) = model.prepare(Image.new("RGB", (90, 40)), "red").geometry
    assert geometry.crop == (0, 0, 90, 40)
    model.processor.image_processor = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, crop_size={"height": 32, "width": 32}
    )
    (geometry,) = model.prepare(Image.new("RGB", (128, 64)), "red").geometry
    assert geometry.crop == (32, 16, 96, 48)
    model.processor.image_processor = CLIPImageProcessorPil(
        do_resize=False, crop_size={"height": 32, "width": 32}
    )
    (geometry,) = model.prepare(Image.new("RGB", (52, 72)), "red").geometry
    assert geometry.crop == (10, 20, 42, 52)


@each
def test_the_token_map_names_every_position(model, picture):
    inputs = model.prepare([picture, picture], ["red", "a bed", "cab"])
    frame = model.token_map(inputs)
    grid = model.cfg.vision.grid
    vision, text = (frame[frame["stack"] == stack] for stack in ("vision", "text"))
    assert len(vision) == 2 * (grid**2 + 1)
    point = "vision.ln_final.hook_normalized"
    if "ln_final" not in model.vision._modules:
        point = "vision.attnpool.hook_k"
    _, cache = model.run_with_cache(**inputs, names_filter=[point, "text.hook_embed"])
    assert cache[point].shape[:2] == (2, grid**2 + 1)
    assert cache["text.hook_embed"].shape[:2] == (3, len(text) // 3)
    first = text[text.row == 0].token.tolist()
    assert first[:3] == ["<|startoftext|>", "red</w>", "<|endoftext|>"]
    assert inputs["input_ids"][0, 0] == START and inputs["input_ids"][0, 2] == END
    corner = vision[(vision.row == 1) & (vision.position == grid**2)].iloc[0]
    assert (corner.patch_row, corner.patch_column) == (grid - 1, grid - 1)
    assert (corner.right, corner.bottom) == (50, 40)  # 60 x 40 pixels: 10 cut off at either side


# --- maps have no positions


def test_positions_of_maps_are_refused(picture):
    model = built(RESNET)
    inputs = model.prepare(picture, "red")
    with pytest.raises(ValueError, match=r"'vision.blocks.1.hook_stage_out' is .*no positions for"):
        model.run_with_cache(**inputs, names_filter=MAPS, pos_slice=0)
    names = ["vision.attnpool.hook_k", "hook_image_embeds"]
    _, whole = model.run_with_cache(**inputs, names_filter=names)
    _, cache = model.run_with_cache(**inputs, names_filter=names, pos_slice=[1])
    assert torch.equal(cache[names[0]], whole[names[0]][:, [1]])
    assert torch.equal(cache[names[1]], whole[names[1]])
    pair = inputs, model.prepare(picture.rotate(90), "red")
    sweep = functools.partial(
        P.activation_patching, model, pair, metric=lambda logits: logits[:, 0], progress=False
    )
    with pytest.raises(ValueError, match="has no positions; pass positions=None"):
        sweep(MAPS, positions="each")
    with pytest.raises(ValueError, match="has no position 1, it has 0 positions"):
        sweep(MAPS, positions=[1])
    with pytest.raises(ValueError, match=r"'vision.blocks.1.hook_stage_out' has no position 1"):
        sweep(model.sites("vision.blocks.1.hook_stage_out", positions=[1]))


@each
def test_patching_an_image_into_another(model, picture):
    """Every site of the stream restores the clean logit, whatever its shape."""
    pair = model.prepare(picture, "red"), model.prepare(picture.rotate(90), "red")
    clean, corrupt = (model(**inputs)[0, 0].item() for inputs in pair)
    assert abs(clean - corrupt) > 1e-4
    result = P.activation_patching(
        model,
        pair,
        "vision.blocks.*.hook_resid_post",
        metric=lambda logits: logits[:, 0],
        progress=False,
    )
    assert result.data.size == model.vision.cfg.n_layers
    assert np.allclose(result.data, clean, atol=1e-5)


def test_the_cache_of_a_resnet_refuses_sums():
    model, inputs = CLIP_RESNET.model(), CLIP_RESNET.inputs(2)
    _, cache = model.run_with_cache(**inputs)
    stack = cache.stack("vision")
    assert torch.equal(stack["resid_post", -1], cache["vision.blocks.2.hook_stage_out"])
    for what in ("accumulated_resid", "decompose_resid", "get_full_resid_decomposition"):
        with pytest.raises(NotImplementedError, match=r"a ReLU follows each sum.*Indexing works"):
            getattr(stack, what)()
    with pytest.raises(ValueError, match="blocks have no 'attn'; its heads are those of attnpool"):
        model.vision.head_weights()
    with pytest.raises(ValueError, match="blocks have no 'attn'"):
        _ = model.vision.W_Q
    assert model.vision.attnpool.W_V.shape == (2, 32, 16)


def test_the_cache_of_a_vision_transformer_decomposes():
    model, inputs = CLIP_VIT.model(), CLIP_VIT.inputs(2)
    _, cache = model.run_with_cache(**inputs)
    for name in ("vision", "text"):
        stack = cache.stack(name)
        whole = stack.get_full_resid_decomposition(expand_neurons=False)
        assert error(whole.sum(0), cache[f"{name}.blocks.1.hook_resid_post"]) < 1e-10
        parts, labels = stack.decompose_resid(return_labels=True)
        assert error(parts.sum(0), cache[f"{name}.blocks.1.hook_resid_post"]) < 1e-10
        assert ("pos_embed" in labels) == (name == "text")
        norm = model.stacks[name].ln_final
        final = stack.apply_ln_to_stack(parts).sum(0) + norm.bias
        assert error(final, norm(cache[f"{name}.blocks.1.hook_resid_post"])) < 1e-10
