"""Which inputs of an output linear to drop, and what dropping costs: the optimal brain surgeon, in blocks.

For the least-squares problem with Gram matrix H and solution X (optimal brain surgeon: Hassibi and Stork 1993; with
layer-wise Gram matrices: Frantar and Alistarh 2022), removing the inputs J and re-solving for the others adds
`tr(X_J' (H^-1_JJ)^-1 X_J)` to the loss. The cheapest block goes first, H^-1 and X are updated, and so on.
"""

import torch

from .least_squares import damped_inverse, floored

_COMPACT = 0.85
"""What went is cut out of the matrices once less than this share of them is left."""
_ROWS = 256


def drop_inputs(
    moments: torch.Tensor, weights: torch.Tensor, candidates: int, keep: int, block: int = 16
) -> tuple[torch.Tensor, list[tuple[int, float]], torch.Tensor]:
    """Keep `keep` of the first `candidates` inputs.

    Args:
        moments: H (p, p) float64; inputs behind the candidates always stay.
        weights: X' (outputs, p), the solution, already in the metric of the loss.
        candidates: how many leading inputs may go.
        keep: how many of them stay.
        block: inputs removed at a time.

    Returns:
        Indices of the kept candidates, ascending (keep,), the curve (inputs left, loss added so far), and the indices
        of the others in the order in which they went.
    """
    inverse = damped_inverse(moments, 1e-5 * floored(moments.diagonal()))
    weights = weights.clone()
    index = torch.arange(moments.shape[0], device=moments.device)
    alive = torch.ones(candidates, dtype=torch.bool, device=moments.device)  # of the candidates still in `inverse`
    left, loss = candidates, 0.0
    curve = [(left, loss)]
    order: list[torch.Tensor] = []
    while left > keep:
        count = min(block, left - keep)
        score = weights[:, : len(alive)].square().sum(0) / inverse.diagonal()[: len(alive)]
        gone = score.masked_fill(~alive, float("inf")).argsort()[:count]
        order.append(index[gone])
        core = torch.linalg.inv(inverse[gone][:, gone])
        lost = weights[:, gone]
        loss += float(((lost @ core) * lost).sum())
        rows = inverse[gone]
        correction = core @ rows
        weights.addmm_(lost, correction, alpha=-1.0)  # the columns of what went become zero
        inverse.addmm_(rows.T, correction, alpha=-1.0)
        alive[gone] = False
        left -= count
        curve.append((left, loss))
        if left < _COMPACT * len(alive):
            stays = torch.cat([alive, alive.new_ones(len(index) - len(alive))]).nonzero().squeeze(1)
            weights, index = weights[:, stays], index[stays]
            inverse = _compact(inverse, stays)
            alive = alive[alive]
    kept = index[: len(alive)][alive]
    return kept.sort().values, curve, torch.cat(order) if order else index[:0]


def _compact(matrix: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """`matrix[stays][:, stays]` of a matrix (p, p) kept row by row, in its own place; stays (n,) ascending."""
    size = len(stays)
    places = matrix.view(-1)
    for start in range(0, size, _ROWS):
        rows = matrix[stays[start : start + _ROWS]][:, stays]
        places[start * size : start * size + rows.numel()] = rows.view(-1)  # never beyond the rows already read
    return places[: size * size].view(size, size)
