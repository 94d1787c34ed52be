"""The commands that show results to others: `loram push` uploads a folder, and `loram report` compares runs."""

import json as json_text
from pathlib import Path
from typing import Any

import typer

from loram.base.errors import UserError
from loram.base.options import Options, option
from loram.cli.console import console


class Push(Options):
    """The flags of `loram push`."""

    private: bool = option(False, "Make the repository a private one, if it does not exist yet.")
    revision: str | None = option(None, "The branch to upload to (default: the main branch).")
    dry_run: bool = option(False, "List the files and what is left out, and upload nothing.")


class Report(Options):
    """The flags of `loram report`."""

    html: Path | None = option(None, "Write a page with all runs to this file, which must not exist yet.")


def push(folder: Path, repo: str, *, json: bool = False, **options: Any) -> None:
    """Upload a folder that loram made to the Hugging Face hub.

    FOLDER is a pruned folder, an adapter or a model. REPO is made where it does not exist. What the manifest does not
    list, but for the model card, is left out.
    """
    from loram.disk.push import push as stage

    upload = stage(folder, repo, **options)
    if json:
        typer.echo(upload.model_dump_json())
        return
    width = max(map(len, upload.files))
    for name, size in upload.files.items():
        typer.echo(f"{name:{width}}  {size:>14,} bytes")
    if upload.left_out:
        typer.echo(f"left out: {', '.join(upload.left_out)}")
    total = f"{len(upload.files)} files, {sum(upload.files.values()) / 1e6:,.1f} MB"
    typer.echo(f"{total}, uploaded to {upload.url}" if upload.url else f"{total}; nothing was uploaded: a dry run")


def report(runs: list[str] | None, *, html: Path | None = None, json: bool = False) -> None:
    """Show what runs have given, one table for all of them."""
    from loram.disk.artifacts import check_output
    from loram.run.overview import overview, table
    from loram.run.page import write_page
    from loram.run.results import RunResults

    if not runs:
        raise UserError("report: name at least one run, by its output_dir")
    if html is not None:
        check_output(html)
    results = [RunResults.load(run) for run in runs]
    if html is not None:
        write_page(results, html)
    if json:
        typer.echo(json_text.dumps({"runs": [line.model_dump() for line in overview(results)]}))
        return
    console().print(table(results))
    if html is not None:
        console().print(f"Page: {html}", highlight=False, soft_wrap=True)
