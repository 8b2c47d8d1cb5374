"""What a server predicts at each token of its answer: the tokens, and the likeliest others beside each."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen
from pydantic import BaseModel, FiniteFloat, ValidationError

from dfqs_nb.serve.client import Answer, Endpoint
from dfqs_nb.serve.wire import EndpointError

BYTES_PER_GUESS = 400  # of JSON, for a token among the likeliest


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


class Listed(BaseModel):
    """The log-probabilities of an answer."""

    content: list[Guess] = []


class Scored(Answer):
    """An answer with its log-probabilities."""

    logprobs: Listed | list[None] | None = None


class Page(BaseModel):
    """What a server sends."""

    choices: Annotated[list[Scored], MinLen(1)]


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
    body |= endpoint.options
    url = f"{wire.url}/{'chat/' if chat else ''}completions"
    limits = (wire.timeout_seconds, 4 << 20 | BYTES_PER_GUESS * n_tokens * (top_k + 1))
    page = wire.ask(lambda broke: next(wire.events(url, body)), retries=endpoint.retries, limits=limits)
    try:
        choice = Page.model_validate(page).choices[0]
    except ValidationError as error:
        what = f"its log-probabilities cannot be read ({error.errors()[0]['msg']})"
        raise EndpointError(what, where=wire.url, hint="take another server, or a GGUF file") from None
    text = (choice.message or choice).content or choice.text
    steps: list[dict[str, Any]] = []
    for guess in choice.logprobs.content if isinstance(choice.logprobs, Listed) else []:
        token, value = guess.pair()
        top = sorted((other.pair() for other in guess.top_logprobs), key=lambda pair: -pair[1])
        steps.append({"token": token, "logprob": value, "top": top or [(token, value)]})
    if not steps and text:
        hint = "take a server that gives `logprobs`, such as llama.cpp's own, or a GGUF file"
        raise EndpointError("it gives no log-probabilities", where=wire.url, hint=hint)
    while steps and steps[-1]["token"] == "":
        steps.pop()  # the token that ends an answer has no text
    whole = bytes.fromhex("".join(step["token"] for step in steps))
    if whole.strip() != text.encode("utf-8", "replace").strip():
        hint = "switch off what changes the text: a reasoning kept apart, a filter, a tool parser"
        raise EndpointError("its log-probabilities belong to another text", where=wire.url, hint=hint)
    return steps
