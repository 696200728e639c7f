"""The baselines answer in the form of a model's predictions, and find what words and patterns alone can find."""

import json

import numpy as np
import pandas as pd
import pytest

from medkit.evaluation import baselines

ORGANS = ["eye", "ear", "skin", "heart"]


def make_questions(count, seed):
    """Each question names its organ, and the organ's chapter is the answer."""
    draw = np.random.default_rng(seed)
    options = [f"Diseases of the {organ}" for organ in ORGANS]
    rows = []
    for i in range(count):
        answer = int(draw.choice(4, p=[0.4, 0.2, 0.2, 0.2]))
        question = (
            f"Which chapter lists “{draw.choice(['acute', 'chronic', 'late'])} disorder of the {ORGANS[answer]}”?"
        )
        order = draw.permutation(4)
        rows.append({"id": f"q{i}", "question": question, "options": [options[j] for j in order],
                     "answer": int(np.flatnonzero(order == answer)[0])})  # fmt: skip
    return pd.DataFrame(rows)


def test_words_are_found_and_the_majority_is_the_most_frequent_answer():
    training, test = make_questions(80, 0), make_questions(60, 1)
    predictions, sizes = baselines.predict_baselines(training, test)
    assert sizes["tfidf"] > sizes["majority"] > 0
    for variant, rows in predictions.groupby("variant"):
        assert list(rows.id) == list(test.id)
        choices = np.array([np.argmax(logprobs) for logprobs in rows.logprobs])
        share = (choices == test.answer.to_numpy()).mean()
        answers = [o[a] for o, a in zip(test.options, test.answer, strict=True)]
        expected = np.mean([answer == "Diseases of the eye" for answer in answers]) if variant == "majority" else 1.0
        assert share == pytest.approx(expected)


def test_an_option_that_was_never_an_answer_is_the_least_likely():
    training = make_questions(80, 0)
    test = pd.DataFrame([{"id": "q", "question": "disorder of the ear", "options": ["nobody's", "Diseases of the ear"],
                          "answer": 1}])  # fmt: skip
    predictions, _ = baselines.predict_baselines(training, test)
    for logprobs in predictions.logprobs:
        assert np.isfinite(logprobs).all() and logprobs[0] < logprobs[1]


DIALOGUE = """D: Good morning, Mrs. Lopez. What brings you in?
P: I think I have dry cough.
D: Since when?
P: About five days, sorry, three weeks. My last visit was six months ago.
D: How old are you?
P: I am 41. No, 43. My uncle is 80 and has gout.
D: Any medication?
P: I take zyflo, 10 mg. No, 25 mg. I used to take 600 mg of ketorolac.
D: Any allergies?
P: With bee stings I get hives.
D: Any fever or chills?
P: Yes to fever, no to chills."""
RECORD = {
    "age": 43, "sex": "female", "complaint": "dry cough", "duration": "3 weeks", "drug": "zyflo", "dose": "25 mg",
    "allergy": "bee stings", "denies": "chills",
}  # fmt: skip


def test_corrections_relatives_and_old_drugs_are_not_taken():
    assert baselines.fill_form(DIALOGUE) == RECORD


@pytest.mark.parametrize(
    ("line", "instead", "empty"),
    [
        ("I take zyflo, 10 mg. No, 25 mg. I used to take 600 mg of ketorolac.", "Nothing. I stopped zyflo.", "drug"),
        ("With bee stings I get hives.", "Not me, only my uncle, to bee stings.", "allergy"),
        ("Yes to fever, no to chills.", "", "denies"),
    ],
)
def test_what_is_not_said_is_empty(line, instead, empty):
    record = baselines.fill_form(DIALOGUE.replace(line, instead))
    assert record[empty] is None
    assert {name for name in RECORD if record[name] != RECORD[name]} <= {empty, "dose"}


def test_rows_are_those_of_a_model_and_other_kinds_are_left_out():
    questions = pd.DataFrame({"id": ["a", "b"], "kind": ["record", "record_b"], "question": [DIALOGUE, DIALOGUE]})
    rows = baselines.regex_baseline(questions)
    assert rows.id.tolist() == ["a"] and rows.variant.tolist() == ["regex"]
    assert json.loads(rows.text[0]) == RECORD


@pytest.mark.parametrize("text", ["", "no dialogue", "D: What?", "D: And?\nP: \nD: Any?"])
def test_any_text_gives_a_form(text):
    assert baselines.fill_form(text).keys() == RECORD.keys()
