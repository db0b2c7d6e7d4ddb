"""Builds the planted models: ``python -m hooked_vlm.planted.build planted-blip-reader``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hooked_vlm.config import (
    ALBEFConfig,
    BLIPConfig,
    LlamaConfig,
    LlavaConfig,
    TextConfig,
    VisionConfig,
)
from hooked_vlm.models.albef import HookedALBEF
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.blip import HookedBLIP
from hooked_vlm.models.llava import HookedLlava
from hooked_vlm.planted import catalogue, cross, eye, proof, relay, world
from hooked_vlm.planted.card import Card, check_names
from hooked_vlm.toys.llava_tokenizer import build_llava_processor
from hooked_vlm.toys.tokenizer import build_processor
from hooked_vlm.toys.train_albef import build_albef_processor
from weights_conversion.processors import with_special_tokens

WIDTH, N_HEADS = 48, 4
N_SCENES, SCENES_SEED, STEPS = 3000, 10**6, 600  # the image encoder's training
N_PROOF, PROOF_SEED = 500, 2 * 10**6

SITES = ("*.heads.*.hook_z", "*.hook_mlp_out")
TASK = "'what color is the circle?', of two shapes that stand in a grid of three by three cells"

MODELS: dict[str, tuple[str, str]] = {
    **{f"planted-blip-{circuit}": ("blip", circuit) for circuit in cross.CIRCUITS},
    **{f"planted-albef-{circuit}": ("albef", circuit) for circuit in ("reader", "two-steps")},
    **{f"planted-llava-{circuit}": ("llava", circuit) for circuit in relay.CIRCUITS},
}
"""Each model's architecture and circuit."""


def make(name: str, seed: int = 0) -> tuple[HookedVLM, Card]:
    """Builds a planted model.

    Args:
        name: one of `MODELS`.
        seed: of its weights, and of where its heads are.

    Returns:
        The model, and its card without a proof.
    """
    family, circuit = MODELS[name]
    number = 1000 * seed + list(MODELS).index(name)
    generator = torch.Generator().manual_seed(number)
    model = {"blip": _blip, "albef": _albef, "llava": _llava}[family]()
    vision: Any = model.vision
    seen = eye.basis(vision, generator)
    eye.set_by_hand(vision, seen, generator)
    scenes = world.scenes(N_SCENES, SCENES_SEED + number)
    images = model.processor.image_processor([s.image() for s in scenes], return_tensors="pt")
    eye.train(vision, seen, images["pixel_values"], eye.labels_of(scenes), STEPS, generator)
    circuits: Any = relay if family == "llava" else cross
    made = circuits.build(model, circuit, seen, generator)
    about = circuits.CIRCUITS[circuit].__doc__
    nodes = sorted(made.nodes, key=lambda node: model.order_of(node.name))
    card = Card(
        name=name,
        circuit=about,
        task=TASK,
        sites=SITES,
        nodes=tuple(nodes),
        edges=tuple(made.edges),
        distractors=tuple(made.distractors),
        seed=seed,
    )
    check_names(card, [site.name for site in model.sites(list(card.sites))])
    return model, card


def _blip() -> HookedBLIP:
    processor = build_processor()
    cfg = BLIPConfig(
        task="vqa",
        vision=_vision(1e-5),
        text=_text(processor, n_layers=2, d_source=WIDTH),
        decoder=_text(processor, n_layers=2, d_source=WIDTH, causal=True),
    )
    model = HookedBLIP(with_special_tokens(cfg, processor.tokenizer))
    model.processor = processor
    return model


def _albef() -> HookedALBEF:
    processor = build_albef_processor()
    types = {"n_token_types": 2}
    cfg = ALBEFConfig(
        task="vqa",
        vision=_vision(1e-6),
        text=_text(processor, n_layers=3, d_source=WIDTH, fusion_layer=1, **types),
        decoder=_text(processor, n_layers=1, d_source=WIDTH, causal=True, **types),
    )
    model = HookedALBEF(with_special_tokens(cfg, processor.tokenizer))
    model.processor = processor
    return model


def _llava() -> HookedLlava:
    processor = build_llava_processor()
    processor.patch_size = world.CELL
    tokenizer = processor.tokenizer
    cfg = LlavaConfig(
        vision=_vision(1e-5, "quick_gelu", patch_bias=False, ln_pre=True, n_unread=1),
        text=LlamaConfig(
            d_model=WIDTH,
            n_layers=2,
            n_heads=N_HEADS,
            d_mlp=32,
            activation="silu",
            eps=1e-5,
            d_vocab=-(-len(tokenizer) // 64) * 64,
            n_ctx=128,
            rope_theta=relay.ROPE_THETA,
        ),
        language="llama",
        image_token_id=processor.image_token_id,
        feature_strategy="default",
        projector_activation="gelu",
        tied=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = HookedLlava(cfg)
    model.processor = processor
    return model


def _vision(eps: float, activation: str = "gelu", **more: Any) -> VisionConfig:
    return VisionConfig(
        d_model=WIDTH,
        n_layers=1,
        n_heads=N_HEADS,
        d_mlp=128,
        activation=activation,
        eps=eps,
        image_size=world.GRID * world.CELL,
        patch_size=world.CELL,
        **more,
    )


def _text(processor: Any, **more: Any) -> TextConfig:
    return TextConfig(
        d_model=WIDTH,
        n_heads=N_HEADS,
        d_mlp=16,
        activation="gelu",
        eps=1e-12,
        d_vocab=len(processor.tokenizer),
        n_ctx=32,
        **more,
    )


app = typer.Typer(add_completion=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help="By default all.")] = None,
    out: Annotated[Path | None, typer.Option(help="By default where they are packaged.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and places.", min=0)] = 0,
) -> None:
    """Builds planted models, proves each, and writes its folder with its card."""
    torch.set_num_threads(1)
    for name in names or list(MODELS):
        if name not in MODELS:
            raise typer.BadParameter(f"no {name!r}; known are {', '.join(MODELS)}")
        model, card = make(name, seed)
        card = proof.measure(model, card, N_PROOF, PROOF_SEED)
        proof.check(card)
        folder = (out or catalogue.HERE) / name
        model.save_pretrained(folder)
        card.write(folder)
        typer.echo(f"{name}: {card.proof[0].value:.1%} right, proved by {len(card.proof)}")


if __name__ == "__main__":
    app()
