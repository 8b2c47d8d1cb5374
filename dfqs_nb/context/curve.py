"""Measure how a model's retrieval degrades with context: ask, resume, and what the answers say.

A text is evaluated once and all its questions are asked from its saved state, where a check shows that this
changes nothing. Else, and for probes of a single key, every question is evaluated afresh.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context.boundary import Boundary, Counts, search_lengths
from dfqs_nb.context.cost import RuntimeFailure
from dfqs_nb.context.haystacks import N_STRATA, Case, Haystacks, Question, StandIn, frame_of
from dfqs_nb.context.plan import Plan
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.files import parse_json
from dfqs_nb.core.journal import Journal, holds, remembered
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.model import TOLERANCE, DecodeError, Model, ReuseCheck, SavedState, check_reuse
from dfqs_nb.stats import wilson

if TYPE_CHECKING:
    import pandas as pd

JOURNAL, REUSE = "long_context_items.jsonl", ".long_context.reuse.json"
ITEM = {  # what an answer in it holds
    **dict.fromkeys(("task", "question", "expected", "answer"), str),
    **dict.fromkeys(("haystack", "length", "n_prompt", "n_needles", "n_evaluated"), int),
    **dict.fromkeys(("depth", "seconds"), float),
    **dict.fromkeys(("planned", "correct", "another_key"), bool),
}
LEAST_CELL, USUAL_CELL = 10, 13  # questions in a cell of the depth figure


class Asker:
    """Asks the open model. ``reuse``: evaluate a text once, and ask from its saved state."""

    def __init__(self, model: Model, reuse: bool) -> None:
        self.model, self.reuse = model, reuse
        self._body: tuple[int, ...] = ()
        self._state: SavedState | None = None

    def hold(self, body: tuple[int, ...]) -> int:
        """Take a text, and evaluate it if its state will be reused; the number of tokens evaluated."""
        self._body, self._state = body, None  # one copy at a time
        if not self.reuse:
            return 0
        self.model.clear()
        self.model.decode(body)
        self._state = self.model.save()
        return len(body)

    def ask(self, question: Question) -> tuple[str, int]:
        """The greedy answer, cut off when more tokens cannot make it right, or right for another key."""
        if self._state is None:
            self.model.clear()
            tokens = [*self._body, *question.prompt]
        else:
            self.model.restore(self._state)
            tokens = list(question.prompt)
        logits, raw = self.model.evaluate(tokens), b""
        for n_answer in range(question.max_tokens):
            token = int(np.argmax(logits))
            raw += b"" if self.model.ends(token) else self.model.token_bytes(token)
            decided = question.is_decided(raw.decode("utf-8", "ignore"))
            if self.model.ends(token) or decided or n_answer + 1 == question.max_tokens:
                break
            logits = self.model.evaluate([token])
        return raw.decode("utf-8", "replace").strip(), len(tokens) + n_answer


@dataclass
class Run:
    """A measurement under way or done."""

    plan: Plan
    reuse: ReuseCheck | None
    journal: Journal = field(repr=False)
    failure: RuntimeFailure | None = None
    budget_hit: bool = False
    seconds: float = 0.0

    @property
    def items(self) -> pd.DataFrame:
        """All answers; see `item_frame`."""
        return item_frame(self.journal.rows())

    @property
    def retrieval(self) -> pd.DataFrame:
        """The answers that the curve is made of: those of the probe's first task."""
        items = self.items
        return items[items["task"] == self.plan.probe.tasks[0]]

    @property
    def evaluated_tokens(self) -> int:
        """Tokens evaluated for the curve, the check of reuse included."""
        rows = sum(row["n_evaluated"] for row in self.journal.rows())
        return int(rows) + (self.reuse.evaluated_tokens if self.reuse else 0)

    def counts(self) -> Counts:
        """Counts of the curve's answers."""
        return Counts.of(self.retrieval)

    def curve(self) -> pd.DataFrame:
        """See `Counts.curve`: planned lengths, and those added where the accuracy crosses."""
        return self.counts().curve()

    def boundary(self) -> Boundary:
        """The smaller of the quality boundary and the first runtime failure."""
        counts, failure = self.counts(), self.failure
        if not len(counts.lengths):
            cause = failure.cause if failure else "budget"
            return Boundary(0, None, None, False, "not measured", cause, nan, nan, nan, 0, 0)
        boundary = counts.boundary()
        return boundary if failure is None else boundary.capped(failure.length, failure.cause)

    def tasks(self) -> pd.DataFrame:
        """Every task that was asked; see `task_table`."""
        return task_table(self.items)

    def depths(self) -> pd.DataFrame:
        """The curve's answers by length and depth; see `depth_tiles`."""
        return depth_tiles(self.retrieval)

    def hand_on(self, stage: Stage, conditions: dict[str, Any], losses: pd.DataFrame) -> list[str]:
        """Write ``long_context.json`` with its seal, and return its summary lines.

        Args:
            conditions: of the open model.
            losses: see `HeldOut.loss_by_position`.
        """
        counts, boundary, tasks, keys = self.counts(), self.boundary(), self.tasks(), self.plan.probe.needles
        curve, measured, lines = counts.curve(), boundary.status != "not measured", [boundary.sentence]
        planned, first = curve[curve["planned"]], tasks[tasks["task"] == self.plan.probe.tasks[0]]
        wrong, another = (int(first[name].sum()) for name in ("wrong", "another_key"))
        if measured:
            of = f"a_0 = {boundary.a_0:.2f}, threshold {boundary.threshold:.2f}, n = {boundary.n_items}"
            guessed = f"{another} of {wrong} wrong answers are another key's"
            lines.append(f"{of}, guess rate {counts.guess_rate:.2f} ({guessed})")
        if fall := counts.largest_fall():
            what = f"the largest fall of an octave is {fall['fall']:.0%} of the short-context ability"
            ends = f"from {fall['start']:,} to {fall['end']:,} tokens"
            lines.append(f"{what}, {ends} (95 % interval {fall['low']:.0%} to {fall['high']:.0%})")
        stage.add(self.journal.path)
        stage.finish(
            conditions={**conditions, **self.plan.conditions()},
            summary=lines,
            model=stage.model,
            tier=self.plan.probe.tier,
            context_stability_curve=planned["curve"].tolist(),
            failure_boundary_tokens=boundary.tokens if measured else None,
            curve=planned.to_dict("records"),
            refined=curve[~curve["planned"]].to_dict("records"),
            boundary=boundary.as_dict() if measured else None,
            not_measured="" if measured else "; ".join(self.plan.left_out) or boundary.sentence,
            largest_fall=fall,
            guess={"rate": counts.guess_rate, "keys": keys, "wrong": wrong, "another_key": another},
            tasks=tasks.to_dict("records"),
            runtime_failure=asdict(self.failure) if self.failure else None,
            budget_hit=self.budget_hit,
            evaluated_tokens=self.evaluated_tokens,
            seconds=round(self.seconds, 1),
            losses=losses.to_dict("records"),
        )
        return lines


def item_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The answers among a journal's rows, sorted by length, text, task and depth; columns: `ITEM`.

    ``another_key``: the answer is right for another key of the text.
    """
    import pandas as pd

    items = [{key: value for key, value in row.items() if key != "id"} for row in rows if "question" in row]
    order = ["length", "haystack", "task", "depth"]
    frame = pd.DataFrame(items) if items else pd.DataFrame(columns=list(ITEM))
    return frame.sort_values(order, ignore_index=True)


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of the journal is as `measure` writes it."""
    return holds(row, {"n_evaluated": int}) and (
        "question" not in row or holds({"another_key": False, **row}, ITEM)
    )


def read_answers(folder: str | Path) -> list[pd.DataFrame]:
    """The answers that a folder's journal holds, a frame for each set of conditions, the newest first.

    Raises an `OSError` or, where a line is not what a run writes, a `ValueError`.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in (Path(folder) / JOURNAL).read_bytes().splitlines():
        row = parse_json(line)
        if not isinstance(row, dict) or not _is_whole(row):
            raise ValueError(f"not an answer: {line[:80].decode('utf-8', 'replace')}")
        runs.setdefault(str(row.pop("conditions", "")), []).append(row)
    frames = [item_frame(rows) for rows in reversed(runs.values())]
    return [frame for frame in frames if len(frame)]


def task_table(items: pd.DataFrame) -> pd.DataFrame:
    """By task and length: ``correct``, ``n``, ``accuracy`` with Wilson's ``low`` and ``high``, ``wrong``.

    And ``another_key``: wrong answers that are right for another key of the text.
    """
    correct = items["correct"].astype(bool)
    counted = items.assign(correct=correct, n=1, wrong=~correct, another_key=items["another_key"] & ~correct)
    table = counted.groupby(["task", "length"])[["correct", "n", "wrong", "another_key"]].sum().astype(int)
    low, high = wilson(table["correct"], table["n"])
    limits = {"accuracy": table["correct"] / table["n"], "low": low, "high": high}
    for at, (name, values) in enumerate(limits.items(), start=2):
        table.insert(at, name, values)
    return table.reset_index()


def depth_tiles(items: pd.DataFrame) -> pd.DataFrame:
    """Right answers by length and depth: ``length``, ``depth``, ``depth_end``, ``correct``, ``n``.

    Depth has up to five parts, fewer where there are few questions; cells of fewer than 10 are left out.
    """
    n_least = int(items.groupby("length").size().min()) if len(items) else 0
    n_parts = max(1, min(N_STRATA, n_least // USUAL_CELL))
    part = (items["depth"] * n_parts).astype(int).clip(0, n_parts - 1) / n_parts
    table = items.assign(depth=part).groupby(["length", "depth"])["correct"].agg(["sum", "count"])
    table = table.rename(columns={"sum": "correct", "count": "n"}).reset_index()
    table = table[table["n"] >= LEAST_CELL].reset_index(drop=True)
    return table.assign(depth_end=table["depth"] + 1 / n_parts)


class _Measurement:
    """Asks what the journal does not hold yet, text by text, as long as the plan's budget allows."""

    def __init__(
        self, run: Run, haystacks: Haystacks, asker: Asker | StandIn, n_ctx: int, began: float
    ) -> None:
        self.run, self.haystacks, self.asker, self.n_ctx, self._began = run, haystacks, asker, n_ctx, began
        self.planned = self.taken = 0.0  # seconds of what was evaluated so far: by the plan, and really
        self.bar = tqdm(total=run.plan.tokens(), unit="tok", unit_scale=True, desc="long context")
        self._measured: set[int] = set()

    def length(self, length: int, planned: bool) -> Counts | None:
        """Ask about all texts of a length; the counts of all lengths so far, or None to end the search."""
        if not all(self._text(number, length, planned) for number in range(self.run.plan.n_texts(length))):
            return None
        self._measured.add(length)
        items = self.run.retrieval
        return Counts.of(items[items["length"].isin(self._measured)])

    def _text(self, number: int, length: int, planned: bool) -> bool:
        """Ask the questions of a text that the journal does not hold; False where the run must end."""
        run, case, asked = self.run, self.haystacks.case(number, length, links=planned), f"{length}/{number}"
        missing = [q for q in case.questions if f"{asked}/{q.name}" not in run.journal]
        begun, cost = time.perf_counter(), run.plan.text_seconds(length)
        slower = max(1.0, self.taken / self.planned) if self.planned else 1.0
        # a plan without a speed costs NaN, which no budget is below
        if missing and begun - self._began + slower * cost > run.plan.budget_seconds:
            run.budget_hit = True
            return False
        try:
            self._ask(case, missing, planned)
        except DecodeError as error:
            at = min(length, self.n_ctx) if error.cause == "n_ctx" else length
            run.failure = RuntimeFailure(at, error.cause, str(error))
            return False
        self.taken += time.perf_counter() - begun
        self.planned += cost * len(missing) / len(case.questions)
        return True

    def _ask(self, case: Case, questions: Sequence[Question], planned: bool) -> None:
        journal, asked = self.run.journal, f"{case.length}/{case.haystack}"
        n_held = self.asker.hold(case.body) if questions else 0
        if n_held and f"{asked}/held" not in journal:
            journal.add(f"{asked}/held", n_evaluated=n_held)
        self.bar.update(n_held)
        for question in questions:
            started = time.perf_counter()
            text, n_evaluated = self.asker.ask(question)
            row: dict[str, Any] = {"haystack": case.haystack, "length": case.length, "planned": planned}
            row |= {"task": question.task, "question": question.name, "depth": round(question.depth, 4)}
            row |= {"expected": question.expected, "answer": text, "correct": question.is_right(text)}
            row["another_key"], row["n_prompt"] = question.is_another(text), len(case.body + question.prompt)
            row["n_needles"], row["n_evaluated"] = case.n_needles, n_evaluated
            row["seconds"] = round(time.perf_counter() - started, 4)
            journal.add(f"{asked}/{question.name}", **row)
            self.bar.update(n_evaluated)


def measure(
    model: Model | StandIn,
    plan: Plan,
    folder: str | Path,
    *,
    model_sha256: str = "",
    predicted: RuntimeFailure | None = None,
    fresh: bool = False,
) -> Run:
    """Ask all questions of a plan, or those that the folder's journal does not hold yet.

    Args:
        model: open, with a context that holds the longest length; or what is asked in its place.
        folder: receives ``long_context_items.jsonl``.
        model_sha256: identity of the model's file, one of the conditions of every item.
        predicted: a length that memory will not hold (`predict_failure`): it bounds the grid.
        fresh: measure again what the journal holds.
    """
    began, planned = time.perf_counter(), 0.0
    haystacks = Haystacks(frame_of(model, plan.probe), plan.probe, plan.grid[0])
    reuse, conditions = None, {**model.conditions(), "model_sha256": model_sha256}
    if plan.reuse and plan.n_haystacks and isinstance(model, Model):
        case, (n_tokens, n_questions) = haystacks.case(0, plan.grid[0]), plan.check

        def check() -> dict[str, Any]:
            nonlocal planned
            planned = plan.check_seconds
            prompts = [question.prompt for question in case.questions[:n_questions]]
            return asdict(check_reuse(model, case.body[:n_tokens], prompts, TOLERANCE))

        # kept, because a slow model takes minutes for it
        facts = [*ReuseCheck.__dataclass_fields__]
        about = {**conditions, **plan.conditions(), "tolerance": TOLERANCE, "facts": facts}
        reuse = ReuseCheck(**remembered(Path(folder) / REUSE, about, check, fresh=fresh))
        plan = plan if reuse.allowed else replace(plan, reuse=False, rounds=0)
    conditions |= plan.conditions()
    journal = Journal(Path(folder) / JOURNAL, conditions, fresh=fresh, whole=_is_whole)
    plan = plan if predicted is None else plan.up_to(max(plan.grid[0], predicted.length - 1))
    run = Run(plan, reuse, journal, failure=predicted, budget_hit=not plan.n_haystacks)
    asker = Asker(model, plan.reuse) if isinstance(model, Model) else model
    measurement = _Measurement(run, haystacks, asker, model.settings.n_ctx, began)
    if planned:
        measurement.planned, measurement.taken = planned, time.perf_counter() - began
    try:
        if plan.n_haystacks:
            search_lengths(measurement.length, plan.grid, plan.rounds)
    finally:
        measurement.bar.close()
        model.clear()
    run.seconds = time.perf_counter() - began
    return run
