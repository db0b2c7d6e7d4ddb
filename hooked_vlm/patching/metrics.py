"""Metrics: one number per row, from the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from hooked_vlm.data import Pair
    from hooked_vlm.models.base import HookedVLM

Token = str | int | Sequence[int] | None
Tokens = Literal["one", "first", "all"]


@dataclass(frozen=True)
class Metric:
    """A function of logits; `metric(model(**inputs))` is one number per row.

    Attributes:
        name: what results call it.
        of: from logits, [batch, 2] or [batch, d_vocab] of the last position, and the metric, of
            which it reads the token ids `answer` and `foil` and the logits `reference`, to [batch].
        answer: the answer; None to take each pair's own.
        foil: the foil; None to take each pair's own.
        needs: which of these it reads.
        whole: whether it reads all positions, not the last one alone.
        tokens: what of an answer of several tokens counts: `one` refuses them, `first` reads their
            first token, `all` all of them, each after those before it.
        reference: logits of one row to compare with; None to take those of the clean run.
    """

    name: str
    of: Callable[[Tensor, Any], Tensor]
    answer: Token = None
    foil: Token = None
    needs: tuple[str, ...] = ()
    whole: bool = False
    tokens: Tokens = "one"
    reference: Tensor | None = None

    def bind(self, model: HookedVLM, pair: Pair | None) -> Metric:
        """The metric with the ids of the pair's answer and foil, where it has none of its own.

        Without a pair it must have its own.

        Raises:
            ValueError: one is missing, is not a single token where it has to be, or the two begin
                with the same one.
        """
        ids: dict[str, Any] = {}
        for field in ("answer", "foil"):
            if field not in self.needs:
                continue
            token = getattr(self, field)
            token = getattr(pair, field, None) if token is None else token
            whose = "" if pair is None else f" of pair {pair.name!r}"
            if token is None:
                raise ValueError(f"{self.name} needs the {field}{whose}: give one")
            ids[field] = self._ids(model, token)
        if len(ids) == 2 and ids["answer"] == ids["foil"]:
            begin = " begin with" if self.tokens == "first" else " are"
            raise ValueError(
                f"answer and foil{whose}{begin} the same token, {ids['answer']}: {self.name} is 0 "
                "whatever the model does; " + _SAME[self.tokens]
            )
        return replace(self, **ids)

    def _ids(self, model: HookedVLM, token: Any) -> int | tuple[int, ...]:
        if isinstance(token, str) and self.tokens == "one":
            return model.to_single_token(token)
        if isinstance(token, str):
            ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
            if not ids or model.tokenizer.unk_token_id in ids:
                raise ValueError(f"the vocabulary has no tokens for {token!r}")
        else:
            ids = [token] if isinstance(token, int) else list(token)
        if self.tokens == "all":
            return tuple(ids)
        if len(ids) > 1 and self.tokens == "one":
            raise ValueError(f"{self.name} reads one token, not {ids}; tokens='all' reads several")
        return int(ids[0])

    def parts(self) -> list[tuple[Metric, float]]:
        """Metrics whose sum, each times its weight, this is.

        Several where answers are read to their end: each is measured where its own `continuation`
        follows the input.
        """
        if self.tokens != "all" or self.needs != ("answer", "foil"):
            return [(self, 1.0)]
        answer = replace(self, needs=("answer",), foil=None)
        return [(answer, 1.0), (replace(answer, answer=self.foil), -1.0)]

    @property
    def names(self) -> tuple[str, ...]:
        """What its numbers are called, of which most metrics give one."""
        return (self.name,)

    def against(self, logits: Tensor) -> Metric:
        """The metric with logits of a clean run to compare with, where it needs some.

        Args:
            logits: [d_out].
        """
        if "reference" not in self.needs or self.reference is not None:
            return self
        return replace(self, reference=logits)

    @property
    def continuation(self) -> tuple[int, ...]:
        """The tokens that must follow the input for the metric to be read; empty for none."""
        return self.answer if isinstance(self.answer, tuple) else ()

    def __call__(self, logits: Float[Tensor, "batch *pos d_out"]) -> Float[Tensor, "batch ..."]:
        """The metric of each row, of the last position where there are several.

        Of an answer that is read to its end, the last positions are those that predict its tokens.

        Raises:
            ValueError: answer or foil are words yet (`bind` makes ids of them), or ids that the
                logits do not hold; there is nothing to compare with.
        """
        for field in self.needs:
            token = getattr(self, field)
            if field == "reference":
                if token is None:
                    raise ValueError(f"{self.name} needs logits to compare with: give reference=")
                continue
            ids = token if isinstance(token, tuple) else (token,)
            if not all(isinstance(one, int) for one in ids):
                of = "its id" if token is None else f"model.to_single_token({token!r})"
                raise ValueError(f"{self.name} needs the token id of its {field}: give {of}")
            if not all(0 <= one < logits.shape[-1] for one in ids):
                raise ValueError(
                    f"{self.name} reads the {field}'s token, id {token}, of logits that hold "
                    f"{logits.shape[-1]}; the metric of an itm model is itm_margin"
                )
        if self.continuation:
            return self.of(logits[:, -len(self.continuation) :], self)
        return self.of(logits if self.whole or logits.dim() < 3 else logits[:, -1], self)


@dataclass(frozen=True)
class Several(Metric):
    """Metrics that are read from the same runs: a number of each, [batch, metric].

    Attributes:
        metrics: the metrics, each of one token.
    """

    metrics: tuple[Metric, ...] = ()

    def bind(self, model: HookedVLM, pair: Pair | None) -> Metric:
        """As `Metric.bind`, of each.

        Raises:
            ValueError: as there; a metric of answers that are read to their end.
        """
        bound = tuple(one.bind(model, pair) for one in self.metrics)
        for one in bound:
            if one.tokens == "all":
                raise ValueError(f"{one.name} of several metrics reads one token; measure it alone")
        return replace(self, metrics=bound)

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics' names."""
        return tuple(one.name for one in self.metrics)

    def against(self, logits: Tensor) -> Metric:
        """As `Metric.against`, of each."""
        return replace(self, metrics=tuple(one.against(logits) for one in self.metrics))


def several(metrics: Sequence[Metric]) -> Several:
    """Metrics that a sweep reads from the same runs (`sweep.results`)."""
    whole = any(one.whole for one in metrics)
    name = ", ".join(one.name for one in metrics)
    return Several(name, _each, whole=whole, metrics=tuple(metrics))


def _each(logits: Tensor, metric: Any) -> Tensor:
    return torch.stack([one(logits) for one in metric.metrics], -1)


_SAME = {
    "one": "give two that differ",
    "first": "tokens='all' reads them to their end",
    "all": "give two that differ",
}


def _log_prob(logits: Tensor, metric: Any) -> Tensor:
    """Of one token, or of several, one behind the other."""
    found: Tensor = logits.log_softmax(-1)
    if not metric.continuation:
        chosen: Tensor = found[:, metric.answer]
        return chosen
    ids = torch.tensor(metric.continuation, device=logits.device)
    each: Tensor = found.gather(-1, ids.expand(len(found), -1)[..., None])
    return each.sum((1, 2))


def itm_margin() -> Metric:
    """Logit of 'match' minus logit of 'no match'."""

    def margin(logits: Tensor, metric: Any) -> Tensor:
        if logits.shape[-1] != 2:
            raise ValueError(f"itm_margin reads two logits, not {logits.shape[-1]}")
        return logits[:, 1] - logits[:, 0]

    return Metric("itm_margin", margin)


def logit_diff(answer: Token = None, foil: Token = None, *, tokens: Tokens = "one") -> Metric:
    """Logit of the answer minus logit of the foil; each pair's own by default.

    Args:
        answer: a word, or a token id.
        foil: the same.
        tokens: of words of several tokens, `first` reads the first of each; `all` is the log
            probability of all of the answer's minus that of all of the foil's, in nats.
    """

    def difference(logits: Tensor, metric: Any) -> Tensor:
        if metric.continuation:
            return _log_prob(logits, metric)
        return logits[:, metric.answer] - logits[:, metric.foil]

    return Metric("logit_diff", difference, answer, foil, ("answer", "foil"), tokens=tokens)


def prob(answer: Token = None, *, tokens: Tokens = "one") -> Metric:
    """Probability of the answer; each pair's own by default. `tokens` as in `logit_diff`."""
    return Metric(
        "prob", lambda x, m: _log_prob(x, m).exp(), answer, needs=("answer",), tokens=tokens
    )


def log_prob(answer: Token = None, *, tokens: Tokens = "one") -> Metric:
    """Log probability of the answer, in nats; each pair's own by default."""
    return Metric("log_prob", _log_prob, answer, needs=("answer",), tokens=tokens)


def accuracy(answer: Token = None, *, tokens: Tokens = "one") -> Metric:
    """1 where the answer is what the model would say, token by token, else 0."""

    def right(logits: Tensor, metric: Any) -> Tensor:
        same = logits.argmax(-1) == torch.tensor(metric.answer, device=logits.device)
        every: Tensor = same.all(-1) if metric.continuation else same
        return every.to(logits.dtype)

    return Metric("accuracy", right, answer, needs=("answer",), tokens=tokens)


def kl(reference: Float[Tensor, " d_out"] | None = None) -> Metric:
    """Kullback-Leibler divergence of the answer's distribution from a reference's, in nats.

    `sum p log(p / q)`, p that of the reference, q that of the run.

    Args:
        reference: logits; by default those of each pair's clean run.
    """

    def divergence(logits: Tensor, metric: Any) -> Tensor:
        p, q = metric.reference.log_softmax(-1), logits.log_softmax(-1)
        return F.kl_div(q, p.expand_as(q), log_target=True, reduction="none").sum(-1)

    return Metric("kl", divergence, needs=("reference",), reference=reference)


METRICS: dict[str, Callable[[], Metric]] = {
    "itm_margin": itm_margin,
    "logit_diff": logit_diff,
    "prob": prob,
    "log_prob": log_prob,
    "accuracy": accuracy,
    "kl": kl,
}


def as_metric(metric: Metric | Callable[[Tensor], Tensor] | None, model: HookedVLM) -> Metric:
    """A metric of what was given for one.

    Args:
        metric: a metric; a function from all logits to a number per row; None for `itm_margin`
            where the model says match or no match, for the logit of the first text minus that of
            the second where it compares images with texts, and for `logit_diff` elsewhere.
        model: the model.
    """
    if metric is None and model.task == "clip":
        return logit_diff(0, 1)
    if metric is None:
        return itm_margin() if model.task == "itm" else logit_diff()
    if isinstance(metric, Metric):
        return metric
    function = metric
    name = getattr(function, "__name__", type(function).__name__)
    return Metric(name, lambda logits, _: function(logits), whole=True)


def as_numbers(values: Tensor) -> list[float]:
    """A metric's values, as Python numbers."""
    return [float(value) for value in values.to(torch.float64)]


def as_array(values: Tensor) -> np.ndarray:
    """A metric's values, [batch, metric]."""
    return values.detach().reshape(len(values), -1).to("cpu", torch.float64).numpy()
