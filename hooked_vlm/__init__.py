"""Hooked vision-language models: every activation has a name, to be cached, patched, ablated."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hooked_vlm import data, patching
    from hooked_vlm.models.albef import HookedALBEF
    from hooked_vlm.models.base import HookedVLM
    from hooked_vlm.models.blip import HookedBLIP
    from hooked_vlm.models.clip import HookedCLIP
    from hooked_vlm.models.dataset import ActivationDataset
    from hooked_vlm.models.llava import HookedLlava

__version__ = "0.1.0"
__all__ = [
    "ActivationDataset",
    "HookedALBEF",
    "HookedBLIP",
    "HookedCLIP",
    "HookedLlava",
    "HookedVLM",
    "data",
    "patching",
]

_WHERE = {
    "ActivationDataset": "hooked_vlm.models.dataset",
    "HookedALBEF": "hooked_vlm.models.albef",
    "HookedBLIP": "hooked_vlm.models.blip",
    "HookedCLIP": "hooked_vlm.models.clip",
    "HookedLlava": "hooked_vlm.models.llava",
    "HookedVLM": "hooked_vlm.models.base",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `hooked-vlm --help` needs neither torch nor transformers.
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in __all__:
        return importlib.import_module(f"hooked_vlm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
