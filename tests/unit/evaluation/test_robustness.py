"""Robustness tests against models whose answers are known: one letter, a guess, an oracle."""

import numpy as np
import pandas as pd
import pytest

from medkit.evaluation import robustness
from medkit.inference import question_variants
from medkit.statistics import wilson


def judged_rows(rows):
    """Judged answers of one variant: (id, order, choice, answer), four options, a group each."""
    table = pd.DataFrame(rows, columns=["id", "order", "choice", "answer"])
    table = table.assign(variant="lora", source="exam", scoring="letter", group=table.id)
    return table.assign(correct=table.choice == table.answer)


def answered(choose, questions=40, options=4, orders=3):
    """Shuffled questions answered by choose(order, id, answer) → option; the right answers go round the options."""
    rows = []
    for i in range(questions):
        asked = {"id": f"q{i}", "options": list(range(options))}
        for order in question_variants.option_orders(asked, orders, seed=0):
            rows.append((f"q{i}", order, choose(order, i, i % options), i % options))
    return judged_rows(rows)


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
    orders = [([0, 1, 2, 3], [0, 2, 3, 1])] * 5 + [([0, 1, 2, 3], [1, 2, 3, 0])] * 5
    rows = [(f"q{i}", order, order[0], 0) for i, pair in enumerate(orders) for order in pair]
    row = consistency(judged_rows(rows))
    assert row["value"] == row["by_chance"] == 0.5


def test_a_model_that_knows_is_always_consistent_and_so_is_one_that_errs_alike():
    right, wrong = (consistency(answered(lambda order, i, answer, by=by: (answer + by) % 4)) for by in (0, 1))
    assert (right["value"], right["accuracy"], wrong["value"], wrong["accuracy"]) == (1, 1, 1, 0)
    assert (right["ci_low"], right["ci_high"]) == pytest.approx(wilson(40, 40, 0.95), abs=0.04)
    nothing = consistency(answered(lambda order, *_: -1))
    assert nothing["value"] == nothing["by_chance"] == 0


def test_a_guess_gets_what_is_expected_of_it():
    draw, frequency = np.random.default_rng(0), np.array([0.7, 0.2, 0.1, 0.0])
    row = consistency(answered(lambda order, *_: order[draw.choice(4, p=frequency)], questions=3000, orders=2))
    assert row["value"] == pytest.approx(row["by_chance"], abs=0.03)  # 4 standard errors
    assert row["by_chance"] < 0.2


def test_a_letter_that_is_always_chosen_is_right_where_the_answer_is():
    table = robustness.letter_bias(answered(lambda order, *_: order[2], orders=4), 0.95).set_index("letter")
    assert table.value.to_dict() == table.chosen.to_dict() == {"A": 0, "B": 0, "C": 1, "D": 0}
    assert set(table.n) == {40}  # every question has its answer at every letter once
