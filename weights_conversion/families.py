"""Which family a checkpoint is of, told from the names of its tensors or its `config.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from weights_conversion.rules import ConversionError

Family = Literal["blip", "albef", "clip"]
Task = TypeVar("Task", bound=str)
CLASSES: dict[Family, str] = {"blip": "HookedBLIP", "albef": "HookedALBEF", "clip": "HookedCLIP"}
# The model_type of a config.json: transformers', and ours where it has no class.
TYPES: dict[str, Family] = {
    "blip": "blip",
    "hooked_blip": "blip",
    "hooked_albef": "albef",
    "clip": "clip",
    "hooked_clip": "clip",
}


def family(names: Iterable[str], hf_config: Mapping[str, Any] | None) -> Family | None:
    """The family, None if it is none of the zoo's.

    Args:
        names: of the tensors.
        hf_config: the `config.json`, None for a bare file.
    """
    if hf_config is not None:
        return TYPES.get(str(hf_config.get("model_type")))
    names = set(names)
    if any(name.startswith(("visual.", "text_model.encoder.")) for name in names):
        return "clip"
    layer = "encoder.layer.0"
    for bert in ("text_encoder", "text_encoder.bert"):
        # Of the two, only ALBEF's text encoder has a first layer without cross-attention.
        if f"{bert}.{layer}.attention.self.query.weight" in names:
            fused = f"{bert}.{layer}.crossattention.self.query.weight" in names
            return "blip" if fused else "albef"
    return "blip" if any(name.startswith("text_decoder.") for name in names) else None


def expect(wanted: Family, names: Iterable[str], hf_config: Mapping[str, Any] | None) -> None:
    """Refuses a checkpoint of another family.

    Raises:
        ConversionError: it names the class that opens it.
    """
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
