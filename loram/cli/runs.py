"""Subcommands for a whole run, and to look before and after."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loram.cli.options import (
    Accumulation,
    BatchSize,
    Fresh,
    Json,
    KeepFirst,
    KeepLast,
    LoraDropout,
    LoraR,
    LoraSpShare,
    LoraTargets,
    MaxLength,
    Method,
    Pattern,
)


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, over the recipe's.")] = None,
    fresh: Fresh = False,
    only_check: Annotated[
        bool, typer.Option("--dry-run", help="Check it all, show sizes, memory and tokenised rows; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe: prune, align, train, recover, evaluate, compare; of these what it has."""
    from loram.run.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    if only_check:
        from loram.run.dry_run import dry_run, show

        found = dry_run(loaded)
        if as_json:
            typer.echo(found.model_dump_json())
        else:
            show(found, console)
        return

    from loram.run.pipeline import run as pipeline
    from loram.run.record import REPORT_NAME
    from loram.run.report import summary, table

    report = pipeline(loaded, fresh=fresh)
    if as_json:
        typer.echo(report.model_dump_json())
        return
    console.print(table(report))
    console.print(summary(report), highlight=False)
    console.print(f"Report: {loaded.output_dir / REPORT_NAME}", highlight=False, soft_wrap=True)


def compare(
    recipe: Annotated[Path, typer.Argument(help="A YAML file with a `compare` section.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value over the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Train by several methods, on the full and the pruned model, and put them in one table."""
    from loram.run.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)

    from rich.console import Console

    from loram.run.compare import TABLE_NAME, table
    from loram.run.compare import compare as stage

    rows = stage(loaded)
    if as_json:
        typer.echo(json.dumps({"rows": [row.model_dump() for row in rows]}))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows))
    console.print(f"Table and plot: {loaded.output_dir / TABLE_NAME}", highlight=False, soft_wrap=True)


def estimate(
    model: Annotated[str, typer.Argument(help="config.json, model folder or hub id.", show_default=False)],
    ratio: Annotated[
        float | None, typer.Option(help="Share of heads and channels to remove (default: none).", show_default=False)
    ] = None,
    pattern: Pattern = "structured",
    memory: Annotated[
        str | None, typer.Option(help="Find the least ratio that trains in this: 12GiB, 24GB.", show_default=False)
    ] = None,
    keep_first: KeepFirst = None,
    keep_last: KeepLast = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(
            "--load-in-4bit/--no-load-in-4bit", help="Frozen weights in NF4 (default: no; with --memory what it takes)."
        ),
    ] = None,
    offload_embedding: Annotated[
        bool, typer.Option("--offload-embedding", help="With that, the embedding in host memory.")
    ] = False,
    method: Method = "lora",
    lora_r: LoraR = None,
    lora_target_modules: LoraTargets = None,
    lora_dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (default float32).")] = None,
    lora_dropout: LoraDropout = None,
    lora_sp_share: LoraSpShare = None,
    max_length: MaxLength = None,
    per_device_train_batch_size: BatchSize = None,
    gradient_accumulation_steps: Accumulation = None,
    optim: Annotated[
        str | None, typer.Option(help="adamw_torch_fused, adamw_torch, adamw_8bit or paged_adamw_8bit.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing", help="Keep layers' inputs only (default: on cuda)."
        ),
    ] = None,
    activation_offloading: Annotated[
        bool | None,
        typer.Option(
            "--activation-offloading/--no-activation-offloading",
            help="Keep those in host memory (default: on cuda in 4 bits).",
        ),
    ] = None,
    anchor_steps: Annotated[
        int | None, typer.Option(help="Of a pruned model: train on the full one's course (with --memory default 8).")
    ] = None,
    anchor_gradients: Annotated[
        bool | None, typer.Option("--anchor-gradients/--no-anchor-gradients", help="On the way back, too (default).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (default cuda).")] = None,
    as_json: Json = False,
) -> None:
    """Say what pruning saves and what training takes, from config.json alone; or find what fits into --memory."""
    from loram.planner.show import command

    options: dict[str, Any] = {
        "pattern": pattern,
        "keep_first": keep_first,
        "keep_last": keep_last,
        "offload_embedding": offload_embedding,
        "method": method,
        "lora_r": lora_r,
        "lora_target_modules": lora_target_modules or None,
        "lora_dtype": lora_dtype,
        "lora_dropout": lora_dropout,
        "lora_sp_share": lora_sp_share,
        "max_length": max_length,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "optim": optim,
        "gradient_checkpointing": gradient_checkpointing,
        "activation_offloading": activation_offloading,
        "anchor_steps": anchor_steps,
        "anchor_gradients": anchor_gradients,
        "device": device,
    }
    typer.echo(command(model, ratio, memory, load_in_4bit, options, as_json=as_json))


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that loram made, or one with such folders in it.")],
    as_json: Json = False,
) -> None:
    """Compare every byte of a folder with its manifest."""
    from loram.disk.artifacts import verify as stage

    found = stage(folder)
    if as_json:
        typer.echo(json.dumps({path: manifest.model_dump(mode="json") for path, manifest in found.items()}))
        return
    for path, manifest in found.items():
        size = sum(entry.size for entry in manifest.files.values())
        typer.echo(f"{path}: {manifest.kind}, {len(manifest.files)} files, {size / 1e6:,.1f} MB, all as written")


def doctor(as_json: Json = False) -> None:
    """Say what this machine can do: versions, devices, fast dtypes, free memory and disk, and what is missing."""
    from loram.compute.doctor import doctor as look

    found = look()
    typer.echo(found.model_dump_json() if as_json else found.text())
