"""What the original BLIP and ALBEF files share: names, leftovers of training, sizes from shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from weights_conversion import blip_hf
from weights_conversion.rules import ConversionError, Rule, Shape, ignore, positions

_VISION_NAMES = [
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm", ".norm"),
]

LEFT_FROM_TRAINING = [
    *(
        ignore(f"{part}_m.*", because="a momentum copy, used in training only")
        for part in ("*_encoder", "text_decoder", "vision_proj", "text_proj", "cls_head")
    ),
    ignore("*_queue", because="a queue of training examples"),
    *(
        ignore(name, because="where the queue of training examples stands")
        for name in ("queue_ptr", "queue_ptr_img", "queue_ptr_txt")
    ),
]
NO_TEMPERATURE = ignore("temp", because="the temperature of the contrastive loss")


def _renamed(rule: Rule) -> Rule:
    if rule.targets == ("vision.pos_embed",):
        return positions("visual_encoder.pos_embed", *rule.targets)
    source = rule.source
    for theirs, original in _VISION_NAMES:
        source = source.replace(theirs, original)
    return replace(rule, source=source)


VISION = [_renamed(rule) for rule in blip_hf.VISION]


def vision_fields(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Fields of a `VisionConfig` that the shapes tell."""
    width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
    _, n_positions, _ = shapes["visual_encoder.pos_embed"]
    return {
        "d_model": width,
        "n_layers": len(_layers(shapes, "visual_encoder.blocks.")),
        "d_mlp": shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0],
        "activation": "gelu",
        "eps": 1e-6,
        "image_size": round((n_positions - 1) ** 0.5) * patch,
        "patch_size": patch,
    }


def bert_fields(shapes: Mapping[str, Shape], name: str) -> dict[str, Any]:
    """Fields of a `TextConfig` that the shapes of the stack `name` tell."""
    d_vocab, d_model = shapes[f"{name}.embeddings.word_embeddings.weight"]
    layer = f"{name}.encoder.layer."
    fused = _layers(shapes, layer, ".crossattention.self.key.weight")
    first = min(fused, default=0)
    types = shapes.get(f"{name}.embeddings.token_type_embeddings.weight", (0,))
    return {
        "d_model": d_model,
        "n_layers": len(_layers(shapes, layer)),
        "d_mlp": shapes[f"{layer}0.intermediate.dense.weight"][0],
        "activation": "gelu",
        "eps": 1e-12,
        "d_vocab": d_vocab,
        "n_ctx": shapes[f"{name}.embeddings.position_embeddings.weight"][0],
        "d_source": shapes[f"{layer}{first}.crossattention.self.key.weight"][1],
        "fusion_layer": first,
        "n_token_types": types[0],
    }


def _layers(shapes: Collection[str], prefix: str, suffix: str = "") -> set[int]:
    return {
        int(name[len(prefix) :].partition(".")[0])
        for name in shapes
        if name.startswith(prefix) and name.endswith(suffix)
    }


def with_heads(stack: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with a number of heads: 64 wide, as in every released file, if none was given.

    Raises:
        ConversionError: a width that is no multiple of 64.
    """
    if "n_heads" not in fields and fields["d_model"] % 64:
        raise ConversionError(
            f"{stack} is {fields['d_model']} wide, so its heads cannot be 64 wide as in released "
            f'files; pass config={{"{stack}": {{"n_heads": …}}}}'
        )
    return {"n_heads": fields["d_model"] // 64, **fields}


def check_stacks(overrides: Mapping[str, Any], task: str, stacks: tuple[str, ...]) -> None:
    """Refuses overrides of stacks that a task does not have."""
    if unknown := set(overrides) - {"vision", *stacks}:
        raise ConversionError(
            f"config= names {sorted(unknown)}; the stacks of task {task!r} are vision and "
            f"{' and '.join(stacks)}"
        )


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Says in words why shapes and overrides make no configuration of `what`."""
    try:
        yield
    except ConversionError:
        raise
    except KeyError as error:
        raise ConversionError(f"missing: {error} is in every {what}") from error
    except (TypeError, ValueError) as error:
        raise ConversionError(
            f"no configuration comes of the shapes and config=: {error}"
        ) from error
