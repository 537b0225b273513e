"""A model with the head that a task needs, from any checkpoint."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)

from ..architectures import family_of
from ..errors import TCSPError, ends_a_command
from ..loading import UNREADABLE, check_shards, find_source, load_model
from ..tasks.table import CLASSIFICATION, SPANS, TEXT, Task

_PRETRAINED = [("bert", head) for head in ("Model", "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction")]


def default_form(config: Any, task: Task) -> str:
    """Encoder-decoders write text, encoders carry a head."""
    return TEXT if getattr(config, "is_encoder_decoder", False) else task.form


def load_for_task(
    name: str, task: Task, form: str | None = None, seed: int = 0, random_weights: bool = False
) -> tuple[PreTrainedModel, str]:
    """The model with the task's head, in float32, and how it answers.

    A head that the checkpoint lacks starts at random weights drawn from `seed`.

    Args:
        form: `"classification"`, `"spans"` or `"text"`; None chooses by the architecture (see `default_form`).
        random_weights: read the configuration alone; all weights are drawn from `seed`.

    Raises:
        TCSPError: the checkpoint cannot be read, or cannot answer in this form.
    """
    path = find_source(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        chosen = form or default_form(config, task)
        if chosen not in (task.form, TEXT):
            raise TCSPError(f"form is {chosen!r}; {task.name!r} allows {task.form!r} and {TEXT!r}.")
        if chosen == TEXT and not getattr(config, "is_encoder_decoder", False):
            raise TCSPError(f"{name!r} is no encoder-decoder, so it cannot write text: take form {task.form!r}.")
        set_seed(seed)
        fields: dict[str, Any] = {}
        if chosen == SPANS:
            fields["num_labels"] = 2  # start and end; a checkpoint of another task may say otherwise
        if chosen == CLASSIFICATION:
            fields["num_labels"] = max(1, len(task.labels))
            if task.labels:
                fields["id2label"] = dict(enumerate(task.labels))
                fields["label2id"] = {label: i for i, label in enumerate(task.labels)}
                fields["problem_type"] = "single_label_classification"  # a checkpoint of another task may say otherwise
            else:
                fields["problem_type"] = "regression"
        loader: Any = {
            CLASSIFICATION: AutoModelForSequenceClassification,
            SPANS: AutoModelForQuestionAnswering,
            TEXT: AutoModelForSeq2SeqLM,
        }[chosen]
        if random_weights:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **fields)
            model = loader.from_config(config, dtype=torch.float32)
        else:
            check_shards(Path(path))
            fields |= {"ignore_mismatched_sizes": True, "trust_remote_code": False}
            model = loader.from_pretrained(path, dtype="float32", **fields)
    except TCSPError:
        raise
    except (*UNREADABLE, RuntimeError) as error:
        if isinstance(error, RuntimeError) and ends_a_command(error):
            raise  # of memory, not of sizes
        raise TCSPError(f"The model {name!r} cannot be loaded: {error}") from error
    return model, chosen


def load_dense(name: str, task: Task | None, seed: int = 0) -> tuple[PreTrainedModel, bool]:
    """A dense model as it was saved, a BERT that was only pretrained under a new head; and whether the head is new.

    Raises:
        TCSPError: the checkpoint cannot be read, or is not one of a dense model that can be compressed.
    """
    model = load_model(name)
    if task is None or family_of(model) not in _PRETRAINED:
        return model, False
    return load_for_task(name, task, seed=seed)[0], True
