"""Conversion tables: what each tensor of a released checkpoint is called here.

A table is a list of rules and is read in both directions. In a pattern `{l}` stands for a number
and `{p}` for `weight` or `bias`; in `ignore`, `*` stands for anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

_WILD = {"{l}": r"(?P<l>\d+)", "{p}": r"(?P<p>weight|bias)"}
Shape = tuple[int, ...]


class ConversionError(ValueError):
    """A checkpoint that does not fit; the message names the tensors."""


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        source: pattern of names in the checkpoint.
        targets: patterns of our names; several where the tensor is cut along its first axis, none
            where it is ignored or a copy.
        same_as: for a copy, the source that it repeats.
        because: why it is ignored.
        transposed: whether a matrix stands the other way round.
        axes: how many axes of length one ours has in front of the source's.
        grid: whether it is a table of positions, a class token's and a square grid's, which may
            be of another size.
        rows: how many rows of zeros ours has behind the source's.
    """

    source: str
    targets: tuple[str, ...] = ()
    same_as: str = ""
    because: str = ""
    transposed: bool = False
    axes: int = 0
    grid: bool = False
    rows: int = 0


def rename(source: str, target: str) -> Rule:
    """The same tensor under another name."""
    return Rule(source, (target,))


def split(source: str, targets: Sequence[str]) -> Rule:
    """A tensor that is cut into equal parts along its first axis."""
    return Rule(source, tuple(targets))


def transpose(source: str, target: str) -> Rule:
    """A matrix that stands the other way round."""
    return Rule(source, (target,), transposed=True)


def unsqueeze(source: str, target: str, axes: int) -> Rule:
    """A tensor that has axes of length one in front of it here."""
    return Rule(source, (target,), axes=axes)


def positions(source: str, target: str, axes: int = 0) -> Rule:
    """A table of positions of patches, behind a class token's; another grid is interpolated.

    The last axis but one counts positions. Source: `interpolate_pos_embed` of ALBEF and BLIP.
    """
    return Rule(source, (target,), axes=axes, grid=True)


def extend(source: str, target: str, rows: int) -> Rule:
    """A matrix over a vocabulary that has further tokens here, with zeros in their rows."""
    return Rule(source, (target,), rows=rows)


def copy_of(source: str, original: str) -> Rule:
    """A tied tensor: absent, equal to its original, or there in its place; never written."""
    return Rule(source, same_as=original)


def ignore(source: str, because: str) -> Rule:
    """A tensor that the model does not need, and why."""
    return Rule(source, because=because)


@dataclass(frozen=True)
class Step:
    """What becomes of one source tensor: its rule, our names, and the shape that each needs."""

    source: str
    rule: Rule
    targets: tuple[str, ...]
    shape: Shape

    def apply(self, tensor: Tensor) -> dict[str, Tensor]:
        """The target tensors: the source itself, or views of it; a table that is interpolated."""
        if self.rule.transposed:
            tensor = tensor.mT
        if self.rule.grid and tensor.shape[-2] != self.shape[-2]:
            tensor = _interpolated(tensor, self.shape[-2])
        if self.rule.axes:
            tensor = tensor[(None,) * self.rule.axes]
        if self.rule.rows:
            tensor = torch.cat([tensor, tensor.new_zeros(self.rule.rows, *tensor.shape[1:])])
        if len(self.targets) == 1:
            return {self.targets[0]: tensor}
        return dict(zip(self.targets, tensor.chunk(len(self.targets)), strict=True))


def _interpolated(table: Tensor, n_positions: int) -> Tensor:
    """A table of positions for another grid: bicubic, in float32; the class token's row stays."""
    first, grid = table[..., :1, :], table[..., 1:, :]
    old, new = round(grid.shape[-2] ** 0.5), round((n_positions - 1) ** 0.5)
    image = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    resized = image.permute(0, 2, 3, 1).reshape(*table.shape[:-2], new * new, -1)
    return torch.cat([first, resized.to(table.dtype)], dim=-2)


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[lp]\})", pattern)
    return re.compile("".join(_WILD.get(part, re.escape(part)) for part in parts))


def _fill(pattern: str, found: Mapping[str, str]) -> str:
    for key, value in found.items():
        pattern = pattern.replace(f"{{{key}}}", value)
    return pattern


def _find(rules: Iterable[Rule], name: str) -> tuple[Rule, dict[str, str]] | None:
    for rule in rules:
        if "*" in rule.source:
            if fnmatchcase(name, rule.source):
                return rule, {}
        elif match := _regex(rule.source).fullmatch(name):
            return rule, match.groupdict()
    return None


def plan(
    sources: Mapping[str, Shape],
    rules: Sequence[Rule],
    targets: Mapping[str, Shape],
    same: Callable[[str, str], bool] | None = None,
) -> list[Step]:
    """How to fill the targets, checked before anything is copied.

    Args:
        sources: shapes of the checkpoint's tensors.
        rules: the table of its layout.
        targets: shapes of the model's tensors.
        same: whether two sources hold the same numbers, asked of tied tensors.

    Raises:
        ConversionError: a source that no rule names, a target that is filled never or twice, a
            shape that does not fit, a copy that differs from its original.
    """
    steps: list[Step] = []
    filled: dict[str, str] = {}
    problems: list[str] = []
    for name, shape in sources.items():
        found = _find(rules, name)
        if found is None:
            problems.append(f"left over: {name!r} {list(shape)} has no place in this model")
            continue
        rule, wild = found
        if rule.same_as in sources:
            if shape != sources[rule.same_as] or (same and not same(name, rule.same_as)):
                problems.append(f"{name!r} is tied to {rule.same_as!r} but holds other numbers")
            continue
        if rule.same_as:
            original = _find(rules, rule.same_as)
            assert original is not None, f"the table has no line for {rule.same_as!r}"
            rule, wild = original
        filling = tuple(_fill(target, wild) for target in rule.targets)
        part = _becomes(shape, rule, targets.get(filling[0]) if filling else None)
        step = Step(name, rule, filling, part or ())
        for target in step.targets:
            if target not in targets:
                problems.append(f"left over: {name!r} would fill {target!r}, which is not there")
            elif target in filled:
                problems.append(f"{target!r} is filled by {filled[target]!r} and by {name!r}")
            elif part != targets[target]:
                of = f" from each of its {len(step.targets)} parts" * (len(step.targets) > 1)
                of += f", the last {rule.rows} rows added" * bool(rule.rows)
                problems.append(
                    f"wrong shape: {name!r} is {list(shape)}, {target!r} needs "
                    f"{list(targets[target])}{of}"
                )
            filled[target] = name
        if step.targets:
            steps.append(step)
    problems += [f"missing: nothing fills {name!r}" for name in targets if name not in filled]
    if problems:
        shown = "\n  ".join(problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConversionError(f"the checkpoint does not fit the model:\n  {shown}{more}")
    return steps


def _becomes(shape: Shape, rule: Rule, wanted: Shape | None) -> Shape | None:
    """The shape of what a rule makes of a tensor, None if it cannot."""
    if rule.transposed:
        shape = shape[::-1]
    shape = (1,) * rule.axes + shape
    tables = [table for table in (shape, wanted or ()) if len(table) > 1]
    if rule.grid and len(tables) == 2 and all(_is_square(table[-2] - 1) for table in tables):
        shape = (*shape[:-2], tables[1][-2], shape[-1])
    if rule.rows:
        shape = (shape[0] + rule.rows, *shape[1:])
    parts = len(rule.targets)
    if parts <= 1:
        return shape
    return (shape[0] // parts, *shape[1:]) if shape and shape[0] % parts == 0 else None


def _is_square(number: int) -> bool:
    return number > 0 and isqrt(number) ** 2 == number


def convert(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], targets: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names; views of them, no copies.

    Raises:
        ConversionError: as `plan`.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    steps = plan(shapes, rules, targets, lambda a, b: torch.equal(tensors[a], tensors[b]))
    return {
        target: part for step in steps for target, part in step.apply(tensors[step.source]).items()
    }


def revert(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our tensors under the checkpoint's names, as the layout's own writer would hold them.

    Raises:
        ConversionError: a tensor that no rule names, or a part of a whole that is not there.
    """
    made: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in tensors:
        for rule in rules:
            match = rule.targets and _regex(rule.targets[0]).fullmatch(name)
            if match:
                wild = match.groupdict()
                parts = [_fill(target, wild) for target in rule.targets]
                if lost := [part for part in parts if part not in tensors]:
                    raise ConversionError(f"missing: {', '.join(map(repr, lost))}")
                used.update(parts)
                whole = [tensors[part] for part in parts]
                made[_fill(rule.source, wild)] = _reverted(whole, rule)
                break
    lost = [name for name in tensors if name not in used]
    if lost:
        raise ConversionError(f"no rule writes {', '.join(map(repr, lost[:8]))}")
    return made


def _reverted(parts: list[Tensor], rule: Rule) -> Tensor:
    whole = torch.cat(parts) if len(parts) > 1 else parts[0]
    whole = whole[(0,) * rule.axes]
    if rule.rows:
        whole = whole[: -rule.rows]
    return whole.mT if rule.transposed else whole
