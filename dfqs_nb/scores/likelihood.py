"""Multiple choice by log-likelihood: the answer that the model finds likeliest, without generating any.

The protocol is that of lm-evaluation-harness (``multiple_choice``, Gao et al. 2024): the context and each
choice are tokenized together, a choice's score is the sum of its tokens' log-probabilities, and ``acc_norm``
divides it by the choice's length in characters. The results are written in that program's layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, MinLen
from scipy.special import log_softmax

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.files import parse_json, write_json
from dfqs_nb.core.journal import Journal
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.scores.item_sets import ItemSet, Text, read_set
from dfqs_nb.stats import mean_interval, wilson

if TYPE_CHECKING:
    import pandas as pd

N_CHOICES = 4  # of a question that is made from a set of questions with one answer each


@dataclass(frozen=True)
class Choices:
    """A question with its choices; ``gold`` is the index of the right one."""

    id: Text
    query: Text
    choices: Annotated[tuple[Text, ...], MinLen(2)]
    gold: Annotated[int, Ge(0)]
    family: Text = "all"


@dataclass(frozen=True)
class Head:
    """The first line of a set of your own.

    Attributes:
        mode: ``complete``: plain text; ``chat``: the query is a user's message in the model's template.
        delimiter: between the query and a choice.
        examples: questions that are shown solved before each query (few-shot).
    """

    set: Text
    kind: Literal["choice"]
    mode: Literal["chat", "complete"] = "complete"
    delimiter: str = " "
    examples: tuple[Choices, ...] = ()
    licence: str = "not stated"
    source: str = "not stated"


@dataclass(frozen=True)
class ChoiceSet:
    """A set of multiple-choice questions; any change of its file is another ``sha256``."""

    head: Head
    sha256: str
    items: tuple[Choices, ...] = field(repr=False)

    @classmethod
    def load(cls, source: str | Path) -> ChoiceSet:
        """A JSONL file of your own, or a shipped set of questions, whose other answers become the choices.

        Raises:
            PromptError: there is no such set, or its file is broken; the message names line and field.
        """
        path = Path(source)
        if path.suffix != ".jsonl" or not path.is_file() or _kind(path) != "choice":
            return cls.made_of(ItemSet.load(source))
        head, items, sha256 = read_set(path, Head, Choices, _fault)
        return cls(head, sha256, items)

    @classmethod
    def made_of(cls, questions: ItemSet) -> ChoiceSet:
        """Multiple choice from a reasoning set: the choices are answers of the same family.

        Which ones, and their order, follow from a hash of the question, so they are always the same.

        Raises:
            PromptError: no family has enough different answers (a code set has none).
        """
        answers: dict[str, list[str]] = {}
        for item in questions.items:
            known = answers.setdefault(item.family, [])
            known += [item.answer] if item.answer and item.answer not in known else []
        items = []
        for item in questions.items:
            others = [answer for answer in answers[item.family] if answer != item.answer]
            if len(others) >= N_CHOICES - 1:
                draw = np.random.default_rng(list(hashlib.sha256(item.prompt.encode()).digest()))
                chosen = [others[at] for at in draw.permutation(len(others))[: N_CHOICES - 1]]
                gold = int(draw.integers(N_CHOICES))
                chosen.insert(gold, item.answer)
                items.append(Choices(item.id, item.prompt, tuple(chosen), gold, item.family))
        if not items:
            hint = "take a reasoning set, or write a JSONL file of choices (see data/prompts/README.md)"
            raise PromptError(f"{questions.name} has no {N_CHOICES} answers a family", hint=hint)
        head = Head(
            f"{questions.name}-choices", "choice", "chat", "", (), questions.licence, questions.source
        )
        return cls(head, questions.sha256, tuple(items))


def _kind(path: Path) -> Any:
    """The kind of set that a file's first line names, if it can be read."""
    try:
        with path.open("rb") as file:
            head = parse_json(file.readline(1 << 20).removeprefix(b"\xef\xbb\xbf"))
    except (OSError, ValueError):
        return None  # `ItemSet.load` says what is wrong
    return head.get("kind") if isinstance(head, dict) else None


def _fault(head: Head, item: Choices | None) -> str:
    if any(each.gold >= len(each.choices) for each in ([item] if item else head.examples)):
        return "gold names no choice" if item else "examples: gold names no choice"
    return "examples: only the mode complete shows them" if head.examples and head.mode == "chat" else ""


# ---- one model ----


@dataclass(frozen=True)
class Answers:
    """A set, answered by likelihood.

    ``items`` has a row a question: ``id``, ``family``, ``gold``, ``log_likelihoods`` (nats, one a choice),
    ``greedy`` (whether a choice is what greedy decoding gives), ``acc`` and ``acc_norm`` (0 or 1), ``margin``
    (nats between the right choice and the best wrong one), ``guess``. ``n_evaluated``: tokens that it took;
    ``left_out``: what a budget left out.
    """

    questions: ChoiceSet
    model: str
    conditions: dict[str, Any] = field(repr=False)
    items: pd.DataFrame = field(repr=False)
    n_evaluated: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The result for people."""
        parts = []
        for name in ("acc", "acc_norm"):
            right, n = int(self.items[name].sum()), len(self.items)
            low, high = map(float, wilson(right, n))
            parts.append(f"{name} {right / n:.3f} ({low:.3f} to {high:.3f})")
        guess = float(self.items["guess"].mean())
        return f"{self.questions.head.set}: {', '.join(parts)}, n = {len(self.items)}, guess rate {guess:.3f}"

    def families(self) -> pd.DataFrame:
        """A row a family: ``n``, ``acc``, ``acc_norm``, ``margin`` and its 95 % interval (nats)."""
        groups = self.items.groupby("family", sort=False)
        table = groups[["acc", "acc_norm", "margin"]].mean()
        table.insert(0, "n", groups.size())
        bounds = [mean_interval(group["margin"].to_numpy(float)) for _, group in groups]
        return table.assign(
            margin_low=[low for low, _ in bounds], margin_high=[high for _, high in bounds]
        ).reset_index()

    def as_lm_eval(self) -> dict[str, Any]:
        """In the layout of lm-evaluation-harness: ``results``, ``n-shot``, ``config``, ``samples``."""
        name, n = self.questions.head.set, len(self.items)
        scores: dict[str, Any] = {"alias": name}
        for metric in ("acc", "acc_norm"):
            values = self.items[metric].to_numpy(float)
            error = float(values.std(ddof=1)) / sqrt(n) if n > 1 else 0.0
            scores |= {f"{metric},none": float(values.mean()), f"{metric}_stderr,none": error}
        samples = [
            {
                "doc_id": number,
                "doc": {name: getattr(item, name) for name in ("id", "query", "choices")},
                "target": item.gold,
                "resps": [[list(pair)] for pair in zip(row.log_likelihoods, row.greedy, strict=True)],
                "acc": float(row.acc),
                "acc_norm": float(row.acc_norm),
            }
            for number, (item, row) in enumerate(
                zip(self.questions.items, self.items.itertuples(), strict=False)
            )
        ]
        return {
            "results": {name: scores},
            "n-samples": {name: {"original": len(self.questions.items), "effective": n}},
            "n-shot": {name: len(self.questions.head.examples)},
            "config": {"model": self.model, **self.conditions},
            "samples": {name: samples},
        }

    def save(self, path: str | Path) -> Path:
        """Write `as_lm_eval` as JSON, whole or not at all."""
        return write_json(path, self.as_lm_eval())


def answer(
    model: Model,
    questions: ChoiceSet,
    folder: str | Path,
    *,
    model_id: str = "",
    limit: int | None = None,
    fresh: bool = False,
) -> Answers:
    """Score every choice of every question. The same call resumes a killed run.

    What questions have in common (the solved examples), and what the choices of one have in common (the
    query), is evaluated once and then restored, so four choices cost little more than one.

    Args:
        folder: where the answers are kept, as ``<set>.likelihood.jsonl``.
        limit: only the first questions.

    Raises:
        ContextFullError: a question does not fit into the context. DecodeError: llama.cpp fails.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {"prompt_set_sha256": questions.sha256, "model": model_id, **model.conditions()}
    journal = Journal(folder / f"{questions.head.set}.likelihood.jsonl", conditions, fresh=fresh)
    items = questions.items[:limit]
    if not items:
        raise PromptError(f"a limit of {limit} leaves no question", hint="take 1 or more")
    encoded = {item.id: encode(model, questions.head, item) for item in items if item.id not in journal}
    scorer = _Scorer(model, commonprefix([context for context, _ in encoded.values()]))
    for item in tqdm(items, desc=questions.head.set, leave=False):
        if item.id in encoded:
            logs, greedy = zip(*scorer.choices(*encoded[item.id]), strict=True)
            journal.add(item.id, log_likelihoods=logs, greedy=greedy)
    rows = []
    for item in items:
        values = np.array(journal[item.id]["log_likelihoods"])
        per_letter = values / [len(choice) for choice in item.choices]
        row = {"id": item.id, "family": item.family, "gold": item.gold, **journal[item.id]}
        row |= {"acc": int(values.argmax() == item.gold), "acc_norm": int(per_letter.argmax() == item.gold)}
        margin = values[item.gold] - np.delete(values, item.gold).max()
        rows.append(row | {"margin": float(margin), "guess": 1 / len(values)})
    return Answers(questions, model_id or model.path.name, conditions, pd.DataFrame(rows), scorer.n_evaluated)


def encode(model: Model, head: Head, item: Choices) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, and of each choice behind it.

    Blanks at the context's end belong to the choices, and both are tokenized together, because tokenizers
    join a blank with the word behind it.
    """
    if head.mode == "chat":
        context = chat_prompt(model, item.query)
        return context, [model.tokenize(head.delimiter + choice, special=False) for choice in item.choices]
    solved = [f"{shot.query}{head.delimiter}{shot.choices[shot.gold]}\n\n" for shot in head.examples]
    text = "".join([*solved, item.query])
    blanks = text[len(text.rstrip()) :]
    text = text.rstrip()
    context = model.with_bos(model.tokenize(text, special=False))
    whole = [
        model.with_bos(model.tokenize(text + blanks + head.delimiter + choice, special=False))
        for choice in item.choices
    ]
    return context, [tokens[len(context) :] or tokens[-1:] for tokens in whole]


class _Scorer:
    """Scores choices behind contexts that all begin with ``shared``, which is evaluated once."""

    def __init__(self, model: Model, shared: Sequence[int]) -> None:
        self._model, self._shared, self.n_evaluated = model, list(shared), 0
        model.clear()
        if self._shared:
            self.n_evaluated = len(self._shared)
            model.decode(self._shared)
            self._start = model.save()

    def choices(self, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
        """The log-likelihood of each choice in nats, and whether greedy decoding gives it."""
        model, rest = self._model, context[len(self._shared) :]
        if self._shared and rest:
            model.restore(self._start)
        else:  # the whole context is shared: its last token is evaluated again, for its logits
            model.clear()
            rest = context
        self.n_evaluated += len(rest)
        first = log_softmax(model.evaluate(rest).astype(float))
        longer = sum(len(tokens) > 1 for tokens in choices)
        state = model.save() if longer > 1 else None
        scored = []
        for tokens in choices:
            value, greedy = float(first[tokens[0]]), bool(first.argmax() == tokens[0])
            if len(tokens) > 1:
                if state is not None:
                    model.restore(state)
                self.n_evaluated += len(tokens) - 1
                logits = np.concatenate([rows.copy() for rows in model.logits(tokens[:-1])])
                rows = log_softmax(logits.astype(float), axis=-1)
                value += float(rows[np.arange(len(rows)), tokens[1:]].sum())
                greedy = greedy and bool((rows.argmax(axis=1) == tokens[1:]).all())
            scored.append((value, greedy))
        return scored
