"""A grid of runs: what is shared is made once, what belongs to a run is its own, and the scores stand side by side."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest

from medkit import runner, sweep
from medkit.params import load_params
from medkit.reporting import compare_runs, sweeps
from medkit.stage import FINGERPRINT, ROOT, STAGES, MedkitError, Stage, run_dir
from medkit.sweep import name_points, run_sweep

SMOKE = ROOT / "params" / "smoke.yaml"
GRID = {"lora.adapter.rank": [4, 8], "evaluation.margin": [0.05, 0.1]}


@pytest.fixture
def executed(outputs, monkeypatch) -> list[tuple[str, str]]:
    """Stages write weights, a table and a notebook, and no kernel starts: what ran, as (run, stage)."""
    ran = []

    def execute(notebook: Path, copy: Path, stage: Stage, fingerprint: str, parameters: dict) -> None:
        ran.append((stage.run, stage.name))
        stage.path("model/model.safetensors").write_text(f"weights of {stage.run}")
        stage.path("table.json").write_text("{}")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("{}")
        monkeypatch.setenv(FINGERPRINT, fingerprint)
        stage.commit()

    monkeypatch.setattr(runner, "_execute", execute)
    return ran


def test_runs_share_what_does_not_depend_on_the_grid(executed):
    points = name_points("s", GRID)
    first = "s_rank-4_margin-0.05"
    assert next(iter(points)) == first and len(points) == 4
    run_sweep(SMOKE, "s", points)
    count = pd.Series([stage for _, stage in executed]).value_counts().to_dict()
    assert count == {"01_data": 1, "02_distillation": 1, "03_lora": 2, "04_quantization": 2, "05_inference": 2,
                     "06_evaluation": 4}  # fmt: skip
    weights = {run: run_dir(run) / "02_distillation" / "model" / "model.safetensors" for run in points}
    assert len({os.stat(path).st_ino for path in weights.values()}) == 1  # on the disk once
    for run, point in points.items():
        states = {*runner.status(load_params(SMOKE, point), run).values()}
        assert states == {"done"} and (run_dir(run) / "notebooks" / "02_distillation.ipynb").is_file()
        assert Stage(run, "02_distillation").manifest()["run"] == run
    executed.clear()
    run_sweep(SMOKE, "s", points)
    assert not executed
    # a run that is made again leaves what the others took from it
    runner.run_all(SMOKE, first, points[first], first="02_distillation", last="02_distillation")
    assert executed == [(first, "02_distillation")]
    assert all(Stage(run, "02_distillation").is_whole() for run in points)


def test_a_stage_is_taken_only_if_it_is_whole_and_made_the_same_way(executed):
    runner.run_all(SMOKE, "old", {"seed": 1}, last="01_data")
    runner.run_all(SMOKE, "new", {"seed": 2}, last="01_data", reuse=["old"])
    (run_dir("old") / "01_data" / "table.json").unlink()
    runner.run_all(SMOKE, "again", {"seed": 1}, last="01_data", reuse=["old", "nowhere"])
    assert executed == [("old", "01_data"), ("new", "01_data"), ("again", "01_data")]


@pytest.mark.parametrize("grid", [{"a.rank": [1], "b.x": [2, 2]}, {"b.x": ["a b", "a/b"]}])
def test_runs_of_one_name_are_refused(grid):
    with pytest.raises(MedkitError, match="the same name"):
        name_points("s", grid)


def test_a_key_without_values_is_refused():
    with pytest.raises(MedkitError, match="--grid seed=: no value"):
        name_points("s", {"lora.adapter.rank": [4], "seed": []})


@pytest.mark.parametrize("settings", [{"slurm_partion": "x"}, {"cluster": "nonsense"}, {"timeout_min": "long"}])
def test_settings_that_submitit_refuses_are_one_sentence(outputs, monkeypatch, settings):
    monkeypatch.setattr(sweep, "fingerprints", lambda params: dict.fromkeys(STAGES, "x"))
    monkeypatch.setattr(sweep, "load_params", lambda path, point: None)
    with pytest.raises(MedkitError, match=r"--job: submitit refuses.*correct it"):
        run_sweep(SMOKE, "s", name_points("s", {"seed": [0]}), jobs={"cluster": "local"} | settings)


def test_a_job_that_fails_is_one_sentence_with_its_log(outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "fingerprints", lambda params: dict.fromkeys(STAGES, "x"))
    monkeypatch.setattr(sweep, "load_params", lambda path, point: None)
    points = name_points("s", {"seed": [0]})
    sentence = r"01_data: 1 of 1 runs failed, s_seed-0: .*no such params file.*log: "
    with pytest.raises(MedkitError, match=sentence) as error:
        run_sweep(tmp_path / "no.yaml", "s", points, jobs={"cluster": "local", "timeout_min": 1})
    assert Path(str(error.value).partition("log: ")[2].rstrip(")")).is_file()


def judged(right: int, seed: int) -> pd.DataFrame:
    rows = [("edge", "exam", "letter", f"{seed}-{i}", f"{seed}-{i}", i < right) for i in range(100)]
    return pd.DataFrame(rows, columns=[*compare_runs.KEYS, "id", "group", "correct"])


def test_scores_are_paired_with_the_first_setting_of_the_same_seed(outputs):
    points = name_points("s", {"lora.adapter.rank": [4, 8], "seed": [0, 1]})
    for right, (run, point) in zip((50, 60, 90, 95), points.items(), strict=True):
        table = judged(right, point["seed"])
        (run_dir(run) / "06_evaluation").mkdir(parents=True)
        table.to_parquet(run_dir(run) / compare_runs.JUDGED)
        facts = {"run": run, "params": {"evaluation": {"confidence": 0.95, "power": 0.8, "margin": 0.05}}}
        same = {"result": "accuracy/exam", "metric": "letter", "ci_low": 0.0, "ci_high": 1.0, "n": 100}
        rows = [same | {"variant": "edge", "value": right / 100}, same | {"variant": "teacher", "value": 0.5}]
        (run_dir(run) / "results.json").write_text(json.dumps(facts | {"results": rows}))
    scores = sweeps.collect_scores(points)
    assert set(scores.variant) == {"edge"}  # the teacher is the same everywhere
    assert scores.difference.round(6).tolist()[2:] == [0.4, 0.35] and scores.difference.isna().sum() == 2
    text = sweeps.write_sweep("s", points)
    assert "| lora.adapter.rank=8 | edge file | accuracy/exam, letter | 0.925 ± 0.035 (2) |" in text
    assert (outputs / "s" / "sweep.png").is_file()
