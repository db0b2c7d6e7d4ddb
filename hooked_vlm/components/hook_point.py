"""Hook points: the names by which activations are read and written.

A `HookPoint` is TransformerLens', with four things added: it costs next to nothing while nobody
listens, each head of an attention activation can have a point of its own, a hook's result must
have the shape, dtype and device of what it got, and a writer works on a copy, so that in-place
edits never reach cached tensors, kept tensors or weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint as LensHookPoint
from transformer_lens.hook_points import LensHandle

_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")


def reads_only(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a hook that never changes its tensor, so that it need not be handed a copy."""
    hook.reads_only = True  # type: ignore[attr-defined]
    return hook


class HookPoint(LensHookPoint):
    """A named activation.

    Args:
        head_axis: the axis that counts heads, None for an activation without heads.
        n_heads: how many heads that axis holds.
        positions: whether an axis counts positions; a map of a ResNet, [batch, channel, row,
            column], has none.
    """

    def __init__(self, head_axis: int | None = None, n_heads: int = 0, positions: bool = True):
        super().__init__()  # type: ignore[no-untyped-call]
        self.head_axis = head_axis
        self.n_heads = n_heads
        self.heads: dict[int, HookPoint] = {}
        # The position axis in the batched layout (TransformerLens' word for it).
        self.pos_dim: int | None = (2 if head_axis == 1 else 1) if positions else None
        self.of_source = False  # whether positions are those of another stack
        self._readers: set[int] = set()  # ids of the hooks that only read

    @property
    def listening(self) -> bool:
        """Whether any hook, of the point or of one of its heads, would see the activation."""
        return bool(self._forward_hooks or self._backward_hooks) or (
            bool(self.heads) and any(head.listening for head in self.heads.values())
        )

    def points(self) -> Iterator[HookPoint]:
        """The point itself and the head points made so far."""
        yield self
        yield from self.heads.values()

    def head(self, index: int) -> HookPoint:
        """The point of one head, made when it is first asked for.

        Raises:
            KeyError: the activation has no such head.
        """
        if self.head_axis is None or not 0 <= index < self.n_heads:
            raise KeyError(f"{self.name!r} has {self.n_heads} heads, no head {index}")
        if index not in self.heads:
            point = HookPoint()
            stem, _, leaf = str(self.name).rpartition(".")
            point.name = f"{stem}.heads.{index}.{leaf}"
            self.heads[index] = point
        return self.heads[index]

    def layer(self) -> int:
        """The block's number, read from a name such as `text.blocks.3.hook_resid_pre`."""
        match = _BLOCK.search(str(self.name))
        if match is None:
            raise ValueError(f"{self.name!r} is not inside a block, it has no layer")
        return int(match.group(1))

    def add_hook(
        self,
        hook: Callable[..., Any],
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: list[str] | None = None,
    ) -> LensHandle:
        """Adds `hook(activation, hook=point)`; see `transformer_lens.hook_points.HookPoint`.

        A result other than None replaces the activation (or the gradient, for `dir="bwd"`).

        Raises:
            ValueError: from the forward pass, when the result has another shape, dtype or device.
        """

        def checked(tensor: Tensor, hook: LensHookPoint) -> Any:
            # A gradient may serve several points; in `forward`, activations are copied once.
            given = tensor.clone() if dir == "bwd" else tensor
            result = user_hook(given, hook=hook)
            if result is None:
                return given if dir == "bwd" and given._version else None
            value = result[0] if dir == "bwd" and isinstance(result, tuple) else result
            _check_result(value, tensor, str(self.name))
            return result

        user_hook = hook
        reader = getattr(hook, "reads_only", False)
        handle = super().add_hook(
            hook if reader else checked, dir, is_permanent, level, prepend, alias_names
        )
        handle.user_hook = user_hook
        if reader:
            self._readers.add(handle.hook.id)
        return handle

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Removes hooks of the point and of its heads; see TransformerLens."""
        if self.fwd_hooks or self.bwd_hooks:
            super().remove_hooks(dir, including_permanent, level)
            self._readers &= {handle.hook.id for handle in self.fwd_hooks + self.bwd_hooks}
        for head in self.heads.values():
            head.remove_hooks(dir, including_permanent, level)

    @property
    def has_writers(self) -> bool:
        """Whether a hook listens that may change the activation."""
        return not self._forward_hooks.keys() <= self._readers

    @property
    def written(self) -> bool:
        """Whether a hook of the point or of one of its heads may change the activation."""
        return self.has_writers or any(head.has_writers for head in self.heads.values())

    @property
    def reads_only(self) -> bool:
        """Whether nobody here may change the activation or asks for its gradient."""
        return not (self.written or self._backward_hooks)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.listening:
            return x
        if self._forward_hooks or self._backward_hooks:
            x = super().__call__(x)
        return self._call_heads(x) if self.heads else x

    def forward(self, x: Tensor) -> Tensor:
        """The activation itself; a copy of it where a hook may write."""
        return x.clone() if self.has_writers else x

    def _call_heads(self, x: Tensor) -> Tensor:
        assert self.head_axis is not None
        before = list(x.unbind(self.head_axis))
        after = [self.heads[i](part) if i in self.heads else part for i, part in enumerate(before)]
        if all(new is old for new, old in zip(after, before, strict=True)):
            return x
        return torch.stack(after, self.head_axis)


def remove_points(module: nn.Module) -> None:
    """Takes every hook point out of a module that will not run."""
    for inner in list(module.modules()):
        for name, child in list(inner.named_children()):
            if isinstance(child, HookPoint):
                delattr(inner, name)


def listening(module: nn.Module) -> bool:
    """Whether anybody listens to a point inside the module."""
    return any(isinstance(m, HookPoint) and m.listening for m in module.modules())


@contextmanager
def telling(module: nn.Module, positions: Tensor) -> Iterator[None]:
    """Tells the hooks inside the module which positions they see, in `hook.ctx["positions"]`."""
    points = [m for m in module.modules() if isinstance(m, HookPoint) and m.listening]
    told = [point for whole in points if not whole.of_source for point in whole.points()]
    before = [point.ctx.get("positions") for point in told]
    for point in told:
        point.ctx["positions"] = positions
    try:
        yield
    finally:
        for point, earlier in zip(told, before, strict=True):
            if earlier is None:
                point.ctx.pop("positions", None)
            else:
                point.ctx["positions"] = earlier


def _check_result(value: Any, given: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the hook at {name!r} returned {type(value).__name__}; return a tensor like the one "
            "it was given, or None to leave it unchanged"
        )
    for what in ("shape", "dtype", "device"):
        new, old = getattr(value, what), getattr(given, what)
        if new != old:
            show = (lambda v: list(v)) if what == "shape" else str
            raise ValueError(
                f"the hook at {name!r} returned {what} {show(new)}, the activation has "
                f"{show(old)}; a hook's result must match what it got"
            )
