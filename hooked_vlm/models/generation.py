"""Generation by transformers' `GenerationMixin`, with hooks at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from hooked_vlm.components.attention import KeyValue, Source
from hooked_vlm.components.blocks import Context
from hooked_vlm.components.hook_point import HookPoint, telling
from hooked_vlm.components.stack import TextStack, Unembed


class Decoder(nn.Module, GenerationMixin):
    """A decoder stack in the clothes that `GenerationMixin` wants, since `forward` gives logits.

    Args:
        stack: the decoder.
        unembed: what makes logits of its output.
        hook_logits: the point that they pass through.
        states: what cross-attention reads, one row per prompt.
        states_mask: which positions of it may be seen.
        special: the special tokens' ids, as `BlipTextConfig` names them.
    """

    main_input_name = "input_ids"
    _is_stateful = False

    def __init__(
        self,
        stack: TextStack,
        unembed: Unembed,
        hook_logits: HookPoint,
        states: Tensor,
        states_mask: Tensor | None,
        special: dict[str, Any],
    ):
        super().__init__()
        self.stack, self.unembed, self.hook_logits = stack, unembed, hook_logits
        self.config = BlipTextConfig(
            vocab_size=stack.cfg.d_vocab,
            hidden_size=stack.cfg.d_model,
            num_hidden_layers=stack.cfg.n_layers,
            num_attention_heads=stack.cfg.n_heads,
            max_position_embeddings=stack.cfg.n_ctx,
            **special,
        )
        self.generation_config = GenerationConfig.from_model_config(self.config)
        self._states, self._states_mask = states, states_mask
        self._kept: dict[int, KeyValue] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._states.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are made of."""
        return self._states.dtype

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
        """One step: logits of the new tokens. Beams of a prompt share its keys and values."""
        offset = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch, new = input_ids.shape
        rows = torch.arange(len(self._states), device=input_ids.device)
        source = Source(
            self._states,
            self._states_mask,
            rows.repeat_interleave(batch // len(rows)),
            self._kept,
        )
        mask = self.stack.visible(input_ids, attention_mask, offset)
        positions = torch.arange(offset, offset + new, device=input_ids.device)
        with telling(self, positions):
            x = self.stack.embeddings(input_ids, offset=offset)
            x = self.stack.run(x, Context(mask, (source,), past_key_values))
            logits = self.hook_logits(self.unembed(x))
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
