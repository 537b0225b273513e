"""The calibration's own token sequences as batches: every baseline sees the text that our method sees."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.fingerprint import sequence_hash
from ..calibration.inputs import Batch, InputOptions, batches
from ..errors import TCSPError

BATCH_SIZE = 32


def sample_batches(model: PreTrainedModel, stats: Calibration) -> Iterator[Batch]:
    """Padded batches of the statistics' token sample, sequences of like lengths together, on the model's device.

    Raises:
        TCSPError: the statistics hold no sample.
    """
    sequences = stats.sample.sequences()
    if not sequences:
        raise TCSPError("This baseline needs the token sample of the statistics: calibrate with sample_tokens > 0.")
    sequences.sort(key=lambda row: (len(row["input_ids"]), len(row.get("decoder_input_ids", ()))))
    longest = max(len(values) for rows in sequences for values in rows.values())
    options = InputOptions(
        tokenizer=None,
        batch_size=BATCH_SIZE,
        max_length=longest,
        max_sequences=None,
        text_columns=None,
        max_target_length=longest,
        targets=False,
        pad_token_id=model.config.pad_token_id or 0,
        vocab_size=model.config.vocab_size,
    )
    for batch in batches(sequences, options):
        yield {name: values.to(model.device) for name, values in batch.items()}


def keys_of(batch: Batch, seed: int) -> list[int]:
    """One number per sequence from its real tokens and the seed: what its random draws start from."""
    rows = zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool(), strict=True)
    return [sequence_hash(ids[kept].tolist(), seed) for ids, kept in rows]


def real_rows(values: torch.Tensor, batch: Batch, stack: str) -> torch.Tensor:
    """Rows (tokens, entries) of values (batch, length, entries) without padding; values (batch, entries) pass."""
    if values.dim() == 2:
        return values
    mask = batch["decoder_attention_mask" if stack == "decoder" else "attention_mask"].bool()
    return values[mask]
