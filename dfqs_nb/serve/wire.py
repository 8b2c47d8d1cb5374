"""One address of a server: the connection to it, its limits of time and bytes, secrets, errors and retries.

Requests to this machine never go through a proxy. A response has a limit of seconds and bytes from its first
byte to its last, headers included. Bytes that are not UTF-8 become U+FFFD. Keys are sent and never shown.
"""

from __future__ import annotations

import ipaddress
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2
from pydantic import SecretStr, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from dfqs_nb.core.errors import DfqsError, proxy_fault
from dfqs_nb.llama.model import ContextFullError

Answer = TypeVar("Answer")
CONNECT_SECONDS = 10.0
PROBE_RETRIES = 2  # of a request for what a server need not have
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
SHORTEST_SECRET = 4  # characters; shorter ones stand in ordinary words
BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again
NEEDED = ("model", "prompt", "messages")  # fields of a request that none can be without
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? (the )?(available )?context|maximum context length"
    r"|context (window|size|length)[^.]{0,40}exceed|max_model_len",
    re.IGNORECASE,
)


# ---- what a server's failures mean, and which of them may pass ----


class EndpointError(DfqsError):
    """An endpoint cannot be asked, or does not answer.

    Attributes:
        temporary: asking again may help.
        status: of HTTP; 0 where no answer came.
        retry_after: seconds that the server asks to wait; None where it says nothing.
    """

    temporary: bool = False
    status: int = 0
    retry_after: float | None = None


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
    """An answer ends before its end, every time."""

    temporary = True


class EndlessAnswerError(EndpointError):
    """An answer takes longer in all, or is larger, than any honest one."""


class ContextOverflowError(EndpointError, ContextFullError):
    """The prompt and the answer exceed the context that the server has. Asking again does not help."""


def broken(why: str, url: str) -> EndpointError:
    """The error for an answer without its end; what the server says may be that its context is full.

    >>> type(broken("request (6002 tokens) exceeds the available context size", "http://a/v1")).__name__
    'ContextOverflowError'
    """
    if OVERFLOW.search(why):
        hint = "start the server with a larger context, or shorten the prompt"
        return ContextOverflowError(
            f"it does not fit into the server's context ({why})", where=url, hint=hint
        )
    hint = "read the server's log; nothing of this answer was kept"
    return BrokenAnswerError(f"the answer broke off ({why})", where=url, hint=hint)


def refusal(
    status: int, words: str, url: str, model: str = "", models: Sequence[str] = (), fields: Iterable[str] = ()
) -> EndpointError:
    """The error for a status that is no success.

    Args:
        words: the server's own.
        url: its address, as it may be shown.
        model, models: the model that was asked for, and those that the server lists.
        fields: of the request: a refusal that names one of them gets a hint how to do without it.
    """
    if OVERFLOW.search(words) and status in (400, 413, 422, 500):
        return broken(words, url)
    kind, what = EndpointError, f"the server refuses the request: {status} ({words})"
    hint = _field_hint(words, fields) or "the answer to this request will not change: change the request"
    if status in (401, 403):
        kind, what = KeyRefusedError, f"the key is refused ({status})"
        hint = "put the right key into an environment variable and pass its name"
    elif status == 404 and model:
        kind, what = UnknownModelError, f"no model {model!r}, or no such path ({words})"
        hint = f"it has {', '.join(models)}" if models else "ask GET /v1/models what it has"
    elif status == 404:
        kind, what = UnreachableError, f"something answers there, but not this protocol ({words})"
        hint = "check port and path: the address ends in /v1 as a rule"
    elif status in BUSY or status >= 500:
        kind, what = BusyError, f"the server says {status} ({words})"
        hint = "wait, lower the concurrency, or read the server's log"
    error = kind(what, where=url, hint=hint)
    error.temporary = kind is BusyError
    return error


def _field_hint(words: str, fields: Iterable[str]) -> str:
    """How to do without the field that a refusal names; empty where it names none of the request's.

    >>> _field_hint("Unsupported parameter: 'seed'", ("max_tokens", "seed"))
    'leave it out with --field seed= (fields={"seed": ""}), or rename it with --field seed=NEWNAME'
    """
    places = {name: re.search(rf"\b{re.escape(name)}\b", words) for name in fields if name not in NEEDED}
    named = {name: place.start() for name, place in places.items() if place}
    if not named:
        return ""
    name = min(named, key=lambda name: named[name])
    other = "max_completion_tokens" if name == "max_tokens" else "NEWNAME"
    drop = json.dumps({name: ""})
    return f"leave it out with --field {name}= (fields={drop}), or rename it with --field {name}={other}"


# ---- limits and secrets ----


@dataclass(frozen=True)
class Limits:
    """The most that one response may take, headers included."""

    seconds: float = 60.0
    n_bytes: int = 16 << 20


LIMITS: ContextVar[Limits] = ContextVar("LIMITS", default=Limits())  # noqa: B039 (it is frozen)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host; names count only when they are ``localhost``.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown_url(url: str) -> str:
    """An address without what may be a secret: user, password, query, parameters and fragment.

    >>> shown_url("http://user:word@host/v1?api_key=sk-1&x")
    'http://***@host/v1?***'
    """
    return re.sub(r"([?#;]).*", r"\1***", re.sub("(?<=://).*@", "***@", url))


@dataclass(frozen=True)
class Wire:
    """The way to one address.

    Attributes:
        url: with ``/v1`` at its end, without a query; it may be shown.
        key: sent as a bearer token.
        query: of the address, sent with every request.
        timeout_seconds: the longest wait for a piece of an answer.
        models: that the server lists.
    """

    url: str
    key: SecretStr = SecretStr("")  # noqa: RUF009 (it cannot be changed)
    query: SecretStr = SecretStr("")  # noqa: RUF009
    timeout_seconds: float = 600.0
    models: tuple[str, ...] = ()

    @cached_property
    def client(self) -> httpx2.Client:
        """The connections: with this key or none, whatever the environment holds."""
        parts, seconds = urlsplit(self.url), self.timeout_seconds
        host = parts.hostname or ""
        proxies = {} if is_loopback(host) or proxy_bypass(host) else getproxies()
        proxy = (proxies.get(parts.scheme) or proxies.get("all") or "").strip()
        try:
            transport = _Transport(proxy=(proxy if "://" in proxy else f"http://{proxy}") if proxy else None)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            what, hint = proxy_fault(error)
            raise EndpointError(f"{what}: {shown_url(proxy)}", where=self.url, hint=hint) from None
        # not compressed: a small answer must not unpack into a large one
        headers = {"accept-encoding": "identity"}
        return httpx2.Client(
            headers=headers
            | ({"authorization": f"Bearer {self.key.get_secret_value()}"} if self.key else {}),
            params=self.query.get_secret_value(),
            timeout=httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds)),
            transport=transport,
            trust_env=False,
        )

    @property
    def root(self) -> str:
        """The server's address, without the protocol's ``/v1``."""
        return re.sub(r"/v\d+\w*$", "", self.url)

    def hide(self, text: str) -> str:
        r"""A text from outside: without this address's secrets, halves of characters joined or replaced.

        >>> Wire("http://a/v1", SecretStr("sk-12345")).hide("no sk-12345 \ud83d\ude00 \udcaf")
        'no *** 😀 �'
        """
        query = parse_qsl(self.query.get_secret_value(), keep_blank_values=True)
        for secret in sorted(
            [self.key.get_secret_value(), *(value or name for name, value in query)], key=len
        )[::-1]:
            text = text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def hidden(self, value: Any) -> Any:
        """A JSON value with `hide` applied to every text in it."""
        if isinstance(value, dict):
            return {self.hide(key): self.hidden(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hidden(item) for item in value]
        return self.hide(value) if isinstance(value, str) else value

    # ---- one request; failures as `ask` has them ----

    def get(self, url: str) -> Any:
        """The JSON at an address."""
        return self._json(self.client.get(url), {})

    def post(self, url: str, body: Mapping[str, Any]) -> Any:
        """The JSON that an address answers to JSON."""
        return self._json(self.client.post(url, json=body), body)

    def stream(self, url: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """The events that an address answers to JSON, each JSON."""
        with self.client.stream("POST", url, json=body) as response:
            if not response.is_success:
                response.read()
                self._json(response, body)
            rest = b""
            for chunk in response.iter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield self._event(json.loads(data.decode("utf-8", "replace")))

    def _event(self, event: Any) -> Any:
        if isinstance(event, dict) and event.get("error"):
            raise broken(self.hide(_words(event)), self.url)
        return event

    def _json(self, response: httpx2.Response, body: Mapping[str, Any]) -> Any:
        text = response.content.decode("utf-8", "replace")
        if response.is_success:
            return json.loads(text)
        try:
            words = _words(json.loads(text))
        except (ValueError, RecursionError):
            words = text[:300] or response.reason_phrase
        model = str(body.get("model", ""))
        error = refusal(response.status_code, self.hide(words), self.url, model, self.models, body)
        error.status = response.status_code
        error.retry_after = _seconds(response.headers.get("retry-after", ""))
        raise error

    # ---- asking until it answers ----

    def ask(
        self, request: Callable[[int, bool], Answer], *, retries: int, limits: Limits | None = None
    ) -> Answer:
        """The answer to a request, asked again with growing pauses where the failure may pass.

        Args:
            request: gets the number of the attempt, from 1, and whether an answer broke off before.
            limits: of each response.

        Raises:
            EndpointError: the one that the failure means; a note says how often it was asked.
        """
        broke = False
        retrying = Retrying(
            stop=stop_after_attempt(retries + 1),
            retry=retry_if_exception(lambda error: getattr(error, "temporary", False)),
            wait=_pause,
            reraise=True,
        )

        def attempt() -> Answer:
            nonlocal broke
            token = LIMITS.set(limits or Limits(min(self.timeout_seconds, 60.0)))
            try:
                return request(retrying.statistics["attempt_number"], broke)
            except Exception as error:
                meant = self._meaning(error)
                broke = broke or isinstance(meant, BrokenAnswerError)
                raise meant from None  # the client's errors hold the request, whose header has the key
            finally:
                LIMITS.reset(token)

        try:
            return retrying(attempt)
        except EndpointError as error:
            if retrying.statistics["attempt_number"] > 1:
                error.add_note(f"asked {retrying.statistics['attempt_number']} times")
            raise

    def _meaning(self, error: Exception) -> Exception:
        """The failure as an error of this stage; itself where it is none of the connection's."""
        why = self.hide(" ".join(str(error).split())[:200]) or type(error).__name__
        match error:
            case EndlessAnswerError():
                return EndlessAnswerError(error.what, where=self.url, hint=error.hint)
            case httpx2.TimeoutException():
                hint = "raise --timeout (timeout_seconds), or ask for fewer tokens"
                return UnreachableError("no answer in time", where=self.url, hint=hint)
            case httpx2.ReadError() | httpx2.RemoteProtocolError():
                return broken(why, self.url)
            case json.JSONDecodeError() | UnicodeError() | ValidationError() | RecursionError():
                return broken(why, self.url)
            case httpx2.TransportError():
                hint = "check the address, and that the server is running"
                return UnreachableError(f"nothing answers there ({why})", where=self.url, hint=hint)
        return error

    def optional(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON at a path of the server; None where there is no such path, or what is there is not JSON.

        A server that is busy is asked again: taken for one without the path, it would be asked differently
        from then on. llama.cpp's lists its models while it loads one, and answers 503 to all else.

        Raises:
            BusyError: it answered 429 or 503 every time.
        """
        url = self.root + path
        try:
            return self.hidden(
                self.ask(lambda *_: self.post(url, body) if body else self.get(url), retries=PROBE_RETRIES)
            )
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


def _seconds(text: str) -> float | None:
    """Seconds of a ``Retry-After`` header; dates are not read."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return None


def _pause(state: RetryCallState) -> float:
    """Seconds to wait: what the server asks for, else twice as long each time."""
    asked = getattr(state.outcome and state.outcome.exception(), "retry_after", None)
    seconds = FIRST_PAUSE_SECONDS * 2.0 ** (state.attempt_number - 1) if asked is None else float(asked)
    return min(seconds, LONGEST_PAUSE_SECONDS)


# ---- limits, which httpx has for each read and not for a whole response ----


class _Transport(httpx2.HTTPTransport):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._pool._network_backend = _Backend()  # a setting of the pool that httpx does not pass on

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        response.headers.pop("content-encoding", None)  # it was not asked for
        return response


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(self, *arguments: Any, **options: Any) -> Any:
        return _Stream(super().connect_tcp(*arguments, **options))


class _Stream:
    """A connection that ends a response at its limits; each request begins them anew."""

    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner, self._until, self._left = inner, float("inf"), 1 << 62

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_tls(self, *arguments: Any, **options: Any) -> _Stream:
        return _Stream(self._inner.start_tls(*arguments, **options))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        limits = LIMITS.get()
        self._until, self._left = time.monotonic() + limits.seconds, limits.n_bytes
        self._inner.write(buffer, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        seconds = max(0.001, self._until - time.monotonic())
        try:
            chunk = self._inner.read(max_bytes, seconds if timeout is None else min(timeout, seconds))
        except httpcore2.ReadTimeout:
            if time.monotonic() < self._until:
                raise
            chunk = b""
        self._left -= len(chunk)
        limits, late = LIMITS.get(), time.monotonic() >= self._until
        if late or self._left < 0:
            most = f"{limits.seconds:,.0f} s" if late else f"{limits.n_bytes:,} bytes"
            hint = "raise --timeout (timeout_seconds) if this server is that slow; else take another server"
            raise EndlessAnswerError(f"the answer does not end (more than {most})", hint=hint)
        return chunk
