"""The way to one server: connection, limits of time and bytes, secrets, errors and retries.

Requests to this machine never go through a proxy. Keys are sent and never shown.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from math import inf
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2
from pydantic import SecretStr
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from dfqs_nb.core.errors import DfqsError, proxy_fault
from dfqs_nb.llama.model import ContextFullError

Answer = TypeVar("Answer")
CONNECT_SECONDS = 10.0
PROBE_RETRIES = 2  # of a request for what a server need not have
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
SHORTEST_SECRET = 4  # characters; shorter ones stand in ordinary words
BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? (the )?(available )?context|maximum context length"
    r"|context (window|size|length)[^.]{0,40}exceed|max_model_len|llama_decode returned 1\b",  # no room left
    re.IGNORECASE,
)
MOST_SECONDS = 30.0  # of a response that is no answer, headers included
MOST_BYTES = 16 << 20  # of a response: events of a stream repeat the model's name with each token
ADDRESS_HINT = "check port and path: the address ends in /v1 as a rule"
# Of the response that this thread reads: its address, its latest end, and the bytes that are left.
_limit: ContextVar[SimpleNamespace] = ContextVar("_limit", default=SimpleNamespace(end=inf, n_bytes=inf))  # noqa: B039


class EndpointError(DfqsError):
    """An endpoint cannot be asked, or does not answer."""

    status = 0  # of HTTP


class TemporaryError(EndpointError):
    """A server is busy or cannot be reached, also when it is asked again."""


class BrokenAnswerError(TemporaryError):
    """An answer breaks off before its end, every time."""


class ContextOverflowError(EndpointError, ContextFullError):
    """The prompt and the answer exceed the server's context. Asking again does not help."""


def broken(why: str, url: str) -> EndpointError:
    """The error for an answer without its end; the server's words may say that its context is full."""
    if OVERFLOW.search(why):
        what = f"it does not fit into the server's context ({why})"
        hint = "start the server with a larger context, or shorten the prompt"
        return ContextOverflowError(what, where=url, hint=hint)
    hint = "read the server's log; nothing of this answer was kept"
    return BrokenAnswerError(f"the answer broke off ({why})", where=url, hint=hint)


def shown_url(url: str) -> str:
    """An address without what may be a secret: user, password, query, parameters and fragment.

    >>> shown_url("http://user:word@host/v1?api_key=sk-1&x")
    'http://***@host/v1?***'
    """
    return re.sub(r"([?#;]).*", r"\1***", re.sub("(?<=://).*@", "***@", url))


@dataclass(frozen=True)
class Wire:
    """The way to one address: ``url`` ends in ``/v1`` and may be shown."""

    url: str
    key: SecretStr = SecretStr("")  # noqa: RUF009 (it cannot be changed)
    timeout_seconds: float = 600.0  # the longest wait for a piece of an answer

    @cached_property
    def client(self) -> httpx2.Client:
        """The connections: with this key or none, whatever the environment holds."""
        parts, seconds = urlsplit(self.url), self.timeout_seconds
        host, key = parts.hostname or "", self.key.get_secret_value()
        own = re.fullmatch(r"localhost|127\.[\d.]+|::1", host)
        proxies = {} if own or proxy_bypass(host) else getproxies()
        proxy = (proxies.get(parts.scheme) or proxies.get("all") or "").strip()
        try:
            proxy_url = (proxy if "://" in proxy else f"http://{proxy}") if proxy else None
            transport = httpx2.HTTPTransport(proxy=proxy_url)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            what, hint = proxy_fault(error)
            raise EndpointError(f"{what}: {shown_url(proxy)}", where=self.url, hint=hint) from None
        transport._pool._network_backend = _Backend()  # a setting of the pool that httpx does not pass on
        return httpx2.Client(
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
            transport=transport,
            trust_env=False,
        )

    def hide(self, text: str) -> str:
        r"""A text from outside: without the key, halves of characters joined or replaced.

        >>> Wire("http://a/v1", SecretStr("sk-12345")).hide("no sk-12345 \ud83d\ude00 \udcaf")
        'no *** 😀 �'
        """
        key = self.key.get_secret_value()
        text = text.replace(key, "***") if len(key) >= SHORTEST_SECRET else text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def page(self, url: str, body: Mapping[str, Any] | None = None) -> Any:
        """The JSON that an address returns (for a body, if there is one), with `hide` on every text."""
        return json.loads(self.hide(json.dumps(next(self.events(url, body)), ensure_ascii=False)))

    def events(
        self, url: str, body: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> Iterator[Any]:
        """The JSON that an address returns, as it comes; of a stream each event."""
        with self.client.stream("POST" if body else "GET", url, json=body or None) as response:
            chunks = response.iter_raw()  # never unpacked: a small answer must not become a large one
            if not response.is_success:
                raise self._refusal(response, b"".join(chunks), body or {})
            if not stream:
                yield json.loads(b"".join(chunks).decode("utf-8", "replace"))
                return
            rest = b""
            for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
                    if data == b"[DONE]":
                        return
                    event = json.loads(data.decode("utf-8", "replace"))
                    if isinstance(event, dict) and event.get("error"):
                        raise broken(self.hide(_words(event)), self.url)
                    yield event

    def _refusal(self, response: httpx2.Response, raw: bytes, body: Mapping[str, Any]) -> EndpointError:
        """The error for a status that is no success."""
        status, text = response.status_code, raw.decode("utf-8", "replace")
        try:
            words = self.hide(_words(json.loads(text)))
        except (ValueError, RecursionError):
            words = self.hide(text[:300] or response.reason_phrase)
        if OVERFLOW.search(words) and status in (400, 413, 422, 500):
            return broken(words, self.url)
        what = f"the server refuses the request: {status} ({words})"
        hint = "the answer to this request will not change: change the request"
        optional = "|".join(map(re.escape, body.keys() - {"model", "prompt", "messages"}))
        if optional and (name := re.search(rf"\b({optional})\b", words)):
            hint = f"leave it out with --field {name[1]}=, or rename it with --field {name[1]}=NEWNAME"
        if status in BUSY or status >= 500:
            hint = "wait, lower the concurrency, or read the server's log"
            busy = TemporaryError(f"the server says {status} ({words})", where=self.url, hint=hint)
            busy.status = status
            return busy
        if status in (401, 403):
            what = f"the key is refused ({status})"
            hint = "put the right key into an environment variable and pass its name"
        elif status == 404:
            no_model = f"no model {body['model']!r}, or " if "model" in body else ""
            what, hint = f"{no_model}no such path there ({words})", ADDRESS_HINT
        return EndpointError(what, where=self.url, hint=hint)

    def persist(
        self, request: Callable[[bool], Answer], *, retries: int, seconds: float = MOST_SECONDS
    ) -> Answer:
        """The answer to a request, asked again with growing pauses after a `TemporaryError`.

        ``request`` gets whether an answer broke off before. ``seconds``: the longest time of an answer.
        """
        broke = False

        def ask_once() -> Answer:
            nonlocal broke
            end = time.monotonic() + seconds
            token = _limit.set(SimpleNamespace(end=end, n_bytes=MOST_BYTES, url=self.url))
            try:
                return request(broke)
            except Exception as error:
                meant = self._meaning(error)
            finally:
                _limit.reset(token)
            broke = broke or isinstance(meant, BrokenAnswerError)
            raise meant from None  # the client's errors hold the request, whose header has the key

        again, last = retry_if_exception_type(TemporaryError), stop_after_attempt(retries + 1)
        pauses = wait_exponential(FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS)
        return Retrying(retry=again, stop=last, wait=pauses, reraise=True)(ask_once)

    def _meaning(self, error: Exception) -> Exception:
        """The failure as an error of this stage; itself where the connection is not the cause."""
        why = self.hide(" ".join(str(error).split())[:200]) or type(error).__name__
        # a ValueError: no JSON, numbers of thousands of digits, or fields of another type
        if isinstance(error, httpx2.ReadError | httpx2.RemoteProtocolError | ValueError | RecursionError):
            return broken(why, self.url)
        if not isinstance(error, httpx2.TransportError):
            return error
        what, hint = f"nothing answers there ({why})", "check the address, and that the server is running"
        if isinstance(error, httpx2.TimeoutException):
            what, hint = "no answer in time", "raise --timeout (timeout_seconds), or ask for fewer tokens"
        return TemporaryError(what, where=self.url, hint=hint)

    def optional(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON at a path of the server; None where there is no such path, or no JSON.

        A server that stays busy (429 or 503) is an error: taken for another kind, it would be asked
        differently from then on. llama.cpp's lists its models while it still loads one.
        """
        url = re.sub(r"/v\d+\w*$", "", self.url) + path
        try:
            return self.persist(lambda broke: self.page(url, body), retries=PROBE_RETRIES)
        except EndpointError as error:
            if error.status in (429, 503):
                raise
            return None


def _words(body: Any) -> str:
    """The server's own words in the JSON of an error."""
    body = body if isinstance(body, dict) else {"detail": body}
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    kind = inner.get("type") or inner.get("code") or ""
    return f"{inner.get('message') or body.get('detail') or body} {kind}".strip()[:300]


# ---- limits, which httpx has for each read and not for a whole response ----


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(self, *arguments: Any, **options: Any) -> Any:
        return _limited(super().connect_tcp(*arguments, **options))


def _limited(stream: Any) -> Any:
    """A connection whose reads, also through TLS, end a response at its limits."""
    read_some, start_tls = stream.read, stream.start_tls

    def read(max_bytes: int, timeout: float | None = None) -> bytes:
        limit, chunk = _limit.get(), b""
        seconds = max(0.001, limit.end - time.monotonic())
        try:
            chunk = read_some(max_bytes, min(seconds, timeout or inf))
        except httpcore2.ReadTimeout:
            if time.monotonic() < limit.end:
                raise
        limit.n_bytes -= len(chunk)
        if limit.n_bytes < 0 or time.monotonic() >= limit.end:
            why = "too many bytes" if limit.n_bytes < 0 else "in its time"
            hint = "raise --timeout (timeout_seconds) for a server that is slow, or take another one"
            raise EndpointError(f"the answer does not end ({why})", where=limit.url, hint=hint)
        return bytes(chunk)

    stream.read, stream.start_tls = read, lambda *args, **options: _limited(start_tls(*args, **options))
    return stream
