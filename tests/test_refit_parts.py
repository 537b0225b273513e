"""The parts of the closed-form refit, against brute force or their definition; the whole: `refit_problems.py`."""

import copy

import pytest
import torch
from common import D, find, make_dense, make_rows
from refit_problems import HEAD, HEADS, NEURONS, Rows, record

from tcsp_hf import TCSPError, calibrate, compress
from tcsp_hf.architectures import sites_of
from tcsp_hf.compression.cuts import cut_filters, cut_values, head_rows
from tcsp_hf.compression.filters import drop_inputs
from tcsp_hf.compression.heads import drop_heads, inverse_root, score_factors, score_moments, value_factors
from tcsp_hf.compression.least_squares import NormalEquations, Segments, damped_inverse, ridge, solve
from tcsp_hf.compression.metrics import Metrics
from tcsp_hf.compression.refit_bert import BertRefit, RefitResult
from tcsp_hf.compression.streams import padded_batches
from tcsp_hf.compression.subspace import symmetric_root


def gaussian(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_loss(h: torch.Tensor, weights: torch.Tensor, kept: list[int]) -> float:
    """Loss added when only these inputs are left and all are solved again: of `||(W - V) x||` under H, in the trace."""
    gone = [i for i in range(len(h)) if i not in kept]
    left = h[gone][:, gone] - h[gone][:, kept] @ torch.linalg.solve(h[kept][:, kept], h[kept][:, gone])
    return float((weights[:, gone] @ left @ weights[:, gone].T).trace())


@pytest.mark.parametrize("block", [1, 2, 16])
def test_drop_inputs(block: int) -> None:
    """The curve is what re-solving really costs, block after block; inputs behind the candidates stay."""
    x = gaussian(0, 200, 9) * torch.linspace(0.3, 2, 9)
    h, weights = x.T @ x, gaussian(1, 4, 9)
    before = h.clone(), weights.clone()
    kept, curve, order = drop_inputs(h, weights, 7, 3, block)
    assert torch.equal(h, before[0]) and torch.equal(weights, before[1])
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == 3 and max(kept.tolist()) < 7
    assert sorted([*kept.tolist(), *order.tolist()]) == list(range(7))
    assert [count for count, _ in curve] == [7, *([6, 5, 4, 3] if block == 1 else [5, 3] if block == 2 else [3])]
    assert curve[0][1] == 0.0
    for count, loss in curve:
        left = [i for i in range(9) if i not in order[: 7 - count].tolist()]
        assert loss == pytest.approx(least_loss(h, weights, left), rel=1e-3, abs=1e-9)
    if block == 1:
        inputs = list(range(9))
        for index in order.tolist():
            costs = {i: least_loss(h, weights, [j for j in inputs if j != i]) for i in inputs if i < 7}
            assert costs[index] == pytest.approx(min(costs.values()), rel=1e-3)
            inputs.remove(index)


def test_nothing_is_dropped_where_all_may_stay() -> None:
    kept, curve, order = drop_inputs(torch.eye(4, dtype=torch.float64), gaussian(0, 2, 4), 3, 3)
    assert kept.tolist() == [0, 1, 2] and curve == [(3, 0.0)] and len(order) == 0


def test_drop_heads() -> None:
    x = gaussian(2, 300, 9)
    h, weights = x.T @ x, gaussian(3, 3, 9) * torch.linspace(2, 0.2, 9)
    kept, losses, order = drop_heads(h, weights, 4, 2, 1)
    assert len(kept) == 1 and sorted([*kept.tolist(), *order]) == [0, 1, 2, 3]
    assert losses[0] == 0.0 and len(losses) == 4 and losses == sorted(losses)
    heads = [0, 1, 2, 3]

    def entries(names: list[int]) -> list[int]:
        return [*(2 * n + i for n in names for i in range(2)), 8]

    for gone, loss in zip(order, losses[1:], strict=True):
        costs = {n: least_loss(h, weights, entries([m for m in heads if m != n])) for n in heads}
        assert costs[gone] == pytest.approx(min(costs.values()), rel=1e-3)
        assert loss == pytest.approx(costs[gone], rel=1e-3)
        heads.remove(gone)
    assert drop_heads(h, weights, 4, 2, 4)[0].tolist() == [0, 1, 2, 3]


def test_value_factors_of_one_head_are_the_best() -> None:
    """Of `||W (I - P) H^1/2||` over all projections of the values, with what the other inputs explain taken out."""
    x = gaussian(4, 400, 6) @ gaussian(5, 6, 6)
    h, weights = x.T @ x, gaussian(6, 3, 6)
    (factor,) = value_factors(h, weights, 1, 4, 2)
    assert factor.shape == (2, 4)

    def lost(turn: torch.Tensor) -> float:
        rows = torch.block_diag(turn, torch.eye(2, dtype=torch.float64))
        small = rows @ h @ rows.T
        best = weights @ h @ rows.T @ torch.linalg.inv(small)
        return float(((weights - best @ rows) @ h @ (weights - best @ rows).T).trace())

    conditional = torch.linalg.inv(torch.linalg.inv(h)[:4, :4])
    root = symmetric_root(conditional)
    values = torch.linalg.svdvals(weights[:, :4] @ root)
    assert lost(factor) == pytest.approx(float(values[2:].square().sum()), rel=1e-2)
    assert all(lost(factor) <= lost(gaussian(seed, 2, 4)) for seed in range(20))


def test_value_factors_of_several_heads_solve_again() -> None:
    """The second head knows what the first lost: better than cutting both against the whole problem."""
    x = gaussian(7, 400, 9) @ gaussian(8, 9, 9)
    h, weights = x.T @ x, gaussian(9, 5, 9)
    factors = value_factors(h, weights, 2, 4, 3)
    assert factors.shape == (2, 3, 4)
    # dropping nothing is exact, and turns by an invertible map
    whole = value_factors(h, weights, 2, 4, 4)
    assert all(float(torch.linalg.cond(one)) < 1e6 for one in whole)

    def lost(turns: torch.Tensor) -> float:
        rows = torch.block_diag(*turns, torch.eye(1, dtype=torch.float64))
        small = rows @ h @ rows.T
        best = weights @ h @ rows.T @ torch.linalg.inv(small)
        return float(((weights - best @ rows) @ h @ (weights - best @ rows).T).trace())

    first = value_factors(h, weights, 1, 4, 3)
    order = [*range(4, 8), *range(4), 8]
    second = value_factors(h[order][:, order], weights[:, order], 1, 4, 3)
    assert lost(factors) <= lost(torch.cat([first, second])) * 1.001
    assert lost(whole) < 1e-9 * float((weights @ h @ weights.T).trace())


def test_value_factors_of_every_head_are_those_of_the_problem_that_is_left() -> None:
    """As if the problem were solved again, from the start, after each head."""
    heads, size, keep = 3, 4, 2
    x = gaussian(30, 400, heads * size + 1) @ gaussian(31, heads * size + 1, heads * size + 1)
    h, weights = x.T @ x, gaussian(32, 5, heads * size + 1)
    for head, factor in enumerate(value_factors(h, weights, heads, size, keep)):
        # the head that is next stands first
        (expected,) = value_factors(h, weights, 1, size, keep)
        spaces = [torch.linalg.pinv(one) @ one for one in (factor, expected)]
        torch.testing.assert_close(spaces[0], spaces[1], rtol=0.0, atol=2e-2, msg=f"head {head}")
        rows = torch.block_diag(factor, torch.eye(h.shape[0] - size, dtype=torch.float64))
        small = rows @ h @ rows.T
        weights = weights @ h @ rows.T @ torch.linalg.inv(small)
        order = [*range(keep, len(small)), *range(keep)]
        h, weights = small[order][:, order], weights[:, order]


def test_score_moments() -> None:
    """Sums of q q' and, query by query, of the keys' covariance under its attention; padded queries do not count."""
    query, key, attention = gaussian(10, 2, 3, 4, 5), gaussian(11, 2, 3, 6, 5), gaussian(12, 2, 3, 4, 6).softmax(-1)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for queries in (None, real):
        found = score_moments(query, key, attention, queries)
        expected = [torch.zeros(3, 5, 5, dtype=torch.float64) for _ in range(2)]
        for b in range(2):
            for h in range(3):
                for i in range(4):
                    if queries is not None and not queries[b, i]:
                        continue
                    expected[0][h] += torch.outer(query[b, h, i], query[b, h, i])
                    apart = key[b, h] - attention[b, h, i] @ key[b, h]
                    expected[1][h] += apart.T @ (attention[b, h, i][:, None] * apart)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_score_factors_are_the_best() -> None:
    """Least `||C_q^1/2 (I - M) C_k^1/2||` of any map M of the rank: the singular values that are left out."""
    moments = [m @ m.mT for m in (gaussian(13, 2, 5, 5), gaussian(14, 2, 5, 5))]
    roots = [torch.stack([symmetric_root(one) for one in moment]) for moment in moments]
    for size in (1, 3, 5):
        p_query, p_key = score_factors(*moments, size)
        assert p_query.shape == p_key.shape == (2, size, 5)
        for h in range(2):
            rest = torch.eye(5, dtype=torch.float64) - p_query[h].T @ p_key[h]
            lost = float((roots[0][h] @ rest @ roots[1][h]).square().sum())
            values = torch.linalg.svdvals(roots[0][h] @ roots[1][h])
            assert lost == pytest.approx(float(values[size:].square().sum()), rel=1e-5, abs=1e-9)
            norms = p_query[h] @ moments[0][h] @ p_query[h].T, p_key[h] @ moments[1][h] @ p_key[h].T
            torch.testing.assert_close(norms[0], norms[1], msg="both sides carry the same share")


def test_inverse_root_floors_what_has_no_energy() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1e-20, 0.0], dtype=torch.float64))
    root, inverse = inverse_root(matrix)
    floor = (4.0 * 1e-10) ** 0.5
    torch.testing.assert_close(root.diagonal(), torch.tensor([2.0, floor, floor], dtype=torch.float64))
    torch.testing.assert_close(inverse @ root, torch.eye(3, dtype=torch.float64))
    nothing, inverse = inverse_root(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(nothing, 1e-15 * torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool(torch.isfinite(inverse).all())


@pytest.mark.parametrize("bias", [True, False])
def test_cuts_leave_the_problem_of_what_is_left(bias: bool) -> None:
    """Kept heads and turned values: normal equations and prior are those of the new inputs."""
    heads, size, others = 3, 4, 2
    x, t = gaussian(15, 200, heads * size + others).float(), gaussian(16, 200, 5).float()
    prior = gaussian(17, heads * size + others + bias, 5)
    held = torch.arange(200) % 5 == 4
    problem = NormalEquations.zeros(x.shape[1], 5, torch.device("cpu"), bias)
    problem.add([x], t, torch.ones(200), held)
    root = symmetric_root(gaussian(18, 5, 5) @ gaussian(18, 5, 5).T)
    whole = torch.cat([x, torch.ones(200, 1)], 1).double() if bias else x.double()
    same, _, _ = cut_values((problem, prior), root, heads, size, heads, size)
    assert same[0] is problem and same[1] is prior
    for keep, narrow in ((3, 4), (2, 4), (3, 2), (2, 3)):
        (equations, left), turn, kept = cut_values((copy.deepcopy(problem), prior), root, heads, size, keep, narrow)
        assert len(kept) == keep and equations.inputs == keep * narrow + others and equations.tokens == 200
        if (keep, narrow) == (3, 4):
            assert turn is None and left is prior and kept.tolist() == [0, 1, 2]
            continue
        assert turn.shape == (keep * narrow, heads * size)
        rows = torch.block_diag(turn, torch.eye(others + bias, dtype=torch.float64))
        moved = whole @ rows.T
        for fold, chosen in enumerate((~held, held)):
            wanted = moved[chosen].T @ moved[chosen]
            torch.testing.assert_close(equations.moments[fold], wanted, rtol=1e-4, atol=1e-3)
            cross = moved[chosen].T @ t.double()[chosen]
            torch.testing.assert_close(equations.cross[fold], cross, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(left[: keep * narrow], torch.linalg.pinv(turn).T @ prior[: heads * size])
        assert torch.equal(left[keep * narrow :], prior[heads * size :])
        gone = [n for n in range(heads) if n not in kept.tolist()]
        assert all(not turn[:, n * size : (n + 1) * size].any() for n in gone)
    (equations, left), kept = cut_filters((copy.deepcopy(problem), prior), root, heads * size, 5)
    assert equations.inputs == 5 + others and len(kept) == 5
    rows_ = [*kept.tolist(), *range(heads * size, len(prior))]
    assert torch.equal(left, prior[rows_])
    torch.testing.assert_close(equations.total[0], problem.total[0][rows_][:, rows_])
    same, kept = cut_filters((problem, prior), root, heads * size, heads * size)
    assert same[0] is problem and kept.tolist() == list(range(heads * size))
    assert head_rows(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_cuts_keep_what_is_read() -> None:
    """By the ridge solution in the metric: what only the output's unread directions see goes first."""
    x = gaussian(19, 300, 8).float()
    weights = torch.zeros(8, 3)
    weights[:4, 0], weights[4:, 1] = 1.0, 3.0  # the second half is larger, but the metric does not see it
    problem = NormalEquations.zeros(8, 3, torch.device("cpu"))
    problem.add([x], x @ weights, torch.ones(300), torch.arange(300) % 5 == 4)
    root = torch.diag(torch.tensor([1.0, 0.01, 1.0], dtype=torch.float64))
    prior = torch.zeros(9, 3, dtype=torch.float64)
    _, kept = cut_filters((copy.deepcopy(problem), prior), root, 8, 4)
    assert kept.tolist() == [0, 1, 2, 3]
    _, _, heads = cut_values((problem, prior), root, 2, 4, 1, 4)
    assert heads.tolist() == [0]


def test_few_tokens_are_held_to_the_prior() -> None:
    """Fewer than two tokens for an input: only the strong penalties; nothing held out: the strongest."""
    x, t = gaussian(20, 30, 10).float(), gaussian(21, 30, 1).float()
    prior = torch.zeros(11, 1, dtype=torch.float64)

    def fitted(rows: int, held: torch.Tensor) -> tuple[torch.Tensor, NormalEquations]:
        problem = NormalEquations.zeros(10, 1, torch.device("cpu"))
        problem.add([x[:rows]], t[:rows], torch.ones(rows), held[:rows])
        return ridge(problem, prior), problem

    held = torch.arange(30) % 5 == 4
    found, problem = fitted(19, held)
    assert any(torch.equal(found, solve(*problem.total, prior, strength)) for strength in (10.0, 1.0, 0.1))
    exact = (x.double() @ torch.ones(10, 1, dtype=torch.float64)).float()
    for rows, strength in ((19, 0.1), (20, 1e-4)):
        problem = NormalEquations.zeros(10, 1, torch.device("cpu"))
        problem.add([x[:rows]], exact[:rows], torch.ones(rows), held[:rows])
        # the weaker the better here, so the weakest that is tried: twenty tokens are enough for ten inputs
        assert torch.equal(ridge(problem, prior), solve(*problem.total, prior, strength)), rows
    for everything in (torch.zeros(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)):
        found, problem = fitted(30, everything)
        assert torch.equal(found, solve(*problem.total, prior, 10.0))


def test_sums_that_are_indefinite_to_rounding_are_shrunk_harder() -> None:
    """What rounding made of no energy stays with the prior; sums that are no numbers are refused."""
    moments = torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64))
    cross, prior = torch.tensor([[2.0], [1e-9]], dtype=torch.float64), torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    found = solve(moments, cross, prior, 1e-4, bias=False)
    assert found[1].item() == pytest.approx(5.0, rel=0.05) and 0.0 < found[0].item() < 2.0
    with pytest.raises(TCSPError, match="not finite"):
        solve(torch.full((2, 2), float("nan"), dtype=torch.float64), cross, prior, 1e-4, bias=False)


def test_sums_of_one_fold_and_of_two() -> None:
    x = gaussian(33, 50, 3).float()
    problem = NormalEquations.zeros(3, 3, torch.device("cpu"), bias=False)
    problem.add([x], x, torch.ones(50), torch.arange(50) % 5 == 4)
    for part in problem.total:
        torch.testing.assert_close(part, (x.T @ x).double(), rtol=1e-5, atol=1e-5)
    before, total = [[fold.clone() for fold in part] for part in (problem.moments, problem.cross)], problem.total
    with pytest.raises(KeyError), problem.joined() as sums:
        assert all(map(torch.equal, sums, total))
        raise KeyError
    for part, was in zip((problem.moments, problem.cross), before, strict=True):
        torch.testing.assert_close(part, was, rtol=1e-12, atol=1e-12)
    one = NormalEquations(3, problem.moments[:1], problem.cross[:1], bias=False)
    assert torch.equal(one.total[0], problem.moments[0]) and torch.equal(one.total[1], problem.cross[0])
    with one.joined() as sums:
        assert all(map(torch.equal, sums, one.total))


def test_blocks_are_summed_at_their_size() -> None:
    """Rows wait until they make a block, and none is lost or counted twice."""
    problem = NormalEquations.zeros(1, 1, torch.device("cpu"), bias=False)
    for i in range(9):
        rows = torch.ones(1000, 1)
        problem.add([rows], rows, torch.ones(1000), torch.arange(1000) % 2 == 1)
        for summed, block in zip(problem._moments, (2048, 512), strict=True):
            assert float(summed) == (i + 1) * 500 // block * block
    assert problem.tokens == 9000
    assert [float(fold) for fold in (*problem.moments, *problem.cross)] == [4500.0] * 4


@pytest.mark.parametrize("source", ["bert-ForSequenceClassification", "t5-ForConditionalGeneration"])
def test_metrics(source: str) -> None:
    case = find(source)
    dense = make_dense(case, torch.float32)
    stats = calibrate(dense, make_rows(case, 90), progress=False)
    probe = padded_batches(stats.sample.sequences()[4::5], dense.device)
    metrics = Metrics(dense, stats, probe)
    identity = torch.eye(D, dtype=torch.float64)
    assert metrics.segment_tokens == stats.sample.tokens // (3 * (D + NEURONS)) >= 2
    squares = dict.fromkeys(metrics.sites, 1.0)
    if case.family == "t5":
        handles, found = [], {}
        for site in sites_of(dense):
            handles.append(site.norm.register_forward_pre_hook(record(found, site.name, False)))
        with torch.no_grad():
            for row in stats.sample.sequences()[4::5]:
                dense(**{name: torch.tensor([values]) for name, values in row.items()})
        for handle in handles:
            handle.remove()
        squares = {name: float(torch.cat(rows).square().mean()) for name, rows in found.items()}
        assert len(set(squares.values())) == len(squares)
    for name in metrics.sites:
        later = [other for other in metrics.sites if other.split(".")[0] == name.split(".")[0]]
        later = later[later.index(name) :] if case.family == "t5" else [name]
        fisher = sum(stats.sites[other].fisher * (squares[name] / squares[other]) for other in later)
        assert float((metrics.fisher(name) - fisher).norm() / fisher.norm()) < 1e-4
        mean = float(fisher.trace()) / D
        torch.testing.assert_close(metrics.matrix(name), fisher / mean + 0.3 * identity, rtol=1e-4, atol=1e-6)
        root = metrics.root(name)
        torch.testing.assert_close(root @ root, (fisher + 0.3 * mean * identity) / 1.3, rtol=1e-4, atol=1e-4 * mean)
        assert metrics.unit(name) == pytest.approx(float(stats.sites[name].fisher.trace()) / D / 1.3)
        weights = [float(stats.sites[other].fisher_sum.trace()) for other in later]
        shares = [stats.sites[other].coherence for other in later]
        expected = sum(w * c for w, c in zip(weights, shares, strict=True)) / sum(weights)
        assert metrics.coherence(name) == pytest.approx(expected) and 0 < expected < 1
        site = stats.sites[name]
        query = metrics.query(name, HEADS, HEAD)
        if site.query_fisher_sum is None:
            assert torch.equal(query, torch.eye(HEAD, dtype=torch.float64).expand(HEADS, HEAD, HEAD))
        else:
            gradient = site.query_fisher_sum / site.tokens
            for h in range(HEADS):
                floor = 0.3 * gradient[h].diagonal().mean() * torch.eye(HEAD, dtype=torch.float64)
                torch.testing.assert_close(query[h], (gradient[h] + floor) / 1.3)
    stack = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    assert all(metrics.mask_name(name) == stack[site.stack] for name, site in metrics.sites.items())
    segments = metrics.segments([5, 4])
    assert (
        segments is not None
        and segments.ids.tolist() == Segments.of([5, 4], metrics.segment_tokens, dense.device).ids.tolist()
    )


def test_metrics_without_gradients_or_tokens() -> None:
    """The identity, single tokens, and no coherence."""
    case = find("t5-ForConditionalGeneration")
    dense = make_dense(case, torch.float32)
    stats = calibrate(dense, make_rows(case, 12), progress=False, fisher=False)
    metrics = Metrics(dense, stats)
    name = "encoder.0.attention"
    identity = torch.eye(D, dtype=torch.float64)
    assert metrics.segment_tokens < 2 and metrics.segments([5]) is None and metrics.coherence(name) == 0.0
    assert metrics.fisher(name) is None and metrics.unit(name) == 1.0
    assert torch.equal(metrics.matrix(name), identity)
    torch.testing.assert_close(metrics.root(name), identity)
    many = calibrate(dense, make_rows(case, 90), progress=False, fisher=False)
    assert Metrics(dense, many).segment_tokens >= 2 and Metrics(dense, many).coherence(name) == 0.0


def test_recording_leaves_what_the_norms_divide_by() -> None:
    for source in ("bert-ForSequenceClassification", "t5-ForConditionalGeneration"):
        case = find(source)
        dense = make_dense(case, torch.float32)
        metrics = Metrics(dense, calibrate(dense, make_rows(case, 12), progress=False))
        name = list(metrics.sites)[1]
        sums: dict[str, Rows] = {}
        handle = metrics.sites[name].norm.register_forward_pre_hook(record(sums, "sum", False))
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad(), metrics.recording([name]) as found:
            dense(input_ids=ids, **({"decoder_input_ids": ids} if case.family == "t5" else {}))
        handle.remove()
        stream = sums["sum"][0] - (sums["sum"][0].mean(-1, keepdim=True) if case.family == "bert" else 0.0)
        torch.testing.assert_close(found[name][0].double(), stream.square().mean(-1).sqrt(), rtol=1e-5, atol=1e-5)
        assert not metrics.sites[name].norm._forward_pre_hooks


@pytest.mark.parametrize("eps", [1e-12, 1e-3])
def test_the_refit_carries_what_the_model_computes(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last stream is the compressed model's, also where a norm's epsilon counts."""
    dense = make_dense(find("bert-Model"), torch.float32, layer_norm_eps=eps)
    stats = calibrate(dense, make_rows(find("bert-Model"), 200), progress=False)
    made: list[tuple[RefitResult, torch.Tensor]] = []
    run = BertRefit.run

    def recorded(refit: BertRefit) -> RefitResult:
        result = run(refit)
        made.append((result, result.carried.read(slice(0, result.sample.tokens))))
        return result

    monkeypatch.setattr(BertRefit, "run", recorded)
    small = compress(dense, stats, remove=0.3, progress=False)
    rows = sorted(stats.sample.sequences(), key=lambda row: len(row["input_ids"]))
    ((result, carried),) = made
    for group in result.sample.groups:
        inputs = [rows.pop(0) for _ in group.members]
        tensors = {name: torch.tensor([row[name] for row in inputs]) for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            found = small(**tensors).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(carried[group.rows], found, rtol=1e-4, atol=1e-4)


def test_sums_wider_than_a_panel_are_whole() -> None:
    """Only panels on and above the diagonal are summed; what is asked for has both halves, each time."""
    x = gaussian(40, 900, 500).float()
    problem = NormalEquations.zeros(500, 2, torch.device("cpu"), bias=False)
    held = torch.arange(900) % 5 == 4
    for half in (slice(0, 450), slice(450, 900)):
        problem.add([x[half]], x[half, :2], torch.ones(450), held[half])
        done = x[: half.stop].double()
        for fold, chosen in enumerate((~held[: half.stop], held[: half.stop])):
            wanted = done[chosen].T @ done[chosen]
            torch.testing.assert_close(problem.moments[fold], wanted, rtol=1e-4, atol=1e-3)


def test_an_indefinite_matrix_is_damped_and_inverted() -> None:
    matrix = torch.diag(torch.tensor([2.0, -0.5, 3.0], dtype=torch.float64))
    damping = torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64)
    found = damped_inverse(matrix, damping)
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.4, -4.0, 0.25], dtype=torch.float64)))
    assert found.is_contiguous()
    definite = damped_inverse(matrix.abs(), damping)
    torch.testing.assert_close(definite, torch.diag(torch.tensor([0.4, 1 / 0.75, 0.25], dtype=torch.float64)))
    assert definite.is_contiguous()
