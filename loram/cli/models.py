"""Subcommands that make models of models."""

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
    KeepFirst,
    KeepLast,
    MaxLength,
    MaxSamples,
    MaxSteps,
    Model,
    Out,
    Pattern,
    Ratio,
    ReportTo,
    Seed,
    Split,
    data_spec,
    given,
    pairs,
    weighted,
)


def prune(
    model: Model,
    out: Out,
    ratio: Ratio = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            help="taylor (default), activation, wanda, flap, magnitude, magnitude_l2, random; of sparse patterns "
            "sparsegpt (default), wanda, magnitude, random."
        ),
    ] = None,
    pattern: Pattern = "structured",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Data set for criteria that read text: taylor, activation, wanda, flap, sparsegpt (default: built-in "
            "passages).",
            show_default=False,
        ),
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="How many of its rows.")] = 10,
    calibration_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 128,
    keep_first: KeepFirst = None,
    keep_last: KeepLast = None,
    bias_compensation: Annotated[
        bool, typer.Option("--bias-compensation", help="Biases that add what removed inputs add on average (FLAP).")
    ] = False,
    seed: Seed = 42,
    device: Device = None,
) -> None:
    """Remove key-value groups and MLP channels, or single weights: MODEL -> a smaller folder with loram_plan.json."""
    from loram.pruning.prune import prune as stage

    plan = stage(
        model,
        out,
        ratio=ratio,
        criterion=criterion,
        pattern=pattern,
        calibration=calibration,
        calibration_samples=calibration_samples,
        calibration_length=calibration_length,
        keep_first=keep_first,
        keep_last=keep_last,
        bias_compensation=bias_compensation,
        seed=seed,
        device=device,
    )
    full, pruned = plan.parameters()
    typer.echo(f"{out}: {full:,} -> {pruned:,} parameters ({full / pruned:.2f}x fewer)")


def quantize(model: Model, out: Out) -> None:
    """Store MODEL, a pruned folder or a full model, with its linears in 4 bits (NF4), in transformers' format."""
    from loram.export.quantize import quantize as stage

    stage(model, out)
    typer.echo(f"{out}: 4-bit model folder written")


def align(
    pruned: Annotated[Path, typer.Argument(help="Folder that prune made.", show_default=False)],
    out: Out,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            help="A file or hub name to align on; repeatable, with shares: a.jsonl=0.7 (default: sampled text).",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder that teach made, in place of data sets; repeatable, with shares. Without it the full model is "
            "loaded.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The full model, where it is not where it was pruned.", show_default=False)
    ] = None,
    objective: Annotated[str, typer.Option(help="distill, clm or mix.")] = "distill",
    clm_weight: Annotated[float | None, typer.Option(help="Share of the text's own loss in mix (default 0.5).")] = None,
    train_embeddings: Annotated[bool, typer.Option("--train-embeddings", help="Train embedding and lm_head too.")] = (
        False
    ),
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Keep the weights whose probe on the full model is best.")
    ] = True,
    probe_dataset: Annotated[
        str | None, typer.Option(help="Its rows (default: some of the data, held out).", show_default=False)
    ] = None,
    probe_steps: Annotated[int, typer.Option(help="Steps of its LoRA run.")] = 16,
    eval_steps: Annotated[int, typer.Option(help="Steps from probe to probe.")] = 50,
    patience: Annotated[int, typer.Option(help="Stop after so many probes without a new best one.")] = 3,
    stream: Annotated[
        bool, typer.Option("--stream", help="Probe without loading the full model, a layer at a time from disk.")
    ] = False,
    max_steps: MaxSteps = None,
    num_train_epochs: Epochs = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default 1e-4.")] = None,
    warmup_steps: Annotated[
        float | None, typer.Option(help="Steps, or a share of all if below 1 (default 0.05).")
    ] = None,
    per_device_train_batch_size: BatchSize = None,
    gradient_accumulation_steps: Accumulation = None,
    max_length: MaxLength = None,
    report_to: ReportTo = None,
    trainer: Annotated[
        list[str] | None,
        typer.Option("--trainer", help="Any option of transformers' TrainingArguments: weight_decay=0.1. Repeatable."),
    ] = None,
    seed: Seed = 42,
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Train all of PRUNED, a pruned folder, until it says what the full model says: a pruned folder again."""
    flags = {
        "max_steps": max_steps,
        "num_train_epochs": num_train_epochs,
        "learning_rate": learning_rate,
        "warmup_steps": warmup_steps,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "max_length": max_length,
        "report_to": report_to,
    }
    from loram.alignment.align import align as stage

    stage(
        pruned,
        out,
        data=[weighted(one) for one in dataset or []],
        teacher=[weighted(one) for one in teacher or []],
        base=base,
        objective=objective,
        clm_weight=clm_weight,
        train_embeddings=train_embeddings,
        probe=probe,
        probe_data=probe_dataset,
        probe_steps=probe_steps,
        eval_steps=eval_steps,
        patience=patience,
        stream=stream,
        trainer={**given(flags), **pairs(trainer, "--trainer")},
        seed=seed,
        device=device,
        fresh=fresh,
    )
    if processes.first():
        typer.echo(f"{out}: aligned model written")


def teach(
    model: Model,
    out: Out,
    dataset: Dataset,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    max_samples: MaxSamples = None,
    top_k: Annotated[int, typer.Option(help="Likeliest next tokens to store at every place.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens a row; a long text is cut into pieces of this.")] = 512,
    part_tokens: Annotated[
        int, typer.Option(help="Tokens a pass over the model; a stopped run goes on after the last finished pass.")
    ] = 1 << 18,
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Cache what the full MODEL predicts on a text, for alignment; MODEL is read from disk a layer at a time."""
    data = data_spec(dataset, dataset_config, dataset_split, column, max_samples)

    from loram.alignment.teach import teach as stage

    stage(
        model, out, data=data, top_k=top_k, max_length=max_length, part_tokens=part_tokens, device=device, fresh=fresh
    )
    typer.echo(f"{out}: teacher cache written")


def convert(
    gguf: Annotated[Path, typer.Argument(help="A .gguf file.", show_default=False)],
    out: Out,
) -> None:
    """Turn a GGUF file into an ordinary model folder that every tool loads."""
    from loram.disk.gguf import convert_gguf

    convert_gguf(gguf, out)
    typer.echo(f"{out}: model folder written")
