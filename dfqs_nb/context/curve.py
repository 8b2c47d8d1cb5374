"""Measure how a model's retrieval degrades with context: plan, cost, run, resume, and what it found.

A text is evaluated once and grown, its questions asked from a saved state, where that is proved to change
nothing (``check_reuse``); else, and for one-key prompt sets, every question is evaluated afresh.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context.boundary import (
    Boundary,
    Counts,
    curve_table,
    octaves,
    quality_boundary,
    search_haystacks,
    search_lengths,
    with_runtime_failure,
)
from dfqs_nb.context.haystacks import N_STRATA, Case, Frame, Haystacks, Question, frame_of
from dfqs_nb.context.prompts import PromptSet, load_prompts
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.journal import Journal
from dfqs_nb.core.machine import available_memory
from dfqs_nb.core.stage import write_stage
from dfqs_nb.gguf.memory import estimate
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.check import dry_run
from dfqs_nb.llama.model import TOLERANCE, DecodeError, Model, ReuseCheck, SavedState, check_reuse
from dfqs_nb.llama.settings import OpenSettings

if TYPE_CHECKING:
    import pandas as pd

GUESS_RATE = 0.0  # of a code of 4 or 5 digits: 1e-4 or less
LARGEST_RATIO = 1.3  # evaluated tokens a haystack, in units of the longest length
PLANNED_RATIO = 1.25
REFINED_LENGTHS = 3  # added between the planned ones in a grown haystack
SPEED_CHUNK = 256
SPARE_TOKENS = 64  # of context, for the answer
JOURNAL = "long_context_items.jsonl"


class BudgetError(DfqsError):
    """A time budget holds not even the shortest length."""


# ---- the plan and its cost ----


@dataclass(frozen=True)
class Plan:
    """What will be measured.

    Attributes:
        prompts: the prompt set.
        grid: planned lengths in tokens of context, ascending; the answer begins at about that depth.
        n_haystacks: texts; the units of every interval.
        n_questions: asked for each planned length of a grown haystack (one-key sets: 1).
        n_refined: asked for each length added near the crossing.
        grown: evaluate a haystack once and grow it.
        rounds: how often intervals around the crossing are halved (texts made for their length).
        in_a_row: lengths that must clearly fail before longer ones are left out.
        budget_seconds: no length is begun that is not expected to end in time; what is not measured is
            censored, not failed.
    """

    prompts: PromptSet
    grid: tuple[int, ...]
    n_haystacks: int
    n_questions: int
    n_refined: int
    question_tokens: int
    grown: bool
    rounds: int = 2
    in_a_row: int = 2
    budget_seconds: float = inf

    @property
    def longest(self) -> int:
        """The longest planned length."""
        return self.grid[-1]

    def tokens(self, longest: int | None = None) -> int:
        """Tokens evaluated for the whole curve up to ``longest``, if nothing is left out early."""
        lengths = [length for length in self.grid if length <= (longest or self.longest)]
        if not self.grown:
            # half as much again, and somewhat more, for the lengths added around the crossing
            return round(self.n_haystacks * self.n_questions * sum(lengths) * (1.6 if self.rounds else 1))
        asked = len(lengths) * (self.n_questions + 1) + REFINED_LENGTHS * self.n_refined
        return self.n_haystacks * (lengths[-1] + asked * self.question_tokens)

    def ratio(self) -> float:
        """Planned tokens in units of longest length x haystacks."""
        return self.tokens() / (self.longest * self.n_haystacks)

    def conditions(self) -> dict[str, Any]:
        """What the items depend on, beside the model."""
        return {
            **self.prompts.identity(),
            "grid": list(self.grid),
            "grown": self.grown,
            "n_questions": self.n_questions,
            "n_refined": self.n_refined,
        }


def make_plan(
    model: Model,
    prompt_set: str,
    longest: int,
    *,
    shortest: int | None = None,
    n_haystacks: int = 8,
    rounds: int = 2,
    in_a_row: int = 2,
    grown: bool | None = None,
    budget_seconds: float = inf,
    frame: Frame | None = None,
) -> Plan:
    """Plan lengths ``shortest * 2^k`` to ``longest``.

    Many-key sets are grown unless ``grown=False``; then as many questions are asked (2 to 6) as keep the
    evaluated tokens under 1.25 times the longest length a haystack.

    Args:
        frame: of another way of asking than this model's own (``needles.frame_of``).

    Raises:
        PromptError: the shortest length cannot hold the needles.
        DfqsError: ``longest`` is below ``shortest``.
    """
    prompts = load_prompts(prompt_set)
    many = prompts["needles"] > 1
    grid = tuple(octaves(shortest or (256 if many else 64), longest))
    if not grid:
        raise DfqsError(f"no length up to {longest:,} tokens", hint=f"the shortest is {shortest or 256}")
    haystacks = Haystacks(frame or frame_of(model, prompts), prompts, grid)
    plan = Plan(
        prompts,
        grid,
        n_haystacks,
        prompts["needles"],
        0,
        haystacks.question_tokens(),
        many and grown is not False,
        rounds,
        in_a_row,
        budget_seconds,
    )
    for n in range(prompts["needles"], 1, -1):
        plan = replace(plan, n_questions=n, n_refined=max(2, n // 2)) if many else plan
        if not plan.grown or plan.ratio() <= PLANNED_RATIO:
            break
    return plan


@dataclass(frozen=True)
class PrefillSpeed:
    """Prefill time of one token: ``base`` seconds and ``by_depth`` seconds for each token before it."""

    base: float
    by_depth: float

    def seconds(self, length: float, start: float = 0) -> float:
        """Seconds to evaluate the tokens from ``start`` to ``length``."""
        return self.base * (length - start) + self.by_depth * (length**2 - start**2) / 2

    def tokens_per_sec(self, depth: float) -> float:
        """Prefill speed at a depth."""
        return 1 / (self.base + self.by_depth * depth)


def measure_prefill(model: Model, deepest: int = 1024, repetitions: int = 2) -> PrefillSpeed:
    """Time 256 tokens at the beginning and 256 up to ``deepest``; elsewhere, cost is linear in depth."""
    import llama_cpp

    deepest = min(deepest, model.settings.n_ctx)
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, deepest).tolist()
    times: dict[int, list[float]] = {}
    for _ in range(repetitions + 1):  # the first warms up
        model.clear()
        for start in range(0, deepest, SPEED_CHUNK):
            begun = time.perf_counter()
            model.decode(tokens[start : start + SPEED_CHUNK])
            llama_cpp.llama_synchronize(model.llama.ctx)
            size = len(tokens[start : start + SPEED_CHUNK])
            times.setdefault(start, []).append((time.perf_counter() - begun) / size)
    model.clear()
    near = min(times[0][1:])
    far, depth = min(times[max(times)][1:]), max(times)
    slope = max(0.0, (far - near) / depth) if depth else 0.0
    return PrefillSpeed(max(near - slope * SPEED_CHUNK / 2, near / 2), slope)


def cost_table(plan: Plan, speed: PrefillSpeed) -> pd.DataFrame:
    """What the curve to each longest length will take.

    Columns ``longest``, ``evaluated_tokens``, ``seconds`` and ``within_budget``.
    """
    import pandas as pd

    rows = []
    for longest in plan.grid:
        tokens, seconds = plan.tokens(longest), _seconds(plan, speed, longest)
        rows.append(
            {
                "longest": longest,
                "evaluated_tokens": tokens,
                "seconds": seconds,
                "within_budget": seconds <= plan.budget_seconds,
            }
        )
    return pd.DataFrame(rows)


def _seconds(plan: Plan, speed: PrefillSpeed, longest: int) -> float:
    lengths = [length for length in plan.grid if length <= longest]
    if plan.grown:
        asked = (plan.n_questions + 1) * plan.question_tokens
        each = speed.seconds(longest) + sum(asked / speed.tokens_per_sec(length) for length in lengths)
        return plan.n_haystacks * each
    extra = 1.6 if plan.rounds else 1
    return plan.n_haystacks * plan.n_questions * extra * sum(speed.seconds(length) for length in lengths)


def within_budget(plan: Plan, speed: PrefillSpeed) -> Plan:
    """The plan cut to the lengths that its budget holds.

    Raises:
        BudgetError: it holds none.
    """
    table = cost_table(plan, speed)
    kept = table[table["within_budget"]]["longest"].tolist()
    if not kept:
        first = duration(table["seconds"].iloc[0])
        raise BudgetError(
            f"{duration(plan.budget_seconds)} hold no length: {plan.grid[0]} take {first}",
            hint="raise the budget, or take fewer haystacks",
        )
    return replace(plan, grid=tuple(kept))


def cost_sentence(plan: Plan, speed: PrefillSpeed) -> str:
    """The cost of the whole plan, and of a shorter one, as a sentence."""
    longest = plan.longest
    text = f"the curve to {longest:,} tokens will take about {duration(_seconds(plan, speed, longest))}"
    shorter = [length for length in plan.grid if length <= longest / 4]
    if shorter:
        text += f"; the curve to {shorter[-1]:,} tokens {duration(_seconds(plan, speed, shorter[-1]))}"
    return text


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(42.2), duration(2400), duration(31 * 3600)
    ('42 s', '40 min', '31 h')
    """
    if seconds == inf:
        return "no limit"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:,.0f} s"


# ---- what cannot run ----


@dataclass(frozen=True)
class RuntimeFailure:
    """The first length that could not be run, and why; ``predicted``: it was not even tried."""

    length: int
    cause: str
    message: str
    predicted: bool = False


def predict_failure(
    path: str | Path, lengths: Sequence[int], settings: OpenSettings, available_bytes: int | None = None
) -> RuntimeFailure | None:
    """The first length whose memory (KV cache, its saved copy, compute buffer) exceeds what is free.

    The cache comes from the header's formula, the buffer from llama.cpp's own plan, which allocates nothing.
    """
    available = available_memory().available_bytes if available_bytes is None else available_bytes
    headers = open_shards(path).headers
    for length in sorted(lengths):
        at = replace(settings, n_ctx=length)
        needs = estimate(
            headers,
            length,
            min(at.n_batch, at.n_ubatch),
            type_k=at.type_k,
            type_v=at.type_v,
            swa_full=at.swa_full,
            use_mmap=at.use_mmap,
        )
        needs = needs.with_compute(dry_run(open_shards(path).paths[0], at)["compute_bytes"])
        required = needs.must_fit_bytes + needs.kv.total
        if required > available:
            what = f"{length:,} tokens need {required:,} bytes beside the weights, and {available:,} are free"
            return RuntimeFailure(length, "oom", what, predicted=True)
    return None


def settings_for(
    path: str | Path, longest: int, settings: OpenSettings
) -> tuple[OpenSettings, RuntimeFailure | None]:
    """Settings with room for the longest length that fits in memory, and the first that does not."""
    failure = predict_failure(path, octaves(256, longest) or [longest], settings)
    reach = longest if failure is None else failure.length // 2
    return replace(settings, n_ctx=reach + SPARE_TOKENS), failure


# ---- asking ----


@dataclass(frozen=True)
class Answer:
    """What the model said to one question, whether it is right, and what it cost."""

    text: str
    correct: bool
    n_evaluated: int
    seconds: float


class Asker:
    """Holds one haystack in the model's context and asks questions about it.

    ``grown``: extend the haystack where the next begins with it, and ask from its saved state.
    """

    def __init__(self, model: Model, grown: bool) -> None:
        self.model, self.grown = model, grown
        self._body: tuple[int, ...] = ()
        self._state: SavedState | None = None
        self._dirty = False

    def hold(self, body: tuple[int, ...]) -> int:
        """Evaluate what is new of a haystack; the number of tokens evaluated."""
        if not self.grown:
            self._body = body
            return 0
        if not self._body or body[: len(self._body)] != self._body:
            self.model.clear()
            self._body, self._state, self._dirty = (), None, False
        if self._dirty and self._state is not None:
            self.model.restore(self._state)
        new = body[len(self._body) :]
        if new:
            self._state = None  # one copy at a time
            self.model.decode(new)
            self._state = self.model.save()
        self._body, self._dirty = body, False
        return len(new)

    def ask(self, question: Question) -> Answer:
        """The greedy answer, cut off as soon as it cannot become right any more."""
        started = time.perf_counter()
        tokens = self._begin(question)
        n_evaluated = len(tokens)
        logits, said = self.model.evaluate(tokens), b""
        while True:
            token = int(np.argmax(logits))
            if self.model.ends(token):
                break
            said += self.model.token_bytes(token)
            if not _may_become(said, question) or n_evaluated - len(tokens) + 1 >= question.max_tokens:
                break
            logits = self.model.evaluate([token])
            n_evaluated += 1
        text = said.decode("utf-8", "replace").strip()
        right = text == question.expected or (not question.whole and text.startswith(question.expected))
        return Answer(text, right, n_evaluated, time.perf_counter() - started)

    def _begin(self, question: Question) -> list[int]:
        if self.grown and self._state is not None:
            if self._dirty:
                self.model.restore(self._state)
            self._dirty = True
            return list(question.prompt)
        self.model.clear()
        return [*self._body, *question.prompt]


def _may_become(said: bytes, question: Question) -> bool:
    """Whether more tokens may still make the answer right (and are needed to know)."""
    text = said.decode("utf-8", "ignore").lstrip()
    if text.startswith(question.expected):
        return question.whole and text.rstrip() == question.expected
    return question.expected.startswith(text)


# ---- the run ----


@dataclass
class Run:
    """A measurement under way or done.

    ``items``: one row a question, see ``item_frame``. ``repeated_tokens``: evaluated again after a kill.
    """

    plan: Plan
    reuse: ReuseCheck | None
    journal: Journal = field(repr=False)
    failure: RuntimeFailure | None = None
    budget_hit: bool = False
    repeated_tokens: int = 0
    seconds: float = 0.0

    @property
    def items(self) -> pd.DataFrame:
        """All answers; see ``item_frame``."""
        return item_frame(self.journal.rows())

    @property
    def evaluated_tokens(self) -> int:
        """Tokens evaluated for the curve, the check of reuse included, repetitions after a kill excluded."""
        rows = sum(row["n_evaluated"] for row in self.journal.rows() if "n_evaluated" in row)
        return rows + (self.reuse.evaluated_tokens if self.reuse else 0)

    @property
    def ratio(self) -> float:
        """Evaluated tokens in units of the plan's longest length x haystacks."""
        return self.evaluated_tokens / (self.plan.longest * self.plan.n_haystacks)

    def counts(self) -> Counts:
        """Counts of the first task, which the curve and the boundary are made of."""
        return Counts.of(first_task(self.items, self.plan.prompts))

    def curve(self) -> pd.DataFrame:
        """See ``degradation.curve_table``."""
        return curve_table(self.counts(), GUESS_RATE)

    def boundary(self) -> Boundary:
        """The smaller of the quality boundary and the first runtime failure."""
        found = quality_boundary(self.counts(), GUESS_RATE)
        failure = self.failure
        return with_runtime_failure(found, failure and failure.length, failure and failure.cause)


def item_frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Journal rows that are answers, as a frame sorted by length, haystack and depth.

    Columns ``haystack``, ``length``, ``planned``, ``task``, ``question``, ``depth``, ``expected``,
    ``answer``, ``correct``, ``n_prompt``, ``n_needles``, ``n_evaluated`` and ``seconds``.
    """
    import pandas as pd

    items = [{key: value for key, value in row.items() if key != "id"} for row in rows if "question" in row]
    frame = pd.DataFrame(items)
    return (
        frame.sort_values(["length", "haystack", "task", "depth"], ignore_index=True) if len(frame) else frame
    )


def depth_tiles(items: pd.DataFrame, n_strata: int = N_STRATA) -> pd.DataFrame:
    """Right answers by length and depth: columns ``length``, ``depth``, ``depth_end``, ``correct``, ``n``."""
    stratum = (items["depth"] * n_strata).astype(int).clip(0, n_strata - 1) / n_strata
    table = items.assign(depth=stratum).groupby(["length", "depth"])["correct"].agg(["sum", "count"])
    table = table.rename(columns={"sum": "correct", "count": "n"}).reset_index()
    return table.assign(depth_end=table["depth"] + 1 / n_strata)


def speed_table(speed: PrefillSpeed, depths: Sequence[int]) -> pd.DataFrame:
    """Prefill speed at these depths: columns ``depth`` and ``tokens_per_second``."""
    import pandas as pd

    return pd.DataFrame(
        {"depth": list(depths), "tokens_per_second": [speed.tokens_per_sec(d) for d in depths]}
    )


def first_task(items: pd.DataFrame, prompts: PromptSet) -> pd.DataFrame:
    """The rows of the prompt set's first task."""
    return items[items["task"] == prompts["tasks"][0]]


class _Runner:
    def __init__(
        self, model: Model, run: Run, speed: PrefillSpeed | None, frame: Frame | None, asker: Asker | None
    ) -> None:
        self.model, self.run, self.plan, self.speed = model, run, run.plan, speed
        prompts = run.plan.prompts
        self.haystacks = Haystacks(frame or frame_of(model, prompts), prompts, run.plan.grid)
        self.asker = asker or Asker(model, run.plan.grown)
        self._passed: list[Case] = []
        self.started = time.perf_counter()
        self.bar = tqdm(total=run.plan.tokens(), unit="tok", unit_scale=True, desc="long context")

    def measure(self, haystack: int, length: int, planned: bool) -> bool:
        """Ask every question of one case that the journal does not hold; False where the run must end."""
        n = self.plan.n_questions if planned else self.plan.n_refined
        case = self.haystacks.case(haystack, length, planned, n or None)
        ids = [f"{haystack}/{length}/{question.name}" for question in case.questions]
        missing = [q for q, item in zip(case.questions, ids, strict=True) if item not in self.run.journal]
        if not missing:
            self._passed.append(case)
            return True
        if self._over_budget(length):
            self.run.budget_hit = True
            return False
        try:
            self._ask(case, missing)
        except DecodeError as error:
            at = self.model.settings.n_ctx if error.cause == "n_ctx" else length
            self.run.failure = RuntimeFailure(min(at, length), error.cause, str(error))
            return False
        return True

    def _ask(self, case: Case, questions: Sequence[Question]) -> None:
        for passed in self._passed:  # grown again in the same steps, so that no bit can differ
            if passed.haystack == case.haystack:
                self.run.repeated_tokens += self.asker.hold(passed.body)
        self._passed.clear()
        held = self.asker.hold(case.body)
        known = f"{case.haystack}/{case.length}/held" in self.run.journal
        if held and not known:
            self.run.journal.add(f"{case.haystack}/{case.length}/held", n_evaluated=held)
        self.run.repeated_tokens += held if known else 0
        for question in questions:
            answer = self.asker.ask(question)
            self.run.journal.add(
                f"{case.haystack}/{case.length}/{question.name}",
                haystack=case.haystack,
                length=case.length,
                planned=case.planned,
                task=question.task,
                question=question.name,
                depth=round(question.depth, 4),
                expected=question.expected,
                answer=answer.text,
                correct=answer.correct,
                n_prompt=len(case.body) + len(question.prompt),
                n_needles=case.n_needles,
                n_evaluated=answer.n_evaluated,
                seconds=round(answer.seconds, 4),
            )
            self.bar.update(answer.n_evaluated)
        self.bar.update(held)

    def _over_budget(self, length: int) -> bool:
        if self.speed is None or self.plan.budget_seconds == inf:
            return False
        held = len(self.asker._body) if self.plan.grown else 0
        cost = self.speed.seconds(length, min(held, length))
        return time.perf_counter() - self.started + cost > self.plan.budget_seconds

    def made_for_length(self) -> None:
        """Every text made for its length: length by length, over all haystacks."""

        def measure(length: int, planned: bool) -> Counts | None:
            if all(self.measure(haystack, length, planned) for haystack in range(self.plan.n_haystacks)):
                return self._up_to(length)
            return None

        self._measured: set[int] = set()
        search_lengths(
            measure, self.plan.grid, GUESS_RATE, rounds=self.plan.rounds, in_a_row=self.plan.in_a_row
        )

    def _up_to(self, length: int) -> Counts:
        """Counts of the lengths measured in this search: a resumed one may find more in its journal."""
        self._measured.add(length)
        items = first_task(self.run.items, self.plan.prompts)
        return Counts.of(items[items["length"].isin(self._measured)])

    def grow(self) -> None:
        """Haystack by haystack, each evaluated once and grown (``degradation.search_haystacks``)."""
        done: set[tuple[int, int]] = set()

        def measure(haystack: int, length: int, planned: bool) -> Counts | None:
            if not self.measure(haystack, length, planned):
                return None
            done.add((haystack, length))
            return self._of(done)

        plan = self.plan
        search_haystacks(
            measure, plan.grid, plan.n_haystacks, GUESS_RATE, refine=plan.rounds > 0, in_a_row=plan.in_a_row
        )

    def _of(self, done: set[tuple[int, int]]) -> Counts:
        items = first_task(self.run.items, self.plan.prompts)
        pairs = zip(items["haystack"], items["length"], strict=True)
        return Counts.of(items[[pair in done for pair in pairs]])


def measure(
    model: Model,
    plan: Plan,
    folder: str | Path,
    *,
    model_sha256: str = "",
    speed: PrefillSpeed | None = None,
    predicted: RuntimeFailure | None = None,
    fresh: bool = False,
    reuse_tolerance: float = TOLERANCE,
    frame: Frame | None = None,
    asker: Asker | None = None,
) -> Run:
    """Ask all questions of a plan, or those that the folder's journal does not hold yet.

    Args:
        model: open, with a context that holds the longest length.
        plan: see ``make_plan``.
        folder: receives ``long_context_items.jsonl``.
        model_sha256: identity of the model's file, one of the conditions of every item.
        speed: measured prefill speed; a time budget needs it.
        predicted: a length that memory will not hold (``predict_failure``): it bounds the grid.
        fresh: measure again what the journal holds.
        reuse_tolerance: of a logit, within which asking from a saved state counts as equal to asking afresh.
        frame, asker: of another way of asking than this model's own; see ``endpoint.Remote``.
    """
    reuse = check_plan_reuse(model, plan, reuse_tolerance) if plan.grown else None
    if reuse is not None and not reuse.allowed:
        plan = replace(plan, grown=False, rounds=0)
    conditions = {**model.conditions(), **plan.conditions(), "model_sha256": model_sha256}
    run = Run(plan, reuse, Journal(Path(folder) / JOURNAL, conditions, fresh=fresh))
    run.failure = predicted
    limit = plan.longest if predicted is None else max(1, predicted.length - 1)
    started = time.perf_counter()
    runner = _Runner(model, replace_plan(run, limit), speed, frame, asker)
    try:
        runner.grow() if plan.prompts["needles"] > 1 else runner.made_for_length()
    finally:
        runner.bar.close()
        model.clear()
    run.seconds = time.perf_counter() - started
    return run


def hand_on(
    folder: str | Path, run: Run, conditions: dict[str, Any], model: dict[str, Any], losses: pd.DataFrame
) -> list[str]:
    """Write ``long_context.json`` (see ``paths.write_stage``), and return its summary lines.

    Args:
        conditions: of the open model, ``Model.conditions()``.
        model: what the merge stage says of the file; its SHA-256 stands beside the conditions.
        losses: see ``loss.loss_by_position``.
    """
    boundary, curve, plan = run.boundary(), run.curve(), run.plan
    lines = [
        boundary.sentence,
        f"a_0 = {boundary.a_0:.2f}, threshold {boundary.threshold:.2f}, n = {boundary.n_items}",
    ]
    write_stage(
        folder,
        "long_context",
        conditions={**conditions, **plan.conditions(), "n_haystacks": plan.n_haystacks},
        summary=lines,
        model=model,
        tier=plan.prompts.tier,
        context_stability_curve=curve["curve"].tolist(),
        failure_boundary_tokens=boundary.tokens,
        curve=curve.to_dict("records"),
        boundary=boundary.as_dict(),
        runtime_failure=asdict(run.failure) if run.failure else None,
        budget_hit=run.budget_hit,
        evaluated_tokens=run.evaluated_tokens,
        seconds=round(run.seconds, 1),
        losses=losses.to_dict("records"),
    )
    return lines


def replace_plan(run: Run, limit: int) -> Run:
    """The same run with a plan that ends below a predicted failure."""
    run.plan = replace(run.plan, grid=tuple(length for length in run.plan.grid if length <= limit))
    return run


def check_plan_reuse(model: Model, plan: Plan, tolerance: float = TOLERANCE) -> ReuseCheck:
    """Check reuse (``check_reuse``) with two questions on the shortest haystack, in two parts."""
    haystacks = Haystacks(frame_of(model, plan.prompts), plan.prompts, plan.grid)
    cases = [haystacks.case(0, length) for length in plan.grid[:1]]
    body = cases[-1].body
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    return check_reuse(model, parts, [question.prompt for question in cases[-1].questions[:2]], tolerance)
