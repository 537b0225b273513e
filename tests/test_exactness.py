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
from tcsp_hf.compression import t5 as projecting_t5
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
    monkeypatch.setattr(projecting_t5, "keeps_coordinates", lambda dense, widths: False)


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


# What is cut from each layer, of 4 heads of 8 dimensions and 40 neurons: heads kept, query/key and value/output sizes.
CUTS = [
    {"heads": [0, 2], "qk": 5, "vo": 8, "neurons": 13},
    {"heads": [1, 2, 3], "qk": 8, "vo": 3, "neurons": 40},
]


def _rows(heads: list[int], size: int) -> torch.Tensor:
    """Rows of a (4 * 8, D) projection that belong to the first `size` dimensions of some heads."""
    return torch.tensor([8 * head + i for head in heads for i in range(size)])


def _silence(weight: torch.Tensor, kept: torch.Tensor, dim: int) -> None:
    """Zero what is not kept."""
    gone = torch.ones(weight.shape[dim], dtype=torch.bool)
    gone[kept] = False
    weight.index_fill_(dim, gone.nonzero().squeeze(-1), 0.0)


def test_cut_filters_and_heads_of_a_bert():
    """Neurons, heads and head dimensions that the dense model does not use may go; its softmax scale stays."""
    case = find("bert-ForMaskedLM")
    dense = make_dense(case)
    with torch.no_grad():
        for layer, cut in zip(dense.bert.encoder.layer, CUTS, strict=True):
            attention = layer.attention.self
            for part, size in ((attention.query, cut["qk"]), (attention.value, cut["vo"])):
                for tensor in (part.weight, part.bias):
                    _silence(tensor, _rows([0, 1, 2, 3], size), 0)
            _silence(layer.attention.output.dense.weight, _rows(cut["heads"], 8), 1)
            _silence(layer.output.dense.weight, torch.arange(cut["neurons"]), 1)
    whole = compress(dense, calibrated(case, dense), hidden_size=24)
    fields = {
        "layer_attention_heads": [len(cut["heads"]) for cut in CUTS],
        "layer_qk_head_sizes": [cut["qk"] for cut in CUTS],
        "layer_vo_head_sizes": [cut["vo"] for cut in CUTS],
        "layer_intermediate_sizes": [cut["neurons"] for cut in CUTS],
    }
    tensors = whole.state_dict()
    for i, cut in enumerate(CUTS):
        layer = f"bert.encoder.layer.{i}"
        qk, vo = _rows(cut["heads"], cut["qk"]), _rows(cut["heads"], cut["vo"])
        neurons = torch.arange(cut["neurons"])
        for kind in ("weight", "bias"):
            query, key, value = tensors[f"{layer}.attention.self.qkv.{kind}"].chunk(3)
            tensors[f"{layer}.attention.self.qkv.{kind}"] = torch.cat([query[qk], key[qk], value[vo]])
            tensors[f"{layer}.intermediate.dense.{kind}"] = tensors[f"{layer}.intermediate.dense.{kind}"][neurons]
        name = f"{layer}.attention.output.dense.weight"
        tensors[name] = tensors[name][:, vo]
        tensors[f"{layer}.output.dense.weight"] = tensors[f"{layer}.output.dense.weight"][:, neurons]
    _assert_cut_is_exact(case, whole, fields, tensors)


@pytest.mark.parametrize("source", ["t5", "t5-gated"])
def test_cut_filters_and_heads_of_a_t5(source):
    """The same; the kept heads keep their columns of the relative position bias."""
    case = Case(source, "ForConditionalGeneration")
    dense = make_dense(case)
    places = [(stack, i, part) for stack in ("encoder", "decoder") for i in range(2) for part in (0, 1, 2)]
    places = [place for place in places if not (place[0] == "encoder" and place[2] == 2)]

    def name_of(stack: str, i: int, part: int) -> tuple[str, bool]:
        """Prefix of a block's module, and whether it is the feed-forward one."""
        last = part == (1 if stack == "encoder" else 2)
        module = "DenseReluDense" if last else "SelfAttention" if part == 0 else "EncDecAttention"
        return f"{stack}.block.{i}.layer.{part}.{module}", last

    with torch.no_grad():
        for stack, i, part in places:
            name, feeds_forward = name_of(stack, i, part)
            module = dense.get_submodule(name)
            if feeds_forward:
                _silence(module.wo.weight, torch.arange(CUTS[i]["neurons"]), 1)
                continue
            _silence(module.q.weight, _rows([0, 1, 2, 3], CUTS[i]["qk"]), 0)
            _silence(module.v.weight, _rows([0, 1, 2, 3], CUTS[i]["vo"]), 0)
            _silence(module.o.weight, _rows(CUTS[i]["heads"], 8), 1)
    whole = compress(dense, calibrated(case, dense), hidden_size=24)
    fields = {
        "encoder_layer_kept_heads": [cut["heads"] for cut in CUTS],
        "decoder_layer_kept_heads": [cut["heads"] for cut in CUTS],
        "cross_layer_attention_heads": [len(cut["heads"]) for cut in CUTS],
        **{f"{group}_layer_qk_head_sizes": [cut["qk"] for cut in CUTS] for group in ("encoder", "decoder", "cross")},
        **{f"{group}_layer_vo_head_sizes": [cut["vo"] for cut in CUTS] for group in ("encoder", "decoder", "cross")},
        **{f"{stack}_layer_intermediate_sizes": [cut["neurons"] for cut in CUTS] for stack in ("encoder", "decoder")},
    }
    tensors = whole.state_dict()
    for stack, i, part in places:
        name, feeds_forward = name_of(stack, i, part)
        qk, vo = _rows(CUTS[i]["heads"], CUTS[i]["qk"]), _rows(CUTS[i]["heads"], CUTS[i]["vo"])
        neurons = torch.arange(CUTS[i]["neurons"])
        cuts = {"q": (qk, 0), "k": (qk, 0), "v": (vo, 0), "o": (vo, 1)}
        if feeds_forward:
            cuts = {"wi": (neurons, 0), "wi_0": (neurons, 0), "wi_1": (neurons, 0), "wo": (neurons, 1)}
        for kind, (kept, dim) in cuts.items():
            if f"{name}.{kind}.weight" in tensors:
                tensors[f"{name}.{kind}.weight"] = tensors[f"{name}.{kind}.weight"].index_select(dim, kept)
    _assert_cut_is_exact(case, whole, fields, tensors)


def _assert_cut_is_exact(case: Case, whole: torch.nn.Module, fields: dict, tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: value for name, value in whole.config.to_dict().items() if name != "model_type"}
    cut = type(whole)(type(whole.config)(**{**plain, **fields})).to(torch.float64).eval()
    cut.load_state_dict(tensors)
    inputs = make_inputs(case)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in whole.parameters())
    for implementation in ("sdpa", "eager"):
        cut.set_attn_implementation(implementation)
        assert largest_difference(outputs(case, whole, inputs), outputs(case, cut, inputs)) <= 1e-9
    if case.family == "t5":
        ids = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        common = {**ids, "do_sample": False, "max_new_tokens": 6, "no_repeat_ngram_size": 1}
        assert torch.equal(whole.generate(**common), cut.generate(**common, cache_implementation="static"))


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
