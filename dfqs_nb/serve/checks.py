"""Checks of a server, to run before you trust its answers: planned first, and cut to a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, TypeVar

from dfqs_nb.core import budget
from dfqs_nb.core.budget import Fitted, fit
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import probe
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve.client import Endpoint, Reply, continuation
from dfqs_nb.serve.measure import comparison_table, counted, shown_chat, token_counter
from dfqs_nb.serve.servers import LocalServer
from dfqs_nb.serve.wire import ContextOverflowError, EndpointError, TemporaryError

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
N_CHECKED = 2 * (REPETITIONS + 1 + N_CONCURRENT) * len(PROMPTS)  # answers of one server's checks
# What a plan that exceeds its budget gives up, in this order.
CUTS: tuple[dict[str, int], ...] = (
    {"items": 4},
    {"clients": 1, "tokens": 64},
    {"items": 2, "filled": 0},
    {"items": 1, "sets": 1, "tokens": 8},
)
NAMES = {
    "items": "questions of a set asked both ways",
    "sets": "question sets",
    "clients": "numbers of clients",
    "tokens": "tokens of an answer",
    "filled": "tokens of context tried out",
}


def plan_checks(
    model: Model,
    sets: Sequence[ItemSet],
    *,
    items: int,
    clients: Sequence[int],
    tokens: int,
    seconds: float,
) -> tuple[list[ItemSet], Fitted]:
    """Time a few tokens, and cut what is planned in the order of `CUTS` to what these seconds hold.

    ``items``: questions of a set, 0: all. ``tokens``: of an answer that is timed. Returns the sets as cut,
    and the plan, whose ``values`` have the keys of `NAMES`. Every check is made.
    """
    pace = probe(model)

    def cut(plan: Mapping[str, int]) -> list[ItemSet]:
        chosen = sets[: plan["sets"]]
        return [replace(each, max_tokens=min(each.max_tokens, plan["tokens"])) for each in chosen]

    def cost(plan: Mapping[str, int]) -> float:
        checks = model.load_seconds + pace.seconds(
            plan["filled"], N_CHECKED * min(MAX_TOKENS, plan["tokens"])
        )
        answers = sum(
            pace.seconds(len(item.prompt) / 4 + 16, item_set.max_tokens)
            for item_set in cut(plan)
            for item in item_set.items[: plan["items"]]
        )
        speeds = 2 * sum(clients[: plan["clients"]]) * pace.seconds(64, min(tokens, plan["tokens"]))
        # this process answers, too, and again where a server's text differs
        return answers + N_SERVERS * (checks + 2 * answers + speeds)

    whole = {"items": items or max(len(item_set.items) for item_set in sets), "sets": len(sets)}
    whole |= {"clients": len(clients), "tokens": max(item_set.max_tokens for item_set in sets)}
    whole |= {"filled": min(model.settings.n_ctx, LONGEST_TRIED)}
    plan = fit(whole, CUTS, cost, seconds, NAMES)
    return cut(plan.values), plan


# ---- one server at a time ----


@dataclass(frozen=True)
class Checks:
    """The checks of one endpoint, a method each.

    ``model``, ``server``: the same file in this process, and our server, where this machine has them.
    """

    endpoint: Endpoint
    model: Model | None = None
    server: LocalServer | None = None
    n_tokens: int = MAX_TOKENS  # of an answer
    longest_tried: int = LONGEST_TRIED  # tokens of context that are filled

    def run(self, check: Callable[[Checks], Finding]) -> dict[str, str]:
        """A check's ``check``, ``verdict`` and ``finding``. What stops it is a finding too."""
        try:
            verdict, finding = check(self)
        except EndpointError as error:
            verdict, finding = FAIL, f"it stopped: {error.what}"
        return {"check": check.__name__.replace("_", " "), "verdict": verdict, "finding": finding}

    def answer(self, prompt: str) -> str:
        """The greedy answer to a chat."""
        return self.endpoint.chat(prompt, self.n_tokens).text

    def health(self) -> Finding:
        """Ask for the server's health, and for one token."""
        server, started = self.server, time.perf_counter()
        came_up = f"came up in {server.start_seconds:.1f} s; " if server else ""
        self.endpoint.complete("The", 1)
        state, verdict = ("not healthy", FAIL) if server and not server.healthy else ("healthy", PASS)
        return verdict, f"{came_up}{state}; one token in {time.perf_counter() - started:.2f} s"

    def model_name(self) -> Finding:
        """Send a wrong model name: a refusal is right, another model's answer is a trap."""
        endpoint, lists = self.endpoint, f"lists {', '.join(self.endpoint.models)}; "
        try:
            replace(endpoint, model=f"{endpoint.model}-that-is-not-there", retries=0).complete("The", 1)
        except TemporaryError:
            raise
        except EndpointError:
            return PASS, f"{lists}refuses another name"
        return NOTE, f"{lists}answers to any name, so read the list first (connect does)"

    def context_length(self) -> Finding:
        """Fill the context that the server reports, then exceed it: it must refuse."""
        endpoint, n_ctx = self.endpoint, self.endpoint.n_ctx
        if n_ctx is None or n_ctx > self.longest_tried:
            return UNSEEN, f"reports {n_ctx}; not tried out"
        count, counted_by = token_counter(endpoint)
        each = max(1, count(FILLER * 16) / 16)  # fewer than a token a sentence is no honest count
        fits, exceeds = FILLER * int((n_ctx - 24) / each - 1), FILLER * int(n_ctx / each * 1.1 + 8)
        n_fits, n_exceeds = count(fits), count(exceeds)
        if n_exceeds <= n_ctx + 8:
            return (
                UNSEEN,
                f"reports {n_ctx:,}; counts only {n_exceeds:,} tokens in {len(exceeds):,} characters",
            )
        endpoint.complete(fits, 4)
        try:
            endpoint.complete(exceeds, 4)
        except ContextOverflowError:
            return PASS, f"reports {n_ctx:,}; takes {n_fits:,} and refuses {n_exceeds:,} ({counted_by})"
        dropped = f"{n_exceeds:,} {counted_by} got an answer: part of such a prompt is dropped"
        return FAIL, f"reports {n_ctx:,}, but {dropped}"

    def chat_template(self) -> Finding:
        """Compare the server's prompt with ours, token by token."""
        endpoint, model = self.endpoint, self.model
        if model is None:
            return UNSEEN, "needs the model in this process"
        ours = chat_text(model, PROMPTS[0])
        n_ours = len(model.with_bos(model.tokenize(ours)))
        n_theirs = endpoint.chat(PROMPTS[0], 1).n_prompt
        if not model.has_template:
            counts = f"{n_theirs} tokens, in process {n_ours}"
            return NOTE, f"the file has none, so a chat gets the server's own: {counts}. Questions go as text"
        shown = shown_chat(endpoint, PROMPTS[0])
        before = ours.removesuffix(shown)  # some leave out a BOS, which they add as a token
        same = ours.endswith(shown) and len(model.tokenize(before)) <= 1
        text = "its text is not shown" if not shown else "the same text" if same else "another text"
        verdict = PASS if n_ours == n_theirs and text != "another text" else FAIL
        return verdict, f"{n_theirs} tokens, in process {n_ours}; {text}"

    def same_again(self) -> Finding:
        """Send the same greedy requests one after another."""
        n = len(PROMPTS)
        answers = [{self.answer(prompt) for _ in range(REPETITIONS)} for prompt in PROMPTS]
        n_same = sum(len(texts) == 1 for texts in answers)
        finding = f"{n_same} of {n} prompts: the same text {REPETITIONS} times in turn"
        return PASS if n_same == n else FAIL, finding

    def same_beside_others(self) -> Finding:
        """Send the same requests at once: slots share batches, and batches change numbers."""
        asked = PROMPTS * N_CONCURRENT
        alone = [self.answer(prompt) for prompt in PROMPTS] * N_CONCURRENT
        beside = side_by_side(self.answer, asked, N_CONCURRENT)
        n_other = sum(text != other for text, other in zip(alone, beside, strict=True))
        finding, moved = f"{n_other} of {len(alone)} answers differ with {N_CONCURRENT} requests at once", 0.0
        with suppress(EndpointError):  # many servers give no log-probabilities
            ask = partial(continuation, replace(self.endpoint, retries=0), n_tokens=self.n_tokens)
            scored = side_by_side(ask, PROMPTS, 1) * N_CONCURRENT, side_by_side(ask, asked, N_CONCURRENT)
            for pair in zip(*scored, strict=True):
                same = takewhile(
                    lambda steps: steps[0]["token"] == steps[1]["token"], zip(*pair, strict=False)
                )
                moved = max(moved, *(abs(ours["logprob"] - theirs["logprob"]) for ours, theirs in same), 0.0)
            finding += f"; log-probabilities move by up to {moved:.2g}"
        return NOTE if n_other or moved else PASS, finding


CHECKS = [Checks.health, Checks.model_name, Checks.context_length, Checks.chat_template]
CHECKS += [Checks.same_again, Checks.same_beside_others]


def check_all(
    connected: Mapping[str, Endpoint],
    model: Model,
    running: Mapping[str, LocalServer],
    *,
    n_tokens: int = MAX_TOKENS,
    longest_tried: int = LONGEST_TRIED,
) -> pd.DataFrame:
    """All checks of each server: ``check``, ``server``, ``verdict`` and ``finding``; see `Checks`."""
    import pandas as pd

    n_threads = max((server.settings.n_threads or 1 for server in running.values()), default=1)

    def rows(name: str) -> list[dict[str, str]]:
        most = min(n_tokens, MAX_TOKENS)
        checks = Checks(connected[name], model, running.get(name), most, longest_tried)
        return [checks.run(check) | {"server": name} for check in CHECKS]

    of_servers = side_by_side(rows, connected, usable_cores() // n_threads)
    by_check = [row for of_check in zip(*of_servers, strict=True) for row in of_check]
    return pd.DataFrame(by_check)[["check", "server", "verdict", "finding"]]


def shut_down(running: Mapping[str, LocalServer]) -> pd.DataFrame:
    """Stop each server, and check that its process and port are gone: columns as `check_all` has them."""
    import pandas as pd

    rows = []
    for name, server in running.items():
        seconds, free, status = server.stop(), server.port_is_free, server.process.returncode
        finding = f"ended in {seconds:.1f} s (status {status}); its port is {'free' if free else 'taken'}"
        rows.append((name, "shutdown", PASS if status in (0, -15) and free else FAIL, finding))
    return pd.DataFrame(rows, columns=["server", "check", "verdict", "finding"])


# ---- what several clients gain ----


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

    stopped, rows = {} if stopped is None else stopped, list[dict[str, Any]]()
    for name, endpoint in connected.items():
        if name in stopped:
            continue
        full: dict[str, Any] = {"llama-cpp-python": {"min_tokens": n_tokens}}  # answers of their full length
        full |= dict.fromkeys(("llama.cpp", "vLLM"), {"ignore_eos": True})
        options: Any = {"max_tokens": n_tokens, **full.get(endpoint.server, {})}
        ask: Callable[[str], Reply] = partial(replace(endpoint, stream=True).complete, **options)
        prompts = [f"{TIMED_PROMPT}The key {n}" for n in range(max(clients) * repetitions)]
        try:
            ask(TIMED_PROMPT)
            for n in clients:
                started = time.perf_counter()
                replies = side_by_side(ask, prompts[: n * repetitions], n)
                seconds, tokens = time.perf_counter() - started, sum(reply.n_tokens for reply in replies)
                first = pd.Series([reply.first_seconds for reply in replies])
                row = {"server": name, "clients": n, "requests": len(replies), "tokens": tokens}
                row |= {"seconds": seconds, "tokens_per_sec": tokens / seconds}
                rows.append(row | {"first_median": first.median(), "first_max": first.max()})
        except EndpointError as error:
            stopped[name] = error.what
    columns = "server clients requests tokens seconds tokens_per_sec first_median first_max"
    return pd.DataFrame(rows, columns=columns.split())


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
    by_server = tables["checks"].groupby("server", sort=False)["verdict"]
    lines = [f"{name}: {len(verdicts)} checks: {counted(verdicts)}" for name, verdicts in by_server]
    for row in tables["comparisons"].itertuples():
        why = "" if row.causes == "none" else f" ({row.causes})"
        same = f"{row.same_text} of {row.items} answers of {row.set}"
        lines.append(f"{row.server}: {same} are those of this process{why}")
    gone = "its server stopped, and was not measured to the end"
    lines += [f"{name}: {gone}: {why}" for name, why in stopped.items()]
    for name, rows in tables["speeds"].groupby("server", sort=False):
        ends = rows.iloc[[0, -1]].drop_duplicates("clients").itertuples()
        parts = (
            f"{row.tokens_per_sec:,.0f} tokens/s for {budget.counted(row.clients, 'clients')} "
            f"({row.requests} requests, {row.tokens:,} tokens)"
            for row in ends
        )
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
