"""Files of LLaVA's own repository: names, an image encoder that is elsewhere, words, pictures.

The names are written here a second time, from the released files.
"""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from test_loading import hub_cache
from zoo import error
from zoo_llava import LLAMA, LlavaMember

from hooked_vlm import HookedBLIP, HookedCLIP, HookedLlava, HookedVLM, checking
from weights_conversion import ConversionError, InMemory, llava, plan, revert

TOWER = "model.vision_tower.vision_tower."
NAMES = [
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^model\.vision_tower\.", TOWER + "vision_model."),
]
# Grouped queries; the class token is read, too, from a middle layer; Mistral; tied embeddings.
MEMBERS = [
    LLAMA,
    LlavaMember((16, 4, 2), (24, 3, 6, 2, 4), layer=-3, vocab=65),
    LlavaMember(strategy="full", layer=1, patch=4, vocab=50, left=False),
    LlavaMember((15, 2, 3), (16, 2, 4, 2, 4), "mistral", window=6, layer=-1, tied=True),
]
each = pytest.mark.parametrize("member", MEMBERS, ids=str)


def original(theirs, vocab):
    """The tensors of a transformers LLaVA under the names of LLaVA's, without an image token."""
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        if name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensor = tensor[: vocab - 1]
        renamed[name] = tensor.clone()
    return renamed


def config_of(member, **changes):
    """A `config.json` as LLaVA's training writes it."""
    (dv, _, _), (dt, lt, ht, kv, _) = member.vision, member.text
    return {
        "_name_or_path": "llava-v1.5-7b",
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": dt,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.02,
        "intermediate_size": 3 * dt,
        "max_length": 4096,
        "max_position_embeddings": 64,
        "mm_hidden_size": dv,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": {"default": "patch", "full": "cls_patch"}[member.strategy],
        "mm_vision_select_layer": member.layer,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "model_type": "llava_mistral" if member.language == "mistral" else "llava_llama",
        "num_attention_heads": ht,
        "num_hidden_layers": lt,
        "num_key_value_heads": kv,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 100.0,
        "sliding_window": member.window,
        "tie_word_embeddings": member.tied,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": member.vocab - 1,
        **changes,
    }


def as_json(file, content):
    file.write_text(json.dumps(content))


def shards(folder, state, stem, suffix, write):
    names = sorted(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    where = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        write({name: state[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    as_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": where})


def as_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def as_bin_shards(folder, state):
    shards(folder, state, "pytorch_model", "bin", torch.save)


def as_safetensors_shards(folder, state):
    shards(folder, state, "model", "safetensors", save_file)


def tower_folder(folder, state, member, whole=True, write=as_bin):
    """CLIP's repository: all of it, with its texts' half and old configurations; or a half."""
    width, layers, heads = member.vision
    folder.mkdir(parents=True)
    vision = {
        "hidden_size": width,
        "image_size": member.image,
        "intermediate_size": 3 * width,
        "model_type": "clip_vision_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "patch_size": member.patch,
        "projection_dim": 6,
    }
    text = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    text |= {"num_hidden_layers": 1, "vocab_size": 11, "max_position_embeddings": 5}
    state = {name[len(TOWER) :]: t for name, t in state.items() if name.startswith(TOWER)}
    config = vision
    if whole:
        config = {"model_type": "clip", "vision_config": vision, "text_config": text}
        clip = transformers.CLIPModel(transformers.CLIPConfig(**config, projection_dim=6))
        buffers = {"position_ids": torch.arange(member.size + (member.strategy == "default"))[None]}
        state = {
            **clip.state_dict(),
            **state,
            **{f"vision_model.embeddings.{name}": value for name, value in buffers.items()},
            "text_model.embeddings.position_ids": torch.arange(5)[None],
        }
    write(folder, state)
    as_json(folder / "config.json", config)
    as_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": member.image,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": member.image,
        },
    )
    return folder


def llava_folder(folder, member=LLAMA, inside=False, write=as_bin_shards, state=None, **changes):
    """LLaVA's repository, `inside` with the image encoder; and what it was made from."""
    theirs = member.reference()
    made = original(theirs, member.vocab) if state is None else state
    kept = {name: t for name, t in made.items() if inside or not name.startswith(TOWER)}
    projector = {name: tensor for name, tensor in kept.items() if ".mm_projector." in name}
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    if member.tied:
        kept.pop("lm_head.weight", None)
    folder.mkdir(parents=True)
    write(folder, kept | {frequencies: torch.rand(2)})
    torch.save(projector, folder / "mm_projector.bin")  # repeats what is in the shards
    as_json(folder / "config.json", config_of(member, **changes))
    return theirs, made


@pytest.fixture
def folders(tmp_path):
    """A LLaVA and its image encoder."""
    _, made = llava_folder(tmp_path / "llava")
    return tmp_path / "llava", tower_folder(tmp_path / "clip", made, LLAMA)


# --- the numbers


@pytest.mark.parametrize(
    ("inside", "write", "whole"),
    [
        (False, as_bin_shards, True),
        (False, as_safetensors_shards, False),
        (False, as_bin, False),
        (True, as_bin_shards, True),
        (True, as_safetensors_shards, False),
    ],
)
@each
def test_logits_are_those_of_the_reference(member, inside, write, whole, tmp_path):
    theirs, made = llava_folder(tmp_path / "llava", member, inside, write)
    tower = made
    if inside:  # what is inside counts, not the numbers that the image encoder began with
        tower = {name: torch.randn_like(tensor) for name, tensor in made.items()}
    tower_folder(tmp_path / "clip", tower, member, whole)
    ours = HookedVLM.from_pretrained(
        tmp_path / "llava", vision_tower=tmp_path / "clip", dtype=torch.float64
    )
    assert isinstance(ours, HookedLlava) and ours.cfg.image_token_id == member.image_token
    theirs, inputs = theirs.double(), member.inputs(counts=(1, 0, 2))
    mask, words = inputs["attention_mask"].bool(), member.vocab - 1
    with torch.no_grad():
        expected = theirs(**inputs).logits[..., :words]
    logits = ours(**inputs)
    assert error(logits[..., :words][mask], expected[mask]) < 1e-10
    assert logits.shape[-1] == ours.cfg.text.d_vocab and not logits[..., words:].any()


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_older_configurations_share_their_model_type_with_transformers(kind, folders):
    folder, clip = folders
    as_json(folder / "config.json", config_of(LLAMA, model_type=kind))
    assert HookedVLM.from_pretrained(folder, vision_tower=clip).cfg.vision.n_unread == 1


@each
def test_there_and_back(member, tmp_path):
    _, made = llava_folder(tmp_path / "llava", member)
    clip = tower_folder(tmp_path / "clip", made, member)
    ours = HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=clip)
    _, rules = llava.read(
        InMemory(made),
        config_of(member) | {"vision_config": json.loads((clip / "config.json").read_text())},
        None,
        {},
    )
    back = revert(dict(ours.named_parameters()), rules)
    assert back.keys() == made.keys() - ({"lm_head.weight"} if member.tied else set())
    assert all(torch.equal(back[name], made[name]) for name in back)


@each
def test_what_is_saved_is_read_by_transformers(member, tmp_path):
    _, made = llava_folder(tmp_path / "llava", member)
    tower_folder(tmp_path / "clip", made, member)
    ours = HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=tmp_path / "clip")
    ours.save_pretrained(tmp_path / "saved")
    read, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = member.inputs(dtype=torch.float32)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert error(ours(**inputs)[mask], read(**inputs).logits[mask]) < 1e-5
    again = HookedLlava.from_pretrained(tmp_path / "saved")
    assert again.cfg == ours.cfg
    for (name, a), (_, b) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_released_size_has_a_place_for_every_tensor():
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    vision["model_type"] = "clip_vision_model"
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                text_config=transformers.LlamaConfig(vocab_size=32001), vision_config=vision
            )
        )
        clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision))
    made = original(theirs, 32001)
    made |= {TOWER + name: t for name, t in clip.state_dict().items()}
    config = {
        name: value
        for name, value in config_of(LLAMA, vocab_size=32000, rope_theta=10000.0).items()
        if name not in ("num_key_value_heads", "sliding_window")
    }
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "max_position_embeddings": 4096}
    cfg, rules = llava.read(InMemory(made), config | {"vision_config": vision}, None, {})
    with torch.device("meta"):
        ours = HookedLlava(cfg)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert len(plan(InMemory(made).shapes, rules, shapes)) == 686
    assert (cfg.text.d_vocab, cfg.image_token_id, cfg.n_image_tokens) == (32064, 32000, 576)


# --- types


def test_the_image_encoder_is_rounded_as_the_original_code_does(tmp_path):
    made = original(LLAMA.reference(), LLAMA.vocab)
    halves = {name: tensor.half() for name, tensor in made.items()}
    llava_folder(tmp_path / "llava", state=halves)
    clip = tower_folder(tmp_path / "clip", made, LLAMA)
    ours = HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=clip)
    assert {p.dtype for p in ours.parameters()} == {torch.float16}
    patches = made[f"{TOWER}vision_model.embeddings.patch_embedding.weight"]
    assert torch.equal(ours.vision.embed.patch.weight, patches.half())
    maps = Path("/proc/self/maps")  # Linux only
    assert not maps.exists() or str(tmp_path / "llava" / "pytorch_model") in maps.read_text()
    wide = HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=clip, dtype=torch.float32)
    assert torch.equal(wide.vision.embed.patch.weight, patches)
    embed = halves["model.embed_tokens.weight"].float()
    assert torch.equal(wide.text.embed.weight[:36], embed) and not wide.text.embed.weight[36:].any()


# --- where the image encoder is


def test_it_is_found_by_the_name_in_the_config(folders, tmp_path):
    folder, clip = folders
    hub_cache(tmp_path / "hub", "liuhaotian/llava-v1.5-7b", folder, "1" * 40)
    hub_cache(tmp_path / "hub", "openai/clip-vit-large-patch14-336", clip, "2" * 40)
    ours = HookedLlava.from_pretrained("liuhaotian/llava-v1.5-7b", cache_dir=tmp_path / "hub")
    assert {**ours.provenance, "model": ""} == {
        "model": "",
        "task": "llava",
        "revision": "1" * 40,
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "vision_tower_revision": "2" * 40,
    }
    given = HookedLlava.from_pretrained(
        folder, vision_tower="openai/clip-vit-large-patch14-336", cache_dir=tmp_path / "hub"
    )
    assert torch.equal(given.vision.pos_embed, ours.vision.pos_embed)
    as_json(folder / "config.json", config_of(LLAMA, mm_vision_tower=str(clip)))
    local = HookedLlava.from_pretrained(folder)
    assert torch.equal(local.vision.pos_embed, ours.vision.pos_embed)


def test_without_it_the_error_says_what_is_missing(folders, tmp_path):
    folder, clip = folders
    said = (
        r"leaves the image encoder to 'openai/clip-vit-large-patch14-336'.*; its weights, its "
        r"config.json and preprocessor_config.json could not be had. Pass vision_tower="
    )
    for how in ({}, {"vision_tower": tmp_path}, {"vision_tower": clip / "pytorch_model.bin"}):
        with pytest.raises(FileNotFoundError, match=said):
            HookedLlava.from_pretrained(folder, **how)
    llava_folder(tmp_path / "whole", inside=True)
    with pytest.raises(FileNotFoundError, match=r"\); its config.json and preprocessor_config"):
        HookedVLM.from_pretrained(tmp_path / "whole")
    (clip / "pytorch_model.bin").unlink()
    HookedVLM.from_pretrained(
        tmp_path / "whole", vision_tower=clip
    )  # of which nothing else is read
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors and no pytorch_model.bin"):
        HookedLlava.from_pretrained(folder, vision_tower=clip)


def test_it_is_for_files_that_leave_it_out(folders, tmp_path):
    folder, clip = folders
    HookedLlava.from_pretrained(folder, vision_tower=clip).save_pretrained(tmp_path / "whole")
    for kind, where in ((HookedVLM, tmp_path / "whole"), (HookedBLIP, "toy-blip-itm")):
        with pytest.raises(ConversionError, match="vision_tower= is for files of LLaVA's own"):
            kind.from_pretrained(where, vision_tower=clip)


# --- what is no LLaVA-1.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'.* reads 'mlp2x_gelu'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer is \[-2, -5\]"),
        ({"mm_vision_select_layer": -5}, "vision_feature_layer=-5 is behind none of the 3 blocks"),
        ({"mm_vision_select_feature": "cls"}, "is 'cls', none of patch, cls_patch"),
        ({"mm_vision_tower": None}, "mm_vision_tower names no image encoder"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT.*llava-hf/llava-v1.6"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT.*llava-hf/llava-v1.6"),
        ({"image_aspect_ratio": "keep"}, "image_aspect_ratio is 'keep'"),
        ({"s2": True}, "s2 is true"),
        ({"mm_resampler_type": "qformer"}, "mm_resampler_type is 'qformer'"),
        ({"unfreeze_mm_vision_tower": True}, "was trained .unfreeze_mm_vision_tower., but no"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"attention_bias": True}, "attention_bias is of no released model"),
        ({"vocab_size": None}, "no LLaVA configuration"),
        (
            {"model_type": "llava_qwen"},
            "'llava_qwen'; HookedLlava reads 'llava', 'llava_next', 'llava_llama'",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, said, folders):
    folder, clip = folders
    as_json(folder / "config.json", config_of(LLAMA, **change))
    with pytest.raises(ConversionError, match=said):
        HookedLlava.from_pretrained(folder, vision_tower=clip)


def test_a_trained_image_encoder_is_read(tmp_path):
    _, made = llava_folder(tmp_path / "llava", inside=True, unfreeze_mm_vision_tower=True)
    clip = tower_folder(tmp_path / "clip", made, LLAMA)
    HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=clip)


def test_another_image_encoder_is_named(folders):
    folder, clip = folders
    as_json(clip / "config.json", {"model_type": "siglip"})
    with pytest.raises(ConversionError, match="-336' is a 'siglip', HookedLlava reads CLIP"):
        HookedLlava.from_pretrained(folder, vision_tower=clip)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    made = original(LLAMA.reference(), LLAMA.vocab)
    clip = tower_folder(tmp_path / "clip", made, LLAMA)
    lost, norm = "model.mm_projector.2.bias", "model.layers.1.input_layernorm.weight"
    embed = "model.embed_tokens.weight"
    unknown = {"model.image_newline": torch.zeros(16)}
    for number, (state, said) in enumerate(
        [
            ({k: v for k, v in made.items() if k != lost}, "nothing fills 'projector.fc_out.bias'"),
            (made | unknown, r"left over: 'model.image_newline' \[16\] has no place"),
            (made | {norm: torch.ones(15)}, rf"wrong shape: '{norm}' is \[15\]"),
            (made | {embed: torch.ones(35, 16)}, r"is \[35, 16\].* \[64, 16\], the last 28 rows"),
        ]
    ):
        llava_folder(tmp_path / str(number), state=state)
        with pytest.raises(ConversionError, match=said):
            HookedLlava.from_pretrained(tmp_path / str(number), vision_tower=clip)
    state = torch.load(clip / "pytorch_model.bin")
    name = "vision_model.pre_layrnorm.weight"
    torch.save({k: v for k, v in state.items() if k != name}, clip / "pytorch_model.bin")
    llava_folder(tmp_path / "llava")
    with pytest.raises(ConversionError, match=r"nothing fills 'vision.ln_pre.weight'"):
        HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=clip)
    torch.save(state | {"vision_model.odd": torch.zeros(2)}, clip / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=rf"left over: '{TOWER}vision_model.odd'"):
        HookedLlava.from_pretrained(tmp_path / "llava", vision_tower=clip)


def test_parts_of_a_model_are_named(tmp_path, folders):
    folder, _ = folders
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    with pytest.raises(ConversionError, match="llava holds a LLaVA's projector alone"):
        HookedLlava.from_pretrained(folder)
    hub_cache(tmp_path / "hub", "a/llava-projector", folder, "3" * 40)
    with pytest.raises(
        ConversionError, match=r"'a/llava-projector', on the Hub .* projector alone"
    ):
        HookedLlava.from_pretrained("a/llava-projector", cache_dir=tmp_path / "hub")
    as_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ConversionError, match=r"PEFT adapter alone; merge it .*merge_lora_weights"):
        HookedLlava.from_pretrained(folder)
    with pytest.raises(ConversionError, match=r"mm_projector.bin holds a projector alone"):
        HookedVLM.from_pretrained(folder / "mm_projector.bin")
    with pytest.raises(ConversionError, match="HookedLlava, which opens it; HookedCLIP does not"):
        HookedCLIP.from_pretrained(folder / "mm_projector.bin")


def test_a_model_in_memory_of_its_own_code_is_refused():
    made = original(LLAMA.reference(), LLAMA.vocab)
    with pytest.raises(ConversionError, match="save it, and open the folder"):
        llava.read(InMemory(made), config_of(LLAMA), None, {})  # as from_hf does


# --- words and pictures

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
MISTRAL_PROMPT = "[INST] <image>\nwhat is it? [/INST]"


@pytest.fixture
def words(folders):
    """A tokenizer.model such as Llama's beside the weights, and sentencepiece's own reading."""
    spm = pytest.importorskip("sentencepiece", reason="makes and reads tokenizer.model")
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with it")
    folder, clip = folders
    vocabulary = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([SYSTEM, "USER: what is the red circle?", "ASSISTANT: red"] * 20),
        model_writer=vocabulary,
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(vocabulary.getvalue())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    as_json(folder / "special_tokens_map.json", special | {"pad_token": "<unk>"})
    settings = {"add_bos_token": True, "add_eos_token": False, "model_max_length": 2048}
    settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "padding_side": "right"}
    as_json(folder / "tokenizer_config.json", settings | special | {"pad_token": None})
    processor = spm.SentencePieceProcessor(model_proto=vocabulary.getvalue())
    return folder, clip, processor


def rewritten(folder, clip, vocab, **changes):
    """The folder with weights of as many words, and longer texts; opened."""
    member = LlavaMember(vocab=vocab + 1)
    state = original(member.reference(), member.vocab)
    as_bin_shards(folder, {k: v for k, v in state.items() if not k.startswith(TOWER)})
    changes = {"max_position_embeddings": 1024, **changes}
    as_json(folder / "config.json", config_of(member, **changes))
    return HookedLlava.from_pretrained(folder, vision_tower=clip)


def of_the_original(sp, text, image_token, size):
    """LLaVA's `tokenizer_image_token`: what is between images is encoded by itself."""
    ids = [sp.bos_id()]
    for number, chunk in enumerate(text.split("<image>")):
        ids += [image_token] * size * (number > 0) + sp.encode(chunk)
    return ids


PROMPTS = [
    f"{SYSTEM} USER: <image>\nwhat is it? ASSISTANT:",
    "USER: <image> <image>what is the red circle?",
    "<image>  two spaces, and ünknown signs",
    "<image>",
]


def test_tokens_are_those_of_the_original_code(words, tmp_path):
    folder, clip, sp = words
    ours = rewritten(folder, clip, len(sp))
    image = len(sp)
    assert ours.cfg.image_token_id == image == ours.to_single_token("<image>")
    tokenizer = ours.tokenizer
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<unk>", "left")
    ours.save_pretrained(tmp_path / "saved")
    again = HookedLlava.from_pretrained(tmp_path / "saved")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    for text in PROMPTS:
        pictures = [Image.new("RGB", (9, 7))] * text.count("<image>")
        expected = of_the_original(sp, text, image, 4)
        for model in (ours, again):
            inputs = model.prepare(pictures, text)
            assert inputs["input_ids"].tolist() == [expected]
            assert model(**inputs).isfinite().all()
        encoded = theirs(images=pictures, text=text, return_tensors="pt")
        assert encoded["input_ids"].tolist() == [expected]
        assert torch.equal(encoded["pixel_values"], inputs["pixel_values"])
    text = "The red circle, ünknown."
    assert ours.decode(torch.tensor([[*sp.encode(text), image, sp.eos_id()]])) == [text]


def test_a_question_becomes_the_prompt_of_its_training(words):
    folder, clip, sp = words
    ours = rewritten(folder, clip, len(sp))
    picture = Image.new("RGB", (9, 7))
    expected = of_the_original(sp, PROMPTS[0], len(sp), 4)
    assert ours.prepare(picture, "what is it?")["input_ids"].tolist() == [expected]
    said = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ]
    prompt = ours.processor.apply_chat_template(said, add_generation_prompt=True)
    assert prompt == f"{SYSTEM} USER: <image>\na ASSISTANT: b</s>USER: c ASSISTANT:"
    mistral = rewritten(folder, clip, len(sp), model_type="llava_mistral")
    ids = mistral.prepare(picture, "what is it?")["input_ids"].tolist()
    assert ids == [of_the_original(sp, MISTRAL_PROMPT, len(sp), 4)]


def test_a_tokenizer_that_has_an_image_token_tells_it(words):
    folder, clip, sp = words
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        folder, config=transformers.LlamaConfig()
    )
    tokenizer.add_tokens(["<im_patch>", "<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    ours = rewritten(folder, clip, len(sp) + 2)
    assert ours.cfg.image_token_id == len(sp) + 1
    inputs = ours.prepare(Image.new("RGB", (9, 7)), PROMPTS[0])
    assert inputs["input_ids"].tolist() == [of_the_original(sp, PROMPTS[0], len(sp) + 1, 4)]
    assert ours(**inputs).isfinite().all()


def expand2square(picture, colour):
    side = max(picture.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, tuple((side - length) // 2 for length in picture.size))
    return square


@pytest.mark.parametrize("size", [(40, 20), (17, 30), (16, 16)])
@pytest.mark.parametrize("aspect", ["pad", None])
def test_pixels_are_those_of_the_original_code(aspect, size, words, tmp_path):
    folder, clip, sp = words
    ours = rewritten(folder, clip, len(sp), image_aspect_ratio=aspect)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    plain = transformers.CLIPImageProcessorPil.from_pretrained(clip)
    mean = tuple(int(x * 255) for x in plain.image_mean)
    seen = expand2square(picture, mean) if aspect == "pad" else picture
    expected = plain(seen, return_tensors="pt")["pixel_values"]
    ours.save_pretrained(tmp_path / "saved")
    for model in (ours, HookedLlava.from_pretrained(tmp_path / "saved")):
        pixels = model.prepare(picture, "what?")["pixel_values"]
        assert pixels.shape == (1, 3, 16, 16) and error(pixels, expected) < 1e-6
    assert (aspect == "pad" and size[0] != size[1]) == (
        error(pixels, plain(picture, return_tensors="pt")["pixel_values"]) > 0.1
    )


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_packages_that_are_missing_are_named(package, words, monkeypatch):
    folder, clip, sp = words
    monkeypatch.setitem(sys.modules, package, None)
    # Once it was imported it needs neither.
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    if sys.modules["sentencepiece"] is not None:
        monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    said = f"as tokenizer.model, which {package} must be .* pip install sentencepiece protobuf"
    with pytest.raises(ImportError, match=said):
        rewritten(folder, clip, len(sp))


def test_a_tokenizer_that_cannot_be_read(words):
    folder, clip, sp = words
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"tokenizer.model of .* cannot be read"):
        rewritten(folder, clip, len(sp))


def test_without_a_tokenizer_there_is_no_processor(folders, words, tmp_path):
    folder, clip, sp = words
    ours = rewritten(folder, clip, len(sp))
    ours.save_pretrained(tmp_path / "whole")
    (folder / "tokenizer.model").unlink()
    assert HookedLlava.from_pretrained(folder, vision_tower=clip).processor is None
    for given in (tmp_path / "whole", ours.processor):
        there = HookedLlava.from_pretrained(folder, vision_tower=clip, processor=given)
        assert there.cfg.image_token_id == len(sp) and there.processor.chat_template


def test_halves_of_a_processor_and_strange_ones(words):
    folder, clip, sp = words
    with pytest.raises(ValueError, match=rf"has {len(sp) + 1} tokens, the weights know 64"):
        HookedLlava.from_pretrained(folder, vision_tower=clip)
    (clip / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no image processor .*pass vision_tower="):
        rewritten(folder, clip, len(sp))


def test_check_agrees(words, capfd):
    folder, clip, sp = words
    ours = rewritten(folder, clip, len(sp))
    assert checking.check(ours, str(folder))
    assert capfd.readouterr().out.count("equal") == 3
