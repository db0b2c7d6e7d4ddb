"""From pictures and questions to LLaVA's inputs, and from its positions back to the pictures."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from checkpoints import processor as blip_processor
from llava_processors import TEMPLATE, processor
from PIL import Image, ImageDraw
from torch.nn import functional as F
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from zoo import error
from zoo_llava import LLAMA, MISTRAL, NEXT, NEXT_PARITY, LlavaMember

from hooked_vlm import HookedLlava, checking

# Patches of 8 pixels, so that what resizing smears over their edges is a small part.
FINE = LlavaMember(image=32, patch=8)
FINE_NEXT = LlavaMember(
    image=32,
    patch=8,
    resolutions=((32, 64), (64, 32), (64, 64), (96, 32), (32, 96)),
    context=128,
)
SIZES = [(64, 64), (150, 64), (90, 333), (100, 75), (200, 410), (700, 90)]
BOX = ["left", "top", "right", "bottom"]


def built(member, **options):
    model = member.model(torch.float32)
    model.processor = processor(member=member, **options)
    return model


def picture(colour="red", size=(40, 20)):
    return Image.new("RGB", size, colour)


def noise(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


# --- where a position is in the picture


def changed(model, plain, marked):
    """For each view and patch how much of it differs, from 0 to 1; by the pixels alone."""
    one, other = (model.prepare(image, "red ?") for image in (plain, marked))
    std = torch.tensor(model.processor.image_processor.image_std)[:, None, None]
    share = ((other["pixel_values"] - one["pixel_values"]).flatten(0, -4) * std).mean(1)
    return F.avg_pool2d(share, model.cfg.vision.patch_size), one


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("way", ["crop", "pad", "tile"])
def test_boxes_are_where_pixels_come_from(way, size):
    """A white block on black: each patch changes as much as its box is covered by it."""
    model = built(FINE_NEXT) if way == "tile" else built(FINE, pad=way == "pad")
    width, height = size
    generator = np.random.default_rng(sum(size))
    for _ in range(3):
        left, right = sorted(generator.choice(width + 1, 2, replace=False).tolist())
        top, bottom = sorted(generator.choice(height + 1, 2, replace=False).tolist())
        plain, marked = picture("black", size), picture("black", size)
        ImageDraw.Draw(marked).rectangle((left, top, right - 1, bottom - 1), fill="white")
        share, inputs = changed(model, plain, marked)
        frame = model.token_map(inputs)
        frame = frame[(frame["stack"] == "vision") & frame["patch_row"].notna()]
        assert len(frame) == share.numel()
        found, expected = [], []
        for line in frame.itertuples():
            across = min(right, line.right) - max(left, line.left)
            down = min(bottom, line.bottom) - max(top, line.top)
            area = (line.right - line.left) * (line.bottom - line.top)
            expected.append(max(across, 0) * max(down, 0) / area)
            found.append(share[line.row, line.patch_row, line.patch_column].item())
        assert found == pytest.approx(expected, abs=0.05), (left, top, right, bottom)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_boxes_lie_in_the_picture_but_for_padding(size):
    width, height = size
    frames = {
        way: model.token_map(model.prepare(picture("red", size), "red ?"))
        for way, model in (
            ("crop", built(FINE)),
            ("pad", built(FINE, pad=True)),
            ("tile", built(FINE_NEXT)),
        )
    }
    whole = {
        way: (frame[BOX[:2]].min().tolist(), frame[BOX[2:]].max().tolist())
        for way, frame in frames.items()
    }
    (left, top), (right, bottom) = whole["crop"]
    assert min(left, top) >= 0 and right <= width and bottom <= height
    assert right - left == pytest.approx(bottom - top, rel=0.05)
    (left, top), (right, bottom) = whole["pad"]
    side = max(size)
    assert (right - left, bottom - top) == pytest.approx((side, side))
    assert left == -((side - width) // 2) and top == -((side - height) // 2)
    base = frames["tile"].query("stack == 'vision' and tile == 0")
    assert base[BOX[:2]].min().tolist() == [0, 0]
    assert base[BOX[2:]].max().tolist() == pytest.approx([width, height])
    # What is read of the tiles covers the picture: a padded patch is left out, or stands half out.
    read = frames["tile"].query("stack == 'text' and tile > 0")
    box = (read["right"] - read["left"]).max(), (read["bottom"] - read["top"]).max()
    assert (read[BOX[2:]].max() <= np.add(size, box)).all()
    assert (read[BOX[:2]].min() >= np.negative(box)).all()


@pytest.mark.parametrize("member", NEXT_PARITY, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_hold_the_features_that_the_map_names(member, side):
    """Two texts with pictures of different shapes: tile and patch, or the newline."""
    model = built(member, side=side)
    sizes = [(90, 21), (16, 47), (30, 30)]
    texts = ["red <image> ?", "what is <image> and <image>"]
    inputs = model.prepare([noise(size, i) for i, size in enumerate(sizes)], texts)
    names = ["hook_image_embeds", "text.hook_embed"]
    _, cache = model.run_with_cache(**inputs, names_filter=names)
    frame, grid = model.token_map(inputs), model.cfg.vision.grid
    vision, text = (frame[frame["stack"] == stack] for stack in ("vision", "text"))
    assert len(vision) == cache["hook_image_embeds"].shape[0] * model.cfg.vision.n_ctx
    first = vision.groupby("image")["row"].min()
    assert vision.groupby("image")["tile"].max().tolist() == [
        len(geometry.tiles) for geometry in inputs.geometry
    ]
    boxes = vision.set_index(["row", "patch_row", "patch_column"])[BOX]
    counted = {"feature": 0, "newline": 0, "word": 0}
    for line in text.itertuples():
        standing = cache["text.hook_embed"][line.row, line.position]
        if line.token != "<image>":
            counted["word"] += 1
            assert line.image is line.tile is line.patch_row is pd.NA
            continue
        assert (line.image > 0) == (line.row == 1)
        if line.tile is pd.NA:
            counted["newline"] += 1
            assert torch.equal(standing, model.image_newline)
            continue
        counted["feature"] += 1
        view = first[line.image] + line.tile
        embeds = cache["hook_image_embeds"][view].view(grid, grid, -1)
        assert torch.equal(standing, embeds[line.patch_row, line.patch_column])
        box = boxes.loc[(view, line.patch_row, line.patch_column)]
        assert box.tolist() == [line.left, line.top, line.right, line.bottom]
    assert min(counted.values()) > 0
    tokens = sum(member.tokens(size[::-1]) for size in sizes)
    assert counted["feature"] + counted["newline"] == tokens


# --- two ways of 1.5 to make a square


def test_padding_to_a_square_is_the_original_one(tmp_path):
    """The image in the middle of a square of CLIP's mean colour, as LLaVA's own code has it."""
    model = built(LLAMA, pad=True)
    model.save_pretrained(tmp_path)
    model = HookedLlava.from_pretrained(tmp_path)
    images = model.processor.image_processor
    assert isinstance(images, LlavaImageProcessorPil) and images.do_pad
    for size in ((40, 20), (15, 51), (24, 24)):
        image, side = noise(size), max(size)
        square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in images.image_mean))
        square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
        plain = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
        expected = plain(square, return_tensors="pt")["pixel_values"]
        inputs = model.prepare(image, "what is it ?")
        assert error(inputs["pixel_values"], expected) < 1e-6
        cropped = built(LLAMA).prepare(image, "what is it ?")
        same = torch.equal(cropped["pixel_values"], inputs["pixel_values"])
        assert same == (size == (24, 24))


@pytest.mark.parametrize("way", ["crop", "pad", "tile", "mistral"])
def test_inputs_and_logits_are_those_of_transformers(way, tmp_path):
    """A folder that both open: the same processor, prompt and weights."""
    member = {"tile": NEXT, "mistral": MISTRAL}.get(way, LLAMA)
    theirs, model = member.pair(torch.float32)
    model.processor = processor(member=member, pad=way == "pad")
    model.save_pretrained(tmp_path)
    ours, theirs = HookedLlava.from_pretrained(tmp_path), type(theirs).from_pretrained(tmp_path)
    kind = type(model.processor)
    own = kind.from_pretrained(tmp_path, backend="pil")
    images = [noise((40, 21)), noise((16, 33), 1)]
    texts = ["red <image> ?", "what is it <image>"]
    inputs = ours.prepare(images, texts)
    expected = own(images=images, text=texts, padding=True, return_tensors="pt")
    assert set(inputs) == set(expected) and type(ours.processor) is kind
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert error(ours(**inputs)[mask], theirs.eval()(**expected).logits[mask]) < 1e-5


def test_check_agrees_for_tiles_too(tmp_path, capfd):
    model = built(NEXT)
    model.save_pretrained(tmp_path)
    assert checking.check(HookedLlava.from_pretrained(tmp_path), str(tmp_path))
    said = capfd.readouterr().out
    assert [line.split("│")[2].strip() for line in said.splitlines() if "equal" in line] == (
        ["4", "6", "1"]
    )
    model.image_newline.mul_(2)
    assert not checking.check(model, str(tmp_path))


# --- prompts


PROMPTS = {
    "llama": "<s> USER : what is it ? ASSISTANT :",
    "mistral": "<s> [ INST ] what is it ? [/ INST ]",
}


@pytest.mark.parametrize("member", [LLAMA, MISTRAL, NEXT], ids=str)
def test_prompts_without_an_image(member):
    model = built(member)
    inputs = model.prepare(None, ["what is it ?", "red ?"])
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs.geometry == []
    words = model.to_str_tokens(inputs["input_ids"][0])
    assert words == PROMPTS[member.language].split()
    assert inputs["attention_mask"].sum(1).tolist() == [len(words), len(words) - 2]
    assert model(**inputs).shape == (2, len(words), member.vocab)
    frame = model.token_map(inputs)
    assert set(frame["stack"]) == {"text"} and frame["image"].isna().all()
    assert frame["token"].tolist()[: len(words)] == words
    model.processor = processor(TEMPLATE, member=member)
    asked = model.to_str_tokens(model.prepare(None, "what is it ?")["input_ids"])
    assert asked == ["<s>", "Q", ":", *"what is it ?".split(), "A", ":"]
    with pytest.raises(ValueError, match="0 images do not match 1 <image> in 1 texts"):
        model.prepare(None, "red <image>")


def test_mistral_is_asked_in_its_own_words():
    model = built(NEXT)
    words = model.to_str_tokens(model.prepare(picture(), "what is it ?")["input_ids"])
    assert words[:4] == ["<s>", "[", "INST", "]"] and words[4] == words[-8] == "<image>"
    assert words[-7:] == "what is it ? [/ INST ]".split()


def test_tiles_in_batches():
    model = built(NEXT)
    wide, tall = noise((90, 21)), noise((16, 47), 1)
    one, other, both = (
        model.prepare(images, "what is it ?") for images in (wide, tall, [wide, tall])
    )
    assert [len(x["pixel_values"][0]) for x in (one, other)] == [3 + 1, 3 + 1]
    mask = both["attention_mask"].bool()
    logits = model(**both)
    for row, alone in enumerate((one, other)):
        assert error(logits[row][mask[row]], model(**alone)[0]) < 1e-5
    shared = model.prepare(wide, ["red ?", "what is it ?"])
    assert shared["pixel_values"].shape[0] == len(shared["image_sizes"]) == 1
    assert error(model(**shared)[1], model(**one)[0]) < 1e-5
    several = model.prepare([wide, tall], "<image> <image> ?")
    assert several["image_sizes"].tolist() == [[21, 90], [47, 16]]
    assert model(**several).shape[0] == 1
    with pytest.raises(ValueError, match="3 images do not match 2 <image> in 2 texts"):
        model.prepare([wide] * 3, ["red ?", "what is it ?"])


# --- processors that do not fit


def images(member, **changes):
    found = processor(member=member)
    for name, value in changes.items():
        setattr(found.image_processor, name, value)
    return found


def of_another(found, next_=False):
    """A LLaVA's processor of another model's parts, as its folder gives one."""
    kind = transformers.LlavaNextProcessor if next_ else transformers.LlavaProcessor
    return kind(
        found.image_processor,
        found.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize(
    ("member", "given", "said"),
    [
        (LLAMA, processor(member=NEXT), "is a LlavaNextProcessor, this model needs a LlavaProc"),
        (NEXT, processor(), "is a LlavaProcessor, this model needs a LlavaNextProcessor"),
        (LLAMA, blip_processor(), "is a BlipProcessor, this model needs a LlavaProcessor"),
        (NEXT, blip_processor(), "is a BlipProcessor, this model needs a LlavaNextProcessor"),
        (LLAMA, of_another(blip_processor()), r"'<image>' is token \d+, the model's 36; pass proc"),
        (LLAMA, of_another(processor(member=NEXT)), r"image_grid_pinpoints=\[.*, the model None;"),
        (NEXT, of_another(processor(), next_=True), r"image_grid_pinpoints=None, the model \[\[16"),
        (
            NEXT,
            processor(member=NEXT, additional=0),
            r"num_additional_image_tokens=0.* it needs 8, 'default' and 1",
        ),
        (NEXT, processor(member=FINE_NEXT), r"\(LlavaNextImageProcessorPil\) makes pictures of 32"),
        (LLAMA, processor(member=FINE), r"\(CLIPImageProcessorPil\) makes pictures of 32 x 32"),
        (LLAMA, processor(member=LlavaMember(vocab=40)), "'<image>' is token 39, the model's 36"),
        (LLAMA, processor(member=LlavaMember(patch=4)), "patch_size=4"),
        (LLAMA, images(LLAMA, do_center_crop=False), "the shape of each image, the model reads 16"),
        (LLAMA, images(LLAMA, do_center_crop=False, do_resize=False), "the shape of each image"),
        (
            NEXT,
            images(NEXT, image_grid_pinpoints=[[16, 32]]),
            r"image_grid_pinpoints=\[\[16, 32\]\], the model \[\[16, 32\], \[32, 16\]",
        ),
    ],
)
def test_processors_that_do_not_fit_are_refused(member, given, said):
    model = member.model(torch.float32)
    model.processor = given
    with pytest.raises(ValueError, match=said):
        model.prepare(picture(), "what is it ?")


def test_a_processor_that_squashes_fits():
    model = built(LLAMA)
    model.processor.image_processor = transformers.CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, do_center_crop=False
    )
    assert model.prepare(picture(), "red ?").geometry[0].crop == (0, 0, 40, 20)


def test_prompts_that_are_too_long_are_refused():
    model = built(NEXT)
    with pytest.raises(ValueError, match=r"has \d+ tokens, those of its images .* reads 64"):
        model.prepare([picture()] * 5, "<image>" * 5)
