"""Turns what users have (texts, datasets, loaders) into padded batches for the dense model."""

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

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
        pad_token_id, vocab_size, type_vocab_size, position_count: of the model; None where it has no such table.
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
    type_vocab_size: int | None = None
    position_count: int | None = None


def count_sequences(data: Any, limit: int | None) -> int | None:
    """Number of sequences, where `data` knows it; for the progress bar."""
    if isinstance(data, DataLoader):
        return limit
    try:
        size = len(data)
    except TypeError:
        return limit
    return size if limit is None else min(size, limit)


def check_kind(data: Any) -> None:
    """That data is of a kind that `batches` reads.

    Raises:
        TCSPError: it is not.
    """
    frame = hasattr(data, "columns") and not isinstance(data, Dataset)  # it would give its columns' names
    if not frame and isinstance(data, Iterable) and not isinstance(data, (str, bytes, Mapping)):
        return
    hint = " Choose one of its splits or columns." if isinstance(data, Mapping) else ""
    if frame:
        hint = " Give one column (df['text'].tolist()) or Dataset.from_pandas(df)."
    raise TCSPError(
        f"data is a {type(data).__name__}; it must be a list of strings, a Dataset, an IterableDataset, or a "
        f"DataLoader of batches.{hint}"
    )


def batches(data: Any, options: InputOptions) -> Iterator[Batch]:
    """Padded batches: `input_ids`, `attention_mask`, perhaps `token_type_ids`, and for sequence-to-sequence models
    `decoder_input_ids` or `labels`. Class labels never pass, nor sequences without a single token.

    Raises:
        TCSPError: no data, no tokenizer for texts, unknown columns, rows or tensors that do not fit each other, masks
            of other values than 0 and 1, or token ids outside the vocabulary.
    """
    check_kind(data)
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
    rows: Iterator[Row] = (
        _token_rows(items, options.targets) if _is_tokenised(first) else _text_rows(items, first, options)
    )
    rows = itertools.islice(rows, options.max_sequences)
    while window := list(itertools.islice(rows, _SORT_WINDOW * options.batch_size)):
        window.sort(key=lambda row: len(row["input_ids"]))  # equal lengths together: less padding
        for start in range(0, len(window), options.batch_size):
            yield _checked(_collate(window[start : start + options.batch_size], options.pad_token_id), options)


def _is_tokenised(item: Any) -> bool:
    return isinstance(item, Mapping) and "input_ids" in item


def _token_rows(items: Iterable[Any], targets: bool) -> Iterator[Row]:
    """targets: whether `labels` are a decoder's; those of a class are of no use, whatever they look like."""
    columns: list[str] | None = None
    for item in items:
        if not _is_tokenised(item):
            raise TCSPError(f"data holds {_short(item)} among rows of tokens; every row must have input_ids.")
        row: Row = {}
        for name in ("input_ids", "token_type_ids", "decoder_input_ids"):
            if item.get(name) is not None:
                row[name] = _whole_numbers(name, item[name])
        if targets and _is_row(item.get("labels")):
            row["labels"] = _whole_numbers("labels", item["labels"])
        if len(row.get("token_type_ids", row["input_ids"])) != len(row["input_ids"]):
            raise TCSPError(f"token_type_ids and input_ids of a row have different lengths: {_short(item)}.")
        if item.get("attention_mask") is not None:
            _keep_masked(row, _numbers("attention_mask", item["attention_mask"]), "input_ids", "token_type_ids")
        if "decoder_input_ids" in row:
            _keep_decoded(row, item.get("decoder_attention_mask"))
        columns = list(row) if columns is None else columns
        if list(row) != columns:
            raise TCSPError(f"data holds rows of tokens with the columns {columns} and with {list(row)}: give all one.")
        if all(row[name] for name in row) and any(label != -100 for label in row.get("labels", [0])):
            yield row


def _is_row(value: Any) -> bool:
    """A sequence of numbers, not a class label."""
    return isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0


def _numbers(name: str, values: Any) -> list[Any]:
    try:
        return list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:
        raise TCSPError(f"{name} is {_short(values)}; it must be a list of numbers.") from None


def _whole_numbers(name: str, values: Any) -> list[int]:
    try:
        return [operator.index(value) for value in _numbers(name, values)]
    except TypeError:
        raise TCSPError(f"{name} is {_short(values)}; it must be a list of whole numbers.") from None


def _keep_decoded(row: Row, mask: Any) -> None:
    """Take out of a row's decoder inputs, in place, what their mask leaves out, or without one what has no label."""
    labels = row.pop("labels", [])  # they say nothing more than the decoder's inputs
    if mask is not None:
        _keep_masked(row, _numbers("decoder_attention_mask", mask), "decoder_input_ids")
    elif len(labels) == len(row["decoder_input_ids"]):
        _keep_masked(row, [int(label != -100) for label in labels], "decoder_input_ids")


def _keep_masked(row: Row, mask: list[Any], *names: str) -> None:
    """Take out of these columns of a row, in place, what an attention mask of the first one leaves out."""
    if len(mask) != len(row[names[0]]):
        raise TCSPError(f"An attention_mask has {len(mask)} entries for {len(row[names[0]])} {names[0]}.")
    wrong = next((value for value in mask if value not in (0, 1)), None)
    if wrong is not None or None in mask:
        raise TCSPError(f"An attention_mask holds {_short(wrong)}; it must hold 1 for tokens and 0 for padding.")
    for name in names:
        if name in row:
            row[name] = [value for value, kept in zip(row[name], mask, strict=True) if kept]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _text_rows(items: Iterable[Any], first: Any, options: InputOptions) -> Iterator[Row]:
    if options.tokenizer is None:
        raise TCSPError(
            "data holds texts, so a tokenizer is needed: pass tokenizer=AutoTokenizer.from_pretrained(...)."
        )
    columns = _columns(first, options.text_columns)
    if options.targets and options.text_columns is None and columns is not None and len(columns) == 2:
        raise TCSPError(
            f"This model writes texts, and which of the columns {list(columns)} it writes is not known: name the "
            "(input, target) columns with text_columns=, or one column, for which the model writes the targets itself."
        )
    count = len(_texts(first, columns))
    for chunk in _chunks(items, 256):
        texts = [_texts(item, columns) for item in chunk]
        if any(len(text) != count for text in texts):
            raise TCSPError("data holds single texts and pairs; every item must be like the first one.")
        sources = [text[0] for text in texts]
        seconds = [text[1] for text in texts] if count > 1 else None
        arguments: dict[str, Any] = {"truncation": True, "max_length": options.max_length}
        if seconds is not None and not options.targets:
            arguments["text_pair"] = seconds
            arguments["truncation"] = "only_second" if columns == ("question", "context") else True
        try:
            encoded = _encode(options.tokenizer, sources, **arguments)
        except TCSPError:
            if arguments["truncation"] is True:
                raise
            encoded = _encode(options.tokenizer, sources, **{**arguments, "truncation": True})  # a question too long
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        rows = [{name: encoded[name][i] for name in names} for i in range(len(chunk))]
        if seconds is not None and options.targets:
            cut = {"truncation": True, "max_length": options.max_target_length}
            labels = _encode(options.tokenizer, text_target=seconds, **cut)
            for row, ids in zip(rows, labels["input_ids"], strict=True):
                row["labels"] = ids
        yield from (row for row in rows if all(row[name] for name in row))


def _encode(tokenizer: Any, *texts: list[str], **arguments: Any) -> Any:
    try:
        return tokenizer(*texts, **arguments)
    except Exception as error:  # (half of a surrogate pair; the Rust tokenizers' errors have no class of their own)
        raise TCSPError(f"The tokenizer cannot read one of the texts: {error}") from error


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
        if not 1 <= len(wanted) <= 2:
            raise TCSPError(f"text_columns is {wanted!r}; it must name one or two columns.")
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
        if not isinstance(item, Mapping) or any(name not in item for name in columns):
            raise TCSPError(f"data holds {_short(item)}; every item must have the columns {list(columns)}.")
        item = [item[name] for name in columns]
    parts: Sequence[Any] = [item] if isinstance(item, str) else item
    good = isinstance(parts, (list, tuple)) and 1 <= len(parts) <= 2 and all(isinstance(part, str) for part in parts)
    if not good:
        raise TCSPError(f"data holds {_short(item)}; every item must be a string or a pair of strings.")
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
        if batch["input_ids"].dim() > 0 and len(batch["input_ids"]) == 0:
            continue
        batch = _without_empty(_checked(batch, options))
        if options.max_sequences is not None:
            left = options.max_sequences - seen
            batch = {name: value[:left] for name, value in batch.items()}
        seen += len(batch["input_ids"])
        if len(batch["input_ids"]) > 0:
            yield batch
        if options.max_sequences is not None and seen >= options.max_sequences:
            return


def _without_empty(batch: Batch) -> Batch:
    """Without the sequences that have no token: a padded row, or a target that is padding only."""
    ids = batch["input_ids"]
    real = torch.ones_like(ids, dtype=torch.bool) if "attention_mask" not in batch else batch["attention_mask"].bool()
    keep = real.any(-1)
    if keep.dim() > 1:
        if bool((keep.any(-1) & ~keep.all(-1)).any()):
            raise TCSPError("A batch holds a choice without a single token: give every choice some text.")
        keep = keep.all(-1)
    if "decoder_attention_mask" in batch:
        keep = keep & batch["decoder_attention_mask"].bool().any(-1)
    if "labels" in batch:
        keep = keep & (batch["labels"] != -100).any(-1)
    if bool(keep.all()):
        return batch
    return {name: value[keep] if len(value) == len(ids) else value for name, value in batch.items()}


def _check_shapes(batch: Batch) -> None:
    """Every tensor has one row for each sequence; masks hold 0 and 1 and fit what they are masks of."""
    ids = batch["input_ids"]
    if ids.dim() not in (2, 3) or ids.numel() == 0:
        raise TCSPError(f"input_ids has the shape {tuple(ids.shape)}; it must be (batch, length), with a length.")
    if "decoder_attention_mask" in batch and "decoder_input_ids" not in batch:
        raise TCSPError("A batch has a decoder_attention_mask without decoder_input_ids: leave it out.")
    for name, value in batch.items():
        decodes = name.startswith("decoder") or name == "labels"
        like = batch.get("decoder_input_ids", value) if name == "decoder_attention_mask" else value if decodes else ids
        rows = (1, len(ids)) if name == "position_ids" else (len(ids),)
        fits = value.dim() >= 2 and value.shape[0] in rows and value.shape[1:] == like.shape[1:] and value.shape[-1] > 0
        if not fits or (decodes and value.dim() != 2):
            raise TCSPError(
                f"{name} has the shape {tuple(value.shape)} beside input_ids of the shape {tuple(ids.shape)}: they do "
                "not fit."
            )
        if name.endswith("mask"):
            if value.dtype == torch.bool:
                continue
            if bool(((value != 0) & (value != 1)).any()):
                raise TCSPError(f"{name} holds other values than 1 (tokens) and 0 (padding).")
        elif value.dtype not in (torch.int64, torch.int32):
            raise TCSPError(f"{name} has dtype {value.dtype}; it must hold integers.")


def _check_range(start: str, values: torch.Tensor, size: int, end: str) -> None:
    """Raise TCSPError unless all values are entries of a table of this size."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < size:
        worst = int(values.max()) if int(values.max()) >= size else int(values.min())
        raise TCSPError(f"{start} {worst}, but {end}")


def _checked(batch: Batch, options: InputOptions) -> Batch:
    _check_shapes(batch)
    ids = batch["input_ids"]
    size = options.vocab_size
    for name in ("input_ids", "decoder_input_ids", "labels"):
        if name in batch:
            values = batch[name][batch[name] != -100] if name == "labels" else batch[name]
            said = f"the model's vocabulary has {size} entries: is the tokenizer the model's own?"
            _check_range(f"{name} holds the token", values, size, said)
    for name, count in (("token_type_ids", options.type_vocab_size), ("position_ids", options.position_count)):
        if name in batch and count is not None:
            _check_range(f"{name} holds", batch[name], count, f"the model has {count} of them.")
    if ids.shape[-1] > options.max_length:
        raise TCSPError(
            f"A batch has sequences of {ids.shape[-1]} tokens, more than the {options.max_length} that the model (or "
            "max_length) allows: truncate them."
        )
    return batch
