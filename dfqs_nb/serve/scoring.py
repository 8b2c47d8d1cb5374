"""Score a served model: what notebook 06 asks of a file, asked of a server."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.llama.generate import GREEDY, Completion, Sampling
from dfqs_nb.scores import run as scores
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import check_allowed, find_sandbox
from dfqs_nb.serve.client import Endpoint
from dfqs_nb.serve.errors import ContextOverflowError
from dfqs_nb.serve.retrieval import PromptGuard, shown_around, tokenizer

COUNTED_ITEMS = 8  # the longest of a set, whose tokens are counted before the first is asked
CUT_SHARE = 0.6  # questions of one set differ in their characters a token


def answerer(endpoint: Endpoint, item_set: ItemSet) -> scores.Answerer:
    """How an endpoint answers the items of this set; see ``answerer`` of the scores stage.

    It raises ``ContextOverflowError`` for a server that cuts a prompt and answers from the rest.
    """
    chat = item_set.mode == "chat"
    stop = () if chat and item_set.kind == "code" else item_set.stop
    ask = endpoint.chat if chat else endpoint.complete
    guard = PromptGuard(endpoint.base_url, lambda text: ask(text, 1), CUT_SHARE)

    def answer(item: Item, sampling: Sampling) -> Completion:
        prompt = item.asked(item_set.instruction) if chat else item.prompt
        reply = ask(prompt, item_set.max_tokens, sampling, stop)
        guard.check(prompt, reply)
        return reply

    return answer


def run_conditions(endpoint: Endpoint, item_set: ItemSet, sampling: Sampling = GREEDY) -> dict[str, Any]:
    """What an answer depends on; the template is the server's, as far as it shows it."""
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
    *,
    model_id: str = "",
    sampling: Sampling = GREEDY,
    allow_unsandboxed: bool = False,
    **options: Any,
) -> scores.SetRun:
    """``score_set`` of the scores stage over an endpoint: what is answered stays, whatever fails later.

    Args:
        model_id: the model's SHA-256, where it is known; else ``Endpoint.identity``.
        options: ``n_samples``, ``ks``, ``limit``, ``fresh``, ``progress``.

    Raises:
        SandboxError: the set is code and there is no sandbox; nothing has been asked yet.
        ContextOverflowError: an item does not fit into the server's context, or the server cuts it.
        EndpointError: the server failed at an item for good; a second call goes on from there.
    """
    if item_set.kind == "code":
        check_allowed(find_sandbox(), allow_unsandboxed)
    check_context(endpoint, item_set)
    return scores.collect(
        answerer(endpoint, item_set),
        item_set,
        folder,
        run_conditions(endpoint, item_set, sampling),
        sampling=sampling,
        model_id=model_id or endpoint.identity,
        n_parallel=endpoint.concurrency,
        **options,
    )
