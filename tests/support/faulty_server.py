"""A server of OpenAI's protocol on loopback with faults on demand: such faults cannot be had from real ones.

``faults`` are taken from the front, one a completion; when there are none left, it answers well.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWER = ("The", " red", " key", ".")
TEXT = "".join(ANSWER)
OVERFLOW = {
    "code": 400,
    "message": "request (6002 tokens) exceeds the available context size (1024 tokens), try increasing it",
    "type": "exceed_context_size_error",
    "n_prompt_tokens": 6002,
    "n_ctx": 1024,
}


@dataclass
class FaultyServer:
    """Serve for a ``with`` block. ``log`` holds path, body and key of each request."""

    faults: list[str] = field(default_factory=list)
    models: tuple[str, ...] = ("good",)
    meta: dict = field(default_factory=dict)  # that the list of models has beside each name
    key: str = ""
    answer: object = None  # a function of the request's body that gives the text
    pages: dict[str, list[tuple[int, object]]] = field(
        default_factory=dict
    )  # status and JSON in turn; the last stays
    log: list[tuple[str, dict, str]] = field(default_factory=list)
    window: int = 1 << 30
    port: int = 0
    busiest: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def count(self, body: dict) -> int:
        """Tokens of a prompt: 10 characters each, up to the window from which on this server cuts them."""
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        return min(1 + len(text) // 10, self.window)

    @property
    def asked(self) -> list[dict]:
        return [body for path, body, _ in self.log if path.partition("?")[0].endswith("completions")]

    def __enter__(self) -> FaultyServer:
        self.http = _Server(("127.0.0.1", self.port), _Handler)
        self.http.owner, self.port = self, self.http.server_port
        self.lock, self.now = threading.Lock(), 0
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: FaultyServer

    def handle_error(self, *_args: object) -> None:
        """A client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_args: object) -> None:
        pass

    @property
    def owner(self) -> FaultyServer:
        return self.server.owner

    def _seen(self) -> dict:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.owner.log.append((self.path, body, self.headers.get("Authorization", "")))
        return body

    def _refused(self) -> bool:
        if self.owner.key and self.headers.get("Authorization") != f"Bearer {self.owner.key}":
            self._json(401, {"error": {"message": "Invalid API key", "type": "authentication_error"}})
            return True
        return False

    def _json(self, status: int, value: object) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self._seen()
        self.path = self.path.partition("?")[0]
        if self.path == "/v1/models" and not self._refused():
            listed = [{"id": name, "object": "model", **self.owner.meta} for name in self.owner.models]
            self._json(200, {"object": "list", "data": listed})
        elif self.path != "/v1/models":
            self._page()

    def _page(self) -> None:
        answers = self.owner.pages.get(self.path, [(404, {"detail": "Not Found"})])
        self._json(*(answers.pop(0) if len(answers) > 1 else answers[0]))

    def do_POST(self) -> None:
        body = self._seen()
        if self._refused():
            return
        if not self.path.partition("?")[0].endswith("completions"):
            self._page()
            return
        self.inside = True
        with self.owner.lock:
            fault = self.owner.faults.pop(0) if self.owner.faults else "none"
            self.owner.now += 1
            self.owner.busiest = max(self.owner.busiest, self.owner.now)
        try:
            getattr(self, f"_{fault.partition(' ')[0].replace('-', '_')}")(body, fault.partition(" ")[2])
        finally:
            self._left()

    def _left(self) -> None:
        """This request is no longer worked on; said before its last byte leaves."""
        with self.owner.lock:
            self.owner.now -= self.inside
        self.inside = False

    # ---- good answers ----

    def _none(self, body: dict, _extra: str) -> None:
        self._end(body)

    def _slow(self, body: dict, seconds: str) -> None:
        threading.Event().wait(float(seconds))
        self._none(body, "")

    def _pieces(self, body: dict) -> tuple[str, ...]:
        return (self.owner.answer(body),) if self.owner.answer else ANSWER

    def _choice(self, body: dict, text: str, reason: str | None) -> dict:
        chat = "messages" in body
        held = {"message": {"content": text, "role": "assistant"}} if chat else {"text": text}
        return {"index": 0, "finish_reason": reason, "logprobs": None, **held}

    def _object(self, body: dict, choices: list[dict]) -> dict:
        n, n_prompt = len(self._pieces(body)), self.owner.count(body)
        return {
            "id": "1",
            "object": "chat.completion" if "messages" in body else "text_completion",
            "created": 1,
            "model": body.get("model"),
            "choices": choices,
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n},
        }

    def _end(self, body: dict, reason: str = "stop") -> None:
        self._left()
        self._json(200, self._object(body, [self._choice(body, "".join(self._pieces(body)), reason)]))

    def _length(self, body: dict, _extra: str) -> None:
        self._end(body, "length")

    # ---- faults ----

    def _429(self, _body: dict, _extra: str) -> None:
        self._json(429, {"error": {"message": "slow down", "type": "rate_limit"}})

    def _500(self, _body: dict, _extra: str) -> None:
        self._json(500, {"error": {"message": "llama_decode failed", "type": "server_error"}})

    def _404(self, _body: dict, _extra: str) -> None:
        self._json(404, {"error": {"message": "model not found", "type": "not_found_error"}})

    def _422(self, _body: dict, _extra: str) -> None:
        self._json(422, {"detail": [{"msg": "field required"}]})

    def _overflow(self, _body: dict, _extra: str) -> None:
        self._json(400, {"error": OVERFLOW})

    def _truncated(self, body: dict, _extra: str) -> None:
        """Half of an answer, in order."""
        self._json(200, self._object(body, [self._choice(body, ANSWER[0], None)]))

    def _die(self, _body: dict, _extra: str) -> None:
        """The process is gone: the connection is reset in the middle."""
        self.wfile.write(
            b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"id"'
        )
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _garbage(self, _body: dict, _extra: str) -> None:
        self._bytes(b"{not json")

    def _bytes(self, raw: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _null(self, body: dict, _extra: str) -> None:
        """A proxy's answer without its message."""
        self._json(200, self._object(body, [{"index": 0, "message": None, "finish_reason": "stop"}]))

    # ---- hostile ----

    def _halves(self, body: dict, pieces: str) -> None:
        """Pieces, given as JSON, that hold halves of a character."""
        self._left()
        self._json(200, self._object(body, [self._choice(body, "".join(json.loads(pieces)), "stop")]))

    def _raw(self, _body: dict, kind: str) -> None:
        """An answer of its own shape: bytes that are not UTF-8, JSON in a thousand brackets, numbers as texts."""
        raw = {
            "bytes": b'{"choices":[{"text":"a\xff\xfeb","message":{"content":"a\xff\xfeb"},"finish_reason":"stop"}]}',
            "deep": b"[" * 100_000,
            "digits": b'{"choices":[],"created":' + b"9" * 5_000 + b"}",
            "usage": b'{"choices":[{"text":"x","message":{"content":"x"},"finish_reason":"stop"}],"usage":{"completion_tokens":"many"}}',
            "uncounted": b'{"choices":[{"text":"x","message":{"content":"x"},"finish_reason":"stop"}]}',
            "list": b'["not", "an", "answer"]',
            "content": b'{"choices":[{"text":[1],"message":{"content":[1]},"finish_reason":"stop"}]}',
        }[kind]
        self._bytes(raw)

    def _drip(self, _body: dict, where: str) -> None:
        """One byte after the other, for ever, also of a header."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json")
        self.wfile.write(b"" if where == "header" else b'\r\n\r\n{"id": "')
        for _ in range(300):
            self.wfile.write(b"a")
            self.wfile.flush()
            threading.Event().wait(0.1)

    def _endless(self, _body: dict, n_bytes: str) -> None:
        """An answer without an end (but for this test's patience)."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        part = b'{"choices": "' + b"a" * 65536
        for _ in range(int(n_bytes) // len(part)):
            self.wfile.write(part)

    def _echo(self, _body: dict, status: str) -> None:
        """The key, in the words of an error (or of an answer)."""
        sent = self.headers.get("Authorization", "") + self.path
        if status == "200":
            self._json(200, self._object(_body, [self._choice(_body, sent, "stop")]))
            return
        self._json(int(status), {"error": {"message": f"who is {sent}?", "type": sent}})

    def _filtered(self, body: dict, reason: str) -> None:
        self._end(body, reason)
