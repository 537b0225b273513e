# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""`TCSPBertConfig`: sizes of a BERT whose hidden size was projected, site by site."""

from typing import ClassVar

from .configuration_tcsp import TCSPConfig, check_number, check_size, check_sizes

AUTO_MAP = {
    "AutoConfig": "configuration_tcsp_bert.TCSPBertConfig",
    "AutoModel": "modeling_tcsp_bert.TCSPBertModel",
    "AutoModelForTextEncoding": "modeling_tcsp_bert.TCSPBertModel",
    "AutoModelForPreTraining": "modeling_tcsp_bert.TCSPBertForPreTraining",
    "AutoModelForMaskedLM": "modeling_tcsp_bert.TCSPBertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_tcsp_bert.TCSPBertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_tcsp_bert.TCSPBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_tcsp_bert.TCSPBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_tcsp_bert.TCSPBertForMultipleChoice",
    "AutoModelForNextSentencePrediction": "modeling_tcsp_bert.TCSPBertForNextSentencePrediction",
}
"""Auto class -> file and class: written into every checkpoint, and registered where this package is installed."""


class TCSPBertConfig(TCSPConfig):
    """Configuration of the TCSP BERT models.

    The stock BERT fields keep their names and meanings. A *site* is a place where the residual stream is
    normalised: the embeddings, and after the attention and after the feed-forward network of every layer, so
    `2 * num_hidden_layers + 1` of them. Every list below may be None, which means "the same everywhere".

    Args:
        hidden_size (`int`): width of `last_hidden_state`, that is of the last site.
        source_hidden_size (`int`, *optional*): hidden size D of the dense model; `hidden_size` when None.
        head_dim (`int`, *optional*): head size of the dense model. The softmax scale stays `head_dim ** -0.5`.
            `source_hidden_size // num_attention_heads` when None.
        site_hidden_sizes (`list[int]`, *optional*): width of the stream at every site.
        layer_intermediate_sizes (`list[int]`, *optional*): feed-forward neurons per layer.
        layer_attention_heads (`list[int]`, *optional*): attention heads per layer.
        layer_qk_head_sizes (`list[int]`, *optional*): size of one query/key head, per layer.
        layer_vo_head_sizes (`list[int]`, *optional*): size of one value/output head, per layer.
        pooler_size (`int`, *optional*): width of `pooler_output`; `source_hidden_size` when None.
        mlm_transform_size (`int`, *optional*): width of the masked-LM head's transform; `source_hidden_size`
            when None.
        mlm_head_size (`int`, *optional*): width that the masked-LM decoder reads; the first site's when None.
    """

    model_type: ClassVar[str] = "tcsp_bert"
    own_prefixes: ClassVar[tuple[str, ...]] = (
        "projection",
        "source_hidden",
        "site_",
        "layer_intermediate",
        "layer_attention",
        "layer_qk",
        "layer_vo",
        "mlm_",
        "pooler_",
    )

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | int | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    source_hidden_size: int | None = None
    head_dim: int | None = None
    site_hidden_sizes: list[int] | None = None
    layer_intermediate_sizes: list[int] | None = None
    layer_attention_heads: list[int] | None = None
    layer_qk_head_sizes: list[int] | None = None
    layer_vo_head_sizes: list[int] | None = None
    pooler_size: int | None = None
    mlm_transform_size: int | None = None
    mlm_head_size: int | None = None

    @property
    def dense_hidden_size(self) -> int:
        """Hidden size D of the dense model."""
        return self.source_hidden_size if self.source_hidden_size is not None else self.hidden_size

    @property
    def dense_head_dim(self) -> int:
        """Head size of the dense model, which fixes the softmax scale."""
        return self.head_dim if self.head_dim is not None else self.dense_hidden_size // self.num_attention_heads

    def site_size(self, site: int) -> int:
        """Width of the stream at site `site`: 0 the embeddings, 2l + 1 and 2l + 2 in layer l."""
        return self.site_hidden_sizes[site] if self.site_hidden_sizes is not None else self.hidden_size

    def intermediate_size_of(self, layer: int) -> int:
        return self.layer_intermediate_sizes[layer] if self.layer_intermediate_sizes else self.intermediate_size

    def attention_heads_of(self, layer: int) -> int:
        return self.layer_attention_heads[layer] if self.layer_attention_heads else self.num_attention_heads

    def qk_head_size_of(self, layer: int) -> int:
        return self.layer_qk_head_sizes[layer] if self.layer_qk_head_sizes else self.dense_head_dim

    def vo_head_size_of(self, layer: int) -> int:
        return self.layer_vo_head_sizes[layer] if self.layer_vo_head_sizes else self.dense_head_dim

    @property
    def pooler_width(self) -> int:
        return self.pooler_size if self.pooler_size is not None else self.dense_hidden_size

    @property
    def mlm_transform_width(self) -> int:
        return self.mlm_transform_size if self.mlm_transform_size is not None else self.dense_hidden_size

    @property
    def mlm_head_width(self) -> int:
        return self.mlm_head_size if self.mlm_head_size is not None else self.site_size(0)

    def site_widths(self) -> dict[str, int]:
        names = ["embeddings"]
        for layer in range(self.num_hidden_layers):
            names += [f"layer.{layer}.attention", f"layer.{layer}.output"]
        return {name: self.site_size(i) for i, name in enumerate(names)}

    def check(self) -> None:
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; a TCSP BERT is an encoder without cross-attention, so only "
                    "False is allowed."
                )
        for name in ("vocab_size", "max_position_embeddings", "type_vocab_size"):
            check_size(name, getattr(self, name), maximum=1 << 28)
        for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
            check_size(name, getattr(self, name))
        check_size("num_hidden_layers", self.num_hidden_layers, minimum=0, maximum=4096)
        for name in ("source_hidden_size", "head_dim", "pooler_size", "mlm_transform_size", "mlm_head_size"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        check_number("layer_norm_eps", self.layer_norm_eps, 0.0)
        check_number("initializer_range", self.initializer_range, 0.0, 1e6)
        self.check_token("pad_token_id")
        if not isinstance(self.hidden_act, str) and not callable(self.hidden_act):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; it must be the name of an activation, as 'gelu'.")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            if name != "classifier_dropout" or self.classifier_dropout is not None:
                check_number(name, getattr(self, name), 0.0, 1.0)
        width = self.dense_hidden_size
        layers = self.num_hidden_layers
        check_sizes("site_hidden_sizes", self.site_hidden_sizes, 2 * layers + 1, maximum=width)
        if self.site_hidden_sizes is not None and self.site_hidden_sizes[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, but the last entry of site_hidden_sizes is "
                f"{self.site_hidden_sizes[-1]}: hidden_size is the width of the last site, so the two must agree."
            )
        if self.hidden_size > width:
            raise ValueError(
                f"hidden_size is {self.hidden_size}; allowed: 1 to source_hidden_size = {width} (a projection never "
                "widens)."
            )
        check_sizes("layer_intermediate_sizes", self.layer_intermediate_sizes, layers)
        check_sizes("layer_attention_heads", self.layer_attention_heads, layers, maximum=self.num_attention_heads)
        check_sizes("layer_qk_head_sizes", self.layer_qk_head_sizes, layers, maximum=self.dense_head_dim)
        check_sizes("layer_vo_head_sizes", self.layer_vo_head_sizes, layers, maximum=self.dense_head_dim)
        self.check_parameters(self._rough_parameters())
        super().check()

    def _rough_parameters(self) -> int:
        """Of the tables and the layers' linears; residual maps, norms and heads are left out."""
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        count = rows * self.site_size(0)
        for layer in range(self.num_hidden_layers):
            reads, middle, writes = (self.site_size(2 * layer + i) for i in range(3))
            qk, vo = self.qk_head_size_of(layer), self.vo_head_size_of(layer)
            count += self.attention_heads_of(layer) * (2 * qk * reads + vo * (reads + middle))
            count += self.intermediate_size_of(layer) * (middle + writes)
        return count

    def check_heads(self) -> None:
        """Heads must divide the dense width, unless `head_dim` says their size. Models check it, as in transformers."""
        self.check_activation("hidden_act", self.hidden_act)
        width = self.dense_hidden_size
        if self.head_dim is None and width % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide the dense hidden size "
                f"{width} (source_hidden_size, or else hidden_size); allowed: a divisor of {width}, or give head_dim."
            )

    def check_tied_head(self) -> None:
        """A tied masked-LM head reads the word embeddings' width."""
        if self.tie_word_embeddings and self.mlm_head_width != self.site_size(0):
            raise ValueError(
                f"mlm_head_size is {self.mlm_head_width}, but the embeddings have width {self.site_size(0)}: with "
                "tie_word_embeddings=True the two must agree; allowed: equal sizes, or tie_word_embeddings=False."
            )


__all__ = ["TCSPBertConfig"]
