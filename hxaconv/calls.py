"""Functions that take groups of options, called with the options by name: by the command line, and from Python."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import shlex
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hxaconv.errors import HxaconvError, raise_all
from hxaconv.options import Argument, Group, Option, Shown, WrongOption, checked, option_words, options_of, plain
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
        return self.option.names or (f"--{self.name.replace('_', '-')}",)


@functools.cache
def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The options and arguments of a command's function, its groups taken apart; others (progress) are left out."""
    found = []
    for name, given in inspect.signature(function).parameters.items():
        kind, *extras = get_args(_hints(function)[name]) or (_hints(function)[name],)
        shown = next((extra for extra in extras if isinstance(extra, Shown)), Shown())
        if _is_group(kind):
            for field, (field_kind, option) in options_of(kind).items():
                if field not in shown.without:
                    option = replace(
                        option,
                        panel=option.panel or shown.panel or kind.PANEL,
                        help=shown.help.get(field, option.help),
                    )
                    found.append(Parameter(field, field_kind, getattr(given.default, field), option, name))
        else:
            found += [Parameter(name, kind, given.default, extra) for extra in extras if isinstance(extra, Option)]
    return tuple(found)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    # Not what it returns: results are of modules that --help need not import.
    named = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    return get_type_hints(types.SimpleNamespace(__annotations__=named), function.__globals__, include_extras=True)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Group)


def arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command's function, from options by their own names.

    A group may be among the values, as an object or by its fields; options beside it overrule it.

    Raises:
        HxaconvError: listing every value that an option cannot have.
    """
    signature = inspect.signature(function).parameters
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    result = {name: value for name, value in values.items() if name in signature and name not in known}
    fields: dict[str, dict[str, Any]] = {}
    wrong: list[tuple[str, str]] = []
    for name, value in result.items():
        kind = get_args(_hints(function)[name])[:1] or (_hints(function)[name],)
        if _is_group(kind[0]):
            result[name], problems = _group(function, name, kind[0], value)
            wrong += problems
    for name, parameter in known.items():
        if name not in values:
            continue
        try:
            value = checked(values[name], parameter.kind, parameter.option)
        except ValueError as error:
            wrong.append((name, str(error)))
            continue
        if parameter.group:
            fields.setdefault(parameter.group, {})[name] = value
        else:
            result[name] = value
    if wrong:
        raise WrongOption(wrong)
    for group, given in fields.items():
        result[group] = replace(result.get(group, signature[group].default), **given)
    return result


def _group(function: Callable[..., Any], name: str, kind: type[Group], value: Any) -> tuple[Any, list[tuple[str, str]]]:
    """(the group that was given, what is wrong with it); from a mapping, fields that it lacks are the command's."""
    default = inspect.signature(function).parameters[name].default
    if value is None:
        return default, []
    if isinstance(value, Mapping):
        raise_all(
            f"{name} has no such options:",
            [repr(key) for key in value if key not in options_of(kind)],
            hint=f"It has {', '.join(options_of(kind))}.",
        )
        value = replace(default, **value)
    if not isinstance(value, kind):
        return default, [(name, f"{value!r} is neither a {kind.__name__} nor its options by name")]
    taken = {parameter.name for parameter in parameters_of(function) if parameter.group == name}
    useless = [field for field in value.differing(default) if field not in taken]
    return value, [(field, f"it has no use in {function.__name__}") for field in useless]


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

    def useless(self, names: Iterable[str], reason: str) -> list[str]:
        """A line that tells why those of `names` that were given have no use, if there are any."""
        found = [name for name in names if name in self.given]
        return [f"{option_words(found)}: {reason}"] if found else []

    @property
    def recorded(self) -> dict[str, Any]:
        """What differs from the defaults and is of consequence, as it may be published: without local folders."""
        given = [parameter.name for parameter in self.differing if parameter.option.recorded]
        return {name: "OUT" if name == "out" else bare(self.options[name]) for name in given}

    @property
    def line(self) -> str:
        """The command as one could type it again, with OUT for the target."""
        return _line(self.command, [found for found in self.differing if found.option.recorded], self.recorded)


def invoke(
    function: Callable[..., Result], command: str, values: Mapping[str, Any], progress: Progress | None
) -> Result:
    """Call a command's function with options by name; it is told how it was called.

    Raises:
        HxaconvError: listing every value that an option cannot have; and what the command raises.
    """
    given = arguments(function, values)
    signature = inspect.signature(function).parameters
    if "call" not in signature:
        return function(**given)
    whole = {name: parameter.default for name, parameter in signature.items()} | given
    options, differing = {}, []
    for parameter in sorted(parameters_of(function), key=lambda parameter: not parameter.is_argument):
        value = whole[parameter.group or parameter.name]
        value = plain(getattr(value, parameter.name) if parameter.group else value)
        if parameter.option.recorded:
            options[parameter.name] = value
        if parameter.default is MISSING or value != plain(parameter.default):
            differing.append(parameter)
    return function(**given, call=Call(command, options, tuple(differing), progress))


def typed(function: Callable[..., Any], command: str, options: Mapping[str, Any]) -> str:
    """A command with these options, as one types it."""
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    given = sorted((known[name] for name in options), key=lambda parameter: not parameter.is_argument)
    return _line(command, given, options)


def _line(command: str, parameters: Iterable[Parameter], values: Mapping[str, Any]) -> str:
    words = ["hxaconv", command]
    for parameter in parameters:
        value = values[parameter.name]
        on, _, off = parameter.words[0].partition("/")
        if parameter.is_argument:
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(on if value else off)
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (on, str(one))]
    return shlex.join(words)


def bare(value: Any) -> Any:
    """An option as it may be published: local paths as bare names, Hub ids and numbers as they are."""
    if isinstance(value, list):
        return [bare(one) for one in value]
    if isinstance(value, str) and (value.startswith((".", "/", "~")) or "\\" in value or value.count("/") > 1):
        return Path(value).name
    if isinstance(value, str) and "/" in value and Path(value.partition("@")[0]).exists():
        return Path(value).name
    return value


def public(function: Callable[..., Result], command: str) -> Callable[..., Result]:
    """A command's function as the package offers it: groups, or their options as keywords of its own.

    Paths, numbers of numpy, torch's dtypes and layer numbers are taken where text is; what is wrong is a HxaconvError
    that names arguments as Python has them.
    """
    name, signature = command.replace("-", "_"), inspect.signature(function)
    places = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    groups = {parameter.group for parameter in known.values() if parameter.group}

    @functools.wraps(function)
    def call(*given: Any, **values: Any) -> Result:
        try:
            if len(given) > len(places):
                raise HxaconvError(f"{name} takes {len(places)} arguments without a name, {len(given)} are given")
            values |= dict(zip(places, given, strict=False))
            _refuse_unknown(name, values, {*known, *groups, "progress"})
            lacking = [key for key, parameter in known.items() if parameter.default is MISSING and key not in values]
            if lacking:
                raise HxaconvError(f"{name} needs {' and '.join(lacking)}")
            progress = values.pop("progress", None) or _notebook_progress()
            return invoke(function, command, values, progress)
        except HxaconvError as error:
            error.message, error.hint = (in_python(text, known.values()) for text in (error.message, error.hint))
            error.args = (error.message,)
            raise

    flat = [
        inspect.Parameter(
            parameter.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD if parameter.name in places else inspect.Parameter.KEYWORD_ONLY,
            default=parameter.default,
            annotation=parameter.kind,
        )
        for parameter in known.values()
    ]
    flat.sort(key=lambda parameter: parameter.kind)
    rest = [p.replace(kind=p.KEYWORD_ONLY) for key, p in signature.parameters.items() if key in groups]
    rest.append(inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Progress))
    call.__signature__ = signature.replace(parameters=[*flat, *rest])  # type: ignore[attr-defined]
    call.__name__ = call.__qualname__ = name
    call.__module__ = "hxaconv"
    call.__doc__ = f"{inspect.getdoc(function)}\n\n{_described(known.values())}"
    return call


def _refuse_unknown(name: str, values: Iterable[str], known: set[str]) -> None:
    lines = []
    for value in values:
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            lines.append(f"{value}{f' (did you mean {near[0]}?)' if near else ''}")
    raise_all(f"{name} has no such arguments:", lines)


def _described(parameters: Iterable[Parameter]) -> str:
    lines, panel = ["Options, also as keywords:"], ""
    for parameter in parameters:
        if parameter.option.panel != panel:
            panel = parameter.option.panel
            lines.append(f"  {panel or 'In order'}")
        told = "" if parameter.default in (MISSING, None, False) else f" Default: {parameter.default}."
        lines.append(f"    {parameter.name}: {in_python(parameter.option.help, [parameter])}{told}")
    return "\n".join(lines)


_WORD = re.compile(r"(`[^`]*`)|(?<![\w-])--([a-z][a-z0-9-]*)(?: (\w+))?")


def in_python(text: str, parameters: Iterable[Parameter]) -> str:
    """A message with `--options` named as the arguments they are; commands in backticks stay as they are."""
    known: dict[str, tuple[Parameter, bool]] = {}
    for parameter in [*_of_groups(Group), *parameters]:
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


def _of_groups(group: type[Group]) -> Iterator[Parameter]:
    """The options of all groups: what one command says may be about another."""
    for kind in group.__subclasses__():
        yield from (Parameter(name, of, None, option) for name, (of, option) in options_of(kind).items())
        yield from _of_groups(kind)


def _notebook_progress() -> Progress | None:
    """A bar in a notebook; elsewhere the library is silent."""
    if "ipykernel" not in sys.modules:
        return None
    from hxaconv.cli.console import Bars

    return Bars()
