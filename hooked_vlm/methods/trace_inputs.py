"""What a causal trace runs on, and what it measures there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from torch import Tensor

from hooked_vlm.models.base import HookedVLM
from hooked_vlm.patching.metrics import Metric, as_metric, prob
from hooked_vlm.patching.runs import FirstToken, Inputs, rows_of
from hooked_vlm.patching.sweep import MetricLike


@runtime_checkable
class Example(Protocol):
    """An image and a text, such as `data.Pair`, of which the clean side counts.

    `answer`, `foil`, `name` and `roles` are read where they are there.
    """

    @property
    def image(self) -> Any:
        """The image, or a path."""

    @property
    def text(self) -> Any:
        """The text; None for a caption from nothing."""


# Inputs from `prepare`, row by row; an example; a tuple of an image, a text and, if there is one,
# its answer; or a list of these.
Examples = Inputs | Example | Sequence[Any]


class Own(Enum):
    """Whose answer is measured."""

    OWN = "each example's own"


OWN: Final = Own.OWN
"""For `answer=`: each example's own."""

Answer = str | int | Own | None


@dataclass(frozen=True)
class Asked:
    """An example.

    Attributes:
        name: what results call it; it decides the noise.
        inputs: prepares it.
        first_token: as in `HookedVLM.prepare`.
        answer: its own answer.
        foil: its own foil.
        roles: by name the positions, or the words, of roles in its text.
    """

    name: str
    inputs: Callable[[], Inputs]
    first_token: str
    answer: Any = None
    foil: Any = None
    roles: Mapping[str, Any] = field(default_factory=dict)


def examples(model: HookedVLM, given: Examples, first_token: FirstToken) -> list[Asked]:
    """The examples, whose images are opened when they are run.

    Raises:
        ValueError: none, something else, or no processor where one is needed.
    """
    alone = isinstance(given, Mapping | Example) or _is_asked(given)
    several: list[Any] = [given] if alone else list(given)  # type: ignore[arg-type]  # no single one
    made: list[Asked] = []
    for one in several:
        if isinstance(one, Mapping):
            told = getattr(one, "first_token", "unknown")
            for row in rows_of(model, one):
                made.append(Asked(str(len(made)), partial(_same, row), told))
        elif isinstance(one, Example) or _is_asked(one):
            made.append(_asked(model, one, len(made), first_token))
        else:
            raise ValueError(
                f"example {len(made)} is a {type(one).__name__}: give inputs from prepare, a pair, "
                "or (image, text, answer)"
            )
    if not made:
        raise ValueError("no examples were given")
    return made


def _is_asked(one: Any) -> bool:
    return isinstance(one, tuple) and len(one) in (2, 3) and isinstance(one[1], str | None)


def _asked(model: HookedVLM, one: Any, number: int, first_token: FirstToken) -> Asked:
    """An example that is not prepared yet."""
    if isinstance(one, tuple):
        image, text, answer = (*one, None)[:3]
    else:
        image, text, answer = one.image, one.text, getattr(one, "answer", None)
    foil, name = getattr(one, "foil", None), str(getattr(one, "name", "") or number)
    if model.processor is None:
        raise ValueError(
            f"example {name!r} is no prepared input, and this model has no processor; pass "
            "processor= to from_hf or from_pretrained, or set model.processor"
        )
    words = {role: word for role, word in (("answer", answer), ("foil", foil)) if word}
    return Asked(
        name,
        partial(model.prepare_prompt, [image], text, first_token=first_token),
        first_token,
        answer,
        foil,
        words | dict(getattr(one, "roles", {})),
    )


def _same(inputs: Inputs) -> Inputs:
    return inputs


def metric_of(model: HookedVLM, given: MetricLike, answer: Answer, example: Asked) -> Metric:
    """The metric of an example, bound to an answer.

    Args:
        model: the model.
        given: a metric, or a function from logits to a number per row; None for `prob`.
        answer: what it reads; None for what the clean run finds most likely, where the metric has
            none of its own.
        example: the example.

    Raises:
        ValueError: an answer that is not one token, one too many, or none.
    """
    metric = prob() if given is None else as_metric(given, model)
    if "answer" not in metric.needs:
        if answer is not None:
            raise ValueError(f"{metric.name} reads no answer: leave out answer=")
        return metric.bind(model, None)
    if metric.answer is not None and answer is not None:
        raise ValueError(f"{metric.name} has an answer, {metric.answer!r}: leave out answer=")
    if answer is OWN and example.answer is None:
        raise ValueError(
            f"example {example.name!r} has no answer of its own: give one, or leave out answer= "
            "for what the clean run says"
        )
    if metric.foil is None:
        metric = replace(metric, foil=example.foil)
    if metric.answer is None:
        metric = replace(metric, answer=example.answer if answer is OWN else answer)
    return (_of_top(metric) if metric.answer is None else metric).bind(model, None)


def _of_top(metric: Metric) -> Metric:
    """A metric whose answer is what the clean run finds most likely."""

    def of(logits: Tensor, bound: Any) -> Tensor:
        top = int(bound.reference.argmax())
        return metric.of(logits, replace(bound, answer=top))

    others = tuple(name for name in metric.needs if name != "answer")
    return replace(metric, of=of, needs=(*others, "reference"), tokens="one")
