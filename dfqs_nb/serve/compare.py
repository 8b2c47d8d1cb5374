"""The same questions in this process and through a server, item by item.

For each difference we find the first token that differs, and how certain the model was there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.stage import Stage
from dfqs_nb.llama.generate import chat_text
from dfqs_nb.llama.model import Model
from dfqs_nb.scores import Answerer, ItemSet, Options, SetRun, find_sandbox, score_set
from dfqs_nb.serve import measure
from dfqs_nb.serve.checks import load_sentence, side_by_side
from dfqs_nb.serve.client import Endpoint
from dfqs_nb.serve.servers import LocalServer
from dfqs_nb.serve.wire import EndpointError

if TYPE_CHECKING:
    import pandas as pd

NEAR_TIE = 0.1  # of a logit: well above what other batches and kernels move (see `checks.under_load`)


@dataclass(frozen=True)
class Comparison:
    """The same items in process and through a server, and both runs.

    ``items``: ``id``, ``family``, ``text_...`` and ``correct_...`` of ``process`` and ``server``,
    ``same_text``; where texts differ also what `explain` gives.
    """

    items: pd.DataFrame = field(repr=False)
    process: SetRun
    server: SetRun

    @property
    def causes(self) -> str:
        """The differences counted by cause; empty if there are none."""
        return "" if self.items["same_text"].all() else _counted(self.items["cause"])


Compared = Mapping[tuple[str, str], Comparison]  # by server and set


def compare_all(
    model: Model,
    connected: Mapping[str, Endpoint],
    item_sets: Sequence[ItemSet],
    folder: str | Path,
    *,
    model_id: str = "",
    local: Collection[str] = (),
    stopped: dict[str, str] | None = None,
    **options: Any,
) -> dict[tuple[str, str], Comparison]:
    """Score sets in process and through servers, at once where cores are free, and `explain` differences.

    Args:
        model_id: the SHA-256 of the model in this process, under which its answers are kept.
        local: the servers that were started with this process's file: ``model_id`` is theirs too.
        stopped: gets the servers that failed for good, with the reason. An `EndpointError`: all did.
        options: ``limit``, ``allow_unsandboxed``, ``fresh``, ``progress`` of ``score_set``.
    """
    chosen, place = Options(**options), Path(folder)
    stopped = {} if stopped is None else stopped

    def through(name: str) -> list[SetRun]:
        server, own = connected[name], place / folder_name(connected[name])
        known: dict[str, Any] = {"model_id": model_id if name in local else "", "model": model}
        try:
            return [measure.score_set(server, asked, own, chosen, **known) for asked in item_sets]
        except EndpointError as error:
            stopped[name] = error.what
            return []

    def in_process() -> list[SetRun]:
        return [score_set(model, asked, place / "process", chosen, model_id=model_id) for asked in item_sets]

    works: list[Callable[[], list[SetRun]]] = [in_process, *(partial(through, name) for name in connected)]
    at_once = usable_cores() // (model.settings.n_threads or 1)
    ours, *served = side_by_side(lambda work: work(), works, at_once)
    by_server = dict(zip(connected, served, strict=True))
    if not any(by_server.values()):
        raise EndpointError(f"no server answers: {'; '.join(stopped.values())}", hint="read its log")
    return {
        (name, here.name): _compared(model, connected[name], item_set, here, there)
        for name, runs in by_server.items()
        for item_set, here, there in zip(item_sets, ours, runs, strict=bool(runs))
    }


def askable_sets(tier: str, allow_unsandboxed: bool = False) -> list[ItemSet]:
    """The question sets of a tier (``nano`` or ``standard``); code only where its answers can be run."""
    safe = find_sandbox().safe or allow_unsandboxed
    return [item_set for item_set in ItemSet.of_tier(tier) if safe or item_set.kind != "code"]


def folder_name(endpoint: Endpoint) -> str:
    """A folder for a server's answers. Its name may come from its list of models, so it may be anything."""
    return re.sub(r"[^\w.-]+", "-", endpoint.facts.name).strip(".-")[:80] or "unknown"


def _compared(
    model: Model, endpoint: Endpoint, item_set: ItemSet, ours: SetRun, theirs: SetRun
) -> Comparison:
    import pandas as pd

    opening = ""  # of a thinking that the template itself writes: llama.cpp's server repeats it
    if item_set.mode == "chat" and model.has_template:
        after = chat_text(model, measure.MARK).rpartition(measure.MARK)[2]
        opening = "".join(after.partition("<think>")[1:])
    items = ours.items[["id", "family"]].assign(
        text_process=ours.items["completion"],
        text_server=theirs.items["completion"].astype(str).str.removeprefix(opening),
        same_text=lambda table: table["text_process"] == table["text_server"],
        correct_process=ours.items["correct"],
        correct_server=theirs.items["correct"],
    )
    by_id = {item.id: item for item in item_set.items}
    why = {
        row.Index: explain(model, endpoint, item_set, by_id[row.id], row.text_server)
        for row in items[~items["same_text"]].itertuples()
    }
    return Comparison(items.join(pd.DataFrame.from_dict(why, orient="index")), ours, theirs)


def explain(model: Model, endpoint: Endpoint, item_set: ItemSet, item: Any, served: str) -> dict[str, Any]:
    """Why the server's text differs from this process's; notebook 09 explains each ``cause``.

    ``prompt_process`` and ``prompt_server`` (tokens; 0: not reported), ``token`` (the first of ours that
    theirs does not have), and of the logits in process there: ``margin`` (our token before the server's) and
    ``rank`` (of the server's token; 1 is ours).
    """
    answerer = Answerer.of(model, item_set)
    request = answerer.request(item_set, item)
    prompt, ours = request.tokens(model), answerer.answer(request)
    rest, at = served.encode(), 0  # what the server's text has beyond our first tokens
    for piece in map(model.token_bytes, ours.token_ids):
        if not rest.startswith(piece):
            break
        rest, at = rest[len(piece) :], at + 1
    model.clear()
    logits = model.evaluate([*prompt, *ours.token_ids[:at]])
    token = ours.token_ids[at] if at < len(ours.token_ids) else int(np.argmax(logits))

    def continues(token: int) -> bool:
        piece = model.token_bytes(token)
        return bool(piece) and rest.startswith(piece) if rest else model.ends(token)

    theirs = next(filter(continues, np.argsort(-logits, kind="stable").tolist()), None)
    margin = float("nan") if theirs is None else float(logits[token] - logits[theirs])
    rank = 0 if theirs is None else int((logits > logits[theirs]).sum()) + 1
    whole, framed = replace(endpoint, stream=False), request.chat and model.has_template
    n_prompt = 0
    with suppress(EndpointError):  # it answered before, and may be gone by now
        reply = whole.chat(request.text, 1) if framed else whole.complete(request.rendered(model), 1)
        n_prompt = reply.n_prompt
    if n_prompt not in (0, len(prompt)):
        cause = "other prompt"
    elif rank > 1 and margin <= NEAR_TIE:
        cause = "near-tie"
    elif ours.text.startswith(served) or served.startswith(ours.text):
        cause = "where it ends"
    else:
        cause = "token boundary" if rank == 1 else "other numbers"
    parting = {"token": at, "margin": margin, "rank": rank, "cause": cause}
    return {"prompt_process": len(prompt), "prompt_server": n_prompt, **parting}


# ---- tables, and what the notebook hands on ----


def item_table(compared: Compared) -> pd.DataFrame:
    """The items of all comparisons, with columns ``server`` and ``set`` in front."""
    import pandas as pd

    tables = {names: pair.items for names, pair in compared.items()}
    return pd.concat(tables, names=["server", "set"]).reset_index(["server", "set"]).reset_index(drop=True)


def comparison_table(compared: Compared) -> pd.DataFrame:
    """A row a server and set: counts of items, same texts and right answers, and causes of differences."""
    groups = item_table(compared).groupby(["server", "set"], sort=False)
    counts = {"items": ("id", "size"), "same_text": ("same_text", "sum")}
    counts |= {f"right_{where}": (f"correct_{where}", "sum") for where in ("process", "server")}
    return (
        groups.agg(**counts)
        .reset_index()
        .assign(causes=[pair.causes or "none" for pair in compared.values()])
    )


def hand_on(
    stage: Stage,
    *,
    speeds: pd.DataFrame,
    compared: Compared,
    connected: Mapping[str, Endpoint],
    running: Mapping[str, LocalServer],
    recipes: Sequence[str],
    stopped: Mapping[str, str],
    **tables: pd.DataFrame,
) -> list[str]:
    """Write ``serving.json``, and return its summary lines; what each of our servers loaded is in it.

    ``tables``: ``checks``, ``drift`` and ``shutdown``.
    """
    tables |= {"speeds": speeds, "comparisons": comparison_table(compared)}
    by_server = tables["checks"].groupby("server", sort=False)
    lines = [f"{name}: {len(rows)} checks: {_counted(rows['verdict'])}" for name, rows in by_server]
    for row in tables["comparisons"].itertuples():
        why = "" if row.causes == "none" else f" ({row.causes})"
        same = f"{row.same_text} of {row.items} answers of {row.set}"
        lines.append(f"{row.server}: {same} are those of this process{why}")
    lines.append(load_sentence(tables["drift"]))
    gone = "its server stopped, and was not measured to the end"
    lines += [f"{name}: {gone}: {why}" for name, why in stopped.items()]
    for name, rows in speeds.groupby("server", sort=False):
        ends = rows.iloc[[0, -1]].drop_duplicates("clients")
        parts = [
            f"{row.tokens_per_sec:,.0f} tokens/s for {row.clients} client{'s' * (row.clients > 1)} "
            f"({row.requests} requests, {row.tokens:,} tokens)"
            for row in ends.itertuples()
        ]
        lines.append(f"{name}: {', '.join(parts)}")
    ended = tables["shutdown"]["verdict"]
    lines.append(f"shutdown: {len(ended)} checks: {_counted(ended)}")
    stage.finish(
        conditions={name: endpoint.conditions() for name, endpoint in connected.items()},
        summary=lines,
        model=stage.model,
        recipes=list(recipes),
        loaded={name: server.loaded for name, server in running.items()},
        **{name: frame.to_dict("records") for name, frame in tables.items()},
    )
    return lines


def _counted(words: pd.Series) -> str:
    return ", ".join(f"{n} {word}" for word, n in words.value_counts().items())
