"""`train_adapter` in a run, as notebook 03 and `medkit train --stage lora` call it."""

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from medkit.lora import adapters
from medkit.modeling import batches, loading, train_once, trainer
from medkit.params import load_params
from medkit.stage import ROOT, Stage, StageError


@pytest.fixture
def params(tmp_path, monkeypatch, make_section):
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(tmp_path / "outputs"))
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    raw["models"] |= {"device": "cpu", "attention": "sdpa"}
    raw["lora"]["train"] = make_section(learning_rate=1e-2).model_dump()
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(raw))
    return load_params(tmp_path / "toy.yaml")


def test_the_command_trains_and_merges_what_the_notebook_does(params, make_llama, tokenizer):
    with pytest.raises(StageError, match=r"01_data/questions\.parquet is not there: run notebook 01_data first"):
        adapters.train_stage("toy", params)
    data, second, stage = Stage("toy", "01_data"), Stage("toy", "02_distillation"), Stage("toy", "03_lora")
    rows = [(f"q{n}", "labelled", "record_b", f"Which organ? {n}", "", ["liver"], 0) for n in range(7)]
    columns = ["id", "split", "kind", "question", "context", "options", "answer"]
    questions = pd.DataFrame(rows, columns=columns).assign(source="records_b")
    others = [questions.assign(kind="record"), questions.assign(split="private"), questions.assign(split="valid")]
    data.write_table("questions.parquet", pd.concat([questions, *others], ignore_index=True))
    data.commit()
    loading.save_model(make_llama(layers=2, seed=1), tokenizer, second.path("student_kd"))
    second.commit()

    log = adapters.train_stage("toy", params)
    by_hand = adapters.attach(make_llama(layers=2, seed=1), params.lora.adapter, params.seed)
    examples = batches.encode_questions(tokenizer, questions)
    checkpoints = stage.path("by_hand")
    expected = trainer.train(by_hand, examples, params.lora.train, trainer.cross_entropy, checkpoints, params.seed)
    assert log.loss.tolist() == expected.loss.tolist()
    train_once.save_adapter(by_hand, stage.path("stored"), half=True)  # rounds
    merged = load_file(stage.dir / "merged" / "model.safetensors")
    for name, tensor in adapters.merge(by_hand).state_dict().items():
        assert name == "lm_head.weight" or torch.equal(merged[name], tensor), name

    before = (stage.dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    _, again = adapters.train_adapter(stage, params, examples)
    pd.testing.assert_frame_equal(again, log)
    assert (stage.dir / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
