"""Whitened low-rank factors of every linear, after SVD-LLM (Wang et al. 2024, arXiv 2403.07378).

With `L L' = E[x x']` the Cholesky factor of a linear's input second moments, truncating the singular values of `W L`
minimises `E|Wx - W'x|²`. Every linear keeps the same fraction of its parameters (their uniform ratio), rounded down to
a rank; inputs are the dense model's, and nothing is fine-tuned afterwards.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import blocks_of
from ..calibration import Calibration
from ..compression.least_squares import add_gram, mirror
from .budget import cannot_reach, finished, parameters_to_remove, working_copy
from .sample import real_rows, sample_batches

_RIDGE = 1e-6  # of the mean second moment: the Cholesky factor of a rank-deficient sample exists
_BISECTIONS = 50


class LowRankLinear(nn.Module):
    """`y = second(first(x))`: a linear of rank r with r * (in + out) weights and the bias of the dense one."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> None:
        """first (rank, in), second (out, rank), bias (out,)."""
        super().__init__()
        self.in_features, self.out_features = first.shape[1], second.shape[0]
        self.first = nn.Linear(first.shape[1], first.shape[0], bias=False, device="meta")
        self.second = nn.Linear(second.shape[1], second.shape[0], bias=bias is not None, device="meta")
        self.first.weight = nn.Parameter(first.contiguous())
        self.second.weight = nn.Parameter(second.contiguous())
        if bias is not None:
            self.second.bias = nn.Parameter(bias.clone())

    @property
    def weight(self) -> torch.Tensor:
        """The last factor: transformers' T5 asks its linears for the dtype of their weight."""
        return self.second.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.second(self.first(inputs)))


@dataclass(frozen=True)
class _Group:
    """Linears with one input, and whose tokens it holds."""

    linears: tuple[nn.Linear, ...]
    stack: str


def _groups(model: PreTrainedModel) -> list[_Group]:
    """All linears of the blocks, and a BERT's pooler."""
    groups = []
    for block in blocks_of(model):
        if block.kind == "cross":
            groups += [_Group(block.inner[:1], block.stack), _Group(block.inner[1:], "encoder")]
        else:
            groups.append(_Group(block.inner, block.stack))
        groups.append(_Group((block.output,), block.stack))
    pooler: Any = getattr(model.base_model, "pooler", None)
    if pooler is not None:
        groups.append(_Group((pooler.dense,), "encoder"))
    return groups


def rank_for(linear: nn.Linear, keep: float) -> int:
    """The largest rank with at most the fraction `keep` of the weights, at least 1."""
    return max(1, int(keep * linear.weight.numel() / (linear.in_features + linear.out_features)))


def linears_of(model: PreTrainedModel) -> list[nn.Linear]:
    """What is factorised: all linears of the blocks, and a BERT's pooler."""
    return [linear for group in _groups(model) for linear in group.linears]


def keep_for(model: PreTrainedModel, removed: float) -> float:
    """The fraction of its weights that every linear keeps; 1 where nothing is to go.

    Raises:
        TCSPError: the budget is below rank 1 everywhere.
    """
    goal = parameters_to_remove(model, removed)
    linears = linears_of(model)

    def saved(keep: float) -> int:
        costs = (rank_for(one, keep) * (one.in_features + one.out_features) for one in linears)
        return sum(one.weight.numel() for one in linears) - sum(costs)

    if goal == 0:
        return 1.0
    if saved(0.0) < goal:
        raise cannot_reach("Low-rank SVD", removed, saved(0.0), model)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if saved(middle) >= goal else (low, middle)
    return low


def low_rank(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """Replace every linear of the blocks (and a BERT's pooler) by two thin ones.

    Raises:
        TCSPError: the budget is below rank 1 everywhere, or the statistics hold no token sample.
    """
    keep = keep_for(model, removed)
    small = working_copy(model)
    if keep >= 1.0:
        return finished(small)
    groups = _groups(small)
    moments = _second_moments(small, stats, groups)
    names = {module: name for name, module in small.named_modules()}
    for group, moment in zip(groups, moments, strict=True):
        root = _cholesky(moment)
        for linear in group.linears:
            small.set_submodule(names[linear], factorise(linear, root, rank_for(linear, keep)))
    return finished(small)


def factorise(linear: nn.Linear, root: torch.Tensor, rank: int) -> LowRankLinear:
    """The rank-`rank` linear nearest to `linear` on inputs with second moments `root root'` (root lower triangular)."""
    weight = linear.weight.detach().double()
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    halves = values[:rank].sqrt()
    first = torch.linalg.solve_triangular(root, halves[:, None] * right[:rank], upper=False, left=False)
    second = left[:, :rank] * halves
    bias = None if linear.bias is None else linear.bias.detach()
    return LowRankLinear(first.to(linear.weight), second.to(linear.weight), bias)


def _cholesky(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.cholesky(moment + _RIDGE * mean * torch.eye(len(moment)).to(moment))


@torch.no_grad()
def _second_moments(model: PreTrainedModel, stats: Calibration, groups: list[_Group]) -> list[torch.Tensor]:
    """E[x x'] (in, in) float64 of every group's input, over the real tokens."""
    sizes = [group.linears[0].in_features for group in groups]
    sums = [torch.zeros(size, size, dtype=torch.float64, device=model.device) for size in sizes]
    counts = [0] * len(groups)
    seen: list[Any] = [None]

    def watch(index: int, stack: str) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = real_rows(args[0], seen[0], stack).double()  # float32 sums can be indefinite by more than the ridge
            add_gram(sums[index], rows)
            counts[index] += len(rows)

        return hook

    handles = [g.linears[0].register_forward_pre_hook(watch(i, g.stack)) for i, g in enumerate(groups)]
    try:
        for batch in sample_batches(model, stats):
            seen[0] = batch
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [mirror(total) / max(1, count) for total, count in zip(sums, counts, strict=True)]
