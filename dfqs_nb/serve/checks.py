"""Checks of a server, to run before you trust its answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.prompts import load_prompts
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.serve.client import Endpoint, Reply, pick
from dfqs_nb.serve.measure import token_counter
from dfqs_nb.serve.servers import LocalServer, start
from dfqs_nb.serve.wire import ContextOverflowError, EndpointError
from dfqs_nb.stats import at_most

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
OTHERS = (0, 1, 3, 7)  # clients beside the one that is looked at, as in notebook 04's loads; 0: alone again
TEXT_CHARACTERS = 240  # of each text under load
TIMED_PROMPT = "The red key is kept in the old box. The blue key is kept in the new box. " * 2
MAX_TOKENS, REPETITIONS = 32, 4
LONGEST_TRIED = 65_536  # tokens of context that are filled to try them out
FILLER = "The dog slept near the fire. "


@dataclass(frozen=True)
class Subject:
    """An endpoint to check; if this machine has them, the same file in this process, and our server."""

    endpoint: Endpoint
    model: Model | None = None
    server: LocalServer | None = None
    n_tokens: int = MAX_TOKENS  # of an answer
    longest_tried: int = LONGEST_TRIED  # tokens of context that are filled


def _health(subject: Subject) -> Finding:
    """Ask for the server's health, and for one token."""
    server, started = subject.server, time.perf_counter()
    came_up = f"came up in {server.start_seconds:.1f} s; " if server else ""
    subject.endpoint.complete("The", 1)
    state, verdict = ("not healthy", FAIL) if server and not server.healthy else ("healthy", PASS)
    return verdict, f"{came_up}{state}; one token in {time.perf_counter() - started:.2f} s"


def _name(subject: Subject) -> Finding:
    """Send a wrong model name: a refusal is right, another model's answer is a trap."""
    endpoint, lists = subject.endpoint, f"lists {', '.join(subject.endpoint.facts.models)}; "
    try:
        replace(endpoint, model=f"{endpoint.model}-that-is-not-there", retries=0).complete("The", 1)
    except EndpointError as error:
        if error.temporary:
            raise
        return PASS, f"{lists}refuses another name ({type(error).__name__})"
    trap = "answers to any name, so a wrong one goes unnoticed unless the list is read first (connect does)"
    return NOTE, lists + trap


def _context(subject: Subject) -> Finding:
    """Fill the context that the server reports, then exceed it: it must refuse."""
    endpoint, n_ctx = subject.endpoint, subject.endpoint.facts.n_ctx
    count, counted_by = token_counter(endpoint)
    if n_ctx is None or n_ctx > subject.longest_tried:
        return UNSEEN, f"reports {n_ctx}; not tried out"
    each = max(1, count(FILLER * 16) / 16)  # fewer than a token a sentence is no honest count
    fits, exceeds = FILLER * int((n_ctx - 24) / each - 1), FILLER * int(n_ctx / each + 2)
    for _ in range(16):
        if (n_exceeds := count(exceeds)) > n_ctx + 8:
            break
        exceeds += FILLER * (2 + len(exceeds) // len(FILLER) // 16)  # a long text can take fewer a sentence
    else:
        return UNSEEN, f"reports {n_ctx:,}; counts only {n_exceeds:,} tokens in {len(exceeds):,} characters"
    n_fits = count(fits)
    endpoint.complete(fits, 4)
    try:
        endpoint.complete(exceeds, 4)
    except ContextOverflowError:
        return PASS, f"reports {n_ctx:,}; takes {n_fits:,} and refuses {n_exceeds:,} ({counted_by})"
    dropped = f"{n_exceeds:,} {counted_by} got an answer: part of such a prompt is dropped"
    return FAIL, f"reports {n_ctx:,}, but {dropped}"


def _template(subject: Subject) -> Finding:
    """Compare the server's prompt with ours, token by token."""
    endpoint, model = subject.endpoint, subject.model
    if model is None:
        return UNSEEN, "needs the model in this process"
    ours = chat_text(model, PROMPTS[0])
    n_ours = len(model.with_bos(model.tokenize(ours)))
    n_theirs = replace(endpoint, stream=False).chat(PROMPTS[0], 1).n_prompt
    if not model.has_template:
        counts = f"{n_theirs} tokens, in process {n_ours}"
        return NOTE, f"the file has none, so a chat gets the server's own: {counts}. Questions go as text"
    page = endpoint.post("/apply-template", messages=[{"role": "user", "content": PROMPTS[0]}])
    shown = pick(page, "prompt", str) or ""
    before = ours.removesuffix(shown)  # some leave out a BOS, which they add as a token
    same = ours.endswith(shown) and len(model.tokenize(before)) <= 1
    text = "its text is not shown" if not shown else "the same text" if same else "another text"
    verdict = PASS if n_ours == n_theirs and text != "another text" else FAIL
    return verdict, f"{n_theirs} tokens, in process {n_ours}; {text}"


def _repeated(subject: Subject) -> Finding:
    """Send the same greedy requests one after another."""
    n = len(PROMPTS)
    answers = [{_answer(subject, prompt) for _ in range(REPETITIONS)} for prompt in PROMPTS]
    n_same = sum(len(texts) == 1 for texts in answers)
    return (
        PASS if n_same == n else FAIL,
        f"{n_same} of {n} prompts: the same text {REPETITIONS} times in turn",
    )


def _concurrent(subject: Subject) -> Finding:
    """Send the same requests at once: slots share batches, and batches change numbers."""
    ask = partial(_answer, subject)
    alone = [ask(prompt) for prompt in PROMPTS] * N_CONCURRENT
    beside = side_by_side(ask, PROMPTS * N_CONCURRENT, N_CONCURRENT)
    n_other = sum(text != other for text, other in zip(alone, beside, strict=True))
    finding = f"{n_other} of {len(alone)} answers differ with {N_CONCURRENT} requests at once"
    return NOTE if n_other else PASS, finding


def _answer(subject: Subject, prompt: str) -> str:
    return subject.endpoint.chat(prompt, subject.n_tokens).text


CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "health": _health,
    "model name": _name,
    "context length": _context,
    "chat template": _template,
    "same again": _repeated,
    "same beside others": _concurrent,
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
    model: Model,
    running: Mapping[str, LocalServer],
    *,
    n_tokens: int = MAX_TOKENS,
    longest_tried: int = LONGEST_TRIED,
) -> pd.DataFrame:
    """All checks of each server: ``check``, ``server``, ``verdict`` and ``finding``; see `Subject`."""
    import pandas as pd

    n_threads = max((server.settings.n_threads or 1 for server in running.values()), default=1)

    def rows(name: str) -> list[dict[str, str]]:
        subject = Subject(connected[name], model, running.get(name), n_tokens, longest_tried)
        return [check(chosen, subject) | {"server": name} for chosen in CHECKS]

    made = sum(side_by_side(rows, connected, usable_cores() // n_threads), [])
    return pd.DataFrame(made)[["check", "server", "verdict", "finding"]]


def shut_down(running: Mapping[str, LocalServer]) -> pd.DataFrame:
    """Stop each server, and check that its process and port are gone: columns as `check_all` has them."""
    import pandas as pd

    rows = []
    for name, server in running.items():
        seconds, free = server.stop(), server.port_is_free
        status = server.process.returncode
        finding = f"ended in {seconds:.1f} s (status {status}); its port is {'free' if free else 'taken'}"
        rows.append((name, "shutdown", PASS if status in (0, -15) and free else FAIL, finding))
    return pd.DataFrame(rows, columns=["server", "check", "verdict", "finding"])


# ---- what requests beside others change, and gain ----


def side_by_side(work: Callable[[Work], Made], items: Iterable[Work], n_at_once: int) -> list[Made]:
    """Do the work for each item, up to ``n_at_once`` at a time; results in the order of the items."""
    with ThreadPoolExecutor(max(1, n_at_once)) as pool:
        return list(pool.map(work, items))


Scored = Sequence[tuple[int, float]]  # the tokens of a greedy answer, and their log-probabilities


def _scored(text: str, endpoint: Endpoint, n_tokens: int) -> Scored:
    """An answer from llama.cpp's own path, which does not round."""
    options = {"temperature": 0, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
    page = endpoint.post("/completion", prompt=text, n_predict=n_tokens, **options)
    tokens = pick(page, "completion_probabilities", list)
    if not tokens:
        what, hint = "the server shows no log-probabilities", "the same call asks again"
        raise EndpointError(what, where=endpoint.base_url, hint=hint)
    return [(pick(token, "id", int) or 0, pick(token, "logprob", float) or 0.0) for token in tokens]


def _drift(alone: Scored, beside: Scored) -> float:
    """The largest difference of log-probabilities while the tokens are the same.

    >>> _drift([(1, -0.5), (2, -0.1), (3, -0.2)], [(1, -0.25), (2, -0.1), (4, -9.0)])
    0.25
    """
    same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(alone, beside, strict=False))
    return max((abs(ours[1] - theirs[1]) for ours, theirs in same), default=float("inf"))


def under_load(
    path: str | Path,
    settings: OpenSettings,
    others: Sequence[int] = OTHERS,
    n_tokens: int = MAX_TOKENS,
    n_texts: int | None = None,
) -> pd.DataFrame:
    """Send notebook 04's texts to llama.cpp's server, alone and while other clients send requests too.

    One row a load: first with one slot, where requests wait for each other; then with a slot for each client.
    Columns ``slots``, ``others`` (clients beside; 0: alone again), ``texts``, ``drift`` (largest change of a
    log-probability, up to where an answer parts), ``moved`` and ``differ`` (texts whose log-probabilities,
    and whose answer, change), ``bound`` (exact 95 % upper bound on the rate of texts whose answer changes),
    ``changed`` (their names). An `EndpointError`: the server shows no log-probabilities.
    """
    import pandas as pd

    stored = (load_prompts("routing-texts").model_extra or {})["texts"][:n_texts]
    texts = {text["name"]: text["text"][:TEXT_CHARACTERS] for text in stored}

    def measure(slots: int, loads: Sequence[int]) -> list[dict[str, Any]]:
        with start("llama.cpp", path, settings, n_parallel=slots) as server:
            ask = partial(_scored, endpoint=server.connect(), n_tokens=n_tokens)
            alone, *beside = (side_by_side(ask, texts.values(), n + 1) for n in (0, *loads))
        rows = zip(loads, beside, strict=True)
        return [{"slots": slots, "others": n, **_compared(list(texts), alone, load)} for n, load in rows]

    plans = [(1, [N_CONCURRENT - 1]), (max(others) + 1, others)]
    rows = side_by_side(lambda plan: measure(*plan), plans, usable_cores() // (settings.n_threads or 1))
    return pd.DataFrame(sum(rows, []))


def _compared(names: Sequence[str], alone: Sequence[Scored], beside: Sequence[Scored]) -> dict[str, Any]:
    """The effect of one load: the columns of `under_load` from ``texts`` on."""
    drifts = np.array(list(map(_drift, alone, beside)))
    pairs = zip(names, alone, beside, strict=True)
    changed = [name for name, a, b in pairs if [token for token, _ in a] != [token for token, _ in b]]
    return {
        "texts": len(names),
        "drift": float(drifts[np.isfinite(drifts)].max(initial=0.0)),
        "moved": int((drifts > 0).sum()),
        "differ": len(changed),
        "bound": at_most(len(changed), len(names)),
        "changed": ", ".join(changed),
    }


def load_sentence(table: pd.DataFrame) -> str:
    """The result of `under_load` in a sentence, for the server with a slot for each client."""
    rows = table[table["slots"] > 1]
    beside = rows[rows["others"] > 0]
    n, names = int(rows["texts"].iloc[0]), {name for cell in beside["changed"] for name in cell.split(", ")}
    changed, sizes = len(names - {""}), [str(size) for size in beside["others"]]
    company = " or ".join(filter(None, (", ".join(sizes[:-1]), sizes[-1])))
    again = "".join(f"; alone again by {row.drift:.2g}" for row in rows[rows["others"] == 0].itertuples())
    return (
        f"llama.cpp's server beside {company} other clients: log-probabilities of up to "
        f"{beside['moved'].max()} of {n} texts move, by up to {beside['drift'].max():.2g} (with one slot by "
        f"{table.loc[table['slots'] == 1, 'drift'].max():.2g}{again}); {changed} of {n} answers change (95 % "
        f"upper bound: {at_most(changed, n):.0%} of texts)"
    )


def speed_of_all(
    connected: Mapping[str, Endpoint],
    clients: Sequence[int],
    n_tokens: int = 48,
    repetitions: int = 2,
    stopped: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Speed of each server in turn under several clients at once, each sending one request after another.

    One row a server and number of clients, after a warm-up; ``tokens`` and ``tokens_per_sec`` are of all
    clients together, ``first_median`` and ``first_max`` the seconds to the first piece. ``stopped``: servers
    that failed for good, with the reason. They are not asked, and more are added.
    """
    import pandas as pd

    stopped = {} if stopped is None else stopped
    rows: list[tuple[Any, ...]] = []

    def measure(name: str, endpoint: Endpoint, n: int) -> None:
        started = time.perf_counter()
        replies = side_by_side(lambda number: _timed(endpoint, number, n_tokens), range(n * repetitions), n)
        seconds, tokens = time.perf_counter() - started, sum(reply.n_tokens for reply in replies)
        first = pd.Series([reply.first_seconds for reply in replies])
        rows.append((name, n, len(replies), tokens, seconds, tokens / seconds, first.median(), first.max()))

    for name in [name for name in connected if name not in stopped]:
        try:
            _timed(connected[name], 0, n_tokens)
            for n in clients:
                measure(name, connected[name], n)
        except EndpointError as error:
            stopped[name] = error.what
    columns = "server clients requests tokens seconds tokens_per_sec first_median first_max"
    return pd.DataFrame(rows, columns=columns.split())


def _timed(endpoint: Endpoint, number: int, n_tokens: int) -> Reply:
    """An answer of its full length, in pieces."""
    no_end: dict[str, Any] = {"ignore_eos": True}
    full = {"llama.cpp": no_end, "vLLM": no_end, "llama-cpp-python": {"min_tokens": n_tokens}}
    options = full.get(endpoint.facts.name, {})
    return replace(endpoint, stream=True).complete(f"{TIMED_PROMPT}The key {number}", n_tokens, **options)
