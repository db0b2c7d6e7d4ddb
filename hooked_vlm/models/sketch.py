"""A model without numbers: its own code on shapes, which tells work and memory beforehand."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Flow, Recording, Resuming

Model = TypeVar("Model", bound=HookedVLM)


def on_meta(value: Any) -> Any:
    """The shape of a tensor, anything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) else value


class _Sketched(Flow):
    """A flow whose activations are shapes; rows and places stay numbers."""

    def stack(self, name: str, inputs: Tensor, **kwargs: Any) -> Tensor:
        for key in ("mask", "source_mask"):
            kwargs[key] = on_meta(kwargs.get(key))
        return super().stack(name, on_meta(inputs), **kwargs)

    def _shared(self, batch: int, states: Tensor) -> Tensor:
        return torch.zeros(batch, dtype=torch.long)


class _Recording(_Sketched, Recording):
    pass


class _Resuming(_Sketched, Resuming):
    pass


_sketches: WeakKeyDictionary[HookedVLM, HookedVLM] = WeakKeyDictionary()


def sketch(model: Model) -> Model:
    """A twin of a model that holds no weights; its passes compute shapes only.

    It takes the inputs that the model takes. Standing hooks are not on it.
    """
    if model not in _sketches:
        kind = type(model)
        bare = type(kind.__name__, (_Twin, kind), {"__module__": kind.__module__})
        with torch.device("meta"):
            made = bare(model.cfg)
        _sketches[model] = made.to(model.dtype).eval()
    found: Any = _sketches[model]
    return found  # type: ignore[no-any-return]


class _Twin:
    """What is different in a twin."""

    RECORDING, RESUMING = _Recording, _Resuming
    device = torch.device("cpu")  # of rows and places


@dataclass
class Work:
    """What passes of a sketch took.

    Attributes:
        macs: multiplications with an addition, of matrix products, attention and convolutions.
        peak: most bytes of activations at one time.
    """

    macs: int = 0
    peak: int = 0


@contextmanager
def measured() -> Iterator[Work]:
    """Counts what passes in a `with` block take: of a sketch, or the work of a model's own."""
    work = Work()
    with FlopCounterMode(display=False) as flops, peak(work), _Fused() as fused:
        yield work
    work.macs = flops.get_total_flops() // 2 + fused.macs


@contextmanager
def peak(work: Work) -> Iterator[None]:
    """Tells the most bytes of activations alone, which takes less time."""
    with _Live() as live, _Fused():
        yield
    work.peak = live.peak


class _Fused(TorchFunctionMode):
    """Attention as the fused kernels compute it, which make no patterns and are not counted."""

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        self.macs += q.numel() * k.shape[-2] + q.numel() // q.shape[-1] * v.shape[-2] * v.shape[-1]
        if q.device.type == "meta":
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class _Live(TorchDispatchMode):
    """How many bytes of tensors are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.now = 0
        self._views: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, made: Tensor) -> Tensor:
        if made.device.type == "meta":
            storage = made.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._views:
                self._views[key] = 0
                self.now += size
                self.peak = max(self.peak, self.now)
            self._views[key] += 1
            weakref.finalize(made, self._gone, key, size)
        return made

    def _gone(self, key: int, size: int) -> None:
        self._views[key] -= 1
        if not self._views[key]:
            del self._views[key]
            self.now -= size
