"""The fastest candidate is chosen, by what the workload asks for; it is measured once; who is missing is named."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from pydantic import ValidationError

from medkit import serving
from medkit.inference import choose_engine, server_engine, variant_loading, workloads
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.engine import EngineError, Generation
from medkit.params import ServerParams, load_params
from medkit.stage import ROOT

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
    many = choose_engine.choose(candidates, REQUESTS, 2, tmp_path, IDENTITY, together=together)
    assert many.engine == "quick to begin" and many.judged_by == "throughput_tokens_per_s"
    one = choose_engine.choose(candidates, REQUESTS, 2, tmp_path, IDENTITY, alone=True, together=together)
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


class Tired(Sleepy):
    """Answers the one request it is tried with, and then no more."""

    def __init__(self, fault):
        super().__init__("tired")
        self.fault, self.calls = fault, 0

    def generate(self, requests):
        self.calls += 1
        found = super().generate(requests)
        if self.calls > 1 and self.fault == "fails":
            raise EngineError("the server hung up")
        if self.calls > 2 and self.fault == "ends early":
            found[0].token_ids.pop()
        return found


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("fault", "sentence"), [("fails", "hung up"), ("ends early", "timings would not compare")])
def test_a_candidate_that_fails_while_it_is_timed_is_refused_and_the_others_go_on(tmp_path, together, fault, sentence):
    tired = Tired(fault)
    candidates = {"tired": lambda: tired, "sound": lambda: Sleepy("sound")}
    found = choose_engine.choose(candidates, REQUESTS, 2, tmp_path, IDENTITY, alone=True, together=together)
    assert found.engine == "sound" and len(found.timed) == 1
    assert sentence in found.refused["tired"] and "not to be had here: tired" in found.reason
    assert tired.closed == ["tired"]
    with pytest.raises(EngineError, match=sentence):
        choose_engine.choose({"tired": lambda: Tired(fault)}, REQUESTS, 2, tmp_path, IDENTITY, together=together)


def test_the_second_time_it_is_read_and_not_measured(tmp_path):
    loads = []

    def make():
        loads.append(1)
        return Sleepy("only")

    first = choose_engine.choose({"only": make}, REQUESTS, 1, tmp_path, IDENTITY)
    again = choose_engine.choose({"only": missing(AssertionError("measured again"))}, REQUESTS, 1, tmp_path, IDENTITY)
    assert again == first and loads == [1]
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["reason"] == first.reason


def test_measured_anew_it_is_loaded_once_and_its_passes_are_kept(tmp_path):
    loads = []

    def make():
        loads.append(1)
        return Sleepy("only", step_s=0.002)

    for times in (1, 2):
        found = choose_engine.choose({"only": make}, REQUESTS, 3, tmp_path, IDENTITY, alone=True, anew=True)
        assert len(loads) == times
        assert [(row["engine"], row["repeat"]) for row in found.passes] == [("only", repeat) for repeat in range(3)]
        median = sorted(row["latency_s_per_token"] for row in found.passes)[1]
        assert found.timed[0]["latency_s_per_token"] == median
    read = choose_engine.choose({"only": make}, REQUESTS, 3, tmp_path, IDENTITY, alone=True)
    assert read == found and len(loads) == 2  # the last measurement is the one that is kept


def test_a_record_of_another_version_is_not_read(tmp_path, monkeypatch):
    choose_engine.choose({"only": lambda: Sleepy("only")}, REQUESTS, 1, tmp_path, IDENTITY)
    fields = choose_engine.fields
    monkeypatch.setattr(choose_engine, "fields", lambda kind: fields(kind)[:-1])
    choose_engine.choose({"only": lambda: Sleepy("only")}, REQUESTS, 1, tmp_path, IDENTITY)
    assert len(list(tmp_path.glob("*.json"))) == 2


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
    choose_engine.choose(**asked, repeats=1, folder=tmp_path)
    choose_engine.choose(**{**asked, **changed}, repeats=1, folder=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_another_machine_measures_anew(tmp_path, monkeypatch):
    for device in ("one", "two"):
        monkeypatch.setattr(choose_engine, "device_name", lambda device=device: device)
        choose_engine.choose({"only": lambda: Sleepy("only")}, REQUESTS, 1, tmp_path, IDENTITY)
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
    found = choose_engine.choose(candidates, REQUESTS, 1, tmp_path, IDENTITY, together=together)
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
        choose_engine.choose(candidates, REQUESTS, 1, tmp_path, IDENTITY)
    assert closed == ["start", "works"] and not list(tmp_path.iterdir())


def test_nobody_left_is_an_error_that_says_why(tmp_path):
    with pytest.raises(EngineError, match="absent \\(install it\\)"):
        choose_engine.choose({"absent": missing(EngineError("install it."))}, REQUESTS, 1, tmp_path, IDENTITY)
    assert not list(tmp_path.iterdir())


def test_other_answers_than_the_first_candidates_are_told(tmp_path):
    candidates = {"reference": lambda: Sleepy("reference", step_s=0.01), "other": lambda: Sleepy("other", says=8)}
    found = choose_engine.choose(candidates, REQUESTS, 1, tmp_path, IDENTITY)
    assert found.engine == "other" and "0% of its answers are those of reference" in found.reason
    assert {row["engine"]: row["answers_equal"] for row in found.timed} == {"other": 0.0, "reference": 1.0}


# --- a server among the candidates -----------------------------------------------------------------------------------

KEY, VARIABLE = "sesame-open-up", "MEDKIT_TEST_KEY"


@contextmanager
def served(engine, tokenizer):
    """`medkit serve` over an engine: its base_url."""
    limits = serving.Limits(context_tokens=512)
    app = serving.create_app(engine, tokenizer, model_name="toy/edge", limits=limits, api_key=KEY)
    server = serving.make_server(app, port=0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join(20)


def with_server(**changes):
    """The smoke profile with a server that listens nowhere."""
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "toy/edge", "api_key_env": VARIABLE, **changes}
    return load_params(ROOT / "params" / "smoke.yaml", {"inference.server": server})


def test_the_profiles_server_is_a_candidate_and_its_key_is_in_no_record(make_llama, tokenizer, tmp_path, monkeypatch):
    def engine():
        return TorchEngine(make_llama(seed=3), tokenizer.pad_token_id, batch_tokens=256)

    monkeypatch.setenv(VARIABLE, KEY)
    with served(engine(), tokenizer) as url:
        params = with_server(base_url=url)
        candidates = variant_loading.edge_candidates("run", "04_quantization/edge/student.gguf", params, tokenizer)
        assert [*candidates] == ["transformers", "openvino", "llama.cpp", "remote"]
        tried = {"transformers": engine, "remote": candidates["remote"]}
        found = choose_engine.choose(tried, REQUESTS, 1, tmp_path, IDENTITY, alone=True, together=False)
    assert found.refused == {} and {row["engine"]: row["answers_equal"] for row in found.timed} == {
        "transformers": 1.0,
        "remote": 1.0,
    }
    assert KEY not in next(tmp_path.glob("*.json")).read_text() + params.model_dump_json()
    assert VARIABLE in params.model_dump_json()


def test_without_a_server_there_are_the_local_engines():
    candidates = variant_loading.edge_candidates("run", "edge.gguf", load_params(ROOT / "params" / "smoke.yaml"), None)
    assert [*candidates] == ["transformers", "openvino", "llama.cpp"]


def test_a_server_that_cannot_be_had_is_told_at_once(make_llama, tokenizer, monkeypatch):
    def refusal(**changes):
        began = time.perf_counter()
        with pytest.raises(EngineError) as caught:
            variant_loading.reach(with_server(**changes).inference.server, tokenizer)
        assert time.perf_counter() - began < 5
        assert str(caught.value).startswith("inference.server: ") and KEY not in str(caught.value)
        return str(caught.value)

    monkeypatch.delenv(VARIABLE, raising=False)
    assert f"read from {VARIABLE}, which is not set" in refusal()
    monkeypatch.setenv(VARIABLE, KEY)
    assert "is the server running?" in refusal()  # nobody listens
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and says nothing
        monkeypatch.setattr(server_engine, "GREETING_S", 0.3)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert f"{url} was silent for 0.3 s: is the server running" in refusal(base_url=url)
    monkeypatch.undo()
    monkeypatch.setenv(VARIABLE, KEY)
    with served(TorchEngine(make_llama(seed=3), tokenizer.pad_token_id, batch_tokens=256), tokenizer) as url:
        assert "serves no model 'other': it serves toy/edge" in refusal(base_url=url, model="other")
        assert "refuses the API key" in refusal(base_url=url, api_key_env="")


def test_openai_is_needed_for_servers_alone():
    """It comes with an extra: a run without a server must not miss it."""
    script = """
import sys
sys.modules["openai"] = None
from medkit import variants
from medkit.engines import EngineError
from medkit.params import ServerParams
try:
    variants.reach(ServerParams(base_url="http://127.0.0.1:9/v1", model="m", api_key_env=""), None)
except EngineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "needs the extra `serve`" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "http://127.0.0.1:8000"},
        {"base_url": "http://me:secret@example.org/v1"},
        {"base_url": "example.org/v1"},
        {"api_key_env": "sk-abc"},
        {"api_key": KEY},
    ],
    ids=str,
)
def test_a_server_is_named_in_full_and_without_secrets(wrong):
    with pytest.raises(ValidationError):
        ServerParams(**{"base_url": "http://127.0.0.1:8000/v1", "model": "m", "api_key_env": "", **wrong})
