"""Measure how a model's retrieval degrades with context: ask, resume, and what the answers say.

A text is evaluated once and all its questions are asked from its saved state, where a check on the first text
finds that it is the right one. Else, and for probes of a single key, every question is evaluated afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.context.boundary import Boundary, Counts, search_lengths
from dfqs_nb.context.haystacks import N_STRATA, Case, Haystacks, Question
from dfqs_nb.context.plan import CHECK_TOKENS, Meter, Plan, RuntimeFailure, crew, side_by_side
from dfqs_nb.core.display import counted, duration, tqdm
from dfqs_nb.core.journal import Journal, holds
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.generate import next_tokens
from dfqs_nb.llama.model import DecodeError, Model, ReuseCheck, check_reuse

JOURNAL, REUSE = "long_context_items.jsonl", "restored"  # and the row of the check of reuse in it
ITEM = {  # what an answer in it holds; ``another_key``: it is right for another key of the text
    **dict.fromkeys(("task", "question", "expected", "answer"), str),
    **dict.fromkeys(("haystack", "length", "n_needles", "n_evaluated"), int),
    **dict.fromkeys(("planned", "correct", "another_key"), bool),
    "depth": float,
}
CHECK = {"largest_difference": float, "n_evaluated": int}


@dataclass
class Run:
    """A measurement under way or done."""

    plan: Plan
    journal: Journal = field(repr=False)
    failure: RuntimeFailure | None = None
    budget_hit: bool = False
    reuse: ReuseCheck | None = None  # whether a saved state serves all questions of a text; None: not checked
    at: int = 0  # the length under way

    @property
    def reuses(self) -> bool:
        """Whether all questions of a text are asked from its saved state."""
        return bool(self.reuse and self.reuse.allowed)

    @property
    def items(self) -> pd.DataFrame:
        """All answers; see `item_frame`."""
        return item_frame(self.journal.rows())

    @property
    def evaluated_tokens(self) -> int:
        """Tokens evaluated for the curve, the check of reuse included."""
        return sum(row["n_evaluated"] for row in self.journal.rows())

    def counts(self) -> Counts:
        """Counts of the curve's answers."""
        return Counts.of(self.items)

    def boundary(self) -> Boundary:
        """The smaller of the quality boundary and the first runtime failure."""
        counts, failure = self.counts(), self.failure
        if not len(counts.lengths):
            cause = failure.cause if failure else "budget"
            return Boundary(0, None, None, False, "not measured", cause, nan, nan, nan, 0, 0)
        boundary = counts.boundary()
        return boundary if failure is None else boundary.capped(failure.length, failure.cause)

    def ask(self, model: Model, case: Case, questions: Sequence[Question], planned: bool, bar: Any) -> None:
        """Ask some questions of a text, and keep the answers."""
        text, body = f"{case.length}/{case.haystack}", model.hold(case.body, reuse=self.reuses)
        if self.reuses and f"{text}/held" not in self.journal:
            self.journal.add(f"{text}/held", n_evaluated=len(case.body))
        for question in questions:
            model.restore(body)
            tokens = next_tokens(model, model.evaluate(question.prompt), question.max_tokens)
            answer = model.text(token for token in tokens if not model.ends(token)).strip()
            n_evaluated = model.n_past - len(case.body) * self.reuses
            row: dict[str, Any] = {"haystack": case.haystack, "length": case.length, "planned": planned}
            row |= {"task": question.task, "question": question.name, "depth": round(question.depth, 4)}
            row |= {"expected": question.expected, "answer": answer, "correct": question.is_right(answer)}
            row |= {"another_key": question.is_another(answer), "n_evaluated": n_evaluated}
            self.journal.add(f"{text}/{question.name}", **row, n_needles=len(case.questions))
            bar.update()

    def hand_on(self, stage: Stage, conditions: dict[str, Any], longest: int = 0) -> list[str]:
        """Write ``long_context.json`` with its seal, and return its summary lines.

        ``conditions``: of the open model. ``longest``: the tokens that were asked for; 0: the model's limit.
        """
        counts, boundary, plan, wrong = self.counts(), self.boundary(), self.plan, self.items
        curve, measured, lines = counts.curve(), boundary.status != "not measured", [boundary.sentence]
        planned, wrong = curve[curve["planned"]], wrong[~wrong["correct"].astype(bool)]
        guess: dict[str, Any] = {"wrong": len(wrong), "another_key": int(wrong["another_key"].sum())}
        guess |= {"rate": counts.guess_rate, "keys": plan.probe.needles}
        if measured:
            of = f"a_0 = {boundary.a_0:.2f}, threshold {boundary.threshold:.2f}, "
            of += f"{counted(boundary.n_items, 'answers')} in {counted(int(curve['texts'].sum()), 'texts')}"
            guessed = f"{guess['another_key']} of {guess['wrong']} wrong answers are another key's"
            lines.append(f"{of}, guess rate {guess['rate']:.2f} ({guessed})")
        stage.table("long_context_items", self.items)
        late = [f"{length:,}" for length in plan.grid if length not in set(counts.lengths.tolist())]
        if self.budget_hit and plan.n_haystacks and late:
            stage.leave_out([f"lengths: {', '.join(late)} tokens"])
        stage.finish(
            conditions={**conditions, **plan.conditions(), "reuse": self.reuses},
            summary=lines,
            model=stage.model,
            tier=plan.probe.tier,
            longest=longest,
            context_stability_curve=planned["curve"].tolist(),
            failure_boundary_tokens=boundary.tokens if measured else None,
            curve=planned.to_dict("records"),
            refined=curve[~curve["planned"]].to_dict("records"),
            boundary=boundary.as_dict() if measured else None,
            not_measured="" if measured else "; ".join(plan.left_out) or boundary.sentence,
            largest_fall=counts.largest_fall(),
            guess=guess,
            reuse_check=asdict(self.reuse) if self.reuse else None,
        )
        return lines


def item_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The answers among a journal's rows, sorted by length, text, task and depth; columns: `ITEM`."""
    items = [row for row in rows if "question" in row]
    frame = pd.DataFrame(items).drop(columns="id") if items else pd.DataFrame(columns=list(ITEM))
    return frame.sort_values(["length", "haystack", "task", "depth"], ignore_index=True)


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of the journal is as `measure` writes it: an answer, a text, or the check of reuse."""
    fields = ITEM if "question" in row else CHECK if "largest_difference" in row else {"n_evaluated": int}
    return holds({"another_key": False, **row}, fields)


def depth_table(items: pd.DataFrame) -> pd.DataFrame:
    """Right answers of all, such as ``9 of 12``: a row a fifth of the text by depth, a column a length."""
    fifth = (items["depth"] * N_STRATA).astype(int).clip(0, N_STRATA - 1)
    names = {k: f"{100 * k // N_STRATA} to {100 * (k + 1) // N_STRATA} % deep" for k in range(N_STRATA)}
    groups = items.assign(depth=fifth.map(names)).groupby(["depth", "length"])["correct"]
    return groups.agg(lambda right: f"{right.sum()} of {len(right)}").unstack(fill_value="")


def measure(
    model: Model,
    plan: Plan,
    folder: str | Path,
    *,
    model_sha256: str = "",
    predicted: RuntimeFailure | None = None,
    fresh: bool = False,
) -> Run:
    """Ask all questions of a plan, or those that ``long_context_items.jsonl`` in the folder lacks.

    ``model``: open, with a context that holds the longest length. ``predicted``: the length above the plan's
    that memory does not hold (`predict_failure`).
    """
    haystacks = Haystacks(model, plan.probe, plan.grid[0])
    conditions = {**model.conditions(), "model_sha256": model_sha256, **plan.conditions()}
    journal = Journal(Path(folder) / JOURNAL, conditions, fresh=fresh, whole=_is_whole)
    run, meter = Run(plan, journal, predicted, not plan.n_haystacks), Meter(plan.budget_seconds)
    run.at, done = plan.grid[0], set[int]()

    def measured(length: int, planned: bool) -> Counts | None:
        """Ask about all texts of a length; the counts of all lengths so far, or None to end the search."""
        run.at, cost = length, replace(plan, reuse=run.reuses).text_seconds(length)

        def ask(copy: Model, number: int) -> bool:
            case = haystacks.case(number, length)
            missing = [q for q in case.questions if f"{length}/{number}/{q.name}" not in journal]
            if missing and not meter.holds(cost):
                return False
            with meter.spend(cost * len(missing) / len(case.questions)):
                bar.update(len(case.questions) - len(missing))
                if missing:
                    run.ask(copy, case, missing, planned, bar)
            return True

        run.budget_hit = not all(side_by_side(copies, ask, range(plan.n_texts(length))))
        done.add(length)
        items = run.items
        return None if run.budget_hit else Counts.of(items[items["length"].isin(done)])

    total = plan.probe.needles * sum(map(plan.n_texts, plan.grid))

    def there() -> pd.Series:
        """Answers by planned length."""
        return run.items["length"].value_counts().reindex(plan.grid, fill_value=0)

    if 0 < there().sum() < total:
        texts = {n: plan.n_texts(n) - there()[n] / plan.probe.needles for n in plan.grid}
        rest = duration(sum(plan.text_seconds(n) * missing for n, missing in texts.items()))
        print(f"{there().sum():,} of {total:,} answers are there; the rest will take about {rest}")
    with crew(model) as copies, tqdm(total=total, unit="question", desc="long context") as bar:
        try:
            if plan.n_haystacks:
                if plan.reuse:
                    if REUSE not in journal:
                        case = haystacks.case(0, run.at)
                        check = check_reuse(model, case.body[:CHECK_TOKENS], case.questions[0].prompt)
                        journal.add(REUSE, **asdict(check))
                    run.reuse = ReuseCheck(**journal[REUSE])
                search_lengths(measured, plan.grid, plan.rounds)
        except DecodeError as error:
            at = min(run.at, model.settings.n_ctx) if error.cause == "n_ctx" else run.at
            run.failure = RuntimeFailure(at, error.cause, str(error))
        except KeyboardInterrupt as stop:
            stop.add_note(f"{there().sum():,} of {total:,} answers are there")
            raise
        finally:
            model.clear()
    return run
