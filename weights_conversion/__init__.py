"""Released checkpoints to ours and back: one table of rules per layout."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weights_conversion.files import Checkpoint, InMemory
    from weights_conversion.rules import ConversionError, convert, plan, revert

__all__ = ["Checkpoint", "ConversionError", "InMemory", "convert", "plan", "revert"]


def __getattr__(name: str) -> Any:
    # Imported when first used: `python -m weights_conversion --help` needs no torch.
    if name in __all__:
        where = "files" if name in ("Checkpoint", "InMemory") else "rules"
        return getattr(importlib.import_module(f"weights_conversion.{where}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
