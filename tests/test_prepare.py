"""From images and texts to inputs: the processor's own numbers, or one clear error."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import DEC, ENC, IMAGE, SEP, hf_folder, processor, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hooked_vlm import HookedBLIP
from hooked_vlm.models.inputs import open_images


@pytest.fixture(scope="module")
def model():
    return HookedBLIP.from_hf(reference("itm"), processor())


@pytest.fixture(scope="module")
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_inputs_are_what_the_processor_gives(model, picture):
    texts = ["a red circle", "what is the color of the square"]
    other = picture.rotate(90, expand=True)
    expected = processor()(images=[picture, other], text=texts, padding=True, return_tensors="pt")
    inputs = model.prepare([picture, other], texts)
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask"}
    for name, tensor in inputs.items():
        assert torch.equal(tensor, expected[name]), name
    assert inputs.first_token == "cls"
    assert [g.size for g in inputs.geometry] == [(47, 31), (31, 47)]
    assert [g.crop for g in inputs.geometry] == [(0, 0, 47, 31), (0, 0, 31, 47)]
    assert model(**inputs).shape == (2, 2)


def test_one_image_may_go_with_several_texts(model, picture):
    texts = ["a circle", "a square", "a picture"]
    inputs = model.prepare(picture, texts)
    assert inputs["pixel_values"].shape == (1, 3, IMAGE, IMAGE)
    assert len(inputs.geometry) == 1
    one_by_one = [model(**model.prepare(picture, text)) for text in texts]
    torch.testing.assert_close(model(**inputs), torch.cat(one_by_one))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_images_of_any_mode_and_from_files_are_read_alike(mode, model, picture, tmp_path):
    image = picture.convert("I" if mode == "I;16" else "RGB").convert(mode)
    expected = processor().image_processor([image.convert("RGB")], return_tensors="pt")
    inputs = model.prepare(image, "a circle")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    file = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(file)
    for path in (file, str(file)):
        assert torch.equal(model.prepare(path, "a circle")["pixel_values"], inputs["pixel_values"])


def test_the_first_token_is_a_visible_switch(model, picture):
    cls, enc = (model.prepare(picture, "a circle", first_token=first) for first in ("cls", "enc"))
    assert cls["input_ids"].tolist() == [[2, 5, 9, SEP]]
    assert enc["input_ids"].tolist() == [[ENC, 5, 9, SEP]]
    assert (cls.first_token, enc.first_token) == ("cls", "enc")
    assert not torch.equal(model(**cls), model(**enc))


def test_words_and_tokens(model):
    assert model.to_tokens(["a circle", "a"]).tolist() == [[2, 5, 9, SEP], [2, 5, SEP, 0]]
    assert model.to_str_tokens("a xx") == ["[CLS]", "a", "x", "##x", "[SEP]"]
    assert model.to_single_token("circle") == 9
    assert model.decode(torch.tensor([[DEC, 5, 9, SEP, 0]])) == ["a circle"]
    for text in ("xx", "unheard", "a circle"):
        with pytest.raises(ValueError, match="is not one token but"):
            model.to_single_token(text)


# --- what is wrong gets one clear error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "text 0 is empty"),
        (["a circle", " \n"], "text 1 is empty"),
        ([], "no text was given"),
        ("a " * 40, r"has 42 tokens, the model reads 20; shorten 'a a "),
        (["a", "a circle", "a square"], "2 images do not match 3 texts"),
    ],
)
def test_texts_that_are_wrong(text, says, model, picture):
    with pytest.raises(ValueError, match=says):
        model.prepare([picture] * (1 if isinstance(text, str) else 2), text)


def test_a_text_as_long_as_the_table_is_read(model, picture):
    assert model(**model.prepare(picture, "a " * 18)).shape == (1, 2)


def test_images_that_are_wrong(model, tmp_path, picture):
    with pytest.raises(ValueError, match="no image was given"):
        model.prepare([], "a")
    with pytest.raises(FileNotFoundError, match=r"there is no image file '.*absent.png'"):
        model.prepare(tmp_path / "absent.png", "a")
    for name, content in (("text.png", b"hello"), ("empty.jpg", b""), ("folder.png", None)):
        file = tmp_path / name
        file.mkdir() if content is None else file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}' is no image that can be read"):
            model.prepare(file, "a")
    picture.save(whole := io.BytesIO(), "PNG")
    half = Image.open(io.BytesIO(whole.getvalue()[:-900]))
    with pytest.raises(ValueError, match="image 1 is no image that can be read"):
        model.prepare([picture, half], ["a", "a"])


@pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")
@settings(max_examples=150)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]),
    at=st.floats(0, 1, exclude_max=True),
    noise=st.binary(max_size=6),
)
def test_a_damaged_image_is_read_or_refused(kind, at, noise, picture, tmp_path_factory):
    picture.save(buffer := io.BytesIO(), kind)
    content = bytearray(buffer.getvalue())
    start = int(at * len(content))
    if noise:
        content[start : start + len(noise)] = noise
    else:
        del content[start:]
    file = tmp_path_factory.getbasetemp() / "damaged"
    file.write_bytes(content)
    try:
        assert open_images(str(file))[0].mode == "RGB"
    except ValueError as error:
        assert "damaged' is no image that can be read" in str(error)


def test_without_a_processor_the_error_names_the_way_out(picture):
    bare = HookedBLIP.from_hf(reference("itm"))
    for call in (
        lambda: bare.prepare(picture, "a"),
        lambda: bare.to_tokens("a"),
        lambda: bare.decode(torch.tensor([[5]])),
    ):
        with pytest.raises(ValueError, match=r"no processor; pass processor= to from_hf or from_"):
            call()
    bare.processor = processor()
    assert bare(**bare.prepare(picture, "a")).shape == (1, 2)


def test_batches_that_do_not_match(model, picture):
    inputs = dict(model.prepare([picture] * 2, ["a circle", "a square"]))
    for wrong, says in (
        (
            {"input_ids": inputs["input_ids"].repeat(2, 1)[:3], "attention_mask": None},
            "3 rows and .* 2: batches",
        ),
        ({"pixel_values": inputs["pixel_values"][:, :, :8]}, "reads images of 16 x 16 pixels"),
        ({"input_ids": inputs["input_ids"] + 100}, "ids outside of the vocabulary, 0 to "),
        ({"input_ids": inputs["input_ids"].repeat(1, 9), "attention_mask": None}, "has 36 tokens"),
    ):
        with pytest.raises(ValueError, match=says):
            model(**inputs | wrong)
    assert not any(point.listening for point in model.hook_points())


def test_things_of_another_kind_without_the_shape_checks(tmp_path):
    """In the tests every annotation is checked; here are the errors that a user sees."""
    hf_folder(tmp_path, reference("itm"))
    script = f"""
import logging
for name in ("torchao", "torch.utils._pytree"):  # which transformers imports, and which has notes
    logging.getLogger(name).setLevel(logging.ERROR)
from PIL import Image
from hooked_vlm import HookedBLIP
model, image = HookedBLIP.from_pretrained({str(tmp_path)!r}), Image.new("RGB", (9, 9))
for images, text, how in ((3, "a", {{}}), ([image, 4], ["a", "a"], {{}}), (None, "a", {{}}),
                          (image, ["a", 5], {{}}), (image, 5, {{}}), (image, None, {{}}),
                          (image, "a", {{"first_token": "dec"}})):
    try:
        model.prepare(images, text, **how)
    except ValueError as error:
        print(error)
inputs = dict(model.prepare([image, image], ["a", "a"]))
for wrong in ({{"attention_mask": inputs["attention_mask"][:, :2]}}, {{"input_ids": None}},
              {{"input_ids": inputs["input_ids"][0]}}, {{"input_ids": inputs["input_ids"][:, :0]}},
              {{"pixel_values": inputs["pixel_values"][0]}}):
    try:
        model(**inputs | wrong)
    except ValueError as error:
        print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert ran.stderr == ""
    assert ran.stdout.splitlines() == [
        "images is neither a PIL image nor a path but a int",
        "image 1 is neither a PIL image nor a path but a int",
        "images is neither a PIL image nor a path but a NoneType",
        "text 1 is empty or no string: 5",
        "text is no string and no list of them: 5",
        "a model for task 'itm' needs a text",
        "first_token is 'cls' or 'enc', not 'dec'",
        "the attention mask of input_ids is [2, 2], input_ids is [2, 3]",
        "input_ids is missing: model.prepare(images, text) makes it of a text, "
        "prepare_prompt(images, None) of a caption of which nothing is there yet",
        "input_ids must be integers [batch, pos], it is [3]",
        "input_ids must be integers [batch, pos], it is [2, 0]",
        "pixel_values is [3, 16, 16], the model reads images of 16 x 16 pixels; "
        "model.prepare(images, text) makes them",
    ]
