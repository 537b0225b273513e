"""Heads and filters by the norm of their weights: no data, no refit.

The score of a unit is the sum of squares of all its weights and biases, in the linears that read and the one that
writes. Every block loses the same fraction of its units, as structured magnitude pruning usually does: one ranking over
all blocks empties whole layers.
"""

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from .budget import cannot_reach, finished, parameters_to_remove, working_copy
from .units import Units, keep_units, units_of


def unit_norms(units: Units) -> torch.Tensor:
    """(count,) float64: sum of squares of each unit's parameters."""
    total = units.block.output.weight.detach().double().square().sum(0)
    for linear in units.block.inner:
        total = total + linear.weight.detach().double().square().sum(1)
        if linear.bias is not None:
            total = total + linear.bias.detach().double().square()
    return total.view(units.count, units.size).sum(1).cpu()


def magnitude(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """Remove the heads and filters with the smallest norms. `stats` is not read.

    Raises:
        TCSPError: the budget is out of reach of heads and filters.
    """
    goal = parameters_to_remove(model, removed)
    small = working_copy(model)
    groups = units_of(small)
    cuts = _cuts(groups, goal)
    if cuts is None:
        raise cannot_reach("Magnitude pruning", removed, sum(units.removable for units in groups), model)
    for units, cut in zip(groups, cuts, strict=True):
        keep_units(units, unit_norms(units).argsort()[cut:].sort().values)
    return finished(small)


def _cuts(groups: list[Units], goal: int) -> list[int] | None:
    """How many units each block loses: the smallest fraction, the same everywhere, that reaches the goal.

    Heads are coarse, so where rounding them cuts more than asked, filters are given back.
    """
    steps = max((units.count for units in groups), default=0)

    def cut_at(share: float, kind: str) -> list[int]:
        return [min(round(share * u.count), u.count - u.least) if u.kind == kind else 0 for u in groups]

    def saved(cuts: list[int]) -> int:
        return sum(cut * units.cost for cut, units in zip(cuts, groups, strict=True))

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
