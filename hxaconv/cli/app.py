"""The command line, made from the functions of the package: parses, calls the function, and shows what came of it."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin

import typer

from hxaconv.calls import MISSING, Parameter, invoke, parameters_of
from hxaconv.cli.exits import guarded, refuse_unknown, stopping
from hxaconv.commands import COMMANDS
from hxaconv.options import Display, WrongOption

app = typer.Typer(
    name="hxaconv",
    help="Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert them, and prove it.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert them, and prove it."""
    if version:
        from hxaconv import __version__

        print(__version__)
        raise typer.Exit


def command(name: str, function: Callable[..., Any]) -> None:
    """Make `hxaconv NAME` of a function: its arguments and options, and those of its groups, with their help."""

    def run(**values: Any) -> None:
        from hxaconv.cli.console import Talk

        talk = Talk(quiet=values.pop("quiet"), json_output=values.pop("json"))
        try:
            with stopping():
                talk.show(invoke(function, name, values, talk.progress()))
        except WrongOption as error:
            words = {parameter.name: parameter.words[0].split("/")[-1] for parameter in found}
            raise WrongOption(error.lines, lambda name: words.get(name, name)) from None

    found = [*parameters_of(function), *parameters_of(_display)]
    parameters = [_typer_parameter(parameter) for parameter in found]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = _help(inspect.getdoc(function) or "")
    needed = any(parameter.default is MISSING for parameter in found)
    app.command(name, no_args_is_help=needed)(run)


def _display(json: Display.Json = False, quiet: Display.Quiet = False) -> None:
    """What every command takes beside the options of its function."""


def _typer_parameter(parameter: Parameter) -> inspect.Parameter:
    option, kinds = parameter.option, get_args(parameter.kind) or (parameter.kind,)
    kind: Any = next((kind for kind in (bool, int, float, str) if kind in kinds), str)
    if parameter.is_argument:
        info = typer.Argument(help=option.help)
    else:
        off_only = parameter.words[0].startswith(" /")
        info = typer.Option(
            *parameter.words, help=option.help, rich_help_panel=option.panel or None, show_default=not off_only
        )
    default = parameter.default
    if get_origin(parameter.kind) is tuple:  # an option that may be given several times
        kind, default = list[kind], list(default)
    return inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if types.NoneType in kinds else kind, info],
    )


def _help(doc: str) -> str:
    """The text of `--help`: what the function says it does, and the examples of its command line."""
    said, *sections = re.split(r"\n\n(?=[A-Z][a-z ]+:\n)", doc)
    examples = next((text for text in sections if text.startswith("Command line:")), "")
    lines = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
    return "\n\n".join(
        [said, *(["[bold]Examples[/bold]" if len(lines) > 1 else "[bold]Example[/bold]"] if lines else []), *lines]
    )


for _name, _function in COMMANDS.items():
    command(_name, _function)


def run() -> int:
    """Run the command that sys.argv names; returns its exit code."""

    def called() -> None:
        refuse_unknown(sys.argv[1:], COMMANDS)
        app()

    return guarded(called)
