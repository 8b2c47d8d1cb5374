"""Ask a model every question of a set and judge the answers; both are kept, so that a killed run continues.

An error that is not the answer's fault stops the run. It never scores 0.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb import __version__
from dfqs_nb.core import display, errors, journal
from dfqs_nb.core.budget import duration
from dfqs_nb.llama.generate import (
    GREEDY,
    Completion,
    Sampling,
    answer_start,
    chat_text,
    generate,
    opens_thinking,
)
from dfqs_nb.llama.model import PLAIN_STOP, Model
from dfqs_nb.llama.timing import Pace, probe
from dfqs_nb.scores.grading import CUT, Results, SetRun, grade
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import DRIVER, LIMITS, Candidate, Sandbox, Verdict, check_allowed, find_sandbox

if TYPE_CHECKING:
    from dfqs_nb.scores.likelihood import Answers

THINKING = ("template", "on", "off")
DOZEN = 12  # answers to one set say more than four to each of three
MOST_CHOICES = 96  # questions of multiple choice
Row = dict[str, Any]
# what a line of the two files holds
ANSWER = {"completion": str, "finish_reason": str, "opened": bool, "tokens": int, "seconds": float}
VERDICT = {"outcome": str, "detail": str}


@dataclass(frozen=True)
class Options:
    """How a set is answered."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = GREEDY.top_p
    seed: int = GREEDY.seed  # each sample of an item has a seed of its own
    n_samples: int = 1  # answers to each item; several need a temperature
    thinking: str = "template"  # ``template`` leaves it to the chat template, ``on`` and ``off`` tell it
    thinking_tokens: int = 0  # on top of the set's own limit for the answer
    limit: int | None = None  # only the first items; the score is then withheld
    allow_unsandboxed: bool = False
    fresh: bool = False
    progress: bool = True
    until: float = inf  # the time by `time.monotonic` at which asking ends, within an answer, too

    def __post_init__(self) -> None:
        if self.thinking not in THINKING:
            hint = f"use one of {', '.join(THINKING)}"
            raise errors.PromptError(f"thinking is {self.thinking!r}", hint=hint)
        if self.n_samples > 1 and not self.temperature:
            hint = "give a temperature, or one sample"
            raise errors.PromptError("greedy samples are all the same", hint=hint)

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True)
class Request:
    """One question as it goes to a model: a chat's message, or text to continue."""

    text: str
    chat: bool
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    thinking: str = "template"
    until: float = inf  # an answer that is not complete then is cut, and ends by ``time``

    def rendered(self, model: Model) -> str:
        """The text that this model gets; templates have two names for the switch of a thinking."""
        told = () if self.thinking == "template" else ("enable_thinking", "thinking")
        variables = dict.fromkeys(told, self.thinking == "on")
        return chat_text(model, self.text, **variables) if self.chat else self.text

    def tokens(self, model: Model) -> list[int]:
        """Token ids of the prompt that this model gets."""
        return model.with_bos(model.tokenize(self.rendered(model), special=self.chat))


@dataclass(frozen=True)
class Answerer:
    """A way of answering: a model in this process, or a server."""

    answer: Callable[[Request], Completion]
    mode: str  # ``chat`` or ``complete``
    conditions: Mapping[str, Any]  # what an answer depends on besides the model, the set and the options
    model_id: str  # its SHA-256, or a name where that is not known
    opens_thinking: bool = False  # the template begins the thinking, so the answer's text lacks its mark
    n_parallel: int = 1  # items asked at once; more than one only where threads may share ``answer``

    @classmethod
    def of(
        cls, model: Model, item_set: ItemSet, options: Options = Options(), model_id: str = ""
    ) -> Answerer:
        """A model in this process; it continues a code set's text where it has no chat template."""
        template = model.header.text("tokenizer.chat_template")
        mode = "complete" if item_set.kind == "code" and not template else item_set.mode
        plain = (PLAIN_STOP,) if mode == "chat" and not template else ()
        used = hashlib.sha256(template.encode()).hexdigest() if mode == "chat" and template else "none"

        def answer(request: Request) -> Completion:
            limits = (*request.stop, *plain), request.until
            tokens = request.tokens(model)
            return generate(model, tokens, request.max_tokens, request.sampling, *limits)

        conditions = {"chat_template_sha256": used, **model.conditions()}
        answerer = cls(answer, mode, conditions, model_id or model.path.name)
        first = answerer.request(item_set, item_set.items[0], options)
        return replace(answerer, opens_thinking=first.chat and opens_thinking(first.rendered(model)))

    def request(self, item_set: ItemSet, item: Item, options: Options = Options()) -> Request:
        """An item as this answerer is asked it. In a chat about code no stop text counts."""
        chat = self.mode == "chat"
        text = item.asked(item_set.instruction) if chat else item.prompt
        max_tokens = item_set.max_tokens + options.thinking_tokens * chat
        stop = () if chat and item_set.kind == "code" else item_set.stop
        return Request(text, chat, max_tokens, stop, options.sampling, options.thinking, options.until)

    def score(self, item_set: ItemSet, folder: str | Path, options: Options = Options()) -> SetRun:
        """Answer and judge a set, and resume in ``folder``. A `SandboxError` comes before any question.

        Where ``options.until`` ends the run, the set is that of the questions that were asked.
        """
        if item_set.kind == "choice":
            hint = "answer it with `dfqs-nb choices MODEL --set FILE.jsonl`"
            raise errors.PromptError(f"{item_set.name} is a multiple-choice set", hint=hint)
        sandbox = find_sandbox() if item_set.kind == "code" else None
        if sandbox:
            check_allowed(sandbox, options.allow_unsandboxed)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {"mode": self.mode, "sampling": asdict(options.sampling)}
        own |= {"thinking": options.thinking, "thinking_tokens": options.thinking_tokens}
        own |= {"scoring": __version__, **self.conditions}
        known = item_set.identity() | own | {"model": self.model_id}
        for free in ("repeats", "sandbox", "part"):  # an answer does not depend on these
            known.pop(free, None)
        path = folder / f"answers-{item_set.name}.jsonl"
        answers = journal.Journal(path, known, fresh=options.fresh, whole=_is_whole)
        asked = replace(item_set, items=item_set.items[: options.limit])
        samples = product(asked.by_turns(), range(options.n_samples))
        wanted = {f"{item.id}#{number}": (item, number) for item, number in samples}
        todo = {
            key: self.request(item_set, item, replace(options, seed=options.seed + number))
            for key, (item, number) in wanted.items()
            if key not in answers
        }
        n_resumed, quiet = len(wanted) - len(todo), not options.progress
        with display.tqdm(total=len(wanted), initial=n_resumed, desc=item_set.name, disable=quiet) as bar:
            for key, answer in self._answers(todo, options.until):
                answers.add(key, **answer)
                bar.update()
        rows = {k: _row(item_set, *wanted[k], answers[k]) for k in wanted if k in answers}
        if sandbox:
            codes = [
                (row, _candidate(wanted[k][0], answers[k], self.mode))
                for k, row in rows.items()
                if "grade" not in row
            ]
            _judge(codes, sandbox, folder / f"verdicts-{item_set.name}.jsonl", options)
            own["sandbox"] = sandbox.level
        ids = {row["id"] for row in rows.values() if row["grade"] != CUT}
        if late := {item.id for item in asked.items} - ids:  # what a limit leaves out stays missing
            item_set = replace(item_set, items=tuple(item for item in item_set.items if item.id not in late))
        facts: dict[str, Any] = {"n_items": max(1, len(item_set.items)), "n_resumed": n_resumed}
        facts["conditions"] = item_set.identity() | own | {"repeats": options.n_samples}
        return SetRun.of(item_set.kind, item_set.name, list(rows.values()), model=self.model_id, **facts)

    def _answers(self, todo: Mapping[str, Request], until: float) -> Iterator[tuple[str, Row]]:
        """Answers as they come, by the key of their sample; the first is begun in any case."""

        def ask(key: str) -> tuple[str, Row]:
            started, made = time.perf_counter(), self.answer(todo[key])
            # no file could hold half of a surrogate pair
            text = made.text.encode("utf-8", "replace").decode()
            row = {"completion": text, "finish_reason": made.finish_reason, "opened": self.opens_thinking}
            return key, row | {"tokens": made.n_tokens, "seconds": round(time.perf_counter() - started, 4)}

        if self.n_parallel == 1:
            began = time.monotonic()
            for n, key in enumerate(todo):
                now = time.monotonic()
                if n and now + (now - began) / n > until:
                    return  # it would hardly end in time
                yield ask(key)
            return
        with ThreadPoolExecutor(self.n_parallel) as pool:
            asked = [pool.submit(ask, key) for key in todo]
            try:
                yield from (done.result() for done in as_completed(asked))
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, what has not begun


def score_set(
    model: Model, item_set: ItemSet, folder: str | Path, options: Options = Options(), *, model_id: str = ""
) -> SetRun:
    """Answer and judge a set with a model in this process; see `Answerer.score`.

    A `PromptError`: the model was opened with fewer tokens of context than the longest item needs.
    """
    answerer = Answerer.of(model, item_set, options, model_id)
    requests = (answerer.request(item_set, item, options) for item in item_set.items)
    longest = max(len(request.tokens(model)) + request.max_tokens for request in requests)
    if longest > model.settings.n_ctx:
        hint = f"open the model with n_ctx of at least {longest:,}, not {model.settings.n_ctx:,}"
        raise errors.PromptError(f"the set {item_set.name} needs {longest:,} tokens of context", hint=hint)
    return answerer.score(item_set, folder, options)


def _is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether a kept answer counts: one that the time cut is asked for again."""
    return journal.holds(answer, ANSWER) and answer["finish_reason"] != "time"


def _row(item_set: ItemSet, item: Item, number: int, answer: Mapping[str, Any]) -> Row:
    """One row of the frame; code that was not cut has no grade yet."""
    ended, how, after = answer["finish_reason"], item_set.extract, f"after {answer['tokens']} tokens"
    row = {"set": item_set.name, "sample": number, "expected": item.answer or item.reference}
    row |= {name: getattr(item, name) for name in ("id", "family", "length", "guess", "prompt")}
    row |= {name: answer[name] for name in ("completion", "tokens", "seconds")}
    if item_set.kind == "code" and ended != "time":
        return row | {"truncated": ended == "length"}
    judged, given = CUT, ""
    if ended != "time":
        judged, given = grade(answer["completion"], ended, item.answer, how, answer["opened"])
    reasons = {"wrong": f"answered {given!r}", "no_answer": f"no answer in its {how}"}
    reasons |= {"truncated": f"cut off {after}", CUT: f"cut by the budget {after}"}
    row |= {"grade": judged, "reason": reasons.get(judged, ""), "correct": judged == "correct"}
    return row | {"truncated": judged == "truncated"}


def _candidate(item: Item, answer: Mapping[str, Any], mode: str) -> Candidate | Verdict:
    """The code to run, or the verdict where there is none."""
    start = answer_start(answer["completion"], answer["opened"]) if mode == "chat" else 0
    if start is None:
        return Verdict("truncated", "its thinking does not end")
    candidate = item.candidate(answer["completion"][start:], mode)
    return candidate or Verdict("no_answer", "no code that defines the function")


def _judge(
    codes: Sequence[tuple[Row, Candidate | Verdict]], sandbox: Sandbox, path: Path, options: Options
) -> None:
    """Run the candidates that have no verdict in ``path``, and put grade and reason into the rows."""
    conditions: dict[str, Any] = {"sandbox": sandbox.level, "limits": asdict(LIMITS), "driver": DRIVER}
    conditions["python"] = platform.python_version()
    whole = partial(journal.holds, fields=VERDICT)
    kept = journal.Journal(path, conditions, fresh=options.fresh, whole=whole)
    todo = {code.key: code for _, code in codes if isinstance(code, Candidate) and code.key not in kept}
    verdicts = sandbox.verdicts(list(todo.values()), progress=options.progress)
    for key, verdict in zip(todo, verdicts, strict=True):
        kept.add(key, **asdict(verdict))
    for row, code in codes:
        ran = isinstance(code, Candidate)
        verdict = Verdict(**kept[code.key]) if isinstance(code, Candidate) else code
        cut = (row["truncated"] or verdict.outcome == "truncated") and not verdict.passed
        reason = f"{'cut off; ' * (cut and ran)}{verdict.outcome}: {verdict.detail}".rstrip(": ")
        row |= {"grade": verdict.outcome, "reason": "" if verdict.passed else reason}
        row |= {"correct": verdict.passed, "truncated": cut}


@dataclass(frozen=True)
class QuestionPlan:
    """The sets that a time holds at least a dozen answers of, and what all their answers would take."""

    model: Model = field(repr=False)
    sets: Sequence[ItemSet]
    n_sets: int  # that are asked, the first ones
    seconds: float  # of all sets, if every answer has its full length
    budget_seconds: float
    pace: Pace
    options: Options

    @property
    def sentence(self) -> str:
        """The plan for people."""
        n = sum(len(each.items[: self.options.limit]) for each in self.sets)
        if self.seconds <= self.budget_seconds:
            return f"{n:,} of {n:,} questions, at most {duration(self.seconds)}"
        held = f"as many of {n:,} questions as {duration(self.budget_seconds)} hold"
        return f"{held} (all: up to {duration(self.seconds)})"

    def ask(self, folder: str | Path, *, model_id: str = "") -> tuple[Results, list[str]]:
        """Ask each set in its share of the time; the results, and what was left out.

        Questions come spread evenly over the families. The answer at which the time ends is cut there.
        """
        end, runs, missing = time.monotonic() + self.budget_seconds, [], []
        for number, each in enumerate(self.sets[: self.n_sets]):
            now = time.monotonic()
            options = replace(self.options, until=now + (end - now) / (self.n_sets - number))
            run = score_set(self.model, each, folder, options, model_id=model_id)
            runs.append(run)
            n, most = run.answered["id"].nunique(), len(each.items[: options.limit])
            if n < most:
                cut = "; 1 was cut off" if len(run.answered) < len(run.items) else ""
                missing.append(f"only {n} of {most} questions of {each.name} answered{cut}")
        return Results(runs), missing + [f"the set {each.name}" for each in self.sets[self.n_sets :]]

    def choose(self, folder: str | Path, seconds: float, *, model_id: str = "") -> Answers:
        """Multiple choice by likelihood, from the first set, for at most these seconds."""
        from dfqs_nb.scores.likelihood import answer, choices_of

        part = choices_of(self.sets[0]).part(min(MOST_CHOICES, self.options.limit or MOST_CHOICES))
        options: dict[str, Any] = {"fresh": self.options.fresh, "until": time.monotonic() + seconds}
        return answer(self.model, part, folder, model_id=model_id, **options)


def plan_questions(
    model: Model, item_sets: Sequence[ItemSet], options: Options, seconds: float
) -> QuestionPlan:
    """Time a few tokens, and plan the sets that these seconds hold a dozen answers of, at least one.

    Answers count at their full length, and prompts by four characters a token.
    """
    pace = probe(model)

    def cost(item_set: ItemSet) -> float:
        n_tokens = item_set.max_tokens + options.thinking_tokens
        prompts = (len(item.asked(item_set.instruction)) / 4 for item in item_set.items[: options.limit])
        return options.n_samples * sum(pace.seconds(length + 16, n_tokens) for length in prompts)

    n_sets = len(item_sets)
    while n_sets > 1 and sum(cost(each.part(DOZEN)) for each in item_sets[:n_sets]) > seconds:
        n_sets -= 1
    return QuestionPlan(model, item_sets, n_sets, sum(map(cost, item_sets)), seconds, pace, options)
