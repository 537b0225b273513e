"""Whatever of PyTorch is switched on around a call, its result is the same, and the switches stay as they were."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Case, dense_and_sample, find, make_dense, make_inputs, make_rows
from statistics_of import assert_equal_statistics
from transformers import PreTrainedModel

from tcsp_hf import Calibration, TCSPError, calibrate, compress

BERT, T5 = find("bert-ForMaskedLM"), find("t5-ForConditionalGeneration")
both = pytest.mark.parametrize("case", [BERT, T5], ids=str)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")  # stands in for a GPU: no result may lie there
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default(torch.float64),
    "float16": lambda: default(torch.float16),
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
}
around = pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)


def state() -> list[Any]:
    return [
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    ]


def within(surroundings: AbstractContextManager[Any], work: Any) -> Any:
    with surroundings:
        before = state()
        found = work()
        assert state() == before
    return found


def assert_same_model(one: PreTrainedModel, other: PreTrainedModel) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    for name in ("predicted_kl", "measured_kl"):
        assert one.config.projection["options"][name] == other.config.projection["options"][name]


@around
@both
def test_calibrate(case: Case, surroundings: Any) -> None:
    dense, expected = dense_and_sample(case, torch.float32)
    rows = make_rows(case)
    found = within(surroundings(), lambda: calibrate(dense, rows, batch_size=16, progress=False))
    assert_equal_statistics(found, expected, tolerance=0.0)


@around
@both
def test_compress(case: Case, surroundings: Any) -> None:
    dense, stats = dense_and_sample(case, torch.float32)
    expected = compress(dense, stats, remove=0.4)
    found = within(surroundings(), lambda: compress(dense, stats, remove=0.4))
    assert_same_model(expected, found)
    found.train()(**make_inputs(case)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


@around
def test_files(tmp_path: Path, surroundings: Any) -> None:
    _, expected = dense_and_sample(BERT, torch.float32)
    within(surroundings(), lambda: expected.save(tmp_path / "stats"))
    found = within(surroundings(), lambda: Calibration.load(tmp_path / "stats"))
    assert_equal_statistics(found, expected, tolerance=0.0)


def test_greedy_targets_on_another_default_device() -> None:
    dense, _ = dense_and_sample(T5, torch.float32)
    rows = [{"input_ids": row["input_ids"]} for row in make_rows(T5, 8)]

    def work() -> Calibration:
        return calibrate(dense, rows, progress=False, max_target_length=4)

    assert_equal_statistics(within(default_device(), work), work(), tolerance=0.0)


def test_a_float64_model_stays_one() -> None:
    dense, stats = dense_and_sample(BERT)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    small = within(autocast, lambda: compress(dense, stats, hidden_size=32, refit=False))
    inputs = make_inputs(BERT)
    with torch.no_grad():
        torch.testing.assert_close(small(**inputs).logits, dense(**inputs).logits, rtol=1e-8, atol=1e-8)


def test_batches_made_in_inference_mode() -> None:
    dense, _ = dense_and_sample(BERT, torch.float32)
    expected = calibrate(dense, [make_inputs(BERT)], progress=False)
    with torch.inference_mode():
        batches = [{name: value.clone() for name, value in make_inputs(BERT).items()}]
    assert batches[0]["input_ids"].is_inference()
    assert_equal_statistics(calibrate(dense, batches, progress=False), expected, tolerance=0.0)


def test_a_model_made_in_inference_mode_is_refused_and_its_copy_is_not() -> None:
    with torch.inference_mode():
        dense = make_dense(BERT, torch.float32)
        with pytest.raises(TCSPError, match=r"copy the model outside of torch\.inference_mode"):
            calibrate(dense, make_rows(BERT), progress=False)
    _, expected = dense_and_sample(BERT, torch.float32)
    with pytest.raises(TCSPError, match="inference tensors"):
        compress(dense, expected, hidden_size=16)
    found = calibrate(copy.deepcopy(dense), make_rows(BERT), batch_size=16, progress=False)
    assert_equal_statistics(found, expected, tolerance=0.0)
