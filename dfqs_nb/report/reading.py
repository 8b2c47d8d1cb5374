"""What the notebooks of a run left, and reports that anybody may have written: read, and checked.

A stage is a dict, as its file has it; ``data/spec/stages.schema.json`` has the fields that a report reads. A
field of another type is an error, so that a fault of the workbook never passes for "not tested". A report's
hashes catch accidents. Its numbers are believed because they follow from the answers beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import nan
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb.context import Counts
from dfqs_nb.core.display import cell, counted, one_line, quoted
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256, is_file, read_json, sha256_of_file
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.core.stage import COMMAND, NOTEBOOKS, LeftOut, read_stage
from dfqs_nb.scores import SetRun

DRAWN_ON = ("merge", "header", "generate", "routing", "long_context", "scores")
MEASURING = DRAWN_ON[2:]  # stages that open the model
BESIDE = ("ladder", "serving")  # shown in the texts, and no part of the five metrics
SCORES = ("reasoning_score", "code_score")
CURVE, BOUNDARY, SPEED = "context_stability_curve", "failure_boundary_tokens", "cpu_tokens_per_sec"
FILE, SCORE_ITEMS, CONTEXT_ITEMS = "report.json", "score_items.csv", "long_context_items.csv"
Command = Mapping[str, Any]  # how a run was started
UNKNOWN: Command = {"run": "RUN", "model": "MODEL", "options": [], "tier": "", "budget_minutes": None}
LONGEST_NAME = 80  # characters, in tables and figures
# What is read of an answer to a question of a set, and to one about a long text.
COLUMNS = {"set": str, "id": str, "family": str, "guess": float, "grade": str}
CONTEXT_COLUMNS = {
    **dict.fromkeys(("question", "expected"), str),
    **dict.fromkeys(("haystack", "length", "n_needles"), int),
    **dict.fromkeys(("planned", "correct"), bool),
}
INTERVAL = ("n", "value", "low", "high", "guess_rate")
POINT = ["length", "n", "accuracy", "low", "high"]  # of the curve, in a report
Run = dict[str, Any]  # stages by name, in the order of the notebooks; without those that did not run


def fault_in(value: Any, schema: str, part: str = "") -> str:
    """Where a value does not follow a schema of ``data/spec/``, or a part of it, and why; "" if it does."""
    from jsonschema import Draft202012Validator, exceptions

    rules = read_json(data_dir() / "spec" / f"{schema}.schema.json")
    rules |= {"$ref": f"#/$defs/{part}"} if part else {}
    fault = exceptions.best_match(Draft202012Validator(rules).iter_errors(value))
    return f"{fault.json_path}: {fault.message[:200]}" if fault else ""


# ---- the stages of a run ----


def read_run(folder: str | Path) -> Run:
    """The stages of a run, each checked: its seal, the hashes of its files, its fields, its model, its tier.

    Raises:
        DfqsError: a stage is damaged, edited, or of another model or tier; or there is no run.
    """
    folder = Path(folder)
    run = stages_in(folder, sealed=True)
    if "merge" not in run:
        own = quoted(folder.absolute().name)
        hint = f"notebook 01 begins a run: `dfqs-nb run --run {own} --model MODEL`"
        raise DfqsError("this folder has no run", where=tilde(folder), hint=hint)
    drawn = {name: stage for name, stage in run.items() if name in DRAWN_ON}
    own = sha256_of(run["merge"])
    if other := next((name for name in drawn if sha256_of(drawn[name]) != own), ""):
        theirs = sha256_of(drawn[other]) or "unknown"
        what = f"is about another model ({theirs:.12}) than merge.json ({own:.12})"
        hint = f"run {NOTEBOOKS[other]} again, or give each model a run_name of its own"
        raise DfqsError(what, where=tilde(folder / f"{other}.json"), hint=hint)
    tiers = {name: stage["tier"] for name, stage in drawn.items() if stage.get("tier")}
    if len({*tiers.values()}) > 1:
        listed = ", ".join(f"{name} is {tier}" for name, tier in tiers.items())
        what = f"its stages are of different tiers ({listed})"
        raise DfqsError(what, where=tilde(folder), hint="run notebooks 05 and 06 with the same tier")
    return run


def stages_in(folder: Path, *, sealed: bool = False) -> Run:
    """The stages that a folder has, each with the fields of its schema; ``sealed``: check the seals, too.

    A DfqsError names one that is damaged.
    """
    there = [name for name in (*DRAWN_ON, *BESIDE) if (folder / f"{name}.json").exists()]
    return checked({name: read_stage(folder, name, sealed=sealed) for name in there}, folder)


def checked(run: Run, folder: Path = Path()) -> Run:
    """Stages as they were written; a DfqsError names a field that is missing or of another type."""
    for name, stage in run.items():
        if isinstance(rows := stage.get("left_out"), list):  # texts, in files of earlier versions
            stage["left_out"] = [LeftOut(it)._asdict() if isinstance(it, str) else it for it in rows]
        if fault := fault_in(stage, "stages", name):
            where, hint = tilde(folder / f"{name}.json"), f"run {NOTEBOOKS[name]} again"
            raise DfqsError(fault.removeprefix("$."), where=where, hint=hint)
    return run


def settings_of(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    """The conditions under which a stage ran; None for one that it does not state."""
    return defaultdict(lambda: None, stage.get("conditions", {}))


def on_gpu(stage: Mapping[str, Any]) -> str:
    """Which layers of the model were on a GPU, in words; "" for none, and without a stage."""
    n, loaded = (settings_of(stage)[name] for name in ("n_gpu_layers", "offloaded_layers"))
    some = "all layers" if n == -1 else counted(loaded or n, "layers") if n else "unknown layers"
    return "" if not stage or n == 0 or loaded == 0 else some


def sha256_of(stage: Mapping[str, Any]) -> Any:
    """SHA-256 of the model that a stage is about; None where it states none."""
    return stage["model"]["sha256"] if stage.get("model") else settings_of(stage)["model"]


def command_of(folder: Path, run: Run) -> dict[str, Any]:
    """How a run was started: its name, model, tier, other options, and minutes of budget; None: by hand."""
    kept = dict[str, Any]()
    with suppress(OSError, ValueError, TypeError, LookupError):  # absent, or of another form
        it = read_json(folder / COMMAND)
        kept = {"options": list(map(str, it["options"])), "budget_minutes": float(it["budget_minutes"])}
        kept["tier"] = str(it.get("tier", ""))
    own = {"run": folder.resolve().name, "model": settings_of(run["merge"])["model"] or "MODEL"}
    return {**UNKNOWN, **kept, **own}


def rerun(stages: Sequence[str], command: Command, *, more: bool = False) -> str:
    r"""The command that runs some stages (none: all) and the report again, as the run was started.

    ``more``: with twice its budget.

    >>> nano = {"run": "nano", "model": "m.gguf", "options": ["-p", "n_ctx=512"], "budget_minutes": 5.0}
    >>> print(rerun(["scores"], nano), rerun([], nano, more=True), sep="\n")
    `dfqs-nb run 06 07 --run nano -p n_ctx=512 --budget-minutes 5`
    `dfqs-nb run --run nano --model m.gguf -p n_ctx=512 --budget-minutes 10`
    """
    numbers = [NOTEBOOKS[name][:2] for name in (*stages, "dfqs_report")] if stages else []
    model = [] if stages else ["--model", command["model"]]
    minutes = (command["budget_minutes"] or 60 * more) * (1 + more)
    budget = ["--budget-minutes", f"{minutes:g}"] if minutes else []
    tier = ["--tier", command["tier"]] if command.get("tier") else []
    words = ["dfqs-nb", "run", *numbers, "--run", command["run"], *model, *tier, *command["options"], *budget]
    return f"`{' '.join(map(quoted, words))}`"


def on_cpu(command: Command) -> str:
    """The command that measures a run again without a GPU."""
    words = command["options"]  # flags, each with its value
    pairs = [pair for pair in zip(words[::2], words[1::2], strict=False) if "n_gpu_layers=" not in pair[1]]
    again = {**command, "options": [*sum(pairs, ()), "-p", "n_gpu_layers=0"]}
    return f"{rerun(MEASURING, again)} measures all on the CPU, and replaces these results"


def not_run(missing: Sequence[str], run: Run, command: Command) -> str:
    """Which notebooks did not run, and the command that runs all of which the run has nothing."""
    *first, last = (NOTEBOOKS[name][:2] for name in missing)
    named = f"notebooks {', '.join(first)} and {last}" if first else f"notebook {last}"
    absent = [name for name in DRAWN_ON if name not in run]
    return f"{named} did not run; {rerun(absent, command)} makes up for it"


# ---- a report ----


def sealed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with the hash of its content."""
    body = {key: value for key, value in report.items() if key != "integrity"}
    return {**body, "integrity": {"sha256": canonical_sha256(body)}}


def read_report(path: str | Path) -> dict[str, Any]:
    """A report, from its file or its folder, checked: schema, hashes, contradictions; else a DfqsError."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        report: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        hint = f"run {NOTEBOOKS['dfqs_report']}, or `dfqs-nb report RUN`"
        raise DfqsError("there is no report", where=tilde(path), hint=hint) from None
    except (OSError, ValueError) as error:
        raise stale(path, f"is not JSON ({error})") from error
    check_report(report, path)
    return report


def check_report(report: Any, path: str | Path) -> None:
    """Check a report against the schema, its own hashes and itself; a DfqsError names the first fault."""
    if fault := fault_in(report, "report"):
        wrong = f"does not follow the schema at {fault} (edited, or of another version of the workbook)"
    elif sealed(report)["integrity"] != report["integrity"]:
        wrong = "was edited after it was written"
    elif canonical_sha256(report["conditions"]) != report["conditions_sha256"]:
        wrong = "its conditions do not have the hash that it states"
    elif clashes := [name for name, value in report["metrics"].items() if value != stated(report, name)]:
        wrong = f"contradicts itself about {', '.join(clashes)}"
    else:
        return
    raise stale(path, wrong)


def stale(path: str | Path, what: str) -> DfqsError:
    """The error for a file of a report that was edited, or is of another time than the others."""
    again = f"`dfqs-nb report {quoted(Path(path).absolute().parent.name)}`"
    return DfqsError(what, where=tilde(path), hint=f"write the report again: {again}")


def stated(report: Mapping[str, Any], metric: str) -> Any:
    """A metric as its details state it; None where they contradict themselves, which no schema can see."""
    detail = report["details"][metric]
    if metric == BOUNDARY and detail["value"] is not None:
        return detail["tokens"] if detail["value"] == detail["tokens"] else None
    if metric == CURVE and isinstance(detail["value"], list):
        return detail["value"] if len(detail["value"]) == len(detail["lengths"]) else None
    if metric == SPEED and (values := detail.get("values")):
        made = [median(values), min(values), max(values), len(values)]
        return detail["value"] if same(made, [detail[key] for key in ("value", "low", "high", "n")]) else None
    return detail["value"]


@dataclass(frozen=True)
class RunItems:
    """A report (at ``path``) with the answers that it was made from; what it withholds has none.

    ``label`` is how tables call the model; ``scores`` has by metric the tier's set with its answers and the
    score that they give; ``context`` the long-context answers.
    """

    label: str
    path: Path
    report: Mapping[str, Any]
    scores: Mapping[str, SetRun]
    context: pd.DataFrame = field(repr=False)

    def stated(self, metric: str) -> dict[str, float]:
        """Count, value and interval as the report states them; NaN where it states none."""
        given = {name: self.report["details"][metric][name] for name in ("n", "value", "low", "high")}
        return {name: nan if value is None else float(value) for name, value in given.items()}


def read_answers(path: str | Path) -> RunItems:
    """A report, from its file or its run's folder, with its answers.

    A DfqsError where answers are missing, were edited, or do not give the report's numbers.
    """
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    report, folder = read_report(path), path.parent
    listed = [item for group in report["items"].values() for item in group]
    for name, digest in {item["file"]: item["sha256"] for item in listed}.items():
        file = folder / name
        if not is_file(file) or not file.resolve().is_relative_to(folder.resolve()):
            raise _refused(folder, f"the report's items are missing ({name})")
        if sha256_of_file(file) != digest:
            raise _refused(folder, f"{name} is not the file that the report was made from")
    name, given = one_line(report["model"]["name"])[:LONGEST_NAME], report["details"]
    return RunItems(name, path, report, _scores(given, folder), _context(given, folder, report["command"]))


def _refused(where: Path, what: str) -> DfqsError:
    return DfqsError(what, where=tilde(where), hint="run notebooks 05 to 07 again")


def _answers(path: Path, columns: Mapping[str, type]) -> pd.DataFrame:
    try:
        return pd.read_csv(path, keep_default_na=False, dtype=dict(columns), usecols=list(columns))
    except (OSError, ValueError, OverflowError) as error:
        raise _refused(path, f"cannot be read ({str(error)[:200]})") from error


def _agree(path: Path, name: str, made: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    for key, own in made.items():
        if not same(own, stated.get(key)):
            theirs = cell(stated.get(key))
            raise _refused(path, f"its items give {name} {key} {cell(own)}, and the report states {theirs}")


def same(a: Any, b: Any) -> bool:
    """Whether two values of a report, or lists of numbers, are equal but for the digits that JSON keeps."""
    with suppress(TypeError, ValueError):  # a text, or none
        return bool(a == b or (np.shape(a) == np.shape(b) and np.allclose(a, b, atol=1e-9)))
    return False


def _scores(details: Mapping[str, Any], folder: Path) -> dict[str, SetRun]:
    stated = {name: details[name] for name in SCORES if details[name]["value"] is not None}
    if choices := details["reasoning_score"].get("choices"):
        stated["choice_score"] = choices
    if not stated:
        return {}
    path, scores = folder / SCORE_ITEMS, dict[str, SetRun]()
    items = _answers(path, COLUMNS)
    for name, detail in stated.items():
        own = items[items["set"] == detail["set"]]
        scores[name] = SetRun.of(name.removesuffix("_score"), detail["set"], own, n_items=detail["n"])
        score = scores[name].score
        _agree(path, name, {key: getattr(score, key) for key in INTERVAL}, detail)
    return scores


def _context(details: Mapping[str, Any], folder: Path, command: Command) -> pd.DataFrame:
    """The long-context answers, from which curve and boundary follow; no answer shows a runtime failure."""
    curve, boundary, path = details[CURVE], details[BOUNDARY], folder / CONTEXT_ITEMS
    if curve["value"] is None and boundary["value"] is None:
        return pd.DataFrame()
    if not is_file(path):
        hint = f"{rerun(['long_context'], command)} writes them; it asks again only what was not kept"
        raise DfqsError("the long-context answers of this report are missing", where=tilde(path), hint=hint)
    items = _answers(path, CONTEXT_COLUMNS)
    if items.empty or (items[["length", "n_needles"]] < 1).any(axis=None):
        raise _refused(path, "holds no answers, or some without a length or a key")
    counts = Counts.of(items)
    if curve["value"] is not None:
        rows, points = counts.curve(), pd.DataFrame(curve["points"], columns=POINT)
        made = {"value": rows.loc[rows["planned"], "curve"].tolist(), "guess_rate": counts.guess_rate}
        _agree(path, CURVE, made | rows[POINT].to_dict("list"), {**curve, **points.to_dict("list")})
    if boundary["value"] is not None:
        found = counts.boundary()
        if boundary.get("cause") not in (None, "quality"):
            found = found.capped(boundary["tokens"], boundary["cause"])
        _agree(path, BOUNDARY, {**asdict(found), "n": found.n_items}, boundary)
    return items
