"""Which test questions a model may have learned from: every training source against every test source.

Three rules by words and one by embeddings, each able to see what the others miss. All the word rules leave out what
many questions share: a template ("Which ICD-10-CM chapter lists …") or the usual options make no copy. Nothing is
removed here; `clean_mask` says which rows no rule touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rapidfuzz import fuzz, process
from scipy.sparse import csr_matrix

from medkit.data.near_duplicates import (
    SHINGLE_WORDS,
    count_families,
    distinct_texts,
    find_families,
    normalise,
    word_runs,
)

RUN_WORDS = 13
SHARED_RUNS = 0.25  # of the shorter text's; among real exam questions copies share 0.36 or more, strangers 0.20 or less
COMMON = 20  # what more families than this hold is usual: a run of 13 words, an option, a set of options
COMMON_WORDS = 0.02  # a word in more than this share of the families (and in more than COMMON) is the template's
RATIO = 95.0  # per cent
LONG_WORDS = 8  # a question with fewer words of its own must share an option too: "True about hepatitis A?" or B
TELLING_OPTIONS = 3
SHARED_MEANING = 0.5  # weight of the shared words over the weight of the question that says less
COSINE = 0.95
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 256, 16_384
RULES = ["ngram13", "fuzzy", "options", "embedding"]
COLUMNS = ["id_test", "id_train", "rule", "score", "source_test", "source_train"]

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # place among the test rows, place among the others, score


def find_contamination(questions: pd.DataFrame, embeddings: np.ndarray | None = None) -> pd.DataFrame:
    """Pairs of a test question and one that may be learned from: a row per pair and rule that joins them (COLUMNS).

    `questions` is the final table; `embeddings`, if given, holds a unit vector for each of its rows. Scores are 0 to 1.

    `ngram13`   question and context share runs of 13 words, stock phrases apart: a quarter of the shorter text's.
                The usual rule asks for a single run; vignettes share "his temperature is 37 C, pulse is …" by chance.
    `fuzzy`     95 % of the characters agree, with the template's words and without. By `fuzz.ratio`, where order and
                length count; to the set ratios a part of a question is all of it. Short ones must share an option.
    `options`   the same options in any order, at least three of them unusual, and half of the weight of one question's
                words in the other; a word weighs log(1 + families / families that hold it). Catches paraphrases.
    `embedding` the cosine is at least COSINE.

    A family is what `duplicates.find_families` joins: a hundred copies of one question make nothing usual.
    """
    questions = questions.reset_index(drop=True)
    is_test = (questions.split == "test").to_numpy()
    text = _read(questions)
    test, train = text.rows(is_test), text.rows(~is_test)
    found = dict(zip(RULES, (rule(test, train) for rule in (_share_runs, _nearly_equal, _same_options)), strict=False))
    if embeddings is not None:
        if len(embeddings) != len(questions):
            raise ValueError(f"{len(embeddings)} embeddings for {len(questions)} questions; give one for each row")
        found["embedding"] = _near(embeddings[is_test], embeddings[~is_test])
    tested, learned = questions[is_test], questions[~is_test]
    pairs = pd.concat([
        pd.DataFrame({
            "id_test": tested.id.to_numpy()[i], "id_train": learned.id.to_numpy()[j], "rule": rule, "score": score,
            "source_test": tested.source.to_numpy()[i], "source_train": learned.source.to_numpy()[j],
        })
        for rule, (i, j, score) in found.items()
    ])  # fmt: skip
    return pairs.sort_values(COLUMNS, ascending=[True, True, True, False, True, True], ignore_index=True)


def contamination_table(pairs: pd.DataFrame, questions: pd.DataFrame, rules: Sequence[str] = RULES[:3]) -> pd.DataFrame:
    """Counts for every training source × test source × rule, zeros included; `rules` are those that were asked.

    Columns: source_train, source_test, rule, pairs, touched (test questions in a pair), tested (test questions of that
    source), share (touched / tested). A rule or source_train of `any` counts each pair and question once over all.
    """
    tested = questions[questions.split == "test"].source.value_counts().sort_index()
    learned = sorted(questions[questions.split != "test"].source.unique())
    both = pd.concat([pairs, pairs.assign(rule="any")])
    both = pd.concat([both, both.assign(source_train="any")])
    keys = ["source_train", "source_test", "rule"]
    counts = (
        both.drop_duplicates(["id_test", "id_train", *keys])
        .groupby(keys)
        .agg(pairs=("id_test", "size"), touched=("id_test", "nunique"))
    )
    grid = pd.MultiIndex.from_product([[*learned, "any"], tested.index, [*rules, "any"]], names=keys)
    table = counts.reindex(grid, fill_value=0).reset_index()
    table["tested"] = table.source_test.map(tested)
    return table.assign(share=table.touched / table.tested)


def clean_mask(questions: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series:
    """Per row of `questions`: False for a test question that stands in a pair, True for every other row."""
    return ~((questions.split == "test") & questions.id.isin(pairs.id_test)).rename("clean")


@dataclass(frozen=True)
class _Text:
    """What the rules compare, row by row."""

    runs: csr_matrix  # runs of 13 words that are no stock phrase
    run_count: np.ndarray  # all runs of 13 words; 0 in a shorter text
    words: csr_matrix  # words of the question that are not the template's, each with its weight
    question: np.ndarray  # normalised
    own: np.ndarray  # the question without the template's words
    telling: np.ndarray  # frozenset of the options that are not usual
    option_set: np.ndarray  # all options as one text in a fixed order; "" if too usual to tell anything
    item: np.ndarray  # question and all options as one text

    def rows(self, chosen: np.ndarray) -> _Text:
        return _Text(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def _read(questions: pd.DataFrame) -> _Text:
    texts, own_text = distinct_texts(questions.question + " " + questions.context)
    runs, family = word_runs(texts, RUN_WORDS), find_families(word_runs(texts, SHINGLE_WORDS))
    long = np.array([text.count(" ") >= RUN_WORDS - 1 for text in texts], bool)
    run_count = np.diff(runs.indptr) * long
    runs, family = runs[:, count_families(runs, family) <= COMMON], family[own_text]

    question = np.array([normalise(text) for text in questions.question], object)
    words, vocabulary = _members([text.split() for text in question])
    spread, families = count_families(words, family), family.max(initial=0) + 1
    usual = spread > max(COMMON, COMMON_WORDS * families)
    template = set(vocabulary[usual])
    own = [" ".join(word for word in text.split() if word not in template) for text in question]
    words.data = np.log1p(families / spread)[words.indices]

    options = [sorted(map(normalise, row)) for row in questions.options]
    known = _unusual(options, family)
    telling = np.empty(len(options), object)
    telling[:] = [frozenset(known.intersection(row)) for row in options]
    sets = ["\n".join(row) for row in options]
    rare = _unusual([[key] for key in sets], family)
    enough = [key in rare and len(few) >= TELLING_OPTIONS for key, few in zip(sets, telling, strict=True)]
    return _Text(
        runs[own_text], run_count[own_text], words[:, ~usual], question, np.array(own, object), telling,
        np.where(enough, np.array(sets, object), ""), question + "\n" + np.array(sets, object),
    )  # fmt: skip


def _members(rows: Sequence[Sequence[str]]) -> tuple[csr_matrix, np.ndarray]:
    """Rows × distinct members, 1.0 where the row has it; and the members' names."""
    columns, names = pd.factorize(np.array([name for row in rows for name in row], object))
    places = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    holds = csr_matrix((np.ones(len(columns)), (places, columns)), shape=(len(rows), len(names)))
    holds.sum_duplicates()
    holds.data[:] = 1
    return holds, names


def _unusual(rows: Sequence[Sequence[str]], family: np.ndarray) -> set[str]:
    holds, names = _members(rows)
    return set(names[count_families(holds, family) <= COMMON])


def _products(test: csr_matrix, train: csr_matrix) -> Iterator[Pairs]:
    """Entries of test @ train.T that are not zero, some rows at a time."""
    train = train.T.tocsr()
    for start in range(0, test.shape[0], ROWS_AT_ONCE):
        part = (test[start : start + ROWS_AT_ONCE] @ train).tocoo()
        yield part.row + start, part.col, part.data


def _gather(parts: Iterator[Pairs]) -> Pairs:
    none = np.zeros(0, np.int64)
    columns = zip((none, none, none.astype(float)), *parts, strict=True)
    return tuple(np.concatenate(column) for column in columns)


def _share_runs(test: _Text, train: _Text) -> Pairs:
    def parts() -> Iterator[Pairs]:
        for i, j, shared in _products(test.runs, train.runs):
            shorter = np.minimum(test.run_count[i], train.run_count[j])
            copied = (shared >= SHARED_RUNS * shorter) & (shorter > 0)
            yield i[copied], j[copied], shared[copied] / shorter[copied]

    return _gather(parts())


def _equal(test: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of equal texts; the empty text equals nothing."""
    left, right = (pd.DataFrame({"text": side, "place": np.arange(len(side))}) for side in (test, train))
    both = left[left.text != ""].merge(right, on="text")
    return both.place_x.to_numpy(np.int64), both.place_y.to_numpy(np.int64)


def _nearly_equal(test: _Text, train: _Text) -> Pairs:
    def parts() -> Iterator[Pairs]:
        i, j = _equal(test.item, train.item)  # with the options too: no word of its own is needed
        yield i, j, np.ones(len(i))
        sizes, other = np.diff(test.words.indptr), np.diff(train.words.indptr)
        for i, j, shared in _products(test.words.sign(), train.words.sign()):
            likely = shared >= 0.5 * np.maximum(sizes[i], other[j])  # else no ratio reaches RATIO, but for misprints
            i, j = i[likely], j[likely]
            for left, right in ((test.own, train.own), (test.question, train.question)):
                score = process.cpdist(left[i], right[j], scorer=fuzz.ratio, score_cutoff=RATIO)
                i, j, score = i[score > 0], j[score > 0], score[score > 0]
            long = np.minimum(sizes[i], other[j]) >= LONG_WORDS
            told = [bool(test.telling[a] & train.telling[b]) for a, b in zip(i, j, strict=True)]
            copied = (long | np.array(told, bool)) & (test.item[i] != train.item[j])
            yield i[copied], j[copied], score[copied] / 100

    return _gather(parts())


def _same_options(test: _Text, train: _Text) -> Pairs:
    i, j = _equal(test.option_set, train.option_set)
    shared = test.words[i].multiply(train.words[j].sign()).sum(axis=1)
    less = np.minimum(test.words.sum(axis=1)[i], train.words.sum(axis=1)[j])
    shared, less = np.asarray(shared).ravel(), np.asarray(less).ravel()
    alike = (shared >= SHARED_MEANING * less) & (less > 0)
    return i[alike], j[alike], shared[alike] / less[alike]


def _near(test: np.ndarray, train: np.ndarray) -> Pairs:
    def parts() -> Iterator[Pairs]:
        for start in range(0, len(test), ROWS_AT_ONCE):
            for begin in range(0, len(train), COLUMNS_AT_ONCE):
                cosine = test[start : start + ROWS_AT_ONCE] @ train[begin : begin + COLUMNS_AT_ONCE].T
                i, j = np.nonzero(cosine >= COSINE)
                yield i + start, j + begin, cosine[i, j].clip(max=1)

    return _gather(parts())
