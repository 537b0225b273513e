"""Turns what users have (texts, datasets, loaders) into padded batches for the dense model."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..errors import TCSPError

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "context"),
    ("question", "sentence"),
    ("sentence",),
    ("text",),
)
"""Column names of GLUE, SQuAD and plain text, tried in this order."""

_SORT_WINDOW = 64
Row = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class InputOptions:
    """How texts become batches.

    Attributes:
        tokenizer: a transformers tokenizer; only needed for texts.
        batch_size: sequences per batch (a DataLoader keeps its own).
        max_length: tokens per sequence; longer ones are cut (the second text first).
        max_sequences: stop after so many.
        text_columns: names of one or two columns; None tries `TEXT_COLUMNS`.
        max_target_length: tokens per target of a (source, target) pair, for sequence-to-sequence models.
        targets: whether the second text of a pair is the target rather than part of the input.
        pad_token_id, vocab_size: of the model.
    """

    tokenizer: Any
    batch_size: int
    max_length: int
    max_sequences: int | None
    text_columns: tuple[str, ...] | None
    max_target_length: int
    targets: bool
    pad_token_id: int
    vocab_size: int


def count_sequences(data: Any, limit: int | None) -> int | None:
    """Number of sequences, where `data` knows it; for the progress bar."""
    if isinstance(data, DataLoader):
        return limit
    try:
        size = len(data)
    except TypeError:
        return limit
    return size if limit is None else min(size, limit)


def batches(data: Any, options: InputOptions) -> Iterator[Batch]:
    """Padded batches: `input_ids`, `attention_mask`, perhaps `token_type_ids`, and for sequence-to-sequence models
    `decoder_input_ids` or `labels`. Class labels never pass.

    Raises:
        TCSPError: no data, no tokenizer for texts, unknown columns, or token ids outside the vocabulary.
    """
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TCSPError(
            f"data is a {type(data).__name__}; it must be a list of strings, a Dataset, an IterableDataset, or a "
            "DataLoader of batches."
        )
    if isinstance(data, DataLoader):
        yield from _loader_batches(data, options)
        return
    items = iter(data)
    first = next(items, None)
    if first is None:
        return
    items = itertools.chain([first], items)
    if isinstance(first, Mapping) and isinstance(first.get("input_ids"), torch.Tensor) and first["input_ids"].dim() > 1:
        yield from _loader_batches(items, options)
        return
    rows: Iterator[Row] = _token_rows(items) if _is_tokenised(first) else _text_rows(items, first, options)
    rows = itertools.islice(rows, options.max_sequences)
    while window := list(itertools.islice(rows, _SORT_WINDOW * options.batch_size)):
        window.sort(key=lambda row: len(row["input_ids"]))  # equal lengths together: less padding
        for start in range(0, len(window), options.batch_size):
            yield _checked(_collate(window[start : start + options.batch_size], options.pad_token_id), options)


def _is_tokenised(item: Any) -> bool:
    return isinstance(item, Mapping) and "input_ids" in item


def _token_rows(items: Iterable[Any]) -> Iterator[Row]:
    for item in items:
        row: Row = {}
        mask = item.get("attention_mask")
        keep = None if mask is None else [bool(m) for m in mask]
        for name in ("input_ids", "token_type_ids"):
            if item.get(name) is not None:
                values = [int(value) for value in item[name]]
                row[name] = values if keep is None else [v for v, k in zip(values, keep, strict=True) if k]
        for name in ("decoder_input_ids", "labels"):
            value = item.get(name)
            if isinstance(value, (list, tuple)) or (isinstance(value, torch.Tensor) and value.dim() == 1):
                row[name] = [int(v) for v in value]
        yield row


def _text_rows(items: Iterable[Any], first: Any, options: InputOptions) -> Iterator[Row]:
    if options.tokenizer is None:
        raise TCSPError(
            "data holds texts, so a tokenizer is needed: pass tokenizer=AutoTokenizer.from_pretrained(...)."
        )
    columns = _columns(first, options.text_columns)
    for chunk in _chunks(items, 256):
        texts = [_texts(item, columns) for item in chunk]
        sources = [text[0] for text in texts]
        seconds = [text[1] for text in texts] if len(texts[0]) > 1 else None
        arguments: dict[str, Any] = {"truncation": True, "max_length": options.max_length}
        if seconds is not None and not options.targets:
            arguments["text_pair"] = seconds
            arguments["truncation"] = "only_second" if columns == ("question", "context") else True
        encoded = options.tokenizer(sources, **arguments)
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        rows = [{name: encoded[name][i] for name in names} for i in range(len(chunk))]
        if seconds is not None and options.targets:
            labels = options.tokenizer(text_target=seconds, truncation=True, max_length=options.max_target_length)
            for row, ids in zip(rows, labels["input_ids"], strict=True):
                row["labels"] = ids
        yield from rows


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _columns(first: Any, wanted: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Names of the text columns, or None where the items are texts themselves."""
    if not isinstance(first, Mapping):
        return None
    names = list(first)
    if wanted is not None:
        missing = [name for name in wanted if name not in names]
        if missing:
            raise TCSPError(f"text_columns names {missing}, but the data has the columns {names}.")
        return wanted
    for candidate in TEXT_COLUMNS:
        if all(name in names for name in candidate):
            return candidate
    raise TCSPError(f"No text column found among {names}: name one or two with text_columns=.")


def _texts(item: Any, columns: tuple[str, ...] | None) -> tuple[str, ...]:
    if columns is not None:
        item = [item[name] for name in columns]
    parts: Sequence[Any] = [item] if isinstance(item, str) else item
    good = isinstance(parts, (list, tuple)) and 1 <= len(parts) <= 2 and all(isinstance(part, str) for part in parts)
    if not good:
        raise TCSPError(f"data holds {item!r}; every item must be a string or a pair of strings.")
    return tuple(parts)


def _collate(rows: list[Row], pad_token_id: int) -> Batch:
    batch: Batch = {}
    padding = {
        "input_ids": pad_token_id,
        "token_type_ids": 0,
        "labels": -100,
        "decoder_input_ids": pad_token_id,
    }
    for name, pad in padding.items():
        if all(name in row for row in rows):
            length = max(1, *(len(row[name]) for row in rows))
            batch[name] = torch.tensor([row[name] + [pad] * (length - len(row[name])) for row in rows])
            if name in ("input_ids", "decoder_input_ids"):
                mask = [[1] * len(row[name]) + [0] * (length - len(row[name])) for row in rows]
                batch["attention_mask" if name == "input_ids" else "decoder_attention_mask"] = torch.tensor(mask)
    return batch


def _loader_batches(loader: Iterable[Any], options: InputOptions) -> Iterator[Batch]:
    seen = 0
    allowed = {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "decoder_input_ids",
        "decoder_attention_mask",
    }
    if options.targets:
        allowed.add("labels")
    for item in loader:
        if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), torch.Tensor):
            raise TCSPError("The DataLoader must yield dictionaries with a tensor input_ids (batch, length).")
        batch = {name: value for name, value in item.items() if name in allowed and isinstance(value, torch.Tensor)}
        if options.max_sequences is not None:
            batch = {name: value[: options.max_sequences - seen] for name, value in batch.items()}
        if batch["input_ids"].shape[0] == 0:
            if options.max_sequences is not None and seen >= options.max_sequences:
                return
            continue
        seen += batch["input_ids"].shape[0]
        yield _checked(batch, options)


def _checked(batch: Batch, options: InputOptions) -> Batch:
    ids = batch["input_ids"]
    if ids.dtype not in (torch.int64, torch.int32):
        raise TCSPError(f"input_ids has dtype {ids.dtype}; it must hold integers.")
    for name in ("input_ids", "decoder_input_ids", "labels"):
        if name not in batch or batch[name].numel() == 0:
            continue
        values = batch[name][batch[name] != -100] if name == "labels" else batch[name]
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < options.vocab_size:
            worst = int(values.max()) if int(values.max()) >= options.vocab_size else int(values.min())
            raise TCSPError(
                f"{name} holds the token {worst}, but the model's vocabulary has {options.vocab_size} entries: is the "
                "tokenizer the model's own?"
            )
    if ids.shape[-1] > options.max_length:
        raise TCSPError(
            f"A batch has sequences of {ids.shape[-1]} tokens, more than the {options.max_length} that the model (or "
            "max_length) allows: truncate them."
        )
    return batch
