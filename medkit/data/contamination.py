"""Contamination: test questions that a model may have seen in training. Nothing is removed here.

Three rules compare words and one compares embeddings; each can see what the others miss. The word rules ignore what
many questions share: a template ("Which ICD-10-CM chapter lists …") or usual options do not make a copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rapidfuzz import fuzz, process
from scipy.sparse import csr_matrix
from sklearn.preprocessing import MultiLabelBinarizer

from medkit.data.instructions import prompt_texts
from medkit.data.near_duplicates import count_families, distinct_texts, find_families, normalise, word_runs
from medkit.data.raw_questions import DataError

RUN_WORDS = 13
SHARED_RUNS = 0.25  # of the shorter text's; in real exam questions copies share 0.36 or more, others 0.20 or less
COMMON = 20  # a run of 13 words, an option or a set of options in more families than this is usual
COMMON_WORDS = 0.02  # a word in more than this share of the families (and in more than COMMON) belongs to a template
RATIO = 95.0  # per cent
LONG_WORDS = 8  # a question with fewer words of its own must also share an option: "True about hepatitis A?" or B
MIN_UNUSUAL_OPTIONS = 3
SHARED_WEIGHT = 0.5  # of the shared words, over the weight of the question with the smaller weight
COSINE = 0.95
ROWS_AT_ONCE = 256
RULES = ["ngram13", "fuzzy", "options", "embedding"]
COLUMNS = ["id_test", "id_train", "rule", "score", "source_test", "source_train"]

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # a test row, another row, score


def find_contamination(questions: pd.DataFrame, embeddings: np.ndarray) -> pd.DataFrame:
    """Pairs of a test question and a question of another split: a row per pair and rule that joins them (COLUMNS).

    `questions` is the final table; `embeddings` has a unit vector for each of its rows. Scores are 0 to 1.

    `ngram13`   question and context share runs of 13 words, without stock phrases: a quarter of the shorter text's.
                The usual rule asks for a single run; vignettes share "his temperature is 37 C, pulse is …" by chance.
    `fuzzy`     95 % of the characters agree, with and without the template's words. `fuzz.ratio` sees order and
                length; the set ratios would take a part of a question for all of it. Short ones must share an option.
    `options`   the same options in any order, at least three of them unusual, and half of the weight of one question's
                words in the other; a word weighs log(1 + families / families that hold it). Finds paraphrases.
    `embedding` the cosine is at least COSINE.

    A family is what `near_duplicates.find_families` joins: a hundred copies of one question make nothing usual.
    Raises DataError if the number of embeddings is not the number of questions.
    """
    if len(embeddings) != len(questions):
        raise DataError(f"{len(embeddings)} embeddings for {len(questions)} questions; give one for each row")
    test, train = (np.flatnonzero(side) for side in (questions.split == "test", questions.split != "test"))
    features, ids, sources = _compute_features(questions), questions.id.to_numpy(), questions.source.to_numpy()
    pairs_by_rule = [rule(features, test, train) for rule in (_share_runs, _nearly_equal, _same_options)]
    tables = []
    for rule, parts in zip(RULES, [*pairs_by_rule, _near(embeddings, test, train)], strict=True):
        for i, j, score in parts:
            columns = ids[i], ids[j], rule, score, sources[i], sources[j]
            tables.append(pd.DataFrame(dict(zip(COLUMNS, columns, strict=True))))
    pairs = pd.concat(tables)
    return pairs.sort_values(COLUMNS, ascending=[True, True, True, False, True, True], ignore_index=True)


def contamination_table(pairs: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """Counts for every training source × test source × rule, zeros included.

    Columns: source_train, source_test, rule, pairs, touched (test questions in a pair), tested (test questions of that
    source), share (touched / tested). A rule or source_train `any` counts each pair and question once over all.
    """
    tested = questions[questions.split == "test"].source.value_counts().sort_index()
    train_sources = sorted(questions[questions.split != "test"].source.unique())
    both = pd.concat([pairs, pairs.assign(rule="any")])
    both = pd.concat([both, both.assign(source_train="any")])
    keys = ["source_train", "source_test", "rule"]
    counts = both.drop_duplicates(["id_test", "id_train", *keys]).groupby(keys)
    counts = counts.agg(pairs=("id_test", "size"), touched=("id_test", "nunique"))
    grid = pd.MultiIndex.from_product([[*train_sources, "any"], tested.index, [*RULES, "any"]], names=keys)
    table = counts.reindex(grid, fill_value=0).reset_index()
    table["tested"] = table.source_test.map(tested)
    return table.assign(share=table.touched / table.tested)


def clean_mask(questions: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series:
    """Per row of `questions`: False for a test question that is in a pair, True for every other row."""
    return ~((questions.split == "test") & questions.id.isin(pairs.id_test)).rename("clean")


@dataclass(frozen=True)
class _Features:
    """What the rules compare, row by row."""

    runs: csr_matrix  # runs of 13 words that are not stock phrases
    run_count: np.ndarray  # number of all runs of 13 words; 0 for a shorter text
    words: csr_matrix  # words of the question that do not belong to a template, each with its weight
    question: np.ndarray  # normalised
    own_text: np.ndarray  # the question without the template's words
    unusual_options: np.ndarray  # frozenset of options
    option_set: np.ndarray  # all options as one text in a fixed order; "" if the set is usual
    item: np.ndarray  # question and all options as one text


def _compute_features(questions: pd.DataFrame) -> _Features:
    texts, copy_of = distinct_texts(prompt_texts(questions))
    runs, family = word_runs(texts, RUN_WORDS), find_families(word_runs(texts))
    is_long = np.array([text.count(" ") >= RUN_WORDS - 1 for text in texts], bool)
    run_count = np.diff(runs.indptr) * is_long
    runs, family = runs[:, count_families(runs, family) <= COMMON], family[copy_of]

    question = np.array([normalise(text) for text in questions.question], object)
    words, vocabulary = _incidence([text.split() for text in question])
    families_with, families = count_families(words, family), family.max(initial=0) + 1
    in_template = families_with > max(COMMON, COMMON_WORDS * families)
    template = set(vocabulary[in_template])
    own_text = [" ".join(word for word in text.split() if word not in template) for text in question]
    words.data = np.log1p(families / families_with)[words.indices]

    options = [sorted(map(normalise, row)) for row in questions.options]
    option_sets = np.array(["\n".join(row) for row in options], object)
    unusual, unusual_sets = _unusual(options, family), _unusual([[text] for text in option_sets], family)
    unusual_options = pd.Series([frozenset(unusual.intersection(row)) for row in options], dtype=object).to_numpy()
    is_telling = [
        text in unusual_sets and len(few) >= MIN_UNUSUAL_OPTIONS
        for text, few in zip(option_sets, unusual_options, strict=True)
    ]
    return _Features(
        runs[copy_of], run_count[copy_of], words[:, ~in_template], question, np.array(own_text, object),
        unusual_options, np.where(is_telling, option_sets, ""), question + "\n" + option_sets,
    )  # fmt: skip


def _incidence(rows: Sequence[Sequence[str]]) -> tuple[csr_matrix, np.ndarray]:
    """Rows × distinct members, 1.0 where the row has the member; and the members."""
    binarizer = MultiLabelBinarizer(sparse_output=True)
    return binarizer.fit_transform(rows).astype(float), binarizer.classes_


def _unusual(rows: Sequence[Sequence[str]], family: np.ndarray) -> set[str]:
    holds, members = _incidence(rows)
    return set(members[count_families(holds, family) <= COMMON])


def _products(table: csr_matrix, test: np.ndarray, train: np.ndarray) -> Iterator[Pairs]:
    """Entries of table[test] @ table[train].T that are not zero, some rows at a time."""
    others = table[train].T.tocsr()
    for start in range(0, len(test), ROWS_AT_ONCE):
        part = (table[test[start : start + ROWS_AT_ONCE]] @ others).tocoo()
        yield test[part.row + start], train[part.col], part.data


def _share_runs(features: _Features, test: np.ndarray, train: np.ndarray) -> Iterator[Pairs]:
    for i, j, shared in _products(features.runs, test, train):
        shorter = np.minimum(features.run_count[i], features.run_count[j])
        copied = (shared >= SHARED_RUNS * shorter) & (shorter > 0)
        yield i[copied], j[copied], shared[copied] / shorter[copied]


def _equal(texts: np.ndarray, test: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal texts; the empty text equals nothing."""
    left, right = (pd.DataFrame({"text": texts[side], "row": side}) for side in (test, train))
    both = left[left.text != ""].merge(right, on="text")
    return both.row_x.to_numpy(np.int64), both.row_y.to_numpy(np.int64)


def _nearly_equal(features: _Features, test: np.ndarray, train: np.ndarray) -> Iterator[Pairs]:
    i, j = _equal(features.item, test, train)  # equal with the options too: no word of its own is needed
    yield i, j, np.ones(len(i))
    sizes, options = np.diff(features.words.indptr), features.unusual_options
    for i, j, shared in _products(features.words.sign(), test, train):
        likely = shared >= 0.5 * np.maximum(sizes[i], sizes[j])  # else the ratio hardly reaches RATIO
        i, j = i[likely], j[likely]
        for texts in (features.own_text, features.question):
            score = process.cpdist(texts[i], texts[j], scorer=fuzz.ratio, score_cutoff=RATIO)
            i, j, score = i[score > 0], j[score > 0], score[score > 0]
        is_long = np.minimum(sizes[i], sizes[j]) >= LONG_WORDS
        shares = [bool(a & b) for a, b in zip(options[i], options[j], strict=True)]
        copied = (is_long | np.array(shares, bool)) & (features.item[i] != features.item[j])
        yield i[copied], j[copied], score[copied] / 100


def _same_options(features: _Features, test: np.ndarray, train: np.ndarray) -> Iterator[Pairs]:
    i, j = _equal(features.option_set, test, train)
    words, weights = features.words, np.asarray(features.words.sum(axis=1)).ravel()
    shared = np.asarray(words[i].multiply(words[j].sign()).sum(axis=1)).ravel()
    smaller = np.minimum(weights[i], weights[j])
    alike = (shared >= SHARED_WEIGHT * smaller) & (smaller > 0)
    yield i[alike], j[alike], shared[alike] / smaller[alike]


def _near(embeddings: np.ndarray, test: np.ndarray, train: np.ndarray) -> Iterator[Pairs]:
    others = embeddings[train].T
    for start in range(0, len(test), ROWS_AT_ONCE):
        cosine = embeddings[test[start : start + ROWS_AT_ONCE]] @ others
        i, j = np.nonzero(cosine >= COSINE)
        yield test[i + start], train[j], cosine[i, j].clip(max=1)
