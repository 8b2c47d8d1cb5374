"""Send the workbook's requests to any server with an OpenAI-compatible API.

Greedy by default, one request at a time: parallel requests share batches, and batches change numbers. A
failure of the connection or the server is retried and then an error; it is never an answer.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import BaseModel, FiniteFloat, SecretStr, TypeAdapter, ValidationError

from dfqs_nb.llama.generate import GREEDY, Completion, Sampling
from dfqs_nb.serve import wire as errors
from dfqs_nb.serve.wire import (
    EndpointError,
    FieldError,
    KeyRefusedError,
    UnknownModelError,
    UnreachableError,
    Wire,
)

Kind = TypeVar("Kind")
NAN = float("nan")
TIMEOUT_SECONDS = 600.0  # between two pieces of an answer, the first one included
LISTING_SECONDS = 20.0  # for the whole list of models
RETRIES = 4
FINAL = ("content_filter", "tool_calls", "function_call")  # ends of an answer: asking again changes nothing
TOKENS_PER_TIMEOUT = 60  # an answer may take a timeout more for as many tokens: 10 s a token by default
ANSWER_BYTES, BYTES_PER_TOKEN = 1 << 20, 4096  # events of a stream repeat the model's name with each token
BYTES_PER_GUESS = 400  # of JSON, for a token among the likeliest

# What a server would add by itself, switched off: llama-cpp-python's server penalises repetition by 1.1
# unless told otherwise, llama.cpp's reuses the last prompt's cache, which can change the text
# (ggml-org/llama.cpp#22224), and takes a reasoning out of the text, of which nothing is left where the
# tokens ended before the answer. Unknown servers get nothing that they might refuse.
PLAIN: dict[str, dict[str, Any]] = {
    "llama.cpp": {"repeat_penalty": 1.0, "cache_prompt": False, "reasoning_format": "none"},
    "llama-cpp-python": {"repeat_penalty": 1.0},
    "vLLM": {"repetition_penalty": 1.0},
}


def pick(page: Any, path: str, kind: type[Kind]) -> Kind | None:
    """The value at a path of a JSON page, if it is of this kind.

    >>> pick({"info": {"version": "1"}}, "info.version", str), pick([], "info.version", str)
    ('1', None)
    """
    for name in path.split("."):
        page = page.get(name) if isinstance(page, dict) else None
    return page if isinstance(page, kind) else None


def field_of(part: Any, name: str, kind: type[Kind]) -> Kind | None:
    """A field of an answer; None where it has none, a `FieldError` where it has another type."""
    if not isinstance(part, dict | None):
        raise FieldError(f"a {type(part).__name__} in place of an object")
    value = (part or {}).get(name)
    if not isinstance(value, kind | None):
        raise FieldError(f"its {name} is no {kind.__name__}")
    return value


@dataclass(frozen=True)
class ServerFacts:
    """What a server reports about itself; None or empty where it reports nothing."""

    name: str = "unknown"  # or llama.cpp, llama-cpp-python, Ollama, vLLM
    version: str = ""
    n_ctx: int | None = None  # of one request
    n_slots: int | None = None  # requests that it works on at once
    chat_template: str = field(default="", repr=False)
    models: tuple[str, ...] = ()
    weights: str = ""  # their bytes, number and type


def _facts(wire: Wire, listed: Mapping[str, Any]) -> ServerFacts:
    """Name and version, from paths that only this kind of server has."""
    props = wire.optional("/props")
    if pick(props, "default_generation_settings", dict):
        n_ctx, n_slots = (pick(props, p, int) for p in ("default_generation_settings.n_ctx", "total_slots"))
        version, template = (pick(props, path, str) or "" for path in ("build_info", "chat_template"))
        return ServerFacts("llama.cpp", version, n_ctx, n_slots, template)
    for path, name in (("/api/version", "Ollama"), ("/version", "vLLM")):
        if version := pick(wire.optional(path), "version", str) or "":
            return ServerFacts(name, version)
    described = wire.optional("/openapi.json")
    if "llama.cpp Python" in (pick(described, "info.title", str) or ""):
        return ServerFacts("llama-cpp-python", pick(described, "info.version", str) or "", n_slots=1)
    owner, *others = {pick(entry, "owned_by", str) for entry in listed.values()} or {None}
    return ServerFacts(owner if owner and not others else "unknown")


@dataclass(frozen=True)
class Reply(Completion):
    """A completion over a server."""

    usage_tokens: int = 0  # of the answer, counted by the server, else by its pieces
    first_seconds: float = NAN  # to the first piece, also of a reasoning kept apart; NaN where it came whole

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return self.usage_tokens


@dataclass(frozen=True)
class Endpoint:
    """A server, and how to ask it. See `connect`."""

    wire: Wire
    model: str
    facts: ServerFacts
    retries: int = RETRIES
    concurrency: int = 1
    stream: bool = True
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def base_url(self) -> str:
        """The address, with ``/v1``, as it may be shown."""
        return self.wire.url

    @property
    def identity(self) -> str:
        """The name under which answers are kept where the model's SHA-256 is unknown."""
        return " ".join(filter(None, (f"{self.facts.name}:{self.model}", self.facts.weights)))

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on, as far as the server reports it; neither address nor key."""
        facts, name = self.facts, "" if self.facts.name in self.facts.version else self.facts.name
        known = {"runtime": f"{name} {facts.version}".strip(), "endpoint": True, "endpoint_model": self.model}
        known |= {"n_ctx": facts.n_ctx, "n_slots": facts.n_slots, "concurrency": self.concurrency}
        renamed = {"request_fields": dict(self.fields)} if self.fields else {}
        return known | {"request_options": dict(self.options)} | renamed

    def chat(self, prompt: str, max_tokens: int = 256, **options: Any) -> Reply:
        """The answer to a chat in the server's template; see `ask`."""
        return self.ask({"messages": [{"role": "user", "content": prompt}]}, max_tokens, **options)

    def complete(self, text: str, max_tokens: int = 256, **options: Any) -> Reply:
        """The continuation of plain text, without a template; see `ask`."""
        return self.ask({"prompt": text}, max_tokens, **options)

    def post(self, path: str, **body: Any) -> Any:
        """The JSON that a path returns for this JSON; None if the server has no such path."""
        return self.wire.optional(path, body)

    def ask(
        self,
        prompt: Mapping[str, Any],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        **options: Any,
    ) -> Reply:
        """One answer to ``messages`` or a ``prompt``, retried after 429, 5xx or a lost or broken answer.

        ``options`` are further fields of the request. The class of an `EndpointError` says what failed.
        """
        request = {"model": self.model, **prompt, "max_tokens": max_tokens}
        request |= {"temperature": sampling.temperature, "seed": sampling.seed}
        request |= {"top_p": sampling.top_p} if sampling.temperature > 0 else {}
        request |= {"stop": list(stop)} if stop else {}
        request |= {**self.options, **options}
        seconds = self.wire.timeout_seconds * (2 + max_tokens / TOKENS_PER_TIMEOUT)
        limits = (seconds, ANSWER_BYTES + BYTES_PER_TOKEN * max_tokens)

        def reply(broke: bool) -> Reply:
            # after a broken stream whole: some servers say only then what is wrong
            return self._reply(request, self.stream and not broke)

        return self.wire.ask(reply, retries=self.retries, limits=limits)

    def _reply(self, request: Mapping[str, Any], stream: bool) -> Reply:
        """The pieces of an answer (one, where it comes whole), put together."""
        url, chat = self.base_url, "messages" in request
        extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        named = {self.fields.get(name, name): value for name, value in {**request, **extra}.items()}
        body = {name: value for name, value in named.items() if name}
        started, first, n_pieces = time.perf_counter(), NAN, 0
        text, reason, usage = "", None, dict[str, Any]()
        path = f"{url}/chat/completions" if chat else f"{url}/completions"
        for event in self.wire.events(path, body, stream=stream):
            usage = field_of(event, "usage", dict) or usage
            for choice in (field_of(event, "choices", list) or [])[:1]:
                part = field_of(choice, "delta", dict) or field_of(choice, "message", dict)
                if not stream and chat and part is None:
                    raise errors.broken("it holds no message", url)
                new = field_of(choice, "text", str) or field_of(part, "content", str) or ""
                # a reasoning kept apart by the server has tokens, but no text
                kept_apart = [field_of(part, name, str) for name in ("reasoning_content", "reasoning")]
                if stream and any([new, *kept_apart]):
                    first = time.perf_counter() - started if n_pieces == 0 else first
                    n_pieces += 1
                text, reason = text + new, field_of(choice, "finish_reason", str) or reason
        if reason in FINAL:
            hint = "switch filters and tools off at the server, or take another server"
            raise EndpointError(f"the server ended the answer for {reason!r}", where=url, hint=hint)
        if reason not in ("stop", "length"):
            ended = f"it ended after {len(text):,} characters without saying why"
            raise errors.broken(ended if reason is None else f"the server ended it for {reason!r}", url)
        if reason == "stop" and not request.get("stop"):
            reason = "eos"  # one word for both in the protocol
        counted = field_of(usage, "completion_tokens", int)
        n_tokens = n_pieces if counted is None else counted
        n_prompt = field_of(usage, "prompt_tokens", int) or 0
        return Reply(self.wire.hide(text), (), reason, n_prompt, n_tokens, first)


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
    """Ask a server for its models and its version; return the endpoint for all further requests.

    Args:
        base_url: with or without ``/v1`` at its end; a query (``?api_key=``) is sent and never shown.
        model: one that the server lists; may be left out where it lists just one.
        key, key_variable: the key, or the environment variable that holds it; never shown or written.
        timeout_seconds: the longest wait for a piece of an answer; a whole one may take more.
        concurrency: requests at once in ``score_set``; more than 1 can change answers.
        stream: in pieces. By default not for llama-cpp-python's server: its streams count no tokens, and end
            without a word where the context is full.
        version: of the server, where it is known better than the server reports.
        fields: the server's names of a request's fields; "" leaves one out: ``{"seed": ""}``.

    Raises:
        EndpointError: its class says whether the address, the key, the model or a busy server is the cause.
    """
    wire = _wire(base_url, key or os.environ.get(key_variable, ""), key_variable, timeout_seconds)
    listed = _listed(wire, retries)
    has = f"it has {', '.join(list(listed)[:8]) or 'none'}{' and more' if len(listed) > 8 else ''}"
    if model and listed and model not in listed:  # a server that lists none may have it nevertheless
        raise UnknownModelError(f"no model is called {model!r} there", where=wire.url, hint=has)
    if not model and len(listed) != 1:
        raise UnknownModelError("name the model to ask", where=wire.url, hint=has)
    model = model or next(iter(listed))
    facts, entry = _facts(wire, listed), listed.get(model)
    weights = [pick(entry, f"meta.{name}", object) for name in ("size", "n_params", "ftype")]
    facts = replace(
        facts,
        n_ctx=facts.n_ctx or pick(entry, "max_model_len", int) or pick(entry, "meta.n_ctx", int),
        models=tuple(listed),
        weights=" ".join(str(value) for value in weights if value),
        version=version or facts.version,
    )
    wire = replace(wire, timeout_seconds=timeout_seconds, models=facts.models)
    stream = facts.name != "llama-cpp-python" if stream is None else stream
    plain = PLAIN.get(facts.name, {})
    return Endpoint(wire, model, facts, retries, concurrency, stream, plain, dict(fields or {}))


def _wire(base_url: str, key: str, key_variable: str, timeout_seconds: float) -> Wire:
    """The connection to an address, with the time limit for its list of models."""
    if key_variable and not key:
        hint = f"export {key_variable} with the key, or leave the variable out"
        raise KeyRefusedError(f"the environment variable {key_variable} is not set", hint=hint)
    url, query = _address(base_url)
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        hint = f"export {key_variable or 'a variable'} with the key alone"
        raise KeyRefusedError("the key has characters that no key has", where=url, hint=hint)
    return Wire(url, SecretStr(key), SecretStr(query), min(timeout_seconds, LISTING_SECONDS))


def _listed(wire: Wire, retries: int) -> dict[str, Any]:
    """The server's models by name."""
    page = wire.ask(lambda broke: wire.hidden(next(wire.events(f"{wire.url}/models"))), retries=retries)
    if not isinstance(page, dict) or "data" not in page:
        hint = "check port and path: the address ends in /v1 as a rule"
        what = "something answers there, but it does not list models"
        raise UnreachableError(what, where=wire.url, hint=hint)
    entries = pick(page, "data", list) or []
    return {name: entry for entry in entries if (name := pick(entry, "id", str)) is not None}


def is_url(text: object) -> bool:
    """Whether this names an endpoint and not a file.

    >>> is_url("http://127.0.0.1:8080/v1"), is_url("model.gguf")
    (True, False)
    """
    return str(text).lower().startswith(("http://", "https://"))


def check_in_process(target: object, what: str) -> None:
    """Refuse an endpoint, or its address, where only a model in this process will do: an `EndpointError`."""
    if isinstance(target, Endpoint) or is_url(target):
        where = target.base_url if isinstance(target, Endpoint) else errors.shown_url(str(target))
        hint = "give the GGUF file: it is read inside the runtime, in this process"
        raise EndpointError(f"{what} cannot be seen through an endpoint", where=where, hint=hint)


def _address(url: str) -> tuple[str, str]:
    """The address of the protocol's root, and its query.

    >>> _address("HTTP://localhost:8080/"), _address("https://a.org/api/v1?key=1")
    (('http://localhost:8080/v1', ''), ('https://a.org/api/v1', 'key=1'))
    """
    known = re.fullmatch(r"(https?)://[^/\s@?#;]+(/[^\s@?#;]*)?(\?[^\s#]*)?", url, re.IGNORECASE)
    try:
        parts = urlsplit(url if known else "")
        (parts.hostname or "").encode("idna"), parts.port  # they raise for what is none
    except ValueError:
        known = None
    if known is None:
        hint = "give one like http://127.0.0.1:8080/v1; a key goes into a variable"
        raise UnreachableError("not an address", where=errors.shown_url(url), hint=hint)
    path, _, query = (known[1].lower() + url[known.end(1) :]).partition("?")
    path = path.rstrip("/")
    return path if re.search(r"/v\d+\w*$", path) else path + "/v1", query


# ---- what a server predicts at each token of its answer ----


class Guess(BaseModel):
    """A token in the protocol's words; ``bytes`` is missing where a server does not tell them."""

    token: str = ""
    logprob: FiniteFloat  # NaN and infinity are no JSON: no record could be read again
    bytes: list[Annotated[int, Ge(0), Le(255)]] | None = None
    top_logprobs: list[Guess] = []

    def pair(self) -> tuple[str, float]:
        """Its bytes in hex, and its log-probability."""
        raw = self.token.encode("utf-8", "replace") if self.bytes is None else bytes(self.bytes)
        return raw.hex(), min(self.logprob, 0.0)


def continuation(
    endpoint: Endpoint, asked: str, chat: bool, n_tokens: int, top_k: int
) -> list[dict[str, Any]]:
    """A server's greedy answer, token by token: ``token`` (bytes in hex), ``logprob``, ``top`` (best first).

    An `EndpointError`: it gives no log-probabilities, or those of another text than its answer.
    """
    wire = endpoint.wire
    body: dict[str, Any] = {"model": endpoint.model, "max_tokens": n_tokens, "temperature": 0}
    if chat:
        body |= {"messages": [{"role": "user", "content": asked}], "logprobs": True, "top_logprobs": top_k}
    else:
        body |= {"prompt": asked, "logprobs": top_k}
    url, body = f"{wire.url}/{'chat/' if chat else ''}completions", {**body, **endpoint.options}
    limits = (wire.timeout_seconds, ANSWER_BYTES + BYTES_PER_GUESS * n_tokens * (top_k + 1))
    page = wire.ask(lambda broke: next(wire.events(url, body)), retries=endpoint.retries, limits=limits)
    choice = next(iter(pick(page, "choices", list) or [None]))
    try:
        guesses = TypeAdapter(list[Guess]).validate_python(pick(choice, "logprobs.content", object) or [])
    except ValidationError as error:
        what = f"its log-probabilities cannot be read ({error.errors()[0]['msg']})"
        raise EndpointError(what, where=wire.url, hint="take another server, or a GGUF file") from None
    text = pick(choice, "message.content", str) or pick(choice, "text", str) or ""
    if text and not guesses:
        hint = "take a server that gives `logprobs`, such as llama.cpp's own, or a GGUF file"
        raise EndpointError("it gives no log-probabilities", where=wire.url, hint=hint)
    steps: list[dict[str, Any]] = []
    for token, value, others in ((*guess.pair(), guess.top_logprobs) for guess in guesses):
        top = sorted((other.pair() for other in others), key=lambda pair: -pair[1])
        steps.append({"token": token, "logprob": value, "top": top or [(token, value)]})
    while steps and steps[-1]["token"] == "":
        steps.pop()  # the token that ends an answer has no text
    if (
        bytes.fromhex("".join(step["token"] for step in steps)).strip()
        != text.encode("utf-8", "replace").strip()
    ):
        hint = "switch off what changes the text: a reasoning kept apart, a filter, a tool parser"
        raise EndpointError("its log-probabilities belong to another text", where=wire.url, hint=hint)
    return steps
