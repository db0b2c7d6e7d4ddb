"""ALBEF: retrieval, grounding, masked tokens, questions, entailment, and two images at once.

Source: Li et al., Align before Fuse (arXiv 2107.07651), sec. 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

from hooked_vlm.components.attention import Source
from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.mlp import MLP
from hooked_vlm.components.stack import TextStack, Unembed, VisionStack
from hooked_vlm.config import ALBEFConfig
from hooked_vlm.models.flow import Flow, Span
from hooked_vlm.models.fused import FusedVLM
from hooked_vlm.models.inputs import ImageLike, check_texts, pre_caption
from weights_conversion import albef as layout

Mode = Literal["text", "fusion", "multi_modal"]


class Ranked(NamedTuple):
    """Answers of each question, the best first.

    Attributes:
        ids: [batch, k], indices of answers.
        probs: [batch, k], softmax over the k answers.
    """

    ids: Tensor
    probs: Tensor


class HookedALBEF(FusedVLM):
    """ALBEF with every activation named; see `docs/names.md` for the names.

    Args:
        cfg: sizes and task. Weights are noise until they are loaded; `from_pretrained` does both.
    """

    LAYOUT = layout
    WRITERS = ("vqa",)

    cfg: ALBEFConfig

    def __init__(self, cfg: ALBEFConfig):
        super().__init__(cfg)
        self.max_words = cfg.max_words
        self.vision = VisionStack(cfg.vision)
        self.hook_image_embeds = HookPoint()  # [images, image_pos, d_vision]
        self.text = TextStack(cfg.text)
        if cfg.decoder is not None:
            self._add_decoder()
        if cfg.task == "pretrain":
            self.unembed = Unembed(cfg.text)
            self.unembed.out.weight = self.text.embed.weight
        if cfg.task in ("itm", "pretrain"):
            self.itm_head = nn.Linear(cfg.text.d_model, 2)
        if cfg.d_class is not None:
            self.cls_head = MLP(cfg.text.d_model, cfg.text.d_model, "relu", cfg.d_class)
        if cfg.d_proj is not None:
            self._add_similarity()
        if cfg.temperature:
            self.temp = nn.Parameter(torch.zeros(()))
        self.hook_logits = HookPoint()  # [batch, classes] or [batch, pos, d_vocab]
        self.requires_grad_(False)
        self.setup()

    # --- the pass

    def forward(
        self,
        pixel_values: Float[Tensor, "images *two 3 height width"] | None = None,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        decoder_input_ids: Int[Tensor, "answers answer_pos"] | None = None,
        decoder_attention_mask: Int[Tensor, "answers answer_pos"] | None = None,
        encoder_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        mode: Mode = "multi_modal",
        return_type: Literal["logits", "loss"] | None = "logits",
    ) -> Tensor | None:
        """Runs the model; one image may serve a batch of texts.

        Args:
            pixel_values: images, from `prepare`; of `nlvr` [batch, 2, 3, height, width].
            input_ids: the text, or the question.
            attention_mask: 1 for a token, 0 for padding; all ones by default.
            decoder_input_ids: the answers so far (`vqa`), one to each question or all to one; by
                default `[CLS]` alone.
            decoder_attention_mask: the same for the answers.
            encoder_embeds: what `mode="text"` gave, for `mode="fusion"`.
            mode: `multi_modal` for the whole; `text` for the layers before `fusion_layer`, which
                read no image; `fusion` for the rest, from what these gave.
            return_type: `logits`; `loss` for the mean cross-entropy of the next token over those
                that are no padding (`vqa`); None for nothing.

        Returns:
            Logits: [batch, 2] of `itm`, index 1 is 'match'; [batch, pos, d_vocab] of `pretrain`
            and `vqa`; [batch, 3] of `ve`; [batch, 2] of `nlvr`. In `mode="text"` the states,
            [batch, pos, d_model].

        Raises:
            ValueError: inputs that do not fit the model, the mode or one another.
        """
        logits = self._run(
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_embeds=encoder_embeds,
            mode=mode,
        )
        if mode == "text" and return_type == "loss":
            raise ValueError("mode='text' gives states: there is no loss of them")
        return self._returned(logits, return_type, decoder_input_ids, decoder_attention_mask)

    def _flow(
        self,
        flow: Flow,
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_embeds: Tensor | None = None,
        mode: str = "multi_modal",
    ) -> Tensor:
        _check_mode(mode, pixel_values, input_ids, encoder_embeds)
        self._refuse_writers(mode)
        if decoder_input_ids is not None and (self.task != "vqa" or mode == "text"):
            raise ValueError(
                f"decoder_input_ids belongs to the answers of task 'vqa', this is task "
                f"{self.task!r} in mode={mode!r}"
            )
        if input_ids is not None:
            self._check_text("input_ids", input_ids, attention_mask)
            if mode == "text":
                return self._read_alone(flow, input_ids, attention_mask)
        assert pixel_values is not None
        if encoder_embeds is not None:
            self._check_states(encoder_embeds, attention_mask)
        self._see(flow, pixel_values)
        if encoder_embeds is None:
            assert input_ids is not None
            text = self._ask(flow, input_ids, attention_mask)
        else:
            text = self._fuse(
                flow, encoder_embeds, attention_mask, (self.cfg.text.fusion_layer, None)
            )
        if self.task == "vqa":
            return self._answer(flow, attention_mask, decoder_input_ids, decoder_attention_mask)
        if self.task == "pretrain":
            return self.hook_logits(self.unembed(text))
        head = self.itm_head if self.task == "itm" else self.cls_head
        return self.hook_logits(head(text[:, 0]))

    def _see(self, flow: Flow, pixel_values: Tensor) -> Tensor:
        if self.task == "nlvr":
            if pixel_values.dim() != 5 or pixel_values.shape[1] != 2:
                raise ValueError(
                    f"pixel_values is {list(pixel_values.shape)}: an nlvr checkpoint reads two "
                    "images with each text, [batch, 2, 3, height, width]; "
                    "model.prepare([(left, right)], text) makes them"
                )
            pixel_values = pixel_values.flatten(0, 1)
        return super()._see(flow, pixel_values)

    def _ask(self, flow: Flow, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self._fuse(flow, input_ids, attention_mask, (0, None))

    def _fuse(
        self, flow: Flow, inputs: Tensor, attention_mask: Tensor | None, span: Span
    ) -> Tensor:
        """The text with the image, from token ids or from what the text-only pass gave."""
        return flow.stack(
            "text",
            inputs,
            mask=None if attention_mask is None else attention_mask.bool()[:, None, None],
            source="vision",
            readout=slice(None) if self.task in ("vqa", "pretrain") else slice(0, 1),
            span=span,
        )

    def _check_states(self, states: Tensor, mask: Tensor | None) -> None:
        cfg, shape = self.cfg.text, list(states.shape)
        if states.dim() != 3 or shape[2] != cfg.d_model or not 0 < shape[1] <= cfg.n_ctx:
            raise ValueError(
                f"encoder_embeds is {shape}, expected what mode='text' gives: [batch, pos, "
                f"{cfg.d_model}] of 1 to {cfg.n_ctx} positions"
            )
        if states.dtype != self.dtype:
            raise ValueError(f"encoder_embeds is of {states.dtype}, the model of {self.dtype}")
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"the attention mask of encoder_embeds is {list(mask.shape)}, they are {shape}"
            )

    def _refuse_writers(self, mode: str) -> None:
        """A partial pass would ignore hooks at points that it does not compute."""
        if mode == "multi_modal":
            return
        fusion = self.cfg.text.fusion_layer
        for point in self.hook_points():
            if not (point.has_writers or point._backward_hooks):
                continue  # whoever only reads finds nothing, and says so
            stack, door = self._place(str(point.name))
            early = stack == "text" and (door is None or door[0] < fusion)
            if early != (mode == "text"):
                raise ValueError(
                    f"the hook at {point.name!r} would not fire: mode={mode!r} does not compute it"
                )

    # --- inputs

    def prepare(
        self,
        images: ImageLike | Sequence[ImageLike] | Sequence[Sequence[ImageLike]],
        text: str | Sequence[str] | None = None,
        *,
        first_token: Literal["cls", "enc"] = "cls",
    ) -> BatchEncoding:
        """As in `HookedVLM.prepare`; of `nlvr`, `images` holds a pair of images for each text.

        Texts are cleaned as the original does it: lower case, without punctuation, hyphens and
        slashes as spaces, and cut off after `max_words` words, with a warning. They have the
        form `[CLS] X`, without a final `[SEP]`.
        """
        if self.task != "nlvr":
            return super().prepare(images, text, first_token=first_token)  # type: ignore[arg-type]
        pairs: list[Any] = list(images) if isinstance(images, list | tuple) else []
        if not pairs or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            raise ValueError(
                "an nlvr checkpoint reads two images with each text: give a list of pairs of "
                "images, [(left, right), ...]"
            )
        inputs = super().prepare(list(chain(*pairs)), text, first_token=first_token)
        inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (-1, 2))
        return inputs

    def _match(self, texts: list[str], n_images: int) -> list[str]:
        if self.task != "nlvr":
            return super()._match(texts, n_images)
        if n_images // 2 not in (1, len(texts)) and len(texts) != 1:
            raise ValueError(f"{n_images // 2} pairs of images do not match {len(texts)} texts")
        return super()._match(texts, n_images // 2)

    def _encode(self, texts: list[str], first_token: str) -> dict[str, Tensor]:
        if first_token != "cls":
            raise ValueError(f"first_token of an ALBEF is 'cls', not {first_token!r}")
        return super()._encode(texts, first_token)

    def _clean(self, texts: list[str]) -> list[str]:
        return [pre_caption(text, self.max_words) for text in texts]

    def prepare_answers(
        self, answers: Sequence[str]
    ) -> tuple[Int[Tensor, "answers pos"], Int[Tensor, "answers pos"]]:
        """Token ids of answers, `[CLS] answer [SEP]`, padded, and their mask (`vqa`)."""
        texts = [f"{answer}{self.tokenizer.sep_token}" for answer in check_texts(answers)]
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        return encoded["input_ids"], encoded["attention_mask"]

    # --- answers

    def rank_answers(
        self,
        pixel_values: Float[Tensor, "images 3 height width"],
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        answers: Sequence[str] | None = None,
        answer_ids: Int[Tensor, "answers answer_pos"] | None = None,
        answer_mask: Int[Tensor, "answers answer_pos"] | None = None,
        k: int = 128,
        double_first: bool = True,
    ) -> Ranked:
        """Ranks candidate answers by their probability (`vqa`); hooks fire.

        The k answers whose first word is likeliest are scored by the log probability of all their
        tokens. The released code adds that of the first word once more, and so does this by
        default; released numbers rest on it.

        Args:
            pixel_values: images, from `prepare`.
            input_ids: the questions.
            attention_mask: 1 for a token, 0 for padding.
            answers: the candidates, as texts.
            answer_ids: the candidates, as `prepare_answers` makes them, in the texts' place.
            answer_mask: their mask; by default all but `[PAD]`.
            k: how many candidates are scored whole; all, where there are fewer.
            double_first: whether the first word counts twice.

        Returns:
            Indices of answers and their probabilities, the best first.

        Raises:
            ValueError: another task, candidates that are none, or a k below 1.

        Source: arXiv 2107.07651 sec. 4, `rank_answer` of the released code.
        """
        if self.task != "vqa":
            raise ValueError(f"rank_answers needs a vqa checkpoint, this one is for {self.task!r}")
        if (answers is None) == (answer_ids is None) or (answers and answer_mask is not None):
            raise ValueError(
                "give the candidates either as answers= or as answer_ids= (and answer_mask=)"
            )
        if k < 1:
            raise ValueError(f"k is at least 1, not {k}")
        if answers is not None:
            answer_ids, answer_mask = self.prepare_answers(answers)
        assert answer_ids is not None
        if answer_ids.dim() != 2 or len(answer_ids) == 0 or answer_ids.shape[1] < 2:
            raise ValueError(
                f"answer_ids is {list(answer_ids.shape)}, expected [answers, pos] of at least one "
                "answer, [CLS] and a word: prepare_answers makes them"
            )
        self._check_text("answer_ids", answer_ids, answer_mask)
        self._check_text("input_ids", input_ids, attention_mask)
        if answer_mask is None:
            answer_mask = (answer_ids != self.cfg.pad_token_id).long()
        flow = Flow(self.stacks, self._grad_wanted)
        self._see(flow, pixel_values)
        question = self._ask(flow, input_ids, attention_mask)
        seen = None if attention_mask is None else attention_mask.bool()
        rows = torch.arange(len(question), device=self.device)
        source = Source(question, seen, rows, {})
        starts = answer_ids[:1, :1].expand(len(question), 1)
        first = _log_probs(self._continue(starts, None, source)[:, 0])
        k = min(k, len(answer_ids))
        scores, chosen = first[:, answer_ids[:, 1]].topk(k, dim=1)  # [batch, k] each
        if not double_first:
            scores = torch.zeros_like(scores)
        targets = answer_ids.masked_fill(answer_mask == 0, -100)
        each = []
        for row, candidates in enumerate(chosen):  # at once they would fill the memory
            own = replace(source, rows=torch.full_like(candidates, row))
            logits = self._continue(answer_ids[candidates], answer_mask[candidates], own)
            losses = F.nll_loss(
                _log_probs(logits[:, :-1]).mT, targets[candidates, 1:], reduction="none"
            )
            each.append(-losses.sum(1))
        probs, order = (scores + torch.stack(each)).softmax(-1).topk(k, dim=1)
        return Ranked(chosen.gather(1, order), probs)


def _log_probs(logits: Tensor) -> Tensor:
    """In float32 at least, where probabilities of unlikely words do not vanish."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)


def _check_mode(
    mode: str, pixel_values: Tensor | None, input_ids: Tensor | None, embeds: Tensor | None
) -> None:
    needs = {
        "text": ("input_ids",),
        "fusion": ("pixel_values", "encoder_embeds"),
        "multi_modal": ("pixel_values", "input_ids"),
    }
    if mode not in needs:
        raise ValueError(f"mode is 'text', 'fusion' or 'multi_modal', not {mode!r}")
    given = {"pixel_values": pixel_values, "input_ids": input_ids, "encoder_embeds": embeds}
    for name, value in given.items():
        if value is None and name in needs[mode]:
            more = ""
            if name == "pixel_values":
                more = ": the layers from fusion_layer on read an image; mode='text' ends there"
            if name == "encoder_embeds":
                more = ": what mode='text' gave"
            raise ValueError(f"mode={mode!r} needs {name}{more}")
        if value is not None and name not in needs[mode]:
            raise ValueError(f"mode={mode!r} does not read {name}")
