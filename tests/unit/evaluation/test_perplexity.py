"""Perplexity is what the model's own losses give; it is paired with the baseline, and never becomes a choice."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medkit import evaluation, inference
from medkit.data import splits
from medkit.modeling import batches
from medkit.params import SPLITS, DatasetParams, Instructions


@pytest.fixture
def questions(tmp_path):
    """Twelve conversations of one or two turns, read from a file; all their responses are tested."""
    path = tmp_path / "notes.jsonl"
    for n in range(12):
        turns = [(role, turn) for turn in range(1 + n % 2) for role in ("user", "assistant")]
        texts = [f"{role} {n}:\n- {'word ' * (n % 4)}{turn}" for role, turn in turns]
        chat = [{"role": role, "content": text} for (role, _), text in zip(turns, texts, strict=True)]
        with path.open("a") as file:
            file.write(json.dumps({"chat": chat}) + "\n")
    origin = Instructions(kind="instructions", path=str(path), pool="test", columns={"messages": "chat"})
    datasets = {"notes": DatasetParams(origin=origin, **(dict.fromkeys(SPLITS, 0) | {"test": "all"}))}
    table, _ = splits.load_questions(datasets, {"notes": path}, seed=0)
    return splits.take_splits(splits.assign_pools(table, 0), datasets, 0).assign(clean=True)


def test_from_a_file_to_a_perplexity_that_is_the_models_own(make_llama, tokenizer, questions):
    models = {
        "base": make_llama(seed=1, initializer_range=0.3),
        "student_ce": make_llama(seed=2, initializer_range=0.3),
    }
    asked = inference.choose_questions(questions, {"perplexity": {"notes": "all"}}, seed=0)
    assert len(asked) == 18
    predictions = pd.concat(
        inference.predict(model, tokenizer, asked, 512, 4).assign(variant=name) for name, model in models.items()
    )
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
    assert (
        row.ratio == pytest.approx(row.value / table.value["base"], rel=1e-4)
        and row.ratio_low < row.ratio < row.ratio_high
    )
    assert evaluation.judge(predictions, questions).empty
    as_choices = predictions.assign(scoring="option_text")
    assert evaluation.judge(as_choices, questions).empty and evaluation.score_questions(as_choices, questions).empty


def made_up(
    nats: dict[str, list[float]], tokens: dict[str, list[int]], groups: list
) -> tuple[pd.DataFrame, pd.DataFrame]:
    questions = pd.DataFrame({"group": groups, "source": "notes", "options": [["ab"]] * len(groups)})
    questions["id"] = [f"q{n}" for n in range(len(groups))]
    rows = [
        (id, name, [-x], [n])
        for name, values in nats.items()
        for id, x, n in zip(questions.id, values, tokens[name], strict=True)
    ]
    predictions = pd.DataFrame(rows, columns=["id", "variant", "logprobs", "answer_tokens"])
    return predictions.assign(scoring="perplexity"), questions


def test_intervals_are_those_of_whole_groups_and_pairs_share_their_tokens():
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 30, 60)
    per_group = np.repeat(draw.normal(2, 0.5, 20), 3)
    nats, groups = tokens * per_group, np.repeat(np.arange(20), 3).tolist()
    both = {"base": nats.tolist(), "student_ce": (nats + 0.1 * tokens).tolist()}
    predictions, questions = made_up(both, dict.fromkeys(both, tokens.tolist()), groups)
    table = evaluation.measure_perplexity(predictions, questions, 0.9).set_index("variant")
    sums = np.array([[a[g == np.array(groups)].sum() for g in range(20)] for a in (nats, tokens)])
    found = stats.bootstrap(
        tuple(sums), lambda above, below, axis: above.sum(axis) / below.sum(axis), paired=True, vectorized=True,
        confidence_level=0.9, method="percentile", n_resamples=5000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    assert np.log(table.ci_low["base"]) == pytest.approx(found.low, abs=0.03)
    assert np.log(table.ci_high["base"]) == pytest.approx(found.high, abs=0.03)
    row = table.loc["student_ce"]
    assert [row.ratio, row.ratio_low, row.ratio_high] == pytest.approx([np.exp(0.1)] * 3), "paired: no spread at all"
    other = {"base": (2 * tokens).tolist(), "student_ce": tokens.tolist()}
    apart = evaluation.measure_perplexity(*made_up(both, other, groups), 0.9).set_index("variant")
    assert apart.ratio.isna().all() and apart.baseline.isna().all(), "two tokenizers"
    assert evaluation.measure_perplexity(predictions.assign(scoring="letter"), questions, 0.9).empty
