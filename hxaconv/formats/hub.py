"""Models on the Hugging Face Hub: planned from headers read by range requests, downloaded when first needed.

Weights go to the Hub's own cache. The download itself is done here, into the `<sha256>.incomplete` file
that the cache uses for it, because current versions of huggingface_hub start an interrupted file anew;
what arrives is checked against the digest that the Hub announces before the cache takes it over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hxaconv.errors import HxaconvError
from hxaconv.formats import Contents, read_contents
from hxaconv.formats.files import SourceFile
from hxaconv.formats.hub_client import bars_off, explain, hub_utils, network_errors, retried, status_of
from hxaconv.formats.safetensors_reader import header_length, parse_header

if TYPE_CHECKING:
    from hxaconv.progress import Progress

FIRST_REQUEST_BYTES = 128 * 1024
"""Enough for most headers: a second request is rarely needed."""
TIMEOUT_SECONDS = 30
DOWNLOAD_WORKERS = 4


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the Hub says of a file: bytes, and the sha256 of large ones."""

    size: int
    sha256: str | None


class Repository:
    """A model repository at one commit."""

    def __init__(self, name: str, commit: str, files: dict[str, RemoteFile]) -> None:
        self.name, self.commit, self.files = name, commit, files
        self.advance: Callable[[int, str], None] | None = None
        """Told of every downloaded piece, while somebody shows it."""
        self.stopped = threading.Event()

    @property
    def label(self) -> str:
        """`org/name@1234567`."""
        return f"{self.name}@{self.commit[:7]}"

    def open(self, name: str) -> SourceFile:
        """A file of the repository, in the cache already or downloaded when first read."""
        cached, size = self.cached(name), self.files[name].size
        if cached is not None and cached.stat().st_size != size:
            raise HxaconvError(
                f"{cached} in the Hub's cache has {cached.stat().st_size} bytes, the Hub announces {size}",
                hint="Delete that file and start again.",
            )
        file = SourceFile(name, f"{self.label}/{name}", size, cached)
        file.fetch = lambda: self._fetch_planned(file)
        return file

    def read(self, file: SourceFile) -> Contents:
        """The tensors of a weight file, from its header alone where the format allows it.

        Raises:
            HxaconvError: when the header is wrong, or cannot be had.
        """
        if file.path is not None or not file.name.endswith(".safetensors"):
            return read_contents(file)
        data = self._range(file, 0, min(FIRST_REQUEST_BYTES, file.size))
        needed = 8 + header_length(data[:8], file.size, file.label)
        if len(data) < needed:
            data += self._range(file, len(data), needed - len(data))
        return parse_header(file, data[:needed])

    def cached(self, name: str) -> Path | None:
        """Where the file is in the Hub's cache, None where it is not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def _range(self, file: SourceFile, start: int, count: int) -> bytes:
        with self._explained():
            return retried(lambda: self._range_once(file, start, count))

    def _range_once(self, file: SourceFile, start: int, count: int) -> bytes:
        from huggingface_hub import hf_hub_url

        utils = hub_utils()
        url = hf_hub_url(self.name, file.name, revision=self.commit)
        wanted = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        headers, session = utils.build_hf_headers() | wanted, utils.get_session()
        if callable(getattr(session, "stream", None)):  # httpx, since huggingface_hub 1.0
            request = session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS)
        else:
            request = session.get(url, headers=headers, timeout=TIMEOUT_SECONDS, stream=True)
        with request as response:
            utils.hf_raise_for_status(response)
            if response.status_code == 206:
                data: bytes = response.read() if hasattr(response, "read") else response.content
                if len(data) == count:
                    return data
        raise HxaconvError(
            f"{file.label}: the server did not send the {count} bytes at {start} that were asked for",
            hint="A proxy may be in between. Download the model first: hf download " + self.name,
        )

    def _fetch_planned(self, file: SourceFile) -> Path:
        path = self.download(file.name)
        size = path.stat().st_size
        if size != file.size:
            raise HxaconvError(
                f"{file.label}: the downloaded file has {size} bytes, the Hub announces {file.size}",
                hint=f"Delete {path} and start again.",
            )
        if file.header_digest and file.name.endswith(".safetensors"):
            planned, again = file.header_digest, SourceFile.local(path, name=file.name, label=file.label)
            read_contents(again)
            again.close()
            if again.header_digest != planned:
                raise HxaconvError(
                    f"{file.label}: the downloaded file is not the one whose header was read before",
                    hint=f"Delete {path} and start again.",
                )
        return path

    def download(self, name: str) -> Path:
        """The path of a file in the Hub's cache, downloaded or its download completed where needed.

        Raises:
            HxaconvError: without network, space or access, or when the digest is wrong.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import HF_HUB_OFFLINE

        cached = self.cached(name)
        if cached is not None:
            return cached
        if HF_HUB_OFFLINE:
            raise HxaconvError(
                f"{self.label}/{name} is not in the Hub's cache, and HF_HUB_OFFLINE is set",
                hint=f"Without HF_HUB_OFFLINE, run: hf download {self.name} --revision {self.commit}",
            )
        with self._explained(), bars_off():
            self._complete_blob(name)
            return Path(hf_hub_download(self.name, name, revision=self.commit))

    def _complete_blob(self, name: str) -> None:
        """Bring the content of a large file into the cache, going on where an earlier attempt ended."""
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        expected = self.files[name]
        # The Hub serves files of more than 50 GB only in its own chunked way, which hf_hub_download knows.
        if expected.sha256 is None or expected.size > 50_000_000_000:
            return
        folder = repo_folder_name(repo_id=self.name, repo_type="model")
        blobs, locks = Path(HF_HUB_CACHE) / folder / "blobs", Path(HF_HUB_CACHE) / ".locks" / folder
        blobs.mkdir(parents=True, exist_ok=True)
        locks.mkdir(parents=True, exist_ok=True)
        blob, partial = blobs / expected.sha256, blobs / f"{expected.sha256}.incomplete"
        with hub_utils().WeakFileLock(locks / f"{expected.sha256}.lock"):  # the one that hf_hub_download takes
            if not blob.exists():
                partial.touch()
                self._report(min(partial.stat().st_size, expected.size), name)
                retried(lambda: self._complete(partial, name, expected.size))
                self._check_digest(partial, name, expected.sha256)
                os.replace(partial, blob)

    def _complete(self, partial: Path, name: str, size: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get

        with partial.open("ab") as raw:
            if raw.tell() > size:
                raw.truncate(0)
            done = os.fstat(raw.fileno()).st_size
            free = shutil.disk_usage(partial.parent).free
            if size - done > free:
                raise HxaconvError(
                    f"{self.label}/{name}: {size - done} bytes to download, {free} bytes free in {partial.parent}",
                    hint="Free some space, or set HF_HOME to a folder on a larger disk.",
                )
            counted: Any = _Counted(raw, lambda n: self._report(n, name))
            headers = hub_utils().build_hf_headers() | {"Accept-Encoding": "identity"}
            url = hf_hub_url(self.name, name, revision=self.commit)
            http_get(url, counted, resume_size=done, headers=headers, expected_size=size)

    def _check_digest(self, partial: Path, name: str, expected: str) -> None:
        digest = hashlib.sha256()
        with partial.open("rb") as raw:
            while piece := raw.read(1024 * 1024):
                digest.update(piece)
        if digest.hexdigest() != expected:
            partial.unlink()
            raise HxaconvError(
                f"{self.label}/{name}: the download's sha256 is {digest.hexdigest()}, the Hub announces {expected}",
                hint="The wrong download was deleted; start again.",
            )

    def _report(self, count: int, name: str) -> None:
        if self.stopped.is_set():
            raise KeyboardInterrupt
        if self.advance is not None:
            self.advance(count, name)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except network_errors() as error:
            raise explain(error, self.name, self.commit) from None


class _Counted:
    """The file that http_get writes to, telling how much has arrived."""

    def __init__(self, raw: BinaryIO, report: Callable[[int], None]) -> None:
        self.raw, self.report = raw, report

    def write(self, data: bytes) -> int:
        written = self.raw.write(data)
        self.report(len(data))
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def open_repository(repo: str, revision: str | None) -> Repository | Path:
    """A model of the Hub at `revision` (default: main), or without network the folder that the cache has of it.

    Raises:
        HxaconvError: saying what to do when there is no such model or revision, no access or no network.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
    except network_errors() as error:
        folder = _cached_folder(repo, revision) if status_of(error) not in range(400, 500) else None
        if folder is None:
            raise explain(error, repo, revision) from None
        return folder
    except ValueError as error:  # raised for ids that cannot exist
        raise HxaconvError(f"{repo!r} is no Hub id: {str(error).splitlines()[0]}") from None
    files = {
        sibling.rfilename: RemoteFile(sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or []
        if not {"/", "\\"} & set(sibling.rfilename)  # those of subfolders are other forms of the model
    }
    assert info.sha is not None
    return Repository(repo, info.sha, files)


def remember(repo: str, revision: str, commit: str) -> None:
    """Note in the cache what the revision stood for, as hf_hub_download does, for times without network."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    note = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "refs" / revision
    if revision != commit and ".." not in revision:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="utf-8")


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repo, name, revision=revision or "main")
        if isinstance(found, str):
            return Path(found).parent
    return None


def download(files: list[SourceFile], repository: Repository, progress: Progress | None) -> None:
    """Have these files here, several at a time; what has arrived is kept and completed by the next attempt.

    Raises:
        HxaconvError: as for reading them.
    """
    if not files:
        return
    lock = threading.Lock()
    if progress is not None:
        progress.start(f"Downloading {repository.label}", sum(file.size for file in files))

        def advance(count: int, name: str) -> None:
            with lock:
                progress.advance(count, name)

        repository.advance = advance
    try:
        with ThreadPoolExecutor(DOWNLOAD_WORKERS) as pool:
            try:
                for _ in pool.map(lambda file: file.open(), files):
                    pass
            except BaseException:
                repository.stopped.set()
                raise
    finally:
        repository.stopped.clear()
        repository.advance = None
        if progress is not None:
            progress.stop()
