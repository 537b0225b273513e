"""Attention modules of transformers with fewer heads than their configuration says."""

from typing import Any

import torch
from torch import nn

from ..modeling_tcsp import CACHE


class NoHeadsBertAttention(nn.Module):
    """In place of a `BertSelfAttention` without heads: a context of no entries."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states[..., :0], None


class KeptHeadsT5Attention(nn.Module):
    """A `T5Attention` whose linears hold the heads `kept` only.

    The position bias passes from layer to layer with all heads, so each layer picks its own from it; the table stays
    whole in the first layer.
    """

    kept: torch.Tensor

    def __init__(self, attention: Any, kept: torch.Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.all_heads = attention.n_heads
        attention.n_heads = len(kept)
        attention.inner_dim = len(kept) * attention.key_value_proj_dim
        self.register_buffer("kept", kept.to(attention.o.weight.device), persistent=False)

    def _whole_bias(
        self, hidden_states: torch.Tensor, key_value_states: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        """Position bias of all heads (1, heads, queries, keys), as a stock first layer makes it."""
        queries = hidden_states.shape[1]
        if key_value_states is not None:
            shape = (1, self.all_heads, queries, key_value_states.shape[1])
            return torch.zeros(shape, dtype=hidden_states.dtype, device=hidden_states.device)
        past = 0 if cache is None else cache.get_seq_length(self.attention.layer_idx)
        if not self.attention.has_relative_attention_bias:
            shape = (1, self.all_heads, queries, queries + past)
            return torch.zeros(shape, dtype=hidden_states.dtype, device=hidden_states.device)
        found: torch.Tensor = self.attention.compute_bias(
            queries, queries + past, device=hidden_states.device, past_seen_tokens=past
        )
        return found

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        if position_bias is None:
            position_bias = self._whole_bias(hidden_states, key_value_states, kwargs.get(CACHE))
        output, _, weights = self.attention(
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=position_bias[:, self.kept],
            **kwargs,
        )
        return output, position_bias, weights
