"""How faithful a quantization is to its original, by a record of the original's predictions.

A record is a JSONL file: prompts, the original's greedy continuation of each, and at each token the likeliest
tokens with their log-probabilities. The unseen rest leaves the KL divergence open between two bounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, BaseModel, ValidationError

from dfqs_nb.core import display, errors, files, journal, paths
from dfqs_nb.ladder.divergence import Array, load_text, log_probs
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.scores import ItemSet
from dfqs_nb.stats import mean_interval

FORMAT: Final = "dfqs reference record 1"
BYTE = 6  # of the header's token types
FORMS = {"extra_bits_per_byte": "+.4f", "same_top": ".1%", "kl_low": ".4f", "kl_high": ".4f"}
MOST_OTHERS = 0.1  # of the answers may have tokens that the model lacks; more: another tokenizer


class RecordError(errors.DfqsError):
    """A record is broken, or does not fit the model."""


def _hex(text: str) -> str:
    bytes.fromhex(text)  # its ValueError says "hexadecimal"
    return text


Hex = Annotated[str, AfterValidator(_hex)]  # a token's bytes
LogProb = Annotated[float, Ge(-1e4), Le(1e-3)]  # natural


class Step(BaseModel):
    """One token of the original's continuation, and the likeliest tokens there, best first."""

    token: Hex
    logprob: LogProb
    top: Annotated[list[tuple[Hex, LogProb]], MinLen(1)]


class Line(BaseModel):
    """A prompt and the original's continuation. ``chat``: the prompt is a user's message, not a text."""

    id: str
    prompt: Annotated[str, MinLen(1)]
    chat: bool = False
    steps: Annotated[list[Step], MinLen(1)]


class Head(BaseModel):
    """The first line of a record: the original's name and hash, what computed it, and the text's licence."""

    record: Literal["dfqs reference record 1"]
    source: str
    source_sha256: str = ""
    runtime: str = ""
    licence: str = "not stated"
    date: str = ""
    top_k: Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Record:
    """A reference record, read and checked."""

    head: Head
    lines: list[Line] = field(repr=False)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record that somebody else may have written; a `RecordError` names line and field."""
        number, lines = 1, list[Line]()
        try:
            first, *rest = Path(path).read_bytes().splitlines()
            head = Head.model_validate_json(first)
            for line in rest:
                number += 1
                lines += [Line.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            fault = error.errors()[0]
            what = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}".removeprefix(": ")
            hint = f'its first line must name the format, "record": "{FORMAT}"; docs/fidelity.md describes it'
            raise RecordError(f"line {number}: {what}", where=paths.tilde(path), hint=hint) from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is empty"
            hint = "make one with: dfqs-nb record MODEL -o record.jsonl"
            raise RecordError(f"cannot be read ({why})", where=paths.tilde(path), hint=hint) from error
        if not lines:
            raise RecordError("the record holds no prompt", where=paths.tilde(path), hint="make it again")
        return cls(head, lines)


def load_prompts(source: str, limit: int = 0, *, chat: bool = True) -> dict[str, tuple[str, bool]]:
    """Prompts by id, each with whether it is a chat message: of a question set, or the lines of a text file.

    ``limit``: the most prompts, spread over a set's families; 0: all. A `PromptError` or `TextError`: there
    is no such set, or the file cannot be read.
    """
    if Path(source).suffix == ".txt":
        ((text,),) = load_text(source).documents
        lines = [line for line in text.split("\n") if line.strip()]
        return {str(number): (line, chat) for number, line in enumerate(lines[: limit or None], 1)}
    questions = ItemSet.load(source)
    questions = questions.part(limit) if limit else questions
    around = questions.instruction if chat and questions.mode == "chat" else ""
    return {item.id: (item.asked(around), chat) for item in questions.items}


def write_record(
    path: str | Path,
    prompts: Mapping[str, tuple[str, bool]],
    continue_: Callable[[str, bool], Sequence[Mapping[str, Any]]],
    *,
    top_k: int,
    conditions: Mapping[str, Any] | None = None,
    **facts: str,
) -> Head:
    """Record how a model continues each prompt (a text by its id, and whether it is a chat message).

    ``continue_`` gives the steps of a prompt: `continuation` of a model in this process, or of a server.
    ``conditions``: what they depend on beside ``facts``, the fields of `Head`. The same call resumes.
    """
    path = Path(path)
    head = Head(record=FORMAT, date=date.today().isoformat(), top_k=top_k, **facts)
    key = head.model_dump(exclude={"date"}) | dict(conditions or {}) | {"prompts": dict(prompts)}
    kept = journal.Journal(path.with_name(f".{path.name}.journal"), key)
    for name, (text, chat) in display.tqdm(prompts.items(), desc="prompts", leave=False):
        if name not in kept:
            steps = [Step.model_validate(step).model_dump() for step in continue_(text, chat)]
            if steps:  # a model that ends at once predicted nothing
                kept.add(name, prompt=text, chat=chat, steps=steps)
    if not (rows := kept.rows()):
        what = "every answer ended at once, or began with a control token, such as a mark of thinking"
        raise RecordError(what, where=head.source, hint="give other prompts, or plain texts with --plain")
    with files.whole_file(path) as file:
        for row in [head.model_dump(), *rows]:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    kept.path.unlink(missing_ok=True)
    return head


def prompt_tokens(model: Model, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt, in the model's own chat template where it is a chat message."""
    return chat_prompt(model, text) if chat else model.with_bos(model.tokenize(text, special=False))


def continuation(model: Model, text: str, chat: bool, n_tokens: int, top_k: int) -> list[dict[str, Any]]:
    """The greedy continuation of a prompt by a model in this process, with its ``top_k`` likeliest tokens."""
    model.clear()
    logits = model.evaluate(prompt_tokens(model, text, chat))
    steps: list[dict[str, Any]] = []
    for left in range(min(n_tokens, model.settings.n_ctx - model.n_past) - 1, -1, -1):
        row = log_probs(logits)
        best = np.argsort(-row, kind="stable")[:top_k]
        token = int(best[0])
        if model.ends(token) or not model.token_bytes(token):  # a mark of thinking may be no text
            break
        top = [(model.token_bytes(int(other)).hex(), float(row[other])) for other in best]
        steps.append({"token": top[0][0], "logprob": top[0][1], "top": top})
        if left:
            logits = model.evaluate([token])
    return steps


def kl_bounds(top: Array, ours: Array, rest: Array, cap: float) -> tuple[float, float]:
    """Bounds, in nats, of the KL divergence of our prediction from one known only at its likeliest tokens.

    The lower bound takes the unseen tokens as one (the log-sum inequality). The upper bound gives the unseen
    probability to those tokens that we hold least likely, no more than ``cap`` to each: the divergence is
    convex in it, so its maximum lies at such a corner. ``top`` and ``ours``: log-probabilities of the seen
    tokens, ``(k,)``; ``rest``: ours of all others.

    >>> both = np.log([0.5, 0.25, 0.125, 0.125])
    >>> low, high = kl_bounds(both[:2], both[:2], both[2:], 0.25)
    >>> low, round(high, 4)
    (0.0, 0.1733)
    """
    seen = float(np.exp(top) @ (top - ours))
    unseen = max(0.0, 1.0 - float(np.exp(top).sum()))
    if unseen < 1e-9 or not len(rest):
        return max(seen, 0.0), max(seen, 0.0)
    most = float(rest.max())
    low = seen + unseen * (np.log(unseen) - most - np.log(np.exp(rest - most).sum()))
    cap = min(max(cap, unseen / len(rest)), unseen)
    n_full = min(int(unseen / cap), len(rest))
    least = np.partition(rest, min(n_full, len(rest) - 1))[: n_full + 1]
    least.sort()
    mass = np.append(np.full(n_full, cap), max(0.0, unseen - n_full * cap))[: len(least)]
    mass = mass[mass > 1e-12]
    high = seen + float(mass @ (np.log(mass) - least[: len(mass)]))
    return max(low, 0.0), max(low, high, 0.0)


@dataclass(frozen=True)
class Fidelity:
    """How a model predicts what a record holds.

    ``tokens``: a row a token: ``id`` of the prompt, ``position`` (from 0), ``text``, ``bytes``,
    ``nll_reference``, ``nll`` (nats), ``same_top``, ``overlap`` (share of the reference's top k in ours),
    ``kl_low``, ``kl_high``.
    """

    head: Head
    tokens: pd.DataFrame = field(repr=False)

    def summary(self) -> pd.DataFrame:
        """Means over prompts (``mean``) with 95 % intervals (``low``, ``high``), a column a measure.

        The intervals are a bootstrap's, and NaN for fewer than 6 prompts.
        """
        prompts = self.tokens.groupby("id")
        values = prompts[["same_top", "overlap", "kl_low", "kl_high"]].mean()
        sums = prompts[["nll", "nll_reference", "bytes"]].sum()
        values["extra_bits_per_byte"] = (sums["nll"] - sums["nll_reference"]) / sums["bytes"] / np.log(2)
        means = {name: (values[name].mean(), *mean_interval(values[name].to_numpy(float))) for name in values}
        return pd.DataFrame(means, index=["mean", "low", "high"])

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        facts, shown = self.summary(), {}
        for name, form in FORMS.items():
            mean, low, high = facts[name]
            shown[name] = f"{mean:{form}}" + ("" if np.isnan(low) else f" ({low:{form}} to {high:{form}})")
        return (
            f"against {self.head.source}, {self.tokens['id'].nunique()} prompts, {len(self.tokens):,} "
            f"tokens: the original's answers cost {shown['extra_bits_per_byte']} bits a byte more here; "
            f"same likeliest token {shown['same_top']}; KL divergence between {shown['kl_low']} and "
            f"{shown['kl_high']} nats (the record holds the original's {self.head.top_k} likeliest tokens)"
        )

    def by_position(self, n_bins: int = 4) -> pd.DataFrame:
        """Means by stretch of the answers: ``position``, ``n``, ``same_top``, ``kl_low``, ``kl_high``."""
        at = self.tokens["position"]
        n = min(n_bins, int(at.max()) + 1)
        groups = self.tokens.groupby(at * n // (at.max() + 1))
        table = groups[["same_top", "kl_low", "kl_high"]].mean()
        ends = groups["position"].agg(["min", "max"]) + 1
        table.insert(0, "position", [f"{first} to {last}" for first, last in ends.to_numpy()])
        table.insert(1, "n", groups.size())
        return table.reset_index(drop=True)


def compare_record(model: Model, record: Record) -> Fidelity:
    """Predict a record's continuations with an open model.

    A `RecordError`: the model has another tokenizer, or no template for chats, or no prompt fits its context.
    """
    if any(line.chat for line in record.lines) and not model.header.text("tokenizer.chat_template"):
        hint = "record plain texts: dfqs-nb record MODEL --plain -o record.jsonl"
        raise RecordError("the record holds chats, the model has no template", where=model.path, hint=hint)
    vocabulary, n_others, rows = _vocabulary(model), 0, list[dict[str, Any]]()
    for line in display.tqdm(record.lines, desc="prompts", leave=False):
        prompt = prompt_tokens(model, line.prompt, line.chat)
        ids = [vocabulary.get(bytes.fromhex(step.token), -1) for step in line.steps]
        if -1 in ids:
            n_others += 1
        elif len(prompt) + len(ids) <= model.settings.n_ctx:  # the number of prompts shows the others
            predicted = _predictions(model, prompt, ids)
            for at, (step, token) in enumerate(zip(line.steps, ids, strict=True)):
                rows.append({"id": line.id, "position": at, **_row(step, predicted[at], token, vocabulary)})
    if n_others > MOST_OTHERS * len(record.lines):
        what = f"{n_others} of the record's {len(record.lines)} answers have tokens that the model lacks"
        raise RecordError(what, where=model.path, hint="record the original of this very model")
    if not rows:
        hint = f"open the model with a larger context than {model.settings.n_ctx:,} tokens: --n-ctx"
        raise RecordError("no prompt of the record fits", where=model.path, hint=hint)
    return Fidelity(record.head, pd.DataFrame(rows))


def _vocabulary(model: Model) -> dict[bytes, int]:
    """Token ids by their bytes; the first of equals, and none for control tokens, which have no bytes.

    A token that stands for a byte comes after a text of the same byte: no model with both predicts it.
    """
    types, ids = model.header.get("tokenizer.ggml.token_type") or [], dict[bytes, int]()
    for token in sorted(range(model.n_vocab), key=lambda at: at < len(types) and types[at] == BYTE):
        if piece := model.token_bytes(token):
            ids.setdefault(piece, token)
    return ids


def _predictions(model: Model, prompt: Sequence[int], ids: Sequence[int]) -> Array:
    """Log-probabilities before each token of ``ids``, float32 ``(n, n_vocab)``."""
    model.clear()
    if len(prompt) > 1:
        model.decode(prompt[:-1])
    return np.concatenate([log_probs(rows) for rows in model.logits([prompt[-1], *ids[:-1]])])


def _row(step: Step, ours: Array, token: int, vocabulary: Mapping[bytes, int]) -> dict[str, Any]:
    """One token of the table `Fidelity.tokens`."""
    known, cap = dict[int, float](), step.top[-1][1]
    for text, value in step.top:
        index = vocabulary.get(bytes.fromhex(text), -1)
        if index < 0 or index in known:  # a control token, or a second one of the same bytes: unseen
            cap = max(cap, value)
        else:
            known[index] = value
    seen, top = np.fromiter(known, int), np.fromiter(known.values(), float)
    rest = np.delete(ours, seen).astype(float)
    low, high = kl_bounds(top, ours[seen].astype(float), rest, float(np.exp(cap)))
    best = np.argsort(-ours)[: len(step.top)]
    return {
        "text": bytes.fromhex(step.token).decode("utf-8", "replace"),
        "bytes": len(step.token) // 2,
        "nll_reference": -step.logprob,
        "nll": -float(ours[token]),
        "same_top": int(ours.argmax()) == vocabulary.get(bytes.fromhex(step.top[0][0])),
        "overlap": len({*best.tolist()} & {*known}) / len(step.top),
        "kl_low": low,
        "kl_high": high,
    }
