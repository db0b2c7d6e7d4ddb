"""Hook names: heads made on first use, globs, and sites."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from hooked_vlm.components.hook_point import HookPoint

Names = str | Iterable[str] | Callable[[str], bool] | None

_HEAD = re.compile(r"(?P<stem>.+)\.heads\.(?P<head>\d+)\.(?P<leaf>hook_\w+)")
_BLOCK = re.compile(
    r"(?P<stack>\w+)\.blocks\.(?P<layer>\d+)\.(?:(?P<part>\w+)\.)?"
    r"(?:heads\.(?P<head>\d+)\.)?(?P<leaf>hook_\w+)"
)


@dataclass(frozen=True)
class Site:
    """A place where an activation can be read or written.

    Attributes:
        name: the hook name.
        stack: `vision`, `text`, `decoder`; empty for the glue between them.
        layer: the block's number, None outside of blocks.
        component: the name inside the block or stack, without the head: `cross_attn.hook_z`.
        head: the head's number, None for all heads together.
        position: the position, None for all of them; for `hooked_vlm.patching` also several, a
            role or a part of the image.
    """

    name: str
    stack: str = ""
    layer: int | None = None
    component: str = ""
    head: int | None = None
    position: Hashable = None

    @classmethod
    def parse(cls, name: str, position: Hashable = None) -> Site:
        """The site of a hook name."""
        match = _BLOCK.fullmatch(name)
        if match is None:
            stem, number = head_of(name) or (name, None)
            stack, dot, component = stem.partition(".")
            if not dot:
                stack, component = "", stem
            return cls(name, stack, None, component, number, position)
        part, head = match["part"], match["head"]
        return cls(
            name,
            match["stack"],
            int(match["layer"]),
            f"{part}.{match['leaf']}" if part else match["leaf"],
            None if head is None else int(head),
            position,
        )


def head_of(name: str) -> tuple[str, int] | None:
    """The module's point and the head's number that a head's name speaks of, else None."""
    match = _HEAD.fullmatch(name)
    return match and (f"{match['stem']}.{match['leaf']}", int(match["head"]))


class HookDict(dict[str, HookPoint]):
    """All ordinary hook points by name; a head's point is made when it is asked for by name."""

    def __missing__(self, name: str) -> HookPoint:
        of = head_of(name) if isinstance(name, str) else None
        if of is None or of[0] not in self:
            raise KeyError(self.complaint(str(name)))
        return self[of[0]].head(of[1])

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or not isinstance(name, str):
            return super().__contains__(name)
        of = head_of(name)
        return of is not None and super().__contains__(of[0]) and of[1] < self[of[0]].n_heads

    def get(self, name: str, default: Any = None) -> Any:
        """The point of that name, a head's included, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 (this is `get`)

    def names(self, heads: bool = False) -> Iterator[str]:
        """All names, in the order of the modules; with `heads`, those of all heads too."""
        for name, point in self.items():
            yield name
            if heads:
                stem, _, leaf = name.rpartition(".")
                for index in range(point.n_heads):
                    yield f"{stem}.heads.{index}.{leaf}"

    def match(self, names: Names) -> list[str]:
        """The names that a filter means, in the order of the modules.

        Args:
            names: None for every ordinary point but `hook_result`; a name or a glob, in which
                `heads` and `hook_result` must be written out to be meant; several of these; or a
                predicate on ordinary names.

        Raises:
            KeyError: nothing matches; the nearest names are listed.
        """
        if names is None:
            return [name for name in self if not name.endswith("hook_result")]
        if callable(names):
            found = [name for name in self if names(name) and not name.endswith("hook_result")]
            if not found:
                raise KeyError(
                    "the filter, a function, is true of no ordinary hook name; heads and "
                    "hook_result are meant only where they are named or globbed"
                )
            return found
        if isinstance(names, str):
            return self._match_one(names)
        wanted = {found for name in names for found in self._match_one(name)}
        if not wanted:
            raise KeyError("an empty list of hook names matches nothing")
        if not any(".heads." in name for name in wanted):
            return [name for name in self if name in wanted]
        return [name for name in self.names(heads=True) if name in wanted]

    def _match_one(self, glob: str) -> list[str]:
        if not isinstance(glob, str):
            raise TypeError(f"a hook name is a string, not {type(glob).__name__}: {glob!r}")
        if glob in self:
            return [glob]
        heads, result = "heads" in glob, "hook_result" in glob
        found = [
            name
            for name in self.names(heads)
            if fnmatchcase(name, glob)
            and (heads == (".heads." in name))
            and (result or not name.endswith("hook_result"))
        ]
        if not found:
            raise KeyError(self.complaint(glob))
        return found

    def complaint(self, name: str) -> str:
        """Says what is wrong with a name that no point has."""
        said = f"no hook {name!r}"
        block = re.match(r"(\w+)\.blocks\.(\d+)\.", name)
        if block:
            layers = [
                int(m[2]) for m in (_BLOCK.match(n) for n in self) if m and m["stack"] == block[1]
            ]
            if layers and int(block[2]) > max(layers):
                said += f": {block[1]} has {max(layers) + 1} blocks (0 to {max(layers)})"
        of = head_of(name)
        if of is not None and super().__contains__(of[0]):
            n_heads = self[of[0]].n_heads
            said += f": {of[0]!r} has {n_heads} heads" + (f" (0 to {n_heads - 1})" * bool(n_heads))
        heads = re.sub(r"\*(?=\.hook_\w+$)", "heads.*", name)
        if heads != name and any(fnmatchcase(known, heads) for known in self.names(heads=True)):
            said += f"; heads are named {heads!r}"
        candidates = list(self.names(heads=".heads." in name))
        nearest = difflib.get_close_matches(name, candidates, n=3, cutoff=0)
        return f"{said}. Nearest: {', '.join(map(repr, nearest))}"
