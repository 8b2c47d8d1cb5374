"""Log-probabilities of real servers, and of servers that give them wrong."""

from __future__ import annotations

import pytest

from dfqs_nb.core.paths import data_dir
from dfqs_nb.ladder import fidelity
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.serve import continuation, servers
from dfqs_nb.serve.wire import EndpointError

F16 = data_dir() / "reference" / "DFQS-Nano-F16.gguf"
OPEN = OpenSettings(n_ctx=512, n_threads=1)
QUESTION = "Amy is in the garden. Lia is in the cellar. Where is Lia?"


@pytest.fixture(scope="module")
def endpoint():
    with servers.start("llama.cpp", F16, OPEN) as server:
        yield server.connect()


def test_a_record_of_llama_cpp_s_server_fits_the_model_it_serves(endpoint, tmp_path):
    path = tmp_path / "served.jsonl"

    def go_on(text, chat):
        return continuation(endpoint, text, chat, 12, 20)

    prompts = {"chat": (QUESTION, True), "text": ("The clock on the wall", False)}
    fidelity.write_record(path, prompts, go_on, source="served", top_k=20)
    record = fidelity.Record.load(path)
    with open_model(F16, OPEN) as model:
        result = fidelity.compare_record(model, record)
        ours = fidelity.continuation(model, QUESTION, True, 12, 20)
    assert [step.token for step in record.lines[0].steps] == [step["token"] for step in ours]
    assert len(record.lines) == 2 and result.tokens["same_top"].all()
    assert result.tokens["kl_low"].max() < 1e-3  # the server computes in other batches
    assert result.tokens["nll"].to_numpy() == pytest.approx(result.tokens["nll_reference"], abs=0.05)


@pytest.mark.parametrize(
    ("logprobs", "text", "message"),
    [
        (None, "Lia", "gives no log-probabilities"),
        ({"content": [{"token": "x", "logprob": -1.0}]}, "Lia", "belong to another text"),
        ({"content": [{"token": "Lia", "logprob": "deep"}]}, "Lia", "cannot be read"),
        ({"content": [{"token": "Lia", "logprob": -1.0, "bytes": [999]}]}, "Lia", "cannot be read"),
        ({"content": "no"}, "Lia", "gives no log-probabilities"),
        ([], "Lia", "gives no log-probabilities"),
    ],
)
def test_log_probabilities_that_mean_nothing_are_refused(endpoint, monkeypatch, logprobs, text, message):
    page = {"choices": [{"message": {"content": text}, "logprobs": logprobs, "finish_reason": "stop"}]}
    monkeypatch.setattr(type(endpoint), "events", lambda endpoint, url, body, stream: iter([page]))
    with pytest.raises(EndpointError, match=message):
        continuation(endpoint, QUESTION, True, 4, 5)
