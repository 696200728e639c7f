"""The promises of `train`: a kill changes nothing of what comes out. That slices do not either is in test_losses."""

import gc
import os
import weakref

import pandas as pd
import pytest
import torch
from toys import assert_same_weights

from medkit.lora import adapters
from medkit.modeling import batches, trainer
from medkit.params import AdapterParams
from medkit.stage import MedkitError


class Killed(RuntimeError):
    pass


def count_steps(model, dies_at=None):
    """A list that grows with every forward pass, of which a batch of one slice is one; dies instead of one."""
    seen = []

    def look(*args):
        if len(seen) + 1 == dies_at:
            raise Killed
        seen.append(1)

    model.register_forward_pre_hook(look)
    return seen


def test_training_learns_and_its_log_is_per_token(make_llama, make_examples, make_section, tmp_path):
    model, examples = make_llama(layers=2), make_examples(8)
    before = batches.predict_examples(model, examples).nll
    section = make_section(epochs=6.0, learning_rate=1e-2)
    log = trainer.train(model, examples, section, trainer.cross_entropy, tmp_path / "c", seed=0)
    tokens = sum(len(e.input_ids) - e.loss_start for e in examples)
    assert log.step.tolist() == list(range(1, 13))
    assert log.loss_tokens.groupby((log.step - 1) // 2).sum().tolist() == [tokens] * 6
    assert log.ce.to_numpy() == pytest.approx(log.loss.to_numpy(), abs=2e-4)  # the Trainer rounds its own
    assert not model.training
    assert batches.predict_examples(model, examples).nll.sum() < 0.7 * before.sum()


@pytest.mark.parametrize(("kind", "saved", "step"), [("after an epoch", 3, 4), ("within one", 2, 5), ("adapter", 2, 3)])
def test_a_killed_training_ends_bit_for_bit_where_an_uninterrupted_one_does(
    make_llama, make_examples, make_section, tmp_path, kind, saved, step
):
    """What a kill left of a checkpoint is not read."""
    examples, section = make_examples(12), make_section(save_every_steps=saved)
    adapter = AdapterParams(variant="lora", rank=2, alpha=4.0, dropout=0.1, target_modules=["q_proj", "down_proj"])

    def start(dies_at=None):
        model = make_llama(layers=1, attention_dropout=0.1)
        model = adapters.attach(model, adapter, seed=0) if kind == "adapter" else model
        return model, count_steps(model, dies_at)

    def train(model, folder):
        return trainer.train(model, examples, section, trainer.cross_entropy, tmp_path / folder, seed=0)

    (whole, _), (killed, _), (resumed, steps) = start(), start(dies_at=step), start()
    expected = train(whole, "whole")
    with pytest.raises(Killed):
        train(killed, "killed")
    (tmp_path / "killed" / "checkpoint-5").mkdir()
    (tmp_path / "killed" / "checkpoint-5" / "model.safetensors").write_bytes(b"half of it")
    log = train(resumed, "killed")
    assert len(steps) == 6 - (step - 1)
    assert_same_weights(resumed, whole)
    columns = ["step", "loss", "ce", "loss_tokens", "learning_rate"]
    pd.testing.assert_frame_equal(log[columns], expected[columns])


def test_the_first_epoch_goes_from_easy_to_hard_and_the_next_does_not(
    make_llama, make_examples, make_section, tmp_path
):
    examples, section, seen = make_examples(70), make_section(batch_size=2, slice_tokens=10_000), []
    difficulty = [(37 * n) % 70 for n in range(70)]
    note = lambda rows: seen.append(rows) or {}  # noqa: E731
    trainer.train(make_llama(layers=1), examples, section, trainer.cross_entropy, tmp_path, 0, note, difficulty)
    epochs = [[row for rows in part for row in rows] for part in (seen[:35], seen[35:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(70))] * 2
    parts = [[epoch[start : start + 16] for start in range(0, 70, 16)] for epoch in epochs]
    first, second = ([{difficulty[row] // 16 for row in part} for part in found] for found in parts)
    assert first == [{0}, {1}, {2}, {3}, {4}], "parts of eight batches, each harder than the one before"
    assert second != first
    inside = [difficulty[row] for row in epochs[0][:16]]
    assert inside != sorted(inside), "within a part the order is drawn"


def test_the_newest_checkpoint_stays_when_the_clock_is_set_back(make_llama, make_examples, make_section, tmp_path):
    """The Trainer would keep the one with the latest time of its folder."""

    def set_back(*args):
        for checkpoint in tmp_path.glob("checkpoint-2"):
            os.utime(checkpoint, (4e9, 4e9))
        return trainer.cross_entropy(*args)

    model = make_llama(layers=1)
    count_steps(model, dies_at=6)
    with pytest.raises(Killed):
        trainer.train(model, make_examples(12), make_section(), set_back, tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_loss_that_is_not_finite_names_its_step(make_llama, make_examples, make_section, tmp_path):
    calls = iter(range(1, 100))

    def sick(predicted, extras):
        loss, terms = trainer.cross_entropy(predicted, extras)
        return (loss * float("nan") if next(calls) == 2 else loss), terms

    with pytest.raises(MedkitError, match="nan at step 2"):
        trainer.train(make_llama(layers=2), make_examples(8), make_section(), sick, tmp_path / "c", seed=0)


def test_bf16_arithmetic_learns_what_float32_learns_at_a_small_learning_rate(
    make_llama, make_examples, make_section, tmp_path
):
    """At 1e-5 a step is smaller than bfloat16 can add to most weights: weights held in it would not change."""
    weights_by_dtype = []
    for bf16 in (False, True):
        model, section = make_llama(layers=2), make_section(bf16=bf16, learning_rate=1e-5, warmup_fraction=0.0)
        trainer.train(model, make_examples(8), section, trainer.cross_entropy, tmp_path / str(bf16), seed=0)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        weights_by_dtype.append(model.state_dict())
    start = make_llama(layers=2).state_dict()
    for name, expected in weights_by_dtype[0].items():
        moved, expected = weights_by_dtype[1][name] - start[name], expected - start[name]
        used = expected != 0  # rows of tokens that do not occur stay as they are
        assert (moved[used].sign() == expected[used].sign()).float().mean() > 0.9, name
        assert (start[name] + moved).bfloat16().eq(start[name].bfloat16()).float().mean() > 0.8, "bfloat16 loses them"


def test_a_trained_model_is_gone_when_it_is_deleted(make_llama, make_examples, make_section, tmp_path):
    """A model that holds itself would keep its memory until Python looks for garbage: too late for a GPU."""
    model = make_llama(layers=1)
    reference, section = weakref.ref(model), make_section(bf16=True, gradient_checkpointing=True)
    gc.collect()
    gc.disable()
    try:
        trainer.train(model, make_examples(4), section, trainer.cross_entropy, tmp_path, seed=0)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_weights_held_in_bfloat16_are_refused(make_llama, make_examples, make_section, tmp_path):
    model = make_llama(layers=2).bfloat16()
    with pytest.raises(MedkitError, match=r"weight learns but is not float32, .* load_for_training"):
        trainer.train(model, make_examples(8), make_section(), trainer.cross_entropy, tmp_path, seed=0)
