"""The verdict of llama.cpp's model loader on a file, asked in a child process.

Where `ggml` asks the parser of the header, this asks what a user meets: ``llama_model_load_from_file``. With
``vocab_only`` it reads headers and tokenizer, in milliseconds; a whole trial loads the weights and decodes
two tokens. A file that aborts llama.cpp ends the child, not the process that asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfqs_nb.core.errors import ModelError

ADDRESS_SPACE_BYTES = 8 << 30  # a hostile header asks for more, and gets no
TIMEOUT_SECONDS = 60.0
TRIAL_TIMEOUT_SECONDS = 600.0
TRIAL_CTX = 256
STAGES = ("headers and tokenizer", "load", "context", "decode")
_ERROR, _CONTINUES = 4, 5  # ggml_log_level of ggml.h
_SOURCE_FOLDER = re.compile(
    r"\S*/(?=[\w.-]+\.(?:cpp|c|h):\d+)"
)  # an assertion names the source as it was compiled
_WRAPPERS = re.compile(
    r"^(?:(?:error loading model(?: hyperparameters| vocabulary)?|"
    r"failed to initialize the context): )+"
)
_PASSED_ON = re.compile(
    r"(?:llama_model_loader: )?failed to (?:load model(?: from .*)?|load GGUF split .*|"
    r"read tensor data)"
)


@dataclass(frozen=True)
class Verdict:
    """What llama.cpp's loader says of one file.

    Attributes:
        accepted: it got through every stage that was tried.
        reason: the line that says why not, without the names of functions and folders; empty when accepted.
        log: all lines that llama.cpp logged as errors, and what an assertion wrote.
        death: the signal (or ``"timeout"``) when the process did not survive the file.
        stage: where it stopped, one of ``STAGES``; empty when accepted.
    """

    path: Path
    accepted: bool
    reason: str = ""
    log: tuple[str, ...] = ()
    death: str = ""
    stage: str = ""


def llama_cpp_verdict(path: str | Path) -> Verdict:
    """Ask llama.cpp's loader about one file, ``vocab_only``: headers and tokenizer, no tensor data.

    Raises:
        ModelError: llama-cpp-python is not installed, or the child process cannot run it at all.
    """
    return llama_cpp_verdicts([path])[0]


def llama_cpp_verdicts(paths: Sequence[str | Path], *, trial: bool = False) -> list[Verdict]:
    """Ask about many files in as few processes as they leave alive (see `llama_cpp_verdict`).

    Args:
        trial: load the weights too, make a context of 256 tokens, and decode two of them.
    """
    verdicts: list[Verdict] = []
    while len(verdicts) < len(paths):
        verdicts += _ask([Path(path) for path in paths[len(verdicts) :]], trial)
    return verdicts


def _ask(paths: Sequence[Path], trial: bool) -> Iterator[Verdict]:
    """The answers of one child: one for each file up to, and with, the one that killed it."""
    job = {"paths": [os.path.abspath(path) for path in paths], "trial": trial}
    timeout = TRIAL_TIMEOUT_SECONDS if trial else TIMEOUT_SECONDS
    answers, stderr, death = _run(json.dumps(job).encode(), timeout)
    done, stage, asked = 0, STAGES[0], False
    for answer in answers:
        if "verdict" not in answer:
            stage, asked = answer.get("stage", STAGES[0]), True
            continue
        log = tuple(_without_folders(line, paths[done]) for line in answer["log"])
        yield Verdict(
            paths[done],
            answer["verdict"],
            "" if answer["verdict"] else _reason(log),
            log,
            "",
            "" if answer["verdict"] else stage,
        )
        done, asked = done + 1, False
    if done == len(paths):
        return
    if not asked:
        raise ModelError(
            f"cannot run llama.cpp ({(stderr[-1:] or [death])[0]})",
            hint="install llama-cpp-python again: make run does it",
        )
    log = tuple(_without_folders(line, paths[done]) for line in stderr)
    yield Verdict(
        paths[done], False, _reason(log) or f"llama.cpp died ({death})", log, death or "exit", stage
    )


def _run(job: bytes, timeout: float) -> tuple[list[dict[str, Any]], list[str], str]:
    """Run the child; return its answers, what it wrote to stderr after the last, and how it ended."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "GGML_NO_BACKTRACE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            status = subprocess.run(
                [sys.executable, "-P", "-m", "dfqs_nb.llama.loader"],
                input=job,
                stdout=out,
                stderr=err,
                env=environment,
                timeout=timeout,
                check=False,
            ).returncode
            death = signal.Signals(-status).name if status < 0 else f"exit status {status}" if status else ""
        except subprocess.TimeoutExpired:
            death = "timeout"
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
    answers = [json.loads(line) for line in texts[0].split("\n") if line.startswith("{")]
    return answers, [line for line in texts[1].split("\0")[-1].split("\n") if line.strip()], death


def _without_folders(line: str, path: Path) -> str:
    """A log line without the folder of the model and of llama.cpp's sources."""
    return _SOURCE_FOLDER.sub("", line.replace(os.path.abspath(path.parent) + os.sep, "")).strip()


def _reason(log: Sequence[str]) -> str:
    """The line that says why: an assertion, else the first that does not just pass a failure on.

    >>> _reason(["gguf_init_from_file_ptr: failed to read magic", "llama_model_load: error loading model: x"])
    'failed to read magic'
    """
    plain = [_WRAPPERS.sub("", re.sub(r"^\w+: ", "", line)) for line in log]
    asserted = [line for line in plain if "GGML_ASSERT" in line or "fatal error" in line]
    telling = [line for line in plain if not _PASSED_ON.fullmatch(line)]
    return (asserted or telling or plain or [""])[0]


# ---- the child process ----


def main() -> int:
    """Read a job from standard input; write a JSON line a stage and a verdict a file, errors to stderr."""
    job = json.loads(sys.stdin.read())
    if not job["trial"]:
        _limit_memory()
    lines = _take_log()
    for path in job["paths"]:
        lines.clear()
        try:
            accepted = all(done for done in _stages(path, job["trial"]))
        except MemoryError:
            accepted = False
        _say(verdict=accepted, log=[line for line in "".join(lines).split("\n") if line.strip()])
        os.write(2, b"\0")
    return 0


def _stages(path: str, trial: bool) -> Iterator[bool]:
    """Open the file stage by stage; true for each that was passed."""
    import llama_cpp.llama_cpp as api

    with contextlib.ExitStack() as stack:
        _say(stage=STAGES[1 if trial else 0])
        model = api.llama_model_load_from_file(os.fsencode(path), _model_params(api, trial))
        if model:
            stack.callback(api.llama_model_free, model)
        yield bool(model)
        if not trial:
            return
        _say(stage=STAGES[2])
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = TRIAL_CTX
        params.n_threads = params.n_threads_batch = 1
        params.swa_full = False
        context = api.llama_init_from_model(model, params)
        if context:
            stack.callback(api.llama_free, context)
        yield bool(context)
        _say(stage=STAGES[3])
        tokens = (api.llama_token * 2)(1, 2)
        yield api.llama_decode(context, api.llama_batch_get_one(tokens, 2)) == 0


def _model_params(api: Any, trial: bool) -> Any:
    params = api.llama_model_default_params()
    params.vocab_only, params.use_extra_bufts, params.n_gpu_layers = not trial, False, 0
    return params


def _limit_memory() -> None:
    try:
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass  # a system without such limits (macOS, Windows)


def _take_log() -> list[str]:
    """Collect the pieces of text that llama.cpp logs as errors, and write them to stderr too."""
    import llama_cpp.llama_cpp as api

    pieces: list[str] = []
    level = 0

    def receive(found: int, text: bytes, _data: object) -> None:
        nonlocal level
        level = level if found == _CONTINUES else found
        if level == _ERROR:
            pieces.append(text.decode("utf-8", "replace"))
            os.write(2, text)

    callback = api.llama_log_callback(receive)
    api.llama_log_set(callback, None)
    _ALIVE.append(callback)
    return pieces


_ALIVE: list[Any] = []  # what C code calls back must not be collected


def _say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
