"""Pictures of results and of attention; they know no model."""

from hooked_vlm.plots.figures import attention_map, bars, growth, heatmap, intervals

__all__ = ["attention_map", "bars", "growth", "heatmap", "intervals"]
