"""Every engine writes the same lengths, times are those of the engine's clock, and no pass repeats another."""

import numpy as np
import pytest

from medkit.inference import workloads
from medkit.modeling.engine import EngineError, Generation, Request
from medkit.stage import MedkitError

PROMPTS = [[1, 2, 3], [4] * 5, [6], [7] * 9]


class Scripted:
    """An engine on a clock of its own: prefill takes `first_s`, every further token `step_s`; one request at a time."""

    def __init__(self, name="scripted", first_s=1.0, step_s=0.25, order=None):
        self.name, self.first_s, self.step_s, self.order = name, first_s, step_s, order
        self.asked: list[list[Request]] = []

    def generate(self, requests):
        self.asked.append(list(requests))
        if self.order is not None:
            self.order.append(self.name)
        answers, now = [], 0.0
        for request in requests:
            times = [now + self.first_s + i * self.step_s for i in range(request.max_new_tokens)]
            answers.append(Generation(list(range(request.max_new_tokens)), times, begun_s=now))
            now = times[-1]
        return answers


def test_shots_make_a_prefix_that_all_prompts_share(tokenizer, questions):
    choice = questions[questions.kind == "choice"]
    shots = choice.head(2).to_dict("records")
    plain, helped = workloads.encode_prompts(tokenizer, choice), workloads.encode_prompts(tokenizer, choice, shots)
    shared = next(i for i, column in enumerate(zip(*helped, strict=False)) if len(set(column)) > 1)
    text = tokenizer.decode(helped[0][:shared])
    for shot in shots:
        assert shot["question"] in text and shot["options"][shot["answer"]] in text
    assert min(map(len, helped)) - shared < max(map(len, plain))


@pytest.mark.parametrize("number", [2, 3, 8, 64])
def test_skewed_lengths_are_the_same_for_every_seed(number):
    drawn = [workloads.skewed([[1]] * number, median=24, longest=256, seed=seed) for seed in (0, 1)]
    lengths, other = ([r.max_new_tokens for r in requests] for requests in drawn)
    assert sorted(lengths) == sorted(other) and (number < 8 or lengths != other)
    assert max(lengths) == 256 and min(lengths) >= 2
    assert sum(n < 24 for n in lengths) == sum(n > 24 for n in lengths)
    if number >= 8:
        assert np.mean(lengths) > 1.4 * np.median(lengths)  # a tail to the right
    with pytest.raises(MedkitError, match="median of 300 and at most 256"):
        workloads.skewed(PROMPTS, 300, 256, seed=0)


def test_the_times_of_a_pass_by_hand():
    requests = [Request([1, 2], 5), Request([3], 3)]
    table, answers = workloads.time_in_turns({"scripted": Scripted()}, requests, repeats=1)
    row = table.iloc[0]
    assert (row.engine, row.requests, row.prompt_tokens, row.output_tokens) == ("scripted", 2, 3, 8)
    assert row.ttft_s == 2.0  # the median of 1 s and 3 s: waiting in the queue counts
    assert row.latency_s_per_token == row.latency_p95_s_per_token == 0.25
    assert row.duration_s == 3.5 and row.throughput_tokens_per_s == 8 / 3.5
    lines = workloads.timeline(answers["scripted"])
    assert lines[["request", "begun_s", "time_s"]].iloc[5].tolist() == [1, 2.0, 3.0] and len(lines) == 8


def test_alone_no_request_waits():
    engine = Scripted()
    table, _ = workloads.time_in_turns({"scripted": engine}, workloads.equal(PROMPTS, 5), 1, alone=True, warm_up=1)
    assert [len(asked) for asked in engine.asked] == [1] * (1 + len(PROMPTS))
    assert table.ttft_s[0] == table.ttft_p95_s[0] == 1.0 and table.duration_s[0] == 4 * 2.0


def test_answers_of_another_length_are_no_measurement():
    requests = workloads.equal([[1], [2]], 4)
    answers = Scripted().generate([requests[0], Request([2], 3)])
    with pytest.raises(EngineError, match=r"x: asked for \[4, 4\] tokens, got \[4, 3\]"):
        workloads.summarise("x", requests, answers, 1.0)


def test_engines_take_turns_after_a_warm_up():
    order = []
    engines = {"a": Scripted("a", order=order), "b": Scripted("b", order=order)}
    table, answers = workloads.time_in_turns(engines, workloads.equal(PROMPTS, 3), repeats=3)
    assert order == ["a", "b"] * 4 and set(answers) == {"a", "b"}
    assert list(zip(table.engine, table["repeat"], strict=True)) == [(e, r) for r in range(3) for e in "ab"]


def test_no_pass_repeats_the_questions_of_another(tokenizer, questions):
    """An engine with a prompt cache would read them only once; what all prompts share stays."""
    choice = questions[questions.kind == "choice"]
    asked = workloads.encode_prompts(tokenizer, choice, choice.tail(1).to_dict("records"))
    engines = {"a": Scripted(), "b": Scripted()}
    workloads.time_in_turns(engines, workloads.equal(asked, 2), repeats=3)
    assert engines["a"].asked == engines["b"].asked and engines["a"].asked[0] == workloads.equal(asked, 2)
    shared = next(i for i, column in enumerate(zip(*asked, strict=False)) if len(set(column)) > 1)
    for number, first in enumerate(asked):
        passes = [requests[number].prompt_ids for requests in engines["a"].asked]
        assert len({tuple(ids[: shared + 4]) for ids in passes}) == 4
        for ids in passes:
            assert sorted(ids) == sorted(first) and ids[:shared] == first[:shared]
            assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("asked", [[[1, 2, 1], [1, 2, 3, 2, 1]], [[1], [1, 2]], [[1, 2, 3]], [[5], [6]], [[1, 2]] * 2])
def test_rotated_prompts_keep_their_tokens(asked):
    engine = Scripted()
    workloads.time_in_turns({"a": engine}, workloads.equal(asked, 2), repeats=5)
    for requests in engine.asked:
        assert [sorted(r.prompt_ids) for r in requests] == [sorted(ids) for ids in asked]


def test_agreement_is_the_share_of_equal_answers():
    a, b = Generation([1, 2, 3]), Generation([5, 6])
    assert workloads.agreement([a, b], [a, Generation([5])]) == 0.5
