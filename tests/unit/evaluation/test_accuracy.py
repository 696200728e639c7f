"""How answers are judged, and what is said of one variant, of two, and of a whole table of them."""

import itertools
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax

from medkit import statistics
from medkit.evaluation import accuracy
from medkit.stage import MedkitError


def prediction(variant, id, scoring, logprobs=(), answer_tokens=(), text="", template="text"):
    return {
        "variant": variant, "id": id, "scoring": scoring, "template": template, "logprobs": list(logprobs),
        "answer_tokens": list(answer_tokens), "text": text,
    }  # fmt: skip


@pytest.mark.parametrize("scoring", ["letter", "option_text"])
def test_the_choice_is_the_likeliest_option_and_probabilities_are_the_softmax(questions, scoring):
    """By the sum of log-probabilities, and of option texts by their mean per token too, where tokens were counted."""
    draw, counts = np.random.default_rng(0), {"q0": 4, "q1": 3, "q2": 3}
    rows = [
        prediction("lora", id, scoring, draw.normal(-20, 9, count), draw.integers(1, 9, count))
        for id, count in counts.items()
    ]
    judged = accuracy.judge(pd.DataFrame(rows), questions).set_index(["scoring", "id"])
    by_token = {"option_text_norm": "answer_tokens"} if scoring == "option_text" else {}
    assert len(judged) == 3 * (1 + len(by_token)) and judged.correct.nunique() == 2
    for name, row in itertools.product([scoring, *by_token], rows):
        values = np.divide(row["logprobs"], row[by_token[name]] if name in by_token else 1)
        found = judged.loc[(name, row["id"])]
        assert np.log(found.probabilities) == pytest.approx(log_softmax(values))
        assert found.choice == np.argmax(values)
        assert found.correct == (found.choice == questions.set_index("id").answer[row["id"]])
    uncounted = pd.DataFrame(rows).drop(columns=["answer_tokens", "text", "template"])
    assert set(accuracy.judge(uncounted, questions).scoring) == {scoring}


def test_predictions_that_do_not_fit_the_questions_are_an_error(questions):
    rows = [prediction("lora", "q1", "letter", [-1.0, -2.0, -3.0]), prediction("nf4", "q0", "letter", [-1.0] * 3)]
    with pytest.raises(MedkitError, match=r"q0 has 4 options, its letter prediction by nf4 3 log-probabilities"):
        accuracy.judge(pd.DataFrame(rows), questions)
    rows = [prediction("lora", id, "generated", text="zinc") for id in ("q0", "q9")]
    with pytest.raises(MedkitError, match="1 predictions"):
        accuracy.judge(pd.DataFrame(rows), questions)


def test_generated_text_that_cannot_be_read_is_wrong_and_counted(questions):
    texts = {"q0": "Vitamin C", "q1": "It could be any of them.", "q2": "maybe"}
    rows = [prediction("lora", id, "generated", text=text) for id, text in texts.items()]
    judged = accuracy.judge(pd.DataFrame(rows), questions)
    assert judged.set_index("id").choice.to_dict() == {"q0": 1, "q1": -1, "q2": 2}
    assert judged.set_index("id").correct.to_dict() == {"q0": True, "q1": False, "q2": False}
    shuffled = accuracy.judge(pd.DataFrame(rows).assign(order=[[0, 1, 2, 3], [3, 2, 1, 0], [2, 1, 0]]), questions)
    assert "order" not in judged and shuffled.order.map(len).tolist() == [4, 4, 3]
    pd.testing.assert_frame_equal(shuffled[judged.columns], judged)  # a robustness test is judged like anything else
    table = accuracy.measure_accuracy(judged, 0.95).set_index("source")
    for source, expected in {"exam": (0.5, 0.5, 2), "trial": (0, 0, 1)}.items():
        row = table.loc[source]
        assert (row.accuracy, row.unparsed_rate, row.n) == expected


STEPS = [
    ("teacher", "teacher_base", "Is it taught?"),
    ("base", "teacher", "What do layers cost?"),
    ("student_ce", "base", "Does training help?"),
    ("nf4", "lora", "What does NF4 cost?"),
    ("nf4", "teacher_base", "Is small better?"),
]
compare = partial(accuracy.compare_steps, steps=STEPS)
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
    return table.assign(answer=0, choice=np.where(table.correct, 0, 1), group=table.id)


def test_an_accuracy_has_an_interval_that_copies_do_not_narrow(judged):
    table = accuracy.measure_accuracy(judged, 0.95)
    assert len(table) == len(RATES) * 2
    for row in table.itertuples():
        mine = judged[(judged.variant == row.variant) & (judged.source == row.source)]
        assert (row.accuracy, row.n) == (pytest.approx(mine.correct.mean()), len(mine))
        # every question is its own group here
        by_wilson = statistics.wilson(mine.correct.sum(), row.n, 0.95)
        assert (row.ci_low, row.ci_high) == pytest.approx(by_wilson, abs=0.04)
    copies = pd.concat([judged.assign(id=judged.id + f"-{i}") for i in range(6)])
    widths = [t.ci_high - t.ci_low for t in (table, accuracy.measure_accuracy(copies, 0.95))]
    assert (widths[1] > 0.85 * widths[0]).all()
    steps = compare(copies, 0.95, 0.8, 0.05)
    once = compare(judged, 0.95, 0.8, 0.05)
    assert (steps.design_effect > 5).all() and steps.p_value.to_list() == pytest.approx(once.p_value.to_list())


def test_steps_compare_the_same_questions_and_flips_are_those_gained_and_lost(judged):
    table, flips = compare(judged, 0.95, 0.8, 0.05), accuracy.find_flips(judged, STEPS)
    assert [(r.variant, r.baseline) for r in table[table.source == "exam"].itertuples()] == [s[:2] for s in STEPS]
    for row in table.itertuples():
        correct = {
            v: judged[(judged.variant == v) & (judged.source == row.source)].set_index("id").correct.sort_index()
            for v in (row.variant, row.baseline)
        }
        by_id = statistics.paired_difference(correct[row.variant], correct[row.baseline], 0.95, 0.8)
        assert {name: getattr(row, name) for name in by_id} == pytest.approx(by_id)
        mine = flips[(flips.variant == row.variant) & (flips.baseline == row.baseline) & (flips.source == row.source)]
        assert ((mine.flip == "gained").sum(), (mine.flip == "lost").sum()) == (row.gained, row.lost)
        assert mine.id.is_unique
    assert len(flips) == table.gained.sum() + table.lost.sum()
    gained = flips[flips.flip == "gained"]
    assert (gained.choice_after == 0).all() and (gained.choice_before == 1).all()


def test_steps_whose_variants_are_there_are_compared_each_with_its_margin(judged):
    steps = [("nf4", "base", "Is it?"), ("edge", "base", "Is this?")]
    table = accuracy.compare_steps(judged, 0.95, 0.8, 0.05, steps)
    assert set(zip(table.variant, table.baseline, table.question, strict=True)) == {("nf4", "base", "Is it?")}
    none = accuracy.compare_steps(judged, 0.95, 0.8, 0.05, steps[1:])
    assert none.empty and set(none) <= set(table)
    rates = judged[judged.source == table.source[0]].groupby("variant").correct.mean()
    assert (table.accuracy[0], table.accuracy_baseline[0]) == pytest.approx((rates["nf4"], rates["base"]))
    table, one = (compare(judged, 0.95, 0.8, m) for m in ({**dict.fromkeys(RATES, 0.2), "teacher": 0.4}, 0.4))
    assert table.margin.to_list() == [0.4 if variant == "teacher" else 0.2 for variant in table.variant]
    assert table.p_equivalence[table.variant == "teacher"].equals(one.p_equivalence[one.variant == "teacher"])


def test_two_variants_that_know_nothing_are_not_equivalent(judged):
    table = compare(judged.assign(correct=False), 0.95, 0.8, 0.5)
    assert (table.difference == 0).all() and not table.within_margin.any()
    assert set(table.verdict) == {"not detectable"} and compare(judged, 0.95, 0.8, 0.9).within_margin.all()


def test_two_answers_of_one_variant_to_one_question_are_not_averaged(judged):
    with pytest.raises(MedkitError, match="two answers of a variant"):
        compare(pd.concat([judged, judged]), 0.95, 0.8, 0.05)


def test_as_many_questions_as_are_needed_show_equivalence_with_the_power():
    """1,000 pairs of models that lose nothing and flip 8 % of the answers."""
    steps = pd.DataFrame({"gained": [40], "lost": [40], "n": [1000], "design_effect": 1.0, "margin": 0.03})
    n = accuracy.questions_needed(steps, 0.95, 0.8)[0]
    flips = np.random.default_rng(0).multinomial(n, [0.041, 0.041, 0.918], 1000)
    shown = np.mean([statistics.equivalence_p(gained, lost, n, 0.03) < 0.05 for gained, lost, _ in flips])
    assert shown == pytest.approx(0.8, abs=0.05)
