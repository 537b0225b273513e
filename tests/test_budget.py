"""Budgets of one width: met, monotone, refused where they cannot be, and counted."""

import copy
import logging
import math
from importlib import import_module

import pytest
import torch
from common import (
    ONE_SOURCE_CASES,
    VOCABULARY,
    Case,
    D,
    calibrated,
    dense_and_sample,
    dense_and_statistics,
    find,
    make_dense,
    make_rows,
    make_small,
)

import tcsp_hf
from tcsp_hf import TCSPError, calibrate, compress
from tcsp_hf.compression import count_parameters, removed_fraction, size_table
from tcsp_hf.compression.plan import filter_step

BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")
both = pytest.mark.parametrize("case", [BERT, T5], ids=str)


@pytest.mark.parametrize("options", [{"hidden_size": 16}, {"remove": 0.3}], ids=str)
def test_gradients_of_zero_are_met_before_any_work(options, monkeypatch):
    model, stats = dense_and_sample(find("bert-ForMaskedLM"))
    stats = copy.deepcopy(stats)
    stats.sites["mlm_head"].fisher_sum.zero_()
    monkeypatch.setattr(torch.linalg, "eigh", None)
    with pytest.raises(TCSPError, match=r"gradients are zero at a site.* use subspace='pca'"):
        compress(model, stats, **options)


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


@both
@pytest.mark.parametrize("name", ["flops", "latency"])
def test_a_budget_of_a_mean_sequence_needs_a_sample(case: Case, name):
    model, stats = dense_and_statistics(case)
    for axes in (None, ("hidden",)):
        with pytest.raises(TCSPError, match=f"{name}=0.7 .*sample_tokens above 0, or use remove= or hidden_size="):
            compress(model, stats, axes=axes, **{name: 0.7})
    compress(model, stats, remove=0.1)


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


@pytest.mark.parametrize("multiple", [3, 5, 7, 12])
def test_searched_widths_are_multiples(multiple):
    model, stats = dense_and_sample(BERT, torch.float32)
    small = compress(model, stats, remove=0.09, axes=("hidden",), multiple_of=multiple)
    widths = set(small.config.site_widths().values())
    assert min(widths) < D and all(width % multiple == 0 or width == D for width in widths)


@pytest.mark.parametrize(
    ("neurons", "step"), [(40, 1), (256, 2), (1000, 8), (1024, 8), (1536, 16), (2048, 24), (3072, 32)]
)
def test_neurons_go_by_multiples_that_run_fast(neurons, step):
    assert filter_step(neurons) == step


@pytest.mark.parametrize("axes", [("filters",), ("filters", "heads")])
def test_whole_sites_need_no_spectrum(axes, monkeypatch):
    model, stats = dense_and_sample(BERT, torch.float32)
    expected = compress(model, stats, remove=0.2, axes=axes)
    monkeypatch.setattr(import_module("tcsp_hf.compression.compress"), "spectrum", None)
    found = compress(model, stats, remove=0.2, axes=axes)
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))


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
