"""The way to one server: connection, limits of time and bytes, secrets, errors and retries.

Requests to this machine never go through a proxy. Keys are sent and never shown.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.pool import ThreadPool
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import SecretStr
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.model import ContextFullError

Answer, Work = TypeVar("Answer"), TypeVar("Work")
_thread = threading.local()  # ``over``: set when nobody waits for this thread any more
RETRIES, PROBE_RETRIES = 4, 2  # of a question, and of a request for what a server need not have
CONNECT_SECONDS = 10.0
PAGE_SECONDS = 30.0  # that a page may take which is no answer
ANSWER_SECONDS = 3600.0  # that a whole answer may take
MOST_BYTES = 16 << 20  # of a response
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
SHORTEST_SECRET = 8  # characters; shorter ones, such as "none", stand in ordinary text
BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? (the )?(available )?context|maximum context length"
    r"|context (window|size|length)[^.]{0,40}exceed|max_model_len|llama_decode returned 1\b",  # no room left
    re.IGNORECASE,
)
ADDRESS_HINT = "check port and path: the address ends in /v1 as a rule"


class EndpointError(DfqsError):
    """An endpoint cannot be asked, or does not answer."""

    status = 0  # of HTTP


class TemporaryError(EndpointError):
    """A server is busy, cannot be reached or breaks off its answer, also when it is asked again."""


class ContextOverflowError(EndpointError, ContextFullError):
    """The prompt and the answer exceed the server's context. Asking again does not help."""


def in_time(seconds: float, work: Callable[[], Answer]) -> Answer:
    """What the work returns; `TimeoutError`: it takes longer, and its thread is left to itself.

    The client's own limits are for each read: a server that drips its headers would never reach them.
    """
    result, over = Future[Answer](), getattr(_thread, "over", None)
    if over and over.is_set():
        raise SystemExit  # it ends the thread

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="request", daemon=True).start()
    return result.result(seconds)


@contextmanager
def side_by_side(
    work: Callable[[Work], Answer], items: Iterable[Work], n_at_once: int
) -> Iterator[Iterator[Answer]]:
    """Do the work for each item, up to ``n_at_once`` at a time (0: as results are taken); results in order.

    An interrupt ends the block at once: requests under way are left to themselves, and no others are sent.
    """
    if n_at_once < 1:
        yield map(work, items)
        return
    over = getattr(_thread, "over", None) or threading.Event()
    with ThreadPool(n_at_once, setattr, (_thread, "over", over)) as pool:
        try:
            yield pool.imap(work, items)
        except KeyboardInterrupt:
            over.set()
            raise


def broken(why: str, url: str) -> TemporaryError:
    """The error for an answer without its end."""
    hint = "read the server's log; nothing of this answer was kept"
    return TemporaryError(f"the answer broke off ({why})", where=url, hint=hint)


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
    timeout_seconds: float = ANSWER_SECONDS

    @cached_property
    def client(self) -> httpx2.Client:
        """The connections: with this key or none, whatever the environment holds."""
        key, host = self.key.get_secret_value(), urlsplit(self.url).hostname or ""
        headers = {"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {})
        own = re.fullmatch(r"localhost|127\.[\d.]+|::1", host)
        try:
            return httpx2.Client(headers=headers, trust_env=not own)
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            hint = "check HTTP_PROXY, HTTPS_PROXY and ALL_PROXY (SOCKS needs the package socksio)"
            raise EndpointError(f"no proxy can be used ({error})", where=self.url, hint=hint) from None

    def hide(self, text: str) -> str:
        r"""A text from outside: without the key, halves of characters joined or replaced.

        >>> Wire("http://a/v1", SecretStr("sk-12345")).hide("no sk-12345 \ud83d\ude00 \udcaf")
        'no *** 😀 �'
        """
        key = self.key.get_secret_value()
        text = text.replace(key, "***") if len(key) >= SHORTEST_SECRET else text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def page(self, url: str, body: Mapping[str, Any] | None = None, seconds: float = PAGE_SECONDS) -> Any:
        """The JSON that an address returns (for a body, if there is one), with `hide` on every text.

        One that does not end in these seconds, or is too large, is an error.
        """
        try:
            return in_time(seconds, partial(self._page, url, body, seconds))
        except TimeoutError:  # the connections are closed, which ends the thread that reads; others ask again
            vars(self).pop("client", self.client).close()
            raise

    def _page(self, url: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        timeout = httpx2.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        method, raw = "POST" if body else "GET", bytearray()
        with self.client.stream(method, url, json=body or None, timeout=timeout) as response:
            for chunk in response.iter_raw():  # never unpacked: a small answer must not become a large one
                raw += chunk
                if len(raw) > MOST_BYTES:
                    what = f"the answer has over {MOST_BYTES:,} bytes"
                    raise EndpointError(what, where=self.url, hint="take another server")
        text = raw.decode("utf-8", "replace")
        if not response.is_success:
            raise self._refusal(response.status_code, text or response.reason_phrase, body or {})
        return json.loads(self.hide(json.dumps(json.loads(text), ensure_ascii=False)))

    def _refusal(self, status: int, text: str, body: Mapping[str, Any]) -> EndpointError:
        """The error for a status that is no success."""
        try:
            words = self.hide(_words(json.loads(text)))
        except (ValueError, RecursionError):
            words = self.hide(text[:300])
        what = f"the server refuses the request: {status} ({words})"
        hint = "the answer to this request will not change: change the request"
        kind: type[EndpointError] = EndpointError
        if OVERFLOW.search(words) and status in (400, 413, 422, 500):
            kind, what = ContextOverflowError, f"it does not fit into the server's context ({words})"
            hint = "start the server with a larger context, or shorten the prompt"
        elif status in BUSY or status >= 500:
            kind, what = TemporaryError, f"the server says {status} ({words})"
            hint = "wait, or read the server's log"
        elif status in (401, 403):
            what = f"the key is refused ({status})"
            hint = "put the right key into an environment variable and pass its name"
        elif status == 404:
            no_model = f"no model {body['model']!r}, or " if "model" in body else ""
            what, hint = f"{no_model}no such path there ({words})", ADDRESS_HINT
        error = kind(what, where=self.url, hint=hint)
        error.status = status
        return error

    def persist(self, request: Callable[[], Answer], retries: int = RETRIES) -> Answer:
        """The answer to a request, asked again with growing pauses after a `TemporaryError`."""

        def ask_once() -> Answer:
            try:
                return request()
            except Exception as error:
                meant = self._meaning(error)
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
        if isinstance(error, httpx2.ReadTimeout | TimeoutError):  # asked again it would take as long
            hint = "raise --timeout (timeout_seconds), ask for fewer tokens, or read the server's log"
            return EndpointError("no answer in time", where=self.url, hint=hint)
        if not isinstance(error, httpx2.TransportError):
            return error
        hint = "check the address, and that the server is running"
        return TemporaryError(f"nothing answers there ({why})", where=self.url, hint=hint)

    def optional(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """JSON at a path of the server; None where there is no such path, or no JSON.

        A server that stays busy (429 or 503) is an error: taken for another kind, it would be asked
        differently from then on. llama.cpp's lists its models while it still loads one.
        """
        url = re.sub(r"/v\d+\w*$", "", self.url) + path
        try:
            return self.persist(lambda: self.page(url, body), PROBE_RETRIES)
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
