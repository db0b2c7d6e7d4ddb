"""Released checkpoints to ours and back: one table of rules per layout."""

from weights_conversion.files import Checkpoint, InMemory
from weights_conversion.rules import ConversionError, convert, plan, revert

__all__ = ["Checkpoint", "ConversionError", "InMemory", "convert", "plan", "revert"]
