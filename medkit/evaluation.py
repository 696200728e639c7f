"""Predictions → claims: accuracy with intervals, paired comparisons, and what could not have been seen.

numpy, scipy and statsmodels only. Predictions keep raw text and log-probabilities; choices are read from them here, so
a better parser needs no GPU. Unparsed counts as wrong, and is reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from medkit import parsing, prompts

# each step of the method: the variant it makes, the variant it starts from, and the question it answers
STEPS = [
    ("teacher", "teacher_base", "Does correcting the teacher teach it?"),
    ("base", "teacher", "What does cutting layers cost?"),
    ("student_ce", "base", "Does training on answers bring it back?"),
    ("student_kd", "student_ce", "Does the teacher's distribution add to the answers?"),
    ("lora", "student_kd", "Does LoRA add to distillation?"),
    ("nf4", "lora", "What does NF4 cost?"),
    ("edge", "lora", "What does the edge file cost?"),
    ("nf4", "teacher_base", "Is the small model better than the large one as it came?"),
]


class EvaluationError(ValueError):
    """Predictions that cannot be compared."""


def judge(predictions: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """One row per variant, scoring and question: the choice, whether it is right, and the question's `clean` flag.

    A choice is an option's index, −1 (unparsed) or `parsing.ABSTAINED`; a clean question resembles none learned from.

    Scored options give two readings: `option_text` takes the highest summed log-probability, `option_text_norm` the
    highest mean per token. Generated text goes through `parsing.parse`.
    """
    known = questions[["id", "source", "kind", "options", "answer", "clean"]]
    table = predictions.merge(known, on="id", validate="many_to_one")
    if len(table) < len(predictions):
        raise EvaluationError(f"{len(predictions) - len(table)} predictions are for questions this run does not have")
    judged = [table[table.scoring == "letter"].pipe(_chosen, lambda row: np.argmax(row.logprobs))]
    texts = table[table.scoring == "option_text"]
    judged.append(_chosen(texts, lambda row: np.argmax(row.logprobs)))
    norm = _chosen(texts, lambda row: np.argmax(np.divide(row.logprobs, row.answer_tokens)))
    judged.append(norm.assign(scoring="option_text_norm"))
    judged.append(_chosen(table[table.scoring == "generated"], _read))
    columns = ["variant", "source", "scoring", "id", "choice", "answer", "clean"]
    result = pd.concat(judged, ignore_index=True)[columns]
    return result.assign(correct=result.choice == result.answer)


def _chosen(table: pd.DataFrame, choose) -> pd.DataFrame:
    return table.assign(choice=[int(choose(row)) for row in table.itertuples()])


def _read(row) -> int:
    choice = parsing.parse(row.text, list(row.options), prompts.TEMPLATES[row.template])
    return -1 if choice is None else choice


def wilson(successes: int, n: int, confidence: float) -> tuple[float, float]:
    """Wilson score interval of a proportion; keeps its coverage at small n and near 0 and 1."""
    low, high = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)  # exact where rounding leaves dust


def accuracy(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Accuracy, unparsed and abstained rate per variant, source and scoring, with n and the accuracy's interval."""
    rows = []
    for key, group in judged.groupby(["variant", "source", "scoring"], sort=False):
        low, high = wilson(int(group.correct.sum()), len(group), confidence)
        silent = [(group.choice == code).mean() for code in (-1, parsing.ABSTAINED)]
        rows.append((*key, group.correct.mean(), low, high, len(group), *silent))
    names = ["variant", "source", "scoring", "accuracy", "ci_low", "ci_high", "n", "unparsed_rate", "abstained_rate"]
    return pd.DataFrame(rows, columns=names)


def chance(questions: pd.DataFrame) -> float:
    """Expected accuracy of a uniform guess over each question's own options."""
    return float(np.mean([1 / len(options) for options in questions.options]))


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool], confidence: float, power: float) -> dict:
    """ours − theirs on the same questions: difference, interval, exact McNemar p, flips, minimum detectable effect.

    Interval: Wald with one pseudo-observation per discordant cell (Bonett & Price 2012), which holds its coverage at
    small n. mde: the difference found with `power` at this n if as many answers flip as did here,
    (z₁₋α/₂ + z_power)·√(discordant rate / n), the rate with the same pseudo-observations.
    """
    ours, theirs = np.asarray(ours, bool), np.asarray(theirs, bool)
    if ours.shape != theirs.shape or not len(ours):
        raise EvaluationError(f"paired answers must be of the same questions: {len(ours)} and {len(theirs)}")
    n, gained, lost = len(ours), int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    z = stats.norm.ppf(0.5 + confidence / 2)
    half = z * np.sqrt((up + down - (up - down) ** 2) / (n + 2))
    mde = (z + stats.norm.ppf(power)) * np.sqrt((up + down) / n)
    p_value = mcnemar([[0, gained], [lost, 0]], exact=True).pvalue if gained + lost else 1.0
    return {
        "difference": (gained - lost) / n,
        "ci_low": max(-1.0, up - down - half),
        "ci_high": min(1.0, up - down + half),
        "n": n,
        "gained": gained,
        "lost": lost,
        "p_value": float(p_value),
        "mde": min(1.0, float(mde)),
    }


def compare_steps(judged: pd.DataFrame, confidence: float, power: float) -> pd.DataFrame:
    """Every step of the method on every source and scoring, paired by question, Holm over all of them.

    verdict: better or worse if the Holm-adjusted p is below 1 − confidence, else not detectable.
    """
    rows = []
    present = set(judged.variant)
    for (source, scoring), group in judged.groupby(["source", "scoring"], sort=False):
        wide = group.pivot(index="id", columns="variant", values="correct")
        for variant, baseline, question in STEPS:
            if {variant, baseline} <= present & set(wide.columns):
                pair = wide[[variant, baseline]].dropna()
                found = paired_difference(pair[variant], pair[baseline], confidence, power)
                rows.append(
                    {
                        "variant": variant,
                        "baseline": baseline,
                        "question": question,
                        "source": source,
                        "scoring": scoring,
                        **found,
                    }
                )
    if not rows:
        raise EvaluationError(f"no step of the method has both of its variants among {sorted(present)}")
    table = pd.DataFrame(rows)
    table["p_holm"] = multipletests(table.p_value, method="holm")[1]
    detected = table.p_holm < 1 - confidence
    table["verdict"] = np.where(detected, np.where(table.difference > 0, "better", "worse"), "not detectable")
    return table


def find_flips(judged: pd.DataFrame) -> pd.DataFrame:
    """Questions whose verdict changed over a step: id, source, scoring, baseline → variant, gained or lost."""
    rows = []
    for variant, baseline, _ in STEPS:
        pair = judged[judged.variant == baseline].merge(
            judged[judged.variant == variant], on=["id", "source", "scoring"], suffixes=("_before", "_after")
        )
        pair = pair[pair.correct_before != pair.correct_after]
        rows.append(
            pair.assign(variant=variant, baseline=baseline, flip=np.where(pair.correct_after, "gained", "lost"))
        )
    table = pd.concat(rows, ignore_index=True)
    return table[["variant", "baseline", "source", "scoring", "id", "choice_before", "choice_after", "flip"]]


def median_interval(values: Sequence[float], confidence: float, seed: int = 0) -> tuple[float, float, float]:
    """Median of repeated timings and its bootstrap percentile interval; with one repeat the interval is that value."""
    values = np.asarray(values, float)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.median(values)), float(values.min()), float(values.max())
    found = stats.bootstrap(
        (values,), np.median, confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(np.median(values)), float(found.low), float(found.high)
