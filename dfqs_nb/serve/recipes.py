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
from functools import cache, partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pandas as pd
from markupsafe import Markup

from dfqs_nb.core.display import did_you_mean, size
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import write_text
from dfqs_nb.core.machine import available_memory, gpu_memories, usable_cores
from dfqs_nb.core.paths import data_dir, public_address, tilde
from dfqs_nb.gguf import memory
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf.facts import require_model
from dfqs_nb.gguf.shards import ShardSet
from dfqs_nb.llama.check import compute_buffers
from dfqs_nb.llama.settings import threads_for

if TYPE_CHECKING:
    import jinja2

HOST = "127.0.0.1"  # nothing listens beyond this machine
PROMPT = "What is the capital of France?"
DEFAULT_KEY_VARIABLE = "DFQS_API_KEY"
MOST_N_CTX = 32_768  # tokens, unless told otherwise
FIT_N_CTX = 4_096  # tokens: the least for which llama.cpp's --fit keeps layers on a card
UNKNOWN_N_CTX = 8_192  # tokens, for a model whose header is not here
BUILD = "b11063"  # the newest llama.cpp build seen to load `deepseek4` from a prebuilt library
WEIGHTS_FROM = "deepseek-ai/DeepSeek-V4-Flash"
NOT_GIVEN = "OWNER/ORIGINAL-MODEL"
FACTS = ("recipe", "checked_how", "run_here", "loads_deepseek4", "split_files", "since", "limits", "source")


@cache
def _tables() -> tuple[dict[str, Any], dict[str, Any]]:
    """The parts that commands and notes share, and the targets by name."""
    table = tomllib.loads((data_dir() / "deploy" / "targets.toml").read_text(encoding="utf-8"))
    common, defaults = table.pop("common"), table.pop("defaults")
    return common, {name: SimpleNamespace(name=name, **defaults | facts) for name, facts in table.items()}


def targets() -> dict[str, Any]:
    """The targets by name, with what ``data/deploy/targets.toml`` says of each, in its order."""
    return _tables()[1]


def targets_table() -> pd.DataFrame:
    """One row a target: ``target``, ``title``, then what is known of it, each a text."""
    table = pd.DataFrame([vars(target) for target in targets().values()]).rename(columns={"name": "target"})
    table["source"] = table["source"].map(" ".join)
    return table[["target", "title", *FACTS]].replace({"run_here": {"": "generated, not run"}})


def table_text() -> str:
    """``data/deploy/README.md``: what is known of every target, as Markdown."""
    return _filled("{% include 'README.md' %}", {"targets": list(targets().values())}, str)


# ---- templates: each value quoted as the file's kind needs ----


@cache
def _environment(quote: Callable[[Any], str]) -> jinja2.Environment:
    """Jinja that puts each value but Markup through ``quote``; a name that has no value is an error."""
    import jinja2

    parts = {name: text for name, text in _tables()[0].items() if isinstance(text, str)}
    files = jinja2.FileSystemLoader(data_dir() / "deploy" / "templates")
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.DictLoader(parts), files]),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else quote(value),
        trim_blocks=True,
        keep_trailing_newline=True,
    )  # autoescape is for HTML: `finalize` quotes for each kind of file
    made.globals |= {"host": HOST, "prompt": PROMPT, "build": BUILD}
    made.filters |= {"json": json.dumps, "bytes": size, "number": "{:,}".format}
    return made


def _filled(text: str, values: Mapping[str, Any], quote: Callable[[Any], str]) -> str:
    return _environment(quote).from_string(text).render(values)


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
        raise DfqsError(f"a Modelfile cannot name {text!r}", hint="rename the folder or the file")
    return text


QUOTES: dict[str, Callable[[Any], str]] = {"Modelfile": _for_modelfile, ".ps1": _for_powershell}
QUOTES["compose.yaml"] = lambda value: _for_json(value).replace("$", "$$")
QUOTES |= dict.fromkeys((".json", ".yaml", ".yml", ".py", ".ipynb"), _for_json)


# ---- recipes ----


@dataclass(frozen=True)
class Recipe:
    """What was written for one target."""

    target: str
    model: str  # its path where it runs
    settings: dict[str, Any]  # ``n_ctx``, ``n_threads``, ``n_gpu_layers`` (whole layers), and why
    files: tuple[Path, ...]  # RECIPE.md last
    commands: tuple[str, ...]  # they fetch and prepare the model, install and run, in the recipe's folder
    checks: tuple[str, ...]  # they ask the running server
    notes: tuple[str, ...]


def write_recipe(
    target: str,
    model: str | Path,
    folder: str | Path,
    *,
    port: int | None = None,
    key_variable: str = "",
    overwrite: bool = False,
    **sizes: int | None,
) -> Recipe:
    """Write the files and commands that run this model with this target. Nothing is downloaded.

    ``model``: a local GGUF file (any of its shards), a name of the registry, or ``hf://owner/repo/file``.
    ``key_variable``: the environment variable that holds the server's key. By default no key is asked for; a
    target's server that always asks gets ``DFQS_API_KEY``. ``sizes``: ``n_ctx``, ``n_gpu_layers``; by default
    what this machine holds, and up to 32,768 tokens. A `DfqsError` says which of target, file, context, path
    and folder does not do.
    """
    if target not in targets():
        hint = f"{did_you_mean(target, [*targets()])}there are {', '.join(targets())}"
        raise DfqsError(f"no target is called {target!r}", hint=hint)
    chosen, source, folder = targets()[target], _source(model), Path(folder).absolute()
    key_variable = key_variable or (DEFAULT_KEY_VARIABLE if chosen.needs_key else "")
    if key_variable and not (key_variable.isidentifier() and key_variable.isascii()):
        raise DfqsError("that is no name of an environment variable", hint="give its name, not the key")
    settings = _settings(chosen, source, **sizes)
    values = settings | _values(chosen, source, settings, folder, key_variable, port or chosen.server)
    again = ["dfqs-nb", "deploy", target, str(model), "-o", str(folder), "--overwrite"]
    values["again"], texts = shlex.join(again), dict[str, str]()
    for name, template in chosen.files.items():
        if name != "chat_template.jinja" or values["template_text"]:
            quote = QUOTES.get(name) or QUOTES.get(PurePosixPath(name).suffix) or str
            text = _filled(f"{{% include {template!r} %}}", values, quote)
            # without the mark Windows PowerShell reads another encoding
            texts[name] = "\ufeff" + text if name.endswith(".ps1") and not text.isascii() else text

    def commands(templates: Sequence[str]) -> tuple[str, ...]:
        return tuple(_filled(text, values, _for_shell) for text in templates)

    common, run = _tables()[0], commands([*chosen.install, *chosen.run])
    values["written"] = "\n".join([*texts.values(), *run])
    fetch = () if any(name.endswith(".ipynb") for name in texts) else values["get"]
    blocks = {"Run": (*fetch, *run), "Check": commands(common["check"]) if chosen.server else ()}
    blocks |= {"Or": commands(chosen.also), "Stop": commands(chosen.stop)}
    notes = (*filter(None, (_filled(text, values, str) for text in common["notes"])), *chosen.manual)
    longest = max(map(len, re.findall("`+", str(blocks))), default=0)  # a path may hold a fence
    page = values | {"notes": notes, "blocks": blocks, "fence": "`" * max(3, 1 + longest)}
    texts["RECIPE.md"] = _filled("{% include 'RECIPE.md' %}", page, str)
    files = _write(folder, texts, overwrite)
    return Recipe(target, values["model"], settings, files, blocks["Run"], blocks["Check"], notes)


def _write(folder: Path, texts: Mapping[str, str], overwrite: bool) -> tuple[Path, ...]:
    """Write the files. What exists stays unless it may be replaced."""
    existing = [name for name in texts if (folder / name).exists()]
    if existing and not overwrite:
        hint = "take another folder, or pass overwrite (--overwrite)"
        raise DfqsError(f"already there: {', '.join(existing)}", where=tilde(folder), hint=hint)
    if re.search("[\ud800-\udfff]", "".join(texts.values())):
        hint = "rename the folder or the file"
        raise DfqsError("the model's path is not UTF-8, and a recipe is", where=tilde(folder), hint=hint)
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, text)
    except OSError as error:
        what, hint = f"cannot write the recipe ({error.strerror})", "take a folder of a disk that takes files"
        raise DfqsError(what, where=tilde(folder), hint=hint) from error
    return tuple(folder / name for name in texts)


# ---- the model, and its settings ----


@dataclass(frozen=True)
class _Source:
    """A model, here (``folder``) or on the hub (``download``: a command without its folder or file)."""

    files: Sequence[str]
    folder: str = ""
    download: Sequence[str] = ()
    nbytes: int = 0
    shards: ShardSet | None = None
    original: str = NOT_GIVEN
    note: str = ""  # of the registry


def _source(model: str | Path) -> _Source:
    """The model. One that is registered is made one sound file by `dfqs-nb merge`, glued or in shards."""
    from dfqs_nb.merge import diagnose

    known, given = registry.registered(), str(model)
    addresses = {f"{entry.source}/{file.name}": entry for entry in known.values() for file in entry.files}
    entry = known.get(given) or addresses.get(given.partition("@")[0])
    if entry and entry.source.startswith("hf://"):
        words, nbytes = ("dfqs-nb", "merge", entry.name, "-o"), entry.size_bytes
        return _Source([f"{entry.name}.gguf"], "", words, nbytes, None, WEIGHTS_FROM, entry.note)
    if given.startswith("hf://"):
        uri = registry.parse_address(given)
        names = registry.siblings(uri.path_in_repo)
        revision = ["--revision", uri.revision] if uri.revision else []
        return _Source(names, "", ("hf", "download", uri.id, *names, *revision, "--local-dir"))
    path = registry.resolve(model)[0]
    diagnosis = diagnose(path)
    if not diagnosis.sound:
        what = f"llama.cpp refuses it: {diagnosis.finding}"
        raise DfqsError(what, where=tilde(path), hint=diagnosis.next_step)
    shards = diagnosis.shards()
    require_model(header := shards.as_one)
    url = str(header.get("general.base_model.0.repo_url", ""))
    original = url.removeprefix("https://huggingface.co/") if "huggingface.co/" in url else NOT_GIVEN
    folder, files = str(shards.paths[0].absolute().parent), [shard.name for shard in shards.paths]
    return _Source(files, folder, nbytes=shards.nbytes, shards=shards, original=original)


def _settings(
    target: Any, source: _Source, n_ctx: int | None = None, n_gpu_layers: int | None = None
) -> dict[str, Any]:
    """What was asked for, else what suits machine and model; and what the notes say of its memory.

    ``flags`` place it for llama.cpp's programs. ``gpu_ratio``: the share of the layers on the GPU.
    """
    shards, layers, least = source.shards, n_gpu_layers or 0, max(target.least_n_ctx, 1)
    most = (shards and shards.as_one.count("context_length")) or 2**31 - 256
    if not least <= (n_ctx or least) <= most:
        what = f"a context of {n_ctx or least:,} tokens is not between {least:,} and {most:,}"
        raise DfqsError(what, hint="leave it out, or take another target")
    if layers < 0:
        raise DfqsError(f"{layers} GPU layers", hint="give 0 or more, or leave --gpu-layers out")
    if not shards:
        guess = {"n_ctx": n_ctx or max(least, UNKNOWN_N_CTX), "n_threads": usable_cores(), "needs": None}
        return guess | {
            "n_gpu_layers": layers,
            "gpu_ratio": float(layers > 0),
            "flags": ("-ngl", str(layers)),
        }
    # Layers on cards come before context, as in llama.cpp's --fit (common/fit.cpp): from 4,096 tokens on, the
    # context grows while no weights leave the cards.
    model, here = memory.Sizes(shards.as_one), available_memory().available_bytes
    cards = gpu_memories() if n_gpu_layers != 0 else []
    buffers, _ = compute_buffers(shards, n_ctx or FIT_N_CTX, [here], cards)
    options: dict[str, Any] = {"whole": target.whole_layers, **buffers}
    largest = partial(memory.largest_context, model, here, cards, **options)
    fits = max(256, largest() or largest(paged=True))
    few, most = (max(least, min(n, fits, model.n_context or n)) for n in (FIT_N_CTX, MOST_N_CTX))

    @cache
    def on_cards(n_ctx: int) -> int:
        placed = memory.place(model, n_ctx, here, cards, **options)
        return sum(card.dense_bytes + card.expert_bytes for card in placed.devices[:-1])

    tried = (most, *reversed(range(few, most, 256)))
    n_ctx = n_ctx or next(n for n in tried if on_cards(n) >= on_cards(few))
    other = most if n_ctx < most else few
    moved = 0 if n_gpu_layers else on_cards(other) - on_cards(n_ctx)
    if n_gpu_layers:  # on a card that holds just these
        sizes = zip(model.dense[:-1], model.experts[:-1], model.caches(n_ctx)[:-1], strict=True)
        cards, options["whole"] = [memory.SPARE_BYTES + sum(map(sum, [*sizes][-n_gpu_layers:]))], True
    buffers, reason = compute_buffers(shards, n_ctx, [here], cards)
    options |= {**buffers, **({"on_card": None} if n_gpu_layers else {})}
    placed = memory.place(model, n_ctx, here, cards, **options)
    layers = n_gpu_layers or placed.n_gpu_layers - len(placed.in_ram)
    own: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": threads_for(model.header), "n_gpu_layers": layers}
    own |= {"gpu_ratio": round(min(1.0, layers / (model.n_layers + 1)), 2), "flags": placed.flags}
    own |= {"needs": memory.estimate(model.header, n_ctx), "placed": placed, "reason": reason}
    limits = memory.context_limits(model, n_ctx, here, cards, **options)
    return own | {"limits": limits, "other": other, "moved": moved}


def _place(target: Any, source: _Source, folder: Path, name: str) -> tuple[str, Sequence[str], list[str]]:
    """The folder in which the target finds the model, its files there, and the commands that bring them."""
    files, commands = source.files, list[list[str]]()
    place = _filled(target.place, {"name": name}, str) or source.folder
    if source.download:
        merged = source.download[0] == "dfqs-nb"  # it wants a folder that is there
        place = target.fetch_to or str(folder if merged else folder / "models")
        if merged and target.fetch_to:  # another machine
            commands = [["python", "-m", "pip", "install", "-q", f"git+{public_address()}"]]
        commands += [[*source.download, _join(place, files[0])] if merged else [*source.download, place]]
    if target.single_file and len(files) > 1:
        joined = folder / f"{name}.gguf"
        commands += [["dfqs-nb", "merge", _join(place, files[0]), "-o", str(joined)]]
        place, files = str(folder), [joined.name]
    return place, files, [shlex.join(words) for words in commands]


def _join(folder: str, name: str) -> str:
    return f"{folder}\\{name}" if "\\" in folder else f"{folder}/{name}"


def _values(
    target: Any, source: _Source, settings: Mapping[str, Any], folder: Path, key_variable: str, port: int
) -> dict[str, Any]:
    """What templates, commands and notes may name, besides the settings."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", PurePosixPath(source.files[0]).stem)
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") or "model"  # every target takes it
    place, files, get = _place(target, source, folder, name)
    mac, arm = platform.system() == "Darwin", platform.machine().lower() in ("arm64", "aarch64")
    paths = [_join(target.mount or place, file) for file in files]
    key_name, flags = key_variable or DEFAULT_KEY_VARIABLE, settings["flags"]
    header = source.shards.as_one if source.shards else None
    values = {"target": target, "source": source, "name": name, "port": port, "get": get, "key": key_variable}
    values |= {"models": paths, "model": paths[0], "model_folder": place, "folder": str(folder)}
    values |= {"placement": Markup(shlex.join(flags)), "base_url": f"http://{HOST}:{port}{target.prefix}/v1"}
    values |= {"key_name": key_name, "key_or_none": Markup(f'"${{{key_name}:-none}}"')}
    return values | {
        "served": _filled(target.served_name, {"name": name}, str),
        "architecture": header.architecture if header else "deepseek4" if source.note else "",
        "cuda": "ON" if flags[:2] != ("-ngl", "0") and not mac else "",  # there it is Metal
        "template_text": header.text("tokenizer.chat_template") if header else "",
        "system": f"{'macos' if mac else 'ubuntu'}-{'arm64' if arm else 'x64'}",
    }


if __name__ == "__main__":
    print(table_text(), end="")
