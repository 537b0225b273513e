"""What a latency bench times: dense models of known shapes with random weights, compressed forms, and their peers.

How long a model takes depends on its sizes, not on its weights, so nothing is calibrated or solved here.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from ..architectures import family_of
from ..baselines.low_rank import LowRankLinear, keep_for, linears_of, rank_for
from ..compression.builder import Builder
from ..compression.plan import AXES, Sizes
from ..compression.request import DEFAULT_KIND
from ..compression.sizes import count_parameters, removed_fraction
from ..configuration_tcsp_bert import TCSPBertConfig
from ..errors import TCSPError


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense model; T5s have as many decoder layers as encoder layers, and heads of `head_size`."""

    family: str
    hidden_size: int
    layers: int
    heads: int
    neurons: int
    vocab_size: int

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.heads


SHAPES = {
    "bert-base": Shape("bert", 768, 12, 12, 3072, 30522),
    "t5-base": Shape("t5", 768, 12, 12, 3072, 32128),
    "minilm": Shape("bert", 384, 6, 12, 1536, 30522),
    "tiny": Shape("bert", 32, 2, 2, 64, 120),
    "tiny-t5": Shape("t5", 32, 2, 2, 64, 120),
}
_STEPS = 96


def dense_of_shape(name: str) -> PreTrainedModel:
    """A dense `BertModel` or `T5ForConditionalGeneration` with random weights.

    Raises:
        TCSPError: an unknown shape.
    """
    if name not in SHAPES:
        raise TCSPError(f"--shape is {name!r}; allowed: {', '.join(SHAPES)}.")
    shape = SHAPES[name]
    if shape.family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=shape.vocab_size,
                d_model=shape.hidden_size,
                d_kv=shape.head_size,
                d_ff=shape.neurons,
                num_layers=shape.layers,
                num_heads=shape.heads,
                decoder_start_token_id=0,  # type: ignore[call-arg]  # (taken, but not declared)
            )
        ).eval()
    return BertModel(
        BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.neurons,
        )
    ).eval()


# --- compressed forms ------------------------------------------------------------------------------------------------


def builder_of(dense: PreTrainedModel) -> Builder:
    family, head = family_of(dense)
    return Builder(dense, family, head, DEFAULT_KIND[family], min(8, int(dense.config.hidden_size)))


def build(builder: Builder, sizes: Sizes) -> PreTrainedModel:
    """The compressed model of these sizes, with random weights."""
    made: Any = builder.model_class(builder.config(sizes))
    return made.to(device=builder.dense.device, dtype=builder.dense.dtype).eval()


def one_width(builder: Builder, width: int) -> Sizes:
    """The hidden size alone.

    Raises:
        TCSPError: a width above the dense one.
    """
    if not 1 <= width <= builder.full:
        raise TCSPError(f"--hidden-size is {width}; allowed: 1 to {builder.full}.")
    sizes = builder.dense_sizes()
    sizes.hidden[:] = [width] * len(sizes.hidden)
    return sizes


def even_sizes(builder: Builder, remove: float, axes: Iterable[str]) -> Sizes:
    """The largest sizes that remove the fraction, where every axis keeps the same share of itself in all layers.

    Raises:
        TCSPError: a fraction out of reach.
    """
    costs, axes = builder.costs(), tuple(axes)
    dense = costs.dense()
    whole = costs.parameters(dense)

    def at(step: int) -> Sizes:
        sizes, share = dense.copy(), step / _STEPS
        multiple = builder.multiple_of
        if "hidden" in axes:
            sizes.hidden[:] = [max(1, round(share * costs.full / multiple)) * multiple] * len(sizes.hidden)
        if "filters" in axes:
            sizes.filters[:] = [max(1, round(share * costs.neurons / multiple)) * multiple] * len(sizes.filters)
        if "heads" in axes:
            sizes.heads[:] = [max(1, round(share * costs.heads))] * len(sizes.heads)
        return sizes

    for step in range(_STEPS, 0, -1):
        sizes = at(step)
        if 1.0 - costs.parameters(sizes) / whole >= remove:
            return sizes
    most = 1.0 - costs.parameters(at(1)) / whole
    raise TCSPError(f"--remove is {remove}, but axes {axes} remove at most {most:.3f} of this shape.")


def sizes_like(builder: Builder, config: TCSPBertConfig) -> Sizes:
    """Sizes of a compressed BERT, scaled to another shape: every layer's as the layer's at the same relative depth."""
    costs = builder.costs()
    sizes = costs.dense()
    layers, theirs = len(sizes.filters), config.num_hidden_layers
    places = [round(i * (theirs - 1) / max(1, layers - 1)) for i in range(layers)]

    def scaled(part: float, whole: float, full: int, multiple: int) -> int:
        return full if part == whole else min(full, max(multiple, round(part / whole * full / multiple) * multiple))

    def width(site: int) -> int:
        return scaled(config.site_size(site), config.dense_hidden_size, costs.full, builder.multiple_of)

    sizes.hidden[:] = [width(0)] + [width(2 * place + i) for place in places for i in (1, 2)]
    for i, place in enumerate(places):
        neurons, head = config.intermediate_size, config.dense_head_dim
        sizes.filters[i] = scaled(
            config.intermediate_size_of(place), neurons, costs.neurons, max(1, costs.neurons // 96)
        )
        sizes.heads[i] = scaled(config.attention_heads_of(place), config.num_attention_heads, costs.heads, 1)
        sizes.qk[i] = scaled(config.qk_head_size_of(place), head, costs.head_size, 4)
        sizes.vo[i] = scaled(config.vo_head_size_of(place), head, costs.head_size, 4)
    return sizes


# --- peers -----------------------------------------------------------------------------------------------------------


def peers_of(dense: PreTrainedModel, small: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Other forms of about the size of `small`: without embeddings they have at most as many parameters.

    `svd`: every linear as two thin ones. `filters`: narrower feed-forward networks alone. `shallow`: fewer layers.
    `int8`: the dense model with dynamically quantised linears (of a quarter of the bytes). One that cannot get that
    small is left out.
    """
    goal = count_parameters(small).non_embedding
    makers: dict[str, Callable[[], PreTrainedModel | None]] = {
        "svd": lambda: low_rank_of(dense, removed_fraction(dense, small)),
        "filters": lambda: _narrower(dense, goal),
        "shallow": lambda: _shallower(dense, goal),
        "int8": lambda: int8_of(dense),
    }
    made = {name: make() for name, make in makers.items()}
    return {name: model for name, model in made.items() if model is not None}


def low_rank_of(dense: PreTrainedModel, removed: float) -> PreTrainedModel | None:
    """The dense model with linears of the ranks of `baselines.low_rank`, and random weights."""
    try:
        keep = keep_for(dense, removed)
    except TCSPError:
        return None
    small = copy.deepcopy(dense)
    linears = set(linears_of(small))
    for name, module in list(small.named_modules()):
        if isinstance(module, nn.Linear) and module in linears:
            rank, weight = rank_for(module, keep), module.weight.detach()
            first = torch.randn(rank, module.in_features).to(weight) / module.in_features**0.5
            second = torch.randn(module.out_features, rank).to(weight) / rank**0.5
            small.set_submodule(name, LowRankLinear(first, second, module.bias))
    return small.eval()


def _fields(dense: PreTrainedModel) -> tuple[str, tuple[str, ...]]:
    """Names of the neurons and of the layers in the configuration."""
    if dense.config.model_type == "bert":
        return "intermediate_size", ("num_hidden_layers",)
    return "d_ff", ("num_layers", "num_decoder_layers")


def _largest(dense: PreTrainedModel, names: Iterable[str], values: Iterable[int], goal: int) -> PreTrainedModel | None:
    """The stock model with the first of the values that leaves at most `goal` parameters; random weights."""
    config = copy.deepcopy(dense.config)
    for value in values:
        for name in names:
            setattr(config, name, value)
        with torch.device("meta"):
            count = count_parameters(type(dense)(config)).non_embedding
        if count <= goal:
            made: Any = type(dense)(config)
            return made.to(device=dense.device, dtype=dense.dtype).eval()
    return None


def _narrower(dense: PreTrainedModel, goal: int) -> PreTrainedModel | None:
    name, _ = _fields(dense)
    step = max(1, getattr(dense.config, name) // _STEPS)
    return _largest(dense, [name], range(getattr(dense.config, name), 0, -step), goal)


def _shallower(dense: PreTrainedModel, goal: int) -> PreTrainedModel | None:
    _, names = _fields(dense)
    return _largest(dense, names, range(int(getattr(dense.config, names[0])), 0, -1), goal)


def int8_of(dense: PreTrainedModel) -> PreTrainedModel | None:
    """PyTorch's dynamic quantisation of all linears; None off the processor, which alone has it."""
    if dense.device.type != "cpu" or dense.dtype != torch.float32:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it will move elsewhere
        made: PreTrainedModel = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(dense), {nn.Linear}, dtype=torch.qint8
        )
    return made.eval()


__all__ = [
    "AXES",
    "SHAPES",
    "build",
    "builder_of",
    "dense_of_shape",
    "even_sizes",
    "one_width",
    "peers_of",
    "sizes_like",
]
