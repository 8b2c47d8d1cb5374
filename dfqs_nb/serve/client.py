"""Send the workbook's requests to any server with an OpenAI-compatible API.

Greedy by default, one request at a time: parallel requests share batches, and batches change numbers. A
failure of the connection or the server is retried and then an error; it is never an answer. Requests to this
machine never go through a proxy. Keys are sent and never shown.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import inf
from multiprocessing.pool import ThreadPool
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import SecretStr
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.generate import GREEDY, Sampling
from dfqs_nb.llama.model import ContextFullError

Answer = TypeVar("Answer")
Kind = TypeVar("Kind")
Work = TypeVar("Work")
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
# What a server would add by itself, switched off: llama-cpp-python's server penalises repetition by 1.1
# unless told otherwise, llama.cpp's reuses the last prompt's cache, which can change the text
# (ggml-org/llama.cpp#22224), and takes a reasoning out of the text, of which nothing is left where the
# tokens ended before the answer. Unknown servers get nothing that they might refuse.
PLAIN: dict[str, dict[str, Any]] = {
    "llama.cpp": {"repeat_penalty": 1.0, "cache_prompt": False, "reasoning_format": "none"},
    "llama-cpp-python": {"repeat_penalty": 1.0},
    "vLLM": {"repetition_penalty": 1.0},
}


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


def _words(body: Any) -> str:
    """The server's own words in the JSON of an error."""
    body = body if isinstance(body, dict) else {"detail": body}
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    kind = inner.get("type") or inner.get("code") or ""
    return f"{inner.get('message') or body.get('detail') or body} {kind}".strip()[:300]


def pick(page: Any, path: str, kind: type[Kind], *, strict: bool = False) -> Kind | None:
    """The value at a path of a JSON page, if it is of this kind; ``strict``: another one is a ValueError.

    >>> pick({"info": {"version": "1"}}, "info.version", str), pick([], "info.version", str)
    ('1', None)
    """
    for name in path.split("."):
        if strict and not isinstance(page, dict | None):
            raise ValueError(f"a {type(page).__name__} in place of an object")
        page = page.get(name) if isinstance(page, dict) else None
    if strict and not isinstance(page, kind | None):
        raise ValueError(f"its {path} is no {kind.__name__}")
    return page if isinstance(page, kind) else None


class Reply(NamedTuple):
    """A completion over a server."""

    text: str
    finish_reason: str  # eos (the model ended it), stop (a stop text came), length or time
    n_prompt: int  # tokens, counted by the server; 0: not told
    n_tokens: int  # of the answer, counted by the server; 0: not told
    logprobs: Sequence[tuple[str, float]] = ()  # of its tokens, if they were asked for


@dataclass(frozen=True)
class Endpoint:
    """A server, how to ask it, and what it reports about itself (None or empty: nothing). See `connect`."""

    url: str  # ends in ``/v1`` and may be shown
    key: SecretStr = SecretStr("")  # noqa: RUF009 (it cannot be changed)
    timeout_seconds: float = ANSWER_SECONDS
    model: str = ""
    retries: int = RETRIES
    server: str = "unknown"  # or llama.cpp, llama-cpp-python, Ollama, vLLM
    version: str = ""
    n_ctx: int | None = None  # of one request
    n_slots: int | None = None  # requests that it works on at once
    chat_template: str = field(default="", repr=False)
    weights: str = ""  # their bytes, number and type
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of each request

    @property
    def identity(self) -> str:
        """The name under which answers are kept where the model's SHA-256 is unknown."""
        return f"{self.server}:{self.model} {self.weights}".strip()

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on, as far as the server reports it; neither address nor key."""
        name = "" if self.server in self.version else self.server
        facts: dict[str, Any] = {"runtime": f"{name} {self.version}".strip(), "endpoint": True}
        facts |= {"endpoint_model": self.model, "n_ctx": self.n_ctx, "n_slots": self.n_slots}
        return facts | {"request_options": dict(self.options)}

    def chat(self, prompt: str, max_tokens: int = 256, **options: Any) -> Reply:
        """The answer to a chat in the server's template; see `ask`."""
        return self.ask({"messages": [{"role": "user", "content": prompt}]}, max_tokens, **options)

    def complete(self, text: str, max_tokens: int = 256, **options: Any) -> Reply:
        """The continuation of plain text, without a template; see `ask`."""
        return self.ask({"prompt": text}, max_tokens, **options)

    def ask(
        self,
        prompt: Mapping[str, Any],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        until: float = inf,
        **options: Any,
    ) -> Reply:
        """One answer to ``messages`` or a ``prompt``, retried after 429, 5xx or a lost or broken answer.

        ``until``: see `Options` of the scores stage. ``options``: further fields of the request. Raises an
        `EndpointError`.
        """
        request = {"model": self.model, **prompt, "max_tokens": max_tokens}
        request |= {"temperature": sampling.temperature, "seed": sampling.seed}
        request |= {"top_p": sampling.top_p} if sampling.temperature > 0 else {}
        request |= {"stop": list(stop)} if stop else {}
        request |= {**self.options, **options}
        return self.persist(partial(self._reply, request, until), self.retries)

    def _reply(self, request: Mapping[str, Any], until: float) -> Reply:
        """One request, asked once; without an answer where the time ends first."""
        chat, get = "messages" in request, partial(pick, strict=True)
        url = f"{self.url}/{'chat/' if chat else ''}completions"
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            page = self.page(url, request, min(self.timeout_seconds, left))
        except (TimeoutError, httpx2.ReadTimeout):
            if time.monotonic() < until:
                raise
            return Reply("", "time", 0, 0)  # the asker has no more time: no fault of the server
        choice = next(iter(get(page, "choices", list) or []), None)
        holder, usage = get(choice, "message", dict) if chat else choice, get(page, "usage", dict)
        reason = get(choice, "finish_reason", str)
        if holder is None:
            raise broken("it holds no message", self.url)
        if reason is None:
            raise broken("it does not say why it ended", self.url)
        if reason not in ("stop", "length"):  # content_filter or tool_calls: asking again changes nothing
            hint = "switch filters and tools off at the server, or take another server"
            raise EndpointError(f"the server ended the answer for {reason!r}", where=self.url, hint=hint)
        if reason == "stop" and not request.get("stop"):
            reason = "eos"  # one word for both in the protocol
        n_prompt, n_tokens = (get(usage, name, int) or 0 for name in ("prompt_tokens", "completion_tokens"))
        guesses = pick(choice, "logprobs.content", list) or []
        pairs = [(pick(guess, "token", str) or "", pick(guess, "logprob", float) or 0.0) for guess in guesses]
        return Reply(get(holder, "content" if chat else "text", str) or "", reason, n_prompt, n_tokens, pairs)

    # -- the way to it --

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

        >>> Endpoint("http://a/v1", SecretStr("sk-12345")).hide("no sk-12345 \ud83d\ude00 \udcaf")
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
            if client := vars(self).pop("client", None):  # else another thread has closed it
                client.close()
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

    def persist(self, request: Callable[[], Answer], retries: int) -> Answer:
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


def connect(
    base_url: str, model: str = "", *, key: str = "", key_variable: str = "", version: str = "", **limits: Any
) -> Endpoint:
    """Ask a server for its models and its version; return the endpoint for all further requests.

    ``model``: one that the server lists; may be left out where it lists just one. ``key``, ``key_variable``:
    the key, or the environment variable that holds it; never shown or written. ``version``: of the server,
    where it is known better than the server reports. ``limits``: ``timeout_seconds`` (of an answer) and
    ``retries``. An `EndpointError` says whether address, key, model or a busy server is the cause.
    """
    endpoint = replace(_address(base_url, key, key_variable), **limits)
    page = endpoint.persist(lambda: endpoint.page(f"{endpoint.url}/models"), endpoint.retries)
    if not isinstance(page, dict) or "data" not in page:
        what = "something answers there, but it does not list models"
        raise EndpointError(what, where=endpoint.url, hint=ADDRESS_HINT)
    entries = pick(page, "data", list) or []
    listed = {name: entry for entry in entries if (name := pick(entry, "id", str)) is not None}
    if model and listed and model not in listed or not model and len(listed) != 1:
        # a server that lists none may have the model nevertheless
        what = f"no model is called {model!r} there" if model else "name the model to ask"
        has = f"it has {', '.join(list(listed)[:8]) or 'none'}{' and more' if len(listed) > 8 else ''}"
        raise EndpointError(what, where=endpoint.url, hint=has)
    model = model or next(iter(listed))
    facts, entry = _facts(endpoint, listed), listed.get(model)
    weights = [pick(entry, f"meta.{name}", object) for name in ("size", "n_params", "ftype")]
    n_ctx = facts.get("n_ctx") or pick(entry, "max_model_len", int) or pick(entry, "meta.n_ctx", int)
    facts |= {"n_ctx": n_ctx, "options": PLAIN.get(facts["server"], {})}
    facts |= {"weights": " ".join(str(value) for value in weights if value)}
    facts |= {"version": version} if version else {}
    return replace(endpoint, model=model, **facts)


def _facts(endpoint: Endpoint, listed: Mapping[str, Any]) -> dict[str, Any]:
    """What an `Endpoint` has of the server itself, from paths that only one kind of server has."""
    props = endpoint.optional("/props")
    if settings := pick(props, "default_generation_settings", dict):
        facts: dict[str, Any] = {"server": "llama.cpp", "version": pick(props, "build_info", str) or ""}
        facts |= {"n_ctx": pick(settings, "n_ctx", int), "n_slots": pick(props, "total_slots", int)}
        return facts | {"chat_template": pick(props, "chat_template", str) or ""}
    for path, server in (("/api/version", "Ollama"), ("/version", "vLLM")):
        if version := pick(endpoint.optional(path), "version", str):
            return {"server": server, "version": version}
    described = endpoint.optional("/openapi.json")
    if "llama.cpp Python" in (pick(described, "info.title", str) or ""):
        return {"server": "llama-cpp-python", "version": pick(described, "info.version", str) or ""}
    owners = {pick(entry, "owned_by", str) for entry in listed.values()}
    return {"server": (owners.pop() if len(owners) == 1 else "") or "unknown"}


def _address(base_url: str, key: str, key_variable: str) -> Endpoint:
    """The way to an address of the protocol's root.

    >>> _address("HTTP://localhost:8080/", "", "").url
    'http://localhost:8080/v1'
    """
    key = key or os.environ.get(key_variable, "")
    if key_variable and not key:
        hint = f"export {key_variable} with the key, or leave the variable out"
        raise EndpointError(f"the environment variable {key_variable} is not set", hint=hint)
    parts = re.fullmatch(r"(https?)(://[^/\s@?#;]+(?:/[^\s@?#;]*)?)", base_url, re.IGNORECASE)
    try:
        split = urlsplit(base_url if parts else "")
        (split.hostname or "").encode("idna"), split.port  # they raise for what is none
    except ValueError:
        parts = None
    if parts is None:
        hint = "give one like http://127.0.0.1:8080/v1; a key goes into a variable"
        raise EndpointError("not an address", where=shown_url(base_url), hint=hint)
    url, key = parts[1].lower() + parts[2].rstrip("/"), key.strip()
    url = url if re.search(r"/v\d+\w*$", url) else f"{url}/v1"
    if not (key.isascii() and key.isprintable()):
        hint = f"export {key_variable or 'a variable'} with the key alone"
        raise EndpointError("the key has characters that no key has", where=url, hint=hint)
    return Endpoint(url, SecretStr(key))


def is_url(text: object) -> bool:
    """Whether this names an endpoint and not a file."""
    return str(text).lower().startswith(("http://", "https://"))


def check_in_process(target: object, what: str) -> None:
    """Refuse the address of an endpoint where only a model in this process will do: an `EndpointError`."""
    if is_url(target):
        hint = "give the GGUF file: it is read inside the runtime, in this process"
        where = shown_url(str(target))
        raise EndpointError(f"{what} cannot be seen through an endpoint", where=where, hint=hint)
