"""Will llama.cpp accept this file? Ask llama.cpp, in a child process (`__main__`), and keep the answer.

This module imports nothing heavy: an answer that is kept takes milliseconds.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dfqs_nb.core import child
from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.files import canonical_sha256
from dfqs_nb.core.journal import holds, remembered
from dfqs_nb.core.paths import outputs_dir
from dfqs_nb.gguf.memory import KvCacheBytes, MemoryEstimate, check_fits
from dfqs_nb.llama.settings import OpenSettings

MODULE, REFUSES = "dfqs_nb.llama", "llama.cpp refuses it: "
TIMEOUT_SECONDS = 60.0
TRIAL_SECONDS, TRIAL_SECONDS_PER_BYTE = 120.0, 1 / 50e6  # a slow disk
FIELDS: dict[str, dict[str, type]] = {  # of an answer that is kept
    "load": {"accepted": bool, "reason": str, "death": str},
    "plan": {"kv_bytes": int, "compute_bytes": int},
    "trial": {},
}
OF_CONTEXT = {"n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "seed"}  # nothing of the file
# Names of functions, and words that only pass an error on.
_PREFIXES = re.compile(
    r"^(?:(?:\w+|error loading model(?: hyperparameters| vocabulary)?|failed to initialize the context): )+"
)
_PASSED_ON = re.compile(
    r"(?:llama_model_loader: )?failed to (?:load model(?: from .*)?|load GGUF split .*|read tensor data)"
)


def reason_of(log: Sequence[str]) -> str:
    """The line that says why: an assertion, else the first error that does not just pass a failure on.

    >>> reason_of(["gguf_init_from_file_ptr: failed to read magic", "x: error loading model: y"])
    'failed to read magic'
    """
    lines = [_PREFIXES.sub("", child.SOURCE_FOLDER.sub("", line).strip()) for line in log]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "fatal error" in line]
    telling = [line for line in lines if line and not _PASSED_ON.fullmatch(line)]
    return (asserted or telling or lines or [""])[0]


@dataclass(frozen=True)
class Verdict:
    """llama.cpp's verdict on one file, by its parser or by its loader."""

    accepted: bool
    reason: str = ""  # why not, without the names of functions and folders
    death: str = ""  # the signal, or "timeout", that ended the process

    @property
    def sentence(self) -> str:
        """The loader's verdict for people."""
        if self.accepted:
            return "llama.cpp's loader takes this file"
        return f"llama.cpp refuses this file: {self.reason}{f' ({self.death})' if self.death else ''}"


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
    """Ask (``load`` or ``parse``) about files, in one process as long as they leave it alive.

    Raises `ModelError` where llama-cpp-python is not installed, or does not run at all.
    """
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
                reason = reason_of(error.log) or f"llama.cpp died ({death})"
            except ModelError as error:
                reason = error.what.removeprefix(REFUSES)
            reason = reason.replace(f"{path.parent.absolute()}{os.sep}", "")
            answers.append(Verdict(not reason, reason, death))
    return answers


def plan_memory(
    path: str | Path, settings: Sequence[OpenSettings], worker: child.Worker | None = None
) -> list[dict[str, int]]:
    """`dry_run` under each of the settings, in a child process, which a header may abort."""
    job = {"question": "plan", "path": str(path), "settings": [each.as_dict() for each in settings]}
    limit = TIMEOUT_SECONDS * (1 + len(settings))
    answer = (worker or child.Worker(MODULE)).run(job, where=path, timeout_seconds=limit)
    return list(answer["plans"])


def trial(paths: Sequence[Path], settings: OpenSettings, needs: MemoryEstimate) -> MemoryEstimate:
    """Plan, load and decode a model (its shards, first one first) in a child: 9 tokens, in a context of 256.

    Returns the estimate with llama.cpp's own figures. Raises `ModelError` where llama.cpp refuses the file,
    dies on it, or computes logits that are not numbers, and `SpaceError` where cache and compute buffer
    exceed the free memory.
    """
    path, fields = paths[0], settings.as_dict()
    loads = {name: value for name, value in fields.items() if name not in OF_CONTEXT}
    job = {"question": "trial", "path": str(path), "settings": fields}
    limit = TRIAL_SECONDS + needs.weights_bytes * TRIAL_SECONDS_PER_BYTE
    with child.Worker(MODULE) as worker:
        plan = _kept("plan", paths, fields, lambda: plan_memory(path, [settings], worker)[0])
        kv = needs.kv if needs.kv.exactness == "exact" else KvCacheBytes([plan["kv_bytes"]])
        needs = replace(needs, kv=kv, compute_bytes=plan["compute_bytes"])
        check_fits(needs, where=path)
        _kept("trial", paths, loads, lambda: worker.run(job, where=path, timeout_seconds=limit))
    return needs


def _kept(
    question: str, paths: Sequence[Path], facts: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What ``make`` answers, from a note if files, facts, llama.cpp and the machine are the same."""
    folder, fields, made = outputs_dir() / ".llama_cpp", FIELDS[question], list[dict[str, Any]]()

    def once() -> dict[str, Any]:
        made[:] = made or [dict(make())]
        return made[0]

    try:
        folder.mkdir(parents=True, exist_ok=True)
        stats = [(os.path.realpath(path), Path(path).stat()) for path in paths]
        files = [(name, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino) for name, st in stats]
        machine = [platform.node(), os.environ.get("CUDA_VISIBLE_DEVICES")]
        same = {"files": files, "llama.cpp": _build(), "machine": machine, **facts}
        name = canonical_sha256([question, [name for name, _ in stats], facts])[:24]
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
