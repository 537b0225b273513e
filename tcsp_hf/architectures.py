"""The dense architectures that can be compressed: which classes, and where their residual stream is normalised."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

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


def writing_options(model: PreTrainedModel) -> dict[str, bool]:
    """What `generate` must be told of a model: no cache for a dense T5 whose decoder has more layers than its encoder,
    because transformers makes the cache of as many layers as the encoder has."""
    config = model.config
    deeper = getattr(config, "num_decoder_layers", 0) > config.num_hidden_layers
    return {"use_cache": False} if config.model_type in PREFIXES and deeper else {}


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
        _check_modules(name, layers)
    _check_heads(model)
    for place, module, wanted in _activations(model, family, [*stacks.values()]):
        if wanted is not None and not _is_activation(module, wanted):
            raise TCSPError(
                f"{name}'s {place} is {type(module).__name__}, but its configuration and class say "
                f"{type(wanted).__name__}, as the compressed model would have: make them agree."
            )


def _check_modules(name: str, layers: nn.ModuleList) -> None:
    """Raise TCSPError where a weight below the layers is quantised, made from others, or in two places."""
    seen: dict[int, str] = {}
    for part, module in layers.named_modules(remove_duplicate=False):
        own = module._parameters.get("weight")
        made = "weight" in module.__dict__ or hasattr(type(module), "weight")
        weight = getattr(module, "weight", None) if made else own
        dense = isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point
        if "Linear" in type(module).__name__ and not dense:
            raise TCSPError(
                f"{name}'s layer.{part} is quantised ({type(module).__name__}): load the model in float32, float16 "
                "or bfloat16, compress it, and quantise the result."
            )
        if own is None and isinstance(weight, torch.Tensor):
            raise TCSPError(
                f"The weight of {name}'s layer.{part} ({type(module).__name__}) is no parameter of its own, but made "
                "from others: merge adapters (merge_and_unload; or compress the model first, then wrap it), end "
                "pruning (torch.nn.utils.prune.remove) or take parametrizations away "
                "(torch.nn.utils.parametrize.remove_parametrizations)."
            )
        first = part if own is None else seen.setdefault(id(module), part)
        if first != part:
            raise TCSPError(
                f"{name}'s layer.{first} and layer.{part} are one module: give every layer its own (copy.deepcopy)."
            )


def _check_heads(model: Any) -> None:
    """Raise TCSPError where the linear of a head is not what the class makes it."""
    name = type(model).__name__
    labels = 1 if name.endswith("ForMultipleChoice") else model.config.num_labels
    heads = {part: labels for part in ("classifier", "qa_outputs", "classification_head.out_proj")}
    for part, size in {**heads, "cls.seq_relationship": 2}.items():
        owner, _, last = part.rpartition(".")
        linear = getattr(getattr(model, owner, None) if owner else model, last, None)
        plain = isinstance(linear, nn.Linear) and linear.bias is not None
        if linear is not None and not (plain and linear.out_features == size):
            raise TCSPError(
                f"{name}'s {part} is not a linear with a bias and {size} outputs. A head of your own goes on a "
                "compressed body: compress the model below it (base_model)."
            )
    if getattr(getattr(model, "lm_head", None), "bias", None) is not None:
        raise TCSPError(
            f"{name}'s lm_head has a bias, which the class does not have: take it away (model.lm_head.bias = None)."
        )


def _activations(model: Any, family: str, stacks: list[Any]) -> Iterator[tuple[str, Any, nn.Module | None]]:
    """Place, function and what the configuration or the class says it is (None: nothing known) of every activation."""
    if family == "t5":
        wanted = _named_activation(model.config.dense_act_fn)
        for stack in stacks:
            for i, block in enumerate(stack.block):
                yield f"block.{i} activation", block.layer[-1].DenseReluDense.act, wanted
        return
    wanted = _named_activation(model.config.hidden_act)
    for i, layer in enumerate(stacks[0].layer):
        yield f"layer.{i}.intermediate_act_fn", layer.intermediate.intermediate_act_fn, wanted
    if hasattr(getattr(model, "cls", None), "predictions"):
        yield "cls.predictions.transform_act_fn", model.cls.predictions.transform.transform_act_fn, wanted
    if getattr(model.base_model, "pooler", None) is not None:
        yield "pooler.activation", getattr(model.base_model.pooler, "activation", None), nn.Tanh()


def _named_activation(name: Any) -> nn.Module | None:
    found = ACT2FN[name] if isinstance(name, str) and name in ACT2FN else None
    return found if isinstance(found, nn.Module) else None


def _is_activation(found: Any, wanted: nn.Module) -> bool:
    """Whether an activation is of a class, or has its values: there are several classes of one function."""
    if type(found) is type(wanted):
        return True
    points = torch.linspace(-4.0, 4.0, 33, device="cpu")
    with torch.no_grad():
        try:
            return torch.allclose(found(points), wanted(points), atol=2e-3)
        except (RuntimeError, TypeError, ValueError):  # of another kind than a function of every number
            return False


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
