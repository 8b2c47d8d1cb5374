"""Ask a model every question of a set, judge the answers, and keep both, so that a killed run continues.

A run is two append-only files: the answers, and the sandbox's verdicts on programs. An error of another cause
(decoding fails, the sandbox does not start) stops the run; it never scores 0.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dfqs_nb import __version__
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.journal import Journal, holds
from dfqs_nb.llama.generate import GREEDY, Completion, Sampling, TextStream, chat_prompt, chat_text
from dfqs_nb.llama.model import PLAIN_STOP, Model
from dfqs_nb.llama.thinking import answer_start, opens_thinking
from dfqs_nb.scores.answers import repeats
from dfqs_nb.scores.grading import SetRun, grade
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import DRIVER, LIMITS, Candidate, Sandbox, Verdict, check_allowed, find_sandbox

THINKING = ("template", "on", "off")
BATCH = 32  # candidates judged between two writes
# what a line of the two files holds
ANSWER = {"completion": str, "finish_reason": str, "opened": bool, "tokens": int, "seconds": float}
VERDICT = {"outcome": str, "detail": str}


@dataclass(frozen=True)
class Options:
    """How a set is answered.

    Attributes:
        temperature, top_p: how tokens are chosen; temperature 0 is greedy.
        seed: of the sampling; each sample of an item has a seed of its own.
        n_samples: answers to each item; several need a temperature.
        thinking: ``template`` leaves it to the chat template; ``on`` and ``off`` tell the template.
        thinking_tokens: for the thinking, on top of the set's own limit for the answer.
        limit: only the first items; the score is then withheld.
    """

    temperature: float = 0.0
    top_p: float = GREEDY.top_p
    seed: int = GREEDY.seed
    n_samples: int = 1
    thinking: str = "template"
    thinking_tokens: int = 0
    limit: int | None = None
    allow_unsandboxed: bool = False
    fresh: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.thinking not in THINKING:
            raise PromptError(f"thinking is {self.thinking!r}", hint=f"use one of {', '.join(THINKING)}")
        if self.n_samples > 1 and not self.temperature:
            raise PromptError("greedy samples are all the same", hint="give a temperature, or one sample")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def conditions(self) -> dict[str, Any]:
        """What an answer depends on."""
        thinking = {"thinking": self.thinking, "thinking_tokens": self.thinking_tokens}
        return {"sampling": asdict(self.sampling), **thinking}


@dataclass(frozen=True)
class Request:
    """One question as it goes to a model: a chat's message, or text to continue."""

    text: str
    chat: bool
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    thinking: str = "template"

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
    """A way of answering: a model in this process, or a server.

    Attributes:
        answer: gives the completion of a request. mode: ``chat`` or ``complete``.
        conditions: what an answer depends on besides the model, the set and the options.
        model_id: the model's SHA-256, or a name where that is not known.
        opens_thinking: the chat template begins the thinking, so the answer's text lacks its mark.
        n_parallel: items asked at once; more than one only where threads may share ``answer``.
    """

    answer: Callable[[Request], Completion]
    mode: str
    conditions: Mapping[str, Any]
    model_id: str
    opens_thinking: bool = False
    n_parallel: int = 1

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
            stop = (*request.stop, *plain)
            return TextStream(model, tokens, request.max_tokens, request.sampling, stop).completion

        conditions = {"chat_template_sha256": used, **model.conditions()}
        answerer = cls(answer, mode, conditions, model_id or model.path.name)
        first = answerer.request(item_set, item_set.items[0], options)
        return replace(answerer, opens_thinking=first.chat and opens_thinking(first.rendered(model)))

    def request(self, item_set: ItemSet, item: Item, options: Options = Options()) -> Request:
        """An item as this answerer is asked it.

        A code block may hold any stop text, so in a chat about code none counts.
        """
        chat = self.mode == "chat"
        return Request(
            text=item.asked(item_set.instruction) if chat else item.prompt,
            chat=chat,
            max_tokens=item_set.max_tokens + options.thinking_tokens * chat,
            stop=() if chat and item_set.kind == "code" else item_set.stop,
            sampling=options.sampling,
            thinking=options.thinking,
        )

    def score(self, item_set: ItemSet, folder: str | Path, options: Options = Options()) -> SetRun:
        """Answer and judge a set, continuing what an earlier run left in ``folder``.

        It receives ``answers-<set>.jsonl`` and ``verdicts-<set>.jsonl``. A `SandboxError` comes before the
        first question.
        """
        if item_set.kind == "choice":
            hint = "answer it with `dfqs-nb choices MODEL --set FILE.jsonl`"
            raise PromptError(f"{item_set.name} is a multiple-choice set", hint=hint)
        sandbox = find_sandbox() if item_set.kind == "code" else None
        if sandbox:
            check_allowed(sandbox, options.allow_unsandboxed)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = {"mode": self.mode, **options.conditions(), "scoring": __version__}
        conditions = {**item_set.identity(), **own, **self.conditions}
        free = ("repeats", "sandbox", "part")  # an answer does not depend on these
        known = {name: value for name, value in conditions.items() if name not in free}
        known["model"], place = self.model_id, folder / f"answers-{item_set.name}.jsonl"
        journal = Journal(place, known, fresh=options.fresh, whole=lambda row: holds(row, ANSWER))
        wanted = {
            f"{item.id}#{number}": (item, number)
            for item in item_set.items[: options.limit]
            for number in range(options.n_samples)
        }
        todo = {key: sample for key, sample in wanted.items() if key not in journal}
        n_resumed, quiet = len(wanted) - len(todo), not options.progress
        with tqdm(total=len(wanted), initial=n_resumed, desc=item_set.name, disable=quiet) as bar:
            for key, fields in self._answers(item_set, todo, options):
                journal.add(key, **fields)
                bar.update()
        rows = [_row(item_set, *wanted[key], journal[key]) for key in wanted]
        if sandbox:
            candidates = [_candidate(item, journal[key], self.mode) for key, (item, _) in wanted.items()]
            _judge(rows, candidates, sandbox, folder / f"verdicts-{item_set.name}.jsonl", options)
            conditions["sandbox"] = sandbox.level
        facts: dict[str, Any] = {"n_items": len(item_set.items), "n_resumed": n_resumed}
        facts |= {"conditions": conditions | {"repeats": options.n_samples}, "model": self.model_id}
        return SetRun.of(item_set.kind, item_set.name, rows, **facts)

    def _answers(
        self, item_set: ItemSet, todo: Mapping[str, tuple[Item, int]], options: Options
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Answers as they come, by the key of their sample. After an error no further item is asked."""
        errors: list[Exception] = []

        def ask(key: str) -> tuple[str, dict[str, Any]]:
            item, number = todo[key]
            return key, self._asked(
                self.request(item_set, item, replace(options, seed=options.seed + number))
            )

        def ask_beside(key: str) -> tuple[str, dict[str, Any]] | None:
            try:
                return None if errors else ask(key)
            except Exception as error:
                errors.append(error)
                return None

        if self.n_parallel == 1:
            yield from map(ask, todo)
            return
        with ThreadPoolExecutor(self.n_parallel) as pool:
            asked = [pool.submit(ask_beside, key) for key in todo]
            try:
                yield from filter(None, (done.result() for done in as_completed(asked)))
            finally:
                pool.shutdown(cancel_futures=True)
        if errors:
            raise errors[0]

    def _asked(self, request: Request) -> dict[str, Any]:
        """The answer to a request, as the journal keeps it."""
        started = time.perf_counter()
        completion = self.answer(request)
        return {
            # half of a surrogate pair is no text, and no file could hold it
            "completion": completion.text.encode("utf-8", "replace").decode(),
            "finish_reason": completion.finish_reason,
            "opened": self.opens_thinking,
            "tokens": completion.n_tokens,
            "seconds": round(time.perf_counter() - started, 4),
        }


def score_set(
    model: Model, item_set: ItemSet, folder: str | Path, options: Options = Options(), *, model_id: str = ""
) -> SetRun:
    """Answer and judge a whole set with a model in this process; see `Answerer.score`.

    Raises:
        SandboxError: the set is code and there is no sandbox; nothing has been asked yet.
        PromptError, ModelError: as `check_prompts`. DecodeError: llama.cpp fails at an item.
    """
    answerer = Answerer.of(model, item_set, options, model_id)
    check_prompts(model, item_set, answerer, options)
    return answerer.score(item_set, folder, options)


def check_prompts(model: Model, item_set: ItemSet, answerer: Answerer, options: Options = Options()) -> int:
    """The context in tokens that the longest item needs.

    Raises:
        PromptError: it is more than the model was opened with.
        ModelError: the chat template fails, or drops a question.
    """
    requests = (answerer.request(item_set, item, options) for item in item_set.items)
    longest = max(len(request.tokens(model)) + request.max_tokens for request in requests)
    if longest > model.settings.n_ctx:
        hint = f"open the model with n_ctx of at least {longest:,}, not {model.settings.n_ctx:,}"
        raise PromptError(f"the set {item_set.name} needs {longest:,} tokens of context", hint=hint)
    return longest


def _row(item_set: ItemSet, item: Item, number: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the frame; code is judged later."""
    shared = ("id", "family", "length", "guess", "prompt")
    row = {"set": item_set.name, "sample": number} | {name: getattr(item, name) for name in shared}
    row |= {name: answer[name] for name in ("completion", "tokens", "seconds")}
    row |= {"expected": item.answer or item.reference, "truncated": answer["finish_reason"] == "length"}
    if item_set.kind == "code":
        return row
    text, how = answer["completion"], item_set.extract
    judged, given = grade(text, answer["finish_reason"], item.answer, how, answer["opened"])
    looped = ", and repeats itself" if repeats(text) else ""
    reasons = {"wrong": f"answered {given!r}", "no_answer": f"no answer in its {how}"}
    reasons["truncated"] = f"cut off after {answer['tokens']} tokens{looped}"
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
    rows: list[dict[str, Any]],
    candidates: Sequence[Candidate | Verdict],
    sandbox: Sandbox,
    path: Path,
    options: Options,
) -> None:
    """Run the candidates that have no verdict yet, and put grade and reason into the rows."""
    driver = hashlib.sha256(DRIVER.encode()).hexdigest()[:16]
    conditions = {"sandbox": sandbox.level, "limits": asdict(LIMITS), "driver": driver}
    conditions["python"] = platform.python_version()
    journal = Journal(path, conditions, fresh=options.fresh, whole=lambda row: holds(row, VERDICT))
    todo = {each.key: each for each in candidates if isinstance(each, Candidate) and each.key not in journal}
    with tqdm(total=len(todo), desc="tests", disable=not options.progress or not todo) as bar:
        for start in range(0, len(todo), BATCH):
            part = list(todo)[start : start + BATCH]
            for key, verdict in zip(part, sandbox.verdicts([todo[key] for key in part]), strict=True):
                journal.add(key, **asdict(verdict))
            bar.update(len(part))
    for row, candidate in zip(rows, candidates, strict=True):
        ran = isinstance(candidate, Candidate)
        verdict = Verdict(**journal[candidate.key]) if isinstance(candidate, Candidate) else candidate
        cut = (row["truncated"] or verdict.outcome == "truncated") and not verdict.passed
        reason = f"{'cut off; ' * (cut and ran)}{verdict.outcome}: {verdict.detail}".rstrip(": ")
        row |= {"grade": verdict.outcome, "reason": "" if verdict.passed else reason}
        row |= {"correct": verdict.passed, "truncated": cut}
