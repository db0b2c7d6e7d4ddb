"""Where noise on an image can reach, whatever the numbers are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hooked_vlm.methods.noise import On
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.engine import Begun, Write

Reached = NDArray[np.bool_]  # of a stack's stream, by position


class Spread:
    """How noise spreads through a model on its way to a metric.

    Each part of a block is followed as what it reads: attention the positions that it may see,
    cross-attention all of its source, an MLP its own position. Where clean values are written for
    the whole stream, or for all that a part adds, noise ends.

    Args:
        model: the model.
        begun: an unpatched run.
        on: what the noise is on.
    """

    def __init__(self, model: HookedVLM, begun: Begun, on: On):
        self.model, self.begun, self.on = model, begun, on
        locator = begun.locator
        self._real: dict[str, Reached] = {}
        for stack, kept in begun.base.stacks.items():
            length = next(iter(kept.doors.values())).shape[1]
            self._real[stack] = np.zeros(length, dtype=bool)
            self._real[stack][list(locator.real(f"{stack}.blocks.0.hook_resid_pre"))] = True

    def reaches(self, writes: Sequence[Write]) -> bool:
        """Whether what the metric reads can differ from the clean run when these are written.

        Where it cannot, the run is the clean one by construction.
        """
        whole = {site.name: at for site, at in writes if site.head is None}
        vision, *others = self.model.stacks
        seen = np.ones_like(self._real[vision])
        if self.on == "pixels":
            seen = self._through(vision, seen, False, whole)
        n = self.begun.locator.count("hook_image_embeds")
        reached = seen[len(seen) - n :]
        if (name := "hook_image_embeds") in whole:
            reached = _ended(reached, whole[name])
        for stack in others:
            source = bool(reached.any())
            reached = self._through(stack, self._standing(stack, source), source, whole)
            reached = reached & self._real[stack]
        return bool(reached[self._read(others[-1])].any())

    def _standing(self, stack: str, image: bool) -> Reached:
        """The positions of a stack where an image's features stand, if noise reaches these."""
        places = np.zeros_like(self._real[stack])
        if self.model.task == "llava" and image:
            ids = self.begun.locator.inputs["input_ids"][0]
            places |= (ids == self.model.cfg.image_token_id).numpy(force=True)
        return places

    def _through(
        self, stack: str, x: Reached, source: bool, whole: Mapping[str, Sequence[int] | None]
    ) -> Reached:
        """The positions of a stack's output that are reached.

        Args:
            stack: the stack.
            x: those of its embeddings.
            source: whether what its cross-attention reads is reached.
            whole: the points where clean values are written, and at which positions.
        """
        if (name := f"{stack}.hook_embed") in whole:
            x = _ended(x, whole[name])
        causal = bool(getattr(self.model.stacks[stack].cfg, "causal", False))
        for layer, block in enumerate(self.model.stacks[stack].block_list):
            at = f"{stack}.blocks.{layer}"
            if (name := f"{at}.hook_resid_pre") in whole:
                x = _ended(x, whole[name])
            for one in block.SUMS:
                if not hasattr(block, one.part):  # a block without cross-attention
                    continue
                added = x
                if one.part == "cross_attn":
                    added = np.full_like(x, source)
                elif one.part == "attn":
                    keys = x & self._real[stack]
                    added = (
                        np.logical_or.accumulate(keys) if causal else np.full_like(x, keys.any())
                    )
                if (name := f"{at}.{one.out}") in whole:
                    added = _ended(added, whole[name])
                x = x | added
                for name in (f"{at}.{one.total}", f"{at}.{one.stream}"):
                    if name in whole:
                        x = _ended(x, whole[name])
        return x

    def _read(self, stack: str) -> Any:
        """The positions of the last stack of which the metric's logits are made."""
        if self.begun.base.logits.dim() == 2:
            return [0]
        metric = self.begun.metric
        return slice(None if metric.whole else -max(1, len(metric.continuation)), None)


def _ended(x: Reached, at: Sequence[int] | None) -> Reached:
    """What is still reached behind a point where clean values are written at some positions."""
    x = x.copy()
    x[slice(None) if at is None else list(at)] = False
    return x
