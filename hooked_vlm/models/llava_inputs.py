"""Images and questions to inputs of a LLaVA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import BatchEncoding

from hooked_vlm.config import LlavaConfig
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.inputs import (
    Geometry,
    ImageLike,
    check_texts,
    made_size,
    open_images,
    visible,
)
from hooked_vlm.models.tiling import Tiling
from weights_conversion.llava_processor import processor_class

# The prompts that LLaVA was trained with, by language model, without a system text.
PROMPTS = {
    "llama": "USER: {image}{question} ASSISTANT:",
    "mistral": "[INST] {image}{question} [/INST]",
}


class LlavaInputs(HookedVLM):
    """What a LLaVA makes of images and texts, by the checkpoint's own processor."""

    cfg: LlavaConfig

    def prepare(
        self,
        images: ImageLike | Sequence[ImageLike] | None,
        text: str | Sequence[str] | None = None,
        *,
        first_token: Literal["cls", "enc"] = "cls",
        answer_prefix: str = "",
    ) -> BatchEncoding:
        r"""Images and questions to inputs of the model, on its device, by its own processor.

        A text without `<image>` is a question, which the processor's chat template makes a prompt
        of, or where it has none the one that LLaVA was trained with: with a Llama
        `USER: <image>\n{question} ASSISTANT:`, with a Mistral `[INST] <image>\n{question} [/INST]`.
        A text with `<image>` is a prompt already, in which one image stands in place of each.

        Args:
            images: PIL images or paths: those of all prompts, in order, or those that every prompt
                reads; one prompt may go with several images, one at a time. None for prompts
                without an image.
            text: questions or prompts.
            first_token: `cls`; the other is BLIP's.
            answer_prefix: what the answer begins with, as it stands.

        Returns:
            `pixel_values`, `image_sizes` (LLaVA-NeXT), `input_ids`, `attention_mask`, and as
            attributes `geometry` (one per image) and `first_token`.

        Raises:
            ValueError: no processor or one that does not fit the model, something that is no
                image, an empty text, a prompt that is too long, or numbers that do not match.
        """
        if text is None:
            raise ValueError("a LLaVA needs a text: the question")
        if first_token != "cls":
            raise ValueError(f"first_token={first_token!r} is BLIP's; a LLaVA has one first token")
        pictures, processor = [] if images is None else open_images(images), self._processor
        self._check_processor(processor)
        prompts = [self._prompt(one, bool(pictures)) + answer_prefix for one in check_texts(text)]
        image = processor.image_token
        counts = [prompt.count(image) for prompt in prompts]
        if counts == [1] and pictures:
            prompts, counts = prompts * len(pictures), counts * len(pictures)
        given = pictures
        if sum(counts) != len(pictures) and set(counts) == {len(pictures)}:
            given = pictures * len(prompts)  # the processor wants each prompt's own
        if sum(counts) != len(given):
            raise ValueError(
                f"{len(pictures)} images do not match {sum(counts)} {image} in {len(prompts)} texts"
            )
        encoded = processor(
            images=given or None, text=prompts, padding=len(prompts) > 1, return_tensors="pt"
        )
        length, limit = encoded["input_ids"].shape[1], self.cfg.text.n_ctx
        if length > limit:
            raise ValueError(
                f"a prompt has {length} tokens, those of its images among them; the model reads "
                f"{limit}; shorten {max(prompts, key=len)[:60]!r}"
            )
        found = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if pictures:
            found["pixel_values"] = encoded["pixel_values"][: len(pictures)].to(self.dtype)
        if pictures and self.cfg.resolutions is not None:
            found["image_sizes"] = encoded["image_sizes"][: len(pictures)]
        inputs = BatchEncoding(found).to(self.device)
        geometry = [self._geometry(picture.size, processor.image_processor) for picture in pictures]
        # Attributes, no entries: `model(**inputs)` must not get them.
        vars(inputs).update(geometry=geometry, first_token=first_token)
        return inputs

    def prompt_parts(self, inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The positions of a prompt's parts by name, of one row of inputs, padding left out.

        `image`; `system`, the text in front of the first turn; `question`, what the user says, and
        `answer`, what the assistant says, of all turns; `template`, what marks turns. Of a prompt
        that is not of the template's form `image` and `text`.

        Args:
            inputs: from `prepare`.
        """
        ids = inputs["input_ids"][0]
        mask = inputs.get("attention_mask")
        real = list(range(len(ids))) if mask is None else mask[0].nonzero().flatten().tolist()
        image = [at for at in real if ids[at] == self.cfg.image_token_id]
        words = [at for at in real if ids[at] != self.cfg.image_token_id]
        markers = self._markers()
        parts = None
        if markers is not None:
            parts = _spoken([self._written(int(ids[at])) for at in words], *markers)
        if parts is None:
            return {"image": tuple(image), "text": tuple(words)}
        found = {
            name: tuple(at for at, part in zip(words, parts, strict=True) if part == name)
            for name in ("system", "question", "answer", "template")
        }
        return {"image": tuple(image)} | found

    def _markers(self) -> tuple[str, str] | None:
        """What stands in front of a question and of an answer; None if nothing tells."""
        if self.processor is None:
            return None
        if getattr(self.processor, "chat_template", None) is None:
            before, behind = PROMPTS[self.cfg.language].split("{image}{question}")
            return before.strip(), behind.strip()
        said = [("user", "QUESTION"), ("assistant", "ANSWER"), ("user", "QUESTION")]
        prompt = self.processor.apply_chat_template(
            [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in said],
            add_generation_prompt=True,
        )
        for token in self._ends():
            prompt = prompt.replace(token, "")
        turns = re.fullmatch("(.*)QUESTION(.*)ANSWER(.*)QUESTION(.*)", prompt, re.DOTALL)
        if turns is None:
            return None
        head, replies, between, opens = turns.groups()  # a system text stands in the head alone
        asks = _begins(head[::-1], between[::-1])[::-1].strip()
        answers = _begins(replies.strip(), opens.strip())
        return (asks, answers) if asks and answers else None

    def _ends(self) -> set[str]:
        """The tokens that begin and end texts."""
        tokenizer = self.tokenizer
        return {one for one in (tokenizer.bos_token, tokenizer.eos_token) if one}

    def _written(self, token: int) -> str:
        """What a token writes into a text, one character for each that matters here."""
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if piece in self._ends():
            return ""
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        if byte:
            return chr(int(byte[1], 16))
        return piece.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n")

    def _geometry(self, size: tuple[int, int], processor: Any) -> Geometry:
        if self.cfg.resolutions is None:
            return Geometry(size, visible(size, processor))
        width, height = size
        tiling = Tiling.of((height, width), self.cfg.resolutions, self.cfg.vision.image_size)
        whole, *tiles = tiling.boxes
        return Geometry(size, whole, tuple(tiles))

    def _check_processor(self, processor: Any) -> None:
        """Refuses a processor that makes other pixels or image tokens than the model reads."""
        cfg, kind = self.cfg, processor_class(self.cfg)
        if not isinstance(processor, kind):
            raise ValueError(
                f"the processor is a {type(processor).__name__}, this model needs a "
                f"{kind.__name__}; pass processor= of its own checkpoint"
            )
        if processor.image_token_id != cfg.image_token_id:
            raise ValueError(
                f"the processor's {processor.image_token!r} is token {processor.image_token_id}, "
                f"the model's {cfg.image_token_id}; pass processor= of its own checkpoint"
            )
        size, more = processor.patch_size, processor.num_additional_image_tokens
        strategy = processor.vision_feature_select_strategy
        if (size, strategy) != (cfg.vision.patch_size, cfg.feature_strategy) or more != 1:
            raise ValueError(
                f"the processor has patch_size={size}, vision_feature_select_strategy="
                f"{strategy!r} and num_additional_image_tokens={more}; for the "
                f"{cfg.n_image_tokens} features of an image it needs {cfg.vision.patch_size}, "
                f"{cfg.feature_strategy!r} and 1. Set them on model.processor, or in the "
                "checkpoint's processor_config.json"
            )
        images, side = processor.image_processor, cfg.vision.image_size
        made = made_size(images)
        if made != (side, side):
            shape = "the shape of each image" if made is None else f"{made[0]} x {made[1]} pixels"
            raise ValueError(
                f"the image processor ({type(images).__name__}) makes pictures of {shape}, the "
                f"model reads {side} x {side}; set size and crop_size on "
                "model.processor.image_processor, or pass processor= of its own checkpoint"
            )
        grids = getattr(images, "image_grid_pinpoints", None)
        if cfg.resolutions != (grids and tuple(map(tuple, grids))):
            wanted = cfg.resolutions and list(map(list, cfg.resolutions))
            raise ValueError(
                f"the image processor ({type(images).__name__}) has image_grid_pinpoints={grids}, "
                f"the model {wanted}; pass processor= of its own checkpoint"
            )

    def _prompt(self, text: str, with_image: bool) -> str:
        image = self.processor.image_token
        if image in text:
            return text
        if getattr(self.processor, "chat_template", None) is None:
            prompt = PROMPTS[self.cfg.language]
            return prompt.format(image=f"{image}\n" * with_image, question=text)
        said = [*[{"type": "image"}] * with_image, {"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True
        )
        return str(prompt).removeprefix(self.tokenizer.bos_token or "")  # encoding puts it there


def _begins(one: str, other: str) -> str:
    """What two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))]


def _spoken(tokens: Sequence[str], asks: str, answers: str) -> list[str] | None:
    """The part of a prompt that each of its tokens belongs to; None for one without turns.

    Args:
        tokens: what they write.
        asks: what stands in front of a question.
        answers: what stands in front of an answer.
    """
    text = "".join(tokens)
    parts = ["template"] * len(text)
    part, begin = "system", 0
    while True:
        marker = answers if part == "question" else asks
        end = text.find(marker, begin)
        stop = len(text) if end < 0 else end
        said = text[begin:stop]
        first, n = begin + len(said) - len(said.lstrip()), len(said.strip())
        parts[first : first + n] = [part] * n
        if end < 0:
            break
        part, begin = ("answer" if part == "question" else "question"), end + len(marker)
    if part == "system":
        return None
    found, at = [], 0
    for token in tokens:
        blank = len(token) - len(token.lstrip())  # a space in front tells nothing
        inside = parts[at : at + len(token)]
        found.append(inside[blank % len(token)] if token else "template")
        at += len(token)
    return found
