"""The dense architectures that can be compressed: which classes, and where their residual stream is normalised."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import TCSPError

HEADS = {
    "bert": (
        "Model",
        "ForMaskedLM",
        "ForPreTraining",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
        "ForNextSentencePrediction",
    ),
    "t5": (
        "Model",
        "EncoderModel",
        "ForConditionalGeneration",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
}
PREFIXES = {"bert": ("bert", "Bert"), "t5": ("t5", "T5"), "mt5": ("t5", "MT5")}
"""model_type of the dense model -> (family, prefix of its class names)."""


@dataclass(frozen=True)
class Site:
    """A place where the residual stream is normalised.

    Attributes:
        name: as in `TCSPConfig.site_widths`, or `"mlm_head"`.
        norm: the module whose input is the stream and whose output is `weight * n + bias`.
        normalise: maps the stream x (..., D) to the normalised stream n (..., D), without weight and bias.
        stack: `"encoder"` or `"decoder"`: whose tokens pass here.
    """

    name: str
    norm: nn.Module
    normalise: Callable[[torch.Tensor], torch.Tensor]
    stack: str = "encoder"


def family_of(model: PreTrainedModel) -> tuple[str, str]:
    """Family (`"bert"` or `"t5"`) and head (`"Model"`, `"ForMaskedLM"`, ...) of a dense model.

    Raises:
        TCSPError: an architecture, a class or a feature (decoder, cross-attention) that cannot be compressed.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = type(model).__name__
    supported = [f"{prefix}{head}" for kind, prefix in PREFIXES.values() for head in HEADS[kind]]
    if model_type not in PREFIXES:
        what = "is compressed already" if str(model_type).startswith("tcsp_") else "is not a supported architecture"
        raise TCSPError(f"{name} (model_type {model_type!r}) {what}; supported: {', '.join(supported)}.")
    family, prefix = PREFIXES[model_type]
    head = name.removeprefix(prefix)
    if not name.startswith(prefix) or head not in HEADS[family]:
        raise TCSPError(
            f"{name} is not a supported class; supported: {', '.join(supported)}. A head of your own goes on a "
            "compressed body: compress the model below it (base_model)."
        )
    if family == "bert":
        for feature in ("is_decoder", "add_cross_attention"):
            if getattr(model.config, feature, False):
                raise TCSPError(f"{name} has {feature}=True: only BERT encoders without cross-attention are supported.")
        if getattr(model.config, "position_embedding_type", "absolute") not in ("absolute", None):
            kind = model.config.position_embedding_type
            raise TCSPError(f"{name} has position_embedding_type={kind!r}: only 'absolute' is supported.")
    _check_layout(model, family)
    return family, head


def _check_layout(model: Any, family: str) -> None:
    """Raise TCSPError where layers, linears or a head are not those that the configuration speaks of."""
    name, config = type(model).__name__, model.config
    stacks = {"num_hidden_layers" if family == "bert" else "num_layers": model.base_model.encoder}
    if getattr(model.base_model, "decoder", None) is not None:
        stacks["num_decoder_layers"] = model.base_model.decoder
    for field, stack in stacks.items():
        layers = stack.layer if family == "bert" else stack.block
        if not len(layers) == getattr(config, field) > 0:
            raise TCSPError(
                f"{name} has {len(layers)} layers and {field}={getattr(config, field)}: both must be one number above "
                "0. Set the configuration's to what the model has."
            )
        for part, module in layers.named_modules():
            weight = getattr(module, "weight", None)
            dense = isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point
            if "Linear" in type(module).__name__ and not dense:
                raise TCSPError(
                    f"{name}'s layer.{part} is quantised ({type(module).__name__}): load the model in float32, float16 "
                    "or bfloat16, compress it, and quantise the result."
                )
    if family == "bert":
        labels = 1 if name.endswith("ForMultipleChoice") else config.num_labels
        for part, size in (("classifier", labels), ("qa_outputs", labels), ("cls.seq_relationship", 2)):
            owner, _, last = part.rpartition(".")
            linear = getattr(getattr(model, owner, None) if owner else model, last, None)
            plain = isinstance(linear, nn.Linear) and linear.bias is not None
            if linear is not None and not (plain and linear.out_features == size):
                raise TCSPError(
                    f"{name}'s {part} is not a linear with a bias and {size} outputs. A head of your own goes on a "
                    "compressed body: compress the model below it (base_model)."
                )


def dense_hidden_size(model: PreTrainedModel) -> int:
    """Hidden size D of a dense model."""
    return int(model.config.hidden_size)


def sites_of(model: PreTrainedModel) -> list[Site]:
    """Every site of a dense model in the order of its forward pass.

    Raises:
        TCSPError: see `family_of`.
    """
    family, _ = family_of(model)
    return list(_bert_sites(model) if family == "bert" else t5_sites(model))


@dataclass(frozen=True)
class Block:
    """A residual block: it reads the normalised stream at one site and writes into the sum that the next one norms.

    Attributes:
        kind: `"attention"`, `"cross"` (keys and values read the encoder's last site) or `"ffn"`.
        stack: `"encoder"` or `"decoder"`; `layer` counts within it.
        reads, writes: names of the site that it reads and of the one that norms what it wrote.
        inner: the linears that read: query, key and value, or one (gated: two) of a feed-forward network.
        output: the linear that writes.
        attention: the module whose last output is the attention probabilities (eager); None for a feed-forward network.
    """

    kind: str
    stack: str
    layer: int
    reads: str
    writes: str
    inner: tuple[nn.Linear, ...]
    output: nn.Linear
    attention: nn.Module | None = None

    @property
    def attends(self) -> bool:
        return self.kind != "ffn"


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Every residual block of a dense model in the order of its forward pass.

    Raises:
        TCSPError: see `family_of`.
    """
    family, _ = family_of(model)
    return list(_bert_blocks(model) if family == "bert" else _t5_blocks(model))


def _bert_blocks(model: Any) -> Iterator[Block]:
    reads = "embeddings"
    for i, layer in enumerate(model.base_model.encoder.layer):
        own, middle, end = layer.attention.self, f"layer.{i}.attention", f"layer.{i}.output"
        heads = (own.query, own.key, own.value)
        yield Block("attention", "encoder", i, reads, middle, heads, layer.attention.output.dense, own)
        yield Block("ffn", "encoder", i, middle, end, (layer.intermediate.dense,), layer.output.dense)
        reads = end


def _t5_blocks(model: Any) -> Iterator[Block]:
    base = model.base_model
    for stack in ("encoder", "decoder"):
        if not hasattr(base, stack):
            continue
        layers = getattr(base, stack).block
        parts = ("attention", "ffn") if stack == "encoder" else ("attention", "cross", "ffn")
        for i, block in enumerate(layers):
            for j, (part, layer) in enumerate(zip(parts, block.layer, strict=True)):
                last = part == "ffn"
                after = f"{stack}.{i}.{parts[j + 1]}" if not last else f"{stack}.{i + 1}.attention"
                writes = f"{stack}.final" if last and i + 1 == len(layers) else after
                if last:
                    ffn = layer.DenseReluDense
                    inner = (ffn.wi_0, ffn.wi_1) if hasattr(ffn, "wi_0") else (ffn.wi,)
                    yield Block(part, stack, i, f"{stack}.{i}.{part}", writes, inner, ffn.wo)
                else:
                    own = layer.EncDecAttention if part == "cross" else layer.SelfAttention
                    yield Block(part, stack, i, f"{stack}.{i}.{part}", writes, (own.q, own.k, own.v), own.o, own)


def _bert_sites(model: Any) -> Iterator[Site]:
    base = model.base_model

    def site(name: str, norm: nn.LayerNorm) -> Site:
        return Site(name, norm, lambda x: nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps))

    yield site("embeddings", base.embeddings.LayerNorm)
    for i, layer in enumerate(base.encoder.layer):
        yield site(f"layer.{i}.attention", layer.attention.output.LayerNorm)
        yield site(f"layer.{i}.output", layer.output.LayerNorm)
    if hasattr(getattr(model, "cls", None), "predictions"):
        yield site("mlm_head", model.cls.predictions.transform.LayerNorm)


def t5_sites(model: Any) -> Iterator[Site]:
    base = model.base_model
    for stack in ("encoder", "decoder"):
        if not hasattr(base, stack):
            continue
        parts = ("attention", "ffn") if stack == "encoder" else ("attention", "cross", "ffn")

        def site(name: str, norm: Any, stack: str = stack) -> Site:
            eps = float(norm.variance_epsilon)
            return Site(name, norm, lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), stack)

        for i, block in enumerate(getattr(base, stack).block):
            for part, layer in zip(parts, block.layer, strict=True):
                yield site(f"{stack}.{i}.{part}", layer.layer_norm)
        yield site(f"{stack}.final", getattr(base, stack).final_layer_norm)
