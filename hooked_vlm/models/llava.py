"""LLaVA: a language model that reads features of images in place of some of its tokens.

Source: Liu et al., LLaVA (arXiv 2304.08485), sec. 4.1, LLaVA-1.5 (arXiv 2310.03744), sec. 3.3, and
LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next), which has no paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding, GenerationConfig, LlamaConfig, PreTrainedModel

from hooked_vlm.components.hook_point import HookPoint, telling
from hooked_vlm.components.mlp import MLP
from hooked_vlm.components.past import Growing, Past
from hooked_vlm.components.stack import LlamaStack, VisionStack
from hooked_vlm.config import LlavaConfig
from hooked_vlm.hub import Located
from hooked_vlm.models.flow import Flow, Merge, Recording, joined
from hooked_vlm.models.generation import Prefix, StepHooks, Writer, sizes
from hooked_vlm.models.inputs import followed, token_map
from hooked_vlm.models.llava_inputs import LlavaInputs
from hooked_vlm.models.tiling import NEWLINE, Tiling
from weights_conversion import llava as layout
from weights_conversion.llava_original import Tower

if TYPE_CHECKING:
    import pandas as pd


class HookedLlava(LlavaInputs):
    """LLaVA with every activation named; see `docs/names.md` for the names.

    Args:
        cfg: sizes. Weights are noise until they are loaded; `from_pretrained` does both.
    """

    LAYOUT = layout
    GLUE: ClassVar[dict[str, str]] = {"projector": "vision", "hook_image_embeds": "vision"}

    cfg: LlavaConfig
    image_newline: nn.Parameter | None  # [d_model], behind each row of a picture's tiles

    def __init__(self, cfg: LlavaConfig):
        super().__init__(cfg)
        self.vision = VisionStack(cfg.vision)
        self.projector = MLP(
            cfg.vision.d_model, cfg.text.d_model, cfg.projector_activation, cfg.text.d_model
        )
        self.hook_image_embeds = HookPoint()  # [image, image_pos, d_model]
        self.text = LlamaStack(cfg.text)
        self.unembed = nn.Linear(cfg.text.d_model, cfg.text.d_vocab, bias=False)
        if cfg.tied:
            self.unembed.weight = self.text.embed.weight
        newline = None if cfg.resolutions is None else nn.Parameter(torch.zeros(cfg.text.d_model))
        self.register_parameter("image_newline", newline)
        self.hook_logits = HookPoint()  # [batch, pos, d_vocab]
        self.requires_grad_(False)
        self.setup()

    def _find_more(self, located: Located, download: Mapping[str, Any]) -> None:
        if located.processor is not None:
            with suppress(OSError):  # a checkpoint without one
                self.generation_config = GenerationConfig.from_pretrained(
                    located.processor, **download
                )

    def _take_more(self, hf_model: PreTrainedModel) -> None:
        self.generation_config = deepcopy(getattr(hf_model, "generation_config", None))

    @classmethod
    def _tower(cls, names: Iterable[str], hf_config: Mapping[str, Any] | None) -> Tower | None:
        return layout.tower(names, hf_config)

    # --- the pass

    def forward(
        self,
        pixel_values: Float[Tensor, "image *tile 3 height width"] | None = None,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        return_type: Literal["logits", "loss"] | None = "logits",
        *,
        image_sizes: Int[Tensor, "image 2"] | None = None,
        logits_to_keep: int = 0,
        prefix: Prefix | None = None,
    ) -> Tensor | None:
        """Runs the model on texts and the images in them.

        Args:
            pixel_values: the images of all texts, in order, or those that every text reads; None
                for texts without an image. Of LLaVA-NeXT the views of each, the whole image first,
                filled up to the largest number of them.
            input_ids: texts, with as many image tokens as the images have features.
            attention_mask: 1 for a token, 0 for padding, on either side; all ones by default.
            return_type: `logits`; `loss` for the mean cross-entropy of the next token over those
                that are neither padding nor of an image; None for nothing.
            image_sizes: height and width of each image as it was before it became pixels of the
                model; of LLaVA-NeXT alone.
            logits_to_keep: of how many of the last positions to make logits; 0 for all.
            prefix: from `prefill`, what stands before the texts: one row, or one for each. Hooks
                see the new positions only, `hook.ctx["positions"]` holds their absolute numbers.

        Returns:
            Logits, [batch, pos, d_vocab], of the positions of `input_ids` that are kept.

        Raises:
            ValueError: inputs that do not fit the model or one another.
        """
        logits = self._run(
            logits_to_keep,
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_sizes=image_sizes,
            prefix=prefix,
        )
        if return_type == "logits":
            return logits
        if return_type is None:
            return None
        if return_type != "loss":
            raise ValueError(f"return_type is 'logits', 'loss' or None, not {return_type!r}")
        if logits_to_keep:
            raise ValueError("return_type='loss' reads all logits; leave logits_to_keep out")
        if prefix is not None:
            raise ValueError("return_type='loss' is of whole texts; leave prefix out")
        assert input_ids is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        told = mask.bool() & (input_ids != self.cfg.image_token_id)
        targets = input_ids[:, 1:].masked_fill(~(told[:, 1:] & mask[:, :-1].bool()), -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())

    def _flow(
        self,
        flow: Flow,
        *,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_sizes: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        if input_ids is None:
            raise ValueError("input_ids is missing: model.prepare(images, text) makes it of texts")
        self._check_text("input_ids", input_ids, attention_mask)
        merge = self._see(flow, pixel_values, image_sizes, input_ids)
        if prefix is None:
            return self._read(flow, input_ids, attention_mask, merge)
        if type(flow) is not Flow:
            raise ValueError("a base is made of whole texts: give base_run no prefix")
        before = prefix.before(len(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.cat([prefix.attention_mask[prefix.rows(len(mask))], mask], 1)
        _check_whole(mask)
        return self._read(flow, input_ids, mask, merge, before)

    def _read(
        self,
        flow: Flow,
        input_ids: Tensor,
        mask: Tensor | None,
        merge: Merge | None,
        past: Past | None = None,
    ) -> Tensor:
        """Logits of tokens and the images among them, behind what is past.

        Args:
            flow: the pass.
            input_ids: the new tokens, [batch, pos].
            mask: [batch, all positions], those in `past` included.
            merge: the images.
            past: keys and values of positions before these.
        """
        offset = 0 if past is None else past.length(0)
        at = torch.arange(offset, offset + input_ids.shape[1], device=input_ids.device)
        with ExitStack() as told:
            if past is not None:
                told.enter_context(telling(self, at))
                told.enter_context(telling(self.hook_logits, at[flow.readout]))
            states = flow.stack(
                "text",
                input_ids,
                mask=self.text.visible(input_ids, mask, offset),
                readout=flow.readout,
                merge=merge,
                past=past,
            )
            return self.hook_logits(self.unembed(states[:, flow.readout]))

    def _see(
        self,
        flow: Flow,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        input_ids: Tensor,
    ) -> Merge | None:
        """Runs the image encoder and the projector.

        Args:
            flow: the pass.
            pixel_values: as in `forward`.
            image_sizes: as in `forward`.
            input_ids: the texts, image tokens included.

        Returns:
            What of the features stands at which places; None without images.

        Raises:
            ValueError: image tokens and features do not match.
        """
        places = input_ids == self.cfg.image_token_id
        tilings = self._tilings(pixel_values, image_sizes)
        read = self._shown(tilings, places.device)
        images = self._images_of(places, list(map(len, read)))
        if pixel_values is None or not tilings:
            return None
        views = [1 if tiling is None else tiling.n_views for tiling in tilings]
        flow.stack("vision", _real(pixel_values, views), after=self._project)
        rows = torch.arange(sum(views), device=places.device).split(views)
        empty = rows[0][:0]
        merge = Merge(
            "vision", places, [torch.cat([empty, *rows[of.start : of.stop]]) for of in images]
        )
        if self.image_newline is None:
            return merge
        sizes = [n * self.cfg.n_image_tokens for n in views]
        shown = [
            joined([empty, *read[of.start : of.stop]], [0, *sizes[of.start : of.stop]])
            for of in images
        ]
        return replace(merge, read=shown, newline=self.image_newline)

    def _project(self, x: Tensor) -> Tensor:
        first = 1 if self.cfg.feature_strategy == "default" else 0
        return self.hook_image_embeds(self.projector(x[:, first:]))

    def _tilings(
        self, pixel_values: Tensor | None, image_sizes: Tensor | None
    ) -> list[Tiling | None]:
        """How each image is tiled; None for one that is not."""
        cfg = self.cfg
        n_images, n_sizes = (0 if x is None else len(x) for x in (pixel_values, image_sizes))
        if cfg.resolutions is None:
            if n_sizes:
                raise ValueError("image_sizes is for LLaVA-NeXT, this is a LLaVA-1.5; leave it out")
            return [None] * n_images
        if n_images != n_sizes:
            raise ValueError(
                f"there are {n_images} images and {n_sizes} image_sizes; LLaVA-NeXT tiles an image "
                "by its own height and width: model.prepare(images, text) gives both"
            )
        if pixel_values is None or image_sizes is None:
            return []
        sizes = [(height, width) for height, width in image_sizes.tolist()]
        if sizes and min(map(min, sizes)) < 1:
            raise ValueError(f"image_sizes is {sizes}: heights and widths start at 1")
        tilings = [Tiling.of(size, cfg.resolutions, cfg.vision.image_size) for size in sizes]
        most = max((tiling.n_views for tiling in tilings), default=0)
        if pixel_values.dim() != 5 or pixel_values.shape[1] < most:
            raise ValueError(
                f"pixel_values is {list(pixel_values.shape)}; images of (height, width) {sizes} "
                f"have up to {most} views: [image, view, 3, height, width]"
            )
        return [*tilings]

    def _shown(self, tilings: Sequence[Tiling | None], device: torch.device) -> list[Tensor]:
        """For each image which features of its views, counted through, stand among the tokens."""
        whole = torch.arange(self.cfg.n_image_tokens, device=device)
        grid = self.cfg.vision.grid
        return [whole if one is None else one.read(grid, device) for one in tilings]

    def _images_of(self, places: Tensor, sizes: list[int]) -> list[range]:
        """For each text the images in it.

        Args:
            places: [batch, pos], True for an image token.
            sizes: how many image tokens each image takes.
        """
        tokens = places.sum(1).tolist()
        ends, bounds = (list(accumulate(some, initial=0)) for some in (sizes, tokens))
        if ends[-1] == bounds[-1] and set(bounds) <= set(ends):
            at = [ends.index(bound) for bound in bounds]
            return list(map(range, at, at[1:]))
        if sizes and set(tokens) == {ends[-1]}:
            return [range(len(sizes))] * len(tokens)
        kinds = ", ".join(map(str, dict.fromkeys(sizes))) or self.cfg.n_image_tokens
        raise ValueError(
            f"the {len(places)} texts of input_ids hold {tokens} image tokens "
            f"({self.cfg.image_token_id}), but there are {len(sizes)} images of {kinds} features "
            "each; model.prepare(images, text) puts the right number"
        )

    def get_image_features(
        self,
        pixel_values: Float[Tensor, "image *tile 3 height width"],
        image_sizes: Int[Tensor, "image 2"] | None = None,
    ) -> list[Float[Tensor, "image_pos d_model"]]:
        """What the language model reads of images, one by one.

        Of LLaVA-1.5 that is the projector's output, of LLaVA-NeXT what is read of it, with the
        newlines.

        Args:
            pixel_values: as in `forward`.
            image_sizes: as in `forward`.
        """
        read = self._shown(self._tilings(pixel_values, image_sizes), pixel_values.device)
        sizes = list(map(len, read))
        flow = Flow(self.stacks, self._grad_wanted)
        ids = torch.full((1, sum(sizes)), self.cfg.image_token_id, device=pixel_values.device)
        merge = self._see(flow, pixel_values, image_sizes, ids)
        return [] if merge is None else list(merge.standing(flow.outputs["vision"]).split(sizes))

    # --- writing

    @torch.no_grad()
    def prefill(
        self,
        pixel_values: Float[Tensor, "image *tile 3 height width"] | None = None,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        image_sizes: Int[Tensor, "image 2"] | None = None,
    ) -> Prefix:
        """Reads the beginning of texts once, for `forward` and `generate` to continue many times.

        What standing hooks change is kept with it; it is stale when weights change.

        Args:
            pixel_values: as in `forward`.
            input_ids: as in `forward`.
            attention_mask: as in `forward`.
            image_sizes: as in `forward`.

        Raises:
            ValueError: as in `forward`.
        """
        recording = Recording(self.stacks, logits_to_keep=1, doors=False)
        logits = self._flow(
            recording,
            pixel_values=pixel_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_sizes=image_sizes,
        )
        assert input_ids is not None
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return Prefix(input_ids.clone(), mask.clone(), logits, recording.kept["text"].own)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Float[Tensor, "image *tile 3 height width"] | None = None,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        image_sizes: Int[Tensor, "image 2"] | None = None,
        prefix: Prefix | None = None,
        fwd_hooks: StepHooks = (),
        **generation: Any,
    ) -> Any:
        """Answers, by `transformers.GenerationMixin.generate`; hooks fire at every step.

        The first step reads the prompt, and its images; the later ones, whose keys and values are
        kept, see the new position only, and `hook.ctx["positions"]` holds its absolute number.
        Logits are made of the last position alone. Greedy unless `generation` or the checkpoint's
        `model.generation_config` say otherwise.

        Args:
            pixel_values: as in `forward`.
            input_ids: prompts, padded on the left; with `prefix`, what follows it, or None.
            attention_mask: 1 for a token, 0 for padding; all ones by default.
            image_sizes: as in `forward`.
            prefix: from `prefill`, what stands before; it can be continued again.
            fwd_hooks: hooks of every step, or a function from the step's number, from 0, to its
                hooks.
            **generation: `max_new_tokens`, `num_beams`, `do_sample`, ... as in transformers.

        Returns:
            What transformers returns: ids, [batch, pos], that begin with the prompt.

        Raises:
            ValueError: as in `forward`; padding between tokens; an option of `generate` that a step
                cannot serve.
        """
        if prefix is not None and input_ids is None:
            input_ids = prefix.input_ids[:, :0]
        if input_ids is None:
            raise ValueError("input_ids is missing: model.prepare(images, text) makes it of texts")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.shape[1] or prefix is None:
            self._check_text("input_ids", input_ids, attention_mask)
        n_rows, begin = len(input_ids), 0
        if prefix is not None:
            # The last position of a prefix that nothing follows is read again: it makes the logits.
            begin = prefix.length - (not input_ids.shape[1])
            if (prefix.input_ids[:, begin:] == self.cfg.image_token_id).any():
                raise ValueError("the prefix ends in an image; give input_ids that follow it")
            config = generation.get("generation_config") or self.generation_config
            if not generation.get("use_cache", getattr(config, "use_cache", True)):
                raise ValueError("use_cache=False keeps nothing; a prefix is kept: leave one out")
            if begin:
                generation["past_key_values"] = prefix.cache(n_rows, begin)
            rows = prefix.rows(n_rows)
            input_ids = torch.cat([prefix.input_ids[rows], input_ids], 1)
            attention_mask = torch.cat([prefix.attention_mask[rows], attention_mask], 1)
        _check_whole(F.pad(attention_mask, (0, 1), value=1))

        def step(ids: Tensor, mask: Tensor | None, past: Past) -> Tensor:
            flow, merge = Flow(self.stacks, logits_to_keep=1), None
            if past.length(0) == begin:
                if isinstance(past, Growing) and begin:
                    past.spread(len(ids))
                each = len(ids) // n_rows  # beams of a prompt
                rows = torch.arange(len(ids), device=self.device) // each
                merge = self._see(flow, pixel_values, image_sizes, ids[::each])
                merge = None if merge is None else merge.of(rows)
            return self._read(flow, ids, mask, merge, past)

        config = LlamaConfig(
            **sizes(self.cfg.text),
            num_key_value_heads=self.cfg.text.n_key_value_heads,
            head_dim=self.cfg.text.d_head,
            bos_token_id=self.cfg.bos_token_id,
            eos_token_id=self.cfg.eos_token_id,
            pad_token_id=self.cfg.pad_token_id,
        )
        writer = Writer(self, step, config, self.generation_config, fwd_hooks)
        return writer.write(input_ids=input_ids, attention_mask=attention_mask, **generation)

    # --- inputs

    def continued(self, inputs: Mapping[str, Any], ids: Sequence[int]) -> dict[str, Any]:
        """Inputs behind which some tokens of the answer stand; see `HookedVLM.continued`."""
        return followed(inputs, ids, "input_ids", "attention_mask")

    def token_map(self, inputs: BatchEncoding) -> pd.DataFrame:
        """What stands at every position of every stack that `prepare` filled.

        Args:
            inputs: from `prepare`.

        Returns:
            As for the other models, and `image`, the number of the image, and `tile`, that of its
            view: 0 is the whole image, then LLaVA-NeXT's tiles, row by row. A row of `vision` is a
            view. A position of `text` where a feature of an image stands has its patch and box,
            too; where a newline stands, `image` alone. Boxes end outside of the image where the
            processor pads it.
        """
        return super().token_map(inputs)

    def _token_map(
        self, inputs: BatchEncoding, to_str: Callable[[Tensor], list[str]]
    ) -> pd.DataFrame:
        places = inputs["input_ids"] == self.cfg.image_token_id
        n_ctx, size = self.cfg.vision.n_ctx, self.cfg.n_image_tokens
        tilings = self._tilings(inputs.get("pixel_values"), inputs.get("image_sizes"))
        read = [one.tolist() for one in self._shown(tilings, places.device)]
        views = [1 if one is None else one.n_views for one in tilings]
        starts = list(accumulate(views, initial=0))
        standing: dict[tuple[int, int], tuple[int, int | None]] = {}
        for row, images in enumerate(self._images_of(places, list(map(len, read)))):
            features = [(starts[image], feature) for image in images for feature in read[image]]
            at = places[row].nonzero().flatten().tolist()
            for position, (first, feature) in zip(at, features, strict=True):
                view, patch = divmod(feature, size)
                standing[row, position] = (
                    (first, None) if feature == NEWLINE else (first + view, n_ctx - size + patch)
                )
        return token_map(inputs, self.cfg.vision.grid, to_str, self.stacks, standing)


def _check_whole(mask: Tensor) -> None:
    """Refuses padding inside of a text: rotary positions would count it as a distance.

    Raises:
        ValueError: it names the rows.
    """
    hole = (mask == 0) & (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
    if rows := hole.any(1).nonzero().flatten().tolist():
        raise ValueError(
            f"rows {rows} have padding between their tokens, which would count as distance: pad "
            "prompts of generate on the left, continue a prefix that is not padded on the right, "
            "with texts of one length, or in forward padded on the right"
        )


def _real(pixel_values: Tensor, views: list[int]) -> Tensor:
    """The images' own views, one behind the other, without what fills up their number."""
    if pixel_values.dim() == 4:
        return pixel_values
    return torch.cat([image[:n] for image, n in zip(pixel_values, views, strict=True)])
