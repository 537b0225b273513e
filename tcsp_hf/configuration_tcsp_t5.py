# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""`TCSPT5Config`: sizes of a T5 whose residual stream was projected, per stack and per layer."""

from typing import Any, ClassVar

from .configuration_tcsp import TCSPConfig, check_number, check_size, check_sizes

STACKS = ("encoder", "decoder")
GROUPS = ("encoder", "decoder", "cross")
"""Groups of attention heads: the encoder's, the decoder's self-attention, the decoder's cross-attention."""

AUTO_MAP = {
    "AutoConfig": "configuration_tcsp_t5.TCSPT5Config",
    "AutoModel": "modeling_tcsp_t5.TCSPT5Model",
    "AutoModelForTextEncoding": "modeling_tcsp_t5.TCSPT5EncoderModel",
    "AutoModelForPreTraining": "modeling_tcsp_t5.TCSPT5ForConditionalGeneration",
    "AutoModelForSeq2SeqLM": "modeling_tcsp_t5.TCSPT5ForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_tcsp_t5.TCSPT5ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_tcsp_t5.TCSPT5ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_tcsp_t5.TCSPT5ForQuestionAnswering",
}
"""Auto class -> file and class: written into every checkpoint (of an encoder alone, with that as AutoModel), and
registered where this package is installed."""


class TCSPT5Config(TCSPConfig):
    """Configuration of the TCSP T5 models (T5 v1.0, v1.1/FLAN and mT5 sources).

    The stock T5 fields keep their names and meanings. The stream of a stack has one width throughout; the encoder
    and the decoder may have their own. Every list may be None, which means "the same everywhere".

    Args:
        d_model (`int`): width of `last_hidden_state`: of the decoder, or of the encoder in an encoder-only model.
            `hidden_size` is another name of it.
        encoder_hidden_size (`int`, *optional*): width of the encoder's stream; `d_model` when None. When it is
            given, encoder and decoder have their own embedding tables.
        source_hidden_size (`int`, *optional*): hidden size D of the dense model; `d_model` when None.
        layer_norm_epsilon (`float`): of the dense model; a stack of width k uses `layer_norm_epsilon * D / k`.
        tie_lm_head (`bool`): whether `lm_head` shares the embedding table. A narrower stream's does not: the final
            norm's weight and `D ** -0.5` are folded into its `lm_head`. Where only layers were cut it does, if the
            dense model's did.
        scale_decoder_outputs (`bool`, *optional*): multiply by `d_model ** -0.5` before `lm_head`; `tie_lm_head`
            when None.
        classifier_size (`int`, *optional*): inner width of the sequence classification head;
            `source_hidden_size` when None.
        encoder_layer_intermediate_sizes, decoder_layer_intermediate_sizes (`list[int]`, *optional*): feed-forward
            neurons per layer.
        encoder_layer_kept_heads, decoder_layer_kept_heads (`list[list[int]]`, *optional*): which of the
            `num_heads` heads each layer's self-attention keeps (the relative position bias has one column a head).
        cross_layer_attention_heads (`list[int]`, *optional*): heads per layer of the cross-attention.
        encoder_layer_qk_head_sizes, encoder_layer_vo_head_sizes, decoder_layer_qk_head_sizes,
        decoder_layer_vo_head_sizes, cross_layer_qk_head_sizes, cross_layer_vo_head_sizes (`list[int]`,
            *optional*): size of one query/key head and of one value/output head, per layer; `d_kv` when None.
    """

    model_type: ClassVar[str] = "tcsp_t5"
    own_prefixes: ClassVar[tuple[str, ...]] = (
        "projection",
        "source_hidden",
        "encoder_layer_",
        "decoder_layer_",
        "cross_layer_",
        "encoder_hidden",
        "decoder_hidden",
    )
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float | int = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    is_encoder_decoder: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = None
    classifier_dropout: float | int = 0.0
    is_decoder: bool = False
    tie_word_embeddings: bool = True

    tie_lm_head: bool = True
    scale_decoder_outputs: bool | None = None
    source_hidden_size: int | None = None
    encoder_hidden_size: int | None = None
    classifier_size: int | None = None
    encoder_layer_intermediate_sizes: list[int] | None = None
    decoder_layer_intermediate_sizes: list[int] | None = None
    encoder_layer_kept_heads: list[list[int]] | None = None
    decoder_layer_kept_heads: list[list[int]] | None = None
    cross_layer_attention_heads: list[int] | None = None
    encoder_layer_qk_head_sizes: list[int] | None = None
    encoder_layer_vo_head_sizes: list[int] | None = None
    decoder_layer_qk_head_sizes: list[int] | None = None
    decoder_layer_vo_head_sizes: list[int] | None = None
    cross_layer_qk_head_sizes: list[int] | None = None
    cross_layer_vo_head_sizes: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for derived in ("dense_act_fn", "is_gated_act"):
            kwargs.pop(derived, None)
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        # As in T5Config: the stacks always share a table (unless encoder_hidden_size says otherwise), and
        # tie_lm_head speaks for lm_head. Libraries that find it untied write False here (peft, when it merges).
        self.tie_word_embeddings = True
        if self.scale_decoder_outputs is None:
            self.scale_decoder_outputs = self.tie_lm_head
        if isinstance(self.feed_forward_proj, str):
            parts = self.feed_forward_proj.split("-")
            self.is_gated_act = parts[0] == "gated"
            # T5 v1.1 names its activation "gelu" and means the tanh approximation
            self.dense_act_fn = "gelu_new" if self.feed_forward_proj == "gated-gelu" else parts[-1]
        super().__post_init__(**kwargs)

    @property
    def dense_hidden_size(self) -> int:
        """Hidden size D of the dense model."""
        return self.source_hidden_size if self.source_hidden_size is not None else self.d_model

    @property
    def classifier_width(self) -> int:
        return self.classifier_size if self.classifier_size is not None else self.dense_hidden_size

    def layers_of(self, stack: str) -> int:
        decoder_layers = self.num_layers if self.num_decoder_layers is None else self.num_decoder_layers
        return self.num_layers if stack == "encoder" else decoder_layers

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """As transformers'. Generation makes its cache from the decoder's one, which counts the decoder's layers."""
        found = super().get_text_config(decoder=decoder, encoder=encoder)
        if found is not self and decoder and not encoder:
            found.num_layers = self.layers_of("decoder")
        return found

    def stack_width(self, stack: str) -> int:
        """Width of the stream of the `"encoder"` or the `"decoder"`."""
        if stack == "encoder" and self.encoder_hidden_size is not None:
            return self.encoder_hidden_size
        return self.d_model

    def norm_epsilon_of(self, stack: str) -> float:
        """Epsilon of the stack's norms: the mean of squares is taken over k entries instead of D."""
        return self.layer_norm_epsilon * self.dense_hidden_size / self.stack_width(stack)

    def intermediate_size_of(self, stack: str, layer: int) -> int:
        sizes = getattr(self, f"{stack}_layer_intermediate_sizes")
        return sizes[layer] if sizes else self.d_ff

    def kept_heads_of(self, group: str, layer: int) -> list[int] | None:
        """Indices of the kept self-attention heads, or None when all are kept."""
        kept = None if group == "cross" else getattr(self, f"{group}_layer_kept_heads")
        return list(kept[layer]) if kept else None

    def attention_heads_of(self, group: str, layer: int) -> int:
        if group == "cross":
            return self.cross_layer_attention_heads[layer] if self.cross_layer_attention_heads else self.num_heads
        kept = self.kept_heads_of(group, layer)
        return self.num_heads if kept is None else len(kept)

    def qk_head_size_of(self, group: str, layer: int) -> int:
        sizes = getattr(self, f"{group}_layer_qk_head_sizes")
        return sizes[layer] if sizes else self.d_kv

    def vo_head_size_of(self, group: str, layer: int) -> int:
        sizes = getattr(self, f"{group}_layer_vo_head_sizes")
        return sizes[layer] if sizes else self.d_kv

    def site_widths(self) -> dict[str, int]:
        names = [f"encoder.{i}.{part}" for i in range(self.num_layers) for part in ("attention", "ffn")]
        names.append("encoder.final")
        if self.is_encoder_decoder:
            decoder = range(self.layers_of("decoder"))
            names += [f"decoder.{i}.{part}" for i in decoder for part in ("attention", "cross", "ffn")]
            names.append("decoder.final")
        return {name: self.stack_width(name.split(".")[0]) for name in names}

    def check(self) -> None:
        for name in ("vocab_size", "relative_attention_num_buckets", "relative_attention_max_distance"):
            check_size(name, getattr(self, name), maximum=1 << 28)
        for name in ("d_model", "d_kv", "d_ff", "num_heads"):
            check_size(name, getattr(self, name))
        for name in ("num_layers", "num_decoder_layers"):
            check_size(name, getattr(self, name), minimum=0, maximum=4096)
        for name in ("source_hidden_size", "encoder_hidden_size", "classifier_size"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        check_number("layer_norm_epsilon", self.layer_norm_epsilon, 0.0)
        check_number("initializer_factor", self.initializer_factor, 0.0, 1e6)
        for name in ("tie_lm_head", "scale_decoder_outputs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        for name in ("pad_token_id", "decoder_start_token_id"):
            self.check_token(name)
        self._check_buckets()
        check_number("dropout_rate", self.dropout_rate, 0.0, 1.0)
        check_number("classifier_dropout", self.classifier_dropout, 0.0, 1.0)
        proj = self.feed_forward_proj
        parts = proj.split("-") if isinstance(proj, str) else []
        if not 1 <= len(parts) <= 2 or (len(parts) == 2 and parts[0] != "gated"):
            raise ValueError(
                f"feed_forward_proj is {proj!r}; allowed: an activation such as 'relu', or 'gated-' and an activation "
                "such as 'gated-gelu'."
            )
        for stack in STACKS:
            if self.stack_width(stack) > self.dense_hidden_size:
                name = "encoder_hidden_size" if stack == "encoder" and self.encoder_hidden_size else "d_model"
                raise ValueError(
                    f"{name} is {self.stack_width(stack)}; allowed: 1 to source_hidden_size = "
                    f"{self.dense_hidden_size} (a projection never widens)."
                )
            layers = self.layers_of(stack)
            name = f"{stack}_layer_intermediate_sizes"
            check_sizes(name, getattr(self, name), layers)
            self._check_kept_heads(f"{stack}_layer_kept_heads", layers)
        for group in GROUPS:
            layers = self.layers_of("encoder" if group == "encoder" else "decoder")
            for kind in ("qk", "vo"):
                name = f"{group}_layer_{kind}_head_sizes"
                check_sizes(name, getattr(self, name), layers, maximum=self.d_kv)
        check_sizes(
            "cross_layer_attention_heads",
            self.cross_layer_attention_heads,
            self.layers_of("decoder"),
            maximum=self.num_heads,
        )
        self.check_parameters(self._rough_parameters())
        super().check()

    def _check_buckets(self) -> None:
        """Half of a stack's buckets count single distances, the others are logarithmic up to the maximum."""
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance {distance}; allowed: "
                "at least 4 buckets, and a distance above half their number."
            )

    def _rough_parameters(self) -> int:
        """Of the tables and the layers' linears; norms and heads are left out."""
        count = self.vocab_size * max(self.stack_width(stack) for stack in STACKS)
        count += self.relative_attention_num_buckets * self.num_heads
        for group in GROUPS:
            stack = "encoder" if group == "encoder" else "decoder"
            width = self.stack_width(stack)
            for layer in range(self.layers_of(stack)):
                sizes = self.qk_head_size_of(group, layer) + self.vo_head_size_of(group, layer)
                count += 2 * self.attention_heads_of(group, layer) * sizes * width
                if group != "cross":
                    count += (3 if self.is_gated_act else 2) * self.intermediate_size_of(stack, layer) * width
        return count

    def _check_kept_heads(self, name: str, layers: int) -> None:
        kept = getattr(self, name)
        if kept is None:
            return
        if not isinstance(kept, (list, tuple)) or len(kept) != layers:
            raise ValueError(f"{name} is {kept!r}; it must be null or a list of {layers} lists of head indices.")
        for i, heads in enumerate(kept):
            good = isinstance(heads, (list, tuple)) and len(heads) > 0
            if good:
                check_sizes(f"{name}[{i}]", heads, len(heads), minimum=0, maximum=self.num_heads - 1)
            if not good or list(heads) != sorted(set(heads)):
                raise ValueError(
                    f"{name}[{i}] is {heads!r}; allowed: distinct head indices from 0 to {self.num_heads - 1}, in "
                    "ascending order, at least one."
                )


__all__ = ["TCSPT5Config"]
