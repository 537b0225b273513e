"""`tcsp bench mteb`."""

from typing import Annotated, Any

import typer

from ...errors import TCSPError
from ...evaluation.mteb_tasks import TASKS, evaluate, local_task, require_mteb
from ...export.sentence_transformer import load_source
from ...loading import resolve_name
from ..common import JsonOption, QuietOption, print_json, print_table, progress_of
from .common import names_of


def mteb_command(
    model: Annotated[str, typer.Option(help="The compressed encoder: a folder of sentence-transformers.")],
    dense: Annotated[str, typer.Option(help="The dense one: a folder or a Hub name.")] = "all-MiniLM-L6-v2",
    tasks: Annotated[str, typer.Option(help=f"With commas, of: {', '.join(TASKS)}.")] = "squad-sample",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 64,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score two encoders with MTEB's own evaluator (pip install mteb) on tasks that need no network.

    Example: tcsp bench mteb --model small-st/ --dense all-MiniLM-L6-v2
    """
    progress_of(quiet, as_json)
    require_mteb()
    chosen = {name: local_task(name) for name in names_of(tasks)}
    sources = {}
    for label, name in (("dense", dense), ("compressed", model)):
        source = load_source(resolve_name(name))
        if source is None:
            raise TCSPError(f"{name!r} has no modules.json, so it is no sentence-transformers model: give a folder.")
        sources[label] = source
    scores: dict[str, Any] = {}
    for name, task in chosen.items():
        found = {label: evaluate(source, task, batch_size) for label, source in sources.items()}
        scores[name] = {"metric": task.metadata.main_score, **found}
    if as_json:
        print_json({"model": model, "dense": dense, "scores": scores})
        return
    rows = []
    for name, entry in scores.items():
        values = [entry[label]["main_score"] for label in sources]
        change = f"{100 * (values[1] - values[0]):+.2f}"
        rows.append([f"{name}, {entry['metric']}", *(f"{100 * value:.2f}" for value in values), change])
    print_table(f"{model} by MTEB", ["", "dense", "compressed", "change"], rows)
