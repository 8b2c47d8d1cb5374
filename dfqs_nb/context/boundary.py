"""How accuracy falls with context length: counts, the curve, the failure boundary and its interval.

Answers about one text are correlated, so the bootstrap draws whole texts, of each length apart. Contexts are
compared on a log2 scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import hypot, inf, log2, nan
from typing import Any

import numpy as np
import pandas as pd

from dfqs_nb import stats
from dfqs_nb.core.display import counted
from dfqs_nb.stats import LEVEL, N_BOOT, bootstrap_weights, expanded_tail, wilson_of_clusters

SHARE = 0.85  # of the short-context ability: NoLiMa's rule (Modarressi et al. 2025, arXiv:2502.05167)
ENOUGH_TEXTS = 12  # with fewer, a boundary is provisional
# Each draw of the bootstrap counts with the two measured lengths that its crossing lies between. That is
# wide: 93 % of the draws cover the truth in 95 % of simulated runs (tests/benchmarks/boundary_coverage.py).
BRACKET_LEVEL = 0.93
FAILED_LENGTHS = 2  # planned lengths in a row that must clearly fail before longer ones are left out
CLOSE = 0.3  # octaves: an interval of the crossing that is not halved


def bracket(lengths: Any, accuracy: Any, threshold: Any) -> tuple[np.ndarray, np.ndarray]:
    """The two measured lengths around the first crossing; the longest length and inf where there is none.

    >>> [float(edge) for edge in bracket([256, 512, 1024], [1.0, 1.0, 0.5], 0.75)]
    [512.0, 1024.0]
    """
    lengths = np.asarray(lengths, float)
    below = np.asarray(accuracy, float) < np.asarray(threshold, float)[..., None]
    first = np.argmax(below, -1)
    lower = np.where(below.any(-1), lengths[np.maximum(first - 1, 0)], lengths[-1])
    return lower, np.where(below.any(-1), lengths[first], inf)


def crossing(lengths: Any, accuracy: Any, threshold: float) -> float:
    """Where an accuracy first falls below the threshold, in tokens, linear in log2(length); inf: nowhere.

    >>> round(crossing([256, 512, 1024], [1.0, 1.0, 0.5], 0.75))
    724
    """
    low, high = map(float, bracket(lengths, accuracy, threshold))
    if high in (low, inf):  # below from the start, or never
        return high
    above, below = np.interp((low, high), lengths, accuracy)
    return float(low * (high / low) ** ((above - threshold) / (above - below)))


@dataclass(frozen=True)
class Counts:
    """Right answers and questions, by text (rows) and length in tokens (columns, ascending)."""

    lengths: np.ndarray  # int (L,)
    successes: np.ndarray  # float (texts, L)
    trials: np.ndarray  # 0 where a text was not asked
    planned: np.ndarray  # bool (L,); the other lengths were added where the accuracy crosses
    guess_rate: float = 0.0
    right: np.ndarray = field(init=False)  # of n answers at each length, (L,)
    n: np.ndarray = field(init=False)
    accuracy: np.ndarray = field(init=False)
    fit: np.ndarray = field(init=False)  # the accuracy that does not increase
    a_0: float = field(init=False)  # accuracy at the shortest length; NaN where nothing was asked
    threshold: float = field(init=False)  # where `SHARE` of the ability above guessing is left
    n_texts: int = field(init=False)  # the fewest that were asked at a length

    def __post_init__(self) -> None:
        right, n = self.successes.sum(0), self.trials.sum(0)
        a_0 = float(right[0] / n[0]) if len(n) else nan
        threshold = self.guess_rate + SHARE * (a_0 - self.guess_rate)
        vars(self).update(right=right, n=n, accuracy=right / n, fit=stats.non_increasing(right, n))
        vars(self).update(a_0=a_0, threshold=threshold, n_texts=int(min((self.trials > 0).sum(0), default=0)))

    @classmethod
    def of(cls, items: pd.DataFrame) -> Counts:
        """Count answers; a length that was broken off (fewer than half of the shortest's texts) is left out.

        The guess rate is a property of the prompt set: 1/K with K keys, 0 with a single key.
        """
        if items.empty:
            return cls(np.empty(0, int), np.empty((0, 0)), np.empty((0, 0)), np.empty(0, bool))
        table = items.groupby(["haystack", "length"])["correct"].agg(["sum", "count"]).unstack(fill_value=0)
        right, trials = table["sum"].to_numpy(float), table["count"].to_numpy(float)
        n_texts, lengths = (trials > 0).sum(0), table["sum"].columns.to_numpy()
        kept = 2 * n_texts >= n_texts[0]
        planned = items.groupby("length")["planned"].any().reindex(lengths).to_numpy(bool)
        n_keys = int(items["n_needles"].max())
        guess = 1 / n_keys if n_keys > 1 else 0.0
        return cls(lengths[kept], right[:, kept], trials[:, kept], planned[kept], guess)

    def curve(self) -> pd.DataFrame:
        """``length``, ``planned``, ``correct``, ``n``, ``texts``, ``accuracy``, ``low``, ``high``, ``fit``.

        And ``curve`` = clip((accuracy - g) / (a_0 - g), 0, 1), which is 0 where a_0 is at chance. Its limits,
        ``curve_low`` and ``curve_high``, are not clipped; NaN at the shortest length, and where a_0 may be at
        chance.
        """
        right, n, able = self.right.astype(int), self.n.astype(int), self.a_0 - self.guess_rate
        curve = (self.accuracy - self.guess_rate) / able if able > 0 else np.zeros(len(self.lengths))
        table = pd.DataFrame({"length": self.lengths, "planned": self.planned, "correct": right, "n": n})
        table["texts"], table["accuracy"] = (self.trials > 0).sum(0), self.accuracy
        table["low"], table["high"] = ends = wilson_of_clusters(self.successes, self.trials)
        low, high = stats.ratios_to_first(*(values - self.guess_rate for values in (self.accuracy, *ends)))
        return table.assign(fit=self.fit, curve=np.clip(curve, 0, 1), curve_low=low, curve_high=high)

    def boundary(self, *, n_boot: int = N_BOOT, seed: int = 0) -> Boundary:
        """Where the non-increasing fit crosses ``g + 0.85 (a_0 - g)``.

        The interval spans the measured lengths around the crossings of the fit, the accuracies, and 93 % of
        the draws (more for few texts: Hesterberg 2015, The American Statistician 69:371).
        """
        about: dict[str, Any] = {"a_0": self.a_0, "threshold": self.threshold, "guess_rate": self.guess_rate}
        about |= {"n_haystacks": self.n_texts, "n_items": int(self.n.sum())}
        about["provisional"] = self.n_texts < ENOUGH_TEXTS
        if wilson_of_clusters(self.successes, self.trials)[0][0] <= self.guess_rate:
            return Boundary(0, None, None, False, "floor", None, **about)
        low, high = self._interval(n_boot, seed)
        tokens, first = (crossing(self.lengths, a, self.threshold) for a in (self.fit, self.accuracy))
        censored = tokens == inf
        return Boundary(
            tokens=int(self.lengths[-1]) if censored else round(tokens),
            low=round(low),
            high=None if high == inf else round(high),
            right_censored=censored,
            status="right_censored" if censored else "measured",
            cause=None if censored else "quality",
            **about,
            first_crossing=None if first == inf else round(first),
            not_monotone=self._rises(),
        )

    def _interval(self, n_boot: int, seed: int) -> tuple[float, float]:
        if self.n_texts < 2:
            return 0.0, inf  # one text says nothing about others
        right, n = np.empty((2, n_boot, len(self.lengths)))  # of texts drawn anew
        for k, length in enumerate(self.lengths):
            asked = self.trials[:, k] > 0
            weights = bootstrap_weights(int(asked.sum()), n_boot, seed * 1_000_003 + int(length))
            right[:, k], n[:, k] = weights @ self.successes[asked, k], weights @ self.trials[asked, k]
        thresholds = self.guess_rate + SHARE * (right[:, 0] / n[:, 0] - self.guess_rate)
        lower, upper = bracket(self.lengths, stats.non_increasing(right, n), thresholds)
        own = [bracket(self.lengths, values, self.threshold) for values in (self.fit, self.accuracy)]
        tail = expanded_tail(self.n_texts, BRACKET_LEVEL)
        low, high = np.quantile(lower, tail, method="lower"), np.quantile(upper, 1 - tail, method="higher")
        return float(min(low, *(low for low, _ in own))), float(max(high, *(high for _, high in own)))

    def _change(self, a: int, b: int, level: float) -> tuple[float, float]:
        """Limits of the fall of accuracy from column ``a`` to ``b``: Newcombe's hybrid of their intervals.

        Statistics in Medicine 17 (1998) 873, method 10.
        """
        low, high = wilson_of_clusters(self.successes, self.trials, level)
        down, up, fall = self.accuracy - low, high - self.accuracy, float(self.accuracy[a] - self.accuracy[b])
        return fall - hypot(down[a], up[b]), fall + hypot(up[a], down[b])

    def _rises(self) -> bool:
        """Whether the accuracy recovers from below the threshold, beyond chance (5 %, Bonferroni)."""
        below = self.accuracy < self.threshold
        later = [(int(i), j) for i in np.flatnonzero(below) for j in range(i + 1, len(below)) if not below[j]]
        level = 1 - (1 - LEVEL) / max(1, len(later))  # what is not below is above all that is
        return any(self._change(i, j, level)[1] < 0 for i, j in later)

    def largest_fall(self) -> dict[str, float]:
        """The largest fall from a planned length to the next, per octave, as a share of the ability at a_0.

        With its 95 % interval, corrected for the number of steps; empty without a step or with a_0 at chance.
        """
        steps, able = list(pairwise(np.flatnonzero(self.planned).tolist())), self.a_0 - self.guess_rate
        if not steps or able <= 0:
            return {}
        level, rows = 1 - (1 - LEVEL) / len(steps), []
        for a, b in steps:
            scale = able * log2(self.lengths[b] / self.lengths[a])
            low, high = self._change(a, b, level)
            fall = float(self.accuracy[a] - self.accuracy[b])
            rows.append((fall / scale, low / scale, high / scale, a, b))
        fall, _, _, a, b = max(rows)
        ends = {"start": int(self.lengths[a]), "end": int(self.lengths[b])}
        return {**ends, "fall": fall, "low": max(row[1] for row in rows), "high": max(row[2] for row in rows)}


@dataclass(frozen=True)
class Boundary:
    """The failure boundary in tokens of context."""

    tokens: int  # the longest length measured, which it exceeds, where `right_censored`; 0 for a floor
    low: int | None  # the 95 % interval
    high: int | None  # None: open
    right_censored: bool
    status: str  # measured, right_censored, floor (a_0 is at chance), or not measured
    cause: str | None  # quality, n_ctx, oom, decode_error, nan_logits; budget: nothing measured; or None
    a_0: float
    threshold: float
    guess_rate: float
    n_haystacks: int  # the fewest texts of a length
    n_items: int  # answers in all
    first_crossing: int | None = None  # of the accuracies themselves
    not_monotone: bool = False  # the accuracy recovers beyond chance, so the fit is not the data
    provisional: bool = False  # fewer than 12 texts

    def as_dict(self) -> dict[str, Any]:
        """Plain values, and the sentence."""
        return {**asdict(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The boundary as a sentence, with every reservation."""
        if self.status == "not measured":
            return f"was not measured (cause: {self.cause})"
        if self.status == "floor":
            return f"is no better than chance at any length (a_0 = {self.a_0:.2f})"
        low = "below the shortest text" if self.low is None else f"{self.low:,}"
        high = "beyond the longest text" if self.high is None else f"{self.high:,} tokens"
        notes = [f"95 % interval {low} to {high}"]
        notes += [f"cause: {self.cause}"] if self.cause not in (None, "quality") else []
        if self.not_monotone:
            notes.append(f"not monotone: accuracy first crosses at {self.first_crossing or 0:,} and recovers")
        if self.provisional:
            texts = counted(self.n_haystacks, "texts a length")
            notes.append(f"provisional: {texts}, fewer than {ENOUGH_TEXTS}")
        what = "loses 15 % of its short-context ability at" if self.cause == "quality" else "stops at"
        what = "holds to the longest length measured," if self.right_censored else what
        return f"{what} {self.tokens:,} tokens ({'; '.join(notes)})"

    def capped(self, length: int, cause: str) -> Boundary:
        """The smaller of this boundary and the first length that could not be run."""
        if self.status == "floor" or (not self.right_censored and self.tokens <= length):
            return self
        low, high = min(self.low or length, length), min(self.high or length, length)
        cut: dict[str, Any] = {"tokens": length, "low": low, "high": high, "right_censored": False}
        return replace(self, **cut, status="measured", cause=cause)


# ---- which lengths to measure ----


def octaves(shortest: int, longest: int) -> list[int]:
    """Lengths ``shortest * 2^k`` up to ``longest``."""
    return [shortest * 2**k for k in range(int(log2(longest / shortest)) + 1)] if longest >= shortest else []


def search_lengths(
    measure: Callable[[int, bool], Counts | None], grid: Sequence[int], rounds: int = 1
) -> Counts | None:
    """Measure the grid up to a clear failure, then halve ``rounds`` times the intervals of the crossings.

    Those are of the fit and of the accuracies themselves. ``measure`` takes a length and whether it is of the
    grid, and returns all counts so far, or None, which ends the search. What comes next depends on these
    counts alone, so a resumed search repeats itself.
    """
    counts = None
    for length in grid:
        if (done := measure(length, True)) is None:
            return counts
        counts = done
        high = wilson_of_clusters(counts.successes, counts.trials)[1][counts.planned]
        if len(high) > FAILED_LENGTHS and (high[-FAILED_LENGTHS:] < counts.threshold).all():
            break  # these fail by their whole intervals
    for _ in range(rounds):
        if counts is None:
            return None
        middles = set()
        for values in (counts.fit, counts.accuracy):
            low, high = map(float, bracket(counts.lengths, values, counts.threshold))
            if low < high < inf and log2(high / low) > CLOSE:
                middles.add(round((low * high) ** 0.5))
        for length in sorted(middles - set(counts.lengths.tolist())):
            if (done := measure(length, False)) is None:
                return counts
            counts = done
    return counts


# ---- two models, side by side ----


def paired(items: pd.DataFrame, baseline: pd.DataFrame) -> dict[str, float]:
    """The ``difference`` in accuracy to a baseline, over the questions that both were asked.

    With its interval (bootstrap over texts), and what one alone got right: ``only_this``, ``only_baseline``.
    """
    keys, low, high = ["haystack", "length", "question"], -1.0, 1.0  # one text says nothing about others
    both = items[[*keys, "correct"]].merge(baseline[[*keys, "correct"]], on=keys, suffixes=("", "_baseline"))
    change = both["correct"].astype(int) - both["correct_baseline"].astype(int)
    sums, n = change.groupby(both["haystack"]).agg(["sum", "count"]).to_numpy(float).T
    if len(n) > 1:
        weights, tail = bootstrap_weights(len(n), N_BOOT, 0), expanded_tail(len(n), LEVEL)
        low, high = np.quantile((weights @ sums) / (weights @ n), [tail, 1 - tail]).tolist()
    only = {"only_this": int((change > 0).sum()), "only_baseline": int((change < 0).sum())}
    return {"difference": float(change.mean()), "low": low, "high": high, **only}
