"""A Hub on this machine: what huggingface_hub and transformers ask of one, over HTTP, and what goes wrong.

Small files are answered where they are asked for, and large ones, as on the Hub, with a redirect to another
host: `localhost` in the place of `127.0.0.1`, which takes no token. Faults are told to the server as data.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

LARGE = 2**12
"""files from this size on are stored elsewhere, in bytes: the Hub's limit is larger"""
TOKEN, OTHER_TOKEN = "hf_insider", "hf_outsider"
"""the tokens of an account that may see all, and of one that may see what is public"""
GONE = 5.0
"""the seconds after which a server that hangs lets go"""


@dataclass(frozen=True)
class Fault:
    """What the server does with requests whose method and path match; the first that matches counts."""

    where: str
    """a regular expression for the whole of, for example, `GET /org/base/resolve/main/config.json`"""
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    """the bytes of the file that are sent before the connection is cut"""
    hangs: bool = False
    """whether it takes the request and answers nothing"""
    drops: bool = False
    """whether it closes the connection without an answer"""
    garbled: bool = False
    """whether other bytes are sent, of the right number"""
    no_ranges: bool = False
    """whether it sends the whole of a file of which a part was asked for"""
    declares: int | None = None
    """the size that it says the file has"""
    times: int | None = None
    """how often; None for always"""


@dataclass
class Repository:
    """A repository: its files at each commit, and the commits that its branches and tags are at."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    is_private: bool = False
    is_gated: bool = False
    moved_to: str | None = None

    @classmethod
    def of(cls, files: Mapping[str, bytes], **how: Any) -> Self:
        """Make a repository of one commit, which its main branch is at."""
        commit = commit_of(files)
        return cls({commit: dict(files)}, {"main": commit}, **how)

    def add(self, files: Mapping[str, bytes], *refs: str) -> str:
        """Add a commit, to which these branches or tags point from now on."""
        commit = commit_of(files)
        self.commits[commit] = dict(files)
        self.refs |= dict.fromkeys(refs, commit)
        return commit

    def commit(self, revision: str) -> str | None:
        """Return the commit that a revision stands for."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass(frozen=True)
class Seen:
    """A request that came."""

    line: str
    host: str
    token: str | None
    range: str | None


def commit_of(files: Mapping[str, bytes]) -> str:
    """Return a commit's name: that of its contents."""
    parts = b"".join(name.encode() + hashlib.sha1(files[name]).digest() for name in sorted(files))
    return hashlib.sha1(parts).hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, as a repository holds them."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def digest_of(content: bytes) -> str:
    """Return what the Hub calls a file: its SHA-256 if it is large, and git's SHA-1 of it elsewhere."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


class HubServer:
    """The server, which runs in threads of this process while the context is open."""

    def __init__(self, prefix: str = "") -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.prefix = prefix
        """what every path begins with, as that of a mirror may"""
        self.has_xet = False
        """whether it offers large files by Xet's protocol too, which it does not speak"""
        self._met: dict[int, int] = {}
        self._lock = threading.Lock()
        self.over = threading.Event()

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()

    @cached_property
    def port(self) -> int:
        """Return the port that it listens on."""
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        """Return what HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    @property
    def large_files(self) -> str:
        """Return where large files are: at the same port, of a host with another name."""
        return f"http://localhost:{self.port}/cdn"

    def begin(self, *faults: Fault) -> None:
        """Forget what was seen, and have these faults from now on."""
        with self._lock:
            self.seen.clear()
            self._met.clear()
            self.faults = list(faults)

    def meet(self, seen: Seen) -> Fault | None:
        """Remember a request, and return the fault that it meets."""
        with self._lock:
            self.seen.append(seen)
            for i, fault in enumerate(self.faults):
                n_met = self._met.get(i, 0)
                if re.fullmatch(fault.where, seen.line) and (fault.times is None or n_met < fault.times):
                    self._met[i] = n_met + 1
                    return fault
        return None

    def blob(self, digest: str) -> bytes | None:
        """Return the large file of this digest."""
        contents = (
            content
            for repository in self.repositories.values()
            for files in repository.commits.values()
            for content in files.values()
        )
        return next((content for content in contents if digest_of(content) == digest), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, _request: Any, _address: Any) -> None:
        """Say nothing of connections that a client has closed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    hub: HubServer

    def do_GET(self) -> None:
        """Answer a request."""
        path = urlsplit(self.path).path
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        host = (self.headers.get("Host") or "").partition(":")[0]
        seen = Seen(f"{self.command} {unquote(path)}", host, token, self.headers.get("Range"))
        fault = self.hub.meet(seen) or Fault("")
        if fault.hangs:
            self.hub.over.wait(GONE)
        if fault.hangs or fault.drops:
            self._hang_up()
        elif fault.status is not None:
            self._answer(fault.status, fault.body, fault.headers)
        else:
            self._route(path.removeprefix(self.hub.prefix), token, fault)

    do_HEAD = do_GET  # noqa: N815 - so http.server calls it

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _route(self, path: str, token: str | None, fault: Fault) -> None:
        if (of_cdn := re.fullmatch(r"/cdn/(\w+)", path)) is not None:
            content = self.hub.blob(of_cdn[1])
            self._answer(404) if content is None else self._send(content, {}, fault)
            return
        asked = re.fullmatch(
            r"/(?:api/models/)?(?P<id>[^/]+/[^/]+?)"
            r"(?:/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(?P<file>/.*)?)?",
            path,
        )
        if asked is None:
            self._answer(404)
            return
        name, revision = asked["id"], unquote(asked["revision"] or "main")
        repository = self.hub.repositories.get(name)
        if token not in (None, TOKEN, OTHER_TOKEN):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.is_private and token != TOKEN):
            self._refuse(404, "RepoNotFound", "Repository not found") if token else self._refuse(
                401, "", "Invalid username or password."
            )
        elif repository.moved_to:
            self._answer(307, headers={"Location": self.path.replace(name, repository.moved_to)})
        elif (commit := repository.commit(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif asked["what"] == "resolve":
            self._resolve(name, repository, commit, unquote(asked["file"][1:]), fault)
        else:
            self._describe(name, repository.commits[commit], commit, asked["what"], asked["file"])

    def _describe(
        self, name: str, files: Mapping[str, bytes], commit: str, what: str | None, folder: str | None
    ) -> None:
        if what != "tree":
            listed = [{"rfilename": file} for file in sorted(files)]
            self._json({"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": listed})
            return
        inside = {file: files[file] for file in sorted(files) if f"/{file}".startswith(f"{folder or ''}/")}
        if not inside:
            self._refuse(404, "EntryNotFound", f'{folder} does not exist on "main"')
            return
        self._json(
            [
                {"type": "file", "oid": digest_of(content), "size": len(content), "path": file}
                for file, content in inside.items()
            ]
        )

    def _resolve(self, name: str, repository: Repository, commit: str, file: str, fault: Fault) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        known = {"X-Repo-Commit": commit}
        if repository.is_gated and token != TOKEN:
            told = f"Access to model {name} is restricted"
            self._refuse(403 if token else 401, "GatedRepo", told, known)
        elif (content := repository.commits[commit].get(file)) is None:
            self._refuse(404, "EntryNotFound", "Entry not found", known)
        elif len(content) >= LARGE:
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest_of(content)}"'}
            if self.hub.has_xet:
                route = f"{self.hub.endpoint}/api/models/{name}/xet-read-token/{commit}"
                linked |= {"X-Xet-Hash": digest_of(content), "Link": f'<{route}>; rel="xet-auth"'}
            where = {"Location": f"{self.hub.large_files}/{digest_of(content)}", "ETag": '"of the pointer"'}
            self._answer(302, headers={**known, **linked, **where})
        else:
            self._send(content, {**known, "ETag": f'"{digest_of(content)}"'}, fault)

    def _send(self, content: bytes, headers: Mapping[str, str], fault: Fault) -> None:
        """Send a file, or the part of it that was asked for."""
        part, status, more = content, 200, {"Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is not None and not fault.no_ranges:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            part, status = content[first : last + 1], 206
            more["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        if fault.garbled:
            part = bytes(byte ^ 255 for byte in part)
        self._answer(status, part, {**headers, **more}, fault.declares, fault.cut)

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str, more: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._answer(status, json.dumps({"error": message}).encode(), {**told, **(more or {})})

    def _answer(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        declares: int | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(declares or len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            time.sleep(0.05)  # so that what was sent is read before the connection is cut
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
