"""Predictions → results: accuracy with intervals, paired comparisons, and whether a difference could be detected.

The choices are read from raw text and log-probabilities, so a better parser needs no new predictions. An answer that
cannot be parsed counts as wrong, and its share is reported.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from medkit.prompts import answer_parser, templates
from medkit.stage import MedkitError
from medkit.statistics import gap_closed, mean_intervals, paired_difference, verdicts
from medkit.variants import STEPS, VARIANTS

COMPRESSED = [(v.name, v.baseline, v.question) for v in VARIANTS.values() if (v.folder or "").startswith("04_")]
"""The steps that must lose nothing: each smaller model against the one that it was made from."""
STEP_COLUMNS = [
    *("variant", "baseline", "question", "source", "scoring", "accuracy", "accuracy_baseline"),
    *("difference", "ci_low", "ci_high", "n", "gained", "lost", "p_value", "p_holm", "verdict", "margin", "mde"),
    *("p_equivalence", "p_equivalence_holm", "within_margin", "n_needed"),
]


def judge(predictions: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """One row per variant, scoring and question: choice, whether it is right, and the question's `clean` and `group`.

    A choice is an option's index, or −1 (unparsed). `option_text` chooses the highest summed
    log-probability, `option_text_norm` the highest mean per token; predictions without `answer_tokens` have no such
    row. `probabilities`: softmax over the options of the scores that the choice was read from; None for generated text,
    which `answer_parser.parse` reads. The column `order` is copied where there is one. A clean question resembles no
    training question. Records and instructions have no row here: `records` judges them.
    """
    columns = questions[["id", "source", "options", "answer", "clean", "group"]]
    table = predictions.merge(columns, on="id", validate="many_to_one")
    if len(table) < len(predictions):
        raise MedkitError(f"{len(predictions) - len(table)} predictions are for questions this run does not have")
    if "kind" in questions:
        table = table[~table.id.isin(questions.id[questions.kind.isin(templates.WRITTEN)])]
    table["answer_tokens"] = table.answer_tokens if "answer_tokens" in table else None
    by_text = table[table.scoring == "option_text"]
    with_tokens = by_text[by_text.answer_tokens.notna()]
    generated = table[table.scoring == "generated"]
    choices = [
        answer_parser.parse(row.text, list(row.options), templates.TEMPLATES[row.template])
        for row in generated.itertuples()
    ]
    choices = np.array([-1 if choice is None else choice for choice in choices], int)
    judged = [
        _choose(table[table.scoring == "letter"]),
        _choose(by_text),
        _choose(with_tokens, per_token=True).assign(scoring="option_text_norm"),
        generated.assign(choice=choices, probabilities=None),
    ]
    columns = ["variant", "source", "scoring", "id", "group", "choice", "answer", "clean", "probabilities"]
    columns += ["order"] if "order" in table else []
    result = pd.concat([part[columns] for part in judged], ignore_index=True)
    return result.assign(correct=result.choice == result.answer)


def _choose(table: pd.DataFrame, per_token: bool = False) -> pd.DataFrame:
    """Adds choice and probabilities; rows of different length are padded with −inf to one array."""
    lengths = table.logprobs.map(len).to_numpy(int)
    if (lengths != table.options.map(len)).any():
        wrong = table[lengths != table.options.map(len)].iloc[0]
        raise MedkitError(
            f"question {wrong.id} has {len(wrong.options)} options, its {wrong.scoring} prediction by {wrong.variant} "
            f"{len(wrong.logprobs)} log-probabilities; predict again"
        )
    exists = np.arange(lengths.max(initial=1)) < lengths[:, None]
    scores = np.full(exists.shape, -np.inf)
    scores[exists] = np.concatenate([[], *table.logprobs])
    if per_token:
        scores[exists] /= np.concatenate([[], *table.answer_tokens])
    likelihood = np.exp(scores - scores.max(axis=1, keepdims=True))
    likelihood /= likelihood.sum(axis=1, keepdims=True)
    probabilities = np.split(likelihood[exists], lengths.cumsum())[:-1]
    return table.assign(choice=scores.argmax(axis=1), probabilities=pd.Series(probabilities, table.index, dtype=object))


def measure_accuracy(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Accuracy and unparsed rate per variant, source and scoring, with n.

    ci_low, ci_high: bootstrap over groups of near-duplicates, with two right and two wrong answers added. Questions of
    one group are not independent, so intervals like Wilson's would be too narrow.
    """
    keys = ["variant", "source", "scoring"]
    judged = judged.assign(unparsed=judged.choice == -1)
    by_key = judged.groupby(keys, sort=False)
    judged = judged.assign(row=by_key.ngroup())
    table = by_key.agg(n=("correct", "size"), accuracy=("correct", "mean"), unparsed_rate=("unparsed", "mean"))
    intervals = np.empty((len(table), 2))
    for _, answers in judged.groupby(["source", "scoring"], sort=False):
        right, groups = _by_question(answers, "row")
        low, high = mean_intervals(right.to_numpy(), groups, confidence, imagined=(0, 0, 1, 1))
        intervals[right.columns] = np.column_stack([low, high])
    table[["ci_low", "ci_high"]] = intervals
    return table.reset_index()[[*keys, "accuracy", "ci_low", "ci_high", "n", "unparsed_rate"]]


def _by_question(answers: pd.DataFrame, column: str) -> tuple[pd.DataFrame, np.ndarray]:
    """1 (right), 0 or NaN (no answer) per question and value of `column`; and each question's group.

    Rows are in the order of the ids, so that resampling does not depend on the order of the answers.
    """
    if answers.duplicated(["id", column]).any():
        raise MedkitError("a question has two answers of a variant: compare one order of the options at a time")
    right = answers.pivot(index="id", columns=column, values="correct").astype(float)
    return right, answers.groupby("id").group.first().to_numpy()


def chance(questions: pd.DataFrame) -> float:
    """Expected accuracy of a uniform guess over each question's own options."""
    return float(np.mean([1 / len(options) for options in questions.options]))


def compare_steps(
    judged: pd.DataFrame,
    confidence: float,
    power: float,
    margin: float | Mapping[str, float],
    steps: Sequence[tuple] = STEPS,
) -> pd.DataFrame:
    """Every step whose two variants are there, on every source and scoring, paired by question: one family of tests.

    `margin` may be one for each variant. Columns (STEP_COLUMNS): variant, baseline, question, source, scoring;
    accuracy and accuracy_baseline on the questions that both answered; those of `statistics.paired_difference` and
    `statistics.verdicts`; n_needed (`questions_needed`). Two variants that get nothing right are equal, but not shown
    to be equivalent. No such step: no row.
    """
    rows = []
    for (source, scoring), answers in judged.groupby(["source", "scoring"], sort=False):
        right, groups = _by_question(answers, "variant")
        for variant, baseline, question in steps:
            if not {variant, baseline} <= set(right):
                continue
            both = right[[variant, baseline]].notna().all(axis=1)
            if both.any():
                pair = paired_difference(right[variant][both], right[baseline][both], confidence, power, groups[both])
                names = {"variant": variant, "baseline": baseline, "question": question}
                names |= {"source": source, "scoring": scoring, "accuracy": right[variant][both].mean()}
                names |= {"accuracy_baseline": right[baseline][both].mean()}
                rows.append(names | pair | {"right": right[[variant, baseline]][both].to_numpy().sum()})
    if not rows:
        return pd.DataFrame(columns=STEP_COLUMNS)
    table = pd.DataFrame(rows)
    margins = table.variant.map(margin) if isinstance(margin, Mapping) else margin
    table = verdicts(table, confidence, margins)
    table.loc[table.right == 0, ["within_margin", "verdict"]] = False, "not detectable"
    table = table.drop(columns="right")
    return table.assign(n_needed=questions_needed(table, confidence, power))


def questions_needed(steps: pd.DataFrame, confidence: float, power: float) -> pd.Series:
    """Questions that would show equivalence with this power, before Holm, at the flips seen, if nothing was lost.

    The usual size of two one-sided tests of a paired difference (Chow, Shao & Wang 2008), times the design effect.
    """
    flips = (steps.gained + steps.lost + 2) / (steps.n + 2)  # with the pseudo-observations of `paired_difference`
    deviations = stats.norm.ppf(confidence) + stats.norm.ppf((1 + power) / 2)
    return np.ceil(steps.design_effect * flips * (deviations / steps.margin) ** 2).astype(int)


def measure_gaps(judged: pd.DataFrame, low: str, middle: str, high: str, confidence: float) -> pd.DataFrame:
    """How much of the gap between the variants low and high a third one closes; a row for each source and scoring.

    Columns variant (the third), baseline (low), source, scoring, value (share of the gap), and the other columns of
    `statistics.gap_closed`, on the questions that all three answered.
    """
    rows = []
    for (source, scoring), answers in judged.groupby(["source", "scoring"], sort=False):
        right, groups = _by_question(answers, "variant")
        if {low, middle, high} <= set(right):
            all_three = right[[low, middle, high]].notna().all(axis=1)
            scores = (right[name][all_three] for name in (low, middle, high))
            names = {"variant": middle, "baseline": low, "source": source, "scoring": scoring}
            rows.append(names | gap_closed(*scores, groups[all_three], confidence))
    return pd.DataFrame(rows).rename(columns={"share": "value"})


def find_flips(judged: pd.DataFrame, steps: Sequence[tuple] = STEPS) -> pd.DataFrame:
    """Questions whose verdict changed over a step: id, source, scoring, baseline → variant, gained or lost."""
    keys, rows = ["id", "source", "scoring"], []
    for variant, baseline, _ in steps:
        before, after = (judged[judged.variant == name][[*keys, "choice", "correct"]] for name in (baseline, variant))
        pair = before.merge(after, on=keys, suffixes=("_before", "_after"))
        pair = pair[pair.correct_before != pair.correct_after]
        flip = np.where(pair.correct_after, "gained", "lost")
        rows.append(pair.assign(variant=variant, baseline=baseline, flip=flip))
    columns = ["variant", "baseline", "source", "scoring", "id", "choice_before", "choice_after", "flip"]
    return pd.concat(rows, ignore_index=True)[columns]
