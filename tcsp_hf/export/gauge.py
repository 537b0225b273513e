"""Rotations of the sites' coordinates in which residual maps are as diagonal as they can be.

A compressed BERT is the same function in any orthonormal coordinates of its sites, and a stock BERT's residual stream
carries, from one norm to the next, each coordinate times a number of its own: the LayerNorm's weight. So rotations Q
and weights g are sought for which `diag(g_t) Q_t` is close to `Q_(t+1) R_t` for every residual map R_t, all blocks
together. In Q_(t+1) alone that is a Procrustes problem (Schoenemann 1966); in Q_t it is quadratic and is solved by
linear majorisation. A stock LayerNorm also takes the mean away: the direction with the least energy is turned onto it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SWEEPS = 25
_ENOUGH = 1e-5  # a sweep that improves the misfit by less than this fraction is the last


@dataclass(frozen=True)
class Gauge:
    """Coordinates of every site.

    Attributes:
        turns: Q (k, k) float64 of every site, orthogonal; the stock stream is `Q u`.
        weights: g (k,) of every block: what the stock residual stream is multiplied by.
        misfit: of every block: `E||(diag(g) Q_t - Q_(t+1) R) u||² / E||R u||²`.
    """

    turns: list[torch.Tensor]
    weights: list[torch.Tensor]
    misfit: list[float]


def choose_gauge(
    maps: Sequence[torch.Tensor], moments: Sequence[torch.Tensor], scales: Sequence[float], sweeps: int = SWEEPS
) -> Gauge:
    """Minimise the misfits' sum over all rotations and weights, from the rotations of one pass forward.

    Args:
        maps: R (k, k) of every block, float64.
        moments: E[u u'] (k, k) of every site, one more than maps.
        scales: of every block, what its misfit counts: one over the mean square of the sum that its norm reads.
    """
    frames = [_Frame.of(moment) for moment in moments]
    turns = [frames[0].turn(torch.eye(len(moments[0]), dtype=torch.float64))]
    for t, residual in enumerate(maps):
        turns.append(frames[t + 1].turn(turns[t] @ moments[t] @ residual.T))
    weights = [_weights(*parts) for parts in zip(maps, moments[:-1], turns[:-1], turns[1:], strict=True)]
    before = float("inf")
    for _ in range(sweeps):
        for t in range(len(turns)):
            pull = torch.zeros_like(turns[t])
            if t < len(maps):
                square, moment = weights[t].square(), moments[t]
                away = (square.max() - square)[:, None] * (turns[t] @ moment)
                pull += scales[t] * (away + weights[t][:, None] * (turns[t + 1] @ maps[t] @ moment))
            if t > 0:
                pull += scales[t - 1] * (weights[t - 1][:, None] * (turns[t - 1] @ moments[t - 1] @ maps[t - 1].T))
            turns[t] = frames[t].turn(pull)
        weights = [_weights(*parts) for parts in zip(maps, moments[:-1], turns[:-1], turns[1:], strict=True)]
        misfit = _misfit(maps, moments, turns, weights)
        now = sum(misfit)
        if before - now < _ENOUGH * before:
            break
        before = now
    return Gauge(turns, weights, _misfit(maps, moments, turns, weights))


@dataclass(frozen=True)
class _Frame:
    """A site's directions, the one of least energy (k, 1) apart, and the mean of the stock coordinates likewise."""

    least: torch.Tensor
    rest: torch.Tensor
    mean: torch.Tensor
    others: torch.Tensor

    @classmethod
    def of(cls, moment: torch.Tensor) -> "_Frame":
        size = len(moment)
        vectors = torch.linalg.eigh(moment).eigenvectors
        mean = torch.full((size, 1), size**-0.5, dtype=moment.dtype)
        others = torch.linalg.qr(torch.cat([mean, torch.eye(size, dtype=moment.dtype)[:, 1:]], dim=1))[0][:, 1:]
        return cls(vectors[:, :1], vectors[:, 1:], mean, others)

    def turn(self, pull: torch.Tensor) -> torch.Tensor:
        """The rotation Q with the largest tr(Q' pull) that maps the direction of least energy onto the mean."""
        left, _, right = torch.linalg.svd(self.others.T @ pull @ self.rest)
        return self.mean @ self.least.T + self.others @ (left @ right) @ self.rest.T


def _weights(residual: torch.Tensor, moment: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Least squares: g_i = E[(Q u)_i (Q' R u)_i] / E[(Q u)_i²]; the mean's coordinate of both is of no account."""
    centred = there - there.mean(0, keepdim=True)
    product = ((centred @ residual @ moment) * here).sum(1)
    return product / ((here @ moment) * here).sum(1).clamp(min=1e-30)


def _misfit(
    maps: Sequence[torch.Tensor],
    moments: Sequence[torch.Tensor],
    turns: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
) -> list[float]:
    found = []
    for t, residual in enumerate(maps):
        error = weights[t][:, None] * turns[t] - turns[t + 1] @ residual
        found.append(float(((error @ moments[t]) * error).sum() / ((residual @ moments[t]) * residual).sum()))
    return found
