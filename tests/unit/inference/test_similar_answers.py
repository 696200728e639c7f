"""The judged pairs are those of the questions, and the rates are counted by hand."""

import numpy as np
import pandas as pd
import pytest

from medkit import sources
from medkit.data import readers
from medkit.inference import similar_answers as sa
from medkit.modeling import embeddings
from medkit.params import load_params
from medkit.stage import ROOT, MedkitError
from medkit.statistics import wilson


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [("Is it safe?", "is it SAFE", 1), ("is it safe", "is it not safe", 3 / 4), ("a b", "c", 0), ("?", "!", 1)],
)
def test_jaccard_of_words(a, b, shared):
    assert sa.jaccard(a, b) == sa.jaccard(b, a) == pytest.approx(shared)


def test_alpha_weighs_the_words():
    assert sa.similarity(0.2, 0.8, 0.25) == pytest.approx(0.65)
    with pytest.raises(MedkitError, match=r"alpha is 1\.5"):
        sa.similarity(1, 1, 1.5)


# --- the pairs -------------------------------------------------------------------------------------------------------


def test_a_pair_is_rebuilt_from_its_questions_and_is_missing_without_them(tmp_path, monkeypatch):
    rows = [
        ("q0", "", "dose", "3", "600", "60", "rule", 0, "different"),
        ("q0", "", "dose", "4", "600", "60", "rule", 0, "different"),  # the question has another text at this place
        ("q0", "q1", "real", "", "", "", "near", 2, "same"),
        ("d0", "", sa.BRAND_NAMES, "", "", "", "rule", 0, "same"),
        ("gone", "", "dose", "0", "a", "b", "rule", 0, "different"),
    ]
    columns = ["id", "other", "kind", "start", "before", "after", "drawn", "lookups", "verdict"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "pairs.csv", index=False)
    monkeypatch.setattr(sa, "VERDICT_FILE", tmp_path / "pairs.csv")
    questions = pd.DataFrame({"id": ["q0", "q1"], "question": ["Is 600 mg much?", "Is 600 mg a lot?"]})
    swaps = pd.DataFrame({"id": ["d0"], "question": ["He takes warfarin."], "question_swapped": ["He takes Coumadin."]})
    pairs = sa.load_pairs(questions, swaps)
    assert pairs[["kind", "text_a", "text_b"]].to_numpy().tolist() == [
        ["dose", "Is 600 mg much?", "Is 60 mg much?"],
        [sa.REAL_SAME, "Is 600 mg much?", "Is 600 mg a lot?"],
        [sa.BRAND_NAMES, "He takes warfarin.", "He takes Coumadin."],
    ]


# --- rates, by hand --------------------------------------------------------------------------------------------------


def by_hand():
    """At α = ½ the edits are .9 and .7 alike where the answer is the same, .9, .8 and .5 where it is not."""
    rows = [
        ("same: a", "rule", "same", 1.0, 0.8, 0),
        ("same: a", "rule", "same", 0.6, 0.8, 0),
        ("b", "rule", "different", 0.9, 0.9, 0),
        ("b", "rule", "different", 0.7, 0.9, 0),
        ("c", "rule", "different", 0.4, 0.6, 0),
        (sa.REAL_SAME, "near", "same", 0.8, 0.8, 2),
        (sa.REAL_OTHER, "near", "different", 0.8, 0.8, 1),
        (sa.REAL_OTHER, "random", "different", 0.72, 0.8, 1),
        (sa.REAL_SAME, "random", "same", 0.9, 0.9, 1),
    ]
    table = pd.DataFrame(rows, columns=["kind", "drawn", "verdict", "jaccard", "cosine", "lookups"])
    return table.assign(same_answer=table.verdict == "same")


def rate(table, measure, kind, threshold):
    row = table[(table.measure == measure) & (table.kind == kind) & np.isclose(table.threshold, threshold)]
    return (row.rate.item(), row.n.item()) if len(row) else None


def test_rates_of_a_table_worked_by_hand():
    table = sa.serving_rates(by_hand(), [0.6, 0.75, 0.95], [0.5], 0.95)
    assert rate(table, "hit_rate", "same: a", 0.6) == (1, 2) and rate(table, "hit_rate", "same: a", 0.75) == (0.5, 2)
    assert rate(table, "wrong_rate", "b", 0.75) == (1, 2) and rate(table, "wrong_rate", "c", 0.6) == (0, 1)
    assert rate(table, "wrong_rate", sa.ALL_EDITS, 0.6) == (pytest.approx(2 / 3), 3)
    assert rate(table, "wrong_share", sa.ALL_EDITS, 0.6) == (0.5, 4)
    assert rate(table, "wrong_share", sa.ALL_EDITS, 0.75) == (pytest.approx(2 / 3), 3)
    assert rate(table, "wrong_share", sa.ALL_EDITS, 0.95) is None  # nothing is served
    assert rate(table, "wrong_rate", sa.REAL_OTHER, 0.75) == (1, 1)  # the near ones are no sample
    row = table[(table.measure == "wrong_share") & (table.threshold == 0.75)].iloc[0]
    assert (row.ci_low, row.ci_high) == pytest.approx(wilson(2, 3, 0.95))


def test_lookups_count_questions_and_pairs():
    table = sa.real_lookups(by_hand(), [0.75, 0.8], questions=20, confidence=0.95).set_index("threshold")
    assert table.n.tolist() == [4, 3]
    assert table.hit_rate.tolist() == pytest.approx([5 / 20, 4 / 20])
    assert table.wrong_share.tolist() == pytest.approx([2 / 4, 1 / 3])
    with pytest.raises(MedkitError, match="only a sample"):
        sa.real_lookups(by_hand(), [0.5], 20, 0.95)


def test_the_best_threshold_says_what_it_costs():
    pairs = by_hand()
    table = sa.serving_rates(pairs, [0.6, 0.75, 0.85, 0.95], [0.5], 0.95)
    (strict,) = sa.best_thresholds(table, pairs, 0.1).itertuples()
    assert (strict.threshold, strict.hit_rate, strict.worst_rate) == (0.95, 0, 0)
    (lax,) = sa.best_thresholds(table, pairs, 0.4).itertuples()
    assert (lax.threshold, lax.hit_rate, lax.worst_kind, lax.worst_rate) == (0.85, 0.5, "b", 0.5)
    assert lax.auc_edits == pytest.approx((0.5 + 1 + 1 + 0 + 0 + 1) / 6)  # of 2 × 3 comparisons; a tie counts half
    (none,) = sa.best_thresholds(table[table.threshold < 0.8], pairs, 0.1).itertuples()
    assert np.isnan(none.threshold) and np.isnan(none.hit_rate)


def test_pairs_are_measured_and_the_unclear_left_out():
    texts = ["is it safe", "is it dangerous", "is it not"]
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    rows = [(0, 1, "x", "different"), (1, 2, "x", "unclear"), (0, 2, "x", "same"), (0, 0, "same: y", "same")]
    pairs = pd.DataFrame(
        [(texts[a], texts[b], kind, verdict, "rule") for a, b, kind, verdict in rows],
        columns=["text_a", "text_b", "kind", "verdict", "drawn"],
    )
    found = sa.measure_pairs(pairs, texts, vectors)
    assert found.kind.tolist() == ["x", "same: y"] and found.same_answer.tolist() == [False, True]
    assert found.cosine.tolist() == pytest.approx([0.6, 1]) and found.jaccard.tolist() == pytest.approx([0.5, 1])


# --- the real pairs --------------------------------------------------------------------------------------------------


@pytest.mark.weights
def test_one_word_makes_another_question_and_the_real_encoder_hardly_sees_it():
    params = load_params(ROOT / "params" / "smoke.yaml")
    asked, _ = readers.read_open_questions(sources.fetch(params.data.open_questions))
    drugs, _ = readers.read_drug_pairs(sources.fetch(params.data.drug_pairs))
    pairs = sa.load_pairs(asked, drugs)
    assert len(pairs) == len(pd.read_csv(sa.VERDICT_FILE))  # every verdict still has its pair
    some = pairs[pairs.kind.isin(["negation", "same: synonym"])]
    texts = sorted({*some.text_a, *some.text_b})
    vectors = embeddings.embed_texts(embeddings.load_embedder(sources.fetch(params.models.embedder), "cpu"), texts)
    mean = sa.measure_pairs(some, texts, vectors).groupby("kind").cosine.mean()
    assert mean["negation"] > 0.9 > mean["same: synonym"]
