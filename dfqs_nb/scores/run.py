"""Ask a model every question of a set and judge the answers; both are kept, so that a killed run continues.

An error that is not the answer's fault stops the run. It never scores 0.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.core import display, errors, journal
from dfqs_nb.llama.generate import GREEDY, Completion, Sampling, TextStream, chat_prompt, chat_text
from dfqs_nb.llama.model import PLAIN_STOP, Model
from dfqs_nb.llama.thinking import answer_start, opens_thinking
from dfqs_nb.scores.grading import SetRun, grade
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import DRIVER, LIMITS, Candidate, Sandbox, Verdict, check_allowed, find_sandbox

THINKING = ("template", "on", "off")
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
            raise errors.PromptError(
                f"thinking is {self.thinking!r}", hint=f"use one of {', '.join(THINKING)}"
            )
        if self.n_samples > 1 and not self.temperature:
            raise errors.PromptError(
                "greedy samples are all the same", hint="give a temperature, or one sample"
            )

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

    @property
    def variables(self) -> dict[str, bool]:
        """What the chat template is told about thinking, by the names that templates use."""
        if self.thinking == "template":
            return {}
        return dict.fromkeys(("enable_thinking", "thinking"), self.thinking == "on")

    def rendered(self, model: Model) -> str:
        """The text that this model gets."""
        return chat_text(model, self.text, **self.variables) if self.chat else self.text

    def tokens(self, model: Model) -> list[int]:
        """Token ids of the prompt that this model gets."""
        if self.chat:
            return chat_prompt(model, self.text, **self.variables)
        return model.with_bos(model.tokenize(self.text, special=False))


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
        template = str(model.header.get("tokenizer.chat_template") or "")
        mode = "complete" if item_set.kind == "code" and not template else item_set.mode
        plain = (PLAIN_STOP,) if mode == "chat" and not template else ()
        used = hashlib.sha256(template.encode()).hexdigest() if mode == "chat" and template else "none"

        def answer(request: Request) -> Completion:
            tokens = request.tokens(model)
            limits = (*request.stop, *plain), request.until
            return TextStream(model, tokens, request.max_tokens, request.sampling, *limits).completion

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
        """Answer and judge a set, and resume in ``folder``. A `SandboxError` comes before any question."""
        if item_set.kind == "choice":
            hint = "answer it with `dfqs-nb choices MODEL --set FILE.jsonl`"
            raise errors.PromptError(f"{item_set.name} is a multiple-choice set", hint=hint)
        sandbox = find_sandbox() if item_set.kind == "code" else None
        if sandbox:
            check_allowed(sandbox, options.allow_unsandboxed)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        conditions = item_set.identity() | {"mode": self.mode, "sampling": asdict(options.sampling)}
        conditions |= {"thinking": options.thinking, "thinking_tokens": options.thinking_tokens}
        conditions |= {"scoring": __version__, **self.conditions}
        free = ("repeats", "sandbox", "part")  # an answer does not depend on these
        known = {name: value for name, value in conditions.items() if name not in free}
        known["model"], place = self.model_id, folder / f"answers-{item_set.name}.jsonl"
        answers = journal.Journal(
            place, known, fresh=options.fresh, whole=lambda row: journal.holds(row, ANSWER)
        )
        samples = product(item_set.items[: options.limit], range(options.n_samples))
        wanted = {f"{item.id}#{number}": (item, number) for item, number in samples}
        todo = {key: sample for key, sample in wanted.items() if key not in answers}
        n_resumed, quiet = len(wanted) - len(todo), not options.progress
        with display.tqdm(total=len(wanted), initial=n_resumed, desc=item_set.name, disable=quiet) as bar:
            for key, fields in self._answers(item_set, todo, options):
                answers.add(key, **fields)
                bar.update()
        wanted = {key: sample for key, sample in wanted.items() if key in answers}
        rows = [_row(item_set, *wanted[key], answers[key]) for key in wanted]
        if sandbox:
            candidates = [_candidate(item, answers[key], self.mode) for key, (item, _) in wanted.items()]
            _judge(rows, candidates, sandbox, folder / f"verdicts-{item_set.name}.jsonl", options)
            conditions["sandbox"] = sandbox.level
        facts: dict[str, Any] = {"n_items": len(item_set.items), "n_resumed": n_resumed}
        facts |= {"conditions": conditions | {"repeats": options.n_samples}, "model": self.model_id}
        return SetRun.of(item_set.kind, item_set.name, rows, **facts)

    def _answers(
        self, item_set: ItemSet, todo: Mapping[str, tuple[Item, int]], options: Options
    ) -> Iterator[tuple[str, Row]]:
        """Answers as they come, by the key of their sample; an answer that the time cut is none."""

        def ask(key: str) -> tuple[str, Row]:
            item, number = todo[key]
            request = self.request(item_set, item, replace(options, seed=options.seed + number))
            started, made = time.perf_counter(), self.answer(request)
            # no file could hold half of a surrogate pair
            text = made.text.encode("utf-8", "replace").decode()
            row = {"completion": text, "finish_reason": made.finish_reason, "opened": self.opens_thinking}
            return key, row | {"tokens": made.n_tokens, "seconds": round(time.perf_counter() - started, 4)}

        if self.n_parallel == 1:
            for key in todo:
                if time.monotonic() > options.until or (made := ask(key))[1]["finish_reason"] == "time":
                    return
                yield made
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
    """Answer and judge a whole set with a model in this process; see `check_prompts` and `Answerer.score`."""
    answerer = Answerer.of(model, item_set, options, model_id)
    check_prompts(model, item_set, answerer, options)
    return answerer.score(item_set, folder, options)


def check_prompts(model: Model, item_set: ItemSet, answerer: Answerer, options: Options = Options()) -> int:
    """Tokens of context that the longest item needs; a `PromptError` if the model was opened with fewer."""
    requests = (answerer.request(item_set, item, options) for item in item_set.items)
    longest = max(len(request.tokens(model)) + request.max_tokens for request in requests)
    if longest > model.settings.n_ctx:
        hint = f"open the model with n_ctx of at least {longest:,}, not {model.settings.n_ctx:,}"
        raise errors.PromptError(f"the set {item_set.name} needs {longest:,} tokens of context", hint=hint)
    return longest


def _row(item_set: ItemSet, item: Item, number: int, answer: Mapping[str, Any]) -> Row:
    """One row of the frame; code is judged later."""
    shared = ("id", "family", "length", "guess", "prompt")
    row = {"set": item_set.name, "sample": number} | {name: getattr(item, name) for name in shared}
    row |= {name: answer[name] for name in ("completion", "tokens", "seconds")}
    row |= {"expected": item.answer or item.reference, "truncated": answer["finish_reason"] == "length"}
    if item_set.kind == "code":
        return row
    text, how = answer["completion"], item_set.extract
    judged, given = grade(text, answer["finish_reason"], item.answer, how, answer["opened"])
    reasons = {"wrong": f"answered {given!r}", "no_answer": f"no answer in its {how}"}
    reasons["truncated"] = f"cut off after {answer['tokens']} tokens"
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
    rows: list[Row], candidates: list[Candidate | Verdict], sandbox: Sandbox, path: Path, options: Options
) -> None:
    """Run the candidates that have no verdict in ``path``, and put grade and reason into the rows."""
    conditions: dict[str, Any] = {"sandbox": sandbox.level, "limits": asdict(LIMITS), "driver": DRIVER}
    conditions["python"] = platform.python_version()
    kept = journal.Journal(
        path, conditions, fresh=options.fresh, whole=lambda row: journal.holds(row, VERDICT)
    )
    todo = {each.key: each for each in candidates if isinstance(each, Candidate) and each.key not in kept}
    verdicts = sandbox.verdicts(list(todo.values()), progress=options.progress)
    for key, verdict in zip(todo, verdicts, strict=True):
        kept.add(key, **asdict(verdict))
    for row, candidate in zip(rows, candidates, strict=True):
        ran = isinstance(candidate, Candidate)
        verdict = Verdict(**kept[candidate.key]) if isinstance(candidate, Candidate) else candidate
        cut = (row["truncated"] or verdict.outcome == "truncated") and not verdict.passed
        reason = f"{'cut off; ' * (cut and ran)}{verdict.outcome}: {verdict.detail}".rstrip(": ")
        row |= {"grade": verdict.outcome, "reason": "" if verdict.passed else reason}
        row |= {"correct": verdict.passed, "truncated": cut}
