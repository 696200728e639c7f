"""The fastest candidate is chosen, by what the workload asks for; it is measured once; who is missing is named."""

import json
import time

import pytest

from medkit import engine_choice, workloads
from medkit.engines import EngineError, Generation

REQUESTS = workloads.equal([[1, 2], [3], [4, 5, 6]], 3)
IDENTITY = {"model": "abc"}


class Sleepy:
    """Sleeps in prefill and at each token, so that it can be quick alone and slow together, or the other way round."""

    def __init__(self, name, prefill_s=0.0, step_s=0.0, says=7, closed=None):
        self.name, self.prefill_s, self.step_s, self.says, self.closed = name, prefill_s, step_s, says, closed or []

    def generate(self, requests):
        began, found = time.perf_counter(), [Generation() for _ in requests]
        time.sleep(self.prefill_s)
        for step in range(max(r.max_new_tokens for r in requests)):
            time.sleep(self.step_s)
            for request, generation in zip(requests, found, strict=True):
                if step < request.max_new_tokens:
                    generation.token_ids.append(self.says)
                    generation.token_times_s.append(time.perf_counter() - began)
        return found

    def close(self):
        self.closed.append(self.name)


def missing(error):
    def make():
        raise error

    return make


@pytest.mark.parametrize("together", [True, False])
def test_the_fastest_is_chosen_by_what_the_workload_asks_for(tmp_path, together):
    candidates = {
        "quick to begin": lambda: Sleepy("quick to begin", step_s=0.006),
        "quick to go on": lambda: Sleepy("quick to go on", prefill_s=0.03, step_s=0.001),
    }
    many = engine_choice.choose(candidates, REQUESTS, 2, tmp_path, IDENTITY, together=together)
    assert many.engine == "quick to begin" and many.judged_by == "throughput_tokens_per_s"
    one = engine_choice.choose(candidates, REQUESTS, 2, tmp_path, IDENTITY, alone=True, together=together)
    assert one.engine == "quick to go on" and one.judged_by == "latency_s_per_token"
    for choice in (many, one):
        assert choice.timed[0]["engine"] == choice.engine and len(choice.timed) == 2
        assert all(row["answers_equal"] == 1 and row["warm_up_s"] > 0 for row in choice.timed)
        assert (
            choice.reason.startswith(choice.engine)
            and choice.reason.endswith(".")
            and "not to be had" not in choice.reason
        )
        assert all(name in choice.reason for name in candidates)


def test_the_second_time_it_is_read_and_not_measured(tmp_path):
    loads = []

    def make():
        loads.append(1)
        return Sleepy("only")

    first = engine_choice.choose({"only": make}, REQUESTS, 1, tmp_path, IDENTITY)
    again = engine_choice.choose({"only": missing(AssertionError("measured again"))}, REQUESTS, 1, tmp_path, IDENTITY)
    assert again == first and loads == [1]
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["reason"] == first.reason


@pytest.mark.parametrize(
    "changed",
    [
        {"identity": {"model": "another file"}},
        {"requests": workloads.equal([[1, 2], [3], [4, 5, 6]], 4)},
        {"alone": True},
        {"candidates": {"only": lambda: Sleepy("only"), "more": lambda: Sleepy("more")}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_model_shape_or_field_is_measured_anew(tmp_path, changed):
    asked = {"candidates": {"only": lambda: Sleepy("only")}, "requests": REQUESTS, "identity": IDENTITY}
    engine_choice.choose(**asked, repeats=1, folder=tmp_path)
    engine_choice.choose(**{**asked, **changed}, repeats=1, folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_another_machine_measures_anew(tmp_path, monkeypatch):
    for device in ("one", "two"):
        monkeypatch.setattr(engine_choice, "device_name", lambda device=device: device)
        engine_choice.choose({"only": lambda: Sleepy("only")}, REQUESTS, 1, tmp_path, IDENTITY)
    assert len(list(tmp_path.glob("*.json"))) == 2


@pytest.mark.parametrize("together", [True, False])
def test_who_cannot_be_had_is_named_with_the_reason_and_everyone_is_closed(tmp_path, together):
    closed = []

    class Narrow(Sleepy):
        def generate(self, requests):
            raise EngineError("prompt 0 has 3 tokens, narrow takes 2; shorten it")

    candidates = {
        "absent": missing(ImportError("No module named 'absent'")),
        "narrow": lambda: Narrow("narrow", closed=closed),
        "works": lambda: Sleepy("works", closed=closed),
    }
    closed.append("start")
    found = engine_choice.choose(candidates, REQUESTS, 1, tmp_path, IDENTITY, together=together)
    assert found.engine == "works" and [row["engine"] for row in found.timed] == ["works"]
    assert found.refused == {
        "absent": "No module named 'absent'",
        "narrow": "prompt 0 has 3 tokens, narrow takes 2; shorten it",
    }
    assert all(reason in found.reason for reason in found.refused.values())
    assert closed == ["start", "narrow", "works"]


def test_a_failure_of_ours_is_no_missing_engine_and_leaves_no_record(tmp_path):
    closed = ["start"]
    candidates = {"works": lambda: Sleepy("works", closed=closed), "broken": missing(ZeroDivisionError("a mistake"))}
    with pytest.raises(ZeroDivisionError):
        engine_choice.choose(candidates, REQUESTS, 1, tmp_path, IDENTITY)
    assert closed == ["start", "works"] and not list(tmp_path.iterdir())


def test_nobody_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(EngineError, match="absent \\(install it\\)"):
        engine_choice.choose({"absent": missing(EngineError("install it."))}, REQUESTS, 1, tmp_path, IDENTITY)
    assert not list(tmp_path.iterdir())


def test_other_answers_than_the_first_candidates_are_told(tmp_path):
    candidates = {"reference": lambda: Sleepy("reference", step_s=0.01), "other": lambda: Sleepy("other", says=8)}
    found = engine_choice.choose(candidates, REQUESTS, 1, tmp_path, IDENTITY)
    assert found.engine == "other" and "0% of its answers are those of reference" in found.reason
    assert {row["engine"]: row["answers_equal"] for row in found.timed} == {"other": 0.0, "reference": 1.0}
