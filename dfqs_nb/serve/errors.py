"""What a server's failures mean to the user, and which of them may pass."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.llama.model import ContextFullError

BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again
NEEDED = ("model", "prompt", "messages")  # fields of a request that none can be without
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? (the )?(available )?context|maximum context length"
    r"|context (window|size|length)[^.]{0,40}exceed|max_model_len",
    re.IGNORECASE,
)


class EndpointError(DfqsError):
    """An endpoint cannot be asked, or does not answer.

    Attributes:
        temporary: asking again may help.
        retry_after: seconds that the server asks to wait; None where it says nothing.
        status: of HTTP; 0 where no answer came.
    """

    temporary: bool = False
    status: int = 0
    retry_after: float | None = None


class UnreachableError(EndpointError):
    """Nothing answers at the address, or not in time."""

    temporary = True


class KeyRefusedError(EndpointError):
    """The server wants another key (401 or 403)."""


class UnknownModelError(EndpointError):
    """The server has no model of that name."""


class BusyError(EndpointError):
    """The server answers 429 or 5xx, every time."""

    temporary = True


class BrokenAnswerError(EndpointError):
    """An answer ends before its end, every time."""

    temporary = True


class EndlessAnswerError(EndpointError):
    """An answer takes longer in all, or is larger, than any honest one."""


class ContextOverflowError(EndpointError, ContextFullError):
    """The prompt and the answer exceed the context that the server has. Asking again does not help."""


class TooMuch(Exception):
    """A response passed its limit of seconds or bytes."""


class Broken(Exception):
    """An answer without its end."""


class Refused(Exception):
    """An answer that the server ends for a reason of its own, and would again."""


def is_overflow(words: str) -> bool:
    """Whether a server means that prompt and answer are too long.

    >>> is_overflow("request (6002 tokens) exceeds the available context size (1024 tokens)")
    True
    """
    return bool(OVERFLOW.search(words))


def is_broken(error: BaseException) -> bool:
    """Whether an answer had begun when it failed."""
    import httpcore2
    import openai
    from pydantic import ValidationError

    cause = error.__cause__ or error if isinstance(error, openai.APIConnectionError) else error
    lost = (httpcore2.ReadError, httpcore2.RemoteProtocolError, Broken, RecursionError)
    unreadable = (json.JSONDecodeError, UnicodeError, ValidationError)
    return isinstance(cause, (*lost, *unreadable)) or type(error) is openai.APIError  # an event in a stream


def meaning(
    error: Exception, url: str, model: str = "", models: Sequence[str] = (), fields: Sequence[str] = ()
) -> EndpointError | None:
    """What a failure means to the user; None for one that is not the endpoint's.

    Args:
        url: the server's address, as it may be shown.
        model, models: the model that was asked for, and those that the server lists.
        fields: of the request: a refusal that names one of them gets a hint how to do without it.
    """
    import httpcore2
    import openai

    cause = error.__cause__ or error
    if isinstance(error, openai.APIStatusError):
        made = _status(error.status_code, _words(error), url, model, models, fields)
        made.status = error.status_code
        made.retry_after = _retry_after(error.response.headers.get("retry-after"))
        return made
    if isinstance(cause, TooMuch):
        hint = "raise --timeout (timeout_seconds) if this server is that slow; else take another server"
        return EndlessAnswerError(f"the answer does not end ({cause})", where=url, hint=hint)
    if isinstance(error, openai.APITimeoutError) or isinstance(cause, httpcore2.TimeoutException):
        hint = "raise --timeout (timeout_seconds), or ask for fewer tokens"
        return UnreachableError("no answer in time", where=url, hint=hint)
    if isinstance(error, Refused):
        hint = "switch filters and tools off at the server, or take another server"
        return EndpointError(f"the server ended the answer for {str(error)!r}", where=url, hint=hint)
    if is_broken(error):
        why = _first_line(cause) or type(cause).__name__
        if is_overflow(why):
            return _overflow(why, url)
        hint = "read the server's log; nothing of this answer was kept"
        return BrokenAnswerError(f"the answer broke off ({why})", where=url, hint=hint)
    lost = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError)
    if isinstance(error, openai.APIConnectionError) or isinstance(cause, lost):
        hint = "check the address, and that the server is running"
        return UnreachableError(f"nothing answers there ({cause})", where=url, hint=hint)
    return None


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _words(error: Any) -> str:
    """The server's own words."""
    body = error.body if isinstance(error.body, dict) else {}
    inner = body.get("error", body)
    words = inner.get("message") if isinstance(inner, dict) else inner
    kind = inner.get("type") or inner.get("code") if isinstance(inner, dict) else ""
    return f"{words or body.get('detail') or error.message} {kind or ''}".strip()[:300]


def _status(
    status: int, words: str, url: str, model: str, models: Sequence[str], fields: Sequence[str]
) -> EndpointError:
    if is_overflow(words) and status in (400, 413, 422, 500):
        return _overflow(words, url)
    if status in (401, 403):
        hint = "put the right key into an environment variable and pass its name"
        return KeyRefusedError(f"the key is refused ({status})", where=url, hint=hint)
    if status == 404 and model:
        has = f"it has {', '.join(models)}" if models else "ask GET /v1/models what it has"
        return UnknownModelError(f"no model {model!r}, or no such path ({words})", where=url, hint=has)
    if status == 404:
        hint = "check port and path: the address ends in /v1 as a rule"
        what = f"something answers there, but not this protocol ({words})"
        error: EndpointError = UnreachableError(what, where=url, hint=hint)
        error.temporary = False
        return error
    if status in BUSY or status >= 500:
        hint = "wait, lower the concurrency, or read the server's log"
        return BusyError(f"the server says {status} ({words})", where=url, hint=hint)
    hint = _field_hint(words, fields) or "the answer to this request will not change: change the request"
    return EndpointError(f"the server refuses the request: {status} ({words})", where=url, hint=hint)


def _field_hint(words: str, fields: Sequence[str]) -> str:
    """How to do without the field that a refusal names; empty where it names none of the request's.

    >>> _field_hint("Unsupported parameter: 'seed'", ("max_tokens", "seed"))
    'leave it out with --field seed= (fields={"seed": ""}), or rename it with --field seed=NEWNAME'
    """
    found = [match for name in fields if (match := re.search(rf"\b{re.escape(name)}\b", words))]
    named = [match[0] for match in sorted(found, key=re.Match.start) if match[0] not in NEEDED]
    if not named:
        return ""
    name = named[0]
    other = "max_completion_tokens" if name == "max_tokens" else "NEWNAME"
    drop = json.dumps({name: ""})
    return f"leave it out with --field {name}= (fields={drop}), or rename it with --field {name}={other}"


def _overflow(words: str, url: str) -> ContextOverflowError:
    return ContextOverflowError(
        f"it does not fit into the server's context ({words})",
        where=url,
        hint="start the server with a larger context, or shorten the prompt",
    )


def _retry_after(text: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header; dates are not read."""
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return max(0.0, seconds) if seconds == seconds else None
