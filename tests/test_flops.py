"""Counting operations and memory: against torch's own counter, and against what is allocated."""

import platform

import psutil
import pytest
import torch
from common import CASES, Case, dense_and_sample, find, make_dense, make_inputs, make_small, make_uneven
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from tcsp_hf.baselines import BASELINES
from tcsp_hf.compression.memory import Growth, give_back, trim
from tcsp_hf.evaluation.flops import count_flops
from tcsp_hf.evaluation.memory import PeakMemory

COUNTED = [case for case in CASES if case.head != "ForMultipleChoice"]
LENGTH = 7


def torch_count(case: Case, model: PreTrainedModel, length: int, targets: int | None = None) -> int:
    """torch's count with attention written out: its counter knows no fused attention on the CPU."""
    model.set_attn_implementation("eager")
    ids = torch.full((1, length), 3)
    ids[0, -1] = 1
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.full((1, targets), 3) if targets is not None else ids
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", COUNTED, ids=str)
def test_dense_and_compressed_models(case: Case) -> None:
    for model in (make_dense(case, torch.float32), make_small(case), make_uneven(case)):
        assert count_flops(model, LENGTH) == torch_count(case, model, LENGTH)


@pytest.mark.parametrize("case", [find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")], ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_baselines(case: Case, name: str) -> None:
    dense, stats = dense_and_sample(case, torch.float32)
    small = BASELINES[name].compress(dense, stats, 0.4)
    counted = count_flops(small, LENGTH)
    assert counted == torch_count(case, small, LENGTH)
    assert counted < count_flops(dense, LENGTH)


def test_decoder_length_and_hooks_that_go() -> None:
    case = find("t5-ForConditionalGeneration")
    model = make_dense(case, torch.float32)
    assert count_flops(model, 9, 4) == torch_count(case, model, 9, 4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(**make_inputs(case))


def test_peak_memory_sees_a_large_block() -> None:
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    with PeakMemory(torch.device("cpu")) as busy:
        torch.ones(25_000_000).sum()
        block = torch.ones(25_000_000)
    assert busy.peak - idle.peak > 50_000_000
    assert block.numel() == 25_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep other books")
def test_freed_memory_is_given_back() -> None:
    """Blocks between others that stay: glibc keeps their pages until it is told."""
    resident = psutil.Process().memory_info
    blocks = [torch.ones(2**13) for _ in range(4096)]  # 128 MiB in blocks too small for pages of their own
    freed = sum(block.nbytes for block in blocks[::2])
    del blocks[::2]
    before = resident().rss
    give_back(1)
    assert before - resident().rss < freed // 2, "small holes are not worth a look through the heap"
    give_back(freed)
    assert before - resident().rss > freed // 2
    assert all(bool((block == 1).all()) for block in blocks)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep other books")
def test_holes_are_given_back_once_they_are_large() -> None:
    resident = psutil.Process().memory_info
    trim()  # holes that other tests left would take the blocks, and nothing would grow
    small, growth = Growth(8, 8), Growth(2**10, 2**10)  # 24 MiB may lie free
    blocks = [torch.ones(2**13) for _ in range(4096)]
    freed = sum(block.nbytes for block in blocks[::2])
    del blocks[::2]
    before = resident().rss
    assert list(small.between(range(2))) == [0, 1]
    assert resident().rss > before - freed // 2
    assert list(growth.between(range(2))) == [0, 1]
    assert resident().rss < before - freed // 2
    assert len(blocks) == 2048
