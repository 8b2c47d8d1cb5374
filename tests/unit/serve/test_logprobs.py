"""Log-probabilities of real servers, and of servers that give them wrong."""

from __future__ import annotations

import pytest

from dfqs_nb.core.paths import data_dir
from dfqs_nb.ladder import fidelity
from dfqs_nb.llama.generate import chat_prompt
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


def test_the_log_probabilities_of_llama_cpp_s_server_are_those_of_this_process(endpoint):
    steps = continuation(endpoint, QUESTION, True, 12, 20)
    with open_model(F16, OPEN) as model:
        ours = fidelity.continuation(model, chat_prompt(model, QUESTION), 12)
        assert [step["token"] for step in steps] == [model.token_bytes(top[0][0]).hex() for top in ours]
    values = [step["logprob"] for step in steps]
    assert values == pytest.approx([top[0][1] for top in ours], abs=0.05)  # it computes in other batches


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
