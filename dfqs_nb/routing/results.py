"""What an experiment gave: its verdicts, its tables, and the files that are handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core.files import write_table
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import compare, verdict
from dfqs_nb.routing.plan import IDENTICAL
from dfqs_nb.routing.profile import Profile, expert_bytes, profile_of
from dfqs_nb.routing.trace import Trace, export
from dfqs_nb.stats import clopper_pearson

EXTREME_TOKENS = 8192  # DFQS calls a context long from here on, and "extreme token pressure" is not below


@dataclass
class Experiment:
    """What every condition gave, and what it means.

    ``verdict``, ``under_load``: whether identical conditions gave identical choices, and whether others in
    the batch change them. ``load_table``, ``sensitivities``, ``advice``: see `verdict`. ``left_out``: what
    does not fit into the budget.
    """

    path: Path
    settings: OpenSettings  # the reference's
    traces: Mapping[str, Trace] = field(repr=False)  # by the condition's name
    status: Mapping[str, str] = field(repr=False)  # how each condition ended
    rows: pd.DataFrame = field(repr=False)  # see `verdict.compared`
    n_made: int  # traces recorded now; the others are kept from earlier
    plan: str  # what was run, in a sentence

    def __post_init__(self) -> None:
        """Judge; the run that all others are compared with, directly or through another, is ``reference``."""
        self.reference = self.traces["prefill"]
        self.load_table = verdict.load_table(self.rows)
        self.sensitivities = verdict.sensitivities(self.rows)
        self.verdict = verdict.judge(self.rows)
        self.under_load = verdict.judge_loads(self.rows, self.verdict.passed)
        self.advice = verdict.advice(self.sensitivities)
        self.left_out = [name for name, how in self.status.items() if how.startswith("left out")]
        # the changes of settings: the row, its two traces, and which choices differ
        self._runtime = self.sensitivities[self.sensitivities["kind"] != "weights"]
        pairs = [(row, *self._two(row)) for row in self._runtime.itertuples()]
        self._pairs = [(row, a, b, compare.differences(a, b)) for row, a, b in pairs]

    def _two(self, row: Any) -> tuple[Trace, Trace]:
        return self.traces[row.against], self.traces[row.condition]

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts the SHALL: repetitions are equal, and no load changed a choice."""
        return self.verdict.passed and not self.under_load.changed_at and not self.under_load.failed

    def judged(self) -> dict[str, Any]:
        """The verdict for the stage file: on repetitions, and on the loads, by which the SHALL is judged."""
        load = self.under_load
        under_load = {name: value for name, value in vars(load).items() if name != "counts"} | {**load.counts}
        return {
            **vars(self.verdict),
            "load_passed": None if load.level == "not judged" else load.passed,
            "load_sentence": load.sentence,
            "under_load": under_load,
            "loads": self.load_table.to_dict("records"),
            "left_out": self.left_out,
        }

    def conclusions(self) -> list[str]:
        """What this experiment showed, in sentences made from its counts."""
        runtime, routed = self._runtime, self.reference.routed
        n_moved = int((runtime["n_differ" if routed else "logit_drift"] > 0).sum())
        what = "an expert choice" if routed else "a logit"
        moved = f"{n_moved} of {len(runtime)} changes of settings changed {what}."
        lines = [self.under_load.sentence, self.verdict.text]
        lines.append(moved if len(runtime) else "No change of settings was tried.")
        if n := len(self.left_out):
            names = "; ".join(self.left_out[:8])
            lines.append(f"Left out to fit into the budget: {n} runs ({names}{'; ...' if n > 8 else ''}).")
        return lines

    def claims(self) -> pd.DataFrame:
        """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order."""
        rows = [
            ("routing stable", *verdict.stable(self.sensitivities)),
            ("deterministic execution", *verdict.deterministic(self.verdict)),
            ("routing variance grows under extreme token pressure", *self._pressure()),
        ]
        return pd.DataFrame(rows, columns=["claim", "status", "evidence"])

    def _pressure(self) -> tuple[str, str]:
        """Flips in the last against the first quarter of the text, pooled over the changes of settings."""
        n, scored, at = self.reference.n_tokens, ~self.reference.hashed, self.flips()["token"]
        size = round(n / 4) * int(scored.sum()) * len(self._pairs)
        if not size:
            why = "no change of settings was tried" if self.reference.routed else "no routed experts"
            return "not testable here", why
        early, late = int((at < round(n / 4)).sum()), int((at >= n - round(n / 4)).sum())
        seen = (
            f"{early:,} of {size:,} choices flip in the first quarter, {late:,} of {size:,} in the last, "
            f"over {n:,} tokens"
        )
        if n < EXTREME_TOKENS:
            return "not testable here", f"{seen}; extreme begins at {EXTREME_TOKENS:,} tokens"
        low, high = clopper_pearson(late, size)[0], clopper_pearson(early, size)[1]
        return ("confirmed" if low > high else "contradicted"), seen

    def agreement(self) -> pd.DataFrame:
        """Share of identical sets: a row a condition, as ranked, a column a layer, hash layers included."""
        done = self.rows[(self.rows["status"] == "done") & (self.rows["kind"] == IDENTICAL)]
        rows = pd.concat([done[done["against"] != "alone"], self.sensitivities[::-1]])  # "alone": other texts
        shares = {
            row.condition: 1 - compare.differences(*self._two(row)).mean(axis=0) for row in rows.itertuples()
        }
        return pd.DataFrame(shares, index=self.reference.layers).T

    def flips(self) -> pd.DataFrame:
        """Flips under changes of settings: ``condition``, ``kind``, ``token``, ``layer``, ``margin``."""
        parts = [pd.DataFrame(columns=["condition", "kind", "token", "layer", "margin"])]
        for row, a, _, differ in self._pairs:
            tokens, columns = np.nonzero(differ)
            places = {"token": tokens, "layer": a.layers[columns], "margin": a.margin[tokens, columns]}
            parts.append(pd.DataFrame({"condition": row.condition, "kind": row.kind, **places}))
        return pd.concat(parts[1:] or parts, ignore_index=True)

    def moved(self) -> str:
        """How far logits move where a token's experts changed, and where they did not, in a sentence."""
        drifts = [compare.drifts(a, b) for _, a, b, _ in self._pairs]
        flips = [differ[:, ~a.hashed].any(axis=1) for _, a, _, differ in self._pairs]
        drift, flipped = np.concatenate([[], *drifts]), np.concatenate([np.zeros(0, bool), *flips])
        still, moved = drift[(drift > 0) & ~flipped], drift[(drift > 0) & flipped]
        if not len(still) or not len(moved):
            return "No token changed its experts, or all did: there is nothing to compare."
        times = np.median(moved) / np.median(still)
        return (
            f"Tokens with a changed expert: logits move {times:.2g} times as far as others that move "
            f"(medians {np.median(moved):.2g} of n = {len(moved):,} and {np.median(still):.2g} of n = "
            f"{len(still):,})."
        )

    def margins(self) -> pd.DataFrame:
        """The margin of every choice of the reference that has one: ``token``, ``layer``, ``margin``."""
        margins = self.reference.margin
        tokens, columns = np.nonzero(np.isfinite(margins))
        layers = self.reference.layers[columns]
        return pd.DataFrame({"token": tokens, "layer": layers, "margin": margins[tokens, columns]})

    @cached_property
    def profile(self) -> Profile | None:
        """What the routers prefer, over the short texts; None for a dense model, or where it did not run."""
        trace = self.traces.get("profile")
        if trace is None or not trace.routed:
            return None
        return profile_of(trace, expert_bytes(self.path, trace.layers))

    def across(self) -> tuple[pd.DataFrame, str]:
        """Another quantization by layer, and whether changed experts predict changed predictions."""
        for row in self.sensitivities[self.sensitivities["kind"] == "weights"].itertuples():
            if self.reference.routed:
                a, b = self._two(row)
                return compare.across(a, b).assign(condition=row.condition), compare.divergence(a, b)
        return pd.DataFrame(), ""

    def export(self, path: str | Path) -> Path:
        """Write the traces of text, profile and loads as one CSV; see `trace.export`."""
        loads = self.rows.loc[self.rows["kind"] == "load", "condition"].unique()
        names = ("prefill", "profile", "alone", *loads)
        return export((self.traces[name] for name in names if name in self.traces), path)

    def write_tables(self, folder: str | Path) -> list[Path]:
        """Write the tables ``routing_*.csv``, and the profile as JSON."""
        folder, written = Path(folder), list[Path]()
        tables = {
            "conditions": self.rows,
            "loads": self.load_table,
            "claims": self.claims(),
            "layers": self.agreement().rename_axis("condition").reset_index(),
            "flips": self.flips(),
            "across": self.across()[0],
        }
        if profile := self.profile:
            tables |= {
                "placement": profile.placement(),
                "domains": profile.usage(),
                "specialization": profile.specialization(),
                "pairs": profile.pairs(),
                "drift": profile.drift(),
                "coverage": profile.coverage(),
                "balance": profile.layers(),
                "experts_needed": profile.experts_needed().reset_index(),
                "cross_coverage": profile.cross_coverage().reset_index(),
            }
            written = [profile.write(folder / "routing_profile.json")]
        return written + [
            write_table(folder / f"routing_{name}.csv", table, index=False)
            for name, table in tables.items()
            if len(table.columns)
        ]
