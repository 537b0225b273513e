"""Smaller attention heads: low-rank factors of the score and of the value path, weighed by the activations."""

import torch

from .least_squares import damped_inverse, floored


def inverse_root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of (..., d, d) and its inverse; directions without energy are floored."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=1e-30).maximum(values[..., -1:] * 1e-10)
    root = values.sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT


def score_moments(
    query: torch.Tensor, key: torch.Tensor, attention: torch.Tensor, queries: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the tokens of a batch of q q' and of the attention-weighted covariance of k, per head (H, d, d).

    query (batch, H, length, d), key (batch, H, keys, d), attention (batch, H, length, keys): probabilities. queries
    (batch, length) marks real tokens. A change of a score moves the output only as far as it differs from the mean
    change under the query's own attention, so keys count by their covariance under it.
    """
    if queries is not None:
        real = queries[:, None, :, None].to(query)
        query, attention = query * real, attention * real
    mean_key = attention @ key
    received = attention.sum(2)  # (batch, H, keys): attention that each key receives from all queries

    def flat(states: torch.Tensor) -> torch.Tensor:
        return states.transpose(0, 1).flatten(1, 2)

    keys, means, rows = flat(key), flat(mean_key), flat(query)
    weighted = keys * flat(received.unsqueeze(-1))
    covariance = (weighted.mT @ keys - means.mT @ means).double()
    return (rows.mT @ rows).double(), covariance


def score_factors(query_moment: torch.Tensor, key_moment: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps P_q, P_k (H, size, d) with `(P_q q)'(P_k k)` the best rank-`size` approximation of `q'k`.

    From the SVD of `C_q^½ C_k^½` per head; the error is measured under the two second moments.
    """
    query_root, _ = inverse_root(query_moment)
    key_root, _ = inverse_root(key_moment)
    left, values, right = torch.linalg.svd(query_root @ key_root)
    balance = values[..., :size].clamp(min=1e-12).rsqrt().unsqueeze(-1)
    return (right[..., :size, :] @ key_root) * balance, (left[..., :size].mT @ query_root) * balance


def value_factors(moments: torch.Tensor, weights: torch.Tensor, heads: int, head_size: int, size: int) -> torch.Tensor:
    """Maps (H, size, d) of unit rows: which combinations of each head's values to keep.

    Head after head, in the basis in which the rest of the inputs explains nothing twice: the d values of a head are
    turned so that dropping one costs its squared singular value, the cheapest go, and the optimal brain surgeon's
    update re-solves all the others.

    Args:
        moments: H (p, p) float64 of the inputs [values of all heads, others, 1].
        weights: X' (outputs, p), the ridge solution in the metric of the loss.
    """
    inverse = damped_inverse(moments, 1e-4 * floored(moments.diagonal()))
    weights = weights.clone()
    offset = 0
    kept: list[torch.Tensor] = []
    for _ in range(heads):
        mine = slice(offset, offset + head_size)
        conditional = torch.linalg.inv(inverse[mine, mine])
        root, inverse_of_root = inverse_root(conditional)
        # all d directions, also where there are fewer outputs
        _, _, right = torch.linalg.svd(weights[:, mine] @ root, full_matrices=len(weights) < head_size)
        turn, back = right @ inverse_of_root, root @ right.T  # new = turn @ old, old = back @ new
        weights[:, mine] = weights[:, mine] @ back
        inverse[mine, :] = back.T @ inverse[mine, :]
        inverse[:, mine] = inverse[:, mine] @ back
        stays = torch.ones(inverse.shape[0], dtype=torch.bool, device=inverse.device)
        stays[offset + size : offset + head_size] = False
        gone = ~stays
        core = torch.linalg.inv(inverse[gone][:, gone])
        correction = core @ inverse[gone][:, stays]
        weights = weights[:, stays] - weights[:, gone] @ correction
        inverse = inverse[stays][:, stays] - inverse[stays][:, gone] @ correction
        # unit rows: values as large as they were. Whitened ones are a thousandth, which fine-tuning does not survive
        kept.append(turn[:size] / turn[:size].norm(dim=1, keepdim=True))
        offset += size
    return torch.stack(kept)


def drop_heads(
    moments: torch.Tensor, weights: torch.Tensor, heads: int, head_size: int, keep: int
) -> tuple[torch.Tensor, list[float], list[int]]:
    """Which heads to keep: the one whose values cost least goes first, the others are re-solved, and so on.

    The arguments are those of `value_factors`; `keep` heads stay.

    Returns:
        Indices of the kept heads, ascending (keep,), the loss by number of heads gone, from 0 on, and the others in
        the order in which they went.
    """
    inverse = damped_inverse(moments, 1e-4 * floored(moments.diagonal()))
    weights = weights.clone()
    left = list(range(heads))
    losses = [0.0]
    order: list[int] = []
    while len(left) > keep:
        blocks = [slice(i * head_size, (i + 1) * head_size) for i in range(len(left))]
        costs = [float(_block_loss(weights[:, mine], inverse[mine, mine])) for mine in blocks]
        cheapest = min(range(len(left)), key=costs.__getitem__)
        losses.append(losses[-1] + costs[cheapest])
        gone = torch.zeros(inverse.shape[0], dtype=torch.bool, device=inverse.device)
        gone[blocks[cheapest]] = True
        correction = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, ~gone])
        weights = weights[:, ~gone] - weights[:, gone] @ correction
        inverse = inverse[~gone][:, ~gone] - inverse[~gone][:, gone] @ correction
        order.append(left.pop(cheapest))
    return torch.tensor(left, device=moments.device), losses, order


def _block_loss(weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """tr(A (H^-1_JJ)^-1 A'): what removing the inputs J costs."""
    return (torch.linalg.solve(inverse, weights.T) * weights.T).sum()
