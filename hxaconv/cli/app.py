"""The command line, made from the functions of the package: parses, calls the function, shows what came of it, and
ends with an exit code, errors without a traceback, interruptions with what is kept."""

from __future__ import annotations

import difflib
import inspect
import io
import os
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, get_args, get_origin

import typer

from hxaconv import ranks
from hxaconv.calls import MISSING, Parameter, invoke, parameters_of
from hxaconv.cli.console import Talk, render_error
from hxaconv.commands import COMMANDS, SUMMARIES
from hxaconv.errors import FAULT, HxaconvError, out_of_memory
from hxaconv.options import Option, WrongOption
from hxaconv.save.interruption import NOTHING_PUBLISHED, ignore_from_now

DISPLAY = (
    Parameter("json", bool, False, Option("Print the result as JSON.", panel="Display")),
    Parameter(
        "quiet",
        bool,
        False,
        Option("Print nothing but warnings and errors.", panel="Display", names=("--quiet", "-q")),
    ),
)
"""What every command takes beside the options of its function."""


def app() -> None:
    """Run the command line that sys.argv is; only the command that it names is made."""
    typer_app = typer.Typer(
        name="hxaconv",
        help="Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert them, and prove it.",
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    typer_app.callback(invoke_without_command=True)(_root)
    named = _named(sys.argv[1:])
    for name in [named] if named else SUMMARIES:
        if named or COMPLETING in os.environ:
            make, needed = _command(name, COMMANDS[name])
            typer_app.command(name, no_args_is_help=needed, context_settings={"allow_extra_args": True})(make)
        else:
            typer_app.command(name, help=SUMMARIES[name])(lambda: None)
    typer_app()


COMPLETING = "_HXACONV_COMPLETE"
"""The variable by which a shell asks for completions: of all commands and their options."""


def _named(words: Sequence[str]) -> str | None:
    """The command among the words of a command line, if there is one; others are refused, with what was meant."""
    word = next((word for word in words if not word.startswith("-")), None)
    if word is None or word in SUMMARIES:
        return word
    near = [name for name in SUMMARIES if word and name.startswith(word)]
    near = near or ["to-hf", "to-pth"] * (word == "convert")
    near = near or difflib.get_close_matches(word, SUMMARIES, n=2, cutoff=0.5)
    meant, known = " or ".join(f"hxaconv {name}" for name in near), ", ".join(SUMMARIES)
    raise HxaconvError(
        f"there is no command {word!r}",
        hint=f"Did you mean {meant}?" if near else f"Commands: {known}. hxaconv --help explains them.",
    )


def _refuse_extra(name: str, extra: Sequence[str]) -> None:
    """Refuse words that have no place on the command line, with what was probably meant."""
    if not extra:
        return
    hint = f"hxaconv {name} --help lists what it takes; a name with spaces needs quotes."
    if all(word.strip(",").isdigit() for word in extra):
        hint = "Numbers of layers are separated by commas alone: 2,5."
    elif name == "verify":
        hint = f"To compare two checkpoints: `hxaconv verify ONE --against {extra[0]}`"
    raise HxaconvError(f"{name} has no use for {' '.join(extra)}", hint=hint)


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """Turn Llama-style transformers into RWKV-7/GQA hybrids (hxa079), convert them, and prove it."""
    if version:
        from hxaconv import __version__

        print(__version__)
        raise typer.Exit


def _command(name: str, function: Callable[..., Any]) -> tuple[Callable[..., None], bool]:
    """What Typer makes `hxaconv NAME` of: arguments and options, those of groups too; whether any has to be given."""
    found = [*parameters_of(function), *DISPLAY]

    def run(context: typer.Context, **values: Any) -> None:
        _refuse_extra(name, context.args)
        for switch in [name for name in values if name.startswith(OFF)]:
            if values.pop(switch):
                values[switch.removeprefix(OFF)] = False
        talk = Talk(quiet=values.pop("quiet"), json_output=values.pop("json"))
        try:
            talk.show(invoke(function, name, values, talk.progress()))
        except KeyboardInterrupt as stop:
            message = getattr(stop, "message", NOTHING_PUBLISHED)
            raise Stopped(message, getattr(stop, "exit_code", 130)) from None
        except WrongOption as error:
            words = {parameter.name: parameter.words[0].split("/")[-1] for parameter in found}
            raise WrongOption(error.lines, lambda name: words.get(name, name)) from None

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    parameters = [context, *(one for parameter in found for one in _typer_parameters(parameter))]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__ = _help(inspect.getdoc(function) or "")
    return run, any(parameter.default is MISSING for parameter in found)


OFF = "no_"
"""What the name of a flag begins with that turns another option off."""


def _typer_parameters(parameter: Parameter) -> Iterator[inspect.Parameter]:

    def completed(incomplete: str) -> list[str]:
        return [choice for choice in option.choices if choice.startswith(incomplete)]

    option, kinds, default = parameter.option, get_args(parameter.kind) or (parameter.kind,), parameter.default
    kind: Any = next((kind for kind in (bool, int, float, str) if kind in kinds), str)
    if get_origin(parameter.kind) is tuple:  # an option that may be given several times
        kind, default = list[kind], list(default)
    words, (on, _, off) = parameter.words, parameter.words[0].partition("/")
    if on.strip() and off:  # side by side, the two names are too long for a terminal
        other = replace(option, help=f"The opposite of {on}.", names=(off,))
        yield from _typer_parameters(Parameter(f"{OFF}{parameter.name}", bool, False, other))
        words = (on,)
    info = typer.Argument(help=option.help)
    if not parameter.is_argument:
        info = typer.Option(
            *words,
            help=option.help,
            rich_help_panel=option.panel or None,
            show_default=bool(on.strip()),
            autocompletion=completed if option.choices else None,
        )
    yield inspect.Parameter(
        parameter.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None if types.NoneType in kinds else kind, info],
    )


def _help(doc: str) -> str:
    """The text of `--help`: the first part of a docstring, and the examples of its command line."""
    described, *sections = re.split(r"\n\n(?=[A-Z][a-z ]+:\n)", doc)
    examples = next((text for text in sections if text.startswith("Command line:")), "")
    lines = [line.strip() for line in examples.splitlines()[1:]]
    title = [f"[bold]Example{'s' if len(lines) > 1 else ''}[/bold]"] if lines else []
    paragraphs = [" ".join(paragraph.split()) for paragraph in described.split("\n\n")]
    return "\n\n".join([*paragraphs, *title, *lines])


class Stopped(Exception):
    """Ctrl-C or SIGTERM, carried past Typer, which would swallow the message and the exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code


def run() -> int:
    """Run the command that sys.argv names; returns its exit code."""
    return guarded(app)


def guarded(run: Callable[[], Any]) -> int:
    """Run the app: 0 done, 1 a check failed, 2 wrong use, bad input, or, with a traceback, a fault of ours."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does it: what cannot be encoded, the names of some files, must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        ranks.join()
        run()
    except BrokenPipeError:
        return 0
    except Stopped as stop:
        Talk().say(stop.message)
        ignore_from_now()
        return stop.exit_code
    except Exception as error:
        known = error if isinstance(error, HxaconvError) else out_of_memory(error)
        if known is None and isinstance(error, OSError):
            known = HxaconvError(
                str(error), hint="This is the system's own message; with --debug, a traceback shows where."
            )
        if known is None or debug:
            traceback.print_exc()
        if known is None or not debug:
            render_error(known or HxaconvError(FAULT))
        return known.exit_code if known else HxaconvError.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    return 0
