"""What a T5's decoder reads in a calibration: every target's own tokens, and no padding."""

from typing import Any

import pytest
import torch
from common import EOS, PAD, find, make_dense, make_rows
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from tcsp_hf import Calibration, TCSPError, calibrate

T5 = find("t5-ForConditionalGeneration")
ROWS = make_rows(T5)
TOKENS = sum(len(row["labels"]) for row in ROWS)
LONGEST = max(len(row["labels"]) for row in ROWS)


def decoded(stats: Calibration) -> int:
    return stats.sites["decoder.final"].tokens


def kept(stats: Calibration) -> list[list[int]]:
    return sorted(row["decoder_input_ids"] for row in stats.sample.sequences())


def calibrated(data: Any, **kwargs: Any) -> Calibration:
    return calibrate(make_dense(T5, torch.float32), data, batch_size=8, progress=False, **kwargs)


@pytest.fixture(scope="module")
def expected() -> Calibration:
    stats = calibrated(ROWS)
    assert decoded(stats) == TOKENS and kept(stats) == sorted([PAD, *row["labels"][:-1]] for row in ROWS)
    return stats


def assert_as_expected(stats: Calibration, expected: Calibration) -> None:
    assert kept(stats) == kept(expected)
    for name, site in expected.sites.items():
        assert stats.sites[name].tokens == site.tokens
        torch.testing.assert_close(stats.sites[name].moment_sum, site.moment_sum, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shifts", [False, True], ids=["labels", "labels and decoder inputs"])
def test_a_collator_pads_the_targets(shifts: bool, expected: Calibration, tokenizer: PreTrainedTokenizerFast) -> None:
    collator = DataCollatorForSeq2Seq(tokenizer, model=make_dense(T5, torch.float32) if shifts else None)
    stats = calibrated(DataLoader(ROWS, batch_size=8, collate_fn=collator))  # type: ignore[arg-type]
    assert_as_expected(stats, expected)


def padded(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """A row whose decoder inputs are as long as the longest."""
    ids = [PAD, *row["labels"][:-1]]
    return {"input_ids": row["input_ids"], "decoder_input_ids": ids + [PAD] * (LONGEST - len(ids))}


def test_batches_of_padded_decoder_inputs_without_a_mask(expected: Calibration) -> None:
    batches = [{name: torch.tensor([value]) for name, value in padded(row).items()} for row in ROWS]
    assert_as_expected(calibrated(batches), expected)


def test_a_mask_that_is_given_is_kept() -> None:
    ids = torch.tensor([[PAD, 7, PAD, PAD]])
    batch = {"input_ids": torch.tensor([[5, 6, EOS]]), "decoder_input_ids": ids}
    assert decoded(calibrated([batch])) == 2
    assert decoded(calibrated([{**batch, "decoder_attention_mask": torch.tensor([[1, 1, 1, 0]])}])) == 3


@pytest.mark.parametrize("column", ["decoder_attention_mask", "labels"])
def test_rows_of_padded_decoder_inputs(column: str, expected: Calibration) -> None:
    def marks(row: dict[str, list[int]]) -> list[int]:
        values = row["labels"] if column == "labels" else [1] * len(row["labels"])
        return values + [-100 if column == "labels" else 0] * (LONGEST - len(values))

    assert_as_expected(calibrated([{**padded(row), column: marks(row)} for row in ROWS]), expected)


@pytest.mark.parametrize("mask", [[1], [1, 2], [1, None]])
def test_masks_of_decoder_inputs_are_checked(mask: list[Any]) -> None:
    with pytest.raises(TCSPError, match="attention_mask"):
        calibrated([{"input_ids": [5, 6], "decoder_input_ids": [PAD, 7], "decoder_attention_mask": mask}])


def test_greedy_targets_end_where_generation_ends() -> None:
    model = make_dense(T5, torch.float32)
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    free = calibrate(model, rows, progress=False, max_target_length=6)
    written = [row["decoder_input_ids"] for row in free.sample.sequences()]
    second = [row[2] for row in written if len(row) == 6]
    end = max(set(second) - {PAD}, key=second.count)  # what the model writes often
    model.generation_config.eos_token_id = [EOS, end]
    model.generation_config.return_dict_in_generate = True
    model.generation_config.num_beams = model.generation_config.num_return_sequences = 2
    stats = calibrate(model, rows, progress=False, max_target_length=6)
    assert decoded(stats) < decoded(free)
    ended = [row[: row.index(end)] if end in row else row for row in written]
    assert [row["decoder_input_ids"] for row in stats.sample.sequences()] == ended
