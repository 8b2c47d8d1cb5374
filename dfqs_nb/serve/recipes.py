"""Recipes to run a model elsewhere: files and commands for each way of running that the documents list.

What is known of each target is data (``data/deploy/targets.toml``), and so are commands, notes and the texts
of files (``data/deploy/templates/``), in jinja. A key is never written: files and commands name the
environment variable that holds it.
"""

from __future__ import annotations

import json
import platform
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.display import size
from dfqs_nb.core.errors import DfqsError, SpaceError
from dfqs_nb.core.files import write_text
from dfqs_nb.core.machine import available_memory, gpu_memories, usable_cores
from dfqs_nb.core.paths import data_dir, public_address, tilde
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf import placement
from dfqs_nb.gguf.facts import require_model
from dfqs_nb.gguf.memory import check_fits, estimate
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.llama.settings import threads_for

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

HOST = "127.0.0.1"  # nothing listens beyond this machine
PROMPT = "What is the capital of France?"
DEFAULT_KEY_VARIABLE = "DFQS_API_KEY"
MOST_N_CTX, LEAST_N_CTX = 32_768, 4_096  # tokens, unless told otherwise
UNKNOWN_N_CTX = 8_192  # tokens, for a model whose header is not here
BUILD = "b11063"  # the newest llama.cpp build seen to load `deepseek4` from a prebuilt library
SHARD_ENDING = re.compile(r"-\d{5}-of-\d{5}$")
WEIGHTS_FROM = "deepseek-ai/DeepSeek-V4-Flash"
NOT_GIVEN = "OWNER/ORIGINAL-MODEL"
FACTS = ("recipe", "checked_how", "run_here", "loads_deepseek4", "split_files", "since", "limits", "source")


class DeployError(DfqsError):
    """A recipe cannot be written."""


@cache
def _tables(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts that commands and notes share, and the targets by name."""
    table = tomllib.loads((folder / "targets.toml").read_text(encoding="utf-8"))
    common, defaults = table.pop("common"), table.pop("defaults")
    entries = {name: SimpleNamespace(name=name, **{**defaults, **entry}) for name, entry in table.items()}
    return common, entries


def targets() -> dict[str, Any]:
    """The targets by name, with what ``data/deploy/targets.toml`` says of each, in its order."""
    return _tables(data_dir() / "deploy")[1]


def targets_table() -> pd.DataFrame:
    """One row a target: ``target``, ``title``, then what is known of it, each a text."""
    import pandas as pd

    table = pd.DataFrame([vars(target) for target in targets().values()]).rename(columns={"name": "target"})
    table["source"] = table["source"].map(" ".join)
    return table[["target", "title", *FACTS]].replace({"run_here": {"": "generated, not run"}})


def table_text() -> str:
    """``data/deploy/README.md``: what is known of every target, as Markdown."""
    return _filled("{% include 'README.md' %}", {"targets": list(targets().values())}, str)


# ---- templates: each value quoted as the file's kind needs ----


class Ready(str):
    """A text that is quoted already."""


@cache
def _environment(quote: Callable[[Any], str], folder: Path) -> jinja2.Environment:
    """Jinja that puts each value through ``quote``; a name that has no value is an error."""
    import jinja2

    parts = {name: text for name, text in _tables(folder)[0].items() if isinstance(text, str)}
    files = jinja2.FileSystemLoader(folder / "templates")
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(parts), files]),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Ready) else quote(value),
        trim_blocks=True,
        keep_trailing_newline=True,
    )  # autoescape is for HTML: `finalize` quotes for each kind of file
    made.globals |= {"host": HOST, "prompt": PROMPT, "build": BUILD}
    made.filters |= {"json": json.dumps, "bytes": size, "number": "{:,}".format}
    return made


def _filled(text: str, values: Mapping[str, Any], quote: Callable[[Any], str]) -> str:
    return _environment(quote, data_dir() / "deploy").from_string(text).render(values)


def _for_shell(value: Any) -> str:
    return shlex.join(value) if isinstance(value, list) else shlex.quote(str(value))


def _for_json(value: Any) -> str:
    """A literal of JSON, which is one of YAML and of Python too: YAML reads some characters as line ends."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[\x7f-\x9f\u2028\u2029\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _for_powershell(value: Any) -> str:
    """A literal of PowerShell, for which typographic quotes end a string as plain ones do."""
    doubled = re.sub("['\u2018\u2019\u201a\u201b]", r"\g<0>\g<0>", str(value))
    return str(value) if isinstance(value, int) else f"'{doubled}'"


def _for_modelfile(value: Any) -> str:
    """A value of a Modelfile, which ends with its line."""
    text = str(value)
    if text != " ".join(text.splitlines()).strip() or not text.isprintable():
        raise DeployError(f"a Modelfile cannot name {text!r}", hint="rename the folder or the file")
    return text


QUOTES: dict[str, Callable[[Any], str]] = {"Modelfile": _for_modelfile, ".ps1": _for_powershell}
QUOTES["compose.yaml"] = lambda value: _for_json(value).replace("$", "$$")
QUOTES |= dict.fromkeys((".json", ".yaml", ".yml", ".py", ".ipynb"), _for_json)


def _file_text(template: str, name: str, values: Mapping[str, Any]) -> str:
    """The text of one file of the recipe."""
    quote = QUOTES.get(name) or QUOTES.get(PurePosixPath(name).suffix) or str
    text = _filled(f"{{% include {template!r} %}}", values, quote)
    # without the mark Windows PowerShell reads another encoding
    return "\ufeff" + text if name.endswith(".ps1") and not text.isascii() else text


# ---- recipes ----


@dataclass(frozen=True)
class Settings:
    """How the model is opened: context, threads of decode, and where its layers are."""

    n_ctx: int
    n_threads: int
    n_gpu_layers: int  # whole layers on the GPU, for programs that cannot keep experts in memory
    flags: tuple[str, ...] = ("-ngl", "0")  # which place the model for llama.cpp's own programs


@dataclass(frozen=True)
class Recipe:
    """What was written for one target."""

    target: str
    model: str  # its path where it runs
    settings: Settings
    files: tuple[Path, ...]  # RECIPE.md last
    commands: tuple[str, ...]  # they fetch and prepare the model, install and run, in the recipe's folder
    checks: tuple[str, ...]  # they ask the running server
    notes: tuple[str, ...]


def write_recipe(
    target: str,
    model: str | Path,
    folder: str | Path,
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    port: int | None = None,
    key_variable: str = "",
    overwrite: bool = False,
) -> Recipe:
    """Write the files and commands that run this model with this target. Nothing is downloaded.

    Args:
        model: a local GGUF file (any of its shards), a name of the registry, or ``hf://owner/repo/file``.
        n_ctx: by default what this machine's memory holds, up to 32,768 tokens and to the trained context.
        n_threads, n_gpu_layers, port: by default what suits machine, model and target.
        key_variable: the environment variable that holds the server's key. By default no key is asked for;
            a target's server that always asks gets ``DFQS_API_KEY``.

    Raises:
        DeployError: says which of target, file, context, path and folder does not do.
        HeaderError, ShardError, RegistryError: the model is not a complete GGUF, or nothing has that name.
    """
    if target not in targets():
        raise DeployError(f"no target is called {target!r}", hint=f"there are {', '.join(targets())}")
    chosen, source, folder = targets()[target], _source(model), Path(folder).absolute()
    key_variable = key_variable or (DEFAULT_KEY_VARIABLE if chosen.needs_key else "")
    if key_variable and not (key_variable.isidentifier() and key_variable.isascii()):
        raise DeployError("that is no name of an environment variable", hint="give its name, not the key")
    settings = _settings(chosen, source, n_ctx, n_threads, n_gpu_layers)
    values = _values(chosen, source, settings, folder, key_variable, port or chosen.server)
    names = [name for name in chosen.files if name != "chat_template.jinja" or values["template_text"]]
    texts = {name: _file_text(chosen.files[name], name, values) for name in names}
    shared = _tables(data_dir() / "deploy")[0]

    def commands(templates: Sequence[str]) -> tuple[str, ...]:
        return tuple(_filled(text, values, _for_shell) for text in templates)

    run = commands([*chosen.install, *chosen.run])
    values["written"] = "\n".join([*texts.values(), *run])
    fetch = () if any(name.endswith(".ipynb") for name in texts) else values["get"]
    blocks = {"Run": (*fetch, *run), "Check": commands(shared["check"]) if chosen.server else ()}
    blocks |= {"Or": commands(chosen.also), "Stop": commands(chosen.stop)}
    notes = [*filter(None, (_filled(text, values, str) for text in shared["notes"])), *chosen.manual]
    longest = max(map(len, re.findall("`+", str(blocks))), default=0)  # a path may hold a fence
    page = values | {"notes": notes, "blocks": blocks, "fence": "`" * max(3, 1 + longest)}
    texts["RECIPE.md"] = _filled("{% include 'RECIPE.md' %}", page, str)
    _write(folder, texts, overwrite)
    files = tuple(folder / name for name in texts)
    return Recipe(target, values["model"], settings, files, blocks["Run"], blocks["Check"], tuple(notes))


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


# ---- the model, and its settings ----


@dataclass(frozen=True)
class _Source:
    """A model, here (``folder``) or on the hub (``download``: the words of a command), and its header."""

    name: str
    files: tuple[str, ...]
    folder: str = ""
    download: tuple[str, ...] = ()
    nbytes: int = 0
    shards: ShardSet | None = None
    original: str = NOT_GIVEN
    published: registry.Model | None = None
    glued: str = ""  # the model whose shards, put end to end, have exactly the size of the published file

    def arch(self, key: str) -> int:
        """A number of the header; 0 where there is none."""
        return int(self.shards.as_one.arch(key, 0)) if self.shards else 0


def _source(model: str | Path) -> _Source:
    from dfqs_nb.merge import diagnose

    known, given = registry.registered(), str(model)
    addresses = {f"{entry.source}/{file.name}": entry for entry in known.values() for file in entry.files}
    entry = known.get(given) or addresses.get(given.rpartition("@")[0] or given)
    if given.startswith("hf://") or entry and entry.source.startswith("hf://"):
        return _on_the_hub(given, entry, known)
    path = registry.resolve(model)[0]
    diagnosis = diagnose(path)
    if not diagnosis.sound:
        what = f"no runtime loads it: {diagnosis.finding}"
        raise DeployError(what, where=tilde(path), hint=diagnosis.next_step)
    shards = open_shards(path)
    require_model(shards.as_one)
    url = str(shards.as_one.get("general.base_model.0.repo_url", ""))
    original = url.removeprefix("https://huggingface.co/") if "huggingface.co/" in url else NOT_GIVEN
    folder, files = str(shards.paths[0].absolute().parent), tuple(shard.name for shard in shards.paths)
    return _Source(shards.name, files, folder, nbytes=shards.nbytes, shards=shards, original=original)


def _on_the_hub(given: str, entry: registry.Model | None, known: Mapping[str, registry.Model]) -> _Source:
    """A model that the recipe downloads; of a registered one more is known than its address."""
    if entry is None:
        file = registry.parse_address(given)
        repo, files, nbytes, glued = file.repo, registry.siblings(file.file), 0, ""
        revision = ["--revision", file.revision] if file.revision else []
    else:
        repo, files, revision = entry.source.removeprefix("hf://"), [file.name for file in entry.files], []
        sums = {other.size_bytes: other.name for other in known.values() if len(other.files) > 1}
        nbytes, glued = entry.size_bytes, sums.get(entry.size_bytes, "") if len(files) == 1 else ""
    name = SHARD_ENDING.sub("", PurePosixPath(files[0]).stem)
    download = ("hf", "download", repo, *files, *revision)
    files = [f"{name}.gguf"] if entry else files  # shards of a registered model are merged
    original = WEIGHTS_FROM if name.lower().startswith("deepseek-v4-flash") else NOT_GIVEN
    facts: dict[str, Any] = {"nbytes": nbytes, "original": original, "published": entry, "glued": glued}
    return _Source(name, tuple(files), download=download, **facts)


def _settings(
    target: Any, source: _Source, n_ctx: int | None, n_threads: int | None, n_gpu_layers: int | None
) -> Settings:
    """What was asked for, else what suits machine and model.

    The context is the largest power of two whose cache takes at most half of what the weights leave of the
    memory.
    """
    least, limit = max(target.least_n_ctx, 1), source.arch("context_length") or 2**31 - 256
    if not least <= (n_ctx or least) <= limit:
        what = f"a context of {n_ctx or least:,} tokens is not between {least:,} and {limit:,}"
        raise DeployError(what, hint="leave it out, or take another target")
    if (n_threads or 1) < 1 or n_threads == 0 or (n_gpu_layers or 0) < 0:
        raise DeployError("threads must be at least 1, and GPU layers at least 0", hint="leave them out")
    if source.shards is None:
        n_ctx = n_ctx or max(least, min(UNKNOWN_N_CTX, limit))
        layers = n_gpu_layers or 0
        return Settings(n_ctx, n_threads or usable_cores(), layers, ("-ngl", str(layers)))
    header, free = source.shards.as_one, available_memory().available_bytes
    if n_ctx is None:
        room = free - source.nbytes if source.nbytes < free else free // 4
        n_ctx = min(MOST_N_CTX, limit)
        while n_ctx > LEAST_N_CTX and estimate(header, n_ctx).kv.total > room // 2:
            n_ctx //= 2
        n_ctx = max(least, n_ctx)
    n_threads = n_threads or threads_for(source.shards.paths[0])
    if n_gpu_layers is not None:
        return Settings(n_ctx, n_threads, n_gpu_layers, ("-ngl", str(n_gpu_layers)))
    shape, here = placement.Model(header), (free, gpu_memories())
    whole = placement.place(shape, n_ctx, *here, whole=True).n_gpu_layers
    return Settings(n_ctx, n_threads, whole, placement.place(shape, n_ctx, *here).flags)


def _join(folder: str, name: str) -> str:
    return f"{folder}\\{name}" if "\\" in folder else f"{folder}/{name}"


def _place(target: Any, source: _Source, folder: Path, name: str) -> tuple[str, tuple[str, ...], list[str]]:
    """The folder in which the target finds the model, its files there, and the commands that bring them."""
    files, get = source.files, list[str]()
    place = _filled(target.place, {"file": "", "name": name}, str).rstrip("/\\") or source.folder
    if source.download:
        place = target.fetch_to or str(folder / "models")
        path, known = _join(place, files[0]), source.published
        fetch, ours = [*source.download, "--local-dir", place], list[list[str]]()
        if known and len(known.files) > 1:  # in which folder of the hub its shards are is not recorded
            fetch, ours = [], [["dfqs-nb", "merge", known.name, "-o", path]]
        elif source.glued:
            ours = [["dfqs-nb", "repair", path, "--in-place"]]
        if ours and target.fetch_to:  # another machine
            ours.insert(0, ["python", "-m", "pip", "install", "-q", f"git+{public_address()}"])
        get = [shlex.join(words) for words in (fetch, *ours) if words]
    if target.single_file and len(files) > 1:
        joined = folder / f"{source.name}.gguf"
        get = [*get, shlex.join(["dfqs-nb", "merge", _join(place, files[0]), "-o", str(joined)])]
        place, files = str(folder), (joined.name,)
    return place, files, get


def _values(
    target: Any, source: _Source, settings: Settings, folder: Path, key_variable: str, port: int
) -> dict[str, Any]:
    """What templates, commands and notes may name."""
    name = re.sub(r"[^a-z0-9]+", "-", source.name.lower()).strip("-") or "model"  # every target takes it
    place, files, get = _place(target, source, folder, name)
    mac, arm = platform.system() == "Darwin", platform.machine().lower() in ("arm64", "aarch64")
    paths = [_join(target.mount or place, file) for file in files]
    key_name, header = key_variable or DEFAULT_KEY_VARIABLE, source.shards.as_one if source.shards else None
    needs = estimate(header, settings.n_ctx) if header else None
    try:
        slow = check_fits(needs) if needs else ""
    except SpaceError as error:
        slow = f"Not on this machine: {error.what}"
    return {
        **vars(settings),
        "target": target,
        "source": source,
        "name": name,
        "served": _filled(target.served_name, {"name": name}, str),
        "gpu_ratio": round(min(1.0, settings.n_gpu_layers / (source.arch("block_count") + 1)), 2),
        "placement": Ready(shlex.join(settings.flags)),
        "cuda": "ON" if settings.flags[:2] != ("-ngl", "0") and not mac else "",  # there it is Metal
        "port": port,
        "base_url": f"http://{HOST}:{port}{target.prefix}/v1",
        "template_text": header.text("tokenizer.chat_template") if header else "",
        "system": f"{'macos' if mac else 'ubuntu'}-{'arm64' if arm else 'x64'}",
        "model": paths[0],
        "models": paths,
        "file": files[0],
        "model_folder": place,
        "folder": str(folder),
        "get": get,
        "key": key_variable,
        "key_name": key_name,
        "key_or_none": Ready(f'"${{{key_name}:-none}}"'),
        "needs": needs,
        "slow": slow and f"{slow[0].upper()}{slow[1:]}.",
    }


if __name__ == "__main__":
    print(table_text(), end="")
