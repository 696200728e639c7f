"""Calibration and abstention: against slow definitions, against scikit-learn, and intervals that hold the truth."""

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from medkit import statistics
from medkit.evaluation import calibration
from medkit.evaluation.calibration import CalibrationError

METRICS = ["ece", "brier", "aurc", "accuracy_at_80"]


def answers(n, seed=0, ties=False, skill=1.0):
    """Confidences and whether right; the truer, the nearer `skill` is to 1 (calibrated)."""
    draw = np.random.default_rng(seed)
    confidence = draw.choice([0.25, 0.5, 0.75, 1.0], n) if ties else 0.25 + 0.75 * draw.beta(2, 2, n)
    return confidence, draw.random(n) < 0.25 + skill * (confidence - 0.25)


def table(n, seed=0, skill=1.0, **columns):
    """A judged table of questions with four options, option 0 chosen."""
    confidence, correct = answers(n, seed, skill=skill)
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
        "clean": True,
        "probabilities": list(np.column_stack([confidence, rest])),
    })  # fmt: skip


# --- slow definitions ----------------------------------------------------------------------------------------------


def slow_bins(confidence, bins):
    """Of each answer: the bin of the middle rank of those as confident as it."""
    ranks = pd.Series(confidence).rank(method="average").to_numpy() - 0.5
    return np.floor(bins * ranks / len(ranks) + 1e-12).astype(int)


def slow_ece(confidence, correct, bins):
    place, total = slow_bins(confidence, bins), 0.0
    for number in range(bins):
        inside = place == number
        if inside.any():
            total += inside.sum() * abs(correct[inside].mean() - confidence[inside].mean())
    return total / len(confidence)


def slow_risks(confidence, correct):
    """Mean risk at every number of answers given, over many orders of the equally confident."""
    draw, curves = np.random.default_rng(0), []
    for _ in range(4000):
        order = np.lexsort([draw.random(len(confidence)), -np.asarray(confidence)])
        curves.append(np.cumsum(~np.asarray(correct)[order]) / np.arange(1, len(order) + 1))
    return np.mean(curves, axis=0)


# --- expected calibration error --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("n", "bins"), [(1, 10), (7, 3), (100, 10), (241, 15)])
def test_ece_is_its_slow_definition(n, bins, ties):
    confidence, correct = answers(n, seed=n, ties=ties)
    assert calibration.ece(confidence, correct, bins) == pytest.approx(slow_ece(confidence, correct, bins), abs=1e-12)


def test_ece_is_zero_if_and_only_if_every_bin_is_calibrated():
    confidence = np.repeat([0.2, 0.4, 0.6, 0.8], 10)
    correct = np.tile(np.arange(10), 4) < 10 * confidence
    assert calibration.ece(confidence, correct, 4) == pytest.approx(0, abs=1e-12)
    for wrong in range(40):
        flipped = correct.copy()
        flipped[wrong] ^= True
        assert calibration.ece(confidence, flipped, 4) == pytest.approx(1 / 40)


def test_errors_of_opposite_sign_cancel_within_a_bin_only():
    confidence, correct = np.array([0.5, 0.5, 0.6, 0.6]), np.array([True, True, False, False])
    assert calibration.ece(confidence, correct, 1) == pytest.approx(0.05)
    assert calibration.ece(confidence, correct, 2) == pytest.approx((0.5 + 0.6) / 2)


def test_ece_has_its_bounds():
    assert calibration.ece(np.ones(9), np.zeros(9, bool), 3) == 1
    assert calibration.ece(np.ones(9), np.ones(9, bool), 3) == 0
    for seed in range(20):
        confidence, correct = answers(30, seed)
        assert abs(correct.mean() - confidence.mean()) - 1e-12 <= calibration.ece(confidence, correct, 7) <= 1


def test_ties_are_never_split():
    confidence = np.array([0.3] * 5 + [0.9] * 15)
    for correct in itertools.islice(itertools.permutations([True] * 2 + [False] * 3), 0, 120, 7):
        right = np.append(correct, np.ones(15, bool))
        assert calibration.ece(confidence, right, 10) == pytest.approx(0.25 * 0.1 + 0.75 * 0.1)


@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_the_rows_changes_nothing(ties):
    confidence, correct = answers(101, seed=3, ties=ties)
    shuffled = np.random.default_rng(0).permutation(101)
    for measure in (
        lambda c, y: calibration.ece(c, y, 10), calibration.aurc, lambda c, y: calibration.accuracy_at(0.8, c, y)
    ):  # fmt: skip
        assert measure(confidence, correct) == pytest.approx(measure(confidence[shuffled], correct[shuffled]))


@pytest.mark.parametrize("ties", [False, True])
def test_weighing_is_repeating(ties):
    confidence, correct = answers(60, seed=4, ties=ties)
    weights = np.concatenate(list(statistics.resample_groups(np.arange(60) // 3, 25, seed=1)))
    weights[0] = 1
    measures = [
        lambda c, y, w=None: calibration.ece(c, y, 7, w),
        calibration.aurc,
        *(lambda c, y, w=None, share=share: calibration.accuracy_at(share, c, y, w) for share in (0.8, 1.0)),
        lambda c, y, w=None: calibration.brier(np.column_stack([c, 1 - c]), y.astype(int), w),
    ]
    for measure in measures:
        found = measure(confidence, correct, weights)
        repeated = [measure(np.repeat(confidence, w), np.repeat(correct, w)) for w in weights]
        assert found == pytest.approx(repeated)
        assert measure(confidence, correct, weights[3]) == pytest.approx(found[3])
        assert measure(confidence, correct) == pytest.approx(found[0])


def test_a_calibrated_model_shows_the_ece_that_is_foretold():
    confidence = answers(240)[0]
    draw = np.random.default_rng(5)
    shown = [calibration.ece(confidence, draw.random(240) < confidence, 10) for _ in range(400)]
    foretold = calibration.ece_if_calibrated(confidence, np.arange(240), 10, 2000)
    assert foretold.shape == (2000,)
    assert np.mean(shown) == pytest.approx(foretold.mean(), rel=0.05)
    assert np.quantile(shown, 0.9) == pytest.approx(np.quantile(foretold, 0.9), rel=0.08)
    assert calibration.ece_if_calibrated(np.ones(50), np.arange(50), 10, 100).max() == 0


def test_the_fewer_the_answers_the_higher_the_ece_of_a_calibrated_model():
    means = [calibration.ece_if_calibrated(answers(n)[0], np.arange(n), 10, 300).mean() for n in (40, 160, 640)]
    assert means[0] > 1.8 * means[1] > 3.2 * means[2]


def test_copies_of_a_question_say_nothing_new():
    confidence = answers(120)[0]
    alone = calibration.ece_if_calibrated(confidence, np.arange(120), 10, 300)
    copied = calibration.ece_if_calibrated(np.tile(confidence, 3), np.tile(np.arange(120), 3), 10, 300)
    assert copied == pytest.approx(alone)
    assert calibration.ece_if_calibrated(np.tile(confidence, 3), np.arange(360), 10, 300).mean() < 0.7 * alone.mean()


# --- reliability -----------------------------------------------------------------------------------------------------


def test_reliability_is_sklearns_calibration_curve():
    judged = table(200, seed=6)
    ours = calibration.reliability(judged, 0.95, bins=8)
    scored = calibration.add_confidence(judged)
    accuracy, mean = calibration_curve(scored.correct, scored.confidence, n_bins=8, strategy="quantile")
    assert ours.value.to_numpy() == pytest.approx(accuracy)
    assert ours.mean_confidence.to_numpy() == pytest.approx(mean)
    assert list(ours) == [*calibration.KEYS, "bin", "mean_confidence", "value", "ci_low", "ci_high", "n"]
    assert list(ours.bin) == list(range(1, 9)) and set(ours.n) == {25}


def test_reliability_holds_the_ece():
    judged = table(123, seed=7)
    bins = calibration.reliability(judged, 0.9, bins=10)
    scored = calibration.add_confidence(judged)
    from_bins = (bins.n * (bins.value - bins.mean_confidence).abs()).sum() / bins.n.sum()
    assert from_bins == pytest.approx(calibration.ece(scored.confidence, scored.correct, 10))
    for row in bins.itertuples():
        assert (row.ci_low, row.ci_high) == statistics.wilson(round(row.value * row.n), row.n, 0.9)


def test_empty_bins_are_left_out():
    judged = table(40).assign(probabilities=[[0.7, 0.1, 0.1, 0.1]] * 40)
    (row,) = calibration.reliability(judged, 0.95).to_dict("records")
    assert (row["n"], row["mean_confidence"], row["bin"]) == (40, pytest.approx(0.7), 6)


# --- Brier -----------------------------------------------------------------------------------------------------------


def test_brier_is_sklearns():
    judged = table(80, seed=8)
    matrix = np.stack(judged.probabilities)
    ours = calibration.brier(judged.probabilities, judged.answer)
    assert ours == pytest.approx(brier_score_loss(judged.answer, matrix, labels=range(4), scale_by_half=False))
    yes = judged.answer.to_numpy() == 0
    binary = calibration.brier(np.column_stack([matrix[:, 0], 1 - matrix[:, 0]]), np.where(yes, 0, 1))
    assert binary == pytest.approx(2 * brier_score_loss(yes, matrix[:, 0]))


def test_brier_has_its_range_and_takes_questions_of_any_size():
    assert calibration.brier([[1.0, 0.0], [0.0, 0.0, 1.0]], [0, 2]) == 0
    assert calibration.brier([[1.0, 0.0], [0.0, 0.0, 1.0]], [1, 0]) == 2
    assert calibration.brier([[0.5, 0.5], [0.25] * 4], [0, 3]) == pytest.approx((0.5 + 0.75) / 2)


# --- abstention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True])
def test_risks_are_means_over_the_orders_of_the_equally_confident(ties):
    confidence, correct = answers(23, seed=9, ties=ties)
    expected = slow_risks(confidence, correct)
    curve = calibration.risk_coverage(confidence, correct)
    assert list(curve) == ["n", "coverage", "risk"]
    assert curve.risk.to_numpy() == pytest.approx(expected, abs=0.02)
    assert calibration.aurc(confidence, correct) == pytest.approx(curve.risk.mean())
    for n in (1, 7, 18, 23):
        at = calibration.accuracy_at(n / 23, confidence, correct)
        assert at == pytest.approx(1 - curve.risk[n - 1])


def test_at_full_coverage_the_accuracy_is_the_accuracy():
    confidence, correct = answers(77, seed=10, ties=True)
    assert calibration.accuracy_at(1.0, confidence, correct) == pytest.approx(correct.mean())
    assert calibration.risk_coverage(confidence, correct).risk.iloc[-1] == pytest.approx(1 - correct.mean())


def test_a_perfect_ranking_and_one_that_knows_nothing():
    n, rate = 2000, 0.3
    wrong = np.arange(n) < rate * n
    perfect = calibration.aurc(np.arange(n) / n, ~wrong)
    assert perfect == pytest.approx(rate + (1 - rate) * np.log(1 - rate), abs=1e-3)
    assert calibration.aurc(np.full(n, 0.5), ~wrong) == pytest.approx(rate)
    shuffled = np.random.default_rng(0).random((300, n))
    assert np.mean([calibration.aurc(c, ~wrong) for c in shuffled]) == pytest.approx(rate, abs=0.01)
    assert calibration.accuracy_at(0.7, np.arange(n) / n, ~wrong) == 1
    worst = calibration.aurc(1 - np.arange(n) / n, ~wrong)
    assert perfect < rate < worst


def test_no_ranking_beats_the_perfect_one():
    correct = np.array([True, True, True, False, False])
    orders = [calibration.aurc(np.array(order) / 10, correct) for order in itertools.permutations(range(1, 6))]
    assert min(orders) == pytest.approx(calibration.aurc([0.9, 0.9, 0.9, 0.1, 0.1], correct))


@pytest.mark.parametrize(("n", "given"), [(1, 1), (5, 4), (10, 8), (11, 9), (15, 12), (240, 192)])
def test_a_coverage_is_rounded_up_to_whole_answers(n, given):
    assert calibration.answers_at(0.8, n) == given


# --- every variant ---------------------------------------------------------------------------------------------------


def test_one_row_per_metric_of_everything_that_has_probabilities():
    kinds = list(itertools.product("ab", ["exam", "mmlu"]))
    tables = [table(50, seed=i, variant=variant, source=source) for i, (variant, source) in enumerate(kinds)]
    generated = table(20, scoring="generated").assign(probabilities=None, choice=-1, correct=False)
    found = calibration.measure_calibration(pd.concat([*tables, generated]), 0.95, resamples=50)
    names = ["metric", "value", "ci_low", "ci_high", "n", "ece_if_calibrated"]
    assert list(found) == [*calibration.KEYS, *names]
    assert found.groupby(calibration.KEYS).metric.apply(list).to_dict() == {
        (*kind, "letter"): METRICS for kind in kinds
    }
    assert (found.ci_low <= found.value).all() and (found.value <= found.ci_high).all()
    assert (found.ece_if_calibrated.notna() == (found.metric == "ece")).all()
    assert found.set_index("metric").n.loc["accuracy_at_80"].eq(40).all() and set(found.n) == {50, 40}


def test_values_are_those_of_the_functions():
    judged = table(90, seed=11)
    scored = calibration.add_confidence(judged)
    value = calibration.measure_calibration(judged, 0.95, resamples=20).set_index("metric").value
    assert value.to_dict() == pytest.approx({
        "ece": calibration.ece(scored.confidence, scored.correct, 10),
        "brier": calibration.brier(scored.probabilities, scored.answer),
        "aurc": calibration.aurc(scored.confidence, scored.correct),
        "accuracy_at_80": calibration.accuracy_at(0.8, scored.confidence, scored.correct),
    })  # fmt: skip


def test_the_same_seed_gives_the_same_table():
    judged = table(60, seed=12)
    first, second = (calibration.measure_calibration(judged, 0.95, resamples=40, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert not first.ci_low.equals(calibration.measure_calibration(judged, 0.95, resamples=40, seed=4).ci_low)


def test_no_probabilities_make_an_empty_table():
    judged = table(10).assign(probabilities=None)
    assert calibration.measure_calibration(judged, 0.95).empty
    assert calibration.reliability(judged, 0.95).empty


@pytest.mark.parametrize("wrong", [[0.5, 0.2, 0.1, 0.1], [1.2, -0.2, 0.0, 0.0], [np.nan, 0.5, 0.5, 0.0]])
def test_probabilities_that_are_none_are_refused(wrong):
    judged = table(10)
    judged.at[4, "probabilities"] = np.array(wrong)
    with pytest.raises(CalibrationError, match="q4"):
        calibration.measure_calibration(judged, 0.95)


def test_a_choice_that_is_no_option_is_refused():
    judged = table(10)
    judged.loc[4, "choice"] = -1
    with pytest.raises(CalibrationError, match="q4"):
        calibration.add_confidence(judged)


def test_near_duplicates_widen_the_intervals():
    judged = table(120, seed=13)
    copies = pd.concat([judged.assign(id=judged.id + mark) for mark in "abcd"], ignore_index=True)
    alone = copies.assign(group=np.arange(480))

    def widths(tables):
        found = calibration.measure_calibration(tables, 0.95, resamples=400).set_index("metric")
        return (found.ci_high - found.ci_low)[METRICS[1:]].to_numpy()

    assert (widths(copies) > 1.6 * widths(alone)).all()  # 2 = √4, with the resamples' noise


@pytest.mark.parametrize("right", [True, False])
def test_an_interval_has_a_width_even_if_all_answers_agree(right):
    judged = table(30).assign(answer=0 if right else 1, correct=right)
    found = calibration.measure_calibration(judged, 0.95, resamples=50).set_index("metric")
    assert found.value[["aurc", "accuracy_at_80"]].tolist() == [1 - right, right]
    assert (found.ci_high - found.ci_low)[["aurc", "accuracy_at_80"]].min() > 0.1


def test_a_question_answered_twice_is_refused():
    judged = pd.concat([table(10), table(10)])
    with pytest.raises(CalibrationError, match="one study and condition"):
        calibration.measure_calibration(judged, 0.95)


def test_a_table_from_a_file_is_measured_alike(tmp_path):
    judged = pd.concat([table(30), table(5, scoring="generated").assign(probabilities=None)], ignore_index=True)
    judged.to_parquet(tmp_path / "judged.parquet")
    read = pd.read_parquet(tmp_path / "judged.parquet")
    pd.testing.assert_frame_equal(*(calibration.measure_calibration(t, 0.95, resamples=20) for t in (judged, read)))


@pytest.mark.parametrize("pairs", [False, True])
def test_intervals_hold_the_truth(pairs):
    runs, skill = 100, 0.7
    large = calibration.add_confidence(table(50_000, seed=999, skill=skill))
    truth = {
        "ece": calibration.ece(large.confidence, large.correct, 10),
        "brier": calibration.brier(large.probabilities, large.answer),
        "aurc": calibration.aurc(large.confidence, large.correct),
        "accuracy_at_80": calibration.accuracy_at(0.8, large.confidence, large.correct),
    }
    held = dict.fromkeys(truth, 0)
    for run in range(runs):
        judged = table(120, seed=1000 + run, skill=skill)
        judged = pd.concat([judged, judged.assign(id=judged.id + "b")]) if pairs else judged
        found = calibration.measure_calibration(judged, 0.95, resamples=150, seed=run).set_index("metric")
        for metric, value in truth.items():
            held[metric] += found.ci_low[metric] <= value <= found.ci_high[metric]
    assert min(held.values()) / runs > 0.89, held


@pytest.mark.parametrize("pairs", [False, True])
def test_a_calibrated_model_is_rarely_called_miscalibrated_and_an_overconfident_one_often(pairs):
    def called(skill):
        tables = [table(150, seed=2000 + i, skill=skill) for i in range(60)]
        tables = [pd.concat([t, t.assign(id=t.id + "b")]) if pairs else t for t in tables]
        found = [calibration.measure_calibration(t, 0.95, resamples=150).ci_low[0] > 0 for t in tables]
        return np.mean(found)

    assert called(1.0) < 0.08
    assert called(0.2) > 0.8
