"""`tcsp export`."""

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from ..errors import TCSPError
from ..export import to_plain_t5
from ..export.ctranslate2 import to_ctranslate2
from ..export.onnx import export_onnx, require_onnx
from ..files import check_output_folder, new_folder
from ..loading import load_model, load_tokenizer
from .common import JsonOption, ModelArgument, OverwriteOption, QuietOption, print_json, print_table, progress_of

FORMATS = ("t5", "ctranslate2", "onnx")


def export_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="t5: a stock T5 or mT5 checkpoint that needs no code of this package. ctranslate2: the same for "
            "CTranslate2's runtime. onnx: the checkpoint with its graphs in onnx/, checked by ONNX Runtime.",
        ),
    ],
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a compressed model in another form.

    Example: tcsp export small/ plain/ --format t5
    """
    if form not in FORMATS:
        raise TCSPError(f"--format is {form!r}; allowed: {', '.join(FORMATS)}.")
    check_output_folder(output, overwrite)
    bars = progress_of(quiet, as_json)
    if form == "onnx":
        require_onnx()
    small = load_model(model, "float32" if form == "onnx" else "auto")
    tokenizer = load_tokenizer(model)
    facts: dict[str, Any] = {"output": str(output), "format": form}
    if form == "onnx":
        with new_folder(output, overwrite) as staging:
            _copy_checkpoint(model, small, tokenizer, staging)
            facts["differences"] = export_onnx(small, staging / "onnx", progress=bars)
    else:
        plain = to_plain_t5(small)
        facts["class"] = type(plain).__name__
        with new_folder(output, overwrite) as staging, tempfile.TemporaryDirectory() as temporary:
            folder = staging if form == "t5" else Path(temporary)
            plain.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if form == "ctranslate2":
                to_ctranslate2(folder, staging)
    if as_json:
        print_json(facts)
    elif form == "onnx":
        rows = [[name, f"{difference:.1e}"] for name, difference in facts["differences"].items()]
        print_table(f"{model} -> {output / 'onnx'}", ["graph", "difference to PyTorch"], rows)
    else:
        typer.echo(f"{facts['class']}: {output}")


def _copy_checkpoint(name: str, model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """All files of a local checkpoint (of a sentence-transformers folder too), or the model and its tokenizer."""
    if Path(name).is_dir():
        shutil.copytree(name, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("onnx", ".*"))
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
