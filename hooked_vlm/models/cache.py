"""Cached activations: TransformerLens' cache over all stacks, and its view of one of them."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import transformer_lens
from torch import Tensor, nn
from transformer_lens.utilities import get_act_name

from hooked_vlm.config import ResNetConfig
from hooked_vlm.models.names import head_of

if TYPE_CHECKING:
    from hooked_vlm.models.hooked import HookedModel


class ActivationCache(transformer_lens.ActivationCache):
    """Activations by hook name.

    `cache["text.blocks.3.cross_attn.heads.5.hook_z"]` is a view of the module's entry where that
    is there. The analysis methods of TransformerLens speak of one stack: they are on
    `cache.stack("text")`.
    """

    def __init__(
        self, cache_dict: dict[str, Tensor], model: HookedModel, has_batch_dim: bool = True
    ) -> None:
        self.cache_dict = cache_dict
        self.model: Any = model
        self.has_batch_dim = has_batch_dim
        self.has_embed = False
        self.has_pos_embed = False

    def __getitem__(self, key: Any) -> Tensor:
        if key in self.cache_dict:
            return self.cache_dict[key]
        if not isinstance(key, str):
            raise KeyError(
                f"{key!r}: short names speak of one stack, use cache.stack('text')[{key!r}]"
            )
        stem = key.removesuffix("_grad")
        of = head_of(stem)
        whole = None if of is None else of[0] + key[len(stem) :]
        if of is not None and whole in self.cache_dict and stem in self.model.hook_dict:
            axis = self.model.hook_dict[of[0]].head_axis
            return self.cache_dict[whole].select(axis - (not self.has_batch_dim), of[1])
        if stem in self.model.hook_dict:
            raise KeyError(f"{key!r} was not cached; name it in names_filter")
        raise KeyError(self.model.hook_dict.complaint(key))

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def stack(self, name: str) -> StackCache:
        """The entries of one stack under TransformerLens' names, with its analysis methods.

        Raises:
            KeyError: the model has no such stack.
        """
        return StackCache(self, name)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """The entries of some rows of the batch; see TransformerLens.

        Raises:
            ValueError: stacks whose numbers of rows differ, as where texts have several images.
        """
        rows = super().apply_slice_to_batch_dim(batch_slice)
        return ActivationCache(rows.cache_dict, self.model, rows.has_batch_dim)

    def _batch_size(self) -> int:
        # TransformerLens takes what most entries have. Here that may be the number of images.
        sizes = {len(value) for value in self.cache_dict.values()} - {1}
        if len(sizes) > 1:
            raise ValueError(
                f"the entries have {' or '.join(map(str, sorted(sizes)))} rows, since there are "
                "not as many images as texts; cache.stack('text') has rows of one kind"
            )
        return sizes.pop() if sizes else 1


class StackCache(transformer_lens.ActivationCache):
    """One stack's entries, with the prefix gone: `cache.stack("text")["z", 3, "cross_attn"]`.

    Three things are set right: what the final norm makes of a component includes its gain, the
    embedding entry is what block 0 reads, and the layer type `cross_attn` is heeded. In post-norm
    stacks a sum over layers is no decomposition of the output, and what rests on one refuses.
    """

    def __init__(self, cache: ActivationCache, name: str):
        stacks = cache.model.stacks
        if name not in stacks:
            raise KeyError(f"no stack {name!r}; this model has {', '.join(stacks)}")
        prefix = f"{name}."
        self.name = name
        mine = {key: value for key, value in cache.cache_dict.items() if key.startswith(prefix)}
        self._whole = ActivationCache(mine, cache.model, cache.has_batch_dim)
        self.cache_dict = {key.removeprefix(prefix): value for key, value in mine.items()}
        self.model: Any = stacks[name]
        self.has_batch_dim = cache.has_batch_dim
        self.has_embed = "hook_embed" in self.cache_dict
        self.has_pos_embed = "hook_pos_embed" in self.cache_dict

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, tuple):
            name, layer, layer_type = (*key, None, None)[:3]
            if layer is not None and layer < 0:
                layer += self.model.cfg.n_layers
            short = get_act_name(name, layer, layer_type)
            key = short.replace(".attn.", ".cross_attn.") if layer_type == "cross_attn" else short
        elif isinstance(key, str) and key not in self.cache_dict and "hook_" not in key:
            key = get_act_name(key)
        return self.cache_dict[key] if key in self.cache_dict else self._whole[f"{self.name}.{key}"]

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> StackCache:
        """The entries of some rows of the batch; see TransformerLens."""
        return self._whole.apply_slice_to_batch_dim(batch_slice).stack(self.name)

    def remove_batch_dim(self, batch_size: int | None = None) -> StackCache:
        """Drops the batch axis of a batch of one; see TransformerLens."""
        self._whole = self._whole.apply_slice_to_batch_dim(
            slice(None)
        )  # the model's cache keeps it
        self._whole.remove_batch_dim(batch_size)
        super().remove_batch_dim(batch_size)
        return self

    def _refuse(self, what: str) -> NoReturn:
        if isinstance(self.model.cfg, ResNetConfig):
            raise NotImplementedError(
                f"{what} in {self.name!r}: a ReLU follows each sum and the stages' maps differ in "
                "shape, so contributions of blocks do not add up to the output. Indexing works"
            )
        raise NotImplementedError(
            f"{what} in {self.name!r}: its blocks are post-norm, each norm rescales the sum, so "
            "contributions of layers do not add up to the output. Indexing, stack_activation, "
            "stack_head_results and accumulated_resid(apply_ln=False) work"
        )

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The stream at each layer; see TransformerLens.

        In post-norm stacks it is the normalized one everywhere, which is what blocks read, and
        `apply_ln` is refused.
        """
        if self.model.pre_norm:
            return super().accumulated_resid(layer, incl_mid, apply_ln, *args, **kwargs)
        if isinstance(self.model.cfg, ResNetConfig):
            self._refuse("accumulated_resid")
        if apply_ln:
            self._refuse("apply_ln")
        normalized = copy(self)
        normalized.cache_dict = {
            key.replace("hook_normalized_resid_", "hook_resid_"): value
            for key, value in self.cache_dict.items()
            if not key.endswith(("hook_resid_mid", "hook_resid_post"))
        }
        return super(StackCache, normalized).accumulated_resid(layer, incl_mid, *args, **kwargs)

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """See TransformerLens; pre-norm stacks only."""
        if not self.model.pre_norm:
            self._refuse("decompose_resid")
        return super(StackCache, self._from_block_0()).decompose_resid(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """See TransformerLens; pre-norm stacks only."""
        if not self.model.pre_norm:
            self._refuse("get_full_resid_decomposition")
        read = self._from_block_0()
        return super(StackCache, read).get_full_resid_decomposition(*args, **kwargs)

    def _from_block_0(self) -> StackCache:
        """The same; where a norm stands before block 0, its output is the embedding entry."""
        if not getattr(self.model.cfg, "ln_pre", False):
            return self
        read = copy(self)
        stream = self.cache_dict.get("blocks.0.hook_resid_pre")
        read.has_embed, read.has_pos_embed = stream is not None, False
        if stream is not None:
            read.cache_dict = self.cache_dict | {"hook_embed": stream}
        return read

    def logit_lens(self, **kwargs: Any) -> Any:
        """The stream after each layer through the final norm and the unembedding.

        The last entry of the stack is the model's logits. Only of the stack that the unembedding
        reads, where its blocks are pre-norm.

        Args:
            **kwargs: as in TransformerLens: `layers`, `incl_mid`, `positions` (by default the last
                one, which may be padding), `batch_slice`, `targets`, `top_k`, `vocab`,
                `return_type`, ...

        Returns:
            TransformerLens' `LogitLensResult`.
        """
        from transformer_lens.tools.analysis.logit_lens import logit_lens

        return logit_lens(self._readout("logit_lens"), cache=self, **kwargs)

    def logit_attrs(self, residual_stack: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What each component adds to the logits of tokens; see TransformerLens.

        The final norm's gain is included: the attributions of a full decomposition, `b_U` of the
        token and what the norm's bias adds (an RMS norm has none) sum to the token's logit. Only
        of the stack that the unembedding reads, where its blocks are pre-norm.
        """
        read = copy(self)
        read.model = self._readout("logit_attrs")
        if residual_stack.dtype != torch.float64:  # small differences of large numbers
            residual_stack = residual_stack.float()
        return super(StackCache, read).logit_attrs(residual_stack, *args, **kwargs)

    def _readout(self, what: str) -> SimpleNamespace:
        """What TransformerLens asks of a model to read the stack's output as logits."""
        stack, whole = self.model, self._whole.model
        if not stack.pre_norm:
            self._refuse(what)
        unembed = whole._modules.get("unembed")
        if not isinstance(unembed, nn.Linear) or self.name != list(whole.stacks)[-1]:
            raise NotImplementedError(
                f"{what}: {self.name!r} has no unembedding to read its stream through"
            )
        return SimpleNamespace(
            cfg=stack.cfg,
            pre_norm=True,
            ln_final=stack.ln_final,
            unembed=unembed,
            W_U=whole.W_U,
            b_U=whole.b_U,
            to_single_token=whole.to_single_token,
            tokens_to_residual_directions=whole.tokens_to_residual_directions,
        )

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """What the layer's norm makes of each component, gain included; pre-norm stacks only.

        The components of a full decomposition plus the norm's bias sum to the norm's output. Like
        that, they have the dtype of the stream. With `recompute_ln` each component goes through
        the final norm itself.
        """
        if not self.model.pre_norm:
            self._refuse("apply_ln")
        gain = self._gain(layer, mlp_input)
        scaled = super().apply_ln_to_stack(
            residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
        )
        if recompute_ln and self._behind_all(layer):
            return scaled
        return (scaled * gain).to(residual_stack.dtype)  # a scale is float32 in half precision

    def _behind_all(self, layer: int | None) -> bool:
        return layer in (None, -1, self.model.cfg.n_layers)

    def _gain(self, layer: int | None, mlp_input: bool) -> Tensor:
        if self._behind_all(layer):
            if not hasattr(self.model, "ln_final"):
                raise NotImplementedError(
                    f"no norm follows the last block of {self.name!r} that runs"
                )
            norm = self.model.ln_final
        else:
            norm = getattr(self.model.blocks[layer], "ln2" if mlp_input else "ln1")
        gain: Tensor = norm.weight
        return gain

    def _stack_neuron_results_apply_ln_projected(
        self,
        layer: int,
        pos_slice: Any,
        neuron_slice: Any,
        project_2d: Tensor,
        mlp_input: bool = False,
    ) -> Tensor:
        # TransformerLens' short cut past apply_ln_to_stack: the gain goes into the projection.
        if not self.model.pre_norm:
            self._refuse("apply_ln")
        projection = self._gain(layer, mlp_input)[:, None] * project_2d
        return super()._stack_neuron_results_apply_ln_projected(
            layer, pos_slice, neuron_slice, projection, mlp_input
        )
