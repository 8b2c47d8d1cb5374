"""Ask a model every question of a set and judge the answers; both are kept, so that a killed run continues.

An error that is not the answer's fault stops the run. It never scores 0.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from math import inf
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_softmax

from dfqs_nb import __version__
from dfqs_nb.core import display, errors, journal
from dfqs_nb.core.stage import LeftOut
from dfqs_nb.llama.generate import GREEDY, Sampling, answer_start, chat_text, generate, opens_thinking
from dfqs_nb.llama.model import PLAIN_STOP, Model, Prefix, check_reuse
from dfqs_nb.llama.timing import Pace, probe
from dfqs_nb.scores.grading import CUT, Results, SetRun, grade
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import DRIVER, LIMITS, Candidate, Sandbox, SandboxError, Verdict, find_sandbox

THINKING = ("template", "on", "off")
DOZEN = 12  # answers to one set say more than four to each of three
Row = dict[str, Any]
# what a line of the files holds: a written answer, a choice, the verdict on code
ANSWER = {"completion": str, "finish_reason": str, "opened": bool, "tokens": int, "seconds": float}
CHOICE = {"log_likelihoods": list, "greedy": list, "tokens": int, "seconds": float}
VERDICT = {"outcome": str, "detail": str}


@dataclass(frozen=True)
class Options:
    """How a set is answered."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = GREEDY.top_p
    seed: int = GREEDY.seed
    thinking: str = "template"  # ``template`` leaves it to the chat template, ``on`` and ``off`` tell it
    thinking_tokens: int = 0  # on top of the set's own limit for the answer
    limit: int = 0  # questions of a set, evenly from its families; 0: all
    allow_unsandboxed: bool = False
    fresh: bool = False
    progress: bool = True
    until: float = inf  # `time.monotonic` at which asking ends, within an answer, too

    def __post_init__(self) -> None:
        if self.thinking not in THINKING:
            hint = f"use one of {', '.join(THINKING)}"
            raise errors.DfqsError(f"thinking is {self.thinking!r}", hint=hint)
        for name in ("limit", "thinking_tokens"):
            if getattr(self, name) < 0:
                raise errors.DfqsError(f"{name} is {getattr(self, name)}", hint="use 0 or more")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def shares(
        self, sets: Sequence[ItemSet], seconds: float, n_asked: int | None = None, *, is_base: bool = False
    ) -> Iterator[tuple[ItemSet, Options]]:
        """Each set, with options that end it after its share of the time; what one leaves, the next ones get.

        No question is asked of sets after the first ``n_asked``. Multiple choice takes what it needs of a
        base model, which has the least chance in the written sets.
        """
        end, n_asked = time.monotonic() + seconds, len(sets) if n_asked is None else n_asked
        for number, each in enumerate(sets):
            now, left = time.monotonic(), 1 if is_base and each.kind == "choice" else n_asked - number
            yield each, replace(self, until=now + (end - now) / left if number < n_asked else 0.0)


DEFAULTS = Options()


@dataclass(frozen=True)
class Request:
    """One question as it goes to a model: a chat's message, or text to continue or to choose an end of."""

    text: str
    chat: bool
    max_tokens: int
    stop: tuple[str, ...] = ()
    options: Options = DEFAULTS
    choices: tuple[str, ...] = ()  # with what stands between the text and them

    def rendered(self, model: Model) -> str:
        """The text that this model gets; templates have two names for the switch of a thinking."""
        told = () if self.options.thinking == "template" else ("enable_thinking", "thinking")
        variables = dict.fromkeys(told, self.options.thinking == "on")
        return chat_text(model, self.text, **variables) if self.chat else self.text

    def tokens(self, model: Model) -> list[int]:
        """Token ids of the prompt that this model gets."""
        return model.with_bos(model.tokenize(self.rendered(model), special=self.chat))


@dataclass(frozen=True)
class Answerer:
    """A way of answering: a model in this process, or a server."""

    answer: Callable[[Request], Any]  # a completion; of a set of choices, the fields of `CHOICE`
    mode: str  # ``chat`` or ``complete``
    conditions: Mapping[str, Any]  # what an answer depends on besides the model, the set and the options
    model_id: str  # its SHA-256, or a name where that is not known
    opens_thinking: bool = False  # the template begins the thinking, so the answer's text lacks its mark

    @classmethod
    def of(cls, model: Model, item_set: ItemSet, options: Options = DEFAULTS, model_id: str = "") -> Answerer:
        """A model in this process; it continues a code set's text where it has no chat template."""
        template = model.header.text("tokenizer.chat_template")
        mode = "complete" if item_set.kind == "code" and not template else item_set.mode
        plain = (PLAIN_STOP,) if mode == "chat" and not template else ()
        used = hashlib.sha256(template.encode()).hexdigest() if mode == "chat" and template else "none"

        def answer(request: Request) -> Any:
            limits = request.options.sampling, (*request.stop, *plain), request.options.until
            return generate(model, request.tokens(model), request.max_tokens, *limits)

        conditions = {"chat_template_sha256": used, **model.conditions()}
        answerer = cls(answer, mode, conditions, model_id or model.path.name)
        if item_set.kind == "choice":
            asked = [answerer.request(item_set, item, options) for item in item_set.items]
            return replace(answerer, answer=chooser(model, asked))
        first = answerer.request(item_set, item_set.items[0], options)
        off = replace(first, options=replace(options, thinking="off"))
        if first.chat and options.thinking == "on" and first.rendered(model) == off.rendered(model):
            what = "thinking is 'on', but the model's chat template has no switch for it"
            raise errors.DfqsError(what, where=model.path, hint="leave thinking at 'template'")
        return replace(answerer, opens_thinking=first.chat and opens_thinking(first.rendered(model)))

    def request(self, item_set: ItemSet, item: Item, options: Options = DEFAULTS) -> Request:
        """An item as this answerer is asked it. In a chat about code no stop text counts."""
        chat = self.mode == "chat"
        text = item.asked(item_set.instruction) if chat else item.prompt
        choices = tuple(item_set.delimiter + choice for choice in item.choices)
        # no choice has more tokens than bytes
        written = item_set.max_tokens + options.thinking_tokens * chat
        max_tokens = max((len(choice.encode()) for choice in choices), default=written)
        stop = () if chat and item_set.kind == "code" else item_set.stop
        return Request(text, chat, max_tokens, stop, options, choices)

    def score(self, item_set: ItemSet, folder: str | Path, options: Options = DEFAULTS) -> SetRun:
        """Answer and judge a set, and resume in ``folder``. A `SandboxError` comes before any question.

        Where ``options.until`` ends the run, the set is that of the questions that were asked.
        """
        item_set, folder = item_set.part(options.limit), Path(folder)
        sandbox = find_sandbox() if item_set.kind == "code" else None
        if sandbox and not (sandbox.safe or options.allow_unsandboxed):
            hint = "--allow-unsandboxed (in a notebook: allow_unsandboxed = True) runs it without a sandbox"
            raise SandboxError(f"no sandbox for generated code ({sandbox.note})", hint=hint)
        folder.mkdir(parents=True, exist_ok=True)
        own: dict[str, Any] = {"mode": self.mode, "sampling": asdict(options.sampling)}
        own |= {"thinking": options.thinking, "thinking_tokens": options.thinking_tokens}
        own |= {"scoring": __version__, **self.conditions}
        known = item_set.identity() | own | {"model": self.model_id}
        file = f"{item_set.name}-{item_set.sha256[:8]}.jsonl"  # two sets of a user may have one name
        answers = journal.Journal(folder / f"answers-{file}", known, fresh=options.fresh, whole=_is_whole)
        items = {item.id: item for item in item_set.by_turns()}
        todo = {key: self.request(item_set, items[key], options) for key in items if key not in answers}
        n_resumed, quiet = len(items) - len(todo), not options.progress
        with display.tqdm(total=len(items), initial=n_resumed, desc=item_set.name, disable=quiet) as bar:
            try:
                for key, answer in self._answers(todo, options.until):
                    answers.add(key, **answer)
                    bar.update()
            except KeyboardInterrupt as stop:
                stop.add_note(f"{bar.n:,} of {bar.total:,} answers of {item_set.name} are there")
                raise
        rows = [_row(item_set, items[key], answers[key], self.mode) for key in items if key in answers]
        if sandbox:
            codes = [row for row in rows if "code" in row]
            _judge(codes, sandbox, folder / f"verdicts-{file}", options)
            own["sandbox"] = sandbox.level
        n = sum(row["grade"] != CUT for row in rows)
        part = {"part": f"{n} of {item_set.n_whole} questions"} if n < item_set.n_whole else {}
        facts: dict[str, Any] = {"conditions": item_set.identity() | part | own, "model": self.model_id}
        facts |= {"n_items": n or len(items), "n_resumed": n_resumed}
        return SetRun.of(item_set.kind, item_set.name, rows, **facts)

    def _answers(self, todo: Mapping[str, Request], until: float) -> Iterator[tuple[str, Row]]:
        """Answers as they come, by the id of their item; none is begun after ``until``."""
        began = time.monotonic()
        for n, (key, request) in enumerate(todo.items()):
            now = time.monotonic()
            if now >= until or (n and now + (now - began) / n > until):  # it would hardly end in time
                return
            row = self.answer(request)
            if not isinstance(row, dict):  # a completion
                text = row.text.encode("utf-8", "replace").decode()  # a file takes no half surrogate pair
                row = {"completion": text, "finish_reason": row.finish_reason, "tokens": row.n_tokens}
                row["opened"] = self.opens_thinking
            yield key, row | {"seconds": round(time.monotonic() - now, 4)}


def score_set(
    model: Model, item_set: ItemSet, folder: str | Path, options: Options = DEFAULTS, *, model_id: str = ""
) -> SetRun:
    """Answer and judge a set with a model in this process; see `Answerer.score`.

    A `DfqsError`: the model was opened with fewer tokens of context than the longest item needs.
    """
    if (n := least_context(model, item_set, options)) > model.settings.n_ctx:
        hint = f"--n-ctx {n} or more (of a notebook or `run`: n_ctx={n}), not {model.settings.n_ctx}"
        raise errors.DfqsError(f"the set {item_set.name} needs {n:,} tokens of context", hint=hint)
    return Answerer.of(model, item_set, options, model_id).score(item_set, folder, options)


def least_context(model: Model, item_set: ItemSet, options: Options) -> int:
    """The tokens of context that the longest item of the part to be asked needs."""
    item_set = item_set.part(options.limit)
    answerer = Answerer.of(model, item_set, options)
    requests = (answerer.request(item_set, item, options) for item in item_set.items)
    return max(len(request.tokens(model)) + request.max_tokens for request in requests)


def _is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether a kept answer counts: one that the time cut is asked for again."""
    written = journal.holds(answer, ANSWER) and answer["finish_reason"] != "time"
    return written or journal.holds(answer, CHOICE)


def _row(item_set: ItemSet, item: Item, answer: Mapping[str, Any], mode: str) -> Row:
    """One row of the frame; what is to be judged has its ``code`` in place of a grade."""
    row = {"set": item_set.name, "expected": item.answer or item.reference, "truncated": False}
    row |= {name: getattr(item, name) for name in ("id", "family", "length", "guess", "prompt")}
    row |= {name: answer.get(name) for name in ("completion", "tokens", "seconds")}
    if item_set.kind == "choice":
        sizes = [len(choice) if item_set.per_character else 1 for choice in item.choices]
        chosen = int(np.argmax(np.array(answer["log_likelihoods"]) / sizes))
        row |= {"completion": item.choices[chosen], "expected": item.choices[item.gold]}
        row |= {"guess": 1 / len(sizes), "grade": "correct", "reason": ""}
        wrong = {"grade": "wrong", "reason": f"chose {item.choices[chosen]!r}"}
        return row if chosen == item.gold else row | wrong
    ended = answer["finish_reason"]
    if ended == "time":
        return row | {"grade": CUT, "reason": f"cut by the budget after {answer['tokens']} tokens"}
    if item_set.kind == "code":
        return row | {"truncated": ended == "length", "code": _candidate(item, answer, mode)}
    judged, why = grade(answer["completion"], ended, item.answer, item_set.extract, answer["opened"])
    return row | {"grade": judged, "reason": why, "truncated": judged == "truncated"}


def _candidate(item: Item, answer: Mapping[str, Any], mode: str) -> Candidate | Verdict:
    """The code to run, or the verdict where there is none."""
    start = answer_start(answer["completion"], answer["opened"]) if mode == "chat" else 0
    if start is None:
        return Verdict("truncated", "its thinking does not end")
    candidate = item.candidate(answer["completion"][start:], mode)
    return candidate or Verdict("no_answer", "no code that defines the function")


def _judge(rows: Sequence[Row], sandbox: Sandbox, path: Path, options: Options) -> None:
    """Run the candidates that have no verdict in ``path``, and put grade and reason into the rows."""
    conditions: dict[str, Any] = {"sandbox": sandbox.level, "limits": asdict(LIMITS), "driver": DRIVER}
    conditions["python"] = platform.python_version()
    kept = journal.Journal(path, conditions, fresh=options.fresh, fields=VERDICT)
    codes = [row["code"] for row in rows]
    todo = {code.key: code for code in codes if isinstance(code, Candidate) and code.key not in kept}
    verdicts = sandbox.verdicts(list(todo.values()), progress=options.progress)
    for key, verdict in zip(todo, verdicts, strict=True):
        kept.add(key, **asdict(verdict))
    for row, code in zip(rows, codes, strict=True):
        ran = isinstance(code, Candidate)
        verdict = Verdict(**kept[code.key]) if isinstance(code, Candidate) else code
        cut = (row["truncated"] or verdict.outcome == "truncated") and not verdict.passed
        reason = f"{'cut off; ' * (cut and ran)}{verdict.outcome}: {verdict.detail}".rstrip(": ")
        row |= {"grade": verdict.outcome, "reason": "" if verdict.passed else reason, "truncated": cut}


@dataclass(frozen=True)
class QuestionPlan:
    """The sets whose items fit the context, of which a time holds at least a dozen answers."""

    model: Model = field(repr=False)
    sets: Sequence[ItemSet]
    n_sets: int  # that are asked, the first ones
    budget_seconds: float
    sentence: str  # the plan for people: what all answers would take at their full length
    pace: Pace
    options: Options
    missing: Sequence[LeftOut]  # the sets whose items do not fit, and what they need

    def ask(self, folder: str | Path, *, model_id: str = "") -> tuple[Results, list[LeftOut]]:
        """Ask each set in its share of the time (see `Options.shares`); the results, and what was left out.

        The answer at which the time ends is cut there. Earlier answers always count.
        """
        runs, missing, base = list[SetRun](), [*self.missing], not self.model.has_template
        shares = self.options.shares(self.sets, self.budget_seconds, self.n_sets, is_base=base)
        for number, (each, options) in enumerate(shares):
            run = score_set(self.model, each, folder, options, model_id=model_id)
            n, most = len(run.answered), len(each.items)
            if is_asked := n > 0 or number < self.n_sets:
                runs.append(run)
            if n < most:
                why = f"only {n} of {most} questions answered{'; 1 was cut off' * (n < len(run.items))}"
                missing.append(LeftOut(f"the set {each.name}", why * is_asked))
        return Results(runs), missing


def plan_questions(model: Model, item_sets: list[ItemSet], options: Options, seconds: float) -> QuestionPlan:
    """Time a few tokens, and plan the sets that these seconds hold a dozen answers of, at least two.

    Answers count at their full length, and prompts by four characters a token. A `DfqsError`: no set has
    items that fit the model's context.
    """
    most, needs = model.settings.n_ctx, {it.name: least_context(model, it, options) for it in item_sets}
    missing = [LeftOut(f"the set {it}", needs=f"n_ctx={n}") for it, n in needs.items() if n > most]
    if len(missing) == len(needs):
        raise errors.DfqsError(f"no set fits n_ctx={most}: {'; '.join(map(str, missing))}")
    sets = [it.part(options.limit) for it in item_sets if needs[it.name] <= most]
    pace, n_sets = probe(model), len(sets)

    def cost(item_set: ItemSet) -> float:
        written = (item_set.max_tokens + options.thinking_tokens) * (item_set.kind != "choice")
        texts = ("".join((item.asked(item_set.instruction), *item.choices)) for item in item_set.items)
        return sum(pace.seconds(len(text) / 4 + 16, written) for text in texts)

    while n_sets > 2 and sum(cost(each.part(DOZEN)) for each in sets[:n_sets]) > seconds:
        n_sets -= 1
    n, whole = sum(len(each.items) for each in sets), sum(map(cost, sets))
    sentence = f"{n:,} of {n:,} questions, at most {display.duration(whole)}"
    if whole > seconds:
        sentence = f"at most {display.duration(seconds)}: as many of {n:,} questions as that holds"
        sentence += f" (all could take {display.duration(whole)})"
    return QuestionPlan(model, sets, n_sets, seconds, sentence, pace, options, missing)


# ---- multiple choice by log-likelihood: the likeliest choice is the answer, and no text is generated ----
# The protocol is that of lm-evaluation-harness (``multiple_choice``, Gao et al. 2024): a choice's score is
# the sum of its tokens' log-probabilities.


def chooser(model: Model, requests: Sequence[Request]) -> Callable[[Request], dict[str, Any]]:
    """A function that scores each choice of one of these requests.

    It returns ``log_likelihoods`` (nats) and ``greedy`` (whether greedy decoding gives it) of each choice,
    and their ``tokens``. What all contexts begin with, and what the choices of a question share, is evaluated
    once and then restored, so four choices cost little more than one; all afresh, where a check on the first
    question finds that a restored state is wrong.
    """

    @cache
    def start() -> tuple[bool, Prefix]:
        context, choices = encode(model, requests[0])
        reuse = check_reuse(model, context, max(choices, key=len)).allowed
        # without the last token, which is evaluated for its logits
        shared = commonprefix([encode(model, request)[0][:-1] for request in requests])
        return reuse, model.hold(shared if reuse else [], reuse=reuse)

    def scored(request: Request) -> dict[str, Any]:
        (reuse, beginning), (context, choices) = start(), encode(model, request)
        model.restore(beginning)
        first = log_softmax(model.evaluate(context[beginning.n_tokens :]).astype(float))[None]
        whole = model.save() if reuse else Prefix(len(context), None, context)
        values, greedy = list[float](), list[bool]()
        for tokens in choices:
            rows = first
            if len(tokens) > 1:
                model.restore(whole)
                logits = np.concatenate([chunk.copy() for chunk in model.logits(tokens[:-1])])
                rows = np.concatenate([first, log_softmax(logits.astype(float), axis=-1)])
            values.append(float(rows[np.arange(len(tokens)), tokens].sum()))
            greedy.append(bool((rows.argmax(axis=1) == tokens).all()))
        return {"log_likelihoods": values, "greedy": greedy, "tokens": sum(map(len, choices))}

    return scored


def encode(model: Model, request: Request) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, and of each choice behind it.

    Blanks at the context's end belong to the choices, and both are tokenized together, because tokenizers
    join a blank with the word behind it. A model without a template has one behind the frame's "Answer:".
    """
    choices = request.choices
    if request.chat:
        texts = choices if model.has_template else [f" {choice.lstrip(' ')}" for choice in choices]
        return request.tokens(model), [model.tokenize(text, special=False) for text in texts]
    whole = request.text.rstrip(), *(request.text + choice for choice in choices)
    context, *together = (model.with_bos(model.tokenize(text, special=False)) for text in whole)
    return context, [tokens[len(context) :] or tokens[-1:] for tokens in together]
