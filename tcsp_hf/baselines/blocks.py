"""The blocks of a dense BERT or T5 in units that can go: attention heads and feed-forward filters."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import family_of
from ..compression import count_parameters
from ..errors import TCSPError
from .pruned_attention import KeptHeadsT5Attention, NoHeadsBertAttention


@dataclass(frozen=True)
class Block:
    """An attention or feed-forward block: linears read the stream, one linear writes back into it.

    Attributes:
        kind: `"heads"` or `"filters"`.
        stack: `"encoder"` or `"decoder"`: whose tokens pass here.
        parent, attribute: where the module is that holds the readers.
        readers: names of the linears that read; row i belongs to unit `i // size`.
        holder, writer: the module and the name of the linear that writes; column i belongs to unit `i // size`.
        units, size: number of units and entries of each.
        sum_module: the module that sees the stream plus what the block wrote: in its input (`sum_is_input`, the norm
            of a post-LN model) or in its output.
        least: units that must stay.
    """

    kind: str
    stack: str
    parent: nn.Module
    attribute: str
    readers: tuple[str, ...]
    holder: nn.Module
    writer: str
    units: int
    size: int
    sum_module: nn.Module
    sum_is_input: bool
    least: int

    @property
    def module(self) -> nn.Module:
        return cast(nn.Module, getattr(self.parent, self.attribute))

    @property
    def reader_linears(self) -> list[nn.Linear]:
        return [getattr(self.module, name) for name in self.readers]

    @property
    def writer_linear(self) -> nn.Linear:
        return cast(nn.Linear, getattr(self.holder, self.writer))

    @property
    def cost(self) -> int:
        """Parameters of one unit: its rows and their biases in every reader, its columns in the writer."""
        rows = sum(linear.in_features + (linear.bias is not None) for linear in self.reader_linears)
        return self.size * (rows + self.writer_linear.out_features)


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """Every block, in the order of the forward pass.

    Raises:
        TCSPError: an unsupported architecture.
    """
    family, _ = family_of(model)
    return list(_bert_blocks(model) if family == "bert" else _t5_blocks(model))


def layers_of(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The layers of every stack; `"encoder"`, and for an encoder-decoder also `"decoder"`."""
    family, _ = family_of(model)
    base: Any = model.base_model
    if family == "bert":
        return {"encoder": base.encoder.layer}
    return {stack: getattr(base, stack).block for stack in ("encoder", "decoder") if hasattr(base, stack)}


def _bert_blocks(model: PreTrainedModel) -> Iterator[Block]:
    heads = model.config.num_attention_heads
    for item in layers_of(model)["encoder"]:
        layer: Any = item
        attention, output, wide = layer.attention.self, layer.attention.output, layer.output
        yield Block(
            "heads",
            "encoder",
            layer.attention,
            "self",
            ("query", "key", "value"),
            output,
            "dense",
            heads,
            attention.attention_head_size,
            output.LayerNorm,
            True,
            0,
        )
        neurons = layer.intermediate.dense.out_features
        yield Block(
            "filters",
            "encoder",
            layer,
            "intermediate",
            ("dense",),
            wide,
            "dense",
            neurons,
            1,
            wide.LayerNorm,
            True,
            0,
        )


def _t5_blocks(model: PreTrainedModel) -> Iterator[Block]:
    config = model.config
    for stack, layers in layers_of(model).items():
        for item in layers:
            parts: Any = cast(Any, item).layer
            for part in parts[:-1]:
                name = "SelfAttention" if hasattr(part, "SelfAttention") else "EncDecAttention"
                holder = getattr(part, name)
                yield Block(
                    "heads",
                    stack,
                    part,
                    name,
                    ("q", "k", "v"),
                    holder,
                    "o",
                    config.num_heads,
                    config.d_kv,
                    part,
                    False,
                    1,  # a decoder's cache needs keys in every layer
                )
            wide = parts[-1].DenseReluDense
            readers = ("wi_0", "wi_1") if hasattr(wide, "wi_0") else ("wi",)
            yield Block(
                "filters",
                stack,
                parts[-1],
                "DenseReluDense",
                readers,
                wide,
                "wo",
                wide.wo.in_features,
                1,
                parts[-1],
                False,
                0,
            )


def working_copy(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy to cut, in evaluation mode, whose parameters need no gradients."""
    return cast(PreTrainedModel, copy.deepcopy(dense).eval().requires_grad_(False))


def finished(model: PreTrainedModel) -> PreTrainedModel:
    """What a baseline hands back: a model that can be trained."""
    return cast(PreTrainedModel, model.eval().requires_grad_(True))


def parameters_to_remove(model: PreTrainedModel, removed: float) -> int:
    """The fewest non-embedding parameters whose removal is at least the fraction `removed`.

    Raises:
        TCSPError: `removed` is not a number in [0, 1).
    """
    if isinstance(removed, bool) or not isinstance(removed, (int, float)) or not 0.0 <= removed < 1.0:
        raise TCSPError(f"removed is {removed!r}; it must be a number from 0 to below 1.")
    count = count_parameters(model).non_embedding
    return count - int((1.0 - removed) * count + 1e-9)


def cannot_reach(method: str, removed: float, largest: int, model: PreTrainedModel) -> TCSPError:
    """The error of a budget that is out of a method's reach; `largest`: the most parameters that it can remove."""
    share = largest / count_parameters(model).non_embedding
    return TCSPError(f"{method} cannot remove {removed:.1%}: at most {share:.1%} of this model.")


def keep_units(block: Block, kept: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Cut a block down to the units `kept` (ascending indices), in place; scale their columns in the writer.

    Args:
        scale: (kept,) factors; None leaves the weights as they are.
    """
    if len(kept) == block.units and scale is None:
        return
    entries = (kept.unsqueeze(1) * block.size + torch.arange(block.size)).reshape(-1)
    for linear in block.reader_linears:
        entries = entries.to(linear.weight.device)
        linear.weight = nn.Parameter(linear.weight.detach()[entries].contiguous(), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[entries].contiguous(), requires_grad=False)
        linear.out_features = len(entries)
    writer = block.writer_linear
    columns = writer.weight.detach()[:, entries]
    if scale is not None:
        columns = columns * scale.repeat_interleave(block.size).to(columns)
    writer.weight = nn.Parameter(columns.contiguous(), requires_grad=False)
    writer.in_features = len(entries)
    if block.kind == "heads" and len(kept) < block.units:
        _cut_attention(block, kept)


def _cut_attention(block: Block, kept: torch.Tensor) -> None:
    module: Any = block.module
    if "q" in block.readers:
        setattr(block.parent, block.attribute, KeptHeadsT5Attention(module, kept))
    elif len(kept) == 0:
        setattr(block.parent, block.attribute, NoHeadsBertAttention())
    else:
        module.num_attention_heads = len(kept)
        module.all_head_size = len(kept) * block.size
