"""What reruns and what does not, who may work on a run, and how a failure is reported. Two tests start a kernel."""

import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from medkit import code_digest, preflight, reporting, runner
from medkit.params import ParamsError, load_params, load_run_params
from medkit.runner import fingerprints, run_all
from medkit.stage import ROOT, STAGES, MedkitError, Stage, StageError, lock_run, outputs_root, run_dir

pytestmark = pytest.mark.usefixtures("outputs")
SMOKE = ROOT / "params" / "smoke.yaml"


def chain(overrides: dict | None = None) -> dict[str, str]:
    """The fingerprints of the project that is in use, its files read anew."""
    for function in vars(code_digest).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    return fingerprints(load_params(SMOKE, overrides))


def changed(before: dict, after: dict) -> list[str]:
    assert list(before) == list(after)
    return [name for name in before if before[name] != after[name]]


def edit_notebook(path: Path, change) -> None:
    notebook = nbformat.read(path, as_version=4)
    change(notebook.cells)
    nbformat.write(notebook, path)


def test_a_users_table_counts_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "source_digest", lambda notebook: notebook.stem)  # the code is the same
    path = tmp_path / "mine.jsonl"
    columns = {"question": "q", "options": "o", "answer": "a", "context": "", "subject": ""}
    origin = {"kind": "table", "path": str(path), "pool": "train", "columns": columns, "answer_is": "letter"}
    overrides = {"data.datasets.medqa.origin": origin}
    path.write_text("one")
    first = chain(overrides)
    path.write_text("two")
    assert set(first.values()).isdisjoint(chain(overrides).values())
    path.write_text("one")
    assert chain(overrides) == first


def test_a_local_model_counts_by_its_content(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    overrides = {"models.teacher.source": {"kind": "local", "path": str(folder)}}
    (folder / "model.safetensors").write_bytes(b"one")
    first = chain(overrides)
    (folder / "model.safetensors").write_bytes(b"two")
    assert set(first.values()).isdisjoint(chain(overrides).values())


def test_models_that_the_params_no_longer_make_are_removed_before_a_stage_runs(executed):
    run_all(SMOKE, "r")
    edge = run_dir("r") / "04_quantization" / "edge"
    small = edge.with_name("edge_small")
    for folder in (edge, small):
        folder.mkdir()
        (folder / "student.gguf").write_text("old")
    run_all(SMOKE, "r", {"quantization.edge": None, "inference.claims": ["student_kd"]}, last="04_quantization")
    listed = Stage("r", "04_quantization").manifest()["files"]
    assert not edge.exists() and "edge/student.gguf" not in listed and "edge_small/student.gguf" in listed


SECTIONS = [
    ({"models.dtype": "bfloat16"}, "01_data"),
    ({"distillation.temperature": 2.0}, "02_distillation"),
    ({"lora.adapter.rank": 4}, "03_lora"),
    ({"inference.max_new_tokens": 32}, "02_distillation"),
    ({"quantization.double_quant": False}, "03_lora"),
    ({"quantization.drift_examples": 1}, "04_quantization"),
    ({"inference.bench.repeats": 1}, "05_inference"),
    ({"evaluation.power": 0.9}, "06_evaluation"),
]


def test_a_section_reruns_its_notebook_and_those_after_it_another_library_all(monkeypatch):
    monkeypatch.setattr(runner, "source_digest", lambda notebook: notebook.stem)  # the code is the same
    before = chain()
    for overrides, first in SECTIONS:
        assert changed(before, chain(overrides)) == STAGES[STAGES.index(first) :], overrides
    monkeypatch.setattr(runner, "library_versions", lambda: {"torch": "9.9"})
    assert changed(before, chain()) == STAGES


def test_the_place_and_prose_rerun_nothing_and_a_cell_what_reads_it(tmp_path, monkeypatch):
    """On a copy. Which edits of the package count, and where, test_code_digest shows."""
    before = chain()
    assert list(before) == STAGES and len(set(before.values())) == len(STAGES)
    for folder in ("notebooks", "medkit"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(code_digest, "PACKAGE", tmp_path / "medkit")

    def change(cells):
        for cell in cells:
            if cell.cell_type == "markdown":
                cell.source += "\n\nAnother sentence."
            else:
                cell.source += "\n# a comment"
                cell.outputs, cell.execution_count = [], 99
        cells.insert(3, nbformat.v4.new_markdown_cell("A new cell."))

    for path in runner.notebooks():
        edit_notebook(path, change)
    assert changed(before, chain()) == []
    new_cell = nbformat.v4.new_code_cell("x = 1")
    edit_notebook(tmp_path / "notebooks" / "03_lora.ipynb", lambda cells: cells.append(new_cell))
    assert changed(before, chain()) == STAGES[2:]


@pytest.fixture
def executed(make_notebooks, monkeypatch) -> list[str]:
    """Six toy notebooks, and papermill replaced by something that commits a stage at once; the names it ran."""
    make_notebooks({name: [f"stage = {name!r}"] for name in STAGES})
    names: list[str] = []

    def execute(source: str, target: str, *, parameters: dict, **_):
        name = Path(source).stem
        names.append(name)
        assert not Stage(parameters["run"], name).manifest()  # a stage that runs is open
        assert os.environ["GOMP_SPINCOUNT"] == "20000"
        Stage(parameters["run"], name).write_json("artifact.json", parameters)
        Stage(parameters["run"], name).commit()

    monkeypatch.setattr(runner.papermill, "execute_notebook", execute)
    monkeypatch.setattr(preflight, "check_profile", lambda params: ["a note"])
    return names


def test_a_run_keeps_its_params_and_other_params_replace_them(executed):
    run_all(SMOKE, "r", {"lora.adapter.rank": 4})
    assert load_run_params("r") == load_params(SMOKE, {"lora.adapter.rank": 4})
    assert load_run_params("r", {"seed": 7}).seed == 7
    assert run_all(SMOKE, "r", {"lora.adapter.rank": 8}) == STAGES[2:]
    assert load_run_params("r").lora.adapter.rank == 8
    assert run_all(run_dir("r") / "params.yaml", "r") == []  # the stored file is a whole profile
    with pytest.raises(ParamsError, match=r"never.*--params"):
        load_run_params("never")


def test_medkit_without_notebooks_says_how_to_get_them(tmp_path, monkeypatch):
    """What `pip install .` leaves in site-packages."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    for call in (lambda: run_all(SMOKE, "r"), lambda: runner.status(load_params(SMOKE), "r")):
        with pytest.raises(MedkitError, match=r"no notebooks in .*clone its repository.*--editable"):
            call()


def test_notebooks_get_three_parameters_and_whole_paths_and_the_environment_is_given_back(
    executed, monkeypatch, tmp_path
):
    """A notebook's kernel starts in another folder than the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke.yaml").symlink_to(SMOKE)
    folders = {"HOME": str(tmp_path / "home"), "MEDKIT_OUTPUTS": "here/x", "MEDKIT_CACHE": "~/y"}
    for name, value in {**folders, "GOMP_SPINCOUNT": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    working, seen, before = runner.papermill.execute_notebook, {}, dict(os.environ)
    monkeypatch.setattr(
        runner.papermill, "execute_notebook", lambda *args, **more: (seen.update(os.environ), working(*args, **more))
    )
    assert run_all("smoke.yaml", "r", {"lora.adapter.rank": 4}) == STAGES == executed
    assert dict(os.environ) == before
    assert seen["MEDKIT_OUTPUTS"] == str(tmp_path / "here" / "x") == str(outputs_root())
    assert seen["MEDKIT_CACHE"] == str(tmp_path / "home" / "y")
    for name in STAGES:
        given = json.loads((run_dir("r") / name / "artifact.json").read_text())
        assert given == {"params_file": str(run_dir("r") / "params.yaml"), "run": "r", "overrides": {}}
    assert load_params(run_dir("r") / "params.yaml") == load_params(SMOKE, {"lora.adapter.rank": 4})


def test_only_what_reads_a_change_runs_again_whatever_the_clock_says(executed, monkeypatch):
    run_all(SMOKE, "r")
    for number, path in enumerate(sorted(run_dir("r").rglob("*"))):
        os.utime(path, (2e9, 2e9) if number % 2 else (1e8, 1e8))
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert run_all(SMOKE, "r") == []
    for overrides in ({"quantization.drift_examples": 1}, {}):
        assert run_all(SMOKE, "r", overrides) == STAGES[3:]
        assert run_all(SMOKE, "r", overrides) == []
    assert run_all(SMOKE, "r", {"seed": 1}) == STAGES


def test_a_stage_that_is_named_or_missing_or_damaged_or_run_by_hand_is_run_again(executed):
    assert run_all(SMOKE, "r", first="04_quantization") == STAGES
    assert run_all(SMOKE, "r", first="04_quantization") == STAGES[3:]
    (run_dir("r") / "04_quantization" / "artifact.json").write_text("{")
    Stage("r", "06_evaluation").commit()  # as a person's kernel does: no fingerprint in its environment
    states = [*runner.status(load_params(SMOKE), "r").values()]
    assert states == ["done"] * 3 + ["damaged", "done", "stale"]
    assert run_all(SMOKE, "r")[0] == "04_quantization"
    assert run_all(SMOKE, "r") == []


def test_a_full_disk_at_the_executed_notebook_and_one_that_commits_nothing_are_one_sentence(executed, monkeypatch):
    monkeypatch.setattr(runner.papermill, "execute_notebook", lambda *_, **__: Path("/dev/full").write_text("x"))
    with pytest.raises(StageError, match=r"notebooks/01_data\.ipynb.*No space left.*free space"):
        run_all(SMOKE, "r")
    monkeypatch.setattr(runner.papermill, "execute_notebook", lambda *_, **__: None)
    with pytest.raises(MedkitError, match=r"01_data\.ipynb.*commit"):
        run_all(SMOKE, "r")


@pytest.mark.parametrize("source", ['run = "r"', 'params_file = "x"\nrun = "r"\noverrides = {}\nrank = 4'])
def test_another_parameters_cell_is_refused(executed, source):
    """papermill only warns of a parameter that a notebook does not have, and goes on without it."""

    def change(cells):
        (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
        cell.source = source

    edit_notebook(runner.notebooks()[0], change)
    with pytest.raises(MedkitError, match=r"01_data\.ipynb.*parameters.*overrides"):
        run_all(SMOKE, "r")
    assert executed == []


def test_a_run_that_another_process_works_on_is_refused(executed):
    forked = multiprocessing.get_context("fork")
    held = forked.Event()

    def hold():
        with lock_run("r"):
            held.set()
            time.sleep(60)

    holder = forked.Process(target=hold)
    holder.start()
    try:
        assert held.wait(30)
        for _ in range(2):  # who asks does not take the holder's name away
            with pytest.raises(StageError, match=rf"'r'.*process {holder.pid} on {platform.node()}\).*--run"):
                run_all(SMOKE, "r")
        assert executed == []
    finally:
        holder.kill()
        holder.join()
    assert run_all(SMOKE, "r") == STAGES  # a killed holder leaves no lock behind


def test_a_failing_notebook_is_named_with_its_cell_and_last_line(make_notebooks):
    bar = "import sys\nfor i in range(40):\n    print(f'\\rstep {i}/39', end='', file=sys.stderr, flush=True)"
    good = ["from medkit.stage import Stage", bar, "Stage(run, '01_good').commit(seen=[params_file, overrides])"]
    bad = ["x = 1", "raise ValueError('first line\\nwhat is wrong')"]
    make_notebooks({"01_good": good, "02_bad": bad, "03_never": ["x = 1"]})
    with pytest.raises(MedkitError) as error:
        run_all(SMOKE, "r", {"lora.adapter.rank": 4})
    message = str(error.value)
    kept = run_dir("r") / "notebooks" / "02_bad.ipynb"
    assert all(part in message for part in ("02_bad.ipynb", "ValueError", "what is wrong", str(kept)))
    assert "first line" not in message and "\n" not in message
    # the cell it names is the one of the kept copy that failed
    (failed,) = (c for c in nbformat.read(kept, as_version=4).cells if "raise ValueError" in c.source)
    assert f"cell {failed.execution_count}:" in message and failed.outputs[-1].output_type == "error"
    # a progress bar leaves one line in the executed copy, not one per step
    (shown,) = (c for c in nbformat.read(kept.with_stem("01_good"), as_version=4).cells if "step {i}" in c.source)
    assert [output.text for output in shown.outputs] == ["step 39/39"]
    done = Stage("r", "01_good").manifest()
    assert done["facts"] == {"seen": [str(run_dir("r") / "params.yaml"), {}]} and done["fingerprint"]
    states = runner.status(load_params(SMOKE, {"lora.adapter.rank": 4}), "r")
    assert [*states.values()] == ["done", "missing", "missing"]


def test_a_kernel_that_dies_is_a_failed_run(make_notebooks):
    """Out of memory kills the kernel, not the runner: no error in any cell to read."""
    make_notebooks({"01_dead": ["import os, signal", "os.kill(os.getpid(), signal.SIGKILL)"]})
    with pytest.raises(MedkitError, match=r"01_dead\.ipynb"):
        run_all(SMOKE, "r")


def test_dry_run_prints_the_profile_with_its_overrides_and_runs_nothing(command, executed, outputs):
    override = ("--set", "data.datasets.mmlu.test=77")
    code, out, err = command("run", "--params", str(SMOKE), "--dry-run", *override)
    assert (code, err) == (0, "a note\n")
    assert yaml.safe_load(out) == load_params(SMOKE, {"data.datasets.mmlu.test": 77}).model_dump(mode="json")
    assert executed == [] and not outputs.exists()


WRONG = [
    (["run", "--set", "lora.adapter.rank"], "KEY=VALUE"),
    (["run", "--run", "../evil"], "'../evil'"),
    (["run", "--from", "03_lra"], "03_lora"),
    (["run", "--reuse", "nowhere"], "no such run"),
    (["status", "--run", "never"], "--params"),
    (["train", "--stage", "lora", "--run", "never"], "--params"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_a_wrong_command_is_one_sentence_and_exit_code_one(command, executed, outputs, arguments, named):
    code, _, err = command(*arguments, *(["--params", str(SMOKE)] * (arguments[0] == "run")))
    assert code == 1 and named in err
    assert err.startswith("medkit: ") and err.count("\n") == 1
    assert executed == [] and not outputs.exists()


def test_a_whole_run_says_where_things_are(command, monkeypatch, executed, outputs):
    arguments, made = ("run", "--params", str(SMOKE), "--run", "r"), []
    monkeypatch.setattr(
        reporting, "write_report", lambda folder: (made.append(folder), (folder / "report.html").write_text("made"))
    )
    code, out, err = command(*arguments)
    assert code == 0 and all(name in err for name in STAGES)
    assert all(str(outputs / "r" / name) in out for name in ("results.json", "report.html"))
    code, out, _ = command(*arguments)
    assert (code, "up to date" in out) == (0, True)
    assert made == [outputs / "r"]  # a page that is there, of results that did not change, is not made again
    code, out, _ = command("status", "--run", "r")  # by the run's own params, not by tiny.yaml's
    assert (code, out.count("done")) == (0, 6)
    code, out, _ = command("status", "--run", "r", "--set", "lora.adapter.rank=4")
    assert (out.count("done"), out.count("stale")) == (2, 4)
    code, out, _ = command("status", "--run", "never", "--params", str(SMOKE))
    assert (code, out.count("missing")) == (0, 6)


def test_a_run_goes_on_with_its_own_profile_and_a_change_is_checked(command, monkeypatch, executed, outputs):
    """`--params mine.yaml` makes the run `mine`; `--run mine` alone never puts another profile in its place."""
    checked = []
    monkeypatch.setattr(preflight, "check_profile", lambda params: checked.append(params.lora.adapter.rank) or [])
    monkeypatch.setattr(reporting, "write_report", lambda folder: (folder / "report.html").write_text(""))
    rank = load_params(SMOKE).lora.adapter.rank
    assert command("run", "--params", str(SMOKE))[0] == 0 and executed == STAGES
    assert "up to date" in command("run", "--run", "smoke")[1] and checked == [rank]
    command("run", "--run", "smoke", "--set", f"lora.adapter.rank={2 * rank}")
    assert executed[6:] == STAGES[2:] and checked == [rank, 2 * rank]
    assert {path.name for path in outputs.iterdir()} == {"smoke"}


def test_train_takes_the_params_of_its_run(command, monkeypatch, executed):
    from medkit.lora import adapters

    run_all(SMOKE, "r", {"lora.adapter.rank": 4})
    given = []
    monkeypatch.setattr(adapters, "train_stage", lambda run, params: given.append(params) or sys.exit(0))
    command("train", "--stage", "lora", "--run", "r")
    assert given == [load_run_params("r")]
