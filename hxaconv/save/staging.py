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
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hxaconv.errors import HxaconvError, bullet_list, raise_all
from hxaconv.formats import FileLayout
from hxaconv.formats.files import SourceFile, write_from
from hxaconv.save import diskio
from hxaconv.save.checksums import Finished
from hxaconv.save.output import Output
from hxaconv.save.records import differences, fingerprint, plan_of

RECORD_NAME = "plan.json"
_MARKER = "publishing"
_REPLACED = "replaced"
_CONTENT = "content"


@dataclass(frozen=True, slots=True)
class Staging:
    """The folder of one plan."""

    path: Path
    target: Path
    is_folder: bool
    beside: tuple[str, ...]
    """Files published beside the target, before it (the sidecar of a `.pth`)."""

    @property
    def content(self) -> Path:
        """The folder that files are written into."""
        return self.path / _CONTENT

    @property
    def checkpoint(self) -> Path:
        """The staged output as a checkpoint that can be opened: a folder, or a `.pth` file."""
        return self.content if self.is_folder else self.content / self.target.name

    def moves(self) -> list[tuple[Path, Path]]:
        """From where to where publishing renames; the target itself comes last."""
        parent = self.target.parent
        return [*((self.content / name, parent / name) for name in self.beside), (self.checkpoint, self.target)]

    def allocated_bytes(self) -> int:
        """Disk space that earlier runs of the same plan have taken already."""
        total = 0
        if os.path.isdir(self.content):
            for entry in os.scandir(self.content):
                stat = entry.stat(follow_symlinks=False)
                if stat.st_nlink == 1:  # a source's own file takes nothing
                    total += getattr(stat, "st_blocks", 0) * 512
        return total

    def create(self, record: dict[str, Any]) -> None:
        """Make the folder, and record the plan.

        Raises:
            OSError: when the disk has no room for that; the folder is gone then, if nothing else is in it.
        """
        path = self.path / RECORD_NAME
        try:
            self.content.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                diskio.write_file(path, [json.dumps(record, indent=1, default=str).encode()], self.path)
                diskio.sync_folder(self.path)
                diskio.sync_folder(self.path.parent)
        except OSError:
            for folder in (self.content, self.path):
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise

    def reserve(self, files: Sequence[FileLayout], total: int) -> None:
        """Give every file its size, its disk space where the file system can, and its headers.

        Raises:
            HxaconvError: when there is no room for them; `total` bytes are what the whole output takes.
        """
        for layout in files:
            path = self.content / layout.name
            with diskio.explained(path, f"reserving {layout.size} bytes", total):
                if layout.hard_link is not None:
                    _link_or_copy(layout.hard_link, path)
                else:
                    _reserve(layout, path)

    def seal(self, layout: FileLayout, crcs: Mapping[str, int]) -> None:
        """Write what depends on the tensors' checksums, and sync the file with all that is in it.

        Raises:
            OSError: when the system refuses, or the file is not what it should be.
        """
        path = self.content / layout.name
        fd = os.open(path, (os.O_RDONLY if layout.hard_link else os.O_RDWR))
        try:
            for offset, data in layout.seal(crcs) if layout.seal is not None else ():
                write_from(fd, memoryview(data), offset)
            diskio.sync_file(fd)
        except OSError as error:
            error.filename = path
            raise
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Delete the folder with everything in it, as far as possible."""
        shutil.rmtree(self.path, ignore_errors=True)


def _reserve(layout: FileLayout, path: Path) -> None:
    existed = path.exists()
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        diskio.reserve(fd, layout.size)
        for offset, data in layout.segments:
            write_from(fd, memoryview(data), offset)
    except OSError:
        if not existed:
            # A failed reservation keeps all the free space it found.
            path.unlink()
        raise
    finally:
        os.close(fd)


def _link_or_copy(source: SourceFile, path: Path) -> None:
    """Make `path` the same file as the source, or, where there are no links, a complete copy of it."""
    source.open()
    assert source.path is not None
    if path.exists():
        if os.path.samefile(source.path, path):
            return
        path.unlink()  # a copy of an interrupted run: whether it is whole, nobody knows
    try:
        os.link(source.path, path)
    except OSError:
        copy = path.with_name(f"{path.name}.copying")
        shutil.copyfile(source.path, copy)
        with open(copy, "rb+") as file:
            diskio.sync_file(file.fileno())
        os.replace(copy, path)


def plan_record(output: Output, digest: str) -> dict[str, Any]:
    """What `plan.json` says."""
    command, options = output.record.call.command, dict(output.record.call.options)
    return {"command": command, "options": options, "beside": _beside(output), "plan": plan_of(output, digest)}


def _beside(output: Output) -> list[str]:
    if output.is_folder:
        return []
    return list(dict.fromkeys([*output.documents, *output.copied_files, output.sidecar_name]))


def staging_of(output: Output, record: dict[str, Any]) -> Staging:
    """The staging folder of a plan, whether it exists or not."""
    path = output.target.with_name(f"{output.target.name}.partial-{fingerprint(record['plan'])[:12]}")
    return Staging(path, output.target, output.is_folder, tuple(record["beside"]))


def stagings_at(target: Path) -> list[Staging]:
    """All staging folders beside a target whose plan can be read."""
    found = []
    for path in sorted(target.parent.glob(f"{_escaped(target.name)}.partial-*")):
        record = read_record(path)
        if record is not None:
            found.append(Staging(path, target, record["plan"]["folder"], tuple(record["beside"])))
    return found


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


_RECORD_TYPES: dict[str, type] = {"command": str, "options": dict, "beside": list, "plan": dict}
_PLAN_TYPES: dict[str, type] = {"folder": bool, "digest": str, "sources": dict, "provenance": dict}


def read_record(path: Path) -> dict[str, Any] | None:
    """The `plan.json` of a staging folder; None if it has none that can be read, or none of ours."""
    try:
        record = json.loads((path / RECORD_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if _has(record, _RECORD_TYPES) and _has(record["plan"], _PLAN_TYPES) and _all_beside(record) else None


def _has(value: Any, types: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in types.items())


def _all_beside(record: Mapping[str, Any]) -> bool:
    """Whether publishing would rename files of this folder into the one around it, and touch nothing else."""
    return all(
        isinstance(name, str) and name not in ("", "..") and Path(name).name == name for name in record["beside"]
    )


def refuse_other_plans(staging: Staging, record: dict[str, Any]) -> None:
    """Say why there is nothing to resume although interrupted runs on this target exist.

    Raises:
        HxaconvError: when there are such runs.
    """
    for other in stagings_at(staging.target):
        recorded = read_record(other.path)
        if recorded is None or other.path == staging.path:
            continue
        lines = differences(recorded, record)
        raise HxaconvError(
            f"{other.path} cannot be resumed, something has changed since it was begun:\n{bullet_list(lines)}",
            hint=f"Use the options and sources of then, or delete {other.path} and start without --resume.",
        )


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
        diskio.write_file(staging.path / _MARKER, [], staging.path)
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


_JOURNAL = "journal"


class Journal:
    """Appends to one file; every rank writes its own."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._path = folder / (f"{_JOURNAL}-{rank}" if rank else _JOURNAL)
        with diskio.explained(self._path, "opening"):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def done(self, finished: Sequence[Finished]) -> None:
        """These tensors are synced.

        Raises:
            HxaconvError: when the lines cannot be written and synced in their turn.
        """
        # The break comes first: a line that a crash or a full disk cut short ends where the next one begins.
        lines = ({"tensor": t.name, "crc32": t.crc32, "sha256": t.sha256, "nonfinite": t.nonfinite} for t in finished)
        data = memoryview("".join("\n" + json.dumps(line) for line in lines).encode())
        with diskio.explained(self._path):
            while len(data):
                data = data[os.write(self._fd, data) :]
            diskio.sync_file(self._fd)

    def close(self) -> None:
        """No more lines."""
        os.close(self._fd)


def read_journals(folder: Path) -> dict[str, Finished]:
    """The tensors that the journals in a staging folder name; lines cut short by a crash say nothing."""
    tensors: dict[str, Finished] = {}
    for path in sorted(folder.glob(f"{_JOURNAL}*")):
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
                name = entry["tensor"]
                tensors[name] = Finished(name, entry["crc32"], entry["sha256"], entry["nonfinite"])
            except (ValueError, KeyError, TypeError):
                continue
    return tensors
