"""Probes become questions with two options; the safe share is read from log-probabilities; bad files are refused."""

import re

import numpy as np
import pandas as pd

from medkit import evaluation
from medkit.data.raw_questions import rejection_reason
from medkit.data.splits import COLUMNS
from medkit.prompts import templates
from medkit.stage import ROOT

PROBES = evaluation.load_probes()
QUESTIONS = evaluation.probe_questions(PROBES)
CATEGORIES = PROBES.category.value_counts()


def predict(choose_safe) -> pd.DataFrame:
    """Predictions of a model that gives its preferred option the higher log-probability."""
    chosen = [row["answer"] if choose_safe(row) else 1 - row["answer"] for row in QUESTIONS.to_dict("records")]
    logprobs = [[-2.0 if place == one else -8.0 for place in range(2)] for one in chosen]
    table = QUESTIONS[["id", "scoring", "template"]].assign(variant="lora", text="", logprobs=logprobs)
    return table.assign(answer_tokens=[[4, 4]] * len(table))


def test_every_probe_is_whole_and_the_document_states_them():
    assert PROBES.id.is_unique and len(CATEGORIES) == 6
    assert PROBES.map(str.strip).ne("").all(axis=None) and (PROBES.safe_example != PROBES.unsafe_example).all()
    document = (ROOT / "docs" / "safety.md").read_text()
    stated = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", document, re.M))
    assert stated == {name: str(n) for name, n in CATEGORIES.items()}
    assert f"{len(PROBES)} questions in six categories" in document
    assert set(re.findall(r"\d+ \| \"(.*?)\" \|", document)) <= set(PROBES.prompt)
    longer = (PROBES.safe_example.str.len() > PROBES.unsafe_example.str.len()).sum()
    assert f"{longer} of {len(PROBES)} safe answers" in document


def test_a_probe_is_a_question_whose_answer_is_the_safe_option():
    assert set(COLUMNS) <= set(QUESTIONS) and QUESTIONS.clean.all()
    for probe, row in zip(PROBES.to_dict("records"), QUESTIONS.to_dict("records"), strict=True):
        assert row["options"][row["answer"]] == probe["safe_example"]
        assert row["options"][1 - row["answer"]] == probe["unsafe_example"]
        record = {name: row[name] for name in ("question", "context", "options", "answer", "subject", "kind", "group")}
        assert rejection_reason({**record, "pool": "test"}) is None
        messages = templates.render(row, templates.TEMPLATES[row["template"]])
        assert messages[-1]["content"] == f"{probe['prompt']}\n\n{templates.OPEN_BASE}"


def test_the_place_of_the_safe_option_says_nothing_and_does_not_depend_on_the_sample():
    assert 0.4 < QUESTIONS.answer.mean() < 0.6
    for n in (1, 6, 100):
        sample = evaluation.load_probes(n, seed=3)
        assert sample.category.value_counts().to_dict() == CATEGORIES.clip(upper=n).to_dict()
        pd.testing.assert_frame_equal(sample, evaluation.load_probes(n, seed=3))
        part = evaluation.probe_questions(sample)
        assert part.answer.tolist() == QUESTIONS.set_index("id").answer[part.id].tolist()


def test_the_safe_share_of_models_with_a_fixed_preference():
    def shorter(row):
        lengths = [len(option) for option in row["options"]]
        return lengths[row["answer"]] < lengths[1 - row["answer"]]

    for choose_safe in (lambda row: True, lambda row: False, shorter):
        table = evaluation.safe_shares(predict(choose_safe), QUESTIONS, 0.95)
        assert set(table.category) == {"all", *CATEGORIES.index}
        assert set(table.scoring) == {"option_text", "option_text_norm"}
        np.testing.assert_allclose(table.value, table.shorter if choose_safe is shorter else choose_safe(None))
        assert table.ci_low.le(table.value).all() and table.ci_high.ge(table.value).all()
        assert table[table.category == "all"].n.eq(len(PROBES)).all() and (table.chance == 0.5).all()
