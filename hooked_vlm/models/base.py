"""What every model of the zoo can do: load, prepare inputs, run hooked, resume, generate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel

from hooked_vlm.components.blocks import Door
from hooked_vlm.components.stack import Stack
from hooked_vlm.hub import Located, locate
from hooked_vlm.models.cache import ActivationCache
from hooked_vlm.models.flow import Base, Flow, Recording, Resuming
from hooked_vlm.models.hooked import HookedModel, Hooks
from hooked_vlm.models.inputs import Geometry, ImageLike, check_texts, open_images
from hooked_vlm.models.loading import assign, save
from hooked_vlm.models.names import Names, Site
from weights_conversion import Checkpoint, ConversionError, InMemory, revert
from weights_conversion.rules import Rule


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
        cls,
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
    ) -> Self:
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
        hf_config = None if located.config is None else _read_json(located.config)
        processor = cls._find_processor(processor, located, checkpoint, download)
        cfg, rules = cls._read_layout(checkpoint, hf_config, task, config or {}, processor)
        with torch.device("meta"):
            model = cls(cfg)
        assign(model, checkpoint, rules, dtype, device)
        model.processor = processor
        model.provenance = {"model": located.name, "revision": revision, "task": cfg.task}
        return model.eval()

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, processor: Any = None) -> Self:
        """A hooked model of a transformers model in memory, sharing its weights.

        Args:
            hf_model: the model; of a PEFT model give `merge_and_unload()`.
            processor: what `prepare` shall use; without it `prepare` raises.

        Raises:
            weights_conversion.ConversionError: a model of another kind.
        """
        state = hf_model.state_dict()
        cfg, rules = cls._read_layout(
            InMemory(state), hf_model.config.to_dict(), None, {}, processor
        )
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
        cls, given: Any, located: Located, checkpoint: Checkpoint, download: dict[str, Any]
    ) -> Any:
        raise NotImplementedError

    @classmethod
    def _read_layout(
        cls,
        checkpoint: Checkpoint | InMemory,
        hf_config: Mapping[str, Any] | None,
        task: str | None,
        overrides: Mapping[str, Any],
        processor: Any,
    ) -> tuple[Any, list[Rule]]:
        raise NotImplementedError

    def _write_layout(self) -> tuple[dict[str, Any], list[Rule] | None]:
        raise NotImplementedError

    # --- inputs and texts

    def prepare(
        self,
        images: ImageLike | Sequence[ImageLike],
        text: str | Sequence[str],
        *,
        first_token: Literal["cls", "enc"] = "cls",
    ) -> BatchEncoding:
        """Images and texts to inputs of the model, on its device, by its own processor.

        Args:
            images: PIL images or paths; one image may go with several texts.
            text: one text or one per image.
            first_token: `cls` leaves `[CLS]` in front, as transformers' processor does; `enc` puts
                BLIP's `[ENC]` there, as its training and its retrieval evaluation did.

        Returns:
            `pixel_values`, `input_ids`, `attention_mask`, and as attributes `geometry` (one per
            image) and `first_token`.

        Raises:
            ValueError: no processor, something that is no image, an empty text, a text longer than
                the position table, or numbers of images and texts that do not match.
        """
        texts, pictures = check_texts(text), open_images(images)
        if len(pictures) not in (1, len(texts)):
            raise ValueError(f"{len(pictures)} images do not match {len(texts)} texts")
        processor = self._processor
        encoded = processor.tokenizer(
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
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        inputs = BatchEncoding({"pixel_values": pixels.to(self.dtype), **encoded}).to(self.device)
        inputs.geometry = [
            Geometry(picture.size, (0, 0, *map(float, picture.size))) for picture in pictures
        ]
        inputs.first_token = first_token
        return inputs

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
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end=not bwd_hooks):
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ConversionError(f"{file} is no JSON: {error}") from error
