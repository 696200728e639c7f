"""Intervals and tests for shares of questions answered right, alone and in pairs; numpy, scipy and statsmodels only.

Two kinds of each: one as if questions were independent, and one for questions in groups (near-duplicates), where whole
groups are drawn, or swap sides, at once. With one question in every group both say the same. No table of the project is
known here: `evaluation` brings the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import optimize, sparse, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from medkit.stage import MedkitError

RESAMPLES = 2000
CELLS_AT_ONCE = 4_000_000  # multiplicities held at a time: bounds memory, changes no result


class StatisticsError(MedkitError):
    """Numbers that an interval or a test cannot be made of."""


# --- intervals -----------------------------------------------------------------------------------------------------


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval of a proportion; keeps its coverage at small n and near 0 and 1."""
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)  # exact where rounding leaves dust


def resample_groups(groups: Sequence, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each row stands in bootstrap resamples of whole groups: int16 chunks of (some resamples, rows).

    As many groups are drawn, with replacement, as there are. Any statistic that takes weights can be resampled with
    these. The same groups and seed give the same resamples.
    """
    codes = pd.factorize(np.asarray(groups))[0]
    if not len(codes) or codes.min() < 0:
        raise StatisticsError(f"{len(codes)} rows, {(codes < 0).sum()} of them in no group: every row needs a group")
    for drawn in _draw(codes.max() + 1, resamples, seed, len(codes)):
        yield drawn[:, codes]


def _draw(count: int, resamples: int, seed: int, width: int) -> Iterator[np.ndarray]:
    """Multiplicities of `count` things in chunks of resamples, as many as have CELLS_AT_ONCE cells at this width."""
    draw, at_once = np.random.default_rng(seed), max(1, CELLS_AT_ONCE // max(count, width))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        cells = draw.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(cells.ravel(), minlength=rows * count).reshape(rows, count).astype(np.int16)


def bootstrap_interval(
    values, groups: Sequence, statistic: Callable, confidence: float, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of a statistic under resampling of whole groups.

    statistic(values, weights) → one number per resample; weights: a chunk of `resample_groups`, (resamples, rows).
    """
    found = np.concatenate([statistic(values, weights) for weights in resample_groups(groups, resamples, seed)])
    low, high = np.nanquantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean of the values per row of weights: the simplest statistic for `bootstrap_interval`."""
    return weights @ np.asarray(values, float) / weights.sum(axis=1)


def mean_intervals(
    values: np.ndarray, groups: Sequence, confidence: float, imagined: Sequence[float] = (), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of the bootstrap intervals of all columns' means, from the same resamples of whole groups.

    A NaN is a row that its column lacks. `imagined` values stand in every column, each in a group of its own, so that
    columns without variation get no interval of width 0: (0, 0, 1, 1) for a proportion (Agresti & Coull 1998), (−1, 1)
    for a difference of pairs (Bonett & Price 2012). The interval holds the mean of the given values.
    """
    values, codes = np.asarray(values, float), pd.factorize(np.asarray(groups))[0]
    mean, extra = np.nanmean(values, axis=0), np.asarray(imagined, float)
    values = np.vstack([values, np.repeat(extra[:, None], values.shape[1], axis=1)])
    codes = np.append(codes, codes.max() + 1 + np.arange(len(extra)))
    member = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))  # (groups, rows)
    sums, counts = member @ np.nan_to_num(values), member @ ~np.isnan(values)  # (groups, columns)
    found = []
    for drawn in _draw(len(sums), RESAMPLES, seed, len(sums)):
        drawn, rows = drawn.astype(float), drawn @ counts
        found.append(np.divide(drawn @ sums, rows, out=np.full(rows.shape, np.nan), where=rows > 0))
    low, high = np.nanquantile(np.vstack(found), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.minimum(low, mean), np.maximum(high, mean)


def median_interval(values: Sequence[float], confidence: float, seed: int = 0) -> tuple[float, float, float]:
    """Median of repeated timings and its bootstrap percentile interval; with one repeat the interval is that value."""
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.median(values)), float(values.min()), float(values.max())
    found = stats.bootstrap(
        (values,), np.median, confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(np.median(values)), float(found.low), float(found.high)


# --- pairs ---------------------------------------------------------------------------------------------------------


def paired_difference(
    ours: Sequence[bool], theirs: Sequence[bool], confidence: float, power: float, groups: Sequence | None = None
) -> dict:
    """ours − theirs on the same questions: difference, interval, flips, p-values, minimum detectable effect.

    ci: Wald with one pseudo-observation per discordant cell (Bonett & Price 2012), which holds its coverage at small n.
    p_value, p_mid: McNemar's tests. p_clustered: `sign_flip_p`. Without groups every question is its own.
    design_effect: variance of the difference by groups over that of independent questions, at least 1. mde:
    `detectable_effect` of n / design_effect questions, if as many answers flip as did here (with the
    pseudo-observations).
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    if ours.shape != theirs.shape or not len(ours):
        raise StatisticsError(f"paired answers must be of the same questions: {len(ours)} and {len(theirs)}")
    n, gained, lost = len(ours), int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre, spread = up - down, up + down - (up - down) ** 2
    half = stats.norm.ppf(0.5 + confidence / 2) * np.sqrt(spread / (n + 2))
    codes = np.arange(n) if groups is None else pd.factorize(np.asarray(groups))[0]
    sums, sizes = np.bincount(codes, ours.astype(float) - theirs), np.bincount(codes)
    by_group = np.sum((sums - centre * sizes) ** 2) + (1 - centre) ** 2 + (1 + centre) ** 2
    design_effect = max(1.0, by_group / ((n + 2) * spread))
    exact, mid = mcnemar_p(gained, lost)
    return {
        "difference": (gained - lost) / n,
        "ci_low": max(-1.0, centre - half),
        "ci_high": min(1.0, centre + half),
        "n": n,
        "gained": gained,
        "lost": lost,
        "p_value": exact,
        "p_mid": mid,
        "p_clustered": sign_flip_p(sums),
        "design_effect": float(design_effect),
        "mde": detectable_effect(max(1, round(n / design_effect)), up + down, confidence, power),
    }


def mcnemar_p(gained: int, lost: int) -> tuple[float, float]:
    """McNemar's test of two numbers of flips: exact p, and mid-p (Fagerland, Lydersen & Laake 2013), two-sided.

    mid-p counts outcomes as likely as this one by half: less conservative, and no longer sure to keep its size.
    """
    if not gained + lost:
        return 1.0, 1.0
    exact = float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue)
    as_likely = stats.binom.pmf(gained, gained + lost, 0.5) * (1 if gained == lost else 2)
    return exact, float(exact - as_likely / 2)


def sign_flip_p(sums: Sequence[int]) -> float:
    """Exact two-sided p of groups' sums of differences, if each group as a whole could as well have the other sign.

    With sums of −1, 0 and 1 this is McNemar's exact test. Groups that lean neither way on the whole suffice when there
    are many (Canay, Romano & Shaikh 2017).
    """
    sums = np.rint(np.asarray(sums)).astype(int)
    chances = np.ones(1)  # of the sum being 2·place − (the last place)
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        steps = np.zeros(size * count + 1)
        steps[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    reached = np.abs(2 * np.arange(len(chances)) - (len(chances) - 1)) >= abs(sums.sum())
    return min(1.0, float(chances[reached].sum()))


@lru_cache(maxsize=4096)
def detectable_effect(n: int, flip_rate: float, confidence: float, power: float) -> float:
    """Smallest true difference that McNemar's exact test, alone and before Holm, finds with `power` at n questions.

    `flip_rate` of the answers flip; a difference beyond it takes more flips, then all of them go one way. So no effect
    is stated that cannot be: where too few answers flip, it is what the test needs at all. 1.0 where not even n flips
    one way are significant.
    """

    def missing(difference: float) -> float:
        rate = max(flip_rate, difference)
        low, high = stats.binom.ppf([1e-9, 1 - 1e-9], n, rate)
        flips = np.arange(low, high + 1)
        most = stats.binom.isf((1 - confidence) / 2, flips, 0.5)  # gained beyond this is significant
        found = stats.binom.sf(most, flips, (1 + difference / rate) / 2)
        return power - float(stats.binom.pmf(flips, n, rate) @ found)

    return 1.0 if missing(1.0) > 0 else float(optimize.brentq(missing, 0.0, 1.0, xtol=1e-6))


def equivalence_p(gained: int, lost: int, n: int, margin: float, design_effect: float = 1.0) -> float:
    """p of two one-sided tests that the true difference of a pair lies within ±margin.

    Score tests, the variance under the margin itself by restricted maximum likelihood (Nam 1997; Tango 1998), whose
    size Liu, Hsueh, Hsieh & Chen (2002) found better than that of Wald's. p below α says what an interval of
    confidence 1 − 2α inside ±margin says. Counts are divided by the design effect (Rao & Scott 1992).
    """
    if not 0 < margin < 1:
        raise StatisticsError(f"margin is {margin}: a difference of two shares, between 0 and 1")

    def one_sided(b: float, c: float) -> float:  # against b/n − c/n ≤ −margin
        slope = -b - c - (2 * n - b + c) * margin
        against = (np.sqrt(slope**2 - 8 * n * c * margin * (1 + margin)) - slope) / (4 * n)  # share of c, restricted
        return stats.norm.sf((b - c + n * margin) / np.sqrt(n * design_effect * (2 * against - margin * (1 + margin))))

    return float(max(one_sided(gained, lost), one_sided(lost, gained)))


def verdicts(table: pd.DataFrame, confidence: float, margin: float) -> pd.DataFrame:
    """A table of `paired_difference` rows, judged as one family: every comparison gets one plain word.

    p_holm: Holm over p_clustered. p_equivalence_holm: Holm over `equivalence_p`, a family of its own; within_margin if
    below α = 1 − confidence. verdict: better or worse if p_holm is below α (however small the difference: see
    within_margin), else equivalent if within_margin, else not detectable.
    """
    counts = zip(table.gained, table.lost, table.n, table.design_effect, strict=True)
    equivalence = np.array([equivalence_p(b, c, n, margin, effect) for b, c, n, effect in counts])
    p_holm, equivalence_holm = (multipletests(p, method="holm")[1] for p in (table.p_clustered, equivalence))
    differs, within = p_holm < 1 - confidence, equivalence_holm < 1 - confidence
    return table.assign(
        p_holm=p_holm,
        p_equivalence=equivalence,
        p_equivalence_holm=equivalence_holm,
        margin=margin,
        within_margin=within,
        verdict=np.select(
            [differs & (table.difference > 0), differs & (table.difference < 0), within],
            ["better", "worse", "equivalent"],
            "not detectable",
        ),
    )
