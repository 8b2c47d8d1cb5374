"""How faithful a quantization is to its original, by a record of the original's predictions.

A record is a JSONL file: prompts as token ids, and at each token of the original's greedy answer the
likeliest tokens with their log-probabilities. The rest leaves the KL divergence open between two bounds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le, MinLen
from pydantic import BaseModel, ValidationError

from dfqs_nb.core import display, files, journal, paths
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.ladder.divergence import Array, log_probs
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.scores import ItemSet
from dfqs_nb.stats import at_most, mean_interval

FORMAT: Final = "dfqs reference record 2"
TOP_K = 20  # tokens recorded at each step
MEASURES = {
    "extra_bits_per_byte": "extra bits a byte",
    "same_top": "same likeliest token (share)",
    "kl_low": "KL divergence, at least (nats)",
    "kl_high": "KL divergence, at most (nats)",
}

Token = Annotated[int, Ge(0)]
LogProb = Annotated[float, Ge(-1e4), Le(1e-3)]  # natural


class Line(BaseModel):
    """A prompt and the original's answer; ``steps``: at each token of it the likeliest ones, best first."""

    id: str
    prompt: Annotated[list[Token], MinLen(1)]
    text: str  # of the answer
    steps: Annotated[list[Annotated[list[tuple[Token, LogProb]], MinLen(1)]], MinLen(1)]

    @property
    def answer(self) -> list[int]:
        """The tokens of the greedy answer."""
        return [top[0][0] for top in self.steps]


class Head(BaseModel):
    """The first line of a record: the original's name and hash, what computed it, the prompts' licence."""

    record: Literal["dfqs reference record 2"] = FORMAT
    source: str
    source_sha256: str = ""
    n_vocab: Annotated[int, Ge(1)]
    runtime: str = ""
    licence: str = "not stated"
    date: str = ""


@dataclass(frozen=True)
class Record:
    """A reference record, read and checked."""

    head: Head
    lines: list[Line] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record that somebody else may have written; a `DfqsError` names line and field."""
        number, lines = 1, list[Line]()
        try:
            first, *rest = Path(path).read_bytes().splitlines()
            head = Head.model_validate_json(first)
            for number, line in enumerate(rest, 2):  # noqa: B007 (an error names it)
                lines += [Line.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"line {number}: {'.'.join(map(str, fault['loc'])) or 'no object'}: {fault['msg']}"
            hint = f'its first line must name the format, "record": "{FORMAT}"; docs/fidelity.md describes it'
            hint = hint if number == 1 else "it is cut or damaged: copy it again, or make it again"
            raise DfqsError(what, where=paths.tilde(path), hint=hint) from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is empty"
            hint = "make one with: dfqs-nb record MODEL -o record.jsonl"
            raise DfqsError(f"cannot be read ({why})", where=paths.tilde(path), hint=hint) from error
        if not lines:
            raise DfqsError("the record holds no prompt", where=paths.tilde(path), hint="make it again")
        return cls(head, lines)


def write_record(
    model: Model, questions: ItemSet, path: str | Path, *, n_tokens: int = 64, sha256: str = ""
) -> None:
    """Record how the original answers each question, in its own chat template. The same call resumes.

    ``n_tokens``: the most of each answer. ``sha256``: of the model.
    """
    path, around = Path(path), questions.instruction if questions.mode == "chat" else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    conditions, prompts = model.conditions(), {item.id: item.asked(around) for item in questions.items}
    about: dict[str, Any] = {"source": model.path.name, "source_sha256": sha256}
    about |= {"licence": questions.licence, "runtime": conditions["runtime"]}
    key = {**about, "record": FORMAT, "conditions": conditions, "tokens": n_tokens, "prompts": prompts}
    kept = journal.Journal(path.with_name(f".{path.name}.answers"), key)
    for name, prompt in display.tqdm(prompts.items(), desc="prompts", leave=False):
        if name not in kept:
            steps = continuation(model, ids := chat_prompt(model, prompt), n_tokens)
            kept.add(name, prompt=ids, text=model.text([top[0][0] for top in steps]), steps=steps)
    rows = [row for row in kept.rows() if row["steps"]]  # a model that ends at once predicted nothing
    if not rows:
        hint = "give another question set with --prompts"
        raise DfqsError("every answer ended at once", where=model.path, hint=hint)
    head = Head(**about, n_vocab=model.n_vocab, date=date.today().isoformat())
    with files.whole_file(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in [head.model_dump(), *rows])
    kept.path.unlink(missing_ok=True)


def continuation(model: Model, prompt: list[int], n_tokens: int) -> list[list[tuple[int, float]]]:
    """The greedy answer: at each token the `TOP_K` likeliest with their log-probabilities, best first."""
    model.clear()
    steps, fed = list[list[tuple[int, float]]](), prompt
    for _ in range(max(1, min(n_tokens, model.settings.n_ctx - len(prompt)))):
        row = log_probs(model.evaluate(fed))
        best = np.argsort(-row, kind="stable")[:TOP_K].tolist()
        if model.ends(best[0]):
            break
        steps.append([(token, float(row[token])) for token in best])
        fed = best[:1]
    return steps


def kl_bounds(top: Array, ours: Array, rest: Array) -> tuple[float, float]:
    """Bounds, in nats, of the KL divergence of our prediction from one known only at its likeliest tokens.

    The lower bound takes the unseen tokens as one (the log-sum inequality). The upper bound gives the unseen
    probability to those tokens that we hold least likely, to each no more than the last seen one has: the
    divergence is convex in it, so its maximum lies at such a corner. ``top`` and ``ours``: log-probabilities
    of the seen tokens, ``(k,)``; ``rest``: ours of all others.

    >>> both = np.log([0.5, 0.25, 0.125, 0.125])
    >>> low, high = kl_bounds(both[:2], both[:2], both[2:])
    >>> low, round(high, 4)
    (0.0, 0.1733)
    """
    seen = float(np.exp(top) @ (top - ours))
    unseen = max(0.0, 1.0 - float(np.exp(top).sum()))
    if unseen < 1e-9 or not len(rest):
        return max(seen, 0.0), max(seen, 0.0)
    most = float(rest.max())
    low = seen + unseen * (np.log(unseen) - most - np.log(np.exp(rest - most).sum()))
    cap = min(max(float(np.exp(top.min())), unseen / len(rest)), unseen)
    n_full = min(int(unseen / cap), len(rest))
    least = np.sort(np.partition(rest, min(n_full, len(rest) - 1))[: n_full + 1])
    mass = np.append(np.full(n_full, cap), max(0.0, unseen - n_full * cap))[: len(least)]
    mass = mass[mass > 1e-12]
    high = seen + float(mass @ (np.log(mass) - least[: len(mass)]))
    return max(low, 0.0), max(low, high, 0.0)


def compare_record(model: Model, record: Record) -> pd.DataFrame:
    """Predict a record's answers with an open model, whose context holds at least one of them.

    A row a token: ``id`` of the prompt, ``position`` (from 0), ``bytes``, ``nll_reference``, ``nll`` (nats),
    ``same_top``, ``kl_low``, ``kl_high``. A `DfqsError`: the model has another vocabulary.
    """
    n_vocab = min(model.n_vocab, record.head.n_vocab)
    for line in record.lines:
        largest = max(*line.prompt, *(token for top in line.steps for token, _ in top))
        if largest >= n_vocab or model.text(line.answer) != line.text:
            what = f"the model has another vocabulary than the record (prompt {line.id!r})"
            raise DfqsError(what, where=model.path, hint="record the original of this very model")
    n_ctx, rows = model.settings.n_ctx, list[dict[str, Any]]()
    # a prompt that does not fit is left out; the number of prompts shows it
    fitting = [line for line in record.lines if len(line.prompt) + len(line.steps) <= n_ctx]
    for line in display.tqdm(fitting, desc="prompts", leave=False):
        for at, (step, ours) in enumerate(zip(line.steps, predictions(model, line), strict=True)):
            seen, top = map(np.array, zip(*step, strict=True))
            low, high = kl_bounds(top, ours[seen].astype(float), np.delete(ours, seen).astype(float))
            row: dict[str, Any] = {"id": line.id, "position": at, "bytes": len(model.token_bytes(step[0][0]))}
            row |= {"nll_reference": -top[0], "nll": -float(ours[seen[0]])}
            rows.append(row | {"same_top": ours.argmax() == seen[0], "kl_low": low, "kl_high": high})
    if not rows:
        hint = f"open the model with a larger context than {n_ctx:,} tokens: --n-ctx"
        raise DfqsError("no prompt of the record fits", where=model.path, hint=hint)
    return pd.DataFrame(rows)


def predictions(model: Model, line: Line) -> Array:
    """Log-probabilities before each token of the answer, float32 ``(n, n_vocab)``."""
    model.clear()
    if len(line.prompt) > 1:
        model.decode(line.prompt[:-1])
    return np.concatenate([log_probs(rows) for rows in model.logits([line.prompt[-1], *line.answer[:-1]])])


def summary(tokens: pd.DataFrame) -> pd.DataFrame:
    """Means over prompts with 95 % intervals (a bootstrap; NaN for fewer than 6 prompts), a row a measure."""
    prompts = tokens.groupby("id")
    values = prompts[["same_top", "kl_low", "kl_high"]].mean()
    sums = prompts[["nll", "nll_reference", "bytes"]].sum()
    values["extra_bits_per_byte"] = (sums["nll"] - sums["nll_reference"]) / sums["bytes"] / np.log(2)
    by_label = {label: values[name].to_numpy(float) for name, label in MEASURES.items()}
    rows = {label: [each.mean(), *mean_interval(each)] for label, each in by_label.items()}
    if (same := rows[MEASURES["same_top"]])[1] == 1:  # a bootstrap of equal values has no width
        same[1] = 1 - at_most(0, len(values))
    return pd.DataFrame.from_dict(rows, "index", columns=["mean", "low", "high"]).reset_index(names="measure")
