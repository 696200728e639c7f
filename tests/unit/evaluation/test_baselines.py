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
        stage = draw.choice(["acute", "chronic", "late"])
        question = f"Which chapter lists “{stage} disorder of the {ORGANS[answer]}”?"
        order = draw.permutation(4)
        rows.append({"id": f"q{i}", "question": question, "options": [options[j] for j in order],
                     "answer": int(np.flatnonzero(order == answer)[0])})  # fmt: skip
    return pd.DataFrame(rows)


def test_words_are_found_and_the_majority_is_the_most_frequent_answer():
    training, test = make_questions(80, 0), make_questions(60, 1)
    strange = {"id": "q", "question": "disorder of an ear", "options": ["nobody's", "Diseases of the ear"], "answer": 1}
    predictions, sizes = baselines.predict_baselines(training, pd.concat([test, pd.DataFrame([strange])]))
    assert sizes["tfidf"] > sizes["majority"] > 0
    assert (predictions.answer_tokens.map(sum) == predictions.logprobs.map(len)).all(), "by sum and by mean the same"
    assert set(baselines.predict_baselines(training.head(1), test)[1]) == {"majority"}, "one class tells nothing apart"
    for variant, rows in predictions.groupby("variant"):
        assert list(rows.id) == [*test.id, "q"]
        *logprobs, (never, once) = rows.logprobs
        assert np.isfinite(never) and never < once, "an option that was never an answer is the least likely"
        share = (np.array([np.argmax(row) for row in logprobs]) == test.answer.to_numpy()).mean()
        answers = [o[a] for o, a in zip(test.options, test.answer, strict=True)]
        expected = np.mean([answer == "Diseases of the eye" for answer in answers]) if variant == "majority" else 1.0
        assert share == pytest.approx(expected)


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


def test_corrections_relatives_and_old_drugs_are_not_taken_and_any_text_gives_a_form():
    questions = pd.DataFrame({"id": ["a", "b"], "kind": ["record", "record_b"], "question": [DIALOGUE, DIALOGUE]})
    rows = baselines.regex_baseline(questions)
    assert rows.id.tolist() == ["a"] and rows.variant.tolist() == ["regex"]
    assert json.loads(rows.text[0]) == RECORD
    for text in ("", "no dialogue", "D: What?", "D: And?\nP: \nD: Any?"):
        assert baselines.fill_form(text).keys() == RECORD.keys()


def test_rules_choose_the_first_and_the_longest_option_and_read_nothing():
    options = [["no", "maybe later", "yes"], ["aspirin", "a"]]
    rows = pd.DataFrame({"id": ["a", "b"], "question": ["?", "?"], "options": options})
    guesses = baselines.predict_by_rule(rows)
    chosen = {(row.variant, row.id): options[row.id == "b"][np.argmax(row.logprobs)] for row in guesses.itertuples()}
    assert chosen == {
        ("first", "a"): "no", ("first", "b"): "aspirin", ("longest", "a"): "maybe later", ("longest", "b"): "aspirin"
    }  # fmt: skip
