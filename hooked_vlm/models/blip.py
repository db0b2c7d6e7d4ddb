"""BLIP: image-text retrieval, captioning and visual question answering.

Source: Li et al., BLIP (arXiv 2201.12086), sec. 3.1 and fig. 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import BatchEncoding

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.stack import TextStack, VisionStack
from hooked_vlm.config import BLIPConfig
from hooked_vlm.models.flow import Flow
from hooked_vlm.models.fused import FusedVLM
from hooked_vlm.models.inputs import ImageLike
from weights_conversion import blip as layout


class HookedBLIP(FusedVLM):
    """BLIP with every activation named; see `docs/names.md` for the names.

    Args:
        cfg: sizes and task. Weights are noise until they are loaded; `from_pretrained` does both.
    """

    LAYOUT = layout
    WRITERS = ("captioning", "vqa")

    def __init__(self, cfg: BLIPConfig):
        super().__init__(cfg)
        self.vision = VisionStack(cfg.vision)
        self.hook_image_embeds = HookPoint()  # [batch, image_pos, d_vision]
        if cfg.text is not None:
            self.text = TextStack(cfg.text)
        if cfg.decoder is not None:
            self._add_decoder()
        if cfg.task == "itm":
            assert cfg.text is not None
            self.itm_head = nn.Linear(cfg.text.d_model, 2)
            self._add_similarity()
        self.hook_logits = HookPoint()  # [batch, 2] or [batch, pos, d_vocab]
        self.requires_grad_(False)
        self.setup()

    def forward(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_input_ids: Int[Tensor, "answers answer_pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "answers answer_pos"] | None = None,
        return_type: Literal["logits", "loss"] | None = "logits",
    ) -> Tensor | None:
        """Runs the model; one image may serve a batch of texts.

        Args:
            pixel_values: images, from `prepare`.
            input_ids: the text, the caption so far, or the question.
            attention_mask: 1 for a token, 0 for padding; all ones by default.
            decoder_input_ids: the answers so far (`vqa`), one to each question or all to one; by
                default `[DEC]` alone.
            decoder_attention_mask: the same for the answers.
            return_type: `logits`; `loss` for the mean cross-entropy of the next token over those
                that are no padding (decoders only); None for nothing.

        Returns:
            Logits: [batch, 2] of `itm`, index 1 is 'match'; [batch, pos, d_vocab] of the decoders.

        Raises:
            ValueError: inputs that do not fit the model or one another.
        """
        logits = self._run(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
        )
        target = input_ids, attention_mask
        if self.task == "vqa":
            target = decoder_input_ids, decoder_attention_mask
        return self._returned(logits, return_type, *target)

    def _flow(
        self,
        flow: Flow,
        *,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        if input_ids is None:
            raise ValueError(
                "input_ids is missing: model.prepare(images, text) makes it of a text, "
                "prepare_prompt(images, None) of a caption of which nothing is there yet"
            )
        self._check_text("input_ids", input_ids, attention_mask)
        if self.task != "vqa" and decoder_input_ids is not None:
            raise ValueError(f"decoder_input_ids belongs to task 'vqa', this is {self.task!r}")
        self._see(flow, pixel_values)
        if self.task == "captioning":
            return self._decode(flow, "vision", input_ids, attention_mask)
        text = self._ask(flow, input_ids, attention_mask)
        if self.task == "itm":
            return self.hook_logits(self.itm_head(text[:, 0]))
        return self._answer(flow, attention_mask, decoder_input_ids, decoder_attention_mask)

    def _ask(self, flow: Flow, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return flow.stack(
            "text",
            input_ids,
            mask=self.text.visible(input_ids, attention_mask),
            source="vision",
            readout=slice(0, 1) if self.task == "itm" else slice(None),
        )

    def prepare_prompt(
        self,
        images: ImageLike | Sequence[ImageLike],
        text: str | Sequence[str] | None,
        *,
        first_token: Literal["cls", "enc"] = "cls",
    ) -> BatchEncoding:
        """As `prepare`, so that the last position of the logits predicts the answer.

        A caption so far begins with `[DEC]` and is not closed by `[SEP]`, as in `generate`; None
        is the caption of which nothing is there. Texts of several lengths raise a ValueError.
        """
        if self.task != "captioning":
            return super().prepare_prompt(images, text, first_token=first_token)
        inputs = self.prepare(images, text, first_token=first_token)
        mask = inputs.pop("attention_mask", None)
        if mask is not None and not mask.all():
            raise ValueError("captions so far must have the same number of tokens in a batch")
        inputs["input_ids"] = self._prompt(inputs.get("input_ids"), len(inputs["pixel_values"]))
        return inputs
