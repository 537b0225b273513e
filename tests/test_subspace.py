"""The subspaces are the best ones."""

import pytest
import torch
from common import orthonormal
from hypothesis import given
from hypothesis import strategies as st

from tcsp_hf import TCSPError
from tcsp_hf.compression.subspace import balanced_spectrum, make_basis, pca_spectrum, spectrum, symmetric_root

SIZE = 7
seeds = st.integers(0, 10_000)


def moment(seed: int, rank: int = SIZE, size: int = SIZE) -> torch.Tensor:
    """A random (size, size) second moment of the given rank, with a spectrum that falls."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * size, rank, generator=generator, dtype=torch.float64)
    rows = rows * 0.6 ** torch.arange(rank)
    mixed = rows @ orthonormal(size, rank, generator).T
    return mixed.T @ mixed / len(rows)


def weighted_loss(sigma: torch.Tensor, gamma: torch.Tensor, decoder: torch.Tensor, encoder: torch.Tensor) -> float:
    """`||Gamma^½ (I - B E') Sigma^½||²` by its trace, without any square root."""
    rest = torch.eye(len(sigma), dtype=torch.float64) - decoder @ encoder.T
    return float((gamma @ rest @ sigma @ rest.T).trace())


def regularised(gamma: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Gamma plus epsilon times its mean eigenvalue, in units of that mean."""
    return gamma / (gamma.trace() / len(gamma)) + epsilon * torch.eye(len(gamma), dtype=torch.float64)


@given(seeds, st.integers(1, SIZE), st.integers(1, SIZE), st.sampled_from(["pca", "balanced"]))
def test_encoder_and_decoder(seed, rank, k, kind):
    """`E'B = I` and `B'B = I`, also where Sigma has no k directions; what Sigma reaches is carried exactly."""
    sigma, gamma = moment(seed, rank), moment(seed + 1)
    basis = spectrum(kind, sigma, gamma, 0.3).cut(k)
    eye = torch.eye(k, dtype=torch.float64)
    assert basis.decoder.shape == basis.encoder.shape == (SIZE, k) and basis.size == k
    assert torch.allclose(basis.decoder.T @ basis.decoder, eye, atol=1e-9)
    assert torch.allclose(basis.encoder.T @ basis.decoder, eye, atol=1e-7)
    assert basis.kept_energy <= 1 + 1e-12
    if k >= rank:
        assert torch.allclose(basis.decoder @ (basis.encoder.T @ sigma), sigma, atol=1e-7)
        assert basis.kept_energy == pytest.approx(1.0, abs=1e-9)
        assert basis.gain == pytest.approx(1.0, abs=1e-6)
    if kind == "pca":
        assert torch.equal(basis.decoder, basis.encoder)


@given(seeds, st.integers(1, SIZE - 1))
def test_pca_keeps_the_most_energy(seed, k):
    sigma = moment(seed)
    basis = pca_spectrum(sigma).cut(k)
    values = torch.linalg.eigvalsh(sigma).flip(0)
    assert basis.kept_energy == pytest.approx(float(values[:k].sum() / values.sum()), abs=1e-10)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        other = orthonormal(SIZE, k, generator)
        assert make_basis(other, other, sigma).kept_energy <= basis.kept_energy + 1e-10


@given(seeds, st.integers(1, SIZE - 1), st.sampled_from([0.01, 0.3, 1.0]))
def test_balanced_has_the_least_weighted_loss(seed, k, epsilon):
    """Below PCA's, below that of any random oblique projector, and no small step away from it is better."""
    sigma, gamma = moment(seed), moment(seed + 1)
    found = balanced_spectrum(sigma, gamma, epsilon)
    basis = found.cut(k)
    weight = regularised(gamma, epsilon)
    least = weighted_loss(sigma, weight, basis.decoder, basis.encoder)
    assert least == pytest.approx(float(found.values[k:].sum()), rel=1e-6, abs=1e-9), "the singular values left out"
    pca = pca_spectrum(sigma).cut(k)
    assert least <= weighted_loss(sigma, weight, pca.decoder, pca.encoder) + 1e-9
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        decoder = orthonormal(SIZE, k, generator)
        encoder = torch.randn(SIZE, k, generator=generator, dtype=torch.float64)
        encoder = encoder @ torch.linalg.pinv(decoder.T @ encoder).mT
        assert least <= weighted_loss(sigma, weight, decoder, encoder) + 1e-9
        step = 1e-3 * torch.randn(2, SIZE, k, generator=generator, dtype=torch.float64)
        near = weighted_loss(sigma, weight, basis.decoder + step[0], basis.encoder + step[1])
        assert least <= near + 1e-9


@given(seeds, st.integers(1, SIZE - 1))
def test_balanced_without_preferences_is_pca(seed, k):
    """Where all directions of the output weigh the same, the two keep the same subspace."""
    sigma = moment(seed)
    values = torch.linalg.eigvalsh(sigma).flip(0)
    if float(values[k] / values[k - 1]) > 0.9:
        return  # no gap, no one subspace
    pca = pca_spectrum(sigma).cut(k)
    for gamma, epsilon in ((torch.eye(SIZE, dtype=torch.float64), 0.1), (moment(seed + 1), 1e9)):
        basis = balanced_spectrum(sigma, gamma, epsilon).cut(k)
        assert torch.allclose(basis.decoder @ basis.decoder.T, pca.decoder @ pca.decoder.T, atol=1e-5)


def test_balanced_prefers_what_the_output_reads():
    """Much energy that the output does not read loses against a little that it reads."""
    sigma = torch.diag(torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64))
    gamma = torch.diag(torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64))
    basis = balanced_spectrum(sigma, gamma, 1e-3).cut(1)
    assert abs(float(basis.decoder[2, 0])) == pytest.approx(1.0)
    assert abs(float(pca_spectrum(sigma).cut(1).decoder[0, 0])) == pytest.approx(1.0)


@given(seeds, st.integers(1, SIZE))
def test_symmetric_root(seed, rank):
    matrix = moment(seed, rank)
    root = symmetric_root(matrix)
    assert torch.allclose(root @ root, matrix, atol=1e-10) and torch.equal(root.isfinite(), root == root)


def test_nothing_to_weigh_with():
    zero = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    with pytest.raises(TCSPError, match="gradients are zero"):
        spectrum("balanced", moment(0), zero, 0.3)
    with pytest.raises(TCSPError, match="needs gradients"):
        spectrum("balanced", moment(0), None, 0.3)
    assert spectrum("pca", moment(0), None, 0.3).cut(3).size == 3
    nothing = spectrum("pca", zero, None, 0.3).cut(3)  # a site that was zero throughout
    assert nothing.size == 3 and nothing.kept_energy == nothing.gain == 1.0


@given(seeds, st.floats(1e-6, 1.0))
def test_size_for_energy_is_the_least(seed, energy):
    found = pca_spectrum(moment(seed))
    k = found.size_for_energy(energy)
    share = found.values.cumsum(0) / found.values.sum()
    assert share[k - 1] >= energy - 1e-9
    assert k == 1 or share[k - 2] < energy


def test_size_for_all_the_energy_is_the_rank():
    assert pca_spectrum(moment(3, rank=4)).size_for_energy(1.0) == 4
    assert pca_spectrum(moment(3)).size_for_energy(1.0) == SIZE
    assert pca_spectrum(moment(3)).size_for_energy(1e-9) == 1


@pytest.mark.parametrize("kind", ["pca", "balanced"])
def test_the_whole_space_keeps_everything(kind):
    whole = spectrum(kind, moment(3), moment(4), 0.3).cut(SIZE)
    expected = make_basis(whole.decoder, whole.encoder, moment(3))
    assert whole.kept_energy == pytest.approx(expected.kept_energy) == pytest.approx(1.0)
    assert whole.gain == pytest.approx(expected.gain) == pytest.approx(1.0)
