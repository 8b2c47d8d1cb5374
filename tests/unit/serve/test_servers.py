"""A real local server with the reference model: it comes up, answers as this process does, and goes away."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import gguf
import pandas as pd
import pytest
from faulty_server import FaultyServer
from gguf.scripts import gguf_new_metadata

from conftest import REFERENCE
from dfqs_nb import core
from dfqs_nb.core.errors import ModelError
from dfqs_nb.ladder import fidelity
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import ItemSet, Options
from dfqs_nb.serve import checks as server_checks
from dfqs_nb.serve import client as endpoint
from dfqs_nb.serve import servers
from dfqs_nb.serve.client import ContextOverflowError, EndpointError

SETTINGS = OpenSettings(n_ctx=512, n_threads=1)
OURS = {"model_id": "", "local": (), "stopped": {}}  # options of `compare_all`
QUESTION = "Tom is tall. Ann is small. Who is tall?"


@pytest.fixture(scope="module")
def model(merged_reference):
    with llama_model.open_model(merged_reference, SETTINGS) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(merged_reference, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    with servers.start(merged_reference, SETTINGS, log=log) as opened:
        yield opened


def listening(pid: int) -> set[str]:
    """Addresses that a process listens on, from the kernel's tables (Linux)."""
    own = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            own.add(str(handle.readlink()))
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                addresses.add(fields[1].split(":")[0])
    return addresses


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_it_listens_on_loopback_only(server):
    assert server.base_url.startswith("http://127.0.0.1:") and server.alive
    assert listening(server.process.pid) == {"0100007F"}


def test_it_answers_as_this_process_does(server, model):
    connected = server.connect()
    assert connected.server == "llama.cpp" and connected.n_ctx == 512
    ours = llama_generate.chat(model, QUESTION, 12)
    reply = connected.chat(QUESTION, 12)
    assert (reply.text, reply.finish_reason) == (ours.text, "eos")
    code = "def add(a, b):\n"
    for stop in ((), ("\n",)):
        ours = llama_generate.generate(model, model.with_bos(model.tokenize(code)), 24, stop=stop)
        assert connected.complete(code, 24, stop=stop).text == ours.text


def test_its_log_probabilities_are_ours(server, model):
    reply = server.connect().chat(QUESTION, 12, logprobs=True, top_logprobs=1)
    ours = fidelity.continuation(model, llama_generate.chat_prompt(model, QUESTION), 12)
    for (text, value), (likeliest, *_) in zip(reply.logprobs, ours, strict=False):
        assert text.encode() == model.token_bytes(likeliest[0])
        assert value == pytest.approx(likeliest[1], abs=0.05)  # it computes in other batches
    assert len(ours) >= 3 and len(reply.logprobs) >= len(ours)


def test_an_overflow_is_told_from_other_failures(server):
    with pytest.raises(ContextOverflowError):
        server.connect(retries=1).complete("a b c " * 600, 4)
    assert server.alive and server.connect().chat(QUESTION, 4).text


def test_the_checks_find_a_sound_server(server, model):
    table = server_checks.check_all({"s": server.connect()}, model).set_index("check")
    assert set(table["verdict"]) <= {"pass", "note"} and len(table) == 4, table["finding"].tolist()
    for check in ("context length", "chat template", "same again"):
        assert table.loc[check, "verdict"] == "pass", table.loc[check, "finding"]


def test_the_same_items_in_process_and_through_it(server, model, tmp_path):
    questions = ItemSet.load("nano-reasoning")
    items = server_checks.compare_all(
        model, {"s": server.connect()}, [questions], tmp_path, limit=24, progress=False, **OURS
    )
    assert len(items) == 24 and items["same_text"].all(), server_checks.comparison_table(items)["causes"]
    assert items["text_process"].equals(items["text_server"])


def test_speed_under_clients(server):
    table = server_checks.speed_of_all({"s": server.connect()}, (1, 2), 16, {})
    assert (table["tokens_per_sec"] > 0).all() and table["tokens"].tolist() == [32, 32]


def test_an_idle_connection_makes_no_other_client_wait(server):
    """By default a server with one slot has five threads, and each idle connection holds one for seconds."""
    with contextlib.ExitStack() as idle:
        began = time.monotonic()
        for _ in range(12):
            connection = HTTPConnection(servers.HOST, server.port)
            idle.callback(connection.close)
            connection.request("GET", "/health")
            assert connection.getresponse().read()
        assert time.monotonic() - began < 4


def test_an_answer_that_fills_the_context_is_no_wrong_answer(server, tmp_path):
    questions = ItemSet.load("nano-reasoning")
    long = dataclasses.replace(questions.items[0], prompt="The dog slept near the fire. " * 40)
    many = dataclasses.replace(questions, items=(long,), max_tokens=400)
    connected = server.connect()
    connected = dataclasses.replace(connected, options={**connected.options, "ignore_eos": True})
    with pytest.raises(ContextOverflowError, match="512 tokens of context were full after"):
        server_checks.score_set(connected, many, tmp_path, Options(progress=False))


# ---- models that think ----

THINKS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinking(tmp_path_factory):
    """The shipped F16 model with a template that opens a thinking, as those of models that always think do."""
    path = tmp_path_factory.mktemp("thinking") / "thinking.gguf"
    details = gguf_new_metadata.MetadataDetails(gguf.GGUFValueType.STRING, THINKS)
    gguf_new_metadata.copy_with_new_metadata(
        gguf.GGUFReader(REFERENCE / "DFQS-Nano-F16.gguf"),
        gguf.GGUFWriter(path, "deepseek4"),
        {gguf.Keys.Tokenizer.CHAT_TEMPLATE: details},
        [],
    )
    return path


def test_a_thinking_stays_in_the_answer(thinking, tmp_path):
    """Else llama.cpp's server has an empty answer where the tokens end before the thinking does."""
    thought = "I see it now.\n</think>\n\nThe box."
    forced = {"grammar": f"root ::= {json.dumps(thought)}"}  # the reference model itself thinks nothing
    with (
        servers.start(thinking, SETTINGS) as server,
        llama_model.open_model(thinking, SETTINGS) as model,
    ):
        connected = server.connect()
        assert connected.chat(QUESTION, 48, **forced).text.removeprefix("<think>\n") == thought
        split = connected.chat(QUESTION, 48, reasoning_format="deepseek", **forced).text
        assert "</think>" not in split and "The box." in split, "what this is about"
        questions = ItemSet.load("nano-reasoning")
        items = server_checks.compare_all(
            model, {"s": connected}, [questions], tmp_path, limit=4, progress=False, **OURS
        )
        assert items["same_text"].all(), server_checks.comparison_table(items)["causes"]


# ---- differences are explained ----


@pytest.mark.parametrize(("near", "cause"), [(0.0, "other numbers"), (1e9, "near-tie")])
def test_a_difference_is_followed_to_its_token(model, monkeypatch, near, cause):
    questions = ItemSet.load("nano-reasoning")
    item = questions.items[0]
    ours = llama_generate.chat(model, item.asked(questions.instruction), questions.max_tokens)
    monkeypatch.setattr(server_checks, "NEAR_TIE", near)
    text = b"".join(map(model.token_bytes, ours.token_ids[:2])).decode() + "zzz"
    reason = server_checks.explain(model, questions, item, text)
    assert reason["cause"] == cause and reason["token"] == 2 and reason["margin"] > 0


# ---- starting and ending ----


def is_mapped(path: Path, server: servers.LocalServer) -> bool:
    return path.name in Path(f"/proc/{server.process.pid}/maps").read_text()


def test_a_server_asks_for_its_key_and_is_gone_when_it_is_stopped(merged_reference, tmp_path):
    questions = ItemSet.load("nano-reasoning")
    with servers.start(merged_reference, SETTINGS, log=tmp_path / "log") as server:
        assert server.healthy and not server.has_ended
        assert is_mapped(merged_reference, server)
        key = server.key.get_secret_value().encode()
        with pytest.raises(EndpointError):
            endpoint.connect(server.base_url).chat(QUESTION, 4)
        server_checks.score_set(server.connect(), questions, tmp_path, Options(limit=2, progress=False))
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2 and len(key) > 30 and key not in command
    assert not [path for path in files if key in path.read_bytes()]
    assert not server.alive and server.has_ended
    assert server.stop() < 1 and server.log.closed and server.loaded["offloaded_layers"] == 0
    with pytest.raises(EndpointError, match="nothing answers"):
        server.connect(retries=0)


def test_a_file_is_not_mapped_unless_asked_for_and_a_server_dies_while_asked(merged_reference, tmp_path):
    settings = dataclasses.replace(SETTINGS, use_mmap=False)
    with servers.start(merged_reference, settings, log=tmp_path / "log") as server:
        assert not is_mapped(merged_reference, server)
        connected = server.connect(retries=1)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(30)
        with pytest.raises(EndpointError):
            connected.chat(QUESTION, 8)
        assert not server.has_ended


ORPHAN = """
import os, signal, sys
from dfqs_nb.serve import servers
from dfqs_nb.llama.settings import OpenSettings
server = servers.start(sys.argv[1], OpenSettings(n_ctx=256, n_threads=1), log=sys.argv[2])
print(server.process.pid, server.port, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_ends_with_the_process_that_started_it(merged_reference, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, merged_reference, tmp_path / "log"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
    pid, port = map(int, done.stdout.split())
    assert wait_until(
        lambda: (
            port_is_free(port)
            and not Path(f"/proc/{pid}").exists()
            or "zombie" in Path(f"/proc/{pid}/status").read_text()
        )
    )


def test_what_cannot_start_says_why(merged_reference, tmp_path):
    broken = tmp_path / "broken.gguf"
    raw = bytearray(Path(merged_reference).read_bytes())
    at = raw.index(b"deepseek4")
    raw[at : at + 9] = b"deepseekX"
    broken.write_bytes(raw)
    with pytest.raises(ModelError, match="died while it started") as caught:
        servers.start(broken, SETTINGS, log=tmp_path / "log")
    assert "last lines" in caught.value.__notes__[0]


def test_what_stops_a_check_is_its_finding():
    with FaultyServer(faults=["none", "die"]) as faulty:
        connected = dataclasses.replace(endpoint.connect(faulty.url, retries=0), n_ctx=512)
        made = server_checks.Checks(connected, None).run(server_checks.Checks.context_length)
    assert made["verdict"] == "fail" and made["finding"].startswith("it stopped: "), made["finding"]


def test_slots_that_share_batches_show_how_far_numbers_move(merged_reference):
    with servers.start(merged_reference, SETTINGS, n_parallel=4) as four:
        verdict, finding = server_checks.Checks(four.connect(), None, n_tokens=8).same_beside_others()
    assert verdict in ("pass", "note")
    assert re.search("of 16 answers differ .*; log-probabilities move by up to", finding)


def test_what_the_notebook_hands_on(server, merged_reference, model, tmp_path):
    questions, connected = [ItemSet.load("nano-reasoning")], {"llama.cpp": server.connect()}
    checks = pd.DataFrame([{"check": "context length", "server": "llama.cpp", "verdict": "pass"}])
    speeds = server_checks.speed_of_all(connected, (1, 2), 8, {})
    options = {"progress": False, "model_id": "0", "stopped": {}}
    items = server_checks.compare_all(
        model, connected, questions, tmp_path, limit=4, local=("llama.cpp",), **options
    )
    answers = next(tmp_path.glob("llama.cpp/answers-*.jsonl"))
    kept = answers.read_bytes()
    server_checks.compare_all(model, connected, questions, tmp_path, limit=1, local=(), **options)
    assert len(kept.splitlines()) == 4 and len(answers.read_bytes().splitlines()) == 5, (
        "another model, it may be"
    )
    core.Stage(tmp_path, "merge").finish(conditions={}, summary=[], model={"sha256": "0"})
    lines = server_checks.hand_on(
        core.Stage(tmp_path, "serving"),
        running={"llama.cpp": server},
        checks=checks,
        speeds=speeds,
        items=items,
        connected=connected,
        recipes=["ollama"],
        stopped={"other": "it ended"},
    )
    assert "other: not measured to the end: it ended" in lines
    timed = [line for line in lines if "tokens/s" in line]
    assert len(timed) == 2 and all(" requests)" in line for line in timed), "a speed has its n"
    stage = json.loads((tmp_path / "serving.json").read_text())
    assert stage["summary"] == lines
    same = "llama.cpp: 4 of 4 answers of nano-reasoning are those of this process"
    assert f"{same}; 95 % upper bound of others: 53 %" in lines
    assert stage["conditions"]["llama.cpp"]["n_ctx"] == 512 and "127.0.0.1" not in json.dumps(stage)


def test_a_server_that_fails_for_good_is_left_out_and_named(server, model, tmp_path):
    questions, stopped = [ItemSet.load("nano-reasoning")], {}
    with FaultyServer(faults=["500"]) as faulty:
        connected = {"bad": endpoint.connect(faulty.url, retries=0), "good": server.connect()}
        options = {"local": (), "model_id": "", "stopped": stopped, "limit": 2, "progress": False}
        items = server_checks.compare_all(model, connected, questions, tmp_path, **options)
        assert set(items["server"]) == {"good"} and list(stopped) == ["bad"] and "500" in stopped["bad"]
        assert set(server_checks.speed_of_all(connected, (1,), 4, stopped)["server"]) == {"good"}
        faulty.faults = ["500"]
        with pytest.raises(EndpointError, match="no server answers"):
            server_checks.compare_all(model, {"bad": connected["bad"]}, questions, tmp_path / "2", **options)


@pytest.mark.slow
def test_all_nano_items_are_the_same_both_ways(merged_reference, tmp_path):
    settings = OpenSettings(n_ctx=1024, n_threads=1)
    with llama_model.open_model(merged_reference, settings) as model:
        with servers.start(merged_reference, settings) as server:
            connected = {"llama.cpp": server.connect()}
            items = server_checks.compare_all(
                model, connected, ItemSet.of_tier("nano"), tmp_path, progress=False, **OURS
            )
        table = server_checks.comparison_table(items)
        assert items["same_text"].all(), table["causes"]
        assert (table["right_process"] == table["right_server"]).all()
        assert table["items"].tolist() == [len(each.items) for each in ItemSet.of_tier("nano")]


def test_a_servers_process_imports_no_tables_and_begins_its_log_without_a_warning():
    command = [sys.executable, "-X", "importtime", "-m", servers.__name__]
    log = subprocess.run(command, input="", capture_output=True, text=True, check=False).stderr
    loaded = {line.split("|")[-1].strip() for line in log.splitlines() if line.startswith("import time:")}
    assert "dfqs_nb.serve.servers" not in loaded, "it runs as __main__, once"
    assert "dfqs_nb.serve.client" in loaded and loaded.isdisjoint({"pandas", "scipy", "matplotlib"})
    assert "RuntimeWarning" not in log
