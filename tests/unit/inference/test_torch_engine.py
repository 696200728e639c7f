"""Every scheduler writes the greedy tokens of the model, of the lengths asked for, within its cache."""

import logging

import pytest
import torch

from medkit.inference import torch_engine
from medkit.inference.torch_engine import SCHEDULERS, TorchEngine
from medkit.modeling import loading
from medkit.modeling.engine import EngineError, Request

PAD, VOCAB = 0, 300
BATCH_TOKENS = 100


@pytest.fixture(scope="module")
def writer(make_llama):
    """Untied and sharp: its greedy text varies, and no two tokens are nearly equally likely."""
    return make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3)


def random_prompts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module")
def workload():
    return [Request(p, n) for p, n in zip(random_prompts((5, 70, 3, 21, 9)), (4, 20, 9, 3, 12), strict=True)]


@torch.no_grad()
def greedy(model, request):
    """Greedy by the definition: the whole sequence is read again for each token."""
    text = list(request.prompt_ids)
    for _ in range(request.max_new_tokens):
        text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
    return text[len(request.prompt_ids) :]


@pytest.fixture(scope="module")
def reference(writer, workload):
    answers = [greedy(writer, request) for request in workload]
    assert len(set(answers[1])) > 5
    return answers


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


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_writes_the_greedy_tokens(make_engine, make_llama, workload, reference, scheduler, attention):
    model = make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3, attn_implementation=attention)
    engine = make_engine(scheduler, model)
    for _ in range(2):
        answers = engine.generate(workload)
        assert tokens_of(answers) == reference
        for answer in answers:
            assert len(answer.token_times_s) == len(answer.token_ids)
            assert answer.token_times_s[0] > answer.begun_s >= 0
            assert answer.token_times_s == sorted(answer.token_times_s)
    assert engine.generate([]) == []
    engine.close()
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_request_has_its_own_end_tokens_and_no_warning(make_engine, workload, reference, scheduler, monkeypatch):
    warnings, requests, expected = [], [], []
    monkeypatch.setattr(logging.Logger, "warning", lambda logger, message, *args: warnings.append(message))
    for number, (request, answer) in enumerate(zip(workload, reference, strict=True)):
        ends = (answer[len(answer) // 2], 299) if number % 2 else ()
        requests.append(Request(request.prompt_ids, request.max_new_tokens, ends))
        expected.append(answer[: answer.index(ends[0]) + 1] if ends else answer)
    assert len(expected[1]) < len(reference[1]) and expected[0] == reference[0]
    answers = make_engine(scheduler).generate(requests)
    assert tokens_of(answers) == expected
    assert [len(answer.token_times_s) for answer in answers] == [len(tokens) for tokens in expected]
    assert not [message for message in warnings if "eos_token_id" in str(message)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_greedy_is_greedy_whatever_the_checkpoint_recommends(
    make_engine, make_llama, tokenizer, models_params, tmp_path, workload, reference, scheduler
):
    model = make_llama(layers=2, tie_word_embeddings=False, initializer_range=0.3)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=1.8, eos_token_id=reference[1][6]
    )
    loaded = loading.load_model(loading.save_model(model, tokenizer, tmp_path / "model"), models_params)
    assert tokens_of(make_engine(scheduler, loaded).generate(workload)) == reference


def test_static_batches_hold_no_more_tokens_than_they_may(make_engine, workload, reference, monkeypatch):
    engine, seen = make_engine("static", batch_tokens=32), []
    run = engine._generate_batch
    monkeypatch.setattr(engine, "_generate_batch", lambda batch, began: seen.append(batch) or run(batch, began))
    assert tokens_of(engine.generate(workload)) == reference
    assert len(seen) > 1
    most = torch_engine.CACHE_FACTOR * 32
    assert all(len(b) * max(len(r.prompt_ids) + r.max_new_tokens for r in b) <= most for b in seen)


def test_requests_wait_until_the_cache_has_room_and_are_read_once(make_engine, writer):
    """Ten requests of two or three pages share a cache of six. A request that is read twice loses its times."""
    lengths = [70, 130, 90, 64, 128, 100, 65, 127, 66, 140]
    requests = [Request(prompt, 30) for prompt in random_prompts(lengths, seed=3)]
    answers = make_engine().generate(requests)
    assert tokens_of(answers) == [greedy(writer, request) for request in requests]
    assert all(len(answer.token_times_s) == 30 for answer in answers)


@pytest.mark.parametrize("sharing", [True, False])
def test_shared_prefixes_change_no_answer_and_are_read_once(make_engine, writer, sharing, monkeypatch):
    shared = random_prompts([3 * torch_engine.PAGE_TOKENS], seed=1)[0]
    requests = [Request([*shared, *tail], 8) for tail in random_prompts([9] * 6, seed=2)]
    engine = make_engine(batch_tokens=1000, prefix_sharing=sharing)
    read, forward = [], writer.forward
    monkeypatch.setattr(writer, "forward", lambda **kw: read.append(kw["input_ids"].shape[1]) or forward(**kw))
    answers = engine.generate(requests)
    monkeypatch.undo()
    everything = sum(len(request.prompt_ids) for request in requests) + 6 * 7
    assert (sum(read) <= everything - 3 * len(shared)) if sharing else (sum(read) == everything)
    assert tokens_of(answers) == [greedy(writer, request) for request in requests]


def test_a_batch_that_fails_raises_and_does_not_hang(make_engine, make_llama):
    model = make_llama(layers=1)
    engine = make_engine(model=model)
    engine.generate([Request([5, 6, 7], 2)])

    def fail(**kwargs):
        raise ValueError("out of luck")

    model.forward = fail
    for _ in range(2):
        with pytest.raises(EngineError, match=r"continuous batching.*make a new one"):
            engine.generate([Request([5, 6, 7], 2)])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_requests_that_do_not_fit_are_refused(make_engine, scheduler):
    engine = make_engine(scheduler, batch_tokens=1024)
    with pytest.raises(EngineError, match=r"prompt of 1000 tokens and 25 new tokens make 1025.* at most 1024"):
        engine.generate([Request([5] * 1000, 25)])
    engine.close()


def test_settings_that_do_not_exist_are_refused(make_engine):
    with pytest.raises(EngineError, match="take 3 pages of the KV cache, it has 2; raise batch_tokens"):
        make_engine(batch_tokens=32).generate([Request([5] * 120, 9)])
    with pytest.raises(EngineError, match="scheduler 'best': give one of sequential, static, continuous"):
        make_engine("best")
