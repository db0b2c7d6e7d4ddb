"""Hooks and caches by name, over every stack of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookFunction
from transformer_lens.utilities import Slice, SliceInput

from hooked_vlm.components.hook_point import HookPoint, reads_only
from hooked_vlm.models.cache import ActivationCache
from hooked_vlm.models.names import HookDict, Names, Site

Hooks = Iterable[tuple[Names, Callable[..., Any]]]


class _Stop(Exception):
    """Raised at the point where a forward pass shall end."""


class HookedModel(HookedRootModule):
    """`transformer_lens.HookedRootModule` whose names may be heads and globs."""

    hook_dict: HookDict  # type: ignore[assignment]  # dict is invariant

    def setup(self) -> None:
        """Names every module and collects the hook points; see TransformerLens."""
        super().setup()  # type: ignore[no-untyped-call]
        self.hook_dict = HookDict(self.hook_dict)

    def hook_points(self) -> Iterator[HookPoint]:
        """All ordinary points and the head points made so far."""
        for point in self.hook_dict.values():
            yield point
            yield from point.heads.values()

    def hook_names(self, heads: bool = False) -> list[str]:
        """The names of all ordinary hook points; with `heads`, those of every head too."""
        return list(self.hook_dict.names(heads))

    def sites(self, names: Names, positions: Iterable[Hashable] | None = None) -> list[Site]:
        """The sites that a name, a glob or a list of them means, in order.

        Args:
            names: as in `run_with_cache`.
            positions: one site per position; None for sites that span all of them.

        Raises:
            KeyError: nothing matches.
        """
        at: list[Hashable] = [None] if positions is None else list(positions)
        return [Site.parse(name, p) for name in self.hook_dict.match(names) for p in at]

    def list_hooks(
        self,
        name_filter: Names = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Any]]:
        """Attached hooks by point, heads included; see TransformerLens."""
        wanted = None if name_filter is None else set(self.hook_dict.match(name_filter))
        found = {}
        for point in self.hook_points():
            handles = point.fwd_hooks * (dir != "bwd") + point.bwd_hooks * (dir != "fwd")
            handles = [h for h in handles if including_permanent or not h.is_permanent]
            if handles and (wanted is None or point.name in wanted):
                found[str(point.name)] = handles
        return found

    def add_hook(
        self,
        name: Names,
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Adds `hook(activation, hook=point)` to the points that a name or glob means.

        Args:
            name: a hook name, a glob, several of these, or a predicate on names.
            hook: returns a replacement of the same shape, dtype and device, or None.
            dir: `fwd` for activations, `bwd` for gradients.
            is_permanent: whether `reset_hooks` leaves it.
            level: the context level it belongs to.
            prepend: whether it runs before the hooks that are there.

        Raises:
            KeyError: nothing matches the name.
        """
        for found in self.hook_dict.match(name):
            point = self.hook_dict[found]
            self.check_and_add_hook(point, found, hook, dir, is_permanent, level, prepend)

    def _enable_hook(
        self, name: Names, hook: Callable[..., Any], dir: Literal["fwd", "bwd"]
    ) -> None:
        self.add_hook(name, hook, dir, level=self.context_level)

    def get_caching_hooks(
        self,
        names_filter: Names = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
        """Hooks that fill a dictionary; see TransformerLens. Names as in `run_with_cache`."""
        entries: dict[str, Tensor] = {} if cache is None else cache
        cut = Slice.unwrap(pos_slice)

        def save(tensor: Tensor, hook: HookPoint, suffix: str = "") -> None:
            value = tensor.detach().to(device)
            if value.dim() > 2 and hook.pos_dim is not None:
                value = cut.apply(value, dim=hook.pos_dim)
            if remove_batch_dim:
                if len(value) != 1:
                    raise ValueError(
                        f"remove_batch_dim needs a batch of one, not {len(value)}: {hook.name!r}"
                    )
                value = value[0]
            if hook.has_writers and value.data_ptr() == tensor.data_ptr():
                value = value.clone()  # a writer at the same point edits this memory
            entries[f"{hook.name}{suffix}"] = value

        @reads_only
        def forward(tensor: Tensor, hook: HookPoint) -> None:
            save(tensor, hook)

        @reads_only
        def backward(tensor: Tensor, hook: HookPoint) -> None:
            save(tensor, hook, "_grad")

        names = self.hook_dict.match(names_filter)
        maps = [name for name in names if self.hook_dict[name].pos_dim is None]
        if pos_slice is not None and maps:
            raise ValueError(
                f"{maps[0]!r} is [batch, channel, row, column] and has no positions for pos_slice; "
                "name points that have in names_filter"
            )
        fwd = [(name, forward) for name in names]
        return entries, fwd, [(name, backward) for name in names] if incl_bwd else []

    def add_caching_hooks(
        self,
        names_filter: Names = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Adds caching hooks that stay until `reset_hooks`; see TransformerLens."""
        entries, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, hook in fwd:
            self.add_hook(name, hook)
        for name, hook in bwd:
            self.add_hook(name, hook, "bwd")
        return entries

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: Names = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        metric: Callable[[Tensor], Tensor] | None = None,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Slice | SliceInput = None,
        stop_at: str | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Runs the model and returns its output and the activations by name.

        Args:
            *model_args: as in `forward`.
            names_filter: a hook name, a glob, several of these, a predicate, or None for every
                point but heads and `hook_result`.
            device: where to keep the entries; by default where they are.
            remove_batch_dim: drops the batch axis of a batch of one.
            incl_bwd: also caches gradients of `metric`, under `_grad` names.
            metric: from logits to a scalar, needed by `incl_bwd`.
            reset_hooks_end: whether the hooks go when the run ends.
            clear_contexts: whether hook contexts are emptied then.
            pos_slice: positions to keep, as in TransformerLens, in every stack.
            stop_at: a hook name. It is cached, nothing after it is computed, and the output is
                None.
            **model_kwargs: as in `forward`.

        Raises:
            KeyError: a name that nothing matches; a glob in `stop_at`.
            ValueError: `incl_bwd` without `metric` or with `stop_at`.
            RuntimeError: a cached point that no gradient reached.
        """
        if "stop_at_layer" in model_kwargs:
            raise TypeError(
                "stop_at_layer speaks of one stack; stop_at='text.blocks.3.hook_resid_pre' names "
                "the point to stop at"
            )
        if incl_bwd and stop_at is not None:
            raise ValueError("incl_bwd needs the whole pass, stop_at ends it; use one of the two")
        if incl_bwd != (metric is not None):
            raise ValueError(
                "incl_bwd=True and metric= go together: pass metric=, a function from logits to "
                "a scalar, such as lambda logits: logits[:, 1].sum()"
            )
        if stop_at is not None and "*" in stop_at:
            raise KeyError(f"stop_at takes the name of one point, not the glob {stop_at!r}")
        if stop_at is not None:
            self.hook_dict[stop_at]  # a KeyError before anything runs
        entries, fwd, bwd = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        if stop_at is not None:
            if all(name != stop_at for name, _ in fwd):
                fwd += self.get_caching_hooks(
                    stop_at, False, device, remove_batch_dim, entries, pos_slice
                )[1]
            fwd.append((stop_at, _stop))
        output = None
        with (
            self.hooks(fwd, bwd, reset_hooks_end, clear_contexts),
            torch.set_grad_enabled(incl_bwd or torch.is_grad_enabled()),
        ):
            try:
                output = self(*model_args, **model_kwargs)
            except _Stop:
                pass
            else:
                if stop_at is not None:
                    raise KeyError(f"the pass ended without reaching stop_at={stop_at!r}")
                if metric is not None:
                    metric(output).backward()
        self.is_caching = False
        missing = [name for name, _ in bwd if f"{name}_grad" not in entries]
        if missing:
            raise RuntimeError(
                f"no gradient of the metric reached {missing[0]!r} and {len(missing) - 1} more "
                "points; name in names_filter only points that the metric depends on"
            )
        if fwd and not entries:
            raise KeyError(f"none of the {len(fwd)} points named, {fwd[0][0]!r} first, fired")
        return output, ActivationCache(entries, self, has_batch_dim=not remove_batch_dim)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Any]:
        """Adds hooks for the length of a `with` block; see TransformerLens.

        Raises:
            KeyError: a name that nothing matches; no hook stays behind.
        """
        fwd, bwd = list(fwd_hooks), list(bwd_hooks)
        # Our names may be any iterable; TransformerLens hands them to `_enable_hook` as they are.
        with super().hooks(fwd, bwd, reset_hooks_end, clear_contexts):  # type: ignore[arg-type]
            yield self


@reads_only
def _stop(tensor: Tensor, hook: HookPoint) -> None:
    raise _Stop
