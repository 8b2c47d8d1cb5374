"""Perplexity and KL divergence against closed forms and against llama-perplexity."""

from __future__ import annotations

import math
import re
import subprocess
import tracemalloc
from types import SimpleNamespace

import llama_cpp_tools
import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.ladder import divergence
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama import settings as llama_settings
from dfqs_nb.routing import open_recorded

REFERENCE = data_dir() / "reference"
F16 = REFERENCE / "DFQS-Nano-F16.gguf"
SETTINGS = llama_settings.OpenSettings(n_ctx=128, n_threads=1)


@pytest.fixture(scope="module")
def recorded():
    with open_recorded(F16, SETTINGS) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(recorded):
    return recorded.model


def test_the_divergence_of_two_coins_is_the_closed_form():
    p, q = np.log(np.array([[0.75, 0.25]], np.float32)), np.log(np.array([[0.5, 0.5]], np.float32))
    columns = divergence.compared(p, q, np.array([1]))
    assert columns["kld"][0] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert columns["nll"][0] == pytest.approx(math.log(2))
    assert columns["same_top"].tolist() == [True]


def test_probabilities_sum_to_one_even_far_from_zero():
    rows = divergence.log_probs(np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32))
    assert np.exp(rows).sum(axis=1) == pytest.approx([1, 1])


@pytest.fixture(scope="module")
def pieces(model):
    return divergence.load_text("calibration-nano").chunks(model, 128, 2)


def test_the_scored_tokens_lose_what_the_logits_of_other_pieces_say(recorded, model, pieces):
    for whole in pieces:
        ((predicted, targets),) = divergence.predictions(recorded, whole)
        losses = -predicted[np.arange(len(targets)), targets]
        model.clear()
        steps = [next(model.logits(whole[at : at + 32])).copy() for at in range(0, 128, 32)]
        rows = np.concatenate(steps).astype(float)
        by_hand = -log_softmax(rows, axis=1)[np.arange(127), whole[1:]]
        assert losses == pytest.approx(by_hand[64:], abs=2e-3)
        assert len(losses) == 63 and whole[0] == model.bos


@pytest.mark.parametrize("step", [7, 32, 128])
def test_steps_equal_the_whole_computation(recorded, pieces, tmp_path, monkeypatch, step):
    """Against one evaluation of the whole chunk, all its logits at once, and the divergence written out."""
    monkeypatch.setattr(divergence, "STEP", step)
    place = tmp_path / "base.npy"
    base = divergence.beside_source(recorded, pieces, place, is_source=True)
    assert base.groupby("chunk").size().tolist() == [63, 63] and base["kld"].max() == 0
    with open_recorded(REFERENCE / "DFQS-Nano-Q8_0-00001-of-00002.gguf", SETTINGS) as other:
        scored = divergence.beside_source(other, pieces, place, is_source=False)
        for number, piece in enumerate(pieces):
            logs = []
            for each in (recorded.model, other.model):
                each.clear()
                logs.append(log_softmax(next(each.logits(piece)).astype(float), axis=1)[64:127])
            p, q = logs
            rows = scored[scored["chunk"] == number]
            exact = (np.exp(p) * (p - q)).sum(axis=1)
            assert rows["kld"].to_numpy() == pytest.approx(exact, abs=2e-3, rel=0.02)
            losses = -q[np.arange(63), piece[65:]]
            assert rows["nll"].to_numpy() == pytest.approx(losses, abs=5e-3)


def test_memory_does_not_grow_with_the_context():
    """16 times the tokens, the same peak: one step of logits, whatever lies before it."""

    class Counted:
        """The model, as if each of its tokens gave a row over a large vocabulary."""

        model = SimpleNamespace(clear=lambda: None)

        def feed(self, tokens):
            return np.zeros((len(tokens), 20_000), np.float32)

    def peak(n_tokens):
        tracemalloc.start()
        n_scored = sum(len(targets) for _, targets in divergence.predictions(Counted(), [1] * n_tokens))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_scored == n_tokens // 2 - 1
        return most

    short, long = peak(512), peak(8192)
    assert long < 1.2 * short < 20_000 * 1024 * 8, "less than one array of all logits"


def test_a_chat_is_put_in_the_model_s_template_and_ended(model):
    text = divergence.Text("t", (("What is 1 + 1?", "2."), ("def f():",)))
    tokens = text.tokens(model)
    pieces = llama_generate.chat_prompt(model, "What is 1 + 1?"), model.tokenize("2.", special=False)
    assert tokens[: len(pieces[0]) + len(pieces[1])] == [*pieces[0], *pieces[1]]
    assert tokens.count(model.llama.token_eos()) == 2 and tokens.count(model.llama.token_bos()) == 2


def test_a_text_file_is_one_document_and_a_short_one_is_refused(model, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("Here we go. " * 5)
    text = divergence.load_text(path)
    assert text.tokens(model) == model.with_bos(model.tokenize("Here we go. " * 5, special=False))
    with pytest.raises(DfqsError, match="own.txt fill fewer than 2 chunks of 128"):
        text.chunks(model, 128, least=2)
    with pytest.raises(DfqsError, match="cannot be read"):
        divergence.load_text(tmp_path / "missing.txt")


def tokens_of(values: np.ndarray) -> pd.DataFrame:
    """Tokens ``(chunks, n)`` with these losses and divergences."""
    chunk = np.repeat(np.arange(len(values)), values.shape[1])
    columns = {"nll": values.ravel(), "kld": values.ravel(), "same_top": values.ravel() > 0.2}
    return pd.DataFrame({"chunk": chunk, **columns})


def test_intervals_come_from_chunks_and_widen_where_chunks_differ():
    even = np.full((8, 10), 0.5)
    apart = even + np.linspace(-0.4, 0.4, 8)[:, None]
    narrow, wide = (divergence.summary(tokens_of(nll), tokens_of(even)) for nll in (even, apart))
    assert narrow["kld_low"] == narrow["kld_high"] == narrow["kld"] == pytest.approx(0.5)
    assert wide["kld_low"] < 0.4 and wide["kld_high"] > 0.6
    assert wide["kld_tail"] == pytest.approx(np.quantile(apart, 0.99))


def test_a_ratio_of_perplexities_is_paired_so_chunks_that_differ_do_not_widen_it():
    apart = np.full((8, 10), 0.5) + np.linspace(-0.4, 0.4, 8)[:, None]
    found = divergence.summary(tokens_of(apart + 0.1), tokens_of(apart))
    ratio = found["perplexity_ratio"], found["perplexity_ratio_low"], found["perplexity_ratio_high"]
    assert ratio == pytest.approx([math.exp(0.1)] * 3)
    assert found["perplexity"] == pytest.approx(math.exp(0.6))


@pytest.mark.parametrize("n", [2, 5, 6])
def test_few_chunks_have_no_interval(n):
    values = np.linspace(0.1, 0.5, n)[:, None] * np.ones((n, 4))
    found = divergence.summary(tokens_of(values), tokens_of(values / 2))
    for name in ("perplexity_ratio", "kld", "same_top"):
        bounds = found[f"{name}_low"], found[f"{name}_high"]
        assert [math.isnan(bound) for bound in bounds] == [n < 6, n < 6] and found[name] >= 0


def tool_perplexity(*arguments: object) -> str:
    command = [str(llama_cpp_tools.tool("llama-perplexity")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def value(said: str, name: str) -> tuple[float, float]:
    """The number behind a line's name, and its uncertainty."""
    found = re.search(rf"{re.escape(name)} *: *([\d.-]+) *(?:±|\+/-) *([\d.]+)", said)
    assert found, said[-2000:]
    return float(found[1]), float(found[2])


def summary(base: list[np.ndarray], other: list[np.ndarray], targets: list[np.ndarray]) -> dict:
    tables = []
    for rows in (other, base):
        columns = map(divergence.compared, base, rows, targets)
        tables.append(pd.concat(pd.DataFrame(each).assign(chunk=n) for n, each in enumerate(columns)))
    return divergence.summary(*tables)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IQ1_S-XL", "Q8_0"])
def test_numbers_agree_with_llama_perplexity_within_its_error_bars(tmp_path, name):
    """The tool's own build runs other kernels, so nothing is equal to the last digit.

    It keeps the base's log-probabilities at 16 bits, none more than 16 nats below the likeliest token. So where a model
    is sure and wrong, its perplexity of the base is lower, and the ratio higher, than the model's own.
    """
    other = REFERENCE / f"DFQS-Nano-{name}-00001-of-00002.gguf"
    path = tmp_path / "plain.txt"
    path.write_text(" ".join(" ".join(one) for one in divergence.load_text("calibration-nano").documents))
    common = ["-c", 128, "-b", 128, "-ub", 128, "-t", 1, "--no-repack", "-fa", "off"]
    base = ["--kl-divergence-base", tmp_path / "base.bin"]
    tool_perplexity("-m", F16, "-f", path, "--chunks", 24, *base, *common)
    said = tool_perplexity("-m", other, "--kl-divergence", *base, *common)

    rows: dict[str, list[np.ndarray]] = {"base": [], "other": []}
    targets: list[np.ndarray] = []
    for kind, file in (("base", F16), ("other", other)):
        with open_recorded(file, SETTINGS) as recorded:
            pieces = divergence.load_text(path).chunks(recorded.model, 128, 24)
            scored = [next(divergence.predictions(recorded, piece)) for piece in pieces]
            rows[kind], targets = map(list, zip(*scored, strict=True))
    kept = [np.maximum(each, each.max(axis=-1, keepdims=True) - 16) for each in rows["base"]]
    ours = summary(kept, rows["other"], targets)
    lines = {"perplexity": "Mean PPL(Q)", "perplexity_ratio": "Mean PPL(Q)/PPL(base)", "kld": "Mean    KLD"}
    for name, line in lines.items():
        theirs, bar = value(said, line)
        assert abs(ours[name] - theirs) <= bar, line
    tail = re.search(r"99.0%   KLD: *([\d.]+)", said)
    assert tail and ours["kld_tail"] == pytest.approx(float(tail[1]), rel=0.25)
    theirs, bar = value(said, "Same top p")
    assert abs(100 * ours["same_top"] - theirs) <= bar
