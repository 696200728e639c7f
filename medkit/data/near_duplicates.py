"""Near-duplicate groups, so that no copy of a question stands on both sides of a split.

Texts are compared by the runs of words they share, as sparse matrices: linear in words, never every text with every
other. What is a copy of a *test* question is for `contamination` to say; nothing here knows a split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

SHINGLE_WORDS = 8
COMMON_SHINGLE = 20  # a shingle in more families than this is a phrase of the trade, not a sign of copying
SHARED_FRACTION = 0.5
COMPARED = 64  # every holder of a shingle is compared with so many others that hold it: bounds the work
ROWS_AT_ONCE = 4096
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


def group_near_duplicates(texts: pd.Series) -> np.ndarray:
    """Component number per text: two texts are near-duplicates if they share half of the shorter one's shingles.

    A shingle is a run of eight words; stock phrases ("which of the following is the most likely diagnosis") count for
    nothing. A phrase is stock if more than COMMON_SHINGLE *families* hold it, not texts: forty copies of one question
    are one family, and make nothing stock.
    """
    texts, copy_of = distinct_texts(texts)
    holds = word_runs(texts, SHINGLE_WORDS)
    rare = holds[:, count_families(holds, find_families(holds)) <= COMMON_SHINGLE]
    return _components(rare, np.diff(holds.indptr), np.minimum)[copy_of]


def grouping_texts(questions: pd.DataFrame) -> pd.Series:
    """What of a question tells it from others: its words, and its options in one order, for copies shuffle them.

    An abstract's yes, no and maybe tell nothing and are left out.
    """
    options = questions.options.map(sorted).str.join(" ").where(questions.kind != "abstract", "")
    return questions.question + " " + options


def normalise(text: str) -> str:
    """Words in lower case between single blanks: what is left to compare after case, punctuation and line breaks."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def distinct_texts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Every normalised text once, and the number of its own for each text given.

    They stand in the order of their hashes: whatever picks the first few of them picks the same ones in any order of
    the rows, and with no leaning towards a letter.
    """
    copy_of, once = pd.factorize(np.array([normalise(text) for text in texts], object))
    order = np.argsort(pd.util.hash_array(once), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return once[order], place[copy_of]


def word_runs(texts: Sequence[str], length: int) -> csr_matrix:
    """Texts × distinct runs of `length` words, 1 where the text holds the run; texts must be normalised.

    A text shorter than that is one run, all of it. Runs are told apart by a 64-bit hash of their words.
    """
    number: dict[str, int] = {"": 0}
    words, lengths = [], []
    for text in texts:
        split = text.split()
        split += [""] * (length - len(split))
        lengths.append(len(split))
        words.extend([number.setdefault(word, len(number)) for word in split])
    codes = pd.util.hash_array(np.array(list(number), object))[np.array(words, np.int64)]
    rows = np.repeat(np.arange(len(lengths)), lengths)
    count = max(0, len(codes) - length + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + codes[offset : offset + count]
    inside = rows[:count] == rows[len(rows) - count :]  # runs that do not cross into the next text
    columns, distinct = pd.factorize(hashes[inside])
    shape = (len(lengths), len(distinct))
    holds = csr_matrix((np.ones(len(columns), np.int32), (rows[:count][inside], columns)), shape=shape)
    holds.sum_duplicates()
    holds.data[:] = 1
    return holds


def find_families(holds: csr_matrix) -> np.ndarray:
    """Family number per text: texts joined by sharing half of the *longer* one's runs, stock or not.

    Stricter than a near-duplicate, because nothing is known yet of stock phrases: a short text made of one would be
    near every vignette that ends in it.
    """
    return _components(holds, np.diff(holds.indptr), np.maximum)


def count_families(holds: csr_matrix, family: np.ndarray) -> np.ndarray:
    """In how many families each run occurs."""
    shape = (family.max(initial=-1) + 1, len(family))
    members = csr_matrix((np.ones(len(family), np.int32), (family, np.arange(len(family)))), shape=shape)
    return np.bincount((members @ holds).indices, minlength=holds.shape[1])


def _components(holds: csr_matrix, sizes: np.ndarray, of: Callable) -> np.ndarray:
    """Components of texts that share SHARED_FRACTION of `of` the two sizes (np.minimum: the shorter one's).

    Each text is compared with the first COMPARED holders of each of its runs: exact up to so many copies; beyond, a
    copy is joined through those, for they are the same ones for all of its runs.
    """
    by_run = holds.tocsc()
    rank = np.arange(by_run.nnz) - np.repeat(by_run.indptr[:-1], np.diff(by_run.indptr))
    entries = by_run.tocoo()
    first = rank < COMPARED
    others = csr_matrix((entries.data[first], (entries.col[first], entries.row[first])), shape=holds.shape[::-1])
    edges = [np.zeros((2, 0), np.int64)]
    for start in range(0, holds.shape[0], ROWS_AT_ONCE):
        shared = (holds[start : start + ROWS_AT_ONCE] @ others).tocoo()
        pair = np.stack([shared.row + start, shared.col])
        edges.append(pair[:, shared.data >= SHARED_FRACTION * of(*sizes[pair])])
    rows, columns = np.concatenate(edges, axis=1)
    graph = coo_matrix((np.ones(len(rows), bool), (rows, columns)), shape=(holds.shape[0],) * 2)
    return connected_components(graph, directed=False)[1]
