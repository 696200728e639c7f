"""Perplexity is what the model's own losses give; it is paired with the baseline, and never becomes a choice."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medkit import evaluation, inference
from medkit.data.instructions import make_instructions
from medkit.modeling import batches


def test_the_perplexity_is_the_models_own(make_llama, tokenizer):
    """On twelve conversations of one or two turns; all their responses are tested."""
    records = []
    for n in range(12):
        turns = [(role, turn) for turn in range(1 + n % 2) for role in ("user", "assistant")]
        chat = [{"role": role, "content": f"{role} {n}:\n- {'word ' * (n % 4)}{turn}"} for role, turn in turns]
        records += make_instructions(chat, "test", f"g{n}", n)
    questions = pd.DataFrame(records).assign(source="notes", split="test", clean=True)
    questions["id"] = [f"q{number}" for number in range(len(questions))]
    models = {name: make_llama(seed, initializer_range=0.3) for seed, name in enumerate(("base", "student_ce"))}
    asked = inference.choose_questions(questions, {"perplexity": {"notes": "all"}}, seed=0)
    assert len(asked) == 18
    answers = {name: inference.predict(model, tokenizer, asked, 512, 4) for name, model in models.items()}
    predictions = pd.concat(table.assign(variant=name) for name, table in answers.items())
    table = evaluation.measure_perplexity(predictions, questions, 0.95).set_index("variant")
    examples = batches.encode_questions(tokenizer, questions)
    tokens = np.array([example.num_predicted for example in examples])
    nats = {name: batches.predict_examples(model, examples).nll * tokens for name, model in models.items()}
    for name in models:
        row = table.loc[name]
        assert row.value == pytest.approx(np.exp(nats[name].sum() / tokens.sum()), rel=1e-4)
        assert row.ci_low < row.value < row.ci_high and (row.n, row.tokens) == (18, tokens.sum())
        size = sum(len(options[0].encode()) for options in questions.options)
        assert row.bits_per_byte == pytest.approx(nats[name].sum() / np.log(2) / size, rel=1e-4)
    assert pd.isna(table.baseline["base"]) and table.baseline["student_ce"] == "base"
    row = table.loc["student_ce"]
    assert row.ratio == pytest.approx(row.value / table.value["base"], rel=1e-4)
    assert row.ratio_low < row.ratio < row.ratio_high
    assert evaluation.judge(predictions, questions).empty
    as_choices = predictions.assign(scoring="option_text")
    assert evaluation.judge(as_choices, questions).empty and evaluation.score_questions(as_choices, questions).empty


def made_up(nats: dict[str, np.ndarray], tokens: np.ndarray, groups: np.ndarray) -> tuple[pd.DataFrame, pd.DataFrame]:
    questions = pd.DataFrame({"group": groups, "source": "notes", "options": [["ab"]] * len(groups)})
    questions["id"] = [f"q{n}" for n in range(len(groups))]
    answers = questions[["id"]].assign(scoring="perplexity", answer_tokens=tokens[:, None].tolist())
    tables = [answers.assign(variant=name, logprobs=(-x[:, None]).tolist()) for name, x in nats.items()]
    return pd.concat(tables, ignore_index=True), questions


def test_intervals_are_those_of_whole_groups_and_pairs_share_their_tokens():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 30, 60)
    nats, groups = tokens * np.repeat(draw.normal(2, 0.5, 20), 3), np.repeat(np.arange(20), 3)
    predictions, questions = made_up({"base": nats, "student_ce": nats + 0.1 * tokens}, tokens, groups)
    table = evaluation.measure_perplexity(predictions, questions, 0.9).set_index("variant")
    sums = np.array([[a[g == groups].sum() for g in range(20)] for a in (nats, tokens)])
    found = stats.bootstrap(
        tuple(sums), lambda above, below, axis: above.sum(axis) / below.sum(axis), paired=True, vectorized=True,
        confidence_level=0.9, method="percentile", n_resamples=5000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert np.log(table.ci_low["base"]) == pytest.approx(found.low, abs=0.03)
    assert np.log(table.ci_high["base"]) == pytest.approx(found.high, abs=0.03)
    row = table.loc["student_ce"]
    assert [row.ratio, row.ratio_low, row.ratio_high] == pytest.approx([np.exp(0.1)] * 3), "paired: no spread at all"
    other = predictions.variant.map({"base": 2, "student_ce": 1}) * predictions.answer_tokens.str[0]
    apart = predictions.assign(answer_tokens=[[n] for n in other])
    apart = evaluation.measure_perplexity(apart, questions, 0.9).set_index("variant")
    assert apart.ratio.isna().all() and apart.baseline.isna().all(), "two tokenizers"
    assert evaluation.measure_perplexity(predictions.assign(scoring="letter"), questions, 0.9).empty
