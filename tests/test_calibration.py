"""Calibration: the right moments, whatever the batches, shards and containers; and what it refuses."""

import copy
import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from common import (
    EOS,
    ONE_SOURCE_CASES,
    PAD,
    VOCABULARY,
    Case,
    D,
    calibrated,
    dense_and_statistics,
    find,
    make_dense,
    make_rows,
)
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tcsp_hf import Calibration, TCSPError, calibrate, compress
from tcsp_hf.architectures import sites_of
from tcsp_hf.calibration.fingerprint import model_fingerprint, sequence_hash
from tcsp_hf.calibration.objectives import Draws, sample_categorical
from tcsp_hf.calibration.sample import TokenSample

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def assert_equal_statistics(one: Calibration, other: Calibration, tolerance: float = 1e-8) -> None:
    assert list(one.sites) == list(other.sites)
    assert one.summary() == other.summary()
    assert one.sample.sequences() == other.sample.sequences()
    for name, site in one.sites.items():
        found, expected = vars(site), vars(other.sites[name])
        assert found["tokens"] == expected["tokens"]
        assert one.sites[name].coherence == pytest.approx(other.sites[name].coherence, abs=tolerance)
        for kind in found.keys() - {"tokens", "common_sum"}:
            assert (found[kind] is None) == (expected[kind] is None), (name, kind)
            if found[kind] is not None and expected[kind].any():
                assert relative(found[kind], expected[kind]) <= tolerance, (name, kind)


# The moments themselves ---------------------------------------------------------------------------------------------

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


# Batches, shards, containers ------------------------------------------------------------------------------------------


@per_case
def test_shards_and_batch_sizes(case: Case, float64_norms):
    model, _ = dense_and_statistics(case)
    rows = make_rows(case)
    whole = calibrate(model, rows, batch_size=16, progress=False)
    parts = [calibrate(model, rows[i::3], batch_size=size, progress=False) for i, size in enumerate((1, 7, 32))]
    assert_equal_statistics(Calibration.merge(parts), whole)
    assert_equal_statistics(Calibration.merge([Calibration.merge(parts[:2]), parts[2]]), whole)


@per_case
def test_order_and_padding(case: Case, float64_norms):
    model, _ = dense_and_statistics(case)
    rows = make_rows(case)
    whole = calibrate(model, rows, batch_size=16, progress=False)
    if case.head == "ForMultipleChoice":
        longer = [
            {
                "input_ids": torch.nn.functional.pad(row["input_ids"], (0, 5), value=PAD),
                "attention_mask": torch.nn.functional.pad(torch.ones_like(row["input_ids"]), (0, 5)),
            }
            for row in reversed(rows)
        ]
    else:
        longer = padded_batches(rows, 13)
    assert_equal_statistics(calibrate(model, longer, progress=False), whole)


def padded_batches(rows: list[dict], extra: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 10 in a random order, padded by `extra` tokens too many."""
    shuffled = random.Random(0).sample(rows, len(rows))
    batches = []
    for start in range(0, len(rows), 10):
        chunk = shuffled[start : start + 10]
        batch = {}
        for name in chunk[0]:
            length = max(len(row[name]) for row in chunk) + extra
            value = -100 if name == "labels" else PAD
            batch[name] = torch.tensor([row[name] + [value] * (length - len(row[name])) for row in chunk])
            if name in ("input_ids", "decoder_input_ids"):
                mask = [[1] * len(row[name]) + [0] * (length - len(row[name])) for row in chunk]
                batch["attention_mask" if name == "input_ids" else "decoder_attention_mask"] = torch.tensor(mask)
        batches.append(batch)
    return batches


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_masking_does_not_depend_on_batches(head, tokenizer):
    """With a mask token, 15 % of the tokens are hidden: the same ones in any batch."""
    case = Case("bert", head)
    model, _ = dense_and_statistics(case)
    texts = [" ".join(f"w{(7 * i + j) % 100}" for j in range(3 + i % 9)) for i in range(40)]
    one = calibrate(model, texts, tokenizer=tokenizer, batch_size=1, progress=False)
    many = calibrate(model, texts[::-1], tokenizer=tokenizer, batch_size=40, progress=False)
    assert_equal_statistics(many, one)
    tokens = [token for row in one.sample.sequences() for token in row["input_ids"]]
    assert 0.08 < tokens.count(tokenizer.mask_token_id) / len(tokens) < 0.25
    plain = calibrate(model, [tokenizer(text) for text in texts], progress=False)
    assert plain.tokens == one.tokens and plain.data_fingerprint == one.data_fingerprint
    assert relative(plain.sites["embeddings"].moment_sum, one.sites["embeddings"].moment_sum) > 1e-3


def test_targets_are_the_models_own_where_none_are_given(float64_norms):
    """A sequence-to-sequence model writes its own, up to the end token or the greatest length."""
    model, _ = dense_and_statistics(T5)
    rows = [{"input_ids": row["input_ids"]} for row in make_rows(T5, 12)]
    stats = calibrate(model, rows, batch_size=5, max_target_length=6, progress=False)
    targets = 0
    for row in rows:
        written = model.generate(torch.tensor([row["input_ids"]]), max_new_tokens=6, do_sample=False)[0, 1:].tolist()
        targets += written.index(EOS) + 1 if EOS in written else 6
    assert stats.sites["decoder.final"].tokens == targets
    assert stats.sites["encoder.final"].tokens == sum(len(row["input_ids"]) for row in rows)
    assert_equal_statistics(calibrate(model, rows, batch_size=12, max_target_length=6, progress=False), stats)


WORDS = [" ".join(f"w{(5 * i + j) % 100}" for j in range(2 + i % 7)) for i in range(30)]


def containers(tokenizer) -> dict[str, object]:
    """The same 30 texts in everything that `calibrate` takes."""
    encoded = [dict(tokenizer(text)) for text in WORDS]
    tokens = Dataset.from_list(encoded)
    return {
        "list": WORDS,
        "tuple": tuple(WORDS),
        "generator": (text for text in WORDS),
        "dataset": Dataset.from_dict({"idx": list(range(30)), "sentence": WORDS, "label": [0] * 30}),
        "iterable dataset": Dataset.from_dict({"text": WORDS}).to_iterable_dataset(num_shards=3),
        "dataset of tokens": tokens,
        "dataset of tensors": tokens.with_format("torch"),
        "rows of tokens": encoded,
        "DataLoader": DataLoader(
            encoded, batch_size=4, collate_fn=lambda rows: dict(tokenizer.pad(rows, return_tensors="pt"))
        ),
        "batches": [tokenizer(WORDS[i : i + 10], padding=True, return_tensors="pt") for i in range(0, 30, 10)],
    }


def test_containers_agree(tokenizer, subtests):
    model, _ = dense_and_statistics(BERT)
    data = containers(tokenizer)
    expected = calibrate(model, data["list"], tokenizer=tokenizer, progress=False)
    assert expected.sequences == 30
    assert expected.tokens == sum(2 + len(text.split()) for text in WORDS)
    for name in data:
        with subtests.test(name):
            assert_equal_statistics(calibrate(model, data[name], tokenizer=tokenizer, progress=False), expected)


def test_pairs_of_texts_and_their_columns(tokenizer):
    model, _ = dense_and_statistics(BERT)
    seconds = [f"{text} w1" for text in WORDS[::-1]]
    pairs = list(zip(WORDS, seconds, strict=True))
    expected = calibrate(model, pairs, tokenizer=tokenizer, progress=False)
    assert expected.tokens == sum(3 + len(a.split()) + len(b.split()) for a, b in pairs)
    for names in (("sentence1", "sentence2"), ("question", "context"), ("premise", "hypothesis")):
        data = Dataset.from_dict({names[0]: WORDS, names[1]: seconds, "label": ["unread"] * 30})
        assert_equal_statistics(calibrate(model, data, tokenizer=tokenizer, progress=False), expected)
    data = Dataset.from_dict({"b": seconds, "a": WORDS, "text": ["w9"] * 30})
    found = calibrate(model, data, tokenizer=tokenizer, text_columns=("a", "b"), progress=False)
    assert_equal_statistics(found, expected)
    alone = calibrate(model, data, tokenizer=tokenizer, text_columns="a", progress=False)
    assert_equal_statistics(alone, calibrate(model, WORDS, tokenizer=tokenizer, progress=False))


def test_the_second_text_is_the_target_of_a_language_model(tokenizer):
    model, _ = dense_and_statistics(T5)
    pairs = list(zip(WORDS, WORDS[::-1], strict=True))
    stats = calibrate(model, pairs, tokenizer=tokenizer, progress=False, fisher=False)
    assert stats.sites["encoder.final"].tokens == sum(2 + len(text.split()) for text in WORDS)
    assert stats.sites["decoder.final"].tokens == sum(2 + len(text.split()) for text in WORDS)
    cut = calibrate(model, pairs, tokenizer=tokenizer, progress=False, fisher=False, max_target_length=4)
    assert cut.sites["decoder.final"].tokens == 30 * 4


def test_limits(tokenizer):
    model, _ = dense_and_statistics(BERT)
    stats = calibrate(model, WORDS, tokenizer=tokenizer, max_sequences=7, max_length=4, progress=False)
    assert stats.sequences == 7
    assert stats.tokens == sum(min(4, 2 + len(text.split())) for text in WORDS[:7])
    loader = containers(tokenizer)["DataLoader"]
    assert calibrate(model, loader, max_sequences=7, progress=False).sequences == 7
    long = [" ".join(["w1"] * 100)]
    assert calibrate(model, long, tokenizer=tokenizer, progress=False).tokens == model.config.max_position_embeddings


def test_class_labels_are_not_read(tokenizer):
    model, _ = dense_and_statistics(BERT)
    plain = Dataset.from_dict({"sentence": WORDS, "label": [0] * 30})
    wrong = Dataset.from_dict({"sentence": WORDS, "label": [99] * 30})
    one, other = (calibrate(model, data, tokenizer=tokenizer, progress=False) for data in (plain, wrong))
    assert_equal_statistics(one, other, tolerance=0.0)


def test_a_progress_bar_on_request(tokenizer, capsys):
    model, _ = dense_and_statistics(BERT)
    calibrate(model, WORDS, tokenizer=tokenizer, progress=True)
    assert "30/30" in capsys.readouterr().err
    calibrate(model, WORDS, tokenizer=tokenizer)
    calibrate(model, WORDS, tokenizer=tokenizer, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_near_float32(dtype):
    model, expected = dense_and_statistics(BERT, torch.float32)
    stats = calibrated(BERT, copy.deepcopy(model).to(dtype))
    for name, site in stats.sites.items():
        assert relative(site.moment_sum, expected.sites[name].moment_sum) < 0.1
        assert site.moment_sum.dtype == torch.float64
        trace = float(expected.sites[name].fisher_sum.trace())
        assert 0.5 < float(site.fisher_sum.trace()) / trace < 2.0


@pytest.mark.parametrize("source", ["bert-ForMaskedLM", "t5-ForConditionalGeneration"])
def test_some_sites_and_joined(source):
    """What sites hold does not depend on which others are collected; joined runs are the whole."""
    model = make_dense(find(source))
    rows = [
        {"input_ids": [5 + (7 * i + j) % 100 for j in range(4 + i)], "decoder_input_ids": [0, *range(5, 9 + i)]}
        for i in range(4)
    ]
    whole = calibrate(model, rows, progress=False)
    names = list(whole.sites)
    parts = [calibrate(model, rows, sites=names[i::3], progress=False) for i in (2, 0, 1)]
    assert [list(part.sites) for part in parts] == [names[2::3], names[0::3], names[1::3]]
    joined = Calibration.join(parts)
    assert list(joined.sites) == names and joined.summary() == whole.summary()
    for name, site in whole.sites.items():
        again = joined.sites[name]
        assert torch.equal(site.moment_sum, again.moment_sum) and torch.equal(site.fisher_sum, again.fisher_sum)
        assert (site.query_fisher_sum is None) == (again.query_fisher_sum is None)
        if site.query_fisher_sum is not None:
            assert torch.equal(site.query_fisher_sum, again.query_fisher_sum)
    with pytest.raises(TCSPError, match="join the runs"):
        compress(model, parts[0], hidden_size=16)
    compress(model, joined, hidden_size=16, refit=False)
    few = calibrate(model, rows, sites=["*.0.*"], progress=False)
    assert few.sites and all(".0." in name for name in few.sites)
    for broken, named in (([parts[0], parts[0]], "in two"), ([], "no statistics")):
        with pytest.raises(TCSPError, match=named):
            Calibration.join(broken)
    with pytest.raises(TCSPError, match="different data_fingerprint"):
        Calibration.join([parts[0], calibrate(model, rows[:1], sites=names[:1], progress=False)])
    with pytest.raises(TCSPError, match="fits none of"):
        calibrate(model, rows, sites=["layer.9.*"])


def test_without_gradients():
    model, _ = dense_and_statistics(BERT)
    stats = calibrated(BERT, model, fisher=False)
    assert stats.objective == "none"
    with pytest.raises(TCSPError, match="fisher=True"):
        _ = stats.sites["embeddings"].fisher
    with pytest.raises(TCSPError, match="fisher=True"):
        compress(model, stats, hidden_size=16)
    assert compress(model, stats, hidden_size=16, subspace="pca").config.hidden_size == 16


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(case: Case, fails):
    model = make_dense(case, torch.float32).train()
    model.base_model.get_input_embeddings().weight.requires_grad_(False)
    inner = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    inner.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def flags() -> tuple:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            [parameter.grad for parameter in model.parameters()],
            torch.is_grad_enabled(),
        )

    expected = flags()
    generator = torch.get_rng_state()
    if fails:
        rows = [*make_rows(case, 20), {"input_ids": [VOCABULARY]}]
        with pytest.raises(TCSPError):
            calibrate(model, rows, batch_size=1, progress=False)
    else:
        calibrated(case, model)
    assert flags() == expected
    assert torch.equal(torch.get_rng_state(), generator)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "site"),
    [
        ("bert.embeddings.word_embeddings.weight", "embeddings"),
        ("bert.encoder.layer.0.attention.self.value.bias", "layer.0.attention"),
        ("bert.encoder.layer.1.output.dense.weight", "layer.1.output"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_the_site(place, site, value):
    model = make_dense(BERT, torch.float32)
    with torch.no_grad():
        model.get_parameter(place).fill_(value)
    with pytest.raises(TCSPError, match=rf"site '{site}' hold a NaN or an infinity"):
        calibrated(BERT, model)


@pytest.mark.parametrize(
    ("place", "site"),
    [
        ("encoder.block.1.layer.0.SelfAttention.o.weight", r"encoder\.1\.ffn"),
        ("decoder.block.0.layer.1.EncDecAttention.o.weight", r"decoder\.0\.ffn"),
    ],
)
def test_nan_names_the_site_of_a_t5(place, site):
    model = make_dense(T5, torch.float32)
    with torch.no_grad():
        model.get_parameter(place).fill_(float("nan"))
    with pytest.raises(TCSPError, match=f"site '{site}'"):
        calibrated(T5, model)


def test_nan_in_the_gradients_names_the_site():
    model = make_dense(BERT, torch.float32)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(TCSPError, match=r"hidden states or gradients at site 'layer\.1\.output'"):
        calibrated(BERT, model)


@pytest.mark.parametrize(
    "data",
    [[], (text for text in ()), Dataset.from_dict({"text": []}), DataLoader([])],
    ids=["list", "generator", "dataset", "DataLoader"],
)
def test_empty_data(data, tokenizer):
    model, _ = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match="calibration data is empty"):
        calibrate(model, data, tokenizer=tokenizer, progress=False)


def test_a_decoder_deeper_than_its_encoder_writes_its_own_targets():
    dense = make_dense(T5, num_layers=1, num_decoder_layers=2)
    stats = calibrate(dense, [{"input_ids": [5, 6, 1]}], progress=False, max_target_length=3)
    assert stats.sites["decoder.1.ffn"].tokens > 0


def test_nothing_but_padding():
    model, _ = dense_and_statistics(BERT)
    batch = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    with pytest.raises(TCSPError, match="only padding"):
        calibrate(model, [batch], progress=False)


@pytest.mark.parametrize("token", [VOCABULARY, -1, 10**6])
def test_tokens_outside_the_vocabulary(token):
    model, _ = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=f"input_ids holds the token {token}, .* {VOCABULARY} entries"):
        calibrate(model, [{"input_ids": [5, token, 7]}], progress=False)
    with pytest.raises(TCSPError, match=f"the token {token}"):
        calibrate(model, [{"input_ids": torch.tensor([[5, token]])}], progress=False)


def test_labels_outside_the_vocabulary():
    model, _ = dense_and_statistics(T5)
    with pytest.raises(TCSPError, match=f"labels holds the token {VOCABULARY}"):
        calibrate(model, [{"input_ids": [5, 6], "labels": [7, VOCABULARY]}], progress=False)


def test_texts_without_a_tokenizer():
    model, _ = dense_and_statistics(BERT)
    for data in (WORDS, Dataset.from_dict({"text": WORDS})):
        with pytest.raises(TCSPError, match="a tokenizer is needed: pass tokenizer="):
            calibrate(model, data, progress=False)


def test_columns_that_are_not_there(tokenizer):
    model, _ = dense_and_statistics(BERT)
    data = Dataset.from_dict({"body": WORDS, "title": WORDS})
    with pytest.raises(TCSPError, match=r"No text column found among \['body', 'title'\].*text_columns"):
        calibrate(model, data, tokenizer=tokenizer, progress=False)
    with pytest.raises(TCSPError, match=r"text_columns names \['text'\].*\['body', 'title'\]"):
        calibrate(model, data, tokenizer=tokenizer, text_columns="text", progress=False)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("one text", "data is a str; it must be a list"),
        (b"bytes", "data is a bytes"),
        (17, "data is a int"),
        (None, "data is a NoneType"),
        ([1, 2], "data holds 1; every item must be a string"),
        (["a", 3], "data holds 3"),
        ([("a", "b", "c")], "pair of strings"),
        ([{"text": 5}], "every item must be a string"),
        (DataLoader([torch.zeros(3)]), "must yield dictionaries"),
        ([{"input_ids": torch.zeros(2, 3)}], "input_ids has dtype torch.float32"),
        ([{"input_ids": [5] * 41}], "sequences of 41 tokens, more than the 40"),
    ],
)
def test_data_of_the_wrong_kind(data, named, tokenizer):
    model, _ = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=named):
        calibrate(model, data, tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("name", ["batch_size", "max_length", "max_sequences"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "8"])
def test_counts_must_be_positive_integers(name, value, tokenizer):
    model, _ = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=f"{name} is {value!r}; it must be a positive integer"):
        calibrate(model, WORDS, tokenizer=tokenizer, **{name: value})


def test_poolings_that_do_not_fit():
    with pytest.raises(TCSPError, match="pooling is 'max'; allowed: mean, cls, pooler"):
        calibrated(BERT, dense_and_statistics(BERT)[0], pooling="max")
    encoder = find("t5-EncoderModel")
    with pytest.raises(TCSPError, match="has no pooler"):
        calibrated(encoder, dense_and_statistics(encoder)[0], pooling="pooler")


# Merging, saving, loading ---------------------------------------------------------------------------------------------


def test_statistics_that_cannot_be_merged():
    model, stats = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match="no statistics"):
        Calibration.merge([])
    other = make_dense(BERT, seed=1)
    with pytest.raises(TCSPError, match="different model_fingerprint cannot be merged"):
        Calibration.merge([stats, calibrated(BERT, other)])
    with pytest.raises(TCSPError, match="different seed cannot be merged: 0 and 9"):
        Calibration.merge([stats, calibrated(BERT, model, seed=9)])
    with pytest.raises(TCSPError, match="different objective cannot be merged"):
        Calibration.merge([stats, calibrated(BERT, model, fisher=False)])
    mixed = copy.deepcopy(stats)
    mixed.sites["embeddings"].fisher_sum = None
    with pytest.raises(TCSPError, match="with and without gradients"):
        Calibration.merge([stats, mixed])
    fewer = copy.deepcopy(stats)
    del fewer.sites["embeddings"]
    with pytest.raises(TCSPError, match="different sites"):
        Calibration.merge([stats, fewer])


@pytest.mark.parametrize("fisher", [True, False])
@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_save_and_load_are_exact(case: Case, fisher, tmp_path):
    model, _ = dense_and_statistics(case)
    stats = calibrated(case, model, fisher=fisher)
    stats.save(tmp_path / "stats")
    assert sorted(path.name for path in (tmp_path / "stats").iterdir()) == [
        "calibration.json",
        "calibration.safetensors",
    ]
    loaded = Calibration.load(tmp_path / "stats")
    for name in ("model_fingerprint", "source_model", "model_type", "hidden_size", "objective", "seed", "sequences"):
        assert getattr(loaded, name) == getattr(stats, name)
    assert_equal_statistics(loaded, stats, tolerance=0.0)
    for name, site in stats.sites.items():
        assert torch.equal(site.moment_sum, loaded.sites[name].moment_sum)
        assert not fisher or torch.equal(site.fisher_sum, loaded.sites[name].fisher_sum)
    subspace = "balanced" if fisher else "pca"
    one, other = (compress(model, s, hidden_size=16, subspace=subspace).state_dict() for s in (stats, loaded))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "stats"
    dense_and_statistics(BERT)[1].save(folder)
    return folder


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_statistics(saved, kept):
    path = saved / "calibration.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(TCSPError, match="truncated or altered"):
        Calibration.load(saved)


def test_one_altered_byte(saved):
    path = saved / "calibration.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(TCSPError, match="truncated or altered"):
        Calibration.load(saved)


@pytest.mark.parametrize("name", ["calibration.json", "calibration.safetensors"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(TCSPError, match=f"{name} is missing"):
        Calibration.load(saved)
    with pytest.raises(TCSPError, match="holds no statistics"):
        Calibration.load(saved / "nowhere")


def test_statistics_of_a_newer_version(saved):
    path = saved / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(TCSPError, match="format_version 2; this version of tcsp_hf reads up to 1: install a newer"):
        Calibration.load(saved)


@pytest.mark.parametrize(
    ("altered", "named"),
    [
        ({"hidden_size": 31}, "must hold 496 float64 values"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be of type int"),
        ({"seed": None}, "seed is None"),
        ({"sequences": True}, "sequences is True"),
        ({"sequences": 0}, "describes no data"),
        ({"tokens": {}}, "describes no data"),
        ({"tokens": {"embeddings": 0}}, r"tokens\['embeddings'\] is 0"),
        ({"tokens": {"elsewhere": 5}}, r"elsewhere\.moment_sum must hold"),
        ({"data_fingerprint": "xyz"}, "data_fingerprint"),
        ({"sha256": "0" * 64}, "truncated or altered"),
        ({"format_version": "1"}, "format_version"),
    ],
    ids=str,
)
def test_an_altered_summary(saved, altered, named):
    path = saved / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | altered))
    with pytest.raises(TCSPError, match=named):
        Calibration.load(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "[" * 100_000, "\x00"])
def test_a_broken_summary(saved, content):
    (saved / "calibration.json").write_text(content)
    with pytest.raises(TCSPError):
        Calibration.load(saved)


def test_output_folder_that_is_not_empty(saved):
    stats = dense_and_statistics(BERT)[1]
    (saved / "notes.txt").write_text("keep me")
    with pytest.raises(TCSPError, match="is not empty: name another one, or pass overwrite=True"):
        stats.save(saved)
    assert (saved / "notes.txt").read_text() == "keep me"
    stats.save(saved, overwrite=True)
    assert not (saved / "notes.txt").exists()
    assert_equal_statistics(Calibration.load(saved), stats, tolerance=0.0)


def test_statistics_of_another_model():
    model, stats = dense_and_statistics(BERT)
    for other in (make_dense(BERT, seed=1), make_dense(find("bert-Model"))):
        with pytest.raises(TCSPError, match="belong to another model"):
            compress(other, stats, hidden_size=16)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.bert.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
    with pytest.raises(TCSPError, match="belong to another model"):
        compress(trained, stats, hidden_size=16)


def test_fingerprint_of_a_model():
    model = make_dense(BERT, torch.float32)
    assert model_fingerprint(model) == model_fingerprint(make_dense(BERT, torch.float32))
    assert model_fingerprint(model) != model_fingerprint(make_dense(BERT, torch.float32, seed=1))
    half = copy.deepcopy(model).to(torch.float16)
    assert model_fingerprint(half) == model_fingerprint(copy.deepcopy(half).float())


def test_fingerprint_of_the_data(tokenizer):
    model, _ = dense_and_statistics(BERT)

    def fingerprint(texts, **kwargs):
        return calibrate(model, texts, tokenizer=tokenizer, fisher=False, progress=False, **kwargs).data_fingerprint

    assert fingerprint(WORDS) == fingerprint(WORDS[::-1])
    assert fingerprint(WORDS) != fingerprint(WORDS[:-1])
    assert len({fingerprint(texts) for texts in (WORDS, [*WORDS, WORDS[0]], WORDS[1:])}) == 3
    assert int(fingerprint(WORDS), 16) < 1 << 128


# The sample of token sequences ----------------------------------------------------------------------------------------


def filled(keys: list[int], budget: int) -> TokenSample:
    """A sequence of 0 to 9 tokens for every hash."""
    sample = TokenSample(budget)
    for key in keys:
        sample.add(key, {"input_ids": [key % 97] * (key % 10)})
    return sample


@given(st.data(), st.lists(st.integers(0, (1 << 128) - 1), max_size=20), st.integers(0, 40), st.integers(0, 20))
def test_sample_does_not_depend_on_order_or_shards(data, keys, budget, cut):
    whole = filled(keys, budget)
    assert whole.tokens <= budget
    shuffled = data.draw(st.permutations(keys))
    assert filled(shuffled, budget).sequences() == whole.sequences()
    parts = [filled(shuffled[:cut], budget), filled(shuffled[cut:], budget)]
    assert TokenSample.merge(parts).sequences() == whole.sequences()
    read = [TokenSample.from_tensors(part.tensors()) for part in parts]
    assert [part.sequences() for part in read] == [part.sequences() for part in parts]
    assert TokenSample.merge(read).sequences() == whole.sequences()


def test_sample_keeps_the_smallest_hashes_that_fit():
    sample = filled([*range(50), 13, 13], 56)
    kept = [row["input_ids"][0] for row in sample.sequences()]
    assert kept == [*range(1, 10), *range(11, 13)] and sample.tokens == 48, "13 and its copies no longer fit"
    assert filled(list(range(50)), 0).sequences() == []


def test_sample_of_a_calibration(tokenizer):
    model, _ = dense_and_statistics(BERT)
    stats = calibrate(model, WORDS, tokenizer=tokenizer, progress=False)
    expected = sorted(tokenizer(text)["input_ids"] for text in WORDS)
    assert sorted(row["input_ids"] for row in stats.sample.sequences()) == expected
    small = calibrate(model, WORDS, tokenizer=tokenizer, sample_tokens=40, progress=False)
    assert 0 < small.sample.tokens <= 40
    none = calibrate(model, WORDS, tokenizer=tokenizer, sample_tokens=0, progress=False)
    assert none.sample.sequences() == []
