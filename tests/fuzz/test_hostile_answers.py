"""Generated answers, and chat templates."""

import json

import numpy as np
import pandas as pd
from hostile import assert_promise, changed, tries
from hypothesis import example, given
from hypothesis import strategies as st

from medkit.evaluation import records
from medkit.prompts import answer_parser, templates, thinking

PATIENT = {"age": 43, "sex": "male", "complaint": "rash", "duration": "2 weeks", "drug": "aspirin", "dose": "100 mg"}
PATIENT |= {"allergy": None, "denies": "fever"}
FORM_B = {"band": "40-49", "sx": "m", "cc": "rash", "days": 14, "rx": "aspirin", "g": 0.1, "alg": None, "stop": None}
DIALOGUE = "D: What brings you here?\nP: I am 43, a rash, aspirin 100 mg, no fever."
PARTS = [
    *("The answer is ", "answer: ", "A", "B. ", "(C)", "final answer: ", r"\boxed{", "}", r"\text{", "not ", "if "),
    *("or ", " is correct", " is wrong", ". ", "\n", ", ", "**", "`", "# ", "<think>", "</think>", "[THINK]"),
    *("[/THINK]", "<|channel|>analysis", "<|channel|>final<|message|>", "assistantfinal", "<unused94>", "</s>"),
    *("<|im_end|>", "## Final Response\n", "analysis", "metformin", "Metformin 500 mg", "İ", "ß", "\u200b", "\0"),
    *("\ud800", "Ａ", "ⓐ", "é" * 50, "x" * 500, "{", '{"age": 1}', json.dumps(PATIENT), "9" * 400, "NaN", "```json\n"),
]  # fmt: skip
OPTIONS = ["metformin", "Metformin 500 mg", "A", "yes", "no", "", " ", "İ", "\ud800", "(", "a|b", "9", "not pure"]
ANSWERS = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)


@tries(60, 5000)
@given(text=ANSWERS, options=st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=12))
def test_a_choice(text, options):
    for template in (templates.TEXT, templates.LETTER, templates.ABSTRACT):
        choice = assert_promise(int | None, answer_parser.parse, text, options, template)
        assert choice is None or 0 <= choice < len(options)
    assert assert_promise(str, thinking.after_thoughts, text) in text


def score(text: str) -> None:
    """Every table of records that notebook 06 makes of an answer."""
    rows = pd.DataFrame({"id": ["r0", "r1"]})
    questions = rows.assign(source="records", group="g", kind="record", question=DIALOGUE)
    questions["options"] = [[json.dumps(PATIENT)]] * 2
    answers = rows.assign(variant="edge", source="records", text=text)
    scores = assert_promise(pd.DataFrame, records.score_records, answers.drop(columns="source"), questions)
    measured = assert_promise(pd.DataFrame, records.measure_records, scores, 0.95)
    shares = measured[measured.metric != "tokens"].value.dropna()
    assert shares.between(0, 1).all() and np.isfinite(shares).all()
    dialogues = rows.assign(dialogue=DIALOGUE, section_header="ALLERGY", section_text="none")
    assert_promise(pd.DataFrame, records.score_dialogues, answers, dialogues, "record", 0.95, {"allergy": "ALLERGY"})


@tries(20, 750)
@given(text=changed([PATIENT, FORM_B]).map(lambda tree: json.dumps(tree, default=str)) | ANSWERS)
@example(text=json.dumps(PATIENT | {"age": 10**400}))
@example(text=json.dumps(PATIENT | {"dose": "nan"}))
def test_a_record(text):
    for schema in templates.FORMS.values():
        assert_promise(schema | None, answer_parser.parse_record, text, schema)
    score(text.encode(errors="replace").decode())  # a tokenizer decodes to no lone surrogates
