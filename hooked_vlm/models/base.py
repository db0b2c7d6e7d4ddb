"""What every model of the zoo can do: load, prepare inputs, run hooked, resume, generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel

from hooked_vlm.components.blocks import Door
from hooked_vlm.components.stack import Stack
from hooked_vlm.hub import locate
from hooked_vlm.models.cache import ActivationCache
from hooked_vlm.models.flow import Base, Flow, Recording, Resuming
from hooked_vlm.models.hooked import HookedModel, Hooks
from hooked_vlm.models.inputs import Geometry, ImageLike, check_texts, open_images, token_map
from hooked_vlm.models.loading import assign
from hooked_vlm.models.names import Names, Site
from weights_conversion import Checkpoint, InMemory, revert
from weights_conversion.files import read_json, save
from weights_conversion.rules import Rule

if TYPE_CHECKING:
    import pandas as pd

Model = TypeVar("Model", bound="HookedVLM")  # not Self: the tests' type checker cannot read it


class HookedVLM(HookedModel):
    """A vision-language model of named stacks, every activation of which can be read and written.

    A subclass says what its stacks are, in the order in which they run, and how one forward pass
    goes through them (`_flow`). Everything here follows from that.
    """

    # The stack behind which each part of the glue is computed.
    GLUE: ClassVar[dict[str, str]]

    cfg: Any
    processor: Any = None
    provenance: dict[str, Any]

    @property
    def stacks(self) -> dict[str, Stack[Any]]:
        """The stacks by name, in the order in which they run."""
        return {name: m for name, m in self.named_children() if isinstance(m, Stack)}

    @property
    def task(self) -> str:
        """What the checkpoint was trained for."""
        return str(self.cfg.task)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return next(self.parameters()).dtype

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
        task: str | None = None,
        processor: str | Path | Any = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Model:
        """Opens a checkpoint.

        Args:
            name_or_path: a packaged toy, a folder, a released file, or a name on the Hub.
            revision: as in transformers, for Hub names; likewise `cache_dir`, `token` and
                `local_files_only`.
            dtype: what to convert the weights to; by default they stay as they are, memory-mapped.
            device: where to put them; by default the CPU.
            cache_dir: see `revision`.
            token: see `revision`.
            local_files_only: see `revision`.
            task: which task, where the tensors allow several.
            processor: a processor, or where to get one; by default the checkpoint's own.
            config: fields by stack that a bare file cannot tell, `{"text": {"n_heads": 4}}`.

        Returns:
            The model, in evaluation mode, with frozen parameters.

        Raises:
            FileNotFoundError: no such checkpoint, or no tokenizer for a bare file.
            weights_conversion.ConversionError: files that are cut short, that hold code, or whose
                tensors do not fit; the message names them.
        """
        download = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        located = locate(name_or_path, **download)
        checkpoint = Checkpoint(located.files)
        download["revision"] = located.revision
        hf_config = None if located.config is None else read_json(located.config)
        cfg, rules = cls._read_layout(checkpoint, hf_config, task, config or {})
        processor, cfg = cls._find_processor(processor, located.processor, cfg, download)
        with torch.device("meta"):
            model = cls(cfg)
        assign(model, checkpoint, rules, dtype, device)
        model.processor = processor
        model.provenance = {"model": located.name, "revision": located.revision, "task": cfg.task}
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
        state = hf_model.state_dict()
        cfg, rules = cls._read_layout(InMemory(state), hf_model.config.to_dict(), None, {})
        with torch.device("meta"):
            model = cls(cfg)
        assign(model, InMemory(state), rules, None, None)
        model.processor = processor
        model.provenance = {"model": type(hf_model).__name__, "revision": None, "task": cfg.task}
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model where transformers and `from_pretrained` read it, bit for bit.

        Where transformers has no class for these sizes, the folder is of our own layout, which
        `from_pretrained` reads.

        Args:
            folder: where to.
        """
        config, rules = self._write_layout()
        state = dict(self.named_parameters())
        save(folder, state if rules is None else revert(state, rules), config, self.processor)

    @classmethod
    def _find_processor(
        cls, given: Any, own: str | None, cfg: Any, download: dict[str, Any]
    ) -> tuple[Any, Any]:
        raise NotImplementedError

    @classmethod
    def _read_layout(
        cls,
        checkpoint: Checkpoint | InMemory,
        hf_config: Mapping[str, Any] | None,
        task: str | None,
        overrides: Mapping[str, Any],
    ) -> tuple[Any, list[Rule]]:
        raise NotImplementedError

    def _write_layout(self) -> tuple[dict[str, Any], list[Rule] | None]:
        raise NotImplementedError

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
            images: PIL images or paths; one image may go with several texts.
            text: one text or one per image; None where the model can do without.
            first_token: `cls` leaves `[CLS]` in front, as transformers' processor does; `enc` puts
                BLIP's `[ENC]` there, as its training and its retrieval evaluation did.

        Returns:
            `pixel_values`, `input_ids`, `attention_mask`, and as attributes `geometry` (one per
            image) and `first_token`.

        Raises:
            ValueError: no processor, something that is no image, an empty text, a text longer than
                the position table, or numbers of images and texts that do not match.
        """
        pictures, processor = open_images(images), self._processor
        encoded = {} if text is None else self._encode(check_texts(text), first_token)
        n_texts = len(encoded["input_ids"]) if encoded else len(pictures)
        if len(pictures) not in (1, n_texts):
            raise ValueError(f"{len(pictures)} images do not match {n_texts} texts")
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        inputs: Any = BatchEncoding({"pixel_values": pixels.to(self.dtype), **encoded})
        inputs = inputs.to(self.device)
        inputs.geometry = [
            Geometry(picture.size, (0.0, 0.0, *map(float, picture.size))) for picture in pictures
        ]
        inputs.first_token = first_token
        return inputs  # type: ignore[no-any-return]

    def _encode(self, texts: list[str], first_token: str) -> dict[str, Tensor]:
        encoded = self.tokenizer(
            texts, padding=True, return_tensors="pt", return_token_type_ids=False
        )
        limit = next(s.cfg.n_ctx for name, s in self.stacks.items() if name != "vision")
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
        return token_map(inputs, self.cfg.vision.grid, self.to_str_tokens, self.stacks)

    def prepare_prompt(
        self,
        images: ImageLike | Sequence[ImageLike],
        text: str | Sequence[str] | None,
        *,
        first_token: Literal["cls", "enc"] = "cls",
    ) -> BatchEncoding:
        """As `prepare`, so that the last position of the logits predicts the answer."""
        return self.prepare(images, text, first_token=first_token)

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
        ids = self.tokenizer(check_texts(text), padding=True, return_tensors="pt")["input_ids"]
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

    # --- forward, in one go, recorded, or resumed

    def _flow(self, flow: Flow, **inputs: Any) -> Tensor:
        """One forward pass, as calls of `flow.stack`, from the inputs to the logits."""
        raise NotImplementedError

    def _run(self, **inputs: Any) -> Tensor:
        """A plain pass; what `torch.compile` made of it is left while anybody listens."""
        if self._anyone_listens():
            return self._run_eagerly(**inputs)
        return self._flow(Flow(self.stacks), **inputs)

    @torch.compiler.disable
    def _anyone_listens(self) -> bool:
        return any(point.listening for point in self.hook_points())

    @torch.compiler.disable
    def _run_eagerly(self, **inputs: Any) -> Tensor:
        return self._flow(Flow(self.stacks, self._grad_wanted), **inputs)

    @property
    def _grad_wanted(self) -> bool:
        return torch.is_grad_enabled() and any(
            point._backward_hooks for point in self.hook_points()
        )

    @torch.no_grad()
    def base_run(self, *, names_filter: Names | bool = False, **inputs: Any) -> Base:
        """Runs the model once and keeps what later runs may reuse.

        Args:
            names_filter: activations to cache besides, as in `run_with_cache`; False for none.
            **inputs: as in `forward`. One image may serve a batch of texts.

        Returns:
            A base for `resume`: logits, the stream at each part's door, and the keys and values of
            cross-attention.
        """
        fingerprint = self._fingerprint(inputs)
        recording = Recording(self.stacks)
        names = None if names_filter is True else names_filter
        entries, hooks, _ = self.get_caching_hooks(names) if names is not False else ({}, [], [])
        with self.hooks(hooks):
            logits = self._flow(recording, **inputs)
        self.is_caching = False
        cache = ActivationCache(entries, self)
        return Base(inputs, logits, recording.kept, cache, fingerprint)

    def resume(
        self,
        base: Base,
        site: str | Site | Sequence[str | Site],
        *,
        rows: Sequence[int] | Tensor | None = None,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
    ) -> Tensor:
        """Continues a base from the earliest of some sites on; computes only what they reach.

        Points before the part of the block that holds the site do not fire. A change at the site
        comes from `fwd_hooks`, which may name that part's points and later ones.

        Args:
            base: from `base_run`.
            site: one or several hook names or sites.
            rows: for each row of the new batch the base's row that it continues; by default the
                base's rows as they are. Rows that share an image share its keys and values.
            fwd_hooks: as in `run_with_hooks`.
            bwd_hooks: as in `run_with_hooks`.
            reset_hooks_end: whether these hooks go when the pass ends; backward hooks must stay
                until the backward pass.

        Returns:
            Logits, [len(rows), ...], equal to those of a full pass with the same hooks.

        Raises:
            KeyError: no such site.
            ValueError: the base's weights, inputs or standing hooks have changed, a row is not
                in it, or a hook names a point before the site.
        """
        if self._fingerprint(base.inputs) != base.fingerprint:
            raise ValueError(
                "weights, inputs or standing hooks have changed since base_run made this base; "
                "make a new one"
            )
        sites = [site] if isinstance(site, str | Site) else list(site)
        names = [one.name if isinstance(one, Site) else one for one in sites]
        found = [name for glob in names for name in self.hook_dict.match(glob)]
        start = min((self._place(name) for name in found), key=self._order)
        n_rows = len(base.logits)
        chosen = torch.as_tensor(range(n_rows) if rows is None else rows, device=self.device)
        if chosen.numel() == 0 or chosen.min() < 0 or chosen.max() >= n_rows:
            raise ValueError(f"rows must name rows of the base, 0 to {n_rows - 1}: {rows}")
        for asked, _ in (*fwd_hooks, *bwd_hooks):
            for name in self.hook_dict.match(asked):
                if self._order(self._place(name)) < self._order(start):
                    raise ValueError(
                        f"a hook at {name!r} would not fire: the pass resumes at {names[0]!r}; "
                        "name it among the sites"
                    )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end):
            flow = Resuming(self.stacks, base, *start, chosen, self._grad_wanted)
            return self._flow(flow, **base.inputs)

    def _place(self, name: str) -> tuple[str, Door | None]:
        """The stack and the door from which a pass must be run for a hook to matter."""
        site = Site.parse(name)
        if site.layer is not None:
            block = self.stacks[site.stack].blocks[site.layer]
            return site.stack, (site.layer, block.PARTS.get(site.component.split(".")[0], "attn"))
        top = name.partition(".")[0]
        if top == "hook_logits":
            top = list(self.stacks)[-1]
            return top, (self.stacks[top].cfg.n_layers, "attn")
        if top in self.GLUE or name.startswith(tuple(f"{s}.ln_final" for s in self.stacks)):
            stack = self.GLUE.get(top, top)
            return stack, (self.stacks[stack].cfg.n_layers, "attn")
        return top, None

    def stack_of(self, name: str) -> str:
        """The stack that a hook point belongs to, or behind which it is computed."""
        return self._place(name)[0]

    def order_of(self, name: str) -> tuple[int, int, int]:
        """Where a pass resumes for a hook point; equal for points that can be swept together."""
        return self._order(self._place(name))

    def _order(self, place: tuple[str, Door | None]) -> tuple[int, int, int]:
        stack, door = place
        layer, part = door or (-1, "attn")
        return list(self.stacks).index(stack), layer, ("attn", "cross_attn", "mlp").index(part)

    def _fingerprint(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        tensors = [*self.parameters(), *(t for t in inputs.values() if isinstance(t, Tensor))]
        hooks = [
            (point.name, tuple(point._forward_hooks), tuple(point._backward_hooks))
            for point in self.hook_points()
            if point.listening
        ]
        return tuple((t.data_ptr(), t._version) for t in tensors), tuple(hooks)

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

    # --- what TransformerLens hands expect

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embeddings of the last stack, the one that the output is read from."""
        return list(self.stacks.values())[-1].W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, of what BERT's prediction head makes of the last stack's output."""
        return self._unembedding.weight.mT

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias."""
        return self._unembedding.bias

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """Columns of `W_U`: the directions that raise the logits of tokens."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.mT[tokens]

    @property
    def _unembedding(self) -> nn.Linear:
        if "unembed" not in self._modules:
            raise ValueError(f"a model for task {self.task!r} predicts no tokens: it has no W_U")
        return self.unembed.out  # type: ignore[no-any-return]
