"""The subspaces are the best ones, the budgets are met, and what cannot be compressed is refused by name."""

import copy
import logging
import math

import pytest
import torch
import transformers
from common import (
    CASES,
    KINDS,
    ONE_SOURCE_CASES,
    VOCABULARY,
    Case,
    D,
    calibrated,
    dense_and_statistics,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_rows,
    make_small,
    orthonormal,
    outputs,
)
from hypothesis import given
from hypothesis import strategies as st

import tcsp_hf
from tcsp_hf import TCSPError, calibrate, compress
from tcsp_hf.compression import count_parameters, removed_fraction, size_table
from tcsp_hf.compression.subspace import balanced_spectrum, make_basis, pca_spectrum, spectrum, symmetric_root

per_case = pytest.mark.parametrize("case", CASES, ids=str)
BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")
both = pytest.mark.parametrize("case", [BERT, T5], ids=str)


# Subspaces ------------------------------------------------------------------------------------------------------------

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


# What a compressed model is -------------------------------------------------------------------------------------------


@per_case
@pytest.mark.parametrize(("projection", "subspace"), KINDS)
def test_hidden_size(case: Case, projection, subspace):
    """The class, the widths and the provenance that were asked for; outputs of the dense model's shapes."""
    dense, stats = dense_and_statistics(case, torch.float32)
    small = compress(dense, stats, hidden_size=16, projection=projection, subspace=subspace)
    assert type(small) is getattr(tcsp_hf, case.small_class_name)
    config = small.config
    assert config.hidden_size == 16 and config.source_hidden_size == D
    assert set(config.site_widths().values()) == {16}
    assert config.projection["kind"] == projection and config.projection["subspace"] == subspace
    assert small.get_input_embeddings().weight.shape == (VOCABULARY, 16)
    assert not small.training and small.dtype == dense.dtype and small.device == dense.device
    inputs = make_inputs(case)
    largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs))


def test_provenance():
    model, stats = dense_and_statistics(BERT)
    small = compress(model, stats, hidden_size=16, subspace="balanced", epsilon=0.7)
    found = small.config.projection
    count = count_parameters(model)
    assert found["method_version"] == 1
    assert found["source_model"] == "BertForSequenceClassification" and found["source_model_type"] == "bert"
    assert found["source_hidden_size"] == D and found["epsilon"] == 0.7
    assert found["source_parameters"] == count.total
    assert found["source_non_embedding_parameters"] == count.non_embedding
    assert found["calibration"] == stats.summary()
    assert found["removed"] == pytest.approx(removed_fraction(model, small), abs=1e-6)
    assert [site["name"] for site in found["sites"]] == list(stats.sites)
    assert all(0.3 < site["kept_energy"] < 1 for site in found["sites"])
    assert compress(model, stats, hidden_size=16, subspace="pca").config.projection["epsilon"] is None


def test_labels_and_generation_settings_are_kept():
    names = {0: "bad", 1: "fair", 2: "good"}
    dense = make_dense(BERT, id2label=names, label2id={name: i for i, name in names.items()})
    small = compress(dense, calibrated(BERT, dense), hidden_size=16)
    assert small.config.id2label == names and small.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    dense = make_dense(T5)
    dense.generation_config.num_beams = 4
    small = compress(dense, calibrated(T5, dense), hidden_size=16)
    assert small.generation_config.num_beams == 4
    small.generation_config.num_beams = 1
    assert dense.generation_config.num_beams == 4


def test_one_basis_or_one_for_each_stack():
    shared, own = (make_small(T5, projection=kind) for kind in ("shared", "per_site"))
    assert shared.encoder.embed_tokens.weight is shared.decoder.embed_tokens.weight is shared.shared.weight
    assert not torch.equal(own.encoder.embed_tokens.weight, own.decoder.embed_tokens.weight)
    assert own.encoder.embed_tokens.weight is own.shared.weight
    assert make_small(T5).config.encoder_hidden_size is None, "shared is the default of a T5"
    assert make_small(BERT).config.projection["kind"] == "per_site", "and per_site of a BERT"


def test_norms_make_up_for_what_is_left_out():
    """A norm's weight is `c sqrt(D / k)`, where `c²` is the energy that the subspace keeps at that very site."""
    for case in (find("bert-Model"), find("t5-Model")):
        dense, stats = dense_and_statistics(case)
        small = compress(dense, stats, hidden_size=16, subspace="pca", projection="shared")
        weights = [value.detach() for name, value in small.named_parameters() if name.endswith("norm.weight")]
        assert len(weights) == len(stats.sites)
        if case.family == "bert":
            gamma = dense.encoder.layer[1].output.LayerNorm.weight
            basis = small.lift_map.weight / gamma.detach()[:, None]
        else:
            basis = small.encoder.lift_map.weight / dense.encoder.final_layer_norm.weight.detach()[:, None]
        assert torch.allclose(basis.T @ basis, torch.eye(16, dtype=torch.float64), atol=1e-9)
        expected = {
            name: float((basis.T @ site.second_moment @ basis).trace() / site.second_moment.trace())
            for name, site in stats.sites.items()
        }
        assert len({round(gain, 4) for gain in expected.values()}) > 3 and max(expected.values()) < 0.99
        found = sorted(float(weight[0]) for weight in weights)
        assert found == pytest.approx(sorted(math.sqrt(gain * D / 16) for gain in expected.values()), abs=1e-9)
        assert all(torch.equal(weight, weight[:1].expand(16)) for weight in weights)


@per_case
def test_more_directions_are_better(case: Case):
    dense, stats = dense_and_statistics(case, torch.float32)
    inputs = make_inputs(case)
    expected = outputs(case, dense, inputs)

    def error(k: int) -> float:
        found = outputs(case, compress(dense, stats, hidden_size=k), inputs)
        return sum(float((found[name] - expected[name]).square().mean()) for name in expected)

    narrow, wide, full = error(8), error(24), error(D)
    assert full < 1e-6 < wide < narrow


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_number_format_is_kept(case: Case, dtype):
    dense = make_dense(case, torch.float32).to(dtype)
    small = compress(dense, calibrated(case, dense), hidden_size=24)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small.lift(torch.zeros(1, 24, dtype=dtype)).dtype == dtype
    inputs = make_inputs(case)
    for value in outputs(case, small, inputs).values():
        assert torch.isfinite(value).all()


def test_a_t5_keeps_its_wide_weights(tmp_path):
    """transformers loads a float16 T5 with `wo` in float32."""
    make_dense(T5, torch.float32).save_pretrained(tmp_path)
    dense = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    small = compress(dense, calibrated(T5, dense), hidden_size=16)
    wide = {name for name, parameter in small.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {name for name, parameter in dense.named_parameters() if parameter.dtype == torch.float32} != set()


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_the_dense_model_is_left_alone(case: Case):
    dense = make_dense(case, torch.float32).train()
    stats = calibrated(case, dense)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    config = copy.deepcopy(dense.config.to_dict())
    small = compress(dense, stats, hidden_size=D)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()  # nothing is shared
    small.config.vocab_size = 3
    assert dense.config.to_dict() == config
    assert all(module.training for module in dense.modules())
    assert all(parameter.requires_grad for parameter in dense.parameters())
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), name


@both
def test_the_same_twice(case: Case):
    one, other = make_small(case), make_small(case)
    assert one.config.to_dict() == other.config.to_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@both
def test_attention_back_end_is_kept(case: Case):
    dense = make_dense(case)
    dense.set_attn_implementation("eager")
    assert compress(dense, calibrated(case, dense), hidden_size=16).config._attn_implementation == "eager"


def test_a_bert_without_pooler(tmp_path):
    """As sentence-embedding models have it."""
    case = find("bert-Model")
    dense = make_dense(case)
    bare = transformers.BertModel(dense.config, add_pooling_layer=False).to(torch.float64).eval()
    bare.load_state_dict({name: value for name, value in dense.state_dict().items() if "pooler" not in name})
    stats = calibrate(bare, make_rows(case), progress=False)
    small = compress(bare, stats, hidden_size=D)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, bare, inputs), outputs(case, small, inputs)) <= 1e-9
    small = compress(bare, stats, remove=0.4)
    assert removed_fraction(bare, small) >= 0.4 and small.pooler is None
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, dtype="auto")
    assert largest_difference(outputs(case, small, inputs), outputs(case, loaded, inputs)) <= 1e-9
    assert transformers.AutoModel.from_pretrained(tmp_path).pooler is not None, "a new one, as in transformers"


# Budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -8, D + 1, 10**9, True, 16.0, "16", None])
def test_hidden_size_out_of_bounds(value):
    model, stats = dense_and_statistics(BERT)
    named = "exactly one" if value is None else f"hidden_size is {value!r}; it must be an integer from 1 to {D}"
    with pytest.raises(TCSPError, match=named):
        compress(model, stats, hidden_size=value)


@pytest.mark.parametrize("name", ["energy", "remove"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, 44, True, "0.5", float("nan"), float("inf")])
def test_fraction_out_of_bounds(name, value):
    model, stats = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=f"{name} is {value!r}; it must be a number in"):
        compress(model, stats, **{name: value})


@pytest.mark.parametrize(
    ("given_sizes", "named"),
    [
        ({}, "none was given"),
        ({"hidden_size": 16, "energy": 0.9}, "hidden_size and energy were given"),
        ({"hidden_size": 16, "remove": 0.4}, "hidden_size and remove were given"),
        ({"hidden_size": 16, "energy": 0.9, "remove": 0.4}, "hidden_size and energy and remove were given"),
    ],
    ids=str,
)
def test_exactly_one_budget(given_sizes, named):
    model, stats = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=f"exactly one of hidden_size, energy, remove, flops and latency; {named}"):
        compress(model, stats, **given_sizes)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"projection": "both"}, "projection is 'both'; allowed: 'shared', 'per_site'"),
        ({"subspace": "svd"}, "subspace is 'svd'; allowed: 'pca', 'balanced'"),
        ({"epsilon": 0}, "epsilon is 0; it must be a positive number"),
        ({"epsilon": -1.0}, "epsilon is -1.0"),
        ({"epsilon": float("inf")}, "epsilon is inf"),
        ({"epsilon": float("nan")}, "epsilon is nan"),
        ({"epsilon": True}, "epsilon is True"),
        ({"multiple_of": 0}, f"multiple_of is 0; it must be an integer from 1 to {D}"),
        ({"multiple_of": 1.5}, "multiple_of is 1.5"),
        ({"multiple_of": D + 1}, f"multiple_of is {D + 1}"),
    ],
    ids=str,
)
def test_options_out_of_bounds(arguments, named):
    model, stats = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=named):
        compress(model, stats, hidden_size=16, **arguments)


@pytest.mark.parametrize("stats", [None, {}, "stats/"])
def test_statistics_of_the_wrong_kind(stats):
    with pytest.raises(TCSPError, match="must come from calibrate or Calibration"):
        compress(dense_and_statistics(BERT)[0], stats, hidden_size=16)


@both
def test_fewer_tokens_than_directions(case: Case):
    """Refused with the number that is needed; what fits is possible."""
    model, _ = dense_and_statistics(case)
    rows = make_rows(case, 3)
    if case.family == "t5":
        for row in rows:
            row["labels"] = row["labels"][:4]
    stats = calibrate(model, rows, progress=False)
    assert 8 <= stats.tokens < D
    with pytest.raises(TCSPError, match=f"hold {stats.tokens} tokens, but a hidden size of {D} needs at least {D}"):
        compress(model, stats, hidden_size=D)
    assert compress(model, stats, hidden_size=8).config.hidden_size == 8


@pytest.mark.parametrize(
    ("asked", "multiple", "expected"), [(13, 8, 16), (17, 8, 24), (1, 8, 8), (25, 12, D), (13, 5, 15), (D - 1, 8, D)]
)
def test_rounding_is_said(asked, multiple, expected, caplog):
    model, stats = dense_and_statistics(BERT, torch.float32)
    with caplog.at_level(logging.WARNING, logger="tcsp_hf"):
        small = compress(model, stats, hidden_size=asked, multiple_of=multiple)
    assert small.config.hidden_size == expected
    assert f"hidden_size {asked} was rounded up to {expected}, a multiple of {multiple}" in caplog.text


@pytest.mark.parametrize(("asked", "multiple"), [(16, 8), (13, 1), (D, 12), (D, 8)])
def test_nothing_is_said_where_nothing_is_rounded(asked, multiple, caplog):
    model, stats = dense_and_statistics(BERT, torch.float32)
    with caplog.at_level(logging.WARNING, logger="tcsp_hf"):
        small = compress(model, stats, hidden_size=asked, multiple_of=multiple)
    assert small.config.hidden_size == asked and not caplog.records


@pytest.mark.parametrize("case", [BERT, find("bert-ForMaskedLM"), T5], ids=str)
@pytest.mark.parametrize("projection", ["shared", "per_site"])
def test_energy(case: Case, projection):
    """The least width of every group of sites that keeps it."""
    model, stats = dense_and_statistics(case, torch.float32)
    for energy in (0.5, 0.9, 1.0):
        small = compress(model, stats, energy=energy, subspace="pca", projection=projection, multiple_of=1)
        if projection == "shared":
            continue
        groups: dict[str, list[str]] = {}
        for name in small.config.site_widths():
            groups.setdefault(name.split(".")[0] if case.family == "t5" else name, []).append(name)
        for members in groups.values():
            pooled = torch.stack([stats.sites[name].second_moment for name in members]).mean(0)
            values = torch.linalg.eigvalsh(pooled).flip(0).clamp(min=0)
            share = values.cumsum(0) / values.sum()
            k = small.config.site_widths()[members[0]]
            assert share[k - 1] >= energy - 1e-9 and (k == 1 or share[k - 2] < energy)
    widths = [
        sum(compress(model, stats, energy=energy, projection=projection, multiple_of=1).config.site_widths().values())
        for energy in (0.3, 0.6, 0.9, 0.99)
    ]
    assert widths == sorted(widths) and widths[0] < widths[-1]


def test_energy_of_a_site_may_be_negative(tmp_path):
    """An oblique projection of pooled statistics can lose more at a site than there is; it says so and saves."""
    model, stats = dense_and_statistics(BERT, torch.float32)
    small = compress(model, stats, hidden_size=1, projection="shared", multiple_of=1, epsilon=0.01)
    assert min(site["kept_energy"] for site in small.config.projection["sites"]) < 0
    small.save_pretrained(tmp_path)
    assert tcsp_hf.TCSPConfig.from_pretrained(tmp_path).projection == small.config.projection


def test_energy_is_rounded_up_too():
    model, stats = dense_and_statistics(BERT, torch.float32)
    exact = compress(model, stats, energy=0.9, multiple_of=1).config.site_widths()
    rounded = compress(model, stats, energy=0.9).config.site_widths()
    assert rounded == {name: min(math.ceil(width / 8) * 8, D) for name, width in exact.items()}


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_remove(case: Case):
    """At least what was asked, and not one step more."""
    model, stats = dense_and_statistics(case, torch.float32)
    for remove, multiple in ((0.2, 8), (0.44, 4), (0.44, 1)):
        small = compress(model, stats, remove=remove, multiple_of=multiple)
        assert removed_fraction(model, small) >= remove
        k = small.config.hidden_size
        assert k % multiple == 0 and set(small.config.site_widths().values()) == {k}
        wider = compress(model, stats, hidden_size=min(k + multiple, D), multiple_of=multiple)
        assert removed_fraction(model, wider) < remove
        assert small.config.projection["removed"] == pytest.approx(removed_fraction(model, small), abs=1e-6)


def test_remove_is_monotone():
    model, stats = dense_and_statistics(BERT, torch.float32)
    widths = [compress(model, stats, remove=i / 10, multiple_of=1).config.hidden_size for i in range(1, 9)]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) > 5


def test_remove_more_than_can_be_reached():
    model, stats = dense_and_statistics(BERT)
    most = removed_fraction(model, compress(model, stats, hidden_size=8))
    with pytest.raises(TCSPError, match=f"remove=0.99 cannot be reached.* 8, removes {most:.3f}"):
        compress(model, stats, remove=0.99)


# Sizes ----------------------------------------------------------------------------------------------------------------


def test_count_of_parameters():
    model, _ = dense_and_statistics(find("bert-ForMaskedLM"))
    count = count_parameters(model)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert count.embedding == sum(table.numel() for table in tables), "the tied output table is one of them"
    untied = make_dense(find("bert-ForMaskedLM"), tie_word_embeddings=False)
    assert count_parameters(untied).embedding == count.embedding + VOCABULARY * D
    assert count_parameters(untied).non_embedding == count.non_embedding + VOCABULARY, "the bias is untied, too"


@pytest.mark.parametrize("tied", [True, False])
def test_relative_positions_are_no_embeddings(tied):
    dense = make_dense(T5, tie_word_embeddings=tied)
    assert count_parameters(dense).embedding == VOCABULARY * D * (1 if tied else 2)
    small = compress(dense, calibrated(T5, dense), hidden_size=16)
    assert count_parameters(small).embedding == VOCABULARY * 16 * 2, "its lm_head is its own"


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_size_table(case: Case):
    dense, _ = dense_and_statistics(case, torch.float32)
    small = make_small(case)
    table = size_table(dense, small)
    rows = {name: (before, after) for name, before, after in table.rows}
    places = [values for name, values in rows.items() if name not in ("total", "without embeddings")]
    assert tuple(map(sum, zip(*places, strict=True))) == rows["total"]
    assert rows["total"] == (count_parameters(dense).total, count_parameters(small).total)
    assert rows["without embeddings"] == (
        count_parameters(dense).non_embedding,
        count_parameters(small).non_embedding,
    )
    assert {"embeddings", "encoder.0", "encoder.1"} <= rows.keys()
    stacks = 0 if case.family == "bert" else 1 + ("decoder.0" in rows)
    assert rows.get("other", (0, 0)) == (stacks * D, stacks * 16), "the last norm of a T5's stack"
    if case.decodes or (case.head == "ForQuestionAnswering" and case.family == "t5"):
        assert {"decoder.0", "decoder.1"} <= rows.keys()
    lines = str(table).splitlines()
    assert lines[0].split() == ["module", "before", "after", "removed"]
    assert len({len(line) for line in lines}) == 1
    assert f"{removed_fraction(dense, small):.1%}" in lines[-2]


def test_table_prints_on_request(capsys):
    model, stats = dense_and_statistics(BERT, torch.float32)
    small = compress(model, stats, hidden_size=16)
    assert capsys.readouterr().out == ""
    compress(model, stats, hidden_size=16, verbose=True)
    assert capsys.readouterr().out.strip() == str(size_table(model, small)).strip()


# What cannot be compressed --------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}


def unsupported() -> dict[str, tuple[torch.nn.Module, str]]:
    """Name -> (model, what the message must say)."""
    bert = transformers.BertConfig(**TINY)
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_head=4, n_layer=1, n_positions=40)
    return {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), r"GPT2LMHeadModel \(model_type 'gpt2'\) is not a supported"),
        "roberta": (
            transformers.RobertaModel(transformers.RobertaConfig(**TINY)),
            r"RobertaModel \(model_type 'roberta'\) is not a supported",
        ),
        "bert as a language model": (
            transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)),
            "BertLMHeadModel is not a supported class",
        ),
        "bert as a decoder": (
            transformers.BertModel(transformers.BertConfig(**TINY, is_decoder=True)),
            "BertModel has is_decoder=True: only BERT encoders without cross-attention",
        ),
        "bert with cross-attention": (
            transformers.BertModel(transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)),
            "is_decoder=True|add_cross_attention=True",
        ),
        "compressed": (make_small(BERT), "TCSPBertForSequenceClassification .* is compressed already"),
        "a part": (transformers.BertModel(bert).encoder.layer[0], "BertLayer .* is not a supported"),
        "no model": (torch.nn.Linear(3, 3), "Linear .* is not a supported architecture"),
    }


@pytest.mark.parametrize("name", unsupported().keys())
def test_unsupported_models(name):
    """Refused by name, before any work, by both steps."""
    model, named = unsupported()[name]
    _, stats = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=named):
        calibrate(model, [{"input_ids": [3, 4]}], progress=False)
    with pytest.raises(TCSPError, match=named):
        compress(model, stats, hidden_size=16)


def test_relative_positions_are_refused():
    model = make_dense(BERT)
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(TCSPError, match="position_embedding_type='relative_key': only 'absolute'"):
        calibrated(BERT, model)


def test_weights_that_are_not_finite():
    """Statistics from before a weight broke; the fingerprint samples weights and may not see it."""
    model, stats = dense_and_statistics(BERT)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.bert.encoder.layer[0].output.dense.bias[2] = float("nan")
    with pytest.raises(TCSPError, match=r"another model|NaN or an infinity"):
        compress(broken, stats, hidden_size=16)
