"""Edge attribution: what every part of a model tells every later one, in one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from hooked_vlm.components.attention import Attention
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.models.flow import Base, Link
from hooked_vlm.models.names import Site
from hooked_vlm.patching.attribution import between
from hooked_vlm.patching.engine import Sweep
from hooked_vlm.patching.graph import Graph, Node, end_of
from hooked_vlm.patching.interventions import patch
from hooked_vlm.patching.metrics import Metric, as_metric, as_numbers
from hooked_vlm.patching.result import provenance
from hooked_vlm.patching.runs import FirstToken, Inputs, Pairs, paired
from hooked_vlm.patching.sweep import Direction, MetricLike

if TYPE_CHECKING:
    import pandas as pd

NodeNames = str | Site | Sequence[str | Site] | None


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
    points = _points(model, sent, received)
    traced = _Traced(model, runs, [], None, patch(), own, points=points)
    try:
        for done in tqdm(range(len(runs)), desc="edges", unit="pair", disable=not progress):
            ends[:, done], scores[done], ended = traced.scored(done, sent, received, steps)
            last |= ended
        done = len(runs)
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
    told = {
        "method": "edge_attribution",
        "direction": direction,
        "first_token": first,
        "metric": chosen.name,
        "steps": steps,
        "complete": done == len(runs),
    }
    return EdgeResult(data, clean, corrupt, provenance(model, told))


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
        end = end_of(stack, module)
        receivers.append(Node(end, end, stack, len(module.blocks)))
    return senders, receivers


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


@dataclass
class _Traced(Sweep):
    """Runs of pairs with gradients, and how their stacks read one another.

    Attributes:
        points: what is kept of a run.
        links: of the latest run.
    """

    points: list[str] = field(default_factory=list)
    links: dict[str, Link] = field(default_factory=dict)

    def record(self) -> list[str]:
        """The points."""
        return self.points

    def unpatched(self, names: list[str], keep: int, inputs: Inputs) -> Base:
        """The run of a pair, with gradients."""
        base, self.links = self.model.traced_run(names, logits_to_keep=keep, **inputs)
        return base

    def scored(
        self, pair: int, senders: list[Node], receivers: list[Node], steps: int | None
    ) -> tuple[np.ndarray, np.ndarray, set[str]]:
        """A pair's metric in both rows, its scores, [sender, receiver], and where logits are read.

        Raises:
            ValueError: rows that are no pair, or a metric without a gradient.
        """
        ends, scores, last = np.zeros(2), np.zeros((len(senders), len(receivers))), set[str]()
        for begun in self.begin(pair):
            base, inputs = begun.base, begun.locator.inputs
            with torch.enable_grad():
                values = begun.metric(base.logits)
            if not values.requires_grad:
                name = begun.metric.name
                raise ValueError(f"{name} has no gradient; edges need a metric that has one")
            graph = Graph(self.model, base, self.links, self.start)
            ends += begun.weight * np.array(as_numbers(values.detach()))
            runs: Iterable[tuple[Tensor, Base]] = [(values[self.start], base)]
            if steps is not None:
                made = between(
                    self.model, inputs, self.start, steps, self.points, base.logits_to_keep
                )
                runs = ((_measured(begun.metric, one, self.start), one) for one in made)
            scores += begun.weight * graph.scores(runs, senders, receivers)
            last |= graph.last
        return ends, scores, last


@torch.enable_grad()
def _measured(metric: Metric, base: Base, own: int) -> Tensor:
    return metric(base.logits)[own]


def _points(model: HookedVLM, senders: list[Node], receivers: list[Node]) -> list[str]:
    """What is kept of a run: outputs, readings, and where the stream passes a norm."""
    found = {node.point for node in (*senders, *receivers)}
    for stack, module in model.stacks.items():
        found.add(end_of(stack, module))
        for layer, block in enumerate(module.block_list):
            for one in block.SUMS:
                if hasattr(block, one.part):
                    found |= {f"{stack}.blocks.{layer}.{point}" for point in (one.total, one.reads)}
    return list(found)
