"""What a user should know of a server before trusting its answers, checked by asking it.

And the same questions in this process and through the server, item by item: each difference is followed to
the token where the two part, and how sure the model was there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.context.haystacks import MARK
from dfqs_nb.core.stage import write_stage
from dfqs_nb.llama.generate import GREEDY, Completion, chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import run as scores
from dfqs_nb.scores.item_sets import Item, ItemSet
from dfqs_nb.serve import client as endpoints
from dfqs_nb.serve.client import (
    BrokenAnswerError,
    BusyError,
    ContextOverflowError,
    Endpoint,
    EndpointError,
    UnreachableError,
)
from dfqs_nb.serve.servers import LocalServer, is_healthy, port_is_free, serve

if TYPE_CHECKING:
    import pandas as pd

PASS, FAIL, NOTE, UNSEEN = "pass", "fail", "note", "not measured"
PROMPTS = (
    "Tom is tall. Ann is small. Who is tall?",
    "The red key is in the box. The blue key is on the table. Where is the red key?",
    "Write a short story about a dog and a river.",
    "def add(a, b):",
)
MAX_TOKENS = 32
REPETITIONS = 4
CACHE_PROMPT = "The dog slept near the fire. Rain fell softly on the roof. " * 16
NEAR_TIE = 0.1  # of a logit: well above what other batches and kernels move (see check_concurrent)


@dataclass(frozen=True)
class Check:
    """One check: what was looked at, ``pass``, ``fail``, ``note`` or ``not measured``, and what was seen."""

    check: str
    verdict: str
    finding: str


def check_server(
    endpoint: Endpoint,
    model: Model | None = None,
    server: LocalServer | None = None,
    prompts: Sequence[str] = PROMPTS,
    n_concurrent: int = 4,
) -> pd.DataFrame:
    """All checks that can be made from outside: columns ``check``, ``verdict`` and ``finding``.

    Args:
        model: the same file, open in this process, to compare the chat template with.
        server: when it is one of ours: its health is asked.
        n_concurrent: requests at once for the check of determinism.
    """
    import pandas as pd

    checks: dict[str, Callable[[], Check]] = {
        "health": lambda: check_health(endpoint, server),
        "model name": lambda: check_name(endpoint),
        "context length": lambda: check_context(endpoint),
        "chat template": lambda: check_template(endpoint, model),
        "same again": lambda: check_repeated(endpoint, prompts),
        "same beside others": lambda: check_concurrent(endpoint, prompts, n_concurrent),
        "prompt cache": lambda: check_cache(endpoint),
    }
    return pd.DataFrame([dataclasses.asdict(_made(name, check)) for name, check in checks.items()])


def _made(name: str, check: Callable[[], Check]) -> Check:
    """A check's result; what stops it is a finding too."""
    try:
        return check()
    except EndpointError as error:
        return Check(name, FAIL, f"it stopped: {type(error).__name__}: {error.what}")


def check_health(endpoint: Endpoint, server: LocalServer | None = None) -> Check:
    """The server answers, to its health check and to a request of one token."""
    healthy = server is None or is_healthy(server)
    started = time.perf_counter()
    endpoint.complete("The", 1)
    seconds = time.perf_counter() - started
    came_up = f"came up in {server.start_seconds:.1f} s; " if server else ""
    return Check(
        "health",
        PASS if healthy else FAIL,
        f"{came_up}{'healthy' if healthy else 'not healthy'}; one token in {seconds:.2f} s",
    )


def check_name(endpoint: Endpoint) -> Check:
    """What a wrong model name gets: a refusal is right, another model's answer is a trap; a server that is
    busy or gone says neither.
    """
    wrong = dataclasses.replace(endpoint, model=f"{endpoint.model}-that-is-not-there", retries=0)
    listed = ", ".join(endpoint.facts.models)
    try:
        wrong.complete("The", 1)
    except (BusyError, UnreachableError, BrokenAnswerError):
        raise
    except EndpointError as error:
        return Check("model name", PASS, f"lists {listed}; refuses another name ({type(error).__name__})")
    return Check(
        "model name",
        NOTE,
        f"lists {listed}; answers to any name, so a wrong one goes unnoticed "
        "unless the list is read first (connect does)",
    )


def check_context(endpoint: Endpoint) -> Check:
    """How many tokens it really takes: what it says, and what it refuses."""
    said = endpoint.facts.n_ctx
    count, counted_by = endpoints.token_counter(endpoint)
    if said is None or said > 65536:
        return Check("context length", UNSEEN, f"says {said}; not tried out")
    unit = "The dog slept near the fire. "
    each = count(unit * 16) / 16
    fits, exceeds = unit * int((said - 24) / each - 1), unit * int(said / each + 2)
    endpoint.complete(fits, 4)
    try:
        endpoint.complete(exceeds, 4)
    except ContextOverflowError:
        return Check(
            "context length",
            PASS,
            f"says {said:,}; takes {count(fits):,} and refuses {count(exceeds):,} ({counted_by})",
        )
    return Check(
        "context length",
        FAIL,
        f"says {said:,}, but {count(exceeds):,} {counted_by} got an answer: part of such a prompt is dropped",
    )


def check_template(endpoint: Endpoint, model: Model | None) -> Check:
    """Whether its chat template gives the tokens that ours gives."""
    if model is None or not model.header.get("tokenizer.chat_template"):
        return Check("chat template", UNSEEN, "needs the model in this process, with a chat template")
    ours = chat_text(model, PROMPTS[0])
    n_ours = len(model.with_bos(model.tokenize(ours)))
    n_theirs = dataclasses.replace(endpoint, stream=False).chat(PROMPTS[0], 1).n_prompt
    shown = endpoint.post("/apply-template", messages=[{"role": "user", "content": PROMPTS[0]}])
    same_text = "its text is not shown"
    if isinstance(shown, dict) and "prompt" in shown:
        same = ours.endswith(shown["prompt"]) and len(ours) - len(shown["prompt"]) <= len(_bos(model))
        same_text = "the same text" if same else "another text"
    verdict = PASS if n_ours == n_theirs and same_text != "another text" else FAIL
    return Check("chat template", verdict, f"{n_theirs} tokens, in process {n_ours}; {same_text}")


def _bos(model: Model) -> str:
    llama = model._open()
    return llama._model.token_get_text(llama.token_bos()) if llama.token_bos() >= 0 else ""


def check_repeated(endpoint: Endpoint, prompts: Sequence[str], repetitions: int = REPETITIONS) -> Check:
    """Greedy answers to the same requests, one after another."""
    said = [[endpoint.chat(prompt, MAX_TOKENS).text for _ in range(repetitions)] for prompt in prompts]
    n_same = sum(len(set(texts)) == 1 for texts in said)
    return Check(
        "same again",
        PASS if n_same == len(prompts) else FAIL,
        f"{n_same} of {len(prompts)} prompts: the same text {repetitions} times in turn",
    )


def check_concurrent(endpoint: Endpoint, prompts: Sequence[str], n_concurrent: int) -> Check:
    """Greedy answers to the same requests beside others: slots share batches, and batches change numbers."""
    alone = [endpoint.chat(prompt, MAX_TOKENS).text for prompt in prompts]
    asked = [number % len(prompts) for number in range(n_concurrent * len(prompts))]
    with ThreadPoolExecutor(n_concurrent) as pool:
        beside = list(pool.map(lambda i: endpoint.chat(prompts[i], MAX_TOKENS).text, asked))
    n_other = sum(text != alone[i] for i, text in zip(asked, beside, strict=True))
    drift = max_drift(endpoint, prompts, n_concurrent)
    seen = "" if drift is None else f"; log-probabilities moved by up to {drift:.1e}"
    return Check(
        "same beside others",
        PASS if n_other == 0 else NOTE,
        f"{n_other} of {len(asked)} answers differ with {n_concurrent} requests at once{seen}",
    )


def max_drift(endpoint: Endpoint, prompts: Sequence[str], n_concurrent: int) -> float | None:
    """The largest change of a greedy token's log-probability between asking alone and beside others, up to
    where the tokens part; None where the server shows none, or stopped showing them.
    """
    alone = [_logprobs(endpoint, prompt) for prompt in prompts]
    if not all(alone):
        return None
    asked = [number % len(prompts) for number in range(n_concurrent * len(prompts))]
    with ThreadPoolExecutor(n_concurrent) as pool:
        beside = list(pool.map(lambda i: _logprobs(endpoint, prompts[i]), asked))
    if not all(beside):
        return None
    return max(_drift(alone[i], found) for i, found in zip(asked, beside, strict=True))


def _logprobs(endpoint: Endpoint, prompt: str) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities, from llama.cpp's own path, which does not round them."""
    if endpoint.facts.name != "llama.cpp":
        return []
    said = endpoint.post(
        "/completion",
        prompt=prompt,
        n_predict=MAX_TOKENS,
        temperature=0,
        n_probs=1,
        ignore_eos=True,
        cache_prompt=False,
    )
    shown = said.get("completion_probabilities") if isinstance(said, dict) else None
    return [(int(one["id"]), float(one["logprob"])) for one in shown or ()]


def _drift(alone: Sequence[tuple[int, float]], beside: Sequence[tuple[int, float]]) -> float:
    """The largest difference of log-probabilities while the tokens are the same.

    >>> _drift([(1, -0.5), (2, -0.1), (3, -0.2)], [(1, -0.25), (2, -0.1), (4, -9.0)])
    0.25
    """
    same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(alone, beside, strict=False))
    return max((abs(one[1] - other[1]) for one, other in same), default=float("inf"))


def check_cache(endpoint: Endpoint, repetitions: int = REPETITIONS) -> Check:
    """What reusing the last prompt's cache saves, and whether the text stays the same."""
    ways = {"off": {"cache_prompt": False}, "on": {"cache_prompt": True}}
    if endpoint.facts.name != "llama.cpp":
        seconds, texts = _timed(endpoint, {}, repetitions)
        return Check(
            "prompt cache",
            NOTE if len(set(texts)) == 1 else FAIL,
            f"cannot be switched here; the same prompt took {seconds[0]:.3f} s, then "
            f"{median(seconds[1:]):.3f} s, with {_same(texts)}",
        )
    found = {name: _timed(endpoint, options, repetitions) for name, options in ways.items()}
    seconds = {name: median(times[1:]) for name, (times, _) in found.items()}
    texts = [text for _, said in found.values() for text in said]
    return Check(
        "prompt cache",
        PASS if len(set(texts)) == 1 else NOTE,
        f"the same prompt again: {seconds['off']:.3f} s without, {seconds['on']:.3f} s with it "
        f"({seconds['off'] / seconds['on']:.1f} times as fast), with {_same(texts)}",
    )


def _timed(endpoint: Endpoint, options: dict[str, Any], repetitions: int) -> tuple[list[float], list[str]]:
    seconds, texts = [], []
    for _ in range(repetitions):
        started = time.perf_counter()
        texts.append(endpoint.complete(CACHE_PROMPT, 8, **options).text)
        seconds.append(time.perf_counter() - started)
    return seconds, texts


def _same(texts: Sequence[str]) -> str:
    return "the same text" if len(set(texts)) == 1 else f"{len(set(texts))} different texts"


def check_shutdown(server: LocalServer) -> Check:
    """Stop the server, and look whether anything of it is left."""
    host, port = server.address
    seconds = server.stop()
    status, free = server.process.returncode, port_is_free(host, port)
    clean = status in (0, -15) and free
    return Check(
        "shutdown",
        PASS if clean else FAIL,
        f"ended in {seconds:.1f} s (status {status}); its port is {'free' if free else 'taken'}",
    )


# ---- in process and through the server ----


@dataclass(frozen=True)
class Comparison:
    """The same items in process and through a server.

    Attributes:
        items: one row an item, see ``compare_with_process``.
        process, server: the runs, with their scores.
    """

    items: pd.DataFrame = field(repr=False)
    process: scores.SetRun
    server: scores.SetRun

    @property
    def differences(self) -> pd.DataFrame:
        """The items whose text differs."""
        return self.items[~self.items["same_text"]]

    @property
    def sentence(self) -> str:
        """How many differ in process and through the server, and why."""
        n, other = len(self.items), self.differences
        if other.empty:
            return f"{self.process.item_set.name}: all {n} answers are the same both ways"
        causes = ", ".join(f"{count} {cause}" for cause, count in other["cause"].value_counts().items())
        return (
            f"{self.process.item_set.name}: {len(other)} of {n} answers differ ({causes}), "
            f"{int((other['correct_process'] != other['correct_server']).sum())} of them in correctness"
        )


def compare_with_process(
    model: Model,
    endpoint: Endpoint,
    item_set: ItemSet,
    folder: str | Path,
    *,
    model_id: str = "",
    server_id: str = "",
    limit: int | None = None,
    allow_unsandboxed: bool = False,
    fresh: bool = False,
    progress: bool = True,
) -> Comparison:
    """Score a set in process and through a server, and explain each difference.

    Args:
        model_id: the SHA-256 of the model in this process, under which its answers are kept.
        server_id: that of the server's model, where it is known; else ``Endpoint.identity``.

    ``items`` has ``id``, ``family``, ``text_process``, ``text_server``, ``same_text``, ``correct_process``,
    ``correct_server``; and where the texts differ: ``prompt_process`` and ``prompt_server`` (tokens; 0: not
    said), ``token`` (the first of ours that theirs does not have), ``margin`` (of the logits in process, our
    token before the server's), ``rank`` (of the server's token in process, 1 is ours) and ``cause``:
    ``near-tie`` (the server took the runner-up within ``NEAR_TIE``), ``other prompt``, ``where it ends`` (the
    same text up to the end of one), ``token boundary`` (the same characters up to a cut token) or ``other
    numbers``.
    """
    options = {"limit": limit, "allow_unsandboxed": allow_unsandboxed, "fresh": fresh, "progress": progress}
    folder = Path(folder)
    here = scores.score_set(model, item_set, folder / "process", model_id=model_id, **options)
    there = endpoints.score_set(
        endpoint, item_set, folder / folder_name(endpoint), model_id=server_id, **options
    )
    rows = list(_rows(model, endpoint, item_set, here, there))
    import pandas as pd

    return Comparison(pd.DataFrame(rows), here, there)


def folder_name(endpoint: Endpoint) -> str:
    """A folder for a server's answers. Its name may come from its list of models, so it may be anything."""
    return re.sub(r"[^\w.-]+", "-", endpoint.facts.name).strip(".-")[:80] or "unknown"


def _rows(
    model: Model, endpoint: Endpoint, item_set: ItemSet, here: scores.SetRun, there: scores.SetRun
) -> Iterator[dict[str, Any]]:
    items, opening = {item.id: item for item in item_set.items}, _opening(model, item_set)
    for ours, theirs in zip(here.items.itertuples(), there.items.itertuples(), strict=True):
        served = theirs.completion.removeprefix(opening)
        row = {
            "id": ours.id,
            "family": ours.family,
            "text_process": ours.completion,
            "text_server": served,
            "same_text": ours.completion == served,
            "correct_process": ours.correct,
            "correct_server": theirs.correct,
        }
        yield row if row["same_text"] else row | explain(model, endpoint, item_set, items[ours.id], served)


def _opening(model: Model, item_set: ItemSet) -> str:
    """The beginning of a thinking that the template itself writes: llama.cpp's server says it once more."""
    if item_set.mode != "chat" or not model.header.get("tokenizer.chat_template"):
        return ""
    _, opened, rest = chat_text(model, MARK).rpartition(MARK)[2].partition("<think>")
    return opened + rest


def explain(model: Model, endpoint: Endpoint, item_set: ItemSet, item: Item, served: str) -> dict[str, Any]:
    """Why the server's text is not the one of this process; fields as ``compare_with_process`` says."""
    prompt = scores.prompt_tokens(model, item_set, item)
    said = scores.answerer(model, item_set)(item, GREEDY)
    n_server = _prompt_tokens(endpoint, item_set, item)
    found = {"prompt_process": len(prompt), "prompt_server": n_server}
    at, before = _parting(model, said, served)
    logits = _logits_at(model, [*prompt, *said.token_ids[:at]])
    ours = said.token_ids[at] if at < len(said.token_ids) else int(np.argmax(logits))
    theirs = _next_token(model, logits, served.encode()[len(before) :])
    rank = int((logits > logits[theirs]).sum()) + 1 if theirs is not None else 0
    margin = float(logits[ours] - logits[theirs]) if theirs is not None else float("nan")
    found |= {"token": at, "margin": margin, "rank": rank}
    return found | {"cause": _cause(found, said.text, served)}


def _prompt_tokens(endpoint: Endpoint, item_set: ItemSet, item: Item) -> int:
    """Tokens of the prompt as the server counts them."""
    whole = dataclasses.replace(endpoint, stream=False)
    if item_set.mode == "chat":
        return whole.chat(item.asked(item_set.instruction), 1).n_prompt
    return whole.complete(item.prompt, 1).n_prompt


def _parting(model: Model, said: Completion, served: str) -> tuple[int, bytes]:
    """The index of the first token of ours that the server's text does not continue, and the bytes before."""
    raw, before = served.encode(), b""
    for at, token in enumerate(said.token_ids):
        piece = model.token_bytes(token)
        if raw[len(before) : len(before) + len(piece)] != piece:
            return at, before
        before += piece
    return len(said.token_ids), before


def _logits_at(model: Model, tokens: Sequence[int]) -> np.ndarray:
    model.clear()
    return model.evaluate(tokens)


def _next_token(model: Model, logits: np.ndarray, rest: bytes) -> int | None:
    """The likeliest token that the server's text goes on with; where it ends, the likeliest that ends one."""
    for token in np.argsort(-logits, kind="stable").tolist():
        piece = model.token_bytes(token)
        if model.ends(token) if not rest else (piece and rest.startswith(piece)):
            return token
    return None


def _cause(found: dict[str, Any], ours: str, theirs: str) -> str:
    if found["prompt_server"] not in (0, found["prompt_process"]):
        return "other prompt"
    if found["rank"] > 1 and found["margin"] <= NEAR_TIE:
        return "near-tie"
    if ours.startswith(theirs) or theirs.startswith(ours):
        return "where it ends"
    return "token boundary" if found["rank"] == 1 else "other numbers"


def answers_sha256(run: scores.SetRun) -> str:
    """SHA-256 over ids and texts of a run's answers, for a glance at whether two are the same."""
    text = "\n".join(f"{row.id}\t{row.completion}" for row in run.items.itertuples())
    return hashlib.sha256(text.encode()).hexdigest()


# ---- several servers, for a notebook ----


def check_all(
    connected: Mapping[str, Endpoint],
    model: Model | None = None,
    running: Mapping[str, LocalServer] | None = None,
) -> pd.DataFrame:
    """``check_server`` of each: a row a check, and for each server its verdict and finding in two columns."""
    import pandas as pd

    running = running or {}
    tables = [
        check_server(one, model, running.get(name)).assign(server=name) for name, one in connected.items()
    ]
    return pd.concat(tables, ignore_index=True)[["check", "server", "verdict", "finding"]]


def drift_by_slots(
    path: str | Path,
    settings: OpenSettings,
    slots: Sequence[int] = (1, 2, 4),
    n_concurrent: int = 4,
    repetitions: int = 3,
) -> pd.DataFrame:
    """llama.cpp's server with more and more slots under the same requests at once, its prompt cache off.

    Columns ``slots``, ``requests`` (at once), ``drift`` (the largest change of a log-probability against
    asking alone, of several tries, because requests need not meet), ``answers`` and ``differ`` (texts).
    """
    import pandas as pd

    rows = []
    for n in slots:
        with serve("llama.cpp", path, settings, n_parallel=n) as server:
            found = server.connect()
            alone = [found.chat(prompt, MAX_TOKENS).text for prompt in PROMPTS]
            with ThreadPoolExecutor(n_concurrent) as pool:
                asked = list(range(len(PROMPTS))) * n_concurrent
                texts = list(pool.map(lambda i, one=found: one.chat(PROMPTS[i], MAX_TOKENS).text, asked))
            drifts = [max_drift(found, PROMPTS, n_concurrent) for _ in range(repetitions)]
        differ = sum(text != alone[i] for i, text in zip(asked, texts, strict=True))
        drift = max((d for d in drifts if d is not None), default=float("nan"))
        rows.append(
            {"slots": n, "requests": n_concurrent, "drift": drift, "answers": len(texts), "differ": differ}
        )
    return pd.DataFrame(rows)


def speed_of_all(
    connected: Mapping[str, Endpoint],
    clients: Sequence[int] = endpoints.CLIENTS,
    n_tokens: int = 48,
    repetitions: int = 2,
) -> pd.DataFrame:
    """``endpoint.speed_by_clients`` of each, in one frame with a column ``server`` in front."""
    import pandas as pd

    tables = [endpoints.speed_by_clients(one, clients, n_tokens, repetitions) for one in connected.values()]
    for name, table in zip(connected, tables, strict=True):
        table.insert(0, "server", name)
    return pd.concat(tables, ignore_index=True)


def compare_all(
    model: Model,
    connected: Mapping[str, Endpoint],
    item_sets: Sequence[ItemSet],
    folder: str | Path,
    *,
    model_id: str = "",
    local: Collection[str] = (),
    **options: Any,
) -> dict[tuple[str, str], Comparison]:
    """``compare_with_process`` by server and set; what this process answered is asked for once.

    Args:
        local: names of the servers that were started with this process's file: ``model_id`` is theirs too.
            What another server has loaded, only that server knows.
    """
    ids = {name: model_id if name in local else "" for name in connected}
    return {
        (name, one.name): compare_with_process(
            model, connected[name], one, folder, model_id=model_id, server_id=ids[name], **options
        )
        for name in connected
        for one in item_sets
    }


def comparison_table(found: Mapping[tuple[str, str], Comparison]) -> pd.DataFrame:
    """One row a server and set: ``server``, ``set``, ``items``, ``same_text``, ``right_process``,
    ``right_server`` (counts) and ``causes`` of the differences.
    """
    import pandas as pd

    rows = []
    for (name, set_name), one in found.items():
        causes = one.differences["cause"].value_counts() if len(one.differences) else {}
        rows.append(
            {
                "server": name,
                "set": set_name,
                "items": len(one.items),
                "same_text": int(one.items["same_text"].sum()),
                "right_process": int(one.items["correct_process"].sum()),
                "right_server": int(one.items["correct_server"].sum()),
                "causes": ", ".join(f"{n} {cause}" for cause, n in causes.items()) or "none",
            }
        )
    return pd.DataFrame(rows)


def item_table(found: Mapping[tuple[str, str], Comparison]) -> pd.DataFrame:
    """The items of all comparisons, with columns ``server`` and ``set`` in front."""
    import pandas as pd

    return pd.concat(
        [
            one.items.assign(server=name, set=set_name).pipe(
                lambda table: table[["server", "set", *[c for c in table if c not in ("server", "set")]]]
            )
            for (name, set_name), one in found.items()
        ],
        ignore_index=True,
    )


def bad_input(endpoint: Endpoint) -> pd.DataFrame:
    """What a user's mistakes say: columns ``mistake``, ``error``, ``tries`` and ``message``.

    Raises:
        AssertionError: a mistake got an answer.
    """
    import pandas as pd

    quick = dataclasses.replace(endpoint, retries=1)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        too_long = "The dog slept near the fire. " * ((endpoint.facts.n_ctx or 4096) // 4)
        mistakes = {
            "a port where nothing listens": lambda: endpoints.connect(nobody, retries=1),
            "a path of something else": lambda: endpoints.connect(endpoint.base_url + "/v2/blog", retries=1),
            "a model that is not there": lambda: endpoints.connect(
                endpoint.base_url, "gpt-oss-120b", key=endpoint.key.reveal()
            ),
            "a prompt beyond the context": lambda: quick.complete(too_long, 4),
            "routing through an endpoint": lambda: endpoints.check_in_process(endpoint, "routing"),
        }
        return pd.DataFrame([_mistake(name, make) for name, make in mistakes.items()])


def ask_the_dead(endpoint: Endpoint) -> dict[str, Any]:
    """What a server that has gone says, as a row of ``bad_input``."""
    quick = dataclasses.replace(endpoint, retries=1)
    return _mistake("a server that has ended", lambda: quick.complete("The", 1))


def _mistake(name: str, make: Callable[[], Any]) -> dict[str, Any]:
    try:
        made = make()
    except EndpointError as error:
        tries = re.findall(r"asked (\d+) times", " ".join(getattr(error, "__notes__", [])))
        message = f"{error.what}; {error.hint}"
        return {
            "mistake": name,
            "error": type(error).__name__,
            "tries": int(tries[0]) if tries else 1,
            "message": message,
        }
    raise AssertionError(f"{name} got an answer: {made!r}")


def hand_on(
    folder: str | Path,
    *,
    checks: pd.DataFrame,
    drift: pd.DataFrame,
    speeds: pd.DataFrame,
    compared: Mapping[tuple[str, str], Comparison],
    connected: Mapping[str, Endpoint],
    model: dict[str, Any],
    recipes: Sequence[str],
    shutdown: pd.DataFrame,
) -> list[str]:
    """Write ``serving.json`` (see ``paths.write_stage``), and return its summary lines."""
    table = comparison_table(compared)
    lines = [
        *(f"{name}: {_counted(rows['verdict'])}" for name, rows in checks.groupby("server", sort=False)),
        *(
            f"{row.server}: {row.same_text} of {row.items} answers of {row.set} are those of this process"
            + (f" ({row.causes})" if row.causes != "none" else "")
            for row in table.itertuples()
        ),
        *_drift_lines(drift),
        *(
            f"{name}: {rows['tokens_per_sec'].iloc[0]:,.0f} tokens/s for {rows['clients'].iloc[0]} client, "
            f"{rows['tokens_per_sec'].iloc[-1]:,.0f} for {rows['clients'].iloc[-1]}"
            for name, rows in speeds.groupby("server", sort=False)
        ),
        f"shutdown: {_counted(shutdown['verdict'])}",
    ]
    write_stage(
        folder,
        "serving",
        conditions={name: one.conditions() for name, one in connected.items()},
        summary=lines,
        model=model,
        checks=checks.to_dict("records"),
        drift=drift.to_dict("records"),
        speeds=speeds.to_dict("records"),
        comparisons=table.to_dict("records"),
        recipes=list(recipes),
        shutdown=shutdown.to_dict("records"),
    )
    return lines


def _counted(verdicts: pd.Series) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in verdicts.value_counts().items())
    return f"{len(verdicts)} checks: {counts}"


def _drift_lines(drift: pd.DataFrame) -> list[str]:
    if drift.empty:
        return []
    one, most = drift.to_dict("records")[0], drift.to_dict("records")[-1]
    return [
        f"llama.cpp's server beside {most['requests']} requests: log-probabilities move by "
        f"{one['drift']:.1e} with {one['slots']} slot, {most['drift']:.1e} with {most['slots']}; "
        f"{drift['differ'].sum()} of "
        f"{drift['answers'].sum()} texts differ"
    ]
