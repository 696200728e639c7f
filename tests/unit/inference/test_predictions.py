"""Every way of asking scores and writes what the model does when it is asked that alone."""

import numpy as np
import pandas as pd
import pytest
from toys import plain_score

from medkit.inference import predictions, workloads
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.batches import letter_forms
from medkit.modeling.engine import Request
from medkit.params import load_params
from medkit.prompts import templates
from medkit.stage import ROOT, MedkitError, Stage

PAD = 0


@pytest.fixture(scope="module")
def scorer(make_llama):
    return make_llama(layers=2, initializer_range=0.2)


def letter_score(model, tokenizer, messages, letter):
    """Log-probability that the letter comes next, alone or after a space."""
    prompt = templates.encode(tokenizer, messages)[0]
    return np.logaddexp.reduce([plain_score(model, prompt, ids) for ids in letter_forms(tokenizer, letter)])


# --- the test questions --------------------------------------------------------------------------------------------


def test_the_same_questions_are_chosen_every_time(questions):
    wanted = {"option_text": {"exam": 1, "trial": "all"}, "letter": {"exam": "all"}}
    first, second = (predictions.choose_questions(questions, wanted, seed=3) for _ in range(2))
    assert first.equals(second)
    assert first.groupby(["scoring", "source"]).size().to_dict() == {
        ("letter", "exam"): 2, ("option_text", "exam"): 1, ("option_text", "trial"): 1
    }  # fmt: skip
    assert set(first.split) == {"test"}
    fewer, more = (predictions.choose_questions(questions, {"letter": {"exam": n}}, seed=0) for n in (1, 2))
    assert list(more.id)[:1] == list(fewer.id), "a larger number keeps the questions of the smaller"


def test_more_questions_than_there_are_is_an_error(questions):
    with pytest.raises(MedkitError, match="3 questions of exam by letter are asked for, the test split has 2"):
        predictions.choose_questions(questions, {"letter": {"exam": 3}}, seed=0)


@pytest.fixture
def asked(questions):
    wanted = {"option_text": {"exam": "all", "trial": "all"}, "letter": {"exam": "all"}, "generated": {"exam": "all"}}
    return predictions.choose_questions(questions, wanted, seed=0)


@pytest.mark.parametrize("chat", [True, False])
def test_each_row_is_what_the_model_says_when_asked_that_alone(scorer, make_tokenizer, asked, chat):
    tokenizer = make_tokenizer() if chat else make_tokenizer(chat_template=None)
    listed = asked[asked.id == "q0"].assign(scoring="option_text", template="letter")
    asked = pd.concat([asked, listed.head(1)], ignore_index=True)
    table = predictions.predict(scorer, tokenizer, asked, batch_tokens=300, max_new_tokens=5)
    assert table[["id", "scoring"]].to_numpy().tolist() == asked[["id", "scoring"]].to_numpy().tolist()
    assert list(table.template) == [*["text"] * 2, "abstract", *["letter"] * 2, *["text"] * 2, "letter"]
    engine = TorchEngine(scorer, PAD, scheduler="sequential", batch_tokens=300)
    for row, question in zip(table.itertuples(), asked.to_dict("records"), strict=True):
        template = templates.TEMPLATES[row.template]
        messages = templates.render(question, template)
        pairs = [templates.encode(tokenizer, messages, text) for text in question["options"]]
        if row.scoring != "letter" and not template.lists_options:
            assert workloads.encode_prompts(tokenizer, pd.DataFrame([question])) == [pairs[0][0]]
        if row.scoring == "generated":
            (written,) = engine.generate([Request(pairs[0][0], 5, (tokenizer.eos_token_id,))])
            assert row.text == tokenizer.decode(written.token_ids, skip_special_tokens=True)
            assert (row.logprobs, row.answer_tokens) == ([], [len(written.token_ids)])
            continue
        if row.scoring == "letter":
            expected = [letter_score(scorer, tokenizer, messages, letter) for letter in "ABCD"[: len(pairs)]]
            assert set(row.answer_tokens) == {1}
        else:
            expected = [plain_score(scorer, *pair) for pair in pairs]
            assert all(answer[-1] == tokenizer.eos_token_id for _, answer in pairs)
            assert row.answer_tokens == [len(answer) for _, answer in pairs]
        assert row.logprobs == pytest.approx(expected, abs=1e-4)


# --- other ways of asking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scoring_name", ["letter", "option_text"])
def test_scores_come_back_in_the_options_own_order(scorer, tokenizer, questions, scoring_name):
    """Shown as C, A, D, B by hand, or by `order`: the same prompt, so the same scores, put back in place."""
    plain = questions[questions.id == "q0"].assign(scoring=scoring_name, template="letter")
    order = [2, 0, 3, 1]
    by_hand = plain.assign(options=[[plain.options[0][i] for i in order]])
    asked = plain.assign(order=[order])
    (shown,), (found,) = (predictions.predict(scorer, tokenizer, rows, 300, 4).logprobs for rows in (by_hand, asked))
    assert [found[i] for i in order] == pytest.approx(shown, abs=1e-4)
    assert len({round(score, 3) for score in found}) == 4


def test_an_order_that_is_not_shown_changes_nothing(scorer, tokenizer, questions):
    rows = [questions[questions.id == "q0"].assign(order=[order]) for order in ([0, 1, 2, 3], [2, 0, 3, 1])]
    table = predictions.predict(scorer, tokenizer, pd.concat(rows).assign(scoring="option_text"), 300, 4)
    assert table.logprobs[0] == pytest.approx(table.logprobs[1], abs=1e-4)
    assert table.answer_tokens[0] == table.answer_tokens[1]


def test_a_question_that_is_asked_again_and_in_other_ways_has_the_same_answers(scorer, tokenizer, asked):
    texts = asked[asked.scoring == "letter"].assign(scoring="option_text", template="letter")
    plain = predictions.predict(scorer, tokenizer, asked, 300, 4)
    table = predictions.predict(scorer, tokenizer, pd.concat([asked, asked, texts], ignore_index=True), 300, 4)
    for rows in (table.iloc[: len(asked)], table.iloc[len(asked) : 2 * len(asked)]):
        assert rows.text.tolist() == plain.text.tolist()
        for one, other in zip(plain.logprobs, rows.logprobs, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_a_model_that_thinks_does_so_before_generated_answers_alone(scorer, tokenizer, thinker, asked):
    table = predictions.predict(scorer, thinker, asked, 300, 4, max_thinking_tokens=6)
    closed = predictions.predict(scorer, thinker, asked, 300, 4)
    generated = table.scoring == "generated"
    assert table[generated].thinking_tokens.between(1, 6 + 4).all() and not closed.thinking_tokens.any()
    assert table[generated].text.str.fullmatch("(?s)<think>\n.*\n</think>\n\n.*").all()
    pd.testing.assert_frame_equal(table[~generated], closed[~generated])
    plain = [predictions.predict(scorer, tokenizer, asked, 300, 4, max_thinking_tokens=most) for most in (6, None)]
    pd.testing.assert_frame_equal(*plain)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scoring": "generated", "order": [[1, 0, 2, 3]]}, "q0: a generated answer is read in the options' own order"),
        ({"scoring": "letter", "template": "text"}, "q0: the template 'text' shows no letters"),
    ],
)
def test_what_could_not_be_read_back_is_not_asked(scorer, tokenizer, questions, changes, said):
    with pytest.raises(MedkitError, match=said):
        predictions.predict(scorer, tokenizer, questions[questions.id == "q0"].assign(**changes), 300, 4)


def test_what_a_killed_notebook_had_asked_is_read_back_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("MEDKIT_FINGERPRINT", "of the cells")
    first, stage = Stage("toy", "01_data"), Stage("toy", "05_inference")
    tables = {
        "predictions": pd.DataFrame({"id": ["q0"], "logprobs": [[-1.0, -2.0]]}),
        "energy": pd.DataFrame({"n": [1]}),
    }
    asked = []

    def answers(**changes):
        params = load_params(ROOT / "params" / "smoke.yaml", changes)
        return predictions.answers_once(stage, "edge", params, lambda: asked.append(1) or tables)

    def change_rows():
        first.write_json("rows.json", len(asked))
        first.commit()

    cut_short = (stage.dir / "checkpoints" / "edge" / "energy.parquet").unlink
    changes = [lambda: None, change_rows, cut_short, lambda: monkeypatch.setenv("MEDKIT_FINGERPRINT", "of new cells")]
    for count, change in enumerate(changes, start=1):
        change()
        for _ in range(2):
            again = answers()
            assert set(again) == set(tables) and len(asked) == count
            assert again["predictions"].logprobs[0].tolist() == [-1.0, -2.0]
    answers(seed=5)
    assert len(asked) == len(changes) + 1
    monkeypatch.delenv("MEDKIT_FINGERPRINT")  # a person runs the notebook, and may have edited it
    for _ in range(2):
        answers(seed=5)
    assert len(asked) == len(changes) + 3
