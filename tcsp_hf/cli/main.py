"""`tcsp`: the entry point and its commands."""

import logging
import sys

import typer

from ..errors import ends_a_command, message_of
from ..version import __version__
from .bench import bench_app
from .calibrate import calibrate_command
from .card import card_command
from .common import hide_library_bars
from .compress import compress_command
from .demo import demo_command
from .export import export_command
from .finetune import evaluate_command, finetune_command
from .inspect import inspect_command
from .push import push_command
from .selftest import selftest_command
from .train import train_command

app = typer.Typer(
    name="tcsp",
    help="Make BERT and T5 smaller by shrinking their hidden size, without labels and without training.\n\n"
    "Start with [bold]tcsp demo[/bold]. Then: [bold]tcsp inspect MODEL[/bold] shows what a width would save, "
    "[bold]tcsp calibrate MODEL[/bold] collects statistics once, and [bold]tcsp compress MODEL[/bold] cuts any size "
    "from them. The result loads with transformers' AutoModel.from_pretrained.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("demo")(demo_command)
app.command("calibrate")(calibrate_command)
app.command("compress")(compress_command)
app.command("inspect")(inspect_command)
app.command("finetune")(finetune_command)
app.command("evaluate")(evaluate_command)
app.command("train")(train_command)
app.command("card")(card_command)
app.command("push")(push_command)
app.command("export")(export_command)
app.command("selftest")(selftest_command)
app.add_typer(bench_app, name="bench")


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not sys.stderr.isatty():
        hide_library_bars()


def run() -> None:
    """Run the command line; a bad request, a full disk or too little memory ends with its message and status 2."""
    try:
        app()
    except Exception as error:
        if not ends_a_command(error):
            raise
        typer.echo(f"error: {message_of(error)}", err=True)
        sys.exit(2)
