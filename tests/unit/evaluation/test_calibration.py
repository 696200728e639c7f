"""Calibration and abstention: against slow definitions, against scikit-learn, and intervals that cover the truth."""

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from medkit import statistics
from medkit.evaluation import calibration

METRICS = ["ece", "brier", "aurc", "accuracy_at_80"]


def answers(n, seed=0, ties=False, skill=1.0):
    """Confidences and whether right; calibrated at skill 1, overconfident below."""
    draw = np.random.default_rng(seed)
    confidence = draw.choice([0.25, 0.5, 0.75, 1.0], n) if ties else 0.25 + 0.75 * draw.beta(2, 2, n)
    return confidence, draw.random(n) < 0.25 + skill * (confidence - 0.25)


def table(n, seed=0, skill=1.0, ties=False, **columns):
    """A judged table of questions with four options, option 0 chosen."""
    confidence, correct = answers(n, seed, ties, skill)
    draw = np.random.default_rng(seed + 1)
    rest = draw.dirichlet(np.ones(3), n) * (1 - confidence)[:, None]
    others = 1 + (draw.random((n, 1)) * (1 - confidence)[:, None] > np.cumsum(rest, axis=1)).sum(axis=1).clip(max=2)
    columns = {"variant": "lora", "source": "exam", "scoring": "letter", "group": np.arange(n), **columns}
    return pd.DataFrame({
        **columns,
        "id": [f"q{i}" for i in range(n)],
        "choice": 0,
        "answer": np.where(correct, 0, others),
        "correct": correct,
        "probabilities": list(np.column_stack([confidence, rest])),
    })  # fmt: skip


def ece(confidence, correct, bins):
    """By its definition; an answer's bin is that of the middle rank of all answers as confident as it."""
    ranks = pd.Series(confidence).rank(method="average").to_numpy() - 0.5
    place, total = np.floor(bins * ranks / len(ranks) + 1e-12).astype(int), 0.0
    for number in range(bins):
        inside = place == number
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return total / len(confidence)


@pytest.mark.parametrize(("n", "ties"), [(7, True), (90, False), (240, True)])
def test_values_are_those_of_the_definitions_and_of_scikit_learn(n, ties):
    judged = table(n, seed=11, ties=ties)
    scored = calibration.add_confidence(judged)
    value = calibration.measure_calibration(judged, 0.95, resamples=20).set_index("metric").value
    risk = calibration.risk_coverage(scored.confidence, scored.correct).risk
    probabilities = np.stack(judged.probabilities)
    assert value.to_dict() == pytest.approx({
        "ece": ece(scored.confidence.to_numpy(), scored.correct.to_numpy(), 10),
        "brier": brier_score_loss(judged.answer, probabilities, labels=range(4), scale_by_half=False),
        "aurc": risk.mean(),
        "accuracy_at_80": 1 - risk[int(np.ceil(0.8 * n)) - 1],
    })  # fmt: skip
    assert calibration.brier_losses([[1.0, 0.0], [0.0, 0.0, 1.0]], [0, 0]).tolist() == [0, 2]


def test_copies_of_a_question_add_no_evidence():
    confidence = answers(120)[0]
    alone = calibration.ece_if_calibrated(confidence, np.arange(120), 10, 300)
    copied = calibration.ece_if_calibrated(np.tile(confidence, 3), np.tile(np.arange(120), 3), 10, 300)
    assert copied == pytest.approx(alone)
    assert calibration.ece_if_calibrated(np.tile(confidence, 3), np.arange(360), 10, 300).mean() < 0.7 * alone.mean()


def test_reliability_is_sklearns_calibration_curve_and_holds_the_ece():
    judged = table(200, seed=6)
    ours = calibration.reliability(judged, 0.95, bins=8)
    scored = calibration.add_confidence(judged)
    accuracy, mean = calibration_curve(scored.correct, scored.confidence, n_bins=8, strategy="quantile")
    assert ours.value.to_numpy() == pytest.approx(accuracy)
    assert ours.mean_confidence.to_numpy() == pytest.approx(mean)
    assert list(ours.bin) == list(range(1, 9)) and set(ours.n) == {25}
    from_bins = (ours.n * (ours.value - ours.mean_confidence).abs()).sum() / ours.n.sum()
    assert from_bins == pytest.approx(ece(scored.confidence, scored.correct, 8))
    for row in ours.itertuples():
        by_wilson = statistics.wilson(round(row.value * row.n), row.n, 0.95)  # every question is its own group here
        assert (row.ci_low, row.ci_high) == pytest.approx(by_wilson, abs=0.04)


def test_risks_are_means_over_the_orders_of_the_equally_confident():
    confidence, correct = answers(23, seed=9, ties=True)
    draw, curves = np.random.default_rng(0), []
    for _ in range(4000):
        order = np.lexsort([draw.random(len(confidence)), -confidence])
        curves.append(np.cumsum(~correct[order]) / np.arange(1, len(order) + 1))
    assert calibration.risk_coverage(confidence, correct).risk.to_numpy() == pytest.approx(np.mean(curves, 0), abs=0.02)


def test_one_row_per_metric_of_everything_that_has_probabilities():
    kinds = [(variant, source) for variant in "ab" for source in ("exam", "mmlu")]
    tables = [table(50, seed=i, variant=variant, source=source) for i, (variant, source) in enumerate(kinds)]
    generated = table(20, scoring="generated").assign(probabilities=None, choice=-1, correct=False)
    measured = calibration.measure_calibration(pd.concat([*tables, generated]), 0.95, resamples=50)
    assert measured.groupby(calibration.KEYS).metric.apply(list).to_dict() == {(*k, "letter"): METRICS for k in kinds}
    assert (measured.ci_low <= measured.value).all() and (measured.value <= measured.ci_high).all()
    assert (measured.n == measured.metric.map({"accuracy_at_80": 40}).fillna(50)).all()


def test_answers_from_the_least_confidence_on_are_those_of_the_coverage():
    judged = pd.concat([table(90, seed=11, ties=True), table(35, seed=12, variant="nf4")])
    scored, least = calibration.add_confidence(judged), calibration.least_confidence(judged)
    for key, answers_of in scored.groupby(calibration.KEYS):
        sure, given = answers_of.confidence, int(np.ceil(0.8 * len(answers_of)))
        assert (sure > least[key]).sum() < given <= (sure >= least[key]).sum()


def test_near_duplicates_widen_the_intervals():
    judged = table(120, seed=13)
    copies = pd.concat([judged.assign(id=judged.id + mark) for mark in "abcd"], ignore_index=True)
    alone = copies.assign(group=np.arange(480))

    def widths(tables):
        measured = calibration.measure_calibration(tables, 0.95, resamples=300).set_index("metric")
        return (measured.ci_high - measured.ci_low)[METRICS[1:3]].to_numpy()

    assert (widths(copies) > 1.6 * widths(alone)).all()  # 2 = √4, with the noise of the resamples


def test_an_interval_has_a_width_even_if_all_answers_agree():
    for right in (True, False):
        judged = table(30).assign(answer=0 if right else 1, correct=right)
        measured = calibration.measure_calibration(judged, 0.95, resamples=50).set_index("metric")
        assert measured.value[["aurc", "accuracy_at_80"]].tolist() == [1 - right, right]
        assert (measured.ci_high - measured.ci_low)[["aurc", "accuracy_at_80"]].min() > 0.1


def test_intervals_cover_the_truth():
    runs, skill = 60, 0.7
    large = calibration.add_confidence(table(50_000, seed=999, skill=skill))
    risk = calibration.risk_coverage(large.confidence, large.correct).risk
    brier = calibration.brier_losses(large.probabilities, large.answer).mean()
    truth = [ece(large.confidence, large.correct, 10), brier, risk.mean(), 1 - risk[40_000 - 1]]
    covered = np.zeros(4)
    for run in range(runs):
        judged = table(120, seed=1000 + run, skill=skill)
        measured = calibration.measure_calibration(judged, 0.95, resamples=150, seed=run)
        covered += measured.ci_low.le(truth).to_numpy() & measured.ci_high.ge(truth).to_numpy()
    assert covered.min() / runs > 0.88, covered


def test_a_calibrated_model_is_rarely_called_miscalibrated_and_an_overconfident_one_often():
    def share_detected(skill):
        tables = [table(150, seed=2000 + i, skill=skill) for i in range(40)]
        return np.mean([calibration.measure_calibration(t, 0.95, resamples=150).ci_low[0] > 0 for t in tables])

    assert share_detected(1.0) < 0.1
    assert share_detected(0.2) > 0.8
