"""The data card: every number in it can be counted again in the table."""

import json

import pandas as pd
import pytest

from medkit.data import data_card
from medkit.stage import DISCLAIMER


@pytest.fixture
def table():
    rows = [
        ("medqa", "test", "g0", "medicine", ["a", "b", "c"], 0, 10, True),
        ("medqa", "test", "g1", "surgery", ["a", "b", "c"], 2, 20, False),
        ("medqa", "test", "g1", "surgery", ["a", "b", "c"], 2, 30, True),
        ("mine", "labelled", "g2", "", ["a", "b"], 1, 40, True),
        ("mine", "transfer", "g3", "", ["a", "b"], -1, 50, True),
        ("later", "transfer", "g4", "", ["a", "b"], -1, 60, True),
    ]
    columns = ["source", "split", "group", "subject", "options", "answer", "prompt_tokens", "clean"]
    return pd.DataFrame(rows, columns=columns).assign(id=[f"q{i}" for i in range(len(rows))], kind="choice")


@pytest.fixture
def card(table):
    rejected = pd.DataFrame([("medqa", "empty question", 3)], columns=["source", "reason", "count"])
    contamination = pd.DataFrame([("mine", "medqa", "fuzzy", 1)], columns=["labelled", "test", "rule", "pairs"])
    return data_card.build_card(table, rejected, contamination)


def test_counts_can_be_counted_again(card, table):
    assert (
        card["questions"]
        == len(table)
        == sum(row[split] for row in card["sources"].values() for split in set(table.split))
    )
    assert card["groups"] == 5
    medqa = card["sources"]["medqa"]
    assert (medqa["test"], medqa["labelled"], medqa["groups"], medqa["subjects"]) == (3, 0, 2, 2)
    assert medqa["commonest_place"] == pytest.approx(2 / 3)
    assert medqa["clean_test"] == pytest.approx(2 / 3)
    assert card["subjects"]["medqa"] == {"surgery": 2, "medicine": 1}
    assert medqa["median_prompt_tokens"] == 20


def test_a_source_without_test_questions_or_answers_has_no_share(card):
    assert card["sources"]["mine"]["clean_test"] is None
    assert card["sources"]["later"]["commonest_place"] is None


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
    assert notes[0] == [*data_card.seen_notes(by_row).values()]
    assert "own: 100% of the right answers and 50% of the options" in notes[0][0] and "`group` column" in notes[0][0]


def test_the_card_is_plain_json_and_says_what_it_is_for(card):
    assert json.loads(json.dumps(card))["disclaimer"] == DISCLAIMER
    assert card["rejected"] == [{"source": "medqa", "reason": "empty question", "count": 3}]
    assert card["contamination"][0]["pairs"] == 1
