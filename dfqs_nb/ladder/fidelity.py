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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, BaseModel, ValidationError

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file
from dfqs_nb.core.journal import Journal
from dfqs_nb.core.paths import tilde
from dfqs_nb.ladder.divergence import Array, kl_bounds, log_probs
from dfqs_nb.ladder.measure import part_of
from dfqs_nb.llama.generate import chat_prompt
from dfqs_nb.llama.model import Model
from dfqs_nb.scores import ItemSet
from dfqs_nb.stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

FORMAT: Literal["dfqs reference record 1"] = "dfqs reference record 1"
BYTE = 6  # of the header's token types
LEAST_ALIGNED = 0.9  # of the prompts must have the record's tokens, or nothing is said token by token


class RecordError(DfqsError):
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
    """A prompt and how the original goes on. ``chat``: the prompt is a user's message, not a plain text."""

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
        number, lines = 1, []
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
            raise RecordError(f"line {number}: {what}", where=tilde(path), hint=hint) from error
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is empty"
            hint = "make one with: dfqs-nb record MODEL -o record.jsonl"
            raise RecordError(f"cannot be read ({why})", where=tilde(path), hint=hint) from error
        if not lines:
            raise RecordError("the record holds no prompt", where=tilde(path), hint="make it again")
        return cls(head, lines)


# ---- making a record ----


def load_prompts(source: str, limit: int = 0, *, chat: bool = True) -> dict[str, tuple[str, bool]]:
    """Prompts by id, each with whether it is a chat message: of a question set, or the lines of a text file.

    ``limit``: the most prompts, spread over a set's families; 0: all. A `PromptError` or `RecordError`: there
    is no such set, or the file cannot be read.
    """
    if Path(source).suffix == ".txt":
        try:
            lines = [line for line in Path(source).read_text(encoding="utf-8").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            hint = "give a UTF-8 file with a prompt on each line"
            raise RecordError(f"cannot be read ({error})", where=tilde(source), hint=hint) from error
        return {str(number): (line, chat) for number, line in enumerate(lines[: limit or None], 1)}
    questions = part_of(ItemSet.load(source), limit)
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
    """Record how a model continues each prompt. The same call resumes a killed run.

    Args:
        prompts: by id, the text and whether it is a chat message.
        continue_: gives the steps of a prompt: `continuation` of a model in this process, or of a server.
        conditions: what the continuations depend on beside the fields of `Head`.
        facts: the other fields of `Head`.
    """
    path = Path(path)
    head = Head(record=FORMAT, date=date.today().isoformat(), top_k=top_k, **facts)
    key = head.model_dump(exclude={"date"}) | dict(conditions or {})
    journal = Journal(path.with_name(f".{path.name}.journal"), key)
    for name, (text, chat) in tqdm(prompts.items(), desc="prompts", leave=False):
        if name not in journal or (journal[name]["prompt"], journal[name]["chat"]) != (text, chat):
            steps = [Step.model_validate(step).model_dump() for step in continue_(text, chat)]
            if steps:  # a model that ends at once predicted nothing
                journal.add(name, prompt=text, chat=chat, steps=steps)
    rows = [row for row in journal.rows() if row["id"] in prompts]
    if not rows:
        what = "every answer ended at once, or began with a control token, such as a mark of thinking"
        raise RecordError(what, where=head.source, hint="give other prompts, or plain texts with --plain")
    with whole_file(path) as file:
        for row in [head.model_dump(), *rows]:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    journal.path.unlink(missing_ok=True)
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


# ---- comparing a model with it ----


@dataclass(frozen=True)
class Fidelity:
    """How a model predicts what a record holds.

    ``tokens``: a row a token: ``id``, ``position`` (from 0), ``text``, ``nll_reference``, ``nll`` (nats),
    ``same_top``, ``overlap`` (share of the reference's top k in ours), ``kl_low``, ``kl_high``. ``texts``: a
    row a prompt: ``id``, ``bytes``, ``nll_reference``, ``nll``, ``aligned`` (it has the record's tokens).
    """

    head: Head
    tokens: pd.DataFrame = field(repr=False)
    texts: pd.DataFrame = field(repr=False)

    @property
    def aligned(self) -> bool:
        """Whether enough prompts have the record's tokens to compare token by token."""
        return bool(self.texts["aligned"].mean() >= LEAST_ALIGNED)

    def summary(self) -> dict[str, Any]:
        """Means with 95 % intervals (bootstrap over prompts; NaN for fewer than 6), for a table or JSON."""
        bits = (self.texts["nll"] - self.texts["nll_reference"]) / self.texts["bytes"] / np.log(2)
        columns: dict[str, Any] = {"extra_bits_per_byte": bits}
        if self.aligned:
            means = self.tokens.groupby("id")[["same_top", "overlap", "kl_low", "kl_high"]].mean()
            columns |= {name: means[name] for name in means}
        rows = {}
        for name, values in columns.items():
            low, high = mean_interval(values.to_numpy(float))
            rows[name] = {"mean": float(values.mean()), "low": low, "high": high}
        return {"prompts": len(self.texts), "tokens": len(self.tokens), "aligned": self.aligned, **rows}

    @property
    def sentence(self) -> str:
        """The result for people."""
        facts = self.summary()
        extra = facts["extra_bits_per_byte"]
        text = (
            f"against {self.head.source}, {facts['prompts']} prompts: the original's answers cost "
            f"{extra['mean']:+.4f} bits a byte more here{_interval(extra, '.4f')}"
        )
        if not self.aligned:
            share = 1 - self.texts["aligned"].mean()
            return (
                f"{text}. {share:.0%} of the answers split into other tokens, so the tokenizers differ: "
                "top-token agreement and KL divergence are not measured"
            )
        same, low, high = facts["same_top"], facts["kl_low"], facts["kl_high"]
        return (
            f"{text}; {facts['tokens']:,} tokens: same likeliest token {same['mean']:.1%}"
            f"{_interval(same, '.1%')}; KL divergence between {low['mean']:.4f}{_interval(low, '.4f')} and "
            f"{high['mean']:.4f} nats{_interval(high, '.4f')} (the record holds the original's "
            f"{self.head.top_k} likeliest tokens)"
        )

    def by_position(self, n_bins: int = 4) -> pd.DataFrame:
        """Means by stretch of the answers: ``position``, ``n``, ``same_top``, ``kl_low``, ``kl_high``."""
        n = int(self.tokens["position"].max()) + 1
        n_bins = min(n_bins, n)
        groups = self.tokens.groupby(self.tokens["position"] * n_bins // n)
        table = groups[["same_top", "kl_low", "kl_high"]].mean()
        edges = [(-(-i * n // n_bins) + 1, -(-(i + 1) * n // n_bins)) for i in table.index]
        table.insert(0, "position", [f"{first} to {last}" for first, last in edges])
        table.insert(1, "n", groups.size())
        return table.reset_index(drop=True)


def _interval(row: Mapping[str, float], form: str) -> str:
    return "" if np.isnan(row["low"]) else f" ({row['low']:{form}} to {row['high']:{form}})"


def compare_record(model: Model, record: Record) -> Fidelity:
    """Predict a record's continuations with an open model.

    Raises:
        RecordError: no prompt fits into the context, or a chat's record meets a model without a template.
        ModelError: the model's chat template refuses a prompt. DecodeError: llama.cpp fails.
    """
    import pandas as pd

    if any(line.chat for line in record.lines) and not model.header.text("tokenizer.chat_template"):
        hint = "record plain texts: dfqs-nb record MODEL --plain -o record.jsonl"
        raise RecordError("the record holds chats, the model has no template", where=model.path, hint=hint)
    vocabulary = _vocabulary(model)
    tokens: list[dict[str, Any]] = []
    texts = []
    for line in tqdm(record.lines, desc="prompts", leave=False):
        prompt = prompt_tokens(model, line.prompt, line.chat)
        pieces = [bytes.fromhex(step.token) for step in line.steps]
        ids = [vocabulary.get(piece, -1) for piece in pieces]
        aligned = -1 not in ids
        if not aligned:
            ids = model.tokenize(b"".join(pieces).decode("utf-8", "replace"), special=False)
        if not ids or len(prompt) + len(ids) > model.settings.n_ctx:
            continue  # shown by the number of prompts
        rows = _predictions(model, prompt, ids)
        nll = -rows[np.arange(len(ids)), ids]
        text = {"id": line.id, "bytes": len(b"".join(pieces)), "nll": float(nll.sum()), "aligned": aligned}
        texts.append(text | {"nll_reference": -sum(step.logprob for step in line.steps)})
        for at, step in enumerate(line.steps if aligned else ()):
            tokens.append({"id": line.id, "position": at, **_row(step, rows[at], ids[at], vocabulary)})
    if not texts:
        hint = f"open the model with a larger context than {model.settings.n_ctx:,} tokens: --n-ctx"
        raise RecordError("no prompt of the record fits", where=model.path, hint=hint)
    names = ["id", "position", "text", "nll_reference", "nll", "same_top", "overlap", "kl_low", "kl_high"]
    return Fidelity(record.head, pd.DataFrame(tokens, columns=names), pd.DataFrame(texts))


def _vocabulary(model: Model) -> dict[bytes, int]:
    """Token ids by their bytes; the first of equals, and none for control tokens, which have no bytes.

    A token that stands for a byte comes after a text of the same byte: no model with both predicts it.
    """
    types = model.header.get("tokenizer.ggml.token_type") or []
    ids: dict[bytes, int] = {}
    raw: dict[bytes, int] = {}
    for token in range(model.n_vocab):
        if piece := model.token_bytes(token):
            is_byte = token < len(types) and types[token] == BYTE
            (raw if is_byte else ids).setdefault(piece, token)
    return raw | ids


def _predictions(model: Model, prompt: Sequence[int], ids: Sequence[int]) -> Array:
    """Log-probabilities before each token of ``ids``, float32 ``(n, n_vocab)``."""
    model.clear()
    if len(prompt) > 1:
        model.decode(prompt[:-1])
    return np.concatenate([log_probs(rows) for rows in model.logits([prompt[-1], *ids[:-1]])])


def _row(step: Step, ours: Array, token: int, vocabulary: Mapping[bytes, int]) -> dict[str, Any]:
    """One token of the table `Fidelity.tokens`."""
    known: dict[int, float] = {}
    cap = step.top[-1][1]
    for text, value in step.top:
        index = vocabulary.get(bytes.fromhex(text), -1)
        if index < 0 or index in known:  # a control token, or a second one of the same bytes: unseen
            cap = max(cap, value)
        else:
            known[index] = value
    seen, top = np.fromiter(known, int), np.fromiter(known.values(), float)
    rest = np.delete(ours, seen).astype(float)
    low, high = kl_bounds(top, ours[seen].astype(float), rest, float(np.exp(cap)))
    n_best = min(len(step.top), len(ours))
    best = set(np.argpartition(-ours, n_best - 1)[:n_best].tolist())
    return {
        "text": bytes.fromhex(step.token).decode("utf-8", "replace"),
        "nll_reference": -step.logprob,
        "nll": -float(ours[token]),
        "same_top": int(ours.argmax()) == vocabulary.get(bytes.fromhex(step.top[0][0])),
        "overlap": len(best & set(seen.tolist())) / len(step.top),
        "kl_low": low,
        "kl_high": high,
    }
