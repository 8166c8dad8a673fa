"""Writes an output so that its target is either absent or complete and right, whatever happens.

It is laid out already; here it is reserved, filled, checked and published. Several ranks fill their own tensors of the
same files; the first of them does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hxaconv import ranks
from hxaconv.errors import CheckFailed, HxaconvError, raise_all
from hxaconv.formats import FileLayout, Fill, diskio
from hxaconv.formats.files import SourceChanged, SourceFile
from hxaconv.options import Write
from hxaconv.progress import Progress, bar
from hxaconv.save import checks
from hxaconv.save.fill import Filling, Finished
from hxaconv.save.interruption import Signals, interruptible
from hxaconv.save.output import Output
from hxaconv.save.staging import (
    journal,
    plan_record,
    publish,
    read_journals,
    recover,
    refuse_other_plans,
    staging_of,
    stagings_at,
)

if TYPE_CHECKING:
    from hxaconv.verification.report import Report

Prepare = Callable[[Sequence[SourceFile]], None]
"""Gets source files ready to be read: downloads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteResult:
    """A target that was published."""

    path: Path
    nbytes: int
    """Of all weight files."""
    digests: Mapping[str, str]
    """Tensor name -> digest; empty for `none`."""
    nonfinite: Mapping[str, int]
    """Tensor name -> NaN and infinite values, where there are any."""
    leftovers: tuple[Path, ...] = ()
    """Folders of other interrupted runs on the same target."""
    report: Report | None = None
    """What its verification found."""


def write(
    output: Output,
    options: Write,
    *,
    check: checks.Check | None = None,
    prepare: Prepare | None = None,
    progress: Progress | None = None,
) -> WriteResult:
    """Write an output beside its target, verify it there, and rename it into place.

    `prepare` is given the sources that will be read, once nothing stands in the way any more.

    Raises:
        HxaconvError: for anything that stands in the way; the target is as before.
        CheckFailed: when the result is found wrong; it is kept beside the target and named.
        Interrupted: on Ctrl-C or SIGTERM; what is done is kept for --resume.
    """
    run = _Run(output, options, progress)
    target = run.output.target
    with ExitStack() as stack:
        with run.step():
            checks.refuse(run.output, run.staging, overwrite=options.overwrite, place_alone=True)
            if ranks.rank() == 0:
                stack.enter_context(diskio.held(target.with_name(f".{target.name}.hxaconv-lock"), target))
        signals = stack.enter_context(interruptible(run.what_is_kept))
        stack.enter_context(run.tidy_end())
        with run.step():
            complete = ranks.rank() == 0 and run.begin(signals)
        if not ranks.broadcast(complete):
            with run.step():
                run.fill(signals, prepare)
            stopped = ranks.gather(signals.requested())
            signals.stop_if_requested()
            if any(stopped):
                raise HxaconvError(f"rank {stopped.index(True)} was interrupted")
            with run.step():
                if ranks.rank() == 0:
                    run.finish(signals, check)
        with run.step():
            result = run.result()
        return ranks.broadcast(result)


def refuse(output: Output, options: Write) -> None:
    """Refuse what `write` would refuse before its first byte, for work that has to be done before there is a plan.

    Raises:
        HxaconvError: listing every problem.
    """
    run = _Run(output, options, None)
    with run.explained():
        checks.refuse(run.output, run.staging, overwrite=options.overwrite)


class _Run:
    """One call of `write`."""

    def __init__(self, output: Output, options: Write, progress: Progress | None) -> None:
        target = output.target.absolute()
        if target.name in ("", ".."):
            raise HxaconvError(
                f"{target} cannot be written: it has no name of its own", hint="Name a new file or folder."
            )
        self.output = replace(output, target=target)
        self.options, self.progress = options, progress
        self.record = plan_record(self.output, options.digest)
        self.staging = staging_of(target, self.record)
        self.needed = checks.bytes_needed(self.output)
        self.published = False
        self.tensors: Mapping[str, Finished] = {}
        self.report: Report | None = None

    def explained(self) -> AbstractContextManager[None]:
        """What the system refuses inside, as an error of ours."""
        return diskio.explained(self.staging.path, total=self.needed)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step that all ranks end together."""
        with ranks.together(), self.explained():
            yield

    @contextmanager
    def tidy_end(self) -> Iterator[None]:
        """Errors end with what is kept and how to go on; what is of no use is removed."""
        try:
            yield
        except (checks.NonfiniteError, SourceChanged):
            if ranks.rank() == 0:
                self.staging.remove()
            raise
        except CheckFailed as error:
            error.hint = (
                f"What was written is kept in {self.staging.path}. Should it have been damaged there, the same command"
                " with --resume repairs it and checks once more; otherwise delete it before another run."
            )
            raise
        except HxaconvError as error:
            error.hint = f"{error.hint} {self.what_is_kept()}".strip()
            raise

    def what_is_kept(self) -> str:
        """Drop the staging folder if nothing in it is worth keeping; add how to continue."""
        path, target = self.staging.path, self.staging.target
        if self.published:
            return f"{target} is complete."
        count = len(read_journals(path))
        if count == 0:
            if ranks.rank() == 0:
                self.staging.remove()
            return f"Nothing was written; {target} is as before."
        return f"{count} finished tensors are kept in {path}; the same command with --resume continues."

    def begin(self, signals: Signals) -> bool:
        """Make what is needed to write tensors, or find that all is published already (True)."""
        staging, resume = self.staging, self.options.resume
        self.tensors, complete = read_journals(staging.path), False
        for other in stagings_at(staging.target):
            complete |= recover(other) and other.path == staging.path
        if complete and resume:
            self._look_at_target(signals)
            return True
        checks.refuse(self.output, staging, overwrite=self.options.overwrite)
        count = len(read_journals(staging.path))
        if count and not resume:
            raise HxaconvError(
                f"{staging.path} holds {count} finished tensors of an interrupted run of the same command",
                hint="Add --resume to continue it, or delete that folder to start over.",
            )
        if resume and not staging.path.is_dir():
            refuse_other_plans(staging, self.record)
        if not count:
            staging.remove()
        staging.create(self.record)
        for layout in self.output.files:
            with diskio.explained(staging.content / layout.name, f"reserving {layout.size} bytes", self.needed):
                staging.reserve(layout)
        return False

    def fill(self, signals: Signals, prepare: Prepare | None) -> None:
        """Write this rank's tensors, but for those that an earlier run has written."""
        jobs = share(self.output.files, ranks.rank(), ranks.world())
        recipes = [fill.recipe for _, fills in jobs for fill in fills]
        if prepare is not None:
            prepare(list(dict.fromkeys(file for recipe in recipes for file in recipe.make.sources())))
        digest, total = self.options.digest, sum(recipe.nbytes for recipe in recipes)
        limit = diskio.memory_limit()
        with journal(self.staging.path, ranks.rank()) as done:
            filling = Filling(
                [(layout, self.staging.content / layout.name, fills) for layout, fills in jobs],
                read_journals(self.staging.path),
                done,
                workers=self.options.workers or min(2, os.cpu_count() or 1),
                crc32=digest == "crc32" or not self.output.is_folder,
                sha256=digest == "sha256",
                keep_cache=limit is None or total <= limit // 2,
                total=self.needed,
                progress=self.progress,
            )
            with bar(self.progress, "Writing", total), signals.deferred():
                filling.run(signals.requested)

    def finish(self, signals: Signals, check: checks.Check | None) -> None:
        """Everything but the tensors, the verdict on them, and the target's name."""
        output, staging = self.output, self.staging
        self.tensors = read_journals(staging.path)
        raise_all(
            f"{staging.path}: these tensors were written and are no longer there:",
            [name for name in output.tensors if name not in self.tensors],
            hint="Something else changes that folder. Run the command again.",
        )
        if not self.options.allow_nonfinite:
            checks.refuse_nonfinite(output, self.tensors)
        self._check_sources()
        try:
            self.report = checks.finish(staging, output, self.tensors, self.options, check)
        except SourceChanged as error:
            self._check_sources()
            # It is none of those that the tensors were made of: what is written stays good, or can be repaired.
            raise HxaconvError(error.message, hint=error.hint) from None
        self._check_sources()
        with signals.deferred(all_of_them=True):
            publish(staging, overwrite=self.options.overwrite)
            self._look_at_target(signals)

    def _check_sources(self) -> None:
        for file in self.output.sources():
            file.check_unchanged()

    def _look_at_target(self, signals: Signals) -> None:
        """Whether the target is there, with all its weights: nothing else is a success, and no signal undoes that."""
        target = self.output.target
        for layout in self.output.files:
            path = target / layout.name if self.output.is_folder else target
            if not path.is_file() or path.stat().st_size != layout.size:
                raise HxaconvError(
                    f"{path} is not there, although it was published",
                    hint="Something else moves or deletes files there. Run the command again.",
                )
        self.published = True
        signals.message = f"Interrupted. {self.what_is_kept()}"

    def result(self) -> WriteResult:
        """What `write` returns, once the target is published."""
        digests = {name: tensor.digest(self.options.digest) for name, tensor in self.tensors.items()}
        return WriteResult(
            path=self.output.target,
            nbytes=self.output.nbytes,
            digests={name: digest for name, digest in digests.items() if digest is not None},
            nonfinite={name: tensor.nonfinite for name, tensor in self.tensors.items() if tensor.nonfinite},
            leftovers=tuple(staging.path for staging in stagings_at(self.output.target)),
            report=self.report,
        )


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
