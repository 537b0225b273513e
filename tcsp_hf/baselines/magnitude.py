"""Heads and filters by the norm of their weights: no data, no refit.

The score of a unit is the sum of squares of all its weights and biases, in the linears that read and the one that
writes. Every block loses the same fraction of its units, as structured magnitude pruning usually does: one ranking over
all blocks empties whole layers.
"""

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from .blocks import Block, blocks_of, cannot_reach, finished, keep_units, parameters_to_remove, working_copy


def unit_norms(block: Block) -> torch.Tensor:
    """(units,) float64: sum of squares of each unit's parameters."""
    total = torch.zeros(block.units, dtype=torch.float64)
    for linear in block.reader_linears:
        rows = linear.weight.detach().double().square().sum(1)
        if linear.bias is not None:
            rows = rows + linear.bias.detach().double().square()
        total += rows.view(block.units, block.size).sum(1).cpu()
    columns = block.writer_linear.weight.detach().double().square().sum(0)
    return total + columns.view(block.units, block.size).sum(1).cpu()


def magnitude(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """Remove the heads and filters with the smallest norms. `stats` is not read.

    Raises:
        TCSPError: the budget is out of reach of heads and filters.
    """
    goal = parameters_to_remove(model, removed)
    small = working_copy(model)
    blocks = blocks_of(small)
    cuts = _cuts(blocks, goal)
    if cuts is None:
        largest = sum((block.units - block.least) * block.cost for block in blocks)
        raise cannot_reach("Magnitude pruning", removed, largest, model)
    for block, cut in zip(blocks, cuts, strict=True):
        keep_units(block, unit_norms(block).argsort()[cut:].sort().values)
    return finished(small)


def _cuts(blocks: list[Block], goal: int) -> list[int] | None:
    """How many units each block loses: the smallest fraction, the same everywhere, that reaches the goal.

    Heads are coarse, so where rounding them cuts more than asked, filters are given back.
    """
    steps = max((block.units for block in blocks), default=0)

    def cut_at(share: float, kind: str) -> list[int]:
        return [
            min(round(share * block.units), block.units - block.least) if block.kind == kind else 0 for block in blocks
        ]

    def saved(cuts: list[int]) -> int:
        return sum(cut * block.cost for cut, block in zip(cuts, blocks, strict=True))

    for step in range(steps + 1):
        heads, filters = cut_at(step / steps, "heads"), cut_at(step / steps, "filters")
        if saved(heads) + saved(filters) < goal:
            continue
        for less in range(step, -1, -1):
            fewer = cut_at(less / steps, "filters")
            if saved(heads) + saved(fewer) < goal:
                break
            filters = fewer
        return [a + b for a, b in zip(heads, filters, strict=True)]
    return None
