"""A stand-in for the Hub's HTTP API on loopback: enough to list, download in ranges, and upload.

    with HubServer() as hub:
        hub.add("org/name", {"config.json": b"..."})
        ... run with the environment of hub.environment(cache)

Faults are switches of a repository: `gated`, `private`; and of the server: `cuts` (for the next GETs of
weights: bytes after which the connection breaks, or None), `ignore_ranges`, `fail_with` (a status), `busy` (so many
GETs are answered with 429), `stall` (weights never arrive; `stalled` is set once they are asked for),
`corrupt` (names whose bytes arrive changed).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

LFS_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
TOKEN = "hf_secretTokenThatMustNeverAppear"


@dataclass
class Repo:
    """A repository: commits by id, and what the names of branches point to."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(repr((len(self.files), sorted(files))).encode()).hexdigest()
        self.files[sha] = files
        self.branches[branch] = sha
        return sha


class HubServer:
    """The server, its repositories, and a log of requests: (method, path, range header)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens_seen: set[str] = set()
        self.cuts: list[int | None] = []
        self.ignore_ranges = False
        self.busy = 0
        self.stall = False
        self.stalled = threading.Event()
        self.fail_with = 0
        self.corrupt: set[str] = set()
        self.role = "write"
        self.refuse_creating = False
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stall = False
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], **switches: Any) -> str:
        """Create a repository with one commit; returns the commit."""
        self.repos[name] = Repo(**switches)
        return self.repos[name].commit(files)

    def add_folder(self, name: str, folder: Path, **switches: Any) -> str:
        """Create a repository from the files of a folder."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        return self.add(name, files, **switches)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Environment of a process that takes this server for the Hub and `home` for its cache."""
        made = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return made | ({"HF_TOKEN": token} if token else {})

    def downloaded(self, suffix: str) -> list[str | None]:
        """The ranges of all GET requests for files that end so."""
        return [ranged for method, path, ranged in self.requests if method == "GET" and path.endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silence: the requests are in `hub.requests`."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        parsed = urlparse(self.path)
        path = unquote(parsed.path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.hub.tokens_seen.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.fail_with:
            self._error(self.hub.fail_with, "InternalError")
            return
        if self.hub.busy and self.command == "GET":
            self.hub.busy -= 1
            self._json({"error": "too many requests"}, 429, Retry_After="1")
            return
        for pattern, method, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                action(self, body, parse_qs(parsed.query), *match.groups())
                return
        self._json({"error": f"no route for {self.command} {path}"}, 404)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        # The real Hub quotes nothing of the request; the token here proves that we would not pass it on.
        self._json({"error": f"{code} {self.headers.get('Authorization')}"}, status, X_Error_Code=code)

    def _find(self, name: str, revision: str, *, content: bool) -> tuple[str, dict[str, bytes]] | None:
        repo = self.hub.repos.get(name)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not authorized):
            self._error(404 if authorized else 401, "RepoNotFound")
        elif repo.gated and content and not authorized:
            self._error(403, "GatedRepo")
        elif (sha := repo.branches.get(revision, revision)) not in repo.files:
            self._error(404, "RevisionNotFound")
        else:
            return sha, repo.files[sha]
        return None

    def info(self, body: bytes, query: dict[str, list[str]], name: str, revision: str | None) -> None:
        found = self._find(name, revision or "main", content=False)
        if found is None:
            return
        sha, files = found
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": _git_id(data)}
            | ({"lfs": {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}} if _is_lfs(path) else {})
            for path, data in files.items()
        ]
        self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, body: bytes, query: dict[str, list[str]], name: str, revision: str, path: str | None) -> None:
        found = self._find(name, revision, content=False)
        if found is not None:
            self._json([_tree_entry(path, data) for path, data in found[1].items()])

    def paths_info(self, body: bytes, query: dict[str, list[str]], name: str, revision: str) -> None:
        found = self._find(name, revision, content=False)
        if found is not None:
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            self._json([_tree_entry(path, found[1][path]) for path in wanted if path in found[1]])

    def resolve(self, body: bytes, query: dict[str, list[str]], name: str, revision: str, path: str) -> None:
        found = self._find(name, revision, content=True)
        if found is None:
            return
        sha, files = found
        if path not in files:
            self._error(404, "EntryNotFound")
            return
        self._bytes(files[path], path, X_Repo_Commit=sha, ETag=f'"{_etag(path, files[path])}"')

    def _bytes(self, data: bytes, path: str, **headers: str) -> None:
        etag_headers = {"X_Linked_Size": str(len(data)), "X_Linked_ETag": headers["ETag"], **headers}
        if path in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, end, status = 0, len(data), 200
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if ranged and not self.hub.ignore_ranges:
            start, end, status = int(ranged[1]), min(int(ranged[2] or len(data)) + 1, len(data)), 206
            if start >= len(data):
                self._error(416, "RangeNotSatisfiable")
                return
        self.send_response(status)
        for key, text in etag_headers.items():
            self.send_header(key.replace("_", "-"), text)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        while self.hub.stall and _is_lfs(path) and not self.headers.get("Range"):
            self.hub.stalled.set()
            time.sleep(0.05)
        cut = self.hub.cuts.pop(0) if self.hub.cuts and _is_lfs(path) else None
        if cut is not None:
            self.wfile.write(data[start : start + cut])
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(data[start:end])

    def create(self, body: bytes, query: dict[str, list[str]]) -> None:
        wanted = json.loads(body)
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else f"me/{wanted['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or self.hub.refuse_creating:
            self._error(401, "Unauthorized")
        elif name in self.hub.repos:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        else:
            self.hub.add(name, {".gitattributes": b""}, private=private)
            self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def whoami(self, body: bytes, query: dict[str, list[str]]) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "Unauthorized")
            return
        self._json({"name": "me", "type": "user", "auth": {"accessToken": {"role": self.hub.role}}, "orgs": []})

    def validate_yaml(self, body: bytes, query: dict[str, list[str]]) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, query: dict[str, list[str]], name: str, revision: str) -> None:
        if self._find(name, revision, content=True) is None:
            return
        files = [
            {"path": file["path"], "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def lfs_batch(self, body: bytes, query: dict[str, list[str]], name: str) -> None:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "authenticated": True,
                **({} if item["oid"] in self.hub.lfs else {"actions": self._upload_action(item["oid"])}),
            }
            for item in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _upload_action(self, oid: str) -> dict[str, Any]:
        return {"upload": {"href": f"{self.hub.url}/lfs-storage/{oid}", "header": {}}}

    def lfs_put(self, body: bytes, query: dict[str, list[str]], oid: str) -> None:
        status = 200 if _sha256(body) == oid else 400
        if status == 200:
            self.hub.lfs[oid] = body
        self._json({}, status)

    def commit(self, body: bytes, query: dict[str, list[str]], name: str, revision: str) -> None:
        found = self._find(name, revision, content=True)
        if found is None:
            return
        files = dict(found[1])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.hub.repos[name].commit(files, revision)
        self._json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "pullRequestUrl": None})


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(path: str, data: bytes) -> str:
    return _sha256(data) if _is_lfs(path) else _git_id(data)


def _tree_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_id(data)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
    return entry


_NAME, _REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    (r"/api/repos/create", "POST", _Handler.create),
    (r"/api/whoami-v2", "GET", _Handler.whoami),
    (r"/api/validate-yaml", "POST", _Handler.validate_yaml),
    (rf"/api/models/{_NAME}/preupload/{_REVISION}", "POST", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/{_REVISION}", "POST", _Handler.commit),
    (rf"/api/models/{_NAME}/tree/{_REVISION}(?:/(.*))?", "GET", _Handler.tree),
    (rf"/api/models/{_NAME}/paths-info/{_REVISION}", "POST", _Handler.paths_info),
    (rf"/api/models/{_NAME}(?:/revision/{_REVISION})?", "GET", _Handler.info),
    (rf"/{_NAME}.git/info/lfs/objects/batch", "POST", _Handler.lfs_batch),
    (r"/lfs-storage/(\w+)", "PUT", _Handler.lfs_put),
    (rf"/{_NAME}/resolve/{_REVISION}/(.+)", "GET HEAD", _Handler.resolve),
]
