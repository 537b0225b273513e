"""The task that a model is scored on, by its name."""

from typing import Any

from transformers import PreTrainedModel

from ..architectures import family_of
from ..data import load_squad_sample
from ..data.sources import SAMPLE, first_rows, load_data
from ..errors import TCSPError
from ..tasks.table import SPANS, TASKS, find_task, form_of
from .answers import Spans, Written
from .scoring import Classification, Matthews, Regression, Retrieval, Similarity, Task, columns_of


def load_task(model: PreTrainedModel, name: str, split: str | None = None, items: int | None = None) -> Task[Any]:
    """The task that fits the model's head, from the data `name` (see `load_data`); `items`: only its first rows.

    `split`: the task's own evaluation split when None, "validation" of other data.

    A sequence classifier is scored on labelled texts, one with a single output on labels that are numbers; a question
    answering head on SQuAD, a sequence-to-sequence model in writing on a GLUE task or SQuAD; a BERT or a T5 encoder
    without a head on labelled pairs (`"stsb"`) or on the packaged search (`"squad-sample"`).

    Raises:
        TCSPError: no such data, or data that does not fit the head.
    """
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
        sample = load_squad_sample()
        return Retrieval(name, sample.paragraphs, sample.questions, sample.answers_in)
    data = first_rows(load_data(name, split), items)
    texts, labels = columns_of(data)
    if labels is None or len(labels) == 0 or min(labels) < 0:
        raise TCSPError(f"The split {split!r} of {name!r} has no labels to score on: name another one with split=.")
    if encoder:
        if isinstance(texts[0], str):
            raise TCSPError(f"{name!r} has single texts; a sentence encoder is scored on labelled pairs, as in 'stsb'.")
        return Similarity(name, [pair for pair in texts if isinstance(pair, tuple)], labels)
    classes = model.config.num_labels or 0
    if classes == 1:
        return Regression(name, texts, labels)
    if any(label != int(label) or label >= classes for label in labels):
        raise TCSPError(f"The labels of {name!r} do not fit {type(model).__name__}, which has {classes} classes.")
    labelled = Matthews if name == "cola" else Classification
    return labelled(name, texts, [int(label) for label in labels])
