"""Two real processes learn what one learns, a killed one goes on to the same bits, and shards are put together again.

All through `python -m medkit train` on a toy run: a random Llama that teaches, and a smaller one that learns.
"""

import json
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from medkit import batching, models, recipes, signals, training
from medkit.outputs import ROOT, Stage
from medkit.params import load_params

LAUNCH = [  # as on a machine of two GPUs: with --cpu accelerate starts one process, whatever it is asked for
    *[sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "medkit", "train"],
]
SECTION = {
    **{"epochs": 2.0, "batch_size": 4, "slice_tokens": 60, "learning_rate": 1e-2, "warmup_fraction": 0.1},
    "save_every_steps": 3,
    "scale": None,
}
FSDP = {"bf16": False, "gradient_checkpointing": False, "fsdp": True, "cpu_offload": False, "tensorboard": False}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("outputs")
        patch.setenv("MEDKIT_OUTPUTS", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.set_num_threads(1)
        yield folder


@pytest.fixture(scope="module")
def profile(outputs, make_llama, tokenizer):
    """profile(**changes of the students' training): a params file; two layers of the teacher's three are learned."""
    models.save_model(make_llama(layers=3), tokenizer, outputs / "toy")
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    raw["models"]["teacher"] = {"source": {"kind": "local", "path": str(outputs / "toy")}, "keep_layers": []}
    raw["models"] |= {"device": "cpu", "attention": "sdpa"}

    def write(name="toy", **changes):
        raw["distillation"]["student_train"] = {**SECTION, **changes}
        path = outputs / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture(scope="module")
def make_run(outputs, profile, make_llama, tokenizer):
    """make_run(name): a run with questions, a teacher, its signals and the start of a student; nothing trained."""
    options = ["liver", "heart", "spleen", "left kidney"]
    rows = [
        (f"q{n}", "train", "choice", "Which organ? " + "fever " * (n % 5), "", options[: 2 + n % 3], n % 2)
        for n in range(13)
    ]
    columns = ["id", "split", "kind", "question", "context", "options", "answer"]
    questions = pd.DataFrame(rows, columns=columns)

    def make(name):
        first, stage = Stage(name, "01_data"), Stage(name, "02_distillation")
        first.write_table("questions.parquet", questions)
        first.commit()
        models.save_model(make_llama(layers=3), tokenizer, stage.path("teacher"))
        models.save_model(make_llama(layers=2, seed=1), tokenizer, stage.path("base"))
        examples, key = batching.encode_questions(tokenizer, questions), recipes.signals_key(stage, tokenizer)
        signals.capture_signals(make_llama(layers=3), examples, stage.path("signals"), 16, 4, 0, key)
        return stage

    return make


def start(command, run, stage, params):
    named = ["--run", run, "--stage", stage, "--params", str(params)]
    return subprocess.Popen([*command, *named], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(process):
    """Exit code, output and errors of a started command."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # a launcher takes its processes with it
    return process.returncode, out, err


def trained(stage, name):
    """The weights of a trained model, and the log beside it."""
    return load_file(stage.dir / name / "model.safetensors"), pd.DataFrame(
        json.loads((stage.dir / name / recipes.RECORD).read_text())["log"]
    )


def assert_same_training(found, expected, atol):
    (found, log), (expected, whole) = found, expected
    for column in ("loss", "ce", "loss_tokens", "learning_rate"):
        assert log[column].to_numpy() == pytest.approx(whole[column].to_numpy(), abs=1e-4), column
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def alone(make_run, profile):
    """Both students of a run trained in one process, this one."""
    stage = make_run("alone")
    for name in ("student_ce", "student_kd"):
        recipes.train_stage(name, "alone", load_params(profile()))
    return stage


def test_two_processes_learn_what_one_learns(alone, make_run, profile):
    """Batches of 4 of 13 rows: the last has one, so a process idles; slices of 60 tokens differ in number."""
    stage = make_run("two")
    code, out, err = finish(start(LAUNCH, "two", "student_kd", profile()))
    assert code == 0, err
    assert_same_training(trained(stage, "student_kd"), trained(alone, "student_kd"), atol=1e-5)
    assert "student_kd: 8 steps" in out
    assert out.count("student_kd:") == 1
    assert err.count("training:   0%") == 1, "one bar, of the main process"
    assert len(trained(stage, "student_kd")[1]) == 8
    assert list(stage.dir.glob("checkpoints/student_kd/*/checkpoint-*/rng_state_1.pth")), "there was a second process"
    before = (stage.dir / "student_kd" / "model.safetensors").stat().st_mtime_ns
    recipes.train_stage("student_kd", "two", load_params(profile()))
    assert (stage.dir / "student_kd" / "model.safetensors").stat().st_mtime_ns == before, "trained already"


SHARDS_ON_CPUS = """
from accelerate.state import AcceleratorState, DistributedType

plain = AcceleratorState.__init__

def with_shards(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if self.fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP

AcceleratorState.__init__ = with_shards
from medkit import __main__
__main__.main()
"""


def test_sharded_weights_are_trained_alike_and_saved_whole(alone, make_run, profile, tmp_path):
    """torch shards on CPUs too, over gloo; accelerate asks for GPUs first, which this goes around."""
    (tmp_path / "medkit_with_shards.py").write_text(SHARDS_ON_CPUS)
    stage, params = make_run("sharded"), profile("fsdp", scale=FSDP)
    launch = [*LAUNCH[:-3], str(tmp_path / "medkit_with_shards.py"), "train"]
    code, _, err = finish(start(launch, "sharded", "student_ce", params))
    assert code == 0, err
    assert_same_training(trained(stage, "student_ce"), trained(alone, "student_ce"), atol=1e-4)
    assert list(stage.dir.glob("checkpoints/student_ce/*-sharded/checkpoint-*/pytorch_model_fsdp*"))


@pytest.mark.parametrize("name", ["student_ce", "student_kd"])
def test_a_killed_process_goes_on_to_the_same_bits(make_run, profile, name):
    """SIGKILL at a step that the clock draws, after a checkpoint that dice draw."""
    params = profile("long", epochs=12.0, batch_size=2, save_every_steps=2)
    wanted = 2 * random.Random().randint(1, 30)
    stage = make_run(f"killed_{name}")
    process = start([sys.executable, "-m", "medkit", "train"], stage.run, name, params)
    pattern, deadline = "checkpoints/*/*/checkpoint-*/trainer_state.json", time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if any(int(path.parent.name.split("-")[1]) >= wanted for path in stage.dir.glob(pattern)):
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (stage.dir / name / recipes.RECORD).exists()

    whole = make_run(f"whole_{name}")
    for run in (whole.run, stage.run):
        recipes.train_stage(name, run, load_params(params))
    (expected, log), (found, resumed) = trained(whole, name), trained(stage, name)
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == [], f"after checkpoint {wanted}"
    pd.testing.assert_frame_equal(resumed[["step", "loss", "ce"]], log[["step", "loss", "ce"]])


def test_what_is_missing_is_one_sentence_and_a_failure(make_run, profile):
    code, _, err = finish(start(LAUNCH, make_run("bare").run, "lora", profile()))
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("medkit: ")]
    assert said == ["medkit: 02_distillation/student_kd is not there: run notebook 02_distillation first (run='bare')"]


def test_the_papers_profile_makes_a_plan_for_shards(monkeypatch, tmp_path):
    """The Trainer's arguments and accelerate's plugin accept it; on one device it is off."""
    params = load_params(ROOT / "params" / "paper.yaml")
    for section in (params.distillation.correction_train, params.distillation.student_train, params.lora.train):
        assert section.scale.fsdp
        assert not training.is_sharded(section)
        assert not training._arguments(section, True, 0, tmp_path).fsdp
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            assert training.is_sharded(section)
        with monkeypatch.context() as patch:
            patch.setattr(training, "is_sharded", lambda section: True)
            plugin = FullyShardedDataParallelPlugin(**training._arguments(section, True, 0, tmp_path).fsdp_plugin_args)
        assert plugin.fsdp_version == 2
        assert plugin.activation_checkpointing == section.scale.gradient_checkpointing
        assert plugin.cpu_ram_efficient_loading
