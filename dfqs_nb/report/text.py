"""A report as people read it: Markdown, one HTML page, two forms for the hub. The prose is in templates."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.core import display
from dfqs_nb.core.paths import public_address
from dfqs_nb.core.stage import NOTEBOOKS
from dfqs_nb.report import requirements
from dfqs_nb.report.envelope import envelope_tables
from dfqs_nb.report.metrics import CURVE, METRICS, SCORES, SPEED, metric_sentence
from dfqs_nb.report.spec import claims_spec, link, spaced
from dfqs_nb.report.stages import BESIDE, ReportError, stages_in
from dfqs_nb.report.template import render
from dfqs_nb.report.verdicts import verdict

SMALL = "Nano tier: made with the small prompt sets of the embedded reference model. "
NANO = f"{SMALL}No measurement here is evidence about a real model."
HUB_SETS = {"standard-code": ("openai/openai_humaneval", "openai_humaneval")}  # that exist as data sets there
OF_MODEL = {"name": "file", "name_in_header": "name in its header", "sha256": "SHA-256"}
OF_MODEL |= {"size_bytes": "size (bytes)", "relation_to_artifact": "relation to the artifact"}
RELATIONS = {
    "artifact": "it is the artifact",
    "model": "the artifact's model in another quantization",
    "reference": "none: it is the reference model, which the workbook carries",
}


def tables(report: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """What a report holds, as frames to show; what is about the artifact as ``artifact_...``."""
    lines = [(name, metric_sentence(name, report["details"][name])) for name in report["metrics"]]
    columns = ["number", "document", "section", "claim", "found", "verdict", "evidence", "source"]
    stated = pd.DataFrame(report["claims"], columns=["id", *columns]).set_index("id")
    frames = {
        "metrics": pd.DataFrame(lines, columns=["metric", "value"]).set_index("metric"),
        "requirements": pd.DataFrame(report["conformance"], columns=requirements.COLUMNS).set_index("id"),
        "claims": stated,
        "contradicted": stated[stated["verdict"].str.startswith("contradict")],
        **envelope_tables(report["hardware_envelope"]["model"]),
    }
    if artifact := report["hardware_envelope"]["artifact"]:
        frames |= {f"artifact_{name}": frame for name, frame in envelope_tables(artifact).items()}
    return frames


def _pairs(facts: Mapping[str, Any], name: str) -> pd.DataFrame:
    return pd.DataFrame(facts.items(), columns=[name, "value"], dtype=object)


def view(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All that the templates of a report show; they write numbers as `core.display.cell` does."""
    frames, details, beside = tables(report), report["details"], _beside(folder)
    envelopes, curve, ran = report["hardware_envelope"], details[CURVE], report["machine"]
    versions = report["versions"].items()
    other = {f"{name}, of this report": value for name, value in versions if ran.get(name) != value}
    drawn = {
        "context_curve": curve.get("points"),
        "score_families": any(details[name]["value"] is not None for name in SCORES),
        "decode_roofline": details[SPEED]["value"],
    }
    values = {
        "report": report,
        "created": f"{report['created'][:10]}, {report['created'][11:16]} UTC",
        "absent": {*BESIDE, "left_out"} - set(beside) | (set() if report["claims"] else {"claims"}),
        "figure": lambda name: _figure(folder, name, report["sources"]),
        "is_drawn": lambda name: f"{name}.png" in report["sources"] and bool(drawn.get(name, True)),
        "nano": NANO if report["tier"] == "nano" else "",
        "verdict": verdict(report),
        "demonstration": report["model"].get("relation_to_artifact") == "reference" and report["claims"],
        "metrics": frames["metrics"].reset_index(),
        "has_scores": drawn["score_families"],
        "curve": _curve(curve),
        "guesses": guesses(curve),
        "added": [row for row in curve.get("points", []) if row["length"] not in curve.get("lengths", [])],
        "requirements": frames["requirements"].reset_index(),
        "claims": frames["claims"].reset_index(),
        "documents": claims_spec()["documents"],
        "link": link,
        "envelopes": [_envelope(it) for it in (envelopes["model"], envelopes["artifact"]) if it],
        "paging": _paging(envelopes.get("paging") or {}),
        "beside": beside,
        "model": _model(report["model"]),
        "conditions": _pairs(pd.json_normalize(report["conditions"]).to_dict("records")[0], "condition"),
        "machine": _pairs({**report["machine"], **other}, "where it ran"),
    }
    body = render("report.md", occurs=lambda word, seen: False, **values)
    return values | {"occurs": lambda word, seen: bool(re.search(seen or _forms(word), body))}


def _forms(term: str) -> str:
    """A pattern of the words of a glossary's term, which commas divide; capitals stand for themselves."""
    words = "|".join(rf"\b{re.escape(word)}(?:s|es)?\b" for word in term.split(", "))
    return words if term.isupper() else f"(?i:{words})"


def _model(model: Mapping[str, Any]) -> pd.DataFrame:
    """What the report says of its model, with names that people read."""
    told = {**model, "relation_to_artifact": RELATIONS.get(model.get("relation_to_artifact", ""))}
    facts = {OF_MODEL.get(key, key.replace("_", " ")): it for key, it in told.items() if it is not None}
    return _pairs(facts, "of the model")


def _paging(rows: Mapping[str, str]) -> pd.DataFrame:
    """What a token was predicted to read from the disk, and did; nothing where memory holds the model."""
    is_read = any(value != "0 B" for name, value in rows.items() if name.startswith("a token reads"))
    named = {name.replace("a token reads", "read from the disk for a token"): rows[name] for name in rows}
    named = {name: spaced(value) for name, value in named.items()} if is_read else {}
    return _pairs(named, "a token of decode, predicted and measured")


def guesses(curve: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By task of retrieval: wrong answers, those of another key, guess rate, lengths and those above it.

    The curve's rule: one of the keys where at least half of the wrong answers are another key's, else 0.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for row in curve.get("tasks") or []:
        counted = tasks.setdefault(row["task"], {"wrong": 0, "another_key": 0})
        for name in counted:
            counted[name] += row.get(name) or 0
    for task, counted in tasks.items():
        likely, keys = 2 * counted["another_key"] >= counted["wrong"], curve.get("n_keys") or 0
        counted["guess_rate"] = 1 / keys if keys > 1 and likely else 0.0
        lows = [row["low"] for row in curve["tasks"] if row["task"] == task]
        counted |= {"lengths": len(lows), "above": sum(low > counted["guess_rate"] for low in lows)}
    return tasks


def _curve(detail: Mapping[str, Any]) -> pd.DataFrame:
    """Retrieval by task and length: every task that was asked, or the points of the curve."""
    rates, own = guesses(detail), {"guess_rate": detail["guess_rate"] or 0}
    points = [{"task": "the curve's task", **row} for row in detail.get("points") or []]
    rows = [
        {
            "task": row["task"],
            "context (tokens)": row["length"],
            "n": row["n"],
            "right answers": f"{row['accuracy']:.2f}",
            "95 % interval": f"{row['low']:.2f} to {row['high']:.2f}",
            "guess rate": f"{rates.get(row['task'], own)['guess_rate']:.2f}",
        }
        for row in detail.get("tasks") or points
    ]
    return pd.DataFrame(rows)


def _envelope(envelope: Mapping[str, Any]) -> dict[str, Any]:
    frames = {name: frame.reset_index() for name, frame in envelope_tables(envelope).items()}
    frames["cache"] = frames["cache"].rename(columns={"n_ctx": "context (tokens)"})
    counted = sorted({f"{row['resource']}: {row['counted']}" for row in envelope["fits"]})
    of_gpus = any(row["resource"] == "VRAM" for row in envelope["fits"])
    return {**envelope, "tables": frames, "counted": counted, "of_gpus": of_gpus}


def _beside(folder: Path) -> dict[str, list[str]]:
    """What else there is: the summaries of ladder and serving, and what any stage's budget left out."""
    stages = stages_in(folder)
    lines = {name: stages[name].get("summary", []) for name in BESIDE if name in stages}
    lines["left_out"] = [
        f"{NOTEBOOKS[name].removesuffix('.ipynb')}: {sentence}"
        for name, stage in stages.items()
        for sentence in stage.get("left_out") or ()
    ]
    return {name: [spaced(str(line)) for line in own] for name, own in lines.items() if own}


def markdown(report: Mapping[str, Any], folder: Path) -> str:
    """The report for people, and for the text of a model card."""
    return render("report.md", **view(report, folder))


def page(report: Mapping[str, Any], folder: Path) -> str:
    """The report as one HTML page that opens anywhere: figures inside, no scripts, nothing fetched."""
    return render("report.html", **view(report, folder))


def _figure(folder: Path, name: str, sources: Mapping[str, str]) -> str:
    """A figure as the address of itself: as SVG, or as PNG where the run has no other."""
    suffix, kind = ("svg", "svg+xml") if f"{name}.svg" in sources else ("png", "png")
    file = folder / f"{name}.{suffix}"
    if not file.is_file():
        raise ReportError("the figure is missing", where=file, hint="run its notebook again")
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


# ---- the hub's two forms ----


def hub_forms(report: Mapping[str, Any]) -> dict[str, str]:
    """The files that the hub reads, by name; "" without metrics. The curve has no entry: both take numbers.

    ``model-index.yml``: the block ``model-index`` for the front matter of a card.
    ``.eval_results/dfqs.yaml``: the file of that name in a model's repository.
    """
    import huggingface_hub as hub
    import yaml
    from huggingface_hub.repocard_data import eval_results_to_model_index

    index, entries, address = [], [], public_address()
    for name, (_, _, kind, _) in METRICS.items():
        detail = report["details"][name]
        if detail["withheld"] or not kind:
            continue
        stated, questions = metric_sentence(name, detail), detail.get("set") or f"{report['tier']}-{name}"
        value = detail["value"] if isinstance(detail["value"], int) else float(f"{detail['value']:.6g}")
        facts = {"conditions_sha256": report["conditions_sha256"], "n": detail["n"], "stated": stated}
        about: dict[str, Any] = {
            "dataset_type": f"dfqs-{questions}",
            "dataset_name": f"DFQS 1.0, {questions}",
        }
        about |= {"task_type": "text-generation", "task_name": "Text generation", "metric_type": kind}
        about |= {"dataset_args": facts | ({"contended": True} if detail.get("contended") else {})}
        index.append(hub.EvalResult(metric_name=name, metric_value=value, **about))
        dataset, task = HUB_SETS.get(questions, (address.removeprefix("https://github.com/"), questions))
        source = {"source_url": address, "source_name": "DFQS workbook", "date": report["created"]}
        notes = f"{name} {stated}"
        entries.append(
            hub.EvalResultEntry(dataset_id=dataset, task_id=task, value=value, notes=notes, **source)
        )
    model = display.plain(report["model"]["name"])
    forms = {
        "model-index.yml": {"model-index": eval_results_to_model_index(model, index)} if index else None,
        ".eval_results/dfqs.yaml": hub.eval_result_entries_to_yaml(entries),
    }
    first = f"# {NANO}\n" if report["tier"] == "nano" else ""
    dump = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    return {name: f"{first}{dump(value)}" if value else "" for name, value in forms.items()}
