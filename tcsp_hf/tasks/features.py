"""From a task's rows to what a Trainer feeds a model: tokenised features and their collator."""

from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from ..data.checks import check_answers_stand_there
from ..modes import kept_settings
from .inputs import right_padding
from .squad import answer_positions, encode_windows
from .table import CLASSIFICATION, SPANS, TEXT, Task
from .text_to_text import max_target_tokens, source_text, target_text


def make_features(task: Task, form: str, data: Any, tokenizer: Any, max_length: int) -> Any:
    """A `datasets.Dataset` of unpadded features with labels.

    Args:
        form: see `table.FORMS`.
        data: rows of the task, from `Task.load`.
        max_length: tokens of an input; longer ones are cut, contexts of questions are split into windows.

    Raises:
        TCSPError: an answer that does not stand where its row says, for a model that learns to find it.
    """
    if form == SPANS:
        check_answers_stand_there(data)

    def classification(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = tokenizer(*(rows[column] for column in task.columns), truncation=True, max_length=max_length)
        return {**encoded, "labels": rows["label"]}

    def spans(rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded = encode_windows(tokenizer, rows["question"], rows["context"], max_length)
        sources = encoded["overflow_to_sample_mapping"]
        positions = [answer_positions(encoded, i, rows["answers"][row]) for i, row in enumerate(sources)]
        kept = {name: encoded[name] for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoded}
        return {**kept, "start_positions": [p[0] for p in positions], "end_positions": [p[1] for p in positions]}

    longest = max_target_tokens(task, tokenizer) if form == TEXT else 0

    def text(rows: dict[str, list[Any]]) -> dict[str, Any]:
        items = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        encoded = tokenizer([source_text(task, item) for item in items], truncation=True, max_length=max_length)
        targets = [target_text(task, item) for item in items]
        labels = tokenizer(text_target=targets, truncation=True, max_length=longest)
        return {**encoded, "labels": labels["input_ids"]}

    encode = classification if form == CLASSIFICATION else spans if form == SPANS else text
    with kept_settings(tokenizer):
        return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenise")


def make_collator(form: str, tokenizer: Any, model: Any) -> Any:
    """Pads a batch to its longest sequence, on the right."""
    tokenizer = right_padding(tokenizer)
    if form in (CLASSIFICATION, SPANS):
        return DataCollatorWithPadding(tokenizer)
    return DataCollatorForSeq2Seq(tokenizer, model=model)
