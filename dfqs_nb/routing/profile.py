"""What the routers prefer: which texts use which experts, and how many experts carry most of the work.

A text is the unit of every test here, because the tokens of one text are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

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

N_PERMUTATIONS = 1999


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
        """Does a layer use other experts in one domain? One row a layer that scores, and domain.

        Columns ``layer``, ``domain``, ``distance`` (total variation between the domain's shares and those of
        the other domains' texts), ``p`` (permutation test: the texts' domains are shuffled; NaN for a domain
        of one text), ``p_holm`` (Holm, over all rows), ``expert`` (the most over-used there) and ``lift``
        (its share there over its share elsewhere). A single domain has nothing to compare with, and no rows.
        """
        draw, scored = np.random.default_rng(0), np.flatnonzero(~self.trace.hashed)
        shares, each = self.reads[:, scored], np.arange(len(scored))
        rows = []
        for domain, inside in self.by_domain.items() if len(self.by_domain) > 1 else ():
            seen, p = _distance(shares, inside[None])[0], np.full(len(scored), math.nan)
            if inside.sum() >= 2:
                shuffled = draw.permuted(np.tile(inside, (N_PERMUTATIONS, 1)), axis=1)
                p = (1 + (_distance(shares, shuffled) >= seen - 1e-12).sum(axis=0)) / (1 + N_PERMUTATIONS)
            here, there = shares[inside].mean(axis=0), shares[~inside].mean(axis=0)
            best = (here - there).argmax(axis=1)
            lift = here[each, best] / np.maximum(there[each, best], 1e-9)
            columns = (self.trace.layers[scored], seen, p, best, lift)
            rows += [(layer, domain, *values) for layer, *values in zip(*columns, strict=True)]
        table = pd.DataFrame(rows, columns=["layer", "domain", "distance", "p", "expert", "lift"])
        tested = table["p"].notna()
        table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].tolist())
        return table.sort_values("distance", ascending=False, kind="stable", ignore_index=True)

    def coverage(self) -> pd.DataFrame:
        """Gate mass of a layer's heaviest experts (mean over layers), of ``all`` domains and of each."""
        masses = self._shares(self.mass)
        masses = {"all": np.mean(list(masses.values()), axis=0), **masses}
        curves = {name: np.sort(mass)[:, ::-1].cumsum(axis=1).mean(axis=0) for name, mass in masses.items()}
        return pd.DataFrame({"experts": np.arange(1, self.trace.n_experts + 1), **curves})

    def write(self, path: str | Path) -> Path:
        """The profile as JSON, for planning: how often a token reads each expert of a layer.

        Keys ``format`` (1), ``model`` (name, architecture, SHA-256 of its header), ``texts``, ``tokens``, and
        ``layers``: ``layer`` and ``reads`` (domains alike).
        """
        trace = self.trace
        reads = np.mean(list(self._shares(self.reads).values()), axis=0) * trace.experts.shape[2]
        rows = zip(trace.layers.tolist(), reads.round(6).tolist(), strict=True)
        about = {"model": trace.conditions.get("model"), "texts": len(self.domains), "tokens": trace.n_tokens}
        layers = [{"layer": layer, "reads": each} for layer, each in rows]
        return write_json(path, {"format": 1, **about, "layers": layers})


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


def _distance(shares: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Total variation between mean shares inside and outside; ``(permutations, L)``."""
    weights = inside / inside.sum(axis=1, keepdims=True) - ~inside / (~inside).sum(axis=1, keepdims=True)
    return np.asarray(np.abs(np.einsum("pt,tle->ple", weights, shares)).sum(axis=2) / 2)


class _LayerReads(BaseModel):
    layer: int
    reads: list[Annotated[float, Ge(0), Le(1)]]  # a token reads an expert once at most


class _ProfileFile(BaseModel):
    format: Literal[1]
    model: dict[str, Any] | None
    texts: int
    tokens: int
    layers: list[_LayerReads]


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
    name = one_line((stored.model or {}).get("name", "a model without a name"))
    layers, placed = {layer.layer: layer.reads for layer in stored.layers}, Layout.of(headers).experts
    if layers.keys() - placed or any(len(reads) != placed[n][0].n for n, reads in layers.items()):
        hint = "write one of this model: dfqs-nb routing MODEL"
        raise DfqsError(f"a profile of another model ({name})", where=path, hint=hint)
    return layers, f"{stored.tokens:,} tokens of {stored.texts} texts, recorded on {name}"
