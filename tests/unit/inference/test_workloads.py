"""Every contender writes the same lengths, times are told from arrivals, and a pass that cheats is no measurement."""

from mmap import PAGESIZE, mmap

import numpy as np
import pandas as pd
import pytest

from medkit.inference import workloads
from medkit.modeling.engine import Generation, Request
from medkit.prompts import templates


class Scripted:
    """An engine on a clock of its own: prefill takes `first_s`, every further token `step_s`; one request at a time."""

    def __init__(self, name="scripted", first_s=1.0, step_s=0.25, offset=0):
        self.name, self.first_s, self.step_s, self.offset = name, first_s, step_s, offset
        self.asked: list[list[Request]] = []

    def generate(self, requests):
        self.asked.append(list(requests))
        found, now = [], 0.0
        for request in requests:
            now = max(now, request.arrival_s) + self.first_s
            times = [now + i * self.step_s for i in range(request.max_new_tokens)]
            found.append(Generation([self.offset + i for i in range(request.max_new_tokens)], times))
            now = times[-1]
        return found


PROMPTS = [[1, 2, 3], [4] * 5, [6], [7] * 9]


# --- requests ------------------------------------------------------------------------------------------------------


def test_prompts_are_the_questions_as_they_are_asked_everywhere(tokenizer, questions):
    found = workloads.encode_prompts(tokenizer, questions)
    rows = questions.to_dict("records")
    assert found == [
        templates.encode(tokenizer, templates.render(row, templates.pick_template(row["kind"], "option_text")))[0]
        for row in rows
    ]
    assert "Answer yes, no or maybe" in tokenizer.decode(found[2])


def test_shots_make_a_prefix_that_all_prompts_share(tokenizer, questions):
    choice = questions[questions.kind == "choice"]
    shots = choice.head(2).to_dict("records")
    plain, helped = workloads.encode_prompts(tokenizer, choice), workloads.encode_prompts(tokenizer, choice, shots)
    shared = next(i for i, column in enumerate(zip(*helped, strict=False)) if len(set(column)) > 1)
    text = tokenizer.decode(helped[0][:shared])
    for shot in shots:
        assert shot["question"] in text and shot["options"][shot["answer"]] in text
    assert min(map(len, helped)) - shared < max(map(len, plain))


@pytest.mark.parametrize("number", [2, 3, 8, 32, 64])
def test_skewed_lengths_are_one_shape_whatever_the_seed(number):
    drawn = [workloads.skewed([[1]] * number, median=24, longest=256, seed=seed) for seed in (0, 1)]
    lengths, other = ([r.max_new_tokens for r in requests] for requests in drawn)
    assert sorted(lengths) == sorted(other) and (number < 8 or lengths != other)
    assert max(lengths) == 256 and min(lengths) >= 2
    assert sum(n < 24 for n in lengths) == sum(n > 24 for n in lengths)
    if number >= 8:
        assert np.mean(lengths) > 1.4 * np.median(lengths)  # a tail to the right
    assert all(not r.end_ids for r in drawn[0])


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="median of 300 and at most 256"):
        workloads.skewed(PROMPTS, 300, 256, seed=0)


def test_arrivals_are_poissons_and_reproducible():
    requests = workloads.equal([[1]] * 2000, 4)
    found = workloads.arriving(requests, rate_per_s=5.0, seed=3)
    assert found == workloads.arriving(requests, 5.0, seed=3) != workloads.arriving(requests, 5.0, seed=4)
    at = np.array([r.arrival_s for r in found])
    gaps = np.diff(at)
    assert at[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 5.0, rel=0.1) and gaps.std() == pytest.approx(gaps.mean(), rel=0.1)
    assert [(r.prompt_ids, r.max_new_tokens) for r in found] == [(r.prompt_ids, r.max_new_tokens) for r in requests]


# --- measuring -----------------------------------------------------------------------------------------------------


def test_a_pass_is_told_in_the_numbers_of_its_clock():
    requests = [Request([1, 2], 5), Request([3], 3, arrival_s=10.0)]
    said = Scripted(first_s=1.0, step_s=0.25).generate(requests)
    found = workloads.summarise("scripted", requests, said, duration_s=4.0)
    assert (found["engine"], found["requests"], found["prompt_tokens"], found["output_tokens"]) == ("scripted", 2, 3, 8)
    assert found["ttft_s"] == found["ttft_p95_s"] == 1.0  # the second came at 10 s and waited for nobody
    assert found["latency_s_per_token"] == found["latency_p95_s_per_token"] == 0.25
    assert found["throughput_tokens_per_s"] == 2.0


def test_waiting_in_a_queue_counts_and_percentiles_differ():
    requests = workloads.equal([[1]] * 21, 2)
    found = workloads.summarise("x", requests, Scripted(first_s=1.0, step_s=1.0).generate(requests), 42.0)
    waits = 1 + 2 * np.arange(21)
    assert found["ttft_s"] == np.median(waits) and found["ttft_p95_s"] == np.percentile(waits, 95)


def test_alone_nobody_queues_and_arrivals_do_not_matter():
    engine = Scripted()
    requests = workloads.arriving(workloads.equal(PROMPTS, 4), rate_per_s=1.0, seed=0)
    found, _ = workloads.measure("scripted", engine, requests, alone=True)
    assert [len(asked) for asked in engine.asked] == [1] * len(PROMPTS)
    assert {asked[0].arrival_s for asked in engine.asked} == {0.0}
    assert found["ttft_s"] == found["ttft_p95_s"] == 1.0
    assert found["output_tokens"] == 16 and found["duration_s"] > 0


def test_the_peak_is_of_the_pass_and_not_of_what_came_before():
    class Hungry(Scripted):
        size = 0

        def generate(self, requests):
            with mmap(-1, self.size) as block:  # pages of its own, whatever the allocator keeps
                for page in range(0, self.size, PAGESIZE):
                    block[page] = 1
            return super().generate(requests)

    engine = Hungry()
    peaks = {}
    for engine.size in (1, 128 << 20, 2):
        found, _ = workloads.measure("hungry", engine, workloads.equal(PROMPTS, 2))
        peaks[engine.size] = found["peak_memory_bytes"]
    assert peaks[128 << 20] - peaks[1] > 120 << 20
    assert abs(peaks[2] - peaks[1]) < 16 << 20


@pytest.mark.parametrize("fault", ["short", "long", "early"])
def test_a_pass_that_would_not_compare_is_no_measurement(fault):
    requests = [Request([1], 4), Request([2], 4, arrival_s=2.0)]
    said = Scripted().generate(requests)
    if fault == "early":
        said[1].token_times_s[0] = 1.5
    else:
        said[1] = Scripted().generate([Request([2], 3 if fault == "short" else 5)])[0]
    message = "0.500 s before its request came" if fault == "early" else "timings would not compare"
    with pytest.raises(workloads.PassError, match=message) as failed:
        workloads.summarise("x", requests, said, 1.0)
    assert failed.value.engine == "x"


def test_engines_take_turns_and_the_warm_up_is_told_apart():
    order = []

    class Noted(Scripted):
        def generate(self, requests):
            order.append(self.name)
            return super().generate(requests)

    engines = {"a": Noted("a"), "b": Noted("b", offset=7)}
    table, said = workloads.take_turns(engines, workloads.equal(PROMPTS, 3), repeats=3)
    assert order == ["a", "b"] * 4
    assert list(zip(table.engine, table["repeat"], strict=True)) == [(e, r) for r in range(3) for e in "ab"]
    assert (table.warm_up_s > 0).all() and table.groupby("engine").warm_up_s.nunique().eq(1).all()
    assert {name: generations[0].token_ids for name, generations in said.items()} == {"a": [0, 1, 2], "b": [7, 8, 9]}


def test_no_pass_repeats_the_questions_of_another(tokenizer, questions):
    """An engine with a prefix cache would read them once; what is shared by all, template and shots, may be kept."""
    choice = questions[questions.kind == "choice"]
    asked = workloads.encode_prompts(tokenizer, choice, choice.tail(1).to_dict("records"))
    engines = {"a": Scripted(), "b": Scripted()}
    workloads.take_turns(engines, workloads.equal(asked, 2), repeats=3)
    assert engines["a"].asked == engines["b"].asked and engines["a"].asked[0] == workloads.equal(asked, 2)
    shared = next(i for i, column in enumerate(zip(*asked, strict=False)) if len(set(column)) > 1)
    for number, first in enumerate(asked):
        passes = [requests[number].prompt_ids for requests in engines["a"].asked]
        assert len({ids[shared] for ids in map(tuple, passes)}) > 1
        assert len({tuple(ids[: shared + 4]) for ids in passes}) == 4
        for ids in passes:
            assert sorted(ids) == sorted(first) and ids[:shared] == first[:shared]
            assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "asked", [[[1, 2, 1], [1, 2, 3, 2, 1]], [[1], [1, 2]], [[1, 2, 3]], [[5], [6]], [[1, 2], [1, 2]]]
)
def test_other_words_are_as_many(asked):
    engine = Scripted()
    workloads.take_turns({"a": engine}, workloads.equal(asked, 2), repeats=5)
    for requests in engine.asked:
        assert [sorted(r.prompt_ids) for r in requests] == [sorted(ids) for ids in asked]


def test_a_real_engine_gives_the_same_answers_in_every_schedule(make_llama, tokenizer, questions):
    from medkit.inference.torch_engine import TorchEngine

    model = make_llama(layers=2)
    schedules = ("sequential", "static", "continuous")
    engines = {name: TorchEngine(model, 0, scheduler=name, batch_tokens=512) for name in schedules}
    asked = workloads.skewed(workloads.encode_prompts(tokenizer, questions), 3, 9, seed=0)
    try:
        for requests in (asked, workloads.arriving(asked, rate_per_s=50, seed=0)):
            table, said = workloads.take_turns(engines, requests, repeats=1)
            assert table.engine.tolist() == list(schedules) and table.output_tokens.nunique() == 1
            for name in schedules:
                assert workloads.agreement(said["sequential"], said[name])["answers_equal"] == 1
    finally:
        for engine in engines.values():
            engine.close()


# --- looking ---------------------------------------------------------------------------------------------------------


def test_a_timeline_has_every_token_once_and_one_prefill_per_request():
    requests = workloads.arriving(workloads.skewed(PROMPTS, 3, 6, seed=0), 1.0, seed=0)
    table = workloads.timeline(Scripted().generate(requests), requests)
    assert len(table) == sum(r.max_new_tokens for r in requests)
    assert table.groupby("request").time_s.is_monotonic_increasing.all()
    assert table[table.phase == "prefill"].token.eq(0).all() and (table.phase == "prefill").sum() == len(requests)
    assert (table.time_s > table.arrival_s).all()


def test_a_timeline_tells_waiting_from_reading_where_the_engine_does():
    requests = workloads.equal(PROMPTS, 3)
    said = Scripted().generate(requests)
    said[1].begun_s = 0.5
    table = workloads.timeline(said, requests)
    assert table[table.request == 1].begun_s.eq(0.5).all() and table[table.request != 1].begun_s.isna().all()


def test_agreement_counts_up_to_the_first_difference():
    def said(*answers):
        return [Generation(list(answer)) for answer in answers]

    a = said([1, 2, 3, 4], [5, 6])
    assert workloads.agreement(a, a) == {"answers_equal": 1.0, "tokens_before_difference": 1.0}
    found = workloads.agreement(a, said([1, 2, 9, 4], [5, 6]))
    assert found == {"answers_equal": 0.5, "tokens_before_difference": 4 / 6}
    assert workloads.agreement(a, said([1, 2], [8, 6]))["tokens_before_difference"] == 2 / 6
    with pytest.raises(ValueError):
        workloads.agreement(a, a[:1])


def test_a_table_of_no_tokens_has_its_columns_too():
    table = workloads.timeline([], [])
    assert list(table) == ["request", "arrival_s", "begun_s", "token", "time_s", "phase"] and isinstance(
        table, pd.DataFrame
    )
