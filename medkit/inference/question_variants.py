"""The robustness studies: the same questions with other orders of options, drug names, templates, or with examples.

Each function returns rows for `inference.predict`: question rows with `scoring`, the name of the `study`, the
`condition` within it, and `template`, `shots` and `order` where they differ from the plain question.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pandas as pd

from medkit.data.near_duplicates import group_near_duplicates
from medkit.modeling.embeddings import nearest
from medkit.prompts import templates as prompts
from medkit.stage import MedkitError

ORIGINAL, SWAPPED = "original", "swapped"
TEMPLATES = ("text", "letter", "abstain", "rationale")  # ways to put a multiple choice
SCORINGS = ("letter", "option_text", "generated")  # ways to read the answer; option_text gives its mean per token too


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
        raise MedkitError(f"inference.studies.swap_pairs is {count}, there are {len(drug_pairs)} pairs; lower it")
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


def template_grid(
    asked: pd.DataFrame, templates: Sequence[str] = TEMPLATES, scorings: Sequence[str] = SCORINGS
) -> pd.DataFrame:
    """Every question under every template, scored in every way; condition: the template's name.

    A letter cannot be asked for where none is shown: those cells stay empty. Letters and option texts after the same
    prompt cost one reading of it. The scoring of `asked` is of no account.
    """
    rows = []
    for row in asked.drop_duplicates("id").to_dict("records"):
        for name, scoring in itertools.product(templates, scorings):
            if scoring != "letter" or prompts.TEMPLATES[name].lists_options:
                rows.append({**row, "scoring": scoring, "study": "ablation", "condition": name, "template": name})
    return pd.DataFrame(rows)


def ensemble(
    asked: pd.DataFrame,
    training: pd.DataFrame,
    asked_vectors: np.ndarray,
    training_vectors: np.ndarray,
    shots: int,
    orders: int,
    seed: int,
    similar: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Medprompt's upper line (arXiv 2311.16452): nearest solved questions first, options in several orders.

    `asked_vectors` and `training_vectors` hold a unit vector per row. Every question is asked plainly (condition
    `shots=0 order=…`), then behind its `shots` nearest training rows of the same kind, nearest last, under every order;
    one order where options are not shown. `similar` (columns id_test, id_train) are pairs that `contamination` found:
    like rows of the question's own group they are no examples for it.

    Raises MedkitError for training rows of the test split, and for a kind with fewer than `shots` examples.
    """
    if (training.split == "test").any():
        raise MedkitError("a test question must not be an example: give rows of the split train alone")
    found = _neighbours(asked, training, asked_vectors, training_vectors, shots, similar)
    solved = training.to_dict("records")
    rows = []
    for row, near in zip(asked.to_dict("records"), found, strict=True):
        listed = prompts.pick_template(row["kind"], row["scoring"]).lists_options
        ways = option_orders(row, orders if listed else 1, seed)
        examples = [solved[i] for i in near[::-1]]
        cells = [(0, ways[0]), *((shots, order) for order in ways)]
        for count, order in cells if shots else cells[1:]:
            condition = f"shots={count} {order_label(order)}"
            more = {"condition": condition, "order": order, "shots": examples if count else []}
            rows.append({**row, "study": "ensemble", **more})
    return pd.DataFrame(rows)


def _neighbours(
    asked: pd.DataFrame, training: pd.DataFrame, queries: np.ndarray, corpus: np.ndarray, shots: int, similar
) -> np.ndarray:
    """Row numbers (Q, shots) of the training rows that may stand before each question, nearest first."""
    if not shots:
        return np.empty((len(asked), 0), int)
    allowed = (training.answer >= 0).to_numpy() & (asked.kind.to_numpy()[:, None] == training.kind.to_numpy())
    allowed &= asked.group.to_numpy()[:, None] != training.group.to_numpy()
    rows = {name: number for number, name in enumerate(training.id)}
    banned = {} if similar is None else similar.groupby("id_test").id_train.agg(list).to_dict()
    for number, name in enumerate(asked.id):
        allowed[number, [rows[i] for i in banned.get(name, ()) if i in rows]] = False
    few = allowed.sum(axis=1) < shots
    if few.any():
        first = asked[few].iloc[0]
        raise MedkitError(
            f"inference.studies.ensemble.shots is {shots}, but of the kind {first.kind!r} the split train has only "
            f"{allowed[few].sum(axis=1)[0]} examples for {first.id}; lower it, or leave out {first.source}"
        )
    return nearest(queries, corpus, shots, allowed)[0]
