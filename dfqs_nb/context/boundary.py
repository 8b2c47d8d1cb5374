"""How accuracy falls with context length: counts, intervals, the boundary, and which lengths to measure next.

Pure arithmetic on counts. A haystack is one text with its needles; its answers stick together, so haystacks,
not answers, are what the bootstrap draws. Contexts are compared on a log2 scale throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, log2
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
from dfqs_nb.stats import LEVEL, N_BOOT, bootstrap_weights, expanded_tail, non_increasing, wilson  # MOVED

SHARE = 0.85  # of what the model can do at short lengths; DFQS's failure boundary lies where it is lost
REFERENCE_TOKENS = 512  # a_0 is pooled up to here
NO_WEIGHT = 1e-6  # of a question: next to nothing, and still exact beside sums of thousands


def crossing(lengths: Any, accuracy: Any, threshold: Any) -> np.ndarray:
    """Where a non-increasing accuracy first falls below the threshold, in tokens; inf where it never does.

    Linear in log2(length) between neighbours; the first length where the accuracy is below from the start.

    >>> crossing([256, 512, 1024], [1.0, 1.0, 0.5], 0.75).round().tolist()
    724.0
    """
    x, accuracy = np.log2(np.asarray(lengths, float)), np.asarray(accuracy, float)
    threshold = np.asarray(threshold, float)
    below = accuracy < threshold[..., None]
    after = np.minimum(np.maximum(np.argmax(below, -1), 1), len(x) - 1)  # of one length there is no other
    upper = np.take_along_axis(accuracy, after[..., None] - 1, -1)[..., 0]
    lower = np.take_along_axis(accuracy, after[..., None], -1)[..., 0]
    part = np.clip((upper - threshold) / np.where(upper > lower, upper - lower, 1), 0, 1)
    at = x[after - 1] + part * (x[after] - x[after - 1])
    return np.where(below.any(-1), 2 ** np.where(below[..., 0], x[0], at), inf)


@dataclass(frozen=True)
class Counts:
    """Right answers and questions, by haystack (rows) and length in tokens (columns, ascending).

    ``reference`` marks the lengths that a_0 is pooled over: planned ones up to 512 tokens. Lengths added
    where the curve falls are not among them, so that a_0 does not depend on what was found.
    """

    lengths: np.ndarray
    successes: np.ndarray
    trials: np.ndarray
    reference: np.ndarray

    @classmethod
    def of(cls, items: pd.DataFrame, reference_tokens: int = REFERENCE_TOKENS) -> Counts:
        """Count a frame with columns ``haystack``, ``length``, ``planned`` and ``correct``, a row an
        answer.
        """
        table = items.groupby(["haystack", "length"])["correct"].agg(["sum", "count"]).unstack(fill_value=0)
        lengths = table["sum"].columns.to_numpy()
        planned = items.groupby("length")["planned"].any().reindex(lengths).to_numpy()
        marked = planned & (lengths <= reference_tokens)
        marked = marked if marked.any() else np.arange(len(lengths)) == 0
        return cls(lengths, table["sum"].to_numpy(float), table["count"].to_numpy(float), marked)

    def up_to(self, length: int) -> Counts:
        """The counts of the lengths up to this one."""
        kept = self.lengths <= length
        return Counts(self.lengths[kept], self.successes[:, kept], self.trials[:, kept], self.reference[kept])

    @property
    def n_haystacks(self) -> int:
        """Haystacks, the units of the bootstrap."""
        return len(self.successes)

    def a_0(self) -> float:
        """Accuracy at short lengths, pooled."""
        return float(self.successes[:, self.reference].sum() / self.trials[:, self.reference].sum())

    def threshold(self, guess_rate: float = 0.0, share: float = SHARE) -> float:
        """The accuracy at which ``share`` of the model's ability above guessing is left."""
        return guess_rate + share * (self.a_0() - guess_rate)

    def fit(self) -> np.ndarray:
        """The non-increasing accuracy at each length."""
        return non_increasing(self.successes.sum(0), self.trials.sum(0))


@dataclass(frozen=True)
class Boundary:
    """The failure boundary in tokens of context.

    Attributes:
        tokens: the boundary; where ``right_censored`` the longest length measured, which it exceeds; 0 where
            the model fails at every length (``floor``).
        low, high: the 95 % interval from a bootstrap over haystacks; ``high`` is None where it is open.
        right_censored: the accuracy never crossed the threshold, so only a lower bound is known.
        status: ``"measured"``, ``"right_censored"`` or ``"floor"`` (a_0 itself is at chance).
        cause: what ends the usable context: ``"quality"``, a runtime failure (``"n_ctx"``, ``"oom"``,
            ``"decode_error"``, ``"nan_logits"``), or None where nothing did.
        a_0, threshold, guess_rate: accuracies, see DESIGN of the metric in ``Counts``.
    """

    tokens: int
    low: int | None
    high: int | None
    right_censored: bool
    status: str
    cause: str | None
    a_0: float
    threshold: float
    guess_rate: float
    n_haystacks: int
    n_items: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a stage file."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """The boundary as a sentence.

        >>> Boundary(404, 350, 470, False, "measured", "quality", 0.9, 0.76, 0.0, 20, 200).sentence
        'fails at 404 tokens (95 % interval 350 to 470; cause: quality)'
        """
        if self.status == "floor":
            return f"no better than chance at every length (a_0 = {self.a_0:.2f})"
        upper = "open" if self.high is None else f"{self.high:,}"
        interval = f"95 % interval {self.low or 0:,} to {upper}"
        if self.right_censored:
            return f"holds to the longest length measured, {self.tokens:,} tokens ({interval})"
        if self.cause != "quality":
            return f"stops at {self.tokens:,} tokens (cause: {self.cause})"
        return f"fails at {self.tokens:,} tokens ({interval}; cause: quality)"


def quality_boundary(
    counts: Counts, guess_rate: float = 0.0, *, n_boot: int = N_BOOT, seed: int = 0
) -> Boundary:
    """Where the accuracy falls below ``g + 0.85 (a_0 - g)``, with its interval from a bootstrap over
    haystacks.

    ``status`` is ``"floor"`` when Wilson's lower limit of a_0 does not exceed the guess rate. The interval is
    the expanded percentile interval (Hesterberg 2015, The American Statistician 69:371): few haystacks widen
    it by Student's t and sqrt(H / (H - 1)).
    """
    reference = counts.reference
    right, n = counts.successes[:, reference].sum(), counts.trials[:, reference].sum()
    tokens = float(crossing(counts.lengths, counts.fit(), counts.threshold(guess_rate)))
    found = Boundary(
        0,
        None,
        None,
        False,
        "floor",
        None,
        counts.a_0(),
        counts.threshold(guess_rate),
        guess_rate,
        counts.n_haystacks,
        int(counts.trials.sum()),
    )
    if wilson(right, n)[0] <= guess_rate:
        return found
    low, high = bootstrap_interval(counts, guess_rate, n_boot, seed)
    longest = int(counts.lengths[-1])
    censored = tokens == inf
    return replace(
        found,
        tokens=longest if censored else round(tokens),
        low=longest if low == inf else round(low),
        high=None if high == inf else round(high),
        right_censored=censored,
        status="right_censored" if censored else "measured",
        cause=None if censored else "quality",
    )


def bootstrap_interval(counts: Counts, guess_rate: float, n_boot: int, seed: int) -> tuple[float, float]:
    """Limits of the boundary in tokens; inf for "beyond the longest length". One haystack tells nothing:
    (0, inf).
    """
    n = counts.n_haystacks
    if n < 2:
        return 0.0, inf
    drawn = boot_boundaries(counts, guess_rate, bootstrap_weights(n, n_boot, seed))
    tail = expanded_tail(n)
    return tuple(
        float(np.quantile(drawn, q, method=method)) for q, method in ((tail, "lower"), (1 - tail, "higher"))
    )


def boot_boundaries(counts: Counts, guess_rate: float, weights: np.ndarray) -> np.ndarray:
    """The boundary in tokens of every drawn set of haystacks."""
    successes, trials = _filled(weights @ counts.successes, weights @ counts.trials)
    reference = counts.reference
    a_0 = successes[:, reference].sum(1) / trials[:, reference].sum(1)
    threshold = guess_rate + SHARE * (a_0 - guess_rate)
    return crossing(counts.lengths, non_increasing(successes, trials), threshold)


def _filled(successes: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the drawn haystacks were not asked at a length: its left neighbour's accuracy at no weight."""
    successes, trials = successes.copy(), trials.copy()
    for k in [*range(1, trials.shape[1]), *range(trials.shape[1] - 2, -1, -1)]:
        beside = k - 1 if k and trials[:, k - 1].all() else min(k + 1, trials.shape[1] - 1)
        empty = trials[:, k] == 0
        accuracy = successes[empty, beside] / trials[empty, beside]
        successes[empty, k], trials[empty, k] = accuracy * NO_WEIGHT, NO_WEIGHT
    return successes, trials


def with_runtime_failure(boundary: Boundary, length: int | None, cause: str | None) -> Boundary:
    """The smaller of the quality boundary and the first length that could not be run.

    >>> held = Boundary(1024, 900, None, True, "right_censored", None, 0.9, 0.76, 0.0, 8, 64)
    >>> with_runtime_failure(held, 2048, "oom").cause
    'oom'
    """
    if (
        length is None
        or boundary.status == "floor"
        or (not boundary.right_censored and boundary.tokens <= length)
    ):
        return boundary
    low = min(boundary.low or length, length)
    high = length if boundary.high is None else min(boundary.high, length)
    return replace(
        boundary, tokens=length, low=low, high=high, right_censored=False, status="measured", cause=cause
    )


def curve_table(counts: Counts, guess_rate: float = 0.0) -> pd.DataFrame:
    """One row a length: raw counts, Wilson's interval, the isotonic fit, and DFQS's curve.

    Columns ``length``, ``planned`` (a reference length), ``correct``, ``n``, ``accuracy``, ``low``, ``high``,
    ``fit`` and ``curve`` = clip((accuracy - g) / (a_0 - g), 0, 1), which is 0 where a_0 is at chance.
    """
    import pandas as pd

    correct, n = counts.successes.sum(0), counts.trials.sum(0)
    low, high = wilson(correct, n)
    able = counts.a_0() - guess_rate
    curve = np.clip((correct / n - guess_rate) / able, 0, 1) if able > 0 else np.zeros(len(n))
    columns = {"length": counts.lengths, "reference": counts.reference, "correct": correct.astype(int)}
    columns |= {"n": n.astype(int), "accuracy": correct / n, "low": low, "high": high}
    return pd.DataFrame({**columns, "fit": counts.fit(), "curve": curve})


# ---- which lengths to measure ----


def clearly_below(counts: Counts, grid: Sequence[int], guess_rate: float, in_a_row: int = 2) -> bool:
    """Whether the last ``in_a_row`` grid lengths measured lie below the threshold beyond doubt (Wilson).

    Only lengths from 512 tokens on count, when a_0 is complete.
    """
    seen = [
        k
        for k, length in enumerate(counts.lengths)
        if length in grid and length >= min(REFERENCE_TOKENS, grid[-1])
    ]
    high = wilson(counts.successes.sum(0), counts.trials.sum(0))[1]
    last = seen[-in_a_row:]
    return len(last) == in_a_row and bool((high[last] < counts.threshold(guess_rate)).all())


def refined_lengths(
    counts: Counts, guess_rate: float, resolution: float = 0.25, multiple: int = 1
) -> list[int]:
    """Middles (in log2) of the interval where the fit crosses the threshold and of its two neighbours.

    The neighbours are taken too because the interval itself was picked by noise: with it alone, the interval
    of the boundary is too narrow. Intervals of ``resolution`` octaves or less are left as they are.
    """
    below = np.flatnonzero(counts.fit() < counts.threshold(guess_rate))
    if not len(below) or below[0] == 0:
        return []
    x, k = np.log2(counts.lengths), below[0]
    sides = [i for i in (k - 1, k, k + 1) if 1 <= i < len(x) and x[i] - x[i - 1] > resolution * 1.2]
    middles = [2 ** ((x[i] + x[i - 1]) / 2) for i in sides]
    return sorted({round(one / multiple) * multiple for one in middles} - set(counts.lengths.tolist()))


def search_lengths(
    measure: Callable[[int, bool], Counts | None],
    grid: Sequence[int],
    guess_rate: float = 0.0,
    *,
    rounds: int = 2,
    in_a_row: int = 2,
) -> Counts | None:
    """Measure the grid upwards until it clearly fails, then between its lengths where the accuracy crosses.

    Args:
        measure: measures one length (its second argument: whether it is of the grid) and returns all counts
            so far, or None when it could not run; then the search ends.
        grid: lengths, ascending.
        rounds: how often the intervals around the crossing are halved.
        in_a_row: grid lengths that must clearly fail before longer ones are left out.

    Returns the last counts; what to measure depends on the counts alone, so a resumed search repeats itself.
    """
    counts = None
    for length in grid:
        done = measure(length, True)
        if done is None:
            return counts
        counts = done
        if clearly_below(counts, grid, guess_rate, in_a_row):
            break
    for _ in range(rounds if counts is not None else 0):
        for length in refined_lengths(counts, guess_rate):
            done = measure(length, False)
            if done is None:
                return counts
            counts = done
    return counts


def search_haystacks(
    measure: Callable[[int, int, bool], Counts | None],
    grid: Sequence[int],
    n_haystacks: int,
    guess_rate: float = 0.0,
    *,
    refine: bool = True,
    in_a_row: int = 2,
) -> Counts | None:
    """Measure haystacks that grow, one after another: all lengths of one before the next begins.

    The first quarter (at least two) goes through the whole grid. They show the others where to look
    closer (``refined_lengths``, in passing) and how far to go: to the last of ``in_a_row`` lengths that
    clearly fail. Stopping on fewer haystacks than that makes intervals too narrow.

    Args:
        measure: measures one haystack at one length (and whether that is of the grid); returns all counts of
            this search so far, or None when it could not run; then the search ends.
    """
    counts, pilot, lengths = None, max(2, n_haystacks // 4), list(grid)
    for haystack in range(n_haystacks):
        if haystack == pilot and counts is not None:
            lengths = _after_pilot(counts, grid, guess_rate, refine, in_a_row)
        for length in lengths:
            done = measure(haystack, length, length in grid)
            if done is None:
                return counts
            counts = done
    return counts


def _after_pilot(
    counts: Counts, grid: Sequence[int], guess_rate: float, refine: bool, in_a_row: int
) -> list[int]:
    failed = (n for n in grid if clearly_below(counts.up_to(n), grid, guess_rate, in_a_row))
    last = next(failed, grid[-1])
    refined = refined_lengths(counts, guess_rate) if refine else []
    return [length for length in sorted({*grid, *refined}) if length <= last]


# ---- two models, side by side ----


def paired(
    items: pd.DataFrame, baseline: pd.DataFrame, *, n_boot: int = N_BOOT, seed: int = 0
) -> pd.DataFrame:
    """The difference in accuracy to a baseline that answered the same questions, by length.

    Both frames have columns ``haystack``, ``length``, ``question`` and ``correct``; only questions that both
    answered count. Columns: ``length``, ``n``, ``accuracy``, ``baseline``, ``difference`` with its 95 %
    interval ``low`` to ``high`` (bootstrap over haystacks), ``only_this`` and ``only_baseline``:
    questions that one alone got right.
    """
    import pandas as pd

    keys = ["haystack", "length", "question"]
    both = items[[*keys, "correct"]].merge(baseline[[*keys, "correct"]], on=keys, suffixes=("", "_baseline"))
    both["difference"] = both["correct"].astype(int) - both["correct_baseline"].astype(int)
    rows = []
    for length, group in both.groupby("length"):
        low, high = _difference_interval(group, n_boot, seed)
        rows.append(
            {
                "length": length,
                "n": len(group),
                "accuracy": group["correct"].mean(),
                "baseline": group["correct_baseline"].mean(),
                "difference": group["difference"].mean(),
                "low": low,
                "high": high,
                "only_this": int((group["difference"] > 0).sum()),
                "only_baseline": int((group["difference"] < 0).sum()),
            }
        )
    return pd.DataFrame(rows)


def _difference_interval(group: pd.DataFrame, n_boot: int, seed: int) -> tuple[float, float]:
    by_haystack = group.groupby("haystack")["difference"].agg(["sum", "count"]).to_numpy(float)
    n = len(by_haystack)
    if n < 2:
        return -1.0, 1.0
    weights = bootstrap_weights(n, n_boot, seed)
    drawn = (weights @ by_haystack[:, 0]) / (weights @ by_haystack[:, 1])
    tail = expanded_tail(n, LEVEL)
    return float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail))


def octaves(shortest: int, longest: int) -> list[int]:
    """Lengths ``shortest * 2^k`` up to ``longest``.

    >>> octaves(256, 2000)
    [256, 512, 1024]
    """
    return [shortest * 2**k for k in range(int(log2(longest / shortest)) + 1)] if longest >= shortest else []
