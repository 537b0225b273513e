"""Calibration: the same statistics whatever the batches, shards and containers; and what it refuses."""

import copy
import random

import pandas
import pytest
import torch
from common import (
    EOS,
    ONE_SOURCE_CASES,
    PAD,
    VOCABULARY,
    Case,
    calibrated,
    dense_and_statistics,
    find,
    make_dense,
    make_rows,
    make_tokenizer,
)
from datasets import Dataset
from statistics_of import WORDS, assert_equal_statistics, relative
from torch.utils.data import DataLoader

from tcsp_hf import Calibration, TCSPError, calibrate, compress

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")


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


def test_which_column_a_language_model_writes_must_be_named(tokenizer):
    model, _ = dense_and_statistics(T5)
    data = Dataset.from_dict({"question": WORDS, "context": WORDS[::-1]})
    with pytest.raises(TCSPError, match=r"\['question', 'context'\].*\(input, target\) columns with text_columns="):
        calibrate(model, data, tokenizer=tokenizer, progress=False)
    chosen = {"tokenizer": tokenizer, "progress": False, "max_target_length": 3}
    named = calibrate(model, data, text_columns=("question", "context"), **chosen)
    assert_equal_statistics(named, calibrate(model, list(zip(WORDS, WORDS[::-1], strict=True)), **chosen))
    alone = calibrate(model, data, text_columns="question", **chosen)
    assert_equal_statistics(alone, calibrate(model, WORDS, **chosen))
    encoder = find("t5-EncoderModel")
    calibrate(dense_and_statistics(encoder)[0], data, **chosen)  # it writes nothing: a pair is what it reads


def test_a_question_that_leaves_no_room_for_its_context(tokenizer):
    """It is cut itself; the other rows stay as they were."""
    model, _ = dense_and_statistics(BERT)
    rows = [{"question": text, "context": "w1 w2"} for text in WORDS]
    long = {"question": "w3 " * 60, "context": "w2"}
    stats = calibrate(model, [*rows, long], tokenizer=tokenizer, progress=False)
    expected = calibrate(model, [*rows, {**long, "question": "w3 " * 36}], tokenizer=tokenizer, progress=False)
    assert_equal_statistics(stats, expected)


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
        (pandas.DataFrame({"text": WORDS}), r"data is a DataFrame; .*tolist\(\)\) or Dataset\.from_pandas\(df\)"),
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


def test_a_fast_tokenizer_cuts_as_before():
    """What it was told last would be saved, and read by everyone who uses its file without transformers."""
    tokenizer = make_tokenizer()
    pairs = [(f"w{i} w{i + 1}", f"w{i}") for i in range(20)]
    calibrate(make_dense(T5, torch.float32), pairs, tokenizer=tokenizer, progress=False)
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None
    tokenizer(["w1", "w1 w2"], truncation=True, max_length=7, padding="max_length")
    before = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    with pytest.raises(TCSPError):
        calibrate(make_dense(BERT, torch.float32), [*(one for one, _ in pairs), 3], tokenizer=tokenizer, progress=False)
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == before


def test_rows_whose_labels_all_are_left_out():
    rows = make_rows(T5, 30)
    bad = [{**row, "labels": [-100] * 3} for row in rows[:3]]
    dense = make_dense(T5, torch.float32)
    stats = calibrate(dense, rows + bad, progress=False)
    assert_equal_statistics(stats, calibrate(dense, rows, progress=False))
    compress(dense, stats, remove=0.3, progress=False)


def test_precision_set_by_the_newer_settings(monkeypatch):
    """PyTorch's older question is an error then (it is what transformers' tf32=True leaves behind)."""
    dense, rows = make_dense(BERT, torch.float32), make_rows(BERT, 20)
    expected = calibrate(dense, rows, progress=False)

    def mixed():
        raise RuntimeError("mix of legacy and new APIs")

    monkeypatch.setattr("torch.get_float32_matmul_precision", mixed)
    found = calibrate(dense, rows, progress=False)
    for name, site in expected.sites.items():
        assert relative(found.sites[name].second_moment, site.second_moment) <= 1e-6


def test_deterministic_algorithms_change_nothing():
    dense, rows = make_dense(BERT, torch.float32), make_rows(BERT, 20)
    expected = calibrate(dense, rows, progress=False)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal_statistics(calibrate(dense, rows, progress=False), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_model_on_a_device_without_float64(monkeypatch):
    dense, stats = dense_and_statistics(BERT)
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("mps"), raising=False)
    for work in (lambda: calibrate(dense, make_rows(BERT, 4)), lambda: compress(dense, stats, hidden_size=8)):
        with pytest.raises(TCSPError, match=r"on mps, which has no float64.*use_cpu=True"):
            work()
