"""Routing under load: the same texts alone in a context, and beside 1, 3 and 7 others in one batch.

DFQS 1.0 asks that routing stays deterministic "under standard inference loads". So every text is compared
with itself alone, in the same context, while other sequences are evaluated with it. Bounds are on batches and
on texts, because the choices of one text are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.prompts import PromptSet, load_prompts
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.compare import compare
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import N_BOOT, at_most, bootstrap_weights

if TYPE_CHECKING:
    import pandas as pd

N_SEQUENCES = 8  # of the largest load
N_SAME = 4  # texts that run beside copies of themselves
SUFFIXES = (".txt", ".md", ".py", ".c", ".cpp", ".js", ".java", ".rs", ".go", ".sql", ".tex")
MAX_CHARACTERS = 1 << 16  # read of each text of a folder


class Text(BaseModel):
    """A short text of one domain."""

    domain: str
    name: str
    text: str


class RoutingTexts(PromptSet):
    """The frozen texts of the routing experiment."""

    texts: list[Text]


def read_texts(folder: str | Path = "") -> list[Text]:
    """The workbook's 16 texts of five domains, or those of a folder: two or more, a subfolder a domain."""
    if not str(folder):
        return load_prompts("routing-texts", RoutingTexts).texts
    root, texts = Path(folder).expanduser(), list[Text]()
    for path in sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        if text := path.read_text(encoding="utf-8", errors="replace")[:MAX_CHARACTERS].strip():
            domain = path.parent.name if path.parent != root else path.stem
            # a name is a cluster of the statistics, and has to be unique
            texts.append(Text(domain=domain, name=path.relative_to(root).as_posix(), text=text))
    if len(texts) < 2:
        hint = f"put texts there ({', '.join(SUFFIXES)}), in a subfolder for each domain"
        raise DfqsError(f"{len(texts)} texts, at least 2 are needed", where=folder, hint=hint)
    return texts


@dataclass(frozen=True)
class Load:
    """Which texts one batch holds."""

    # alone, together (all are prefilled and decoded at once), mixed (they arrive one after another, so that
    # some decode while others are prefilled) or same text
    kind: str
    n_others: int  # sequences beside each one
    unified: bool  # they share one KV cache
    members: tuple[int, ...]  # text numbers, by the sequence that evaluates them
    arrivals: tuple[int, ...]  # the step in which each comes; of alone unused
    n_sequences: int  # that the context is made for
    n_prefill: int  # tokens of each text
    n_tokens: int  # of each text; those after the prefill are decoded

    @property
    def label(self) -> str:
        """The load for people, without its batch number."""
        if self.kind == "alone":
            return "alone"
        cache = "one cache" if self.unified else "a cache each"
        return f"{self.n_others} other{'s' if self.n_others > 1 else ''}, {self.kind}, {cache}"

    def settings(self, settings: OpenSettings, n_output: int) -> OpenSettings:
        """These settings with room for the sequences and their answers, which one batch can prefill."""
        each, n = -(-(self.n_tokens + n_output) // 256) * 256, self.n_sequences
        return replace(settings, n_ctx=each * n, n_batch=max(settings.n_batch, n * self.n_prefill))


def plan_loads(n_texts: int, n_tokens: int, n_prefill: int, seed: int = 0) -> Iterator[tuple[str, Load]]:
    """Names and loads, most important first; arrivals and company are drawn from the seed.

    >>> [name for name, _ in plan_loads(8, 32, 16)][:3]
    ['alone', '7 others, together, a cache each, batch 1', '7 others, mixed, a cache each, batch 1']
    """
    draw, every, sizes = np.random.default_rng(seed), tuple(range(n_texts)), (n_prefill, n_tokens)
    yield "alone", Load("alone", 0, False, every, (), N_SEQUENCES, *sizes)
    for n_others in (7, 1, 3):
        yield from _batches(draw, n_texts, n_others, False, *sizes)
    for unified in (False, True):
        if unified:
            yield "alone, one cache", Load("alone", 0, True, every, (), N_SEQUENCES, *sizes)
            yield from _batches(draw, n_texts, 7, True, *sizes)
        for text in sorted(draw.permutation(n_texts)[:N_SAME].tolist()):
            members, arrivals = (text,) * N_SEQUENCES, tuple(draw.integers(0, 4, N_SEQUENCES).tolist())
            load = Load("same text", 7, unified, members, arrivals, N_SEQUENCES, *sizes)
            yield f"{load.label}, text {text + 1}", load
    yield "alone, a context for one", Load("alone", 0, False, every, (), 1, *sizes)


def _batches(
    draw: np.random.Generator, n_texts: int, n_others: int, unified: bool, n_prefill: int, n_tokens: int
) -> Iterator[tuple[str, Load]]:
    """Every text in at least one batch of this size, together and mixed."""
    company, size = draw.permutation(n_texts).tolist(), n_others + 1
    company += company[: -len(company) % size]
    steps = np.linspace(0, max(2, n_tokens - n_prefill) - 1, size).astype(int)
    for number, start in enumerate(range(0, len(company), size), start=1):
        late = tuple(draw.permutation(steps).tolist())
        for kind, arrivals in (("together", (0,) * size), ("mixed", late)):
            members = tuple(company[start : start + size])
            load = Load(kind, n_others, unified, members, arrivals, N_SEQUENCES, n_prefill, n_tokens)
            yield f"{load.label}, batch {number}", load


def load_rows(loads: Mapping[str, Load], traces: Mapping[str, Trace], texts: Sequence[Text]) -> pd.DataFrame:
    """One row a sequence of a run: ``load``, ``n_others``, ``run``, ``text``, ``domain``, and a comparison.

    Each is compared with the same text alone in the same context (``alone``, or ``alone, one cache``).
    """
    import pandas as pd

    rows = []
    for name, load in loads.items():
        base = "alone, one cache" if load.unified and name != "alone, one cache" else "alone"
        if name == "alone" or name not in traces or base not in traces:
            continue
        about = {"load": load.label if load.kind != "alone" else name, "n_others": load.n_others, "run": name}
        for place, number in enumerate(load.members):
            text, change = texts[number], compare(traces[base].part(number), traces[name].part(place))
            rows.append({**about, "text": text.name, "domain": text.domain, **change})
    return pd.DataFrame(rows)


def load_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a load, in the order run: runs, texts and choices, how many differ, and bounds.

    Columns ``load``, ``n_others``, ``n_runs``, ``n_runs_differ``, ``runs_bound`` (95 %, one-sided, on the
    rate of runs that differ), ``n_texts``, ``n_texts_differ``, ``texts_bound`` (the same of texts),
    ``n_choices``, ``n_differ``, ``rate`` with a 95 % interval ``rate_low``, ``rate_high`` from drawing whole
    texts anew (NaN without a difference: then the bounds count), ``margin_differ`` (largest),
    ``logits_equal`` (share of tokens), ``logit_drift``, ``texts_equal`` (share of equal greedy texts).
    """
    import pandas as pd

    groups = rows.groupby("load", sort=False) if len(rows) else ()
    return pd.DataFrame([{"load": name, **_summary(group)} for name, group in groups])


def _summary(group: pd.DataFrame) -> dict[str, Any]:
    by_run = group.groupby("run")["n_differ"].sum() > 0
    by_text = group.groupby("text")[["n_differ", "n_choices"]].sum()
    n_changed = int((by_text["n_differ"] > 0).sum())
    low, high = cluster_interval(by_text["n_differ"].to_numpy(), by_text["n_choices"].to_numpy())
    n, n_differ = int(group["n_choices"].sum()), int(group["n_differ"].sum())
    return {
        "n_others": int(group["n_others"].iloc[0]),
        "n_runs": len(by_run),
        "n_runs_differ": int(by_run.sum()),
        "runs_bound": at_most(int(by_run.sum()), len(by_run)),
        "n_texts": len(by_text),
        "n_texts_differ": n_changed,
        "texts_bound": at_most(n_changed, len(by_text)),
        "n_choices": n,
        "n_differ": n_differ,
        "rate": n_differ / n if n else math.nan,
        "rate_low": low,
        "rate_high": high,
        "margin_differ": float(group["margin_differ"].max()),
        "logits_equal": float(group["logits_equal"].mean()),
        "logit_drift": float(group["logit_drift"].max()),
        "texts_equal": float(group["same_output"].dropna().astype(float).mean()),
    }


def cluster_interval(events: np.ndarray, trials: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a rate, from drawing whole texts anew; NaN without an event.

    >>> low, high = cluster_interval(np.array([0, 1, 0, 3, 0, 2]), np.array([50] * 6))
    >>> 0 < low < 6 / 300 < high < 0.05
    True
    """
    if not events.sum():
        return math.nan, math.nan
    weights = bootstrap_weights(len(events), N_BOOT, seed)
    low, high = np.quantile((weights @ events) / (weights @ trials), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class UnderLoad:
    """Whether routing stays the same as alone when other sequences share the batch."""

    passed: bool = False  # no expert set differed in any load, and all of them ran
    level: str = "not judged"  # or: under load, alone (only there), not (not even alone)
    changed_at: tuple[str, ...] = ()  # loads that change a choice, by their number of sequences
    failed: tuple[str, ...] = ()  # loads that did not run, with the reason
    counts: Mapping[str, Any] = field(default_factory=dict)  # columns of `load_table`, over all loads
    sentence: str = ""  # all this for people


def judge_loads(rows: pd.DataFrame, alone_passed: bool, failed: Sequence[str] = ()) -> UnderLoad:
    """The verdict on the rows of `load_rows` with company, and on the loads that ``failed``.

    ``alone_passed``: whether the same runs repeated themselves.
    """
    beside = rows[rows["n_others"] > 0] if len(rows) else rows
    if not len(beside) or not beside["n_choices"].sum():
        why = failed[0] if failed else "no routed experts" if len(beside) else "no load ran"
        return UnderLoad(failed=tuple(failed), sentence=f"Routing under load was not judged: {why}.")
    counts = {"load": "all", **_summary(beside), "n_domains": beside["domain"].nunique()}
    table = load_table(beside).sort_values("n_others", kind="stable")
    changed = tuple(table.loc[table["n_differ"] > 0, "load"])
    level = "not" if not alone_passed else "alone" if changed else "under load"
    verdict = UnderLoad(level == "under load" and not failed, level, changed, tuple(failed), counts)
    return replace(verdict, sentence=_sentence(verdict, beside, len(table)))


def _sentence(verdict: UnderLoad, beside: pd.DataFrame, n_loads: int) -> str:
    of, sizes = SimpleNamespace(**verdict.counts), [str(n) for n in sorted(beside["n_others"].unique())]
    company = " or ".join(filter(None, (", ".join(sizes[:-1]), sizes[-1])))
    what = f"with {of.n_texts} texts of {of.n_domains} domains beside {company} others in one batch"
    if verdict.changed_at:
        first = "Not deterministic, not even alone" if verdict.level == "not" else "Deterministic alone only"
        return (
            f"{first}: {what}, {of.n_differ:,} of {of.n_choices:,} choices differ from those alone "
            f"({of.rate:.2%}, 95 % interval over texts {of.rate_low:.2%} to {of.rate_high:.2%}), in "
            f"{of.n_runs_differ} of {of.n_runs} batches and {len(verdict.changed_at)} of {n_loads} loads; "
            f"the smallest is {verdict.changed_at[0]}."
        )
    first, missing = "Deterministic under load", ""
    if n := len(verdict.failed):
        first = "Not shown for all loads"
        missing = f" {n} load{'s' if n > 1 else ''} did not run ({verdict.failed[0]})."
    if verdict.level == "not":
        first = "Not deterministic alone"
    changed = int(beside["same_output"].eq(False).sum())  # None does not count
    return (
        f"{first}: {what}, 0 of {of.n_choices:,} choices differ from those alone. Logits move by up to "
        f"{of.logit_drift:.2g}, and {changed} of {len(beside)} greedy answers change. 95 % upper bounds: "
        f"{of.runs_bound:.1%} of batches (0 of {of.n_runs} differ), {of.texts_bound:.0%} of texts (0 of "
        f"{of.n_texts}).{missing}"
    )
