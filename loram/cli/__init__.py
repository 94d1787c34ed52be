"""The command line: one subcommand a stage, plus run, estimate, verify, convert and doctor. No logic of its own."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from loram.base import processes
from loram.base.errors import UserError
from loram.base.names import on_the_line
from loram.cli.adapters import evaluate, merge, polish, recover, train
from loram.cli.models import align, convert, prune, quantize, teach
from loram.cli.runs import compare, doctor, estimate, run, verify

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train small, infer large: prune a model, train a LoRA adapter on the small one, recover it for the full one.",
)
_COMMANDS: dict[str, Callable[..., None]] = {  # in the order of a run
    "estimate": estimate,
    "prune": prune,
    "align": align,
    "train": train,
    "recover": recover,
    "polish": polish,
    "eval": evaluate,
    "merge": merge,
    "run": run,
    "compare": compare,
    "quantize": quantize,
    "teach": teach,
    "convert": convert,
    "verify": verify,
    "doctor": doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


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
    usual = logging.INFO if processes.first() else logging.ERROR
    logging.getLogger("loram").setLevel(logging.DEBUG if debug else usual)
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        for name in ("httpx", "httpx2", "huggingface_hub", "urllib3", "filelock", "fsspec"):
            logging.getLogger(name).setLevel(logging.ERROR)


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
        _check_processes(spelled)
        app(spelled, prog_name="loram", standalone_mode=True)
    except UserError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit):  # typer's way to end
            if not stop.code:
                processes.leave()
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


def _subcommand(arguments: list[str]) -> str:
    """The subcommand on a line, or nothing."""
    return next((a for a in arguments if a[:1] != "-"), "")


def _check_processes(arguments: list[str]) -> None:
    """Refuse a launcher's several processes where they would do the same work, and write the same folder, each.

    Raises:
        UserError: it is no stage that they can share.
    """
    command = _subcommand(arguments)
    if processes.count() > 1 and command in _COMMANDS.keys() - {"train", "align"}:
        raise UserError(f"{command}: works in one process; `accelerate launch` and `torchrun` are for train and align")


def _check_names(arguments: list[str]) -> None:
    """Answer flags by the names that other tools give them with ours, before the parser calls them unknown.

    Raises:
        UserError: the first such flag.
    """
    command = getattr(typer.main.get_command(app), "commands", {}).get(_subcommand(arguments))
    if command is None:
        return
    flags = {flag for parameter in command.params for flag in parameter.opts}
    names = {parameter.name for parameter in command.params if parameter.param_type_name == "argument"}
    for flag in (a.split("=")[0] for a in arguments if a.startswith("--")):
        if ours := on_the_line(flag, flags, names):
            raise UserError(f"{flag}: here it is called {ours}")


def _fail(message: str, code: int) -> int:
    where = f" in process {processes.number()} of {processes.count()}" if processes.count() > 1 else ""
    print(f"loram: error{where}: {' '.join(message.split())}", file=sys.stderr)
    return code
