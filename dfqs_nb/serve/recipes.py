"""Recipes to run a model elsewhere: files and commands for each way of running that the documents list.

What is known of each target is data (``data/deploy/targets.toml``), and so are the texts of its files
(``data/deploy/templates/``). This module finds the settings (context, threads, GPU layers, chat template)
from the model's header and this machine, fills them in, and writes the recipe whole or not at all.

A key is never written: files and commands name the environment variable that holds it.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.errors import DfqsError, SpaceError
from dfqs_nb.core.files import whole_file
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.core.paths import data_dir, public_address, tilde
from dfqs_nb.gguf.facts import chat_template
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import binary_size, check_fits, estimate
from dfqs_nb.gguf.shards import ShardSet, open_shards

if TYPE_CHECKING:
    import pandas as pd

HOST = "127.0.0.1"  # nothing listens beyond this machine
PROMPT = "What is the capital of France?"
DEFAULT_KEY_VARIABLE = "DFQS_API_KEY"
MOST_N_CTX, LEAST_N_CTX = 32_768, 4_096  # tokens, unless told otherwise
UNKNOWN_N_CTX = 8_192  # tokens, for a model whose header is not here
NO_REPACK = (
    "--no-repack is for CPUs with AMX, where repacked weights crash at the first decode "
    "(ggml-org/llama.cpp#20824); it saves a second copy in memory. Elsewhere it may cost speed."
)
BUILD = "b11063"  # the newest llama.cpp build seen to load `deepseek4` from a prebuilt library
SPARE_GPU_BYTES = 1 << 30  # for compute buffers and what else uses the GPU
FACTS = ("recipe", "checked_how", "run_here", "loads_deepseek4", "split_files", "since", "limits", "source")
PLACEHOLDER = re.compile(r"@\{(\w+)\}")
MACRO = re.compile(r"@\{(llama_server|key_for_llama_server|wait)\}")  # commands that several targets share
OPTIONAL = re.compile(r"\{\?(.*?)\?\}", re.DOTALL)
WEIGHTS_FROM = "deepseek-ai/DeepSeek-V4-Flash"
NOT_GIVEN = "OWNER/ORIGINAL-MODEL"


class DeployError(DfqsError):
    """A recipe cannot be written."""


@dataclass(frozen=True)
class Target:
    """One way of running, as ``targets.toml`` has it; the comments there say what each field means."""

    name: str
    title: str
    recipe: str
    checked_how: str
    run_here: str
    loads_deepseek4: str
    split_files: str
    since: str
    limits: str
    source: list[str]
    date: str
    files: dict[str, str]
    install: list[str]
    run: list[str]
    manual: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    server: int = 0
    prefix: str = ""
    served_name: str = "@{name}"
    single_file: bool = False
    needs_key: bool = False
    least_n_ctx: int = 0
    place: str = ""
    fetch_to: str = ""
    mount: str = ""


@dataclass(frozen=True)
class Settings:
    """How the model is opened: tokens of context, threads of decode, layers on the GPU."""

    n_ctx: int
    n_threads: int
    n_gpu_layers: int


@dataclass(frozen=True)
class Recipe:
    """What was written for one target.

    Attributes:
        files: what was written, ``RECIPE.md`` last.
        commands: in order: fetch and prepare the model, install, run; for a shell in the recipe's folder.
        checks: commands that ask the running server; empty for a target without one.
        notes: what to know before.
        model: the path that the recipe gives the model, here or on the machine that runs it.
    """

    target: str
    model: str
    settings: Settings
    files: tuple[Path, ...]
    commands: tuple[str, ...]
    checks: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """A model, here or on the hub: where it lies (``folder``), and what a header would say of it."""

    name: str
    files: tuple[str, ...]
    folder: str
    nbytes: int
    header: GGUFHeader | None = None
    shards: ShardSet | None = None
    fetch: Callable[[str], list[str]] | None = None
    original: str = NOT_GIVEN
    notes: tuple[str, ...] = ()


def _table() -> dict[str, Any]:
    path = data_dir() / "deploy" / "targets.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeployError(
            f"cannot read the table of targets ({error})",
            where=tilde(path),
            hint="restore it with git, or set DFQS_DATA to a folder that has it",
        ) from error


@cache
def targets() -> dict[str, Target]:
    """The targets by name, in the order of ``data/deploy/targets.toml``.

    >>> len(targets()), targets()["ollama"].server
    (17, 11434)
    """
    return {name: Target(name, **entry) for name, entry in _table().items() if name != "common"}


def __getattr__(name: str) -> Any:
    """``TARGETS``: the names of the targets; read when it is asked for."""
    if name == "TARGETS":
        return tuple(targets())
    raise AttributeError(name)


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        DeployError: there is none; names the ones there are.
    """
    if name not in targets():
        raise DeployError(f"no target is called {name!r}", hint=f"there are {', '.join(targets())}")
    return targets()[name]


def targets_table() -> pd.DataFrame:
    """One row a target: ``target``, ``title``, then what is known of it, each a text.

    ``run_here`` is what ran, with its version, or "generated, not run".
    """
    import pandas as pd

    rows = [
        {"target": one.name, "title": one.title, **{name: getattr(one, name) for name in FACTS}}
        for one in targets().values()
    ]
    table = pd.DataFrame(rows)
    table["source"] = table["source"].map(" ".join)
    table["run_here"] = table["run_here"].replace("", "generated, not run")
    return table


def write_recipe(
    target: str,
    model: str | Path,
    folder: str | Path,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    hub: str | None = None,
    port: int | None = None,
    key_variable: str = "",
    prompt: str = PROMPT,
    overwrite: bool = False,
) -> Recipe:
    """Write the files and commands that run this model with this target.

    Args:
        target: one of ``TARGETS``.
        model: a local GGUF file (any of its shards), a name of the registry, or ``hf://owner/repo/file``.
            Nothing is downloaded.
        folder: receives the recipe; made if missing.
        n_ctx: tokens of context; by default what this machine's memory holds, up to 32,768 and to what the
            model was trained on.
        n_threads: by default the usable cores, and one for a very small model.
        n_gpu_layers: by default as many as the free memory of this machine's GPU holds; 0 without one.
        hub: ``hf://`` address (or registered name) that the recipe fetches, while its settings come from the
            local ``model``.
        port: of the server on 127.0.0.1; by default the target's own.
        key_variable: the environment variable that holds the server's key; empty: no key, unless
            the target's server always asks for one (then ``DFQS_API_KEY``).
        overwrite: replace the files of an earlier recipe.

    Raises:
        DeployError: no such target; a file that no runtime loads; a context the model was not made for; or
            files that are there already.
        HeaderError, ShardError, RegistryError: the model is not a complete GGUF, or nothing has that name.
    """
    chosen, source = target_of(target), _source(model)
    chosen = replace(chosen, server=port or chosen.server)
    key_variable = key_variable or (DEFAULT_KEY_VARIABLE if chosen.needs_key else "")
    if hub is not None:
        there = _source(hub)
        source = replace(there, header=source.header, shards=source.shards, nbytes=source.nbytes)
    folder = Path(os.path.abspath(folder))
    settings = _settings(chosen, source, n_ctx, n_threads, n_gpu_layers)
    values, get = _values(chosen, source, settings, folder, key_variable, prompt)
    texts = {
        name: _file(chosen.files[name], name, values)
        for name in chosen.files
        if name != "chat_template.jinja" or values["template_text"]
    }
    recipe = Recipe(
        target,
        values["model"],
        settings,
        tuple(folder / name for name in (*texts, "RECIPE.md")),
        (*get, *_commands(chosen.install, values), *_commands(chosen.run, values)),
        tuple(_commands(_table()["common"]["check"], values)) if chosen.server else (),
        (*source.notes, *_notes(chosen, source, settings, values)),
    )
    texts["RECIPE.md"] = recipe_text(recipe, _commands(chosen.also, values), _commands(chosen.stop, values))
    _write(folder, texts, overwrite)
    return recipe


# ---- the model ----


def _source(model: str | Path) -> _Source:
    from dfqs_nb.gguf import models as registry

    known = registry.registered()
    if isinstance(model, str) and (name := _registered_as(model, known)):
        if known[name].source.startswith("hf://"):
            return _registered(known[name], known)
    elif isinstance(model, str) and model.startswith("hf://"):
        return _on_hub(model)
    return _local(registry.resolve(model)[0])


def _registered_as(model: str, known: dict[str, Any]) -> str:
    """The registered name of this name or address; empty when there is none."""
    if model in known:
        return model
    bare = model.rpartition("@")[0] or model
    return next(
        (
            name
            for name, one in known.items()
            if any(bare == f"{one.source}/{file.name}" for file in one.files)
        ),
        "",
    )


def _local(path: Path) -> _Source:
    from dfqs_nb.merge.kind import diagnose

    found = diagnose(path)
    if not found.sound:
        raise DeployError(f"no runtime loads it: {found.finding}", where=tilde(path), hint=found.next_step)
    shards = open_shards(path)
    header = shards.as_one
    url = str(header.get("general.base_model.0.repo_url", ""))
    original = url.removeprefix("https://huggingface.co/") if "huggingface.co/" in url else NOT_GIVEN
    return _Source(
        shards.name,
        tuple(one.name for one in shards.paths),
        os.path.dirname(os.path.abspath(shards.paths[0])),
        shards.nbytes,
        header,
        shards,
        original=original,
    )


def _on_hub(address: str) -> _Source:
    from dfqs_nb.gguf.models import parse_address, siblings

    file = parse_address(address)
    names = siblings(file.file)
    revision = ["--revision", file.revision] if file.revision else []

    def fetch(folder: str) -> list[str]:
        return [shlex.join(["hf", "download", file.repo, *names, *revision, "--local-dir", folder])]

    name = re.sub(r"-\d{5}-of-\d{5}$", "", PurePosixPath(file.file).stem)
    return _Source(name, tuple(names), "", 0, fetch=fetch)


def _registered(model: Any, known: dict[str, Any]) -> _Source:
    """A registered model of the hub; the workbook fetches its shards, whose folder there is not recorded."""
    name = re.sub(r"-\d{5}-of-\d{5}$", "", model.files[0].name.removesuffix(".gguf"))
    one_file = f"{name}.gguf"
    glued = _glued_from(model, known)
    repo = model.source.removeprefix("hf://")

    def fetch(folder: str) -> list[str]:
        path = _join(folder, one_file)
        if len(model.files) > 1:
            return [shlex.join(["dfqs-nb", "merge", model.name, "-o", path])]
        get = [shlex.join(["hf", "download", repo, one_file, "--local-dir", folder])]
        return [*get, *([shlex.join(["dfqs-nb", "repair", path, "--in-place"])] if glued else [])]

    original = WEIGHTS_FROM if name.lower().startswith("deepseek-v4-flash") else NOT_GIVEN
    return _Source(
        name,
        (one_file,),
        "",
        model.size_bytes,
        fetch=fetch,
        original=original,
        notes=((_glued_note(model, glued),) if glued else ()) + (model.note,),
    )


def _glued_from(model: Any, known: dict[str, Any]) -> str:
    """The model whose shards, put end to end, have exactly this single file's size: a merge is smaller."""
    return next(
        (
            name
            for name, other in known.items()
            if len(model.files) == 1 and len(other.files) > 1 and other.size_bytes == model.size_bytes
        ),
        "",
    )


def _glued_note(model: Any, shards: str) -> str:
    return (
        f"The published file is {model.size_bytes:,} bytes, exactly the sum of the shards of {shards}: "
        "they were put end to end, which is no merge, and no runtime loads it (llama.cpp: invalid split "
        f"file name). The recipe repairs it in place. Or give the name {shards} instead."
    )


# ---- its settings ----


def _settings(
    target: Target, source: _Source, n_ctx: int | None, n_threads: int | None, n_gpu_layers: int | None
) -> Settings:
    n_ctx = _n_ctx(target, source, n_ctx)
    if n_threads is None:
        n_threads = _threads(source)
    if n_gpu_layers is None:
        n_gpu_layers = _gpu_layers_here(source, n_ctx)
    if n_threads < 1 or n_gpu_layers < 0:
        raise DeployError("threads must be at least 1, and GPU layers at least 0", hint="leave them out")
    return Settings(n_ctx, n_threads, n_gpu_layers)


def _n_ctx(target: Target, source: _Source, wanted: int | None) -> int:
    """The context in tokens: what was asked for, if it can be, or what fits."""
    trained = int(source.header.arch("context_length", 0)) if source.header else 0
    least, limit = max(target.least_n_ctx, 1), trained or 2**31 - 256
    if target.least_n_ctx > limit:
        raise DeployError(
            f"{target.title} wants a context of {least:,} tokens, and the model was trained on {trained:,}",
            hint="take another target",
        )
    if wanted is None:
        return max(least if target.least_n_ctx else 1, _fitting(source, limit))
    if not least <= wanted <= limit:
        raise DeployError(
            f"a context of {wanted:,} tokens is not between {least:,} and {limit:,}",
            hint="leave it out, and it is chosen",
        )
    return wanted


def _fitting(source: _Source, limit: int) -> int:
    """The largest power of two up to the limits whose cache fits in what the weights leave of the memory."""
    if source.shards is None:
        return min(UNKNOWN_N_CTX, limit)
    free = available_memory().available_bytes
    room = free - source.nbytes if source.nbytes < free else free // 4
    n_ctx = min(MOST_N_CTX, limit)
    while n_ctx > LEAST_N_CTX and estimate(source.shards.headers, n_ctx).kv.total > room // 2:
        n_ctx //= 2
    return n_ctx


def _threads(source: _Source) -> int:
    from dfqs_nb.llama.model import threads_for

    return threads_for(source.shards.paths[0]) if source.shards else usable_cores()


def _gpu_layers_here(source: _Source, n_ctx: int) -> int:
    if source.shards is None or source.header is None:
        return 0
    cache_bytes = estimate(source.shards.headers, n_ctx).kv.total
    return gpu_layers(gpu_free_bytes(), source.nbytes, cache_bytes, int(source.header.arch("block_count", 0)))


def gpu_layers(free_bytes: int, weights_bytes: int, cache_bytes: int, n_layers: int) -> int:
    """Layers (the output counts as one more) that fit beside the cache, if all layers are of one size.

    >>> gpu_layers(24 << 30, 57 << 30, 1 << 30, 43), gpu_layers(80 << 30, 57 << 30, 1 << 30, 43)
    (16, 44)
    >>> gpu_layers(0, 57 << 30, 1 << 30, 43)
    0
    """
    room = free_bytes - cache_bytes - SPARE_GPU_BYTES
    per_layer = max(1, weights_bytes // (n_layers + 1))
    return max(0, min(n_layers + 1, room // per_layer))


def gpu_free_bytes() -> int:
    """Free memory of this machine's NVIDIA GPUs together, in bytes, or of an Apple chip's; 0 without one.

    An Apple GPU shares the machine's memory: macOS lets it hold about two thirds of a small one, and three
    quarters of a large one (Metal's ``recommendedMaxWorkingSetSize``). Two thirds are counted.
    """
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        memory = available_memory()
        return min(memory.available_bytes, memory.total_bytes * 2 // 3)
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(int(line) << 20 for line in done.stdout.split() if line.isdigit())


# ---- the values of templates ----


def _join(folder: str, name: str) -> str:
    return f"{folder}\\{name}" if "\\" in folder else f"{folder}/{name}"


def slug_of(name: str) -> str:
    """A name that every target takes.

    >>> slug_of("DFQS-Nano-IQ1_S-XL (test)")
    'dfqs-nano-iq1-s-xl-test'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def _lies(target: Target, source: _Source, folder: Path) -> tuple[str, list[str]]:
    """The folder in which the target finds the model's files, and the commands that bring them there."""
    if source.fetch is None:
        place = target.place and _fill(target.place, {"file": "", "slug": slug_of(source.name)}, str)
        return (place.rstrip("/\\") or source.folder), []
    there = target.fetch_to or str(folder / "models")
    get = source.fetch(there)
    if target.fetch_to and any(one.startswith("dfqs-nb ") for one in get):
        get = [shlex.join(["python", "-m", "pip", "install", "-q", f"git+{public_address()}"]), *get]
    return there, get


def _values(
    target: Target, source: _Source, settings: Settings, folder: Path, key_variable: str, prompt: str
) -> tuple[dict[str, Any], list[str]]:
    """What templates and commands may name, and the commands that bring the model."""
    if key_variable and not key_variable.isidentifier():
        raise DeployError("that is no name of an environment variable", hint="give its name, not the key")
    lies, get = _lies(target, source, folder)
    files = source.files
    if target.single_file and len(files) > 1:
        joined = str(folder / f"{source.name}.gguf")
        get = [*get, shlex.join(["dfqs-nb", "merge", _join(lies, files[0]), "-o", joined])]
        lies, files = str(folder), (f"{source.name}.gguf",)
    inner = target.mount or lies
    values = _names(target, source, settings) | {
        "model": _join(inner, files[0]),
        "models": [_join(inner, one) for one in files],
        "file": files[0],
        "model_folder": lies,
        "mount": target.mount,
        "folder": str(folder),
        "get": get,
        "prompt": prompt,
        "models_folder": str(folder / "models"),
        "key": key_variable,
        "key_name": key_variable,
        "key_or_default": key_variable or DEFAULT_KEY_VARIABLE,
        "kaggle_id": f"INSERT_KAGGLE_USERNAME/{slug_of(source.name)}",
        "template": str(folder / "chat_template.jinja") if _template(source) else "",
    }
    values["kaggle_dataset"] = "" if source.fetch else values["kaggle_id"]
    in_notebook = any(name.endswith(".ipynb") for name in target.files)
    return values, [] if in_notebook else get


def _template(source: _Source) -> str:
    return chat_template(source.header) if source.header is not None else ""


def _names(target: Target, source: _Source, settings: Settings) -> dict[str, Any]:
    """Values that do not depend on where things lie."""
    slug, n_layers = slug_of(source.name), int(source.header.arch("block_count", 0)) if source.header else 0
    share = round(min(1.0, settings.n_gpu_layers / (n_layers + 1)), 2)
    served = _fill(target.served_name, {"name": slug, "slug": slug}, str)
    cuda = "ON" if settings.n_gpu_layers and platform.system() != "Darwin" else ""  # there it is Metal
    return {
        "name": slug,
        "slug": slug,
        "nbytes": source.nbytes,
        "n_ctx": settings.n_ctx,
        "n_threads": settings.n_threads,
        "n_gpu_layers": settings.n_gpu_layers,
        "n_ctx_text": str(settings.n_ctx),
        "n_threads_text": str(settings.n_threads),
        "n_gpu_layers_text": str(settings.n_gpu_layers),
        "max_tokens": min(4096, settings.n_ctx // 4),
        "gpu_ratio": share,
        "gpu_share": "off" if not share else "max" if share == 1 else str(share),
        "host": HOST,
        "port": target.server,
        "publish": f"{HOST}:{target.server}:8080",
        "base_url": f"http://{HOST}:{target.server}{target.prefix}/v1",
        "template_text": _template(source),
        "build": BUILD,
        "system": _system(),
        "cuda": cuda,
        "gpu_driver": "nvidia" if cuda else "",
        "image": f"ghcr.io/ggml-org/llama.cpp:server{'-cuda' if cuda else ''}-{BUILD}",
        "original": source.original,
        "runner_model": f"dfqs/{slug}",
        "lemonade_args": f"--threads {settings.n_threads} --n-gpu-layers {settings.n_gpu_layers} --no-repack",
        "question": _question(served),
        "platform": target.title,
        "drive": "/content/drive" if "drive" in target.place else "",
        "where_it_is": "A file of your Drive appears once it is mounted."
        if "drive" in target.place
        else "A local file goes up as a dataset first, and appears under /kaggle/input.",
    }


def _question(served: str) -> str:
    messages = [{"role": "user", "content": PROMPT}]
    return json.dumps({"model": served, "messages": messages, "max_tokens": 32, "temperature": 0})


def _system() -> str:
    """The part of a release archive's name that says for which system it is."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return f"{'macos' if platform.system() == 'Darwin' else 'ubuntu'}-{'arm64' if arm else 'x64'}"


# ---- filling in ----


def _fill(text: str, values: dict[str, Any], quote: Callable[[Any], str]) -> str:
    """``text`` with its values; a part between {? and ?} goes when a value in it is empty."""

    def part(match: re.Match[str]) -> str:
        return match[1] if all(values[name] for name in PLACEHOLDER.findall(match[1])) else ""

    return PLACEHOLDER.sub(lambda match: quote(values[match[1]]), OPTIONAL.sub(part, text))


def _commands(templates: Sequence[str], values: dict[str, Any]) -> list[str]:
    """Shell commands, each value quoted for the shell."""
    macros = _table()["common"]
    expand = partial(MACRO.sub, lambda match: macros[match[1]])
    return [_fill(expand(text), values, _for_shell) for text in templates]


def _for_shell(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else shlex.quote(str(value))


def _for_json(value: Any) -> str:
    """A literal of JSON, which is one of YAML and of Python too."""
    return json.dumps(value, ensure_ascii=False)


def _for_compose(value: Any) -> str:
    return _for_json(value).replace("$", "$$")


def _for_powershell(value: Any) -> str:
    return str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"


def _file(template: str, name: str, values: dict[str, Any]) -> str:
    """The text of one file of the recipe."""
    text = (data_dir() / "deploy" / "templates" / template).read_text(encoding="utf-8")
    kinds = {
        ".json": _for_json,
        ".yaml": _for_json,
        ".yml": _for_json,
        ".py": _for_json,
        ".ipynb": _for_json,
        ".ps1": _for_powershell,
    }
    quote = _for_compose if name == "compose.yaml" else kinds.get(PurePosixPath(name).suffix, str)
    filled = _fill(text, values, quote)
    return _notebook(filled, values) if name.endswith(".ipynb") else filled


def _notebook(text: str, values: dict[str, Any]) -> str:
    """A notebook of a Python file whose cells begin with ``# %%``."""
    import nbformat

    cells = []
    for number, part in enumerate(re.split(r"^# %%", text, flags=re.MULTILINE)[1:]):
        kind, _, body = part.partition("\n")
        prose = "markdown" in kind
        body = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if prose else body
        make = nbformat.v4.new_markdown_cell if prose else nbformat.v4.new_code_cell
        cells.append(make(body.strip("\n"), id=f"cell-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    return nbformat.writes(book) + "\n"


def _notes(target: Target, source: _Source, settings: Settings, values: dict[str, Any]) -> list[str]:
    """What to know before running the recipe."""
    notes = [f"Limits: {target.limits}."]
    if target.run_here == "":
        notes.append(f"Generated, not run here. Checked: {target.checked_how}.")
    if source.shards is None:
        notes.append(
            f"The header is not here, so a context of {settings.n_ctx:,} tokens is a guess: give "
            "the local file for settings that fit."
        )
    else:
        notes += _memory_notes(source, settings)
    if target.single_file and len(source.files) > 1:
        notes.append(
            f"{target.title} takes one file: the shards are merged first, which takes "
            f"{binary_size(source.nbytes)} more of the disk (`--consume` releases them meanwhile)."
        )
    if source.header is not None and not values["template_text"]:
        notes.append("The header has no chat template: a server falls back on a template of its own.")
    if values["original"] == NOT_GIVEN and any("@{original}" in one for one in target.run):
        notes.append(f"Replace {NOT_GIVEN} by the repository that the GGUF was made from.")
    if any("@{llama_server}" in one or "--no-repack" in one for one in target.run):
        notes.append(NO_REPACK)
    if target.place or target.fetch_to:
        notes.append("Context, threads and GPU layers suit the machine that wrote this recipe.")
    return [*notes, *target.manual]


def _memory_notes(source: _Source, settings: Settings) -> list[str]:
    assert source.shards is not None
    needs = estimate(source.shards.headers, settings.n_ctx)
    notes = [
        f"The cache of {settings.n_ctx:,} tokens takes {binary_size(needs.kv.total)} (swa_full off), "
        f"beside {binary_size(needs.weights_bytes)} of weights. The compute buffer is not counted."
    ]
    try:
        slow = check_fits(needs)
    except SpaceError as error:
        slow = f"Not on this machine: {error.what}"
    return [*notes, f"{slow[0].upper()}{slow[1:]}."] if slow else notes


# ---- writing ----


def recipe_text(recipe: Recipe, also: Sequence[str] = (), stop: Sequence[str] = ()) -> str:
    """The recipe as people read it: Markdown."""
    one, settings = target_of(recipe.target), recipe.settings
    blocks = [("Run", recipe.commands), ("Check", recipe.checks), ("Or", also), ("Stop", stop)]
    facts = {
        "loads deepseek4": one.loads_deepseek4,
        "split files": one.split_files,
        "since": one.since,
        "facts of": one.date,
    }
    lines = [
        f"# {one.title}",
        "",
        f"Written by `dfqs-nb deploy {recipe.target}`: {one.recipe}.",
        "",
        f"Context: {settings.n_ctx:,} tokens. Threads: {settings.n_threads}. Layers on the GPU: "
        f"{settings.n_gpu_layers}.",
        "",
    ]
    lines += [f"- {note}" for note in recipe.notes]
    for title, commands in blocks:
        if commands:
            lines += ["", f"## {title}", "", "```sh", *commands, "```"]
    lines += ["", "## Known", "", *[f"- {name}: {text}" for name, text in facts.items()]]
    return "\n".join([*lines, *[f"- {url}" for url in one.source]]) + "\n"


def _write(folder: Path, texts: dict[str, str], overwrite: bool) -> None:
    """Write all files, or none: what is there stays unless it may be replaced."""
    there = [name for name in texts if (folder / name).exists()]
    if there and not overwrite:
        raise DeployError(
            f"{', '.join(there)} is there already",
            where=tilde(folder),
            hint="take another folder, or pass overwrite (--overwrite)",
        )
    done: list[Path] = []
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(folder / name) as file:
                file.write(text)
            done.append(folder / name)
    except OSError as error:
        for path in done if not there else []:
            path.unlink(missing_ok=True)
        raise DeployError(
            f"cannot write the recipe ({error.strerror})",
            where=tilde(folder),
            hint="take a folder you may write",
        ) from error


def list_text() -> str:
    """The targets, one a line: name, title, and what ran here."""
    lines = [
        f"{one.name:<22}{one.title:<24}{one.run_here or 'generated, not run'}" for one in targets().values()
    ]
    return "\n".join(lines) + "\n"


def table_text() -> str:
    """``data/deploy/README.md``: what is known of every target, as Markdown."""
    rows = targets_table().to_dict("records")
    for row in rows:
        row["title (name)"] = f"{row['title']} (`{row['target']}`)"
        row["source"] = ", ".join(f"[{n}]({url})" for n, url in enumerate(row["source"].split(), 1))
    how = {"target": "title (name)", "recipe": "recipe", "run here": "run_here", "checked how": "checked_how"}
    limits = {
        "target": "title",
        "loads `deepseek4`": "loads_deepseek4",
        "split files": "split_files",
        "since": "since",
        "limits": "limits",
        "source": "source",
    }
    dates = ", ".join(sorted({one.date for one in targets().values()}))
    page = (data_dir() / "deploy" / "templates" / "README.md").read_text(encoding="utf-8")
    return _fill(page, {"how": _markdown(rows, how), "limits": _markdown(rows, limits), "dates": dates}, str)


def _markdown(rows: Sequence[dict[str, str]], columns: dict[str, str]) -> str:
    """A table of these columns: the head's text, and the row's key."""
    lines = [columns, ["---"] * len(columns), *([row[key] for key in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
