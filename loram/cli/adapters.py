"""Subcommands that make adapters, and use them."""

from pathlib import Path
from typing import Annotated

import typer

from loram.base import processes
from loram.cli.options import (
    Accumulation,
    BatchSize,
    Column,
    Config,
    Dataset,
    Device,
    Epochs,
    Fresh,
    Json,
    LoraDropout,
    LoraR,
    LoraSpShare,
    LoraTargets,
    MaxLength,
    MaxSamples,
    MaxSteps,
    Method,
    Model,
    Out,
    ReportTo,
    Seed,
    Split,
    data_spec,
    given,
    pairs,
)


def train(
    model: Model,
    out: Out,
    dataset: Dataset,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    method: Method = "lora",
    max_samples: MaxSamples = None,
    lora_r: LoraR = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale: alpha / r (default 16).")] = None,
    lora_dropout: LoraDropout = None,
    lora_target_modules: LoraTargets = None,
    max_steps: MaxSteps = None,
    num_train_epochs: Epochs = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default 2e-4.")] = None,
    warmup_steps: Annotated[float | None, typer.Option(help="Steps, or a share of all if below 1 (default 0).")] = None,
    per_device_train_batch_size: BatchSize = None,
    gradient_accumulation_steps: Accumulation = None,
    max_length: MaxLength = None,
    report_to: ReportTo = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="QLoRAM: all frozen weights in NF4 with double quantisation.")
    ] = False,
    offload_embedding: Annotated[
        bool, typer.Option("--offload-embedding", help="With it: leave the embedding in 16 bits in host memory.")
    ] = False,
    mask_update: Annotated[
        bool,
        typer.Option("--mask-update", help="On a sparse model: no update where it has no weight; merge, not recover."),
    ] = False,
    lora_dtype: Annotated[str, typer.Option(help="Of adapter, gradients, optimiser: float32 or bfloat16.")] = "float32",
    anchor_steps: Annotated[
        int | None, typer.Option(help="Stay on the full model's course, measured every so many steps.")
    ] = None,
    anchor_gradients: Annotated[
        bool,
        typer.Option(
            "--anchor-gradients/--no-anchor-gradients", help="With it: on the way back, too; slower, and nearer to it."
        ),
    ] = True,
    base: Annotated[
        str | None, typer.Option(help="The full model for that, if not where the plan says.", show_default=False)
    ] = None,
    lisa_layers: Annotated[int | None, typer.Option(help="LISA: layers that train at a time (default 2).")] = None,
    lisa_interval_steps: Annotated[
        int | None, typer.Option(help="LISA: steps after which others are drawn (default 20).")
    ] = None,
    lisa_train_embeddings: Annotated[
        bool | None,
        typer.Option(
            "--lisa-train-embeddings/--no-lisa-train-embeddings",
            help="LISA on a full model: embedding and lm_head train throughout (default: yes).",
        ),
    ] = None,
    lora_sp_share: LoraSpShare = None,
    lora: Annotated[
        list[str] | None, typer.Option("--lora", help="Any option of PEFT's LoraConfig: use_rslora=true. Repeatable.")
    ] = None,
    trainer: Annotated[
        list[str] | None, typer.Option("--trainer", help="Any option of TRL's SFTConfig: packing=true. Repeatable.")
    ] = None,
    seed: Seed = 42,
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Train an adapter on MODEL, a pruned folder or a full model; with lisa or full, weights themselves."""
    lora_flags = {
        "r": lora_r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "target_modules": lora_target_modules or None,
    }
    trainer_flags = {
        "max_steps": max_steps,
        "num_train_epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_length": max_length,
        "report_to": report_to,
    }
    lisa_flags = {
        "active_layers": lisa_layers,
        "interval_steps": lisa_interval_steps,
        "train_embeddings": lisa_train_embeddings,
    }
    data = data_spec(dataset, dataset_config, dataset_split, column, max_samples)

    from loram.training.train import train as stage

    stage(
        model,
        out,
        data=data,
        method=method,
        lora={**given(lora_flags), **pairs(lora, "--lora")},
        trainer={**given(trainer_flags), **pairs(trainer, "--trainer")},
        load_in_4bit=load_in_4bit,
        offload_embedding=offload_embedding,
        lora_dtype=lora_dtype,
        anchor_steps=anchor_steps,
        anchor_gradients=anchor_gradients,
        base=base,
        lisa=given(lisa_flags) or None,
        lora_sp=given({"share": lora_sp_share}) or None,
        mask_update=mask_update,
        seed=seed,
        device=device,
        fresh=fresh,
    )
    if processes.first():
        typer.echo(f"{out}: {'adapter' if (out / 'adapter_config.json').exists() else 'model'} written")


def recover(
    adapter: Annotated[Path, typer.Argument(help="Folder that train made.", show_default=False)],
    out: Out,
    correct: Annotated[
        bool, typer.Option("--correct", help="Take out what alignment and 4 bits changed in the base (EMLoC).")
    ] = False,
    dev_dataset: Annotated[
        str | None,
        typer.Option(help="Choose a multiplier of the update on these development rows.", show_default=False),
    ] = None,
    column: Column = None,
    max_samples: MaxSamples = None,
    base: Annotated[
        str | None, typer.Option(help="The full model for these, if not where the plan says.", show_default=False)
    ] = None,
    pruned: Annotated[
        str | None,
        typer.Option(help="For --correct: what was trained on, if not where the adapter says.", show_default=False),
    ] = None,
    device: Device = None,
) -> None:
    """Widen an adapter trained on a pruned model to the full one: a stock PEFT adapter."""
    dev_data = None if dev_dataset is None else data_spec(dev_dataset, None, None, column, max_samples)

    from loram.recovery.recover import recover as stage

    stage(adapter, out, correct=correct, dev_data=dev_data, base=base, pruned=pruned, device=device)
    typer.echo(f"{out}: recovered adapter written")


def polish(
    model: Model,
    adapter: Annotated[Path, typer.Argument(help="Recovered adapter.", show_default=False)],
    out: Out,
    dataset: Dataset,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    max_samples: MaxSamples = None,
    max_steps: Annotated[int, typer.Option(help="Each reads MODEL twice.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="At the first step; falls to 0 along a cosine.")] = 5e-4,
    per_device_train_batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    seed: Seed = 42,
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Train a recovered adapter a few steps on, on the full MODEL read from disk layer by layer."""
    data = data_spec(dataset, dataset_config, dataset_split, column, max_samples)

    from loram.recovery.polish import polish as stage

    stage(
        model,
        adapter,
        out,
        data=data,
        max_steps=max_steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
        max_length=max_length,
        seed=seed,
        device=device,
        fresh=fresh,
    )
    typer.echo(f"{out}: polished adapter written")


def merge(
    model: Model, adapter: Annotated[Path, typer.Argument(help="Recovered adapter.", show_default=False)], out: Out
) -> None:
    """Add an adapter to a model's weights: a plain model folder."""
    from loram.export.merge import merge as stage

    stage(model, adapter, out)
    typer.echo(f"{out}: merged model written")


def evaluate(
    model: Model,
    dataset: Dataset,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder that fits MODEL.", show_default=False)] = None,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    max_samples: MaxSamples = None,
    max_length: Annotated[int, typer.Option(help="Tokens a row; a long text is cut into pieces of this.")] = 1024,
    stream: Annotated[
        bool, typer.Option("--stream", help="Never load the model: read it from disk a layer at a time.")
    ] = False,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Perplexity of MODEL, with or without an adapter."""
    data = data_spec(dataset, dataset_config, dataset_split, column, None)

    from loram.evaluation.evaluate import evaluate as stage

    report = stage(
        model,
        adapter=adapter,
        data=data,
        max_samples=max_samples,
        max_length=max_length,
        stream=stream,
        device=device,
    )
    text = (
        f"perplexity {report.perplexity:.4f} (loss {report.loss:.4f} nats) over {report.tokens:,} tokens "
        f"of {report.rows:,} rows"
    )
    typer.echo(report.model_dump_json() if as_json else text)
