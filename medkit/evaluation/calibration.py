"""Does a model know when it is right? Calibration of its probabilities, and what it would score if it could abstain.

Confidence is the probability of the chosen option, so only scored answers count: generated ones carry none. Answers of
equal confidence are never told apart: they share a bin, and where a coverage cuts through them, what is expected over
their orders counts. Weights are how often each row stands in a resample, whole numbers, one resample per row of
(resamples, n); weighing is the same as repeating. Nothing is recalibrated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd

from medkit import statistics
from medkit.stage import MedkitError

KEYS = ["variant", "source", "scoring"]
COVERAGE = 0.8  # of `accuracy_at_80`


class CalibrationError(MedkitError):
    """Answers whose probabilities are none."""


# --- confidence, and answers in its order ----------------------------------------------------------------------------


def add_confidence(judged: pd.DataFrame) -> pd.DataFrame:
    """The scored answers of a judged table with `confidence`, the probability of the choice.

    Raises CalibrationError unless each row's probabilities are one distribution, the choice is one of its options, and
    a variant answered each question once per scoring (asked in several ways: measure one way at a time).
    """
    scored = judged[judged.probabilities.notna()]
    if (again := scored.duplicated([*KEYS, "id"])).any():
        row = scored[again].iloc[0]
        raise CalibrationError(
            f"{row.variant}, {row.id}: answered twice by {row.scoring}; keep one study and condition"
        )
    matrix, choice = _matrix(scored.probabilities), scored.choice.to_numpy(int)
    wrong = (matrix < 0).any(axis=1) | ~np.isclose(matrix.sum(axis=1), 1, atol=1e-4)
    wrong |= (choice < 0) | (choice >= [len(p) for p in scored.probabilities])
    if wrong.any():
        row = scored[wrong].iloc[0]
        raise CalibrationError(
            f"{row.variant}, {row.id}: choice {row.choice} with probabilities {list(row.probabilities)}; they must be "
            "at least 0, sum to 1 and hold the choice"
        )
    return scored.assign(confidence=matrix[np.arange(len(matrix)), choice])


def _matrix(probabilities: Sequence[Sequence[float]]) -> np.ndarray:
    """(n, most options), zeros where a question has fewer."""
    lengths = np.array([len(p) for p in probabilities], int)
    matrix = np.zeros((len(lengths), lengths.max(initial=0)))
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = np.concatenate([*probabilities, np.empty(0)])
    return matrix


class _Ranking:
    """An order of answers from least to most confident, those of equal confidence in one block."""

    def __init__(self, confidence: Sequence[float]) -> None:
        confidence = np.asarray(confidence, float)
        self.order = np.argsort(confidence, kind="stable")
        ranked = confidence[self.order]
        self.starts = np.flatnonzero(np.diff(ranked, prepend=-1.0))
        self.level = ranked[self.starts]

    def per_block(self, counts: np.ndarray) -> np.ndarray:
        """(resamples, n) in the rows' own order → sums (resamples, blocks), ranked."""
        counts = counts.astype(np.int32)[:, self.order]
        return counts if len(self.starts) == counts.shape[1] else np.add.reduceat(counts, self.starts, axis=1)

    def tally(self, correct: Sequence[bool], weights: np.ndarray | None = None) -> _Tally:
        correct = np.asarray(correct, bool)
        weights = np.ones((1, len(correct)), int) if weights is None else np.atleast_2d(weights)
        return _Tally(self.level, self.per_block(weights), self.per_block(weights * correct))


@dataclass(frozen=True)
class _Tally:
    """Answers and right answers per block, each (resamples, blocks); `level` is the blocks' confidence."""

    level: np.ndarray
    count: np.ndarray
    right: np.ndarray

    @cached_property
    def count_to(self) -> np.ndarray:
        """Answers up to each block, itself included."""
        return np.cumsum(self.count, axis=1, dtype=np.int32)

    @cached_property
    def right_to(self) -> np.ndarray:
        return np.cumsum(self.right, axis=1, dtype=np.int32)


def _rows_at_once(width: int) -> int:
    """Resamples to handle together: few, so that the processor's cache holds them; changes no result."""
    return max(1, 2**17 // width)


def _single(values: np.ndarray, weights: np.ndarray | None) -> float | np.ndarray:
    """One number for one row of weights or none, else one per resample."""
    return values if weights is not None and np.ndim(weights) == 2 else float(values[0])


# --- calibration -----------------------------------------------------------------------------------------------------


def ece(confidence: Sequence[float], correct: Sequence[bool], bins: int, weights=None) -> float | np.ndarray:
    """Expected calibration error, 0 to 1: Σ over bins of its share of answers · |accuracy − mean confidence|.

    Bins hold equal shares of the answers: an answer's bin is that of the middle rank of all answers as confident as it,
    so ties stay together, and with many of them bins differ in size or are empty. Biased upwards: chance alone makes
    accuracy and confidence differ, the more the fewer answers a bin has. Read it beside `ece_if_calibrated`.
    """
    tally = _Ranking(confidence).tally(correct, weights)
    return _single(_ece(tally, _bin_edges(tally, bins)), weights)


def ece_if_calibrated(
    confidence: Sequence[float], groups: Sequence, bins: int, draws: int, seed: int = 0
) -> np.ndarray:
    """The ECE of `draws` imagined models of these confidences that are calibrated: right with that probability.

    One draw of luck serves a whole group of near-duplicates: they are right and wrong together, as far as their
    confidences allow. That is the most they can hang together, so on the safe side.
    """
    ranking, confidence, draw = _Ranking(confidence), np.asarray(confidence, float), np.random.default_rng(seed)
    codes = pd.factorize(np.asarray(groups))[0]
    sure = ranking.tally(np.ones(len(confidence)))
    edges, at_once, found = _bin_edges(sure, bins), _rows_at_once(len(confidence)), []
    for start in range(0, draws, at_once):
        luck = draw.random((min(at_once, draws - start), codes.max() + 1))
        found.append(_ece(replace(sure, right=ranking.per_block(luck[:, codes] < confidence)), edges))
    return np.concatenate(found)


def _bin_edges(tally: _Tally, bins: int) -> np.ndarray:
    """First block of each bin and the end of the last, (resamples, bins + 1)."""
    twice_middle = 2 * tally.count_to - tally.count
    limits = 2 * tally.count_to[:, -1:] * np.arange(bins) / bins
    edges = [np.searchsorted(middle, limit) for middle, limit in zip(twice_middle, limits, strict=True)]
    return np.column_stack([edges, np.full(len(edges), len(tally.level))])


def _ece(tally: _Tally, edges: np.ndarray) -> np.ndarray:
    gap = np.zeros((len(tally.right), len(tally.level) + 1))
    np.cumsum(tally.count * tally.level - tally.right, axis=1, out=gap[:, 1:])
    at_edges = np.take_along_axis(gap, np.broadcast_to(edges, (len(gap), edges.shape[1])), axis=1)
    return np.abs(np.diff(at_edges, axis=1)).sum(axis=1) / tally.count_to[:, -1]


def brier_losses(probabilities: Sequence[Sequence[float]], answer: Sequence[int]) -> np.ndarray:
    """Brier's (1950) loss of each answer, 0 to 2: Σ over options of (probability − 1 if it is the answer, else 0)².

    Twice the usual loss of a question with two options. Questions may differ in their number of options.
    """
    matrix, answer = _matrix(probabilities), np.asarray(answer, int)
    return (matrix**2).sum(axis=1) - 2 * matrix[np.arange(len(matrix)), answer] + 1


def brier(probabilities: Sequence[Sequence[float]], answer: Sequence[int], weights=None) -> float | np.ndarray:
    """Mean of `brier_losses`: a proper score, so it rewards knowing and being calibrated at once."""
    losses = brier_losses(probabilities, answer)
    weights_2d = np.ones((1, len(losses))) if weights is None else np.atleast_2d(weights)
    return _single(statistics.weighted_mean(losses, weights_2d), weights)


def reliability(judged: pd.DataFrame, confidence: float, bins: int = 10) -> pd.DataFrame:
    """The reliability diagram's table: the bins of `ece`, least confident first, empty ones left out.

    Columns variant, source, scoring, bin (1 …), mean_confidence, value (accuracy), ci_low, ci_high (Wilson), n.
    """
    rows = []
    for key, table in add_confidence(judged).groupby(KEYS, sort=False):
        tally = _Ranking(table.confidence).tally(table.correct)
        (edges,), count, right = _bin_edges(tally, bins), tally.count[0], tally.right[0]
        for number, (start, end) in enumerate(pairwise(edges), 1):
            if n := int(count[start:end].sum()):
                hits = int(right[start:end].sum())
                mean = float(count[start:end] @ tally.level[start:end] / n)
                rows.append((*key, number, mean, hits / n, *statistics.wilson(hits, n, confidence), n))
    return pd.DataFrame(rows, columns=[*KEYS, "bin", "mean_confidence", "value", "ci_low", "ci_high", "n"])


# --- abstention ------------------------------------------------------------------------------------------------------


def risk_coverage(confidence: Sequence[float], correct: Sequence[bool]) -> pd.DataFrame:
    """Risk if only the most confident answers are given: n, coverage (n / all) and risk (share of them wrong).

    n = 1 … all. Among equally confident answers each is as likely to be given as another.
    """
    tally = _Ranking(confidence).tally(correct)
    count, right = tally.count[0, ::-1], tally.right[0, ::-1]
    given = np.arange(1, count.sum() + 1)
    wrong = np.interp(given, np.append(0, np.cumsum(count)), np.append(0, np.cumsum(count - right)))
    return pd.DataFrame({"n": given, "coverage": given / len(given), "risk": wrong / given})


def aurc(confidence: Sequence[float], correct: Sequence[bool], weights=None) -> float | np.ndarray:
    """Area under the risk–coverage curve (Geifman, Uziel & El-Yaniv 2019), 0 to 1, less is better.

    The mean risk over coverages 1/n … 1. A ranking that knows nothing has the error rate r; a perfect one has about
    r + (1 − r)·ln(1 − r).
    """
    return _single(_aurc(_Ranking(confidence).tally(correct, weights)), weights)


def accuracy_at(
    coverage: float, confidence: Sequence[float], correct: Sequence[bool], weights=None
) -> float | np.ndarray:
    """Accuracy on the most confident share of answers, rounded up to whole answers; at coverage 1 the accuracy."""
    return _single(_accuracy_at(coverage, _Ranking(confidence).tally(correct, weights)), weights)


def answers_at(coverage: float, n) -> int | np.ndarray:
    """Number of answers given at a coverage of n: the smallest that reaches it."""
    return np.ceil(np.round(coverage * np.asarray(n), 9)).astype(int)


def _aurc(tally: _Tally) -> np.ndarray:
    # a block of m answers, e wrong, after b given with w wrong, adds Σ_j (w + j·e/m) / (b + j) for j = 1 … m,
    # which is e + (w − b·e/m)·(H(b + m) − H(b)) with the harmonic numbers H
    total, total_right = tally.count_to[:, -1:], tally.right_to[:, -1:]
    before = total - tally.count_to
    before_wrong = before - (total_right - tally.right_to)
    rate = (tally.count - tally.right) / np.maximum(tally.count, 1)
    harmonic = np.append(0, np.cumsum(1 / np.arange(1, total.max() + 1)))
    steps = -np.diff(harmonic[np.hstack([total, before])], axis=1)
    area = ((before_wrong - before * rate) * steps).sum(axis=1)
    return (area + (total - total_right)[:, 0]) / total[:, 0]


def _accuracy_at(coverage: float, tally: _Tally) -> np.ndarray:
    total = tally.count_to[:, -1]
    given = answers_at(coverage, total)
    # the block in which the coverage ends is the first beyond the answers that are kept back
    ends = [np.searchsorted(row, kept, side="right") for row, kept in zip(tally.count_to, total - given, strict=True)]
    at = (np.arange(len(ends)), ends)
    in_block = tally.count_to[at] - (total - given)
    above = tally.right_to[:, -1] - tally.right_to[at]
    return (above + in_block * tally.right[at] / tally.count[at]) / given


# --- every variant ---------------------------------------------------------------------------------------------------


def measure_calibration(
    judged: pd.DataFrame, confidence: float, bins: int = 10, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """ECE, Brier, AURC and accuracy at 80 % coverage of every variant, source and scoring that has probabilities.

    Columns variant, source, scoring, metric (ece, brier, aurc, accuracy_at_80), value, ci_low, ci_high, n,
    ece_if_calibrated (the mean of the function of that name; NaN but for ece). n is the answers that count: of
    accuracy_at_80 those given. Intervals resample whole near-duplicate groups (`judged.group`):
    brier, aurc: percentiles. If all answers are right or all wrong, AURC has the Wilson interval of the error rate.
    ece: 2·value − the upper percentile … the upper percentile, for its resamples are biased upwards once more; from 0
    if a calibrated model would show as much, so that ci_low > 0 says that a miscalibration was detected.
    accuracy_at_80: Wilson's, of as many answers as explain the resamples' variance, at most those given.
    """
    rows = []
    for key, table in add_confidence(judged).groupby(KEYS, sort=False):
        for row in _measure(table, confidence, bins, resamples, seed):
            rows.append((*key, *row))
    return pd.DataFrame(rows, columns=[*KEYS, "metric", "value", "ci_low", "ci_high", "n", "ece_if_calibrated"])


def _measure(table: pd.DataFrame, confidence: float, bins: int, resamples: int, seed: int) -> Iterator[tuple]:
    ranking, losses = _Ranking(table.confidence), brier_losses(table.probabilities, table.answer)

    def metrics(weights: np.ndarray) -> np.ndarray:
        tally = ranking.tally(table.correct, weights)
        loss = statistics.weighted_mean(losses, weights)
        return np.column_stack(
            [_ece(tally, _bin_edges(tally, bins)), loss, _aurc(tally), _accuracy_at(COVERAGE, tally)]
        )

    n, tails = len(table), [(1 - confidence) / 2, (1 + confidence) / 2]
    value = metrics(np.ones((1, n), int))[0]
    drawn, step = statistics.resample_groups(table.group, resamples, seed), _rows_at_once(n)
    found = np.concatenate([metrics(w[i : i + step]) for w in drawn for i in range(0, len(w), step)])
    low, high = np.quantile(found, tails, axis=0)
    calibrated = ece_if_calibrated(table.confidence, table.group, bins, resamples, seed)
    low[0] = 0 if value[0] <= np.quantile(calibrated, tails[1]) else max(0, 2 * value[0] - high[0])
    if (wrong := int((~table.correct).sum())) in (0, n):
        low[2], high[2] = statistics.wilson(wrong, n, confidence)
    given, share = int(answers_at(COVERAGE, n)), value[3]
    variance = found[:, 3].var()
    worth = min(given, share * (1 - share) / variance) if variance > 0 and 0 < share < 1 else given
    low[3], high[3] = statistics.wilson(share * worth, worth, confidence)
    low, high = np.minimum(low, value), np.maximum(high, value)
    yield "ece", value[0], low[0], high[0], n, calibrated.mean()
    for i, (metric, answers) in enumerate((("brier", n), ("aurc", n), ("accuracy_at_80", given)), 1):
        yield metric, value[i], low[i], high[i], answers, np.nan
