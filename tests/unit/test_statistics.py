"""Intervals against their exact coverage, tests against their exact size and power, and all of them against libraries.

Where two numbers of flips decide, coverage, size and power are sums over their distribution: no seed, no noise. What
groups do is drawn, with a fixed seed and many draws at once.
"""

import gc
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from medkit import statistics
from medkit.stage import MedkitError

ALPHA = 0.05


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """statsmodels collects garbage in every adjustment, which takes 0.2 s here."""
    monkeypatch.setattr(gc, "collect", int)


def pair(n, gained, lost, both=0):
    """Answers of two variants with these numbers of discordant questions."""
    theirs = np.array([False] * gained + [True] * (lost + both) + [False] * (n - gained - lost - both))
    ours = theirs.copy()
    ours[: gained + lost] = ~ours[: gained + lost]
    return ours, theirs


@cache
def compared(n, gained, lost):
    return statistics.paired_difference(*pair(n, gained, lost), 0.95, 0.8)


def over_flips(n, up, down, found):
    """Expectation of found(gained, lost) over the flips of n independent questions."""
    total = seen = 0.0
    for gained in range(int(stats.binom.ppf(1 - 1e-6, n, up)) + 1):
        lost = np.arange(min(n - gained, int(stats.binom.ppf(1 - 1e-6, n, down))) + 1)
        weights = stats.binom.pmf(gained, n, up) * stats.binom.pmf(lost, n - gained, down / (1 - up))
        total += weights @ np.array([found(gained, int(k)) for k in lost], float)
        seen += weights.sum()
    assert seen > 0.9999
    return total


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (8, 0), (24, 16), (5, 5), (0, 13)])
def test_the_p_values_are_the_exact_mcnemar_test_where_groups_are_single(gained, lost):
    found, exact = compared(100, gained, lost), mcnemar([[0, gained], [lost, 0]], exact=True).pvalue
    assert (found["p_value"], found["design_effect"]) == pytest.approx((exact, 1))
    assert statistics.sign_flip_p([1] * gained + [-1] * lost + [0] * 9) == pytest.approx(exact)
    assert (found["gained"], found["lost"], found["n"]) == (gained, lost, 100)
    assert found["difference"] == pytest.approx((gained - lost) / 100)
    if gained == lost == 0:
        assert found["ci_low"] == pytest.approx(-found["ci_high"]) and 0 < found["ci_high"] < 0.1


@pytest.mark.parametrize(("gained", "lost"), [(8, 2), (0, 5), (20, 21)])
def test_it_is_antisymmetric(gained, lost):
    ours, theirs = pair(60, gained, lost, both=10)
    a, b = (statistics.paired_difference(x, y, 0.95, 0.8) for x, y in ((ours, theirs), (theirs, ours)))
    assert a["difference"] == -b["difference"]
    assert (a["ci_low"], a["ci_high"]) == pytest.approx((-b["ci_high"], -b["ci_low"]))
    assert (a["gained"], a["lost"]) == (b["lost"], b["gained"])
    for name in ("p_value", "design_effect", "mde"):
        assert a[name] == pytest.approx(b[name]), name


@pytest.mark.parametrize(("up", "down"), [(0.02, 0.02), (0.10, 0.02), (0.20, 0.20), (0.25, 0.01)])
def test_the_interval_covers_the_true_difference(up, down):
    n = 60

    def covers(gained, lost):
        found = compared(n, gained, lost)
        return found["ci_low"] <= up - down <= found["ci_high"]

    assert over_flips(n, up, down, covers) > 0.93


@pytest.mark.parametrize(("ours", "theirs"), [([True] * 3, [True] * 4), ([], [])], ids=["lengths", "nothing"])
def test_answers_to_other_questions_cannot_be_paired(ours, theirs):
    with pytest.raises(MedkitError, match="same questions"):
        statistics.paired_difference(ours, theirs, 0.95, 0.8)


@pytest.mark.parametrize("sums", [[3, -1, 2, 2, 0, -5], [4], [1, 1, 1, -2, 3, 3, -1, 1], [-2, 2]])
def test_every_choice_of_signs_is_as_likely(sums):
    all_signs = np.array(list(product([-1, 1], repeat=len(sums))))
    expected = np.mean(np.abs(all_signs @ sums) >= abs(sum(sums)))
    assert statistics.sign_flip_p(sums) == pytest.approx(expected)


def test_copies_of_every_question_add_no_evidence():
    ours, theirs = pair(80, 14, 4)
    groups = np.arange(80)
    once = statistics.paired_difference(ours, theirs, 0.95, 0.8, groups)
    copied = statistics.paired_difference(*(np.repeat(x, 5) for x in (ours, theirs)), 0.95, 0.8, np.repeat(groups, 5))
    assert copied["p_value"] == pytest.approx(once["p_value"])
    assert copied["design_effect"] == pytest.approx(5, rel=0.05)
    assert copied["mde"] == pytest.approx(once["mde"], rel=0.1)
    widths = [pair["ci_high"] - pair["ci_low"] for pair in (once, copied)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


def clustered(questions, groups, alike, draws, seed=0, rates=(0.15, 0.15)):
    """Differences (1, 0, −1) of `draws` pairs of variants, (questions, draws), and the group of each question.

    A question answers as its group does with chance `alike`, else by itself.
    """
    draw = np.random.default_rng(seed)
    member = np.sort(draw.integers(groups, size=questions))
    values, chances = [1, -1, 0], [*rates, 1 - sum(rates)]
    of_group = draw.choice(values, p=chances, size=(groups, draws))[member]
    own = draw.choice(values, p=chances, size=(questions, draws))
    return np.where(draw.random((questions, draws)) < alike, of_group, own), member


GROUPS = ["b", "a", "b", "c", "a", "b", "d"]


def test_resamples_draw_whole_groups(monkeypatch):
    weights = np.vstack(list(statistics.resample_groups(GROUPS, 4000, seed=3)))
    assert weights.shape == (4000, len(GROUPS)) and weights.dtype == np.int16
    assert (weights[:, [0, 0, 1]] == weights[:, [2, 5, 4]]).all()  # a group comes whole
    assert (weights[:, [0, 1, 3, 6]].sum(axis=1) == 4).all()  # as many groups as there are
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.06)
    assert weights[:, 3].var() == pytest.approx(1 - 1 / 4, abs=0.06)  # that of a draw with replacement
    monkeypatch.setattr(statistics, "CELLS_AT_ONCE", 100)
    chunks = list(statistics.resample_groups(GROUPS, 4000, seed=3))
    assert len(chunks) > 100 and (np.vstack(chunks) == weights).all()
    assert (np.vstack(list(statistics.resample_groups(GROUPS, 4000, seed=4))) != weights).any()


@pytest.mark.parametrize("groups", [[], ["a", None]])
def test_a_row_without_a_group_is_an_error(groups):
    with pytest.raises(MedkitError, match="needs a group"):
        list(statistics.resample_groups(groups))


def test_the_bootstrap_is_scipys_where_groups_are_single(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 20_000)
    values = np.random.default_rng(1).normal(size=60) ** 2
    ours = np.ravel(statistics.mean_intervals(values[:, None], range(60), 0.9))
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.02 * values.std())


@pytest.mark.parametrize("right", [0, 1, 30, 59, 60])
def test_with_single_groups_the_interval_of_a_proportion_is_nearly_wilsons(right):
    values = (np.arange(60) < right).astype(float)[:, None]
    low, high = np.ravel(statistics.mean_intervals(values, range(60), 0.95, imagined=(0, 0, 1, 1)))
    assert (low, high) == pytest.approx(statistics.wilson(right, 60, 0.95), abs=0.03)
    assert low <= right / 60 <= high and high - low > 0.05


def intervals_of_pairs(values, groups):
    found = [statistics.paired_difference(d > 0, d < 0, 0.95, 0.8, groups) for d in values.T]
    return np.array([(row["ci_low"], row["ci_high"]) for row in found]).T


def intervals_of_shares(values, groups):
    return statistics.mean_intervals(values, groups, 0.95, imagined=(0, 0, 1, 1))


@pytest.mark.parametrize(("rates", "measure"), [((0.15, 0.05), intervals_of_pairs), ((0.6, 0), intervals_of_shares)])
def test_only_an_interval_over_groups_covers_under_groups(rates, measure):
    values, groups = clustered(300, 80, 0.9, 800, seed=2, rates=rates)
    truth = rates[0] - rates[1]

    def coverage(groups):
        low, high = measure(values, groups)
        return np.mean((low <= truth) & (truth <= high))

    assert 0.92 < coverage(groups) < 0.975
    assert coverage(np.arange(300)) < 0.8


def exact_power(n, up, down, alpha=ALPHA):
    """Chance that the exact McNemar test rejects in the direction of the difference."""
    power = 0.0
    for flips in range(1, n + 1):
        gained = np.arange(flips + 1)
        p_value = np.minimum(1, 2 * stats.binom.cdf(np.minimum(gained, flips - gained), flips, 0.5))
        rejects = gained[(p_value < alpha) & (gained > flips / 2)]
        power += stats.binom.pmf(flips, n, up + down) * stats.binom.pmf(rejects, flips, up / (up + down)).sum()
    return power


@pytest.mark.parametrize("power", [0.6, 0.8, 0.95])
def test_the_stated_effect_is_found_as_often_as_asked(power):
    n, rate = 300, 0.2
    mde = statistics.detectable_effect(n, rate, 0.95, power)
    up, down = (rate + mde) / 2, (rate - mde) / 2
    assert exact_power(n, up, down) == pytest.approx(power, abs=1e-4)


@pytest.mark.parametrize("n", [8, 40])
def test_no_effect_is_stated_that_cannot_be(n):
    """Where too few answers flip, the effect is the rate of flips, all one way, that the test needs at all."""
    mde = statistics.detectable_effect(n, 1 / n, 0.95, 0.8)
    assert stats.binom.sf(5, n, mde) == pytest.approx(0.8, abs=1e-4)  # six flips one way are the fewest significant
    effects = [statistics.detectable_effect(n, rate, 0.95, 0.8) for rate in np.linspace(0.01, 1, 60)]
    assert all(mde - 1e-5 <= effect <= 1 for effect in effects)
    assert np.abs(np.diff(effects)).max() < 0.05  # without a jump where the rate of flips begins to suffice


@pytest.mark.parametrize("n", [1, 5])
def test_where_nothing_can_be_significant_the_effect_is_one(n):
    assert statistics.detectable_effect(n, 0.5, 0.95, 0.8) == 1
    assert compared(n, 0, n)["p_value"] > ALPHA


equivalence = cache(statistics.equivalence_p)


@pytest.mark.parametrize(("gained", "lost", "n", "margin"), [(3, 9, 100, 0.05), (0, 2, 60, 0.1), (40, 31, 500, 0.02)])
def test_the_variance_is_that_of_the_most_likely_rates_at_the_margin(gained, lost, n, margin):
    def one_sided(b, c):
        def unlikely(loss):
            gain = loss - margin
            same = 1 - loss - gain
            return -(b * np.log(gain) + c * np.log(loss) + (n - b - c) * np.log(same))

        loss = optimize.minimize_scalar(
            unlikely, bounds=(margin + 1e-12, (1 + margin) / 2), method="bounded", options={"xatol": 1e-10}
        ).x
        variance = (2 * loss - margin) - margin**2
        return stats.norm.sf(((b - c) / n + margin) / np.sqrt(variance / n))

    expected = max(one_sided(gained, lost), one_sided(lost, gained))
    assert equivalence(gained, lost, n, margin) == pytest.approx(expected, rel=1e-4)


def test_equivalence_is_an_interval_inside_the_margin():
    for gained, lost, n in [(30, 30, 1000), (30, 60, 1000), (60, 90, 2000), (200, 210, 800), (90, 15, 2000)]:
        found = statistics.paired_difference(*pair(n, gained, lost), 1 - 2 * ALPHA, 0.8)
        inside = max(-found["ci_low"], found["ci_high"]) < 0.05
        assert (equivalence(gained, lost, n, 0.05) < ALPHA) == inside, (gained, lost, n)


def test_under_groups_equivalence_keeps_its_size_by_the_design_effect():
    values, groups = clustered(300, 80, 0.9, 150, seed=7, rates=(0.05, 0.15))
    found = [statistics.paired_difference(d > 0, d < 0, 0.95, 0.8, groups) for d in values.T]
    counts = [(row["gained"], row["lost"], 300, 0.1) for row in found]
    whole = [statistics.equivalence_p(*c, r["design_effect"]) < ALPHA for c, r in zip(counts, found, strict=True)]
    assert np.mean(whole) < ALPHA + 0.02
    assert np.mean([equivalence(*c) < ALPHA for c in counts]) > 2 * ALPHA


def judged(*flips):
    rows = [compared(n, gained, lost) for n, gained, lost in flips]
    return statistics.verdicts(pd.DataFrame(rows), 0.95, 0.05)


@pytest.mark.parametrize("count", [1, 2, 4, 40])
def test_with_few_groups_an_equivalence_is_not_shown_too_often(count):
    """Twenty questions in each group, all answered alike; the true difference is the margin."""
    draw, shown = np.random.default_rng(count), []
    groups = np.repeat(np.arange(count), 20)
    for _ in range(300):
        gained, lost = draw.random(count) < 0.30, draw.random(count) < 0.20
        ours, theirs = (np.repeat(one, 20) for one in (gained, lost & ~gained))
        one = statistics.paired_difference(ours, theirs, 0.95, 0.8, groups)
        shown.append(statistics.equivalence_p(one["gained"], one["lost"], one["n"], 0.16, one["design_effect"]) < 0.05)
    assert np.mean(shown) < 0.12


def test_every_comparison_gets_its_word():
    table = judged((400, 60, 10), (400, 10, 60), (2000, 20, 22), (60, 4, 5), (4000, 60, 5))
    assert list(table.verdict) == ["better", "worse", "equivalent", "not detectable", "better"]
    assert list(table.within_margin) == [False, False, True, False, True]  # the last is certain, and small
    assert (table.margin == 0.05).all()


def test_differences_and_equivalences_are_two_families():
    table = judged((400, 30, 15), (400, 28, 14), (900, 10, 12), (900, 20, 30))
    assert list(table.p_holm) == pytest.approx(list(multipletests(table.p_value, method="holm")[1]))
    expected = [equivalence(b, c, n, 0.05) for b, c, n in zip(table.gained, table.lost, table.n, strict=True)]
    assert list(table.p_equivalence) == pytest.approx(expected)
    assert list(table.p_equivalence_holm) == pytest.approx(list(multipletests(expected, method="holm")[1]))
    alone = judged((400, 30, 15))
    assert (alone.verdict[0], table.verdict[0]) == ("better", "not detectable")  # the family makes it harder


def test_the_share_of_a_gap_is_exact_at_its_ends_and_its_interval_covers_the_truth():
    draw, groups, covered = np.random.default_rng(0), np.arange(300), []
    low, high = draw.random(300) < 0.6, draw.random(300) < 0.9
    assert statistics.gap_closed(low, low, high, groups, 0.95)["share"] == 0.0
    ends = statistics.gap_closed(low, high, high, groups, 0.95)
    assert (ends["share"], ends["ci_low"], ends["ci_high"], ends["n"]) == (1.0, 1.0, 1.0, 300)
    for _ in range(100):  # the true share is (0.75 − 0.6) / (0.9 − 0.6)
        three = [draw.random(300) < rate for rate in (0.6, 0.75, 0.9)]
        found = statistics.gap_closed(*three, groups, 0.95)
        covered.append(found["ci_low"] <= 0.5 <= found["ci_high"])
        assert found["gap_low"] <= found["gap"] <= found["gap_high"]
    assert np.mean(covered) > 0.88


def test_groups_widen_the_interval_of_a_gap_and_no_gap_has_no_share():
    draw = np.random.default_rng(0)
    low, middle, high = (np.repeat(draw.random(60) < rate, 10) for rate in (0.5, 0.7, 0.9))
    single = statistics.gap_closed(low, middle, high, np.arange(600), 0.95)
    grouped = statistics.gap_closed(low, middle, high, np.repeat(np.arange(60), 10), 0.95)
    assert grouped["gap_high"] - grouped["gap_low"] > 2 * (single["gap_high"] - single["gap_low"])
    none = statistics.gap_closed(low, high, low, np.arange(600), 0.95)
    assert none["gap"] == 0 and all(np.isnan(none[name]) for name in ("share", "ci_low", "ci_high"))
