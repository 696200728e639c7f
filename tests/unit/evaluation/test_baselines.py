"""The baselines answer in the form of a model's predictions, and find what words alone can find."""

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


def test_without_training_rows_there_is_no_baseline():
    with pytest.raises(ValueError, match="training rows"):
        baselines.predict_baselines(make_questions(3, 0).head(0), make_questions(3, 1))
