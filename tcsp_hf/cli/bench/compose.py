"""`tcsp bench compose`."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...compression import removed_fraction
from ...errors import TCSPError
from ...evaluation.comparison import Comparison
from ...evaluation.compose import WAYS, adapt, choose_ways, compare_ways
from ...evaluation.latency import check_length, random_inputs
from ...evaluation.scoring import Classification
from ...files import check_output_file, write_whole
from ...loading import load_model
from ...publish.card import shown_path
from ...publish.results import CardResults, Evaluation, Latency
from ...tasks.table import TASKS, form_of
from ...train.finetune import Schedule, choose_rows, finetune
from ..common import JsonOption, QuietOption, print_json, print_table, progress_of, this_machine
from ..finetune import bars_hidden
from .common import SeedOption, names_of


def compose_command(
    model: Annotated[str, typer.Option(help="The compressed classifier: a folder or a Hub name.")],
    dense: Annotated[str, typer.Option(help="The dense one.")],
    task: Annotated[str, typer.Option(help="A GLUE task with classes, or a folder with both splits.")] = "sst2",
    ways: Annotated[
        str | None,
        typer.Option(help=f"With commas, of: {', '.join(WAYS)}; by default all whose packages are installed."),
    ] = None,
    lora_samples: Annotated[
        int, typer.Option(help="Training rows of a GLUE task for LoRA on the compressed model; 0 for none.", min=0)
    ] = 0,
    lr: Annotated[float, typer.Option(help="Highest learning rate of LoRA.")] = 3e-4,
    batch: Annotated[int, typer.Option(help="Sequences of the timed batch.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of each.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 11,
    eval_samples: Annotated[int | None, typer.Option(help="Only the first validation rows.", min=1)] = None,
    seed: SeedOption = 0,
    card_results: Annotated[
        Path | None, typer.Option(help="Write a JSON for `tcsp card --results`.", show_default=False)
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """What other libraries make of a dense and of a compressed classifier: int8, torch.compile, device maps, LoRA.

    Size, score, distance to the dense model, and speed against the dense model as it is, in one alternating run.

    Example: tcsp bench compose --model small/ --dense my-org/my-classifier --task sst2 --lora-samples 2000
    """
    if card_results is not None:
        check_output_file(card_results, "--card-results")
    chosen = choose_ways(None if ways is None else names_of(ways))
    if lora_samples and find_spec("peft") is None:
        raise TCSPError("LoRA needs peft: pip install 'tcsp_hf[peft]'.")
    if lora_samples and task not in TASKS:
        raise TCSPError(
            f"--lora-samples trains on a GLUE task's rows, but --task is {task!r}: name a task such as 'sst2', or take "
            "--lora-samples 0."
        )
    trained = TASKS[task] if lora_samples else None
    schedule = Schedule(1.0, lr, 32, seed=seed)
    bars = progress_of(quiet, as_json)
    bench = Comparison.load(dense, task, 1, seed, bars, items=eval_samples)
    if not isinstance(bench.task, Classification):
        raise TCSPError(f"{dense!r} on {task!r}: a task with classes is needed.")
    check_length(bench.dense, length)
    torch.manual_seed(seed)
    small = load_model(model)
    data = None
    if trained is not None:
        form_of(small, trained)
        data = choose_rows(trained.load("train"), lora_samples, seed)
    models = {"dense": bench.dense, "compressed": small}
    sizes: Any = {"batch": batch, "length": length, "rounds": rounds}
    rows = compare_ways(models, chosen, bench.task, bench.tokenizer, progress=bars, **sizes)
    facts = None
    if trained is not None:
        hidden = bars_hidden(quiet, as_json)

        def train(adapted: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                finetune(adapted, bench.tokenizer, trained, data, schedule, Path(folder), hidden)

        merged, facts = adapt(small, train, random_inputs(small, batch, length))
        score = bench.score(merged)
        facts |= {bench.task.score_name: score.score, "distance": score.distance, "agreement": score.agreement}
    result = {"dense": dense, "model": model, "task": task, "seed": seed, **sizes, "items": bench.task.items}
    result |= {"removed": removed_fraction(bench.dense, small), "threads": torch.get_num_threads(), "rows": rows}
    result["lora"] = facts if facts is None else {"rows": lora_samples, "lr": lr, **facts}
    if card_results is not None:
        write_whole(card_results, _for_card(rows, task, bench.task, batch, length, eval_samples).to_json())
    if as_json:
        print_json(result)
        return
    name = bench.task.score_name
    table = [
        [f"{row['model']}, {row['way']}", row["error"].partition(":")[0], "-", "-", "-"]
        if "error" in row
        else [
            f"{row['model']}, {row['way']}",
            f"{row['bytes']:,}",
            f"{row[name]:.4f}",
            f"{row['distance']:.4f}",
            f"{row['speedup']:.2f} x",
        ]
        for row in rows
    ]
    if facts is not None:
        text = f"{facts['adapter_bytes']:,} (adapter)"
        table.append(["compressed, LoRA, merged", text, f"{facts[name]:.4f}", f"{facts['distance']:.4f}", "-"])
    title = f"{model} beside {dense} on {task}"
    note = f"{bench.task.items} items; speed at {batch} x {length} tokens, {torch.get_num_threads()} threads"
    print_table(title, ["", "bytes", name, "KL to dense", "speed"], table, note)


def _for_card(
    rows: list[dict[str, Any]], task: str, measured: Classification, batch: int, length: int, part: int | None
) -> CardResults:
    """Score and latency of both models as they are; part: so many first rows alone were asked for."""
    (dense, small), score = rows[:2], measured.score_name
    known = task in TASKS
    data, config = ("nyu-mll/glue", task) if known else (shown_path(task), None)
    split = TASKS[task].splits[0] if known else "validation"
    shown = data if config is None else f"{data} {config}"
    name = None if part is None else f"{shown}, first {measured.items:,} rows"
    found = Evaluation("text-classification", data, split, score, small[score], dense[score], config, name)
    times = Latency(batch, length, dense["ms"], small["ms"])
    return CardResults(evaluations=(found,), latency=(times,), machine=this_machine())
