"""One address of a server: the connection to it, its limits of time and bytes, its secrets, its retries.

Requests to this machine never go through a proxy. A response has a limit of seconds and bytes from its first
byte to its last, headers included. Bytes that are not UTF-8 become U+FFFD. Keys are sent and never shown.
"""

from __future__ import annotations

import codecs
import ipaddress
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
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from dfqs_nb.serve.errors import BusyError, EndpointError, TooMuch, meaning

Answer = TypeVar("Answer")
CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
SHORTEST_SECRET = 4  # characters; shorter ones stand in ordinary words


@dataclass(frozen=True)
class Limits:
    """The most that one response may take, headers included."""

    seconds: float = 60.0
    n_bytes: int = 16 << 20


LIMITS: ContextVar[Limits] = ContextVar("LIMITS", default=Limits())  # noqa: B039 (it is frozen)


class Secret:
    """Texts that show themselves to no one who does not ask: not in reprs, not in JSON, not in tracebacks.

    >>> Secret("sk-1"), f"{Secret('sk-1')}", bool(Secret(""))
    (a key, 'a key', False)
    """

    __slots__ = ("_text",)

    def __init__(self, text: str = "") -> None:
        self._text = text

    def __repr__(self) -> str:
        return "a key" if self._text else "no key"

    def __bool__(self) -> bool:
        return bool(self._text)

    def reveal(self) -> str:
        """The text itself, for the one place that needs it."""
        return self._text


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
    """An address without what may be a secret: user, password and the values of its query.

    >>> shown_url("http://user:word@host/v1?api_key=sk-1&x")
    'http://***@host/v1?api_key=***&***'
    """
    scheme, colon, rest = url.partition("://")
    rest = f"***@{rest.rpartition('@')[2]}" if "@" in rest else rest
    path, mark, query = rest.partition("?")
    parts = [
        f"{name}=***" if equals else "***" for name, equals, _ in (p.partition("=") for p in query.split("&"))
    ]
    return scheme + colon + path + (mark + "&".join(parts) if mark else "")


@dataclass(frozen=True)
class Wire:
    """The way to one address.

    Attributes:
        url: with ``/v1`` at its end, without a query; it may be shown.
        key: sent as a bearer token.
        query: of the address, sent with every request.
        timeout_seconds: the longest wait for a piece of an answer.
    """

    url: str
    key: Secret = Secret()  # noqa: RUF009 (it cannot be changed)
    query: Secret = Secret()  # noqa: RUF009
    timeout_seconds: float = 600.0

    @cached_property
    def client(self) -> Any:
        """An ``openai`` client that sends this key or none, whatever the environment holds.

        Its own retries are off: it would not ask again after a stream that breaks.
        """
        import openai

        timeout = openai.Timeout(self.timeout_seconds, connect=min(CONNECT_SECONDS, self.timeout_seconds))
        http = httpx2.Client(
            transport=_Transport(self.url), timeout=timeout, trust_env=False, follow_redirects=False
        )
        return openai.OpenAI(
            base_url=self.url,
            api_key=self.key.reveal() or "none",
            organization="",
            project="",
            timeout=timeout,
            max_retries=0,
            default_query=dict(self._asked),
            http_client=http,
        )

    @property
    def _asked(self) -> list[tuple[str, str]]:
        return parse_qsl(self.query.reveal(), keep_blank_values=True)

    def hide(self, text: str) -> str:
        r"""A text from outside: without this address's secrets, halves of characters joined or replaced.

        >>> Wire("http://a/v1", Secret("sk-12345")).hide("no sk-12345 \ud83d\ude00 \udcaf")
        'no *** 😀 �'
        """
        values = [self.key.reveal(), *(value or name for name, value in self._asked)]
        for secret in sorted(values, key=len, reverse=True):
            text = text.replace(secret, "***") if len(secret) >= SHORTEST_SECRET else text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def hidden(self, value: Any) -> Any:
        """A JSON value with `hide` applied to every text in it."""
        if isinstance(value, dict):
            return {self.hide(str(key)): self.hidden(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hidden(item) for item in value]
        return self.hide(value) if isinstance(value, str) else value

    def ask(
        self,
        request: Callable[[int], Answer],
        *,
        retries: int,
        limits: Limits | None = None,
        model: str = "",
        models: Sequence[str] = (),
        fields: Sequence[str] = (),
    ) -> Answer:
        """The answer to a request, asked again with growing pauses where the failure may pass.

        Args:
            request: gets the number of the attempt, from 1.
            limits: of each response.
            model, models, fields: see ``errors.meaning``.

        Raises:
            EndpointError: the one that the failure means; a note says how often it was asked.
        """

        def attempt(number: int) -> Answer:
            token = LIMITS.set(limits or Limits(min(self.timeout_seconds, 60.0)))
            try:
                return request(number)
            except Exception as error:
                made = meaning(error, self.url, model, models, fields)
                if made is None:
                    raise
                raise self._without_secrets(made) from RuntimeError(
                    self.hide(f"{type(error).__name__}: {str(error)[:300]}")
                )  # the client's errors hold the request, whose header has the key
            finally:
                LIMITS.reset(token)

        number = 0
        try:
            for turn in Retrying(
                stop=stop_after_attempt(retries + 1),
                retry=retry_if_exception(lambda error: getattr(error, "temporary", False)),
                wait=_pause,
                sleep=lambda seconds: time.sleep(seconds),
                reraise=True,
            ):
                with turn:
                    number = turn.retry_state.attempt_number
                    return attempt(number)
        except EndpointError as error:
            if number > 1:
                error.add_note(f"asked {number} times")
            raise
        raise AssertionError("the last attempt raises")

    def _without_secrets(self, error: EndpointError) -> EndpointError:
        made = type(error)(self.hide(error.what), where=error.where, hint=self.hide(error.hint))
        made.temporary, made.retry_after, made.status = error.temporary, error.retry_after, error.status
        return made


def _pause(state: RetryCallState) -> float:
    """Seconds to wait: what the server asks for, else twice as long each time."""
    asked = getattr(state.outcome and state.outcome.exception(), "retry_after", None)
    seconds = FIRST_PAUSE_SECONDS * 2.0 ** (state.attempt_number - 1) if asked is None else float(asked)
    return min(seconds, LONGEST_PAUSE_SECONDS)


# ---- the transport ----


class _Transport(httpx2.BaseTransport):
    """httpx's own transport has no limit of total time or bytes; this one has, down to the socket."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        host, limited = parts.hostname or "", _Backend()
        proxies = {} if is_loopback(host) or proxy_bypass(host) else getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        context = httpx2.create_ssl_context() if parts.scheme == "https" else None
        self._pool: httpcore2.ConnectionPool
        if proxy:
            address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            auth = (address.username or "", address.password or "") if address.username else None
            where = f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
            self._pool = httpcore2.HTTPProxy(
                where, proxy_auth=auth, ssl_context=context, network_backend=limited
            )
        else:
            self._pool = httpcore2.ConnectionPool(ssl_context=context, network_backend=limited)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = httpcore2.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        request.headers["accept-encoding"] = "identity"  # a small answer must not unpack into a large one
        made = httpcore2.Request(
            request.method,
            url,
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        response = self._pool.handle_request(made)
        headers = [(name, value) for name, value in response.headers if name.lower() != b"content-encoding"]
        return httpx2.Response(
            response.status, headers=headers, stream=_Body(response.stream), extensions=response.extensions
        )

    def close(self) -> None:
        self._pool.close()


class _Body(httpx2.SyncByteStream):
    """The bytes of a response, as valid UTF-8."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for chunk in self._stream:
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()

    def close(self) -> None:
        self._stream.close()


class _Backend(httpcore2.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        return _Stream(super().connect_tcp(host, port, timeout, local_address, socket_options))


class _Stream(httpcore2.NetworkStream):
    """A connection that ends a response at its limits; each request begins them anew."""

    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner, self._until, self._left = inner, float("inf"), 1 << 62

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        limits = LIMITS.get()
        self._until, self._left = time.monotonic() + limits.seconds, limits.n_bytes
        self._inner.write(buffer, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TooMuch(f"more than {LIMITS.get().seconds:,.0f} s")
        try:
            chunk = self._inner.read(max_bytes, left if timeout is None else min(timeout, left))
        except httpcore2.ReadTimeout:
            if time.monotonic() >= self._until:
                raise TooMuch(f"more than {LIMITS.get().seconds:,.0f} s") from None
            raise
        self._left -= len(chunk)
        if self._left < 0:
            raise TooMuch(f"more than {LIMITS.get().n_bytes:,} bytes")
        return chunk

    def close(self) -> None:
        self._inner.close()

    def start_tls(self, *arguments: Any, **options: Any) -> httpcore2.NetworkStream:
        return _Stream(self._inner.start_tls(*arguments, **options))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def optional(wire: Wire, method: str, path: str, retries: int, body: Mapping[str, Any] | None = None) -> Any:
    """JSON at a path of the server; None where there is no such path, or what is there is not JSON.

    A server that is busy is asked again: taken for one without the path, it would be asked differently from
    then on. llama.cpp's lists its models while it loads one, and answers 503 to all else.

    Raises:
        BusyError: it answered 429 or 503 every time.
    """
    options = {"cast_to": object} if body is None else {"cast_to": object, "body": dict(body)}
    try:
        answer = wire.ask(lambda _: getattr(wire.client, method)(path, **options), retries=retries)
    except BusyError as error:
        if error.status in (429, 503):
            raise
        return None
    except EndpointError:
        return None
    return wire.hidden(answer) if isinstance(answer, (dict, list)) else None
