"""The parser: typer's, with the parameters of every command generated from its arguments and flags."""

import inspect
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from loram.base import processes
from loram.base.paths import local
from loram.base.quiet import quieten_libraries
from loram.cli.commands import COMMANDS, Command
from loram.cli.flags import COMMON, RUN, keywords


class GroupedCommand(TyperCommand):
    """A command whose help shows its options in their groups, the common ones first."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage line says after the command's name. Typer calls it, and would add braces."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and then the options group by group; called by typer."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], COMMON: []}
        for parameter in self.get_params(ctx):
            argument = parameter.param_type_name == "argument"
            group = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or RUN
            if (line := parameter.get_help_record(ctx)) is not None:
                groups.setdefault(group, []).append(line)
        for title, lines in groups.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


def make_app() -> typer.Typer:
    """Return the command line."""
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Train small, infer large: prune a model, train a LoRA adapter on the small one, recover it for the full "
        "one.",
    )
    app.callback()(_configure)
    for name, command in COMMANDS.items():
        app.command(name, cls=GroupedCommand)(_function(command))
    return app


def _function(command: Command) -> Callable[..., None]:
    """Return the function that typer inspects and calls: its signature is generated, its body calls the command."""

    def call(**given: Any) -> None:
        values = {name: local(value) if isinstance(value, Path) else value for name, value in given.items()}
        arguments = [values[argument.name] for argument in command.arguments]
        try:
            command.call(*arguments, **keywords(command.flags, values))
        except KeyboardInterrupt as error:  # typer would keep its notes to itself
            stop = SystemExit(128 + signal.SIGINT)
            for note in getattr(error, "__notes__", ()):
                stop.add_note(note)
            raise stop from error

    function: Any = call
    parameters = list(_parameters(command))
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    function.__doc__ = command.call.__doc__
    return call


def _parameters(command: Command) -> Iterator[inspect.Parameter]:
    """Yield one parameter per argument and flag; None stands for a flag that was not given."""
    for argument in command.arguments:
        several = argument.type == list[str]
        metavar = argument.name.upper()
        info = typer.Argument(help=argument.help, metavar=metavar, show_default=False)
        yield _parameter(argument.name, argument.type, info, required=not several)
    for flag in command.flags:
        names = f"--{flag.name}/--no-{flag.name}" if flag.negative else f"--{flag.name}"
        details = typer.Option(
            names, help=flag.help, metavar=flag.metavar, rich_help_panel=flag.group, show_default=False
        )
        yield _parameter(flag.key, flag.type, details, required=flag.required)


def _parameter(name: str, kind: Any, info: Any, *, required: bool) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, info],
    )


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"loram {version('loram')}")
        raise typer.Exit


def _configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", stream=sys.stderr)
    usual = logging.INFO if processes.first() else logging.ERROR
    logging.getLogger("loram").setLevel(logging.DEBUG if debug else usual)
    if not debug:
        quieten_libraries()
