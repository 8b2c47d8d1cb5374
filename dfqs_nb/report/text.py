"""A report as people and the hub read it, and its files: written, sealed and checked together.

The prose is in the templates.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from dfqs_nb.core.display import NONE, counted, duration, plain
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import is_file, sha256_of_file, write_json, write_text
from dfqs_nb.core.paths import tilde
from dfqs_nb.core.stage import NOTEBOOKS, LeftOut, Stage, read_stage
from dfqs_nb.report import reading, requirements
from dfqs_nb.report.metrics import METRICS
from dfqs_nb.report.reading import BESIDE, BOUNDARY, CURVE, FILE, SCORES, SPEED, rerun
from dfqs_nb.report.requirements import MET, NOT_APPLICABLE, NOT_MET, NOT_TESTED
from dfqs_nb.report.template import FEW_QUESTIONS, GB, link, render, sentence, spec_table

SEALED = "dfqs_report"  # the stage of notebook 07
YES, NO, PARTLY, UNKNOWN = "yes", "no", "in part", "unknown"
SYMBOLS = {YES: "✓", NO: "✗", PARTLY: "~", UNKNOWN: "?", NOT_APPLICABLE: "–"}
NEAR_GUESSING = 0.1  # a score is a cross where its interval excludes more than this above guessing
UNMEASURED = ("metrics", NOT_MET)  # the one requirement that is not met because something was not measured
MARKS = {MET: YES, NOT_MET: NO, NOT_TESTED: UNKNOWN, NOT_APPLICABLE: NOT_APPLICABLE}  # of a requirement
UNJUDGED = {"verdict": NOT_TESTED, "evidence": "not judged in this report"}
NANO_LONGEST = ("nano", 2048)  # notebook 05's own default, in tokens: nobody asked for it
NEEDS = {"kv_bytes": "KV cache", "compute_bytes": "compute buffer", "need_bytes": "with all weights"}
# By the macro that answers it: the question, the section that has the evidence, and the demand that is it.
QUESTIONS = {
    "sound": ("Is the file sound?", "requirements", "single-file"),
    "runs": ("Does it run here, and how fast?", "metrics", "cpu-constrained"),
    "routing": ("Is routing deterministic?", "requirements", "routing-deterministic"),
    "context": ("How far does the context carry?", "metrics", ""),
    "scores": ("What does it score?", "metrics", ""),
    "demands": ("Which demands of DFQS are met?", "requirements", ""),
}


class Line(NamedTuple):
    """One question: ``mark`` is one of `SYMBOLS`, and ``section`` of the report has the evidence."""

    mark: str
    question: str
    answer: str
    caveat: str
    section: str
    symbol: str


@dataclass(frozen=True, repr=False)
class Verdict:
    """The lines of a report's verdict, in order."""

    title: str
    place: str  # where it ran
    lines: tuple[Line, ...]

    @property
    def summary(self) -> list[str]:
        """A sentence for each line."""
        sentences = (f"{line.symbol} {line.question} {line.answer} {line.caveat}" for line in self.lines)
        return [plain(text.rstrip()) for text in sentences]

    def __repr__(self) -> str:
        return "\n".join([self.title, self.place, *self.summary])

    def _repr_markdown_(self) -> str:
        return render("verdict.md", verdict=self)


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a report that `read_report` or `build_report` gave."""
    rows, details, lines = {row["id"]: row for row in report["conformance"]}, report["details"], []
    marks = {"context": _carries(report), "scores": _scores(details), "demands": _demands(rows)}
    timed, ran = details[SPEED].get("notebook_03") or details[SPEED], rows.get("llama-cpp", UNJUDGED)
    is_open = timed["value"] is None or timed.get("contended")
    marks["runs"] = PARTLY if ran["verdict"] == MET and is_open else MARKS[ran["verdict"]]  # also on a GPU
    for name, (question, section, demand) in QUESTIONS.items():
        row = rows.get(demand, UNJUDGED)
        mark = marks.get(name, MARKS[row["verdict"]])
        answer, _, caveat = sentence(name, report, row["evidence"], mark).partition("\n")
        answer, caveat = (text and f"{text[0].upper()}{text[1:]}." for text in (answer, caveat))
        lines.append(Line(mark, question, answer, caveat, section, SYMBOLS[mark]))
    name, place = plain(report["model"]["name"]), plain(sentence("ran_on", report["machine"]))
    return Verdict(f"{name}, {report['specification']}, {report['tier']} tier", place, tuple(lines))


def _carries(report: Mapping[str, Any]) -> str:
    """A tick: nothing failed up to the whole context; a cross: no better than guessing; in part: all between.

    The whole context is what the header declares, or the longest length that the run was told to measure.
    """
    boundary, curve = report["details"][BOUNDARY], report["details"][CURVE]
    is_floor, few = boundary.get("status") == "floor", boundary.get("provisional")
    if boundary["withheld"] or (is_floor and few):  # nobody can tell a few texts from guessing
        return UNKNOWN
    asked = 0 if (report["tier"], curve.get("longest")) == NANO_LONGEST else curve.get("longest")
    whole = min(filter(None, (report["model"].get("context_length"), asked)), default=inf)
    is_reached = 2 * max(curve.get("lengths") or [0]) > whole  # lengths double: none of them lies beyond
    held = boundary.get("right_censored") and is_reached and not few
    return NO if is_floor else YES if held else PARTLY


def _scores(details: Mapping[str, Any]) -> str:
    """A tick: better than guessing; a cross: the interval excludes that by much; else nobody knows.

    A score that nobody can guess, such as code, is above guessing from one right answer on: it has no mark.
    """
    marks, choices = set(), details["reasoning_score"].get("choices")
    for score in (*(details[name] for name in SCORES), *([choices] if choices else [])):
        if score.get("withheld"):
            marks.add(UNKNOWN)
        elif score["low"] > score["guess_rate"] > 0:
            marks.add(YES)
        elif score["guess_rate"] > 0:
            is_near = score["high"] <= score["guess_rate"] + NEAR_GUESSING
            marks.add(NO if is_near and score["n"] >= FEW_QUESTIONS else UNKNOWN)
    return marks.pop() if len(marks) == 1 else PARTLY if YES in marks else NO if marks else UNKNOWN


def _demands(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A cross where a demand is refuted. A metric that was not measured refutes none."""
    own = [(row["id"], row["verdict"]) for row in rows.values() if row["level"] not in ("SHOULD", "MAY")]
    binding = {NOT_TESTED if it == UNMEASURED else it[1] for it in own} - {NOT_APPLICABLE}
    if not binding:
        return UNKNOWN
    return NO if NOT_MET in binding else YES if binding == {MET} else PARTLY


def tables(report: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """What a report holds, as frames to show."""
    lines = [(name, sentence("metric", name, report["details"][name])) for name in report["metrics"]]
    columns = ["number", "document", "section", "claim", "found", "verdict", "evidence", "source"]
    stated = pd.DataFrame(report["claims"], columns=["id", *columns]).set_index("id")
    demands = pd.DataFrame(report["conformance"], columns=requirements.COLUMNS).set_index("id")
    demands.loc[demands["level"] == "MAY", "verdict"] = demands["verdict"].replace(requirements.OPTION)
    return {
        "metrics": pd.DataFrame(lines, columns=["metric", "value"]).set_index("metric"),
        "requirements": demands,
        "claims": stated,
        "needs": needs_table(report["hardware_envelope"]),
    }


def needs_table(envelope: Mapping[str, Any]) -> pd.DataFrame:
    """A row a context: sizes in GB or (of a small model) MB, then what holds them."""
    rows = pd.DataFrame(envelope["rows"]).set_index("n_ctx")
    unit, scale = ("GB", GB) if rows["need_bytes"].min() >= GB else ("MB", 10**6)
    sizes = (rows[list(NEEDS)].astype(float) / scale).rename(columns=NEEDS).add_suffix(f" ({unit})")
    return sizes.dropna(axis="columns", how="all").join(pd.DataFrame(rows["fits"].to_dict()).T)


def texts(report: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The report for people: Markdown, for a model card too, and one HTML page.

    The page opens anywhere: figures inside, no scripts, nothing fetched.
    """
    shown = view(report, folder)
    return {name: render(name, **shown) for name in ("report.md", "report.html")}


def view(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All that the templates of a report show; they write numbers as `core.display.cell` does."""
    details, beside = report["details"], _beside(report, folder)
    ran, versions = report["machine"], report["versions"].items()
    other = {f"{name}, of this report": value for name, value in versions if ran.get(name) != value}
    model = {name: it for name, it in report["model"].items() if name != "relation_to_artifact"}
    paging = report["hardware_envelope"].get("paging") or {}
    is_paged = any(value != "0 B" for name, value in paging.items() if name.startswith("forecast: read"))
    drawn = {
        "context_curve": details[CURVE].get("points"),
        "score_families": any(details[name]["value"] is not None for name in SCORES),
    }
    return {
        "report": report,
        "absent": {*BESIDE, "budgets"} - set(beside) | (set() if report["claims"] else {"claims"}),
        "figure": lambda name: _figure(folder, name),
        "is_drawn": lambda name: f"{name}.png" in report["sources"] and bool(drawn.get(name, True)),
        "verdict": verdict(report),
        **{name: frame.reset_index() for name, frame in tables(report).items()},
        "has_scores": drawn["score_families"],
        "curve": retrieval(details[CURVE]),
        "documents": spec_table("claims")["documents"],
        "link": link,
        "paging": _pairs(paging if is_paged else {}, "a token of decode, predicted and measured"),
        "beside": beside,
        "source": beside.get("ladder", {}).get("source"),
        "model": _pairs({name.replace("_", " "): it for name, it in model.items()}, "of the model"),
        "conditions": _conditions(report["conditions"]),
        "machine": _pairs({**ran, **other}, "where it ran"),
    }


def _pairs(facts: Mapping[str, Any], name: str) -> pd.DataFrame:
    return pd.DataFrame(facts.items(), columns=[name, "value"], dtype=object)


def _conditions(conditions: Mapping[str, Any]) -> pd.DataFrame:
    """A row for each value of a condition, with the sets of questions that it is of."""
    scores = conditions.get("scores", {})
    common = {name: it for name, it in scores.items() if not isinstance(it, Mapping)}
    parts = {name: {**common, **it} for name, it in scores.items() if isinstance(it, Mapping)}
    sets = list(parts)
    parts = (parts or {"scores": common}) | {name: it for name, it in conditions.items() if name != "scores"}
    found: dict[str, dict[str, tuple[Any, list[str]]]] = {}
    for part, own in parts.items():
        for name, value in pd.json_normalize(own).to_dict("index").get(0, {}).items():
            found.setdefault(name, {}).setdefault(str(value), (value, []))[1].append(part)
    names = {tuple(parts): "all", tuple(sets): "all of scores"}
    rows = [
        (name, value, names.get(tuple(of), ", ".join(of)))
        for name, values in found.items()
        for value, of in values.values()
    ]
    return pd.DataFrame(rows, columns=["condition", "value", "of"], dtype=object)


def retrieval(curve: Mapping[str, Any]) -> pd.DataFrame:
    """Retrieval by length: the points of the curve, and those that were added for the boundary."""
    shown = []
    for row in curve.get("points") or []:
        accuracy, interval = f"{row['accuracy']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"
        relative = "" if row.get("curve") is None else f"{row['curve']:.2f}"
        if None not in (row.get("curve_low"), row.get("curve_high")):
            relative += f" [{row['curve_low']:.2f} to {row['curve_high']:.2f}]"
        shown.append((row["length"], row["n"], row.get("texts"), accuracy, interval, relative))
    columns = ["context (tokens)", "n", "texts", "right answers", "95 % interval", "curve [95 % interval]"]
    return pd.DataFrame(shown, columns=columns)


def _beside(report: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """What else there is: ladder and serving; each stage's budget, and what it left out.

    ``table``: a frame; ``lines`` below it; ``source``: of a ladder.
    """
    stages, budgets = reading.stages_in(folder), []
    for name, stage in stages.items():
        if budget := stage.get("budget"):
            used, given = budget["used_seconds"], budget["seconds"]
            taken = f"{duration(used)} of {duration(given)}"
            if given < 90 <= used:  # one unit for both
                taken = f"{used:,.0f} s of {given:,.0f} s"
            missing = "".join(f"; cut: {LeftOut(**it)}" for it in stage.get("left_out") or ())
            budgets.append(f"{NOTEBOOKS[name].removesuffix('.ipynb')}: {taken}{missing}")
    if any(stage.get("left_out") for stage in stages.values()):
        budgets.append(f"A larger budget measures more: {rerun([], report['command'], more=True)}")
    found: dict[str, dict[str, Any]] = {"budgets": {"lines": budgets}} if budgets else {}
    for name in (it for it in BESIDE if it in stages):
        stage = stages[name]
        table = pd.DataFrame(stage.get("shown", []), dtype=object).fillna(NONE)
        lines = stage["notes"] if len(table) and "notes" in stage else stage.get("summary", [])
        found[name] = {"table": table, "lines": lines, "source": stage.get("source")}
    return found


def _figure(folder: Path, name: str) -> str:
    """A figure as the address of itself."""
    file = folder / f"{name}.svg"
    if not file.is_file():
        raise DfqsError("the figure is missing", where=tilde(file), hint="run its notebook again")
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


# ---- written, sealed and checked together ----


def write_report(stage: Stage | str | Path, report: Mapping[str, Any]) -> list[Path]:
    """Write every file of a report into its run's folder, and seal them; their paths.

    ``stage``: the stage ``dfqs_report``, or the run's folder.
    """
    stage = stage if isinstance(stage, Stage) else Stage(Path(stage), SEALED)
    reading.check_report(report, stage.folder / FILE)
    made = {**texts(report, stage.folder), "model-index.yml": hub_form(report)}  # before one is written
    written = [write_json(stage.path(FILE), report)]
    for name, text in made.items():
        if text:
            written.append(write_text(stage.path(name), text))
        else:  # one of an earlier report would state what this one withholds
            (stage.folder / name).unlink(missing_ok=True)
    lines = [sentence("nano_tier")] * (report["tier"] == "nano") + verdict(report).summary
    return [*written, stage.finish(conditions=report["conditions"], tier=report["tier"], summary=lines)]


def check_run(folder: str | Path) -> list[str]:
    """Check a report and everything that it stands on; a line for each file that was checked.

    Its schema, hashes and contradictions; every stage's seal; its texts, rendered again; its scores, curve
    and boundary, counted again from the answers; its speed, from the repetitions. A DfqsError names the first
    fault.
    """
    folder = Path(folder)
    items = reading.read_answers(folder)
    stages = reading.stages_in(folder, sealed=True) | {SEALED: read_stage(folder, SEALED, sealed=True)}
    known = {name: digest for stage in stages.values() for name, digest in stage["files"].items()}
    unstated = {f"{name}.json": "" for name in stages if name in reading.DRAWN_ON}
    for name, then in (unstated | items.report["sources"]).items():
        if name not in known and is_file(folder / name):  # a seal covers the others
            known[name] = sha256_of_file(folder / name)
        if known.get(name) != then:
            raise reading.stale(folder / name, "is missing, or was changed since the report was written")
    for name, text in texts(items.report, folder).items():
        path = folder / name
        if not is_file(path) or path.read_text(errors="replace", encoding="utf-8") != text:
            why = "edited, or written by another version of the workbook"
            raise reading.stale(path, f"is not what {FILE} gives: {why}")
    lines = [
        f"{name}.json: as it was written, with {counted(len(it['files']), 'files')}"
        for name, it in stages.items()
    ]
    given = [name for name, value in items.report["metrics"].items() if value is not None]
    again = ", ".join([*items.scores, *(name for name in (CURVE, BOUNDARY) if name in given)])
    lines.append(f"counted again from the answers: {again or 'nothing'}")
    if SPEED in given:
        values = items.report["details"][SPEED].get("values")
        lines.append(f"{'counted again from its repetitions' if values else 'not counted again'}: {SPEED}")
    return [f"{FILE}: as it was written", *lines]


def hub_form(report: Mapping[str, Any]) -> str:
    """``model-index.yml``, the block of that name for the front matter of a card; "" without metrics.

    It takes numbers alone, so a curve, a boundary that is censored or provisional, and a score of fewer than
    `FEW_QUESTIONS` have no entry.
    """
    import huggingface_hub as hub
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index = []
    for name, (_, _, kind, _) in METRICS.items():
        detail = report["details"][name]
        is_few = name in SCORES and detail["n"] < FEW_QUESTIONS
        is_bound = detail.get("right_censored") or detail.get("provisional")
        if detail["withheld"] or not kind or is_few or is_bound:
            continue
        stated, asked = sentence("metric", name, detail), detail.get("set") or f"{report['tier']}-{name}"
        value = detail["value"] if isinstance(detail["value"], int) else float(f"{detail['value']:.6g}")
        facts = {"conditions_sha256": report["conditions_sha256"], "n": detail["n"], "stated": stated}
        facts |= {"contended": True} if detail.get("contended") else {}
        about: dict[str, Any] = {"dataset_type": f"dfqs-{asked}", "dataset_name": f"DFQS 1.0, {asked}"}
        about |= {"task_type": "text-generation", "task_name": "Text generation", "metric_type": kind}
        index.append(hub.EvalResult(metric_name=name, metric_value=value, dataset_args=facts, **about))
    if not index:
        return ""
    form = {"model-index": eval_results_to_model_index(plain(report["model"]["name"]), index)}
    first = f"# {sentence('nano_tier')}\n" if report["tier"] == "nano" else ""
    return first + str(yaml.safe_dump(form, sort_keys=False, allow_unicode=True))
