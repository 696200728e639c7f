"""Predictions → claims: accuracy with intervals, paired comparisons, and what could not have been seen.

numpy, pandas and `statistics` only. Predictions keep raw text and log-probabilities; choices are read from them here,
so a better parser needs no GPU. Unparsed counts as wrong, and is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medkit.prompts import answer_parser, templates
from medkit.stage import MedkitError
from medkit.statistics import mean_intervals, paired_difference, verdicts, wilson
from medkit.variants import STEPS

STUDY = ["study", "condition"]  # columns of what was asked in another way than plainly


class EvaluationError(MedkitError):
    """Predictions that cannot be judged or compared."""


def judge(predictions: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """One row per variant, scoring and question: choice, whether it is right, and the question's `clean` and `group`.

    A choice is an option's index, −1 (unparsed) or `parsing.ABSTAINED`; a clean question resembles none learned from.
    Scored options give two readings: `option_text` takes the highest summed log-probability, `option_text_norm` the
    highest mean per token. `probabilities`: softmax over the options of the scores that the choice was read from.
    Generated text goes through `parsing.parse` and has none (None). `study` and `condition` come along where they are.
    """
    known = questions[["id", "source", "options", "answer", "clean", "group"]]
    table = predictions.merge(known, on="id", validate="many_to_one")
    if len(table) < len(predictions):
        raise EvaluationError(f"{len(predictions) - len(table)} predictions are for questions this run does not have")
    by_text = table[table.scoring == "option_text"]
    generated = table[table.scoring == "generated"]
    judged = [
        _scored(table[table.scoring == "letter"]),
        _scored(by_text),
        _scored(by_text, per_token=True).assign(scoring="option_text_norm"),
        generated.assign(choice=np.array([_read(row) for row in generated.itertuples()], int), probabilities=None),
    ]
    study = [name for name in STUDY if name in table]
    columns = [*study, "variant", "source", "scoring", "id", "group", "choice", "answer", "clean", "probabilities"]
    result = pd.concat([part[columns] for part in judged], ignore_index=True)
    return result.assign(correct=result.choice == result.answer)


def _scored(table: pd.DataFrame, per_token: bool = False) -> pd.DataFrame:
    """Choice and probabilities from log-probabilities: ragged rows side by side in one array, −inf where none is."""
    lengths = table.logprobs.map(len).to_numpy(int)
    if (lengths != table.options.map(len)).any():
        wrong = table[lengths != table.options.map(len)].iloc[0]
        raise EvaluationError(
            f"question {wrong.id} has {len(wrong.options)} options, its {wrong.scoring} prediction by {wrong.variant} "
            f"{len(wrong.logprobs)} log-probabilities; predict again"
        )
    there = np.arange(lengths.max(initial=1)) < lengths[:, None]
    scores = np.full(there.shape, -np.inf)
    scores[there] = np.concatenate([[], *table.logprobs])
    if per_token:
        scores[there] /= np.concatenate([[], *table.answer_tokens])
    likely = np.exp(scores - scores.max(axis=1, keepdims=True))
    likely /= likely.sum(axis=1, keepdims=True)
    return table.assign(
        choice=scores.argmax(axis=1),
        probabilities=pd.Series(np.split(likely[there], lengths.cumsum())[:-1], table.index, dtype=object),
    )


def _read(row) -> int:
    choice = answer_parser.parse(row.text, list(row.options), templates.TEMPLATES[row.template])
    return -1 if choice is None else choice


def measure_accuracy(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Accuracy, unparsed and abstained rate per variant, source and scoring (and study and condition), with n.

    ci_low, ci_high: Wilson, as if questions were independent. ci_low_clustered, ci_high_clustered: bootstrap over
    groups of near-duplicates, two right and two wrong answers imagined beside them.
    """
    keys = [*(name for name in STUDY if name in judged), "variant", "source", "scoring"]
    judged = judged.assign(unparsed=judged.choice == -1, abstained=judged.choice == answer_parser.ABSTAINED)
    by_key = judged.groupby(keys, sort=False, dropna=False)
    judged = judged.assign(place=by_key.ngroup())
    names = {"accuracy": "correct", "unparsed_rate": "unparsed", "abstained_rate": "abstained"}
    table = by_key.agg(n=("correct", "size"), **{name: (column, "mean") for name, column in names.items()})
    rights = by_key.correct.sum()
    plain = np.array([wilson(int(right), n, confidence) for right, n in zip(rights, table.n, strict=True)])
    clustered = np.empty((len(table), 2))
    for _, answers in judged.groupby(["source", "scoring"], sort=False):
        right, groups = _by_question(answers, "place")
        low, high = mean_intervals(right.to_numpy(), groups, confidence, imagined=(0, 0, 1, 1))
        clustered[right.columns] = np.column_stack([low, high])
    table = table.assign(ci_low=plain[:, 0], ci_high=plain[:, 1])
    table = table.assign(ci_low_clustered=clustered[:, 0], ci_high_clustered=clustered[:, 1]).reset_index()
    first = [*keys, "accuracy", "ci_low", "ci_high", "n"]
    return table[[*first, "ci_low_clustered", "ci_high_clustered", "unparsed_rate", "abstained_rate"]]


def _by_question(answers: pd.DataFrame, column: str) -> tuple[pd.DataFrame, np.ndarray]:
    """1 (right) or 0 per question and value of `column`, NaN where there is no answer; and each question's group.

    Rows stand in the order of the ids: resampling does not depend on the order of the answers.
    """
    if answers.duplicated(["id", column]).any():
        raise EvaluationError("one variant answered a question twice: compare one condition of one study at a time")
    rows, ids = pd.factorize(answers.id, sort=True)
    columns, names = pd.factorize(answers[column])
    right = np.full((len(ids), len(names)), np.nan)
    right[rows, columns] = answers.correct
    groups = np.empty(len(ids), object)
    groups[rows] = answers.group
    return pd.DataFrame(right, ids, names), groups


def chance(questions: pd.DataFrame) -> float:
    """Expected accuracy of a uniform guess over each question's own options."""
    return float(np.mean([1 / len(options) for options in questions.options]))


def compare_steps(
    judged: pd.DataFrame, confidence: float, power: float, margin: float, steps: Sequence[tuple] = STEPS
) -> pd.DataFrame:
    """Every step whose two variants are there, on every source and scoring, paired by question: one family.

    Columns: variant, baseline, question, source, scoring; those of `statistics.paired_difference`; ci_low_clustered and
    ci_high_clustered (bootstrap over groups, one gained and one lost question imagined beside them); those of
    `statistics.verdicts`.
    """
    rows = []
    for (source, scoring), answers in judged.groupby(["source", "scoring"], sort=False):
        right, groups = _by_question(answers, "variant")
        found, differences = [], []
        for variant, baseline, question in steps:
            both = right[[variant, baseline]].notna().all(axis=1) if {variant, baseline} <= set(right) else pd.Series()
            if both.any():
                ours, theirs, asked = right[variant][both], right[baseline][both], groups[both]
                named = {"variant": variant, "baseline": baseline, "question": question}
                named |= {"source": source, "scoring": scoring}
                found.append(named | paired_difference(ours, theirs, confidence, power, asked))
                differences.append(right[variant] - right[baseline])
        if found:
            low, high = mean_intervals(np.column_stack(differences), groups, confidence, imagined=(-1, 1))
            rows.append(pd.DataFrame(found).assign(ci_low_clustered=low, ci_high_clustered=high))
    if not rows:
        raise EvaluationError(f"no step of the method has both of its variants among {sorted(set(judged.variant))}")
    return verdicts(pd.concat(rows, ignore_index=True), confidence, margin)


def find_flips(judged: pd.DataFrame, steps: Sequence[tuple] = STEPS) -> pd.DataFrame:
    """Questions whose verdict changed over a step: id, source, scoring, baseline → variant, gained or lost."""
    keys = ["id", "source", "scoring"]
    answers = {variant: table for variant, table in judged[["variant", *keys, "choice", "correct"]].groupby("variant")}
    none, rows = judged.iloc[:0][[*keys, "choice", "correct"]], []
    for variant, baseline, _ in steps:
        pair = answers.get(baseline, none).merge(answers.get(variant, none), on=keys, suffixes=("_before", "_after"))
        pair = pair[pair.correct_before != pair.correct_after]
        rows.append(
            pair.assign(variant=variant, baseline=baseline, flip=np.where(pair.correct_after, "gained", "lost"))
        )
    table = pd.concat(rows, ignore_index=True)
    return table[["variant", "baseline", "source", "scoring", "id", "choice_before", "choice_after", "flip"]]
