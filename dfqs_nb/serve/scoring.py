"""Score a served model: what notebook 06 asks of a file, asked of a server."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dfqs_nb.llama.generate import Completion
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun
from dfqs_nb.serve.client import Endpoint
from dfqs_nb.serve.errors import ContextOverflowError, EndpointError
from dfqs_nb.serve.retrieval import PromptGuard, shown_around, tokenizer

COUNTED_ITEMS = 8  # the longest of a set, whose tokens are counted before the first is asked
DEFAULTS = Options()
CUT_SHARE = 0.6  # questions of one set differ in their characters a token


def answerer(endpoint: Endpoint, item_set: ItemSet, model_id: str = "") -> Answerer:
    """How an endpoint answers the items of this set; the template is the server's, as far as it shows it.

    It raises ``ContextOverflowError`` for a server that cuts a prompt and answers from the rest.
    """
    chat = item_set.mode == "chat"
    ask = endpoint.chat if chat else endpoint.complete
    guard = PromptGuard(endpoint.base_url, lambda text: ask(text, 1), CUT_SHARE)

    def answer(request: Any) -> Completion:
        reply = ask(request.text, request.max_tokens, request.sampling, request.stop)
        guard.check(request.text, reply)
        return reply

    template = endpoint.facts.chat_template
    known = hashlib.sha256(template.encode()).hexdigest() if template else "the server's"
    conditions = {"chat_template_sha256": known if chat else "none", **endpoint.conditions()}
    identity = model_id or endpoint.identity
    return Answerer(answer, item_set.mode, conditions, identity, n_parallel=endpoint.concurrency)


def check_context(endpoint: Endpoint, item_set: ItemSet) -> int:
    """The context in tokens that the longest items need at least.

    0 where the server does not report its context or shows no tokenizer. A server that lacks the room may cut
    answers off without a word.

    Raises:
        ContextOverflowError: it is more than the server has.
    """
    n_ctx = endpoint.facts.n_ctx
    tokens = tokenizer(endpoint) if n_ctx else None
    if tokens is None or n_ctx is None:
        return 0
    chat = item_set.mode == "chat"
    before, after = (shown_around(endpoint) or ("", "")) if chat else ("", "")
    prompts = (item.asked(item_set.instruction) if chat else item.prompt for item in item_set.items)
    longest = sorted((before + prompt + after for prompt in prompts), key=len)[-COUNTED_ITEMS:]
    needed = max(len(tokens(text)) for text in longest) + item_set.max_tokens
    if needed > n_ctx:
        raise ContextOverflowError(
            f"the set {item_set.name} needs {needed:,} tokens of context, and the server has {n_ctx:,}",
            where=endpoint.base_url,
            hint="start the server with a larger context for each request",
        )
    return needed


def score_set(
    endpoint: Endpoint,
    item_set: ItemSet,
    folder: str | Path,
    options: Options = DEFAULTS,
    *,
    model_id: str = "",
) -> SetRun:
    """``score_set`` of the scores stage over an endpoint: what is answered stays, whatever fails later.

    Args:
        model_id: the model's SHA-256, where it is known; else ``Endpoint.identity``.

    Raises:
        SandboxError: the set is code and there is no sandbox; nothing has been asked yet.
        ContextOverflowError: an item does not fit into the server's context, or the server cuts it.
        EndpointError: the server failed at an item for good; a second call goes on from there.
    """
    if options.thinking != "template":
        raise EndpointError(
            "a server decides about thinking when it starts",
            where=endpoint.base_url,
            hint="start it with thinking on or off, and leave --thinking out",
        )
    check_context(endpoint, item_set)
    return answerer(endpoint, item_set, model_id).score(item_set, folder, options)
