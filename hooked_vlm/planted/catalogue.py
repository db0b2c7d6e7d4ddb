"""The planted models that are packaged."""

from __future__ import annotations

from pathlib import Path

from hooked_vlm.hub import packaged
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.planted import proof
from hooked_vlm.planted.card import Card, check_names, read

HERE = Path(__file__).parent
N_VERIFY, SEED = 100, 3 * 10**6  # questions by which a model is verified on loading


def names() -> tuple[str, ...]:
    """Names of the packaged planted models, sorted.

    Example:
        >>> "planted-blip-reader" in names()
        True
    """
    return tuple(packaged("planted"))


def path(name: str) -> Path:
    """The folder of a packaged planted model.

    Args:
        name: one of `names()`.

    Raises:
        KeyError: any other name.
    """
    if name not in names():
        raise KeyError(f"no planted model {name!r}; known are {', '.join(names())}")
    return packaged("planted")[name]


def load(name: str | Path, *, verify: bool = False) -> tuple[HookedVLM, Card]:
    """Opens a planted model and reads its card.

    Args:
        name: one of `names()`, or the folder of a planted model.
        verify: whether to measure the proof again, on other questions.

    Raises:
        KeyError: no such model.
        FileNotFoundError: a folder without a card.
        ValueError: a card of other weights, one that names what the model lacks, or, with `verify`,
            a proof that fails.
    """
    folder = Path(name) if Path(name).is_dir() else path(str(name))
    card = read(folder)
    model = HookedVLM.from_pretrained(folder)
    check_names(card, [site.name for site in model.sites(list(card.sites))])
    if verify:
        proof.check(proof.measure(model, card, N_VERIFY, SEED))
    return model, card
