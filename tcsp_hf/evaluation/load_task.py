"""The task that a model is scored on, by its name."""

from typing import Any

from transformers import PreTrainedModel

from ..architectures import family_of
from ..data import load_squad_sample
from ..data.checks import (
    check_texts,
    labels_are_hidden,
    normalised,
    same_in_another_order,
    with_class_labels,
    with_number_labels,
)
from ..data.sources import SAMPLE, first_rows, load_data
from ..errors import TCSPError
from ..pooling import pooling_of_model
from ..tasks.inputs import input_length
from ..tasks.table import SPANS, TASKS, find_task, form_of, label_names
from .answers import Spans, Written
from .scoring import Classification, Embedding, Matthews, Regression, Retrieval, Similarity, Task, columns_of


def load_task(model: PreTrainedModel, name: str, split: str | None = None, items: int | None = None) -> Task[Any]:
    """The task that fits the model's head, from the data `name` (see `load_data`); `items`: only its first rows, of a
    search its first questions.

    `split`: the task's own evaluation split when None, "validation" of other data.

    A sequence classifier is scored on labelled texts, one with a single output on labels that are numbers; a question
    answering head on SQuAD, a sequence-to-sequence model in writing on a GLUE task or SQuAD; a BERT or a T5 encoder
    without a head on labelled pairs (`"stsb"`) or on the packaged search (`"squad-sample"`).

    Raises:
        TCSPError: no such data, or data that does not fit the head.
    """
    task = _load_task(model, name, split, items)
    task.longest = input_length(model, task.usual_length)
    if isinstance(task, Embedding):
        task.pooling = pooling_of_model(model, None)
    return task


def _load_task(model: PreTrainedModel, name: str, split: str | None, items: int | None) -> Task[Any]:
    family, head = family_of(model)
    split = split or (find_task(name).splits[0] if name in TASKS else "validation")
    encoder = head == "EncoderModel" or (family == "bert" and head == "Model")
    if head in ("ForQuestionAnswering", "ForConditionalGeneration"):
        task = find_task(name)
        kind = Spans if form_of(model, task) == SPANS else Written
        return kind(task, first_rows(task.load(split), items))
    if not encoder and head != "ForSequenceClassification":
        raise TCSPError(
            f"{type(model).__name__} cannot be scored on {name!r}: sequence classifiers, question answering, "
            "sequence-to-sequence models and sentence encoders (models without a head) can."
        )
    if name == SAMPLE:
        if not encoder:
            raise TCSPError(f"{name!r} is a search for sentence encoders; {type(model).__name__} has a head.")
        if split != "validation":
            raise TCSPError(f"{name!r} has no split {split!r}: its search is the split 'validation'.")
        sample = load_squad_sample()
        return Retrieval(name, sample.paragraphs, sample.questions[:items], sample.answers_in[:items])
    data = first_rows(load_data(name, split), items)
    if isinstance(data, list):
        raise TCSPError(f"{name!r} is text without labels: it can be calibrated on, but not scored on.")
    texts, columns = columns_of(data)
    if "label" not in data.column_names or len(data) == 0 or labels_are_hidden(data):
        raise TCSPError(f"The split {split!r} of {name!r} has no labels to score on: name another one with split=.")
    if encoder and len(columns) == 1:
        raise TCSPError(f"{name!r} has single texts; a sentence encoder is scored on labelled pairs, as in 'stsb'.")
    check_texts(data, columns, name)
    if encoder:
        numbers = list(with_number_labels(data, name)["label"])
        return Similarity(name, [pair for pair in texts if isinstance(pair, tuple)], numbers)
    if model.config.num_labels == 1:
        return Regression(name, texts, list(with_number_labels(data, name)["label"]))
    labelled = Matthews if name == "cola" else Classification
    return labelled(name, texts, _class_labels(model, data, name))


def _class_labels(model: PreTrainedModel, data: Any, name: str) -> list[int]:
    """Every row's label as the number of one of the model's outputs.

    Numbers without names of their own count a known task's labels, which the model may name in another order.
    """
    outputs = label_names(model)
    known = TASKS[name].labels if name in TASKS else ()
    if not same_in_another_order(outputs, known):
        return [int(label) for label in with_class_labels(data, outputs, name)["label"]]
    places = [normalised(outputs).index(label) for label in normalised(known)]
    return [places[int(label)] for label in with_class_labels(data, known, name)["label"]]
