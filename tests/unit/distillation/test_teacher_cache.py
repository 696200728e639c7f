"""The teacher cache: what is read back is what the teacher computed, whatever happened in between."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from medkit.distillation import teacher_cache
from medkit.distillation.losses import DistillationLoss
from medkit.distillation.teacher_cache import TeacherCache, capture_teacher, top_k_logprobs
from medkit.modeling import batches, trainer
from medkit.modeling.batches import Example
from medkit.stage import MedkitError

VOCAB, KEY = 300, "teacher 1"


@pytest.fixture(scope="module")
def teacher(make_llama):
    return make_llama(initializer_range=0.5)  # far from uniform: positions differ, so that a mix-up shows


def capture(teacher, examples, folder, k=8, shard=3, key=KEY, **more):
    return capture_teacher(lambda: teacher, examples, folder, k, shard, key, **more)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_log_probabilities_come_back_as_they_were_computed(teacher, make_examples, tmp_path):
    examples = make_examples(8)
    cache = capture(teacher, examples, tmp_path)
    outside = 0
    for number, example in enumerate(examples):
        true = batches.collect_logits(teacher, [example]).log_softmax(-1)
        cached = cache.example(number)
        ids, logprobs = cached["teacher_ids"], cached["teacher_logprobs"]
        assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, top_k_logprobs(true, 8)[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logprobs, true.gather(-1, ids), rtol=1e-3, atol=1e-3)
        targets = torch.tensor(example.input_ids[example.loss_start :])
        expected = true[torch.arange(len(targets)), targets]
        torch.testing.assert_close(cached["teacher_target_logprobs"], expected, rtol=1e-3, atol=1e-3)
        outside += (ids != targets[:, None]).all(1).sum()
    assert outside > 10  # target tokens that are not among the k
    assert cache.mean_nll() == pytest.approx(batches.predict_examples(teacher, examples).nll, rel=1e-3)


def test_a_batch_is_its_examples_one_after_the_other_with_the_states_that_predict(teacher, make_examples, tmp_path):
    examples, numbers = make_examples(8), [5, 0, 7, 5]
    cache = capture(teacher, examples, tmp_path, hidden_layers=(0, 2))
    batch, alone = cache.batch(numbers), [cache.example(number) for number in numbers]
    assert len(batch["teacher_ids"]) == sum(examples[n].num_predicted for n in numbers)
    names = {"teacher_ids", "teacher_logprobs", "teacher_target_logprobs", "teacher_hidden_0", "teacher_hidden_2"}
    assert batch.keys() == names
    assert all(torch.equal(batch[name], torch.cat([one[name] for one in alone])) for name in names)
    for number, cached in zip(numbers, alone, strict=True):
        example = examples[number]
        with torch.no_grad():
            true = teacher(torch.tensor([example.input_ids]), output_hidden_states=True).hidden_states
        for layer in (0, 2):
            states = true[layer][0, example.loss_start - 1 : -1]
            torch.testing.assert_close(cached[f"teacher_hidden_{layer}"], states, rtol=1e-3, atol=1e-3)


def test_values_that_the_files_cannot_hold_are_refused(make_llama, make_examples, tmp_path):
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(MedkitError, match=r"hidden_0.*largest fp16 number is 65504; remove this layer"):
        capture(model, make_examples(2), tmp_path, hidden_layers=(0,))


SIZES = [2, 300, 2**16, 2**16 + 1, 151_936, 262_144, 262_208, 2**20]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SIZES), st.integers(1, 70), st.integers(0, 5), st.integers(0, 1000))
def test_ids_come_back_exactly(vocab_size, k, rows, seed):
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, k))
    ids[:1, :1] = vocab_size - 1
    packed = teacher_cache.pack_ids(ids, vocab_size)
    unpacked = teacher_cache.unpack_ids(packed, k, vocab_size)
    assert unpacked.dtype == np.int64 and np.array_equal(unpacked, ids)
    assert packed.shape == (rows, math.ceil(k * math.ceil(math.log2(vocab_size)) / 8))


def test_a_position_costs_at_most_300_bytes(make_llama, tmp_path):
    """All files of the cache, headers, offsets and index too, at the shard size of the default profile."""
    vocab_size, positions = 262_144, 3 * 256  # the vocabulary of Gemma 3
    teacher = make_llama(vocab_size=vocab_size, hidden_size=8, head_dim=2, layers=1)
    examples = [Example([n % 900, n // 900, 5, 6, 7, 8], 3) for n in range(256)]
    cache = capture(teacher, examples, tmp_path, 64, 64)
    content = sum(array.nbytes for path in tmp_path.glob("*.safetensors") for array in load_file(path).values())
    assert content - 4 * (len(examples) + 4) == 274 * positions
    assert cache.bytes_per_position <= sum(path.stat().st_size for path in tmp_path.iterdir()) / positions <= 300
    ids = cache.example(40)["teacher_ids"]
    assert torch.equal(ids, top_k_logprobs(batches.collect_logits(teacher, [examples[40]]), 64)[0])
    assert ids.max() >= 2**16


def test_a_damaged_shard_is_named_and_a_second_capture_mends_it(teacher, make_examples, tmp_path):
    examples, path = make_examples(8), tmp_path / "00001.safetensors"
    capture(teacher, examples, tmp_path)
    content = path.read_bytes()
    others = {name: at for name, at in times(tmp_path).items() if name not in (path.name, teacher_cache.INDEX)}
    one_bit = content[:99] + bytes([content[99] ^ 1]) + content[100:]
    for damaged in (content[:-100], one_bit, None):
        path.write_bytes(damaged) if damaged else path.unlink()
        with pytest.raises(MedkitError, match=r"00001\.safetensors is missing or damaged; run the capture again"):
            TeacherCache(tmp_path, KEY, examples)
        capture(teacher, examples, tmp_path)
        assert path.read_bytes() == content
    assert others.items() <= times(tmp_path).items()


def test_a_teacher_is_loaded_once_and_only_for_what_is_missing(teacher, make_examples, tmp_path):
    examples, loaded = make_examples(8), []

    def load():
        loaded.append(1)
        return teacher

    for missing, expected in (((), 1), ((), 1), (("00000", "00002"), 2), (("index",), 3), ((), 3)):
        for name in missing:
            next(tmp_path.glob(f"{name}.*")).unlink()
        cache = capture_teacher(load, examples, tmp_path, 8, 3, KEY)
        assert len(loaded) == expected and len(cache.shards) == 3 and cache.index["vocab_size"] == VOCAB
    assert capture_teacher(load, examples, tmp_path, 8, 3, "teacher 2").index["key"] == "teacher 2" and len(loaded) == 4


def test_a_killed_capture_goes_on(teacher, make_examples, tmp_path, monkeypatch):
    examples, calls = make_examples(8), iter(range(3))
    save_file = teacher_cache.save_file
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "save_file", lambda *args: save_file(*args) if next(calls) == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            capture(teacher, examples, tmp_path / "killed", hidden_layers=(1,))
    first = times(tmp_path / "killed")
    assert set(first) == {"index.json", "00000.safetensors"}
    capture(teacher, examples, tmp_path / "killed", hidden_layers=(1,))
    capture(teacher, examples, tmp_path / "whole", hidden_layers=(1,))
    assert times(tmp_path / "killed")["00000.safetensors"] == first["00000.safetensors"]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", [{"key": "teacher 2"}, {"hidden_layers": (2,)}, {"seed": 1}], ids=str)
def test_other_settings_start_the_cache_again_and_leave_other_files_alone(teacher, make_examples, tmp_path, change):
    capture(teacher, make_examples(8), tmp_path, shard=2)
    first, others = times(tmp_path), ["notes.txt", "model.safetensors", "option_scores.json", "00099.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    examples = make_examples(5, seed=change.pop("seed", 0))
    cache = capture(teacher, examples, tmp_path, **change)
    assert not set(first.items()) & set(times(tmp_path).items())
    shards = {f"0000{n}.safetensors" for n in range(2)}
    assert {path.name for path in tmp_path.iterdir()} == {*others, *shards, "index.json"}
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    for number, example in enumerate(examples):
        assert cache.example(number)["teacher_ids"].shape == (example.num_predicted, 8)


def test_a_cache_of_another_teacher_or_of_other_rows_is_refused(teacher, make_examples, tmp_path):
    examples = make_examples(2)
    with pytest.raises(MedkitError, match="the cache has key None"):
        TeacherCache(tmp_path, KEY, examples)
    index = capture(teacher, examples, tmp_path).index
    with pytest.raises(MedkitError, match=r"teacher 1.*needs 'teacher 2'; capture the teacher again"):
        TeacherCache(tmp_path, "teacher 2", examples)
    with pytest.raises(MedkitError, match="of other rows than these; capture the teacher again"):
        TeacherCache(tmp_path, KEY, examples[::-1])
    (tmp_path / "index.json").write_bytes(b"{\xff")
    with pytest.raises(MedkitError, match="capture the teacher again"):
        TeacherCache(tmp_path, KEY, examples)
    assert capture(teacher, examples, tmp_path).index == index


@pytest.mark.parametrize("shift", [0, 1], ids=["in order", "one example late"])
def test_values_arrive_in_the_order_of_the_positions(make_llama, make_examples, make_section, tmp_path, shift):
    """A student that is its own teacher has no loss, unless the rows are mixed up (the control)."""
    student, examples = make_llama(initializer_range=0.5), make_examples(10)
    examples = [Example(e.input_ids[-6:], 2) for e in examples]  # of one length, so the control fits
    cache = capture(student, examples, tmp_path / "cache", k=VOCAB)

    def add_extras(numbers):
        return cache.batch([(n + shift) % len(examples) for n in numbers])

    section, loss = make_section(epochs=1.0, learning_rate=1e-6), DistillationLoss(kl_weight=1.0)
    log = trainer.train(student, examples, section, loss, tmp_path / "c", seed=0, add_extras=add_extras)
    assert (log.forward_kl > 0.1).all() if shift else (log.forward_kl.abs() < 2e-3).all()
