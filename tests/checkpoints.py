"""Small checkpoints as they are found in the wild: Hugging Face folders and original `.pth` files.

The renames to the original layout are written here a second time, from the specification, so that
a slip in the package's tables shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BertTokenizer, BlipImageProcessorPil, BlipProcessor

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *"a the red blue circle square is what color of in picture yes no x ##x".split()]
DEC, ENC, SEP = len(WORDS), len(WORDS) + 1, 3
IMAGE = 16

CLASSES = {
    "itm": transformers.BlipForImageTextRetrieval,
    "captioning": transformers.BlipForConditionalGeneration,
    "vqa": transformers.BlipForQuestionAnswering,
}
TASKS = list(CLASSES)


def reference(
    task: str, heads: int = 2, eps: float = 1e-5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A transformers BLIP with random weights, 128 wide, so that released files have two heads."""
    sizes = {"num_attention_heads": heads, "num_hidden_layers": 2, "intermediate_size": 192}
    config = transformers.BlipConfig(
        vision_config={
            "hidden_size": 128 if task == "vqa" else 64,
            **sizes,
            "image_size": IMAGE,
            "patch_size": 8,
            "layer_norm_eps": eps,
        },
        text_config={
            "hidden_size": 128,
            **sizes,
            "vocab_size": len(WORDS) + 2,
            "max_position_embeddings": 20,
            "bos_token_id": DEC,
            "sep_token_id": SEP,
            "pad_token_id": 0,
        },
        image_text_hidden_size=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLASSES[task](config).eval()
        for parameter in dict.fromkeys(model.parameters()):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def processor() -> BlipProcessor:
    """The processor of these checkpoints."""
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate(WORDS)},
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
    )
    return BlipProcessor(BlipImageProcessorPil(size={"height": IMAGE, "width": IMAGE}), tokenizer)


def bert_folder(folder: Path) -> Path:
    """A tokenizer as that of `bert-base-uncased`: without `[DEC]` and `[ENC]`."""
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def hf_folder(folder: Path, model: Any, **how: Any) -> Path:
    """What `save_pretrained` of transformers writes, processor included."""
    model.save_pretrained(folder, **how)
    processor().save_pretrained(folder)
    return folder


_ORIGINAL = [
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"visual_encoder.blocks.\1."),
    (r"^(visual_encoder\..*)\.self_attn\.qkv\.", r"\1.attn.qkv."),
    (r"^(visual_encoder\..*)\.self_attn\.projection\.", r"\1.attn.proj."),
    (r"^(visual_encoder\..*)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
]


def original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers state dict under the names of Salesforce's repository."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in _ORIGINAL:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor.clone()
        if name.endswith("word_embeddings.weight"):
            indices = name.replace("word_embeddings.weight", "position_ids")
            renamed[indices] = torch.arange(20)[None]
    return renamed


def trained(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With what retrieval training leaves behind: momentum copies, queues, a temperature."""
    made = dict(state)
    for name, tensor in state.items():
        tower, dot, rest = name.partition(".")
        if tower in ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "text_decoder"):
            made[f"{tower}_m{dot}{rest}"] = tensor + 1
    made["image_queue"] = made["text_queue"] = torch.zeros(12, 7)
    made["idx_queue"], made["ptr_queue"] = torch.zeros(1, 7), torch.zeros(1).long()
    made["queue_ptr"], made["temp"] = torch.zeros(1).long(), torch.tensor(0.07)
    return made


def pth(file: Path, state: Mapping[str, Tensor], **how: Any) -> Path:
    """An original file."""
    torch.save({"model": dict(state), "epoch": 5, "config": {"lr": 1e-5}}, file, **how)
    return file


def inputs(rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """A batch without padding."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=generator),
        "input_ids": torch.randint(5, len(WORDS), (rows, 6), generator=generator),
        "attention_mask": torch.ones(rows, 6, dtype=torch.long),
    }


def state_of(model: Any) -> dict[str, Tensor]:
    """Our parameters by name, each once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, and under each the same bits."""
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
