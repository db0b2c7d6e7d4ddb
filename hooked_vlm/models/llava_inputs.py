"""Images and questions to inputs of a LLaVA."""

from __future__ import annotations

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
        """The positions of a prompt's parts by name, of one row of inputs.

        `image`, `question`, `answer` (what stands behind the turn that the prompt opens) and
        `system`: the system text and what marks the turns. Of a prompt that is not of the
        template's form `image` and `text`.

        Args:
            inputs: from `prepare`.
        """
        ids: list[int] = inputs["input_ids"][0].tolist()
        everything = set(range(len(ids)))
        image = tuple(at for at, one in enumerate(ids) if one == self.cfg.image_token_id)
        tails = self._tails(bool(image))
        n = _alike(*(tail[::-1] for tail in tails))
        opening = tails[0][len(tails[0]) - n :]
        ends = [at for at in everything if ids[at : at + n] == opening]
        behind = image[-1] + 1 if image else 0
        # Two questions begin with other tokens, so that one of them does not begin as this one.
        begin = behind + min(_alike(tail, ids[behind:]) for tail in tails)
        if not n or not ends or ends[-1] < begin:
            return {"image": image, "text": tuple(sorted(everything - {*image}))}
        question = tuple(range(begin, ends[-1]))
        answer = tuple(range(ends[-1] + n, len(ids)))
        system = tuple(sorted(everything - {*image, *question, *answer}))
        return {"image": image, "system": system, "question": question, "answer": answer}

    def _tails(self, with_image: bool) -> list[list[int]]:
        """The tokens behind the image of two prompts that share nothing but the template."""
        if self.processor is None:
            return [[], []]
        texts = ("Why here?", "No, there!")
        prompts = [self.tokenizer(self._prompt(text, with_image))["input_ids"] for text in texts]
        image = self.cfg.image_token_id
        return [ids[ids.index(image) + 1 :] if with_image else ids for ids in prompts]

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


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many numbers two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
