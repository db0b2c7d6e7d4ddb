"""Trains the toys on the shapes world: ``python -m hooked_vlm.toys.train toy-blip-itm``.

From random numbers, a retrieval loss alone stays at chance for hundreds of steps, and with a
masked-token loss beside it everything but the relations is learned. What gets the relations off
the ground is a third loss, which predicts each named shape's centre from its text token; a fourth,
which says of each patch what it shows, halves the time. Heads that only serve such losses are
dropped after training. The question and captioning toys start from the retrieval toy's stacks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
    PreTrainedModel,
)

from hooked_vlm import toys
from hooked_vlm.data import shapes
from hooked_vlm.toys import card
from hooked_vlm.toys.evaluate import PROMPT, evaluate
from hooked_vlm.toys.examples import TEXTS, Examples
from hooked_vlm.toys.tokenizer import IMAGE_SIZE, MAX_POSITIONS, PATCH, build_processor

WIDTH = 64
BATCH = 64
N_SCENES = 20_000
# How often each false caption of TEXTS[1:] is the one that a step contrasts with the true one.
NEGATIVE_WEIGHTS = torch.tensor([0.2, 0.2, 0.4, 0.08, 0.06, 0.06])


def config(processor: BlipProcessor) -> BlipConfig:
    """The sizes of every toy BLIP, with the special tokens of its vocabulary."""
    tokenizer = processor.tokenizer
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "projection_dim": WIDTH // 2,
        # transformers' default for the vision tower is 1e-10: made for loading, hopeless to train;
        # at this width 0.05 leaves chance earlier than 0.02.
        "initializer_range": 0.05,
    }
    return BlipConfig(
        vision_config=shared
        | {
            "num_hidden_layers": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "layer_norm_eps": 1e-5,
        },
        text_config=shared
        | {
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=WIDTH // 2,
        image_text_hidden_size=WIDTH // 2,
    )


class TrainingHeads(nn.Module):
    """Heads on the two stacks that serve training only."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.embedding = [embedding]  # in a list: it belongs to the model
        self.to_word = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.to_look = nn.Linear(WIDTH, len(shapes.COLORS) + len(shapes.KINDS) + 2)
        self.to_center = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))

    def word_loss(self, hidden: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
        """Cross-entropy of the hidden tokens."""
        logits = self.to_word(hidden[masked]) @ self.embedding[0].weight.T
        return F.cross_entropy(logits, ids[masked])

    def patch_loss(self, patches: Tensor, owners: Tensor, looks: Tensor, centers: Tensor) -> Tensor:
        """What each patch shows: colour, kind and centre of its shape.

        Args:
            patches: ``[batch, patch, d]``.
            owners: ``[batch, patch]``, 0 or 1 for a shape, 2 for none.
            looks: ``[batch, 2, 2]``, colour and kind of the shapes.
            centers: ``[batch, 2, 2]``.
        """
        batch, patch = (owners < 2).nonzero(as_tuple=True)
        shape = owners[batch, patch]
        color, kind, center = self.to_look(patches[batch, patch]).split(
            [len(shapes.COLORS), len(shapes.KINDS), 2], dim=-1
        )
        look = looks[batch, shape]
        return (
            F.cross_entropy(color, look[:, 0])
            + F.cross_entropy(kind, look[:, 1])
            + 10 * F.mse_loss(center, centers[batch, shape])
        )

    def center_loss(self, hidden: Tensor, kinds: Tensor, centers: Tensor) -> Tensor:
        """Squared error of the centres of the two named shapes, read at their kinds' tokens.

        Args:
            hidden: ``[batch, pos, d]``.
            kinds: Boolean ``[batch, pos]``, two positions in each row.
            centers: ``[batch, 2, 2]``, in the order of the text.
        """
        predicted = self.to_center(hidden[kinds]).view(-1, 2, 2)
        return F.mse_loss(predicted, centers)


def train_itm(seed: int, steps: int) -> BlipForImageTextRetrieval:
    """Trains the retrieval toy from random numbers."""
    processor = build_processor()
    examples = Examples(N_SCENES, seed, processor)
    tokenizer = processor.tokenizer
    model: BlipForImageTextRetrieval = BlipForImageTextRetrieval(config(processor)).train()
    heads = TrainingHeads(model.get_input_embeddings())
    content = (*shapes.COLORS, *shapes.KINDS, "left", "right", "above", "below")
    misplaced = [TEXTS.index(kind) for kind in ("swapped colors", "other scene")]

    def losses() -> dict[str, Tensor]:
        index = torch.randint(N_SCENES, (BATCH,))
        order = torch.randint(2, (BATCH,))
        image = model.vision_model(examples.pixel_values(index)).last_hidden_state
        false = torch.multinomial(NEGATIVE_WEIGHTS, BATCH, replacement=True) + 1
        true_ids = examples.texts[index, order, 0]
        hidden_words = examples.positions(true_ids, content) & (torch.rand(true_ids.shape) < 0.3)
        masked_ids = true_ids.masked_fill(hidden_words, tokenizer.mask_token_id)
        ids = torch.cat([true_ids, examples.texts[index, order, false], masked_ids])
        mask = examples.mask(ids)
        hidden = model.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=image.repeat(3, 1, 1)
        ).last_hidden_state

        match = torch.cat([torch.ones(BATCH), torch.zeros(BATCH)]).long()
        itm = F.cross_entropy(model.itm_head(hidden[: 2 * BATCH, 0]), match)
        words = heads.word_loss(hidden[2 * BATCH :], true_ids, hidden_words)
        # A caption with one word changed still points at its two shapes; these two kinds do not.
        pointing = torch.cat(
            [torch.ones(BATCH).bool(), ~torch.isin(false, torch.tensor(misplaced))]
        )
        centers = heads.center_loss(
            hidden[: 2 * BATCH][pointing],
            examples.positions(ids[: 2 * BATCH], shapes.KINDS)[pointing],
            examples.centers[index, order].repeat(2, 1, 1)[pointing],
        )
        text = model.text_encoder(true_ids, attention_mask=mask[:BATCH]).last_hidden_state
        similarity = _unit(model.vision_proj(image[:, 0])) @ _unit(model.text_proj(text[:, 0])).T
        same = torch.arange(BATCH)
        itc = F.cross_entropy(similarity / 0.07, same) + F.cross_entropy(similarity.T / 0.07, same)
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

    _fit([*model.parameters(), *heads.parameters()], losses, steps)
    return model


def train_vqa(seed: int, steps: int) -> BlipForQuestionAnswering:
    """Trains the question toy, its vision and text stacks starting as the packaged retrieval toy's.

    Half of the batches hold questions of one length, the others are padded: transformers lets the
    answer decoder see the padding, other code does not, and both should work.
    """
    processor = build_processor()
    examples = Examples(N_SCENES, seed, processor)
    questions = examples.questions
    model: BlipForQuestionAnswering = BlipForQuestionAnswering(config(processor)).train()
    retrieval = _packaged_itm()
    model.vision_model.load_state_dict(retrieval.vision_model.state_dict())
    model.text_encoder.load_state_dict(retrieval.text_encoder.state_dict())
    model.text_decoder.bert.load_state_dict(retrieval.text_encoder.state_dict())
    of_length = {
        int(length): (questions.lengths == length).nonzero()[:, 0]
        for length in questions.lengths.unique()
    }

    def losses() -> dict[str, Tensor]:
        asked = torch.randint(len(questions.ids), (BATCH,))
        if torch.rand(()) < 0.5:
            alike = of_length[int(questions.lengths[asked[0]])]
            asked = alike[torch.randint(len(alike), (BATCH,))]
        ids = questions.ids[asked, : int(questions.lengths[asked].max())]
        answers = questions.answers[asked]
        outcome = model(
            pixel_values=examples.pixel_values(questions.scene[asked]),
            input_ids=ids,
            attention_mask=examples.mask(ids),
            decoder_input_ids=answers,
            labels=answers,
        )
        return {"answers": outcome.loss}

    _fit(model.parameters(), losses, steps)
    return model


def train_captioning(seed: int, steps: int) -> BlipForConditionalGeneration:
    """Trains the captioning toy, its two stacks starting as the packaged retrieval toy's.

    Either shape may come first in a caption, and half of the batches start with the prompt, whose
    words are no target.
    """
    processor = build_processor()
    examples = Examples(N_SCENES, seed, processor)
    tokenizer = processor.tokenizer
    model: BlipForConditionalGeneration = BlipForConditionalGeneration(config(processor)).train()
    retrieval = _packaged_itm()
    model.vision_model.load_state_dict(retrieval.vision_model.state_dict())
    model.text_decoder.bert.load_state_dict(retrieval.text_encoder.state_dict())
    prompt = torch.tensor(tokenizer(PROMPT, add_special_tokens=False).input_ids)

    def losses() -> dict[str, Tensor]:
        index = torch.randint(N_SCENES, (BATCH,))
        ids = examples.texts[index, torch.randint(2, (BATCH,)), 0].clone()
        ids[:, 0] = tokenizer.bos_token_id
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        if torch.rand(()) < 0.5:
            ids = torch.cat([ids[:, :1], prompt.expand(BATCH, -1), ids[:, 1:]], dim=1)
            ignored = torch.full((BATCH, len(prompt)), -100)
            labels = torch.cat([labels[:, :1], ignored, labels[:, 1:]], dim=1)
        outcome = model(
            pixel_values=examples.pixel_values(index),
            input_ids=ids,
            attention_mask=examples.mask(ids),
            labels=labels,
        )
        return {"words": outcome.loss}

    _fit(model.parameters(), losses, steps)
    return model


def _packaged_itm() -> BlipForImageTextRetrieval:
    return BlipForImageTextRetrieval.from_pretrained(toys.path("toy-blip-itm"))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _fit(
    parameters: Iterable[nn.Parameter],
    losses: Callable[[], dict[str, Tensor]],
    steps: int,
    lr: float = 3e-3,
) -> None:
    """Minimises the sum of the losses, printing their running means."""
    unique = list(dict.fromkeys(parameters))
    optimizer = torch.optim.AdamW(unique, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.06)
    means: dict[str, float] = {}
    start = time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        parts = losses()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(unique, 1.0)
        optimizer.step()
        schedule.step()
        for name, part in parts.items():
            means[name] = 0.98 * means.get(name, part.item()) + 0.02 * part.item()
        if step % 100 == 0 or step == steps:
            rates = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            print(f"step {step} {time.perf_counter() - start:.0f} s {rates}", flush=True)


RECIPES: dict[str, tuple[Callable[[int, int], PreTrainedModel], int]] = {
    "toy-blip-itm": (train_itm, 3000),
    "toy-blip-vqa": (train_vqa, 3000),
    "toy-blip-captioning": (train_captioning, 2000),
}
"""How each toy is trained, and for how many steps."""


def save(model: PreTrainedModel, folder: Path) -> None:
    """Writes a checkpoint folder in the released Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor = build_processor()
    processor.save_pretrained(folder)
    # The released folders hold these two as well, and older versions of transformers read them.
    processor.image_processor.save_pretrained(folder)
    vocabulary = sorted(processor.tokenizer.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in vocabulary if piece not in ("[DEC]", "[ENC]")]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


app = typer.Typer(add_completion=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")],
    out: Annotated[Path | None, typer.Option(help="Folder; by default the packaged one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the scenes and the batches.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    scenes: Annotated[int, typer.Option(help="Held-out scenes to measure on.")] = 2000,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Trains a toy, measures it on held-out scenes and writes its folder."""
    if name not in RECIPES:
        raise typer.BadParameter(f"no recipe for {name!r}; known are {', '.join(RECIPES)}")
    recipe, default_steps = RECIPES[name]
    steps = default_steps if steps is None else steps
    folder = out or Path(toys.__file__).parent / name
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    transformers.utils.logging.disable_progress_bar()

    start = time.perf_counter()
    model = recipe(seed, steps).eval()
    seconds = time.perf_counter() - start
    save(model, folder)
    evaluation_seed = 1
    made = card.make(
        name,
        model,
        evaluate(folder, scenes, evaluation_seed),
        evaluate(folder, min(scenes, 500), evaluation_seed, size=192),
        evaluation_seed=evaluation_seed,
        seed=seed,
        steps=steps,
        seconds=seconds,
    )
    card.write(made, folder)
    print(json.dumps(asdict(made), indent=2))


if __name__ == "__main__":
    app()
