"""Model cards: filled from a checkpoint's own configuration and from what was measured, never written by hand."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..compression import count_parameters
from ..errors import TCSPError
from ..files import write_whole
from ..version import __version__
from .checkpoint import Checkpoint, read_checkpoint
from .cuts import LayerCut, dense_sizes, layer_cuts
from .results import RESULTS_FILE, CardResults
from .secrets import redact
from .usage import is_sentence_transformer, pipeline_tag, usage

CARD_FILE = "README.md"
_PAPER = "https://arxiv.org/abs/2308.16475"


def render_card(
    checkpoint: Checkpoint | str | os.PathLike[str], results: CardResults | None = None, *, name: str | None = None
) -> str:
    """The whole card as text: YAML metadata, then Markdown.

    Args:
        checkpoint: a compressed checkpoint, or its folder.
        results: what was measured; added to what `tcsp_results.json` in the folder holds.
        name: how the model is called, a Hub name or the folder's name when None.

    Raises:
        TCSPError: the folder is no complete checkpoint, or its results are damaged.
    """
    found = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    return _render(found, stored_results(found.folder).merge(results or CardResults()), name)


def _render(found: Checkpoint, shown: CardResults, name: str | None, copied: Collection[str] = ()) -> str:
    """See `render_card`; `copied` are pictures that are still to be put beside the checkpoint."""
    for caption, file in shown.pictures.items():
        if file not in copied and not (found.folder / file).is_file():
            raise TCSPError(f"The picture {file!r} ({caption}) is not in {found.folder}: put it there first.")
    name = name or found.folder.resolve().name
    base = base_model(found, shown)
    licence = shown.license or licence_of(str((found.config.projection or {}).get("source_model", "")), base)
    parts = [
        f"# {name.rpartition('/')[2]}",
        _summary(found, base),
        _sizes(found),
        _cuts(found),
        _evaluation(shown),
        _latency(shown),
        _pictures(shown),
        f"## How to load it\n\n{usage(found, name)}",
        _limitations(found),
        _licence(licence, base),
        _made(found, shown),
    ]
    data = _metadata(found, shown, name, base, licence)
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    return redact(text)


def write_card(
    folder: str | os.PathLike[str],
    results: CardResults | None = None,
    *,
    overwrite: bool = False,
    name: str | None = None,
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
) -> Path:
    """Write `README.md` beside a checkpoint, and what it was filled from into `tcsp_results.json`.

    Args:
        folder: a checkpoint that `save_pretrained` wrote.
        results: see `render_card`.
        overwrite: replace a card that is there.
        name: see `render_card`.
        pictures: caption -> a picture anywhere, copied beside the card.

    Returns:
        The card's path.

    Raises:
        TCSPError: there is a card already and `overwrite` is False, a picture is missing, or see `render_card`;
            nothing is written then.
    """
    path = Path(folder) / CARD_FILE
    if path.exists() and not overwrite:
        raise TCSPError(f"{path} exists and is left as it is: pass overwrite=True (--overwrite) to replace it.")
    checkpoint = read_checkpoint(folder)
    sources = {caption: Path(source) for caption, source in (pictures or {}).items()}
    for caption, source in sources.items():
        if not source.is_file():
            raise TCSPError(f"The picture {source} ({caption}) is not there.")
        if (checkpoint.folder / source.name).exists() and not overwrite and not _inside(checkpoint.folder, source):
            raise TCSPError(f"{checkpoint.folder / source.name} exists: rename the picture, or pass overwrite=True.")
    added = {caption: source.name for caption, source in sources.items()}
    check_names(added)
    shown = stored_results(checkpoint.folder).merge(results or CardResults()).merge(CardResults(pictures=added))
    text = _render(checkpoint, shown, name, copied=added.values())
    for source in sources.values():
        if not _inside(checkpoint.folder, source):
            shutil.copyfile(source, checkpoint.folder / source.name)
    write_whole(checkpoint.folder / RESULTS_FILE, redact(shown.to_json()))
    write_whole(path, text)
    return path


def stored_results(folder: Path) -> CardResults:
    """Those beside the checkpoint; empty where there are none."""
    path = folder / RESULTS_FILE
    return CardResults.load(path) if path.is_file() else CardResults()


def check_names(pictures: Mapping[str, str]) -> None:
    """Raises TCSPError where two pictures (caption -> file name) would overwrite each other."""
    for name in pictures.values():
        if list(pictures.values()).count(name) > 1:
            raise TCSPError(f"Two pictures are called {name}: rename one of them.")


def _inside(folder: Path, file: Path) -> bool:
    return file.resolve().parent == folder.resolve()


# Where it comes from ------------------------------------------------------------------------------------------------


def base_model(checkpoint: Checkpoint, results: CardResults) -> str | None:
    """Hub name of the dense model; None where only a folder is known."""
    name = results.base_model or str((checkpoint.config.projection or {}).get("source_model", ""))
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    local = Path(name).exists() or getattr(transformers, name, None) is not None  # a class: the model had no name
    return None if not name or (local and not results.base_model) else name


def licence_of(source: str, base: str | None) -> str | None:
    """The licence that the dense model's own card states, in its folder or on the Hub; None where none is found."""
    try:
        if (Path(source) / CARD_FILE).is_file():
            card = ModelCard.load(Path(source) / CARD_FILE, ignore_metadata_errors=True)
        elif base is not None and not constants.HF_HUB_OFFLINE:
            card = ModelCard.load(base, ignore_metadata_errors=True)
        else:
            return None
        found = card.data.get("license")
    except Exception:  # no network, no such model, a card that no parser reads: a card is whole without this line
        return None
    return found if isinstance(found, str) else None


def _metadata(
    checkpoint: Checkpoint, results: CardResults, name: str, base: str | None, licence: str | None
) -> ModelCardData:
    scores = [
        EvalResult(
            task_type=entry.task,
            dataset_type=entry.dataset,
            dataset_name=entry.name or " ".join(part for part in (entry.dataset, entry.config) if part),
            dataset_config=entry.config,
            dataset_split=entry.split,
            metric_type=entry.metric,
            metric_value=entry.value,
        )
        for entry in results.evaluations
    ]
    sentences = is_sentence_transformer(checkpoint)
    return ModelCardData(
        language=results.language,
        license=licence,
        library_name="sentence-transformers" if sentences else "transformers",
        tags=["tcsp", "compression", "subspace-projection"],
        base_model=base,
        pipeline_tag="sentence-similarity" if sentences else pipeline_tag(checkpoint),
        datasets=list(dict.fromkeys(entry.dataset for entry in results.evaluations)) or None,
        metrics=list(dict.fromkeys(entry.metric for entry in results.evaluations)) or None,
        model_name=name.rpartition("/")[2],
        eval_results=scores or None,
    )


# The sections -------------------------------------------------------------------------------------------------------


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _link(base: str | None, checkpoint: Checkpoint) -> str:
    if base is not None:
        return f"[{base}](https://huggingface.co/{base})"
    return f"`{shown_path(str((checkpoint.config.projection or {}).get('source_model', 'a dense model')))}`"


def shown_path(text: str) -> str:
    """A name as it is; of an absolute path the last part only: a card does not tell how a disk is laid out."""
    return Path(text).name if Path(text).is_absolute() else text


def _summary(checkpoint: Checkpoint, base: str | None) -> str:
    projection = checkpoint.config.projection
    if projection is None:
        return (
            f"A `{checkpoint.class_name}`: a {checkpoint.config.model_type} model with random or trained weights that "
            "was not made by compressing another model."
        )
    revision = projection["source_revision"]
    at = f" (revision `{revision}`)" if revision else ""
    calibration = projection["calibration"]
    return (
        f"{_link(base, checkpoint)}{at} made smaller with TCSP ([arXiv 2308.16475]({_PAPER})): its hidden states were "
        f"projected onto subspaces, without labels{_training(projection)}. {projection.get('removed', 0.0):.1%} of the "
        f"parameters were removed, embeddings apart; the hidden size went from {projection['source_hidden_size']} to "
        f"{_width(checkpoint)}.\n\n"
        f"Projection: `{projection['kind']}`, `{projection['subspace']}`. Calibration: {calibration['sequences']:,} "
        f"sequences, {calibration['tokens']:,} tokens, seed {calibration['seed']}, data fingerprint "
        f"`{calibration['data_fingerprint']}`."
    )


def _training(projection: dict[str, Any]) -> str:
    trained = projection.get("options", {}).get("trained")
    return f", and then trained (on {trained})" if trained else ""


def _width(checkpoint: Checkpoint) -> str:
    """The hidden size; where sites differ, the range."""
    widths = checkpoint.config.site_widths().values()
    narrow, wide = min(widths), max(widths)
    return f"{wide}" if narrow == wide else f"between {narrow} and {wide}, by site"


def _sizes(checkpoint: Checkpoint) -> str:
    projection = checkpoint.config.projection
    count = count_parameters(checkpoint.model)
    if projection is None:
        rows = [["parameters", f"{count.total:,}"], ["without embeddings", f"{count.non_embedding:,}"]]
        return "## Size\n\n" + _table(["", "value"], [*rows, ["bytes on disk", f"{checkpoint.bytes:,}"]])
    dense, small = checkpoint.config.dense_hidden_size, checkpoint.config.hidden_size
    uneven = len(set(checkpoint.config.site_widths().values())) > 1
    pairs = [
        *([] if uneven else [("hidden size", dense, small)]),
        ("parameters", projection["source_parameters"], count.total),
        ("without embeddings", projection["source_non_embedding_parameters"], count.non_embedding),
    ]
    rows = [[what, f"{b:,}", f"{a:,}", f"{a / b - 1:+.1%}" if b else "-"] for what, b, a in pairs]
    if uneven:
        rows.insert(0, ["hidden size", f"{dense:,}", _width(checkpoint), ""])
    rows.append(["bytes on disk", "", f"{checkpoint.bytes:,}", ""])
    return "## Size\n\n" + _table(["", "dense", "compressed", "change"], rows)


def _numbers(values: list[int]) -> str:
    """One number where all agree, `-` where there is none."""
    return ", ".join(map(str, values if len(set(values)) > 1 else values[:1])) or "-"


def _cuts(checkpoint: Checkpoint) -> str:
    dense, layers = dense_sizes(checkpoint.config), layer_cuts(checkpoint.config)
    columns = ["layer", "hidden size", "kept energy", "neurons", "heads", "query/key size", "value size"]
    whole = str(dense.head_size)
    rows = [["dense", str(dense.hidden_size), "1", str(dense.neurons), str(dense.heads), whole, whole]]
    rows += [_cut_row(layer) for layer in layers]
    parts = "attention, then feed-forward"
    if any(len(layer.sites) == 3 for layer in layers):
        parts = "self-attention, then cross-attention, then feed-forward"
    return (
        "## What was cut\n\n"
        f"Several numbers in one cell: {parts}. Kept energy is the share of the normalised hidden states' mean square "
        "that the subspace holds, on the calibration text.\n\n" + _table(columns, rows)
    )


def _cut_row(layer: LayerCut) -> list[str]:
    energies = [f"{energy:.4f}" for _, energy in layer.sites if energy is not None]
    sizes = [_numbers(values) for values in (layer.neurons, layer.heads, layer.qk, layer.vo)]
    return [layer.name, _numbers([width for width, _ in layer.sites]), ", ".join(energies) or "-", *sizes]


def _evaluation(results: CardResults) -> str:
    if not results.evaluations:
        return "## Evaluation\n\nNo scores were measured for this card: measure before you use it."
    rows = []
    for entry in results.evaluations:
        data = entry.name or " ".join(part for part in (entry.dataset, entry.config) if part)
        dense = "-" if entry.dense is None else f"{entry.dense:.4f}"
        change = "-" if entry.dense is None else f"{entry.value - entry.dense:+.4f}"
        rows.append([data, entry.split, entry.metric, dense, f"{entry.value:.4f}", change])
    return "## Evaluation\n\n" + _table(["data", "split", "metric", "dense", "compressed", "change"], rows)


def _latency(results: CardResults) -> str:
    if not results.latency:
        return ""
    rows = [
        [
            f"{entry.batch} × {entry.length}",
            f"{entry.dense_ms:.1f} ms",
            f"{entry.small_ms:.1f} ms",
            f"{entry.dense_ms / entry.small_ms:.2f} ×",
        ]
        for entry in results.latency
    ]
    machine = f"Measured on {results.machine}. " if results.machine else ""
    return f"## Latency\n\n{machine}Medians of one forward pass, dense and compressed in the same run.\n\n" + _table(
        ["batch × tokens", "dense", "compressed", "faster by"], rows
    )


def _pictures(results: CardResults) -> str:
    return "\n\n".join(f"![{caption}]({file})\n\n*{caption}*" for caption, file in results.pictures.items())


def _limitations(checkpoint: Checkpoint) -> str:
    lines = [
        "- It is an approximation of the dense model and has that model's own limits and biases; which inputs suffer "
        "most from the compression was not studied.",
        "- The subspaces come from the calibration text. On text of another kind or language less energy may be kept: "
        "measure there, or calibrate on it.",
    ]
    if checkpoint.config.hidden_size < checkpoint.config.dense_hidden_size:
        lines.append(
            f"- `last_hidden_state` has {checkpoint.config.hidden_size} entries, in coordinates of its own; "
            f"`model.lift(hidden)` maps it to the dense model's {checkpoint.config.dense_hidden_size}."
        )
    return "## Limitations\n\n" + "\n".join(lines)


def _licence(licence: str | None, base: str | None) -> str:
    of = f"of [{base}](https://huggingface.co/{base})" if base else "of the dense model"
    if licence is None:
        return f"## Licence\n\nThe weights derive from the dense model: the licence {of} holds. It was not found here."
    return f"## Licence\n\nThe weights derive from the dense model: the licence {of} holds, `{licence}`."


def _made(checkpoint: Checkpoint, results: CardResults) -> str:
    projection = checkpoint.config.projection
    if projection is None:
        return ""
    lines = [f"Card filled by tcsp_hf {__version__} with transformers {transformers.__version__}."]
    if results.command:
        lines.append(f"```bash\n{results.command}\n```")
    facts: dict[str, Any] = {
        "method version": projection["method_version"],
        "kind": projection["kind"],
        "subspace": projection["subspace"],
        "epsilon": projection["epsilon"],
        **projection.get("options", {}),
    }
    before = " (before the training)" if facts.get("trained") else ""
    shown = [
        [f"{key}{before if key in ('predicted_kl', 'measured_kl') else ''}", f"`{value}`"]
        for key, value in facts.items()
        if value is not None
    ]
    return "## How it was made\n\n" + "\n\n".join([*lines, _table(["option", "value"], shown)])
