"""What the routers prefer: which texts use which experts, and how many experts carry most of the work.

A text is the unit of every test here, because the tokens of one text are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError

from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import read_json, write_json
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.placement import Layout
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import holm

N_PERMUTATIONS = 999


@dataclass(frozen=True)
class Profile:
    """How often, and with what weight, each expert was chosen in each text."""

    trace: Trace = field(repr=False)  # of all texts, one after another
    domains: tuple[str, ...]  # of the texts
    reads: np.ndarray = field(repr=False)  # a layer's choices as shares of their sum, (texts, L, experts)
    mass: np.ndarray = field(repr=False)  # its gate weights as shares of their sum; as reads

    @property
    def by_domain(self) -> dict[str, np.ndarray]:
        """Which texts each domain holds, bool ``(texts,)``, in the order of their first."""
        return {domain: np.array(self.domains) == domain for domain in dict.fromkeys(self.domains)}

    def _shares(self, of_texts: np.ndarray) -> dict[str, np.ndarray]:
        """By domain, the mean over its texts ``(L, experts)``."""
        return {domain: of_texts[texts].mean(axis=0) for domain, texts in self.by_domain.items()}

    def usage(self) -> pd.DataFrame:
        """One row an expert: its ``share`` of choices, domains alike, and the share in each domain.

        ``specialization`` is the distance of the domains' shares from an equal split (0 to 1).
        """
        shares = {domain: share.ravel() for domain, share in self._shares(self.reads).items()}
        stacked = np.stack(list(shares.values()))
        total, n = stacked.sum(axis=0), len(stacked)
        apart = np.abs(stacked / np.maximum(total, 1e-12) - 1 / n).sum(axis=0) / 2 / max(1 - 1 / n, 1e-12)
        index = pd.MultiIndex.from_product([self.trace.layers, range(self.trace.n_experts)])
        table = pd.DataFrame({"share": total / n, **shares}, index.set_names(["layer", "expert"]))
        return table.assign(specialization=np.where(total > 0, apart, 0.0)).reset_index()

    def specialization(self) -> pd.DataFrame:
        """Does a domain use other experts than the other texts? One row a domain, none for a single domain.

        ``distance``: total variation between its mean shares and theirs, mean over the layers that score.
        ``p``: permutation test, in which the texts' domains are shuffled. ``p_holm``: Holm, over all rows.
        """
        draw, shares, rows = np.random.default_rng(0), self.reads[:, ~self.trace.hashed], []
        for domain, inside in self.by_domain.items() if len(self.by_domain) > 1 else ():
            shuffled = draw.permuted(np.tile(inside, (N_PERMUTATIONS, 1)), axis=1)
            drawn = np.vstack([inside, shuffled])  # the true domain first
            weights = drawn / drawn.sum(axis=1, keepdims=True) - ~drawn / (~drawn).sum(axis=1, keepdims=True)
            apart = np.abs(np.tensordot(weights, shares, 1)).sum(axis=2).mean(axis=1) / 2
            rows.append((domain, apart[0], (apart >= apart[0] - 1e-12).mean()))
        table = pd.DataFrame(rows, columns=["domain", "distance", "p"])
        table = table.sort_values("distance", ascending=False, kind="stable", ignore_index=True)
        return table.assign(p_holm=holm(table["p"].tolist()))

    def coverage(self) -> pd.DataFrame:
        """Gate mass of a layer's heaviest experts (mean over layers), of ``all`` domains and of each."""
        masses = self._shares(self.mass)
        masses = {"all": np.mean(list(masses.values()), axis=0), **masses}
        curves = {name: np.sort(mass)[:, ::-1].cumsum(axis=1).mean(axis=0) for name, mass in masses.items()}
        return pd.DataFrame({"experts": np.arange(1, self.trace.n_experts + 1), **curves})

    def write(self, path: str | Path) -> Path:
        """The profile as JSON, for planning: how often a token reads each expert of a layer.

        Keys ``format`` (2), ``model`` (its name), ``texts``, ``tokens``; ``reads`` by layer, domains alike.
        """
        trace = self.trace
        reads = np.mean(list(self._shares(self.reads).values()), axis=0) * trace.experts.shape[2]
        about = {"model": trace.conditions["model"], "texts": len(self.domains), "tokens": trace.n_tokens}
        by_layer = dict(zip(trace.layers.tolist(), reads.round(6).tolist(), strict=True))
        return write_json(path, {"format": 2, **about, "reads": by_layer})


def profile_of(trace: Trace) -> Profile:
    """The profile of a trace of several texts, whose domains and lengths are in its conditions."""
    lengths, (_, n_layers, k) = trace.conditions["lengths"], trace.experts.shape
    shape = len(lengths), n_layers, trace.n_experts
    row = np.repeat(np.arange(len(lengths)), lengths)[:, None] * n_layers + np.arange(n_layers)
    places = (row[:, :, None] * trace.n_experts + trace.experts).ravel()
    weights = np.array(trace.weights, np.float64)
    weights /= np.maximum(weights.sum(axis=2, keepdims=True), 1e-12)  # every token counts alike
    reads, mass = (
        np.bincount(places, each, math.prod(shape)).reshape(shape) for each in (None, weights.ravel())
    )
    total = np.maximum(reads.sum(axis=2, keepdims=True), 1)
    return Profile(trace, tuple(trace.conditions["domains"]), reads / total, mass / (total / k))


class _ProfileFile(BaseModel):
    format: Literal[2]
    model: str
    texts: int
    tokens: int
    reads: dict[int, list[Annotated[float, Ge(0), Le(1)]]]  # a token reads an expert once at most


def read_profile(path: str | Path, headers: Sequence[GGUFHeader]) -> tuple[dict[int, list[float]], str]:
    """How often a token reads each expert of a layer, as `Profile.write` wrote it, and what was recorded.

    A `DfqsError` if the file is not a profile, or is of another model.
    """
    try:
        stored = _ProfileFile.model_validate(read_json(path))
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        what, hint = f"not a routing profile ({why})", "write it: dfqs-nb routing MODEL"
        raise DfqsError(what, where=path, hint=hint) from None
    name, placed = one_line(stored.model), Layout.of(headers).experts
    if stored.reads.keys() - placed or any(len(it) != placed[n][0].n for n, it in stored.reads.items()):
        hint = "write one of this model: dfqs-nb routing MODEL"
        raise DfqsError(f"a profile of another model ({name})", where=path, hint=hint)
    return stored.reads, f"{stored.tokens:,} tokens of {stored.texts} texts, recorded on {name}"
