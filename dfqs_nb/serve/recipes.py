"""Recipes to run a model elsewhere: files and commands for each way of running that the documents list.

What is known of each target is data (``data/deploy/targets.toml``), and so are commands, notes and the texts
of files (``data/deploy/templates/``), in jinja. This module finds the settings (context, threads, GPU layers,
chat template) from the model's header and this machine, and writes the recipe whole or not at all.

A key is never written: files and commands name the environment variable that holds it.
"""

from __future__ import annotations

import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dfqs_nb.core.errors import SpaceError
from dfqs_nb.core.files import write_text
from dfqs_nb.core.machine import available_memory, usable_cores
from dfqs_nb.core.paths import public_address, tilde
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf import placement
from dfqs_nb.gguf.facts import require_model
from dfqs_nb.gguf.memory import check_fits, estimate
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.llama.settings import threads_for
from dfqs_nb.serve.templates import (
    DeployError,
    Ready,
    Target,
    file_text,
    filled,
    for_shell,
    list_text,
    shared,
    table_text,
    target_of,
    targets,
    targets_table,
)

__all__ = ["Recipe", "list_text", "table_text", "target_of", "targets", "targets_table", "write_recipe"]

HOST = "127.0.0.1"  # nothing listens beyond this machine
PROMPT = "What is the capital of France?"
DEFAULT_KEY_VARIABLE = "DFQS_API_KEY"
MOST_N_CTX, LEAST_N_CTX = 32_768, 4_096  # tokens, unless told otherwise
UNKNOWN_N_CTX = 8_192  # tokens, for a model whose header is not here
BUILD = "b11063"  # the newest llama.cpp build seen to load `deepseek4` from a prebuilt library
SHARD_ENDING = re.compile(r"-\d{5}-of-\d{5}$")
WEIGHTS_FROM = "deepseek-ai/DeepSeek-V4-Flash"
NOT_GIVEN = "OWNER/ORIGINAL-MODEL"

# ---- recipes ----


@dataclass(frozen=True)
class Settings:
    """How the model is opened.

    Attributes:
        n_ctx: tokens of context. n_threads: of decode.
        n_gpu_layers: whole layers on the GPU, for programs that cannot keep experts in memory.
        flags: what places the model for llama.cpp's own programs (`placement.Placement.flags`).
    """

    n_ctx: int
    n_threads: int
    n_gpu_layers: int
    flags: tuple[str, ...] = ("-ngl", "0")


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
    overwrite: bool = False,
) -> Recipe:
    """Write the files and commands that run this model with this target.

    Args:
        target: a name of `targets`.
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
        DeployError: no such target; a file that no runtime loads; a context the model was not made for; a
            path that the target's files cannot hold; or files that exist already.
        HeaderError, ShardError, RegistryError: the model is not a complete GGUF, or nothing has that name.
    """
    chosen, source = target_of(target), _source(model)
    chosen = chosen.model_copy(update={"server": port or chosen.server})
    key_variable = key_variable or (DEFAULT_KEY_VARIABLE if chosen.needs_key else "")
    if key_variable and not key_variable.isidentifier():
        raise DeployError("that is no name of an environment variable", hint="give its name, not the key")
    if hub is not None:
        source = replace(_source(hub), shards=source.shards, nbytes=source.nbytes)
    folder = Path(folder).absolute()
    settings = _settings(chosen, source, n_ctx, n_threads, n_gpu_layers)
    values = _values(chosen, source, settings, folder, key_variable)
    texts = {
        name: file_text(template, name, values)
        for name, template in chosen.files.items()
        if name != "chat_template.jinja" or values["template_text"]
    }

    def commands(templates: Sequence[str]) -> tuple[str, ...]:
        return tuple(filled(text, values, for_shell) for text in templates)

    run = commands([*chosen.install, *chosen.run])
    values["written"] = "\n".join([*texts.values(), *run])
    notes = [filled(note, values, str) for note in shared()["notes"]] + chosen.manual
    recipe = Recipe(
        target,
        values["model"],
        settings,
        tuple(folder / name for name in (*texts, "RECIPE.md")),
        (*(() if any(name.endswith(".ipynb") for name in texts) else values["get"]), *run),
        commands(shared()["check"]) if chosen.server else (),
        tuple(filter(None, notes)),
    )
    blocks = {"Run": recipe.commands, "Check": recipe.checks}
    blocks |= {"Or": commands(chosen.also), "Stop": commands(chosen.stop)}
    ticks = re.findall("`+", str(blocks))
    fence = "`" * max(3, 1 + max(map(len, ticks), default=0))  # a path may hold a fence
    page = values | {"notes": recipe.notes, "blocks": blocks, "fence": fence}
    _write(folder, texts | {"RECIPE.md": filled("{% include 'RECIPE.md' %}", page, str)}, overwrite)
    return recipe


def _write(folder: Path, texts: Mapping[str, str], overwrite: bool) -> None:
    """Write all files, or none: what exists stays unless it may be replaced."""
    existing = [name for name in texts if (folder / name).exists()]
    if existing and not overwrite:
        hint = "take another folder, or pass overwrite (--overwrite)"
        raise DeployError(f"already there: {', '.join(existing)}", where=tilde(folder), hint=hint)
    if any(re.search("[\ud800-\udfff]", text) for text in texts.values()):
        hint = "rename the folder or the file"
        raise DeployError("the model's path is not UTF-8, and a recipe is", where=tilde(folder), hint=hint)
    done: list[Path] = []
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            done.append(write_text(folder / name, text))
    except OSError as error:
        for path in done if not existing else []:
            path.unlink(missing_ok=True)
        what = f"cannot write the recipe ({error.strerror})"
        raise DeployError(what, where=tilde(folder), hint="take a folder you may write") from error


# ---- the model ----


@dataclass(frozen=True)
class _Source:
    """A model, here or on the hub: where it is (``folder``), and what a header would tell of it.

    ``fetch`` has the commands that bring it into a folder. ``glued`` names the model whose shards, put end to
    end, have exactly the size of this ``published`` file.
    """

    name: str
    files: tuple[str, ...]
    folder: str = ""
    nbytes: int = 0
    shards: ShardSet | None = None
    fetch: Callable[[str], list[str]] | None = None
    original: str = NOT_GIVEN
    published: registry.Model | None = None
    glued: str = ""

    def arch(self, key: str) -> int:
        """A number of the header; 0 where there is none."""
        return int(self.shards.as_one.arch(key, 0)) if self.shards else 0


def _source(model: str | Path) -> _Source:
    known = registry.registered()
    addresses = {f"{entry.source}/{file.name}": entry for entry in known.values() for file in entry.files}
    entry = known.get(str(model)) or addresses.get(str(model).rpartition("@")[0] or str(model))
    if entry and entry.source.startswith("hf://"):
        return _registered(entry, known)
    if not entry and str(model).startswith("hf://"):
        return _on_hub(str(model))
    return _local(registry.resolve(model)[0])


def _local(path: Path) -> _Source:
    from dfqs_nb.merge import diagnose

    diagnosis = diagnose(path)
    if not diagnosis.sound:
        what = f"no runtime loads it: {diagnosis.finding}"
        raise DeployError(what, where=tilde(path), hint=diagnosis.next_step)
    shards = open_shards(path)
    require_model(shards.as_one)
    url = str(shards.as_one.get("general.base_model.0.repo_url", ""))
    original = url.removeprefix("https://huggingface.co/") if "huggingface.co/" in url else NOT_GIVEN
    files = tuple(shard.name for shard in shards.paths)
    folder = str(shards.paths[0].absolute().parent)
    return _Source(shards.name, files, folder, shards.nbytes, shards, original=original)


def _on_hub(address: str) -> _Source:
    file = registry.parse_address(address)
    names = registry.siblings(file.file)
    revision = ["--revision", file.revision] if file.revision else []

    def fetch(folder: str) -> list[str]:
        return [shlex.join(["hf", "download", file.repo, *names, *revision, "--local-dir", folder])]

    return _Source(SHARD_ENDING.sub("", PurePosixPath(file.file).stem), tuple(names), fetch=fetch)


def _registered(model: registry.Model, known: Mapping[str, registry.Model]) -> _Source:
    """A registered model of the hub; the workbook fetches its shards, whose folder there is not recorded."""
    name = SHARD_ENDING.sub("", model.files[0].name.removesuffix(".gguf"))
    one_file, repo = f"{name}.gguf", model.source.removeprefix("hf://")
    sums = {other.size_bytes: other.name for other in known.values() if len(other.files) > 1}
    glued = sums.get(model.size_bytes, "") if len(model.files) == 1 else ""  # a merge would be smaller

    def fetch(folder: str) -> list[str]:
        path = _join(folder, one_file)
        if len(model.files) > 1:
            return [shlex.join(["dfqs-nb", "merge", model.name, "-o", path])]
        get = [shlex.join(["hf", "download", repo, one_file, "--local-dir", folder])]
        return [*get, *([shlex.join(["dfqs-nb", "repair", path, "--in-place"])] if glued else [])]

    return _Source(
        name,
        (one_file,),
        nbytes=model.size_bytes,
        fetch=fetch,
        original=WEIGHTS_FROM if name.lower().startswith("deepseek-v4-flash") else NOT_GIVEN,
        published=model,
        glued=glued,
    )


# ---- its settings ----


def _settings(
    target: Target, source: _Source, n_ctx: int | None, n_threads: int | None, n_gpu_layers: int | None
) -> Settings:
    n_ctx = _n_ctx(target, source, n_ctx)
    if n_threads is None:
        n_threads = threads_for(source.shards.paths[0]) if source.shards else usable_cores()
    flags: tuple[str, ...] = ("-ngl", str(n_gpu_layers or 0))
    if n_gpu_layers is None and source.shards:
        shape = placement.Model(source.shards.headers)
        here = (available_memory().available_bytes, gpu_memories())
        flags = placement.place(shape, n_ctx, *here).flags
        n_gpu_layers = placement.place(shape, n_ctx, *here, whole=True).n_gpu_layers
    n_gpu_layers = n_gpu_layers or 0
    if n_threads < 1 or n_gpu_layers < 0:
        raise DeployError("threads must be at least 1, and GPU layers at least 0", hint="leave them out")
    return Settings(n_ctx, n_threads, n_gpu_layers, flags)


def _n_ctx(target: Target, source: _Source, wanted: int | None) -> int:
    """The tokens asked for, if they can be; else the largest power of two up to the limits that fits.

    It fits where its cache takes at most half of what the weights leave of the memory.
    """
    trained = source.arch("context_length")
    least, limit = max(target.least_n_ctx, 1), trained or 2**31 - 256
    if least > limit:
        what = f"{target.title} wants a context of {least:,} tokens, and the model was trained on {trained:,}"
        raise DeployError(what, hint="take another target")
    if wanted is not None and not least <= wanted <= limit:
        what = f"a context of {wanted:,} tokens is not between {least:,} and {limit:,}"
        raise DeployError(what, hint="leave it out, and it is chosen")
    if wanted is not None or source.shards is None:
        return wanted or max(least, min(UNKNOWN_N_CTX, limit))
    free = available_memory().available_bytes
    room = free - source.nbytes if source.nbytes < free else free // 4
    n_ctx = min(MOST_N_CTX, limit)
    while n_ctx > LEAST_N_CTX and estimate(source.shards.headers, n_ctx).kv.total > room // 2:
        n_ctx //= 2
    return max(least, n_ctx)


def gpu_memories() -> list[int]:
    """Free memory of each of this machine's NVIDIA GPUs, in bytes, or of an Apple chip's; none without one.

    An Apple GPU shares the machine's memory: macOS lets it hold about two thirds of a small one, and three
    quarters of a large one (Metal's ``recommendedMaxWorkingSetSize``). Two thirds are counted.
    """
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        memory = available_memory()
        return [min(memory.available_bytes, memory.total_bytes * 2 // 3)]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) << 20 for line in done.stdout.split() if line.isdigit()]


# ---- the values of templates ----


def _join(folder: str, name: str) -> str:
    return f"{folder}\\{name}" if "\\" in folder else f"{folder}/{name}"


def slug_of(name: str) -> str:
    """A name that every target takes.

    >>> slug_of("DFQS-Nano-IQ1_S-XL (test)")
    'dfqs-nano-iq1-s-xl-test'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def _place(target: Target, source: _Source, folder: Path) -> tuple[str, tuple[str, ...], list[str]]:
    """The folder in which the target finds the model, its files there, and the commands that bring them."""
    files, get = source.files, []
    if source.fetch is None:
        there = filled(target.place, {"file": "", "name": slug_of(source.name)}, str).rstrip("/\\")
        place = there or source.folder
    else:
        place = target.fetch_to or str(folder / "models")
        get = source.fetch(place)
        if target.fetch_to and any(command.startswith("dfqs-nb ") for command in get):
            get = [shlex.join(["python", "-m", "pip", "install", "-q", f"git+{public_address()}"]), *get]
    if target.single_file and len(files) > 1:
        joined = str(folder / f"{source.name}.gguf")
        get = [*get, shlex.join(["dfqs-nb", "merge", _join(place, files[0]), "-o", joined])]
        place, files = str(folder), (f"{source.name}.gguf",)
    return place, files, get


def _values(
    target: Target, source: _Source, settings: Settings, folder: Path, key_variable: str
) -> dict[str, Any]:
    """What templates, commands and notes may name."""
    place, files, get = _place(target, source, folder)
    name, inner = slug_of(source.name), target.mount or place
    mac, arm = platform.system() == "Darwin", platform.machine().lower() in ("arm64", "aarch64")
    return {
        **vars(settings),
        "target": target,
        "source": source,
        "name": name,
        "served": filled(target.served_name, {"name": name}, str),
        "gpu_ratio": round(min(1.0, settings.n_gpu_layers / (source.arch("block_count") + 1)), 2),
        "placement": Ready(shlex.join(settings.flags)),
        "cuda": "ON" if settings.flags[:2] != ("-ngl", "0") and not mac else "",  # there it is Metal
        "host": HOST,
        "port": target.server,
        "base_url": f"http://{HOST}:{target.server}{target.prefix}/v1",
        "template_text": source.shards.as_one.text("tokenizer.chat_template") if source.shards else "",
        "build": BUILD,
        "system": f"{'macos' if mac else 'ubuntu'}-{'arm64' if arm else 'x64'}",
        "model": _join(inner, files[0]),
        "models": [_join(inner, file) for file in files],
        "file": files[0],
        "model_folder": place,
        "folder": str(folder),
        "get": get,
        "prompt": PROMPT,
        "key": key_variable,
        "key_name": key_variable or DEFAULT_KEY_VARIABLE,
        "key_or_none": Ready(f'"${{{key_variable or DEFAULT_KEY_VARIABLE}:-none}}"'),
        **_memory(source, settings),
    }


def _memory(source: _Source, settings: Settings) -> dict[str, Any]:
    """What it needs of the memory (``needs``), and a sentence where that is too much (``slow``)."""
    if source.shards is None:
        return {"needs": None, "slow": ""}
    needs = estimate(source.shards.headers, settings.n_ctx)
    try:
        slow = check_fits(needs)
    except SpaceError as error:
        slow = f"Not on this machine: {error.what}"
    return {"needs": needs, "slow": slow and f"{slow[0].upper()}{slow[1:]}."}
