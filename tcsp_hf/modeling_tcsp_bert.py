# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""BERT (post-LayerNorm) inside subspaces of its hidden states.

Write the dense LayerNorm as `n = sqrt(D) M x / ||M x||`, `h = gamma * n + beta`, with `M = I - 11'/D`. At every site t
the compressed model carries `z_t = E_t' n_t` (k_t entries), and `n_t` is decoded as `B_t z_t`. Linears that read `h`
read `z` (`W diag(gamma) B`), and the sum before the next norm is, in its own subspace,

    y_t = [E_t' M diag(gamma_s) B_s] z_s + E_t' M (W_o a + b_o + beta_s).

The bracket is the *residual map*: gamma and the mean do not commute with a change of basis, so a post-LN model needs
it; given the map, every site may have its own subspace. Between two sites of the dense width it is gamma itself. The
norm of x is estimated from y: `z = c_t sqrt(D) y / ||y||`, a root-mean-square norm whose weight starts at
`c_t sqrt(D / k_t)`.

The heads are transformers' own BERT heads over this encoder. Hidden states, `inputs_embeds` and
`last_hidden_state` are in the coordinates of their sites; `model.lift` maps the last ones back to the dense space.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.bert.modeling_bert import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tcsp_bert import AUTO_MAP, TCSPBertConfig
from .modeling_tcsp import (
    TCSPLift,
    TCSPPreTrainedMixin,
    activate,
    even_heads,
    is_plain,
    may_overwrite,
    product,
    rms_normalise,
    sequences_at_a_time,
    split_mask,
)


class TCSPBertSiteNorm(nn.Module):
    """`z = weight * y / sqrt(mean(y²) + eps)` over the k entries of a site; y, z (..., k).

    A site of the dense width keeps the dense coordinates, and its mean is subtracted first as in the dense
    LayerNorm; in a subspace the mean is taken out by the weights that write into it.
    """

    def __init__(self, config: TCSPBertConfig, site: int) -> None:
        super().__init__()
        size = config.site_size(site)
        self.centred = size == config.dense_hidden_size
        # the dense epsilon is added to a mean over D entries, this one to a mean over k
        self.eps = config.layer_norm_eps * config.dense_hidden_size / size
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden_states: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
        """overwrite: `hidden_states` are nobody else's, and may hold the result."""
        if self.centred:
            return nn.functional.layer_norm(hidden_states, self.weight.shape, self.weight, None, self.eps)
        return rms_normalise(hidden_states, self.weight, self.eps, overwrite)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, centred={self.centred}"


class TCSPBertScale(nn.Module):
    """Residual map between two sites of the dense width: the dense norm's weight, entry by entry."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight


class TCSPBertEmbeddings(nn.Module):
    """Sum of word, position and token-type embeddings, projected to site 0, and its norm."""

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        size = config.site_size(0)
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.norm = TCSPBertSiteNorm(config, 0)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer(
            "position_ids", torch.arange(config.max_position_embeddings).expand((1, -1)), persistent=False
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = self.position_ids[:, :length]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        hidden_states = (  # two small tables first: their sum is often that of one sequence
            inputs_embeds + (self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids))
        )
        return self.dropout(self.norm(hidden_states))


class TCSPBertSelfAttention(nn.Module):
    """Multi-head attention of one layer: query, key and value in one product; qk and vo sizes may differ."""

    def __init__(self, config: TCSPBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False
        self.num_heads = config.attention_heads_of(layer_idx)
        self.qk_head_size = config.qk_head_size_of(layer_idx)
        self.vo_head_size = config.vo_head_size_of(layer_idx)
        self.scaling = config.dense_head_dim**-0.5
        self.split_sizes = [
            self.num_heads * self.qk_head_size,
            self.num_heads * self.qk_head_size,
            self.num_heads * self.vo_head_size,
        ]
        self.qkv = nn.Linear(config.site_size(2 * layer_idx), sum(self.split_sizes))
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch, length, _ = hidden_states.shape
        query, key, value = (
            part.view(batch, length, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(hidden_states).split(self.split_sizes, dim=-1)
        )
        query, key, value = even_heads(self.config._attn_implementation, query, key, value)
        attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return context[..., : self.vo_head_size].reshape(batch, length, -1), weights


class TCSPBertOutput(nn.Module):
    """Writes a block's result into the next site: residual map, output projection, norm."""

    def __init__(self, config: TCSPBertConfig, in_features: int, site: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.site_size(site))
        here, there = config.site_size(site - 1), config.site_size(site)
        full = here == there == config.dense_hidden_size
        self.residual = TCSPBertScale(here) if full else nn.Linear(here, there, bias=False)
        self.norm = TCSPBertSiteNorm(config, site)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, block_states: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        written = self.dropout(product(self.dense, block_states))
        if not self._accumulates(written, hidden_states):
            return self.norm(self.residual(hidden_states) + written)
        # what the map carries is added to what was written in its place: no second result, no pass that adds
        if isinstance(self.residual, TCSPBertScale):
            written.addcmul_(hidden_states, self.residual.weight)
        else:
            rows = written.view(-1, written.shape[-1])
            rows.addmm_(hidden_states.reshape(-1, hidden_states.shape[-1]), self.residual.weight.t())
        return self.norm(written, overwrite=True) if is_plain(self.norm, TCSPBertSiteNorm) else self.norm(written)

    def _accumulates(self, written: torch.Tensor, hidden_states: torch.Tensor) -> bool:
        """Whether the written states are nobody else's: no gradients, no tracing, no hook on what made them.

        A quantised or sharded weight is of another tensor class, which knows `linear` but not every product.
        """
        return (
            may_overwrite()
            and type(self.residual.weight) is nn.Parameter
            and (is_plain(self.residual, nn.Linear) or is_plain(self.residual, TCSPBertScale))
            and is_plain(self.dense, nn.Linear)
            and is_plain(self.dropout, nn.Dropout)
            and written.dtype == hidden_states.dtype == self.residual.weight.dtype
            and written.is_contiguous()
        )


class TCSPBertAttention(nn.Module):
    def __init__(self, config: TCSPBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.self = TCSPBertSelfAttention(config, layer_idx)
        self.output = TCSPBertOutput(config, self.self.split_sizes[2], 2 * layer_idx + 1)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        context, _ = self.self(hidden_states, attention_mask, **kwargs)
        return self.output(context, hidden_states)


class TCSPBertIntermediate(nn.Module):
    def __init__(self, config: TCSPBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.site_size(2 * layer_idx + 1), config.intermediate_size_of(layer_idx))
        self.activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return activate(self.activation, self.dense, hidden_states)


class TCSPBertLayer(GradientCheckpointingLayer):
    def __init__(self, config: TCSPBertConfig, layer_idx: int) -> None:
        super().__init__()
        self.chunk_size_feed_forward = config.chunk_size_feed_forward
        self.attention = TCSPBertAttention(config, layer_idx)
        self.intermediate = TCSPBertIntermediate(config, layer_idx)
        self.output = TCSPBertOutput(config, self.intermediate.dense.out_features, 2 * layer_idx + 2)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.output(self.intermediate(hidden_states), hidden_states)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        tensors = any(isinstance(value, torch.Tensor) for value in kwargs.values())
        count = None if tensors else sequences_at_a_time(self, hidden_states, [attention_mask])
        if count is None:
            return self._whole(hidden_states, attention_mask, **kwargs)
        parts = hidden_states.split(count)
        masks = split_mask(attention_mask, count, len(parts))
        return torch.cat([self._whole(part, mask, **kwargs) for part, mask in zip(parts, masks, strict=True)])

    def _whole(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        hidden_states = self.attention(hidden_states, attention_mask, **kwargs)
        if self.chunk_size_feed_forward == 0:
            return self.feed_forward(hidden_states)
        # unlike transformers' own, any length will do: the last piece may be shorter
        parts = hidden_states.split(self.chunk_size_feed_forward, dim=1)
        return torch.cat([self.feed_forward(part) for part in parts], dim=1)


class TCSPBertEncoder(nn.Module):
    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([TCSPBertLayer(config, i) for i in range(config.num_hidden_layers)])

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        for layer in self.layer:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class TCSPBertPooler(nn.Module):
    """tanh of a linear of the first token; `pooler_output` (batch, pooler_size) keeps the dense width."""

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_width)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.activation(self.dense(hidden_states[:, 0]))


class TCSPBertLMHead(nn.Module):
    """Masked-LM head: the dense transform and its exact LayerNorm, a projection, and a narrow decoder.

    The norm's weight and bias are folded into the decoder, which reads `mlm_head_size` entries instead of D.
    """

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        config.check_tied_head()
        self.dense = nn.Linear(config.hidden_size, config.mlm_transform_width)
        self.activation = ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        self.norm = nn.LayerNorm(config.mlm_transform_width, eps=config.layer_norm_eps, elementwise_affine=False)
        self.projection = nn.Linear(config.mlm_transform_width, config.mlm_head_width, bias=False)
        self.decoder = nn.Linear(config.mlm_head_width, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.projection(self.norm(self.activation(self.dense(hidden_states)))))


class TCSPBertOnlyMLMHead(nn.Module):
    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        self.predictions = TCSPBertLMHead(config)

    def forward(self, sequence_output: torch.Tensor) -> torch.Tensor:
        return self.predictions(sequence_output)


class TCSPBertOnlyNSPHead(nn.Module):
    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.pooler_width, 2)

    def forward(self, pooled_output: torch.Tensor) -> torch.Tensor:
        return self.seq_relationship(pooled_output)


class TCSPBertPreTrainingHeads(nn.Module):
    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__()
        self.predictions = TCSPBertLMHead(config)
        self.seq_relationship = nn.Linear(config.pooler_width, 2)

    def forward(self, sequence_output: torch.Tensor, pooled_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.predictions(sequence_output), self.seq_relationship(pooled_output)


class TCSPBertPreTrainedModel(TCSPPreTrainedMixin, BertPreTrainedModel):
    """Weight initialisation, attention back-ends and checkpoints of the compressed BERT family."""

    config: TCSPBertConfig
    config_class = TCSPBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TCSPBertEmbeddings", "TCSPBertLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": TCSPBertLayer,
        "attentions": TCSPBertSelfAttention,
    }
    auto_map: ClassVar[dict[str, str]] = AUTO_MAP

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (TCSPBertSiteNorm, TCSPBertScale)):
            init.ones_(module.weight)
        elif isinstance(module, TCSPBertEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1]).expand((1, -1)))
        elif isinstance(module, TCSPLift):
            init.copy_(module.weight, torch.eye(*module.weight.shape))
            init.zeros_(module.bias)

    def lift(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `last_hidden_state` (..., hidden_size) back to the dense model's hidden states (..., D).

        `h = gamma * (B z) + beta` of the last site: exact on what the subspace keeps (design: n ~ B z).
        """
        return self.base_model.lift_map(hidden_states)


class TCSPBertModel(TCSPBertPreTrainedModel):
    """The compressed encoder with an optional pooler.

    `inputs_embeds` are rows of the compressed embedding table (width `config.site_size(0)`, before the position
    and token-type embeddings and the norm), as `model.get_input_embeddings()(input_ids)` gives them.
    """

    _auto_class = "AutoModel"
    optional_weights: ClassVar[tuple[str, ...]] = ("pooler.",)  # a model made with add_pooling_layer=False

    def __init__(self, config: TCSPBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        config.check()
        config.check_heads()
        self.gradient_checkpointing = False
        self.embeddings = TCSPBertEmbeddings(config)
        self.encoder = TCSPBertEncoder(config)
        self.pooler = TCSPBertPooler(config) if add_pooling_layer else None
        self.lift_map = TCSPLift(config.hidden_size, config.dense_hidden_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, ...] | BaseModelOutputWithPoolingAndCrossAttentions:
        """As transformers' `BertModel`, without the decoder's arguments.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, or an argument of cross-attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        for name in ("encoder_hidden_states", "encoder_attention_mask", "cache", "past_key_values"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} was given, but a TCSP BERT is an encoder without cross-attention.")
        kwargs.pop("use_cache", None)
        hidden_states = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        outputs = self.encoder(hidden_states, attention_mask, **kwargs)
        sequence_output = outputs.last_hidden_state
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=sequence_output,
            pooler_output=self.pooler(sequence_output) if self.pooler is not None else None,
        )


class _BertHead(TCSPBertPreTrainedModel):
    """A head over the compressed encoder. The forward pass is transformers' own, inherited beside this class."""

    def __init__(self, config: TCSPBertConfig, pooling: bool) -> None:
        # the stock head's __init__, next in the order of resolution, would build dense modules
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.bert = TCSPBertModel(config, add_pooling_layer=pooling)
        dropout = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)


class TCSPBertForMaskedLM(_BertHead, BertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=False)
        self.cls = TCSPBertOnlyMLMHead(config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings


class TCSPBertForPreTraining(_BertHead, BertForPreTraining):
    _auto_class = "AutoModelForPreTraining"
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=True)
        self.cls = TCSPBertPreTrainingHeads(config)
        self.post_init()

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings


class TCSPBertForNextSentencePrediction(_BertHead, BertForNextSentencePrediction):
    _auto_class = "AutoModelForNextSentencePrediction"

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=True)
        self.cls = TCSPBertOnlyNSPHead(config)
        self.post_init()


class TCSPBertForSequenceClassification(_BertHead, BertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=True)
        self.classifier = nn.Linear(config.pooler_width, config.num_labels)
        self.post_init()


class TCSPBertForMultipleChoice(_BertHead, BertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=True)
        self.classifier = nn.Linear(config.pooler_width, 1)
        self.post_init()


class TCSPBertForTokenClassification(_BertHead, BertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class TCSPBertForQuestionAnswering(_BertHead, BertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: TCSPBertConfig) -> None:
        super().__init__(config, pooling=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "TCSPBertForMaskedLM",
    "TCSPBertForMultipleChoice",
    "TCSPBertForNextSentencePrediction",
    "TCSPBertForPreTraining",
    "TCSPBertForQuestionAnswering",
    "TCSPBertForSequenceClassification",
    "TCSPBertForTokenClassification",
    "TCSPBertModel",
    "TCSPBertPreTrainedModel",
]
