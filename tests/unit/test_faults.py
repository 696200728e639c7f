"""What a machine does to a run: a full disk, a folder that cannot be written, kills, signals. Nothing good is lost."""

import os
import random
import shutil
import signal
import socket
import subprocess
import time
import traceback
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from toys import contents

from medkit import __main__, runner, sources
from medkit.distillation import teacher_cache
from medkit.inference import serve
from medkit.lora import adapters
from medkit.modeling import loading, train_once, trainer
from medkit.params import AdapterParams
from medkit.quantization import gguf_export, plans, quantize
from medkit.stage import ROOT, Stage, StageError, atomic_path, lock_run, run_dir, sha256_of

pytestmark = pytest.mark.usefixtures("outputs")
ADAPTER = AdapterParams(variant="lora", rank=8, alpha=8.0, dropout=0.0, target_modules=["q_proj", "down_proj"])


# --- a disk that is full, a folder that cannot be written ---


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """The folder of runs on a file system of its own, of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "medkit", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mount.stderr.strip()}")
    monkeypatch.setenv("MEDKIT_OUTPUTS", str(folder))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that takes all but `leave` bytes of the disk."""
    filler, free = folder / "filler", os.statvfs(folder)
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - leave)))
    return filler


@pytest.fixture
def write(disk, make_llama, make_examples, tokenizer):
    """write(name): write this artifact to the small disk, as at every call before."""
    model = make_llama(layers=2, intermediate_size=128)
    adapted = adapters.attach(make_llama(layers=2), ADAPTER, seed=0)
    nf4 = plans.nf4_plan(quantize.weight_shapes(model))
    quantized = quantize.apply_plan(make_llama(layers=2, intermediate_size=128), nf4, double_quant=False)
    table = pd.DataFrame({"number": random.Random(0).choices(range(2**60), k=50_000)})

    def fetch():
        with sources.building(disk / "members" / "table") as scratch:
            if scratch:
                scratch.write_bytes(bytes(200_000))

    writers = {
        "data": fetch,
        "weights": lambda: loading.save_model(model, tokenizer, disk / "model"),
        "adapter": lambda: train_once.save_adapter(adapted, disk / "adapter"),
        "quantized weights": lambda: quantize.save_quantized(quantized, tokenizer, nf4, disk / "nf4"),
        "gguf": lambda: gguf_export.export_gguf(model, tokenizer, disk / "edge" / "student.gguf"),
        "signals": lambda: teacher_cache.capture_teacher(
            lambda: model, make_examples(12), disk / "cache", 64, 6, "key"
        ),
        "table": lambda: Stage("r", "01_data").write_table("table.parquet", table),
    }
    return lambda name: writers[name]()


ARTIFACTS = {"data": 100_000, "weights": 100_000, "adapter": 4096, "quantized weights": 50_000, "gguf": 100_000}
ARTIFACTS |= {"signals": 0, "table": 100_000}


@pytest.mark.parametrize(("name", "leave"), ARTIFACTS.items(), ids=list(ARTIFACTS))
def test_a_full_disk_is_one_sentence_and_the_good_artifact_stays(disk, write, name, leave):
    """Each library tells of it in another way: by number, in words, or as a file that ends at another place."""
    write(name)
    good = contents(disk)
    for once in {"signals": ["cache/00001.safetensors"], "data": ["members/table"]}.get(name, []):
        (disk / once).unlink()  # it is not written again while it is whole
    before, filler = contents(disk), fill(disk, leave)
    with pytest.raises(StageError, match=r"^.*No space left.*: the disk is full; free space.*same command again$"):
        write(name)
    filler.unlink()
    assert contents(disk) == before
    write(name)
    assert contents(disk) == good


def test_a_training_whose_disk_was_full_goes_on_to_the_same_weights(disk, make_llama, make_examples, make_section):
    examples, section, (whole, stopped, resumed) = make_examples(12), make_section(), (make_llama() for _ in range(3))
    trainer.train(whole, examples, section, trainer.cross_entropy, disk / "whole", seed=0)
    filler = fill(disk, 2_000_000)  # the first checkpoint fits, the second does not
    with pytest.raises(StageError, match="the disk is full"):
        trainer.train(stopped, examples, section, trainer.cross_entropy, disk / "stopped", seed=0)
    filler.unlink()
    log = trainer.train(resumed, examples, section, trainer.cross_entropy, disk / "stopped", seed=0)
    assert len(log) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_run_that_cannot_be_written_is_refused_and_still_read(disk):
    Stage("r", "01_data").write_json("a.json", 1)
    Stage("r", "01_data").commit()
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for name in ("r", "new"):
        with pytest.raises(StageError, match=rf"disk/{name}.*Read-only.*you may not write there; .*MEDKIT_OUTPUTS"):
            runner.run_all(ROOT / "params" / "smoke.yaml", name)
    with pytest.raises(StageError, match="you may not write there"):
        Stage("r", "01_data").write_json("a.json", 2)
    assert Stage("r", "01_data").is_whole() and contents(disk) == before


# --- kills and signals ---


def in_child(work, ready, number: int) -> tuple[int, str]:
    """Exit code and errors of the command line whose work is `work`, sent a signal when `ready()`."""
    if torch.cuda.is_available():
        pytest.skip("a process that uses a GPU cannot be forked")
    errors = run_dir("child").with_suffix(".errors")
    errors.parent.mkdir(parents=True, exist_ok=True)
    if (child := os.fork()) == 0:
        try:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
            torch.set_num_threads(1)
            __main__.app = work
            __main__.typer.echo = lambda text, err: os.write(2, f"{text}\n".encode())  # pytest holds sys.stderr
            __main__.main()
        except SystemExit as error:
            os._exit(error.code or 0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(99)
    deadline = time.monotonic() + 120
    ended, status = 0, 0
    while not ready() and time.monotonic() < deadline and not ended:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, number)
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), errors.read_text()


@pytest.mark.parametrize("step", [0, 1, 2], ids=["before", "between the renames", "before the old one is deleted"])
def test_a_killed_replacement_of_a_folder_leaves_nothing_half(step, monkeypatch):
    folder, left = run_dir("r") / "03_lora" / "adapter", [["old"], [], ["new"]][step]

    def replace(text: str) -> None:
        with atomic_path(folder) as scratch:
            scratch.mkdir()
            (scratch / text).write_text(text)

    def killed():
        calls, move, remove = [], Path.replace, shutil.rmtree

        def count(function):
            def counted(*args, **more):
                if len(calls) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(function)
                return function(*args, **more)

            return counted

        Path.replace, shutil.rmtree = count(move), count(remove)
        replace("new")

    replace("old")
    assert in_child(killed, lambda: False, 0)[0] == -signal.SIGKILL
    with lock_run("r"):
        assert list(contents(folder)) == left
    assert contents(run_dir("r")).keys() == {f"03_lora/adapter/{text}" for text in left}
    replace("newer")
    assert list(contents(folder)) == ["newer"]


def test_scratch_of_a_process_of_the_same_number_is_not_taken_over():
    """In a container every start has the same numbers."""
    folder = run_dir("r") / "adapter"
    left = folder.with_name(f"adapter.{os.getpid()}.part")
    left.mkdir(parents=True)
    (left / "junk").write_text("half")
    with atomic_path(folder) as scratch:
        scratch.mkdir()
    assert contents(run_dir("r")) == {}


def test_scratch_of_a_process_that_lives_and_answers_that_go_on_are_left():
    kept = [run_dir("r") / f"a.{os.getppid()}.part", run_dir("r") / "answers.parquet.0123456789abcdef.part"]
    gone = run_dir("r") / "02" / f"b.{2**22 - 1}.part"
    for path in (*kept, gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    with lock_run("r"):
        assert sorted(run_dir("r").rglob("*.part")) == sorted(kept)


@pytest.fixture
def works(make_llama, make_examples, make_section, tokenizer, tmp_path, monkeypatch):
    """Kind of work → (the work, is it in the middle of it, is all that it finished whole)."""
    monkeypatch.setenv("MEDKIT_CACHE", str(tmp_path / "cache"))
    model, stage, cache = make_llama(layers=2), Stage("r", "02_distillation"), tmp_path / "signals"
    edge = tmp_path / "student.gguf"

    def train():
        section = make_section(epochs=1e6, save_every_steps=2)
        train_once.train_once(stage, "s", model, tokenizer, make_examples(8), section, trainer.cross_entropy, 0)

    def capture():
        teacher_cache.capture_teacher(lambda: model, make_examples(12) * 1000, cache, 8, 2, "key")

    def export():
        while True:
            gguf_export.export_gguf(model, tokenizer, edge, "F16")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def answers() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    def shards_are_whole() -> bool:
        checksums = teacher_cache.read_index(cache)["sha256"]
        return len(checksums) > 1 and all(sha256_of(cache / name) == value for name, value in checksums.items())

    def serving():
        serve.serve("r", port=port, upstream="http://127.0.0.1:9/v1")

    def checkpoints() -> list[Path]:
        return list(stage.dir.rglob("trainer_state.json"))

    return {
        "training": (train, checkpoints, lambda: checkpoints() and not list(stage.dir.glob("s"))),
        "capture": (capture, lambda: (cache / "00002.safetensors").is_file(), shards_are_whole),
        "gguf": (export, edge.with_suffix(gguf_export.MANIFEST).is_file, lambda: gguf_export.check_manifest(edge)),
        "serving": (serving, answers, lambda: not answers()),
    }


SIGNALS = [("training", signal.SIGTERM), ("capture", signal.SIGINT), ("gguf", signal.SIGTERM)]
SIGNALS += [("serving", signal.SIGINT), ("serving", signal.SIGTERM)]  # uvicorn has handlers of its own


@pytest.mark.parametrize(("kind", "number"), SIGNALS, ids=lambda value: getattr(value, "name", value))
def test_a_signal_is_one_sentence_and_what_is_finished_is_kept(works, kind, number, tmp_path):
    work, ready, is_whole = works[kind]
    code, errors = in_child(work, ready, number)
    assert code == 128 + number
    assert errors.splitlines()[-1].startswith(f"medkit: stopped by {number.name}; what is finished is kept")
    assert "Traceback" not in errors
    assert is_whole()
    assert not [path for path in tmp_path.rglob("*.part") if kind != "training"]


SLEEP = """
import os, time
with open(os.environ["BEGUN"], "w") as file:
    file.write(str(os.getpid()))
time.sleep(60)
"""


def test_a_signal_ends_a_notebook_and_its_kernel(make_notebooks, tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    make_notebooks({"01_data": [SLEEP]})
    monkeypatch.setenv("BEGUN", str(begun))
    work = lambda: runner.run_all(ROOT / "params" / "smoke.yaml", "r")  # noqa: E731
    code, errors = in_child(work, lambda: begun.is_file() and begun.read_text(), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and "medkit: stopped by SIGTERM" in errors and "Traceback" not in errors
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(begun.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(int(begun.read_text()))
    assert nbformat.read(run_dir("r") / "notebooks" / "01_data.ipynb", as_version=4).cells
    assert runner.status(runner.load_params(ROOT / "params" / "smoke.yaml"), "r")["01_data"] == "missing"
