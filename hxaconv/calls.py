"""Functions that take groups of options, called with the options by name: by the command line, and from Python."""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
import shlex
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from hxaconv import options
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.options import (
    Argument,
    Group,
    Option,
    Shown,
    WrongOption,
    checked,
    option_words,
    options_of,
    plain,
    refuse_unknown,
)
from hxaconv.progress import Progress

Result = TypeVar("Result")
MISSING = inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option or argument of a command, wherever in its signature it stands."""

    name: str
    kind: Any
    default: Any
    option: Option
    group: str = ""
    """The parameter of the function that it is a field of; empty: it is one itself."""

    @property
    def is_argument(self) -> bool:
        """Whether it is given by its place, not by its name."""
        return isinstance(self.option, Argument)

    @property
    def words(self) -> tuple[str, ...]:
        """What the command line calls it; with a slash, what turns it on and what turns it off."""
        return self.option.names or (self.name.upper() if self.is_argument else option_words([self.name]),)


@functools.cache
def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The options and arguments of a command's function, its groups taken apart; others (progress) are left out."""
    found = []
    for name, (kind, default, extra) in _signature(function).items():
        if isinstance(extra, Option):
            found.append(Parameter(name, kind, default, extra))
        elif _is_group(kind):
            for field, (field_kind, option) in options_of(kind).items():
                if not (isinstance(extra, Shown) and field in extra.without):
                    option = replace(option, panel=option.panel or kind.PANEL)
                    found.append(Parameter(field, field_kind, getattr(default, field), option, name))
    return tuple(found)


@functools.cache
def _signature(function: Callable[..., Any]) -> Mapping[str, tuple[Any, Any, Any]]:
    """Parameter -> (its type, its default, the Option that it is or how its group is shown)."""
    # Not what it returns: results are of modules that --help need not import.
    named = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    hints = get_type_hints(types.SimpleNamespace(__annotations__=named), function.__globals__, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *extra = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        found[name] = kind, parameter.default, extra[0] if extra else None
    return found


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Group) and kind is not Group


def arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command's function, from options by their own names.

    A group may be among the values, as an object or by its fields; options beside it overrule it.

    Raises:
        HxaconvError: listing every value that an option cannot have.
    """
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    result: dict[str, Any] = {}
    wrong: list[tuple[str, str]] = []
    for name, (kind, default, option) in _signature(function).items():
        given = values.get(name)
        try:
            if _is_group(kind):
                taken = {field for field, parameter in known.items() if parameter.group == name}
                fields = {field: values[field] for field in taken & values.keys()}
                if isinstance(given, Mapping):
                    refuse_unknown(f"{name} has no such options:", given, options_of(kind))
                    given, fields = default, {**given, **fields}
                elif given is None:
                    given = default
                if not isinstance(given, kind):
                    raise ValueError(f"{reprlib.repr(given)} is neither a {kind.__name__} nor its options by name")
                result[name] = replace(given, **fields)
                useless = set(result[name].differing(default)) - taken
                wrong += [(field, f"it has no use in {function.__name__}") for field in sorted(useless)]
            elif name in values:
                result[name] = checked(given, kind, option) if name in known else given
        except WrongOption as error:
            wrong += error.lines
        except ValueError as error:
            wrong.append((name, str(error)))
    if wrong:
        raise WrongOption(wrong)
    return result


@dataclass(frozen=True, slots=True)
class Call:
    """A command as it was called: what hxaconv.json records of it, and how to type it again."""

    command: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments and options by name, plain, but for those that change nothing of what is written."""
    differing: tuple[Parameter, ...] = ()
    """Of all arguments and options, those that are not the command's defaults."""
    progress: Progress | None = None

    @property
    def given(self) -> frozenset[str]:
        """The names of options that are not the command's defaults."""
        return frozenset(parameter.name for parameter in self.differing)

    def refuse_useless(self, *rules: tuple[bool, Iterable[str], str]) -> None:
        """Refuse options that would be ignored, by rules: (where it holds, options that have no use then, why).

        Raises:
            HxaconvError: listing those that were given, each with the first reason.
        """
        lines, left = [], self.given
        for holds, names, reason in rules:
            if found := [name for name in names if holds and name in left]:
                lines.append(f"{option_words(found)}: {reason}")
                left -= {*found}
        raise_all("these options have no use:", lines)

    @property
    def recorded(self) -> dict[str, Any]:
        """What differs from the defaults and is of consequence, as it may be published: without local folders."""
        given = [parameter.name for parameter in self.differing if parameter.option.recorded]
        return {name: "OUT" if name == "out" else _bare(self.options[name]) for name in given}

    @property
    def line(self) -> str:
        """The command as one could type it again, with OUT for the target."""
        return typed(self.command, self.differing, self.recorded)


def invoke(
    function: Callable[..., Result], command: str, values: Mapping[str, Any], progress: Progress | None
) -> Result:
    """Call a command's function with options by name, and with the Call that this is where it takes one.

    Raises:
        HxaconvError: listing every value that an option cannot have; and what the command raises.
    """
    given = arguments(function, values)
    if "call" not in _signature(function):
        return function(**given)
    recorded, differing = {}, []
    for parameter in parameters_of(function):
        value = given.get(parameter.group or parameter.name, parameter.default)
        value = plain(getattr(value, parameter.name) if parameter.group else value)
        if parameter.option.recorded:
            recorded[parameter.name] = value
        if parameter.default is MISSING or value != plain(parameter.default):
            differing.append(parameter)
    return function(**given, call=Call(command, recorded, tuple(differing), progress))


def typed(command: str, parameters: Iterable[Parameter], values: Mapping[str, Any]) -> str:
    """A command with those of the parameters that have values, as one types it."""
    words = ["hxaconv", command]
    for parameter, value in ((found, values[found.name]) for found in parameters if found.name in values):
        on, _, off = parameter.words[0].partition("/")
        if parameter.is_argument:
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(on if value else off)
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (on, str(one))]
    return shlex.join(words)


def _bare(value: Any) -> Any:
    """An option as it may be published: local paths as bare names, Hub ids and numbers as they are."""
    if isinstance(value, list):
        return [_bare(one) for one in value]
    if not isinstance(value, str):
        return value
    local = value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1
    return Path(value).name if local or ("/" in value and Path(value.partition("@")[0]).exists()) else value


def public(function: Callable[..., Result], command: str) -> Callable[..., Result]:
    """A command's function as the package offers it: groups, or their options as keywords of its own.

    What is wrong is a HxaconvError that names arguments as Python has them.
    """
    name = command.replace("-", "_")
    parameters = parameters_of(function)
    flat = [
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if parameter.is_argument else inspect.Parameter.KEYWORD_ONLY,
            default=parameter.default,
            annotation=parameter.option.taken or parameter.kind,
        )
        for parameter in sorted(parameters, key=lambda parameter: not parameter.is_argument)
    ]
    extra = {group: kind for group, (kind, *_) in _signature(function).items() if _is_group(kind)}
    for group, kind in (extra | {"progress": Progress | bool}).items():
        flat.append(inspect.Parameter(group, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind | None))
    signature = inspect.Signature(flat)

    @functools.wraps(function)
    def call(*given: Any, **values: Any) -> Result:
        try:
            refuse_unknown(f"{name} has no such arguments:", values, signature.parameters)
            try:
                values = signature.bind(*given, **values).arguments
            except TypeError as error:
                raise HxaconvError(f"{name}: {error}") from None
            return invoke(function, command, values, _progress(values.pop("progress", None)))
        except HxaconvError as error:
            error.message, error.hint = (in_python(text, parameters) for text in (error.message, error.hint))
            error.args = (error.message,)
            raise

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = name
    call.__module__ = "hxaconv"
    described, *sections = (inspect.getdoc(function) or "").partition("\n\nCommand line:")
    call.__doc__ = f"{in_python(described, parameters)}{''.join(sections)}\n\n{_described(parameters)}"
    return call


def _described(parameters: Iterable[Parameter]) -> str:
    lines, panel = ["Options, also as keywords:"], ""
    for parameter in parameters:
        if parameter.option.panel != panel:
            panel = parameter.option.panel
            lines.append(f"  {panel or 'In order'}")
        default = "" if parameter.default in (MISSING, None, False) else f" Default: {parameter.default}."
        lines.append(f"    {parameter.name}: {in_python(parameter.option.help, [parameter])}{default}")
    return "\n".join(lines)


_WORD = re.compile(r"(`[^`]*`)|(?<![\w-])--([a-z][a-z0-9-]*)(?: (\w+))?")


def in_python(text: str, parameters: Iterable[Parameter]) -> str:
    """A message with `--options` named as the arguments they are; commands in backticks stay as they are."""
    known: dict[str, tuple[Parameter, bool]] = {}
    # A message of one command may name options of another.
    every = [options_of(kind) for kind in vars(options).values() if _is_group(kind)]
    others = [Parameter(name, kind, None, option) for group in every for name, (kind, option) in group.items()]
    for parameter in [*others, *parameters]:
        for word in "/".join(parameter.words).split("/"):
            known[word.removeprefix("--")] = parameter, not word.startswith("--no-")

    def renamed(found: re.Match[str]) -> str:
        quoted, word, value = found.groups()
        if quoted or word not in known:
            return found[0]
        parameter, on = known[word]
        if bool in (get_args(parameter.kind) or (parameter.kind,)):
            return f"{parameter.name}={on}{f' {value}' if value else ''}"
        if value in parameter.option.choices:
            return f'{parameter.name}="{value}"'
        return f"{parameter.name}{f' {value}' if value else ''}"

    return _WORD.sub(renamed, text)


def _progress(given: Any) -> Progress | None:
    """What progress is reported to: a bar for True, and in a notebook; elsewhere the library is silent.

    Raises:
        HxaconvError: for an object without the methods of Progress.
    """
    if given is None:
        given = "ipykernel" in sys.modules
    if given is True:
        from hxaconv.cli.console import Bars

        return Bars()
    methods = [name for name in vars(Progress) if not name.startswith("_")]
    if given is not False and (isinstance(given, type) or not all(hasattr(given, name) for name in methods)):
        raise HxaconvError(
            f"progress: {reprlib.repr(given)} is no hxaconv.Progress: it needs {', '.join(methods)}",
            hint="Pass an object of a class derived from hxaconv.Progress, or True for a bar.",
        )
    return given or None
