"""A report as people read it: Markdown, a page in one HTML file, and the hub's ``model-index``."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dfqs_nb.core.files import whole_file
from dfqs_nb.report import claims, envelope
from dfqs_nb.report import requirements as conformance
from dfqs_nb.report.metrics import sentences
from dfqs_nb.report.stages import ReportError

NANO = (
    "Nano tier: made with the small prompt sets of the embedded reference model. Nothing here is "
    "evidence about a real model."
)
FIGURES = {  # of the run's folder, in the order of the text; those that are there are shown
    "report_shares.png": "The metrics with their intervals",
    "context_curve.png": "Retrieval by length of context, and where it fails",
    "score_families.png": "Right answers by family of questions",
    "routing_agreement.png": "Share of identical expert choices by condition and layer",
    "router_margins.png": "How narrowly the router decides",
    "decode_roofline.png": "Decode speed against what memory allows",
}
METRIC_TYPES = {
    "reasoning_score": "accuracy",
    "code_score": "pass@1",
    "cpu_tokens_per_sec": "tokens_per_second",
    "failure_boundary_tokens": "tokens",
}  # of the hub's model-index; a curve has no place there
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1, h2, h3 { line-height: 1.2; margin-top: 2.2rem; }
blockquote { margin: 1rem 0; padding: .6rem 1rem; background: #fff6e0; border-left: 4px solid #d99a00; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; margin: 1rem 0; display: block;
        overflow-x: auto; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #d8dee4; }
th { border-bottom: 2px solid #8c959f; white-space: nowrap; }
td { overflow-wrap: break-word; }
img { max-width: 100%; }
code { font-size: .9em; background: #f3f4f6; padding: .1em .3em; border-radius: 3px;
       overflow-wrap: anywhere; }
"""


def markdown(report: Mapping[str, Any], figures: Iterable[str] = ()) -> str:
    """The report for people, and for the text of a model card; ``figures``: those at hand, by file name."""
    import pandas as pd

    model, verdicts = report["model"], pd.DataFrame(report["conformance"])
    stated = pd.DataFrame(report["claims"])
    at_hand = [name for name in FIGURES if name in set(figures)]
    required = ("id", "level", "requirement", "verdict", "evidence", "notebook")
    claimed = ("document", "claim", "found", "verdict", "evidence", "source")
    lines = [
        *(["> " + NANO, ""] if report["tier"] == "nano" else []),
        f"# DFQS report: {_text(model['name'])}",
        "",
        f"{report['specification']}, {report['tier']} tier, run `{_text(report['run'])}`, "
        f"{report['created']}.",
        "",
        "## Metrics",
        "",
        *table(["metric", "value"], [row.split(": ", 1) for row in sentences(report)]),
        "",
        *_figures(at_hand),
        "## The model",
        "",
        *table(["what", "value"], [(k.replace("_", " "), _text(v)) for k, v in model.items()]),
        "",
        "## Requirements",
        "",
        conformance.counts(verdicts) + ".",
        "",
        *table(
            ["", "level", "requirement", "verdict", "evidence", "notebook"],
            [[row[key] for key in required] for row in report["conformance"]],
        ),
        "",
        "## What the documents say",
        "",
        claims.counts(stated) + ". A statement about DeepSeek-V4-Flash-IQ1_S-XL is judged by that file and "
        "what was published of it, not by the model of this run.",
        "",
        *table(
            ["document", "statement", "found", "verdict", "evidence", "source"],
            [[row[key] for key in claimed] for row in report["claims"]],
        ),
        "",
        *_envelope_lines(report["hardware_envelope"]),
        "## Conditions",
        "",
        f"Two reports are compared only when this hash is equal: `{report['conditions_sha256']}`",
        "",
        *_conditions(report["conditions"]),
        "",
        "## Where it ran",
        "",
        *table(["what", "value"], [*report["machine"].items(), *report["versions"].items()]),
        "",
        f"Drawn from {len(report['sources'])} files of the run, each by its SHA-256; "
        f"`report.json` has the hash `{report['integrity']['sha256']}`.",
        "",
    ]
    return "\n".join(lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Rows as lines of a Markdown table.

    >>> table(["a"], [["x | y"]])
    ['| a |', '|---|', '| x \\\\| y |']
    """
    cells = [[_text(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return (
        [f"| {' | '.join(row)} |" for row in ([*columns],)]
        + ["|" + "---|" * len(columns)]
        + [f"| {' | '.join(row)} |" for row in cells]
    )


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not stated"}[value]
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value), quote=False)


def _figures(names: Iterable[str]) -> list[str]:
    return [line for name in names for line in (f"![{FIGURES[name]}]({name})", "")]


def _envelope_lines(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Hardware envelope", ""]
    for which in ("model", "artifact"):
        one = found[which]
        lines += [f"### {one['model']}", "", f"From {one['source']}.", ""]
        for name, frame in envelope.envelope_tables(one).items():
            flat = frame.reset_index()
            flat.columns = [str(column) for column in flat.columns]
            shown = flat.map(lambda cell: f"{cell:,.2f}" if isinstance(cell, float) else cell)
            lines += [f"**{name}**", "", *table(list(shown.columns), shown.itertuples(index=False)), ""]
    return lines


def _conditions(conditions: Mapping[str, Any]) -> list[str]:
    rows = []

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else key)
        else:
            rows.append((f"`{name}`", value))

    walk(conditions, "")
    return table(["condition", "value"], rows)


# ---- the hub's model card ----


def model_index(report: Mapping[str, Any]) -> str:
    """The YAML block ``model-index`` for the front matter of a card on the hub.

    Withheld metrics have no entry, and the curve has none: the hub's format takes numbers.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index
    from huggingface_hub.utils import yaml_dump

    results = []
    for name, kind in METRIC_TYPES.items():
        one = report["details"][name]
        if one["withheld"]:
            continue
        questions = one.get("set") or f"{report['tier']}-{name}"
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=f"dfqs-{questions}",
                dataset_name=f"DFQS 1.0, {questions}",
                metric_type=kind,
                metric_name=name,
                metric_value=one["value"],
                dataset_args={"conditions_sha256": report["conditions_sha256"], "n": one["n"]},
            )
        )
    if not results:
        raise ReportError(
            "every metric is withheld, so there is nothing for a model card", hint="run notebooks 05 and 06"
        )
    block = yaml_dump(
        {"model-index": eval_results_to_model_index(report["model"]["name"], results)}, sort_keys=False
    )
    first = f"# {NANO}\n" if report["tier"] == "nano" else ""
    return first + block


# ---- one page ----


def page(text: str, folder: str | Path, title: str) -> str:
    """Markdown as one HTML page that opens anywhere: figures inside, no scripts, nothing fetched.

    Args:
        folder: where the figures lie that the text names.

    Raises:
        ReportError: a figure is missing.
    """
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_anchor_links=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(_embedded(text, Path(folder)))])
    body, _ = exporter.from_notebook_node(notebook)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n"
        "</html>\n"
    )


def _embedded(text: str, folder: Path) -> str:
    def embed(match: re.Match[str]) -> str:
        file = folder / match["file"]
        if not file.is_file():
            raise ReportError("the figure is missing", where=file, hint="run its notebook again")
        data = base64.b64encode(file.read_bytes()).decode()
        return f"![{match['alt']}](data:image/png;base64,{data})"

    return re.sub(r"!\[(?P<alt>[^\]]*)\]\((?P<file>[\w.-]+\.png)\)", embed, text)


def write_texts(folder: str | Path, report: Mapping[str, Any]) -> list[Path]:
    """Write ``report.md``, ``report.html`` and ``model-index.yml`` beside ``report.json``; their paths.

    Where every metric is withheld there is no ``model-index.yml``, and an earlier one goes. Figures are taken
    from the run's folder only, and only those that the report's hashes cover.
    """
    folder = Path(folder)
    text = markdown(report, report["sources"])
    texts = {"report.md": text, "report.html": page(text, folder, f"DFQS report: {report['model']['name']}")}
    if any(report["metrics"][name] is not None for name in METRIC_TYPES):
        texts["model-index.yml"] = model_index(report)
    else:  # one of an earlier report would state what this one withholds
        (folder / "model-index.yml").unlink(missing_ok=True)
    for name, content in texts.items():
        with whole_file(folder / name) as file:
            file.write(content)
    return [folder / name for name in texts]
