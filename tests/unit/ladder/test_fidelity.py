"""A reference record: what it bounds, held against the exact divergence, and how broken records end."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.ladder import RUNGS, fidelity, quantize
from dfqs_nb.ladder.divergence import log_probs
from dfqs_nb.ladder.fidelity import Record
from dfqs_nb.ladder.imatrix import collect
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.merge.disk import journal_path
from dfqs_nb.scores import ItemSet

REFERENCE = data_dir() / "reference"
OPEN = OpenSettings(n_ctx=256, n_threads=1)


@pytest.fixture(scope="module")
def original():
    with open_model(REFERENCE / "DFQS-Nano-F16.gguf", OPEN) as model:
        yield model


@pytest.fixture(scope="module")
def questions():
    return ItemSet.load("nano-reasoning").part(4)


@pytest.fixture(scope="module")
def record(original, questions, tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "new" / "record.jsonl"
    fidelity.write_record(original, questions, path, n_tokens=12, sha256="f" * 64)
    return path


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(1, 39), st.floats(0.1, 6))
def test_the_bounds_hold_the_exact_divergence(seed, size, k, spread):
    draw = np.random.default_rng(seed)
    p, q = (log_probs(draw.normal(0, spread, (1, size)))[0].astype(float) for _ in range(2))
    best = np.argsort(-p)[: min(k, size - 1)]
    low, high = fidelity.kl_bounds(p[best], q[best], np.delete(q, best))
    exact = float(np.exp(p) @ (p - q))
    assert low - 1e-6 <= exact <= high + 1e-6


def test_the_upper_bound_is_reached_by_an_original_of_that_shape():
    """Half seen; the rest lies wholly on the token that we hold least likely."""
    p, q = np.array([0.5, 0.0, 0.0, 0.5]), np.array([0.4, 0.3, 0.2, 0.1])
    _, high = fidelity.kl_bounds(np.log(p[:1]), np.log(q[:1]), np.log(q[1:]))
    assert high == pytest.approx(0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.1))


def test_the_original_is_as_faithful_as_can_be(original, record):
    tokens = fidelity.compare_record(original, Record.load(record))
    assert tokens["same_top"].all() and tokens["id"].nunique() == 4
    assert tokens["kl_low"].max() < 1e-4
    assert tokens["nll"].to_numpy() == pytest.approx(tokens["nll_reference"], abs=1e-3)
    means = fidelity.summary(tokens).set_index("measure")["mean"]
    assert abs(means["extra bits a byte"]) < 1e-3 and means["same likeliest token (share)"] == 1


def check_bracket(original, record, path):
    """The exact divergence of each token lies between the two bounds."""
    with open_model(path, OPEN) as model:
        tokens, exact = fidelity.compare_record(model, record), []
        for line in record.lines:
            ours, theirs = (fidelity.predictions(each, line) for each in (model, original))
            exact += (np.exp(theirs.astype(float)) * (theirs - ours)).sum(axis=1).tolist()
    assert len(tokens) == len(exact) >= 12
    assert (tokens["kl_low"] <= np.array(exact) + 1e-4).all()
    assert (tokens["kl_high"] >= np.array(exact) - 1e-4).all()


@pytest.mark.parametrize("shards", ["IQ1_S-XL-00001-of-00002", "Q8_0-00001-of-00002"])
def test_a_record_brackets_the_exact_divergence_of_a_quantization(original, record, shards):
    check_bracket(original, Record.load(record), REFERENCE / f"DFQS-Nano-{shards}.gguf")


@pytest.mark.slow
def test_every_rung_of_the_ladder_is_bracketed(original, record, tmp_path):
    source = REFERENCE / "DFQS-Nano-F16.gguf"
    matrix = collect(source, "calibration-nano", tmp_path / "imatrix.gguf")
    for rung in RUNGS:
        quantize(source, rung, tmp_path / f"{rung}.gguf", imatrix=matrix, progress=False)
        check_bracket(original, Record.load(record), tmp_path / f"{rung}.gguf")


def test_another_vocabulary_is_refused(original, record):
    """Its tokens stand for other texts, or there are fewer of them."""
    loaded = Record.load(record)
    first = loaded.lines[0]
    for change in ({"text": first.text + "."}, {"prompt": [original.n_vocab]}):
        changed = dataclasses.replace(loaded, lines=[first.model_copy(update=change)])
        with pytest.raises(DfqsError, match="another vocabulary .*record the original of this very model"):
            fidelity.compare_record(original, changed)


def test_a_killed_recording_goes_on_and_asks_only_what_is_missing(original, questions, tmp_path, monkeypatch):
    path, asked, real = tmp_path / "record.jsonl", [], fidelity.continuation
    merging = journal_path(path)
    merging.write_text("a merge's, to this very name")

    def stopped(model, prompt, n_tokens):
        asked.append(prompt)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(model, prompt, n_tokens)

    monkeypatch.setattr(fidelity, "continuation", stopped)
    with pytest.raises(KeyboardInterrupt):
        fidelity.write_record(original, questions, path, n_tokens=4)
    assert not path.exists() and merging.read_text() == "a merge's, to this very name"
    fidelity.write_record(original, questions, path, n_tokens=4)
    assert len(asked) == 5  # the third prompt was asked again, the first two were not
    assert [line.id for line in Record.load(path).lines] == [item.id for item in questions.items]
    assert {file.name for file in tmp_path.iterdir()} == {path.name, merging.name}


def test_a_resumed_record_asks_changed_prompts_again(original, questions, tmp_path, monkeypatch):
    path, asked, real = tmp_path / "record.jsonl", [], fidelity.continuation

    def stopped(model, prompt, n_tokens):
        asked.append(prompt)
        if len(asked) % 2 == 0:
            raise KeyboardInterrupt
        return real(model, prompt, n_tokens)

    monkeypatch.setattr(fidelity, "continuation", stopped)
    for instruction in (questions.instruction, " Say why."):
        with pytest.raises(KeyboardInterrupt):
            changed = dataclasses.replace(questions, instruction=instruction)
            fidelity.write_record(original, changed, path, n_tokens=4)
    assert len(asked) == 4 and asked[0] != asked[2]


def test_a_model_that_ends_at_once_gives_no_record(original, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "continuation", lambda *_: [])
    with pytest.raises(DfqsError, match="every answer ended at once.*--prompts"):
        fidelity.write_record(original, questions, tmp_path / "record.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "cannot be read .it is empty"),
        (lambda lines: lines[:1], "holds no prompt"),
        (lambda lines: ["[" * 4000, *lines[1:]], "line 1"),
        (lambda lines: [lines[0].replace("dfqs reference record 2", "other"), *lines[1:]], "line 1: record"),
        (lambda lines: [lines[0], '{"id": "a", "prompt": [1], "text": "", "steps": []}'], "line 2: steps"),
        (lambda lines: [lines[0], '{"id": "a", "prompt": [-1], "text": "", "steps": []}'], "2: prompt.0"),
        (lambda lines: [lines[0], '{"id": "", "prompt": [1], "text": "", "steps": [[[1, 9]]]}'], "2: steps"),
        (lambda lines: [lines[0], "\ud800"], "line 2"),
        (lambda lines: [lines[0], lines[1][:-9]], "line 2: no object: Invalid JSON.*it is cut or damaged"),
    ],
)
def test_a_broken_record_names_its_line(record, tmp_path, change, message):
    path = tmp_path / "broken.jsonl"
    lines = change(record.read_text(encoding="utf-8").splitlines())
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with pytest.raises(DfqsError, match=message):
        Record.load(path)


def test_a_record_without_a_fitting_prompt_is_refused(original, record):
    loaded = Record.load(record)
    for line in loaded.lines:
        line.prompt = line.prompt * 200
    with pytest.raises(DfqsError, match="no prompt of the record fits"):
        fidelity.compare_record(original, loaded)


def test_the_head_says_what_was_recorded(record, questions):
    head = json.loads(record.read_text(encoding="utf-8").splitlines()[0])
    assert head["record"] == fidelity.FORMAT and head["source"] == "DFQS-Nano-F16.gguf"
    assert head["source_sha256"] == "f" * 64 and head["licence"] == questions.licence
    assert all(len(top) == fidelity.TOP_K for line in Record.load(record).lines for top in line.steps)


def test_means_are_over_prompts_and_few_have_no_interval():
    """Bits a byte: half a bit more for each of two bytes, whatever the tokens."""
    columns = {"same_top": 1.0, "kl_low": [0.0, 0.0, 0.4], "kl_high": 0.5, "bytes": 2}
    costs = {"nll_reference": 1.0, "nll": 1.0 + np.log(2)}
    tokens = pd.DataFrame({"id": list("aab"), **columns, **costs})
    table = fidelity.summary(tokens).set_index("measure")
    assert table["mean"].tolist() == pytest.approx([0.5, 1.0, 0.2, 0.5])
    assert table[["low", "high"]].isna().all().all()
    table = fidelity.summary(tokens.assign(id=["a", "b", "c"]).loc[[0, 1, 2] * 2].assign(id=list("abcdef")))
    table = table.set_index("measure")
    assert table.loc["same likeliest token (share)", "low"] == pytest.approx(0.05 ** (1 / 6))
