"""Checks of a server, to run before you trust its answers: planned first, and cut to a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dfqs_nb.core.budget import Fitted, duration, fit
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import probe
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve.client import Endpoint, Reply, pick
from dfqs_nb.serve.measure import comparison_table, counted, token_counter
from dfqs_nb.serve.servers import LocalServer
from dfqs_nb.serve.wire import ContextOverflowError, EndpointError

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
N_CONCURRENT = 4  # requests at once for the check of determinism
TIMED_PROMPT = "The red key is kept in the old box. The blue key is kept in the new box. " * 2
MAX_TOKENS, REPETITIONS = 32, 4
LONGEST_TRIED = 65_536  # tokens of context that are filled to try them out
FILLER = "The dog slept near the fire. "


# ---- the plan ----

N_SERVERS = 3
CHECK_TOKENS = 2 * (4 + 1 + 4) * 4 * 32  # of the answers of one server's checks
# What a plan that exceeds its budget gives up, in this order.
CUTS: tuple[dict[str, int], ...] = (
    {"items": 4},
    {"clients": 1, "tokens": 16},
    {"items": 2, "answered": 64},
    {"checked": 8, "filled": 0},
    {"items": 1, "sets": 1, "tokens": 4, "answered": 16},
)
NAMES = {
    "items": "questions of a set asked both ways",
    "clients": "numbers of clients",
    "tokens": "timed tokens of an answer",
    "answered": "tokens of an answer to a question",
    "sets": "question sets",
    "checked": "tokens of an answer that is checked",
    "filled": "tokens of context tried out",
}


def plan_checks(
    path: str | Path,
    settings: OpenSettings,
    sets: Sequence[ItemSet],
    *,
    items: int,
    clients: Sequence[int],
    tokens: int,
    seconds: float,
) -> Fitted:
    """Time a few tokens, and cut what is planned in the order of `CUTS` to what these seconds hold.

    ``values`` of the result has the keys of `NAMES`. Every check is made, the last ones with shorter answers
    and without filling the context. ``items`` 0: all questions.
    """
    started = time.perf_counter()
    with open_model(path, settings) as model:
        load = time.perf_counter() - started  # with its trial in a child: a server starts no faster
        pace = probe(model)

    def cost(plan: dict[str, int]) -> float:
        share = plan["checked"] / MAX_TOKENS
        checks = load + pace.seconds(plan["filled"], CHECK_TOKENS * share)
        answers = sum(
            pace.seconds(len(item.prompt) / 4 + 16, min(item_set.max_tokens, plan["answered"]))
            for item_set in sets[: plan["sets"]]
            for item in item_set.items[: plan["items"]]
        )
        speeds = N_SERVERS * 2 * sum(clients[: plan["clients"]]) * pace.seconds(64, plan["tokens"])
        explained = N_SERVERS * answers  # this process answers again where a server's text differs
        return N_SERVERS * checks + (N_SERVERS + 1) * answers + explained + load + speeds

    whole = {"items": items or max(len(item_set.items) for item_set in sets), "clients": len(clients)}
    whole |= {"sets": len(sets), "tokens": tokens}
    whole |= {"answered": max(item_set.max_tokens for item_set in sets)}
    whole |= {"checked": MAX_TOKENS, "filled": min(settings.n_ctx, LONGEST_TRIED)}
    return fit(whole, CUTS, cost, seconds, NAMES)


def plan_sentence(plan: Fitted) -> str:
    """The plan of `plan_checks` in a sentence."""
    cut = f" Cut to keep to the budget: {'; '.join(plan.left_out)}." if plan.left_out else ""
    return f"At most about {duration(plan.seconds)}, if every answer has its full length.{cut}"


def planned_sets(sets: Sequence[ItemSet], plan: Fitted) -> list[ItemSet]:
    """The sets as `plan_checks` has them: so many, with answers of so many tokens."""
    most = plan.values["answered"]
    return [replace(each, max_tokens=min(each.max_tokens, most)) for each in sets[: plan.values["sets"]]]


# ---- one server at a time ----


@dataclass(frozen=True)
class Subject:
    """An endpoint to check; if this machine has them, the same file in this process, and our server."""

    endpoint: Endpoint
    model: Model | None = None
    server: LocalServer | None = None
    n_tokens: int = MAX_TOKENS  # of an answer
    longest_tried: int = LONGEST_TRIED  # tokens of context that are filled

    def answer(self, prompt: str) -> str:
        """The greedy answer to a chat."""
        return self.endpoint.chat(prompt, self.n_tokens).text


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
    answers = [{subject.answer(prompt) for _ in range(REPETITIONS)} for prompt in PROMPTS]
    n_same = sum(len(texts) == 1 for texts in answers)
    finding = f"{n_same} of {n} prompts: the same text {REPETITIONS} times in turn"
    return PASS if n_same == n else FAIL, finding


def _concurrent(subject: Subject) -> Finding:
    """Send the same requests at once: slots share batches, and batches change numbers."""
    asked = PROMPTS * N_CONCURRENT
    alone = [subject.answer(prompt) for prompt in PROMPTS] * N_CONCURRENT
    beside = side_by_side(subject.answer, asked, N_CONCURRENT)
    n_other = sum(text != other for text, other in zip(alone, beside, strict=True))
    finding = f"{n_other} of {len(alone)} answers differ with {N_CONCURRENT} requests at once"
    ask = partial(_scored, subject.endpoint, subject.n_tokens)
    scored = side_by_side(ask, PROMPTS, 1) * N_CONCURRENT, side_by_side(ask, asked, N_CONCURRENT)
    moved = [_moved(*pair) for pair in zip(*scored, strict=True) if all(pair)]
    if moved:
        finding += f"; log-probabilities move by up to {max(moved):.2g}"
    return NOTE if n_other or any(moved) else PASS, finding


Scored = Sequence[tuple[int, float]]  # the tokens of a greedy answer, and their log-probabilities


def _scored(endpoint: Endpoint, n_tokens: int, prompt: str) -> Scored:
    """An answer from llama.cpp's own path, which does not round; empty where there is no such path."""
    if endpoint.facts.name != "llama.cpp":
        return []
    options = {"temperature": 0, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
    page = endpoint.post("/completion", prompt=prompt, n_predict=n_tokens, **options)
    tokens = pick(page, "completion_probabilities", list) or []
    return [(pick(token, "id", int) or 0, pick(token, "logprob", float) or 0.0) for token in tokens]


def _moved(alone: Scored, beside: Scored) -> float:
    """The largest difference of log-probabilities while the tokens are the same.

    >>> _moved([(1, -0.5), (2, -0.1), (3, -0.2)], [(1, -0.25), (2, -0.1), (4, -9.0)])
    0.25
    """
    same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(alone, beside, strict=False))
    return max((abs(ours[1] - theirs[1]) for ours, theirs in same), default=0.0)


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

    stopped, rows = {} if stopped is None else stopped, list[tuple[Any, ...]]()
    for name, endpoint in connected.items():
        if name in stopped:
            continue
        ask = partial(_timed, replace(endpoint, stream=True), n_tokens)
        try:
            ask(0)
            for n in clients:
                started = time.perf_counter()
                replies = side_by_side(ask, range(n * repetitions), n)
                seconds, tokens = time.perf_counter() - started, sum(reply.n_tokens for reply in replies)
                first = pd.Series([reply.first_seconds for reply in replies])
                speed = (tokens, seconds, tokens / seconds, first.median(), first.max())
                rows.append((name, n, len(replies), *speed))
        except EndpointError as error:
            stopped[name] = error.what
    columns = "server clients requests tokens seconds tokens_per_sec first_median first_max"
    return pd.DataFrame(rows, columns=columns.split())


def _timed(endpoint: Endpoint, n_tokens: int, number: int) -> Reply:
    """An answer of its full length."""
    no_end: dict[str, Any] = {"ignore_eos": True}
    full = {"llama.cpp": no_end, "vLLM": no_end, "llama-cpp-python": {"min_tokens": n_tokens}}
    options = full.get(endpoint.facts.name, {})
    return endpoint.complete(f"{TIMED_PROMPT}The key {number}", n_tokens, **options)


# ---- what the notebook hands on ----


def hand_on(
    stage: Stage,
    *,
    items: pd.DataFrame,
    connected: Mapping[str, Endpoint],
    running: Mapping[str, LocalServer],
    recipes: Sequence[str],
    stopped: Mapping[str, str],
    **tables: pd.DataFrame,
) -> list[str]:
    """Write ``serving.json``, and return its summary lines; what each of our servers loaded is in it.

    ``items``: of `measure.compare_all`. ``tables``: ``checks``, ``speeds`` and ``shutdown``.
    """
    tables["comparisons"] = comparison_table(items)
    by_server = tables["checks"].groupby("server", sort=False)
    lines = [f"{name}: {len(rows)} checks: {counted(rows['verdict'])}" for name, rows in by_server]
    for row in tables["comparisons"].itertuples():
        why = "" if row.causes == "none" else f" ({row.causes})"
        same = f"{row.same_text} of {row.items} answers of {row.set}"
        lines.append(f"{row.server}: {same} are those of this process{why}")
    gone = "its server stopped, and was not measured to the end"
    lines += [f"{name}: {gone}: {why}" for name, why in stopped.items()]
    for name, rows in tables["speeds"].groupby("server", sort=False):
        ends = rows.iloc[[0, -1]].drop_duplicates("clients")
        parts = [
            f"{row.tokens_per_sec:,.0f} tokens/s for {row.clients} client{'s' * (row.clients > 1)} "
            f"({row.requests} requests, {row.tokens:,} tokens)"
            for row in ends.itertuples()
        ]
        lines.append(f"{name}: {', '.join(parts)}")
    ended = tables["shutdown"]["verdict"]
    lines.append(f"shutdown: {len(ended)} checks: {counted(ended)}")
    stage.finish(
        conditions={name: endpoint.conditions() for name, endpoint in connected.items()},
        summary=lines,
        model=stage.model,
        recipes=list(recipes),
        loaded={name: server.loaded for name, server in running.items()},
        **{name: frame.to_dict("records") for name, frame in tables.items()},
    )
    return lines
