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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from hooked_vlm import toys
from hooked_vlm.models.base import HookedVLM
from hooked_vlm.toys import card
from hooked_vlm.toys.evaluate import PROMPT, evaluate
from hooked_vlm.toys.examples import Examples
from hooked_vlm.toys.fitting import WIDTH, TrainingHeads, fit
from hooked_vlm.toys.llava_tokenizer import build_llava_processor
from hooked_vlm.toys.matching import BATCH, matching_losses
from hooked_vlm.toys.tokenizer import IMAGE_SIZE, MAX_POSITIONS, PATCH, build_processor
from hooked_vlm.toys.train_albef import train_albef
from hooked_vlm.toys.train_clip import train_clip, train_clip_resnet
from hooked_vlm.toys.train_llava import train_llava

N_SCENES = 20_000


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


def train_itm(seed: int, steps: int) -> BlipForImageTextRetrieval:
    """Trains the retrieval toy from random numbers."""
    processor = build_processor()
    examples = Examples(N_SCENES, seed, processor)
    model: BlipForImageTextRetrieval = BlipForImageTextRetrieval(config(processor)).train()
    heads = TrainingHeads(model.get_input_embeddings())

    def losses() -> dict[str, Tensor]:
        return matching_losses(
            model,
            heads,
            examples,
            see=lambda pixels: model.vision_model(pixels).last_hidden_state,
            fuse=lambda ids, mask, image: (
                model.text_encoder(
                    ids, attention_mask=mask, encoder_hidden_states=image
                ).last_hidden_state
            ),
            read=lambda ids, mask: model.text_encoder(ids, attention_mask=mask).last_hidden_state,
        )

    fit([*model.parameters(), *heads.parameters()], losses, steps)
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

    fit(model.parameters(), losses, steps)
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

    fit(model.parameters(), losses, steps)
    return model


def _packaged_itm() -> BlipForImageTextRetrieval:
    return BlipForImageTextRetrieval.from_pretrained(toys.path("toy-blip-itm"))


RECIPES: dict[str, tuple[Callable[[int, int], PreTrainedModel | HookedVLM], int]] = {
    "toy-blip-itm": (train_itm, 3000),
    "toy-blip-vqa": (train_vqa, 3000),
    "toy-blip-captioning": (train_captioning, 2000),
    "toy-albef": (train_albef, 3000),
    "toy-clip": (train_clip, 2000),
    "toy-clip-resnet": (train_clip_resnet, 1500),
    "toy-llava": (train_llava, 3000),
}
"""How each toy is trained, and for how many steps."""


def save(model: PreTrainedModel | HookedVLM, folder: Path) -> None:
    """Writes a checkpoint folder: of a transformers model in the released Hugging Face layout."""
    if isinstance(model, HookedVLM):
        model.save_pretrained(folder)  # its processor too
        return
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    llava = isinstance(model, LlavaForConditionalGeneration)
    processor = build_llava_processor() if llava else build_processor()
    processor.save_pretrained(folder)
    # The released folders hold these, too, and older versions of transformers read them.
    processor.image_processor.save_pretrained(folder)
    if not llava:
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
