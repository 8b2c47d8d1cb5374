"""The tables of a climb, and rungs compared in pairs on the same chunks, questions and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.facts import bits_per_weight, class_of, class_sizes
from dfqs_nb.ladder.divergence import LAST, bands, estimate, summary
from dfqs_nb.ladder.run import Ladder, Rung
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
LOWER_IS_BETTER = ("KL divergence", "log-perplexity")
STEPS = ("a", "b", "metric", "kind", "n", "value_a", "value_b", "difference", "low", "high", "p")


def table(ladder: Ladder) -> pd.DataFrame:
    """One row a rung: sizes, bits, and every metric with its 95 % interval (``_low``, ``_high``)."""
    rows = []
    for rung in ladder.rungs:
        experts = [tensor for tensor in rung.header.tensors if class_of(tensor.name) == "routed experts"]
        row = {"rung": rung.name, "bytes": rung.header.file_size, "bits_per_weight": rung.bits_per_weight}
        row |= {"expert_bits": bits_per_weight(experts), **summary(rung.tokens)}
        row |= estimate("routing", _same_experts(rung))
        for run in rung.runs:
            name, score = _score_name(run, rung.runs), run.score
            row |= {name: score.value, f"{name}_low": score.low}
            row |= {f"{name}_high": score.high, f"{name}_n": score.n}
        row["boundary"] = rung.boundary["tokens"]
        row |= {f"boundary_{end}": rung.boundary[end] for end in ("low", "high", "status")}
        rows.append(row)
    return pd.DataFrame(rows)


def _same_experts(rung: Rung) -> pd.Series:
    """By chunk, the share of expert sets that are the source's, in layers that choose by score."""
    return rung.routing[~rung.routing["hashed"]].groupby("chunk")["identical"].mean()


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


def routing_table(ladder: Ladder) -> pd.DataFrame:
    """Agreement of expert choices with the source, one row a rung and layer.

    ``identical`` (share of equal sets among ``n``) with ``low`` and ``high``; ``overlap``: mean share of
    the k experts that both chose.
    """
    rows = []
    for rung in ladder.rungs[1:]:
        for (layer, hashed), part in rung.routing.groupby(["layer", "hashed"]):
            same = estimate("identical", part["identical"]).values()
            facts = rung.name, rung.bits_per_weight, layer, hashed, part["n"].sum()
            rows.append((*facts, *same, part["overlap"].mean()))
    columns = ["rung", "bits_per_weight", "layer", "hashed", "n", "identical", "low", "high", "overlap"]
    return pd.DataFrame(rows, columns=columns).astype({"hashed": bool})


def position_table(ladder: Ladder) -> pd.DataFrame:
    """Divergence from the source by how deep a token lies in its chunk, one row a rung and band.

    ``start`` and ``end`` in tokens; ``n`` tokens in ``chunks``, over which the intervals are.
    """
    rows, edges = [], bands(ladder.settings.chunk_tokens)
    for rung in ladder.rungs[1:]:
        for (start, end), (_, part) in zip(edges, rung.tokens.groupby("band"), strict=True):
            means = part.groupby("chunk")[["kld", "same_top"]].mean()
            row = {"rung": rung.name, "bits_per_weight": rung.bits_per_weight, "start": start, "end": end}
            row |= {"chunks": len(means), "n": len(part)}
            rows.append(row | estimate("kld", means["kld"]) | estimate("same_top", means["same_top"]))
    return pd.DataFrame(rows)


def steps(ladder: Ladder) -> pd.DataFrame:
    """Compare neighbours, and the pairs of `hierarchy`, on every metric; one row a pair and metric.

    Columns ``a`` (the rung above), ``b``, ``metric``, ``kind`` (``fidelity``, ``ability`` or ``perplexity``),
    ``n`` units, ``value_a``, ``value_b``, ``difference`` with its unadjusted 95 % interval ``low`` to
    ``high``, ``p``, ``p_holm``, and ``verdict`` of b: ``better``, ``worse``, `SAME` or ``not measured``.

    Tests on the same units: sign flips of chunks or texts, McNemar's over questions, Holm's correction over
    all. The source's divergence from itself is 0: the first step's says only whether anything changed.
    """
    names = [rung.name for rung in ladder.rungs]
    pairs = dict.fromkeys([*pairwise(names), *((a, b) for _, a, b in _level_pairs(names))])
    rows = [row for a, b in pairs for row in _compared(ladder[a], ladder[b])]
    table = pd.DataFrame(rows, columns=STEPS)
    tested = table["p"].notna()
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].tolist())
    better = (table["difference"] > 0) ^ table["metric"].isin(LOWER_IS_BETTER)
    table["verdict"] = np.where(better, "better", "worse")
    table.loc[~(table["p_holm"] < 1 - LEVEL), "verdict"] = SAME
    table.loc[~tested, "verdict"] = "not measured"
    return table


def _compared(a: Rung, b: Rung) -> list[tuple[Any, ...]]:
    """One row a metric, from its values in each chunk, question or text; the columns are `STEPS`."""
    chunks = [rung.tokens[rung.tokens["band"] == LAST].groupby("chunk") for rung in (a, b)]
    texts = [rung.items.groupby(["length", "haystack"])["correct"].mean() for rung in (a, b)]
    kld, same_top, nll = ([part[name].mean() for part in chunks] for name in ("kld", "same_top", "nll"))
    rows = [_paired("KL divergence", "fidelity", *kld), _paired("same top token", "fidelity", *same_top)]
    if len(_same_experts(a)):  # none: a dense model
        rows.append(_paired("same experts", "fidelity", _same_experts(a), _same_experts(b)))
    rows.append(_paired("log-perplexity", "perplexity", *nll))
    for run, other in zip(a.runs, b.runs, strict=True):
        both = compare_runs(run, other)
        facts = both.n, both.a, both.b, both.difference, both.low, both.high, both.p
        rows.append((_score_name(run, a.runs), "ability", *facts))
    rows.append(_paired("retrieval", "ability", *texts))
    return [(a.name, b.name, *row) for row in rows]


def _paired(metric: str, kind: str, a: pd.Series, b: pd.Series) -> tuple[Any, ...]:
    """A metric compared on the units that both have."""
    values = pd.concat([a, b], axis=1, join="inner").to_numpy(float)
    change = values[:, 1] - values[:, 0]
    numbers = *values.mean(axis=0), change.mean(), *mean_interval(change), sign_flip(change)
    return metric, kind, len(change), *map(float, numbers)


def verdict_table(compared: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of `steps` alone: a row a pair, a column a metric."""
    labelled = compared.assign(step=compared["a"] + " -> " + compared["b"])
    table = labelled.pivot(index="step", columns="metric", values="verdict")
    return table.loc[labelled["step"].unique(), compared["metric"].unique()].rename_axis(columns=None)


def _level_pairs(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Neighbouring levels of the hierarchy: the smallest rung of the upper, the largest of the lower one."""
    levels = [(level, [name for name in names if name in members]) for level, members in LEVELS.items()]
    present = [(level, members) for level, members in levels if members]
    return [(f"{above} -> {below}", a[-1], b[0]) for (above, a), (below, b) in pairwise(present)]


def hierarchy(ladder: Ladder, compared: pd.DataFrame) -> pd.DataFrame:
    """The hierarchy of DFQS 1.0, tested between levels: the smallest rung of one and the largest of the next.

    One column a metric with its verdict; ``fidelity`` and ``ability``: the verdicts of their metrics
    `together`. Perplexity belongs to neither: a model can be surprised less by a text, and yet be less like
    the original and able to do less.
    """
    rows: list[dict[str, Any]] = []
    for step, a, b in _level_pairs([rung.name for rung in ladder.rungs]):
        pair = compared[(compared["a"] == a) & (compared["b"] == b)]
        row: dict[str, Any] = {"step": step, "a": a, "b": b}
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


def hand_on(stage: Stage, ladder: Ladder, compared: pd.DataFrame) -> list[str]:
    """Write ``ladder.json`` (see `Stage.finish`), and return its summary lines."""
    rungs, levels = table(ladder).to_dict("records"), hierarchy(ladder, compared).to_dict("records")
    top, low = rungs[0], rungs[-1]
    bits = low["expert_bits"]  # NaN: a dense model
    lines = [
        f"{ladder.rungs[0].header.path.name}: {len(rungs)} rungs from {top['rung']} "
        f"({top['bits_per_weight']:.2f} bits a weight) to {low['rung']} "
        f"({low['bits_per_weight']:.2f}{f', routed experts {bits:.2f}' if bits == bits else ''})"
    ]
    for row in (rungs[1], low) if len(rungs) > 2 else rungs[1:]:
        known = row["kld_low"] == row["kld_low"]
        interval = f"{row['kld_low']:.2g} to {row['kld_high']:.2g}" if known else "unknown"
        within = f" ({row['routing_low']:.1%} to {row['routing_high']:.1%})" if known else ""
        counts = f"n = {row['n_tokens']:,} tokens in {row['n_chunks']} chunks"
        lines.append(
            f"{row['rung']}: KL divergence {row['kld']:.2g} nats (95 % interval {interval}, 99 % of tokens "
            f"under {row['kld_tail']:.2g}, {counts})"
            + (f", same experts in {row['routing']:.1%}{within}" if row["routing"] == row["routing"] else "")
        )
    for row in levels:
        pair = compared[(compared["a"] == row["a"]) & (compared["b"] == row["b"])]
        n, parts = pair.groupby("kind")["n"].agg(["min", "max"]), []
        for kind in KINDS:
            least, most = n.loc[kind]
            counts = f"{least}" if least == most else f"{least} to {most}"
            parts.append(f"{kind} {row[kind]} (n = {counts} chunks, questions or texts)")
        ends = f"{row['a']} at {row['bits_a']:.2f} bits to {row['b']} at {row['bits_b']:.2f}"
        lines.append(f"{row['step']} ({ends}): {'; '.join(parts)}")
    lines += [f"{name} failed: {why}" for name, why in ladder.failed.items()]
    facts: dict[str, Any] = {"conditions": ladder.conditions, "tier": ladder.settings.tier}
    facts |= {"rungs": rungs, "hierarchy": levels, "steps": compared.to_dict("records")}
    stage.finish(**facts, summary=lines, failed=ladder.failed)
    return lines
