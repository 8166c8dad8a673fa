"""Writes an output so that its target is either absent or complete and right, whatever happens.

It is laid out already; here it is reserved, filled, checked and published. Several ranks fill their own tensors of the
same files; the first of them does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hxaconv import ranks
from hxaconv.errors import CheckFailed, HxaconvError, raise_all
from hxaconv.formats import FileLayout, Fill, diskio
from hxaconv.formats.files import SourceChanged, SourceFile
from hxaconv.options import Write
from hxaconv.progress import Progress, bar
from hxaconv.save import checks
from hxaconv.save.fill import Filling
from hxaconv.save.interruption import Signals, interruptible
from hxaconv.save.output import Output
from hxaconv.save.staging import (
    Staging,
    journal,
    publish,
    read_journals,
    recover,
    refuse_other_plans,
    staging_of,
    stagings_at,
)

if TYPE_CHECKING:
    from hxaconv.verification.report import Report
    from hxaconv.verification.written import OutputCheck

Prepare = Callable[[Sequence[SourceFile]], None]
"""Gets source files ready to be read: downloads them."""


def refuse(output: Output, options: Write) -> None:
    """Refuse what `write` would refuse before its first byte, for work that has to be done before there is a plan.

    Raises:
        HxaconvError: listing every problem.
    """
    staging = staging_of(output, options.digest)
    with diskio.explained(staging.path):
        checks.refuse_place(output, staging)
        checks.refuse_content(output, staging, overwrite=options.overwrite)


def write(
    output: Output,
    options: Write,
    *,
    check: OutputCheck | None = None,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> Report | None:
    """Write an output beside its target, check it there, and rename it into place; returns what its check found.

    `prepare` is given the sources that will be read, once nothing stands in the way any more.

    Raises:
        HxaconvError: for anything that stands in the way; the target is as before.
        CheckFailed: when the result is found wrong; it is kept beside the target and named.
        Interrupted: on Ctrl-C or SIGTERM; what is done is kept for --resume.
    """
    staging, first, report = staging_of(output, options.digest), ranks.rank() == 0, None
    with diskio.explained(staging.path):
        needed = checks.bytes_needed(output)

    @contextmanager
    def step() -> Iterator[None]:
        """What all ranks end together; what the system refuses is an error of ours."""
        with ranks.together(), diskio.explained(staging.path, total=needed):
            yield

    with ExitStack() as stack:
        with step():
            checks.refuse_place(output, staging)
            if first:
                lock = staging.target.with_name(f".{staging.target.name}.hxaconv-lock")
                stack.enter_context(diskio.held(lock, staging.target))
        signals = stack.enter_context(interruptible(staging.what_is_kept))
        stack.enter_context(_ending_tidily(staging))
        with step():
            complete = first and _reserve(output, staging, options, signals, needed)
        if not ranks.broadcast(complete):
            with step():
                _fill(output, staging, options, signals, prepare, needed, progress)
            stopped = ranks.gather(signals.requested())
            signals.stop_if_requested()
            if any(stopped):
                raise HxaconvError(f"rank {stopped.index(True)} was interrupted")
            with step():
                if first:
                    report = _check(output, staging, options, check)
                    with signals.deferred(all_of_them=True):
                        publish(staging, overwrite=options.overwrite)
                        _look_at_target(output, staging, signals)
        return ranks.broadcast(report)


@contextmanager
def _ending_tidily(staging: Staging) -> Iterator[None]:
    """Errors end with what is kept and how to go on; what is of no use is removed."""
    try:
        yield
    except (checks.NonfiniteError, SourceChanged):
        if ranks.rank() == 0:
            staging.remove()
        raise
    except CheckFailed as error:
        error.hint = (
            f"What was written is kept in {staging.path}. Should it have been damaged there, the same command"
            " with --resume repairs it and checks once more; otherwise delete it before another run."
        )
        raise
    except HxaconvError as error:
        error.hint = f"{error.hint} {staging.what_is_kept()}".strip()
        raise


def _reserve(output: Output, staging: Staging, options: Write, signals: Signals, needed: int) -> bool:
    """Make what is needed to write tensors, or find that all is published already (True)."""
    complete = False
    for other in stagings_at(staging.target):
        complete |= recover(other) and other.path == staging.path
    if complete and options.resume:
        _look_at_target(output, staging, signals)
        return True
    checks.refuse_content(output, staging, overwrite=options.overwrite)
    count = len(read_journals(staging.path))
    if count and not options.resume:
        raise HxaconvError(
            f"{staging.path} holds {count} finished tensors of an interrupted run of the same command",
            hint="Add --resume to continue it, or delete that folder to start over.",
        )
    if options.resume and not staging.path.is_dir():
        refuse_other_plans(staging)
    if not count:
        staging.remove()
    staging.create()
    for layout in output.files:
        with diskio.explained(staging.content / layout.name, f"reserving {layout.size} bytes", needed):
            staging.reserve(layout)
    return False


def _fill(
    output: Output,
    staging: Staging,
    options: Write,
    signals: Signals,
    prepare: Prepare | None,
    needed: int,
    progress: Progress | None,
) -> None:
    """Write this rank's tensors, but for those that an earlier run has written."""
    jobs = share(output.files, ranks.rank(), ranks.world())
    recipes = [fill.recipe for _, fills in jobs for fill in fills]
    if prepare is not None:
        prepare(list(dict.fromkeys(file for recipe in recipes for file in recipe.make.sources())))
    total, limit = sum(recipe.nbytes for recipe in recipes), diskio.memory_limit()
    with journal(staging.path, ranks.rank()) as done:
        filling = Filling(
            [(layout, staging.content / layout.name, fills) for layout, fills in jobs],
            read_journals(staging.path),
            done,
            workers=options.workers or min(2, os.cpu_count() or 1),
            kinds=(options.digest, *(() if output.is_folder else ("crc32",))),
            keep_cache=limit is None or total <= limit // 2,
            total=needed,
            progress=progress,
        )
        with bar(progress, "Writing", total), signals.deferred():
            filling.run(signals.requested)


def _check(output: Output, staging: Staging, options: Write, check: OutputCheck | None) -> Report | None:
    """Write everything but the tensors, and look at all that was written."""

    def check_sources() -> None:
        for file in output.sources():
            file.check_unchanged()

    found = read_journals(staging.path)
    raise_all(
        f"{staging.path}: these tensors were written and are no longer there:",
        [name for name in output.tensors if name not in found],
        hint="Something else changes that folder. Run the command again.",
    )
    tensors = {name: found.pop(name) for name in output.tensors}
    if not options.allow_nonfinite:
        checks.refuse_nonfinite(output, tensors)
    check_sources()
    try:
        report = checks.finish(staging, output, tensors, options, check)
    except SourceChanged as error:
        check_sources()
        # It is none of those that the tensors were made of: what is written stays good, or can be repaired.
        raise HxaconvError(error.message, hint=error.hint) from None
    check_sources()
    return report


def _look_at_target(output: Output, staging: Staging, signals: Signals) -> None:
    """Whether the target is there, with all its weights: nothing else is a success, and no signal undoes that."""
    for layout in output.files:
        path = staging.target / layout.name if output.is_folder else staging.target
        if not path.is_file() or path.stat().st_size != layout.size:
            raise HxaconvError(
                f"{path} is not there, although it was published",
                hint="Something else moves or deletes files there. Run the command again.",
            )
    staging.published = True
    signals.message = f"Interrupted. {staging.what_is_kept()}"


def share(files: Sequence[FileLayout], rank: int, world: int) -> list[tuple[FileLayout, list[Fill]]]:
    """The tensors that a rank writes: those whose middle lies in its part of all bytes, in order on disk.

    A run of neighbours, so that ranks share no more than one page of a file.
    """
    total, before = sum(fill.recipe.nbytes for layout in files for fill in layout.fills), 0
    mine: list[tuple[FileLayout, list[Fill]]] = []
    for layout in files:
        fills = []
        for fill in layout.fills:
            middle = 2 * before + fill.recipe.nbytes
            if min(world - 1, middle * world // max(1, 2 * total)) == rank:
                fills.append(fill)
            before += fill.recipe.nbytes
        if fills:
            mine.append((layout, fills))
    return mine
