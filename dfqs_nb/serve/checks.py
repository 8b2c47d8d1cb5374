"""Check what servers promise, compare their answers with this process's, and time them: all cut to a time.

A server that cuts a long prompt without a word would look like a model that is wrong. So the tokens that it
counts of a text are compared with those of its halves.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb import scores
from dfqs_nb.core.display import counted, per_cent
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.stage import Fitted, Stage, fit
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import PLAIN_CHAT, PLAIN_STOP, Model
from dfqs_nb.llama.timing import probe
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun
from dfqs_nb.serve.client import ContextOverflowError, Endpoint, EndpointError, Reply, pick, side_by_side
from dfqs_nb.serve.servers import LocalServer
from dfqs_nb.stats import at_most

Servers = Mapping[str, Endpoint]  # by name
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
ROUNDS = 3  # of timing, in which all servers and numbers of clients take turns
MAX_TOKENS, REPETITIONS = 32, 4
LONGEST_TRIED = 65_536  # tokens of context that are filled to try them out
FILLER = "The dog slept near the fire. "
MARK = "MESSAGE-STANDS-HERE"
CUT_SHARE, CUT_TOKENS = 0.02, 8  # by which halves may have more tokens than their whole, which ends in no cut
SHORT = 1_600  # characters that every server reads whole
NEAR_TIE = 0.1  # of a logit: well above what other batches and kernels move
DEFAULTS = Options()
LARGER = "start the server with a larger context (Ollama: OLLAMA_CONTEXT_LENGTH), or use shorter texts"


# ---- the plan ----

N_SERVERS = 2
N_CHECKED = (REPETITIONS + N_CONCURRENT) * len(PROMPTS)  # answers of one server's checks
# What a plan that exceeds its budget gives up, in this order.
CUTS: tuple[dict[str, int], ...] = (
    {"items": 4},
    {"rounds": 1, "clients": 1, "tokens": 64},
    {"items": 2, "filled": 0},
    {"items": 1, "sets": 1, "tokens": 8},
)
NAMES = {
    "items": "questions of a set asked both ways",
    "sets": "question sets",
    "clients": "loads of clients at once",
    "rounds": "rounds of timing",
    "tokens": "tokens of an answer",
    "filled": "tokens of context tried out",
}


def plan_checks(
    model: Model, sets: Sequence[ItemSet], *, items: int, clients: Sequence[int], tokens: int, seconds: float
) -> tuple[list[ItemSet], Fitted]:
    """Time a few tokens, and cut what is planned in the order of `CUTS` to what these seconds hold.

    ``items``: questions of a set, 0: all. ``tokens``: of an answer that is timed. Returns the sets as cut,
    and the plan, whose ``values`` have the keys of `NAMES`. Every check is made.
    """
    pace = probe(model)

    def cut(plan: Mapping[str, int]) -> list[ItemSet]:
        return [replace(s, max_tokens=min(s.max_tokens, plan["tokens"])) for s in sets[: plan["sets"]]]

    def cost(plan: Mapping[str, int]) -> float:
        check = model.load_seconds + pace.seconds(plan["filled"], N_CHECKED * min(MAX_TOKENS, plan["tokens"]))
        questions = [(item, s.max_tokens) for s in cut(plan) for item in s.items[: plan["items"]]]
        answers = sum(pace.seconds(len(item.prompt) / 4 + 16, most) for item, most in questions)
        asked = plan["rounds"] * plan["clients"] * max(clients[: plan["clients"]])
        speeds = asked * pace.seconds(64, min(tokens, plan["tokens"]))
        # this process answers, too, and again where a server's text differs
        return answers + N_SERVERS * (check + 2 * answers + speeds)

    whole = {"items": items or max(len(s.items) for s in sets), "sets": len(sets), "clients": len(clients)}
    whole |= {"rounds": ROUNDS, "tokens": max(s.max_tokens for s in sets)}
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
            sent = len(self.model.with_bos(self.model.tokenize(exceeds)))
            return PASS, f"reports {n_ctx:,} tokens; takes a prompt of {taken:,}, refuses one of {sent:,}"
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
        finding += f" ({len(PROMPTS)} prompts, {N_CONCURRENT} times each)"
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


def check_all(connected: Servers, model: Model, **limits: int) -> pd.DataFrame:
    """All checks of each server: ``check``, ``server``, ``verdict`` and ``finding``; see `Checks`.

    ``limits``: ``n_tokens`` and ``longest_tried`` of `Checks`.
    """

    def rows(name: str) -> list[dict[str, str]]:
        checks = Checks(connected[name], model, **limits)
        return [checks.run(check) | {"server": name} for check in CHECKS]

    with side_by_side(rows, connected, room_for(model)) as of_servers:
        by_check = [row for of_check in zip(*of_servers, strict=True) for row in of_check]
    return pd.DataFrame(by_check)[["check", "server", "verdict", "finding"]]


# ---- questions over a server, and beside this process ----


def check_whole(endpoint: Endpoint, ask: Callable[[str, int], Reply], text: str) -> None:
    """Raise a `ContextOverflowError` if the server cuts this text and answers from the rest.

    ``ask`` gets the text and both its halves: together these have more tokens than a text that was cut.
    """
    if len(text) < SHORT:
        return
    middle = text.find(" ", len(text) // 2)
    # numbered, so that no cache of the server begins with it: what is cached is not counted everywhere
    parts = (f"{number}. {part}" for number, part in enumerate((text, text[:middle], text[middle:]), 1))
    whole, first, second = (ask(part, 1).n_prompt for part in parts)
    if first + second > whole * (1 + CUT_SHARE) + CUT_TOKENS:
        what = f"the server cut the prompt: it read {whole:,} of at least {first + second:,} tokens"
        raise ContextOverflowError(what, where=endpoint.url, hint=LARGER)


def score_set(
    endpoint: Endpoint,
    item_set: ItemSet,
    folder: str | Path,
    options: Options = DEFAULTS,
    *,
    model_id: str = "",
    model: Model | None = None,
) -> SetRun:
    """``score_set`` of the scores stage over an endpoint, in the server's template.

    ``model_id`` is the model's SHA-256, where it is known; ``model`` the same file in this process: where it
    has no chat template, the server gets the text that the process gets. An answer that fills the context is
    a `ContextOverflowError`. After an `EndpointError` a second call goes on from there.
    """
    url, n_ctx = endpoint.url, endpoint.n_ctx
    if options.thinking != "template":
        hint = "start it with thinking on or off, and leave --thinking out"
        raise EndpointError("a server decides about thinking when it starts", where=url, hint=hint)
    if item_set.kind == "choice":
        hint = "score the model's file: dfqs-nb score model.gguf --set FILE.jsonl"
        raise EndpointError("a server shows no likelihood of a choice", where=url, hint=hint)
    bare = model if model is not None and not model.has_template else None
    mode = Answerer.of(bare, item_set).mode if bare else item_set.mode
    chat = mode == "chat" and not bare
    ask = partial(endpoint.chat if chat else endpoint.complete, until=options.until)
    items = item_set.part(options.limit).items
    prompts = [item.asked(item_set.instruction) if chat else item.prompt for item in items]

    check_longest = cache(lambda: check_whole(endpoint, ask, max(prompts, key=len)))

    def answer(request: Any) -> Any:
        check_longest()  # unless all answers are there already
        text = request.rendered(bare) if bare else request.text
        stop = (*request.stop, PLAIN_STOP) if bare and request.chat else request.stop
        reply = ask(text, request.max_tokens, sampling=request.options.sampling, stop=stop)
        full = reply.n_prompt + reply.n_tokens >= (n_ctx or 2**31)
        if reply.finish_reason == "length" and full and reply.n_tokens < request.max_tokens:
            what = f"the server's {n_ctx:,} tokens of context were full after {reply.n_tokens} of an answer"
            raise ContextOverflowError(what, where=url, hint=LARGER)
        return reply

    template = endpoint.chat_template
    known = hashlib.sha256(template.encode()).hexdigest() if template else "the server's"
    conditions = {"chat_template_sha256": known if chat else "none", **endpoint.conditions()}
    if bare and mode == "chat":
        conditions["chat_frame"] = PLAIN_CHAT
    return Answerer(answer, mode, conditions, model_id or endpoint.identity).score(item_set, folder, options)


def room_for(model: Model) -> int:
    """How many runtimes with this model's threads have a core for each thread; at least one."""
    return max(1, usable_cores() // (model.settings.n_threads or 1))


def compare_all(
    model: Model,
    connected: Servers,
    item_sets: Sequence[ItemSet],
    folder: str | Path,
    *,
    model_id: str,
    local: Collection[str],
    stopped: dict[str, str],
    **options: Any,
) -> pd.DataFrame:
    """Score sets in process and through each server, and `explain` where their texts differ.

    A row a server and item: ``server``, ``set``, ``id``, ``family``, ``text_...`` and ``correct_...`` of
    ``process`` and ``server``, ``same_text``; where texts differ also what `explain` gives.

    ``model_id``: the SHA-256 of the model in this process, under which its answers are kept. ``local``: the
    servers that were started with this process's file, whose ``model_id`` it is, too. ``stopped`` gets the
    servers that failed for good, with the reason. An `EndpointError`: all did. ``options``: of `Options`.
    """
    chosen, place, tables = Options(**options), Path(folder), list[pd.DataFrame]()

    def ask(name: str) -> list[SetRun]:
        known: dict[str, Any] = {"model_id": model_id if name in local else "", "model": model}
        try:
            return [score_set(connected[name], s, place / name, chosen, **known) for s in item_sets]
        except EndpointError as error:
            stopped[name] = error.what
            return []

    with side_by_side(ask, connected, room_for(model) - 1) as served:
        runs = [scores.score_set(model, s, place / "process", chosen, model_id=model_id) for s in item_sets]
        all_served = list(served)
    for name, answers in zip(connected, all_served, strict=True):
        # a server that failed has no answers
        for item_set, run, theirs in zip(item_sets, runs, answers, strict=False):
            tables.append(_compared(model, item_set, run, theirs).assign(server=name))
    if not tables:
        raise EndpointError(f"no server answers: {'; '.join(stopped.values())}", hint="read its log")
    items = pd.concat(tables, ignore_index=True)
    return items[["server", "set", *items.columns.drop(["server", "set"])]]


def _compared(model: Model, item_set: ItemSet, run: SetRun, theirs: SetRun) -> pd.DataFrame:
    """The answers to a set in this process and of one server, item by item."""
    opening = ""  # of a thinking that the template itself writes: llama.cpp's server repeats it
    if item_set.mode == "chat" and model.has_template:
        opening = "".join(chat_text(model, MARK).rpartition(MARK)[2].partition("<think>")[1:])
    table = run.items[["set", "id", "family"]].copy()
    table["text_process"] = run.items["completion"]
    table["text_server"] = theirs.items["completion"].astype(str).str.removeprefix(opening)
    table["same_text"] = table["text_process"] == table["text_server"]
    table["correct_process"], table["correct_server"] = run.items["correct"], theirs.items["correct"]
    by_id, other = {item.id: item for item in item_set.items}, table[~table["same_text"]]
    pairs = zip(other["id"], other["text_server"], strict=True)
    why = [explain(model, item_set, by_id[id_], text) for id_, text in pairs]
    return table.join(pd.DataFrame(why, other.index, ["token", "margin", "cause"]))


def explain(model: Model, item_set: ItemSet, item: Any, served: str) -> dict[str, Any]:
    """Why the server's text differs from this process's; notebook 09 explains each ``cause``.

    ``token``: the first of ours that theirs does not have. ``margin``: of the two largest logits there.
    """
    answerer = Answerer.of(model, item_set)
    request = answerer.request(item_set, item)
    ours, rest, at = answerer.answer(request), served.encode(), 0  # rest: what theirs has beyond `at` tokens
    for piece in map(model.token_bytes, ours.token_ids):
        if not rest.startswith(piece):
            break
        rest, at = rest[len(piece) :], at + 1
    model.clear()
    logits = model.evaluate([*request.tokens(model), *ours.token_ids[:at]])
    second, first = np.sort(logits)[-2:].tolist()
    cause = "near-tie" if first - second <= NEAR_TIE else "other numbers"
    return {"token": at, "margin": first - second, "cause": cause}


def comparison_table(items: pd.DataFrame) -> pd.DataFrame:
    """A row a server and set of `compare_all`: items, same texts, right answers, causes of differences.

    ``differ_at_most``: the 95 % upper bound on the share of texts that differ.
    """
    counts = {"items": ("id", "size"), "same_text": ("same_text", "sum")}
    counts |= {f"right_{where}": (f"correct_{where}", "sum") for where in ("process", "server")}
    table = items.groupby(["server", "set"], sort=False).agg(**counts, causes=("cause", tally)).reset_index()
    pairs = zip(table["items"] - table["same_text"], table["items"], strict=True)
    table.insert(4, "differ_at_most", [at_most(int(differ), int(n)) for differ, n in pairs])
    return table


def tally(words: pd.Series) -> str:
    """Words with their number; "none" where there are none."""
    return ", ".join(f"{n} {word}" for word, n in words.value_counts().items()) or "none"


# ---- what several clients gain ----


def speed_of_all(
    connected: Servers, clients: Sequence[int], n_tokens: int, stopped: dict[str, str], n_rounds: int = ROUNDS
) -> pd.DataFrame:
    """Speed of each server in turn, after a warm-up, under several clients that share the same requests.

    One row a server and number of clients: ``requests`` and ``tokens`` of a round, ``rounds``, and the
    ``tokens_per_sec`` of all clients together: median, ``min`` and ``max`` of the rounds. ``stopped``:
    servers that failed for good, with the reason. They are not asked, and more are added.
    """
    rows = list[tuple[Any, ...]]()
    for name, endpoint in list(connected.items()) * n_rounds:
        if name in stopped:
            continue
        full: dict[str, Any] = {"ignore_eos": True} if endpoint.server in ("llama.cpp", "vLLM") else {}
        ask: Callable[[str], Reply] = partial(endpoint.complete, max_tokens=n_tokens, **full)
        prompts = [f"{TIMED_PROMPT}The key {n}" for n in range(max(clients))]
        try:
            ask(TIMED_PROMPT)
            for n in clients:
                started = time.perf_counter()
                with side_by_side(ask, prompts, n) as answers:
                    replies = list(answers)
                seconds, tokens = time.perf_counter() - started, sum(reply.n_tokens for reply in replies)
                if not tokens:
                    raise EndpointError("it tells no number of tokens, so it has no speed")
                rows.append((name, n, len(replies), tokens, tokens / seconds))
        except EndpointError as error:
            stopped[name] = error.what
    table = pd.DataFrame(rows, columns=["server", "clients", "requests", "tokens", "tokens_per_sec"])
    by_load = table.groupby(["server", "clients"], sort=False)
    speeds = by_load["tokens_per_sec"].agg(["median", "min", "max", "size"])
    speeds.columns = ["tokens_per_sec", "min", "max", "rounds"]
    return by_load[["requests", "tokens"]].first().join(speeds).reset_index()


# ---- what the notebook hands on ----


def hand_on(
    stage: Stage,
    *,
    items: pd.DataFrame,
    connected: Servers,
    running: Mapping[str, LocalServer],
    recipes: Sequence[str],
    stopped: Mapping[str, str],
    **tables: pd.DataFrame,
) -> list[str]:
    """Write ``serving.json``, and return its summary lines; what each of our servers loaded is in it.

    ``items``: of `compare_all`. ``tables``: ``checks`` and ``speeds``.
    """
    tables["comparisons"] = comparison_table(items)
    by_server = tables["checks"].groupby("server", sort=False)["verdict"]
    shown = {name: {"server": str(name), "checks": tally(verdicts)} for name, verdicts in by_server}
    lines = [f"{name}: {len(verdicts)} checks: {tally(verdicts)}" for name, verdicts in by_server]
    for row in tables["comparisons"].itertuples():
        same, why = f"{row.same_text} of {row.items}", "" if row.causes == "none" else f" ({row.causes})"
        why += f"; 95 % upper bound of others: {per_cent(row.differ_at_most, 0)}"
        lines.append(f"{row.server}: {same} answers of {row.set} are those of this process{why}")
        shown[row.server][f"same answers as without a server, {row.set}"] = same + why
    notes = [f"{name}: not measured to the end: {why}" for name, why in stopped.items()]
    lines += notes
    for name, rows in tables["speeds"].groupby("server", sort=False):
        ends = [rows.iloc[at] for at in sorted({0, len(rows) - 1})]
        for row in ends:
            speed, clients = f"{row['tokens_per_sec']:,.0f}", counted(row["clients"], "clients")
            spread = f"{row['min']:,.0f} to {row['max']:,.0f}"
            often = f"{counted(row['rounds'], 'rounds')} of {counted(row['requests'], 'requests')}"
            lines.append(f"{name}: {speed} tokens/s for {clients} ({spread} in {often})")
            shown[name][f"tokens/s, {clients}"] = f"{speed} ({spread}; {often})"
        few, many = ends[0], ends[-1]
        if len(ends) > 1 and few["min"] <= many["max"] and many["min"] <= few["max"]:
            notes.append(f"{name}: these ranges overlap, so nothing is shown about more clients")
            lines.append(notes[-1])
    conditions = {name: endpoint.conditions() for name, endpoint in connected.items()}
    facts: dict[str, Any] = {"shown": [*shown.values()], "notes": notes, "recipes": list(recipes)}
    facts |= {"loaded": {name: server.loaded for name, server in running.items()}, "model": stage.model}
    facts |= {name: frame.to_dict("records") for name, frame in tables.items()}
    stage.finish(conditions=conditions, summary=lines, **facts)
    return lines
