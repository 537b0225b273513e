"""A compressed BERT as transformers' own BERT classes: exactly where only neurons were cut, nearly where the width was.

A stock BERT has one LayerNorm between two blocks, whose weight the residual stream and the readers share. Where every
site has the dense width that is all a compressed one has too, so it *is* a stock BERT, with fewer neurons. A smaller
width needs residual maps, which no stock class has: the coordinates of the sites are turned until the maps are nearly
diagonal (`gauge`), and everything else is solved around what remains (`plain_bert_fit`).
"""

import logging
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..calibration import Calibration
from ..compression.cuts import cut_filters
from ..compression.least_squares import NormalEquations, ridge
from ..compression.streams import PackedSample
from ..configuration_tcsp_bert import TCSPBertConfig
from ..errors import TCSPError
from .plain_bert_fit import PlainBertFitter, PlainFit, PlainSizes, site_norms

logger = logging.getLogger("tcsp_hf")
Tensors = dict[str, torch.Tensor]
_MIXED = 1e-5
_NOT_COPIED = ("model_type", "architectures", "transformers_version", "auto_map", "dtype", "_name_or_path")
_POOLED = ("ForSequenceClassification", "ForMultipleChoice")
_FITTED = ("Model", "ForTokenClassification", "ForQuestionAnswering", *_POOLED)
_LEAST = 1e-12


def to_plain_bert(
    model: PreTrainedModel,
    stats: Calibration | None = None,
    *,
    heads: int | None = None,
    neurons: int | None = None,
    linear: int = 0,
    progress: bool | None = False,
) -> PreTrainedModel:
    """A stock transformers model, e.g. `BertForSequenceClassification`, that stands for a compressed BERT.

    With all sites at the dense width, the dense heads and one number of neurons (`compress(..., axes=("filters",),
    uniform=True)`) it is the same function, to rounding, with any head; a base model's hidden states are the lifted
    ones but for what a refit's lift mixes between coordinates, which no LayerNorm can: a warning says how much. With
    one smaller width it is an approximation to start fine-tuning from; `tcsp bench plain-bert` measures how far it is.

    Args:
        model: a compressed BERT of one width, and one size of each kind for all layers. It is left untouched.
        stats: the statistics that it was made from, with their token sample; not needed at the dense width.
        heads: of the result, each `hidden_size / heads` wide; None for the model's own number.
        neurons: of each feed-forward network of the result; None for the model's own number.
        linear: of these neurons, how many pairs serve as linear paths beside the residual stream.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        A new model of the stock class with the same head, in evaluation mode, in float32 unless it is exact. Below the
        dense width its hidden states are in coordinates of its own, and a base model has no pooler.

    Raises:
        TCSPError: no compressed BERT, sizes or a head that a stock BERT cannot hold, statistics of another model, or
            no token sample; the message says which.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, TCSPBertConfig):
        raise TCSPError(
            f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}) is no compressed BERT."
        )
    width = _one_size(config)
    if width == config.dense_hidden_size:
        if any(value is not None for value in (heads, neurons)) or linear:
            raise TCSPError("At the dense width the plain form is exact: heads, neurons and linear cannot be chosen.")
        return _exact(model, config)
    sizes = _sizes(model, config, width, heads, neurons, linear)
    if stats is None or stats.sample.tokens == 0:
        raise TCSPError(
            f"The model is {width} wide, {config.dense_hidden_size} before, and no stock BERT has the residual maps "
            "of a smaller width: compress with axes=('filters',), uniform=True for a plain form that is exact. One "
            "that is only near can be fitted on the token sample of the statistics that the model was made from: give "
            "stats (collected with sample_tokens above 0)."
        )
    made_from = ((config.projection or {}).get("calibration") or {}).get("model_fingerprint")
    if made_from not in (None, stats.model_fingerprint):
        raise TCSPError(
            f"The statistics are of another model ({stats.source_model!r}) than the one that was compressed."
        )
    fit = PlainBertFitter(model, PackedSample(stats.sample.sequences()), sizes, progress).run()
    try:
        plain = _stock(model, config, sizes.heads, sizes.neurons, width)
        prefix = "" if type(model).__name__ == "TCSPBertModel" else "bert."
        tensors = {f"{prefix}{name}": value for name, value in fit.tensors.items()}
        tensors |= _fitted_heads(model, fit)
    finally:
        fit.close()
    return _filled(plain, tensors, model, torch.float32)


def _one_size(config: TCSPBertConfig) -> int:
    """The width that all sites have.

    Raises:
        TCSPError: widths, or another size, differ between layers.
    """
    layers = range(config.num_hidden_layers)
    for what, values in (
        ("widths", list(config.site_widths().values())),
        ("feed-forward neurons", [config.intermediate_size_of(i) for i in layers]),
        ("attention heads", [config.attention_heads_of(i) for i in layers]),
        ("query/key head sizes", [config.qk_head_size_of(i) for i in layers]),
        ("value/output head sizes", [config.vo_head_size_of(i) for i in layers]),
    ):
        if len(set(values)) > 1:
            raise TCSPError(
                f"{what} differ ({min(values)} to {max(values)}), and a stock BERT has one: compress with uniform=True."
            )
    return config.site_size(0)


def _sizes(
    model: PreTrainedModel, config: TCSPBertConfig, width: int, heads: int | None, neurons: int | None, linear: int
) -> PlainSizes:
    own_heads, own_neurons = config.attention_heads_of(0), config.intermediate_size_of(0)
    chosen, count = heads or own_heads, neurons or own_neurons
    head = type(model).__name__.removeprefix("TCSPBert")
    if head not in _FITTED:
        raise TCSPError(
            f"{type(model).__name__} has no plain form below the dense width: its head is {config.dense_hidden_size} "
            f"wide inside, a stock one as wide as the stream. Possible: {', '.join(_FITTED)}."
        )
    if not 1 <= chosen <= own_heads or width % chosen:
        raise TCSPError(
            f"heads is {chosen}; it must divide the width {width} and be at most {own_heads}, the model's number. "
            "Choose another number, or compress to a width that is a multiple of it."
        )
    if not 0 <= 2 * linear < count <= own_neurons + 2 * linear or linear > width:
        raise TCSPError(
            f"neurons is {count} and linear {linear}; of at most {own_neurons} neurons and two for each linear path "
            "some must be left."
        )
    if linear and not _odd_part_is_linear(config):
        raise TCSPError(f"linear is {linear}, but f(x) - f(-x) = x does not hold for hidden_act={config.hidden_act!r}.")
    return PlainSizes(chosen, count, linear)


def _odd_part_is_linear(config: TCSPBertConfig) -> bool:
    activation = transformers.activations.ACT2FN[config.hidden_act]
    grid = torch.linspace(-4.0, 4.0, 33)
    return bool(torch.allclose(activation(grid) - activation(-grid), grid, atol=1e-5))


def _stock(model: PreTrainedModel, config: TCSPBertConfig, heads: int, neurons: int, width: int) -> Any:
    """An empty stock model. A masked-LM head has a table of its own."""
    stock_fields = transformers.BertConfig.__dataclass_fields__.keys()
    own = type(config).__dataclass_fields__.keys() - stock_fields
    values = {name: value for name, value in config.to_dict().items() if name not in own | set(_NOT_COPIED)}
    values |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": neurons}
    stock_config = transformers.BertConfig(**{**values, "tie_word_embeddings": False})
    stock_config._attn_implementation = config._attn_implementation
    name = type(model).__name__.removeprefix("TCSP")
    pooling = {}
    if name == "BertModel":
        pooling = {"add_pooling_layer": width == config.dense_hidden_size and model.pooler is not None}
    with no_init_weights():
        return getattr(transformers, name)(stock_config, **pooling)


def _filled(plain: Any, tensors: Tensors, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    made: PreTrainedModel = plain.to(model.device, dtype).eval()
    made.load_state_dict({name: tensors[name].detach() for name in made.state_dict()})
    return made


# At the dense width ---------------------------------------------------------------------------------------------------


def _exact(model: PreTrainedModel, config: TCSPBertConfig) -> PreTrainedModel:
    heads, width = config.num_attention_heads, config.dense_hidden_size
    head_size = width // heads
    kept = (config.attention_heads_of(0), config.qk_head_size_of(0), config.vo_head_size_of(0))
    if kept != (heads, head_size, head_size):
        raise TCSPError(
            f"The model has {kept[0]} heads of sizes {kept[1]} and {kept[2]}, but a stock BERT of width {width} needs "
            f"{heads} of size {head_size}: compress with axes=('filters',)."
        )
    if config.mlm_transform_width != width or config.pooler_width != width:
        raise TCSPError("The head is narrower than the stream, which no stock BERT has.")
    base: Any = model.base_model
    prefix = "" if base is model else "bert."
    norms = site_norms(model)
    tensors: Tensors = {}
    for kind in ("word", "position", "token_type"):
        table = getattr(base.embeddings, f"{kind}_embeddings").weight
        tensors[f"{prefix}embeddings.{kind}_embeddings.weight"] = table
    weights, biases = _stock_norms(base, norms, headed=base is not model)
    for t, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        layer = f"{prefix}encoder.layer.{(t - 1) // 2}"
        name = f"{prefix}embeddings" if t == 0 else f"{layer}.attention.output" if t % 2 else f"{layer}.output"
        tensors[f"{name}.LayerNorm.weight"], tensors[f"{name}.LayerNorm.bias"] = weight, bias

    def read(linear: nn.Linear, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A linear of z at site t as one of the stock state `weight * z / w + bias`, w the compressed norm's weight."""
        scale = norms[t].weight / weights[t]
        matrix = linear.weight * scale
        return matrix, linear.bias - matrix @ biases[t]

    for i, layer in enumerate(base.encoder.layer):
        name = f"{prefix}encoder.layer.{i}"
        matrix, bias = read(layer.attention.self.qkv, 2 * i)
        parts = zip(matrix.split(width), bias.split(width), strict=True)
        for part, (rows, entries) in zip(("query", "key", "value"), parts, strict=True):
            tensors[f"{name}.attention.self.{part}.weight"] = rows
            tensors[f"{name}.attention.self.{part}.bias"] = entries
        inner = read(layer.intermediate.dense, 2 * i + 1)
        tensors[f"{name}.intermediate.dense.weight"], tensors[f"{name}.intermediate.dense.bias"] = inner
        for block, output, t in (
            ("attention.output", layer.attention.output, 2 * i),
            ("output", layer.output, 2 * i + 1),
        ):
            tensors[f"{name}.{block}.dense.weight"] = output.dense.weight
            tensors[f"{name}.{block}.dense.bias"] = output.dense.bias - biases[t]
    last = len(norms) - 1
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or ".encoder." in f".{name}":
            continue
        reads_stream = name.endswith(("pooler.dense", "cls.predictions.dense")) or (
            base.pooler is None and name in ("classifier", "qa_outputs")
        )
        target = name.replace("cls.predictions.dense", "cls.predictions.transform.dense")
        weight, bias = read(linear, last) if reads_stream else (linear.weight, linear.bias)
        tensors[f"{target}.weight"] = weight
        if bias is not None:
            tensors[f"{target}.bias"] = bias
    if "cls.predictions.decoder.weight" in tensors:
        projection = tensors.pop("cls.predictions.projection.weight")
        tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] @ projection
        tensors["cls.predictions.bias"] = tensors["cls.predictions.decoder.bias"]
        tensors["cls.predictions.transform.LayerNorm.weight"] = torch.ones(width)
        tensors["cls.predictions.transform.LayerNorm.bias"] = torch.zeros(width)
    plain = _stock(model, config, heads, config.intermediate_size_of(0), width)
    return _filled(plain, tensors, model, model.dtype)


def _stock_norms(base: Any, norms: list[Any], headed: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weight and bias of every stock norm: what the residual stream multiplies by; at the end the lift's diagonal."""
    weights = []
    for layer in base.encoder.layer:
        weights += [layer.attention.output.residual.weight, layer.output.residual.weight]
    lift = base.lift_map.weight.detach()
    mixed = float((lift - lift.diagonal().diag()).norm() / lift.norm())
    if not headed and mixed > _MIXED:
        logger.warning(
            "The hidden states of the plain model leave out what the lift mixes between coordinates, %.1f %% of it "
            "(Frobenius norm). The outputs of a model with a head are exact.",
            100 * mixed,
        )
    weights.append(lift.diagonal())
    weights = [weight.detach() * norm.weight.detach() for weight, norm in zip(weights, norms, strict=True)]
    least = [_LEAST * weight.abs().max() for weight in weights]
    weights = [torch.where(w.abs() < small, small, w) for w, small in zip(weights, least, strict=True)]
    biases = [torch.zeros_like(weight) for weight in weights[:-1]]
    return weights, [*biases, base.lift_map.bias.detach()]


# Below it -------------------------------------------------------------------------------------------------------------


def _fitted_heads(model: Any, fit: PlainFit) -> Tensors:
    """The heads over the fitted encoder; a pooler keeps as many of its neurons as the stream is wide."""
    assert fit.carried is not None and fit.exact is not None
    scale = site_norms(model)[-1].weight.detach().double()

    def read(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        weight = linear.weight.detach().double() * scale
        return weight @ fit.last[:-1].T, linear.bias.detach().double() + weight @ fit.last[-1]

    name = type(model).__name__.removeprefix("TCSPBert")
    if name == "Model":
        return {}
    if name in ("ForTokenClassification", "ForQuestionAnswering"):
        head = "classifier" if name == "ForTokenClassification" else "qa_outputs"
        weight, bias = read(getattr(model, head))
        return {f"{head}.weight": weight, f"{head}.bias": bias}
    dense, classifier = model.bert.pooler.dense, model.classifier
    rows, entries = read(dense)
    weight, bias = classifier.weight.detach().double(), classifier.bias.detach().double()
    equations = NormalEquations.zeros(weight.shape[1], weight.shape[0], weight.device)
    for group in fit.sample.groups:
        first = slice(None, None, group.length)
        sums = fit.exact.read(group.rows)[first].to(weight.device).double()
        unit = sums / sums.square().mean(-1, keepdim=True).sqrt() * scale
        wanted = torch.tanh(unit @ dense.weight.detach().double().T + dense.bias.detach().double()) @ weight.T + bias
        pooled = torch.tanh(fit.carried.read(group.rows)[first].to(weight.device).double() @ rows.T + entries)
        held_out = fit.sample.held_out[group.rows][first].to(weight.device)
        equations.add([pooled], wanted, torch.ones_like(pooled[:, 0]), held_out)
    root = torch.eye(weight.shape[0], dtype=torch.float64, device=weight.device)
    keep = min(len(fit.last) - 1, len(rows))
    problem, kept = cut_filters((equations, torch.cat([weight.T, bias[None]])), root, len(rows), keep)
    solution = ridge(*problem)
    return {
        "bert.pooler.dense.weight": rows[kept],
        "bert.pooler.dense.bias": entries[kept],
        "classifier.weight": solution[:-1].T,
        "classifier.bias": solution[-1],
    }
