"""Writes an output so that its target is either absent or complete and right, whatever happens.

It is laid out already; here it is reserved, filled, checked and published. Several ranks fill their own tensors of the
same files; the first of them does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hxaconv import ranks
from hxaconv.errors import CheckFailed, HxaconvError, bullet_list, raise_all
from hxaconv.formats import FileLayout, Fill
from hxaconv.formats.files import SourceChanged, SourceFile
from hxaconv.formats.json_files import plain_data
from hxaconv.options import Write
from hxaconv.progress import Progress, bar
from hxaconv.save import diskio, preflight
from hxaconv.save.checksums import Finished
from hxaconv.save.documents import read_back, write_documents, write_provenance
from hxaconv.save.fill import Filling
from hxaconv.save.interruption import Signals, interruptible
from hxaconv.save.output import Output
from hxaconv.save.staging import (
    Journal,
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
VERDICT_DIGITS = 3
"""Significant digits of what a verification measured in hxaconv.json: beyond them, sums depend on the machine."""


class Check(Protocol):
    """What an output is put to before it gets its name; the caller brings it."""

    def settings(self, output: Output, raw: Mapping[str, Any], where: str) -> list[str]:
        """What is wrong with the settings that stand on disk; asked always."""
        ...

    def report(self, output: Output, staged: Path, *, allow_nonfinite: bool) -> Report:
        """What a verification of the staged checkpoint finds; asked unless --no-verify."""
        ...


class NonfiniteError(HxaconvError):
    """Tensors that hold NaN or infinite values, which nobody has allowed."""


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
    check: Check | None = None,
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
    with ExitStack() as stack:
        with run.step():
            preflight.check_place(run.output, run.staging, overwrite=options.overwrite)
            if ranks.rank() == 0:
                stack.enter_context(diskio.held(_lock_path(run.output.target), run.output.target))
        signals = stack.enter_context(interruptible(run.what_is_kept))
        stack.enter_context(run.tidy_end())
        tensors = read_journals(run.staging.path)
        with run.step():
            complete = ranks.rank() == 0 and run.begin()
        if ranks.broadcast(complete):
            run.note_published(signals)
        else:
            with run.step():
                run.fill(signals, prepare)
            stopped = ranks.gather(signals.requested())
            signals.stop_if_requested()
            if any(stopped):
                raise HxaconvError(f"rank {stopped.index(True)} was interrupted")
            with run.step():
                if ranks.rank() == 0:
                    tensors = run.finish(signals, check)
        return ranks.broadcast(run.result(tensors))


def refuse(output: Output, options: Write) -> None:
    """Refuse what `write` would refuse before its first byte, for work that has to be done before there is a plan.

    Raises:
        HxaconvError: listing every problem.
    """
    run = _Run(output, options, None)
    with diskio.explained(run.staging.path, "looking"):
        preflight.check_place(run.output, run.staging, overwrite=options.overwrite)
        preflight.check(run.output, run.staging, overwrite=options.overwrite)


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.hxaconv-lock")


class _Run:
    """One call of `write`."""

    def __init__(self, output: Output, options: Write, progress: Progress | None) -> None:
        target = output.target.absolute()
        if target.name in ("", ".."):
            raise HxaconvError(
                f"{target} cannot be written: it has no name of its own", hint="Name a new file or folder."
            )
        self.output = replace(output, target=target)
        self.options = options
        self.progress = progress
        self.record = plan_record(self.output, options.digest)
        self.staging = staging_of(self.output, self.record)
        self.total = preflight.bytes_needed(self.output)
        self.published = False
        self.report: Report | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step that all ranks end together, what the system refuses an error of ours."""
        with ranks.together(), diskio.explained(self.staging.path, total=self.total):
            yield

    @contextmanager
    def tidy_end(self) -> Iterator[None]:
        """Errors end with what is kept and how to go on; what is of no use to anybody is removed."""
        try:
            with diskio.explained(self.staging.path, total=self.total):
                yield
        except (NonfiniteError, SourceChanged):
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
        """Drop the staging folder if nothing in it is worth keeping; say how to go on."""
        path, target = self.staging.path, self.staging.target
        if self.published:
            return f"{target} is complete."
        count = len(read_journals(path))
        if count == 0:
            if ranks.rank() == 0:
                self.staging.remove()
            return f"Nothing had been finished; {target} is as before."
        return f"{count} finished tensors are kept in {path}; the same command with --resume continues."

    def note_published(self, signals: Signals) -> None:
        """What is said of an interruption from now on, when the command is about to end."""
        self.published = True
        signals.message = f"Interrupted. {self.what_is_kept()}"

    def begin(self) -> bool:
        """Make what is needed to write tensors, or find that all is published already (True)."""
        staging, options = self.staging, self.options
        complete = False
        for other in stagings_at(staging.target):
            complete |= recover(other) and other.path == staging.path
        if complete and options.resume:
            self._look_at_target()
            return True
        preflight.check(self.output, staging, overwrite=options.overwrite)
        count = len(read_journals(staging.path))
        if count and not options.resume:
            raise HxaconvError(
                f"{staging.path} holds {count} finished tensors of an interrupted run of the same command",
                hint="Add --resume to continue it, or delete that folder to start over.",
            )
        if options.resume and not staging.path.is_dir():
            refuse_other_plans(staging, self.record)
        if not count:
            staging.remove()
        staging.create(self.record)
        staging.reserve(self.output.files, self.total)
        return False

    def fill(self, signals: Signals, prepare: Prepare | None) -> None:
        """Write this rank's tensors, but for those that an earlier run has written."""
        jobs = share(self.output.files, ranks.rank(), ranks.world())
        recipes = [fill.recipe for _, fills in jobs for fill in fills]
        if prepare is not None:
            prepare(list(dict.fromkeys(file for recipe in recipes for file in recipe.make.sources())))
        digest, total = self.options.digest, sum(recipe.nbytes for recipe in recipes)
        limit = diskio.memory_limit()
        journal = Journal(self.staging.path, ranks.rank())
        try:
            filling = Filling(
                [(layout, self.staging.content / layout.name, fills) for layout, fills in jobs],
                read_journals(self.staging.path),
                journal.done,
                workers=self.options.workers or min(2, os.cpu_count() or 1),
                crc32=digest == "crc32" or not self.output.is_folder,
                sha256=digest == "sha256",
                keep_cache=limit is None or total <= limit // 2,
                total=self.total,
                progress=self.progress,
            )
            with bar(self.progress, "Writing", total), signals.deferred():
                filling.run(signals.requested)
        finally:
            journal.close()

    def finish(self, signals: Signals, check: Check | None) -> dict[str, Finished]:
        """Everything but the tensors, the verdict on them, and the target's name; returns the tensors."""
        output, staging = self.output, self.staging
        tensors = read_journals(staging.path)
        raise_all(
            f"{staging.path}: these tensors were written and are no longer there:",
            [name for name in output.tensors if name not in tensors],
            hint="Something else changes that folder. Run the command again.",
        )
        if not self.options.allow_nonfinite:
            refuse_nonfinite(output, tensors)
        self._check_sources()
        for layout in output.files:
            staging.seal(layout, {fill.name: tensors[fill.name].crc32 or 0 for fill in layout.fills})
        write_documents(staging, output)
        read_back(staging, output, tensors, check)
        verdict = None
        if check is not None and self.options.verify:
            self.report = self._verified(check)
            verdict = plain_data(self.report.verdict(), VERDICT_DIGITS)
        write_provenance(staging, output, tensors, verdict, self.options.digest)
        self._check_sources()
        with signals.deferred(all_of_them=True):
            publish(staging, overwrite=self.options.overwrite)
            self._look_at_target()
            self.note_published(signals)
        return tensors

    def _verified(self, check: Check) -> Report:
        try:
            report = check.report(self.output, self.staging.checkpoint, allow_nonfinite=self.options.allow_nonfinite)
            report.raise_if_failed()
            return report
        except SourceChanged as error:
            self._check_sources()
            # It is none of those that the tensors were made of: what is written stays good, or can be repaired.
            raise HxaconvError(error.message, hint=error.hint) from None

    def _check_sources(self) -> None:
        for file in self.output.sources():
            file.check_unchanged()

    def _look_at_target(self) -> None:
        """Whether the target is there, with all its weights: nothing else is a success."""
        target = self.output.target
        for layout in self.output.files:
            path = target / layout.name if self.output.is_folder else target
            if not path.is_file() or path.stat().st_size != layout.size:
                raise HxaconvError(
                    f"{path} is not there, although it was published",
                    hint="Something else moves or deletes files there. Run the command again.",
                )

    def result(self, tensors: Mapping[str, Finished]) -> WriteResult:
        """What `write` returns, once the target is published."""
        digests = {name: tensor.digest(self.options.digest) for name, tensor in tensors.items()}
        return WriteResult(
            path=self.output.target,
            nbytes=self.output.nbytes,
            digests={name: digest for name, digest in digests.items() if digest is not None},
            nonfinite={name: tensor.nonfinite for name, tensor in tensors.items() if tensor.nonfinite},
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


def refuse_nonfinite(output: Output, tensors: Mapping[str, Finished]) -> None:
    """Name all tensors with NaN or infinite values.

    Raises:
        NonfiniteError: when there are any.
    """
    found = {name: recipe for name, recipe in output.tensors.items() if tensors[name].nonfinite}
    if not found:
        return
    problems = [f"{name}: {tensors[name].nonfinite} of {r.numel} ({r.origin})" for name, r in found.items()]
    hint = "The source is damaged or its training diverged. To convert it all the same, add --allow-nonfinite."
    if any(recipe.dtype == "F16" and recipe.make.kind in ("cast", "scale") for recipe in found.values()):
        hint = "float16 ends at 65504: use --dtype bfloat16 or float32, or add --allow-nonfinite."
    raise NonfiniteError(f"these tensors hold NaN or infinite values:\n{bullet_list(problems)}", hint=hint)
