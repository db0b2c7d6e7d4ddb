"""Forward passes: in one go, recorded, or resumed from a record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hooked_vlm.components.blocks import Door
from hooked_vlm.components.hook_point import HookPoint, telling
from hooked_vlm.components.stack import Stack
from hooked_vlm.models.cache import ActivationCache
from hooked_vlm.models.flow import Base, Flow, Link, Recording, Resuming, Tracing
from hooked_vlm.models.hooked import HookedModel, Hooks
from hooked_vlm.models.names import Names, Site, head_of

COLUMNS = 4096  # of the table that a tensor is summed as, for its hash


class ResumableModel(HookedModel):
    """A hooked model whose pass is written once, as calls of `flow.stack`, and can be resumed."""

    device_map: dict[str, Any] | None = None  # where each part was put, of several devices
    # The stack behind which each part of the glue is computed, if not the last one.
    GLUE: ClassVar[dict[str, str]]
    # Whether logits of a position come of it and earlier ones alone, if the last stack is causal.
    BY_POSITION: ClassVar[bool] = True
    # The input of which each row gives a row of logits; others may be shared.
    ROWS: ClassVar[str] = "input_ids"
    RECORDING: ClassVar[type[Recording]] = Recording
    RESUMING: ClassVar[type[Resuming]] = Resuming

    @property
    def stacks(self) -> dict[str, Stack[Any]]:
        """The stacks by name, in the order in which they run."""
        return {name: m for name, m in self.named_children() if isinstance(m, Stack)}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return next(self.parameters()).dtype

    def _flow(self, flow: Flow, *args: Any, **inputs: Any) -> Tensor:
        """The pass, as calls of `flow.stack`, from inputs that a subclass names to logits."""
        raise NotImplementedError

    def _run(self, logits_to_keep: int = 0, **inputs: Any) -> Tensor:
        """A plain pass; what `torch.compile` made of it is left while anybody listens."""
        if self._anyone_listens():
            logits: Tensor = self._run_eagerly(logits_to_keep, **inputs)
            return logits
        return self._flow(Flow(self.stacks, logits_to_keep=logits_to_keep), **inputs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _anyone_listens(self) -> bool:
        return any(point.listening for point in self.hook_points())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_eagerly(self, logits_to_keep: int, **inputs: Any) -> Tensor:
        return self._flow(Flow(self.stacks, self._grad_wanted, logits_to_keep), **inputs)

    @property
    def _grad_wanted(self) -> bool:
        return torch.is_grad_enabled() and any(
            point._backward_hooks for point in self.hook_points()
        )

    @torch.no_grad()
    def base_run(
        self, *, names_filter: Names | bool = False, logits_to_keep: int = 0, **inputs: Any
    ) -> Base:
        """Runs the model once and keeps what later runs may reuse.

        Args:
            names_filter: activations to cache besides, as in `run_with_cache`; False for none.
            logits_to_keep: of how many of the last positions this run and those that continue it
                make logits, where a model predicts tokens; 0 for all.
            **inputs: as in `forward`. One image may serve a batch of texts.

        Returns:
            A base for `resume`: logits, the stream at each part's door, and the keys and values of
            cross-attention and of causal self-attention.
        """
        fingerprint = self._fingerprint(inputs)
        recording = self.RECORDING(self.stacks, logits_to_keep)
        names = None if names_filter is True else names_filter
        entries, hooks, _ = self.get_caching_hooks(names) if names is not False else ({}, [], [])
        with self.hooks(hooks):
            logits = self._flow(recording, **inputs)
        self.is_caching = False
        cache = ActivationCache(entries, self)
        return Base(inputs, logits, logits_to_keep, recording.kept, cache, fingerprint)

    def traced_run(
        self, names: Names, *, logits_to_keep: int = 0, **inputs: Any
    ) -> tuple[Base, dict[str, Link]]:
        """Runs the model once with gradients.

        Args:
            names: the points to keep; those that the pass does not reach are left out.
            logits_to_keep: as in `base_run`.
            **inputs: as in `forward`.

        Returns:
            A base whose logits have a gradient, and whose cache holds tensors to differentiate by:
            each is what is computed from at its point, and there alone. And how the stacks that ran
            read one another, by name.

        Raises:
            ValueError: inside of `torch.inference_mode`.
        """
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "nothing has a gradient inside of torch.inference_mode(): leave it, or use "
                "torch.no_grad()"
            )
        entries: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint) -> None:  # that of a writer: no other reads it
            entries[str(hook.name)] = tensor

        tracing = Tracing(self.stacks, logits_to_keep)
        with torch.enable_grad(), self.hooks([(names, keep)]):
            logits = self._flow(tracing, **inputs)
        cache, fingerprint = ActivationCache(entries, self), self._fingerprint(inputs)
        return Base(inputs, logits, logits_to_keep, tracing.kept, cache, fingerprint), tracing.links

    def resume(
        self,
        base: Base,
        site: str | Site | Sequence[str | Site],
        *,
        rows: Sequence[int] | Tensor | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
    ) -> Tensor:
        """Continues a base from the earliest of some sites on; computes only what they reach.

        Points before the part of the block that holds the site do not fire. A change at the site
        comes from `fwd_hooks`, which may name that part's points and later ones.

        Where the last stack is causal, all sites are in it and name a position, and no other point
        of it may be written (by these hooks or standing ones), nothing before the first of these
        positions is computed: hooks see the positions from there on, whose absolute
        numbers are in `hook.ctx["positions"]`. Points of its embeddings see all of them, and those
        behind the stack the ones of which logits are made.

        Args:
            base: from `base_run`.
            site: one or several hook names or sites; a `Site` may name a position, from the end
                where it is negative.
            rows: for each row of the new batch the base's row that it continues; by default the
                base's rows as they are. Rows that share an image share its keys and values.
            fwd_hooks: as in `run_with_hooks`.
            bwd_hooks: as in `run_with_hooks`.
            reset_hooks_end: whether these hooks go when the pass ends; backward hooks must stay
                until the backward pass.

        Returns:
            Logits, [len(rows), ...], equal to those of a full pass with the same hooks.

        Raises:
            KeyError: no such site.
            ValueError: the base's weights, inputs, standing hooks or kept tensors have changed, a
                row or a position is not in it, or a hook names a point before the site.
        """
        if self._fingerprint(base.inputs) != base.fingerprint:
            raise ValueError(
                "weights, inputs or standing hooks have changed since base_run made this base; "
                "make a new one"
            )
        if base.edited:
            raise ValueError(
                "tensors that base_run kept, which base.cache shares, were edited in place; edit "
                "copies, and make a new base"
            )
        sites = [site] if isinstance(site, str | Site) else list(site)
        for one in sites:
            if isinstance(one, Site) and not isinstance(one.position, int | None):
                raise ValueError(
                    f"resume takes a position by its number, not {one.position!r} of {one.name!r}"
                )
        names = [one.name if isinstance(one, Site) else one for one in sites]
        found = [name for glob in names for name in self.hook_dict.match(glob)]
        start = min((self._place(name) for name in found), key=self._order)
        n_rows = len(base.logits)
        chosen = torch.as_tensor(range(n_rows) if rows is None else rows, device=self.device)
        if chosen.numel() == 0 or chosen.min() < 0 or chosen.max() >= n_rows:
            raise ValueError(f"rows must name rows of the base, 0 to {n_rows - 1}: {rows}")
        self._check_reached(base, names[0], start)
        listeners = set()
        for asked, _ in (*fwd_hooks, *bwd_hooks):
            for name in self.hook_dict.match(asked):
                listeners.add(self.stack_of(name))
                if self._order(self._place(name)) < self._order(start):
                    raise ValueError(
                        f"a hook at {name!r} would not fire: the pass resumes at {names[0]!r}; "
                        "name it among the sites"
                    )
        first, length = self._first_position(base, sites, start[0])
        if first and not self._writers(fwd_hooks) <= set(found):
            first = 0  # a hook that is not named there may write at any position
        with ExitStack() as during:
            during.enter_context(self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end))
            flow = self.RESUMING(
                self.stacks, base, *start, chosen, listeners, first, self._grad_wanted
            )
            if first:
                at = torch.arange(first, length, device=self.device)
                during.enter_context(telling(self, at))
                for behind in self._behind_stacks():
                    during.enter_context(telling(behind, at[flow.readout]))
            logits = self._flow(flow, **base.inputs)
        missing = base.logits.shape[1] - logits.shape[1] if first else 0
        return torch.cat([base.logits[chosen, :missing], logits], 1) if missing else logits

    def _first_position(self, base: Base, sites: list[str | Site], start: str) -> tuple[int, int]:
        """The first position that a change at the sites can reach, and how many there are."""
        last = list(self.stacks)[-1]
        at: list[int] = [
            one.position
            for one in sites
            if isinstance(one, Site)
            and isinstance(one.position, int)
            and self._places_own(one.name)
        ]
        own = base.stacks[last].own
        if start != last or not self.BY_POSITION or not own or len(at) < len(sites):
            return 0, 0
        length = next(iter(own.values()))[0].shape[1]
        for position in at:
            if not -length <= position < length:
                raise ValueError(f"there is no position {position}: {last!r} has {length}")
        return min(position % length for position in at), length

    def _writers(self, fwd_hooks: Hooks) -> set[str]:
        """The points of the last stack, and behind it, at which some hook may write."""
        names = {str(point.name) for point in self.hook_points() if point.has_writers}
        names |= {name for asked, _ in fwd_hooks for name in self.hook_dict.match(asked)}
        return {name for name in names if self.stack_of(name) == list(self.stacks)[-1]}

    def _places_own(self, name: str) -> bool:
        """Whether positions at a point are those of its stack: not so of keys of another stack."""
        return not self.hook_dict[(head_of(name) or (name,))[0]].of_source

    def _behind_stacks(self) -> Iterator[nn.Module]:
        """What stands behind the last stack."""
        last = list(self.stacks)[-1]
        for name, module in self.named_children():
            if name not in self.stacks and self.GLUE.get(name, last) == last:
                yield module

    def _check_reached(self, base: Base, site: str, start: tuple[str, Door | None]) -> None:
        stack, door = start
        if (door or (0, "attn")) not in base.stacks[stack].doors:
            raise ValueError(
                f"the pass that made this base did not compute {site!r}; make a base whose "
                "inputs do"
            )

    def _place(self, name: str) -> tuple[str, Door | None]:
        """The stack and the door from which a pass must be run for a hook to matter."""
        site = Site.parse(name)
        if site.layer is not None:
            block = self.stacks[site.stack].block_list[site.layer]
            return site.stack, (site.layer, block.PARTS.get(site.component.split(".")[0], "attn"))
        top = name.partition(".")[0]
        if top in self.stacks and name.split(".")[1] not in self.stacks[top].AFTER_BLOCKS:
            return top, None
        stack = top if top in self.stacks else self.GLUE.get(top, list(self.stacks)[-1])
        return stack, (self.stacks[stack].cfg.n_layers, "attn")

    def stack_of(self, name: str) -> str:
        """The stack that a hook point belongs to, or behind which it is computed."""
        return self._place(name)[0]

    def order_of(self, name: str) -> tuple[int, int, int]:
        """Where a pass resumes for a hook point; equal for points that can be swept together."""
        return self._order(self._place(name))

    def _order(self, place: tuple[str, Door | None]) -> tuple[int, int, int]:
        stack, door = place
        layer, part = door or (-1, "attn")
        return list(self.stacks).index(stack), layer, ("attn", "cross_attn", "mlp").index(part)

    def mask_of(self, inputs: Mapping[str, Any], stack: str) -> Tensor | None:
        """The mask of inputs that says which positions of a stack are no padding, if there is one.

        Args:
            inputs: as in `forward`.
            stack: a stack: the first has none, the next one reads `input_ids`.
        """
        keys = (None, "attention_mask", "decoder_attention_mask")
        key = keys[list(self.stacks).index(stack)]
        return None if key is None else inputs.get(key)

    def weights_hash(self) -> str:
        """A hash of the configuration and of the names, shapes, types and values of all weights.

        It reads every weight once, about 10 GB a second, so that an edit of a single one shows.
        """
        digest = hashlib.sha256(repr(self.cfg).encode())
        for name, weight in (*self.named_parameters(), *self.named_buffers()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            for part in _parts(weight.detach()):
                if part.device.type != "meta":
                    digest.update(_checksum(part))
        return digest.hexdigest()[:16]

    def _weights(self) -> list[Tensor]:
        """All parameters, one that is shared as often as it is; faster than `parameters()`."""
        known: list[tuple[nn.Module, tuple[Any, ...]]] = self.__dict__.get("_known_modules", [])
        if not known or any(tuple(one._modules.values()) != parts for one, parts in known):
            known = [(one, tuple(one._modules.values())) for one in self.modules()]
            self.__dict__["_known_modules"] = known
        return [w for one, _ in known for w in one._parameters.values() if w is not None]

    def _fingerprint(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        weights = [part for weight in self._weights() for part in _parts(weight)]
        tensors = [*weights, *(t for t in inputs.values() if isinstance(t, Tensor))]
        hooks = [
            (point.name, tuple(point._forward_hooks), tuple(point._backward_hooks))
            for point in self.hook_points()
            if point.listening
        ]
        versions = (None if t.is_inference() else t._version for t in tensors)
        return tuple(zip((t.data_ptr() for t in tensors), versions, strict=True)), tuple(hooks)


def stored(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1)
    return numbers.view(torch.uint8).numpy().tobytes() if len(numbers) else b""


def _checksum(tensor: Tensor) -> bytes:
    """Sums over the rows and the columns of a tensor's bytes laid out as a table of integers.

    Small tensors, and what is left behind the last row, as they are. Integers wrap around, so the
    sums are the same on every device and in any order; an edit, or an exchange of rows or columns,
    changes some of them.
    """
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) - len(flat) % (8 * COLUMNS)
    if not whole:
        return stored(flat)
    if flat.storage_offset() % 8:  # integers are read where they are aligned
        flat = flat.clone()
    table = flat[:whole].view(torch.int64).view(-1, COLUMNS)
    return stored(table.sum(0)) + stored(table.sum(1)) + stored(flat[whole:])


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """The tensors in memory that a weight is made of, several where it is quantised."""
    if not is_traceable_wrapper_subclass(weight):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _parts(getattr(weight, name))
