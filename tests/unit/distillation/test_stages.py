"""A stage is trained once: what is there, made from the same things, is read back; anything else is made anew."""

import json
import os

import pandas as pd
import pytest
import torch
import yaml

from medkit.distillation import losses, on_policy, stages
from medkit.lora import adapters
from medkit.modeling import batches, loading, trainer
from medkit.params import load_params
from medkit.stage import ROOT, Stage, StageError

TRAIN = {
    **{"epochs": 1.0, "batch_size": 4, "slice_tokens": 200, "learning_rate": 1e-2, "warmup_fraction": 0.1},
    "save_every_steps": 9,
    "scale": None,
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory, make_llama, tokenizer):
    """The smoke profile as plain data, with a toy for a teacher."""
    folder = tmp_path_factory.mktemp("toy")
    loading.save_model(make_llama(layers=3), tokenizer, folder)
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    raw["models"]["teacher"] = {"source": {"kind": "local", "path": str(folder)}, "keep_layers": []}
    raw["models"] |= {"device": "cpu", "attention": "sdpa"}
    raw["distillation"] |= {"correction_train": TRAIN, "student_train": TRAIN}
    raw["lora"]["train"] = TRAIN
    return raw


@pytest.fixture
def load(raw, tmp_path):
    """load(**overrides with _ for the dot between sections): the toy's params."""

    def load(**overrides):
        path = tmp_path / "toy.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_params(path, {key.replace("__", "."): value for key, value in overrides.items()})

    return load


@pytest.fixture
def stage(tmp_path, monkeypatch, make_llama, tokenizer):
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    options = ["liver", "heart", "spleen"]
    rows = [(f"q{n}", "train", "choice", f"Which organ? {n}", "", options, n % 3) for n in range(7)]
    columns = ["id", "split", "kind", "question", "context", "options", "answer"]
    questions = pd.DataFrame(rows, columns=columns).assign(source="exam")
    data = Stage("toy", "01_data")
    data.write_table("questions.parquet", questions)
    data.commit()
    stage = Stage("toy", "02_distillation")
    loading.save_model(make_llama(layers=2, seed=1), tokenizer, stage.path("base"))
    return stage


def count(monkeypatch):
    """A list that grows with every training."""
    made, train = [], trainer.train

    def counted(*args, **kwargs):
        made.append(1)
        return train(*args, **kwargs)

    monkeypatch.setattr(trainer, "train", counted)
    return made


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_what_is_trained_already_is_read_back(stage, load, tokenizer, monkeypatch, make_examples):
    made, examples, params = count(monkeypatch), make_examples(9), load()
    first, log = stages.train_student(stage, params, "student_ce", examples, trainer.cross_entropy)
    again, known = stages.train_student(stage, params, "student_ce", examples, trainer.cross_entropy)
    assert len(made) == 1
    assert_same_weights(weights(again), weights(first))
    assert_same_weights(weights(loading.load_model(stage.dir / "student_ce", params.models)), weights(first))
    pd.testing.assert_frame_equal(known, log)


@pytest.mark.parametrize(
    "other", ["examples", "loss", "extras", "settings", "seed", "start", "difficulty", "half", "lost", "cut"]
)
def test_what_was_made_from_other_things_is_made_anew(
    stage, load, tokenizer, monkeypatch, make_llama, make_examples, other
):
    made, examples, params = count(monkeypatch), make_examples(9), load()
    loss, more = losses.DistillationLoss(ce_weight=1.0), {}
    stages.train_student(stage, params, "student_kd", examples, loss)
    if other == "examples":
        examples = make_examples(9, seed=1)
    elif other == "loss":
        loss = losses.DistillationLoss(ce_weight=2.0)
    elif other == "extras":
        more = {"add_extras": lambda rows: {"teacher_ids": torch.ones(len(rows), 1)}}
    elif other == "settings":
        params = load(distillation__student_train__learning_rate=2e-2)
    elif other == "seed":
        params = load(seed=1)
    elif other == "start":
        loading.save_model(make_llama(layers=2, seed=2), tokenizer, stage.path("base"))
    elif other == "difficulty":
        more = {"difficulty": range(9)}
    elif other == "half":
        (stage.dir / "student_kd.record.json").unlink()
    elif other == "lost":
        (stage.dir / "student_kd" / "config.json").unlink()
    else:
        os.truncate(stage.dir / "student_kd" / "model.safetensors", 1000)
    stages.train_student(stage, params, "student_kd", examples, loss, **more)
    assert len(made) == 2
    assert loading.load_model(stage.dir / "student_kd", params.models)


def test_how_many_devices_there_are_is_no_reason_to_train_anew(stage, load, monkeypatch, make_examples):
    made, examples = count(monkeypatch), make_examples(9)
    stages.train_student(stage, load(), "student_ce", examples, trainer.cross_entropy)
    scale = {
        "bf16": False,
        "gradient_checkpointing": True,
        "sharding": "fsdp",
        "cpu_offload": False,
        "tensorboard": False,
    }
    params = load(distillation__student_train={**TRAIN, "scale": scale})
    stages.train_student(stage, params, "student_ce", examples, trainer.cross_entropy)
    assert len(made) == 1


ON_POLICY = {"lmbda": 1.0, "beta": 0.5, "temperature": 1.0, "max_new_tokens": 4, "adapter": None, "train": TRAIN}
ADAPTER = {"variant": "lora_plus", "rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["q_proj"]}
RATIONALES = {"questions": 6, "samples": 2, "max_new_tokens": 12, "temperature": 1.0, "too_easy": 2.0}


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["all weights", "adapter"])
def test_a_student_learns_at_its_own_words_once(stage, load, tokenizer, make_llama, monkeypatch, adapter):
    loading.save_model(make_llama(layers=3, seed=5), tokenizer, stage.path("teacher"))
    loading.save_model(make_llama(layers=2, seed=1), tokenizer, stage.path("student_kd"))
    params = load(distillation__on_policy={**ON_POLICY, "adapter": adapter})
    log = stages.train_stage("student_onpolicy", "toy", params)
    assert len(log) == 2 and log.answer_tokens.max() <= 4
    found = loading.load_model(stage.dir / "student_onpolicy", params.models)
    start = weights(loading.load_model(stage.dir / "student_kd", params.models))
    changed = {name for name, tensor in weights(found).items() if not torch.equal(tensor, start[name])}
    assert changed == ({name for name in start if "q_proj" in name} if adapter else set(start))
    monkeypatch.setattr(on_policy, "_import_trl", None)  # not called again
    pd.testing.assert_frame_equal(stages.train_stage("student_onpolicy", "toy", params), log)


def test_a_student_learns_its_teacher_s_verified_answers(stage, load, tokenizer, make_llama, monkeypatch):
    loading.save_model(make_llama(layers=3, seed=5), tokenizer, stage.path("teacher"))
    params = load(distillation__rationales=RATIONALES)
    with pytest.raises(StageError, match="none of 12 rationales is worth learning"):
        stages.train_stage("student_seq", "toy", params)
    path = stage.dir / "rationales.parquet"
    sampled = pd.read_parquet(path)
    right = sampled.assign(text="So. Answer: A", finished=True, right=sampled["sample"] == 0)
    right.attrs = sampled.attrs
    right.to_parquet(path)
    log = stages.train_stage("student_seq", "toy", params)
    rows = pd.read_parquet(stage.require("01_data", "questions.parquet"))
    others = sum(e.num_predicted for e in batches.encode_questions(tokenizer, rows))
    learned = len(tokenizer("So. Answer: A", add_special_tokens=False).input_ids) + 1
    assert others <= log.loss_tokens.sum() < others + learned
    assert loading.load_model(stage.dir / "student_seq", params.models)


def test_students_that_a_profile_does_not_ask_for_are_refused(stage, load):
    assert stages.list_students(load()) == ["student_ce", "student_kd"]
    every = load(distillation__on_policy=ON_POLICY, distillation__rationales=RATIONALES)
    assert stages.list_students(every) == ["student_ce", "student_kd", "student_seq", "student_onpolicy"]
    with pytest.raises(StageError, match=r"student_onpolicy: distillation\.on_policy is null in the profile"):
        stages.train_stage("student_onpolicy", "toy", load())


def test_training_opens_a_closed_stage(stage, load, make_examples):
    stage.commit()
    stages.train_student(stage, load(), "student_ce", make_examples(9), trainer.cross_entropy)
    assert not stage.manifest()
    stage.commit()
    stages.train_student(stage, load(), "student_ce", make_examples(9), trainer.cross_entropy)
    assert stage.manifest(), "read back, nothing changed"


def test_the_command_trains_what_the_notebook_trains(stage, load, raw, tokenizer, make_llama, monkeypatch):
    """The teacher's correction and the adapter, by hand as in the cells of notebooks 02 and 03."""
    params = load()
    questions = pd.read_parquet(Stage("toy", "reader").require("01_data", "questions.parquet"))
    examples = batches.encode_questions(tokenizer, questions)
    stages.train_stage("teacher", "toy", params)
    folder = loading.local_folder(params.models.teacher)
    adapted = adapters.attach(loading.load_model(folder, params.models), params.distillation.correction, params.seed)
    section = params.distillation.correction_train
    trainer.train(adapted, examples, section, trainer.cross_entropy, stage.path("by_hand"), params.seed)
    by_hand = adapters.merge(adapted)
    assert_same_weights(weights(loading.load_model(stage.dir / "teacher", params.models)), weights(by_hand))

    stages.train_stage("student_ce", "toy", params)
    (stage.dir / "student_ce").rename(stage.dir / "student_kd")
    stage.commit()
    adapters.train_stage("toy", params)
    third = Stage("toy", "03_lora")
    student = loading.load_model(stage.dir / "student_kd", params.models)
    model = adapters.attach(student, params.lora.adapter, params.seed)
    log = trainer.train(model, examples, params.lora.train, trainer.cross_entropy, third.path("by_hand"), params.seed)
    assert json.loads((third.dir / "adapter.record.json").read_text())["facts"]["log"][-1]["loss"] == log.loss.iloc[-1]
    merged = loading.load_model(third.dir / "merged", params.models)
    assert_same_weights(weights(merged), weights(adapters.merge(model)))
    assert [p.name for p in stage.dir.glob("*.part")] == []


def test_what_is_missing_is_named_with_its_cure(stage, load, make_examples):
    with pytest.raises(StageError, match="no trained stage 'student'; there are"):
        stages.train_stage("student", "toy", load())
    with pytest.raises(StageError, match="02_distillation/signals is not there: run notebook 02_distillation"):
        stages.train_stage("student_kd", "toy", load())
    with pytest.raises(StageError, match="02_distillation/student_kd is not there: run notebook 02_distillation first"):
        adapters.train_stage("toy", load())
    with pytest.raises(StageError, match=r"01_data/questions\.parquet is not there"):
        stages.train_stage("teacher", "another", load())


def test_a_run_that_is_worked_on_is_left_alone(stage, load):
    from filelock import FileLock

    with FileLock(stage.dir.parent / ".lock"), pytest.raises(StageError, match="worked on by another process"):
        stages.train_stage("teacher", "toy", load())
