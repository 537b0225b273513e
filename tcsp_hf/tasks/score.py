"""The score of any model, dense or compressed, on a task."""

from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import writing_options
from ..modes import evaluating
from .inputs import input_length, right_padding
from .metrics import GlueMetric
from .predict import predict
from .squad import Window, best_answer, encode_windows
from .squad_metric import SquadMetric
from .table import CLASSIFICATION, SPANS, Task, form_of, texts_of
from .text_to_text import max_target_tokens, read_answer, read_label, source_text


def score(
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    data: Any,
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    progress: bool | None = False,
) -> dict[str, float]:
    """Every metric of the task on the rows `data` (from `Task.load`): fractions for GLUE, percent for SQuAD.

    Args:
        max_length: tokens of an input; when None the task's usual number, or as many as the model reads.
        progress: show bars; None shows them on a terminal only.

    Raises:
        TCSPError: the model's head does not fit the task, or `max_length` is more than it reads.
    """
    form = form_of(model, task)
    length = input_length(model, task.max_length, max_length)
    with evaluating(model):
        if form == CLASSIFICATION:
            texts = texts_of(task, data)
            logits = predict(model, tokenizer, texts, batch_size=batch_size, max_length=length, progress=progress)
            found = logits.squeeze(-1) if task.is_regression else logits.argmax(-1)
            return _glue(task, found.tolist(), data)
        if form == SPANS:
            windows = span_windows(model, tokenizer, data, batch_size, length, progress)
            return score_answers(task, answers_of(task, data, windows), data)
        written = write(model, tokenizer, task, data, batch_size, length, progress)
    return score_written(task, written, data)


def score_written(task: Task, written: list[str], data: Any) -> dict[str, float]:
    """Every metric of the task for what a model wrote for every row."""
    if task.is_qa:
        answers = {key: (read_answer(task, text), 0.0) for key, text in zip(data["id"], written, strict=True)}
        return score_answers(task, answers, data)
    references = list(data["label"])
    labels = [read_label(task, text, reference) for text, reference in zip(written, references, strict=True)]
    return _glue(task, labels, data)


def _glue(task: Task, predictions: list[Any], data: Any) -> dict[str, float]:
    result = GlueMetric(task.name).compute(predictions=predictions, references=list(data["label"]))
    assert result is not None
    return result


def score_answers(task: Task, answers: dict[str, tuple[str, float]], data: Any) -> dict[str, float]:
    """Every metric of the task for its answers: question id -> (text, probability that there is none)."""
    predictions = [{"id": key, "prediction_text": text} for key, (text, _) in answers.items()]
    if task.answers == "optional":
        for item, (_, probability) in zip(predictions, answers.values(), strict=True):
            item["no_answer_probability"] = probability  # type: ignore[assignment]
    references = [{"id": key, "answers": value} for key, value in zip(data["id"], data["answers"], strict=True)]
    result = SquadMetric(task.name).compute(predictions=predictions, references=references)
    assert result is not None
    return result


@torch.no_grad()
def span_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    data: Any,
    batch_size: int,
    max_length: int,
    progress: bool | None,
) -> list[list[Window]]:
    """The logits of every row's windows."""
    tokenizer = right_padding(tokenizer)
    contexts = list(data["context"])
    encoded = encode_windows(tokenizer, list(data["question"]), contexts, max_length)
    names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoded]
    owners = encoded["overflow_to_sample_mapping"]
    order = sorted(range(len(owners)), key=lambda i: len(encoded["input_ids"][i]))
    windows: list[list[Window]] = [[] for _ in contexts]
    with tqdm(
        total=len(order), unit="window", desc="answer", disable=None if progress is None else not progress
    ) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = {name: [encoded[name][i] for i in chosen] for name in names}
            outputs = model(**tokenizer.pad(rows, return_tensors="pt").to(model.device))
            pairs = zip(chosen, outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu(), strict=True)
            for i, starts, ends in pairs:
                offsets = encoded["offset_mapping"][i]
                kinds = encoded.sequence_ids(i)
                known = [offset if kind == 1 else None for offset, kind in zip(offsets, kinds, strict=True)]
                size = len(known)
                windows[owners[i]].append(Window(starts[:size].numpy(), ends[:size].numpy(), known))
            bar.update(len(chosen))
    return windows


def answers_of(task: Task, data: Any, windows: list[list[Window]]) -> dict[str, tuple[str, float]]:
    """Question id -> (answer, probability that there is none)."""
    answers = {}
    for key, context, found in zip(data["id"], data["context"], windows, strict=True):
        answer = best_answer(context, found, task.answers == "optional")
        answers[key] = (answer.text, answer.no_answer_probability)
    return answers


@torch.no_grad()
def write(
    model: Any, tokenizer: Any, task: Task, data: Any, batch_size: int, max_length: int, progress: bool | None
) -> list[str]:
    """What the model writes for every row, greedily."""
    tokenizer = right_padding(tokenizer)
    longest = max_target_tokens(task, tokenizer)
    sources = [source_text(task, row) for row in data]
    order = np.argsort([len(source) for source in sources], kind="stable").tolist()
    written = [""] * len(sources)
    with tqdm(total=len(order), unit="text", desc="write", disable=None if progress is None else not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [sources[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(model.device)
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}  # not BERT's token types
            told = {"max_new_tokens": longest, "do_sample": False, "num_beams": 1, **writing_options(model)}
            tokens = model.generate(**inputs, **told)
            for i, text in zip(chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
                written[i] = text
            bar.update(len(chosen))
    return written
