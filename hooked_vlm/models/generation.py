"""Generation by transformers' `GenerationMixin`, with hooks at every step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from hooked_vlm.components.past import Growing, KeyValue, Past, Shared
from hooked_vlm.config import TokenConfig
from hooked_vlm.models.hooked import Hooks
from hooked_vlm.models.resumable import ResumableModel

StepHooks = Hooks | Callable[[int], Hooks]  # the same at every step, or by the step's number
# From new ids, [batch, new], the mask over all positions so far, and what stands before, to
# logits, [batch, new or 1, d_vocab].
Step = Callable[[Tensor, Tensor | None, Past], Tensor]

_HOOKS = "fwd_hooks= and model.hooks(...) see every activation of every step"
_LAST = "a step makes the logits of one position"
UNSERVED = {
    "output_attentions": _HOOKS,
    "output_hidden_states": _HOOKS,
    "assistant_model": _LAST,
    "prompt_lookup_num_tokens": _LAST,
    "cache_implementation": "keys and values are kept as they come",
    "position_ids": "positions are counted from the first column",
}


@dataclass(frozen=True)
class Prefix:
    """The beginning of texts, kept to be continued many times; `HookedLlava.prefill` makes it.

    Attributes:
        input_ids: its tokens, [rows, pos].
        attention_mask: 1 for a token, 0 for padding, [rows, pos].
        logits: of its last position, [rows, 1, d_vocab].
        kept: keys and values by block, [rows, pos, kv_head, d_head], rotated.
    """

    input_ids: Tensor
    attention_mask: Tensor
    logits: Tensor
    kept: dict[int, KeyValue]

    @property
    def length(self) -> int:
        """How many positions it has."""
        return self.input_ids.shape[1]

    def rows(self, batch: int) -> Tensor:
        """For each row of a batch the row that it continues: its own, or the only one.

        Raises:
            ValueError: another number of rows.
        """
        n = len(self.input_ids)
        if n not in (1, batch):
            raise ValueError(f"the prefix has {n} rows, what continues it has {batch}")
        return torch.arange(batch, device=self.input_ids.device) % n

    def before(self, batch: int) -> Shared:
        """What stands before the positions of a batch that continues it; no row is copied."""
        return Shared(self.kept, self.length, self.rows(batch))

    def cache(self, batch: int, length: int) -> DynamicCache:
        """A copy of the first `length` positions, to be lengthened."""
        rows, layers = self.rows(batch), [self.kept[layer] for layer in sorted(self.kept)]
        return DynamicCache(
            [
                (k[rows, :length].transpose(1, 2), v[rows, :length].transpose(1, 2))
                for k, v in layers
            ]
        )


def sizes(cfg: TokenConfig) -> dict[str, Any]:
    """What `generate` asks of a stack's configuration, as transformers calls it."""
    return {
        "vocab_size": cfg.d_vocab,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "max_position_embeddings": cfg.n_ctx,
    }


class Writer(nn.Module, GenerationMixin):
    """A hooked model in the clothes that `GenerationMixin` wants, since `forward` gives logits.

    Args:
        model: whose hooks fire.
        step: one step.
        config: the sizes that `generate` asks for, and the special tokens.
        generation_config: the checkpoint's own; None for one made of `config`.
        fwd_hooks: hooks for the length of a step, beside those that stand.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self,
        model: ResumableModel,
        step: Step,
        config: PreTrainedConfig,
        generation_config: GenerationConfig | None = None,
        fwd_hooks: StepHooks = (),
    ):
        super().__init__()
        self._model = [model]  # in a list: it is no part of this module
        self._step = step
        self.config = config
        made = generation_config or GenerationConfig.from_model_config(config)
        self.generation_config = deepcopy(made)
        self._hooks = fwd_hooks if callable(fwd_hooks) else list(fwd_hooks)
        self._steps = 0

    def write(self, **generation: Any) -> Any:
        """What `generate` gives.

        Args:
            **generation: its arguments.

        Raises:
            ValueError: one that a step cannot serve.
        """
        for name, way in UNSERVED.items():
            if generation.get(name):
                raise ValueError(f"generate has no {name}= here: {way}")
        # `generate` declares its self a PreTrainedModel; what it asks of one, this has.
        return self.generate(**generation)  # type: ignore[misc]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model[0].device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return self._model[0].dtype

    def get_experts_implementation(self) -> dict[str, Any]:
        """No mixture of experts; `generate` asks."""
        return {}

    def is_remote_code(self) -> bool:
        """No code of a checkpoint's; `generate` asks."""
        return False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """One step: logits of the new tokens."""
        hooks = list(self._hooks(self._steps)) if callable(self._hooks) else self._hooks
        self._steps += 1
        past = Past() if past_key_values is None else Growing(past_key_values)
        with self._model[0].hooks(hooks) if hooks else nullcontext():
            logits = self._step(input_ids, attention_mask, past)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
