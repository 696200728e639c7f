"""Checks of exercises: a right answer gets points, a wrong one a hint, and no answer of a student is a traceback."""

import numpy as np
import pandas as pd
import pytest
import torch

from medkit import checks, statistics
from medkit.stage import StageError


@pytest.fixture
def check(outputs):
    return checks.Checks("none")


def test_right_answers_get_points_in_any_type(check, capsys):
    lengths, two = np.array([3, 1, 2, 2, 1, 3, 2, 2, 5]), torch.tensor([64.0, 32.0], requires_grad=True)
    check("3.3", (64, 32), alpha=32)
    check("3.3", two, alpha=32)
    check("5.4", [1 - 21 / 29, 1 - 21 / 29], lengths=lengths)
    check("1.4", lambda row, columns: row["a"], cases=[({"a": 1}, {}, 1)])
    check("6.5", 872)
    check.summary()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[:-1]] == [f"{n}: right" for n in ("3.3", "3.3", "5.4", "1.4", "6.5")]
    assert lines[-1] == "4 of 4 exercises are right: 55 of 55 points."


def test_votes_are_for_options_and_an_unread_answer_has_none(check):
    asked = pd.DataFrame({"id": list("abcd"), "answer": [2, 0, 1, 3], "group": list("wxyz")})
    rows = [
        ("a", (0, 1, 2), 0), ("a", (1, 2, 0), 1), ("a", (2, 0, 1), 0),  # two votes for option 2
        ("b", (0, 1, 2), 0), ("b", (1, 2, 0), 0), ("b", (2, 0, 1), -1),  # a tie: the first one wins
        ("c", (0, 1, 2), -1), ("c", (1, 2, 0), 0), ("c", (2, 0, 1), -1),  # one vote, not in its own order
        ("d", (0, 1, 2), -1), ("d", (1, 2, 0), -1), ("d", (2, 0, 1), -1),  # no vote: wrong
    ]  # fmt: skip
    given = {"in_orders": pd.DataFrame(rows, columns=["id", "order", "place"]), "asked": asked}
    given |= {
        "right": {"plain": np.array([True, False, False, True])},
        "compared": [("Medprompt", "plain"), ("examples", "plain")],
    }
    changes = np.array([[0, 1, 1, -1], [-1, 1, 0, -1]]).T
    ends = statistics.mean_intervals(changes, asked.group, 0.95, imagined=(-1, 1))
    check("5.6", np.column_stack([[1 / 4, -1 / 4], *ends]), **given)
    assert check.right == {"5.6": True}


@pytest.mark.parametrize("answer", [..., None, [64, ...], (None, None), {"a": ...}, lambda a, b: None])
def test_a_missing_answer_is_one_friendly_sentence(check, capsys, answer):
    given = {"texts": ["a", "b"]} if callable(answer) else {"alpha": 32}
    check("1.1" if callable(answer) else "3.3", answer, **given)
    assert "no answer yet" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [(32, 64), (64, 33), (float("nan"), 32)])
def test_a_wrong_answer_gets_a_hint_and_not_the_answer(check, capsys, answer):
    check("3.3", answer, alpha=32)
    printed = capsys.readouterr().out
    assert "not yet. Hint:" in printed and "64" not in printed


@pytest.mark.parametrize("answer", ["many", (64, 32, 1), [[64], [32, 1]], object()])
def test_an_answer_of_another_form_is_told_the_form(check, capsys, answer):
    check("3.3", answer, alpha=32)
    assert checks.EXERCISES["3.3"]["form"] in capsys.readouterr().out
    assert check.right == {"3.3": False}


def test_a_failing_function_is_named(check, capsys):
    check("1.1", lambda a, b: 1 / 0, texts=["a", "b"])
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_a_run_without_the_stage_says_what_to_run(check):
    with pytest.raises(StageError, match="run notebook 01_data first"):
        check("1.5", 100)
