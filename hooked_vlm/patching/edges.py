"""Edge attribution: what every part of a model tells every later one, in one backward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.components.attention import Attention
from hooked_vlm.components.blocks import Sum
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base, Link
from hooked_vlm.models.names import Site
from hooked_vlm.patching.attribution import between
from hooked_vlm.patching.metrics import Metric, as_metric, as_numbers
from hooked_vlm.patching.runs import FirstToken, Pairs, Run, paired
from hooked_vlm.patching.sweep import Direction, MetricLike

if TYPE_CHECKING:
    import pandas as pd

ROOM = 2**28  # bytes that directions of receivers may take at a time
NodeNames = str | Site | Sequence[str | Site] | None
Directions = Float[Tensor, "receiver rows pos d_model"]


@dataclass(frozen=True)
class Edge:
    """From one part to a later one.

    Attributes:
        sender: the name of what is added to the stream.
        receiver: the name of what reads it.
        score: the metric's change, to first order, averaged over pairs.
    """

    sender: str
    receiver: str
    score: float


@dataclass(frozen=True)
class EdgeResult:
    """The metric's change along every edge, to first order.

    Attributes:
        data: dimensions `pair`, `sender` and `receiver`; NaN where a sender does not stand in
            front of a receiver in its stream, so that there is no edge.
        clean: the metric in the clean run, by pair.
        corrupt: the metric in the corrupt run, by pair.
        provenance: what the numbers were made with.
    """

    data: xr.DataArray
    clean: xr.DataArray
    corrupt: xr.DataArray
    provenance: dict[str, Any]

    def top(self, k: int = 10) -> list[Edge]:
        """The edges whose mean over pairs is largest, whatever its sign.

        Args:
            k: how many; fewer if there are not as many.
        """
        mean = self.data.mean("pair")
        scores = mean.values
        order = np.argsort(-np.abs(scores), axis=None, kind="stable")[:k]  # NaN is last
        senders, receivers = mean["sender"].values, mean["receiver"].values
        cells = [divmod(int(cell), scores.shape[1]) for cell in order]
        return [
            Edge(str(senders[row]), str(receivers[column]), float(scores[row, column]))
            for row, column in cells
            if np.isfinite(scores[row, column])
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair and edge, with the metric of both runs."""
        columns = {"score": self.data, "clean": self.clean, "corrupt": self.corrupt}
        frame = xr.Dataset(columns).to_dataframe().reset_index()
        return frame[frame["score"].notna()].reset_index(drop=True)


@dataclass(frozen=True)
class Node:
    """A sender or a receiver.

    Attributes:
        name: its hook name.
        point: the module's point.
        stack: the stack of which it is a part.
        layer: its block; -1 for the embedding, the number of blocks for the readout.
        part: its part of the block; empty for these two.
        head: its head, None for one without.
    """

    name: str
    point: str
    stack: str
    layer: int
    part: str = ""
    head: int | None = None


def edge_attribution(
    model: HookedVLM,
    pairs: Pairs,
    metric: MetricLike = None,
    direction: Direction = "denoise",
    *,
    senders: NodeNames = None,
    receivers: NodeNames = None,
    steps: int | None = None,
    first_token: FirstToken = "cls",
    progress: bool = True,
) -> EdgeResult:
    """Scores every edge of a model's graph by one forward and one backward pass per pair.

    Senders are what is added to a stream: heads (`….heads.h.hook_result`), MLPs (`hook_mlp_out`)
    and what block 0 reads (`….blocks.0.hook_resid_pre`). Receivers are what reads it: queries, keys
    and values of heads (`….heads.h.hook_q`), MLPs (`hook_mlp_in`), and the readout: the stream
    behind the last block, where no other stack reads it. Keys and values of cross-attention, and
    LLaVA's tokens of an image, read the stack of the image: its parts are senders, too. What stands
    at these tokens is theirs, and no part of the text's embedding.

    An edge's score is the sender's output in the other run minus that in the run that is written
    to, times the metric's gradient with respect to what the receiver reads, by the receiver alone,
    along the path from one to the other that passes no part. That path is linear in a pre-norm
    stack but for the receiver's norm; this norm, those on the path in a post-norm stack, and what
    stands between stacks, are linearised at the run that is written to.

    Source: attribution patching of edges (Syed et al., arXiv 2310.10348; Hanna et al., arXiv
    2403.17806), with norms linearised, not frozen.

    Args:
        model: a model whose stacks are transformers.
        pairs: as in `activation_patching`.
        metric: as in `activation_patching`; it needs a gradient.
        direction: `denoise` scores clean outputs in the corrupt run, `noise` the reverse.
        senders: hook names, globs or sites of some senders; None for all.
        receivers: the same of receivers.
        steps: averages the gradient over so many runs between the two, as in
            `attribution_patching` (EAP-IG); None for the gradient of the run that is written to.
        first_token: as in `HookedVLM.prepare`; of inputs that are prepared already, theirs.
        progress: whether to show a bar.

    Returns:
        Scores by pair, sender and receiver. Ctrl-C returns the pairs that are done:
        `result.provenance["complete"]` is False then, and the others NaN.

    Raises:
        KeyError: names that no sender, or receiver, has.
        ValueError: a stack without a stream, a metric without a gradient; pairs that do not align.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps is at least 1, not {steps}")
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction is 'denoise' or 'noise', not {direction!r}")
    sent, received = _nodes(model)
    sent = _chosen(model, senders, sent, "sender")
    received = _chosen(model, receivers, received, "receiver")
    chosen = as_metric(metric, model)
    runs, first = paired(model, pairs, chosen, first_token)
    own = 1 if direction == "denoise" else 0
    scores = np.full((len(runs), len(sent), len(received)), np.nan)
    ends = np.full((2, len(runs)), np.nan)
    done, last = 0, set[str]()
    try:
        for run in tqdm(runs, desc="edges", unit="pair", disable=not progress):
            ends[:, done], scores[done], ended = _scored(model, run, own, sent, received, steps)
            done, last = done + 1, last | ended
    except KeyboardInterrupt:
        if not done:
            raise
    kept = [at for at, node in enumerate(received) if node.part or node.stack in last]
    if not kept:
        raise KeyError(
            f"{received[0].name!r} is no receiver: no logits are read there; {sorted(last)} end in "
            "a readout"
        )
    names = [run.name for run in runs]
    coords = {
        "pair": names,
        "sender": [node.name for node in sent],
        "receiver": [received[at].name for at in kept],
    }
    clean, corrupt = (xr.DataArray(end, dims="pair", coords={"pair": names}) for end in ends)
    data = xr.DataArray(scores[:, :, kept], dims=tuple(coords), coords=coords, name="score")
    provenance = {
        **model.provenance,
        "method": "edge_attribution",
        "direction": direction,
        "first_token": first,
        "metric": chosen.name,
        "weights": model.weights_hash(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "steps": steps,
        "complete": done == len(runs),
    }
    return EdgeResult(data, clean, corrupt, provenance)


def _nodes(model: HookedVLM) -> tuple[list[Node], list[Node]]:
    """All senders, and all receivers with the ends of all stacks, in the order of the model.

    Raises:
        ValueError: a stack whose blocks do not say how their stream runs.
    """
    senders, receivers = [], []
    for stack, module in model.stacks.items():
        for layer, block in enumerate(module.block_list):
            if not hasattr(block, "SUMS"):
                raise ValueError(
                    f"edges are of a stream to which parts add; {stack!r} of this model has none: "
                    f"its blocks are {type(block).__name__}s"
                )
            stem = f"{stack}.blocks.{layer}"
            if not layer:
                name = f"{stem}.hook_resid_pre"
                senders.append(Node(name, name, stack, -1))
            for one in block.SUMS:
                part = getattr(block, one.part, None)
                if part is None:
                    continue
                if not isinstance(part, Attention):
                    out, reads = f"{stem}.{one.out}", f"{stem}.{one.reads}"
                    senders.append(Node(out, out, stack, layer, one.part))
                    receivers.append(Node(reads, reads, stack, layer, one.part))
                    continue
                of = f"{stem}.{one.part}"
                for head in range(part.n_heads):
                    name = f"{of}.heads.{head}.hook_result"
                    senders.append(Node(name, f"{of}.hook_z", stack, layer, one.part, head))
                for leaf in ("hook_q", "hook_k", "hook_v"):
                    for head in range(getattr(part, leaf).n_heads):
                        name, point = f"{of}.heads.{head}.{leaf}", f"{of}.{leaf}"
                        receivers.append(Node(name, point, stack, layer, one.part, head))
        end = _end(stack, module)
        receivers.append(Node(end, end, stack, len(module.blocks)))
    return senders, receivers


def _end(name: str, stack: Any) -> str:
    """The point of the stream behind a stack's last block."""
    return f"{name}.blocks.{len(stack.blocks) - 1}.{stack.blocks[-1].SUMS[-1].stream}"


def _chosen(model: HookedVLM, names: NodeNames, nodes: list[Node], kind: str) -> list[Node]:
    """The nodes that are named.

    Raises:
        KeyError: none is.
    """
    if names is None:
        return nodes
    several = [names] if isinstance(names, str | Site) else names
    asked = [one.name if isinstance(one, Site) else one for one in several]
    wanted = set(model.hook_dict.match(asked))
    if found := [node for node in nodes if node.name in wanted]:
        return found
    kinds = dict.fromkeys(node.name.rpartition(".")[2] for node in nodes)
    raise KeyError(
        f"no {kind} among {asked}: {kind}s are {', '.join(kinds)}, those of heads with the head "
        f"in their name, such as {next(n.name for n in nodes if n.head is not None)!r}"
    )


def _scored(
    model: HookedVLM,
    run: Run,
    own: int,
    senders: list[Node],
    receivers: list[Node],
    steps: int | None,
) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """A pair's metric in both rows, its scores, [sender, receiver], and where logits are read.

    Raises:
        ValueError: rows that are no pair, or a metric without a gradient.
    """
    ends, scores, last = np.zeros(2), np.zeros((len(senders), len(receivers))), set[str]()
    for metric, weight in run.metric.parts():
        inputs = run.inputs()
        if len(metric.continuation) > 1:
            inputs = model.continued(inputs, metric.continuation[:-1])
        keep = 0 if metric.whole else max(1, len(metric.continuation))
        points = _points(model, senders, receivers)
        base, links = model.traced_run(points, logits_to_keep=keep, **inputs)
        if len(base.logits) != 2:
            raise ValueError(
                f"the input gives {len(base.logits)} rows of logits, not 2, one for the clean and "
                "one for the corrupt run; of a model whose rows are images, it needs a corrupt "
                "image"
            )
        if "reference" in metric.needs and metric.reference is None:
            clean = base.logits[0] if base.logits.dim() < 3 else base.logits[0, -1]
            metric = replace(metric, reference=clean.detach())
        with torch.enable_grad():
            values = metric(base.logits)
        if not values.requires_grad:
            raise ValueError(f"{metric.name} has no gradient; edges need a metric that has one")
        graph = _Graph(model, base, links, own)
        ends += weight * np.array(as_numbers(values.detach()))
        if steps is None:
            runs: Iterable[tuple[Tensor, Base]] = [(values[own], base)]
        else:
            made = between(model, inputs, own, steps, points, keep)
            runs = ((_measured(metric, one, own), one) for one in made)
        scores += weight * graph.scores(runs, senders, receivers)
        last |= graph.last
    return ends, scores, last


@torch.enable_grad()
def _measured(metric: Metric, base: Base, own: int) -> Tensor:
    return metric(base.logits)[own]


def _points(model: HookedVLM, senders: list[Node], receivers: list[Node]) -> list[str]:
    """What is kept of a run: outputs, readings, and where the stream passes a norm."""
    found = {node.point for node in (*senders, *receivers)}
    for stack, module in model.stacks.items():
        found.add(_end(stack, module))
        for layer, block in enumerate(module.block_list):
            for one in block.SUMS:
                if hasattr(block, one.part):
                    found |= {f"{stack}.blocks.{layer}.{point}" for point in (one.total, one.reads)}
    return list(found)


class _Met:
    """The receivers that were met on the way back to a place of a stream.

    Attributes:
        numbers: which they are.
        directions: for each the gradient with respect to the stream at that place, by it alone.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.directions: Directions = torch.empty(0)

    def add(self, numbers: Iterable[int], directions: Directions) -> None:
        """Meets further ones."""
        others = [self.directions.to(directions.device)] if self.numbers else []
        self.directions = torch.cat([*others, directions])
        self.numbers += numbers

    def pull(self, through: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Goes on to the place in front of a function, linear at x."""
        if self.numbers:
            self.directions = _pulled(through, x, self.directions)

    def times(self, added: Float[Tensor, "sender rows pos d_model"]) -> np.ndarray:
        """Scores, [sender, receiver], of what is added at that place."""
        wide = torch.float64 if added.dtype == torch.float64 else torch.float32
        directions = self.directions.to(added.device, wide)
        product: np.ndarray = (added.to(wide).flatten(1) @ directions.flatten(1).T).cpu().numpy()
        return product


def _pulled(through: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor) -> Tensor:
    """Gradients with respect to x of those with respect to what a function makes of it."""
    back = torch.func.vjp(through, x)[1]
    (found,) = torch.vmap(back)(directions.to(x.device))
    pulled: Tensor = found
    return pulled


class _Graph:
    """The edges of a pair, linear at one of its rows.

    Args:
        model: the model.
        base: both rows, from `traced_run`.
        links: from there, too.
        own: the row that is written to.

    Attributes:
        last: the stacks that no other reads, behind which logits are made.
    """

    def __init__(self, model: HookedVLM, base: Base, links: dict[str, Link], own: int):
        self.model, self.base, self.links = model, base, links
        read = {link.source for link in links.values()}
        read |= {link.merge.source for link in links.values() if link.merge is not None}
        self.last = set(links) - read
        self.row = torch.tensor([own], device=base.logits.device)
        self.rows = {name: base.rows(name, self.row) for name in links}
        self.others = {name: base.rows(name, 1 - self.row) for name in links}
        self.gradients: dict[str, Tensor | None] = {}

    def _own(self, point: str) -> Tensor:
        """An activation in the run that is written to, [rows, ...]."""
        x = self.base.cache[point]
        return x.detach()[self.rows[point.partition(".")[0]].to(x.device)]

    def _change(self, point: str) -> Tensor:
        """The activation in the other run minus that."""
        x = self.base.cache[point]
        other = x.detach()[self.others[point.partition(".")[0]].to(x.device)]
        return other - self._own(point)

    def _gradient(self, point: str) -> Tensor:
        """The metric's gradient with respect to it, zero where it does not matter."""
        gradient, x = self.gradients[point], self._own(point)
        if gradient is None:
            return torch.zeros_like(x)
        return gradient[self.rows[point.partition(".")[0]].to(x.device)]

    def scores(
        self,
        values: Iterable[tuple[Tensor, Base]],
        senders: list[Node],
        receivers: list[Node],
    ) -> np.ndarray:
        """Scores, [sender, receiver]; NaN where there is no edge.

        Args:
            values: a metric's values, and the runs they are of, whose gradients are averaged.
            senders: the senders.
            receivers: the receivers.
        """
        found = np.full((len(senders), len(receivers)), np.nan)
        received = [
            number
            for number, node in enumerate(receivers)
            if node.point in self.base.cache and (node.part or node.stack in self.last)
        ]
        if not received:
            return found
        points = list(dict.fromkeys(receivers[number].point for number in received))
        gradients: list[Tensor | None] = [None] * len(points)
        for number, (value, base) in enumerate(values, start=1):
            tensors = [base.cache[point] for point in points]
            these = torch.autograd.grad(value, tensors, allow_unused=True)
            gradients = [  # the mean so far
                one if mean is None or one is None else mean + (one - mean) / number
                for mean, one in zip(gradients, these, strict=True)
            ]
        self.gradients = dict(zip(points, gradients, strict=True))
        streams = [self._own(_end(name, self.model.stacks[name])) for name in self.links]
        size = max(stream.numel() * stream.element_size() for stream in streams)
        step = max(1, ROOM // size)
        for first in range(0, len(received), step):
            self._walk(senders, receivers, received[first : first + step], found)
        return found

    @torch.no_grad()
    def _walk(
        self, senders: list[Node], receivers: list[Node], some: list[int], found: np.ndarray
    ) -> None:
        """Goes back from some receivers through the streams that they read."""
        sent = _by_place(senders, range(len(senders)))
        received = _by_place(receivers, some)
        ahead: dict[str, _Met] = defaultdict(_Met)  # those met behind a stack, at its output
        for name in reversed(list(self.links)):
            stack: Any = self.model.stacks[name]
            met, end = ahead[name], _end(name, stack)
            met.pull(self.links[name].glue, self._own(end))
            for number in received[name, len(stack.blocks), ""]:
                met.add([number], self._gradient(end)[None])
            for layer, block in reversed(list(enumerate(stack.blocks))):
                for one in reversed(block.SUMS):
                    total = f"{name}.blocks.{layer}.{one.total}"
                    if total not in self.base.cache:
                        continue
                    if one.behind is not None:
                        met.pull(getattr(block, one.behind), self._own(total))
                    place = name, layer, one.part
                    heard = sent[place]
                    if heard and met.numbers:
                        added = self._added(block, [senders[number] for number in heard])
                        found[np.ix_(heard, met.numbers)] = met.times(added)
                    if received[place]:
                        self._meet(block, one, receivers, received[place], met, ahead)
            if met.numbers:
                self._embedding(name, sent[name, -1, ""], met, ahead, found)

    def _added(self, block: Any, nodes: list[Node]) -> Float[Tensor, "sender rows pos d_model"]:
        """The change of what senders of one part add."""
        change = self._change(nodes[0].point)
        if nodes[0].head is None:
            return change[None]
        heads = [node.head for node in nodes]
        weights = getattr(block, nodes[0].part).W_O[heads]
        return torch.einsum("rphd,hdm->hrpm", change[:, :, heads], weights)

    def _meet(
        self,
        block: Any,
        one: Sum,
        receivers: list[Node],
        numbers: list[int],
        met: _Met,
        ahead: dict[str, _Met],
    ) -> None:
        """Meets the receivers of a part: in its stream, or behind the stack that it reads."""
        stack, here = receivers[numbers[0]].stack, _Met()
        for point, group in _by_point(receivers, numbers).items():
            heads, gradient = [receivers[number].head for number in group], self._gradient(point)
            if heads[0] is None:
                met.add(group, gradient[None])  # of the stream itself, in front of the norm
                continue
            weights = getattr(getattr(block, one.part), f"W_{point[-1].upper()}")[heads]
            directions = torch.einsum("rphd,hmd->hrpm", gradient[:, :, heads], weights)
            if not self.model.hook_dict[point].of_source:
                here.add(group, directions)
                continue
            source, turns = self.links[stack].source, self.links[stack].turns
            assert source is not None
            whole = directions.new_zeros(len(group), len(self.rows[source]), *directions.shape[2:])
            whole[:, block.turn % turns :: turns] = directions
            ahead[source].add(group, whole)
        if here.numbers:
            if one.before is not None:
                reads = f"{stack}.blocks.{block.layer}.{one.reads}"
                here.pull(getattr(block, one.before), self._own(reads))
            met.add(here.numbers, here.directions)

    def _embedding(
        self,
        name: str,
        heard: list[int],
        met: _Met,
        ahead: dict[str, _Met],
        found: np.ndarray,
    ) -> None:
        """Scores what block 0 reads; what of it is another stack's output is met there."""
        added, merge = self._change(f"{name}.blocks.0.hook_resid_pre"), self.links[name].merge
        if merge is not None:
            merge = merge.of(self.row)
            features = self.base.stacks[merge.source].output.detach()
            there = met.directions[:, merge.places]
            mine = features[self.rows[merge.source].to(features.device)]
            ahead[merge.source].add(met.numbers, _pulled(merge.standing, mine, there))
            added = added.masked_fill(merge.places[..., None].to(added.device), 0)
        if heard:
            found[np.ix_(heard, met.numbers)] = met.times(added[None])


def _by_place(nodes: list[Node], some: Iterable[int]) -> dict[tuple[str, int, str], list[int]]:
    """Numbers of nodes by stack, layer and part."""
    found: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for number in some:
        found[nodes[number].stack, nodes[number].layer, nodes[number].part].append(number)
    return found


def _by_point(nodes: list[Node], some: Iterable[int]) -> dict[str, list[int]]:
    """Numbers of nodes by their module's point."""
    found: dict[str, list[int]] = defaultdict(list)
    for number in some:
        found[nodes[number].point].append(number)
    return found
