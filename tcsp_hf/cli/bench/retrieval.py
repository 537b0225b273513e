"""`tcsp bench retrieval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ...data.sources import load_data
from ...errors import TCSPError
from ...evaluation.embeddings import embed, encoder_below
from ...evaluation.retrieval import RANKS, Encoder, Search, compare_search
from ...evaluation.scoring import Similarity
from ...export.sentence_transformer import load_source
from ...files import check_output_file, write_whole
from ...loading import load_model, load_tokenizer, resolve_name
from ...publish.card import shown_path
from ...publish.results import CardResults, Evaluation
from ..common import JsonOption, QuietOption, print_json, print_table, progress_of
from .common import SeedOption

_LABELLED = "test-labelled"
_RECALLS = ("dense on dense", "compressed on compressed", "compressed on dense", "dense on compressed")


def encoder_of(name: str, batch_size: int, progress: bool | None) -> Encoder:
    """How the model of a folder or a Hub name embeds: by its own sentence-transformers modules where it has them,
    otherwise by the mean of its tokens' last states, a head left out.

    Raises:
        TCSPError: it cannot be loaded, or it is no encoder.
    """
    if Path(name).is_dir() and not (Path(name) / "modules.json").is_file():
        model, tokenizer = encoder_below(load_model(name)), load_tokenizer(name)

        def mean_pooled(texts: Sequence[str], description: str) -> torch.Tensor:
            return embed(model, tokenizer, texts, batch_size=batch_size, progress=progress, description=description)

        return mean_pooled
    source = load_source(name)
    if source is None:
        raise TCSPError(f"{name!r} has no modules.json, so it is no sentence-transformers model: give a folder.")

    def encode(texts: Sequence[str], description: str) -> torch.Tensor:
        found: torch.Tensor = source.encode(
            list(texts),
            batch_size=batch_size,
            convert_to_tensor=True,
            normalize_embeddings=True,
            show_progress_bar=progress is None,
        )
        return found.float().cpu()

    return encode


def retrieval_command(
    model: Annotated[
        str,
        typer.Option(help="The compressed encoder: a folder of sentence-transformers, or a plain one (mean-pooled)."),
    ],
    dense: Annotated[str, typer.Option(help="The dense one: a folder or a Hub name.")] = "all-MiniLM-L6-v2",
    data: Annotated[str, typer.Option(help="Data with SQuAD's columns, by name.")] = "squad",
    split: Annotated[str, typer.Option(help="Of that data.")] = "validation",
    questions: Annotated[
        int | None, typer.Option(help="Ask this many, drawn by the seed; all by default.", min=1)
    ] = None,
    sts_split: Annotated[
        str,
        typer.Option(
            help="Labelled split of STS-B; 'test-labelled' where TCSP_DATA_DIR has glue/stsb/test-labelled.parquet "
            "(the Hub hides its labels), '' for none."
        ),
    ] = "validation",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 64,
    seed: SeedOption = 0,
    max_drop: Annotated[
        float | None,
        typer.Option(help="Exit with status 1 if recall@1 of the compressed queries on the dense index falls by more."),
    ] = None,
    card_results: Annotated[
        Path | None, typer.Option(help="Write a JSON for `tcsp card --results`.", show_default=False)
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search with dense and compressed queries on the dense and on the compressed index, and STS-B.

    With SQuAD v1.1's validation split: 10,570 questions, 2,067 paragraphs.

    Example: tcsp bench retrieval --model small-st/ --dense all-MiniLM-L6-v2 --sts-split test-labelled
    """
    if card_results is not None:
        check_output_file(card_results, "--card-results")
    bars = progress_of(quiet, as_json)
    search = Search.of(load_data(data, split), questions, seed)
    pairs = load_data("stsb", sts_split) if sts_split else None
    encoders = [encoder_of(resolve_name(name), batch_size, bars) for name in (dense, model)]
    result: dict[str, Any] = {"dense": dense, "model": model, "data": data, "split": split, "seed": seed}
    result |= compare_search(search, *encoders)
    if pairs is not None:
        result["stsb"] = {"split": sts_split, **_similarity(pairs, encoders)}
    if card_results is not None:
        write_whole(card_results, CardResults(evaluations=evaluations_of(result)).to_json())
    if as_json:
        print_json(result)
    else:
        _show(result)
    first = {name: recalls[0] for name, recalls in result["recall"].items()}
    drop = first["dense on dense"] - first["compressed on dense"]
    if max_drop is not None and drop > max_drop:
        typer.echo(f"Short of the bar: recall@1 falls by {drop:.4f}, more than {max_drop}.", err=True)
        raise typer.Exit(1)


def _similarity(pairs: Any, encoders: Sequence[Encoder]) -> dict[str, Any]:
    """Spearman correlation with the human scores, of both models.

    Raises:
        TCSPError: the split's labels are hidden.
    """
    columns = [list(pairs[name]) for name in ("sentence1", "sentence2", "label")]
    if min(columns[2]) < 0:
        raise TCSPError("The labels of this split of STS-B are hidden: take --sts-split validation.")
    task = Similarity("stsb", list(zip(columns[0], columns[1], strict=True)), columns[2])
    reference, outputs = (encode([str(text) for text in task.texts()], "STS-B") for encode in encoders)
    scores = {"dense": task.score(reference, reference).score, "compressed": task.score(reference, outputs).score}
    return {"pairs": task.items, **scores}


def evaluations_of(result: dict[str, Any]) -> tuple[Evaluation, ...]:
    """As a model card has them."""
    data = shown_path(result["data"])
    name = f"{data}, {result['questions']} questions about {result['paragraphs']} paragraphs"
    source = "rajpurkar/squad" if result["data"] == "squad" else data
    own, dense = result["recall"]["compressed on compressed"], result["recall"]["dense on dense"]
    crossed = result["recall"]["compressed on dense"]
    found = []
    for i, rank in enumerate(RANKS):
        task, split = "sentence-similarity", result["split"]
        found.append(Evaluation(task, source, split, f"recall@{rank}", own[i], dense[i], name=name))
        metric = f"recall@{rank} on the dense index"
        found.append(Evaluation(task, source, split, metric, crossed[i], dense[i], name=name))
    if "stsb" in result:
        entry = result["stsb"]
        scores = entry["compressed"], entry["dense"]
        labelled = entry["split"] == _LABELLED  # the Hub's test split hides its labels: a local copy has them
        split = "test" if labelled else entry["split"]
        called = "STS-B, test split with its labels" if labelled else None
        task = "sentence-similarity"
        found.append(Evaluation(task, "nyu-mll/glue", split, "spearmanr", *scores, config="stsb", name=called))
    return tuple(found)


def _show(result: dict[str, Any]) -> None:
    base = result["recall"]["dense on dense"]
    rows = []
    for name in _RECALLS:
        recalls = result["recall"][name]
        cells = [f"{recall:.1%} ({100 * (recall - best):+.1f})" for recall, best in zip(recalls, base, strict=True)]
        queries, _, index = name.partition(" on ")
        rows.append([f"{queries} queries, {index} index", *cells])
    cosine = result["cosine"]
    note = f"Mean cosine of both models' vectors: paragraphs {cosine['paragraphs']:.4f}, "
    note += f"questions {cosine['questions']:.4f}."
    if "stsb" in result:
        entry = result["stsb"]
        note += f" STS-B {entry['split']}, Spearman: {entry['dense']:.4f} dense, {entry['compressed']:.4f} compressed."
    title = f"{result['model']}: {result['questions']:,} questions, {result['paragraphs']:,} paragraphs"
    print_table(title, ["", *(f"recall@{rank}" for rank in RANKS)], rows, note)
