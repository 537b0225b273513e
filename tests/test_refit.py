"""The closed forms of the refit against brute force, the search, and what both do for a whole model."""

import importlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from common import ONE_SOURCE_CASES, Case, D, calibrated, find, make_dense, make_inputs, outputs
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tcsp_hf import Calibration, Search, TCSPError, compress
from tcsp_hf.architectures import blocks_of, sites_of
from tcsp_hf.calibration.sample import TokenSample
from tcsp_hf.compression import latency, removed_fraction
from tcsp_hf.compression.curves import CurveMeasure, _Curve, _finished
from tcsp_hf.compression.filters import drop_inputs
from tcsp_hf.compression.heads import score_factors, score_moments, value_factors
from tcsp_hf.compression.least_squares import NormalEquations, Segments, add_gram, mirror, ridge, solve
from tcsp_hf.compression.metrics import IDLE_WEIGHT, Metrics
from tcsp_hf.compression.replay import Replay
from tcsp_hf.compression.streams import GROUP_TOKENS, PackedSample, Stream

BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")
T5_ENCODER = find("t5-EncoderModel")
per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)


def problem(seed: int, rows: int = 400, inputs: int = 9, outputs_: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    t = u @ torch.randn(inputs, outputs_, generator=generator) + 0.1 * torch.randn(rows, outputs_, generator=generator)
    return u, t + 1.5, torch.rand(rows, generator=generator) + 0.1, torch.arange(rows) % 5 == 4


def equations(u: torch.Tensor, t: torch.Tensor, w: torch.Tensor, held: torch.Tensor, batch: int) -> NormalEquations:
    found = NormalEquations.zeros(u.shape[1], t.shape[1], u.device)
    for start in range(0, len(u), batch):
        rows = slice(start, start + batch)
        found.add([u[rows, :3], u[rows, 3:]], t[rows], w[rows], held[rows])
    return found


def test_normal_equations_equal_the_sums_whatever_the_batches() -> None:
    u, t, w, held = problem(0)
    x = torch.cat([u, torch.ones(len(u), 1)], 1).double()
    h, c = equations(u, t, w, held, 37).total
    torch.testing.assert_close(h, x.T @ (w.double()[:, None] * x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(c, x.T @ (w.double()[:, None] * t.double()), rtol=1e-5, atol=1e-4)
    other = equations(u, t, w, held, 400)
    torch.testing.assert_close(other.total[0], h, rtol=1e-5, atol=1e-4)
    assert float(other.moments[1][-1, -1]) == pytest.approx(float(w[held].sum()), rel=1e-5)


def test_gram_by_panels() -> None:
    rows = torch.randn(50, 900, generator=torch.Generator().manual_seed(0))
    total = torch.eye(900, dtype=torch.float64)
    for part in rows.split(20):
        add_gram(total, part)
    torch.testing.assert_close(mirror(total), torch.eye(900) + rows.T @ rows, rtol=1e-4, atol=1e-3, check_dtype=False)


def test_solve_is_weighted_least_squares_for_a_small_penalty_and_the_prior_for_a_large_one() -> None:
    u, t, w, held = problem(1)
    h, c = equations(u, t, w, held, 100).total
    root = w.double().sqrt()[:, None]
    x = torch.cat([u, torch.ones(len(u), 1)], 1).double()
    direct = torch.linalg.lstsq(x * root, t.double() * root).solution
    prior = torch.zeros_like(direct)
    torch.testing.assert_close(solve(h, c, prior, 1e-12), direct, rtol=1e-3, atol=1e-3)
    stuck = solve(h, c, torch.ones_like(direct), 1e12)
    torch.testing.assert_close(stuck[:-1], torch.ones_like(stuck[:-1]), rtol=1e-3, atol=1e-3)


def test_ridge_trusts_the_data_where_there_is_enough_and_the_prior_where_it_is_noise() -> None:
    u, t, w, held = problem(2)
    enough = equations(u, t, w, held, 100)
    direct = solve(*enough.total, torch.zeros(10, 4, dtype=torch.float64), 1e-10)
    torch.testing.assert_close(ridge(enough, torch.zeros_like(direct)), direct, rtol=0.05, atol=0.05)
    noise = equations(u[:20], torch.randn(20, 4, generator=torch.Generator().manual_seed(3)), w[:20], held[:20], 20)
    prior = torch.zeros(10, 4, dtype=torch.float64)
    assert float(ridge(noise, prior)[:-1].norm()) < float(solve(*noise.total, prior, 1e-10)[:-1].norm())


def test_rank_deficient_equations_are_solved() -> None:
    u, t, w, held = problem(4)
    twice = torch.cat([u, u], 1)
    found = ridge(equations(twice, t, w, held, 100), torch.zeros(19, 4, dtype=torch.float64))
    assert torch.isfinite(found).all()


def test_dropping_one_input_costs_what_brute_force_says() -> None:
    u, t, w, held = problem(5)
    h, c = equations(u, t, w, held, 400).total
    zero = torch.zeros(10, 4, dtype=torch.float64)
    best = solve(h, c, zero, 1e-9)
    x = torch.cat([u, torch.ones(len(u), 1)], 1).double()

    def loss(columns: list[int]) -> float:
        root = w.double().sqrt()[:, None]
        part = x[:, columns] * root
        fit = torch.linalg.lstsq(part, t.double() * root).solution
        return float((part @ fit - t.double() * root).square().sum())

    whole = loss(list(range(10)))
    costs = [loss([j for j in range(10) if j != i]) - whole for i in range(9)]
    kept, curve, order = drop_inputs(h, best.T, 9, 8, block=1)
    gone = set(range(9)) - set(kept.tolist())
    assert gone == {min(range(9), key=costs.__getitem__)} == set(order.tolist())
    assert curve[-1][1] == pytest.approx(min(costs), rel=0.02)


def test_a_dead_input_and_a_duplicate_are_dropped_for_nothing() -> None:
    u, t, w, held = problem(6)
    u[:, 2] = 0.0
    u[:, 5] = u[:, 7]
    h, c = equations(u, t, w, held, 400).total
    kept, curve, order = drop_inputs(h, solve(h, c, torch.zeros(10, 4, dtype=torch.float64), 1e-9).T, 9, 7, block=1)
    assert 2 not in kept.tolist()
    assert sorted([*kept.tolist(), *order.tolist()]) == list(range(9))
    assert len({5, 7} & set(kept.tolist())) == 1
    assert curve[-1][1] < 1e-2 * float(t.square().sum())


def test_score_factors_are_exact_at_full_size_and_on_a_low_rank() -> None:
    generator = torch.Generator().manual_seed(7)
    query, key = (torch.randn(3, 2, 6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    query[..., 3] = 0.0  # the score never sees this direction
    moments = score_moments(query, key, (0.5 * query @ key.mT).softmax(-1))
    for size in (4, 3):
        p_query, p_key = score_factors(*moments, size)
        small = torch.einsum("hrd,bhld->bhlr", p_query, query) @ torch.einsum("hrd,bhld->bhlr", p_key, key).mT
        wanted = query @ key.mT
        # what depends on the query alone cancels in the softmax
        centred = (small - wanted) - (small - wanted).mean(-1, keepdim=True)
        assert float(centred.abs().max()) < 1e-4


def test_value_factors_keep_what_is_read() -> None:
    generator = torch.Generator().manual_seed(8)
    heads, size = 2, 3
    u = torch.randn(500, heads * size, generator=generator, dtype=torch.float64)
    weights = torch.randn(4, heads * size + 1, generator=generator, dtype=torch.float64)
    weights[:, 0] = weights[:, 1] = 0.0  # of head 0 only one direction is read
    x = torch.cat([u, torch.ones(500, 1)], 1)
    factors = value_factors(x.T @ x, weights, heads, size, 1)
    direction = factors[0, 0] / factors[0, 0].norm()
    assert abs(float(direction[2])) > 0.98


def test_value_factors_of_fewer_outputs_than_a_head_has_values() -> None:
    """A T5 may be narrower than one of its heads."""
    dense, stats = sampled(T5)
    small = compress(dense, stats, hidden_size=4, multiple_of=1)
    assert small.config.d_model == 4
    x = torch.randn(100, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (factor,) = value_factors(x.T @ x, torch.randn(3, 9, dtype=torch.float64), 1, 8, 5)
    assert factor.shape == (5, 8) and int(torch.linalg.matrix_rank(factor)) == 5


def test_groups_of_a_decoder_are_bounded_by_what_they_attend_to() -> None:
    sequences = [{"input_ids": [1] * (300 + i % 2), "decoder_input_ids": [0, 1]} for i in range(7)]
    sample = PackedSample(sequences, "decoder_input_ids")
    assert [(group.count, group.length) for group in sample.groups] == [(3, 2), (3, 2), (1, 2)]
    encoder = PackedSample(sequences)
    for group in sample.groups:
        rows, real = encoder.padded_rows(group.members)
        assert rows.numel() <= GROUP_TOKENS and [int(row.sum()) for row in real] == [
            len(sequences[i]["input_ids"]) for i in group.members
        ]
    assert [group.count for group in PackedSample([{"input_ids": [1] * 2000}] * 2).groups] == [1, 1]


def test_streams_and_packing() -> None:
    sequences = [{"input_ids": list(range(n))} for n in (3, 5, 3, 1, 5)]
    sample = PackedSample(sequences)
    assert sample.tokens == 17
    assert [(g.count, g.length) for g in sample.groups] == [(1, 1), (2, 3), (2, 5)]
    stream = Stream(17, 4)
    values = torch.randn(17, 4)
    for group in sample.groups:
        stream.write(group.rows, values[group.rows])
    torch.testing.assert_close(stream.read(slice(0, 17)), values, rtol=0, atol=0)
    stream.close()


def test_a_sample_keeps_its_budget_and_does_not_depend_on_order() -> None:
    rows = [(i * 7919 % 1000, {"input_ids": [i] * (1 + i % 5)}) for i in range(50)]
    one, two = TokenSample(40), TokenSample(40)
    for key, row in rows:
        one.add(key, row)
    for key, row in reversed(rows):
        two.add(key, row)
    assert one.tokens <= 40
    merged = TokenSample.merge([one, two])
    assert merged.tokens <= 40
    again = TokenSample.from_tensors(one.tensors())
    assert again.sequences() == one.sequences()


def distance(case: Case, small: torch.nn.Module, dense: torch.nn.Module) -> float:
    inputs = make_inputs(case)
    with torch.no_grad():
        one, other = outputs(case, small, inputs), outputs(case, dense, inputs)
    return float(sum((one[name] - other[name]).square().mean() for name in other))


def sampled(case: Case) -> tuple[PreTrainedModel, Calibration]:
    dense = make_dense(case, torch.float32, 0)
    return dense, calibrated(case, dense, sample_tokens=65_536)


@per_case
def test_refit_at_the_full_size_changes_nothing_and_below_it_helps(case: Case) -> None:
    dense, stats = sampled(case)
    whole = compress(dense, stats, hidden_size=D, refit=True)
    assert distance(case, whole, dense) < 1e-6
    plain = compress(dense, stats, hidden_size=D // 2, refit=False)
    refit = compress(dense, stats, hidden_size=D // 2)
    assert plain.config.projection["options"]["refit"] is False
    assert refit.config.projection["options"]["refit"] is True
    assert refit.config.site_widths() == plain.config.site_widths()
    measured = [small.config.projection["options"]["measured_kl"] for small in (refit, plain)]
    assert measured[0] < measured[1]
    unchanged = compress(dense, stats, hidden_size=D)
    assert unchanged.config.projection["options"]["refit"] is False


COMPRESS = importlib.import_module("tcsp_hf.compression.compress")  # the package has a function of that name
AXES = [("filters",), ("heads",), ("hidden", "filters", "heads")]


@pytest.mark.parametrize("axes", AXES, ids="+".join)
@pytest.mark.parametrize("case", [BERT, T5, T5_ENCODER], ids=str)
def test_the_budget_is_met_on_every_axis(case: Case, axes: tuple[str, ...]) -> None:
    dense, stats = sampled(case)
    remove = 0.05 if axes == ("filters",) else 0.15
    small = compress(dense, stats, remove=remove, axes=axes)
    assert removed_fraction(dense, small) >= remove
    options = small.config.projection["options"]
    assert small.config.projection["removed"] == pytest.approx(removed_fraction(dense, small), abs=1e-6)
    assert options["predicted_kl"] > 0.0
    assert options["measured_kl"] > 0.0
    again = compress(dense, stats, remove=remove, axes=axes)
    assert again.config.to_dict() == small.config.to_dict()
    for a, b in zip(again.parameters(), small.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_nothing_is_cut_that_need_not_be(case: Case) -> None:
    dense, stats = sampled(case)
    for remove in (0.1, 0.2, 0.3, 0.5):
        removed = removed_fraction(dense, compress(dense, stats, remove=remove))
        assert remove <= removed < remove + 0.06  # one rounding step of a tiny model


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_half_of_the_neurons_that_go_are_the_search_s_first(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, stats = sampled(case)
    config = dense.config
    neurons = config.intermediate_size if case.family == "bert" else config.d_ff
    search, found, original = Search(), [], COMPRESS._choose_sizes
    monkeypatch.setattr(COMPRESS, "_choose_sizes", lambda *args: found.append(original(*args)) or found[-1])
    compress(dense, stats, remove=0.3, search=search)
    (sizes,) = found
    order = search._found[1].order
    assert min(sizes.filters) < neurons and len(order) == len(sizes.doomed) == len(sizes.filters)
    for number, (left, doomed) in enumerate(zip(sizes.filters, sizes.doomed, strict=True)):
        assert doomed == order[number][: (neurons - left) // 2]
        assert sizes.candidates(number, neurons) == sorted(set(range(neurons)) - set(doomed))
        assert len(sizes.candidates(number, neurons)) == neurons - len(doomed) >= left
    compress(dense, stats, remove=0.1, axes=("heads",))
    assert not any(found[-1].doomed)


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_a_search_serves_every_budget(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once, with the sizes of a search of its own; again for other options."""
    dense, stats = sampled(case)
    search, runs, original = Search(), [], CurveMeasure.run

    def counted(self: CurveMeasure, progress: bool | None = None) -> Any:
        runs.append(self)
        return original(self, progress)

    monkeypatch.setattr(CurveMeasure, "run", counted)
    for remove in (0.2, 0.4):
        shared = compress(dense, stats, remove=remove, search=search)
        assert shared.config.to_dict() == compress(dense, stats, remove=remove).config.to_dict()
    assert len(runs) == 3 and search.seconds > 0.0
    compress(dense, stats, remove=0.2, search=search, axes=("filters",))
    assert len(runs) == 4


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_a_search_layer_by_layer_is_a_search_of_all_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer starts where the last one ended: none runs more often than in one pass."""
    dense = make_dense(case, torch.float32, **{"bert": {"num_hidden_layers": 4}, "t5": {"num_layers": 4}}[case.family])
    stats = calibrated(case, dense, sample_tokens=65_536)
    runs: Counter[str] = Counter()
    handles = [
        block.output.register_forward_hook(lambda *_, name=block.writes: runs.update([name]))
        for block in blocks_of(dense)
    ]

    def made() -> tuple[dict[str, torch.Tensor], Counter[str]]:
        runs.clear()
        return compress(dense, stats, remove=0.3).state_dict(), Counter(runs)

    parts, by_layer = made()
    monkeypatch.setattr(CurveMeasure, "_portions", lambda self: iter([self.blocks]))
    whole, at_once = made()
    for handle in handles:
        handle.remove()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items()) and len(whole) == len(parts)
    assert by_layer == at_once


def test_six_parts_of_a_kind_are_cut_for_a_check_however_deep_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_dense(BERT, torch.float32, num_hidden_layers=8)
    stats = calibrated(BERT, dense, sample_tokens=65_536)
    checks, original = [], CurveMeasure._loss

    def counted(self: CurveMeasure, *args: Any) -> float:
        checks.append(args)
        return original(self, *args)

    monkeypatch.setattr(CurveMeasure, "_loss", counted)
    assert removed_fraction(dense, compress(dense, stats, remove=0.3)) >= 0.3
    # the embeddings' site and the two of six layers; two sizes of the filters; the heads, their scores, their values
    assert len(checks) == 1 + 2 * 6 + 2 * 6 + 3 * 6


def test_a_part_that_was_not_cut_takes_the_scale_between_its_neighbours() -> None:
    """Between logarithms, by size; behind the last one its own; other kinds lend nothing."""
    values = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    scales: list[dict[int, float] | None] = [{1: np.log(2), 3: 0.0}, None, {1: np.log(8)}, None]
    curves = [_Curve("one", place, 4, values, found) for place, found in enumerate(scales)]
    other = [_Curve("other", 1, 3, values, {1: np.log(99)}), _Curve("alone", 0, 1, values)]
    first, second, third, last, _, alone = _finished([*curves, *other])
    np.testing.assert_allclose(first, [8.0, 6.0, 2.0 * 2**0.5, 1.0, 0.0])
    np.testing.assert_allclose(second, [16.0, 12.0, 4.0, 1.0, 0.0])
    np.testing.assert_allclose(third, 8.0 * values)
    np.testing.assert_allclose(last, [32.0, 24.0, 2.0 * 8**0.5, 1.0, 0.0])
    np.testing.assert_allclose(alone, values)


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_a_larger_budget_never_predicts_a_larger_loss(case: Case) -> None:
    dense, stats = sampled(case)
    predicted = [compress(dense, stats, remove=r).config.projection["options"]["predicted_kl"] for r in (0.1, 0.3, 0.5)]
    assert predicted == sorted(predicted)


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_uniform_sizes(case: Case) -> None:
    dense, stats = sampled(case)
    config = compress(dense, stats, remove=0.3, uniform=True).config
    assert len(set(config.site_widths().values())) == 1
    for name, value in config.to_dict().items():
        if "layer_" in name and isinstance(value, list):
            assert len({str(entry if isinstance(entry, int) else len(entry)) for entry in value}) == 1, name


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_a_budget_of_operations(case: Case) -> None:
    dense, stats = sampled(case)
    small = compress(dense, stats, flops=0.6)
    ids = {name: value[:1] for name, value in make_inputs(case).items()}
    counted = []
    for model in (dense, small):
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**ids)
        counted.append(counter.get_total_flops())
    assert counted[1] < 0.85 * counted[0]  # the head's own and other lengths than the calibration's are in here


def test_a_budget_of_time_is_searched_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, stats = sampled(BERT)
    # a machine on which time is proportional to the parameters, give or take nothing
    monkeypatch.setattr(latency, "_time_ratio", lambda run, a, b: 1.0 - removed_fraction(a, b))
    small = compress(dense, stats, latency=0.7)
    assert removed_fraction(dense, small) >= 0.3
    rows = small.config.projection["options"]["latency_table"]
    assert any(row["latency"] <= 0.7 for row in rows)
    monkeypatch.setattr(latency, "_time_ratio", lambda run, a, b: 1.0)
    with pytest.raises(TCSPError, match="fastest"):
        compress(dense, stats, latency=0.7)


def test_dead_parts_go_for_nothing() -> None:
    dense, _ = sampled(BERT)
    layers = dense.bert.encoder.layer
    with torch.no_grad():
        for layer in layers:
            layer.intermediate.dense.weight[::2] = 0.0  # every other neuron is constant
            layer.intermediate.dense.bias[::2] = 0.0
            layer.attention.output.dense.weight[:, 8:16] = 0.0  # nobody reads the second head
    stats = calibrated(BERT, dense, sample_tokens=65_536)
    small = compress(dense, stats, remove=0.2, axes=("filters", "heads"))
    assert distance(BERT, small, dense) < 1e-4
    alive = compress(*sampled(BERT), remove=0.2, axes=("filters", "heads"))
    measured = [model.config.projection["options"]["measured_kl"] for model in (small, alive)]
    assert measured[0] < 1e-2 * measured[1]


def test_whole_heads_go() -> None:
    dense, _ = sampled(T5)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("Attention.o.weight"):
                parameter[:, 16:24] = 0.0  # the third head of four
    stats = calibrated(T5, dense, sample_tokens=65_536)
    small = compress(dense, stats, remove=0.1, axes=("heads",))
    assert distance(T5, small, dense) < 1e-4
    kept = small.config.encoder_layer_kept_heads
    assert kept is not None and all(2 not in heads for heads in kept)


def test_segments_stand_for_sequences() -> None:
    segments = Segments.of([5, 1, 4], 2, torch.device("cpu"))
    assert segments.ids.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 4, 4]
    torch.testing.assert_close(segments.scale.square(), torch.tensor([5 / 3, 5 / 2, 1.0, 2.0, 2.0]))
    u, t, w, held = problem(9, rows=10)
    held = torch.zeros_like(held)
    found = NormalEquations.zeros(9, 4, u.device)
    found.add([u], t, w, held, segments, 0.25)
    x = torch.cat([u, torch.ones(10, 1)], 1).double() * w.double().sqrt()[:, None]
    sums = torch.stack([x[segments.ids == i].sum(0) for i in range(5)]) * segments.scale.double()[:, None]
    torch.testing.assert_close(found.total[0], 0.75 * x.T @ x + 0.25 * sums.T @ sums, rtol=1e-4, atol=1e-3)


def test_few_tokens_are_said_and_still_work(caplog: pytest.LogCaptureFixture) -> None:
    dense = make_dense(BERT, torch.float32, 0)
    stats = calibrated(BERT, dense, sample_tokens=60)
    with caplog.at_level("WARNING", logger="tcsp_hf"):
        small = compress(dense, stats, remove=0.2)
    assert "more text" in caplog.text
    assert all(torch.isfinite(parameter).all() for parameter in small.parameters())


def test_what_cannot_be_done_is_named() -> None:
    dense, stats = sampled(BERT)
    with pytest.raises(TCSPError, match="smallest"):
        compress(dense, stats, remove=0.99, axes=("heads",))
    with pytest.raises(TCSPError, match="'width'"):
        compress(dense, stats, remove=0.2, axes=("hidden", "width"))
    with pytest.raises(TCSPError, match="remove="):
        compress(dense, stats, hidden_size=16, axes=("filters",))
    with pytest.raises(TCSPError, match="need the refit"):
        compress(dense, stats, remove=0.2, axes=("filters",), refit=False)
    for name in ("flops", "latency"):
        with pytest.raises(TCSPError, match=rf"{name} is 1\.5"):
            compress(dense, stats, **{name: 1.5})
    stats.sample = TokenSample(0)
    with pytest.raises(TCSPError, match="sample_tokens"):
        compress(dense, stats, hidden_size=16, refit=True)
    with pytest.raises(TCSPError, match="sample_tokens"):
        compress(dense, stats, remove=0.2, axes=("heads",))


@pytest.mark.parametrize("case", [find("bert-ForQuestionAnswering"), find("t5-ForConditionalGeneration")], ids=str)
def test_replay_is_a_whole_forward_pass(case: Case) -> None:
    """Whatever changes, at any depth: the outputs are those of the changed model run from its first layer."""
    model, batch = make_dense(case, torch.float32), make_inputs(case)
    with torch.no_grad():
        replay = Replay(model, [batch])
        for block in blocks_of(model):
            before = block.output.weight.clone()
            block.output.weight.mul_(0.5)
            (found,) = replay.outputs([block.output])
            expected = model(**batch)
            for name, value in outputs_of(found).items():
                assert torch.equal(value, outputs_of(expected)[name])
            block.output.weight.copy_(before)
        (again,) = replay.outputs([sites_of(model)[-1].norm])
    assert all(torch.equal(value, outputs_of(replay.expected[0])[name]) for name, value in outputs_of(again).items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def outputs_of(found: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        ("bert-ForSequenceClassification", True),
        ("bert-ForMultipleChoice", True),
        ("bert-ForPreTraining", False),  # has a pooler, but its masked-LM head reads every token
        ("bert-ForTokenClassification", False),
        ("bert-Model", False),  # mean-pooled
        ("t5-ForSequenceClassification", False),
    ],
)
def test_only_what_reads_the_first_token_leaves_the_others_idle(name: str, idle: bool) -> None:
    case = find(name)
    model = make_dense(case, torch.float32)
    metrics = Metrics(model, calibrated(case, model))
    sites = [site.name for site in sites_of(model) if site.name != "mlm_head"]
    seen = [metrics.token_weights(site, torch.ones(1, 4, dtype=torch.bool)).tolist() for site in sites]
    every, one = [1.0] * 4, [1.0, *[pytest.approx(IDLE_WEIGHT)] * 3]
    # the last layer's keys and values read every token; what follows its attention only the first
    assert seen == [every] * (len(sites) - 2 * idle) + [one] * (2 * idle)
