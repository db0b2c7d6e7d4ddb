"""The shapes of the parts that models are built of, by our names."""

from __future__ import annotations

from hooked_vlm.config import StackConfig, TextConfig, TokenConfig, VisionConfig
from weights_conversion.rules import Shape


def vision(cfg: VisionConfig) -> dict[str, Shape]:
    """A vision transformer, `vision`."""
    found: dict[str, Shape] = {
        "vision.embed.class_token": (1, 1, cfg.d_model),
        "vision.embed.patch.weight": (cfg.d_model, 3, cfg.patch_size, cfg.patch_size),
        "vision.pos_embed": (1, cfg.n_ctx, cfg.d_model),
        **norm("vision.ln_final", cfg.d_model),
    }
    if cfg.patch_bias:
        found["vision.embed.patch.bias"] = (cfg.d_model,)
    if cfg.ln_pre:
        found |= norm("vision.ln_pre", cfg.d_model)
    for layer in range(cfg.n_layers):
        found |= block(f"vision.blocks.{layer}", cfg)
    return found


def tokens(name: str, cfg: TokenConfig) -> dict[str, Shape]:
    """Token and position embeddings and the blocks without cross-attention."""
    found: dict[str, Shape] = {
        f"{name}.embed.weight": (cfg.d_vocab, cfg.d_model),
        f"{name}.pos_embed": (cfg.n_ctx, cfg.d_model),
    }
    for layer in range(cfg.n_layers):
        found |= block(f"{name}.blocks.{layer}", cfg)
    return found


def text(name: str, cfg: TextConfig) -> dict[str, Shape]:
    """A BERT stack; where several images are read, the first of a round has keys and values."""
    found = tokens(name, cfg) | norm(f"{name}.ln_embed", cfg.d_model)
    if cfg.n_token_types:
        found[f"{name}.token_type_embed"] = (cfg.n_token_types, cfg.d_model)
    for layer in range(cfg.fusion_layer, cfg.n_layers):
        part = f"{name}.blocks.{layer}.cross_attn"
        found |= attention(part, cfg.d_model, cfg.d_source)
        found |= norm(f"{name}.blocks.{layer}.ln_cross", cfg.d_model)
        if (layer - cfg.fusion_layer) % cfg.n_images:
            for shared in (*linear(f"{part}.k", 0, 0), *linear(f"{part}.v", 0, 0)):
                del found[shared]
    return found


def unembed(cfg: TokenConfig) -> dict[str, Shape]:
    """BERT's prediction head, whose matrix is the token embeddings."""
    return {
        **linear("unembed.dense", cfg.d_model, cfg.d_model),
        **norm("unembed.ln", cfg.d_model),
        "unembed.out.bias": (cfg.d_vocab,),
    }


def block(name: str, cfg: StackConfig) -> dict[str, Shape]:
    """Self-attention, MLP and two norms."""
    return (
        attention(f"{name}.attn", cfg.d_model, cfg.d_model)
        | norm(f"{name}.ln1", cfg.d_model)
        | norm(f"{name}.ln2", cfg.d_model)
        | linear(f"{name}.mlp.fc_in", cfg.d_model, cfg.d_mlp)
        | linear(f"{name}.mlp.fc_out", cfg.d_mlp, cfg.d_model)
    )


def attention(name: str, d_model: int, d_source: int, d_out: int | None = None) -> dict[str, Shape]:
    """Queries, keys, values, output."""
    return (
        linear(f"{name}.q", d_model, d_model)
        | linear(f"{name}.k", d_source, d_model)
        | linear(f"{name}.v", d_source, d_model)
        | linear(f"{name}.o", d_model, d_out or d_model)
    )


def linear(name: str, d_in: int, d_out: int) -> dict[str, Shape]:
    """A matrix and a bias."""
    return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}


def norm(name: str, d_model: int) -> dict[str, Shape]:
    """A gain and a bias."""
    return {f"{name}.weight": (d_model,), f"{name}.bias": (d_model,)}
