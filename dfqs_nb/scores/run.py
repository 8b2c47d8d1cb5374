"""Ask a model every question of a set, judge the answers, and keep both, so that a killed run continues.

A run is two append-only files: answers, keyed by the conditions, the model and the item; and the sandbox's
verdicts, keyed by the program that ran. What failed for a reason outside the answer (a decode error, a
sandbox that does not start) is tried again and then stops the run; it is never a score of 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb import __version__
from dfqs_nb.context.prompts import PromptError
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.journal import Journal
from dfqs_nb.llama.generate import GREEDY, Completion, Sampling, chat_prompt, stream_tokens
from dfqs_nb.llama.model import ContextFullError, DecodeError, Model
from dfqs_nb.scores import grading as scoring
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.scores.sandbox import LIMITS, Limits, Sandbox, Verdict, check_allowed, find_sandbox, run_many

if TYPE_CHECKING:
    import pandas as pd

ATTEMPTS = 3  # at decoding one item
BATCH = 32  # candidates judged between two writes

Answerer = Callable[[Item, Sampling], Completion]


@dataclass(frozen=True)
class SetRun:
    """A set, answered and judged.

    Attributes:
        items: one row a sample: ``set``, ``id``, ``sample``, ``family``, ``length``, ``guess``, ``prompt``,
            ``completion``, ``expected``, ``grade`` (of code: the outcome), ``reason``, ``correct``,
            ``truncated``, ``tokens``, ``seconds``.
        score: of the whole set; its value is None while items lack a result.
        pass_at: for code with several samples: the score at each k asked for.
        conditions: all that the score depends on, the model's SHA-256 apart.
        model: the model's SHA-256 (or a name, where none is known).
        n_resumed: samples whose answer was found and not asked for again.
    """

    item_set: ItemSet
    items: pd.DataFrame = field(repr=False)
    score: scoring.Score
    pass_at: dict[int, scoring.Score]
    conditions: dict[str, Any] = field(repr=False)
    model: str
    n_resumed: int


def answerer(model: Model, item_set: ItemSet) -> Answerer:
    """How this model answers the items of this set: by chat template or as plain continuation."""

    chatting_code = item_set.kind == "code" and mode_for(model, item_set) == "chat"
    stop = () if chatting_code else item_set.stop  # a code block may hold any stop text

    def answer(item: Item, sampling: Sampling) -> Completion:
        tokens = prompt_tokens(model, item_set, item)
        return stream_tokens(model, tokens, item_set.max_tokens, sampling, stop).completion

    return answer


def prompt_tokens(model: Model, item_set: ItemSet, item: Item) -> list[int]:
    """Token ids of an item's prompt, as the set's mode has it."""
    if mode_for(model, item_set) == "chat":
        return chat_prompt(model, item.asked(item_set.instruction))
    return model.with_bos(model.tokenize(item.prompt, special=False))


def mode_for(model: Model, item_set: ItemSet) -> str:
    """The set's mode; a code set is plain continuation where a model has no chat template."""
    has_template = bool(model.header.get("tokenizer.chat_template"))
    return "complete" if item_set.kind == "code" and not has_template else item_set.mode


def check_context(model: Model, item_set: ItemSet) -> int:
    """The context in tokens that the longest item needs.

    Raises:
        PromptError: it is more than the model was opened with.
    """
    longest = max(len(prompt_tokens(model, item_set, item)) for item in item_set.items) + item_set.max_tokens
    if longest > model.settings.n_ctx:
        raise PromptError(
            f"the set {item_set.name} needs {longest:,} tokens of context",
            hint=f"open the model with n_ctx of at least {longest:,}, not {model.settings.n_ctx:,}",
        )
    return longest


def run_conditions(model: Model, item_set: ItemSet, sampling: Sampling = GREEDY) -> dict[str, Any]:
    """What an answer depends on beside the model: prompts, template, sampling and runtime."""
    mode = mode_for(model, item_set)
    template = "" if mode == "complete" else str(model.header.get("tokenizer.chat_template") or "")
    return {
        **item_set.identity(),
        "mode": mode,
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else "none",
        "sampling": dataclasses.asdict(sampling),
        "scoring": __version__,
        **model.conditions(),
    }


def score_set(
    model: Model,
    item_set: ItemSet,
    folder: str | Path,
    *,
    model_id: str = "",
    sampling: Sampling = GREEDY,
    n_samples: int = 1,
    ks: Sequence[int] = (),
    limit: int | None = None,
    allow_unsandboxed: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> SetRun:
    """Answer and judge a whole set, continuing what an earlier run left in ``folder``.

    Args:
        folder: receives ``answers-<set>.jsonl`` and ``verdicts-<set>.jsonl``.
        model_id: the model's SHA-256, part of what an answer is kept under.
        sampling, n_samples, ks: of code: with a temperature, several samples a task, and pass@k for each k.
        limit: only the first items; the score is then withheld.
        allow_unsandboxed: run code even where there is no sandbox.

    Raises:
        SandboxError: the set is code and there is no sandbox; nothing has been asked yet.
        PromptError: an item does not fit into the context.
        DecodeError: llama.cpp fails at an item three times.
    """
    if item_set.kind == "code":
        check_allowed(find_sandbox(), allow_unsandboxed)
    check_context(model, item_set)
    return collect(
        answerer(model, item_set),
        item_set,
        folder,
        run_conditions(model, item_set, sampling),
        model_id=model_id or model.path.name,
        sampling=sampling,
        n_samples=n_samples,
        ks=ks,
        limit=limit,
        fresh=fresh,
        progress=progress,
    )


def collect(
    answer: Answerer,
    item_set: ItemSet,
    folder: str | Path,
    conditions: dict[str, Any],
    *,
    model_id: str,
    sampling: Sampling = GREEDY,
    n_samples: int = 1,
    ks: Sequence[int] = (),
    limit: int | None = None,
    fresh: bool = False,
    progress: bool = True,
    sandbox: Sandbox | None = None,
    n_parallel: int = 1,
) -> SetRun:
    """``score_set`` for any way of answering; the caller has checked sandbox and context.

    Args:
        n_parallel: items asked at once; only for ways of answering that threads may share.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    place = {kind: Path(folder) / f"{kind}-{item_set.name}.jsonl" for kind in ("answers", "verdicts")}
    journal = Journal(place["answers"], {**conditions, "model": model_id}, fresh=fresh)
    wanted = [(item, sample) for item in item_set.items[:limit] for sample in range(n_samples)]
    n_resumed = sum(_key(item, sample) in journal for item, sample in wanted)
    todo = [one for one in wanted if _key(*one) not in journal]
    with tqdm(total=len(wanted), initial=n_resumed, desc=item_set.name, disable=not progress) as bar:
        for (item, sample), said in _answers(answer, todo, sampling, n_parallel):
            journal.add(_key(item, sample), **said)
            bar.update()
    rows = [_row(item_set, item, sample, journal[_key(item, sample)]) for item, sample in wanted]
    if item_set.kind == "code":
        sandbox = sandbox or find_sandbox()
        conditions = {**conditions, "sandbox": sandbox.level}
        candidates = [
            _candidate(item, row["completion"], conditions.get("mode", item_set.mode))
            for (item, _), row in zip(wanted, rows, strict=True)
        ]
        _judge(rows, candidates, sandbox, place["verdicts"], fresh, progress)
    items = _frame(rows)
    score, pass_at = _scores(items, item_set, ks)
    return SetRun(item_set, items, score, pass_at, conditions, model_id, n_resumed)


def _key(item: Item, sample: int) -> str:
    return f"{item.id}#{sample}"


def _answers(
    answer: Answerer, todo: Sequence[tuple[Item, int]], sampling: Sampling, n_parallel: int
) -> Iterator[tuple[tuple[Item, int], dict[str, Any]]]:
    """Answers as they come. After an error no new item is begun, and what was under way is still handed
    over before the error is raised.
    """
    if n_parallel == 1:
        yield from ((one, _asked(answer, *one, sampling)) for one in todo)
        return
    left, under_way, failed = iter(todo), {}, None
    with ThreadPoolExecutor(n_parallel) as pool:
        while True:
            for one in islice(left, n_parallel - len(under_way) if failed is None else 0):
                under_way[pool.submit(_asked, answer, *one, sampling)] = one
            if not under_way:
                break
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                one, error = under_way.pop(done), done.exception()
                failed = failed or error
                if error is None:
                    yield one, done.result()
    if failed is not None:
        raise failed


def _asked(answer: Answerer, item: Item, sample: int, sampling: Sampling) -> dict[str, Any]:
    """The answer to one item, as it is written down; each sample of a task has a seed of its own."""
    seeded = dataclasses.replace(sampling, seed=sampling.seed + sample)
    started = time.perf_counter()
    said = _patiently(answer, item, seeded)
    return {
        "completion": said.text,
        "finish_reason": said.finish_reason,
        "tokens": said.n_tokens,
        "seconds": round(time.perf_counter() - started, 4),
    }


def _patiently(answer: Answerer, item: Item, sampling: Sampling) -> Completion:
    for _ in range(ATTEMPTS - 1):
        try:
            return answer(item, sampling)
        except ContextFullError:
            raise
        except DecodeError:
            time.sleep(0.1)
    return answer(item, sampling)


def _row(item_set: ItemSet, item: Item, sample: int, said: dict[str, Any]) -> dict[str, Any]:
    """One row of the frame; code is judged later."""
    row = {
        "set": item_set.name,
        "id": item.id,
        "sample": sample,
        "family": item.family,
        "length": item.length,
        "guess": item.guess,
        "prompt": item.prompt,
        "completion": said["completion"],
        "expected": item.answer or item.reference,
        "tokens": said["tokens"],
        "seconds": said["seconds"],
    }
    if item_set.kind == "code":
        return {**row, "cut": said["finish_reason"] == "length"}
    grade, given = scoring.grade(said["completion"], said["finish_reason"], item.answer, item_set.extract)
    reasons = {
        "wrong": f"answered {given!r}",
        "no_answer": f"no answer in its {item_set.extract}",
        "truncated": f"cut off after {said['tokens']} tokens",
        "correct": "",
    }
    return {
        **row,
        "grade": grade,
        "reason": reasons[grade],
        "correct": grade == "correct",
        "truncated": grade == "truncated",
    }


def _candidate(item: Item, completion: str, mode: str) -> str | None:
    """The program to run; None where a chat's answer has no code block with the function."""
    code = item.completed(scoring.after_thought(completion)) if mode == "chat" else completion
    return None if code is None else item.program(code)


def _judge(
    rows: list[dict[str, Any]],
    candidates: Sequence[str | None],
    sandbox: Sandbox,
    path: Path,
    fresh: bool,
    progress: bool,
    limits: Limits = LIMITS,
) -> None:
    """Run the candidates that have no verdict yet, and put grade and reason into the rows."""
    journal = Journal(path, {"sandbox": sandbox.level, "limits": dataclasses.asdict(limits)}, fresh=fresh)
    keys = [_program_key(program) for program in candidates]
    todo = {key: program for key, program in zip(keys, candidates, strict=True) if key and key not in journal}
    with tqdm(total=len(todo), desc="tests", disable=not progress or not todo) as bar:
        for start in range(0, len(todo), BATCH):
            part = list(todo.items())[start : start + BATCH]
            verdicts = run_many([program for _, program in part], sandbox, limits)
            for (key, _), verdict in zip(part, verdicts, strict=True):
                journal.add(key, outcome=verdict.outcome, detail=verdict.detail)
            bar.update(len(part))
    for row, key in zip(rows, keys, strict=True):
        verdict = Verdict(**journal[key]) if key else Verdict("no_answer", "no code block with the function")
        row |= _verdict_fields(verdict, row.pop("cut"))


def _program_key(program: str | None) -> str:
    return hashlib.sha256(program.encode("utf-8", "replace")).hexdigest()[:24] if program is not None else ""


def _verdict_fields(verdict: Verdict, cut: bool) -> dict[str, Any]:
    lead = "cut off; " if cut else ""
    reason = "" if verdict.passed else f"{lead}{verdict.outcome}: {verdict.detail}".rstrip(": ")
    return {
        "grade": verdict.outcome,
        "reason": reason,
        "correct": verdict.passed,
        "truncated": cut and not verdict.passed,
    }


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    columns = [
        "set",
        "id",
        "sample",
        "family",
        "length",
        "guess",
        "prompt",
        "completion",
        "expected",
        "grade",
        "reason",
        "correct",
        "truncated",
        "tokens",
        "seconds",
    ]
    return pd.DataFrame(rows, columns=columns)


def _scores(
    items: pd.DataFrame, item_set: ItemSet, ks: Sequence[int]
) -> tuple[scoring.Score, dict[int, scoring.Score]]:
    n = len(item_set.items)
    if item_set.kind == "reasoning":
        first = items[items["sample"] == 0]
        return scoring.reasoning_score(first, item_set.name, n), {}
    samples = items.rename(columns={"grade": "outcome"})
    return scoring.code_score(samples, item_set.name, n), {
        k: scoring.code_score(samples, item_set.name, n, k) for k in ks
    }


def score_table(runs: Sequence[SetRun]) -> pd.DataFrame:
    """One row a set: the metric, its value and interval, the guess rate, and how items failed."""
    import pandas as pd

    rows = []
    for run in runs:
        fields = run.score.as_dict()
        counts = fields.pop("counts")
        rows.append(
            fields | {"truncated": int(run.items["truncated"].sum()), "no_answer": counts.get("no_answer", 0)}
        )
    columns = [
        "set",
        "name",
        "value",
        "low",
        "high",
        "standard_error",
        "n",
        "n_missing",
        "guess_rate",
        "truncated",
        "no_answer",
    ]
    return pd.DataFrame(rows, columns=columns)
