"""The tables of a climb, and rungs compared in pairs on the same chunks, questions and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.facts import class_sizes
from dfqs_nb.ladder.divergence import Array, bands, estimate, summary
from dfqs_nb.ladder.run import Ladder, Rung
from dfqs_nb.routing import differences, overlaps
from dfqs_nb.scores import SetRun, compare_runs
from dfqs_nb.stats import LEVEL, holm, mean_interval, sign_flip

# The hierarchy that DFQS 1.0 states. GGUF has no 8-bit floats; Q8_0 is the nearest.
LEVELS: dict[str, tuple[str, ...]] = {
    "FP16/FP8": ("F32", "BF16", "F16", "Q8_0"),
    "Q4-Q6": ("Q6_K", "Q5_K_M", "Q4_K_M"),
    "IQ2": ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    "IQ1_S-XL": ("IQ1_S-XL",),
}
SAME = "no evidence of a difference"
KINDS = ("fidelity", "ability")


def table(ladder: Ladder) -> pd.DataFrame:
    """One row a rung: sizes, bits, and every metric with its 95 % interval (``_low``, ``_high``)."""
    rows = []
    for rung in ladder.rungs:
        row = {"rung": rung.name, "bytes": rung.header.file_size, "bits_per_weight": rung.bits_per_weight}
        row |= {"expert_bits": rung.expert_bits, **summary(rung.tokens)}
        row |= _share("routing", _same_experts(ladder.source, rung))
        for run in rung.runs:
            name, score = _score_name(run, rung.runs), run.score
            row |= {name: score.value, f"{name}_low": score.low}
            row |= {f"{name}_high": score.high, f"{name}_n": score.n}
        row["boundary"] = rung.boundary["tokens"]
        row |= {f"boundary_{end}": rung.boundary[end] for end in ("low", "high", "status")}
        rows.append(row)
    return pd.DataFrame(rows)


def _score_name(run: SetRun, runs: Sequence[SetRun]) -> str:
    """The score's name, with its set's where several sets have that score."""
    alone = [other.score.name for other in runs].count(run.score.name) == 1
    return run.score.name if alone else f"{run.score.name} ({run.name})"


def class_table(ladder: Ladder) -> pd.DataFrame:
    """Bits a weight by tensor class (rows) and rung (columns)."""
    columns = {
        rung.name: {row["class"]: row["bits_per_weight"] for row in class_sizes(rung.header)}
        for rung in ladder.rungs
    }
    return pd.DataFrame(columns).rename_axis("class")


def _share(name: str, same: Array) -> dict[str, float]:
    """The mean with its interval held inside 0 to 1; NaN where there is nothing to choose."""
    if not same.size:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), np.nan)
    share = estimate(name, same)
    low, high = max(share[f"{name}_low"], 0.0), min(share[f"{name}_high"], 1.0)
    return {name: share[name], f"{name}_low": low, f"{name}_high": high}


def _same_experts(source: Rung, rung: Rung, layers: Array | None = None) -> Array:
    """Whether each expert set is the source's, ``(chunks, n)``; by default in all layers with scores."""
    same = ~differences(source.trace, rung.trace)[:, ~source.trace.hashed if layers is None else layers]
    size = source.trace.conditions["chunk_tokens"]
    rows: Array = same.reshape(len(same) // size, size * same.shape[1]).astype(float)  # none: a dense model
    return rows


def routing_table(ladder: Ladder) -> pd.DataFrame:
    """Agreement of expert choices with the source, one row a rung and layer.

    ``identical`` (share of equal sets among ``n``) with ``low`` and ``high``; ``overlap``: mean share of
    the k experts that both chose.
    """
    rows, trace = [], ladder.source.trace
    for rung in ladder.rungs[1:]:
        overlap = overlaps(trace, rung.trace).mean(axis=0)
        for column, (layer, hashed) in enumerate(zip(trace.layers, trace.hashed, strict=True)):
            same = _share("identical", _same_experts(ladder.source, rung, np.array([column]))).values()
            facts = rung.name, rung.bits_per_weight, layer, hashed, trace.n_tokens
            rows.append((*facts, *same, overlap[column]))
    columns = ["rung", "bits_per_weight", "layer", "hashed", "n", "identical", "low", "high", "overlap"]
    return pd.DataFrame(rows, columns=columns).astype({"hashed": bool})


def position_table(ladder: Ladder) -> pd.DataFrame:
    """Divergence from the source by how deep a token lies in its chunk, one row a rung and band.

    ``start`` and ``end`` in tokens; ``n`` tokens in ``chunks``, over which the intervals are.
    """
    rows = []
    for rung, (band, (start, end)) in product(
        ladder.rungs[1:], enumerate(bands(ladder.settings.chunk_tokens))
    ):
        part = rung.tokens.part(band)
        row = {"rung": rung.name, "bits_per_weight": rung.bits_per_weight, "start": start, "end": end}
        row |= {"chunks": len(part.kld), "n": part.kld.size, **estimate("kld", part.kld)}
        rows.append(row | _share("same_top", part.same_top.astype(float)))
    return pd.DataFrame(rows)


# ---- pairs ----


def steps(ladder: Ladder) -> pd.DataFrame:
    """Compare neighbours, and the pairs of `hierarchy`, on every metric; one row a pair and metric.

    Columns ``a`` (the rung above), ``b``, ``metric``, ``kind`` (``fidelity``, ``ability`` or ``perplexity``),
    ``n`` units, ``value_a``, ``value_b``, ``difference`` with its unadjusted 95 % interval ``low`` to
    ``high``, ``p``, ``p_holm``, and ``verdict`` of b: ``better``, ``worse``, `SAME` or ``not measured``.

    Tests on the same units: sign flips of chunks or texts, McNemar's over questions, Holm's correction over
    all. The source's divergence from itself is 0: the first step's says only whether anything changed.
    """
    names = [rung.name for rung in ladder.rungs]
    pairs = dict.fromkeys([*pairwise(names), *((a, b) for _, _, a, b in _level_pairs(names))])
    rows = [row for a, b in pairs for row in _compared(ladder.source, ladder[a], ladder[b])]
    adjusted = iter(holm([row["p"] for row in rows if row["p"] == row["p"]]))
    for row in rows:
        row["p_holm"] = next(adjusted) if row["p"] == row["p"] else row["p"]  # NaN: not tested
        better = "better" if (row["difference"] > 0) == row.pop("larger_is_better") else "worse"
        row["verdict"] = better if row["p_holm"] < 1 - LEVEL else SAME
        row["verdict"] = row["verdict"] if row["p"] == row["p"] else "not measured"
    return pd.DataFrame(rows)


def _compared(source: Rung, a: Rung, b: Rung) -> list[dict[str, Any]]:
    """One row a metric, from its values in each chunk, question or text."""
    rows = list[dict[str, Any]]()

    def paired(metric: str, kind: str, first: Array, second: Array, *, up: bool = True) -> None:
        change = second - first
        low, high = mean_interval(change)
        row = {"a": a.name, "b": b.name, "metric": metric, "kind": kind, "n": len(change)}
        row |= {"value_a": float(first.mean()), "value_b": float(second.mean())}
        row |= {"difference": float(change.mean()), "low": low, "high": high}
        rows.append(row | {"p": sign_flip(change), "larger_is_better": up})

    tokens = [rung.tokens.part() for rung in (a, b)]
    paired("KL divergence", "fidelity", *(part.kld.mean(1) for part in tokens), up=False)
    paired("same top token", "fidelity", *(part.same_top.mean(1) for part in tokens))
    if not source.trace.hashed.all():
        paired("same experts", "fidelity", *(_same_experts(source, rung).mean(1) for rung in (a, b)))
    paired("log-perplexity", "perplexity", *(part.nll.mean(1) for part in tokens), up=False)
    for run, other in zip(a.runs, b.runs, strict=True):
        result = compare_runs(run, other)
        row = {"a": a.name, "b": b.name, "metric": _score_name(run, a.runs), "kind": "ability", "n": result.n}
        row |= {"value_a": result.a, "value_b": result.b, "difference": result.difference}
        rows.append(row | {"low": result.low, "high": result.high, "p": result.p, "larger_is_better": True})
    right = [rung.items.groupby(["length", "haystack"])["correct"].mean() for rung in (a, b)]
    shared = right[0].index.intersection(right[1].index)
    paired("retrieval", "ability", *(values[shared].to_numpy(float) for values in right))
    return rows


def verdict_table(compared: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of `steps` alone: a row a pair, a column a metric."""
    labelled = compared.assign(step=compared["a"] + " -> " + compared["b"])
    table = labelled.pivot(index="step", columns="metric", values="verdict")
    return table.loc[labelled["step"].unique(), compared["metric"].unique()].rename_axis(columns=None)


def _level_pairs(names: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Two levels of the hierarchy, the smallest rung of the upper one and the largest of the lower one."""
    levels = {level: [name for name in names if name in members] for level, members in LEVELS.items()}
    present = [(level, members) for level, members in levels.items() if members]
    return [(above, below, a[-1], b[0]) for (above, a), (below, b) in pairwise(present)]


def hierarchy(ladder: Ladder, compared: pd.DataFrame) -> pd.DataFrame:
    """The hierarchy of DFQS 1.0, tested between levels: the smallest rung of one and the largest of the next.

    One column a metric with its verdict; ``fidelity`` and ``ability``: the verdicts of their metrics
    `together`. Perplexity belongs to neither: a model can be surprised less by a text, and yet be less like
    the original and able to do less.
    """
    rows: list[dict[str, Any]] = []
    for above, below, a, b in _level_pairs([rung.name for rung in ladder.rungs]):
        pair = compared[(compared["a"] == a) & (compared["b"] == b)]
        row: dict[str, Any] = {"step": f"{above} -> {below}", "a": a, "b": b}
        row |= {"bits_a": ladder[a].bits_per_weight, "bits_b": ladder[b].bits_per_weight}
        row |= dict(zip(pair["metric"], pair["verdict"], strict=True))
        rows.append(row | {kind: together(pair[pair["kind"] == kind]["verdict"]) for kind in KINDS})
    return pd.DataFrame(rows)


def together(verdicts: Iterable[str]) -> str:
    """Several verdicts in one.

    >>> together(["worse", "no evidence of a difference"]), together(["worse", "better"])
    ('worse', 'mixed')
    """
    differing = set(verdicts) & {"better", "worse"}
    return "mixed" if len(differing) == 2 else differing.pop() if differing else SAME


# ---- handing on ----


def hand_on(stage: Stage, ladder: Ladder, compared: pd.DataFrame) -> list[str]:
    """Write ``ladder.json`` (see `Stage.finish`), and return its summary lines."""
    rungs, levels = table(ladder).to_dict("records"), hierarchy(ladder, compared).to_dict("records")
    top, low = rungs[0], rungs[-1]
    bits = low["expert_bits"]  # NaN: a dense model
    lines = [
        f"{ladder.source.path.name}: {len(rungs)} rungs from {top['rung']} "
        f"({top['bits_per_weight']:.2f} bits a weight) to {low['rung']} "
        f"({low['bits_per_weight']:.2f}{f', routed experts {bits:.2f}' if bits == bits else ''})"
    ]
    for row in (rungs[1], low) if len(rungs) > 2 else rungs[1:]:
        known = row["kld_low"] == row["kld_low"]
        interval = f"{row['kld_low']:.2g} to {row['kld_high']:.2g}" if known else "unknown"
        within = f" ({row['routing_low']:.1%} to {row['routing_high']:.1%})" if known else ""
        lines.append(
            f"{row['rung']}: KL divergence {row['kld']:.2g} nats (95 % interval {interval}, 99 % of tokens "
            f"under {row['kld_tail']:.2g}, n = {row['n_tokens']:,} tokens in {row['n_chunks']} chunks)"
            + (f", same experts in {row['routing']:.1%}{within}" if row["routing"] == row["routing"] else "")
        )
    for row in levels:
        pair = compared[(compared["a"] == row["a"]) & (compared["b"] == row["b"])]
        parts = []
        for kind in KINDS:
            n = pair.loc[pair["kind"] == kind, "n"]
            counts = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
            parts.append(f"{kind} {row[kind]} (n = {counts} chunks, questions or texts)")
        ends = f"{row['a']} at {row['bits_a']:.2f} bits to {row['b']} at {row['bits_b']:.2f}"
        lines.append(f"{row['step']} ({ends}): {'; '.join(parts)}")
    lines += [f"{name} failed: {why}" for name, why in ladder.failed.items()]
    facts: dict[str, Any] = {"conditions": ladder.conditions, "tier": ladder.settings.tier}
    facts |= {"rungs": rungs, "hierarchy": levels, "steps": compared.to_dict("records")}
    stage.finish(**facts, summary=lines, failed=ladder.failed)
    return lines
