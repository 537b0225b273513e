# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""T5 (pre-RMSNorm) inside a subspace of its residual stream.

With each norm's weight folded into the linears after it, the residual stream of a stack lives in one space, so a
single basis projects the embeddings, all writers (`E' W_o`) and all readers (`W diag(gamma) B`): no residual maps,
exact on a stream that lies in the subspace. The norm of the dense stream is estimated from the k kept entries: the
mean of squares over D is `(k / (c_t² D))` times the mean over k, where `c_t²` is the energy that the subspace keeps
at that norm. So epsilon becomes `eps D / k`, and the norm's weight `sqrt(c_t² D / k)`.

Module names equal transformers' T5, so a result with one width and uniform sizes is a stock T5 state dict. The heads
are transformers' own T5 heads over these stacks. Hidden states and `inputs_embeds` are in the coordinates of the
subspace; `model.lift` maps final hidden states back to the dense space.
"""

import copy
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5ClassificationHead,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5LayerFF,
    T5LayerNorm,
    T5Model,
    T5PreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_tcsp_t5 import AUTO_MAP, TCSPT5Config
from .modeling_tcsp import (
    CACHE,
    TCSPLift,
    TCSPPreTrainedMixin,
    activate,
    even_heads,
    is_watched,
    lay_out_as_ever,
    lay_out_for_rows,
    may_overwrite,
    sequences_at_a_time,
    split_mask,
)


class TCSPT5Norm(T5LayerNorm):
    """The stock norm; in fewer passes where neither gradients nor half precision are asked for."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == self.weight.dtype == torch.float32 and may_overwrite():
            scale = hidden_states.square().mean(-1, keepdim=True).add_(self.variance_epsilon).rsqrt_()
            return (hidden_states * scale).mul_(self.weight)  # the same roundings, fewer copies
        return super().forward(hidden_states)


def _sum(hidden_states: torch.Tensor, written: torch.Tensor, *writers: nn.Module) -> torch.Tensor:
    """`hidden_states + written`, over what the writers (a linear, and what it is called by) wrote where it is free."""
    free = may_overwrite() and written.dtype == hidden_states.dtype and written.shape == hidden_states.shape
    if free and type(writers[0]) is nn.Linear and not any(is_watched(writer) for writer in writers):
        return written.add_(hidden_states)
    return hidden_states + written


class TCSPT5Attention(nn.Module):
    """T5 attention whose query/key and value/output head sizes, heads and input widths may all differ.

    `group` is `"encoder"`, `"decoder"` (self-attention) or `"cross"`. Scores are not scaled, as in T5.
    """

    def __init__(self, config: TCSPT5Config, group: str, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_cross_attention = group == "cross"
        self.is_decoder = group == "decoder"
        self.is_causal = self.is_decoder
        self.scaling = 1.0
        self.dropout = config.dropout_rate
        self.n_heads = config.attention_heads_of(group, layer_idx)
        self.kept_heads = config.kept_heads_of(group, layer_idx)
        qk_size = self.n_heads * config.qk_head_size_of(group, layer_idx)
        vo_size = self.n_heads * config.vo_head_size_of(group, layer_idx)
        width = config.stack_width("encoder" if group == "encoder" else "decoder")
        memory_width = config.stack_width("encoder") if self.is_cross_attention else width
        self.q = nn.Linear(width, qk_size, bias=False)
        self.k = nn.Linear(memory_width, qk_size, bias=False)
        self.v = nn.Linear(memory_width, vo_size, bias=False)
        self.o = nn.Linear(vo_size, width, bias=False)
        self.has_relative_attention_bias = layer_idx == 0 and not self.is_cross_attention
        if self.has_relative_attention_bias:
            # one column for each head of the dense model: layers that keep other heads read other columns
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def position_bias(
        self, query_length: int, key_length: int, offset: int | torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """Relative position bias (1, num_heads, query_length, key_length) for all heads of the dense model.

        `device` is the hidden states'; the table's own may be "meta", while accelerate keeps it elsewhere.
        """
        query_position = torch.arange(query_length, device=device)[:, None] + offset
        key_position = torch.arange(key_length, device=device)[None, :]
        bucket = T5Attention._relative_position_bucket(
            key_position - query_position,
            bidirectional=not self.is_decoder,
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        return self.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(states.shape[0], states.shape[1], self.n_heads, -1).transpose(1, 2)

    def _keys_and_values(
        self, hidden_states: torch.Tensor, memory: torch.Tensor | None, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if cache is None:
            source = hidden_states if memory is None else memory
            return self._split_heads(self.k(source)), self._split_heads(self.v(source))
        if not self.is_cross_attention:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            keys, values = self._split_heads(self.k(hidden_states)), self._split_heads(self.v(hidden_states))
            return own.update(keys, values, self.layer_idx)
        if not isinstance(cache, EncoderDecoderCache):
            return self._split_heads(self.k(memory)), self._split_heads(self.v(memory))
        if not cache.is_updated.get(self.layer_idx):
            keys, values = self._split_heads(self.k(memory)), self._split_heads(self.v(memory))
            cache.cross_attention_cache.update(keys, values, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
        return layer.keys, layer.values

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self._split_heads(self.q(hidden_states))
        key, value = self._keys_and_values(hidden_states, memory, cache)
        vo_size = value.shape[-1]
        query, key, value = even_heads(self.config._attn_implementation, query, key, value)
        if position_bias is not None and self.kept_heads is not None:
            kept = self.kept_heads
            run = kept == list(range(kept[0], kept[0] + len(kept)))  # a slice needs no copy
            position_bias = position_bias[:, kept[0] : kept[0] + len(kept)] if run else position_bias[:, kept]
        if position_bias is not None and self.config._attn_implementation == "flex_attention":
            position_bias = position_bias.expand(query.shape[0], -1, -1, -1)  # flex reads the bias of each sequence
        attention: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        context = context[..., :vo_size].reshape(hidden_states.shape[0], hidden_states.shape[1], -1)
        return self.o(context), weights


class TCSPT5SelfAttentionLayer(nn.Module):
    def __init__(self, config: TCSPT5Config, stack: str, layer_idx: int) -> None:
        super().__init__()
        self.SelfAttention = TCSPT5Attention(config, stack, layer_idx)
        self.layer_norm = TCSPT5Norm(config.stack_width(stack), eps=config.norm_epsilon_of(stack))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.SelfAttention(self.layer_norm(hidden_states), **kwargs)
        written = self.dropout(attended)
        return _sum(hidden_states, written, self.SelfAttention.o, self.SelfAttention, self.dropout), weights


class TCSPT5CrossAttentionLayer(nn.Module):
    def __init__(self, config: TCSPT5Config, layer_idx: int) -> None:
        super().__init__()
        self.EncDecAttention = TCSPT5Attention(config, "cross", layer_idx)
        self.layer_norm = TCSPT5Norm(config.stack_width("decoder"), eps=config.norm_epsilon_of("decoder"))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        attended, weights = self.EncDecAttention(self.layer_norm(hidden_states), **kwargs)
        written = self.dropout(attended)
        return _sum(hidden_states, written, self.EncDecAttention.o, self.EncDecAttention, self.dropout), weights


class TCSPT5FeedForwardLayer(T5LayerFF):
    """The stock layer; what its neurons hold is written over itself where nobody else reads it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner: Any = self.DenseReluDense
        dropouts = (inner.dropout, self.dropout)
        busy = any(module.training or is_watched(module) for module in dropouts)
        if busy or not may_overwrite() or is_watched(inner) or inner.training:
            return super().forward(hidden_states)
        read = self.layer_norm(hidden_states)
        if hasattr(inner, "wi_1"):
            wide, factor = activate(inner.act, inner.wi_0, read), inner.wi_1(read)
            watched = is_watched(inner.wi_0) or is_watched(inner.act)
            wide = wide * factor if watched else wide.mul_(factor)
        else:
            wide = activate(inner.act, inner.wi, read)
        if isinstance(inner.wo.weight, torch.Tensor) and inner.wo.weight.dtype not in (wide.dtype, torch.int8):
            wide = wide.to(inner.wo.weight.dtype)  # T5 keeps this linear in float32
        return _sum(hidden_states, inner.wo(wide), inner.wo)


def _clamp_half(hidden_states: torch.Tensor) -> torch.Tensor:
    """Keep a float16 stream finite, as T5 does."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    largest = torch.finfo(torch.float16).max
    limit = torch.where(torch.isinf(hidden_states).any(), largest - 1000, largest)
    return torch.clamp(hidden_states, min=-limit, max=limit)


class TCSPT5Block(GradientCheckpointingLayer):
    def __init__(self, config: TCSPT5Config, stack: str, layer_idx: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList([TCSPT5SelfAttentionLayer(config, stack, layer_idx)])
        if stack == "decoder":
            self.layer.append(TCSPT5CrossAttentionLayer(config, layer_idx))
        # the stock feed-forward block, told this layer's sizes
        sizes = SimpleNamespace(
            d_model=config.stack_width(stack),
            d_ff=config.intermediate_size_of(stack, layer_idx),
            dropout_rate=config.dropout_rate,
            dense_act_fn=config.dense_act_fn,
            is_gated_act=config.is_gated_act,
            layer_norm_epsilon=config.norm_epsilon_of(stack),
        )
        self.layer.append(TCSPT5FeedForwardLayer(sizes))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        masks = [attention_mask, position_bias, encoder_hidden_states, encoder_attention_mask]
        tensors = cache is not None or any(isinstance(value, torch.Tensor) for value in kwargs.values())
        count = None if tensors else sequences_at_a_time(self, hidden_states, masks)
        if count is None:
            return self._whole(hidden_states, *masks, cache=cache, **kwargs)
        parts = hidden_states.split(count)
        split = [split_mask(mask, count, len(parts)) for mask in masks]
        return torch.cat([self._whole(*part, **kwargs) for part in zip(parts, *split, strict=True)])

    def _whole(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_bias: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        hidden_states, _ = self.layer[0](
            hidden_states,
            attention_mask=attention_mask,
            position_bias=position_bias,
            cache=cache,
            **kwargs,
        )
        hidden_states = _clamp_half(hidden_states)
        if len(self.layer) == 3 and encoder_hidden_states is not None:
            hidden_states, _ = self.layer[1](
                hidden_states,
                attention_mask=encoder_attention_mask,
                memory=encoder_hidden_states,
                cache=cache,
                **kwargs,
            )
            hidden_states = _clamp_half(hidden_states)
        return _clamp_half(self.layer[-1](hidden_states))


class TCSPT5ClassificationHead(T5ClassificationHead):
    """The stock head, reading k entries and keeping its inner width."""

    def __init__(self, config: TCSPT5Config) -> None:
        nn.Module.__init__(self)
        self.dense = nn.Linear(config.stack_width("decoder"), config.classifier_width)
        self.dropout = nn.Dropout(p=config.classifier_dropout)
        self.out_proj = nn.Linear(config.classifier_width, config.num_labels)


class TCSPT5PreTrainedModel(TCSPPreTrainedMixin, T5PreTrainedModel):
    """Weight initialisation, attention back-ends and checkpoints of the compressed T5 family."""

    config: TCSPT5Config
    config_class = TCSPT5Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["TCSPT5Block"]
    _supports_flash_attn = False
    _supports_flex_attn = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": OutputRecorder(TCSPT5Block, index=0),
        "attentions": OutputRecorder(TCSPT5SelfAttentionLayer, index=1),
        "cross_attentions": OutputRecorder(TCSPT5CrossAttentionLayer, index=1),
    }
    auto_map: ClassVar[dict[str, str]] = AUTO_MAP

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, TCSPT5Attention):
            width, head = self.config.d_model, self.config.d_kv
            init.normal_(module.q.weight, mean=0.0, std=factor * (width * head) ** -0.5)
            init.normal_(module.k.weight, mean=0.0, std=factor * width**-0.5)
            init.normal_(module.v.weight, mean=0.0, std=factor * width**-0.5)
            init.normal_(module.o.weight, mean=0.0, std=factor * (module.n_heads * head) ** -0.5)
            if module.has_relative_attention_bias:
                init.normal_(module.relative_attention_bias.weight, mean=0.0, std=factor * width**-0.5)
        elif isinstance(module, TCSPLift):
            init.copy_(module.weight, torch.eye(*module.weight.shape))
            init.zeros_(module.bias)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As transformers'. Its older versions miss the stacks, whose configurations are copies."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, TCSPT5PreTrainedModel):
                module.config._attn_implementation = self.config._attn_implementation

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers'; the decoder's own table, where it has one, is resized as well."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        decoder = getattr(self.base_model, "decoder", None)
        own = decoder is not None and self.config.encoder_hidden_size is not None
        if own and decoder.embed_tokens.num_embeddings != embeddings.num_embeddings:
            decoder.resize_token_embeddings(embeddings.num_embeddings)
        for module in self.modules():
            if isinstance(module, TCSPT5PreTrainedModel):
                module.config.vocab_size = embeddings.num_embeddings
        return embeddings

    def lift(self, hidden_states: torch.Tensor, stack: str | None = None) -> torch.Tensor:
        """Map a stack's final hidden states (..., k) back to the dense model's (..., D).

        `stack` is `"encoder"` or `"decoder"`; the default is the one whose `last_hidden_state` the model returns.
        """
        base = self.base_model
        if stack is None:
            stack = "decoder" if hasattr(base, "decoder") else "encoder"
        return getattr(base, stack).lift_map(hidden_states)


class TCSPT5Stack(TCSPT5PreTrainedModel):
    """Encoder or decoder: `config.is_decoder` says which. The stream has `config.stack_width` entries."""

    def __init__(self, config: TCSPT5Config) -> None:
        super().__init__(config)
        stack = "decoder" if config.is_decoder else "encoder"
        width = config.stack_width(stack)
        self.is_decoder = config.is_decoder
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.block = nn.ModuleList([TCSPT5Block(config, stack, i) for i in range(config.layers_of(stack))])
        self.final_layer_norm = TCSPT5Norm(width, eps=config.norm_epsilon_of(stack))
        self.lift_map = TCSPLift(width, config.dense_hidden_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.embed_tokens = new_embeddings

    def _position_bias(self, length: int, cache: Cache | None, device: torch.device) -> torch.Tensor:
        offset: int | torch.Tensor = 0
        key_length = length
        if cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            offset = own.get_seq_length()
            # the length of a static cache, the sum of both of a growing one
            key_length, _ = own.get_mask_sizes(length, 0)
            if isinstance(offset, torch.Tensor):
                offset = offset.clone()  # a static cache counts in place
        return self.block[0].layer[0].SelfAttention.position_bias(length, key_length, offset, device)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache  # the name before transformers 5.24
        if not self.is_decoder:
            if use_cache is True:
                raise ValueError("use_cache=True was given to an encoder; only a decoder keeps a cache.")
            cache = None
        elif use_cache and cache is None:
            cache = DynamicCache(config=self.config)
            if self.config.is_encoder_decoder:
                cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))

        memory_mask = None
        if self.is_decoder:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            attention_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                **{CACHE: own},
            )
            if encoder_hidden_states is not None:
                memory_mask = create_bidirectional_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=encoder_attention_mask,
                    encoder_hidden_states=encoder_hidden_states,
                )
        else:
            attention_mask = create_bidirectional_mask(
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask
            )

        hidden_states = self.dropout(inputs_embeds)
        position_bias = None
        if len(self.block):
            position_bias = self._position_bias(inputs_embeds.shape[1], cache, inputs_embeds.device)
        for block in self.block:
            hidden_states = block(
                hidden_states,
                attention_mask,
                position_bias,
                encoder_hidden_states,  # positional: gradient checkpointing follows positional arguments only
                memory_mask,
                cache=cache,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.dropout(self.final_layer_norm(hidden_states)),
            **{CACHE: cache},
        )


def _inner(config: TCSPT5Config) -> TCSPT5Config:
    """A copy for a model inside another one, which reads its outputs by name whatever the outer one returns."""
    inner = copy.deepcopy(config)
    inner.return_dict = True
    return inner


class _EncoderDecoder(TCSPT5PreTrainedModel):
    """The two stacks and their embeddings, under the names that transformers' T5 models use.

    Encoder and decoder share one embedding table unless `config.encoder_hidden_size` gives them their own bases.
    """

    def __init__(self, config: TCSPT5Config) -> None:
        config.tie_word_embeddings = True  # whatever from_pretrained was told: tie_lm_head speaks for lm_head
        # the stock model's __init__, next in the order of resolution, would build dense stacks
        PreTrainedModel.__init__(self, config)
        config.check()
        config.check_activation("feed_forward_proj", config.dense_act_fn)
        self.model_dim = config.d_model
        self.num_labels = config.num_labels
        self.shared = nn.Embedding(config.vocab_size, config.stack_width("encoder"))
        encoder_config, decoder_config = _inner(config), _inner(config)
        encoder_config.is_decoder = False
        encoder_config.use_cache = False
        decoder_config.is_decoder = True
        decoder_config.num_layers = config.layers_of("decoder")
        self.encoder = TCSPT5Stack(encoder_config)
        self.decoder = TCSPT5Stack(decoder_config)
        # an instance's ties: which of the family's tables are shared depends on the configuration
        self._tied_weights_keys = {"encoder.embed_tokens.weight": "shared.weight"}
        if config.encoder_hidden_size is None:
            self._tied_weights_keys["decoder.embed_tokens.weight"] = "shared.weight"

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Embedding) -> None:
        self.shared = new_embeddings
        self.encoder.set_input_embeddings(new_embeddings)
        if self.config.encoder_hidden_size is None:
            self.decoder.set_input_embeddings(new_embeddings)


class TCSPT5Model(_EncoderDecoder, T5Model):
    _auto_class = "AutoModel"
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: TCSPT5Config) -> None:
        super().__init__(config)
        self.post_init()


def _decoding_linears(decoder: nn.Module) -> list[Any]:
    """Linears that read every new token."""
    return [
        module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    ]


class TCSPT5ForConditionalGeneration(_EncoderDecoder, T5ForConditionalGeneration, GenerationMixin):
    _auto_class = "AutoModelForSeq2SeqLM"
    _laid_out = False
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }

    def __init__(self, config: TCSPT5Config) -> None:
        super().__init__(config)
        if config.tie_lm_head and config.encoder_hidden_size is not None:
            raise ValueError(
                f"tie_lm_head is True, but encoder_hidden_size is {config.encoder_hidden_size}: encoder and decoder "
                "have their own embedding tables; allowed: tie_lm_head=False."
            )
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_lm_head:
            self._tied_weights_keys["lm_head.weight"] = "shared.weight"
        self.post_init()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`. On a processor the decoder's weights are first laid out for it, once."""
        if not self.training:
            own = self._linears_of_a_step()
            lay_out_for_rows(linear for linear in own if linear.weight is not self.shared.weight)
            self._laid_out = True
        return super().generate(*args, **kwargs)

    def _linears_of_a_step(self) -> list[Any]:
        return [*_decoding_linears(self.decoder), self.lm_head]

    def _lay_out_as_ever(self) -> None:
        if self._laid_out:
            lay_out_as_ever(self._linears_of_a_step())
            self._laid_out = False

    @wraps(T5ForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._lay_out_as_ever()  # it is trained from here on
        return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> "TCSPT5ForConditionalGeneration":
        if mode:
            self._lay_out_as_ever()
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._lay_out_as_ever()
        return super().state_dict(*args, **kwargs)


class TCSPT5ForQuestionAnswering(_EncoderDecoder, T5ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }

    def __init__(self, config: TCSPT5Config) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.d_model, config.num_labels)
        self.post_init()


_ENCODER_MAP = {**AUTO_MAP, "AutoModel": "modeling_tcsp_t5.TCSPT5EncoderModel"}
"""Of a checkpoint without a decoder: `AutoModel` would otherwise add one with random weights."""


class TCSPT5EncoderModel(TCSPT5PreTrainedModel, T5EncoderModel):
    auto_map: ClassVar[dict[str, str]] = _ENCODER_MAP
    _auto_class = "AutoModelForTextEncoding"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"encoder.embed_tokens.weight": "shared.weight"}

    def __init__(self, config: TCSPT5Config) -> None:
        config = copy.deepcopy(config)
        config.d_model = config.stack_width("encoder")
        config.encoder_hidden_size = None
        config.is_encoder_decoder = False
        config.is_decoder = False
        config.use_cache = False
        if config.projection is not None:
            sites = [site for site in config.projection["sites"] if site["name"].startswith("encoder.")]
            config.projection["sites"] = sites
        PreTrainedModel.__init__(self, config)
        config.check()
        config.check_activation("feed_forward_proj", config.dense_act_fn)
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = TCSPT5Stack(config)
        self.post_init()


class TCSPT5ForSequenceClassification(TCSPT5PreTrainedModel, T5ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: TCSPT5Config) -> None:
        PreTrainedModel.__init__(self, config)
        if not isinstance(config.eos_token_id, int):
            raise ValueError(
                f"eos_token_id is {config.eos_token_id!r}; a T5 sequence classifier reads the decoder's state at the "
                "end token, so it must be a number."
            )
        self.transformer = TCSPT5Model(_inner(config))
        self.classification_head = TCSPT5ClassificationHead(config)
        self.post_init()


class TCSPT5ForTokenClassification(TCSPT5PreTrainedModel, T5ForTokenClassification):
    auto_map: ClassVar[dict[str, str]] = _ENCODER_MAP
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: TCSPT5Config) -> None:
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = TCSPT5EncoderModel(_inner(config))
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.stack_width("encoder"), config.num_labels)
        self.post_init()


__all__ = [
    "TCSPT5EncoderModel",
    "TCSPT5ForConditionalGeneration",
    "TCSPT5ForQuestionAnswering",
    "TCSPT5ForSequenceClassification",
    "TCSPT5ForTokenClassification",
    "TCSPT5Model",
    "TCSPT5PreTrainedModel",
]
