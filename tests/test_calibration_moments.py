"""The moments that calibration collects, against brute force."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from common import (
    ONE_SOURCE_CASES,
    PAD,
    Case,
    D,
    calibrated,
    dense_and_statistics,
    find,
    make_dense,
    make_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from statistics_of import relative

from tcsp_hf import calibrate
from tcsp_hf.architectures import sites_of
from tcsp_hf.calibration.fingerprint import sequence_hash
from tcsp_hf.calibration.objectives import Draws, sample_categorical

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
BERT = find("bert-ForSequenceClassification")


BERT_SITES = [
    "embeddings",
    "layer.0.attention",
    "layer.0.output",
    "layer.1.attention",
    "layer.1.output",
]
T5_SITES = [
    *(f"encoder.{i}.{part}" for i in range(2) for part in ("attention", "ffn")),
    "encoder.final",
    *(f"decoder.{i}.{part}" for i in range(2) for part in ("attention", "cross", "ffn")),
    "decoder.final",
]


def norms_by_name(case: Case, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The norm of every site, found by its place in transformers' models."""
    modules = dict(model.named_modules())
    if case.family == "bert":
        top = "bert." if hasattr(model, "bert") else ""
        places = {"embeddings": f"{top}embeddings.LayerNorm"}
        for i in range(2):
            places[f"layer.{i}.attention"] = f"{top}encoder.layer.{i}.attention.output.LayerNorm"
            places[f"layer.{i}.output"] = f"{top}encoder.layer.{i}.output.LayerNorm"
        if hasattr(getattr(model, "cls", None), "predictions"):
            places["mlm_head"] = "cls.predictions.transform.LayerNorm"
        return {name: modules[place] for name, place in places.items()}
    top = "transformer." if hasattr(model, "transformer") else ""
    places = {}
    for stack, parts in (("encoder", ("attention", "ffn")), ("decoder", ("attention", "cross", "ffn"))):
        if f"{top}{stack}" not in modules:
            continue
        for i in range(2):
            for j, part in enumerate(parts):
                places[f"{stack}.{i}.{part}"] = f"{top}{stack}.block.{i}.layer.{j}.layer_norm"
        places[f"{stack}.final"] = f"{top}{stack}.final_layer_norm"
    return {name: modules[place] for name, place in places.items()}


def normalised(case: Case, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm by its definition, without weight and bias."""
    if case.family == "bert":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


def one_by_one(case: Case, model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of the case as batches of one, with what the decoder is to read."""
    for row in make_rows(case):
        ids = row["input_ids"]
        nested = isinstance(ids, torch.Tensor)
        for sequence in ids if nested else [torch.tensor(ids)]:
            batch = {"input_ids": sequence[None]}
            if "token_type_ids" in row:
                batch["token_type_ids"] = torch.tensor(row["token_type_ids"])[None]
            if "labels" in row:
                batch["decoder_input_ids"] = torch.tensor([[PAD, *row["labels"][:-1]]])
            elif "decoder_input_ids" in row:
                batch["decoder_input_ids"] = torch.tensor(row["decoder_input_ids"])[None]
            elif model.config.is_encoder_decoder:
                batch["decoder_input_ids"] = torch.tensor([[PAD, *ids[:-1]]])
            yield batch


@per_case
def test_second_moments_by_brute_force(case: Case, float64_norms):
    model, _ = dense_and_statistics(case)
    stats = calibrated(case, model, fisher=False)
    norms = norms_by_name(case, model)
    sums = {name: torch.zeros(D, D, dtype=torch.float64) for name in norms}
    tokens = dict.fromkeys(norms, 0)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        norm.register_forward_pre_hook(lambda _module, args, name=name: seen.update({name: args[0]}))
        for name, norm in norms.items()
    ]
    with torch.no_grad():
        for batch in one_by_one(case, model):
            model(**batch)
            for name, norm in norms.items():
                rows = normalised(case, norm, seen[name]).reshape(-1, D)
                sums[name] += rows.T @ rows
                tokens[name] += rows.shape[0]
    for handle in handles:
        handle.remove()
    assert list(stats.sites) == list(norms)
    for name, site in stats.sites.items():
        assert site.tokens == tokens[name]
        assert relative(site.moment_sum, sums[name]) <= 1e-10, name
        assert torch.equal(site.moment_sum, site.moment_sum.T)
        assert site.fisher_sum is None


def test_site_names():
    for case, expected in (
        (find("bert-Model"), BERT_SITES),
        (find("bert-ForMaskedLM"), [*BERT_SITES, "mlm_head"]),
        (find("t5-Model"), T5_SITES),
        (find("t5-EncoderModel"), T5_SITES[:5]),
    ):
        assert [site.name for site in sites_of(make_dense(case))] == expected


def uniform(key: int, count: int, call: int = 0) -> torch.Tensor:
    """What the `call`-th draw of the sequence with this hash must be."""
    generator = np.random.Generator(np.random.Philox(key=key, counter=call << 192))
    return torch.from_numpy(generator.random(count))


def normal(key: int, count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(count))


def chosen(logits: torch.Tensor, point: torch.Tensor) -> int:
    """The class whose part of the unit interval holds the point."""
    edges = logits.detach().softmax(-1).cumsum(-1)
    return min(int((edges <= point).sum()), logits.shape[-1] - 1)


def log_likelihood(case: Case, model: torch.nn.Module, found, key: int) -> torch.Tensor:
    """Of an output that is drawn from the model's own distribution, for one sequence."""
    if case.head in ("Model", "EncoderModel"):
        pooled = found.last_hidden_state[0].mean(0)
        probe = normal(key, D)
        return (pooled / pooled.norm()) @ (probe / probe.norm())
    if case.head == "ForQuestionAnswering":
        points = uniform(key, 2)
        pair = (found.start_logits[0], found.end_logits[0])
        return sum(logits.log_softmax(-1)[chosen(logits, point)] for logits, point in zip(pair, points, strict=True))
    if case.head in ("ForSequenceClassification", "ForNextSentencePrediction"):
        logits = found.logits[0]
        if model.config.problem_type == "multi_label_classification":
            labels = (uniform(key, 3) < logits.detach().sigmoid()).double()
            return (labels * logits - torch.nn.functional.softplus(logits)).sum()
        if model.config.problem_type == "regression":
            return (normal(key, logits.shape[-1]) * logits).sum()
        return logits.log_softmax(-1)[chosen(logits, uniform(key, 1)[0])]
    total = torch.zeros((), dtype=torch.float64)
    call = 0
    if case.head == "ForPreTraining":
        logits = found.seq_relationship_logits[0]
        total = total + logits.log_softmax(-1)[chosen(logits, uniform(key, 1)[0])]
        call = 1
    logits = found.prediction_logits[0] if case.head == "ForPreTraining" else found.logits[0]
    for row, point in zip(logits, uniform(key, logits.shape[0], call), strict=True):
        total = total + row.log_softmax(-1)[chosen(row, point)]
    return total


FISHER_CASES = [(case, {}) for case in ONE_SOURCE_CASES if case.head != "ForMultipleChoice"] + [
    (BERT, {"problem_type": "multi_label_classification"}),
    (BERT, {"problem_type": "regression"}),
    (BERT, {"problem_type": "regression", "num_labels": 1}),
]


@pytest.mark.parametrize(
    ("case", "fields"),
    FISHER_CASES,
    ids=lambda value: str(value) if isinstance(value, Case) else "-".join(map(str, value)),
)
def test_fisher_by_brute_force(case: Case, fields, float64_norms):
    """The gradient with respect to every site's normalised stream, by adding a perturbation to it and deriving."""
    model = make_dense(case, **fields)
    stats = calibrated(case, model, seed=5)
    norms = norms_by_name(case, model)
    sums = {name: torch.zeros(D, D, dtype=torch.float64) for name in norms}
    perturbations: dict[str, torch.Tensor] = {}

    def replace(module, args, _output, name):
        stream = normalised(case, module, args[0])
        perturbations[name] = torch.zeros_like(stream, requires_grad=True)
        affine = (stream + perturbations[name]) * module.weight
        return affine + module.bias if case.family == "bert" else affine

    handles = [
        norm.register_forward_hook(lambda m, a, o, name=name: replace(m, a, o, name)) for name, norm in norms.items()
    ]
    for batch in one_by_one(case, model):
        found = model(**batch)
        key = sequence_hash(batch["input_ids"][0].tolist(), 5)
        log_likelihood(case, model, found, key).backward()
        for name, perturbation in perturbations.items():
            if perturbation.grad is not None:
                rows = perturbation.grad.reshape(-1, D)
                sums[name] += rows.T @ rows
    for handle in handles:
        handle.remove()
    for name, site in stats.sites.items():
        assert relative(site.fisher_sum, sums[name]) <= 1e-8 if sums[name].any() else not site.fisher_sum.any(), name
    assert sum(bool(total.any()) for total in sums.values()) >= 5


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_a_draw_has_the_distribution_of_the_logits(logits):
    """Points that are spread evenly fall into the classes in proportion to their probabilities."""
    values = torch.tensor(logits, dtype=torch.float64)
    points = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = sample_categorical(values.expand(4000, -1), points)
    frequency = torch.bincount(drawn, minlength=len(logits)) / 4000
    assert torch.allclose(frequency.double(), values.softmax(-1), atol=1 / 4000 * 1.01)


def test_draws_belong_to_their_sequence():
    one, both = Draws([7]), Draws([3, 7])
    for draw in ("uniform", "normal"):
        first = getattr(one, draw)(3)
        second = getattr(both, draw)(11)  # padded to 11
        assert torch.equal(first[0], second[1, :3])
        assert not torch.equal(second[0], second[1])
    assert not torch.equal(Draws([7]).uniform(3), Draws([8]).uniform(3))
    assert 0.45 < float(Draws(list(range(50))).uniform(100).mean()) < 0.55


def test_mean_over_draws_is_the_fisher_information():
    """Many seeds on one sequence come near the sum over the classes, weighted with their probabilities."""
    model = make_dense(BERT)
    row = [make_rows(BERT)[0]]
    drawn = [calibrate(model, row, seed=seed, progress=False).sites["layer.1.output"].fisher_sum for seed in range(100)]
    stream = model.bert.encoder.layer[1].output.LayerNorm
    seen = {}
    handle = stream.register_forward_hook(lambda _m, _a, output: seen.update(h=output))
    batch = {name: torch.tensor([values]) for name, values in row[0].items()}
    logits = model(**batch).logits[0]
    handle.remove()
    exact = torch.zeros(D, D, dtype=torch.float64)
    for i, p in enumerate(logits.softmax(-1).tolist()):
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[i], seen["h"], retain_graph=True)
        rows = (gradient * stream.weight).detach().reshape(-1, D)
        exact += p * rows.T @ rows
    assert float((torch.stack(drawn).mean(0) - exact).norm() / exact.norm()) < 0.25
    assert len({round(float(total.trace()), 9) for total in drawn}) > 1, "different seeds draw different labels"


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_poolings(pooling):
    case = find("bert-Model")
    model, _ = dense_and_statistics(case)
    stats = calibrated(case, model, pooling=pooling)
    assert stats.objective == f"embedding-{pooling}"
    last = stats.sites["layer.1.output"].fisher_sum
    rank = int(torch.linalg.matrix_rank(last, hermitian=True, rtol=1e-10))
    assert last.any() and rank >= D - 2
