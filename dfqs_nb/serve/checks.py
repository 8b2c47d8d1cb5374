"""What a user should know of a server before trusting its answers, checked by asking it."""

from __future__ import annotations

import dataclasses
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from dfqs_nb.core.machine import usable_cores
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.serve.client import Endpoint, Reply, check_in_process, connect
from dfqs_nb.serve.errors import (
    BrokenAnswerError,
    BusyError,
    ContextOverflowError,
    EndpointError,
    UnreachableError,
)
from dfqs_nb.serve.facts import read
from dfqs_nb.serve.retrieval import token_counter
from dfqs_nb.serve.servers import LocalServer, is_healthy, port_is_free, start

if TYPE_CHECKING:
    import pandas as pd

Work = TypeVar("Work")
Made = TypeVar("Made")
PASS, FAIL, NOTE, UNSEEN = "pass", "fail", "note", "not measured"
PROMPTS = (
    "Tom is tall. Ann is small. Who is tall?",
    "The red key is in the box. The blue key is on the table. Where is the red key?",
    "Write a short story about a dog and a river.",
    "def add(a, b):",
)
CLIENTS = (1, 2, 4, 8)
TIMED_PROMPT = "The red key is kept in the old box. The blue key is kept in the new box. "
MAX_TOKENS = 32
REPETITIONS = 4
LONGEST_TRIED = 65_536  # tokens of context that are filled to try them out
FILLER = "The dog slept near the fire. "
CACHE_PROMPT = (FILLER + "Rain fell softly on the roof. ") * 16


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, ``pass``, ``fail``, ``note`` or ``not measured``, and the finding."""

    check: str
    verdict: str
    finding: str


def side_by_side(work: Callable[[Work], Made], items: Iterable[Work], n_at_once: int) -> list[Made]:
    """The work done for each item, up to so many at once, in the order of the items."""
    with ThreadPoolExecutor(max(1, n_at_once)) as pool:
        return list(pool.map(work, items))


def servers_at_once(servers: Iterable[LocalServer]) -> int:
    """How many of these servers this machine's cores can keep busy at once without one slowing another."""
    threads = [server.settings.n_threads or 1 for server in servers]
    return max(1, usable_cores() // max(threads, default=1))


def check_server(
    endpoint: Endpoint,
    model: Model | None = None,
    server: LocalServer | None = None,
    prompts: Sequence[str] = PROMPTS,
    n_concurrent: int = 4,
) -> pd.DataFrame:
    """All checks that can be made from outside: columns ``check``, ``verdict`` and ``finding``.

    Args:
        model: the same file, open in this process, to compare the chat template with.
        server: when it is one of ours: its health is asked.
        n_concurrent: requests at once for the check of determinism.
    """
    import pandas as pd

    checks: dict[str, Callable[[], Check]] = {
        "health": lambda: check_health(endpoint, server),
        "model name": lambda: check_name(endpoint),
        "context length": lambda: check_context(endpoint),
        "chat template": lambda: check_template(endpoint, model),
        "same again": lambda: check_repeated(endpoint, prompts),
        "same beside others": lambda: check_concurrent(endpoint, prompts, n_concurrent),
        "prompt cache": lambda: check_cache(endpoint),
    }
    return pd.DataFrame([dataclasses.asdict(made(name, check)) for name, check in checks.items()])


def made(name: str, check: Callable[[], Check]) -> Check:
    """A check's result; what stops it is a finding too."""
    try:
        return check()
    except EndpointError as error:
        return Check(name, FAIL, f"it stopped: {type(error).__name__}: {error.what}")


def check_all(
    connected: Mapping[str, Endpoint],
    model: Model | None = None,
    running: Mapping[str, LocalServer] | None = None,
) -> pd.DataFrame:
    """`check_server` of each server: columns ``check``, ``server``, ``verdict`` and ``finding``."""
    import pandas as pd

    running = running or {}

    def check(name: str) -> pd.DataFrame:
        return check_server(connected[name], model, running.get(name)).assign(server=name)

    tables = side_by_side(check, connected, servers_at_once(running.values()))
    return pd.concat(tables, ignore_index=True)[["check", "server", "verdict", "finding"]]


def check_health(endpoint: Endpoint, server: LocalServer | None = None) -> Check:
    """The server answers, to its health check and to a request of one token."""
    healthy = server is None or is_healthy(server)
    started = time.perf_counter()
    endpoint.complete("The", 1)
    seconds = time.perf_counter() - started
    came_up = f"came up in {server.start_seconds:.1f} s; " if server else ""
    state = "healthy" if healthy else "not healthy"
    return Check("health", PASS if healthy else FAIL, f"{came_up}{state}; one token in {seconds:.2f} s")


def check_name(endpoint: Endpoint) -> Check:
    """What a wrong model name gets: a refusal is right, another model's answer is a trap."""
    wrong = dataclasses.replace(endpoint, model=f"{endpoint.model}-that-is-not-there", retries=0)
    listed = ", ".join(endpoint.facts.models)
    try:
        wrong.complete("The", 1)
    except (BusyError, UnreachableError, BrokenAnswerError):
        raise
    except EndpointError as error:
        return Check("model name", PASS, f"lists {listed}; refuses another name ({type(error).__name__})")
    trap = "answers to any name, so a wrong one goes unnoticed unless the list is read first (connect does)"
    return Check("model name", NOTE, f"lists {listed}; {trap}")


def check_context(endpoint: Endpoint) -> Check:
    """How many tokens it really takes: what it reports, and what it refuses."""
    n_ctx = endpoint.facts.n_ctx
    count, counted_by = token_counter(endpoint)
    if n_ctx is None or n_ctx > LONGEST_TRIED:
        return Check("context length", UNSEEN, f"reports {n_ctx}; not tried out")
    each = count(FILLER * 16) / 16
    fits, exceeds = FILLER * int((n_ctx - 24) / each - 1), FILLER * int(n_ctx / each + 2)
    endpoint.complete(fits, 4)
    try:
        endpoint.complete(exceeds, 4)
    except ContextOverflowError:
        takes = f"takes {count(fits):,} and refuses {count(exceeds):,} ({counted_by})"
        return Check("context length", PASS, f"reports {n_ctx:,}; {takes}")
    dropped = f"{count(exceeds):,} {counted_by} got an answer: part of such a prompt is dropped"
    return Check("context length", FAIL, f"reports {n_ctx:,}, but {dropped}")


def check_template(endpoint: Endpoint, model: Model | None) -> Check:
    """Whether its chat template gives the tokens that ours gives."""
    if model is None or not model.header.get("tokenizer.chat_template"):
        return Check("chat template", UNSEEN, "needs the model in this process, with a chat template")
    ours = chat_text(model, PROMPTS[0])
    n_ours = len(model.with_bos(model.tokenize(ours)))
    n_theirs = dataclasses.replace(endpoint, stream=False).chat(PROMPTS[0], 1).n_prompt
    shown = endpoint.post("/apply-template", messages=[{"role": "user", "content": PROMPTS[0]}])
    same_text = "its text is not shown"
    if isinstance(shown, dict) and isinstance(shown.get("prompt"), str):
        before = ours.removesuffix(shown["prompt"])  # some leave out a BOS, which they add as a token
        same = ours.endswith(shown["prompt"]) and len(model.tokenize(before)) <= 1
        same_text = "the same text" if same else "another text"
    verdict = PASS if n_ours == n_theirs and same_text != "another text" else FAIL
    return Check("chat template", verdict, f"{n_theirs} tokens, in process {n_ours}; {same_text}")


def check_repeated(endpoint: Endpoint, prompts: Sequence[str], repetitions: int = REPETITIONS) -> Check:
    """Greedy answers to the same requests, one after another."""
    texts = [{endpoint.chat(prompt, MAX_TOKENS).text for _ in range(repetitions)} for prompt in prompts]
    n_same = sum(len(answers) == 1 for answers in texts)
    finding = f"{n_same} of {len(prompts)} prompts: the same text {repetitions} times in turn"
    return Check("same again", PASS if n_same == len(prompts) else FAIL, finding)


def check_concurrent(endpoint: Endpoint, prompts: Sequence[str], n_concurrent: int) -> Check:
    """Greedy answers to the same requests beside others: slots share batches, and batches change numbers."""
    n_other, n_asked = _differing(endpoint, prompts, n_concurrent)
    drift = max_drift(endpoint, prompts, n_concurrent)
    moved = "" if drift is None else f"; log-probabilities moved by up to {drift:.1e}"
    finding = f"{n_other} of {n_asked} answers differ with {n_concurrent} requests at once{moved}"
    return Check("same beside others", PASS if n_other == 0 else NOTE, finding)


def _differing(endpoint: Endpoint, prompts: Sequence[str], n_concurrent: int) -> tuple[int, int]:
    """How many greedy texts differ between asking alone and beside others, and how many were asked for."""

    def ask(number: int) -> str:
        return endpoint.chat(prompts[number], MAX_TOKENS).text

    alone = [ask(number) for number in range(len(prompts))]
    asked = list(range(len(prompts))) * n_concurrent
    beside = side_by_side(ask, asked, n_concurrent)
    return sum(text != alone[i] for i, text in zip(asked, beside, strict=True)), len(asked)


def max_drift(
    endpoint: Endpoint, prompts: Sequence[str], n_concurrent: int, repetitions: int = 1
) -> float | None:
    """The largest change of a greedy token's log-probability between asking alone and beside others.

    It is taken up to where the tokens part; None where the server shows none, or stopped showing them.

    Args:
        repetitions: of asking beside others, because requests need not meet.
    """
    alone = [_logprobs(endpoint, prompt) for prompt in prompts]
    if not all(alone):
        return None
    asked = list(range(len(prompts))) * n_concurrent
    largest = 0.0
    for _ in range(repetitions):
        beside = side_by_side(lambda i: _logprobs(endpoint, prompts[i]), asked, n_concurrent)
        if not all(beside):
            return None
        largest = max(largest, *(_drift(alone[i], shown) for i, shown in zip(asked, beside, strict=True)))
    return largest


class _Chosen(BaseModel):
    id: int
    logprob: float


class _Probabilities(BaseModel):
    completion_probabilities: list[_Chosen] = []


def _logprobs(endpoint: Endpoint, prompt: str) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities, from llama.cpp's own path, which does not round them."""
    if endpoint.facts.name != "llama.cpp":
        return []
    options = {"temperature": 0, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
    answer = endpoint.post("/completion", prompt=prompt, n_predict=MAX_TOKENS, **options)
    shown = read(_Probabilities, answer) or _Probabilities()
    return [(token.id, token.logprob) for token in shown.completion_probabilities]


def _drift(alone: Sequence[tuple[int, float]], beside: Sequence[tuple[int, float]]) -> float:
    """The largest difference of log-probabilities while the tokens are the same.

    >>> _drift([(1, -0.5), (2, -0.1), (3, -0.2)], [(1, -0.25), (2, -0.1), (4, -9.0)])
    0.25
    """
    same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(alone, beside, strict=False))
    return max((abs(ours[1] - theirs[1]) for ours, theirs in same), default=float("inf"))


def drift_by_slots(
    path: str | Path,
    settings: OpenSettings,
    slots: Sequence[int] = (1, 2, 4),
    n_concurrent: int = 4,
    repetitions: int = 2,
) -> pd.DataFrame:
    """llama.cpp's server with more and more slots under the same requests at once, its prompt cache off.

    Columns ``slots``, ``requests`` (at once), ``drift`` (the largest change of a log-probability against
    asking alone, of several tries, because requests need not meet), ``answers`` and ``differ`` (texts).
    """
    import pandas as pd

    def measure(n: int) -> dict[str, Any]:
        with start("llama.cpp", path, settings, n_parallel=n) as server:
            endpoint = server.connect()
            differ, answers = _differing(endpoint, PROMPTS, n_concurrent)
            drift = max_drift(endpoint, PROMPTS, n_concurrent, repetitions)
        shown = float("nan") if drift is None else drift
        return {"slots": n, "requests": n_concurrent, "drift": shown, "answers": answers, "differ": differ}

    at_once = max(1, usable_cores() // (settings.n_threads or 1))
    return pd.DataFrame(side_by_side(measure, slots, at_once))


def check_cache(endpoint: Endpoint, repetitions: int = REPETITIONS) -> Check:
    """What reusing the last prompt's cache saves, and whether the text stays the same."""
    if endpoint.facts.name != "llama.cpp":
        times, texts = _timed(endpoint, {}, repetitions)
        finding = (
            f"the same prompt took {times[0]:.3f} s, then {median(times[1:]):.3f} s, with {_same(texts)}"
        )
        return Check(
            "prompt cache", NOTE if len(set(texts)) == 1 else FAIL, f"cannot be switched here; {finding}"
        )
    (times_off, texts), (times_on, more) = (
        _timed(endpoint, {"cache_prompt": on}, repetitions) for on in (False, True)
    )
    off, on, texts = median(times_off[1:]), median(times_on[1:]), [*texts, *more]
    finding = f"{off:.3f} s without, {on:.3f} s with it ({off / on:.1f} times as fast), with {_same(texts)}"
    return Check("prompt cache", PASS if len(set(texts)) == 1 else NOTE, f"the same prompt again: {finding}")


def _timed(endpoint: Endpoint, options: dict[str, Any], repetitions: int) -> tuple[list[float], list[str]]:
    seconds, texts = [], []
    for _ in range(repetitions):
        started = time.perf_counter()
        texts.append(endpoint.complete(CACHE_PROMPT, 8, **options).text)
        seconds.append(time.perf_counter() - started)
    return seconds, texts


def _same(texts: Sequence[str]) -> str:
    return "the same text" if len(set(texts)) == 1 else f"{len(set(texts))} different texts"


def check_shutdown(server: LocalServer) -> Check:
    """Stop the server, and look whether anything of it is left."""
    host, port = server.address
    seconds = server.stop()
    status, free = server.process.returncode, port_is_free(host, port)
    finding = f"ended in {seconds:.1f} s (status {status}); its port is {'free' if free else 'taken'}"
    return Check("shutdown", PASS if status in (0, -15) and free else FAIL, finding)


def shut_down(running: Mapping[str, LocalServer]) -> pd.DataFrame:
    """`check_shutdown` of each server: columns ``server``, ``check``, ``verdict`` and ``finding``."""
    import pandas as pd

    return pd.DataFrame(
        [{"server": kind, **vars(check_shutdown(server))} for kind, server in running.items()]
    )


# ---- speed ----


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

    no_end: dict[str, Any] = {"ignore_eos": True}  # so that no answer ends early
    full = {"llama.cpp": no_end, "vLLM": no_end, "llama-cpp-python": {"min_tokens": n_tokens}}
    options = full.get(endpoint.facts.name, {})
    endpoint = dataclasses.replace(endpoint, stream=True)

    def ask(number: int) -> Reply:
        return endpoint.complete(f"{prompt}The key {number}", n_tokens, **options)

    ask(0)
    rows = []
    for n in clients:
        with ThreadPoolExecutor(n) as pool:
            started = time.perf_counter()
            replies = list(pool.map(ask, range(n * repetitions)))
            seconds = time.perf_counter() - started
        rows.append({"clients": n, **_speed_row(replies, seconds)})
    return pd.DataFrame(rows)


def _speed_row(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    tokens = sum(reply.n_tokens for reply in replies)
    first = [reply.first_seconds for reply in replies]
    timed = [r for r in replies if r.first_seconds == r.first_seconds and r.n_decoded and r.decode_seconds]
    return {
        "requests": len(replies),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_sec": tokens / seconds,
        "first_median": median(first),
        "first_max": max(first),
        "decode_median": median(r.decode_tokens_per_sec for r in timed) if timed else float("nan"),
        "counted_by": replies[0].counted_by,
    }


def speed_of_all(
    connected: Mapping[str, Endpoint],
    clients: Sequence[int] = CLIENTS,
    n_tokens: int = 48,
    repetitions: int = 2,
) -> pd.DataFrame:
    """`speed_by_clients` of each server in turn, in one frame with a column ``server`` in front."""
    import pandas as pd

    tables = [speed_by_clients(server, clients, n_tokens, repetitions) for server in connected.values()]
    return (
        pd.concat(tables, keys=list(connected), names=["server"]).reset_index("server").reset_index(drop=True)
    )


# ---- mistakes ----


def bad_input(endpoint: Endpoint) -> pd.DataFrame:
    """What a user's mistakes give: columns ``mistake``, ``error``, ``tries`` and ``message``.

    Raises:
        AssertionError: a mistake got an answer.
    """
    import pandas as pd

    quick = dataclasses.replace(endpoint, retries=1)
    key, url = endpoint.key.reveal(), endpoint.base_url
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        too_long = FILLER * ((endpoint.facts.n_ctx or 4096) // 4)
        mistakes: dict[str, Callable[[], object]] = {
            "a port where nothing listens": lambda: connect(nobody, retries=1),
            "a path of something else": lambda: connect(f"{url}/v2/blog", key=key, retries=1),
            "a model that is not there": lambda: connect(url, "gpt-oss-120b", key=key),
            "a prompt beyond the context": lambda: quick.complete(too_long, 4),
            "routing through an endpoint": lambda: check_in_process(endpoint, "routing"),
        }
        return pd.DataFrame([_mistake(name, make) for name, make in mistakes.items()])


def ask_stopped(endpoint: Endpoint) -> dict[str, Any]:
    """What asking a server that has ended gives, as a row of `bad_input`."""
    quick = dataclasses.replace(endpoint, retries=1)
    return _mistake("a server that has ended", lambda: quick.complete("The", 1))


def _mistake(name: str, make: Callable[[], object]) -> dict[str, Any]:
    try:
        answer = make()
    except EndpointError as error:
        tries = re.findall(r"asked (\d+) times", " ".join(getattr(error, "__notes__", [])))
        return {
            "mistake": name,
            "error": type(error).__name__,
            "tries": int(tries[0]) if tries else 1,
            "message": f"{error.what}; {error.hint}",
        }
    raise AssertionError(f"{name} got an answer: {answer!r}")
