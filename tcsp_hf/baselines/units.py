"""What can go one by one: attention heads and feed-forward filters."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Block, blocks_of, family_of, sites_of
from .pruned_attention import KeptHeadsT5Attention, NoHeadsBertAttention


@dataclass(frozen=True)
class Units:
    """The heads of an attention block, or the filters of a feed-forward network.

    Attributes:
        block: row i of its inner linears, and column i of its output, belong to unit `i // size`.
        count, size: number of units and entries of each.
        least: units that must stay.
        parent, attribute: where the module is that holds the inner linears.
        norm: the module whose input is the stream with the block's output added.
    """

    block: Block
    count: int
    size: int
    least: int
    parent: nn.Module
    attribute: str
    norm: nn.Module

    @property
    def kind(self) -> str:
        """`"heads"` or `"filters"`."""
        return "heads" if self.block.attends else "filters"

    @property
    def cost(self) -> int:
        """Parameters of one unit: its rows and their biases in every inner linear, its columns in the output."""
        rows = sum(linear.in_features + (linear.bias is not None) for linear in self.block.inner)
        return self.size * (rows + self.block.output.out_features)

    @property
    def removable(self) -> int:
        """Parameters of all units that may go."""
        return (self.count - self.least) * self.cost


def units_of(model: PreTrainedModel) -> list[Units]:
    """The units of every block, in the order of the forward pass.

    Raises:
        TCSPError: an unsupported architecture.
    """
    family, _ = family_of(model)
    norms = {site.name: site.norm for site in sites_of(model)}
    names = {module: name for name, module in model.named_modules()}
    heads = int(model.config.num_attention_heads)
    found = []
    for block in blocks_of(model):
        path = names[block.inner[0]].rpartition(".")[0]
        above, _, attribute = path.rpartition(".")
        width = block.output.in_features
        count = heads if block.attends else width
        least = int(block.attends and family == "t5")  # a decoder's cache needs keys in every layer
        norm = norms[block.writes]
        found.append(Units(block, count, width // count, least, model.get_submodule(above), attribute, norm))
    return found


def keep_units(units: Units, kept: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Cut a block down to the units `kept` (ascending indices), in place; scale what they write.

    Args:
        scale: (kept,) factors; None leaves the weights as they are.
    """
    if len(kept) == units.count and scale is None:
        return
    output = units.block.output
    entries = (kept.unsqueeze(1) * units.size + torch.arange(units.size)).reshape(-1).to(output.weight.device)
    for linear in units.block.inner:
        linear.weight = _constant(linear.weight.detach()[entries])
        if linear.bias is not None:
            linear.bias = _constant(linear.bias.detach()[entries])
        linear.out_features = len(entries)
    columns = output.weight.detach()[:, entries]
    if scale is not None:
        columns = columns * scale.repeat_interleave(units.size).to(columns)
    output.weight = _constant(columns)
    output.in_features = len(entries)
    if units.kind == "heads" and len(kept) < units.count:
        _cut_attention(units, kept)


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=False)


def _cut_attention(units: Units, kept: torch.Tensor) -> None:
    module: Any = getattr(units.parent, units.attribute)
    if hasattr(module, "o"):  # a T5Attention writes itself
        setattr(units.parent, units.attribute, KeptHeadsT5Attention(module, kept))
    elif len(kept) == 0:
        setattr(units.parent, units.attribute, NoHeadsBertAttention())
    else:
        module.num_attention_heads = len(kept)
        module.all_head_size = len(kept) * units.size
