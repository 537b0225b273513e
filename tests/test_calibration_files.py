"""Statistics merged, saved and loaded, and the sample of token sequences that they carry."""

import copy
import json

import pytest
import torch
from common import (
    Case,
    calibrated,
    dense_and_statistics,
    find,
    make_dense,
    make_rows,
)
from hypothesis import given
from hypothesis import strategies as st
from statistics_of import WORDS, assert_equal_statistics

from tcsp_hf import Calibration, TCSPError, calibrate, compress
from tcsp_hf.calibration.fingerprint import model_fingerprint
from tcsp_hf.calibration.sample import TokenSample

BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")


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
    with pytest.raises(TCSPError, match=r"holds 'notes\.txt', which is no part of statistics"):
        stats.save(saved, overwrite=True)
    assert (saved / "notes.txt").read_text() == "keep me"
    (saved / "notes.txt").unlink()
    stats.save(saved, overwrite=True)
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


def test_token_types_that_only_some_sequences_have(tmp_path):
    model, _ = dense_and_statistics(BERT)
    typed = make_rows(BERT)
    bare = [{"input_ids": row["input_ids"]} for row in make_rows(BERT, seed=1)]
    zeros = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in bare]
    parts = [calibrate(model, rows, progress=False) for rows in (typed, bare, zeros)]
    merged, expected = Calibration.merge(parts[:2]), Calibration.merge([parts[0], parts[2]])
    merged.save(tmp_path / "stats")
    loaded = Calibration.load(tmp_path / "stats")
    assert loaded.sample.sequences() == expected.sample.sequences()
    weights = compress(model, expected, hidden_size=16).state_dict()
    for stats in (merged, loaded):
        found = compress(model, stats, hidden_size=16).state_dict()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    batches = [{name: torch.tensor([value]) for name, value in row.items()} for row in typed + bare]
    mixed = calibrate(model, batches, progress=False)
    compress(model, mixed, remove=0.3)
