"""Training scenes as tensors: drawn and tokenized once, so that steps only index."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipProcessor, CLIPProcessor, LlavaProcessor

from hooked_vlm.data import shapes
from hooked_vlm.toys import evaluate
from hooked_vlm.toys.false_captions import other_axis, swapped_colors
from hooked_vlm.toys.tokenizer import PATCH

TEXTS = ("true", *shapes.ATTRIBUTES, "swapped colors", "other axis", "other scene")
"""The captions of a scene in ``Examples.texts``: the true one, then the false ones."""

QUESTIONS_PER_SCENE = 10


@dataclass(frozen=True)
class Questions:
    """Questions about training scenes, ``[question]``-indexed."""

    scene: Tensor  # [question], index of the scene
    ids: Tensor  # [question, pos], padded
    answers: Tensor  # [question, 3]: [DEC], the answer, [SEP]
    lengths: Tensor  # [question], positions without padding


class Examples:
    """Training scenes, their pixels, captions and questions.

    Attributes:
        pixels: uint8, ``[scene, 3, 48, 48]``.
        texts: Token ids ``[scene, order, len(TEXTS), pos]``; the order says whose shape is named
            first. False captions name no held-out pair of shapes, so that nothing about these is
            learned.
        owners: Which shape of the scene each patch shows: 0 the first, 1 the second, 2 neither;
            ``[scene, patch]``.
        looks: Colour and kind of the shapes, as indices; ``[scene, 2, 2]``.
        centers: Centres of the first- and second-named shape, in canvas widths,
            ``[scene, order, 2, 2]``.
    """

    def __init__(
        self, n: int, seed: int, processor: BlipProcessor | CLIPProcessor | LlavaProcessor
    ):
        self.processor = processor
        self.rng = np.random.default_rng([seed, 1])
        self.scenes = shapes.scenes(n, seed)
        drawn = np.stack([np.asarray(scene.image()) for scene in self.scenes])
        self.pixels = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
        images = processor.image_processor
        self._mean = torch.tensor(images.image_mean).view(3, 1, 1) * 255
        self._std = torch.tensor(images.image_std).view(3, 1, 1) * 255
        covered = torch.from_numpy(np.stack([scene.masks() for scene in self.scenes]))
        share = F.avg_pool2d(covered.float(), PATCH).flatten(2)
        self.owners = torch.where(share.amax(1) > 0.1, share.argmax(1), 2)
        self.looks = torch.tensor(
            [
                [
                    (list(shapes.COLORS).index(s.color), shapes.KINDS.index(s.kind))
                    for s in scene.shapes
                ]
                for scene in self.scenes
            ]
        )
        self.centers = torch.tensor(
            [
                [[shape.center for shape in order.shapes] for order in (scene, scene.reversed())]
                for scene in self.scenes
            ]
        ).div(shapes.CANVAS)

    def pixel_values(self, index: Tensor) -> Tensor:
        """What the image processor makes of the pictures: ``[batch, 3, 48, 48]``."""
        return (self.pixels[index] - self._mean) / self._std

    @cached_property
    def texts(self) -> Tensor:
        """See the class."""
        captions = [
            caption
            for scene in self.scenes
            for order in (scene, scene.reversed())
            for caption in self._captions(order)
        ]
        return self._ids(captions).view(len(self.scenes), 2, len(TEXTS), -1)

    @cached_property
    def questions(self) -> Questions:
        """Questions of each kind about every scene, half of them about the relation."""
        kinds = (
            ["color, open", "color, two options", "shape, open", "shape, two options"]
            + ["color, two options"]
            + ["shape, two options"]
            + 2 * ["relation, open", "relation, two options"]
        )
        assert len(kinds) == QUESTIONS_PER_SCENE
        asked = []
        for scene in self.scenes:
            questions = evaluate.questions_by_kind(scene)
            asked += [questions[kind][self._below(len(questions[kind]))] for kind in kinds]
        ids = self._ids([question.text for question in asked])
        answers = self._ids([question.answer for question in asked])
        answers[:, 0] = self.processor.tokenizer.bos_token_id
        of = torch.arange(len(self.scenes)).repeat_interleave(QUESTIONS_PER_SCENE)
        return Questions(of, ids, answers, self.mask(ids).sum(-1))

    def mask(self, ids: Tensor) -> Tensor:
        """The attention mask of token ids."""
        pad: int = self.processor.tokenizer.pad_token_id
        return (ids != pad).long()

    def positions(self, ids: Tensor, words: tuple[str, ...]) -> Tensor:
        """Where any of the words stands: boolean, the shape of ``ids``."""
        wanted = torch.tensor(self.processor.tokenizer.convert_tokens_to_ids(list(words)))
        return torch.isin(ids, wanted)

    def _captions(self, scene: shapes.Scene) -> list[str]:
        train = {
            attribute: [v.caption() for v in scene.variants(attribute) if v.split == "train"]
            for attribute in shapes.ATTRIBUTES
        }
        hard = [train[a][self._below(len(train[a]))] for a in shapes.ATTRIBUTES]
        first, second = scene.shapes
        recolored = {f"{second.color} {first.kind}", f"{first.color} {second.kind}"}
        swapped = (
            swapped_colors(scene) if shapes.split_of(*recolored) == "train" else train["color"][0]
        )
        axis = other_axis(scene)[self._below(2)]
        stranger = self.scenes[self._below(len(self.scenes))]
        other = train["shape"][0] if stranger.caption() in scene.captions() else stranger.caption()
        return [scene.caption(), *hard, swapped, axis, other]

    def _ids(self, texts: list[str]) -> Tensor:
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        encoded = self.processor.tokenizer(list(distinct), padding=True, return_tensors="pt")
        ids: Tensor = encoded.input_ids
        return ids[torch.tensor([distinct[text] for text in texts])]

    def _below(self, n: int) -> int:
        return int(self.rng.integers(n))
