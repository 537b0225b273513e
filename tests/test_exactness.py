"""A compressed model equals its dense source wherever the subspace leaves nothing out."""

import pytest
import torch
from common import (
    CASES,
    GENERATORS,
    KINDS,
    ONE_SOURCE_CASES,
    PROJECTIONS,
    SUBSPACES,
    Case,
    D,
    calibrated,
    dense_and_statistics,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_labels,
    orthonormal,
    outputs,
    planted,
)

from tcsp_hf.compression import compress
from tcsp_hf.compression.subspace import Spectrum, make_basis

per_case = pytest.mark.parametrize("case", CASES, ids=str)
K = 16
EPSILON = {"bert": "layer_norm_eps", "t5": "layer_norm_epsilon"}


@pytest.fixture
def rotated(monkeypatch):
    """At k = D a T5 gets random orthonormal bases, instead of the identity."""
    generator = torch.Generator().manual_seed(5)
    bases: dict[int, torch.Tensor] = {}

    def cut(self, size):
        basis = bases.setdefault(id(self), orthonormal(size, size, generator))
        return make_basis(basis, basis, self.moment)

    monkeypatch.setattr(Spectrum, "cut", cut)


@per_case
@pytest.mark.parametrize(("projection", "subspace"), KINDS)
def test_full_size_in_float64(case: Case, projection, subspace):
    dense, stats = dense_and_statistics(case)
    small = compress(dense, stats, hidden_size=D, projection=projection, subspace=subspace)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-9


@per_case
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_full_size_in_float32(case: Case, projection):
    dense, stats = dense_and_statistics(case, torch.float32)
    small = compress(dense, stats, hidden_size=D, projection=projection)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if case.family == "t5"], ids=str)
def test_full_size_in_any_basis(case: Case, rotated, float64_norms):
    """k = D takes the identity for its basis; a T5's algebra must hold in any other (a BERT then keeps its own)."""
    dense, stats = dense_and_statistics(case)
    small = compress(dense, stats, hidden_size=D, projection="per_site")
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-9


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu", "tanh"])
def test_full_size_with_other_activations(activation):
    case = find("bert-ForMaskedLM")
    dense = make_dense(case, hidden_act=activation)
    small = compress(dense, calibrated(case, dense), hidden_size=D)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-9


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_full_size_with_an_untied_head(head):
    case = Case("bert", head)
    dense = make_dense(case, tie_word_embeddings=False)
    small = compress(dense, calibrated(case, dense), hidden_size=D)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-9


@pytest.mark.parametrize("proj", ["gated-silu", "gelu"])
def test_full_size_with_other_t5_activations(proj, rotated, float64_norms):
    case = find("t5-ForConditionalGeneration")
    dense = make_dense(case, feed_forward_proj=proj)
    small = compress(dense, calibrated(case, dense), hidden_size=D)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-9


def test_full_size_with_stacks_of_different_depths(rotated, float64_norms):
    case = find("t5-ForConditionalGeneration")
    dense = make_dense(case, num_layers=1, num_decoder_layers=3)
    small = compress(dense, calibrated(case, dense), hidden_size=D, projection="per_site")
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-9


@per_case
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_planted_subspace(case: Case, projection, float64_norms):
    """k < D is exact where the stream has k dimensions. The epsilon is large, so its factor D / k shows as well."""
    dense = planted(case, K, own=projection == "per_site", **{EPSILON[case.family]: 1e-2})
    stats = calibrated(case, dense)
    inputs = make_inputs(case)
    expected = outputs(case, dense, inputs)
    for subspace in SUBSPACES:
        small = compress(dense, stats, hidden_size=K, projection=projection, subspace=subspace)
        assert small.config.hidden_size == K
        assert all(site["kept_energy"] == 1.0 for site in small.config.projection["sites"])
        assert largest_difference(expected, outputs(case, small, inputs)) <= 1e-8


@pytest.mark.parametrize("case", [find("bert-ForPreTraining"), *GENERATORS], ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("k", [3, 13])
def test_planted_subspace_of_odd_size(case: Case, projection, k, float64_norms):
    dense = planted(case, k, own=projection == "per_site", seed=k)
    small = compress(dense, calibrated(case, dense), hidden_size=k, projection=projection, multiple_of=1)
    inputs = make_inputs(case)
    assert small.config.hidden_size == k
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-8


def test_planted_subspaces_of_different_sizes():
    """BERT sites of 16, 32 (all), 12, 32 and 32 dimensions, so that every kind of residual map occurs."""
    case = find("bert-ForMaskedLM")
    dense = make_dense(case)
    generator = torch.Generator().manual_seed(3)
    embeddings = dense.bert.embeddings
    middle = dense.bert.encoder.layer[0]
    with torch.no_grad():
        basis = orthonormal(D, 16, generator)
        for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight.copy_(_centred(table.weight @ basis @ basis.T))
        middle.attention.output.LayerNorm.weight[12:] = 0  # what follows has 12 dimensions at most
        for tensor in (middle.attention.output.LayerNorm.bias, middle.output.dense.bias, middle.output.dense.weight):
            tensor[12:] = 0
    small = compress(dense, calibrated(case, dense), energy=1.0, subspace="pca", multiple_of=4)
    assert small.config.site_hidden_sizes == [16, D, 12, D, D]
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-8


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-Model")], ids=str)
def test_planted_subspace_in_more_dimensions_than_it_has(case: Case, float64_norms):
    """A second moment of rank 8 at k = 16: the rest of the basis is filled up and carries nothing."""
    dense = planted(case, 8, own=True)
    stats = calibrated(case, dense)
    inputs = make_inputs(case)
    for subspace in SUBSPACES:
        small = compress(dense, stats, hidden_size=K, projection="per_site", subspace=subspace)
        assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) <= 1e-8


@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-Model")], ids=str)
def test_below_the_planted_size_is_not_exact(case: Case):
    """The tests above can fail: with fewer directions than the stream has, the outputs do differ."""
    dense = planted(case, K, own=False)
    small = compress(dense, calibrated(case, dense), hidden_size=K - 1, multiple_of=1)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs)) > 1e-3


@pytest.mark.parametrize("case", [case for case in CASES if make_labels(case, make_inputs(case))], ids=str)
def test_loss(case: Case):
    """The heads' losses are the stock ones, on the same logits."""
    dense, stats = dense_and_statistics(case)
    inputs = make_inputs(case)
    labels = make_labels(case, inputs)
    inputs = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    small = compress(dense, stats, hidden_size=D)
    expected, found = outputs(case, dense, inputs, **labels), outputs(case, small, inputs, **labels)
    assert "loss" in expected
    assert largest_difference(expected, found) <= 1e-9


ALONE = [case for case in ONE_SOURCE_CASES if case.head not in ("ForMultipleChoice", "ForPreTraining")]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_padding_changes_nothing(case: Case):
    """A padded sequence in a batch gives what it gives alone."""
    dense, stats = dense_and_statistics(case)
    small = compress(dense, stats, hidden_size=K)
    inputs = make_inputs(case)
    together = outputs(case, small, inputs)
    alone_inputs = {name: value[:1] for name, value in inputs.items()}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in alone_inputs:
            alone_inputs[name] = alone_inputs[name][:, :5]
    for name, value in outputs(case, small, alone_inputs).items():
        padded = together[name][:1, : value.shape[1]]
        assert float((padded - value).abs().max()) <= 1e-9, name


GENERATION = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3},
    "static cache": {"num_beams": 1, "cache_implementation": "static"},
    "no cache": {"num_beams": 1, "use_cache": False},
    "beams, static cache": {"num_beams": 2, "cache_implementation": "static"},
}


@pytest.mark.parametrize("case", GENERATORS, ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("k", [D, K])
def test_generate(case: Case, projection, k):
    """The same tokens at k = D, and at k < D where the stream has k dimensions."""
    if k == D:
        dense, stats = dense_and_statistics(case)
    else:
        dense = planted(case, k, own=projection == "per_site")
        stats = calibrated(case, dense)
    small = compress(dense, stats, hidden_size=k, projection=projection)
    inputs = {name: value for name, value in make_inputs(case).items() if not name.startswith("decoder_")}
    # without repetitions the tokens vary, so that agreeing on them says something
    common = {**inputs, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 3, "no_repeat_ngram_size": 1}
    expected: dict[int, torch.Tensor] = {}
    for name, options in GENERATION.items():
        beams = options["num_beams"]
        if beams not in expected:
            expected[beams] = dense.generate(**common, num_beams=beams)
            assert expected[beams].unique().numel() > 8
        assert torch.equal(expected[beams], small.generate(**common, **options)), name
