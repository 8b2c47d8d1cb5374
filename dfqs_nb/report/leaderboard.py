"""A table over a folder of reports: one section for each tier and conditions, none ranked across two.

What cannot be read, or was edited, is listed with its reason and never left out in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import whole_file, write_table
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import tilde

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("reasoning_score", "code_score")
NUMBERS = (*SCORES, "failure_boundary_tokens", "cpu_tokens_per_sec")
ROW_FILE = "sweep_row.json"  # see dfqs_nb.workbook.sweep
COLUMNS = (
    "tier",
    "conditions",
    "place",
    "run",
    "model",
    "size_bytes",
    "bits_per_weight",
    "active_parameters",
    *(f"{name}{part}" for name in NUMBERS for part in ("", "_low", "_high")),
    "boundary_status",
    "longest",
    "curve_at_longest",
    "contended",
    "withheld",
    "report",
    "problem",
)


def find_reports(folder: str | Path) -> list[Path]:
    """Every ``report.json`` and ``*.report.json`` under a folder, hidden folders apart.

    Raises:
        DfqsError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DfqsError("no such folder", where=tilde(folder), hint="give a folder that holds reports")
    found = {*folder.rglob("report.json"), *folder.rglob("*.report.json")}
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def leaderboard(folder: str | Path) -> pd.DataFrame:
    """One row a report found under a folder, in sections of equal ``tier`` and ``conditions``.

    Within a section by reasoning score, then code score, highest first; ``place`` counts from 1, and reports
    of equal scores share it. Withheld scores come last, without a place. Intervals stand beside every number:
    a place above another says nothing where they overlap (``report_compare`` tests that, item by item).

    Columns: ``COLUMNS``. ``conditions``: the first 12 digits of their SHA-256. ``contended``: the speed was
    taken on a busy machine, or beside other rows of a sweep. ``withheld``: metrics without a value, and why.
    ``problem``: why a file is no report that counts; its other cells are empty.

    Raises:
        DfqsError: there is no such folder.
    """
    import pandas as pd

    rows, seen = [], {}
    for path in find_reports(folder):
        name = path.relative_to(folder).as_posix()
        try:
            report = _read(path)
            identity = report["integrity"]["sha256"]
            if identity in seen:
                raise DfqsError(f"the same report as {seen[identity]}")
            row = _row(report, path)
            seen[identity] = name
        except DfqsError as error:
            row = {"problem": _reason(error)}
        rows.append({**row, "report": name})
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return _placed(table)


def _read(path: Path) -> dict[str, Any]:
    from dfqs_nb.report import metrics as report

    return report.read_report(path)


def _reason(error: DfqsError) -> str:
    return f"{error.what}; {error.hint}" if error.hint else error.what


def _row(report: Mapping[str, Any], path: Path) -> dict[str, Any]:
    model, metrics, details = report["model"], report["metrics"], report["details"]
    curve, boundary = details["context_stability_curve"], details["failure_boundary_tokens"]
    row = {
        "tier": report["tier"],
        "conditions": report["conditions_sha256"][:12],
        "run": report["run"],
        "model": model["name"],
        "size_bytes": model.get("size_bytes"),
        "bits_per_weight": model.get("bits_per_weight"),
        "active_parameters": model.get("active_parameters"),
        "boundary_status": boundary_status(boundary),
        "longest": (curve.get("lengths") or [None])[-1],
        "curve_at_longest": (metrics.get("context_stability_curve") or [None])[-1],
        "contended": is_contended(report, path),
        "withheld": "; ".join(withheld(report)),
        "problem": "",
    }
    for name in NUMBERS:
        detail = details.get(name) or {}
        row |= {name: metrics.get(name), f"{name}_low": detail.get("low"), f"{name}_high": detail.get("high")}
    return row


def boundary_status(boundary: Mapping[str, Any]) -> str:
    """How the boundary is to be read: ``quality``, another cause, ``right censored``, ``floor``, or empty.

    >>> boundary_status({"status": "right_censored", "right_censored": True, "cause": None})
    'right censored'
    """
    status = boundary.get("status") or ""
    return str(boundary.get("cause") or "") if status == "measured" else status.replace("_", " ")


def withheld(report: Mapping[str, Any]) -> list[str]:
    """A sentence for each metric that has no value."""
    reasons = {name: (detail or {}).get("withheld") for name, detail in report["details"].items()}
    return [
        f"{name}: {reasons.get(name) or 'no value'}"
        for name, value in report["metrics"].items()
        if value is None
    ]


def is_contended(report: Mapping[str, Any], path: Path) -> bool:
    """Whether a report's speed was measured on a busy machine, or in a sweep beside other rows."""
    return bool((report["details"].get("cpu_tokens_per_sec") or {}).get("contended")) or bool(
        run_beside(path)
    )


def run_beside(path: str | Path) -> list[str]:
    """The rows of a sweep that ran beside the run which a report lies in."""
    try:
        found = json.loads((Path(path).parent / ROW_FILE).read_text(encoding="utf-8"))
        return list(found["beside"])
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no row of a sweep


def _placed(table: pd.DataFrame) -> pd.DataFrame:
    """Standard before nano, sections with most reports first, rows by score, problems last."""
    import pandas as pd

    table = table.assign(problem=table["problem"].fillna(""))
    good, bad = table[table["problem"] == ""].copy(), table[table["problem"] != ""].sort_values("report")
    good[list(NUMBERS)] = good[list(NUMBERS)].astype(float)
    size = good.groupby(["tier", "conditions"])["run"].transform("size")
    good = good.assign(size=size, nano=good["tier"] == "nano").sort_values(
        ["nano", "size", "conditions", *SCORES, "run"],
        ascending=[True, False, True, False, False, True],
        na_position="last",
        kind="stable",
    )
    good["place"] = [
        place for _, group in good.groupby(["tier", "conditions"], sort=False) for place in _places(group)
    ]
    return pd.concat([good[list(COLUMNS)].astype(object), bad.astype(object)], ignore_index=True)


def _places(group: pd.DataFrame) -> list[float]:
    """1 for the first row; equal scores share a place; none without a reasoning score."""
    keys = list(zip(*(group[name] for name in SCORES), strict=True))
    return [nan if key[0] != key[0] else keys.index(key) + 1 for key in keys]


# ---- as text ----


def write_leaderboard(folder: str | Path, table: pd.DataFrame) -> tuple[Path, Path]:
    """Write ``leaderboard.csv`` and ``leaderboard.md`` into a folder, each whole or not at all."""
    folder = Path(folder)
    with whole_file(folder / "leaderboard.md") as file:
        file.write(markdown(folder, table))
    return write_table(folder / "leaderboard.csv", table, index=False), folder / "leaderboard.md"


def markdown(folder: str | Path, table: pd.DataFrame) -> str:
    """The leaderboard for people: a section for each tier and conditions, then what does not count."""
    good, bad = table[table["problem"] == ""], table[table["problem"] != ""]
    lines = ["# Leaderboard", ""]
    if not len(good):
        lines += ["No report counts here.", ""]
    first: dict[str, Any] = {}
    for (tier, conditions), group in good.groupby(["tier", "conditions"], sort=False):
        own = _read(Path(folder) / group["report"].iloc[0])["conditions"]
        lines += _section(tier, conditions, group, own, first)
        first = first or own
    if len(bad):
        lines += ["## Not counted", "", *(f"- `{one.report}`: {one.problem}" for one in bad.itertuples()), ""]
    return "\n".join(lines)


def _section(
    tier: str, conditions: str, group: pd.DataFrame, own: Mapping[str, Any], first: Mapping[str, Any]
) -> list[str]:
    lines = [f"## Tier {tier}, conditions {conditions}", ""]
    if tier == "nano":
        lines += ["The nano tier shows that the workbook works; it is no measure of a large model.", ""]
    apart = differing_fields(first, own) if first else {}
    if apart:
        fields = [f"{name} ({one} there, {other} here)" for name, (one, other) in apart.items()]
        lines += [f"Not to be compared with the first section, which differs in {'; '.join(fields)}.", ""]
    lines += [*markdown_table(_shown(group)), ""]
    if len(group) > 1:
        lines += [
            "Brackets: 95 % intervals; of speeds, the range of repetitions. A higher place is no evidence of "
            "a difference: `dfqs-nb compare` tests it on the items.",
            "",
        ]
    lines += [f"- {one.run}: withheld: {one.withheld}" for one in group.itertuples() if one.withheld]
    return lines + [""] if any(group["withheld"]) else lines


def _shown(group: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for one in group.to_dict("records"):
        speed = with_interval(one, "cpu_tokens_per_sec", "{:,.1f}")
        busy = " (contended)" if one["contended"] else ""
        rows.append(
            {
                "place": "" if _empty(one["place"]) else f"{int(one['place'])}",
                "run": one["run"],
                "model": one["model"],
                "size": size_text(one["size_bytes"]),
                "reasoning_score": with_interval(one, "reasoning_score", "{:.3f}"),
                "code_score": with_interval(one, "code_score", "{:.3f}"),
                "stability at the longest": "withheld"
                if _empty(one["curve_at_longest"])
                else f"{one['curve_at_longest']:.2f} at {one['longest']:,.0f}",
                "failure_boundary_tokens": boundary_text(one),
                "cpu_tokens_per_sec": f"{speed}{busy}" if speed != "withheld" else speed,
            }
        )
    return pd.DataFrame(rows)


def size_text(nbytes: Any) -> str:
    """Bytes as people say them, in powers of ten.

    >>> size_text(61_540_805_344), size_text(5_752_864), size_text(None)
    ('61.5 GB', '5.75 MB', '')
    """
    if _empty(nbytes):
        return ""
    scale, unit = (1e9, "GB") if nbytes >= 1e9 else (1e6, "MB")
    return f"{nbytes / scale:,.3g} {unit}"


def with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    """A value and its interval as text.

    >>> with_interval({"s": 0.5, "s_low": 0.25, "s_high": None}, "s", "{:.2f}")
    '0.50 [0.25, open]'
    """
    if _empty(row[name]):
        return "withheld"
    low, high = (
        "open" if _empty(row[f"{name}_{end}"]) else form.format(row[f"{name}_{end}"])
        for end in ("low", "high")
    )
    return form.format(row[name]) + ("" if low == high == "open" else f" [{low}, {high}]")


def boundary_text(row: Mapping[str, Any]) -> str:
    """The failure boundary as text: a lower bound where it was not reached, and its cause where it is not
    quality."""
    text, status = with_interval(row, "failure_boundary_tokens", "{:,.0f}"), row["boundary_status"]
    if text == "withheld":
        return text
    if status == "right censored":
        return f"over {row['failure_boundary_tokens']:,.0f}"
    return text if status in ("quality", "") else f"{text} ({status})"


def _empty(value: Any) -> bool:
    return value is None or value == "" or value != value


def markdown_table(table: pd.DataFrame) -> list[str]:
    """The lines of a Markdown table; numbers must be text already.

    >>> import pandas as pd
    >>> markdown_table(pd.DataFrame({"a": ["1"], "b|c": ["x"]}))
    ['| a | b\\\\|c |', '|---|---|', '| 1 | x |']
    """
    rows: Sequence[Sequence[Any]] = [list(table.columns), *table.to_numpy().tolist()]
    texts = [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in rows
    ]
    return [texts[0], "|" + "---|" * len(table.columns), *texts[1:]]
