"""Near-duplicates: what counts as a copy, whatever the order and however many there are, and what does not."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.data import near_duplicates
from medkit.data.near_duplicates import group_near_duplicates, grouping_texts, normalise, word_runs

WORDS = [f"w{i}" for i in range(40)]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=0, max_size=14).map(" ".join), min_size=1, max_size=15)


def partition(labels) -> set[frozenset]:
    """The groups as sets of positions: what matters of labels is who shares one."""
    return {frozenset(np.flatnonzero(labels == label)) for label in set(labels)}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(TEXTS, st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order_of_the_texts_and_equal_texts_share_one(texts, random):
    order = random.sample(range(len(texts)), len(texts))
    straight = partition(group_near_duplicates(pd.Series(texts)))
    mixed = partition(group_near_duplicates(pd.Series([texts[i] for i in order])))
    assert straight == {frozenset(order[i] for i in group) for group in mixed}
    labels = group_near_duplicates(pd.Series([*texts, *(text.upper() + "!" for text in texts)]))
    assert (labels[: len(texts)] == labels[len(texts) :]).all()


EDITS = {
    "another ending": lambda words, number: [*words[:18], *(f"end{number}x{i}" for i in range(6))],
    "another beginning": lambda words, number: [*(f"start{number}x{i}" for i in range(6)), *words[6:]],
    "a longer text": lambda words, number: [*words, *(f"more{number}x{i}" for i in range(12))],
    "a word put in": lambda words, number: [*words[:3], f"new{number}", *words[3:]],
}


@pytest.mark.parametrize("count", [2, near_duplicates.COMMON_SHINGLE + 1, 2 * near_duplicates.MAX_COMPARED])
def test_near_copies_share_a_group_however_many(count):
    words = [f"w{i}" for i in range(24)]
    for name, edit in EDITS.items():
        texts = [" ".join(edit(words, number)) for number in range(count)]
        start = " ".join(texts[0].split()[:9])
        other = [f"{' '.join(f'case{n}word{i}' for i in range(20))} {start}" for n in range(3)]
        assert len(set(group_near_duplicates(pd.Series(texts)))) == 1, name
        assert len(set(group_near_duplicates(pd.Series(texts + other)))) == 4, name


def test_half_of_the_shorter_text_is_near():
    words = [f"w{i}" for i in range(30)]  # 23 shingles of eight
    whole, other = " ".join(words), [f"z{i}" for i in range(30)]
    near = " ".join(words[:20] + other[:10])  # 13 of 23 shared
    far = " ".join(words[:18] + other[:12])  # 11 of 23
    part = " ".join(words[5:17])  # all 5 of its own, whatever the long one's length
    assert len(set(group_near_duplicates(pd.Series([whole, near])))) == 1
    assert len(set(group_near_duplicates(pd.Series([whole, far])))) == 2
    assert len(set(group_near_duplicates(pd.Series([whole, part])))) == 1


def test_options_are_compared_in_one_order_and_usual_answers_not_at_all():
    questions = pd.DataFrame({
        "question": ["what helps", "what helps", "does it help"],
        "options": [["rest", "ice"], ["ice", "rest"], ["yes", "no", "maybe"]],
        "kind": ["choice", "choice", "abstract"],
    })  # fmt: skip
    texts = grouping_texts(questions)
    assert texts[0] == texts[1] == "what helps ice rest"
    assert normalise(texts[2]) == "does it help"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(TEXTS, st.integers(1, 9))
def test_word_runs_are_the_runs_of_words(texts, length):
    texts = [normalise(text) for text in texts]
    holds = word_runs(texts, length)
    split = [text.split() for text in texts]
    runs = [{tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))} for words in split]
    assert holds.shape == (len(texts), len(set().union(*runs)))
    assert (holds.data == 1).all()
    shared = (holds @ holds.T).toarray()
    assert shared.tolist() == [[len(one & other) for other in runs] for one in runs]
