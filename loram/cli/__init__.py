"""The command line: one command per stage, plus run, compare, estimate, verify, convert and doctor.

Nothing is decided here. A command (`commands.py`) names its arguments, its classes of options and the function that it
calls; `flags.py` makes flags of the options, and `parser.py` a parser of the flags.
"""

import signal
import sys

import typer

from loram.base import processes
from loram.base.errors import UserError
from loram.base.names import on_the_line
from loram.base.stopping import stop_by
from loram.cli.commands import COMMANDS
from loram.cli.parser import make_app
from loram.run.recipe import Recipe

# What people look for, and what does it.
_UPLOAD = "upload a finished folder with `loram push FOLDER REPO`"
_START = "`loram init OUT` writes recipes and data to start from"
_WITHOUT = {"upload": _UPLOAD, "publish": _UPLOAD, "fetch": _START}
_CTRL_C, _SIGTERM = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes, as shells give them


def main() -> None:
    """Entry point: exit code 0 for success, 2 for a user's mistake, 1 for a failure of ours, 130 for Ctrl-C.

    SIGTERM ends a command as Ctrl-C does, with the exit code 143.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: stop_by(number))
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: list[str]) -> int:
    # TRL and transformers write --learning_rate, most others --learning-rate: both are right.
    spelled = [a.replace("_", "-", a.split("=")[0].count("_")) if a.startswith("--") else a for a in arguments]
    if debug := "--debug" in spelled:  # anywhere on the line
        spelled = ["--debug", *(a for a in spelled if a != "--debug")]
    try:
        _check_names(spelled)
        _check_processes(spelled)
        code = make_app()(spelled, prog_name="loram", standalone_mode=False) or 0
    except UserError as error:
        return _fail(str(error), 2)
    except typer.TyperException as error:
        return _misused(error, spelled)
    except KeyboardInterrupt as error:
        return _stopped(error, _CTRL_C)
    except BrokenPipeError:
        return 0
    except SystemExit as stop:  # a library's way to end
        code = int(stop.code or 0)
        if code in (_CTRL_C, _SIGTERM):
            return _stopped(stop, code)
    except Exception as error:
        if debug:
            raise
        reason = (str(error).strip() or "no further detail").splitlines()[0]
        how = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
        return _fail(f"{type(error).__name__}: {reason}{how} (run `loram --debug ...` for the traceback)", 1)
    if code == _CTRL_C:  # before the command began
        return _stopped(KeyboardInterrupt(), code)
    if not code:
        processes.leave()
    return code


def _misused(error: typer.TyperException, arguments: list[str]) -> int:
    """Return what the parser says about a line that it does not understand; for an empty line, return the help."""
    if not arguments:
        print(error.format_message(), file=sys.stderr)
        return 2
    command = _subcommand(arguments)
    hint = f"loram {command} -h" if command in COMMANDS else "loram -h"
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if command in _WITHOUT:
        return _fail(f"there is no command {command!r}: {_WITHOUT[command]}", 2)
    return _fail(f"{message}; see `{hint}`", 2)


def _subcommand(arguments: list[str]) -> str:
    """Return the subcommand on a line, or nothing."""
    return next((a for a in arguments if a[:1] != "-"), "")


def _check_processes(arguments: list[str]) -> None:
    """Refuse a launcher's several processes if each of them would do the same work and write the same folder.

    Raises:
        UserError: the command is no stage that they can share.
    """
    name = _subcommand(arguments)
    if processes.count() > 1 and name in COMMANDS and not COMMANDS[name].together:
        shared = ", ".join(name for name, command in COMMANDS.items() if command.together)
        raise UserError(f"{name}: works in one process; `accelerate launch` and `torchrun` are for {shared}")


def _check_names(arguments: list[str]) -> None:
    """Answer flags by the names that other tools give them with ours, before the parser calls them unknown.

    Raises:
        UserError: the first such flag.
    """
    command = COMMANDS.get(_subcommand(arguments))
    if command is None:
        return
    flags = {f"--{flag.name}" for flag in command.flags}
    names = {argument.name for argument in command.arguments}
    for flag in (a.split("=")[0] for a in arguments if a.startswith("--")):
        if ours := on_the_line(flag, flags, names, root=Recipe):
            raise UserError(f"{flag}: here it is called {ours}")


def _stopped(error: BaseException, code: int) -> int:
    """Say that a signal has stopped the command, and how to go on: stages leave a note where they keep something."""
    how = "; ".join(getattr(error, "__notes__", ())) or "the same command starts over"
    return _fail(f"stopped; nothing half-written was left behind; {how}", code)


def _fail(message: str, code: int) -> int:
    where = f" in process {processes.number()} of {processes.count()}" if processes.count() > 1 else ""
    print(f"loram: error{where}: {' '.join(message.split())}", file=sys.stderr)
    return code
