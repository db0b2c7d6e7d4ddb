"""What every model of the zoo can do: load, prepare inputs, run hooked, resume, generate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel

from hooked_vlm.components.attention import bias_of
from hooked_vlm.components.stack import TokenStack, Unembed
from hooked_vlm.hub import Located, locate, locate_tower
from hooked_vlm.models.caching import cache_dataset
from hooked_vlm.models.dataset import ActivationDataset
from hooked_vlm.models.inputs import (
    Geometry,
    ImageLike,
    check_texts,
    open_images,
    token_map,
    visible,
)
from hooked_vlm.models.loading import Loading, assign
from hooked_vlm.models.names import Names
from hooked_vlm.models.resumable import ResumableModel
from weights_conversion import Checkpoint, ConversionError, InMemory, families, revert
from weights_conversion.files import read_json, save
from weights_conversion.llava_original import TOWER, Tower
from weights_conversion.llava_processor import Source

if TYPE_CHECKING:
    import pandas as pd

Model = TypeVar("Model", bound="HookedVLM")  # not Self: the tests' type checker cannot read it


class HookedVLM(ResumableModel):
    """A vision-language model of named stacks, every activation of which can be read and written.

    A subclass says what its stacks are, in the order in which they run, and how one forward pass
    goes through them (`_flow`). Everything here follows from that.
    """

    LAYOUT: ModuleType  # its module in weights_conversion: read, write, find_processor

    cfg: Any
    processor: Any = None
    generation_config: GenerationConfig | None = None  # where `generate` heeds a checkpoint's own
    provenance: dict[str, Any]

    def __init__(self, cfg: Any):
        super().__init__()
        self.cfg = cfg
        self.provenance = {"model": type(self).__name__, "revision": None, "task": cfg.task}

    @property
    def task(self) -> str:
        """What the checkpoint was trained for."""
        return str(self.cfg.task)

    # --- loading and saving

    @classmethod
    def from_pretrained(
        cls: type[Model],
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | Path | None = None,
        quantization_config: Any = None,
        task: str | None = None,
        processor: str | Path | Any = None,
        vision_tower: str | Path | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Model:
        """Opens a checkpoint; `HookedVLM.from_pretrained` itself finds the class that it needs.

        Args:
            name_or_path: a packaged toy, a folder, a released file, or a name on the Hub.
            revision: as in transformers, for Hub names; likewise `cache_dir`, `token` and
                `local_files_only`.
            dtype: what to convert the weights to; by default they stay as they are, memory-mapped.
            device: where to put them; by default the CPU.
            cache_dir: see `revision`.
            token: see `revision`.
            local_files_only: see `revision`.
            device_map: over several devices, instead of `device`, as in transformers: `auto`,
                `balanced`, `balanced_low_0`, `sequential`, or a dictionary from modules (`text`,
                `text.blocks.3`, `""` for the rest) to devices, `cpu` or `disk`.
            max_memory: with `device_map`, what each device may hold: `{0: "20GB", "cpu": "8GB"}`.
            offload_folder: with `device_map`, where weights for the `disk` are written that are
                not there in the `dtype`.
            quantization_config: a `transformers.TorchAoConfig`: of how many bits the weights of
                linear layers inside the blocks of text stacks are (`hooked-vlm[quantized]`).
            task: which task, where the tensors allow several.
            processor: a processor, or where to get one; by default the checkpoint's own.
            vision_tower: where the image encoder is, a folder or a name on the Hub, for files of
                LLaVA's own repository, which leave it out; by default where their `config.json`
                says.
            config: fields by stack that a bare file cannot tell, `{"text": {"n_heads": 4}}`.

        Returns:
            The model, in evaluation mode, with frozen parameters.

        Raises:
            FileNotFoundError: no such checkpoint, no tokenizer for a bare file, or no image encoder
                for files of LLaVA's own repository.
            weights_conversion.ConversionError: files that are cut short, that hold code, or whose
                tensors do not fit; the message names them.
            ValueError: a device that is not there, a dtype that it cannot compute in, a map that
                does not fit the model or the memory.
            ImportError: `quantization_config` without torchao.
        """
        how = Loading(dtype, device, device_map, max_memory, offload_folder, quantization_config)
        download: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        located = locate(name_or_path, **download)
        checkpoint = Checkpoint(located.files)
        hf_config = None if located.config is None else read_json(located.config)
        kind = cls._kind(checkpoint.shapes, hf_config)
        own: Any = located.processor
        towers: dict[str, str | None] = {}
        if tower := kind._tower(checkpoint.shapes, hf_config):
            beside = locate_tower(
                tower, located.name, vision_tower, **download | {"revision": None}
            )
            # Released towers are of a wider type than the rest; the original code rounds them.
            how = replace(how, dtype=dtype or checkpoint.dtype)
            checkpoint.add(beside.files, prefix=TOWER)
            assert hf_config and beside.config and beside.processor  # none of them is a bare file
            hf_config |= {"vision_config": read_json(beside.config)}
            own = Source(own, beside.processor, beside.revision, hf_config)
            towers = {"vision_tower": beside.name, "vision_tower_revision": beside.revision}
        elif vision_tower is not None:
            raise ConversionError(
                "vision_tower= is for files of LLaVA's own repository; this checkpoint holds its "
                "image encoder itself"
            )
        download["revision"] = located.revision
        cfg, rules = kind.LAYOUT.read(checkpoint, hf_config, task, config or {})
        processor, cfg = kind.LAYOUT.find_processor(processor, own, cfg, **download)
        with torch.device("meta"):
            model = kind(cfg)
        assign(model, checkpoint, rules, how)
        model.processor = processor
        model.provenance |= {"model": located.name, "revision": located.revision, **towers}
        if quantization_config is not None:
            model.provenance["quantization"] = str(quantization_config.quant_type)
        model._find_more(located, download)
        return model.eval()

    @classmethod
    def from_hf(cls: type[Model], hf_model: PreTrainedModel, processor: Any = None) -> Model:
        """A hooked model of a transformers model in memory, sharing its weights.

        Args:
            hf_model: the model; of a PEFT model give `merge_and_unload()`.
            processor: what `prepare` shall use; without it `prepare` raises.

        Raises:
            weights_conversion.ConversionError: a model of another kind.
        """
        state, hf_config = hf_model.state_dict(), hf_model.config.to_dict()
        kind = cls._kind(state, hf_config)
        cfg, rules = kind.LAYOUT.read(InMemory(state), hf_config, None, {})
        with torch.device("meta"):
            model = kind(cfg)
        assign(model, InMemory(state), rules)
        model.processor = processor
        model.provenance["model"] = type(hf_model).__name__
        model._take_more(hf_model)
        return model.eval()

    def _find_more(self, located: Located, download: Mapping[str, Any]) -> None:
        """Reads what else lies beside the weights."""

    def _take_more(self, hf_model: PreTrainedModel) -> None:
        """Takes what else a transformers model in memory has."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model where transformers and `from_pretrained` read it, bit for bit.

        Where transformers has no class for these sizes, the folder is of our own layout, which
        `from_pretrained` reads.

        Args:
            folder: where to.

        Raises:
            ValueError: quantised weights, for which the layouts have no place.
        """
        if any(is_traceable_wrapper_subclass(weight) for weight in self.parameters()):
            raise ValueError(
                "quantised weights are not saved; save the model as it is without "
                "quantization_config=, and quantise on loading"
            )
        config, rules = self.LAYOUT.write(self.cfg)
        state = dict(self.named_parameters())
        made = state if rules is None else revert(state, rules)
        save(folder, made, config, self.processor, self.generation_config)

    @classmethod
    def _tower(cls, names: Iterable[str], hf_config: Mapping[str, Any] | None) -> Tower | None:
        """The image encoder that a checkpoint leaves to one of its own, None where it is whole."""
        return None

    @classmethod
    def _kind(
        cls: type[Model], names: Iterable[str], hf_config: Mapping[str, Any] | None
    ) -> type[Model]:
        """The class itself; the checkpoint's own where `HookedVLM` was asked."""
        if cls is not HookedVLM:
            return cls
        family = families.family(names, hf_config)
        if family is None:
            known = ", ".join(families.CLASSES.values())
            raise ConversionError(f"this checkpoint is of none of the zoo's classes, {known}")
        module = importlib.import_module(f"hooked_vlm.models.{family}")
        found: type[Model] = getattr(module, families.CLASSES[family])
        return found

    # --- inputs and texts

    def prepare(
        self,
        images: ImageLike | Sequence[ImageLike],
        text: str | Sequence[str] | None = None,
        *,
        first_token: Literal["cls", "enc"] = "cls",
    ) -> BatchEncoding:
        """Images and texts to inputs of the model, on its device, by its own processor.

        Args:
            images: PIL images or paths; one image may go with several texts, one text with several
                images.
            text: texts; None where the model can do without, for captioning.
            first_token: `cls` leaves `[CLS]` in front, as transformers' processor does; `enc` puts
                BLIP's `[ENC]` there, as its training and its retrieval evaluation did.

        Returns:
            `pixel_values`, `input_ids`, `attention_mask`, and as attributes `geometry` (one per
            image) and `first_token`.

        Raises:
            ValueError: no processor, something that is no image, an empty text, a text longer than
                the position table, or numbers of images and texts that do not match.
        """
        if text is None and self.task != "captioning":
            raise ValueError(f"a model for task {self.task!r} needs a text")
        pictures, processor = open_images(images), self._processor
        texts = None if text is None else self._match(check_texts(text), len(pictures))
        encoded = {} if texts is None else self._encode(texts, first_token)
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        inputs = BatchEncoding({"pixel_values": pixels.to(self.dtype), **encoded}).to(self.device)
        geometry = [
            Geometry(picture.size, visible(picture.size, processor.image_processor))
            for picture in pictures
        ]
        # Attributes, no entries: `model(**inputs)` must not get them.
        vars(inputs).update(geometry=geometry, first_token=first_token)
        return inputs

    def _match(self, texts: list[str], n_images: int) -> list[str]:
        """The texts, one for each image or all for one image."""
        if len(texts) == 1:
            texts *= n_images
        if n_images not in (1, len(texts)):
            raise ValueError(f"{n_images} images do not match {len(texts)} texts")
        return texts

    def _clean(self, texts: list[str]) -> list[str]:
        """Texts as the tokenizer shall get them."""
        return texts

    def _encode(self, texts: list[str], first_token: str) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            self._clean(texts), padding=True, return_tensors="pt", return_token_type_ids=False
        )
        limit = next(s.cfg.n_ctx for s in self.stacks.values() if isinstance(s, TokenStack))
        if encoded["input_ids"].shape[1] > limit:
            longest = max(texts, key=len)
            raise ValueError(
                f"a text has {encoded['input_ids'].shape[1]} tokens, the model reads {limit}; "
                f"shorten {longest[:60]!r}"
            )
        if first_token == "enc":
            encoded["input_ids"][:, 0] = self.to_single_token("[ENC]")
        elif first_token != "cls":
            raise ValueError(f"first_token is 'cls' or 'enc', not {first_token!r}")
        return dict(encoded)

    def token_map(self, inputs: BatchEncoding) -> pd.DataFrame:
        """What stands at every position of every stack that `prepare` filled.

        Args:
            inputs: from `prepare`.

        Returns:
            One line per stack, row of the batch and position: its `token`, or the `patch_row` and
            `patch_column` of the image and its box in pixels of the original image (`left`,
            `top`, `right`, `bottom`); the class token has neither.
        """
        return self._token_map(inputs, self.to_str_tokens)

    def _token_map(
        self, inputs: BatchEncoding, to_str: Callable[[Tensor], list[str]]
    ) -> pd.DataFrame:
        """The same, of texts whose tokens `to_str` names."""
        return token_map(inputs, self.cfg.vision.grid, to_str, self.stacks)

    def prepare_prompt(
        self,
        images: ImageLike | Sequence[ImageLike],
        text: str | Sequence[str] | None,
        *,
        first_token: Literal["cls", "enc"] = "cls",
    ) -> BatchEncoding:
        """As `prepare`, so that the last position of the logits predicts the answer."""
        return self.prepare(images, text, first_token=first_token)

    def prompt_parts(self, inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The positions of a prompt's parts by name, of one row of inputs; here, nothing is known.

        Args:
            inputs: from `prepare`.
        """
        return {}

    def cache_dataset(
        self,
        inputs: Iterable[Mapping[str, Any]],
        names: Names,
        out: str | Path,
        *,
        dtype: torch.dtype | None = None,
        progress: bool = True,
    ) -> ActivationDataset:
        """Writes the activations of a data set to a folder, one file of safetensors per batch.

        Called again with the same arguments, it goes on where it was stopped: batches that are
        there are not run again. More batches behind the same ones make it longer. Passes end at
        the last point that is wanted. One process at a time writes to a folder.

        Standing hooks take part. The points at which they may write are recorded, and must be the
        same when it goes on; what they write is not compared.

        Args:
            inputs: batches, from `prepare`.
            names: as in `run_with_cache`.
            out: an empty folder, or one that was begun.
            dtype: `torch.float64`, `float32`, `bfloat16` or `float16`, of what is written; by
                default as it is.
            progress: whether to show a bar.

        Raises:
            KeyError: a name that nothing matches, or that the pass does not reach.
            NotADirectoryError: the folder is a file.
            ValueError: a folder of another model, other weights, names, dtype, standing hooks or
                inputs, or of other files, of which nothing is changed; no batches, or fewer than
                the folder holds; activations that the dtype cannot hold.
            OSError: a file in the folder that is cut short.
        """
        return cache_dataset(self, inputs, names, out, dtype, progress)

    def continued(self, inputs: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
        """Inputs behind which some tokens of the answer stand, the same in every row.

        Args:
            inputs: from `prepare_prompt`, not padded on the right.
            ids: the tokens.

        Raises:
            ValueError: a model that predicts no tokens, or inputs that are padded on the right.
        """
        raise ValueError(f"a model for task {self.task!r} predicts no tokens: none can follow")

    @property
    def _processor(self) -> Any:
        if self.processor is None:
            raise ValueError(
                "this model has no processor; pass processor= to from_hf or from_pretrained, or "
                "set model.processor"
            )
        return self.processor

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self._processor.tokenizer

    def to_tokens(self, text: str | Sequence[str]) -> Int[Tensor, "batch pos"]:
        """Token ids of texts, special tokens included, padded."""
        texts = self._clean(check_texts(text))
        ids: Tensor = self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return ids.to(self.device)

    def to_str_tokens(self, text: str | Tensor) -> list[str]:
        """The tokens of one text, or of one row of ids, as strings."""
        ids = self.to_tokens(text)[0] if isinstance(text, str) else text.flatten()
        return list(self.tokenizer.convert_ids_to_tokens(ids.tolist()))

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: a text of several tokens, or one that the vocabulary does not hold.
        """
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(
                f"{text!r} is not one token but {self.tokenizer.convert_ids_to_tokens(ids)}"
            )
        return int(ids[0])

    def decode(self, ids: Int[Tensor, "batch pos"]) -> list[str]:
        """Texts of generated ids, special tokens dropped."""
        return [
            str(text).strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]

    # --- what TransformerLens hands expect

    def _check_text(self, name: str, ids: Tensor, mask: Tensor | None) -> None:
        """Refuses token ids that the model cannot read, and masks that do not fit them."""
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            raise ValueError(f"{name} must be integers [batch, pos], it is {list(ids.shape)}")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(
                f"the attention mask of {name} is {list(mask.shape)}, {name} is {list(ids.shape)}"
            )
        vocab = self.W_E.shape[0]
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"{name} has ids outside of the vocabulary, 0 to {vocab - 1}")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings of the last stack, the one that the output is read from."""
        embeddings: Tensor = list(self.stacks.values())[-1].W_E
        return embeddings

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding of the last stack's output, or of what BERT's head makes of it."""
        return self._unembedding.weight.mT

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias, zeros where it has none."""
        return bias_of(self._unembedding)

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """Columns of `W_U`: the directions that raise the logits of tokens."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.mT[tokens]

    @property
    def _unembedding(self) -> nn.Linear:
        unembed = self._modules.get("unembed")
        out = unembed.out if isinstance(unembed, Unembed) else unembed
        if not isinstance(out, nn.Linear):
            raise ValueError(f"a model for task {self.task!r} predicts no tokens: it has no W_U")
        return out
