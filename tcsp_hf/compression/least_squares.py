"""Streaming ridge regression: float32 products of blocks, summed and solved in float64.

All problems are `min_X sum_i w_i ||[u_i, 1] X - t_i||² + lambda ||D^½ (X - X0)||²` with D the diagonal of the Gram
matrix: shrinkage towards a prior X0 (the projected weights), not towards zero. Lambda is chosen on held-out
sequences, one in five.
"""

from collections.abc import Sequence

import torch

from ..errors import TCSPError

LAMBDAS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
HELD_OUT_EVERY = 5
_PANEL = 384
_BLOCK = 4096


def gram(rows: torch.Tensor) -> torch.Tensor:
    """rows' rows (p, p) of rows (n, p), computing the upper panels only."""
    size = rows.shape[1]
    if size <= _PANEL:
        return rows.T @ rows
    product = rows.new_empty(size, size)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        product[start:stop, start:] = rows[:, start:stop].T @ rows[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


class NormalEquations:
    """Sums `H = sum w x x'` and `C = sum w x t'` for x = [u, 1], in two folds (fit, held out).

    Attributes:
        inputs: number of entries of u.
        moments: H (2, inputs + 1, inputs + 1) float64.
        cross: C (2, inputs + 1, outputs) float64.
    """

    def __init__(self, inputs: int, moments: torch.Tensor, cross: torch.Tensor) -> None:
        self.inputs = inputs
        self._moments = moments
        self._cross = cross
        # small batches wait until they make a block: one float64 addition for many
        self._waiting: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device) -> "NormalEquations":
        return cls(
            inputs,
            torch.zeros(2, inputs + 1, inputs + 1, dtype=torch.float64, device=device),
            torch.zeros(2, inputs + 1, outputs, dtype=torch.float64, device=device),
        )

    def add(
        self, parts: Sequence[torch.Tensor], targets: torch.Tensor, weights: torch.Tensor, held_out: torch.Tensor
    ) -> None:
        """Add tokens: parts (n, p_i) side by side are u, targets (n, outputs), weights and held_out (n,)."""
        root = weights.sqrt().unsqueeze(1)
        block = torch.cat([*parts, torch.ones_like(root)], dim=1) * root
        wanted = targets * root
        for fold in (0, 1):
            chosen = held_out == bool(fold)
            if bool(chosen.any()):
                self._waiting[fold].append((block[chosen], wanted[chosen]))
            if sum(len(rows) for rows, _ in self._waiting[fold]) >= _BLOCK:
                self._flush(fold)

    def _flush(self, fold: int) -> None:
        if self._waiting[fold]:
            block = torch.cat([rows for rows, _ in self._waiting[fold]])
            self._moments[fold] += gram(block)
            self._cross[fold] += block.T @ torch.cat([wanted for _, wanted in self._waiting[fold]])
            self._waiting[fold] = []

    @property
    def moments(self) -> torch.Tensor:
        for fold in (0, 1):
            self._flush(fold)
        return self._moments

    @property
    def cross(self) -> torch.Tensor:
        for fold in (0, 1):
            self._flush(fold)
        return self._cross

    @property
    def total(self) -> tuple[torch.Tensor, torch.Tensor]:
        """H and C over both folds."""
        return self.moments.sum(0), self.cross.sum(0)

    def keep(self, indices: torch.Tensor) -> "NormalEquations":
        """Only these entries of u (and the constant)."""
        rows = torch.cat([indices, indices.new_tensor([self.inputs])])
        return NormalEquations(len(indices), self.moments[:, rows][:, :, rows], self.cross[:, rows])

    def transform(self, matrix: torch.Tensor) -> "NormalEquations":
        """For u' = matrix @ u, matrix (inputs', inputs)."""
        wide = torch.block_diag(matrix.to(self.moments), torch.ones(1, 1).to(self.moments))
        return NormalEquations(matrix.shape[0], wide @ self.moments @ wide.T, wide @ self.cross)


def solve(moments: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """Ridge solution (inputs + 1, outputs) around `prior`; the constant is hardly shrunk."""
    diagonal = moments.diagonal()
    penalty = diagonal.clamp(min=1e-8 * float(diagonal.mean())) * strength
    penalty[-1] = 1e-7 * diagonal[-1]
    for _ in range(8):
        factor, failed = torch.linalg.cholesky_ex(moments + torch.diag(penalty))
        if not int(failed):
            return prior + torch.cholesky_solve(cross - moments @ prior, factor)
        penalty = penalty * 100.0  # rank-deficient to rounding: shrink harder
    raise TCSPError("The refit's normal equations are not finite: use refit=False, or check the weights.")


def ridge(
    equations: NormalEquations,
    prior: torch.Tensor,
    metric: torch.Tensor | None = None,
    strengths: Sequence[float] = LAMBDAS,
) -> torch.Tensor:
    """Ridge solution with the strength that predicts the held-out sequences best.

    Args:
        prior: X0 (inputs + 1, outputs) float64.
        metric: (outputs, outputs) weight of the residual, for choosing the strength; identity when None.
        strengths: lambdas from strong to weak; the search stops at the first that is worse.
    """
    best: tuple[float, float] | None = None
    if float(equations.moments[1, -1, -1]) <= 0.0 or float(equations.moments[0, -1, -1]) <= 0.0:
        best = (0.0, strengths[0])  # nothing is held out, or everything: stay close to the prior
    else:
        for strength in strengths:
            found = solve(equations.moments[0], equations.cross[0], prior, strength)
            weighed = found if metric is None else found @ metric
            error = float(((equations.moments[1] @ found - 2.0 * equations.cross[1]) * weighed).sum())
            if best is not None and error >= best[0]:
                break
            best = (error, strength)
    assert best is not None
    return solve(*equations.total, prior, best[1])
