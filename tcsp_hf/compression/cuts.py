"""Cuts inside a block during the refit: from the normal equations of its output linear, before that is solved.

The equations are narrowed in place: they are the largest matrices of a refit.
"""

import torch

from .filters import drop_inputs
from .heads import drop_heads, value_factors
from .least_squares import NormalEquations, solve
from .memory import give_back

_FIRST_PASS_STRENGTH = 1e-2
_FEWEST_BLOCKS = 48

Problem = tuple[NormalEquations, torch.Tensor]
"""Normal equations of an output linear, and its prior (entries of x, outputs)."""


def cut_values(
    problem: Problem, root: torch.Tensor, heads: int, head_size: int, keep: int, size: int
) -> tuple[Problem, torch.Tensor | None, torch.Tensor]:
    """Keep `keep` heads and `size` values of each; the contexts of all heads are the first inputs.

    Args:
        root: square root of the metric of errors (outputs, outputs).

    Returns:
        The problem of what is left, the map (keep * size, heads * head_size) float64 from the old contexts (and
        values) to the new ones, None when nothing was cut, and the kept heads' indices, ascending.
    """
    equations, prior = problem
    kept = torch.arange(heads, device=prior.device)
    if keep == heads and size == head_size:
        return problem, None, kept
    select = torch.eye(heads * head_size, dtype=torch.float64, device=prior.device)
    if keep < heads:
        with equations.joined() as (moments, cross):
            first = solve(moments, cross, prior, _FIRST_PASS_STRENGTH, equations.bias)
            kept, _, _ = drop_heads(moments, root @ first.T, heads, head_size, keep)
        entries = (kept[:, None] * head_size + torch.arange(head_size, device=prior.device)).flatten()
        others = torch.arange(heads * head_size, len(prior), device=prior.device)
        rows = torch.cat([entries, others])
        equations.keep(rows[:-1] if equations.bias else rows)
        prior = prior[rows]
        select = select[entries]
    if size < head_size:
        with equations.joined() as (moments, cross):
            first = solve(moments, cross, prior, _FIRST_PASS_STRENGTH, equations.bias)
            factors = value_factors(moments, root @ first.T, keep, head_size, size)
        turn = torch.block_diag(*factors)
        others_count = equations.inputs - keep * head_size
        rest = torch.eye(others_count, dtype=torch.float64, device=prior.device)
        equations.transform(torch.block_diag(turn, rest))
        back = torch.block_diag(*torch.linalg.pinv(factors).mT)
        prior = torch.cat([back @ prior[: keep * head_size], prior[keep * head_size :]])
        select = turn @ select
    return (equations, prior), select, kept


def cut_filters(problem: Problem, root: torch.Tensor, neurons: int, keep: int) -> tuple[Problem, torch.Tensor]:
    """Keep `keep` of the first `neurons` inputs; returns what is left, and the kept ones' indices among these."""
    equations, prior = problem
    if keep == neurons:
        return problem, torch.arange(neurons, device=prior.device)
    give_back(equations.nbytes)
    block = max(16, (neurons - keep) // _FEWEST_BLOCKS)
    with equations.joined() as (moments, cross):
        weights = root @ solve(moments, cross, prior, _FIRST_PASS_STRENGTH, equations.bias).T
        give_back(moments.nbytes)
        kept, _, _ = drop_inputs(moments, weights, neurons, keep, block)
        del weights
    give_back(equations.nbytes)
    rows = torch.cat([kept, torch.arange(neurons, len(prior), device=prior.device)])
    equations.keep(rows[:-1] if equations.bias else rows)
    return (equations, prior[rows]), kept


def head_rows(kept: torch.Tensor, size: int) -> torch.Tensor:
    """Row indices of the kept heads in a linear with `size` outputs a head."""
    return (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
