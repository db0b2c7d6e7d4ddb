"""Metrics: one number per row, from the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from hooked_vlm.data import Pair
    from hooked_vlm.models.base import HookedVLM

Token = str | int | None


@dataclass(frozen=True)
class Metric:
    """A function of logits; `metric(model(**inputs))` is one number per row.

    Attributes:
        name: what results call it.
        of: from logits, [batch, 2] or [batch, d_vocab] of the last position, and the token ids of
            answer and foil, to [batch].
        answer: the answer; None to take each pair's own.
        foil: the foil; None to take each pair's own.
        needs: which of the two it reads.
        whole: whether it reads all positions, not the last one alone.
    """

    name: str
    of: Callable[[Tensor, Any, Any], Tensor]
    answer: Token = None
    foil: Token = None
    needs: tuple[str, ...] = ()
    whole: bool = False

    def bind(self, model: HookedVLM, pair: Pair | None) -> Metric:
        """The metric with the ids of the pair's answer and foil, where it has none of its own.

        Without a pair it must have its own.

        Raises:
            ValueError: one is missing, or is not a single token.
        """
        ids: dict[str, Any] = {}
        for field in self.needs:
            token = getattr(self, field)
            token = getattr(pair, field, None) if token is None else token
            if token is None:
                whose = "" if pair is None else f" of pair {pair.name!r}"
                raise ValueError(f"{self.name} needs the {field}{whose}: give one")
            ids[field] = token if isinstance(token, int) else model.to_single_token(token)
        return replace(self, **ids)

    def __call__(self, logits: Float[Tensor, "batch *pos d_out"]) -> Float[Tensor, " batch"]:
        """The metric of each row, of the last position where there are several.

        Raises:
            ValueError: answer or foil are words yet (`bind` makes ids of them), or ids that the
                logits do not hold.
        """
        for field in self.needs:
            token = getattr(self, field)
            if not isinstance(token, int):
                of = "its id" if token is None else f"model.to_single_token({token!r})"
                raise ValueError(f"{self.name} needs the token id of its {field}: give {of}")
            if not 0 <= token < logits.shape[-1]:
                raise ValueError(
                    f"{self.name} reads the {field}'s token, id {token}, of logits that hold "
                    f"{logits.shape[-1]}; the metric of an itm model is itm_margin"
                )
        return self.of(
            logits if self.whole or logits.dim() < 3 else logits[:, -1], self.answer, self.foil
        )


def itm_margin() -> Metric:
    """Logit of 'match' minus logit of 'no match'."""

    def margin(logits: Tensor, answer: Any, foil: Any) -> Tensor:
        if logits.shape[-1] != 2:
            raise ValueError(f"itm_margin reads two logits, not {logits.shape[-1]}")
        return logits[:, 1] - logits[:, 0]

    return Metric("itm_margin", margin)


def logit_diff(answer: Token = None, foil: Token = None) -> Metric:
    """Logit of the answer minus logit of the foil; each pair's own by default."""
    return Metric("logit_diff", lambda x, a, f: x[:, a] - x[:, f], answer, foil, ("answer", "foil"))


def prob(answer: Token = None) -> Metric:
    """Probability of the answer; each pair's own by default."""
    return Metric("prob", lambda x, a, _: x.softmax(-1)[:, a], answer, needs=("answer",))


def log_prob(answer: Token = None) -> Metric:
    """Log probability of the answer, in nats; each pair's own by default."""
    return Metric("log_prob", lambda x, a, _: x.log_softmax(-1)[:, a], answer, needs=("answer",))


METRICS: dict[str, Callable[[], Metric]] = {
    "itm_margin": itm_margin,
    "logit_diff": logit_diff,
    "prob": prob,
    "log_prob": log_prob,
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
    return Metric(name, lambda logits, answer, foil: function(logits), whole=True)


def as_numbers(values: Tensor) -> list[float]:
    """A metric's values, as Python numbers."""
    return [float(value) for value in values.to(torch.float64)]
