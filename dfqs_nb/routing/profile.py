"""What the routers prefer, and which experts to keep in fast memory.

A text is the unit of every test and interval here, because the tokens of one text are not independent.

llama.cpp places tensors, and all experts of a layer share one tensor each for gate, up and down. So whole
layers move. Every token reads k experts in each layer: no profile can prefer a layer to another, only its
size can. Single hot experts stay fast where the system's page cache keeps them (``mmap``).
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
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import holm, mean_interval

LEVELS = (0.8, 0.9, 0.95)  # of the gate mass
LEAST_PAIRS = 20  # times that two experts are expected together, for a lift
N_PERMUTATIONS, N_SHUFFLES = 1999, 20
N_PARTS = 4  # of a text, for drift
BUDGETS = (0.1, 0.25, 0.5, 0.75)  # of the bytes of all routed experts


@dataclass(frozen=True)
class Profile:
    """How often, and with what weight, each expert was chosen in each text."""

    trace: Trace = field(repr=False)  # of all texts, one after another
    domains: tuple[str, ...]  # of the texts
    text: np.ndarray = field(repr=False)  # the text's number of each token, (n,)
    counts: np.ndarray = field(repr=False)  # choices, (texts, L, experts)
    mass: np.ndarray = field(repr=False)  # each token's weights, scaled to a sum of 1 and added up; as counts
    layer_bytes: np.ndarray = field(repr=False)  # of all routed experts of each layer, (L,)

    @property
    def by_domain(self) -> dict[str, np.ndarray]:
        """Which texts each domain holds, bool ``(texts,)``, in the order of their first."""
        return {domain: np.array(self.domains) == domain for domain in dict.fromkeys(self.domains)}

    @property
    def k(self) -> int:
        """Experts a token."""
        return int(self.trace.experts.shape[2])

    def _shares(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """By domain, the shares of a layer's experts ``(L, experts)``, each text alike."""
        return {domain: _rates(counts[texts]).mean(axis=0) for domain, texts in self.by_domain.items()}

    def usage(self) -> pd.DataFrame:
        """One row an expert: its ``share`` of choices, domains alike, and the share in each domain.

        ``specialization`` is the distance of the domains' shares from an equal split (0 to 1).
        """
        shares = {domain: share.ravel() for domain, share in self._shares(self.counts).items()}
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

        shares = _rates(self.counts).mean(axis=0)
        bits = entropy(shares, base=2, axis=1)
        same_text = self.text[1:] == self.text[:-1]
        now, before = self.trace.experts[1:][same_text], self.trace.experts[:-1][same_text]
        columns = {
            "layer": self.trace.layers,
            "entropy": bits,
            "share_of_even": bits / max(math.log2(shares.shape[1]), 1e-12),
            "unused": (shares == 0).sum(axis=1),
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

    def drift(self) -> pd.DataFrame:
        """Does usage change along a text? One row a quarter of the texts.

        ``distance`` of its shares from the whole text's, and ``by_chance``, with each text's tokens shuffled.
        """
        draw, whole = np.random.default_rng(0), _rates(self.counts)[:, None]
        quarters = [np.arange(n) * N_PARTS // n for n in np.bincount(self.text)]

        def distances(places: Sequence[np.ndarray]) -> np.ndarray:
            group, n = self.text * N_PARTS + np.concatenate(places), len(self.domains) * N_PARTS
            parts = _rates(_tally(self.trace, group, n)[0]).reshape(-1, N_PARTS, *whole.shape[2:])
            return np.asarray(np.abs(parts - whole).sum(axis=3).mean(axis=(0, 2)) / 2)

        shuffled = [distances([draw.permutation(each) for each in quarters]) for _ in range(N_SHUFFLES)]
        columns = {"distance": distances(quarters), "by_chance": np.mean(shuffled, axis=0)}
        return pd.DataFrame({"part": np.arange(1, N_PARTS + 1), **columns})

    def coverage(self) -> pd.DataFrame:
        """Gate mass of a layer's heaviest experts (mean over layers), of ``all`` domains and of each."""
        masses = self._shares(self.mass)
        masses = {"all": np.mean(list(masses.values()), axis=0), **masses}
        curves = {name: np.sort(mass)[:, ::-1].cumsum(axis=1).mean(axis=0) for name, mass in masses.items()}
        return pd.DataFrame({"experts": np.arange(1, self.trace.n_experts + 1), **curves})

    def experts_needed(self) -> pd.DataFrame:
        """Experts a layer that carry 80, 90 and 95 % of the gate mass (`coverage`); a row a domain."""
        curves = self.coverage().set_index("experts")
        needed = {f"{level:.0%}": (curves < level - 1e-9).sum() + 1 for level in LEVELS}
        return pd.DataFrame(needed).rename_axis("domain")

    def cross_coverage(self) -> pd.DataFrame:
        """Gate mass of the column's domain on the fewest experts that carry 90 % of the row's domain."""
        masses, table = self._shares(self.mass), {}
        for chosen, mass in masses.items():
            order = np.argsort(-mass, axis=1, kind="stable")
            ranked = np.take_along_axis(mass, order, axis=1)
            kept = ranked.cumsum(axis=1) - ranked < 0.9 - 1e-9  # of the experts in this order
            table[chosen] = {
                other: float((np.take_along_axis(each, order, axis=1) * kept).sum(axis=1).mean())
                for other, each in masses.items()
            }
        return pd.DataFrame(table).T.rename_axis("chosen on")

    def hit_rates(self, budgets: Sequence[float]) -> np.ndarray:
        """Share of a text's expert reads that hit what the other texts keep fast, float ``(budgets, texts)``.

        They keep the experts with the most reads a byte, domains alike. ``budgets`` are shares of the bytes
        of all routed experts.
        """
        reads, cost = (
            _rates(self.counts),
            np.repeat(self.layer_bytes / self.trace.n_experts, self.trace.n_experts),
        )
        hits = np.zeros((len(budgets), len(reads)))
        for text in range(len(reads)):
            rest = np.arange(len(reads)) != text
            others = [reads[rest & texts] for texts in self.by_domain.values()]
            mean = np.mean([each.mean(axis=0) for each in others if len(each)], axis=0)
            order = np.argsort(-mean.ravel(), kind="stable")
            spent, own = cost[order].cumsum(), (reads[text].ravel() * cost)[order]
            for row, share in enumerate(budgets):
                hits[row, text] = own[spent <= share * cost.sum() * (1 + 1e-9)].sum() / own.sum()
        return hits

    def placement(self) -> pd.DataFrame:
        """One row a budget: what llama.cpp can keep fast, and what single experts would give.

        ``layers`` are kept fast as a whole, the smallest first, of equals the last; ``hit_rate`` is the share
        of the bytes read that they serve. ``experts_hit_rate``, with its 95 % interval over texts, is that of
        single experts chosen by the profile, on texts that did not choose them.
        """
        layers, sizes, total = self.trace.layers, self.layer_bytes, int(self.layer_bytes.sum())
        hits, order = self.hit_rates(BUDGETS), np.lexsort((-layers, sizes))
        spent = sizes[order].cumsum()
        fast = [np.sort(order[spent <= budget * total * (1 + 1e-9)]) for budget in BUDGETS]
        columns = {
            "budget": BUDGETS,
            "bytes": [int(budget * total) for budget in BUDGETS],
            "layers": list(map(len, fast)),
            "hit_rate": [float(sizes[kept].sum() / total) for kept in fast],
            "arguments": [arguments(layers, layers[kept]) for kept in fast],
            "experts_hit_rate": hits.mean(axis=1),
        }
        intervals = pd.DataFrame(map(mean_interval, hits), columns=["low", "high"])
        return pd.DataFrame(columns).join(intervals)

    def write(self, path: str | Path) -> Path:
        """The profile as JSON, for planning: each layer's bytes an expert, and every expert's reads a token.

        Keys ``format`` (1), ``model`` (name, architecture, SHA-256 of its header), ``experts_used`` (k),
        ``texts``, ``tokens``, and ``layers``: ``layer``, ``hashed``, ``expert_bytes``, ``reads`` (domains
        alike).
        """
        trace, reads = self.trace, np.mean(list(self._shares(self.counts).values()), axis=0) * self.k
        names = ("layer", "hashed", "expert_bytes", "reads")
        columns = (trace.layers, trace.hashed, self.layer_bytes // trace.n_experts, reads.round(6))
        rows = zip(*(column.tolist() for column in columns), strict=True)
        about = {"model": trace.conditions.get("model"), "experts_used": self.k}
        about |= {"texts": len(self.domains), "tokens": trace.n_tokens}
        layers = [dict(zip(names, row, strict=True)) for row in rows]
        return write_json(path, {"format": 1, **about, "layers": layers})


def profile_of(trace: Trace, layer_bytes: np.ndarray) -> Profile:
    """The profile of a trace of several texts, whose domains and lengths are in its conditions."""
    trace.require_routed()
    lengths = trace.conditions["lengths"]
    text = np.repeat(np.arange(len(lengths)), lengths)
    tallies = _tally(trace, text, len(lengths))
    return Profile(trace, tuple(trace.conditions["domains"]), text, *tallies, layer_bytes)


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


def _distance(shares: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Total variation between mean shares inside and outside; ``(permutations, L)``."""
    weights = inside / inside.sum(axis=1, keepdims=True) - ~inside / (~inside).sum(axis=1, keepdims=True)
    return np.asarray(np.abs(np.einsum("pt,tle->ple", weights, shares)).sum(axis=2) / 2)


def expert_bytes(path: str | Path, layers: np.ndarray) -> np.ndarray:
    """Bytes of all routed experts of each of these layers, from the header, int64 ``(L,)``."""
    placed = Layout.of(open_shards(path).headers).experts
    return np.array([sum(p.end - p.start for p in placed.get(int(layer), ())) for layer in layers], np.int64)


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
