"""ALBEFs with random weights for the general tests; parity is the golden fixtures' business."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from zoo import randomize, texts

from hooked_vlm import HookedALBEF
from hooked_vlm.config import ALBEFConfig, TextConfig, VisionConfig


@dataclass(frozen=True)
class AlbefMember:
    """One ALBEF of the zoo.

    Attributes:
        task: as in `ALBEFConfig`.
        layers: blocks of the text stack.
        fusion: the first of them with cross-attention.
    """

    task: str
    layers: int = 3
    fusion: int = 1
    image: int = 16
    patch: int = 8
    vocab: int = 37
    d_vision: int = 15
    d_text: int = 16

    reader = "text"

    def __str__(self) -> str:
        return f"albef-{self.task}"

    def config(self) -> ALBEFConfig:
        """The sizes."""
        text = TextConfig(
            d_model=self.d_text,
            n_layers=self.layers,
            n_heads=2,
            d_mlp=3 * self.d_text,
            activation="gelu",
            eps=1e-12,
            d_vocab=self.vocab,
            n_ctx=12,
            d_source=self.d_vision,
            fusion_layer=self.fusion,
            n_token_types=2,
            n_images=2 if self.task == "nlvr" else 1,
        )
        similar = self.task in ("itm", "pretrain")
        return ALBEFConfig(
            task=self.task,
            vision=VisionConfig(
                d_model=self.d_vision,
                n_layers=2,
                n_heads=3,
                d_mlp=3 * self.d_vision,
                activation="gelu",
                eps=1e-6,
                image_size=self.image,
                patch_size=self.patch,
            ),
            text=text,
            decoder=None if self.task != "vqa" else _decoder(text),
            d_proj=10 if similar else None,
            temperature=similar,
            d_class={"ve": 3, "nlvr": 2}.get(self.task),
            bos_token_id=self.vocab - 2,
            sep_token_id=2,
            pad_token_id=0,
        )

    def model(self, dtype: torch.dtype = torch.float64) -> HookedALBEF:
        """One with random weights."""
        model = HookedALBEF(self.config()).to(dtype).eval()
        randomize(model, None)
        return model

    def inputs(
        self,
        rows: int = 3,
        images: int | None = None,
        padded: bool = True,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """A batch of `rows` texts, of unequal lengths where `padded`, and as many images or fewer.

        Answers of VQA are padded, too; NLVR reads two images with each text.
        """
        generator = torch.Generator().manual_seed(seed)
        shape = (images or rows, *[2] * (self.task == "nlvr"), 3, self.image, self.image)
        pixels = torch.randn(shape, generator=generator).to(dtype)
        lengths = [5 - i % 3 for i in range(rows)] if padded else [4] * rows
        ids, mask = texts(self.vocab, lengths, generator)
        inputs = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}
        if self.task == "vqa":
            answer, seen = texts(self.vocab, [3 - i % 2 for i in range(rows)], generator)
            inputs |= {"decoder_input_ids": answer, "decoder_attention_mask": seen}
        return inputs

    @staticmethod
    def chosen(inputs: dict[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        """Some rows of the inputs, of which one image may serve all."""
        n_texts = len(inputs["input_ids"])
        return {k: v if len(v) == 1 != n_texts else v[rows] for k, v in inputs.items()}


def _decoder(text: TextConfig) -> TextConfig:
    fields = {**vars(text), "d_source": text.d_model, "fusion_layer": 0, "causal": True}
    fields["n_layers"] = 1
    return TextConfig(**fields)


ITM, PRETRAIN, VQA, VE, NLVR = (
    AlbefMember(task) for task in ("itm", "pretrain", "vqa", "ve", "nlvr")
)
ALBEF = [ITM, PRETRAIN, VQA, NLVR]  # `ve` is an `nlvr` with one image
