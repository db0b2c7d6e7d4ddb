"""Trains the toy LLaVA: ``python -m hooked_vlm.toys.train toy-llava``.

As in LLaVA's own training, the image encoder is a trained CLIP's, here the packaged toy's, and
stays as it is; the projector and the language model begin with random numbers. The features of
every scene are computed once.

Several questions about one scene share its image: they stand one behind the other, each as if it
stood right behind the image alone. So a step reads fewer tokens: half of those of separate prompts.

The loss is that of the answers, and one more, which serves training only: at every token that names
a shape by its colour or its kind, the first block's output must say which shape that is, by colour,
kind and centre. In trials of 2,500 steps with the centre alone (which differed in other ways, too),
questions for yes or no about a relation were not learned with the loss behind the second block, and
colours were still confused with it behind the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from hooked_vlm import toys
from hooked_vlm.data import shapes
from hooked_vlm.toys import conversations
from hooked_vlm.toys.examples import Examples
from hooked_vlm.toys.fitting import WIDTH, TrainingHeads, fit
from hooked_vlm.toys.llava_tokenizer import MAX_POSITIONS, SPACE, build_llava_processor

N_SCENES = 20_000
SCENES, QUESTIONS = 20, 6  # of a step, and about each of its scenes
VISION = "toy-clip"
N_LAYERS = 4
N_HEADS, N_KEY_VALUE_HEADS = 4, 2
POINTING_LAYER = 1  # behind how many blocks a token must say what it names
# How many questions of each kind there are about every scene; steps draw from all alike.
KINDS = {
    "color, open": 2,
    "color, two options": 2,
    "color, yes": 1,
    "color, no": 1,
    "shape, open": 2,
    "shape, two options": 2,
    "shape, yes": 1,
    "shape, no": 1,
    "relation, open": 2,
    "relation, two options": 2,
    "relation, yes": 3,
    "relation, no": 3,
    "description": 3,
}


def train_llava(seed: int, steps: int) -> LlavaForConditionalGeneration:
    """Trains the toy behind the packaged CLIP's image encoder."""
    processor = build_llava_processor()
    examples = Examples(N_SCENES, seed, processor)
    asked = Asked.about(examples, processor)
    clip = CLIPModel.from_pretrained(toys.path(VISION))
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration(config(processor, clip))
    tower = model.model.vision_tower
    tower.load_state_dict(clip.vision_model.state_dict())
    tower.requires_grad_(False)
    features = _features(model, examples)
    embed: nn.Embedding = model.model.language_model.embed_tokens
    heads = TrainingHeads(embed)
    model.train()

    def losses() -> dict[str, Tensor]:
        scene = torch.randint(N_SCENES, (SCENES,))
        batch = asked.draw(scene)
        images = model.model.multi_modal_projector(features[scene])
        places = batch.ids == processor.image_token_id
        states = model.model.language_model(
            inputs_embeds=embed(batch.ids).masked_scatter(places[..., None], images),
            attention_mask=batch.visible,
            position_ids=batch.positions,
            output_hidden_states=True,
            use_cache=False,
        )
        answers = batch.told[:, 1:]
        logits = model.lm_head(states.last_hidden_state[:, :-1][answers])
        return {
            "answers": F.cross_entropy(logits, batch.ids[:, 1:][answers]),
            "looks": heads.patch_loss(
                states.hidden_states[POINTING_LAYER],
                asked.owners(batch.ids, examples.looks[scene]),
                examples.looks[scene],
                examples.centers[scene, 0],
            ),
        }

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit([*learned, *heads.parameters()], losses, steps)
    return model.requires_grad_()


def config(processor: LlavaProcessor, clip: CLIPModel) -> LlavaConfig:
    """The sizes of the toy LLaVA, with the special tokens of its vocabulary."""
    tokenizer, vision = processor.tokenizer, clip.vision_model.config
    special = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config={
            "model_type": "llama",
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": N_KEY_VALUE_HEADS,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-5,
            "vocab_size": -(-len(tokenizer) // 64) * 64,  # rounded up, as in the released one
            "initializer_range": 0.05,
            **special,
        },
        image_token_index=processor.image_token_id,
        image_seq_length=n_image_tokens(processor),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **special,
    )


def n_image_tokens(processor: LlavaProcessor) -> int:
    """How many tokens an image becomes."""
    side: int = processor.image_processor.crop_size["height"] // processor.patch_size
    return side**2


@dataclass(frozen=True)
class Batch:
    """Several questions about each of some scenes, behind its image.

    Attributes:
        ids: ``[scene, pos]``.
        told: Whether a token belongs to an answer, the end included; ``[scene, pos]``.
        positions: Where a token would stand if its question were the only one; ``[1, pos]``.
        visible: Whether a query sees a key: the beginning, the image and its own question, up to
            itself; ``[1, 1, query, key]``.
    """

    ids: Tensor
    told: Tensor
    positions: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Asked:
    """Questions about training scenes with their answers.

    Attributes:
        before: Ids of what stands in front of a question, the image included; ``[pos]``.
        ids: Of questions and answers, padded on the right; ``[scene, question, pos]``.
        told: Whether a token belongs to the answer, the end included; as ``ids``.
        words: Which colour and which kind a token is, or -1; ``[2, d_vocab]``.
        pad: The id of padding.
    """

    before: Tensor
    ids: Tensor
    told: Tensor
    words: Tensor
    pad: int

    @classmethod
    def about(cls, examples: Examples, processor: LlavaProcessor) -> Asked:
        """Of each scene some questions of each kind, a quarter without the capital letter."""
        tokenizer, rng = processor.tokenizer, examples.rng
        texts: list[tuple[str, str]] = []
        for scene in examples.scenes:
            kinds = conversations.by_kind(scene)
            for kind, count in KINDS.items():
                for _ in range(count):
                    text, answer = kinds[kind][int(rng.integers(len(kinds[kind])))]
                    texts.append((text.lower() if rng.random() < 0.25 else text, answer))
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        image = processor.image_token
        rows, starts = [], []
        for text, answer in distinct:
            prompt = conversations.prompt(processor, text)
            prompt = prompt.replace(image, n_image_tokens(processor) * image)
            ids = tokenizer(f"{prompt} {answer}{tokenizer.eos_token}").input_ids
            asks = len(ids) - ids[::-1].index(processor.image_token_id)
            before, row = ids[:asks], ids[asks:]
            rows.append(torch.tensor(row))
            starts.append(len(tokenizer(prompt).input_ids) - asks)
        padded = nn.utils.rnn.pad_sequence(rows, True, tokenizer.pad_token_id)
        told = torch.arange(padded.shape[1]) >= torch.tensor(starts)[:, None]
        told &= padded != tokenizer.pad_token_id
        index = torch.tensor([distinct[text] for text in texts]).view(len(examples.scenes), -1)
        words = torch.full((2, len(tokenizer)), -1)
        for line, names in enumerate((shapes.COLORS, shapes.KINDS)):
            tokens = tokenizer.convert_tokens_to_ids([SPACE + name for name in names])
            words[line, tokens] = torch.arange(len(names))
        return cls(torch.tensor(before), padded[index], told[index], words, tokenizer.pad_token_id)

    def draw(self, scene: Tensor) -> Batch:
        """Questions about scenes that are given by their indices."""
        chosen = torch.randint(self.ids.shape[1], (len(scene), QUESTIONS))
        ids = self.ids[scene[:, None], chosen]
        longest = int((ids != self.pad).sum(-1).max())
        ids, told = ids[..., :longest], self.told[scene[:, None], chosen, :longest]
        n_before = len(self.before)
        behind = torch.arange(QUESTIONS).repeat_interleave(longest)
        question = torch.cat([torch.full((n_before,), -1), behind])  # -1 is seen by all
        own = (question == question[:, None]) | (question == -1)
        return Batch(
            torch.cat([self.before.expand(len(scene), -1), ids.flatten(1)], 1),
            F.pad(told.flatten(1), (n_before, 0)),
            torch.cat([torch.arange(n_before), n_before + torch.arange(longest).repeat(QUESTIONS)])[
                None
            ],
            own.tril()[None, None],
        )

    def owners(self, ids: Tensor, looks: Tensor) -> Tensor:
        """Which shape of its scene a token names: 0 the first, 1 the second, 2 neither.

        Args:
            ids: ``[scene, pos]``.
            looks: Colour and kind of the shapes, ``[scene, 2, 2]``.
        """
        named = self.words[:, ids].permute(1, 2, 0)[:, :, None] == looks[:, None]
        which = named.any(-1)  # [scene, pos, shape]
        return torch.where(which.any(-1), which.int().argmax(-1), 2)


@torch.no_grad()
def _features(model: LlavaForConditionalGeneration, examples: Examples) -> Tensor:
    """What the projector reads of every scene: ``[scene, patch, d]``."""
    parts = []
    for index in torch.arange(len(examples.scenes)).split(500):
        seen = model.model.vision_tower(examples.pixel_values(index), output_hidden_states=True)
        parts.append(seen.hidden_states[model.config.vision_feature_layer][:, 1:])
    return torch.cat(parts)
