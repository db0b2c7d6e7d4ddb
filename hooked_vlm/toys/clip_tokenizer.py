"""The CLIP toys' processor: byte-level BPE in which each word of the world is one token."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

from hooked_vlm.toys.tokenizer import IMAGE_SIZE, WORDS

MAX_POSITIONS = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges of byte pairs, most frequent first, until every word is one piece.

    Source: arXiv 1508.07909, alg. 1; the end of a word is marked as in CLIP.

    Example:
        >>> merges(["to", "two"])
        [('t', 'o</w>'), ('t', 'w'), ('tw', 'o</w>')]
    """
    return learn([[*word[:-1], f"{word[-1]}</w>"] for word in sorted(words)])


def learn(spelled: list[list[str]]) -> list[tuple[str, str]]:
    """The merges of words that are spelled out as pieces, which grow until each word is one."""
    found: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        best = max(sorted(pairs), key=lambda pair: pairs[pair])
        found.append(best)
        for word in spelled:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return found


def build_clip_processor() -> CLIPProcessor:
    """The processor that both toy CLIPs are trained with.

    As in CLIP, the vocabulary holds every byte, alone and at the end of a word, then the merges,
    then the first and the last token of a text, of which the last fills up shorter texts too.
    """
    letters = sorted(ByteLevel.alphabet())
    learned = merges(list(WORDS))
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, learned)]
    tokenizer = CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate([*pieces, START, END])},
        merges=learned,  # type: ignore[arg-type]  # it hands them on to tokenizers, which takes pairs
        model_max_length=MAX_POSITIONS,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    )
    return CLIPProcessor(images, tokenizer)
