"""`pick-gqa-layers`: which of its many options go together, said before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hxaconv.cli.plots import plot_problems
from hxaconv.commands.common import useless
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model import layer_choice
from hxaconv.save.command_line import option_name
from hxaconv.selection.advice import needs
from hxaconv.selection.schedule import Rules
from hxaconv.selection.strategies import STRATEGIES

CHOOSING = ("count", "strategy", "min_gap", "max_gap", "max_consecutive", "exclude", "kl_mode", "log", "save", "plot")
TOKENS = ("input_ids", "text", "tokens", "device")
WRITING = (
    *("max_shard_size", "format", "dry_run", "resume", "no_verify", "workers", "digest"),
    *("allow_nonfinite", "push_to"),
)


def check_options(values: Mapping[str, Any], given: set[str]) -> None:
    """Refuse options of `values` that would be ignored, and results that could not be written after scoring.

    Raises:
        HxaconvError: listing everything at once.
    """
    if values["layers"] is not None and values["out"] is None:
        raise HxaconvError("--layers names the choice, but there is no OUT to write it to", hint="Add OUT.")
    problems = _ignored(values, given)
    if values["layers"] is None:
        problems += _unwritable(values)
    raise_all("this cannot be done as asked for:", problems)


def _ignored(values: Mapping[str, Any], given: set[str]) -> list[str]:
    strategy, applies = values["strategy"], values["out"] is not None
    if values["layers"] is not None:
        return useless(given, (*CHOOSING, *TOKENS), "--layers is a choice made, nothing is to be scored")
    wanted, found = needs(strategy), []
    if strategy != "kl":
        found += useless(given, ("kl_mode",), "only --strategy kl has modes")
    if strategy == "log" and not values["log"]:
        found.append("--strategy log reads a training log: name it with --log FILE.csv")
    elif strategy != "log":
        found += useless(given, ("log",), "only --strategy log reads one")
    if "tokens" not in wanted:
        found += useless(given, TOKENS, f"--strategy {strategy} looks at no tokens")
    if not applies:
        found += useless(given, WRITING, "there is no OUT to write")
        if "student" not in wanted:
            found += useless(given, ("from_", "preset", "scale"), f"--strategy {strategy} looks at no RWKV layer")
        if "tokens" not in wanted:
            found += useless(given, ("seed",), "nothing is random here")
        if not values["save"] and not values["plot"]:
            found += useless(given, ("overwrite",), "nothing is written")
    return found


def _unwritable(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for option in ("save", "out"):
        path = Path(values[option]) if values[option] else None
        if path is None:
            continue
        folder = path.absolute().parent
        if path.exists() and not values["overwrite"]:
            problems.append(f"{path} exists; --overwrite replaces it")
        if option != "out" and path.is_dir():
            problems.append(f"--{option} {path}: that is a folder")
        if not folder.is_dir():
            problems.append(f"{folder} is not a folder")
        elif not os.access(folder, os.W_OK):
            problems.append(f"{folder}: nothing can be written there")
    if values["plot"]:
        problems += [f"--plot: {why}" for why in plot_problems(Path(values["plot"]), overwrite=values["overwrite"])]
    return problems


def cache_path(values: Mapping[str, Any]) -> Path | None:
    """Where interrupted scoring keeps its state: beside what will be written, if anything is."""
    beside = values["save"] or values["out"] or values["plot"]
    return Path(f"{beside.rstrip('/')}.scores.safetensors") if beside else None


def rules(values: Mapping[str, Any], num_layers: int) -> Rules | None:
    """The strategy's own rules with the options over them; None where no option is given.

    Raises:
        HxaconvError: for gaps below 1, and for --exclude that names no layers of the model.
    """
    given = {key: values[key] for key in ("min_gap", "max_gap", "max_consecutive") if values[key] is not None}
    problems = [f"--{option_name(key)} {value}: from 1 on" for key, value in given.items() if value < 1]
    if not problems and {"min_gap", "max_gap"} <= given.keys() and given["min_gap"] > given["max_gap"]:
        problems.append(f"--min-gap {given['min_gap']} is more than --max-gap {given['max_gap']}")
    raise_all("the rules cannot be kept:", problems, hint="Adjacent layers have gap 1, and are a run of 2.")
    if values["exclude"]:
        given["exclude"] = frozenset(layer_choice.parse_numbers(values["exclude"], num_layers, "--exclude"))
    return replace(STRATEGIES[values["strategy"]].rules, **given) if given else None
