"""Labels that resolve and agree with their document; keywords."""

import re

import pandas as pd
import pytest
from sklearn.metrics import f1_score

from medkit.data import problem_types
from medkit.data.problem_types import LABELS, OTHER
from medkit.data.raw_questions import DataError
from medkit.prompts import templates
from medkit.stage import ROOT

LABELLED = pd.read_csv(ROOT / "medkit" / "data" / "problem_types.csv", keep_default_na=False)


def test_the_document_states_the_labels_and_their_agreement():
    document = (ROOT / "docs" / "labelling.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", document, re.M) == list(LABELS) and set(LABELS) == set(templates.OPEN)
    found, text = problem_types.agreement(LABELLED), " ".join(document.split())
    assert f"second reading of {found['n']} random questions" in text
    assert f"agreed on {found['same'] * found['n']:.0f} (Cohen's κ {found['kappa']:.2f};" in text
    labels = pd.DataFrame({"label": list("aabbb"), "second_label": ["a", "b", "b", "b", ""]})
    by_hand = {"n": 4, "same": 0.75, "kappa": pytest.approx(0.5)}  # chance agrees on half
    assert problem_types.agreement(labels) == by_hand


def test_labels_find_their_text_and_say_when_one_is_gone():
    ids = list(LABELLED.id)
    table = pd.DataFrame({"id": [*reversed(ids), "another"], "source": "here"})
    table = table.assign(question="about " + table.id)
    joined = problem_types.join_labels(table)
    assert list(joined.id) == ids and list(joined.question) == [f"about {i}" for i in ids]
    with pytest.raises(DataError, match=f"1 labelled .* {ids[3]}"):
        problem_types.join_labels(table[table.id != ids[3]])


KEYWORDS = [
    ("Can I take metoprolol at night?", "medication"), ("What are the SYMPTOMS of lupus?", "diagnosis"),
    ("How do you get rid of warts?", "treatment"), ("How can cataracts be prevented?", "prevention"),
    ("When should I worry about a nosebleed?", "emergency"), ("What is a hernia?", OTHER), ("", OTHER),
    ("symptoms and treatment of gout", "treatment"),  # one keyword each: the order of the labelling rules
    ("symptoms, causes and treatment of gout", "diagnosis"),  # two against one
    ("What does a cholesterol of 300 mean", "diagnosis"),  # -terol, and yet no drug
    ("Is it worse in April?", OTHER),  # -pril, and yet no drug
    ("Is rotavirus contagious?", OTHER),  # -vir in the middle
    *((drug, "medication") for drug in ("ceftriaxone", "doxycycline", "omeprazole", "lisinopril", "rituximab")),
]  # fmt: skip


def test_keywords_and_stems_of_drug_names_answer():
    for question, expected in KEYWORDS:
        assert problem_types.classify_by_keywords(question) == expected, question
    # an entry that is no lower-case word could never be counted, and one in two lists would argue with itself
    listed = [word for words in problem_types.KEYWORDS.values() for word in words]
    assert all(re.fullmatch("[a-z]+", word) for word in listed)
    assert len(listed) == len(set(listed))


def test_the_keywords_are_measured_on_the_rows_of_each_scope():
    """By hand: 12 random rows, two of each label, and one enriched; the keywords find `medication` alone."""
    labels = [*LABELS * 2, "emergency"]
    drawn = ["random"] * 12 + ["enriched"]
    labelled = pd.DataFrame({"drawn": drawn, "label": labels})
    labelled["keywords"] = labelled.label.where(labelled.label == "medication", OTHER)
    table = problem_types.measure_keywords(labelled, confidence=0.95).set_index("scope")
    assert list(table.n) == [12, 10, 13]
    assert list(table.accuracy) == pytest.approx([4 / 12, 2 / 10, 4 / 13])
    assert list(table.majority) == pytest.approx([2 / 12, 2 / 10, 3 / 13])
    of_medication, of_other = 1.0, f1_score(labelled.label == OTHER, labelled.keywords == OTHER)
    assert table.macro_f1["with enrichment"] == pytest.approx((of_medication + of_other) / 6)
    assert ((table.ci_low <= table.accuracy) & (table.accuracy <= table.ci_high)).all()
