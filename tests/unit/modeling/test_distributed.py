"""Two real processes learn what one learns, whole or in shards, and a killed one goes on to the same bits.

All through `medkit train` on toy runs: a random Llama that teaches, and a narrower one that learns what it says and,
through a projection, what it thinks. To start a process takes longer than what it trains here: so the pair that
accelerate launches trains all that a pair has to show, and those to be killed are forked from one that is loaded.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import runpy
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

from medkit.distillation import stages as recipes
from medkit.distillation import teacher_cache
from medkit.lora import adapters
from medkit.modeling import batches, loading, sharding, trainer
from medkit.params import TrainParams, load_params
from medkit.stage import ROOT, Stage

LAUNCH = [  # as on a machine of two GPUs: with --cpu accelerate starts one process, whatever it is asked for
    *[sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
    *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"],
]
# torch shards on CPUs too, over gloo; accelerate asks for GPUs first, which this goes around
IN_TURN = """
import json
import os
import sys

from accelerate.state import AcceleratorState, DistributedType

plain, environment = AcceleratorState.__init__, dict(os.environ)


def with_shards(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if self.fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = with_shards
from medkit import __main__

*before, last = json.loads(sys.argv[1])
for words in before:
    sys.argv = ["medkit", *words]
    __main__.app(standalone_mode=False)
    AcceleratorState._reset_state()  # as in a new process; the two stay connected
    os.environ.clear()
    os.environ.update(environment)
sys.argv = ["medkit", *last]
__main__.main()
"""
SECTION = {
    **{"epochs": 2.0, "batch_size": 4, "slice_tokens": 60, "learning_rate": 1e-2, "warmup_fraction": 0.1},
    "save_every_steps": 3,
    "scale": None,
}
SCALE = {"bf16": False, "gradient_checkpointing": False, "cpu_offload": False, "tensorboard": False}
SHARDING = ["fsdp", "deepspeed"] if importlib.util.find_spec("deepspeed") else ["fsdp"]
SHARD_FILES = {"fsdp": "pytorch_model_fsdp*", "deepspeed": "global_step*/zero_pp_rank_1*"}
LAYERS = [[1, 2], [2, 3]]  # the student's, the teacher's


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
    """profile(**changes of what trains): a params file."""
    loading.save_model(make_llama(layers=3), tokenizer, outputs / "toy")
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    raw["models"]["teacher"] = {"source": {"kind": "local", "path": str(outputs / "toy")}, "keep_layers": []}
    raw["models"] |= {"device": "cpu", "attention": "sdpa"}
    raw["distillation"] |= {"hidden_weight": 0.5, "hidden_layers": LAYERS}

    def write(name="toy", **changes):
        raw["distillation"]["student_train"] = raw["lora"]["train"] = {**SECTION, **changes}
        path = outputs / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.fixture(scope="module")
def make_run(outputs, profile, make_llama, tokenizer):
    """make_run(name): a run with questions, a teacher, its cache and the start of a student; nothing trained.

    With `distilled`, the stage is committed with a student that an adapter can be fitted to.
    """
    options = ["liver", "heart", "spleen", "left kidney"]
    rows = [
        (f"q{n}", "train", "choice", "Which organ? " + "fever " * (n % 5), "", options[: 2 + n % 3], n % 2)
        for n in range(13)
    ]
    columns = ["id", "split", "kind", "question", "context", "options", "answer"]
    questions = pd.DataFrame(rows, columns=columns)

    def make(name, distilled=False):
        first, stage = Stage(name, "01_data"), Stage(name, "02_distillation")
        first.write_table("questions.parquet", questions)
        first.commit()
        narrow = make_llama(layers=2, seed=1, hidden_size=32)
        if distilled:
            loading.save_model(narrow, tokenizer, stage.path("student_kd"))
            stage.commit()
            return Stage(name, "03_lora")
        loading.save_model(make_llama(layers=3), tokenizer, stage.path("teacher"))
        loading.save_model(narrow, tokenizer, stage.path("base"))
        examples, key = batches.encode_questions(tokenizer, questions), recipes.teacher_key(stage, tokenizer)
        thoughts = [theirs for _, theirs in LAYERS]
        teacher_cache.capture_teacher(make_llama(layers=3), examples, stage.path("teacher_cache"), 16, 4, key, thoughts)
        return stage

    return make


def words(run, stage, params):
    return ["train", "--run", run, "--stage", stage, "--params", str(params)]


def trained(stage, name):
    """What was learned: a model's weights or an adapter's, and the log beside them."""
    (weights,) = (stage.dir / name).glob("*model.safetensors")
    return load_file(weights), pd.DataFrame(json.loads((stage.dir / f"{name}.record.json").read_text())["facts"]["log"])


def assert_same_training(found, expected, atol):
    (found, log), (expected, whole) = found, expected
    for column in {"ce", "forward_kl", "hidden"} & set(whole) | {"loss", "loss_tokens", "learning_rate"}:
        assert log[column].to_numpy() == pytest.approx(whole[column].to_numpy(), abs=1e-4), column
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol)


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(make_run, profile, outputs):
    """Starts the pair; a function that waits for it and returns its runs' stages, exit code, output and errors.

    It trains a student alike in both, then in shards, then an adapter in shards, then what fails.
    """
    (outputs / "in_turn.py").write_text(IN_TURN)
    stages = {
        "two": make_run("two"),
        **{f"{library}_adapter": make_run(f"{library}_adapter", True) for library in SHARDING},
        **{library: make_run(library) for library in SHARDING},
    }
    make_run("bare")
    plain = profile("plain")
    turns = [words("two", "student_kd", plain)]
    for library in SHARDING:
        sharded = profile(library, scale={**SCALE, "sharding": library})
        turns += [words(library, "student_kd", sharded), words(f"{library}_adapter", "lora", sharded)]
    turns.append(words("bare", "lora", plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{outputs}:{ROOT}")
        process = subprocess.Popen(
            [*LAUNCH, "in_turn", json.dumps(turns)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    said = []

    def wait():
        if not said:
            said.extend(process.communicate(timeout=500))
        return stages, process.returncode, *said

    yield wait
    process.terminate()  # a launcher takes its processes with it


@pytest.fixture(scope="module")
def alone(launched, make_run, profile):
    """A student and an adapter trained in one process, this one, while the pair is at work."""
    student, adapter = make_run("alone"), make_run("alone_adapter", True)
    recipes.train_stage("student_kd", "alone", load_params(profile()))
    adapters.train_stage("alone_adapter", load_params(profile()))
    return student, adapter


def test_two_processes_learn_what_one_learns(alone, launched, profile):
    """Batches of 4 of 13 rows: the last has one, so a process idles; slices of 60 tokens differ in number."""
    stages, _, out, err = launched()
    stage = stages["two"]
    assert (stage.dir / "student_kd").is_dir(), err
    assert_same_training(trained(stage, "student_kd"), trained(alone[0], "student_kd"), atol=1e-5)
    num_students, num_adapters = 1 + len(SHARDING), len(SHARDING)
    said = [out.count(f"{name}: 8 steps") for name in ("student_kd", "lora")]
    assert said == [num_students, num_adapters], "the main process speaks"
    assert err.count("training:   0%") == num_students + num_adapters, "one bar for each training, of the main process"
    assert len(trained(stage, "student_kd")[1]) == 8
    assert list(stage.dir.glob("checkpoints/student_kd/*/checkpoint-*/rng_state_1.pth")), "there was a second process"
    before = (stage.dir / "student_kd" / "model.safetensors").stat().st_mtime_ns
    recipes.train_stage("student_kd", "two", load_params(profile()))
    assert (stage.dir / "student_kd" / "model.safetensors").stat().st_mtime_ns == before, "trained already"


@pytest.fixture(params=["fsdp", "deepspeed"])
def library(request):
    if request.param not in SHARDING:
        pytest.skip("the extra `deepspeed` is not installed")
    return request.param


def test_sharded_weights_are_trained_alike_and_saved_whole(alone, launched, library):
    """With a learned projection of hidden states, which is sharded with the student, and gone afterwards."""
    stages, _, _, err = launched()
    stage = stages[library]
    assert (stage.dir / "student_kd").is_dir(), err
    assert_same_training(trained(stage, "student_kd"), trained(alone[0], "student_kd"), atol=1e-4)
    assert "hidden" in trained(stage, "student_kd")[1]
    assert list(stage.dir.glob(f"checkpoints/student_kd/*/{library}/checkpoint-*/{SHARD_FILES[library]}"))


def test_a_sharded_adapter_is_trained_alike_and_merged_whole(alone, launched, library):
    stages, _, _, err = launched()
    stage = stages[f"{library}_adapter"]
    assert (stage.dir / "merged").is_dir(), err
    found, expected = trained(stage, "adapter"), trained(alone[1], "adapter")
    assert all("lora_" in name for name in expected[0])
    assert_same_training(found, expected, atol=1e-4)
    merged = [load_file(one.dir / "merged" / "model.safetensors") for one in (stage, alone[1])]
    assert merged[0].keys() == merged[1].keys()
    for name, tensor in merged[1].items():
        torch.testing.assert_close(merged[0][name], tensor, rtol=0, atol=1e-4)
    assert list(stage.dir.glob("checkpoints/adapter/*/*/checkpoint-*"))


def test_what_is_missing_is_one_sentence_and_a_failure(launched):
    _, code, _, err = launched()
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("medkit: ")]
    assert said == ["medkit: 02_distillation/student_kd is not there: run notebook 02_distillation first (run='bare')"]


# --- a killed process ------------------------------------------------------------------------------------------------


def command(words, environment):
    """What `python -m medkit` does with these words."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["medkit", *words]
    runpy.run_module("medkit", run_name="__main__", alter_sys=True)


@pytest.fixture(scope="module")
def start(outputs):
    """start(words): a process of its own, forked from one that has the libraries loaded and has computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["medkit.__main__", "medkit.distillation.stages"])

    def run(words):
        process = context.Process(target=command, args=(words, dict(os.environ)))
        process.start()
        return process

    return run


@pytest.mark.parametrize("name", ["student_ce", "student_kd"])
def test_a_killed_process_goes_on_to_the_same_bits(make_run, profile, start, name):
    """SIGKILL at a step that the clock draws, after a checkpoint that dice draw."""
    params = profile("long", epochs=9.0, batch_size=2, save_every_steps=2)
    wanted = 2 * random.Random().randint(1, 20)
    stage = make_run(f"killed_{name}")
    process = start(words(stage.run, name, params))
    pattern, deadline = "checkpoints/*/*/checkpoint-*/trainer_state.json", time.monotonic() + 240
    while process.is_alive() and time.monotonic() < deadline:
        if any(int(path.parent.name.split("-")[1]) >= wanted for path in stage.dir.glob(pattern)):
            break
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (stage.dir / f"{name}.record.json").exists()

    whole = make_run(f"whole_{name}")
    for run in (whole.run, stage.run):
        recipes.train_stage(name, run, load_params(params))
    (expected, log), (found, resumed) = trained(whole, name), trained(stage, name)
    assert [n for n in expected if not torch.equal(found[n], expected[n])] == [], f"after checkpoint {wanted}"
    terms = [column for column in ("loss", "ce", "forward_kl", "hidden") if column in log]
    pd.testing.assert_frame_equal(resumed[["step", *terms]], log[["step", *terms]])


# --- the plan for many GPUs ------------------------------------------------------------------------------------------


def test_the_papers_profile_makes_a_plan_for_shards(monkeypatch, tmp_path):
    """The Trainer's arguments and accelerate's plugin accept it; on one device it is off."""
    params = load_params(ROOT / "params" / "paper.yaml")
    for section in (params.distillation.correction_train, params.distillation.student_train, params.lora.train):
        assert section.scale.sharding == "fsdp"
        assert not sharding.is_sharded(section)
        assert not trainer._arguments(section, True, 0, tmp_path).fsdp
        with monkeypatch.context() as patch:
            patch.setenv("WORLD_SIZE", "2")
            assert sharding.is_sharded(section)
        with monkeypatch.context() as patch:
            patch.setattr(sharding, "is_sharded", lambda section: True)
            plugin = FullyShardedDataParallelPlugin(**trainer._arguments(section, True, 0, tmp_path).fsdp_plugin_args)
        assert plugin.fsdp_version == 2
        assert plugin.activation_checkpointing == section.scale.gradient_checkpointing
        assert plugin.cpu_ram_efficient_loading


def test_sharding_without_its_library_names_the_cure(monkeypatch, tmp_path):
    scale = {**SCALE, "sharding": "deepspeed"}
    section = TrainParams(**{**SECTION, "scale": scale})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sharding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(sharding.ShardingError, match=r"pip install -e '\.\[deepspeed\]'"):
        trainer._arguments(section, True, 0, tmp_path)
