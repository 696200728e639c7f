"""Many threads share one batch: each reads its own answer, who leaves frees the place, nobody waits for the dead."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from medkit.inference.torch_engine import TorchEngine
from medkit.modeling.engine import EngineError, Request

PAD, VOCAB = 0, 300


@pytest.fixture(scope="module")
def writer(make_llama):
    return make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3)


@pytest.fixture
def make_engine(writer):
    made = []

    def make(batch_tokens=100, model=writer, **options):
        made.append(TorchEngine(model, PAD, batch_tokens=batch_tokens, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def ask(count, lengths=(5, 70, 3, 21, 90), new_tokens=(4, 20, 9, 3, 12)):
    generator = torch.Generator().manual_seed(0)
    return [
        Request(torch.randint(3, VOCAB, (lengths[i % 5],), generator=generator).tolist(), new_tokens[i % 5])
        for i in range(count)
    ]


def wait_for(true, seconds=5):
    until = time.perf_counter() + seconds
    while not true():
        assert time.perf_counter() < until
        time.sleep(0.01)


def free_and_kept(engine):
    """Share of the pages that are free, and the share kept of finished answers for others that begin alike."""
    cache = engine._running.manager.batch_processor.cache
    (allocator,) = cache.cache_allocators.values()
    return cache.compute_free_capacity(), len(allocator.ledger.cached_blocks) / cache.num_blocks


def is_idle(engine):
    return not engine._running.manager.batch_processor.has_pending_requests()


def test_streams_of_many_threads_are_the_sequential_answers(make_engine):
    asked = ask(40)
    expected = [g.token_ids for g in make_engine(scheduler="sequential").generate(asked)]
    engine = make_engine()
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(lambda request: list(engine.stream(request)), asked)) == expected


def test_tokens_come_as_they_are_written(make_engine, writer, monkeypatch):
    steps, forward = [], writer.forward
    monkeypatch.setattr(writer, "forward", lambda **kw: steps.append(1) or time.sleep(0.03) or forward(**kw))
    answer = make_engine().stream(ask(2)[1])
    assert not steps  # nothing is computed before somebody reads
    next(answer)
    assert len(steps) < 4
    assert len(list(answer)) == 19


@pytest.mark.parametrize("sharing", [True, False])
def test_a_cancelled_stream_costs_nothing_more_and_frees_its_place(make_engine, writer, sharing, monkeypatch):
    engine = make_engine(prefix_sharing=sharing)
    steps, forward = [], writer.forward
    monkeypatch.setattr(writer, "forward", lambda **kw: steps.append(1) or forward(**kw))
    answer = engine.stream(Request([5] * 30, 300))
    for _ in range(3):
        next(answer)
    answer.close()
    wait_for(lambda: is_idle(engine))
    done = len(steps)
    assert done < 100
    time.sleep(0.1)
    assert len(steps) == done
    assert sum(free_and_kept(engine)) == pytest.approx(1)
    assert engine._running.free == engine._running.pages and not engine._running.readers


def test_who_waits_for_room_gets_it_when_somebody_leaves(make_engine):
    engine = make_engine(batch_tokens=48)  # three pages
    first = engine.stream(Request([5] * 60, 100))
    next(first)
    request, said = ask(2)[1], []
    second = threading.Thread(target=lambda: said.extend(engine.stream(request)))
    second.start()
    time.sleep(0.1)
    assert said == []
    first.close()
    second.join(timeout=10)
    assert said == engine.generate([request])[0].token_ids


@pytest.mark.parametrize("sharing", [True, False])
def test_five_hundred_requests_leave_the_cache_as_it_was(make_engine, sharing):
    engine = make_engine(prefix_sharing=sharing)
    asked = ask(25, new_tokens=(2, 5, 3, 1, 4))
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            said = list(threads.map(lambda request: len(list(engine.stream(request))), asked))
            assert said == [request.max_new_tokens for request in asked]
    wait_for(lambda: is_idle(engine))
    free, kept = free_and_kept(engine)
    assert free + kept == pytest.approx(1)
    assert (kept > 0) == sharing
    engine._running.forget()
    assert free_and_kept(engine) == (1, 0)
    manager = engine._running.manager
    assert manager.output_router.output_queue.empty() and manager.input_queue.empty()
    assert not engine._running.readers and engine._running.free == engine._running.pages


def test_when_the_batch_dies_nobody_hangs(make_engine, make_llama):
    model = make_llama(layers=1)
    engine = make_engine(model=model)
    answer = engine.stream(Request([5, 6, 7], 200))
    next(answer)

    def fail(**kwargs):
        raise ValueError("out of luck")

    model.forward = fail
    with pytest.raises(EngineError, match="out of luck"):
        list(answer)
    wait_for(lambda: engine._running.dead)
    for again in (lambda: next(engine.stream(Request([5], 2))), lambda: engine.generate([Request([5], 2)])):
        with pytest.raises(EngineError, match=r"has stopped.*out of luck.*make a new engine"):
            again()


def test_closing_the_engine_ends_its_streams(make_engine):
    engine = make_engine()
    answer = engine.stream(Request([5] * 10, 300))
    next(answer)
    engine.close()
    with pytest.raises(EngineError, match="broke off"):
        list(answer)


def test_a_process_ends_though_nobody_closed_the_engine():
    script = (
        "from medkit.engines import Request; from medkit.models import make_toy_model\n"
        "from medkit.torch_engine import TorchEngine\n"
        "answer = TorchEngine(make_toy_model(), 0, batch_tokens=100).stream(Request([5, 6], 300))\n"
        "print(next(answer) >= 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "True")
