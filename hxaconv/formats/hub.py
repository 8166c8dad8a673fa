"""Models on the Hugging Face Hub: planned from headers read by range requests, downloaded when first needed.

Everything that goes over the network is done by public functions of huggingface_hub, which keep the Hub's own cache,
try again where a connection breaks, and wait where the Hub asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hxaconv.errors import HxaconvError, NotOnHub
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.files import TEMPLATES, SourceFile
from hxaconv.formats.safetensors import header_length, parse_header

if TYPE_CHECKING:
    from hxaconv.progress import Progress

FIRST_REQUEST_BYTES = 128 * 1024
"""Enough for most headers: a second request is rarely needed."""
TIMEOUT_SECONDS = 30
DOWNLOAD_WORKERS = 4
LONGEST_WAIT = 600
"""Seconds that the Hub may ask to wait for."""
_LOGIN = "Log in with `hf auth login` (or set HF_TOKEN)"


class Repository:
    """A model repository at one commit: the files' sizes, and the sha256 of those that the Hub announces one for."""

    def __init__(self, name: str, commit: str, sizes: dict[str, int], digests: dict[str, str]) -> None:
        self.name, self.commit, self.sizes, self.digests = name, commit, sizes, digests

    @property
    def label(self) -> str:
        """`org/name@1234567`."""
        return f"{self.name}@{self.commit[:7]}"

    def open(self, name: str) -> SourceFile:
        """A file of the repository, in the cache already or downloaded when first read."""
        from huggingface_hub import try_to_load_from_cache

        found, size = try_to_load_from_cache(self.name, name, revision=self.commit), self.sizes[name]
        cached = Path(found) if isinstance(found, str) else None
        if cached is not None and cached.stat().st_size != size:
            raise HxaconvError(
                f"{cached} in the Hub's cache has {cached.stat().st_size} bytes, the Hub announces {size}",
                hint="Delete that file and start again.",
            )
        file = SourceFile(name, f"{self.label}/{name}", size, cached)
        file.fetch = lambda: download([file], self, None)
        return file

    def read(self, file: SourceFile, progress: Progress | None = None) -> Contents:
        """The tensors of a weight file, from its header alone where the format allows it.

        Raises:
            HxaconvError: when the header is wrong, or cannot be had.
        """
        if file.path is None and not file.name.endswith(".safetensors"):
            download([file], self, progress)  # a pickle stands at no fixed place: it must be here
        if file.path is not None:
            return read_contents(file)
        from huggingface_hub import HfFileSystem

        with self._explained(file.name):
            path = f"{self.name}/{file.name}"
            with HfFileSystem().open(path, "rb", revision=self.commit, block_size=FIRST_REQUEST_BYTES - 8) as remote:
                prefix: bytes = remote.read(min(8, file.size))
                return parse_header(file, prefix + remote.read(header_length(prefix, file.size, file.label)))

    def fetch(self, name: str, report: Callable[[int], None]) -> Path:
        """The path of a file in the Hub's cache, downloaded where needed; `report` gets the bytes that arrive.

        Raises:
            HxaconvError: without network, space or access, or when the digest is wrong.
        """
        from huggingface_hub import hf_hub_download

        with self._explained(name):
            if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
                path = Path(hf_hub_download(self.name, name, revision=self.commit, tqdm_class=_bar_class(report)))
            else:  # huggingface_hub before 1.2 shows a bar of its own, and calls nothing
                path = Path(hf_hub_download(self.name, name, revision=self.commit))
                report(path.stat().st_size)
        expected = self.digests.get(name)
        with path.open("rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest() if expected else None
        if digest != expected:
            blob = path.resolve()
            path.unlink()
            blob.unlink(missing_ok=True)
            raise HxaconvError(
                f"{self.label}/{name}: the download's sha256 is {digest}, the Hub announces {expected}",
                hint="The wrong download was deleted; start again.",
            )
        return path

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except network_errors() as error:
            raise explain(error, self.name, self.commit, begun=name) from None


def _bar_class(report: Callable[[int], None]) -> Any:
    """What huggingface_hub takes for a progress bar: it shows nothing, and reports how much has arrived."""
    base: Any = hub_utils().tqdm

    class Counting(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            report(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            report(int(n or 0))
            return None

    return Counting


def open_repository(repo: str, revision: str | None, progress: Progress | None = None) -> Repository | Path:
    """A model of the Hub at `revision` (default: main), or without network the folder that the cache has of it.

    Raises:
        HxaconvError: with what to do when there is no such model or revision, no access or no network.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = _patient(
            lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS), progress
        )
    except network_errors() as error:
        if status_of(error) not in range(400, 500):
            with contextlib.suppress(*network_errors()):
                return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        raise explain(error, repo, revision) from None
    except ValueError as error:  # raised for ids that cannot exist
        raise HxaconvError(f"{repo!r} is no Hub id: {str(error).splitlines()[0]}") from None
    # Those of other subfolders are other forms of the model.
    files = {
        file.rfilename: file for file in info.siblings or [] if file.rfilename.rpartition("/")[0] in ("", TEMPLATES)
    }
    sizes = {name: file.size or 0 for name, file in files.items()}
    return Repository(repo, info.sha, sizes, {name: file.lfs.sha256 for name, file in files.items() if file.lfs})


def _patient(ask: Callable[[], Any], progress: Progress | None) -> Any:
    """The answer; where the Hub asks to wait (429 with Retry-After), that is done."""
    deadline = time.monotonic() + LONGEST_WAIT
    while True:
        try:
            return ask()
        except network_errors() as error:
            headers = getattr(getattr(error, "response", None), "headers", {})
            wait = str(headers.get("Retry-After", "")) if status_of(error) == 429 else ""
            if not (wait.isdigit() and len(wait) < 6) or time.monotonic() + int(wait) > deadline:
                raise
            if progress is not None:
                progress.note(f"The Hub asks to wait for {wait} seconds (too many requests).")
            time.sleep(int(wait))


def remember(repo: str, revision: str, commit: str) -> None:
    """Note in the cache what the revision stood for, as hf_hub_download does, for times without network."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if revision != commit and ".." not in revision:
        note = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "refs" / revision
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="utf-8")


def refuse_if_too_large(files: list[SourceFile]) -> str | None:
    """A sentence on what of these is still to be downloaded, and where to; None where all are here.

    Raises:
        HxaconvError: when there is no room for all of them.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    missing = {file.label: file.size for file in files if file.path is None}
    if not missing:
        return None
    folder, total = Path(HF_HUB_CACHE), sum(missing.values())
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if total > free:
        raise HxaconvError(
            f"{total:,} bytes to download ({len(missing)} files), {free:,} bytes free in {folder}",
            hint="Free some space, or set HF_HOME to a folder on a larger disk.",
        )
    return f"{len(missing)} files of {total:,} bytes will be downloaded into {folder} ({free:,} bytes free)"


def download(files: list[SourceFile], repository: Repository, progress: Progress | None) -> None:
    """Have these files here, several at a time.

    An interruption does not wait for connections: the threads that hold them end with the program.

    Raises:
        HxaconvError: as for reading them; whole files are kept in the Hub's cache.
    """
    if not files:
        return
    refuse_if_too_large(files)
    if progress is not None:
        progress.start(f"Downloading {repository.label}", sum(file.size for file in files))
    arrived: queue.SimpleQueue[tuple[int, str] | BaseException | None] = queue.SimpleQueue()
    pending = iter(files)

    def tell(name: str, count: int) -> None:
        arrived.put((count, name))

    def work() -> None:
        try:
            for file in pending:
                file.path = repository.fetch(file.name, functools.partial(tell, file.name))
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    workers = min(DOWNLOAD_WORKERS, len(files))
    try:
        with _quiet():
            for _ in range(workers):
                threading.Thread(target=work, daemon=True).start()
            while workers:
                try:
                    found = arrived.get(timeout=0.2)  # with a limit, so that a signal is seen at once
                except queue.Empty:
                    continue
                if isinstance(found, BaseException):
                    raise found
                workers -= found is None
                if found is not None and progress is not None:
                    progress.advance(*found)
    except KeyboardInterrupt as stop:
        stop.add_note("Whole files of the download are kept in the Hub's cache.")
        raise
    finally:
        if progress is not None:
            progress.stop()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no log lines of huggingface_hub's own: they would be written over ours."""
    logging = hub_utils().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def hub_utils() -> Any:
    """huggingface_hub.utils, which exports its functions without declaring that to type checkers."""
    from huggingface_hub import utils

    return utils


def network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: OSError covers requests, the other base httpx (huggingface_hub >= 1.0)."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, HfHubHTTPError.__bases__[0])


def status_of(error: Exception) -> int | None:
    """The status that the Hub answered with, None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, repo: str, revision: str | None, *, begun: str = "") -> HxaconvError:
    """One sentence and the next step; the texts of HTTP errors are left out, as they may quote headers.

    `begun` names a file whose transfer had begun: then the model is known to be there.
    """
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    status = status_of(error)
    if isinstance(error, errors.GatedRepoError):
        return HxaconvError(
            f"{repo} is gated: its authors let in who accepts their conditions",
            hint=f"Accept them at {page}, then log in: `hf auth login` (or set HF_TOKEN).",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotOnHub(
            f"{repo}: no such path here, and no such model on the Hub, or a private one without access",
            hint=f"Check the spelling. {_LOGIN} if it is private.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HxaconvError(
            f"{repo} has no revision {revision!r}", hint=f"Branches, tags and commits are listed at {page}/tree/main."
        )
    if status in (401, 403):
        return HxaconvError(
            f"The Hub refuses access to {repo} (status {status})",
            hint=f"{_LOGIN}; the token needs the permission for this repository.",
        )
    if status is not None:
        return HxaconvError(f"The Hub answers {status} for {repo}", hint="Try again in a few minutes.")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return NotOnHub(
            f"{repo} is not in the Hub's cache, and the Hub is not used (HF_HUB_OFFLINE)",
            hint=f"Unset HF_HUB_OFFLINE, or download it where there is network: `hf download {repo}`",
        )
    if begun and not isinstance(error, OSError):
        return HxaconvError(
            f"{repo}: the connection broke while {begun} was read ({type(error).__name__})",
            hint="The same command goes on with the files that are missing; whole files are kept in the Hub's cache.",
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return HxaconvError(f"{error.filename or repo}: {error.strerror}")
    kept = "; whole files of a download are kept" if begun else ""
    return NotOnHub(
        f"{repo}: no such path here, and the Hub cannot be reached ({type(error).__name__})",
        hint=f"Check the network (HTTPS_PROXY, HF_ENDPOINT){kept}.",
    )
