"""Rows of `results.json`: complete, plain numbers, and ratios that say what was divided by what."""

import json

import pandas as pd
import pytest

from medkit.reporting import results
from medkit.stage import DISCLAIMER, StageError


@pytest.fixture
def rows():
    sizes = [("teacher_base", "mlp", 400), ("student_kd", "mlp", 150), ("student_kd", "embeddings", 50)]
    sizes += [("nf4", "mlp", 40), ("nf4", "embeddings", 50), ("nf4", "quantization state", 10), ("edge", "mlp", 25)]
    ledger = pd.DataFrame(sizes, columns=["variant", "component", "bytes"])
    times = [(v, w, s, repeat, 0.1 * t, 0.01 * t + 0.001 * repeat, 100.0 / t)
             for v, w, s, t in (("teacher_base", "single", "sequential", 4), ("student_kd", "single", "sequential", 2),
                                ("nf4", "single", "sequential", 3), ("edge", "single", "sequential", 2),
                                ("student_kd", "skewed", "static", 1), ("student_kd", "skewed", "continuous", 2))
             for repeat in range(3)]  # fmt: skip
    columns = ["variant", "workload", "engine", "repeat", "ttft_s", "latency_s_per_token", "throughput_tokens_per_s"]
    bench = pd.DataFrame(times, columns=columns).assign(prompt_tokens=120, output_tokens=64, requests=4)
    found = [*results.from_ledger(ledger), *results.from_bench(bench)]
    manifests = {"01_data": {"duration_s": 3.0}, "02_distillation": {"duration_s": 60.5}, "03_lora": {}}
    return [*found, *results.ratios(found), *results.from_manifests(manifests)]


def named(rows, result, variant=None):
    return [r for r in rows if r["result"] == result and variant in (None, r["variant"])]


def test_timings_are_medians_of_the_repeats(rows):
    latency = {r["variant"]: (r["value"], r["n"], r["unit"]) for r in named(rows, "latency_s_per_token")}
    assert latency == {v: (pytest.approx(0.01 * t + 0.001), 3, "s")
                       for v, t in (("teacher_base", 4), ("student_kd", 2), ("nf4", 3), ("edge", 2))}  # fmt: skip
    throughput = {r["metric"]: (r["value"], r["unit"]) for r in named(rows, "throughput_tokens_per_s/skewed")}
    assert throughput == {"static": (100, "tokens/s"), "continuous": (50, "tokens/s")}
    assert all(r["output_tokens"] == 64 and r["requests"] == 4 for r in named(rows, "ttft_s"))


def test_ratios_divide_the_variant_by_its_baseline(rows):
    memory = {(r["variant"], r["baseline"]): r["value"] for r in named(rows, "memory_ratio")}
    assert memory == pytest.approx({("nf4", "student_kd"): 0.5, ("edge", "student_kd"): 0.125})
    latency = {(r["variant"], r["baseline"]): r["value"] for r in named(rows, "latency_ratio")}
    assert latency == pytest.approx({("nf4", "student_kd"): 0.031 / 0.021, ("edge", "student_kd"): 1.0})


def test_any_tidy_table_becomes_rows():
    columns = ["variant", "metric", "value", "ci_low", "ci_high", "bins", "ignored"]
    rows = [("student_kd", "ece", 0.1, 0.0, float("nan"), 4, 1), ("nf4", "brier", float("nan"), 0.1, 0.2, 4, 1)]
    table = pd.DataFrame(rows, columns=columns).assign(source="exam", scoring="letter", n=9)
    (row,) = results.from_table(table, "{metric}/{source}", "calibration.parquet", extras="bins")
    where = {"unit": "fraction", "baseline": None, "stage": "06_evaluation", "file": "calibration.parquet"}
    numbers = {"value": 0.1, "ci_low": 0.0, "ci_high": None, "n": 9, "bins": 4}
    assert row == {"result": "ece/exam", "variant": "student_kd", "metric": "letter", **numbers, **where}


def test_manifests_of_finished_stages_alone(rows):
    durations = {r["result"]: r["value"] for r in rows if r["result"].startswith("duration_s/")}
    assert durations == {"duration_s/01_data": 3.0, "duration_s/02_distillation": 60.5}


MANIFESTS = {"01_data": {"device": "a GPU", "git_commit": "abc"}, "02_distillation": {}}
FACTS = {"run": "toy", "headline_source": "exam", "headline_scoring": "option_text"}


def test_results_come_back_as_they_were_written(rows, tmp_path):
    path = results.write_results(tmp_path, rows, FACTS, MANIFESTS)
    table, facts = results.load_results(path)
    assert json.loads(path.read_text())["results"] == rows
    assert len(table) == len(rows) and set(results.COLUMNS) <= set(table.columns)
    assert FACTS.items() <= facts.items() and facts["disclaimer"] == DISCLAIMER
    assert {"date", "git_commit", "versions"} <= set(facts)
    assert facts["device"] == "a GPU" and facts["commits"] == {"01_data": "abc"}


def test_missing_or_damaged_results_are_one_sentence_with_a_cure(tmp_path):
    for content in (None, '{"results": [', "[]"):
        if content:
            (tmp_path / "results.json").write_text(content)
        with pytest.raises(StageError, match=r"results\.json: no whole results file .*medkit run"):
            results.load_results(tmp_path / "results.json")


def test_an_infinite_number_is_refused_and_the_old_file_stays(rows, tmp_path):
    before = results.write_results(tmp_path, rows, FACTS, MANIFESTS).read_text()
    with pytest.raises(ValueError, match="JSON"):
        results.write_results(tmp_path, [{**rows[0], "value": float("inf")}], FACTS, {})
    assert (tmp_path / "results.json").read_text() == before and len(list(tmp_path.iterdir())) == 1
