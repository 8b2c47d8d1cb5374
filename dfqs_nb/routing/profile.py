"""What the routers prefer: usage by layer and domain, coverage, specialization, and drift along a text.

A text is the unit of every test and interval here, because the tokens of one text are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dfqs_nb.routing.trace import Trace
from dfqs_nb.stats import holm

if TYPE_CHECKING:
    import pandas as pd

LEVELS = (0.8, 0.9, 0.95)  # of the gate mass
N_PERMUTATIONS = 1999


@dataclass(frozen=True)
class Profile:
    """How often, and with what weight, each expert was chosen in each text.

    Attributes:
        trace: of all texts, one after another.
        names, domains: of the texts.
        text: the text's number of each token, ``(n,)``.
        counts: choices, ``(texts, L, experts)``.
        mass: gate mass: each token's weights, which are scaled to a sum of 1, added up; the same shape.
    """

    trace: Trace = field(repr=False)
    names: tuple[str, ...]
    domains: tuple[str, ...]
    text: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)
    mass: np.ndarray = field(repr=False)

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
        """One row an expert; every domain counts alike, however many tokens it has.

        Columns ``layer``, ``expert``, ``share`` of choices, each domain's share, and ``specialization``: the
        distance of the domains' shares from an equal split (0 to 1).
        """
        import pandas as pd

        shares = {domain: _shares(self.counts[rows]).ravel() for domain, rows in self.by_domain.items()}
        stacked = np.stack(list(shares.values()))
        total, n = stacked.sum(axis=0), len(stacked)
        apart = np.abs(stacked / np.maximum(total, 1e-12) - 1 / n).sum(axis=0) / 2 / max(1 - 1 / n, 1e-12)
        index = pd.MultiIndex.from_product([self.trace.layers, range(self.trace.n_experts)])
        table = pd.DataFrame({"share": total / n, **shares}, index.set_names(["layer", "expert"]))
        return table.assign(specialization=np.where(total > 0, apart, 0.0)).reset_index()

    def layers(self) -> pd.DataFrame:
        """One row a layer: how evenly its experts are used, and how sticky they are.

        Columns ``layer``, ``hashed``, ``entropy`` (bits), ``share_of_even`` (of the logarithm of the number
        of experts), ``unused`` (experts), ``busiest`` (share of choices), ``overlap`` (share of a token's
        experts that the token before had too), and ``overlap_by_chance`` (from usage alone).
        """
        import pandas as pd
        from scipy.stats import entropy

        shares = _shares(self.counts)
        bits = entropy(shares, base=2, axis=1)
        same_text = self.text[1:] == self.text[:-1]
        now, before = self.trace.experts[1:][same_text], self.trace.experts[:-1][same_text]
        shared = (now[:, :, :, None] == before[:, :, None, :]).any(axis=3).mean(axis=(0, 2))
        return pd.DataFrame(
            {
                "layer": self.trace.layers,
                "hashed": self.trace.hashed,
                "entropy": bits,
                "share_of_even": bits / max(math.log2(shares.shape[1]), 1e-12),
                "unused": (shares == 0).sum(axis=1),
                "busiest": shares.max(axis=1),
                "overlap": shared,
                "overlap_by_chance": np.minimum(self.k * (shares**2).sum(axis=1), 1.0),
            }
        )

    def pairs(self, least: int = 20) -> pd.DataFrame:
        """Experts chosen together: ``layer``, ``expert``, ``other``, ``count``, ``lift``, highest first.

        ``lift`` is the count over the one expected if a layer's choices were independent of each other; pairs
        expected fewer than ``least`` times are left out.
        """
        import pandas as pd

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
            parts.append(table[expected >= least])
        return pd.concat(parts).sort_values("lift", ascending=False, kind="stable", ignore_index=True)

    def specialization(self, n_permutations: int = N_PERMUTATIONS, seed: int = 0) -> pd.DataFrame:
        """Does a layer use other experts in one domain? One row a layer that scores, and domain.

        Columns ``layer``, ``domain``, ``distance`` (total variation between the domain's shares and those of
        the other domains' texts), ``p`` (permutation test: the texts' domains are shuffled), ``p_holm``
        (Holm, over all rows), ``expert`` (the most over-used there) and ``lift`` (its share there over its
        share elsewhere). Domains of fewer than two texts have no test (NaN); a single domain has no others
        to compare with, and no rows.
        """
        import pandas as pd

        draw, scored = np.random.default_rng(seed), np.flatnonzero(~self.trace.hashed)
        shares = np.stack([_shares(self.counts[[i]]) for i in range(len(self.names))])[:, scored]
        rows = []
        for domain, members in self.by_domain.items() if len(self.by_domain) > 1 else ():
            inside = np.isin(np.arange(len(self.names)), members)
            seen = _distance(shares, inside[None])[0]
            if len(members) >= 2:
                shuffled = draw.permuted(np.tile(inside, (n_permutations, 1)), axis=1)
                p = (1 + (_distance(shares, shuffled) >= seen - 1e-12).sum(axis=0)) / (1 + n_permutations)
            else:
                p = np.full(len(scored), math.nan)
            here, there = shares[inside].mean(axis=0), shares[~inside].mean(axis=0)
            best = (here - there).argmax(axis=1)
            each = np.arange(len(scored))
            lift = here[each, best] / np.maximum(there[each, best], 1e-9)
            columns = (self.trace.layers[scored], seen, p, best, lift)
            rows += [(layer, domain, *values) for layer, *values in zip(*columns, strict=True)]
        table = pd.DataFrame(rows, columns=["layer", "domain", "distance", "p", "expert", "lift"])
        tested = table["p"].notna()
        table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].tolist())
        return table.sort_values("distance", ascending=False, kind="stable", ignore_index=True)

    def drift(self, n_parts: int = 4, n_shuffles: int = 20, seed: int = 0) -> pd.DataFrame:
        """Does usage change along a text? One row a part of the texts.

        Columns ``part``, ``distance`` of its shares from the whole text's (mean over layers and texts), and
        ``by_chance``: the same with each text's tokens shuffled.
        """
        import pandas as pd

        draw = np.random.default_rng(seed)
        place = np.concatenate([np.arange(n) * n_parts // n for n in np.bincount(self.text)])
        seen = self._part_distances(place, n_parts)
        texts = np.split(place, np.flatnonzero(np.diff(self.text)) + 1)
        shuffled = (np.concatenate([draw.permutation(text) for text in texts]) for _ in range(n_shuffles))
        chance = np.mean([self._part_distances(each, n_parts) for each in shuffled], axis=0)
        return pd.DataFrame({"part": np.arange(1, n_parts + 1), "distance": seen, "by_chance": chance})

    def _part_distances(self, place: np.ndarray, n_parts: int) -> np.ndarray:
        tallies = _tally(self.trace, self.text * n_parts + place, len(self.names) * n_parts)[0]
        parts = _rates(tallies.reshape(len(self.names), n_parts, *tallies.shape[1:]))
        whole = _rates(self.counts)[:, None]
        return np.asarray(np.abs(parts - whole).sum(axis=3).mean(axis=(0, 2)) / 2)

    # ---- coverage ----

    def coverage(self) -> pd.DataFrame:
        """How much of the gate mass the n heaviest experts of a layer carry, mean over layers.

        Columns ``experts`` (1, 2, ...), ``all`` (domains alike) and one for each domain, chosen by itself.
        """
        import pandas as pd

        means = {name: curve.mean(axis=0) for name, curve in self._curves().items()}
        return pd.DataFrame({"experts": np.arange(1, self.trace.n_experts + 1), **means})

    def experts_needed(self) -> pd.DataFrame:
        """Experts a layer that carry 80, 90 and 95 % of the gate mass, mean over layers; a row a domain."""
        import pandas as pd

        levels = {f"{level:.0%}": level - 1e-9 for level in LEVELS}
        rows = {
            name: {text: (curve < level).sum(axis=1).mean() + 1 for text, level in levels.items()}
            for name, curve in self._curves().items()
        }
        return pd.DataFrame(rows).T.rename_axis("domain")

    def cross_coverage(self, level: float = 0.9) -> pd.DataFrame:
        """Gate mass of the column's domain on the experts that carry ``level`` of the row's domain."""
        import pandas as pd

        masses = self._masses()
        table = {}
        for chosen, mass in masses.items():
            kept = _heaviest(mass, level)
            table[chosen] = {other: float((m * kept).sum(axis=1).mean()) for other, m in masses.items()}
        return pd.DataFrame(table).T.rename_axis("chosen on")

    def _masses(self) -> dict[str, np.ndarray]:
        return {domain: _shares(self.mass[rows]) for domain, rows in self.by_domain.items()}

    def _curves(self) -> dict[str, np.ndarray]:
        """Gate mass of the heaviest experts, added up; of all domains alike, and of each."""
        masses = self._masses()
        masses = {"all": np.mean(list(masses.values()), axis=0), **masses}
        return {name: np.sort(mass, axis=1)[:, ::-1].cumsum(axis=1) for name, mass in masses.items()}


def profile_of(trace: Trace) -> Profile:
    """The profile of a trace of several texts, whose names, domains and lengths are in its conditions.

    Raises:
        ModelError: a dense model's trace.
    """
    trace.require_routed()
    about = trace.conditions
    text = np.repeat(np.arange(len(about["lengths"])), about["lengths"])
    counts, mass = _tally(trace, text, len(about["lengths"]))
    return Profile(trace, tuple(about["sequences"]), tuple(about["domains"]), text, counts, mass)


def _tally(trace: Trace, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices and gate mass by group of tokens, layer and expert."""
    n_layers, n_experts = len(trace.layers), trace.n_experts
    places = (group[:, None] * n_layers + np.arange(n_layers))[:, :, None] * n_experts + trace.experts
    weights = np.asarray(trace.weights, np.float64)
    weights = weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-12)
    shape, size = (n_groups, n_layers, n_experts), n_groups * n_layers * n_experts
    counts = np.bincount(places.ravel(), minlength=size)
    mass = np.bincount(places.ravel(), weights.ravel(), minlength=size)
    return counts.reshape(shape), mass.reshape(shape)


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


def hit_rates(profile: Profile, shares: Sequence[float], expert_bytes: np.ndarray) -> np.ndarray:
    """Share of a text's expert reads (bytes) that hit the experts kept fast, which other texts chose.

    Leave-one-out: for each text the experts with the most reads a byte of budget are chosen by all other
    texts, domains alike. ``shares`` are budgets, of the bytes of all routed experts; ``expert_bytes`` is that
    of one expert of each layer, ``(L,)``. Returns float ``(budgets, texts)``.
    """
    reads = _rates(profile.counts) * profile.k  # an expert's reads a token
    n_experts = reads.shape[2]
    cost = np.repeat(expert_bytes, n_experts)
    hits = np.zeros((len(shares), len(reads)))
    domains = np.array(profile.domains)
    for text in range(len(reads)):
        rest = np.arange(len(reads)) != text
        means = [reads[rest & (domains == domain)].mean(axis=0) for domain in dict.fromkeys(domains[rest])]
        order = np.argsort(-np.mean(means, axis=0).ravel(), kind="stable")
        spent = cost[order].cumsum()
        own = (reads[text].ravel() * cost)[order]
        for row, share in enumerate(shares):
            hits[row, text] = own[spent <= share * cost.sum() * (1 + 1e-9)].sum() / own.sum()
    return hits
