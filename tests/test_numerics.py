"""Sums and solutions against exact rational arithmetic, number formats, ill-conditioned moments, threads, and refusal.

Stated tolerances: statistics of 1 and 2 threads differ by at most 1e-6 (relative, Frobenius), outputs of the models cut
from them by at most 1e-3 of the largest; on one thread everything is equal to the last bit.
"""

import logging
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import pytest
import torch
from common import (
    Case,
    D,
    calibrated,
    dense_and_sample,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_rows,
    orthonormal,
    outputs,
)
from hypothesis import given
from hypothesis import strategies as st
from test_cli import tcsp
from training import make_trainer

import tcsp_hf
from tcsp_hf import Calibration, TCSPError, calibrate, compress
from tcsp_hf.architectures import sites_of
from tcsp_hf.calibration.sums import OuterSums
from tcsp_hf.compression.check import doubt_about
from tcsp_hf.compression.heads import inverse_root
from tcsp_hf.compression.least_squares import NormalEquations, Segments, ridge, solve
from tcsp_hf.compression.subspace import make_basis, spectrum, symmetric_root
from tcsp_hf.modeling_tcsp import rms_normalise

COMPRESS = import_module("tcsp_hf.compression.compress")  # the function has the module's name
BERT, T5 = find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")
both = pytest.mark.parametrize("case", [BERT, T5], ids=str)
Matrix = list[list[Fraction]]


# Exact rational arithmetic --------------------------------------------------------------------------------------------


def exact(matrix: torch.Tensor) -> Matrix:
    """Every floating-point number is a fraction."""
    return [[Fraction(float(value)) for value in row] for row in matrix.double()]


def times(one: Matrix, other: Matrix) -> Matrix:
    columns = transposed(other)
    return [[sum((a * b for a, b in zip(row, column, strict=True)), Fraction()) for column in columns] for row in one]


def transposed(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def solved(matrix: Matrix, right: Matrix) -> Matrix:
    """Gauss-Jordan elimination, without rounding."""
    rows = [[*left, *wanted] for left, wanted in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next(j for j in range(i, len(rows)) if rows[j][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(len(rows)):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[len(matrix) :] for row in rows]


def assert_close(found: torch.Tensor, expected: Matrix, relative: float) -> None:
    """Every entry, relative to the largest one."""
    largest = max(abs(value) for row in expected for value in row)
    for mine, theirs in zip(found.double().tolist(), expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert abs(Fraction(a) - b) <= relative * largest


dyadic = st.integers(-64, 64).map(lambda value: value / 16)


@given(st.lists(st.lists(dyadic, min_size=3, max_size=3), min_size=1, max_size=6), st.integers(1, 3))
def test_second_moments_of_short_numbers_are_exact(rows: list[list[float]], batch: int) -> None:
    """Products of numbers with few bits fit float32: not one bit may be lost, however they are batched."""
    values = torch.tensor(rows)
    expected = times(transposed(exact(values)), exact(values))
    for dtype in (torch.float32, torch.float64):
        sums = OuterSums(3)
        for part in values.to(dtype).split(batch):
            sums.add("a", part)
        assert exact(sums.whole("a")) == expected


def test_the_order_of_a_million_small_numbers_does_not_matter_much() -> None:
    """float64 sums of blocks: 2,000 blocks after a large one lose nothing that float32 would lose at once."""
    sums = OuterSums(1)
    sums.add("a", torch.full((1, 1), 2.0**20))
    for _ in range(2000):
        sums.add("a", torch.full((500, 1), 2.0**-4))
    assert float(sums.whole("a")) == 2.0**40 + 1_000_000 * 2.0**-8


@both
def test_statistics_against_fractions(case: Case) -> None:
    """The sums of a float64 model, over all its tokens, for the corner of every site's Sigma."""
    model, rows, seen = make_dense(case), make_rows(case, 6), {}
    handles = []
    for site in sites_of(model):

        def keep(module: torch.nn.Module, args: tuple, site: object = site) -> None:
            seen.setdefault(site.name, []).append(site.normalise(args[0].detach()).reshape(-1, D)[:, :3])

        handles.append(site.norm.register_forward_pre_hook(keep))
    stats = calibrate(model, [{name: row[name] for name in row} for row in rows], batch_size=1, progress=False)
    for handle in handles:
        handle.remove()
    for name, site in stats.sites.items():
        tokens = torch.cat(seen[name])
        assert len(tokens) == site.tokens
        values = exact(tokens)
        assert_close(site.moment_sum[:3, :3], times(transposed(values), values), 1e-13)


def test_merged_statistics_are_the_exact_sum() -> None:
    parts = [calibrate(make_dense(BERT), make_rows(BERT, 8, seed), progress=False) for seed in range(3)]
    merged = Calibration.merge(parts)
    for name, site in merged.sites.items():
        for kind in ("moment_sum", "fisher_sum"):
            matrices = [exact(getattr(part.sites[name], kind)[:4, :4]) for part in parts]
            expected = [[sum(values) for values in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
            assert_close(getattr(site, kind)[:4, :4], expected, 1e-15)


@given(st.integers(0, 10_000), st.sampled_from([1e-4, 1e-2, 1.0, 10.0]), st.booleans())
def test_ridge_against_fractions(seed: int, strength: float, bias: bool) -> None:
    """(H + lambda diag H) X = C + lambda diag H X0, with a constant that is hardly shrunk."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    block = torch.cat([rows, torch.ones(9, 1, dtype=torch.float64)], 1) if bias else rows
    target = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    prior = torch.randn(block.shape[1], 2, generator=generator, dtype=torch.float64)
    h, c, x0 = (exact(part) for part in (block.T @ block, block.T @ target, prior))
    penalty = [h[i][i] * Fraction(strength) for i in range(len(h))]
    if bias:
        penalty[-1] = h[-1][-1] * Fraction(1e-7)
    left = [[h[i][j] + (penalty[i] if i == j else 0) for j in range(len(h))] for i in range(len(h))]
    right = [[c[i][j] + penalty[i] * x0[i][j] for j in range(2)] for i in range(len(h))]
    assert_close(solve(block.T @ block, block.T @ target, prior, strength, bias), solved(left, right), 1e-11)


def test_normal_equations_against_fractions() -> None:
    """Weights, folds and segments, in float32 blocks of short numbers: exact."""
    u = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.25], [-2.0, 1.0]])
    t, w = torch.tensor([[1.0], [0.5], [-1.0], [2.0]]), torch.tensor([1.0, 4.0, 0.25, 16.0])
    held = torch.tensor([False, False, True, True])
    segments = Segments(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 2.0]))
    equations = NormalEquations.zeros(2, 1, torch.device("cpu"))
    equations.add([u[:, :1], u[:, 1:]], t, w, held, segments, 0.25)
    x = exact(torch.cat([u, torch.ones(4, 1)], 1))
    for fold, (first, second, scale) in enumerate(((0, 1, 1), (2, 3, 2))):
        root = [Fraction(float(w[i])) for i in (first, second)]
        rows = [x[first], x[second]]
        # sqrt(w) is a whole power of two here
        weighed = [[Fraction(float(w[i] ** 0.5)) * value for value in x[i]] for i in (first, second)]
        total = [[a + b for a, b in zip(*weighed, strict=True)]]
        alone = times(transposed(rows), [[r * value for value in row] for r, row in zip(root, rows, strict=True)])
        together = times(transposed(total), total)
        expected = [
            [Fraction(3, 4) * alone[i][j] + Fraction(1, 4) * scale**2 * together[i][j] for j in range(3)]
            for i in range(3)
        ]
        assert_close(equations.moments[fold], expected, 1e-6)


def test_kept_energy_and_gain_against_fractions() -> None:
    """Of an oblique projector with B'B = I and E'B = I, all of it made of fractions."""
    decoder = torch.tensor([[0.6], [0.8], [0.0]], dtype=torch.float64)
    encoder = torch.tensor([[1.0], [0.5], [2.0]], dtype=torch.float64)  # E'B = 1
    moment = torch.tensor([[2.0, 0.5, 0.25], [0.5, 1.0, 0.0], [0.25, 0.0, 0.125]], dtype=torch.float64)
    found = make_basis(decoder, encoder, moment)
    b = [[Fraction(3, 5)], [Fraction(4, 5)], [Fraction()]]
    e = [[Fraction(1)], [Fraction(1, 2)], [Fraction(2)]]
    sigma = exact(moment)
    total = sum(sigma[i][i] for i in range(3))
    projected = times(transposed(e), sigma)
    carried = times(projected, e)[0][0]
    lost = total - 2 * times(projected, b)[0][0] + carried
    assert found.gain == pytest.approx(float(carried / total), rel=1e-15)
    assert found.kept_energy == pytest.approx(float(1 - lost / total), rel=1e-14)


# Ill-conditioned moments ----------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(0, 18), st.integers(1, 11), st.sampled_from(["pca", "balanced"]))
def test_condition_numbers_up_to_1e18(seed: int, decades: int, size: int, kind: str) -> None:
    """Encoder and decoder stay inverse to each other, and what they keep grows with k."""
    generator = torch.Generator().manual_seed(seed)
    turn, other = orthonormal(12, 12, generator), orthonormal(12, 12, generator)
    values = 10.0 ** -torch.linspace(0, decades, 12, dtype=torch.float64)
    found = spectrum(kind, (turn * values) @ turn.T, (other * values) @ other.T, 0.3)
    basis = found.cut(size)
    eye = torch.eye(size, dtype=torch.float64)
    assert torch.allclose(basis.decoder.T @ basis.decoder, eye, atol=1e-9)
    assert torch.allclose(basis.encoder.T @ basis.decoder, eye, atol=1e-5)
    assert bool(torch.isfinite(basis.encoder).all()) and basis.kept_energy <= 1 + 1e-12 and basis.gain >= 0
    lost = [float(found.values[k:].sum()) for k in range(13)]
    assert lost == sorted(lost, reverse=True)


@given(st.integers(0, 10_000), st.integers(0, 18))
def test_roots_of_ill_conditioned_matrices(seed: int, decades: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    turn = orthonormal(6, 6, generator)
    matrix = (turn * 10.0 ** -torch.linspace(0, decades, 6, dtype=torch.float64)) @ turn.T
    root = symmetric_root(matrix)
    assert torch.allclose(root @ root, matrix, atol=1e-12) and torch.allclose(root, root.T, atol=1e-12)
    floored, inverse = inverse_root(matrix)
    assert torch.allclose(floored @ inverse, torch.eye(6, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(floored @ floored, matrix, atol=1e-9)


@pytest.mark.parametrize("decades", [2, 6, 8])
def test_regressors_of_very_different_sizes(decades: int) -> None:
    """The penalty is relative to each regressor: units do not matter, down to 1e-8 of the mean energy."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(400, 5, generator=generator)
    t = u @ torch.randn(5, 2, generator=generator) + 0.01 * torch.randn(400, 2, generator=generator)
    held = torch.arange(400) % 5 == 4
    units = 10.0 ** torch.linspace(-decades / 2, 0, 5)  # of the square: decades

    def fitted(scale: torch.Tensor) -> torch.Tensor:
        equations = NormalEquations.zeros(5, 2, torch.device("cpu"))
        equations.add([u * scale], t, torch.ones(400), held)
        prior = torch.zeros(6, 2, dtype=torch.float64)
        return torch.cat([u * scale, torch.ones(400, 1)], 1).double() @ ridge(equations, prior)

    torch.testing.assert_close(fitted(units), fitted(torch.ones(5)), rtol=1e-3, atol=1e-3)


def test_a_regressor_of_next_to_no_energy_stays_with_its_prior() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(50, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1e-9])
    prior = torch.tensor([[0.0], [0.0], [7.0]], dtype=torch.float64)
    found = solve(rows.T @ rows, rows.T @ rows.sum(1, keepdim=True), prior, 1e-2, bias=False)
    assert found[:2].flatten().tolist() == pytest.approx([1.0, 1.0], abs=0.03)
    assert float(found[2]) == pytest.approx(7.0, abs=0.2)


# Number formats -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_sources(case: Case, dtype: torch.dtype, bound: float) -> None:
    """Statistics in float64 whatever the model's format, near those of float32; at k = D no worse than the format."""
    rows = [
        {"input_ids": row["input_ids"], **({"labels": row["labels"]} if case is T5 else {})} for row in make_rows(case)
    ]
    whole = make_dense(case, torch.float32)
    wide = calibrate(whole, rows, progress=False, sample_tokens=0)
    half = make_dense(case, torch.float32).to(dtype)
    stats = calibrate(half, rows, progress=False, sample_tokens=0)
    for name, site in stats.sites.items():
        assert site.moment_sum.dtype == site.fisher_sum.dtype == torch.float64
        difference = (site.moment_sum - wide.sites[name].moment_sum).norm() / wide.sites[name].moment_sum.norm()
        assert float(difference) < bound, name
    inputs = make_inputs(case)
    exactly = outputs(case, whole, inputs)
    small = outputs(case, compress(half, stats, hidden_size=D), inputs)
    own = largest_difference({n: v.float() for n, v in outputs(case, half, inputs).items()}, exactly)
    assert largest_difference({n: v.float() for n, v in small.items()}, exactly) <= 6 * own


@both
def test_float32_and_float64_give_the_same_model(case: Case) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        dense, stats = dense_and_sample(case, dtype)
        found.append(compress(dense, stats, hidden_size=24).double())
    for name, value in found[0].state_dict().items():
        if name.endswith("norm.weight"):
            torch.testing.assert_close(value, found[1].state_dict()[name], rtol=1e-3, atol=1e-3)
    one, other = (outputs(case, model, make_inputs(case)) for model in found)
    assert largest_difference(one, other) <= 1e-2 * max(float(value.abs().max()) for value in one.values())


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@both
def test_one_and_two_threads(case: Case, threads: None) -> None:
    def run(count: int) -> tuple[Calibration, dict[str, torch.Tensor], dict]:
        torch.set_num_threads(count)
        dense = make_dense(case, torch.float32)
        stats = calibrated(case, dense, sample_tokens=65_536)
        small = compress(dense, stats, hidden_size=16)
        return stats, outputs(case, small, make_inputs(case)), small.config.site_widths()

    (one, first, widths), (again, same, _), (two, second, other) = run(1), run(1), run(2)
    for name, value in first.items():
        assert torch.equal(value, same[name]), "to the last bit"
    for name, site in one.sites.items():
        assert torch.equal(site.moment_sum, again.sites[name].moment_sum)
        for kind in ("moment_sum", "fisher_sum"):
            mine, theirs = getattr(site, kind), getattr(two.sites[name], kind)
            assert float((mine - theirs).norm() / mine.norm()) <= 1e-6
    assert widths == other
    assert largest_difference(first, second) <= 1e-3 * max(float(value.abs().max()) for value in first.values())


# Refusal at save ------------------------------------------------------------------------------------------------------


def test_the_norm_is_computed_in_float32_under_autocast() -> None:
    """As a stock model's norms are."""
    states = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.rand(24, generator=torch.Generator().manual_seed(1))
    for gradients in (False, True):  # two ways to compute it on a processor
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
            found = rms_normalise(states, weight, 1e-6)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.nn.functional.rms_norm(states.float(), (24,), weight, 1e-6))


def test_a_weight_that_is_not_finite_is_not_saved_unless_forced(tmp_path: Path) -> None:
    small = compress(*dense_and_sample(BERT, torch.float32), hidden_size=16, refit=False)
    with torch.no_grad():
        small.classifier.bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"classifier.bias holds a NaN or an infinity, so nothing was saved"):
        small.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    small.save_pretrained(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("predicted", "measured", "size", "wrong"),
    [
        (0.01, 0.05, None, False),
        (0.01, 0.109, None, False),
        (0.01, 0.111, None, True),
        (1e-9, 0.0099, None, False),
        (0.0, 0.011, None, True),
        (1e-5, 1.2e-4, 384, False),
        (1e-5, 1.3e-4, 384, True),
        (None, 9.0, None, False),
        (0.1, None, None, False),
    ],
)
def test_what_is_beyond_a_prediction(predicted: float, measured: float, size: int | None, wrong: bool) -> None:
    assert (doubt_about(predicted, measured, size) is not None) is wrong


@pytest.mark.parametrize("case", [BERT, find("bert-Model")], ids=str)
def test_outputs_that_went_wrong_are_not_saved_unless_forced(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight broken between the search and the check, as a bad solve would break it."""
    dense, stats = dense_and_sample(case, torch.float32)
    good = compress(dense, stats, remove=0.2)
    assert good.doubt is None
    original = COMPRESS._refit

    def broken(*args: object, **kwargs: object) -> torch.nn.Module:
        small = original(*args, **kwargs)
        with torch.no_grad():
            for parameter in small.base_model.encoder.parameters():
                parameter.mul_(-3.0)
            if hasattr(small, "classifier"):
                small.classifier.bias += torch.tensor([8.0, -8.0, 0.0])
        return small

    monkeypatch.setattr(COMPRESS, "_refit", broken)
    with caplog.at_level(logging.WARNING, logger="tcsp_hf"):
        small = compress(dense, stats, remove=0.2)
    options = small.config.projection["options"]
    assert options["measured_kl"] > 10 * options["predicted_kl"] and "was predicted" in caplog.text
    with pytest.raises(ValueError, match=r"was predicted .* Nothing was saved: save_pretrained\(..., force=True\)"):
        small.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    small.save_pretrained(tmp_path / "out", force=True)
    again = tcsp_hf.TCSPConfig.from_pretrained(tmp_path / "out")
    assert again.projection["options"] == options


def test_the_command_does_not_write_it_unless_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: object
) -> None:
    dense, stats = dense_and_sample(BERT, torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    stats.save(tmp_path / "stats")
    monkeypatch.setattr(COMPRESS, "doubt_about", lambda *args: "It went wrong.")
    words = ["compress", tmp_path / "dense", "--stats", tmp_path / "stats", "--hidden-size", 16, "-o", tmp_path / "out"]
    with pytest.raises(TCSPError, match=r"It went wrong\. Nothing was saved; --force"):
        tcsp(*words, "-q")
    assert not (tmp_path / "out").exists()
    tcsp(*words, "-q", "--force")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_training_may_start_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPRESS, "doubt_about", lambda *args: "It went wrong.")
    trainer = make_trainer(BERT, tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "out")


def test_outputs_that_are_not_finite_are_never_returned() -> None:
    """From the check of the compressed model itself: float16 weights that overflow."""
    dense = make_dense(BERT, torch.float32)
    with torch.no_grad():
        dense.classifier.weight.mul_(1e38)
        dense.classifier.bias.fill_(3e38)
    with pytest.raises(TCSPError, match="NaN or an infinity"):
        compress(dense, calibrated(BERT, dense, sample_tokens=65_536, fisher=False), hidden_size=16, subspace="pca")
