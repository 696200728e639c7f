"""Near-duplicates: what counts as a copy, whatever the order, and what does not."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit import duplicates
from medkit.duplicates import group_near_duplicates

# --- near-duplicates -----------------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(40)]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=0, max_size=14).map(" ".join), min_size=1, max_size=15)


def partition(labels) -> set[frozenset]:
    """The groups as sets of positions: what matters of labels is who shares one."""
    return {frozenset(np.flatnonzero(labels == label)) for label in set(labels)}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TEXTS, st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order_of_the_texts(texts, random):
    order = random.sample(range(len(texts)), len(texts))
    straight = partition(group_near_duplicates(pd.Series(texts)))
    mixed = partition(group_near_duplicates(pd.Series([texts[i] for i in order])))
    assert straight == {frozenset(order[i] for i in group) for group in mixed}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TEXTS)
def test_equal_texts_share_a_group(texts):
    labels = group_near_duplicates(pd.Series([*texts, *(text.upper() + "!" for text in texts)]))
    assert (labels[: len(texts)] == labels[len(texts) :]).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=12))
def test_texts_without_a_common_word_share_no_group(lengths):
    texts = [" ".join(f"t{number}x{i}" for i in range(length)) for number, length in enumerate(lengths)]
    assert len(set(group_near_duplicates(pd.Series(texts)))) == len(texts)


@pytest.mark.parametrize("copies", [2, duplicates.COMMON_SHINGLE, duplicates.COMMON_SHINGLE + 1, 60])
def test_copies_share_a_group_however_many(copies):
    text = "a 30 year old man has had fever and a stiff neck for two days what is it"
    assert len(set(group_near_duplicates(pd.Series([text] * copies)))) == 1


def test_stock_phrases_join_nothing():
    stock = "which of the following is the most likely diagnosis in this patient"
    texts = [f"{' '.join(f'case{n}word{i}' for i in range(10))} {stock}" for n in range(duplicates.COMMON_SHINGLE + 5)]
    assert len(set(group_near_duplicates(pd.Series(texts)))) == len(texts)


def test_half_of_the_shorter_text_is_near():
    words = [f"w{i}" for i in range(30)]  # 23 shingles of eight
    whole, other = " ".join(words), [f"z{i}" for i in range(30)]
    near = " ".join(words[:20] + other[:10])  # 13 of 23 shared
    far = " ".join(words[:18] + other[:12])  # 11 of 23
    part = " ".join(words[5:17])  # all 5 of its own, whatever the long one's length
    assert len(set(group_near_duplicates(pd.Series([whole, near])))) == 1
    assert len(set(group_near_duplicates(pd.Series([whole, far])))) == 2
    assert len(set(group_near_duplicates(pd.Series([whole, part])))) == 1


def test_nearness_carries_over():
    words = [f"w{i}" for i in range(60)]
    chain = [" ".join(words[i : i + 24]) for i in (0, 8, 16, 24)]
    assert len(set(group_near_duplicates(pd.Series(chain)))) == 1
    assert len(set(group_near_duplicates(pd.Series([chain[0], chain[3]])))) == 2


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["?", "!"]])
def test_texts_without_words_do_no_harm(texts):
    assert len(group_near_duplicates(pd.Series(texts, dtype=str))) == len(texts)
