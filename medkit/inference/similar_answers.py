"""What a cache that serves stored answers to *similar* questions would do: a study. Nothing here serves an answer.

The paper (arXiv 2505.00025) serves a stored answer if α·Jaccard + (1−α)·cosine of two questions passes a threshold, and
gives neither number. In medicine one changed word may change the answer: the dose of a child is not the dose of an
adult. The pairs are real questions and edits of them; each was read and judged by one reader (similar_answers.csv). An
edit keeps the right answer (kinds "same: …": spelling, wording, a brand name) or changes it (a dose, a negation,
another patient). No model is loaded here; sentence embeddings are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from medkit.data.near_duplicates import normalise
from medkit.stage import MedkitError
from medkit.statistics import wilson

VERDICT_FILE = Path(__file__).with_name("similar_answers.csv")
ALL_EDITS = "all edits"
REAL_SAME, REAL_OTHER = "same: two real questions", "two real questions"
BRAND_NAMES = "same: exam, brand name"
THRESHOLDS = tuple(round(0.5 + 0.01 * step, 2) for step in range(51))
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEAR = 0.75  # all real pairs above this similarity (α = ½) were read, below it only a sample


def jaccard(text_a: str, text_b: str) -> float:
    """Number of shared words over number of distinct words, without case and punctuation; 1 if there are no words."""
    a, b = set(normalise(text_a).split()), set(normalise(text_b).split())
    return len(a & b) / len(a | b) if a | b else 1.0


def similarity(jaccard, cosine, alpha: float):
    """The paper's score, α·Jaccard + (1−α)·cosine, of two numbers or two columns."""
    if not 0 <= alpha <= 1:
        raise MedkitError(f"alpha is {alpha}: give the weight of the words, between 0 and 1")
    return alpha * jaccard + (1 - alpha) * cosine


def load_pairs(open_questions: pd.DataFrame, drug_pairs: pd.DataFrame) -> pd.DataFrame:
    """The judged pairs whose questions are in the two tables.

    Columns id, other, kind, text_a, text_b, drawn, lookups, verdict. `drawn` is `rule` for an edit. A real pair is a
    question and the most similar other one (α = ½, all-MiniLM-L6-v2): drawn at `random`, or `near` (all that are at
    least NEAR); `lookups` says for how many questions the other one is the most similar. `verdict` is `same` if the
    right answer to one question is right for the other, `different`, or `unclear`.
    """
    pairs = pd.read_csv(VERDICT_FILE, keep_default_na=False, dtype={"start": str})
    texts = pd.concat([open_questions, drug_pairs]).drop_duplicates("id").set_index("id").question
    renamed = drug_pairs.set_index("id").question_swapped
    pairs = pairs[pairs.id.isin(texts.index) & pairs.other.isin(["", *texts.index])]

    def second_text(pair) -> str | None:
        if pair.other:
            return texts[pair.other]
        if pair.kind == BRAND_NAMES:
            return renamed[pair.id]
        text, start = texts[pair.id], int(pair.start)
        end = start + len(pair.before)
        return text[:start] + pair.after + text[end:] if text[start:end] == pair.before else None

    pairs = pairs.assign(text_a=pairs.id.map(texts), text_b=[second_text(pair) for pair in pairs.itertuples()])
    real_kind = np.where(pairs.verdict == "same", REAL_SAME, REAL_OTHER)
    pairs = pairs.assign(kind=pairs.kind.where(pairs.drawn == "rule", real_kind)).dropna(subset="text_b")
    return pairs.drop(columns=["start", "before", "after"]).reset_index(drop=True)


def measure_pairs(pairs: pd.DataFrame, texts: Sequence[str], embeddings: np.ndarray) -> pd.DataFrame:
    """The clear pairs with `jaccard`, `cosine` and `same_answer`.

    `embeddings` (number of texts, d) holds a unit vector for each of `texts`. Pairs judged unclear are left out, and
    edits whose verdict is not what their kind is for.
    """
    row = {text: number for number, text in enumerate(texts)}
    clear = pairs[(pairs.verdict != "unclear") & (pairs.kind.str.startswith("same") == (pairs.verdict == "same"))]
    a, b = (embeddings[clear[column].map(row).to_numpy(int)] for column in ("text_a", "text_b"))
    words = [jaccard(x, y) for x, y in zip(clear.text_a, clear.text_b, strict=True)]
    cosine = np.minimum((a * b).sum(axis=1), 1)
    return clear.assign(same_answer=clear.verdict == "same", jaccard=words, cosine=cosine).reset_index(drop=True)


def serving_rates(
    pairs: pd.DataFrame, thresholds: Sequence[float], alphas: Sequence[float], confidence: float
) -> pd.DataFrame:
    """A row per α, threshold, measure and kind: rate, its Wilson interval, n pairs.

    `hit_rate`    share of the pairs with the same answer that is served (similarity at least the threshold)
    `wrong_rate`  share of the pairs with different answers that is served
    `wrong_share` share of the served edits that have different answers; it depends on how many edits of each kind exist

    For each kind, and for ALL_EDITS. Only the real pairs that were drawn at random count here.
    """
    pairs = pairs[pairs.drawn != "near"]
    same, rows = pairs.same_answer.to_numpy(), []
    edits = (pairs.drawn == "rule").to_numpy()
    kinds = {kind: (pairs.kind == kind).to_numpy() for kind in pairs.kind.unique()} | {ALL_EDITS: edits}
    interval = cache(partial(wilson, confidence=confidence))
    for alpha in alphas:
        score = similarity(pairs.jaccard, pairs.cosine, alpha).to_numpy()
        for threshold in thresholds:
            served = score >= threshold
            counts = [("hit_rate", kind, of_kind & same, served) for kind, of_kind in kinds.items()]
            counts += [("wrong_rate", kind, of_kind & ~same, served) for kind, of_kind in kinds.items()]
            counts += [("wrong_share", ALL_EDITS, edits & served, ~same)]
            for measure, kind, among, counted in counts:
                if n := int(among.sum()):
                    count = int((among & counted).sum())
                    rows.append((alpha, threshold, measure, kind, count / n, *interval(count, n), n))
    columns = ["alpha", "threshold", "measure", "kind", "rate", "ci_low", "ci_high", "n"]
    return pd.DataFrame(rows, columns=columns)


def real_lookups(pairs: pd.DataFrame, thresholds: Sequence[float], questions: int, confidence: float) -> pd.DataFrame:
    """What is served, and what of it is wrong, if each of `questions` real questions is looked up among all others.

    A row per threshold (at least NEAR), at α = ½: `hit_rate` of the questions, `wrong_share` of the pairs served with
    its Wilson interval, n pairs. Raises MedkitError for a lower threshold.
    """
    if min(thresholds) < NEAR:
        raise MedkitError(f"threshold {min(thresholds)}: below {NEAR} only a sample of the pairs was read; raise it")
    real = pairs[pairs.kind.isin([REAL_SAME, REAL_OTHER])]
    score, rows = similarity(real.jaccard, real.cosine, 0.5), []
    for threshold in thresholds:
        served = real[score >= threshold]
        wrong, n = int((~served.same_answer).sum()), len(served)
        share = (wrong / n, *wilson(wrong, n, confidence)) if n else (np.nan, 0.0, 1.0)
        rows.append((threshold, served.lookups.sum() / questions, *share, n))
    return pd.DataFrame(rows, columns=["threshold", "hit_rate", "wrong_share", "ci_low", "ci_high", "n"])


def best_thresholds(rates: pd.DataFrame, pairs: pd.DataFrame, most_wrong: float) -> pd.DataFrame:
    """For each α the lowest threshold that serves at most `most_wrong` of the edits with another answer (NaN: none).

    Beside it the `hit_rate` that is left, the kind of edit that is still served wrongly most often with its rate, and
    the areas under the ROC curve of telling "same answer" by similarity, for edits and for real pairs; ½ is chance.
    """
    rows = []
    for alpha, of_alpha in rates.groupby("alpha"):
        auc = [
            roc_auc_score(some.same_answer, similarity(some.jaccard, some.cosine, alpha))
            for some in (pairs[pairs.drawn == "rule"], pairs[pairs.drawn == "random"])
        ]
        wrong = of_alpha[of_alpha.measure == "wrong_rate"].set_index("threshold")
        of_all = wrong.rate[wrong.kind == ALL_EDITS]
        threshold = of_all.index[of_all <= most_wrong].min()
        at_threshold = of_alpha[(of_alpha.threshold == threshold) & (of_alpha.measure == "hit_rate")]
        worst = wrong[(wrong.index == threshold) & (wrong.kind != ALL_EDITS)].nlargest(1, "rate")
        hit_rate = at_threshold.rate[at_threshold.kind == ALL_EDITS].max()
        rows.append((alpha, *auc, threshold, hit_rate, worst.kind.max(), worst.rate.max()))
    columns = ["alpha", "auc_edits", "auc_real", "threshold", "hit_rate", "worst_kind", "worst_rate"]
    return pd.DataFrame(rows, columns=columns)
