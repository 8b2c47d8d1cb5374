"""What a server reports of itself, and the fields of its answers that are read, typed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from pydantic import BaseModel, PlainValidator, ValidationError

from dfqs_nb.serve.wire import Wire, optional

PROBE_RETRIES = 2  # of a request for what a server need not have


def _text(value: object) -> str:
    if not isinstance(value, str | None):
        raise ValueError("not a text")
    return value or ""


Page = TypeVar("Page", bound=BaseModel)
Text = Annotated[str, PlainValidator(_text)]  # pydantic's own refuses halves of characters


class Part(BaseModel):
    """A message, or a piece of one; a reasoning that the server keeps apart has tokens, but no text."""

    content: Text = ""
    reasoning_content: Text = ""
    reasoning: Text = ""


class _Choice(BaseModel):
    text: Text = ""
    message: Part | None = None
    delta: Part | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Answer(BaseModel):
    """A completion, or an event of its stream."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None


class _Meta(BaseModel):
    n_ctx: int | None = None
    size: int | None = None
    n_params: int | None = None
    ftype: Text = ""


class Listed(BaseModel):
    """A model in a server's list."""

    id: Text
    owned_by: Text = ""
    max_model_len: int | None = None
    meta: _Meta | None = None


class Models(BaseModel):
    """A server's list of models."""

    data: list[Listed] | None


class _Generation(BaseModel):
    n_ctx: int | None = None


class _Props(BaseModel):
    default_generation_settings: _Generation
    build_info: Text = ""
    total_slots: int | None = None
    chat_template: Text = ""


class _Version(BaseModel):
    title: Text = ""
    version: Text


class _Described(BaseModel):
    info: _Version


@dataclass(frozen=True)
class ServerFacts:
    """What a server reports of itself; None or empty where it reports nothing.

    Attributes:
        name: ``llama.cpp``, ``llama-cpp-python``, ``Ollama``, ``vLLM`` or ``unknown``.
        models: names that it lists.
        n_ctx: tokens of context of one request.
        n_slots: requests that it works on at once.
        chat_template: the text of its chat template.
        weights: what it reports of the model's weights: bytes, number and type.
    """

    name: str = "unknown"
    version: str = ""
    models: tuple[str, ...] = ()
    n_ctx: int | None = None
    n_slots: int | None = None
    chat_template: str = field(default="", repr=False)
    weights: str = ""


def read(kind: type[Page], answer: object) -> Page | None:
    """An answer as a page of this kind; None where it is none."""
    try:
        return kind.model_validate(answer)
    except (ValidationError, RecursionError):
        return None


def root_of(url: str) -> str:
    """The server's address, without the protocol's ``/v1``."""
    return re.sub(r"/v\d+\w*$", "", url)


def facts_of(wire: Wire, listed: Sequence[Listed], model: str) -> ServerFacts:
    """Name and version, from the paths that each kind of server has of its own, and what it lists of a model.

    The list has the weights (llama.cpp), and a context length (vLLM, llama.cpp) where there is none yet.
    """
    entry = next((item for item in listed if item.id == model), Listed(id=model))
    facts, meta = _facts(wire, listed), entry.meta or _Meta()
    weights = " ".join(str(value) for value in (meta.size, meta.n_params, meta.ftype) if value)
    n_ctx = facts.n_ctx or entry.max_model_len or meta.n_ctx
    names = tuple(item.id for item in listed)
    return dataclasses.replace(facts, models=names, n_ctx=n_ctx, weights=weights)


def _facts(wire: Wire, listed: Sequence[Listed]) -> ServerFacts:
    def page(path: str, kind: type[Page]) -> Page | None:
        return read(kind, optional(wire, "get", root_of(wire.url) + path, PROBE_RETRIES))

    if props := page("/props", _Props):
        n_ctx, template = props.default_generation_settings.n_ctx, props.chat_template
        return ServerFacts("llama.cpp", props.build_info, (), n_ctx, props.total_slots, template)
    for path, name in (("/api/version", "Ollama"), ("/version", "vLLM")):
        if version := page(path, _Version):
            return ServerFacts(name, version.version)
    described = page("/openapi.json", _Described)
    if described and "llama.cpp Python" in described.info.title:
        return ServerFacts("llama-cpp-python", described.info.version, n_slots=1)
    owners = {item.owned_by for item in listed}
    return ServerFacts(owners.pop() if len(owners) == 1 and "" not in owners else "unknown")
