"""`tcsp card`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..calibration import Calibration
from ..errors import TCSPError
from ..publish.card import render_card, write_card
from ..publish.checkpoint import read_checkpoint
from ..publish.results import CardResults
from ..publish.shelf import shelve_card


def card_command(
    folder: Annotated[Path, typer.Argument(help="A compressed checkpoint.", show_default=False)],
    results: Annotated[Path | None, typer.Option(help="JSON of what was measured (see publish/results.py).")] = None,
    stats: Annotated[Path | None, typer.Option(help="Its statistics: adds a picture of the spectra.")] = None,
    picture: Annotated[
        list[str] | None, typer.Option(help="A picture to show, as FILE or CAPTION=FILE; may be repeated.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub name of the dense model.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="Of the dense model, as apache-2.0.")] = None,
    language: Annotated[str | None, typer.Option(help="Of the dense model, as en.")] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called; a Hub name or the folder's.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A .md file elsewhere for the card; pictures go beside it.", show_default=False
        ),
    ] = None,
    index: Annotated[bool, typer.Option("--index", help="With -o: a table of all cards there as README.md.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Print the card and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a card that is there.")] = False,
) -> None:
    """Write the model card (README.md) of a compressed checkpoint, from its configuration and measured results.

    Example: tcsp card small/ --results scores.json --license apache-2.0 --overwrite
    """
    if index and output is None:
        raise TCSPError("--index makes a table beside the file that -o names: give -o.")
    for option, value in (("--output", output), ("--picture", picture), ("--stats", stats)):
        if show and value:
            raise TCSPError(f"--print writes nothing, so {option} has no place: leave one of them out.")
    given = CardResults(base_model=base_model, license=licence, language=language)
    found = (CardResults() if results is None else CardResults.load(results)).merge(given)
    if show:
        sys.stdout.write(render_card(folder, found, name=name))
        return
    pictures = dict(_caption(text) for text in picture or [])

    def write(shown: dict[str, str]) -> Path:
        if output is None:
            return write_card(folder, found, overwrite=overwrite, name=name, pictures=shown)
        return shelve_card(folder, output, found, overwrite=overwrite, name=name, pictures=shown, index=index)

    path = write(pictures) if stats is None else _with_spectra(folder, stats, pictures, write)
    typer.echo(f"Card: {path}")


def _caption(text: str) -> tuple[str, str]:
    caption, sign, file = text.partition("=")
    return (caption, file) if sign else (Path(text).stem.replace("_", " ").replace("-", " "), text)


def _with_spectra(folder: Path, stats: Path, pictures: dict[str, str], write: Callable[[dict[str, str]], Path]) -> Path:
    import tempfile

    from ..plots import spectrum_picture

    checkpoint = read_checkpoint(folder)
    statistics = Calibration.load(stats)
    recorded = (checkpoint.config.projection or {}).get("calibration", {})
    if statistics.summary() != recorded:
        raise TCSPError(f"The statistics {stats} are not those that {folder} was made from: name the right ones.")
    with tempfile.TemporaryDirectory() as staging:
        drawn = Path(staging) / "spectrum.png"
        spectrum_picture(drawn, statistics, checkpoint.config.site_widths())
        caption = "Energy that k directions leave out, for every site; dots: the widths that were kept"
        return write({**pictures, caption: str(drawn)})
