"""What a user should know of a server before trusting its answers, found out by asking it."""

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

from dfqs_nb.core.machine import usable_cores
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.serve.client import Endpoint, Reply, check_in_process, connect, pick
from dfqs_nb.serve.measure import token_counter
from dfqs_nb.serve.servers import LocalServer, is_healthy, port_is_free, start
from dfqs_nb.serve.wire import (
    BrokenAnswerError,
    BusyError,
    ContextOverflowError,
    EndpointError,
    UnreachableError,
)

if TYPE_CHECKING:
    import pandas as pd

Work = TypeVar("Work")
Made = TypeVar("Made")
Finding = tuple[str, str]  # ``pass``, ``fail``, ``note`` or ``not measured``, and what was seen
PASS, FAIL, NOTE, UNSEEN = "pass", "fail", "note", "not measured"
PROMPTS = (
    "Tom is tall. Ann is small. Who is tall?",
    "The red key is in the box. The blue key is on the table. Where is the red key?",
    "Write a short story about a dog and a river.",
    "def add(a, b):",
)
CLIENTS = (1, 2, 4, 8)
N_CONCURRENT = 4  # requests at once for the check of determinism
TIMED_PROMPT = "The red key is kept in the old box. The blue key is kept in the new box. " * 2
MAX_TOKENS = 32
REPETITIONS = 4
LONGEST_TRIED = 65_536  # tokens of context that are filled to try them out
FILLER = "The dog slept near the fire. "
CACHE_PROMPT = (FILLER + "Rain fell softly on the roof. ") * 16


@dataclass(frozen=True)
class Subject:
    """What is checked: an endpoint; where they are here, the same file in this process, and our server."""

    endpoint: Endpoint
    model: Model | None = None
    server: LocalServer | None = None


# ---- the checks ----


def check_health(subject: Subject) -> Finding:
    """The server answers, to its health check and to a request of one token."""
    server = subject.server
    healthy = server is None or is_healthy(server)
    started = time.perf_counter()
    subject.endpoint.complete("The", 1)
    seconds = time.perf_counter() - started
    came_up = f"came up in {server.start_seconds:.1f} s; " if server else ""
    state = "healthy" if healthy else "not healthy"
    return PASS if healthy else FAIL, f"{came_up}{state}; one token in {seconds:.2f} s"


def check_name(subject: Subject) -> Finding:
    """What a wrong model name gets: a refusal is right, another model's answer is a trap."""
    endpoint = subject.endpoint
    listed = ", ".join(endpoint.facts.models)
    try:
        dataclasses.replace(endpoint, model=f"{endpoint.model}-that-is-not-there", retries=0).complete(
            "The", 1
        )
    except (BusyError, UnreachableError, BrokenAnswerError):
        raise
    except EndpointError as error:
        return PASS, f"lists {listed}; refuses another name ({type(error).__name__})"
    trap = "answers to any name, so a wrong one goes unnoticed unless the list is read first (connect does)"
    return NOTE, f"lists {listed}; {trap}"


def check_context(subject: Subject) -> Finding:
    """How many tokens it really takes: what it reports, and what it refuses."""
    endpoint, n_ctx = subject.endpoint, subject.endpoint.facts.n_ctx
    count, counted_by = token_counter(endpoint)
    if n_ctx is None or n_ctx > LONGEST_TRIED:
        return UNSEEN, f"reports {n_ctx}; not tried out"
    each = count(FILLER * 16) / 16
    fits, exceeds = FILLER * int((n_ctx - 24) / each - 1), FILLER * int(n_ctx / each + 2)
    endpoint.complete(fits, 4)
    try:
        endpoint.complete(exceeds, 4)
    except ContextOverflowError:
        takes = f"takes {count(fits):,} and refuses {count(exceeds):,} ({counted_by})"
        return PASS, f"reports {n_ctx:,}; {takes}"
    dropped = f"{count(exceeds):,} {counted_by} got an answer: part of such a prompt is dropped"
    return FAIL, f"reports {n_ctx:,}, but {dropped}"


def check_template(subject: Subject) -> Finding:
    """Whether its chat template gives the tokens that ours gives."""
    endpoint, model = subject.endpoint, subject.model
    if model is None or not model.header.get("tokenizer.chat_template"):
        return UNSEEN, "needs the model in this process, with a chat template"
    ours = chat_text(model, PROMPTS[0])
    n_ours = len(model.with_bos(model.tokenize(ours)))
    n_theirs = dataclasses.replace(endpoint, stream=False).chat(PROMPTS[0], 1).n_prompt
    page = endpoint.post("/apply-template", messages=[{"role": "user", "content": PROMPTS[0]}])
    shown = pick(page, "prompt", str) or ""
    before = ours.removesuffix(shown)  # some leave out a BOS, which they add as a token
    same = ours.endswith(shown) and len(model.tokenize(before)) <= 1
    text = "its text is not shown" if not shown else "the same text" if same else "another text"
    verdict = PASS if n_ours == n_theirs and text != "another text" else FAIL
    return verdict, f"{n_theirs} tokens, in process {n_ours}; {text}"


def check_repeated(subject: Subject) -> Finding:
    """Greedy answers to the same requests, one after another."""
    chat, n = subject.endpoint.chat, len(PROMPTS)
    texts = [{chat(prompt, MAX_TOKENS).text for _ in range(REPETITIONS)} for prompt in PROMPTS]
    n_same = sum(len(answers) == 1 for answers in texts)
    return (
        PASS if n_same == n else FAIL,
        f"{n_same} of {n} prompts: the same text {REPETITIONS} times in turn",
    )


def check_concurrent(subject: Subject) -> Finding:
    """Greedy answers to the same requests beside others: slots share batches, and batches change numbers."""
    n_other, n_asked = _differing(subject.endpoint, N_CONCURRENT)
    drift = max_drift(subject.endpoint, PROMPTS, N_CONCURRENT)
    moved = "" if drift is None else f"; log-probabilities moved by up to {drift:.1e}"
    finding = f"{n_other} of {n_asked} answers differ with {N_CONCURRENT} requests at once{moved}"
    return PASS if n_other == 0 else NOTE, finding


def check_cache(subject: Subject) -> Finding:
    """What reusing the last prompt's cache saves, and whether the text stays the same."""
    options: list[dict[str, Any]] = [{"cache_prompt": False}, {"cache_prompt": True}]
    can_switch = subject.endpoint.facts.name == "llama.cpp"
    seconds, texts = [], []
    for chosen in options if can_switch else [{}]:
        for _ in range(REPETITIONS):
            started = time.perf_counter()
            texts.append(subject.endpoint.complete(CACHE_PROMPT, 8, **chosen).text)
            seconds.append(time.perf_counter() - started)
    n_texts = len(set(texts))
    same = "the same text" if n_texts == 1 else f"{n_texts} different texts"
    if not can_switch:
        times = f"the same prompt took {seconds[0]:.3f} s, then {median(seconds[1:]):.3f} s"
        return NOTE if n_texts == 1 else FAIL, f"cannot be switched here; {times}, with {same}"
    off, on = median(seconds[1:REPETITIONS]), median(seconds[REPETITIONS + 1 :])
    finding = f"{off:.3f} s without, {on:.3f} s with it ({off / on:.1f} times as fast), with {same}"
    return PASS if n_texts == 1 else NOTE, f"the same prompt again: {finding}"


CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "health": check_health,
    "model name": check_name,
    "context length": check_context,
    "chat template": check_template,
    "same again": check_repeated,
    "same beside others": check_concurrent,
    "prompt cache": check_cache,
}


def check(name: str, subject: Subject) -> dict[str, str]:
    """One of `CHECKS`: ``check``, ``verdict`` and ``finding``. What stops it is a finding too."""
    try:
        verdict, finding = CHECKS[name](subject)
    except EndpointError as error:
        verdict, finding = FAIL, f"it stopped: {type(error).__name__}: {error.what}"
    return {"check": name, "verdict": verdict, "finding": finding}


def check_all(
    connected: Mapping[str, Endpoint],
    model: Model | None = None,
    running: Mapping[str, LocalServer] | None = None,
) -> pd.DataFrame:
    """All checks of each server: columns ``check``, ``server``, ``verdict`` and ``finding``.

    Args:
        model: the same file, open in this process, to compare the chat template with.
        running: the servers that are ours: their health is asked.
    """
    import pandas as pd

    running = running or {}
    threads = [server.settings.n_threads or 1 for server in running.values()]

    def rows(name: str) -> list[dict[str, str]]:
        subject = Subject(connected[name], model, running.get(name))
        return [check(chosen, subject) | {"server": name} for chosen in CHECKS]

    made = side_by_side(rows, connected, usable_cores() // max(threads, default=1))
    return pd.DataFrame([row for table in made for row in table])[["check", "server", "verdict", "finding"]]


def shut_down(running: Mapping[str, LocalServer]) -> pd.DataFrame:
    """Stop each server, and look whether anything of it is left: columns as `check_all` has them."""
    import pandas as pd

    rows = []
    for name, server in running.items():
        seconds = server.stop()
        status, free = server.process.returncode, port_is_free(*server.address)
        finding = f"ended in {seconds:.1f} s (status {status}); its port is {'free' if free else 'taken'}"
        rows.append((name, "shutdown", PASS if status in (0, -15) and free else FAIL, finding))
    return pd.DataFrame(rows, columns=["server", "check", "verdict", "finding"])


# ---- what requests beside others change ----


def side_by_side(work: Callable[[Work], Made], items: Iterable[Work], n_at_once: int) -> list[Made]:
    """The work done for each item, up to so many at once, in the order of the items."""
    with ThreadPoolExecutor(max(1, n_at_once)) as pool:
        return list(pool.map(work, items))


def _differing(endpoint: Endpoint, n_concurrent: int) -> tuple[int, int]:
    """How many greedy texts differ between asking alone and beside others, and how many were asked for."""

    def ask(prompt: str) -> str:
        return endpoint.chat(prompt, MAX_TOKENS).text

    alone = [ask(prompt) for prompt in PROMPTS] * n_concurrent
    beside = side_by_side(ask, PROMPTS * n_concurrent, n_concurrent)
    return sum(text != other for text, other in zip(alone, beside, strict=True)), len(alone)


def max_drift(
    endpoint: Endpoint, prompts: Sequence[str], n_concurrent: int, repetitions: int = 1
) -> float | None:
    """The largest change of a greedy token's log-probability between asking alone and beside others.

    It is taken up to where the tokens part; None where the server shows none, or stopped showing them.

    Args:
        repetitions: of asking beside others, because requests need not meet.
    """

    def ask(prompt: str) -> list[tuple[int, float]]:
        """Tokens and their log-probabilities, from llama.cpp's own path, which does not round them."""
        options = {"temperature": 0, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
        page = endpoint.post("/completion", prompt=prompt, n_predict=MAX_TOKENS, **options)
        tokens = pick(page, "completion_probabilities", list) or []
        return [(pick(token, "id", int) or 0, pick(token, "logprob", float) or 0.0) for token in tokens]

    alone = [ask(prompt) for prompt in prompts] if endpoint.facts.name == "llama.cpp" else [[]]
    if not all(alone):
        return None
    beside = side_by_side(ask, list(prompts) * n_concurrent * repetitions, n_concurrent)
    if not all(beside):
        return None
    return max(map(_drift, alone * n_concurrent * repetitions, beside))


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
    n_concurrent: int = N_CONCURRENT,
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
            differ, answers = _differing(endpoint, n_concurrent)
            drift = max_drift(endpoint, PROMPTS, n_concurrent, repetitions)
        shown = float("nan") if drift is None else drift
        return {"slots": n, "requests": n_concurrent, "drift": shown, "answers": answers, "differ": differ}

    return pd.DataFrame(side_by_side(measure, slots, usable_cores() // (settings.n_threads or 1)))


# ---- speed ----


def speed_of_all(
    connected: Mapping[str, Endpoint],
    clients: Sequence[int] = CLIENTS,
    n_tokens: int = 48,
    repetitions: int = 2,
) -> pd.DataFrame:
    """Speed of each server in turn under several clients at once, each sending one request after another.

    One row a server and number of clients, after a warm-up: ``server``, ``clients``, ``requests``, ``tokens``
    (of all answers), ``seconds``, ``tokens_per_sec`` (of all clients together), ``first_median``,
    ``first_max`` (seconds to the first piece), ``decode_median`` (tokens a second of one client, after its
    first piece; NaN where every answer came whole), ``counted_by``.

    Raises:
        EndpointError: a request failed for good.
    """
    import pandas as pd

    no_end: dict[str, Any] = {"ignore_eos": True}  # so that no answer ends early
    full = {"llama.cpp": no_end, "vLLM": no_end, "llama-cpp-python": {"min_tokens": n_tokens}}
    rows = []
    for name, endpoint in connected.items():
        streaming = dataclasses.replace(endpoint, stream=True)

        def ask(number: int, server: Endpoint = streaming) -> Reply:
            options = full.get(server.facts.name, {})
            return server.complete(f"{TIMED_PROMPT}The key {number}", n_tokens, **options)

        ask(0)
        for n in clients:
            started = time.perf_counter()
            replies = side_by_side(ask, range(n * repetitions), n)
            seconds, tokens = time.perf_counter() - started, sum(reply.n_tokens for reply in replies)
            first = pd.Series([reply.first_seconds for reply in replies])
            decoding = [r.decode_tokens_per_sec for r in replies if r.n_decoded and r.decode_seconds]
            row = {"server": name, "clients": n, "requests": len(replies), "tokens": tokens}
            row |= {"seconds": seconds, "tokens_per_sec": tokens / seconds}
            row |= {"first_median": first.median(), "first_max": first.max()}
            row |= {"decode_median": median(decoding) if decoding else float("nan")}
            rows.append(row | {"counted_by": replies[0].counted_by})
    return pd.DataFrame(rows)


# ---- mistakes ----


def bad_input(endpoint: Endpoint) -> pd.DataFrame:
    """What a user's mistakes give: columns ``mistake``, ``error``, ``tries`` and ``message``.

    Raises:
        AssertionError: a mistake got an answer.
    """
    import pandas as pd

    key, url = endpoint.wire.key.get_secret_value(), endpoint.base_url
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        too_long = FILLER * ((endpoint.facts.n_ctx or 4096) // 4)
        mistakes: dict[str, Callable[[], object]] = {
            "a port where nothing listens": lambda: connect(nobody, retries=1),
            "a path of something else": lambda: connect(f"{url}/v2/blog", key=key, retries=1),
            "a model that is not there": lambda: connect(url, "gpt-oss-120b", key=key),
            "a prompt beyond the context": lambda: endpoint.complete(too_long, 4),
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
