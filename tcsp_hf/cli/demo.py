"""`tcsp demo`: the main job on a real model and real text."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModel, PreTrainedModel

from ..calibration import calibrate
from ..compression import compress, count_parameters, removed_fraction
from ..compression.request import check_request
from ..data import SquadSample, load_squad_sample
from ..evaluation.embeddings import embed, recall_at
from ..evaluation.latency import compare_latency
from ..export.sentence_transformer import require_encoder
from ..files import check_output_folder, new_folder
from ..loading import DEMO_MODEL, demo_model_path, load_model, load_tokenizer
from ..plots import demo_picture, pictures_possible
from ..publish import CardResults, Evaluation, write_card
from ..publish.results import Latency
from .common import (
    JsonOption,
    OverwriteOption,
    QuietOption,
    check_inputs,
    command_line,
    folder_bytes,
    print_json,
    print_table,
    progress_of,
    this_machine,
)

_LATENCY_SHAPES = ((1, 32), (8, 128))


def demo_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the model and the picture.")] = Path(
        "tcsp-demo"
    ),
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub name of a BERT sentence encoder; all-MiniLM-L6-v2 by default.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[float, typer.Option(help="Fraction of the parameters (embeddings apart) to remove.")] = 0.25,
    paragraphs: Annotated[
        int, typer.Option(help="Paragraphs whose sentences it is calibrated on, at most 400.", min=8, max=400)
    ] = 200,
    test_paragraphs: Annotated[int, typer.Option(help="Paragraphs to search, at most 600.", min=10, max=600)] = 240,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compress a sentence encoder with no label and no training, reload it with AutoModel, and compare.

    Calibrates on sentences of SQuAD v1.1 paragraphs that the package carries (CC BY-SA 4.0), then asks questions about
    240 other paragraphs, of other articles, before and after. Under two minutes on two cores.
    """
    check_output_folder(output, overwrite)
    check_inputs(output, {"--model": model}, {})
    picture = pictures_possible()
    started = time.perf_counter()
    torch.manual_seed(0)  # of the random tokens that latency is measured on
    name = model if model is not None else demo_model_path()
    sample = load_squad_sample()
    dense = load_model(name)
    require_encoder(dense)
    check_request(dense, remove=remove)
    tokenizer = load_tokenizer(name)
    bars = progress_of(quiet, as_json)
    texts = [sentence for text in sample.calibration[:paragraphs] for sentence in _sentences(text)]
    stats = calibrate(dense, texts, tokenizer=tokenizer, max_length=256, progress=bars)
    calibrated = time.perf_counter() - started
    small = compress(dense, stats, remove=remove, progress=bars)
    widths = dict(small.config.site_widths())

    with new_folder(output, overwrite) as staging:
        small.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        dense.save_pretrained(staging / "dense")  # the same dtype on disk, to compare bytes
        dense_bytes = folder_bytes(staging / "dense")
        _remove_folder(staging / "dense")
        reloaded = AutoModel.from_pretrained(staging, dtype=torch.float32).eval()
        result = _compare(dense, reloaded, tokenizer, sample, test_paragraphs, bars)
        result["bytes"] = (dense_bytes, folder_bytes(staging))
        if picture:
            demo_picture(staging / "demo.png", stats, widths, _bars(result))
        _write_card(staging, result, name, command_line(context), picture)
    result["removed"] = removed_fraction(dense, small)
    result["hidden_size"] = (dense.config.hidden_size, min(widths.values()), max(widths.values()))
    result["seconds"] = {"calibrate": calibrated, "all": time.perf_counter() - started}
    _show(model if model is not None else DEMO_MODEL, output, stats.tokens, result, picture, as_json)


def _write_card(folder: Path, result: dict[str, Any], model: str, command: str, picture: bool) -> None:
    scores = tuple(
        Evaluation(
            "sentence-similarity",
            "rajpurkar/squad",
            "validation",
            f"recall@{rank}",
            result["recall_small"][i],
            result["recall_dense"][i],
            name=f"SQuAD v1.1, {result['questions']} questions about {result['paragraphs']} paragraphs",
        )
        for i, rank in enumerate((1, 10))
    )
    times = tuple(
        Latency(entry["batch"], entry["length"], entry["dense_ms"], entry["small_ms"]) for entry in result["latency"]
    )
    shown = CardResults(
        command=command,
        base_model=DEMO_MODEL if model == demo_model_path() else None,  # the card looks whether it is a folder
        license="apache-2.0" if model == demo_model_path() else None,
        machine=this_machine(),
        evaluations=scores,
        latency=times,
    )
    write_card(folder, shown, pictures={"Spectra, and the comparison": folder / "demo.png"} if picture else None)


def _sentences(paragraph: str) -> list[str]:
    """The first sentence and the one in the middle: many short texts teach more than few long ones (see the log)."""
    found = [text for text in re.split(r"(?<=[.!?])\s+(?=[A-Z])", paragraph) if len(text) > 20] or [paragraph]
    return found[:1] + found[len(found) // 2 : len(found) // 2 + 1] if len(found) > 1 else found


def _remove_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _compare(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    tokenizer: Any,
    sample: SquadSample,
    paragraphs: int,
    bars: bool | None,
) -> dict[str, Any]:
    pairs = [pair for pair in zip(sample.questions, sample.answers_in, strict=True) if pair[1] < paragraphs]
    asked, answers = [question for question, _ in pairs], [answer for _, answer in pairs]
    embeddings = {}
    for label, model in (("dense", dense), ("small", small)):
        for kind, texts in (("paragraphs", sample.paragraphs[:paragraphs]), ("questions", asked)):
            embeddings[label, kind] = embed(model, tokenizer, texts, progress=bars, description=f"{label} {kind}")
    result: dict[str, Any] = {"questions": len(asked), "paragraphs": paragraphs}
    for label in ("dense", "small"):
        result[f"recall_{label}"] = recall_at(
            embeddings[label, "questions"], embeddings[label, "paragraphs"], answers, (1, 10)
        )
    result["recall_small_on_dense_index"] = recall_at(
        embeddings["small", "questions"], embeddings["dense", "paragraphs"], answers, (1, 10)
    )
    cosines = (embeddings["dense", "paragraphs"] * embeddings["small", "paragraphs"]).sum(1)
    result["cosine"] = float(cosines.mean())
    result["parameters"] = (count_parameters(dense).total, count_parameters(small).total)
    result["non_embedding_parameters"] = (
        count_parameters(dense).non_embedding,
        count_parameters(small).non_embedding,
    )
    timed = [compare_latency(dense, small, batch, length) for batch, length in _LATENCY_SHAPES]
    result["latency"] = [
        {
            "batch": p.batch,
            "length": p.length,
            "dense_ms": p.dense_ms,
            "small_ms": p.small_ms,
            "speedup": p.speedup,
        }
        for p in timed
    ]
    return result


def _bars(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    bars = {
        "parameters": result["parameters"],
        "without embeddings": result["non_embedding_parameters"],
        "bytes on disk": result["bytes"],
    }
    for entry in result["latency"]:
        bars[f"latency {entry['batch']}×{entry['length']}"] = (entry["dense_ms"], entry["small_ms"])
    for i, rank in enumerate((1, 10)):
        bars[f"recall@{rank}"] = (result["recall_dense"][i], result["recall_small"][i])
    return bars


def _show(name: str, output: Path, tokens: int, result: dict[str, Any], picture: bool, as_json: bool) -> None:
    if as_json:
        print_json({"model": name, "output": str(output), "calibration_tokens": tokens, **result})
        return
    dense_width, narrowest, widest = result["hidden_size"]
    rows = [["hidden size, by site", str(dense_width), f"{narrowest} to {widest}", ""]]
    for label, key in (("parameters", "parameters"), ("  without embeddings", "non_embedding_parameters")):
        before, after = result[key]
        rows.append([label, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"])
    before, after = result["bytes"]
    rows.append(["bytes on disk", f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"])
    for entry in result["latency"]:
        rows.append(
            [
                f"latency, {entry['batch']} x {entry['length']} tokens",
                f"{entry['dense_ms']:.1f} ms",
                f"{entry['small_ms']:.1f} ms",
                f"{entry['speedup']:.2f} x faster",
            ]
        )
    for i, rank in enumerate((1, 10)):
        dense, small = result["recall_dense"][i], result["recall_small"][i]
        rows.append([f"SQuAD recall@{rank}", f"{dense:.1%}", f"{small:.1%}", f"{100 * (small - dense):+.1f} points"])
    dense, small = result["recall_dense"][0], result["recall_small_on_dense_index"][0]
    rows.append(
        [
            "recall@1, small queries, dense index",
            f"{dense:.1%}",
            f"{small:.1%}",
            f"{100 * (small - dense):+.1f} points",
        ]
    )
    rows.append(["cosine to the dense embeddings", "1", f"{result['cosine']:.4f}", ""])
    seconds = result["seconds"]
    note = (
        f"{tokens:,} calibration tokens, no label, no training; {result['questions']} questions, "
        f"{result['paragraphs']} paragraphs; {seconds['all']:.0f} s in all on {torch.get_num_threads()} threads. "
        "Latency: medians of alternating runs."
    )
    print_table(f"{name}: {result['removed']:.1%} removed", ["", "dense", "compressed", "change"], rows, note)
    typer.echo(f"Model: {output}  (transformers: import tcsp_hf; AutoModel.from_pretrained({str(output)!r}))")
    if picture:
        typer.echo(f"Picture: {output / 'demo.png'}")
    else:
        typer.echo("No picture: pip install 'tcsp_hf[plots]' for one.")
