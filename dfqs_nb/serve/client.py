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
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, FiniteFloat, SecretStr, TypeAdapter

from dfqs_nb.llama.generate import GREEDY, Sampling
from dfqs_nb.serve.wire import ADDRESS_HINT, EndpointError, Wire, broken, shown_url

Kind = TypeVar("Kind")
NAN = float("nan")
TIMEOUT_SECONDS = 600.0  # between two pieces of an answer, the first one included
RETRIES = 4
TOKENS_PER_TIMEOUT = 60  # an answer may take a timeout more for as many tokens: 10 s a token by default

# What a server would add by itself, switched off: llama-cpp-python's server penalises repetition by 1.1
# unless told otherwise, llama.cpp's reuses the last prompt's cache, which can change the text
# (ggml-org/llama.cpp#22224), and takes a reasoning out of the text, of which nothing is left where the
# tokens ended before the answer. Unknown servers get nothing that they might refuse.
PLAIN: dict[str, dict[str, Any]] = {
    "llama.cpp": {"repeat_penalty": 1.0, "cache_prompt": False, "reasoning_format": "none"},
    "llama-cpp-python": {"repeat_penalty": 1.0},
    "vLLM": {"repetition_penalty": 1.0},
}


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
    finish_reason: str  # eos (the model ended it), stop (a stop text came) or length (no room for more)
    n_prompt: int  # tokens, counted by the server; 0: not told
    n_tokens: int  # of the answer, counted by the server, else by its pieces
    first_seconds: float = NAN  # to the first piece, also of a reasoning kept apart; NaN where it came whole
    guesses: Sequence[Any] = ()  # the log-probabilities of its tokens, as the server gives them


@dataclass(frozen=True)
class Endpoint(Wire):
    """A server, how to ask it, and what it reports about itself (None or empty: nothing). See `connect`."""

    model: str = ""
    retries: int = RETRIES
    concurrency: int = 1
    stream: bool = True
    fields: Mapping[str, str] = field(default_factory=dict, hash=False)
    server: str = "unknown"  # or llama.cpp, llama-cpp-python, Ollama, vLLM
    version: str = ""
    n_ctx: int | None = None  # of one request
    n_slots: int | None = None  # requests that it works on at once
    chat_template: str = field(default="", repr=False)
    models: tuple[str, ...] = ()
    weights: str = ""  # their bytes, number and type
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of each request

    @property
    def identity(self) -> str:
        """The name under which answers are kept where the model's SHA-256 is unknown."""
        return f"{self.server}:{self.model} {self.weights}".strip()

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on, as far as the server reports it; neither address nor key."""
        name = "" if self.server in self.version else self.server
        return {
            "runtime": f"{name} {self.version}".strip(),
            "endpoint": True,
            "endpoint_model": self.model,
            "n_ctx": self.n_ctx,
            "n_slots": self.n_slots,
            "concurrency": self.concurrency,
            "request_options": dict(self.options),
            "request_fields": dict(self.fields),
        }

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
        **options: Any,
    ) -> Reply:
        """One answer to ``messages`` or a ``prompt``, retried after 429, 5xx or a lost or broken answer.

        ``options`` are further fields of the request. Raises an `EndpointError`.
        """
        request = {"model": self.model, **prompt, "max_tokens": max_tokens}
        request |= {"temperature": sampling.temperature, "seed": sampling.seed}
        request |= {"top_p": sampling.top_p} if sampling.temperature > 0 else {}
        request |= {"stop": list(stop)} if stop else {}
        request |= {**self.options, **options}
        seconds = self.timeout_seconds * (2 + max_tokens / TOKENS_PER_TIMEOUT)

        def reply(broke: bool) -> Reply:
            # after a broken stream whole: some servers say only then what is wrong
            return self._reply(request, self.stream and not broke)

        return self.persist(reply, retries=self.retries, seconds=seconds)

    def _reply(self, request: Mapping[str, Any], stream: bool) -> Reply:
        """The pieces of an answer (one, where it comes whole), put together."""
        url, chat, get = self.url, "messages" in request, partial(pick, strict=True)
        path = f"{url}/chat/completions" if chat else f"{url}/completions"
        extra = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        named = {self.fields.get(name, name): value for name, value in {**request, **extra}.items()}
        body = {name: value for name, value in named.items() if name}
        started, first, reason, usage = time.perf_counter(), NAN, None, dict[str, Any]()
        pieces, guesses = list[str](), list[Any]()
        for event in self.events(path, body, stream=stream):
            usage = get(event, "usage", dict) or usage
            for choice in (get(event, "choices", list) or [])[:1]:
                part = get(choice, "delta", dict) or get(choice, "message", dict)
                if not stream and chat and part is None:
                    raise broken("it holds no message", url)
                new = get(choice, "text", str) or get(part, "content", str) or ""
                # a reasoning kept apart by the server has tokens, but no text
                kept_apart = [get(part, name, str) for name in ("reasoning_content", "reasoning")]
                if any([new, *kept_apart]):
                    first = time.perf_counter() - started if stream and not pieces else first
                    pieces.append(new)
                reason = get(choice, "finish_reason", str) or reason
                guesses += pick(choice, "logprobs.content", list) or []
        text = "".join(pieces)
        if reason is None:
            raise broken(f"it ended after {len(text):,} characters without saying why", url)
        if reason not in ("stop", "length"):  # content_filter or tool_calls: asking again changes nothing
            hint = "switch filters and tools off at the server, or take another server"
            raise EndpointError(f"the server ended the answer for {reason!r}", where=url, hint=hint)
        if reason == "stop" and not request.get("stop"):
            reason = "eos"  # one word for both in the protocol
        counted, n_prompt = (get(usage, name, int) for name in ("completion_tokens", "prompt_tokens"))
        n_tokens = len(pieces) if counted is None else counted
        return Reply(self.hide(text), reason, n_prompt or 0, n_tokens, first, guesses)


def connect(
    base_url: str,
    model: str = "",
    *,
    key: str = "",
    key_variable: str = "",
    timeout_seconds: float = TIMEOUT_SECONDS,
    stream: bool | None = None,
    version: str = "",
    **options: Any,
) -> Endpoint:
    """Ask a server for its models and its version; return the endpoint for all further requests.

    Args:
        model: one that the server lists; may be left out where it lists just one.
        key, key_variable: the key, or the environment variable that holds it; never shown or written.
        timeout_seconds: the longest wait for a piece of an answer; a whole one may take more.
        stream: in pieces. By default not for llama-cpp-python's server: its streams count no tokens, and end
            without a word where the context is full.
        version: of the server, where it is known better than the server reports.
        options: ``retries``; ``concurrency``, requests at once in ``score_set``: more than 1 can change
            answers; ``fields``, the server's names of a request's fields: ``{"seed": ""}`` leaves one out.

    An `EndpointError` says whether the address, the key, the model or a busy server is the cause.
    """
    wire = replace(_wire(base_url, key, key_variable), timeout_seconds=timeout_seconds)
    retries = options.get("retries", RETRIES)
    page = wire.persist(lambda broke: wire.page(f"{wire.url}/models"), retries=retries)
    if not isinstance(page, dict) or "data" not in page:
        what = "something answers there, but it does not list models"
        raise EndpointError(what, where=wire.url, hint=ADDRESS_HINT)
    entries = pick(page, "data", list) or []
    listed = {name: entry for entry in entries if (name := pick(entry, "id", str)) is not None}
    if model and listed and model not in listed or not model and len(listed) != 1:
        # a server that lists none may have the model nevertheless
        what = f"no model is called {model!r} there" if model else "name the model to ask"
        has = f"it has {', '.join(list(listed)[:8]) or 'none'}{' and more' if len(listed) > 8 else ''}"
        raise EndpointError(what, where=wire.url, hint=has)
    model = model or next(iter(listed))
    facts, entry = _facts(wire, listed), listed.get(model)
    weights = [pick(entry, f"meta.{name}", object) for name in ("size", "n_params", "ftype")]
    n_ctx = facts.get("n_ctx") or pick(entry, "max_model_len", int) or pick(entry, "meta.n_ctx", int)
    facts |= {"n_ctx": n_ctx, "models": tuple(listed), "options": PLAIN.get(facts["server"], {})}
    facts |= {"weights": " ".join(str(value) for value in weights if value)}
    facts |= {"version": version} if version else {}
    facts["stream"] = facts["server"] != "llama-cpp-python" if stream is None else stream
    return Endpoint(wire.url, wire.key, timeout_seconds, model, **facts, **options)


def _facts(wire: Wire, listed: Mapping[str, Any]) -> dict[str, Any]:
    """What an `Endpoint` has of the server itself, from paths that only one kind of server has."""
    props = wire.optional("/props")
    if settings := pick(props, "default_generation_settings", dict):
        return {
            "server": "llama.cpp",
            "version": pick(props, "build_info", str) or "",
            "n_ctx": pick(settings, "n_ctx", int),
            "n_slots": pick(props, "total_slots", int),
            "chat_template": pick(props, "chat_template", str) or "",
        }
    for path, server in (("/api/version", "Ollama"), ("/version", "vLLM")):
        if version := pick(wire.optional(path), "version", str):
            return {"server": server, "version": version}
    described = wire.optional("/openapi.json")
    if "llama.cpp Python" in (pick(described, "info.title", str) or ""):
        version = pick(described, "info.version", str) or ""
        return {"server": "llama-cpp-python", "version": version, "n_slots": 1}
    owners = {pick(entry, "owned_by", str) for entry in listed.values()}
    return {"server": (owners.pop() if len(owners) == 1 else "") or "unknown"}


def _wire(base_url: str, key: str, key_variable: str) -> Wire:
    """The way to an address of the protocol's root.

    >>> _wire("HTTP://localhost:8080/", "", "").url
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
    return Wire(url, SecretStr(key))


def is_url(text: object) -> bool:
    """Whether this names an endpoint and not a file.

    >>> is_url("http://127.0.0.1:8080/v1"), is_url("model.gguf")
    (True, False)
    """
    return str(text).lower().startswith(("http://", "https://"))


def check_in_process(target: object, what: str) -> None:
    """Refuse the address of an endpoint where only a model in this process will do: an `EndpointError`."""
    if is_url(target):
        hint = "give the GGUF file: it is read inside the runtime, in this process"
        raise EndpointError(
            f"{what} cannot be seen through an endpoint", where=shown_url(str(target)), hint=hint
        )


# ---- what a server predicts at each token of its answer ----


class Guess(BaseModel):
    """A token in the protocol's words; ``bytes`` is missing where a server does not tell them."""

    token: str = ""
    logprob: FiniteFloat  # NaN and infinity are no JSON: no record could be read again
    bytes: list[int] | None = None
    top_logprobs: list[Guess] = []

    def pair(self) -> tuple[str, float]:
        """Its bytes in hex, and its log-probability."""
        raw = self.token.encode("utf-8", "replace") if self.bytes is None else bytes(self.bytes)
        return raw.hex(), min(self.logprob, 0.0)


def continuation(
    endpoint: Endpoint, asked: str, chat: bool = False, n_tokens: int = 64, top_k: int = 1
) -> list[dict[str, Any]]:
    """A server's greedy answer, token by token: ``token`` (bytes in hex), ``logprob``, ``top`` (best first).

    An `EndpointError`: it gives no log-probabilities, or those of another text than its answer.
    """
    whole, steps = replace(endpoint, stream=False), list[dict[str, Any]]()
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": top_k} if chat else {"logprobs": top_k}
    reply = (whole.chat if chat else whole.complete)(asked, n_tokens, **wanted)
    try:
        for guess in TypeAdapter(list[Guess]).validate_python(reply.guesses):
            token, value = guess.pair()
            top = sorted(map(Guess.pair, guess.top_logprobs), key=lambda pair: -pair[1])
            steps.append({"token": token, "logprob": value, "top": top or [(token, value)]})
    except ValueError as error:
        what = f"its log-probabilities cannot be read ({' '.join(str(error).split())[:200]})"
        raise EndpointError(what, where=endpoint.url, hint="take another server, or a GGUF file") from None
    if reply.text and not steps:
        hint = "take a server that gives `logprobs`, such as llama.cpp's own, or a GGUF file"
        raise EndpointError("it gives no log-probabilities", where=endpoint.url, hint=hint)
    while steps and steps[-1]["token"] == "":
        steps.pop()  # the token that ends an answer has no text
    joined = bytes.fromhex("".join(step["token"] for step in steps))
    if joined.strip() != reply.text.encode("utf-8", "replace").strip():
        hint = "switch off what changes the text: a reasoning kept apart, a filter, a tool parser"
        raise EndpointError("its log-probabilities belong to another text", where=endpoint.url, hint=hint)
    return steps
