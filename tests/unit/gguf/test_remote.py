"""A look before the download: a real server with ranges, and headers of the artifact's real shape."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from gguf_fixtures import REAL_TENSORS, real_size_shards
from hub_server import HubServer

from dfqs_nb.core.errors import RegistryError, ShardError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import read_header
from dfqs_nb.merge import diagnose

NANO = [data_dir() / "reference" / f"DFQS-Nano-IQ1_S-XL-0000{i}-of-00002.gguf" for i in (1, 2)]
MOST_BYTES = 30_000_000


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> dict[str, Path]:
    """Two sparse shards of the published shape, and the same glued into one file, as it was published."""
    folder = tmp_path_factory.mktemp("real")
    shards = real_size_shards(folder / "flash")
    glued, end = folder / "glued.gguf", 0
    with glued.open("wb") as file:
        for shard in shards:
            header = read_header(shard)
            file.seek(end)
            file.write(header.raw)
            end += header.file_size
        file.truncate(end)
    return {path.name: path for path in [*shards, glued]}


@pytest.fixture(scope="module")
def server(real):
    files = {**real, **{path.name: path for path in NANO}, "one/alone-00001-of-00002.gguf": NANO[0]}
    with HubServer({"someone/flash": files}) as server:
        yield server


def dfqs(server: HubServer, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command as a user would type it, with this server as the hub, and without a proxy."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().endswith("_PROXY")}
    return subprocess.run(
        [sys.executable, "-m", "dfqs_nb", *words],
        env={**kept, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        timeout=120,
    )


def address(server: HubServer, name: str) -> str:
    return f"{server.endpoint}/someone/flash/resolve/main/{name}"


def test_a_glued_file_of_the_real_size_is_seen_through_before_the_download(server, tmp_path):
    server.log.clear()
    done = dfqs(server, tmp_path, "inspect", "hf://someone/flash/glued.gguf")
    assert done.returncode == 1, "it is no sound model"
    for words in (
        "raw concatenation",
        "after the download: ",
        " repair glued.gguf --in-place",  # the program has another name where it is not installed
        "llama.cpp's loader takes",
    ):
        assert words in done.stdout, done.stdout + done.stderr
    assert "of free memory by" in done.stdout, "62 GB do not fit here"
    assert sum(request.sent for request in server.log) < MOST_BYTES


def test_a_plan_of_what_does_not_fit_here_has_rows_of_larger_machines(server, tmp_path):
    speeds = ("--ram-gbs", "10", "--disk-gbs", "1")
    done = dfqs(server, tmp_path, "plan", "hf://someone/flash/glued.gguf", *speeds)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{machine} " in done.stdout for machine in ("64 GiB", "96 GiB", "128 GiB")), done.stdout


@pytest.mark.parametrize("form", ["hf://someone/flash/{}", "{}/someone/flash/blob/main/{}"])
def test_all_shards_of_a_set_are_read_from_the_address_of_any(server, tmp_path, form):
    name = "flash-00002-of-00002.gguf"
    where = form.format(*([name] if form.startswith("hf") else [server.endpoint, name]))
    server.log.clear()
    done = dfqs(server, tmp_path, "inspect", where)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        f"{REAL_TENSORS:,}",
        "284,332,240,471",
        "6 of 256 experts a token",
        "loader takes this file",
    ):
        assert words in done.stdout, done.stdout
    assert sum(request.sent for request in server.log) < MOST_BYTES


def test_the_copy_is_the_file_as_far_as_headers_go(server):
    with models.headers_of(address(server, NANO[1].name)) as (path, _):
        assert path.stat().st_size == NANO[1].stat().st_size
        assert read_header(path).raw == read_header(NANO[1]).raw
        assert diagnose(path, allow_holes=True).kind == diagnose(NANO[1]).kind
    assert not path.exists(), "the copy goes with the block"


def test_a_model_is_outlined_wherever_it_is(server, real):
    glued = str(real["glued.gguf"])
    for model in (glued, address(server, "glued.gguf"), address(server, "flash-00001-of-00002.gguf")):
        with models.outline(model) as outline:
            assert len(outline.tensors) == REAL_TENSORS and outline.paths[0].is_file()
            assert outline.glued == ("glued" in model)
            assert bool(outline.places) == (model != glued)


def test_a_missing_shard_is_named(server):
    with (
        pytest.raises(ShardError, match="alone-00002-of-00002.gguf"),
        models.outline(address(server, "one/alone-00001-of-00002.gguf")),
    ):
        pass


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_bad_second_shard_is_named_by_its_address(server, tmp_path, command):
    page = tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html><html><title>Log in</title></html>")
    server.repos["someone/half"] = {NANO[0].name: NANO[0], NANO[1].name: page}
    done = dfqs(server, tmp_path, command, f"hf://someone/half/{NANO[0].name}")
    bad = f"hf://someone/half/{NANO[1].name}"
    assert done.returncode == 1 and done.stderr.startswith(f"dfqs-nb: {bad}: not a GGUF file"), done.stderr
    text = done.stdout + done.stderr
    assert f"inspect {bad}`" in done.stderr and text.count(NANO[1].name) == text.count(bad), (
        "no copy is named"
    )


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("/someone/flash/resolve/main/none.gguf", "cannot be fetched .Client error '404"),
        ("/nobody/flash/resolve/main/none.gguf", "cannot be fetched .Client error '404"),
        (":1/m.gguf", "cannot be fetched .*[Rr]efused.*check address, network"),
    ],
)
def test_what_a_server_does_not_give_is_one_message(server, where, words, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    base = "http://127.0.0.1" if where.startswith(":") else server.endpoint
    with pytest.raises(RegistryError, match=words) as caught, models.headers_of(f"{base}{where}?token=mine"):
        pass
    assert "mine" not in str(caught.value), "no secret of an address is shown"


@pytest.mark.parametrize("where", ["http://h:x/m.gguf", "https://[x/m.gguf", "https://[::1/m.gguf"])
def test_what_is_no_address_is_one_message_about_it(where):
    with pytest.raises(RegistryError, match="check .*address") as caught, models.headers_of(where):
        pass
    assert caught.value.where == where


def test_a_server_without_ranges_is_named(server):
    server.ranges = False
    try:
        with (
            pytest.raises(
                RegistryError,
                match="only whole files; download it, and give its path$",
            ),
            models.headers_of(address(server, NANO[0].name)),
        ):
            pass
    finally:
        server.ranges = True


def test_a_server_that_drips_is_given_up(monkeypatch):
    """Each byte comes in time, so no timeout of the connection ends it."""

    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(206)
            self.send_header("Content-Range", "bytes 0-524287/600000")
            self.send_header("Content-Length", "524288")
            self.end_headers()
            with suppress(OSError):
                while True:
                    self.wfile.write(b"G")
                    time.sleep(0.01)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(models, "TOTAL_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Dripping) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        where = f"http://127.0.0.1:{http.server_port}/m.gguf"
        with pytest.raises(RegistryError, match="too slowly"), models.headers_of(where):
            pass
        http.shutdown()


def test_a_page_instead_of_a_file_is_diagnosed(server, tmp_path):
    page = tmp_path / "page.gguf"
    page.write_text("<!DOCTYPE html><html><title>Log in</title></html>")
    server.repos["someone/page"] = {"page.gguf": page}
    where = f"{server.endpoint}/someone/page/resolve/main/page.gguf"
    with models.headers_of(where) as (path, _):
        assert "page" in str(diagnose(path, allow_holes=True).finding)


def test_secrets_of_an_address_are_not_shown():
    assert models.shown("https://user:word@a.org/m.gguf?token=s#f") == "https://***@a.org/m.gguf?***"
    assert models.shown("m.gguf?x") == "m.gguf?x"
