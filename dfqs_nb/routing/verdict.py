"""What the comparisons mean: the SHALL judged, sensitivities ranked, advice, and the card's statements.

DFQS 1.0: "routing remains deterministic under standard inference loads". Identical conditions are judged,
that is, the same run again in the same process and in a fresh one, by prefill and by decode. What differs
when a setting differs is sensitivity, not failure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.core.files import write_table
from dfqs_nb.routing.compare import by_position, by_token, load_entropy, lower_bound, upper_bound, usage
from dfqs_nb.routing.experiment import IDENTICAL, Experiment
from dfqs_nb.routing.trace import Trace

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


@dataclass(frozen=True)
class Verdict:
    """Whether routing was deterministic under identical conditions.

    Attributes:
        passed: no expert set differed, and every repetition ran.
        routed: whether the model has routers that score; else only logits are judged.
        n_tokens, n_layers, n_runs: the text, the layers that score, the repetitions.
        n_choices: tokens x layers, over all repetitions.
        n_differ: of these, how many chose another set.
        upper_bound: the largest rate of such choices that these counts allow, 95 %, one-sided, exact.
        logits_equal: share of tokens whose logits were equal bit for bit.
        same_output: whether every greedy continuation was equal.
        failed_runs: repetitions that did not run.
    """

    passed: bool
    routed: bool
    n_tokens: int
    n_layers: int
    n_runs: int
    n_choices: int
    n_differ: int
    upper_bound: float
    logits_equal: float
    same_output: bool
    failed_runs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The verdict in one sentence."""
        word = "PASS" if self.passed else "FAIL"
        if self.failed_runs:
            return f"{word}: {len(self.failed_runs)} of the repetitions did not run ({self.failed_runs[0]})."
        if not self.routed:
            return (
                f"{word}: no routed experts here (a dense model); the logits of {self.logits_equal:.2%} "
                f"of {self.n_tokens:,} tokens were equal bit for bit over {self.n_runs} repetitions."
            )
        return (
            f"{word}: {self.n_differ:,} of {self.n_choices:,} choices differed under the same conditions "
            f"({self.n_tokens:,} tokens x {self.n_layers} layers x {self.n_runs} repetitions); with 95 % "
            f"confidence fewer than {self.upper_bound:.2g} of all choices do."
        )


def judge(table: pd.DataFrame) -> Verdict:
    """The verdict on the table of an experiment.

    A dense model passes when its logits were equal bit for bit.
    """
    repeats = table[table["kind"] == IDENTICAL]
    done = repeats[repeats["status"] == "done"]
    broken = repeats[repeats["status"] != "done"]
    failed = tuple(f"{row.condition}: {row.status}" for row in broken.itertuples())
    n, differ = int(done["n_choices"].sum()), int(done["n_differ"].sum())
    equal = float(done["logits_equal"].mean()) if len(done) else math.nan
    clean = differ == 0 if n else equal == 1.0
    return Verdict(
        passed=bool(len(done)) and not failed and clean,
        routed=n > 0,
        n_tokens=int(done["n_tokens"].max()) if len(done) else 0,
        n_layers=int(done["n_layers"].max()) if len(done) else 0,
        n_runs=len(done),
        n_choices=n,
        n_differ=differ,
        upper_bound=upper_bound(differ, n) if n else math.nan,
        logits_equal=equal,
        same_output=bool((done["same_output"] != False).all()),
        failed_runs=failed,  # noqa: E712
    )


def sensitivities(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions that change a setting, most different first, with the exact 95 % interval of their rate.

    Columns: those of the table, ``rate`` (of different sets), ``rate_low``, ``rate_high``.
    """
    changed = table[(table["kind"] != IDENTICAL) & (table["status"] == "done")].copy()
    pairs = list(zip(changed["n_differ"].astype(int), changed["n_choices"].astype(int), strict=True))
    changed["rate"] = [x / n if n else math.nan for x, n in pairs]
    changed["rate_low"] = [lower_bound(x, n, 0.975) if n else math.nan for x, n in pairs]
    changed["rate_high"] = [upper_bound(x, n, 0.975) if n else math.nan for x, n in pairs]
    return changed.sort_values(["rate", "logit_drift"], ascending=False, kind="stable", ignore_index=True)


def advice(table: pd.DataFrame) -> list[str]:
    """What to fix in order to reproduce a run, one sentence a kind of setting, most important first."""
    lines = []
    for kind, rows in sensitivities(table).groupby("kind", sort=False):
        worst, what = rows.iloc[0], FIXES.get(str(kind), str(kind))
        differ, n = int(worst["n_differ"]), int(worst["n_choices"])
        if kind == "weights":
            name = worst["condition"].removeprefix("weights: ")
            lines.append(
                f"Compare runs of one quantization only: {name} chose other "
                f"experts in {differ:,} of {n:,} choices ({differ / max(n, 1):.1%})."
            )
        elif differ:
            lines.append(
                f'Fix {what}: "{worst["condition"]}" changed {differ:,} of {n:,} choices '
                f"({differ / n:.2%}), at margins up to {worst['margin_differ']:.2g}; "
                f"{_output(rows)}."
            )
        elif (rows["logits_equal"] < 1).any():
            still = "no choice changed, but logits" if n else "logits"
            lines.append(
                f"Fix {what} for equal logits: {still} moved by up to "
                f"{rows['logit_drift'].max():.2g}; {_output(rows)}."
            )
        else:
            lines.append(
                f"Free: {what}. Logits were equal bit for bit in {len(rows)} "
                f"comparison{'s' if len(rows) > 1 else ''}."
            )
    return lines


def _output(rows: pd.DataFrame) -> str:
    changed = (rows["same_output"] == False).any()  # noqa: E712
    return "the greedy answer changed too" if changed else "the greedy answer stayed"


def claims(experiment: Experiment) -> pd.DataFrame:
    """The card's statements on routing: ``claim``, ``status`` and ``evidence``, in its order."""
    import pandas as pd

    table = experiment.table
    rows = [
        ("routing stable", *_stable(sensitivities(table))),
        ("deterministic execution", *_deterministic(judge(table))),
        ("routing variance grows under extreme token pressure", *_pressure(experiment)),
    ]
    return pd.DataFrame(rows, columns=["claim", "status", "evidence"])


def _stable(found: pd.DataFrame) -> tuple[str, str]:
    """Judged over the settings of the runtime; another quantization is another model."""
    runtime = found[(found["kind"] != "weights") & (found["n_choices"] > 0)]
    if not len(runtime):
        return "not testable here", "no routed experts"
    worst = runtime.iloc[0]
    share = float(runtime["share_identical"].min())
    status = "confirmed" if share >= STABLE_SHARE else "contradicted"
    return status, (
        f"at least {share:.2%} of expert sets stay the same under each of {len(runtime)} changes "
        f"of settings (least: {worst['condition']}; asked for {STABLE_SHARE:.0%})"
    )


def _deterministic(verdict: Verdict) -> tuple[str, str]:
    if not verdict.n_runs:
        return "not testable here", "no repetition ran"
    answers = "equal" if verdict.same_output else "differ"
    exact = verdict.passed and verdict.logits_equal == 1.0 and verdict.same_output
    choices = f"{verdict.n_differ:,} of {verdict.n_choices:,} choices differ; " if verdict.routed else ""
    return ("confirmed" if exact else "contradicted"), (
        f"under identical conditions {choices}logits of {verdict.logits_equal:.2%} of tokens are equal bit "
        f"for bit; answers {answers}"
    )


def _pressure(experiment: Experiment) -> tuple[str, str]:
    """Flips in the last against the first quarter of the text, pooled over the changes of settings."""
    early, late = pressure(experiment)
    seen = (
        f"{early[0]:,} of {early[1]:,} choices flip in the first quarter, {late[0]:,} of {late[1]:,} in "
        f"the last, over {len(experiment.tokens):,} tokens"
    )
    if not early[1]:
        return "not testable here", "no routed experts"
    if len(experiment.tokens) < EXTREME_TOKENS:
        return "not testable here", f"{seen}; extreme begins at {EXTREME_TOKENS:,} tokens"
    grows = lower_bound(*late, 0.975) > upper_bound(*early, 0.975)
    return ("confirmed" if grows else "contradicted"), seen


def pressure(experiment: Experiment) -> tuple[tuple[int, int], tuple[int, int]]:
    """Flips and choices in the first and the last quarter of the text, over all changes of settings."""
    quarters = [round(len(experiment.tokens) * i / 4) for i in range(5)]
    parts = [
        by_position(experiment.traces[row.against], experiment.traces[row.condition], quarters)
        for row in sensitivities(experiment.table).itertuples()
        if row.kind != "weights"
    ]
    early, late = ([(p["differ"].iloc[at], p["n"].iloc[at]) for p in parts] for at in (0, -1))
    return tuple((int(sum(x for x, _ in part)), int(sum(n for _, n in part))) for part in (early, late))


# ---- tables for figures ----


def agreement(experiment: Experiment) -> pd.DataFrame:
    """Share of identical sets for each condition (rows, as ranked) and layer (columns); hash layers too."""
    import pandas as pd

    from dfqs_nb.routing.compare import by_layer

    ranked = [
        *experiment.table.query("kind == @IDENTICAL and status == 'done'")["condition"],
        *sensitivities(experiment.table)["condition"][::-1],
    ]
    against = dict(zip(experiment.table["condition"], experiment.table["against"], strict=True))
    rows = {
        name: by_layer(experiment.traces[against[name]], experiment.traces[name]).set_index("layer")[
            "share_identical"
        ]
        for name in ranked
    }
    return pd.DataFrame(rows).T


def flipped_margins(experiment: Experiment) -> pd.DataFrame:
    """Every flip under a change of settings: ``condition``, ``kind``, ``token``, ``layer``, ``margin``."""
    import pandas as pd

    from dfqs_nb.routing.compare import flips

    rows = sensitivities(experiment.table)
    found = [
        flips(experiment.traces[row.against], experiment.traces[row.condition]).assign(
            condition=row.condition, kind=row.kind
        )
        for row in rows[rows["kind"] != "weights"].itertuples()
    ]
    columns = ["condition", "kind", "token", "layer", "margin"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def margins(trace: Trace) -> pd.DataFrame:
    """The margin of every choice: ``token``, ``layer``, ``margin``; layers that score only."""
    import pandas as pd

    scored = trace.layers[~trace.hashed]
    token, layer = np.repeat(np.arange(trace.n_tokens), len(scored)), np.tile(scored, trace.n_tokens)
    return pd.DataFrame({"token": token, "layer": layer, "margin": trace.margin[:, ~trace.hashed].ravel()})


def positions(experiment: Experiment) -> pd.DataFrame:
    """Stretches of the context, each twice as long as the one before, pooled over the changes of runtime
    settings: the columns of `by_position`, with ``rate`` of flips and its exact 95 % interval ``rate_low``,
    ``rate_high``."""
    n, rows = len(experiment.tokens), sensitivities(experiment.table)
    edges = [0, *(2**i for i in range(5, n.bit_length()) if 2**i < n), n]
    parts = [
        by_position(experiment.traces[row.against], experiment.traces[row.condition], edges)
        for row in rows[rows["kind"] != "weights"].itertuples()
    ]
    pooled = by_position(experiment.traces["prefill"], experiment.traces["prefill"], edges)
    pooled["n"], pooled["differ"] = sum(p["n"] for p in parts), sum(p["differ"] for p in parts)
    counts = [(int(x), int(n)) for x, n in zip(pooled["differ"], pooled["n"], strict=True)]
    pooled["rate"] = [x / n if n else math.nan for x, n in counts]
    pooled["rate_low"] = [lower_bound(x, n, 0.975) if n else math.nan for x, n in counts]
    pooled["rate_high"] = [upper_bound(x, n, 0.975) if n else math.nan for x, n in counts]
    return pooled.drop(columns="share_identical")


def token_drifts(experiment: Experiment) -> pd.DataFrame:
    """Every token under every change of runtime settings that moved its logits: ``condition``, ``token``,
    ``drift`` and ``flips`` (layers whose expert set differs)."""
    import pandas as pd

    rows = sensitivities(experiment.table)
    found = [
        by_token(experiment.traces[row.against], experiment.traces[row.condition]).assign(
            condition=row.condition
        )
        for row in rows[rows["kind"] != "weights"].itertuples()
    ]
    columns = ["condition", "token", "drift", "flips"]
    table = pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)
    return table[table["drift"] > 0].reset_index(drop=True)


def loads(experiment: Experiment) -> pd.DataFrame:
    """`load_entropy` of the reference run."""
    return load_entropy(experiment.traces["prefill"])


def write_tables(experiment: Experiment, folder: str | Path) -> list[Path]:
    """Write the experiment's tables as CSV and return their paths: conditions, claims, layers, positions,
    flips and expert usage."""
    tables = {
        "routing_conditions": experiment.table,
        "routing_claims": claims(experiment),
        "routing_layers": agreement(experiment).rename_axis("condition").reset_index(),
        "routing_positions": positions(experiment),
        "routing_flips": flipped_margins(experiment),
        "routing_usage": usage(experiment.traces["prefill"]),
    }
    return [write_table(Path(folder) / f"{name}.csv", table, index=False) for name, table in tables.items()]
