"""Positions to pixels and tokens, words to ids and directions, and the loss."""

import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import BatchEncoding
from zoo import BLIP

from hooked_vlm import HookedBLIP

ITM, CAPTIONING, VQA = BLIP


@pytest.fixture(scope="module")
def toys():
    return {t: HookedBLIP.from_pretrained(f"toy-blip-{t}") for t in ("itm", "captioning", "vqa")}


def test_boxes_of_an_image_that_is_no_square(toys):
    """60 by 30 pixels in 6 by 6 patches: each is 10 wide and 5 high."""
    model = toys["itm"]
    pictures = [Image.new("RGB", (60, 30)), Image.new("RGB", (12, 48))]
    table = model.token_map(model.prepare(pictures, ["a red circle", "a cross"]))
    vision = table[table["stack"] == "vision"].set_index(["row", "position"])
    assert len(vision) == 2 * 37
    box = ["left", "top", "right", "bottom"]
    assert vision.loc[(0, 0), box].isna().all()
    assert vision.loc[(0, 1), box].tolist() == [0, 0, 10, 5]
    assert vision.loc[(0, 9), [*box, "patch_row", "patch_column"]].tolist() == [20, 5, 30, 10, 1, 2]
    assert vision.loc[(0, 36), box].tolist() == [50, 25, 60, 30]
    assert vision.loc[(1, 9), box].tolist() == [4, 8, 6, 16]
    text = table[table["stack"] == "text"]
    assert text[text["row"] == 0]["token"].tolist() == ["[CLS]", "a", "red", "circle", "[SEP]"]
    assert text[text["row"] == 1]["token"].tolist() == ["[CLS]", "a", "cross", "[SEP]", "[PAD]"]
    assert text[box].isna().all(axis=None)
    assert table["patch_row"].dtype == pd.Int64Dtype()


def test_maps_of_the_other_tasks(toys):
    picture = Image.new("RGB", (48, 48))
    captioning, vqa = toys["captioning"], toys["vqa"]
    table = captioning.token_map(captioning.prepare(picture))
    assert set(table["stack"]) == {"vision"}
    table = captioning.token_map(captioning.prepare(picture, "a"))
    assert table[table["stack"] == "decoder"]["token"].tolist() == ["[CLS]", "a", "[SEP]"]
    table = vqa.token_map(vqa.prepare(picture, "is it"))
    assert table[table["stack"] == "text"]["token"].tolist() == ["[CLS]", "is", "it", "[SEP]"]
    with pytest.raises(ValueError, match="do not say what image they are of"):
        vqa.token_map(BatchEncoding({"input_ids": torch.ones(1, 2)}))


def test_words_and_tokens(toys):
    model = toys["itm"]
    ids = model.tokenizer.convert_tokens_to_ids
    expected = [ids(word) for word in ("[CLS]", "a", "red", "cross", "[SEP]")]
    assert model.to_tokens("a red cross").tolist() == [expected]
    padded = [*(ids(word) for word in ("[CLS]", "a", "[SEP]")), 0, 0]
    assert model.to_tokens(["a red cross", "a"]).tolist() == [expected, padded]
    assert model.to_str_tokens("a zoo") == ["[CLS]", "a", "z", "##o", "##o", "[SEP]"]
    assert model.to_str_tokens(torch.tensor(expected)) == ["[CLS]", "a", "red", "cross", "[SEP]"]
    assert model.to_single_token("red") == ids("red")
    assert model.to_single_token("[ENC]") == ids("[ENC]")
    for text in ("zoo", "a red", "", "\N{SNOWMAN}"):
        with pytest.raises(ValueError, match="is not one token but"):
            model.to_single_token(text)
    with pytest.raises(ValueError, match="text 0 is empty"):
        model.to_tokens("")


def test_embeddings_and_unembeddings(toys):
    for task in ("captioning", "vqa"):
        model = toys[task]
        bert = model.decoder
        assert model.W_E.data_ptr() == bert.embed.weight.data_ptr()
        assert model.W_U.shape == (bert.cfg.d_model, bert.cfg.d_vocab)
        assert torch.equal(model.W_U.mT, model.W_E)  # tied
        assert model.b_U.shape == (bert.cfg.d_vocab,)
        inputs = model.prepare_prompt(Image.new("RGB", (48, 48)), "what is it")
        with torch.no_grad():
            logits, cache = model.run_with_cache(**inputs, names_filter="unembed.hook_post")
            states = model.unembed.ln(cache["unembed.hook_post"])
        torch.testing.assert_close(states @ model.W_U + model.b_U, logits)
        red, blue = map(model.to_single_token, ("red", "blue"))
        assert torch.equal(model.tokens_to_residual_directions("red"), model.W_U[:, red])
        assert torch.equal(model.tokens_to_residual_directions(blue), model.W_U[:, blue])
        both = model.tokens_to_residual_directions(torch.tensor([[red], [blue]]))
        assert torch.equal(both, model.W_U[:, [red, blue]].mT[:, None])
        with pytest.raises(ValueError, match="is not one token"):
            model.tokens_to_residual_directions("a zoo")
    itm = toys["itm"]
    assert itm.W_E.data_ptr() == itm.text.embed.weight.data_ptr()
    for wanted in ("W_U", "b_U"):
        with pytest.raises(ValueError, match="task 'itm' predicts no tokens"):
            getattr(itm, wanted)


def test_the_loss_of_captioning_is_transformers():
    theirs, ours = CAPTIONING.pair()
    inputs = CAPTIONING.inputs(3, padded=False)
    # transformers smooths labels; its plain cross-entropy is recomputed from its own logits
    theirs.text_decoder.label_smoothing = 0.0
    expected = theirs(**inputs, labels=inputs["input_ids"]).loss
    loss = ours(**inputs, return_type="loss")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert ours(**inputs, return_type=None) is None
    assert torch.equal(ours(**inputs, return_type="logits"), ours(**inputs))


@pytest.mark.parametrize("member", [CAPTIONING, VQA], ids=str)
def test_the_loss_is_the_mean_over_tokens_that_are_no_padding(member):
    ours, inputs = member.model(), member.inputs(3)
    which = "decoder_" if member.task == "vqa" else ""
    ids, mask = inputs[f"{which}input_ids"], inputs[f"{which}attention_mask"]
    assert not mask.all()
    log_probs = ours(**inputs).log_softmax(-1)
    terms = [
        -log_probs[row, at, ids[row, at + 1]]
        for row in range(len(ids))
        for at in range(int(mask[row].sum()) - 1)
    ]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(ours(**inputs, return_type="loss"), expected, rtol=1e-9, atol=1e-9)


def test_the_loss_of_vqa_is_transformers():
    theirs, ours = VQA.pair()
    inputs = VQA.inputs(3, padded=False)
    theirs.text_decoder.label_smoothing = 0.0
    answer = inputs["decoder_input_ids"].masked_fill(inputs["decoder_attention_mask"] == 0, -100)
    seen = {}
    theirs.text_decoder.cls.register_forward_hook(lambda *given: seen.update(logits=given[2]))
    theirs(**inputs)
    logits = seen["logits"][:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer[:, 1:].flatten())
    loss = ours(**inputs, return_type="loss")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_losses_that_are_none():
    with pytest.raises(ValueError, match="predicts no next token"):
        ITM.model()(**ITM.inputs(1), return_type="loss")
    inputs = VQA.inputs(1)
    question = {k: v for k, v in inputs.items() if "decoder" not in k}
    with pytest.raises(ValueError, match="needs the tokens that are to be predicted"):
        VQA.model()(**question, return_type="loss")
