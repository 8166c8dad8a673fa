"""Where an output grows until it is complete: `OUT.partial-<id>/` beside the target.

    OUT.partial-<id>/plan.json     what is being written, by which command
    OUT.partial-<id>/journal*      what is on disk already, one journal per rank
    OUT.partial-<id>/content/      the files, as they will be published
    OUT.partial-<id>/publishing    present while files are being renamed into place
    OUT.partial-<id>/replaced/     what stood there before

The id comes from everything that decides the bytes, so that runs of one plan meet in one folder and runs of
another never do. Publishing is a few renames; `recover` finishes or undoes them after a crash.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from hxaconv import ranks
from hxaconv.errors import HxaconvError, bullet_list, raise_all
from hxaconv.formats import FileLayout, diskio
from hxaconv.formats.files import SourceFile, write_from
from hxaconv.options import option_words
from hxaconv.save.fill import Finished
from hxaconv.save.output import FILE_SUFFIXES, Output

RECORD_NAME = "plan.json"
_MARKER = "publishing"
_REPLACED = "replaced"
_JOURNAL = "journal"

PlanRecord = tuple[dict[str, str], dict[str, str]]
"""What may differ between two runs, as people call it, and its value: the command, its options and sources; then
digests of all that decides the bytes."""


class Staging:
    """The folder of one plan: a folder of files, or, by its target's suffix, one file with a sidecar."""

    def __init__(self, path: Path, target: Path, record: PlanRecord = ({}, {})) -> None:
        self.path, self.target, self.record = path, target, record
        self.content = path / "content"
        """The folder that files are written into."""
        self.checkpoint = self.content / target.name if target.suffix in FILE_SUFFIXES else self.content
        """The staged output as a checkpoint that can be opened: a folder, or a `.pth` file."""
        self.published = False

    def moves(self) -> list[tuple[Path, Path]]:
        """From where to where publishing renames; the target itself comes last."""
        sidecar = self.target.with_name(f"{self.target.stem}.json")
        beside = [(self.content / sidecar.name, sidecar)] if self.checkpoint != self.content else []
        return [*beside, (self.checkpoint, self.target)]

    def allocated_bytes(self) -> int:
        """Disk space that earlier runs of the same plan have taken already."""
        found = os.scandir(self.content) if os.path.isdir(self.content) else ()
        stats = [entry.stat(follow_symlinks=False) for entry in found]
        # A source's own file takes nothing.
        return sum(getattr(stat, "st_blocks", 0) * 512 for stat in stats if stat.st_nlink == 1)

    def what_is_kept(self) -> str:
        """A sentence on what an interruption or an error leaves, and how to go on; what is of no use is removed."""
        if self.published:
            return f"{self.target} is complete."
        if count := len(read_journals(self.path)):
            return f"{count} finished tensors are kept in {self.path}; the same command with --resume continues."
        if ranks.rank() == 0:
            self.remove()
        return f"Nothing was written; {self.target} is as before."

    def create(self) -> None:
        """Make the folder, and record the plan.

        Raises:
            OSError: when the disk has no room for that.
        """
        self.content.mkdir(parents=True, exist_ok=True)
        if not (self.path / RECORD_NAME).exists():
            self.write(self.path / RECORD_NAME, [json.dumps(self.record, indent=1).encode()])
            diskio.sync_folder(self.path)
            diskio.sync_folder(self.path.parent)

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """A small file in this folder, complete and synced, or not there at all.

        Raises:
            OSError: naming the file.
        """
        path.parent.mkdir(exist_ok=True)
        diskio.write_file(path, chunks, self.path)
        if path.parent not in (self.path, self.content):
            diskio.sync_folder(path.parent)

    def reserve(self, layout: FileLayout) -> None:
        """Give a file its size, its disk space where the file system can, and its headers; a source's own is linked.

        Raises:
            OSError: when there is no room for it.
        """
        path = self.content / layout.name
        if layout.hard_link is not None:
            _link_or_copy(layout.hard_link, path)
            return
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            diskio.reserve(fd, layout.size)
            for offset, data in layout.segments():
                write_from(fd, memoryview(data), offset)
        finally:
            os.close(fd)

    def seal(self, layout: FileLayout, crcs: Mapping[str, int]) -> None:
        """Write what depends on the tensors' checksums, and sync the file with all that is in it.

        Raises:
            OSError: when the system refuses, or the file is not what it should be.
        """
        fd = os.open(self.content / layout.name, os.O_RDONLY if layout.hard_link else os.O_RDWR)
        try:
            for offset, data in layout.seal(crcs) if layout.seal is not None else ():
                write_from(fd, memoryview(data), offset)
            diskio.sync_file(fd)
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Delete the folder with everything in it, as far as possible."""
        shutil.rmtree(self.path, ignore_errors=True)


def _link_or_copy(source: SourceFile, path: Path) -> None:
    """Make `path` the same file as the source, or, where there are no links, a complete copy of it."""
    source.open()
    assert source.path is not None
    if path.exists():
        if os.path.samefile(source.path, path):
            return
        path.unlink()  # a copy of an interrupted run: it may be incomplete
    try:
        os.link(source.path, path)
    except OSError:
        copy = path.with_name(f"{path.name}.copying")
        shutil.copyfile(source.path, copy)
        with open(copy, "rb+") as file:
            diskio.sync_file(file.fileno())
        os.replace(copy, path)


# Which plan it is


def plan_record(output: Output, digest: str) -> PlanRecord:
    """What `plan.json` holds."""

    def shown(value: Any) -> str:
        return "not given" if value is None or value is False else "given" if value is True else str(value)

    call = output.record.call
    named = {"the command": call.command, "hxaconv": str(output.provenance.get("hxaconv"))}
    for name, value in {**call.options, "digest": digest}.items():
        if name != "out":
            named[name if name in ("source", "teacher") else option_words([name])] = shown(value)
    # A download's time is not the source's.
    exact = [(f.name, f.size, None if f.fetch else f.mtime_ns, f.header_digest) for f in output.sources()]
    for name, size, modified, header in exact:
        when = "?" if modified is None else datetime.fromtimestamp(modified / 1e9).isoformat(" ", "milliseconds")
        named[name] = f"{size:,} bytes, modified {when}, header {header[:8]}"
    parts: dict[str, Iterable[Any]] = {
        "digest": [digest],
        "sources": exact,
        "tensors": ((name, r.dtype, r.shape, r.make.kind, r.origin) for name, r in output.tensors.items()),
        "files": [(layout.name, layout.size) for layout in output.files],
        "documents": output.documents.items(),
        "copied files": [(name, file.size) for name, file in output.copied_files.items()],
        "provenance": output.provenance.items(),  # with the version: another one may lay it out otherwise
    }
    return named, {name: _sha256(part) for name, part in parts.items()}


def _sha256(parts: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(repr(part).encode())
    return found.hexdigest()


def staging_of(output: Output, digest: str) -> Staging:
    """The staging folder of an output, whether it exists or not.

    Raises:
        HxaconvError: for a target without a name.
    """
    target, record = output.target.absolute(), plan_record(output, digest)
    if target.name in ("", ".."):
        raise HxaconvError(f"{target} cannot be written: it has no name of its own", hint="Name a new file or folder.")
    return Staging(target.with_name(f"{target.name}.partial-{_sha256([record[1]])[:12]}"), target, record)


def stagings_at(target: Path) -> list[Staging]:
    """All staging folders beside a target."""
    found = sorted(target.parent.glob(f"{glob.escape(target.name)}.partial-{'[0-9a-f]' * 12}"))
    return [Staging(path, target) for path in found if (path / RECORD_NAME).is_file()]


def refuse_other_plans(staging: Staging) -> None:
    """The reason why there is nothing to resume although interrupted runs on this target exist.

    Raises:
        HxaconvError: when there are such runs: with what people know by name and differs, else with digests that do.
    """
    for other in stagings_at(staging.target):
        lines: list[str] = []
        try:
            recorded = json.loads((other.path / RECORD_NAME).read_bytes())
            for then, now in zip(recorded, staging.record, strict=True):
                pairs = {key: (then.get(key, "not given"), now.get(key, "not given")) for key in {**then, **now}}
                # Two spellings of one path are the same.
                differing = {key: pair for key, pair in pairs.items() if len({*map(os.path.abspath, pair)}) > 1}
                lines = lines or [f"{key}: {before} then, {after} now" for key, (before, after) in differing.items()]
        except (ValueError, TypeError, AttributeError, RecursionError):
            lines = [f"its {RECORD_NAME} cannot be read"]
        raise HxaconvError(
            f"{other.path} cannot be resumed, something has changed since it was begun:\n{bullet_list(lines)}",
            hint=f"Use the options and sources of then, or delete {other.path} and start without --resume.",
        )


# What is on disk already


@contextlib.contextmanager
def journal(folder: Path, rank: int) -> Iterator[Callable[[Mapping[str, Finished]], None]]:
    """This rank's journal: yields what is called with tensors that are synced, and syncs lines about them in its turn.

    It is opened once: where the folder vanishes meanwhile, no new one is begun.
    """
    path = folder / (f"{_JOURNAL}-{rank}" if rank else _JOURNAL)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def done(finished: Mapping[str, Finished]) -> None:
        # The break comes first: a line that a crash or a full disk cut short ends where the next one begins.
        lines = ("\n" + json.dumps({"tensor": name, **found._asdict()}) for name, found in finished.items())
        data = memoryview("".join(lines).encode())
        with diskio.explained(path):
            while len(data):
                data = data[os.write(fd, data) :]
            diskio.sync_file(fd)

    try:
        yield done
    finally:
        os.close(fd)


def read_journals(folder: Path) -> dict[str, Finished]:
    """The tensors that the journals in a staging folder name; lines cut short by a crash are skipped."""
    tensors: dict[str, Finished] = {}
    for path in sorted(folder.glob(f"{_JOURNAL}*")):
        with open(path, "rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    tensors[entry["tensor"]] = Finished(entry["crc32"], entry["sha256"], entry["nonfinite"])
    return tensors


# Publishing


def publish(staging: Staging, *, overwrite: bool) -> None:
    """Rename the finished files into place; what stood there (`overwrite`) goes when they are.

    Raises:
        HxaconvError: when something has appeared there, or a rename fails; everything is as before then.
    """
    appeared = [str(final) for _, final in staging.moves() if os.path.lexists(final)]
    if not overwrite:
        raise_all("these appeared while the output was being written:", appeared, hint="Move them away.")
    try:
        diskio.sync_folder(staging.content)
        staging.write(staging.path / _MARKER, [])
        diskio.sync_folder(staging.path)
        _rename_into_place(staging)
    except OSError as error:
        with contextlib.suppress(OSError):
            _undo(staging)
        raise HxaconvError(
            f"{staging.target}: renaming the finished files into place failed: {error.strerror or error}",
            hint="Check the disk or the network file system. All files are complete.",
        ) from error
    staging.remove()


def _rename_into_place(staging: Staging) -> None:
    replaced, moves = staging.path / _REPLACED, staging.moves()
    for _, final in reversed(moves):
        if os.path.lexists(final):
            replaced.mkdir(exist_ok=True)
            os.rename(final, replaced / final.name)
    for staged, final in moves:
        os.rename(staged, final)
    diskio.sync_folder(staging.target.parent)


def recover(staging: Staging) -> bool:
    """Bring a publication that a crash cut short to its end (True), or back to its beginning.

    Raises:
        HxaconvError: when the file system does not allow it.
    """
    if not (staging.path / _MARKER).exists():
        return False
    try:
        if not staging.checkpoint.exists() and os.path.lexists(staging.target):
            diskio.sync_folder(staging.target.parent)
            staging.remove()
            return True
        _undo(staging)
    except OSError as error:
        raise HxaconvError(
            f"{staging.path}: undoing an interrupted publication failed: {error.strerror or error}",
            hint=f"Move what is in its folder {_REPLACED!r} back to {staging.target.parent} by hand.",
        ) from error
    return False


def _undo(staging: Staging) -> None:
    for staged, final in staging.moves():
        if not staged.exists() and os.path.lexists(final) and staging.content.is_dir():
            os.rename(final, staged)
    replaced = staging.path / _REPLACED
    if replaced.is_dir():
        for entry in sorted(replaced.iterdir(), key=lambda path: path.name == staging.target.name):
            os.rename(entry, staging.target.parent / entry.name)
        replaced.rmdir()
    diskio.sync_folder(staging.target.parent)
    (staging.path / _MARKER).unlink(missing_ok=True)
