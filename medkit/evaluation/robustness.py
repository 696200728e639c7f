"""Robustness: how far an answer depends on the order of the options, from judged answers to `inference.shuffled`."""

import numpy as np
import pandas as pd

from medkit.prompts.templates import LETTERS
from medkit.statistics import share_interval

KEYS = ["variant", "source", "scoring"]


def shuffle_consistency(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Share of questions answered with the same option under every order, with an interval over groups.

    `by_chance`: the share expected of a model that does not read the options and picks letters as often as this one
    does. `accuracy`: mean over the orders; `orders`: the most that a question had. Answers that name no option (−1) are
    never consistent.
    """
    rows = []
    for key, group in judged.groupby(KEYS, sort=False):
        letters = [list(o).index(c) for o, c in zip(group.order, group.choice, strict=True) if c >= 0]
        frequency = np.bincount(letters, minlength=len(LETTERS)) / len(group)
        questions = group.groupby("id", sort=False)
        same = (questions.choice.nunique() == 1) & (questions.choice.min() >= 0)
        # argsort: the letter of each option, (orders, options); the same option under all orders: a product over orders
        letter_of = [np.argsort(np.stack(orders.tolist()), axis=1) for _, orders in questions.order]
        by_chance = np.mean([frequency[letter].prod(axis=0).sum() for letter in letter_of])
        more = {"by_chance": by_chance, "accuracy": questions.correct.mean().mean(), "orders": questions.size().max()}
        rows.append(dict(zip(KEYS, key, strict=True)) | _share(same, questions.group.first(), confidence) | more)
    return pd.DataFrame(rows)


def letter_bias(judged: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Accuracy by the letter of the right answer over all orders, and how often that letter was `chosen`.

    A question has each option at a letter at most once, so n counts questions.
    """
    table = judged.assign(
        letter=[LETTERS[list(o).index(a)] for o, a in zip(judged.order, judged.answer, strict=True)],
        chosen=[LETTERS[list(o).index(c)] if c >= 0 else "" for o, c in zip(judged.order, judged.choice, strict=True)],
    )
    rows = []
    for key, group in table.groupby(KEYS, sort=False):
        for letter, part in group.groupby("letter"):
            row = {"letter": letter, **_share(part.correct, part.group, confidence)}
            rows.append(dict(zip(KEYS, key, strict=True)) | row | {"chosen": (group.chosen == letter).mean()})
    return pd.DataFrame(rows)


def _share(flags: pd.Series, groups: pd.Series, confidence: float) -> dict:
    low, high = share_interval(flags, groups, confidence)
    return {"value": float(flags.mean()), "ci_low": low, "ci_high": high, "n": len(flags)}
