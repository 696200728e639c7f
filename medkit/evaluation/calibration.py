"""Calibration of a model's confidence, and its accuracy when it may leave out the answers it is least sure of.

Confidence is the probability of the chosen option, so only scored answers count: generated ones have none. Answers of
equal confidence are treated alike: they share a bin, and where only some of them fit a coverage, the mean over all
their orders counts. Nothing is recalibrated here.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medkit import statistics

KEYS = ["variant", "source", "scoring"]
COVERAGE = 0.8  # of `accuracy_at_80`


def add_confidence(judged: pd.DataFrame) -> pd.DataFrame:
    """The scored answers of a judged table with the column `confidence`, the probability of the choice."""
    scored = judged[judged.probabilities.notna()]
    return scored.assign(confidence=[p[i] for p, i in zip(scored.probabilities, scored.choice, strict=True)])


def tally(confidence: Sequence[float], correct: Sequence[bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each distinct confidence (`level`), ascending, with its number of answers (`count`) and right ones (`right`)."""
    level, level_of, count = np.unique(np.asarray(confidence, float), return_inverse=True, return_counts=True)
    return level, count, np.bincount(level_of, np.asarray(correct, bool))


def find_bins(count: np.ndarray, bins: int) -> np.ndarray:
    """Bin, 0 … bins − 1, of each level of confidence: bins hold equal shares of the answers; middle ranks decide."""
    limits = 2 * count.sum() * np.arange(bins) / bins
    return np.searchsorted(limits, 2 * np.cumsum(count) - count, side="right") - 1


def ece(level: np.ndarray, count: np.ndarray, right: np.ndarray, bins: int) -> float:
    """Expected calibration error, 0 to 1: Σ over bins of its share of answers · |accuracy − mean confidence|.

    Biased upwards: chance alone makes accuracy and confidence differ, the more the fewer answers a bin has. Read it
    beside `ece_if_calibrated`.
    """
    gaps = np.bincount(find_bins(count, bins), right - count * level)
    return float(np.abs(gaps).sum() / count.sum())


def ece_if_calibrated(
    confidence: Sequence[float], groups: Sequence, bins: int, draws: int, seed: int = 0
) -> np.ndarray:
    """The ECE, (draws,), of simulated calibrated models: each answer is right with the probability `confidence`.

    One random number serves a whole group of near-duplicates, so they are right and wrong together as far as their
    confidences allow: the widest spread, hence the safe choice.
    """
    confidence, codes = np.asarray(confidence, float), pd.factorize(np.asarray(groups))[0]
    _, level_of, count = np.unique(confidence, return_inverse=True, return_counts=True)
    in_bin = np.eye(bins)[find_bins(count, bins)][level_of]  # (n, bins)
    right = np.random.default_rng(seed).random((draws, codes.max() + 1))[:, codes] < confidence  # (draws, n)
    return np.abs((right - confidence) @ in_bin).sum(axis=1) / len(confidence)


def brier_losses(probabilities: Sequence[Sequence[float]], answer: Sequence[int]) -> np.ndarray:
    """Brier's (1950) loss of each answer, 0 to 2: Σ over options of (probability − 1 if it is the answer, else 0)².

    Its mean rewards knowledge and calibration at once. Twice the usual loss of a question with two options.
    """
    return np.array([np.dot(p, p) - 2 * p[a] + 1 for p, a in zip(map(np.asarray, probabilities), answer, strict=True)])


def risks(count: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Share of wrong answers among the n most confident, n = 1 … all: the risk–coverage curve.

    Its mean is AURC (Geifman, Uziel & El-Yaniv 2019), 0 to 1, less is better. At an error rate r a random order has r,
    a perfect one about r + (1 − r)·ln(1 − r).
    """
    wrong = (1 - right / np.maximum(count, 1))[::-1]  # of answers of equal confidence, most confident first
    return np.cumsum(np.repeat(wrong, count[::-1])) / np.arange(1, count.sum() + 1)


def risk_coverage(confidence: Sequence[float], correct: Sequence[bool]) -> pd.DataFrame:
    """The risk–coverage curve as a table: n, coverage (n / all) and risk."""
    risk = risks(*tally(confidence, correct)[1:])
    given = np.arange(1, len(risk) + 1)
    return pd.DataFrame({"n": given, "coverage": given / len(given), "risk": risk})


def reliability(judged: pd.DataFrame, confidence: float, bins: int = 10) -> pd.DataFrame:
    """The reliability diagram's table: the bins of `ece`, least confident first, empty ones left out.

    Columns variant, source, scoring, bin (1 …), mean_confidence, value (accuracy), ci_low, ci_high (Wilson), n.
    """
    rows = []
    for key, table in add_confidence(judged).groupby(KEYS, sort=False):
        level, count, _ = tally(table.confidence, table.correct)
        for number, part in table.groupby(1 + find_bins(count, bins)[np.searchsorted(level, table.confidence)]):
            interval = statistics.wilson(int(part.correct.sum()), len(part), confidence)
            rows.append((*key, number, part.confidence.mean(), part.correct.mean(), *interval, len(part)))
    return pd.DataFrame(rows, columns=[*KEYS, "bin", "mean_confidence", "value", "ci_low", "ci_high", "n"])


def measure_calibration(
    judged: pd.DataFrame, confidence: float, bins: int = 10, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """ECE, Brier, AURC and accuracy at 80 % coverage of every variant, source and scoring that has probabilities.

    Columns variant, source, scoring, metric (ece, brier, aurc, accuracy_at_80), value, ci_low, ci_high, n,
    ece_if_calibrated (mean of that function; NaN but for ece). n: answers that count, of accuracy_at_80 those given.
    Intervals are percentiles over resamples of whole near-duplicate groups (`judged.group`), with bins and order of the
    answers as measured. ece: from 2·value − the upper percentile, since a resample adds its own bias to the value's;
    from 0 if a calibrated model would show as much, so that ci_low > 0 says that a miscalibration was detected.
    accuracy_at_80: Wilson's, of the answers given; aurc: Wilson's of the error rate if all answers are right or wrong.
    """
    rows = []
    for key, table in add_confidence(judged).groupby(KEYS, sort=False):
        rows += [(*key, *row) for row in _measure(table, confidence, bins, resamples, seed)]
    return pd.DataFrame(rows, columns=[*KEYS, "metric", "value", "ci_low", "ci_high", "n", "ece_if_calibrated"])


def _measure(table: pd.DataFrame, confidence: float, bins: int, resamples: int, seed: int) -> list[tuple]:
    n, tails = len(table), [(1 - confidence) / 2, (1 + confidence) / 2]
    given = int(np.ceil(round(COVERAGE * n, 9)))  # the smallest number that reaches the coverage
    order = np.argsort(-table.confidence.to_numpy(), kind="stable")  # most confident first
    sure, correct = table.confidence.to_numpy()[order], table.correct.to_numpy(bool)[order]
    losses = brier_losses(table.probabilities, table.answer)[order]
    level, count, right = tally(sure, correct)
    level_of = np.searchsorted(level, sure)
    in_bin = np.eye(bins)[find_bins(count, bins)][level_of]  # (n, bins)
    wrong = 1 - (right / count)[level_of]  # answers of equal confidence share their mean

    def measure(times: np.ndarray) -> np.ndarray:
        """ECE, Brier and AURC, (resamples, 3), of samples that hold each row so many `times`, (resamples, n)."""
        size = times.sum(axis=1)
        gaps = np.abs((times * (correct - sure)) @ in_bin).sum(axis=1)
        risk = np.cumsum(times * wrong, axis=1) / np.maximum(np.cumsum(times, axis=1), 1)
        return np.column_stack([gaps, times @ losses, (times * risk).sum(axis=1)]) / size[:, None]

    value = np.append(measure(np.ones((1, n)))[0], 1 - risks(count, right)[given - 1])
    chunks = statistics.resample_groups(table.group, resamples, seed)
    low, high = np.quantile(np.vstack([measure(times[:, order].astype(float)) for times in chunks]), tails, axis=0)
    calibrated = ece_if_calibrated(table.confidence, table.group, bins, resamples, seed)
    low[0] = 0 if value[0] <= np.quantile(calibrated, tails[1]) else max(0, 2 * value[0] - high[0])
    errors = int((~correct).sum())
    if errors in (0, n):
        low[2], high[2] = statistics.wilson(errors, n, confidence)
    at_coverage = statistics.wilson(value[3] * given, given, confidence)
    low, high = np.minimum([*low, at_coverage[0]], value), np.maximum([*high, at_coverage[1]], value)
    metrics = zip(("ece", "brier", "aurc", "accuracy_at_80"), value, low, high, (n, n, n, given), strict=True)
    return [(*row, calibrated.mean() if row[0] == "ece" else np.nan) for row in metrics]
