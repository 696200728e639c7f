"""Contamination: what each rule finds, what it must not find, and that neither order nor direction matters."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.data import contamination
from medkit.data.contamination import clean_mask, contamination_table, find_contamination
from medkit.data.raw_questions import DataError

VIGNETTE = (
    "a 47 year old farmer from the hills has had night sweats and a cough with rusty sputum for three weeks and his "
    "brother died of miliary tuberculosis in the same house last winter which drug should be begun first"
)
SHORT, PARAPHRASE = "drug of choice for scabies", "the drug of choice against scabies is"
DRUGS = ["Permethrin", "Ivermectin", "Lindane", "Crotamiton"]


def table(*rows: dict) -> pd.DataFrame:
    """Rows of the final table; what is not given is unlike anything else."""
    plain, table = {"source": "bank", "split": "train", "kind": "choice", "context": "", "answer": 0}, []
    for number, row in enumerate(rows):
        own = {"id": f"q{number}", "question": " ".join(f"q{number}word{i}" for i in range(15))}
        table.append(plain | own | {"options": [f"q{number} option {letter}" for letter in "abcd"]} | row)
    return pd.DataFrame(table)


def strangers(count: int, question: str = "{}", words: int = 6, **fields) -> list[dict]:
    """Training rows with words of their own at the place of the braces."""
    own = (" ".join(f"s{number}word{i}" for i in range(words)) for number in range(count))
    return [{"id": f"s{number}", "question": question.format(text)} | fields for number, text in enumerate(own)]


def find(questions: pd.DataFrame, embeddings: np.ndarray | None = None) -> pd.DataFrame:
    """Without embeddings by words alone: no two are near."""
    return find_contamination(questions, np.eye(len(questions)) if embeddings is None else embeddings)


def joined(questions: pd.DataFrame, embeddings: np.ndarray | None = None) -> set[tuple[str, str, str]]:
    return set(find(questions, embeddings)[["id_test", "id_train", "rule"]].itertuples(index=False, name=None))


def rules(test: dict, train: dict, *others: dict) -> set[str]:
    """By which rules the first row, a test question, and the second one are a pair."""
    found = joined(table({"split": "test", "id": "test"} | test, {"id": "train"} | train, *others, *strangers(30)))
    return {rule for tested, learned, rule in found if (tested, learned) == ("test", "train")}


def disguised(text: str) -> str:
    return text.title().replace(" ", ",\n") + "?!"


def test_a_copy_is_found_whatever_its_dress():
    for question in (VIGNETTE, SHORT, "true or false", "x"):
        copy = {"question": disguised(question), "options": [disguised(drug) for drug in reversed(DRUGS)]}
        assert "fuzzy" in rules({"question": question, "options": DRUGS}, copy)


def test_shared_runs_and_shared_options_are_found_in_other_text():
    inside = {"context": disguised(f"{' '.join(f'long{i}' for i in range(200))} {VIGNETTE} and so on")}
    assert rules({"question": VIGNETTE}, inside) == {"ngram13"}
    assert rules(inside, {"question": VIGNETTE}) == {"ngram13"}
    assert rules({"question": SHORT, "options": DRUGS}, {"question": PARAPHRASE, "options": DRUGS[::-1]}) == {"options"}


def test_embeddings_join_what_shares_no_word(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    questions = table(*({"split": split} for split in rng.choice(["test", "train", "valid"], 60)))
    monkeypatch.setattr(contamination, "COSINE", 0.8)
    test, learned = (np.flatnonzero((questions.split == "test") == is_test) for is_test in (True, False))
    near = zip(*np.nonzero(vectors[test] @ vectors[learned].T >= 0.8), strict=True)
    whole = {(f"q{test[one]}", f"q{learned[other]}", "embedding") for one, other in near}
    assert joined(questions, embeddings=vectors) == whole != set() == joined(questions)
    monkeypatch.setattr(contamination, "ROWS_AT_ONCE", 1)  # compared piece by piece
    assert joined(questions, embeddings=vectors) == whole
    with pytest.raises(DataError, match="3 embeddings for 60 questions"):
        find_contamination(questions, vectors[:3])


def test_what_is_usual_and_what_is_short_is_no_copy():
    """Options tell by the unusual ones, if three of them are."""
    above = ["All of the above", "None of the above"]
    cases = [(0, ["yes", "no", "maybe"], set()), (0, [*above, "Both", "x"], set()), (2, above, set())]
    for unusual, usual, found in [*cases, (3, above, {"options"})]:
        options, rows = DRUGS[:unusual] + usual, strangers(contamination.COMMON + 5, options=usual)
        near = {"question": PARAPHRASE, "options": options}
        assert rules({"question": SHORT, "options": options}, near, *rows) == found, options
    for one, other in (("true about hepatitis a", "true about hepatitis b"), ("which is true", "which is true")):
        assert rules({"question": one}, {"question": other}) == set()


def test_a_template_is_no_copy_but_what_fills_it_is():
    ask = "Which ICD-10-CM chapter lists “{}”?"
    names = ["Infections", "Neoplasms", "Blood", "Endocrine"]
    rows = strangers(60, ask, options=names)
    test = {"split": "test", "id": "test", "options": names}
    filled = "acute and subacute iridocyclitis of unknown origin after surgery left eye"
    for text in ("Cystitis", filled):
        assert joined(table(test | {"question": ask.format(text)}, *rows)) == set()
    copied = table(test | {"question": ask.format(filled)}, {"id": "copy", "question": ask.format(filled)}, *rows)
    assert ("test", "copy", "fuzzy") in joined(copied)


def test_many_copies_hide_no_copy():
    for copies in (contamination.COMMON + 1, 60):
        endings = [f"{VIGNETTE} please {n} ending{n}" for n in range(copies)]
        leaked = [{"id": f"leak{n}", "question": text, "options": DRUGS} for n, text in enumerate(endings)]
        test = {"split": "test", "id": "test", "question": VIGNETTE, "options": DRUGS}
        found = joined(table(test, *leaked, *strangers(30)))
        for rule in ("ngram13", "options"):
            assert {learned for _, learned, by in found if by == rule} == {row["id"] for row in leaked}


WORDS = st.sampled_from([f"w{i}" for i in range(8)])
FIELDS = {
    "question": st.lists(WORDS, max_size=18).map(" ".join),
    "context": st.sampled_from(["", VIGNETTE]),
    "options": st.lists(WORDS, min_size=2, max_size=4, unique=True),
    "split": st.sampled_from(["train", "valid", "transfer", "test"]),
}
ROWS = st.lists(st.fixed_dictionaries(FIELDS), min_size=1, max_size=12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(ROWS, st.randoms(use_true_random=False))
def test_pairs_depend_neither_on_the_order_of_the_rows_nor_on_the_side_that_is_tested(rows, random):
    questions = table(*rows)
    mixed = questions.iloc[random.sample(range(len(rows)), len(rows))]
    pd.testing.assert_frame_equal(find(questions), find(mixed))
    questions = questions.replace({"split": {"valid": "train", "transfer": "train"}})
    swapped = questions.assign(split=questions.split.map({"test": "train", "train": "test"}))
    assert {(b, a, rule) for a, b, rule in joined(swapped)} == joined(questions)


def test_clean_rows_are_those_no_rule_touched_and_every_pair_of_sources_is_counted():
    leaking = table(
        {"id": "t0", "split": "test", "source": "exam", "question": VIGNETTE},
        {"id": "t1", "split": "test", "source": "exam"},
        {"id": "t2", "split": "test", "source": "other", "question": SHORT, "options": DRUGS},
        {"id": "l0", "source": "bank", "question": VIGNETTE},
        {"id": "l1", "source": "bank", "question": VIGNETTE, "split": "transfer"},
        {"id": "l2", "source": "book", "question": PARAPHRASE, "options": DRUGS},
        *strangers(30),
    )
    pairs = find(leaking)
    clean = clean_mask(leaking, pairs)
    assert set(leaking.id[~clean]) == {"t0", "t2"} and clean_mask(leaking, pairs.iloc[:0]).all()
    counts = contamination_table(pairs, leaking).set_index(["source_train", "source_test", "rule"])
    assert len(counts) == 3 * 2 * 5  # bank, book, any × exam, other × four rules and any
    assert counts.loc[("bank", "exam", "ngram13")].tolist() == [2, 1, 2, 0.5]
    assert counts.loc[("bank", "exam", "any")].tolist() == [2, 1, 2, 0.5]  # found by two rules, counted once
    assert counts.loc[("book", "other", "options")].tolist() == [1, 1, 1, 1.0]
    assert counts.loc[("any", "exam", "any"), "touched"] == 1
    assert (counts.loc["book"].loc["exam"].pairs == 0).all()
