"""Multiple choice by log-likelihood: the likeliest choice is the answer, and no text is generated.

The protocol is that of lm-evaluation-harness (``multiple_choice``, Gao et al. 2024): the context and each
choice are tokenized together, a choice's score is the sum of its tokens' log-probabilities, and ``acc_norm``
divides it by the choice's length in characters. The results are written in that program's layout.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
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
from dfqs_nb.scores.grading import family_table
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.stats import wilson

if TYPE_CHECKING:
    import pandas as pd

ROW = {"log_likelihoods": list, "greedy": list}  # what a line of the file of answers holds
METRICS = ("acc", "acc_norm")
N_CHOICES = 4  # of a question that is made from a set of questions with one answer each


def choices_of(questions: ItemSet) -> ItemSet:
    """A set of choices as it is, or a reasoning set as one: the choices are answers of the same family.

    A hash of the question decides which and in what order. A set without enough answers is a `PromptError`.
    """
    if questions.kind == "choice":
        return questions
    answers, items = defaultdict[str, dict[str, None]](dict), list[Item]()
    for item in questions.items:
        answers[item.family][item.answer] = None
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

    ``items`` has a row a question: ``id``, ``family``, ``length``, ``guess``, ``log_likelihoods`` (nats) and
    ``greedy`` (whether greedy decoding gives it) of each choice, ``acc`` and ``acc_norm`` (0 or 1).
    ``left_out``: by a budget.
    """

    questions: ItemSet
    model: str
    conditions: dict[str, Any] = field(repr=False)
    items: pd.DataFrame = field(repr=False)
    left_out: tuple[str, ...] = ()

    @property
    def score(self) -> dict[str, Any]:
        """For the stage file: ``acc`` and ``acc_norm`` with Wilson's 95 % intervals, and a ``sentence``."""
        n, guess, parts = len(self.items), float(self.items["guess"].mean()), list[str]()
        score: dict[str, Any] = {"set": self.questions.name, "n": n, "guess_rate": guess}
        for name in METRICS:
            value, (low, high) = float(self.items[name].mean()), map(float, wilson(self.items[name].sum(), n))
            score |= {name: value, f"{name}_low": low, f"{name}_high": high}
            parts.append(f"{name} {value:.3f} ({low:.3f} to {high:.3f})")
        sentence = f"{self.questions.name}: {', '.join(parts)}, n = {n}, guess rate {guess:.3f}"
        return score | {"sentence": sentence}

    def families(self) -> pd.DataFrame:
        """By family, how often the likeliest choice is right; see `grading.family_table`."""
        return family_table(self.items.assign(set=self.questions.name, correct=self.items["acc"]))

    def as_lm_eval(self) -> dict[str, Any]:
        """In the layout of lm-evaluation-harness: ``results``, ``n-shot``, ``config``, ``samples``."""
        name, n = self.questions.name, len(self.items)
        scores, samples = dict[str, Any](alias=name), list[dict[str, Any]]()
        for metric in METRICS:
            values = self.items[metric].to_numpy(float)
            error = float(values.std(ddof=1)) / sqrt(n) if n > 1 else 0.0
            scores |= {f"{metric},none": float(values.mean()), f"{metric}_stderr,none": error}
        for item, row in zip(self.questions.items, self.items.itertuples(), strict=True):
            sample: dict[str, Any] = {"doc_id": len(samples), "target": item.gold}
            sample |= {"doc": {"id": item.id, "query": item.prompt, "choices": item.choices}}
            sample |= {"resps": [[list(pair)] for pair in zip(row.log_likelihoods, row.greedy, strict=True)]}
            samples.append(sample | {metric: float(getattr(row, metric)) for metric in METRICS})
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

    folder, start = Path(folder), None
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {"prompt_set_sha256": questions.sha256, "model": model_id, **model.conditions()}
    conditions["delimiter"] = delimiter(model, questions)
    path, whole = folder / f"{questions.name}.likelihood.jsonl", partial(journal.holds, fields=ROW)
    kept = journal.Journal(path, conditions, fresh=fresh, whole=whole)
    encoded = {item.id: encode(model, questions, item) for item in questions.items if item.id not in kept}
    if shared := commonprefix([context for context, _ in encoded.values()]):
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
        values, sizes = np.array(kept[item.id]["log_likelihoods"]), [len(choice) for choice in item.choices]
        row = {"id": item.id, "family": item.family, "length": item.length, "guess": 1 / len(values)}
        right = {"acc": int(values.argmax() == item.gold)}
        right["acc_norm"] = int((values / sizes).argmax() == item.gold)
        rows.append(row | kept[item.id] | right)
    n, most = len(rows), len(questions.items)
    left_out = (f"only {n} of {most} questions of {questions.name} answered",) if n < most else ()
    questions = replace(questions, items=answered)
    return Answers(questions, model_id or model.path.name, conditions, pd.DataFrame(rows), left_out)


def delimiter(model: Model, questions: ItemSet) -> str:
    """What stands between a prompt and a choice: a blank behind the "Answer:" of a model without template."""
    bare = questions.mode == "chat" and not model.has_template
    return questions.delimiter or " " * bare


def encode(model: Model, questions: ItemSet, item: Item) -> tuple[list[int], list[list[int]]]:
    """Token ids of the context, and of each choice behind it.

    Blanks at the context's end belong to the choices, and both are tokenized together, because tokenizers
    join a blank with the word behind it.
    """
    between = delimiter(model, questions)
    if questions.mode == "chat":
        choices = [model.tokenize(between + choice, special=False) for choice in item.choices]
        return chat_prompt(model, item.prompt), choices
    solved = [f"{shot.prompt}{between}{shot.choices[shot.gold]}\n\n" for shot in questions.examples]
    whole = "".join([*solved, item.prompt])
    texts = whole.rstrip(), *(whole + between + choice for choice in item.choices)
    context, *together = (model.with_bos(model.tokenize(text, special=False)) for text in texts)
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
