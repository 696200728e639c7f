"""Near-duplicate groups, so that no copy of a question stands on both sides of a split."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

SHINGLE_WORDS = 8
COMMON_SHINGLE = 20  # a shingle in more questions than this is a phrase of the trade, not a sign of copying
SHARED_FRACTION = 0.5


def group_near_duplicates(texts: pd.Series) -> np.ndarray:
    """Component number per text: two texts are near-duplicates if they share half of the shorter one's shingles.

    A shingle is a run of eight words; those that more than COMMON_SHINGLE texts hold are stock phrases ("which of the
    following is the most likely diagnosis") and count for nothing. Sparse: linear in words, not quadratic in texts.
    """
    rows, columns, index = [], [], {}
    # each text once: many copies of one would make all its shingles common
    copy_of, texts = pd.factorize(np.array([" ".join(re.findall(r"\w+", text.casefold())) for text in texts], object))
    for row, text in enumerate(texts):
        words = text.split()
        shingles = {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
        rows.extend([row] * len(shingles))
        columns.extend(index.setdefault(shingle, len(index)) for shingle in shingles)
    holds = coo_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape=(len(texts), len(index))).tocsc()
    size = np.asarray(holds.sum(axis=1)).ravel()
    rare = holds[:, np.diff(holds.indptr) <= COMMON_SHINGLE].tocsr()
    shared = (rare @ rare.T).tocoo()
    near = shared.data >= SHARED_FRACTION * np.minimum(size[shared.row], size[shared.col])
    edges = coo_matrix((shared.data[near], (shared.row[near], shared.col[near])), shape=shared.shape)
    return connected_components(edges, directed=False)[1][copy_of]
