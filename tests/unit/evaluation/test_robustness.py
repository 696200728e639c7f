"""What the studies say, against models whose answer is known: one letter, a guess, an oracle, known variances."""

import itertools

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from medkit.evaluation import robustness
from medkit.evaluation.robustness import RobustnessError
from medkit.inference import question_variants
from medkit.statistics import median_interval, wilson


def judged_rows(study, rows, scoring="letter", **more):
    """Judged answers of one variant: (id, condition, choice, answer), four options, a group each."""
    table = pd.DataFrame(rows, columns=["id", "condition", "choice", "answer"])
    table = table.assign(
        variant="lora", source="exam", scoring=scoring, study=study, group=table.id, clean=True, **more
    )
    return table.assign(correct=table.choice == table.answer)


# --- order of the options ------------------------------------------------------------------------------------------


def answered(say, questions=40, options=4, orders=3):
    """Shuffled questions answered by say(order, id, answer) → option; the right answers go round the options."""
    rows = []
    for i in range(questions):
        asked = {"id": f"q{i}", "options": list(range(options))}
        for order in question_variants.option_orders(asked, orders, seed=0):
            rows.append((f"q{i}", question_variants.order_label(order), say(order, i, i % options), i % options))
    return judged_rows("shuffle", rows)


def consistency(judged):
    (row,) = robustness.shuffle_consistency(judged, 0.95).to_dict("records")
    return row


@pytest.mark.parametrize("letter", [0, 3])
@pytest.mark.parametrize("orders", [2, 3, 4])
def test_one_letter_for_everything_is_never_consistent_and_told_to_be_so(letter, orders):
    found = consistency(answered(lambda order, *_: order[letter], orders=orders))
    assert found["value"] == found["constant_letter"] == found["own_letters"] == 0
    assert found["uniform"] == pytest.approx(4.0 ** (1 - orders))
    assert (found["n"], found["orders"], found["always_right"]) == (40, orders, 0)
    if orders == 4:  # the right answer stood at every place once
        assert found["accuracy"] == 0.25


def test_one_letter_under_orders_that_repeat_gets_what_is_expected_of_it():
    """By hand: in half of the questions the first letter holds the same option twice, the other letters in none."""
    orders = [("order=0123", "order=0231")] * 5 + [("order=0123", "order=1230")] * 5
    rows = [(f"q{i}", label, int(label[6]), 0) for i, pair in enumerate(orders) for label in pair]
    found = consistency(judged_rows("shuffle", rows))
    assert found["value"] == found["own_letters"] == 0.5
    assert found["constant_letter"] == pytest.approx(0.5 / 4)
    assert found["uniform"] == pytest.approx(0.25)


def test_who_knows_is_always_consistent_and_who_errs_alike_too():
    right, wrong = (consistency(answered(lambda order, i, answer, by=by: (answer + by) % 4)) for by in (0, 1))
    assert (right["value"], right["always_right"], right["accuracy"]) == (1, 1, 1)
    assert (wrong["value"], wrong["always_right"], wrong["accuracy"]) == (1, 0, 0)
    assert (right["ci_low"], right["ci_high"]) == wilson(40, 40, 0.95)


def test_a_guess_gets_what_is_expected_of_it():
    draw = np.random.default_rng(0)
    even = consistency(answered(lambda order, *_: order[draw.integers(4)], questions=3000, orders=2))
    assert even["value"] == pytest.approx(0.25, abs=0.03)  # 4 standard errors
    lean = np.array([0.7, 0.2, 0.1, 0.0])
    found = consistency(answered(lambda order, *_: order[draw.choice(4, p=lean)], questions=3000, orders=2))
    assert found["value"] == pytest.approx(found["own_letters"], abs=0.03)
    assert found["own_letters"] < 0.2 < found["uniform"]


def test_with_one_order_everything_is_consistent():
    found = consistency(answered(lambda order, *_: order[1], orders=1))
    assert found["value"] == found["constant_letter"] == found["uniform"] == found["own_letters"] == 1


def test_what_cannot_be_read_is_consistent_with_nothing():
    found = consistency(answered(lambda order, *_: -1))
    assert found["value"] == found["own_letters"] == 0


def test_questions_with_fewer_options_are_expected_by_their_own_number():
    both = pd.concat(
        [
            answered(lambda order, *_: order[0], options=n, orders=4).assign(id=lambda t, n=n: t.id + f"/{n}")
            for n in (2, 4)
        ]
    )
    found = consistency(both)
    assert found["uniform"] == pytest.approx((1 / 2 + 1 / 64) / 2)
    assert (found["n"], found["orders"], found["constant_letter"]) == (80, 4, 0)


def test_the_letter_that_is_always_said_is_right_where_the_answer_stands():
    table = robustness.letter_bias(answered(lambda order, *_: order[2], orders=4), 0.95).set_index("letter")
    assert table.value.to_dict() == {"A": 0, "B": 0, "C": 1, "D": 0}
    assert table.chosen.to_dict() == table.value.to_dict()
    assert set(table.n) == {40}  # every question stands at every letter once


# --- names of drugs ------------------------------------------------------------------------------------------------


def swap(before, after, answer=0):
    rows = [(f"p{i}", "original", choice, answer) for i, choice in enumerate(before)]
    rows += [(f"p{i}", "swapped", choice, answer) for i, choice in enumerate(after)]
    (found,) = robustness.swap_drop(
        judged_rows("swap", rows, "option_text").sample(frac=1, random_state=0), 0.95, 0.8
    ).to_dict("records")
    return found


def test_identical_pairs_drop_by_exactly_nothing():
    found = swap([0, 1, 2, 0] * 10, [0, 1, 2, 0] * 10)
    assert (found["value"], found["changed"], found["p_value"], found["n"]) == (0, 0, 1, 40)
    assert found["original"] == found["swapped"] == 0.5
    assert (found["changed_low"], found["changed_high"]) == wilson(0, 40, 0.95)


def test_a_drop_is_after_minus_before_and_changes_count_wrong_to_wrong():
    found = swap([0] * 20 + [1] * 20, [1] * 10 + [0] * 10 + [2] * 5 + [0] * 1 + [1] * 14)
    assert found["value"] == pytest.approx(-9 / 40)
    assert (found["gained"], found["lost"], found["changed"]) == (1, 10, 16 / 40)
    assert (found["original"], found["swapped"]) == (0.5, 11 / 40)
    assert found["ci_low"] < found["value"] < found["ci_high"] < 0


# --- wording and scoring -------------------------------------------------------------------------------------------

TEMPLATES, SCORINGS = ["letter", "abstain", "rationale"], ["letter", "option_text"]


def grid(values, templates=TEMPLATES, scorings=SCORINGS):
    """Judged answers of an ablation from verdicts (questions, templates, scorings)."""
    parts = []
    for t, s in itertools.product(range(len(templates)), range(len(scorings))):
        rows = [(f"q{i}", templates[t], 0 if right else 1, 0) for i, right in enumerate(values[:, t, s])]
        parts.append(judged_rows("ablation", rows, scorings[s]))
    return pd.concat(parts).sample(frac=1, random_state=1)


@pytest.fixture(scope="module")
def verdicts():
    return np.random.default_rng(3).random((30, 3, 2)) < np.array([[0.8, 0.3], [0.6, 0.5], [0.2, 0.4]])


def test_sums_of_squares_are_those_of_statsmodels(verdicts):
    squares, freedom = robustness.sums_of_squares(verdicts.astype(float))
    cells = [(*place, float(value)) for place, value in np.ndenumerate(verdicts)]
    data = pd.DataFrame([(q, t, s, v) for q, t, s, v in cells], columns=["question", "template", "scoring", "y"])
    formula = "y ~ (C(question) + C(template) + C(scoring)) ** 2"
    table = anova_lm(ols(formula, data).fit())
    table.index = [name.replace("C(", "").replace(")", "").replace(":", " × ").lower() for name in table.index]
    assert set(squares) == set(table.index)
    assert squares == pytest.approx(table.sum_sq.to_dict())
    assert freedom == table.df.astype(int).to_dict()
    assert sum(squares.values()) == pytest.approx(((verdicts - verdicts.mean()) ** 2).sum())


def test_known_variances_are_found_again():
    """Normal effects of known variance, many levels of each: the estimates are unbiased."""
    true = {"question": 2.0, "template": 0.5, "scoring": 0.3, "question × template": 0.4, "question × scoring": 0.0,
            "template × scoring": 0.2, "residual": 1.0}  # fmt: skip
    axes = dict(zip(["question", "template", "scoring"], range(3), strict=True))
    draw, shape, found = np.random.default_rng(0), (12, 6, 5), []
    for _ in range(600):
        values = np.zeros(shape)
        for name, variance in true.items():
            kept = set(axes.values()) if name == "residual" else {axes[part] for part in name.split(" × ")}
            size = [n if axis in kept else 1 for axis, n in enumerate(shape)]
            values = values + draw.normal(scale=np.sqrt(variance), size=size)
        found.append(robustness.components(values))
    table = pd.DataFrame(found)
    error = table.std() / np.sqrt(len(table))
    for name, variance in true.items():
        assert abs(table[name].mean() - variance) < 4 * error[name], name
        assert error[name] < 0.05


def test_shares_are_of_one_and_negative_estimates_are_said(verdicts):
    table = robustness.variance_components(grid(verdicts), 0.95).set_index("component")
    assert len(table) == 7 and table.share.sum() == pytest.approx(1)
    raw = robustness.components(verdicts[:, [1, 0, 2]].astype(float))  # templates by name
    assert table.estimate.to_dict() == pytest.approx(raw)
    assert (table.value == np.maximum(0, table.estimate)).all() and (table.estimate < 0).any()
    assert (table.ci_low <= table.value).all() and (table.value <= table.ci_high).all()
    assert set(table.n) == {30} and set(table.left_out) == {""}
    assert np.allclose(table.sd**2, table.value)


def test_only_the_question_matters_where_every_way_agrees(verdicts):
    alike = np.repeat(np.arange(20) % 2 == 0, 6).reshape(20, 3, 2)
    table = robustness.variance_components(grid(alike), 0.95).set_index("component")
    assert table.share["question"] == 1 and table.value.drop("question").eq(0).all()
    assert table.value["question"] == pytest.approx(0.25 * 20 / 19)


def test_where_a_template_lacks_a_scoring_both_full_grids_are_analysed(verdicts):
    """Letters cannot be asked for under `text`: once without letters, once without `text`."""
    three = np.concatenate([verdicts, verdicts[:, ::-1, :1]], axis=2)
    scorings = ["letter", "option_text", "generated"]
    whole = grid(three, scorings=scorings)
    text = grid(verdicts[:, :1], ["text"], scorings[1:])
    table = robustness.variance_components(pd.concat([whole, text]), 0.95)
    assert table.groupby("left_out", sort=False)[["templates", "scorings"]].first().to_dict("index") == {
        "letter": {"templates": 4, "scorings": 2}, "text": {"templates": 3, "scorings": 3},
    }  # fmt: skip
    expected = robustness.variance_components(whole, 0.95).drop(columns="left_out")
    assert table[table.left_out == "text"].drop(columns="left_out").reset_index(drop=True).equals(expected)


def test_one_template_has_no_variance(verdicts):
    with pytest.raises(
        RobustnessError, match=r"lora, exam: variances need .* there are text × generated, text × letter"
    ):
        robustness.variance_components(grid(verdicts[:, :1], ["text"], ["letter", "generated"]), 0.95)


def test_the_table_holds_each_cell(verdicts):
    table = robustness.ablation_table(grid(verdicts), 0.95).set_index(["template", "scoring"])
    for t, s in itertools.product(range(3), range(2)):
        cell = table.loc[TEMPLATES[t], SCORINGS[s]]
        right = verdicts[:, t, s].sum()
        assert (cell.value, cell.n) == (right / 30, 30)
        assert (cell.ci_low, cell.ci_high) == wilson(int(right), 30, 0.95)


def test_the_range_is_best_minus_worst_and_set_beside_luck(verdicts):
    (found,) = robustness.prompt_range(grid(verdicts), 0.95, 0.8).to_dict("records")
    means = verdicts.mean(axis=0)
    best, worst = (np.unravel_index(pick(means), means.shape) for pick in (np.argmax, np.argmin))
    assert found["value"] == pytest.approx(np.ptp(means))
    assert found["best"] == f"{TEMPLATES[best[0]]} × {SCORINGS[best[1]]}"
    assert found["worst"] == f"{TEMPLATES[worst[0]]} × {SCORINGS[worst[1]]}"
    assert found["p_value"] < 0.01 and found["range_if_alike"] < found["value"] and found["ways"] == 6


def test_ways_that_are_alike_have_a_range_too_and_luck_explains_it():
    draw, p_values = np.random.default_rng(0), []
    for _ in range(40):
        (found,) = robustness.prompt_range(grid(draw.random((25, 3, 2)) < 0.5), 0.95, 0.8).to_dict("records")
        p_values.append(found["p_value"])
        assert found["value"] > 0
    assert np.mean(np.array(p_values) < 0.2) == pytest.approx(0.2, abs=0.19)


# --- asking with help ----------------------------------------------------------------------------------------------


def helped(rows):
    """(id, condition, probabilities, answer) → judged answers."""
    table = judged_rows("ensemble", [(i, c, int(np.argmax(p)), a) for i, c, p, a in rows])
    return table.assign(probabilities=[np.array(p) for *_, p, _ in rows])


def test_probabilities_are_averaged_over_orders_and_paired_with_the_plain_question():
    rows = []
    for i in range(10):
        rows += [
            (f"q{i}", "shots=0 order=012", [0.2, 0.5, 0.3], 0),  # wrong
            (f"q{i}", "shots=3 order=012", [0.4, 0.5, 0.1], 0 if i < 8 else 2),  # wrong
            (f"q{i}", "shots=3 order=120", [0.45, 0.1, 0.45], 0 if i < 8 else 2),  # in the mean the first option
        ]
    rows = [(i, c, p, 0 if int(i[1:]) < 8 else 2) for i, c, p, _ in rows]
    table = robustness.ensemble_line(helped(rows), 0.95, 0.8).set_index("line")
    assert table.value.to_dict() == {"zero-shot": 0, "few-shot": 0, "ensemble": 0.8}
    assert table.difference.to_dict() == {"zero-shot": 0, "few-shot": 0, "ensemble": 0.8}
    assert (table.gained["ensemble"], table.lost["ensemble"], set(table.n)) == (8, 0, {10})
    assert (table.ci_low["ensemble"], table.ci_high["ensemble"]) == wilson(8, 10, 0.95)
    assert table.shots.to_dict() == {"zero-shot": 0, "few-shot": 3, "ensemble": 3}
    assert table.orders.to_dict() == {"zero-shot": 1, "few-shot": 1, "ensemble": 2}
    assert table.difference_low["ensemble"] > 0


def test_one_order_and_no_examples_is_the_plain_question():
    draw = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    table = robustness.ensemble_line(
        helped([(f"q{i}", "shots=0 order=0123", p, i % 4) for i, p in enumerate(draw)]), 0.95, 0.8
    )
    assert table.line.tolist() == ["zero-shot", "few-shot", "ensemble"]
    assert table.value.nunique() == 1 and table.difference.eq(0).all() and table.p_value.eq(1).all()


# --- length --------------------------------------------------------------------------------------------------------


def test_lengths_are_of_generated_answers_alone(questions):
    texts = ["Vitamin C", "It is vitamin C, of course", "Vitamin C", ""]
    table = pd.DataFrame({"id": ["q0", "q1", "q0", "q0"], "variant": ["lora", "lora", "lora", "base"], "text": texts})
    table = table.assign(scoring="generated", template="text", answer_tokens=[[3], [8], [4], [1]])
    scored = pd.DataFrame({"id": ["q0"], "variant": "lora", "text": "", "scoring": "letter", "answer_tokens": [[1, 1]]})
    found = robustness.answer_lengths(pd.concat([table, scored]), questions, 8, 0.95).set_index("variant")
    assert found.value.to_dict() == {"lora": 4, "base": 1}
    assert found.words.to_dict() == {"lora": 2, "base": 0}
    assert found.at_limit.to_dict() == {"lora": pytest.approx(1 / 3), "base": 0}
    assert found.p95["lora"] == pytest.approx(7.6) and found.n.to_dict() == {"lora": 3, "base": 1}
    assert (found.ci_low["lora"], found.ci_high["lora"]) == median_interval([3, 8, 4], 0.95)[1:]
    with pytest.raises(RobustnessError, match="run notebook 05 again"):
        robustness.answer_lengths(table.assign(answer_tokens=[[]] * 4), questions, 8, 0.95)


@pytest.mark.parametrize("read", [robustness.shuffle_consistency, robustness.letter_bias, robustness.ablation_table])
def test_a_study_that_was_not_asked_is_an_error(read):
    with pytest.raises(RobustnessError, match=r"no answers of the study .* there are \['swap'\]"):
        read(judged_rows("swap", [("p0", "original", 0, 0)]), 0.95)
