"""BLIP: image-text retrieval, captioning and visual question answering.

Source: Li et al., BLIP (arXiv 2201.12086), sec. 3.1 and fig. 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.stack import TextStack, Unembed, VisionStack
from hooked_vlm.config import BLIPConfig
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Flow
from hooked_vlm.models.generation import Decoder
from hooked_vlm.models.inputs import ImageLike
from weights_conversion import Checkpoint, InMemory, processors
from weights_conversion import blip as layout
from weights_conversion.rules import Rule


class HookedBLIP(HookedVLM):
    """BLIP with every activation named; see `docs/names.md` for the names.

    Args:
        cfg: sizes and task. Weights are zero until they are loaded; `from_pretrained` does both.
    """

    GLUE: ClassVar[dict[str, str]] = {
        "hook_image_embeds": "vision",
        "unembed": "decoder",
    }

    def __init__(self, cfg: BLIPConfig):
        super().__init__()
        self.cfg = cfg
        self.vision = VisionStack(cfg.vision)
        self.hook_image_embeds = HookPoint()  # [batch, image_pos, d_vision]
        if cfg.text is not None:
            self.text = TextStack(cfg.text)
        if cfg.decoder is not None:
            self.decoder = TextStack(cfg.decoder)
            self.unembed = Unembed(cfg.decoder)
            self.unembed.out.weight = self.decoder.embed.weight
        if cfg.task == "itm":
            assert cfg.text is not None
            self.itm_head = nn.Linear(cfg.text.d_model, 2)
            self.vision_proj = nn.Linear(cfg.vision.d_model, cfg.d_proj)
            self.text_proj = nn.Linear(cfg.text.d_model, cfg.d_proj)
        self.hook_logits = HookPoint()  # [batch, 2] or [batch, pos, d_vocab]
        self.requires_grad_(False)
        self.setup()

    @classmethod
    def _find_processor(
        cls, given: Any, own: str | None, cfg: BLIPConfig, download: dict[str, Any]
    ) -> tuple[Any, BLIPConfig]:
        return processors.find(given, own, cfg, **download)

    @classmethod
    def _read_layout(
        cls,
        checkpoint: Checkpoint | InMemory,
        hf_config: Mapping[str, Any] | None,
        task: str | None,
        overrides: Mapping[str, Any],
    ) -> tuple[BLIPConfig, list[Rule]]:
        return layout.read(checkpoint, hf_config, task, overrides)

    def _write_layout(self) -> tuple[dict[str, Any], list[Rule] | None]:
        return layout.write(self.cfg)

    def forward(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_input_ids: Int[Tensor, "batch answer_pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "batch answer_pos"] | None = None,
        return_type: Literal["logits", "loss"] | None = "logits",
    ) -> Tensor | None:
        """Runs the model; one image may serve a batch of texts.

        Args:
            pixel_values: images, from `prepare`.
            input_ids: the text, the caption so far, or the question.
            attention_mask: 1 for a token, 0 for padding; all ones by default.
            decoder_input_ids: the answer so far (`vqa`); by default `[DEC]` alone.
            decoder_attention_mask: the same for the answer.
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
        if return_type == "logits":
            return logits
        if return_type is None:
            return None
        if return_type != "loss":
            raise ValueError(f"return_type is 'logits', 'loss' or None, not {return_type!r}")
        if self.cfg.decoder is None:
            raise ValueError(
                "an itm checkpoint predicts no next token: it has no return_type='loss'"
            )
        ids, mask = input_ids, attention_mask
        if self.task == "vqa":
            ids, mask = decoder_input_ids, decoder_attention_mask
        if ids is None:
            raise ValueError("return_type='loss' needs the tokens that are to be predicted")
        targets = ids if mask is None else ids.masked_fill(mask == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

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
            states = self._decode(flow, "vision", input_ids, attention_mask)
            return self.hook_logits(self.unembed(states))
        text = self._ask(flow, input_ids, attention_mask)
        if self.task == "itm":
            return self.hook_logits(self.itm_head(text[:, 0]))
        if decoder_input_ids is None:
            decoder_input_ids = torch.full_like(input_ids[:, :1], self.cfg.bos_token_id)
        self._check_text("decoder_input_ids", decoder_input_ids, decoder_attention_mask)
        states = self._decode(
            flow, "text", decoder_input_ids, decoder_attention_mask, attention_mask
        )
        return self.hook_logits(self.unembed(states))

    def _see(self, flow: Flow, pixel_values: Tensor) -> Tensor:
        return flow.stack("vision", pixel_values, after=self.hook_image_embeds)

    def _ask(self, flow: Flow, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return flow.stack(
            "text",
            input_ids,
            mask=self.text.visible(input_ids, attention_mask),
            source="vision",
            readout=slice(0, 1) if self.task == "itm" else slice(None),
        )

    def _decode(
        self,
        flow: Flow,
        source: str,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        return flow.stack(
            "decoder",
            input_ids,
            mask=self.decoder.visible(input_ids, attention_mask),
            source=source,
            source_mask=None if source_mask is None else source_mask.bool(),
        )

    def get_image_features(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images d_proj"]:
        """Unit vectors of images in the similarity space (`itm`)."""
        self._need_itm("get_image_features")
        states = self._see(Flow(self.stacks, self._grad_wanted), pixel_values)
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def get_text_features(
        self,
        input_ids: Int[Tensor, "texts pos"],
        attention_mask: Int[Tensor, "texts pos"] | None = None,
    ) -> Float[Tensor, "texts d_proj"]:
        """Unit vectors of texts, from the text-only pass that skips cross-attention (`itm`)."""
        self._need_itm("get_text_features")
        self._check_text("input_ids", input_ids, attention_mask)
        mask = self.text.visible(input_ids, attention_mask)
        states = Flow(self.stacks, self._grad_wanted).stack("text", input_ids, mask=mask)
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def similarity(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "texts pos"],
        attention_mask: Int[Tensor, "texts pos"] | None = None,
    ) -> Float[Tensor, "images texts"]:
        """Cosine of every image with every text, without a temperature (`itm`).

        Source: the ITC head, arXiv 2201.12086 sec. 3.2, as in `blip_itm.py`.
        """
        images = self.get_image_features(pixel_values)
        return images @ self.get_text_features(input_ids, attention_mask).mT

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

    def _prompt(self, input_ids: Tensor | None, batch: int) -> Tensor:
        """`[DEC]`, and the words of the text so far, without what the tokenizer puts around."""
        start = torch.full((batch, 1), self.cfg.bos_token_id, device=self.device)
        if input_ids is None:
            return start
        return torch.cat([start.expand(len(input_ids), 1), input_ids[:, 1:-1]], dim=1)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        **generation: Any,
    ) -> Any:
        """Captions or answers, by `transformers.GenerationMixin.generate`; hooks fire every step.

        In cached steps hooks see the new positions only, and `hook.ctx["positions"]` holds their
        absolute indices. Keys and values of what cross-attention reads are made once.

        Args:
            pixel_values: images, from `prepare`.
            input_ids: the question (`vqa`), or the words that the caption begins with: its first
                token becomes `[DEC]` and its last, `[SEP]`, is dropped.
            attention_mask: 1 for a token, 0 for padding.
            **generation: `max_new_tokens`, `num_beams`, `do_sample`, ... as in transformers.

        Returns:
            What transformers returns: ids, [batch, pos], that begin with `[DEC]`.

        Raises:
            ValueError: an itm checkpoint, which writes no text.
        """
        if self.cfg.decoder is None:
            raise ValueError("an itm checkpoint writes no text; open a captioning or vqa one")
        flow = Flow(self.stacks)
        states = self._see(flow, pixel_values)
        states_mask = None
        special = {
            "bos_token_id": self.cfg.bos_token_id,
            "sep_token_id": self.cfg.sep_token_id,
            "pad_token_id": self.cfg.pad_token_id,
            "eos_token_id": self.cfg.sep_token_id,
        }
        if self.task == "vqa":
            if input_ids is None:
                raise ValueError("input_ids, the question, is missing")
            states = self._ask(flow, input_ids, attention_mask)
            states_mask = None if attention_mask is None else attention_mask.bool()
            attention_mask = None
        elif input_ids is not None:
            self._check_text("input_ids", input_ids, attention_mask)
            attention_mask = None if attention_mask is None else attention_mask[:, :-1]
        prompt = self._prompt(input_ids if self.task == "captioning" else None, len(states))
        if not generation.keys() & {"max_length", "max_new_tokens", "generation_config"}:
            generation["max_length"] = max(20, prompt.shape[1] + 1)  # transformers', unasked
        decoder = Decoder(
            self.decoder, self.unembed, self.hook_logits, states, states_mask, special
        )
        # `generate` declares its self a PreTrainedModel; what it asks of one, Decoder has.
        return decoder.generate(  # type: ignore[misc]
            input_ids=prompt, attention_mask=attention_mask, **generation
        )

    def _need_itm(self, what: str) -> None:
        if self.task != "itm":
            raise ValueError(f"{what} needs an itm checkpoint, this one is for {self.task!r}")
