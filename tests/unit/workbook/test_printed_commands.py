"""Every command that a person reads somewhere is complete: it is collected here, parsed, and executed.

Collected: README and other pages, notebooks with their stored outputs, `make help`, the help of every command, and
the texts of the package and of the install. Fast: the program's own parser takes it. Slow: it runs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from sealed_run import with_answers

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import broken
from dfqs_nb.merge import diagnose
from dfqs_nb.report import build_report, write_report
from dfqs_nb.workbook import cli
from dfqs_nb.workbook.run import find_notebooks, parameter_types, parse_parameters

PAGES = ("README.md", "docs/**/*.md", "data/*/README.md", "tests/benchmarks/*.md")
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:dfqs-nb|make)( .*)?")
PROSE = re.compile(r"dfqs-nb \{\}$|make (a|an|any|it|of|one|the|sure)\b|\S*dfqs-nb$|make$")
# What stands for something of the reader's, and what this test puts there.
READERS = {
    "SHARD": "model-00001-of-00002.gguf",
    "OUT": "out.gguf",
    "RECIPE": "q8_0",
    "TARGET": "ollama",
    "RUN": "nano",
    "TABLE.csv": "table.csv",
    "path/to/any-shard.gguf": "model-00001-of-00002.gguf",
    "OTHER": "nano2",
    "DFQS-Nano-IQ1_S-XL-glued.gguf": "glued.gguf",
    "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf": "model-00001-of-00002.gguf",
    "DeepSeek-V4-Flash-IQ1_S-XL.gguf": "glued.gguf",
}
OF_THE_MACHINE = {"PIP_NO_INDEX", "PIP_FIND_LINKS", "TMPDIR", "UV_CACHE_DIR", "CC", "CXX"}
# Commands that only a network, a server, a large model or a maintainer's machine can run.
NOT_HERE = re.compile(
    r"hf://|https?://|URL|ADDRESS|deepseek-v4|PIP_|/path/to|/disk/|VENV=|make (?!run|help)|--full-size"
)
COMMANDS = cli.program().commands
SHORTER = {
    "score": ["--limit", "1"],
    "routing": ["--tokens", "64"],
    "record": ["--tokens", "4", "--n-ctx", "1024"],
    "fidelity": ["--n-ctx", "1024"],
}
CHOICES = """{"set": "mine", "kind": "choice"}
{"id": "1", "prompt": "Tom is tall. Ann is small. Who is tall?", "choices": ["Tom", "Ann"], "gold": 0}
{"id": "2", "prompt": "The key is red. Which colour has the key?", "choices": ["blue", "red"], "gold": 1}
"""


class Printed(NamedTuple):
    """A command as it is printed, and where."""

    where: str
    text: str

    def words(self) -> list[str]:
        """Its words; what stands for something of the reader's is replaced by what this test puts there."""
        text = self.text.replace("SHARD...", "SHARD model-00002-of-00002.gguf")
        text = re.sub(r"(?<=budget_minutes=)\{+[^{}]*\}+", "1", text)
        words = shlex.split(re.sub(r"\{+[^{}]*\}+", "MODEL", text).partition(" > ")[0])
        instead = {"repair": "glued.gguf", "quantize": "dfqs-nano-f16"}
        own = next((instead[word] for word in words if word in instead), "model.gguf")
        of = {**READERS, "FILE": own, "MODEL": own}
        parts = [word.partition("=") for word in words]
        return [
            f"{name}={of.get(value, value)}" if equals else of.get(name, name)
            for name, equals, value in parts
        ]


def commands_in(text: str) -> Iterator[str]:
    """Commands of a text: lines of a block of shell, words in backticks, and what follows an arrow."""
    fence = re.compile(r"^```(?:sh|bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
    found = [line for block in fence.findall(text) for line in block.splitlines()]
    found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fence.sub("", text))]
    found += re.findall(r"(?:^|-> |: +)((?:dfqs-nb|make) [^`\n]+)$", text, re.MULTILINE)
    for one in found:
        if COMMAND.fullmatch(one) and not PROSE.match(one):
            yield one


def texts_of(notebook: Path) -> Iterator[str]:
    """What a notebook says, and what it said when it was stored."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            yield "".join(cell["source"])
        for output in cell.get("outputs", []):
            yield "".join(output.get("text", output.get("data", {}).get("text/plain", "")))


def constants_of(module: Path) -> Iterator[str]:
    """The texts of a module, docstrings apart; an f-string with its fields in braces."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            yield node.value


def collected() -> list[Printed]:
    """Every command that is printed anywhere, once for each place."""
    texts = [(page, page.read_text(encoding="utf-8")) for name in PAGES for page in REPOSITORY.glob(name)]
    texts += [(path, text) for path in find_notebooks() for text in texts_of(path)]
    modules = [*(REPOSITORY / "dfqs_nb").rglob("*.py"), *(REPOSITORY / "tools").glob("*.py")]
    texts += [(path, text) for path in modules for text in constants_of(path)]
    templates = (REPOSITORY / "dfqs_nb").rglob("templates/*")
    texts += [(path, re.sub(r"</?code>", "`", path.read_text())) for path in templates]
    found = [
        Printed(str(where.relative_to(REPOSITORY)), one) for where, text in texts for one in commands_in(text)
    ]
    for name, command in COMMANDS.items():
        found += [Printed(f"dfqs-nb {name} --help", one) for one in commands_in(command.help or "")]
    examples = re.search(
        r"^define EXAMPLES\n(.*?)^endef", (REPOSITORY / "Makefile").read_text(), re.M | re.S
    )[1]
    return found + [Printed("make help", one) for one in commands_in(examples)]


def refused(words: list[str]) -> str:
    """Why the program's own parser does not take the words of a command; empty if it does."""
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    try:
        if program == "make":
            return _refused_by_make(rest, settings)
        command = COMMANDS.get((rest or [""])[0])
        if command is None:
            return "no such command"
        own = command.make_context(rest[0], rest[1:]).params
        if own.get("parameter"):
            _parse(own["parameter"])
        find_notebooks(own.get("notebooks") or [])
    except typer.Exit:
        return ""
    except cli.USAGE as error:
        return error.format_message()
    except DfqsError as error:
        return str(error)
    return ""


def _parse(assignments: list[str]) -> None:
    texts = dict(assignment.split("=", 1) for assignment in assignments)
    parse_parameters(texts, parameter_types(find_notebooks()))


def _refused_by_make(targets: list[str], settings: dict[str, str]) -> str:
    makefile = (REPOSITORY / "Makefile").read_text()
    known = set(re.findall(r"^([A-Z]+) +\?=", makefile, re.MULTILINE)) | OF_THE_MACHINE
    _parse(shlex.split(settings.get("PARAMS", "")))
    wrong = set(targets) - set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE)) | set(settings) - known
    return f"make does not know {', '.join(sorted(wrong))}" if wrong else ""


def test_every_printed_command_is_complete():
    found = collected()
    assert len(found) > 100 and {"README.md", "make help"} <= {one.where for one in found}
    wrong = [f"{one.where}: {one.text}: {why}" for one in found if (why := refused(one.words()))]
    assert not wrong, "\n".join(wrong)


# ---- they run ----


def copy_of_the_checkout(place: Path) -> Path:
    """A checkout with this environment, whose notebooks keep their parameters only; 01 stays whole."""
    for name in ("dfqs_nb", "data", "tools", "notebooks", "Makefile", "pyproject.toml", "requirements.lock"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, place / name)
    (place / ".venv").symlink_to(sys.prefix)
    for path in find_notebooks(folder=place / "notebooks"):
        notebook = json.loads(path.read_text())
        if not path.name.startswith("01"):
            notebook["cells"] = [
                c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", [])
            ]
        path.write_text(json.dumps(notebook))
    return place


def files_of_the_reader(place: Path, model: Path) -> None:
    """What stands for the reader's files: a model, its shards, the shards glued together, a table, two runs."""
    shutil.copy(model, place / "model.gguf")
    for number, shard in enumerate(broken.reference_shards().paths, 1):
        shutil.copy(shard, place / f"model-0000{number}-of-00002.gguf")
    shutil.move(broken.glue(place), place / "glued.gguf")
    shutil.copy(data_dir() / "sweep_example.csv", place / "table.csv")
    for run in ("nano", "nano2"):
        shutil.rmtree(place / "outputs" / run, ignore_errors=True)
        folder = with_answers(place / "outputs" / run, place / "model.gguf")
        write_report(folder, build_report(folder, ask_llama_cpp=False))
    shutil.copy(data_dir() / "reference" / "DFQS-Nano-F16.gguf", place)
    shutil.rmtree(place / "outputs" / "deploy-ollama", ignore_errors=True)


def files_of_a_command(words: list[str], place: Path, run: Callable[[list[str]], object]) -> None:
    """The reader's questions, and what other commands leave: a record, a quantization, a routing profile."""
    if words[-1] == "choices.jsonl":
        (place / words[-1]).write_text(CHOICES)
    elif "--set" in words:
        shutil.copy(data_dir() / "prompts" / "nano_reasoning.jsonl", place / words[-1])
    elif "fidelity" in words:
        run(["dfqs-nb", "record", "model.gguf", "-o", words[-1], *SHORTER["record"]])
    if words[1] in ("fidelity", "record") and words[2] != "model.gguf":
        shutil.copy(place / "model.gguf", place / words[2])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_of_the_checkout(tmp_path_factory.mktemp("dfqs-test-"))


def runnable() -> list[str]:
    """The printed commands that run on any machine, each once, with words in place of the reader's."""
    whole = [one for one in collected() if "{" not in one.text and not NOT_HERE.search(one.text)]
    return sorted({shlex.join(one.words()) for one in whole})


@pytest.mark.slow
@pytest.mark.parametrize("command", runnable())
def test_a_printed_command_runs_as_pasted(command, checkout, merged_reference):
    files_of_the_reader(checkout, merged_reference)
    words = shlex.split(command)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(checkout), "TQDM_DISABLE": "1"}
    environment.pop("DFQS_OUTPUTS", None)

    def run(words: list[str]) -> subprocess.CompletedProcess:
        options = {"cwd": checkout, "env": environment, "timeout": 1200}
        return subprocess.run(["env", *words], capture_output=True, text=True, check=False, **options)

    files_of_a_command(words, checkout, run)
    if "-o" in words:
        (checkout / words[words.index("-o") + 1]).unlink(missing_ok=True)
    words += SHORTER.get(words[1] if len(words) > 1 else "", [])
    if "make" in words:
        words[words.index("make") + 1 : 1] = ["-o", ".venv/.installed"]
    done = run(words)
    assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-1000:]}"


@pytest.mark.slow
def test_what_a_diagnosis_advises_runs_as_pasted(checkout, merged_reference):
    files_of_the_reader(checkout, merged_reference)
    whole = (checkout / "model.gguf").read_bytes()
    (checkout / "my model.gguf").write_bytes(whole + b"more")
    for number, part in enumerate((whole[:3_000_000], whole[3_000_000:]), 1):
        (checkout / f"cut.gguf.part{number}of2").write_bytes(part)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    (checkout / "model.gguf").unlink()
    for name in ("my model.gguf", "cut.gguf.part1of2", "model-00001-of-00002.gguf", "glued.gguf"):
        step = diagnose(checkout / name).next_step
        command = re.search(r"(dfqs-nb|truncate|\(set) [^`]+", step)
        assert command, step
        done = subprocess.run(
            command[0], shell=True, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command[0]}: {done.stderr}"
    for name in ("my model.gguf", "cut.gguf", "model.gguf", "glued.gguf"):
        assert (checkout / name).read_bytes() == whole, name
