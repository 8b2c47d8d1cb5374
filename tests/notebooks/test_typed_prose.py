"""Prose that a run could refute: a claim has an assert beside it, or a computed number in it, or a reason here."""

from __future__ import annotations

import ast
import html
import json
import re
import tomllib
from collections.abc import Iterator

import pytest

from dfqs_nb.core.paths import REPOSITORY, data_dir

COMPARES = re.compile(
    r"\b(?:\w+er than|larg(?:er|est)|small(?:er|est)|long(?:er|est)|short(?:er|est)|high(?:er|est)|low(?:er|est)"
    r"|few(?:er|est)|fast(?:er|est)|slow(?:er|est)|better|best|worse|worst|same|equal|identical|only|most|more than"
    r"|less than|at most|at least|never|always|predict\w*|agrees?|twice|exactly|nearly|almost|tiny)\b"
    r"|\d[\d.,]*\s?(?:%|[kMGT]i?B\b|tokens?\b|bits?\b|seconds?\b|s\b|ms\b|minutes?\b|times\b|x\b)",
    re.I,
)
BY_CONSTRUCTION = "says what the code does; tests of that stage hold it"
RESULT = re.compile(
    r"\b(?:falls?|rises?|grows?|drops?|differs?|beats?|fails?|gains?|loses?|improves?|degrades?|suffices?|hardly|rarely"
    r"|seldom|often|mostly|half|a little|no (?:choice|token|answer|expert|difference|effect|loss))\b",
    re.I,
)  # what a run shows, in words that compare nothing
TIMED = re.compile(
    r"\b\d[\d.,]*(?: to \d[\d.,]*)?\s?(?:s|ms|seconds?|minutes?|hours?|tokens/s|tok/s|[MG]B/s|x|times)\b"
)
METHOD = "says how something is measured or defined, not what came out"
OPEN = "a question to the reader, or what was not shown"
# The sentences that stand alone, by their beginnings. A new one needs an assert beside it, or a place here.
ALONE = {
    "00": {OPEN: ["It also does not promise"]},
    "01": {
        BY_CONSTRUCTION: ["The merge streams", "The check reads only", "It reads each window", "The file gets its name", "If the merge is"],
        OPEN: ["- that the weights are", "What does `dfqs-nb inspect", "- [Don't merge with cat]"],
    },
    "02": {
        BY_CONSTRUCTION: ["`model_header` reads only"],
        OPEN: ["Which class of tensors"],
        "the recap of asserts above": ["The header alone says"],
    },
    "03": {
        OPEN: ["- that routing stays", "How much larger"],
        "the recap of asserts above": ["The lines above say how"],
    },
    "04": {
        METHOD: ["It scores all experts", "Recording itself slightly"]
        + ["- **Settings**", "All runs that only need", "With `budget_minutes`, lengths"]
    },
    "05": {
        METHOD: ["The context must hold", "Every text hides the", "One text of each length", "The curve may take"]
        + ["A longer plan is cut", "1. texts a length", "2. both again"],
    },
    "06": {
        "stated by the set itself, held by tests of the sets": ["Its training never asked", "Some families are harder"],
        OPEN: ["- that its answers"],
    },
    "07": {METHOD: ["A verdict is given only"], "a command to type": ["For another machine"]},
    "09": {
        BY_CONSTRUCTION: ["It is the reference for"],
        OPEN: ["This did **not show** how a large", "That server keeps its cache", "What does the check"],
    },
    "words.txt": {
        METHOD: ["A score is the share", "The curve is the accuracy", "The number of keys", "The boundary is"]
        + ["How little a model", "the evidence agrees", "the evidence says otherwise"]
        + ["What only the paper", "Two reports are compared", "the documents say otherwise"]
        + ["Other work (of", "The curve closest to", "How far a model's", "The accuracy falls and", "Measured on fewer"]
        + ["So 1.00 says", "Beside each value stands"],
        "a command to type": ["`dfqs-nb plan MODEL"],
    },
    "docs/paging.md": {"follows from the sizes": ["So a slice costs about"]},
    "comparison.md": {METHOD: ["Brackets are 95 %"]},
    "leaderboard.md": {METHOD: ["Brackets: 95 %", "A higher place is", "The curve stands by"]},
}  # fmt: skip


def sentences(text: str) -> Iterator[str]:
    """The sentences of Markdown, without headings, badges and tables."""
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. |#)", text):
        for sentence in re.split(r"(?<=[.!?:;])\s+(?=[A-Z`\"*])", " ".join(block.split())):
            if sentence and not sentence.startswith(("#", "<!--", "[", "|")):
                yield sentence


def asserts(cell: dict) -> bool:
    source = re.sub(r"^(\s*)[!%].*$", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
    return any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source)))


def alone_in_notebook(path) -> list[str]:
    """Comparing sentences whose next code cells, above and below, assert nothing; the first two cells apart."""
    cells, found = json.loads(path.read_text(encoding="utf-8"))["cells"], []
    for at, cell in enumerate(cells[2:], start=2):
        if cell["cell_type"] != "markdown":
            continue
        beside = []
        for step in (-1, 1):
            place = at + step
            while 0 <= place < len(cells) and cells[place]["cell_type"] == "code":
                beside.append(cells[place])
                place += step
        if not any(map(asserts, beside)):
            found += list(filter(claims, sentences("".join(cell["source"]))))
    return found


def claims(sentence: str) -> bool:
    """Whether a sentence states what a run could refute; a question, a link and a list of files do not."""
    if sentence.endswith("?") or re.match(r"- \[|!\[|`[\w.]+`, `", sentence):
        return bool(COMPARES.search(sentence))
    return bool(COMPARES.search(sentence) or RESULT.search(sentence))


def undated_in_document(path) -> list[str]:
    """Sentences with a time or a ratio in a section without a date; stamped blocks, code and tables apart."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "\n\n", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$|^\|[^\n]*$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    sections = [part for part in re.split(r"\n(?=#)", text) if not re.search(r"\b20\d\d-\d\d-\d\d\b", part)]
    return [sentence for part in sections for sentence in sentences(part) if TIMED.search(sentence)]


def alone_in_template(path) -> list[str]:
    """Comparing sentences of a template that no value stands in."""
    text = path.read_text(encoding="utf-8")
    if path.name == "words.txt":
        text = "\n\n".join(re.findall(r'": "((?:[^"\\]|\\.)*)"', text))
    if path.suffix == ".html":
        text = html.unescape("\n\n".join(re.findall(r"<p[^>]*>(.*?)</p>", text, re.DOTALL)))
        text = re.sub(r"<[^>]+>", "", text)
    text = re.sub(r"""\{\{ "([^"]*)"\|linked \}\}""", r"\1", text)  # an address, and no value
    text = re.sub(r"\{%.*?%\}", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}", "{{}}", text, flags=re.DOTALL)
    return [one for one in sentences(text) if COMPARES.search(one) and "{{" not in one]


def unexplained(name: str, found: list[str]) -> tuple[list[str], list[str]]:
    """Sentences without a reason, and reasons without a sentence."""
    known = [start for starts in ALONE.get(name, {}).values() for start in starts]
    new = [one for one in found if not any(one.startswith(start) for start in known)]
    return new, [start for start in known if not any(one.startswith(start) for one in found)]


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_every_comparison_in_a_notebook_has_an_assert_beside_it_or_a_reason(path):
    assert unexplained(path.name[:2], alone_in_notebook(path)) == ([], [])


@pytest.mark.parametrize("name", ["words.txt", "report.md", "report.html", "comparison.md", "leaderboard.md"])
def test_every_comparison_in_a_template_is_computed_or_has_a_reason(name):
    found = alone_in_template(REPOSITORY / "dfqs_nb" / "report" / "templates" / name)
    assert unexplained(name, found) == ([], [])


DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", [*DOCUMENTS, "tests/benchmarks/RESULTS.md"])
def test_every_time_and_ratio_in_a_document_has_a_date_or_a_reason(name):
    assert unexplained(name, undated_in_document(REPOSITORY / name)) == ([], [])


def test_the_net_catches_what_slipped_through_it():
    """Sentences that stood in a notebook, and that a run refutes."""
    caught = [
        "Quantization moves every router score a little.",
        "Loss and routing show the same limit.",
        "Only close calls flip.",
    ]
    assert all(map(claims, caught))
    assert not any(
        map(claims, ["We open the model.", "Which families gain, and which lose?", "Seals are hashes."])
    )


def test_every_sentence_of_evidence_on_a_run_is_filled_from_the_run():
    table = tomllib.loads((data_dir() / "spec" / "requirements.toml").read_text(encoding="utf-8"))
    for one in table["requirements"]:
        for name, form in one["evidence"].items():
            assert "{" in form or not re.search(r"\d{2,}|\d%", form), (one["id"], name)
