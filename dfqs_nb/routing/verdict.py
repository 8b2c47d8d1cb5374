"""What the comparisons mean: the SHALL judged, sensitivities ranked, advice, and the card's statements.

DFQS 1.0: "routing remains deterministic under standard inference loads". Two things are judged: the same run
again, in the same process and in a fresh one (`Determinism`), and the same text beside others in one batch
(`loads.UnderLoad`). What differs when a setting differs is sensitivity, not failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.files import write_table
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.compare import (
    Divergence,
    across,
    by_layer,
    by_position,
    by_token,
    compare,
    divergence,
    flips,
    load_entropy,
    usage,
)
from dfqs_nb.routing.loads import Load, Text, UnderLoad, judge_loads, load_rows, load_table, part
from dfqs_nb.routing.placement import expert_bytes, placement, write_profile
from dfqs_nb.routing.plan import IDENTICAL, Condition
from dfqs_nb.routing.profile import Profile, profile_of
from dfqs_nb.routing.recorder import RoutingError
from dfqs_nb.routing.trace import Trace, export
from dfqs_nb.stats import clopper_pearson

if TYPE_CHECKING:
    import pandas as pd

STABLE_SHARE = 0.99  # identical sets under every setting of the runtime, for "routing stable"
EXTREME_TOKENS = 8192  # DFQS looks at long contexts from 8K on; "extreme token pressure" is not below
FIXES = {
    "threads": "n_threads and n_threads_batch",
    "batch": "n_batch and n_ubatch",
    "phase": "which tokens are prefilled and which are decoded",
    "state": "whether a saved state is restored",
    "attention": "flash_attn",
    "cache": "type_k and type_v",
    "context": "n_ctx",
    "buffers": "use_extra_bufts",
    "weights": "the quantization",
}


def at_most(n_events: int, n: int) -> float:
    """The exact 95 % upper bound on a rate, one-sided (Clopper and Pearson 1934); no trials bound nothing.

    >>> round(at_most(0, 4), 3), round(at_most(0, 1152), 4), at_most(0, 0)
    (0.527, 0.0026, 1.0)
    """
    return clopper_pearson(n_events, n, level=0.90)[1] if n else 1.0


@dataclass(frozen=True)
class Determinism:
    """Whether routing was deterministic under identical conditions.

    Attributes:
        passed: no expert set differed, and every repetition ran.
        routed: whether the model has routers that score; else only logits are judged.
        n_tokens, n_layers, n_runs: different tokens, the layers that score, and repeated runs: one a
            repetition of the text, and one for each short text.
        n_choices: tokens x layers, over all repetitions.
        n_differ: of these, how many chose another set.
        n_runs_differ: runs in which anything judged differed (sets; of a dense model, logits).
        upper_bound: 95 % upper bound on the rate of such choices if choices were independent, which those of
            one text are not: the bound on runs is the one to quote.
        runs_upper_bound: 95 % upper bound on the rate of runs that differ.
        logits_equal: share of tokens whose logits were equal bit for bit.
        same_output: whether every greedy continuation was equal.
        failed_runs: repetitions that did not run.
        load_passed, load_sentence: whether routing stays the same beside others in one batch, which is what
            DFQS's "under standard inference loads" is judged by; None and "" where that was not judged.
    """

    passed: bool
    routed: bool
    n_tokens: int
    n_layers: int
    n_runs: int
    n_choices: int
    n_differ: int
    n_runs_differ: int
    upper_bound: float
    runs_upper_bound: float
    logits_equal: float
    same_output: bool
    failed_runs: tuple[str, ...]
    load_passed: bool | None = None
    load_sentence: str = ""

    @property
    def text(self) -> str:
        """The verdict in a sentence or two."""
        word = "PASS" if self.passed else "FAIL"
        if not self.n_runs and not self.failed_runs:
            return "Not judged: no repetition fits into the budget."
        if self.failed_runs:
            return f"{word}: {len(self.failed_runs)} of the repetitions did not run ({self.failed_runs[0]})."
        bound = f"95 % upper bound: {self.runs_upper_bound:.1%} of repeated runs"
        if not self.routed:
            return (
                f"{word}: dense model, nothing to route; the logits of {self.logits_equal:.2%} "
                f"of {self.n_tokens:,} tokens were equal bit for bit over {self.n_runs} repeated runs. "
                f"{bound}."
            )
        return (
            f"{word}: {self.n_differ:,} of {self.n_choices:,} choices differed under identical conditions, "
            f"in {self.n_runs_differ} of {self.n_runs} repeated runs ({self.n_tokens:,} tokens x "
            f"{self.n_layers} layers). {bound}."
        )


def comparison_table(
    planned: Sequence[Condition], traces: Mapping[str, Trace], status: Mapping[str, str]
) -> pd.DataFrame:
    """One row a condition that has a reference; its numbers are missing where its run failed.

    Columns: ``condition``, ``kind``, ``against``, ``status``, ``n_runs`` and ``n_runs_differ`` (each short
    text is a run), and the fields of `TraceDifference`.
    """
    import pandas as pd

    rows = []
    for condition in planned:
        if condition.against:
            row = {"condition": condition.name, "kind": condition.kind, "against": condition.against}
            row["status"] = status[condition.name]
            if condition.name in traces and condition.against in traces:
                row |= _compared(traces[condition.against], traces[condition.name])
            rows.append(row)
    table = pd.DataFrame(rows)
    counts = [name for name in table if str(name).startswith(("n_", "first_"))]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _compared(a: Trace, b: Trace) -> dict[str, Any]:
    try:
        whole = compare(a, b)
        several = a.output.ndim == 2
        each = [compare(part(a, i), part(b, i)) for i in range(len(a.output))] if several else [whole]
    except RoutingError as error:  # another model than the reference, not another quantization of it
        return {"status": f"not comparable: {error.what}"}
    n_differ = sum(bool(one.n_differ or (not one.n_choices and one.logits_equal < 1)) for one in each)
    return asdict(whole) | {"n_runs": len(each), "n_runs_differ": n_differ}


def judge(table: pd.DataFrame) -> Determinism:
    """The verdict on the table of an experiment.

    A dense model passes when its logits were equal bit for bit.
    """
    repeats = table[table["kind"] == IDENTICAL]
    done, broken = (repeats[(repeats["status"] == "done") == ran] for ran in (True, False))
    skipped = broken["status"].astype(str).str.startswith("left out")
    failed = tuple(f"{row.condition}: {row.status}" for row in broken[~skipped].itertuples())
    sums = {name: int(done[name].sum()) for name in ("n_choices", "n_differ", "n_runs", "n_runs_differ")}
    first = done.drop_duplicates("n_tokens")  # the text, and the short texts
    n_tokens = int(first["n_tokens"].sum())
    each = int(first["n_choices"].sum())
    return Determinism(
        passed=bool(len(done)) and not failed and not sums["n_runs_differ"],
        routed=sums["n_choices"] > 0,
        n_tokens=n_tokens,
        n_layers=int(done["n_layers"].max()) if len(done) else 0,
        upper_bound=at_most(min(sums["n_differ"], each), each),
        runs_upper_bound=at_most(sums["n_runs_differ"], sums["n_runs"]),
        logits_equal=float(done["logits_equal"].mean()) if len(done) else 0.0,
        same_output=not _changed(done["same_output"]),
        failed_runs=failed,
        n_choices=sums["n_choices"],
        n_differ=sums["n_differ"],
        n_runs=sums["n_runs"],
        n_runs_differ=sums["n_runs_differ"],
    )


def _changed(same_output: Iterable[Any]) -> bool:
    """Whether a greedy answer changed; runs without answers (None) do not count."""
    return any(same is not None and same == False for same in same_output)  # noqa: E712 - numpy's too


def with_rates(table: pd.DataFrame) -> pd.DataFrame:
    """The table with ``rate`` of different sets and its exact 95 % interval ``rate_low``, ``rate_high``."""
    counts = [(int(x), int(n)) for x, n in zip(table["n_differ"], table["n_choices"], strict=True)]
    limits = [clopper_pearson(x, n) if n else (math.nan, math.nan) for x, n in counts]
    return table.assign(
        rate=[x / n if n else math.nan for x, n in counts],
        rate_low=[low for low, _ in limits],
        rate_high=[high for _, high in limits],
    )


def sensitivities(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions that change a setting, most different first; columns as in `with_rates`."""
    changed = with_rates(table[(table["kind"] != IDENTICAL) & (table["status"] == "done")])
    return changed.sort_values(["rate", "logit_drift"], ascending=False, kind="stable", ignore_index=True)


def advice(table: pd.DataFrame) -> list[str]:
    """What to fix in order to reproduce a run, one sentence a kind of setting, most important first."""
    groups = sensitivities(table).groupby("kind", sort=False)
    return [_advice_on(str(kind), rows) for kind, rows in groups]


def _advice_on(kind: str, rows: pd.DataFrame) -> str:
    worst, what = rows.iloc[0], FIXES.get(kind, kind)
    differ, n, name = int(worst["n_differ"]), int(worst["n_choices"]), worst["condition"]
    output = f"the greedy answer {'changed too' if _changed(rows['same_output']) else 'stayed'}"
    if kind == "weights":
        found = f"chose other experts in {differ:,} of {n:,} choices ({differ / n:.1%})" if n else output
        return f"Compare runs of one quantization only: {name.removeprefix('weights: ')} {found}."
    if differ:
        return (
            f'Fix {what}: "{name}" changed {differ:,} of {n:,} choices ({differ / n:.2%}), '
            f"at margins up to {worst['margin_differ']:.2g}; {output}."
        )
    if (rows["logits_equal"] < 1).any():
        still, drift = "no choice changed, but logits" if n else "logits", rows["logit_drift"].max()
        return f"Fix {what} for equal logits: {still} moved by up to {drift:.2g}; {output}."
    times = f"{len(rows)} comparison{'s' if len(rows) > 1 else ''}"
    return f"Free: {what}. Logits were equal bit for bit in {times}."


# ---- an experiment, and its tables ----


@dataclass(frozen=True)
class Experiment:
    """What every condition gave, and what it means.

    Attributes:
        tokens: the text, int32 ``(n,)``.
        table: one row a comparison: ``condition``, ``kind``, ``against``, ``status`` (``done``, or why not),
            and the fields of `TraceDifference`.
        traces: by the condition's name.
        settings: the reference's settings.
        n_made, n_reused: traces recorded now, and kept from earlier.
        loads, texts: of the runs over the short texts.
        status: how each condition ended, by its name.
        plan: what was run, in a sentence.
        path: the model's file.
    """

    tokens: np.ndarray = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    traces: dict[str, Trace] = field(repr=False)
    settings: OpenSettings
    n_made: int
    n_reused: int
    loads: dict[str, Load] = field(repr=False, default_factory=dict)
    texts: Sequence[Text] = field(repr=False, default=())
    status: dict[str, str] = field(repr=False, default_factory=dict)
    plan: str = ""
    path: Path = Path()

    @property
    def reference(self) -> Trace:
        """The run that all others are compared with, directly or through another."""
        return self.traces["prefill"]

    @cached_property
    def verdict(self) -> Determinism:
        """Whether identical conditions gave identical choices."""
        return judge(self.table)

    @cached_property
    def load_rows(self) -> pd.DataFrame:
        """One row a short text in a batch, against the same text alone; see `loads.load_rows`."""
        return load_rows(self.loads, self.traces, self.texts)

    def load_table(self) -> pd.DataFrame:
        """One row a load; see `loads.load_table`."""
        return load_table(self.load_rows) if len(self.load_rows) else self.load_rows

    @cached_property
    def under_load(self) -> UnderLoad:
        """Whether routing stays what it is alone when others share the batch."""
        failed = [
            f"{name}: {self.status[name]}" for name in self.loads if self.status[name].startswith("failed")
        ]
        return judge_loads(self.load_rows, self.verdict.passed, failed)

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the SHALL: repetitions are equal, and no load changed a choice."""
        return self.verdict.passed and not self.under_load.changed_at

    def judged(self) -> dict[str, Any]:
        """The verdict for the stage file: on repetitions, and on the loads, by which the SHALL is judged."""
        load = self.under_load
        passed = None if load.level == "not judged" else load.passed
        facts = {**vars(self.verdict), "load_passed": passed, "load_sentence": load.sentence}
        return {**facts, "under_load": asdict(load), "loads": self.load_table().to_dict("records")}

    @cached_property
    def advice(self) -> list[str]:
        """What to fix in order to reproduce a run; see `advice`."""
        return advice(self.table)

    def conclusions(self) -> list[str]:
        """What this experiment showed, in sentences made from its counts."""
        changed = sensitivities(self.table)
        runtime = changed[changed["kind"] != "weights"]
        moved = "n_differ" if self.reference.routed else "logit_drift"
        what = "an expert choice" if self.reference.routed else "a logit"
        lines = [
            self.under_load.sentence,
            self.verdict.text,
            f"{int((runtime[moved] > 0).sum())} of {len(runtime)} changes of settings changed {what}.",
        ]
        one_cache = self.traces.get("alone, one cache")
        if one_cache is not None and one_cache.conditions["rule"] != "simple":
            lines.append(
                "llama.cpp keeps a cache a sequence for this architecture even if one cache is asked for."
            )
        flipped = self.flips()
        if len(flipped):
            typical, close = self.margins()["margin"].median(), flipped["margin"].median()
            lines.append(f"The median margin is {typical:.2g}, and {close:.2g} where a choice flipped.")
        return lines

    def _pairs(self) -> list[tuple[Any, Trace, Trace]]:
        """Row of the table, reference and trace, of every change of a setting of the runtime."""
        rows = sensitivities(self.table)
        runtime = rows[rows["kind"] != "weights"].itertuples()
        return [(row, self.traces[row.against], self.traces[row.condition]) for row in runtime]

    def claims(self) -> pd.DataFrame:
        """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order."""
        import pandas as pd

        rows = [
            ("routing stable", *_stable(sensitivities(self.table))),
            ("deterministic execution", *_deterministic(self.verdict)),
            ("routing variance grows under extreme token pressure", *self._pressure()),
        ]
        return pd.DataFrame(rows, columns=["claim", "status", "evidence"])

    def _pressure(self) -> tuple[str, str]:
        """Flips in the last against the first quarter of the text, pooled over the changes of settings."""
        quarters = [round(len(self.tokens) * i / 4) for i in range(5)]
        pooled = self._pooled_positions(quarters)
        (early, n_early), (late, n_late) = (
            (int(pooled["n_differ"].iloc[at]), int(pooled["n_choices"].iloc[at])) for at in (0, -1)
        )
        if not n_early:
            return "not testable here", "no routed experts"
        seen = (
            f"{early:,} of {n_early:,} choices flip in the first quarter, {late:,} of {n_late:,} in "
            f"the last, over {len(self.tokens):,} tokens"
        )
        if len(self.tokens) < EXTREME_TOKENS:
            return "not testable here", f"{seen}; extreme begins at {EXTREME_TOKENS:,} tokens"
        grows = clopper_pearson(late, n_late)[0] > clopper_pearson(early, n_early)[1]
        return ("confirmed" if grows else "contradicted"), seen

    def agreement(self) -> pd.DataFrame:
        """Share of identical sets: a row a condition, as ranked, a column a layer, hash layers included."""
        import pandas as pd

        repeats = self.table[(self.table["kind"] == IDENTICAL) & (self.table["status"] == "done")]
        repeats = repeats[repeats["against"] != "alone"]  # of other texts, with other counts
        ranked = [*repeats["condition"], *sensitivities(self.table)["condition"][::-1]]
        against = dict(zip(self.table["condition"], self.table["against"], strict=True))
        rows = {
            name: by_layer(self.traces[against[name]], self.traces[name]).set_index("layer")[
                "share_identical"
            ]
            for name in ranked
        }
        return pd.DataFrame(rows).T

    def flips(self) -> pd.DataFrame:
        """Flips under changes of settings: ``condition``, ``kind``, ``token``, ``layer``, ``margin``."""
        parts = [flips(a, b).assign(condition=row.condition, kind=row.kind) for row, a, b in self._pairs()]
        return _joined(parts, ["condition", "kind", "token", "layer", "margin"])

    def margins(self) -> pd.DataFrame:
        """The margin of every choice of the reference: ``token``, ``layer``, ``margin``; no hash layers."""
        import pandas as pd

        trace = self.reference
        scored = trace.layers[~trace.hashed]
        token, layer = np.repeat(np.arange(trace.n_tokens), len(scored)), np.tile(scored, trace.n_tokens)
        values = trace.margin[:, ~trace.hashed].ravel()
        return pd.DataFrame({"token": token, "layer": layer, "margin": values})

    def positions(self) -> pd.DataFrame:
        """Flips along the context, pooled over the changes of runtime settings.

        One row a stretch, each twice as long as the one before: ``start``, ``end``, ``n`` choices,
        ``differ``, ``rate`` with ``rate_low`` and ``rate_high``, and the reference's margin
        (``margin_p5``, ``margin_median``, ``margin_p95``).
        """
        n = len(self.tokens)
        pooled = self._pooled_positions([0, *(2**i for i in range(5, n.bit_length()) if 2**i < n), n])
        return with_rates(pooled).rename(columns={"n_choices": "n", "n_differ": "differ"})

    def _pooled_positions(self, edges: list[int]) -> pd.DataFrame:
        parts = [by_position(a, b, edges) for _, a, b in self._pairs()]
        pooled = by_position(self.reference, self.reference, edges)
        counts = {
            "n_choices": sum((part["n"] for part in parts), start=0 * pooled["n"]),
            "n_differ": sum((part["differ"] for part in parts), start=0 * pooled["n"]),
        }
        return pooled.drop(columns=["n", "differ", "share_identical"]).assign(**counts)

    def drifts(self) -> pd.DataFrame:
        """Every token under every change of runtime settings that moved its logits.

        Columns ``condition``, ``token``, ``drift`` and ``flips`` (layers whose expert set differs).
        """
        parts = [by_token(a, b).assign(condition=row.condition) for row, a, b in self._pairs()]
        table = _joined(parts, ["condition", "token", "drift", "flips"])
        return table[table["drift"] > 0].reset_index(drop=True)

    @cached_property
    def profile(self) -> Profile | None:
        """What the routers prefer, over the short texts; None for a dense model, or where it did not run."""
        trace = self.traces.get("profile")
        return profile_of(trace) if trace is not None and trace.routed else None

    @cached_property
    def layer_bytes(self) -> np.ndarray:
        """Bytes of each layer's routed experts."""
        return expert_bytes(self.path, self.reference.layers)

    def placement(self) -> pd.DataFrame:
        """What to keep in fast memory for a budget; see `placement.placement`."""
        import pandas as pd

        return placement(self.profile, self.layer_bytes) if self.profile else pd.DataFrame()

    def across(self) -> tuple[pd.DataFrame, Divergence | None]:
        """Another quantization by layer, and whether changed experts predict changed predictions."""
        import pandas as pd

        for row in self.table[self.table["kind"] == "weights"].itertuples():
            if row.status == "done" and self.reference.routed:
                a, b = self.reference, self.traces[row.condition]
                return across(a, b).assign(condition=row.condition), divergence(a, b)
        return pd.DataFrame(), None

    def export(self, path: str | Path) -> Path:
        """Write every trace as one CSV; see `trace.export` and `trace.COLUMNS`."""
        runs = [
            self.reference,
            *(self.traces[name] for name in ("profile", *self.loads) if name in self.traces),
        ]
        return export(runs, path)

    def usage(self) -> pd.DataFrame:
        """How often the reference chose each expert; see `compare.usage`."""
        return usage(self.reference)

    def balance(self) -> pd.DataFrame:
        """How evenly the reference loads its experts; see `compare.load_entropy`."""
        return load_entropy(self.reference)

    def write_tables(self, folder: str | Path) -> list[Path]:
        """Write the tables ``routing_*.csv`` and return their paths."""
        tables = {
            "conditions": self.table,
            "loads": self.load_table(),
            "claims": self.claims(),
            "layers": self.agreement().rename_axis("condition").reset_index(),
            "positions": self.positions(),
            "flips": self.flips(),
            "usage": self.usage(),
            "across": self.across()[0],
            "placement": self.placement(),
        }
        written = []
        if profile := self.profile:
            tables |= {
                "domains": profile.usage(),
                "specialization": profile.specialization(),
                "pairs": profile.pairs(),
                "drift": profile.drift(),
                "balance": profile.layers(),
                "coverage": profile.coverage(),
                "experts_needed": profile.experts_needed().reset_index(),
                "cross_coverage": profile.cross_coverage().reset_index(),
            }
            written = [write_profile(Path(folder) / "routing_profile.json", profile, self.layer_bytes)]
        return written + [
            write_table(Path(folder) / f"routing_{name}.csv", table, index=False)
            for name, table in tables.items()
            if len(table.columns)
        ]


def _joined(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _stable(changed: pd.DataFrame) -> tuple[str, str]:
    """Judged over the settings of the runtime; another quantization is another model."""
    runtime = changed[(changed["kind"] != "weights") & (changed["n_choices"] > 0)]
    if not len(runtime):
        return "not testable here", "no routed experts"
    worst = runtime.iloc[0]
    share = float(runtime["share_identical"].min())
    status = "confirmed" if share >= STABLE_SHARE else "contradicted"
    return status, (
        f"at least {share:.2%} of expert sets stay the same under each of {len(runtime)} changes "
        f"of settings (least: {worst['condition']}; asked for {STABLE_SHARE:.0%})"
    )


def _deterministic(verdict: Determinism) -> tuple[str, str]:
    if not verdict.n_runs:
        return "not testable here", "no repetition ran"
    answers = "equal" if verdict.same_output else "differ"
    exact = verdict.passed and verdict.logits_equal == 1.0 and verdict.same_output
    choices = f"{verdict.n_differ:,} of {verdict.n_choices:,} choices differ; " if verdict.routed else ""
    return ("confirmed" if exact else "contradicted"), (
        f"under identical conditions {choices}logits of {verdict.logits_equal:.2%} of tokens are equal bit "
        f"for bit; answers {answers}"
    )
