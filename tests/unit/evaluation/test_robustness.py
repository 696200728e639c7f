"""Robustness tests against models whose answers are known: one letter, a guess, an oracle."""

import numpy as np
import pandas as pd
import pytest

from medkit.evaluation import robustness
from medkit.evaluation.robustness import RobustnessError
from medkit.inference import question_variants
from medkit.statistics import median_interval, wilson


def judged_rows(study, rows, scoring="letter"):
    """Judged answers of one variant: (id, condition, choice, answer), four options, a group each."""
    table = pd.DataFrame(rows, columns=["id", "condition", "choice", "answer"])
    table = table.assign(variant="lora", source="exam", scoring=scoring, study=study, group=table.id)
    return table.assign(correct=table.choice == table.answer)


# --- order of the options ------------------------------------------------------------------------------------------


def answered(choose, questions=40, options=4, orders=3):
    """Shuffled questions answered by choose(order, id, answer) → option; the right answers go round the options."""
    rows = []
    for i in range(questions):
        asked = {"id": f"q{i}", "options": list(range(options))}
        for order in question_variants.option_orders(asked, orders, seed=0):
            rows.append((f"q{i}", question_variants.order_label(order), choose(order, i, i % options), i % options))
    return judged_rows("shuffle", rows)


def consistency(judged):
    (row,) = robustness.shuffle_consistency(judged, 0.95).to_dict("records")
    return row


@pytest.mark.parametrize("orders", [2, 3, 4])
def test_one_letter_for_everything_is_never_consistent(orders):
    row = consistency(answered(lambda order, *_: order[3], orders=orders))
    assert row["value"] == row["by_chance"] == 0 and (row["n"], row["orders"]) == (40, orders)
    if orders == 4:  # the right answer was at every letter once
        assert row["accuracy"] == 0.25


def test_one_letter_under_orders_that_repeat_gets_what_is_expected_of_it():
    """By hand: in half of the questions the first letter has the same option twice."""
    orders = [("order=0123", "order=0231")] * 5 + [("order=0123", "order=1230")] * 5
    rows = [(f"q{i}", label, int(label[6]), 0) for i, pair in enumerate(orders) for label in pair]
    row = consistency(judged_rows("shuffle", rows))
    assert row["value"] == row["by_chance"] == 0.5


def test_a_model_that_knows_is_always_consistent_and_so_is_one_that_errs_alike():
    right, wrong = (consistency(answered(lambda order, i, answer, by=by: (answer + by) % 4)) for by in (0, 1))
    assert (right["value"], right["accuracy"]) == (1, 1)
    assert (wrong["value"], wrong["accuracy"]) == (1, 0)
    assert (right["ci_low"], right["ci_high"]) == wilson(40, 40, 0.95)


def test_a_guess_gets_what_is_expected_of_it():
    draw, frequency = np.random.default_rng(0), np.array([0.7, 0.2, 0.1, 0.0])
    row = consistency(answered(lambda order, *_: order[draw.choice(4, p=frequency)], questions=3000, orders=2))
    assert row["value"] == pytest.approx(row["by_chance"], abs=0.03)  # 4 standard errors
    assert row["by_chance"] < 0.2


def test_an_answer_that_names_no_option_is_never_consistent():
    row = consistency(answered(lambda order, *_: -1))
    assert row["value"] == row["by_chance"] == 0


def test_a_letter_that_is_always_chosen_is_right_where_the_answer_is():
    table = robustness.letter_bias(answered(lambda order, *_: order[2], orders=4), 0.95).set_index("letter")
    assert table.value.to_dict() == table.chosen.to_dict() == {"A": 0, "B": 0, "C": 1, "D": 0}
    assert set(table.n) == {40}  # every question has its answer at every letter once


# --- names of drugs ------------------------------------------------------------------------------------------------


def swap(before, after, answer=0):
    rows = [(f"p{i}", "original", choice, answer) for i, choice in enumerate(before)]
    rows += [(f"p{i}", "swapped", choice, answer) for i, choice in enumerate(after)]
    judged = judged_rows("swap", rows, "option_text").sample(frac=1, random_state=0)
    (row,) = robustness.swap_drop(judged, 0.95, 0.8).to_dict("records")
    return row


def test_a_drop_is_after_minus_before_and_changes_include_wrong_to_wrong():
    same = swap([0, 1, 2, 0] * 10, [0, 1, 2, 0] * 10)
    assert (same["value"], same["changed"], same["p_value"], same["original"]) == (0, 0, 1, 0.5)
    row = swap([0] * 20 + [1] * 20, [1] * 10 + [0] * 10 + [2] * 5 + [0] * 1 + [1] * 14)
    assert row["value"] == pytest.approx(-9 / 40)
    assert (row["gained"], row["lost"], row["changed"]) == (1, 10, 16 / 40)
    assert (row["original"], row["swapped"]) == (0.5, 11 / 40)
    assert row["ci_low"] < row["value"] < row["ci_high"] < 0


# --- templates, examples, length -----------------------------------------------------------------------------------


def test_each_cell_has_its_accuracy_and_the_range_is_best_minus_worst():
    verdicts = {("letter", "letter"): 24, ("letter", "option_text"): 12, ("rationale", "letter"): 6}
    parts = [
        judged_rows("ablation", [(f"q{i}", template, 0 if i < right else 1, 0) for i in range(30)], scoring)
        for (template, scoring), right in verdicts.items()
    ]
    table = robustness.template_accuracy(pd.concat(parts), 0.95)
    cells = table.set_index(["template", "scoring"])
    for cell, right in verdicts.items():
        assert (cells.value[cell], cells.n[cell]) == (right / 30, 30)
        assert (cells.ci_low[cell], cells.ci_high[cell]) == wilson(right, 30, 0.95)
    (row,) = robustness.template_range(table).to_dict("records")
    assert row["value"] == pytest.approx(0.6)
    assert (row["best"], row["worst"]) == ("letter × letter", "rationale × letter")


def test_probabilities_are_averaged_over_orders_and_paired_with_the_plain_question():
    rows = []
    for i in range(10):
        answer = 0 if i < 8 else 2
        rows += [
            (f"q{i}", "shots=0 order=012", [0.2, 0.5, 0.3], answer),  # wrong
            (f"q{i}", "shots=3 order=012", [0.4, 0.5, 0.1], answer),  # wrong
            (f"q{i}", "shots=3 order=120", [0.45, 0.1, 0.45], answer),  # the mean prefers the first option
        ]
    judged = judged_rows("ensemble", [(i, c, int(np.argmax(p)), a) for i, c, p, a in rows])
    judged = judged.assign(probabilities=[np.array(p) for *_, p, _ in rows])
    table = robustness.few_shot_accuracy(judged, 0.95, 0.8).set_index("line")
    assert table.value.to_dict() == table.difference.to_dict() == {"zero-shot": 0, "few-shot": 0, "ensemble": 0.8}
    assert (table.ci_low["ensemble"], table.ci_high["ensemble"]) == wilson(8, 10, 0.95)
    assert table.p_value["ensemble"] == pytest.approx(2**-7)


def test_lengths_are_of_generated_answers_alone(questions):
    texts = ["Vitamin C", "It is vitamin C, of course", "Vitamin C", ""]
    table = pd.DataFrame({"id": ["q0", "q1", "q0", "q0"], "variant": ["lora", "lora", "lora", "base"], "text": texts})
    table = table.assign(scoring="generated", template="text", answer_tokens=[[3], [8], [4], [1]])
    scored = pd.DataFrame({"id": ["q0"], "variant": "lora", "text": "", "scoring": "letter", "answer_tokens": [[1, 1]]})
    lengths = robustness.answer_lengths(pd.concat([table, scored]), questions, 8, 0.95).set_index("variant")
    assert lengths.value.to_dict() == {"lora": 4, "base": 1}
    assert lengths.words.to_dict() == {"lora": 2, "base": 0}
    assert lengths.at_limit.to_dict() == {"lora": pytest.approx(1 / 3), "base": 0}
    assert (lengths.ci_low["lora"], lengths.ci_high["lora"]) == median_interval([3, 8, 4], 0.95)[1:]
    with pytest.raises(RobustnessError, match="run notebook 05 again"):
        robustness.answer_lengths(table.assign(answer_tokens=[[]] * 4), questions, 8, 0.95)


def test_a_robustness_test_that_was_not_made_is_an_error():
    with pytest.raises(RobustnessError, match="the robustness test 'shuffle'"):
        robustness.letter_bias(judged_rows("swap", [("p0", "original", 0, 0)]), 0.95)
