"""`tcsp export`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..errors import TCSPError
from ..export import to_plain_t5
from ..export.ctranslate2 import to_ctranslate2
from ..files import check_output_folder, new_folder
from ..loading import load_model, load_tokenizer
from .common import JsonOption, ModelArgument, OverwriteOption, QuietOption, print_json, progress_of

FORMATS = ("t5", "ctranslate2")


def export_command(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            "-f",
            help="t5: a stock T5 or mT5 checkpoint that needs no code of this package. ctranslate2: the same for "
            "CTranslate2's runtime.",
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
    progress_of(quiet, as_json)
    small = load_model(model, "auto")
    tokenizer = load_tokenizer(model)
    plain = to_plain_t5(small)
    with new_folder(output, overwrite) as staging:
        if form == "t5":
            plain.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
        else:
            with tempfile.TemporaryDirectory() as folder:
                plain.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                to_ctranslate2(folder, staging)
    if as_json:
        print_json({"output": str(output), "format": form, "class": type(plain).__name__})
    else:
        typer.echo(f"{type(plain).__name__}: {output}")
