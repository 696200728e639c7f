"""Every scheduler writes the greedy tokens, honours arrivals and lengths, and graphs and prefixes change nothing."""

import time

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from medkit.inference import running_batch, torch_engine
from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import EngineError, Request
from medkit.modeling.option_scoring import Item, score_options

PAD, VOCAB = 0, 300
BATCH_TOKENS = 100


@pytest.fixture(scope="module")
def writer(make_llama):
    """Untied and sharp: its greedy text varies, and no two tokens are nearly alike."""
    return make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3)


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def workload():
    return [Request(p, n) for p, n in zip(random_prompts((5, 70, 3, 21, 9)), (4, 20, 9, 3, 12), strict=True)]


@torch.no_grad()
def plainly(model, request):
    """Greedy by the definition: the whole sequence is read again for each token."""
    text = list(request.prompt_ids)
    for _ in range(request.max_new_tokens):
        text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
    return text[len(request.prompt_ids) :]


@pytest.fixture(scope="module")
def reference(writer, workload):
    said = [plainly(writer, request) for request in workload]
    assert len(set(said[1])) > 5
    return said


@pytest.fixture
def make_engine(writer):
    """engine(scheduler, model=…, **options), closed after the test."""
    made = []

    def make(scheduler="continuous", model=writer, batch_tokens=BATCH_TOKENS, **options):
        made.append(TorchEngine(model, PAD, scheduler=scheduler, batch_tokens=batch_tokens, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def tokens_of(generations):
    return [generation.token_ids for generation in generations]


# --- the same tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_greedy_token_by_token(make_engine, workload, reference, scheduler):
    found = make_engine(scheduler).generate(workload)
    assert tokens_of(found) == reference
    for generation in found:
        assert len(generation.token_times_s) == len(generation.token_ids)
        assert generation.token_times_s[0] > generation.begun_s >= 0
        assert generation.token_times_s == sorted(generation.token_times_s)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_request_has_its_own_end_tokens_and_they_belong_to_it(make_engine, workload, reference, scheduler):
    asked, expected = [], []
    for number, (request, said) in enumerate(zip(workload, reference, strict=True)):
        ends = (said[len(said) // 2], 299) if number % 2 else ()
        asked.append(Request(request.prompt_ids, request.max_new_tokens, ends))
        expected.append(said[: said.index(ends[0]) + 1] if ends else said)
    assert len(expected[1]) < len(reference[1]) and expected[0] == reference[0]
    found = make_engine(scheduler).generate(asked)
    assert tokens_of(found) == expected
    assert [len(g.token_times_s) for g in found] == [len(said) for said in expected]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_greedy_is_greedy_whatever_the_checkpoint_recommends(
    make_engine, make_llama, tokenizer, models_params, tmp_path, workload, reference, scheduler
):
    """Checkpoints bring a generation_config, e.g. sampling and a repetition penalty."""
    model = make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=1.8, eos_token_id=reference[1][6]
    )
    loaded = loading.load_model(loading.save_model(model, tokenizer, tmp_path / "model"), models_params)
    assert tokens_of(make_engine(scheduler, loaded).generate(workload)) == reference


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_attention_is_the_models_and_stays_so(make_engine, make_llama, workload, reference, scheduler, attention):
    model = make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3, attn_implementation=attention)
    engine = make_engine(scheduler, model)
    assert tokens_of(engine.generate(workload)) == reference
    assert list(engine.stream(workload[1])) == reference[1]
    engine.close()
    assert model.config._attn_implementation == attention


def test_static_batches_hold_no_more_tokens_than_they_may(make_engine, workload, reference, monkeypatch):
    engine, seen = make_engine("static", batch_tokens=32), []
    write = engine._write
    monkeypatch.setattr(engine, "_write", lambda batch, began: seen.append(batch) or write(batch, began))
    assert tokens_of(engine.generate(workload)) == reference
    most = torch_engine.WRITING * 32
    assert len(seen) > 1
    assert all(len(b) * max(len(r.prompt_ids) + r.max_new_tokens for r in b) <= most for b in seen)


def test_what_does_not_fit_together_joins_when_there_is_room(make_engine, writer):
    """Ten requests of two or three pages share a cache of six; each is read once, so every token has one time."""
    lengths = [70, 130, 90, 64, 128, 100, 65, 127, 66, 140]
    asked = [Request(prompt, 30) for prompt in random_prompts(lengths, seed=3)]
    pages = sum(map(running_batch.pages_of, asked))
    engine = make_engine()
    assert pages > 3 * torch_engine.WRITING * BATCH_TOKENS // running_batch.PAGE_TOKENS
    found = engine.generate(asked)
    assert tokens_of(found) == [plainly(writer, request) for request in asked]
    assert all(len(g.token_times_s) == 30 for g in found)


@pytest.mark.parametrize("sharing", [True, False])
def test_shared_prefixes_change_no_answer_and_are_read_once(make_engine, writer, sharing, monkeypatch):
    shared = random_prompts([3 * running_batch.PAGE_TOKENS], seed=1)[0]
    asked = [Request([*shared, *tail], 8) for tail in random_prompts([9] * 6, seed=2)]
    engine = make_engine(batch_tokens=1000, prefix_sharing=sharing)
    read, forward = [], writer.forward
    monkeypatch.setattr(writer, "forward", lambda **kw: read.append(kw["input_ids"].shape[1]) or forward(**kw))
    for _ in range(2):  # the second call begins as cold as the first
        read.clear()
        found = engine.generate(asked)
        everything = sum(len(request.prompt_ids) for request in asked) + 6 * 7
        assert (sum(read) <= everything - 3 * len(shared)) if sharing else (sum(read) == everything)
    monkeypatch.undo()
    assert tokens_of(found) == [plainly(writer, request) for request in asked]


# --- arrivals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_nothing_begins_before_it_arrives(make_engine, workload, reference, scheduler):
    arrivals_s = [0.3, 0.0, 0.15, 0.3, 0.0]
    asked = [Request(r.prompt_ids, r.max_new_tokens, (), at) for r, at in zip(workload, arrivals_s, strict=True)]
    found = make_engine(scheduler).generate(asked)
    assert tokens_of(found) == reference
    assert all(g.token_times_s[0] > g.begun_s >= at for g, at in zip(found, arrivals_s, strict=True))


def test_a_static_batch_takes_in_what_has_arrived(make_engine, workload, monkeypatch):
    engine, seen = make_engine("static", batch_tokens=1000), []
    write = engine._write
    monkeypatch.setattr(engine, "_write", lambda batch, began: seen.append(len(batch)) or write(batch, began))
    asked = [Request(r.prompt_ids, 2, (), at) for r, at in zip(workload, [0, 0, 0.4, 0, 0.4], strict=True)]
    engine.generate(asked)
    assert seen == [3, 2]


# --- graphs and the 8-bit cache ------------------------------------------------------------------------------------


@pytest.fixture
def traced_only(monkeypatch):
    """Graphs are traced and counted but not turned into machine code, which takes seconds each."""
    monkeypatch.setattr(
        torch_engine, "CompileConfig", lambda mode, dynamic: CompileConfig(backend="eager", mode=None, dynamic=dynamic)
    )
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("scheduler", ["sequential", "static"])
def test_graphs_equal_eager_in_few_shapes(make_engine, make_llama, workload, reference, scheduler, traced_only):
    model = make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3)
    engine = make_engine(scheduler, model, batch_tokens=1000, graphs=True)
    engine.warm_up(workload)
    warm = counters["stats"]["unique_graphs"]
    shapes = {engine._shape([workload[i] for i in b]) for b in engine._batches(range(len(workload)), workload)}
    assert warm == len(shapes) == {"sequential": 2, "static": 1}[scheduler]
    assert engine.warmup_s > 0
    for asked, expected in ((workload, reference), (workload[::-1], reference[::-1])):
        assert tokens_of(engine.generate(asked)) == expected
    assert counters["stats"]["unique_graphs"] == warm


def test_compiled_steps_equal_eager(make_engine, make_llama):
    """One graph through the C++ compiler: about 20 seconds of processor, a quarter of it once torch has cached it."""
    model = make_llama(layers=1, tie_word_embeddings=False, initializer_range=0.3)
    asked = [Request(prompt, 8) for prompt in random_prompts([5, 9])]
    engine = make_engine("static", model, graphs=True)
    assert tokens_of(engine.generate(asked)) == [plainly(model, request) for request in asked]


def test_graphs_need_a_compiler(make_engine, monkeypatch):
    monkeypatch.setattr(torch_engine.shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match="C\\+\\+ compiler"):
        make_engine("static", graphs=True)


@pytest.mark.parametrize("scheduler", ["sequential", "static"])
def test_the_8_bit_cache_is_one_byte_per_value(make_engine, workload, reference, scheduler, monkeypatch):
    engine, caches = make_engine(scheduler, fp8_cache=True), []
    fresh = engine._new_cache
    monkeypatch.setattr(engine, "_new_cache", lambda tokens: caches.append(fresh(tokens)) or caches[-1])
    found = tokens_of(engine.generate(workload))
    assert [len(said) for said in found] == [len(said) for said in reference]
    assert [said[0] for said in found] == [said[0] for said in reference]  # a prompt is read in full precision
    for layer in caches[0].layers:
        assert layer._quantized_keys[0].dtype == layer._quantized_values[0].dtype == torch.float8_e4m3fn


# --- scoring, limits, the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_those_of_the_model_also_beside_streams(make_engine, make_llama, workload, attention):
    model = make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3, attn_implementation=attention)
    items = [Item([5, 9, 17, 33], [[4, 8], [21], [7, 7, 7]]), Item([50] * 11, [[3], [9, 9]])]
    expected, written = score_options(model, items, BATCH_TOKENS, PAD), plainly(model, workload[1])
    engine = make_engine(model=model)
    answer = engine.stream(workload[1])
    said = [next(answer)]
    for found, wanted in zip(engine.score(items), expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-5)
    assert said + list(answer) == written


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_prompt_too_long_for_the_model_is_refused_in_numbers(make_engine, scheduler):
    engine = make_engine(scheduler, batch_tokens=1024)
    for ask in (lambda r: engine.generate([r]), engine.stream, lambda r: engine.warm_up([r])):
        with pytest.raises(EngineError, match=r"prompt of 1000 tokens and 25 new ones make 1025.* at most 1024"):
            ask(Request([5] * 1000, 25))
    with pytest.raises(EngineError, match="at least one of each"):
        engine.generate([Request([], 5)])


def test_a_request_larger_than_the_running_batch_is_refused(make_engine):
    engine = make_engine(batch_tokens=32)
    for ask in (lambda r: engine.generate([r]), engine.stream):
        with pytest.raises(EngineError, match=r"take 3 pages of cache, there are 2; raise batch_tokens \(32\)"):
            ask(Request([5] * 120, 9))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scheduler": "best"}, "scheduler 'best': give one of sequential, static, continuous"),
        ({"scheduler": "continuous", "graphs": True}, "on CUDA only"),
        ({"scheduler": "continuous", "fp8_cache": True}, "use sequential or static"),
        ({"scheduler": "static", "fp8_cache": True, "graphs": True}, "without pages and graphs only"),
    ],
)
def test_what_cannot_be_had_is_said_at_once(make_engine, options, said):
    with pytest.raises(EngineError, match=said):
        make_engine(**options)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_closed_engine_says_so(make_engine, workload, scheduler):
    engine = make_engine(scheduler)
    engine.generate(workload[:1])
    engine.close()
    engine.close()
    for ask in (engine.generate, lambda r: engine.stream(r[0]), lambda r: engine.score([Item([5], [[7]])])):
        with pytest.raises(EngineError, match="is closed"):
            ask(workload)


def test_no_requests_are_no_work(make_engine):
    began = time.perf_counter()
    assert [make_engine(scheduler).generate([]) for scheduler in SCHEDULERS] == [[], [], []]
    assert time.perf_counter() - began < 1
