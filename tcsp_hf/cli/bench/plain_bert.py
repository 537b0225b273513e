"""`tcsp bench plain-bert`."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from ...baselines.narrow import narrow_bert
from ...compression import compress, count_parameters, removed_fraction
from ...compression.sizes import meta_count
from ...errors import TCSPError
from ...evaluation.comparison import Comparison
from ...evaluation.scoring import Classification
from ...export.plain_bert import to_plain_bert
from ...tasks.table import Task, find_task, form_of
from ...train.finetune import Schedule, choose_rows, finetune
from ..common import JsonOption, QuietOption, progress_of
from ..finetune import bars_hidden
from .common import ModelOption, SeedOption, SequencesOption, TaskOption, score_columns, show

_AFTER = "after training"


def plain_bert_command(
    model: ModelOption,
    task: TaskOption = "sst2",
    remove: Annotated[float, typer.Option(help="Fraction of the parameters (embeddings apart) to remove.")] = 0.44,
    hidden_size: Annotated[
        int | None, typer.Option(help="Width of the narrow stock forms; about the exact form's by default.")
    ] = None,
    linear: Annotated[int, typer.Option(help="Linear paths among each layer's neurons in the plain form.", min=0)] = 0,
    sequences: SequencesOption = 2000,
    train_samples: Annotated[
        int, typer.Option(help="Training rows for the same fine-tuning of every form; 0 trains none.", min=0)
    ] = 4000,
    epochs: Annotated[float, typer.Option(help="Of that training.")] = 1.0,
    lr: Annotated[float, typer.Option(help="Of that training.")] = 1e-4,
    distillation: Annotated[float, typer.Option(help="Weight of the dense model's outputs beside the labels.")] = 0.9,
    eval_samples: Annotated[
        int | None, typer.Option(help="Score only the first validation rows; all by default.", min=1)
    ] = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """A compressed BERT classifier in stock BERT classes, beside the exact form and a student cut by magnitude.

    Four forms of one size: the exact form (uniform sizes), the stock form with fewer neurons (the same function as
    the compressed model that it comes from), the narrower stock form, and the narrower student; before and after the
    same fine-tuning.

    Example: tcsp bench plain-bert --model my-org/my-classifier --task sst2 --remove 0.44 --train-samples 4000
    """
    if not 0.0 < remove < 1.0:
        raise TCSPError(f"--remove is {remove!r}; it must be a fraction between 0 and 1.")
    if not 0.0 <= distillation <= 1.0:
        raise TCSPError(f"--distillation is {distillation!r}; it must be a number from 0 to 1.")
    schedule = Schedule(epochs, lr, 32, seed=seed)
    chosen = find_task(task)
    bars = progress_of(quiet, as_json)
    bench = Comparison.load(model, task, sequences, seed, bars, items=eval_samples)
    if not isinstance(bench.dense, BertForSequenceClassification) or not isinstance(bench.task, Classification):
        raise TCSPError(f"{model!r} on {task!r}: a BertForSequenceClassification and a task with classes are needed.")
    if train_samples:
        form_of(bench.dense, chosen)  # before any work: training counts the labels as the task does
    heads = int(bench.dense.config.num_attention_heads)
    check_width(hidden_size, bench.dense)
    forms = _forms(bench, remove, hidden_size, heads, linear, bars)
    data = choose_rows(chosen.load("train"), train_samples, seed) if train_samples else None
    rows: list[dict[str, Any]] = []
    for name, make in forms.items():
        try:
            form = make()
        except TCSPError as error:
            typer.echo(f"{name}: {error}", err=True)
            continue
        rows.append(_row(name, bench, form, chosen, data, schedule, distillation, bars_hidden(quiet, as_json)))
    figures = score_columns(bench)
    columns = {"form": "form", "removed": "removed", **figures}
    if data is not None:
        columns |= {f"{key} {_AFTER}": f"{head}, trained" for key, head in figures.items()}
    show(bench, model, rows, columns, as_json)


def check_width(hidden_size: int | None, dense: PreTrainedModel) -> None:
    """Refuse a width before any work.

    Raises:
        TCSPError: a width that a stock BERT with the dense one's heads cannot have.
    """
    heads, full = int(dense.config.num_attention_heads), int(dense.config.hidden_size)
    if hidden_size is not None and (not 0 < hidden_size < full or hidden_size % heads):
        raise TCSPError(f"--hidden-size is {hidden_size}; allowed: multiples of the {heads} heads below {full}.")


def neurons_for(dense: PreTrainedModel, width: int, remove: float) -> int:
    """Neurons of a stock BERT of this width that removes at least the fraction.

    Raises:
        TCSPError: none do, or the narrower width alone removes more and all the dense neurons do not make up for it.
    """

    def size(neurons: int) -> int:
        fields = {"hidden_size": width, "intermediate_size": neurons}
        config = BertConfig(**{**dense.config.to_dict(), **fields})
        return meta_count(BertForSequenceClassification, config).non_embedding

    goal = int((1.0 - remove) * count_parameters(dense).non_embedding)
    one = size(1)
    found = 1 + (goal - one) // max(1, size(2) - one)
    if found < 1:
        raise TCSPError(f"A stock BERT of width {width} cannot remove {remove:.0%}: choose a smaller --hidden-size.")
    return min(found, int(dense.config.intermediate_size))


def _forms(
    bench: Comparison, remove: float, hidden_size: int | None, heads: int, linear: int, bars: bool | None
) -> dict[str, Callable[[], PreTrainedModel]]:
    dense = bench.dense
    full = int(dense.config.hidden_size)
    chosen = [hidden_size] if hidden_size is not None else []

    def exact() -> PreTrainedModel:
        small = compress(dense, bench.stats, remove=remove, uniform=True, progress=bars)
        width = int(small.config.hidden_size)
        if not chosen:
            chosen.append(min(width, full - heads) // heads * heads)
        return small

    def width() -> int:
        return chosen[0] if chosen else full * 3 // 4 // heads * heads

    def fewer_neurons() -> PreTrainedModel:
        small = compress(dense, bench.stats, remove=remove, axes=("filters",), uniform=True, progress=bars)
        return to_plain_bert(small)

    def narrower() -> PreTrainedModel:
        neurons = neurons_for(dense, width(), remove)
        small = compress(dense, bench.stats, hidden_size=width(), multiple_of=heads, uniform=True, progress=bars)
        return to_plain_bert(small, bench.stats, neurons=neurons, linear=linear, progress=bars)

    def student() -> PreTrainedModel:
        return narrow_bert(dense, width(), neurons_for(dense, width(), remove))

    return {
        "exact form": exact,
        "stock, fewer neurons": fewer_neurons,
        "stock, narrower": narrower,
        "stock, narrower by magnitude": student,
    }


def _row(
    name: str,
    bench: Comparison,
    form: PreTrainedModel,
    task: Task,
    data: Any,
    schedule: Schedule,
    distillation: float,
    quiet: bool,
) -> dict[str, Any]:
    def figures(suffix: str = "") -> dict[str, Any]:
        score = bench.score(form)
        return {
            f"{bench.task.score_name}{suffix}": score.score,
            f"kl{suffix}": score.distance,
            f"agreement{suffix}": score.agreement,
        }

    row = {"form": name, "removed": removed_fraction(bench.dense, form), "hidden_size": form.config.hidden_size}
    row |= figures()
    if data is not None:
        with tempfile.TemporaryDirectory() as folder:
            teacher = bench.dense if distillation else None
            finetune(
                form,
                bench.tokenizer,
                task,
                data,
                schedule,
                Path(folder),
                quiet,
                teacher=teacher,
                distillation=distillation,
            )
        row |= figures(f" {_AFTER}")
    return row
