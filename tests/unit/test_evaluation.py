"""Intervals against their exact coverage, paired tests against scipy, and how answers are judged.

Coverage and power are computed over the binomial and multinomial distributions, not drawn: no seed, no noise.
"""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from medkit import evaluation
from medkit.evaluation import EvaluationError

# --- one proportion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Wilson's interval from its formula, e.g. Brown, Cai & DasGupta (2001): 0 of 10, 10 of 10, half of 100
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (50, 100, 0.40383, 0.59617)],
)
def test_wilson_has_the_known_values(successes, n, low, high):
    assert evaluation.wilson(successes, n, 0.95) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_is_the_formula(confidence):
    z = stats.norm.ppf(0.5 + confidence / 2)
    for successes, n in [(1, 7), (63, 200), (999, 1000)]:
        p = successes / n
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert evaluation.wilson(successes, n, confidence) == pytest.approx((centre - half, centre + half))
        assert evaluation.wilson(successes, n, confidence) == proportion_confint(successes, n, 1 - confidence, "wilson")


@pytest.mark.parametrize("n", [20, 100])
def test_wilson_covers_at_every_rate(n):
    intervals = np.array([evaluation.wilson(k, n, 0.95) for k in range(n + 1)])
    coverage = []
    for p in np.linspace(0.05, 0.95, 91):
        covers = (intervals[:, 0] <= p) & (p <= intervals[:, 1])
        coverage.append(stats.binom.pmf(np.arange(n + 1)[covers], n, p).sum())
    assert min(coverage) > 0.91
    assert 0.94 < np.mean(coverage) < 0.965


# --- two variants on the same questions ----------------------------------------------------------------------------


def pair(n, gained, lost, both=0):
    """Answers of two variants with these numbers of discordant questions."""
    theirs = np.array([False] * gained + [True] * (lost + both) + [False] * (n - gained - lost - both))
    ours = theirs.copy()
    ours[: gained + lost] = ~ours[: gained + lost]
    return ours, theirs


@cache
def compared(n, gained, lost):
    return evaluation.paired_difference(*pair(n, gained, lost), 0.95, 0.8)


@pytest.mark.parametrize(("gained", "lost"), [(8, 0), (24, 16), (5, 5), (1, 0), (0, 13), (30, 29)])
def test_the_p_value_is_the_exact_sign_test_of_the_flips(gained, lost):
    found = compared(100, gained, lost)
    assert found["p_value"] == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue)
    assert (found["gained"], found["lost"], found["n"]) == (gained, lost, 100)
    assert found["difference"] == pytest.approx((gained - lost) / 100)


def test_no_flip_is_no_difference():
    answers = np.arange(50) % 3 == 0
    found = evaluation.paired_difference(answers, answers, 0.95, 0.8)
    assert (found["difference"], found["gained"], found["lost"], found["p_value"]) == (0, 0, 0, 1)
    assert found["ci_low"] == pytest.approx(-found["ci_high"])
    assert 0 < found["ci_high"] < 0.1


@pytest.mark.parametrize(("gained", "lost"), [(8, 2), (0, 5), (20, 21)])
def test_it_is_antisymmetric(gained, lost):
    ours, theirs = pair(60, gained, lost, both=10)
    a, b = (evaluation.paired_difference(x, y, 0.95, 0.8) for x, y in ((ours, theirs), (theirs, ours)))
    assert a["difference"] == -b["difference"]
    assert (a["ci_low"], a["ci_high"]) == pytest.approx((-b["ci_high"], -b["ci_low"]))
    assert (a["gained"], a["lost"]) == (b["lost"], b["gained"])
    assert (a["p_value"], a["mde"]) == pytest.approx((b["p_value"], b["mde"]))


def test_agreement_on_a_question_adds_n_and_nothing_else():
    right, wrong = (evaluation.paired_difference(*pair(60, 8, 2, both), 0.95, 0.8) for both in (50, 0))
    assert right == wrong


@pytest.mark.parametrize(
    ("up", "down"), [(0.02, 0.02), (0.05, 0.05), (0.10, 0.02), (0.20, 0.20), (0.30, 0.10), (0.25, 0.01)]
)
def test_the_interval_covers_the_true_difference(up, down):
    n, covered, seen = 100, 0.0, 0.0
    for gained in range(int(stats.binom.ppf(1 - 1e-6, n, up)) + 1):
        for lost in range(int(stats.binom.ppf(1 - 1e-6, n, down)) + 1):
            if gained + lost <= n:
                weight = stats.multinomial.pmf([gained, lost, n - gained - lost], n, [up, down, 1 - up - down])
                found = compared(n, gained, lost)
                covered += weight * (found["ci_low"] <= up - down <= found["ci_high"])
                seen += weight
    assert seen > 0.9999
    assert covered > 0.93


def exact_power(n, up, down, alpha=0.05):
    """Chance that the exact McNemar test rejects in the direction of the difference."""
    power = 0.0
    for flips in range(1, n + 1):
        gained = np.arange(flips + 1)
        p_value = np.minimum(1, 2 * stats.binom.cdf(np.minimum(gained, flips - gained), flips, 0.5))
        rejects = gained[(p_value < alpha) & (gained > flips / 2)]
        power += stats.binom.pmf(flips, n, up + down) * stats.binom.pmf(rejects, flips, up / (up + down)).sum()
    return power


@pytest.mark.parametrize(("n", "flips"), [(200, 40), (400, 40), (400, 160), (600, 60)])
def test_an_effect_of_the_stated_size_is_found_with_the_stated_power(n, flips):
    mde, rate = compared(n, flips // 2, flips // 2)["mde"], flips / n
    assert 0.7 < exact_power(n, (rate + mde) / 2, (rate - mde) / 2) < 0.9
    assert exact_power(n, (rate + mde / 2) / 2, (rate - mde / 2) / 2) < 0.4


def test_more_questions_and_fewer_flips_make_smaller_effects_detectable():
    assert compared(400, 20, 20)["mde"] < compared(100, 20, 20)["mde"]
    assert compared(100, 5, 5)["mde"] < compared(100, 20, 20)["mde"]


@pytest.mark.parametrize(("ours", "theirs"), [([True] * 3, [True] * 4), ([], [])], ids=["lengths", "nothing"])
def test_answers_to_other_questions_cannot_be_paired(ours, theirs):
    with pytest.raises(EvaluationError, match="same questions"):
        evaluation.paired_difference(ours, theirs, 0.95, 0.8)


# --- judging -------------------------------------------------------------------------------------------------------


def prediction(variant, id, scoring, logprobs=(), answer_tokens=(), text="", template="text"):
    return {
        "variant": variant, "id": id, "scoring": scoring, "template": template, "logprobs": list(logprobs),
        "answer_tokens": list(answer_tokens), "text": text,
    }  # fmt: skip


def test_scored_options_are_read_raw_and_per_token(questions):
    table = pd.DataFrame([
        prediction("lora", "q0", "option_text", [-4.0, -6.0, -9.0, -9.0], [1, 3, 3, 3]),
        prediction("lora", "q1", "letter", [-1.0, -0.5, -2.0], [1, 1, 1], template="letter"),
    ])  # fmt: skip
    judged = evaluation.judge(table, questions).set_index(["id", "scoring"])
    assert judged.choice.to_dict() == {("q1", "letter"): 1, ("q0", "option_text"): 0, ("q0", "option_text_norm"): 1}
    assert judged.correct.to_dict() == {
        ("q1", "letter"): False, ("q0", "option_text"): False, ("q0", "option_text_norm"): True
    }  # fmt: skip
    assert set(judged.source) == {"exam"}


def test_generated_text_that_cannot_be_read_is_wrong_and_counted(questions):
    texts = {"q0": "Vitamin C", "q1": "It could be any of them.", "q2": "maybe"}
    rows = [prediction("lora", id, "generated", text=text) for id, text in texts.items()]
    judged = evaluation.judge(pd.DataFrame(rows), questions)
    assert judged.set_index("id").choice.to_dict() == {"q0": 1, "q1": -1, "q2": 2}
    assert judged.set_index("id").correct.to_dict() == {"q0": True, "q1": False, "q2": False}
    table = evaluation.accuracy(judged, 0.95).set_index("source")
    assert table.unparsed_rate.to_dict() == {"exam": 0.5, "trial": 0.0}
    assert table.accuracy.to_dict() == {"exam": 0.5, "trial": 0.0}
    assert table.n.to_dict() == {"exam": 2, "trial": 1}


def test_an_abstention_is_neither_right_nor_unparsed(questions):
    texts = {"q0": "I'm not sure.", "q1": "no idea what this is about"}
    rows = [prediction("lora", id, "generated", text=text, template="abstain") for id, text in texts.items()]
    judged = evaluation.judge(pd.DataFrame(rows), questions)
    assert judged.set_index("id").choice.to_dict() == {"q0": -2, "q1": -1}
    (row,) = evaluation.accuracy(judged, 0.95).to_dict("records")
    assert (row["accuracy"], row["unparsed_rate"], row["abstained_rate"]) == (0, 0.5, 0.5)


def test_the_clean_flag_comes_along(questions):
    questions["clean"] = questions.id != "q1"
    rows = [prediction("lora", id, "generated", text="zinc") for id in ("q0", "q1")]
    judged = evaluation.judge(pd.DataFrame(rows), questions)
    assert judged.set_index("id").clean.to_dict() == {"q0": True, "q1": False}


def test_a_prediction_for_an_unknown_question_is_an_error(questions):
    rows = [prediction("lora", id, "generated", text="zinc") for id in ("q0", "q9")]
    with pytest.raises(EvaluationError, match="1 predictions"):
        evaluation.judge(pd.DataFrame(rows), questions)


def test_judging_survives_a_parquet_file(questions, tmp_path):
    rows = [prediction("lora", "q0", "option_text", [-4.0, -3.0, -9.0, -9.0], [1, 1, 3, 3])]
    rows += [prediction("lora", "q0", "generated", text="zinc")]
    pd.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    questions.to_parquet(tmp_path / "q.parquet")
    judged = evaluation.judge(pd.read_parquet(tmp_path / "p.parquet"), pd.read_parquet(tmp_path / "q.parquet"))
    assert judged.set_index("scoring").choice.to_dict() == {"option_text": 1, "option_text_norm": 1, "generated": 3}


def test_chance_is_per_question(questions):
    assert evaluation.chance(questions[questions.split == "test"]) == pytest.approx((1 / 4 + 1 / 3 + 1 / 3) / 3)


# --- the steps -----------------------------------------------------------------------------------------------------

RATES = {"teacher_base": 0.4, "teacher": 0.75, "base": 0.3, "student_ce": 0.5, "lora": 0.55, "nf4": 0.52}


@pytest.fixture
def judged():
    """Six variants on 120 questions of one source and 40 of another, in a different order each."""
    draw = np.random.default_rng(0)
    tables = []
    for variant, rate in RATES.items():
        for source, n in (("exam", 120), ("trial", 40)):
            table = pd.DataFrame({"id": [f"{source}{i}" for i in range(n)], "correct": draw.random(n) < rate})
            table = table.assign(variant=variant, source=source, scoring="option_text")
            tables.append(table.sample(frac=1, random_state=draw.integers(1000)))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(answer=0, choice=np.where(table.correct, 0, 1))


def test_steps_compare_the_same_questions(judged):
    table = evaluation.compare_steps(judged, 0.95, 0.8)
    expected = [(v, b) for v, b, _ in evaluation.STEPS if {v, b} <= set(RATES)]
    assert [(r.variant, r.baseline) for r in table[table.source == "exam"].itertuples()] == expected
    assert len(expected) == 5
    for row in table.itertuples():
        correct = {
            v: judged[(judged.variant == v) & (judged.source == row.source)].set_index("id").correct.sort_index()
            for v in (row.variant, row.baseline)
        }
        by_id = evaluation.paired_difference(correct[row.variant], correct[row.baseline], 0.95, 0.8)
        assert {name: getattr(row, name) for name in by_id} == pytest.approx(by_id)


def test_a_question_that_one_variant_lacks_leaves_the_pair(judged):
    lacking = judged[~((judged.variant == "nf4") & (judged.id == "exam7"))]
    table = evaluation.compare_steps(lacking, 0.95, 0.8).set_index(["variant", "baseline", "source"])
    assert table.n["nf4", "lora", "exam"] == 119
    assert table.n["teacher", "teacher_base", "exam"] == 120


def test_p_values_are_adjusted_over_all_comparisons(judged):
    table = evaluation.compare_steps(judged, 0.95, 0.8)
    assert list(table.p_holm) == pytest.approx(list(multipletests(table.p_value, method="holm")[1]))
    order, highest = np.argsort(table.p_value.to_numpy()), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, table.p_value[i] * (len(table) - rank)))
        assert table.p_holm[i] == pytest.approx(highest)
    assert (table.p_holm >= table.p_value).all()


def test_a_verdict_follows_the_adjusted_p_and_the_sign(judged):
    table = evaluation.compare_steps(judged, 0.95, 0.8)
    expected = np.where(table.p_holm >= 0.05, "not detectable", np.where(table.difference > 0, "better", "worse"))
    assert list(table.verdict) == list(expected)
    assert set(table.verdict) == {"better", "worse", "not detectable"}
    assert (table.question != "").all()


def test_flips_are_the_questions_that_were_gained_and_lost(judged):
    table, steps = evaluation.find_flips(judged), evaluation.compare_steps(judged, 0.95, 0.8)
    for row in steps.itertuples():
        flips = table[(table.variant == row.variant) & (table.baseline == row.baseline) & (table.source == row.source)]
        assert (flips.flip == "gained").sum() == row.gained
        assert (flips.flip == "lost").sum() == row.lost
        assert flips.id.is_unique
    assert len(table) == steps.gained.sum() + steps.lost.sum()
    gained = table[table.flip == "gained"]
    assert (gained.choice_after == 0).all() and (gained.choice_before == 1).all()


# --- timings -------------------------------------------------------------------------------------------------------


def test_the_median_of_one_repeat_is_its_own_interval():
    assert evaluation.median_interval([0.3], 0.95) == (0.3, 0.3, 0.3)
    assert evaluation.median_interval([0.3] * 5, 0.95) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize("values", [[3.0, 1.0], [5.0, 1.0, 2.0, 9.0, 4.0], list(range(30))])
def test_the_median_lies_in_its_interval_and_that_in_the_range(values):
    median, low, high = evaluation.median_interval(values, 0.95)
    assert min(values) <= low <= median <= high <= max(values)
    assert median == np.median(values)
    assert evaluation.median_interval(values, 0.95) == (median, low, high)
    narrow = evaluation.median_interval(values, 0.5)
    assert low <= narrow[1] and narrow[2] <= high
