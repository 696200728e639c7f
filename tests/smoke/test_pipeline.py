"""The real thing, small: all six notebooks on the real model cut to four layers, through the command line.

One run serves every test: it is killed three times, and the same command finishes it. Where the system allows
it, it has no network: what it needs is fetched before.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pandas as pd
import pytest

from medkit import __main__, runner, sources, variants
from medkit.inference.tasks import read_tasks
from medkit.params import load_params
from medkit.reporting import STAGES
from medkit.stage import DISCLAIMER, ROOT, Stage, run_dir
from tests import faults

SMOKE = ROOT / "params" / "smoke.yaml"
NO_NETWORK = ["unshare", "--map-root-user", "--net"]  # a network namespace of its own: no device but `lo`, no route
LO_UP = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up, running; kernels speak on it
os.execv(sys.argv[1], sys.argv[1:])
"""
# read by every Python process of the run: each host that it looks for or calls is a line of a file
LISTENER = """
import os, sys
def write_down(text):
    with open(os.environ["MEDKIT_CALLED"], "a") as file:
        file.write(f"{text}\\n")
def listen(event, args):
    if event == "socket.getaddrinfo" or (event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple)):
        write_down(args[0] if event == "socket.getaddrinfo" else args[1][0])
write_down("listening")
sys.addaudithook(listen)
"""


@pytest.fixture(scope="module", autouse=True)
def outputs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # `make test` shares it with nbval
        patch.setenv("MEDKIT_OUTPUTS", os.environ.get("MEDKIT_SMOKE") or str(tmp_path_factory.mktemp("outputs")))
        yield


@pytest.fixture(scope="module")
def called(tmp_path_factory):
    """A file with the hosts that the run called; None where the system allows no network namespace."""
    if not shutil.which(NO_NETWORK[0]) or subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode:
        yield None
        return
    params, folder = load_params(SMOKE), tmp_path_factory.mktemp("listener")
    origins = [dataset.origin for dataset in params.data.datasets.values()]
    extras = [params.data.open_questions, params.data.dialogues]
    for source in [params.models.teacher.source, params.models.embedder, *origins, *extras]:
        sources.fetch(source)
    (folder / "sitecustomize.py").write_text(LISTENER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "COMMAND", [*NO_NETWORK, sys.executable, "-c", LO_UP, *faults.COMMAND])
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.setenv("MEDKIT_CALLED", str(folder / "called"))
        yield folder / "called"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, called):
    """The name of a complete run that was killed three times in stage 02: runner and kernel, kill -9.

    Twice at a drawn moment of its beginning, and once while students train; the same command goes on each time.
    """
    outputs, log, draw = run_dir("smoke").parent, tmp_path_factory.mktemp("log") / "log", random.Random(0)
    checkpoints = run_dir("smoke") / "02_distillation" / "checkpoints"
    for seconds in (draw.uniform(2, 15), draw.uniform(2, 15), None):
        since, process, deadline = time.time(), faults.start(outputs, log), time.monotonic() + 600
        while True:
            cells = faults.read_notebook(outputs, "02_distillation", since)
            if list(checkpoints.glob("student_*/**/trainer_state.json")):
                break
            if cells and seconds and faults.seconds_of(cells[0]) > seconds:
                break
            assert process.poll() is None and time.monotonic() < deadline, "never reached the middle of the stage"
            time.sleep(0.05)
        faults.kill(process)
        assert Stage("smoke", "01_data").is_whole() and not Stage("smoke", "02_distillation").is_whole()
    assert faults.start(outputs, log).wait() == 0, log.read_text()
    assert "01_data: up to date" in log.read_text()
    return "smoke"


def test_second_run_does_nothing(whole):
    files = (path for path in run_dir(whole).rglob("*") if path.is_file() and path.name != ".lock")
    before = {path: path.stat().st_mtime_ns for path in files}
    assert runner.run_all(SMOKE, whole) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_needs_no_network_and_calls_nobody(whole, called):
    """In a namespace without a route the run above came to its end; here, that it did not even try."""
    if called is None:
        pytest.skip("this system allows no network namespace, so the run had a network")
    heard = called.read_text().split()
    assert heard.count("listening") > len(STAGES)  # the kernel of each notebook, and who started it
    assert set(heard) <= {"listening", "127.0.0.1", "localhost"}


READ_BY_NONE = {
    "01_data": "rejected.parquet data_card.json", "02_distillation": "history.parquet", "03_lora": "history.parquet",
    "04_quantization": "edge/Modelfile edge/USE.md edge/adapter.gguf edge_small/student.gguf certificates.parquet",
    "05_inference": "energy.parquet bench.parquet",
    "06_evaluation": "flips.parquet model_card.md ../04_quantization/edge/student.tasks.json",
}  # fmt: skip


def test_what_no_later_stage_reads_is_there_too(whole):
    for stage, files in READ_BY_NONE.items():
        for name in files.split():
            assert Stage(whole, "reader").require(stage, name).exists()
        assert list((run_dir(whole) / stage / "figures").glob("*.png"))


def test_results_trace_to_files_and_carry_intervals(whole):
    results = pd.DataFrame(json.loads((run_dir(whole) / "results.json").read_text())["results"])
    for row in results.itertuples():
        assert (run_dir(whole) / row.stage / row.file).is_file()
    accuracy = results[results.result.str.startswith("accuracy/")]
    assert accuracy.value.between(accuracy.ci_low, accuracy.ci_high).all() and (accuracy.n > 0).all()
    everyone = set(variants.list_variants(load_params(SMOKE)))
    assert set(accuracy.variant) == {*everyone, "first", "longest", "majority", "tfidf"}
    records = results[results.result == "field_f1/records"]
    assert set(records.variant) == {*everyone, "regex"} and (records.ci_low <= records.ci_high).all()
    deltas = results[results.result.str.startswith("accuracy_delta/")]
    assert deltas.verdict.isin(["better", "worse", "equivalent", "not detectable"]).all() and deltas.mde.notna().all()
    families = set(results.result.str.split("/").str[0])
    assert {"ece", "brier", "aurc", "accuracy_at_80", "shuffle_consistency"} <= families
    assert {"safe_share", "cost_per_correct_answer", "certificate", "field_delta", "kl_nats", "invented"} <= families
    assert not results.duplicated(["result", "variant", "metric", "baseline"]).any()


def test_the_edge_file_says_what_it_was_taught(whole):
    tasks = read_tasks(run_dir(whole) / variants.VARIANTS["edge"].folder)
    withheld = {"icd_chapter": True, "record": False, "record_b": False}
    assert {task.kind: task.least_confidence is not None for task in tasks} == withheld


def test_report_is_there_and_a_run_equals_itself(whole, capsys):
    """What follows the notebooks: the page, the notebooks as pages, and a comparison that finds nothing."""
    for words in (["report", "--run", whole], ["compare", whole, whole]):
        __main__.app(words, standalone_mode=False)
    page = (run_dir(whole) / "report.html").read_text()
    assert DISCLAIMER in page and DISCLAIMER in capsys.readouterr().out
    assert all((run_dir(whole) / "notebooks" / f"{stage}.html").is_file() for stage in STAGES)
    deltas = pd.read_csv(run_dir(whole) / f"compare_{whole}" / "deltas.csv")
    assert len(deltas) and (deltas.difference == 0).all() and set(deltas.verdict) <= {"equivalent", "not detectable"}
