"""A reference record: what it bounds, held against the exact divergence, and how broken records end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfqs_nb.core.paths import data_dir
from dfqs_nb.ladder import RUNGS, fidelity, quantize
from dfqs_nb.ladder.divergence import log_probs
from dfqs_nb.ladder.fidelity import Record, RecordError
from dfqs_nb.ladder.imatrix import collect
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings

REFERENCE = data_dir() / "reference"
OPEN = OpenSettings(n_ctx=256, n_threads=1)
PROMPTS = {
    "place": ("Amy is in the garden. Lia is in the cellar. Where is Lia?", True),
    "word": ("The clock on the wall", False),
    "window": ("He closed the window and sat", False),
}


def write(model, path, top_k=20, n_tokens=12):
    def go_on(text, chat):
        return fidelity.continuation(model, text, chat, n_tokens, top_k)

    return fidelity.write_record(path, PROMPTS, go_on, source="F16", top_k=top_k)


@pytest.fixture(scope="module")
def original():
    with open_model(REFERENCE / "DFQS-Nano-F16.gguf", OPEN) as model:
        yield model


@pytest.fixture(scope="module")
def record(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "record.jsonl"
    write(original, path)
    return path


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(1, 39), st.floats(0.1, 6))
def test_the_bounds_hold_the_exact_divergence(seed, size, k, spread):
    draw = np.random.default_rng(seed)
    p, q = (log_probs(draw.normal(0, spread, (1, size)))[0].astype(float) for _ in range(2))
    best = np.argsort(-p)[: min(k, size - 1)]
    low, high = fidelity.kl_bounds(p[best], q[best], np.delete(q, best), float(np.exp(p[best[-1]])))
    exact = float(np.exp(p) @ (p - q))
    assert low - 1e-6 <= exact <= high + 1e-6


def test_the_upper_bound_is_reached_by_an_original_of_that_shape():
    """Half seen; the rest lies wholly on the token that we hold least likely."""
    p, q = np.array([0.5, 0.0, 0.0, 0.5]), np.array([0.4, 0.3, 0.2, 0.1])
    _, high = fidelity.kl_bounds(np.log(p[:1]), np.log(q[:1]), np.log(q[1:]), 0.5)
    assert high == pytest.approx(0.5 * np.log(0.5 / 0.4) + 0.5 * np.log(0.5 / 0.1))


def test_the_original_is_as_faithful_as_can_be(original, record):
    result = fidelity.compare_record(original, Record.load(record))
    assert result.tokens["same_top"].all()
    assert result.tokens["overlap"].min() >= 0.95  # the last of 20 places can be nearly a tie
    assert result.tokens["kl_low"].max() < 1e-4
    assert result.tokens["nll"].to_numpy() == pytest.approx(result.tokens["nll_reference"], abs=1e-3)
    assert abs(result.summary()["extra_bits_per_byte"]["mean"]) < 1e-3 and "nan" not in result.sentence


def check_bracket(original, record, path):
    """The exact divergence of each token lies between the two bounds."""
    with open_model(path, OPEN) as model:
        result = fidelity.compare_record(model, record)
        vocabulary, exact = fidelity._vocabulary(model), []
        for line in record.lines:
            prompt = fidelity.prompt_tokens(model, line.prompt, line.chat)
            ids = [vocabulary[bytes.fromhex(step.token)] for step in line.steps]
            ours, theirs = (fidelity._predictions(each, prompt, ids) for each in (model, original))
            exact += (np.exp(theirs.astype(float)) * (theirs - ours)).sum(axis=1).tolist()
    assert len(result.tokens) == len(exact) >= 12
    assert (result.tokens["kl_low"] <= np.array(exact) + 1e-4).all()
    assert (result.tokens["kl_high"] >= np.array(exact) - 1e-4).all()
    assert "KL divergence between" in result.sentence and result.by_position(2)["n"].sum() == len(exact)


@pytest.mark.parametrize("shards", ["IQ1_S-XL-00001-of-00002", "Q8_0-00001-of-00002"])
def test_a_record_brackets_the_exact_divergence_of_a_quantization(original, record, shards):
    check_bracket(original, Record.load(record), REFERENCE / f"DFQS-Nano-{shards}.gguf")


@pytest.mark.slow
def test_every_rung_of_the_ladder_is_bracketed(original, record, tmp_path):
    source = REFERENCE / "DFQS-Nano-F16.gguf"
    matrix = collect(source, "calibration-nano", tmp_path / "imatrix.gguf", progress=False)
    for rung in RUNGS[1:]:
        quantize(source, rung, tmp_path / f"{rung}.gguf", imatrix=matrix, progress=False)
        check_bracket(original, Record.load(record), tmp_path / f"{rung}.gguf")


def test_another_tokenizer_is_refused(original, record):
    loaded = Record.load(record)
    for line in loaded.lines:  # as if the original had one token for the whole answer
        whole = "".join(step.token for step in line.steps)
        total = sum(step.logprob for step in line.steps)
        line.steps = [fidelity.Step(token=whole, logprob=total, top=[(whole, total)])]
    with pytest.raises(RecordError, match="answers have tokens that the model lacks"):
        fidelity.compare_record(original, loaded)


@pytest.mark.parametrize("n_before", [0, 3])
def test_a_mark_of_thinking_that_is_no_text_ends_an_answer(original, tmp_path, monkeypatch, n_before):
    """What follows a control token cannot be found in another model's text, so it is not recorded."""
    text, chat = PROMPTS["word"]
    steps = fidelity.continuation(original, text, chat, 8, 5)
    tokens = original.tokenize(text + b"".join(bytes.fromhex(step["token"]) for step in steps).decode())
    mark = tokens[-len(steps) :][n_before]
    real = original.token_bytes
    monkeypatch.setattr(original, "token_bytes", lambda token: b"" if token == mark else real(token))
    cut = fidelity.continuation(original, text, chat, 8, 5)
    assert [step["token"] for step in cut] == [step["token"] for step in steps][:n_before]
    if not n_before:
        with pytest.raises(RecordError, match="mark of thinking.*--plain"):
            prompts = {"word": (text, chat)}
            fidelity.write_record(tmp_path / "r.jsonl", prompts, lambda *_: cut, source="F16", top_k=5)


def test_a_killed_recording_goes_on(original, tmp_path):
    path, asked = tmp_path / "record.jsonl", []

    def go_on(text, chat):
        asked.append(text)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return fidelity.continuation(original, text, chat, 4, 5)

    for _ in range(2):
        try:
            fidelity.write_record(path, PROMPTS, go_on, source="F16", top_k=5)
        except KeyboardInterrupt:
            assert not path.exists()
    assert len(asked) == 4  # the third prompt was asked again, the first two were not
    assert [line.id for line in Record.load(path).lines] == list(PROMPTS)
    assert [file.name for file in tmp_path.iterdir()] == ["record.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "cannot be read"),
        (lambda lines: lines[:1], "holds no prompt"),
        (lambda lines: ["[" * 4000, *lines[1:]], "line 1"),
        (lambda lines: [lines[0].replace("dfqs reference record 1", "other"), *lines[1:]], "line 1: record"),
        (lambda lines: [lines[0], '{"id": "a", "prompt": "b", "steps": []}'], "line 2: steps"),
        (lambda lines: [lines[0], lines[1].replace('"logprob": -', '"logprob": 1e9, "x": -')], "line 2"),
        (lambda lines: [lines[0], lines[1].replace('"token": "', '"token": "zz')], "hex"),
        (lambda lines: [lines[0], "\ud800"], "line 2"),
    ],
)
def test_a_broken_record_names_its_line(record, tmp_path, change, message):
    path = tmp_path / "broken.jsonl"
    lines = change(record.read_text(encoding="utf-8").splitlines())
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with pytest.raises(RecordError, match=message):
        Record.load(path)


def test_a_record_without_a_fitting_prompt_is_refused(original, record):
    loaded = Record.load(record)
    for line in loaded.lines:
        line.prompt = "The sky is blue. " * 200
    with pytest.raises(RecordError, match="no prompt of the record fits"):
        fidelity.compare_record(original, loaded)


def test_the_head_says_what_was_recorded(record):
    head = json.loads(record.read_text(encoding="utf-8").splitlines()[0])
    assert head["record"] == fidelity.FORMAT and head["top_k"] == 20 and head["source"] == "F16"


def test_a_byte_token_stands_behind_the_token_of_the_same_text(original, monkeypatch):
    """SentencePiece has a token for each byte beside the real ones, and before them."""
    monkeypatch.setattr(original, "n_vocab", 3)
    monkeypatch.setattr(original, "token_bytes", lambda token: [b".", b".", b"a"][token])
    header = {"tokenizer.ggml.token_type": [fidelity.BYTE, 1, 1]}
    monkeypatch.setattr(original, "header", header)
    assert fidelity._vocabulary(original) == {b".": 1, b"a": 2}


def test_a_resumed_record_asks_a_changed_prompt_again(original, tmp_path):
    path, asked = tmp_path / "record.jsonl", []

    def go_on(text, chat):
        asked.append(text)
        if text == "stop":
            raise KeyboardInterrupt
        return fidelity.continuation(original, text, chat, 2, 5)

    for first in ("The clock on the wall", "He closed the window and sat"):
        with pytest.raises(KeyboardInterrupt):
            prompts = {"1": (first, False), "2": ("stop", False)}
            fidelity.write_record(path, prompts, go_on, source="F16", top_k=5)
    assert asked == ["The clock on the wall", "stop", "He closed the window and sat", "stop"]


def test_positions_are_counted_from_one_in_equal_stretches():
    import pandas as pd

    tokens = pd.DataFrame({"position": range(16), "same_top": 1.0, "kl_low": 0.0, "kl_high": 0.0})
    head = fidelity.Head(record="dfqs reference record 1", source="x", top_k=1)
    table = fidelity.Fidelity(head, tokens).by_position()
    assert table["position"].tolist() == ["1 to 4", "5 to 8", "9 to 12", "13 to 16"]
    assert table["n"].tolist() == [4, 4, 4, 4]
