"""BLIPs with random weights for the general tests, beside their references.

A member of the zoo knows how to make a model with random weights, what to feed it and, where there
is a reference to run, which tensor of which of its modules each of our hook names must equal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hooked_vlm import HookedBLIP, HookedVLM

QUIET = {"progress": False}  # of a sweep

# A tensor of a reference module: its dotted name, whether its input or its output, and what of it.
Reference = tuple[str, str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Size:
    """Width, layers, heads of each stack; the MLPs are three times as wide."""

    vision: tuple[int, int, int]
    text: tuple[int, int, int]
    image: int = 24
    patch: int = 8
    vocab: int = 37
    mlp: int = 3
    std: float | None = None  # of all matrices; None scales with the fan-in
    vision_eps: float = 1e-5

    @property
    def label(self) -> str:
        return f"{'x'.join(map(str, self.vision))}-{'x'.join(map(str, self.text))}"


SMALL = Size((15, 2, 3), (16, 2, 2), image=16)
SMALL_EQUAL = Size((18, 2, 3), (18, 2, 2), image=16)
TINY = Size((24, 2, 3), (20, 2, 4))  # vision and text differ in width and heads
DEEP = Size((12, 1, 2), (30, 3, 5), image=20, patch=10, vision_eps=1e-6)
EQUAL = Size((24, 2, 3), (24, 2, 4))  # transformers' VQA has one width
EQUAL_DEEP = Size((20, 3, 5), (20, 1, 2), image=16, patch=4)
BASE = Size((768, 12, 12), (768, 12, 12), 384, 16, 30524, 4, std=0.02)
LARGE = Size((1024, 24, 16), (768, 12, 12), 384, 16, 30524, 4, std=0.02)

_CLASSES = {
    "itm": transformers.BlipForImageTextRetrieval,
    "captioning": transformers.BlipForConditionalGeneration,
    "vqa": transformers.BlipForQuestionAnswering,
}


def randomize(model: nn.Module, std: float | None, seed: int = 0) -> None:
    """Weights of a size that lets every one of them matter, gains around 1, biases not 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in dict.fromkeys(model.parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if parameter.dim() > 1:
            fan_in = parameter[0].numel() if parameter.shape[0] > 1 else 4
            noise = noise * (std or fan_in**-0.5)
        elif (parameter.data == 1).all():
            noise = 1 + 0.2 * noise  # the gain of a norm
        else:
            noise = 0.2 * noise
        parameter.data.copy_(noise)


def blip_reference(task: str, size: Size, dtype: torch.dtype, seed: int = 0) -> Any:
    """A transformers BLIP with random weights."""
    (dv, lv, hv), (dt, lt, ht) = size.vision, size.text
    vision = {
        "hidden_size": dv,
        "num_hidden_layers": lv,
        "num_attention_heads": hv,
        "intermediate_size": size.mlp * dv,
        "image_size": size.image,
        "patch_size": size.patch,
        "layer_norm_eps": size.vision_eps,
    }
    text = {
        "hidden_size": dt,
        "num_hidden_layers": lt,
        "num_attention_heads": ht,
        "intermediate_size": size.mlp * dt,
        "vocab_size": size.vocab,
        "encoder_hidden_size": dv,
        "max_position_embeddings": 512 if size.vocab > 1000 else 12,
        "bos_token_id": size.vocab - 2,
        "sep_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, image_text_hidden_size=10
    )
    model = _CLASSES[task](config).eval()
    randomize(model, size.std, seed)
    return model.to(dtype)


def texts(vocab: int, lengths: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random ids without padding's, padded on the right to the longest, and their mask."""
    ids = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@dataclass(frozen=True)
class Member:
    """One model of the zoo."""

    task: str
    size: Size

    def __str__(self) -> str:
        return f"blip-{self.task}-{self.size.label}"

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[Any, HookedVLM]:
        """The reference and ours, of the same weights."""
        theirs = blip_reference(self.task, self.size, dtype)
        return theirs, HookedBLIP.from_hf(theirs)

    def model(self, dtype: torch.dtype = torch.float64) -> HookedVLM:
        """Ours alone."""
        return self.pair(dtype)[1]

    def inputs(
        self,
        rows: int = 3,
        images: int | None = None,
        padded: bool = True,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """A batch of `rows` texts, of unequal lengths where `padded`, and as many images or fewer.

        Answers of VQA are padded, too.
        """
        generator = torch.Generator().manual_seed(seed)
        side = self.size.image
        pixels = torch.randn(images or rows, 3, side, side, generator=generator).to(dtype)
        lengths = [5 - i % 3 for i in range(rows)] if padded else [4] * rows
        ids, mask = texts(self.size.vocab, lengths, generator)
        inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        if self.task == "vqa":
            answer, seen = texts(self.size.vocab, [3 - i % 2 for i in range(rows)], generator)
            inputs |= {"decoder_input_ids": answer, "decoder_attention_mask": seen}
        return inputs

    @property
    def reader(self) -> str:
        """The stack that reads the image."""
        return "decoder" if self.task == "captioning" else "text"

    fusion = 0  # its first block with cross-attention

    @staticmethod
    def chosen(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        """Some rows of the inputs, of which one image may serve all."""
        n_texts = len(inputs["input_ids"])
        return {k: v if len(v) == 1 != n_texts else v[rows] for k, v in inputs.items()}

    def table(self) -> dict[str, Reference]:
        """For each of our hook names the tensor of the reference that it must equal."""
        (_, lv, _), (_, lt, _) = self.size.vision, self.size.text
        rows = dict(_vision_table(lv))
        if self.task != "captioning":
            rows |= _text_table("text", "text_encoder", lt)
        if self.task != "itm":
            rows |= _text_table("decoder", "text_decoder.bert", lt)
            head = "text_decoder.cls.predictions"
            rows["unembed.hook_pre"] = (f"{head}.transform.dense", "out", same)
            rows["unembed.hook_post"] = (f"{head}.transform.LayerNorm", "in", same)
            rows["hook_logits"] = (head, "out", same)
        else:
            rows["hook_logits"] = ("itm_head", "out", same)
        return rows


def same(x: Tensor) -> Tensor:
    return x


def _chunk(x: Tensor, index: int) -> Tensor:
    return x.chunk(3, -1)[index]


def _patches(x: Tensor) -> Tensor:
    return x.flatten(2).mT


def _vision_table(layers: int) -> dict[str, Reference]:
    rows: dict[str, Reference] = {
        "vision.hook_embed": ("vision_model.embeddings.patch_embedding", "out", _patches),
        "hook_image_embeds": ("vision_model.post_layernorm", "out", same),
    }
    for layer in range(layers):
        ours, theirs = f"vision.blocks.{layer}", f"vision_model.encoder.layers.{layer}"
        attn = f"{theirs}.self_attn"
        rows |= {
            f"{ours}.hook_resid_pre": (theirs, "in", same),
            f"{ours}.attn.hook_q_in": (f"{theirs}.layer_norm1", "out", same),
            f"{ours}.attn.hook_kv_in": (f"{theirs}.layer_norm1", "out", same),
            f"{ours}.attn.hook_q": (f"{attn}.qkv", "out", functools.partial(_chunk, index=0)),
            f"{ours}.attn.hook_k": (f"{attn}.qkv", "out", functools.partial(_chunk, index=1)),
            f"{ours}.attn.hook_v": (f"{attn}.qkv", "out", functools.partial(_chunk, index=2)),
            f"{ours}.attn.hook_pattern": (attn, "probs", same),
            f"{ours}.attn.hook_z": (f"{attn}.projection", "in", same),
            f"{ours}.hook_attn_out": (f"{attn}.projection", "out", same),
            f"{ours}.hook_resid_mid": (f"{theirs}.layer_norm2", "in", same),
            f"{ours}.hook_mlp_in": (f"{theirs}.layer_norm2", "in", same),
            f"{ours}.mlp.hook_pre": (f"{theirs}.mlp.fc1", "out", same),
            f"{ours}.mlp.hook_post": (f"{theirs}.mlp.fc2", "in", same),
            f"{ours}.hook_mlp_out": (f"{theirs}.mlp.fc2", "out", same),
            f"{ours}.hook_resid_post": (theirs, "out", same),
        }
    return rows


def _text_table(stack: str, model: str, layers: int) -> dict[str, Reference]:
    rows: dict[str, Reference] = {
        f"{stack}.hook_embed": (f"{model}.embeddings.word_embeddings", "out", same),
        f"{stack}.hook_pos_embed": (f"{model}.embeddings.position_embeddings", "out", same),
    }
    for layer in range(layers):
        ours, theirs = f"{stack}.blocks.{layer}", f"{model}.encoder.layer.{layer}"
        rows[f"{ours}.hook_resid_pre"] = (f"{theirs}.attention.self.query", "in", same)
        for part, name, mid in (
            ("attn", "attention", "resid_mid"),
            ("cross_attn", "crossattention", "resid_mid_cross"),
        ):
            attn = f"{theirs}.{name}"
            rows |= {
                f"{ours}.{part}.hook_q_in": (f"{attn}.self.query", "in", same),
                f"{ours}.{part}.hook_kv_in": (f"{attn}.self.key", "in", same),
                f"{ours}.{part}.hook_q": (f"{attn}.self.query", "out", same),
                f"{ours}.{part}.hook_k": (f"{attn}.self.key", "out", same),
                f"{ours}.{part}.hook_v": (f"{attn}.self.value", "out", same),
                f"{ours}.{part}.hook_pattern": (f"{attn}.self", "probs", same),
                f"{ours}.{part}.hook_z": (f"{attn}.output.dense", "in", same),
                f"{ours}.hook_{part}_out": (f"{attn}.output.dense", "out", same),
                f"{ours}.hook_{mid}": (f"{attn}.output.LayerNorm", "in", same),
                f"{ours}.hook_normalized_{mid}": (f"{attn}.output.LayerNorm", "out", same),
            }
        rows |= {
            f"{ours}.hook_mlp_in": (f"{theirs}.intermediate.dense", "in", same),
            f"{ours}.mlp.hook_pre": (f"{theirs}.intermediate.dense", "out", same),
            f"{ours}.mlp.hook_post": (f"{theirs}.output.dense", "in", same),
            f"{ours}.hook_mlp_out": (f"{theirs}.output.dense", "out", same),
            f"{ours}.hook_resid_post": (f"{theirs}.output.LayerNorm", "in", same),
            f"{ours}.hook_normalized_resid_post": (f"{theirs}.output.LayerNorm", "out", same),
        }
    return rows


class Recorder:
    """Keeps inputs and outputs of a reference's modules, the first call's; with their gradients."""

    def __init__(self, model: nn.Module, modules: set[str], grad: bool = False):
        self.found: dict[tuple[str, str], Tensor] = {}
        self.values: dict[tuple[str, str], Tensor] = {}
        self.grad = grad
        by_name = dict(model.named_modules())
        self.handles = [
            by_name[name].register_forward_hook(
                functools.partial(self._keep, name), with_kwargs=True
            )
            for name in sorted(modules)
        ]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = {"in": given, "out": outputs[0], "probs": outputs[-1]}
        for what, tensor in tensors.items():
            if isinstance(tensor, Tensor) and (name, what) not in self.found:
                self.found[name, what] = tensor
                self.values[name, what] = tensor.detach().clone()  # transformers adds in place
                if self.grad and tensor.requires_grad:
                    tensor.retain_grad()

    def value(self, reference: Reference) -> Tensor:
        module, what, of = reference
        return of(self.values[module, what])

    def gradient(self, reference: Reference) -> Tensor:
        module, what, of = reference
        gradient = self.found[module, what].grad
        assert gradient is not None, f"no gradient at {module}"
        return of(gradient)


@functools.cache
def built(member: Any) -> HookedVLM:
    """A member's model, made once; tests leave its weights as they are."""
    return member.model()


def total(logits: Tensor) -> Tensor:
    """One number per row that depends on every logit."""
    flat = logits.flatten(1)
    return flat @ torch.arange(1, 1 + flat.shape[1]).to(flat) / flat.shape[1]


def error(ours: Tensor, theirs: Tensor, floor: float = 1.0) -> float:
    """The largest difference over the largest value, which counts as `floor` at least."""
    if ours.shape != theirs.shape:
        theirs = theirs.expand(len(ours), *theirs.shape[1:]).reshape(ours.shape)
    largest = max(floor, theirs.abs().max().item())
    return (ours - theirs).abs().max().item() / largest


# One of each task: what the general tests run on, beside the other architectures (whole_zoo.py).
BLIP = [Member("itm", SMALL), Member("captioning", SMALL), Member("vqa", SMALL_EQUAL)]
# Further shapes, for parity with the references.
PARITY = [Member("itm", TINY), Member("captioning", TINY), Member("vqa", EQUAL)]
PARITY += [Member("itm", DEEP), Member("captioning", DEEP), Member("vqa", EQUAL_DEEP)]
FULL = [Member(task, size) for task in ("itm", "captioning") for size in (BASE, LARGE)]
FULL += [Member("vqa", BASE)]


HEADS = "text.blocks.*.cross_attn.heads.*.hook_z"
ITM = next(member for member in BLIP if member.task == "itm")


@functools.cache
def toy(name):
    return HookedVLM.from_pretrained(name)


def margin(logits):
    return logits[:, 1] - logits[:, 0]
