"""Every target's recipe: written whole, parsed by what will read it, and run where it runs without installing."""

from __future__ import annotations

import ast
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
import types
from dataclasses import replace
from pathlib import Path

import deploy_peers
import gguf_fixtures
import llama_cpp_tools
import nbformat
import pytest
import yaml

from dfqs_nb.core import machine as machines
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.machine import Memory
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import broken as specimens
from dfqs_nb.gguf import memory
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.serve import recipes as deploy
from dfqs_nb.serve.recipes import write_recipe
from dfqs_nb.workbook import cli

TARGETS = tuple(deploy.targets())
SHARD = specimens.reference_shards().paths[1]
MERGED = registry.registered()["dfqs-nano-iq1_s-xl"].merged_sha256
SECRET = "sk-never-to-be-seen-91c2"
SINGLE = "deepseek-v4-flash-iq1_s-xl-single"
SHARDS = "deepseek-v4-flash-iq1_s-xl"
HUB = "hf://persadian/DeepSeek-V4-Flash-IQ1_S-XL/DeepSeek-V4-Flash-IQ1_S-XL.gguf"
# Keys that a file may have, as each program's source or documentation lists them.
COMPOSE_SERVICE = {"image", "command", "environment", "ports", "volumes", "deploy", "models"}
JAN = {"name", "model_path", "size_bytes", "embedding", "ctx_size", "n_gpu_layers", "parallel", "temperature"}
LEMONADE = {"ctx_size", "extra_models_dir", "host", "port", "llamacpp"}
KAGGLE = {
    "id",
    "title",
    "code_file",
    "language",
    "kernel_type",
    "is_private",
    "enable_gpu",
    "enable_internet",
    "dataset_sources",
    "competition_sources",
    "kernel_sources",
    "model_sources",
}
MODELFILE = {
    "FROM",
    "LICENSE",
    "TEMPLATE",
    "SYSTEM",
    "ADAPTER",
    "DRAFT",
    "RENDERER",
    "PARSER",
    "PARAMETER",
    "MESSAGE",
    "REQUIRES",
}
OLLAMA_OPTIONS = {"num_ctx", "num_thread", "num_gpu", "temperature", "seed"}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """The reference shards in a folder whose name tries every quoting."""
    folder = tmp_path_factory.mktemp("odd") / 'it\'s a $HOME "x" & 100% {y} {{ z }}'
    folder.mkdir()
    for path in specimens.reference_shards().paths:
        shutil.copy(path, folder)
    return folder


def texts(recipe: deploy.Recipe) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in recipe.files}


def commands_of(recipe: deploy.Recipe) -> list[list[str]]:
    """Words of every command; bash itself must take them too."""
    for command in (*recipe.commands, *recipe.checks):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return [shlex.split(command) for command in (*recipe.commands, *recipe.checks)]


def check_files(recipe: deploy.Recipe) -> None:
    """Each file is read by a reader of its format."""
    for name, text in texts(recipe).items():
        if name != "chat_template.jinja":
            assert "{{" not in text.replace("{{ z }}", "") and "{%" not in text, (
                f"{name}: a place was not filled in"
            )
        if name.endswith(".json"):
            json.loads(text)
        elif name.endswith((".yaml", ".yml")):
            assert isinstance(yaml.safe_load(text), dict)
        elif name.endswith(".py"):
            compile(text, name, "exec")
        elif name.endswith(".ipynb"):
            check_notebook(text)


def check_notebook(text: str) -> None:
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            compile(re.sub(r"^%", "#%", cell.source, flags=re.M), "cell", "exec")


def test_what_limits_one_architecture_is_not_told_to_another(tmp_path):
    fields = [gguf_fixtures.field("general.architecture", "STRING", "gemma3")]
    keys = {"block_count": 1, "embedding_length": 64, "context_length": 512, "attention.head_count": 1}
    fields += [gguf_fixtures.field(f"gemma3.{name}", "UINT32", value) for name, value in keys.items()]
    model, limits = tmp_path / "gemma.gguf", deploy.targets()["llama-cpp-source"].limits
    model.write_bytes(
        gguf_fixtures.gguf_bytes(fields, [gguf_fixtures.Spec("blk.0.attn_q.weight", "F32", (64, 64))])
    )
    told = [
        texts(write_recipe("llama-cpp-source", source, tmp_path / source.stem))["RECIPE.md"]
        for source in (model, SHARD)
    ]
    assert limits in told[1] and limits not in told[0] and "fork" not in told[0]
    assert "loads deepseek4: yes" in told[1] and "deepseek4" not in told[0].replace(str(tmp_path), "")


@pytest.mark.parametrize("target", TARGETS)
def test_recipe_for_the_local_file(target, odd_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DFQS_TEST_KEY", SECRET)
    recipe = write_recipe(target, odd_folder / SHARD.name, tmp_path / "recipe", key_variable="DFQS_TEST_KEY")
    assert recipe.files and all(path.is_file() for path in recipe.files)
    check_files(recipe)
    words = commands_of(recipe)
    whole = "\n".join([*texts(recipe).values(), *recipe.commands, *recipe.checks, *recipe.notes])
    assert SECRET not in whole, "a key was written"
    assert Path(recipe.model).is_absolute() or recipe.model.startswith("C:\\"), recipe.model
    assert recipe.settings["n_ctx"] <= 65_536 and recipe.settings["n_threads"] == 1
    assert deploy.targets()[target].limits in whole and words is not None
    if deploy.targets()[target].server:
        assert "DFQS_TEST_KEY" in "".join(recipe.checks)
        assert len(recipe.checks) == 2 and all("127.0.0.1" in check for check in recipe.checks)
        assert "0.0.0.0" not in whole or target == "llama-cpp-docker", "listens beyond this machine"


@pytest.mark.parametrize("target", TARGETS)
def test_the_model_stands_in_the_recipe_exactly(target, odd_folder, tmp_path):
    """Whatever the quoting, the words and values that come out are the path that went in."""
    recipe = write_recipe(target, odd_folder / SHARD.name, tmp_path)
    found = {word for words in commands_of(recipe) for word in words}
    for path in recipe.files:
        text = path.read_text(encoding="utf-8")
        if path.name == "compose.yaml":  # Compose reads $$ as $
            found |= set(map(str, values_of(yaml.safe_load(text.replace("$$", "$")))))
        elif path.suffix in (".json", ".yaml", ".yml"):
            found |= set(map(str, values_of(yaml.safe_load(text))))
        elif path.suffix == ".py":
            found |= set(re.findall(r'(?:MODEL = |model=)("(?:[^"\\]|\\.)*")', text))
        elif path.suffix == ".ipynb":
            found |= {
                line for cell in json.loads(text)["cells"] for line in "".join(cell["source"]).split("\n")
            }
        elif path.name in ("Modelfile", "serve.ps1"):
            found |= set(text.splitlines())
    wanted = {
        recipe.model,
        json.dumps(recipe.model, ensure_ascii=False),
        f"FROM {recipe.model}",
        f"MODEL = {json.dumps(recipe.model, ensure_ascii=False)}",
        "$model = '{}'".format(recipe.model.replace("'", "''")),
    }
    assert found & wanted, f"{recipe.model} is in none of {sorted(found)[:40]}"


def values_of(tree: object) -> list:
    if isinstance(tree, dict):
        return [value for one in tree.values() for value in values_of(one)]
    return [value for one in tree for value in values_of(one)] if isinstance(tree, list) else [tree]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", [SINGLE, HUB, SHARDS])
def test_a_registered_model_of_the_hub_is_made_one_sound_file(target, model, tmp_path):
    recipe = write_recipe(target, model, tmp_path)
    check_files(recipe)
    commands_of(recipe)
    whole = "\n".join([*texts(recipe).values(), *recipe.commands])
    name = SHARDS if model == SHARDS else SINGLE
    assert f"dfqs-nb merge {name} -o " in whole and "hf download" not in whole
    assert any("the disk must hold 61.5 GB twice" in note for note in recipe.notes)
    assert any(registry.registered()[name].note in note for note in recipe.notes), "the registry's word"
    assert "loads deepseek4" in texts(recipe)["RECIPE.md"]


def test_other_models_of_the_hub_are_downloaded(tmp_path):
    other = write_recipe("llama-cpp-brew", "hf://someone/models/Q4/m-00002-of-00003.gguf@v1", tmp_path / "b")
    words = shlex.split(other.commands[0])
    assert words[:6] == [
        "hf",
        "download",
        "someone/models",
        *(f"Q4/m-0000{n}-of-00003.gguf" for n in (1, 2, 3)),
    ]
    assert (
        words[6:8] == ["--revision", "v1"] and other.model == f"{tmp_path}/b/models/Q4/m-00001-of-00003.gguf"
    )


def test_the_hubs_own_command_line_takes_the_download(tmp_path):
    """`hf download`, with a hub that cannot be reached: it fails at the network, not at its arguments."""
    recipe = write_recipe("jan", "hf://someone/models/m-00001-of-00002.gguf@v1", tmp_path)
    program = Path(sys.executable).with_name("hf")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [program, *shlex.split(recipe.commands[0])[1:]],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1 and "No such option" not in done.stderr + done.stdout
    assert "offline" in (done.stderr + done.stdout).lower(), done.stderr + done.stdout


def test_a_glued_local_file_is_refused_with_the_repair(tmp_path):
    with pytest.raises(DfqsError, match="dfqs-nb repair") as caught:
        write_recipe("ollama", specimens.glue(tmp_path), tmp_path / "recipe")
    assert "llama.cpp refuses it" in str(caught.value) and not (tmp_path / "recipe").exists()


def test_merged_first_where_one_file_is_wanted(odd_folder, tmp_path):
    """The recipe's own merge command, run: the file that Ollama's Modelfile names is the right one."""
    recipe = write_recipe("ollama", odd_folder / SHARD.name, tmp_path / "recipe")
    words = shlex.split(recipe.commands[0])
    assert words[:2] == ["dfqs-nb", "merge"]
    subprocess.run(
        [sys.executable, "-m", "dfqs_nb", *words[1:]],
        check=True,
        cwd=REPOSITORY,
        capture_output=True,
    )
    named = modelfile(next(path for path in recipe.files if path.name == "Modelfile").read_text())
    assert deploy_peers.sha256(named["FROM"][0]) == MERGED


def modelfile(text: str) -> dict[str, list[str]]:
    """Ollama's grammar (parser/parser.go): comments, instructions, and values that end with their line."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, value = line.partition(" ")
        assert word.upper() in MODELFILE and value.strip(), line
        assert not value.startswith('"'), "quoted values may run over lines: not read here"
        found.setdefault(word.upper(), []).append(value.strip())
    assert len(found.get("FROM", [])) == 1
    return found


def test_modelfile_has_only_what_ollama_reads(tmp_path):
    recipe = write_recipe("ollama", SHARD, tmp_path)
    options = dict(one.split(" ") for one in modelfile(texts(recipe)["Modelfile"])["PARAMETER"])
    assert set(options) == OLLAMA_OPTIONS and options["num_ctx"] == str(recipe.settings["n_ctx"])


@pytest.mark.parametrize("has", [True, False])
def test_a_recipe_speaks_of_a_chat_template_only_where_there_is_one(has, tmp_path, monkeypatch):
    text = GGUFHeader.text
    if not has:
        monkeypatch.setattr(GGUFHeader, "text", lambda it, name: "chat" not in name and text(it, name) or "")
    recipe = write_recipe("ollama", SHARD, tmp_path)
    assert ("The chat template is the file's own." in texts(recipe)["Modelfile"]) == has
    assert any("The header has no chat template" in note for note in recipe.notes) != has
    assert any(re.search(r"tokens takes \d", note) for note in recipe.notes)  # its cache is exact


@pytest.mark.parametrize(("exactness", "words"), [("upper bound", "at most"), ("rough", "about")])
def test_a_cache_that_is_no_exact_number_is_called_so(exactness, words, tmp_path, monkeypatch):
    known = memory.kv_cache_bytes
    monkeypatch.setattr(
        memory, "kv_cache_bytes", lambda *a, **k: replace(known(*a, **k), exactness=exactness)
    )
    assert any(f"tokens takes {words}" in note for note in write_recipe("ollama", SHARD, tmp_path).notes)


def test_files_have_only_the_keys_their_programs_read(tmp_path):
    def loaded(target: str, name: str) -> dict:
        return yaml.safe_load(texts(write_recipe(target, SHARD, tmp_path / target))[name])

    compose, runner = (
        loaded("llama-cpp-docker", "compose.yaml"),
        loaded("docker-model-runner", "compose.yaml"),
    )
    assert set(compose) == {"services"} and set(runner) == {"services", "models"}
    for service in (*compose["services"].values(), *runner["services"].values()):
        assert set(service) <= COMPOSE_SERVICE
        assert all(isinstance(word, str) for word in service["command"]), "Compose wants strings"
    assert set(runner["models"]["llm"]) == {"model", "context_size", "runtime_flags"}
    assert compose["services"]["llama-server"]["ports"] == ["127.0.0.1:8080:8080"]
    assert set(loaded("jan", "model.yml")) <= JAN and set(loaded("lemonade", "config.json")) <= LEMONADE
    assert set(loaded("kaggle", "kernel-metadata.json")) == KAGGLE


def test_every_llama_server_option_is_one_of_its_parser(tmp_path):
    try:
        source = (llama_cpp_tools.source() / "common" / "arg.cpp").read_text(encoding="utf-8")
    except llama_cpp_tools.Unavailable as error:
        pytest.skip(str(error))
    known = set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source))
    used: set[str] = set()
    for target in ("llama-cpp-brew", "llama-cpp-prebuilt", "llama-cpp-source", "pi", "hermes-agent"):
        lines = [
            line
            for line in write_recipe(target, SHARD, tmp_path / target).commands
            if "llama-server --model" in line
        ]
        assert len(lines) == 1
        used |= {word for word in shlex.split(lines[0]) if word.startswith("--")}
    docker = yaml.safe_load(texts(write_recipe("llama-cpp-docker", SHARD, tmp_path / "d"))["compose.yaml"])
    used |= {word for word in docker["services"]["llama-server"]["command"] if word.startswith("--")}
    used |= set(
        re.findall(
            r" (--[a-z-]+)", texts(write_recipe("llama-cpp-winget", SHARD, tmp_path / "w"))["serve.ps1"]
        )
    )
    used |= {
        w
        for w in shlex.split(write_recipe("lemonade", SHARD, tmp_path / "l").commands[-1])[-1].split()
        if w[0] == "-"
    }
    assert len(used) >= 10 and used <= known, f"unknown to llama-server: {sorted(used - known)}"
    assert "LLAMA_API_KEY" in source, "the key's variable"


def test_release_archives_and_build_options_are_llama_cpps_own(tmp_path):
    try:
        source = llama_cpp_tools.source()
    except llama_cpp_tools.Unavailable as error:
        pytest.skip(str(error))
    release = (source / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    archive = write_recipe("llama-cpp-prebuilt", SHARD, tmp_path / "a").commands[0].rpartition("/")[2]
    kind = re.fullmatch(rf"llama-{deploy.BUILD}-bin-(ubuntu|macos)-(x64|arm64)\.tar\.gz", archive)
    assert kind and re.search(rf"llama-\S+ steps\.tag\.outputs\.name }}}}-bin-{kind[1]}-", release), archive
    cmake = "".join(
        (source / folder / "CMakeLists.txt").read_text(encoding="utf-8") for folder in ("", "ggml")
    )
    recipe = write_recipe("llama-cpp-source", SHARD, tmp_path / "b", n_gpu_layers=5)
    used = re.findall(r"-D(GGML_\w+|LLAMA_\w+)=", "".join(recipe.commands))
    assert used == ["LLAMA_BUILD_TESTS", "GGML_CUDA"] and all(f"option({name} " in cmake for name in used)


# ---- settings ----


@pytest.fixture(scope="module")
def real_size(tmp_path_factory) -> Path:
    """A file of the real artifact's shape and size; sparse, so it takes no disk."""
    path = tmp_path_factory.mktemp("real") / "DeepSeek-V4-Flash-shape.gguf"
    gguf_fixtures.real_size_header(path)
    return path


@pytest.fixture
def unstored(real_size, monkeypatch):
    """A recipe for a file whose bytes were never stored, which is not sound."""
    found = types.SimpleNamespace(sound=True, shards=lambda: open_shards(real_size))
    monkeypatch.setattr("dfqs_nb.merge.diagnose", lambda path: found)


def test_context_follows_the_machines_memory(real_size, unstored, tmp_path, monkeypatch):
    n_ctx = []
    for n_bytes in (128 << 30, 62 << 30, 1 << 27, 1 << 20):
        monkeypatch.setattr(deploy, "available_memory", lambda free=n_bytes: Memory(free, free, "test"))
        recipe = write_recipe("llama-cpp-brew", real_size, tmp_path / str(n_bytes))
        n_ctx.append(recipe.settings["n_ctx"])
    assert n_ctx[:2] == [deploy.MOST_N_CTX] * 2 and n_ctx[3] == 256
    assert n_ctx[2] < n_ctx[1], "a small machine gets a shorter context"


@pytest.fixture(scope="module")
def sizes(tmp_path_factory, real_size) -> dict[str, Path]:
    """Large models, sparse: a dense one of 70 billion weights, two mixtures, and the reference model."""
    folder = tmp_path_factory.mktemp("sizes")
    return {
        "dense": gguf_fixtures.llama_header(folder / "dense.gguf", 80, 8192, 28672, 64),
        "mixture": gguf_fixtures.llama_header(folder / "mixture.gguf", 32, 4096, 14336, 32, n_experts=8),
        "flash": real_size,
        "nano": SHARD,
    }


@pytest.fixture
def fitted(sizes, tmp_path, monkeypatch):
    """A recipe for a model on a machine with this memory and these cards in GiB."""

    def write(
        name: str, ram: int, cards: list[int], target: str = "llama-cpp-brew", **given
    ) -> deploy.Recipe:
        found = types.SimpleNamespace(sound=True, shards=lambda: open_shards(sizes[name]))
        monkeypatch.setattr("dfqs_nb.merge.diagnose", lambda path: found)
        monkeypatch.setattr(deploy, "available_memory", lambda: Memory(ram << 30, ram << 30, "test"))
        monkeypatch.setattr(deploy, "gpu_memories", lambda: [card << 30 for card in cards])
        return write_recipe(target, sizes[name], tmp_path / "recipe", overwrite=True, **given)

    return write


@pytest.mark.parametrize(
    "name, ram, cards",
    [
        ("nano", 8, []),
        ("nano", 8, [80]),
        ("flash", 64, [24]),
        ("flash", 24, [80]),
        ("dense", 64, [24, 12]),
        ("dense", 128, []),
        ("mixture", 8, [4]),
    ],
)
def test_a_recipe_and_a_plan_of_one_machine_agree(name, ram, cards, fitted, sizes, capsys):
    recipe = fitted(name, ram, cards)
    n_ctx, notes = recipe.settings["n_ctx"], " ".join(recipe.notes)
    asked = ["plan", str(sizes[name]), "--ram", f"{ram}GiB", "--context", str(n_ctx)]
    asked += ["--vram", ",".join(f"{card}GiB" for card in cards)] * bool(cards)
    assert cli.main([*asked, "--ram-gbs", "10", "--gpu-gbs", "100", "--disk-gbs", "1"]) == 0
    printed = capsys.readouterr().out
    words = shlex.split(next(line for line in printed.splitlines() if line.startswith("llama-server ")))
    assert words[words.index("-ngl") : words.index("-np")] == list(recipe.settings["flags"])
    assert ("-fa" in words) == bool(cards)
    largest = re.findall(r"^largest (context with .*: (?:[\d,]+ tokens|none))", printed, re.M)
    assert largest and all(f"Largest {line}." in notes for line in largest), (largest, notes)
    rows = [re.split(" {2,}", line) for line in printed.splitlines() if re.match(r"GPU|RAM", line)]
    compute = rows[-1][4]
    assert f"llama.cpp's compute buffer takes {compute} more in memory" in notes
    assert all(f" of weights and {row[3]} of cache" in notes for row in rows[:-1]), (rows, notes)


def test_layers_on_a_card_come_before_context_and_a_recipe_says_what_that_costs(fitted):
    """As with `--fit`: at least 4,096 tokens, and more while no weights leave the card."""
    recipe = fitted("dense", 64, [24])
    n_ctx, layers = (recipe.settings[name] for name in ("n_ctx", "n_gpu_layers"))
    assert 4096 <= n_ctx < deploy.MOST_N_CTX
    for other, same in ((4096, True), (n_ctx + 256, False), (deploy.MOST_N_CTX, False)):
        assert (fitted("dense", 64, [24], n_ctx=other).settings["n_gpu_layers"] == layers) == same
    [traded] = [note for note in recipe.notes if "--fit" in note]
    assert re.search(
        r"With 32,768 tokens, 2\.\d GB less of the weights lie on a card: `dfqs-nb deploy ", traded
    )
    assert traded.endswith(f"-o {recipe.files[0].parent} --overwrite --n-ctx 32768`.")
    asked = fitted("dense", 64, [24], n_ctx=32768)
    assert any(
        re.search(r"With 4,096 tokens, 2\.\d GB more .* --n-ctx 4096`\.$", note) for note in asked.notes
    )
    for roomy in (fitted("dense", 64, [80]), fitted("dense", 128, [])):
        assert roomy.settings["n_ctx"] == deploy.MOST_N_CTX and "--n-ctx" not in " ".join(roomy.notes)


@pytest.mark.parametrize("target", ["llama-cpp-python", "colab", "kaggle"])
def test_a_program_with_a_card_has_the_flash_attention_that_its_room_is_counted_for(target, fitted):
    """llama.cpp's own programs switch it on by themselves; `llama_cpp.Llama` does not."""
    for cards in ([], [80]):
        recipe = fitted("nano", 8, cards, target)
        check_files(recipe)
        programs = [text for name, text in texts(recipe).items() if name.endswith((".py", ".ipynb"))]
        assert programs and all(("flash_attn=True" in text) == bool(cards) for text in programs)


def test_layers_that_were_asked_for_are_counted_on_a_card(fitted):
    recipe = fitted("dense", 64, [], n_gpu_layers=20)
    assert recipe.settings["flags"][:2] == ("-ngl", "20") and recipe.settings["n_gpu_layers"] == 20
    assert any(re.match(r"On the graphics card: 1\d\.\d GB of weights", note) for note in recipe.notes)
    assert "graphics card" not in " ".join(fitted("dense", 64, [24], n_gpu_layers=0).notes)


def test_what_llama_cpp_does_not_plan_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "compute_buffers", lambda *_: ({}, "llama.cpp refuses it: for a test"))
    assert any(
        "The compute buffer is not counted: llama.cpp refuses it: for a test." in note
        for note in write_recipe("jan", SHARD, tmp_path).notes
    )
    far = write_recipe("jan", "hf://someone/models/m.gguf", tmp_path / "far")
    assert any("neither weights, cache nor compute buffer are counted" in note for note in far.notes)


def test_gpu_layers_follow_the_gpus_memory(real_size, unstored, tmp_path, monkeypatch):
    """A program in nvidia-smi's place that answers in its format: two GPUs with 24 GiB free each."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 24576\necho 24576\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    assert machines.gpu_memories() == [24 << 30, 24 << 30]
    recipe = write_recipe("llama-cpp-docker", real_size, tmp_path / "recipe")
    assert 20 < recipe.settings["n_gpu_layers"] < 44, "not all of 43 layers and the output"
    command = yaml.safe_load(texts(recipe)["compose.yaml"])["services"]["llama-server"]["command"]
    flags = list(
        memory.place(memory.Sizes(read_header(real_size)), recipe.settings["n_ctx"], 0, [24 << 30] * 2).flags
    )
    assert flags[:2] == ["-ngl", "99"] and flags[-2] == "--n-cpu-moe", (
        "all dense parts, and some layers' experts in memory"
    )
    at = command.index("-ngl")
    assert command[at : at + len(flags)] == flags
    service = yaml.safe_load(texts(recipe)["compose.yaml"])["services"]["llama-server"]
    assert (
        service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "all"
        and ":server-cuda-" in service["image"]
    )
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machines.gpu_memories() == []


@pytest.mark.parametrize(
    "machine, available, free", [("arm64", 60, 32), ("arm64", 20, 20), ("x86_64", 60, 0)]
)
def test_an_apple_chip_s_gpu_has_a_share_of_the_memory(machine, available, free, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(machines, "available_memory", lambda: Memory(48 << 30, available << 30, "test"))
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert sum(machines.gpu_memories()) == free << 30


@pytest.mark.parametrize("system, cuda", [("Linux", True), ("Darwin", False)])
def test_layers_on_a_mac_s_gpu_ask_for_no_cuda(system, cuda, tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    source = write_recipe("llama-cpp-source", SHARD, tmp_path / "source", n_gpu_layers=4)
    docker = texts(write_recipe("llama-cpp-docker", SHARD, tmp_path / "docker", n_gpu_layers=4))[
        "compose.yaml"
    ]
    assert (
        ("GGML_CUDA" in " ".join(source.commands))
        == (":server-cuda-" in docker)
        == ("nvidia" in docker)
        == cuda
    )


def test_contexts_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(DfqsError, match="between 1 and 65,536"):
        write_recipe("jan", SHARD, tmp_path, n_ctx=65_537)
    with pytest.raises(DfqsError, match="between 65,536 and"):
        write_recipe("hermes-agent", SHARD, tmp_path, n_ctx=8192)
    assert write_recipe("hermes-agent", SHARD, tmp_path).settings["n_ctx"] == 65_536


def test_gpu_layers_below_none_are_refused(tmp_path):
    with pytest.raises(DfqsError, match="-1 GPU layers"):
        write_recipe("jan", SHARD, tmp_path, n_gpu_layers=-1)


def test_the_chat_template_is_the_headers(tmp_path):
    recipe = write_recipe("vllm", SHARD, tmp_path)
    template = read_header(specimens.reference_shards().paths[0])["tokenizer.chat_template"]
    assert texts(recipe)["chat_template.jinja"] == template
    assert f"--chat-template {tmp_path}/chat_template.jinja" in recipe.commands[-1]
    hub = write_recipe("vllm", SINGLE, tmp_path / "hub")
    assert "chat_template.jinja" not in texts(hub) and "--chat-template" not in hub.commands[-1]


# ---- writing ----


def test_nothing_is_overwritten(tmp_path):
    write_recipe("pi", SHARD, tmp_path / "a")
    with pytest.raises(DfqsError, match="already there: agent/models.json, RECIPE.md"):
        write_recipe("pi", SHARD, tmp_path / "a")
    write_recipe("pi", SHARD, tmp_path / "a", overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "agent").write_text("a file where the recipe needs a folder")
    with pytest.raises(DfqsError, match="cannot write"):
        write_recipe("pi", SHARD, tmp_path / "b")


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(DfqsError, match="no target is called 'olama'.*ollama"):
        write_recipe("olama", SHARD, tmp_path)
    for name in ("sk-123", "A; id", "$(id)", "ключ"):
        with pytest.raises(DfqsError, match="give its name, not the key"):
            write_recipe("jan", SHARD, tmp_path, key_variable=name)
    assert not list(tmp_path.iterdir())


def test_the_command_line(tmp_path):
    def dfqs(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dfqs_nb", "deploy", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            check=False,
        )

    done = dfqs("jan", "dfqs-nano-iq1_s-xl", "-o", tmp_path, "--n-ctx", 2048, "--port", 9999)
    assert done.returncode == 0 and "model.yml" in done.stdout, done.stderr
    assert yaml.safe_load((tmp_path / "model.yml").read_text())["ctx_size"] == 2048
    assert ":9999/v1/models" in (tmp_path / "RECIPE.md").read_text()
    listed = dfqs()
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(TARGETS)
    for words in (["jan"], ["jan", "none.gguf"], ["nothing", SHARD]):
        failed = dfqs(*words)
        assert (
            failed.returncode == 1
            and failed.stderr.count("\n") == 1
            and failed.stderr.startswith("dfqs-nb: ")
        )


@pytest.fixture
def named(tmp_path):
    """The reference shards in a folder of this name, and a recipe for them."""

    def made(target: str, folder: str | bytes) -> deploy.Recipe:
        place = tmp_path / os.fsdecode(folder)
        place.mkdir()
        for path in specimens.reference_shards().paths:
            shutil.copy(path, place)
        return write_recipe(target, place / SHARD.name, tmp_path / "recipe")

    return made


def test_typographic_quotes_end_no_string_of_powershell(tmp_path):
    """PowerShell takes four of them for a plain quote: in a string, each is doubled."""
    name = "it's \u2018Ann\u2019s\u201a \u201bmodel; calc"
    shell = deploy._for_powershell(name)
    assert shell == "'" + re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", name) + "'"
    closing = re.sub("(?:''|\u2018\u2018|\u2019\u2019|\u201a\u201a|\u201b\u201b)", "", shell[1:-1])
    assert not re.search("['\u2018\u2019\u201a\u201b]", closing)


@pytest.mark.parametrize("folder", ["a\nPARAMETER stop x", "a\rb", "a\u2028b", "a\x1bb"])
def test_a_line_break_cannot_get_into_a_modelfile(named, folder, tmp_path):
    """The folder that receives the recipe, into which the shards are merged, is the one that it names."""
    with pytest.raises(DfqsError, match="a Modelfile cannot name"):
        write_recipe("ollama", SHARD, tmp_path / folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["a```b", "```", "x ~~~ ````"])
def test_fences_in_a_path_end_no_block_of_the_recipe(named, folder):
    text = texts(named("llama-cpp-brew", folder))["RECIPE.md"]
    fences = re.findall("^(`{3,})", text, re.MULTILINE)
    assert len(set(fences)) == 1 and len(fences) == 4 and fences[0] not in folder


@pytest.mark.parametrize("target", ["llama-cpp-docker", "jan", "pi", "lemonade", "llama-cpp-python"])
@pytest.mark.parametrize("folder", ["a\u2028b", "a\x85b", "a\ufeffb", "a\nb", 'a"b', "a: b #c"])
def test_every_character_of_a_path_survives(named, target, folder):
    recipe = named(target, folder)
    found = {word for words in commands_of(recipe) for word in words}
    for name, text in texts(recipe).items():
        if name.endswith((".json", ".yaml", ".yml")):
            found |= set(map(str, values_of(yaml.safe_load(text))))
        elif name.endswith(".py"):
            found |= {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert any(folder in str(word) for word in found)


def test_a_path_that_is_not_utf_8_is_refused(named):
    with pytest.raises(DfqsError, match="not UTF-8"):
        named("jan", b"a\xffb")


def test_a_processor_with_amx_is_thought_of(tmp_path):
    """A default build dies there: each recipe for llama.cpp passes what avoids it, or says what to know."""
    for target in TARGETS:
        recipe = write_recipe(target, SHARD, tmp_path / target)
        whole = "\n".join([*texts(recipe).values(), *recipe.commands])
        avoids = "--no-repack" in whole or "use_extra_bufts" in whole
        assert avoids or any("AMX" in note for note in recipe.notes) or target == "vllm", target


# ---- what is known of the targets ----


def test_the_tables_page_is_in_step():
    page = data_dir() / "deploy" / "README.md"
    assert page.read_text(encoding="utf-8") == deploy.table_text(), (
        "run: python -m dfqs_nb.serve.recipes > data/deploy/README.md"
    )


def test_the_table_says_something_of_every_target():
    table = deploy.targets_table()
    assert list(table["target"]) == list(TARGETS) and len(table) == 17
    assert (table.map(len) > 0).all().all(), "a cell is empty"
    assert table["source"].str.fullmatch(r"(https://\S+ ?)+").all()
    assert not table["source"].str.contains("pypi|npmjs|/work/").any()


def test_what_ran_is_what_the_tests_run():
    """The versions in the table are those of the tests and of the lock file."""
    ran = {name: one.run_here for name, one in deploy.targets().items() if one.run_here}
    assert "llama-server" in ran["llama-cpp-source"] and len(ran) == 5
    assert f"{deploy_peers.PI} {deploy_peers.VERSIONS[deploy_peers.PI]}" in ran["pi"]
    assert f"hermes-agent {deploy_peers.VERSIONS['hermes-agent']}" in ran["hermes-agent"]
    assert f"node-llama-cpp {deploy_peers.VERSIONS['node-llama-cpp']}" in ran["llama-cpp-prebuilt"]
    assert llama_cpp_tools.locked()[0] in ran["llama-cpp-python"]


def test_the_workbook_is_fetched_from_the_projects_own_address(tmp_path):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    recipe = write_recipe("colab", "deepseek-v4-flash-iq1_s-xl", tmp_path)
    written = "".join(path.read_text() for path in recipe.files)
    assert f"git+{project['urls']['Repository']}" in written


# ---- the recipe that runs without installing anything ----


def test_llama_cpp_python_answers(odd_folder, tmp_path):
    recipe = write_recipe("llama-cpp-python", odd_folder / SHARD.name, tmp_path)
    done = subprocess.run(
        [sys.executable, "chat.py", deploy.PROMPT], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris."
    assert recipe.settings["n_ctx"] == 32_768


def test_the_cells_of_the_kaggle_notebook_answer(odd_folder, tmp_path):
    """All of them but the installation, with the path of a file that is here."""
    recipe = write_recipe("kaggle", odd_folder / SHARD.name, tmp_path / "kaggle")
    colab = write_recipe("colab", odd_folder / SHARD.name, tmp_path / "colab")
    cells, others = (code_cells(texts(one)) for one in (recipe, colab))
    assert (
        recipe.model
        == f"/kaggle/input/dfqs-nano-iq1-s-xl/{odd_folder.joinpath(SHARD.name).name.replace('2-of', '1-of')}"
    )
    assert cells[-2:] == others[-2:] and cells[0] == others[0] == "%pip install -q llama-cpp-python==0.3.36"
    here = json.dumps(str(odd_folder / SHARD.name.replace("2-of", "1-of")))
    program = "\n".join(cells[1:]).replace(json.dumps(recipe.model), here)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris."


def code_cells(files: dict[str, str]) -> list[str]:
    text = next(text for name, text in files.items() if name.endswith(".ipynb"))
    return [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == "code"]


def test_llama_cpp_pythons_server_answers_its_checks(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("DFQS_TEST_KEY", SECRET)
    recipe = write_recipe("llama-cpp-python", SHARD, tmp_path, port=port, key_variable="DFQS_TEST_KEY")
    server = subprocess.Popen(
        [sys.executable, "serve.py"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        models, answer = deploy_peers.run_checks(recipe, server)
        assert json.loads(models)["data"][0]["id"] == "dfqs-nano-iq1-s-xl"
        assert "Paris" in json.loads(answer)["choices"][0]["message"]["content"]
        keyless = subprocess.run(
            ["bash", "-c", recipe.checks[1].replace("$DFQS_TEST_KEY", "wrong")], check=False
        )
        assert keyless.returncode != 0, "the key is asked for"
    finally:
        server.terminate()
        server.wait(60)
