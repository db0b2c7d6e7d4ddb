"""LLaVAs for the general tests, beside transformers' with the same random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama
from transformers.models.llava_next import modeling_llava_next as modeling_next
from transformers.models.mistral import modeling_mistral
from zoo import Reference, randomize, same
from zoo_clip import blocks, patches, standard

from hooked_vlm import HookedLlava

EPS = 1e-5


# transformers computes these three in float32 whatever it is given, so a double model of its has
# the precision of a single one. These compute in what they are given; in float32 they are the same.


def _eager(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
) -> Any:
    k, v = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (k, v))
    scores = q @ k.mT * scaling
    pattern = (scores if mask is None else scores + mask).softmax(-1)
    return (pattern @ v).transpose(1, 2).contiguous(), pattern


def _norm(self: Any, x: Tensor) -> Tensor:
    return self.weight * rms(x, self.variance_epsilon)


def _rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    size, theta = self.config.head_dim, self.config.rope_parameters["rope_theta"]
    frequencies = 1 / theta ** (torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = (position_ids[..., None].to(x.dtype) * frequencies).repeat(1, 1, 2)
    return angles.cos(), angles.sin()


def rms(x: Tensor, eps: float = EPS) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


PATCHES = []  # what is replaced: its owner, its name, and what it was
for modeling, name in ((modeling_llama, "Llama"), (modeling_mistral, "Mistral")):
    for owner, attribute, ours in (
        (modeling, "eager_attention_forward", _eager),
        (getattr(modeling, f"{name}RMSNorm"), "forward", _norm),
        (getattr(modeling, f"{name}RotaryEmbedding"), "forward", _rotary),
    ):
        PATCHES.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, ours)


@dataclass(frozen=True)
class LlavaMember:
    """One LLaVA of the zoo.

    Attributes:
        vision: width, layers and heads of the image encoder, the unread layers included.
        text: width, layers, heads, heads of keys and values, and width of a head.
        language: `llama` or `mistral`.
        window: how many positions a query sees, of a `mistral`.
        layer: which entry of the hidden states is read.
        strategy: `default` or `full`.
        left: whether padding stands on the left.
        resolutions: (height, width) of what LLaVA-NeXT tiles; None for LLaVA-1.5.
        pictures: (height, width) of the images, in turn.
        context: tokens of the longest prompt.
    """

    vision: tuple[int, int, int] = (12, 3, 3)
    text: tuple[int, int, int, int, int] = (16, 2, 2, 2, 8)
    language: str = "llama"
    window: int | None = None
    layer: int = -2
    strategy: str = "default"
    left: bool = True
    image: int = 16
    patch: int = 8
    vocab: int = 37
    tied: bool = False
    resolutions: tuple[tuple[int, int], ...] | None = None
    pictures: tuple[tuple[int, int], ...] = ((40, 90),)
    context: int = 64

    task = "llava"

    def __str__(self) -> str:
        sizes = ("x".join(map(str, part)) for part in (self.vision, self.text))
        side = "left" if self.left else "right"
        rest = (self.language, self.window, self.layer, self.strategy, side)
        name = "llava" if self.resolutions is None else "next"
        return "-".join([name, *sizes, *map(str, rest)])

    @property
    def image_token(self) -> int:
        return self.vocab - 1

    @property
    def size(self) -> int:
        """Features of a view, of LLaVA-1.5 the tokens of an image."""
        return (self.image // self.patch) ** 2 + (self.strategy == "full")

    def views(self, picture: tuple[int, int]) -> int:
        """Views of an image, as transformers counts them."""
        if self.resolutions is None:
            return 1
        sizes = [list(size) for size in self.resolutions]
        return modeling_next.image_size_to_num_patches(picture, sizes, self.image)

    def tokens(self, picture: tuple[int, int]) -> int:
        """Tokens of an image, as transformers counts its features."""
        if self.resolutions is None:
            return self.size
        sizes, grid = [list(size) for size in self.resolutions], self.image // self.patch
        rows, columns = modeling_next.get_anyres_image_grid_shape(picture, sizes, self.image)
        whole = torch.empty(1, rows * grid, columns * grid)
        _, height, width = modeling_next.unpad_image(whole, picture).shape
        return self.size + height * (width + 1)

    @property
    def reads(self) -> int:
        """Blocks of the image encoder that run."""
        return self.layer if self.layer >= 0 else self.vision[1] + 1 + self.layer

    def reference(self) -> Any:
        """A transformers LLaVA with random weights."""
        (dv, lv, hv), (dt, lt, ht, kv, d_head) = self.vision, self.text
        text = {
            "model_type": self.language,
            "hidden_size": dt,
            "num_hidden_layers": lt,
            "num_attention_heads": ht,
            "num_key_value_heads": kv,
            "head_dim": d_head,
            "intermediate_size": 3 * dt,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rms_norm_eps": EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "pad_token_id": 0,
        }
        if self.language == "mistral":
            text["sliding_window"] = self.window
        name, more = "Llava", {}
        if self.resolutions is not None:
            name, more = "LlavaNext", {"image_grid_pinpoints": list(map(list, self.resolutions))}
        config = getattr(transformers, f"{name}Config")(
            **more,
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": dv,
                "num_hidden_layers": lv,
                "num_attention_heads": hv,
                "intermediate_size": 3 * dv,
                "image_size": self.image,
                "patch_size": self.patch,
            },
            text_config=text,
            image_token_index=self.image_token,
            vision_feature_layer=self.layer,
            vision_feature_select_strategy=self.strategy,
            image_seq_length=self.size,
            tie_word_embeddings=self.tied,
            attn_implementation="eager",
        )
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
        randomize(model, None)
        return model

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[Any, HookedLlava]:
        """The reference and ours, of the same weights."""
        theirs = self.reference().to(dtype)
        return theirs, HookedLlava.from_hf(theirs)

    def model(self, dtype: torch.dtype = torch.float64) -> HookedLlava:
        """Ours alone."""
        return self.pair(dtype)[1]

    def inputs(
        self,
        rows: int = 3,
        images: int | None = None,
        padded: bool = True,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        counts: tuple[int, ...] | None = None,
    ) -> dict[str, Tensor]:
        """A batch of `rows` texts, of unequal lengths where `padded`.

        Each has an image of its own, or all have one (`images=1`), or each as many as `counts`.
        """
        generator = torch.Generator().manual_seed(seed)
        each = counts or (1,) * rows
        n_images = images or sum(each)
        pictures = [self.pictures[image % len(self.pictures)] for image in range(n_images)]
        shape: tuple[int, ...] = (n_images, 3, self.image, self.image)
        if self.resolutions is not None:  # what fills up is noise, too: nobody may read it
            shape = (n_images, max(map(self.views, pictures), default=0), *shape[1:])
        pixels = torch.randn(shape, generator=generator).to(dtype)
        texts, left = [], iter(pictures * (len(each) if n_images != sum(each) else 1))
        for row, count in enumerate(each):
            length = 4 - row % 3 if padded else 3
            words = torch.randint(3, self.image_token, (2, length), generator=generator)
            blocks = [
                torch.full((self.tokens(next(left)),), self.image_token) for _ in range(count)
            ]
            texts.append(torch.cat([words[0, :1], *blocks[:1], words[1], *blocks[1:]]))
        longest = max(map(len, texts))
        ids = torch.zeros(len(each), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            where = slice(longest - len(text), None) if self.left else slice(len(text))
            ids[row, where], mask[row, where] = text, 1
        inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        if self.resolutions is not None:
            inputs["image_sizes"] = torch.tensor(pictures)
        return (
            inputs if n_images else {name: inputs[name] for name in ("input_ids", "attention_mask")}
        )

    def chosen(self, inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        """Some rows of the inputs, with their images, of which some may serve all."""
        images = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
        found = {name: value[rows] for name, value in inputs.items() if name not in images}
        left = (
            [self.tokens(size) for size in inputs["image_sizes"].tolist()]
            if ("image_sizes" in inputs)
            else [self.size] * len(inputs["pixel_values"])
        )
        tokens = (inputs["input_ids"] == self.image_token).sum(1).tolist()
        if sum(tokens) != sum(left):
            return found | images
        own, first = [], 0  # the images of each row
        for n_tokens in tokens:
            last = first
            while n_tokens:
                n_tokens -= left[last]
                last += 1
            own.append(list(range(first, last)))
            first = last
        at = [image for row in rows for image in own[row]]
        return found | {name: value[at] for name, value in images.items() if at}

    def table(self) -> dict[str, Reference]:
        """For each of our hook names the tensor of the reference that it must equal."""
        vision, text = "model.vision_tower", "model.language_model"
        projector = "model.multi_modal_projector"
        rows: dict[str, Reference] = {
            "vision.ln_pre.hook_normalized": (f"{vision}.pre_layrnorm", "in", standard),
            "vision.hook_embed": (f"{vision}.embeddings.patch_embedding", "out", patches),
            **blocks("vision", vision, self.reads),
            "projector.hook_pre": (f"{projector}.linear_1", "out", same),
            "projector.hook_post": (f"{projector}.linear_2", "in", same),
            "hook_image_embeds": (projector, "out", same),
            "text.hook_embed": (f"{text}.layers.0", "in", same),
            "text.ln_final.hook_normalized": (f"{text}.norm", "in", rms),
            "hook_logits": ("lm_head", "out", same),
        }
        for layer in range(self.text[1]):
            ours, theirs = f"text.blocks.{layer}", f"{text}.layers.{layer}"
            attn, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
            ln1, ln2 = f"{theirs}.input_layernorm", f"{theirs}.post_attention_layernorm"
            rows |= {
                f"{ours}.hook_resid_pre": (theirs, "in", same),
                f"{ours}.ln1.hook_normalized": (ln1, "in", rms),
                f"{ours}.attn.hook_q_in": (ln1, "out", same),
                f"{ours}.attn.hook_kv_in": (ln1, "out", same),
                **{
                    f"{ours}.attn.hook_{name}": (f"{attn}.{name}_proj", "out", same)
                    for name in "qkv"
                },
                f"{ours}.attn.hook_pattern": (attn, "probs", same),
                f"{ours}.attn.hook_z": (f"{attn}.o_proj", "in", same),
                f"{ours}.hook_attn_out": (f"{attn}.o_proj", "out", same),
                f"{ours}.hook_resid_mid": (ln2, "in", same),
                f"{ours}.hook_mlp_in": (ln2, "in", same),
                f"{ours}.ln2.hook_normalized": (ln2, "in", rms),
                f"{ours}.mlp.hook_pre": (f"{mlp}.gate_proj", "out", same),
                f"{ours}.mlp.hook_pre_linear": (f"{mlp}.up_proj", "out", same),
                f"{ours}.mlp.hook_post": (f"{mlp}.down_proj", "in", same),
                f"{ours}.hook_mlp_out": (f"{mlp}.down_proj", "out", same),
                f"{ours}.hook_resid_post": (theirs, "out", same),
            }
        return rows


LLAMA = LlavaMember()
# Grouped queries whose heads are no share of the width, a window shorter than the text.
MISTRAL = LlavaMember((15, 2, 3), (12, 2, 4, 2, 6), "mistral", window=6, layer=-1, left=False)
# Images of three tiles and of two, and what is around them left out.
NEXT = LlavaMember(
    (12, 2, 3),
    (12, 2, 4, 2, 6),
    "mistral",
    resolutions=((16, 32), (32, 16), (32, 32), (48, 16), (16, 48)),
    pictures=((20, 65), (33, 17)),
)
LLAVA = [LLAMA, MISTRAL, NEXT]  # what the general tests run on
# Further shapes, for parity with the reference.
LLAVA_PARITY = [
    LLAMA,
    MISTRAL,
    LlavaMember(left=False, strategy="full", layer=1, patch=4, vocab=50),
    LlavaMember((16, 4, 2), (24, 3, 6, 2, 4), layer=-3, tied=True),
    LlavaMember((15, 2, 3), (12, 3, 4, 1, 6), "mistral", window=5, strategy="full"),
    LlavaMember((15, 3, 3), (12, 1, 4, 4, 4), "mistral", window=None),
]
# LLaVA-NeXT: wide and tall, square, of the proportions of a resolution, smaller than a tile.
NEXT_PARITY = [
    NEXT,
    LlavaMember(
        left=False,
        patch=4,
        resolutions=((16, 32), (32, 16), (32, 32), (48, 16), (16, 48)),
        pictures=((40, 21), (9, 100), (5, 5)),
        context=256,
    ),
    LlavaMember(
        (15, 2, 3),
        tied=True,
        image=12,
        patch=4,
        resolutions=((24, 24), (12, 36)),
        pictures=((1, 90), (300, 1), (24, 24), (30, 20)),
        context=128,
    ),
]
# As many image tokens as in LLaVA-1.5 and LLaVA-NeXT.
LONG = [
    LlavaMember((16, 2, 2), (64, 2, 8, 8, 8), image=336, patch=14),
    LlavaMember((16, 2, 2), (64, 2, 8, 2, 8), "mistral", window=400, image=336, patch=14),
    # 2928 and 1850 tokens.
    LlavaMember(
        (16, 2, 2),
        (16, 2, 2, 1, 8),
        "mistral",
        image=336,
        patch=14,
        resolutions=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
        pictures=((700, 700), (500, 900)),
        context=4096,
    ),
]
