"""What all tests share: no network, no time limits that a busy machine breaks, and the folder `shared`."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import that reads it: a test never reaches the Hub

import pytest
import torch
from common import make_tokenizer, processor_share
from hypothesis import settings
from transformers import PreTrainedTokenizerFast
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(1)  # tiny models are faster so, and sums are grouped alike in every process

settings.register_profile("tcsp_hf", deadline=None, derandomize=True)
settings.load_profile("tcsp_hf")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SHARED.is_dir():
        return
    for item in items:
        if "shared" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs the folder `shared` beside the checkout"))


def pytest_collection_finish() -> None:
    """What was imported stays; to look through it takes 0.4 s of every training, which collects garbage first."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data` and `weights` beside the checkout, for tests marked `shared`."""
    return SHARED


@pytest.fixture
def all_threads() -> Iterator[None]:
    """The share of the machine's processors that falls to this process, for a test on a real model."""
    before = torch.get_num_threads()
    torch.set_num_threads(processor_share())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... of the tests' vocabulary; treat it as read-only."""
    return make_tokenizer()


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' T5 norm takes the mean of squares in float32, even in a float64 model: here it does not."""

    def forward(self: T5LayerNorm, hidden_states: torch.Tensor) -> torch.Tensor:
        mean = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(mean + self.variance_epsilon))

    monkeypatch.setattr(T5LayerNorm, "forward", forward)
    monkeypatch.setattr(MT5LayerNorm, "forward", forward)
