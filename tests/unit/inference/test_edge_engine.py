"""The edge engines, on toy files: transformers' answers, streams that join, leave and fail, and nothing reported."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import count, islice
from random import Random
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, GgufConfig

from medkit.inference import edge_engine
from medkit.inference.edge_engine import LlamaCppEngine, OpenVinoEngine
from medkit.modeling.engine import EngineError, Request
from medkit.modeling.option_scoring import Item, score_options
from medkit.quantization import gguf_export

VOCAB, CONTEXT = 300, 1024


def draw(length, seed):
    return Random(seed).choices(range(3, VOCAB), k=length)


PROMPTS = [draw(length, length) for length in (1, 7, 33, 100)]


def installed(name):
    try:
        edge_engine.import_openvino() if name == "openvino" else __import__(name)
    except (EngineError, ImportError):
        return False
    return True


@pytest.fixture(scope="module")
def path(make_llama, tokenizer, tmp_path_factory):
    return gguf_export.export_gguf(make_llama(), tokenizer, tmp_path_factory.mktemp("edge") / "student.gguf", "F16")


@pytest.fixture(scope="module")
def reference(path):
    """What transformers makes of the same file."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()


def write(reference, prompts, length):
    """What transformers writes after prompts of one length, past any end token."""
    config = GenerationConfig(do_sample=False, max_new_tokens=length, eos_token_id=-1, pad_token_id=0)
    return reference.generate(torch.tensor(prompts), generation_config=config)[:, len(prompts[0]) :].tolist()


@pytest.fixture(scope="module")
def answers(reference):
    return [write(reference, [prompt], 24)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module", params=["openvino", "llama_cpp"])
def engine(request, path):
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    made = {"openvino": OpenVinoEngine, "llama_cpp": LlamaCppEngine}[request.param](path, threads=1)
    yield made
    made.close()


@pytest.fixture
def make_openvino(path):
    """openvino(**settings): an engine of the toy file, closed after the test."""
    if not installed("openvino"):
        pytest.skip("openvino_genai is not installed")
    made = []

    def make(**settings):
        made.append(OpenVinoEngine(path, threads=1, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def test_an_engine_writes_what_transformers_writes(engine, answers):
    lengths = [24, 3, 1, 17]
    found = engine.generate([Request(p, n) for p, n in zip(PROMPTS, lengths, strict=True)])
    assert [g.token_ids for g in found] == [answer[:n] for answer, n in zip(answers, lengths, strict=True)]
    for generation in found:
        assert len(generation.token_times_s) == len(generation.token_ids)
        assert generation.token_times_s == sorted(generation.token_times_s)
        assert generation.token_times_s[0] > 0


def test_the_same_prompt_again_gives_the_same_answer(engine, answers):
    """Now the beginning comes from a cache."""
    for _ in range(2):
        (found,) = engine.generate([Request(PROMPTS[-1], 24)])
        assert found.token_ids == answers[-1]


def test_an_answer_ends_with_the_first_end_token(engine, answers):
    answer = answers[2]
    later = next(token for token in answer[5:] if token not in answer[:5])
    request = Request(PROMPTS[2], 24, end_ids=(later, VOCAB - 1))
    expected = answer[: answer.index(later) + 1]
    assert engine.generate([request])[0].token_ids == expected
    assert list(engine.stream(request)) == expected


def test_the_file_s_own_end_token_ends_nothing_unless_it_is_asked_for(engine, reference):
    """Token 2 is the end in the file."""
    prompts = [draw(9, seed) for seed in range(400)]
    written = zip(prompts, write(reference, prompts, 8), strict=True)
    prompt, answer = next(pair for pair in written if 2 in pair[1][:-1])
    whole = engine.generate([Request(prompt, 8), Request(prompt, 8, end_ids=(VOCAB - 1,))])
    assert [g.token_ids for g in whole] == [answer, answer]
    assert engine.generate([Request(prompt, 8, end_ids=(2,))])[0].token_ids == answer[: answer.index(2) + 1]


def test_no_answer_begins_before_its_request_came(engine):
    requests = [Request(PROMPTS[1], 2, arrival_s=0.3), Request(PROMPTS[1], 2), Request(PROMPTS[0], 2, arrival_s=0.15)]
    found = engine.generate(requests)
    for request, generation in zip(requests, found, strict=True):
        assert generation.token_times_s[0] > request.arrival_s
    assert found[1].token_times_s[-1] < 0.3  # nor does it wait for the others


def test_many_threads_stream_at_once(engine, answers):
    with ThreadPoolExecutor(8) as pool:
        numbers = [n % len(PROMPTS) for n in range(16)]
        found = pool.map(lambda n: list(engine.stream(Request(PROMPTS[n], 24))), numbers)
        assert list(found) == [answers[n] for n in numbers]


def test_a_closed_stream_is_cancelled(engine, answers):
    stream = engine.stream(Request(PROMPTS[1], 900))
    assert list(islice(stream, 3)) == answers[1][:3]
    stream.close()
    assert engine.generate([Request(PROMPTS[2], 24)])[0].token_ids == answers[2]


@pytest.mark.parametrize(
    ("prompt", "length", "sentence"),
    [
        ([], 4, "a prompt of 0 tokens"),
        ([5], 0, "0 to write"),
        ([5] * 1000, 5000, "shorten the prompt"),
        ([5, VOCAB], 4, f"not in 0…{VOCAB - 1}"),
        ([-1], 4, f"not in 0…{VOCAB - 1}"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_at_once(engine, prompt, length, sentence):
    for ask in (engine.stream, lambda request: engine.generate([request])):
        with pytest.raises(EngineError, match=sentence):
            ask(Request(prompt, length))


def test_answers_share_the_model_while_they_are_written(make_openvino):
    """Continuous batching: the short one is done long before the long one, which began first."""
    engine = make_openvino()
    long, short = engine.generate([Request(PROMPTS[1], 400), Request(PROMPTS[2], 4)])
    assert short.token_times_s[-1] < long.token_times_s[40]


def test_a_cancelled_answer_no_longer_costs_anything(make_openvino):
    engine = make_openvino()
    streams = [engine.stream(Request(PROMPTS[n % 4], 800)) for n in range(8)]
    for stream in streams:
        next(stream)
        stream.close()
    engine.generate([Request(PROMPTS[0], 2)])  # the engine has taken notice
    assert not engine._pipeline.has_non_finished_requests()


def test_scores_are_transformers_and_do_not_depend_on_what_was_asked_before(make_openvino, reference):
    items = [Item(PROMPTS[3], [[7, 9, 30], [7, 11], [250]]), Item(PROMPTS[0], [[5, 6]]), Item(PROMPTS[3], [[7]])]
    items.append(Item(draw(700, 0), [draw(9, 1)]))  # more than one step
    expected = score_options(reference, items, 1024, pad_token_id=0)
    engine = make_openvino()
    for _ in range(2):
        for ours, theirs in zip(engine.score(items), expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert engine.score([]) == []


def test_close_ends_the_thread_and_every_stream(make_openvino):
    engine = make_openvino()
    stream = engine.stream(Request(PROMPTS[1], 900))
    next(stream)
    threading.Thread(target=engine.close).start()
    with pytest.raises(EngineError, match="was closed"):
        list(stream)
    engine.close()
    assert not engine._thread.is_alive()
    with pytest.raises(EngineError, match="was closed"):
        engine.generate([Request(PROMPTS[1], 4)])


def test_a_failure_of_the_model_reaches_every_stream(make_openvino):
    engine = make_openvino()
    streams = [engine.stream(Request(PROMPTS[n], 900)) for n in (1, 2)]
    for stream in streams:
        next(stream)
    broken = engine._pipeline

    class Broken:
        def __getattr__(self, name):
            return getattr(broken, name)

        def step(self):
            raise RuntimeError("Check 'x' failed\nno such memory")

    engine._pipeline = Broken()
    for stream in streams:
        with pytest.raises(EngineError, match="OpenVINO failed: no such memory"):
            list(stream)
    with pytest.raises(EngineError, match="no such memory"):
        engine.generate([Request(PROMPTS[1], 4)])


def test_a_request_that_the_library_refuses_fails_alone(make_openvino, answers):
    engine = make_openvino()
    stream = engine.stream(Request(PROMPTS[1], 24))
    begun = [next(stream)]
    with pytest.raises(EngineError, match="OpenVINO refuses the request"):
        list(engine.stream(Request(PROMPTS[0], 4, end_ids=(-5,))))
    assert begun + list(stream) == answers[1]


def test_a_damaged_file_is_refused(make_openvino, path, tmp_path):
    copied = tmp_path / path.name
    copied.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="is missing: copy it"):
        OpenVinoEngine(copied)
    gguf_export.manifest_path(copied).write_bytes(gguf_export.manifest_path(path).read_bytes())
    with pytest.raises(EngineError, match="copy or export it again"):
        OpenVinoEngine(copied)


@pytest.mark.parametrize(("engine", "module"), [(OpenVinoEngine, "openvino_genai"), (LlamaCppEngine, "llama_cpp")])
def test_a_missing_binding_is_named_with_its_cure(monkeypatch, path, engine, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineError, match=f"{module}.*pip install"):
        engine(path)


class Llama:
    """llama.cpp's binding as `LlamaCppEngine` uses it; it counts on from the prompt's last token."""

    running = 0

    def __init__(self, path, n_ctx, n_threads, n_threads_batch, verbose):
        self.threads, self.context = (n_threads, n_threads_batch), n_ctx

    def n_ctx(self):
        return self.context

    def n_vocab(self):
        return VOCAB

    def generate(self, tokens, temp):
        assert temp == 0.0 and not Llama.running  # greedy; one model writes one answer at a time
        Llama.running += 1
        try:
            for token in count(tokens[-1] + 1):
                yield token % VOCAB
        finally:
            Llama.running -= 1

    def close(self):
        pass


@pytest.fixture
def llama(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    return LlamaCppEngine(path, context=64)


def test_llama_cpp_is_asked_for_all_processors_and_for_no_more_tokens_than_wanted(llama):
    assert llama._model.threads == (os.cpu_count(), os.cpu_count())
    found = llama.generate([Request([5, 9], 3), Request([20], 2), Request([30], 9, end_ids=(33,))])
    assert [g.token_ids for g in found] == [[10, 11, 12], [21, 22], [31, 32, 33]]
    assert all(g.token_times_s == sorted(g.token_times_s) for g in found) and Llama.running == 0
    with pytest.raises(EngineError, match="do not fit a context of 64"):
        llama.generate([Request([5] * 60, 5)])


def test_llama_cpp_begins_an_answer_when_the_one_before_is_closed(llama):
    first = llama.stream(Request([5], 9))
    assert next(first) == 6
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: list(llama.stream(Request([20], 3))))
        assert not wait([second], timeout=0.2).done
        first.close()
        assert second.result(timeout=5) == [21, 22, 23]


def test_an_answer_that_was_not_read_has_no_score():
    class Handle:
        def can_read(self):
            return False

    with pytest.raises(EngineError, match="no memory to score"):
        edge_engine._score(Handle(), 3)


REPORTED = """
import sys
sys.addaudithook(lambda event, args: sys.exit(f"{event} {args}") if event.startswith("socket.") else None)
from medkit import edge_engine
openvino, _ = edge_engine.import_openvino()
from openvino.tools import ovc
print(type(ovc.telemetry).__module__)
"""


def test_openvino_reports_to_no_one(make_openvino):
    """Imported plainly it sends an event to an analytics service wherever the package `openvino_telemetry` is found."""
    found = subprocess.run([sys.executable, "-c", REPORTED], capture_output=True, text=True)
    assert found.stdout.strip() == "openvino.tools.ovc.telemetry_stub", found.stderr
