"""Two processes train what one trains, with whole weights and with shards.

All through `medkit train` on toy runs: a random Llama, trained whole (student_ce) and by an adapter (lora), which is
also trained by hand.
"""

import json
import subprocess
import sys
from itertools import product

import pandas as pd
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from medkit import __main__
from medkit.lora import adapters
from medkit.modeling import batches, loading, train_once, trainer
from medkit.params import load_params
from medkit.stage import ROOT, Stage

FSDP2 = ROOT / "params" / "accelerate" / "fsdp2.yaml"
# torch shards on CPUs too, over gloo; accelerate does so on GPUs only, and this goes around it
PAIR = """
import os
import sys

from accelerate.state import AcceleratorState, DistributedType

plain = AcceleratorState.__init__


def with_shards(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    if self.fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP


from medkit import __main__

params = sys.argv[1]
for run in ("sharded", "whole", "missing"):
    AcceleratorState.__init__ = with_shards if run == "sharded" else plain
    if run == "whole":
        for name in [name for name in os.environ if name.startswith(("ACCELERATE_USE_", "FSDP_"))]:
            del os.environ[name]
    for stage in ("student_ce", "lora"):
        sys.argv = ["medkit", "train", "--stage", stage, "--run", f"{run}_{stage}", "--params", params]
        __main__.main() if run == "missing" else __main__.app(standalone_mode=False)
        AcceleratorState._reset_state()  # as in a new process; the two stay connected
"""


ORGANS = ["liver", "heart", "spleen", "left kidney"]
ROWS = [
    (f"q{n}", "exam", "labelled", "choice", "Which organ? " + "fever " * (n % 5), "", ORGANS[: 2 + n % 3], n % 2)
    for n in range(13)
]
QUESTIONS = pd.DataFrame(ROWS, columns=["id", "source", "split", "kind", "question", "context", "options", "answer"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("outputs")
        for name, value in {"MEDKIT_OUTPUTS": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        yield folder


@pytest.fixture(scope="module")
def params_file(outputs, make_section, make_llama, tokenizer):
    """The smoke profile on the toy model, with other training settings."""
    folder = loading.save_model(make_llama(layers=2), tokenizer, outputs / "toy")
    raw = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    raw["models"]["teacher"] = {"source": {"kind": "local", "path": str(folder)}, "keep_layers": []}
    raw["models"] |= {"device": "cpu", "attention": "sdpa"}
    section = make_section(slice_tokens=60, learning_rate=1e-2).model_dump()
    raw["distillation"]["student_train"] = raw["lora"]["train"] = section
    (outputs / "toy.yaml").write_text(yaml.safe_dump(raw))
    return outputs / "toy.yaml"


@pytest.fixture(scope="module")
def make_run(make_llama, tokenizer):
    """make_run(name, stage): a run in which `stage` can be trained; returns the stage's folder."""

    def make(name, stage):
        first, second = Stage(f"{name}_{stage}", "01_data"), Stage(f"{name}_{stage}", "02_distillation")
        learned = QUESTIONS.assign(kind="record_b" if stage == "lora" else "choice")
        others = [learned.assign(split="valid"), *[QUESTIONS] * (stage == "lora")]
        first.write_table("questions.parquet", pd.concat([learned, *others], ignore_index=True))
        first.commit()
        folder = second.path("student_kd" if stage == "lora" else "base")
        loading.save_model(make_llama(layers=2, seed=1), tokenizer, folder)
        if stage == "lora":
            second.commit()
        return Stage(second.run, "03_lora").dir if stage == "lora" else second.dir

    return make


def trained(folder, name):
    (weights,) = (folder / name).glob("*model.safetensors")
    log = json.loads((folder / f"{name}.record.json").read_text())["facts"]["log"]
    return load_file(weights), pd.DataFrame(log)


@pytest.fixture(scope="module")
def folders(outputs, make_run, params_file):
    """Stage folders by run and stage, after the pair and the single process trained in them; and the pair's errors."""
    runs = product(("sharded", "whole", "alone"), ("student_ce", "lora"))
    folders = {(run, stage): make_run(run, stage) for run, stage in runs}
    (outputs / "pair.py").write_text(PAIR)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "pair", str(params_file)]
    pair = subprocess.Popen(launch, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        for stage in ("student_ce", "lora"):  # in this process, which has imported torch already
            words = ["train", "--stage", stage, "--run", f"alone_{stage}", "--params", str(params_file)]
            __main__.app(words, standalone_mode=False)
        _, errors = pair.communicate(timeout=500)
    finally:
        pair.terminate()
    return folders, pair.returncode, errors


@pytest.mark.parametrize(("stage", "name"), [("student_ce", "student_ce"), ("lora", "adapter"), ("lora", "merged")])
@pytest.mark.parametrize("run", ["whole", "sharded"])
def test_two_processes_train_what_one_trains(folders, run, stage, name):
    """Batches of 4 of 13 rows: the last has one row, so a process is idle; slices of 60 tokens differ in number."""
    folders, _, errors = folders
    folder, alone = folders[run, stage], folders["alone", stage]
    assert (folder / name).is_dir(), errors
    if name == "merged":
        weights, expected = (load_file(one / name / "model.safetensors") for one in (folder, alone))
    else:
        (weights, log), (expected, expected_log) = trained(folder, name), trained(alone, name)
        for column in ("loss", "ce", "loss_tokens", "learning_rate"):
            assert log[column].to_numpy() == pytest.approx(expected_log[column].to_numpy(), abs=1e-4), column
        kind = {"whole": "rng_state_1.pth", "sharded": "pytorch_model_fsdp*"}[run]
        assert list(folder.glob(f"checkpoints/{name}/*/{run}/checkpoint-*/{kind}")), "there was a second process"
    assert weights.keys() == expected.keys()
    spacing = 2.0**-7 if name == "adapter" else 0.0  # stored in bfloat16, whose neighbours differ so much
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=spacing, atol=1e-4)


def test_the_command_trains_and_merges_what_is_done_by_hand(folders, outputs, make_llama, tokenizer):
    folder, params = folders[0]["alone", "lora"], load_params(outputs / "toy.yaml")
    by_hand = adapters.attach(make_llama(layers=2, seed=1), params.lora.adapter, params.seed)
    examples = batches.encode_questions(tokenizer, QUESTIONS.assign(kind="record_b"))
    settings = (params.lora.train, trainer.cross_entropy, outputs / "by_hand", params.seed)
    log = trainer.train(by_hand, examples, *settings)
    assert trained(folder, "adapter")[1].loss.tolist() == log.loss.tolist()
    train_once.save_adapter(by_hand, outputs / "stored", half=True)  # rounds
    merged = load_file(folder / "merged" / "model.safetensors")
    for name, tensor in adapters.merge(by_hand).state_dict().items():
        assert name == "lm_head.weight" or torch.equal(merged[name], tensor), name


def test_an_error_is_one_sentence_of_the_main_process(folders):
    _, code, errors = folders
    assert code != 0
    assert [line.split(" is not there")[0] for line in errors.splitlines() if line.startswith("medkit: ")] == [
        "medkit: 01_data/questions.parquet"
    ]


@pytest.mark.parametrize("name", ["fsdp2", "zero3"])
def test_accelerate_knows_every_key_of_our_config_files(name):
    config = load_config_from_file(str(FSDP2.with_stem(name)))
    options = vars(launch_command_parser().parse_args(["-m", "medkit"]))
    keys = {*config.fsdp_config, *config.deepspeed_config}
    assert keys and keys <= options.keys()
