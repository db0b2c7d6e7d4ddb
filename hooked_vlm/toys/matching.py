"""The losses that the retrieval toys share: a true caption against a false one, and what helps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipForImageTextRetrieval

from hooked_vlm.data import shapes
from hooked_vlm.models.albef import HookedALBEF
from hooked_vlm.toys.examples import TEXTS, Examples
from hooked_vlm.toys.fitting import TrainingHeads

BATCH = 64
# How often each false caption of TEXTS[1:] is the one that a step contrasts with the true one.
NEGATIVE_WEIGHTS = torch.tensor([0.2, 0.2, 0.4, 0.08, 0.06, 0.06])
MISPLACED = torch.tensor([TEXTS.index(kind) for kind in ("swapped colors", "other scene")])
TEMPERATURE = 0.07


def matching_losses(
    model: BlipForImageTextRetrieval | HookedALBEF,
    heads: TrainingHeads,
    examples: Examples,
    see: Callable[[Tensor], Tensor],
    fuse: Callable[[Tensor, Tensor, Tensor], Tensor],
    read: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The losses of one step, on scenes drawn anew.

    Args:
        model: Its heads are read; it is called by the three functions.
        heads: Those that serve training only.
        examples: What to draw from.
        see: From pixels to states, ``[image, pos, d]``.
        fuse: From token ids, their mask and as many images' states to the states of the texts.
        read: The same without images, as the contrastive head reads texts.
    """
    tokenizer = examples.processor.tokenizer
    content = (*shapes.COLORS, *shapes.KINDS, "left", "right", "above", "below")
    index = torch.randint(len(examples.scenes), (BATCH,))
    order = torch.randint(2, (BATCH,))
    image = see(examples.pixel_values(index))
    false = torch.multinomial(NEGATIVE_WEIGHTS, BATCH, replacement=True) + 1
    true_ids = examples.texts[index, order, 0]
    hidden_words = examples.positions(true_ids, content) & (torch.rand(true_ids.shape) < 0.3)
    masked_ids = true_ids.masked_fill(hidden_words, tokenizer.mask_token_id)
    ids = torch.cat([true_ids, examples.texts[index, order, false], masked_ids])
    mask = examples.mask(ids)
    hidden = fuse(ids, mask, image.repeat(3, 1, 1))

    match = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)]).long()
    itm = F.cross_entropy(model.itm_head(hidden[: 2 * BATCH, 0]), match)
    words = heads.word_loss(hidden[2 * BATCH :], true_ids, hidden_words)
    # A caption with one word changed still points at its two shapes; these two kinds do not.
    pointing = torch.cat([torch.ones(BATCH).bool(), ~torch.isin(false, MISPLACED)])
    centers = heads.center_loss(
        hidden[: 2 * BATCH][pointing],
        examples.positions(ids[: 2 * BATCH], shapes.KINDS)[pointing],
        examples.centers[index, order].repeat(2, 1, 1)[pointing],
    )
    text = read(true_ids, mask[:BATCH])
    similarity = _unit(model.vision_proj(image[:, 0])) @ _unit(model.text_proj(text[:, 0])).T
    same = torch.arange(BATCH)
    itc = F.cross_entropy(similarity / TEMPERATURE, same)
    itc = itc + F.cross_entropy(similarity.T / TEMPERATURE, same)
    looks = heads.patch_loss(
        image[:, 1:], examples.owners[index], examples.looks[index], examples.centers[index, 0]
    )
    return {
        "itm": itm,
        "words": words,
        "looks": looks,
        "centers": 10 * centers,
        "itc": 0.1 * itc,
    }


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
