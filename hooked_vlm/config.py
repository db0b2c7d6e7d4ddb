"""Configurations: one frozen dataclass per kind of stack, one per model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Task = Literal["itm", "captioning", "vqa"]
ALBEFTask = Literal["itm", "pretrain", "vqa", "ve", "nlvr"]


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes of a stack of transformer blocks.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks that run.
        n_heads: attention heads per block.
        d_mlp: width of the MLP's hidden layer.
        activation: name of the MLP's activation, as in `transformers.activations.ACT2FN`.
        eps: constant under the root of every layer norm of the stack.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    activation: str
    eps: float

    def __post_init__(self) -> None:
        from transformers.activations import ACT2FN  # what --help need not wait for

        if self.n_heads < 1 or self.n_layers < 1:
            raise ValueError(f"n_heads={self.n_heads} and n_layers={self.n_layers} start at 1")
        if self.activation not in ACT2FN:
            raise ValueError(
                f"activation={self.activation!r} is none of transformers' activation functions"
            )
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}; "
                "pass the number of heads that the checkpoint was trained with"
            )

    @property
    def d_head(self) -> int:
        """Width of one head."""
        return self.d_model // self.n_heads

    @property
    def n_key_value_heads(self) -> int:
        """Heads of keys and values: one to each head of queries."""
        return self.n_heads

    # What TransformerLens' ActivationCache asks of a model's configuration.
    @property
    def normalization_type(self) -> str:
        """TransformerLens' word for a layer norm with its own gain and bias."""
        return "LN"

    @property
    def attn_only(self) -> bool:
        """Every block of the zoo has an MLP."""
        return False


@dataclass(frozen=True, kw_only=True)
class VisionConfig(StackConfig):
    """A vision transformer over square images.

    Attributes:
        image_size: side of the image, in pixels.
        patch_size: side of a patch, in pixels.
        patch_bias: whether the patch convolution has a bias; CLIP's has none.
        ln_pre: whether a norm stands before the first block, as in CLIP.
        n_unread: blocks behind the last one that runs, kept for saving alone, as the final norm
            then is; None where the stack is read at its end.
    """

    image_size: int
    patch_size: int
    patch_bias: bool = True
    ln_pre: bool = False
    n_unread: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def n_ctx(self) -> int:
        """Positions: the patches and the class token."""
        return self.grid**2 + 1


@dataclass(frozen=True, kw_only=True)
class TokenConfig(StackConfig):
    """A stack over tokens with learned positions.

    Attributes:
        d_vocab: size of the vocabulary.
        n_ctx: number of learned positions.
        causal: whether a position sees only itself and earlier ones.
    """

    d_vocab: int
    n_ctx: int
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(TokenConfig):
    """A causal stack with rotary positions, as in Llama, Vicuna and Mistral.

    Attributes:
        n_ctx: the positions that it was made for.
        n_key_value_heads: heads of keys and values, each of which serves a group of query heads.
        d_head: width of one head; by default `d_model / n_heads`.
        rope_theta: base of the rotary frequencies.
        sliding_window: how many positions a query sees, its own included; None for all.
        causal: always true.
    """

    n_key_value_heads: int = 0
    d_head: int = 0
    rope_theta: float
    sliding_window: int | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        if not self.d_head:
            super().__post_init__()
            object.__setattr__(self, "d_head", self.d_model // self.n_heads)
        if not self.n_key_value_heads:
            object.__setattr__(self, "n_key_value_heads", self.n_heads)
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of "
                f"n_key_value_heads={self.n_key_value_heads}"
            )

    @property
    def normalization_type(self) -> str:
        """TransformerLens' word for a norm without centring, with a gain of its own."""
        return "RMS"


@dataclass(frozen=True, kw_only=True)
class TextConfig(TokenConfig):
    """A BERT stack whose blocks read another stack through cross-attention.

    Attributes:
        d_source: width of the stack that cross-attention reads.
        fusion_layer: the first block with cross-attention.
        n_token_types: rows of the token type table, of which the first is added to every token;
            0 for a stack without one.
        n_images: how many images a text is read with; blocks with cross-attention read them in
            turn, and each round of blocks shares the weights of keys and values.
    """

    d_source: int
    fusion_layer: int = 0
    n_token_types: int = 0
    n_images: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fusion_layer < self.n_layers:
            raise ValueError(
                f"fusion_layer={self.fusion_layer} is none of the {self.n_layers} blocks"
            )


@dataclass(frozen=True, kw_only=True)
class BLIPConfig:
    """A BLIP (arXiv 2201.12086) for one task.

    Attributes:
        task: `itm` (image-text retrieval), `captioning` or `vqa`.
        vision: the image encoder.
        text: the text encoder (`itm`), the question encoder (`vqa`), else None.
        decoder: the caption or answer decoder, None for `itm`.
        d_proj: width of the image-text similarity space (`itm`).
        bos_token_id: first token of a decoded text, `[DEC]`.
        sep_token_id: `[SEP]`, which ends a decoded text.
        pad_token_id: `[PAD]`.
    """

    task: Task
    vision: VisionConfig
    text: TextConfig | None
    decoder: TextConfig | None
    d_proj: int = 256
    bos_token_id: int = 30522
    sep_token_id: int = 102
    pad_token_id: int = 0


@dataclass(frozen=True, kw_only=True)
class ALBEFConfig:
    """An ALBEF (arXiv 2107.07651) for one task.

    Attributes:
        task: `itm` (retrieval and grounding), `pretrain` (the masked-token head of a pre-training
            file), `vqa`, `ve` (visual entailment) or `nlvr` (a sentence about two images).
        vision: the image encoder.
        text: the text encoder, whose cross-attention begins at its `fusion_layer`.
        decoder: the answer decoder (`vqa`), else None.
        d_proj: width of the image-text similarity space, None for a file without projections.
        temperature: whether the file holds the temperature of the similarity, `temp`.
        d_class: classes of the head of `ve` and `nlvr`, else None.
        max_words: words of a text that are read; the original cuts the rest off.
        bos_token_id: first token of an answer, `[CLS]`.
        sep_token_id: `[SEP]`, which ends an answer.
        pad_token_id: `[PAD]`.
    """

    task: ALBEFTask
    vision: VisionConfig
    text: TextConfig
    decoder: TextConfig | None = None
    d_proj: int | None = None
    temperature: bool = False
    d_class: int | None = None
    max_words: int = 30
    bos_token_id: int = 101
    sep_token_id: int = 102
    pad_token_id: int = 0


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """CLIP's ResNet (arXiv 2103.00020 sec. 2.4), whose blocks count over all stages.

    Attributes:
        stages: bottleneck blocks in each stage; each stage after the first halves the map.
        width: channels behind the stem; a stage has four times its width, doubled at each next.
        n_heads: heads of the attention pool.
        image_size: side of the image, in pixels.
        eps: constant under the root of every batch norm.
    """

    stages: tuple[int, ...]
    width: int
    n_heads: int
    image_size: int
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not self.stages or min(self.stages) < 1:
            raise ValueError(f"stages={self.stages}: each of them has one block at least")
        if self.width % 2:
            raise ValueError(f"width={self.width} is odd; the stem starts with half of it")
        if self.n_heads < 1 or self.d_model % self.n_heads:
            raise ValueError(
                f"the attention pool is {self.d_model} wide, no multiple of n_heads={self.n_heads}"
            )
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of {self.stride}, the pixels of a "
                "cell of the last map"
            )

    @property
    def n_layers(self) -> int:
        """Blocks of all stages together."""
        return sum(self.stages)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """The number of each stage's last block, whose output is the stage's."""
        return tuple(end - 1 for end in accumulate(self.stages))

    @property
    def stride(self) -> int:
        """Pixels along one side of a cell of the last map, 32 for four stages."""
        return int(2 ** (len(self.stages) + 1))

    @property
    def d_model(self) -> int:
        """Channels of the last map, which the attention pool reads."""
        return self.width * self.stride

    @property
    def d_head(self) -> int:
        """Width of one head of the attention pool."""
        return self.d_model // self.n_heads

    @property
    def n_key_value_heads(self) -> int:
        """Heads of keys and values: one to each head of queries."""
        return self.n_heads

    @property
    def grid(self) -> int:
        """Cells along one side of the last map."""
        return self.image_size // self.stride

    @property
    def n_ctx(self) -> int:
        """Positions of the attention pool: the cells, and their mean in front."""
        return self.grid**2 + 1


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """A CLIP (arXiv 2103.00020).

    Attributes:
        vision: the image encoder, a vision transformer or a ResNet.
        text: the text encoder.
        d_proj: width of the space that both project to.
        eos_token_id: the token at which a text is read, where it stands first; 2 means the highest
            id of the text, as in configurations that were written before that number was right.
        bos_token_id: first token of a text.
        pad_token_id: what fills up shorter texts.
        task: what the model does, always `clip`.
    """

    vision: VisionConfig | ResNetConfig
    text: TokenConfig
    d_proj: int
    eos_token_id: int
    bos_token_id: int
    pad_token_id: int
    task: Literal["clip"] = "clip"


@dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """A LLaVA-1.5 (arXiv 2310.03744) or a LLaVA-NeXT, which reads tiles of an image, too.

    Attributes:
        vision: CLIP's image encoder, up to the block that is read.
        text: the language model.
        language: whose it is, which decides on its `config.json`, and on the prompt where the
            processor has no template.
        image_token_id: the token in whose place a feature of an image is read.
        feature_strategy: which positions of the image encoder are read: `default` leaves out the
            class token, `full` reads it too.
        projector_activation: name of the projector's activation.
        tied: whether the unembedding is the token embeddings' matrix.
        bos_token_id: first token of a text.
        eos_token_id: what ends a text.
        pad_token_id: what fills up shorter texts.
        resolutions: (height, width) in pixels of what LLaVA-NeXT cuts into tiles, each of the size
            of a picture of the image encoder; None for LLaVA-1.5.
        task: what the model does, always `llava`.
    """

    vision: VisionConfig
    text: LlamaConfig
    language: Literal["llama", "mistral"]
    image_token_id: int
    feature_strategy: Literal["default", "full"]
    projector_activation: str
    tied: bool
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    resolutions: tuple[tuple[int, int], ...] | None = None
    task: Literal["llava"] = "llava"

    def __post_init__(self) -> None:
        if self.resolutions is None:
            return
        side = self.vision.image_size
        odd = [size for size in self.resolutions if min(size) < 1 or any(x % side for x in size)]
        if odd or not self.resolutions:
            raise ValueError(
                f"resolutions={self.resolutions}: it takes one at least, each of whole tiles of "
                f"{side} x {side} pixels"
            )
        if self.feature_strategy == "full":
            raise ValueError(
                "feature_strategy='full' puts a class token among the rows of a tile: with "
                "resolutions it is 'default'"
            )

    @property
    def n_image_tokens(self) -> int:
        """Positions of the language model that one image takes; of LLaVA-NeXT, one view of it."""
        return self.vision.n_ctx - (self.feature_strategy == "default")
