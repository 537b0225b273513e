"""A narrower stock BERT by the norm of its weights: the usual start of a student, no data and no refit.

One set of coordinates for the whole residual stream, and in every layer the neurons and the entries of each head, with
the largest sums of squares.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from ..errors import TCSPError


def narrow_bert(dense: PreTrainedModel, width: int, neurons: int) -> PreTrainedModel:
    """A stock BERT classifier of this width, with the dense one's number of heads and `neurons` a layer.

    Raises:
        TCSPError: no `BertForSequenceClassification`, or sizes that a stock BERT cannot have.
    """
    name, config = type(dense).__name__, dense.config
    if name != "BertForSequenceClassification":
        raise TCSPError(f"{name} cannot be narrowed: only a BertForSequenceClassification can.")
    heads, full = config.num_attention_heads, config.hidden_size
    if not 1 <= width <= full or width % heads or not 1 <= neurons <= config.intermediate_size:
        raise TCSPError(
            f"width is {width} and neurons {neurons}; allowed: a multiple of {heads} up to {full}, and 1 to "
            f"{config.intermediate_size}."
        )
    fields = {"hidden_size": width, "intermediate_size": neurons}
    narrow: Any = type(config)(**{**config.to_dict(), **fields})
    stock: Any = transformers.BertForSequenceClassification(narrow)
    small: Any = copy.deepcopy(dense)
    with torch.no_grad():
        kept = _largest(_coordinate_norms(small), width)
        for layer in small.bert.encoder.layer:
            _narrow_layer(layer, heads, width // heads, neurons)
        pooler = small.bert.pooler.dense
        rows = _largest(pooler.weight.square().sum(1) * small.classifier.weight.square().sum(0), width)
        _keep_rows(pooler, rows)
        small.classifier.weight = nn.Parameter(small.classifier.weight[:, rows])
        state = {key: _cut_stream(key, value, kept) for key, value in small.state_dict().items()}
    stock.load_state_dict(state)
    return stock.to(dense.device, dense.dtype).eval()


def _largest(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.argsort(descending=True)[:count].sort().values


def _coordinate_norms(small: Any) -> torch.Tensor:
    """(D,): sum of squares of everything that reads or writes a coordinate of the stream."""
    total = torch.zeros(small.config.hidden_size, device=small.device)
    for table in (small.bert.embeddings.word_embeddings, small.bert.embeddings.position_embeddings):
        total += table.weight.square().sum(0)
    for layer in small.bert.encoder.layer:
        own = layer.attention.self
        for reader in (own.query, own.key, own.value, layer.intermediate.dense):
            total += reader.weight.square().sum(0)
        for writer in (layer.attention.output.dense, layer.output.dense):
            total += writer.weight.square().sum(1)
    return total


def _keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    linear.weight, linear.bias = nn.Parameter(linear.weight[rows]), nn.Parameter(linear.bias[rows])


def _narrow_layer(layer: Any, heads: int, size: int, neurons: int) -> None:
    own, output = layer.attention.self, layer.attention.output.dense

    def entries(norms: torch.Tensor) -> torch.Tensor:
        """The `size` largest of every head."""
        before = norms.numel() // heads
        found = norms.view(heads, before).argsort(dim=1, descending=True)[:, :size].sort(dim=1).values
        return (found + before * torch.arange(heads, device=norms.device)[:, None]).flatten()

    before = own.query.weight.shape[0] // heads
    scores = entries(own.query.weight.square().sum(1) * own.key.weight.square().sum(1))
    values = entries(own.value.weight.square().sum(1) * output.weight.square().sum(0))
    for linear, rows in ((own.query, scores), (own.key, scores), (own.value, values)):
        _keep_rows(linear, rows)
    scale = (size / before) ** 0.5  # the stock softmax scale follows the head size
    own.query.weight.mul_(scale)
    own.query.bias.mul_(scale)
    output.weight = nn.Parameter(output.weight[:, values])
    inner, outer = layer.intermediate.dense, layer.output.dense
    rows = _largest(inner.weight.square().sum(1) + outer.weight.square().sum(0), neurons)
    _keep_rows(inner, rows)
    outer.weight = nn.Parameter(outer.weight[:, rows])


def _cut_stream(name: str, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Keep the stream's coordinates in the dimension of a weight that is the stream."""
    if name.startswith("classifier"):
        return value
    if "output.dense." in name or "LayerNorm." in name:
        return value[kept]
    return value[:, kept] if name.endswith("weight") else value
