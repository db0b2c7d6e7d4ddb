"""Which family a checkpoint is of, told from the names of its tensors or its `config.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from hooked_vlm.config import ALBEFConfig, BLIPConfig, TextConfig, VisionConfig
from weights_conversion.rules import ConversionError

Family = Literal["blip", "albef", "clip", "llava"]
Task = TypeVar("Task", bound=str)
Config = TypeVar("Config", BLIPConfig, ALBEFConfig)
CLASSES: dict[Family, str] = {
    "blip": "HookedBLIP",
    "albef": "HookedALBEF",
    "clip": "HookedCLIP",
    "llava": "HookedLlava",
}
# The model_type of a config.json: transformers', and ours where it has no class.
TYPES: dict[str, Family] = {
    "blip": "blip",
    "hooked_blip": "blip",
    "hooked_albef": "albef",
    "clip": "clip",
    "hooked_clip": "clip",
    "llava": "llava",
    "llava_next": "llava",
    "llava_llama": "llava",
    "llava_mistral": "llava",
}
PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")


def family(names: Iterable[str], hf_config: Mapping[str, Any] | None) -> Family | None:
    """The family, None if it is none of the zoo's.

    Args:
        names: of the tensors.
        hf_config: the `config.json`, None for a bare file.
    """
    kind = "" if hf_config is None else str(hf_config.get("model_type"))
    names = set(names)
    if hf_config is not None:
        return TYPES.get(kind)
    if any(name.startswith(PROJECTOR) or ".mm_projector." in name for name in names):
        return "llava"
    if any(name.startswith(("visual.", "text_model.encoder.")) for name in names):
        return "clip"
    layer = "encoder.layer.0"
    for bert in ("text_encoder", "text_encoder.bert"):
        # Of the two, only ALBEF's text encoder has a first layer without cross-attention.
        if f"{bert}.{layer}.attention.self.query.weight" in names:
            cross = f"{bert}.{layer}.crossattention."
            return "blip" if any(name.startswith(cross) for name in names) else "albef"
    return "blip" if any(name.startswith("text_decoder.") for name in names) else None


def expect(
    wanted: Family,
    names: Iterable[str],
    hf_config: Mapping[str, Any] | None,
    overrides: Mapping[str, Any],
) -> None:
    """Refuses a checkpoint of another family, and overrides where there is a `config.json`.

    Raises:
        ConversionError: it names the class that opens it.
    """
    if hf_config is not None and overrides:
        raise ConversionError("config= is for bare files; this checkpoint has a config.json")
    found = family(names, hf_config)
    if found in (wanted, None) and (hf_config is None or found is not None):
        return
    if found is None:
        kind = None if hf_config is None else hf_config.get("model_type")
        reads = ", ".join(repr(name) for name, one in TYPES.items() if one == wanted)
        raise ConversionError(
            f"config.json is of model_type {kind!r}; {CLASSES[wanted]} reads {reads}"
        )
    raise ConversionError(
        f"this checkpoint is of the family of {CLASSES[found]}, which opens it; "
        f"{CLASSES[wanted]} does not"
    )


def ask(task: str | None, found: list[Task]) -> Task:
    """The task among those that a checkpoint allows.

    Raises:
        ConversionError: it allows several and none was asked for, or not the one that was.
    """
    if task is not None and task not in found:
        raise ConversionError(f"task={task!r}, but the tensors are those of {', '.join(found)}")
    if task is None and len(found) > 1:
        raise ConversionError(
            f"the tensors serve several tasks; pass task= one of {', '.join(found)}"
        )
    return next(name for name in found if task in (None, name))


def from_dict(config: Mapping[str, Any], kind: type[Config]) -> Config:
    """The configuration of a BLIP or an ALBEF from a `config.json` of our own layout.

    Raises:
        ConversionError: fields that are missing or that it does not have.
    """
    fields = {name: value for name, value in config.items() if name != "model_type"}
    try:
        for name, stack in (
            ("vision", VisionConfig),
            ("text", TextConfig),
            ("decoder", TextConfig),
        ):
            if fields[name] is not None:
                fields[name] = stack(**fields[name])
        return kind(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ConversionError(f"config.json is none of ours: {error}") from error
