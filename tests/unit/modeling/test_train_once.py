"""What was made from the same things is read back; anything else is made again."""

import json
import os
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from toys import assert_same_weights

from medkit.distillation.losses import DistillationLoss
from medkit.lora import adapters
from medkit.modeling import loading, train_once, trainer
from medkit.params import AdapterParams
from medkit.stage import MedkitError, Stage, StageError, lock_run

ADAPTER = {"variant": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]}


@pytest.fixture
def stage(outputs):
    return Stage("toy", "02_distillation")


@pytest.fixture
def trainings(monkeypatch):
    """A list that grows with every training."""
    calls, train = [], trainer.train
    monkeypatch.setattr(trainer, "train", lambda *args, **options: calls.append(1) or train(*args, **options))
    return calls


@pytest.fixture
def train(stage, make_llama, make_examples, make_section, tokenizer):
    """train(model, examples, **section): the model after `train_once`, and its log."""

    def train(model=None, examples=4, options=None, **section):
        model, examples = model or make_llama(layers=1), make_examples(examples)
        arguments = (stage, "student", model, tokenizer, examples, make_section(epochs=1.0, **section))
        return model, train_once.train_once(*arguments, trainer.cross_entropy, 0, **(options or {}))

    return train


def attached(model, **changes):
    return adapters.attach(model, AdapterParams(**{**ADAPTER, **changes}), seed=0)


@pytest.mark.parametrize("variant", [None, "lora"])
def test_a_finished_training_is_read_back_to_the_bit(stage, trainings, train, make_llama, variant):
    models = [make_llama(layers=1) for _ in range(2)]
    if variant:
        models = [attached(model, variant=variant) for model in models]
    logs = [train(model)[1] for model in models]
    assert len(trainings) == 1
    took = json.loads((stage.dir / "student.record.json").read_text())["facts"]["duration_s"]
    assert took > 0 and stage.started <= time.monotonic() - took  # a run that goes on counts it
    assert_same_weights(models[1], models[0])
    pd.testing.assert_frame_equal(*logs)
    assert (stage.dir / "student" / ("adapter_config.json" if variant else "tokenizer.json")).is_file()


CHANGES = ["examples", "loss", "extras", "learning_rate", "bf16", "seed", "start", "alpha", "difficulty", "code"]
DAMAGES = ["record lost", "file lost", "file cut short"]


@pytest.mark.parametrize("change", [*CHANGES, *DAMAGES, "gradient_checkpointing"])
def test_only_what_can_change_the_numbers_trains_again(
    stage, make_llama, make_examples, make_section, tokenizer, monkeypatch, change
):
    trainings = []
    monkeypatch.setattr(trainer, "train", lambda *args, **options: trainings.append(1) or pd.DataFrame({"loss": [1.0]}))

    def train(loss_weight=1.0, seed=0, start=0, alpha=4.0, examples=0, options=None, **section):
        return train_once.train_once(
            stage, "adapter", attached(make_llama(layers=1, seed=start), alpha=alpha), tokenizer,
            make_examples(4, seed=examples), make_section(**section), DistillationLoss(ce_weight=loss_weight), seed,
            **(options or {}),
        )  # fmt: skip

    train()
    weights = stage.dir / "adapter" / "adapter_model.safetensors"
    changed = {
        "loss": {"loss_weight": 2.0},
        "extras": {"options": {"add_extras": lambda rows: {"teacher_ids": torch.ones(len(rows), 1)}}},
        "difficulty": {"options": {"difficulty": range(4)}},
        "learning_rate": {"learning_rate": 2e-3},
        "alpha": {"alpha": 8.0},
        **{name: {name: True} for name in ("bf16", "gradient_checkpointing")},
        **{name: {name: 1} for name in ("examples", "seed", "start")},
    }
    if change == "code":
        monkeypatch.setattr(train_once, "digest_functions", lambda *functions: "another source")
    elif change == "record lost":
        (stage.dir / "adapter.record.json").unlink()
    elif change == "file lost":
        weights.unlink()
    elif change == "file cut short":
        os.truncate(weights, 100)
    train(**changed.get(change, {}))
    assert len(trainings) == (1 if change == "gradient_checkpointing" else 2)


def test_the_key_covers_the_source_of_the_loss_and_the_library_versions(monkeypatch):
    def key(*functions):
        return train_once.key_of({"rank": 2}, ["inputs"], *functions)

    assert key(trainer.train) == key(trainer.train)
    assert key(trainer.train) != key(trainer.train, DistillationLoss)
    monkeypatch.setattr(train_once, "library_versions", lambda: {"torch": "2.13.0+cpu", "peft": None})
    before = key(trainer.train)
    monkeypatch.setattr(train_once, "library_versions", lambda: {"torch": "2.13.0+cu130", "peft": None})
    assert key(trainer.train) == before, "the same release for another device"
    monkeypatch.setattr(train_once, "library_versions", lambda: {"torch": "2.14.0+cpu", "peft": None})
    assert key(trainer.train) != before


def test_killed_before_the_record_the_old_one_does_not_vouch_for_new_weights(trainings, train, monkeypatch):
    first, _ = train(learning_rate=1e-3)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_once, "write_text", lambda *_, **__: 1 / 0)
        train(learning_rate=1e-2)
    assert_same_weights(train(learning_rate=1e-3)[0], first)
    assert len(trainings) == 3


def test_no_examples_is_one_sentence(train):
    with pytest.raises(MedkitError, match=r"no training examples: raise .* data\.datasets"):
        train(examples=0, options={"add_extras": lambda rows: {"some": torch.zeros(len(rows))}})


def test_checkpoints_of_other_settings_are_removed_and_training_opens_the_stage(stage, train):
    stage.commit()
    for rate in (1e-3, 2e-3):
        train(examples=8, learning_rate=rate)
    assert not stage.manifest()
    key = json.loads((stage.dir / "student.record.json").read_text())["key"]
    assert [path.name for path in (stage.dir / "checkpoints" / "student").iterdir()] == [key]


def test_weights_learn_in_float32_whatever_the_profile_computes_in(tmp_path, make_llama, tokenizer, models_params):
    folder = loading.save_model(make_llama(layers=1).bfloat16(), tokenizer, tmp_path / "model")
    bf16 = models_params.model_copy(update={"dtype": "bfloat16"})
    assert train_once.load_for_training(folder, bf16).dtype == torch.float32
    base = train_once.load_for_training(folder, bf16, adapter=True)
    assert base.dtype == torch.bfloat16
    assert {p.dtype for p in attached(base).parameters() if p.requires_grad} == {torch.float32}


def test_a_run_that_is_in_use_is_left_alone(stage, models_params):
    opened = train_once.open_stage("toy", "03_lora", SimpleNamespace(models=models_params))
    with lock_run("toy"), pytest.raises(StageError, match="another process works on it"), opened:
        pass
