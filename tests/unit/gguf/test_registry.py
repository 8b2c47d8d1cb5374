"""Names to files, and downloads from a hub that breaks: a real HTTP server and the real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Cut, HubServer
from huggingface_hub import HfUri

from dfqs_nb.core import errors
from dfqs_nb.core.errors import IntegrityError, RegistryError, SpaceError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import models as registry

REFERENCE = data_dir() / "reference"
BIG = "DFQS-Nano-Q8_0-00001-of-00002.gguf"
SHARDS = ("DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf", "DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf")

# Resolves each argument and prints what came of it. Only this machine may be reached; waits are cut short.
CLIENT = """
import json, socket, sys, time
time.sleep = lambda seconds: None
lookup = socket.getaddrinfo
def local_only(host, *rest, **more):
    assert host in ("127.0.0.1", "localhost"), f"the client tried to reach {host}"
    return lookup(host, *rest, **more)
socket.getaddrinfo = local_only
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.models import resolve
def attempt(name):
    try:
        return {"paths": [str(path) for path in resolve(name)]}
    except DfqsError as error:
        return {"error": type(error).__name__, "text": str(error)}
print(json.dumps([attempt(name) for name in sys.argv[1:]]))
"""


def client(endpoint: str, home: Path, *names: str, patch: str = "", **env: str) -> list[dict]:
    """Run ``resolve`` on each name in a fresh process, as a user would, with these environment variables."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().endswith("_PROXY") and not key.startswith("HF_")
    }
    done = subprocess.run(
        [sys.executable, "-c", patch + CLIENT, *names],
        cwd=REPOSITORY,
        timeout=120,
        env={**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture
def server():
    files = {name: REFERENCE / name for name in (*SHARDS, BIG)}
    with HubServer({"someone/nano": files, "someone/empty": {}}) as server:
        yield server


@pytest.fixture
def model() -> registry.Model:
    return registry.registered()["dfqs-nano-iq1_s-xl"]


# The table


def test_table_agrees_with_the_files_and_with_sha256sums():
    published = dict(reversed(line.split()) for line in (REFERENCE / "SHA256SUMS").read_text().splitlines())
    registered = {
        file.name: file
        for model in registry.registered().values()
        if model.source == "data/reference"
        for file in model.files
    }
    assert published == {name: file.sha256 for name, file in registered.items()}
    for name, file in registered.items():
        assert (REFERENCE / name).stat().st_size == file.size_bytes, name
        assert sha256(REFERENCE / name) == file.sha256, name
    assert {path.name for path in REFERENCE.glob("*.gguf")} == registered.keys()


def test_single_file_is_as_long_as_its_shards_together():
    known = registry.registered()
    sharded, single = known["deepseek-v4-flash-iq1_s-xl"], known["deepseek-v4-flash-iq1_s-xl-single"]
    assert sharded.size_bytes == single.size_bytes == 61_540_805_344, "a merge would drop a header"


def test_every_entry_is_complete():
    for model in registry.registered().values():
        assert model.title and model.licence and model.numbers_from and model.note, model.name
        assert model.source == "data/reference" or model.source.startswith("hf://")
        for file in model.files:
            assert file.size_bytes > 0 and len(bytes.fromhex(file.sha256)) == 32, file.name
        assert [file.name for file in model.files] == registry.siblings(model.files[0].name)
    assert [len(model.files) for model in registry.registered().values()] == [2, 2, 1, 2, 1]


def test_broken_table_names_itself(tmp_path, monkeypatch):
    (tmp_path / "models.toml").write_text("[x]\ntitle = 'no files'\n")
    monkeypatch.setenv("DFQS_DATA", str(tmp_path))
    with pytest.raises(RegistryError, match="models.toml: cannot read the table"):
        registry.registered()


# Local paths


def test_local_shard_is_given_back_alone():
    assert registry.resolve(REFERENCE / SHARDS[1]) == (REFERENCE / SHARDS[1],)
    assert registry.resolve(str(REFERENCE / SHARDS[1])) == (REFERENCE / SHARDS[1],)


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-that-name/m.gguf"])
def test_a_name_that_no_file_can_have_is_one_message(name):
    with pytest.raises(RegistryError, match="no such"):
        registry.resolve(name)


def test_a_folder_is_no_model():
    with pytest.raises(RegistryError, match="is a folder, or no regular file; name a file"):
        registry.resolve(REFERENCE)


@pytest.mark.parametrize(
    "name, answer",
    [
        ("dfqs-nano-iq1_xl", "dfqs-nano-iq1_xl: no such model; did you mean dfqs-nano-iq1_s-xl?"),
        ("DFQS-Nano-Q8_0", "did you mean dfqs-nano-q8_0?"),
        ("zzz", "zzz: no such model; known: dfqs-nano-iq1_s-xl, dfqs-nano-q8_0, dfqs-nano-f16"),
        ("models/absent.gguf", "models/absent.gguf: no such file"),
        ("hf://someone/nano", "write hf://owner/repo/file.gguf"),
    ],
)
def test_unknown_names_say_what_is_known(name, answer):
    with pytest.raises(RegistryError) as caught:
        registry.resolve(name)
    assert answer in str(caught.value)


def hub_file(repo: str, file: str, revision: str | None = None) -> HfUri:
    return HfUri("model", repo, revision, file)


@pytest.mark.parametrize(
    "address, file",
    [
        ("hf://a/b/c.gguf", hub_file("a/b", "c.gguf")),
        ("hf://a/b/d/c.gguf@refs/pr/1", hub_file("a/b", "d/c.gguf", "refs/pr/1")),
        ("hf://a/b@v1/c.gguf", hub_file("a/b", "c.gguf", "v1")),
        ("https://huggingface.co/a/b/blob/main/d/c.gguf", hub_file("a/b", "d/c.gguf", "main")),
        ("https://hf.co/a/b/resolve/v1/c.gguf?download=true", hub_file("a/b", "c.gguf", "v1")),
        (
            "https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/c%20d.GGUF",
            hub_file("a/b", "c d.GGUF", "refs/pr/1"),
        ),
    ],
)
def test_addresses(address, file):
    assert registry.parse_address(address) == file


NO_ADDRESSES = [
    "hf://a/b/-c.gguf",
    "hf://-a/b/c.gguf",
    "hf://a/b/../../c.gguf",
    "hf://a/b@--x/c.gguf",
    "hf://a/b",
]
NO_ADDRESSES += ["hf://../b/c.gguf", "https://huggingface.co/a/b/resolve/main/..%2F..%2Fc.gguf"]


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_no_address_is_an_option_of_another_command_or_leaves_a_folder(address):
    with pytest.raises(RegistryError, match="not the address"):
        registry.parse_address(address)


# Sizes and hashes


def damaged_copy(folder: Path, change) -> tuple[Path, ...]:
    for name in SHARDS:
        shutil.copy(REFERENCE / name, folder)
    with (folder / SHARDS[1]).open("r+b") as file:
        change(file)
    return tuple(folder / name for name in SHARDS)


def test_a_changed_byte_is_found_by_its_hash(tmp_path, model):
    paths = damaged_copy(tmp_path, lambda file: file.write(b"\0"))
    with pytest.raises(
        IntegrityError, match="00002-of-00002.gguf: not the published file.* download it again"
    ):
        registry.check_files(paths, model)


def test_good_files_pass(model):
    paths = registry.resolve(model.name)
    assert registry.check_files(paths, model) == tuple(file.sha256 for file in model.files)


def test_all_shards_follow_from_any():
    both = [f"hf://a/b/tiny-0000{i}-of-00002.gguf@v1" for i in (1, 2)]
    assert registry.siblings(both[1]) == both and registry.siblings("tiny.gguf") == ["tiny.gguf"]


# The hub


def test_all_shards_are_fetched_from_one_name_and_then_cached(server, tmp_path):
    name = f"hf://someone/nano/{SHARDS[1]}"
    (first,) = client(server.endpoint, tmp_path, name)
    assert [Path(path).name for path in first["paths"]] == list(SHARDS)
    assert [sha256(path) for path in first["paths"]] == [sha256(REFERENCE / shard) for shard in SHARDS]
    assert [request.range for request in server.downloads()] == [None, None]
    server.stop()
    seen = len(server.log)
    assert client(server.endpoint, tmp_path, name, HF_HUB_OFFLINE="1") == [first]
    assert client(server.endpoint, tmp_path, name) == [first], "with the hub down, the cache serves it"
    assert len(server.log) == seen
    server.start()


@pytest.mark.parametrize("how", ["close", "restart", "reset"])
def test_a_transfer_that_dies_half_way_is_taken_up_again(server, tmp_path, how):
    """The file is longer than 2 of huggingface_hub's blocks of 10 MiB: a block is the least that it keeps.

    After a reset huggingface_hub begins the file again, and so do we.
    """
    whole = tmp_path / "one.gguf"
    whole.write_bytes(b"".join(path.read_bytes() for path in sorted(REFERENCE.glob("*.gguf"))))
    server.repos["someone/one"] = {"one.gguf": whole}
    server.cuts = [Cut(12_000_000, how), Cut(11_000_000, how)]
    (answer,) = client(server.endpoint, tmp_path / "home", "hf://someone/one/one.gguf")
    assert sha256(answer["paths"][0]) == sha256(whole)
    resumed = [None, None, None] if how == "reset" else [None, "bytes=10485760-", "bytes=20971520-"]
    assert [request.range for request in server.downloads()] == resumed


def test_a_server_that_dies_for_good_leaves_no_half_file(server, tmp_path):
    server.cuts = [Cut(1_000_000, "stop")]
    server.repos["someone/one"] = {"one.gguf": REFERENCE / BIG}
    (answer,) = client(server.endpoint, tmp_path, "hf://someone/one/one.gguf")
    assert answer["error"] == "RegistryError"
    assert "cannot be fetched" in answer["text"] and "run again" in answer["text"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    server.start()


def test_each_refusal_says_why_and_what_next(server, tmp_path):
    expected = {
        "hf://someone/nano/absent.gguf": "404 Client Error. Entry Not Found",
        "hf://someone/absent/x.gguf": "404 Client Error. Repository Not Found",
        "hf://private/any/x.gguf": "401 Client Error. Repository Not Found",
        "hf://gated/any/x.gguf": "Cannot access gated repo",
        "hf://forbidden/any/x.gguf": "cannot be fetched (403",
        "hf://busy/any/x.gguf": "cannot be fetched (Server error '503",
        f"hf://someone/nano/{BIG}@v9": "Revision Not Found",
        "hf://some--one/-nano-/x.gguf": "not the address of a GGUF on the hub",
    }
    answers = client(server.endpoint, tmp_path, *expected)
    for answer, (name, text) in zip(answers, expected.items(), strict=True):
        assert answer.get("error") in ("RegistryError",), (name, answer)
        assert answer["text"].startswith(name) and text in answer["text"], answer
    assert not server.downloads()


def test_one_missing_shard_stops_before_the_first_byte(server, tmp_path):
    del server.repos["someone/nano"][SHARDS[1]]
    (answer,) = client(server.endpoint, tmp_path, f"hf://someone/nano/{SHARDS[0]}")
    assert f"{SHARDS[1]}: cannot be fetched (404 Client Error. Entry Not Found" in answer["text"]
    assert not server.downloads()


def test_offline_and_not_cached(server, tmp_path):
    (answer,) = client(server.endpoint, tmp_path, f"hf://someone/nano/{BIG}", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in answer["text"]
    assert not server.log


def test_no_network(server, tmp_path):
    server.stop()
    (answer,) = client(server.endpoint, tmp_path, f"hf://someone/nano/{BIG}")
    assert "Connection refused" in answer["text"] and "check address, network" in answer["text"]
    server.start()


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://127.0.0.1:9", "the 'socksio' package is not installed"),
        ("socks4://127.0.0.1:9", "Unknown scheme for proxy URL"),
        ("http://[::1", "Invalid port"),
    ],
)
def test_a_proxy_that_cannot_be_used(tmp_path, proxy, words):
    (answer,) = client("http://models.example", tmp_path, "hf://o/r/a.gguf", ALL_PROXY=proxy, NO_PROXY="")
    assert answer["error"] == "RegistryError" and words in answer["text"]


def test_revision(server, tmp_path):
    (answer,) = client(server.endpoint, tmp_path, f"hf://someone/nano/{SHARDS[0]}@{COMMIT}")
    assert COMMIT in answer["paths"][0]
    assert {request.path.split("/")[4] for request in server.log if "resolve" in request.path} == {COMMIT}


def test_a_registered_model_is_found_in_another_folder(server, tmp_path):
    entry = (data_dir() / "models.toml").read_text().replace('"data/reference"', '"hf://someone/nano"', 1)
    (tmp_path / "models.toml").write_text(entry)
    places = {f"IQ1/{SHARDS[0]}": REFERENCE / SHARDS[0], SHARDS[1]: REFERENCE / SHARDS[1]}
    server.repos["someone/nano"] = places
    (good,) = client(server.endpoint, tmp_path / "good", "dfqs-nano-iq1_s-xl", DFQS_DATA=str(tmp_path))
    assert Path(good["paths"][0]).parent.name == "IQ1" and len(good["paths"]) == 2


def test_wrong_contents_of_the_right_size_are_found_by_hash(server, tmp_path, model):
    damaged_copy(tmp_path, lambda file: file.write(b"\0"))
    server.repos["someone/nano"][SHARDS[1]] = tmp_path / SHARDS[1]
    (answer,) = client(server.endpoint, tmp_path / "home", f"hf://someone/nano/{SHARDS[0]}")
    paths = tuple(map(Path, answer["paths"]))
    with pytest.raises(IntegrityError, match="not the published file.* delete .*/blobs/"):
        registry.check_files(paths, model)


def test_full_disk_is_seen_before_the_first_byte(server, tmp_path):
    patch = "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=1000)\n"
    (answer,) = client(server.endpoint, tmp_path, f"hf://someone/nano/{SHARDS[0]}", patch=patch)
    need = sum((REFERENCE / name).stat().st_size for name in SHARDS)
    assert answer["error"] == "SpaceError"
    assert f"needs {need:,} bytes and the disk has 1,000 free" in answer["text"]
    assert not server.downloads()


@pytest.mark.parametrize("number, kind", [("ENOSPC", SpaceError), ("EACCES", errors.OutputError)])
def test_disk_errors_during_the_download(number, kind):
    import errno

    with (
        pytest.raises(kind, match="cannot be written .*why.*; free some space"),
        registry.explained("hf://a/b/c.gguf"),
    ):
        raise OSError(getattr(errno, number), "why")


def test_importing_the_registry_is_light():
    code = (
        "import sys, dfqs_nb.gguf.models; "
        "print([name for name in ('pandas', 'huggingface_hub', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert done.stdout.strip() == "[]"
