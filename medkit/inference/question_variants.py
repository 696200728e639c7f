"""Which variant answers which questions, and two robustness studies: other orders of options, other drug names.

The studies return rows for `inference.predict`: question rows with `scoring`, the name of the `study`, the `condition`
within it, and `order` where it differs from the question's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from medkit.data.near_duplicates import group_near_duplicates
from medkit.prompts import templates as prompts
from medkit.stage import MedkitError
from medkit.variants import FINAL

START = "base"
SECOND_FORM = (FINAL, "lora")
"""Variants that answer in the second hospital's form; no other one has learned it."""
STUDIED = (FINAL, "edge")
"""Variants that the robustness studies and the timings are made on."""
ORIGINAL, SWAPPED = "original", "swapped"


def rows_for(variant: str, asked: pd.DataFrame, exams: pd.DataFrame, claims: Sequence[str], few: int) -> pd.DataFrame:
    """The questions of one variant: all of `asked` if it is one of `claims`, else the `few` first ones of each source.

    The start and the final student answer the `exams` too. Records of the second form are left out for all variants
    but those that start from it or have learned it.
    """
    rows = asked if variant in claims else asked.groupby(["scoring", "source"], sort=False).head(few)
    rows = rows[(rows.kind != "record_b") | (variant in SECOND_FORM)]
    return pd.concat([rows, exams]) if variant in (START, FINAL) else rows


def option_orders(question: dict, orders: int, seed: int) -> list[list[int]]:
    """Orders of a question's options, its own first: option `order[p]` is shown at place p.

    No option stands at one place twice (rows of a Latin square), so a model that always says one letter never gives the
    same option again. There are at most as many orders as options.
    """
    count = len(question["options"])
    ring = random.Random(f"{seed}:{question['id']}").sample(range(count), count)
    where = {option: step for step, option in enumerate(ring)}
    return [[ring[(where[p] + shift) % count] for p in range(count)] for shift in range(min(orders, count))]


def order_label(order: Sequence[int]) -> str:
    """`order=2031`: how a `condition` tells an order. An index is one digit: a question has ten options at most."""
    return "order=" + "".join(map(str, order))


def shuffled(asked: pd.DataFrame, orders: int, seed: int) -> pd.DataFrame:
    """The same questions under several orders of their options; condition: `order_label`.

    Raises MedkitError for a way of asking that does not show the options: their order could not matter.
    """
    rows = []
    for row in asked.to_dict("records"):
        template = prompts.pick_template(row["kind"], row["scoring"])
        if not template.lists_options:
            raise MedkitError(f"{row['scoring']} shows no options, so their order cannot matter: ask by letter")
        for order in option_orders(row, orders, seed):
            rows.append({**row, "study": "shuffle", "condition": order_label(order), "order": order})
    return pd.DataFrame(rows)


def swapped(drug_pairs: pd.DataFrame, count: int | str, seed: int) -> pd.DataFrame:
    """Exam questions under two names of their drugs, by option text: one id, conditions `original` and `swapped`.

    Raises MedkitError for more pairs than there are.
    """
    count = len(drug_pairs) if count == "all" else count
    if count > len(drug_pairs):
        raise MedkitError(f"inference.swap_pairs is {count}, there are {len(drug_pairs)} pairs; lower it")
    pairs = drug_pairs.sample(frac=1, random_state=seed).head(count)
    plain = pairs[["id", "question", "options", "answer"]].assign(condition=ORIGINAL)
    renamed = pairs[["id", "question_swapped", "options_swapped", "answer"]].assign(condition=SWAPPED)
    renamed = renamed.rename(columns={"question_swapped": "question", "options_swapped": "options"})
    both = pd.concat([plain, renamed], ignore_index=True)
    return both.assign(source="drug_pairs", kind="choice", context="", scoring="option_text", study="swap")


def pair_questions(drug_pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs as rows that `evaluation.judge` reads. Clean: notebook 1 lets nothing be learned that resembles one."""
    groups = pd.Series(group_near_duplicates(drug_pairs.question), drug_pairs.index).astype(str)
    known = drug_pairs[["id", "options", "answer"]].assign(group="drug_pairs:" + groups)
    return known.assign(source="drug_pairs", split="test", kind="choice", clean=True)
