"""The sparse KL against the dense one, its gradient, the cache of signals on disk, and the pruned student."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medkit import batching, distillation, models, training
from medkit.distillation import SignalsError, sparse_kl, top_k_logprobs

PAD, VOCAB = 0, 300


def random_logits(rows, vocab, seed=0, scale=3.0, dtype=torch.float32):
    return scale * torch.randn(rows, vocab, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense_kl(student, teacher, temperature=1.0):
    p, q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_with_k_equal_to_the_vocabulary_it_is_the_dense_kl(temperature):
    student, teacher = random_logits(6, 50), random_logits(6, 50, seed=1)
    found = sparse_kl(student, *top_k_logprobs(teacher, 50), temperature)
    torch.testing.assert_close(found, dense_kl(student, teacher, temperature), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("k", [1, 2, 10, 49, 50])
def test_it_is_zero_where_student_and_teacher_are_equal(k, temperature):
    logits = random_logits(20, 50)
    found = sparse_kl(logits, *top_k_logprobs(logits, k), temperature)
    torch.testing.assert_close(found, torch.zeros(20), rtol=0, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 10, 50])
def test_it_is_positive_where_they_differ(k, temperature):
    student, teacher = random_logits(20, 50), random_logits(20, 50, seed=1)
    found = sparse_kl(student, *top_k_logprobs(teacher, k), temperature)
    assert (found > 1e-6).all() and found.mean() > 0.1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), vocab=st.integers(2, 12), scale=st.floats(0.1, 8.0), data=st.data())
def test_it_grows_with_k_up_to_the_dense_kl(seed, vocab, scale, data):
    k = data.draw(st.integers(1, vocab - 1))
    student, teacher = (random_logits(1, vocab, s, scale, torch.float64) for s in (seed, seed + 1))
    fewer, more = (sparse_kl(student, *top_k_logprobs(teacher, n)).item() for n in (k, k + 1))
    assert -1e-5 <= fewer <= more + 1e-5
    assert more <= dense_kl(student, teacher).item() + 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_its_gradient_is_right(k, temperature):
    student, teacher = (random_logits(4, 7, seed, scale=1.0, dtype=torch.float64) for seed in (0, 1))
    ids, logprobs = top_k_logprobs(teacher, k)
    assert torch.autograd.gradcheck(lambda x: sparse_kl(x, ids, logprobs, temperature), student.requires_grad_())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_a_student_that_equals_its_teacher_is_left_alone(k, temperature):
    student = random_logits(4, 7, dtype=torch.float64).requires_grad_()
    sparse_kl(student, *top_k_logprobs(student.detach(), k), temperature).sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_four_tokens_by_hand(temperature):
    """Teacher ½ ¼ ⅛ ⅛ with two tokens kept, student ¼ each. The tail's tokens are alike, so tempering it is exact."""
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    ids, logprobs = top_k_logprobs(teacher.log(), 2)
    tempered = (teacher ** (1 / temperature)).squeeze()
    p = torch.stack([tempered[0], tempered[1], tempered[2:].sum()]) / tempered.sum()
    expected = (p * (p / torch.tensor([0.25, 0.25, 0.5])).log()).sum().item()
    if temperature == 1:
        assert expected == pytest.approx(0.25 * math.log(2))
    assert sparse_kl(torch.zeros(1, 4), ids, logprobs, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_top_k_is_taken_after_the_softmax_over_all():
    logits = random_logits(5, 50)
    ids, logprobs = top_k_logprobs(logits, 8)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, ids))
    assert (logprobs.diff(dim=-1) <= 0).all()
    assert (logprobs.exp().sum(-1) < 1).all()
    assert top_k_logprobs(logits, 80)[0].shape == (5, 50)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0], ids=["flat", "usual", "sure of itself"])
def test_half_precision_signals_keep_it_near_zero_and_finite(scale):
    logits = random_logits(200, 100, scale=scale).requires_grad_()
    ids, logprobs = top_k_logprobs(logits.detach(), 20)
    found = sparse_kl(logits, ids, logprobs.half().float())
    found.sum().backward()
    assert found.min() > -1e-5 and found.max() < 1e-2
    assert torch.isfinite(logits.grad).all()


def test_kd_loss_without_kl_is_the_weighted_cross_entropy():
    logits, targets = random_logits(6, 20), torch.arange(6)
    ids, logprobs = top_k_logprobs(random_logits(6, 20, seed=1), 4)
    extras = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    loss, terms = distillation.make_kd_loss(0.7, 0.0, 2.0)(logits, targets, extras)
    ce, _ = training.cross_entropy(logits, targets, {})
    assert loss.item() == pytest.approx(0.7 * ce.item())
    assert terms["ce"].item() == pytest.approx(ce.item())
    assert terms["kl"].item() > 0 and not terms["kl"].requires_grad


def test_kd_loss_scales_the_kl_by_the_squared_temperature():
    logits, targets = random_logits(6, 20), torch.arange(6)
    ids, logprobs = top_k_logprobs(random_logits(6, 20, seed=1), 4)
    loss, terms = distillation.make_kd_loss(0.0, 0.5, 3.0)(
        logits, targets, {"teacher_ids": ids, "teacher_logprobs": logprobs}
    )
    assert loss.item() == pytest.approx(0.5 * 9 * sparse_kl(logits, ids, logprobs, 3.0).sum().item())
    assert terms["kl"].item() == pytest.approx(loss.item() / 4.5)


def test_two_tokenizers_need_one_vocabulary(tokenizer, make_tokenizer):
    distillation.check_same_vocabulary(tokenizer, make_tokenizer())
    other = make_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(SignalsError, match="<extra>"):
        distillation.check_same_vocabulary(tokenizer, other)


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(make_llama):
    return make_llama(initializer_range=0.5)  # sure of itself: positions differ, so that a mix-up shows


def capture(teacher, examples, folder, k=8, shard=3, key="teacher 1"):
    return distillation.capture_signals(teacher, examples, folder, k, shard, PAD, key)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_signals_come_back_as_they_were_spoken(teacher, make_examples, tmp_path):
    examples = make_examples(8)
    index = capture(teacher, examples, tmp_path)
    signals = distillation.Signals(tmp_path, "teacher 1")
    assert index["num_positions"] == sum(len(e.input_ids) - e.loss_start for e in examples)
    for number, example in enumerate(examples):
        true = batching.collect_logits(teacher, [example], PAD).log_softmax(-1)
        ids, logprobs = signals.example(number)
        assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, top_k_logprobs(true, 8)[1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logprobs, true.gather(-1, ids), rtol=1e-3, atol=1e-3)


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


def test_a_killed_capture_goes_on(teacher, make_examples, tmp_path, monkeypatch):
    examples, calls = make_examples(8), iter(range(3))
    save_file = distillation.save_file
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "save_file", lambda *args: save_file(*args) if next(calls) == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            capture(teacher, examples, tmp_path / "killed")
    first = times(tmp_path / "killed")
    assert set(first) == {"signals.json", "00000.safetensors"}
    capture(teacher, examples, tmp_path / "killed")
    capture(teacher, examples, tmp_path / "whole")
    assert first.items() <= times(tmp_path / "killed").items()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change", [{"key": "teacher 2"}, {"k": 4}, {"shard": 4}, {"examples": 1}], ids=lambda c: next(iter(c))
)
def test_another_request_begins_the_cache_anew(teacher, make_examples, tmp_path, change):
    capture(teacher, make_examples(8), tmp_path)
    examples = make_examples(8, seed=change.pop("examples", 0))
    capture(teacher, examples, tmp_path, **change)
    signals = distillation.Signals(tmp_path, change.get("key", "teacher 1"))
    assert len(signals.shards) == math.ceil(8 / change.get("shard", 3))
    for number, example in enumerate(examples):
        assert signals.example(number)[0].shape == (len(example.input_ids) - example.loss_start, change.get("k", 8))


def test_signals_of_another_teacher_are_refused(teacher, make_examples, tmp_path):
    capture(teacher, make_examples(2), tmp_path)
    with pytest.raises(SignalsError, match="teacher 2"):
        distillation.Signals(tmp_path, "teacher 2")


def test_no_signals_are_refused(tmp_path):
    with pytest.raises(SignalsError):
        distillation.Signals(tmp_path, "teacher 1")


def test_signals_with_a_shard_missing_are_refused(teacher, make_examples, tmp_path):
    capture(teacher, make_examples(8), tmp_path)
    (tmp_path / "00000.safetensors").unlink()
    with pytest.raises(SignalsError):
        distillation.Signals(tmp_path, "teacher 1")


def test_k_beyond_the_vocabulary_keeps_all_of_it(teacher, make_examples, tmp_path):
    capture(teacher, make_examples(2), tmp_path, k=VOCAB + 50)
    ids, logprobs = distillation.Signals(tmp_path, "teacher 1").example(1)
    assert ids.shape[1] == VOCAB
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(len(ids)), rtol=0, atol=1e-2)


@pytest.mark.parametrize("shift", [0, 1], ids=["in order", "one example late"])
def test_signals_arrive_in_the_order_of_the_predicted_positions(
    make_llama, make_examples, make_section, tmp_path, shift
):
    """A student that hears itself has nothing to learn: its KL is 0, unless positions are mixed up (the control)."""
    student, examples = make_llama(initializer_range=0.5), make_examples(10)
    examples = [batching.Example(e.input_ids[-6:], 2) for e in examples]  # alike in length, so the control fits
    capture(student, examples, tmp_path / "signals")
    signals = distillation.Signals(tmp_path / "signals", "teacher 1")

    def add_extras(numbers):
        return signals.batch([(n + shift) % len(examples) for n in numbers])

    section = make_section(epochs=1.0, learning_rate=1e-6)
    loss = distillation.make_kd_loss(0.0, 1.0, 1.0)
    log = training.train(student, examples, section, loss, tmp_path / "c", PAD, seed=0, add_extras=add_extras)
    assert (log.kl > 0.1).all() if shift else (log.kl < 1e-3).all()


def test_a_student_learns_from_signals_alone(make_llama, teacher, make_examples, make_section, tmp_path):
    examples, student = make_examples(8), make_llama(seed=1)
    capture(teacher, examples, tmp_path / "signals", k=16)
    signals = distillation.Signals(tmp_path / "signals", "teacher 1")
    section = make_section(epochs=8.0, learning_rate=1e-2, save_every_steps=100)
    loss = distillation.make_kd_loss(0.0, 1.0, 1.0)
    log = training.train(student, examples, section, loss, tmp_path / "c", PAD, seed=0, add_extras=signals.batch)
    assert log.kl.tail(2).mean() < 0.5 * log.kl.head(2).mean()


# --- the pruned student --------------------------------------------------------------------------------------------


def test_importance_is_the_loss_of_the_model_without_the_layer(make_llama, make_examples):
    model, examples = make_llama(layers=4), make_examples(5)

    def nll(model):
        return np.mean(batching.collect_nll(model, examples, PAD))

    without = [models.keep_layers(copy.deepcopy(model), [i for i in range(4) if i != cut]) for cut in range(4)]
    expected = [nll(cut) - nll(model) for cut in without]
    assert distillation.measure_layer_importance(model, examples, PAD) == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3


def test_measuring_importance_leaves_the_model_as_it_was(make_llama, make_examples):
    model, examples = make_llama(), make_examples(3)
    before = batching.collect_logits(model, examples, PAD)
    distillation.measure_layer_importance(model, examples, PAD)
    assert torch.equal(batching.collect_logits(model, examples, PAD), before)
    assert not [layer for layer in model.get_decoder().layers if "forward" in vars(layer)]


def test_the_most_important_layers_stay_in_their_order():
    assert distillation.choose_layers([0.3, -0.1, 0.9, 0.2], 2) == [0, 2]
    assert distillation.choose_layers([0.3, -0.1, 0.9, 0.2], 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="num_layers is 5, the model has 4"):
        distillation.choose_layers([0.3, -0.1, 0.9, 0.2], 5)
