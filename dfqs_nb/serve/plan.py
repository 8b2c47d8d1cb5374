"""Plan the checks of the servers, and cut them to a time before the servers start."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dfqs_nb.core.budget import duration, fit
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.llama.timing import probe
from dfqs_nb.scores import ItemSet
from dfqs_nb.serve.checks import LONGEST_TRIED, MAX_TOKENS, OTHERS

N_SERVERS = 2
CHECK_TOKENS = (4 + 1 + 4) * 4 * 32  # of the answers of one server's checks
N_TEXTS, TEXT_TOKENS = 16, 80  # texts under load, and the tokens of each
# What a plan that exceeds its budget gives up, in this order.
CUTS: tuple[dict[str, int], ...] = (
    {"items": 4},
    {"clients": 1, "tokens": 16},
    {"items": 2, "answered": 64},
    {"texts": 4},
    {"checked": 8, "filled": 0},
    {"items": 1, "sets": 1, "tokens": 4, "answered": 16},
)
NAMES = {
    "items": "questions of a set asked both ways",
    "clients": "numbers of clients",
    "tokens": "timed tokens of an answer",
    "texts": "texts under load",
    "answered": "tokens of an answer to a question",
    "sets": "question sets",
    "checked": "tokens of an answer that is checked",
    "filled": "tokens of context tried out",
}


@dataclass(frozen=True)
class ServePlan:
    """What will be asked of the servers."""

    sets: list[ItemSet]
    items: int  # of each set; 0: all
    clients: list[int]  # at once, that are timed
    tokens: int  # of each timed answer
    texts: int  # whose answers are compared with those beside other clients
    checked: int  # tokens of an answer in the checks
    filled: int  # tokens of the context, to try it out
    seconds: float
    left_out: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """The plan in a sentence."""
        cut = f" Cut to keep to the budget: {'; '.join(self.left_out)}." if self.left_out else ""
        return f"At most about {duration(self.seconds)}, if every answer has its full length.{cut}"


def plan_checks(
    path: str | Path,
    settings: OpenSettings,
    sets: Sequence[ItemSet],
    *,
    items: int,
    clients: Sequence[int],
    tokens: int,
    seconds: float,
) -> ServePlan:
    """Time a few tokens, and cut what is planned in the order of `CUTS` to what these seconds hold.

    Every check is made, the last ones with shorter answers and without filling the context.
    """
    started = time.perf_counter()
    with open_model(path, settings) as model:
        load = time.perf_counter() - started  # with its trial in a child: a server starts no faster
        pace = probe(model)

    def cost(plan: dict[str, int]) -> float:
        share = plan["checked"] / MAX_TOKENS
        checks = load + pace.seconds(plan["filled"], CHECK_TOKENS * share)
        n_loads = 3 + len(OTHERS)  # one slot alone and beside others, and many slots alone
        drift = 2 * load + n_loads * plan["texts"] * pace.seconds(TEXT_TOKENS, MAX_TOKENS * share)
        answers = sum(
            pace.seconds(len(item.prompt) / 4 + 16, min(item_set.max_tokens, plan["answered"]))
            for item_set in sets[: plan["sets"]]
            for item in item_set.items[: plan["items"]]
        )
        speeds = (N_SERVERS + 1) * 2 * sum(clients[: plan["clients"]]) * pace.seconds(64, plan["tokens"])
        explained = N_SERVERS * answers  # this process answers again where a server's text differs
        return N_SERVERS * checks + drift + (N_SERVERS + 1) * answers + explained + load + speeds

    whole = {"items": items or max(len(item_set.items) for item_set in sets), "clients": len(clients)}
    whole |= {"sets": len(sets), "tokens": tokens, "texts": N_TEXTS}
    whole |= {"answered": max(item_set.max_tokens for item_set in sets)}
    whole |= {"checked": MAX_TOKENS, "filled": min(settings.n_ctx, LONGEST_TRIED)}
    fitted = fit(whole, CUTS, cost, seconds, NAMES)
    cut = fitted.values
    return ServePlan(
        [replace(asked, max_tokens=min(asked.max_tokens, cut["answered"])) for asked in sets[: cut["sets"]]],
        items if cut["items"] == whole["items"] else cut["items"],
        list(clients[: cut["clients"]]),
        *(cut["tokens"], cut["texts"], cut["checked"], cut["filled"], fitted.seconds, fitted.left_out),
    )
