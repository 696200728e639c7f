"""Baselines without a language model: the most frequent answer, and TF-IDF with logistic regression.

A model that does not beat these has learned nothing that a table of words could not hold. Both learn from the same
labelled rows as the student. They see an answer as a class, so they fit sources whose options come from one list,
such as the chapters of ICD-10-CM, and not exams, where every question has options of its own.
"""

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline

BASELINES = ("majority", "tfidf")


def predict_baselines(training: pd.DataFrame, questions: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """The baselines' scores of the questions' options, and what each baseline weighs in bytes.

    training, questions: rows with `question`, `options` and `answer` (an index into `options`). Returns rows like
    those of `inference.predict`: variant, id, scoring (`option_text`) and `logprobs`, one per option, in nats. An
    option that no training row had as its answer has the smallest probability. Raises ValueError without training rows.
    """
    if training.empty:
        raise ValueError("a baseline needs training rows, there are none")
    texts, answers = training.question.tolist(), _answers(training)
    classes, counts = np.unique(answers, return_counts=True)
    model = fit_tfidf(texts, answers)
    probabilities = {
        "majority": np.tile(counts / counts.sum(), (len(questions), 1)),
        "tfidf": model.predict_proba(questions.question.tolist()),
    }
    sizes = {"majority": counts.nbytes, "tfidf": count_bytes(model)}
    rows = [
        pd.DataFrame({"variant": name, "id": questions.id.to_numpy(), "scoring": "option_text",
                      "logprobs": _option_logprobs(questions, classes, probabilities[name])})
        for name in BASELINES
    ]  # fmt: skip
    return pd.concat(rows, ignore_index=True), sizes


def fit_tfidf(texts: list[str], answers: list[str]) -> Pipeline:
    """Logistic regression on TF-IDF of words and of character 3- to 5-grams."""
    features = FeatureUnion(
        [
            ("words", TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))),
            ("characters", TfidfVectorizer(sublinear_tf=True, analyzer="char_wb", ngram_range=(3, 5))),
        ]
    )
    return make_pipeline(features, LogisticRegression(C=10.0, max_iter=1000)).fit(texts, answers)


def count_bytes(model: Pipeline) -> int:
    """Bytes of the coefficients as 32-bit floats, of the inverse document frequencies, and of the vocabulary."""
    features, classifier = model[0], model[-1]
    parts = [part for _, part in features.transformer_list]
    words = sum(len(word.encode()) for part in parts for word in part.vocabulary_)
    return 4 * (classifier.coef_.size + sum(len(part.vocabulary_) for part in parts)) + words


def _answers(questions: pd.DataFrame) -> list[str]:
    return [options[answer] for options, answer in zip(questions.options, questions.answer, strict=True)]


def _option_logprobs(questions: pd.DataFrame, classes: np.ndarray, probabilities: np.ndarray) -> list[np.ndarray]:
    column = {name: i for i, name in enumerate(classes)}
    least = probabilities[probabilities > 0].min() / 2
    return [
        np.log([row[column[option]] if option in column else least for option in options])
        for options, row in zip(questions.options, probabilities, strict=True)
    ]
