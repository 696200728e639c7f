"""The data card: every number in it can be counted again in the table."""

import json

import pandas as pd
import pytest

from medkit.data import data_card
from medkit.stage import DISCLAIMER


def test_counts_can_be_counted_again():
    rows = [
        ("medqa", "test", "g0", "medicine", ["a", "b", "c"], 0, 10, True),
        ("medqa", "test", "g1", "surgery", ["a", "b", "c"], 2, 20, False),
        ("medqa", "test", "g1", "surgery", ["a", "b", "c"], 2, 30, True),
        ("mine", "labelled", "g2", "", ["a", "b"], 1, 40, True),
        ("mine", "transfer", "g3", "", ["a", "b"], -1, 50, True),
        ("later", "transfer", "g4", "", ["a", "b"], -1, 60, True),
    ]
    columns = ["source", "split", "group", "subject", "options", "answer", "prompt_tokens", "clean"]
    table = pd.DataFrame(rows, columns=columns).assign(id=range(len(rows)), kind="choice")
    rejected = pd.DataFrame([("medqa", "empty question", 3)], columns=["source", "reason", "count"])
    contamination = pd.DataFrame([("mine", "medqa", "fuzzy", 1)], columns=["labelled", "test", "rule", "pairs"])
    card = json.loads(json.dumps(data_card.build_card(table, rejected, contamination)))
    by_split = [row[split] for row in card["sources"].values() for split in set(table.split)]
    assert (card["questions"], sum(by_split), card["groups"]) == (6, 6, 5)
    medqa = card["sources"]["medqa"]
    assert (medqa["test"], medqa["labelled"], medqa["groups"], medqa["subjects"]) == (3, 0, 2, 2)
    assert medqa["commonest_place"] == medqa["clean_test"] == pytest.approx(2 / 3)
    assert card["subjects"]["medqa"] == {"surgery": 2, "medicine": 1} and medqa["median_prompt_tokens"] == 20
    assert card["sources"]["mine"]["clean_test"] is None and card["sources"]["later"]["commonest_place"] is None
    assert card["disclaimer"] == DISCLAIMER
    assert card["rejected"] == [{"source": "medqa", "reason": "empty question", "count": 3}]
    assert card["contamination"][0]["pairs"] == 1


def test_a_table_whose_answers_are_taught_is_noted_on_the_card_and_one_with_held_out_groups_is_not():
    """65 drugs in 325 rows: split by row every drug of a test question is taught, split by drug none is."""
    drugs = [f"drug {number}" for number in range(65)] * 5
    table = pd.DataFrame({"source": "own", "kind": "choice", "answer": 1, "id": range(325), "group": drugs})
    table["options"] = [[f"no {drug} {number}", drug] for number, drug in enumerate(drugs)]
    table = table.assign(subject="", prompt_tokens=1, clean=True)
    by_row = table.assign(split=["test" if number % 4 == 0 else "labelled" for number in range(325)])
    by_drug = table.assign(split=["test" if int(drug[5:]) % 4 == 0 else "labelled" for drug in drugs])
    notes = [data_card.build_card(rows, table.head(0), table.head(0))["notes"] for rows in (by_row, by_drug)]
    assert notes[1] == []
    assert (
        "own: 100% of the right answers and 50% of the options" in notes[0][0] and "own with a `group`" in notes[0][0]
    )
