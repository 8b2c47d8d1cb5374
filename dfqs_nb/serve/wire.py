"""The way to one server: connection, limits of time and bytes, secrets, errors and retries.

Requests to this machine never go through a proxy. Keys are sent and never shown.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2
from pydantic import SecretStr

from dfqs_nb.core.errors import DfqsError, proxy_fault
from dfqs_nb.llama.model import ContextFullError

Answer = TypeVar("Answer")
CONNECT_SECONDS = 10.0
PROBE_RETRIES = 2  # of a request for what a server need not have
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
SHORTEST_SECRET = 4  # characters; shorter ones stand in ordinary words
BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? (the )?(available )?context|maximum context length"
    r"|context (window|size|length)[^.]{0,40}exceed|max_model_len|llama_decode returned 1\b",  # no room left
    re.IGNORECASE,
)
MOST_SECONDS, MOST_BYTES = 60.0, 16 << 20  # of a response that is no answer, headers included
# Of the response that this thread reads: the time at which it must have ended, and the bytes that are left.
_limit: ContextVar[list[float]] = ContextVar("_limit", default=[float("inf"), float("inf")])  # noqa: B039


class EndpointError(DfqsError):
    """An endpoint cannot be asked, or does not answer."""

    temporary: bool = False  # asking again may help
    status: int = 0  # of HTTP
    retry_after: float | None = None  # seconds that the server asks to wait


class UnreachableError(EndpointError):
    """Nothing answers at the address, or not in time."""

    temporary = True


class KeyRefusedError(EndpointError):
    """The server wants another key (401 or 403)."""


class UnknownModelError(EndpointError):
    """The server has no model of that name."""


class BusyError(EndpointError):
    """The server answers 429 or 5xx, every time."""

    temporary = True


class BrokenAnswerError(EndpointError):
    """An answer breaks off before its end, every time."""

    temporary = True


class EndlessAnswerError(EndpointError):
    """An answer takes longer, or is larger, than any real answer."""


class ContextOverflowError(EndpointError, ContextFullError):
    """The prompt and the answer exceed the server's context. Asking again does not help."""


class FieldError(Exception):
    """A field of an answer has another type than the protocol says."""


def broken(why: str, url: str) -> EndpointError:
    """The error for an answer without its end; the server's words may say that its context is full."""
    if OVERFLOW.search(why):
        hint = "start the server with a larger context, or shorten the prompt"
        return ContextOverflowError(
            f"it does not fit into the server's context ({why})", where=url, hint=hint
        )
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
    """The way to one address: ``url`` ends in ``/v1`` and may be shown; ``query`` goes with each request."""

    url: str
    key: SecretStr = SecretStr("")  # noqa: RUF009 (it cannot be changed)
    query: SecretStr = SecretStr("")  # noqa: RUF009
    timeout_seconds: float = 600.0  # the longest wait for a piece of an answer
    models: tuple[str, ...] = ()  # that the server lists

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
            params=self.query.get_secret_value(),
            timeout=httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
            transport=transport,
            trust_env=False,
        )

    def hide(self, text: str) -> str:
        r"""A text from outside: without this address's secrets, halves of characters joined or replaced.

        >>> Wire("http://a/v1", SecretStr("sk-12345")).hide("no sk-12345 \ud83d\ude00 \udcaf")
        'no *** 😀 �'
        """
        query = parse_qsl(self.query.get_secret_value(), keep_blank_values=True)
        secrets = [self.key.get_secret_value(), *(value or name for name, value in query)]
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def hidden(self, page: Any) -> Any:
        """A JSON value with `hide` applied to every text in it."""
        return json.loads(self.hide(json.dumps(page, ensure_ascii=False)))

    def events(
        self, url: str, body: Mapping[str, Any] | None = None, *, stream: bool = False
    ) -> Iterator[Any]:
        """The JSON that an address returns (for a body, if there is one); of a stream each event."""
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
        kind, what = EndpointError, f"the server refuses the request: {status} ({words})"
        hint = _without_field(words, body)
        if status in (401, 403):
            kind, what = KeyRefusedError, f"the key is refused ({status})"
            hint = "put the right key into an environment variable and pass its name"
        elif status == 404 and body.get("model"):
            kind, what = UnknownModelError, f"no model {body['model']!r}, or no such path ({words})"
            hint = f"it has {', '.join(self.models)}" if self.models else "ask GET /v1/models what it has"
        elif status == 404:
            kind, what = UnreachableError, f"something answers there, but not this protocol ({words})"
            hint = "check port and path: the address ends in /v1 as a rule"
        elif status in BUSY or status >= 500:
            kind, what = BusyError, f"the server says {status} ({words})"
            hint = "wait, lower the concurrency, or read the server's log"
        error = kind(what, where=self.url, hint=hint)
        error.temporary, error.status = kind is BusyError, status
        with contextlib.suppress(ValueError):  # there is none, or it is a date
            error.retry_after = max(0.0, float(response.headers.get("retry-after", "")))
        return error

    def ask(
        self, request: Callable[[bool], Answer], *, retries: int, limits: tuple[float, int] | None = None
    ) -> Answer:
        """The answer to a request, asked again with growing pauses where the failure may pass.

        ``request`` gets whether an answer broke off before. The `EndpointError` has a note of how often.
        """
        seconds, n_bytes = limits or (min(self.timeout_seconds, MOST_SECONDS), MOST_BYTES)
        broke, number = False, 0
        while True:
            number += 1
            token = _limit.set([time.monotonic() + seconds, n_bytes])
            try:
                return request(broke)
            except Exception as error:
                meant = self._meaning(error)
            finally:
                _limit.reset(token)
            broke = broke or isinstance(meant, BrokenAnswerError)
            if number > 1:
                meant.add_note(f"asked {number} times")
            if number > retries or not getattr(meant, "temporary", False):
                raise meant from None  # the client's errors hold the request, whose header has the key
            asked = getattr(meant, "retry_after", None)
            pause = FIRST_PAUSE_SECONDS * 2.0 ** (number - 1) if asked is None else asked
            time.sleep(min(pause, LONGEST_PAUSE_SECONDS))

    def _meaning(self, error: Exception) -> Exception:
        """The failure as an error of this stage; itself where the connection is not the cause."""
        why = self.hide(" ".join(str(error).split())[:200]) or type(error).__name__
        match error:
            case _EndlessError():
                hint = "raise --timeout (timeout_seconds) for a server that is slow, or take another one"
                return EndlessAnswerError(f"the answer does not end ({why})", where=self.url, hint=hint)
            case httpx2.TimeoutException():
                hint = "raise --timeout (timeout_seconds), or ask for fewer tokens"
                return UnreachableError("no answer in time", where=self.url, hint=hint)
            case httpx2.ReadError() | httpx2.RemoteProtocolError() | FieldError():
                return broken(why, self.url)
            case ValueError() | RecursionError():  # no JSON, or with numbers of thousands of digits
                return broken(why, self.url)
            case httpx2.TransportError():
                hint = "check the address, and that the server is running"
                return UnreachableError(f"nothing answers there ({why})", where=self.url, hint=hint)
        return error

    def optional(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON at a path of the server; None where there is no such path, or no JSON.

        A server that stays busy (429 or 503) is an error: taken for another kind, it would be asked
        differently from then on. llama.cpp's lists its models while it still loads one.
        """
        url = re.sub(r"/v\d+\w*$", "", self.url) + path
        try:
            return self.ask(lambda broke: self.hidden(next(self.events(url, body))), retries=PROBE_RETRIES)
        except EndpointError as error:
            if error.status in (429, 503):
                raise
            return None


def _without_field(words: str, fields: Iterable[str]) -> str:
    """The hint for a refused request: how to do without the first field that the server's words name."""
    optional = set(fields) - {"model", "prompt", "messages"}
    named = [name for name in optional if re.search(rf"\b{re.escape(name)}\b", words)]
    if not named:
        return "the answer to this request will not change: change the request"
    field = min(named, key=words.find)
    new = "max_completion_tokens" if field == "max_tokens" else "NEWNAME"
    leave_out = f"leave it out with --field {field}= (fields={json.dumps({field: ''})})"
    return f"{leave_out}, or rename it with --field {field}={new}"


def _words(body: Any) -> str:
    """The server's own words in the JSON of an error."""
    body = body if isinstance(body, dict) else {"detail": body}
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    kind = inner.get("type") or inner.get("code") or ""
    return f"{inner.get('message') or body.get('detail') or body} {kind}".strip()[:300]


# ---- limits, which httpx has for each read and not for a whole response ----


class _EndlessError(Exception):
    """A response takes more time or bytes than it may."""


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(self, *arguments: Any, **options: Any) -> Any:
        return _Stream(super().connect_tcp(*arguments, **options))


class _Stream:
    """A connection that ends a response at its limits."""

    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_tls(self, *arguments: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.start_tls(*arguments, **options))

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        limit, chunk = _limit.get(), b""
        seconds = max(0.001, limit[0] - time.monotonic())
        try:
            chunk = self._inner.read(max_bytes, seconds if timeout is None else min(timeout, seconds))
        except httpcore2.ReadTimeout:
            if time.monotonic() < limit[0]:
                raise
        limit[1] -= len(chunk)
        if limit[1] < 0 or time.monotonic() >= limit[0]:
            raise _EndlessError("too many bytes" if limit[1] < 0 else "in its time")
        return chunk
