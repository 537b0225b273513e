"""`tcsp bench`: the commands behind the figures."""

import typer

from .budget import budget_command
from .calibrate import calibrate_bench_command
from .compose import compose_command
from .latency import latency_command
from .load import load_command
from .mteb import mteb_command
from .paper import paper_command
from .plain_bert import plain_bert_command
from .quality import quality_command
from .retrieval import retrieval_command
from .subspaces import subspaces_command
from .summary import summary_command

bench_app = typer.Typer(help="Measure: the commands behind the figures of the README.", no_args_is_help=True)
bench_app.command("subspaces")(subspaces_command)
bench_app.command("budget")(budget_command)
bench_app.command("quality")(quality_command)
bench_app.command("summary")(summary_command)
bench_app.command("calibrate")(calibrate_bench_command)
bench_app.command("latency")(latency_command)
bench_app.command("load")(load_command)
bench_app.command("paper")(paper_command)
bench_app.command("compose")(compose_command)
bench_app.command("mteb")(mteb_command)
bench_app.command("plain-bert")(plain_bert_command)
bench_app.command("retrieval")(retrieval_command)

__all__ = ["bench_app"]
