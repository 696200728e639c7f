"""Records are judged field by field: what is right, missing, invented, and how sure the rates are."""

import json

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel, ConfigDict

from medkit.evaluation.records import (
    compare_records,
    measure_records,
    occurs_in,
    score_dialogues,
    score_questions,
    score_records,
)
from medkit.prompts import templates


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")
    age: int | None
    drug: str | None
    dose: float | None
    allergy: str | None


DIALOGUE = "Doctor: You are 54? Patient: Yes. I take Lisinopril, 10 mg, and ibuprofen gives me hives."
GOLD = {"age": 54, "drug": "lisinopril", "dose": 10, "allergy": None}


@pytest.fixture(autouse=True)
def form(monkeypatch):
    monkeypatch.setattr(templates, "FORMS", {"record": Form}, raising=False)


def question(name="r0", group="g0", gold=GOLD):
    row = {"id": name, "source": "records", "group": group, "kind": "record", "question": DIALOGUE}
    return row | {"options": [json.dumps(gold)], "answer": 0}


def score(answer):
    text = answer if isinstance(answer, str) else json.dumps(answer)
    predictions = pd.DataFrame([{"variant": "lora", "id": "r0", "text": text, "answer_tokens": [31]}])
    return score_records(predictions, pd.DataFrame([question()])).set_index("field")


def test_equal_up_to_case_spaces_and_the_way_a_number_is_written():
    scores = score('{"age": 54, "drug": " LISINOPRIL ", "dose": 10.0, "allergy": null}')
    assert scores.correct.all() and scores.exact.all() and scores.valid.all()
    assert not scores.missing.any() and not scores.invented.any() and scores.tokens.eq(31).all()


WRONG = [
    ({"drug": None}, "drug", True, False),
    ({"drug": "ibuprofen"}, "drug", False, False),  # wrong, but the dialogue says it
    ({"drug": "lisino"}, "drug", False, True),  # a piece of a word is not in the dialogue
    ({"drug": "isinopril"}, "drug", False, True),
    ({"dose": 1}, "dose", False, True),  # 1 is not in "10"
    ({"dose": 54}, "dose", False, False),
    ({"allergy": "ibuprofen"}, "allergy", False, True),  # gold has none, whatever the dialogue says
]


def test_a_wrong_value_is_missing_invented_or_taken_from_the_wrong_place():
    for change, field, missing, invented in WRONG:
        scores = score(GOLD | change)
        assert scores.correct.to_dict() == {name: name != field for name in GOLD}
        assert scores.missing.to_dict() == {name: missing and name == field for name in GOLD}
        assert scores.invented.to_dict() == {name: invented and name == field for name in GOLD}
        assert scores.valid.all() and not scores.exact.any()


def test_an_answer_without_the_form_holds_no_values_and_gets_nothing_for_empty_fields():
    for text in ("no record", json.dumps({**GOLD, "more": 1}), json.dumps({**GOLD, "age": "old"})):
        scores = score(text)
        assert not scores.valid.any() and not scores.correct.any() and not scores.given.any()
        assert scores.missing.sum() == 3


def test_rates_are_those_counted_by_hand():
    scores = score(GOLD | {"drug": None, "allergy": "hives"}).reset_index()
    expected = {"field_f1": 2 * 2 / (3 + 3), "field_accuracy": 2 / 4, "exact": 0, "valid": 1, "invented": 1 / 3}
    table = measure_records(scores, 0.95).set_index("metric")
    assert table.value.to_dict() == pytest.approx(expected | {"missing": 1 / 3, "left_empty": 0, "tokens": 31})


def many(p_by_variant, n=200, seed=0):
    """Records of which a variant gets the drug right with its probability."""
    draw = np.random.default_rng(seed)
    questions = [question(f"r{i}", f"g{i // 2}") for i in range(n)]
    answers = [
        {"variant": name, "id": f"r{i}", "text": json.dumps(GOLD | {"drug": "lisinopril" if right else None})}
        for name, p in p_by_variant.items()
        for i, right in enumerate(draw.random(n) < p)
    ]
    return score_records(pd.DataFrame(answers), pd.DataFrame(questions))


def test_intervals_hold_the_value_have_a_width_and_are_those_of_the_binomial():
    table = measure_records(many({"lora": 1.0, "nf4": 0.7}), 0.95).dropna(subset="value").query("metric != 'tokens'")
    assert (table.ci_low <= table.value).all() and (table.value <= table.ci_high).all()
    assert (table.ci_low < table.ci_high).all() and set(table.n) == {200}
    exact = table.set_index(["variant", "metric"]).loc[("nf4", "exact")]
    assert exact.ci_high - exact.ci_low == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 200), rel=0.35)


def test_the_interval_of_an_f1_is_not_pulled_towards_one_half():
    table = measure_records(many({"lora": 0.7}, n=100), 0.95).set_index("metric")
    for metric in ("field_f1", "missing"):
        row = table.loc[metric]
        assert 0.6 < (row.ci_high - row.value) / (row.value - row.ci_low) < 1.6, metric


@pytest.mark.parametrize(
    ("value", "text", "found"),
    [("6 days", "It began six days ago", True), ("6 days", "sixteen days", False), ("200 mg", "200 milligrams", True)],
)
def test_a_number_may_be_spelled_out(value, text, found):
    assert occurs_in(value, text) == found


def test_a_rate_of_few_values_keeps_the_width_of_its_interval():
    questions = [question(f"r{i}", f"g{i}") for i in range(40)]
    texts = [json.dumps(GOLD), *["no record"] * 39]  # most resamples hold no value that could be invented
    answers = [{"variant": "lora", "id": f"r{i}", "text": text} for i, text in enumerate(texts)]
    table = measure_records(score_records(pd.DataFrame(answers), pd.DataFrame(questions)), 0.95)
    invented = table.set_index("metric").loc["invented"]
    assert invented.value == 0 and invented.ci_high > 0.5


def test_a_step_is_paired_by_field_and_the_number_of_fields_is_no_number_of_records():
    steps = [("nf4", "lora", "What does it cost?")]
    row = compare_records(many({"lora": 0.95, "nf4": 0.6}), 0.95, 0.8, 0.05, steps).iloc[0]
    assert row.n == 800 and row.verdict == "worse" and row.ci_high < 0
    same = compare_records(many({"lora": 1.0, "nf4": 1.0}), 0.95, 0.8, 0.05, steps).iloc[0]
    assert same.difference == 0 and same.verdict == "equivalent"


def test_predictions_without_a_record_give_empty_tables_with_the_usual_columns():
    none = score_records(pd.DataFrame({"variant": ["lora"], "id": ["x"], "text": [""]}), pd.DataFrame([question()]))
    one = score(GOLD).reset_index()
    both = pd.concat([one.assign(variant=variant) for variant in ("lora", "student_kd")])
    assert {*none} == {*one} and none.empty
    assert list(measure_records(none, 0.95)) == list(measure_records(one, 0.95))
    steps = [compare_records(scores, 0.95, 0.8, 0.1, [("lora", "student_kd", "?")]) for scores in (none, both)]
    assert steps[0].empty and {*steps[0]} <= {*steps[1]}


def test_real_dialogues_are_judged_by_what_stands_in_them_and_in_their_section():
    sections = [("MEDICATIONS", "Lisinopril 10 mg."), ("MEDICATIONS", "Metformin."), ("ALLERGY", "No known allergies.")]
    rows = [(f"d{n}", "mts", DIALOGUE, *section) for n, section in enumerate(sections)]
    dialogues = pd.DataFrame(rows, columns=["id", "source", "dialogue", "section_header", "section_text"])
    answers = [("lora", name, json.dumps(GOLD | {"age": 55})) for name in ("d0", "d1", "d2")]
    answers += [("nf4", name, "nothing") for name in ("d0", "d1", "d2")]
    sections = {"drug": "MEDICATIONS", "allergy": "ALLERGY"}
    answers = pd.DataFrame(answers, columns=["variant", "id", "text"])
    table = score_dialogues(answers, dialogues, "record", 0.95, sections).set_index(["variant", "metric"]).value
    by_hand = {"valid": 1, "grounded": 2 / 3, "drug_in_section": 1 / 2, "allergy_in_section": 1}
    assert table["lora"].to_dict() == pytest.approx(by_hand)
    assert table["nf4"].to_dict() == {"valid": 0, "drug_in_section": 0, "allergy_in_section": 0}


def test_a_question_s_score_is_its_right_option_or_the_field_f1_of_its_record():
    empty = dict.fromkeys(GOLD)
    choice = {"id": "q0", "source": "icd", "group": "q", "kind": "choice", "question": "?", "options": ["a", "b"]}
    rows = [question("r0"), question("r1", gold=empty), question("r2"), {**choice, "answer": 1}]
    questions = pd.DataFrame(rows).assign(clean=True)
    texts = {"r0": GOLD | {"dose": None, "drug": "aspirin"}, "r1": empty, "r2": "no record"}
    records = [{"id": name, "scoring": "generated", "text": json.dumps(answer)} for name, answer in texts.items()]
    asked = [*records, {"id": "q0", "scoring": "option_text", "logprobs": [-2.0, -1.0]}]
    scores = score_questions(pd.DataFrame(asked).assign(variant="lora", answer_tokens=None), questions)
    found = scores.set_index("id").score
    assert found.to_dict() == pytest.approx({"q0": 1.0, "r0": 2 * 1 / (2 + 3), "r1": 1.0, "r2": 0.0})
    assert list(scores) == ["variant", "source", "id", "group", "score"]
