"""Trains the toy ALBEF: ``python -m hooked_vlm.toys.train toy-albef``.

transformers has no ALBEF, so `HookedALBEF` itself is trained, with the losses of the retrieval toy
(`hooked_vlm.toys.matching`). The temperature of the contrast stays what the paper's starts from.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertTokenizer, BlipProcessor

from hooked_vlm.components.attention import Source
from hooked_vlm.components.blocks import Context
from hooked_vlm.config import ALBEFConfig, TextConfig, VisionConfig
from hooked_vlm.models.albef import HookedALBEF
from hooked_vlm.toys import tokenizer
from hooked_vlm.toys.examples import Examples
from hooked_vlm.toys.fitting import WIDTH, TrainingHeads, fit
from hooked_vlm.toys.matching import TEMPERATURE, matching_losses
from weights_conversion.processors import with_special_tokens, without_final_sep

N_SCENES = 20_000


def train_albef(seed: int, steps: int) -> HookedALBEF:
    """Trains the toy from random numbers."""
    processor = build_albef_processor()
    examples = Examples(N_SCENES, seed, processor)
    model = HookedALBEF(config(processor))
    model.processor = processor
    _initialize(model)
    heads = TrainingHeads(model.text.embed)
    fusion_layer = model.cfg.text.fusion_layer

    def see(pixel_values: Tensor) -> Tensor:
        return model.vision.run(model.vision.embeddings(pixel_values), Context())

    def fuse(ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        context = Context(model.text.visible(ids, mask), (Source(image),))
        return model.text.run(model.text.embeddings(ids), context)

    def read(ids: Tensor, mask: Tensor) -> Tensor:
        context = Context(model.text.visible(ids, mask))
        return model.text.run(model.text.embeddings(ids), context, stop=fusion_layer)

    learned = [parameter for parameter in model.parameters() if parameter is not model.temp]
    model.train().requires_grad_()
    fit(
        [*learned, *heads.parameters()],
        lambda: matching_losses(model, heads, examples, see, fuse, read),
        steps,
    )
    return model.requires_grad_(False)


def build_albef_processor() -> BlipProcessor:
    """The toy's processor: no token is added for decoding, and no text ends with `[SEP]`."""
    bert = BertTokenizer(
        vocab={piece: i for i, piece in enumerate(tokenizer.vocabulary())},
        model_max_length=tokenizer.MAX_POSITIONS,
    )
    images = tokenizer.build_processor().image_processor
    return BlipProcessor(images, without_final_sep(bert))


def config(processor: BlipProcessor) -> ALBEFConfig:
    """The sizes of the toy ALBEF, with the special tokens of its vocabulary."""
    cfg = ALBEFConfig(
        task="itm",
        vision=VisionConfig(
            d_model=WIDTH,
            n_layers=2,
            n_heads=4,
            d_mlp=4 * WIDTH,
            activation="gelu",
            eps=1e-6,
            image_size=tokenizer.IMAGE_SIZE,
            patch_size=tokenizer.PATCH,
        ),
        text=TextConfig(
            d_model=WIDTH,
            n_layers=4,
            n_heads=4,
            d_mlp=4 * WIDTH,
            activation="gelu",
            eps=1e-12,
            d_vocab=len(processor.tokenizer),
            n_ctx=tokenizer.MAX_POSITIONS,
            d_source=WIDTH,
            fusion_layer=2,
            n_token_types=2,
        ),
        d_proj=WIDTH // 2,
        temperature=True,
    )
    return with_special_tokens(cfg, processor.tokenizer)


def _initialize(model: HookedALBEF) -> None:
    """Random matrices and tables; norms begin as they are made, with gains of 1 and biases of 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    nn.init.constant_(model.temp, TEMPERATURE)
