"""Checks of a server, to run before you trust its answers: planned first, and cut to a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.display import counted
from dfqs_nb.core.stage import Fitted, Stage, fit
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.timing import probe
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve.client import ContextOverflowError, Endpoint, EndpointError, Reply, pick, side_by_side
from dfqs_nb.serve.measure import comparison_table, room_for, tally
from dfqs_nb.serve.servers import LocalServer

if TYPE_CHECKING:
    import pandas as pd

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
REQUESTS = 2  # of a client, one after another
MAX_TOKENS, REPETITIONS = 32, 4
LONGEST_TRIED = 65_536  # tokens of context that are filled to try them out
FILLER = "The dog slept near the fire. "


# ---- the plan ----

N_SERVERS = 2
N_CHECKED = (REPETITIONS + N_CONCURRENT) * len(PROMPTS)  # answers of one server's checks
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
    "clients": "loads of clients at once",
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
        answered = N_CHECKED * min(MAX_TOKENS, plan["tokens"])
        checks = model.load_seconds + pace.seconds(plan["filled"], answered)
        answers = sum(
            pace.seconds(len(item.prompt) / 4 + 16, item_set.max_tokens)
            for item_set in cut(plan)
            for item in item_set.items[: plan["items"]]
        )
        speeds = REQUESTS * sum(clients[: plan["clients"]]) * pace.seconds(64, min(tokens, plan["tokens"]))
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
    """The checks of one endpoint, a method each; ``model``: the same file in this process."""

    endpoint: Endpoint
    model: Model
    n_tokens: int = MAX_TOKENS  # of an answer
    longest_tried: int = LONGEST_TRIED  # tokens of context that are filled

    def run(self, check: Callable[[Checks], Finding]) -> dict[str, str]:
        """A check's ``check``, ``verdict`` and ``finding``. What stops it is a finding too."""
        try:
            verdict, finding = check(self)
        except EndpointError as error:
            verdict, finding = FAIL, f"it stopped: {error.what}"
        return {"check": check.__name__.replace("_", " "), "verdict": verdict, "finding": finding}

    def answer(self, prompt: str) -> Reply:
        """The greedy answer to a chat, with log-probabilities of servers that are known to give them."""
        known = self.endpoint.server in ("llama.cpp", "vLLM")
        options = {"logprobs": True, "top_logprobs": 1} if known else {}
        return self.endpoint.chat(prompt, self.n_tokens, **options)

    @cached_property
    def alone(self) -> list[Reply]:
        """The answers to `PROMPTS`, asked one after another."""
        return [self.answer(prompt) for prompt in PROMPTS]

    def context_length(self) -> Finding:
        """Fill the context that the server reports, then exceed it: it must refuse."""
        endpoint, n_ctx = self.endpoint, self.endpoint.n_ctx
        if n_ctx is None or n_ctx > self.longest_tried:
            return UNSEEN, f"reports {n_ctx or 'none'}; not tried out"
        each = endpoint.complete(FILLER * 16, 1).n_prompt / 16
        if each < 1:  # fewer than a token a sentence is no honest count
            return UNSEEN, f"reports {n_ctx:,}; does not count a prompt's tokens"
        fits, exceeds = FILLER * int((n_ctx - 24) / each - 1), FILLER * int(n_ctx / each * 1.1 + 8)
        taken = endpoint.complete(fits, 4).n_prompt
        try:
            read = endpoint.complete(exceeds, 4).n_prompt
        except ContextOverflowError:
            return PASS, f"reports {n_ctx:,}; takes {taken:,} tokens and refuses a tenth more than {n_ctx:,}"
        return FAIL, f"reports {n_ctx:,}, but answers a longer prompt, of which it read {read:,} tokens"

    def chat_template(self) -> Finding:
        """Compare the server's prompt with ours, token by token."""
        endpoint, model = self.endpoint, self.model
        ours = chat_text(model, PROMPTS[0])
        n_ours = len(model.with_bos(model.tokenize(ours)))
        n_theirs = endpoint.chat(PROMPTS[0], 1).n_prompt
        if not model.has_template:
            counts = f"{n_theirs} tokens, in process {n_ours}"
            return NOTE, f"the file has none, so a chat gets the server's own: {counts}. Questions go as text"
        messages = [{"role": "user", "content": PROMPTS[0]}]
        shown = pick(endpoint.optional("/apply-template", {"messages": messages}), "prompt", str) or ""
        before = ours.removesuffix(shown)  # some leave out a BOS, which they add as a token
        same = ours.endswith(shown) and len(model.tokenize(before)) <= 1
        text = "its text is not shown" if not shown else "the same text" if same else "another text"
        verdict = PASS if n_ours == n_theirs and text != "another text" else FAIL
        return verdict, f"{n_theirs} tokens, in process {n_ours}; {text}"

    def same_again(self) -> Finding:
        """Send the same greedy requests one after another."""
        turns = [self.alone, *([self.answer(prompt) for prompt in PROMPTS] for _ in range(REPETITIONS - 1))]
        n_same = sum(len({reply.text for reply in replies}) == 1 for replies in zip(*turns, strict=True))
        finding = f"{n_same} of {len(PROMPTS)} prompts: the same text {REPETITIONS} times in turn"
        return PASS if n_same == len(PROMPTS) else FAIL, finding

    def same_beside_others(self) -> Finding:
        """Send the same requests at once: slots share batches, and batches change numbers."""
        with side_by_side(self.answer, PROMPTS * N_CONCURRENT, N_CONCURRENT) as answers:
            beside = list(answers)
        pairs = list(zip(self.alone * N_CONCURRENT, beside, strict=True))
        n_other = sum(ours.text != theirs.text for ours, theirs in pairs)
        finding, moved = f"{n_other} of {len(pairs)} answers differ with {N_CONCURRENT} requests at once", 0.0
        if all(reply.logprobs for reply in beside):
            moved = max(moved_by(ours.logprobs, theirs.logprobs) for ours, theirs in pairs)
            finding += f"; log-probabilities move by up to {moved:.2g}"
        return NOTE if n_other or moved else PASS, finding


def moved_by(ours: Sequence[tuple[str, float]], theirs: Sequence[tuple[str, float]]) -> float:
    """The largest difference of two log-probabilities before the first token that differs.

    >>> moved_by([("a", -1.0), ("b", -2.0)], [("a", -1.5), ("c", -9.0)])
    0.5
    """
    same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(ours, theirs, strict=False))
    return max((abs(first[1] - second[1]) for first, second in same), default=0.0)


CHECKS = [Checks.context_length, Checks.chat_template, Checks.same_again, Checks.same_beside_others]


def check_all(connected: Mapping[str, Endpoint], model: Model, **limits: int) -> pd.DataFrame:
    """All checks of each server: ``check``, ``server``, ``verdict`` and ``finding``; see `Checks`.

    ``limits``: ``n_tokens`` and ``longest_tried`` of `Checks`.
    """
    import pandas as pd

    def rows(name: str) -> list[dict[str, str]]:
        checks = Checks(connected[name], model, **limits)
        return [checks.run(check) | {"server": name} for check in CHECKS]

    with side_by_side(rows, connected, room_for(model)) as of_servers:
        by_check = [row for of_check in zip(*of_servers, strict=True) for row in of_check]
    return pd.DataFrame(by_check)[["check", "server", "verdict", "finding"]]


# ---- what several clients gain ----


def speed_of_all(
    connected: Mapping[str, Endpoint], clients: Sequence[int], n_tokens: int, stopped: dict[str, str]
) -> pd.DataFrame:
    """Speed of each server in turn, after a warm-up, under several clients at once.

    One row a server and number of clients: ``tokens`` and ``tokens_per_sec`` are of all clients together.
    ``stopped``: servers that failed for good, with the reason. They are not asked, and more are added.
    """
    import pandas as pd

    rows = list[dict[str, Any]]()
    for name, endpoint in connected.items():
        if name in stopped:
            continue
        full: dict[str, Any] = {"ignore_eos": True} if endpoint.server in ("llama.cpp", "vLLM") else {}
        ask: Callable[[str], Reply] = partial(endpoint.complete, max_tokens=n_tokens, **full)
        prompts = [f"{TIMED_PROMPT}The key {n}" for n in range(max(clients) * REQUESTS)]
        try:
            ask(TIMED_PROMPT)
            for n in clients:
                started = time.perf_counter()
                with side_by_side(ask, prompts[: n * REQUESTS], n) as answers:
                    replies = list(answers)
                seconds, tokens = time.perf_counter() - started, sum(reply.n_tokens for reply in replies)
                if not tokens:
                    raise EndpointError("it tells no number of tokens, so it has no speed")
                row = {"server": name, "clients": n, "requests": len(replies), "tokens": tokens}
                rows.append(row | {"seconds": seconds, "tokens_per_sec": tokens / seconds})
        except EndpointError as error:
            stopped[name] = error.what
    columns = ["server", "clients", "requests", "tokens", "seconds", "tokens_per_sec"]
    return pd.DataFrame(rows, columns=columns)


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

    ``items``: of `measure.compare_all`. ``tables``: ``checks`` and ``speeds``.
    """
    tables["comparisons"] = comparison_table(items)
    by_server = tables["checks"].groupby("server", sort=False)["verdict"]
    lines = [f"{name}: {len(verdicts)} checks: {tally(verdicts)}" for name, verdicts in by_server]
    for row in tables["comparisons"].itertuples():
        why = "" if row.causes == "none" else f" ({row.causes})"
        same = f"{row.same_text} of {row.items} answers of {row.set}"
        lines.append(f"{row.server}: {same} are those of this process{why}")
    gone = "not measured to the end"
    lines += [f"{name}: {gone}: {why}" for name, why in stopped.items()]
    for row in tables["speeds"].groupby("server", sort=False).nth([0, -1]).itertuples():
        speed, clients = f"{row.tokens_per_sec:,.0f} tokens/s", counted(row.clients, "clients")
        asked = f"{row.requests} requests, {row.tokens:,} tokens"
        lines.append(f"{row.server}: {speed} for {clients} ({asked})")
    stage.finish(
        conditions={name: endpoint.conditions() for name, endpoint in connected.items()},
        summary=lines,
        model=stage.model,
        recipes=list(recipes),
        loaded={name: server.loaded for name, server in running.items()},
        **{name: frame.to_dict("records") for name, frame in tables.items()},
    )
    return lines
