"""Which of the many options of a choice go together, and what rules they make."""

from __future__ import annotations

from dataclasses import replace

from hxaconv.calls import Call
from hxaconv.errors import HxaconvError, raise_all
from hxaconv.model import layer_choice
from hxaconv.options import Choice, option_words, options_of
from hxaconv.selection.advice import needs
from hxaconv.selection.schedule import Rules
from hxaconv.selection.strategies import STRATEGIES

CHOOSING = tuple(name for name in options_of(Choice) if name not in ("layers", "allow_gqa_layer_0"))
TOKENS = ("input_ids", "text", "tokens", "device")
WRITING = (
    *("max_shard_size", "format", "dry_run", "resume", "verify", "workers", "digest"),
    *("allow_nonfinite", "push_to"),
)


def refuse_useless(choice: Choice, call: Call, *, writes: bool) -> None:
    """Refuse options that would be ignored; `writes`: there is an OUT.

    Raises:
        HxaconvError: listing everything at once.
    """
    if choice.layers is not None and not writes:
        raise HxaconvError("--layers names the choice, but there is no OUT to write it to", hint="Add OUT.")
    raise_all("these options do not go together:", _useless(choice, call, writes=writes))


def _useless(choice: Choice, call: Call, *, writes: bool) -> list[str]:
    if choice.layers is not None:
        return call.useless((*CHOOSING, *TOKENS), "--layers is a choice made, nothing is to be scored")
    wanted, found = needs(choice.strategy), []
    if choice.strategy != "kl":
        found += call.useless(("kl_mode",), "only --strategy kl has modes")
    if choice.strategy == "log" and not choice.log:
        found.append("--strategy log reads a training log: name it with --log FILE.csv")
    elif choice.strategy != "log":
        found += call.useless(("log",), "only --strategy log reads one")
    if not writes:
        found += call.useless(WRITING, "there is no OUT to write")
        if "student" not in wanted:
            found += call.useless(("from_", "preset", "scale"), f"--strategy {choice.strategy} looks at no RWKV layer")
        if "tokens" not in wanted:
            found += call.useless(("seed",), "nothing is random here")
        if not choice.save and not choice.plot:
            found += call.useless(("overwrite",), "nothing is written")
    return found


def unread_tokens(choice: Choice, call: Call) -> list[str]:
    """A note where tokens were named for a strategy that reads none, as a loop over strategies does."""
    if choice.layers is not None or "tokens" in needs(choice.strategy):
        return []
    return call.useless(TOKENS, f"--strategy {choice.strategy} looks at no tokens, they are not read")


def rules_of(choice: Choice, num_layers: int) -> Rules | None:
    """The strategy's own rules with the options over them; None where no option is given.

    Raises:
        HxaconvError: for gaps that contradict each other, and for --exclude that names no layers of the model.
    """
    gaps = {key: getattr(choice, key) for key in ("min_gap", "max_gap", "max_consecutive")}
    given = {key: value for key, value in gaps.items() if value is not None}
    problems = [f"{option_words([key])} {value}: from 1 on" for key, value in given.items() if value < 1]
    if not problems and choice.min_gap and choice.max_gap and choice.min_gap > choice.max_gap:
        problems.append(f"--min-gap {choice.min_gap} is more than --max-gap {choice.max_gap}")
    raise_all("the rules cannot be kept:", problems, hint="Adjacent layers have gap 1, and are a run of 2.")
    if choice.exclude:
        given["exclude"] = frozenset(layer_choice.parse_numbers(choice.exclude, num_layers, "--exclude"))
    return replace(STRATEGIES[choice.strategy].rules, **given) if given else None
