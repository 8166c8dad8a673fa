"""`verify --digests`: the digests recorded in hxaconv.json against the bytes on disk, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hxaconv.errors import CheckFailed, HxaconvError, bullet_list
from hxaconv.formats.contents import show
from hxaconv.model.plan import Recipe, Scratch, total_bytes
from hxaconv.progress import Progress, Result, bar
from hxaconv.save.checksums import DIGESTS, Checks, digest_of_file
from hxaconv.save.documents import settings_digest

if TYPE_CHECKING:
    from hxaconv.model.model import Checkpoint


@dataclass(frozen=True, repr=False)
class DigestReport(Result):
    """How many tensors were read, and every one that is not what was recorded."""

    source: str
    checked: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every recorded digest is that of the bytes on disk."""
        return not self.problems

    @property
    def headline(self) -> str:
        """How many were read, and whether they agree."""
        agree = "digests agree" if self.passed else f"{len(self.problems)} are not what was written"
        return f"{self.checked} tensors, {self.nbytes:,} bytes: {agree}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "passed": self.passed,
            "checked": self.checked,
            "bytes": self.nbytes,
            "problems": list(self.problems),
        }

    def raise_if_failed(self) -> None:
        """Turn differences into the error that ends a command with exit code 1.

        Raises:
            CheckFailed: listing every tensor that differs.
        """
        if self.problems:
            raise CheckFailed(
                f"{self.source}: {len(self.problems)} tensors or files are not as they were written:\n"
                f"{bullet_list(self.problems)}",
                hint="The files were changed or damaged after the conversion; convert or copy them again.",
            )


def check_digests(
    checkpoint: Checkpoint, provenance: Mapping[str, Any], progress: Progress | None = None
) -> DigestReport:
    """Read every tensor and compare it with the digest recorded for its stored name.

    `provenance` is hxaconv.json, or the `hxaconv` part of a sidecar: {"tensors": {name: {"digest": "crc32:..."}}}.

    Raises:
        HxaconvError: when no digests were recorded.
    """
    recorded = _recorded(provenance, checkpoint.label)
    if not any(recorded.values()):
        raise HxaconvError(
            f"{checkpoint.label} has no recorded digests",
            hint="They are written by default; this checkpoint is from elsewhere, or was made with --digest none.",
        )
    plan = {checkpoint.stored_names[name]: recipe for name, recipe in checkpoint.plan.items()}
    problems = wrong_files(checkpoint, provenance)
    problems += [f"{name} is recorded and not there" for name in recorded if name not in plan]
    problems += [f"{name} is there and not recorded" for name in plan if name not in recorded]
    names = [name for name in plan if recorded.get(name)]
    total = total_bytes({name: plan[name] for name in names})
    with bar(progress, "digests", total):
        for name in names:
            expected = recorded[name] or ""
            found = digest(plan[name], expected.partition(":")[0], progress, name)
            if found != expected:
                problems.append(f"{name} has {found}, recorded is {expected}")
    return DigestReport(checkpoint.label, len(names), total, tuple(problems))


def wrong_files(checkpoint: Checkpoint, provenance: Mapping[str, Any]) -> list[str]:
    """Small files whose recorded digest is not theirs any more; the model card may be edited.

    Only those on this machine are looked at.
    """
    recorded, root = provenance.get("files"), checkpoint.root
    if not isinstance(recorded, dict) or root is None:
        return []
    problems = []
    for name, expected in recorded.items():
        if name == "README.md" or not isinstance(expected, str):
            continue
        kind = expected.partition(":")[0]
        if not root.is_dir():
            found = settings_digest(checkpoint.sidecar or {}, kind)
        elif (root / name).is_file():
            found = digest_of_file(root / name, kind)
        else:
            problems.append(f"{name} is recorded and not there")
            continue
        if found != expected:
            problems.append(f"{name} has {found}, recorded is {expected}")
    return problems


def _recorded(provenance: Mapping[str, Any], label: str) -> dict[str, str | None]:
    """Tensor name -> recorded digest, None where there is none."""
    entries = provenance.get("tensors") or {}
    recorded: dict[str, str | None] = {}
    for name, entry in entries.items() if isinstance(entries, dict) else [("tensors", entries)]:
        digest = entry.get("digest") if isinstance(entry, dict) else entry
        if not isinstance(digest, str | None) or not isinstance(entry, dict):
            raise HxaconvError(f"{label}: what is recorded of {show(name)} is not what hxaconv writes")
        recorded[name] = digest
    return recorded


def digest(recipe: Recipe, algorithm: str, progress: Progress | None = None, what: str = "") -> str:
    """`crc32:89abcdef` or `sha256:...` of a tensor's bytes.

    Raises:
        HxaconvError: for another algorithm.
    """
    if algorithm not in DIGESTS[:-1]:
        raise HxaconvError(f"unknown digest {algorithm!r}", hint=f"Known: {', '.join(DIGESTS[:-1])}.")
    checks = Checks(recipe.dtype, crc32=algorithm == "crc32", sha256=algorithm == "sha256", finite=False)
    for piece in recipe.pieces(Scratch()):
        checks.update(piece)
        if progress:
            progress.advance(len(piece), what)
    return str(checks.finished(what).digest(algorithm))
