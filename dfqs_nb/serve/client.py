"""Ask any server that speaks OpenAI's protocol what the workbook asks a model in this process.

Greedy by default, one request at a time: parallel requests share batches, and batches change numbers. What
a server does on its own (a repeat penalty, a prompt cache) is switched off where the server is known to have
it. A failure of the connection or the server is tried again and then an error; it is never an answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dfqs_nb import __version__
from dfqs_nb.context import curve as long_context
from dfqs_nb.context.haystacks import MARK, Frame, Question
from dfqs_nb.context.prompts import PromptSet, load_prompts
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.generate import GREEDY, Completion, Sampling
from dfqs_nb.llama.model import ContextFullError
from dfqs_nb.scores import run as scores
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import check_allowed, find_sandbox

if TYPE_CHECKING:
    import pandas as pd

TIMEOUT_SECONDS = 600.0  # between two pieces of an answer, the first one included
CONNECT_SECONDS = 10.0
RETRIES = 4
PROBE_RETRIES = 2  # of a request for what a server need not have
FINAL = ("content_filter", "tool_calls", "function_call")  # ends of an answer: asking again changes nothing
BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
CLIENTS = (1, 2, 4, 8)
COUNTED_ITEMS = 8  # the longest of a set, whose tokens are counted before the first is asked

# What a server would add by itself, switched off: llama-cpp-python's server penalises repetition by 1.1
# unless told otherwise, llama.cpp's reuses the last prompt's cache, which can change the text
# (ggml-org/llama.cpp#22224), and takes a reasoning out of the text, of which nothing is left where the
# tokens ended before the answer. Servers that are not known get nothing they might refuse.
PLAIN: dict[str, dict[str, Any]] = {
    "llama.cpp": {"repeat_penalty": 1.0, "cache_prompt": False, "reasoning_format": "none"},
    "llama-cpp-python": {"repeat_penalty": 1.0},
    "vLLM": {"repetition_penalty": 1.0},
}


class EndpointError(DfqsError):
    """An endpoint cannot be asked, or does not answer."""


class UnreachableError(EndpointError):
    """Nothing answers at the address, or not in time."""


class KeyRefusedError(EndpointError):
    """The server wants another key (401 or 403)."""


class UnknownModelError(EndpointError):
    """The server has no model of that name."""


class BusyError(EndpointError):
    """The server said 429 or 5xx, every time it was asked."""


class BrokenAnswerError(EndpointError):
    """An answer ended before its end, every time it was asked for."""


class ContextOverflowError(EndpointError, ContextFullError):
    """The prompt and the answer exceed the context that the server has. Asking again does not help."""


class Secret:
    """A key that shows itself to no one who does not ask: not in reprs, not in JSON, not in tracebacks.

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
        """The key itself, for the one header that needs it."""
        return self._text


@dataclass(frozen=True)
class ServerFacts:
    """What a server says of itself; None or empty where it says nothing.

    Attributes:
        name: ``llama.cpp``, ``llama-cpp-python``, ``Ollama``, ``vLLM`` or ``unknown``.
        models: names that it lists.
        n_ctx: tokens of context of one request.
        n_slots: requests that it works on at once.
        chat_template: the text of its chat template.
        weights: what it says of the model's weights: bytes, number and type.
    """

    name: str = "unknown"
    version: str = ""
    models: tuple[str, ...] = ()
    n_ctx: int | None = None
    n_slots: int | None = None
    chat_template: str = field(default="", repr=False)
    weights: str = ""


@dataclass(frozen=True)
class Reply(Completion):
    """A completion whose tokens were counted by the server (or, where it counts none, by its pieces).

    Attributes:
        usage_tokens: tokens of the answer; ``counted_by`` says by whom: ``server`` or ``pieces``.
        first_seconds: seconds to the first piece, of text or of a reasoning that the server keeps apart; NaN
            where the answer came whole.
        attempts: requests that it took.
    """

    usage_tokens: int = 0
    counted_by: str = "server"
    first_seconds: float = float("nan")
    attempts: int = 1

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return self.usage_tokens


@dataclass(frozen=True)
class Endpoint:
    """A server that was asked for its models, and how it is asked from then on. See ``connect``."""

    base_url: str
    model: str
    facts: ServerFacts
    key: Secret = field(default_factory=Secret)
    timeout_seconds: float = TIMEOUT_SECONDS
    retries: int = RETRIES
    concurrency: int = 1
    stream: bool = True
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @cached_property
    def client(self) -> Any:
        """The ``openai`` client; retries are this module's, because a broken stream is none of its."""
        return _client(self.base_url, self.key, self.timeout_seconds)

    @property
    def identity(self) -> str:
        """What answers are kept under without the model's SHA-256: another file may be served by its name."""
        return " ".join(filter(None, (f"{self.facts.name}:{self.model}", self.facts.weights)))

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on, as far as the server says it; neither address nor key."""
        facts, name = self.facts, "" if self.facts.name in self.facts.version else self.facts.name
        return {
            "runtime": f"{name} {facts.version}".strip(),
            "endpoint": True,
            "endpoint_model": self.model,
            "n_ctx": facts.n_ctx,
            "n_slots": facts.n_slots,
            "concurrency": self.concurrency,
            "request_options": dict(self.options),
        }

    def chat(
        self,
        prompt: str | Sequence[dict[str, str]],
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Reply:
        """The answer to a chat in the server's template; errors as ``ask``."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return ask(self, {"messages": messages}, max_tokens, sampling, stop, **options)

    def complete(
        self,
        text: str,
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Reply:
        """The continuation of plain text, without a template; errors as ``ask``."""
        return ask(self, {"prompt": text}, max_tokens, sampling, stop, **options)

    def get(self, path: str) -> Any:
        """The JSON at a path of the server (``/props``); None where it has no such path.

        Raises:
            BusyError: it said 429 or 503 every time.
        """
        return _get(self.client, _root(self.base_url) + path)

    def post(self, path: str, **body: Any) -> Any:
        """What the server answers to JSON sent to a path; None and errors as ``get``."""
        return _post(self.client, _root(self.base_url) + path, body)


# ---- connecting ----


def connect(
    base_url: str,
    model: str = "",
    *,
    key: str = "",
    key_variable: str = "",
    timeout_seconds: float = TIMEOUT_SECONDS,
    retries: int = RETRIES,
    concurrency: int = 1,
    stream: bool | None = None,
    version: str = "",
) -> Endpoint:
    """Ask a server for its models and what it is, and return how to ask it from then on.

    Args:
        base_url: with or without the ``/v1`` at its end.
        model: one that the server lists; may be left out where it lists just one.
        key: the key itself, for what never leaves this process; it is shown and written nowhere.
        key_variable: the environment variable that holds the key.
        timeout_seconds: the longest wait for a piece of an answer.
        retries: of a request that met 429, 5xx, a broken connection or a broken answer.
        concurrency: requests at once in ``score_set``; more than 1 can change answers.
        stream: have answers in pieces as they are made. By default all servers but llama-cpp-python's are
            asked for that: its streams count no tokens, and end without a word where the context is full.
        version: of the server, where it is known better than the server says.

    Raises:
        UnreachableError: nothing there speaks the protocol.
        KeyRefusedError: the key is wrong, or the variable is not set.
        UnknownModelError: the server lists other models; the message names them.
        BusyError: it is busy, or still loads its model.
    """
    secret = _secret(key, key_variable)
    url = _with_v1(base_url)
    client = _client(url, secret, min(timeout_seconds, 60.0))
    models = _models(client, url, retries)
    facts = dataclasses.replace(_facts(client, _root(url), models), models=tuple(models))
    chosen = _chosen(model, tuple(models), url)
    facts = _of_model(facts, models.get(chosen, {}))
    facts = dataclasses.replace(facts, version=version) if version else facts
    stream = facts.name != "llama-cpp-python" if stream is None else stream
    return Endpoint(
        url, chosen, facts, secret, timeout_seconds, retries, concurrency, stream, PLAIN.get(facts.name, {})
    )


def is_url(text: object) -> bool:
    """Whether this names an endpoint and not a file.

    >>> is_url("http://127.0.0.1:8080/v1"), is_url("model.gguf")
    (True, False)
    """
    return str(text).startswith(("http://", "https://"))


def check_in_process(target: object, what: str) -> None:
    """Refuse an endpoint where only a model in this process will do.

    Raises:
        EndpointError: ``target`` is an endpoint or its address.
    """
    if isinstance(target, Endpoint) or is_url(target):
        where = target.base_url if isinstance(target, Endpoint) else target
        raise EndpointError(
            f"{what} cannot be seen through an endpoint",
            where=str(where),
            hint="give the GGUF file: it is read inside the runtime, in this process",
        )


def _secret(key: str, key_variable: str) -> Secret:
    if key_variable and not key:
        if not os.environ.get(key_variable):
            raise KeyRefusedError(
                f"the environment variable {key_variable} is not set",
                hint=f"export {key_variable} with the key, or leave the variable out",
            )
        key = os.environ[key_variable]
    return Secret(key)


def _with_v1(url: str) -> str:
    """The address of the protocol's root.

    >>> _with_v1("http://localhost:8080/"), _with_v1("https://a.org/api/v1")
    ('http://localhost:8080/v1', 'https://a.org/api/v1')
    """
    if not re.fullmatch(r"https?://[^/\s@]+(/\S*)?", url):
        raise UnreachableError(
            "not an address",
            where=re.sub(r"//[^/]*@", "//", url),
            hint="give one like http://127.0.0.1:8080/v1; a key goes into a variable",
        )
    url = url.rstrip("/")
    return url if re.search(r"/v\d+\w*$", url) else url + "/v1"


def _root(url: str) -> str:
    return re.sub(r"/v\d+\w*$", "", url)


def _client(url: str, key: Secret, timeout_seconds: float) -> Any:
    """An ``openai`` client that sends this key or none, whatever the environment holds."""
    import openai

    timeout = openai.Timeout(timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds))
    return openai.OpenAI(
        base_url=url,
        api_key=key.reveal() or "none",
        organization="",
        project="",
        timeout=timeout,
        max_retries=0,
    )


def _get(client: Any, url: str) -> Any:
    return _optional(lambda: client.get(url, cast_to=object))


def _post(client: Any, url: str, body: Mapping[str, Any]) -> Any:
    return _optional(lambda: client.post(url, cast_to=object, body=dict(body)))


def _optional(request: Callable[[], Any], retries: int = PROBE_RETRIES) -> Any:
    """The answer as JSON; None where there is no such path, or what is there is not JSON.

    A server that is busy is asked again: taken for one without the path, it would be asked differently from
    then on. llama.cpp's lists its models while it loads one, and says 503 to all else.

    Raises:
        BusyError: it said 429 or 503 every time.
    """
    import openai

    for attempt in range(retries + 1):
        try:
            found = request()
            return found if isinstance(found, (dict, list)) else None
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            status = getattr(error, "status_code", 500)
            if attempt == retries and status in (429, 503):
                meaning = _status(status, _said(error), str(error.request.url), "", ())
                raise meaning from _without_request(error)
            if attempt == retries or not (status in BUSY or status >= 500):
                return None
            time.sleep(_pause(error, attempt))
    return None


def _models(client: Any, url: str, retries: int) -> dict[str, dict[str, Any]]:
    """What the server lists, by name."""
    for attempt in range(retries + 1):
        try:
            listed = client.get(f"{url}/models", cast_to=object)
            break
        except Exception as error:
            _raise_or_wait(error, url, "", attempt, retries)
    try:
        return {str(one["id"]): one for one in listed["data"] or ()}
    except (KeyError, TypeError):
        raise UnreachableError(
            "something answers there, but it does not list models",
            where=url,
            hint="check port and path: the address ends in /v1 as a rule",
        ) from None


def _chosen(model: str, models: Sequence[str], url: str) -> str:
    has = f"it has {', '.join(models[:8]) or 'none'}{' and more' if len(models) > 8 else ''}"
    if model and models and model not in models:
        raise UnknownModelError(f"no model is called {model!r} there", where=url, hint=has)
    if not model and len(models) != 1:
        raise UnknownModelError("say which model to ask", where=url, hint=has)
    return model or models[0]


def _facts(client: Any, root: str, models: Mapping[str, Any]) -> ServerFacts:
    """Name and version, from the paths that each kind of server has of its own."""
    props = _get(client, f"{root}/props")
    if isinstance(props, dict) and "default_generation_settings" in props:
        n_ctx = props["default_generation_settings"].get("n_ctx")
        return ServerFacts(
            "llama.cpp",
            str(props.get("build_info", "")),
            n_ctx=n_ctx,
            n_slots=props.get("total_slots"),
            chat_template=props.get("chat_template", ""),
        )
    for path, name in (("/api/version", "Ollama"), ("/version", "vLLM")):
        found = _get(client, root + path)
        if isinstance(found, dict) and "version" in found:
            return ServerFacts(name, str(found["version"]))
    described = _get(client, f"{root}/openapi.json")
    info = described.get("info", {}) if isinstance(described, dict) else {}
    if "llama.cpp Python" in str(info.get("title", "")):
        return ServerFacts("llama-cpp-python", str(info.get("version", "")), n_slots=1)
    owners = {str(one.get("owned_by", "")) for one in models.values()}
    return ServerFacts(owners.pop() if len(owners) == 1 and "" not in owners else "unknown")


def _of_model(facts: ServerFacts, listed: Mapping[str, Any]) -> ServerFacts:
    """The facts with what the list of models says: the weights (llama.cpp), and a context length (vLLM,
    llama.cpp) if there is none yet.
    """
    meta = listed.get("meta") or {}
    n_ctx = facts.n_ctx or listed.get("max_model_len") or meta.get("n_ctx")
    weights = " ".join(str(meta[name]) for name in ("size", "n_params", "ftype") if meta.get(name))
    return dataclasses.replace(facts, n_ctx=n_ctx, weights=weights)


# ---- asking ----


def ask(
    endpoint: Endpoint,
    prompt: Mapping[str, Any],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    **options: Any,
) -> Reply:
    """One answer, tried again after 429, 5xx, a lost connection or a broken answer.

    After a broken stream the answer is asked for whole: some servers say what is wrong only then.

    Args:
        prompt: ``messages`` of a chat, or a ``prompt`` to continue.
        options: further fields of the request; they replace those of the endpoint.

    Raises:
        ContextOverflowError: it does not fit into the server's context; not tried again.
        KeyRefusedError, UnknownModelError, EndpointError: the request is refused; not tried again.
        BusyError, UnreachableError, BrokenAnswerError: it failed every time.
    """
    request = _request(endpoint, prompt, max_tokens, sampling, stop, options)
    client, stream = endpoint.client, endpoint.stream
    create = (client.chat.completions if "messages" in prompt else client.completions).create
    for attempt in range(endpoint.retries + 1):
        try:
            reply = _streamed(create, request, stop) if stream else _whole(create, request, stop)
            return dataclasses.replace(reply, attempts=attempt + 1)
        except Exception as error:
            stream = stream and not _is_broken(error)
            _raise_or_wait(
                error, endpoint.base_url, endpoint.model, attempt, endpoint.retries, endpoint.facts.models
            )
    raise AssertionError("the last attempt raises")


def _request(
    endpoint: Endpoint,
    prompt: Mapping[str, Any],
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    request: dict[str, Any] = {
        "model": endpoint.model,
        **prompt,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    if sampling.temperature > 0:
        request["top_p"] = sampling.top_p
    if stop:
        request["stop"] = list(stop)
    extra = {**endpoint.options, **options}
    return request | ({"extra_body": extra} if extra else {})


def _whole(create: Callable[..., Any], request: Mapping[str, Any], stop: Sequence[str]) -> Reply:
    started = time.perf_counter()
    said = create(**request)
    seconds = time.perf_counter() - started
    choice = _first(said)
    if getattr(choice, "message", choice) is None:
        raise _Broken("it holds no message")
    return _reply(_text(choice, "message"), choice.finish_reason, stop, said.usage, 0, float("nan"), seconds)


def _streamed(create: Callable[..., Any], request: Mapping[str, Any], stop: Sequence[str]) -> Reply:
    started, first, n_pieces = time.perf_counter(), float("nan"), 0
    text, reason, usage = "", None, None
    with create(**request, stream=True, stream_options={"include_usage": True}) as pieces:
        for piece in pieces:
            usage = piece.usage or usage
            for choice in piece.choices[:1]:
                new = _text(choice, "delta")
                if new or _thought(choice):
                    first = time.perf_counter() - started if n_pieces == 0 else first
                    n_pieces += 1
                text, reason = text + new, choice.finish_reason or reason
    seconds = time.perf_counter() - started
    return _reply(text, reason, stop, usage, n_pieces, first, seconds)


def _text(choice: Any, part: str) -> str:
    """The text of a choice: of a chat in its ``message`` or ``delta``, which a broken answer may lack."""
    if not hasattr(choice, part):
        return choice.text or ""
    return getattr(getattr(choice, part), "content", None) or ""


def _thought(choice: Any) -> str:
    """What a piece has of a reasoning that the server keeps apart (llama.cpp, vLLM): no text, but tokens."""
    delta = getattr(choice, "delta", None)
    return getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""


class _Broken(Exception):
    """An answer without its end."""


class _Refused(Exception):
    """An answer that the server ended for a reason of its own, and would again."""


def _first(said: Any) -> Any:
    if not getattr(said, "choices", None):
        raise _Broken("it holds no answer")
    return said.choices[0]


def _reply(
    text: str,
    reason: str | None,
    stop: Sequence[str],
    usage: Any,
    n_pieces: int,
    first: float,
    seconds: float,
) -> Reply:
    """The parts as a ``Reply``; ``eos`` and ``stop`` are one word in the protocol."""
    if reason in FINAL:
        raise _Refused(reason)
    if reason not in ("stop", "length"):
        raise _Broken(
            f"it ended after {len(text):,} characters without saying why"
            if reason is None
            else f"the server ended it for {reason!r}"
        )
    n_tokens = usage.completion_tokens if usage else n_pieces
    to_first = first if first == first else seconds
    return Reply(
        text,
        (),
        "length" if reason == "length" else "stop" if stop else "eos",
        usage.prompt_tokens if usage else 0,
        to_first,
        max(0.0, seconds - to_first),
        max(0, n_tokens - 1),
        usage_tokens=n_tokens,
        counted_by="server" if usage else "pieces",
        first_seconds=first,
    )


# ---- what can fail ----


def _raise_or_wait(
    error: Exception, url: str, model: str, attempt: int, retries: int, models: Sequence[str] = ()
) -> None:
    """Wait before the next attempt, or raise what the failure means."""
    meaning = _meaning(error, url, model, models)
    if meaning is None:
        raise error
    again = (
        isinstance(meaning, (BusyError, UnreachableError, BrokenAnswerError))
        and getattr(error, "status_code", 0) != 404
    )
    if not again or attempt >= retries:
        if attempt:
            meaning.add_note(f"asked {attempt + 1} times")
        raise meaning from _without_request(error)
    time.sleep(_pause(error, attempt))


def _without_request(error: Exception) -> Exception:
    """The cause as it may be shown: the client's errors hold the request, whose header has the key."""
    return RuntimeError(f"{type(error).__name__}: {str(error)[:300]}")


def _is_broken(error: Exception) -> bool:
    """Whether an answer had begun when it failed."""
    import httpx2
    import openai

    if isinstance(error, openai.APIConnectionError):  # the client's word for most of what goes wrong below it
        error = error.__cause__ or error
    in_stream = type(error) is openai.APIError  # an error event inside the stream
    lost = (httpx2.ReadError, httpx2.RemoteProtocolError, _Broken, json.JSONDecodeError)
    return isinstance(error, lost) or in_stream


def _meaning(error: Exception, url: str, model: str, models: Sequence[str]) -> EndpointError | None:
    """What a failure means to the user; None for one that is not the endpoint's."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return UnreachableError(
            "no answer in time", where=url, hint="raise timeout_seconds, or ask for fewer tokens"
        )
    if isinstance(error, openai.APIConnectionError) and not _is_broken(error):
        return UnreachableError(
            f"nothing answers there ({error.__cause__ or error})",
            where=url,
            hint="check the address, and that the server is running",
        )
    if isinstance(error, openai.APIStatusError):
        return _status(error.status_code, _said(error), url, model, models)
    if isinstance(error, _Refused):
        return EndpointError(
            f"the server ended the answer for {str(error)!r}",
            where=url,
            hint="switch filters and tools off at the server, or take another one",
        )
    if _is_broken(error):
        why = str(error.__cause__ or error) or type(error).__name__
        if _is_overflow(why):
            return _overflow(why, url)
        return BrokenAnswerError(
            f"the answer broke off ({why})",
            where=url,
            hint="read the server's log; nothing of this answer was kept",
        )
    return None


def _said(error: Any) -> str:
    """The server's own words."""
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error", body)
    words = inner.get("message") if isinstance(inner, dict) else inner
    kind = inner.get("type") or inner.get("code") if isinstance(inner, dict) else ""
    return f"{words or body.get('detail') or error.message} {kind or ''}".strip()[:300]


def _status(status: int, said: str, url: str, model: str, models: Sequence[str]) -> EndpointError:
    if _is_overflow(said) and status in (400, 413, 422, 500):
        return _overflow(said, url)
    if status in (401, 403):
        return KeyRefusedError(
            f"the key is refused ({status})",
            where=url,
            hint="put the right key into an environment variable and pass its name",
        )
    if status == 404 and model:
        has = f"it has {', '.join(models)}" if models else "ask GET /v1/models what it has"
        return UnknownModelError(f"no model {model!r}, or no such path ({said})", where=url, hint=has)
    if status == 404:
        return UnreachableError(
            f"something answers there, but not this protocol ({said})",
            where=url,
            hint="check port and path: the address ends in /v1 as a rule",
        )
    if status in BUSY or status >= 500:
        return BusyError(
            f"the server says {status} ({said})",
            where=url,
            hint="wait, lower the concurrency, or read the server's log",
        )
    return EndpointError(
        f"the server refuses the request: {status} ({said})",
        where=url,
        hint="the answer to this request will not change: change the request",
    )


OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? (the )?(available )?context|maximum context length"
    r"|context (window|size|length)[^.]{0,40}exceed|max_model_len",
    re.IGNORECASE,
)


def _is_overflow(said: str) -> bool:
    """Whether a server means that prompt and answer are too long.

    >>> _is_overflow("request (6002 tokens) exceeds the available context size (1024 tokens)")
    True
    """
    return bool(OVERFLOW.search(said))


def _overflow(said: str, url: str) -> ContextOverflowError:
    return ContextOverflowError(
        f"it does not fit into the server's context ({said})",
        where=url,
        hint="start the server with a larger context, or shorten the prompt",
    )


def _pause(error: Exception, attempt: int) -> float:
    """Seconds to wait: what the server asks for (``Retry-After``), else twice as long each time."""
    response = getattr(error, "response", None)
    asked = response.headers.get("retry-after") if response is not None else None
    try:
        return min(max(0.0, float(asked or "")), LONGEST_PAUSE_SECONDS)
    except ValueError:
        return min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS)


# ---- scores ----


def answerer(endpoint: Endpoint, item_set: ItemSet) -> scores.Answerer:
    """How an endpoint answers the items of this set; see ``scores.answerer``."""
    chatting_code = item_set.kind == "code" and item_set.mode == "chat"
    stop = () if chatting_code else item_set.stop

    def answer(item: Item, sampling: Sampling) -> Completion:
        if item_set.mode == "chat":
            prompt = item.asked(item_set.instruction)
            return endpoint.chat(prompt, item_set.max_tokens, sampling, stop)
        return endpoint.complete(item.prompt, item_set.max_tokens, sampling, stop)

    return answer


def run_conditions(endpoint: Endpoint, item_set: ItemSet, sampling: Sampling = GREEDY) -> dict[str, Any]:
    """As ``scores.run_conditions``; the template is the server's, as far as it shows it."""
    template = endpoint.facts.chat_template
    known = hashlib.sha256(template.encode()).hexdigest() if template else "the server's"
    return {
        **item_set.identity(),
        "mode": item_set.mode,
        "chat_template_sha256": known if item_set.mode == "chat" else "none",
        "sampling": dataclasses.asdict(sampling),
        "scoring": __version__,
        **endpoint.conditions(),
    }


def check_context(endpoint: Endpoint, item_set: ItemSet) -> int:
    """The context in tokens that the longest items need at least; 0 where the server does not say its context
    or shows no tokenizer. A server that lacks the room may cut answers off without a word.

    Raises:
        ContextOverflowError: it is more than the server has.
    """
    tokens = tokenizer(endpoint) if endpoint.facts.n_ctx else None
    if tokens is None:
        return 0
    chat = item_set.mode == "chat"
    before, after = (_shown_around(endpoint) or ("", "")) if chat else ("", "")
    texts = [
        before + (item.asked(item_set.instruction) if chat else item.prompt) + after
        for item in item_set.items
    ]
    longest = sorted(texts, key=len)[-COUNTED_ITEMS:]
    needed = max(len(tokens(text)) for text in longest) + item_set.max_tokens
    if needed > endpoint.facts.n_ctx:
        raise ContextOverflowError(
            f"the set {item_set.name} needs {needed:,} tokens of context, and the server has "
            f"{endpoint.facts.n_ctx:,}",
            where=endpoint.base_url,
            hint="start the server with a larger context for each request",
        )
    return needed


def score_set(
    endpoint: Endpoint,
    item_set: ItemSet,
    folder: str | Path,
    *,
    model_id: str = "",
    sampling: Sampling = GREEDY,
    allow_unsandboxed: bool = False,
    **options: Any,
) -> scores.SetRun:
    """``scores.score_set`` over an endpoint: what is answered stays, whatever fails later.

    Args:
        model_id: the model's SHA-256, where it is known; else ``Endpoint.identity``.
        options: of ``scores.collect``: ``n_samples``, ``ks``, ``limit``, ``fresh``, ``progress``.

    Raises:
        SandboxError: the set is code and there is no sandbox; nothing has been asked yet.
        ContextOverflowError: an item does not fit into the server's context; see ``check_context``.
        EndpointError: the server failed at an item for good; a second call goes on from there.
    """
    if item_set.kind == "code":
        check_allowed(find_sandbox(), allow_unsandboxed)
    check_context(endpoint, item_set)
    conditions = run_conditions(endpoint, item_set, sampling)
    return scores.collect(
        answerer(endpoint, item_set),
        item_set,
        folder,
        conditions,
        sampling=sampling,
        model_id=model_id or endpoint.identity,
        n_parallel=endpoint.concurrency,
        **options,
    )


# ---- tokens of a server ----


def tokenizer(endpoint: Endpoint) -> Callable[[str], list[int]] | None:
    """Token ids of a text as the server sees them, control tokens included, without a BOS; None where it
    shows none. llama.cpp, llama-cpp-python and vLLM do.

    The function raises ``BusyError`` where the server stops counting: a length is never guessed in silence.
    """
    forms: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
        "llama.cpp": (
            "/tokenize",
            lambda text: {"content": text, "add_special": False, "parse_special": True},
        ),
        "llama-cpp-python": ("/extras/tokenize", lambda text: {"input": text}),
        "vLLM": (
            "/tokenize",
            lambda text: {"model": endpoint.model, "prompt": text, "add_special_tokens": False},
        ),
    }
    if endpoint.facts.name not in forms:
        return None
    path, form = forms[endpoint.facts.name]
    start = _token_ids(endpoint.post(path, **form("")))  # llama-cpp-python puts a BOS in front
    if start is None:
        return None

    def tokens(text: str) -> list[int]:
        found = _token_ids(endpoint.post(path, **form(text)))
        if found is None:
            raise BusyError(
                "the server counted tokens and stopped doing so",
                where=endpoint.base_url,
                hint="read the server's log; the same call goes on from there",
            )
        return found[len(start) :]

    return tokens


def _token_ids(answer: Any) -> list[int] | None:
    return [int(one) for one in answer["tokens"]] if isinstance(answer, dict) and "tokens" in answer else None


def token_counter(endpoint: Endpoint) -> tuple[Callable[[str], int], str]:
    """How to count a text's tokens, and by what: the server's tokenizer, else its usual characters a token.

    Raises:
        EndpointError: the server has to be asked, and fails.
    """
    found = tokenizer(endpoint)
    if found is not None:
        return lambda text: len(found(text)), "the server's tokens"
    sample = "The red key is kept in the old box. " * 8
    n_tokens = endpoint.complete(sample, 1).n_prompt or len(sample) // 4
    return lambda text: max(1, round(len(text) * n_tokens / len(sample))), "estimated tokens"


# ---- long context ----


class _Texts:
    """Texts in place of tokens: as many numbers as tokens, of which the first stands for the whole text.

    ``needles`` joins and cuts between texts only, so a haystack can be spelled out again.
    """

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count, self._texts = lru_cache(maxsize=8192)(count), [""]
        self._ids: dict[str, int] = {}

    def __call__(self, text: str, special: bool = True) -> tuple[int, ...]:
        if not text:
            return ()
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return (self._ids[text], *[0] * (self._count(text) - 1))

    def spelled(self, tokens: Sequence[int]) -> str:
        """The text of these tokens."""
        return "".join(self._texts[token] for token in tokens)


@dataclass(frozen=True)
class _Room:
    n_ctx: int


class Remote:
    """An endpoint in the place of a model, for ``long_context``: it frames, holds and asks in text."""

    def __init__(self, endpoint: Endpoint, around: tuple[str, str] | None = None) -> None:
        count, self.counted_by = token_counter(endpoint)
        self.endpoint, self.texts = endpoint, _Texts(count)
        self.around = around or _shown_around(endpoint) or ("", "\nAnswer:")
        self.settings = _Room(endpoint.facts.n_ctx or 2**31)
        self._body: tuple[int, ...] = ()

    def frame(self, prompts: PromptSet) -> Frame:
        """The frame of ``needles`` around this server's chat template (or plain text)."""
        before, after = self.around
        return Frame((*self.texts(before), *self.texts(prompts["intro"])), after, self.texts)

    def conditions(self) -> dict[str, Any]:
        """Those of the endpoint, and how lengths are counted."""
        return {**self.endpoint.conditions(), "lengths": self.counted_by, "around": list(self.around)}

    def clear(self) -> None:
        """Nothing: the server is told not to use its cache, or clears it itself."""

    def hold(self, body: tuple[int, ...]) -> int:
        """Remember the haystack; it is sent with each question."""
        self._body = body
        return 0

    def ask(self, question: Question) -> long_context.Answer:
        """The greedy answer to a question about the haystack that is held."""
        started = time.perf_counter()
        text = self.texts.spelled([*self._body, *question.prompt])
        reply = self.endpoint.complete(text, question.max_tokens)
        said = reply.text.strip()
        right = said == question.expected or (not question.whole and said.startswith(question.expected))
        n_evaluated = (reply.n_prompt or len(self._body) + len(question.prompt)) + reply.n_tokens
        return long_context.Answer(said, right, n_evaluated, time.perf_counter() - started)


def _shown_around(endpoint: Endpoint) -> tuple[str, str] | None:
    """What the server's chat template puts before and after a message; None where it does not show that."""
    shown = endpoint.post("/apply-template", messages=[{"role": "user", "content": MARK}])
    if isinstance(shown, dict) and MARK in shown.get("prompt", ""):
        before, _, after = shown["prompt"].partition(MARK)
        return before, after
    return None


def measure_long_context(
    endpoint: Endpoint,
    folder: str | Path,
    *,
    prompt_set: str = "long-context-nano",
    longest: int = 1024,
    shortest: int | None = None,
    n_haystacks: int = 4,
    around: tuple[str, str] | None = None,
    model_id: str = "",
    fresh: bool = False,
) -> long_context.Run:
    """Notebook 05's retrieval at growing lengths, asked in text through ``/v1/completions``.

    Lengths are the server's tokens where it shows its tokenizer, else an estimate (``conditions`` say
    which). A length that the server has no room for ends the curve as a failure of the runtime.

    Args:
        longest, shortest: see ``long_context.make_plan``.
        around: text before and after a chat's message, where the server does not show its template.

    Raises:
        PromptError: the shortest length cannot hold the needles.
        EndpointError: the server failed for good; a second call goes on from there.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    remote = Remote(endpoint, around)
    frame = remote.frame(load_prompts(prompt_set))
    plan = long_context.make_plan(
        remote,
        prompt_set,
        longest,
        shortest=shortest,
        n_haystacks=n_haystacks,
        rounds=0,
        grown=False,
        frame=frame,
    )
    return long_context.measure(
        remote,
        plan,
        folder,
        model_sha256=model_id or endpoint.identity,
        fresh=fresh,
        frame=frame,
        asker=remote,
    )


# ---- speed ----

TIMED_PROMPT = "The red key is kept in the old box. The blue key is kept in the new box. "


def speed_by_clients(
    endpoint: Endpoint,
    clients: Sequence[int] = CLIENTS,
    n_tokens: int = 64,
    repetitions: int = 3,
    prompt: str = TIMED_PROMPT * 2,
) -> pd.DataFrame:
    """Speed under several clients at once, each sending one request after another, after a warm-up.

    One row a number of clients: ``clients``, ``requests``, ``tokens`` (of all answers), ``seconds``,
    ``tokens_per_sec`` (of all clients together), ``first_median``, ``first_max`` (seconds to the first
    piece), ``decode_median`` (tokens a second of one client, after its first piece; NaN where every answer
    came whole), ``counted_by``.

    Raises:
        EndpointError: a request failed for good.
    """
    import pandas as pd

    options = _of_full_length(endpoint, n_tokens)
    endpoint = dataclasses.replace(endpoint, stream=True)

    def ask_one(number: int) -> Reply:
        return endpoint.complete(f"{prompt}The key {number}", n_tokens, **options)

    ask_one(0)
    rows = []
    for n in clients:
        with ThreadPoolExecutor(n) as pool:
            started = time.perf_counter()
            replies = list(pool.map(ask_one, range(n * repetitions)))
            seconds = time.perf_counter() - started
        rows.append({"clients": n, **_speed_row(replies, seconds)})
    return pd.DataFrame(rows)


def _of_full_length(endpoint: Endpoint, n_tokens: int) -> dict[str, Any]:
    """Options that keep an answer from ending early; a server that is not known gets none."""
    if endpoint.facts.name in ("llama.cpp", "vLLM"):
        return {"ignore_eos": True}
    return {"min_tokens": n_tokens} if endpoint.facts.name == "llama-cpp-python" else {}


def _speed_row(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    tokens = sum(reply.n_tokens for reply in replies)
    first = [reply.first_seconds for reply in replies]
    decode = [
        reply.decode_tokens_per_sec
        for reply in replies
        if reply.first_seconds == reply.first_seconds and reply.n_decoded and reply.decode_seconds
    ]
    return {
        "requests": len(replies),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_sec": tokens / seconds,
        "first_median": median(first),
        "first_max": max(first),
        "decode_median": median(decode) if decode else float("nan"),
        "counted_by": replies[0].counted_by,
    }
