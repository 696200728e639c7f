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
SHORT = "drug of choice for scabies"
DRUGS = ["Permethrin", "Ivermectin", "Lindane", "Crotamiton"]


def table(*rows: dict) -> pd.DataFrame:
    """Rows of the final table; what is not given is unlike anything else."""
    plain = [
        {
            "id": f"q{number}", "source": "bank", "split": "train", "kind": "choice", "context": "", "answer": 0,
            "question": " ".join(f"q{number}word{i}" for i in range(15)),
            "options": [f"q{number} option {letter}" for letter in "abcd"],
        }
        for number in range(len(rows))
    ]  # fmt: skip
    return pd.DataFrame([ours | theirs for ours, theirs in zip(plain, rows, strict=True)])


def strangers(count: int, question: str = "{}", words: int = 6, **fields) -> list[dict]:
    """Training rows with words of their own at the place of the braces."""
    own = (" ".join(f"s{number}word{i}" for i in range(words)) for number in range(count))
    return [{"id": f"s{number}", "question": question.format(text)} | fields for number, text in enumerate(own)]


def find(questions: pd.DataFrame) -> pd.DataFrame:
    """By words alone: no two embeddings are near."""
    return find_contamination(questions, np.eye(len(questions)))


def joined(questions: pd.DataFrame, embeddings: np.ndarray | None = None) -> set[tuple[str, str, str]]:
    pairs = find(questions) if embeddings is None else find_contamination(questions, embeddings)
    return set(pairs[["id_test", "id_train", "rule"]].itertuples(index=False, name=None))


def rules(test: dict, train: dict, *others: dict) -> set[str]:
    """By which rules the first row, a test question, and the second one are a pair."""
    found = joined(table({"split": "test", "id": "test"} | test, {"id": "train"} | train, *others, *strangers(30)))
    return {rule for tested, learned, rule in found if (tested, learned) == ("test", "train")}


DISGUISES = [str.upper, lambda text: text.replace(" ", ", ") + "?!", lambda text: text.replace(" ", "\n"), str.title]


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("question", [VIGNETTE, SHORT, "true or false", "x"])
def test_a_copy_is_found_whatever_its_dress(question, disguise):
    copy = {"question": disguise(question), "options": [disguise(drug) for drug in reversed(DRUGS)]}
    assert "fuzzy" in rules({"question": question, "options": DRUGS}, copy)


@pytest.mark.parametrize("disguise", DISGUISES)
def test_shared_runs_are_found_inside_other_text(disguise):
    inside = {"context": disguise(f"{' '.join(f'long{i}' for i in range(200))} {VIGNETTE} and so on")}
    assert rules({"question": VIGNETTE}, inside) == {"ngram13"}
    assert rules(inside, {"question": VIGNETTE}) == {"ngram13"}


def test_a_paraphrase_is_found_by_its_options():
    paraphrase = "the drug of choice against scabies is"
    assert rules({"question": SHORT, "options": DRUGS}, {"question": paraphrase, "options": DRUGS[::-1]}) == {"options"}


def test_embeddings_join_what_shares_no_word():
    questions = table({"split": "test"}, {}, {}, {"split": "test"})
    angle = np.arccos(contamination.COSINE)
    turns = np.array([0, 0.99 * angle, 1.01 * angle, 3])
    vectors = np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)
    assert joined(questions, embeddings=vectors) == {("q0", "q1", "embedding")}
    assert joined(questions) == set()
    with pytest.raises(DataError, match="3 embeddings for 4 questions"):
        find_contamination(questions, vectors[:3])


def test_embeddings_are_compared_piece_by_piece(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    questions = table(*({"split": split} for split in rng.choice(["test", "train", "valid"], 60)))
    monkeypatch.setattr(contamination, "COSINE", 0.8)
    whole = joined(questions, embeddings=vectors)
    monkeypatch.setattr(contamination, "ROWS_AT_ONCE", 1)
    assert joined(questions, embeddings=vectors) == whole
    test = questions.split == "test"
    assert len(whole) == (vectors[test] @ vectors[~test].T >= 0.8).sum() > 0


@pytest.mark.parametrize("options", [["yes", "no", "maybe"], ["All of the above", "None of the above", "Both", "x"]])
def test_usual_options_are_no_copy_even_of_a_like_question(options):
    usual = [row | {"options": options} for row in strangers(contamination.COMMON + 5, "{} usual")]
    near = {"question": "the drug of choice against scabies is", "options": options}
    assert rules({"question": SHORT, "options": options}, near, *usual) == set()


@pytest.mark.parametrize(
    "one, other",
    [
        ("true about hepatitis a", "true about hepatitis b"),
        ("which one of these is true", "which one of these is true"),
    ],
)
def test_short_questions_without_a_common_option_are_no_copies(one, other):
    assert rules({"question": one}, {"question": other}) == set()


def test_a_template_is_no_copy_but_what_fills_it_is():
    ask = "Which ICD-10-CM chapter lists “{}”?"
    names = ["Infections", "Neoplasms", "Blood", "Endocrine"]
    rows = strangers(60, ask, options=names)
    test = {"split": "test", "id": "test", "options": names}
    filled = "acute and subacute iridocyclitis of unknown origin after surgery left eye"
    for text in ("Cystitis", filled):
        near = table(test | {"question": ask.format(text)}, *rows)
        assert joined(near) == set()
    copied = table(test | {"question": ask.format(filled)}, {"id": "copy", "question": ask.format(filled)}, *rows)
    assert ("test", "copy", "fuzzy") in joined(copied)


@pytest.mark.parametrize("unusual, found", [(2, set()), (3, {"options"})])
def test_a_set_of_options_tells_by_its_unusual_ones(unusual, found):
    usual = ["All of the above", "None of the above"]
    rows = strangers(contamination.COMMON + 5, options=usual)
    one, other = SHORT, "the drug of choice against scabies is"
    options = DRUGS[:unusual] + usual
    assert rules({"question": one, "options": options}, {"question": other, "options": options}, *rows) == found


@pytest.mark.parametrize("copies", [1, contamination.COMMON + 1, 60])
def test_many_copies_hide_no_copy(copies):
    leaked = [
        {"id": f"leak{n}", "question": f"{VIGNETTE} please {n} ending{n}", "options": DRUGS} for n in range(copies)
    ]
    questions = table({"split": "test", "id": "test", "question": VIGNETTE, "options": DRUGS}, *leaked, *strangers(30))
    found = joined(questions)
    for rule in ("ngram13", "options"):
        assert {learned for _, learned, by in found if by == rule} == {row["id"] for row in leaked}


WORDS = st.sampled_from([f"w{i}" for i in range(8)])
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "question": st.lists(WORDS, max_size=18).map(" ".join),
            "context": st.one_of(st.just(""), st.just(VIGNETTE)),
            "options": st.lists(WORDS, min_size=2, max_size=4, unique=True),
            "split": st.sampled_from(["train", "valid", "transfer", "test"]),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ROWS, st.randoms(use_true_random=False))
def test_pairs_do_not_depend_on_the_order_of_the_rows(rows, random):
    questions = table(*rows)
    mixed = questions.iloc[random.sample(range(len(rows)), len(rows))]
    pd.testing.assert_frame_equal(find(questions), find(mixed))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(ROWS)
def test_a_pair_is_one_whichever_side_is_tested(rows):
    questions = table(*rows).replace({"split": {"valid": "train", "transfer": "train"}})
    swapped = questions.assign(split=questions.split.map({"test": "train", "train": "test"}))
    assert {(b, a, rule) for a, b, rule in joined(swapped)} == joined(questions)


@pytest.fixture
def leaking() -> pd.DataFrame:
    return table(
        {"id": "t0", "split": "test", "source": "exam", "question": VIGNETTE},
        {"id": "t1", "split": "test", "source": "exam"},
        {"id": "t2", "split": "test", "source": "other", "question": SHORT, "options": DRUGS},
        {"id": "l0", "source": "bank", "question": VIGNETTE},
        {"id": "l1", "source": "bank", "question": VIGNETTE, "split": "transfer"},
        {"id": "l2", "source": "book", "question": "the drug of choice against scabies is", "options": DRUGS},
        {"id": "l3", "source": "book", "split": "valid"},
        *strangers(30),
    )


def test_clean_rows_are_those_no_rule_touched(leaking):
    pairs = find(leaking)
    clean = clean_mask(leaking, pairs)
    assert set(leaking.id[~clean]) == {"t0", "t2"}
    assert (clean.index == leaking.index).all() and clean.dtype == bool
    assert clean_mask(leaking, pairs.iloc[:0]).all()


def test_the_table_counts_every_pair_of_sources(leaking):
    pairs = find(leaking)
    counts = contamination_table(pairs, leaking).set_index(["source_train", "source_test", "rule"])
    assert len(counts) == 3 * 2 * 5  # bank, book, any × exam, other × four rules and any
    assert counts.loc[("bank", "exam", "ngram13")].tolist() == [2, 1, 2, 0.5]
    assert counts.loc[("bank", "exam", "any")].tolist() == [2, 1, 2, 0.5]  # found by two rules, counted once
    assert counts.loc[("book", "other", "options")].tolist() == [1, 1, 1, 1.0]
    assert counts.loc[("any", "exam", "any"), "touched"] == 1
    assert (counts.loc["book"].loc["exam"].pairs == 0).all()
