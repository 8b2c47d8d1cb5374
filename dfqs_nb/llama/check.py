"""Will llama.cpp accept this file? Ask it in a child process (`__main__`), and keep its answer."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.files import canonical_sha256
from dfqs_nb.core.journal import holds, remembered
from dfqs_nb.core.paths import outputs_dir
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import KvCacheBytes, MemoryEstimate, Sizes, check_fits, estimate, largest_context
from dfqs_nb.gguf.models import Outline
from dfqs_nb.gguf.shards import ShardSet
from dfqs_nb.llama.settings import OpenSettings

Plan = dict[str, int]  # of llama.cpp's memory, as `build.planned_bytes` reads it
MODULE, REFUSES = "dfqs_nb.llama", "llama.cpp refuses it: "
TIMEOUT_SECONDS, TRIAL_SECONDS, TRIAL_SECONDS_PER_BYTE = 60.0, 120.0, 1 / 50e6  # a slow disk
FIELDS: dict[str, dict[str, type]] = {  # of an answer that is kept
    "load": {"accepted": bool, "reason": str, "death": str},
    "plan": dict.fromkeys(("kv_bytes", "compute_bytes", "card_compute_bytes", "card_layers"), int),
}
MEMORY_SETTINGS = ("type_k", "type_v", "swa_full", "use_mmap")
OF_CONTEXT = {"n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "seed"}  # nothing of the file
# Names of functions and steps before a reason, and lines that only pass an error on.
_PREFIXES = re.compile(r"^(?:(?:\w+|error loading model[ a-z]*|failed to initialize the context): )+")
_PASSED_ON = re.compile(r"failed to (?:load model(?: from .*)?|load GGUF split .*|read tensor data)")


def reason_of(log: Sequence[str]) -> str:
    """The line that says why: an assertion, else the first error that does not just pass a failure on."""
    lines = [_PREFIXES.sub("", child.SOURCE_FOLDER.sub("", line).strip()) for line in log]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "fatal error" in line]
    telling = [line for line in lines if line and not _PASSED_ON.fullmatch(line)]
    return (asserted or telling or lines or [""])[0]


@dataclass(frozen=True)
class Verdict:
    """llama.cpp's verdict on one file, by its parser or by its loader."""

    accepted: bool
    reason: str = ""  # why not, without the names of functions and folders, and with the death
    death: str = ""  # the signal, or "timeout", that ended the process

    @property
    def sentence(self) -> str:
        """The loader's verdict for people."""
        takes = "llama.cpp's loader takes this file"
        return takes if self.accepted else f"llama.cpp refuses this file: {self.reason}"


def parse(path: str | Path) -> Verdict:
    """Does libggml's parser read the header?"""
    return verdicts([path], "parse")[0]


def loader_verdict(path: str | Path) -> Verdict:
    """Does llama.cpp's loader take headers, tokenizer and tensors, and can a context be planned?"""
    return verdicts([path])[0]


def kept_verdict(files: Iterable[Path], ask: Callable[[], Verdict]) -> Verdict:
    """The verdict that ``ask`` gives on the model in these files, kept while they are the same."""
    return Verdict(**_kept("load", list(files), {}, lambda: vars(ask())))


def verdicts(paths: Sequence[str | Path], question: str = "load") -> list[Verdict]:
    """Ask (``load`` or ``parse``) about files. A `ModelError`: llama-cpp-python does not run at all."""
    answers = list[Verdict]()
    with child.Worker(MODULE) as worker:
        for path in map(Path, paths):
            reason = death = ""
            try:
                job = {"question": question, "path": str(path.absolute())}
                worker.run(job, timeout_seconds=TIMEOUT_SECONDS)
            except child.ChildDied as error:
                if not error.messages:
                    what = f"cannot run llama.cpp ({child.telling_line(list(error.log)) or error.cause})"
                    hint = "delete .venv and type `make run`: it installs llama-cpp-python again"
                    raise ModelError(what, hint=hint) from error
                death = error.cause
                reason = f"{reason_of(error.log) or 'llama.cpp died'} ({death})"
            except ModelError as error:
                reason = error.what.removeprefix(REFUSES)
            reason = reason.replace(f"{path.parent.absolute()}{os.sep}", "")
            answers.append(Verdict(not reason, reason, death))
    return answers


def plan_memory(
    path: str | Path, settings: Sequence[OpenSettings], worker: child.Worker | None = None
) -> list[Plan]:
    """`dry_run` under each of the settings, in a child process, which a header may abort."""
    job = {"question": "plan", "path": str(path), "settings": [each.as_dict() for each in settings]}
    limit = TIMEOUT_SECONDS * (1 + len(settings))
    return list((worker or child.Worker(MODULE)).run(job, where=path, timeout_seconds=limit)["plans"])


def compute_buffers(
    model: ShardSet, n_ctx: int, rams: Sequence[int], cards: Sequence[int]
) -> tuple[dict[str, Any], str]:
    """llama.cpp's compute buffers by context, as `place` takes them: at ``n_ctx``, others, and the largest.

    With cards all layers are planned on one, with flash attention. If llama.cpp finds none here, all lie in
    memory: ``compute`` is then larger than beside a card, and ``on_card`` is empty. The text says why
    llama.cpp plans none.
    """
    shape, copied = Sizes(model.as_one), isinstance(model, Outline) and (model.glued or model.places)
    most = shape.n_context or 1 << 20
    found: dict[str, Any] = {"compute": {}, "on_card": {}}
    contexts = {n_ctx, min(256, most), max(1, most // 8), most}

    def plan(n_ctx: int) -> Plan:
        settings = OpenSettings(n_ctx=n_ctx, flash_attn=bool(cards), n_gpu_layers=-bool(cards))
        ask = partial(plan_memory, model.paths[0], [settings], worker)
        return ask()[0] if copied else _kept("plan", model.paths, settings.as_dict(), lambda: ask()[0])

    try:
        with child.Worker(MODULE) as worker:
            # buffers grow with the context, so the largest that they allow is planned, too, until it stays
            while contexts:  # each round adds one of at most 513 contexts, so it ends; mostly after two
                plans = {n: plan(n) for n in sorted(contexts)}
                found["compute"] |= {n: p["compute_bytes"] for n, p in plans.items()}
                found["on_card"] |= {n: p["card_compute_bytes"] for n, p in plans.items() if p["card_layers"]}
                asked = [(ram, cards, paged) for ram in rams for paged in (False, True)]
                contexts = {largest_context(shape, *each, **found) for each in asked} - {0, *found["compute"]}
    except ModelError as error:
        return {}, error.what
    return found, ""


def needs_of(header: GGUFHeader, settings: OpenSettings, plan: Plan | None = None) -> MemoryEstimate:
    """What a model takes of this memory; with a ``plan`` also for compute buffers, and of cards."""
    options = {name: getattr(settings, name) for name in MEMORY_SETTINGS}
    needs = estimate(header, settings.n_ctx, min(settings.n_batch, settings.n_ubatch), **options)
    if plan is None:
        return needs
    weights, kv, n, on_cards = needs.weights_bytes, needs.kv, max(1, header.n_layers), 0
    if kv.exactness != "exact":
        kv = KvCacheBytes([plan["kv_bytes"] // n] * n)
    if plan["card_layers"]:
        model, here = Sizes(header), n + 1 - plan["card_layers"]  # the output is the last layer
        weights = model.dense[-1] + sum(model.dense[:here]) + sum(model.experts[:here])  # and the embedding
        on_cards = sum(model.dense[here:-1]) + sum(model.experts[here:-1]) + sum(kv.layers[here:])
        on_cards += plan["card_compute_bytes"]
        kv = replace(kv, layers=kv.layers[:here])
    resident = 0 if settings.use_mmap else weights
    return MemoryEstimate(weights, resident, kv, settings.n_ctx, plan["compute_bytes"], on_cards)


def trial(shards: ShardSet, settings: OpenSettings) -> tuple[str, float]:
    """Plan, load and decode a model in a child: 9 tokens, in a context of 256.

    Returns the warning of `check_fits`, and `build_llama`'s ``loading_speed`` (NaN: a kept trial).
    `SpaceError`: memory is short. `ModelError`: llama.cpp refuses the file, dies on it, or computes NaN.
    """
    paths, path, fields = shards.paths, shards.paths[0], settings.as_dict()
    loads = {name: value for name, value in fields.items() if name not in OF_CONTEXT}
    job = {"question": "trial", "path": str(path), "settings": fields}
    limit, told = TRIAL_SECONDS + shards.nbytes * TRIAL_SECONDS_PER_BYTE, dict[str, Any]()
    options: dict[str, Any] = {"where": path, "timeout_seconds": limit, "on_message": told.update}
    with child.Worker(MODULE) as worker:
        plan = _kept("plan", paths, fields, lambda: plan_memory(path, [settings], worker)[0])
        slow = check_fits(needs_of(shards.as_one, settings, plan), where=path)
        _kept("trial", paths, loads, lambda: worker.run(job, **options))
    return slow, told.get("loading_speed", math.nan)


def _kept(kind: str, paths: Sequence[Path], facts: dict[str, Any], make: Callable[[], Any]) -> dict[str, Any]:
    """What ``make`` answers, from a note if files, facts, llama.cpp and the machine are the same."""
    fields = FIELDS.get(kind, {})
    once = cache(lambda: dict(make()))  # three paths below end in asking; only one asks
    try:
        (folder := outputs_dir() / ".llama_cpp").mkdir(parents=True, exist_ok=True)
        stats = [(os.path.realpath(path), Path(path).stat()) for path in paths]
        files = [(name, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino) for name, st in stats]
        machine = [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")]
        same = {"files": files, "fields": list(fields), "llama.cpp": _build(), "machine": machine, **facts}
        name = canonical_sha256([kind, [name for name, _ in stats], facts])[:24]
        answer = remembered(note := folder / f"{name}.json", same, once)
        if answer.get("accepted") is False:  # perhaps the machine was busy, or had no memory
            note.unlink(missing_ok=True)
        return {name: answer[name] for name in fields} if holds(answer, fields) else once()
    except OSError:  # the folder takes no note
        return once()


def _build() -> list[Any]:
    """What tells a build of llama.cpp from another, without loading it: its libraries' sizes and times."""
    spec = find_spec("llama_cpp")
    own = Path(spec.origin).parent / "lib" if spec and spec.origin else ""
    libraries = sorted(Path(os.environ.get("LLAMA_CPP_LIB_PATH") or own).glob("*llama*"))
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in libraries]
