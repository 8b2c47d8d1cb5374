"""What an experiment gave: its verdicts, its tables, and the files that are handed on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.files import write_table
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import compare, verdict
from dfqs_nb.routing.loads import Load, Text, UnderLoad, judge_loads, load_rows, load_table
from dfqs_nb.routing.placement import expert_bytes, placement, write_profile
from dfqs_nb.routing.plan import IDENTICAL, Condition
from dfqs_nb.routing.profile import Profile, profile_of
from dfqs_nb.routing.trace import Trace, export
from dfqs_nb.stats import clopper_pearson

if TYPE_CHECKING:
    import pandas as pd

EXTREME_TOKENS = 8192  # DFQS looks at long contexts from 8K on; "extreme token pressure" is not below


@dataclass(frozen=True)
class Experiment:
    """What every condition gave, and what it means.

    Attributes:
        path, settings: the model's file, and the reference's settings.
        planned, status: the conditions, and how each ended, by its name.
        traces: by the condition's name; ``n_made`` of them were recorded now.
        texts: the short ones.
        plan: what was run, in a sentence.
    """

    path: Path
    settings: OpenSettings
    planned: Sequence[Condition] = field(repr=False)
    traces: dict[str, Trace] = field(repr=False)
    status: dict[str, str] = field(repr=False)
    n_made: int
    texts: Sequence[Text] = field(repr=False)
    plan: str

    @property
    def n_reused(self) -> int:
        """Traces kept from earlier."""
        return len(self.traces) - self.n_made

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a comparison; see `verdict.comparison_table`."""
        return verdict.comparison_table(self.planned, self.traces, self.status)

    @cached_property
    def loads(self) -> dict[str, Load]:
        """Of the runs over the short texts, by the condition's name."""
        return {c.name: c.load for c in self.planned if c.load and c.kind in ("alone", "load")}

    # ---- verdicts ----

    @property
    def reference(self) -> Trace:
        """The run that all others are compared with, directly or through another."""
        return self.traces["prefill"]

    @cached_property
    def verdict(self) -> verdict.Determinism:
        """Whether identical conditions gave identical choices."""
        return verdict.judge(self.table)

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
        failed = [f"{n}: {self.status[n]}" for n in self.loads if self.status[n].startswith("failed")]
        return judge_loads(self.load_rows, self.verdict.passed, failed)

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the SHALL: repetitions are equal, and no load changed a choice."""
        return self.verdict.passed and not self.under_load.changed_at and not self.under_load.failed

    def judged(self) -> dict[str, Any]:
        """The verdict for the stage file: on repetitions, and on the loads, by which the SHALL is judged."""
        load = self.under_load
        passed = None if load.level == "not judged" else load.passed
        facts = {**vars(self.verdict), "load_passed": passed, "load_sentence": load.sentence}
        under_load = {**vars(load), **load.counts}
        del under_load["counts"]
        loads = self.load_table().to_dict("records")
        return {**facts, "under_load": under_load, "loads": loads, "left_out": self.left_out}

    @property
    def left_out(self) -> list[str]:
        """Runs that did not fit into the budget."""
        return [name for name, how in self.status.items() if how.startswith("left out")]

    @cached_property
    def advice(self) -> list[str]:
        """What to fix in order to reproduce a run; see `verdict.advice`."""
        return verdict.advice(self.table)

    def conclusions(self) -> list[str]:
        """What this experiment showed, in sentences made from its counts."""
        ranked = verdict.sensitivities(self.table)
        runtime = ranked[ranked["kind"] != "weights"]
        routed = self.reference.routed
        n_moved = int((runtime["n_differ" if routed else "logit_drift"] > 0).sum())
        what = "an expert choice" if routed else "a logit"
        moved = f"{n_moved} of {len(runtime)} changes of settings changed {what}."
        lines = [self.under_load.sentence, self.verdict.text]
        lines.append(moved if len(runtime) else "No change of settings was tried.")
        one_cache = self.traces.get("alone, one cache")
        if one_cache is not None and one_cache.conditions["rule"] != "simple":
            lines.append("llama.cpp keeps a cache a sequence here, even if asked for one.")
        if n := len(self.left_out):
            names = "; ".join(self.left_out[:8])
            lines.append(f"Left out to fit into the budget: {n} runs ({names}{'; ...' if n > 8 else ''}).")
        if len(flipped := self.flips()):
            typical, close = self.margins()["margin"].median(), flipped["margin"].median()
            lines.append(f"The median margin is {typical:.2g}, and {close:.2g} where a choice flipped.")
        return lines

    def claims(self) -> pd.DataFrame:
        """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order."""
        import pandas as pd

        rows = [
            ("routing stable", *verdict.stable(verdict.sensitivities(self.table))),
            ("deterministic execution", *verdict.deterministic(self.verdict)),
            ("routing variance grows under extreme token pressure", *self._pressure()),
        ]
        return pd.DataFrame(rows, columns=["claim", "status", "evidence"])

    def _pressure(self) -> tuple[str, str]:
        """Flips in the last against the first quarter of the text, pooled over the changes of settings."""
        n = self.reference.n_tokens
        stretches = self._stretches([round(n * i / 4) for i in range(5)])
        (early, n_early), (late, n_late) = stretches[["n_differ", "n_choices"]].iloc[[0, -1]].to_numpy(int)
        if not n_early:
            why = "no change of settings was tried" if self.reference.routed else "no routed experts"
            return "not testable here", why
        seen = (
            f"{early:,} of {n_early:,} choices flip in the first quarter, {late:,} of {n_late:,} in the last,"
            f" over {n:,} tokens"
        )
        if n < EXTREME_TOKENS:
            return "not testable here", f"{seen}; extreme begins at {EXTREME_TOKENS:,} tokens"
        grows = clopper_pearson(late, n_late)[0] > clopper_pearson(early, n_early)[1]
        return ("confirmed" if grows else "contradicted"), seen

    # ---- settings ----

    def _pairs(self) -> list[tuple[Any, Trace, Trace]]:
        """Row of the table, reference and trace, of every change of a setting of the runtime."""
        rows = verdict.sensitivities(self.table)
        runtime = rows[rows["kind"] != "weights"].itertuples()
        return [(row, self.traces[row.against], self.traces[row.condition]) for row in runtime]

    def agreement(self) -> pd.DataFrame:
        """Share of identical sets: a row a condition, as ranked, a column a layer, hash layers included."""
        import pandas as pd

        done = self.table[self.table["status"] == "done"]
        repeats = done[(done["kind"] == IDENTICAL) & (done["against"] != "alone")]  # "alone": other texts
        ranked = [*repeats["condition"], *verdict.sensitivities(self.table)["condition"][::-1]]
        against = dict(zip(done["condition"], done["against"], strict=True))
        shares = {
            name: 1 - compare.differences(self.traces[against[name]], self.traces[name]).mean(axis=0)
            for name in ranked
        }
        return pd.DataFrame(shares, index=self.reference.layers).T

    def flips(self) -> pd.DataFrame:
        """Flips under changes of settings: ``condition``, ``kind``, ``token``, ``layer``, ``margin``."""
        import pandas as pd

        parts = []
        for row, a, b in self._pairs():
            tokens, columns = np.nonzero(compare.differences(a, b))
            places = {"token": tokens, "layer": a.layers[columns], "margin": a.margin[tokens, columns]}
            parts.append(pd.DataFrame({"condition": row.condition, "kind": row.kind, **places}))
        return _joined(parts, ["condition", "kind", "token", "layer", "margin"])

    def drifts(self) -> pd.DataFrame:
        """Every token under every change of runtime settings that moved its logits.

        Columns ``condition``, ``token``, ``drift`` and ``flips`` (layers whose expert set differs).
        """
        import pandas as pd

        parts = []
        for row, a, b in self._pairs():
            flipped = compare.differences(a, b)[:, ~a.hashed].sum(axis=1)
            moved = pd.DataFrame({"drift": compare.drifts(a, b), "flips": flipped}).rename_axis("token")
            parts.append(moved[moved["drift"] > 0].reset_index().assign(condition=row.condition))
        return _joined(parts, ["condition", "token", "drift", "flips"])

    def margins(self) -> pd.DataFrame:
        """The margin of every choice of the reference: ``token``, ``layer``, ``margin``.

        Layers that route by hash have none, and neither has a layer whose experts are all used.
        """
        import pandas as pd

        trace, scored = self.reference, ~self.reference.hashed
        names = ["token", "layer"]
        index = pd.MultiIndex.from_product([range(trace.n_tokens), trace.layers[scored]], names=names)
        table = pd.DataFrame({"margin": trace.margin[:, scored].ravel()}, index).reset_index()
        return table[np.isfinite(table["margin"])]

    def positions(self) -> pd.DataFrame:
        """Flips along the context, pooled over the changes of runtime settings; a row for each octave.

        Columns ``start``, ``end``, ``n`` choices, ``differ``, ``rate`` with ``rate_low`` and ``rate_high``,
        and the reference's ``margin_p5``, ``margin_median``, ``margin_p95``.
        """
        n = self.reference.n_tokens
        table = self._stretches([0, *(2**i for i in range(5, n.bit_length()) if 2**i < n), n])
        return verdict.with_rates(table).rename(columns={"n_choices": "n", "n_differ": "differ"})

    def _stretches(self, edges: list[int]) -> pd.DataFrame:
        import pandas as pd

        pairs, scored = self._pairs(), ~self.reference.hashed
        margins, rows = self.reference.margin[:, scored], []
        flips = sum((compare.differences(a, b)[:, scored] for _, a, b in pairs), np.zeros(margins.shape, int))
        for start, end in pairwise(edges):
            near = margins[start:end]
            quantiles = np.quantile(near, [0.05, 0.5, 0.95]) if near.size else [np.nan] * 3
            rows.append((start, end, near.size * len(pairs), int(flips[start:end].sum()), *quantiles))
        names = ["start", "end", "n_choices", "n_differ", "margin_p5", "margin_median", "margin_p95"]
        return pd.DataFrame(rows, columns=names)

    # ---- profile, placement, another quantization ----

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

    def across(self) -> tuple[pd.DataFrame, compare.Divergence | None]:
        """Another quantization by layer, and whether changed experts predict changed predictions."""
        import pandas as pd

        for row in self.table[self.table["kind"] == "weights"].itertuples():
            if row.status == "done" and self.reference.routed:
                a, b = self.reference, self.traces[row.condition]
                return compare.across(a, b).assign(condition=row.condition), compare.divergence(a, b)
        return pd.DataFrame(), None

    # ---- files ----

    def export(self, path: str | Path) -> Path:
        """Write the traces of text, profile and loads as one CSV; see `trace.export` and `trace.COLUMNS`."""
        names = [name for name in ("prefill", "profile", *self.loads) if name in self.traces]
        return export((self.traces[name] for name in names), path)

    def write_tables(self, folder: str | Path) -> list[Path]:
        """Write the tables ``routing_*.csv``, and the profile as JSON; return their paths."""
        tables = {
            "conditions": self.table,
            "loads": self.load_table(),
            "claims": self.claims(),
            "layers": self.agreement().rename_axis("condition").reset_index(),
            "positions": self.positions(),
            "flips": self.flips(),
            "usage": compare.usage(self.reference),
            "across": self.across()[0],
            "placement": self.placement(),
        }
        written = []
        if profile := self.profile:
            tables |= {
                "domains": profile.usage(),
                **{
                    name: getattr(profile, name)()
                    for name in ("specialization", "pairs", "drift", "coverage")
                },
                "balance": profile.layers(),
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
