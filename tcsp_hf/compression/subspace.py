"""Which k directions of a site to keep: a decoder B (D, k) and an encoder E (D, k) with `E'B = I`, `B'B = I`.

`z = E' n` is carried instead of the normalised stream n, and `n ~ B z`. Everything here is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import TCSPError

_RANK_TOLERANCE = 1e-12


@dataclass(frozen=True)
class Kept:
    """What is recorded of a subspace: its width, and the energy that it keeps."""

    size: int
    energy: float


@dataclass(frozen=True)
class Basis:
    """The subspace of one site.

    Attributes:
        decoder: B (D, k), orthonormal columns.
        encoder: E (D, k) with `E'B = I`; equal to B for PCA.
        kept_energy: 1 - E||n - B E'n||² / E||n||² (can be below the PCA value: another loss was minimised).
        gain: E||E'n||² / E||n||², the c² that scales the norm of the kept entries back to the whole.
    """

    decoder: torch.Tensor
    encoder: torch.Tensor
    kept_energy: float
    gain: float

    @property
    def size(self) -> int:
        return self.decoder.shape[1]

    @property
    def kept(self) -> Kept:
        return Kept(self.size, self.kept_energy)


@dataclass(frozen=True)
class Spectrum:
    """Everything needed to cut any k at one site.

    Attributes:
        kind: `"pca"` or `"balanced"`.
        values: (D,) descending; their share of the sum is the energy that `hidden size by energy` counts:
            eigenvalues of Sigma for PCA, squared singular values of `Gamma^½ Sigma^½` for balanced.
        moment: Sigma (D, D).
    """

    kind: str
    values: torch.Tensor
    moment: torch.Tensor
    _left: torch.Tensor
    _right: torch.Tensor

    def size_for_energy(self, energy: float) -> int:
        """Smallest k whose leading values hold at least the fraction `energy` of their sum."""
        share = self.values.cumsum(0) / self.values.sum()
        return min(int((share < energy - 1e-12).sum()) + 1, len(self.values))

    def cut(self, size: int) -> Basis:
        """The subspace of `size` directions."""
        full = self.moment.shape[0]
        if size == full:
            return whole_basis(full)
        if self.kind == "pca":
            decoder = self._right[:, :size].contiguous()
            return make_basis(decoder, decoder, self.moment)
        rank = int((self.values > self.values[0] * _RANK_TOLERANCE).sum())
        kept = min(size, rank)
        decoder, triangle = torch.linalg.qr(self._right[:, :kept])
        # E' = R S^-1 U' Gamma^½: the rows of V' Sigma^-½ without inverting a singular Sigma
        encoder = (triangle @ (self._left[:, :kept] / self.values[:kept].sqrt()).T).T
        if kept < size:
            decoder, encoder = _complete(decoder, encoder, size)
        return make_basis(decoder, encoder, self.moment)


def whole_basis(full: int) -> Basis:
    """Of a site that nothing is left out of: any orthonormal basis is exact."""
    identity = torch.eye(full, dtype=torch.float64)
    return Basis(identity, identity, 1.0, 1.0)


def make_basis(decoder: torch.Tensor, encoder: torch.Tensor, moment: torch.Tensor) -> Basis:
    """`Basis` with its kept energy and gain under Sigma = `moment`."""
    total = float(moment.trace())
    if total <= 0.0:
        return Basis(decoder, encoder, 1.0, 1.0)
    projected = encoder.T @ moment
    carried = float((projected @ encoder).trace())
    # E||n - B z||² = tr Sigma - 2 tr(B E'Sigma) + tr(E'Sigma E), as B'B = I
    lost = total - 2.0 * float((decoder * projected.T).sum()) + carried
    return Basis(decoder, encoder, 1.0 - max(lost, 0.0) / total, carried / total)


def _complete(decoder: torch.Tensor, encoder: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Add directions C in which the data has no energy, orthogonal to B, keeping `E'B = I`."""
    full, kept = decoder.shape
    projector = torch.eye(full, dtype=torch.float64) - decoder @ decoder.T
    extra = torch.linalg.eigh(projector).eigenvectors[:, -(size - kept) :]
    encoder = encoder - extra @ (extra.T @ encoder)
    return torch.cat([decoder, extra], dim=1), torch.cat([encoder, extra], dim=1)


def symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semi-definite matrix; tiny negative eigenvalues count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def pca_spectrum(moment: torch.Tensor) -> Spectrum:
    """Eigenvectors of the uncentred second moment, largest first (the paper, section 3)."""
    values, vectors = torch.linalg.eigh(moment)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    return Spectrum("pca", values, moment, vectors, vectors)


def check_fisher(fisher: torch.Tensor) -> float:
    """The trace of `fisher`, which must not be zero.

    Raises:
        TCSPError: it is.
    """
    trace = float(fisher.trace())
    if trace <= 0.0:
        raise TCSPError(
            "The gradients are zero at a site, so subspace='balanced' has nothing to weigh with: use subspace='pca'."
        )
    return trace


def balanced_spectrum(moment: torch.Tensor, fisher: torch.Tensor, epsilon: float) -> Spectrum:
    """Best rank-k projector for `||Gamma^½ (I - P) Sigma^½||`, by the SVD of `Gamma^½ Sigma^½` = U S V'.

    Gamma is `fisher + epsilon * (mean eigenvalue of fisher) * I`. `B = orth(Sigma^½ V_k)`, and the projector is the
    oblique one of balanced truncation (Moore 1981), `P = Sigma^½ V_k S_k^-1 U_k' Gamma^½`.
    """
    size = moment.shape[0]
    mean = check_fisher(fisher) / size
    weight_root = symmetric_root(fisher / mean + epsilon * torch.eye(size, dtype=torch.float64))
    moment_root = symmetric_root(moment)
    left, values, right = torch.linalg.svd(weight_root @ moment_root)
    return Spectrum("balanced", values.square(), moment, weight_root @ left, moment_root @ right.T)


SpectrumOf = Callable[[list[str]], Spectrum]
"""The spectrum of sites that share a subspace. It takes four matrices (D, D), so it is made where it is needed."""


def spectrum(kind: str, moment: torch.Tensor, fisher: torch.Tensor | None, epsilon: float) -> Spectrum:
    """Spectrum of one site (or of pooled statistics) for `subspace=kind`."""
    if kind == "pca":
        return pca_spectrum(moment)
    if fisher is None:
        raise TCSPError("subspace='balanced' needs gradients: calibrate with fisher=True, or use subspace='pca'.")
    return balanced_spectrum(moment, fisher, epsilon)
