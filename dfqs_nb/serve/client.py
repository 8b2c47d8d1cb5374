"""Ask any server that speaks OpenAI's protocol what the workbook asks a model in this process.

Greedy by default, one request at a time: parallel requests share batches, and batches change numbers. What
a server does on its own (a repeat penalty, a prompt cache) is switched off where the server is known to have
it. A failure of the connection or the server is tried again and then an error; it is never an answer.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dfqs_nb.llama.generate import GREEDY, Completion, Sampling
from dfqs_nb.serve.errors import (
    Broken,
    EndpointError,
    KeyRefusedError,
    Refused,
    UnknownModelError,
    UnreachableError,
    is_broken,
)
from dfqs_nb.serve.facts import (
    PROBE_RETRIES,
    Answer,
    Listed,
    Models,
    Part,
    ServerFacts,
    facts_of,
    read,
    root_of,
)
from dfqs_nb.serve.wire import Limits, Secret, Wire, optional, shown_url

TIMEOUT_SECONDS = 600.0  # between two pieces of an answer, the first one included
LISTING_SECONDS = 20.0  # for the whole list of models
RETRIES = 4
FINAL = ("content_filter", "tool_calls", "function_call")  # ends of an answer: asking again changes nothing
TOKENS_PER_TIMEOUT = 60  # an answer may take a timeout more for as many tokens: 10 s a token by default
ANSWER_BYTES, BYTES_PER_TOKEN = 1 << 20, 4096  # events of a stream repeat the model's name with each token

# What a server would add by itself, switched off: llama-cpp-python's server penalises repetition by 1.1
# unless told otherwise, llama.cpp's reuses the last prompt's cache, which can change the text
# (ggml-org/llama.cpp#22224), and takes a reasoning out of the text, of which nothing is left where the
# tokens ended before the answer. Servers that are not known get nothing they might refuse.
PLAIN: dict[str, dict[str, Any]] = {
    "llama.cpp": {"repeat_penalty": 1.0, "cache_prompt": False, "reasoning_format": "none"},
    "llama-cpp-python": {"repeat_penalty": 1.0},
    "vLLM": {"repetition_penalty": 1.0},
}


@dataclass(frozen=True)
class Reply(Completion):
    """A completion whose tokens were counted by the server (or, where it counts none, by its pieces).

    Attributes:
        usage_tokens: tokens of the answer; ``counted_by`` tells by whom: ``server`` or ``pieces``.
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
    """A server that was asked for its models, and how it is asked from then on. See `connect`."""

    base_url: str
    model: str
    facts: ServerFacts
    key: Secret = field(default_factory=Secret)
    query: Secret = field(default_factory=Secret)
    timeout_seconds: float = TIMEOUT_SECONDS
    retries: int = RETRIES
    concurrency: int = 1
    stream: bool = True
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)

    @cached_property
    def wire(self) -> Wire:
        """The connection."""
        return Wire(self.base_url, self.key, self.query, self.timeout_seconds)

    @property
    def identity(self) -> str:
        """What answers are kept under without the model's SHA-256: another file may be served by its name."""
        return " ".join(filter(None, (f"{self.facts.name}:{self.model}", self.facts.weights)))

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on, as far as the server reports it; neither address nor key."""
        facts, name = self.facts, "" if self.facts.name in self.facts.version else self.facts.name
        return {
            "runtime": f"{name} {facts.version}".strip(),
            "endpoint": True,
            "endpoint_model": self.model,
            "n_ctx": facts.n_ctx,
            "n_slots": facts.n_slots,
            "concurrency": self.concurrency,
            "request_options": dict(self.options),
            **({"request_fields": dict(self.fields)} if self.fields else {}),
        }

    def chat(
        self,
        prompt: str | Sequence[dict[str, str]],
        max_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Reply:
        """The answer to a chat in the server's template; errors as `ask`."""
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
        """The continuation of plain text, without a template; errors as `ask`."""
        return ask(self, {"prompt": text}, max_tokens, sampling, stop, **options)

    def get(self, path: str) -> Any:
        """The JSON at a path of the server (``/props``); None where it has no such path.

        Raises:
            BusyError: it answered 429 or 503 every time.
        """
        return optional(self.wire, "get", root_of(self.base_url) + path, PROBE_RETRIES)

    def post(self, path: str, **body: Any) -> Any:
        """What the server answers to JSON sent to a path; None and errors as `get`."""
        return optional(self.wire, "post", root_of(self.base_url) + path, PROBE_RETRIES, body)


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
    fields: Mapping[str, str] | None = None,
) -> Endpoint:
    """Ask a server for its models and what it is, and return how to ask it from then on.

    Args:
        base_url: with or without the ``/v1`` at its end; a query (``?api_key=``) is sent and never shown.
        model: one that the server lists; may be left out where it lists just one.
        key: the key itself, for what never leaves this process; it is shown and written nowhere.
        key_variable: the environment variable that holds the key.
        timeout_seconds: the longest wait for a piece of an answer. A whole answer may take twice that, and
            as long again for every 60 tokens.
        retries: of a request that met 429, 5xx, a broken connection or a broken answer.
        concurrency: requests at once in ``score_set``; more than 1 can change answers.
        stream: have answers in pieces as they are made. By default all servers but llama-cpp-python's are
            asked for that: its streams count no tokens, and end without a word where the context is full.
        version: of the server, where it is known better than the server reports.
        fields: new names of the request's fields, for a server that knows others; an empty name leaves the
            field out: ``{"max_tokens": "max_completion_tokens", "seed": ""}``.

    Raises:
        UnreachableError: nothing there speaks the protocol.
        KeyRefusedError: the key is wrong, or the variable is not set.
        UnknownModelError: the server lists other models; the message names them.
        BusyError: it is busy, or still loads its model.
    """
    url, query = _address(base_url)
    secret = _secret(key, key_variable)
    wire = Wire(url, secret, Secret(query), min(timeout_seconds, LISTING_SECONDS))
    listed = _listed(wire, retries)
    chosen = _chosen(model, [item.id for item in listed], wire)
    facts = facts_of(wire, listed, chosen)
    facts = dataclasses.replace(facts, version=version or facts.version)
    return Endpoint(
        url,
        chosen,
        facts,
        secret,
        Secret(query),
        timeout_seconds,
        retries,
        concurrency,
        facts.name != "llama-cpp-python" if stream is None else stream,
        PLAIN.get(facts.name, {}),
        dict(fields or {}),
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
        where = target.base_url if isinstance(target, Endpoint) else shown_url(str(target))
        hint = "give the GGUF file: it is read inside the runtime, in this process"
        raise EndpointError(f"{what} cannot be seen through an endpoint", where=where, hint=hint)


def _secret(key: str, key_variable: str) -> Secret:
    if key_variable and not key and not os.environ.get(key_variable):
        hint = f"export {key_variable} with the key, or leave the variable out"
        raise KeyRefusedError(f"the environment variable {key_variable} is not set", hint=hint)
    return Secret(key or os.environ.get(key_variable, ""))


def _address(url: str) -> tuple[str, str]:
    """The address of the protocol's root, and its query.

    >>> _address("http://localhost:8080/"), _address("https://a.org/api/v1?key=1")
    (('http://localhost:8080/v1', ''), ('https://a.org/api/v1', 'key=1'))
    """
    if not re.fullmatch(r"https?://[^/\s@?#]+(/[^\s@?#]*)?(\?[^\s#]*)?", url):
        hint = "give one like http://127.0.0.1:8080/v1; a key goes into a variable"
        raise UnreachableError("not an address", where=shown_url(url), hint=hint)
    path, _, query = url.partition("?")
    path = path.rstrip("/")
    return path if re.search(r"/v\d+\w*$", path) else path + "/v1", query


def _listed(wire: Wire, retries: int) -> list[Listed]:
    """What the server lists."""
    limits = Limits(wire.timeout_seconds)
    answer = wire.ask(
        lambda _: wire.client.get(f"{wire.url}/models", cast_to=object), retries=retries, limits=limits
    )
    models = read(Models, wire.hidden(answer))
    if models is None:
        what = "something answers there, but it does not list models"
        hint = "check port and path: the address ends in /v1 as a rule"
        raise UnreachableError(what, where=wire.url, hint=hint)
    return models.data or []


def _chosen(model: str, models: Sequence[str], wire: Wire) -> str:
    has = f"it has {', '.join(models[:8]) or 'none'}{' and more' if len(models) > 8 else ''}"
    if model and models and model not in models:
        raise UnknownModelError(f"no model is called {model!r} there", where=wire.url, hint=has)
    if not model and len(models) != 1:
        raise UnknownModelError("name the model to ask", where=wire.url, hint=has)
    return model or models[0]


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
        EndlessAnswerError: it passed the limits of time or bytes; not tried again.
        KeyRefusedError, UnknownModelError, EndpointError: the request is refused; not tried again.
        BusyError, UnreachableError, BrokenAnswerError: it failed every time.
    """
    body = _request(endpoint, prompt, max_tokens, sampling, stop, options)
    path = "/chat/completions" if "messages" in prompt else "/completions"
    streaming = endpoint.stream

    def request(attempt: int) -> Reply:
        nonlocal streaming
        try:
            return dataclasses.replace(_answered(endpoint, path, body, stop, streaming), attempts=attempt)
        except Exception as error:
            streaming = streaming and not is_broken(error)
            raise

    names = tuple(endpoint.fields.get(name, name) for name in (*body, "stream_options"))
    timeouts = 2 + max_tokens / TOKENS_PER_TIMEOUT
    return endpoint.wire.ask(
        request,
        retries=endpoint.retries,
        limits=Limits(endpoint.timeout_seconds * timeouts, ANSWER_BYTES + BYTES_PER_TOKEN * max_tokens),
        model=endpoint.model,
        models=endpoint.facts.models,
        fields=names,
    )


def _request(
    endpoint: Endpoint,
    prompt: Mapping[str, Any],
    max_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    request = {
        "model": endpoint.model,
        **prompt,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        **({"top_p": sampling.top_p} if sampling.temperature > 0 else {}),
        **({"stop": list(stop)} if stop else {}),
        **endpoint.options,
        **options,
    }
    return _renamed(request, endpoint.fields)


def _renamed(request: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """The request with the server's names of its fields; those with an empty name are left out.

    >>> _renamed({"seed": 1, "max_tokens": 2, "n": 3}, {"seed": "", "max_tokens": "max_completion_tokens"})
    {'max_completion_tokens': 2, 'n': 3}
    """
    named = {fields.get(name, name): value for name, value in request.items()}
    return {name: value for name, value in named.items() if name}


def _answered(
    endpoint: Endpoint, path: str, body: Mapping[str, Any], stop: Sequence[str], streaming: bool
) -> Reply:
    """The pieces of an answer (one, where it comes whole) as a `Reply`."""
    started, first, n_pieces = time.perf_counter(), float("nan"), 0
    text, reason, usage = "", None, None
    for piece in _pieces(endpoint, path, body, streaming):
        usage = piece.usage or usage
        for choice in (piece.choices or [])[:1]:
            if not streaming and "messages" in body and choice.message is None:
                raise Broken("it holds no message")
            part = choice.delta or choice.message or Part()
            new = choice.text or part.content
            if streaming and (new or part.reasoning_content or part.reasoning):
                first = time.perf_counter() - started if n_pieces == 0 else first
                n_pieces += 1
            text, reason = text + new, choice.finish_reason or reason
    seconds = time.perf_counter() - started
    if reason in FINAL:
        raise Refused(reason)
    if reason not in ("stop", "length"):
        ended = f"it ended after {len(text):,} characters without saying why"
        raise Broken(ended if reason is None else f"the server ended it for {reason!r}")
    counted = usage.completion_tokens if usage else None
    n_tokens = n_pieces if counted is None else counted
    to_first = first if first == first else seconds
    return Reply(
        endpoint.wire.hide(text),
        (),
        "length" if reason == "length" else "stop" if stop else "eos",  # one word in the protocol
        (usage and usage.prompt_tokens) or 0,
        to_first,
        max(0.0, seconds - to_first),
        max(0, n_tokens - 1),
        usage_tokens=n_tokens,
        counted_by="pieces" if counted is None else "server",
        first_seconds=first,
    )


def _pieces(endpoint: Endpoint, path: str, body: Mapping[str, Any], streaming: bool) -> Iterator[Answer]:
    import openai

    post = endpoint.wire.client.post
    if not streaming:
        yield Answer.model_validate(post(path, cast_to=object, body=dict(body)))
        return
    asked = _renamed({"stream": True, "stream_options": {"include_usage": True}}, endpoint.fields)
    options = {"cast_to": object, "stream": True, "stream_cls": openai.Stream[object]}
    with post(path, body={**body, **asked}, **options) as events:
        for event in events:
            yield Answer.model_validate(event)
