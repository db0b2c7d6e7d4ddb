"""CLIP: images and texts in one space, with a vision transformer or a ResNet.

Source: Radford et al., CLIP (arXiv 2103.00020), sec. 2.3 to 2.5 and fig. 3.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooked_vlm.components.hook_point import HookPoint
from hooked_vlm.components.resnet import ResNetStack
from hooked_vlm.components.stack import PreNormTextStack, VisionStack
from hooked_vlm.config import CLIPConfig, ResNetConfig
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Flow
from weights_conversion import clip as layout

HIGHEST_ID = 2  # an end-of-text id in old configurations that stands for 'the highest id'


class HookedCLIP(HookedVLM):
    """CLIP with every activation named; see `docs/names.md` for the names.

    Every image is compared with every text, so their numbers may differ, and a row of the logits
    is an image that reads all texts.

    Args:
        cfg: sizes. Weights are noise until they are loaded; `from_pretrained` does both.
    """

    LAYOUT = layout
    BY_POSITION = False
    ROWS = "pixel_values"
    GLUE: ClassVar[dict[str, str]] = {"hook_image_embeds": "vision", "hook_text_embeds": "text"}

    def __init__(self, cfg: CLIPConfig):
        super().__init__(cfg)
        self.vision: ResNetStack | VisionStack
        if isinstance(cfg.vision, ResNetConfig):
            self.vision = ResNetStack(cfg.vision, cfg.d_proj)
        else:
            self.vision = VisionStack(cfg.vision)
            self.vision_proj = nn.Linear(cfg.vision.d_model, cfg.d_proj, bias=False)
        self.hook_image_embeds = HookPoint()  # [image, d_proj]
        self.text = PreNormTextStack(cfg.text)
        self.text_proj = nn.Linear(cfg.text.d_model, cfg.d_proj, bias=False)
        self.hook_text_embeds = HookPoint()  # [text, d_proj]
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.hook_logits = HookPoint()  # [image, text]
        self.requires_grad_(False)
        self.setup()

    def forward(
        self,
        pixel_values: Float[Tensor, "image 3 height width"],
        input_ids: Int[Tensor, "text pos"] | None = None,
        attention_mask: Int[Tensor, "text pos"] | None = None,
        return_type: Literal["logits", "loss"] | None = "logits",
    ) -> Tensor | None:
        """Compares every image with every text.

        Args:
            pixel_values: images, from `prepare`.
            input_ids: texts.
            attention_mask: 1 for a token, 0 for padding; all ones by default.
            return_type: `logits`; `loss` for the contrastive loss of as many images as texts that
                pair up; None for nothing.

        Returns:
            Cosines times `logit_scale.exp()`, [image, text]: transformers' `logits_per_image`.

        Raises:
            ValueError: inputs that do not fit the model or one another.
        """
        logits = self._run(
            pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask
        )
        if return_type == "logits":
            return logits
        if return_type is None:
            return None
        if return_type != "loss":
            raise ValueError(f"return_type is 'logits', 'loss' or None, not {return_type!r}")
        images, texts = logits.shape
        if images != texts:
            raise ValueError(f"the loss needs pairs; here are {images} images and {texts} texts")
        own = torch.arange(images, device=logits.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2

    def _flow(
        self,
        flow: Flow,
        *,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if input_ids is None:
            raise ValueError("input_ids is missing: model.prepare(images, text) makes it of texts")
        self._see(flow, pixel_values)
        self._read(flow, input_ids, attention_mask)
        images = flow.read("vision", len(pixel_values))
        texts = flow.read("text", len(images), group=len(input_ids))
        return self.hook_logits((images @ texts.mT).squeeze(1) * self.logit_scale.exp())

    def _see(self, flow: Flow, pixel_values: Tensor) -> Tensor:
        def project(x: Tensor) -> Tensor:
            if not isinstance(self.vision, ResNetStack):  # whose pool projects
                x = self.vision_proj(x[:, 0])
            return self.hook_image_embeds(F.normalize(x, dim=-1))

        return flow.stack("vision", pixel_values, after=project, readout=slice(0, 1))

    def _read(self, flow: Flow, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        self._check_text("input_ids", input_ids, attention_mask)
        return flow.stack(
            "text",
            input_ids,
            mask=self.text.visible(input_ids, attention_mask),
            at=self._ends(input_ids),
            after=lambda x: self.hook_text_embeds(F.normalize(self.text_proj(x), dim=-1)),
        )

    def _ends(self, input_ids: Tensor) -> Tensor:
        """The position at which each text is read, as in transformers' CLIPTextModel."""
        if self.cfg.eos_token_id == HIGHEST_ID:
            return input_ids.argmax(-1)
        found: Tensor = input_ids == self.cfg.eos_token_id
        if not found.any(-1).all():
            row = int((~found.any(-1)).nonzero()[0])
            raise ValueError(
                f"text {row} of input_ids has no end-of-text token ({self.cfg.eos_token_id}), "
                "where CLIP reads it; model.prepare and model.to_tokens put it there"
            )
        return found.int().argmax(-1)

    def get_image_features(
        self, pixel_values: Float[Tensor, "image 3 height width"]
    ) -> Float[Tensor, "image d_proj"]:
        """Unit vectors of images; transformers' method of that name does not normalize."""
        return self._see(Flow(self.stacks, self._grad_wanted), pixel_values)

    def get_text_features(
        self,
        input_ids: Int[Tensor, "text pos"],
        attention_mask: Int[Tensor, "text pos"] | None = None,
    ) -> Float[Tensor, "text d_proj"]:
        """Unit vectors of texts; transformers' method of that name does not normalize."""
        return self._read(Flow(self.stacks, self._grad_wanted), input_ids, attention_mask)

    def similarity(
        self,
        pixel_values: Float[Tensor, "image 3 height width"],
        input_ids: Int[Tensor, "text pos"],
        attention_mask: Int[Tensor, "text pos"] | None = None,
    ) -> Float[Tensor, "image text"]:
        """Cosine of every image with every text, without the scale of the logits."""
        images = self.get_image_features(pixel_values)
        return images @ self.get_text_features(input_ids, attention_mask).mT

    def _match(self, texts: list[str], n_images: int) -> list[str]:
        """The texts as they are: each of them is compared with every image."""
        return texts

    def _encode(self, texts: list[str], first_token: str) -> dict[str, Tensor]:
        if first_token != "cls":
            raise ValueError(f"first_token={first_token!r} is BLIP's; a CLIP has one first token")
        return super()._encode(texts, first_token)
