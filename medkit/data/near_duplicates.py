"""Groups of near-duplicate questions, so that no copy of a question stands on both sides of a split.

Texts are compared by the runs of words that they share, as sparse matrices: the work is linear in the words.
"""

import re
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

SHINGLE_WORDS = 8
COMMON_SHINGLE = 20  # a shingle in more families than this is a stock phrase, not a sign of copying
SHARED_FRACTION = 0.5
MAX_COMPARED = 64  # a text is compared with at most so many holders of each of its shingles: this bounds the work
ROWS_AT_ONCE = 4096


def group_near_duplicates(texts: pd.Series) -> np.ndarray:
    """Group number per text (N,): two texts are near-duplicates if they share half of the shorter one's shingles.

    A shingle is a run of eight words. Stock phrases ("which of the following is the most likely diagnosis") do not
    count. A phrase is stock if more than COMMON_SHINGLE *families* hold it, not texts: forty copies of one question
    are one family, and do not make a phrase stock.
    """
    texts, copy_of = distinct_texts(texts)
    holds = word_runs(texts)
    rare = holds[:, count_families(holds, find_families(holds)) <= COMMON_SHINGLE]
    return _components(rare, np.diff(holds.indptr), np.minimum)[copy_of]


def join_groupings(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Group number per row (N,): rows that are together in one of two groupings, directly or through others."""
    size = first.max(initial=-1) + 1
    edges = (np.ones(len(first), bool), (first, size + second))
    graph = coo_matrix(edges, shape=(size + second.max(initial=-1) + 1,) * 2)
    return connected_components(graph, directed=False)[1][first]


def grouping_texts(questions: pd.DataFrame) -> pd.Series:
    """The text by which questions are compared: the question and its options in one order, since copies shuffle them.

    The options of an abstract are left out: yes, no and maybe are the same for all. An instruction is compared by all
    that the user says in its conversation (`prompts`).
    """
    options = questions.options.map(sorted).str.join(" ").where(questions.kind != "abstract", "")
    texts = questions.question + " " + options
    return questions.prompts.fillna(texts) if "prompts" in questions else texts


def normalise(text: str) -> str:
    """The words in lower case between single spaces, without punctuation and line breaks."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def distinct_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every normalised text once, and for each given text the index of its normalised form.

    The order is that of the texts' hashes. So the first few are the same in any order of the rows, and are not biased
    towards a letter.
    """
    copy_of, distinct = pd.factorize(np.array([normalise(text) for text in texts], object))
    order = np.argsort(pd.util.hash_array(distinct), kind="stable")
    return distinct[order], np.argsort(order)[copy_of]


def word_runs(texts: Sequence[str], length: int = SHINGLE_WORDS) -> csr_matrix:
    """Texts × distinct runs of `length` words, 1 where the text holds the run; texts must be normalised.

    A shorter text is one run.
    """
    runs_by_text = []
    for words in map(str.split, texts):
        starts = range(max(1, len(words) - length + 1))
        runs_by_text.append(dict.fromkeys(" ".join(words[start : start + length]) for start in starts))
    columns, distinct = pd.factorize(np.array([*chain.from_iterable(runs_by_text)], object))
    row_ends = np.cumsum([0, *map(len, runs_by_text)])
    return csr_matrix((np.ones(len(columns), np.int32), columns, row_ends), shape=(len(runs_by_text), len(distinct)))


def find_families(holds: csr_matrix) -> np.ndarray:
    """Family number per text: texts that share half of the *longer* one's runs, stock phrases included.

    This is stricter than a near-duplicate, because stock phrases are not known yet: a short text that is a stock
    phrase would be near every vignette that ends in it.
    """
    return _components(holds, np.diff(holds.indptr), np.maximum)


def count_families(holds: csr_matrix, family: np.ndarray) -> np.ndarray:
    """Number of families in which each run occurs."""
    shape = (family.max(initial=-1) + 1, len(family))
    members = csr_matrix((np.ones(len(family), np.int32), (family, np.arange(len(family)))), shape=shape)
    return np.bincount((members @ holds).indices, minlength=holds.shape[1])


def _components(holds: csr_matrix, sizes: np.ndarray, size_of_pair: Callable) -> np.ndarray:
    """Connected components of texts; an edge joins texts that share SHARED_FRACTION of `size_of_pair` (their sizes).

    Each text is compared with the first MAX_COMPARED holders of each of its runs. These are the same texts for all
    holders of a run, so further copies are still joined through them.
    """
    entries = holds.tocoo()
    first = pd.Series(entries.col).groupby(entries.col).cumcount().to_numpy() < MAX_COMPARED
    others = csr_matrix((entries.data[first], (entries.col[first], entries.row[first])), shape=holds.shape[::-1])
    edges = [np.zeros((2, 0), np.int64)]
    for start in range(0, holds.shape[0], ROWS_AT_ONCE):
        shared = (holds[start : start + ROWS_AT_ONCE] @ others).tocoo()
        pair = np.stack([shared.row + start, shared.col])
        edges.append(pair[:, shared.data >= SHARED_FRACTION * size_of_pair(*sizes[pair])])
    rows, columns = np.concatenate(edges, axis=1)
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(holds.shape[0],) * 2)
    return connected_components(graph, directed=False)[1]
