"""Servers that break characters, drip, never end, cut prompts or repeat the key, and proxies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import threading
import time
import traceback

import pytest
from faulty_server import TEXT, FaultyServer
from no_hang import no_hang

from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import ItemSet, Options
from dfqs_nb.serve import checks, client, servers
from dfqs_nb.serve.client import ContextOverflowError, EndpointError, TemporaryError

QUESTIONS = ItemSet.load("nano-reasoning")
KEY = "sk-never-to-be-seen-9d21"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE_SECONDS", 0.001)


@pytest.fixture
def server():
    with FaultyServer() as faulty:
        yield faulty


# ---- characters ----


@pytest.mark.parametrize(
    "pieces, text",
    [
        (["\ud83d", "\ude00", "<answer>18"], "\U0001f600<answer>18"),
        (["\udcaf", "<answer>18"], "\ufffd<answer>18"),
        (["a\ud83d"], "a\ufffd"),
        (["\x00nul"], "\x00nul"),
    ],
)
def test_halves_of_a_character_are_joined_or_replaced(server, pieces, text):
    server.faults = [f"halves {json.dumps(pieces)}"]
    assert client.connect(server.url).chat("x").text == text


def test_halves_of_a_character_do_not_stop_a_run(server, tmp_path):
    server.faults = ['halves ["\\udcaf"]'] * 3
    run = checks.score_set(client.connect(server.url), QUESTIONS, tmp_path, Options(limit=3, progress=False))
    assert run.items["completion"].tolist() == ["\ufffd"] * 3
    again = checks.score_set(
        client.connect(server.url), QUESTIONS, tmp_path, Options(limit=3, progress=False)
    )
    assert again.n_resumed == 3


def test_halves_of_a_character_in_what_a_server_reports(server):
    server.models = ("a\ud83d",)
    server.pages["/props"] = [
        (
            200,
            {"default_generation_settings": {"n_ctx": 64}, "build_info": "\udc00", "chat_template": "\ud800"},
        )
    ]
    connected = client.connect(server.url)
    assert (connected.model, connected.version, connected.chat_template) == (
        "a\ufffd",
        "\ufffd",
        "\ufffd",
    )


def test_bytes_that_are_not_utf_8_are_replaced(server):
    server.faults = ["raw bytes"]
    assert client.connect(server.url).chat("x").text == "a\ufffd\ufffdb"


@pytest.mark.parametrize("kind", ["deep", "digits", "usage", "list", "content"])
def test_an_answer_of_another_shape_is_a_broken_one(server, kind):
    server.faults = [f"raw {kind}"] * 2
    with pytest.raises(TemporaryError) as caught:
        client.connect(server.url, retries=1).chat("x")
    assert len(str(caught.value)) < 500 and len(server.asked) == 2


@pytest.mark.parametrize(
    "page", [[], {"default_generation_settings": []}, {"default_generation_settings": 7}, "x"]
)
def test_a_page_of_another_shape_is_no_page(server, page):
    server.pages["/props"] = [(200, page)]
    assert client.connect(server.url).server == "unknown"


# ---- limits ----


@pytest.mark.parametrize("where", ["body", "header"])
def test_an_answer_that_drips_ends_in_time(server, where):
    endpoint = client.connect(server.url, timeout_seconds=0.4, retries=3)
    server.faults = [f"drip {where}"] * 4
    with no_hang(), pytest.raises(EndpointError, match="no answer in time"):
        endpoint.chat("x", 6)
    assert len(server.asked) == 1
    end = time.monotonic() + 10
    while any(thread.name == "request" for thread in threading.enumerate()):
        assert time.monotonic() < end, "a thread still reads"
        time.sleep(0.01)
    server.faults = []
    assert endpoint.chat("x").text == TEXT, "the next request has a connection"


def test_a_budget_waits_for_no_answer_and_the_question_counts_as_not_asked(server, tmp_path):
    """`score --budget-minutes` on a slow server: an answer may take an hour, and the budget is over long before."""
    endpoint, few = client.connect(server.url), Options(limit=3, progress=False)
    server.faults, began = ["slow 20"], time.monotonic()
    run = checks.score_set(endpoint, QUESTIONS, tmp_path, dataclasses.replace(few, until=began + 0.5))
    assert time.monotonic() - began < 5 and len(server.asked) == 1
    assert run.items["grade"].tolist() == ["cut"] and run.score.value is None
    server.faults = []
    again = checks.score_set(client.connect(server.url), QUESTIONS, tmp_path, few)
    assert (again.n_resumed, len(again.answered)) == (0, 3)


def test_an_interrupt_waits_for_no_request_and_no_other_is_sent(server):
    endpoint = client.connect(server.url)
    server.faults = ["slow 2"] * 9
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    began = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        client.side_by_side(endpoint.chat, "abcdef", 2) as answers,
    ):
        list(answers)
    assert time.monotonic() - began < 1.8
    time.sleep(3)
    assert len(server.asked) == 2


def test_an_answer_of_100_megabytes_is_left(server):
    server.faults = ["endless 100000000"]
    with pytest.raises(EndpointError, match="bytes"):
        client.connect(server.url).chat("x", 16)


# ---- prompts that are cut ----


def test_a_question_that_is_cut_is_no_wrong_answer(server, tmp_path):
    long = QUESTIONS.items[0].__class__(
        **{**vars(QUESTIONS.items[0]), "id": "long", "prompt": "The dog slept. " * 120}
    )
    questions = QUESTIONS.__class__(**{**vars(QUESTIONS), "items": (*QUESTIONS.items[:3], long)})
    server.window = 70
    with pytest.raises(ContextOverflowError, match="cut the prompt"):
        checks.score_set(client.connect(server.url), questions, tmp_path, Options(progress=False))


def test_a_server_that_counts_no_tokens_ends_the_check_of_its_context(server):
    server.window = 0
    connected = dataclasses.replace(client.connect(server.url), n_ctx=512)
    verdict, finding = checks.Checks(connected, None).context_length()
    assert verdict == checks.UNSEEN and "does not count" in finding


def test_a_server_that_answers_beyond_its_context_fails_the_check(server):
    server.window = 300
    connected = dataclasses.replace(client.connect(server.url), n_ctx=512)
    verdict, finding = checks.Checks(connected, None).context_length()
    assert verdict == checks.FAIL and "of which it read 300 tokens" in finding


# ---- secrets ----


@pytest.mark.parametrize("status, kind", [(400, EndpointError), (500, TemporaryError), (401, EndpointError)])
def test_a_server_that_repeats_the_key_does_not_get_it_shown(server, status, kind):
    endpoint = client.connect(server.url, key=KEY, retries=0)
    server.faults = [f"echo {status}"]
    with pytest.raises(kind) as caught:
        endpoint.chat("x")
    shown = "".join(traceback.format_exception(caught.value)) + repr(endpoint)
    assert KEY not in shown


def test_a_key_in_an_answer_is_in_no_file(server, tmp_path):
    server.faults = ["echo 200"] * 2
    endpoint = client.connect(server.url, key=KEY)
    checks.score_set(endpoint, QUESTIONS, tmp_path, Options(limit=2, progress=False))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    "form",
    [
        "http://user:{key}@{host}/v1",
        "http://{host}/v1?api_key={key}",
        "http://{host}/{key}@x/v1",
        "http://{host}/v1?{key}",
        "http://user:a/{key}@{host}",
        "http://{host}/v1#{key}",
        "http://{host}/v1;key={key}",
    ],
)
def test_a_secret_in_an_address_is_masked(form):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{held.getsockname()[1]}"
        url = form.format(key=KEY, host=host)
        with pytest.raises(EndpointError) as caught:
            client.connect(url, retries=0)
        with pytest.raises(EndpointError) as refused:
            client.check_in_process(url, "routing")
    assert KEY not in str(caught.value) + str(refused.value)


def test_a_redirect_is_not_followed(server):
    """It would take the key, or the question, to another address."""
    server.pages["/props"] = [(307, {})]
    assert client.connect(server.url).server == "unknown"


# ---- proxies and our own servers ----


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that keeps what it is asked."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(65536))
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{listening.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield seen


def test_this_machine_is_asked_without_a_proxy(server, proxy):
    server.key = KEY
    for host in ("127.0.0.1", "localhost"):
        endpoint = client.connect(server.url.replace("127.0.0.1", host), key=KEY, retries=0)
        assert endpoint.chat("x").text == TEXT
    assert not proxy


def test_other_machines_are_asked_through_the_proxy(proxy):
    with pytest.raises(TemporaryError, match="502"):
        client.connect("http://models.example/v1", retries=0)
    assert proxy and b"models.example" in proxy[0]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("socks5://user:in-the-proxy@127.0.0.1:9", "no proxy can be used .*needs the package socksio"),
        ("socks4://127.0.0.1:9", "no proxy can be used .*check HTTP_PROXY"),
        ("http://[::1", "no proxy can be used"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_explained_at_once(monkeypatch, address, words):
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", address)
    monkeypatch.setenv("all_proxy", address)
    with pytest.raises(EndpointError, match=words) as caught:
        client.connect("http://models.example/v1")
    assert "in-the-proxy" not in str(caught.value)


def test_our_server_is_reached_without_the_proxy_and_admits_no_web_page(proxy, merged_reference, tmp_path):
    import urllib.request

    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    log = tmp_path / "log"
    log.write_text("load_tensors: offloaded 9/9 layers to GPU, in an earlier run\n")
    with servers.start(merged_reference, OpenSettings(n_ctx=256, n_threads=1), log=log) as server:
        key = server.key.get_secret_value()
        assert server.connect(retries=0).complete("The", 1).n_tokens == 1
        with pytest.raises(EndpointError):
            client.connect(server.base_url).complete("The", 1)
        headers = {"Origin": "http://evil.example", "Authorization": f"Bearer {key}"}
        with direct.open(urllib.request.Request(f"{server.base_url}/models", headers=headers)) as answer:
            allowed = answer.headers.get("Access-Control-Allow-Origin", "")
        assert allowed in ("", servers.NO_ORIGIN)
        assert key not in repr(server) + str(server.loaded)
        assert server.loaded["offloaded_layers"] == 0 and server.loaded["repacked"] is False
        assert "xllamacpp" in server.loaded["version"]
    assert not proxy and key not in log.read_text()
