"""Branches equal options scored alone, and every way of asking scores and writes what it says it does."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit.inference import predictions, workloads
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import option_scoring
from medkit.modeling.batches import letter_forms
from medkit.modeling.engine import Request
from medkit.modeling.option_scoring import Item
from medkit.prompts import templates
from medkit.stage import MedkitError

PAD, VOCAB = 0, 300
ids = st.integers(3, VOCAB - 1)
items = st.builds(
    Item,
    prompt_ids=st.lists(ids, min_size=1, max_size=12),
    answer_ids=st.lists(st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=4),
)


# --- scoring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorer(make_llama):
    return make_llama(layers=2, initializer_range=0.2)


@torch.no_grad()
def letter_score(model, tokenizer, messages, letter):
    """Log-probability that the letter comes next, alone or after a space."""
    prompt = templates.encode(tokenizer, messages)[0]
    return np.logaddexp.reduce([plain_score(model, prompt, ids) for ids in letter_forms(tokenizer, letter)])


def plain_score(model, prompt_ids, answer_ids):
    """log p(answer | prompt) from one full sequence, one token after the other."""
    logprobs = model(torch.tensor([[*prompt_ids, *answer_ids]])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(answer_ids))


@settings(max_examples=25, deadline=None)
@given(asked=st.lists(items, min_size=1, max_size=5), batch_tokens=st.integers(1, 120))
def test_branches_equal_plain_scoring_of_each_option(scorer, asked, batch_tokens):
    found = option_scoring.score_options(scorer, asked, batch_tokens, PAD)
    for item, scores in zip(asked, found, strict=True):
        expected = [plain_score(scorer, item.prompt_ids, answer) for answer in item.answer_ids]
        assert scores == pytest.approx(expected, abs=1e-4)


# --- the test questions --------------------------------------------------------------------------------------------


def test_the_same_questions_are_chosen_every_time(questions):
    wanted = {"option_text": {"exam": 1, "trial": "all"}, "letter": {"exam": "all"}}
    first, second = (predictions.choose_questions(questions, wanted, seed=3) for _ in range(2))
    assert first.equals(second)
    assert first.groupby(["scoring", "source"]).size().to_dict() == {
        ("letter", "exam"): 2, ("option_text", "exam"): 1, ("option_text", "trial"): 1
    }  # fmt: skip
    assert set(first.split) == {"test"}


def test_a_larger_number_keeps_the_questions_of_the_smaller(questions):
    def chosen(count):
        return list(predictions.choose_questions(questions, {"letter": {"exam": count}}, seed=0).id)

    assert chosen(2)[:1] == chosen(1)


def test_more_questions_than_there_are_is_an_error(questions):
    with pytest.raises(MedkitError, match=r"inference\.questions\.letter\.exam is 3, the test split has 2"):
        predictions.choose_questions(questions, {"letter": {"exam": 3}}, seed=0)
    with pytest.raises(MedkitError, match=r"inference\.studies\.ablation\.exam is 3"):
        predictions.choose_questions(questions, {"letter": {"exam": 3}}, seed=0, key="inference.studies.ablation")


@pytest.fixture
def asked(questions):
    wanted = {"option_text": {"exam": "all", "trial": "all"}, "letter": {"exam": "all"}, "generated": {"exam": "all"}}
    return predictions.choose_questions(questions, wanted, seed=0)


@pytest.mark.parametrize("chat", [True, False])
def test_predictions_are_one_row_per_question_and_scoring(scorer, make_tokenizer, asked, chat):
    tokenizer = make_tokenizer() if chat else make_tokenizer(chat_template=None)
    table = predictions.predict(scorer, tokenizer, asked, batch_tokens=300, max_new_tokens=5)
    assert list(table.columns) == ["id", "scoring", "template", "logprobs", "answer_tokens", "thinking_tokens", "text"]
    assert table[["id", "scoring"]].to_numpy().tolist() == asked[["id", "scoring"]].to_numpy().tolist()
    for row, question in zip(table.itertuples(), asked.itertuples(), strict=True):
        assert row.template == ("letter" if row.scoring == "letter" else "abstract" if row.id == "q2" else "text")
        options = 0 if row.scoring == "generated" else len(question.options)
        assert len(row.logprobs) == options
        assert len(row.answer_tokens) == (options or 1)
        assert row.answer_tokens[0] <= 5 or options
        assert all(score < 0 for score in row.logprobs)
        assert (row.text != "") <= (row.scoring == "generated")


@pytest.mark.parametrize("chat", [True, False])
def test_a_letter_is_one_token_and_a_text_ends(scorer, make_tokenizer, asked, chat):
    tokenizer = make_tokenizer() if chat else make_tokenizer(chat_template=None)
    table = predictions.predict(scorer, tokenizer, asked, batch_tokens=300, max_new_tokens=5)
    letters = table[table.scoring == "letter"]
    assert [set(tokens) for tokens in letters.answer_tokens] == [{1}, {1}]
    for row, question in zip(table.itertuples(), asked.to_dict("records"), strict=True):
        if row.scoring == "option_text":
            template = templates.TEMPLATES[row.template]
            pairs = [
                templates.encode(tokenizer, templates.render(question, template), text) for text in question["options"]
            ]
            assert all(answer[-1] == tokenizer.eos_token_id for _, answer in pairs)
            assert row.answer_tokens == [len(answer) for _, answer in pairs]
            assert row.logprobs == pytest.approx([plain_score(scorer, *pair) for pair in pairs], abs=1e-4)
            assert workloads.encode_prompts(tokenizer, pd.DataFrame([question])) == [pairs[0][0]]


def test_generated_predictions_are_the_sequential_answers(scorer, tokenizer, asked):
    asked = asked[asked.scoring == "generated"]
    table = predictions.predict(scorer, tokenizer, asked, batch_tokens=300, max_new_tokens=6)
    ends = (tokenizer.eos_token_id,)
    requests = [Request(ids, 6, ends) for ids in workloads.encode_prompts(tokenizer, asked)]
    said = TorchEngine(scorer, PAD, scheduler="sequential", batch_tokens=300).generate(requests)
    assert list(table.text) == [tokenizer.decode(s.token_ids, skip_special_tokens=True) for s in said]
    assert list(table.answer_tokens) == [[len(s.token_ids)] for s in said]


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
    rows = [questions[questions.id == "q0"].assign(order=[list(order)]) for order in itertools.permutations(range(4))]
    asked = pd.concat(rows, ignore_index=True).assign(scoring="option_text")
    table = predictions.predict(scorer, tokenizer, asked, 300, 4)
    assert all(list(found) == list(table.logprobs[0]) for found in table.logprobs)
    assert all(list(found) == list(table.answer_tokens[0]) for found in table.answer_tokens)


@pytest.mark.parametrize("chat", [True, False])
def test_a_listed_question_scores_its_letters_and_the_options_texts(scorer, make_tokenizer, questions, chat):
    tokenizer = make_tokenizer() if chat else make_tokenizer(chat_template=None)
    question = questions[questions.id == "q0"]
    rows = pd.concat([question.assign(scoring=scoring, template="letter") for scoring in ("letter", "option_text")])
    letters, texts = predictions.predict(scorer, tokenizer, rows, 300, 4).logprobs
    messages = templates.render(question.iloc[0].to_dict(), templates.LETTER)
    assert letters == pytest.approx([letter_score(scorer, tokenizer, messages, x) for x in "ABCD"], abs=1e-4)
    pairs = [templates.encode(tokenizer, messages, text) for text in question.options[0]]
    assert texts == pytest.approx([plain_score(scorer, *pair) for pair in pairs], abs=1e-4)


def test_one_prompt_is_read_once_whoever_asks_for_it(scorer, tokenizer, asked, monkeypatch):
    """Letters and texts of a listed question are branches of one prompt; a question asked twice costs nothing."""
    read, written = [], []
    score, write = predictions.score_options, TorchEngine.generate
    monkeypatch.setattr(
        predictions, "score_options", lambda m, items, *more: read.extend(items) or score(m, items, *more)
    )
    monkeypatch.setattr(TorchEngine, "generate", lambda self, asked: written.extend(asked) or write(self, asked))
    texts = asked[asked.scoring == "letter"].assign(scoring="option_text", template="letter")
    plain = predictions.predict(scorer, tokenizer, asked, 300, 4)
    first, read[:], first_written, written[:] = len(read), [], len(written), []
    table = predictions.predict(scorer, tokenizer, pd.concat([asked, asked, texts], ignore_index=True), 300, 4)
    assert len(read) == first == len({tuple(item.prompt_ids) for item in read})
    assert len(written) == first_written == 2
    again = table.iloc[len(asked) : 2 * len(asked)]
    assert again.logprobs.tolist() == table.logprobs[: len(asked)].tolist()
    assert again.text.tolist() == table.text[: len(asked)].tolist() == plain.text.tolist()
    for one, other in zip(plain.logprobs, again.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_model_that_thinks_does_so_before_generated_answers_alone(scorer, make_tokenizer, asked):
    chatml = make_tokenizer().chat_template
    thinker = make_tokenizer(
        chat_template=chatml.replace("assistant\n{% endif", "assistant\n{{ '<think>\\n' }}{% endif")
    )
    thinker.add_tokens(["<think>", "</think>"])
    table = predictions.predict(scorer, thinker, asked, 300, 4, max_thinking_tokens=6)
    closed = predictions.predict(scorer, thinker, asked, 300, 4)
    generated = table.scoring == "generated"
    assert table[generated].thinking_tokens.between(1, 6 + 4).all() and not closed.thinking_tokens.any()
    assert table[generated].text.str.fullmatch("(?s)<think>\n.*\n</think>\n\n.*").all()
    pd.testing.assert_frame_equal(table[~generated], closed[~generated])
    plain = make_tokenizer()
    budgets = [predictions.predict(scorer, plain, asked, 300, 4, max_thinking_tokens=budget) for budget in (6, None)]
    pd.testing.assert_frame_equal(*budgets)


def test_study_and_condition_come_along_and_are_empty_for_the_plain_way(scorer, tokenizer, asked):
    order = [2, 0, 3, 1]
    studied = asked[(asked.id == "q0") & (asked.scoring == "letter")].assign(
        study="shuffle", condition="order=2031", order=[order], template="letter"
    )
    table = predictions.predict(scorer, tokenizer, pd.concat([asked, studied], ignore_index=True), 300, 4)
    assert list(table.columns) == [
        "id", "scoring", "template", "logprobs", "answer_tokens", "thinking_tokens", "text", "study", "condition"
    ]  # fmt: skip
    assert table.iloc[-1][["study", "condition"]].tolist() == ["shuffle", "order=2031"]
    assert set(table.study[:-1]) == set(table.condition[:-1]) == {""}


def test_a_column_of_floats_is_given_and_nan_is_not(scorer, tokenizer, asked):
    letters = asked[asked.scoring == "letter"].assign(study="temperature", condition=[0.5, float("nan")])
    table = predictions.predict(scorer, tokenizer, letters, 300, 4)
    assert table.condition.tolist() == [0.5, ""] and table.study.tolist() == ["temperature"] * 2


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
