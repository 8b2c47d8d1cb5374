"""What the routers prefer, and which experts to keep in fast memory.

A text is the unit of every test and interval here, because the tokens of one text are not independent.

llama.cpp places tensors, and all experts of a layer share one tensor each for gate, up and down. So whole
layers move. Every token reads k experts in each layer: no profile can prefer a layer to another, only its
size can. Single hot experts stay fast where the system's page cache keeps them (``mmap``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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
from dfqs_nb.gguf.facts import experts
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import holm, mean_interval

LEVELS = (0.8, 0.9, 0.95)  # of the gate mass
LEAST_PAIRS = 20  # times that two experts are expected together, for a lift
N_PERMUTATIONS, N_SHUFFLES = 1999, 20
N_PARTS = 4  # of a text, for drift
BUDGETS = (0.1, 0.25, 0.5, 0.75)  # of the bytes of all routed experts
EXPERT_TENSOR = re.compile(r"blk\.(\d+)\.ffn_\w+_exps\.(?:weight|bias)")


@dataclass(frozen=True)
class Profile:
    """How often, and with what weight, each expert was chosen in each text."""

    trace: Trace = field(repr=False)  # of all texts, one after another
    domains: tuple[str, ...]  # of the texts
    text: np.ndarray = field(repr=False)  # the text's number of each token, (n,)
    counts: np.ndarray = field(repr=False)  # choices, (texts, L, experts)
    mass: np.ndarray = field(
        repr=False
    )  # each token's weights, scaled to a sum of 1 and added up; same shape

    @property
    def by_domain(self) -> dict[str, np.ndarray]:
        """Which texts each domain holds, in the order of their first."""
        domains = np.array(self.domains)
        return {domain: np.flatnonzero(domains == domain) for domain in dict.fromkeys(self.domains)}

    @property
    def k(self) -> int:
        """Experts a token."""
        return int(self.trace.experts.shape[2])

    def usage(self) -> pd.DataFrame:
        """One row an expert: its ``share`` of choices, domains alike, and the share in each domain.

        ``specialization`` is the distance of the domains' shares from an equal split (0 to 1).
        """
        shares = {domain: _shares(self.counts[rows]).ravel() for domain, rows in self.by_domain.items()}
        stacked = np.stack(list(shares.values()))
        total, n = stacked.sum(axis=0), len(stacked)
        apart = np.abs(stacked / np.maximum(total, 1e-12) - 1 / n).sum(axis=0) / 2 / max(1 - 1 / n, 1e-12)
        index = pd.MultiIndex.from_product([self.trace.layers, range(self.trace.n_experts)])
        table = pd.DataFrame({"share": total / n, **shares}, index.set_names(["layer", "expert"]))
        return table.assign(specialization=np.where(total > 0, apart, 0.0)).reset_index()

    def layers(self) -> pd.DataFrame:
        """One row a layer: how evenly its experts are used (``entropy`` in bits), and how sticky they are.

        ``share_of_even`` is of the logarithm of the number of experts. ``overlap`` is the share of a token's
        experts that the token before had too, ``overlap_by_chance`` the one that usage alone gives.
        """
        from scipy.stats import entropy

        shares = _shares(self.counts)
        bits = entropy(shares, base=2, axis=1)
        same_text = self.text[1:] == self.text[:-1]
        now, before = self.trace.experts[1:][same_text], self.trace.experts[:-1][same_text]
        columns = {
            "layer": self.trace.layers,
            "hashed": self.trace.hashed,
            "entropy": bits,
            "share_of_even": bits / max(math.log2(shares.shape[1]), 1e-12),
            "unused": (shares == 0).sum(axis=1),
            "busiest": shares.max(axis=1),
            "overlap": (now[:, :, :, None] == before[:, :, None, :]).any(axis=3).mean(axis=(0, 2)),
            "overlap_by_chance": np.minimum(self.k * (shares**2).sum(axis=1), 1.0),
        }
        return pd.DataFrame(columns)

    def pairs(self) -> pd.DataFrame:
        """Pairs of experts chosen together, by ``lift``: the count over that of independent choices.

        Pairs expected fewer than `LEAST_PAIRS` times are left out.
        """
        n, n_experts = self.trace.n_tokens, self.trace.n_experts
        first, second = np.triu_indices(n_experts, 1)
        # k of E without replacement: less often together than n p q
        rate = (self.k - 1) / self.k * n_experts / max(n_experts - 1, 1) / n
        parts = []
        for column, layer in enumerate(self.trace.layers):
            chosen = np.zeros((n, n_experts), np.float32)
            np.put_along_axis(chosen, self.trace.experts[:, column].astype(np.intp), 1, axis=1)
            both, each = (chosen.T @ chosen)[first, second], chosen.sum(axis=0)
            expected = each[first] * each[second] * rate
            names = {"layer": layer, "expert": first, "other": second, "count": both.astype(int)}
            table = pd.DataFrame({**names, "lift": both / np.maximum(expected, 1e-12)})
            parts.append(table[expected >= LEAST_PAIRS])
        return pd.concat(parts).sort_values("lift", ascending=False, kind="stable", ignore_index=True)

    def specialization(self) -> pd.DataFrame:
        """Does a layer use other experts in one domain? One row a layer that scores, and domain.

        Columns ``layer``, ``domain``, ``distance`` (total variation between the domain's shares and those of
        the other domains' texts), ``p`` (permutation test: the texts' domains are shuffled; NaN for a domain
        of one text), ``p_holm`` (Holm, over all rows), ``expert`` (the most over-used there) and ``lift``
        (its share there over its share elsewhere). A single domain has nothing to compare with, and no rows.
        """
        draw, scored = np.random.default_rng(0), np.flatnonzero(~self.trace.hashed)
        shares, each = _rates(self.counts)[:, scored], np.arange(len(scored))
        rows = []
        for domain, members in self.by_domain.items() if len(self.by_domain) > 1 else ():
            inside = np.isin(np.arange(len(self.domains)), members)
            seen, p = _distance(shares, inside[None])[0], np.full(len(scored), math.nan)
            if len(members) >= 2:
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

    def drift(self) -> pd.DataFrame:
        """Does usage change along a text? One row a quarter of the texts.

        ``distance`` of its shares from the whole text's, and ``by_chance``, with each text's tokens shuffled.
        """
        draw, lengths = np.random.default_rng(0), np.bincount(self.text)
        places = [np.arange(n) * N_PARTS // n for n in lengths]
        shuffled = ([draw.permutation(place) for place in places] for _ in range(N_SHUFFLES))
        chance = np.mean([self._part_distances(each) for each in shuffled], axis=0)
        columns = {"distance": self._part_distances(places), "by_chance": chance}
        return pd.DataFrame({"part": np.arange(1, N_PARTS + 1), **columns})

    def _part_distances(self, places: Sequence[np.ndarray]) -> np.ndarray:
        n = len(self.domains) * N_PARTS
        tallies = _tally(self.trace, self.text * N_PARTS + np.concatenate(places), n)[0]
        parts = _rates(tallies.reshape(-1, N_PARTS, *tallies.shape[1:]))
        return np.asarray(np.abs(parts - _rates(self.counts)[:, None]).sum(axis=3).mean(axis=(0, 2)) / 2)

    def coverage(self) -> pd.DataFrame:
        """Gate mass of a layer's heaviest experts (mean over layers), of ``all`` domains and of each."""
        means = {name: curve.mean(axis=0) for name, curve in self._curves().items()}
        return pd.DataFrame({"experts": np.arange(1, self.trace.n_experts + 1), **means})

    def experts_needed(self) -> pd.DataFrame:
        """Experts a layer that carry 80, 90 and 95 % of the gate mass, mean over layers; a row a domain."""
        curves = self._curves()
        columns = {
            f"{level:.0%}": [(curve < level - 1e-9).sum(axis=1).mean() + 1 for curve in curves.values()]
            for level in LEVELS
        }
        return pd.DataFrame(columns, index=list(curves)).rename_axis("domain")

    def cross_coverage(self) -> pd.DataFrame:
        """Gate mass of the column's domain on the experts that carry 90 % of the row's domain."""
        masses, table = self._masses(), {}
        for chosen, mass in masses.items():
            kept = _heaviest(mass, 0.9)
            table[chosen] = {other: float((m * kept).sum(axis=1).mean()) for other, m in masses.items()}
        return pd.DataFrame(table).T.rename_axis("chosen on")

    def _masses(self) -> dict[str, np.ndarray]:
        return {domain: _shares(self.mass[rows]) for domain, rows in self.by_domain.items()}

    def _curves(self) -> dict[str, np.ndarray]:
        """Gate mass of the heaviest experts, added up; of all domains alike, and of each."""
        masses = self._masses()
        masses = {"all": np.mean(list(masses.values()), axis=0), **masses}
        return {name: np.sort(mass, axis=1)[:, ::-1].cumsum(axis=1) for name, mass in masses.items()}

    def hit_rates(self, budgets: Sequence[float], expert_bytes: np.ndarray) -> np.ndarray:
        """Share of a text's expert reads that hit what the other texts keep fast, float ``(budgets, texts)``.

        They keep the experts with the most reads a byte, domains alike. ``budgets`` are shares of the bytes
        of all routed experts; ``expert_bytes`` is that of one expert of each layer, ``(L,)``.
        """
        reads, cost = _rates(self.counts), np.repeat(expert_bytes, self.trace.n_experts)
        hits, domains = np.zeros((len(budgets), len(reads))), np.array(self.domains)
        for text in range(len(reads)):
            rest = np.arange(len(reads)) != text
            means = [
                reads[rest & (domains == domain)].mean(axis=0) for domain in dict.fromkeys(domains[rest])
            ]
            order = np.argsort(-np.mean(means, axis=0).ravel(), kind="stable")
            spent, own = cost[order].cumsum(), (reads[text].ravel() * cost)[order]
            for row, share in enumerate(budgets):
                hits[row, text] = own[spent <= share * cost.sum() * (1 + 1e-9)].sum() / own.sum()
        return hits


def profile_of(trace: Trace) -> Profile:
    """The profile of a trace of several texts, whose domains and lengths are in its conditions."""
    trace.require_routed()
    lengths = trace.conditions["lengths"]
    text = np.repeat(np.arange(len(lengths)), lengths)
    return Profile(trace, tuple(trace.conditions["domains"]), text, *_tally(trace, text, len(lengths)))


def _tally(trace: Trace, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices and gate mass by group of tokens, layer and expert."""
    n_layers, n_experts = len(trace.layers), trace.n_experts
    places = (group[:, None] * n_layers + np.arange(n_layers))[:, :, None] * n_experts + trace.experts
    weights = np.asarray(trace.weights, np.float64)
    weights = weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-12)
    shape, size = (n_groups, n_layers, n_experts), n_groups * n_layers * n_experts
    counts = np.bincount(places.ravel(), minlength=size)
    return counts.reshape(shape), np.bincount(places.ravel(), weights.ravel(), size).reshape(shape)


def _rates(counts: np.ndarray) -> np.ndarray:
    """Each layer's counts as shares of their sum."""
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1e-12))


def _shares(counts: np.ndarray) -> np.ndarray:
    """Shares ``(L, experts)`` from the counts of texts, each text alike."""
    return np.asarray(_rates(counts).mean(axis=0))


def _distance(shares: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Total variation between mean shares inside and outside; ``(permutations, L)``."""
    weights = inside / inside.sum(axis=1, keepdims=True) - ~inside / (~inside).sum(axis=1, keepdims=True)
    return np.asarray(np.abs(np.einsum("pt,tle->ple", weights, shares)).sum(axis=2) / 2)


def _heaviest(mass: np.ndarray, level: float) -> np.ndarray:
    """The fewest experts of each layer that carry ``level`` of its mass, bool ``(L, experts)``."""
    order = np.argsort(-mass, axis=1, kind="stable")
    ranked = np.take_along_axis(mass, order, axis=1)
    kept = np.zeros(mass.shape, bool)
    np.put_along_axis(kept, order, ranked.cumsum(axis=1) - ranked < level - 1e-9, axis=1)
    return kept


def _expert_tensors(headers: Sequence[GGUFHeader]) -> Iterator[tuple[int, int]]:
    """Layer and bytes of each tensor of routed experts."""
    for tensor in (tensor for header in headers for tensor in header.tensors):
        if match := EXPERT_TENSOR.fullmatch(tensor.name):
            yield int(match[1]), tensor.nbytes


def expert_bytes(path: str | Path, layers: np.ndarray) -> np.ndarray:
    """Bytes of all routed experts of each of these layers, from the header, int64 ``(L,)``."""
    sizes = Counter[int]()
    for layer, nbytes in _expert_tensors(open_shards(path).headers):
        sizes[layer] += nbytes
    return np.array([sizes[int(layer)] for layer in layers], np.int64)


def placement(profile: Profile, layer_bytes: np.ndarray) -> pd.DataFrame:
    """One row a budget: what llama.cpp can keep fast, and what single experts would give.

    ``layers`` are kept fast as a whole, the smallest first, of equals the last; ``hit_rate`` is the share of
    the bytes read that they serve. ``experts_hit_rate``, with its 95 % interval over texts, is that of single
    experts chosen by the profile, on texts that did not choose them.
    """
    layers, total = profile.trace.layers, int(layer_bytes.sum())
    hits = profile.hit_rates(BUDGETS, layer_bytes / profile.trace.n_experts)
    order = np.lexsort((-layers, layer_bytes))
    spent = layer_bytes[order].cumsum()
    fast = [np.sort(order[spent <= budget * total * (1 + 1e-9)]) for budget in BUDGETS]
    columns = {
        "budget": BUDGETS,
        "bytes": [int(budget * total) for budget in BUDGETS],
        "layers": list(map(len, fast)),
        "hit_rate": [float(layer_bytes[kept].sum() / total) for kept in fast],
        "arguments": [arguments(layers, layers[kept]) for kept in fast],
        "experts_hit_rate": hits.mean(axis=1),
    }
    return pd.DataFrame(columns).join(pd.DataFrame(map(mean_interval, hits), columns=["low", "high"]))


def arguments(layers: np.ndarray, fast: np.ndarray) -> str:
    """llama.cpp's arguments that keep the experts of the ``fast`` layers on the GPU, and the others in RAM.

    >>> arguments(np.arange(4), np.array([2, 3]))
    '-ngl 99 --n-cpu-moe 2'
    """
    slow = [int(layer) for layer in layers if layer not in fast]
    if not slow:
        return "-ngl 99"
    if max(slow) < min((int(layer) for layer in fast), default=max(slow) + 1):
        return f"-ngl 99 --n-cpu-moe {max(slow) + 1}"
    return f'-ngl 99 -ot "blk\\.({"|".join(map(str, slow))})\\.ffn_.*_exps=CPU"'


def write_profile(path: str | Path, profile: Profile, layer_bytes: np.ndarray) -> Path:
    """The profile as JSON, for planning: each layer's bytes an expert, and every expert's reads a token.

    Keys ``format`` (1), ``model`` (name, architecture, SHA-256 of its header), ``experts_used`` (k),
    ``texts``, ``tokens``, and ``layers``: ``layer``, ``hashed``, ``expert_bytes``, ``reads`` (domains alike).
    """
    trace, shares = profile.trace, profile.usage()["share"].to_numpy().reshape(len(layer_bytes), -1)
    names = ("layer", "hashed", "expert_bytes", "reads")
    reads, sizes = (shares * profile.k).round(6).tolist(), (layer_bytes // trace.n_experts).tolist()
    rows = zip(trace.layers.tolist(), trace.hashed.tolist(), sizes, reads, strict=True)
    stored = {
        "format": 1,
        "model": trace.conditions.get("model"),
        "experts_used": profile.k,
        "texts": len(profile.domains),
        "tokens": trace.n_tokens,
        "layers": [dict(zip(names, row, strict=True)) for row in rows],
    }
    return write_json(path, stored)


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
    """How often a token reads each expert of a layer, as `write_profile` wrote it, and what was recorded.

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
    layers, n_experts = {layer.layer: layer.reads for layer in stored.layers}, experts(headers[0]).total
    if set(layers) - dict(_expert_tensors(headers)).keys() or {*map(len, layers.values())} != {n_experts}:
        hint = "write one of this model: dfqs-nb routing MODEL"
        raise DfqsError(f"a profile of another model ({name})", where=path, hint=hint)
    return layers, f"{stored.tokens:,} tokens of {stored.texts} texts, recorded on {name}"
