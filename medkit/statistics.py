"""Intervals and tests for the share of questions answered right, and for the difference of two such shares.

Each exists in two forms: for independent questions, and for questions in groups of near-duplicates, where whole groups
are resampled or change sign. With one question per group both forms agree.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests

from medkit.stage import MedkitError

RESAMPLES = 2000
CELLS_AT_ONCE = 4_000_000  # counts held at a time: bounds memory, changes no result


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval of a proportion; keeps its coverage at small n and near 0 and 1."""
    return tuple(stats.binomtest(int(successes), n).proportion_ci(confidence, "wilson"))


def resample_groups(groups: Sequence, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each row occurs in bootstrap resamples of whole groups: int16 chunks of (some resamples, rows).

    As many groups are drawn, with replacement, as there are. The same groups and seed give the same resamples. Raises
    MedkitError for a row without a group.
    """
    codes = _group_numbers(groups)
    count = codes.max() + 1
    draw, at_once = np.random.default_rng(seed), max(1, CELLS_AT_ONCE // len(codes))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        cells = draw.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        drawn = np.bincount(cells.ravel(), minlength=size * count).reshape(size, count).astype(np.int16)
        yield drawn[:, codes]


def _group_numbers(groups: Sequence) -> np.ndarray:
    codes = pd.factorize(np.asarray(groups))[0]
    if not len(codes) or codes.min() < 0:
        raise MedkitError(f"{len(codes)} rows, {(codes < 0).sum()} of them in no group: every row needs a group")
    return codes


def mean_intervals(
    values: np.ndarray, groups: Sequence, confidence: float, imagined: Sequence[float] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of the percentile bootstrap intervals of the means of all columns, (columns,) each.

    Whole groups are resampled, the same ones for all columns. NaN: the column lacks this row. `imagined` values are
    added to every column, each as a group of its own, so that no interval has width 0: (0, 0, 1, 1) for a proportion
    (Agresti & Coull 1998), (−1, 1) for a difference of pairs (Bonett & Price 2012). The interval includes the mean.
    """
    values, codes = np.asarray(values, float), _group_numbers(groups)
    mean, extra = np.nanmean(values, axis=0), np.asarray(imagined, float)
    values = np.vstack([values, np.repeat(extra[:, None], values.shape[1], axis=1)])
    codes = np.append(codes, codes.max() + 1 + np.arange(len(extra)))
    values, present = np.nan_to_num(values), (~np.isnan(values)).astype(float)
    with np.errstate(invalid="ignore"):  # 0 / 0: none of a column's rows was drawn
        drawn = (times.astype(float) for times in resample_groups(codes, RESAMPLES))
        means = np.vstack([(times @ values) / (times @ present) for times in drawn])
    low, high = np.nanquantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.minimum(low, mean), np.maximum(high, mean)


def share_interval(holds: Sequence[bool], groups: Sequence, confidence: float) -> tuple[float, float]:
    """`mean_intervals` of one proportion."""
    low, high = mean_intervals(np.asarray(holds, float)[:, None], groups, confidence, imagined=(0, 0, 1, 1))
    return float(low[0]), float(high[0])


def median_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of repeated timings: too few are taken for an interval."""
    return float(np.median(values)), float(np.min(values)), float(np.max(values))


def gap_closed(
    low: Sequence[float], middle: Sequence[float], high: Sequence[float], groups: Sequence, confidence: float
) -> dict:
    """Share of the gap between two models that a third one closes: (middle − low) / (high − low) of their means.

    low, middle, high (rows,): scores of the three models on the same rows. The intervals are percentile bootstraps over
    whole groups. Returns gap, gap_low, gap_high, share, ci_low, ci_high and n. If the interval of the gap is not
    above zero, no gap is shown, and share and its interval are NaN.
    """
    scores = np.array([low, middle, high], float)  # (3, rows)
    means = np.vstack([drawn @ scores.T / drawn.sum(1, keepdims=True) for drawn in resample_groups(groups)])
    ends = [(1 - confidence) / 2, (1 + confidence) / 2]
    gaps, gap = means[:, 2] - means[:, 0], scores[2].mean() - scores[0].mean()
    gap_low, gap_high = np.quantile(gaps, ends)
    share = ci_low = ci_high = np.nan
    if gap_low > 0:
        share = (scores[1].mean() - scores[0].mean()) / gap
        shares = np.divide(means[:, 1] - means[:, 0], gaps, out=np.full(len(gaps), np.nan), where=gaps != 0)
        ci_low, ci_high = np.nanquantile(shares, ends)
    result = dict(gap=gap, gap_low=gap_low, gap_high=gap_high, share=share, ci_low=ci_low, ci_high=ci_high)
    return {name: float(value) for name, value in result.items()} | {"n": scores.shape[1]}


def paired_difference(
    ours: Sequence[bool], theirs: Sequence[bool], confidence: float, power: float, groups: Sequence | None = None
) -> dict:
    """ours − theirs on the same questions: difference, interval, flips, p-values, minimum detectable effect.

    groups: of near-duplicates; None: every question is its own. ci: Wald with one pseudo-observation per discordant
    cell (Bonett & Price 2012), which keeps its coverage at small n, wider by the root of the design effect.
    p_value: `sign_flip_p` of whole groups, which is McNemar's exact test where groups are single questions.
    design_effect: variance of the difference by groups over that of independent questions, at least 1, and larger where
    there are few groups. mde: `detectable_effect` at n / design_effect questions and the flip rate seen here (with the
    pseudo-observations).
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    if ours.shape != theirs.shape or not len(ours):
        raise MedkitError(f"paired answers must be of the same questions: {len(ours)} and {len(theirs)}")
    n, gained, lost = len(ours), int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre, spread = up - down, up + down - (up - down) ** 2
    codes = np.arange(n) if groups is None else _group_numbers(groups)
    sums, sizes = np.bincount(codes, ours.astype(float) - theirs), np.bincount(codes)
    by_group = np.sum((sums - centre * sizes) ** 2) + (1 - centre) ** 2 + (1 + centre) ** 2
    design_effect, count = max(1.0, by_group / ((n + 2) * spread)), len(sums)
    deviations = stats.norm.ppf(0.5 + confidence / 2)
    if 1 < count < n:  # few groups say little of their own variance: as with Student's t in place of the normal
        ratio = stats.t.ppf(0.5 + confidence / 2, count - 1) / deviations
        design_effect *= count / (count - 1) * ratio**2
    elif count < n:
        design_effect = float(n)
    half = deviations * np.sqrt(design_effect * spread / (n + 2))
    return {
        "difference": (gained - lost) / n,
        "ci_low": max(-1.0, centre - half),
        "ci_high": min(1.0, centre + half),
        "n": n,
        "gained": gained,
        "lost": lost,
        "p_value": sign_flip_p(sums),
        "design_effect": float(design_effect),
        "mde": detectable_effect(max(1, round(n / design_effect)), up + down, confidence, power),
    }


def sign_flip_p(sums: Sequence[int]) -> float:
    """Exact two-sided p of groups' sums of differences if each group's sign is random (Canay, Romano & Shaikh 2017).

    With sums of −1, 0 and 1 this is McNemar's exact test.
    """
    sums = np.rint(np.asarray(sums)).astype(int)
    chances = np.ones(1)  # chances[i]: that the sum is 2·i − (len − 1)
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        steps = np.zeros(size * count + 1)
        steps[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, steps)
    reached = np.abs(2 * np.arange(len(chances)) - (len(chances) - 1)) >= abs(sums.sum())
    return min(1.0, float(chances[reached].sum()))


@lru_cache(maxsize=4096)
def detectable_effect(n: int, flip_rate: float, confidence: float, power: float) -> float:
    """Smallest true difference that McNemar's exact test, before Holm, detects with `power` at n questions.

    `flip_rate` of the answers flip; a larger difference needs more flips, and then all go one way. 1.0 if not even n
    flips one way are significant.
    """

    def missing_power(difference: float) -> float:
        rate = max(flip_rate, difference)
        low, high = stats.binom.ppf([1e-9, 1 - 1e-9], n, rate)
        flips = np.arange(low, high + 1)
        most = stats.binom.isf((1 - confidence) / 2, flips, 0.5)  # gained beyond this is significant
        detected = stats.binom.sf(most, flips, (1 + difference / rate) / 2)
        return power - float(stats.binom.pmf(flips, n, rate) @ detected)

    return 1.0 if missing_power(1.0) > 0 else float(optimize.brentq(missing_power, 0.0, 1.0, xtol=1e-6))


def equivalence_p(gained: int, lost: int, n: int, margin: float, design_effect: float = 1.0) -> float:
    """p of two one-sided tests: a small p shows that the true difference of a pair lies within ±margin.

    Score tests with the variance at the margin by restricted maximum likelihood (Nam 1997; Tango 1998). p below α means
    that an interval of confidence 1 − 2α lies inside ±margin. Counts are divided by the design effect (Rao & Scott
    1992).
    """

    def one_sided(b: float, c: float) -> float:  # against b/n − c/n ≤ −margin
        slope = -b - c - (2 * n - b + c) * margin
        # restricted estimate of the share of c
        against = (np.sqrt(slope**2 - 8 * n * c * margin * (1 + margin)) - slope) / (4 * n)
        return stats.norm.sf((b - c + n * margin) / np.sqrt(n * design_effect * (2 * against - margin * (1 + margin))))

    return float(max(one_sided(gained, lost), one_sided(lost, gained)))


def verdicts(table: pd.DataFrame, confidence: float, margin: float | Sequence[float]) -> pd.DataFrame:
    """Add adjusted p values and a verdict to a table of `paired_difference` rows, which is one family of tests.

    `margin`: of every row, or one for each.
    p_holm: Holm over p_value. p_equivalence_holm: Holm over `equivalence_p`, a family of its own; within_margin: it
    is below α = 1 − confidence. verdict: better or worse if p_holm is below α (however small the difference), else
    equivalent if within_margin, else not detectable.
    """
    margins = np.broadcast_to(margin, len(table))
    counts = zip(table.gained, table.lost, table.n, margins, table.design_effect, strict=True)
    equivalence = np.array([equivalence_p(*row) for row in counts])
    p_holm, equivalence_holm = (multipletests(p, method="holm")[1] for p in (table.p_value, equivalence))
    differs, within = p_holm < 1 - confidence, equivalence_holm < 1 - confidence
    return table.assign(
        p_holm=p_holm,
        p_equivalence=equivalence,
        p_equivalence_holm=equivalence_holm,
        margin=margins,
        within_margin=within,
        verdict=np.select(
            [differs & (table.difference > 0), differs & (table.difference < 0), within],
            ["better", "worse", "equivalent"],
            "not detectable",
        ),
    )
