"""`tcsp push`."""

from pathlib import Path
from typing import Annotated

import typer

from ..publish.push import PushPlan, plan_push, push
from .common import JsonOption, QuietOption, print_json, print_table, progress_of


def push_command(
    folder: Annotated[Path, typer.Argument(help="A compressed checkpoint.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the Hub.", show_default=False)],
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a new repository.")] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", "--branch", help="Branch, created if it is not there.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Access token; better: `hf auth login` or HF_TOKEN, which no shell history keeps."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of a repository that holds another model.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; send nothing.")] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put a compressed checkpoint on the Hub: weights, code, tokenizer and card, in one commit.

    Example: tcsp push small/ my-org/my-classifier-small --private
    """
    progress_of(quiet, as_json)
    if dry_run:
        _show(plan_push(folder, repo_id, token=token), None, as_json)
        return
    done = push(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        overwrite=overwrite,
    )
    _show(done.plan, done.url, as_json)


def _show(plan: PushPlan, url: str | None, as_json: bool) -> None:
    if as_json:
        print_json({"repo_id": plan.repo_id, "url": url, "files": plan.files, "warnings": plan.warnings})
        return
    rows = [[name, f"{size:,}"] for name, size in sorted(plan.files.items())]
    rows.append(["all", f"{sum(plan.files.values()):,}"])
    print_table(f"{plan.repo_id}: {'sent' if url else 'would be sent'}", ["file", "bytes"], rows)
    for warning in plan.warnings:
        typer.echo(f"note: {warning}", err=True)
    if url:
        typer.echo(url)
