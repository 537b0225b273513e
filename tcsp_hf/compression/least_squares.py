"""Streaming ridge regression: float32 products of blocks, summed and solved in float64.

All problems are `min_X sum_i w_i ||[u_i, 1] X - t_i||² + lambda ||D^½ (X - X0)||²` with D the diagonal of the Gram
matrix: shrinkage towards a prior X0 (the projected weights), not towards zero. Lambda is chosen on held-out
sequences, one in five.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import TCSPError
from .memory import give_back

LAMBDAS = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
HELD_OUT_EVERY = 5
FEW_TOKENS = 2
"""Fewer tokens than this for every input are few."""
_STRONG = 0.1
_PANEL = 384
_BLOCK = 2048
_SILENT = 1e-30  # where all inputs are, in a T5, which has no constant among them
_LEAST_ALONE = 0.1  # tokens count alone as well, however much they agree


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows' rows to `total` (p, p) float64, rows (n, p): panels on and above the diagonal only."""
    for start in range(0, rows.shape[1], _PANEL):
        stop = start + _PANEL
        total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]


def mirror(total: torch.Tensor) -> torch.Tensor:
    """Complete in place what `add_gram` summed."""
    for start in range(0, total.shape[0], _PANEL):
        stop = start + _PANEL
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


@dataclass(frozen=True)
class Segments:
    """Pieces of sequences: stand-ins for whole sequences, of which there are too few for a regression.

    Attributes:
        ids: (tokens,) the piece of every token.
        scale: (pieces,) square root of the sequence's length over the piece's.
    """

    ids: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], size: int, device: torch.device) -> "Segments":
        """Cut sequences, one after the other, into equal pieces of at most about `size` tokens."""
        counts = torch.tensor([max(1, round(length / size)) for length in lengths], dtype=torch.int64)
        total = torch.tensor(list(lengths), dtype=torch.int64)
        first = counts.cumsum(0) - counts
        sequence = torch.repeat_interleave(torch.arange(len(total)), total)
        position = torch.arange(int(total.sum())) - (total.cumsum(0) - total)[sequence]
        ids = first[sequence] + position * counts[sequence] // total[sequence].clamp(min=1)
        sizes = torch.bincount(ids, minlength=int(counts.sum())).clamp(min=1)
        scale = (total.repeat_interleave(counts) / sizes).sqrt()
        return cls(ids.to(device), scale.float().to(device))

    def blend(self, rows: torch.Tensor, coherence: float) -> torch.Tensor:
        """Change rows (tokens, p) so that their products are those of the rows by 1 - c and of the pieces' sums by c.

        `a² I + c s² 11'` over the m tokens of a piece has the square root `a I + b 11'`, so that no row is added:
        every row gets b times its piece's sum.
        """
        alone = max(1.0 - coherence, _LEAST_ALONE)
        counts = torch.bincount(self.ids, minlength=len(self.scale)).clamp(min=1)
        shared = ((alone + coherence * self.scale.square() * counts).sqrt() - alone**0.5) / counts
        for part in rows.split(_PANEL, dim=1):  # so that no second copy of the rows is made
            sums = part.new_zeros(len(self.scale), part.shape[1]).index_add_(0, self.ids, part)
            part.mul_(alone**0.5).add_(sums.mul_(shared.to(rows).unsqueeze(1))[self.ids])
        return rows


class _Waiting:
    """Rows that wait until they make a block: one float64 addition for many small batches.

    They wait in one place: copies that come and go between batches' own tensors would leave holes all over the heap.
    """

    def __init__(self, most: int, parts: Sequence[torch.Tensor]) -> None:
        """parts: (n, width) each, as they will come."""
        self._blocks = [part.new_empty(most, part.shape[1]) for part in parts]
        self._most, self._filled = most, 0

    def fill(self, parts: Sequence[torch.Tensor], chosen: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Copy the rows `chosen` (indices) of all parts; a block is given whenever one is full."""
        while len(chosen):
            now = chosen[: self._most - self._filled]
            chosen = chosen[len(now) :]
            for block, part in zip(self._blocks, parts, strict=True):
                torch.index_select(part, 0, now, out=block[self._filled : self._filled + len(now)])
            self._filled += len(now)
            if self._filled == self._most:
                yield self.rest()

    def rest(self) -> list[torch.Tensor]:
        """What waits; nothing waits afterwards."""
        filled, self._filled = self._filled, 0
        return [block[:filled] for block in self._blocks]


class NormalEquations:
    """Sums `H = sum w x x'` and `C = sum w x t'` for x = [u, 1] (or u alone), in two folds (fit, held out) or in one.

    Attributes:
        inputs: number of entries of u; `bias` tells whether x has the constant.
        tokens: how many were added.
        moments: H by fold, (entries of x, entries of x) float64 each.
        cross: C by fold, (entries of x, outputs) float64 each.
    """

    def __init__(self, inputs: int, moments: list[torch.Tensor], cross: list[torch.Tensor], bias: bool = True) -> None:
        self.inputs = inputs
        self.bias = bias
        self.tokens = 0
        self._moments = moments
        self._cross = cross
        self._mirrored = True
        self._waiting: list[_Waiting] | None = None

    @classmethod
    def zeros(
        cls, inputs: int, outputs: int, device: torch.device, bias: bool = True, folds: int = 2
    ) -> "NormalEquations":
        """Nothing added yet. With one fold there is no held-out part: `ridge` cannot choose its strength."""
        size = inputs + int(bias)
        return cls(
            inputs,
            [torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(folds)],
            [torch.zeros(size, outputs, dtype=torch.float64, device=device) for _ in range(folds)],
            bias,
        )

    def add(
        self,
        parts: Sequence[torch.Tensor],
        targets: torch.Tensor,
        weights: torch.Tensor,
        held_out: torch.Tensor,
        segments: Segments | None = None,
        coherence: float = 0.0,
    ) -> None:
        """Add tokens: parts (n, p_i) side by side are u, targets (n, outputs), weights and held_out (n,).

        With `coherence` c in (0, 1], errors that the tokens of a segment have in common count: rows are weighed by
        1 - c, and the sums of each segment's rows by c.
        """
        self.tokens += len(weights)
        root = weights.sqrt().unsqueeze(1)
        constant = [torch.ones_like(root)] if self.bias else []
        block = torch.cat([*parts, *constant], dim=1).mul_(root)
        wanted = targets * root
        if segments is not None and coherence > 0.0:
            block, wanted = segments.blend(block, coherence), segments.blend(wanted, coherence)
        self._wait(block, wanted, held_out)

    def _wait(self, block: torch.Tensor, wanted: torch.Tensor, held_out: torch.Tensor) -> None:
        if self._waiting is None:
            sizes = [_BLOCK, _BLOCK // (HELD_OUT_EVERY - 1)][: len(self._moments)]
            self._waiting = [_Waiting(most, (block, wanted)) for most in sizes]
        for fold, waiting in enumerate(self._waiting):
            chosen = (held_out == bool(fold)).nonzero().squeeze(1)
            for rows in waiting.fill((block, wanted), chosen):
                self._sum(fold, *rows)

    def _sum(self, fold: int, block: torch.Tensor, wanted: torch.Tensor) -> None:
        add_gram(self._moments[fold], block)
        self._cross[fold] += block.T @ wanted
        self._mirrored = False

    def _sum_all(self) -> None:
        """Sum what waits, and let go of where it waited."""
        for fold, waiting in enumerate(self._waiting or ()):
            self._sum(fold, *waiting.rest())
        self._waiting = None

    @property
    def nbytes(self) -> int:
        """Bytes of H, all folds."""
        return sum(total.nbytes for total in self.moments)

    @property
    def moments(self) -> list[torch.Tensor]:
        self._sum_all()
        if not self._mirrored:
            for total in self._moments:
                mirror(total)
            self._mirrored = True
        return self._moments

    @property
    def cross(self) -> list[torch.Tensor]:
        self._sum_all()
        return self._cross

    @property
    def total(self) -> tuple[torch.Tensor, torch.Tensor]:
        """H and C over all folds; with one fold, the sums themselves."""
        (moments, *more_moments), (cross, *more_cross) = self.moments, self.cross
        return sum(more_moments, moments), sum(more_cross, cross)

    @contextmanager
    def joined(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Within, H and C over all folds in the place of the first one's: `total` without the memory of a copy."""
        sums = self.moments, self.cross
        if len(sums[0]) > 1:
            for folds in sums:
                folds[0] += folds[1]
        try:
            yield sums[0][0], sums[1][0]
        finally:
            if len(sums[0]) > 1:
                for folds in sums:
                    folds[0] -= folds[1]

    def keep(self, indices: torch.Tensor) -> None:
        """Only these entries of u (and the constant) from now on; one fold at a time is held twice."""
        rows = torch.cat([indices, indices.new_tensor([self.inputs])]) if self.bias else indices
        moments, cross = self.moments, self.cross
        for fold in range(len(moments)):
            moments[fold] = moments[fold][rows[:, None], rows]
            cross[fold] = cross[fold][rows]
        self.inputs = len(indices)

    def transform(self, matrix: torch.Tensor) -> None:
        """For u' = matrix @ u from now on, matrix (inputs', inputs)."""
        moments, cross = self.moments, self.cross
        wide = matrix.to(moments[0])
        if self.bias:
            wide = torch.block_diag(wide, torch.ones(1, 1).to(wide))
        for fold in range(len(moments)):
            moments[fold] = wide @ moments[fold] @ wide.T
            cross[fold] = wide @ cross[fold]
        self.inputs = matrix.shape[0]


def solve(
    moments: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, strength: float, bias: bool = True
) -> torch.Tensor:
    """Ridge solution (entries of x, outputs) around `prior`; with `bias` the last entry is hardly shrunk."""
    return prior + _shrunk(moments, cross - moments @ prior, strength, bias)


def floored(diagonal: torch.Tensor) -> torch.Tensor:
    """The diagonal of a Gram matrix as the unit of a penalty: above zero, also for inputs that are always silent."""
    return diagonal.clamp(min=max(1e-8 * float(diagonal.mean()), _SILENT))


def _shrunk(moments: torch.Tensor, residual: torch.Tensor, strength: float, bias: bool) -> torch.Tensor:
    """What is added to the prior, from what it leaves of the cross moments (entries of x, outputs)."""
    diagonal = moments.diagonal()
    penalty = floored(diagonal) * strength
    if bias:
        penalty[-1] = 1e-7 * diagonal[-1]
    for _ in range(8):
        factor, failed = _factor(moments, penalty)
        if not int(failed):
            half = torch.linalg.solve_triangular(factor, residual, upper=False)
            return torch.linalg.solve_triangular(factor.mT, half, upper=True)  # cholesky_solve copies the factor
        penalty = penalty * 100.0  # rank-deficient to rounding: shrink harder
    raise TCSPError("The refit's normal equations are not finite: use refit=False, or check the weights.")


def _factor(moments: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factor of `moments` with `shift` added to its diagonal, and whether it failed.

    One copy, column by column, which is how LAPACK works in place; torch makes another of any other.
    """
    shifted = torch.empty_like(moments, memory_format=torch.contiguous_format).mT.copy_(moments)
    shifted.diagonal().add_(shift)
    failed = torch.empty((), dtype=torch.int32, device=moments.device)
    torch.linalg.cholesky_ex(shifted, out=(shifted, failed))
    return shifted, failed


def damped_inverse(moments: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Inverse of a Gram matrix (p, p) with `damping` (p,) added to its diagonal."""
    factor, failed = _factor(moments, damping)
    if int(failed):  # not positive definite to rounding
        return torch.linalg.inv(moments + torch.diag(damping)).contiguous()
    return torch.cholesky_inverse(factor, out=factor).mT  # symmetric, and now row by row


def ridge(
    equations: NormalEquations,
    prior: torch.Tensor,
    metric: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ridge solution with the strength that predicts the held-out sequences best.

    The search goes through `LAMBDAS` from strong to weak and stops at the first that is worse. With fewer than two
    tokens for an input only the strong ones are tried: held-out tokens are few then, too.

    Args:
        prior: X0 (entries of x, outputs) float64.
        metric: (outputs, outputs) weight of the residual, for choosing the strength; identity when None.
    """
    few = equations.tokens < FEW_TOKENS * equations.inputs
    strengths = [strength for strength in LAMBDAS if strength >= _STRONG or not few]
    give_back(equations.nbytes)  # what the batches left, before copies are made of the sums
    if any(float(fold.trace()) <= 0.0 for fold in equations.moments):
        best = strengths[0]  # nothing is held out, or everything: stay close to the prior
    else:
        best = _best_strength(equations, prior, metric, strengths)
    with equations.joined() as sums:
        return solve(*sums, prior, best, equations.bias)


def _best_strength(
    equations: NormalEquations, prior: torch.Tensor, metric: torch.Tensor | None, strengths: Sequence[float]
) -> float:
    (moments, held_out), (cross, held_out_cross) = equations.moments, equations.cross
    residual = cross - moments @ prior

    def error(strength: float) -> float:
        found = _shrunk(moments, residual, strength, equations.bias).add_(prior)
        weighed = found if metric is None else found @ metric
        return float((torch.addmm(held_out_cross, held_out, found, beta=-2.0) * weighed).sum())

    best, least = strengths[0], error(strengths[0])
    for strength in strengths[1:]:
        found = error(strength)
        if found >= least:
            break
        best, least = strength, found
    return best
