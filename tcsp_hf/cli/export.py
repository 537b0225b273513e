"""`tcsp export`."""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..errors import TCSPError
from ..export import to_plain_bert, to_plain_t5
from ..export.ctranslate2 import require_lm_head, to_ctranslate2
from ..export.onnx import export_onnx, require_onnx
from ..export.openvino import export_openvino, require_openvino
from ..export.sentence_transformer import reranker_settings
from ..files import check_output_folder, new_folder
from ..loading import load_model, load_tokenizer
from .common import (
    JsonOption,
    ModelArgument,
    OverwriteOption,
    QuietOption,
    check_inputs,
    print_json,
    print_table,
    progress_of,
    write_texts,
)

logger = logging.getLogger("tcsp_hf")

FORMATS = ("t5", "bert", "ctranslate2", "onnx", "openvino")
_GRAPHS = {"onnx": (require_onnx, export_onnx), "openvino": (require_openvino, export_openvino)}
"""Forms that stand in a folder of their own beside the checkpoint."""


def export_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="t5: a stock T5 or mT5 checkpoint that needs no code of this package. bert: a stock BERT, the same "
            "function where neurons alone were cut (--axes filters --uniform; nearly, of a model without a head), "
            "otherwise one to fine-tune (--stats). ctranslate2: the T5 for CTranslate2's runtime. onnx, openvino: the "
            "checkpoint with graphs in a folder of that name, checked by that runtime.",
        ),
    ],
    stats: Annotated[
        Path | None,
        typer.Option(help="For --format bert of a narrower model: the statistics that it was made from."),
    ] = None,
    neurons: Annotated[
        int | None, typer.Option(help="For that: fewer feed-forward neurons than the model has.", min=1)
    ] = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a compressed model in another form.

    Example: tcsp export small/ plain/ --format t5
    """
    if form not in FORMATS:
        raise TCSPError(f"--format is {form!r}; allowed: {', '.join(FORMATS)}.")
    if form != "bert" and (stats is not None or neurons is not None):
        raise TCSPError(f"--stats and --neurons are for --format bert, but --format is {form!r}.")
    check_output_folder(output, overwrite)
    check_inputs(output, {"MODEL": model}, {"--stats": stats})
    found = None if stats is None else Calibration.load(stats)
    bars = progress_of(quiet, as_json)
    if form in _GRAPHS:
        _GRAPHS[form][0]()
    small = load_model(model, "float32" if form in _GRAPHS else "auto")
    if form == "ctranslate2":
        require_lm_head(type(small).__name__)
    tokenizer = load_tokenizer(model)
    settings = reranker_settings(model)
    facts: dict[str, Any] = {"output": str(output), "format": form}
    if form in _GRAPHS:
        with new_folder(output, overwrite) as staging:
            _copy_checkpoint(model, small, tokenizer, settings, staging, form)
            facts["differences"] = _GRAPHS[form][1](small, staging / form, progress=bars)
    else:
        if not settings and Path(model, "modules.json").is_file():
            logger.warning(
                "%s is a sentence-transformers folder: its pooling, prompts and later modules, and the map back to the "
                "dense model's embeddings, are not part of a stock model.",
                model,
            )
        plain = to_plain_bert(small, found, neurons=neurons, progress=bars) if form == "bert" else to_plain_t5(small)
        facts["class"] = type(plain).__name__
        with new_folder(output, overwrite) as staging, tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) if form == "ctranslate2" else staging
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            write_texts(folder, settings)
            if form == "ctranslate2":
                to_ctranslate2(folder, staging)
    if as_json:
        print_json(facts)
    elif form in _GRAPHS:
        rows = [[name, f"{difference:.1e}"] for name, difference in facts["differences"].items()]
        print_table(f"{model} -> {output / form}", ["graph", "difference to PyTorch"], rows)
    else:
        typer.echo(f"{facts['class']}: {output}")


def _copy_checkpoint(
    name: str, model: PreTrainedModel, tokenizer: Any, settings: dict[str, str], folder: Path, form: str
) -> None:
    """All files of a local checkpoint (of a sentence-transformers folder too) without those of an earlier export to the
    same form, or the model, its tokenizer and a reranker's settings."""
    if Path(name).is_dir():
        shutil.copytree(name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(form, ".*"))
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_texts(folder, settings)
