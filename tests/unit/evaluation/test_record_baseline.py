"""The regular expressions fill the first form from what the patient says of himself, now."""

import json

import pandas as pd
import pytest

from medkit.evaluation.record_baseline import fill_form, regex_baseline

DIALOGUE = """D: Good morning, Mrs. Lopez. What brings you in?
P: I think I have dry cough.
D: Since when?
P: About five days, sorry, three weeks. My last visit was six months ago.
D: How old are you?
P: I am 41. No, 43. My uncle is 80 and has gout.
D: Any medication?
P: I take zyflo, 10 mg. No, 25 mg. I used to take 600 mg of ketorolac.
D: Any allergies?
P: With bee stings I get hives.
D: Any fever or chills?
P: Yes to fever, no to chills."""
RECORD = {
    "age": 43, "sex": "female", "complaint": "dry cough", "duration": "3 weeks", "drug": "zyflo", "dose": "25 mg",
    "allergy": "bee stings", "denies": "chills",
}  # fmt: skip


def test_corrections_relatives_and_old_drugs_are_not_taken():
    assert fill_form(DIALOGUE) == RECORD


@pytest.mark.parametrize(
    ("line", "instead", "empty"),
    [
        ("I take zyflo, 10 mg. No, 25 mg. I used to take 600 mg of ketorolac.", "Nothing. I stopped zyflo.", "drug"),
        ("With bee stings I get hives.", "Not me, only my uncle, to bee stings.", "allergy"),
        ("Yes to fever, no to chills.", "", "denies"),
    ],
)
def test_what_is_not_said_is_empty(line, instead, empty):
    record = fill_form(DIALOGUE.replace(line, instead))
    assert record[empty] is None
    assert {name for name in RECORD if record[name] != RECORD[name]} <= {empty, "dose"}


def test_rows_are_those_of_a_model_and_other_kinds_are_left_out():
    questions = pd.DataFrame({"id": ["a", "b"], "kind": ["record", "record_b"], "question": [DIALOGUE, DIALOGUE]})
    rows = regex_baseline(questions)
    assert rows.id.tolist() == ["a"] and rows.variant.tolist() == ["regex"]
    assert json.loads(rows.text[0]) == RECORD


@pytest.mark.parametrize("text", ["", "no dialogue", "D: What?", "D: And?\nP: \nD: Any?"])
def test_any_text_gives_a_form(text):
    assert fill_form(text).keys() == RECORD.keys()
