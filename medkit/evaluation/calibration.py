"""Calibration of a model's confidence, and its accuracy when it may leave out the answers it is least sure of.

Confidence is the probability of the chosen option, so generated answers have none. Answers of equal confidence share a
bin, and where only some of them fit a coverage, the mean over all their orders counts. Nothing is recalibrated here.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from medkit import statistics

KEYS = ["variant", "source", "scoring"]
COVERAGE = 0.8  # of `accuracy_at_80`


def add_confidence(judged: pd.DataFrame) -> pd.DataFrame:
    """The scored answers of a judged table with the column `confidence`, the probability of the choice."""
    scored = judged[judged.probabilities.notna()]
    return scored.assign(confidence=[p[i] for p, i in zip(scored.probabilities, scored.choice, strict=True)])


def find_bins(confidence: Sequence[float], bins: int) -> np.ndarray:
    """Bin, 0 … bins − 1, of each answer by its rank: bins hold equal shares of the answers; equal ones share one."""
    middle_ranks = (2 * rankdata(confidence) - 1).astype(int)  # of 2n: whole numbers, so no bin depends on rounding
    return bins * middle_ranks // (2 * len(confidence))


def ece_if_calibrated(
    confidence: Sequence[float], groups: Sequence, bins: int, draws: int, seed: int = 0
) -> np.ndarray:
    """The ECE, (draws,), of simulated calibrated models: each answer is right with the probability `confidence`.

    One random number serves a whole group of near-duplicates, so they are right and wrong together as far as their
    confidences allow: the widest spread, hence the safe choice.
    """
    confidence, codes = np.asarray(confidence, float), pd.factorize(np.asarray(groups))[0]
    in_bin = np.eye(bins)[find_bins(confidence, bins)]  # (n, bins)
    right = np.random.default_rng(seed).random((draws, codes.max() + 1))[:, codes] < confidence  # (draws, n)
    return np.abs((right - confidence) @ in_bin).sum(axis=1) / len(confidence)


def brier_losses(probabilities: Sequence[Sequence[float]], answer: Sequence[int]) -> np.ndarray:
    """Brier's (1950) loss of each answer, 0 to 2: Σ over options of (probability − 1 if it is the answer, else 0)².

    Its mean rewards knowledge and calibration at once. Twice the usual loss of a question with two options.
    """
    return np.array([np.dot(p, p) - 2 * p[a] + 1 for p, a in zip(map(np.asarray, probabilities), answer, strict=True)])


def risk_coverage(confidence: Sequence[float], correct: Sequence[bool]) -> pd.DataFrame:
    """Share of wrong answers (risk) among the n most confident, n = 1 … all, with the coverage, n / all."""
    answers = pd.DataFrame({"confidence": np.asarray(confidence), "wrong": ~np.asarray(correct, bool)})
    answers = answers.sort_values("confidence", ascending=False, kind="stable", ignore_index=True)
    n = answers.index + 1
    risk = answers.groupby("confidence").wrong.transform("mean").cumsum() / n
    return pd.DataFrame({"n": n, "coverage": n / len(n), "risk": risk})


def reliability(judged: pd.DataFrame, confidence: float, bins: int = 10) -> pd.DataFrame:
    """The reliability diagram's table: the bins of the ECE, least confident first, empty ones left out.

    Columns variant, source, scoring, bin (1 …), mean_confidence, value (accuracy), ci_low, ci_high (over groups), n.
    """
    rows = []
    for key, table in add_confidence(judged).groupby(KEYS, sort=False):
        for number, part in table.groupby(1 + find_bins(table.confidence, bins)):
            interval = statistics.share_interval(part.correct, part.group, confidence)
            rows.append((*key, number, part.confidence.mean(), part.correct.mean(), *interval, len(part)))
    return pd.DataFrame(rows, columns=[*KEYS, "bin", "mean_confidence", "value", "ci_low", "ci_high", "n"])


def least_confidence(judged: pd.DataFrame) -> pd.Series:
    """The confidence of the least sure answer when a share COVERAGE of the questions is answered; index KEYS.

    A server that withholds less sure answers has the accuracy that `accuracy_at_80` states, on questions like these.
    """

    def limit(confidence: pd.Series) -> float:
        return float(np.sort(confidence)[-int(np.ceil(round(COVERAGE * len(confidence), 9)))])

    return add_confidence(judged).groupby(KEYS).confidence.agg(limit)


def measure_calibration(
    judged: pd.DataFrame, confidence: float, bins: int = 10, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Four metrics of every variant, source and scoring that has probabilities, and `ece_if_calibrated`'s mean.

    ece: expected calibration error, 0 to 1: Σ over bins of its share of answers · |accuracy − mean confidence|. Chance
    alone makes it larger than 0, the more the fewer answers a bin has: read it beside ece_if_calibrated. brier: mean of
    `brier_losses`. aurc: mean of the risk–coverage curve, 0 to 1, less is better (Geifman, Uziel & El-Yaniv 2019); at
    an error rate r a random order has r, a perfect one about r + (1 − r)·ln(1 − r). accuracy_at_80: at 80 % coverage.

    Columns variant, source, scoring, metric, value, ci_low, ci_high, n, ece_if_calibrated (NaN but for ece). n: answers
    that count, of accuracy_at_80 those given. Intervals are percentiles over resamples of whole near-duplicate groups
    (`judged.group`), with bins and order of the answers as measured. ece: from 2·value − the upper percentile, since a
    resample adds its own bias to the value's; from 0 if a calibrated model would show as much, so that ci_low > 0 says
    that a miscalibration was detected. accuracy_at_80: of the answers given; aurc: that of the error rate if all
    answers are right or wrong.
    """
    rows = []
    for key, table in add_confidence(judged).groupby(KEYS, sort=False):
        rows += [(*key, *row) for row in _measure(table, confidence, bins, resamples, seed)]
    return pd.DataFrame(rows, columns=[*KEYS, "metric", "value", "ci_low", "ci_high", "n", "ece_if_calibrated"])


def _measure(table: pd.DataFrame, confidence: float, bins: int, resamples: int, seed: int) -> list[tuple]:
    n, tails = len(table), [(1 - confidence) / 2, (1 + confidence) / 2]
    given = int(np.ceil(round(COVERAGE * n, 9)))  # the smallest number that reaches the coverage
    order = np.argsort(-table.confidence.to_numpy(), kind="stable")  # most confident first
    answers = table.iloc[order]
    sure, correct = answers.confidence.to_numpy(), answers.correct.to_numpy(bool)
    losses = brier_losses(answers.probabilities, answers.answer)
    in_bin = np.eye(bins)[find_bins(sure, bins)]  # (n, bins)
    wrong = 1 - answers.groupby("confidence").correct.transform("mean").to_numpy()

    def measure(times: np.ndarray) -> np.ndarray:
        """ECE, Brier and AURC, (resamples, 3), of samples that hold each row so many `times`, (resamples, n)."""
        size = times.sum(axis=1)
        gaps = np.abs((times * (correct - sure)) @ in_bin).sum(axis=1)
        risk = np.cumsum(times * wrong, axis=1) / np.maximum(np.cumsum(times, axis=1), 1)
        return np.column_stack([gaps, times @ losses, (times * risk).sum(axis=1)]) / size[:, None]

    value = np.append(measure(np.ones((1, n)))[0], 1 - wrong[:given].sum() / given)
    drawn = statistics.resample_groups(table.group, resamples, seed)
    low, high = np.quantile(np.vstack([measure(times[:, order].astype(float)) for times in drawn]), tails, axis=0)
    calibrated = ece_if_calibrated(table.confidence, table.group, bins, resamples, seed)
    low[0] = 0 if value[0] <= np.quantile(calibrated, tails[1]) else max(0, 2 * value[0] - high[0])
    errors = int((~correct).sum())
    if errors in (0, n):
        low[2], high[2] = statistics.share_interval(~correct, answers.group, confidence)
    at_coverage = statistics.share_interval(1 - wrong[:given], answers.group[:given], confidence)
    low, high = np.minimum([*low, at_coverage[0]], value), np.maximum([*high, at_coverage[1]], value)
    metrics = zip(("ece", "brier", "aurc", "accuracy_at_80"), value, low, high, (n, n, n, given), strict=True)
    return [(*row, calibrated.mean() if row[0] == "ece" else np.nan) for row in metrics]
