"""Multiple choice by log-likelihood: the likeliest choice is the answer, and no text is generated.

The protocol is that of lm-evaluation-harness (``multiple_choice``, Gao et al. 2024): the context and each
choice are tokenized together, a choice's score is the sum of its tokens' log-probabilities, and ``acc_norm``
divides it by the choice's length in characters. The results are written in that program's layout.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, sqrt
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import log_softmax

from dfqs_nb.core import display, errors, journal
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model, SavedState
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.stats import mean_interval, wilson

if TYPE_CHECKING:
    import pandas as pd

ROW = {"log_likelihoods": list, "greedy": list}  # what a line of the file of answers holds
N_CHOICES = 4  # of a question that is made from a set of questions with one answer each


def load_choices(source: str | Path) -> ItemSet:
    """A set of choices, or a reasoning set as multiple choice; a `PromptError` as `ItemSet.load`."""
    questions = ItemSet.load(source)
    return questions if questions.kind == "choice" else choices_of(questions)


def choices_of(questions: ItemSet) -> ItemSet:
    """Multiple choice from a reasoning set: the choices are answers of the same family.

    A hash of the question decides which and in what order. A set without enough answers is a `PromptError`.
    """
    answers: dict[str, dict[str, None]] = {}
    for item in questions.items:
        answers.setdefault(item.family, {})[item.answer] = None
    items = []
    for item in questions.items:
        others = [answer for answer in answers[item.family] if answer not in ("", item.answer)]
        if len(others) >= N_CHOICES - 1:
            draw = np.random.default_rng(list(hashlib.sha256(item.prompt.encode()).digest()))
            chosen = [others[at] for at in draw.permutation(len(others))[: N_CHOICES - 1]]
            gold = int(draw.integers(N_CHOICES))
            chosen.insert(gold, item.answer)
            items.append(replace(item, choices=tuple(chosen), gold=gold))
    if not items:
        hint = "take a reasoning set, or write a JSONL file of choices (see data/prompts/README.md)"
        raise errors.PromptError(f"{questions.name} has no {N_CHOICES} answers a family", hint=hint)
    facts: dict[str, Any] = {"set": f"{questions.name}-choices", "kind": "choice", "mode": "chat"}
    return replace(questions, **facts, delimiter="", items=tuple(items), n_whole=len(items))


@dataclass(frozen=True)
class Answers:
    """A set, answered by likelihood.

    ``items`` has a row a question: ``id``, ``family``, ``gold``, ``log_likelihoods`` (nats, one a choice),
    ``greedy`` (whether greedy decoding gives a choice), ``acc`` and ``acc_norm`` (0 or 1), ``margin`` (nats
    between the right choice and the best wrong one), ``guess``. ``left_out``: by a budget.
    """

    questions: ItemSet
    model: str
    conditions: dict[str, Any] = field(repr=False)
    items: pd.DataFrame = field(repr=False)
    left_out: tuple[str, ...] = ()

    @property
    def score(self) -> dict[str, Any]:
        """The result as the stage file holds it: ``acc`` and ``acc_norm`` with Wilson's 95 % intervals."""
        n, guess = len(self.items), float(self.items["guess"].mean())
        score = {"set": self.questions.name, "n": n, "guess_rate": guess, "sentence": self.sentence}
        for name in ("acc", "acc_norm"):
            low, high = map(float, wilson(self.items[name].sum(), n))
            score |= {name: float(self.items[name].mean()), f"{name}_low": low, f"{name}_high": high}
        return score

    @property
    def sentence(self) -> str:
        """The result for people."""
        parts, n = [], len(self.items)
        for name in ("acc", "acc_norm"):
            low, high = map(float, wilson(self.items[name].sum(), n))
            parts.append(f"{name} {self.items[name].mean():.3f} ({low:.3f} to {high:.3f})")
        guess = float(self.items["guess"].mean())
        return f"{self.questions.name}: {', '.join(parts)}, n = {n}, guess rate {guess:.3f}"

    def families(self) -> pd.DataFrame:
        """A row a family: ``n``, ``acc``, ``acc_norm``, ``margin`` and its 95 % interval (nats)."""
        groups = self.items.groupby("family", sort=False)
        table = groups[["acc", "acc_norm", "margin"]].mean()
        table.insert(0, "n", groups.size())
        bounds = [mean_interval(group["margin"].to_numpy(float)) for _, group in groups]
        table[["margin_low", "margin_high"]] = bounds
        return table.reset_index()

    def as_lm_eval(self) -> dict[str, Any]:
        """In the layout of lm-evaluation-harness: ``results``, ``n-shot``, ``config``, ``samples``."""
        name, n = self.questions.name, len(self.items)
        scores: dict[str, Any] = {"alias": name}
        for metric in ("acc", "acc_norm"):
            values = self.items[metric].to_numpy(float)
            error = float(values.std(ddof=1)) / sqrt(n) if n > 1 else 0.0
            scores |= {f"{metric},none": float(values.mean()), f"{metric}_stderr,none": error}
        samples = [
            {"doc_id": number, "doc": {"id": item.id, "query": item.prompt, "choices": item.choices}}
            | {"target": item.gold, "acc": float(row.acc), "acc_norm": float(row.acc_norm)}
            | {"resps": [[list(pair)] for pair in zip(row.log_likelihoods, row.greedy, strict=True)]}
            for number, (item, row) in enumerate(
                zip(self.questions.items, self.items.itertuples(), strict=True)
            )
        ]
        return {
            "results": {name: scores},
            "n-samples": {name: {"original": self.questions.n_whole, "effective": n}},
            "n-shot": {name: len(self.questions.examples)},
            "config": {"model": self.model, **self.conditions},
            "samples": {name: samples},
        }


def answer(
    model: Model,
    questions: ItemSet,
    folder: str | Path,
    *,
    model_id: str = "",
    fresh: bool = False,
    until: float = inf,
) -> Answers:
    """Score every choice of every question. The same call resumes a killed run.

    What the questions share (the solved examples) and what the choices of a question share (its prompt) is
    evaluated once and then restored, so four choices cost little more than one. ``<set>.likelihood.jsonl``
    in ``folder`` keeps the answers. No question but the first begins after ``until`` (``time.monotonic``).
    A question that does not fit into the context is a `ContextFullError`.
    """
    import pandas as pd

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {"prompt_set_sha256": questions.sha256, "model": model_id, **model.conditions()}
    path, whole = folder / f"{questions.name}.likelihood.jsonl", partial(journal.holds, fields=ROW)
    kept = journal.Journal(path, conditions, fresh=fresh, whole=whole)
    encoded = {item.id: encode(model, questions, item) for item in questions.items if item.id not in kept}
    shared = list(commonprefix([context for context, _ in encoded.values()]))
    start = None
    if shared:
        model.clear()
        model.decode(shared)
        start = model.save()
    for n, item in enumerate(display.tqdm(questions.by_turns(), desc=questions.name, leave=False)):
        if item.id in encoded:
            if n and time.monotonic() > until:
                break
            logs, greedy = zip(*_scored(model, start, *encoded[item.id]), strict=True)
            kept.add(item.id, log_likelihoods=logs, greedy=greedy)
    answered, rows = tuple(item for item in questions.items if item.id in kept), []
    for item in answered:
        values = np.array(kept[item.id]["log_likelihoods"])
        per_letter = values / [len(choice) for choice in item.choices]
        row = {"id": item.id, "family": item.family, "gold": item.gold, **kept[item.id]}
        row |= {"acc": int(values.argmax() == item.gold), "acc_norm": int(per_letter.argmax() == item.gold)}
        margin = values[item.gold] - np.delete(values, item.gold).max()
        rows.append(row | {"margin": float(margin), "guess": 1 / len(values)})
    n, most = len(rows), len(questions.items)
    left_out = (f"only {n} of {most} questions of {questions.name} answered",) if n < most else ()
    questions = replace(questions, items=answered)
    return Answers(questions, model_id or model.path.name, conditions, pd.DataFrame(rows), left_out)


def encode(model: Model, questions: ItemSet, item: Item) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, and of each choice behind it.

    Blanks at the context's end belong to the choices, and both are tokenized together, because tokenizers
    join a blank with the word behind it.
    """
    between = questions.delimiter
    if questions.mode == "chat":
        choices = [model.tokenize(between + choice, special=False) for choice in item.choices]
        return chat_prompt(model, item.prompt), choices
    solved = [f"{shot.prompt}{between}{shot.choices[shot.gold]}\n\n" for shot in questions.examples]
    whole = "".join([*solved, item.prompt])
    text = whole.rstrip()
    context = model.with_bos(model.tokenize(text, special=False))
    together = [
        model.with_bos(model.tokenize(whole + between + choice, special=False)) for choice in item.choices
    ]
    return context, [tokens[len(context) :] or tokens[-1:] for tokens in together]


def _scored(
    model: Model, start: SavedState | None, context: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """The log-likelihood of each choice in nats, and whether greedy decoding gives it.

    ``start``: a state that holds the beginning of the context.
    """
    if start and len(context) > start.n_tokens:
        model.restore(start)
        context = context[start.n_tokens :]
    else:  # where the whole context is shared, its last token is evaluated again, for its logits
        model.clear()
    first, scored = log_softmax(model.evaluate(context).astype(float))[None], []
    state = model.save()
    for tokens in choices:
        rows = first
        if len(tokens) > 1:
            model.restore(state)
            logits = np.concatenate([chunk.copy() for chunk in model.logits(tokens[:-1])])
            rows = np.concatenate([first, log_softmax(logits.astype(float), axis=-1)])
        value = float(rows[np.arange(len(tokens)), tokens].sum())
        scored.append((value, bool((rows.argmax(axis=1) == tokens).all())))
    return scored
