"""The tables of a climb, and levels of the hierarchy compared on the same chunks and questions."""

from __future__ import annotations

from itertools import pairwise
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.core.display import NONE, per_cent, size
from dfqs_nb.core.stage import Stage
from dfqs_nb.gguf.facts import bits_per_weight, class_of, class_sizes
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.ladder.divergence import estimate, summary
from dfqs_nb.ladder.run import Ladder, Rung, same_model
from dfqs_nb.scores import compare_runs
from dfqs_nb.stats import LEVEL, holm, mean_interval, sign_flip

# The hierarchy that DFQS 1.0 states. GGUF has no 8-bit floats; Q8_0 is the nearest.
LEVELS: dict[str, tuple[str, ...]] = {
    "FP16/FP8": ("F32", "BF16", "F16", "Q8_0"),
    "Q4-Q6": ("Q6_K", "Q5_K_M", "Q4_K_M"),
    "IQ2": ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
    "IQ1_S-XL": ("IQ1_S-XL",),
}
SAME = "no evidence of a difference"
METRICS = {"kld": "KL divergence", "same_top": "same top token", "routing": "same experts"}
SHOWN = ["size", "bits a weight", "KL divergence, nats (95 % interval)", "99 % of tokens under"]
SHOWN += ["same experts (95 % interval)"]
COMPARED = "step a b bits_a bits_b metric n value_a value_b difference low high p".split()


def two_digits(value: float) -> str:
    """A number with two significant digits and no exponent.

    >>> two_digits(0.000099), two_digits(3.187), two_digits(float("nan"))
    ('0.000099', '3.2', 'unknown')
    """
    return "unknown" if value != value else np.format_float_positional(value, 2, fractional=False, trim="-")


def by_chunk(rung: Rung) -> pd.DataFrame:
    """How similar a rung is to the source: a row a chunk, a column for each of `METRICS`.

    ``routing``: share of equal expert sets in layers that choose by score; NaN for a dense model.
    """
    means = rung.tokens.groupby("chunk")[["kld", "same_top"]].mean()
    scored = rung.routing[~rung.routing["hashed"]]
    return means.assign(routing=scored.groupby("chunk")["identical"].mean().astype(float))


def table(ladder: Ladder) -> pd.DataFrame:
    """One row a rung: sizes, bits, and every metric with its 95 % interval (``_low``, ``_high``).

    A score has the name of its set; ``_n``: its questions.
    """
    rows = []
    for rung in ladder.rungs:
        experts = [tensor for tensor in rung.header.tensors if class_of(tensor.name) == "routed experts"]
        row = {"rung": rung.name, "bytes": rung.header.file_size, "bits_per_weight": rung.bits_per_weight}
        row |= {"expert_bits": bits_per_weight(experts), **summary(rung.tokens, ladder.rungs[0].tokens)}
        row |= estimate("routing", by_chunk(rung)["routing"])
        for run in rung.runs:
            score = {"": run.score.value, "_low": run.score.low, "_high": run.score.high, "_n": run.score.n}
            row |= {run.name.replace("-", "_") + end: value for end, value in score.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def class_table(ladder: Ladder) -> pd.DataFrame:
    """Bits a weight by tensor class (rows) and rung (columns)."""
    columns = {
        rung.name: {row["class"]: row["bits_per_weight"] for row in class_sizes(rung.header)}
        for rung in ladder.rungs
    }
    return pd.DataFrame(columns).rename_axis("class")


def routing_table(ladder: Ladder) -> pd.DataFrame:
    """Agreement of expert choices with the source, one row a rung and layer.

    ``identical`` (share of equal sets among ``n``) with ``low`` and ``high``.
    """
    rows = []
    for rung in ladder.rungs[1:]:
        for (layer, hashed), part in rung.routing.groupby(["layer", "hashed"]):
            same = estimate("identical", part["identical"]).values()
            rows.append((rung.name, rung.bits_per_weight, layer, hashed, part["n"].sum(), *same))
    columns = ["rung", "bits_per_weight", "layer", "hashed", "n", "identical", "low", "high"]
    return pd.DataFrame(rows, columns=columns).astype({"hashed": bool})


def without_level(ladder: Ladder) -> list[str]:
    """The rungs that belong to none of `LEVELS`, so that `hierarchy` leaves them out."""
    return [rung.name for rung in ladder.rungs if all(rung.name not in names for names in LEVELS.values())]


def hierarchy(ladder: Ladder) -> pd.DataFrame:
    """The hierarchy of DFQS 1.0, tested: a row for each step between levels, and metric.

    A step compares the smallest rung of the upper level (``a``) with the largest of the lower one (``b``) on
    the same chunks and questions: ``n`` of them, ``value_a``, ``value_b``, ``difference`` with its unadjusted
    95 % interval ``low`` to ``high``, ``p``, ``p_holm``, and ``verdict`` of b: ``better``, ``worse`` or
    `SAME`. Tests: sign flips of chunks, McNemar's over questions, Holm's correction over all.
    """
    levels = {level: [rung for rung in ladder.rungs if rung.name in names] for level, names in LEVELS.items()}
    rows, bits = [], attrgetter("bits_per_weight")
    for (above, uppers), (below, lowers) in pairwise(level for level in levels.items() if level[1]):
        a, b = min(uppers, key=bits), max(lowers, key=bits)
        step = f"{above} -> {below}", a.name, b.name, a.bits_per_weight, b.bits_per_weight
        rows += [(*step, *row) for row in _compared(a, b)]
    tested = pd.DataFrame(rows, columns=COMPARED)
    tested["p_holm"] = holm(tested["p"].tolist())
    better = (tested["difference"] > 0) ^ (tested["metric"] == METRICS["kld"])
    tested["verdict"] = np.where(better, "better", "worse")
    tested.loc[~(tested["p_holm"] < 1 - LEVEL), "verdict"] = SAME
    return tested


def _compared(a: Rung, b: Rung) -> list[tuple[Any, ...]]:
    """One row a metric, from its values in each chunk or question."""
    rows = list[tuple[Any, ...]]()
    means, others = by_chunk(a), by_chunk(b)
    for name, label in METRICS.items():
        if means[name].notna().all():  # else a dense model, without experts
            change = (others[name] - means[name]).to_numpy(float)
            values = means[name].mean(), others[name].mean(), change.mean()
            rows.append((label, len(change), *values, *mean_interval(change), sign_flip(change)))
    for run, other in zip(a.runs, b.runs, strict=True):
        both = compare_runs(run, other)
        rows.append((run.name, both.n, both.a, both.b, both.difference, both.low, both.high, both.p))
    return rows


def hand_on(stage: Stage, ladder: Ladder, tested: pd.DataFrame) -> list[str]:
    """Write ``ladder.json`` (see `Stage.finish`), and return its summary lines; ``tested``: `hierarchy`."""
    rungs, header = table(ladder).to_dict("records"), ladder.rungs[0].header
    top, low = rungs[0], rungs[-1]
    bits = low["expert_bits"]  # NaN: a dense model
    experts = f", routed experts {bits:.2f}" if bits == bits else ""
    line = f"{header.path.name}: {len(rungs)} rungs from {top['rung']} ({top['bits_per_weight']:.2f} bits a "
    lines = [line + f"weight) to {low['rung']} ({low['bits_per_weight']:.2f}{experts})"]
    counts = f"n = {low['n_tokens']:,} tokens in {low['n_chunks']} chunks"
    shown, told = list[dict[str, str]](), dict[str, str]()
    for row in sorted(rungs[1:], key=itemgetter("bytes"), reverse=True):
        kld, *span, tail = (two_digits(row[it]) for it in ("kld", "kld_low", "kld_high", "kld_tail"))
        known = row["kld_low"] == row["kld_low"]
        interval = " to ".join(span) if known else "unknown"
        within = f" ({per_cent(row['routing_low'])} to {per_cent(row['routing_high'])})" if known else ""
        same = f"{per_cent(row['routing'])}{within}" if row["routing"] >= 0 else ""  # NaN: a dense model
        cells = size(row["bytes"]), f"{row['bits_per_weight']:.2f}", f"{kld} ({interval})", tail, same or NONE
        shown.append({"rung": row["rung"], **dict(zip(SHOWN, cells, strict=True))})
        spread = f"95 % interval {interval}, 99 % of tokens under {tail}, {counts}"
        told[row["rung"]] = f"{row['rung']}: KL divergence {kld} nats ({spread})"
        told[row["rung"]] += same and f", same experts in {same}"
    lines += [told[name] for name in dict.fromkeys(row["rung"] for row in (*rungs[1:2], *rungs[1:][-1:]))]
    notes = [f"{lines[0]}; {counts}"]
    for (step, a, b), part in tested.groupby(["step", "a", "b"], sort=False):
        metrics = part["metric"] + " (n = " + part["n"].astype(str) + ")"
        by_verdict = metrics.groupby(part["verdict"], sort=False).agg(", ".join)
        parts = [f"{verdict}: {named}" for verdict, named in by_verdict.items()]
        ends = f"{a} at {part['bits_a'].iloc[0]:.2f} bits to {b} at {part['bits_b'].iloc[0]:.2f}"
        notes.append(f"{step} ({ends}): {'; '.join(parts)}")
    notes += ladder.notes
    lines += notes[1:]
    source: dict[str, Any] = {"name": header.path.name}
    if (stage.folder / "merge.json").exists():
        source["is_original"] = same_model(header, open_shards(stage.model["path"]).as_one)
    facts: dict[str, Any] = {"conditions": ladder.conditions, "tier": ladder.settings.tier, "source": source}
    facts |= {"shown": shown, "notes": notes, "hierarchy": tested.to_dict("records")}
    stage.finish(**facts, rungs=rungs, summary=lines)
    return lines
