"""What a cache of similar answers would say: one answer that is right, one that is wrong, one question left alone."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.inference import mieo


def table(*rows) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["question", "options", "answer"])


def test_hits_and_wrong_answers_are_counted():
    known = table(("dose of aspirin for adults", ["75 mg", "300 mg"], 1), ("colour of the sky", ["blue", "red"], 0))
    asked = table(
        ("dose of aspirin for adults", ["300 mg", "1 g"], 0),  # the same question: right
        ("dose of aspirin for infants", ["none", "300 mg"], 0),  # one word differs, and so does the answer
        ("who wrote Hamlet", ["Shakespeare", "blue"], 0),
    )
    vectors = {"dose": [1.0, 0.0], "colour": [0.0, 1.0], "who": [0.0, 0.0]}

    def embed(texts):
        return np.array([vectors[text.split()[0]] for text in texts])

    rows = {row["threshold"]: row for row in mieo.similar_answers(asked, known, embed, 0.95)}
    # words in common over all words: 1, 4 / 6 and 0; the mean with the cosine is 1, 0.83 and 0
    assert {t: (row["hits"], row["wrong"]) for t, row in rows.items()} == {0.7: (2, 1), 0.8: (2, 1), 0.9: (1, 0)}
    assert all(row["n"] == 3 for row in rows.values())
    assert rows[0.8]["wrong_interval"][0] < 0.5 < rows[0.8]["wrong_interval"][1] == pytest.approx(0.905, abs=0.01)
