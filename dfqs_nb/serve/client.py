"""Send the workbook's requests to any server with an OpenAI-compatible API.

Greedy by default, one request at a time: parallel requests share batches, and batches change numbers. A
failure of the connection or the server is retried and then an error; it is never an answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import SecretStr

from dfqs_nb.llama.generate import GREEDY, Sampling
from dfqs_nb.serve.wire import ADDRESS_HINT, ANSWER_SECONDS, RETRIES, EndpointError, Wire, broken, shown_url

Kind = TypeVar("Kind")

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
    n_tokens: int  # of the answer, counted by the server; 0: not told
    logprobs: Sequence[tuple[str, float]] = ()  # of its tokens, if they were asked for


@dataclass(frozen=True)
class Endpoint(Wire):
    """A server, how to ask it, and what it reports about itself (None or empty: nothing). See `connect`."""

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
        return {
            "runtime": f"{name} {self.version}".strip(),
            "endpoint": True,
            "endpoint_model": self.model,
            "n_ctx": self.n_ctx,
            "n_slots": self.n_slots,
            "request_options": dict(self.options),
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
        return self.persist(partial(self._reply, request), self.retries)

    def _reply(self, request: Mapping[str, Any]) -> Reply:
        """One request, asked once."""
        chat, get = "messages" in request, partial(pick, strict=True)
        url = f"{self.url}/{'chat/' if chat else ''}completions"
        page = self.page(url, request, self.timeout_seconds)
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


def connect(
    base_url: str,
    model: str = "",
    *,
    key: str = "",
    key_variable: str = "",
    timeout_seconds: float = ANSWER_SECONDS,
    version: str = "",
    retries: int = RETRIES,
) -> Endpoint:
    """Ask a server for its models and its version; return the endpoint for all further requests.

    ``model``: one that the server lists; may be left out where it lists just one. ``key``, ``key_variable``:
    the key, or the environment variable that holds it; never shown or written. ``version``: of the server,
    where it is known better than the server reports. An `EndpointError` says whether the address, the key,
    the model or a busy server is the cause.
    """
    wire = _wire(base_url, key, key_variable)
    page = wire.persist(lambda: wire.page(f"{wire.url}/models"), retries)
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
    facts |= {"n_ctx": n_ctx, "options": PLAIN.get(facts["server"], {})}
    facts |= {"weights": " ".join(str(value) for value in weights if value)}
    facts |= {"version": version} if version else {}
    return Endpoint(wire.url, wire.key, timeout_seconds, model, retries, **facts)


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
        return {"server": "llama-cpp-python", "version": version}
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
    """Whether this names an endpoint and not a file."""
    return str(text).lower().startswith(("http://", "https://"))


def check_in_process(target: object, what: str) -> None:
    """Refuse the address of an endpoint where only a model in this process will do: an `EndpointError`."""
    if is_url(target):
        hint = "give the GGUF file: it is read inside the runtime, in this process"
        where = shown_url(str(target))
        raise EndpointError(f"{what} cannot be seen through an endpoint", where=where, hint=hint)
