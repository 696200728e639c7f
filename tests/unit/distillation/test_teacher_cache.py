"""Teacher signals: what comes back from disk is what was said, whoever said it and whatever happened in between."""

import json
import math
import random
import threading
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from medkit import serving
from medkit.distillation import shards, teacher_cache
from medkit.distillation.teacher_cache import (
    Signals,
    SignalsError,
    capture_from_server,
    capture_signals,
    top_k_logprobs,
)
from medkit.inference.server_engine import RemoteEngine
from medkit.inference.torch_engine import TorchEngine
from medkit.modeling import batches, trainer
from medkit.modeling.batches import Example
from medkit.modeling.engine import EngineError, PromptLogprobs
from medkit.modeling.option_scoring import Item, score_options

PAD, VOCAB, KEY, MODEL = 0, 300, "teacher 1", "toy"


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(initializer_range=0.5)  # sure of itself: positions differ, so that a mix-up shows


def capture(teacher, examples, folder, k=8, shard=3, key=KEY, **more):
    return capture_signals(teacher, examples, folder, k, shard, key, **more)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def shard_times(folder):
    return {name: at for name, at in times(folder).items() if name.endswith(".safetensors")}


class Parrot:
    """Says random things about prompts, equal ones about equal prompts; as large a vocabulary as is wanted."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size

    def prompt_logprobs(self, prompt_ids, k):
        draw = np.random.default_rng(list(prompt_ids))
        ids = [draw.choice(self.vocab_size, k, replace=False).tolist() for _ in prompt_ids]
        values = (-np.sort(draw.exponential(8, (len(prompt_ids), k)), axis=1)).tolist()
        return PromptLogprobs(ids, values, (-draw.exponential(8, len(prompt_ids) - 1)).tolist())


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_top_k_is_taken_after_the_softmax_over_all():
    logits = 3 * torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    ids, logprobs = top_k_logprobs(logits, 8)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, ids))
    assert (logprobs.diff(dim=-1) <= 0).all()
    assert (logprobs.exp().sum(-1) < 1).all()
    assert top_k_logprobs(logits, 80)[0].shape == (5, 50)


def test_signals_come_back_as_they_were_spoken(teacher, make_examples, tmp_path):
    examples = make_examples(8)
    index = capture(teacher, examples, tmp_path)
    found = Signals(tmp_path, KEY)
    assert index["num_positions"] == sum(len(e.input_ids) - e.loss_start for e in examples)
    outside = 0
    for number, example in enumerate(examples):
        true = batches.collect_logits(teacher, [example]).log_softmax(-1)
        said = found.example(number)
        ids, logprobs = said["teacher_ids"], said["teacher_logprobs"]
        assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, top_k_logprobs(true, 8)[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logprobs, true.gather(-1, ids), rtol=1e-3, atol=1e-3)
        targets = torch.tensor(example.input_ids[example.loss_start :])
        expected = true[torch.arange(len(targets)), targets]
        torch.testing.assert_close(said["teacher_target_logprobs"], expected, rtol=1e-3, atol=1e-3)
        outside += (ids != targets[:, None]).all(1).sum()
    assert outside > 10  # of tokens that the kept k do not name


def test_a_batch_is_its_examples_one_after_the_other(teacher, make_examples, tmp_path):
    examples, numbers = make_examples(8), [5, 0, 7, 5]
    capture(teacher, examples, tmp_path, hidden_layers=(1, 3))
    found = Signals(tmp_path, KEY)
    batch, alone = found.batch(numbers), [found.example(number) for number in numbers]
    assert len(batch["teacher_ids"]) == sum(examples[n].num_predicted for n in numbers)
    for name in ("teacher_ids", "teacher_logprobs", "teacher_target_logprobs"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone]))
    for layer in (1, 3):
        assert torch.equal(batch["teacher_hidden"][layer], torch.cat([one["teacher_hidden"][layer] for one in alone]))


def test_hidden_states_are_those_that_predict(teacher, make_examples, tmp_path):
    examples = make_examples(5)
    capture(teacher, examples, tmp_path, hidden_layers=(0, 2))
    for number, example in enumerate(examples):
        with torch.no_grad():
            true = teacher(torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
        found = Signals(tmp_path, KEY).example(number)["teacher_hidden"]
        assert set(found) == {0, 2}
        for layer, states in found.items():
            expected = true[layer][0, example.loss_start - 1 : -1]
            torch.testing.assert_close(states, expected, rtol=1e-3, atol=1e-3)
    assert "teacher_hidden" not in capture_and_read(teacher, examples, tmp_path / "none").example(0)


def capture_and_read(teacher, examples, folder, **more):
    capture(teacher, examples, folder, **more)
    return Signals(folder, KEY)


def test_hidden_states_beyond_fp16_are_refused(make_llama, make_examples, tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(SignalsError, match=r"hidden_0.*fp16 holds 65504: leave that layer out"):
        capture(model, make_examples(2), tmp_path, hidden_layers=(0,))


def test_k_beyond_the_vocabulary_keeps_all_of_it(teacher, make_examples, tmp_path):
    said = capture_and_read(teacher, make_examples(2), tmp_path, k=VOCAB + 50).example(1)
    assert said["teacher_ids"].shape[1] == VOCAB
    total = said["teacher_logprobs"].exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(len(total)), rtol=0, atol=1e-2)


# --- the file --------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    vocab_size=st.sampled_from([2, 300, 2**16, 2**16 + 1, 128_256, 151_936, 262_144, 262_208, 2**20]),
    k=st.integers(1, 70),
    rows=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_ids_come_back_exactly(vocab_size, k, rows, seed):
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, k))
    ids[:1, :1] = vocab_size - 1
    packed = shards.pack_ids(ids, vocab_size)
    found = shards.unpack_ids(packed["ids_low"], packed.get("ids_high"), vocab_size)
    assert found.dtype == np.int64 and np.array_equal(found, ids)
    assert ("ids_high" in packed) == (vocab_size > 2**16)


@pytest.mark.parametrize(
    ("vocab_size", "expected"), [(49_152, 258), (151_936, 274), (262_144, 274)], ids=["SmolLM2", "Qwen2", "Gemma 3"]
)
def test_a_token_costs_at_most_300_bytes(vocab_size, expected, tmp_path):
    """All files of the cache, headers, offsets and index too, at the shard size of the default profile."""
    examples = [Example([n % 900, n // 900, 5, 6, 7, 8], 3) for n in range(256)]
    index = capture_from_server(Parrot(vocab_size), examples, tmp_path, 64, 64, KEY, vocab_size)
    content = sum(array.nbytes for path in tmp_path.glob("*.safetensors") for array in load_file(path).values())
    offsets = 4 * (len(examples) + 4)
    assert content - offsets == expected * index["num_positions"]
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written / index["num_positions"] <= 300
    for number, example in enumerate(examples[::40]):
        said, ids = Parrot(vocab_size).prompt_logprobs(example.input_ids, 64), slice(2, 5)
        assert Signals(tmp_path, KEY).example(40 * number)["teacher_ids"].tolist() == said.top_ids[ids]


def test_a_layer_of_hidden_states_costs_two_bytes_a_number(teacher, make_examples, tmp_path):
    index = capture(teacher, make_examples(6), tmp_path, hidden_layers=(1,))
    stored = [load_file(path)["hidden_1"] for path in tmp_path.glob("*.safetensors")]
    assert sum(states.nbytes for states in stored) == 2 * teacher.config.hidden_size * index["num_positions"]


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(SignalsError, match="its vocabulary has 300: give vocab_size as its number of logits"):
        capture_from_server(Parrot(70_000), [Example([1, 2, 3], 1)], tmp_path, 8, 4, KEY, vocab_size=300)


# --- a cache that is whole, of this teacher, and no other ----------------------------------------------------------


def test_a_lost_shard_alone_is_spoken_again(teacher, make_examples, tmp_path):
    examples = make_examples(8)
    capture(teacher, examples, tmp_path)
    before = times(tmp_path)
    assert len([name for name in before if name.endswith(".safetensors")]) == 3
    content = (tmp_path / "00001.safetensors").read_bytes()
    (tmp_path / "00001.safetensors").unlink()
    capture(teacher, examples, tmp_path)
    after = times(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {"00001.safetensors"}
    assert (tmp_path / "00001.safetensors").read_bytes() == content


def cut(content):
    return content[: len(content) - 100]


def scramble(content):
    return b"\xff" * 16 + content[16:]


@pytest.mark.parametrize("damage", [cut, scramble, lambda content: b""], ids=["cut short", "scrambled", "empty"])
def test_a_damaged_shard_is_named_and_a_second_capture_mends_it(teacher, make_examples, tmp_path, damage):
    examples = make_examples(8)
    capture(teacher, examples, tmp_path)
    path = tmp_path / "00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    others = {name: at for name, at in times(tmp_path).items() if name != path.name}
    with pytest.raises(SignalsError, match=r"00001\.safetensors is damaged .*run the capture again"):
        Signals(tmp_path, KEY)
    capture(teacher, examples, tmp_path)
    assert path.read_bytes() == content
    assert others.items() <= times(tmp_path).items()


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_noticed_and_a_second_capture_mends_it(teacher, make_examples, tmp_path):
    examples = make_examples(8)
    capture(teacher, examples, tmp_path)
    path, draw = tmp_path / "00001.safetensors", random.Random(0)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [draw.randrange(header, len(content)) for _ in range(20)]:
        flip(path, place, draw.randrange(8))
        with pytest.raises(SignalsError, match=r"00001\.safetensors is damaged \(its sha256.*run the capture again"):
            Signals(tmp_path, KEY).example(4)
        assert Signals(tmp_path, KEY).example(0), "the other shards can be read"
        path.write_bytes(content)
    flip(path, len(content) - 1, 3)
    others = {name: at for name, at in times(tmp_path).items() if name != path.name}
    assert capture_and_read(teacher, examples, tmp_path).example(4)
    assert path.read_bytes() == content
    assert others.items() <= times(tmp_path).items()


def test_a_shard_is_checked_once_and_only_if_it_is_read(teacher, make_examples, tmp_path, monkeypatch):
    capture(teacher, make_examples(14), tmp_path, shard=1)
    read, sha256_of = [], shards.sha256_of
    monkeypatch.setattr(shards, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    found = Signals(tmp_path, KEY)
    assert read == []
    for number in [*range(7), *range(7)]:  # more than are kept open
        found.example(number)
    assert read == [f"{number:05d}.safetensors" for number in range(7)]


def test_an_index_that_is_no_json_is_no_cache(teacher, make_examples, tmp_path):
    index = capture(teacher, make_examples(2), tmp_path)
    (tmp_path / "signals.json").write_bytes(b"{\xff")
    with pytest.raises(SignalsError, match="signals of None, the run wants"):
        Signals(tmp_path, KEY)
    assert capture_and_read(teacher, make_examples(2), tmp_path).index == index


def test_the_mean_nll_is_that_of_the_teacher(teacher, make_examples, tmp_path):
    examples = make_examples(8)
    found = capture_and_read(teacher, examples, tmp_path).mean_nll()
    assert found == pytest.approx(batches.collect_nll(teacher, examples), rel=1e-3)


def test_a_killed_capture_goes_on(teacher, make_examples, tmp_path, monkeypatch):
    examples, calls = make_examples(8), iter(range(3))
    save_file = shards.save_file
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", lambda *args: save_file(*args) if next(calls) == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            capture(teacher, examples, tmp_path / "killed", hidden_layers=(1,))
    first = times(tmp_path / "killed")
    assert set(first) == {"signals.json", "00000.safetensors"}
    capture(teacher, examples, tmp_path / "killed", hidden_layers=(1,))
    capture(teacher, examples, tmp_path / "whole", hidden_layers=(1,))
    assert times(tmp_path / "killed")["00000.safetensors"] == first["00000.safetensors"]
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


def assert_same_files(ours, theirs):
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
    for path in theirs.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"key": "teacher 2"}, {"k": 4}, {"shard": 4}, {"hidden_layers": (2,)}, {"examples": 1}],
    ids=lambda c: next(iter(c)),
)
def test_another_request_begins_the_cache_anew(teacher, make_examples, tmp_path, change):
    capture(teacher, make_examples(8), tmp_path)
    first = times(tmp_path)
    examples = make_examples(8, seed=change.get("examples", 0))
    change = {name: value for name, value in change.items() if name != "examples"}
    capture(teacher, examples, tmp_path, **change)
    assert not set(first.items()) & set(times(tmp_path).items())
    assert len(list(tmp_path.glob("*.safetensors"))) == math.ceil(8 / change.get("shard", 3))
    found = Signals(tmp_path, change.get("key", KEY))
    for number, example in enumerate(examples):
        shape = (len(example.input_ids) - example.loss_start, change.get("k", 8))
        assert found.example(number)["teacher_ids"].shape == shape


def test_signals_of_another_teacher_are_refused(teacher, make_examples, tmp_path):
    capture(teacher, make_examples(2), tmp_path)
    with pytest.raises(SignalsError, match=r"teacher 1.*wants 'teacher 2'; capture them again"):
        Signals(tmp_path, "teacher 2")


def test_signals_of_an_older_format_are_refused_and_replaced(teacher, make_examples, tmp_path):
    examples = make_examples(2)
    index = capture(teacher, examples, tmp_path)
    (tmp_path / "signals.json").write_text(json.dumps({**index, "format": 1}))
    with pytest.raises(SignalsError, match="older format; run capture_signals again"):
        Signals(tmp_path, KEY)
    assert capture_and_read(teacher, examples, tmp_path).index == index


def test_no_signals_are_refused(tmp_path):
    with pytest.raises(SignalsError):
        Signals(tmp_path, KEY)


def test_signals_with_a_shard_missing_are_refused(teacher, make_examples, tmp_path):
    capture(teacher, make_examples(8), tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(SignalsError, match=r"shards \[0\] of 3 are missing; run capture_signals again"):
        Signals(tmp_path, KEY)


# --- reading takes little memory -------------------------------------------------------------------------------------


def mapped(folder):
    """Files of the folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if str(folder) in line}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_reading_holds_a_few_shards_and_not_the_cache(tmp_path):
    examples = [Example([n, *range(40)], 9) for n in range(480)]
    capture_from_server(Parrot(49_152), examples, tmp_path, 64, 8, KEY, 49_152)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    tracemalloc.start()
    found = Signals(tmp_path, KEY)
    for start in range(0, len(order), 4):
        found.batch(order[start : start + 4])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    most = 0
    for number in order[:100]:
        found.example(number)
        most = max(most, len(mapped(tmp_path)))
    assert 1 <= most <= teacher_cache.MOST_OPEN < 60 == len(list(tmp_path.glob("*.safetensors")))
    assert peak < total / 8, (peak, total)  # a batch is a 120th of the cache, widened to int64 and float32
    del found
    assert not mapped(tmp_path)


# --- in training -----------------------------------------------------------------------------------------------------


def dense_kl(predicted, extras):
    """The KL to a teacher of whom everything is kept."""
    student = predicted.logits.log_softmax(-1).gather(-1, extras["teacher_ids"])
    teacher = extras["teacher_logprobs"]
    kl = (teacher.exp() * (teacher - student)).sum()
    return kl, {"kl": kl.detach()}


@pytest.mark.parametrize("shift", [0, 1], ids=["in order", "one example late"])
def test_signals_arrive_in_the_order_of_the_predicted_positions(
    make_llama, make_examples, make_section, tmp_path, shift
):
    """A student that hears itself has nothing to learn: its KL is 0, unless positions are mixed up (the control)."""
    student, examples = make_llama(initializer_range=0.5), make_examples(10)
    examples = [Example(e.input_ids[-6:], 2) for e in examples]  # alike in length, so the control fits
    found = capture_and_read(student, examples, tmp_path / "signals", k=VOCAB)

    def add_extras(numbers):
        return found.batch([(n + shift) % len(examples) for n in numbers])

    section = make_section(epochs=1.0, learning_rate=1e-6)
    log = trainer.train(student, examples, section, dense_kl, tmp_path / "c", seed=0, add_extras=add_extras)
    assert (log.kl > 0.1).all() if shift else (log.kl.abs() < 2e-3).all()


def test_a_student_learns_from_signals_alone(make_llama, teacher, make_examples, make_section, tmp_path):
    examples, student = make_examples(8), make_llama(seed=1)
    found = capture_and_read(teacher, examples, tmp_path / "signals", k=VOCAB)
    section = make_section(epochs=8.0, learning_rate=1e-2, save_every_steps=100)
    log = trainer.train(student, examples, section, dense_kl, tmp_path / "c", seed=0, add_extras=found.batch)
    assert log.kl.tail(2).mean() < 0.5 * log.kl.head(2).mean()


# --- a teacher behind a server ---------------------------------------------------------------------------------------


@contextmanager
def running(app):
    """A real server on a port of its own; yields it, with its `url`."""
    server = serving.make_server(app, port=0) if hasattr(app.state, "line") else None
    server = server or uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        server.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
        yield server
    finally:
        server.should_exit = True
        thread.join(20)


class Watched(TorchEngine):
    """Counts what is read at once; may end its server at a prompt."""

    last, server = math.inf, None

    def __init__(self, model):
        super().__init__(model, PAD, scheduler="sequential", batch_tokens=1024)
        self.read = self.at_once = self.most_at_once = 0
        self.counting = threading.Lock()

    def prompt_logprobs(self, prompt_ids, k):
        with self.counting:
            self.read, self.at_once = self.read + 1, self.at_once + 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            if self.read == self.last:
                self.server.should_exit = True
                time.sleep(0.4)  # until it has closed its door
        try:
            return super().prompt_logprobs(prompt_ids, k)
        finally:
            with self.counting:
                self.at_once -= 1


@contextmanager
def serving_a(engine, tokenizer, **limits):
    limits = serving.Limits(context_tokens=1024, grace_s=5.0, **limits)
    with running(serving.create_app(engine, tokenizer, model_name=MODEL, limits=limits)) as server:
        engine.server = server
        yield server.url


def ask(url, tokenizer, examples, folder, k=8, shard=3, key=KEY, vocab_size=VOCAB, **more):
    remote = RemoteEngine(url, MODEL, tokenizer, timeout_s=20)
    try:
        return capture_from_server(remote, examples, folder, k, shard, key, vocab_size, **more)
    finally:
        remote.close()


@pytest.fixture
def spoken(make_examples, tokenizer):
    """Eleven examples of tokens that the tokenizer has, not only the model."""
    return [Example([min(i, len(tokenizer) - 1) for i in e.input_ids], e.loss_start) for e in make_examples(11)]


def assert_same_signals(ours, theirs):
    ours, theirs = Signals(ours, KEY), Signals(theirs, KEY)
    assert {**ours.index, "sha256": None} == {**theirs.index, "sha256": None}
    for number in range(ours.index["num_examples"]):
        a, b = ours.example(number), theirs.example(number)
        assert torch.equal(a["teacher_ids"], b["teacher_ids"])
        for name in ("teacher_logprobs", "teacher_target_logprobs"):
            # 2⁻¹⁰: what fp16 rounds away; 1e-5: sums of padded and of single prompts differ so much in fp32
            torch.testing.assert_close(a[name], b[name], rtol=2**-10, atol=1e-5)


def test_a_served_teacher_says_what_the_resident_one_says(teacher, tokenizer, spoken, tmp_path):
    engine = Watched(teacher)
    with serving_a(engine, tokenizer) as url:
        ask(url, tokenizer, spoken, tmp_path / "served", at_once=3)
    assert engine.read == 11 and 1 < engine.most_at_once <= 3
    capture(teacher, spoken, tmp_path / "resident")
    assert_same_signals(tmp_path / "served", tmp_path / "resident")


def test_a_server_that_dies_midway_leaves_what_it_said(teacher, tokenizer, spoken, tmp_path):
    first = Watched(teacher)
    first.last = 7
    cure = "cannot be reached.*Whole shards stay in .*; the same call goes on|shutting down.*the same call goes on"
    with serving_a(first, tokenizer) as url, pytest.raises(SignalsError, match=cure):
        ask(url, tokenizer, spoken, tmp_path / "served", at_once=1)
    kept = shard_times(tmp_path / "served")
    assert {"00000.safetensors", "00001.safetensors"} <= set(kept) and "00003.safetensors" not in kept
    second = Watched(teacher)
    with serving_a(second, tokenizer) as url:
        ask(url, tokenizer, spoken, tmp_path / "served")
    assert second.read == 11 - 3 * len(kept)
    assert kept.items() <= times(tmp_path / "served").items()
    capture(teacher, spoken, tmp_path / "resident")
    assert_same_signals(tmp_path / "served", tmp_path / "resident")


def test_a_capture_killed_at_a_shard_goes_on_with_the_server(teacher, tokenizer, spoken, tmp_path, monkeypatch):
    calls = iter(range(9))
    save_file = shards.save_file
    with serving_a(Watched(teacher), tokenizer) as url:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "save_file", lambda *args: save_file(*args) if next(calls) < 2 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                ask(url, tokenizer, spoken, tmp_path / "killed")
        assert not (tmp_path / "killed" / "00002.safetensors").exists()
        ask(url, tokenizer, spoken, tmp_path / "killed")
        ask(url, tokenizer, spoken, tmp_path / "whole")
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


def test_long_prompts_are_read_in_pieces(teacher, monkeypatch):
    prompt = [random.Random(0).randrange(3, VOCAB) for _ in range(50)]
    engine = TorchEngine(teacher, PAD, scheduler="sequential", batch_tokens=1024)
    whole = engine.prompt_logprobs(prompt, 5)
    monkeypatch.setattr("medkit.inference.torch_engine.READING", 7)
    pieces = engine.prompt_logprobs(prompt, 5)
    with torch.no_grad():
        true = teacher(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for said in (whole, pieces):
        assert said.top_ids == true.topk(5).indices.tolist()
        np.testing.assert_allclose(said.top_logprobs, true.topk(5).values, atol=1e-4)
        expected = true[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        np.testing.assert_allclose(said.token_logprobs, expected, atol=1e-4)


# --- what the server of ours answers ---------------------------------------------------------------------------------

PROMPT = [5, 9, 17, 33, 40, 9]


@pytest.fixture(scope="module")
def echoing(teacher, tokenizer):
    with serving_a(Watched(teacher), tokenizer) as url, openai.OpenAI(base_url=url, api_key="-") as client:
        yield client


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_has_the_shape_of_openai_s(echoing, teacher, tokenizer, max_tokens):
    answer = echoing.completions.create(
        model=MODEL, prompt=PROMPT, echo=True, logprobs=2, max_tokens=max_tokens, extra_body={"return_token_ids": True}
    )
    with torch.no_grad():
        true = teacher(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    (choice,), size = answer.choices, len(PROMPT) + max_tokens
    ids = [*PROMPT, int(true[-1].argmax())][:size]
    found = choice.logprobs
    assert found.tokens == [tokenizer.decode([i]) for i in ids]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    assert len(found.token_logprobs) == len(found.top_logprobs) == size
    np.testing.assert_allclose(found.token_logprobs[1:], [true[n, i] for n, i in enumerate(ids[1:])], atol=1e-4)
    for n, (token, top) in enumerate(zip(ids[1:], found.top_logprobs[1:], strict=True)):
        expected = {tokenizer.decode([i]) for i in [*true[n].topk(2).indices.tolist(), token]}
        assert set(top) == expected and max(top.values()) == pytest.approx(true[n].max().item(), abs=1e-4)
    assert answer.usage.prompt_tokens == 6 and answer.usage.completion_tokens == max_tokens
    assert choice.model_extra["prompt_token_ids"] == PROMPT and choice.model_extra["token_ids"] == ids[6:]
    assert choice.text == tokenizer.decode(PROMPT)


def test_tokens_are_named_by_their_ids_on_request(echoing):
    more = {"return_tokens_as_token_ids": True}
    answer = echoing.completions.create(
        model=MODEL, prompt=PROMPT, echo=True, logprobs=2, max_tokens=0, extra_body=more
    )
    found = answer.choices[0].logprobs
    assert found.tokens == [f"token_id:{i}" for i in PROMPT]
    assert all(name.startswith("token_id:") for top in found.top_logprobs[1:] for name in top)


def test_options_are_scored_through_it(echoing, teacher, tokenizer):
    items = [Item(PROMPT, [[7, 9, 30], [250]]), Item([5], [[6], [8]])]
    remote = RemoteEngine(str(echoing.base_url), MODEL, tokenizer)
    for ours, theirs in zip(remote.score(items), score_options(teacher, items, 1024, PAD), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    remote.close()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"echo": None}, "told of a prompt only; send echo"),
        ({"logprobs": None}, "echo without logprobs"),
        ({"logprobs": 0}, "greater than or equal to 1"),
        ({"logprobs": 1000}, "less than or equal to 256"),
        ({"max_tokens": 2}, "send max_tokens 0 or 1"),
        ({"stream": True}, "no stream"),
        ({"prompt": [5] * 1025}, "more than the 1024 that fit"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_an_echo_cannot_do_is_refused(echoing, change, sentence):
    asked = {"model": MODEL, "prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 1, **change}
    with pytest.raises(openai.BadRequestError, match=sentence):
        echoing.completions.create(**asked)


def test_an_engine_that_cannot_tell_says_so(tokenizer, make_examples, tmp_path):
    class Mute:
        name = "mute"

        def close(self):
            pass

    with (
        serving_a(Mute(), tokenizer) as url,
        pytest.raises(SignalsError, match="engine mute tells no log-probabilities; serve a variant by transformers"),
    ):
        ask(url, tokenizer, make_examples(2), tmp_path)


# --- servers of others -----------------------------------------------------------------------------------------------


@contextmanager
def odd_server(parrot, change):
    """Answers as vLLM does, but for what `change` does to the answer; it may also return a status."""

    async def complete(request):
        body = await request.json()
        k, size = body["logprobs"], len(body["prompt"])
        said = parrot.prompt_logprobs(body["prompt"], k)
        written = said.top_ids[-1][0]
        ids = [*body["prompt"], written]
        values = [*said.token_logprobs, said.top_logprobs[-1][0]]
        tops = [  # vLLM: the token that stands there comes first, then the others, k of them or k + 1
            {f"token_id:{token}": value} | {f"token_id:{i}": v for i, v in zip(top, top_values, strict=True)}
            for token, value, top, top_values in zip(ids[1:], values, said.top_ids, said.top_logprobs, strict=True)
        ]
        logprobs = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [None, *values]}
        logprobs |= {"top_logprobs": [None, *tops], "text_offset": [0] * (size + 1)}
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": logprobs}
        status = change(body, choice)
        error = {"error": {"message": f"Requested prompt logprobs of {k}, which is greater than max allowed: 20"}}
        return JSONResponse(error if status else {"choices": [choice]}, status or 200)

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    with running(Starlette(routes=routes)) as server:
        yield server.url


def test_an_answer_in_vllm_s_form_is_understood(tokenizer, tmp_path):
    examples, parrot = [Example([n, 5, 6, 7, 8], 2) for n in range(4)], Parrot(5000)
    with odd_server(parrot, lambda body, choice: None) as url:
        ask(url, tokenizer, examples, tmp_path / "served", vocab_size=5000)
    capture_from_server(parrot, examples, tmp_path / "alone", 8, 3, KEY, 5000)
    assert_same_files(tmp_path / "served", tmp_path / "alone")


def fewer(body, choice):
    for top in choice["logprobs"]["top_logprobs"][1:]:
        while len(top) > 5:
            top.popitem()


def other_tokens(body, choice):
    choice["logprobs"]["tokens"][0] = "token_id:1"


def begins_anew(body, choice):
    for values in choice["logprobs"].values():
        values.insert(0, None)


def as_text(body, choice):
    choice["logprobs"]["tokens"] = ["a"] * len(choice["logprobs"]["tokens"])


def tops_as_text(body, choice):
    choice["logprobs"]["top_logprobs"][-1] = {chr(65 + i): -float(i) for i in range(8)}


def nothing(body, choice):
    choice["logprobs"] = None


def vllm_s_limit(body, choice):
    return 400


def bug(body, choice):
    return 500


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (fewer, "tells 5 log-probabilities of a token, 8 are asked for: ask for fewer"),
        (other_tokens, "read other tokens than were sent"),
        (begins_anew, "echoes no log-probabilities of the prompt"),
        (as_text, "names the token 'a' and not its id"),
        (tops_as_text, "names the token 'A' and not its id"),
        (nothing, "echoes no log-probabilities of the prompt"),
        (vllm_s_limit, "answered 400: Requested prompt logprobs of 8.*if it was started with --max-logprobs 8"),
        (bug, "answered 500"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_server_that_gives_something_else_is_refused(tokenizer, tmp_path, change, sentence):
    examples = [Example([n, 5, 6, 7, 8], 2) for n in range(2)]
    with odd_server(Parrot(300), change) as url, pytest.raises(SignalsError, match=sentence) as caught:
        ask(url, tokenizer, examples, tmp_path)
    assert isinstance(caught.value.__cause__, EngineError)
    assert not list(tmp_path.glob("*.safetensors"))
