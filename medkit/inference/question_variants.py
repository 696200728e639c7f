"""Which variant answers which questions, in which order of the options, and the records of real dialogues."""

import random
from collections.abc import Sequence

import pandas as pd

from medkit.prompts import templates
from medkit.variants import FINAL, REASONERS

START = "base"
SECOND_FORM = (FINAL, "lora", "edge_lora")  # Variants that answer in the second hospital's form; no other learned it
STUDIED = (FINAL, "edge")  # Variants that are asked under several orders of the options
OF_DIALOGUES = ("teacher", FINAL)  # Variants that write records of real dialogues
MAX_CHARACTERS = 2000


def rows_for(variant: str, asked: pd.DataFrame, exams: pd.DataFrame, claims: Sequence[str], few: int) -> pd.DataFrame:
    """The questions of one variant: all of `asked` if it is one of `claims`, else the `few` first ones of each source.

    The start and the final student answer the `exams` too. Records of the second form are left out for all variants
    but those that start from it or have learned it. Students that learned reasons write them with the `template` that
    they were taught.
    """
    rows = asked if variant in claims else asked.groupby(["scoring", "source"], sort=False).head(few)
    rows = rows[(rows.kind != "record_b") | (variant in SECOND_FORM)]
    if variant in REASONERS:
        reasoned = (rows.scoring == "generated") & ~rows.kind.isin(templates.WRITTEN)
        rows = rows.assign(template=pd.Series(templates.RATIONALE.name, rows.index).where(reasoned))
    if variant in (START, FINAL):  # an exam may be among the questions too
        rows = pd.concat([rows, exams]).drop_duplicates(["id", "scoring"])
    return rows


def dialogue_rows(dialogues: pd.DataFrame, count: int | str) -> pd.DataFrame:
    """Rows for `predict`: real dialogues (`01_data/dialogues.parquet`), of which records of the first form are wanted.

    The first `count` ones, or "all", of at most MAX_CHARACTERS: what is longer, no variant has learned to read.
    """
    short = dialogues[dialogues.dialogue.str.len() <= MAX_CHARACTERS]
    rows = short if count == "all" else short.head(count)
    return rows[["id", "source"]].assign(
        question=rows.dialogue, kind="record", scoring="generated", context="", options=[[""]] * len(rows)
    )


def option_orders(question: dict, orders: int, seed: int) -> list[list[int]]:
    """Orders of a question's options, its own first: option `order[p]` is shown at place p.

    No option stands at one place twice (rows of a Latin square), so a model that always says one letter never gives the
    same option again. There are at most as many orders as options.
    """
    count = len(question["options"])
    ring = random.Random(f"{seed}:{question['id']}").sample(range(count), count)
    where = {option: step for step, option in enumerate(ring)}
    return [[ring[(where[p] + shift) % count] for p in range(count)] for shift in range(min(orders, count))]


def shuffled(asked: pd.DataFrame, orders: int, seed: int) -> pd.DataFrame:
    """Rows for `inference.predict`: the same questions under several orders of their options, in the column `order`."""
    rows = [{**row, "order": order} for row in asked.to_dict("records") for order in option_orders(row, orders, seed)]
    return pd.DataFrame(rows)
