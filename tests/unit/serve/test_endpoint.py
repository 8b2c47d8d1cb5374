"""Any OpenAI-compatible server: what is asked, what fails, and that no failure becomes an answer."""

from __future__ import annotations

import dataclasses
import json
import socket
import traceback

import pytest
from faulty_server import TEXT, FaultyServer

from dfqs_nb.llama.generate import Sampling
from dfqs_nb.llama.model import ContextFullError
from dfqs_nb.scores import ItemSet, Options, sandbox
from dfqs_nb.scores import run as scores
from dfqs_nb.serve import checks
from dfqs_nb.serve import client as endpoint
from dfqs_nb.serve.client import ContextOverflowError, EndpointError, TemporaryError
from dfqs_nb.workbook import cli

QUESTIONS = ItemSet.load("nano-reasoning")
KEY = "sk-never-to-be-seen-5f3a"
PASSING = ["429", "500", "truncated", "die", "garbage", "null"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def server():
    with FaultyServer() as remote:
        yield remote


def oracle(body: dict) -> str:
    """Right answers to the questions of the set."""
    asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return next(
        (
            item.answer or item.reference
            for item in QUESTIONS.items
            if item.asked(QUESTIONS.instruction) == asked
        ),
        "no",
    )


# ---- connecting ----


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/v1", "{}/v1/"])
def test_an_address_works_with_and_without_v1(server, form):
    remote = endpoint.connect(form.format(server.url.removesuffix("/v1")))
    assert (remote.url, remote.model) == (server.url, "good")


def test_a_port_where_nothing_listens():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(TemporaryError, match="nothing answers there"):
            endpoint.connect(f"http://127.0.0.1:{held.getsockname()[1]}", retries=1)


NO_ADDRESSES = ["127.0.0.1:80", "ftp://a/v1", "http://", "http://user:secret@host/v1", "http://[::1/v1"]
NO_ADDRESSES += [
    "http://host:abc/v1",
    "http://host/v1?key=secret",
    "http://host:99999/v1",
    "http://a..b/v1",
    f"http://{'a' * 99}.org/v1",
]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_what_is_no_address(address):
    with pytest.raises(EndpointError, match="not an address") as caught:
        endpoint.connect(address)
    assert "secret" not in str(caught.value)


def test_a_server_of_something_else(server):
    with pytest.raises(EndpointError, match="no such path there"):
        endpoint.connect(server.url.replace("/v1", "/blog/v1"))


def test_a_wrong_model_names_those_that_are_there(server):
    server.models = ("good", "other")
    for name in ("bad", ""):
        with pytest.raises(EndpointError, match="good, other"):
            endpoint.connect(server.url, name)
    assert endpoint.connect(server.url, "other").model == "other"


def test_a_model_that_went_away_is_not_asked_for_again(server):
    remote = endpoint.connect(server.url)
    server.faults = ["404"]
    with pytest.raises(EndpointError, match="no model 'good'"):
        remote.chat("x")
    assert len(server.asked) == 1


def test_an_address_in_capitals(server):
    assert endpoint.is_url("HTTP://host/v1")
    assert endpoint.connect(server.url.replace("http", "HTTP")).url == server.url


# ---- keys ----


@pytest.mark.parametrize("key", ["schlüssel-9d21", "sk-9d21\r\nX-Other: 1", "sk\x009d21"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(server, key):
    with pytest.raises(EndpointError, match="characters that no key has") as caught:
        endpoint.connect(server.url, key=key)
    assert "9d21" not in str(caught.value) and not server.log


def test_the_line_end_of_a_key_from_a_file_is_left_out(server):
    server.key = KEY
    assert endpoint.connect(server.url, key=f"{KEY}\r\n").chat("x").text == TEXT


def test_a_key_is_sent_and_never_shown(server, monkeypatch):
    server.key = KEY
    with pytest.raises(EndpointError, match="401"):
        endpoint.connect(server.url)
    with pytest.raises(EndpointError, match="DFQS_TEST_KEY is not set"):
        endpoint.connect(server.url, key_variable="DFQS_TEST_KEY")
    monkeypatch.setenv("DFQS_TEST_KEY", KEY)
    remote = endpoint.connect(server.url, key_variable="DFQS_TEST_KEY")
    assert remote.chat("x").text == TEXT and server.log[-1][2] == f"Bearer {KEY}"
    shown = (
        repr(remote) + str(dataclasses.asdict(remote)) + json.dumps(remote.conditions()) + str(vars(remote))
    )
    assert KEY not in shown and "SecretStr('***" in shown


LOADING = (503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
PROPS = (200, {"default_generation_settings": {"n_ctx": 1024}, "build_info": "b1", "total_slots": 1})


def test_a_busy_moment_does_not_hide_what_a_server_is(server):
    """Taken for an unknown server it would keep its prompt cache, which can change answers."""
    server.pages["/props"] = [LOADING, PROPS]
    remote = endpoint.connect(server.url)
    assert (remote.server, remote.n_ctx, remote.options["cache_prompt"]) == ("llama.cpp", 1024, False)
    assert remote.chat("x").text and server.asked[-1]["reasoning_format"] == "none"


def test_a_server_that_still_loads_its_model_says_so(server):
    server.pages["/props"] = [LOADING]
    with pytest.raises(TemporaryError, match="503 .Loading model"):
        endpoint.connect(server.url)


def test_a_path_that_always_fails_is_one_that_is_not_there(server):
    server.pages["/props"] = [(500, {"detail": "no"})]
    assert endpoint.connect(server.url).server == "unknown"


def test_another_service_s_key_is_not_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    endpoint.connect(server.url).chat("x")
    assert all(KEY not in key for _, _, key in server.log)


def test_no_key_in_errors_nor_in_any_file(server, tmp_path):
    server.key, server.answer = KEY, oracle
    remote = endpoint.connect(server.url, key=KEY, retries=0)
    checks.score_set(remote, QUESTIONS, tmp_path, Options(limit=3, progress=False))
    server.faults = ["500"]
    with pytest.raises(TemporaryError) as caught:
        remote.chat("x")
    assert KEY not in "".join(traceback.format_exception(caught.value))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


# ---- answers ----


def test_an_answer_is_mapped(server):
    remote = endpoint.connect(server.url)
    reply = remote.chat("x", 12)
    assert (reply.text, reply.finish_reason, reply.n_tokens, reply.n_prompt) == (TEXT, "eos", 4, 1)
    assert remote.complete("x", stop=["\n"]).finish_reason == "stop"
    server.faults = ["length"]
    assert remote.complete("x").finish_reason == "length"
    request = server.asked[0]
    assert request["temperature"] == 0 and request["seed"] == 42 and request["max_tokens"] == 12
    assert "top_p" not in request and server.asked[1]["stop"] == ["\n"]


def test_sampling_is_passed_on(server):
    endpoint.connect(server.url).chat("x", sampling=Sampling(temperature=0.7, seed=5))
    assert (server.asked[0]["temperature"], server.asked[0]["seed"], server.asked[0]["top_p"]) == (
        0.7,
        5,
        0.95,
    )


# ---- faults ----


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_tried_again(server, fault):
    server.faults = [fault]
    reply = endpoint.connect(server.url).chat("x")
    assert reply.text == TEXT and len(server.asked) == 2


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        ("429", TemporaryError, "429 .*slow down"),
        ("500", TemporaryError, "llama_decode failed"),
        ("truncated", TemporaryError, "does not say why"),
        ("garbage", TemporaryError, "broke off"),
    ],
)
def test_a_lasting_fault_is_an_error_after_all_attempts(server, fault, kind, words):
    remote = endpoint.connect(server.url, retries=2)
    server.faults = [fault] * 3
    with pytest.raises(kind, match=words) as caught:
        remote.chat("x")
    assert len(server.asked) == 3
    assert isinstance(caught.value, EndpointError) and caught.value.hint


def test_a_server_that_dies_is_an_error_that_names_the_address(server):
    remote = endpoint.connect(server.url, retries=1)
    server.faults = ["die", "die"]
    with pytest.raises(TemporaryError) as caught:
        remote.chat("x")
    assert server.url in str(caught.value) and len(server.asked) == 2


def test_an_overflow_is_its_own_error_and_not_tried_again(server):
    remote = endpoint.connect(server.url)
    server.faults = ["overflow"]
    with pytest.raises(ContextOverflowError, match="6002 tokens") as caught:
        remote.chat("x")
    assert isinstance(caught.value, ContextFullError) and caught.value.cause == "n_ctx"
    assert len(server.asked) == 1


@pytest.mark.parametrize("reason", ["content_filter", "tool_calls"])
def test_an_answer_that_the_server_ends_for_a_reason_is_not_asked_for_again(server, reason):
    remote = endpoint.connect(server.url)
    server.faults = [f"filtered {reason}"]
    with pytest.raises(EndpointError, match=reason) as caught:
        remote.chat("x")
    assert len(server.asked) == 1 and caught.value.hint and not isinstance(caught.value, TemporaryError)


def test_a_request_that_is_refused_is_not_repeated(server):
    remote = endpoint.connect(server.url)
    server.faults = ["422"]
    with pytest.raises(EndpointError, match="422"):
        remote.chat("x")
    assert len(server.asked) == 1


def test_pauses_grow(server, monkeypatch):
    waited = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
    server.faults = ["429", "500", "429"]
    assert endpoint.connect(server.url).chat("x").text == TEXT and len(server.asked) == 4
    assert waited == [0.001, 0.002, 0.004]


def test_a_server_that_says_nothing_ends_in_time(server):
    remote = endpoint.connect(server.url, timeout_seconds=0.3)
    server.faults = ["slow 5"]
    with pytest.raises(EndpointError, match="no answer in time"):
        remote.chat("x")
    assert len(server.asked) == 1


# ---- scores ----


def test_scores_over_an_endpoint_are_those_of_the_answers(server, tmp_path):
    server.answer = oracle
    run = checks.score_set(endpoint.connect(server.url), QUESTIONS, tmp_path, Options(progress=False))
    assert run.score.value == 1.0 and run.score.n == len(QUESTIONS.items) and server.busiest == 1
    assert run.conditions["endpoint_model"] == "good"
    assert server.asked[0]["messages"][0]["content"] == QUESTIONS.items[0].asked(QUESTIONS.instruction)


def test_a_failure_stops_the_run_and_what_was_answered_before_it_stays(server, tmp_path):
    server.answer = oracle
    remote = endpoint.connect(server.url, retries=0)
    server.faults = ["none"] * 20 + ["500"] * 200
    with pytest.raises(TemporaryError):
        checks.score_set(remote, QUESTIONS, tmp_path, Options(progress=False))
    kept = next(tmp_path.glob("answers-*.jsonl")).read_text().splitlines()
    assert len(kept) == 20 and len(server.asked) == 21
    server.faults.clear()
    run = checks.score_set(remote, QUESTIONS, tmp_path, Options(progress=False))
    assert run.n_resumed == len(kept) and run.score.value == 1.0


def test_a_server_is_not_asked_multiple_choice(server, tmp_path):
    with pytest.raises(EndpointError, match="no likelihood of a choice"):
        checks.score_set(endpoint.connect(server.url), ItemSet.load("nano-reasoning-choices"), tmp_path)


def test_passing_faults_do_not_change_a_score(server, tmp_path):
    server.answer = oracle
    server.faults = [fault for passing in PASSING for fault in (passing, "none", "none")]
    run = checks.score_set(endpoint.connect(server.url), QUESTIONS, tmp_path, Options(progress=False))
    assert run.score.value == 1.0 and len(server.asked) == len(QUESTIONS.items) + len(PASSING)


def test_an_overflow_stops_a_run_and_is_no_wrong_answer(server, tmp_path):
    server.faults = ["overflow"]
    with pytest.raises(ContextOverflowError):
        checks.score_set(endpoint.connect(server.url), QUESTIONS, tmp_path, Options(progress=False))
    assert not list(tmp_path.glob("answers-*.jsonl"))


def test_conditions_of_another_server_do_not_share_answers(server, tmp_path):
    server.answer = oracle
    for version, asked in (("1", 4), ("1", 4), ("2", 8)):
        remote = endpoint.connect(server.url, version=version)
        checks.score_set(remote, QUESTIONS, tmp_path, Options(limit=4, progress=False))
        assert len(server.asked) == asked


def test_another_file_under_the_same_name_does_not_share_answers(server, tmp_path):
    """As llama.cpp's server lists what it serves; a model's name is only what its user called it."""
    for ftype, n_resumed in (("Q8_0", 0), ("IQ1_S", 0), ("Q8_0", 4)):
        server.meta = {"meta": {"n_params": 14881885, "size": 16495092, "ftype": ftype}}
        run = checks.score_set(
            endpoint.connect(server.url), QUESTIONS, tmp_path, Options(limit=4, progress=False)
        )
        assert run.n_resumed == n_resumed


def test_code_without_a_sandbox_is_not_asked_for(server, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "find_sandbox", lambda: sandbox.Sandbox("none"))
    with pytest.raises(sandbox.SandboxError):
        checks.score_set(endpoint.connect(server.url), ItemSet.load("nano-code"), tmp_path)
    assert not server.asked


def test_the_command_scores_an_endpoint(server, tmp_path, monkeypatch, capsys):
    server.answer = oracle
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("DFQS_TEST_KEY", KEY)
    server.key = KEY
    given = ["--set", "nano-reasoning", "--run", "served"]
    keyed = ["score", server.url, "--key-variable", "DFQS_TEST_KEY", *given]
    assert cli.main([*keyed, "--endpoint-model", "good"]) == 0
    assert "1.000" in capsys.readouterr().out
    assert cli.main(keyed) == 0
    assert len(server.asked) == len(QUESTIONS.items)  # the second call remote all answers
    assert cli.main(["score", server.url, *given]) == 1 and "401" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_routing_needs_the_process(server):
    with pytest.raises(EndpointError, match="cannot be seen through an endpoint"):
        endpoint.check_in_process(server.url, "routing")
    endpoint.check_in_process("model.gguf", "routing")


# ---- speed ----


def test_speed_counts_what_all_clients_got(server):
    server.faults = ["none"] + ["slow 0.05"] * 40
    table = checks.speed_of_all({"s": endpoint.connect(server.url)}, (1, 4), 48, {})
    assert table["requests"].tolist() == [4, 4] and table["tokens"].tolist() == [16, 16]
    assert server.busiest == 4
    assert table["rounds"].tolist() == [3, 3]
    assert (table["min"] < table["tokens_per_sec"]).all() and (table["tokens_per_sec"] < table["max"]).all()
    assert table["max"].iloc[0] <= 16 / (4 * 0.05), "requests in turn take a pause each"
    assert table["tokens_per_sec"].is_monotonic_increasing, "four clients wait together"


def test_servers_take_turns_in_each_round(server):
    asked, ask = [], endpoint.Endpoint.complete
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint.Endpoint, "complete", lambda it, *a, **b: asked.append(it) or ask(it, *a, **b))
        connected = {name: endpoint.connect(server.url) for name in "ab"}
        table = checks.speed_of_all(connected, (1,), 8, {}, n_rounds=2)
    assert table["server"].tolist() == ["a", "b"] and table["rounds"].tolist() == [2, 2]
    order = [next(name for name, it in connected.items() if it is one) for one in asked]
    assert "".join(order) == "aabb" * 2, "a warm-up and a request each"


def test_a_server_that_counts_no_tokens_has_no_speed(server):
    server.faults, stopped = ["raw uncounted"] * 9, {}
    assert checks.speed_of_all({"s": endpoint.connect(server.url)}, (1,), 48, stopped).empty
    assert "no number of tokens" in stopped["s"]
