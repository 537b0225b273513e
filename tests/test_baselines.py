"""The baselines: nothing removed changes nothing, what is dead goes for free, and the counts are the real ones."""

import pytest
import torch
from common import Case, calibrated, dense_and_sample, find, make_dense, make_inputs, make_labels
from torch import nn
from transformers import PreTrainedModel

from tcsp_hf import TCSPError
from tcsp_hf.baselines import BASELINES
from tcsp_hf.baselines.budget import working_copy
from tcsp_hf.baselines.fisher import mask_gradients, rearrange, search
from tcsp_hf.baselines.layers import dropped
from tcsp_hf.baselines.low_rank import factorise
from tcsp_hf.baselines.mask_tuning import _least_squares, _Passes, tuned_masks
from tcsp_hf.baselines.units import keep_units, units_of
from tcsp_hf.calibration import calibrate
from tcsp_hf.compression import count_parameters, removed_fraction

BERT = find("bert-ForSequenceClassification")
CASES = [
    BERT,
    find("bert-Model"),
    find("bert-ForQuestionAnswering"),
    find("t5-ForConditionalGeneration"),
    find("t5-gated-ForSequenceClassification"),
    find("t5-EncoderModel"),
]
UNIT_METHODS = ("fisher", "magnitude")


def answers(case: Case, model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found = model(**make_inputs(case))
    for name in ("logits", "start_logits"):
        if name in found:
            return found[name]
    return found.last_hidden_state


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_nothing_removed_is_the_dense_model(case: Case, name: str) -> None:
    dense, stats = dense_and_sample(case)
    small = BASELINES[name].compress(dense, stats, 0.0)
    assert small is not dense
    torch.testing.assert_close(answers(case, small), answers(case, dense), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_what_is_removed_is_gone(case: Case, name: str) -> None:
    """Counted by brute force over distinct tensors; the dense model stays; gradients reach the result."""
    dense, stats = dense_and_sample(case)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    small = BASELINES[name].compress(dense, stats, 0.3)
    tables = {id(m.weight) for n, m in small.named_modules() if isinstance(m, nn.Embedding) and "relative" not in n}
    if small.get_output_embeddings() is not None:
        tables.add(id(small.get_output_embeddings().weight))
    left = sum(p.numel() for p in small.parameters() if id(p) not in tables)
    assert left == count_parameters(small).non_embedding
    assert left <= 0.7 * count_parameters(dense).non_embedding
    assert removed_fraction(dense, small) < 0.75
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert torch.isfinite(answers(case, small)).all()
    inputs = make_inputs(case)
    loss = sum(value.float().square().sum() for value in small(**inputs).values() if isinstance(value, torch.Tensor))
    loss.backward()
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in small.parameters())


def plant_dead_units(model: PreTrainedModel, filters: int, seed: int) -> list[torch.Tensor]:
    """Make one head and some filters of every block write nothing and be small; returns the living ones."""
    generator = torch.Generator().manual_seed(seed)
    alive = []
    with torch.no_grad():
        for units in units_of(model):
            count = filters if units.kind == "filters" else 1
            order = torch.randperm(units.count, generator=generator)
            entries = (order[:count, None] * units.size + torch.arange(units.size)).reshape(-1)
            units.block.output.weight[:, entries] = 0.0
            for linear in units.block.inner:
                linear.weight[entries] *= 0.01
                if linear.bias is not None:
                    linear.bias[entries] *= 0.01
            alive.append(order[count:].sort().values)
    return alive


@pytest.mark.parametrize("name", UNIT_METHODS)
@pytest.mark.parametrize(
    "case", [BERT, find("t5-ForConditionalGeneration"), find("t5-gated-ForSequenceClassification")], ids=str
)
def test_dead_heads_and_filters_go_for_free(case: Case, name: str) -> None:
    dense = make_dense(case)
    plant_dead_units(dense, 10, 3)  # one head of 4 and 10 filters of 40: a quarter of each
    stats = calibrated(case, dense, sample_tokens=65_536)
    groups = units_of(dense)
    dead = sum(units.cost * (10 if units.kind == "filters" else 1) for units in groups)
    removed = dead / count_parameters(dense).non_embedding
    small = BASELINES[name].compress(dense, stats, removed)
    assert removed_fraction(dense, small) == pytest.approx(removed, abs=1e-9)
    torch.testing.assert_close(answers(case, small), answers(case, dense), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [BERT, find("t5-ForConditionalGeneration")], ids=str)
def test_low_rank_linears_are_exact_under_svd(case: Case) -> None:
    dense = make_dense(case)
    generator = torch.Generator().manual_seed(0)
    linears = [linear for units in units_of(dense) for linear in (*units.block.inner, units.block.output)]
    if case.family == "bert":
        linears.append(dense.bert.pooler.dense)
    with torch.no_grad():
        for linear in linears:
            left = torch.randn(linear.out_features, 4, generator=generator, dtype=torch.float64)
            right = torch.randn(4, linear.in_features, generator=generator, dtype=torch.float64)
            linear.weight.copy_(0.1 * left @ right)
    stats = calibrated(case, dense, sample_tokens=65_536)
    small = BASELINES["svd"].compress(dense, stats, 0.5)
    assert 0.5 <= removed_fraction(dense, small) < 0.75
    torch.testing.assert_close(answers(case, small), answers(case, dense), rtol=1e-6, atol=1e-6)


def test_whitened_factors_are_the_best_of_their_rank() -> None:
    """E|Wx - W'x|² equals the left-out singular values of W L; the plain SVD is worse."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(12, 9, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(9, 12, generator=generator, dtype=torch.float64))
    rows = torch.randn(500, 12, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -2, 12, dtype=torch.float64
    )
    moment = rows.T @ rows / 500
    root = torch.linalg.cholesky(moment)
    small = factorise(linear, root, 4)
    with torch.no_grad():
        error = (linear(rows) - small(rows)).square().sum(1).mean()
        assert float(error) == pytest.approx(float(torch.linalg.svdvals(linear.weight @ root)[4:].square().sum()))
        left, values, right = torch.linalg.svd(linear.weight, full_matrices=False)
        plain = (left[:, :4] * values[:4]) @ right[:4]
        assert float(error) < float(((linear.weight - plain) @ rows.T).square().sum(0).mean())


def test_mask_gradients_are_those_of_single_sequences() -> None:
    dense, stats = dense_and_sample(BERT)
    model = working_copy(dense)
    groups = units_of(model)
    batched = mask_gradients(model, stats, groups)
    import tcsp_hf.baselines.sample as sample

    whole = sample.BATCH_SIZE
    try:
        sample.BATCH_SIZE = 1
        single = mask_gradients(model, stats, groups)
    finally:
        sample.BATCH_SIZE = whole
    for one, other in zip(batched, single, strict=True):
        torch.testing.assert_close(one.sort(0).values, other.sort(0).values, rtol=1e-6, atol=1e-9)
        assert float(one.abs().max()) > 0


def test_dropout_plays_no_part() -> None:
    dense, stats = make_dense(BERT), dense_and_sample(BERT)[1]
    wanted = BASELINES["fisher"].compress(dense, stats, 0.3)
    found = BASELINES["fisher"].compress(dense.train(), stats, 0.3)
    assert dense.training and not found.training
    torch.testing.assert_close(answers(BERT, found), answers(BERT, wanted), rtol=0, atol=0)


def test_search_finds_what_all_choices_hold() -> None:
    """Against every number of heads and filters, taken in the order of importance."""
    groups = units_of(make_dense(BERT))
    generator = torch.Generator().manual_seed(2)
    importance = [torch.rand(units.count, generator=generator, dtype=torch.float64) for units in groups]
    flat = {
        kind: torch.cat([v for b, v in zip(groups, importance, strict=True) if b.kind == kind]).sort().values
        for kind in ("heads", "filters")
    }
    cost = {units.kind: units.cost for units in groups}
    total = sum(units.count * units.cost for units in groups)
    for goal in (1, total // 3, total // 2, total):
        masks = search(groups, importance, goal)
        saved = sum(int((~m).sum()) * b.cost for m, b in zip(masks, groups, strict=True))
        loss = sum(float(v[~m].sum()) for m, v in zip(masks, importance, strict=True))
        assert saved >= goal
        best = min(
            float(flat["heads"][:h].sum() + flat["filters"][:f].sum())
            for h in range(len(flat["heads"]) + 1)
            for f in range(len(flat["filters"]) + 1)
            if h * cost["heads"] + f * cost["filters"] >= goal
        )
        assert loss == pytest.approx(best)


def test_rearrangement_sees_units_that_cancel() -> None:
    """The diagonal removes units 0 and 1, whose errors add up; 2 is dearer alone and cancels 1."""
    gradients = torch.tensor([[1.0, 1.1, -1.2, 9.0]], dtype=torch.float64)
    information = gradients.T @ gradients
    found = rearrange(torch.tensor([False, False, True, True]), information)
    assert found.tolist() == [True, False, False, True]
    assert rearrange(torch.ones(4, dtype=torch.bool), information).all()


def test_rearrangement_never_costs_more_and_keeps_the_number() -> None:
    generator = torch.Generator().manual_seed(4)
    better = 0
    for _ in range(20):
        gradients = torch.randn(15, 12, generator=generator, dtype=torch.float64)
        information = gradients.T @ gradients
        mask = torch.ones(12, dtype=torch.bool)
        mask[information.diagonal().argsort()[:5]] = False
        found = rearrange(mask, information)
        losses = [float(out @ information @ out) for out in ((~mask).double(), (~found).double())]
        assert int(found.sum()) == 7
        assert losses[1] <= losses[0] + 1e-9
        better += losses[1] < losses[0] - 1e-9
    assert better > 0


def test_mask_tuning_is_least_squares() -> None:
    """Against a solver that sees all tokens' contributions at once, and with a damping that is small."""
    dense, stats = dense_and_sample(BERT)
    small = working_copy(dense)
    units = units_of(small)[1]
    mask = torch.arange(units.count) % 3 != 0
    passes = _Passes(dense, stats), _Passes(small, stats)
    scale = _least_squares(passes, units, units_of(dense)[1], mask)
    assert bool((scale[~mask] == 0).all())
    inputs, handles = [], []
    handles.append(units.block.output.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])))
    from tcsp_hf.baselines.sample import sample_batches

    rows = []
    with torch.no_grad():
        for batch in sample_batches(small, stats):
            small(**batch)
            rows.append(inputs.pop()[batch["attention_mask"].bool()])
    for handle in handles:
        handle.remove()
    context = torch.cat(rows)
    weight = units.block.output.weight.detach()
    kept = mask.nonzero().squeeze(1)
    columns = torch.stack([(context[:, [j]] * weight[:, j]).reshape(-1) for j in kept], dim=1)
    wanted = (context @ weight.T).reshape(-1)

    def miss(values: torch.Tensor) -> float:
        return float((columns @ values - wanted).square().sum())

    exact = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    assert miss(exact) <= miss(scale[kept]) < miss(torch.ones(len(kept), dtype=torch.float64))
    assert miss(scale[kept]) <= 1.05 * miss(exact)


@pytest.mark.parametrize("source", ["bert-ForSequenceClassification", "bert-Model", "t5-ForConditionalGeneration"])
def test_mask_tuning_goes_on_from_the_layer_before(source: str) -> None:
    """As passes from the embeddings on do, in the model that is pruned so far."""
    dense, stats = dense_and_sample(find(source))
    small = working_copy(dense)
    groups = units_of(small)
    masks = [torch.arange(units.count) % 3 != i % 2 for i, units in enumerate(groups)]
    tuned = tuned_masks(dense, small, stats, groups, masks)
    for (units, mask, scale), reference in zip(tuned, units_of(dense), strict=True):
        expected = _least_squares((_Passes(dense, stats), _Passes(small, stats)), units, reference, mask)
        torch.testing.assert_close(scale, expected, rtol=1e-9, atol=1e-12)
        kept = mask.nonzero().squeeze(1)
        keep_units(units, kept, scale[kept])


@pytest.mark.parametrize("source", ["t5-ForConditionalGeneration", "t5-gated-ForConditionalGeneration"])
def test_pruned_t5_generates_as_it_scores(source: str) -> None:
    """With a cache, step by step, and with different heads in every layer, the result is that of whole passes."""
    case = find(source)
    small = working_copy(make_dense(case))
    for i, units in enumerate(units_of(small)):
        if units.kind == "heads":
            keep_units(units, torch.arange(i % 3, 4))
    inputs = make_inputs(case)
    encoder = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = small.generate(**encoder, max_new_tokens=5, do_sample=False, use_cache=True)
    again = small.generate(**encoder, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(found, again)


def test_bert_without_any_heads_in_a_layer() -> None:
    """Equals the dense model whose blocks write their biases only."""
    dense = make_dense(BERT)
    small = working_copy(dense)
    units, wide = units_of(small)[:2]
    keep_units(units, torch.arange(0))
    keep_units(wide, torch.arange(0))
    with torch.no_grad():
        for one in units_of(dense)[:2]:
            one.block.output.weight.zero_()
    torch.testing.assert_close(answers(BERT, small), answers(BERT, dense))


def test_which_layers_go() -> None:
    assert dropped(6, 2, "top") == {5, 4}
    assert dropped(6, 2, "alternate") == {5, 3}
    assert dropped(6, 4, "alternate") == {5, 3, 1, 4}
    assert 0 not in dropped(6, 6, "alternate")


@pytest.mark.parametrize("name", ["top-layers", "alternate-layers"])
def test_layers_that_do_nothing_go_for_free(name: str) -> None:
    """A pre-norm layer that writes nothing is the identity."""
    case = find("t5-ForConditionalGeneration")
    dense = make_dense(case, num_layers=3, num_decoder_layers=3)
    strategy = name.removesuffix("-layers")
    with torch.no_grad():
        for stack in (dense.encoder, dense.decoder):
            for i in dropped(3, 1, strategy):
                for layer in stack.block[i].layer[:-1]:
                    getattr(
                        layer, "SelfAttention" if hasattr(layer, "SelfAttention") else "EncDecAttention"
                    ).o.weight.zero_()
                stack.block[i].layer[-1].DenseReluDense.wo.weight.zero_()
    small = BASELINES[name].compress(dense, calibrated(case, dense, sample_tokens=65_536), 0.1)
    assert (len(small.encoder.block), len(small.decoder.block)) == (2, 2)
    assert (small.config.num_layers, small.config.num_decoder_layers) == (2, 2)
    torch.testing.assert_close(answers(case, small), answers(case, dense))
    labels = make_labels(case, make_inputs(case))
    assert torch.isfinite(small(**make_inputs(case), **labels).loss)
    found = small.generate(make_inputs(case)["input_ids"], max_new_tokens=4, do_sample=False)
    assert found.shape[0] == 3


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("removed", [-0.1, 1.0, float("nan"), "half", True])
def test_a_fraction_that_is_none(name: str, removed: object) -> None:
    dense, stats = dense_and_sample(BERT)
    with pytest.raises(TCSPError, match="removed is"):
        BASELINES[name].compress(dense, stats, removed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["svd", "fisher", "magnitude", "top-layers", "alternate-layers"])
def test_a_budget_out_of_reach_names_what_is_possible(name: str) -> None:
    dense, stats = dense_and_sample(BERT)
    with pytest.raises(TCSPError, match=r"cannot remove 99\.9%: at most \d+\.\d% of this model"):
        BASELINES[name].compress(dense, stats, 0.999)


@pytest.mark.parametrize("name", ["svd", "fisher"])
def test_statistics_without_a_sample_are_refused(name: str) -> None:
    dense = make_dense(BERT)
    stats = calibrate(dense, [{"input_ids": [3, 7, 9, 4]}] * 4, progress=False, sample_tokens=0)
    with pytest.raises(TCSPError, match="sample_tokens"):
        BASELINES[name].compress(dense, stats, 0.3)


def test_low_rank_factors_of_inputs_that_hardly_differ() -> None:
    """A decoder that writes one of two labels reads a few embeddings: float32 sums of them are indefinite."""
    dense = make_dense(find("t5-ForConditionalGeneration"), torch.float32, d_model=128)
    with torch.no_grad():
        dense.shared.weight += 3.0 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": [5 + i % 50, 7, 9, 1], "decoder_input_ids": [0, 5 + i % 2]} for i in range(400)]
    stats = calibrate(dense, rows, progress=False)
    small = BASELINES["svd"].compress(dense, stats, 0.3)
    assert all(torch.isfinite(value).all() for value in small.state_dict().values())
