"""A small Hugging Face hub on this machine: real HTTP, real files, and faults on demand.

It speaks what huggingface_hub uses to download one file (read from version 2.4.0): ``HEAD`` and ``GET`` of
``/{repo}/resolve/{revision}/{file}`` with ``X-Repo-Commit``, ``X-Linked-Etag`` and ``X-Linked-Size``, the
redirect to another host for the bytes, ``Range``, ``X-Error-Code``, and the listing
``/api/models/{repo}/tree/{revision}``. It sends no Xet headers, so the bytes go over plain HTTP.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
BYTES = re.compile(r"/bytes/(?P<repo>[^/]+/[^/]+)/(?P<file>.+)")
TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
REFUSED = {
    "gated": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "forbidden": (403, None),
    "busy": (503, None),
}


@dataclass
class Request:
    """One request as the server saw it; ``sent`` counts bytes of its body that left."""

    method: str
    path: str
    range: str | None
    sent: int = 0


@dataclass
class Cut:
    """Break the next transfer after ``after`` bytes: close the socket, reset it, or stop the whole server."""

    after: int
    how: str = "close"


@dataclass
class HubServer:
    """Serve ``repos[repo][file] = path`` for a ``with`` block; ``stop`` and ``start`` keep the port."""

    repos: dict[str, dict[str, Path]]
    cuts: list[Cut] = field(default_factory=list)
    log: list[Request] = field(default_factory=list)
    port: int = 0
    ranges: bool = True

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.http = _Server(("127.0.0.1", self.port), _Handler)
        self.http.hub, self.port = self, self.http.server_port
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def downloads(self) -> list[Request]:
        """The requests for file contents."""
        return [request for request in self.log if request.method == "GET" and "/bytes/" in request.path]


def _digest(path: Path) -> str:
    """The file's SHA-256; of a sparse one of the real size, some hash."""
    return hashlib.sha256(path.read_bytes() if path.stat().st_size < 1 << 30 else b"").hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.request_seen = Request(self.command, path, self.headers.get("Range"))
        hub.log.append(self.request_seen)
        if match := TREE.fullmatch(path):
            return self.tree(match["repo"])
        if match := BYTES.fullmatch(path):
            return self.bytes(hub.repos[match["repo"]][match["file"]])
        if match := RESOLVE.fullmatch(path):
            return self.resolve(**match.groupdict())
        self.answer(404)

    def resolve(self, repo: str, revision: str, file: str) -> None:
        files = self.server.hub.repos.get(repo)
        if repo.split("/")[0] in REFUSED:
            return self.answer(*REFUSED[repo.split("/")[0]])
        if files is None:
            return self.answer(404, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.answer(404, "RevisionNotFound")
        if file not in files:
            return self.answer(404, "EntryNotFound")
        # The bytes are on another host, as on the real hub: "localhost" is another name than "127.0.0.1".
        self.answer(
            302,
            headers={
                "Location": f"http://localhost:{self.server.hub.port}/bytes/{repo}/{file}",
                "X-Linked-Size": str(files[file].stat().st_size),
                "X-Linked-Etag": f'"{_digest(files[file])}"',
            },
        )

    def tree(self, repo: str) -> None:
        files = self.server.hub.repos.get(repo)
        if files is None:
            return self.answer(404, "RepoNotFound")
        self.answer(
            200,
            body=json.dumps(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                    for name, path in files.items()
                ]
            ).encode(),
        )

    def bytes(self, path: Path) -> None:
        size, first, last = path.stat().st_size, 0, path.stat().st_size - 1
        wanted = self.headers.get("Range") if self.server.hub.ranges else None
        if wanted:
            begin, end = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            first, last = int(begin), min(int(end or last), last)
        headers = {"Content-Range": f"bytes {first}-{last}/{size}"} if wanted else {}
        headers["Content-Length"] = str(last + 1 - first)
        with path.open("rb") as file:  # one of the real shape is sparse, and larger than memory
            file.seek(first)
            body = file.read(last + 1 - first) if self.command == "GET" else b""
        self.answer(206 if wanted else 200, headers=headers, body=body)

    def answer(
        self, status: int, code: str | None = None, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status)
        extra = {"X-Error-Code": code} if code else {"X-Repo-Commit": COMMIT}
        for name, value in {"Content-Length": str(len(body)), **extra, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(body)

    def send_body(self, body: bytes) -> None:
        hub = self.server.hub
        cut = hub.cuts.pop(0) if hub.cuts and "/bytes/" in self.path else None
        body = body[: cut.after] if cut else body
        for start in range(0, len(body), 1 << 16):
            self.wfile.write(body[start : start + (1 << 16)])
            self.request_seen.sent += len(body[start : start + (1 << 16)])
        if cut:
            self.cut(cut.how)

    def cut(self, how: str) -> None:
        if how == "reset":  # a linger time of 0 makes close() send RST instead of FIN
            self.wait_until_read()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif how in ("stop", "restart"):
            getattr(self.server.hub, how)()
        self.close_connection = True

    def wait_until_read(self) -> None:
        """Wait until the kernel has handed all bytes over: a reset throws away what is still queued."""
        import fcntl
        import termios
        import time

        for _ in range(500):
            queued = struct.unpack("i", fcntl.ioctl(self.connection, termios.TIOCOUTQ, b"\0" * 4))[0]
            if not queued:
                return
            time.sleep(0.01)
