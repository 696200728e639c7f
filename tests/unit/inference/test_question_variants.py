"""What is asked: orders that no letter survives, pairs, grids, and examples that give nothing away."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medkit.evaluation import accuracy
from medkit.inference import predictions, question_variants
from medkit.prompts import templates
from medkit.stage import MedkitError


@pytest.fixture
def by_letter(questions):
    return questions[questions.split == "test"].assign(scoring="letter")


# --- orders --------------------------------------------------------------------------------------------------------


@given(st.integers(2, 10), st.integers(1, 12), st.integers(0, 2**32))
def test_orders_begin_with_the_own_one_and_show_no_option_at_one_place_twice(options, orders, seed):
    found = question_variants.option_orders({"id": "x", "options": [f"drug {i}" for i in range(options)]}, orders, seed)
    assert found[0] == list(range(options))
    assert len(found) == min(orders, options)
    assert all(sorted(order) == found[0] for order in found)
    for place in range(options):
        assert len({order[place] for order in found}) == len(found)


def test_orders_depend_on_seed_and_question_and_on_nothing_else():
    def drawn(name, seed):
        return question_variants.option_orders({"id": name, "options": list("abcdefgh")}, 3, seed)

    assert drawn("x", 0) == drawn("x", 0)
    assert len({str(drawn(name, seed)) for name, seed in itertools.product("xyz", range(3))}) == 9


def test_the_right_answer_comes_to_every_place_alike():
    places = [
        order.index(1)
        for i in range(1500)
        for order in question_variants.option_orders({"id": str(i), "options": list("abcd")}, 3, 0)[1:]
    ]
    assert all(abs(places.count(place) - 1000) < 130 for place in (0, 2, 3))  # 5 standard deviations
    assert places.count(1) == 0  # its own place is the first order's


def test_every_question_is_shuffled_and_says_how(by_letter):
    asked = question_variants.shuffled(by_letter, 2, seed=0)
    assert asked.groupby("id").size().to_dict() == {"q0": 2, "q1": 2, "q2": 2}
    assert set(asked.study) == {"shuffle"} and not asked.duplicated(["id", "condition"]).any()
    for row in asked.itertuples():
        assert row.condition == "order=" + "".join(str(i) for i in row.order)
    assert asked[asked.id == "q2"].condition.iloc[0] == "order=012"


def test_an_order_that_nobody_sees_is_an_error(questions):
    with pytest.raises(MedkitError, match="option_text shows no options"):
        question_variants.shuffled(questions.assign(scoring="option_text"), 2, seed=0)


# --- pairs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def drug_pairs():
    rows = [
        (
            f"p{i}",
            f"Is {i} ml of ibuprofen right?",
            f"Is {i} ml of Advil right?",
            ["ibuprofen", "no"],
            ["Advil", "no"],
            0,
        )
        for i in range(5)
    ]
    return pd.DataFrame(rows, columns=["id", "question", "question_swapped", "options", "options_swapped", "answer"])


@pytest.mark.parametrize(("count", "expected"), [(2, 2), ("all", 5), (0, 0)])
def test_a_pair_is_one_question_under_two_conditions(drug_pairs, count, expected):
    asked = question_variants.swapped(drug_pairs, count, seed=1)
    assert asked.groupby("condition").id.nunique().to_dict() == (
        {"original": expected, "swapped": expected} if expected else {}
    )
    for row in asked.itertuples():
        name = {"original": "ibuprofen", "swapped": "Advil"}[row.condition]
        assert name in row.question and row.options == [name, "no"] and row.answer == 0
        assert (row.scoring, row.study, row.source) == ("option_text", "swap", "drug_pairs")


def test_more_pairs_take_the_same_first_ones_and_no_more_than_there_are(drug_pairs):
    assert list(question_variants.swapped(drug_pairs, 4, 0).id.unique()[:2]) == list(
        question_variants.swapped(drug_pairs, 2, 0).id.unique()
    )
    with pytest.raises(MedkitError, match="swap_pairs is 6, there are 5"):
        question_variants.swapped(drug_pairs, 6, seed=0)


def test_pairs_can_be_judged_beside_the_questions(drug_pairs, questions):
    known = question_variants.pair_questions(drug_pairs)
    assert set(known.columns) <= set(questions.columns)
    assert known.group.nunique() == 5 and not set(known.group) & set(questions.group)


# --- templates -----------------------------------------------------------------------------------------------------


def test_the_grid_is_full_but_for_letters_that_are_not_shown(by_letter):
    asked = question_variants.template_grid(pd.concat([by_letter, by_letter.assign(scoring="generated")]))
    cells = set(asked[asked.id == "q0"][["template", "scoring"]].itertuples(index=False, name=None))
    assert cells == set(itertools.product(question_variants.TEMPLATES, question_variants.SCORINGS)) - {
        ("text", "letter")
    }
    assert len(asked) == 3 * len(cells)
    assert (asked.condition == asked.template).all()
    assert set(question_variants.TEMPLATES) <= set(templates.TEMPLATES)


# --- examples ------------------------------------------------------------------------------------------------------


@pytest.fixture
def training():
    """Eight solved questions of the kind choice, two of the kind abstract; every third is in the group of q0."""
    rows = [
        {"id": f"t{i}", "source": "exam", "split": "labelled", "kind": "choice" if i < 8 else "abstract", "context": "",
         "question": f"Which drug is number {i}?", "options": ["a", "b"], "answer": i % 2,
         "group": 0 if i % 3 == 0 else 100 + i}
        for i in range(10)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def vectors(rows, seed):
    found = np.random.default_rng(seed).normal(size=(rows, 8))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def ask(by_letter, training, shots=2, orders=2, **more):
    places = vectors(len(by_letter), 0), vectors(len(training), 1)
    return question_variants.ensemble(by_letter, training, *places, shots, orders, seed=0, **more), *places


def test_examples_are_the_nearest_allowed_ones_nearest_last(by_letter, training):
    asked, queries, corpus = ask(by_letter, training)
    for number, question in enumerate(by_letter.itertuples()):
        allowed = (training.kind == question.kind) & (training.group != question.group)
        order = np.argsort(-(corpus @ queries[number]))
        best = [training.id[i] for i in order if allowed[i]][:2]
        for row in asked[(asked.id == question.id) & (asked.condition.str.startswith("shots=2"))].itertuples():
            assert [shot["id"] for shot in row.shots] == best[::-1]


def test_no_example_is_a_test_row_or_in_the_questions_group_or_flagged_as_similar(by_letter, training):
    similar = pd.DataFrame({"id_test": ["q1", "q1", "q9"], "id_train": ["t1", "gone", "t2"]})
    asked, *_ = ask(by_letter[by_letter.id != "q2"], training, shots=5, similar=similar)
    for row in asked.itertuples():
        assert all(shot["split"] == "labelled" and shot["group"] != row.group for shot in row.shots)
        assert row.id != "q1" or "t1" not in {shot["id"] for shot in row.shots}
    with pytest.raises(MedkitError, match="must not be an example"):
        ask(by_letter, training.assign(split=["labelled"] * 9 + ["test"]))


def test_too_few_examples_are_an_error_that_says_for_whom(by_letter, training):
    with pytest.raises(
        MedkitError, match=r"shots is 3, but of the kind 'abstract' .* 2 examples for q2; .* leave out trial"
    ):
        ask(by_letter, training, shots=3)


def test_plain_first_then_every_order_with_help(by_letter, training):
    asked, *_ = ask(by_letter, training, orders=3)
    for _, rows in asked.groupby("id"):
        assert [len(shots) for shots in rows.shots] == [0, 2, 2, 2]
        told = [re.fullmatch(r"shots=(\d) order=(\d+)", condition).groups() for condition in rows.condition]
        assert [int(shots) for shots, _ in told] == [0, 2, 2, 2]
        assert [order for _, order in told] == ["".join(map(str, order)) for order in rows.order]
        assert told[0][1] == told[1][1] == "".join(sorted(told[0][1]))


def test_option_texts_have_one_order_and_no_shots_no_neighbours(by_letter, training):
    asked, *_ = ask(by_letter.assign(scoring="option_text"), training, orders=3)
    assert asked.groupby("id").size().eq(2).all()
    asked, *_ = ask(by_letter, training, shots=0, orders=2)
    assert asked.groupby("id").size().eq(2).all() and not asked.shots.map(len).any()


# --- through a model -----------------------------------------------------------------------------------------------


def test_one_order_and_no_examples_is_the_plain_question(make_llama, tokenizer, by_letter, training, questions):
    model = make_llama(layers=2, initializer_range=0.2)
    asked, *_ = ask(by_letter, training, shots=0, orders=1)
    plain, found = (predictions.predict(model, tokenizer, rows, 400, 4) for rows in (by_letter, asked))
    assert found.logprobs.tolist() == plain.logprobs.tolist()
    judged = accuracy.judge(found.assign(variant="lora"), questions)
    assert judged.choice.tolist() == accuracy.judge(plain.assign(variant="lora"), questions).choice.tolist()
    assert set(judged.study) == {"ensemble"}
