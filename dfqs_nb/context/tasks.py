"""Beside the curve of DFQS 1.0: tasks in the manner of RULER and NoLiMa, and answers that repeat themselves.

The tasks have our own wording. Each text is drawn fresh for its task and length, from a seed, and sized by
the model's own tokens.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, pairwise, product
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BaseModel

from dfqs_nb.context.haystacks import Probe, around, sentences
from dfqs_nb.context.plan import Meter, PrefillSpeed, crew, side_by_side
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.journal import Journal
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.generate import Sampling, chat, generate
from dfqs_nb.llama.model import Model
from dfqs_nb.stats import wilson

NAME = "long-context-tasks"
ANSWER_RULE = "all lines where several words are expected"  # under another rule they are not comparable
ROW = {"answer": str, "expected": list, "right": bool, "guess": float}  # a line of the journal
ANSWER_TOKENS = 16  # beside three times the tokens of what is expected
COMMON, RARE = 10, 2  # how often words of the list of common words come, in its smallest unit


class Task(BaseModel):
    """A task's wording, and how many keys, values, hops and people it has."""

    kind: Literal["keys", "chain", "common", "meaning"]
    like: str
    question: str
    answer: str
    fact: str = ""
    link: str = ""
    keys: int = 1
    values: int = 1
    asked: int = 1
    hops: int = 0
    people: int = 1


class Tasks(PromptSet):
    """The frozen set of tasks; ``filler`` names the set whose sentences, keys and names they use."""

    seed: int
    filler: str
    intro: str
    joint: str
    sights: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    tasks: dict[str, Task]


class Drawn(NamedTuple):
    """What a task expects and hides."""

    expected: tuple[str, ...]
    words: Mapping[str, Any] = {}  # of the question
    facts: Sequence[str] = ()  # to scatter among filler
    text: str = ""  # in place of facts and filler
    guess: float = 0.0  # the chance of a pick among the text's candidates


@dataclass(frozen=True)
class Text:
    """A text with its question, as tokens, and what an answer must hold."""

    task: str
    tokens: tuple[int, ...] = field(repr=False)
    expected: tuple[str, ...]
    guess: float = 0.0
    max_tokens: int = ANSWER_TOKENS

    def is_right(self, answer: str) -> bool:
        """Whether an answer names all that is expected, each as a whole word."""
        whole = (rf"(?<!\w){re.escape(word)}(?!\w)" for word in self.expected)
        return all(re.search(word, answer, re.IGNORECASE) for word in whole)


class Writer:
    """Writes the texts of all tasks for a model: ``tokenize`` gives the token ids of a text."""

    def __init__(self, tokenize: Any, around: tuple[str, str], bos: Sequence[int]) -> None:
        self.tasks = load_prompts(NAME, Tasks)
        self.probe = load_prompts(self.tasks.filler, Probe)
        self._tokenize, self._around, self._bos = tokenize, around, tuple(bos)

    def text(self, task: str, length: int, number: int) -> Text | None:
        """A text of nearly, and at most, ``length`` tokens with its question; None where it has no room."""
        wording, (before, after) = self.tasks.tasks[task], self._around

        def written(amount: int) -> tuple[list[int], Drawn]:
            draw = random.Random(f"{self.tasks.seed}:{task}:{length}:{number}")
            drawn = getattr(self, f"_{wording.kind}")(wording, draw, amount)
            body = drawn.text or " ".join(self._scattered(drawn.facts, draw, amount))
            question, answer = (text.format(**drawn.words) for text in (wording.question, wording.answer))
            whole = f"{before}{self.tasks.intro}{body}{self.tasks.joint}{question}{after}{answer}"
            return [*self._bos, *self._tokenize(whole)], drawn

        tokens, drawn = written(0)
        spare = ANSWER_TOKENS + 3 * len(self._tokenize(" ".join(drawn.expected)))
        if len(tokens) > length - spare:
            return None
        low, high = 0, 16
        while len(written(high)[0]) <= length - spare:
            low, high = high, 2 * high
        longer = bisect_right(range(low + 1, high), length - spare, key=lambda n: len(written(n)[0]))
        tokens, drawn = written(low + longer)
        return Text(task, tuple(tokens), drawn.expected, drawn.guess, spare)

    def _keys(self, task: Task, draw: random.Random, _amount: int) -> Drawn:
        keys, codes = self.probe.key_names(draw, task.keys), self.probe.codes(draw, task.keys * task.values)
        pairs = [(key, codes.pop()) for key in keys for _ in range(task.values)]
        asked, facts = keys[: task.asked], [task.fact.format(key=key, value=code) for key, code in pairs]
        expected, question = tuple(code for key, code in pairs if key in asked), {"key": ", the ".join(asked)}
        guess = 1 / task.keys if task.keys > task.asked else 0.0
        return Drawn(expected, question, draw.sample(facts, len(facts)), guess=guess)

    def _chain(self, task: Task, draw: random.Random, _amount: int) -> Drawn:
        """A chain of things with one number, and another of the same length with another number."""
        keys, (code, other) = self.probe.key_names(draw, 2 * (task.hops + 1)), self.probe.codes(draw, 2)
        chains = []
        for value, chain in ((code, keys[: task.hops + 1]), (other, keys[task.hops + 1 :])):
            links = [task.link.format(key=b, before=a) for a, b in pairwise(chain)]
            chains.append([task.fact.format(key=chain[0], value=value), *links])
        mixed = [fact for pair in zip(*chains, strict=True) for fact in pair]  # each keeps its own order
        return Drawn(tuple(keys[: task.hops + 1]), {"value": code}, mixed)

    def _common(self, task: Task, draw: random.Random, amount: int) -> Drawn:
        """A shuffled list: a few words come five times as often as the others."""
        words = draw.sample(self.tasks.words, len(self.tasks.words))
        common, rare = words[: task.asked], words[task.asked :]
        times = 1 + amount // (8 * len(rare))
        listed = common * (COMMON * times) + rare[: 8 + amount // 8] * (RARE * times)
        draw.shuffle(listed)
        return Drawn(tuple(common), text=", ".join(listed))

    def _meaning(self, task: Task, draw: random.Random, _amount: int) -> Drawn:
        """The question names a town, the text only what stands there."""
        n, sights = task.people, draw.sample(self.tasks.sights, task.people)
        names = draw.sample(self.probe.slots["name"], n)
        facts = [task.fact.format(name=names[k], sight=sights[k][0]) for k in range(n)]
        return Drawn((names[0],), {"town": sights[0][1]}, draw.sample(facts, n), guess=1 / n)

    def _scattered(self, facts: Sequence[str], draw: random.Random, n_filler: int) -> Iterator[str]:
        """The facts in their order, at places drawn evenly among filler that names none of their words."""
        filler = list(islice(sentences(self.probe, draw), n_filler))
        places = sorted(draw.randrange(n_filler + 1) for _ in facts)
        for at in range(n_filler + 1):
            yield from (fact for fact, place in zip(facts, places, strict=True) if place == at)
            yield from filler[at : at + 1]


def measure_tasks(
    model: Model,
    folder: str | Path,
    lengths: Sequence[int],
    speed: PrefillSpeed,
    *,
    n_texts: int = 12,
    budget_seconds: float = inf,
    model_id: str = "",
    fresh: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Ask every task at every length, short lengths first: the table of `rates`, and what was left out.

    Resumes after a kill: ``long_context_tasks.jsonl`` in ``folder`` keeps the answers. A task without a right
    answer at the shortest length is not asked at longer ones. No text is begun that is not expected to end in
    the budget, at this speed. ``lengths``: tokens of text, question and answer, ascending.

    Raises `DecodeError` where llama.cpp fails.
    """
    writer = Writer(model.tokenize, around(model), model.with_bos([]))
    names = list(writer.tasks.tasks)
    conditions: dict[str, Any] = {**model.conditions(), **writer.tasks.identity(), "model": model_id}
    conditions |= {"filler": writer.probe.identity(), "answer": ANSWER_RULE}
    path, meter = Path(folder) / "long_context_tasks.jsonl", Meter(budget_seconds)
    journal = Journal(path, conditions, fresh=fresh, fields=ROW)

    def ask(copy: Model, turn: tuple[str, int, int]) -> None:
        key, cost = "/".join(map(str, turn)), speed.seconds(turn[1]) + ANSWER_TOKENS * speed.decode
        if key in journal or not meter.holds(cost) or (text := writer.text(*turn)) is None:
            return
        with meter.spend(cost):
            answer = greedy(copy, text)
        right = text.is_right(answer)
        journal.add(key, answer=answer, expected=text.expected, right=right, guess=text.guess)

    rows, n_missing, going = list[dict[str, Any]](), 0, names
    with crew(model) as models:
        for length in tqdm(lengths, desc="lengths", leave=False):
            # in turn, so that a short budget leaves every task of a length some texts
            turns = [(task, length, number) for number in range(n_texts) for task in going]
            side_by_side(models, ask, turns)
            for task, _, number in turns:
                if (key := f"{task}/{length}/{number}") in journal:
                    rows.append({"task": task, "length": length, **journal[key]})
                else:
                    n_missing += 1
            if length == lengths[0]:
                wrong = Counter(row["task"] for row in rows if not row["right"])
                going = [task for task in going if wrong[task] < n_texts]
    missing = [f"{n_missing} texts of the table of tasks"] if n_missing else []
    table = rates(pd.DataFrame(rows, columns=["task", "length", *ROW]), names)
    return table, missing if rows else ["the table of tasks: not measured"]


def rates(items: pd.DataFrame, tasks: Sequence[str]) -> pd.DataFrame:
    """By task and length: ``n``, ``right``, ``guess``, ``accuracy``, and Wilson's ``low`` and ``high``."""
    items = items.assign(task=pd.Categorical(items["task"], tasks), right=items["right"].astype(bool))
    groups = items.groupby(["task", "length"], observed=True)
    table = groups.agg(n=("right", "size"), right=("right", "sum"), guess=("guess", "mean"))
    low, high = wilson(table["right"], table["n"])
    return table.assign(accuracy=table["right"] / table["n"], low=low, high=high).reset_index()


def greedy(model: Model, text: Text) -> str:
    """The greedy answer; its first line where a single word is expected (several may come as a list)."""
    answer = generate(model, text.tokens, text.max_tokens).text.strip(": \n")
    return answer if len(text.expected) > 1 else answer.partition("\n")[0]


# ---- long answers: how many fall into a repeat, where, and for how long ----
#
# DeepSeek-V4-Flash is reported to do so in long agent chats (ggml-org/llama.cpp#26694).

LONG, LONG_JOURNAL = "long-generation", "long_generation.jsonl"
TEMPERATURES = 0.0, 1.0
LEAST_TIMES, LEAST_TOKENS = 4, 64  # of a block that follows itself, and of all its copies together


class Requests(PromptSet):
    """The frozen requests for long answers."""

    prompts: tuple[str, ...]


class Loop(NamedTuple):
    """A block of ``period`` tokens that follows itself, from ``start`` on, for ``length`` tokens in all."""

    start: int
    period: int
    length: int


def first_loop(tokens: Sequence[int]) -> Loop | None:
    """The earliest run in which a block comes at least 4 times in a row and fills at least 64 tokens.

    Copies are equal token by token, so a list with growing numbers is not a loop.

    >>> first_loop([7, 8, 9] + [1, 2] * 40 + [5])
    Loop(start=3, period=2, length=80)
    """
    ids, loops = np.asarray(tokens), []
    for period in range(1, len(ids) // LEAST_TIMES + 1):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        starts, lengths = edges[::2], edges[1::2] - edges[::2] + period
        long = np.flatnonzero(lengths >= max(LEAST_TIMES * period, LEAST_TOKENS))
        loops += [Loop(int(starts[k]), period, int(lengths[k])) for k in long[:1]]
    return min(loops, default=None)


def measure_loops(
    model: Model,
    folder: str | Path,
    speed: PrefillSpeed,
    *,
    n_answers: int = 12,
    n_tokens: int = 512,
    budget_seconds: float = inf,
    model_id: str = "",
    fresh: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """Ask for long answers at each temperature: the table of `loop_rates`, and what was left out.

    Resumes after a kill: ``long_generation.jsonl`` in ``folder`` keeps the answers. An answer's number is its
    request and its seed, so temperatures differ in nothing else. No answer is begun that is not expected to
    end in the budget, at this speed, and one that does not is lost. ``n_tokens``: of an answer, fewer where
    the context is shorter.
    """
    requests, n_tokens = load_prompts(LONG, Requests), min(n_tokens, model.settings.n_ctx // 2)
    made = {**model.conditions(), **requests.identity(), "n_tokens": n_tokens, "model": model_id}
    made["sampling"], fields = asdict(Sampling()), {"tokens": list, "ended": bool}
    journal = Journal(Path(folder) / LONG_JOURNAL, made, fresh=fresh, fields=fields)
    meter, cost = Meter(budget_seconds), n_tokens * speed.decode
    turns = [*product(range(min(n_answers, len(requests.prompts))), TEMPERATURES)]

    def ask(copy: Model, turn: tuple[int, float]) -> None:
        number, temperature = turn
        if str(turn) in journal or not meter.holds(cost):
            return
        with meter.spend(cost):
            sampling = Sampling(temperature, seed=number)
            answer = chat(copy, requests.prompts[number], n_tokens, sampling, until=meter.end)
        if answer.finish_reason != "time":
            journal.add(str(turn), tokens=answer.token_ids, ended=answer.finish_reason != "length")

    with crew(model) as models:
        side_by_side(models, ask, turns)
    rows = [(turn[1], journal[str(turn)]) for turn in turns if str(turn) in journal]
    missing = [f"{len(turns) - len(rows)} of {len(turns)} long answers"] if len(rows) < len(turns) else []
    missing = missing if rows else ["the table of long answers: not measured"]
    items = [(temperature, not it["ended"], first_loop(it["tokens"]) is not None) for temperature, it in rows]
    return loop_rates(pd.DataFrame(items, columns=["temperature", "long", "looped"])), missing


def loop_rates(items: pd.DataFrame) -> pd.DataFrame:
    """By temperature: the share of long answers that fall into a repeat.

    ``long``: answers that reach the token limit; ``looped``: those of them with a loop; ``rate`` with its
    interval (all NaN without a long answer).
    """
    items = items.assign(looped=items["long"] & items["looped"]).astype({"long": bool, "looped": bool})
    groups = items.groupby("temperature", sort=False)
    table = groups.agg(asked=("long", "size"), long=("long", "sum"), looped=("looped", "sum"))
    low, high = wilson(table["looped"], table["long"])
    rates = pd.DataFrame({"rate": table["looped"] / table["long"], "low": low, "high": high})
    return table.join(rates.where(table["long"] > 0)).reset_index()
