"""The command line: one subcommand a stage, plus run, estimate, verify, convert and doctor. No logic of its own."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from loram.errors import UserError, first_problem
from loram.names import on_the_line

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train small, infer large: prune a model, train a LoRA adapter on the small one, recover it for the full one.",
)

Model = Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)]
Dataset = Annotated[
    str,
    typer.Option(
        "--dataset", help="A .jsonl, .json, .csv, .tsv, .parquet or .txt file, or a hub name.", show_default=False
    ),
]
Split = Annotated[str | None, typer.Option("--dataset-split", help="Split of a hub data set (default: train).")]
Config = Annotated[str | None, typer.Option("--dataset-config", help="Configuration of a hub data set.")]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="Name a column: prompt=question. Of messages, prompt, completion, text. Repeatable."),
]
Ratio = Annotated[float, typer.Option(help="Share of heads and channels to remove.", show_default=False)]
KeepFirst = Annotated[int, typer.Option(help="First layers to leave whole.")]
KeepLast = Annotated[int, typer.Option(help="Last layers to leave whole.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... (default: a GPU if there is one).")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of going on with what was interrupted.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"loram {version('loram')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("loram").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name in ("httpx", "httpx2", "huggingface_hub", "urllib3", "filelock", "fsspec"):
            logging.getLogger(name).setLevel(logging.ERROR)


@app.command()
def prune(
    model: Model,
    out: Out,
    ratio: Ratio,
    criterion: Annotated[
        str, typer.Option(help="taylor, activation, wanda, flap, magnitude, magnitude_l2 or random.")
    ] = "taylor",
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Data set for taylor, activation, wanda, flap (default: built-in passages).", show_default=False
        ),
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="How many of its rows.")] = 10,
    calibration_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 128,
    keep_first: KeepFirst = 4,
    keep_last: KeepLast = 2,
    bias_compensation: Annotated[
        bool, typer.Option("--bias-compensation", help="Biases that add what removed inputs add on average (FLAP).")
    ] = False,
    seed: Seed = 42,
    device: Device = None,
) -> None:
    """Remove key-value groups and MLP channels: MODEL -> a smaller model folder with loram_plan.json."""
    from loram.prune.stage import prune as stage

    plan = stage(
        model,
        out,
        ratio=ratio,
        criterion=criterion,
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


@app.command()
def train(
    model: Model,
    out: Out,
    dataset: Dataset,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    method: Annotated[str, typer.Option(help="lora.")] = "lora",
    max_samples: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank (default 8).")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale: alpha / r (default 16).")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Default 0.05.")] = None,
    lora_target_modules: Annotated[
        list[str] | None, typer.Option(help="Repeatable (default: all seven linears of a layer; lm_head if asked).")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    num_train_epochs: Annotated[float | None, typer.Option(help="Default 1.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default 2e-4.")] = None,
    warmup_steps: Annotated[float | None, typer.Option(help="Steps, or a share of all if below 1 (default 0).")] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option(help="Default 4.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Default 1.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row (default 512).")] = None,
    report_to: Annotated[str | None, typer.Option(help="none, tensorboard, wandb, trackio (default none).")] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="QLoRAM: all frozen weights in NF4 with double quantisation.")
    ] = False,
    offload_embedding: Annotated[
        bool, typer.Option("--offload-embedding", help="With it: leave the embedding in 16 bits in host memory.")
    ] = False,
    lora_dtype: Annotated[str, typer.Option(help="Of adapter, gradients, optimiser: float32 or bfloat16.")] = "float32",
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
    """Train a LoRA adapter on MODEL, a pruned folder or a full model."""
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
    data = _data(dataset, dataset_config, dataset_split, column, max_samples)

    from loram.train import train as stage

    stage(
        model,
        out,
        data=data,
        method=method,
        lora={**_given(lora_flags), **_pairs(lora, "--lora")},
        trainer={**_given(trainer_flags), **_pairs(trainer, "--trainer")},
        load_in_4bit=load_in_4bit,
        offload_embedding=offload_embedding,
        lora_dtype=lora_dtype,
        seed=seed,
        device=device,
        fresh=fresh,
    )
    typer.echo(f"{out}: adapter written")


@app.command()
def quantize(model: Model, out: Out) -> None:
    """Store MODEL, a pruned folder or a full model, with its linears in 4 bits (NF4), in transformers' format."""
    from loram.quantize import quantize as stage

    stage(model, out)
    typer.echo(f"{out}: 4-bit model folder written")


@app.command()
def recover(
    adapter: Annotated[Path, typer.Argument(help="Folder that train made.", show_default=False)], out: Out
) -> None:
    """Widen an adapter trained on a pruned model to the full one: a stock PEFT adapter."""
    from loram.recover import recover as stage

    stage(adapter, out)
    typer.echo(f"{out}: recovered adapter written")


@app.command()
def merge(
    model: Model, adapter: Annotated[Path, typer.Argument(help="Recovered adapter.", show_default=False)], out: Out
) -> None:
    """Add an adapter to a model's weights: a plain model folder."""
    from loram.merge import merge as stage

    stage(model, adapter, out)
    typer.echo(f"{out}: merged model written")


@app.command("eval")
def evaluate(
    model: Model,
    dataset: Dataset,
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder that fits MODEL.", show_default=False)] = None,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    max_samples: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a row; a long text is cut into pieces of this.")] = 1024,
    stream: Annotated[
        bool, typer.Option("--stream", help="Never load the model: read it from disk a layer at a time.")
    ] = False,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Perplexity of MODEL, with or without an adapter."""
    data = _data(dataset, dataset_config, dataset_split, column, None)

    from loram.evaluate import evaluate as stage

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


@app.command()
def teach(
    model: Model,
    out: Out,
    dataset: Dataset,
    dataset_config: Config = None,
    dataset_split: Split = None,
    column: Column = None,
    max_samples: Annotated[int | None, typer.Option(help="Only the first so many rows.")] = None,
    top_k: Annotated[int, typer.Option(help="Likeliest next tokens to store at every place.")] = 64,
    max_length: Annotated[int, typer.Option(help="Tokens a row; a long text is cut into pieces of this.")] = 512,
    part_tokens: Annotated[
        int, typer.Option(help="Tokens a pass over the model; a stopped run goes on after the last finished pass.")
    ] = 1 << 18,
    device: Device = None,
    fresh: Fresh = False,
) -> None:
    """Cache what the full MODEL predicts on a text, for alignment; MODEL is read from disk a layer at a time."""
    data = _data(dataset, dataset_config, dataset_split, column, max_samples)

    from loram.teach import teach as stage

    stage(
        model, out, data=data, top_k=top_k, max_length=max_length, part_tokens=part_tokens, device=device, fresh=fresh
    )
    typer.echo(f"{out}: teacher cache written")


@app.command()
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
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    num_train_epochs: Annotated[float | None, typer.Option(help="Default 1.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default 1e-4.")] = None,
    warmup_steps: Annotated[
        float | None, typer.Option(help="Steps, or a share of all if below 1 (default 0.05).")
    ] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option(help="Default 4.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Default 1.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row (default 512).")] = None,
    report_to: Annotated[str | None, typer.Option(help="none, tensorboard, wandb, trackio (default none).")] = None,
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
    from loram.align.stage import align as stage

    stage(
        pruned,
        out,
        data=[_weighted(one) for one in dataset or []],
        teacher=[_weighted(one) for one in teacher or []],
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
        trainer={**_given(flags), **_pairs(trainer, "--trainer")},
        seed=seed,
        device=device,
        fresh=fresh,
    )
    typer.echo(f"{out}: aligned model written")


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="config.json, model folder or hub id.", show_default=False)],
    ratio: Annotated[
        float | None, typer.Option(help="Share of heads and channels to remove (default: none).", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Find the least ratio that trains in this: 12GiB, 24GB.", show_default=False)
    ] = None,
    keep_first: KeepFirst = 4,
    keep_last: KeepLast = 2,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option(
            "--load-in-4bit/--no-load-in-4bit", help="Frozen weights in NF4 (default: no; with --memory what it takes)."
        ),
    ] = None,
    offload_embedding: Annotated[
        bool, typer.Option("--offload-embedding", help="With that, the embedding in host memory.")
    ] = False,
    lora_r: Annotated[int | None, typer.Option(help="Rank (default 8).")] = None,
    lora_target_modules: Annotated[
        list[str] | None, typer.Option(help="Repeatable (default: all seven linears of a layer; lm_head if asked).")
    ] = None,
    lora_dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 (default float32).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row (default 512).")] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option(help="Default 4.")] = None,
    gradient_accumulation_steps: Annotated[int | None, typer.Option(help="Default 1.")] = None,
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
    device: Annotated[str | None, typer.Option(help="cuda or cpu (default cuda).")] = None,
    as_json: Json = False,
) -> None:
    """Say what pruning saves and what training takes, from config.json alone; or find what fits into --memory."""
    from loram.estimate.show import command

    options: dict[str, Any] = {
        "keep_first": keep_first,
        "keep_last": keep_last,
        "offload_embedding": offload_embedding,
        "lora_r": lora_r,
        "lora_target_modules": lora_target_modules or None,
        "lora_dtype": lora_dtype,
        "max_length": max_length,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "optim": optim,
        "gradient_checkpointing": gradient_checkpointing,
        "activation_offloading": activation_offloading,
        "device": device,
    }
    typer.echo(command(model, ratio, memory, load_in_4bit, options, as_json=as_json))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that loram made, or one with such folders in it.")],
    as_json: Json = False,
) -> None:
    """Compare every byte of a folder with its manifest."""
    from loram.artifacts import verify as stage

    found = stage(folder)
    if as_json:
        typer.echo(json.dumps({path: manifest.model_dump(mode="json") for path, manifest in found.items()}))
        return
    for path, manifest in found.items():
        size = sum(entry.size for entry in manifest.files.values())
        typer.echo(f"{path}: {manifest.kind}, {len(manifest.files)} files, {size / 1e6:,.1f} MB, all as written")


@app.command()
def convert(
    gguf: Annotated[Path, typer.Argument(help="A .gguf file.", show_default=False)],
    out: Out,
) -> None:
    """Turn a GGUF file into an ordinary model folder that every tool loads."""
    from loram.model.gguf import convert_gguf

    convert_gguf(gguf, out)
    typer.echo(f"{out}: model folder written")


@app.command()
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
    from loram.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    if only_check:
        from loram.dry_run import dry_run, show

        found = dry_run(loaded)
        if as_json:
            typer.echo(found.model_dump_json())
        else:
            show(found, console)
        return

    from loram.pipeline import REPORT_NAME
    from loram.pipeline import run as pipeline
    from loram.report import summary, table

    report = pipeline(loaded, fresh=fresh)
    if as_json:
        typer.echo(report.model_dump_json())
        return
    console.print(table(report))
    console.print(summary(report), highlight=False)
    console.print(f"Report: {loaded.output_dir / REPORT_NAME}", highlight=False, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can do: versions, devices, fast dtypes, free memory and disk, and what is missing."""
    from loram.doctor import doctor as look

    found = look()
    typer.echo(found.model_dump_json() if as_json else found.text())


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flags.items() if value is not None}


def _pairs(items: list[str] | None, flag: str) -> dict[str, Any]:
    """`key=value` flags; values are YAML, as in a recipe."""
    from loram.recipe import parse_pair

    return dict(parse_pair(item, flag) for item in items or [])


def _weighted(text: str) -> dict[str, Any]:
    """`PATH=SHARE`, or a path alone."""
    path, _, share = text.rpartition("=")
    try:
        return {"path": path, "weight": float(share)} if path else {"path": text}
    except ValueError:
        return {"path": text}


def _data(path: str, config: str | None, split: str | None, columns: list[str] | None, max_samples: int | None) -> Any:
    from loram.data_spec import DataSpec

    named = _pairs(columns, "--column")
    values = {"path": path, "config": config, "split": split, "columns": named, "max_samples": max_samples}
    try:
        return DataSpec.model_validate(values)
    except ValidationError as error:
        raise UserError(f"--dataset, --column, --max-samples: {first_problem(error)}") from error


def main() -> None:
    """Entry point: exit code 0 for success, 2 for a user's mistake, 1 for a failure of ours, 130 for Ctrl-C."""
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    # TRL and transformers write --learning_rate, most others --learning-rate: both are right.
    spelled = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in arguments]
    if debug := "--debug" in spelled:  # anywhere on the line
        spelled = ["--debug", *(a for a in spelled if a != "--debug")]
    try:
        _check_names(spelled)
        app(spelled, prog_name="loram", standalone_mode=True)
    except UserError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit):
            return int(stop.code or 0)
        return _fail("stopped; nothing half-written was left behind", 130)
    except BrokenPipeError:
        return 0
    except Exception as error:
        if debug:
            raise
        reason = (str(error).strip() or "no further detail").splitlines()[0]
        return _fail(f"{type(error).__name__}: {reason} (run `loram --debug ...` for the traceback)", 1)
    return 0


def _check_names(arguments: list[str]) -> None:
    """Answer flags by the names that other tools give them with ours, before the parser calls them unknown.

    Raises:
        UserError: the first such flag.
    """
    command = getattr(typer.main.get_command(app), "commands", {}).get(next((a for a in arguments if a[:1] != "-"), ""))
    if command is None:
        return
    flags = {flag for parameter in command.params for flag in parameter.opts}
    names = {parameter.name for parameter in command.params if parameter.param_type_name == "argument"}
    for flag in (a.split("=")[0] for a in arguments if a.startswith("--")):
        if ours := on_the_line(flag, flags, names):
            raise UserError(f"{flag}: here it is called {ours}")


def _fail(message: str, code: int) -> int:
    print(f"loram: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
