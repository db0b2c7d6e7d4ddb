"""What BLIP and ALBEF share: an image encoder that BERT stacks read through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextConfig

from hooked_vlm.components.attention import Source
from hooked_vlm.components.blocks import Context
from hooked_vlm.components.hook_point import HookPoint, telling
from hooked_vlm.components.past import Past
from hooked_vlm.components.stack import TextStack, Unembed, VisionStack
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Flow
from hooked_vlm.models.generation import StepHooks, Writer, sizes
from hooked_vlm.models.inputs import followed


class FusedVLM(HookedVLM):
    """Stacks `vision`, `text`, `decoder`, of which a task has some, and the heads on them."""

    GLUE: ClassVar[dict[str, str]] = {"hook_image_embeds": "vision"}

    WRITERS: ClassVar[tuple[str, ...]]  # the tasks whose checkpoints have a decoder

    vision: VisionStack
    text: TextStack
    decoder: TextStack
    unembed: Unembed
    hook_image_embeds: HookPoint
    hook_logits: HookPoint

    def _add_decoder(self) -> None:
        self.decoder = TextStack(self.cfg.decoder)
        self.unembed = Unembed(self.cfg.decoder)
        self.unembed.out.weight = self.decoder.embed.weight

    def _add_similarity(self) -> None:
        self.vision_proj = nn.Linear(self.cfg.vision.d_model, self.cfg.d_proj)
        self.text_proj = nn.Linear(self.cfg.text.d_model, self.cfg.d_proj)

    # --- parts of the pass

    def _see(self, flow: Flow, pixel_values: Tensor) -> Tensor:
        return flow.stack("vision", pixel_values, after=self.hook_image_embeds)

    def _ask(self, flow: Flow, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The text read with the image."""
        raise NotImplementedError

    def _decode(
        self,
        flow: Flow,
        source: str,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        states = flow.stack(
            "decoder",
            input_ids,
            mask=self.decoder.visible(input_ids, attention_mask),
            source=source,
            source_mask=None if source_mask is None else source_mask.bool(),
            readout=flow.readout,
        )
        return self.hook_logits(self.unembed(states[:, flow.readout]))

    def _answer(
        self,
        flow: Flow,
        question_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
    ) -> Tensor:
        """Logits of an answer's tokens; of the first one where there is no answer yet."""
        if decoder_input_ids is None:
            asked = len(flow.outputs["text"])
            decoder_input_ids = torch.full((asked, 1), self.cfg.bos_token_id, device=self.device)
        self._check_text("decoder_input_ids", decoder_input_ids, decoder_attention_mask)
        return self._decode(flow, "text", decoder_input_ids, decoder_attention_mask, question_mask)

    def _returned(
        self, logits: Tensor, return_type: str | None, ids: Tensor | None, mask: Tensor | None
    ) -> Tensor | None:
        """What `forward` gives: logits, the loss of the next tokens, or nothing."""
        if return_type == "logits":
            return logits
        if return_type is None:
            return None
        if return_type != "loss":
            raise ValueError(f"return_type is 'logits', 'loss' or None, not {return_type!r}")
        if self.cfg.decoder is None:
            raise ValueError(
                f"a {self.task} checkpoint predicts no next token: it has no return_type='loss'"
            )
        if ids is None:
            raise ValueError("return_type='loss' needs the tokens that are to be predicted")
        targets = ids if mask is None else ids.masked_fill(mask == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    # --- similarity

    def get_image_features(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images d_proj"]:
        """Unit vectors of images in the similarity space.

        Raises:
            ValueError: a checkpoint without the projections.
        """
        self._need_similarity("get_image_features")
        states = self._see(Flow(self.stacks, self._grad_wanted), pixel_values)
        return F.normalize(self.vision_proj(states[:, 0]), dim=-1)

    def get_text_features(
        self,
        input_ids: Int[Tensor, "texts pos"],
        attention_mask: Int[Tensor, "texts pos"] | None = None,
    ) -> Float[Tensor, "texts d_proj"]:
        """Unit vectors of texts, from the text-only pass, which no cross-attention takes part in.

        Raises:
            ValueError: a checkpoint without the projections.
        """
        self._need_similarity("get_text_features")
        self._check_text("input_ids", input_ids, attention_mask)
        states = self._read_alone(Flow(self.stacks, self._grad_wanted), input_ids, attention_mask)
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def _read_alone(self, flow: Flow, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The text-only pass: BLIP's skips cross-attention, ALBEF's ends before the first."""
        mask = self.text.visible(input_ids, attention_mask)
        span = (0, self.text.cfg.fusion_layer or None)
        return flow.stack("text", input_ids, mask=mask, span=span)

    def similarity(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "texts pos"],
        attention_mask: Int[Tensor, "texts pos"] | None = None,
    ) -> Float[Tensor, "images texts"]:
        """Cosine of every image with every text, without a temperature.

        Source: the image-text contrastive head, ALBEF (arXiv 2107.07651) sec. 3.2, BLIP (arXiv
        2201.12086) sec. 3.2.

        Raises:
            ValueError: a checkpoint without the projections.
        """
        images = self.get_image_features(pixel_values)
        return images @ self.get_text_features(input_ids, attention_mask).mT

    def _need_similarity(self, what: str) -> None:
        if "vision_proj" not in self._modules:
            raise ValueError(
                f"{what} needs the projections vision_proj and text_proj, which this "
                f"{self.task} checkpoint does not hold; open one that was trained with them"
            )

    # --- generation

    def continued(self, inputs: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
        """Inputs behind which some tokens of the answer stand; see `HookedVLM.continued`."""
        if self.cfg.decoder is None:
            return super().continued(inputs, ids)
        if self.task != "vqa":
            return followed(inputs, ids, "input_ids", "attention_mask")
        given = dict(inputs)
        if given.get("decoder_input_ids") is None:
            given["decoder_input_ids"] = torch.full(
                (len(given["input_ids"]), 1), self.cfg.bos_token_id, device=self.device
            )
        return followed(given, ids, "decoder_input_ids", "decoder_attention_mask")

    def _prompt(self, input_ids: Tensor | None, batch: int) -> Tensor:
        """The first token, and the words of the text so far, without what stands around them."""
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
        *,
        fwd_hooks: StepHooks = (),
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
            fwd_hooks: hooks of every step, or a function from the step's number, from 0, to its
                hooks; the image is read before the first.
            **generation: `max_new_tokens`, `num_beams`, `do_sample`, ... as in transformers.

        Returns:
            What transformers returns: ids, [batch, pos], that begin with `[DEC]` (BLIP) or
            `[CLS]` (ALBEF).

        Raises:
            ValueError: a checkpoint without a decoder, which writes no text; an option of
                `generate` that a step cannot serve.
        """
        if self.cfg.decoder is None:
            raise ValueError(
                f"task {self.task!r} has no decoder and writes no text; open a checkpoint for "
                f"{' or '.join(self.WRITERS)}"
            )
        flow = Flow(self.stacks)
        states = self._see(flow, pixel_values)
        states_mask = None
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
        source = Source(states, states_mask, kept={})
        rows = torch.arange(len(states), device=self.device)

        def step(ids: Tensor, mask: Tensor | None, past: Past) -> Tensor:
            offset = past.length(0)
            own = replace(source, rows=rows.repeat_interleave(len(ids) // len(rows)))
            at = torch.arange(offset, offset + ids.shape[1], device=self.device)
            with telling(self, at):
                return self._continue(ids, mask, own, past)

        config = BlipTextConfig(
            **sizes(self.cfg.decoder),
            bos_token_id=self.cfg.bos_token_id,
            sep_token_id=self.cfg.sep_token_id,
            pad_token_id=self.cfg.pad_token_id,
            eos_token_id=self.cfg.sep_token_id,
        )
        writer = Writer(self, step, config, fwd_hooks=fwd_hooks)
        return writer.write(input_ids=prompt, attention_mask=attention_mask, **generation)

    def _continue(
        self, ids: Tensor, mask: Tensor | None, source: Source, past: Past | None = None
    ) -> Tensor:
        """Logits of words of the decoder; rows that read the same share its keys and values."""
        offset = 0 if past is None else past.length(0)
        x = self.decoder.embeddings(ids, offset=offset, grad=self._grad_wanted)
        seen = self.decoder.visible(ids, mask, offset)
        x = self.decoder.run(x, Context(seen, (source,), past))
        return self.hook_logits(self.unembed(x))
